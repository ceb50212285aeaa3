"""The kinds of input: image and latent shards, manifests, configs, checkpoints, ledgers, sources.

Sources (tars, NPZ, IDX, CSV and pictures of the user) carry no checksum, so whatever can be read is
what they say; they must still never hang, crash or run code.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import tomllib
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel

from dpldm_dist.config import Config, DatasetConfig, load_config
from dpldm_dist.data.images import open_source
from dpldm_dist.data.latents import (
    LatentRecord,
    LatentShards,
    stream_latents,
    write_latent_shard,
    write_latents_manifest,
)
from dpldm_dist.data.manifest import MANIFEST, Manifest, describe_files, finished_manifest
from dpldm_dist.data.npy import npy_bytes
from dpldm_dist.data.records import CONTENT, content_digests
from dpldm_dist.data.shards import ImageRecord, ImageShards, write_image_shard
from dpldm_dist.errors import ConfigError, DataError, PrivacyError, RunError
from dpldm_dist.privacy.accounting import GaussianEvent
from dpldm_dist.privacy.dataset_ledger import Request, Reservation, read_dataset_ledger
from dpldm_dist.privacy.ledger import PrivacyLedger, read_ledger
from dpldm_dist.runtime.checkpoint import Checkpoints
from tests.fuzz import damage
from tests.fuzz.trial import Damage, Kind, Reading

SIZE = 16  # pixels of an image
CLASSES = ("cat", "dog", "yak")


def _chosen(dice: Random, *ways: tuple[float, Callable[[], Damage]]) -> Damage:
    """One of ``ways``, each as likely as its weight says."""
    weights, actions = zip(*ways, strict=True)
    return dice.choices(actions, weights)[0]()


def _rewritten(path: Path, change: tuple[bytes, str]) -> str:
    content, what = change
    path.write_bytes(content)
    return what


# --- image and latent shards, and their manifests -----------------------------------------------


def _build_data(folder: Path) -> None:
    images, latents = folder / "images", folder / "latents"
    for place in (images, latents):
        place.mkdir(mode=0o700)
    _write_images(images)
    _write_latents(latents)


def _write_images(folder: Path) -> None:
    generator = np.random.default_rng(0)
    shards, pixels = [], []
    for shard in range(2):
        records = []
        for place in range(3):
            count = 1 + place % 2
            images = generator.integers(0, 256, (count, SIZE, SIZE, 1), dtype=np.uint8)
            labels = tuple(generator.integers(0, len(CLASSES), count).tolist())
            records.append(ImageRecord(f"s{shard}r{place}", images, labels, ("a b",) * count))
            pixels.extend(images)
        name = f"images-{shard:05d}.tar"
        write_image_shard(folder / name, records, private=True)
        shards.append({"file": name, "records": len(records)})
    digests = sorted(hashlib.blake2b(p.tobytes(), digest_size=16).digest() for p in pixels)
    table = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16)
    (folder / CONTENT).write_bytes(npy_bytes(table))
    facts = {
        "records": 6, "images": len(pixels), "images_per_record": 2, "classes": list(CLASSES),
        "size": SIZE, "channels": 1, "captions": True, "shards": shards, "duplicates": 0,
    }  # fmt: skip
    files = describe_files(folder, [shard["file"] for shard in shards] + [CONTENT])
    settings = {"data": {"size": SIZE, "crop": "center"}}
    Manifest("images", facts, files, settings, {"source": "0" * 64}).write(folder, private=True)


def _write_latents(folder: Path) -> None:
    generator = np.random.default_rng(1)
    entries = []
    for shard in range(2):
        records = []
        for place in range(3):
            count = 1 + place % 2
            moments = generator.standard_normal((count, 2, 4, 4, 4))
            labels = generator.integers(0, len(CLASSES), count).tolist()
            context = generator.standard_normal((count, 2, 3))
            records.append(LatentRecord(f"s{shard}r{place}", moments, labels, context))
        entries.append(
            write_latent_shard(
                folder,
                f"latents-{shard:05d}.tar",
                records,
                images_per_record=2,
                source="made up",
                private=True,
            )
        )
    write_latents_manifest(folder, entries, classes=CLASSES, config={}, parents={}, private=True)


def _read_data(folder: Path) -> Reading:
    """Everything that the stages take from the two folders, in one value."""
    images, latents = ImageShards(folder / "images"), LatentShards(folder / "latents")
    records = [record for shard in range(len(images.files)) for record in images.records(shard)]
    pixels = [(r.key, r.images.tobytes(), r.images.shape, r.labels, r.captions) for r in records]
    moments = []
    for shard, count in enumerate(latents.shard_records):
        read = latents.records(shard, np.arange(count))
        context = None if read.context is None else read.context.tobytes()
        arrays = (read.moments, read.labels, read.images)
        moments.append((read.moments.shape, context, *(array.tobytes() for array in arrays)))
    streamed = stream_latents(folder / "latents", seed=0, rank=0, world_size=1)
    first = next(streamed)
    return Reading(
        (pixels, moments, sorted(content_digests(folder / "images")), first[0].tobytes(), first[1])
    )


def _damaged_shards(folder: Path, dice: Random, marker: Path) -> Damage:
    place = folder / dice.choice(("images", "latents"))
    files = sorted(path for path in place.iterdir() if path.name != MANIFEST)
    path = dice.choice(files)
    tar = dice.choice([path for path in files if path.suffix == ".tar"])
    arrays = [path for path in files if path.suffix == ".npy"]

    def accident() -> Damage:
        return Damage(_rewritten(path, damage.damaged_bytes(path.read_bytes(), dice)), (path.name,))

    def forgery() -> Damage:
        found = accident()
        _vouch(place)
        return Damage(f"{found.what}, with right checksums", _names(place), vouched=True)

    def malformed(vouched: bool) -> Damage:
        if dice.random() < 0.7:
            what = _rewritten(tar, damage.malformed_tar(tar.read_bytes(), dice, marker))
        else:
            array = dice.choice(arrays)
            array.write_bytes(damage.malformed_npy(array.read_bytes(), dice, marker))
            what = f"{array.name} of another form"
        if not vouched:
            return Damage(what, _names(place))
        _vouch(place)
        return Damage(f"{what}, with right checksums", _names(place), True, malformed=True)

    def another() -> Damage:
        return Damage(_rewritten(tar, damage.other_content(tar.read_bytes(), dice)), (tar.name,))

    def moved() -> Damage:
        if dice.random() < 0.4:
            other = dice.choice([other for other in files if other != path])
            return Damage(damage.swapped_files(path, other), (path.name, other.name))
        return Damage(damage.replaced_file(path, dice), (path.name,))

    return _chosen(
        dice,
        (4, accident),
        (2, another),
        (1, forgery),
        (1, lambda: malformed(vouched=False)),
        (4, lambda: malformed(vouched=True)),
        (2, moved),
        (0.3, lambda: Damage(damage.extra_file(place, dice, marker), _names(place))),
    )


def _damaged_manifest(folder: Path, dice: Random, marker: Path) -> Damage:
    place = folder / dice.choice(("images", "latents"))
    path = place / MANIFEST
    whole = path.read_bytes()

    def text() -> Damage:
        change = dice.choice((damage.damaged_bytes, damage.damaged_bytes, damage.damaged_lines))
        return Damage(_rewritten(path, change(whole, dice)), _names(place))

    def tree(vouched: bool) -> Damage:
        found, what = damage.confused_tree(json.loads(whole), dice)
        path.write_text(json.dumps(_with_own_digest(found) if vouched else found))
        return Damage(what, _names(place), vouched)

    def contradiction() -> Damage:
        found = json.loads(whole)
        what = _contradict(found, dice)
        path.write_text(json.dumps(_with_own_digest(found)))
        return Damage(f"{what}, with a right checksum", _names(place), True, malformed=True)

    def twice() -> Damage:
        """A key that stands twice: readers differ in which one counts."""
        tree, key = json.loads(whole), dice.choice(("kind", "facts", "files", "sha256"))
        first = json.dumps({key: damage.odd_value(tree[key], dice)})[:-1]
        path.write_text(first + "," + whole.decode()[1:])
        return Damage(f"{key!r} twice", _names(place))

    def replaced() -> Damage:
        if dice.random() < 0.3:
            other = folder / ("latents" if place.name == "images" else "images") / MANIFEST
            path.write_bytes(other.read_bytes())
            return Damage("that of the other folder", _names(place))
        return Damage(damage.replaced_file(path, dice), _names(place))

    def bomb() -> Damage:
        path.write_bytes(damage.json_bomb(dice))
        return Damage("a bomb", _names(place))

    return _chosen(
        dice,
        (4, text),
        (3, lambda: tree(vouched=False)),
        (5, lambda: tree(vouched=True)),
        (2, contradiction),
        (1, twice),
        (1, replaced),
        (0.5, bomb),
    )


def _contradict(tree: dict[str, Any], dice: Random) -> str:
    """Make a manifest say of its shards what is not so."""
    facts, files = tree["facts"], tree["files"]
    shard = dice.choice(facts["shards"])
    ways: list[tuple[str, Callable[[], Any]]] = [
        ("a record more", lambda: shard.update(records=shard["records"] + 1)),
        ("a record less", lambda: shard.update(records=shard["records"] - 1)),
        ("a shard twice", lambda: facts["shards"].append(shard)),
        ("a file out of the folder", lambda: shard.update(file="../evil.tar")),
        ("a listed file out of the folder", lambda: files.update({"../evil": {}})),
        ("a file with a name of two lines", lambda: files.update({"a\nb": files[shard["file"]]})),
        ("no file of a shard", lambda: files.pop(shard["file"])),
        ("another size of a file", lambda: files[shard["file"]].update(bytes=1)),
        ("another kind", lambda: tree.update(kind="model")),
        ("no class", lambda: facts.update(classes=[])),
        ("classes that are no texts", lambda: facts.update(classes=[0, 1, 2])),
    ]
    key, value = dice.choice(
        (("size", SIZE + 1), ("channels", 3), ("images_per_record", 1))
        if tree["kind"] == "images"
        else (("latent_shape", [2, 4, 3]), ("views", 3), ("images_per_record", 1))
    )
    ways.append((f"another {key}", lambda: facts.update({key: value})))
    ways.append((f"a hundred million million {key}", lambda: facts.update({key: 10**14})))
    what, change = dice.choice(ways)
    change()
    return what


def _vouch(folder: Path) -> None:
    """Make the manifest fit what the files are now: a forger's work, not an accident's."""
    tree = json.loads((folder / MANIFEST).read_bytes())
    for name in tree["files"]:
        content = (folder / name).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        tree["files"][name] = {"bytes": len(content), "sha256": digest}
    (folder / MANIFEST).write_text(json.dumps(_with_own_digest(tree)))


def _with_own_digest(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    body = {name: value for name, value in tree.items() if name != "sha256"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return {**body, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _names(folder: Path) -> tuple[str, ...]:
    """Any file of the folder, or the folder: where several can notice, the first one says so."""
    return (str(folder), *(path.name for path in folder.iterdir()))


def _read_manifests(folder: Path) -> Reading:
    """The manifests themselves, and all that they describe."""
    images, latents = folder / "images", folder / "latents"
    settings = {"data": {"size": SIZE, "crop": "center"}}
    finished = finished_manifest(images, "images", settings=settings, parents={"source": "0" * 64})
    if finished is None:  # as good as not there: the stage would make it again
        finished = Manifest.read(images, "images")
    parts = [(m.facts, m.files, m.config) for m in (finished, Manifest.read(latents, "latents"))]
    return Reading((parts, _read_data(folder).meaning))


# --- configs --------------------------------------------------------------------------------------

_CONFIG = """\
# a comment
[data]
size = 64
channels = 3
flips = true
crop = "center"
public = { source = "photos/public", limit = 5000 }
private = { source = "photos/patients.csv", classes = ["benign", "malign"] }

