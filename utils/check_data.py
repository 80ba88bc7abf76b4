"""Checks lists and every file they name, without training: all that would end a run, and every bad row of it at once.

Run     python utils/check_data.py train.csv valid.csv --test_csv test.csv --data-root data
Writes  bad_rows.csv (--out) with list, line, img, filename, reason, where anything is bad. Line 0: the list as a whole.

The exit code is 0 if all is good, and 2 if anything is bad. Warnings are no faults.
"""

import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import cv2
import numpy as np
import pandas as pd
from tqdm import tqdm

from utils.args import launch
from utils.errors import InputError, warn
from utils.images import IGNORE, check_sizes, read_image, read_mask
from utils.lists import inspect_list
from utils.store import in_threads

COLUMNS = ["list", "line", "img", "filename", "reason"]


@dataclass
class Args:
    lists: Annotated[list[str], "lists to check (CSV: img, filename)", "positional"]
    test_csv: Annotated[list[str], "held-out lists, checked too; they may share no image with any other list"] = field(
        default_factory=list
    )
    data_root: Annotated[str, "folder that relative paths in the lists start from"] = "."
    classes: Annotated[int, "1: binary masks; more: class indices, 255 is ignored"] = 1
    out: Annotated[str, "where the bad rows go"] = "bad_rows.csv"
    workers: Annotated[int, "threads; 0: one a core"] = 0


class Found(NamedTuple):
    """What one file holds: height, width, and of a mask whether any pixel is labelled (above 0) and any is 0."""

    shape: tuple[int, int]
    labelled: bool = False
    background: bool = False


class Listed:
    """A list with its rows and, by line, the reasons why they are bad; line 0 is the list itself."""

    def __init__(self, path: str):
        self.path, self.reasons, self.rows = path, {}, []
        try:
            frame, bad = inspect_list(path)
        except InputError as error:
            self.say(0, str(error))
            return
        for line, reason in bad:
            self.say(line, reason)
        self.rows = list(zip(frame["line"].tolist(), frame["img"], frame["filename"], strict=True))

    def say(self, line: int, reason: str) -> None:
        self.reasons.setdefault(line, []).append(reason)


def main(args: Args) -> None:
    """Check everything, write the bad rows and print a line a list; InputError at the end if anything is bad."""
    if args.workers < 0 or not 1 <= args.classes <= 255:
        raise InputError("--workers must be 0 or more, --classes between 1 and 255")
    both = {os.path.realpath(path) for path in args.lists} & {os.path.realpath(path) for path in args.test_csv}
    if both:
        raise InputError(f"{min(both)}: given as a list and as --test_csv; give it once")
    _check_out(args)
    lists = [Listed(path) for path in dict.fromkeys([*args.lists, *args.test_csv])]
    root, held = Path(args.data_root), set(args.test_csv)
    _check_leaks([one for one in lists if one.path in held], [one for one in lists if one.path not in held], root)
    _check_files(lists, root, args)
    for one in lists:
        print(f"{one.path}: {len(one.rows)} rows, {len(one.reasons)} bad")
    table = [row for one in lists for row in _bad_rows(one)]
    if table:
        _write(table, Path(args.out))
        rows, them = ("row is", "it") if len(table) == 1 else ("rows are", "them")
        raise InputError(f"{len(table)} bad {rows} listed in {args.out}; correct or remove {them}")
    print("all good")


def _check_out(args) -> None:
    """A bad_rows.csv of an earlier check is replaced, any other file never."""
    out = Path(args.out)
    if out.exists() and not (
        out.is_file() and out.open("rb").readline(200).decode(errors="replace").split() == _header()
    ):
        raise InputError(f"{out}: exists and was not written by this tool; choose another --out")


def _header() -> list[str]:
    return [",".join(COLUMNS)]


def _real(root: Path, name: str) -> str | None:
    """The file behind a cell, links followed; None for a cell no file can have."""
    return os.path.realpath(root / name) if name and not set("\0\r\n") & set(name) else None


