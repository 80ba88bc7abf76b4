"""What a user did wrong, said in one line."""

import errno
import os
import sys
from contextlib import contextmanager


class InputError(Exception):
    """A mistake in the input or the flags; `utils.args.launch` prints it as one line and exits with code 2."""


class RankError(InputError):
    """Something that perhaps only this process knows, so it is said whichever process it is."""


@contextmanager
def writing(path):
    """Turn a failed write of `path` into one InputError that names it; what was there before is kept by the caller."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); {_remedy(error)}") from None
    except RuntimeError as error:
        if "inline_container" not in str(error):  # how torch.save reports a file that takes no more
            raise
        raise InputError(f"{path}: cannot be written (the disk is full, or the file may not grow); {FULL}") from None


FULL = "make room and give the same command again: it goes on from the last checkpoint"


def first_line(error: BaseException) -> str:
    """What an error says in its first line, its name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python or torch says that there is no memory left."""
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or "DefaultCPUAllocator" in str(error) or "ALLOC_FAILED" in str(error)


def _remedy(error) -> str:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return FULL if full else "correct the rights of the folder or choose another one"


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


def say(text: str, every: bool = False) -> None:
    """A line on stderr, from the first process only, or from `every` one."""
    rank = os.environ.get("RANK", "0")
    if rank == "0" or every:
        print(text if rank == "0" else f"[process {rank}] {text}", file=sys.stderr)
