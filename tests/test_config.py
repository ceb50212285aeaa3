"""A config is taken as its file says it, or refused in one line that names file and key."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest

from dpldm_dist.config import Config, load_config, parse_config, refuse_other_settings, with_changes
from dpldm_dist.errors import ConfigError, RunError

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))
PRIVACY = {"epsilon": 5.0, "delta": 1e-6, "clip_norm": 1.0}


def refused(tree: dict, match: str) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        parse_config(tree)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


def written(folder: Path, text: str) -> Path:
    path = folder / "my.toml"
    path.write_bytes(text.encode())
    return path


# --- taken as it stands -------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_shipped_config_is_taken_and_survives_its_own_dump(path):
    config = load_config(path)
    assert (
        parse_config(config.model_dump()) == config == parse_config(config.model_dump(mode="json"))
    )
    said = tomllib.loads(path.read_text())
    assert {name for name in said} <= Config.model_fields.keys()


def test_lists_texts_and_whole_numbers_stand_for_tuples_paths_and_floats():
    config = parse_config(
        {"model": {"block_channels": [8, 16]}, "run": {"dir": "a/b", "timeout_s": 5}}
    )
    assert config.model.block_channels == (8, 16)
    assert config.run.dir == Path("a/b") and config.run.timeout_s == 5.0


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("privacy", "epsilon", True),
        ("privacy", "epsilon", "5.0"),
        ("privacy", "delta", [1e-6]),
        ("privacy", "records", 20000.5),
        ("privacy", "records", "20000"),
        ("privacy", "allow_duplicates", 1),
        ("privacy", "allow_duplicates", "false"),
        ("data", "size", True),
        ("data", "size", "32"),
        ("data", "channels", True),
        ("data", "channels", 3.0),
        ("data", "flips", 0),
        ("data", "flips", "yes"),
        ("data", "public", "photos"),
        ("run", "microbatch", 2.5),
        ("run", "dir", 3),
        ("run", "unsafe_no_noise", "no"),
        ("autoencoder", "block_channels", [8, True]),
        ("autoencoder", "block_channels", [8, "16"]),
        ("autoencoder", "block_channels", 8),
        ("sample", "formats", "png"),
        ("finetune", "betas", [0.9, "0.99"]),
    ],
)
def test_no_value_becomes_one_of_another_type(section, key, value):
    needed = {"privacy": PRIVACY, "finetune": {"steps": 1, "batch": 1}}
    tree = {**needed, section: {**needed.get(section, {}), key: value}}
    refused(tree, rf"{section}\.{key}")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 10**400])
@pytest.mark.parametrize("key", PRIVACY)
def test_a_privacy_number_that_is_none_is_refused(key, value):
    refused({"privacy": {**PRIVACY, key: value}}, rf"privacy\.{key}")


def test_numbers_that_no_float_holds_exactly_are_refused():
    for value in (2**53 + 1, -(2**60), 10**5000):
        refused({"sample": {"seed": value}}, r"sample\.seed: expected a number of at most 9007")
    assert parse_config({"sample": {"seed": 2**53}}).sample.seed == 2**53


@pytest.mark.parametrize(
    "text", ["a\0b", "a\nb", "a\x1b[2Jb", "a\u202egnp.exe", "a\u2028b", "\ud800", "\u2066a"]
)
def test_control_characters_are_refused_in_values_and_names(text):
    refused({"run": {"dir": text}}, r"run\.dir = .* no control characters")
    refused({"data": {"private": {"classes": ["a", text]}}}, r"data\.private\.classes\.1")
    refused({"evaluate": {"compare": {text: "x"}}}, r"a name in evaluate\.compare")


def test_what_no_file_can_be_called_is_refused():
    refused({"run": {"dir": "a/" + "x" * 256}}, r"run\.dir = .* at most 255 bytes")
    refused({"run": {"dir": "~nobody-of-that-name/x"}}, r"run\.dir = .*: no such user")
    assert parse_config({"run": {"dir": "~/x"}}).run.dir == Path("~/x")


def test_a_typing_error_is_answered_with_what_was_meant():
    refused({"finetune": {"steps": 1, "batch": 1, "drawz": 3}}, "Did you mean 'draws'")
    refused(
        {"privacy": {**PRIVACY, "epsilοn": 1}}, "Unknown option 'privacy.epsil"
    )  # Greek omicron
    refused({"zzz": 1}, "Unknown option 'zzz'. Remove it")


def test_many_faults_are_one_short_line():
    refused({f"key{n}": n for n in range(1000)}, "; 995 more$")


# --- files that are none ------------------------------------------------------------------------


def test_a_message_names_the_file_and_whether_options_were_given_beside_it(tmp_path):
    path = written(tmp_path, "[data]\nsize = 4\n")
    with pytest.raises(ConfigError, match=rf"^{path}: data\.size = 4: should be greater"):
        load_config(path)
    with pytest.raises(ConfigError, match=rf"^{path} with --set: data\.size = 5"):
        load_config(path, ["data.size=5"])
    with pytest.raises(ConfigError, match=r"^data\.size = 5"):
        load_config(None, ["data.size=5"])


@pytest.mark.parametrize("which", ["pipe", "device", "folder", "missing", "zero byte", "loop"])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path, which):
    path = tmp_path / "my.toml"
    match which:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path = Path("/dev/zero")
        case "folder":
            path.mkdir()
        case "zero byte":
            path = Path("a\0b")
        case "loop":
            path.symlink_to(path)
    with pytest.raises(ConfigError, match=r"[Gg]ive a TOML file"):
        load_config(path)


@pytest.mark.parametrize(
    "text",
    [
        "a" + ".a" * 100_000 + " = 1",  # tomllib alone would take all memory
        "[a" + ".'a'" * 50_000 + "]",
        "x = " + "[" * 100_000,
        "x = " + "{a = " * 400 + "1" + "}" * 400,
        "a" + ".a" * 40 + " = 1",
    ],
    ids=["dotted key", "dotted section", "lists", "tables", "nine names"],
)
def test_what_is_nested_without_end_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match="nested too deeply"):
        load_config(written(tmp_path, text))


def test_a_file_longer_than_any_config_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="longer than"):
        load_config(written(tmp_path, "# x\n" * 100_000))


@pytest.mark.parametrize("text", ["a = 1979-05-27", "a = 07:32:00", "a = 1979-05-27T07:32:00Z"])
def test_dates_are_no_settings(tmp_path, text):
    with pytest.raises(ConfigError, match="A date or time"):
        load_config(written(tmp_path, text))


@pytest.mark.parametrize(
    "text",
    ["a = " + "9" * 5000, "a = 1979-99-99", "\ufeffa = 1", "a = 1\na = 2", "\xff", "a = \x01"],
)
def test_what_is_no_toml_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match="is not valid TOML"):
        load_config(written(tmp_path, text))


def test_an_option_holds_one_value_and_nothing_behind_it():
    assert load_config(None, ["run.workers=2"]).run.workers == 2
    with pytest.raises(ConfigError, match="control characters"):
        load_config(None, ["run.workers=2\nlauncher='ray'"])


# --- comparing with what was made before --------------------------------------------------------


def test_settings_of_a_damaged_manifest_are_others():
    for found in ({}, {"data": None}, {"data": []}, {"data": {"size": "a\nb"}}):
        with pytest.raises(RunError, match=r"data\.size = ") as caught:
            refuse_other_settings(found, {"data": {"size": 32}}, Path("x"))
        assert "\n" not in str(caught.value)
    refuse_other_settings({"data": {"size": 32, "more": 1}}, {"data": {"size": 32}}, Path("x"))


def test_changes_are_checked_as_a_file_is():
    config = parse_config({"privacy": PRIVACY})
    assert with_changes(config, privacy={"epsilon": 1.0}).privacy.epsilon == 1.0
    with pytest.raises(ConfigError, match=r"privacy\.epsilon"):
        with_changes(config, privacy={"epsilon": True})
