"""Early-learning correction: curves, divergence and corrections by hand; runs that correct, resume, share the work."""

import importlib
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import test_scripts
import torch
from conftest import draw_lists
from kill_and_resume import command, differences, finish, start
from test_resume import kill_at
from test_scripts import ROOT, SMALL, Interrupted, interrupt_after, launch, rows_of, same

from utils.args import check
from utils.checkpoint import read_checkpoint
from utils.corrected import CorrectedDataset
from utils.errors import InputError
from utils.images import read_mask, write_mask
from utils.methods.early_learning import (
    EarlyLearning,
    at_scales,
    class_overlaps,
    correct_masks,
    fit_curve,
    learning_curve,
    log_probabilities,
    scale_divergence,
    slope_change,
)

SCRIPT = "train_early_correction.py"
# corrects after the fourth epoch, whatever the curve is like
EAGER = ["--slope-change", "0.01", "--correction-threshold", "0.4", "--epochs", "5", "--augment", "flip"]
EAGER += ["--optimizer", "adamw", "--learning-rate", "0.01"]


# when


@pytest.mark.parametrize("curve", [(0.8, 0.9, 0.7), (0.6, 0.3, 0.95), (0.95, 2.0, 0.3)])
def test_fit_finds_the_curve_that_made_the_values(curve):
    epochs = np.arange(1, 25)
    found = fit_curve(learning_curve(epochs, *curve))
    assert learning_curve(epochs, *found) == pytest.approx(learning_curve(epochs, *curve), abs=1e-4)
    assert slope_change(found, 20) == pytest.approx(slope_change(curve, 20), abs=1e-2)


def test_curve_and_slope_by_hand():
    assert learning_curve(3.0, 0.8, 0.5, 2.0) == pytest.approx(0.8 * (1 - math.exp(-4.5)))
    a, b, c = 0.8, 0.5, 1.5

    def slope(t):
        step = 1e-6
        return (learning_curve(t + step, a, b, c) - learning_curve(t - step, a, b, c)) / (2 * step)

    assert slope_change((a, b, c), 6) == pytest.approx((slope(1.0) - slope(6.0)) / slope(1.0), rel=1e-5)
    assert slope_change((a, b, c), 1) == 0


def test_a_late_start_is_fitted_as_in_the_authors_code():
    """Their fit of these IoUs at the epochs 1, 2, ... gives these; an even, unbounded one 0, 0, 0, 0.96, 0.996."""
    ious = np.array([0.02, 0.05, 0.2, 0.5, 0.7, 0.78, 0.82, 0.84])
    found = [slope_change(fit_curve(ious[:n]), n) for n in range(4, 9)]
    assert found == pytest.approx([0.3705, 0.5659, 0.6805, 0.7515, 0.7972], abs=1e-4)


def test_late_epochs_count_more():
    ious = learning_curve(np.arange(1, 13), 0.8, 0.5, 0.9)
    first, last = ious.copy(), ious.copy()
    first[0], last[-1] = ious[0] + 0.1, ious[-1] + 0.1
    at = np.arange(9, 12)
    moved = [
        np.abs(learning_curve(at, *fit_curve(one)) - learning_curve(at, *fit_curve(ious))).max()
        for one in (first, last)
    ]
    assert moved[1] > 5 * moved[0]


def test_a_slope_that_has_risen_is_no_memorisation():
    assert slope_change((1.0, 0.01, 3.0), 3) == 0  # f'(3) is 7 times f'(1)
    assert slope_change((0.0, 1.0, 1.0), 9) == 0 and slope_change((0.5, 1e4, 1.0), 9) == 0


def test_too_few_epochs_and_unknown_ones():
    ious = learning_curve(np.arange(1, 9), 0.7, 0.8, 0.9)
    assert fit_curve(ious[:3]) is None and fit_curve(ious[:4]) is not None
    gaps = ious.copy()
    gaps[[1, 4]] = -1
    assert fit_curve(gaps) == pytest.approx(fit_curve(ious), rel=1e-2)
    gaps[2:6] = -1
    assert fit_curve(gaps) is None


