"""Data sets at an address: fetched once per node, verified, bounded, and closed to others."""

from __future__ import annotations

import functools
import http.server
import multiprocessing
import os
import shutil
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar
from unittest import mock

import fsspec
import numpy as np
import pytest

from dpldm_dist.config import Config, parse_config
from dpldm_dist.data import remote
from dpldm_dist.data.latents import LatentShards, all_latents
from dpldm_dist.data.manifest import MANIFEST, Manifest
from dpldm_dist.data.remote import Mirror
from dpldm_dist.errors import ConfigError, DataError, PrivacyError
from dpldm_dist.runtime.rundir import dataset_budget_file, dataset_dir
from dpldm_dist.stages.places import place_of
from tests.data.test_latents import RECORDS, SHARDS, write_all

AMPLE = 1 << 30
NUMBER = 1664  # where the first moments begin


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_all(tmp_path_factory.mktemp("source"))


@pytest.fixture(autouse=True)
def at_once(monkeypatch) -> None:
    monkeypatch.setattr(remote, "_WAIT_S", 0.0)


@pytest.fixture
def url(source) -> Iterator[str]:
    """The data set in fsspec's memory."""
    files = fsspec.filesystem("memory")
    for path in source.iterdir():
        files.pipe_file(f"/bucket/set/{path.name}", path.read_bytes())
    yield "memory://bucket/set"
    files.rm("/bucket", recursive=True)


def remote_file(name: str) -> str:
    return f"/bucket/set/{name}"


def everything(latents: LatentShards) -> np.ndarray:
    places = np.arange(RECORDS)
    return np.concatenate([latents.records(s, places).moments for s in range(SHARDS)])


