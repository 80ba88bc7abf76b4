"""Small text files that outlive their process: logs, records of what was done; nothing heavy is loaded for them."""

import json
from pathlib import Path

from utils.errors import writing


def read_jsonl(path) -> list[dict]:
    """The rows of a log, none if there is no file; a line that a kill cut off is left out."""
    rows = []
    for line in Path(path).read_text().splitlines() if Path(path).exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


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
            part.write_text(text)
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)
