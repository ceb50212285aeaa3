"""``dpldm plan --cluster``: what it predicts, what it proposes, and that it says so."""

from __future__ import annotations

import itertools
import math

import pytest

from dpldm_dist.cli import main
from dpldm_dist.config import parse_config
from dpldm_dist.errors import ConfigError
from dpldm_dist.privacy.plan import make_plan
from dpldm_dist.runtime.worker import solo_worker
from dpldm_dist.stages.clusters import PREDICTED, cluster_tables
from dpldm_dist.stages.plan import describe, mechanism_of, plan
from dpldm_dist.stages.proposal import (
    LEAST_STEPS,
    gain_of_draws,
    limit_of_signal,
    propose,
    share_of_signal,
)
from dpldm_dist.stages.shapes import flops_per_row, shapes_of


def tree(**sections):
    found = {
        "privacy": {"epsilon": 5.0, "delta": 1e-5, "clip_norm": 0.5, "records": 5000},
        "finetune": {"steps": 50, "batch": 100},
        "model": {"block_channels": [16, 32], "norm_groups": 8, "context_dim": 16},
        "cluster": {"gpus": [2, 64], "batches": [1024, 4096, 10**6]},
    }
    for name, fields in sections.items():
        found[name] = {**found.get(name, {}), **fields}
    return found


def printed_by(capsys, **sections) -> str:
    plan(parse_config(tree(**sections)), solo_worker(), cluster=True)
    return capsys.readouterr().out


# --- what is printed ------------------------------------------------------------------------------


def test_every_time_is_labelled_predicted_and_batches_beyond_the_records_are_left_out(capsys):
    printed = printed_by(capsys, cluster={"gpu_hours": 0.01})
    tables = [line for line in printed.splitlines() if "Seconds per step" in line]
    assert len(tables) == 3 and all(PREDICTED in line for line in tables)
    assert "GPU-hours (times predicted, not measured)" in printed.replace("\n", " ")
    assert "1,000,000" not in printed and "64 GPUs" in printed and "finetune.batch" in printed


def test_without_the_switch_nothing_is_predicted(capsys, tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(
        "[privacy]\nepsilon = 5.0\ndelta = 1e-5\nclip_norm = 0.5\nrecords = 2000\n"
        "[finetune]\nsteps = 50\nbatch = 100\n"
    )
    assert main(["plan", "--config", str(path)]) == 0
    assert "predicted" not in capsys.readouterr().out
    assert main(["plan", "--config", str(path), "--cluster", "--dry-run"]) == 0
    assert "predictions for clusters, not measured" in capsys.readouterr().out
    assert describe(parse_config(tree())) == describe(parse_config(tree()), cluster=False)


def test_a_model_from_elsewhere_is_refused_because_its_shapes_are_not_known(tmp_path):
    with pytest.raises(ConfigError, match=r"expected no model\.init"):
        plan(parse_config(tree(model={"init": str(tmp_path)})), solo_worker(), cluster=True)


@pytest.mark.parametrize(
    "fields", [{"tflops": [67.0, 19.5]}, {"hop_us": [5.0, 20.0]}, {"gpus": [0]}]
)
def test_a_range_the_wrong_way_round_is_refused(fields):
    with pytest.raises(ConfigError):
        parse_config(tree(cluster=fields))


def test_hours_that_pay_for_nothing_are_answered_plainly():
    config = parse_config(tree(cluster={"gpu_hours": 1e-9, "batches": []}))
    *_, (title, rows) = cluster_tables(config, mechanism_of(config))
    assert PREDICTED in title and "raise cluster.gpu_hours" in rows[0][1]


def test_operations_are_those_of_the_layers():
    """Doubling all channels multiplies the operations of the convolutions by nearly four; what does
    not train needs no gradient of its weights."""
    small = flops_per_row(parse_config(tree()))
    wide = flops_per_row(parse_config(tree(model={"block_channels": [32, 64]})))
    assert 3 < wide / small < 4
    everything = flops_per_row(parse_config(tree(finetune={"trainable": "attention"})))
    assert everything < small
    _, parameters = shapes_of(parse_config(tree()))
    assert all(parameter.is_meta for parameter in parameters.values())


# --- the criterion --------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [1.0, 10.0])
def test_the_share_of_the_signal_is_that_of_the_exact_accountant(epsilon):
    """Against PLD, up to the error of the central limit theorem."""
    records, delta = 50_000, 1e-5
    limit = limit_of_signal(epsilon=epsilon, delta=delta)
    for batch, steps in ((2048, 400), (16_384, 100)):
        exact = make_plan(
            epsilon=epsilon, delta=delta, clip_norm=1.0, records=records, batch=batch, steps=steps
        )
        rounds = math.sqrt(steps) * batch / records
        approximate = limit * share_of_signal(rounds, limit)
        assert rounds / exact.noise_multiplier == pytest.approx(approximate, rel=0.12)


def test_larger_batches_help_until_the_limit_and_draws_help_ever_less():
    limit = limit_of_signal(epsilon=10.0, delta=1e-5)
    shares = [share_of_signal(2.0**n, limit) for n in range(-5, 8)]
    assert shares == sorted(shares) and shares[-1] > 0.999 and shares[0] < 0.1
    gains = [gain_of_draws(2**n) for n in range(6)]
    assert gains[0] == 1 and gains[2] == pytest.approx(1.51, abs=0.01)
    steps = [after - before for before, after in itertools.pairwise(gains)]
    assert steps == sorted(steps, reverse=True)


def test_the_proposal_fits_what_is_paid_for_and_no_choice_is_much_better():
    for rows in (1e6, 1e7, 1e9):
        best, *smaller = propose(epsilon=5.0, delta=1e-5, records=50_000, rows=rows)
        assert best.rows <= rows and best.steps >= LEAST_STEPS and best.batch <= 50_000
        assert all(other.rows <= rows and other.batch < best.batch for other in smaller)
        assert all(other.signal <= best.signal / 0.98 for other in smaller)
        assert smaller == sorted(smaller, key=lambda p: -p.batch)


def test_more_hours_are_never_worse_and_go_to_batches_first():
    found = [
        propose(epsilon=10.0, delta=1e-5, records=60_000, rows=10.0**n)[0] for n in range(5, 10)
    ]
    signals = [best.signal for best in found]
    assert all(b >= 0.98 * a for a, b in itertools.pairwise(signals))
    assert [best.batch for best in found] == sorted(best.batch for best in found)
    assert propose(epsilon=10.0, delta=1e-5, records=60_000, rows=10.0) == []
