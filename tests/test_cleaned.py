"""Cleaned lists: bad masks give way to the teacher's, and the list says which, why and what it does not know."""

import cv2
import numpy as np
import pandas as pd
import pytest
from test_scripts import launch, rows_of
from test_tools import weigh

from utils.cleaned import replacement_report, vote
from utils.errors import InputError
from utils.images import read_mask, write_mask
from utils.label_quality import deviation, lowest_usable
from utils.lists import read_list
from utils.scores import pair_scores


@pytest.fixture
def coarse(tiny, tmp_path):
    """A list of 12 masks, the first 5 much too large, with the clean ones beside them: they are the teacher's, too."""
    (tmp_path / "given").mkdir()
    frame = read_list(tiny / "noisy.csv")[:12].drop(columns="line")
    frame["clean"] = [str(tiny / name) for name in frame["filename"]]
    names = []
    for i, path in enumerate(frame["clean"]):
        mask = read_mask(path)
        if i < 5:
            mask = cv2.dilate(mask, np.ones((9, 9), np.uint8))
        names.append(str(tmp_path / "given" / f"{i:03d}.png"))
        write_mask(names[-1], mask)
    frame["filename"], frame["iterations"] = names, [4] * 5 + [0] * 7
    frame["op"] = ["dilate"] * 5 + [""] * 7
    frame.to_csv(tmp_path / "coarse.csv", index=False)
    return tmp_path


def clean(tiny, root, *words, score="bf"):
    return weigh(tiny, root / "out", "--write-labels", "--score", score, "--name", "t", *words, csv=root / "coarse.csv")


# arithmetic


def test_vote_by_hand():
    given = np.array([[0, 1, 2, 255, 2]], np.uint8)
    one, two, three = (np.array([row], np.uint8) for row in ([1, 0, 0, 1, 255], [1, 1, 1, 1, 255], [0, 1, 2, 1, 255]))
    assert vote([one, two, three], np.full(3, 1 / 3), given).tolist() == [[1, 1, 2, 255, 2]]  # pixel 2: a tie of three
    assert vote([one, two], np.array([0.5, 0.5]), given).tolist() == [[1, 1, 0, 255, 2]]  # 0 or 1, never 2
    assert vote([one, two, three], np.array([0.6, 0.2, 0.2]), given).tolist() == [[1, 0, 0, 255, 2]]
    assert vote([three], np.ones(1), given).tolist() == [[0, 1, 2, 255, 2]]


def test_the_found_threshold_is_two_deviations_below_the_better_group():
    rng = np.random.default_rng(0)
    good, bad = rng.normal(0.85, 0.03, 40), rng.normal(0.4, 0.08, 60)
    values = np.concatenate([good, bad])
    cut = lowest_usable(values)
    assert deviation(np.append(values, cut))[-1] == pytest.approx(2, abs=0.05)
    assert (good > cut).mean() > 0.9 and (bad < cut).all()


def test_report_by_hand():
    replaced, noisy = np.array([True, True, False, False]), np.array([True, False, True, False])
    ious = np.array([[0.5, 0.9], [1, 0.8], [0.6, 0.6], [np.nan, np.nan]])
    found = replacement_report(replaced, noisy, ious)
    assert found == pytest.approx({"precision": 0.5, "recall": 0.5, "iou_before": 0.7, "iou_after": 2.3 / 3})
    assert replacement_report(replaced, None, np.full((4, 2), np.nan)) == {}
    assert replacement_report(~replaced & replaced, noisy, ious[:, [0, 0]]).keys() == {
        "recall",
        "iou_before",
        "iou_after",
    }


# lists


@pytest.mark.parametrize("threshold", [(), ("--threshold", "0.9")])
def test_the_coarse_masks_are_replaced_and_the_others_stay(threshold, coarse, tiny, capsys):
    report = clean(tiny, coarse, "--teacher", tiny / "mask", *threshold)["bf"]
    assert report["replaced"] == 5 and report["precision"] == report["recall"] == 1
    before = [
        pair_scores(read_mask(coarse / f"given/{i:03d}.png"), read_mask(tiny / f"mask/{i:03d}.png"))["iou"]
        for i in range(12)
    ]
    assert report["iou_before"] == pytest.approx(np.mean(before)) and report["iou_after"] == 1
    given, new = read_list(coarse / "coarse.csv"), read_list(coarse / "out/coarse_t_cleaned_bf.csv")
    assert new["replaced"].tolist() == ["1"] * 5 + ["0"] * 7
    assert new["given"].tolist() == given["filename"].tolist() and new["op"].tolist() == given["op"].tolist()
    assert new["filename"][5:].tolist() == given["filename"][5:].tolist()
    assert "iterations" not in new  # nobody knows about the new masks
    assert new["given_iterations"].tolist() == ["4"] * 5 + ["0"] * 7
    scores = [
        pair_scores(read_mask(tiny / f"mask/{i:03d}.png"), read_mask(g))["bf"] for i, g in enumerate(new["given"])
    ]
    assert new["given_bf"].astype(float).tolist() == pytest.approx(scores, abs=1e-7)
    for i in range(5):
        assert np.array_equal(read_mask(tiny / new["filename"][i]), read_mask(tiny / f"mask/{i:03d}.png"))
    shown = capsys.readouterr().out
    assert "5 of 12 masks replaced" in shown and "iou_after 1.0000" in shown and "recall 1.0000" in shown


