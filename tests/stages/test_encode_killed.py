"""A start of encode that is killed loses the shard that it was writing, and no other."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from dpldm_dist.data import latents as latents_module
from dpldm_dist.data.manifest import MANIFEST, Manifest
from dpldm_dist.runtime.rundir import dataset_dir
from dpldm_dist.runtime.worker import solo_worker
from dpldm_dist.stages.encode import encode, pretrain_autoencoder
from tests.stages.tiny_data import tiny_config, write_images

SHARDS, KILLED_AT = 6, 3


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run whose images are encoded without an accident, and one that has yet to encode."""
    root = tmp_path_factory.mktemp("runs")
    config = tiny_config(root / "run")
    write_images(config, "public", records=24, shards=SHARDS)
    pretrain_autoencoder(config, solo_worker())
    shutil.copytree(root / "run", root / "fresh")
    encode(config, solo_worker())
    return root


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _in_the_middle_of_the_tar() -> Any:
    return mock.patch.object(
        latents_module, "_packed", _after(4 * KILLED_AT + 2, latents_module._packed)
    )


def _between_tar_and_table() -> Any:
    return mock.patch.object(latents_module, "_table", _after(KILLED_AT, latents_module._table))


def _between_table_and_entry() -> Any:
    return mock.patch.object(
        latents_module, "describe_files", _after(KILLED_AT, latents_module.describe_files)
    )


def _after(calls: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which kills its process when it is called once more than so often."""
    made = []

    def counted(*arguments: Any, **rest: Any) -> Any:
        made.append(None)
        if len(made) > calls:
            die()
        return function(*arguments, **rest)

    return counted


def killed(config: Any, where: Callable[[], Any]) -> None:
    """Run encode in a process of its own that dies ``where``."""
    child = os.fork()
    if child == 0:
        try:
            with where():
                encode(config, solo_worker())
        finally:
            os._exit(1)  # it should not have come so far
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize(
    "where", [_in_the_middle_of_the_tar, _between_tar_and_table, _between_table_and_entry]
)
def test_a_killed_encode_makes_only_the_shards_anew_that_were_being_written(whole, tmp_path, where):
    shutil.copytree(whole / "fresh", tmp_path / "run")
    config = tiny_config(tmp_path / "run")
    folder = dataset_dir(config, "public", "latents")
    killed(config, where)
    assert not (folder / MANIFEST).exists()
    kept = {path: path.stat() for path in folder.glob("latents-*.tar")}
    finished = {path for path in kept if (folder / f"{path.stem}.entry.json").exists()}
    assert len(finished) == KILLED_AT
    written: list[str] = []
    write = latents_module.write_tar

    def noted(path: Path, *arguments: Any, **rest: Any) -> int:
        written.append(path.name)
        return write(path, *arguments, **rest)

    with mock.patch.object(latents_module, "write_tar", noted):
        made = encode(config, solo_worker())
    assert len(written) == SHARDS - KILLED_AT
    for path in finished:
        assert path.name not in written
        assert path.stat().st_mtime_ns == kept[path].st_mtime_ns
    wanted = Manifest.read(dataset_dir(tiny_config(whole / "run"), "public", "latents"))
    assert made.files == wanted.files  # byte for byte
