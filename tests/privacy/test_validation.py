"""Models that couple records, or keep what they saw, are refused with the reason and the remedy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dpldm_dist.errors import PrivacyError
from dpldm_dist.models.conditioning import ClassEmbedder, random_rows
from dpldm_dist.models.denoiser import Denoiser
from dpldm_dist.models.diffusion import Diffusion
from dpldm_dist.models.trainable import select_trainable
from dpldm_dist.models.unet import build_unet
from dpldm_dist.privacy.validation import refuse_modules, validate_model

RECORDS, DRAWS, WIDTH = 6, 2, 8


class Net(nn.Module):
    """Linear, ``inner``, linear: (R, WIDTH) -> (R, 1)."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.inner = inner
        self.last = nn.Linear(WIDTH, 1)

    def forward(self, rows_RD: Tensor) -> Tensor:
        return self.last(self.inner(torch.tanh(self.first(rows_RD))))


def made_up_losses(model: nn.Module):
    def losses(seeds) -> Tensor:
        rows = [
            torch.randn(DRAWS, WIDTH, generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
        return model(torch.cat(rows)).square().flatten(1).mean(1)

    return losses


def validate(inner: nn.Module) -> float:
    model = Net(inner).eval()
    return validate_model(
        model, model.parameters(), made_up_losses(model), records=RECORDS, draws=DRAWS
    )


# --- what is refused: each module is one planted fault -----------------------------------------------


class Custom(nn.Module):
    """A module from a function of (module, rows)."""

    def __init__(self, function, **buffers: Tensor):
        super().__init__()
        self.function = function
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=not name.startswith("hidden"))

    def forward(self, rows: Tensor) -> Tensor:
        return self.function(self, rows)


class GradientLeaks(torch.autograd.Function):
    """The identity forward; the gradient that goes on depends on the content of all rows."""

    @staticmethod
    def forward(ctx, rows):
        ctx.save_for_backward(rows)
        return rows.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 + 0.01 * ctx.saved_tensors[0].abs().max())


def _momentum(buffer: str):
    def update(module: nn.Module, rows: Tensor) -> Tensor:
        getattr(module, buffer).mul_(0.9).add_(rows.detach().mean(0), alpha=0.1)
        return rows

    return update


def _only_in_train_mode(module: nn.Module, rows: Tensor) -> Tensor:
    if module.training:
        module.seen.copy_(rows.detach().mean(0))
    return rows


def _keeps_the_last_rows(module: nn.Module, rows: Tensor) -> Tensor:
    module.last_rows = rows.detach()
    return rows


def _keeps_a_table_of_positions(module: nn.Module, rows: Tensor) -> Tensor:
    module.table = torch.arange(rows.shape[1])
    return rows + module.table


def _remembers_in_a_list(module: nn.Module, rows: Tensor) -> Tensor:
    past = module.__dict__.setdefault("past", [torch.zeros(WIDTH)])
    shifted = rows + 0.01 * past[0]
    past[0] = rows.detach().mean(0)
    return shifted


def _scales_by_the_largest(module: nn.Module, rows: Tensor) -> Tensor:
    return rows / rows.abs().max()


def _shifts(module: nn.Module, rows: Tensor) -> Tensor:
    return rows + 0.01 * rows.roll(DRAWS, 0)


def _numbers_its_rows(module: nn.Module, rows: Tensor) -> Tensor:
    return rows + 0.01 * torch.arange(len(rows))[:, None]


COUPLED = {
    "shifts": (Custom(_shifts), "influence each other in module inner"),
    "batch mean": (Custom(lambda m, x: x - 0.001 * x.mean(0)), "influence each other in module"),
    "largest of the batch": (Custom(_scales_by_the_largest), "influence each other in module"),
    "only the last record": (
        Custom(lambda m, x: torch.cat([x[:-1], x[-1:] + 0.01 * x[:1]])),
        "influence each other in module inner",
    ),
    "sorted": (Custom(lambda m, x: x.sort(0).values), "influence each other in module inner"),
    "attention over records": (
        Custom(lambda m, x: x + 0.01 * torch.softmax(x @ x.T, 1) @ x),
        "influence each other in module inner",
    ),
    "gradient depends on others": (
        Custom(lambda m, x: GradientLeaks.apply(x)),
        "influence each other:",
    ),
    "numbered rows": (Custom(_numbers_its_rows), "place in the microbatch"),
    "memory outside of buffers": (Custom(_remembers_in_a_list), "remembers what passed"),
    "buffer": (Custom(_momentum("mean"), mean=torch.zeros(WIDTH)), "changes the buffer inner.mean"),
    "buffer that is not saved": (
        Custom(_momentum("hidden"), hidden=torch.zeros(WIDTH)),
        "changes the buffer inner.hidden",
    ),
    "buffer in train mode only": (
        Custom(_only_in_train_mode, seen=torch.zeros(WIDTH)),
        "changes the buffer inner.seen",
    ),
    "kept rows": (Custom(_keeps_the_last_rows), "changes the tensor inner.last_rows"),
    "weights that the forward pass scales": (
        nn.Sequential(
            Custom(lambda m, x: (x[:, 0] > 0).long()),
            nn.Embedding(2, WIDTH, max_norm=0.1),
        ),
        r"changes the parameter inner\.1\.weight",
    ),
    "power iteration": (
        nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)),
        "changes the buffer",
    ),
    "functional dropout": (
        Custom(lambda m, x: nn.functional.dropout(x, 0.1, training=True)),
        "draws from torch's generators",
    ),
}


