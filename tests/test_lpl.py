"""Learning pseudo labels: golden arrays, values by hand, neutral settings, and what a run may learn from."""

import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from test_scripts import BASE, ROOT, SMALL, launch, rows_of, same

from utils.checkpoint import read_checkpoint
from utils.errors import InputError
from utils.images import read_mask, write_mask
from utils.losses import per_image_loss
from utils.methods.lpl import (
    DynamicEvaluation,
    Goal,
    Tally,
    areas,
    class_aware_pixels,
    cross_labels,
    cross_losses,
    cross_scores,
    hybrid_losses,
    image_level_loss,
    released_pixels,
    segmentation_loss,
    total,
)
from utils.present import classes_in, restrict

GOLDEN = Path(__file__).parent / "golden"
SCRIPT = "train_lpl.py"
CLASSES = ["--train_csv", "classes.csv", "--valid_csv", "classes_valid.csv", "--test_csv", "", "--classes", "3"]
CLASSES += ["--weak_csv", "classes_weak.csv", "--arch", "PlainUNet"]
OURS = SimpleNamespace(class_aware=True, compat="none", cls_weight=1.0, pct_weight=1.0, classes=6)
THEIRS = SimpleNamespace(class_aware=True, compat="released", cls_weight=1.0, pct_weight=1.0, classes=6)


