"""Several classes with void pixels through the noise, the scores, the losses, the selection and all scripts."""

from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from test_noise_kinds import classes_map, photo, rng
from test_scripts import BASE, NEUTRAL, launch, rows_of, same

from utils import add_noise, get_weight, predict_mask
from utils.args import parse
from utils.errors import InputError
from utils.images import read_mask, write_mask
from utils.losses import hard, per_image_loss
from utils.methods.robust_losses import CrossEntropy
from utils.methods.selection import cleanness, differing_examples, examples
from utils.methods.weighting import student_quality, weigh_pixels
from utils.metrics import sample_scores
from utils.noise import KINDS, apply_noise, find_strength
from utils.scores import QUALITIES, pair_scores

VOID, C = 255, 4


def label_maps():
    """Four annotations: three classes beside void, one class only, a class beside void, nothing but void."""
    mask = np.zeros((4, 12, 16), np.uint8)
    mask[0, :, 5:], mask[0, 6:, 10:], mask[0, :2] = 1, 3, VOID
    mask[1] = 2
    mask[2, :, 8:] = VOID
    mask[3] = VOID
    return torch.from_numpy(mask)


def flawed(mask):
    """Logits that agree with the annotation, but for a corner of every image."""
    label = torch.where(mask == VOID, 1, mask).long()
    label[:, -3:, -4:] = 0
    return 6.0 * torch.nn.functional.one_hot(label, C).permute(0, 3, 1, 2).float()


@pytest.mark.parametrize("kind", list(KINDS))
def test_noise_leaves_a_mask_without_a_choice_as_it_is(kind):
    """Nothing annotated, or a single class: there is no contour to move, and no class is invented but by confusion."""
    strength = {"superpixel": 9, "missing": 0.3, "spurious": 0.3, "box": 0.6, "ellipse": 0.6, "confusion": 0.0}
    for mask in (np.full((24, 30), VOID, np.uint8), np.full((24, 30), 2, np.uint8), _half_void()):
        noisy = apply_noise(mask, kind, strength.get(kind, 3), rng(), C, photo(mask))
        assert np.array_equal(noisy, mask)


def _half_void():
    mask = np.full((24, 30), 2, np.uint8)
    mask[:, 12:] = VOID
    return mask


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("superpixel", "polygon", "box")])
def test_every_kind_reaches_its_severity_in_several_classes(kind):
    pairs = [(classes_map(66), photo(classes_map(66)), lambda i=i: rng(i)) for i in range(4)]
    strength, left = find_strength(pairs, kind, 0.8, C)
    found = [pair_scores(apply_noise(m, kind, strength, key(), C, image), m, C)["iou"] for m, image, key in pairs]
    # noise that would take a class away is not used; confusion changes whole objects (and bands are boxes already)
    assert left == pytest.approx(0.8, abs=0.12 if kind == "confusion" else 0.03)
    assert np.mean(found) >= left - 1e-9


def test_class_means_by_hand():
    """Two rows of 10: class 0 on the left, class 1 on the right, class 2 predicted once, void at the end."""
    mask = np.array([[0, 0, 0, 0, 1, 1, 1, 1, VOID, VOID]] * 2, np.uint8)
    pred = np.array([[0, 0, 0, 0, 0, 1, 1, 1, 3, 3], [0, 0, 0, 0, 1, 1, 1, 2, 3, 3]], np.uint8)
    found = pair_scores(pred, mask, C)
    # class 0: 8 of 9; class 1: 6 of 8; class 2 is in one mask only: 0; class 3 where nobody annotated: absent
    assert found["miou"] == found["iou"] == pytest.approx((8 / 9 + 6 / 8 + 0) / 3)
    assert found["dice"] == pytest.approx((16 / 17 + 12 / 14 + 0) / 3)
    # contours of 0 and 1 are one pixel apart, and what class 2 disturbs lies beside void: both are 1; class 2 is 0
    assert found["bf"] == pytest.approx(_bf_by_hand())
    assert found["bm"] == pytest.approx((found["bf"] + found["miou"]) / 2)
    batch = sample_scores(torch.from_numpy(pred)[None], torch.from_numpy(mask)[None], C)
    assert {k: float(v) for k, v in batch.items()} == pytest.approx(found, abs=1e-6)


def _bf_by_hand():
    # class 2: its pixel touches class 1, no other pixel of class 2 is near, but void is: it is not judged, so that no
    # contour of class 2 is left and its IoU, 0, stands in
    return (1 + 1 + 0) / 3


