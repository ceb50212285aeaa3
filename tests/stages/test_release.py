"""What is published holds nothing that is only for the run: key, nonce, optimizer, private data."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dpldm_dist.data.latents import LatentShards
from dpldm_dist.privacy.randomness import derive_key
from dpldm_dist.runtime.checkpoint import Checkpoints
from dpldm_dist.runtime.rundir import RunDir
from dpldm_dist.runtime.worker import solo_worker
from dpldm_dist.stages.finetune import finetune
from tests.stages.tiny_run import SHARDS, latent_shards, public_model, settings

WINDOW = 16  # bytes of a tensor that are looked for
Canaries = dict[str, list[bytes]]


@dataclass(frozen=True)
class Finished:
    """A run on tiny data, and the key that it had: it is destroyed at the end."""

    dir: RunDir
    key: bytes


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Finished:
    root = tmp_path_factory.mktemp("release")
    public_model(root / "model")
    latent_shards(root / "latents")
    config = settings(root, finetune={"steps": 4})
    directory = RunDir(config.run.dir).create()
    key = directory.run_key()
    finetune(config, solo_worker())
    return Finished(directory, key)


@pytest.fixture(scope="module")
def canaries(run) -> Canaries:
    """What must not be published, in every form in which it could be."""
    opened = [json.loads(line) for line in run.dir.ledger.read_text().splitlines()]
    nonces = [bytes.fromhex(text) for text in _values_of("nonce", opened)]
    attempts = [derive_key(run.key, f"attempt {nonce.hex()}", 1) for nonce in nonces]
    saved = Checkpoints(run.dir.checkpoints, keep=2).latest().tensors
    optimizer = [t for name, t in saved.items() if name.startswith("optimizer/") and t.dim()]
    shards = LatentShards(run.dir.root.parent / "latents")
    moments = [shards.records(n, np.arange(shards.count(n))).moments for n in range(SHARDS)]
    assert nonces and len(optimizer) > 10
    return {
        "key": [form for key in (run.key, *attempts) for form in _forms(key)],
        "nonce": [form for nonce in nonces for form in _forms(nonce)],
        "optimizer state": [window for t in optimizer for window in _windows(t.numpy())],
        "latents": [
            window
            for shard in moments
            for record in shard
            for kind in (np.float16, np.float32, np.float64)
            for window in _windows(record.astype(kind))
        ],
        "a latent in words": [repr(float(record.flat[0])).encode() for record in moments[0]],
    }


def _values_of(name: str, tree: object) -> list[str]:
    """All texts under ``name`` at any depth."""
    if isinstance(tree, dict):
        own = [tree[name]] if isinstance(tree.get(name), str) else []
        return own + [text for part in tree.values() for text in _values_of(name, part)]
    if isinstance(tree, list):
        return [text for part in tree for text in _values_of(name, part)]
    return []


def _forms(secret: bytes) -> list[bytes]:
    hexadecimal = secret.hex()
    return [
        secret,
        hexadecimal.encode(),
        hexadecimal.upper().encode(),
        base64.b64encode(secret)[:-4],
        base64.urlsafe_b64encode(secret)[:-4],
    ]


def _windows(array: np.ndarray) -> list[bytes]:
    """A few pieces of the bytes of an array, not of zeros."""
    raw = np.ascontiguousarray(array).tobytes()
    starts = range(0, max(1, len(raw) - WINDOW), max(WINDOW, len(raw) // 4 // WINDOW * WINDOW))
    pieces = [raw[start : start + WINDOW] for start in starts]
    return [piece for piece in pieces if len(piece) == WINDOW and len(set(piece)) > 4]


def found_in(folder: Path, canaries: Canaries) -> set[str]:
    """Kinds of canaries that some file below ``folder``, or its name, holds."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    contents = [path.read_bytes() for path in files] + [str(path).encode() for path in files]
    return {
        kind
        for kind, secrets in canaries.items()
        if any(secret in content for content in contents for secret in secrets)
    }


def test_a_release_holds_no_key_no_nonce_no_optimizer_state_and_no_latent(run, canaries):
    assert all(len(secrets) > 3 for secrets in canaries.values())
    assert sum(path.is_file() for path in run.dir.release.rglob("*")) > 8
    assert found_in(run.dir.release, canaries) == set()


def test_no_file_of_a_finished_run_holds_its_key_also_not_a_private_one(run, canaries):
    assert found_in(run.dir.root, {"key": canaries["key"]}) == set()


@pytest.mark.parametrize("kind", ["key", "nonce", "optimizer state", "latents", "words"])
def test_a_leak_of_each_kind_is_found(run, canaries, tmp_path, kind):
    """Planted leaks: what a careless export would write."""
    saved = Checkpoints(run.dir.checkpoints, keep=2).latest().tensors
    shards = LatentShards(run.dir.root.parent / "latents")
    if kind == "key":
        (tmp_path / "manifest.json").write_text(json.dumps({"key": run.key.hex()}))
    elif kind == "nonce":
        (tmp_path / "attempts.jsonl").write_bytes(run.dir.ledger.read_bytes())
    elif kind == "optimizer state":
        state = {n: t for n, t in saved.items() if n.startswith("optimizer/") and t.dim()}
        name = max(state, key=lambda n: state[n].numel())
        save_file({"weight": torch.zeros(5), "state": state[name]}, tmp_path / "model.safetensors")
    elif kind == "latents":
        images = shards.records(2, np.arange(3)).moments.astype(np.float64)
        np.savez(tmp_path / "samples.npz", images=images)
    else:
        kind = "a latent in words"
        number = float(shards.records(0, np.arange(3)).moments[2].flat[0])
        (tmp_path / "report.html").write_text(f"<td>{number!r}</td>")
    assert found_in(tmp_path, canaries) == {kind}
