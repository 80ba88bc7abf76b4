"""Image-level classes taken from masks: the column `label` of lists."""

from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from utils.errors import InputError, report_bad_rows
from utils.images import IGNORE, read_mask
from utils.store import in_threads


def classes_of_masks(frame: pd.DataFrame, classes: int, root, path) -> np.ndarray:
    """(images, C) bool, the classes that the masks of a list (`read_list`) hold; C is 2 for binary masks. 255 is none.

    InputError names every row of `path` whose mask cannot be read, or holds other classes.
    """
    if not 1 <= classes <= 255:
        raise InputError(f"--classes {classes}: must lie between 1 and 255")
    paths = [Path(root, name) for name in frame["filename"]]

    def look(mask):
        try:
            labels = np.unique(read_mask(mask, classes))
        except InputError as error:
            return error
        return labels[labels != IGNORE]

    found = list(tqdm(in_threads(look, paths), "masks", len(paths), disable=None, leave=False))
    bad = [(int(line), str(one)) for line, one in zip(frame["line"], found, strict=True) if isinstance(one, InputError)]
    report_bad_rows(path, bad, "Correct --data-root, --classes or these rows.")
    has = np.zeros((len(frame), max(classes, 2)), bool)
    for row, labels in zip(has, found, strict=True):
        row[labels] = True
    return has


def with_image_labels(frame: pd.DataFrame, classes: int, root, path) -> pd.DataFrame:
    """The list with a column `label` that names the classes of every mask, such as `0 5 9`, in place of any other.

    InputError also names the rows whose masks hold nothing but 255.
    """
    has = classes_of_masks(frame, classes, root, path)
    bad = [(int(line), "its mask holds nothing but 255") for line in frame.loc[~has.any(1), "line"]]
    report_bad_rows(path, bad, "An image without any class has no label; remove these rows.")
    return frame.assign(label=[" ".join(map(str, np.flatnonzero(row))) for row in has])
