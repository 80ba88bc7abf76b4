"""utils/check_data.py finds in one pass what would end a training run, names every row, and removes nothing."""

import subprocess
import sys
import threading

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import draw_set
from test_inputs import HOSTILE, ROOT

from utils import check_data
from utils.args import launch
from utils.images import write_mask


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Four images with masks in train.csv, two others in test.csv; the working directory."""
    monkeypatch.chdir(tmp_path)
    rows = draw_set(tmp_path, 6)
    frame = pd.DataFrame(rows, columns=["img", "filename"])
    frame[:4].assign(weight=0.5).to_csv("train.csv", index=False)
    frame[4:].to_csv("test.csv", index=False)
    return tmp_path


def check(capsys, *words):
    """(exit code, lines of stdout, lines of stderr, bad rows as a list of tuples or None)."""
    code = 0
    try:
        launch(check_data.main, check_data.Args, list(words))
    except SystemExit as end:
        code = end.code
    told = capsys.readouterr()
    try:
        bad = pd.read_csv("bad_rows.csv", keep_default_na=False)
    except FileNotFoundError:
        return code, told.out.splitlines(), told.err.splitlines(), None
    assert list(bad) == ["list", "line", "img", "filename", "reason"]
    return code, told.out.splitlines(), told.err.splitlines(), list(bad.itertuples(index=False, name=None))


def test_good_lists_write_nothing(folder, capsys):
    code, out, err, bad = check(capsys, "train.csv", "--test_csv", "test.csv")
    assert (code, err, bad) == (0, [], None)
    assert out == ["train.csv: 4 rows, 0 bad", "test.csv: 2 rows, 0 bad", "all good"]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("column", ["image", "mask"])
def test_hostile_file_is_one_row(column, name, folder, capsys):
    make, says = HOSTILE[name]
    (folder / column / "001.png").write_bytes(make())
    code, out, err, bad = check(capsys, "train.csv", "--test_csv", "test.csv")
    assert code == 2 and out == ["train.csv: 4 rows, 1 bad", "test.csv: 2 rows, 0 bad"]
    assert bad == [("train.csv", 3, "image/001.png", "mask/001.png", f"{column}/001.png: {says}")]
    assert err == ["error: 1 bad row is listed in bad_rows.csv; correct or remove it"]


def test_all_faults_of_a_row_and_all_rows_are_written(folder, capsys):
    frame = pd.read_csv("train.csv", dtype=str)
    frame.loc[0, ["img", "weight"]] = "image/gone.png", "1e400"
    frame.loc[1, "img"] = "./image/002.png"
    frame.loc[3, "filename"] = "../m.png"
    frame.to_csv("train.csv", index=False)
    write_mask("mask/001.png", np.zeros((32, 31), np.uint8))
    code, out, _, bad = check(capsys, "train.csv")
    assert code == 2 and out == ["train.csv: 4 rows, 4 bad"]
    assert [(line, reason) for _, line, _, _, reason in bad] == [
        (2, "weight 1e400 and image/gone.png: no such file"),
        (3, "image/002.png is 32x32, its mask mask/001.png 31x32"),
        (4, "image/002.png is listed before in line 3"),
        (5, "filename ../m.png leaves the root and ../m.png: no such file"),
    ]


def test_nul_byte_and_empty_cells_are_not_opened(folder, capsys):
    (folder / "train.csv").write_bytes(b"img,filename\nimage/\x00.png,mask/000.png\n,mask/001.png\nimage/002.png,\n")
    code, _, _, bad = check(capsys, "train.csv")
    assert code == 2
    assert [row[4] for row in bad] == ["a NUL byte in img image/\\x00.png", "empty cell", "empty cell"]


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "the file is empty"),
        (b"img;filename\na;b\n", "separated by `;`"),
        (b'img,filename\n"a,b\n', "is never closed"),
        (b"img\na\n", "no column `filename`"),
        (None, "no such file"),
    ],
)
def test_list_that_cannot_be_read_is_line_0_and_the_others_are_checked(raw, says, folder, capsys):
    if raw is not None:
        (folder / "bad.csv").write_bytes(raw)
    (folder / "image/004.png").write_bytes(b"")
    code, out, err, bad = check(capsys, "bad.csv", "train.csv", "--test_csv", "test.csv")
    assert code == 2 and err == ["error: 2 bad rows are listed in bad_rows.csv; correct or remove them"]
    assert out == ["bad.csv: 0 rows, 1 bad", "train.csv: 4 rows, 0 bad", "test.csv: 2 rows, 1 bad"]
    assert bad[0][:4] == ("bad.csv", 0, "", "") and says in bad[0][4]
    assert bad[1] == ("test.csv", 2, "image/004.png", "mask/004.png", "image/004.png: the file is empty")


def test_leak_is_found_by_file_not_by_name(folder, capsys):
    (folder / "link").symlink_to(folder / "image")
    with open("test.csv", "a") as file:
        file.write("link/002.png,mask/002.png\n")
    pd.DataFrame({"img": ["link/../image/004.png"], "filename": "mask/004.png"}).to_csv("other.csv", index=False)
    code, out, _, bad = check(capsys, "train.csv", "--test_csv", "test.csv", "other.csv")
    assert code == 2 and out == ["train.csv: 4 rows, 1 bad", "test.csv: 3 rows, 0 bad", "other.csv: 1 rows, 1 bad"]
    assert [(row[0], row[1], row[4]) for row in bad] == [
        ("train.csv", 4, "image/002.png is also in the held-out test.csv line 4"),
        ("other.csv", 2, "link/../image/004.png is also in the held-out test.csv line 2"),
    ]
    assert check(capsys, "train.csv", "--test_csv", "./train.csv")[2][0].endswith(
        "given as a list and as --test_csv; give it once"
    )


def test_lists_that_are_not_held_out_may_share_images_and_each_file_is_decoded_once(folder, capsys, monkeypatch):
    pd.read_csv("train.csv").assign(img=lambda f: "./" + f["img"]).to_csv("again.csv", index=False)
    seen, lock, look = [], threading.Lock(), check_data._look

    def counted(kind, path, classes):
        with lock:
            seen.append((kind, path))
        return look(kind, path, classes)

    monkeypatch.setattr(check_data, "_look", counted)
    assert check(capsys, "train.csv", "again.csv")[0] == 0
    assert len(seen) == len(set(seen)) == 8


def test_classes(folder, capsys):
    code, _, _, bad = check(capsys, "train.csv", "--classes", "3")
    assert code == 2 and len(bad) == 1 and bad[0][:2] == ("train.csv", 0)
    assert bad[0][4] == (
        "train.csv: no mask holds a class above 0 other than 255, which means ignore; for 0/255 masks use --classes 1"
    )
    for i in range(4):
        cv2.imwrite(f"mask/00{i}.png", np.full((32, 32), i, np.uint8))
    code, _, _, bad = check(capsys, "train.csv", "--classes", "3")
    assert [(row[1], row[4]) for row in bad] == [
        (5, "mask/003.png: class 3, but --classes 3 allows 0 to 2 and 255 (ignore)")
    ]


def test_warnings_are_no_faults(folder, capsys):
    write_mask("mask/000.png", np.zeros((32, 32), np.uint8))
    write_mask("mask/001.png", np.ones((1, 1), np.uint8))
    cv2.imwrite("image/001.png", np.zeros((1, 1, 3), np.uint8))
    code, _, err, bad = check(capsys, "train.csv")
    assert code == 0 and bad is None
    assert err == [
        "warning: train.csv: 1 of 4 masks (25.0%) show nothing",
        "warning: train.csv: 1 of 4 masks (25.0%) are full, without background",
        "warning: train.csv: images of 2 sizes, 1x1 to 32x32; --size 0 needs --batch-size 1",
    ]


def test_only_its_own_file_is_replaced(folder, capsys):
    before = (folder / "test.csv").read_bytes()
    code, _, err, _ = check(capsys, "train.csv", "--out", "test.csv")
    assert code == 2 and err == ["error: test.csv: exists and was not written by this tool; choose another --out"]
    assert (folder / "test.csv").read_bytes() == before
    for name in ("000", "001"):
        (folder / f"image/{name}.png").write_bytes(b"")
        bad = check(capsys, "train.csv")[3]
    assert len(bad) == 2 and sorted(path.name for path in folder.glob("*.csv")) == [
        "bad_rows.csv",
        "test.csv",
        "train.csv",
    ]


def test_started_as_a_file_it_ends_with_one_line(folder):
    (folder / "image/001.png").write_bytes(HOSTILE["truncated jpeg"][0]())
    words = [sys.executable, str(ROOT / "utils/check_data.py"), "train.csv", "--workers", "2"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "train.csv: 4 rows, 1 bad\n"
    assert done.stderr == "error: 1 bad row is listed in bad_rows.csv; correct or remove it\n"
