"""On the path of test jobs only: holds real fine-tuning at a step, or has a worker fail there.

The folder DPLDM_TEST_GATE may hold a file ``hold`` with the number of a step: every worker waits
before that step until the file is gone, or the run in ``run`` (if it is there) is asked to stop,
and shows in ``waiting-RANK`` that it does. A file ``fail`` names a step at which the last worker fails.
"""

import importlib.abc
import importlib.util
import os
import sys
import time
from pathlib import Path

_MODULE = "dpldm_dist.stages.finetune.private_data"


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_and_gate(module):
            load(module)
            _gate(module.PrivateData)

        spec.loader.exec_module = load_and_gate
        return spec


def _gate(kind):
    folder, microbatches = Path(os.environ["DPLDM_TEST_GATE"]), kind.microbatches

    def gated(self, step):
        worker = self._worker
        if worker.rank == worker.world_size - 1 and _step(folder / "fail") == step:
            raise ValueError("the private value is 31337")
        mark = folder / f"waiting-{worker.rank}"
        while _step(folder / "hold") == step and not (folder / "run/private/stop").exists():
            mark.touch()
            time.sleep(0.05)
        mark.unlink(missing_ok=True)
        yield from microbatches(self, step)

    kind.microbatches = gated


def _step(path):
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


if "DPLDM_TEST_GATE" in os.environ:
    sys.meta_path.insert(0, _Finder())
