"""How the model of *public* pre-training is held by several workers.

``finetune`` never uses this module: a wrapper that averages gradients over workers would reduce
the private sum a second time, and outside the noise mechanism.
"""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dpldm_dist.config import RunConfig
from dpldm_dist.runtime.worker import Worker


def replicate(model: nn.Module, worker: Worker, *, run: RunConfig) -> nn.Module:
    """``model`` with gradients averaged over the workers, or itself when there is one.

    ``run.strategy`` chooses how; "ddp": whole replicas. The caller draws its share of a batch and
    scales nothing.
    """
    model.to(worker.device)
    if worker.world_size == 1:
        return model
    assert run.strategy == "ddp"  # the only one that config.py knows
    devices = [worker.device] if worker.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices)


def bare(model: nn.Module) -> nn.Module:
    """The module inside :func:`replicate`'s result: the one to save, copy and take names from."""
    return model.module if isinstance(model, DistributedDataParallel) else model