@pytest.mark.parametrize("ious", [np.zeros(9), np.ones(9), np.linspace(1, 0, 9)])
def test_odd_curves_do_no_harm(ious):
    found = fit_curve(ious)
    assert (found is None) == (not ious.any())
    assert found is None or (all(map(math.isfinite, found)) and 0 <= slope_change(found, 9) <= 1)


def test_every_class_has_its_own_time():
    early = EarlyLearning(epochs=12, classes=3, images=2)
    due = []
    for epoch in range(12):
        fast, slow = learning_curve(epoch + 1, 0.8, 1.0, 1.0), learning_curve(epoch + 1, 0.8, 0.05, 1.0)
        found = early.fit(epoch, {"train_iou_1": slow, "train_iou_2": fast})
        due.append(early.due(found, 0.9))
        early.note(epoch + 1, due[-1], torch.zeros(2, dtype=torch.bool))
    # exp(-(t - 1)) falls below 0.1 at t = 3.3, and four epochs are needed; the other would need 47
    assert due == [[], [], [], [2]] + [[]] * 8 and early.done() == [2] and early.corrected.tolist() == [0, 0, 4]
    assert "curve_1" in found and "curve_2" not in found


def test_an_ordinary_class_0_has_a_time_too():
    early = EarlyLearning(epochs=4, classes=3, images=2, background=False)
    for epoch in range(4):
        found = early.fit(epoch, {f"train_iou_{k}": learning_curve(epoch + 1, 0.8, 1.0, 1.0) for k in (0, 1)})
    assert early.due(found, 0.9) == [0, 1] and early.first == 0


def test_what_is_as_given_again_has_no_version():
    early = EarlyLearning(epochs=4, classes=2, images=3)
    early.note(2, [1], torch.tensor([True, True, False]))
    early.note(3, [], torch.tensor([False, True, True]))
    assert early.version.tolist() == [0, 3, 3] and early.done() == [1]


def test_overlaps_are_counted_by_class():
    mask = torch.tensor([[[0, 1, 1, 2, 255, 2]]], dtype=torch.uint8)
    logits = torch.nn.functional.one_hot(torch.tensor([[[0, 1, 2, 2, 2, 0]]]), 3).movedim(3, 1).float()
    found = {k: (int(a), int(b)) for k, (a, b) in class_overlaps(logits, mask).items()}
    assert found == {"iou_1": (1, 2), "iou_2": (1, 3)}
    assert [int(x) for x in class_overlaps(logits, mask, 0)["iou_0"]] == [1, 2]
    binary = torch.tensor([1.0, -1.0, 2.0, -1.0]).view(1, 1, 1, 4)
    (pair,) = class_overlaps(binary, torch.tensor([[[1, 1, 0, 0]]], dtype=torch.uint8)).values()
    assert [int(x) for x in pair] == [1, 3]


# scales


def test_divergence_by_hand():
    p = torch.tensor([[0.9, 0.5, 0.2], [0.6, 0.5, 0.1]], dtype=torch.float64)
    every = [row.logit().view(1, 1, 1, 3).float() for row in p]
    q = p.mean(0)
    each = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    mask = row(1, 0, 0)
    of = scale_divergence(every, mask, 0.8).item()
    assert of == pytest.approx(each.item(), rel=1e-4)  # sure of 0.85 not being there
    assert scale_divergence(every, mask, 0.9).item() == 0
    two = [torch.cat([torch.zeros_like(z), z], 1) for z in every]
    assert scale_divergence(two, mask, 0.8).item() == pytest.approx(each.item(), rel=1e-4)
    assert scale_divergence(every[:1] * 3, mask, 0).item() == pytest.approx(0, abs=1e-6)


def test_void_pixels_make_no_image_sure():
    """The third is sure of 0.85, the first of 0.75."""
    p = torch.tensor([[0.9, 0.5, 0.2], [0.6, 0.5, 0.1]])
    every = [torch.stack([1 - one, one]).log().view(1, 2, 1, 3) for one in p]
    assert scale_divergence(every, row(1, 0, 0), 0.8).item() > 0
    assert scale_divergence(every, row(1, 0, 255), 0.8).item() == 0
    assert scale_divergence(every, row(1, 0, 255), 0.7).item() == scale_divergence(every, row(1, 0, 0), 0.8).item()


