"""All stages from the command line on a folder of images, as a user would give them."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dpldm_dist.cli import main
from dpldm_dist.data.manifest import Manifest
from dpldm_dist.runtime.rundir import RunDir
from tests.stages.tiny_run import TEST_KEY, latent_shards, public_model, released_weights, settings

ROOT = Path(__file__).parents[1]
STAGES = ("prepare", "encode", "pretrain", "finetune", "sample", "evaluate", "report")
CONFIG = """
[data]
size = 16
shard_records = 8
flips = true
public = {{ source = "{root}/public" }}
private = {{ source = "{root}/private" }}
heldout = {{ source = "{root}/heldout" }}
[autoencoder]
block_channels = [8, 8, 8]
norm_groups = 4
steps = 4
batch = 8
[model]
block_channels = [16, 16]
heads = 2
context_dim = 8
norm_groups = 4
[pretrain]
steps = 4
batch = 8
[privacy]
epsilon = 20.0
delta = 1e-3
clip_norm = 0.5
lanes = 2
[finetune]
steps = 3
batch = 12
statistics_noise = 20.0
warmup_steps = 2
warmup_batch = 8
[sample]
count = 6
steps = 3
formats = ["png", "npz", "webdataset"]
[evaluate]
classifier_steps = 3
classifier_width = 4
[run]
dir = "{root}/run"
device = "cpu"
microbatch = 4
"""


def draw_images(folder: Path, classes: list[str], each: int, *, seed: int) -> None:
    """Noise of one texture per class; the file names are canaries."""
    generator = np.random.default_rng(seed)
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(each):
            pixels = generator.integers(0, 256, (16, 16), dtype=np.uint8) // (number + 1)
            Image.fromarray(pixels).save(folder / name / f"canary-{folder.name}-{name}-{index}.png")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    draw_images(folder / "public", ["oak", "fir"], 12, seed=0)
    draw_images(folder / "private", ["benign", "malign"], 14, seed=1)
    draw_images(folder / "heldout", ["benign", "malign"], 8, seed=2)
    (folder / "my.toml").write_text(CONFIG.format(root=folder))
    return folder


def dpldm(root: Path, stage: str, *more: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "dpldm_dist", stage, "--config", str(root / "my.toml"), *more],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
        umask=0,  # the least careful user: what is closed is closed by us
    )  # fmt: skip


def dpldm_here(root: Path, stage: str, *more: str) -> int:
    """The same in this process, which has loaded the libraries: its exit code."""
    return main([stage, "--config", str(root / "my.toml"), *more])


@pytest.fixture(scope="module")
def key():
    """The run's key, known to the tests: the run itself destroys its copy at the end."""
    return secrets.token_bytes(32)


@pytest.fixture(scope="module")
def shown(root, key):
    """What each stage printed; all must succeed."""
    found = {}
    for stage in STAGES:
        if stage == "finetune":
            path = RunDir(root / "run").key
            path.touch(mode=0o600)
            path.write_bytes(key)
        done = dpldm(root, stage)
        assert done.returncode == 0, (stage, done.stderr)
        found[stage] = done.stdout + done.stderr
    return found


def test_every_stage_leaves_what_the_readme_names(root, shown):
    run = root / "run"
    for name in (
        "release/samples.png",
        "release/report.html",
        "release/model/model_index.json",
        "release/manifest.json",
        "release/samples/samples.npz",
        "private/ledger.jsonl",
        "private/evaluation.html",
    ):
        assert (run / name).is_file(), name
    assert Manifest.read(run / "release", "model").facts["classes"] == ["benign", "malign"]
    assert len(list((run / "release" / "samples" / "png").rglob("*.png"))) == 6


def test_each_stage_given_again_does_nothing(root, shown):
    run = root / "run"
    kept = (
        "release/manifest.json",
        "release/report.html",
        "private/ledger.jsonl",
        "public/model/manifest.json",
    )
    before = {name: (run / name).read_bytes() for name in kept}
    for stage in STAGES:
        assert dpldm_here(root, stage) == 0, stage
    assert {name: (run / name).read_bytes() for name in kept} == before


