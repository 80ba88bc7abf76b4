"""Whether a row differs from the baseline: differences over the seeds that both were trained with.

A seed fixes the initial weights and the order of the images, so two rows with the same seed share much of their luck,
which their difference leaves out.
"""

import math

import numpy as np
import pandas as pd

COLUMNS = ("difference", "low", "high", "p", "p_holm", "pairs")


def paired_difference(row: pd.Series, baseline: pd.Series, level: float = 0.95) -> dict[str, float]:
    """Mean of `row` - `baseline` over their common seeds, its Student-t interval, and the p-value of the paired t-test.

    Both are scores whose index is the seed; equal seeds are averaged first, missing scores left out. Returns
    `difference`, `low` and `high` (in the scores' unit), `p` (two-sided) and `pairs` (seeds in common). The difference
    is NaN without a pair; interval and p are NaN with fewer than two, and where all differences are the same, since
    then nothing is known about how they vary.
    """
    from scipy.stats import t  # a second to import, only needed here

    a, b = (scores.dropna().groupby(level=0).mean() for scores in (row, baseline))
    seeds = a.index.intersection(b.index)
    each = (a[seeds] - b[seeds]).to_numpy(float)
    n = len(each)
    found = {"difference": each.mean() if n else math.nan, "low": math.nan, "high": math.nan, "p": math.nan, "pairs": n}
    error = each.std(ddof=1) / math.sqrt(n) if n > 1 else 0.0
    if error <= 1e-12:  # equal up to the last bits of a float
        return found
    half = t.ppf((1 + level) / 2, n - 1) * error
    p = 2 * t.sf(abs(found["difference"]) / error, n - 1)
    return found | {"low": found["difference"] - half, "high": found["difference"] + half, "p": float(p)}


def holm(p) -> np.ndarray:
    """Holm's correction of p-values (n,) for the number of comparisons; NaN stays, and counts as no comparison.

    The k-th smallest of m becomes the largest of (m - j + 1) p_j over j <= k, at most 1.
    """
    p = np.asarray(p, float)
    corrected = np.full_like(p, np.nan)
    order = np.argsort(p)[: np.count_nonzero(~np.isnan(p))]  # NaN is sorted to the end
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)), 1)
    return corrected
