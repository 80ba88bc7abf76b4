"""Reading run logs without loading anything heavy."""

import json
from pathlib import Path


def read_jsonl(path) -> list[dict]:
    """The rows of a log, none if there is no file; a line that a kill cut off is left out."""
    rows = []
    for line in Path(path).read_text().splitlines() if Path(path).exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
