"""Keystreams: distinct, addressable, of the right law."""

from __future__ import annotations

import math

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from dpldm_dist.privacy.randomness import (
    NOISE_BLOCK,
    commitment,
    derive_key,
    integer_noise,
    keystream,
    new_key,
    normal_from_words,
    record_normals,
    record_words,
    uniform_from_words,
    words,
)

STD = 2.0**30
KEY = bytes(range(32))


def test_keystream_is_chacha20_of_the_key_and_stream():
    reference = Cipher(
        algorithms.ChaCha20(KEY, bytes(8) + bytes([7] + 7 * [0])), mode=None
    ).encryptor()
    assert keystream(KEY, 100, stream=7).tobytes() == reference.update(bytes(100))


def test_chacha20_matches_the_published_vector():
    key = bytes(range(32))  # RFC 8439, section 2.4.2: 32-bit counter 1 and its 96-bit nonce
    nonce = bytes.fromhex("01000000" + "000000000000004a00000000")
    text = b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, "
    cipher = Cipher(algorithms.ChaCha20(key, nonce), mode=None).encryptor()
    assert cipher.update(text)[:16].hex() == "6e2e359a2568f98041ba0728dd0d6981"


def test_every_purpose_and_number_gives_its_own_key():
    seen = {
        derive_key(KEY, p, a, s)
        for p in ("noise", "select", "draws")
        for a in range(5)
        for s in range(50)
    }
    assert len(seen) == 3 * 5 * 50
    assert derive_key(KEY, "noise", 1, 23) != derive_key(KEY, "noise", 12, 3)
    assert derive_key(KEY, "noise", 1) != derive_key(new_key(), "noise", 1)


def test_a_commitment_needs_the_key():
    assert commitment(KEY, "latents", b"x") != commitment(new_key(), "latents", b"x")
    assert commitment(KEY, "latents", b"x") == commitment(KEY, "latents", b"x")


def test_a_coordinate_has_the_same_noise_in_every_slice():
    whole = integer_noise(KEY, 0, 2 * NOISE_BLOCK + 77, std=STD)
    for start, stop in [(0, 1), (5, 5), (10, NOISE_BLOCK + 3), (NOISE_BLOCK, 2 * NOISE_BLOCK + 77)]:
        assert torch.equal(integer_noise(KEY, start, stop, std=STD), whole[start:stop])


def test_noise_has_the_same_bits_by_however_many_threads():
    alone = integer_noise(KEY, 5, 5 * NOISE_BLOCK + 77, std=STD)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(integer_noise(KEY, 5, 5 * NOISE_BLOCK + 77, std=STD), alone)
    finally:
        torch.set_num_threads(before)


def test_no_two_noise_values_are_equal_over_steps_attempts_and_coordinates():
    drawn = [
        integer_noise(derive_key(KEY, "noise", attempt, step), 0, 20_000, std=STD * 2**20)
        for attempt in range(3)
        for step in range(4)
    ]
    values = torch.cat(drawn)
    # 240,000 values of std 2^50: a chance collision has probability below 240000^2 / 2^51 = 3e-5
    assert len(torch.unique(values)) == len(values)


def test_noise_has_the_law_of_a_gaussian():
    count = 1 << 20
    z = integer_noise(new_key(), 0, count, std=STD).double() / STD
    assert abs(float(z.mean())) < 5 / math.sqrt(count)
    assert abs(float(z.std()) - 1) < 5 / math.sqrt(2 * count)
    assert abs(float((z**4).mean()) - 3) < 5 * math.sqrt(96 / count)
    half = torch.special.ndtr(torch.sort(z).values)
    grid = (torch.arange(count) + 0.5) / count
    assert float((half - grid).abs().max()) < 2.7 / math.sqrt(count)  # Kolmogorov, p = 1e-6
    assert float((z[:-1] * z[1:]).mean().abs()) < 5 / math.sqrt(count)
    assert float((z[: count // 2] * z[count // 2 :]).mean().abs()) < 5 / math.sqrt(count / 2)


def test_noise_has_a_tail_beyond_what_32_and_53_bits_can_reach():
    smallest = np.array([0, 0], dtype=np.uint64)  # radius word 0, angle word 0: the extreme draw
    extreme = float(np.abs(normal_from_words(smallest)).max())
    assert 10.2 < extreme < 10.4
    largest = np.array([2**64 - 1, 2**64 - 1], dtype=np.uint64)
    assert np.isfinite(normal_from_words(largest)).all()


def test_uniform_numbers_are_below_one():
    assert uniform_from_words(np.array([2**64 - 1], dtype=np.uint64))[0] < 1.0
    assert abs(uniform_from_words(words(KEY, 100_000)).mean() - 0.5) < 5 / math.sqrt(12 * 100_000)


def test_numbers_of_a_record_do_not_depend_on_other_records():
    together = record_words(KEY, np.array([3, 1 << 40, 9]), 12)
    alone = record_words(KEY, np.array([9]), 12)
    assert np.array_equal(together[2:], alone)
    assert np.array_equal(record_normals(together)[2:], record_normals(alone))
