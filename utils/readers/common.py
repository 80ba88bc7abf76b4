"""What the readers of published datasets share: finding files, converting masks once, and writing the lists."""

import json
import os
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import pandas as pd
from tqdm import tqdm

from utils.errors import InputError, first_line, warn
from utils.images import look_at, read_mask, write_mask
from utils.lists import from_root
from utils.logs import read_record, replace_text
from utils.store import in_threads
from utils.written import write_new_lists

NOTE = "prepared.json"  # in the output folder: of what, and how, the masks there were made


@dataclass
class SetArgs:
    root: Annotated[str, "folder into which the dataset was unpacked", "positional"]
    out: Annotated[str, "folder that gets the lists, and the masks that must be converted"]
    data_root: Annotated[str, "paths inside this folder are written relative to it"] = "."
    workers: Annotated[int, "threads; 0: one a core"] = 0


class Job(NamedTuple):
    """Files to be written by one call, and the files that they are made of."""

    sources: tuple[Path, ...]
    targets: tuple[Path, ...]
    make: Callable[[], None]


def folder_of(root, names: Iterable[str], remedy: str) -> Path:
    """The first of these sub folders of `root` (".": itself) that exists; InputError with the remedy if none does."""
    names, root = list(names), Path(root)
    found = next((root / name for name in names if (root / name).is_dir()), None)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; {remedy}")
    if found is None:
        raise InputError(f"{root}: no folder {' or '.join(names)} in it; {remedy}")
    return found


