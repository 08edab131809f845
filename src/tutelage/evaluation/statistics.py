"""Means, spreads and paired differences over seeds."""

import math
import statistics
from collections.abc import Sequence
from typing import Any


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and sample standard deviation; the latter is ``None`` for one value."""
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "values": list(values),
    }


def paired_difference(treated: Sequence[float], control: Sequence[float], level: float = 0.95) -> dict[str, Any]:
    """Mean of the differences seed by seed, with Student's interval.

    Returns:
        ``mean``, and ``low`` and ``high``, which are ``None`` for a single seed.
    """
    from scipy.stats import t

    differences = [a - b for a, b in zip(treated, control, strict=True)]
    n, mean = len(differences), statistics.fmean(differences)
    low = high = None
    if n > 1:
        half = float(t.ppf(0.5 + level / 2, n - 1)) * statistics.stdev(differences) / math.sqrt(n)
        low, high = mean - half, mean + half
    return {"mean": mean, "low": low, "high": high, "level": level, "n": n, "values": differences}
