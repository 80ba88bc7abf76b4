"""Boundary F1: the golden arrays, a definition with loops over pixels, and values by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from utils.boundary import match_classes, soft_boundary_f
from utils.methods.weighting import student_quality
from utils.metrics import pixel_counts, sample_scores
from utils.scores import boundary_f, count_boundary, pair_scores

GOLDEN = Path(__file__).parent / "golden"
SIZES = [(1, 1), (1, 9), (9, 1), (2, 2), (7, 12), (13, 6), (11, 11)]
BOXES = [(3, 5), (3, 3), (3, 1), (5, 9), (3, 7), (7, 3)]


def golden(name, *masks, size=96):
    """The arrays of a file; the named ones hold a bit a pixel and come back as uint8 {0, 1}."""
    arrays = dict(np.load(GOLDEN / f"nlkd_{name}.npz"))
    return arrays | {k: np.unpackbits(arrays[k], axis=-1, count=size) for k in masks}


def edges_by_loops(mask, theta0, void):
    """Pixels of the mask with an annotated pixel outside it within (theta0 - 1) / 2 steps of a king."""
    height, width = mask.shape
    reach, found = theta0 // 2, []
    for y, x in np.argwhere(mask & ~void):
        near = [
            (v, u)
            for v in range(max(0, y - reach), min(height, y + reach + 1))
            for u in range(max(0, x - reach), min(width, x + reach + 1))
        ]
        if any(not mask[p] and not void[p] for p in near):
            found.append((int(y), int(x)))
    return found


def counts_by_loops(pred, mask, theta0, theta, void=None):
    """(pred, mask, pred_hit, mask_hit) from lists of pixels and Chebyshev distances.

    Boundary pixels with void in place of a match within the tolerance are on neither list.
    """
    void = np.zeros(mask.shape, bool) if void is None else void
    a, b = (edges_by_loops(m.astype(bool), theta0, void) for m in (pred, mask))

    def near(of, other):
        return [any(max(abs(y - v), abs(x - u)) <= (theta - 1) / 2 for v, u in other) for y, x in of]

    hits, hidden = (near(a, b), near(b, a)), [near(one, np.argwhere(void).tolist()) for one in (a, b)]
    judged = [sum(h or not v for h, v in zip(*both, strict=True)) for both in zip(hits, hidden, strict=True)]
    return *judged, *map(sum, hits)


def f_by_definition(pred, mask, theta0, theta):
    a, b, a_hit, b_hit = counts_by_loops(pred, mask, theta0, theta)
    if a == 0 and b == 0:
        return float(np.array_equal(pred, mask))
    if a_hit == 0 or b_hit == 0:
        return 0.0
    precision, recall = a_hit / a, b_hit / b
    return 2 * precision * recall / (precision + recall)


def random_pairs(shape, seeds=range(3)):
    """Sparse, dense and blocky masks, single pixels, masks along the frame, empty and full ones."""
    for seed in seeds:
        rng = np.random.default_rng([seed, *shape])
        blocky = np.kron(rng.random((-(-shape[0] // 4), -(-shape[1] // 4))) < 0.5, np.ones((4, 4)))
        kinds = [
            rng.random(shape) < 0.1,
            rng.random(shape) < 0.9,
            blocky[: shape[0], : shape[1]] > 0,
            np.arange(shape[0])[:, None] + np.zeros(shape) < rng.integers(0, shape[0] + 1),
            np.arange(shape[1]) + np.zeros(shape) >= rng.integers(0, shape[1] + 1),
            np.zeros(shape, bool),
            np.ones(shape, bool),
        ]
        kinds = [np.ascontiguousarray(k, np.uint8) for k in kinds]
        order = rng.integers(0, len(kinds), 14)
        yield from ((kinds[i], kinds[j]) for i, j in zip(order, np.roll(order, 1), strict=True))


def on_device(pred, mask, theta0, theta, void=None):
    """The batch path for one pair, as ints: as one class, and as the second of two, which must be the same."""
    pred, mask = (torch.from_numpy(m)[None].byte() for m in (pred, mask))
    of_two = mask if void is None else mask.masked_fill(torch.from_numpy(void), 255)
    counts = tuple(int(c[1]) for c in pixel_counts(pred, of_two, 2, theta0, theta).boundary)
    if void is None:
        assert counts == tuple(int(c) for c in pixel_counts(pred, mask, 1, theta0, theta).boundary)
    return counts


def edges(mask, void=None):
    """Where the boundary of a (H, W) mask is drawn, as [row, column] pairs."""
    mask = torch.from_numpy(mask)[None]
    if void is not None:
        mask = mask.masked_fill(torch.from_numpy(void), 255)
    label, known, edge = (x[1, 0] for x in match_classes(mask, mask, 2))
    return ((edge > 0) & (known > 0) & (label == 1)).nonzero().tolist()


def box(mask, width, join):
    """Shifts of an (H, W) bool map within a box, joined one after the other; what lies outside does not count."""
    found, reach = mask.clone(), width // 2
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            if abs(dy) < mask.shape[0] and abs(dx) < mask.shape[1]:
                to = found[max(0, -dy) : mask.shape[0] - max(0, dy), max(0, -dx) : mask.shape[1] - max(0, dx)]
                of = mask[max(0, dy) : mask.shape[0] + min(0, dy), max(0, dx) : mask.shape[1] + min(0, dx)]
                join(to, of, out=to)
    return found


def counts_class_by_class(pred, mask, classes, theta0, theta):
    """(inter, pred, mask, edges of either, hits of either) of every class of one pair, each class a mask of its own."""
    void = mask == 255
    for c in range(classes):
        a, b = (m.eq(c) & ~void for m in (pred, mask))
        edge_a, edge_b = (m & ~box(m | void, theta0, torch.logical_and) for m in (a, b))
        near_a, near_b, near_void = (box(e, theta, torch.logical_or) for e in (edge_a, edge_b, void))
        hit_a, hit_b = edge_a & near_b, edge_b & near_a
        judged_a, judged_b = hit_a | (edge_a & ~near_void), hit_b | (edge_b & ~near_void)
        yield [int(m.sum()) for m in (a & b, a, b, judged_a, judged_b, hit_a, hit_b)]


def random_labels(classes, shape, seed, n=3):
    """Blocks and single pixels of any class, half of the annotation as predicted, some of it void."""
    rng = np.random.default_rng([seed, classes, *shape])

    def draw():
        coarse = rng.integers(0, classes, (n, -(-shape[0] // 4), -(-shape[1] // 4)))
        blocks = np.kron(coarse, np.ones((4, 4), np.int64))[:, : shape[0], : shape[1]]
        return np.where(rng.random(blocks.shape) < 0.1, rng.integers(0, classes, blocks.shape), blocks)

    pred = draw()
    mask = np.where(rng.random(pred.shape) < 0.5, pred, draw())
    # a teacher's mask may hold 255 as well: it is no class, and beside one it makes a boundary
    pred[rng.random(pred.shape) < 0.05], mask[rng.random(pred.shape) < 0.15] = 255, 255
    return torch.from_numpy(pred.astype(np.uint8)), torch.from_numpy(mask.astype(np.uint8))


def f_of(pred, mask, theta0=3, theta=5):
    return float(boundary_f(count_boundary(pred, mask, theta0, theta), np.array_equal(pred, mask)))


def half_plane(column, shape=(20, 24)):
    return np.ascontiguousarray(np.arange(shape[1]) + np.zeros(shape) < column, np.uint8)


@pytest.mark.parametrize("boxes", [(3, 5), (3, 3), (3, 7), (5, 9)])
def test_released_scores(boxes):
    data = golden("masks", "gt", "pred")
    expected = data["bf_{}_{}".format(*boxes)].astype(float)
    alike = np.isin(data["names"], ["empty_empty", "full_full"])
    assert len(expected) == 39 and alike.sum() == 2
    expected[alike] = 1  # released: 0
    one_by_one = [pair_scores(p, g, 1, *boxes)["bf"] for p, g in zip(data["pred"], data["gt"], strict=True)]
    batch = sample_scores(*(torch.from_numpy(data[k]) for k in ("pred", "gt")), 1, *boxes)["bf"]
    np.testing.assert_allclose(one_by_one, expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(batch.numpy(), expected, rtol=0, atol=1e-6)


def test_released_precision_recall_and_pixels():
    data = golden("masks", "gt", "pred")
    for i, (pred, mask) in enumerate(zip(data["pred"], data["gt"], strict=True)):
        for counts in (count_boundary(pred, mask), on_device(pred, mask, 3, 5)):
            of_pred, of_mask, pred_hit, mask_hit = counts
            assert of_pred == data["bf_3_5_pred_boundary_px"][i]
            assert of_mask == data["bf_3_5_gt_boundary_px"][i]
            assert pred_hit / max(1, of_pred) == pytest.approx(data["bf_3_5_precision"][i], abs=1e-6)
            assert mask_hit / max(1, of_mask) == pytest.approx(data["bf_3_5_recall"][i], abs=1e-6)


def test_released_scores_at_321_pixels():
    data = golden("masks321", "clean", "teacher", "noisy", size=321)
    for kind in ("clean", "noisy"):
        one_by_one = [pair_scores(p, g)["bf"] for p, g in zip(data["teacher"], data[kind], strict=True)]
        batch = sample_scores(*(torch.from_numpy(data[k]) for k in ("teacher", kind)))["bf"]
        np.testing.assert_allclose(one_by_one, data[f"bf_{kind}"], rtol=0, atol=1e-6)
        np.testing.assert_allclose(batch, data[f"bf_{kind}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("boxes", BOXES)
@pytest.mark.parametrize("shape", SIZES)
def test_both_paths_follow_the_definition(shape, boxes):
    for pred, mask in random_pairs(shape):
        expected = counts_by_loops(pred, mask, *boxes)
        assert tuple(count_boundary(pred, mask, *boxes)) == expected
        assert on_device(pred, mask, *boxes) == expected
        score = f_by_definition(pred, mask, *boxes)
        assert pair_scores(pred, mask, 1, *boxes)["bf"] == pytest.approx(score, abs=1e-9)
        batch = sample_scores(torch.from_numpy(pred)[None], torch.from_numpy(mask)[None], 1, *boxes)
        assert float(batch["bf"]) == pytest.approx(score, abs=1e-6)


@pytest.mark.parametrize("boxes", [*BOXES, (1, 1), (3, 31)])
@pytest.mark.parametrize("classes", [2, 3, 9, 21, 150, 255])
def test_all_classes_at_once_follow_each_alone(classes, boxes):
    for seed, shape in enumerate([(1, 1), (1, 9), (9, 2), (14, 13)]):
        pred, mask = random_labels(classes, shape, seed)
        counts = pixel_counts(pred, mask, classes, *boxes)
        found = torch.stack([*counts[:3], *counts.boundary])
        for i in range(len(pred)):
            assert found[:, :, i].T.tolist() == list(counts_class_by_class(pred[i], mask[i], classes, *boxes))


@pytest.mark.parametrize("width", [1990, 1998, 1999, 2041, 4090])
def test_wide_masks_are_counted_whole(width):
    masks = torch.ones(2, 5, width, dtype=torch.uint8)
    masks[1, :, ::2] = 0
    for classes in (1, 2):
        counts = pixel_counts(masks, masks, classes)
        assert [c[-1].tolist() for c in counts[:3]] == [[5 * width, 5 * -(-width // 2) - 5 * (width % 2)]] * 3
        assert [c[-1].tolist() for c in counts.boundary] == [[0, 5 * (width // 2)]] * 4


@pytest.mark.parametrize("classes", [1, 2, 30])
def test_an_image_counts_the_same_in_any_batch(classes):
    rng = np.random.default_rng(classes)
    masks = torch.from_numpy(rng.integers(0, max(2, classes), (2, 7, 160, 170), dtype=np.uint8))
    every = [pixel_counts(*pair, classes) for pair in (masks, *masks.split(1, dim=1))]
    whole, *alone = (torch.stack([*counts[:3], *counts.boundary]) for counts in every)
    assert torch.equal(whole, torch.cat(alone, 2)) and (whole.sum((1, 2)) > 0).all()


class NeverWait(TorchDispatchMode):
    """Refuses what makes the host wait for a device: a number, indices or a shape that depend on values."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "index.Tensor", "bincount", "masked_select", "unique", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not func.name().removeprefix("aten::").startswith(self.FORBIDDEN), func.name()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("classes", [1, 2, 21, 150])
