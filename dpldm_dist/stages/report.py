"""A release and its ledger -> one self-contained page that a privacy officer can sign.

The page holds public and released facts only. Of the private directory it reads one file, the
ledger, and of that it shows what the guarantee is made of: charges, attempts, the head's hash.
"""

from __future__ import annotations

import json
import math
import platform
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from dpldm_dist import __version__
from dpldm_dist.config import Config
from dpldm_dist.data.files import make_folder, read_file, write_file
from dpldm_dist.data.manifest import Manifest, describe_files
from dpldm_dist.data.pages import band_svg, curve_svg, data_uri, render
from dpldm_dist.errors import DataError, PrivacyError
from dpldm_dist.privacy.accounting import GaussianEvent, epsilon, epsilon_curve
from dpldm_dist.privacy.ledger import LedgerSummary, read_ledger
from dpldm_dist.privacy.signal import MOST_OF_NOISE
from dpldm_dist.runtime.rundir import RunDir
from dpldm_dist.runtime.worker import Worker

PAGE = "report.html"
CURVE_POINTS = 24
SHARED_WITH_LEDGER = (
    "claim",
    "delta",
    "overflow_delta",
    "unit",
    "relation",
    "records",
    "sample_rate",
    "noise_multiplier",
    "statistics_noise",
    "clip_norm",
    "telemetry_share",
)
PACKAGES = ("torch", "diffusers", "numpy", "safetensors", "cryptography", "dp-accounting", "opacus")


@dataclass(frozen=True)
class ModelFacts:
    """What the manifest of a released model must say."""

    claim: bool
    unsafe: list[str]
    epsilon: float | None
    epsilon_budget: float
    delta: float
    overflow_delta: float
    unit: str
    relation: str
    records: int
    sample_rate: float
    steps: int
    steps_done: int
    noise_multiplier: float
    statistics_noise: float | None
    clip_norm: float
    telemetry_share: float
    draws: int
    lanes: int
    batch_cap: int
    microbatch: int
    trainable: str
    parameters: int
    parameters_all: int
    classes: list[str]
    ledger_head: list[Any]


def report(config: Config, worker: Worker) -> Manifest:
    """Write ``release/report.html``; its manifest lies in ``release/report/``.

    The page is made anew whenever the model, the samples or the ledger changed, else left alone.

    Formal guarantees: epsilon is computed from the ledger file alone and is never less than the
    model's manifest says; a run without a privacy claim gets a page without a privacy parameter;
    files that differ from their manifest stop the stage.
    Raises: DataError, PrivacyError.
    """
    run = RunDir(config.run.dir)
    if worker.rank == 0:
        _make(run)
    worker.collective.barrier()
    return Manifest.read(run.release / "report", "report")


def describe(config: Config) -> list[str]:
    """What ``report`` would do, for --dry-run. Reads nothing."""
    run = RunDir(config.run.dir)
    return [
        f"reads   {run.release / 'manifest.json'}, {run.release / 'samples'} (if there)",
        f"reads   {run.ledger} (shows charges, attempts and the hash of its head)",
        f"writes  {run.release / PAGE}",
    ]


def model_facts(manifest: Manifest, where: Path) -> ModelFacts:
    """The facts of a released model. Raises: DataError naming the first that is missing."""
    for field in fields(ModelFacts):
        if field.name not in manifest.facts:
            raise DataError(
                f"{where / 'manifest.json'} lacks {field.name!r}: expected the manifest of a "
                "finished finetune. Run finetune first."
            )
    return ModelFacts(**{field.name: manifest.facts[field.name] for field in fields(ModelFacts)})


def _make(run: RunDir) -> None:
    model = Manifest.read(run.release, "model")
    facts = model_facts(model, run.release)
    model.verify(run.release)
    samples = _samples(run, model)
    ledger = _ledger(run, facts) if facts.claim else None
    parents = {"model": model.digest}
    parents |= {"samples": samples.digest} if samples else {}
    parents |= {"ledger": str(ledger.head[1])} if ledger else {}
    if _is_current(run, parents):
        return
    page = render("report.html.j2", **_values(run, model, facts, samples, ledger))
    write_file(run.release / PAGE, page.encode(), private=False)
    make_folder(run.release / "report", private=False)
    public = {"claim": facts.claim}
    Manifest("report", public, describe_files(run.release, [PAGE]), {}, parents).write(
        run.release / "report"
    )


def _samples(run: RunDir, model: Manifest) -> Manifest | None:
    """The manifest of the released samples. Raises: DataError if they are of another model."""
    folder = run.release / "samples"
    if not (folder / "manifest.json").is_file():
        return None
    samples = Manifest.read(folder, "samples")
    files = {
        name.removeprefix("model/"): entry
        for name, entry in model.files.items()
        if name.startswith("model/")
    }
    if samples.parents.get("model") != Manifest("model", {}, files).digest:
        raise DataError(
            f"{folder} was not drawn from the released model: expected samples of "
            f"{run.released_model}. Delete that folder and run sample again."
        )
    samples.verify(folder)
    return samples


