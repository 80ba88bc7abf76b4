"""Spatial correction: the bias of discs, masks moved back, and a run that corrects, begins anew and resumes."""

import json
import os
import subprocess
import sys

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import draw_lists
from test_scripts import ROOT, SMALL, Interrupted, interrupt_after, launch, rows_of, same

from utils.contour import signed_distance
from utils.errors import InputError
from utils.images import read_mask, write_mask
from utils.interrupt import Paused, stop
from utils.lists import read_list
from utils.methods.spatial_correction import Rounds, contour_bias, correct_scores, corrected_mask, move_contours
from utils.models import build_model
from utils.relabel import Restart
from utils.steps import Steps

SCRIPT = "train_spatial_correction.py"


def disc(radius, size=64, centre=(31, 33)):
    y, x = np.mgrid[:size, :size]
    return ((y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius**2).astype(np.uint8)


def grown(mask, pixels):
    return (signed_distance(mask) < pixels).astype(np.uint8)


# arithmetic


@pytest.mark.parametrize("pixels", [-6, -3, -1, 0, 1, 3, 8])
def test_a_disc_that_is_too_large_has_a_positive_bias(pixels):
    assert contour_bias(grown(disc(15), pixels), disc(15)) == pytest.approx([pixels], abs=0.25)


@pytest.mark.parametrize("pixels", [-4, 0, 3, 7])
def test_moved_back_the_disc_is_the_true_one(pixels):
    wrong = grown(disc(15.5), pixels)
    assert np.array_equal(move_contours(wrong, np.array([float(pixels)])), disc(15.5))


def test_bias_is_the_mean_of_signed_distances_along_the_true_contour():
    rng = np.random.default_rng(0)
    true, pred = (cv2.resize(rng.integers(0, 2, (4, 5), np.uint8), (20, 16), interpolation=0) for _ in range(2))
    inside = [tuple(p) for p in np.argwhere(true)]

    def to_contour(mask, at):
        others = np.argwhere(mask != mask[at])
        away = np.sqrt(((others - at) ** 2).sum(1)).min() - 0.5
        return -away if mask[at] else away

    along = [p for p in np.ndindex(*true.shape) if abs(to_contour(true, p)) == 0.5]
    assert len(along) > 40 and set(along) & set(inside)
    expected = np.mean([to_contour(true, p) - to_contour(pred, p) for p in along])
    assert contour_bias(pred, true) == pytest.approx([expected], abs=1e-5)


def test_the_frame_is_no_contour():
    left, wider = np.zeros((20, 20), np.uint8), np.zeros((20, 20), np.uint8)
    left[:, :8], wider[:, :10] = 1, 1
    assert contour_bias(wider, left) == pytest.approx([2])
    assert np.array_equal(move_contours(wider, np.array([2.0])), left)


def test_what_has_no_contour_is_unknown_and_stays():
    empty, full = np.zeros((8, 8), np.uint8), np.ones((8, 8), np.uint8)
    for mask in (empty, full):
        assert np.isnan(contour_bias(mask, disc(3, 8, (4, 4)))).all()
        assert np.isnan(contour_bias(disc(3, 8, (4, 4)), mask)).all()
        assert np.array_equal(move_contours(mask, np.array([2.0])), mask)
        assert np.array_equal(correct_scores(mask * 2.0 - 1, 2.0), mask)
    small = disc(2)
    assert np.array_equal(move_contours(small, np.array([5.0])), small), "it would vanish"
    assert np.array_equal(move_contours(1 - small, np.array([-5.0])), 1 - small), "it would fill the image"


def test_no_bias_leaves_the_prediction():
    logits = np.random.default_rng(1).normal(0, 3, (12, 14)).astype(np.float32)
    for how in ("score", "distance"):
        found = corrected_mask(logits[None], disc(3, 14), np.zeros(1), how)
        assert np.array_equal(found, (logits > 0).astype(np.uint8))


@pytest.mark.parametrize("bias", [-3.3, 2.6])
def test_scores_are_changed_as_published(bias):
    generator = np.random.default_rng(2)
    logits = (-signed_distance(disc(12)) * 0.7 + generator.normal(0, 0.4, (64, 64))).astype(np.float32)
    pred = (logits > 0).astype(np.uint8)
    away = signed_distance(pred)
    if bias > 0:
        height = max(abs(logits[p]) for p in np.ndindex(64, 64) if -bias <= away[p] < 0)
        moved = logits - height * np.exp(-(away**2) / (2 * bias**2))
    else:
        height = max(abs(logits[p]) for p in np.ndindex(64, 64) if 0 < away[p] <= -bias)
        moved = logits + height * np.exp(-(away**2) / (2 * bias**2))
    found = correct_scores(logits, bias)
    assert np.array_equal(found, moved > 0) and not np.array_equal(found, pred)


@pytest.mark.parametrize("bias", [-8.0, 8.0])
def test_even_scores_move_by_three_quarters_of_the_bias(bias):
    """u = exp(-u^2 / 2) has the solution 0.7531: there what was taken away equals what was there."""
    logits = -signed_distance(disc(20))
    found = contour_bias(correct_scores(logits, bias), disc(20))
    assert found == pytest.approx([-0.7531 * bias], abs=0.35)


def test_regions_of_several_classes_move_together():
    true = np.zeros((30, 40), np.uint8)
    true[:, 12:], true[:, 28:] = 1, 2
    pred = np.zeros_like(true)
    pred[:, 10:], pred[:, 31:] = 1, 2  # class 1 too wide by 2 to the left and by 3 to the right
    bias = contour_bias(pred, true, 3)
    assert bias == pytest.approx([-2, 2.5, -3])
    exact = move_contours(np.where(true == 1, 1, 0).astype(np.uint8), np.array([0.0, 0.0, 0.0]))
    assert np.array_equal(exact, true == 1)
    moved = move_contours(pred, bias)
    assert np.array_equal(np.flatnonzero(np.diff(moved[0].astype(int))) + 1, [12, 28])
    given = true.copy()
    given[:3] = 255
    logits = np.eye(3, dtype=np.float32)[pred].transpose(2, 0, 1)
    found = corrected_mask(logits, given, bias, "distance")
    assert (found[:3] == 255).all() and np.array_equal(found[3:], moved[3:])


def test_beside_void_nothing_is_measured():
    true, pred = np.zeros((20, 30), np.uint8), np.zeros((20, 30), np.uint8)
    true[:, 10:], pred[:, 9:] = 1, 1
    true[:, 20:] = 255
    pred[:, 20:] = 1
    assert contour_bias(pred, true, 2) == pytest.approx([-1, 1])


def test_a_small_or_unknown_bias_ends_the_rounds():
    rounds = Rounds(3, 2)
    assert rounds.measured(torch.tensor([1.5, -0.4, float("nan")]), 1.0) == pytest.approx(
        {"bias_0": 1.5, "bias_1": -0.4}
    )
    assert rounds.bias.tolist() == [1.5, 0, 0] and not rounds.over
    rounds.measured(torch.tensor([0.9, -0.4, float("nan")]), 1.0)
    assert rounds.over and not rounds.bias.any()


def test_no_bias_that_could_be_measured_is_not_no_bias():
    rounds = Rounds(2, 2)
    assert rounds.measured(torch.full((2,), float("nan")), 1.0) == {}
    assert not rounds.over
    with pytest.raises(InputError, match=r"no class has a contour .* the bias is not known; .* fewer --rounds"):
        rounds.known()
    rounds.measured(torch.tensor([float("nan"), 2.0]), 1.0)
    assert rounds.known().tolist() == [0, 2]


def test_restart_takes_network_and_optimizer_back():
    net = torch.nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(net.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    first = Restart(net, optimizer, schedule)
    runs = []
    for _ in range(3):
        first.again()
        for _ in range(3):
            net(torch.ones(2, 3)).sum().backward()
            optimizer.step(), schedule.step(), optimizer.zero_grad()
        runs.append(net.weight.detach().clone())
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


# the script


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    """The tiny lists, with training masks that are too large by 3 pixels and know their clean ones."""
    root = draw_lists(tmp_path_factory.mktemp("biased"))
    frame = read_list(root / "noisy.csv").drop(columns="line")
    (root / "large").mkdir()
    names = [name.replace("mask/", "large/") for name in frame["filename"]]
    for name, clean in zip(names, frame["filename"], strict=True):
        write_mask(root / name, grown(read_mask(root / clean), 3))
    frame.assign(clean=frame["filename"], filename=names, iterations=1).to_csv(root / "large.csv", index=False)
    return root


LARGE = ["--size", "32", "--width", "8", "--optimizer", "adamw", "--learning-rate", "0.02", "--batch-size", "2"]
LARGE += ["--train_csv", "large.csv"]


@pytest.fixture(scope="module")
def learned(biased, tmp_path_factory):
    """`--load` a network that has learnt the large masks."""
    runs = tmp_path_factory.mktemp("learned")
    launch("train_without_weight.py", biased, runs, "learned", *LARGE, "--epochs", "10")
    return ["--load", str(runs / "learned/last.pt")]


@pytest.mark.parametrize("how", ["score", "distance"])
def test_a_run_finds_the_bias_and_corrects_the_masks(how, biased, tmp_path):
    launch(SCRIPT, biased, tmp_path, how, *LARGE, "--epochs", "20", "--rounds", "1", "--correction", how)
    rows = rows_of(tmp_path / how)
    first, after = rows[9:11]
    assert first["round"] == 0 and 1.5 < first["bias"] < 4.5 and "label_dice" not in first
    assert after["round"] == 1 and 0 < after["changed"] < 0.5
    clean = read_list(biased / "large.csv")
    given = [read_mask(biased / name) for name in clean["filename"]]
    true = [read_mask(biased / name) for name in clean["clean"]]
    before = np.mean([2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in zip(given, true, strict=True)])
    assert after["label_dice"] > before + 0.1
    assert abs(rows[19]["bias"]) < first["bias"] - 1
    assert rows[-1]["split"] == "test" and len(rows) == 21


def test_without_bias_the_run_ends_after_the_first_training(biased, learned, tmp_path):
    flags = [*learned, "--learning-rate", "0.001", "--epochs", "4", "--rounds", "1", "--min-bias", "1e9"]
    ended = launch(SCRIPT, biased, tmp_path, "ended", *LARGE, *flags)
    plain = launch("train_without_weight.py", biased, tmp_path, "plain", *LARGE, *flags[:4], "--epochs", "2")
    assert same(ended[0], plain[0])
    rows = rows_of(tmp_path / "ended")
    assert [row.get("epoch") for row in rows] == [0, 1, None]
    assert json.loads((tmp_path / "ended/args.json").read_text())["epochs"] == 4


def corrected(tmp_path):
    return [tmp_path / name / "corrected" for name in ("whole", "parts")]


@pytest.mark.parametrize("dies_after", [0, 1, 2, 3])
def test_interrupted_around_a_correction_ends_on_the_same_bits(dies_after, biased, learned, tmp_path, monkeypatch):
    flags = [*LARGE, *learned, "--epochs", "5", "--rounds", "2", "--min-bias", "0", "--augment", "strong"]
    flags += ["--learning-rate", "0.001", "--optimizer", "ranger"]
    whole = launch(SCRIPT, biased, tmp_path, "whole", *flags)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, dies_after)
        launch(SCRIPT, biased, tmp_path, "parts", *flags, "--workers", "1")
    parts = launch(SCRIPT, biased, tmp_path, "parts", *flags, "--workers", "2")
    assert same(whole[0], parts[0])
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "parts")
    kept = [{p.relative_to(root): p.read_bytes() for p in root.rglob("epoch_*/*.png")} for root in corrected(tmp_path)]
    assert len(kept[0]) == 2 * 13 and kept[0] == kept[1]


