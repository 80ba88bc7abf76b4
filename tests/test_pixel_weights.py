"""Weights of pixels: their formula, the lists that carry the teacher's support, and training with them."""

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from test_scripts import SMALL, launch, rows_of

from utils import predict_mask
from utils.args import TrainArgs, WeightArgs, parse
from utils.errors import InputError
from utils.images import read_image, read_mask
from utils.label_quality import trust
from utils.lists import read_list
from utils.losses import per_image_loss
from utils.methods.weighting import contour_trust, given_probability, mean_of_pixels, pixel_weights, weigh_pixels
from utils.predict_mask import support_of
from utils.support import ANY, SupportedDataset

TEACHER = "train_with_Teacher_weight.py"
KD = "train_with_KDweight.py"


def test_weight_is_the_exponential_of_the_mixed_cross_entropies():
    generator = torch.Generator().manual_seed(0)
    support = torch.randint(1, 256, (2, 5, 6), generator=generator, dtype=torch.uint8)
    student = torch.rand(2, 5, 6, generator=generator)
    mask = torch.zeros(2, 5, 6, dtype=torch.uint8)
    by_definition = torch.exp(-(0.3 * -student.log() + 0.7 * -(support / 255).log()))
    assert torch.allclose(pixel_weights(support, student, 0.3, mask, guard=0), by_definition, atol=1e-6)
    assert torch.allclose(pixel_weights(support, None, 0.0, mask, guard=0), support / 255)
    assert pixel_weights(support * 0, None, 0.0, mask, guard=0, floor=0.1).eq(0.1).all()


def test_trust_grows_away_from_the_contour_as_a_distance_transform_says():
    rng = np.random.default_rng(3)
    labels = cv2.resize(rng.integers(0, 3, (5, 6), np.uint8), (36, 30), interpolation=cv2.INTER_NEAREST)
    for guard in (0.5, 1.0, 2.0):
        away = np.full(labels.shape, np.inf)
        for label in range(3):
            inside = np.pad((labels == label).astype(np.uint8), 1, constant_values=1)  # the frame is no contour
            distance = cv2.distanceTransform(inside, cv2.DIST_C, 3)[1:-1, 1:-1]
            away = np.where(labels == label, distance - 0.5, away)
        expected = 1 - np.exp(-away / guard)
        found = contour_trust(torch.from_numpy(labels)[None], guard)[0].numpy()
        assert np.abs(found - expected).max() < 0.011
    assert contour_trust(torch.ones(1, 8, 8, dtype=torch.uint8), 1.0).eq(1).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (2, 3), (17, 33)])
