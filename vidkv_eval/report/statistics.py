"""Intervals for means over samples.

- Means of scores: percentile bootstrap over samples, 10,000 draws, fixed seed.
- Shares of right answers: Wilson's score interval, because a bootstrap of values that are all 0 or all 1 has no width.
- Differences between two recipes on the same samples: percentile bootstrap of the paired differences, for both kinds.

All intervals are two-sided at 95 %. Samples are taken as independent, also where several ask about one clip.
"""

import math

import numpy as np

DRAWS = 10_000
SEED = 20250320
TAIL = 0.025
NORMAL_QUANTILE = 1.959963984540054


def bootstrap_interval(values: list[float]) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a mean."""
    samples = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(SEED).integers(len(samples), size=(DRAWS, len(samples)))
    low, high = np.quantile(samples[draws].mean(axis=1), (TAIL, 1 - TAIL))
    return float(low), float(high)


def paired_interval(values: list[float], baseline: list[float]) -> tuple[float, float]:
    """Return the bootstrap interval of the mean difference; both lists follow the same samples."""
    return bootstrap_interval([value - other for value, other in zip(values, baseline, strict=True)])


def wilson_interval(values: list[float]) -> tuple[float, float]:
    """Return Wilson's interval of a share.

    Args:
        values: 1 for each success, 0 for each failure.
    Raises:
        ValueError: another value than 0 and 1 is among them.
    """
    if not set(values) <= {0, 1}:
        raise ValueError(f"a Wilson interval needs values 0 and 1, found {sorted(set(values) - {0, 1})}; use interval: bootstrap")
    count, share, z = len(values), sum(values) / len(values), NORMAL_QUANTILE
    centre = share + z * z / (2 * count)
    margin = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, (centre - margin) / (1 + z * z / count)), min(1.0, (centre + margin) / (1 + z * z / count))


INTERVALS = {"bootstrap": bootstrap_interval, "wilson": wilson_interval}
