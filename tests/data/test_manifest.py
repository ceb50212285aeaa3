"""Manifests and the files they describe: whole or absent, and never believed when damaged."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from dpldm_dist.data.files import (
    describe_file,
    make_folder,
    new_file,
    read_file,
    require_memory,
    write_file,
)
from dpldm_dist.data.manifest import MANIFEST, Manifest, describe_files
from dpldm_dist.errors import DataError, RunError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.bin").write_bytes(b"first")
    (tmp_path / "b.bin").write_bytes(b"second")
    files = describe_files(tmp_path, ["a.bin", "b.bin"])
    Manifest("images", {"records": 2}, files, {"data": {"size": 8}}, {"x": "0" * 64}).write(
        tmp_path
    )
    return tmp_path


def test_a_manifest_is_read_as_it_was_written(folder):
    manifest = Manifest.read(folder, "images")
    assert manifest.facts == {"records": 2} and manifest.config == {"data": {"size": 8}}
    assert manifest == Manifest.read(folder) and len(manifest.digest) == 64
    manifest.verify(folder)


def test_the_digest_depends_on_every_field_and_not_on_the_order_of_keys():
    base = Manifest("images", {"a": 1, "b": 2}, {}, {}, {})
    assert base.digest == Manifest("images", {"b": 2, "a": 1}, {}, {}, {}).digest
    others = [
        Manifest("latents", {"a": 1, "b": 2}, {}),
        Manifest("images", {"a": 1}, {}),
        Manifest("images", {"a": 1, "b": 2}, {"f": {"bytes": 0, "sha256": ""}}),
        Manifest("images", {"a": 1, "b": 2}, {}, {"c": 1}),
        Manifest("images", {"a": 1, "b": 2}, {}, {}, {"p": "1"}),
    ]
    assert len({m.digest for m in (base, *others)}) == 6


def test_a_missing_manifest_or_another_kind_is_refused(folder, tmp_path_factory):
    with pytest.raises(DataError, match="expected latents"):
        Manifest.read(folder, "latents")
    with pytest.raises(DataError, match="is missing"):
        Manifest.read(tmp_path_factory.mktemp("empty"), "images")
    with pytest.raises(DataError, match="expected one of"):
        Manifest("photos", {}, {}).write(folder)


def test_an_edited_manifest_is_refused(folder):
    path = folder / MANIFEST
    path.write_text(path.read_text().replace('"records":2', '"records":3'))
    with pytest.raises(DataError, match="damaged"):
        Manifest.read(folder, "images")


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "null", '{"kind":"images"}', "[" * 100_000, "\x00"]
)
def test_what_is_no_manifest_is_refused(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(DataError, match="manifest"):
        Manifest.read(tmp_path, "images")


@pytest.mark.parametrize("name", ["../a.bin", "/etc/passwd", "x/../../y", ""])
def test_a_manifest_that_names_files_outside_of_its_folder_is_refused(tmp_path, name):
    Manifest("images", {}, {name: {"bytes": 1, "sha256": "0"}}).write(tmp_path)
    with pytest.raises(DataError, match="not a manifest of this package"):
        Manifest.read(tmp_path, "images")


def test_a_changed_missing_or_unlisted_file_is_named(folder):
    manifest = Manifest.read(folder, "images")
    (folder / "a.bin").write_bytes(b"fIrst")
    with pytest.raises(DataError, match=r"a\.bin is damaged: its content"):
        manifest.verify(folder)
    manifest.verify(folder, ["b.bin"])
    (folder / "b.bin").write_bytes(b"longer than before")
    with pytest.raises(DataError, match=r"b\.bin is damaged") as error:
        manifest.verify(folder, ["b.bin"], contents=False)
    assert not any(word.isdigit() for word in str(error.value).split())  # sizes tell counts
    (folder / "b.bin").unlink()
    with pytest.raises(DataError, match=r"b\.bin is missing"):
        manifest.verify(folder, ["b.bin"])
    with pytest.raises(DataError, match="not listed"):
        manifest.verify(folder, ["c.bin"])


@pytest.mark.parametrize("read", [read_file, describe_file])
@pytest.mark.parametrize("which", ["pipe", "device", "folder", "socket", "loop", "zero byte"])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path, read, which):
    path = tmp_path / "f"
    match which:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
        case "socket":
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(os.path.relpath(path))
        case "loop":
            path.symlink_to(path)
        case "zero byte":
            path = tmp_path / "a\0b"
    with pytest.raises(DataError, match=r"remove|[Rr]estore|give") as caught:
        read(path)
    assert str(caught.value).isprintable()


def test_a_file_that_unpacks_to_more_than_the_memory_is_refused():
    require_memory(Path("small"), 1 << 20)
    with pytest.raises(DataError, match="this machine has"):
        require_memory(Path("bomb"), 1 << 50)


def test_a_fact_has_the_type_that_is_asked_for(folder):
    manifest = Manifest.read(folder, "images")
    assert manifest.fact("records", int) == 2
    for name, kind in (("records", str), ("records", bool), ("none", int)):
        with pytest.raises(DataError, match=rf"No {name} of type .* {folder}.*again"):
            manifest.fact(name, kind)


@pytest.mark.parametrize("name", ["a\nb", "a\0b", "a\u202eb", "a\x1b[2J"])
def test_a_manifest_that_names_files_by_control_characters_is_refused(tmp_path, name):
    Manifest("images", {}, {name: {"bytes": 1, "sha256": "0"}}).write(tmp_path)
    with pytest.raises(DataError, match="not a manifest of this package"):
        Manifest.read(tmp_path, "images")


def test_a_manifest_with_a_field_more_or_less_is_refused(folder):
    path = folder / MANIFEST
    tree = json.loads(path.read_text())
    for changed in ({**tree, "place": "x"}, {k: v for k, v in tree.items() if k != "config"}):
        path.write_text(json.dumps(changed))
        with pytest.raises(DataError, match="is not a manifest"):
            Manifest.read(folder)


def test_a_failure_while_writing_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    write_file(tmp_path / "f", b"old", private=False)
    with pytest.raises(ZeroDivisionError), new_file(tmp_path / "f", private=False) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert (tmp_path / "f").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_private_files_are_closed_to_other_users(tmp_path):
    make_folder(tmp_path / "p" / "q", private=True)
    write_file(tmp_path / "p" / "q" / "f", b"x", private=True)
    Manifest("images", {}, {}).write(tmp_path / "p" / "q", private=True)
    assert all(stat.S_IMODE(p.stat().st_mode) & 0o077 == 0 for p in (tmp_path / "p").rglob("*"))
    assert stat.S_IMODE((tmp_path / "p").stat().st_mode) == 0o700


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from dpldm_dist.data.files import write_file\n"
        "from dpldm_dist.errors import RunError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: write_file(Path(sys.argv[1]), bytes(100_000), private=True)\n"
        "except RunError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "f")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("No space left") and done.stdout.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="Cannot write"):
        make_folder(tmp_path / "file" / "below", private=False)
    with pytest.raises(RunError, match="Cannot write"):
        write_file(tmp_path / "none" / "f", b"", private=False)


def test_random_damage_of_a_manifest_is_refused_or_changes_nothing(folder):
    path, rng = folder / MANIFEST, np.random.default_rng(1)
    whole, expected = path.read_bytes(), Manifest.read(folder)
    for _ in range(300):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), rng.integers(1, 4)):
            damaged[place] = rng.integers(0, 256)
        path.write_bytes(bytes(damaged[: rng.integers(1, len(whole) + 1)]))
        with suppress(DataError):
            assert Manifest.read(folder) == expected
    path.write_bytes(whole)
    assert Manifest.read(folder) == expected


def test_the_manifest_is_canonical_json(folder):
    text = (folder / MANIFEST).read_text()
    canonical = json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
    assert text == canonical + "\n"
