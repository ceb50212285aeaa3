"""Ways to damage a file or to make it hostile. Each takes what is there and dice, and says in a few
words what it did. None knows what reads the file; ``kinds.py`` chooses among them.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

HUGE = (2**31, 2**63, -(2**63), 10**30, 10**400)
ODD_NUMBERS = (0, -1, 1, True, False, 0.5, -0.0, 1e308, 5e-324, float("nan"), float("inf"), *HUGE)
ODD_TEXTS = (
    "",
    " ",
    "x" * 5000,
    "../../etc/passwd",
    "/etc/passwd",
    "/dev/zero",
    "a\0b",
    "a\nb",
    "~nobody-of-that-name/x",
    "\u202egnp.exe",
    "ne\u0301e",
    "\ud7ff\uffff",
    "pipe:touch marker",
    "0",
    "1e5",
    "none",
)
_LOOKALIKES = str.maketrans("aceiops", "асеіорѕ")  # Cyrillic letters in place of Latin ones


class Evil:
    """Unpickling it makes a file: the mark that somebody ran what they should have read."""

    def __init__(self, marker: Path):
        self._marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self._marker,)


def evil_pickle(marker: Path) -> bytes:
    return pickle.dumps(Evil(marker))


def evil_npy(marker: Path) -> bytes:
    """A ``.npy`` file of Python objects: loading it with pickles allowed runs code."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([Evil(marker)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


# --- bytes --------------------------------------------------------------------------------------


def damaged_bytes(data: bytes, dice: Random) -> tuple[bytes, str]:
    """``data`` with one to three accidents."""
    done = []
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        accident = dice.choice(_ACCIDENTS)
        data = accident(bytearray(data) or bytearray(1), dice)
        done.append(accident.__name__.strip("_"))
    return data, " and ".join(done)


def _place(data: bytearray, dice: Random) -> int:
    return dice.randrange(len(data))


def _flipped_bit(data: bytearray, dice: Random) -> bytes:
    data[_place(data, dice)] ^= 1 << dice.randrange(8)
    return bytes(data)


def _noise(data: bytearray, dice: Random) -> bytes:
    at = _place(data, dice)
    data[at : at + 8] = dice.randbytes(len(data[at : at + 8]))
    return bytes(data)


def _truncated(data: bytearray, dice: Random) -> bytes:
    return bytes(data[: _place(data, dice)])


def _zero_block(data: bytearray, dice: Random) -> bytes:
    at = _place(data, dice)
    data[at : at + 512] = bytes(len(data[at : at + 512]))
    return bytes(data)


def _inserted(data: bytearray, dice: Random) -> bytes:
    at = _place(data, dice)
    return bytes(data[:at]) + dice.randbytes(dice.randint(1, 600)) + bytes(data[at:])


def _cut_out(data: bytearray, dice: Random) -> bytes:
    at = _place(data, dice)
    del data[at : at + dice.choice((1, 16, 512, 600))]
    return bytes(data)


def _spliced(data: bytearray, dice: Random) -> bytes:
    """A part of the file stands in another place of it too."""
    begin, at = _place(data, dice), _place(data, dice)
    part = data[begin : begin + dice.choice((1, 64, 512, 2048))]
    return bytes(data[:at] + part + data[at:])


def _halves_swapped(data: bytearray, dice: Random) -> bytes:
    at = _place(data, dice)
    return bytes(data[at:] + data[:at])


def _appended(data: bytearray, dice: Random) -> bytes:
    return bytes(data) + dice.choice((b"\0" * 512, b"\n", b"junk", dice.randbytes(700)))


def _emptied(data: bytearray, dice: Random) -> bytes:
    return b""


_ACCIDENTS = (
    _flipped_bit,
    _flipped_bit,
    _noise,
    _truncated,
    _zero_block,
    _inserted,
    _cut_out,
    _spliced,
    _halves_swapped,
    _appended,
    _emptied,
)


# --- lines of text ------------------------------------------------------------------------------


