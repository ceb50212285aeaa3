"""Handwriting-like letters drawn from public stroke fonts: the public data of the demo.

Twenty-six classes, upper and lower case merged, in the manner of handwritten digits: strokes of
one to two pixels' radius in a box of 20 pixels, centred by mass in 28 x 28, white on black. Only
the letters A-Z and a-z of the fonts are ever read: no digit is drawn, so that the labels are
disjoint from those of any set of digits.
Source: the fonts are A. V. Hershey's (1967), from the package Hershey-Fonts.
Shapes: n letters, G glyphs, P points of a glyph, S the side of an image.
"""

from __future__ import annotations

import string
from collections.abc import Iterator

import numpy as np
from HersheyFonts import HersheyFonts

SIDE = 28
CLASSES = tuple(string.ascii_lowercase)
_FONTS = {
    "futural": 6,
    "scripts": 3,
    "scriptc": 1,
    "futuram": 1,
    "timesi": 1,
    "timesr": 1,
}  # and shares
_POINTS = 200
_BOX = 20.0  # pixels of the longer side of a letter, its stroke included
_CHUNK = 104  # letters drawn at a time: four of each class; a prefix of the letters stays the same
_WARPS = 3
_EASY_LENGTH = 3.5  # strokes longer than this many heights are drawn with a finer pen, to stay open


