"""Scores of single pairs of masks: packed words and label maps against filters, loops and the batches of a device."""

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from tqdm import tqdm

from utils import get_weight, scores
from utils.errors import InputError
from utils.images import read_mask, write_mask
from utils.metrics import sample_scores
from utils.scores import count_boundary, pair_scores

SHAPES = [
    (1, 1),
    (1, 200),
    (200, 1),
    (2, 3),
    (3, 55),
    (5, 56),
    (7, 57),
    (4, 113),
    (40, 63),
    (33, 64),
    (21, 65),
    (96, 130),
]
BOXES = [
    (1, 1),
    (1, 5),
    (3, 1),
    (3, 3),
    (3, 5),
    (5, 3),
    (7, 7),
    (9, 5),
    (3, 25),
    (25, 29),
    (29, 27),
    (29, 29),
    (3, 101),
]


def draw(rng, shape):
    """A mask of noise, of blocks, of one pixel, of the frame, or of one value."""
    kind = rng.integers(5)
    if kind == 0:
        return (rng.random(shape) < rng.random()).astype(np.uint8)
    if kind == 1:
        side = int(rng.integers(2, 12))
        coarse = (rng.random((-(-shape[0] // side), -(-shape[1] // side))) < 0.5).astype(np.uint8)
        return np.ascontiguousarray(np.kron(coarse, np.ones((side, side), np.uint8))[: shape[0], : shape[1]])
    mask = np.full(shape, rng.integers(2), np.uint8)
    if kind == 2:
        mask[rng.integers(shape[0]), rng.integers(shape[1])] ^= 1
    elif kind == 3:
        mask[[0, -1]] ^= 1
        mask[1:-1, [0, -1]] ^= 1
    return mask


def counts_by_filters(pred, mask, theta0, theta):
    """The counts of `count_boundary` from erosions and dilations of whole bytes."""
    small, wide = (np.ones((box, box), np.uint8) for box in (theta0, theta))
    edges = [m & ~cv2.erode(m, small) for m in (pred, mask)]
    hits = [a & cv2.dilate(b, wide) for a, b in (edges, edges[::-1])]
    return tuple(int(m.sum()) for m in (*edges, *hits))


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_counts_are_those_of_filters(shape):
    rng = np.random.default_rng([1, *shape])
    for boxes in BOXES:
        for _ in range(12):  # one scratch memory for all: nothing of a pair may reach the next
            pred, mask = draw(rng, shape), draw(rng, shape)
            assert tuple(count_boundary(pred, mask, *boxes)) == counts_by_filters(pred, mask, *boxes)


def test_areas_of_packed_masks():
    rng = np.random.default_rng(0)
    for shape in SHAPES:
        pred, mask = draw(rng, shape), draw(rng, shape)
        inter, union = np.sum(pred & mask), np.sum(pred | mask)
        found = pair_scores(pred, mask)
        assert found["iou"] == (inter / union if union else 1)
        assert found["dice"] == (2 * inter / (pred.sum() + mask.sum()) if union else 1)


def test_masks_that_are_views_into_others():
    rng = np.random.default_rng(2)
    pred, mask = (rng.random((2, 60, 80)) < 0.5).astype(np.uint8)
    for cut in (np.s_[:, ::2], np.s_[5:40, 7:71], np.s_[::-1, ::-1]):
        assert count_boundary(pred[cut], mask[cut]) == count_boundary(pred[cut].copy(), mask[cut].copy())
        assert pair_scores(pred[cut], mask[cut], 2) == pair_scores(pred[cut].copy(), mask[cut].copy(), 2)
    for turned in (pred.T, mask.T):
        turned.flags.writeable = False
    assert count_boundary(pred.T, mask.T) == count_boundary(pred, mask)


def test_threads_do_not_share_scratch_memory():
    rng = np.random.default_rng(3)
    pairs = [(draw(rng, (70, 90)), draw(rng, (70, 90))) for _ in range(40)]
    expected, found, before = [counts_by_filters(*pair, 3, 5) for pair in pairs], {}, sys.getswitchinterval()

    def work(name):
        found[name] = [tuple(count_boundary(*pair)) for pair in pairs * 5]

    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert all(found[i] == expected * 5 for i in range(4))


def test_scratch_memory_does_not_grow_with_the_shapes():
    for side in range(20, 60):
        count_boundary(*np.zeros((2, side, side), np.uint8))
    assert len(scores._scratch.packed) <= scores._KEPT
    count_boundary(*np.zeros((2, 1100, 1100), np.uint8))
    assert not any(key[:2] == (1100, 1100) for key in scores._scratch.packed)


def label_maps(seed, classes, shape):
    """Two maps of blocks of several sizes with 255 in both, the second noisier; classes may be missing."""
    rng = np.random.default_rng(seed)
    maps = []
    for _ in range(2):
        side = int(rng.integers(1, 9))
        coarse = rng.integers(0, classes, (-(-shape[0] // side), -(-shape[1] // side))).astype(np.uint8)
        full = np.kron(coarse, np.ones((side, side), np.uint8))[: shape[0], : shape[1]].copy()
        full[rng.random(shape) < rng.choice([0, 0.02, 0.4])] = 255
        maps.append(full)
    if seed % 3 == 0:
        maps[0] = np.where(rng.random(shape) < 0.9, maps[1], maps[0])
    return maps


@pytest.mark.parametrize("classes", [2, 3, 12, 21, 150, 255])
def test_class_means_are_those_of_a_batch(classes):
    for seed, shape in enumerate([(1, 1), (1, 40), (40, 1), (2, 2), (17, 30), (31, 9), (40, 40), (24, 50)]):
        pred, mask = label_maps(seed, classes, shape)
        for boxes in [(3, 5), (1, 1), (5, 3), (3, 13), (7, 3)]:
            batch = sample_scores(torch.from_numpy(pred)[None], torch.from_numpy(mask)[None], classes, *boxes)
            alone = pair_scores(pred, mask, classes, *boxes)
            assert alone.keys() == batch.keys()
            for name, value in alone.items():
                assert value == pytest.approx(float(batch[name]), abs=1e-6), (name, seed, boxes)


def test_a_label_between_two_others_is_looked_for():
    # Within the box of the one pixel of label 2 lie edges of labels 0, 1 and 3, and first one of label 2 as well.
    pred, mask = np.zeros((2, 9, 9), np.uint8)
    pred[4, 4] = 2
    mask[3:6, 2], mask[3:6, 6], mask[6, 4] = 1, 3, 2
    hit = pair_scores(pred, mask, 4)["bf"]
    mask[6, 4], mask[8, 4] = 0, 2
    missed = pair_scores(pred, mask, 4)["bf"]
    assert hit - missed > 0.25  # one class of four


def test_nothing_but_void_agrees():
    mask = np.full((4, 5), 255, np.uint8)
    assert set(pair_scores(np.zeros((4, 5), np.uint8), mask, 3).values()) == {1.0}


def weigh(tmp_path, workers, teacher):
    args = get_weight.Args(str(tmp_path / "list.csv"), [str(teacher)], str(tmp_path / "out"), workers=workers)
    get_weight.main(args)
    return {path.name: path.read_text() for path in (tmp_path / "out").glob("*.csv")}


def draw_list(tmp_path, rows):
    rng = np.random.default_rng(0)
    for folder in ("m", "t"):
        (tmp_path / folder).mkdir()
        for i in range(rows):
            write_mask(tmp_path / folder / f"{i}.png", draw(rng, (12, 15)))
    lines = [f"image/{i}.jpg,{tmp_path}/m/{i}.png" for i in range(rows)]
    (tmp_path / "list.csv").write_text("img,filename\n" + "\n".join(lines) + "\n")


def test_processes_give_the_weights_of_one_and_in_order(tmp_path):
    rows = 163
    draw_list(tmp_path, rows)
    one = weigh(tmp_path, 1, tmp_path / "t")
    assert len(one) == 3 and weigh(tmp_path, 2, tmp_path / "t") == weigh(tmp_path, 3, tmp_path / "t") == one
    lines = one["list_t_weight_bfscore.csv"].splitlines()[1:]
    for i in (0, 80, rows - 1):
        expected = pair_scores(read_mask(tmp_path / f"t/{i}.png"), read_mask(tmp_path / f"m/{i}.png"))["bf"]
        assert float(lines[i].split(",")[2]) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("workers", [1, 3])
def test_bad_rows_of_every_process_are_named(tmp_path, workers):
    draw_list(tmp_path, 48)
    bad = [0, 15, 47]
    for i in bad:
        (tmp_path / f"t/{i}.png").unlink()
    with pytest.raises(InputError, match=": 3 bad rows: ") as error:
        weigh(tmp_path, workers, tmp_path / "t")
    assert all(f"line {i + 2}: {tmp_path}/t/{i}.png: no such file" in str(error.value) for i in bad)
    assert not (tmp_path / "out").exists()


def share_out(here, there, count=1000, workers=3):
    """The pieces that this process and its helpers took; `here` and `there` are called with each of them."""
    own = os.getpid()

    def work(tasks):
        taken = []
        for rows in tasks:
            (here if os.getpid() == own else there)(rows)
            taken += rows
        return taken

    with tqdm(total=count, disable=True) as bar:
        return get_weight._share_out(work, count, workers, bar)


def test_every_row_is_scored_once_whoever_is_slow():
    for count in (1, 7, 1000, 20_000):
        found = share_out(lambda _: time.sleep(0.001), lambda _: None, count)
        assert sorted(found) == list(range(count))


def test_a_stopped_list_leaves_no_process_behind():
    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        share_out(stop, lambda _: time.sleep(60))
    assert not multiprocessing.active_children()


def test_a_fault_of_a_helper_is_raised_and_its_death_is_one_line():
    def fail(_):
        raise ZeroDivisionError("of a helper")

    def slow(_):
        time.sleep(0.01)  # so that a helper takes a piece, too

    with pytest.raises(ZeroDivisionError, match="of a helper"):
        share_out(slow, fail)
    with pytest.raises(InputError, match="a process that scores masks died"):
        share_out(slow, lambda _: os._exit(9))
    assert not multiprocessing.active_children()


def test_helpers_end_with_a_parent_that_is_killed(tmp_path):
    code = (
        "import os, sys, time; from tqdm import tqdm; from utils import get_weight\n"
        "def work(tasks):\n"
        "    for _ in tasks: open(f'{sys.argv[1]}/{os.getpid()}', 'w').close(); time.sleep(60)\n"
        "get_weight._share_out(work, 1000, 3, tqdm(disable=True))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parents[1])

    def alive(pid):
        stat = Path(f"/proc/{pid}/stat")
        return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"

    until = time.monotonic() + 30
    while len(list(tmp_path.iterdir())) < 3 and time.monotonic() < until:
        time.sleep(0.02)
    pids = [int(path.name) for path in tmp_path.iterdir()]
    parent.kill()
    parent.wait()
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.02)
    assert len(pids) == 3 and not any(map(alive, pids))