def test_paused_inside_an_epoch_does_not_correct_twice(biased, learned, tmp_path, monkeypatch):
    flags = [*LARGE, *learned, "--epochs", "2", "--rounds", "1", "--min-bias", "0", "--learning-rate", "0.001"]
    whole, step, calls = launch(SCRIPT, biased, tmp_path, "whole", *flags), Steps.step, []

    def step_and_ask(self, *args, **kwargs):
        step(self, *args, **kwargs)
        calls.append(0)
        stop.asked = stop.asked or len(calls) == 8  # in the second epoch, after the correction

    with monkeypatch.context() as patch, pytest.raises(Paused):
        patch.setattr(Steps, "step", step_and_ask)
        launch(SCRIPT, biased, tmp_path, "parts", *flags)
    stop.asked = stop.saves = False
    one = tmp_path / "parts/corrected/epoch_0001/000000.png"
    written = one.stat().st_mtime_ns
    parts = launch(SCRIPT, biased, tmp_path, "parts", *flags)
    assert one.stat().st_mtime_ns == written, "made once"
    assert same(whole[0], parts[0]) and rows_of(tmp_path / "whole") == rows_of(tmp_path / "parts")


def test_two_processes_measure_and_correct_as_one(biased, learned, tmp_path):
    flags = [*LARGE, *learned, "--epochs", "2", "--rounds", "1", "--min-bias", "0", "--learning-rate", "1e-12"]
    launch(SCRIPT, biased, tmp_path, "one", *flags)
    flags = [str(biased / word) if word.endswith(".csv") else word for word in [*SMALL, *flags]]
    flags += ["--data-root", str(biased), "--run-dir", str(tmp_path), "--valid_csv", str(biased / "valid.csv")]
    flags += ["--trusted_csv", str(biased / "trusted.csv")]
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / SCRIPT), *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words, "--name", "two"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    one, two = (rows_of(tmp_path / name)[:2] for name in ("one", "two"))
    assert one[0]["bias"] == pytest.approx(two[0]["bias"], abs=0.5)  # BatchNorm has seen other batches
    assert one[1]["label_dice"] == pytest.approx(two[1]["label_dice"], abs=0.05)
    assert two[1]["round"] == 1


