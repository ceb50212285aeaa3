"""One tree of errors: each survives pickling and has the exit code of its kind."""

from __future__ import annotations

import pickle

import pytest

from dpldm_dist import errors
from dpldm_dist.cli import main
from dpldm_dist.runtime.failures import CollateralError, Preempted

CODES = {
    errors.DpldmError: 1,
    errors.ConfigError: 2,
    errors.DataError: 3,
    errors.PrivacyError: 4,
    errors.BudgetReached: 4,
    errors.WorkerError: 5,
    CollateralError: 5,
    errors.RunError: 6,
    errors.BringUpError: 70,
    errors.NodeLostError: 71,
    errors.SavedAndStopped: 75,
    Preempted: 75,
}


def every_class(root: type = errors.DpldmError) -> list[type]:
    """All error classes of the package; tests may define more of their own."""
    below = [found for child in root.__subclasses__() for found in every_class(child)]
    return [found for found in (root, *below) if found.__module__.startswith("dpldm_dist.")]


def test_every_class_is_known_here():
    assert set(every_class()) == set(CODES)


@pytest.mark.parametrize("kind", CODES)
def test_every_class_survives_pickling_and_has_its_exit_code(kind):
    copy = pickle.loads(pickle.dumps(kind("found, expected, do")))
    assert type(copy) is kind and str(copy) == "found, expected, do"
    assert copy.exit_code == CODES[kind]


@pytest.mark.parametrize("kind", CODES)
def test_a_message_is_one_line_whatever_a_file_is_called(kind):
    name = "a\nb\r\x1b[2Jc\u202ed\u2028e\x85é"
    shown = str(kind(f"{name} is missing: restore it."))
    assert shown.isprintable() and shown.endswith("é is missing: restore it.")
    assert pickle.loads(pickle.dumps(kind(name))).args == (name,)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["plan", "--set", "privacy.clipnorm=1"], 2, "Did you mean 'clip_norm'"),
        (["plan", "--set", "run.workers=many"], 2, "run.workers = 'many'"),
        (["plan", "--set", "finetune.steps"], 2, "expected section.key=value"),
        (["plan", "--config", "no-such-file.toml"], 2, "Cannot read the config no-such-file.toml"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_code_2(arguments, code, said, capsys):
    assert main(arguments) == code
    shown = capsys.readouterr().err.strip()
    assert said in shown and "\n" not in shown