def test_divergence_of_extreme_logits_is_finite():
    every = [torch.full((2, 1, 2, 2), z, requires_grad=True) for z in (300.0, -300.0)]
    loss = scale_divergence(every, torch.zeros(2, 2, 2, dtype=torch.uint8), 0.0)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([math.log(2)] * 2) and all(z.grad.isfinite().all() for z in every)


def test_logits_come_back_at_the_size_of_the_image():
    seen = []

    def net(image):
        seen.append(tuple(image.shape[2:]))
        return image[:, :1]

    image = torch.full((2, 3, 10, 20), 7, dtype=torch.uint8)
    small, large = at_scales(net, image, [0.7, 1.5])
    assert seen == [(7, 14), (15, 30)] and small.shape == large.shape == (2, 1, 10, 20)
    assert torch.allclose(small, torch.tensor(7.0)) and torch.allclose(large, torch.tensor(7.0))


# what


def row(*labels):
    return torch.tensor([[labels]], dtype=torch.uint8)


def sure_of(classes, *pixels):
    """(1, C, 1, W) probabilities: (class, probability) of every pixel, the rest shared."""
    p = torch.zeros(1, classes, 1, len(pixels))
    for x, (k, value) in enumerate(pixels):
        p[0, :, 0, x] = (1 - value) / (classes - 1)
        p[0, k, 0, x] = value
    return p


def test_binary_labels_become_what_is_sure():
    p = sure_of(2, (1, 0.9), (1, 0.7), (0, 0.9), (0, 0.81), (1, 0.99))
    assert correct_masks(row(0, 0, 1, 0, 1), p, [1], 0.8).tolist() == [[[1, 0, 0, 0, 1]]]
    assert correct_masks(row(0, 0, 1, 0, 1), p, [1], 0.5).tolist() == [[[1, 1, 0, 0, 1]]]


def test_pixels_go_to_classes_that_had_their_turn_whatever_they_are():
    given = row(0, 0, 1, 2, 1, 2, 255)
    p = sure_of(3, (1, 0.9), (2, 0.9), (0, 0.9), (0, 0.9), (2, 0.9), (1, 0.9), (1, 0.9))
    assert correct_masks(given, p, [1], 0.8).tolist() == [[[1, 0, 0, 0, 1, 1, 255]]]
    assert correct_masks(given, p, [2], 0.8).tolist() == [[[0, 2, 0, 0, 2, 2, 255]]]
    assert correct_masks(given, p, [1, 2], 0.8).tolist() == [[[1, 2, 0, 0, 2, 1, 255]]]


def test_an_ordinary_class_0_waits_for_its_turn():
    given = row(0, 0, 1, 2, 1, 2, 255)
    p = sure_of(3, (1, 0.9), (2, 0.9), (0, 0.9), (0, 0.9), (2, 0.9), (1, 0.9), (1, 0.9))
    assert correct_masks(given, p, [1], 0.8, False).tolist() == [[[1, 0, 1, 2, 1, 1, 255]]]
    assert correct_masks(given, p, [0], 0.8, False).tolist() == [[[0, 0, 0, 0, 1, 2, 255]]]
    assert correct_masks(row(0, 0), sure_of(3, (1, 0.9), (1, 0.9)), [1], 0.8, False).tolist() == [[[0, 0]]]
    assert correct_masks(row(1, 1), sure_of(3, (0, 0.9), (1, 0.9)), [0, 1], 0.8, False).tolist() == [[[1, 1]]]


def test_no_class_is_invented_beside_others():
    p = sure_of(3, (2, 0.9), (2, 0.9), (0, 0.9))
    assert correct_masks(row(0, 1, 1), p, [1, 2], 0.8).tolist() == [[[0, 1, 0]]]
    assert correct_masks(row(1, 1, 1), p, [1, 2], 0.8).tolist() == [[[1, 1, 0]]]  # the background may be


def test_a_mask_of_background_alone_may_get_what_had_its_turn():
    p = sure_of(3, (2, 0.9), (1, 0.9), (0, 0.9))
    assert correct_masks(row(0, 0, 255), p, [2], 0.8).tolist() == [[[2, 0, 255]]]


def test_images_without_such_a_class_stay():
    p = sure_of(3, (0, 0.9), (0, 0.9))
    assert correct_masks(row(1, 0), p, [2], 0.8).tolist() == [[[1, 0]]]