def test_scores_never_wait_for_the_device(classes):
    pred, mask = random_labels(max(2, classes), (20, 24), 0)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NeverWait():
        bool(mask.any())
    with NeverWait():
        sample_scores(pred, mask, classes)
        assert len(student_quality(pred, mask, "bf", classes)) == 3


def test_both_paths_agree_on_larger_masks():
    rng = np.random.default_rng(0)
    for shape in [(65, 129), (160, 40)]:
        coarse = (rng.random((6, 20, 20)) < 0.5).astype(np.uint8)
        big = np.stack([np.kron(m, np.ones((9, 9), np.uint8))[: shape[0], : shape[1]] for m in coarse])
        pred, mask = big[:3], big[3:]
        batch = pixel_counts(torch.from_numpy(pred), torch.from_numpy(mask)).boundary
        alone = [count_boundary(p, m) for p, m in zip(pred, mask, strict=True)]
        assert [tuple(c[0].tolist()) for c in batch] == list(zip(*alone, strict=True))


@pytest.mark.parametrize(("shift", "score"), [(0, 1), (1, 1), (2, 1), (3, 0), (4, 0), (7, 0)])
def test_half_plane_by_hand(shift, score):
    for turn in (lambda m: m, lambda m: np.ascontiguousarray(m.T), lambda m: np.ascontiguousarray(m[:, ::-1])):
        assert f_of(turn(half_plane(9)), turn(half_plane(9 + shift))) == score


