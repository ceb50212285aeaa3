"""The diffusion process: noise, targets, per-row loss, distribution of times, DDIM sampling.

Shapes: R rows (record x draw), B images, C latent channels, H, W. Times are int64 in [0, T).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, get_args

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from dpldm_dist.errors import ConfigError, DataError
from dpldm_dist.models.denoiser import Denoiser

Prediction = Literal["epsilon", "v_prediction"]
Schedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]


@dataclass(frozen=True)
class Diffusion:
    """A variance-preserving process z_t = a_t z_0 + s_t noise with a_t^2 + s_t^2 = 1.

    The settings are those of ``diffusers.DDIMScheduler``, which also makes the table of a_t and
    takes the sampling steps, so that an exported model samples alike in a stock pipeline.
    """

    prediction: Prediction = "v_prediction"
    schedule: Schedule = "scaled_linear"
    diffusion_steps: int = 1000
    """Number of diffusion times T."""
    beta_start: float = 0.00085
    beta_end: float = 0.012
    timestep_spacing: Literal["leading", "trailing", "linspace"] = "trailing"
    """Which times a short sampling visits; "trailing" begins at the noisiest (arXiv 2305.08891)."""
    steps_offset: int = 1
    set_alpha_to_one: bool = True

    @staticmethod
    def from_scheduler(config: dict[str, Any]) -> Diffusion:
        """The process that a diffusers scheduler configuration describes.

        Raises: DataError if it uses what this class does not have (an explicit table of betas,
        another prediction type, clipping of samples, ...).
        """
        found = {
            "prediction_type": (config.get("prediction_type", "epsilon"), get_args(Prediction)),
            "beta_schedule": (config.get("beta_schedule", "linear"), get_args(Schedule)),
            "timestep_spacing": (
                config.get("timestep_spacing", "leading"),
                ("leading", "trailing", "linspace"),
            ),
            "trained_betas": (config.get("trained_betas"), (None,)),
            "rescale_betas_zero_snr": (config.get("rescale_betas_zero_snr", False), (False,)),
            "thresholding": (config.get("thresholding", False), (False,)),
            "clip_sample": (config.get("clip_sample", False), (False,)),
        }
        for name, (value, allowed) in found.items():
            if value not in allowed:
                raise DataError(
                    f"The scheduler of the model has {name} = {value!r}: expected one of "
                    f"{allowed}. Choose another model or edit its scheduler_config.json."
                )
        return Diffusion(
            prediction=found["prediction_type"][0],
            schedule=found["beta_schedule"][0],
            diffusion_steps=int(config.get("num_train_timesteps", 1000)),
            beta_start=float(config.get("beta_start", 0.0001)),
            beta_end=float(config.get("beta_end", 0.02)),
            timestep_spacing=found["timestep_spacing"][0],
            steps_offset=int(config.get("steps_offset", 0)),
            set_alpha_to_one=bool(config.get("set_alpha_to_one", True)),
        )

    def scheduler(self) -> DDIMScheduler:
        """A new stock scheduler with these settings."""
        return DDIMScheduler(
            num_train_timesteps=self.diffusion_steps,
            beta_start=self.beta_start,
            beta_end=self.beta_end,
            beta_schedule=self.schedule,
            prediction_type=self.prediction,
            timestep_spacing=self.timestep_spacing,
            steps_offset=self.steps_offset,
            set_alpha_to_one=self.set_alpha_to_one,
            clip_sample=False,
        )

    @cached_property
    def alphas_cumprod_T(self) -> Tensor:
        """a_t^2 for every time, float32 (T,), as the scheduler computes it."""
        return self.scheduler().alphas_cumprod

    def _signal_and_noise(self, t_R: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        square_R = self.alphas_cumprod_T.to(like.device)[t_R].to(like.dtype)
        shape = (-1,) + (1,) * (like.dim() - 1)
        return square_R.sqrt().view(shape), (1 - square_R).sqrt().view(shape)

    def add_noise(self, z0_RCHW: Tensor, noise_RCHW: Tensor, t_R: Tensor) -> Tensor:
        """z_t, shape (R, C, H, W)."""
        signal, noise = self._signal_and_noise(t_R, z0_RCHW)
        return signal * z0_RCHW + noise * noise_RCHW

    def target(self, z0_RCHW: Tensor, noise_RCHW: Tensor, t_R: Tensor) -> Tensor:
        """What the denoiser should answer: the noise, or v = a_t noise - s_t z_0.

        Source: Salimans and Ho (2022), arXiv 2202.00512, for v.
        """
        if self.prediction == "epsilon":
            return noise_RCHW
        signal, noise = self._signal_and_noise(t_R, z0_RCHW)
        return signal * noise_RCHW - noise * z0_RCHW

    def loss_rows(
        self,
        denoiser: Callable[[Tensor, Tensor, Tensor], Tensor],
        z0_RCHW: Tensor,
        noise_RCHW: Tensor,
        t_R: Tensor,
        condition: Tensor,
    ) -> Tensor:
        """Mean squared error of each row, float32 (R,).

        ``condition`` is labels int64 (R,) or context tokens (R, N, D). Formal guarantees: row r
        depends on row r of the inputs only (the denoiser has no layer that mixes rows).
        """
        answer = denoiser(self.add_noise(z0_RCHW, noise_RCHW, t_R), t_R, condition)
        error = answer.float() - self.target(z0_RCHW, noise_RCHW, t_R).float()
        return error.square().flatten(1).mean(1)

    def times_from_uniform(self, u_R: Tensor, *, bias: float, spread: float | None) -> Tensor:
        """Times int64 (R,) from uniforms in [0, 1): the inverse of the distribution function.

        With ``spread`` the logarithm of the noise level s_t / a_t is normal with mean ``bias`` and
        standard deviation ``spread``, cut to the levels that the schedule has and rounded to the
        nearest of them (Karras et al. 2022, arXiv 2206.00364, section 5). None: uniform times.

        Raises: ConfigError if that normal has no mass on the schedule.
        """
        if spread is None:
            t_R = (u_R.double() * self.diffusion_steps).long()
        else:
            cdf_T = _cdf_of_times(self, bias, spread).to(u_R.device)
            t_R = torch.searchsorted(cdf_T, u_R.double().contiguous(), right=True)
        return t_R.clamp_(max=self.diffusion_steps - 1)

    @torch.no_grad()
    def ddim_sample(
        self,
        denoiser: Denoiser,
        condition: Tensor,
        noise_BCHW: Tensor,
        *,
        steps: int,
        eta: float = 0.0,
        guidance_scale: float = 1.0,
        eta_noise: Callable[[int], Tensor] | None = None,
    ) -> Tensor:
        """Latents z_0 (B, C, H, W) from noise by DDIM with classifier-free guidance.

        ``condition``: labels (B,) or context tokens (B, N, D). ``guidance_scale`` 1 asks the
        conditional model only; g answers null + g (conditional - null). ``eta_noise(step)`` gives
        the noise (B, C, H, W) that is added at a step when ``eta`` > 0. A pure function of its
        arguments: an image does not depend, beyond rounding, on the others of its batch.

        Source: Song et al. (2020), arXiv 2010.02502, equations 12 and 16; Ho and Salimans (2022),
        arXiv 2207.12598.
        Raises: ConfigError if ``eta`` > 0 without ``eta_noise``.
        """
        if eta > 0 and eta_noise is None:
            raise ConfigError(f"eta = {eta}: expected eta_noise with it, or eta = 0.")
        scheduler = self.scheduler()
        scheduler.set_timesteps(steps)
        everyone = torch.ones(len(condition), dtype=torch.bool, device=condition.device)
        null = denoiser.embedder.drop(condition, everyone)
        z_BCHW = noise_BCHW
        for step, t in enumerate(scheduler.timesteps.tolist()):
            answer = _guided(denoiser, z_BCHW, t, condition, null, guidance_scale)
            extra = eta_noise(step) if eta > 0 and eta_noise is not None else None
            z_BCHW = scheduler.step(
                answer, t, z_BCHW, eta=eta, variance_noise=extra, return_dict=False
            )[0]
        return z_BCHW


def _guided(
    denoiser: Denoiser, z_BCHW: Tensor, t: int, condition: Tensor, null: Tensor, scale: float
) -> Tensor:
    rows = len(z_BCHW)
    t_B = torch.full((rows,), t, dtype=torch.int64, device=z_BCHW.device)
    if scale == 1:
        return denoiser(z_BCHW, t_B, condition)
    both = denoiser(z_BCHW.repeat(2, 1, 1, 1), t_B.repeat(2), torch.cat([null, condition]))
    return both[:rows] + scale * (both[rows:] - both[:rows])


@lru_cache(maxsize=8)
def _cdf_of_times(diffusion: Diffusion, bias: float, spread: float) -> Tensor:
    """P(time <= t) for every t, float64 (T,): normal mass between midpoints of log noise levels."""
    square_T = diffusion.alphas_cumprod_T.double()
    level_T = 0.5 * (torch.log1p(-square_T) - torch.log(square_T))
    middle = (level_T[1:] + level_T[:-1]) / 2
    first, last = 2 * level_T[:1] - middle[:1], 2 * level_T[-1:] - middle[-1:]
    score = (torch.cat([first, middle, last]) - bias) / spread
    mass = 0.5 * torch.erfc(-score / math.sqrt(2))
    total = mass[-1] - mass[0]
    if not total > 1e-12:
        low, high = level_T[0].item(), level_T[-1].item()
        raise ConfigError(
            f"time_bias = {bias}, time_spread = {spread}: no diffusion time has such a noise "
            f"level; expected a bias between {low:.1f} and {high:.1f} (log of noise over signal)."
        )
    return (mass[1:] - mass[0]) / total
