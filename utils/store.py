"""Decoded images on disk: one flat file a list, which every process that uses the list maps into its memory."""

import fcntl
import hashlib
import json
import math
import os
import re
import stat
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import PIL

from utils import images
from utils.errors import InputError, say
from utils.logs import sync_folder, to_disk

FORMAT = 1  # of the files in a store; a store of another format has another key
PARTS = ("index", "index.part", "data", "data.part", "lock")  # in the order in which a store is removed
_AHEAD = 64  # results that may wait for whoever takes them


def in_threads(function: Callable, items: Iterable, workers: int = 0, wait: int = _AHEAD) -> Iterator:
    """As map(function, items), by threads (0: as many as cores); at most `wait` results wait to be taken."""
    with ThreadPoolExecutor(workers or min(16, len(os.sched_getaffinity(0)))) as pool:
        ahead = deque()
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > wait:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def stamp_files(paths: list) -> list:
    """(real path, bytes, two times of change in ns) of every file, or the InputError that says why it cannot be one."""
    parents, chunk = {}, 256

    def stamp(path):
        folder, name = os.path.split(path)
        try:
            found = images.look_at(path)
            if folder not in parents:
                parents[folder] = os.path.realpath(folder)
            link = stat.S_ISLNK(os.lstat(path).st_mode)
        except InputError as error:
            return error
        real = os.path.realpath(path) if link else os.path.normpath(os.path.join(parents[folder], name))
        # a copy can keep the time of the last change, but not the time at which it was put there
        return real, found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def some(k):
        return [stamp(path) for path in paths[k * chunk : (k + 1) * chunk]]

    return [one for part in in_threads(some, range(-(-len(paths) // chunk))) for one in part]


def key_of(kind: str, stamps: list[tuple], *options) -> str:
    """The name of a store: 32 hexadecimal digits of its files' stamps, the options, and the code that decodes them."""
    digest = hashlib.blake2b(json.dumps([FORMAT, kind, _decoder(), *options]).encode(), digest_size=16)
    for path, *numbers in stamps:
        digest.update(b"%b\0%d %d %d\0" % (os.fsencode(path), *numbers))
    return digest.hexdigest()


@cache
def _decoder() -> list[str]:
    source = hashlib.blake2b(Path(images.__file__).read_bytes(), digest_size=16).hexdigest()
    return [source, cv2.__version__, PIL.__version__]


class Mapped:
    """The arrays of a store: `mapped[i]` is a read-only view of a file, the same memory in every process."""

    def __init__(self, path: Path, shapes: np.ndarray, tail: tuple, lock):
        self.path, self.lock = path, lock
        self.shapes = [(*shape, *tail) for shape in shapes.tolist()]
        self.starts = np.r_[0, np.cumsum(shapes.prod(1) * int(np.prod(tail)))].tolist()
        self.data = _map(path)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.data[self.starts[i] : self.starts[i + 1]].reshape(self.shapes[i])

    def __getstate__(self):
        # a copy in another process maps the file anew; the process that made it holds the lock for both
        return self.__dict__ | {"data": None, "lock": None}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.data = _map(self.path)


class Store:
    """The decoded arrays (H, W, *tail) uint8 of one list: a folder with `data`, `index` and a lock.

    The index says each array's height and width, those of its file before resizing, and whether any mask is
    `labelled`. It is written last, so that a store without it is not complete. A list larger than the room it may take
    has an index only, as a note that its files were checked.
    """

    def __init__(self, folder: Path, tail: tuple = ()):
        self.folder, self.tail, self.bytes_each = folder, tail, int(np.prod(tail))
        self.index, self.lock, self.file = None, None, None

    def acquire(self, room: float) -> bool:
        """Whether the store is complete for a list that may take `room` bytes.

        If so it is locked against removal until `release`, else it is locked for this process to fill. Waits for
        another process that fills it; OSError where the folder cannot be written.
        """
        patience = time.monotonic() + 1
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self.lock = (self.folder / "lock").open("a")
            except FileNotFoundError:  # removed a moment ago by a process that made room
                continue
            # Nobody waits for one kind of lock: who has filled a store goes on sharing it for as long as it runs, and
            # may itself wait for this process, as two processes of one training do.
            for how in (fcntl.LOCK_SH, fcntl.LOCK_EX):
                if not self._locked(how):
                    continue
                if not self._still_there():
                    break
                self.index = self._read_index(room)
                if (self.index is not None) == (how == fcntl.LOCK_SH):
                    if self.index is not None:
                        os.utime(self.folder / "index")  # the time of its last use
                    return self.index is not None
            self.release()
            if time.monotonic() > patience:
                say(f"{self.folder}: another process decodes these images; waiting for it")
                patience = math.inf
            time.sleep(0.02)

    def release(self) -> None:
        """Give up the lock and whatever was not committed."""
        if self.file is not None:
            self.file.close()
            self.file = None
            (self.folder / "data.part").unlink(missing_ok=True)
        if self.lock is not None:
            self.lock.close()
            self.lock = None

    def begin(self, keep: bool) -> None:
        """Start to fill a store that `acquire` found incomplete; with `keep` False only its index will be written."""
        for name in PARTS[:-1]:
            (self.folder / name).unlink(missing_ok=True)
        self.shapes, self.sizes, self.labelled, self.keep = [], [], False, keep
        self.file = (self.folder / "data.part").open("wb")

    def add(self, array: np.ndarray, size: tuple, labelled: bool, room: float) -> None:
        """Append an array whose file holds `size` (H, W); the data are given up as soon as the list exceeds `room`."""
        self.shapes.append(array.shape[:2])
        self.sizes.append(size)
        self.labelled |= labelled
        if self.keep:
            self.file.write(np.ascontiguousarray(array))
            if self.file.tell() / self.bytes_each > room / 4:  # an image and its mask are 4 bytes a pixel
                self.keep = False
                self.file.truncate(0)

    def commit(self) -> None:
        """Complete the store; a process killed at any moment, or a machine, leaves it complete or without an index."""
        if self.keep:
            to_disk(self.file)
            os.replace(self.folder / "data.part", self.folder / "data")
        with (self.folder / "index.part").open("wb") as file:
            shapes, sizes = np.array(self.shapes, np.int32), np.array(self.sizes, np.int32)
            np.savez(file, shapes=shapes, sizes=sizes, labelled=self.labelled, data=self.keep)
            to_disk(file)
        sync_folder(self.folder)
        os.replace(self.folder / "index.part", self.folder / "index")
        sync_folder(self.folder)

    def arrays(self) -> Mapped | None:
        """The arrays, which keep the lock; None for a store that has an index only."""
        if not self.index["data"]:
            return None
        mapped = Mapped(self.folder / "data", self.index["shapes"].astype(np.int64), self.tail, self.lock)
        self.lock = None
        return mapped

    def _locked(self, how):
        try:
            fcntl.flock(self.lock, how | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _still_there(self):
        try:
            return os.path.samestat(os.fstat(self.lock.fileno()), os.stat(self.folder / "lock"))
        except FileNotFoundError:
            return False

    def _read_index(self, room):
        try:
            with np.load(self.folder / "index", allow_pickle=False) as file:
                index = {name: file[name] for name in ("shapes", "sizes", "labelled", "data")}
            pixels = int(index["shapes"].astype(np.int64).prod(1).sum())
            if index["data"]:
                return index if (self.folder / "data").stat().st_size == pixels * self.bytes_each else None
        except (FileNotFoundError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
            return None
        return index if 4 * pixels > room else None


def evict(parent: Path, limit: float) -> None:
    """Remove what killed processes left in `parent`, and the stores not used for longest until `limit` bytes remain.

    A store in use is left alone.
    """
    stores = [folder for folder in parent.iterdir() if re.fullmatch("[0-9a-f]{32}", folder.name)]
    sizes = {folder: sum(_stat(folder / name, "st_size") for name in PARTS) for folder in stores}
    used = {folder: _stat(folder / "index", "st_mtime_ns") for folder in stores}
    total = sum(sizes.values())
    for folder in sorted(stores, key=used.get):  # without an index: 0, so these come first
        if (total > limit or used[folder] == 0) and _remove(folder):
            total -= sizes[folder]


def _map(path):
    return np.asarray(np.memmap(path, np.uint8, "r"))


def _remove(folder):
    try:
        with (folder / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for name in PARTS:
                (folder / name).unlink(missing_ok=True)
            folder.rmdir()
    except OSError:  # in use, another user's, or another process was faster
        return False
    return True


def _stat(path, what):
    try:
        return getattr(path.stat(), what)
    except OSError:
        return 0