def letters(count: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """``count`` letters, uint8 (count, 28, 28), and their class numbers, int64 (count,).

    The classes take turns. Equal seeds give equal letters, and a smaller count a prefix of them.
    """
    glyphs_GP2, class_G, share_G = _glyphs()
    images = np.empty((count, SIDE, SIDE), dtype=np.uint8)
    labels = np.arange(count, dtype=np.int64) % len(CLASSES)
    for start in range(0, count, _CHUNK):
        rng = np.random.default_rng((seed, start // _CHUNK))
        wanted = np.arange(_CHUNK) % len(CLASSES)
        chosen = [rng.choice(np.flatnonzero(class_G == c), p=share_G[class_G == c]) for c in wanted]
        drawn = _draw(glyphs_GP2[chosen], rng)
        images[start : start + _CHUNK] = drawn[: count - start]
    return images, labels


def _draw(points_nP2: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Randomly warped polylines as uint8 images (n, S, S)."""
    n = len(points_nP2)
    radius_n = rng.uniform(0.75, 1.9, n) * np.minimum(
        1.0, np.sqrt(_EASY_LENGTH / _length(points_nP2))
    )
    points = _place(_affine(_warp(points_nP2, rng), rng), radius_n, rng)
    radius_nP = radius_n[:, None] * _pressure(n, rng)
    reach_nSS = _nearest(points, radius_nP)
    value = np.clip((1.0 - reach_nSS) * radius_n[:, None, None] + 0.5, 0.0, 1.0)
    return np.rint(255.0 * value).astype(np.uint8)


def _length(points_nP2: np.ndarray) -> np.ndarray:
    """Length of the strokes, (n,): the usual spacing of the points times their number."""
    return _POINTS * np.median(np.linalg.norm(np.diff(points_nP2, axis=1), axis=-1), axis=1)


def _warp(points_nP2: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Bend: a sum of smooth waves across the plane, each shifting along a random direction."""
    n = len(points_nP2)
    points = points_nP2
    for _ in range(_WARPS):
        wave_n2 = rng.normal(0.0, 0.7, (n, 2))  # cycles per height of the letter
        phase_n1 = rng.uniform(0.0, 1.0, (n, 1))
        shift_n2 = rng.normal(0.0, 0.05, (n, 2))
        angle_nP = 2 * np.pi * ((points * wave_n2[:, None]).sum(-1) + phase_n1)
        points = points + np.sin(angle_nP)[:, :, None] * shift_n2[:, None]
    return points


def _affine(points_nP2: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Stretch, slant and turn."""
    n = len(points_nP2)
    scale_n2 = rng.uniform(0.75, 1.25, (n, 2))
    slant_n, turn_n = rng.normal(0.0, 0.22, n), rng.normal(0.0, 0.12, n)
    x, y = np.moveaxis(points_nP2 * scale_n2[:, None], -1, 0)
    x = x + slant_n[:, None] * y
    cos, sin = np.cos(turn_n)[:, None], np.sin(turn_n)[:, None]
    return np.stack([cos * x - sin * y, sin * x + cos * y], axis=-1)


def _place(points_nP2: np.ndarray, radius_n: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Fit the stroked letter into the box and put its centre of mass near the middle, in pixels."""
    n = len(points_nP2)
    side_n = np.ptp(points_nP2, axis=1).max(axis=1)
    room_n = (_BOX - 2 * radius_n) * rng.uniform(0.9, 1.05, n)
    points = points_nP2 * (room_n / side_n)[:, None, None]
    points = (
        points
        - points.mean(axis=1, keepdims=True)
        + rng.normal(0.0, 0.4, (n, 1, 2))
        + (SIDE - 1) / 2
    )
    edge = 1.0 + radius_n[:, None]
    below_n2 = np.minimum(points.min(axis=1) - edge, 0.0)
    above_n2 = np.maximum(points.max(axis=1) - (SIDE - 1 - edge), 0.0)
    return points - (below_n2 + above_n2)[:, None]


def _pressure(n: int, rng: np.random.Generator) -> np.ndarray:
    """How the pen's width varies along a letter, around 1, (n, P)."""
    along_P = np.linspace(0.0, 1.0, _POINTS)
    cycles_n1, phase_n1 = rng.uniform(0.5, 2.0, (n, 1)), rng.uniform(0.0, 1.0, (n, 1))
    return 1.0 + rng.uniform(0.0, 0.2, (n, 1)) * np.sin(
        2 * np.pi * (cycles_n1 * along_P + phase_n1)
    )


def _nearest(points_nP2: np.ndarray, radius_nP: np.ndarray) -> np.ndarray:
    """Distance of every pixel to its nearest point, in units of the radius there, (n, S, S)."""
    n = len(points_nP2)
    grid_S = np.arange(SIDE, dtype=np.float32)
    points, radius = points_nP2.astype(np.float32), radius_nP.astype(np.float32)
    across_nPS = np.square((grid_S - points[:, :, 0, None]) / radius[:, :, None])
    down_nPS = np.square((grid_S - points[:, :, 1, None]) / radius[:, :, None])
    nearest = np.full((n, SIDE, SIDE), np.inf, dtype=np.float32)
    square = np.empty_like(nearest)
    for p in range(_POINTS):
        np.add(down_nPS[:, p, :, None], across_nPS[:, p, None, :], out=square)
        np.minimum(nearest, square, out=nearest)
    return np.sqrt(nearest)


def _glyphs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every letter of every font as points (G, P, 2) of height about 1, its class (G,), and its
    share among the glyphs of its class (G,)."""
    points, classes, shares = [], [], []
    for name, share in _FONTS.items():
        font = HersheyFonts()
        font.load_default_font(name)
        for number, letter in enumerate(CLASSES):
            for character in (letter, letter.upper()):
                points.append(_resampled(font.strokes_for_text(character)))
                classes.append(number)
                shares.append(share)
    share_G, class_G = np.array(shares, dtype=float), np.array(classes)
    for number in range(len(CLASSES)):
        share_G[class_G == number] /= share_G[class_G == number].sum()
    return np.stack(points), class_G, share_G


def _resampled(strokes: Iterator[list[tuple[float, float]]]) -> np.ndarray:
    """Points (P, 2) evenly spaced along the strokes of a glyph; the pen is up between strokes."""
    starts, ends = [], []
    for stroke in strokes:
        line = np.array(list(stroke), dtype=float)
        starts.extend(line[:-1])
        ends.extend(line[1:])
    start_K2, end_K2 = np.array(starts), np.array(ends)
    length_K = np.linalg.norm(end_K2 - start_K2, axis=1)
    reached_K = np.cumsum(length_K)
    along_P = (np.arange(_POINTS) + 0.5) / _POINTS * reached_K[-1]
    segment_P = np.minimum(np.searchsorted(reached_K, along_P, side="right"), len(length_K) - 1)
    behind_P = along_P - (reached_K - length_K)[segment_P]
    share_P1 = (behind_P / np.maximum(length_K[segment_P], 1e-9))[:, None]
    points = start_K2[segment_P] + share_P1 * (end_K2 - start_K2)[segment_P]
    points -= points.mean(axis=0)
    return points / np.ptp(points, axis=0).max()