def golden(name):
    with np.load(GOLDEN / f"lpl_{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files if arrays[key].dtype.kind != "U"}


def gradient(loss, logits):
    return torch.autograd.grad(loss, logits)[0]


# class-aware cross entropy


@pytest.mark.parametrize(
    ("pixels", "kind", "atol"), [(class_aware_pixels, "exact", 1e-6), (released_pixels, "T1", 1e-5)]
)
def test_golden_class_aware_cross_entropy(pixels, kind, atol):
    d = golden("cce")
    logits, present, mask = d["logits"].requires_grad_(), d["category"][:, :, 0, 0] > 0, d["label"].byte()
    loss = pixels(logits, mask, present)
    mean = loss.sum() / (mask != 255).sum()
    assert torch.allclose(loss.double(), d[f"{kind}_loss_map"].double(), atol=atol)
    assert torch.allclose(mean.double(), d[f"{kind}_loss_mean"].double(), atol=atol)
    assert torch.allclose(gradient(mean, logits).double(), d[f"{kind}_grad_logits"].double(), atol=1e-6)


@pytest.mark.parametrize("classes", [1, 6])
def test_with_all_classes_present_it_is_the_loss_of_the_baseline_bit_for_bit(classes):
    torch.manual_seed(0)
    logits = torch.randn(3, classes, 9, 7, requires_grad=True)
    mask = torch.randint(0, max(2, classes), (3, 9, 7), dtype=torch.uint8)
    if classes > 1:
        mask[:, :2] = 255
    plain = per_image_loss(logits, mask).mean()
    ours = segmentation_loss(logits, mask, torch.ones(3, max(2, classes), dtype=torch.bool), OURS)
    assert torch.equal(plain, ours) and torch.equal(gradient(plain, logits), gradient(ours, logits))


@pytest.mark.parametrize("pixels", [class_aware_pixels, released_pixels])
def test_absent_classes_change_nothing_and_learn_nothing(pixels):
    torch.manual_seed(1)
    logits, mask = torch.randn(2, 4, 5, 5), torch.randint(0, 2, (2, 5, 5), dtype=torch.uint8) * 2
    present = torch.tensor([[True, False, True, False], [True, True, True, False]])
    found = []
    for value in (0.0, 1e4, -1e4):
        z = logits.clone()
        z[:, 3], z[0, 1] = value, -value
        z.requires_grad_()
        loss = pixels(z, mask, present).mean()
        found.append((loss.detach(), gradient(loss, z)))
    for loss, grad in found:
        assert torch.equal(loss, found[0][0]) and torch.equal(grad, found[0][1])
        assert not grad[:, 3].any() and not grad[0, 1].any() and grad[:, 0].any()
    if pixels is class_aware_pixels:
        assert grad.sum(1).abs().max() < 1e-7


@pytest.mark.parametrize("classes", [1, 3])
def test_an_image_of_one_class_teaches_nothing(classes):
    logits = torch.randn(2, classes, 4, 4, requires_grad=True)
    present = torch.zeros(2, max(2, classes), dtype=torch.bool)
    present[0, 0] = present[1, 1] = True
    mask = torch.tensor([0, 1], dtype=torch.uint8)[:, None, None].expand(2, 4, 4)
    loss = class_aware_pixels(logits, mask, present)
    assert not loss.any() and not gradient(loss.sum(), logits).any()


def test_one_channel_is_two_classes():
    z, mask = torch.randn(3, 1, 4, 4), torch.randint(0, 2, (3, 4, 4), dtype=torch.uint8)
    present = torch.tensor([[True, True], [True, False], [True, True]])
    mask[1] = 0
    two = torch.cat([torch.zeros_like(z), z], 1)
    assert torch.allclose(class_aware_pixels(z, mask, present), class_aware_pixels(two, mask, present), atol=1e-6)
    assert torch.equal(released_pixels(z, mask, present), released_pixels(two, mask, present))
    assert torch.equal(restrict(z, present).gt(0)[:, 0].long(), restrict(two, present).argmax(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_logits_and_images_without_annotation_stay_finite(dtype):
    logits = torch.tensor([1e4, -1e4, 3e4, 0.0], dtype=dtype).view(1, 4, 1, 1).repeat(2, 1, 3, 3).requires_grad_()
    mask = torch.full((2, 3, 3), 255, dtype=torch.uint8)
    mask[0, 0] = 1
    present = classes_in(mask, 4)
    present[0, 0] = True
    assert not present[1].any()
    for args in (OURS, THEIRS):
        loss = segmentation_loss(logits, mask, present, args)
        assert loss.isfinite() and gradient(loss, logits).isfinite().all()
    high, low = logits[0, :2, 0, 0].float().tolist()
    assert segmentation_loss(logits, mask, present, OURS) == (high - low) / 2  # 0 in the other image
    assert not segmentation_loss(logits[1:], mask[1:], present[1:], THEIRS)


def test_void_pixels_do_not_spoil_the_gradient_of_the_released_form():
    logits = torch.tensor([500.0, 0.0, 1.0]).view(1, 3, 1, 1).repeat(1, 1, 1, 2).requires_grad_()
    mask, present = torch.tensor([[[255, 1]]], dtype=torch.uint8), torch.tensor([[False, True, True]])
    loss = segmentation_loss(logits, mask, present, THEIRS)
    assert loss.item() == pytest.approx(math.log1p(math.e), abs=1e-4)
    grad = gradient(loss, logits)
    assert grad.isfinite().all() and not grad[..., 0].any() and grad[..., 1].any()


def test_released_form_is_bounded_and_near_the_exact_one():
    torch.manual_seed(2)
    logits, mask = 4 * torch.randn(4, 5, 16, 16), torch.randint(0, 5, (4, 16, 16), dtype=torch.uint8)
    present = torch.ones(4, 5, dtype=torch.bool)
    exact, released = (f(logits, mask, present) for f in (class_aware_pixels, released_pixels))
    assert released.max() <= 11.513 and (released - exact)[exact < 5].abs().max() < 1.5e-3
    assert exact.max() > 12


def test_classes_of_masks_and_restricted_logits():
    mask = torch.tensor([[[0, 2], [255, 2]], [[255, 255], [255, 255]]], dtype=torch.uint8)
    assert classes_in(mask, 4).tolist() == [[True, False, True, False], [False] * 4]
    assert classes_in(mask[:1] // 2, 1).tolist() == [[True, True]]
    logits = torch.arange(8.0).view(2, 4, 1, 1)
    found = restrict(logits, classes_in(mask, 4))
    assert found[0, :, 0, 0].tolist() == [0, -math.inf, 2, -math.inf] and torch.equal(found[1], logits[1])


def test_golden_masks_restricted_to_the_classes_of_an_image():
    d = golden("infer")
    found = restrict(d["pseudo_mean_logits"][None], d["category"][:, :, 0, 0] > 0).argmax(1)[0]
    assert torch.equal(found, d["pseudo_label"]) and torch.equal(found, d["stage1_test_label"])
    assert torch.equal(d["pseudo_mean_logits"].argmax(0), d["stage2_test_label"])


# progressive cross training


def test_golden_steps_of_the_released_code():
    d = golden("pct")
    evaluation = DynamicEvaluation(6, 0.99, 8, released=True)
    for k in range(4):
        step = {key[3:]: value for key, value in d.items() if key.startswith(f"s{k}_")}
        logits = [step[f"in_pred_{net}"].requires_grad_() for net in ("hybrid", "pseudo")]
        mask, present = step["in_seg_label"].byte(), step["in_category"][:, :, 0, 0] > 0
        batch = {"image": mask[:2], "mask": mask[:2], "present": present[:2], "weak_present": present[2:]}
        goal = cross_labels(SimpleNamespace(sum=lambda counts: counts), logits, batch, evaluation)
        # the released code puts true masks in the place of labels where it knows them
        known = (step["in_mask_flag"][2:] > 0)[:, None, None]
        goal = Goal(*(torch.where(known, mask[2:], label) for label in goal[:2]), goal.weight)
        losses = hybrid_losses(logits[0], batch, THEIRS)
        losses |= cross_losses([z[2:] for z in logits], goal, present[2:], THEIRS)
        assert torch.equal(goal.hybrid.long(), step["out_pseudo_label"][2:])
        assert torch.equal(goal.pseudo.long(), step["out_pseudo_label2"][2:])
        for name, row in (("iou_tp", 0), ("iou_p", 1), ("iou_t", 2)):
            assert torch.allclose(evaluation.counts[row].float(), step[f"out_{name}"], rtol=1e-6)
        assert torch.allclose(evaluation.iou().float(), step["out_iou"], atol=1e-6)
        assert torch.allclose(goal.weight, step["out_sample_weight"].flatten(), atol=1e-6)
        names = {"image": "cls_hybrid", "hybrid": "seg_hybrid", "pseudo": "seg_pseudo", "cross": "pct"}
        for ours, name in names.items():
            assert losses[ours].item() == pytest.approx(step[f"out_loss_{name}"].item(), abs=1e-5), (k, name)
        whole = total(losses, THEIRS) + losses["pseudo"]
        assert whole.item() == pytest.approx(step["out_loss"].item(), abs=1e-5)
        for z, net in zip(logits, ("hybrid", "pseudo"), strict=True):
            grad = torch.autograd.grad(whole, z, retain_graph=True)[0]
            assert torch.allclose(grad, step[f"out_grad_pred_{net}"], atol=1e-6)


def test_nothing_that_was_seen_makes_no_nan():
    evaluation = DynamicEvaluation(3)
    evaluation.counts.zero_()
    assert evaluation.iou().tolist() == [0, 0, 0]
    assert evaluation.image_weight(torch.ones(1, 3, dtype=torch.bool)).tolist() == [0]


def test_counts_are_discounted_sums_and_void_is_no_prediction():
    torch.manual_seed(3)
    ours, theirs = DynamicEvaluation(3, 0.9), DynamicEvaluation(3, 0.9, released=True)
    by_hand = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)[:, None].repeat(1, 3)
    for _ in range(5):
        pred, mask = torch.randint(0, 3, (2, 2, 6, 6), dtype=torch.uint8)
        mask[:, 0] = 255
        ours.update(pred, mask), theirs.update(pred, mask)
        maps = [torch.where(pred == mask, mask, 9), pred.masked_fill(mask == 255, 9), mask]
        counts = [[(one == c).sum().item() for c in range(3)] for one in maps]
        by_hand = 0.9 * by_hand + torch.tensor(counts, dtype=torch.float64)
        assert areas(pred, mask, 3).tolist() == counts
    assert torch.allclose(ours.counts, by_hand) and torch.allclose(ours.counts[[0, 2]], theirs.counts[[0, 2]])
    assert theirs.counts[1].sum() == pytest.approx(sum(2 * 36 * 0.9**k for k in range(5)))
    assert ours.counts[1].sum() == pytest.approx(sum(2 * 30 * 0.9**k for k in range(5)))


def test_image_weights_by_hand():
    ours, theirs = DynamicEvaluation(3, power=2), DynamicEvaluation(3, power=2, released=True)
    for one in (ours, theirs):
        one.counts.copy_(torch.tensor([[6.0, 4.0, 0.0], [8.0, 5.0, 1.0], [6.0, 9.0, 3.0]]))
    assert ours.iou().tolist() == [0.75, 0.4, 0]
    present = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 0, 1]]).bool()
    assert ours.image_weight(present).tolist() == pytest.approx([0.5625, 0.16, 0, 0])
    assert theirs.image_weight(present).tolist() == pytest.approx([0.5625, 0.16, 0.16, 1])
    assert DynamicEvaluation(3, power=0).image_weight(present).tolist() == [1, 1, 1, 1]


