"""Records and image shards: units stay together, shards are reproducible, damage is noticed."""

from __future__ import annotations

import itertools
import os
import shutil
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dpldm_dist.config import DataConfig
from dpldm_dist.data.manifest import MANIFEST, Manifest, describe_files
from dpldm_dist.data.npy import npy_bytes
from dpldm_dist.data.picture import SourceImage
from dpldm_dist.data.records import (
    CONTENT,
    content_digests,
    new_folder,
    plan_records,
    require_units,
    shard_plan,
    write_image_set,
)
from dpldm_dist.data.shards import (
    ImageRecord,
    ImageShards,
    read_images,
    scan_tar,
    stream_images,
    write_image_shard,
)
from dpldm_dist.errors import DataError, RunError

DATA = DataConfig(size=8, shard_records=10, max_images_per_unit=3)


def source(count: int, *, unit_of=None, seed: int = 0, caption: bool = False) -> list[SourceImage]:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 8, 8), dtype=np.uint8)
    return [
        SourceImage(
            name=f"{i}.png",
            label=str(i % 4),
            read=lambda i=i: pixels[i],
            caption=f"caption {i}" if caption else None,
            unit=None if unit_of is None else unit_of(i),
        )
        for i in range(count)
    ]


def write(
    folder: Path, images, *, data: DataConfig = DATA, threads: int = 1, private: bool = False
):
    folder.mkdir(exist_ok=True)
    classes = tuple("0123")
    written = write_image_set(
        folder,
        images,
        classes=classes,
        data=data,
        lanes=2,
        private=private,
        threads=threads,
        advance=lambda share: None,
    )
    facts = {
        "records": sum(shard["records"] for shard in written.shards),
        "images": len(written.digests),
        "images_per_record": data.max_images_per_unit,
        "classes": list(classes),
        "size": 8,
        "channels": 1,
        "captions": any(image.caption is not None for image in images),
        "duplicates": 0,
        "skipped": written.skipped,
        "shards": written.shards,
    }
    names = [shard["file"] for shard in written.shards] + [CONTENT]
    Manifest("images", facts, describe_files(folder, names)).write(folder, private=private)
    return written


@pytest.fixture
def folder(tmp_path) -> Path:
    write(tmp_path / "images", source(50))
    return tmp_path / "images"


# --- records ---------------------------------------------------------------------------


def test_all_images_of_a_unit_are_in_one_record_and_no_more_than_asked():
    records = plan_records(source(30, unit_of=lambda i: f"p{i % 5}"), max_images_per_unit=4)
    assert len(records) == 5 and len({record.key for record in records}) == 5
    for record in records:
        assert len(record.images) == 4 and len({image.unit for image in record.images}) == 1


def test_which_images_of_a_unit_are_kept_depends_on_that_unit_alone():
    images = source(40, unit_of=lambda i: f"p{i % 4}")
    everyone = plan_records(images, max_images_per_unit=3)
    without = plan_records([i for i in images if i.unit != "p0"], max_images_per_unit=3)
    names = {record.images[0].unit: [i.name for i in record.images] for record in everyone}
    assert [[i.name for i in record.images] for record in without] == [
        names[f"p{n}"] for n in (1, 2, 3)
    ]
    assert names["p1"] != ["1.png", "5.png", "9.png"] or names["p2"] != ["2.png", "6.png", "10.png"]


def test_a_unit_of_the_same_name_as_a_number_is_no_image_without_unit():
    images = source(4, unit_of=lambda i: "0" if i else None)
    records = plan_records(images, max_images_per_unit=4)
    assert [len(record.images) for record in records] == [1, 3]
    with pytest.raises(DataError, match=r"0\.png has no unit and others have one"):
        require_units(images, unit="person", source="data.private", private=True)


def test_every_record_lies_in_one_shard_and_shards_are_even():
    for records, lanes in ((50, 1), (50, 4), (3, 4), (1, 1), (1000, 3)):
        plan = shard_plan(records, shard_records=10, lanes=lanes)
        sizes = [len(part) for part in plan]
        assert sorted(np.concatenate(plan).tolist()) == list(range(records))
        assert max(sizes) <= 10 and max(sizes) - min(sizes) <= 1
        assert len(plan) % lanes == 0 or len(plan) == records


def test_classes_are_spread_over_all_shards(tmp_path):
    write(tmp_path / "images", source(400), data=DataConfig(size=8, shard_records=100))
    shards = ImageShards(tmp_path / "images")
    for shard in range(len(shards.files)):
        counts = Counter(record.labels[0] for record in shards.records(shard))
        assert len(counts) == 4 and min(counts.values()) > 10


# --- shards ---------------------------------------------------------------------------


