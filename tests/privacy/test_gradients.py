"""Per-record gradients against oracles, what they promise about clipping, and planted bugs.

Shapes: B records, K draws, R = B * K rows, P parameters.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from dpldm_dist.errors import PrivacyError
from dpldm_dist.privacy import gradients, native
from dpldm_dist.privacy.gradients import PerRecordGradients, accumulation_error, norms, patches
from dpldm_dist.privacy.gradients.norms import RecordNorms
from dpldm_dist.privacy.gradients.operands import Products
from dpldm_dist.privacy.gradients.sums import MicrobatchSums, RecordSums, Scratch, weighted_sum

FINE = 2.0**-30  # grid that rounds far below float32
HUGE = 1024.0  # clip norm that clips nothing here
WAYS = ("compiled", "PyTorch")  # who computes: the kernels of privacy/native, or PyTorch alone


# --- models, one for each kind of layer -----------------------------------------------------------


class Net(nn.Module):
    """A layer between two frozen maps: its input and its output's gradient are not trivial."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...], *, integer: bool = False):
        super().__init__()
        self.layer, self.shape, self.integer = layer, shape, integer
        self.scale = nn.Parameter(
            torch.randn(shape) if not integer else torch.ones(()), requires_grad=False
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x if self.integer else x * self.scale))

    def rows(self, count: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if self.integer:
            return torch.randint(0, 5, (count, *self.shape), generator=generator)
        return torch.randn(count, *self.shape, generator=generator)


def affine(norm: nn.Module) -> nn.Module:
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


KINDS: dict[str, Callable[[], Net]] = {
    "linear": lambda: Net(nn.Linear(6, 5), (6,)),
    "linear on tokens": lambda: Net(nn.Linear(20, 24), (3, 20)),
    "linear on many tokens": lambda: Net(nn.Linear(6, 5, bias=False), (4, 9, 6)),
    "1x1 convolution": lambda: Net(nn.Conv2d(20, 24, 1), (20, 2, 2)),
    "3x3 convolution": lambda: Net(nn.Conv2d(4, 24, 3, padding=1), (4, 3, 3)),
    "strided convolution": lambda: Net(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, dilation=2), (3, 8, 8)
    ),
    "group norm": lambda: Net(affine(nn.GroupNorm(2, 6)), (6, 3, 3)),
    "layer norm": lambda: Net(affine(nn.LayerNorm(7)), (5, 7)),
    "layer norm on rows": lambda: Net(affine(nn.LayerNorm(7)), (7,)),
    "embedding": lambda: Net(nn.Embedding(5, 6), (), integer=True),
    "embedding of tokens": lambda: Net(nn.Embedding(5, 6, padding_idx=1), (4,), integer=True),
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    patches.pairs.cache_clear()  # of a planted bug


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Each of the two ways in turn."""
    go(request.param, monkeypatch)
    return request.param


def go(way: str, patch: pytest.MonkeyPatch) -> None:
    if way == "PyTorch":
        patch.setattr(native, "serves", lambda device: False)
    elif not native.serves(torch.device("cpu")):
        pytest.skip(
            "no compiled kernels on this machine: it has no C compiler, or another processor"
        )


def _losses(output: Tensor) -> Tensor:
    return (output.square() + 0.3 * output).flatten(1).sum(1)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def engine(
    model: nn.Module, *, clip_norm: float = HUGE, draws: int = 1, grid: float = FINE, **more
):
    return PerRecordGradients(
        model, trainable(model), clip_norm=clip_norm, draws=draws, grid=grid, **more
    )


def everyone(records: int) -> Tensor:
    return torch.ones(records, dtype=torch.bool)


def loose_norm(model, x, *, draws=1) -> float:
    """A clip norm that clips nobody, but not by far: records are rounded to a share of it."""
    norms: list[float] = []
    found = engine(model, draws=draws, watch=lambda raw: norms.extend(raw.norm_B.tolist()))
    found.add(lambda: _losses(model(x)), everyone(len(x) // draws))
    return 1.5 * max(norms)


def clipped_sum(model, x, *, mask_B=None, clip_norm=None, draws=1, grid=FINE, **more) -> Tensor:
    """The sum of clipped gradients, float64 (P,)."""
    clip_norm = loose_norm(model, x, draws=draws) if clip_norm is None else clip_norm
    found = engine(model, clip_norm=clip_norm, draws=draws, grid=grid, **more)
    mask_B = everyone(len(x) // draws) if mask_B is None else mask_B
    found.add(lambda: _losses(model(x)), mask_B)
    return found.take_sum().double() * grid


def record_gradients(model, x, *, draws=1, **more) -> Tensor:
    """The engine's gradient of each record alone, (B, P), by masking all others."""
    records = len(x) // draws
    found = engine(model, draws=draws, clip_norm=loose_norm(model, x, draws=draws), **more)
    alone = []
    for record in range(records):
        found.add(lambda: _losses(model(x)), torch.arange(records) == record)
        alone.append(found.take_sum().double() * FINE)
    return torch.stack(alone)


def oracle_gradients(model: nn.Module, x: Tensor, *, draws: int = 1) -> Tensor:
    """torch.func in float64: gradient of the mean over each record's rows, (B, P)."""
    wide = copy.deepcopy(model).double()
    learning = trainable(wide)
    rest = {n: p for n, p in wide.state_dict().items() if n not in learning}

    def loss(parameters, rows):
        return _losses(functional_call(wide, {**rest, **parameters}, (rows,))).mean()

    x = (x.double() if x.is_floating_point() else x).unflatten(0, (-1, draws))
    found = vmap(grad(loss), in_dims=(None, 0))({n: p.detach() for n, p in learning.items()}, x)
    return torch.cat([found[name].flatten(1) for name in learning], 1)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


# --- oracles --------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_per_record_gradients_equal_the_functional_oracle(kind, draws, way):
    model = KINDS[kind]()
    x = model.rows(3 * draws)
    found, wanted = record_gradients(model, x, draws=draws), oracle_gradients(model, x, draws=draws)
    for record in range(3):
        assert relative(found[record], wanted[record]) < 1e-5


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "embedding of tokens"])
def test_per_record_gradients_equal_those_of_opacus_hooks(kind, way):
    from opacus import GradSampleModule  # (it does not know the padding index of embeddings)

    model = KINDS[kind]()
    x = model.rows(4)
    hooked = GradSampleModule(copy.deepcopy(model), loss_reduction="sum")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _losses(hooked(x)).sum().backward()
    wanted = torch.cat(
        [p.grad_sample.flatten(1) for p in hooked.parameters() if p.requires_grad], 1
    )
    assert relative(record_gradients(model, x), wanted.double()) < 1e-5