def _ledger(run: RunDir, facts: ModelFacts) -> LedgerSummary:
    """The ledger, read from its file, if it covers the release. Raises: PrivacyError if not."""
    ledger = read_ledger(run.ledger)
    if not ledger.contains(facts.ledger_head):
        raise PrivacyError(
            f"{run.ledger} lacks the entry that the release names: this is not the whole ledger of "
            "the release. Restore it."
        )
    plan = {name: getattr(facts, name) for name in SHARED_WITH_LEDGER}
    for name, released in (plan | {"epsilon": facts.epsilon_budget}).items():
        if ledger.plan.get(name) != released:
            raise PrivacyError(
                f"{run.ledger} was opened for another {name} than the release was made with: this "
                "is not the ledger of the release. Restore the right one."
            )
    if facts.epsilon is None or ledger.epsilon < facts.epsilon * (1 - 1e-9):
        raise PrivacyError(
            f"{run.ledger} accounts for epsilon {ledger.epsilon:.6f}, the release for "
            f"{facts.epsilon}: this is not the whole ledger of the release. Restore it."
        )
    return ledger


def _is_current(run: RunDir, parents: dict[str, str]) -> bool:
    if not (run.release / "report" / "manifest.json").is_file():
        return False
    try:
        found = Manifest.read(run.release / "report", "report")
        found.verify(run.release)
    except DataError:
        return False
    return found.parents == parents


# --- what the page says -------------------------------------------------------------------------


def _values(
    run: RunDir,
    model: Manifest,
    facts: ModelFacts,
    samples: Manifest | None,
    ledger: LedgerSummary | None,
) -> dict[str, Any]:
    values: dict[str, Any] = {
        "version": __version__,
        "claim": facts.claim,
        "unsafe": facts.unsafe,
        "unit": facts.unit,
        "mechanism": _mechanism(facts),
        "grid": None,
        "sampling": {},
        "parents": dict(sorted(model.parents.items())) | {"released model": model.digest},
        "files": {name: entry["sha256"] for name, entry in sorted(model.files.items())},
        "settings": _settings(model, claim=facts.claim),
        "software": _software(model),
    }
    if samples is not None:
        grid = read_file(run.release / "samples" / "samples.png")
        values |= {"grid": data_uri(grid), "sampling": _sampling(samples)}
        values["parents"]["released samples"] = samples.digest
        values["files"] |= _sample_files(samples)
    if ledger is not None:
        values |= _claimed(facts, ledger, samples) | {"training": _training(run, model)}
    return values


def _claimed(facts: ModelFacts, ledger: LedgerSummary, samples: Manifest | None) -> dict[str, Any]:
    """Everything that stands only on the page of a run with a privacy claim."""
    delta = facts.delta - facts.overflow_delta
    replace_one = epsilon(ledger.events, delta, relation="replace_one")
    return {
        "guarantee": {
            "sentence": (
                f"Whether the private data holds any one {facts.unit} or not changes the "
                "probability of every outcome of this release by a factor of at most "
                f"exp({_up(ledger.epsilon)}), but for a probability of {_number(facts.delta)}."
            ),
            "epsilon": _up(ledger.epsilon),
            "epsilon_replace": _up(replace_one),
            "budget": _number(facts.epsilon_budget),
            "delta": _number(facts.delta),
            "overflow_delta": _number(facts.overflow_delta),
        },
        "promises": _promises(facts, _up(ledger.epsilon), _up(replace_one)),
        "released": _released(facts, samples),
        "not_promised": NOT_PROMISED,
        "assumptions": _assumptions(facts),
        "curve": _curve(facts, ledger, delta),
        "ledger": _ledger_rows(facts, ledger),
        "heads": _heads(facts, ledger),
    }


def _promises(facts: ModelFacts, add_or_remove: str, replace_one: str) -> list[str]:
    return [
        f"Unit of protection: one {facts.unit}. One record holds everything of one {facts.unit}.",
        f"Neighbouring data sets: equal but for one {facts.unit} that is in one of them and not in "
        "the other (add or remove one).",
        "For neighbouring data sets D and D′ and every set S of outcomes: "
        f"P[release(D) ∈ S] ≤ exp(ε) · P[release(D′) ∈ S] + δ, with ε = {add_or_remove} and "
        f"δ = {_number(facts.delta)}.",
        f"If neighbours differ instead in the content of one {facts.unit}, the same holds with "
        f"ε = {replace_one}: a computation of its own, not derived from the first number.",
        "It covers everything that was ever released from this run together: every noisy step of "
        "every attempt, also of those that a crash cut short, and the statistics before them.",
        "It holds against anybody, whatever else they know or compute from it, now or later.",
    ]


