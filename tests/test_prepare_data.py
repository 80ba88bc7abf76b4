"""prepare_data: the published split to the letter, lists that fit together, pictures that depend on a seed alone."""

import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

from utils import demo
from utils.errors import InputError
from utils.images import read_image, read_mask, write_mask
from utils.lists import read_list
from utils.prepare_data import (
    DemoArgs,
    FolderArgs,
    FoldsArgs,
    ListArgs,
    cut_folds,
    draw_demo,
    draw_test,
    pool_of,
    split,
    split_folder,
    split_list,
)

ROOT = Path(__file__).parents[1]
LISTS = ("pool", "train", "valid", "test")


def make_folders(root: Path, stems, suffix=".png") -> FolderArgs:
    for name in ("image", "mask"):
        (root / name).mkdir(parents=True)
    for stem in stems:
        cv2.imwrite(str(root / "image" / f"{stem}{suffix}"), np.zeros((8, 8, 3), np.uint8))
        write_mask(root / "mask" / f"{stem}.png", np.eye(8, dtype=np.uint8))
    args = FolderArgs(images=str(root / "image"), masks=str(root / "mask"), out=str(root / "csv"))
    args.data_root = str(root)
    return args


def read_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_published_split_comes_out_in_order():
    golden = np.load(ROOT / "tests/golden/nlkd_split.npz")
    train, valid, test = split([str(i) for i in range(1, 5712)], test=711, valid=0.1, seed=2020)
    for ids, name in ((train, "train_ids"), (valid, "valid_ids"), (test, "test_ids")):
        assert ids == [str(i) for i in golden[name]]
    assert pool_of([*train, *valid, *test], test) == [str(i) for i in golden["noise_ids"]]


