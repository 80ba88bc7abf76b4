"""Which examples two networks learn from: the released selections, values by hand, and what always holds."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from utils.losses import per_image_loss, per_pixel_loss
from utils.methods.robust_losses import CrossEntropy
from utils.methods.selection import (
    Window,
    cleanness,
    differing_examples,
    disagreement,
    dropped_share,
    examples,
    fall_back,
    flat,
    forget_rate,
    keep_cleanest,
    keep_count,
    plus,
    selected_loss,
    selection_stats,
)
from utils.metrics import sample_scores
from utils.scores import pair_scores

GOLDEN = Path(__file__).parent / "golden"
TRIALS = [f"B{size}_{trial}" for size in (1, 2, 3, 4, 8, 16) for trial in range(4)]
WITH_LOGITS = ["B3_2", "B4_2"]  # the loss needs them; both have different selections for the two networks


@pytest.fixture(scope="module")
def released():
    data = dict(np.load(GOLDEN / "nlkd_selection.npz"))
    packed = [k for k in data if k.endswith(("_hard", "_masks"))]
    return data | {k: np.unpackbits(data[k], axis=-1, count=48)[:, 0] for k in packed}


def masks_of(released, trial):
    """Hard masks of the released code's `teacher` and `student` network, and the annotations."""
    return [torch.from_numpy(released[f"{trial}_{k}"]) for k in ("teacher_hard", "student_hard", "masks")]


def chosen(keep):
    return keep.nonzero().flatten().tolist()


def listed(released, name):
    """The indices of a released selection, without the padding; an empty one was replaced by image 0."""
    indices = sorted(i for i in released[name].tolist() if i >= 0)
    return indices or [0]


def scores(*values):
    return torch.tensor(values, dtype=torch.float)


def bools(*values):
    return torch.tensor(values, dtype=torch.bool)


@pytest.mark.parametrize("trial", TRIALS)
def test_released_iou(released, trial):
    teacher, student, mask = masks_of(released, trial)
    pairs = {"teacher_label": (teacher, mask), "student_label": (student, mask), "teacher_student": (teacher, student)}
    for name, (a, b) in pairs.items():
        expected = released[f"{trial}_iou_{name}"]
        assert [pair_scores(x, y)["iou"] for x, y in zip(a.numpy(), b.numpy(), strict=True)] == expected.tolist()
        assert sample_scores(a, b)["iou"].tolist() == expected.astype(np.float32).tolist()


@pytest.mark.parametrize("trial", TRIALS)
def test_released_selections(released, trial):
    teacher, student, mask = masks_of(released, trial)
    ranked = {"student": sample_scores(teacher, mask)["iou"], "teacher": sample_scores(student, mask)["iou"]}
    differ = disagreement(teacher, student, "iou", 0.95)
    assert chosen(fall_back(differ, "first")) == listed(released, f"{trial}_decoupling")
    differ = disagreement(teacher, student, "iou", 0.9)
    for learner, score in ranked.items():
        kept = keep_cleanest(score, 0.5, "nlkd")
        assert chosen(fall_back(kept, "first")) == listed(released, f"{trial}_coteaching_for_{learner}")
        kept = plus(score, differ, 0.6, "intersect", "nlkd")
        assert chosen(fall_back(kept, "first")) == listed(released, f"{trial}_plus_for_{learner}")


def test_released_selections_hold_empty_ones_and_different_ones(released):
    empty = [t for t in TRIALS if released[f"{t}_plus_for_student"][0] < 0]
    assert 0 < len(empty) < len(TRIALS)
    for t in WITH_LOGITS:
        assert listed(released, f"{t}_coteaching_for_student") != listed(released, f"{t}_coteaching_for_teacher")


@pytest.mark.parametrize("trial", WITH_LOGITS)
def test_released_loss(released, trial):
    teacher, _, mask = masks_of(released, trial)
    logits = torch.from_numpy(released[f"{trial}_student_logits"])
    keep = keep_cleanest(sample_scores(teacher, mask)["iou"], 0.5, "nlkd")
    loss = selected_loss(examples(logits, mask, "image", CrossEntropy()), keep, len(keep))
    assert loss.item() == pytest.approx(float(released[f"{trial}_loss_student_coteaching"]), rel=1e-6)


