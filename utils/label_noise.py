"""Wrong labels by a transition matrix, and the clean probe that is taken out first; all of it drawn from one seed."""

import numpy as np

from utils.errors import InputError

# the 20 superclasses of CIFAR-100's 100 classes
_COARSE = (
    "4 1 14 8 0 6 7 7 18 3 3 14 9 18 7 11 3 9 7 11 6 11 5 10 7 6 13 15 3 15 0 11 1 10 12 14 16 9 11 5 5 "
    "19 8 8 15 13 14 17 18 10 16 4 17 4 2 0 17 4 18 17 10 3 2 12 12 16 12 1 9 19 2 10 0 1 16 12 9 13 15 "
    "13 16 19 2 4 6 19 5 5 8 19 18 1 2 15 6 0 17 8 14 13 "
)
COARSE = np.array(_COARSE.split(), int)


def transition(kind: str, ratio: float, classes: int, include_true: bool = True) -> np.ndarray:
    """(C, C) chances: row = true class, column = label.

    "uniform": with chance `ratio` a label is drawn from all classes, the true one among them, so that
    ratio x (C - 1) / C of them are wrong; without `include_true` from the others. "asymmetric": for 10 classes
    (CIFAR-10) truck to automobile, bird to airplane, cat and dog to each other, deer to horse; for 100 (CIFAR-100) to
    the next class of the superclass, a convention of the literature.
    """
    if not 0 <= ratio <= 1:
        raise InputError(f"--dataset: a noise ratio of {ratio}; it lies between 0 and 1")
    if kind == "uniform":
        share = ratio / classes if include_true else ratio / (classes - 1)
        same = 1 - ratio + share if include_true else 1 - ratio
        return np.where(np.eye(classes, dtype=bool), same, share)
    if kind != "asymmetric" or classes not in (10, 100):
        raise InputError(f"--dataset: no noise `{kind}` for {classes} classes; asymmetric is known for CIFAR alone")
    found = np.eye(classes)
    for source, target in _pairs(classes):
        found[source, source], found[source, target] = 1 - ratio, ratio
    return found


def _pairs(classes):
    if classes == 10:
        return [(9, 1), (2, 0), (3, 5), (5, 3), (4, 7)]
    groups = [np.flatnonzero(np.equal(COARSE, k)) for k in range(20)]
    return [(a, b) for group in groups for a, b in zip(group, np.roll(group, -1), strict=True)]


def noisy_labels(labels: np.ndarray, kind: str, ratio: float, classes: int, seed: int, include_true: bool = True):
    """Labels (N,) int64 with the noise of `transition`, drawn by NumPy's RandomState(seed) as the released code draws.

    Uniform: a number an example decides whether its label is drawn anew, then all of these are drawn at once.
    Asymmetric: a multinomial draw an example.
    """
    labels, rng = np.asarray(labels, np.int64), np.random.RandomState(seed)
    matrix = transition(kind, ratio, classes, include_true)
    if kind == "uniform":
        drawn = rng.rand(len(labels)) <= ratio if ratio else np.zeros(len(labels), bool)
        fresh = rng.choice(classes if include_true else classes - 1, drawn.sum())
        found = labels.copy()
        found[drawn] = fresh if include_true else fresh + (fresh >= labels[drawn])
        return found
    return np.array([rng.multinomial(1, matrix[label]).argmax() for label in labels], np.int64)


def split_probe(labels: np.ndarray, classes: int, per_class: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows that are trained on, rows of the probe) of clean labels.

    The probe has `per_class` images of every class, drawn without replacement and ordered class by class in turn: 0, 1,
    ..., C - 1, 0, ..., so that every batch of it is balanced where C divides its size. InputError for a class that has
    not more than these.
    """
    rng, columns = np.random.default_rng([seed, 1]), []
    for label in range(classes):
        rows = np.flatnonzero(labels == label)
        if len(rows) <= per_class:
            what = f"class {label} has {len(rows)} images, too few for {per_class} of the probe and others to train"
            raise InputError(f"--probe-per-class {per_class}: {what}" if per_class else f"class {label} has no image")
        columns.append(rng.permutation(rows)[:per_class])
    probe = np.stack(columns, 1).flatten() if per_class else np.zeros(0, np.int64)
    return np.setdiff1d(np.arange(len(labels)), probe), probe


def per_class_of(images: int, classes: int, ratio: float, cut: bool = False) -> int:
    """How many images of a class a hold-out ratio means; rounded, or with `cut` cut off, as in the released code.

    InputError for a ratio that means none.
    """
    count = (int(images * ratio) if cut else round(images * ratio)) // classes
    if ratio > 0 and not count:
        least = classes / images
        raise InputError(f"--probe-dataset-hold-ratio {ratio}: no image of a class; take {least:.4g} or more")
    return count