def test_no_private_name_or_pixel_leaves_the_private_folder(root, shown, key):
    run = RunDir(root / "run")
    assert not run.key.exists()  # destroyed with the seal of the ledger
    canaries = [
        b"canary-private",
        b"canary-heldout",
        key,
        key.hex().encode(),
    ]
    private_images = [np.asarray(Image.open(path)) for path in (root / "private").rglob("*.png")]
    canaries += [image[4:6].tobytes() for image in private_images]
    for folder in ("images", "latents", "heldout-images", "heldout-latents"):
        manifest = run.private / folder / "manifest.json"
        digests = [entry["sha256"] for entry in json.loads(manifest.read_text())["files"].values()]
        canaries += [digest.encode() for digest in digests]
        canaries.append(Manifest.read(run.private / folder).digest.encode())
    outside = [p for p in run.root.rglob("*") if p.is_file() and run.private not in p.parents]
    texts = {path: path.read_bytes() for path in outside}
    texts |= {stage: text.encode() for stage, text in shown.items()}
    for where, content in texts.items():
        for canary in canaries:
            assert canary not in content, where


def test_nothing_below_the_private_folder_is_open_to_other_users(root, shown):
    private = root / "run" / "private"
    listed = subprocess.run(
        ["find", str(private), "-perm", "/077"], capture_output=True, text=True, check=True
    )
    assert listed.stdout == ""
    everything = [private, *private.rglob("*")]
    assert len(everything) > 15  # there is something to close
    for path in everything:
        assert path.stat().st_mode & 0o777 in ((0o600, 0o700) if path.is_dir() else (0o600,)), path


@pytest.mark.parametrize("stage", [*STAGES, "plan", "check", "demo"])
def test_a_dry_run_says_what_it_would_do_and_touches_nothing(root, stage, tmp_path, capsys):
    target = tmp_path / "nowhere"
    assert dpldm_here(root, stage, "--dry-run", "--set", f"run.dir={target}") == 0
    assert capsys.readouterr().out.strip()
    assert not target.exists()


@pytest.mark.parametrize(
    ("stage", "change", "code", "said"),
    [
        ("sample", "sample.step=5", 2, "Did you mean 'steps'"),
        ("sample", "sample.steps=5", 6, "sample.steps = 3, this config says 5"),
        ("prepare", "data.size=32", 6, "size"),
        ("finetune", "privacy.epsilon=9", 6, "privacy.epsilon = 20.0, this config says 9.0"),
        ("finetune", "privacy.noise_multiplier=0.1", 6, "noise_multiplier"),
        ("prepare", "data.private.source=/no/such/folder", 3, "/no/such/folder"),
    ],
)
def test_a_wrong_request_is_one_line_with_the_exit_code_of_its_kind(
    root, shown, stage, change, code, said, capsys
):
    more = [] if code != 3 else ["--set", f"run.dir={root / 'elsewhere'}"]
    assert dpldm_here(root, stage, "--set", change, *more) == code
    shown_now = capsys.readouterr().err
    assert said in shown_now.strip().splitlines()[-1] and "Traceback" not in shown_now


def test_a_busy_run_directory_is_refused_with_exit_code_6(root, shown, capsys):
    with RunDir(root / "run").lock():
        assert dpldm_here(root, "sample") == 6
    said = capsys.readouterr().err
    assert "busy" in said and str(os.getpid()) in said


def test_a_damaged_latent_shard_stops_fine_tuning_with_its_name(root, shown, tmp_path):
    folder = root / "run" / "private" / "latents"
    path = sorted(folder.glob("*.tar"))[0]
    original = path.read_bytes()
    path.write_bytes(original[:-600] + bytes([original[-600] ^ 1]) + original[-599:])
    try:
        done = dpldm(
            root, "finetune", "--set", f"run.dir={tmp_path}",
            "--set", f"data.private.latents={folder}", "--set", f"model.init={root / 'run/public/model'}",
        )  # fmt: skip
    finally:
        path.write_bytes(original)
    assert done.returncode == 3 and path.name in done.stderr


def test_ray_workers_release_the_same_bits_as_one_local_process(tmp_path):
    public_model(tmp_path / "model")
    latent_shards(tmp_path / "latents")
    for name, changes in {"local": {}, "ray": {"launcher": "ray", "workers": 2}}.items():
        run = {"dir": str(tmp_path / name), "unsafe_test_key": TEST_KEY, **changes}
        config = settings(tmp_path, name, run=run, finetune={"steps": 4})
        path = tmp_path / f"{name}.json"
        path.write_text(config.model_dump_json())
        done = subprocess.run(
            [sys.executable, "-m", "tests.stages.crashing_finetune", str(path)],
            cwd=ROOT, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    local, ray = released_weights(tmp_path, "local"), released_weights(tmp_path, "ray")
    assert all(torch.equal(value, ray[name]) for name, value in local.items())


def test_the_demo_asks_for_its_config(capsys):
    assert main(["demo"]) == 2
    assert "configs/demo.toml" in capsys.readouterr().err