def test_a_passing_file_of_another_process_is_not_opened(biased, learned, tmp_path):
    """A mask that another process is writing has its own name only once it is whole."""
    folder = tmp_path / "beside/corrected/epoch_0001"
    folder.mkdir(parents=True)
    (folder / ".000001.png.7").symlink_to(folder / "renamed")
    flags = [*learned, "--epochs", "2", "--rounds", "1", "--min-bias", "0", "--learning-rate", "1e-12"]
    launch(SCRIPT, biased, tmp_path, "beside", *LARGE, *flags)
    assert rows_of(tmp_path / "beside")[1]["round"] == 1


def test_several_classes_are_corrected_by_distance(tiny, tmp_path):
    lists = ["--train_csv", "classes.csv", "--valid_csv", "classes_valid.csv", "--test_csv", ""]
    lists += ["--trusted_csv", "classes_trusted.csv"]
    flags = [*lists, "--classes", "3", "--epochs", "4", "--rounds", "1", "--min-bias", "0", "--precision", "bf16"]
    with pytest.raises(InputError, match="--correction distance"):
        launch(SCRIPT, tiny, tmp_path, "refused", *flags)
    flags += ["--size", "32", "--width", "8", "--optimizer", "adamw", "--learning-rate", "0.02", "--batch-size", "2"]
    flags += ["--correction", "distance", "--epochs", "12"]
    launch(SCRIPT, tiny, tmp_path, "three", *flags)
    rows = rows_of(tmp_path / "three")
    assert {"bias_0", "bias_1", "bias_2"} & rows[5].keys() and rows[6]["round"] == 1
    labels = np.stack([read_mask(p, 3) for p in (tmp_path / "three/corrected/epoch_0006").iterdir()])
    assert len(labels) == 13 and (labels[:, :2] == 255).all() and labels[:, 2:].max() < 3