[autoencoder]
block_channels = [16, 32, 64]
kl_weight = 1e-3

[model]
beta_start = 0.00085
beta_end = 0.012

[privacy]
epsilon = 5.0
delta = 1e-6
clip_norm = 1.0
noise_multiplier = 1.5
records = 20000
lanes = 4

[finetune]
steps = 1000
batch = 2048
betas = [0.9, 0.99]
embedder_grad_scale = "auto"

[sample]
formats = ["png", "npz"]
class_weights = [0.25, 0.75]

[evaluate.compare]
other = "runs/other/samples"

[run]
dir = "runs/patients"
workers = 4
timeout_s = 600.0
"""


def _build_config(folder: Path) -> None:
    (folder / "my.toml").write_text(_CONFIG)


def _read_config(folder: Path) -> Reading:
    return Reading(load_config(folder / "my.toml"))


def _says_the_same(folder: Path, found: Config, sound: Config) -> bool:
    """Whether ``found`` is what the file says, no more and no less: read here once more, plainly."""
    tree = tomllib.loads((folder / "my.toml").read_text())
    return _agrees(tree, found, _unset(Config, tree)) and _in_range(found)


def _unset(kind: type[BaseModel], tree: dict[str, Any]) -> dict[str, Any]:
    """The defaults of all fields that ``tree`` does not name."""
    fields = kind.model_fields.items()
    return {
        name: f.get_default(call_default_factory=True) for name, f in fields if name not in tree
    }


def _agrees(said: Any, found: Any, unset: dict[str, Any] | None = None) -> bool:
    if isinstance(found, BaseModel):
        if not isinstance(said, dict) or not said.keys() <= type(found).model_fields.keys():
            return False
        unset = _unset(type(found), said) if unset is None else unset
        return all(getattr(found, name) == value for name, value in unset.items()) and all(
            _agrees(value, getattr(found, name)) for name, value in said.items()
        )
    if isinstance(found, dict):
        return isinstance(said, dict) and said.keys() == found.keys() and all(
            _agrees(said[name], found[name]) for name in said
        )  # fmt: skip
    if isinstance(found, tuple):
        return isinstance(said, list) and len(said) == len(found) and all(map(_agrees, said, found))
    if isinstance(found, Path):
        return isinstance(said, str) and Path(said) == found
    if isinstance(found, float):
        return type(said) in (int, float) and said == found and math.isfinite(found)
    return type(said) is type(found) and said == found


def _in_range(config: Config) -> bool:
    """The numbers that decide privacy, checked without the rules of the config itself."""
    privacy, finetune, run = config.privacy, config.finetune, config.run
    right = 8 <= config.data.size <= 2048 and config.data.channels in (1, 3)
    if privacy is not None:
        right &= privacy.epsilon > 0 and 0 < privacy.delta < 1 and privacy.clip_norm > 0
        right &= privacy.lanes >= 1 and privacy.reserve_steps >= 0
        right &= privacy.noise_multiplier is None or privacy.noise_multiplier > 0
        right &= privacy.records is None or privacy.records >= 1
    if finetune is not None:
        right &= min(finetune.steps, finetune.batch, finetune.draws) >= 1
    return right and run.timeout_s > 0 and run.microbatch >= 2


def _damaged_config(folder: Path, dice: Random, marker: Path) -> Damage:
    path = folder / "my.toml"
    whole = path.read_bytes()
    touched = (path.name,)

    def text() -> Damage:
        change = dice.choice((damage.damaged_bytes, damage.damaged_lines, damage.damaged_lines))
        return Damage(_rewritten(path, change(whole, dice)), touched)

    def tree() -> Damage:
        found, what = damage.confused_tree(tomllib.loads(whole.decode()), dice)
        path.write_text(_toml(found))
        return Damage(what, touched)

    def line() -> Damage:
        lines = whole.decode().splitlines()
        at = dice.choice([n for n, line in enumerate(lines) if " = " in line])
        value = dice.choice(_HOSTILE_TOML)
        lines[at] = f"{lines[at].partition(' = ')[0]} = {value}"
        path.write_text("\n".join(lines) + "\n")
        return Damage(lines[at][:80], touched)

    def bomb() -> Damage:
        found = dice.choice(_TOML_BOMBS)
        path.write_text(found.replace("MARKER", str(marker)))
        return Damage(found[:40], touched)

    return _chosen(
        dice,
        (4, text),
        (5, tree),
        (5, line),
        (0.5, bomb),
        (0.5, lambda: Damage(damage.replaced_file(path, dice), touched)),
    )


_HOSTILE_TOML = (
    "nan", "-nan", "inf", "-inf", "1e999", "0", "-1", "1_000", "0x10", "0b1", "true", "false",
    '"true"', '"1"', '"1.0"', "1979-05-27", "07:32:00", "1979-05-27T07:32:00Z", "[]", "{}", "[[1]]",
    "9" * 30, "9" * 5000, "0x" + "f" * 3000, "1e-400", '"a\\u0000b"', '"\\u202Eb"', '"../../x"',
    '"/dev/zero"', '"pipe:touch MARKER"', '"~nobody-here/x"', "'''a\nb'''", "{a = 1, a = 2}",
    '"' + "x" * 300 + '"', "[1, true, 'x']", "1.0000000000000000001", "+1", "1e0", "''", "'ａ'",
)  # fmt: skip
_TOML_BOMBS = (
    "a" + ".a" * 60_000 + " = 1",
    '"=" . "\\"" . ' * 4000 + "b = 1",
    "x = " + "[" * 60_000,
    "x = " + "{a=" * 500 + "1" + "}" * 500,
    "\n".join(f"k{n}" + ".a" * 45 + " = 1" for n in range(500)),
    "[data]\n" * 2,
    "!!python/object/apply:os.system ['touch MARKER']",
    "cos\nsystem\n(S'touch MARKER'\ntR.",
    '{"run": {"dir": "x"}}',
    "x" * 300_000,
)


def _toml(tree: Any) -> str:
    """A tree as TOML, all tables in line; what TOML cannot say becomes text that is none."""
    if not isinstance(tree, dict):
        return f"{_toml_value(tree)}\n"
    return "".join(f"{_toml_key(name)} = {_toml_value(value)}\n" for name, value in tree.items())


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_key(n)} = {_toml_value(v)}" for n, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _toml_key(name: str) -> str:
    return name if name.isidentifier() and name.isascii() else json.dumps(name)


# --- checkpoints ------------------------------------------------------------------------------------

_STEPS = (3, 7)


def _build_checkpoints(folder: Path) -> None:
    checkpoints = Checkpoints(folder / "checkpoints", keep=2)
    for step in _STEPS:
        checkpoints.save(step, _state(step), _facts(step))


def _state(step: int) -> dict[str, torch.Tensor]:
    weight = torch.arange(20, dtype=torch.float32).reshape(4, 5) * step
    return {"weight": weight, "slot": weight.double() / 3, "count": torch.tensor(step)}


def _facts(step: int) -> dict[str, Any]:
    return {"ledger_head": [step, "ab" * 32], "settings": {"finetune": {"steps": 9}}, "scale": 0.5}


def _meaning(step: int, tensors: dict[str, torch.Tensor], facts: Any, passed_over: bool) -> Any:
    bits = {n: (str(t.dtype), tuple(t.shape), t.numpy().tobytes()) for n, t in tensors.items()}
    return step, bits, facts, passed_over


def _read_checkpoints(folder: Path) -> Reading:
    found = Checkpoints(folder / "checkpoints", keep=2).latest()
    if found is None:
        raise RunError(f"no checkpoint in {folder}: expected one")
    meaning = _meaning(found.step, found.tensors, found.facts, bool(found.skipped))
    return Reading(meaning, "; ".join(found.skipped))


def _is_newest_or_the_one_before(folder: Path, found: Any, sound: Any) -> bool:
    """The one before counts only where the reader said that the newest is damaged."""
    before = _meaning(_STEPS[0], _state(_STEPS[0]), _facts(_STEPS[0]), passed_over=True)
    return found in (sound, before)


def _damaged_checkpoints(folder: Path, dice: Random, marker: Path) -> Damage:
    root = folder / "checkpoints"
    older, newest = sorted(root.iterdir())
    place = newest if dice.random() < 0.8 else older
    path = dice.choice(sorted(place.iterdir()))
    touched = (str(place), str(root))

    def accident() -> Damage:
        return Damage(_rewritten(path, damage.damaged_bytes(path.read_bytes(), dice)), touched)

    def tree(vouched: bool) -> Damage:
        file = place / dice.choice(("facts.json", "manifest.json"))
        found, what = damage.confused_tree(json.loads(file.read_bytes()), dice)
        file.write_text(json.dumps(found, sort_keys=True))
        if vouched:
            _vouch_checkpoint(place)
        return Damage(what, touched, vouched)

    def tensors() -> Damage:
        file = place / "tensors.safetensors"
        _, what = found = damage.damaged_bytes(file.read_bytes(), dice)
        file.write_bytes(found[0] if dice.random() < 0.8 else damage.evil_pickle(marker))
        _vouch_checkpoint(place)
        return Damage(f"{what}, with right checksums", touched, vouched=True)

    def both() -> Damage:
        for each in (older, newest):
            file = dice.choice(sorted(each.iterdir()))
            file.write_bytes(damage.damaged_bytes(file.read_bytes(), dice)[0])
        return Damage("both damaged", touched)

    def moved() -> Damage:
        match dice.randrange(4):
            case 0:
                other = older / path.name if place == newest else newest / path.name
                return Damage(damage.swapped_files(path, other), (str(newest), str(root)))
            case 1:
                step = dice.choice((0, 3, 8, 10**8 - 1))
                place.rename(place.with_name(f"{place.name[:8]}-step-{step:08d}"))
                return Damage("another step in its name", (str(root),))
            case 2:
                return Damage(damage.extra_file(place, dice, marker), touched)
            case _:
                return Damage(damage.replaced_file(path, dice), touched)

    return _chosen(
        dice,
        (5, accident),
        (1, lambda: tree(vouched=False)),
        (2, lambda: tree(vouched=True)),
        (2, tensors),
        (1, both),
        (2, moved),
    )


def _vouch_checkpoint(place: Path) -> None:
    files = {}
    for name in ("tensors.safetensors", "facts.json"):
        content = (place / name).read_bytes()
        files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    text = json.dumps({"files": files, "format": 1}, sort_keys=True)
    (place / "manifest.json").write_text(text)


# --- ledgers ------------------------------------------------------------------------------------------

_GENESIS = {"epsilon": 9.0, "delta": 1e-5, "overflow_delta": 1e-8, "unit": "image", "claim": True}
_LINEAGE = {"key": "k" * 16, "data": "d" * 16}
_SPENT = (
    "epsilon", "events", "plan", "run_id", "claim", "budget", "delta", "overflow_delta", "steps",
    "statistics", "attempts", "starts", "binds", "rebound", "checkpoints", "sealed",
)  # fmt: skip
_RELEASE = GaussianEvent(20.0, 1.0)  # the cost of a release over all records is quick to compute
_RUNS = ("one", "two")


def _reserve(folder: Path) -> Reservation:
    events = (replace(_RELEASE, count=6),)
    request = Request(events, _GENESIS["overflow_delta"], "image", "add_or_remove_one")
    return Reservation(folder / "budget.jsonl", request, budget=(9.0, 1e-4))


def _open_ledger(folder: Path, name: str) -> PrivacyLedger:
    return PrivacyLedger.open(folder / f"{name}.jsonl", _GENESIS, reserve=_reserve(folder))


def _build_ledger(folder: Path) -> None:
    """Two runs that share a budget; the last entry of each is noted, as in their checkpoints."""
    heads = {}
    for name in _RUNS:
        with _open_ledger(folder, name) as ledger:
            for workers in (1, 2):
                ledger.open_attempt(_LINEAGE, workers=workers)
                for step in range(3):
                    ledger.charge(_RELEASE, "step", step)
                    ledger.bind("step", step, f"{step:064x}")
            ledger.bind("step", 2, "f" * 64)
            heads[name] = ledger.note_checkpoint(3)
    (folder / "heads.json").write_text(json.dumps(heads))


def _read_ledger(folder: Path) -> Reading:
    """What restarts of both runs take from the files, and what ``dpldm ledger`` shows of them."""
    heads, found = json.loads((folder / "heads.json").read_text()), []
    for name in _RUNS:
        path = folder / f"{name}.jsonl"
        if path.is_file():
            read_ledger(path)
        with _open_ledger(folder, name) as ledger:
            if not ledger.contains(heads[name]):  # as ``TrainingState.restore`` says it
                raise PrivacyError(f"{path} does not hold the noted head: restore it")
            found.append((ledger.events(), ledger.replayable_until))
        # what a crash may leave behind is cut off and noted: that costs and hides nothing
        summary = read_ledger(path)
        found.append({field: getattr(summary, field) for field in _SPENT})
    shared = read_dataset_ledger(folder / "budget.jsonl")
    shares = {share.run_id: (share.events, share.alone, share.settled) for share in shared.shares}
    return Reading((found, shared.ledger_id, shared.terms, shares))


def _damaged_ledger(folder: Path, dice: Random, marker: Path) -> Damage:
    path = folder / dice.choice((*(f"{name}.jsonl" for name in _RUNS), "budget.jsonl"))
    whole = path.read_bytes()
    touched = (path.name, str(folder))  # what cannot be written is named by its folder

    def text() -> Damage:
        change = dice.choice((damage.damaged_bytes, damage.damaged_bytes, damage.damaged_lines))
        return Damage(_rewritten(path, change(whole, dice)), touched)

    def entry(chained: bool) -> Damage:
        lines = [json.loads(line) for line in whole.splitlines()]
        at = dice.randrange(len(lines))
        lines[at]["body"], what = damage.confused_tree(lines[at]["body"], dice)
        path.write_bytes(_chained(lines) if chained else _as_lines(lines))
        nobody_noted_its_head = chained and path.name == "budget.jsonl"
        return Damage(f"line {at + 1}: {what}", touched, vouched=nobody_noted_its_head)

    def plausible(chained: bool) -> Damage:
        """An entry that could stand there, and says that less was spent, or something else."""
        entries = [json.loads(line) for line in whole.splitlines()]
        body = dice.choice([entry["body"] for entry in entries])
        what = _rewrite_entry(body, dice)
        path.write_bytes(_chained(entries) if chained else _as_lines(entries))
        nobody_noted_its_head = chained and path.name == "budget.jsonl"
        return Damage(what, touched, vouched=nobody_noted_its_head)

    def cut() -> Damage:
        lines = whole.splitlines(keepends=True)
        at = dice.randrange(len(lines))
        rest = lines[at][: dice.randrange(len(lines[at]))] + b"\0" * dice.choice((0, 0, 300))
        path.write_bytes(b"".join(lines[:at]) + rest)
        return Damage(f"cut in line {at + 1}", touched)

    def odd() -> Damage:
        match dice.randrange(5):
            case 0:
                path.write_bytes(whole + damage.json_bomb(dice) + b"\n")
                return Damage("a bomb in a line", touched)
            case 1:
                path.chmod(dice.choice((0o644, 0o660, 0o602)))
                return Damage("open to others", touched)
            case 2:
                path.write_bytes(damage.evil_pickle(marker))
                return Damage("a pickle", touched)
            case 3:
                other = dice.choice([p for p in folder.glob("*.jsonl") if p != path])
                return Damage(damage.swapped_files(path, other), (*touched, other.name))
            case _:
                return Damage(damage.replaced_file(path, dice), touched)

    return _chosen(
        dice,
        (5, text),
        (2, lambda: entry(chained=False)),
        (3, lambda: entry(chained=True)),
        (1, lambda: plausible(chained=False)),
        (1, lambda: plausible(chained=True)),
        (2, cut),
        (1, odd),
    )


def _rewrite_entry(body: dict[str, Any], dice: Random) -> str:
    """Change a number or a digit of an entry by a little."""
    names = [name for name, value in body.items() if name != "seq" and not isinstance(value, dict)]
    name = dice.choice(names)
    value = body[name]
    if isinstance(value, str) and set(value) <= set("0123456789abcdef"):
        at = dice.randrange(len(value))
        body[name] = value[:at] + dice.choice("0123456789abcdef") + value[at + 1 :]
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        body[name] = value * 2 if isinstance(value, float) else value + 1
    elif isinstance(value, list):
        body[name] = [[sigma * 2, rate, count] for sigma, rate, count in value]
    return f"{body['kind']}: {name} = {str(body[name])[:40]}"


def _as_lines(entries: list[dict[str, Any]]) -> bytes:
    return b"".join(
        json.dumps(entry, sort_keys=True, separators=(",", ":")).encode() + b"\n"
        for entry in entries
    )


def _chained(entries: list[dict[str, Any]]) -> bytes:
    """The entries with hashes that fit: forged, so only the head that was noted can tell."""
    before, forged = "", []
    for entry in entries:
        text = json.dumps(entry["body"], sort_keys=True, separators=(",", ":"))
        before = hashlib.sha256(before.encode() + text.encode()).hexdigest()
        forged.append({"body": entry["body"], "hash": before})
    return _as_lines(forged)


# --- sources ------------------------------------------------------------------------------------------


def _build_sources(folder: Path) -> None:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (4, SIZE, SIZE), dtype=np.uint8)
    pngs = [_png(image) for image in pixels]
    (folder / "photos").mkdir()
    (folder / "photos" / "a.png").write_bytes(pngs[0])
    (folder / "table.csv").write_text(
        'file,label,caption,unit\nphotos/a.png,cat,"a, b",u1\nphotos/a.png,dog,,u2\n'
    )
    members = [(f"k{n}.png", png) for n, png in enumerate(pngs)]
    members += [
        (f"k{n}.json", json.dumps({"label": n, "unit": f"u{n}"}).encode()) for n in range(4)
    ]
    (folder / "shard.tar").write_bytes(damage.tar_bytes(sorted(members)))
    labels = np.array(["cat", "dog", "cat", "yak"])
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=pixels, labels=labels, units=np.arange(4))
    (folder / "arrays.npz").write_bytes(buffer.getvalue())
    header = bytes((0, 0, 8, 3)) + np.array(pixels.shape, ">u4").tobytes()
    images = header + pixels.tobytes()
    (folder / "x-images-idx3-ubyte.gz").write_bytes(gzip.compress(images, mtime=0))
    (folder / "x-labels-idx1-ubyte").write_bytes(bytes((0, 0, 8, 1, 0, 0, 0, 4, 1, 2, 3, 4)))


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


_SOURCES = ("table.csv", "shard.tar", "arrays.npz", "x-images-idx3-ubyte.gz")


def _read_sources(folder: Path) -> Reading:
    found = []
    for name in _SOURCES:
        for image in open_source(DatasetConfig(source=str(folder / name))):
            array = image.read()
            assert array.dtype == np.uint8 and array.ndim in (2, 3), "no image"
            found.append((image.label, image.caption, image.unit, array.shape, array.tobytes()))
    return Reading(found)


def _damaged_sources(folder: Path, dice: Random, marker: Path) -> Damage:
    names = (*_SOURCES, "x-labels-idx1-ubyte", "photos/a.png")
    path = folder / dice.choice(names)
    whole = path.read_bytes()
    touched = _names(folder)

    def accident() -> Damage:
        change = damage.damaged_lines if path.suffix == ".csv" else damage.damaged_bytes
        return Damage(_rewritten(path, change(whole, dice)), touched, vouched=True)

    def tar() -> Damage:
        shard = folder / "shard.tar"
        change = damage.malformed_tar(shard.read_bytes(), dice, marker)
        if dice.random() < 0.1:
            change = damage.chained_long_names(3000), "a chain of long names"
        return Damage(_rewritten(shard, change), touched, vouched=True)

    def npz() -> Damage:
        what = _rewritten(folder / "arrays.npz", _odd_npz(dice, marker))
        return Damage(what, touched, vouched=True)

    def idx() -> Damage:
        file = folder / "x-images-idx3-ubyte.gz"
        sizes = np.array(dice.choice(_ODD_SIZES), ">u4").tobytes()
        plain = gzip.decompress(file.read_bytes())
        file.write_bytes(gzip.compress(plain[:4] + sizes + plain[16:], mtime=0))
        return Damage("other sizes", touched, vouched=True)

    def replaced() -> Damage:
        return Damage(damage.replaced_file(path, dice), touched, vouched=True)

    return _chosen(dice, (4, accident), (2, tar), (2, npz), (1, idx), (1, replaced))


_ODD_SIZES = ((2**32 - 1,) * 3, (0, 6, 6), (4, 0, 6), (2**31, 2**31, 4), (5, SIZE, SIZE), (1, 1, 1))


def _odd_npz(dice: Random, marker: Path) -> tuple[bytes, str]:
    """Arrays of other types and shapes, of objects, twice, encrypted by flag, or no zip at all."""
    good = npy_bytes(np.zeros((4, SIZE, SIZE), np.uint8))
    images = dice.choice((good, damage.malformed_npy(good, dice, marker)))
    labels = dice.choice((npy_bytes(np.arange(4)), damage.evil_npy(marker), b"", b"\x93NUMPY"))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", dice.choice((zipfile.ZIP_STORED, zipfile.ZIP_LZMA))) as file:
        file.writestr("images.npy", images)
        file.writestr("labels.npy", labels)
        if dice.random() < 0.3:
            file.writestr("../../units.npy", labels)
    data = bytearray(buffer.getvalue())
    if dice.random() < 0.3:
        at = data.index(b"PK\x01\x02")
        data[at + dice.randrange(4, 46)] ^= 1 << dice.randrange(8)  # of the directory of the zip
    return bytes(data), "other arrays"


SHARDS = Kind("shards", (DataError,), _build_data, _damaged_shards, _read_data)
MANIFESTS = Kind(
    "manifests", (DataError, RunError), _build_data, _damaged_manifest, _read_manifests
)
CONFIGS = Kind(
    "configs", (ConfigError,), _build_config, _damaged_config, _read_config, _says_the_same
)
CHECKPOINTS = Kind(
    "checkpoints",
    (RunError,),
    _build_checkpoints,
    _damaged_checkpoints,
    _read_checkpoints,
    _is_newest_or_the_one_before,
)
LEDGERS = Kind("ledgers", (PrivacyError, RunError), _build_ledger, _damaged_ledger, _read_ledger)
SOURCES = Kind("sources", (DataError,), _build_sources, _damaged_sources, _read_sources)
KINDS = {kind.name: kind for kind in (SHARDS, MANIFESTS, CONFIGS, CHECKPOINTS, LEDGERS, SOURCES)}
