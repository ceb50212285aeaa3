"""Latent shards: what was written is read, by offset, and nothing else is ever believed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from dpldm_dist.data import latents as latents_module
from dpldm_dist.data.latents import (
    LatentRecord,
    LatentShards,
    all_latents,
    finished_latent_shard,
    stream_latents,
    write_latent_shard,
    write_latents_manifest,
)
from dpldm_dist.data.manifest import MANIFEST, Manifest
from dpldm_dist.data.npy import npy_bytes, npy_header
from dpldm_dist.data.shards import write_tar
from dpldm_dist.errors import DataError

SHARDS, RECORDS, MOST = 3, 7, 2
SHAPE = (2, 4, 3, 3)  # V, 2C, h, w


def record(shard: int, place: int, *, context: bool = False) -> LatentRecord:
    rng = np.random.default_rng((shard, place))
    images = 1 + place % MOST
    tokens = rng.standard_normal((images, 3, 5)) if context else None
    labels = rng.integers(0, 10, images).tolist()
    return LatentRecord(f"{shard}-{place}", rng.standard_normal((images, *SHAPE)), labels, tokens)


def write_all(folder: Path, *, context: bool = False) -> Path:
    entries = [
        write_latent_shard(
            folder,
            f"latents-{shard:05d}.tar",
            [record(shard, place, context=context) for place in range(RECORDS)],
            images_per_record=MOST,
            source="s",
            private=True,
        )
        for shard in range(SHARDS)
    ]
    classes = [str(n) for n in range(10)]
    write_latents_manifest(folder, entries, classes=classes, config={}, parents={}, private=True)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return write_all(tmp_path_factory.mktemp("latents"))


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def rehash(folder: Path) -> None:
    """Make the manifest vouch for what the files now are: a forger's work, not an accident's."""
    old = Manifest.read(folder)
    files = {}
    for name in old.files:
        payload = (folder / name).read_bytes()
        files[name] = {"bytes": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}
    Manifest(old.kind, old.facts, files, old.config, old.parents).write(folder)


@pytest.mark.parametrize("context", [False, True])
def test_every_record_is_read_as_it_was_written(tmp_path, context):
    shards = LatentShards(write_all(tmp_path / "l", context=context))
    assert (
        shards.latent_shape == (2, 3, 3) and shards.views == 2 and shards.images_per_record == MOST
    )
    assert shards.shard_records == (RECORDS,) * SHARDS
    assert shards.context_shape == ((3, 5) if context else None)
    places = np.array([6, 0, 3, 3])
    read = shards.records(1, places)
    assert read.moments.dtype == np.float32 and read.labels.dtype == read.images.dtype == np.int64
    for row, place in enumerate(places):
        wanted = record(1, int(place), context=context)
        count = len(wanted.labels)
        assert read.images[row] == count and read.labels[row, :count].tolist() == wanted.labels
        assert np.array_equal(read.moments[row, :count], wanted.moments.astype(np.float16))
        assert not read.moments[row, count:].any() and not read.labels[row, count:].any()
        if context:
            assert np.array_equal(read.context[row, :count], wanted.context.astype(np.float16))
        else:
            assert read.context is None


def test_gathering_keeps_the_order_over_shards(whole):
    shards = LatentShards(whole)
    where = np.array([2, 0, 1, 2, 0]), np.array([1, 5, 2, 0, 5])
    read = shards.gather(*where)
    for row, (shard, place) in enumerate(zip(*where, strict=True)):
        alone = shards.records(int(shard), np.array([place]))
        assert np.array_equal(read.moments[row], alone.moments[0])
        assert np.array_equal(read.labels[row], alone.labels[0])


def test_gathering_nothing_gives_empty_arrays_of_the_right_shape(whole):
    shards = LatentShards(whole)
    empty = np.zeros(0, dtype=np.int64)
    for read in (shards.gather(empty, empty), shards.records(0, empty)):
        assert read.moments.shape == (0, MOST, *SHAPE) and read.labels.shape == (0, MOST)


def test_all_latents_are_all_records_in_order(whole):
    read = all_latents(whole)
    assert read.moments.shape == (SHARDS * RECORDS, MOST, *SHAPE)
    assert np.array_equal(
        read.moments[RECORDS], LatentShards(whole).records(1, np.array([0])).moments[0]
    )


def test_equal_input_gives_equal_bytes(tmp_path):
    first, second = write_all(tmp_path / "a"), write_all(tmp_path / "b")
    assert sorted(p.name for p in first.iterdir()) == sorted(p.name for p in second.iterdir())
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()


def test_latents_below_a_private_folder_are_closed_to_other_users(whole):
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in whole.iterdir())


def test_shards_are_plain_webdataset_tars(whole):
    with tarfile.open(whole / "latents-00000.tar") as tar:
        names = tar.getnames()
    assert names[:2] == ["0-0.json", "0-0.moments.npy"] and len(names) == 2 * RECORDS


def test_the_writer_leaves_an_entry_that_a_restart_finds(tmp_path):
    def write(source):
        records = [record(0, place) for place in range(3)]
        return write_latent_shard(
            tmp_path, "latents-00000.tar", records, images_per_record=2, source=source, private=True
        )

    assert finished_latent_shard(tmp_path, "latents-00000.tar", source="a") is None
    entry = write("a")
    assert finished_latent_shard(tmp_path, "latents-00000.tar", source="a") == entry
    assert finished_latent_shard(tmp_path, "latents-00000.tar", source="b") is None
    (tmp_path / "latents-00000.tar").write_bytes(b"damaged")
    assert finished_latent_shard(tmp_path, "latents-00000.tar", source="a") is None


@pytest.mark.parametrize("value", [1e5, -7e4, np.inf, np.nan])
def test_what_does_not_fit_into_float16_is_refused_with_the_shard_and_not_the_key(tmp_path, value):
    moments = np.zeros((1, *SHAPE))
    moments[0, 0, 0, 0, 0] = value
    records = [LatentRecord("someone", moments, [0])]
    with pytest.raises(DataError, match=r"latents-00000\.tar") as error:
        write_latent_shard(
            tmp_path, "latents-00000.tar", records, images_per_record=1, source="", private=True
        )
    assert "someone" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("keys", [["a", "a"], ["../x"], ["a.b"], [""], ["/etc"], ["a/b"]])
def test_repeated_or_unsafe_keys_are_refused(tmp_path, keys):
    records = [LatentRecord(key, np.zeros((1, *SHAPE)), [0]) for key in keys]
    with pytest.raises(DataError, match="key"):
        write_latent_shard(
            tmp_path, "latents-00000.tar", records, images_per_record=1, source="", private=True
        )
    assert list(tmp_path.iterdir()) == []


def test_records_of_different_shapes_are_refused(tmp_path):
    records = [
        LatentRecord("a", np.zeros((1, *SHAPE)), [0]),
        LatentRecord("b", np.zeros((1, 1, 4, 3, 3)), [0]),
    ]
    with pytest.raises(DataError, match="one shape"):
        write_latent_shard(tmp_path, "l.tar", records, images_per_record=1, source="", private=True)
    with pytest.raises(DataError, match="1 to 1"):
        records = [LatentRecord("a", np.zeros((2, *SHAPE)), [0, 1])]
        write_latent_shard(tmp_path, "l.tar", records, images_per_record=1, source="", private=True)


# --- damage ---------------------------------------------------------------------------


def test_a_missing_shard_stops_at_the_start_with_its_name(copy):
    (copy / "latents-00001.tar").unlink()
    with pytest.raises(DataError, match=r"latents-00001\.tar is missing"):
        LatentShards(copy)


@pytest.mark.parametrize("change", [lambda b: b[:-512], lambda b: b + bytes(512)])
def test_a_shard_of_another_length_stops_at_the_start_with_its_name(copy, change):
    path = copy / "latents-00002.tar"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(
        DataError, match=r"latents-00002\.tar is damaged: found a file of another size"
    ):
        LatentShards(copy)


@pytest.mark.parametrize(
    ("under_another_name", "said"),
    [(False, "is not a folder of latent shards"), (True, "lists a shard twice, or a copy of it")],
)
def test_a_shard_that_is_listed_twice_is_refused(copy, under_another_name, said):
    """Its records would count twice, and a neighbour would differ in two."""
    old = Manifest.read(copy)
    facts, files = dict(old.facts), dict(old.files)
    first = dict(facts["shards"][0])
    if under_another_name:
        for kind, name in (("file", "latents-00009.tar"), ("index", "latents-00009.index.npy")):
            shutil.copy(copy / first[kind], copy / name)
            files[name] = files[first[kind]]
            first[kind] = name
    facts["shards"] = [*facts["shards"], first]
    facts["records"] += first["records"]
    Manifest(old.kind, facts, files, old.config, old.parents).write(copy)
    with pytest.raises(DataError, match=said):
        LatentShards(copy)


def test_swapped_shards_are_noticed_when_first_touched(copy):
    a, b = copy / "latents-00000.tar", copy / "latents-00001.tar"
    first = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(first)
    shards = LatentShards(copy)
    with pytest.raises(DataError, match=r"is damaged: its content is not what its manifest names"):
        shards.records(0, np.array([0]))


@pytest.mark.parametrize("how", ["in place", "replaced", "cut", "gone"])
def test_a_shard_that_changes_during_the_run_is_noticed(copy, how):
    shards, path = LatentShards(copy), copy / "latents-00000.tar"
    before = shards.records(0, np.array([0])).moments
    content = bytearray(path.read_bytes())
    start = int(shards._opened(0).table[0, 0])
    content[start] ^= 1
    match how:
        case "in place":
            with open(path, "r+b") as file:
                file.write(content)
        case "replaced":
            (copy / "new").write_bytes(content)
            (copy / "new").rename(path)
        case "cut":
            os.truncate(path, 1024)
        case "gone":
            path.unlink()
    with pytest.raises(DataError, match=r"latents-00000\.tar"):
        shards.records(0, np.array([0]))
    content[start] ^= 1
    path.write_bytes(content)  # the file as it was is taken again
    assert np.array_equal(shards.records(0, np.array([0])).moments, before)


def everything(folder: Path) -> bytes:
    read = all_latents(folder)
    return read.moments.tobytes() + read.labels.tobytes() + read.images.tobytes()


def test_random_damage_is_refused_or_changes_nothing(copy):
    """300 mutations of shards, tables and the manifest: a DataError or an identical result."""
    expected, rng = everything(copy), np.random.default_rng(0)
    names = sorted(path.name for path in copy.iterdir())
    refused = 0
    for _ in range(300):
        path = copy / names[rng.integers(len(names))]
        whole_file = path.read_bytes()
        path.write_bytes(mutated(whole_file, rng))
        try:
            assert everything(copy) == expected
        except DataError as error:
            refused += 1
            assert path.name in str(error) and "\n" not in str(error)
        path.write_bytes(whole_file)
    assert everything(copy) == expected
    assert refused > 280


def test_random_damage_that_the_manifest_vouches_for_never_crashes(copy):
    """The same with right hashes: the checks of form alone must hold."""
    rng = np.random.default_rng(2)
    names = [path.name for path in sorted(copy.iterdir()) if path.name != MANIFEST]
    for round_ in range(150):
        path = copy / names[rng.integers(len(names))]
        whole_file = path.read_bytes()
        path.write_bytes(mutated(whole_file, rng))
        rehash(copy)
        try:
            shards = LatentShards(copy, verify=bool(round_ % 2))
            for shard in range(SHARDS):
                shards.records(shard, np.arange(RECORDS))
        except DataError:
            pass
        path.write_bytes(whole_file)


def mutated(payload: bytes, rng: np.random.Generator) -> bytes:
    data = bytearray(payload)
    kind, place = rng.integers(6), int(rng.integers(len(data)))
    if kind == 0:
        data[place] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        del data[place:]
    elif kind == 2:
        data[place : place + 512] = bytes(len(data[place : place + 512]))
    elif kind == 3:
        data[place:place] = rng.bytes(int(rng.integers(1, 600)))
    elif kind == 4:
        del data[place : place + int(rng.integers(1, 600))]
    else:
        data[place : place + 8] = rng.bytes(len(data[place : place + 8]))
    return bytes(data)


def forged_table(copy: Path, change) -> None:
    path = copy / "latents-00000.index.npy"
    header = npy_header(np.dtype(np.int64), (RECORDS, 3 + MOST))
    table = (
        np.frombuffer(path.read_bytes()[len(header) :], dtype=np.int64).reshape(RECORDS, -1).copy()
    )
    change(table)
    path.write_bytes(npy_bytes(table))
    rehash(copy)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    ("column", "value"),
    [(0, -1), (0, 2**62), (0, 1), (0, 0), (2, 0), (2, MOST + 1), (3, 10), (3, -1), (0, -(2**63))],
)
def test_offsets_and_labels_out_of_range_are_refused(copy, column, value, verify):
    forged_table(copy, lambda table: table.__setitem__((3, column), value))
    with pytest.raises(DataError, match=r"latents-00000\.index\.npy"):
        LatentShards(copy, verify=verify).records(0, np.array([0]))


def test_a_table_that_names_another_record_is_refused(copy):
    forged_table(copy, lambda table: table.__setitem__((0, 0), table[1, 0]))
    with pytest.raises(DataError, match="does not fit"):
        LatentShards(copy).records(0, np.array([0]))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((RECORDS, 3 + MOST), dtype=np.int32),
        np.zeros((RECORDS, 3 + MOST), dtype=np.float64),
        np.zeros((RECORDS + 1, 3 + MOST), dtype=np.int64),
        np.zeros((3 + MOST, RECORDS), dtype=np.int64),
    ],
)
def test_a_table_of_another_type_or_shape_is_refused(copy, array):
    (copy / "latents-00000.index.npy").write_bytes(npy_bytes(array))
    rehash(copy)
    with pytest.raises(DataError, match=r"another type or shape|at most"):
        LatentShards(copy).records(0, np.array([0]))


def test_a_pickled_table_is_refused_and_not_run(copy, tmp_path):
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (marker,))

    np.save(copy / "latents-00000.index.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    rehash(copy)
    with pytest.raises(DataError):
        LatentShards(copy).records(0, np.array([0]))
    assert not marker.exists()


@pytest.mark.parametrize(
    "moments",
    [
        np.zeros((MOST, *SHAPE), dtype=np.float32),
        np.zeros((MOST, 2, 4, 3, 2), dtype=np.float16),
        np.asfortranarray(np.ones((MOST, *SHAPE), dtype=np.int16)),
    ],
)
def test_moments_of_another_type_or_shape_are_refused(copy, moments):
    facts = json.dumps({"images": 1, "labels": [0] * MOST}).encode()
    members = {"moments.npy": npy_bytes(moments), "json": facts}
    write_tar(
        copy / "latents-00000.tar", [(f"k{i}", members) for i in range(RECORDS)], private=True
    )
    rehash(copy)
    with pytest.raises(DataError):
        LatentShards(copy).records(0, np.array([0]))


@pytest.mark.parametrize(
    "facts",
    [
        b"",
        b"[]",
        b"{",
        b'{"images":1}',
        b'{"images":1,"labels":["a","b"]}',
        b'{"images":true,"labels":[0,0]}',
    ],
)
def test_damaged_facts_of_a_record_are_refused(copy, facts):
    members = {"moments.npy": npy_bytes(np.zeros((MOST, *SHAPE), np.float16)), "json": facts}
    write_tar(
        copy / "latents-00000.tar", [(f"k{i}", members) for i in range(RECORDS)], private=True
    )
    rehash(copy)
    with pytest.raises(DataError, match=r"latents-00000"):
        LatentShards(copy).records(0, np.array([0]))


@pytest.mark.parametrize(
    "facts",
    [
        {"latent_shape": [2, 3]},
        {"latent_shape": [-2, 3, 3]},
        {"views": 0},
        {"shards": 3},
        {"context_shape": [1]},
        {"images_per_record": 2**40},
        {"images_per_record": True},
        {"views": 2.0},
        {"views": "2"},
        {"latent_shape": [2**15, 2**15, 2**15]},
        {"classes": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]},
        {"shards": {}},
        {"shards": []},
        {"records": SHARDS * RECORDS + 1},
        {"classes": None},
    ],
)
def test_a_manifest_with_impossible_facts_is_refused(copy, facts):
    old = Manifest.read(copy)
    Manifest(old.kind, {**old.facts, **facts}, old.files, old.config, old.parents).write(copy)
    with pytest.raises(DataError, match="not a folder of latent shards"):
        LatentShards(copy)


# --- speed and many shards -----------------------------------------------------------------


def test_more_shards_than_open_maps_are_read(whole, monkeypatch):
    monkeypatch.setattr(latents_module, "_OPEN_MAPS", 1)
    shards = LatentShards(whole)
    expected = all_latents(whole).moments[[0, RECORDS, 2 * RECORDS]]
    for _ in range(3):
        read = shards.gather(np.arange(3), np.zeros(3, dtype=np.int64))
        assert np.array_equal(read.moments, expected)


def test_small_records_are_gathered_at_100_000_per_second(tmp_path):
    rng = np.random.default_rng(0)
    records = (
        LatentRecord(f"k{i}", rng.standard_normal((1, 1, 8, 4, 4)), [0]) for i in range(3000)
    )
    entry = write_latent_shard(
        tmp_path, "l.tar", records, images_per_record=1, source="", private=True
    )
    write_latents_manifest(tmp_path, [entry], classes=["a"], config={}, parents={}, private=True)
    shards, places = LatentShards(tmp_path), rng.integers(0, 3000, 3000)
    shards.records(0, places)
    fastest = min(timed(lambda: shards.records(0, places)) for _ in range(10))
    assert 3000 / fastest > 100_000


def timed(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


# --- streaming ---------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, SHARDS])
def test_streaming_gives_every_image_once_per_epoch_over_all_workers(whole, world_size):
    real = all_latents(whole)
    rows, places = np.nonzero(np.arange(MOST) < real.images[:, None])
    wanted = sorted(moments.tobytes() for moments in real.moments[rows, places])
    found = []
    for rank in range(world_size):
        items = stream_latents(whole, seed=0, rank=rank, world_size=world_size, buffer=4)
        found.extend(next(items)[0].tobytes() for _ in range(len(wanted) // world_size))
    assert sorted(found) == wanted


def test_streaming_goes_on_with_more_workers_than_shards(whole):
    for rank in range(5):
        items = stream_latents(whole, seed=0, rank=rank, world_size=5, buffer=4)
        assert all(next(items)[0].shape == SHAPE for _ in range(40))


def resident(folder: Path) -> int:
    """Bytes of the files of ``folder`` that this process holds in memory through its maps."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name = line.split()[0]
        if "-" in name:
            ours = str(folder) in line
        elif name == "Rss:" and ours:
            total += 1024 * int(line.split()[1])
    return total


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """Twelve shards of about a megabyte each."""
    folder, generator = tmp_path_factory.mktemp("large"), np.random.default_rng(0)
    entries = [
        write_latent_shard(
            folder,
            f"latents-{shard:05d}.tar",
            (
                LatentRecord(f"{shard}-{place}", generator.standard_normal((1, 1, 8, 32, 32)), [0])
                for place in range(64)
            ),
            images_per_record=1,
            source="s",
            private=True,
        )
        for shard in range(12)
    ]
    write_latents_manifest(folder, entries, classes=["0"], config={}, parents={}, private=True)
    return folder