def test_trusted_images_must_not_be_tested_on(biased, learned, tmp_path):
    flags = [*LARGE, *learned, "--epochs", "3", "--rounds", "2", "--learning-rate", "0.001"]
    with pytest.raises(InputError, match=r"test\.csv: 4 bad rows.*No image may be in both lists"):
        launch(SCRIPT, biased, tmp_path, "leak", *flags, "--trusted_csv", "test.csv")
    frame = pd.read_csv(biased / "trusted.csv")
    frame[:2].to_csv(biased / "two.csv", index=False)
    launch(SCRIPT, biased, tmp_path, "fine", *flags, "--trusted_csv", "two.csv")


@pytest.mark.parametrize("flags", [["--rounds", "3"], ["--rounds", "-1"], ["--min-bias", "-1"]])
def test_settings_that_no_run_can_use_are_one_line(flags, tiny, tmp_path):
    with pytest.raises(InputError, match=r"--rounds .* --min-bias"):
        launch(SCRIPT, tiny, tmp_path, "bad", "--epochs", "3", *flags)


def test_a_network_that_predicts_nothing_is_one_line(biased, tmp_path):
    flags = ["--epochs", "2", "--rounds", "1", "--learning-rate", "1e-12"]
    for row in range(2):  # the same command again says the same
        with pytest.raises(InputError, match="the bias is not known; give the first training more --epochs"):
            launch(SCRIPT, biased, tmp_path, "dead", *LARGE, "--load", str(dead(tmp_path)), *flags)
        assert len(rows_of(tmp_path / "dead")) == 1, row


def dead(folder):
    """Weights of a network that predicts background everywhere."""
    net = build_model("PlainUNet", "", "none", 1, 8)
    *_, last = (one for one in net.modules() if isinstance(one, torch.nn.Conv2d))
    with torch.no_grad():
        last.weight.zero_(), last.bias.fill_(-9)
    torch.save(net.state_dict(), folder / "dead.pt")
    return folder / "dead.pt"


def test_a_trusted_list_that_is_noisy_is_refused(biased, tmp_path):
    flags = [*LARGE, "--epochs", "2", "--rounds", "1"]
    frame = pd.read_csv(biased / "valid.csv")
    noisy = frame.assign(iterations=[0, 3] + [0] * (len(frame) - 2))
    noisy.to_csv(biased / "noisy_valid.csv", index=False)
    line = rf"noisy_valid\.csv: 1 masks are noisy by .* the first in line 3: {frame['img'][1]}.* --trusted_csv"
    with pytest.raises(InputError, match=line):
        launch(SCRIPT, biased, tmp_path, "named", *flags, "--trusted_csv", "noisy_valid.csv")
    by_default = ["--trusted_csv", "", "--valid_csv", "noisy_valid.csv"]
    with pytest.raises(InputError, match=line):
        launch(SCRIPT, biased, tmp_path, "default", *flags, *by_default)
    launch(SCRIPT, biased, tmp_path, "unused", *flags, *by_default, "--rounds", "0")
