"""Lists and texts that others build on: written once; the same command again finds them, another one is refused."""

from pathlib import Path

import pandas as pd

from utils.errors import InputError
from utils.lists import write_list
from utils.logs import replace_text


def write_new_lists(lists: dict[str, pd.DataFrame], out: Path) -> None:
    """Write the lists that have rows; those that exist must be the same, since runs and noisy lists build on them."""
    same = {name for name, frame in lists.items() if _is_written(frame, out / name)}
    for name in lists:
        if name not in same and (out / name).exists():
            raise InputError(f"{out / name}: exists and differs; choose another --out or delete the old lists")
    for name, frame in lists.items():
        if len(frame) and name not in same:
            write_list(frame, out / name)
    counts = ", ".join(f"{name} {len(frame)}" for name, frame in lists.items() if len(frame))
    done = same == {name for name, frame in lists.items() if len(frame)}
    print(f"{out}: {'the same lists are there already' if done else 'wrote'} (rows): {counts}")


def write_new_text(path, text: str) -> None:
    """Write a text file; one that exists must be the same."""
    if Path(path).exists() and Path(path).read_text(errors="replace") != text:
        raise InputError(f"{path}: exists and differs; choose another --out or delete it")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, text)
    print(f"{path}: {len(text.splitlines())} lines")


def _is_written(frame: pd.DataFrame, path: Path) -> bool:
    text = frame.drop(columns=["line"]) if "line" in frame else frame
    return len(frame) > 0 and path.is_file() and path.read_text() == text.to_csv(index=False, lineterminator="\n")
