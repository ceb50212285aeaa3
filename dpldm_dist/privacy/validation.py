"""Which models may learn from private records: those whose rows do not know of each other.

The guarantee needs more than clipped gradients. The loss of a record must be a function of that
record, of its own draws and of the parameters alone, and nothing that a record has passed may stay
behind in the model. ``validate_model`` tries both on made-up records before the first private one
is read, and names the module that is at fault.

Shapes: B records of a microbatch, K draws of each, R = B * K rows (record-major).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dpldm_dist.errors import PrivacyError

Losses = Callable[[Sequence[int]], Tensor]
"""Seeds of the B records of a microbatch -> loss of every row, (R,). Record b is made up from
``seeds[b]`` alone: its content and all that it draws."""

_DROPOUTS = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)


def validate_model(
    model: nn.Module,
    parameters: Iterable[nn.Parameter],
    losses: Losses,
    *,
    records: int,
    draws: int,
    tolerance: float = 1e-6,
) -> float:
    """Refuse a model in which one record could reach another; the largest relative difference seen.

    ``parameters`` are the trainable ones, ``losses`` runs the model on made-up records. Returns 0.0
    where everything agreed bit for bit, as it does on CPU; ``tolerance`` (on distances relative to
    the norm) leaves room for kernels that add in an order of their own. Modes of modules and states
    of generators are left as found. It takes 4 ceil(log2 B) backward passes and 12 forward ones.

    Formal guarantees: a model is refused if, on the made-up records, (1) it holds a batch norm, or
    an instance norm with running statistics; (2) a forward pass draws from torch's generators; (3)
    in train or in eval mode a forward pass changes a parameter or a buffer (persistent or not), or
    a module keeps a tensor that is another one after other records; (4) a microbatch gives other
    losses after another one was seen; (5) the losses of a record, or the gradient of its losses,
    change with the content of any other record; (6) they change with its place in the microbatch.
    Every ordered pair of records is tried in (5): the two numbers differ in some bit, and for each
    bit all records with a 1, then all with a 0, get other content, while the losses and gradients
    of the rest must stay.
    What it cannot see: a coupling that made-up records never set off.
    Raises: PrivacyError with the reason and what to do.
    """
    refuse_modules(model)
    trial = _Trial(model, list(parameters), losses, records, draws, tolerance)
    with _as_found(model):
        trial.refuse_changes()  # first: it must see the model before any pass
        trial.refuse_randomness()
        trial.refuse_memory()
        trial.refuse_coupling()
        trial.refuse_places()
    return trial.worst


def refuse_modules(model: nn.Module) -> None:
    """Refuse modules that are known to couple records, whatever mode they are in.

    Raises: PrivacyError naming the module.
    """
    for path, module in model.named_modules():
        kind = f"Module {path or '(the model)'} ({type(module).__name__})"
        if isinstance(module, nn.modules.batchnorm._BatchNorm):  # SyncBatchNorm is one, too
            raise PrivacyError(
                f"{kind} is a batch norm: in train mode its statistics mix the records of a batch "
                "and write private data into buffers, also when its parameters are frozen. Replace "
                "it by GroupNorm, or fold it into the layer before it."
            )
        if isinstance(module, nn.modules.instancenorm._InstanceNorm) and (
            module.track_running_stats or module.running_mean is not None
        ):
            raise PrivacyError(
                f"{kind} keeps running statistics: private data would be written into its buffers. "
                "Make it with track_running_stats=False, or replace it by GroupNorm."
            )
        if isinstance(module, _DROPOUTS) and module.training and module.p > 0:
            raise PrivacyError(
                f"{kind} is active: its masks come from torch's generator in the order of the "
                "rows, so what a record draws would depend on the other records, and no restart "
                "could repeat it. Call model.eval() before private training."
            )


class _Trial:
    """Forward and backward passes on made-up records, and what they showed."""

    def __init__(
        self,
        model: nn.Module,
        parameters: list[nn.Parameter],
        losses: Losses,
        records: int,
        draws: int,
        tolerance: float,
    ):
        self._model = model
        self._parameters = parameters
        self._losses = losses
        self._records = records
        self._draws = draws
        self._tolerance = tolerance
        self._seeds = list(range(records))
        self._others = [records + seed for seed in self._seeds]
        self.worst = 0.0

    def refuse_randomness(self) -> None:
        gpus = _gpus(self._model)
        before = _generator_states(gpus)
        self._forward(self._seeds)
        after = _generator_states(gpus)
        if any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)):
            raise PrivacyError(
                "A forward pass of the model draws from torch's generators: what a record draws "
                "would depend on the other records, and no restart could repeat it. Call "
                "model.eval(), or set its dropout to 0."
            )

    def refuse_changes(self) -> None:
        """What a module makes at its first pass may stay if it is the same after other records: a
        table of positions, for instance."""
        for mode in (False, True):
            with _as_found(self._model):
                self._model.train(mode)
                before = contents(self._model)
                self._forward(self._seeds)
                first = contents(self._model)
                self._forward(self._others)
                then = contents(self._model)
            old = {name: digest for name, digest in first.items() if name in before}
            changed = first_difference(before, old) or first_difference(first, then)
            if changed is not None:
                raise PrivacyError(
                    f"A forward pass changes {changed}: what is computed from private records "
                    "would stay in the model, without noise. Remove it, or replace the module by "
                    "one that keeps no state (GroupNorm for norms)."
                )

    def refuse_memory(self) -> None:
        self._forward(self._seeds)  # so that what went before is not the same both times
        first_R = self._forward(self._seeds)
        self._forward(self._others)
        if self._differs(first_R, self._forward(self._seeds)):
            raise PrivacyError(
                "The model gives other losses for the same records after it has seen others: it "
                "remembers what passed through it, or it is not deterministic. Remove the module "
                "that does, or switch deterministic kernels on."
            )

    def refuse_coupling(self) -> None:
        for bit in range((self._records - 1).bit_length()):
            for side in (0, 1):
                kept_B = torch.tensor([b >> bit & 1 == side for b in range(self._records)])
                self._require_apart(kept_B)

    def refuse_places(self) -> None:
        """A record's losses must not depend on which slot of the microbatch it lies in."""
        rolled_R = self._forward(self._seeds[1:] + self._seeds[:1])
        back_R = rolled_R.view(self._records, -1).roll(1, 0).flatten()
        if self._differs(self._forward(self._seeds), back_R):
            raise PrivacyError(
                "The loss of a record depends on its place in the microbatch, so it would change "
                "when another record comes or goes. Remove what counts or numbers the rows."
            )

    def _require_apart(self, kept_B: Tensor) -> None:
        """The records of ``kept_B`` must not notice that all others are replaced."""
        pairs = zip(kept_B.tolist(), self._seeds, self._others, strict=True)
        replaced = [seed if kept else other for kept, seed, other in pairs]
        loss_R, grad_P = self._backward(self._seeds, kept_B)
        other_R, other_P = self._backward(replaced, kept_B)
        kept_R = kept_B.repeat_interleave(self._draws)
        if self._differs(loss_R[kept_R], other_R[kept_R]) or self._differs(grad_P, other_P):
            where = self._first_mixing(replaced, kept_R)
            raise PrivacyError(
                f"Records of a microbatch influence each other{where}: the loss or the gradient of "
                "one changes with the content of another, so clipping does not bound what one "
                "record changes. Remove whatever reduces, shifts or normalises over the first axis."
            )

    def _first_mixing(self, replaced: Sequence[int], kept_R: Tensor) -> str:
        """Where the rows ``kept_R`` first differ on the way forward, in words, or nothing."""
        kept_R = kept_R.nonzero().flatten()
        before, after = (self._row_sums(seeds, kept_R) for seeds in (self._seeds, replaced))
        for (path, sums_R), (_, others_R) in zip(before, after, strict=False):
            if sums_R.shape == others_R.shape and self._differs(sums_R, others_R):
                return f" in module {path}"
        return ""

    def _row_sums(self, seeds: Sequence[int], kept_R: Tensor) -> list[tuple[str, Tensor]]:
        """For each leaf module in the order of its calls: a sum over each row of its output."""
        found: list[tuple[str, Tensor]] = []
        rows = self._records * self._draws

        def note(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                if isinstance(output, Tensor) and output.shape[:1] == (rows,):
                    output = output.detach()[kept_R.to(output.device)]
                    found.append((path, output.double().flatten(1).sum(1).cpu()))

            return hook

        leaves = [(p, m) for p, m in self._model.named_modules() if not any(m.children())]
        hooks = [module.register_forward_hook(note(path)) for path, module in leaves]
        try:
            self._forward(seeds)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def _forward(self, seeds: Sequence[int]) -> Tensor:
        with torch.no_grad():
            return self._rows(self._losses(seeds)).cpu()

    def _backward(self, seeds: Sequence[int], kept_B: Tensor) -> tuple[Tensor, Tensor]:
        """Losses (R,), and the gradient of those of ``kept_B``, flat, fp64."""
        with torch.enable_grad():
            loss_R = self._rows(self._losses(seeds))
            kept_R = kept_B.repeat_interleave(self._draws).to(loss_R.device)
            found = torch.autograd.grad(loss_R[kept_R].sum(), self._parameters, allow_unused=True)
        parts = [g.flatten().double() for g in found if g is not None]
        return loss_R.detach().cpu(), torch.cat(parts).cpu() if parts else torch.zeros(0).double()

    def _rows(self, loss_R: Tensor) -> Tensor:
        rows = self._records * self._draws
        if loss_R.shape != (rows,) or not bool(torch.isfinite(loss_R).all()):
            raise PrivacyError(
                f"Losses of made-up records have the shape {tuple(loss_R.shape)} or are not "
                f"finite: expected {rows} finite numbers, one per row. Check the model."
            )
        return loss_R

    def _differs(self, one: Tensor, other: Tensor) -> bool:
        """Whether the distance of two results, relative to the norm of the first, is above the
        tolerance; notes the largest that is not."""
        size = one.double().norm().clamp(min=1e-30)
        off = float(((one.double() - other.double()).norm() / size).nan_to_num(nan=math.inf))
        if off > self._tolerance:
            return True
        self.worst = max(self.worst, off)
        return False


def contents(model: nn.Module) -> dict[str, bytes]:
    """Digest of every parameter, buffer (persistent or not) and other tensor that a module keeps,
    under a name that says which it is."""
    found = {f"the parameter {name}": p for name, p in model.named_parameters()}
    found |= {f"the buffer {name}": b for name, b in model.named_buffers()}
    for path, module in model.named_modules():
        kept = {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}
        found |= {f"the tensor {path}.{name}": value for name, value in kept.items()}
    return {name: tensor_digest(value) for name, value in found.items()}


def tensor_digest(tensor: Tensor) -> bytes:
    """SHA-256 of type, shape and every bit of the numbers; of a tensor that is divided over
    workers, of what this worker holds."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    code = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + b"\0")
    code.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return code.digest()


def first_difference(before: dict[str, bytes], after: dict[str, bytes]) -> str | None:
    """The name of the first thing that changed, is new or is gone; None: all is as it was."""
    return next((n for n in {**after, **before} if before.get(n) != after.get(n)), None)


def _generator_states(devices: Sequence[torch.device]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


def _gpus(model: nn.Module) -> list[torch.device]:
    return sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)


@contextmanager
def _as_found(model: nn.Module) -> Iterator[None]:
    """Afterwards the modes of all modules and the states of the generators are as before."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.random.fork_rng(devices=_gpus(model)):
            yield
    finally:
        for module, training in modes:
            module.training = training