def test_images_labels_and_captions_are_read_as_they_were_written(tmp_path):
    images = source(23, unit_of=lambda i: f"p{i % 9}", caption=True)
    write(tmp_path / "images", images)
    shards = ImageShards(tmp_path / "images")
    wanted = {image.read().tobytes(): (int(image.label), image.caption) for image in images}
    found = {}
    for shard in range(len(shards.files)):
        for record in shards.records(shard):
            for pixels, label, caption in zip(
                record.images, record.labels, record.captions, strict=True
            ):
                found[pixels.tobytes()] = (label, caption)
    assert found == wanted


def test_read_images_gives_channels_first_and_a_limit(folder):
    images, labels = read_images(folder)
    assert images.shape == (50, 1, 8, 8) and images.dtype == np.uint8 and labels.dtype == np.int64
    wanted = {image.read().tobytes(): int(image.label) for image in source(50)}
    assert {i.tobytes(): int(n) for i, n in zip(images, labels, strict=True)} == wanted
    few, few_labels = read_images(folder, limit=13)
    assert np.array_equal(few, images[:13]) and np.array_equal(few_labels, labels[:13])


def test_equal_input_gives_equal_bytes_whatever_the_threads(tmp_path):
    for name, threads in (("a", 1), ("b", 4)):
        write(tmp_path / name, source(35, unit_of=lambda i: f"p{i // 2}"), threads=threads)
    first = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    with tarfile.open(tmp_path / "a" / "images-00000.tar") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.uname, member.gname) == (0, 0, "", "")


def test_an_unreadable_image_stops_with_its_name_or_is_counted(tmp_path):
    def broken():
        raise DataError("Image bad.png cannot be read: mend it.")

    images = [*source(12), SourceImage("bad.png", "1", broken)]
    with pytest.raises(DataError, match=r"bad\.png"):
        write(tmp_path / "a", images)
    skipping = DataConfig(size=8, shard_records=10, on_bad_image="skip")
    assert write(tmp_path / "b", images, data=skipping).skipped == 1
    assert len(read_images(tmp_path / "b")[1]) == 12
    with pytest.raises(DataError, match="No image"):
        write(tmp_path / "c", [SourceImage("bad.png", "1", broken)], data=skipping)


def test_equal_images_in_different_records_are_duplicates_and_within_one_are_not(tmp_path):
    one = source(1)[0]
    again = SourceImage("again.png", "2", one.read)
    assert write(tmp_path / "a", [*source(5), again]).duplicates() == [["0.png", "again.png"]] or (
        write(tmp_path / "a2", [*source(5), again]).duplicates() == [["again.png", "0.png"]]
    )
    units = [SourceImage(f"{n}.png", "0", one.read, unit="p") for n in range(3)]
    assert write(tmp_path / "b", units).duplicates() == []


def test_content_digests_are_the_same_from_the_table_and_from_the_images(folder):
    from_table = content_digests(folder)
    manifest = Manifest.read(folder)
    files = {name: facts for name, facts in manifest.files.items() if name != CONTENT}
    Manifest("images", manifest.facts, files).write(folder)
    assert content_digests(folder) == from_table and len(from_table) == 50


@pytest.mark.parametrize("images", [51, 0, -1, 2**62, 10**30, True, "50", None])
def test_content_digests_of_another_number_of_images_are_refused(folder, images):
    manifest = Manifest.read(folder, "images")
    replace(manifest, facts={**manifest.facts, "images": images}).write(folder)
    with pytest.raises(DataError, match="again"):
        content_digests(folder)


def test_a_full_disk_leaves_no_shard(tmp_path):
    def endless():
        yield from (ImageRecord(f"k{i}", np.zeros((1, 8, 8, 1), np.uint8), (0,)) for i in range(5))
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match="No space left"):
        write_image_shard(tmp_path / "images-00000.tar", endless(), private=True)
    assert list(tmp_path.iterdir()) == []


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "x", private=True) as place:
        (place / "half").write_text("x")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".x.partial").mkdir()
    (tmp_path / ".x.partial" / "left by a killed start").write_text("x")
    with new_folder(tmp_path / "x", private=True) as place:
        (place / "whole").write_text("x")
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "whole"]
    with (
        pytest.raises(RunError, match="holds other files"),
        new_folder(tmp_path / "x", private=True),
    ):
        pass
    assert (tmp_path / "x" / "whole").exists()


# --- damage ---------------------------------------------------------------------------


