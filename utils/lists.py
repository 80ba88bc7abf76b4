"""The CSV lists every script and tool meets in: read by column name, joined on `img`, written whole or not at all."""

import csv
import os
import warnings
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pandas as pd

from utils.errors import InputError, report_bad_rows

ALIASES = {"img": ("img", "image"), "filename": ("filename", "mask", "0"), "weight": ("weight",)}

_SLICE = 50_000  # rows whose text is in memory at a time when lists are written


def read_list(path, need: tuple[str, ...] = ("img", "filename")) -> pd.DataFrame:
    """Read a split, weight or unlabelled list.

    Returns a frame of strings with the columns `img`, `filename` (the mask), `iterations` (int), `weight` (float in
    [0, 1]) where the file has them, any further column as text, and `line`, the row's line number in the file.
    Raises InputError for what `inspect_list` cannot read or finds bad, all bad rows in one message.
    """
    frame, faults = _inspect(path, need)
    remedies = " ".join(dict.fromkeys(remedy for _, _, remedy in faults))
    report_bad_rows(path, _by_line(faults), remedies)
    return frame.astype({"iterations": int}) if "iterations" in frame else frame


def inspect_list(path, need: tuple[str, ...] = ("img", "filename")) -> tuple[pd.DataFrame, list[tuple[int, str]]]:
    """Read a list and judge its rows: (frame, bad), where `bad` has (line, reason) for every bad row, by line.

    The frame is that of `read_list`, bad rows included; a weight or level that is no number is NaN. Bad are an empty
    cell, an image listed before (under whatever spelling), a path that leaves the root by `..` or that no file can
    have, and a weight or level out of range. InputError for a file that is missing, empty or no CSV list, or lacks a
    column of `need`.
    """
    frame, faults = _inspect(path, need)
    return frame, _by_line(faults)