def test_foreground_that_would_be_all_but_gone_stays():
    """Of 40 pixels: 4 become 1 (less than half, and 2.5 %); 4 become 2 (half); 24 become 8 (20 %)."""
    cases = {(4, 1): False, (4, 2): True, (24, 8): True, (4, 0): False}
    for (had, left), changes in cases.items():
        given = row(*[1] * had, *[0] * (40 - had))
        p = sure_of(2, *[(1, 0.9)] * left, *[(0, 0.9)] * (40 - left))
        moved = row(*[1] * left, *[0] * (40 - left))
        assert correct_masks(given, p, [1], 0.8).equal(moved if changes else given)
    void = row(1, 1, 1, 1, *[255] * 20, *[0] * 12)  # of 16 annotated pixels 1 is 6 %
    p = sure_of(2, (1, 0.9), *[(0, 0.9)] * 35)
    assert correct_masks(void, p, [1], 0.8).tolist() == [[[1, 0, 0, 0, *[255] * 20, *[0] * 12]]]
    given, p = row(1, 1, 0, *[2] * 37), sure_of(3, *[(0, 0.9)] * 40)
    assert not correct_masks(given, p, [0, 1, 2], 0.8, False).any(), "class 0 is no background"


def test_images_do_not_share_their_classes():
    p = torch.cat([sure_of(3, (2, 0.9), (2, 0.9))] * 2)
    both = torch.cat([row(0, 2), row(0, 1)])
    assert correct_masks(both, p, [1, 2], 0.8).tolist() == [[[2, 2]], [[0, 1]]]


# runs


def with_clean(tiny, root, classes=1):
    """A copy of the lists whose training masks are dilated, and say so in the column clean."""
    shutil.copytree(tiny, root)
    frame = pd.read_csv(root / ("train.csv" if classes == 1 else "classes.csv"))
    (root / "bad").mkdir()
    for i, name in enumerate(frame["filename"]):
        mask = read_mask(root / name, classes)
        wide = np.maximum(mask, np.roll(mask, 3, 1)) if classes == 1 else np.roll(mask, 2, 1)
        write_mask(root / f"bad/{i}.png", wide, classes)
    bad = [f"bad/{i}.png" for i in range(len(frame))]
    frame.assign(clean=frame["filename"], filename=bad).to_csv(root / "train.csv", index=False)
    return root


CLASSES = ["--classes", "3", "--valid_csv", "classes_valid.csv", "--test_csv", ""]


@pytest.mark.parametrize("more", [[], CLASSES, [*CLASSES, "--no-background"]])
def test_a_run_corrects_from_its_turn_on_and_says_what(more, tiny, tmp_path):
    root = with_clean(tiny, tmp_path / "data", 3 if more else 1)
    launch(SCRIPT, root, tmp_path, "a", *EAGER, "--epochs", "7", *more, *(["--learning-rate", "0.05"] if more else []))
    rows = [one for one in rows_of(tmp_path / "a") if "epoch" in one]
    names = range(3)[0 if "--no-background" in more else 1 :] if more else [1]
    turns = [one.get("corrected", []) for one in rows]
    first = next(i for i, turn in enumerate(turns) if turn)
    assert first >= 3 and turns[-1] == [] and all(turns[first:-1])
    assert all({*a} <= {*b} for a, b in itertools.pairwise(turns[:-1])) and {*turns[-2]} <= {*names}
    of = rows[first]
    guarded = more is CLASSES  # that network predicts the background alone, and no image may lose all else
    assert (0 < of["changed_pixels"] < 1) != guarded
    assert (of["label_iou_before"] != of["label_iou_after"]) != guarded
    assert rows[first + 1]["label_iou_before"] == of["label_iou_before"], "the given masks, corrected anew"
    assert all(0 <= one.get(f"train_iou_{k}", 0) <= 1 and one["train_divergence"] >= 0 for one in rows for k in names)
    state = read_checkpoint(tmp_path / "a/last.pt")["corrections"][0]
    assert {*state["version"].tolist()} <= {0, 6}
    kept = {int(path.name[6:]): len(list(path.iterdir())) for path in (tmp_path / "a/corrected").iterdir()}
    assert sorted(kept) == [4, 5, 6] and kept[6] == int((state["version"] == 6).sum())
    assert (kept[6] > 0) != guarded
    curve = of[f"curve_{turns[first][0]}"]
    assert of[f"slope_change_{turns[first][0]}"] == pytest.approx(slope_change(curve, first + 1))
    assert (tmp_path / "a/pictures/epoch_0007.png").exists()