def test_perfect_predictions_reach_an_iou_of_one():
    evaluation, mask = DynamicEvaluation(1), torch.randint(0, 2, (4, 32, 32), dtype=torch.uint8)
    for _ in range(50):
        evaluation.update(mask, mask)
    assert (evaluation.iou() > 0.9999).all() and (evaluation.iou() <= 1).all()


def test_image_level_loss_by_hand():
    logits = torch.full((1, 3, 2, 2), -5.0)
    logits[0, 1, 0, 1], logits[0, 2, 1, 1] = 2.0, 1.0
    held = torch.tensor([[True, True, False]])
    by_hand = (math.log1p(math.exp(-2)) + math.log1p(math.exp(1))) / 2
    assert image_level_loss(logits, held).item() == pytest.approx(by_hand, rel=1e-6)
    one = image_level_loss(logits[:, 1:2], held[:, :2]).item()
    assert one == pytest.approx(math.log1p(math.exp(-2)), rel=1e-6)


@pytest.mark.parametrize("args", [OURS, THEIRS])
def test_who_learns_from_what(args):
    """PseudoNet learns from weak images only, HybridNet nothing from labels without weight, and labels are present."""
    torch.manual_seed(4)
    logits = [torch.randn(4, 6, 5, 5, requires_grad=True) for _ in range(2)]
    mask, present = torch.randint(0, 3, (2, 5, 5), dtype=torch.uint8), torch.rand(2, 6) < 0.5
    present[:, 5] = True
    batch = {"image": mask, "mask": mask, "present": classes_in(mask, 6), "weak_present": present}
    goal = cross_labels(SimpleNamespace(sum=lambda x: x), logits, batch, DynamicEvaluation(6))
    for label in goal[:2]:
        assert not (classes_in(label, 6) & ~present).any() and not label.requires_grad
    goal = goal._replace(weight=torch.tensor([0.0, 0.5]))
    losses = hybrid_losses(logits[0], batch, args) | cross_losses([z[2:] for z in logits], goal, present, args)
    assert not gradient(losses["pseudo"], logits[1])[:2].any()
    cross = torch.autograd.grad(losses["cross"], logits, retain_graph=True, allow_unused=True)
    assert cross[1] is None and not cross[0][:3].any() and cross[0][3].any()
    image = gradient(losses["image"], logits[0])
    assert (image.flatten(2) != 0).sum(2).max() == 1 and not image[:, 0].any()