def damaged_lines(data: bytes, dice: Random) -> tuple[bytes, str]:
    """``data`` with a line repeated, lost, moved, merged or written in odd characters."""
    lines = data.splitlines(keepends=True) or [b"\n"]
    at, other = dice.randrange(len(lines)), dice.randrange(len(lines))
    match dice.randrange(8):
        case 0:
            lines.insert(other, lines[at])
            return b"".join(lines), "a line twice"
        case 1:
            del lines[at]
            return b"".join(lines), "a line missing"
        case 2:
            lines[at], lines[other] = lines[other], lines[at]
            return b"".join(lines), "two lines swapped"
        case 3:
            return data.replace(b"\n", b"\r\n"), "other ends of lines"
        case 4:
            return b"\xef\xbb\xbf" + data, "a byte order mark"
        case 5:
            text = lines[at].decode(errors="replace").translate(_LOOKALIKES)
            lines[at] = text.encode(errors="replace")
            return b"".join(lines), "letters that look alike"
        case 6:
            mark = dice.choice(("\u202e", "\u200b", "\0", "\u2028", "\x1b[2J", "\x85"))
            inside = dice.randrange(len(lines[at]) + 1)
            lines[at] = lines[at][:inside] + mark.encode() + lines[at][inside:]
            return b"".join(lines), f"the character {mark!r}"
        case _:
            lines[at] = lines[at].rstrip(b"\n")
            return b"".join(lines), "two lines in one"


# --- trees of JSON and TOML ---------------------------------------------------------------------


def confused_tree(tree: Any, dice: Random) -> tuple[Any, str]:
    """A copy of a JSON value with one part of another type or size, missing, or too much."""
    tree = json.loads(json.dumps(tree))
    where = _any_place(tree, dice)
    if where is None:
        return odd_value(tree, dice), "another root"
    parent, key = where
    match dice.randrange(8):
        case 0:
            del parent[key]
            return tree, f"no {key!r}"
        case 1 if isinstance(parent, dict):
            parent[dice.choice(("", "extra", f"{key} ", str(key).upper()))] = parent[key]
            return tree, f"{key!r} twice, under another name"
        case 2 if isinstance(parent, list):
            parent.append(parent[key])
            return tree, "a part of a list twice"
        case 3:
            others = list(parent) if isinstance(parent, dict) else range(len(parent))
            other = dice.choice(list(others))
            parent[key], parent[other] = parent[other], parent[key]
            return tree, f"{key!r} and {other!r} swapped"
        case _:
            parent[key] = odd_value(parent[key], dice)
            return tree, f"{key!r} = {str(parent[key])[:40]!r}"


def odd_value(value: Any, dice: Random) -> Any:
    """Something in place of ``value`` that a careless reader may take for one."""
    if dice.random() < 0.3:
        if isinstance(value, bool):
            return dice.choice((int(value), str(value).lower(), not value))
        if isinstance(value, (int, float)):
            return dice.choice((str(value), float(value), -value, value + 1, [value], value * 1000))
        if isinstance(value, str):
            return dice.choice(([value], value + " ", value.upper(), {value: value}, value[:-1]))
    pool = (ODD_NUMBERS, ODD_TEXTS, (None, [], {}, [[]], [1, "a"], {"a": 1}))
    return dice.choice(dice.choice(pool))


def json_bomb(dice: Random) -> bytes:
    """Text that is short to store and long or deep to read."""
    return dice.choice(
        (
            b"[" * 100_000,
            b'{"a":' * 100_000,
            b'{"a":' + b"9" * 100_000 + b"}",
            b'{"kind":' + b"[" * 5000 + b"]" * 5000 + b"}",
            b'{"a":1e99999}',
            b'"' + b"\\ud800" * 1000 + b'"',
        )
    )