def test_trust_is_that_of_the_nearest_pixel_beside_a_contour(shape):
    for seed, labels in enumerate((2, 5, 256)):
        mask = np.random.default_rng(seed).integers(0, labels, (3, *shape), np.uint8)
        mask[:, shape[0] // 2 :, shape[1] // 3 :] = 255  # room for distances
        expected = [[[_nearest(m, y, x) for x in range(shape[1])] for y in range(shape[0])] for m in mask]
        for guard in (0.05, 0.3, 1.0):
            value = 1 - np.exp(-(np.array(expected) + 0.5) / guard)
            value[np.exp(-(np.array(expected) + 0.5) / guard) <= 0.01] = 1
            found = contour_trust(torch.from_numpy(mask), guard)
            assert found.dtype == torch.float32
            assert np.abs(found.numpy() - value).max() < 1e-6


def _nearest(mask, y, x):
    """How far the pixel (y, x) is from one that has another label beside it."""
    height, width = mask.shape
    far = np.inf
    for v in range(height):
        for u in range(width):
            around = mask[max(0, v - 1) : v + 2, max(0, u - 1) : u + 2]
            if (around != mask[v, u]).any():
                far = min(far, max(abs(v - y), abs(u - x)))
    return far


def test_no_weight_exceeds_the_trust_of_its_place():
    mask = torch.zeros(1, 20, 20, dtype=torch.uint8)
    mask[:, :, 10:] = 1
    sure = torch.full((1, 20, 20), 255, dtype=torch.uint8)
    weight = pixel_weights(sure, None, 0.0, mask, guard=1.0)[0, 0]
    assert weight[9].item() == pytest.approx(1 - np.exp(-0.5)) == weight[10].item()
    assert weight[8].item() == pytest.approx(1 - np.exp(-1.5))
    assert weight[0] == 1


def test_bad_masks_count_by_their_sure_pixels_and_good_ones_whole():
    """By hand: support 0.95, 0.85 and 0.2; trust 0.1 and 1. The student turns the second pixel, not the third."""
    support = torch.tensor([[[242, 217, 51]]] * 2, dtype=torch.uint8)
    mask, faith = torch.zeros(2, 1, 3, dtype=torch.uint8), torch.tensor([0.1, 1.0])
    found = pixel_weights(support, None, 0.0, mask, guard=0, trust=faith)
    assert torch.allclose(found, torch.tensor([[[1, 0.1, 0.1]], [[1.0, 1, 1]]]))
    student = torch.tensor([[[0.99, 0.99, 0.99]]] * 2)
    found = pixel_weights(support, student, 0.5, mask, guard=0, trust=faith)
    assert torch.allclose(found[0], torch.tensor([[1.0, 1, 0.1]]))
    mask[:, :, 1:] = 1
    found = pixel_weights(support, None, 0.0, mask, guard=1.0, trust=faith)[0, 0]
    assert found[0].item() == pytest.approx(1 - np.exp(-0.5)) and found[2].item() == pytest.approx(0.1)
    assert pixel_weights(support, None, 0.0, mask, 0, 0.3, faith)[0].min() == pytest.approx(0.3)


def test_trust_tells_two_groups_apart_and_never_falls():
    rng = np.random.default_rng(0)
    good, bad = rng.normal(0.5, 0.1, 60).clip(0, 1), rng.normal(0.08, 0.04, 90).clip(0, 1)
    scores = np.concatenate([bad, good])
    found = trust(scores)
    assert np.median(found[90:]) > 0.95 and np.median(found[:90]) < 0.05
    assert ((found >= 0) & (found <= 1)).all() and (np.diff(found[np.argsort(scores)]) >= 0).all()
    alike = rng.normal(0.5, 0.05, 150)
    assert np.array_equal(trust(alike), alike)


def test_probability_of_the_given_label_of_one_class_and_of_many():
    logits = torch.tensor([[[[2.0, -1.0]]]])
    mask = torch.tensor([[[1, 1]]], dtype=torch.uint8)
    assert torch.allclose(given_probability(logits, mask), torch.sigmoid(torch.tensor([[[2.0, -1.0]]])))
    assert torch.allclose(given_probability(logits, 1 - mask), torch.sigmoid(torch.tensor([[[-2.0, 1.0]]])))
    many = torch.randn(1, 3, 1, 4)
    labels = torch.tensor([[[0, 2, 1, 255]]], dtype=torch.uint8)
    found = given_probability(many.requires_grad_(), labels)
    expected = many.softmax(1)[0, [0, 2, 1], 0, [0, 1, 2]]
    assert torch.allclose(found[0, 0, :3], expected) and found[0, 0, 3] == 1 and not found.requires_grad


def test_support_is_that_of_the_given_label():
    probability = np.array([[[0.9, 0.2, 0.5]]], np.float32)
    assert support_of(probability, np.array([[1, 1, 0]], np.uint8)).tolist() == [[230, 51, 128]]
    many = np.array([[[0.1, 0.7]], [[0.3, 0.2]], [[0.6, 0.1]]], np.float32)
    assert support_of(many, np.array([[2, 0]], np.uint8)).tolist() == [[153, 178]]
    assert support_of(many, np.array([[255, 1]], np.uint8)).tolist() == [[255, 51]]


def test_gradient_is_the_weight_times_that_of_the_loss():
    torch.manual_seed(1)
    logits = torch.randn(3, 1, 6, 7, requires_grad=True)
    batch = {"mask": torch.randint(0, 2, (3, 6, 7), dtype=torch.uint8)}
    batch["support"] = torch.randint(0, 256, (3, 6, 7), dtype=torch.uint8)
    args = WeightArgs("", "", level="pixel")
    product, weight = weigh_pixels(logits, batch, 0.4, args)
    (gradient,) = torch.autograd.grad(product.sum(), logits)
    given = given_probability(logits, batch["mask"])
    by_hand = pixel_weights(batch["support"], given, 0.4, batch["mask"], 1.0)
    slope = (logits.detach().sigmoid()[:, 0] - batch["mask"]) / 42
    assert torch.allclose(gradient[:, 0], by_hand * slope, atol=1e-7)
    assert torch.allclose(weight, by_hand.mean((1, 2)))


def test_void_pixels_count_nowhere():
    values = torch.tensor([[[1.0, 3.0, 100.0]], [[5.0, 5.0, 5.0]]])
    mask = torch.tensor([[[0, 1, 255]], [[255, 255, 255]]], dtype=torch.uint8)
    assert mean_of_pixels(values, mask, 3).tolist() == [2.0, 0.0]


@pytest.fixture(scope="module")
def supported(tiny, tmp_path_factory):
    """Lists with support by a small teacher, of one class and of three: (folder, lists)."""
    folder = tmp_path_factory.mktemp("supported")
    for name, more in (("noisy", []), ("classes", ["--classes", "3"])):
        valid = "classes_valid.csv" if more else "valid.csv"
        lists = ["--train_csv", "ones.csv" if not more else "classes.csv", "--valid_csv", valid, "--test_csv", ""]
        launch("train_without_weight.py", tiny, folder, f"teacher_{name}", *lists, "--epochs", "2", *more)
        args = predict_mask.Args(
            list=str(tiny / f"{name}.csv"),
            checkpoint=[str(folder / f"teacher_{name}/last.pt")],
            out=str(folder / f"masks_{name}"),
            support=True,
            data_root=str(tiny),
            cpu=True,
        )
        predict_mask.main(args)
    return folder


def test_predict_mask_writes_support_beside_the_masks(tiny, supported):
    found = read_list(supported / "masks_noisy_support.csv")
    given = read_list(tiny / "noisy.csv")
    assert found[["img", "filename", "iterations"]].equals(given[["img", "filename", "iterations"]])
    row = found.iloc[3]
    support = read_mask(tiny / row["support"], ANY)
    teacher = read_mask(supported / f"masks_noisy/{row['img'][-7:-4]}.png")
    mask = read_mask(tiny / row["filename"])
    assert support.shape == mask.shape
    # above a half wherever the teacher agrees
    assert np.array_equal(support[support != 128] > 127, (teacher == mask)[support != 128])


def test_support_is_made_again_when_the_masks_change(tiny, supported, tmp_path, capsys):
    words = {"checkpoint": [str(supported / "teacher_noisy/last.pt")], "support": True, "data_root": str(tiny)}
    listed = tmp_path / "list.csv"
    read_list(tiny / "noisy.csv").drop(columns="line").to_csv(listed, index=False)
    args = predict_mask.Args(list=str(listed), out=str(tmp_path / "m"), cpu=True, **words)
    predict_mask.main(args)
    capsys.readouterr()
    predict_mask.main(args)
    assert "there already" in capsys.readouterr().out
    frame = pd.read_csv(listed)
    frame["filename"] = np.roll(frame["filename"], 1)
    frame.to_csv(listed, index=False)
    predict_mask.main(args)
    assert "there already" not in capsys.readouterr().out


def test_support_moves_with_the_mask(tiny, supported):
    """Where support is made from the mask itself, it is still the mask after any augmentation."""
    frame = pd.read_csv(tiny / "noisy.csv")
    frame["support"] = frame["filename"]
    frame.to_csv(tiny / "self.csv", index=False)
    data = SupportedDataset(tiny / "self.csv", root=tiny, size=32, augment="strong", seed=4)
    moved = 0
    for i in range(len(data)):
        sample = data[i]
        assert torch.equal(sample["support"] > 0, sample["mask"] > 0)
        moved += not torch.equal(sample["mask"], torch.from_numpy(data.plain(i)[1].copy()))
    assert moved > 5
    batch = data.__getitems__([0, 1, 2])
    assert batch["support"].shape == batch["mask"].shape == (3, 32, 32)
    assert batch["image"].shape == (3, 32, 32, 3)
    image = read_image(tiny / frame["img"][0])
    assert np.array_equal(data.plain(0)[0], image)


@pytest.mark.parametrize("script", [TEACHER, KD])
def test_training_with_pixel_weights(script, tiny, supported, tmp_path):
    flags = ["--level", "pixel", "--epochs", "2"] + ["--warmup", "1"] * (script == KD)
    for name, more in (("noisy", []), ("classes", ["--classes", "3", "--valid_csv", "classes_valid.csv"])):
        listed = supported / f"masks_{name}_support.csv"
        lists = ["--train_csv", str(listed), "--test_csv", ""]
        launch(script, tiny, tmp_path, name, *flags, *more, *lists)
        rows = rows_of(tmp_path / name)
        assert all(0 < row["train_weight"] < 1 for row in rows[:2])
        assert (tmp_path / name / "pictures/epoch_0002.png").is_file()


def test_full_support_without_guard_is_the_baseline(tiny, tmp_path):
    frame = pd.read_csv(tiny / "noisy.csv")
    (tiny / "full.png").write_bytes(cv2.imencode(".png", np.full((32, 32), 255, np.uint8))[1].tobytes())
    frame.assign(support="full.png").to_csv(tiny / "full.csv", index=False)
    flags = ["--epochs", "2", "--augment", "flip"]
    base = launch("train_without_weight.py", tiny, tmp_path, "base", "--train_csv", "noisy.csv", *flags)
    pixel = ["--train_csv", "full.csv", "--level", "pixel", "--guard", "0", *flags]
    found = launch(TEACHER, tiny, tmp_path, "pixel", *pixel)
    assert all(torch.equal(base[0][k], found[0][k]) for k in base[0])


@pytest.mark.parametrize("script", [TEACHER, KD])
def test_training_with_both_weights(script, tiny, supported, tmp_path):
    """Masks of weight 1 count whole, whatever their pixels' support: the baseline bit for bit; others less."""
    flags = ["--epochs", "2", "--augment", "flip", "--test_csv", ""] + ["--warmup", "1"] * (script == KD)
    frame = pd.read_csv(supported / "masks_noisy_support.csv").assign(weight=1.0, bf=1.0)
    frame.to_csv(tiny / "whole.csv", index=False)
    frame.assign(weight=0.2, bf=0.2).to_csv(tiny / "part.csv", index=False)
    base = launch("train_without_weight.py", tiny, tmp_path, "base", "--train_csv", "noisy.csv", *flags[:5], "")
    whole = launch(script, tiny, tmp_path, "whole", "--train_csv", "whole.csv", "--level", "both", *flags)
    assert all(torch.equal(base[0][k], whole[0][k]) for k in base[0])
    launch(script, tiny, tmp_path, "part", "--train_csv", "part.csv", "--level", "both", "--sure", "0.5", *flags)
    assert all(0.2 <= row["train_weight"] < 1 for row in rows_of(tmp_path / "part")[:2])
    frame.drop(columns=["weight", "bf"]).to_csv(tiny / "none.csv", index=False)
    with pytest.raises(InputError, match="no column `weight`"):
        launch(script, tiny, tmp_path, "a", "--train_csv", "none.csv", "--level", "both", *flags)
    with pytest.raises(InputError, match=r"--sure 1\.5"):
        launch(script, tiny, tmp_path, "a", "--train_csv", "whole.csv", "--level", "both", "--sure", "1.5", *flags)


def test_missing_support_is_one_line(tiny, tmp_path):
    with pytest.raises(InputError, match=r"no column `support`.*predict_mask.py --support"):
        launch(TEACHER, tiny, tmp_path, "a", "--train_csv", "train.csv", "--level", "pixel")
    frame = pd.read_csv(tiny / "noisy.csv")
    frame["support"] = frame["filename"]
    frame.loc[2, "support"] = "nowhere.png"
    frame.to_csv(tiny / "holes.csv", index=False)
    with pytest.raises(InputError, match=r"line 4: .*nowhere.png: no such file"):
        launch(TEACHER, tiny, tmp_path, "b", "--train_csv", "holes.csv", "--level", "pixel")
    with pytest.raises(InputError, match="--guard"):
        parse(WeightArgs, ["--train_csv", "a", "--valid_csv", "b", "--guard", "-1", *SMALL])
    assert not hasattr(TrainArgs("", ""), "level")


def test_losses_of_pixels_are_those_of_images():
    torch.manual_seed(0)
    logits, mask = torch.randn(2, 3, 5, 5), torch.randint(0, 3, (2, 5, 5), dtype=torch.uint8)
    mask[0, 0] = 255
    batch = {"mask": mask, "support": torch.full_like(mask, 255)}
    product, weight = weigh_pixels(logits, batch, 0.0, WeightArgs("", "", level="pixel", guard=0, classes=3))
    assert torch.allclose(product, per_image_loss(logits, mask)) and weight.eq(1).all()