def test_a_crop_holds_the_classes_that_are_seen():
    logits, mask = torch.randn(2, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.uint8)
    batch = {"mask": mask, "present": torch.tensor([[True, True, False]]), "weak_present": torch.ones(1, 3).bool()}
    flags = {"class_aware": True, "cls_weight": 1.0, "classes": 3}
    for compat, held in (("none", [[1, 0, 0], [1, 1, 1]]), ("released", [[1, 1, 0], [1, 1, 1]])):
        found = hybrid_losses(logits, batch, SimpleNamespace(compat=compat, **flags))
        assert torch.equal(found["image"], image_level_loss(logits, torch.tensor(held).bool()))


def test_labels_of_weak_images_are_compared_with_their_masks():
    tally = Tally(3, torch.device("cpu"))
    truth = torch.tensor([[[0, 1, 2, 255]]], dtype=torch.uint8)
    labels = torch.tensor([[[0, 1, 1, 1]]], dtype=torch.uint8), torch.tensor([[[0, 1, 2, 0]]], dtype=torch.uint8)
    tally.add(Goal(*labels, torch.ones(1)), truth)
    found = cross_scores(DynamicEvaluation(3), tally.areas)
    assert found["pseudo_miou_hybrid"] == pytest.approx((1 + 0.5 + 0) / 3) and found["pseudo_miou_pseudo"] == 1
    assert "pseudo_miou_hybrid" not in cross_scores(DynamicEvaluation(3), Tally(3, torch.device("cpu")).areas)


# the script


def full(tiny):
    """A list whose masks hold all three classes."""
    frame = pd.read_csv(tiny / "classes.csv")
    frame["filename"] = ["full/" + name for name in frame["filename"]]
    for name in frame["filename"]:
        mask = read_mask(tiny / name.removeprefix("full/"), 3)
        mask[4:6, 4:8], mask[4:6, 8:12], mask[4:6, 12:16] = 0, 1, 2
        (tiny / name).parent.mkdir(parents=True, exist_ok=True)
        write_mask(tiny / name, mask, 3)
    frame.to_csv(tiny / "full.csv", index=False)
    return "full.csv"


