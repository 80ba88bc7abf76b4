"""Pixel contrast against the arrays of the original code, the paper's equations, and what must hold in any case."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from utils.methods.contrast import (
    MemoryBank,
    Sets,
    centres,
    contrast_sets,
    draw_anchors,
    draw_keys,
    info_nce,
    mean_of_present,
    released_one_hot,
    released_sets,
    unit,
)

GOLDEN = Path(__file__).parent / "golden"
SCENES = ["allclasses", "missing", "emptybank", "oneclass"]
THRESHOLD, LOW, HIGH, TAU = 0.3, 2, 5, 0.5


def golden(name):
    return {
        key: torch.from_numpy(array) for key, array in np.load(GOLDEN / f"u2pl_{name}.npz").items() if key[0] != "_"
    }


def sets_of(scene, rule):
    """The `Sets` of a scene: as the paper has it (`pap`, `papU`), or as the released code (`off`, `ship`)."""
    d, labelled = scene, len(scene["label_l"])
    label, prob = torch.cat([d["label_l"], d["label_u"]]), torch.cat([d["prob_l"], d["prob_u"]])
    how = (labelled, THRESHOLD, LOW, HIGH)
    low, high = d["low_mask"][labelled:, 0].bool(), d["high_mask"][labelled:, 0].bool()
    if rule.startswith("pap"):
        sets = contrast_sets(label, prob, low, high, *how)
        return sets if rule == "pap" else sets._replace(centre=sets.present)
    if rule == "ship":
        classes = torch.cat([released_one_hot(half, prob.shape[1]) for half in (d["label_l"], d["label_u"])])
    else:
        classes = label[:, None] == torch.arange(prob.shape[1])[:, None, None]
    return released_sets(classes, prob, low, high, *how)


def all_keys(members):
    return draw_keys(members, members.shape[1])


def bank_of(scene):
    bank = MemoryBank(scene["queue_sizes"].tolist(), 8, torch.float32)
    for c, old in enumerate(scene[f"bank_in_{c}"] for c in range(6)):
        keys, count = torch.zeros(6, max(len(old), 1), 8), torch.zeros(6, dtype=torch.int64)
        keys[c, : len(old)], count[c] = old, len(old)
        bank.push(keys, count)
    return bank


def rows_of(bank, c):
    """Rows of the bank of a class, the oldest first."""
    k = torch.arange(int(bank.filled[c]))
    return bank.start[c] + (bank.ahead[c] - bank.filled[c] + k) % bank.size[c]


def flat(x):
    return x.permute(0, 2, 3, 1).flatten(0, 2)


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("rule", ["pap", "papU", "off", "ship"])
def test_loss_gradient_and_banks_of_the_golden_arrays(scene, rule):
    d = golden(f"contra_{scene}")
    sets, bank = sets_of(d, rule), bank_of(d)
    student, teacher = d["rep_student"].requires_grad_(), flat(d["rep_teacher"])
    keys, count = all_keys(sets.negatives)
    assert count.tolist() == d[f"{rule}_new_keys"].tolist()
    bank.push(teacher[keys], count)
    for c in range(6):
        assert torch.allclose(bank.keys[rows_of(bank, c)], F.normalize(d[f"{rule}_bank_out_{c}"], dim=1), atol=1e-6)
    # the drawn places were recorded for every class that takes part, in turn
    drawn, rows = torch.zeros(6, 7, dtype=torch.int64), torch.zeros(6, 7, 5, dtype=torch.int64)
    present = sets.present.any(1)
    active = sets.anchors.any(1) & (bank.filled[sets.bank_of] > 0) & present[sets.bank_of]
    for k, c in enumerate(torch.nonzero(active)[:, 0].tolist()):
        if f"{rule}_anchor_idx_{k}" in d:
            drawn[c] = torch.nonzero(sets.anchors[c])[:, 0][d[f"{rule}_anchor_idx_{k}"]]
            rows[c] = rows_of(bank, int(sets.bank_of[c]))[d[f"{rule}_neg_idx_{k}"]].view(7, 5)
    anchors = unit(flat(student)[drawn])
    near = (anchors * unit(centres(teacher, sets.centre))[:, None]).sum(2)
    terms = info_nce(near, bank.cosines(anchors, sets.bank_of, rows), TAU)
    loss = mean_of_present(terms, sets, bank.filled)
    loss.backward()
    assert loss.item() == pytest.approx(d[f"{rule}_loss"].item(), abs=2e-6)
    assert torch.allclose(student.grad, d[f"{rule}_grad"], atol=1e-6)


@pytest.mark.parametrize("scene", SCENES)
def test_numbers_of_anchors_and_negatives_are_those_of_the_paper(scene):
    d = golden(f"contra_{scene}")
    sets = sets_of(d, "pap")
    labelled = 2 * 6 * 7
    negatives = sets.negatives[:, :labelled].sum(1), sets.negatives[:, labelled:].sum(1)
    found = torch.stack([sets.anchors.sum(1), sets.present.sum(1), *negatives], 1)
    assert found.tolist() == d["pap_stats"].tolist()


def test_one_hot_of_the_released_code():
    d = golden("onehot")
    assert torch.equal(released_one_hot(d["label"], 4), d["off"].bool())
    assert torch.equal(released_one_hot(d["label"][:1], 4), d["off_b1"].bool())


def test_bank_is_the_queue_of_the_original():
    d, bank = golden("queue"), MemoryBank([9], 3, torch.float32)
    for i in range(5):
        new = d[f"keys_{i}"]
        bank.push(F.pad(new, (0, 0, 0, 2))[None], torch.tensor([len(new)]))  # two rows that are not meant
        assert torch.allclose(bank.keys[rows_of(bank, 0)], F.normalize(d[f"queue_{i}"], dim=1), atol=1e-6)
        assert bank.keys[-1].eq(0).all()


@pytest.mark.parametrize(
    ("near", "far", "count", "loss"),
    [(1, 0, 2, 0.239545), (1, 1, 50, 3.931826), (1, -1, 50, 0.650126), (-1, 1, 50, 7.912389)],
)
def test_info_nce_by_hand(near, far, count, loss):
    found = info_nce(torch.full((1, 3), float(near)), torch.full((1, 3, count), float(far)), 0.5)
    assert found.item() == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("sizes", [[6, 6, 6], [6, 9, 6]])
@pytest.mark.parametrize("count", [1, 20])
def test_cosines_with_the_bank_however_they_are_taken(sizes, count):
    torch.manual_seed(0)
    bank, bank_of = MemoryBank(sizes, 4, torch.float32), torch.tensor([2, 0, 1])
    bank.push(torch.randn(3, 5, 4), torch.tensor([5, 5, 5]))
    anchors = torch.randn(3, 7, 4, requires_grad=True)
    rows = bank.sample(bank_of, (7, count))
    found = bank.cosines(unit(anchors), bank_of, rows)
    expected = F.cosine_similarity(bank.keys[rows], anchors[:, :, None], dim=3)
    assert torch.allclose(found, expected, atol=1e-6)
    grads = [torch.autograd.grad(x.square().sum(), anchors)[0] for x in (found, expected)]
    assert torch.allclose(*grads, atol=1e-5)


def scene(classes=6, seed=0, labelled=2):
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(0, classes, (4, 5, 7), generator=g)
    label[torch.rand(label.shape, generator=g) < 0.1] = 255
    prob = torch.randn(4, classes, 5, 7, generator=g).mul(2).softmax(1)
    reliable = torch.rand(4 - labelled, 5, 7, generator=g) < 0.6
    valid = label[labelled:] != 255
    return label, prob, reliable & valid, ~reliable & valid


def test_sets_obey_the_paper():
    label, prob, reliable, unreliable = scene()
    sets = contrast_sets(label, prob, reliable, unreliable, 2, 0.3, 2, 5)
    classes, flat_label, half = torch.arange(6)[:, None], label.flatten(), 2 * 5 * 7
    assert not (sets.negatives & (flat_label == classes))[:, :half].any()
    assert not (sets.negatives[:, half:] & ~unreliable.flatten()).any()
    assert not (sets.anchors[:, half:] & ~reliable.flatten()).any()
    assert sets.negatives[:, half:].sum() == unreliable.sum() * (5 - 2)
    rank = prob.argsort(1, descending=True).argsort(1)
    own = rank.gather(1, label.clamp(max=5)[:, None])[:, 0] < 2
    valid = label[:2] != 255
    assert sets.negatives[:, :half].sum() == (2 * valid - (own[:2] & valid).int()).sum()


def test_sets_follow_the_classes_and_the_images():
    """Other names for the classes, or another order of images: the same pixels."""
    label, prob, reliable, unreliable = scene()
    plain = contrast_sets(label, prob, reliable, unreliable, 2, 0.3, 2, 5)
    order = torch.tensor([3, 5, 0, 1, 4, 2])  # new class k was order[k]
    names = torch.full((256,), 255).index_copy(0, order, torch.arange(6))
    other = contrast_sets(names[label], prob[:, order], reliable, unreliable, 2, 0.3, 2, 5)
    swap = torch.tensor([1, 0, 3, 2])
    moved = contrast_sets(label[swap], prob[swap], reliable.flip(0), unreliable.flip(0), 2, 0.3, 2, 5)
    for a, b, c in zip(plain[:3], other[:3], moved[:3], strict=True):
        assert torch.equal(a[order], b)
        assert torch.equal(a.view(6, 4, 35)[:, swap].flatten(1), c)


def test_classes_without_anchors_or_bank_count_but_cost_nothing():
    yes, no = torch.ones(3, 1, dtype=torch.bool), torch.zeros(3, 1, dtype=torch.bool)
    sets = Sets(torch.tensor([[1], [0], [1]]).bool(), yes, no, torch.arange(3), yes)
    terms = torch.tensor([1.0, 10.0, 100.0])
    assert mean_of_present(terms, sets, torch.tensor([5, 5, 0])).item() == pytest.approx(1 / 3)
    alone = sets._replace(present=torch.tensor([[1], [0], [0]]).bool())
    assert mean_of_present(terms, alone, torch.tensor([5, 5, 5])).item() == 0


def test_nothing_to_contrast_is_a_loss_of_zero_with_a_gradient():
    none = torch.zeros(3, 8, dtype=torch.bool)
    sets, bank = Sets(none, none, none, torch.arange(3), none), MemoryBank([4] * 3, 2)
    student = torch.zeros(8, 2, requires_grad=True)
    keys, count = draw_keys(none, 5)
    bank.push(student.detach()[keys], count)
    anchors = unit(student[draw_anchors(none, 6)])
    near = (anchors * unit(centres(student.detach(), none))[:, None]).sum(2)
    rows = bank.sample(sets.bank_of, (6, 7))
    terms = info_nce(near, bank.cosines(anchors, sets.bank_of, rows), TAU)
    loss = mean_of_present(terms, sets, bank.filled)
    loss.backward()
    assert loss.item() == 0 and student.grad.eq(0).all() and not bank.filled.any()


def test_anchors_are_drawn_evenly_from_the_candidates():
    torch.manual_seed(0)
    candidates = torch.rand(3, 40) < 0.3
    drawn = draw_anchors(candidates, 6000)
    for c in range(3):
        counts = torch.bincount(drawn[c], minlength=40).float()
        assert counts[~candidates[c]].sum() == 0
        expected = 6000 / candidates[c].sum()
        assert (counts[candidates[c]] - expected).abs().max() < 5 * expected.sqrt()


@pytest.mark.parametrize("most", [3, 7, 100])
def test_keys_are_different_candidates_drawn_evenly(most):
    torch.manual_seed(1)
    candidates = torch.zeros(3, 30, dtype=torch.bool)
    candidates[0, 5:16], candidates[1, 2] = True, True
    times = torch.zeros(30)
    for _ in range(2000):
        keys, count = draw_keys(candidates, most)
        assert count.tolist() == [min(most, 11), 1, 0]
        chosen = keys[0, : count[0]]
        assert len(chosen.unique()) == len(chosen) and candidates[0, chosen].all() and keys[1, 0] == 2
        times[chosen] += 1
    expected = 2000 * min(most, 11) / 11
    assert (times[5:16] - expected).abs().max() < 5 * (expected**0.5)


def test_samples_come_from_the_filled_part_of_the_right_bank():
    torch.manual_seed(2)
    bank = MemoryBank([5, 9, 4], 1, torch.float32)
    bank.push(torch.ones(3, 3, 1), torch.tensor([3, 2, 0]))
    rows = bank.sample(torch.tensor([1, 0, 0]), (50, 20))
    assert set(rows[0].flatten().tolist()) == {5, 6} and set(rows[1].flatten().tolist()) == {0, 1, 2}


def test_gradient_reaches_drawn_anchors_only_and_is_orthogonal_to_them():
    torch.manual_seed(3)
    student = torch.randn(10, 4, requires_grad=True)
    candidates = torch.zeros(2, 10, dtype=torch.bool)
    candidates[0, :3], candidates[1, 4:6] = True, True
    bank, bank_of, drawn = MemoryBank([9, 9], 4), torch.arange(2), draw_anchors(candidates, 5)
    bank.push(torch.randn(2, 9, 4), torch.tensor([9, 9]))
    anchors = unit(student[drawn])
    near = (anchors * unit(torch.randn(2, 4))[:, None]).sum(2)
    info_nce(near, bank.cosines(anchors, bank_of, bank.sample(bank_of, (5, 6))), TAU).sum().backward()
    outside = torch.ones(10, dtype=torch.bool).index_fill(0, drawn.flatten(), False)
    assert student.grad[outside].eq(0).all() and student.grad[~outside].abs().sum(1).gt(0).all()
    assert torch.allclose((student.grad * student.detach()).sum(1), torch.zeros(10), atol=1e-6)