def test_the_frame_is_no_boundary():
    assert count_boundary(half_plane(9), half_plane(9)) == (20, 20, 20, 20)
    corner = np.zeros((8, 8), np.uint8)
    corner[:3, :3] = 1
    assert edges(corner) == [[0, 2], [1, 2], [2, 0], [2, 1], [2, 2]]


def test_empty_and_full_masks():
    empty, full, some = half_plane(0), half_plane(24), half_plane(9)
    expected = {"ee": 1, "ff": 1, "ss": 1, "ef": 0, "es": 0, "fs": 0}
    masks = {"e": empty, "f": full, "s": some}
    for (a, b), score in expected.items():
        for pred, mask in ((masks[a], masks[b]), (masks[b], masks[a])):
            assert pair_scores(pred, mask)["bf"] == score
            assert sample_scores(torch.from_numpy(pred)[None], torch.from_numpy(mask)[None])["bf"].tolist() == [score]


def test_symmetric():
    for pred, mask in random_pairs((13, 17)):
        one, other = count_boundary(pred, mask), count_boundary(mask, pred)
        assert (one.pred, one.pred_hit) == (other.mask, other.mask_hit)
        assert f_of(pred, mask) == f_of(mask, pred)


def test_inputs_stay_as_they_are():
    pred, mask = half_plane(9), half_plane(12)
    for boxes in BOXES:
        count_boundary(pred, mask, *boxes)
        for classes in (1, 2, 150):
            pixel_counts(torch.from_numpy(pred)[None], torch.from_numpy(mask)[None], classes, *boxes)
    assert np.array_equal(pred, half_plane(9)) and np.array_equal(mask, half_plane(12))


