"""Imports point down only, and each heavy library has one importer."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpldm_dist.cli import COMMANDS

PACKAGE = Path(__file__).parent.parent / "dpldm_dist"
FLOOR = {"cli": 4, "demo": 4, "audit": 4, "__main__": 5, "stages": 3, "data": 2, "runtime": 2}
FLOOR |= {"config": 1, "privacy": 1, "models": 1, "errors": 0, "": 0}
ALLOWED_IMPORTERS = {
    "ray": tuple(f"runtime/{name}_ray.py" for name in ("launch", "policies", "submit", "slurm")),
    "deepspeed": r"runtime/strategy_deepspeed.py",
    "webdataset": r"data/shards.py",
    "fsspec": r"data/remote.py",
    "opacus": r"privacy/",
    "pickle": None,
    "yaml": None,
}


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0] if parts[0] != "__init__" else ""


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_imports_point_down_only(path):
    here = room(path)
    for name in imports_of(path):
        if not name.startswith("dpldm_dist."):
            continue
        there = name.split(".")[1]
        if there not in FLOOR or there == here:
            continue
        assert FLOOR[there] < FLOOR[here] or there == "", f"{path} imports {name}"


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_each_heavy_library_has_one_importer(path):
    place = str(path.relative_to(PACKAGE))
    for name in imports_of(path):
        allowed = ALLOWED_IMPORTERS.get(name.split(".")[0], "")
        assert allowed is not None, f"{place} imports {name}: forbidden"
        assert place.startswith(allowed), f"{place} imports {name}: only {allowed} may"


def test_stages_know_nothing_of_each_other():
    names = {command.function.partition(":")[0].rpartition(".")[2] for command in COMMANDS.values()}
    for path in (PACKAGE / "stages").rglob("*.py"):
        here = path.relative_to(PACKAGE / "stages").with_suffix("").parts[0]
        for name in imports_of(path):
            parts = name.split(".")
            if parts[:2] == ["dpldm_dist", "stages"] and len(parts) > 2:
                assert parts[2] == here or parts[2] not in names, f"{path.name} imports {name}"


def calls_of(path: Path) -> list[tuple[str, set[str]]]:
    """Every call as written, with the names of its keyword arguments that are plain True."""
    return [
        (
            ast.unparse(node.func),
            {
                k.arg
                for k in node.keywords
                if isinstance(k.value, ast.Constant) and k.value.value is True
            },
        )
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    ]


def test_nothing_is_ever_unpickled():
    for path in PACKAGE.rglob("*.py"):
        for name, switched_on in calls_of(path):
            assert "allow_pickle" not in switched_on, path
            assert name != "torch.load" or "weights_only" in switched_on, path
            assert name not in ("eval", "exec", "torch.jit.load"), path


def test_help_answers_without_loading_torch():
    code = "import sys; from dpldm_dist.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'ray', 'diffusers', 'pydantic') if m in sys.modules])"
    started = time.perf_counter()
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines()[-1] == "[]"
    assert "finetune" in shown.stdout
    assert time.perf_counter() - started < 10  # a hang, not a benchmark
