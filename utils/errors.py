"""What a user did wrong, said in one line."""

import os
import sys


class InputError(Exception):
    """A mistake in the input or the flags; `utils.args.launch` prints it as one line and exits with code 2."""


def report_bad_rows(path, bad: list[tuple[int, str]], remedy: str, shown: int = 10) -> None:
    """Raise one InputError for all bad rows of a list: each is (line number in the file, what is wrong there)."""
    if not bad:
        return
    bad = sorted(bad)
    lines = "; ".join(f"line {line}: {what}" for line, what in bad[:shown])
    more = f"; and {len(bad) - shown} more" if len(bad) > shown else ""
    rows = "row" if len(bad) == 1 else "rows"
    raise InputError(f"{path}: {len(bad)} bad {rows}: {lines}{more}. {remedy}")


def warn(text: str) -> None:
    """A line on stderr for something that may be meant; once, however many processes run."""
    say(f"warning: {text}")


def say(text: str) -> None:
    """A line on stderr, from the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)