def write_list(frame: pd.DataFrame, path) -> None:
    """Write a list as CSV with a header and no index; a killed process leaves the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    frame.drop(columns=["line"], errors="ignore").to_csv(part, index=False, lineterminator="\n")
    part.replace(path)


def write_lists(columns: dict[str, list[str] | np.ndarray], files: dict[Path, dict[str, str]]) -> None:
    """Write several lists from the same columns, each {name in the file: name in `columns`}, as `write_list` would.

    Every number becomes text once, however many lists it stands in; all lists are complete before any replaces an
    old one. The columns are as long as each other: lists of text, arrays of whole numbers or floats.
    """
    parts = {Path(path): Path(path).with_name(f".{Path(path).name}.{os.getpid()}") for path in files}
    used = list(dict.fromkeys(name for chosen in files.values() for name in chosen.values()))
    count = len(columns[used[0]])
    with ExitStack() as stack:
        writers = []
        for (path, part), chosen in zip(parts.items(), files.values(), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(part.open("w", encoding="utf-8", newline=""))
            writers.append((csv.writer(file, lineterminator="\n"), list(chosen.values())))
            writers[-1][0].writerow(chosen)
        for first in range(0, count, _SLICE):
            cells = {name: _as_text(columns[name][first : first + _SLICE]) for name in used}
            for writer, names in writers:
                writer.writerows(zip(*(cells[name] for name in names), strict=True))
    for path, part in parts.items():
        part.replace(path)


def _as_text(cells) -> list[str]:
    return ["" if x != x else repr(x) for x in cells.tolist()] if isinstance(cells, np.ndarray) else cells


def from_root(path, root) -> str:
    """A path as a list names it: relative to `root` if it lies inside, else absolute.

    Not resolved: a link to a big disk inside the root stays a path inside the root.
    """
    path, root = Path(os.path.abspath(path)), Path(os.path.abspath(root))
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


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


def image_labels(frame: pd.DataFrame, classes: int, path) -> np.ndarray:
    """(N, classes) bool: which classes an image holds by the column `label`, such as `0 5 9`; the background is one.

    InputError for a list without it, and for rows without a class or with one that is none of 0 to classes - 1.
    """
    if "label" not in frame:
        what = "the classes of an image as indices separated by blanks, such as `0 5 9`"
        raise InputError(f"{path}: no column `label`; it holds {what}")
    found, bad = np.zeros((len(frame), classes), bool), []
    for i, (line, cell) in enumerate(zip(frame["line"], frame["label"], strict=True)):
        wrong = [word for word in cell.split() if not word.isdecimal() or int(word) >= classes]
        if wrong or not cell.split():
            bad.append((int(line), f"label {_shown(cell) or 'is empty'}"))
        else:
            found[i, [int(word) for word in cell.split()]] = True
    report_bad_rows(path, bad, f"A label is one or more of the classes 0 to {classes - 1}, separated by blanks.")
    return found


def stem_of(img: str) -> str:
    """`data/person/00012.jpg` -> `00012`: the name under which masks of an image are written."""
    stem, _, suffix = img[img.rfind("/") + 1 :].rpartition(".")
    return stem if stem.strip(".") and suffix else Path(img).stem  # a Path takes ten times as long


def unique_stems(frame: pd.DataFrame, path) -> list[str]:
    """The stem of every image, in order; InputError where two images share one, since their masks would collide."""
    stems = list(map(stem_of, frame["img"].tolist()))
    if len(set(stems)) == len(stems):
        return stems
    again = frame[pd.Series(stems, frame.index).duplicated()]
    bad = [(row.line, f"stem `{stem_of(row.img)}` is used before") for row in again.itertuples()]
    report_bad_rows(path, bad, "Masks are named by stem: rename the images or split the list.")
    return stems


def _inspect(path, need) -> tuple[pd.DataFrame, list[tuple[int, str, str]]]:
    """The frame, and (line, reason, remedy) of every fault."""
    frame = _rename(_read_text(Path(path)), path)
    for column in need:
        if column not in frame:
            raise InputError(f"{path}: no column `{column}`{_why_missing(column, frame)}")
    faults = []
    remedy = f"Every row needs {', '.join(need)}."
    faults += [(line, "empty cell", remedy) for line in frame.loc[(frame[list(need)] == "").any(axis=1), "line"]]
    for column in [name for name in ("img", "filename") if name in frame]:
        faults += _bad_paths(frame, column)
    faults += _repeated(frame)
    if "iterations" in frame:
        faults += _to_numbers(frame, need, "iterations", 0, 10_000, whole=True)
    if "weight" in frame:
        faults += _to_numbers(frame, need, "weight", 0, 1)
    return frame, faults


def _by_line(faults) -> list[tuple[int, str]]:
    reasons = {}
    for line, reason, _ in faults:
        reasons.setdefault(int(line), []).append(reason)
    return [(line, " and ".join(reasons[line])) for line in sorted(reasons)]


def _bad_paths(frame, column):
    faults, cells = [], frame[column].tolist()
    if not any(sign in "\t".join(cells) for sign in ("\0", "\r", "\n", "..")):  # most lists, at a glance
        return faults
    for line, cell in zip(frame["line"], cells, strict=True):
        if any(sign in cell for sign in "\0\r\n"):
            what = "a NUL byte" if "\0" in cell else "a line break"
            faults.append(
                (line, f"{what} in {column} {_shown(cell)}", "Correct the path, or close the quotes before it.")
            )
        elif ".." in cell and os.path.normpath(cell).split("/")[0] == "..":
            remedy = "Write an absolute path, or start --data-root higher up."
            faults.append((line, f"{column} {_shown(cell)} leaves the root", remedy))
    return faults


def _repeated(frame):
    faults, first = [], {}
    for line, cell in zip(frame["line"].tolist(), frame["img"].tolist(), strict=True):
        before = first.setdefault(os.path.normpath(cell), line) if cell else line
        if before != line:
            faults.append((line, f"{_shown(cell)} is listed before in line {before}", "List an image once."))
    return faults


def _shown(cell: str) -> str:
    """A cell as one short line, whatever it holds."""
    return repr(cell[:200])[1:-1]


def _to_numbers(frame, need, column, low, high, whole=False):
    """Turn a column of text into numbers, NaN where it holds none; returns the faults."""
    values = pd.to_numeric(frame[column], errors="coerce").astype(float)
    wrong = ~values.between(low, high) | (whole & (values != values.round()))
    wrong &= (frame[column] != "") | (column not in need)  # else it is an empty cell already
    kind = "a whole number" if whole else "a number"
    remedy = f"{column.capitalize()} must be {kind} between {low} and {high}."
    bad = frame.loc[wrong, ["line", column]]
    frame[column] = values
    return [(line, f"{column} {_shown(cell) or 'is empty'}", remedy) for line, cell in bad.itertuples(index=False)]


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
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; save the list as CSV in UTF-8") from None
    except pd.errors.ParserError as error:
        raise InputError(f"{path}: not a CSV list: {_why_unparsed(str(error))}") from None
    other = next((name for sign, name in ((";", "`;`"), ("\t", "tabs")) if sign in str(frame.columns[0])), None)
    if other and len(frame.columns) == 1:
        raise InputError(f"{path}: its columns are separated by {other}; a list must be separated by commas")
    frame = frame.fillna("")  # the cells of a row that is too short
    # A quoted cell may hold line breaks, and the lines below it must still be counted as an editor counts them.
    breaks = np.zeros(len(frame), int)
    if any("\n" in "\t".join(cells.tolist()) for _, cells in frame.items()):
        breaks += frame.apply(lambda column: column.str.count("\n")).sum(axis=1).to_numpy(int)
    frame = frame.apply(lambda column: column.str.strip())
    if "line" in frame:
        raise InputError(f"{path}: a column `line`: the name is taken for line numbers; rename it")
    lines = np.arange(2, len(frame) + 2) + np.cumsum(breaks) - breaks
    frame = frame.assign(line=lines)[(frame != "").any(axis=1)].reset_index(drop=True)
    if frame.empty:
        raise InputError(f"{path}: the list has no rows; it needs at least one image")
    return frame


def _why_unparsed(error: str) -> str:
    if "EOF inside string" in error:  # pandas counts rows from 0 and the header as one
        row = int(error.split()[-1]) + 1
        return f'the quote in row {row} is never closed; close it, or double a " that belongs to a name'
    return f'{error.strip().split("error: ")[-1]}; put cells that hold a comma in quotes ("a,b.png")'


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