@pytest.mark.parametrize("lists", [["--weak_csv", "weak.csv"], ["--weak_csv", ""]])
def test_without_weak_images_and_classes_it_is_the_baseline(lists, tiny, tmp_path):
    flags = ["--epochs", "2", "--augment", "flip"]
    plain = launch(BASE, tiny, tmp_path, "plain", *flags)
    off = ["--cls-weight", "0", "--pct-weight", "0", "--no-class-aware"]
    assert same(plain[0], launch(SCRIPT, tiny, tmp_path, "method", *flags, *lists, *off)[0])


@pytest.mark.parametrize("classes", [1, 3])
def test_with_all_classes_present_the_class_aware_network_is_the_plain_one(classes, tiny, tmp_path):
    flags = ["--epochs", "2", "--augment", "crop", *([] if classes == 1 else [*CLASSES, "--train_csv", full(tiny)])]
    aware = launch(SCRIPT, tiny, tmp_path, "cce", *flags, "--preset", "cce")
    plain = launch(SCRIPT, tiny, tmp_path, "ce", *flags, "--preset", "ce")
    assert len(aware) == len(plain) == 1 and same(aware[0], plain[0])


def test_without_weight_of_the_cross_loss_it_is_hybridnet_alone(tiny, tmp_path, monkeypatch):
    flags = ["--epochs", "2", "--augment", "crop", *CLASSES]
    alone = launch(SCRIPT, tiny, tmp_path, "alone", *flags, "--pct-weight", "0")
    both = launch(SCRIPT, tiny, tmp_path, "both", *flags, "--pct-power", "0")
    assert len(alone) == 1 and len(both) == 2 and not same(alone[0], both[0]) and not same(both[0], both[1])
    monkeypatch.setattr(DynamicEvaluation, "image_weight", lambda self, present: torch.zeros(len(present)))
    assert same(alone[0], launch(SCRIPT, tiny, tmp_path, "zero", *flags)[0])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("preset", ["cce_pct", "released"])
def test_what_is_logged(preset, precision, tiny, tmp_path):
    more = ["--preset", preset, "--precision", precision, "--iou-momentum", "0.5", "--pct-power", "1"]
    pd.read_csv(tiny / "test.csv").replace("mask/", "classes/", regex=True).to_csv(tiny / "three.csv", index=False)
    launch(SCRIPT, tiny, tmp_path, "run", "--epochs", "2", *CLASSES, *more, "--test_csv", "three.csv")
    *epochs, test = rows_of(tmp_path / "run")
    for row in epochs:
        parts = [row[f"train_loss_{name}"] for name in ("hybrid", "image", "pseudo", "cross")]
        assert all(map(math.isfinite, parts)) and row["train_loss"] == pytest.approx(sum(parts) - parts[2], rel=1e-3)
        assert len(row["class_iou"]) == 3 and 0 <= row["train_in_use"] <= 1 and 0 <= row["train_image_weight"] <= 1
        assert "valid_a_miou" in row and "valid_b_miou" in row and "pseudo_miou_hybrid" not in row
    assert {"test_miou", "test_no_label_miou"} <= test.keys()


def test_masks_of_weak_images_are_for_the_log_alone(tiny, tmp_path):
    frame = pd.read_csv(tiny / "classes.csv")[["img", "filename"]].assign(label="0 1 2")
    frame.to_csv(tiny / "classes_known.csv", index=False)
    flags = ["--epochs", "2", *CLASSES]
    without = launch(SCRIPT, tiny, tmp_path, "without", *flags)
    known = launch(SCRIPT, tiny, tmp_path, "known", *flags, "--weak_csv", "classes_known.csv")
    assert all(map(same, without, known))
    assert 0 < rows_of(tmp_path / "known")[1]["pseudo_miou_hybrid"] <= 1


def test_the_learning_rate_of_the_second_network_stands_still_in_the_released_code(tiny, tmp_path):
    for compat, factor in (("none", 0.0), ("released", 1.0)):
        more = ["--compat", compat, "--scheduler", "poly"]
        launch(SCRIPT, tiny, tmp_path, compat, "--epochs", "1", *CLASSES, *more)
        rates = [one["_last_lr"][0] for one in read_checkpoint(tmp_path / compat / "last.pt")["schedules"]]
        assert rates[0] == 0 and rates[1] == pytest.approx(0.05 * factor)


def test_state_of_the_evaluation_is_saved(tiny, tmp_path):
    launch(SCRIPT, tiny, tmp_path, "run", "--epochs", "1")
    (state,) = read_checkpoint(tmp_path / "run/last.pt")["evaluations"]
    assert state["counts"].shape == (3, 2) and state["counts"][2].sum() > 100