def _released(facts: ModelFacts, samples: Manifest | None) -> list[str]:
    lines = [
        f"the model: {facts.parameters:,} parameters learned from private data out of "
        f"{facts.parameters_all:,}; the others come from public data",
        "its training curves (TensorBoard, telemetry.json), which show public quantities and noisy "
        "sums only",
        "this report and the manifests in the release directory",
    ]
    if facts.statistics_noise is not None:
        lines.insert(1, "noisy class means and covariance of the latents")
    if samples is not None:
        lines.insert(
            1, f"{samples.facts['images']:,} synthetic images, and any number of further ones"
        )
    return lines


NOT_PROMISED = (
    "Secrecy of the declared number of records, of the class names, and of the settings below: "
    "they are public inputs.",
    "Anything about timing: how long steps took, when the run started, what the machines logged.",
    "Anything about who can read the private directory, its file sizes, or the machines' memory.",
    "That k records of one person are protected as one: if the unit is smaller than a person, "
    "ε grows up to k-fold.",
    "That nothing is learned about the population: what holds whether or not any one record is "
    "there may show.",
    "That no synthetic image ever resembles a real one: what is common, or in public data, may "
    "recur.",
)


def _assumptions(facts: ModelFacts) -> list[str]:
    return [
        "The machines and people that ran the training are trusted: they saw the private images.",
        "Coins and noise are ChaCha20 keystreams (HMAC-SHA256 derives one key per use), assumed to "
        "be pseudo-random, under a key drawn from the operating system at every start and kept in "
        "memory only. The key in the private directory names private files; keep it private too.",
        "A record's gradient does not depend on its neighbours or its place in a microbatch: true "
        "of the networks, and of the arithmetic on CPU, where it is tested.",
        "The noise is drawn in 64-bit floating point, rounded to an integer grid and added to an "
        "exact integer sum; how far it is from an ideal Gaussian is stated in docs/guarantee.md.",
        f"Every {facts.unit} is in exactly one record, the private data holds at most the "
        f"{facts.records:,} records declared, and public data holds none of them.",
        "Settings were not chosen by looking at private data, beyond what the ledger charged.",
        "No evaluation on private data was published, nor used to choose between releases.",
        "The software does what its documentation says.",
    ]


def _mechanism(facts: ModelFacts) -> dict[str, str]:
    rows = {
        "declared number of records N": f"{facts.records:,}",
        "noisy steps": f"{facts.steps_done:,} of {facts.steps:,} planned",
        "sample rate q of a step (Poisson)": f"{facts.sample_rate:.8f}",
        "expected records per step q·N": f"{facts.sample_rate * facts.records:,.1f}",
        "clip norm C of one record's gradient": _number(facts.clip_norm),
        "noise multiplier σ (noise has standard deviation σ·C)": _number(facts.noise_multiplier),
        "noise multiplier of the statistics release": _number(facts.statistics_noise)
        or "no such release",
        "share of C² for loss, count and clip flag in the same sum": f"{facts.telemetry_share:.2%}",
        "draws of time, noise and view per record (K)": str(facts.draws),
        "trainable parameters": (
            f"{facts.parameters:,} of {facts.parameters_all:,} ({facts.trainable})"
        ),
        "lanes; most records per step; microbatch": (
            f"{facts.lanes}; {facts.batch_cap:,}; {facts.microbatch}"
        ),
        "classes": f"{len(facts.classes)}: {', '.join(facts.classes[:20])}"
        + (", …" if len(facts.classes) > 20 else ""),
    }
    if not facts.claim:
        rows["noise multiplier σ (noise has standard deviation σ·C)"] = "void: no privacy claim"
        rows["noise multiplier of the statistics release"] = "void: no privacy claim"
    return rows


def _ledger_rows(facts: ModelFacts, ledger: LedgerSummary) -> dict[str, str]:
    repeated = max(0, ledger.steps - facts.steps_done)
    return {
        "noisy steps charged": f"{ledger.steps:,}",
        "of these, repeated or lost after a stop": f"{repeated:,}",
        "statistics releases charged": f"{ledger.statistics:,}",
        "attempts (starts with fresh coins and fresh noise)": f"{ledger.attempts:,}",
        "entries; repairs after a torn write": f"{ledger.head[0] + 1:,}; {ledger.repairs}",
        "sealed (nothing can be charged any more)": "yes" if ledger.sealed else "not yet",
        "ε from the file, by privacy loss distributions": _up(ledger.epsilon, digits=6),
    }


