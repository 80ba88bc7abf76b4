"""PointRend: which pixels are looked at again, what is seen there, and what losses and masks make of it."""

import os
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_scripts import BASE, ROOT, SCRIPTS, SMALL, Interrupted, launch, rows_of, same

from utils.args import TrainArgs
from utils.boundary import soft_boundary_f
from utils.checkpoint import Checkpoint, load_network
from utils.errors import InputError
from utils.inference import Probabilities, to_probability
from utils.losses import hard, per_image_loss, per_pixel_loss
from utils.methods.robust_losses import CrossEntropy, build_loss
from utils.methods.selection import cleanness, examples
from utils.methods.weighting import given_probability, released_student_quality
from utils.metrics import sample_scores
from utils.models import build_model
from utils.models.pointrend import PointRend
from utils.points import PointLogits, dense, draw_points, parts, sample, uncertainty

LITTLE = ["--arch", "PointRend", "--encoder", "tu-mobilenetv3_small_050", "--size", "32"]


def network(classes=1, every=16, seed=0):
    torch.manual_seed(seed)
    net = PointRend("resnet18", None, classes=classes)
    torch.nn.init.normal_(net.head.predict.weight, std=0.2)  # as if it had learnt to say something of its own
    net.every = every
    return net


def pictures(n=2, h=40, w=56, seed=0):
    return torch.randn(n, 3, h, w, generator=torch.Generator().manual_seed(seed))


# where


def test_uncertainty_by_hand():
    assert uncertainty(torch.tensor([[[3.0, -0.5, 0.0]]])).tolist() == [[-3.0, -0.5, 0.0]]
    assert uncertainty(torch.tensor([[[5.0, 1.0], [2.0, 1.0], [4.5, -1.0]]])).tolist() == [[-0.5, 0.0]]


def test_the_most_uncertain_of_the_drawn_are_chosen_and_the_rest_is_uniform():
    logits = torch.arange(1.0, 401).view(1, 1, 20, 20).repeat(2, 1, 1, 1)  # pixel i is the i-th most uncertain
    torch.manual_seed(3)
    at = draw_points(logits, 40)
    torch.manual_seed(3)
    pool, rest = torch.randint(400, (2, 120)), torch.randint(400, (2, 10))
    assert torch.equal(at[:, :30].sort(1).values, pool.sort(1).values[:, :30])  # hand: the 30 smallest of 120
    assert torch.equal(at[:, 30:], rest)


def test_without_importance_points_are_uniform():
    torch.manual_seed(0)
    at = draw_points(torch.arange(1.0, 101).view(1, 1, 10, 10), 40_000, importance=0)
    assert np.bincount(at[0].numpy(), minlength=100).std() < 3 * np.sqrt(400)


def test_a_map_is_itself_at_its_pixels_and_bilinear_between():
    maps = torch.randn(2, 5, 7, 9)
    at = torch.randint(63, (2, 20))
    expected = maps.flatten(2).gather(2, at[:, None].expand(-1, 5, -1))
    assert torch.allclose(sample(maps, at, 7, 9), expected, atol=1e-5)
    every = torch.arange(28 * 36).expand(2, -1)
    large = F.interpolate(maps, (28, 36), mode="bilinear", align_corners=False)
    assert torch.allclose(sample(maps, every, 28, 36), large.flatten(2), atol=1e-5)


@pytest.mark.parametrize("classes", [1, 3])
def test_points_lie_in_the_image_and_see_what_inference_sees(classes):
    net = network(classes)
    net.coarse.eval()  # no dropout, fixed statistics: training and inference share all features
    whole, points, at = net(pictures())
    assert whole.shape == (2, classes, 40, 56) and points.shape == (2, classes, 140) and at.max() < 40 * 56
    net.every = 1
    with torch.no_grad():
        full = net.eval()(pictures())
    expected = full.flatten(2).gather(2, at[:, None].expand(-1, classes, -1))
    assert torch.allclose(points, expected, atol=1e-4)


# inference