@pytest.mark.parametrize("draws", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_clipped_sum_equals_the_oracle(kind, draws, way):
    model = KINDS[kind]()
    x = model.rows(5 * draws)
    wanted_BP = oracle_gradients(model, x, draws=draws)
    norm_B = wanted_BP.norm(dim=1)
    clip_norm = float(norm_B.median())  # some are clipped, some are not
    factor_B = (clip_norm / norm_B).clamp(max=1.0)
    found_P = clipped_sum(model, x, draws=draws, clip_norm=clip_norm)
    assert relative(found_P, (factor_B[:, None] * wanted_BP).sum(0)) < 1e-5


@pytest.mark.parametrize("only", ["weight", "bias"])
@pytest.mark.parametrize(
    "kind", ["linear", "linear on tokens", "3x3 convolution", "group norm", "layer norm"]
)
def test_weights_train_without_biases_and_biases_without_weights(kind, only, way):
    model = KINDS[kind]()
    model.layer.requires_grad_(False)
    getattr(model.layer, only).requires_grad_(True)
    x = model.rows(8)
    assert relative(record_gradients(model, x, draws=2), oracle_gradients(model, x, draws=2)) < 1e-5


# --- a real denoiser ------------------------------------------------------------------------------


class Denoiser(nn.Module):
    """A tiny UNet with cross-attention to class tokens; a row holds latents, time and label."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.unet = UNet2DConditionModel(
            sample_size=4,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=4,
            norm_num_groups=8,
        ).eval()
        self.classes = nn.Embedding(4, 2 * 16)

    def forward(self, x: Tensor) -> Tensor:
        latents, extra = x[:, :48].unflatten(1, (3, 4, 4)), x[:, 48:].detach()
        context = self.classes(extra[:, 1].long()).unflatten(1, (2, 16))
        return self.unet(latents, extra[:, 0], context, return_dict=False)[0]

    def rows(self, count: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        latents = torch.randn(count, 48, generator=generator)
        times = torch.randint(0, 1000, (count, 1), generator=generator)
        labels = torch.randint(0, 4, (count, 1), generator=generator)
        return torch.cat([latents, times, labels], 1)


PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


def denoiser(which: str) -> Denoiser:
    model = Denoiser()
    model.requires_grad_(False)
    if which == "lora":
        settings = LoraConfig(r=4, lora_alpha=4, target_modules=list(PROJECTIONS))
        inject_adapter_in_model(settings, model.unet)
        for name, parameter in model.unet.named_parameters():
            if ".lora_B" in name:  # zero at the start, which would leave lora_A without a gradient
                nn.init.normal_(parameter, std=0.1)
    for name, parameter in model.unet.named_parameters():
        in_block = ".attentions." in f".{name}"
        chosen = {
            "transformer": in_block,
            "attention": in_block and any(f".{part}." in name for part in PROJECTIONS),
            "lora": ".lora_" in name,
            "all": True,
        }[which]
        parameter.requires_grad_(chosen)
    model.classes.requires_grad_(True)
    return model


@pytest.mark.parametrize("draws", [1, 4])
@pytest.mark.parametrize("which", ["transformer", "attention", "lora", "all"])
def test_gradients_of_a_diffusion_unet_equal_the_oracle(which, draws, way):
    model = denoiser(which)
    x = model.rows(2 * draws)
    engine(model, draws=draws).verify(lambda: _losses(model(x)), everyone(2))
    found_BP = record_gradients(model, x, draws=draws)
    for record in range(2):
        wanted_P = autograd_gradient(model, x[record * draws : (record + 1) * draws])
        assert relative(found_BP[record], wanted_P) < 2e-5  # two float32 forward passes


def autograd_gradient(model: nn.Module, rows: Tensor) -> Tensor:
    """Gradient of the mean loss of one record's rows by a pass of its own in float64, (P,)."""
    wide = copy.deepcopy(model).double()
    wide.unet.time_proj.forward = lambda t: model.unet.time_proj(t.float()).double()
    found = torch.autograd.grad(_losses(wide(rows.double())).mean(), list(trainable(wide).values()))
    return torch.cat([g.flatten() for g in found])


def test_the_clipped_sum_of_a_unet_equals_clipping_records_one_by_one(way):
    model = denoiser("transformer")
    x = model.rows(6)
    wanted_BP = torch.stack([autograd_gradient(model, row[None]) for row in x])
    norm_B = wanted_BP.norm(dim=1)
    clip_norm = float(norm_B.median())
    wanted_P = (wanted_BP * (clip_norm / norm_B).clamp(max=1.0)[:, None]).sum(0)
    found_P = clipped_sum(model, x, clip_norm=clip_norm)
    assert relative(found_P, wanted_P) < 1e-5


def test_checkpointed_blocks_give_the_same_sum():
    model = denoiser("transformer")
    x = model.rows(4)
    plain_P = clipped_sum(model, x, clip_norm=0.5)
    model.unet.enable_gradient_checkpointing()
    model.train()
    assert torch.equal(clipped_sum(model, x, clip_norm=0.5), plain_P)


def test_nothing_below_the_first_trainable_layer_is_differentiated():
    first, last = nn.Linear(4, 4), nn.Linear(4, 4)
    first.requires_grad_(False)
    reached = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            reached.append(True)
            return grad

    model = nn.ModuleList([first, last])
    found = engine(model)
    x = torch.randn(2, 4, requires_grad=True)
    found.add(lambda: _losses(last(Watched.apply(first(x.detach())))), everyone(2))
    assert not reached and x.grad is None and last.weight.grad is None


def test_parameters_are_left_as_they_were():
    model = denoiser("attention")
    before = {n: (p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}
    clipped_sum(model, model.rows(2))
    for name, parameter in model.named_parameters():
        required, value = before[name]
        assert parameter.requires_grad == required and parameter.grad is None
        assert torch.equal(parameter, value)
    assert not any(m._forward_hooks for m in model.modules())


def test_under_bf16_autocast_the_clip_bound_holds_and_gradients_agree_to_bf16(way):
    model = denoiser("transformer")
    x = model.rows(4)

    def losses() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return _losses(model(x).float())

    wanted_P = clipped_sum(model, x)
    found = engine(model)
    found.verify(losses, everyone(4), tolerance=0.03)
    found.add(losses, everyone(4))
    assert relative(found.take_sum().double() * FINE, wanted_P) < 0.03
    for record in range(4):
        tight = engine(model, clip_norm=0.01)
        tight.add(losses, torch.arange(4) == record)
        assert (tight.take_sum().double() * FINE).norm() <= 0.01 * (1 + 1e-9)


# --- what clipping promises -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip_norm", [1e-3, 0.1])
def test_no_record_contributes_more_than_the_clip_norm(kind, clip_norm, way):
    check_clip_bound(KINDS[kind](), clip_norm)


def check_clip_bound(model: nn.Module, clip_norm: float) -> None:
    """Each record alone is at most clip_norm long, and, where clipped, hardly shorter."""
    x = model.rows(6)
    norm_B = oracle_gradients(model, x).norm(dim=1)
    for record in range(6):
        alone_P = clipped_sum(model, x, mask_B=torch.arange(6) == record, clip_norm=clip_norm)
        longest = min(clip_norm, float(norm_B[record]))
        slack = (alone_P != 0).sum() ** 0.5 * FINE
        assert longest * (1 - 1e-5) - slack <= alone_P.norm() <= longest * (1 + 1e-5) + slack


def test_one_norm_covers_all_layers():
    check_joint_norm()


def check_joint_norm() -> None:
    model = denoiser("attention")
    x = model.rows(1)
    assert clipped_sum(model, x, clip_norm=0.01).norm() <= 0.01 * (1 + 1e-9)


def test_draws_are_averaged_within_a_record_before_clipping():
    check_mean_over_draws()


def check_mean_over_draws() -> None:
    model = KINDS["linear on tokens"]()
    row = model.rows(1)
    once_P = clipped_sum(model, row)
    four_times_P = clipped_sum(model, row.repeat_interleave(4, 0), draws=4)
    assert relative(four_times_P, once_P) < 1e-5


def test_records_are_summed_and_not_averaged():
    check_sum_over_records()


def check_sum_over_records() -> None:
    model = KINDS["linear on tokens"]()
    row = model.rows(1)
    assert (
        relative(clipped_sum(model, row.repeat(5, 1, 1)), 5 * clipped_sum(model, row)) < 1e-6
    )  # forward passes of 5 rows and of 1


def test_microbatches_add_up_and_taking_the_sum_starts_again():
    model = KINDS["linear"]()
    x = model.rows(6)
    found = engine(model, clip_norm=0.5)
    for part in x.chunk(3):
        found.add(lambda part=part: _losses(model(part)), everyone(2))
    parts_P = found.take_sum()
    whole = engine(model, clip_norm=0.5)
    whole.add(lambda: _losses(model(x)), everyone(6))
    # Each microbatch is rounded to the nearest unit: half a unit each, three parts and the whole.
    assert (parts_P - whole.take_sum()).abs().max() <= 2
    assert torch.equal(found.take_sum(), torch.zeros_like(parts_P))


@pytest.mark.parametrize("most", [1, 3, 5, 12])
def test_a_sum_is_exact_however_few_records_a_part_of_it_holds(way, most, monkeypatch):
    """Microbatches of 6, 4 and 2 records."""
    model = KINDS["linear"]()
    x = model.rows(12)

    def found_P() -> Tensor:
        found = engine(model, clip_norm=0.5)
        for part in x.split([6, 4, 2]):
            found.add(lambda part=part: _losses(model(part)), everyone(len(part)))
        return found.take_sum()

    wanted_P = found_P()
    monkeypatch.setattr(RecordSums, "most_records", most)
    assert torch.equal(found_P(), wanted_P)


def test_more_records_than_a_part_holds_are_verified_and_summed():
    """Their gradients all point one way, so that one part would overflow."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    x = torch.full((8400, 1), 0.99)
    found = engine(model, clip_norm=1.0)
    found.verify(lambda: _losses(model(x[:, None])), everyone(8400))
    found.add(lambda: _losses(model(x[:, None])), everyone(8400))
    one = engine(model, clip_norm=1.0)
    one.add(lambda: _losses(model(x[:1, None])), everyone(1))
    assert found.take_sum().tolist() == (8400 * one.take_sum()).tolist()


def test_a_microbatch_that_float64_cannot_add_up_is_refused(monkeypatch):
    go("PyTorch", monkeypatch)
    model = KINDS["linear"]()
    found = engine(model, clip_norm=1.0, grid=2.0**-40)
    with pytest.raises(PrivacyError, match="microbatch of 2049 records: expected at most 2048"):
        found.add(lambda: _losses(model(model.rows(2049))), everyone(2049))


def test_without_records_the_sum_is_zero():
    model = KINDS["linear"]()
    found = engine(model)
    assert found.take_sum().dtype == torch.int64 and not found.take_sum().any()
    found.add(lambda: _losses(model(model.rows(3))), torch.zeros(3, dtype=torch.bool))
    assert not found.take_sum().any()


# --- records that are not finite, and padding -----------------------------------------------------

BAD = [float("nan"), float("inf"), -float("inf"), 1e30]  # 1e30 squared is no float32


def poisoned_losses(model: nn.Module, x: Tensor, *, row: int, bad: float, where: str):
    """Losses with ``bad`` in the activations or in the gradient of one row."""

    def losses() -> Tensor:
        inputs = x.clone()
        if where == "activation":
            inputs[row] = bad
        loss_R = _losses(model(inputs))
        if where == "gradient":
            scale_R = torch.ones(len(x))
            scale_R[row] = bad
            loss_R = loss_R * scale_R
        return loss_R

    return losses


BAD_CASES = [
    pytest.param(kind, where, bad, id=f"{kind}, {where}, {bad}")
    for kind, make in KINDS.items()
    for where in ("activation", "gradient")
    for bad in BAD
    # A label cannot be NaN, and a huge activation alone gives a finite gradient.
    if where == "gradient" or not (make().integer or bad == 1e30)
]


@pytest.mark.parametrize(("kind", "where", "bad"), BAD_CASES)
def test_a_record_that_is_not_finite_equals_its_absence(kind, where, bad, way):
    check_absence(kind, where, bad, draws=1)


def check_absence(kind: str, where: str, bad: float, *, draws: int) -> None:
    """Bit for bit, the sum with a bad record is the sum with that record masked."""
    model = KINDS[kind]()
    x = model.rows(4 * draws)
    losses = poisoned_losses(model, x, row=2 * draws, bad=bad, where=where)
    sums = []
    for mask_B, run in (
        (everyone(4), losses),
        (torch.arange(4) != 2, lambda: _losses(model(x))),
        (torch.arange(4) != 2, losses),  # the bad rows are padding
    ):
        found = engine(model, clip_norm=0.3, draws=draws)
        found.add(run, mask_B)
        sums.append(found.take_sum())
    assert sums[0].any()
    assert torch.equal(sums[0], sums[1]) and torch.equal(sums[2], sums[1])


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("kind", KINDS)
def test_one_bad_draw_takes_out_its_record_and_no_other(kind, bad, way):
    check_absence(kind, "gradient", bad, draws=4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_record_whose_loss_is_not_finite_equals_its_absence_though_its_gradient_is(kind, bad):
    check_absence_by_loss(kind, bad)


def check_absence_by_loss(kind: str, bad: float) -> None:
    """A term without a gradient spoils the loss of one of two draws; the gradient is as before."""
    model = KINDS[kind]()
    x, spoilt_R = model.rows(8), torch.tensor([0.0, 0.0, 0.0, bad, 0.0, 0.0, 0.0, 0.0])
    found = engine(model, clip_norm=0.3, draws=2)
    sums = []
    for losses, mask_B in (
        (lambda: _losses(model(x)) + spoilt_R, everyone(4)),
        (lambda: _losses(model(x)), torch.arange(4) != 1),
    ):
        found.add(losses, mask_B)
        sums.append(found.take_sum())
    assert sums[0].any() and torch.equal(sums[0], sums[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_record_of_a_unet_equals_its_absence(bad):
    model = denoiser("transformer")
    x = model.rows(4)
    spoilt = x.clone()
    spoilt[1, :48] = bad
    good_P = clipped_sum(model, x, mask_B=torch.arange(4) != 1, clip_norm=0.1)
    assert torch.equal(clipped_sum(model, spoilt, clip_norm=0.1), good_P)
    assert good_P.any()


def test_padding_changes_no_bit():
    model = denoiser("attention")
    x, other = model.rows(4), model.rows(4, seed=9)
    other[:3] = x[:3]
    mask_B = torch.arange(4) < 3
    assert torch.equal(
        clipped_sum(model, x, mask_B=mask_B), clipped_sum(model, other, mask_B=mask_B)
    )


def test_a_watch_sees_the_raw_values_of_every_record_and_changes_no_bit():
    model, seen = KINDS["linear on tokens"](), []
    x = model.rows(8)
    x[4] = float("nan")
    mask_B = torch.arange(4) != 3
    watched = engine(model, clip_norm=0.3, draws=2, watch=seen.append)
    watched.add(lambda: _losses(model(x)), mask_B)
    assert torch.equal(
        watched.take_sum(), clipped_sum_units(model, x, mask_B=mask_B, clip_norm=0.3, draws=2)
    )
    (raw,) = seen
    assert (
        torch.equal(raw.mask_B, mask_B)
        and (raw.factor_B > 0).tolist() == [True, True] + [False] * 2
    )
    wanted_BP = oracle_gradients(model, x, draws=2)
    assert relative(raw.norm_B[:2], wanted_BP[:2].norm(dim=1)) < 1e-5
    assert (
        relative(raw.loss_B[:2], _losses(model(x)).detach().double().view(4, 2).mean(1)[:2]) < 1e-6
    )


def clipped_sum_units(model, x, *, mask_B, **more) -> Tensor:
    found = engine(model, **more)
    found.add(lambda: _losses(model(x)), mask_B)
    return found.take_sum()


# --- sensitivity, with every rounding counted -----------------------------------------------------


class Raw(nn.Module):
    """A linear layer whose per-token inputs and output gradients a test sets itself."""

    def __init__(self, width: int, out_width: int):
        super().__init__()
        self.layer = nn.Linear(width, out_width, bias=False)

    def losses(self, input_RTD: Tensor, grad_RTO: Tensor) -> Callable[[], Tensor]:
        return lambda: (self.layer(input_RTD) * grad_RTO).flatten(1).sum(1)


def hostile_tokens(case: str, records: int, tokens: int, width: int, out_width: int):
    """Inputs and gradients made to lose as many digits as possible."""
    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    a, g = normal(records, tokens, width), normal(records, tokens, out_width)
    if case == "cancelling tokens":  # every record sums to nearly zero although its terms are large
        g[:, tokens // 2 :] = -g[:, : tokens // 2] + 1e-5 * normal(records, tokens // 2, out_width)
        a[:, tokens // 2 :] = a[:, : tokens // 2]
    elif case == "huge dynamic range":
        a *= 10.0 ** (6 * normal(records, tokens, 1).clamp(-2, 2))
        g *= 10.0 ** (6 * normal(records, tokens, 1).clamp(-2, 2))
    elif case == "large terms, tiny norm":
        g[:, 1::2] = -g[:, ::2]
        a[:, 1::2] = a[:, ::2] * (1 + 2.0**-20)
        a, g = 1e4 * a, 1e4 * g
    elif case == "same sign":
        a, g = a.abs() + 1.0, g.abs() + 1.0
    return a, g


CASES = ["cancelling tokens", "huge dynamic range", "large terms, tiny norm", "same sign"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tokens", [2, 16])
def test_hostile_records_do_not_exceed_the_accumulation_error(case, tokens, monkeypatch):
    go("PyTorch", monkeypatch)
    check_accumulation(case, tokens, monkeypatch)


def check_accumulation(case: str, tokens: int, monkeypatch) -> None:
    """The computed sum against exact factors times exact gradients; factors against the norm."""
    records, width, out_width, clip_norm, grid = 64, 48, 40, 1.0, 2.0**-40
    model = Raw(width, out_width)
    a, g = hostile_tokens(case, records, tokens, width, out_width)
    kept: list[Tensor] = []
    original = gradients.clip_factors

    def spy(*args, **kwargs):
        kept.append(original(*args, **kwargs))
        return kept[-1]

    with monkeypatch.context() as patch:
        patch.setattr(gradients, "clip_factors", spy)
        found = engine(model, clip_norm=clip_norm, grid=grid)
        found.add(model.losses(a, g), everyone(records))
    exact_BOD = torch.einsum("bto,btd->bod", g.double(), a.double())
    weighted_BP = (kept[0][:, None, None] * exact_BOD).flatten(1)
    rounding = 0.5 * grid * weighted_BP.shape[1] ** 0.5
    off = (found.take_sum().double() * grid - weighted_BP.sum(0)).norm()
    assert off <= accumulation_error(records=records, clip_norm=clip_norm) + rounding
    # exact_BOD itself carries float64 rounding: 1e-15 of its largest terms.
    terms_B = (a.double().norm(dim=2) * g.double().norm(dim=2)).sum(1)
    assert (weighted_BP.norm(dim=1) <= clip_norm + 1e-14 * kept[0] * terms_B).all()


@pytest.mark.parametrize("case", ["ordinary", *CASES])
@pytest.mark.parametrize("place", [0, 17, 40])
def test_adding_one_record_moves_the_integer_sum_by_at_most_the_bound(case, place, way):
    """All records after the new one move on, so every microbatch after it is made up anew."""
    size, count, clip_norm, grid = 16, 41, 0.5, 2.0**-30
    model = Raw(24, 20)
    a, g = hostile_tokens(case, count, 4, 24, 20)
    rest = [i for i in range(count) if i != place]
    with_it = packed_sum(model, a, g, size=size, clip_norm=clip_norm, grid=grid)
    without = packed_sum(model, a[rest], g[rest], size=size, clip_norm=clip_norm, grid=grid)
    microbatches = 3
    error = accumulation_error(records=size, clip_norm=clip_norm)
    bound = clip_norm + microbatches * (2 * error + grid * without.numel() ** 0.5)
    moved = (with_it - without).double().norm() * grid
    assert moved <= bound
    assert moved > 0 or case == "huge dynamic range"  # some of its records are below a unit


def packed_sum(model: Raw, a: Tensor, g: Tensor, *, size: int, clip_norm, grid) -> Tensor:
    """Integer sum over microbatches of fixed size, the last one padded."""
    found = engine(model, clip_norm=clip_norm, grid=grid)
    for start in range(0, len(a), size):
        part_a, part_g = (
            F.pad(x[start : start + size], (0, 0, 0, 0, 0, size))[:size] for x in (a, g)
        )
        found.add(model.losses(part_a, part_g), torch.arange(size) + start < len(a))
    return found.take_sum()


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_sums_are_exactly_the_sums_of_what_records_add_alone(kind, draws, monkeypatch):
    go("compiled", monkeypatch)
    check_exact_sum(KINDS[kind](), draws=draws)


def check_exact_sum(model: nn.Module, *, draws: int) -> None:
    """In units of the grid, whatever else is in the microbatch, and wherever it lies."""
    records = 21  # more than an int32 may add up
    x = model.rows(records * draws)
    found = engine(model, clip_norm=0.4, draws=draws)

    def sum_of(rows: Tensor, mask_B: Tensor) -> Tensor:
        found.add(lambda: _losses(model(rows)), mask_B)
        return found.take_sum()

    whole_P = sum_of(x, everyone(records))
    alone_BP = torch.stack([sum_of(x, torch.arange(records) == b) for b in range(records)])
    assert torch.equal(whole_P, alone_BP.sum(0))
    assert ((alone_BP.double() * FINE).norm(dim=1) <= 0.4).all()
    moved = x.unflatten(0, (records, draws)).flip(0).flatten(0, 1)
    assert torch.equal(whole_P, sum_of(moved, everyone(records)))


@pytest.mark.parametrize(
    ("case", "tokens"),
    [(case, tokens) for case in ("ordinary", *CASES) for tokens in (4, 16, 100)]
    + [("ordinary", 1), ("same sign", 1)],
)
def test_no_hostile_record_adds_more_than_the_clip_norm(case, tokens, monkeypatch):
    """The very integers that it adds: no tolerance."""
    go("compiled", monkeypatch)
    records, width, out_width, clip_norm = 12, 24, 20, 0.3
    model = Raw(width, out_width)
    a, g = hostile_tokens(case, records, tokens, width, out_width)
    found = engine(model, clip_norm=clip_norm, grid=2.0**-40)
    for record in range(records):
        found.add(model.losses(a, g), torch.arange(records) == record)
        added_P = found.take_sum().double() * 2.0**-40
        assert added_P.norm() <= clip_norm
        assert added_P.any() or case == "huge dynamic range"  # some are below a unit


def test_a_record_whose_inner_products_overflow_counts_as_absent(monkeypatch):
    """Lengths just below the largest float32 can have a product above it: the square is -inf."""
    go("compiled", monkeypatch)
    largest, wide = float(torch.finfo(torch.float32).max), 4000
    base = torch.randn(1, 1, 64, dtype=torch.float64)
    input_TD = torch.zeros(2, 24)
    input_TD[:, 0], input_TD[1, 1] = torch.tensor([0.3, -0.01]), 0.3
    for step in range(60):
        grad = base + 2.0**-14 * torch.randn(wide, 2, 64, dtype=torch.float64)
        length = largest * (1 + 2.0**-25) * (1 - (step % 15 - 3) * 2.0**-25)
        grad = (grad / grad.norm(dim=2, keepdim=True) * length**0.5).float()
        squares_4B = native.norms(
            grad, input_TD.expand(wide, -1, -1), bias=False, floor=0.0, gamma=0.0, own=0.0
        )
        found = (squares_4B[0] == -float("inf")).nonzero().flatten()
        if len(found):
            break
    assert len(found)  # else this test tests nothing
    model = Raw(24, 64)
    found_engine = engine(model, clip_norm=0.3)
    found_engine.add(model.losses(input_TD[None], grad[found[:1]]), everyone(1))
    assert not found_engine.take_sum().any()


def test_an_index_in_any_memory_order_is_clipped_alike(way):
    """As of token ids that a loader keeps sequence first."""
    layer = nn.Embedding(50, 8)
    sequence_first = torch.arange(16)[:, None].expand(16, 16).contiguous()
    grad_BTO = torch.ones(16, 16, 8)
    grad_BTO[0] *= 1e4
    grad_BTO[0, 0] = 0.0
    sums = []
    for index_BT in (sequence_first.T.contiguous(), sequence_first.T):
        model = nn.Sequential(layer)
        found = engine(model, clip_norm=0.3)
        rows = partial(
            lambda model, index: (model(index) * grad_BTO).flatten(1).sum(1), model, index_BT
        )
        found.add(rows, torch.arange(16) == 0)
        sums.append(found.take_sum())
    assert torch.equal(*sums)
    assert (sums[0].double() * FINE).norm() <= 0.3 * (1 + 1e-6)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear on many tokens", "3x3 convolution", "layer norm"])
def test_the_default_type_of_the_process_changes_no_bit(kind, default, way):
    model = KINDS[kind]()
    x = model.rows(4)
    usual = clipped_sum_units(model, x, mask_B=everyone(4), clip_norm=0.3)
    torch.set_default_dtype(default)
    try:
        found = clipped_sum_units(model, x, mask_B=everyone(4), clip_norm=0.3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, usual)


@pytest.mark.parametrize("records", [8, 9, 16])
def test_gradients_in_any_memory_order_add_the_same_wherever_a_record_lies(records, monkeypatch):
    """Output gradients that lie sequence first, with a bias whose sum has many tokens."""
    go("compiled", monkeypatch)
    layer = nn.Linear(4, 7)
    a_BTD, g_BTO = torch.randn(records, 40, 4), torch.randn(records, 40, 7)
    found = engine(nn.Sequential(layer), clip_norm=100.0)

    def alone(place: int) -> Tensor:
        a, g = (x.roll(place, 0) for x in (a_BTD, g_BTO))
        g_TBO = g.transpose(0, 1).contiguous()
        losses = lambda: (layer(a).transpose(0, 1).contiguous() * g_TBO).sum((0, 2))  # noqa: E731
        found.add(losses, torch.arange(records) == place)
        return found.take_sum()

    first = alone(0)
    assert first.any()
    for place in range(1, records):
        assert torch.equal(alone(place), first)


def test_a_record_without_tokens_adds_nothing(way):
    model = nn.Sequential(nn.Linear(6, 5))
    found = engine(model)
    found.add(lambda: model(torch.randn(3, 0, 6)).flatten(1).sum(1), everyone(3))
    assert not found.take_sum().any()


def test_a_convolution_of_large_patches_keeps_no_matrix_of_pixels(way):
    layer = nn.Conv2d(1, 768, 16, stride=16)
    model = nn.Sequential(layer)
    found = engine(model)
    x = torch.randn(2, 1, 80, 80)  # 6400 pixels, 25 patches
    terms, _ = found._differentiate(lambda: _losses(model(x)), everyone(2))
    assert isinstance(terms[0], Products)


def test_a_group_norm_of_rows_equals_the_oracle(way):
    model = Net(affine(nn.GroupNorm(2, 6)), (6,))
    x = model.rows(4)
    assert relative(record_gradients(model, x), oracle_gradients(model, x)) < 1e-5


@pytest.mark.parametrize("remainder", [1e-2, 1e-3, 1e-4])
def test_verify_accepts_tokens_that_nearly_cancel(remainder, way):
    model = Raw(48, 40)
    a_BTD, g_BTO = torch.randn(4, 8, 48), torch.randn(4, 8, 40)
    a_BTD[:, 4:] = a_BTD[:, :4]
    g_BTO[:, 4:] = -g_BTO[:, :4] + remainder * torch.randn(4, 4, 40)
    engine(model).verify(model.losses(a_BTD, g_BTO), everyone(4), tolerance=0.1)


@pytest.mark.parametrize("which", ["transformer", "lora"])
def test_a_record_gives_the_same_bits_in_any_place_of_the_microbatch(which, way):
    model = denoiser(which)
    x = model.rows(8)
    for order in (torch.arange(8).flip(0), torch.arange(8).roll(3)):
        for record in (0, 5):
            here = clipped_sum(model, x, mask_B=torch.arange(8) == record, clip_norm=0.1)
            there = clipped_sum(model, x[order], mask_B=order == record, clip_norm=0.1)
            assert torch.equal(here, there)


def test_the_accumulation_error_grows_with_records_and_is_small_in_float64():
    assert accumulation_error(records=64, clip_norm=1.0) < 1e-6
    assert accumulation_error(records=64, clip_norm=2.0) > accumulation_error(
        records=32, clip_norm=2.0
    )


# --- refusals -------------------------------------------------------------------------------------


def test_a_module_that_runs_twice_is_refused():
    model = KINDS["linear"]()
    found = engine(model)
    x = model.rows(2)
    with pytest.raises(PrivacyError, match="layer ran more than once"):
        found.add(lambda: _losses(model(x) + model(x)), everyone(2))


def test_a_parameter_of_two_modules_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(PrivacyError, match=r"0\.weight is shared by 0\.weight and 1\.weight"):
        engine(model)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + F.linear(x.roll(1, -1), self.layer.weight)


def test_a_weight_used_without_its_module_is_refused():
    model, x = Functional(), torch.randn(3, 4)
    with pytest.raises(PrivacyError, match=r"layer\.weight do not add up"):
        engine(model).verify(lambda: _losses(model(x)), everyone(3))


def test_verify_adds_nothing_and_accepts_a_good_model():
    model = KINDS["3x3 convolution"]()
    found, x = engine(model, draws=2), model.rows(6)
    found.verify(lambda: _losses(model(x)), torch.arange(3) < 2)
    assert not found.take_sum().any()


def test_verify_sees_past_dropout():
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 4)).train()
    x = torch.randn(3, 4)
    engine(model).verify(lambda: _losses(model(x)), everyone(3))


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), "couples records"),
        (lambda: nn.Conv2d(4, 4, 3, groups=2), "groups = 2"),
        (lambda: nn.Conv2d(4, 4, 3, padding_mode="circular", padding=1), "circular"),
        (lambda: nn.Conv2d(4, 4, 3, padding="same"), "same"),
        (lambda: nn.Embedding(4, 4, scale_grad_by_freq=True), "scale_grad_by_freq"),
        (lambda: nn.PReLU(), "PReLU"),
        (lambda: nn.MultiheadAttention(4, 1), "MultiheadAttention"),
    ],
)
def test_modules_that_cannot_be_handled_are_refused(module, words):
    with pytest.raises(PrivacyError, match=words):
        engine(nn.Sequential(module()))


def test_a_layer_that_does_not_see_every_row_is_refused():
    model = KINDS["linear"]()
    x = model.rows(1)
    with pytest.raises(PrivacyError, match="expected 4 rows"):
        engine(model).add(lambda: _losses(model(x).expand(4, -1)), everyone(4))


def test_an_embedding_of_more_tokens_than_the_error_bound_covers_is_refused():
    model = KINDS["embedding"]()
    x = torch.zeros(2, 4097, dtype=torch.int64)
    with pytest.raises(PrivacyError, match="expected at most 4096"):
        engine(model).add(lambda: _losses(model(x)), everyone(2))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"clip_norm": float("nan")}, "clip_norm"),
        ({"draws": 0}, "draws"),
        ({"grid": 0.3}, "power of two"),
        ({"grid": 2.0**-60}, "at most 2\\^40"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(change, words):
    with pytest.raises(PrivacyError, match=words):
        engine(KINDS["linear"](), **change)


def test_a_sum_that_could_overflow_is_refused():
    model, x = KINDS["linear"](), KINDS["linear"]().rows(4)
    found = engine(model, clip_norm=1.0, grid=2.0**-40)
    found._records = 2**21  # as after two million records
    with pytest.raises(PrivacyError, match="overflow"):
        found.add(lambda: _losses(model(x)), everyone(4))


def test_losses_of_another_shape_are_refused():
    model, x = KINDS["linear"](), KINDS["linear"]().rows(4)
    with pytest.raises(PrivacyError, match="expected one per row"):
        engine(model).add(lambda: _losses(model(x)).mean(), everyone(4))


def test_an_input_that_was_overwritten_is_noticed():
    model = KINDS["linear"]()
    found, x = engine(model), torch.randn(2, 6)

    def losses() -> Tensor:
        inputs = x.clone()
        out = model.layer(inputs)
        inputs.zero_()
        return _losses(out)

    with pytest.raises(PrivacyError, match="modified in place"):
        found.add(losses, everyone(2))


# --- planted bugs: each must make its check fail --------------------------------------------------


def plant_in_sum(patch, change: Callable[..., list]) -> None:
    """``change(terms, factor_B)`` gives what is really summed, one (terms, factors) after another."""

    def changed(add):
        def bug(self, terms, factor_B):
            for part, factors_B in change(terms, factor_B):
                add(self, part, factors_B)

        return bug

    for kind in (RecordSums, MicrobatchSums):
        patch.setattr(kind, "add", changed(kind.add))


def plant_clipping_by_layer(patch) -> None:
    def by_layer(terms, factor_B):
        for term in terms:
            norms = gradients.record_norms([term], factor_B > 0)
            yield [term], (0.01 / norms.square_B.sqrt()).clamp(max=1.0)

    plant_in_sum(patch, by_layer)


def plant_kept_nan(patch) -> None:
    """Bad records only get the weight 0; what they hold stays."""
    plant_in_sum(
        patch,
        lambda terms, factor_B: [
            (terms, torch.where(factor_B == 0, torch.full_like(factor_B, 1e-300), factor_B))
        ],
    )


def plant_infinite_losses_that_count(patch) -> None:
    patch.setattr(Tensor, "isfinite", lambda self: torch.ones_like(self, dtype=torch.bool))


def plant_sum_over_draws(patch) -> None:
    original = PerRecordGradients._seed
    patch.setattr(
        PerRecordGradients, "_seed", lambda self, *args: original(self, *args) * self._draws
    )


def plant_mean_over_records(patch) -> None:
    original = gradients.clip_factors
    patch.setattr(
        gradients,
        "clip_factors",
        lambda norms, mask_B, **k: original(norms, mask_B, **k) / mask_B.sum(),
    )


def plant_no_clipping(patch) -> None:
    original = gradients.clip_factors
    patch.setattr(gradients, "clip_factors", lambda n, m, **k: (original(n, m, **k) > 0).double())


def plant_padding_that_counts(patch) -> None:
    original = gradients.clip_factors
    patch.setattr(gradients, "clip_factors", lambda n, m, **k: original(n, torch.ones_like(m), **k))
    patch.setattr(
        PerRecordGradients,
        "_seed",
        lambda self, loss_R, mask_B: torch.ones_like(loss_R) / self._draws,
    )


def plant_norm_without_biases(patch) -> None:
    original, compiled = norms._grams, native.norms

    def bug(group, grad_BTT, input_BTT):
        without = [replace(o, layer=replace(o.layer, bias=None)) for o in group]
        return original(without, grad_BTT, input_BTT)

    patch.setattr(norms, "_grams", bug)
    patch.setattr(native, "norms", lambda *a, bias, **k: compiled(*a, bias=False, **k))


def plant_norm_of_tokens_one_by_one(patch) -> None:
    original, compiled = norms._grams, native.norms

    def bug(group, grad_BTT, input_BTT):
        length = original(group, grad_BTT, input_BTT)
        grad_BTT.mul_(torch.eye(grad_BTT.shape[1]))
        return length

    def compiled_bug(grad_BTO, input_BTD, **more):
        tokens = zip(grad_BTO.split(1, 1), input_BTD.split(1, 1), strict=True)
        return sum(compiled(grad_B1O, input_B1D, **more) for grad_B1O, input_B1D in tokens)

    patch.setattr(norms, "_grams", bug)
    patch.setattr(native, "norms", compiled_bug)


def plant_coarse_operands(patch) -> None:
    """Norms come from float32 operands, the sum from bf16 ones."""

    def coarse(operands):
        values = {name: getattr(operands, name) for name in ("input", "grad_BTO")}
        return replace(operands, **{name: x.bfloat16().float() for name, x in values.items()})

    plant_in_sum(patch, lambda terms, factor_B: [([coarse(t) for t in terms], factor_B)])


def plant_no_error_bound(patch) -> None:
    original = gradients.clip_factors

    def bug(norms, mask_B, *, clip_norm):
        nothing_B = torch.zeros_like(norms.slack_B)
        bare = RecordNorms(norms.square_B, nothing_B, nothing_B, nothing_B)
        return original(bare, mask_B, clip_norm=clip_norm)

    patch.setattr(gradients, "clip_factors", bug)


def plant_rounding_of_sums(patch) -> None:
    """Records are added in float32 and rounded together: what one adds depends on the others."""

    def together(self, terms, factor_B):
        def add(place, values):
            self._total_P.view(place, -1).add((values / self._unit).float().round())

        weighted_sum(terms, factor_B, Scratch(factor_B.device), add)

    patch.setattr(RecordSums, "add", together)


def plant_windows_one_pixel_off(patch) -> None:
    patches.pairs.cache_clear()
    original = patches.Window.slices
    patch.setattr(
        patches.Window,
        "slices",
        lambda self, *args: [
            slice(max(0, s.start - 1), s.stop - (s.start > 0), s.step)
            for s in original(self, *args)
        ],
    )


def plant_norm_of_half_a_window(patch) -> None:
    patches.pairs.cache_clear()
    original = patches._places
    patch.setattr(patches, "_places", lambda *args: list(original(*args))[::2])


def check_convolution() -> None:
    model = KINDS["3x3 convolution"]()
    x = model.rows(3)
    assert relative(record_gradients(model, x), oracle_gradients(model, x)) < 1e-5


def check_norm_of_convolution() -> None:
    model = KINDS["3x3 convolution"]()
    x = model.rows(3)
    terms, _ = engine(model)._differentiate(lambda: _losses(model(x)), everyone(3))
    found_B = gradients.record_norms(terms, everyone(3)).square_B.sqrt()
    assert relative(found_B, oracle_gradients(model, x).norm(dim=1)) < 1e-5


MUTANTS = {
    "windows one pixel off": (plant_windows_one_pixel_off, lambda patch: check_convolution()),
    "norm of half a window": (
        plant_norm_of_half_a_window,
        lambda patch: check_norm_of_convolution(),
    ),
    "records rounded together": (
        plant_rounding_of_sums,
        lambda patch: check_exact_sum(KINDS["linear on tokens"](), draws=1),
    ),
    "clipping by layer": (plant_clipping_by_layer, lambda patch: check_joint_norm()),
    "NaN kept": (
        plant_kept_nan,
        lambda patch: check_absence("linear on tokens", "gradient", float("nan"), draws=1),
    ),
    "a record of infinite loss counts": (
        plant_infinite_losses_that_count,
        lambda patch: check_absence_by_loss("linear", float("inf")),
    ),
    "sum over draws": (plant_sum_over_draws, lambda patch: check_mean_over_draws()),
    "mean over records": (plant_mean_over_records, lambda patch: check_sum_over_records()),
    "no clipping": (plant_no_clipping, lambda patch: check_clip_bound(KINDS["linear"](), 1e-3)),
    "padding counts": (
        plant_padding_that_counts,
        lambda patch: check_absence("linear", "gradient", float("nan"), draws=1),
    ),
    "biases left out of the norm": (
        plant_norm_without_biases,
        lambda patch: check_clip_bound(KINDS["linear on tokens"](), 0.1),
    ),
    "cross terms of tokens left out": (
        plant_norm_of_tokens_one_by_one,
        lambda patch: check_clip_bound(KINDS["linear on tokens"](), 0.1),
    ),
    "sum from coarser operands": (
        plant_coarse_operands,
        lambda patch: check_accumulation("same sign", 16, patch),
    ),
    "norm without its error bound": (
        plant_no_error_bound,
        lambda patch: check_accumulation("large terms, tiny norm", 16, patch),
    ),
}


ONE_WAY = {
    "windows one pixel off": "compiled",
    "records rounded together": "compiled",
    "sum from coarser operands": "PyTorch",
    "norm without its error bound": "PyTorch",
}
"""Planted bugs whose check is of one way only."""


@pytest.mark.parametrize(
    ("name", "by"), [(name, by) for name in MUTANTS for by in WAYS if ONE_WAY.get(name, by) == by]
)
def test_a_planted_bug_is_caught(name, by, monkeypatch):
    go(by, monkeypatch)
    plant, check = MUTANTS[name]
    check(monkeypatch)  # passes on the engine as it is
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check(monkeypatch)