def test_the_test_draw_leaves_the_stream_where_the_noise_takes_it_up():
    golden = np.load(ROOT / "tests/golden/nlkd_split.npz")
    ids = [str(i) for i in range(1, 5712)]
    test, rng = draw_test(ids, 711, 2020)
    pool = pool_of(ids, test)
    for tenths in range(1, 7):
        drawn = rng.sample(pool, tenths * 500)
        level = {name: 6 + place // (tenths * 100) for place, name in enumerate(drawn)}
        op = {name: rng.randint(0, 1) for name in pool if name in level}
    assert [level.get(name, 0) for name in pool] == golden["noise_iterations"].tolist()
    eroded = golden["noise_op"][[pool.index(name) for name in op]]
    assert len({(coin, int(was)) for coin, was in zip(op.values(), eroded, strict=True)}) == 2


@pytest.mark.parametrize("count,valid", [(11, 0.1), (20, 0.25), (37, 0.3)])
def test_the_validation_share_is_rounded_and_drawn_as_scikit_learn_does(count, valid):
    from sklearn.model_selection import train_test_split

    ids = [f"{i:03d}" for i in range(count)]
    train, held_out, test = split(ids, 3, valid, seed=7)
    assert [train, held_out] == train_test_split(pool_of(ids, test), test_size=valid, random_state=7)
    assert sorted([*train, *held_out, *test]) == ids


def test_a_split_does_not_depend_on_the_order_of_the_ids():
    ids = [str(i) for i in range(30)]
    assert split(ids, 5, 0.2, 1) == split(ids[::-1], 5, 0.2, 1) != split(ids, 5, 0.2, 2)


def test_folder_writes_four_lists_that_fit_together(tmp_path, capsys):
    args = make_folders(tmp_path, range(20), ".JPG")
    split_folder(args)
    lists = {name: read_list(tmp_path / "csv" / f"{name}.csv") for name in LISTS}
    assert [len(lists[name]) for name in LISTS] == [16, 14, 2, 4]
    assert set(lists["pool"].img) == set(lists["train"].img) | set(lists["valid"].img)
    assert not set(lists["pool"].img) & set(lists["test"].img)
    assert lists["train"].img.map(lambda img: f"mask/{Path(img).stem}.png").equals(lists["train"].filename)
    assert lists["train"].img.str.startswith("image/").all() and (lists["train"].iterations == 0).all()
    before = read_bytes(tmp_path)
    capsys.readouterr()
    split_folder(args)
    assert "already" in capsys.readouterr().out and read_bytes(tmp_path) == before
    args.seed = 1
    with pytest.raises(InputError, match=r"pool\.csv: exists and differs"):
        split_folder(args)
    assert read_bytes(tmp_path) == before


def test_folder_writes_absolute_paths_outside_the_root_and_no_test_list_for_zero(tmp_path):
    args = make_folders(tmp_path, range(4))
    args.data_root, args.test, args.valid = str(tmp_path / "elsewhere"), 0, 0
    split_folder(args)
    assert sorted(path.name for path in (tmp_path / "csv").iterdir()) == ["pool.csv", "train.csv"]
    assert all(Path(img).is_absolute() for img in read_list(tmp_path / "csv" / "train.csv").img)


def _remove(name):
    return lambda root: (root / name).unlink()


def _empty(root):
    for path in (root / "image").iterdir():
        path.unlink()


MISTAKES = {
    "image without mask": (_remove("mask/b3.png"), {}, r"b3\.png: no mask `b3`"),
    "mask without image": (_remove("image/b2.png"), {}, r"b2\.png: no image `b2`"),
    "equal stems": (lambda r: (r / "image/b1.jpeg").touch(), {}, r"b1\.png: `b1\.jpeg` has the same stem"),
    "empty folder": (_empty, {}, "image: holds no jpg"),
    "no folder": (lambda r: None, {"masks": "nowhere"}, "nowhere: no such folder; correct --masks"),
    "a grey mask": (lambda r: cv2.imwrite(str(r / "mask/b0.png"), np.full((8, 8), 7)), {}, r"b0\.png: mask values 7"),
    "test takes all": (lambda r: None, {"test": 5}, "5 images, of which --test takes 5"),
    "valid takes the rest": (lambda r: None, {"test": 4, "valid": 0.1}, "leave none to train on"),
    "half an image": (lambda r: None, {"test": 1.5}, "--test 1.5"),
    "negative share": (lambda r: None, {"test": -0.1}, "--test -0.1"),
    "valid above one": (lambda r: None, {"valid": 1.0}, "--valid 1.0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_folder_names_the_file_and_the_remedy(tmp_path, mistake):
    spoil, flags, message = MISTAKES[mistake]
    args = make_folders(tmp_path, [f"b{i}" for i in range(5)])
    spoil(tmp_path)
    for flag, value in flags.items():
        setattr(args, flag, value)
    with pytest.raises(InputError, match=message) as caught:
        split_folder(args)
    assert "\n" not in str(caught.value) and not (tmp_path / "csv").exists()


def test_list_splits_like_folder_and_keeps_every_column(tmp_path):
    args = make_folders(tmp_path, range(20))
    split_folder(args)
    rows = {f"image/{i}.png": {"filename": f"noisy/{i}.png", "iterations": i, "site": f"s{i}"} for i in range(20)}
    pd.DataFrame.from_dict(rows, orient="index").to_csv(tmp_path / "all.csv", index_label="img")
    split_list(ListArgs(csv=str(tmp_path / "all.csv"), out=str(tmp_path / "list")))
    for name in LISTS:
        one, other = (read_list(tmp_path / folder / f"{name}.csv") for folder in ("csv", "list"))
        assert one.img.equals(other.img)
        assert all(row.site == f"s{row.iterations}" == f"s{Path(row.filename).stem}" for row in other.itertuples())


def test_folds_are_a_partition_of_equal_sizes(tmp_path, capsys):
    rows = {"img": [f"{i}.png" for i in range(11)], "filename": [f"m/{i}.png" for i in range(11)], "weight": 0.1}
    pd.DataFrame(rows).to_csv(tmp_path / "all.csv", index=False)
    args = FoldsArgs(csv=str(tmp_path / "all.csv"), out=str(tmp_path / "folds"), k=3, seed=4)
    cut_folds(args)
    held_out = [read_list(tmp_path / f"folds/fold{i}_held_out.csv") for i in range(3)]
    train = [read_list(tmp_path / f"folds/fold{i}_train.csv", ("img", "weight")) for i in range(3)]
    assert sorted(len(frame) for frame in held_out) == [3, 4, 4]
    assert sorted(pd.concat(held_out).img) == sorted(rows["img"])
    for seen, unseen in zip(train, held_out, strict=True):
        assert sorted([*seen.img, *unseen.img]) == sorted(rows["img"])
    capsys.readouterr()
    cut_folds(args)
    assert "already" in capsys.readouterr().out
    args.k = 12
    with pytest.raises(InputError, match="--k must be between 2"):
        cut_folds(args)


def test_the_set_is_the_same_for_any_number_of_threads_and_of_images(tmp_path):
    draw_demo(DemoArgs(out=str(tmp_path / "a"), images=6, size=64, seed=3, workers=1))
    draw_demo(DemoArgs(out=str(tmp_path / "b"), images=8, size=64, seed=3, workers=4))
    draw_demo(DemoArgs(out=str(tmp_path / "c"), images=6, size=64, seed=4))
    one, other, third = (read_bytes(tmp_path / name) for name in "abc")
    files = [name for name in one if name != "demo.json"]
    assert len(files) == 12 and all(one[name] == other[name] != third[name] for name in files)
    raw = cv2.imread(str(tmp_path / "a/mask/00001.png"), cv2.IMREAD_UNCHANGED)
    assert raw.shape == (64, 64) and set(np.unique(raw)) == {0, 255}
    image, mask = demo.draw(3, 1, 64)
    assert (read_mask(tmp_path / "a/mask/00001.png") == mask).all()
    assert np.abs(read_image(tmp_path / "a/image/00001.jpg").astype(int) - image).mean() < 12


def test_every_picture_shows_a_sensible_share_of_foreground():
    shares = [demo.draw(0, index, 48)[1].mean() for index in range(1, 41)]
    assert demo.SHARE[0] <= min(shares) and max(shares) <= demo.SHARE[1]
    assert 0.1 < np.mean(shares) < 0.4


def test_a_finished_set_is_left_alone_and_another_one_is_not_mixed_in(tmp_path, capsys):
    args = DemoArgs(out=str(tmp_path), images=3, size=32)
    draw_demo(args)
    before = read_bytes(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    draw_demo(args)
    assert "nothing to do" in capsys.readouterr().out
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(InputError, match="other arguments"):
        draw_demo(DemoArgs(out=str(tmp_path), images=3, size=32, seed=1))
    (tmp_path / "image/00002.jpg").unlink()
    draw_demo(args)
    assert read_bytes(tmp_path) == before
    (tmp_path / "mask/mine.png").touch()
    with pytest.raises(InputError, match=r"mine\.png: not a file of this set"):
        draw_demo(args)


def test_the_tool_runs_from_another_directory_and_without_a_network(tmp_path):
    tool = [sys.executable, str(ROOT / "utils/prepare_data.py")]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"SKIMAGE_DATADIR": str(tmp_path / "cache"), "https_proxy": "http://127.0.0.1:9"}
    drawn = subprocess.run([*tool, "demo", "--out", "set", "--images", "2", "--size", "32"], cwd=tmp_path, env=env)
    flags = ["folder", "--images", "set/image", "--masks", "set/none", "--out", "csv"]
    failed = subprocess.run([*tool, *flags], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert not (tmp_path / "cache").exists()
    assert drawn.returncode == 0 and len(list((tmp_path / "set/mask").iterdir())) == 2
    assert failed.returncode == 2 and failed.stderr == "error: set/none: no such folder; correct --masks\n"
