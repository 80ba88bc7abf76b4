"""The CSV lists every script and tool meets in: read by column name, joined on `img`, written whole or not at all."""

import os
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from utils.errors import InputError, report_bad_rows

ALIASES = {"img": ("img", "image"), "filename": ("filename", "mask", "0"), "weight": ("weight",)}


def read_list(path, need: tuple[str, ...] = ("img", "filename")) -> pd.DataFrame:
    """Read a split, weight or unlabelled list.

    Returns a frame of strings with the columns `img`, `filename` (the mask), `iterations` (int), `weight` (float in
    [0, 1]) where the file has them, any further column as text, and `line`, the row's line number in the file.
    Raises InputError for a missing or empty file, a missing column of `need`, a repeated image or a bad weight.
    """
    frame = _read_text(Path(path))
    frame = _rename(frame, path)
    for column in need:
        if column not in frame:
            raise InputError(f"{path}: no column `{column}`{_why_missing(column, frame)}")
    empty = [(row.line, "empty cell") for row in frame[(frame[list(need)] == "").any(axis=1)].itertuples()]
    report_bad_rows(path, empty, f"Every row needs {', '.join(need)}.")
    again = frame[frame["img"].duplicated()]
    report_bad_rows(path, [(r.line, f"{r.img} is listed before") for r in again.itertuples()], "List an image once.")
    if "iterations" in frame:
        frame["iterations"] = _numbers(frame, path, "iterations", 0, 10_000, whole=True).astype(int)
    if "weight" in frame:
        frame["weight"] = _numbers(frame, path, "weight", 0, 1)
    return frame


def write_list(frame: pd.DataFrame, path) -> None:
    """Write a list as CSV with a header and no index; a killed process leaves the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    frame.drop(columns=["line"], errors="ignore").to_csv(part, index=False, lineterminator="\n")
    part.replace(path)


def join(left: pd.DataFrame, right: pd.DataFrame, what: str) -> pd.DataFrame:
    """Rows of `right` in the order of `left`, matched on `img`; InputError names the images that `right` lacks."""
    table = right.set_index("img")
    lacking = left.loc[~left["img"].isin(table.index), "img"]
    if len(lacking):
        raise InputError(f"{what}: {len(lacking)} images of the list are missing, the first is {lacking.iloc[0]}")
    return table.loc[left["img"]].reset_index()


def weight_score(frame: pd.DataFrame, path) -> str:
    """The score behind the weights of a list: "miou", "bf", ...

    Told by a file name that ends in `_weight_bfscore.csv`, as published and as utils/get_weight.py writes it, else by
    the column that equals `weight`; InputError if neither tells.
    """
    names = ("miou", "bf", "bm", "dice", "iou")
    for name in names:
        if Path(path).name.endswith(f"_weight_{name}score.csv"):
            return name
    for name in names:
        if name in frame and np.allclose(pd.to_numeric(frame[name], errors="coerce"), frame["weight"], atol=1e-6):
            return name
    raise InputError(f"{path}: cannot tell which score made its weights; say it with --quality miou|bf|bm")


def noisy_share(frame: pd.DataFrame) -> float | None:
    """The share of rows with `iterations` above 0; None for a list that does not say."""
    return float((frame["iterations"] > 0).mean()) if "iterations" in frame else None


def stem_of(img: str) -> str:
    """`data/person/00012.jpg` -> `00012`: the name under which masks of an image are written."""
    return Path(img).stem


def unique_stems(frame: pd.DataFrame, path) -> list[str]:
    """The stem of every image, in order; InputError where two images share one, since their masks would collide."""
    stems = frame["img"].map(stem_of)
    again = frame[stems.duplicated()]
    bad = [(row.line, f"stem `{stem_of(row.img)}` is used before") for row in again.itertuples()]
    report_bad_rows(path, bad, "Masks are named by stem: rename the images or split the list.")
    return stems.tolist()


def _read_text(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise InputError(f"{path}: no such file; write it with utils/prepare_data.py or correct the path")
    try:
        # blank lines are kept until the rows are numbered; index_col: a trailing comma must not shift the columns
        how = {"dtype": str, "keep_default_na": False, "skip_blank_lines": False, "index_col": False}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pd.errors.ParserWarning)  # it would announce that comma
            frame = pd.read_csv(path, encoding="utf-8-sig", **how)
    except pd.errors.EmptyDataError:
        raise InputError(f"{path}: the file is empty; a list has a header and at least one row") from None
    except (pd.errors.ParserError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a CSV list: {str(error).strip()}") from None
    frame = frame.apply(lambda column: column.str.strip())
    if "line" in frame:
        raise InputError(f"{path}: a column `line`: the name is taken for line numbers; rename it")
    frame = frame.assign(line=np.arange(2, len(frame) + 2))[(frame != "").any(axis=1)].reset_index(drop=True)
    if frame.empty:
        raise InputError(f"{path}: the list has no rows; it needs at least one image")
    return frame


def _rename(frame: pd.DataFrame, path) -> pd.DataFrame:
    names = [str(name).strip() for name in frame.columns]
    if names[0] == "" or names[0].startswith("Unnamed:"):
        # the published lists keep the image in a column without a name; beside a named one it is a row number
        names[0] = "" if {"img", "image"} & set(names) else "img"
    for column, others in ALIASES.items():
        found = [name for name in others if name in names]
        if column not in names and found:
            names[names.index(found[0])] = column
    if "1" in names and not {"iterations", "weight"} & set(names):
        values = pd.to_numeric(frame.iloc[:, names.index("1")], errors="coerce")
        whole = bool((values == values.round()).all())
        if whole and values.max() <= 1:
            raise InputError(f"{path}: column `1` can be noise levels or weights; name it `iterations` or `weight`")
        names[names.index("1")] = "iterations" if whole else "weight"
    return frame.set_axis(names, axis=1).drop(columns="", errors="ignore")


def _why_missing(column: str, frame: pd.DataFrame) -> str:
    if column == "weight" and "iterations" in frame:
        return "; `iterations` is the noise level, not a weight: score the list with utils/get_weight.py first"
    if column == "weight":
        return "; score the list with utils/get_weight.py first"
    return f"; its columns are {', '.join(map(str, frame.columns))}"


def _numbers(frame, path, column, low, high, whole=False):
    values = pd.to_numeric(frame[column], errors="coerce")
    wrong = ~values.between(low, high) | (whole & (values != values.round()))
    bad = [(row.line, f"{column} {getattr(row, column) or 'is empty'}") for row in frame[wrong].itertuples()]
    kind = "a whole number" if whole else "a number"
    report_bad_rows(path, bad, f"{column.capitalize()} must be {kind} between {low} and {high}.")
    return values
