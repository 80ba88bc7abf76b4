"""What makes a label audit worthless or doubtful: masks of another kind than the teacher's, and a poor teacher."""

import os
from typing import NamedTuple

import numpy as np

from utils.errors import InputError
from utils.images import IGNORE, read_mask

WEAK = 0.6  # median IoU below which the masks and the teacher have too little in common to set them against each other


class Note(NamedTuple):
    """A warning on the page: one sentence that is always visible, and the whole of it."""

    head: str
    text: str


BIAS = Note(
    "A teacher trained on biased masks cannot see the bias.",
    "Nothing says that the teacher was trained on masks you trust. A teacher trained on masks that share an error (all "
    "too large, the same part left out) has learned it, and cannot see it: such masks rank as good ones. "
    "Only a teacher of a checked list sees them (--trusted; README, The teacher).",
)


def leaked(leaks: int, count: int) -> Note | None:
    """Of `count` images `leaks` trained the teacher; None without any."""
    if not leaks:
        return None
    return Note(
        f"{leaks} of the {count} images trained the teacher itself.",
        "It will agree with their masks. "
        "Cut folds (utils/prepare_data.py folds), train a teacher on each, and audit with --folds.",
    )


def weak(iou: np.ndarray) -> Note | None:
    """The teacher agrees with few masks: the median of (n,) IoU in [0, 1] lies below WEAK; else None."""
    median = float(np.median(iou))
    if median >= WEAK:
        return None
    text = (
        f"the teacher agrees with few masks (median IoU {median:.2f}); train it longer before you believe the ranking"
    )
    return Note(f"The teacher agrees with few masks (median IoU {median:.2f}).", text)


def check_labels(frame, classes: int, args) -> None:
    """InputError where a teacher of several classes is to judge binary 0/255 masks, whose 255 would be read as void."""
    if classes == 1:
        return
    void = False
    for name in frame["filename"]:
        try:
            mask = read_mask(os.path.join(args.data_root, name), classes)
        except InputError:
            continue  # reported later, with all others
        marked = mask == IGNORE
        if (mask[~marked] > 0).any():  # mostly the first mask
            return
        void |= bool(marked.any())
    if void:
        raise InputError(
            f"{args.list}: the masks hold only 0 and {IGNORE}, but the teacher knows {classes} classes; "
            f"give a teacher of binary masks, or store class indices (0 to {classes - 1}) in the masks"
        )