def test_void_pixels_make_no_boundary():
    mask = half_plane(9)
    void = np.zeros(mask.shape, bool)
    void[:, 9] = True
    assert len(edges(mask)) == 20
    assert edges(mask, void) == []  # everything beside the mask is unknown
    void[:5, 9] = False  # now rows 0 to 5 of column 8 touch an annotated pixel outside
    assert edges(mask, void) == [[y, 8] for y in range(6)]
    void[2, 8] = True
    assert edges(mask, void) == [[y, 8] for y in range(6) if y != 2]


def test_a_boundary_beside_void_is_no_error():
    """A line of void at column 9 hides the contour; predicted 2 pixels off it, the same; 3 off, it counts as wrong."""
    mask = half_plane(9)
    void = np.zeros(mask.shape, bool)
    void[:, 9] = True
    for column, counts in ((9, (0, 0, 0, 0)), (11, (0, 0, 0, 0)), (13, (20, 0, 0, 0)), (5, (20, 0, 0, 0))):
        assert on_device(half_plane(column), mask, 3, 5, void) == counts, column
    many = np.where(void, 255, mask).astype(np.uint8)
    scores = pair_scores(half_plane(11), many, 2)  # no contour is left to judge: the IoUs 9 / 10 and 13 / 14 stand in
    assert scores["bf"] == pytest.approx((9 / 10 + 13 / 14) / 2) and scores["bf"] == scores["miou"]
    assert pair_scores(half_plane(9), many, 2)["bf"] == 1


