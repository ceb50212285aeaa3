"""The prepare stage: each data set whole or absent, disjoint, and never made twice differently."""

from __future__ import annotations

import io
import json
import stat
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from dpldm_dist.config import Config, parse_config
from dpldm_dist.data import records as records_module
from dpldm_dist.data.manifest import Manifest
from dpldm_dist.data.records import PlannedRecord
from dpldm_dist.data.shards import ImageShards, read_images
from dpldm_dist.errors import ConfigError, DataError, PrivacyError, RunError
from dpldm_dist.runtime.rundir import RunDir, dataset_dir
from dpldm_dist.runtime.worker import solo_worker
from dpldm_dist.stages.prepare import describe, prepare


def png(seed: int) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (10, 10), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def table(folder: Path, rows: list[tuple[int, str]], *, units: Sequence[str] | None = None) -> str:
    """A CSV of images (seed, label), their files and ``units``, which take turns; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["file,label,unit" if units else "file,label"]
    for place, (seed, label) in enumerate(rows):
        (folder / f"{place}.png").write_bytes(png(seed))
        unit = f",{units[place % len(units)]}" if units else ""
        lines.append(f"{place}.png,{label}{unit}")
    (folder / "t.csv").write_text("\n".join(lines))
    return str(folder / "t.csv")


def config(tmp_path: Path, **data) -> Config:
    run = {"dir": str(tmp_path / "run"), "threads": 1}
    tree = {"data": {"size": 10, "shard_records": 4, **data}, "run": run}
    return parse_config(tree)


def run(settings: Config) -> Manifest:
    RunDir(settings.run.dir).create(least_free_bytes=0)
    return prepare(settings, solo_worker())


def classes(*names: str, start: int = 0) -> list[tuple[int, str]]:
    return [(start + i, name) for i, name in enumerate(names)]


def test_every_configured_data_set_is_prepared_in_its_place(tmp_path):
    settings = config(
        tmp_path,
        public={"source": table(tmp_path / "a", classes("x", "y", "z"))},
        private={"source": table(tmp_path / "b", classes("10", "9", "10", start=50))},
        heldout={"source": table(tmp_path / "c", classes("10", "10", start=90))},
    )
    run(settings)
    facts = {
        w: Manifest.read(dataset_dir(settings, w, "images"), "images").facts
        for w in ("public", "private", "heldout")
    }
    assert facts["public"]["classes"] == ["x", "y", "z"]
    assert facts["private"]["classes"] == facts["heldout"]["classes"] == ["9", "10"]
    assert read_images(dataset_dir(settings, "heldout", "images"))[1].tolist() == [1, 1]
    for name in (
        "records",
        "images",
        "size",
        "channels",
        "shards",
        "duplicates",
        "skipped",
        "captions",
    ):
        assert all(name in each for each in facts.values())


def test_private_folders_are_closed_to_other_users_and_tell_no_counts_in_progress(tmp_path, capsys):
    settings = config(tmp_path, private={"source": table(tmp_path / "b", classes(*"abcdefghijk"))})
    run(settings)
    private = RunDir(settings.run.dir).private
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 for path in private.rglob("*"))
    progress = json.loads(RunDir(settings.run.dir).progress.read_text())
    assert progress["total_steps"] == 100
    assert "11" not in capsys.readouterr().out.replace(str(tmp_path), "")


def test_the_same_command_again_does_nothing_and_says_so(tmp_path, capsys):
    settings = config(tmp_path, public={"source": table(tmp_path / "a", classes("x", "y"))})
    first = run(settings)
    folder = dataset_dir(settings, "public", "images")
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert run(settings).digest == first.digest
    assert times == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert "finished before" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        ({"size": 12}, r"data\.size = 10, this config says 12"),
        ({"unit": "user"}, r"data\.unit = image, this config says user"),
        ({"public": {"limit": 1}}, r"data\.public\.limit = None, this config says 1"),
    ],
)
def test_other_settings_in_the_same_place_are_refused_by_name(tmp_path, change, answer):
    source = {"source": table(tmp_path / "a", classes("x", "y"))}
    run(config(tmp_path, public=source))
    changed = {**change, "public": {**source, **change.get("public", {})}}
    with pytest.raises(RunError, match=answer):
        run(config(tmp_path, **changed))


def test_a_damaged_or_missing_shard_is_noticed_when_prepared_again(tmp_path):
    settings = config(tmp_path, public={"source": table(tmp_path / "a", classes("x", "y"))})
    run(settings)
    (dataset_dir(settings, "public", "images") / "images-00000.tar").unlink()
    with pytest.raises(DataError, match=r"images-00000\.tar is missing"):
        run(settings)


def test_an_image_that_is_public_and_private_voids_the_claim_in_either_order(tmp_path):
    public = {"source": table(tmp_path / "a", classes("x", "y"))}
    private = {"source": table(tmp_path / "b", [(70, "u"), (1, "v")])}
    for first, second in (
        ({"public": public}, {"private": private}),
        ({"private": private}, {"public": public}),
    ):
        place = tmp_path / f"order-{next(iter(first))}"
        run(config(place, **first))
        with pytest.raises(PrivacyError, match="cannot be private"):
            run(config(place, **first, **second))
        which = next(iter(second))
        assert not dataset_dir(config(place), which, "images").exists()
        listed = list((place / "run" / "private").glob("overlap-*.json"))
        assert len(listed) == 1 and json.loads(listed[0].read_text())[0].endswith("1.png")
        assert stat.S_IMODE(listed[0].stat().st_mode) == 0o600


def test_an_image_that_is_held_out_and_trained_on_is_refused(tmp_path):
    private = {"source": table(tmp_path / "b", classes("u", "v"))}
    held_out = {"source": table(tmp_path / "c", [(99, "u"), (0, "u")])}
    settings = config(tmp_path, private=private, heldout=held_out)
    with pytest.raises(DataError, match="trained on"):
        run(settings)
    assert not dataset_dir(settings, "heldout", "images").exists()
    assert dataset_dir(settings, "private", "images").exists()


def test_duplicates_are_reported_privately_or_stop(tmp_path, capsys):
    private = {"source": table(tmp_path / "b", [(1, "u"), (2, "u"), (1, "v"), (1, "u")])}
    manifest = run(config(tmp_path, private=private))
    assert manifest.facts["duplicates"] == 2
    assert "equal" in capsys.readouterr().out
    listed = json.loads((tmp_path / "run" / "private" / "duplicates-private.json").read_text())
    assert [sorted(Path(name).name for name in group) for group in listed] == [
        ["0.png", "2.png", "3.png"]
    ]
    with pytest.raises(DataError, match="break record-level privacy"):
        run(config(tmp_path / "again", private=private, on_duplicates="stop"))


def test_all_images_of_a_unit_form_one_record(tmp_path):
    people = table(tmp_path / "b", classes(*"abcabcab"), units=["p0", "p1", "p2"])
    public = table(tmp_path / "a", classes("x", "y", start=50))
    settings = config(
        tmp_path,
        unit="patient",
        max_images_per_unit=2,
        public={"source": public},
        private={"source": people},
    )
    run(settings)
    found = {
        which: ImageShards(dataset_dir(settings, which, "images"))
        for which in ("public", "private")
    }
    facts = found["private"].manifest.facts
    assert (facts["records"], facts["images"], facts["unit"]) == (3, 6, "patient")
    shards = found["private"]
    records = [r for shard in range(len(shards.files)) for r in shards.records(shard)]
    assert sorted(len(record.labels) for record in records) == [2, 2, 2]
    assert found["public"].images_per_record == 1  # public images need no unit


def test_a_word_without_units_and_units_without_a_word_are_refused(tmp_path):
    plain = {"source": table(tmp_path / "plain", classes("u", "v"))}
    people = {"source": table(tmp_path / "people", classes("u", "v"), units=["p0", "p1"])}
    with pytest.raises(PrivacyError, match=r"data\.unit = 'patient', but data\.private names no"):
        run(config(tmp_path, unit="patient", private=plain))
    for which in ("private", "public"):
        with pytest.raises(ConfigError, match=r"names a unit .* data\.unit is image: say"):
            run(config(tmp_path, **{which: people}))
    assert run(config(tmp_path, private=plain)).facts["unit"] == "image"
    with pytest.raises(ConfigError, match=r"data\.max_images_per_unit: expected 1"):
        config(tmp_path, max_images_per_unit=2)


@pytest.mark.parametrize(
    "spellings", [("Ann", "ann"), ("ann", "ann "), ("a  b", "a b"), ("\u00e9", "e\u0301")]
)
def test_a_unit_that_is_spelled_in_two_ways_is_refused_without_naming_it(tmp_path, spellings):
    source = table(tmp_path / "b", classes("u", "v", "w"), units=[*spellings, "other"])
    with pytest.raises(DataError, match=r"0\.png and .*1\.png differ in case, blanks") as caught:
        run(config(tmp_path, unit="person", private={"source": source}))
    assert not any(unit in str(caught.value).replace(str(tmp_path), "") for unit in ("Ann", "a b"))


def test_a_unit_that_is_blank_is_refused(tmp_path):
    source = table(tmp_path / "b", classes("u", "v"), units=["p0", " "])
    with pytest.raises(DataError, match=r"1\.png has no unit"):
        run(config(tmp_path, unit="person", private={"source": source}))


@pytest.mark.parametrize("bug", ["every image a record", "two units in a record", "shared unit"])
def test_grouping_that_goes_wrong_is_caught_before_a_shard_is_written(tmp_path, bug):
    """Planted bugs in the grouping itself."""

    def broken(images, *, max_images_per_unit):
        if bug == "every image a record":
            groups = [(image,) for image in images]
        elif bug == "two units in a record":
            groups = [tuple(images)]
        else:
            groups = [tuple(images[:1]), tuple(images[1:])]
        return [PlannedRecord(f"{n:08d}", group) for n, group in enumerate(groups)]

    units = ["p0", "p0"] if bug != "two units in a record" else ["p0", "p1"]
    source = table(tmp_path / "b", classes("u", "v"), units=units)
    settings = config(tmp_path, unit="person", private={"source": source})
    with (
        mock.patch.object(records_module, "plan_records", broken),
        pytest.raises(PrivacyError, match="two records, or a record holds two"),
    ):
        run(settings)
    assert not dataset_dir(settings, "private", "images").exists()


def test_an_unreadable_image_stops_with_its_name_and_leaves_nothing_or_is_counted(tmp_path):
    source = table(tmp_path / "b", classes("u", "v", "w"))
    (tmp_path / "b" / "1.png").write_bytes(b"no image")
    settings = config(tmp_path, private={"source": source})
    with pytest.raises(DataError, match=r"1\.png cannot be read"):
        run(settings)
    folder = dataset_dir(settings, "private", "images")
    assert not any("images" in path.name for path in folder.parent.iterdir())
    assert (
        run(config(tmp_path, private={"source": source}, on_bad_image="skip")).facts["skipped"] == 1
    )


def test_declared_classes_fix_the_order_and_refuse_other_labels_without_naming_them(tmp_path):
    source = table(tmp_path / "b", classes("secret", "v"))
    declared = {"source": source, "classes": ["v", "other", "secret"]}
    assert run(config(tmp_path, private=declared)).facts["classes"] == ["v", "other", "secret"]
    with pytest.raises(DataError, match=r"0\.png has a label that is not a class") as error:
        run(config(tmp_path / "again", private={**declared, "classes": ["v"]}))
    assert "secret" not in str(error.value)


def test_data_of_another_size_from_an_earlier_run_is_refused(tmp_path):
    run(config(tmp_path, public={"source": table(tmp_path / "a", classes("x"))}))
    private = {"source": table(tmp_path / "b", classes("u", start=9))}
    with pytest.raises(RunError, match=r"data\.size = 10, this config says 12"):
        run(config(tmp_path, private=private, size=12))


def test_nothing_to_prepare_is_said(tmp_path):
    with pytest.raises(ConfigError, match="Nothing to prepare"):
        run(config(tmp_path))


def test_a_dry_run_says_what_would_be_done_and_touches_nothing(tmp_path):
    settings = config(tmp_path, private={"source": "/nowhere", "limit": 7})
    lines = describe(settings)
    assert any("/nowhere" in line and "at most 7" in line for line in lines)
    assert (
        not any("(finished before)" in line for line in lines) and not (tmp_path / "run").exists()
    )
    assert describe(config(tmp_path)) == ["nothing to prepare: no data set has a source"]


class _Deaf:
    """What worker 1 of 2 hears while worker 0 fails."""

    def __init__(self, heard):
        self.heard = heard

    def broadcast_json(self, value):
        return self.heard


def test_a_failure_of_worker_0_is_the_same_error_on_every_worker(tmp_path):
    from dataclasses import replace

    settings = config(tmp_path, public={"source": "/nowhere"})
    worker = replace(
        solo_worker(), rank=1, world_size=2, collective=_Deaf(["DataError", "found, do"])
    )
    with pytest.raises(DataError, match="found, do"):
        prepare(settings, worker)