def test_nothing_is_nan_and_void_has_no_say():
    mask = label_maps()
    logits = flawed(mask).requires_grad_()
    for quality in QUALITIES:
        score = student_quality(hard(logits), mask, quality, C)
        assert score.isfinite().all() and (score >= 0).all() and (score <= 1).all()
        assert 0 < score[0] < 1 and score[2] == score[3] == 1, "right wherever somebody annotated"
    loss = per_image_loss(logits, mask)
    assert loss[3] == 0 and loss[0] > loss[2] > 0
    batch = {"mask": mask, "support": torch.full_like(mask, 200)}
    args = SimpleNamespace(guard=1.0, sure=0.9, weight_floor=0.0, classes=C)
    product, weight = weigh_pixels(logits, batch, 0.5, args)
    assert weight[3] == 0 and (weight[:3] > 0).all()
    (gradient,) = torch.autograd.grad((loss + product).sum(), logits)
    assert gradient.isfinite().all()
    assert not gradient.permute(0, 2, 3, 1)[mask == VOID].any() and gradient[:3].any()
    for score in ("loss", "iou", "bf", "bm", "miou"):
        assert cleanness(logits, loss, mask, score).isfinite().all()
    assert len(examples(logits, mask, "pixel", CrossEntropy())) == int((mask != VOID).sum())


def test_networks_disagree_only_where_somebody_annotated():
    mask = label_maps()
    other = flawed(mask)
    other[:, :, :2], other[2, :, :, 8:], other[3] = 0, 0, 0  # another class, 0, in rows 0 and 1 and where there is void
    a, b = flawed(mask), other
    for how in ("iou", "bf"):
        args = SimpleNamespace(unit="image", disagree=how, below=0.95, theta0=3, theta=5)
        assert differing_examples(a, b, mask, args).tolist() == [False, True, False, False]
    args.unit = "pixel"
    assert int(differing_examples(a, b, mask, args).sum()) == 2 * 16  # of the second image


SEVEN = [BASE, *(f"train_{name}.py" for name in ("with_weight", "with_Teacher_weight", "with_KDweight"))]
SEVEN += [f"train_{name}.py" for name in ("decoupling", "co_teaching", "co_teaching+")]
DROP = ["--forget-rate", "0.4", "--num-gradual", "1"]
FLAGS = {SEVEN[3]: ["--warmup", "0"], SEVEN[5]: DROP, SEVEN[6]: [*DROP, "--init-epochs", "0"]}
VARIANTS = [(script, FLAGS.get(script, [])) for script in SEVEN]
VARIANTS += [(SEVEN[2], ["--level", "pixel"]), (SEVEN[3], ["--level", "pixel", "--warmup", "0", "--t-start", "0.5"])]
VARIANTS += [(SEVEN[3], ["--warmup", "0", "--quality", quality]) for quality in ("miou", "bm", "iou", "dice")]
VARIANTS += [(SEVEN[4], ["--unit", "image", "--disagree", how, "--init-epochs", "0"]) for how in ("iou", "bf")]
VARIANTS += [(script, [*DROP, "--unit", "pixel"]) for script in SEVEN[5:]]
VARIANTS += [(SEVEN[5], [*DROP, "--score", score]) for score in ("iou", "bf", "bm", "miou")]
VARIANTS += [(script, ["--preset", "nlkd"]) for script in SEVEN[4:]]


@pytest.fixture(scope="module")
def streets(tmp_path_factory):
    """Lists of 9 images with masks of four classes; one mask has a single class, one is nothing but void."""
    root = tmp_path_factory.mktemp("streets")
    (root / "image").mkdir()
    (root / "mask").mkdir()
    rows = []
    for i in range(9):
        mask = np.roll(classes_map(48), 5 * i, 0)
        mask[:] = mask if i not in (3, 6) else {3: 1, 6: VOID}[i]
        cv2.imwrite(str(root / f"image/{i}.png"), photo(mask)[..., ::-1])
        write_mask(root / f"mask/{i}.png", mask, C)
        rows.append((f"image/{i}.png", f"mask/{i}.png", 7 * (i % 2), 0.3 + 0.1 * (i % 5), f"mask/{i}.png"))
    frame = pd.DataFrame(rows, columns=["img", "filename", "iterations", "weight", "support"])
    frame["bf"] = frame["weight"]
    frame[:7].to_csv(root / "train.csv", index=False)
    frame[:7].assign(weight=1.0, bf=1.0).to_csv(root / "ones.csv", index=False)
    frame[7:8][["img", "filename"]].to_csv(root / "valid.csv", index=False)
    frame[8:][["img", "filename"]].to_csv(root / "test.csv", index=False)
    return root