def _any_place(tree: Any, dice: Random) -> tuple[Any, Any] | None:
    """(container, key) of any part of ``tree``, all parts alike likely."""
    found: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting:
        part = waiting.pop()
        keys: Sequence[Any] = ()
        if isinstance(part, dict):
            keys = list(part)
        elif isinstance(part, list):
            keys = range(len(part))
        found.extend((part, key) for key in keys)
        waiting.extend(part[key] for key in keys)
    return dice.choice(found) if found else None


# --- members of a tar ---------------------------------------------------------------------------

Members = list[tuple[str, bytes]]


def tar_members(data: bytes) -> Members:
    """(name, content) of all members of a whole tar."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]


def tar_bytes(members: Members, *, odd: Callable[[tarfile.TarInfo], None] | None = None) -> bytes:
    """A plain tar of ``members``; ``odd`` changes the header of the last one."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, (name, content) in enumerate(members):
            info = tarfile.TarInfo(name)
            info.size, info.mode, info.mtime = len(content), 0o444, 0
            if odd is not None and number == len(members) - 1:
                odd(info)
            tar.addfile(info, io.BytesIO(content) if info.isreg() else None)
    end = buffer.tell()
    return buffer.getvalue()[:end]


def other_content(data: bytes, dice: Random) -> tuple[bytes, str]:
    """A sound tar of the same size, in which a record is another one: only a checksum can tell."""
    members = tar_members(data)
    at = dice.randrange(len(members))
    name, content = members[at]
    if name.endswith(".json"):
        digit = dice.choice([n for n, byte in enumerate(content) if chr(byte).isdigit()])
        other = (content[digit] - ord("0") + 1) % 3 + ord("0")
        members[at] = name, content[:digit] + bytes([other]) + content[digit + 1 :]
        return tar_bytes(members), f"another digit in {name}"
    alike = [n for n, (_, c) in enumerate(members) if len(c) == len(content) and c != content]
    if alike and dice.random() < 0.5:
        other = dice.choice(alike)
        members[at], members[other] = (name, members[other][1]), (members[other][0], content)
        return tar_bytes(members), f"{name} and {members[other][0]} swapped"
    place = dice.randrange(128, len(content))
    changed = content[:place] + bytes([content[place] ^ 1 << dice.randrange(8)])
    members[at] = name, changed + content[place + 1 :]
    return tar_bytes(members), f"a bit of {name}"


def malformed_tar(data: bytes, dice: Random, marker: Path) -> tuple[bytes, str]:
    """A whole tar whose members are not those of a shard of ours: nobody may take it for one."""
    members = tar_members(data)
    at = dice.randrange(len(members))
    name, content = members[at]
    stem = name.partition(".")[0]
    arrays = [n for n, (title, _) in enumerate(members) if title.endswith(".npy")]
    match dice.randrange(9):
        case 0:
            kind = dice.choice(("pyd", "pkl", "pickle", "pth", "pt", "npz", "yaml", "py"))
            members.insert(at + 1, (f"{stem}.{kind}", evil_pickle(marker)))
            return tar_bytes(members), f"a member .{kind} more"
        case 1:
            evil = dice.choice(("../../evil", "/tmp/evil", "a/../../b", "x y", "é", "." * 3, "%2e"))
            members[at] = (f"{evil}.{name.partition('.')[2]}", content)
            return tar_bytes(members), f"a member called {members[at][0]!r}"
        case 2:
            members.insert(at, (name, content))
            return tar_bytes(members), "a member twice"
        case 3:
            del members[at]
            return tar_bytes(members), "a member missing"
        case 4:
            members.append((f"{stem}9.json", b""))
            kind = dice.choice(
                (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)
            )
            return tar_bytes(members, odd=lambda info: _special(info, kind)), "a link or a device"
        case 5:
            return _with_long_names(members), "names in extra headers"
        case 6 if arrays:
            chosen = dice.choice(arrays)
            members[chosen] = (members[chosen][0], malformed_npy(members[chosen][1], dice, marker))
            return tar_bytes(members), "an array of another form"
        case 7:
            members[at] = (name, members[(at + 1) % len(members)][1])
            return tar_bytes(members), "an array where facts should be, or facts for an array"
        case _:
            facts = [n for n, (title, _) in enumerate(members) if title.endswith(".json")]
            chosen = dice.choice(facts)
            members[chosen] = (members[chosen][0], dice.choice(_NO_FACTS))
            return tar_bytes(members), "facts that are none"


