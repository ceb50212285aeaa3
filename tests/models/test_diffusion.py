"""The noise process against its definition, stock diffusers, and the laws it promises."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler

from dpldm_dist.errors import ConfigError, DataError
from dpldm_dist.models.conditioning import ClassEmbedder, random_rows
from dpldm_dist.models.denoiser import Denoiser
from dpldm_dist.models.diffusion import Diffusion
from dpldm_dist.models.unet import build_unet

SHAPE = (6, 4, 4, 4)


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    unet = build_unet(
        latent_channels=4,
        latent_size=4,
        block_channels=(16, 32),
        layers_per_block=1,
        heads=2,
        context_dim=8,
        norm_groups=4,
        seed=0,
    )
    return Denoiser(unet, ClassEmbedder(random_rows(4, 1, 8, seed=0))).requires_grad_(False)


def normal(seed: int, shape=SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noise_and_target_are_those_of_stock_diffusers(schedule, prediction):
    diffusion = Diffusion(prediction=prediction, schedule=schedule)
    z0, noise, t = normal(0), normal(1), torch.tensor([0, 1, 10, 500, 998, 999])
    stock = diffusion.scheduler()
    expected = stock.add_noise(z0, noise, t)
    assert torch.allclose(diffusion.add_noise(z0, noise, t), expected, atol=1e-6)
    target = noise if prediction == "epsilon" else stock.get_velocity(z0, noise, t)
    assert torch.allclose(diffusion.target(z0, noise, t), target, atol=1e-6)


def test_loss_of_a_row_is_the_mean_squared_error_of_that_row_alone(denoiser):
    diffusion, z0, noise = Diffusion(), normal(0), normal(1)
    t, labels = torch.tensor([0, 100, 300, 500, 800, 999]), torch.tensor([0, 1, 2, 3, 0, 1])
    loss_R = diffusion.loss_rows(denoiser, z0, noise, t, labels)
    assert loss_R.shape == (6,)
    alone = diffusion.loss_rows(denoiser, z0[2:3], noise[2:3], t[2:3], labels[2:3])
    assert torch.allclose(loss_R[2:3], alone, rtol=1e-5)
    answer = denoiser(diffusion.add_noise(z0, noise, t), t, labels)
    expected = (answer - diffusion.target(z0, noise, t)).square().mean((1, 2, 3))
    assert torch.allclose(loss_R, expected, rtol=1e-6)


def test_loss_accepts_context_in_place_of_labels(denoiser):
    diffusion, labels, t = Diffusion(), torch.tensor([0, 1, 2, 3, 0, 1]), torch.full((6,), 500)
    by_label = diffusion.loss_rows(denoiser, normal(0), normal(1), t, labels)
    context = denoiser.embedder(labels)
    assert torch.equal(by_label, diffusion.loss_rows(denoiser, normal(0), normal(1), t, context))


@pytest.mark.parametrize("bias, spread", [(0.0, 1.0), (0.6, 1.2), (-0.4, 1.4)])
def test_times_follow_a_normal_law_of_the_log_noise_level(bias, spread):
    diffusion, count = Diffusion(), 200_000
    u = torch.rand(count, generator=torch.Generator().manual_seed(0))
    t = diffusion.times_from_uniform(u, bias=bias, spread=spread)
    square = diffusion.alphas_cumprod_T.double()
    level = 0.5 * ((1 - square) / square).log()
    for quantile in (0.05, 0.25, 0.5, 0.75, 0.95):
        bound = level[int(1000 * quantile)]
        # The law is a normal cut to the levels of the schedule.
        low, high, at = (
            0.5 * math.erfc(-(float(x) - bias) / spread / math.sqrt(2))
            for x in (level[0], level[-1], bound)
        )
        expected = (at - low) / (high - low)
        found = float((level[t] <= bound).double().mean())
        # 4 standard errors, and one discrete time.
        assert abs(found - expected) < 4 * math.sqrt(0.25 / count) + 2e-3


def test_times_without_spread_are_uniform_and_in_range():
    diffusion = Diffusion(diffusion_steps=10)
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    t = diffusion.times_from_uniform(u, bias=0.0, spread=None)
    assert torch.equal(torch.bincount(t, minlength=10), torch.full((10,), 100))
    largest = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert diffusion.times_from_uniform(largest, bias=0.0, spread=None).item() == 9
    assert diffusion.times_from_uniform(largest, bias=0.6, spread=1.2).item() == 9


def test_times_rise_with_the_uniform():
    u = torch.linspace(0, 0.999999, 5000)
    t = Diffusion().times_from_uniform(u, bias=0.6, spread=1.2)
    assert (t[1:] >= t[:-1]).all()
    assert t.min() >= 0 and t.max() <= 999


def test_a_law_of_times_without_mass_on_the_schedule_is_refused():
    with pytest.raises(ConfigError, match="time_bias = 50"):
        Diffusion().times_from_uniform(torch.rand(3), bias=50.0, spread=0.1)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize("steps", [7, 20])
def test_sampling_takes_the_steps_of_stock_ddim(denoiser, eta, guidance_scale, steps):
    diffusion, labels = Diffusion(), torch.tensor([0, 1, 2, 0, 1, 2])
    found = diffusion.ddim_sample(
        denoiser,
        labels,
        normal(3),
        steps=steps,
        eta=eta,
        guidance_scale=guidance_scale,
        eta_noise=lambda step: normal(100 + step),
    )
    stock = DDIMScheduler.from_config(diffusion.scheduler().config)
    stock.set_timesteps(steps)
    z = normal(3)
    for step, t in enumerate(stock.timesteps):
        t_B = t.expand(6)
        with torch.no_grad():
            null = denoiser(z, t_B, torch.full((6,), 3))
            answer = null + guidance_scale * (denoiser(z, t_B, labels) - null)
        z = stock.step(answer, t, z, eta=eta, variance_noise=normal(100 + step)).prev_sample
    assert torch.allclose(found, z, atol=1e-4)


def test_a_sampled_image_does_not_depend_on_the_others_of_its_batch(denoiser):
    diffusion, labels = Diffusion(), torch.tensor([0, 1, 2, 0, 1, 2])
    settings = {"steps": 5, "guidance_scale": 1.5}
    together = diffusion.ddim_sample(denoiser, labels, normal(3), **settings)
    alone = diffusion.ddim_sample(denoiser, labels[4:5], normal(3)[4:5], **settings)
    assert torch.allclose(together[4:5], alone, atol=1e-5)


def test_eta_without_noise_is_refused(denoiser):
    with pytest.raises(ConfigError, match="eta_noise"):
        Diffusion().ddim_sample(denoiser, torch.arange(6) % 3, normal(0), steps=2, eta=1.0)


def test_a_scheduler_configuration_round_trips():
    diffusion = Diffusion(prediction="epsilon", schedule="linear", beta_start=0.001, beta_end=0.01)
    assert Diffusion.from_scheduler(dict(diffusion.scheduler().config)) == diffusion


@pytest.mark.parametrize(
    "name, value", [("prediction_type", "sample"), ("trained_betas", [0.1]), ("clip_sample", True)]
)
def test_a_scheduler_that_is_not_supported_is_refused_by_name(name, value):
    config = {**Diffusion().scheduler().config, name: value}
    with pytest.raises(DataError, match=name):
        Diffusion.from_scheduler(config)