def test_shares_and_ious_are_those_of_the_files(tiny, tmp_path):
    root = with_clean(tiny, tmp_path / "data")
    launch(SCRIPT, root, tmp_path, "a", *EAGER, "--size", "32")
    of = next(one for one in rows_of(tmp_path / "a") if "corrected" in one)
    frame, changed, ious = pd.read_csv(root / "train.csv"), 0, np.zeros((2, 2))
    version = read_checkpoint(tmp_path / "a/last.pt")["corrections"][0]["version"]
    for i, (name, clean) in enumerate(zip(frame["filename"], frame["clean"], strict=True)):
        old, truth = read_mask(root / name), read_mask(root / clean)
        new = read_mask(tmp_path / f"a/corrected/epoch_{version[i]:04d}/{i:06d}.png") if version[i] else old
        changed += (old != new).sum()
        ious += [[(one & truth).sum(), (one | truth).sum()] for one in (old, new)]
    assert of["changed_pixels"] == pytest.approx(changed / (13 * 32 * 32))
    assert [of["label_iou_before"], of["label_iou_after"]] == pytest.approx((ious[:, 0] / ious[:, 1]).tolist())


def test_training_goes_on_with_the_corrected_masks(tiny, tmp_path):
    corrected = launch(SCRIPT, tiny, tmp_path, "a", *EAGER)
    given = launch(SCRIPT, tiny, tmp_path, "b", *EAGER, "--slope-change", "1")
    rows, others = rows_of(tmp_path / "a"), rows_of(tmp_path / "b")
    when = next(i for i, one in enumerate(rows) if "corrected" in one)
    assert not same(corrected[0], given[0]) and not (tmp_path / "b/corrected").exists()
    added = {"corrected", "changed_pixels"}
    kept = [{k: v for k, v in one.items() if k not in added} for one in rows]
    assert kept[: when + 1] == others[: when + 1] and kept[when + 1] != others[when + 1]


def test_masks_are_augmented_like_those_given(tiny, tmp_path):
    plain, mirrored = (CorrectedDataset(tiny / "train.csv", tiny, augment=how) for how in ("none", "flip"))
    version = torch.zeros(13, dtype=torch.int32)
    for dataset in (plain, mirrored):
        dataset.follow(version, tmp_path)
    before = [mirrored[i]["mask"] for i in range(13)]
    assert all(torch.equal(plain[i]["mask"], torch.from_numpy(plain.plain(i)[1])) for i in range(13))
    (tmp_path / "epoch_0002").mkdir()
    for i in range(13):
        write_mask(mirrored.kept_at(i, 2), plain.plain(i)[1])
    version.fill_(2)
    assert all(torch.equal(mirrored[i]["mask"], before[i]) for i in range(13))
    write_mask(mirrored.kept_at(4, 2), np.eye(32, dtype=np.uint8))
    eye = torch.eye(32, dtype=torch.uint8)
    assert torch.equal(plain[4]["mask"], eye)
    assert mirrored.__getitems__([4, 5])["mask"][0].equal(mirrored[4]["mask"])
    assert mirrored[4]["mask"].equal(eye) or mirrored[4]["mask"].equal(eye.flip(1))