def test_random_damage_is_refused_or_changes_nothing(folder):
    def everything() -> bytes:
        images, labels = read_images(folder)
        return images.tobytes() + labels.tobytes() + b"".join(sorted(content_digests(folder)))

    expected, rng = everything(), np.random.default_rng(3)
    names = sorted(path.name for path in folder.iterdir())
    for _ in range(150):
        path = folder / names[rng.integers(len(names))]
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[int(rng.integers(len(whole)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(damaged[: rng.choice([len(whole), rng.integers(len(whole))])]))
        try:
            assert everything() == expected
        except DataError as error:
            assert path.name in str(error)
        path.write_bytes(whole)
    assert everything() == expected


def test_random_damage_of_a_tar_never_crashes_the_scan(folder):
    whole, rng = (folder / "images-00000.tar").read_bytes(), np.random.default_rng(4)
    names = [member.name for member in scan_tar(whole, "t")]
    assert names[0].endswith(".images.npy") and len(names) == 2 * 9
    refused = 0
    for _ in range(500):
        damaged = bytearray(whole)
        place = int(rng.integers(len(whole)))
        damaged[place : place + 4] = rng.bytes(len(damaged[place : place + 4]))
        try:
            scan_tar(bytes(damaged), "t")
        except DataError:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize(
    "record",
    [
        ImageRecord("k", np.zeros((1, 8, 8, 1), np.uint8), (4,)),
        ImageRecord("k", np.zeros((1, 8, 8, 1), np.uint8), (-1,)),
        ImageRecord("k", np.zeros((1, 8, 8, 1), np.uint8), (True,)),
        ImageRecord("k", np.zeros((1, 8, 8, 1), np.uint8), ()),
        ImageRecord("k", np.zeros((2, 8, 8, 1), np.uint8), (0,)),
        ImageRecord("k", np.zeros((1, 8, 8, 3), np.uint8), (0,)),
        ImageRecord("k", np.zeros((1, 8, 8, 1), np.float32), (0,)),
        ImageRecord("k", np.zeros((4, 8, 8, 1), np.uint8), (0, 0, 0, 0)),
    ],
)
def test_records_that_do_not_fit_the_manifest_are_refused(folder, record):
    write_image_shard(folder / "images-00000.tar", [record], private=False)
    old = Manifest.read(folder)
    Manifest("images", old.facts, describe_files(folder, list(old.files))).write(folder)
    with pytest.raises(DataError, match=r"images-00000\.tar"):
        ImageShards(folder).records(0)


def test_a_folder_of_another_kind_is_refused(tmp_path):
    Manifest("images", {"records": 1}, {}).write(tmp_path)
    with pytest.raises(DataError, match="not a folder of image shards"):
        ImageShards(tmp_path)
    os.remove(tmp_path / MANIFEST)
    with pytest.raises(DataError, match="is missing"):
        ImageShards(tmp_path)


def test_arrays_of_objects_are_never_written():
    with pytest.raises(TypeError, match="only integers and floats"):
        npy_bytes(np.array([object()], dtype=object))


# --- streaming ---------------------------------------------------------------------------


def drawn(folder: Path, rank: int, world_size: int, steps: int, seed: int = 0):
    return list(
        stream_images(
            folder, batch=5, steps=steps, seed=seed, rank=rank, world_size=world_size, buffer=16
        )
    )


@pytest.mark.parametrize("world_size", [1, 2, 4, 7])
def test_every_worker_gets_the_same_number_of_batches(folder, world_size):
    for rank in range(world_size):
        batches = drawn(folder, rank, world_size, steps=6)
        assert [(i.shape, n.shape) for i, n in batches] == [((5, 1, 8, 8), (5,))] * 6


def test_an_epoch_over_all_workers_holds_every_image_once(folder):
    wanted = Counter(image.tobytes() for image in read_images(folder)[0])
    found = Counter(
        image.tobytes() for images, _ in drawn(folder, 0, 1, steps=10) for image in images
    )
    assert found == wanted
    first = [drawn(folder, rank, 2, steps=4)[0][0] for rank in range(2)]
    assert not {i.tobytes() for i in first[0]} & {i.tobytes() for i in first[1]}


def test_the_order_differs_by_epoch_and_seed_and_repeats_for_the_same_seed(folder):
    def order(**options):
        return [image.tobytes() for images, _ in drawn(folder, 0, 1, **options) for image in images]

    twice = order(steps=20)
    assert twice == order(steps=20) and twice[:50] != twice[50:]
    assert order(steps=10, seed=1) != twice[:50]


def test_streaming_a_damaged_shard_stops_with_its_name(folder):
    path = folder / "images-00002.tar"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=r"images-00002\.tar is damaged"):
        drawn(folder, 0, 1, steps=10)


def test_streaming_runs_no_shell_whatever_the_folder_is_called(tmp_path, monkeypatch):
    write(tmp_path / "pipe:touch ran;", source(20))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GOPEN_REWRITE", "/=pipe:touch ran;/")
    batches = stream_images(
        Path("pipe:touch ran;"), batch=4, steps=3, seed=0, rank=0, world_size=1, buffer=4
    )
    assert len(list(itertools.islice(batches, 3))) == 3
    assert not any(path.name == "ran" for path in tmp_path.rglob("*"))
    shutil.rmtree(tmp_path / "pipe:touch ran;")