def _check_leaks(held: list[Listed], others: list[Listed], root: Path) -> None:
    """Mark the rows of any list whose image is in a held-out list too, under whatever path."""
    where = {}
    for one in [*held, *others]:
        inside = {}
        for line, img, _ in one.rows:
            real = _real(root, img)
            if real is None:
                continue
            inside.setdefault(real, line)
            if real in where:
                one.say(line, f"{img} is also in {where[real]}")
        if one in held:
            for real, line in inside.items():
                where.setdefault(real, f"the held-out {one.path} line {line}")


def _check_files(lists: list[Listed], root: Path, args) -> None:
    """Decode every image and mask once, however many rows name it, and judge the rows by what was found."""
    tasks = {}
    for one in lists:
        for _, img, mask in one.rows:
            for kind, name in (("image", img), ("mask", mask)):
                real = _real(root, name)
                if real is not None:
                    tasks.setdefault((kind, real), str(root / name))

    def look(task) -> Found | str:
        (kind, _), path = task
        try:
            return _look(kind, path, args.classes)
        except InputError as error:
            return str(error).removeprefix(path)  # each row names it as it spells it

    cv2.setNumThreads(0)  # the threads are ours
    results = in_threads(look, tasks.items(), args.workers)
    results = tqdm(results, "checking", len(tasks), leave=False, disable=None)
    found = dict(zip(tasks, results, strict=True))
    for one in lists:
        _judge(one, root, found, args.classes)


def _look(kind: str, path: str, classes: int) -> Found:
    if kind == "image":
        return Found(read_image(path).shape[:2])
    mask = read_mask(path, classes)
    valid = mask if classes == 1 else mask[mask != IGNORE]
    return Found(mask.shape, bool(valid.any()), not valid.all())


def _judge(one: Listed, root: Path, found: dict, classes: int) -> None:
    masks, sizes = [], Counter()
    for line, img, mask in one.rows:
        pair = [found.get((kind, _real(root, name))) for kind, name in (("image", img), ("mask", mask))]
        for result, name in zip(pair, (img, mask), strict=True):
            if isinstance(result, str):
                one.say(line, f"{root / name}{result}")
        if isinstance(pair[1], Found):
            masks.append(pair[1])
        if all(isinstance(result, Found) for result in pair):
            sizes[pair[0].shape] += 1
            try:
                check_sizes(root / img, pair[0].shape, root / mask, pair[1].shape)
            except InputError as error:
                one.say(line, str(error))
    if classes > 1 and masks and not any(mask.labelled for mask in masks):
        what = "no mask holds a class above 0 other than 255, which means ignore"
        one.say(0, f"{one.path}: {what}; for 0/255 masks use --classes 1")
    elif masks:
        empty, full = sum(not mask.labelled for mask in masks), sum(not mask.background for mask in masks)
        _warn_share(one, empty, len(masks), "show nothing")
        _warn_share(one, full if classes == 1 else 0, len(masks), "are full, without background")
    if len(sizes) > 1:
        (low_h, low_w), (high_h, high_w) = min(sizes, key=np.prod), max(sizes, key=np.prod)
        span = f"{low_w}x{low_h} to {high_w}x{high_h}"
        warn(f"{one.path}: images of {len(sizes)} sizes, {span}; --size 0 needs --batch-size 1")


def _warn_share(one: Listed, count: int, total: int, what: str) -> None:
    if count:
        warn(f"{one.path}: {count} of {total} masks ({count / total:.1%}) {what}")


def _bad_rows(one: Listed) -> list[tuple]:
    cells = {line: (img, mask) for line, img, mask in one.rows}
    return [
        (one.path, line, *cells.get(line, ("", "")), " and ".join(reasons))
        for line, reasons in sorted(one.reasons.items())
    ]


def _write(table: list[tuple], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.{os.getpid()}")
    pd.DataFrame(table, columns=COLUMNS).to_csv(part, index=False, lineterminator="\n")
    part.replace(out)


if __name__ == "__main__":
    launch(main, Args)