@pytest.mark.parametrize("classes", [1, 3])
def test_asked_about_every_pixel_it_is_the_point_head_everywhere(classes):
    net, x = network(classes, every=1).eval(), pictures(h=32, w=64)
    with torch.no_grad():
        features = net.coarse.encoder(x)
        coarse = net.coarse.segmentation_head(net.coarse.decoder(features))
        large = [F.interpolate(m, (32, 64), mode="bilinear") for m in (*features[1:3], coarse)]
        head = net.head(torch.cat(large[:2], 1).flatten(2), large[2].flatten(2))
        assert torch.allclose(net(x), head.view(2, classes, 32, 64), atol=1e-4)


def test_subdivision_changes_the_most_uncertain_pixels_only():
    net, x = network().eval(), pictures(1, 64, 64)
    with torch.no_grad():
        features = net.coarse.encoder(x)
        coarse = net.coarse.segmentation_head(net.coarse.decoder(features))
        fine = net(x)
        half = F.interpolate(coarse, (32, 32), mode="bilinear").flatten()
        asked = half.abs().argsort()[:256]
        half[asked] = net._ask(coarse, features[1:3], asked[None], 32, 32)[0, 0]
        before = F.interpolate(half.view(1, 1, 32, 32), (64, 64), mode="bilinear")
    changed = (fine != before).flatten()
    assert 200 < changed.sum() <= 256
    assert before.abs().flatten()[changed].max() <= before.abs().flatten().sort().values[256]


def test_any_size_comes_back_and_small_ones_too():
    net = build_model("PointRend", "resnet18")
    for shape in ((1, 3), (33, 47), (64, 64)):
        image = torch.zeros(2, 3, *shape, dtype=torch.uint8)
        with torch.inference_mode():
            assert net.eval()(image).shape == (2, 1, *shape)
            assert net.train()(image).shape == (2, 1, *shape)


def test_no_points_is_the_coarse_network_and_draws_nothing():
    net, x = network(every=0), pictures(h=64, w=64)
    net.coarse.decoder.dropout.p = 0
    mask = torch.randint(0, 2, (2, 64, 64), dtype=torch.uint8)
    state = torch.get_rng_state()
    logits = net(x)
    coarse = F.interpolate(net.coarse(x), (64, 64), mode="bilinear")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(per_image_loss(logits, mask), per_image_loss(coarse, mask))


# losses and masks


def some_points(classes, n=2, h=6, w=8, p=5, seed=1):
    g = torch.Generator().manual_seed(seed)
    logits = PointLogits(
        torch.randn(n, classes, h, w, generator=g),
        torch.randn(n, classes, p, generator=g),
        torch.stack([torch.randperm(h * w, generator=g)[:p] for _ in range(n)]),
    )
    mask = torch.randint(0, max(2, classes), (n, h, w), generator=g, dtype=torch.uint8)
    if classes > 1:
        mask[:, :2] = 255
    return logits, mask


@pytest.mark.parametrize("classes", [1, 3])
def test_loss_of_an_image_is_the_mean_of_the_map_and_the_mean_of_the_points(classes):
    (whole, points, at), mask = some_points(classes)
    found = per_image_loss(PointLogits(whole, points, at), mask)
    for i in range(2):
        label = mask[i].flatten()[at[i]].long()
        if classes == 1:
            one = F.binary_cross_entropy_with_logits(whole[i, 0], mask[i].float())
            two = F.binary_cross_entropy_with_logits(points[i, 0], label.float())
        else:
            one = F.cross_entropy(whole[i].flatten(1).T, mask[i].flatten().long(), ignore_index=255)
            two = F.cross_entropy(points[i].T, label, ignore_index=255)
        assert torch.isclose(found[i], one + two)


def test_point_losses_lie_at_their_pixels_and_add_up_where_one_is_drawn_twice():
    whole, mask = torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.uint8)
    logits = PointLogits(whole, torch.full((1, 1, 4), 2.0), torch.tensor([[3, 3, 3, 1]]))
    extra = per_pixel_loss(logits, mask) - np.log(2)
    one = np.log1p(np.exp(2.0))  # times pixels / points = 1
    assert torch.allclose(extra.flatten(), torch.tensor([0, one, 0, 3 * one], dtype=torch.float32))