@pytest.mark.parametrize("boxes", [(3, 5), (5, 3)])
def test_void_by_definition(boxes):
    for shape in [(7, 12), (1, 9), (10, 10)]:
        for i, (pred, mask) in enumerate(random_pairs(shape)):
            void = np.random.default_rng(i).random(shape) < 0.3
            pred, mask = pred * ~void, mask * ~void
            assert on_device(pred, mask, *boxes, void) == counts_by_loops(pred, mask, *boxes, void)


def test_soft_score_and_gradient_of_probabilities():
    data = golden("bf_soft", "gt")
    prob = torch.sigmoid(torch.from_numpy(data["logits"])).requires_grad_()
    score = soft_boundary_f(prob, torch.from_numpy(data["gt"]).float())
    np.testing.assert_allclose(score.detach(), data["bf_of_prob"][:, 0], rtol=0, atol=1e-6)
    score.sum().backward()
    assert np.abs(data["grad_bf_prob"]).max() > 1e-4
    np.testing.assert_allclose(prob.grad, data["grad_bf_prob"], rtol=1e-4, atol=1e-8)


def test_soft_score_and_gradient_of_raw_logits():
    data = golden("bf_soft", "gt")
    logits, gt = torch.from_numpy(data["logits"]).requires_grad_(), torch.from_numpy(data["gt"]).float()
    score = soft_boundary_f(logits, gt)
    np.testing.assert_allclose(score.detach(), data["bf_of_logits"][:, 0], rtol=0, atol=1e-6)
    score.sum().backward()
    np.testing.assert_allclose(logits.grad, data["grad_bf_logits"], rtol=1e-4, atol=1e-8)


def test_soft_score_of_hard_masks_is_the_hard_score():
    data = golden("bf_soft", "gt")
    gt, pred = torch.from_numpy(data["gt"]), torch.from_numpy(data["logits"] > 0)
    np.testing.assert_allclose(sample_scores(pred[:, 0], gt[:, 0])["bf"], data["bf_of_hard"][:, 0], rtol=0, atol=1e-6)
    soft = soft_boundary_f(pred.float(), gt.float())
    np.testing.assert_allclose(soft, data["bf_of_hard"][:, 0], rtol=0, atol=1e-6)
