"""Which images of a list get which noise: pure draws, keyed by a seed and the image's name."""

import hashlib

import numpy as np
import pandas as pd

from utils.add_noise import OPS
from utils.errors import InputError
from utils.prepare_data import draw_test, pool_of

NLKD_RATIOS = (10, 20, 30, 40, 50, 60)
NLKD_LEVELS = (6, 7, 8, 9, 10)


def assign(ids: list[str], ratio: int, levels: tuple[int, int], op: str, seed: int) -> pd.DataFrame:
    """Noise for floor(ratio * n / 100) of n ids: columns id, iterations (0: clean) and op ("", erode, dilate).

    `ratio` is in percent, `levels` the lowest and highest iterations. Every id has its own draws, keyed by (seed, id),
    so the order of `ids` is of no matter; a larger ratio keeps the noise of a smaller one and adds to it; the levels
    are equally frequent, to within one mask.
    """
    draws = {i: generator(seed, "noise", i) for i in ids}
    ranked = sorted(ids, key=lambda i: (draws[i].random(), i))
    steps = range(levels[0], levels[1] + 1)
    noise = {}
    for rank, i in enumerate(ranked[: ratio * len(ids) // 100]):
        noise[i] = (steps[rank % len(steps)], OPS[draws[i].integers(2)] if op == "both" else op)
    return pd.DataFrame([(i, *noise.get(i, (0, ""))) for i in ids], columns=["id", "iterations", "op"])


def assign_kinds(ids: list[str], ratio: int, kinds: dict[str, float], seed: int) -> pd.DataFrame:
    """A kind of noise for floor(ratio * n / 100) of n ids, by the chances `kinds`: id, iterations (0 or 1), op (kind).

    The draws are those of `assign`: keyed by (seed, id), and a larger ratio adds to a smaller one.
    """
    draws = {i: generator(seed, "noise", i) for i in ids}
    ranked = sorted(ids, key=lambda i: (draws[i].random(), i))
    steps = np.cumsum(list(kinds.values()))
    noise = {}
    for i in ranked[: ratio * len(ids) // 100]:
        place = np.searchsorted(steps, draws[i].random() * steps[-1], side="right")
        noise[i] = (1, list(kinds)[min(place, len(kinds) - 1)])
    return pd.DataFrame([(i, *noise.get(i, (0, ""))) for i in ids], columns=["id", "iterations", "op"])


def assign_nlkd(ids: list[str], n_test: int, seed: int, ratio: int) -> pd.DataFrame:
    """The published assignment for `ids`, the whole data set: one row for every id outside the test set, sorted.

    Columns as in `assign`. One Python random stream draws the test ids and then the ratios 10, 20, ... 60 one after
    the other, so these are the only ratios it has, and they are not nested. Source: NLKD, ICASSP 2021, released lists.
    """
    if ratio not in NLKD_RATIOS:
        raise InputError(f"--ratios {ratio}: the published ratios are {', '.join(map(str, NLKD_RATIOS))}")
    test, rng = draw_test(ids, n_test, seed)
    pool = pool_of(ids, test)
    for now in NLKD_RATIOS[: NLKD_RATIOS.index(ratio) + 1]:
        drawn = rng.sample(pool, now * len(pool) // 100)
        group = max(1, -(-len(drawn) // len(NLKD_LEVELS)))
        level = {i: NLKD_LEVELS[place // group] for place, i in enumerate(drawn)}
        noise = {i: (level[i], OPS[rng.randint(0, 1)]) for i in pool if i in level}
    return pd.DataFrame([(i, *noise.get(i, (0, ""))) for i in pool], columns=["id", "iterations", "op"])


def draw_trusted(valid: list[str], train: list[str], count: int, seed: int) -> list[str]:
    """`count` ids from `valid`, on which no student trains, and from `train` once `valid` is used up."""
    key = {i: generator(seed, "trusted", i).random() for i in [*valid, *train]}
    order = [*sorted(valid, key=lambda i: (key[i], i)), *sorted(train, key=lambda i: (key[i], i))]
    return order[:count]


def generator(seed: int, purpose: str, i: str) -> np.random.Generator:
    """The random stream of one image for one purpose."""
    digest = hashlib.sha256(f"{purpose} {i}".encode()).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:16], "big")])
