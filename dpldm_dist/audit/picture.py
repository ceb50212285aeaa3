"""One picture of an audit: is the noise normal, do scores tell canaries apart, who was drawn?"""

from __future__ import annotations

import io

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import norm

from dpldm_dist.audit.observe import Observations
from dpldm_dist.audit.verdict import Verdict

_BLUE, _RED, _GREY = "#1f4e79", "#a33333", "#888888"


def picture(seen: Observations, verdict: Verdict) -> bytes:
    """PNG of three panels: noise, scores of canaries, and sizes of batches."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    noise, scores, batches = figure.subplots(1, 3)
    numbers = seen.noisy.blank_TN.reshape(-1)
    noise.hist(numbers, bins=80, density=True, color=_BLUE, alpha=0.5)
    x = np.linspace(-5, 5, 201)
    noise.plot(x, norm.pdf(x), color=_RED)
    noise.set(title="noise over the claimed one", xlabel="standard deviations", yscale="log")
    noise.set_ylim(1e-6, 1)
    for included, colour, label in ((True, _BLUE, "included"), (False, _GREY, "left out")):
        chosen = seen.scores_M[seen.included_M == included]
        scores.hist(chosen, bins=30, color=colour, alpha=0.6, label=label)
    proved = max(verdict.lower_bound, verdict.lower_bound_curve)
    title = f"canaries: claim {verdict.claim:.2f}, proved {proved:.2f}"
    scores.set(title=title, xlabel="move of the own row, in draws")
    scores.legend(frameon=False)
    sizes = seen.selection.drawn_TN.sum(1)
    batches.bar(*np.unique(sizes, return_counts=True), color=_BLUE, alpha=0.6)
    batches.set(title="sizes of small batches", xlabel="records drawn", ylabel="steps")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()
