"""The page says what the ledger proves, nothing private, and nothing at all without a claim."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from dpldm_dist.config import Config, parse_config
from dpldm_dist.data.manifest import Manifest, describe_files
from dpldm_dist.data.pages import class_grid_png, curve_svg, grid_png
from dpldm_dist.errors import DataError, PrivacyError
from dpldm_dist.privacy.accounting import epsilon
from dpldm_dist.privacy.ledger import PrivacyLedger, read_ledger
from dpldm_dist.privacy.plan import PrivacyPlan, make_plan
from dpldm_dist.runtime.rundir import RunDir
from dpldm_dist.runtime.worker import solo_worker
from dpldm_dist.stages.report import describe, report

CANARY = "canary-7f3a91"
COMMITMENT = "c0" * 32
SETTINGS = {
    "privacy": {"epsilon": 7.31, "delta": 1e-5, "clip_norm": 0.5},
    "finetune": {"steps": 12, "batch": 100, "statistics_noise": 12.0},
}


@pytest.fixture(scope="module")
def plan() -> PrivacyPlan:
    return make_plan(
        epsilon=7.31,
        delta=1e-5,
        clip_norm=0.5,
        records=1000,
        batch=100,
        steps=12,
        reserve_steps=2,
        statistics_noise=12.0,
        unit="patient",
    )


def make_run(root: Path, plan: PrivacyPlan, *, claim: bool = True, charges: int = 14) -> Config:
    """A finished run: a ledger with two attempts, a model directory, samples, private canaries."""
    run = RunDir(root).create()
    genesis = {**plan.facts(), "parameters": 40, "claim": claim}
    with PrivacyLedger.open(run.ledger, genesis) as ledger:
        ledger.open_attempt({"data": COMMITMENT}, workers=1)
        ledger.charge(plan.statistics_events[0], "statistics")
        for step in range(charges - 12):
            ledger.charge(plan.step_event, "step", step)
        ledger.open_attempt({"data": "another"}, workers=1)
        for step in range(12):
            ledger.charge(plan.step_event, "step", step)
        spent, head = ledger.spent(), ledger.head
    write_model(run, plan, claim=claim, spent=spent if claim else None, head=list(head))
    write_samples(run)
    for name in ("evaluation.json", f"{CANARY}.txt"):
        (run.private / name).write_text(json.dumps({"accuracy": CANARY, "records found": 98765432}))
    return parse_config({**SETTINGS, "run": {"dir": str(root), "device": "cpu"}})


def write_model(
    run: RunDir, plan: PrivacyPlan, *, claim: bool, spent: float | None, head: list
) -> None:
    weights = run.released_model / "unet" / "weights.safetensors"
    weights.parent.mkdir(parents=True, exist_ok=True)
    weights.write_bytes(b"weights")
    facts = {("epsilon_budget" if n == "epsilon" else n): v for n, v in plan.facts().items()}
    facts |= {
        "epsilon": spent,
        "claim": claim,
        "unsafe": [] if claim else ["run.unsafe_test_key"],
        "steps_done": 12,
        "trainable": "transformer",
        "parameters": 40,
        "parameters_all": 90,
        "classes": ["<b>zero</b>", "one"],
        "ledger_head": head,
        "software": {"torch": "2.0"},
    }
    config = {**SETTINGS, "model": {"init": "/home/someone/models/x", "heads": 4}}
    parents = {"private latents (commitment)": COMMITMENT, "public model": "ab" * 32}
    files = describe_files(run.release, ["model/unet/weights.safetensors"])
    Manifest("model", facts, files, config, parents).write(run.release)


def write_samples(run: RunDir, *, of: bytes = b"weights") -> None:
    folder = run.release / "samples"
    folder.mkdir(exist_ok=True)
    images = np.random.default_rng(0).integers(0, 256, (6, 1, 8, 8), dtype=np.uint8)
    (folder / "samples.png").write_bytes(
        class_grid_png(images, np.arange(6) % 2, classes=2, columns=3)
    )
    part = run.root / "described"
    (part / "unet").mkdir(parents=True, exist_ok=True)
    (part / "unet" / "weights.safetensors").write_bytes(of)
    model = Manifest("model", {}, describe_files(part, ["unet/weights.safetensors"])).digest
    facts = {"images": 6, "images_per_class": [3, 3], "classes": ["<b>zero</b>", "one"]}
    settings = {"sample": {"steps": 5, "eta": 0.0, "guidance_scale": 1.5, "seed": 0}}
    files = describe_files(folder, ["samples.png"])
    Manifest("samples", facts, files, settings, {"model": model}).write(folder)


def page_of(config: Config) -> str:
    report(config, solo_worker())
    return (Path(config.run.dir) / "release" / "report.html").read_text()


def test_the_page_states_the_guarantee_that_the_ledger_proves(tmp_path, plan):
    page = page_of(make_run(tmp_path, plan))
    ledger = read_ledger(tmp_path / "private" / "ledger.jsonl")
    delta = plan.delta - plan.overflow_delta
    printed = [float(text) for text in re.findall(r"<b>&epsilon; = ([\d.]+)</b>", page)]
    replace_one = epsilon(ledger.events, delta, relation="replace_one")
    for found, computed in zip(printed, (ledger.epsilon, replace_one), strict=True):
        assert computed <= found < computed + 1e-3 + 1e-9  # rounded up, never down
    assert replace_one > ledger.epsilon
    for text in ("patient", "10⁻⁵", "add or remove", "14", ledger.head[1], COMMITMENT, "ab" * 32):
        assert text in page
    assert "repeated or lost" in page and "signature" in page and "ChaCha20" in page


def test_the_page_is_self_contained_escaped_and_without_paths(tmp_path, plan):
    page = page_of(make_run(tmp_path, plan))
    bare = re.sub(r'"data:image/png;base64,[^"]*"', '""', page)
    assert not re.search(r"https?:|<script|<link|@import|url\((?!#)", bare)
    assert not re.findall(r'(?:src|href)="(?!["#]|data:)', bare)
    assert "&lt;b&gt;zero" in page and "<b>zero" not in page
    assert str(tmp_path) not in page and "/home/someone" not in page


def test_nothing_private_reaches_the_page(tmp_path, plan):
    page = page_of(make_run(tmp_path, plan))
    key = RunDir(tmp_path).run_key().hex()
    page = page_of(parse_config({**SETTINGS, "run": {"dir": str(tmp_path)}}))
    for secret in (CANARY, "98765432", key, "evaluation.json"):
        assert secret not in page


def test_a_run_without_a_claim_gets_a_banner_and_no_epsilon_anywhere(tmp_path, plan):
    page = page_of(make_run(tmp_path, plan, claim=False))
    assert "NO PRIVACY CLAIM" in page and "run.unsafe_test_key" in page
    bare = re.sub(r'"data:image/png;base64,[^"]*"|<style>.*?</style>', "", page, flags=re.DOTALL)
    for word in ("ε", "epsilon", "δ", "delta", "7.31", "signature", str(plan.noise_multiplier)):
        assert word not in bare
    assert not Manifest.read(tmp_path / "release" / "report", "report").facts["claim"]


def test_an_equal_run_leaves_the_page_and_a_changed_one_makes_it_anew(tmp_path, plan):
    config = make_run(tmp_path, plan, charges=12)
    first = report(config, solo_worker())
    page = tmp_path / "release" / "report.html"
    stamp = page.stat().st_mtime_ns
    assert report(config, solo_worker()).digest == first.digest
    assert page.stat().st_mtime_ns == stamp
    genesis = {**plan.facts(), "parameters": 40, "claim": True}
    with PrivacyLedger.open(tmp_path / "private" / "ledger.jsonl", genesis) as ledger:
        ledger.open_attempt({"data": "a third"}, workers=1)
        ledger.charge(plan.step_event, "step", 0)
    before = page.read_text()
    assert report(config, solo_worker()).digest != first.digest
    assert page.read_text() != before
    page.write_text("something else")
    assert "Privacy report" in page_of(config)


def test_a_ledger_that_is_not_the_whole_ledger_of_the_release_is_refused(tmp_path, plan):
    config = make_run(tmp_path, plan)
    path = tmp_path / "private" / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-3]))
    with pytest.raises(PrivacyError, match="not the whole ledger"):
        report(config, solo_worker())
    path.unlink()
    genesis = {**plan.facts(), "parameters": 40, "claim": True}
    PrivacyLedger.open(path, genesis).close()  # of another run with the same plan
    with pytest.raises(PrivacyError, match="not the whole ledger"):
        report(config, solo_worker())
    path.write_bytes(b"".join(lines).replace(b'"count":1', b'"count":2', 1))
    with pytest.raises(PrivacyError, match="line"):
        report(config, solo_worker())
    assert not (tmp_path / "release" / "report.html").exists()


def test_a_release_that_says_another_plan_than_its_ledger_is_refused(tmp_path, plan):
    config = make_run(tmp_path, plan)
    found = Manifest.read(tmp_path / "release", "model")
    for name, wrong in (("telemetry_share", 0.02), ("noise_multiplier", 9.0)):
        facts = {**found.facts, name: wrong}
        Manifest("model", facts, found.files, found.config, found.parents).write(
            tmp_path / "release"
        )
        with pytest.raises(PrivacyError, match=f"another {name} than the release"):
            report(config, solo_worker())


def test_released_files_that_differ_from_their_manifest_are_refused(tmp_path, plan):
    config = make_run(tmp_path, plan)
    (tmp_path / "release" / "model" / "unet" / "weights.safetensors").write_bytes(b"Weights")
    with pytest.raises(DataError, match=r"weights\.safetensors is damaged"):
        report(config, solo_worker())


def test_samples_of_another_model_are_refused(tmp_path, plan):
    config = make_run(tmp_path, plan)
    write_samples(RunDir(tmp_path), of=b"private weights")
    with pytest.raises(DataError, match="not drawn from the released model"):
        report(config, solo_worker())


def test_a_manifest_without_a_fact_is_named_with_the_fact(tmp_path, plan):
    config = make_run(tmp_path, plan)
    found = Manifest.read(tmp_path / "release", "model")
    facts = {name: value for name, value in found.facts.items() if name != "clip_norm"}
    Manifest("model", facts, found.files, found.config, found.parents).write(tmp_path / "release")
    with pytest.raises(DataError, match="lacks 'clip_norm'"):
        report(config, solo_worker())


def test_without_a_model_or_samples_it_says_so_and_a_dry_run_reads_nothing(tmp_path, plan):
    empty = parse_config({"run": {"dir": str(tmp_path / "empty")}})
    with pytest.raises(DataError, match="missing"):
        report(empty, solo_worker())
    assert any("report.html" in line for line in describe(empty))
    config = make_run(tmp_path / "run", plan)
    (tmp_path / "run" / "release" / "samples" / "manifest.json").unlink()
    assert "Samples" not in page_of(config)


def test_pictures_are_reproducible_and_have_a_row_per_class():
    images = np.arange(6 * 3 * 8 * 8, dtype=np.uint32).astype(np.uint8).reshape(6, 3, 8, 8)
    assert grid_png(images, columns=2) == grid_png(images, columns=2)
    few = class_grid_png(images[:2], np.array([0, 2]), classes=3, columns=4)
    assert few.startswith(b"\x89PNG")
    curve = curve_svg(
        [0, 1, 2], [0.0, 1.0, 1.5], x_label="x", y_label="y", limit=2.0, limit_label="<&"
    )
    assert curve == curve_svg(
        [0, 1, 2], [0.0, 1.0, 1.5], x_label="x", y_label="y", limit=2.0, limit_label="<&"
    )
    assert curve.startswith("<svg") and "&lt;&amp;" in curve and "xmlns" not in curve
