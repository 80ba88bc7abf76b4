"""What a user did wrong, said in one line."""


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
