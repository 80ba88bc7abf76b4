"""Scores of masks against the golden arrays, scikit-learn and loops; `evaluate` on the golden logits."""

import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, f1_score, jaccard_score
from torch.utils.data import DataLoader, Dataset

from utils.batches import Batches
from utils.evaluate import evaluate, evaluate_all, named
from utils.metrics import pixel_counts, sample_scores, split_iou
from utils.scores import pair_scores, ratio
from utils.steps import Steps

GOLDEN = Path(__file__).parent / "golden"
NAMES = {"iou", "miou", "dice", "bf", "bm"}


def golden(name, *masks, size=96):
    arrays = dict(np.load(GOLDEN / f"nlkd_{name}.npz"))
    return arrays | {k: np.unpackbits(arrays[k], axis=-1, count=size) for k in masks}


def both_paths(pred, mask, classes=1):
    """{name: values} of stacks of masks, one pair at a time in NumPy, and as a batch."""
    alone = [pair_scores(p, m, classes) for p, m in zip(pred, mask, strict=True)]
    batch = sample_scores(torch.from_numpy(pred), torch.from_numpy(mask), classes)
    assert set(batch) == NAMES and all(set(one) == NAMES for one in alone)
    return {k: [one[k] for one in alone] for k in NAMES}, {k: v.numpy() for k, v in batch.items()}


def random_masks(seed, n=6, shape=(9, 14)):
    rng = np.random.default_rng(seed)
    share = rng.random((n, 1, 1))
    return tuple((rng.random((n, *shape)) < share).astype(np.uint8) for _ in range(2))


