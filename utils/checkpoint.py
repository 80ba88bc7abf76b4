"""Saving a run so that it can go on exactly, and loading networks from what was saved."""

import os
import threading
import time
import warnings
import zipfile
from hashlib import blake2b
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from utils.errors import InputError, first_line, out_of_memory, warn, writing
from utils.lists import stem_of
from utils.logs import sync_folder, to_disk
from utils.models import build_model


class Checkpoint:
    """Everything a run needs to go on, by role, in `last.pt`; the networks of its best epoch in `best.pt`.

    Roles are `nets`, `optimizers`, `schedules`, with fp16 also `scalers`, and `losses` that learn something themselves.
    Files are written under another name, flushed and renamed, and read with `weights_only=True`; `previous.pt` is the
    `last.pt` before, for the case that the file system damages it. They also say how to build the networks and which
    images trained them.
    """

    def __init__(self, run, **parts):
        if run.args.precision == "fp16":
            parts["scalers"] = [run.scaler(optimizer) for optimizer in parts["optimizers"]]
        self.run = run
        # most losses have nothing to save
        self.parts = {role: group for role, group in parts.items() if any(part.state_dict() for part in group)}
        self.last, self.previous = run.dir / "last.pt", run.dir / "previous.pt"
        self.reached = {"epoch": -1, "score": float("-inf"), "best": float("-inf"), "best_epoch": -1, "net": 0}
        self.damaged, self.thread, self.fault = False, None, None
        run.checkpoint = self

    def epochs(self, total: int) -> range:
        """The epochs still to do: from zero, or from where the run was saved; the log is cut back to there."""
        self._take_up_newest()
        start = self.reached["epoch"] + 1
        self.run.keep_log_before(start)
        return range(start, total)

    def reopened(self) -> range:
        """No epochs to do, for a look at every part as it was saved; InputError where nothing was."""
        if not self._take_up_newest():
            raise InputError(f"{self.run.dir}: nothing is saved there that could be tested; train first")
        return range(0)

    def save(self, epoch: int, score: float, net: int = 0) -> None:
        """Save after an epoch; if its validation score is the best so far, `nets[net]` is the network to test."""
        improved = score > self.reached["best"] or epoch == 0
        self.reached |= {"epoch": epoch, "score": score, "net": net}
        if improved:
            self.reached |= {"best": score, "best_epoch": epoch}
        self.run.position = None
        self._write(improved)

    def save_inside(self) -> None:
        """Save inside an epoch, so that the next process goes on with its next step."""
        self._write(False, inside=self.run.inside())
        self.wait()

    def wait(self) -> None:
        """Come back when everything is written; InputError if it could not be."""
        if self.thread:
            self.thread.join()
            self.thread = None
        if self.fault:
            fault, self.fault = self.fault, None
            raise fault

    def look(self) -> None:
        """InputError if a write has failed; does not wait for one that goes on."""
        if self.thread and not self.thread.is_alive():
            self.wait()

    def chosen(self, which: str = "best"):
        """(epoch, index of the network, the network with the saved weights) of `best.pt` or `last.pt`."""
        self.wait()
        self.run.barrier()  # the first process may have been writing it
        path = self.run.dir / f"{which}.pt"
        try:
            state = read_checkpoint(path)
        except InputError as error:
            raise InputError(f"{error}; remove {self.run.dir} to train again") from None
        net = self.parts["nets"][state["net"]]
        bare(net).load_state_dict(state["nets"][state["net"]])
        return state["epoch"], state["net"], net

    def _write(self, improved, **more):
        self.wait()
        self.run.saved, keep, self.damaged = time.time(), None if self.damaged else self.previous, False
        if not self.run.main:
            return
        about = self.run.about | self.reached
        states = {role: [bare(part).state_dict() for part in group] for role, group in self.parts.items()}
        states = _copy(states)
        if self.run.device.type == "cuda":
            torch.cuda.synchronize()

        def write():
            try:
                # best.pt goes first: a run killed between the two repeats this epoch and writes the same best.pt again
                if improved:
                    write_checkpoint(self.run.dir / "best.pt", about | {"nets": states["nets"]})
                write_checkpoint(self.last, about | states | more, keep)
            except BaseException as fault:
                self.fault = fault

        # training goes on meanwhile: writing to disk takes longer than many an epoch
        self.thread = threading.Thread(target=write)
        self.thread.start()

    def _take_up_newest(self):
        """Go on from what last.pt holds, or previous.pt where last.pt cannot be used; False where there is neither."""
        faults = []
        for path in (self.last, self.previous):
            if not path.exists():
                continue
            try:
                state = read_checkpoint(path)
                self._take_up(state)
            except InputError as error:
                faults.append(str(error))
            except (KeyError, TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
                if out_of_memory(error):  # the file is not to blame
                    raise
                faults.append(f"{path}: not a checkpoint of this run ({first_line(error)})")
            else:
                if faults:
                    self.damaged = True  # it must not take the place of the good one when the next is saved
                    warn(f"{faults[0]}. Going on from {path}, after {state['epoch'] + 1} epochs")
                self._look_at_best(state)
                return True
        if faults:
            raise InputError(f"{'; '.join(faults)}. Remove {self.run.dir} to train again")
        return False

    def _take_up(self, state):
        for role, group in self.parts.items():
            for part, saved in zip(group, state[role], strict=True):
                bare(part).load_state_dict(saved)
        self.reached |= {key: state[key] for key in self.reached if key in state}
        if "inside" in state:
            self.run.go_on_inside(state["inside"])

    def _look_at_best(self, state):
        best = self.run.dir / "best.pt"
        if not self.run.main or self.run.args.select != "best" or state["epoch"] < 0:
            return
        try:
            read_checkpoint(best)
        except InputError as error:
            if state["epoch"] != self.reached["best_epoch"]:
                raise InputError(f"{error}; remove {self.run.dir} to train again") from None
            warn(f"{error}; written anew, since the last epoch was the best")
            write_checkpoint(best, self.run.about | self.reached | {"nets": state["nets"]})


def write_checkpoint(path: Path, state: dict, keep: Path | None = None) -> None:
    """Write `state` so that a reader sees the old file or the new one, never a part.

    What was in `path` becomes `keep`, where that is given. InputError if it cannot be written; then both stay.
    """
    part = path.with_name(f".{path.name}.writing")
    try:
        with writing(path):
            with part.open("wb") as file:
                torch.save(state, file)
                to_disk(file)
            if keep and path.exists():
                _link(path, keep)
            part.replace(path)
            sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)  # on a full disk it is most of what fills it