def _heads(facts: ModelFacts, ledger: LedgerSummary) -> dict[str, str]:
    """Hashes that fix the ledger up to an entry."""
    return {
        f"entry {ledger.head[0]}, the last in the file": ledger.head[1],
        f"entry {facts.ledger_head[0]}, named by the released model": str(facts.ledger_head[1]),
    }


def _curve(facts: ModelFacts, ledger: LedgerSummary, delta: float) -> str:
    """Epsilon by number of noisy steps charged, statistics first."""
    step_event = GaussianEvent(facts.noise_multiplier, facts.sample_rate)
    others = [
        event
        for event in ledger.events
        if (event.noise_multiplier, event.sample_rate)
        != (facts.noise_multiplier, facts.sample_rate)
    ]
    # closer together at the start, where the curve bends
    points = sorted(
        {round(ledger.steps * (n / CURVE_POINTS) ** 2) for n in range(CURVE_POINTS + 1)}
    )
    values = epsilon_curve(step_event, others=others, delta=delta, steps=points)
    return curve_svg(
        points,
        values,
        x_label="noisy steps charged",
        y_label="ε",
        limit=facts.epsilon_budget,
        limit_label=f"budget {_number(facts.epsilon_budget)}",
    )


def _training(run: RunDir, model: Manifest) -> dict[str, str]:
    """Loss and signal along the run, from the released file of noisy sums; nothing without it."""
    if run.telemetry.name not in model.files:
        return {}
    curves = json.loads(read_file(run.telemetry))
    rows = curves["rows"]
    found = {} if curves["signal"] is None else {"in_words": curves["signal"]}
    if rows and "loss" in rows[0]:
        found["window"] = str(curves["window"])
        edges = [(row["loss_low"], row["loss_high"]) for row in rows]
        found["loss"] = _band(rows, "loss", edges, "training loss", from_zero=True)
    if rows and "walk" in rows[0]:
        edges = [
            (
                row["noise_alone_low"] / row["noise_alone"],
                row["noise_alone_high"] / row["noise_alone"],
            )
            for row in rows
        ]
        found["walk"] = _band(
            rows, "walk_ratio", edges, "length over that of noise", from_zero=False
        )
        edges = [(-MOST_OF_NOISE, MOST_OF_NOISE)] * len(rows)
        found["alignment"] = _band(rows, "alignment", edges, "standard errors", from_zero=False)
    return found


def _band(
    rows: list[dict[str, float]],
    name: str,
    edges: list[tuple[float, float]],
    label: str,
    *,
    from_zero: bool,
) -> str:
    return band_svg(
        [row["step"] for row in rows],
        [row[name] for row in rows],
        low=[low for low, _ in edges],
        high=[high for _, high in edges],
        x_label="noisy steps",
        y_label=label,
        from_zero=from_zero,
    )


def _sampling(samples: Manifest) -> dict[str, str]:
    settings = samples.config.get("sample", {})
    counts = samples.facts["images_per_class"]
    return {
        "images": f"{samples.facts['images']:,}",
        "per class": str(counts[0]) if len(set(counts)) == 1 else ", ".join(map(str, counts[:40])),
        "sampler": f"DDIM, {settings.get('steps')} steps, η = {settings.get('eta')}",
        "guidance scale": str(settings.get("guidance_scale")),
        "seed (public)": str(settings.get("seed")),
    }


def _sample_files(samples: Manifest) -> dict[str, str]:
    """The few large files; single PNGs are in the manifest of the samples, which is named."""
    return {
        f"samples/{name}": entry["sha256"]
        for name, entry in sorted(samples.files.items())
        if not name.startswith("png/")
    }


def _settings(model: Manifest, *, claim: bool) -> dict[str, dict[str, str]]:
    """Settings by section, as the model's manifest holds them; no path, nothing that is unset."""
    sections = {}
    for section, table in sorted(model.config.items()):
        if section == "privacy" and not claim:
            continue
        sections[section] = {
            name: _plain(value)
            for name, value in table.items()
            if value is not None and name != "init" and not name.endswith("key")
        }
    return sections


def _software(model: Manifest) -> dict[str, str]:
    versions = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions | {
        str(name): str(value) for name, value in model.facts.get("software", {}).items()
    }


def _up(value: float, *, digits: int = 3) -> str:
    """``value`` rounded up: a printed epsilon is never below the computed one."""
    if not math.isfinite(value):
        return "∞"
    return f"{math.ceil(value * 10**digits) / 10**digits:.{digits}f}"


def _number(value: float | None) -> str:
    """``1e-05`` as 10⁻⁵, ``2.5e-06`` as 2.5 · 10⁻⁶, others as they are; nothing for None."""
    if value is None:
        return ""
    digits, _, power = f"{value:.6g}".partition("e")
    if not power:
        return digits
    raised = str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{raised}" if digits == "1" else f"{digits} · 10{raised}"


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value)
