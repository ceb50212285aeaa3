"""What is released: the averaged model, and a manifest that names all that it depends on."""

from __future__ import annotations

from typing import Any

from dpldm_dist.config import Config
from dpldm_dist.data.files import clear_partials
from dpldm_dist.data.latents import LatentShards
from dpldm_dist.data.manifest import MANIFEST, Manifest, describe_files, software
from dpldm_dist.models.directory import LoadedModel, save_model
from dpldm_dist.privacy.ledger import PrivacyLedger, SharedLedger, read_ledger
from dpldm_dist.privacy.plan import PrivacyPlan
from dpldm_dist.runtime.rundir import RunDir, dataset_dir
from dpldm_dist.runtime.worker import Worker
from dpldm_dist.stages.finetune.preparation import reservation, unsafe_switches, whole_unet
from dpldm_dist.stages.finetune.state import TrainingState, settings_of
from dpldm_dist.stages.mechanism import plan_of


def publish(
    config: Config,
    plan: PrivacyPlan,
    run: RunDir,
    public: LoadedModel,
    latents: LatentShards,
    state: TrainingState,
    ledger: SharedLedger,
    data: str,
    worker: Worker,
) -> Manifest:
    """Write ``release/model`` from the averaged weights, ``release/telemetry.json`` from the noisy
    sums, then ``release/manifest.json``.

    ``data``: the commitment to the private latents that the ledger was opened with.
    """
    state.ema.copy_to()
    facts = _facts(config, plan, latents, state, ledger)
    unet = whole_unet(config, public, state.denoiser, latents, worker)
    if worker.rank == 0:
        clear_partials(run.release)
        save_model(
            run.released_model,
            unet=unet,
            autoencoder=public.autoencoder,
            diffusion=public.diffusion,
            rows_NTD=state.denoiser.embedder.rows(),
            classes=latents.classes,
            kind=public.kind,
            text_encoder_from=public.folder if public.has_text_encoder else None,
        )
        state.curves.write(run.telemetry)
        found = [path for path in run.released_model.rglob("*") if path.is_file()]
        found += [path for path in [run.gaussian, run.telemetry] if path.is_file()]
        names = sorted(str(path.relative_to(run.release)) for path in found)
        Manifest(
            kind="model",
            facts=facts,
            files=describe_files(run.release, names),
            config=settings_of(config),
            parents=_parents(config, public, data),
        ).write(run.release)
    worker.collective.barrier()
    return Manifest.read(run.release, "model")


def close_books(config: Config, run: RunDir, worker: Worker) -> None:
    """After the release: seal the ledger, then destroy the key. Safe to repeat after a crash."""
    if worker.rank == 0 and run.key.exists():
        opened_for = read_ledger(run.ledger).plan
        reserve = reservation(config, plan_of(config, records=opened_for["records"]))
        with PrivacyLedger.open(run.ledger, opened_for, reserve=reserve) as ledger:
            ledger.seal()
        run.destroy_key()
    worker.collective.barrier()


def _facts(
    config: Config,
    plan: PrivacyPlan,
    latents: LatentShards,
    state: TrainingState,
    ledger: SharedLedger,
) -> dict[str, Any]:
    numbers = plan.facts()
    spent, unsafe = ledger.spent(), unsafe_switches(config)
    return {
        **numbers,
        "epsilon_budget": numbers["epsilon"],
        "epsilon": None if unsafe else spent,
        "claim": not unsafe,
        "unsafe": unsafe,
        "steps_done": state.step,
        "ledger_head": list(ledger.head),
        "trainable": config.finetune.trainable,
        "parameters": sum(p.numel() for p in state.parameters.values()),
        "parameters_all": sum(p.numel() for p in state.denoiser.parameters()),
        "embedder_grad_scale": state.denoiser.embedder.grad_scale,
        "classes": list(latents.classes),
        "software": software(),
    }


def _parents(config: Config, public: LoadedModel, data: str) -> dict[str, str]:
    """Public parents by the SHA-256 of their manifests, private ones by a keyed commitment."""
    parents = {"private latents (commitment)": data}
    places = {
        "public model": public.folder,
        "autoencoder": RunDir(config.run.dir).autoencoder,
        "public latents": dataset_dir(config, "public", "latents"),
        "public images": dataset_dir(config, "public", "images"),
    }
    for name, folder in places.items():
        if (folder / MANIFEST).is_file():
            parents[name] = Manifest.read(folder).digest
    return parents