@pytest.mark.parametrize(
    ("epoch", "more"), [(4, []), (3, []), (3, CLASSES), (3, ["--precision", "bf16", "--loss", "t_loss"])]
)
def test_interrupted_run_ends_on_the_same_bits(epoch, more, tiny, tmp_path, monkeypatch):
    """Also where the masks are corrected, and the checkpoint that says so is not yet written."""
    lists = ["--train_csv", "classes.csv", *CLASSES] if more is CLASSES else more
    whole = launch(SCRIPT, tiny, tmp_path, "whole", *EAGER, *lists)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, epoch)
        launch(SCRIPT, tiny, tmp_path, "parts", *EAGER, *lists)
    parts = launch(SCRIPT, tiny, tmp_path, "parts", *EAGER, *lists, "--workers", "2")
    rows = rows_of(tmp_path / "whole")
    assert same(whole[0], parts[0]) and rows == rows_of(tmp_path / "parts")
    assert any("corrected" in one for one in rows)
    assert not differences(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(("target", "nth"), [("utils.corrected.write_mask", 4), ("utils.steps.Steps.step", 29)])
def test_killed_while_it_corrects_and_after(target, nth, tmp_path):
    root = draw_lists(tmp_path)
    module = importlib.import_module("train_early_correction")

    def run(name, before=None):
        return finish(start(command(module, root, name, EAGER), root / "out.txt", before))

    assert run("whole") == 0, (root / "out.txt").read_text()[-2000:]
    assert run("killed", kill_at(target, nth)) == -signal.SIGKILL
    assert run("killed") == 0, (root / "out.txt").read_text()[-2000:]
    assert not differences(root / "runs/whole", root / "runs/killed")
    assert any("corrected" in one for one in rows_of(root / "runs/whole"))


def test_previous_checkpoint_finds_the_masks_it_needs(tiny, tmp_path, monkeypatch):
    flags = [*EAGER, "--epochs", "8"]
    whole = launch(SCRIPT, tiny, tmp_path, "whole", *flags)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, 6)
        launch(SCRIPT, tiny, tmp_path, "parts", *flags)
    (tmp_path / "parts/last.pt").write_bytes(b"damaged")
    previous = read_checkpoint(tmp_path / "parts/previous.pt")
    assert previous["epoch"] == 4 and 5 in previous["corrections"][0]["version"]
    parts = launch(SCRIPT, tiny, tmp_path, "parts", *flags)
    assert same(whole[0], parts[0]) and rows_of(tmp_path / "whole") == rows_of(tmp_path / "parts")
    assert not differences(tmp_path / "whole", tmp_path / "parts")


def test_a_corrected_mask_that_is_gone_is_said(tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, 4)
        launch(SCRIPT, tiny, tmp_path, "a", *EAGER)
    shutil.rmtree(tmp_path / "a/corrected")
    with pytest.raises(InputError, match=r"holds corrected labels of this run; remove .*/a to train again"):
        launch(SCRIPT, tiny, tmp_path, "a", *EAGER)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--slope-change", "1.2"], "--slope-change 1.2: must lie between 0 and 1"),
        (["--correction-threshold", "-1"], "--correction-threshold -1.0: must lie between 0 and 1"),
        (["--scales", "0.7", "9"], "--scales 9.0: must lie between 0.1 and 4"),
        (["--consistency", "-1"], "--consistency -1.0: must be 0 or more"),
        (["--compat", "nlkd"], "--compat nlkd: the released code corrects no labels"),
    ],
)
def test_what_cannot_be_is_said(flags, message):
    module = importlib.import_module("train_early_correction")
    with pytest.raises(InputError, match=message):
        check(test_scripts.parse(module.Args, ["--train_csv", "a", "--valid_csv", "b", *flags]))


def test_log_probabilities_of_both():
    logits = torch.randn(2, 3, 4, 5)
    assert torch.allclose(log_probabilities(logits).exp(), logits.softmax(1), atol=1e-6)
    one = log_probabilities(logits[:, :1]).exp()
    assert torch.allclose(one[:, 1], logits[:, 0].sigmoid(), atol=1e-6) and torch.allclose(one.sum(1), torch.ones(()))


def test_two_processes_correct_together(tiny, tmp_path):
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / SCRIPT), *SMALL, *EAGER]
    words += ["--data-root", str(tiny), "--run-dir", str(tmp_path), "--batch-size", "2", "--name", "two"]
    words += [f"--{name}_csv={tiny / name}.csv" for name in ("train", "valid")]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    log = [json.loads(line) for line in (tmp_path / "two/log.jsonl").read_text().splitlines()]
    assert any("corrected" in one for one in log)
    version = read_checkpoint(tmp_path / "two/last.pt")["corrections"][0]["version"]
    kept = {(int(p.parent.name[6:]), int(p.stem)) for p in (tmp_path / "two/corrected").rglob("*.png")}
    assert kept == {(int(v), i) for i, v in enumerate(version) if v} and {i % 2 for _, i in kept} == {0, 1}
