"""What a run checks of itself, on its own machines: who owns which record, what noise arrives.

Tests show that the code is right where they run. These checks show it where *this* run runs: with
its backend, its number of workers, its types and devices. They see private facts (which records
took part), compare them, and tell nothing but whether they agree.

Shapes: n record ids, L lanes, P trainable parameters, W workers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
import torch
from scipy.stats import chi2, norm
from torch import Tensor, nn

from dpldm_dist.errors import PrivacyError
from dpldm_dist.privacy.blocks import block_slices
from dpldm_dist.privacy.collective import Collective
from dpldm_dist.privacy.randomness import derive_key
from dpldm_dist.privacy.validation import contents, first_difference, tensor_digest

ALPHA = 1e-9
"""Probability with which each statistical check of a start alarms although all is right."""

_WORDS = 3  # 64-bit words that describe a set of records: how many, and two hashes


# --- which records --------------------------------------------------------------------------------


def prove_ownership(
    key: bytes,
    owned: Iterable[np.ndarray],
    shard_records: Sequence[int],
    *,
    collective: Collective,
    device: torch.device,
) -> None:
    """Stop unless the workers together own every record exactly once.

    ``owned``: ids, int64 (n,), of the records that this worker reads (shard << 40 | place).
    ``shard_records``: how many each shard has, by the manifest. ``key`` is any secret of the run.

    Formal guarantees: number and hash of the ids, summed over workers, are those of all records of
    the manifest. The hash is the sum modulo 2^64 of a keyed 64-bit hash of every id, twice with
    independent keys: it does not depend on order, and a record that is lost, doubled or exchanged
    changes it (to the same value by a chance of about 2^-128). No worker learns what another owns
    but through their sum, and nobody is told a number.
    Raises: PrivacyError, the same on every worker.
    """
    difference = np.zeros(_WORDS, dtype=np.uint64)
    for ids in owned:
        difference += _count_and_hash(key, ids)
    for shard in range(collective.rank, len(shard_records), collective.world_size):
        ids = np.arange(shard_records[shard], dtype=np.int64) | shard << 40
        difference -= _count_and_hash(key, ids)
    if _sum_over_workers(difference, collective, device).any():
        raise PrivacyError(
            "The workers together do not own every private record exactly once, so a record could "
            "count twice or never. Nothing was released. Check that all machines see one folder "
            "of latents and run the same version; if they do, this is a bug: please report it."
        )


class RecordTally:
    """Whether every record that was drawn for a step entered its sum exactly once.

    In a step, the owner of a lane tells ``drawn`` all that the lane selects, before it is cut into
    microbatches; ``processed`` is told each microbatch once its gradients are in the sum;
    ``settle`` compares. Nothing is selected twice for it, and what is exchanged are differences:
    zeros, when all is right.

    Formal guarantees: ``settle`` returns only if every lane had exactly one owner, and if number
    and hash (as in ``prove_ownership``) of the ids processed in it over all workers are those of
    the ids drawn.
    Raises: PrivacyError from ``settle``, the same on every worker, before anything is released.
    """

    def __init__(self, key: bytes, *, lanes: int, collective: Collective, device: torch.device):
        self._key = key
        self._lanes = lanes
        self._collective = collective
        self._device = device
        self._begin()

    def drawn(self, lane: int, ids: np.ndarray) -> None:
        """All records (int64 (n,), maybe none) that ``lane`` selects in this step."""
        self._owners_L1[lane] += np.uint64(1)
        self._open_L3[lane] += _count_and_hash(self._key, ids)

    def processed(self, lane: int, ids: np.ndarray) -> None:
        """Records of ``lane``, int64 (n,), whose gradients were added to the sum."""
        self._open_L3[lane] -= _count_and_hash(self._key, ids)

    def settle(self) -> None:
        """Compare over all workers, and begin the next step. Every worker takes part."""
        mine = np.concatenate([self._owners_L1, self._open_L3], axis=1)
        self._begin()
        total = _sum_over_workers(mine, self._collective, self._device)
        if (total[:, 0] != 1).any() or total[:, 1:].any():
            raise PrivacyError(
                "The records that entered the sum of a step are not those that were drawn for it, "
                "each exactly once. Nothing of this step was released. Start again; if it comes "
                "back, this is a bug: please report it."
            )

    def _begin(self) -> None:
        self._owners_L1 = np.zeros((self._lanes, 1), dtype=np.uint64)
        self._open_L3 = np.zeros((self._lanes, _WORDS), dtype=np.uint64)


def _count_and_hash(key: bytes, ids: np.ndarray) -> np.ndarray:
    """Number of ids, and twice the sum of a keyed hash of each, modulo 2^64. uint64 (3,)."""
    secret = np.frombuffer(derive_key(key, "record tally"), dtype=np.uint64)
    words = [np.uint64(len(ids))]
    for first, second in secret.reshape(2, 2):
        mixed = _mix(_mix(ids.astype(np.uint64) + first) ^ second)
        words.append(mixed.sum(dtype=np.uint64))
    return np.array(words)


def _mix(words_N: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit words in which every input bit reaches every output bit.

    Source: Steele, Lea and Flood (2014), "Fast splittable pseudorandom number generators".
    """
    words_N = (words_N ^ (words_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words_N = (words_N ^ (words_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words_N ^ (words_N >> np.uint64(31))


def _sum_over_workers(
    words: np.ndarray, collective: Collective, device: torch.device
) -> np.ndarray:
    """Sum over workers modulo 2^64, uint64 as ``words``. Halves of 32 bits travel as int64, so that
    no sum on the way comes near 2^63."""
    low, high = words & np.uint64(0xFFFFFFFF), words >> np.uint64(32)
    halves = torch.from_numpy(np.stack([low, high]).astype(np.int64)).to(device)
    collective.sum_(halves)
    low, high = halves.cpu().numpy().astype(np.uint64)
    return low + (high << np.uint64(32))


# --- what noise arrives ---------------------------------------------------------------------------


@dataclass(frozen=True)
class NoiseReading:
    """What one step without records showed, public numbers.

    ``measured_std`` of the P coordinates of the gradient that the inner optimizer got, in units of
    clip_norm, against ``expected_std`` and the range ``low`` to ``high`` in which it lies but for
    one start in 10^9. ``moved``: norm of the change of the weights.
    """

    measured_std: float
    expected_std: float
    low: float
    high: float
    moved: float


def measure_noise(
    take_step: Callable[[], object],
    inner: torch.optim.Optimizer,
    copies: Sequence[nn.Parameter],
    *,
    expected_std: float,
    collective: Collective,
    bounds: Sequence[int] | None = None,
) -> NoiseReading:
    """Take one step without any record on copies of the parameters, and measure what arrives.

    ``take_step`` runs the run's own path (sum over workers, noise, division, inner optimizer) on
    ``copies`` with a sum of zeros and a throw-away key, so that what is measured is noise alone and
    nothing of it is used again. ``copies`` have the shapes, types and devices of the parameters and
    start at zero, so that their change is not rounded. ``inner`` is the optimizer of the run's
    kind on them. ``expected_std``: noise_multiplier / divisor, the standard deviation that plain
    gradient descent with learning rate 1 would bring into every weight; 0 for a run without noise.
    ``bounds``: of the slices of the flat vector that workers update, if they share it; then
    ``inner`` has the parts of this worker, and some workers may have none.

    Formal guarantees: on every worker, (1) the standard deviation of the gradient over the P
    coordinates is the expected one, within the two-sided chi-square bounds at ``ALPHA``, its mean
    is zero within the same, and parts that different workers drew are uncorrelated; without noise,
    all is exactly zero; (2) the weights moved by exactly one step of the inner optimizer on exactly
    that gradient; (3) gradient and weights are the same bits on all workers.
    Raises: PrivacyError that says which of these failed, the same on every worker.
    """
    reference = copy.deepcopy(inner)
    mine = [parameter for group in inner.param_groups for parameter in group["params"]]
    arrived: list[list[Tensor]] = []
    hook = inner.register_step_pre_hook(lambda *_: arrived.append([_grad(p) for p in mine]))
    try:
        take_step()
    finally:
        hook.remove()
    grads = arrived[0] if arrived else [torch.zeros_like(p) for p in mine]
    grad_P = _flat(copies, mine, grads, collective, bounds)
    reading = _reading(grad_P, expected_std, copies)
    fault = _noise_fault(grad_P, reading, collective.world_size)
    if fault is None and len(arrived) != 1:
        fault = f"the step made {len(arrived)} updates with it, expected one"
    if fault is None and not _moved_by_one_step(reference, mine, grads):
        fault = "the weights did not move by one step of the inner optimizer on it"
    _agree(fault, [grad_P, *copies], collective)
    return reading


def measure_noise_by_descent(
    take_step: Callable[[], Tensor],
    copies: Sequence[nn.Parameter],
    *,
    expected_std: float,
    collective: Collective,
) -> NoiseReading:
    """As ``measure_noise``, for an engine that keeps its optimizer to itself.

    ``take_step`` makes one step of plain gradient descent at rate 1 on ``copies``, which start at
    zero, and returns the released mean gradient (P,). So the weights become minus the gradient that
    arrived, after all that the engine did with it.

    Formal guarantees: as (1) and (3) of ``measure_noise``; and (2) what arrived is, in every
    coordinate and bit, the released gradient in the type of the weights.
    Raises: PrivacyError that says which of these failed, the same on every worker.
    """
    released_P = take_step().to(copies[0].dtype).double().cpu()
    grad_P = -torch.cat([copy.detach().double().flatten().cpu() for copy in copies])
    reading = _reading(grad_P, expected_std, copies)
    fault = _noise_fault(grad_P, reading, collective.world_size)
    if fault is None and not torch.equal(grad_P, released_P):
        fault = "the weights did not move by the gradient that was released"
    _agree(fault, copies, collective)
    return reading


def _agree(fault: str | None, tensors: Sequence[Tensor], collective: Collective) -> None:
    """Raises: PrivacyError, the same on every worker, for a fault or if ``tensors`` differ."""
    _raise_on_all(fault, collective)
    if not same_on_all_workers(tensors, collective):
        raise PrivacyError(
            "Noise or weights of a trial step differ between the workers: expected the same bits. "
            "Check that all machines run the same versions and types; else please report it."
        )


def _grad(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()


def _flat(
    copies: Sequence[nn.Parameter],
    mine: Sequence[nn.Parameter],
    grads: Sequence[Tensor],
    collective: Collective,
    bounds: Sequence[int] | None,
) -> Tensor:
    """The gradient that arrived for all ``copies``, wherever it arrived. float64 (P,)."""
    known = {id(parameter): grad for parameter, grad in zip(mine, grads, strict=True)}
    grad_P = torch.cat([known.get(id(p), torch.zeros_like(p)).flatten().double() for p in copies])
    if bounds is not None:
        collective.gather_slices_(grad_P, bounds)
    return grad_P.cpu()


def _reading(grad_P: Tensor, expected: float, copies: Sequence[nn.Parameter]) -> NoiseReading:
    length = len(grad_P)
    low, high = (
        expected * math.sqrt(float(bound) / length)
        for bound in (chi2.ppf(ALPHA / 2, length), chi2.isf(ALPHA / 2, length))
    )
    moved = math.sqrt(sum(float(p.detach().double().square().sum()) for p in copies))
    return NoiseReading(float(grad_P.square().mean().sqrt()), expected, low, high, moved)


def _noise_fault(grad_P: Tensor, reading: NoiseReading, workers: int) -> str | None:
    """What is wrong with the noise, in words, or None."""
    if reading.expected_std == 0.0:
        return None if not grad_P.any() else "there is noise in a run that was told to have none"
    if not reading.low <= reading.measured_std <= reading.high:
        return (
            f"its standard deviation is {reading.measured_std:.6g} clip norms, expected "
            f"{reading.expected_std:.6g} (between {reading.low:.6g} and {reading.high:.6g})"
        )
    widest = float(norm.isf(ALPHA / 2))
    if abs(float(grad_P.mean())) > widest * reading.expected_std / math.sqrt(len(grad_P)):
        return "its mean is not zero"
    unit_P = grad_P / reading.expected_std
    parts = [unit_P[start:stop] for start, stop in pairwise(block_slices(len(unit_P), workers))]
    for (one, one_Q), (two, two_Q) in combinations(enumerate(parts), 2):
        length = min(len(one_Q), len(two_Q))
        if abs(float(one_Q[:length] @ two_Q[:length])) > _largest_product(length):
            return f"workers {one} and {two} drew the same noise"
    return None


def _largest_product(length: int) -> float:
    """What |x . y| of independent standard normal vectors exceeds with a probability below ALPHA.

    The logarithm of the moment generating function of a product x_i y_i is -ln(1 - t^2) / 2, which
    is at most t^2 / (2 (1 - t)): Bernstein's condition with variance 1 and scale 1.
    Source: Boucheron, Lugosi and Massart (2013), Concentration Inequalities, section 2.4.
    """
    surprise = math.log(2 / ALPHA)
    return math.sqrt(2 * length * surprise) + surprise


def _moved_by_one_step(
    reference: torch.optim.Optimizer, copies: Sequence[nn.Parameter], grads: Sequence[Tensor]
) -> bool:
    """Whether ``reference``, a copy of the optimizer from before, comes to the same weights."""
    twins = [twin for group in reference.param_groups for twin in group["params"]]
    for twin, grad in zip(twins, grads, strict=True):
        twin.grad = grad.clone()
    reference.step()
    pairs = zip(twins, copies, strict=True)
    return all(tensor_digest(twin) == tensor_digest(own) for twin, own in pairs)


def _raise_on_all(fault: str | None, collective: Collective) -> None:
    """Raise on every worker if one has a fault; the others name that one of them failed."""
    if collective.all_equal(b"" if fault is None else b"fault") and fault is None:
        return
    raise PrivacyError(
        "The noise that reaches the weights is not what was accounted: "
        f"{fault or 'another worker measured a fault'}. Nothing was released. Check the backend "
        "and the types of the parameters; else please report it."
    )


# --- what must not move ---------------------------------------------------------------------------


class FrozenState:
    """All of a model that private data must never change, by its digests at the start.

    Formal guarantees: after ``verify``, every parameter that is not in ``trainable``, every buffer,
    persistent or not, and every other tensor that a module keeps has the bits that it had when this
    was made; none came and none went. Of what is divided over workers each checks what it holds.
    Raises: PrivacyError if a trainable name is not in the model.
    """

    def __init__(self, model: nn.Module, trainable: Collection[str]):
        missing = set(trainable) - dict(model.named_parameters()).keys()
        if missing:
            raise PrivacyError(
                f"Trainable parameter {min(missing)} is not in the model: expected its names."
            )
        self._model = model
        self._trainable = {f"the parameter {name}" for name in trainable}
        self._digests = self._frozen()

    def verify(self) -> None:
        """Raises: PrivacyError naming the first parameter or buffer that changed."""
        changed = first_difference(self._digests, self._frozen())
        if changed is not None:
            raise PrivacyError(
                f"Private training changed {changed}, which is not trainable: it could hold "
                "private data without noise. Nothing of it was saved. Freeze or replace its module."
            )

    def _frozen(self) -> dict[str, bytes]:
        found = contents(self._model)
        return {name: digest for name, digest in found.items() if name not in self._trainable}


def same_on_all_workers(tensors: Iterable[Tensor], collective: Collective) -> bool:
    """Whether every worker has the same bits. Every worker takes part and learns the answer."""
    return collective.all_equal(b"".join(tensor_digest(tensor) for tensor in tensors))


def refuse_different_parameters(parameters: Mapping[str, Tensor], collective: Collective) -> None:
    """Stop if a parameter differs between workers: updates are the same released numbers for all.

    Raises: PrivacyError naming the first that differs, the same on every worker.
    """
    if same_on_all_workers(parameters.values(), collective):
        return
    for name, parameter in parameters.items():
        if not same_on_all_workers([parameter], collective):
            raise PrivacyError(
                f"The workers hold different values of {name}: expected the same bits, as all "
                "apply the same noisy sums. Nothing of it was saved. Start again from the last "
                "checkpoint; if it comes back, please report it."
            )