@pytest.mark.parametrize("fault", COUPLED)
def test_a_model_that_couples_records_or_keeps_what_it_saw_is_refused(fault):
    inner, reason = COUPLED[fault]
    with pytest.raises(PrivacyError, match=reason):
        validate(inner)


@pytest.mark.parametrize("first", range(RECORDS))
@pytest.mark.parametrize("second", range(RECORDS))
def test_every_ordered_pair_of_records_is_tried(first, second):
    """Record ``second`` reads from record ``first`` alone, all others are apart."""
    if first == second:
        return

    def one_reads_the_other(module: nn.Module, rows: Tensor) -> Tensor:
        rows = rows.clone()
        rows[second * DRAWS] += 0.01 * rows[first * DRAWS].detach()
        return rows

    with pytest.raises(PrivacyError, match="influence each other in module inner"):
        validate(Custom(one_reads_the_other))


def _frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize(
    "module",
    [
        nn.BatchNorm1d(WIDTH),
        nn.BatchNorm2d(WIDTH).requires_grad_(False),
        nn.BatchNorm1d(WIDTH, affine=False, track_running_stats=False),
        nn.SyncBatchNorm(WIDTH),
        nn.LazyBatchNorm2d(),
    ],
)
def test_batch_norm_is_refused_in_any_mode_also_when_frozen(module, mode):
    with pytest.raises(PrivacyError, match=r"Module 0 .* batch norm: .* GroupNorm"):
        refuse_modules(nn.Sequential(module).train(mode))


def test_instance_norm_with_running_statistics_is_refused():
    model = nn.Sequential(nn.InstanceNorm2d(WIDTH, track_running_stats=True))
    with pytest.raises(PrivacyError, match="running statistics: .* track_running_stats=False"):
        refuse_modules(model.eval())


@pytest.mark.parametrize("module", [nn.Dropout(0.1), nn.Dropout2d(0.1), nn.AlphaDropout(0.1)])
def test_active_dropout_is_refused_and_names_the_call_that_switches_it_off(module):
    model = nn.Sequential(nn.Linear(2, 2), module).train()
    with pytest.raises(PrivacyError, match=r"Module 1 .*model\.eval\(\)"):
        refuse_modules(model)
    refuse_modules(model.eval())


# --- what is accepted -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inner",
    [
        nn.Identity(),
        nn.GroupNorm(2, WIDTH),
        nn.LayerNorm(WIDTH),
        nn.Dropout(0.5),
        nn.Sequential(nn.Unflatten(1, (2, 4)), nn.InstanceNorm1d(2), nn.Flatten()),
        Custom(lambda m, x: x * m.scale, scale=torch.full((WIDTH,), 2.0)),
        Custom(_keeps_a_table_of_positions),
    ],
)
def test_models_whose_rows_are_apart_are_accepted_with_equal_bits(inner):
    assert validate(inner) == 0.0


def test_modes_and_generators_are_left_as_they_were():
    model = Net(nn.Sequential(nn.Dropout(0.5), nn.GroupNorm(2, WIDTH))).eval()
    model.last.train()
    before, state = [m.training for m in model.modules()], torch.get_rng_state()
    validate_model(model, model.parameters(), made_up_losses(model), records=4, draws=DRAWS)
    assert [m.training for m in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_real_unet_is_accepted_with_equal_bits():
    unet = build_unet(
        latent_channels=4, latent_size=4, block_channels=(16, 32), layers_per_block=1, heads=2,
        context_dim=8, norm_groups=8, seed=0,
    )  # fmt: skip
    denoiser = Denoiser(unet, ClassEmbedder(random_rows(6, 1, 8, seed=0))).eval()
    parameters = select_trainable(denoiser, trainable="transformer", first_block=1, lora_rank=1)

    def losses(seeds) -> Tensor:
        rows = [
            torch.randn(2, DRAWS, 4, 4, 4, generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
        z0_RCHW, noise_RCHW = torch.stack(rows, 1).flatten(1, 2)
        seed_R = torch.tensor(seeds).repeat_interleave(DRAWS)
        return Diffusion().loss_rows(denoiser, z0_RCHW, noise_RCHW, seed_R * 70, seed_R % 5)

    found = validate_model(denoiser, parameters.values(), losses, records=RECORDS, draws=DRAWS)
    assert found == 0.0


def test_differences_below_the_tolerance_are_told_and_those_above_refused():
    """As of kernels that add in an order of their own: not equal bits, but nearly."""
    model = Net(Custom(lambda m, x: x + 1e-4 * x.roll(DRAWS, 0))).eval()
    losses, learning = made_up_losses(model), list(model.parameters())
    found = validate_model(model, learning, losses, records=4, draws=DRAWS, tolerance=1e-2)
    assert 1e-6 < found < 1e-2
    with pytest.raises(PrivacyError, match="influence each other"):
        validate_model(model, learning, losses, records=4, draws=DRAWS, tolerance=1e-6)


@pytest.mark.parametrize("spoil", [lambda x: x.flatten()[:3], lambda x: x.flatten() * float("nan")])
def test_losses_of_another_shape_or_that_are_not_finite_are_refused(spoil):
    model = Net(nn.Identity()).eval()
    losses = made_up_losses(model)
    with pytest.raises(PrivacyError, match="expected 12 finite numbers"):
        validate_model(
            model, model.parameters(), lambda s: spoil(losses(s)), records=RECORDS, draws=DRAWS
        )