def by_name(folder: Path, pattern: str, ending: str, remedy: str) -> dict[str, Path]:
    """The files below `folder` that match a glob pattern, by name without `ending`, in order of their paths.

    InputError with the remedy for a missing folder and for one without such files, and for a name found twice.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; {remedy}")
    found = {}
    for path in sorted(folder.glob(pattern)):
        name = path.name.removesuffix(ending)
        if path.name.startswith(".") or not path.name.endswith(ending):
            continue
        if name in found:
            raise InputError(f"{path}: `{found[name]}` has the same name; remove one of them")
        found[name] = path
    if not found:
        raise InputError(f"{folder}: holds no {pattern}; {remedy}")
    return found


def read_ids(path: Path, remedy: str) -> list[str]:
    """The image ids of a text list, one in a line, in order; InputError if it is missing, empty or repeats an id."""
    try:
        ids = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(f"{path}: cannot be read ({why}); {remedy}") from None
    if not ids or len(set(ids)) < len(ids):
        raise InputError(f"{path}: {'names an image twice' if ids else 'is empty'}; {remedy}")
    return ids


def pair(images: dict[str, Path], masks: dict[str, Path], remedy: str) -> dict[str, tuple[Path, Path]]:
    """(image, mask) of every image by name; InputError if one has no mask, a warning for masks without image."""
    lone = [name for name in images if name not in masks]
    if lone:
        more = f" ({len(lone)} such images)" if len(lone) > 1 else ""
        raise InputError(f"{images[lone[0]]}: has no mask{more}; {remedy}")
    if len(masks) > len(images):
        spare = next(path for name, path in masks.items() if name not in images)
        more = len(masks) - len(images)
        warn(f"{spare.parent}: {more} masks have no image and are left out, the first is {spare.name}")
    return {name: (path, masks[name]) for name, path in images.items()}


def table_of(classes: dict[int, int]) -> np.ndarray:
    """A table of 256 for `remap`: the class of every pixel value, -1 for values that a file must not hold."""
    table = np.full(256, -1, np.int16)
    for value, new in classes.items():
        table[value] = new
    return table


def remap(mask: np.ndarray, table: np.ndarray, path) -> np.ndarray:
    """(H, W) uint8 pixel values -> uint8 classes of `table`; InputError for a value to which it gives -1."""
    new = table[mask]
    if new.min(initial=0) < 0:
        value = int(mask[new < 0].max())
        raise InputError(f"{path}: holds {value}, which is no class of this dataset; get the file again")
    return new.astype(np.uint8)


def remapping(source: Path, target: Path, table: np.ndarray) -> Job:
    """The job that writes a mask with the classes of `table`."""

    def make() -> None:
        write_mask(target, remap(read_mask(source, 256), table, source), classes=2)  # more than one: written as it is

    return Job((source,), (target,), make)


def claim(out, settings: dict, folders: Iterable[str] = ("mask",)) -> None:
    """Note in `out` how its masks are made; InputError if others are there, which would pass for these."""
    out, note = Path(out), Path(out) / NOTE
    record = read_record(note)
    if record and record != settings:
        changed = sorted(key for key in settings.keys() | record.keys() if settings.get(key) != record.get(key))
        what = ", ".join(f"{key} {record.get(key)}" for key in changed)
        raise InputError(f"{note}: the masks there were made with {what}; choose another --out or delete {out}")
    full = next((out / name for name in folders if any((out / name).glob("*"))), None)
    if full and not record:
        raise InputError(f"{full}: holds files, and no {NOTE} says what they are; choose another --out or delete it")
    out.mkdir(parents=True, exist_ok=True)
    if not record:
        replace_text(note, json.dumps(settings, indent=1) + "\n")


def convert(jobs: list[Job], workers: int) -> int:
    """Do the jobs whose targets are missing or older than their sources; returns how many there were.

    Every file is written whole or not at all, so an interrupted conversion goes on where it was.
    """
    if workers < 0:
        raise InputError(f"--workers {workers}: must be 0 or more")
    for folder in {target.parent for job in jobs for target in job.targets}:
        folder.mkdir(parents=True, exist_ok=True)
    todo = [job for job in jobs if not _is_done(job)]
    done = in_threads(lambda job: job.make(), todo, workers)
    with _remedied():
        for _ in tqdm(done, "converting", len(todo), disable=None if todo else True, leave=False):
            pass
    return len(todo)


def check_masks(paths: list[Path], classes: int, workers: int) -> None:
    """InputError for the first mask that is damaged or holds other values than `classes` indices and 255."""
    done = in_threads(lambda path: read_mask(path, classes) is None, paths, workers)
    with _remedied():
        for _ in tqdm(done, "masks", len(paths), disable=None, leave=False):
            pass


def compare_counts(root, counts: dict[str, int], published: dict[str, int]) -> None:
    """Warn, with both figures, where a list does not have as many images as the dataset was published with."""
    for name, count in counts.items():
        if name in published and count != published[name]:
            warn(f"{root}: {name} has {count} images, {published[name]} were published; the dataset may be incomplete")


def rows_of(pairs: Iterable[tuple[Path, Path]], data_root) -> pd.DataFrame:
    """A clean list of (image, mask) files, the columns img, filename and iterations; InputError for a missing image."""
    with _remedied():
        rows = [(from_root(image, data_root), from_root(mask, data_root), 0) for image, mask in pairs if look_at(image)]
    return pd.DataFrame(rows, columns=["img", "filename", "iterations"])


def finish(out, lists: dict[str, pd.DataFrame], names=(), classes: int = 1, converted: int = 0) -> None:
    """Write the lists, with names also classes.csv (index, name), and say what was done and which --classes suits."""
    out = Path(out)
    write_new_lists({f"{name}.csv": frame for name, frame in lists.items()}, out)
    table = pd.DataFrame(enumerate(names), columns=["index", "name"])
    text = table.to_csv(index=False, lineterminator="\n")
    if len(table) and not ((out / "classes.csv").is_file() and (out / "classes.csv").read_text() == text):
        replace_text(out / "classes.csv", text)
    made = f"{converted} masks converted, " if converted else ""
    print(f"{made}train with --classes {classes}")


def fetch(root, get: Callable[[], object], source: str) -> None:
    """Download by torchvision; InputError with the address if that fails."""
    print(f"downloading {source} into {root}")
    try:
        get()
    except (OSError, RuntimeError) as error:  # no network, no room, a wrong checksum
        why = first_line(error)
        raise InputError(f"{root}: the download failed ({why}); get {source} and unpack it there") from None


@contextmanager
def _remedied():
    """Ends a message about a damaged or missing file of the dataset with what to do, where it does not say so."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error) if ";" in str(error) else f"{error}; get the file again") from None


def _is_done(job: Job) -> bool:
    try:
        newest = max(os.stat(path).st_mtime_ns for path in job.sources)
        return all(os.stat(path).st_mtime_ns >= newest for path in job.targets)
    except OSError:  # a target is missing; a missing source is reported by the one who reads it
        return False
