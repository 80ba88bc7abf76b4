"""The lists of a folder in the published layout of JSRT, and what a wrong layout is told."""

import shutil

import pytest
from conftest import draw_set

from utils.args import launch_commands, parse
from utils.errors import InputError
from utils.lists import read_list
from utils.prepare_data import COMMANDS
from utils.readers.jsrt import JsrtArgs, prepare

COUNTS = {"train": 4, "val": 2, "test": 3}
NOISY = "heart_180_0.8_0.05_0.2"


@pytest.fixture
def source(tmp_path):
    """Three splits of discs as radiographs of hearts; the noisy masks are those of the image after."""
    root, first = tmp_path / "jsrt", 0
    for split, count in COUNTS.items():
        draw_set(tmp_path / split, count, start=first)
        first += count
        root.mkdir(exist_ok=True)
        (tmp_path / split / "image").rename(root / f"images_{split}")
        (tmp_path / split / "mask").rename(root / f"heart_gts_{split}")
    shutil.copytree(root / "heart_gts_train", root / NOISY)
    return root


def lists_of(source, out, **more):
    prepare(JsrtArgs(str(source), str(out), **{"organ": "heart"} | more))
    return {path.stem: read_list(path) for path in out.glob("*.csv")}


def test_lists_hold_the_published_split(source, tmp_path):
    lists = lists_of(source, tmp_path / "lists", data_root=str(tmp_path))
    assert {name: len(frame) for name, frame in lists.items()} == {"train": 4, "train_clean": 4, "valid": 2, "test": 3}
    row = lists["train"].iloc[1]
    assert (row["img"], row["filename"]) == ("jsrt/images_train/001.png", f"jsrt/{NOISY}/001.png")
    assert (row["clean"], row["iterations"]) == ("jsrt/heart_gts_train/001.png", 1)
    assert lists["train_clean"]["filename"].tolist() == lists["train"]["clean"].tolist()
    assert (lists["valid"]["iterations"] == 0).all() and lists["test"]["img"].iloc[0] == "jsrt/images_test/006.png"


def test_same_command_does_nothing(source, tmp_path, capsys):
    lists_of(source, tmp_path / "lists")
    lists_of(source, tmp_path / "lists")
    assert "the same lists are there already" in capsys.readouterr().out


def test_noise_is_named_where_there_are_several(source, tmp_path):
    shutil.copytree(source / NOISY, source / "heart_250_0.8_0.05_0.2")
    with pytest.raises(InputError, match=r"2 folders .* --noise"):
        lists_of(source, tmp_path / "lists")
    assert "heart_250" in lists_of(source, tmp_path / "lists", noise="heart_250_0.8_0.05_0.2")["train"]["filename"][0]


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda root: shutil.rmtree(root), "jsrt: no such folder; --source holds images_train, heart_gts_train"),
        (lambda root: shutil.rmtree(root / "images_val"), "images_val: no such folder"),
        (lambda root: shutil.rmtree(root / NOISY), "0 folders heart_<T>"),
        (lambda root: (root / "heart_gts_test/007.png").unlink(), "007.png: no mask in .*heart_gts_test"),
        (lambda root: (root / NOISY / "002.png").rename(root / NOISY / "x.png"), "002.png: no mask in"),
        (lambda root: (root / "images_test/006.png").unlink(), "heart_gts_test/006.png: no image of this name"),
        (lambda root: [p.unlink() for p in (root / "images_test").iterdir()], "images_test: holds no picture"),
        (
            lambda root: [shutil.copy(root / f"{f}_train/000.png", root / f"{f}_val") for f in ("images", "heart_gts")],
            "images_val/000.png: also .*images_train/000.png",
        ),
    ],
)
def test_wrong_layout_is_one_line(spoil, what, source, tmp_path):
    spoil(source)
    with pytest.raises(InputError, match=what) as error:
        lists_of(source, tmp_path / "lists")
    assert "\n" not in str(error.value)


def test_it_is_a_command_of_prepare_data(source, tmp_path):
    words = ["jsrt", "--source", str(source), "--organ", "heart", "--out", str(tmp_path / "lists")]
    launch_commands(COMMANDS, words)
    assert len(read_list(tmp_path / "lists/valid.csv")) == 2


def test_unknown_organ_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse(JsrtArgs, ["--source", "a", "--out", "b", "--organ", "liver"])
    assert "invalid choice: 'liver'" in capsys.readouterr().err