def read_checkpoint(path) -> dict:
    """The dictionary saved in a file, on the CPU; InputError if there is none or it holds anything but data."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such checkpoint")
    try:
        if zipfile.is_zipfile(path):  # torch.load does not look at the checksums
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():
                    raise zipfile.BadZipFile
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it would name the pickle protocol of what it then refuses
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes at random raise anything
        if out_of_memory(error):
            raise
        what = "it is damaged, or holds something other than numbers and names, which is never run"
        raise InputError(f"{path}: not a checkpoint that can be read: {what}") from None
    if not isinstance(state, dict):
        raise InputError(f"{path}: not a checkpoint of these scripts")
    return state


def load_network(path, which: int = -1):
    """(network, the file's other content) from a `best.pt` or `last.pt`: its network number `which`.

    -1 is the network that the validation chose; InputError for one that is not there. Its architecture, classes and
    input size stand under "model".
    """
    state = read_checkpoint(path)
    if "nets" not in state or "models" not in state:
        raise InputError(f"{path}: not a checkpoint of these scripts; train one with train_without_weight.py")
    if not -1 <= which < len(state["nets"]):
        raise InputError(f"--net {which}: {path} has {len(state['nets'])}, counted from 0; -1 is the chosen one")
    which = state["net"] if which == -1 else which
    about = state["model"] = state["models"][which]
    how = about["arch"], about["encoder"], "none", about["classes"], about["width"], about.get("extra", 0)
    net = build_model(*how)
    net.load_state_dict(state["nets"][which])
    return net, state


def load_weights(net, path, index: int = 0) -> None:
    """Start a network from the weights of a checkpoint, `-f/--load`; InputError names what does not fit."""
    state = read_checkpoint(path)
    saved = state["nets"][min(index, len(state["nets"]) - 1)] if "nets" in state else state
    try:
        bare(net).load_state_dict(saved)
    except RuntimeError as error:
        first = str(error).strip().splitlines()
        raise InputError(f"--load {path}: does not fit this network: {' '.join(first[:2])}") from None


def image_keys(images) -> torch.Tensor:
    """An int64 key for every image, in order: what a checkpoint remembers of the list it was trained on.

    Made of the file's stem, so that another spelling of its path is the same image.
    """
    keys = [int.from_bytes(blake2b(stem_of(i).encode(), digest_size=8).digest(), "big", signed=True) for i in images]
    return torch.tensor(keys, dtype=torch.int64)


def _link(path, keep):
    part = keep.with_name(f".{keep.name}.writing")
    part.unlink(missing_ok=True)
    try:
        os.link(path, part)
    except OSError:  # a file system without hard links: for a moment there is only `keep`
        path.replace(part)
    part.replace(keep)


def _copy(state):
    """The state on the CPU, as it is now; of a GPU's tensors only after a synchronisation."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", non_blocking=True) if state.is_cuda else state.detach().clone()
    if isinstance(state, dict):
        return {key: _copy(value) for key, value in state.items()}
    return type(state)(map(_copy, state)) if isinstance(state, (list, tuple)) else state


def bare(part):
    """The object under a DistributedDataParallel wrapper, so that saved names never begin with `module.`."""
    return part.module if isinstance(part, DistributedDataParallel) else part
