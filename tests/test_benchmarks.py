"""The benchmarks measure what they say: right sums, right counts, promised columns."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from benchmarks import memory, report
from benchmarks.cells import make_cell, own_copy
from benchmarks.clock import peak_bytes
from benchmarks.methods import METHODS, Unsupported
from benchmarks.step import TOLERANCE, clip_norm_of, deviation, main, merge
from benchmarks.work import performed, work_of

pytestmark = pytest.mark.filterwarnings("ignore")  # what the peers warn of
PEERS = [name for name in METHODS if name not in ("nonprivate", "ours")]
PROMISED = {"model", "trainable", "K", "method", "seconds_per_record", "time_ratio", "memory_ratio"}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("trainable", "draws"), [("transformer", 1), ("lora", 2)])
@pytest.mark.parametrize("peer", PEERS)
def test_a_peers_clipped_sum_is_ours(peer, trainable, draws):
    cell = make_cell("tiny", trainable, draws=draws, rows=4)
    clip_norm = clip_norm_of(cell)
    if (peer, draws) == ("opacus-ghost", 2):
        with pytest.raises(Unsupported, match="norm of each row"):
            METHODS[peer](cell, clip_norm)
        return
    step = METHODS[peer](own_copy(cell), clip_norm)
    step.run()
    step.run()  # the sum of a pass is that pass's alone
    assert deviation(cell, step, clip_norm) < TOLERANCE


def test_a_wrong_sum_is_noticed():
    """That of unclipped gradients, when half of the records should be clipped."""
    cell = make_cell("tiny", "attention", draws=1, rows=4)
    step = METHODS["vmap"](own_copy(cell), 1e9)
    step.run()
    assert deviation(cell, step, clip_norm_of(cell)) > 100 * TOLERANCE


def test_the_baseline_takes_the_gradient_of_the_mean_loss():
    cell = make_cell("tiny", "attention", draws=1, rows=4)
    plain, ours = (METHODS[name](own_copy(cell), 1e3) for name in ("nonprivate", "ours"))
    plain.run()
    ours.run()
    torch.testing.assert_close(ours.result() / 4, plain.result(), rtol=1e-4, atol=1e-5)


def test_frozen_parameters_of_the_baseline_get_no_gradient():
    cell = make_cell("tiny", "attention", draws=1, rows=2)
    METHODS["nonprivate"](cell, 1.0).run()
    with_gradient = {name for name, p in cell.denoiser.named_parameters() if p.grad is not None}
    assert with_gradient == set(cell.parameters)


def test_the_work_of_two_linear_layers_is_what_one_counts_by_hand():
    """3 rows through 5 -> 7 -> 2; the first is frozen, so nothing flows below the second."""
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 2))
    x = torch.randn(3, 5)
    forward, last = 2 * 3 * (5 * 7 + 7 * 2), 2 * 3 * 7 * 2
    model[0].requires_grad_(False)
    top = work_of(model, list(model[1].parameters()), lambda: model(x).sum(1))
    assert (top.forward, top.activation_backward, top.weight_gradients) == (forward, 0, last)
    model[0].requires_grad_(True)
    model[1].requires_grad_(False)
    below = work_of(model, list(model[0].parameters()), lambda: model(x).sum(1))
    expected = (forward, last, 2 * 3 * 5 * 7)
    assert (below.forward, below.activation_backward, below.weight_gradients) == expected
    assert performed(lambda: model(x)) == forward


def test_peak_memory_counts_what_is_alive_at_once():
    """Two tensors of 4 MB at once, then one of 4 MB: 8 MB at the most."""

    def run():
        both = [torch.zeros(1_000_000) for _ in range(2)]
        del both
        torch.zeros(1_000_000)

    assert peak_bytes(lambda: run, torch.device("cpu")) == pytest.approx(8e6, rel=0.01)


def test_a_whole_private_step_holds_one_vector_of_integers():
    """Where few rows pass through many parameters: at its end two averages of AdamW, the sum in
    eight bytes and a gradient in four. A copy of the sum, or noise drawn at once, would be seen."""
    cell = make_cell("small", "all", draws=1, rows=4)
    plain, private = (memory.peak(own_copy(cell), private=kind) for kind in (False, True))
    assert 12 * cell.count < plain < private
    assert 20 * cell.count < private < 24 * cell.count


def test_the_benchmark_writes_rows_with_the_promised_columns_and_a_small_plot(tmp_path):
    output = tmp_path / "step.json"
    arguments = ["--models", "tiny", "--trainable", "attention", "--draws", "2", "--rows", "4"]
    arguments += ["--turns", "1", "--methods", "nonprivate", "ours", "opacus-ghost"]
    main([*arguments, "--one-process", "--output", str(output)])
    document = json.loads(output.read_text())
    by_method = {row["method"]: row for row in document["rows"]}
    assert set(by_method["ours"]) >= PROMISED and by_method["ours"]["B"] == 2
    assert by_method["nonprivate"]["time_ratio"] == by_method["nonprivate"]["memory_ratio"] == 1.0
    assert "norm of each row" in by_method["opacus-ghost"]["reason"]
    assert {"python", "torch", "cores", "threads"} <= set(document["machine"])
    assert 1000 < output.with_suffix(".png").stat().st_size < 300_000
    assert len(report.step_lines(document)) == 7  # machine, table of one cell, one reason


def test_rows_that_are_measured_again_replace_the_old_ones_only():
    def row(method, time):
        return {"model": "m", "trainable": "t", "K": 1, "method": method, "time_ratio": time}

    merged = merge([row("a", 1), row("b", 2)], [row("b", 3)])
    assert merged == [row("a", 1), row("b", 3)]


def test_only_what_stands_between_the_markers_is_rewritten():
    first, last = report.MARKERS["step"]
    text = f"before\n{first}\nold\n{last}\nafter\n"
    assert report.rewritten(text, "step", ["new"]) == f"before\n{first}\nnew\n{last}\nafter\n"
    with pytest.raises(ValueError, match="Expected the markers"):
        report.rewritten("no markers", "step", ["new"])
    document = report.DOCUMENT.read_text()
    for name in report.MARKERS:
        assert report.rewritten(document, name, ["new"]) != document