def weak_list(tiny, name, labels):
    frame = pd.read_csv(tiny / "classes.csv")[["img"]]
    frame.assign(label=[labels.get(i, "0 1 2") for i in range(len(frame))]).to_csv(tiny / name, index=False)
    return [*CLASSES, "--weak_csv", name]


@pytest.mark.parametrize(("label", "said"), [("0 3", "line 4: label 0 3"), ("", "line 4: label is empty")])
def test_a_bad_label_is_one_line_with_file_and_row(label, said, tiny, tmp_path):
    with pytest.raises(InputError, match=rf"bad\.csv: 1 bad row: {said}.*classes 0 to 2"):
        launch(SCRIPT, tiny, tmp_path, "run", *weak_list(tiny, "bad.csv", {2: label}))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--weak_csv", ""], "--weak_csv: name a list of images and their classes"),
        (["--weak_csv", "unlabelled.csv"], "unlabelled.csv: no column `label`"),
        (["--pct-power", "-1"], "--pct-power -1.0: must be 0 or more"),
        (["--iou-momentum", "2"], "--iou-momentum 2.0: must lie between 0 and 1"),
        (["--loss", "gce"], "--loss gce: this script learns by cross entropy"),
        (["--arch", "PointRend"], "--arch PointRend: has no map of logits in training"),
    ],
)
def test_mistakes_are_one_line(flags, said, tiny, tmp_path):
    with pytest.raises(InputError, match=said):
        launch(SCRIPT, tiny, tmp_path, "run", *flags)


def test_another_content_of_the_weak_list_is_refused(tiny, tmp_path):
    lists = weak_list(tiny, "changed.csv", {})
    launch(SCRIPT, tiny, tmp_path, "run", *lists, "--preset", "ce", "--epochs", "1")
    weak_list(tiny, "changed.csv", {3: "0 1"})
    with pytest.raises(InputError, match="another content of --weak_csv"):
        launch(SCRIPT, tiny, tmp_path, "run", *lists, "--preset", "ce", "--epochs", "1")


def test_what_makes_weak_images_useless_is_said(tiny, tmp_path, capsys):
    lists = weak_list(tiny, "no0.csv", dict.fromkeys(range(13), "1 3"))
    launch(SCRIPT, tiny, tmp_path, "run", *lists, "--classes", "4")
    said = capsys.readouterr().err
    assert "class 3 in its labels but in no mask" in said and "class 0 is in masks but in no label" in said
    assert "13 of its images have masks in" in said


def test_weak_images_that_choose_the_checkpoint_are_said(tiny, tmp_path, capsys):
    lists = weak_list(tiny, "weak_valid.csv", {})
    frame = pd.read_csv(tiny / "weak_valid.csv")
    more = pd.read_csv(tiny / "classes_valid.csv")[["img"]].iloc[:2].assign(label="0 1 2")
    pd.concat([frame, more]).to_csv(tiny / "weak_valid.csv", index=False)
    launch(SCRIPT, tiny, tmp_path, "run", *lists, "--preset", "ce", "--epochs", "1")
    said = capsys.readouterr().err
    assert "2 images of" in said and "weak_valid.csv too; they flatter the checkpoint" in said


@pytest.mark.slow
def test_two_processes_count_together(tiny, tmp_path):
    """Both see the IoU of both, and the two networks are the same in both."""
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / SCRIPT, *SMALL]
    words += ["--data-root", tiny, "--run-dir", tmp_path, "--name", "two", "--epochs", "2", "--weak_csv"]
    words += [tiny / "weak.csv", *(f"--{name}_csv={tiny / name}.csv" for name in ("train", "valid", "test"))]
    how = {"capture_output": True, "text": True, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    done = subprocess.run([sys.executable, *map(str, words)], **how)
    assert done.returncode == 0, done.stderr[-2000:]
    (state,) = read_checkpoint(tmp_path / "two/last.pt")["evaluations"]
    # 12 of 13 images in two processes, in fours: two steps an epoch, of 8 and of 4 images of 16 x 16 pixels
    annotated = 2.0
    for images in (8, 4, 8, 4):
        annotated = 0.99 * annotated + images * 256
    assert state["counts"][2].sum().item() == pytest.approx(annotated)
    assert rows_of(tmp_path / "two")[-1]["split"] == "test"
