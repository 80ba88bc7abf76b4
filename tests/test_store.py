"""Decoded images on disk: the same samples as from memory, decoded once, and never wrong after a kill or a change."""

import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import albumentations as A
import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import draw_set
from torch.utils.data import DataLoader, default_collate

import utils.dataset
import utils.store
from utils.dataset import ListDataset
from utils.errors import InputError
from utils.images import write_mask
from utils.store import evict, key_of, stamp_files


@pytest.fixture
def folder(tmp_path):
    """Six images of 32x32, their masks, and a list with noise levels and weights."""
    rows = draw_set(tmp_path, 6)
    frame = pd.DataFrame(rows, columns=["img", "filename"]).assign(weight=np.linspace(0, 1, 6))
    frame.assign(iterations=[0, 6, 0, 7, 0, 8]).to_csv(tmp_path / "list.csv", index=False)
    return tmp_path


def open_list(folder, **how):
    return ListDataset(folder / "list.csv", folder, **({"size": 16, "cache_dir": folder / "cache"} | how))


def indices(folder):
    return sorted(path.parent.name for path in (folder / "cache").glob("*/index"))


def resize_one(folder, name="image/000.png", shape=(32, 32, 3)):
    cv2.imwrite(str(folder / name), np.zeros(shape, np.uint8))


@pytest.fixture
def decoded(monkeypatch):
    """The paths decoded so far."""
    paths = []
    for name in ("read_image", "read_mask", "read_pair"):
        read = getattr(utils.dataset, name)
        monkeypatch.setattr(utils.dataset, name, lambda path, *more, read=read: paths.append(path) or read(path, *more))
    return paths


def equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype and torch.equal(value, other[name]), name


# what a key tells apart