@pytest.mark.parametrize(("mapped_bytes", "least", "most"), [(3 << 20, 1, 3 << 20), (1, 1, 3 << 19), (1 << 30, 12 << 20, 20 << 20)])  # fmt: skip
def test_no_more_of_the_data_is_resident_than_the_bound(large, mapped_bytes, least, most):
    """The last case shows that the measure sees what is resident."""
    shards, highest = LatentShards(large, mapped_bytes=mapped_bytes), 0
    wanted = LatentShards(large).gather(np.arange(12), np.arange(12)).moments
    for _ in range(2):
        for shard in range(12):
            shards.records(shard, np.arange(64))
            highest = max(highest, resident(large))
    assert least <= highest <= most
    assert np.array_equal(shards.gather(np.arange(12), np.arange(12)).moments, wanted)


def test_a_shard_that_was_closed_is_opened_again_without_being_verified_again(large, monkeypatch):
    shards, seen = LatentShards(large, mapped_bytes=1), []
    verify = latents_module.verify_file
    monkeypatch.setattr(
        latents_module, "verify_file", lambda path, facts: seen.append(path) or verify(path, facts)
    )
    for _ in range(3):
        shards.gather(np.arange(12), np.arange(12))
    assert len(seen) == 2 * 12  # every shard and its table, once


def test_threads_may_read_the_same_shards(large):
    shards = LatentShards(large, mapped_bytes=1)
    wanted = all_latents(large).moments

    def read(seed: int) -> bool:
        chosen = np.random.default_rng(seed).integers(0, (12, 64), (40, 2)).T
        found = shards.gather(chosen[0], chosen[1]).moments
        return np.array_equal(found, wanted[64 * chosen[0] + chosen[1]])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(12)))