def random_classes(seed, classes=4, n=5, shape=(8, 11)):
    """Blocky predictions and annotations, which often lack a class, and a third of the annotation ignored."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, classes, (2, n, 4, 4)).astype(np.uint8)
    pred, mask = (np.kron(c, np.ones((3, 3), np.uint8))[:, : shape[0], : shape[1]].copy() for c in coarse)
    mask[rng.random(mask.shape) < 0.3] = 255
    return pred, mask


def class_scores_by_definition(pred, mask, classes, reach=1, tolerance=2):
    """Means over the classes present in either mask, by sets of annotated pixels."""
    known, void = ({tuple(p) for p in np.argwhere(m).tolist()} for m in (mask != 255, mask == 255))
    found = {"iou": [], "dice": [], "bf": []}

    def steps(p, q):
        return max(abs(p[0] - q[0]), abs(p[1] - q[1]))

    for c in range(classes):
        a, b = ({p for p in known if m[p] == c} for m in (pred, mask))
        if not a | b:
            continue
        found["iou"].append(len(a & b) / len(a | b))
        found["dice"].append(2 * len(a & b) / (len(a) + len(b)))
        edge_a, edge_b = ([p for p in s if any(steps(p, q) <= reach for q in known - s)] for s in (a, b))
        judged = []
        for one, two in ((edge_a, edge_b), (edge_b, edge_a)):  # what is near void and not found is on no list
            hit = [any(steps(p, q) <= tolerance for q in two) for p in one]
            hidden = [any(steps(p, q) <= tolerance for q in void) for p in one]
            judged.append([h for h, v in zip(hit, hidden, strict=True) if h or not v])
        if not any(judged):
            found["bf"].append(found["iou"][-1])
            continue
        hit_a, hit_b = (sum(hits) / max(1, len(hits)) for hits in judged)
        found["bf"].append(2 * hit_a * hit_b / (hit_a + hit_b) if hit_a + hit_b else 0.0)
    means = {k: float(np.mean(v)) if v else 1.0 for k, v in found.items()}
    return means | {"miou": means["iou"], "bm": (means["bf"] + means["iou"]) / 2}


def test_released_masks():
    data = golden("masks", "gt", "pred")
    foreground, background = (np.nan_to_num(data[k], nan=1.0) for k in ("fg_iou", "bg_iou"))  # 0/0: both empty
    for found in both_paths(data["pred"], data["gt"]):
        np.testing.assert_allclose(found["iou"], foreground, rtol=0, atol=1e-6)
        np.testing.assert_allclose(found["miou"], (foreground + background) / 2, rtol=0, atol=1e-6)
        # the released smoothing of 1e-4 weighs most on the smallest masks
        np.testing.assert_allclose(found["dice"], data["dice_orig"], rtol=0, atol=1e-4)
        np.testing.assert_allclose(found["bm"], (np.array(found["bf"]) + found["miou"]) / 2, rtol=0, atol=1e-6)


def test_the_released_iou_is_that_of_the_background():
    data = golden("masks", "gt", "pred")
    flipped = both_paths(1 - data["pred"], 1 - data["gt"])[0]
    np.testing.assert_allclose(flipped["iou"], np.nan_to_num(data["jaccard_orig_255"], nan=1.0), rtol=0, atol=1e-6)
    straight = both_paths(data["pred"], data["gt"])[0]
    assert np.abs(np.subtract(straight["iou"], flipped["iou"])).max() > 0.5


@pytest.mark.parametrize("seed", range(4))
def test_binary_scores_follow_scikit_learn(seed):
    pred, mask = random_masks(seed)
    for found in both_paths(pred, mask):
        for i, (p, m) in enumerate(zip(pred.reshape(len(pred), -1), mask.reshape(len(mask), -1), strict=True)):
            foreground, background = (jaccard_score(m, p, pos_label=c, zero_division=1) for c in (1, 0))
            assert found["iou"][i] == pytest.approx(foreground, abs=1e-6)
            assert found["miou"][i] == pytest.approx((foreground + background) / 2, abs=1e-6)
            assert found["dice"][i] == pytest.approx(f1_score(m, p, zero_division=1), abs=1e-6)


def test_empty_and_full_masks():
    empty, full = np.zeros((2, 1, 5, 4), np.uint8)
    full = full + np.uint8(1)
    for pred, mask, expected in [
        (empty, empty, {"iou": 1, "miou": 1, "dice": 1, "bf": 1, "bm": 1}),
        (full, full, {"iou": 1, "miou": 1, "dice": 1, "bf": 1, "bm": 1}),
        (empty, full, {"iou": 0, "miou": 0, "dice": 0, "bf": 0, "bm": 0}),
        (full, empty, {"iou": 0, "miou": 0, "dice": 0, "bf": 0, "bm": 0}),
    ]:
        for found in both_paths(pred, mask):
            assert {k: v[0] for k, v in found.items()} == expected


def test_an_empty_annotation_with_a_small_prediction():
    pred, mask = np.zeros((2, 1, 5, 4), np.uint8)
    pred[0, 2, 2] = 1
    for found in both_paths(pred, mask):
        assert {k: float(found[k][0]) for k in ("iou", "dice", "bf")} == {"iou": 0, "dice": 0, "bf": 0}
        assert found["miou"][0] == pytest.approx(19 / 40) and found["bm"][0] == pytest.approx(19 / 80)


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_class_means_by_definition(classes):
    for seed in range(3):
        pred, mask = random_classes(seed, classes)
        pred[0], mask[0] = 0, np.where(mask[0] == 255, 255, 0)  # one class in both, the others absent
        mask[1] = 255  # nothing annotated
        pred[2], mask[2] = pred[2] % 2, np.where(mask[2] == 255, 255, mask[2] % 2)  # at most two classes, badly
        for found in both_paths(pred, mask, classes):
            for i in range(len(pred)):
                expected = class_scores_by_definition(pred[i], mask[i], classes)
                assert {k: found[k][i] for k in NAMES} == pytest.approx(expected, abs=1e-6)


def test_ignored_pixels_change_nothing():
    pred, mask = random_classes(7)
    other = np.where(mask == 255, (pred + 1) % 4, pred).astype(np.uint8)
    assert (other != pred).any()
    for a, b in zip(both_paths(pred, mask, 4), both_paths(other, mask, 4), strict=True):
        assert all(np.array_equal(a[k], b[k]) for k in NAMES)


def test_masks_split_by_void_are_not_the_same_for_their_size():
    mask = np.repeat(np.array([[[0, 0, 255, 1, 1]]], np.uint8), 4, axis=1)
    pred = np.repeat(np.array([[[1, 1, 0, 0, 0]]], np.uint8), 4, axis=1)
    for found in both_paths(pred, mask, 2):  # neither has a boundary, since the void lies between the regions
        assert {k: float(found[k][0]) for k in NAMES} == dict.fromkeys(NAMES, 0.0)


def test_ratio_of_nothing_is_one():
    assert (ratio(0, 0), ratio(0, 4), ratio(1, 4)) == (1, 0, 0.25)
    assert ratio(torch.tensor([0, 0, 3]), torch.tensor([0, 5, 4])).tolist() == [1, 0, 0.75]
    assert ratio(np.array([0, 1]), np.array([0, 2])).tolist() == [1, 0.5]


def split_counts(pred, mask, classes):
    """(inter, pred, mask) of every class over a stack of labels; of both classes of binary masks."""
    counts = pixel_counts(torch.from_numpy(pred), torch.from_numpy(mask), max(2, classes))
    return [c.sum(1) for c in counts[:3]]


@pytest.mark.parametrize("classes", [1, 2, 4])
def test_pixel_counts_follow_scikit_learn(classes):
    pred, mask = random_masks(3) if classes == 1 else random_classes(3, classes)
    known, labels = mask != 255, range(max(2, classes))
    expected = confusion_matrix(mask[known], pred[known], labels=labels)
    found = [c.tolist() for c in split_counts(pred, mask, classes)]
    assert found == [expected.diagonal().tolist(), expected.sum(0).tolist(), expected.sum(1).tolist()]
    if classes == 1:
        binary = pixel_counts(torch.from_numpy(pred), torch.from_numpy(mask))
        assert [int(c.sum()) for c in binary[:3]] == [c[1] for c in found] and binary.pixels == mask[0].size
    nothing = split_counts(pred, np.full(pred.shape, 255, np.uint8), classes)
    assert not torch.stack(nothing).any()


@pytest.mark.parametrize("classes", [1, 3, 4])
def test_split_iou_follows_scikit_learn(classes):
    pred, mask = random_masks(5) if classes == 1 else random_classes(5, classes)
    known = mask != 255
    found = split_iou(*split_counts(pred, mask, classes))
    each = jaccard_score(mask[known], pred[known], average=None)
    assert found["miou"] == pytest.approx(each.mean(), abs=1e-12)
    assert found["iou"] == pytest.approx(each[1] if classes == 1 else each.mean(), abs=1e-12)


def test_split_iou_leaves_absent_classes_out():
    inter, pred, mask = torch.tensor([[6, 4, 0], [6, 6, 0], [8, 4, 0]])
    each = (6 / 8 + 4 / 6) / 2
    assert split_iou(inter, pred, mask) == pytest.approx({"iou": each, "miou": each})
    assert split_iou(inter[:2], pred[:2], mask[:2]) == pytest.approx({"iou": 4 / 6, "miou": each})
    full, nothing = torch.tensor([9, 0]), torch.zeros(3, dtype=torch.int64)
    assert split_iou(full, full, full) == {"iou": 1.0, "miou": 1.0}
    assert split_iou(torch.tensor([7, 0]), torch.tensor([7, 2]), full) == pytest.approx({"iou": 0.0, "miou": 7 / 18})
    assert split_iou(nothing, nothing, nothing) == {"iou": 1.0, "miou": 1.0}


class Golden(Dataset):
    """An image is its own number; `Answer` looks its logits up."""

    def __init__(self, masks):
        self.masks = torch.from_numpy(masks)

    def __len__(self):
        return len(self.masks)

    def __getitem__(self, i):
        return {"image": torch.full((1, 1, 1), float(i)), "mask": self.masks[i], "index": i}


class Answer(torch.nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits, self.seen = logits, []

    def forward(self, image):
        assert not self.training and image.shape[1:] == (1, 1, 1)
        numbers = image.flatten().long()
        self.seen += numbers.tolist()
        return self.logits[numbers]


class OneProcess(Steps):
    """What `evaluate` needs of a run."""

    def __init__(self, **given):
        flags = {"classes": 1, "theta0": 3, "theta": 5, "compat": "none", "epochs": 1, "precision": "fp32"}
        super().__init__(SimpleNamespace(**flags | {"save_minutes": 0} | given), torch.device("cpu"))

    def sum(self, tensor):
        return tensor

    def share_buffers(self, net):
        pass


def loader_of(masks, batch_size, rank=0, world=1):
    data = Golden(masks)
    return DataLoader(data, batch_sampler=Batches(len(data), batch_size, rank, world))


@pytest.fixture(scope="module")
def eval_data():
    data = golden("eval", "gt_hard")
    data["logits"], data["gt_hard"] = torch.from_numpy(data["logits"]).float(), data["gt_hard"][:, 0]
    return data


def test_evaluate_gives_the_released_dice_and_bf(eval_data):
    found = evaluate(OneProcess(), Answer(eval_data["logits"]), loader_of(eval_data["gt_hard"], 4))
    dice, _, bf = eval_data["orig_dice_miou_bf_hard"]
    assert found["dice"] == pytest.approx(dice, abs=1e-5)
    assert found["bf"] == pytest.approx(bf, abs=1e-5)
    assert found["iou"] == pytest.approx(eval_data["fg_iou_dataset"], abs=1e-9)
    both = (eval_data["fg_iou_dataset"] + eval_data["bg_iou_dataset"]) / 2
    assert found["miou"] == pytest.approx(both, abs=1e-9)
    assert found["score"] == pytest.approx((found["iou"] + found["dice"] + found["bf"]) / 3, abs=1e-12)
    assert set(found) == {"iou", "miou", "dice", "bf", "score"}


def test_evaluate_gives_the_released_miou_with_compat(eval_data):
    run = OneProcess(compat="nlkd")
    found = evaluate(run, Answer(eval_data["logits"]), loader_of(eval_data["gt_hard"], 4))
    assert found["compat_miou"] == pytest.approx(eval_data["orig_dice_miou_bf_hard"][1], abs=1e-6)
    assert found["compat_miou"] > found["miou"] + 0.005


@pytest.mark.parametrize("batch_size", [1, 4, 5, 7, 12, 40])
def test_evaluate_counts_every_image_once_in_any_batches(eval_data, batch_size):
    whole = evaluate(OneProcess(), Answer(eval_data["logits"]), loader_of(eval_data["gt_hard"], 12))
    net = Answer(eval_data["logits"])
    found = evaluate(OneProcess(), net, loader_of(eval_data["gt_hard"], batch_size))
    assert net.seen == list(range(12))
    assert found == pytest.approx(whole, abs=1e-6)


def test_evaluate_is_the_mean_of_the_images(eval_data):
    found = evaluate(OneProcess(), Answer(eval_data["logits"]), loader_of(eval_data["gt_hard"], 5))
    pred = (eval_data["logits"][:, 0] > 0).byte().numpy()
    each = [pair_scores(p, m) for p, m in zip(pred, eval_data["gt_hard"], strict=True)]
    np.testing.assert_allclose([one["iou"] for one in each], eval_data["fg_iou_per_image"], atol=1e-9)
    for name in ("dice", "bf"):
        assert found[name] == pytest.approx(np.mean([one[name] for one in each]), abs=1e-6)


def test_evaluate_refuses_a_loader_that_drops_images(eval_data):
    loader = loader_of(eval_data["gt_hard"], 5)
    batches = [b for b in loader if len(b["mask"]) == 5]
    run = OneProcess()
    run.batches = lambda _: ({**b, "image": b["image"].permute(0, 3, 1, 2)} for b in batches)
    with pytest.raises(AssertionError, match=r"10\.0 images evaluated of 12"):
        evaluate(run, Answer(eval_data["logits"]), loader)


def test_evaluate_in_two_processes_equals_one(eval_data):
    masks = eval_data["gt_hard"][:11]  # 6 images for one, 5 for the other
    expected = evaluate(OneProcess(), Answer(eval_data["logits"]), loader_of(masks, 4))
    barrier, parts, results = threading.Barrier(2, timeout=30), {}, {}

    def work(rank):
        run = OneProcess()

        def add(tensor):
            parts[rank] = tensor
            barrier.wait()
            total = parts[0] + parts[1]
            barrier.wait()
            return total

        run.sum = add
        results[rank] = evaluate(run, Answer(eval_data["logits"]), loader_of(masks, 4, rank, 2))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert results[0] == results[1] == pytest.approx(expected, abs=1e-6)


def test_evaluate_many_classes():
    pred, mask = random_classes(11, classes=3, n=7)
    logits = torch.nn.functional.one_hot(torch.from_numpy(pred).long(), 3).permute(0, 3, 1, 2).float()
    found = evaluate(OneProcess(classes=3), Answer(logits), loader_of(mask, 3))
    known = mask != 255
    miou = jaccard_score(mask[known], pred[known], average="macro")
    each = [class_scores_by_definition(p, m, 3) for p, m in zip(pred, mask, strict=True)]
    assert found["iou"] == found["miou"] == pytest.approx(miou, abs=1e-9)
    for name in ("dice", "bf"):
        assert found[name] == pytest.approx(np.mean([one[name] for one in each]), abs=1e-6)


def test_evaluate_all_reads_the_list_once_for_several_networks(eval_data):
    nets = [Answer(eval_data["logits"]), Answer(-eval_data["logits"])]
    run, passes = OneProcess(compat="nlkd"), []
    read, loader = run.batches, loader_of(eval_data["gt_hard"], 5)
    run.batches = lambda loader: passes.append(1) or read(loader)
    both = evaluate_all(run, nets, loader)
    assert len(passes) == 1 and [net.seen for net in nets] == [list(range(12))] * 2
    assert both == [evaluate(run, net, loader) for net in nets] and both[0]["iou"] > both[1]["iou"]


def test_named_prefixes():
    assert named("valid", {"iou": 0.5, "bf": 1.0}) == {"valid_iou": 0.5, "valid_bf": 1.0}
