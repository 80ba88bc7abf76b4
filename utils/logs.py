"""Small text files that outlive their process: logs, records of what was done; nothing heavy is loaded for them."""

import json
import os
from pathlib import Path

from utils.errors import writing


def read_jsonl(path) -> list[dict]:
    """The rows of a log, none if there is no file; a line that a kill cut off is left out."""
    rows = []
    for line in Path(path).read_text(errors="replace").splitlines() if Path(path).exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def to_disk(file) -> None:
    """Have an open file's content on the disk, so that a power cut does not take it."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder) -> None:
    """Have the names in a folder on the disk, so that a power cut does not undo a rename."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_record(path) -> dict:
    """What a JSON file says, nothing if there is none or it is damaged: then the work is done again."""
    try:
        record = json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def replace_text(path, text: str) -> None:
    """Write a small file whole or not at all; InputError if it cannot be written."""
    path = Path(path)
    part = path.with_name(f".{path.name}.writing")
    try:
        with writing(path):
            with part.open("w") as file:
                file.write(text)
                to_disk(file)
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def duration(seconds: float) -> str:
    """A time for people: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
