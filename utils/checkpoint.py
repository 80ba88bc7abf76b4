"""Saving a run so that it can go on exactly, and loading networks from what was saved."""

import os
import pickle
import zipfile
from hashlib import blake2b
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from utils.errors import InputError
from utils.lists import stem_of
from utils.models import build_model


class Checkpoint:
    """Everything a run needs to go on, by role, in `last.pt`; the networks of its best epoch in `best.pt`.

    Roles are `nets`, `optimizers`, `schedules`. Both files are written under another name, flushed and renamed, and
    read with `weights_only=True`. They also say how to build the networks and which images trained them.
    """

    def __init__(self, run, **parts):
        self.run, self.parts, self.best = run, parts, float("-inf")
        self.last = run.dir / "last.pt"

    def epochs(self, total: int) -> range:
        """The epochs still to do: from zero, or from after the last one saved; the log is cut back to there."""
        start = 0
        if self.last.exists():
            state = read_checkpoint(self.last)
            for role, group in self.parts.items():
                for part, saved in zip(group, state[role], strict=True):
                    bare(part).load_state_dict(saved)
            self.best, start = state["best"], state["epoch"] + 1
        self.run.keep_log_before(start)
        return range(start, total)

    def save(self, epoch: int, score: float, net: int = 0) -> None:
        """Save after an epoch; if its validation score is the best so far, `nets[net]` is the network to test."""
        improved, self.best = score > self.best or epoch == 0, max(score, self.best)
        if not self.run.main:
            return
        about = self.run.about | {"epoch": epoch, "score": score, "best": self.best, "net": net}
        states = {role: [bare(part).state_dict() for part in group] for role, group in self.parts.items()}
        # best.pt goes first: a run killed between the two repeats this epoch and writes the same best.pt again
        if improved:
            write_checkpoint(self.run.dir / "best.pt", about | {"nets": states["nets"]})
        write_checkpoint(self.last, about | states)

    def chosen(self, which: str = "best"):
        """(epoch, index of the network, the network with the saved weights) of `best.pt` or `last.pt`."""
        self.run.barrier()  # the first process may still be writing it
        state = read_checkpoint(self.run.dir / f"{which}.pt")
        net = self.parts["nets"][state["net"]]
        bare(net).load_state_dict(state["nets"][state["net"]])
        return state["epoch"], state["net"], net


def write_checkpoint(path: Path, state: dict) -> None:
    """Write `state` so that a reader sees the old file or the new one, never a part."""
    part = path.with_name(f".{path.name}.writing")
    with part.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def read_checkpoint(path) -> dict:
    """The dictionary saved in a file, on the CPU; InputError if there is none or it holds anything but data."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, zipfile.BadZipFile, KeyError):
        what = "it is damaged, or holds something other than numbers and names, which is never run"
        raise InputError(f"{path}: not a checkpoint that can be read: {what}") from None
    if not isinstance(state, dict):
        raise InputError(f"{path}: not a checkpoint of these scripts")
    return state


def load_network(path):
    """(network, the file's other content) from a `best.pt` or `last.pt`: the network that the validation chose.

    Its architecture, classes and input size stand under "model".
    """
    state = read_checkpoint(path)
    if "nets" not in state or "models" not in state:
        raise InputError(f"{path}: not a checkpoint of these scripts; train one with train_without_weight.py")
    about = state["model"] = state["models"][state["net"]]
    net = build_model(about["arch"], about["encoder"], "none", about["classes"], about["width"])
    net.load_state_dict(state["nets"][state["net"]])
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


def bare(part):
    """The object under a DistributedDataParallel wrapper, so that saved names never begin with `module.`."""
    return part.module if isinstance(part, DistributedDataParallel) else part