def fetched(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")} - {MANIFEST}


# --- what is read ---------------------------------------------------------------------------------


def test_an_address_gives_the_records_of_its_folder(source, url, tmp_path):
    mirror = Mirror(url, tmp_path / "cache" / "set", most_bytes=AMPLE)
    latents = LatentShards(mirror)
    assert latents.manifest.digest == Manifest.read(source).digest
    assert fetched(mirror.folder) == set()  # nothing before it is needed
    assert np.array_equal(
        latents.records(1, np.arange(3)).moments, _of(source).records(1, np.arange(3)).moments
    )
    assert fetched(mirror.folder) == {"latents-00001.tar", "latents-00001.index.npy"}
    assert np.array_equal(everything(latents), everything(_of(source)))
    assert np.array_equal(all_latents(mirror).moments, everything(_of(source)))


def _of(folder: Path) -> LatentShards:
    return LatentShards(folder)


def test_counting_fetches_tables_only(url, tmp_path):
    mirror = Mirror(url, tmp_path / "cache" / "set", most_bytes=AMPLE)
    latents = LatentShards(mirror)
    assert [latents.count(shard) for shard in range(SHARDS)] == [RECORDS] * SHARDS
    assert all(name.endswith(".index.npy") for name in fetched(mirror.folder))


class _Counting(http.server.SimpleHTTPRequestHandler):
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def served(source) -> Iterator[str]:
    """The data set on an HTTP server of this machine."""
    _Counting.asked = []
    handler = functools.partial(_Counting, directory=str(source))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def _read_all(url: str, folder: str) -> float:
    return float(everything(LatentShards(Mirror(url, Path(folder), most_bytes=AMPLE))).sum())


def test_workers_of_a_node_fetch_each_file_once_over_http(source, served, tmp_path):
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        sums = pool.starmap(_read_all, [(served, str(tmp_path / "cache" / "set"))] * 2)
    assert sums == [float(everything(_of(source)).sum())] * 2
    asked = [path for path in _Counting.asked if MANIFEST not in path]
    assert sorted(asked) == sorted(set(asked)) and len(asked) == 2 * SHARDS


def test_a_server_that_is_gone_is_named_without_hanging(served, tmp_path):
    with pytest.raises(DataError, match=r"Cannot fetch manifest.json of http://127.0.0.1:1: "):
        Mirror("http://127.0.0.1:1", tmp_path / "cache" / "set", most_bytes=AMPLE)


# --- what is not believed -------------------------------------------------------------------------


def test_a_cached_shard_with_one_flipped_byte_is_never_used(source, url, tmp_path):
    """Planted: by a bad disk, between two starts and during one."""
    folder = tmp_path / "cache" / "set"
    for _ in range(2):
        latents = LatentShards(Mirror(url, folder, most_bytes=AMPLE))
        for _ in range(2):
            assert np.array_equal(everything(latents), everything(_of(source)))
            flip(folder / "latents-00001.tar", NUMBER)
    flip(folder / "latents-00002.index.npy", 200)
    latents = LatentShards(Mirror(url, folder, most_bytes=AMPLE))
    assert latents.count(2) == RECORDS
    assert np.array_equal(everything(latents), everything(_of(source)))


def test_a_reader_that_trusts_the_cache_would_use_it(url, tmp_path):
    """The test above can fail: without verification the flipped byte is handed out."""
    folder = tmp_path / "cache" / "set"
    before = everything(LatentShards(Mirror(url, folder, most_bytes=AMPLE)))
    flip(folder / "latents-00001.tar", NUMBER)
    with mock.patch.object(LatentShards, "_require_content", lambda self, name: None):
        after = everything(LatentShards(Mirror(url, folder, most_bytes=AMPLE)))
    assert not np.array_equal(before, after)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_shard_that_is_damaged_at_its_address_stops_with_its_name(url, tmp_path):
    files = fsspec.filesystem("memory")
    content = bytearray(files.cat_file(remote_file("latents-00000.tar")))
    content[NUMBER] ^= 1
    files.pipe_file(remote_file("latents-00000.tar"), bytes(content))
    mirror = Mirror(url, tmp_path / "cache" / "set", most_bytes=AMPLE)
    with pytest.raises(DataError, match="latents-00000.tar of memory://bucket/set: its content"):
        LatentShards(mirror).records(0, np.arange(1))
    assert "latents-00000.tar" not in fetched(mirror.folder)


def test_a_file_that_has_no_end_is_not_fetched_to_it(url, tmp_path):
    files = fsspec.filesystem("memory")
    name = "latents-00000.tar"
    files.pipe_file(remote_file(name), files.cat_file(remote_file(name)) + bytes(10**7))
    mirror = Mirror(url, tmp_path / "cache" / "set", most_bytes=AMPLE)
    with pytest.raises(DataError, match="Cannot fetch latents-00000.tar"):
        LatentShards(mirror).records(0, np.arange(1))
    assert not any(path.name.startswith(f".{name}") for path in mirror.folder.iterdir())


def test_what_is_missing_at_the_address_is_named(url, tmp_path):
    fsspec.filesystem("memory").rm(remote_file("latents-00002.tar"))
    latents = LatentShards(Mirror(url, tmp_path / "cache" / "set", most_bytes=AMPLE))
    with pytest.raises(DataError, match="latents-00002.tar of memory://bucket/set: it is missing"):
        latents.records(2, np.arange(1))


def test_a_network_that_fails_once_is_asked_again(source, url, tmp_path, monkeypatch):
    files = fsspec.filesystem("memory")
    whole, calls = type(files).get_file, []

    def unsteady(self, rpath, lpath, **rest):
        calls.append(rpath)
        if calls.count(rpath) % 3:
            Path(lpath).write_bytes(b"half")
            raise ConnectionResetError("signature=secret")
        return whole(self, rpath, lpath, **rest)

    monkeypatch.setattr(type(files), "get_file", unsteady)
    latents = LatentShards(Mirror(url, tmp_path / "cache" / "set", most_bytes=AMPLE))
    assert np.array_equal(everything(latents), everything(_of(source)))
    monkeypatch.setattr(remote, "_TRIES", 2)
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(DataError, match="ConnectionResetError") as caught:
        Mirror(url, tmp_path / "cache" / "set", most_bytes=AMPLE)
    assert "secret" not in str(caught.value)


# --- room and permissions -------------------------------------------------------------------------


def test_the_cache_never_holds_more_than_it_may_and_every_record_is_still_read(
    source, url, tmp_path
):
    shard = (source / "latents-00000.tar").stat().st_size
    table = (source / "latents-00000.index.npy").stat().st_size
    most = int(2.5 * (shard + table))
    mirror = Mirror(url, tmp_path / "cache" / "set", most_bytes=most)
    latents = LatentShards(mirror)
    wanted = _of(source)
    generator = np.random.default_rng(0)
    for _ in range(30):
        shards = generator.integers(0, SHARDS, 4)
        places = generator.integers(0, RECORDS, 4)
        assert np.array_equal(
            latents.gather(shards, places).moments, wanted.gather(shards, places).moments
        )
        held = sum((mirror.folder / name).stat().st_size for name in fetched(mirror.folder))
        assert held <= most


def test_a_count_of_the_cache_that_is_lost_or_torn_is_made_anew(source, url, tmp_path):
    mirror = Mirror(url, tmp_path / "cache" / "set", most_bytes=AMPLE)
    latents, book = LatentShards(mirror), tmp_path / "cache" / ".lock"
    for shard, torn in enumerate((b"", b"123", b"-" * 20)):
        book.write_bytes(torn)
        latents.records(shard, np.arange(1))
        held = sum((mirror.folder / name).stat().st_size for name in fetched(mirror.folder))
        assert int(book.read_bytes()) == held


def test_a_cache_smaller_than_a_shard_is_refused(url, tmp_path):
    latents = LatentShards(Mirror(url, tmp_path / "cache" / "set", most_bytes=1000))
    with pytest.raises(DataError, match=r"is larger than the cache: raise data\.cache_gb"):
        latents.records(0, np.arange(1))


def test_the_cache_is_closed_to_other_users_whatever_the_umask(url, tmp_path):
    previous = os.umask(0)
    try:
        everything(LatentShards(Mirror(url, tmp_path / "cache" / "set", most_bytes=AMPLE)))
    finally:
        os.umask(previous)
    for path in (tmp_path / "cache").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700


# --- in a config ----------------------------------------------------------------------------------


def config_of(tmp_path: Path, place: str, **privacy: object) -> Config:
    numbers = {"epsilon": 1.0, "delta": 1e-5, "clip_norm": 1.0, **privacy}
    data = {"private": {"latents": place}, "cache_dir": str(tmp_path / "cache")}
    return parse_config({"data": data, "run": {"dir": str(tmp_path / "run")}, "privacy": numbers})


def test_private_latents_may_be_an_address(source, url, tmp_path):
    config = config_of(tmp_path, url)
    latents = LatentShards(place_of(config, "private", "latents"))
    assert np.array_equal(everything(latents), everything(_of(source)))
    folder = dataset_dir(config, "private", "latents")
    assert folder.parent == tmp_path / "cache" and "bucket" not in folder.name
    assert dataset_budget_file(config).parent.parent == tmp_path / "run"  # not in the cache
    (folder / "latents-00000.tar").chmod(0o644)
    with pytest.raises(PrivacyError, match="Other users may use"):
        place_of(config, "private", "latents")


@pytest.mark.parametrize(
    "address",
    [
        "https://user:word@host/set",
        "https://host/set?signature=1",
        "s3://bucket/set#x",
        "pipe://cat /etc/passwd",
        "file:///etc",
        "filecache::s3://bucket/set",
        "reference://x",
        "S3://bucket/set",
        "s3://",
    ],
)
def test_other_addresses_and_those_with_credentials_are_refused(tmp_path, address):
    with pytest.raises(ConfigError, match="credentials belong into the environment"):
        config_of(tmp_path, address)


def test_a_budget_beside_an_address_needs_a_file_of_its_own(tmp_path):
    budget = {"dataset_epsilon": 5.0, "dataset_delta": 1e-5}
    with pytest.raises(ConfigError, match=r"privacy\.dataset_ledger: expected the file"):
        config_of(tmp_path, "s3://bucket/set", **budget)
    config = config_of(
        tmp_path, "s3://bucket/set", **budget, dataset_ledger=str(tmp_path / "b.jsonl")
    )
    assert dataset_budget_file(config) == tmp_path / "b.jsonl"


def test_a_source_is_not_prepared_into_an_address(tmp_path):
    data = {"public": {"source": "builtin:letters", "images": "s3://bucket/images"}}
    with pytest.raises(ConfigError, match="an address is only read"):
        parse_config({"data": data})
