"""What all ledgers share: lines, lock, fencing, and what a crash leaves. (More in test_ledger.)"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import time
from dataclasses import dataclass, field

import pytest

from dpldm_dist.errors import PrivacyError, RunError
from dpldm_dist.privacy.chain import (
    REPAIR_FIELDS,
    ChainFile,
    canonical,
    contains,
    is_a,
    is_hex,
    read_chain,
)

GENESIS = {"format": 1}


@dataclass
class Notes:
    """The smallest book: notes, none of which says "no"."""

    noun = "Notebook"
    remedy = "Restore it."
    fields = {  # noqa: RUF012 - never changed
        "genesis": {"format": int},
        "note": {"text": str},
        "repair": REPAIR_FIELDS,
        "seal": {},
    }
    sealed: bool = False
    texts: list[str] = field(default_factory=list)
    repairs: list[tuple[int, bool]] = field(default_factory=list)

    def fault_of(self, body):
        return "says no" if body.get("text") == "no" else ""

    def take(self, body):
        if body["kind"] == "note":
            self.texts.append(body["text"])
        if body["kind"] == "repair":
            self.repairs.append((body["cut_bytes"], body["completed"]))
        self.sealed = body["kind"] == "seal"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "notes.jsonl"


def opened(path, **options):
    file = ChainFile.open(path, Notes(), **options)
    file.mend(GENESIS)
    return file


def written(path, texts=("a", "b")):
    with opened(path) as file:
        for text in texts:
            file.append({"kind": "note", "text": text})
    return path.read_bytes()


def notes_in(path):
    return read_chain(path, Notes()).book


def test_what_was_appended_is_read_again(path):
    written(path, ["a", "ü", "line\nbreak"])
    assert notes_in(path).texts == ["a", "ü", "line\nbreak"]
    assert len(path.read_bytes().splitlines()) == 4
    assert path.read_bytes().isascii()


def test_nothing_is_written_that_a_reader_would_refuse(path):
    with opened(path) as file:
        size = path.stat().st_size
        for body in (
            {"kind": "note", "text": "no"},
            {"kind": "note"},
            {"kind": "note", "text": 1},
            {"kind": "note", "text": "a", "more": 1},
            {"kind": "other"},
            {"kind": "genesis", "format": 1},
        ):
            with pytest.raises(RunError, match="was not written"):
                file.append(body)
        assert path.stat().st_size == size
        file.append({"kind": "note", "text": "yes"})
    assert notes_in(path).texts == ["yes"]


def test_an_entry_that_would_not_pass_for_a_torn_one_is_not_written(path):
    with opened(path) as file:
        with pytest.raises(RunError, match="expected at most"):
            file.append({"kind": "note", "text": "x" * 2048})
        file.append({"kind": "note", "text": "x" * 1900})
    whole = path.read_bytes()
    for cut in (1, 100, 1000, 1900):  # wherever the longest entry is torn, it is mended
        path.write_bytes(whole[:-cut])
        with opened(path) as file:
            file.append({"kind": "note", "text": "y"})
        assert notes_in(path).texts[-1] == "y"


@pytest.mark.parametrize("kept", range(1, 8))
def test_a_file_cut_anywhere_in_its_last_line_is_mended(path, kept):
    whole = written(path)
    start = whole.rindex(b"\n", 0, -1) + 1
    cut = start + kept * (len(whole) - start) // 8
    path.write_bytes(whole[:cut])
    opened(path).close()
    assert notes_in(path).repairs == [(cut - start, False)]
    assert notes_in(path).texts == ["a"]
    once = path.read_bytes()
    opened(path).close()
    assert path.read_bytes() == once  # there is nothing more to mend


def test_reading_mends_nothing(path):
    whole = written(path)[:-9]
    path.write_bytes(whole)
    assert notes_in(path).texts == ["a"]
    assert read_chain(path, Notes()).torn_bytes > 0
    assert path.read_bytes() == whole


def test_nothing_is_appended_before_the_end_is_mended(path):
    written(path)
    with ChainFile.open(path, Notes()) as file, pytest.raises(AssertionError, match="mend"):
        file.append({"kind": "note", "text": "c"})


def test_messages_name_the_file_by_what_it_is(path):
    whole = written(path)
    path.write_bytes(whole.replace(b'"a"', b'"z"'))
    with pytest.raises(PrivacyError, match=r"^Notebook .*, line 2 does not .*: .* Restore it\.$"):
        read_chain(path, Notes())


def hold_until_told(path, ready, leave):
    with opened(path) as file:
        ready.set()
        leave.wait()
        file.append({"kind": "note", "text": "by the first"})


def test_a_process_may_wait_for_the_lock_and_then_sees_what_was_written(path):
    context = multiprocessing.get_context("fork")
    ready, leave = context.Event(), context.Event()
    holder = context.Process(target=hold_until_told, args=(path, ready, leave))
    holder.start()
    ready.wait()
    with pytest.raises(RunError, match="busy"):
        opened(path)
    with pytest.raises(RunError, match="busy"):
        opened(path, wait_s=0.1)
    leave.set()
    with opened(path, wait_s=120.0) as file:
        file.append({"kind": "note", "text": "by the second"})
    holder.join()
    assert notes_in(path).texts == ["by the first", "by the second"]


def test_a_wait_that_is_over_asks_once_more(path, monkeypatch):
    with opened(path):
        asked = []
        flock = fcntl.flock
        monkeypatch.setattr(fcntl, "flock", lambda *a: asked.append(1) or flock(*a))
        monkeypatch.setattr(time, "sleep", lambda _: None)
        monkeypatch.setattr(time, "monotonic", iter([0.0, 0.5, 0.9, 1.0]).__next__)
        with pytest.raises(RunError, match="busy"):
            opened(path, wait_s=1.0)
        assert len(asked) == 3


def test_one_value_has_one_text():
    assert canonical({"b": 1, "a": [0.1, None, True]}) == b'{"a":[0.1,null,true],"b":1}'
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical(float("nan"))
    assert json.loads(canonical({"a": 1e-300})) == {"a": 1e-300}


def test_a_bool_is_no_number_and_upper_case_is_no_digest():
    assert is_a(1, int)
    assert not is_a(True, int)
    assert is_a(True, bool)
    assert is_hex("0af9", 4)
    assert not any(is_hex(value, 4) for value in ("0AF9", "0af", "0af9\n", "٠af9", 1234, None))


def test_a_head_names_one_chain(path):
    hashes = ["aa", "bb"]
    assert contains(hashes, (1, "bb"))
    assert contains(hashes, [0, "aa"])
    for nonsense in ((1, "aa"), (2, "bb"), (-1, "bb"), (True, "bb"), ("1", "bb"), (), None, "1bb"):
        assert not contains(hashes, nonsense)


def test_a_file_that_others_can_use_or_that_is_none_is_refused(path, tmp_path):
    written(path)
    path.chmod(0o604)
    with pytest.raises(PrivacyError, match="chmod 600"):
        opened(path)
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(RunError, match="regular file"):
        opened(tmp_path / "pipe")
