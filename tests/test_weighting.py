"""Sample weights: the mixing schedule, the released losses and gradients, and what a list may hold."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from utils.errors import InputError
from utils.lists import read_list
from utils.losses import hard, per_image_loss
from utils.methods.weighting import (
    effective_size,
    mix_weights,
    mixing,
    released_student_quality,
    student_quality,
    weighted_mean,
)
from utils.scores import pair_scores

GOLDEN = Path(__file__).parent / "golden"


def weighted_loss(loss, weight, *how):
    return weighted_mean(weight * loss, weight, *how)


@pytest.fixture(scope="module")
def kd():
    data = dict(np.load(GOLDEN / "nlkd_kd.npz"))
    data["masks"] = np.unpackbits(data["masks"], axis=-1, count=32)
    return data


def inputs(kd):
    """(logits with gradient, masks, teacher weights) of the golden batch of four."""
    logits = torch.from_numpy(kd["logits"]).clone().requires_grad_()
    return logits, torch.from_numpy(kd["masks"])[:, 0], torch.from_numpy(kd["teacher_weight"])


def draw(seed=0, n=5, classes=1, shape=(6, 7)):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, *shape, generator=generator).requires_grad_()
    mask = torch.randint(0, max(2, classes), (n, *shape), generator=generator, dtype=torch.uint8)
    return logits, mask, torch.rand(n, generator=generator)


@pytest.mark.parametrize("epochs", [10, 11, 12, 20, 50, 100])
def test_released_mixing(kd, epochs):
    assert len(kd[f"T_{epochs}"]) == epochs
    found = [mixing(epoch, epochs) for epoch in range(epochs)]
    np.testing.assert_allclose(found, kd[f"T_{epochs}"], rtol=1e-14, atol=0)


@pytest.mark.parametrize("epochs", [1, 5, 9, 10])
def test_mixing_is_0_without_room_for_a_ramp(epochs):
    assert {mixing(epoch, epochs) for epoch in range(epochs)} == {0.0}


def test_mixing_by_hand():
    assert [mixing(epoch, 11) for epoch in (9, 10)] == [0, 0.05]
    assert [mixing(epoch, 12) for epoch in (9, 10, 11)] == [0, 0.05, 0.5]
    assert mixing(11, 100) == pytest.approx(0.05 + 0.45 / 89) and mixing(99, 100) == 0.5
    assert [mixing(epoch, 5, warmup=2, start=0.2, end=1.0) for epoch in range(5)] == pytest.approx([0, 0, 0.2, 0.6, 1])
    assert [mixing(epoch, 1, warmup=0) for epoch in range(1)] == [0.05]
    assert [mixing(epoch, 3, warmup=0, start=0.0, end=1.0) for epoch in range(3)] == [0, 0.5, 1]


@pytest.mark.parametrize("warmup", [0, 1, 3, 10, 50])
@pytest.mark.parametrize("epochs", [1, 2, 5, 9, 10, 11, 12, 51, 100])
def test_mixing_grows_and_never_passes_the_end(epochs, warmup):
    shares = np.array([mixing(step / 4, epochs, warmup) for step in range(4 * epochs)])
    steps = np.arange(4 * epochs) / 4
    assert ((shares == 0) == ((steps < warmup) | (epochs <= warmup))).all()
    assert (np.diff(shares) >= 0).all() and shares.max() <= 0.5
    if epochs > warmup + 1:
        assert mixing(epochs - 1, epochs, warmup) == pytest.approx(0.5)


def test_released_loss_per_sample(kd):
    logits, mask, _ = inputs(kd)
    np.testing.assert_allclose(per_image_loss(logits, mask).detach(), kd["bce_per_sample"], rtol=1e-6)


def test_student_quality_is_that_of_hard_masks(kd):
    logits, mask, _ = inputs(kd)
    found = student_quality(hard(logits), mask, "bf")
    # Sample 3 has an empty annotation. The student sees something in it, so it scores 0 here as in the released code.
    assert not mask[3].any() and hard(logits)[3].any()
    np.testing.assert_allclose(found, kd["student_weight_hard"][:, 0], rtol=0, atol=1e-6)
    # Only where the student sees nothing either do the two part: we give 1, the released code 0.
    nothing = torch.zeros_like(mask)
    assert student_quality(nothing, mask, "bf").tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize(("name", "epoch"), [("loss_ep0", 0), ("loss_ep9", 9), ("loss_teacher_weight_only", 0)])
def test_released_loss_before_the_student_has_a_say(kd, name, epoch):
    logits, mask, teacher = inputs(kd)
    weight = mix_weights(teacher, None, mixing(epoch, 100))
    loss = weighted_loss(per_image_loss(logits, mask), weight)
    assert loss.item() == pytest.approx(float(kd[name]), rel=2e-7)
    loss.backward()
    np.testing.assert_allclose(logits.grad, kd["grad_ep9_orig"], rtol=1e-5, atol=1e-10)
    assert not logits.grad[1].any()  # the teacher gives this image 0


def test_loss_and_gradient_with_a_hard_student(kd):
    logits, mask, teacher = inputs(kd)
    student = student_quality(hard(logits), mask, "bf")
    loss = weighted_loss(per_image_loss(logits, mask), mix_weights(teacher, student, mixing(55, 100)))
    loss.backward()
    assert loss.item() == pytest.approx(float(kd["loss_ep55_hard_student"]), rel=1e-6)
    np.testing.assert_allclose(logits.grad, kd["grad_ep55_hard_student"], rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("epoch", [10, 55, 99])
def test_released_loss_and_gradient_with_compat(kd, epoch):
    logits, mask, teacher = inputs(kd)
    student = released_student_quality(logits, mask)
    np.testing.assert_allclose(student.detach(), kd["student_weight_orig"][:, 0], rtol=1e-6, atol=1e-7)
    loss = weighted_loss(per_image_loss(logits, mask), mix_weights(teacher, student, mixing(epoch, 100)))
    loss.backward()
    assert loss.item() == pytest.approx(float(kd[f"loss_ep{epoch}"]), rel=1e-6)
    np.testing.assert_allclose(logits.grad, kd[f"grad_ep{epoch}_orig"], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("quality", ["miou", "bf", "bm", "iou", "dice"])
def test_gradient_is_the_weight_times_the_sample_gradient(quality, classes):
    logits, mask, teacher = draw(classes=classes)
    student = student_quality(hard(logits), mask, quality, classes)
    weight = mix_weights(teacher, student, 0.3)
    weighted_loss(per_image_loss(logits, mask), weight).backward()
    for i in range(len(mask)):
        alone = logits[i : i + 1].detach().clone().requires_grad_()
        target = mask[i : i + 1]
        if classes == 1:
            F.binary_cross_entropy_with_logits(alone[:, 0], target.float()).backward()
        else:
            F.cross_entropy(alone, target.long()).backward()
        expected = (0.3 * student[i] + 0.7 * teacher[i]) * alone.grad[0] / len(mask)
        torch.testing.assert_close(logits.grad[i], expected, rtol=1e-5, atol=1e-9)


def test_no_gradient_through_the_student():
    logits, mask, _ = draw()
    for given in (hard(logits), logits[:, 0].gt(0).float()):
        assert not student_quality(given, mask, "bf").requires_grad
    soft = logits[:, 0].sigmoid()
    assert soft.requires_grad and not student_quality(soft, mask, "bm").requires_grad
    assert released_student_quality(logits, mask).requires_grad  # the fault that compat keeps


@pytest.mark.parametrize("quality", ["miou", "bf", "bm", "iou", "dice"])
def test_student_quality_is_the_score_of_the_weight_lists(quality):
    pred, mask = torch.zeros(2, 3, 20, 24, dtype=torch.uint8)
    mask[:, :, :9] = 1
    for i, width in enumerate((8, 13, 9)):
        pred[i, :, :width] = 1
    found = student_quality(pred, mask, quality)
    expected = [pair_scores(p, m)[quality] for p, m in zip(pred.numpy(), mask.numpy(), strict=True)]
    assert found.dtype == torch.float32 and found.tolist() == pytest.approx(expected, abs=1e-6)
    assert found[1] < 0.85 and found[2] == 1


def test_weights_by_hand():
    teacher, student = torch.tensor([0.0, 0.5, 1.0]), torch.tensor([1.0, 0.25, 0.0])
    assert mix_weights(teacher, student, 0.25).tolist() == [0.25, 0.4375, 0.75]
    assert mix_weights(teacher, student, 0.0).tolist() == teacher.tolist()
    assert mix_weights(teacher, None, 0.0).tolist() == teacher.tolist()
    assert mix_weights(teacher, student, 1.0).tolist() == student.tolist()
    assert mix_weights(teacher, student, 0.25, floor=0.4).tolist() == pytest.approx([0.4, 0.4375, 0.75])
    assert mix_weights(teacher, None, 0.0, floor=0.1).tolist() == pytest.approx([0.1, 0.5, 1.0])


def test_normalising_by_the_weights():
    loss, weight = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([0.5, 0.0, 0.25])
    assert weighted_loss(loss, weight).item() == pytest.approx(1.75 / 3)
    assert weighted_loss(loss, weight, "weight").item() == pytest.approx(1.75 / 0.75)
    assert weighted_loss(loss, weight / 10, "weight").item() == pytest.approx(1.75 / 0.75)
    # the mean over several processes replaces the batch's own, and is of no use to "batch"
    mean = torch.tensor(0.5)
    assert weighted_loss(loss, weight, "weight", mean).item() == pytest.approx(1.75 / 3 / 0.5)
    assert weighted_loss(loss, weight, "batch", mean).item() == pytest.approx(1.75 / 3)
    assert weighted_loss(loss, torch.zeros(3), "weight").item() == 0


def test_normalising_gives_no_gradient_to_the_weights():
    loss = torch.tensor([1.0, 3.0])
    weight = torch.tensor([0.5, 0.25], requires_grad=True)
    weighted_loss(loss, weight, "weight").backward()
    assert weight.grad.tolist() == pytest.approx([1 / 2 / 0.375, 3 / 2 / 0.375])


def test_effective_size_by_hand():
    def size(weights):
        return effective_size(sum(weights) / len(weights), sum(w * w for w in weights) / len(weights), len(weights))

    assert size([0.3] * 7) == pytest.approx(7)
    assert size([1, 1, 0, 0]) == pytest.approx(2)
    assert size([1.0, 0.5]) == pytest.approx(1.5**2 / 1.25)
    assert size([0, 0, 0.2]) == pytest.approx(1) and size([0, 0]) == 0


@pytest.mark.parametrize("weight", ["1.2", "-0.1", "nan", "", "good", "inf", "1.0000001"])
def test_a_bad_weight_is_named_by_its_line(tmp_path, weight):
    path = tmp_path / "list.csv"
    path.write_text(f"img,filename,weight\na.png,m/a.png,0\nb.png,m/b.png,1\nc.png,m/c.png,{weight}\nd.png,m/d.png,1\n")
    with pytest.raises(InputError, match=r"list\.csv: 1 bad row: line 4: weight .*between 0 and 1"):
        read_list(path)


def test_every_bad_weight_is_named(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text("img,filename,weight\na.png,m/a.png,2\nb.png,m/b.png,0.5\nc.png,m/c.png,-1\n")
    with pytest.raises(InputError, match=r"2 bad rows: line 2: weight 2; line 4: weight -1"):
        read_list(path)


def test_good_weights_are_read(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text("img,filename,weight\na.png,m/a.png,0\nb.png,m/b.png,1\nc.png,m/c.png,1e-3\n")
    frame = read_list(path, ("img", "filename", "weight"))
    assert frame["weight"].tolist() == [0, 1, 0.001] and frame["line"].tolist() == [2, 3, 4]
    assert not any(math.isnan(w) for w in frame["weight"])