def test_forget_rate_by_hand():
    assert [forget_rate(e, 20, 0.4, 4) for e in (0, 1, 2, 3, 4, 5, 19)] == pytest.approx([0, 0.1, 0.2, 0.3] + 3 * [0.4])
    assert [forget_rate(e, 20, 0.4, 10, 2.0) for e in (0, 1, 3, 4)] == pytest.approx([0, 0.04, 0.36, 0.4])
    assert [forget_rate(e, 20, 0.4, 10, 0.5) for e in (0, 1, 4, 16)] == pytest.approx([0, 0.04, 0.08, 0.16])
    assert [forget_rate(e, 20, 0.4, 0) for e in (0, 7)] == [0.4, 0.4]
    assert {forget_rate(e, 20, 0.4, 10, schedule="constant") for e in range(20)} == {0.4}


def test_forget_rate_to_twice_the_rate_by_hand():
    found = [forget_rate(e, 9, 0.2, 4, schedule="linear_then_2tau") for e in range(9)]
    assert found == pytest.approx([0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4])
    assert forget_rate(8, 9, 0.7, 4, schedule="linear_then_2tau") == 1  # never more than everything


@pytest.mark.parametrize(
    ("rule", "rate", "expected"),
    [
        ("round", 0.0, [0, 1, 2, 3, 4, 5, 10]),
        ("round", 0.5, [0, 1, 1, 2, 2, 3, 5]),
        ("round", 0.3, [0, 1, 1, 2, 3, 4, 7]),
        ("round", 0.6, [0, 1, 1, 1, 2, 2, 4]),
        ("round", 1.0, [0, 1, 1, 1, 1, 1, 1]),
        ("nlkd", 0.0, [0, 1, 2, 3, 4, 5, 10]),
        ("nlkd", 0.5, [0, 1, 1, 2, 2, 3, 5]),
        ("nlkd", 0.3, [0, 1, 2, 3, 3, 4, 7]),
        ("nlkd", 0.6, [0, 1, 1, 2, 2, 2, 4]),
        ("nlkd", 1.0, [0, 0, 0, 0, 0, 0, 0]),
    ],
)
def test_keep_count_by_hand(rule, rate, expected):
    sizes = [0, 1, 2, 3, 4, 5, 10]
    assert [int(keep_count(n, rate, rule)) for n in sizes] == expected
    assert [int(keep_count(torch.tensor(n), rate, rule)) for n in sizes] == expected


def test_keep_count_at_16_and_of_millions():
    assert (int(keep_count(16, 0.5, "nlkd")), int(keep_count(16, 0.6, "nlkd"))) == (8, 7)
    assert int(keep_count(100_000_001, 0.2)) == 80_000_001
    assert int(keep_count(100_000_001, 0.2, "nlkd")) == 80_000_001