def test_a_loss_of_images_takes_points_as_an_image_of_their_own():
    logits, mask = some_points(3)
    pairs = parts(logits, mask)
    assert sum(per_image_loss(*pair) for pair in pairs).allclose(per_image_loss(logits, mask))
    assert len(parts(logits.whole, mask)) == 1


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("loss", ["gce", "sce", "nr_dice", "t_loss"])
def test_robust_losses_are_those_of_the_map_and_of_the_points(loss, classes):
    logits, mask = some_points(classes)
    criterion = build_loss(TrainArgs("", "", loss=loss, classes=classes))
    labels = mask.flatten(1).gather(1, logits.at)[..., None]
    expected = criterion(logits.whole, mask) + criterion(logits.points[..., None], labels)
    assert torch.allclose(criterion(logits, mask), expected)


def test_points_without_any_label_count_nothing():
    logits, mask = some_points(3)
    void = torch.full_like(mask, 255)
    assert per_image_loss(logits, void).tolist() == [0, 0]


@pytest.mark.parametrize("classes", [1, 3])
def test_masks_and_probabilities_are_those_of_the_last_word(classes):
    logits, mask = some_points(classes)
    full = dense(logits)
    for i in range(2):
        for k, at in enumerate(logits.at[i].tolist()):
            assert torch.equal(full[i].flatten(1)[:, at], logits.points[i, :, k])
    assert (full != logits.whole).any(1).sum() <= 10
    assert torch.equal(hard(logits), hard(full))
    assert torch.equal(given_probability(logits, mask), given_probability(full, mask))


def test_released_quality_is_taken_from_the_last_word():
    logits, mask = some_points(1, h=16, w=16)
    expected = soft_boundary_f(dense(logits), mask[:, None].float())
    assert torch.equal(released_student_quality(logits, mask), expected)


def test_pixels_are_ranked_by_their_own_loss_however_often_they_are_points():
    logits, mask = some_points(3)
    losses = examples(logits, mask, "pixel", CrossEntropy())
    rank = cleanness(logits, losses, mask, "loss")
    assert torch.equal(rank, -examples(dense(logits), mask, "pixel", CrossEntropy()))
    images = examples(logits, mask, "image", CrossEntropy())
    assert torch.equal(cleanness(logits, images, mask, "loss"), -images)


# training


