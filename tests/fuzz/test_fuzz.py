"""Damaged and hostile inputs of every kind: refused in one line, or read as what they are.

``make fuzz`` tries many more. A fault names its seed and case: ``python -m tests.fuzz --kind KIND
--seed SEED --only CASE`` shows it again.
"""

from __future__ import annotations

import io
import json
import logging
import secrets
import signal

import numpy as np
import pytest

from dpldm_dist.config import Config
from dpldm_dist.data import latents, shards
from dpldm_dist.data import manifest as manifests
from dpldm_dist.errors import DataError, PrivacyError
from dpldm_dist.privacy import chain
from dpldm_dist.runtime import checkpoint
from tests.fuzz.kinds import KINDS
from tests.fuzz.trial import HANG, IDENTICAL, RAN_CODE, SILENT, TRACEBACK, UNCLEAR, run

SEEDS = ("a", "b", "c", secrets.token_hex(4))  # the last one is another one every time
CASES = 100  # of each kind and seed: 2,400 in all


@pytest.fixture(autouse=True)
def quiet():
    logging.disable()  # a checkpoint that is passed over is warned of, thousands of times
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("seed", SEEDS[:-1] + ("new",))
@pytest.mark.parametrize("name", KINDS)
def test_damage_is_refused_in_one_line_or_changes_nothing(name, seed, capsys):
    seed = SEEDS[-1] if seed == "new" else seed
    if seed == SEEDS[-1]:
        with capsys.disabled():
            print(f" seed {seed} ", end="")
    tally = run(KINDS[name], seed, range(CASES))
    assert tally.faults == []
    assert tally.controls >= 3 and tally.cases == CASES
    assert tally.outcomes[IDENTICAL] < 0.6 * CASES  # the damage is damage


# --- the harness itself: planted bugs of every outcome must be seen -----------------------------


def silent(kind: str) -> int:
    return run(KINDS[kind], "planted", range(150)).outcomes[SILENT]


def _raising(error):
    def bug(*_):
        raise error

    return bug


@pytest.mark.parametrize("kind", ["shards", "manifests"])
def test_files_whose_checksums_nobody_compares_are_seen(kind, monkeypatch):
    monkeypatch.setattr(manifests, "_require_digest", lambda *_: None)
    if kind == "manifests":  # the digest of the manifest itself
        monkeypatch.setattr(manifests, "canonical_json", lambda _: b"{}")
        monkeypatch.setattr(manifests.Manifest, "write", _write_plainly)
    assert silent(kind) > 3


def _write_plainly(manifest, folder, *, private=False):
    tree = {**manifest._body(), "sha256": manifest.digest}
    (folder / "manifest.json").write_text(json.dumps(tree))


def test_a_config_whose_texts_become_numbers_is_seen(monkeypatch):
    strictly = Config.model_validate_json
    monkeypatch.setattr(Config, "model_validate_json", lambda text, strict: strictly(text))
    assert silent("configs") > 3


def test_checkpoints_that_are_not_compared_with_their_manifest_are_seen(monkeypatch):
    monkeypatch.setattr(checkpoint, "_manifest", _manifest_without_digests)
    assert silent("checkpoints") > 3


def _manifest_without_digests(contents):
    return {"files": {name: {"bytes": len(content)} for name, content in contents.items()}}


def test_a_ledger_without_its_chain_of_hashes_is_seen(monkeypatch):
    def unchained(body, previous_hash):
        text, digest = chain.canonical(body), "0" * 64
        return b'{"body":' + text + b',"hash":"' + digest.encode() + b'"}\n', digest

    monkeypatch.setattr(chain, "_line", unchained)
    assert silent("ledgers") > 3


def test_an_array_that_is_unpickled_is_seen_by_what_it_does(monkeypatch):
    def trusting(payload, *, dtype, shape, name):
        try:
            return np.load(io.BytesIO(payload), allow_pickle=True).reshape(shape).astype(dtype)
        except Exception:
            raise DataError(f"{name} is damaged: make it again.") from None

    for reader in (shards, latents):
        monkeypatch.setattr(reader, "npy_array", trusting)
    assert run(KINDS["shards"], "planted", range(200)).outcomes[RAN_CODE] > 0


@pytest.mark.parametrize(
    ("bug", "outcome"),
    [
        (_raising(KeyError("labels")), TRACEBACK),
        (_raising(RecursionError()), TRACEBACK),
        (_raising(OSError("images-00000.tar: restore it")), TRACEBACK),
        (_raising(PrivacyError("images-00000.tar is damaged: restore it.")), UNCLEAR),
        (_raising(DataError("It is damaged: restore it.")), UNCLEAR),
        (lambda path: _raising(DataError(f"{path} is damaged."))(path), UNCLEAR),
        (lambda _: signal.pause(), HANG),
    ],
    ids=["KeyError", "RecursionError", "OSError", "class", "no name", "no remedy", "hang"],
)
def test_a_refusal_that_is_none_is_seen(bug, outcome, monkeypatch):
    def required(path, found, expected):
        if found != expected["sha256"]:
            bug(path)

    monkeypatch.setattr(manifests, "_require_digest", required)
    cases = range(8) if outcome == HANG else range(150)
    found = run(KINDS["shards"], "planted", cases, limit_s=1.0 if outcome == HANG else 30.0)
    assert found.outcomes[outcome] > 0


def test_an_input_that_is_never_accepted_is_seen(monkeypatch):
    monkeypatch.setattr(manifests, "_require_digest", _raising(DataError("damaged")))
    with pytest.raises(DataError):
        run(KINDS["shards"], "planted", range(1))
