"""Masks of many classes turned into masks of groups of them, by a table."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
from tqdm import tqdm

from utils.errors import InputError, report_bad_rows
from utils.images import IGNORE, read_mask, write_mask
from utils.lists import from_root, read_list, unique_stems
from utils.store import in_threads
from utils.written import write_new_lists, write_new_text


@dataclass
class RegroupArgs:
    list: Annotated[str, "list whose masks (filename) and image-level classes (label), where it has them, are mapped"]
    mapping: Annotated[str, "CSV: index (or class) of a class, group it becomes; optional group_name"]
    out: Annotated[str, "folder of the new masks; a list OUT.csv and, with group_name, OUT.txt are written with them"]
    data_root: Annotated[str, "folder that relative paths in the list start from"] = "."


def read_mapping(path) -> tuple[np.ndarray, list[str]]:
    """(256,) uint8, the group of every class, 255 where it has none; and the names of groups 0, 1, ... if it has any.

    InputError for a table without both columns, and for rows with a class twice, numbers out of range or two names.
    """
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig", skip_blank_lines=False)
    except (OSError, ValueError):  # what pandas raises for text that is no table
        raise InputError(f"{path}: no such file, or no CSV; --mapping needs columns index and group") from None
    frame = frame.rename(columns=lambda name: name.strip()).map(str.strip)
    key = next((name for name in ("index", "class") if name in frame), None)
    if key is None or "group" not in frame:
        raise InputError(f"{path}: needs columns index and group; it has {', '.join(frame.columns)}")
    table, names, bad, seen = np.full(256, IGNORE, np.uint8), {}, [], {}
    for line, row in enumerate(frame.to_dict("records"), 2):
        old, new, name = row[key], row["group"], row.get("group_name", "")
        if not any(row.values()) or (new == "" and old.isdecimal()):
            continue  # a class without a group is left out, as one that is not listed
        if not (old.isdecimal() and int(old) < IGNORE and new.isdecimal() and int(new) <= IGNORE):
            bad.append((line, f"class {old or 'missing'}, group {new or 'missing'}"))
        elif seen.setdefault(int(old), line) != line:
            bad.append((line, f"class {old} is in line {seen[int(old)]} too"))
        elif name and names.setdefault(int(new), name) != name:
            bad.append((line, f"group {new} is called {name} here and {names[int(new)]} before"))
        else:
            table[int(old)] = int(new)
    report_bad_rows(path, bad, "Classes and groups are whole numbers from 0 to 254; 255 or nothing leaves one out.")
    groups = sorted(set(table.tolist()) - {IGNORE})
    if not groups:
        raise InputError(f"{path}: no class has a group")
    return table, [names.get(group, "") for group in range(groups[-1] + 1)] if names else []


def regroup(args: RegroupArgs) -> None:
    """Turn masks of many classes into masks of groups of classes, by a table."""
    frame, names = write_groups(args)
    write_new_lists({f"{Path(args.out).name}.csv": frame}, Path(args.out).parent)
    if names:
        write_new_text(f"{args.out}.txt", "\n".join(names) + "\n")


def write_groups(args: RegroupArgs) -> tuple[pd.DataFrame, list[str]]:
    """Write the mapped masks; returns their list and the names of the groups.

    Masks that are there already must be the same. The list's `label` becomes the groups in each mask; without masks
    the old classes are mapped. InputError names every row that is bad, before a mask that is there is touched.
    """
    table, names = read_mapping(args.mapping)
    frame = read_list(args.list, ("img",))
    if "filename" not in frame and "label" not in frame:
        raise InputError(f"{args.list}: no column filename or label, so there is nothing to map")
    if "filename" not in frame:
        frame["label"] = _mapped_labels(frame, table, args.list)
        return frame.drop(columns="line"), names
    frame = read_list(args.list)
    paths = [Path(args.out) / f"{stem}.png" for stem in unique_stems(frame, args.list)]
    Path(args.out).mkdir(parents=True, exist_ok=True)

    def one(row):
        try:
            mask = table[read_mask(Path(args.data_root, frame["filename"].iloc[row]), IGNORE)]
            if not paths[row].exists():
                write_mask(paths[row], mask, IGNORE)
            elif not np.array_equal(read_mask(paths[row], IGNORE), mask):
                raise InputError(f"{paths[row]}: exists and differs; choose another --out")
        except InputError as error:
            return error
        return _text(np.unique(mask))

    found = list(tqdm(in_threads(one, range(len(frame))), "masks", len(frame), disable=None, leave=False))
    bad = [(int(line), str(e)) for line, e in zip(frame["line"], found, strict=True) if isinstance(e, InputError)]
    report_bad_rows(args.list, bad, "Correct --data-root or these rows.")
    frame["filename"], frame["label"] = [from_root(path, args.data_root) for path in paths], found
    return frame.drop(columns="line"), names


def _mapped_labels(frame, table, path) -> list[str]:
    bad = []
    for line, cell in zip(frame["line"], frame["label"], strict=True):
        if any(not word.isdecimal() or int(word) > IGNORE for word in cell.split()):
            bad.append((int(line), f"label {cell}"))
    report_bad_rows(path, bad, "A label is classes from 0 to 254, separated by blanks.")
    return [_text({int(table[int(word)]) for word in cell.split()}) for cell in frame["label"]]


def _text(labels: Iterable[int]) -> str:
    return " ".join(str(label) for label in sorted(labels) if label != IGNORE)