def test_sharper_than_its_coarse_network_after_a_short_training():
    """Stars on noise: the boundary score of the same network with and without its points."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    images, masks = zip(*(star(rng) for _ in range(4)), strict=True)
    image, mask = torch.stack(images), torch.stack(masks)
    net = build_model("PointRend", "tu-mobilenetv3_small_050")
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    for step in range(40):
        torch.manual_seed(step)
        loss = per_image_loss(net.train()(image), mask).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    score = {}
    with torch.no_grad():
        for every in (0, 16):
            net.net.every = every
            score[every] = sample_scores(hard(net.eval()(image)), mask, 1, 3, 3)["bf"].mean().item()
    assert score[16] > score[0] + 0.02, score


def star(rng, size=64):
    turn = np.arange(10) * np.pi / 5 + rng.uniform(0, np.pi)
    reach = np.where(np.arange(10) % 2, 9, 26) + rng.uniform(-2, 2, 10)
    corners = np.stack([np.cos(turn), np.sin(turn)], 1) * reach[:, None] + size / 2
    mask = cv2.fillPoly(np.zeros((size, size), np.uint8), [corners.round().astype(np.int32)], 1)
    image = np.clip(80 + 90 * mask[..., None] + rng.normal(0, 12, (size, size, 3)), 0, 255).astype(np.uint8)
    return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(mask)


SEMI = ["train_u2pl.py", "train_unimatch.py"]


@pytest.mark.parametrize("script", SEMI)
def test_heads_of_semi_supervised_scripts_refuse_it(script, tiny, tmp_path):
    with pytest.raises(InputError, match="--arch PointRend: has no single last layer"):
        launch(script, tiny, tmp_path, "run", *LITTLE)


def samples_forward() -> bool:
    """Whether this torch has the forward derivative of grid_sample, by which points are read; older ones have not."""
    maps, grid = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 1, 2)
    try:
        torch.func.jvp(lambda x: F.grid_sample(x, grid, align_corners=False), (maps,), (maps,))
    except NotImplementedError:
        return False
    return True


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script not in [*SEMI, "train_lpl.py"]])
def test_every_script_trains_it(script, tiny, tmp_path):
    more = ["--pictures", "1"]
    if script == "train_ieg_seg.py" and not samples_forward():
        with pytest.raises(InputError, match=r"no forward derivative .*; use --meta-grad difference"):
            launch(script, tiny, tmp_path, "a", *LITTLE, *more)
        more += ["--meta-grad", "difference"]
    launch(script, tiny, tmp_path, "run", *LITTLE, *more)
    assert (tmp_path / "run/pictures/epoch_0001.png").exists()
    assert 0 < rows_of(tmp_path / "run")[0]["train_loss"] < 10


@pytest.mark.parametrize("script", ["train_without_weight.py", "train_co_teaching+.py"])
def test_it_goes_on_exactly(script, tiny, tmp_path, monkeypatch):
    flags = [*LITTLE, "--epochs", "2", "--pictures", "0"]
    whole = launch(script, tiny, tmp_path, "whole", *flags)
    save = Checkpoint.save

    def save_then_stop(self, epoch, *more, **named):
        save(self, epoch, *more, **named)
        self.wait()
        raise Interrupted

    monkeypatch.setattr(Checkpoint, "save", save_then_stop)
    with pytest.raises(Interrupted):
        launch(script, tiny, tmp_path, "parts", *flags)
    monkeypatch.setattr(Checkpoint, "save", save)
    after = launch(script, tiny, tmp_path, "parts", *flags)
    assert all(same(a, b) for a, b in zip(whole, after, strict=True))
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "parts")


@pytest.mark.parametrize(
    "more",
    [("--precision", "bf16"), ("--precision", "fp16"), ("--accumulate", "2", "--skip-nonfinite"), ("--size", "0")],
)
def test_precisions_accumulation_and_sizes(more, tiny, tmp_path):
    launch("train_without_weight.py", tiny, tmp_path, "run", *LITTLE, *more)
    assert np.isfinite(rows_of(tmp_path / "run")[0]["train_loss"])


@pytest.mark.parametrize("script", ["train_without_weight.py", "train_with_KDweight.py", "train_co_teaching.py"])
def test_many_classes(script, tiny, tmp_path):
    lists = ["--train_csv", "classes.csv", "--valid_csv", "classes_valid.csv", "--test_csv", ""]
    more = ["--unit", "pixel"] if "co_teaching" in script else []
    launch(script, tiny, tmp_path, "run", *LITTLE, "--classes", "3", *lists, *more)
    net, state = load_network(tmp_path / "run" / "last.pt")
    assert state["model"]["arch"] == "PointRend"
    image = torch.zeros(1, 3, 20, 30, dtype=torch.uint8)
    assert net.eval()(image).shape == (1, 3, 20, 30)


@pytest.mark.slow
def test_two_processes(tiny, tmp_path):
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / BASE, *SMALL, *LITTLE]
    words += ["--data-root", tiny, "--run-dir", tmp_path, "--name", "two"]
    words += [f"--{name}_csv={tiny / name}.csv" for name in ("train", "valid", "test")]
    how = {"capture_output": True, "text": True, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    done = subprocess.run([sys.executable, *map(str, words)], **how)
    assert done.returncode == 0, done.stderr[-2000:]
    assert rows_of(tmp_path / "two")[-1]["split"] == "test"


def test_compiles_without_a_break():
    net, x = network(), pictures(h=32, w=32)
    with torch.no_grad():
        for training in (True, False):
            net.train(training)
            net.coarse.eval()
            torch.manual_seed(0)
            expected = net(x)
            torch.manual_seed(0)
            found = torch.compile(net, backend="eager", fullgraph=True)(x)
            assert torch.allclose(dense(found), dense(expected), atol=1e-4)


def test_averages_with_another_architecture():
    nets = [build_model("PointRend", "resnet18"), build_model("Unet", "resnet18")]
    image = torch.randint(0, 256, (2, 3, 48, 40), dtype=torch.uint8)
    with torch.inference_mode():
        found = Probabilities(nets).eval()(image)
        expected = sum(to_probability(net(image)) for net in nets) / 2
    assert torch.equal(found, expected)
