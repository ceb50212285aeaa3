"""Pictures and self-contained pages: grids of images, plots, HTML with everything inside.

Shapes: N images, C channels, H height, W width, G images in a grid.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jinja2
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

BORDER = 2  # pixels between the images of a grid


def grid_png(images_GCHW: np.ndarray, *, columns: int, least_side: int = 1) -> bytes:
    """PNG of uint8 images laid out row by row, enlarged by a whole factor to ``least_side``."""
    count, channels, height, width = images_GCHW.shape
    factor = max(1, -(-least_side // max(height, width)))
    images = images_GCHW.repeat(factor, axis=2).repeat(factor, axis=3)
    height, width = height * factor, width * factor
    rows = -(-count // columns)
    sheet = np.full(
        (rows * (height + BORDER) + BORDER, columns * (width + BORDER) + BORDER, channels),
        255,
        np.uint8,
    )
    for place, image in enumerate(images):
        top = BORDER + (place // columns) * (height + BORDER)
        left = BORDER + (place % columns) * (width + BORDER)
        sheet[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    return png(sheet)


def class_grid_png(
    images_NCHW: np.ndarray, labels_N: np.ndarray, *, classes: int, columns: int, rows: int = 20
) -> bytes:
    """PNG with one row per class: its first ``columns`` images, or all; grey where it has fewer."""
    columns = min(columns, int(np.bincount(labels_N).max()))
    shape = (min(classes, rows), columns, *images_NCHW.shape[1:])
    cells = np.full(shape, 235, np.uint8)
    for label, row in enumerate(cells):
        chosen = images_NCHW[np.flatnonzero(labels_N == label)[:columns]]
        row[: len(chosen)] = chosen
    return grid_png(cells.reshape(-1, *images_NCHW.shape[1:]), columns=columns, least_side=48)


def png(image_HWC: np.ndarray) -> bytes:
    """PNG of one uint8 image (H, W, 1 or 3). The same pixels give the same bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image_HWC[:, :, 0] if image_HWC.shape[2] == 1 else image_HWC).save(
        buffer, "PNG"
    )
    return buffer.getvalue()


def data_uri(payload: bytes, kind: str = "image/png") -> str:
    """``payload`` as an address that holds it."""
    return f"data:{kind};base64,{base64.b64encode(payload).decode()}"


def curve_svg(
    x: Sequence[float],
    y: Sequence[float],
    *,
    x_label: str,
    y_label: str,
    limit: float | None = None,
    limit_label: str = "",
) -> str:
    """An SVG element with one curve and an optional horizontal limit, to stand inside a page."""
    with _drawing(x, x_label, y_label) as (figure, axes):
        axes.plot(x, y, color="#1f4e79", linewidth=1.8)
        axes.fill_between(x, y, color="#1f4e79", alpha=0.08, linewidth=0)
        if limit is not None:
            axes.axhline(limit, color="#a33", linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(
                limit_label, (x[0], limit), xytext=(2, 3), textcoords="offset points", color="#a33"
            )
        axes.set_ylim(0, 1.18 * max([*y, limit or 0.0]))
        return _svg(figure)


def band_svg(
    x: Sequence[float],
    y: Sequence[float],
    *,
    low: Sequence[float],
    high: Sequence[float],
    x_label: str,
    y_label: str,
    from_zero: bool,
) -> str:
    """An SVG element with one curve and a band, around it or to compare it with."""
    with _drawing(x, x_label, y_label) as (figure, axes):
        axes.fill_between(x, low, high, color="#1f4e79", alpha=0.18, linewidth=0)
        axes.plot(x, y, color="#1f4e79", linewidth=1.8)
        bottom, top = min([*low, *y]), max([*high, *y])
        room = 0.1 * (top - bottom)
        axes.set_ylim(0.0 if from_zero else bottom - room, top + room or 1.0)
        return _svg(figure)


@contextmanager
def _drawing(x: Sequence[float], x_label: str, y_label: str) -> Iterator[tuple[Figure, Axes]]:
    """An empty plot over ``x`` that gives the same bytes each time."""
    style = {
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9,
        "svg.hashsalt": y_label,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8.4, 3.0), layout="constrained")
        axes = figure.add_subplot()
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.set_xlim(x[0], x[-1] if x[-1] > x[0] else x[0] + 1)
        axes.spines[["top", "right"]].set_visible(False)
        yield figure, axes


def _svg(figure: Figure) -> str:
    """The figure as an element, without what differs from day to day."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = buffer.getvalue()
    text = re.sub(r'<metadata>.*?</metadata>| xmlns(:\w+)?="[^"]*"', "", text, flags=re.DOTALL)
    return text[text.index("<svg") :]


def render(template: str, **values: Any) -> str:
    """HTML of a template that stands beside the stages; every value is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dpldm_dist", "stages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
