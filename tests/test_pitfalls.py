"""docs/pitfalls.md is kept by the suite: every line names tests, and they are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "pitfalls.md").read_text()
HEAD = ["pitfall", "severity", "how it is prevented", "test"]


def rows(page: str) -> list[list[str]]:
    """The cells of every line of every table, but for heads and rules."""
    lines = [line for line in page.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row != HEAD and set("".join(row)) != {"-"}]


def names(cell: str) -> list[str]:
    return re.findall(r"`(test_\w+)`", cell)


def suite() -> set[str]:
    """The names of all test functions that pytest collects here."""
    return {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def faults_of(page: str, there: set[str]) -> list[str]:
    """What is wrong with a page, line by line."""
    found = []
    for row in rows(page):
        if len(row) != len(HEAD):
            found.append(f"{row[0]}: {len(row)} cells")
        elif row[1] not in ("critical", "serious", "minor"):
            found.append(f"{row[0]}: severity {row[1]}")
        elif not names(row[3]):
            found.append(f"{row[0]}: no test")
        elif re.sub(r"`test_\w+`( \(planted\))?", "", row[3]).strip(", "):
            found.append(f"{row[0]}: more than names of tests: {row[3]}")
        found += [f"{row[0]}: no {name}" for name in names(row[-1]) if name not in there]
    return found


def test_every_line_names_tests_that_are_there():
    assert faults_of(PAGE, suite()) == []
    assert len(rows(PAGE)) > 70


def test_no_pitfall_stands_twice():
    titles = [row[0] for row in rows(PAGE)]
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize(
    "row",
    [
        "| A | critical | somehow | `test_that_is_not_there` |",
        "| A | critical | somehow | none yet |",
        "| A | critical | somehow | `test_every_line_names_tests_that_are_there`; else: none yet |",
        "| A | bad | somehow | `test_every_line_names_tests_that_are_there` |",
        "| A | critical | `test_every_line_names_tests_that_are_there` |",
    ],
)
def test_a_line_without_its_test_is_seen(row):
    assert faults_of(f"{PAGE}\n{row}\n", suite()) != []
