"""Ctrl-C and SIGTERM: noted, and obeyed between two steps of a training run, so that it can save first."""

import ctypes
import os
import signal
import sys
import threading
from contextlib import contextmanager
from functools import partial
from pathlib import Path

PR_SET_PDEATHSIG = 1  # of prctl(2)
RESUME = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, give the same command again


class Paused(KeyboardInterrupt):
    """The run was asked to stop, and what it had reached is saved."""


class Stop:
    """Whether this process was asked to stop; unless a run has something to save, `Paused` is raised at once."""

    def __init__(self):
        self.asked = self.saves = False

    def before_anything_begins(self) -> None:
        """While a training script imports its libraries, which takes seconds, let a request end it quietly."""
        if Path(sys.argv[0]).name.startswith("train_") and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    signal.signal(number, lambda *_: os._exit(RESUME))

    @contextmanager
    def listening(self):
        """Take SIGTERM and SIGINT as requests; a signal that the parent has set to be ignored stays ignored."""
        self.asked = self.saves = False
        mine = threading.current_thread() is threading.main_thread()
        taken = [s for s in (signal.SIGTERM, signal.SIGINT) if mine and signal.getsignal(s) is not signal.SIG_IGN]
        before = {s: signal.signal(s, self._note) for s in taken}
        try:
            yield
        except Exception as error:
            # a library that is not written in Python may have made an error of its own of `Paused`
            if self.asked and not self.saves:
                raise Paused from error
            raise
        finally:
            self.asked = self.saves = False
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number, _frame):
        # whoever presses Ctrl-C twice does not want to wait for a save
        again = self.asked and number == signal.SIGINT
        self.asked = True
        if again or not self.saves:
            raise Paused


stop = Stop()


def loader_processes(count: int) -> dict:
    """Arguments of a DataLoader with `count` processes that live on between passes."""
    if not count:
        return {}
    begin = partial(in_loader_process, parent=os.getpid())
    return {
        "num_workers": count,
        "persistent_workers": True,
        "multiprocessing_context": "fork",
        "worker_init_fn": begin,
    }


def in_loader_process(_worker: int, parent: int) -> None:
    """Begin a loader process of `parent`: it leaves signals to its parent, and never outlives it.

    A signal to the whole group must not take the loaders from a run that still has to save. A parent that is killed
    while it starts them would otherwise leave them waiting forever.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
