"""The records of a worker: which take part in a step, their draws, their losses.

Shapes: B records of a microbatch, K draws of each, R = B * K rows (record-major), C, h, w of a
latent, m images of a record.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor, nn

from dpldm_dist.config import Config
from dpldm_dist.data.ahead import Ahead
from dpldm_dist.data.latents import LatentRecords, LatentShards
from dpldm_dist.errors import PrivacyError
from dpldm_dist.models.denoiser import Denoiser
from dpldm_dist.models.diffusion import Diffusion
from dpldm_dist.privacy.draws import RecordDraws, record_draws
from dpldm_dist.privacy.gradients import PerRecordGradients, RawRecords
from dpldm_dist.privacy.plan import PrivacyPlan
from dpldm_dist.privacy.randomness import KEY_BYTES
from dpldm_dist.privacy.sampling import Lanes, PoissonSampling, Selection
from dpldm_dist.privacy.selfcheck import RecordTally
from dpldm_dist.runtime.strategy_fsdp import shards_frozen
from dpldm_dist.runtime.worker import Worker
from dpldm_dist.stages.mechanism import record_bound, telemetry_query


@dataclass(frozen=True)
class Part:
    """One microbatch, padded with zeros to a fixed number of records; ``mask_B``: who is real.

    ``condition`` is labels (R,) or context tokens (R, tokens, width); ``dropped_R`` rows lose it.
    """

    z0_RCHW: Tensor
    noise_RCHW: Tensor
    times_R: Tensor
    condition: Tensor
    dropped_R: Tensor
    mask_B: Tensor

    def to(self, device: torch.device) -> Part:
        return Part(*(getattr(self, field.name).to(device) for field in fields(self)))


@dataclass(frozen=True)
class _Prepared:
    """A microbatch before it is used, with the step and the records (ids, int64 (n,)) it is of."""

    step: int
    ids: np.ndarray
    part: Part


class PrivateData:
    """The private latents of this worker, drawn and dressed for each step.

    Formal guarantees: which records take part, and what each of them draws, depends on the key, the
    attempt, the step and the record alone. A record's rows depend on no other record. Whether
    microbatches are prepared ahead changes no bit of them, and takes part in no collective.
    Where frozen weights are divided over the workers, all workers get equally many parts: the
    further ones hold nobody, so they add exact zeros to a sum, without any rounding, and the bound
    on what a record moves it by, which counts the microbatches that hold records, stays as it is.
    """

    def __init__(
        self,
        config: Config,
        plan: PrivacyPlan,
        latents: LatentShards,
        key: bytes,
        attempt: int,
        diffusion: Diffusion,
        worker: Worker,
    ):
        self._config = config
        self._plan = plan
        self._latents = latents
        self._key = key
        self._attempt = attempt
        self._diffusion = diffusion
        self._worker = worker
        self._lanes = Lanes(
            latents.shard_records, lanes=plan.lanes, cap=plan.batch_cap, microbatch=plan.microbatch
        )
        self._sampling = PoissonSampling(key, attempt=attempt, sample_rate=plan.sample_rate)
        self._tally = RecordTally(
            key, lanes=plan.lanes, collective=worker.collective, device=worker.device
        )
        self._ahead: Ahead[_Prepared] | None = None

    @contextmanager
    def ahead(self, *, last: int) -> Iterator[None]:
        """Within: while a step before ``last`` computes, ``run.prefetch`` microbatches of this and
        the next step are made ready in the background. Their coins are known ahead."""
        if self._config.run.prefetch:
            self._ahead = Ahead(self._prepared, most=self._config.run.prefetch, last=last)
        try:
            yield
        finally:
            if self._ahead is not None:
                self._ahead.close()
                self._ahead = None

    def microbatches(self, step: int) -> Iterator[Part]:
        """This worker's part of the batch of ``step``; nothing when no record of it was drawn, or
        parts without records while another worker has more.

        Every worker asks for all of its parts: at their end the workers agree that each record that
        was drawn was handed out exactly once. Raises: PrivacyError otherwise.
        """
        waiting = self._prepared(step) if self._ahead is None else self._ahead.of_step(step)
        mine: list[tuple[int, Selection]] = []
        for lane in self._lanes.of_worker(self._worker.rank, self._worker.world_size):
            drawn = self._lanes.select(self._sampling, step, lane)  # here too, to compare
            self._tally.drawn(lane, drawn.ids)
            mine += [(lane, chosen) for chosen in self._lanes.split(drawn)]
        passes = self._passes(len(mine))
        for lane, chosen in mine:
            found = next(waiting, None)
            _require_prepared_for(found, step, chosen)
            yield found.part.to(self._worker.device)
            self._tally.processed(lane, chosen.ids)  # the loop is done with it
        _require_prepared_for(next(waiting, None), step, None)
        for _ in range(passes - len(mine)):
            yield self._empty_part()
        self._tally.settle()

    def _passes(self, parts: int) -> int:
        """How many passes a worker with ``parts`` microbatches makes: as many as any other, if all
        need equally many."""
        if not shards_frozen(self._config.run, self._worker):
            return parts
        return self._worker.most(parts)

    def _empty_part(self) -> Part:
        """A microbatch without records: zeros, all of it padding."""
        like = self._made_up(range(1))
        return Part(*(torch.zeros_like(getattr(like, field.name)) for field in fields(like)))

    def _prepared(self, step: int) -> Iterator[_Prepared]:
        """All microbatches of this worker in ``step``, in order, on the CPU."""
        for lane in self._lanes.of_worker(self._worker.rank, self._worker.world_size):
            for chosen in self._lanes.microbatches(self._sampling, step, lane):
                yield self._prepare(chosen, step)

    def _prepare(self, chosen: Selection, step: int) -> _Prepared:
        records = self._latents.gather(chosen.shards, chosen.places)
        part = self._dress(records, self._draws(self._key, chosen.ids, step))
        return _Prepared(step, chosen.ids, part)

    def owned(self) -> Iterator[np.ndarray]:
        """Ids of all records that this worker reads, int64 (n,), counted in its own shards."""
        for shard in self._lanes.shards_of_worker(self._worker.rank, self._worker.world_size):
            places = np.arange(self._latents.count(shard))
            yield Selection(np.full(len(places), shard), places).ids

    def losses(self, denoiser: Denoiser, part: Part) -> Callable[[], Tensor]:
        """A forward pass that gives the loss of every row, (R,)."""

        def rows() -> Tensor:
            condition = denoiser.embedder.drop(part.condition, part.dropped_R)
            return self._diffusion.loss_rows(
                denoiser, part.z0_RCHW, part.noise_RCHW, part.times_R, condition
            )

        return rows

    def gradients(
        self,
        denoiser: Denoiser,
        parameters: Mapping[str, nn.Parameter],
        *,
        watch: Callable[[RawRecords], None] | None = None,
    ) -> PerRecordGradients:
        """The engine, with a clip norm that pays for every rounding; tried on made-up records."""
        plan, count = self._plan, sum(parameter.numel() for parameter in parameters.values())
        engine = PerRecordGradients(
            denoiser,
            parameters,
            clip_norm=record_bound(plan, parameters=count).gradient,
            draws=plan.draws,
            grid=plan.grid,
            telemetry=telemetry_query(self._config, plan, parameters=count),
            watch=watch,
        )
        part = self._made_up(range(plan.microbatch))
        engine.verify(self.losses(denoiser, part), part.mask_B)
        return engine

    def try_out(self, denoiser: Denoiser, parameters: Mapping[str, nn.Parameter]) -> None:
        """The self-test of the engine and one pass, on made-up records: for measurements."""
        part = self._made_up(range(self._plan.microbatch))
        self.gradients(denoiser, parameters).add(self.losses(denoiser, part), part.mask_B)

    def _draws(self, key: bytes, ids: np.ndarray, step: int) -> RecordDraws:
        return record_draws(
            key,
            ids,
            attempt=self._attempt,
            step=step,
            draws=self._plan.draws,
            dims=math.prod(self._latents.latent_shape),
        )

    def made_up_losses(self, denoiser: Denoiser) -> Callable[[Sequence[int]], Tensor]:
        """What gives the losses (R,) of a full microbatch whose records are made up from seeds."""
        return lambda seeds: self.losses(denoiser, self._made_up(seeds))()

    def _made_up(self, seeds: Sequence[int]) -> Part:
        """A microbatch of random records in the shape of the private ones, each of its own seed."""
        each = [self._made_up_record(np.random.default_rng(seed)) for seed in seeds]
        records = LatentRecords(
            moments=np.stack([record.moments for record in each]),
            labels=np.stack([record.labels for record in each]),
            images=np.array([record.images for record in each]),
            context=None
            if self._latents.context_shape is None
            else np.stack([record.context for record in each]),
        )
        return self._dress(records, self._draws(bytes(KEY_BYTES), np.array(seeds), step=0)).to(
            self._worker.device
        )

    def _made_up_record(self, generator: np.random.Generator) -> LatentRecords:
        """One record, without the axis of records."""
        latents, many = self._latents, self._latents.images_per_record
        channels, height, width = latents.latent_shape
        shape = (many, latents.views, 2 * channels, height, width)
        context = None
        if latents.context_shape is not None:
            context = generator.standard_normal((many, *latents.context_shape), dtype=np.float32)
        return LatentRecords(
            moments=generator.standard_normal(shape, dtype=np.float32),
            labels=generator.integers(0, max(1, len(latents.classes)), many),
            images=np.int64(many),
            context=context,
        )

    def _dress(self, records: LatentRecords, draws: RecordDraws) -> Part:
        """Pick image and view, sample the posterior, noise it, and pad to the fixed size."""
        settings, count, many = self._config.finetune, len(records.images), self._plan.draws
        rows_BK = torch.arange(count)[:, None].expand(count, many)
        image_BK = (draws.image * torch.from_numpy(records.images)[:, None]).long()
        view_BK = (draws.view * self._latents.views).long()
        moments = torch.from_numpy(records.moments)[rows_BK, image_BK, view_BK]
        mean, log_variance = moments.chunk(2, dim=2)
        shape = (count, many, *self._latents.latent_shape)
        z0 = mean + torch.exp(0.5 * log_variance) * draws.posterior.view(shape)
        given = records.labels if records.context is None else records.context
        times_BK = self._diffusion.times_from_uniform(
            draws.time.reshape(-1), bias=settings.time_bias, spread=settings.time_spread
        ).view(count, many)
        return Part(
            z0_RCHW=self._pad(z0),
            noise_RCHW=self._pad(draws.noise.view(shape)),
            times_R=self._pad(times_BK),
            condition=self._pad(torch.from_numpy(given)[rows_BK, image_BK]),
            dropped_R=self._pad(draws.dropout < settings.label_dropout),
            mask_B=torch.arange(self._plan.microbatch) < count,
        )

    def _pad(self, tensor_BK: Tensor) -> Tensor:
        """(n, K, ...) -> (R, ...), zeros behind the n records."""
        padded = tensor_BK.new_zeros(self._plan.microbatch, *tensor_BK.shape[1:])
        padded[: len(tensor_BK)] = tensor_BK
        return padded.flatten(0, 1)


def _require_prepared_for(found: _Prepared | None, step: int, chosen: Selection | None) -> None:
    """What was prepared is what is wanted now. Raises: PrivacyError otherwise."""
    if found is None and chosen is None:
        return
    if (
        found is None
        or chosen is None
        or found.step != step
        or not np.array_equal(found.ids, chosen.ids)
    ):
        raise PrivacyError(
            "The records that were prepared in the background are not those that were drawn for "
            "this step. Nothing of this step was released. Start again with run.prefetch=0; please "
            "report it as a bug."
        )
