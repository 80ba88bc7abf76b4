"""Noise: the operation against the golden arrays and its definition, the assignments, and the tool's files."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from utils import generate_noisy_label as tool
from utils.add_noise import coarsen, draw_grid
from utils.errors import InputError
from utils.images import read_mask, write_mask
from utils.lists import read_list, write_list

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
COUNTS = {10: (500, 268), 20: (1000, 495), 30: (1500, 740), 40: (2000, 993), 50: (2500, 1247), 60: (3000, 1519)}


def by_definition(mask, iterations, op):
    """The 3x3 element applied again and again; outside the frame nothing changes the mask."""
    for _ in range(iterations):
        padded = np.pad(mask, 1, constant_values=1 if op == "erode" else 0)
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3))
        mask = windows.min((2, 3)) if op == "erode" else windows.max((2, 3))
    return mask


def blobs(seed, shape=(41, 37)):
    noise = np.random.default_rng(seed).random(shape)
    return coarsen((noise > 0.995).astype(np.uint8), 4, "dilate").mask


def test_released_masks():
    golden = np.load(GOLDEN / "nlkd_noise.npz")
    for mask, noisy, level, op in zip(*(golden[k] for k in ("mask", "noisy", "iterations", "op")), strict=True):
        made = coarsen(mask, int(level), str(op))
        assert np.array_equal(made.mask, noisy) and made.mask.dtype == noisy.dtype
        assert (made.iterations, made.op) == (level, op)


@pytest.mark.parametrize("op", ["erode", "dilate"])
@pytest.mark.parametrize("level", [1, 2, 3, 7, 10, 50])
def test_one_box_equals_iterating(op, level):
    for seed in range(3):
        mask = blobs(seed)
        made = coarsen(mask, level, op).mask
        assert np.array_equal(made, by_definition(mask, level, op))
        assert (made <= mask).all() if op == "erode" else (made >= mask).all()


def test_every_encoding_survives():
    mask = blobs(1)
    for given in (mask, mask * np.uint8(255), mask.astype(bool), mask.astype(np.int64)):
        made = coarsen(given, 2, "dilate").mask
        assert made.dtype == given.dtype and made.max() == given.max()
        assert np.array_equal(made > 0, by_definition(mask, 2, "dilate") > 0)
        assert np.array_equal(coarsen(given, 0, "erode").mask, given)
    with pytest.raises(InputError, match="mask values"):
        coarsen(mask * np.uint8(7), 1, "erode")


def test_frame_by_hand():
    mask = np.zeros((4, 6), np.uint8)
    mask[:, :3] = 1
    assert coarsen(mask, 1, "erode").mask.tolist() == [[1, 1, 0, 0, 0, 0]] * 4
    assert coarsen(mask, 1, "dilate").mask.tolist() == [[1, 1, 1, 1, 0, 0]] * 4
    full = np.ones((4, 6), np.uint8)
    assert coarsen(full, 3, "erode").mask.all() and not coarsen(1 - full, 3, "dilate").mask.any()


def test_keep_area_lowers_the_iterations():
    mask = np.zeros((21, 21), np.uint8)
    mask[8:13, 8:13] = 1
    assert coarsen(mask, 9, "erode").mask.sum() == 0
    small = coarsen(mask, 9, "erode", keep_area=True)
    assert (small.iterations, small.mask.sum()) == (2, 1)
    large = coarsen(mask, 30, "dilate", keep_area=True)
    assert large.iterations == 7 and large.mask.sum() == 19 * 19
    dot = np.zeros((9, 9), np.uint8)
    dot[4, 4] = 1
    for whole in (dot, dot * 0, dot * 0 + 1):
        same = coarsen(whole, 6, "erode", keep_area=True)
        assert same[1:] == (0, "") and np.array_equal(same.mask, whole)


def test_coin_is_the_generators():
    mask = blobs(2)
    ops = [coarsen(mask, 1, "both", np.random.default_rng(seed)).op for seed in range(40)]
    assert 10 < ops.count("erode") < 30
    assert ops == [coarsen(mask, 1, "both", np.random.default_rng(seed)).op for seed in range(40)]
    with pytest.raises(ValueError, match="generator"):
        coarsen(mask, 1, "both")


def test_published_assignment():
    golden = np.load(GOLDEN / "nlkd_split.npz")
    ids = [str(i) for i in range(1, 5712)]
    for ratio, (noisy, eroded) in COUNTS.items():
        frame = tool.assign_nlkd(ids, 711, 2020, ratio)
        assert ((frame["iterations"] > 0).sum(), (frame["op"] == "erode").sum()) == (noisy, eroded)
    assert frame["id"].astype(int).tolist() == golden["noise_ids"].tolist()
    assert frame["iterations"].tolist() == golden["noise_iterations"].tolist()
    assert frame["op"].map({"erode": -1, "dilate": 1, "": 0}).tolist() == golden["noise_op"].tolist()
    with pytest.raises(InputError, match="published ratios"):
        tool.assign_nlkd(ids, 711, 2020, 25)


def test_assignment_is_nested_counted_and_free_of_order():
    ids = [f"{i:04d}" for i in range(333)]
    smaller = None
    for ratio in (0, 10, 35, 60, 100):
        frame = tool.assign(ids, ratio, (6, 10), "both", 3).set_index("id")
        noisy = frame[frame["iterations"] > 0]
        assert len(noisy) == 333 * ratio // 100 and noisy["iterations"].between(6, 10).all()
        assert set(noisy["op"]) <= {"erode", "dilate"} and set(frame.drop(noisy.index)["op"]) <= {""}
        sizes = noisy["iterations"].value_counts().reindex(range(6, 11), fill_value=0)
        assert sizes.max() - sizes.min() <= 1
        if smaller is not None:
            pd.testing.assert_frame_equal(noisy.loc[smaller.index], smaller)
        smaller = noisy
        turned = tool.assign(ids[::-1], ratio, (6, 10), "both", 3).set_index("id")
        pd.testing.assert_frame_equal(turned.loc[ids], frame)
    assert 120 < (noisy["op"] == "erode").sum() < 213
    assert set(tool.assign(ids, 100, (2, 2), "dilate", 3)["op"]) == {"dilate"}
    assert not tool.assign(ids, 60, (6, 10), "both", 4).equals(tool.assign(ids, 60, (6, 10), "both", 3))


@pytest.fixture
def clean(tmp_path):
    """Twelve training and five validation images; the second training mask is too small for any noise."""
    (tmp_path / "mask").mkdir()
    for role, ids in (("train", range(12, 0, -1)), ("valid", range(20, 25))):
        for i in ids:
            mask = np.zeros((48, 40), np.uint8)
            mask[5:40, 4 : 30 + i % 3] = 1
            if i == 11:
                mask[:] = 0
                mask[3, 3] = 1
            write_mask(tmp_path / "mask" / f"{i}.png", mask)
        rows = [(f"img/{i}.jpg", f"mask/{i}.png", 0) for i in ids]
        write_list(pd.DataFrame(rows, columns=["img", "filename", "iterations"]), tmp_path / f"{role}.csv")
    return tmp_path


def flags(root, **more):
    given = {"train_csv": str(root / "train.csv"), "valid_csv": str(root / "valid.csv"), "data_root": str(root)}
    return tool.Args(
        out_csv=str(root / "csv"), out_masks=str(root), **{**given, "op": "erode", "levels": [2, 4], **more}
    )


def test_lists_and_masks(clean, capsys):
    tool.main(flags(clean, ratios=[50, 100], trusted=6))
    for role, ratio in ((role, ratio) for role in ("train", "valid") for ratio in (50, 100)):
        noisy, before = read_list(clean / "csv" / f"{role}_noisy_{ratio}.csv"), read_list(clean / f"{role}.csv")
        assert (
            noisy["img"].tolist() == before["img"].tolist() and noisy["clean"].tolist() == before["filename"].tolist()
        )
        assert noisy.columns.tolist() == ["img", "filename", "iterations", "op", "clean", "line"]
        for row in noisy.itertuples():
            in_folder = row.filename == f"iteration_noisy_{ratio}/{Path(row.img).stem}.png"
            assert in_folder == (row.iterations > 0) == (row.op == "erode") and in_folder == (row.filename != row.clean)
            made = coarsen(read_mask(clean / row.clean), row.iterations, "erode").mask
            assert np.array_equal(read_mask(clean / row.filename), made) and made.any()
    lone = read_list(clean / "csv" / "train_noisy_100.csv").set_index("img").loc["img/11.jpg"]
    assert lone["iterations"] == 0 and "1 left clean" in capsys.readouterr().out
    trusted = read_list(clean / "csv" / "trusted.csv")
    assert set(trusted["img"][:5]) == {f"img/{i}.jpg" for i in range(20, 25)} and len(trusted) == 6
    assert trusted["filename"].str.startswith("mask/").all() and (trusted["iterations"] == 0).all()


def test_second_run_does_nothing_and_lost_masks_come_back(clean, capsys):
    tool.main(flags(clean, workers=1))

    def state():
        return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in clean.rglob("*") if p.is_file()}

    before = state()
    capsys.readouterr()
    tool.main(flags(clean, workers=3))
    assert state() == before and "nothing to do" in capsys.readouterr().out
    lost = next((clean / "iteration_noisy_60").glob("*.png"))
    lost.unlink()
    tool.main(flags(clean))
    assert lost.read_bytes() == before[lost][1] and {p for p, s in state().items() if s != before[p]} == {lost}
    tool.main(flags(clean, seed=1))
    assert "up to date" not in capsys.readouterr().out.splitlines()[-1]
    assert state().keys() >= before.keys() and state() != before


def test_a_killed_run_goes_on(clean, monkeypatch):
    def killed(path, mask, classes):
        if len(list(path.parent.glob("*.png"))) > 3:
            raise KeyboardInterrupt
        write_mask(path, mask, classes)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tool, "write_mask", killed)
        tool.main(flags(clean, ratios=[10, 60], workers=1))
    assert (clean / "csv" / "train_noisy_10.csv").is_file() and not (clean / "csv" / "train_noisy_60.csv").exists()
    tool.main(flags(clean, ratios=[10, 60]))
    made = [*clean.glob("csv/*.csv"), *clean.glob("iteration_noisy_60/*.png")]
    resumed = {path: path.read_bytes() for path in made}
    for path in [*made, *clean.glob("*.json")]:
        path.unlink()
    tool.main(flags(clean, ratios=[10, 60]))
    assert {path: path.read_bytes() for path in made} == resumed and len(made) > 4


def test_changed_clean_mask_is_made_anew(clean):
    tool.main(flags(clean, ratios=[100]))
    target = clean / "mask" / "5.png"
    write_mask(target, 1 - read_mask(target))
    os.utime(target, ns=(2**62, 2**62))
    tool.main(flags(clean, ratios=[100]))
    row = read_list(clean / "csv" / "train_noisy_100.csv").set_index("img").loc["img/5.jpg"]
    made = coarsen(read_mask(target), row["iterations"], row["op"]).mask
    assert np.array_equal(read_mask(clean / row["filename"]), made)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"ratios": [101]}, "0 to 100"),
        ({"levels": [5, 2]}, "--levels"),
        ({"levels": [0, 2]}, "--levels"),
        ({"trusted": 18}, "only 17"),
        ({"list": "x.csv"}, "--list alone"),
        ({"preset": "nlkd"}, "--test-csv"),
        ({"preset": "nlkd", "test_csv": "t.csv", "op": "erode"}, "levels 6 to 10"),
    ],
)
def test_wrong_flags(clean, more, message):
    with pytest.raises(InputError, match=message):
        tool.main(flags(clean, **more))
    assert not (clean / "csv").exists()


def test_bad_masks_are_all_named_and_nothing_is_written(clean):
    (clean / "mask" / "12.png").unlink()
    (clean / "mask" / "3.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"2 bad rows: line 2: .*12.png: no such file; line 11: .*3.png"):
        tool.main(flags(clean))
    assert not (clean / "csv").exists() and not (clean / "iteration_noisy_60").exists()
    noisy = read_list(clean / "train.csv").assign(iterations=3)
    write_list(noisy, clean / "train.csv")
    with pytest.raises(InputError, match=r"12 bad rows.*noise level 3"):
        tool.main(flags(clean))


def test_lists_that_overlap(clean):
    with pytest.raises(InputError, match=r"12 bad rows.*used before"):
        tool.main(flags(clean, valid_csv=str(clean / "train.csv")))


def test_preset_checks_the_test_list(tmp_path):
    ids = sorted(str(i) for i in range(1, 41))
    test = random.Random(2020).sample(ids, 5)
    pool = [i for i in ids if i not in test]
    (tmp_path / "mask").mkdir()
    for i in ids:
        write_mask(tmp_path / "mask" / f"{i}.png", np.pad(np.ones((20, 20), np.uint8), 10))
    for role, part in (("test", test), ("train", pool[5:]), ("valid", pool[:5])):
        rows = [(f"img/{i}.png", f"mask/{i}.png") for i in part]
        write_list(pd.DataFrame(rows, columns=["img", "filename"]), tmp_path / f"{role}.csv")
    args = flags(tmp_path, preset="nlkd", op="both", levels=[6, 10], test_csv=str(tmp_path / "test.csv"))
    tool.main(args)
    made = pd.concat([read_list(tmp_path / "csv" / f"{role}_noisy_60.csv") for role in ("train", "valid")])
    wanted = tool.assign_nlkd(ids, 5, 2020, 60)
    made = made.assign(id=made["img"].map(lambda img: Path(img).stem)).set_index("id").loc[wanted["id"]]
    assert made["iterations"].tolist() == wanted["iterations"].tolist() and made["op"].tolist() == wanted["op"].tolist()
    write_list(pd.DataFrame({"img": [f"img/x{i}.png" for i in test]}), tmp_path / "test.csv")
    with pytest.raises(InputError, match="not the 5 test images"):
        tool.main(args)


def test_runs_as_a_file_from_elsewhere(clean):
    command = [sys.executable, ROOT / "utils" / "generate_noisy_label.py", "--list", "train.csv", "--out-csv", "lists"]
    done = subprocess.run([*command, "--out-masks", "noisy", "--levels", "1", "3"], cwd=clean, capture_output=True)
    assert done.returncode == 0, done.stderr
    noisy = read_list(clean / "lists" / "train_noisy_60.csv")
    assert (noisy["iterations"] > 0).sum() == 7
    assert noisy["filename"].str.startswith("noisy/iteration_noisy_60/").sum() == 7


def test_grid_is_a_picture():
    page = draw_grid(blobs(1), [0, 3], np.zeros((41, 37, 3), np.uint8))
    assert page.dtype == np.uint8 and page.shape[2] == 3 and len(np.unique(page.reshape(-1, 3), axis=0)) > 5
