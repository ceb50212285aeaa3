"""What processes of tests begin with. A fork server imports it once and forks from it.

A process takes seconds to import the libraries; forked from here it takes none. Only imports, and
the answers of pure functions, are carried over.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch

torch.set_num_threads(1)  # before anything starts a thread: a fork would lose it

from dpldm_dist.privacy import accounting
from dpldm_dist.runtime.rundir import RunDir
from dpldm_dist.runtime.worker import solo_worker
from dpldm_dist.stages.finetune import finetune
from dpldm_dist.stages.mechanism import plan_of
from tests.soak import inside  # noqa: F401 - what the forked processes run
from tests.soak.tiny import OWN_KEY, STEPS, Tiny

# Epsilons of the same steps are asked for at every start.
accounting._pld_epsilon = lru_cache(maxsize=None)(accounting._pld_epsilon)
accounting._rdp_epsilon = lru_cache(maxsize=None)(accounting._rdp_epsilon)


def _rehearse() -> None:
    """One run that fills the caches of the libraries and of the accountant."""
    with tempfile.TemporaryDirectory() as folder:
        config = Tiny.make(Path(folder)).config("rehearsal", **OWN_KEY)
        RunDir(config.run.dir).create()
        finetune(config, solo_worker())
    plan = plan_of(config, records=config.privacy.records)
    for steps in range(STEPS + 1):
        spent = [replace(plan.step_event, count=steps), *plan.statistics_events]
        accounting.epsilon(spent, plan.accounting_delta)


_rehearse()