_NO_FACTS = (
    b"",
    b"null",
    b"[]",
    b"{",
    b"[" * 50_000,
    b'{"labels":3,"images":1}',
    b'{"labels":[null],"images":1}',
    b'{"labels":[true],"images":true}',
    b'{"labels":[1e999],"images":1}',
    b'{"labels":[-1],"images":-1}',
    b'{"labels":["0"],"images":"1"}',
    b'{"labels":[' + b"9" * 5000 + b'],"images":1}',
    b'\xff\xfe{"labels":[0]}',
)


def _special(info: tarfile.TarInfo, kind: bytes) -> None:
    info.type, info.size, info.linkname = kind, 0, "/etc/passwd"


def _with_long_names(members: Members) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo("d/" * 60 + name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def chained_long_names(count: int) -> bytes:
    """A tar of headers that each only lengthen the name of the next: a reader may recurse."""
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 1
    block = header.tobuf(tarfile.GNU_FORMAT) + b"a" + bytes(511)
    return block * count + bytes(1024)


# --- arrays -------------------------------------------------------------------------------------


def malformed_npy(data: bytes, dice: Random, marker: Path) -> bytes:
    """A ``.npy`` file of another type, shape, order or version than ``data``, or no array."""
    array = np.load(io.BytesIO(data), allow_pickle=False)
    other = np.float64 if array.dtype.kind in "iu" else np.int64
    match dice.randrange(9):
        case 1:
            return _saved(array.astype(other))
        case 2:
            return _saved(array.reshape(-1, *array.shape[2:] if array.ndim > 2 else ()))
        case 3:
            return _saved(array[None])
        case 4:
            shape = dice.choice(((2**40,), (-1,), (0,), (2**62, 4), (1,) * 40))
            return _header(array.dtype.str, shape) + data[128:]
        case 5:
            kind = dice.choice((">f2", "|O", "|V8", "<U4", "<M8[s]", "<c8", "|S3"))
            return _header(kind, array.shape) + data[128:]
        case 6:
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, array, version=(2, 0))
            return buffer.getvalue()
        case _:
            return evil_npy(marker)


def _saved(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _header(kind: str, shape: tuple[int, ...]) -> bytes:
    text = repr({"descr": kind, "fortran_order": False, "shape": shape}).encode()
    padded = text + b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded


# --- files --------------------------------------------------------------------------------------


def replaced_file(path: Path, dice: Random) -> str:
    """Put something else in place of a file: nothing, a folder, a link, a pipe, a device."""
    path.unlink()
    match dice.randrange(8):
        case 0:
            return "deleted"
        case 1:
            path.mkdir()
            return "a folder instead"
        case 2:
            os.mkfifo(path)
            return "a pipe instead"
        case 3:
            path.symlink_to(path.name)
            return "a link to itself instead"
        case 4:
            path.symlink_to("nowhere")
            return "a link to nothing instead"
        case 5:
            path.symlink_to("/etc/passwd")
            return "a link out of the folder instead"
        case 6:
            path.symlink_to("/dev/null")
            return "an empty device instead"
        case _:
            path.symlink_to("/dev/zero")
            return "an endless device instead"


def swapped_files(one: Path, other: Path) -> str:
    """Two files under each other's names."""
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
    return f"swapped with {other.name}"


def extra_file(folder: Path, dice: Random, marker: Path) -> str:
    """One more file that should not be looked at."""
    names = ("evil.pkl", "evil.pyd", "sitecustomize.py", ".hidden", "manifest.json~", "é\n.tar")
    name = dice.choice(names)
    (folder / name).write_bytes(evil_pickle(marker))
    return f"{name!r} beside it"


def clear(folder: Path) -> None:
    """Remove everything in ``folder``, whatever it is."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