@pytest.mark.parametrize("rule", ["round", "nlkd"])
@pytest.mark.parametrize("seed", range(8))
def test_keeps_exactly_the_best(seed, rule):
    rng = np.random.default_rng(seed)
    for n in (1, 2, 3, 5, 8, 33):
        score = torch.from_numpy(rng.integers(0, max(2, n // 2), n).astype(np.float32))  # with ties
        among = torch.from_numpy(rng.random(n) < 0.6)
        rate = float(rng.choice([0, 0.1, 0.3, 0.5, 0.6, 0.99]))
        for given in (None, among):
            keep = keep_cleanest(score, rate, rule, given)
            part = torch.ones(n, dtype=torch.bool) if given is None else given
            assert keep.dtype == torch.bool and keep.shape == score.shape
            assert keep.sum() == keep_count(part.sum(), rate, rule)
            assert not (keep & ~part).any()
            dropped = part & ~keep
            if keep.any() and dropped.any():
                assert score[keep].min() >= score[dropped].max()


def test_rate_0_keeps_everything():
    for rule in ("round", "nlkd"):
        assert keep_cleanest(scores(3, -1, 2), 0.0, rule).all()
        assert chosen(keep_cleanest(scores(3, -1, 2), 0.0, rule, bools(1, 0, 1))) == [0, 2]


def test_of_equal_scores_the_later_stays():
    assert chosen(keep_cleanest(scores(1, 1, 1, 1), 0.5)) == [2, 3]
    assert chosen(keep_cleanest(scores(1, 2, 1, 0), 0.5)) == [1, 2]
    assert chosen(keep_cleanest(scores(1, 1, 1, 1), 0.5, among=bools(1, 1, 1, 0))) == [1, 2]
    assert chosen(keep_cleanest(scores(*[1.0] * 100), 0.9)) == list(range(90, 100))


def test_nested_ranks_inside_the_disagreeing():
    score, differ = scores(0.9, 0.8, 0.3, 0.1), bools(0, 0, 1, 1)
    assert chosen(plus(score, differ, 0.5)) == [2]
    assert chosen(plus(score, differ, 0.5, "intersect")) == []
    differ = bools(1, 0, 1, 1)
    assert chosen(plus(score, differ, 0.5)) == [0, 2]
    assert chosen(plus(score, differ, 0.5, "intersect")) == [0]
    assert chosen(plus(score, differ, 0.0, "intersect")) == chosen(plus(score, differ, 0.0)) == [0, 2, 3]
    for order in ("nested", "intersect"):
        assert chosen(plus(score, bools(0, 0, 0, 0), 0.5, order)) == []


def test_recent_scores_are_ranked_along():
    score = scores(5, 6)
    assert chosen(keep_cleanest(score, 0.5)) == [1]
    assert chosen(keep_cleanest(score, 0.5, recent=scores(1, 2, 3, 4))) == [0, 1]
    assert chosen(keep_cleanest(score, 0.5, recent=scores(7, 8, 9, 10))) == []
    assert chosen(keep_cleanest(score, 0.5, recent=scores(1, 8))) == [1]
    assert chosen(keep_cleanest(score, 0.5, recent=scores(5, 6))) == [1]  # of equal scores the later
    assert chosen(keep_cleanest(score, 0.5, recent=scores())) == [1]
    assert chosen(plus(score, bools(1, 0), 0.6, recent=scores(1, 9))) == []
    assert chosen(plus(score, bools(1, 0), 0.5, recent=scores(1, 2))) == [0]
    assert chosen(plus(score, bools(1, 0), 0.5, "intersect", recent=scores(1, 2))) == [0]
    assert chosen(plus(score, bools(1, 0), 0.5, "intersect", recent=scores(1, 9))) == []


def test_the_window_holds_the_batches_before():
    window = Window(3)
    assert window.recent(0) is None and window.recent(1) is None
    for i in range(4):
        window.add(scores(i, i), scores(-i))
    assert window.recent(0).tolist() == [2, 2, 3, 3] and window.recent(1).tolist() == [-2, -3]
    alone = Window(1)
    alone.add(scores(1), scores(1))
    assert alone.recent(0) is None


def test_a_window_lets_small_batches_keep_the_rate():
    rng = np.random.default_rng(0)
    kept = {1: 0, 16: 0}
    for batches in kept:
        window = Window(batches)
        for _ in range(400):
            score = torch.from_numpy(rng.random(2).astype(np.float32))
            kept[batches] += int(keep_cleanest(score, 0.2, recent=window.recent(0)).sum())
            window.add(score, score)
    assert kept[1] == 800  # round(0.8 * 2) = 2: nothing is ever dropped
    assert kept[16] / 800 == pytest.approx(0.8, abs=0.04)


def test_fall_back_by_hand():
    nothing, some = bools(0, 0, 0), bools(0, 1, 0)
    assert [chosen(fall_back(nothing, how)) for how in ("skip", "all", "first")] == [[], [0, 1, 2], [0]]
    assert [chosen(fall_back(some, how)) for how in ("skip", "all", "first")] == [[1]] * 3
    assert not nothing.any()


def test_disagreement_of_images_and_pixels():
    a, b = torch.zeros(2, 3, 4, 6, dtype=torch.uint8)
    a[:, :, :3] = 1
    b[0, :, :3], b[1, :, :4], b[2, :, 5] = 1, 1, 1
    assert disagreement(a, b, "iou", 0.75).tolist() == [False, False, True]  # 12 / 16 is not below 0.75
    assert disagreement(a, b, "iou", 0.76).tolist() == [False, True, True]
    assert disagreement(a, b, "bf", 0.95).tolist() == [False, False, True]  # the edges are 0, 1 and 3 pixels apart
    assert disagreement(a, b, "bf", 0.95, theta=3).tolist() == [False, False, True]
    assert disagreement(a, b, "bf", 0.95, theta=1).tolist() == [False, True, True]
    assert disagreement(a, b, "pixel", 0.5).sum((1, 2)).tolist() == [0, 4, 16]


def test_pixel_examples_leave_the_ignored_out():
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(2, 3, 4, 5, generator=generator) for _ in range(2)]
    mask = torch.randint(0, 3, (2, 4, 5), generator=generator, dtype=torch.uint8)
    mask[0, 1:3], mask[1, :, 2] = 255, 255
    known = mask != 255
    loss = examples(logits[0], mask, "pixel", CrossEntropy())
    assert loss.shape == (2 * 20 - 10 - 4,) and torch.equal(loss, per_pixel_loss(logits[0], mask)[known])
    args = SimpleNamespace(unit="pixel", below=0.9, disagree="iou", theta0=3, theta=5)
    differ = differing_examples(*logits, mask, args)
    assert torch.equal(differ, (logits[0].argmax(1) != logits[1].argmax(1))[known]) and 0 < differ.sum() < len(differ)
    keep = plus(-loss, differ, 0.5)
    assert keep.sum() == keep_count(differ.sum(), 0.5)
    assert loss[keep].max() <= loss[differ & ~keep].min()


def test_binary_pixels_all_count():
    logits, mask = torch.randn(2, 1, 3, 4), torch.ones(2, 3, 4, dtype=torch.uint8)
    assert torch.equal(examples(logits, mask, "pixel", CrossEntropy()), per_pixel_loss(logits, mask).flatten())
    assert flat(mask, mask, 1).shape == (24,)
    assert torch.equal(examples(logits, mask, "image", CrossEntropy()), per_image_loss(logits, mask))


def test_differing_images_by_the_flags():
    masks = torch.zeros(2, 2, 1, 6, 8)
    masks[0, :, :, :, :4], masks[1, 0, :, :, :4], masks[1, 1, :, :, :5] = 1, 1, 1
    args = SimpleNamespace(unit="image", below=0.9, disagree="iou", theta0=3, theta=5)
    logits, nothing = masks * 2 - 1, torch.zeros(2, 6, 8, dtype=torch.uint8)
    assert differing_examples(*logits, nothing, args).tolist() == [False, True]
    args.disagree = "bf"
    assert differing_examples(*logits, nothing, args).tolist() == [False, False]


def test_cleanness_is_higher_for_the_cleaner():
    mask = torch.zeros(2, 12, 12, dtype=torch.uint8)
    mask[:, 6:10, 6:10] = 1
    logits = (4.0 * mask - 2).unsqueeze(1)
    logits[1, 0, 0] = 3  # a false row
    logits.requires_grad_()
    loss = per_image_loss(logits, mask)
    for score in ("loss", "iou", "bf", "bm", "miou"):
        found = cleanness(logits, loss, mask, score)
        assert found[0] > found[1] and not found.requires_grad and found.dtype == torch.float32
    assert torch.equal(cleanness(logits, loss, mask, "loss"), -loss)
    assert cleanness(logits, loss, mask, "iou").tolist() == pytest.approx([1, 16 / 28])


def test_only_the_selected_learn():
    loss = torch.tensor([1.0, 2.0, 4.0, 8.0], requires_grad=True)
    total = selected_loss(loss, bools(1, 0, 1, 0), 4)
    total.backward()
    assert total.item() == 1.25 and loss.grad.tolist() == [0.25, 0, 0.25, 0]
    assert selected_loss(loss, bools(1, 0, 1, 0), torch.tensor(2)).item() == 2.5


def test_selection_stats_by_hand():
    keep, noisy = bools(1, 1, 1, 0, 0, 1), torch.tensor([0, 1, -1, 0, 1, 0])
    found = {k: (float(part.sum()), float(whole.sum())) for k, (part, whole) in selection_stats(keep, noisy).items()}
    assert found == {"kept": (4, 6), "purity": (2, 3), "recall": (2, 3)}
    unknown = selection_stats(keep, torch.full((6,), -1))
    assert all(whole.sum() == 0 for _, whole in (unknown["purity"], unknown["recall"]))
    assert set(selection_stats(keep, noisy[:2])) == {"kept"}  # pixels have no noise level


def test_dropped_share_of_a_list():
    known, unknown = pd.DataFrame({"iterations": [0, 7, 8, 0, 9]}), pd.DataFrame({"img": ["a"]})
    assert dropped_share(0.35, known) == 0.35 and dropped_share(0.0, known) == 0
    assert dropped_share(-1, known) == pytest.approx(0.6)
    assert dropped_share(-1, known[1:2]) == 0.9  # a list of nothing but noise still leaves something
    assert dropped_share(-1, unknown) == 0.2


def test_window_remembers_only_the_part_that_is_ranked():
    window = Window(2)
    window.add(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0]), among=torch.tensor([True, False, True]))
    assert window.recent(0).tolist() == [1.0, 3.0] and window.recent(1).tolist() == [4.0, 6.0]
    assert Window(1).recent(0) is None
