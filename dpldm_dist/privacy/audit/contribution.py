"""Does a record add at most the clip norm, exactly once, and is the sum scaled as stated?

Contributions are in units of what one record of a large gradient must add, so that correct code
gives 1. Shapes: M canaries.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import norm

from dpldm_dist.privacy.audit.reading import Reading, exact


def contributions(norms: np.ndarray, *, least: float, most: float, where: str) -> list[Reading]:
    """What records with a large gradient added to a sum without noise: the norm of each, over C.

    ``least`` to ``most`` is what clipping leaves of it, public numbers. Chance plays no part.
    Above: no clipping, or of the wrong thing, or a record that counted twice. Below: a mean over
    workers, a wrong divisor, or a record that was lost.
    """
    smallest, largest = float(norms.min(initial=math.inf)), float(norms.max(initial=0.0))
    return [
        exact(
            "contribution",
            f"largest over C, {where}",
            largest,
            f"at most {most:.4g}",
            holds=largest <= most,
        ),
        exact(
            "contribution",
            f"smallest over C, {where}",
            smallest,
            f"at least {least:.4g}",
            holds=len(norms) > 0 and smallest >= least,
        ),
    ]


def remainder(found: float, norms_M: np.ndarray, *, most: float) -> Reading:
    """What M records added outside of their own coordinates, against what their own left over.

    Each record has norm at most ``most`` in all, so outside it has at most
    sqrt(most^2 - own^2), and M of them together at most the sum. Finds layers that are clipped one
    by one.
    """
    bound = float(np.sqrt(np.clip(most**2 - np.square(norms_M), 0.0, None)).sum())
    return exact(
        "contribution",
        "outside of own rows over C",
        found,
        f"at most {bound:.4g}",
        holds=found <= bound,
    )


def scale(scores_M: np.ndarray, *, rate: float, steps: int, noise_std: float) -> Reading:
    """How far canaries that took part moved their rows under noise, over what they should have.

    ``scores_M``: projection of the sum of ``steps`` noisy sums onto each canary's direction, where
    one draw adds 1 and the noise has standard deviation ``noise_std`` per step.
    Formal guarantees: two-sided normal test; the variance is that of the noise and of the coins,
    and M is large.
    """
    count, mean = len(scores_M), steps * rate
    variance = steps * (noise_std**2 + rate * (1 - rate))
    z = (float(scores_M.sum()) - count * mean) / math.sqrt(count * variance)
    found = float(scores_M.mean()) / mean
    p_value = 2 * float(norm.sf(abs(z)))
    return Reading("contribution", "signal under noise, relative", found, "1", p_value)