@pytest.mark.parametrize(("script", "flags"), VARIANTS, ids=[" ".join([s[6:-3], *f]) for s, f in VARIANTS])
def test_every_script_trains_on_several_classes(script, flags, streets, tmp_path):
    words = ["--classes", "4", "--epochs", "2", "--augment", "strong", "--precision", "bf16", *flags]
    launch(script, streets, tmp_path, "a", *words)
    for row in rows_of(tmp_path / "a"):
        assert np.isfinite([v for v in row.values() if isinstance(v, float)]).all()
    assert 0 <= row["test_miou"] == row["test_iou"] <= 1 and 0 <= row["test_bf"] <= 1


@pytest.mark.parametrize("script", SEVEN[1:])
def test_neutral_setting_is_the_baseline_in_several_classes(script, streets, tmp_path):
    words = ["--classes", "4", "--epochs", "2", "--augment", "flip"]
    plain = launch(BASE, streets, tmp_path, "plain", *words)
    assert same(plain[0], launch(script, streets, tmp_path, "method", *words, *NEUTRAL[script])[0])


def test_teacher_masks_and_weights_of_several_classes(streets, tmp_path):
    launch(BASE, streets, tmp_path, "teacher", "--classes", "4", "--epochs", "1")
    where = ["--data-root", str(streets), "--out"]
    last = str(tmp_path / "teacher/last.pt")
    words = ["--list", str(streets / "train.csv"), "--checkpoint", last, "--cpu", "--support", *where]
    predict_mask.main(parse(predict_mask.Args, [*words, str(tmp_path / "masks")]))
    for i in range(7):
        assert read_mask(tmp_path / f"masks/{i}.png", C).max() < C, "void is not predicted"
        void = read_mask(streets / f"mask/{i}.png", C) == VOID
        assert (cv2.imread(str(tmp_path / f"masks/support/{i}.png"), cv2.IMREAD_GRAYSCALE)[void] == 255).all()
    words = ["--list", str(streets / "train.csv"), "--teacher", str(tmp_path / "masks"), "--score", *QUALITIES]
    get_weight.main(parse(get_weight.Args, [*words, "--classes", "4", *where, str(tmp_path / "weights")]))
    for score in QUALITIES:
        weights = pd.read_csv(tmp_path / f"weights/train_masks_weight_{score}score.csv")["weight"]
        assert weights.between(0, 1).all() and weights[6] == 1, "there is nothing to blame a mask of void for"
        pair = (read_mask(path, C) for path in (tmp_path / "masks/2.png", streets / "mask/2.png"))
        assert weights[2] == pytest.approx(pair_scores(*pair, C)[score], abs=1e-7)


def test_a_class_beyond_the_last_is_one_line(streets, tmp_path):
    words = ["--list", str(streets / "train.csv"), "--teacher", str(streets / "mask"), "--classes", "3"]
    words += ["--data-root", str(streets), "--out", str(tmp_path / "w"), "--workers", "1"]
    says = "line 2: .*class 3, but --classes 3 allows 0 to 2 and 255"
    with pytest.raises(InputError, match=says):
        get_weight.main(parse(get_weight.Args, words))
    with pytest.raises(InputError, match=says):
        launch(BASE, streets, tmp_path, "a", "--classes", "3")
    with pytest.raises(InputError, match="class 3, but --classes 3"):
        add_noise.main(add_noise.Args(str(streets / "mask/0.png"), str(tmp_path / "a.png"), kinds=["box"], classes=3))


def test_the_picture_of_several_classes_has_their_colours(streets, tmp_path):
    mask, image = str(streets / "mask/0.png"), str(streets / "image/0.png")
    args = add_noise.Args(mask, str(tmp_path / "a.png"), kinds=["box"], severities=[0.8], classes=4)
    add_noise.main(args)
    page = cv2.imread(args.out)[..., ::-1]
    colours = {tuple(map(int, c)) for c in np.unique(page.reshape(-1, 3), axis=0)}
    assert {add_noise.BACKGROUND, *(tuple(map(int, c)) for c in add_noise.palette(4)[1:])} <= colours
    add_noise.main(
        add_noise.Args(mask, str(tmp_path / "b.png"), kinds=["all"], image=image, severities=[0.8], classes=4)
    )
    assert (
        cv2.imread(str(tmp_path / "b.png")).shape[0] == 10 + -(-len(KINDS) // 5) * (34 + 224 + 32) + 24
    )  # five side by side
    with pytest.raises(InputError, match="more than 1 with --kinds only"):
        add_noise.main(add_noise.Args(mask, str(tmp_path / "c.png"), classes=4))
