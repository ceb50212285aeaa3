"""All secret randomness of a run: ChaCha20 keystreams, each named by what it is for.

One 32-byte key, drawn from the operating system at every start, is the root. Every use derives its
own key by HMAC-SHA256 from a description (purpose, attempt, step, slice), so that no two uses share
a byte of keystream and any value can be drawn by whichever worker needs it. A torch generator is
never used: the CPU one keeps 32 bits of its seed.

Source: ChaCha20, RFC 8439; HMAC, RFC 2104; Box and Muller (1958).
"""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms
from torch import Tensor

KEY_BYTES = 32
NOISE_BLOCK = 1 << 16  # coordinates of the noise that share one derived key
_ANGLE_BITS = 53
_PART_BYTES = 1 << 20  # of a long keystream: stays in the cache of a core


def new_key() -> bytes:
    """32 bytes from the operating system."""
    return secrets.token_bytes(KEY_BYTES)


def derive_key(key: bytes, purpose: str, *numbers: int) -> bytes:
    """The key of one purpose. Distinct (purpose, numbers) give independent keys, assuming HMAC is
    a pseudo-random function."""
    message = purpose.encode() + b"\0" + b"".join(n.to_bytes(8, "big") for n in numbers)
    return hmac.new(key, message, hashlib.sha256).digest()


def commitment(key: bytes, purpose: str, payload: bytes) -> str:
    """A name for ``payload`` that tells nothing to who lacks the key. Hex of 32 bytes."""
    return hmac.new(derive_key(key, f"commit {purpose}"), payload, hashlib.sha256).hexdigest()


def keystream(key: bytes, length: int, *, stream: int = 0) -> np.ndarray:
    """``length`` bytes of ChaCha20 under ``key``; ``stream`` picks one of 2^64 disjoint streams."""
    return np.frombuffer(_encryptor(key, stream).update(bytes(length)), dtype=np.uint8)


def keystream_parts(key: bytes, length: int) -> Iterator[np.ndarray]:
    """The same bytes as ``keystream(key, length)``, a part of them at a time."""
    encryptor, zeros = _encryptor(key, 0), bytes(min(length, _PART_BYTES))
    for start in range(0, length, _PART_BYTES):
        part = memoryview(zeros)[: length - start]
        yield np.frombuffer(encryptor.update(part), dtype=np.uint8)


def _encryptor(key: bytes, stream: int) -> CipherContext:
    nonce = bytes(8) + stream.to_bytes(8, "little")  # 64-bit block counter, 64-bit nonce
    return Cipher(algorithms.ChaCha20(key, nonce), mode=None).encryptor()


def words(key: bytes, count: int, *, stream: int = 0) -> np.ndarray:
    """``count`` independent uniform 64-bit integers. uint64."""
    return keystream(key, 8 * count, stream=stream).view(np.uint64)


def uniform_from_words(words_N: np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1), multiples of 2^-53. float64."""
    return (words_N >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normal_from_words(words_N: np.ndarray) -> np.ndarray:
    """Standard normal numbers, two from two words, by Box and Muller in float64. Length even.

    The radius uses 75 bits: the 64 of one word and the 11 low bits that the angle leaves over, so
    the tail reaches 10.2 standard deviations and the probability beyond it is below 2^-75 a pair.
    """
    pair = torch.from_numpy(words_N.view(np.int64).reshape(2, -1).copy())
    high, angle = pair[0], pair[1]
    low = (angle & 0x7FF).double()
    # the word as an unsigned number; adding the 11 low bits matters only when the word is small
    unsigned = torch.where(high < 0, high.double() + 2.0**64, high.double())
    radius = torch.sqrt(
        -2.0 * torch.log((unsigned + (low + 0.5) * 2.0**-11) * 2.0**-64).clamp(max=0.0)
    )
    turn = ((angle >> 11) & ((1 << _ANGLE_BITS) - 1)).double() * (2.0 * math.pi * 2.0**-_ANGLE_BITS)
    return torch.cat([radius * torch.cos(turn), radius * torch.sin(turn)]).numpy()


def integer_noise(key: bytes, start: int, stop: int, *, std: float) -> Tensor:
    """Coordinates start..stop of a vector of rounded Gaussians. int64, shape (stop - start,).

    ``std`` is in units of the integer grid and large (2^20 and more), so that rounding is far
    below it. A coordinate has the same value whoever draws it, in whichever slice, and by however
    many threads (those of PyTorch).

    Formal guarantees: coordinates are independent; no two coordinates, and no two keys, share a
    byte of keystream.
    """
    noise_N = torch.empty(stop - start, dtype=torch.int64, device="cpu")
    noise = noise_N.numpy()

    def draw(block: int) -> None:
        offset = block * NOISE_BLOCK
        first, last = max(start, offset), min(stop, offset + NOISE_BLOCK)
        normal = normal_from_words(words(key, NOISE_BLOCK, stream=block))
        noise[first - start : last - start] = np.rint(normal[first - offset : last - offset] * std)

    blocks = range(start // NOISE_BLOCK, -(-stop // NOISE_BLOCK))
    threads = min(torch.get_num_threads(), len(blocks))
    if threads <= 1:
        for block in blocks:
            draw(block)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(draw, blocks))
    return noise_N


def record_words(key: bytes, ids: np.ndarray, count: int) -> np.ndarray:
    """``count`` words for each record id. uint64, shape (len(ids), count).

    Formal guarantees: the numbers of a record do not depend on which other records take part.
    """
    table = np.empty((len(ids), count), dtype=np.uint64)
    for row, record in enumerate(ids.tolist()):
        table[row] = words(key, count, stream=record)
    return table


def record_normals(table: np.ndarray) -> np.ndarray:
    """Standard normal numbers from the words of each record. float64, shape as ``table`` (n,
    count), count even; a row depends on its own words only."""
    records, count = table.shape
    halves = table.reshape(records, 2, count // 2).transpose(1, 0, 2)
    normals = normal_from_words(np.ascontiguousarray(halves).reshape(-1))
    return normals.reshape(2, records, count // 2).transpose(1, 0, 2).reshape(records, count)
