"""Data is read and never run: no pickle, no ``pipe:`` address, no path out of a tar, no YAML.

The first half scans the source of the package, the second gives it files that try.
"""

from __future__ import annotations

import ast
import io
import json
import pickle
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dpldm_dist.cli import main
from dpldm_dist.config import DatasetConfig, load_config
from dpldm_dist.data.images import open_source
from dpldm_dist.data.latents import LatentShards
from dpldm_dist.data.shards import ImageShards, read_images
from dpldm_dist.errors import ConfigError, DataError, DpldmError
from dpldm_dist.models.captions import CaptionEncoder
from dpldm_dist.models.directory import load_autoencoder, load_model
from dpldm_dist.models.extractors import load_inception
from dpldm_dist.runtime.checkpoint import Checkpoints
from tests.stages.tiny_run import public_model

PACKAGE = Path(__file__).parents[1] / "dpldm_dist"
SOURCES = sorted(PACKAGE.rglob("*.py"))
FORBIDDEN_IMPORTS = {
    "pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve",
    "jsonpickle", "yaml", "ruamel", "tensorflow", "code", "codeop", "pandas",
}  # fmt: skip
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "shutil.unpack_archive",
    "torch.jit.load", "torch.package.PackageImporter", "numpy.lib.format.read_array",
    "webdataset.WebDataset", "webdataset.gopen", "torch.hub.load",
}  # fmt: skip
FORBIDDEN_METHODS = {"extractall", "unpack_archive", "load_checkpoint"}
# Names of our own code, never of data: a table in the source, or an order that the driver wrote.
IMPORTERS = {"cli.py", "runtime/jobs.py", "models/extractors.py"}


# --- what the source may not say ----------------------------------------------------------------


def faults_of(source: str) -> list[str]:
    """Everything in a module that could run code out of data, or write where a tar says."""
    tree = ast.parse(source)
    return [fault for node in ast.walk(tree) for fault in _faults(node)]


def _faults(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (a.name for a in node.names if a.name.split(".")[0] in FORBIDDEN_IMPORTS)
    elif isinstance(node, ast.ImportFrom) and node.module:
        if node.module.split(".")[0] in FORBIDDEN_IMPORTS:
            yield node.module
    elif isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        said = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if name in FORBIDDEN_CALLS or name.split(".")[-1] in FORBIDDEN_METHODS:
            yield name
        if name in ("tar.extract", "archive.extract", "file.extract"):
            yield name
        if name in ("torch.load", "load") and said.get("weights_only") != "True":
            yield f"{name} without weights_only"
        if name in ("np.load", "numpy.load") and said.get("allow_pickle") != "False":
            yield f"{name} without allow_pickle=False"
        if said.get("shell", "False") != "False" or said.get("trust_remote_code") == "True":
            yield f"{name} runs code"
        if name.endswith("from_pretrained") and said.get("use_safetensors", "True") != "True":
            yield f"{name} may read pickles"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_module_can_unpickle_run_or_unpack_what_it_reads(path):
    assert faults_of(path.read_text()) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_are_imported_by_name_where_no_data_names_them(path):
    imports = "import_module" in path.read_text()
    assert not imports or str(path.relative_to(PACKAGE)) in IMPORTERS


@pytest.mark.parametrize(
    "bug",
    [
        "import pickle",
        "from yaml import safe_load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "tar.extractall(folder)",
        "tar.extract(member, folder)",
        "eval(text)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
        "webdataset.WebDataset(url)",
        "AutoModel.from_pretrained(folder, trust_remote_code=True)",
        "AutoModel.from_pretrained(folder, use_safetensors=False)",
    ],
)
def test_the_scan_sees_a_planted_line(bug):
    assert faults_of(f"def read(path):\n    {bug}\n")


def test_the_package_holds_source_and_templates_only():
    """And the kernels that were compiled from its source at installation."""
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    kernels = [path for path in files if path.parent == PACKAGE / "privacy" / "native"]
    assert {path.suffix for path in set(files) - set(kernels)} <= {".py", ".j2"}
    assert {path.suffix for path in kernels} <= {".py", ".c", ".so"}
    made = {path.name.split(".")[0] for path in kernels if path.suffix == ".so"}
    assert made <= {"_records_avx512", "_records_avx2"}


# --- files that try -----------------------------------------------------------------------------


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "ran"


@pytest.fixture
def evil(marker: Path) -> bytes:
    """A pickle that makes ``marker`` when it is loaded."""

    class Evil:
        def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
            return Path.touch, (marker,)

    return pickle.dumps(Evil())


def test_the_pickle_does_run_where_it_is_loaded(marker, evil):
    pickle.loads(evil)
    assert marker.exists()


PIPES = ("pipe:touch {0}", "pipe:touch {0} |", "|touch {0}", "$(touch {0})", "`touch {0}`")


@pytest.mark.parametrize("address", PIPES)
@pytest.mark.parametrize(
    "read",
    [
        lambda text: open_source(DatasetConfig(source=text)),
        lambda text: open_source(DatasetConfig(source=f"{text};.tar")),
        lambda text: ImageShards(Path(text)),
        lambda text: read_images(Path(text)),
        lambda text: LatentShards(Path(text)),
        lambda text: load_model(Path(text)),
        lambda text: load_autoencoder(Path(text)),
        lambda text: CaptionEncoder(Path(text)),
        lambda text: load_inception(Path(text)),
        lambda text: load_config(Path(text)),
        lambda text: Checkpoints(Path(text), keep=1).latest() or _nothing(),
    ],
    ids=[
        "source", "tar", "images", "all images", "latents", "model", "autoencoder", "captions",
        "inception", "config", "checkpoints",
    ],
)  # fmt: skip
def test_an_address_that_is_a_command_is_refused_and_not_run(read, address, marker):
    with pytest.raises(DpldmError):
        read(address.format(marker))
    assert not marker.exists()


def _nothing():
    raise DataError("no checkpoint")


ESCAPES = (
    "../evil.png",
    "../../evil.png",
    "a/../../evil.png",
    "/tmp/evil.png",
    "//evil.png",
    "./../evil.png",
    "..\\evil.png",
    "a\\..\\..\\evil.png",
    "C:/evil.png",
    "\u2024\u2024/evil.png",  # characters that look like dots
    "a\nb/evil.png",
    "%2e%2e/evil.png",
)


@pytest.mark.parametrize("name", ESCAPES)
def test_a_member_that_leads_out_of_its_tar_is_refused_and_nothing_is_written(tmp_path, name):
    _write_tar(tmp_path / "t.tar", [(name, _png()), (name.replace(".png", ".cls"), b"1")])
    before = _everything(tmp_path)
    with pytest.raises(DataError, match=r"t\.tar has a member .* that is no plain file"):
        open_source(DatasetConfig(source=str(tmp_path / "t.tar")))
    assert _everything(tmp_path) == before


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_link_in_a_tar_is_not_followed(tmp_path, kind):
    secret = tmp_path / "secret.png"
    secret.write_bytes(_png())
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        info = tarfile.TarInfo("a.png")
        info.type, info.linkname = kind, str(secret)
        tar.addfile(info)
    with pytest.raises(DataError, match="no plain file"):
        open_source(DatasetConfig(source=str(tmp_path / "t.tar")))


def test_a_table_cannot_name_files_out_of_its_folder(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.png").write_bytes(_png())
    for name in ("../secret.png", str(tmp_path / "secret.png"), "x/../../secret.png"):
        (tmp_path / "in" / "t.csv").write_text(f"file,label\n{name},1\n")
        with pytest.raises(DataError, match="below the folder of the CSV"):
            open_source(DatasetConfig(source=str(tmp_path / "in" / "t.csv")))


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch {0}']",
        "a: !!python/object/apply:subprocess.run [[touch, {0}]]",
        "data:\n  size: 32\n",
        "--- {{run: {{dir: x}}}}\n",
        "[run]\ndir = !!python/name:os.system\n",
    ],
)
def test_a_config_in_yaml_is_no_config(tmp_path, marker, text, capsys):
    path = tmp_path / "my.yaml"
    path.write_text(text.format(marker))
    with pytest.raises(ConfigError, match="is not valid TOML"):
        load_config(path)
    assert main(["plan", "--config", str(path)]) == 2
    assert "Traceback" not in capsys.readouterr().err and not marker.exists()


