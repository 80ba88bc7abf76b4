"""Scores of every class of a list from counts of pixels, and their table; no torch."""

from pathlib import Path

import numpy as np
import pandas as pd

from utils.errors import InputError
from utils.images import IGNORE

_CHUNK = 2**22  # pixels that are counted at a time


def confusion(pred: np.ndarray, mask: np.ndarray, classes: int) -> np.ndarray:
    """(H, W) uint8 class indices -> (classes, classes) int64: pixels of class i in `mask` that are j in `pred`.

    Pixels that `mask` marks 255 are left out; `classes` is 2 for binary masks of 0 and 1.
    """
    pred, mask, found = pred.ravel(), mask.ravel(), np.zeros(classes**2, np.int64)
    for start in range(0, mask.size, _CHUNK):
        p, m = pred[start : start + _CHUNK], mask[start : start + _CHUNK]
        cell = m.astype(np.uint16) * np.uint16(classes) + p
        found += np.bincount(cell[m != IGNORE], minlength=classes**2)
    return found.reshape(classes, classes)


def areas_of(counts: np.ndarray) -> np.ndarray:
    """(3, classes): pixels of every class in both masks, predicted and annotated, from a `confusion`."""
    return np.stack([np.diag(counts), counts.sum(0), counts.sum(1)])


def class_table(areas: np.ndarray, names: list[str] | None = None) -> pd.DataFrame:
    """A row a class from its (3, classes) areas: index, name, iou, accuracy, precision, dice, pixels.

    Scores are in [0, 1], and NaN where they are not defined: `iou` and `dice` of a class in neither mask, `accuracy`
    (the share found) of one without annotated and `precision` of one without predicted pixels. `pixels` is the
    class's share of those annotated.
    """
    inter, pred, mask = np.asarray(areas, float)

    def share(part, whole):
        return np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)

    columns = {"index": range(len(inter)), "name": names or [""] * len(inter)}
    columns |= {"iou": share(inter, pred + mask - inter), "accuracy": share(inter, mask)}
    columns |= {"precision": share(inter, pred), "dice": share(2 * inter, pred + mask)}
    return pd.DataFrame(columns | {"pixels": mask / max(mask.sum(), 1)})


def mean_scores(areas: np.ndarray) -> dict[str, float]:
    """`miou`, `accuracy` of pixels and `class_accuracy` from (3, classes) areas, each in [0, 1].

    `miou` is the mean IoU of the classes in either mask, `class_accuracy` the mean share that is found of those
    annotated. Where nothing is annotated or predicted they are 1.
    """
    table, (inter, _, mask) = class_table(areas), np.asarray(areas, float)

    def mean(column):
        return float(column.mean()) if column.notna().any() else 1.0

    accuracy = float(inter.sum() / mask.sum()) if mask.sum() else 1.0
    return {"miou": mean(table["iou"]), "accuracy": accuracy, "class_accuracy": mean(table["accuracy"])}


def format_table(table: pd.DataFrame) -> str:
    """The table of `class_table` for people, percentages with two digits and a dash for what is not defined."""
    rows = table.to_dict("records")
    width = max([len("class")] + [len(f"{row['index']} {row['name']}") for row in rows])
    lines = [f"{'class':<{width}}     IoU   acc.  prec.   Dice pixels"]
    for row in rows:
        cells = [row[key] for key in ("iou", "accuracy", "precision", "dice", "pixels")]
        text = "".join("      -" if np.isnan(cell) else f"{100 * cell:7.2f}" for cell in cells)
        title = f"{row['index']} {row['name']}"
        lines.append(f"{title:<{width}} {text}".rstrip())
    return "\n".join(lines)


def read_names(path, classes: int) -> list[str]:
    """The names of classes 0, 1, ...: a text file with one a line, or a CSV with a column `name`.

    A column `index` or `class` beside it must count 0, 1, 2, ... InputError for that, and for more or fewer names.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; --names takes a text file with a class name a line, or a CSV")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if Path(path).suffix.lower() == ".csv":
            names = _column_of_names(pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig"), path)
        else:
            names = [line.strip() for line in text.splitlines() if line.strip()]
    except (UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError):
        raise InputError(f"{path}: not text in UTF-8, or no CSV; --names takes a class name a line") from None
    if len(names) != classes:
        raise InputError(f"{path}: {len(names)} names, but the checkpoint has {classes} classes")
    return names


def _column_of_names(frame, path):
    if "name" not in frame:
        raise InputError(f"{path}: no column `name`; its columns are {', '.join(frame.columns)}")
    index = next((frame[column] for column in ("index", "class") if column in frame), None)
    if index is not None and index.str.strip().tolist() != [str(i) for i in range(len(frame))]:
        raise InputError(f"{path}: its classes are not 0, 1, 2, ... in order; sort the rows")
    return frame["name"].str.strip().tolist()
