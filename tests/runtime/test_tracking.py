"""What is shown: public quantities only, each step once, by worker 0."""

import io
import json
import re
from dataclasses import replace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dpldm_dist.errors import PrivacyError
from dpldm_dist.runtime.rundir import RunDir
from dpldm_dist.runtime.tracking import (
    FACTS,
    LAYOUT,
    PUBLIC,
    SCALARS,
    Progress,
    Tracker,
    UnsafeTracker,
    show_progress,
)
from dpldm_dist.runtime.worker import solo_worker


def events(folder) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()


def test_public_quantities_are_shown(tmp_path):
    with Tracker(tmp_path, solo_worker(), start_step=0) as tracker:
        for tag in [*SCALARS, "public/pretrain_loss"]:
            tracker.scalar(tag, 1.5, 3)
        tracker.images("samples/grid", torch.rand(4, 1, 8, 8), 3)
        tracker.text("privacy/plan", "epsilon 10")
        tracker.hparams({"finetune.steps": 5, "privacy.delta": 1e-5, "data.source": None})
    found = events(tmp_path)
    assert {*SCALARS, "public/pretrain_loss"} <= set(found.Tags()["scalars"])
    assert found.Scalars("privacy/epsilon")[0].value == 1.5
    assert "samples/grid" in found.Tags()["images"]
    plugins = found.SummaryMetadata("_hparams_/experiment").plugin_data.plugin_name
    assert plugins == "hparams" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "tag",
    ["loss", "train/loss", "privacy/batch_size", "optimizer/gradient_norm", "speed/batch_seconds"]
    + ["raw/loss", "private/raw_loss", "private/loss/raw", "private/gradient_norm", "signal/sum"]
    + ["samples/loss", "publicly/loss", "privacy/epsilon/../loss", "optimizer/clip_fraction", ""],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_private_quantity_is_refused_on_every_worker_and_leaves_no_trace(tmp_path, tag, rank):
    worker = replace(solo_worker(), rank=rank, world_size=2)
    with Tracker(tmp_path, worker, start_step=0) as tracker:
        with pytest.raises(PrivacyError, match="not in the list of public quantities"):
            tracker.scalar(tag, 31337.0, 0)
        with pytest.raises(PrivacyError):
            tracker.images("privacy/images", torch.rand(1, 1, 2, 2), 0)
        with pytest.raises(PrivacyError):
            tracker.text(tag or "notes", "text", 0)
        with pytest.raises(PrivacyError):
            tracker.hparams({"run.unsafe_test_key": "00"})
    if rank == 0:
        assert events(tmp_path).Tags()["scalars"] == events(tmp_path).Tags()["images"] == []
    else:
        assert list(tmp_path.iterdir()) == []


def test_every_chart_shows_quantities_of_the_list():
    charts = [chart for group in LAYOUT.values() for chart in group.values()]
    assert {kind for kind, _ in charts} == {"Margin", "Multiline"}
    for kind, tags in charts:
        for tag in tags:
            if kind == "Margin":
                assert tag in SCALARS
            else:
                assert tag.startswith(PUBLIC) or any(re.search(tag, known) for known in SCALARS)
        assert kind == "Multiline" or len(tags) == 3  # value, lower and upper edge


def test_raw_values_are_written_below_a_closed_private_folder_only(tmp_path):
    run = RunDir(tmp_path / "run").create()
    tracker = UnsafeTracker(run.diagnostics, solo_worker(), start_step=0)
    tracker.scalar("raw/loss", 31337.0, 0)
    assert events(run.diagnostics).Scalars("raw/loss")[0].value == 31337.0
    for path in [run.diagnostics, *run.diagnostics.iterdir()]:
        assert path.stat().st_mode & 0o077 == 0
    other = replace(solo_worker(), rank=1, world_size=2)
    UnsafeTracker(run.private / "other", other, start_step=0).scalar("raw/loss", 1.0, 0)
    assert not (run.private / "other").exists()
    run.private.chmod(0o755)
    for folder in (run.diagnostics, run.tensorboard, run.release / "diagnostics"):
        with pytest.raises(PrivacyError, match="mode 0700"):
            UnsafeTracker(folder, solo_worker(), start_step=0)


def test_only_worker_0_writes(tmp_path):
    worker = replace(solo_worker(), rank=1, world_size=2)
    with Tracker(tmp_path / "events", worker, start_step=0) as tracker:
        tracker.scalar("privacy/epsilon", 1.0, 0)
    Progress(tmp_path / "progress.json", worker=worker).start("finetune", 3)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("resumed_at", [0, 3])
def test_a_resumed_run_shows_every_step_once(tmp_path, resumed_at):
    for start, value in [(0, 1.0), (resumed_at, 2.0)]:
        with Tracker(tmp_path, solo_worker(), start_step=start) as tracker:
            for step in range(start, 6):
                tracker.scalar("privacy/epsilon", value, step)
    found = events(tmp_path).Scalars("privacy/epsilon")
    assert [event.step for event in found] == list(range(6))
    assert [event.value for event in found] == [1.0] * resumed_at + [2.0] * (6 - resumed_at)


def test_progress_holds_the_last_step_and_public_facts(tmp_path):
    progress = Progress(tmp_path / "progress.json", worker=solo_worker())
    progress.start("finetune", 100)
    for step in range(1, 101):
        progress.advance(step, epsilon=step / 10, learning_rate=0.01)
    progress.done()
    state = json.loads((tmp_path / "progress.json").read_text())
    assert (state["what"], state["step"], state["total_steps"]) == ("finetune", 100, 100)
    assert state["state"] == "done" and state["facts"] == {"epsilon": 10.0, "learning_rate": 0.01}
    assert [path.name for path in tmp_path.iterdir()] == ["progress.json"]


def test_progress_refuses_private_facts(tmp_path):
    progress = Progress(tmp_path / "progress.json", worker=solo_worker())
    progress.start("finetune", 100)
    assert "loss" not in FACTS
    with pytest.raises(PrivacyError):
        progress.advance(1, loss=31337.0)
    assert "31337" not in (tmp_path / "progress.json").read_text()


def test_the_driver_shows_what_begins_and_what_is_done(tmp_path, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    path = tmp_path / "progress.json"
    old = Progress(path, worker=solo_worker())
    old.start("from an earlier run", 5)
    with show_progress(path):
        progress = Progress(path, worker=solo_worker())
        progress.start("finetune", 4)
        progress.advance(4, epsilon=9.5)
        progress.done()
    assert "finetune 4/4 done in 0:00, epsilon 9.5" in screen.getvalue()
    assert "earlier" not in screen.getvalue()


def test_a_terminal_gets_a_bar(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    path = tmp_path / "progress.json"
    with show_progress(path):
        progress = Progress(path, worker=solo_worker())
        progress.start("finetune", 4)
        progress.advance(2, epsilon=9.5)
        progress.done()
    assert "finetune" in screen.getvalue() and "4/4" in screen.getvalue()
    assert "epsilon 9.5" in screen.getvalue()