def test_pickles_in_the_place_of_weights_and_checkpoints_are_not_loaded(tmp_path, marker, evil):
    model = public_model(tmp_path / "model")
    for weights in sorted(model.rglob("*.safetensors")):
        copy = Path(shutil.copytree(model, tmp_path / "copy"))
        (copy / weights.relative_to(model)).write_bytes(evil)
        with pytest.raises(DataError):
            load_model(copy)
        shutil.rmtree(copy)
    for name in ("weights.pth", "weights.safetensors", "weights.pt"):
        (tmp_path / name).write_bytes(evil)
        with pytest.raises(DpldmError):
            load_inception(tmp_path / name)
    checkpoints = Checkpoints(tmp_path / "saved", keep=2)
    for step in (1, 2):
        path = checkpoints.save(step, {"weight": torch.zeros(2)}, {})
    for name in ("tensors.safetensors", "facts.json", "manifest.json"):
        whole = (path / name).read_bytes()
        (path / name).write_bytes(evil)
        assert checkpoints.latest().step == 1
        (path / name).write_bytes(whole)
    assert checkpoints.latest().step == 2 and not marker.exists()


def test_code_beside_a_model_is_not_imported(tmp_path, marker):
    """A model directory may name classes and files of code: none of them is looked for."""
    model = public_model(tmp_path / "model")
    code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
    for name in ("pipeline.py", "unet/modeling.py", "vae/modeling.py", "unet/__init__.py"):
        (model / name).write_text(code)
    for name in ("unet/config.json", "vae/config.json", "model_index.json"):
        facts = json.loads((model / name).read_text())
        auto_map = {"AutoModel": "modeling.Evil"}
        (model / name).write_text(json.dumps({**facts, "auto_map": auto_map, "_evil": "modeling"}))
    load_model(model)
    assert not marker.exists()


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def _write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def _everything(folder: Path) -> set[Path]:
    return set(folder.parent.rglob("*")) | set(Path("/tmp").glob("evil*"))
