"""What changes from step to step, and how it survives a crash."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dpldm_dist.config import Config, FinetuneConfig, refuse_other_settings
from dpldm_dist.errors import PrivacyError
from dpldm_dist.models.denoiser import Denoiser
from dpldm_dist.models.ema import EMA
from dpldm_dist.privacy.ledger import SharedLedger
from dpldm_dist.privacy.optimizer import DistributedDPOptimizer, NoisyStep, NoisySum
from dpldm_dist.privacy.plan import PrivacyPlan
from dpldm_dist.privacy.selfcheck import FrozenState, refuse_different_parameters
from dpldm_dist.runtime.checkpoint import Checkpoint, Checkpoints
from dpldm_dist.runtime.strategy import private_update
from dpldm_dist.runtime.worker import Worker
from dpldm_dist.stages.finetune.curves import Curves


def settings_of(config: Config) -> dict[str, Any]:
    """The settings that a run keeps from its first start to its end."""
    tree = config.model_dump(mode="json")
    run = {name: tree["run"][name] for name in ("unsafe_no_noise", "unsafe_diagnostics")}
    tree["model"].pop("init")  # a place on this machine; the model itself is a parent
    for name in ("dataset_ledger", "dataset_epsilon", "dataset_delta"):
        tree["privacy"].pop(name)  # the file of that budget keeps them
    return {name: tree[name] for name in ("finetune", "privacy", "model")} | {"run": run}


class TrainingState:
    """Trainable parameters, their average, the private optimizer, and the curves of what it
    released, after ``step`` steps."""

    def __init__(
        self,
        config: Config,
        plan: PrivacyPlan,
        key: bytes,
        ledger: SharedLedger,
        denoiser: Denoiser,
        parameters: dict[str, nn.Parameter],
        worker: Worker,
    ):
        self.step = 0
        self.denoiser = denoiser
        self.parameters = parameters
        self._config = config
        self._worker = worker
        self._ledger = ledger
        self._frozen: FrozenState | None = None
        self._plan = plan
        self.curves = Curves(config, plan, parameters, worker)
        self._noisy_sum = NoisySum(
            key,
            std=plan.noise_multiplier * plan.clip_norm / plan.grid,
            mechanism=plan.digest(),
            collective=worker.collective,
            bind=ledger.bind,
            unsafe_no_noise=config.run.unsafe_no_noise,
        )

    @property
    def learning_rate(self) -> float:
        return self._update.optimizer.param_groups[0]["lr"]

    def begin(self) -> None:
        """Start average and optimizer at the parameters as they are now."""
        config, plan = self._config, self._plan
        self.ema = EMA(self.parameters, config.finetune.ema_decay)
        self._update = private_update(
            self.parameters,
            partial(inner_optimizer, config.finetune),
            run=config.run,
            worker=self._worker,
            extra=self.curves.extra,
        )
        self._schedule = _schedule(config.finetune, self._update.optimizer, steps=plan.steps)
        self.optimizer = DistributedDPOptimizer(
            self._update,
            self._update.parameters,
            self._noisy_sum,
            grid=plan.grid,
            clip_norm=plan.clip_norm,
            divisor=plan.divisor,
            extra=self.curves.extra,
            schedule=self._schedule,
            sharded=self._update.bounds is not None,
        )

    def freeze(self) -> None:
        """From now on a save refuses a change of anything but the trainable parameters."""
        self._frozen = FrozenState(self.denoiser, self.parameters.keys())

    def tick(self, noisy: NoisyStep) -> None:
        """One step is done: average and curves follow."""
        self.ema.update()
        self.curves.add(noisy)
        self.step += 1

    def save(self, checkpoints: Checkpoints) -> None:
        """Write a checkpoint that names the ledger head it belongs to. It holds no key.

        Raises: PrivacyError if a frozen parameter or a buffer changed, or workers differ.
        """
        if self._frozen is not None:
            self._frozen.verify()
        refuse_different_parameters(self.parameters, self._worker.collective)
        head = self._ledger.note_checkpoint(self.step)
        tensors = self._tensors()  # every worker: the optimizer's state may be spread over them
        if self._worker.rank == 0:
            facts = {
                "settings": settings_of(self._config),
                "ledger_head": list(head),
                "grad_scale": self.denoiser.embedder.grad_scale,
            }
            checkpoints.save(self.step, tensors, facts)
        self._worker.collective.barrier()
        self._worker.checkpointed(self.step)

    def restore(self, checkpoints: Checkpoints) -> bool:
        """Go on from the newest checkpoint; False if there is none.

        Raises: PrivacyError if it belongs to another ledger; RunError for other settings.
        """
        saved = checkpoints.latest()
        if saved is None:
            return False
        refuse_other_settings(
            saved.facts["settings"], settings_of(self._config), self._config.run.dir / "private"
        )
        if not self._ledger.contains(saved.facts["ledger_head"]):
            raise PrivacyError(
                "The newest checkpoint belongs to another ledger, or the ledger was cut or "
                "replaced: restore the ledger that goes with it, or use a new run.dir."
            )
        self._load(saved)
        return True

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"parameter/{name}": p.detach() for name, p in self.parameters.items()}
        tensors |= {f"ema/{name}": value for name, value in self.ema.state().items()}
        tensors |= {f"curves/{name}": value for name, value in self.curves.state().items()}
        tensors["embedder/base"] = self.denoiser.embedder.base
        tensors |= {f"optimizer/{name}": value for name, value in self._update.state().items()}
        return tensors

    @torch.no_grad()
    def _load(self, saved: Checkpoint) -> None:
        self.step = saved.step
        self.denoiser.embedder.base.copy_(saved.tensors["embedder/base"])
        self.denoiser.embedder.grad_scale = saved.facts["grad_scale"]
        for name, parameter in self.parameters.items():
            parameter.copy_(saved.tensors[f"parameter/{name}"])
        self.begin()
        self._update.load(_below("optimizer/", saved.tensors))
        self.ema.load(_below("ema/", saved.tensors))
        self.curves.load(_below("curves/", saved.tensors), steps=self.step)
        self._schedule.last_epoch = self.step
        groups = self._update.optimizer.param_groups
        for group, base in zip(groups, self._schedule.base_lrs, strict=True):
            group["lr"] = base * self._schedule.lr_lambdas[0](self.step)


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def inner_optimizer(
    settings: FinetuneConfig, learning: Sequence[nn.Parameter]
) -> torch.optim.Optimizer:
    """The ordinary optimizer that the noisy mean is handed to."""
    if settings.optimizer == "adam":
        return torch.optim.Adam(learning, lr=settings.learning_rate, betas=settings.betas)
    return torch.optim.SGD(learning, lr=settings.learning_rate, momentum=settings.betas[0])


def _schedule(
    settings: FinetuneConfig, inner: torch.optim.Optimizer, *, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    def factor(step: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps))

    return torch.optim.lr_scheduler.LambdaLR(
        inner, factor if settings.lr_decay == "cosine" else lambda step: 1.0
    )