def test_a_plain_script_trains_on_it(coarse, tiny):
    clean(tiny, coarse, "--teacher", tiny / "mask")
    launch("train_without_weight.py", tiny, coarse, "run", "--train_csv", str(coarse / "out/coarse_t_cleaned_bf.csv"))
    first = rows_of(coarse / "run")[0]
    assert "train_loss" in first and "train_loss_noisy" not in first and "train_loss_clean" not in first


def test_several_teachers_vote_by_their_shares(coarse, tiny, tmp_path):
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    for i in range(12):
        write_mask(nothing / f"{i:03d}.png", np.zeros((32, 32), np.uint8))
    both = ["--teacher", tiny / "mask", nothing, "--threshold", "1"]
    clean(tiny, coarse, *both, "--share", "3", "1")
    new = read_list(coarse / "out/coarse_t_cleaned_bf.csv")
    assert all(
        np.array_equal(read_mask(tiny / f), read_mask(tiny / f"mask/{i:03d}.png"))
        for i, f in enumerate(new["filename"])
    )
    clean(tiny, coarse, *both, "--share", "1", "3")
    assert not any(read_mask(tiny / f).any() for f in new["filename"])


def test_classes_keep_their_void(tiny, tmp_path):
    frame = read_list(tiny / "classes.csv")
    (tmp_path / "teacher").mkdir()
    for i, name in enumerate(frame["filename"]):
        mask = read_mask(tiny / name, 3)
        mask[mask == 255] = 0
        if i < 4:
            mask[8:] = 2 - mask[8:]
        write_mask(tmp_path / "teacher" / f"{i:03d}.png", mask, 3)
    words = [
        "--classes",
        "3",
        "--write-labels",
        "--score",
        "miou",
        "--threshold",
        "0.6",
        "--teacher",
        tmp_path / "teacher",
    ]
    report = weigh(tiny, tmp_path, *words, csv="classes.csv")["miou"]
    assert report["replaced"] == 4
    new = read_list(tmp_path / "classes_teacher_cleaned_miou.csv")
    got, own = read_mask(tiny / new["filename"][0], 3), read_mask(tmp_path / "teacher/000.png", 3)
    assert (got[:2] == 255).all() and np.array_equal(got[2:], own[2:])


@pytest.mark.parametrize(("threshold", "what"), [("0", "none of the masks is"), ("1", "all masks are")])
def test_nothing_or_everything_is_replaced_and_said(threshold, what, coarse, tiny, tmp_path, capsys):
    for i in range(12):
        write_mask(tmp_path / f"{i:03d}.png", np.eye(32, dtype=np.uint8))
    clean(tiny, coarse, "--teacher", tmp_path, "--threshold", threshold)
    said = capsys.readouterr().err
    assert f"{what} replaced" in said and ("worse than the given ones" in said) == (threshold == "1")
    assert len(read_list(coarse / "out/coarse_t_cleaned_bf.csv")) == 12


def test_labels_and_weights_live_beside_each_other(coarse, tiny, tmp_path, capsys):
    teacher = tmp_path / "masks"
    teacher.symlink_to(tiny / "mask")
    (tmp_path / "masks.csv").write_text(
        "img,filename\n" + "".join(f"image/{i:03d}.png,mask/{i:03d}.png\n" for i in range(22))
    )
    words = ["--teacher", tmp_path / "masks.csv"]
    note = tiny / "mask/teacher.json"
    note.write_text('{"trusted": true}')
    try:
        for _ in range(2):
            clean(tiny, coarse, *words)
            weigh(tiny, coarse / "out", "--score", "bf", "--name", "t", *words, csv=coarse / "coarse.csv")
        shown = capsys.readouterr().out
        assert shown.count("labels are there already") == shown.count("weights are there already") == 1
        clean(tiny, coarse, *words, "--threshold", "0.5")
        assert "threshold 0.5000" in capsys.readouterr().out
    finally:
        note.unlink()


def test_mistakes_are_named(coarse, tiny):
    with pytest.raises(InputError, match="between 0 and 1"):
        clean(tiny, coarse, "--teacher", tiny / "mask", "--threshold", "1.5")
    with pytest.raises(InputError, match="is for --write-labels"):
        weigh(tiny, coarse, "--teacher", tiny / "mask", "--threshold", "0.5")
    frame = pd.read_csv(coarse / "coarse.csv")
    frame.loc[2, "clean"] = "lost.png"
    frame.to_csv(coarse / "coarse.csv", index=False)
    with pytest.raises(InputError, match=r"line 4: .*lost\.png"):
        clean(tiny, coarse, "--teacher", tiny / "mask")
