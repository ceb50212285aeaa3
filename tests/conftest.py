"""Rules for every test: quiet threads, and in continuous integration nothing is skipped silently."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)
_skipped: list[str] = []


LONGEST = (
    "slurm/test_jobs",
    "stages/test_finetune",
    "runtime/test_launch_ray",
    "stages/test_fsdp",
    "soak/test_crashes",
    "runtime/test_elastic_ray",
    "runtime/test_submit",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that two processes that share the files end together."""
    place_of = {Path(__file__).parent / f"{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place_of.get(item.path, len(LONGEST)))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped:
        _skipped.append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if os.environ.get("CI") and _skipped and exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if os.environ.get("CI") and _skipped:
        terminalreporter.write_line(
            f"Skipped although this is CI, which counts as a failure: {_skipped}"
        )