def test_key_changes_with_files_and_options_only(folder):
    paths = [str(folder / f"image/{i:03d}.png") for i in range(6)]
    key = key_of("image", stamp_files(paths), 16)
    assert key == key_of("image", stamp_files(paths), 16)
    (folder / "link").symlink_to(folder / "image")
    detour = [str(folder / "link" / f"../image/{i:03d}.png") for i in range(6)]
    assert key == key_of("image", stamp_files(detour), 16)
    assert len({key, key_of("image", stamp_files(paths), 17), key_of("mask", stamp_files(paths), 16)}) == 3
    assert key_of("mask", stamp_files(paths), 16, 1) != key_of("mask", stamp_files(paths), 16, 2)
    assert key != key_of("image", stamp_files(paths[::-1]), 16)
    found = os.stat(paths[3])
    os.utime(paths[3], ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    assert key != key_of("image", stamp_files(paths), 16)
    key, raw = key_of("image", stamp_files(paths), 16), Path(paths[3]).read_bytes()
    Path(paths[3]).write_bytes(raw[::-1])
    os.utime(paths[3], ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    assert key != key_of("image", stamp_files(paths), 16), "another content, of the same size and time"
    key = key_of("image", stamp_files(paths), 16)
    with open(paths[3], "ab") as file:
        file.write(b"x")
    assert key != key_of("image", stamp_files(paths), 16)


def test_key_changes_with_the_code_that_decodes(folder, monkeypatch):
    stamps = stamp_files([str(folder / "image/000.png")])
    key = key_of("image", stamps)
    monkeypatch.setattr(utils.store, "_decoder", lambda: ["another"])
    assert key != key_of("image", stamps)


def test_what_cannot_be_a_file_is_told(folder):
    (folder / "empty").touch()
    os.mkfifo(folder / "pipe")
    names = ["none.png", "empty", "pipe", "image", "image/000.png/x", "a\0b", "list.csv"]
    found = stamp_files([str(folder / name) for name in names])
    says = ["no such file", "the file is empty", "not a regular file", "a folder", "no such file", "not a path"]
    assert all(word in str(one).split(": ")[1] for one, word in zip(found[:-1], says, strict=True))
    assert found[-1][0] == str((folder / "list.csv").resolve())


# the second start


@pytest.mark.parametrize("size", [0, 16])
def test_second_start_decodes_nothing_and_gives_the_same(folder, decoded, size):
    if size == 0:
        resize_one(folder, shape=(20, 31, 3))
        write_mask(folder / "mask/000.png", np.eye(20, 31, dtype=np.uint8))
    memory, first = open_list(folder, size=size, cache_dir=None), open_list(folder, size=size)
    assert len(indices(folder)) == 2
    decoded.clear()
    second = open_list(folder, size=size)
    for i in range(6):
        for other in (first, second):
            np.testing.assert_array_equal(memory.images[i], other.images[i])
            np.testing.assert_array_equal(memory.masks[i], other.masks[i])
            assert other[i]["image"].dtype == other[i]["mask"].dtype == torch.uint8
    assert decoded == [] and memory.one_shape() == second.one_shape() == (size > 0)
    assert memory.shapes.tolist() == second.shapes.tolist()


def test_lists_with_other_masks_share_the_images(folder, decoded):
    open_list(folder)
    frame = pd.read_csv(folder / "list.csv")
    frame.assign(filename=frame["filename"][::-1].tolist()).to_csv(folder / "list.csv", index=False)
    decoded.clear()
    again = open_list(folder)
    assert sorted(decoded) == sorted(str(folder / f"mask/{i:03d}.png") for i in range(6))
    assert len(indices(folder)) == 3
    np.testing.assert_array_equal(again.masks[0], ListDataset(folder / "list.csv", folder, 16).masks[0])


def test_a_file_spoilt_after_the_first_start_is_found(folder):
    open_list(folder)
    raw = (folder / "image/002.png").read_bytes()
    (folder / "image/002.png").write_bytes(raw[: len(raw) // 2])
    before = indices(folder)
    with pytest.raises(InputError, match=r"1 bad row: line 4: .*image/002\.png: truncated.*Correct or remove"):
        open_list(folder)
    (folder / "image/004.png").unlink()
    with pytest.raises(InputError, match=r"1 bad row: line 6: .*image/004\.png: no such file"):
        open_list(folder)
    assert indices(folder) == before and not list(folder.glob("cache/*/data.part"))


@pytest.mark.parametrize("stored", ["neither", "image", "mask", "both"])
def test_unequal_sizes_are_found_whatever_is_stored(folder, stored):
    """Sizes before resizing count, also where the store of one or both was made for another list."""
    write_mask(folder / "mask/003.png", np.zeros((32, 31), np.uint8))
    listed = pd.read_csv(folder / "list.csv")
    if stored in ("image", "both"):
        write_mask(folder / "good.png", np.zeros((32, 32), np.uint8))
        listed.assign(filename="good.png").to_csv(folder / "list.csv", index=False)
        open_list(folder)
    if stored in ("mask", "both"):
        names = [f"other{i}.png" for i in range(6)]
        for i, name in enumerate(names):
            resize_one(folder, name, (32, 31 if i == 3 else 32, 3))
        listed.assign(img=names).to_csv(folder / "list.csv", index=False)
        open_list(folder)
    listed.to_csv(folder / "list.csv", index=False)
    before = indices(folder)
    with pytest.raises(InputError, match=r"1 bad row: line 5: .*003\.png is 32x32, its mask .*003\.png 31x32"):
        open_list(folder)
    assert indices(folder) == before


def test_masks_without_a_class_are_told_at_every_start(folder):
    for i in range(6):
        write_mask(folder / f"mask/{i:03d}.png", np.full((32, 32), 255 * (i % 2), np.uint8), classes=3)
    for _ in range(2):
        with pytest.raises(InputError, match="no mask holds a class above 0"):
            open_list(folder, classes=3)
    write_mask(folder / "mask/001.png", np.full((32, 32), 2, np.uint8), classes=3)
    for _ in range(2):
        assert open_list(folder, classes=3).masks[1].max() == 2


# room


@pytest.mark.parametrize("size", [0, 16])
def test_a_list_over_its_room_is_checked_once_and_decoded_when_asked_for(folder, decoded, size):
    room = {"size": size, "cache_gb": 5.5 * (size or 32) ** 2 * 4 / 1e9}
    memory = open_list(folder, size=size, cache_dir=None)
    open_list(folder, **room)
    assert len(indices(folder)) == 2 and not list(folder.glob("cache/*/data*"))
    decoded.clear()
    again = open_list(folder, **room)
    assert decoded == []
    np.testing.assert_array_equal(again[5]["image"], memory.images[5])
    assert decoded == [str(folder / "image/005.png")]
    open_list(folder, size=size)
    assert len(list(folder.glob("cache/*/data"))) == 2


def test_a_folder_that_cannot_be_written_is_one_warning(folder, capsys):
    (folder / "file").touch()
    utils.dataset._warn_once.cache_clear()
    datasets = [open_list(folder, cache_dir=folder / "file/cache") for _ in range(2)]
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("warning: ")] == said and len(said) == 1
    assert "Not a directory" in said[0]
    np.testing.assert_array_equal(datasets[0].images[3], open_list(folder, cache_dir=None).images[3])


def test_a_full_disk_is_one_warning(folder, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(utils.store, "to_disk", full)
    utils.dataset._warn_once.cache_clear()
    dataset = open_list(folder)
    assert "No space left on device" in capsys.readouterr().err
    assert indices(folder) == [] and not list(folder.glob("cache/*/data.part"))
    np.testing.assert_array_equal(dataset.images[3], open_list(folder, cache_dir=None).images[3])


def test_old_stores_make_room_and_those_in_use_stay(folder):
    open_list(folder, size=8)
    used = open_list(folder, size=10)
    open_list(folder, size=12)
    order = [6 * 100, 6 * 300, 6 * 64, 6 * 192, 6 * 144, 6 * 432]  # bytes of data, the longest unused first
    bytes_of = {}
    for data in folder.glob("cache/*/data"):
        seconds = 1 + order.index(data.stat().st_size)
        os.utime(data.with_name("index"), (seconds, seconds))
        bytes_of[data.stat().st_size] = sum(path.stat().st_size for path in data.parent.iterdir())
    (folder / "cache/notes").mkdir()
    evict(folder / "cache", sum(bytes_of.values()) - bytes_of[6 * 64] - bytes_of[6 * 192])
    left = sorted(path.stat().st_size for path in folder.glob("cache/*/data"))
    assert left == sorted([6 * 100, 6 * 300, 6 * 144, 6 * 432])
    evict(folder / "cache", 0)
    assert sorted(path.stat().st_size for path in folder.glob("cache/*/data")) == [6 * 100, 6 * 300]
    assert (folder / "cache/notes").is_dir()
    del used
    evict(folder / "cache", 0)
    assert [path.name for path in (folder / "cache").iterdir()] == ["notes"]


# kills, other processes, damage

FORK = multiprocessing.get_context("fork")


def die_while_filling(folder, moment):
    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "data":
        utils.store.Store.add = die
    elif moment == "data written":
        utils.store.os.replace = die
    else:
        replace = os.replace
        utils.store.os.replace = lambda a, b: die() if str(a).endswith("index.part") else replace(a, b)
    open_list(folder)


@pytest.mark.parametrize("moment", ["data", "data written", "index written"])
def test_a_killed_builder_leaves_nothing_complete(folder, moment):
    builder = FORK.Process(target=die_while_filling, args=(folder, moment))
    builder.start()
    builder.join()
    assert builder.exitcode == -signal.SIGKILL
    assert indices(folder) == [] and list(folder.glob("cache/*/*"))
    dataset = open_list(folder)
    assert len(indices(folder)) == 2 and not list(folder.glob("cache/*/*.part"))
    np.testing.assert_array_equal(dataset.images[4], open_list(folder, cache_dir=None).images[4])


def test_what_a_killed_builder_of_another_list_left_is_removed(folder):
    builder = FORK.Process(target=die_while_filling, args=(folder, "data"))
    builder.start()
    builder.join()
    left = set((folder / "cache").iterdir())
    open_list(folder, size=8)
    assert left and not left & set((folder / "cache").iterdir())


@pytest.mark.parametrize("name", ["data", "index"])
def test_a_damaged_store_is_made_again(folder, decoded, name):
    open_list(folder)
    for path in folder.glob(f"cache/*/{name}"):
        path.write_bytes(path.read_bytes()[:-7])
    decoded.clear()
    dataset = open_list(folder)
    assert len(decoded) == 6
    np.testing.assert_array_equal(dataset.masks[4], open_list(folder, cache_dir=None).masks[4])


def fill_slowly(folder, seconds, queue):
    add, count = utils.store.Store.add, [0]

    def slow(*args):
        count[0] += 1
        time.sleep(seconds)
        add(*args)

    utils.store.Store.add = slow
    dataset = open_list(folder)
    queue.put((count[0], int(np.sum([image.sum() for image in map(dataset.images.__getitem__, range(6))]))))


def test_two_processes_at_once_build_once(folder, capfd):
    queue = FORK.Queue()
    both = [FORK.Process(target=fill_slowly, args=(folder, 0.12, queue)) for _ in range(2)]
    for one in both:
        one.start()
    found = [queue.get(timeout=60) for _ in both]
    for one in both:
        one.join()
    assert sorted(count for count, _ in found) == [0, 12] and found[0][1] == found[1][1]
    assert capfd.readouterr().err.count("another process decodes these images") == 1


def test_who_waits_to_fill_a_store_is_not_kept_waiting_by_those_that_share_it(tmp_path):
    """Both find it empty; one fills it and never gives it up, since it waits for the other."""
    first, found = utils.store.Store(tmp_path / "a", (3,)), []
    (tmp_path / "a").mkdir()
    first.lock = (tmp_path / "a/lock").open("a")
    utils.store.fcntl.flock(first.lock, utils.store.fcntl.LOCK_SH)
    second = threading.Thread(target=lambda: found.append(utils.store.Store(tmp_path / "a", (3,)).acquire(1e9)))
    second.daemon = True
    second.start()
    time.sleep(0.2)  # it has looked by now, and wants to fill
    utils.store.fcntl.flock(first.lock, utils.store.fcntl.LOCK_EX)
    first.begin(True)
    first.add(np.zeros((4, 4, 3), np.uint8), (4, 4), False, 1e9)
    first.commit()
    utils.store.fcntl.flock(first.lock, utils.store.fcntl.LOCK_SH)
    second.join(timeout=10)
    assert found == [True]


def test_a_store_removed_while_a_process_waits_is_made_again(folder, monkeypatch):
    """Between the look for the lock and its capture another process may make room."""
    open_list(folder)
    flock, left = utils.store.fcntl.flock, [2]

    def removing(*args):
        if left[0]:
            left[0] -= 1
            shutil.rmtree(folder / "cache")
        return flock(*args)

    monkeypatch.setattr(utils.store.fcntl, "flock", removing)
    np.testing.assert_array_equal(open_list(folder).images[1], open_list(folder, cache_dir=None).images[1])


# batches


@pytest.mark.parametrize("cache_dir", [None, "cache"])
@pytest.mark.parametrize("size", [0, 16])
@pytest.mark.parametrize("augment", ["none", "flip", "strong"])
def test_a_batch_is_the_collation_of_its_samples(folder, augment, size, cache_dir):
    where = cache_dir and folder / cache_dir
    dataset = open_list(folder, augment=augment, size=size, cache_dir=where, weighted=True, seed=3)
    memory = open_list(folder, augment=augment, size=size, cache_dir=None, weighted=True, seed=3)
    dataset.epoch = memory.epoch = 2
    rows = [4, 0, 3, 5]
    batch = dataset.collate(dataset.__getitems__(rows))
    equal(batch, default_collate([memory[i] for i in rows]))
    assert batch["index"].tolist() == rows and batch["noisy"].tolist() == [0, 0, 1, 1]
    assert {name: str(value.dtype) for name, value in batch.items()} == {
        "image": "torch.uint8",
        "mask": "torch.uint8",
        "noisy": "torch.int64",
        "index": "torch.int64",
        "weight": "torch.float32",
    }
    dataset.epoch = 3
    assert augment == "none" or not torch.equal(batch["image"], dataset.__getitems__(rows)["image"])


def test_flip_is_that_of_the_library():
    rng = np.random.default_rng(0)
    library, flip = A.Compose([A.HorizontalFlip(p=0.5)]), utils.dataset.augmentation("flip")
    flipped = 0
    for seed in range(50):
        image, mask = rng.integers(0, 256, (7, 9, 3), np.uint8), rng.integers(0, 2, (7, 9), np.uint8)
        library.set_random_seed(seed)
        both, own = library(image=image, mask=mask), flip(image, mask, seed)
        np.testing.assert_array_equal(both["image"], own[0])
        np.testing.assert_array_equal(both["mask"], own[1])
        flipped += not np.array_equal(own[0], image)
    assert 10 < flipped < 40


def test_unequal_shapes_are_no_batch(folder):
    resize_one(folder, shape=(1, 32, 3))
    write_mask(folder / "mask/000.png", np.zeros((1, 32), np.uint8))
    with pytest.raises(ValueError, match="images of different sizes in one batch"):
        open_list(folder, size=0).__getitems__([1, 0])


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_loader_processes_give_the_same_batches(folder, how):
    dataset = open_list(folder, augment="strong", weighted=True)
    alone = list(DataLoader(dataset, batch_size=2, collate_fn=dataset.collate))
    loader = DataLoader(dataset, 2, num_workers=2, multiprocessing_context=how, collate_fn=dataset.collate)
    for one, other in zip(alone, loader, strict=True):
        equal(one, other)
    evict(folder / "cache", 0)
    assert len(indices(folder)) == 2
