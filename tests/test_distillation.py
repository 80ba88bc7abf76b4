"""Distillation losses against hand values, plain loops and arrays of the original code; the flags, and the runs."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import write_teacher
from test_scripts import BASE, ROOT, SMALL, Interrupted, interrupt_after, launch, rows_of, same

from utils.args import parse
from utils.checkpoint import read_checkpoint
from utils.distill import CIRKD, WEIGHTS, mixture
from utils.errors import InputError
from utils.interrupt import Paused, stop
from utils.methods.cirkd import ClassQueue, Memory, memory_kl, pixel_keys, region_keys
from utils.methods.distillation import annotated, channel_wise, dist, labels_on, pixel_kl, to_grid
from utils.methods.relations import (
    attention_transfer,
    between_images,
    intra_class_variation,
    pairwise,
    similarity_kl,
)
from utils.models import build_model
from utils.models.features import FeatureTap, on_grid
from utils.steps import Steps


def golden(name):
    with np.load(Path(__file__).parent / "golden" / f"lad_{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def void_is_255(labels):
    return torch.where(labels < 0, 255, labels).byte()


def random(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradient(loss, of):
    return torch.autograd.grad(loss, of, retain_graph=True)[0]


# against the original code


BASELINES = {
    "kd_T1": ("logit", lambda s, t, g: pixel_kl(s, t)),
    "kd_T4": ("logit", lambda s, t, g: pixel_kl(s, t, 4.0)),
    "cwd_logit": ("logit", lambda s, t, g: channel_wise(s, t)),
    "skd": ("feat", lambda s, t, g: pairwise(s, t)),
    "at": ("feat", lambda s, t, g: attention_transfer(s, t)),
    "cwd_feat": ("feat", lambda s, t, g: channel_wise(F.conv2d(s, g["cwd_w"]), t, channels=6)),
    "ifvd": (
        "feat",
        lambda s, t, g: intra_class_variation(s, t, void_is_255(g["labels"][:, ::2, ::2]), 4, released=True),
    ),
}


@pytest.mark.parametrize("name", BASELINES)
def test_value_and_gradient_are_those_of_the_original_code(name):
    arrays = golden("kd_baselines")
    on, loss_of = BASELINES[name]
    student = arrays[f"{on}_s"].requires_grad_()
    loss = loss_of(student, arrays[f"{on}_t"], arrays)
    assert loss.item() == pytest.approx(arrays[name].item(), rel=1e-5)
    assert torch.allclose(gradient(loss, student), arrays[f"g_{name}"], rtol=1e-4, atol=1e-6)


def test_feature_cwd_divides_by_the_channels_it_compares():
    arrays = golden("kd_baselines")
    features = F.conv2d(arrays["feat_s"], arrays["cwd_w"])
    assert channel_wise(features, arrays["feat_t"]).item() == pytest.approx(arrays["cwd_feat"].item() * 6 / 8, rel=1e-5)


def test_distances_of_the_lad_code():
    arrays = golden("losses")
    student, teacher = arrays["SL"], arrays["TL"]
    assert channel_wise(student, teacher).item() == pytest.approx(arrays["s_cwd"].item(), rel=1e-5)
    assert dist(student, teacher).item() == pytest.approx(arrays["dist"].item(), rel=1e-5)
    assert pixel_kl(student, teacher, 4.0, released=True).item() == pytest.approx(arrays["kl_kd"].item(), rel=1e-5)
    assert pixel_kl(student, teacher, 4.0).item() == pytest.approx(16 * arrays["kl_kd"].item(), rel=1e-2)


@pytest.mark.parametrize(("pool", "name"), [(1, "minibatch"), (2, "minibatch_pool")])
def test_mini_batch_loss_is_that_of_the_original_code(pool, name):
    arrays = golden("cirkd")
    student = arrays["feat_s"].requires_grad_()
    loss = between_images(student, arrays["feat_t"], pool=pool)
    assert loss.item() == pytest.approx(arrays[name].item(), rel=1e-5)
    if pool == 1:
        assert torch.allclose(gradient(loss, student), arrays["g_minibatch"], rtol=1e-4, atol=1e-6)


def test_memory_losses_are_those_of_the_original_code():
    arrays = golden("cirkd")
    student = arrays["feat_s"].requires_grad_()
    # its projector in evaluation mode: BatchNorm with mean 0 and variance 1
    hidden = F.relu(F.conv2d(student, arrays["proj_w0"]) / math.sqrt(1 + 1e-5))
    anchors = F.normalize(F.conv2d(hidden, arrays["proj_w1"]), dim=1)
    teacher = F.normalize(arrays["feat_t"], dim=1)
    valid, total = arrays["labels_small"] >= 0, 0.0
    for kind, row, count in (("pixel", 5, 4), ("region", 6, 2)):
        keys = arrays[f"{kind}_queue1"][:, arrays["perms"][row, :count]]
        loss = memory_kl(anchors, teacher, keys, torch.ones(3, count, dtype=torch.bool), valid, 0.1)
        assert loss.item() == pytest.approx(arrays[f"memory_{kind}"].item(), rel=1e-5)
        total = total + loss
    assert torch.allclose(gradient(total, student), arrays["g_memory"], rtol=1e-4, atol=1e-6)


def test_region_queue_is_that_of_the_original_code():
    arrays = golden("cirkd")
    queue = ClassQueue(3, 5, 8)
    queue.keys[:, :5] = arrays["region_queue0"]
    queue.push(*region_keys(F.normalize(arrays["feat_t"], dim=1), void_is_255(arrays["labels_small"]), 3))
    assert torch.allclose(queue.keys[:, :5], arrays["region_queue1"], atol=1e-6)
    assert torch.equal(queue.position, arrays["region_ptr1"])


@pytest.mark.parametrize("released", [True, False])
def test_pixel_queue_holds_pixels_of_its_class_and_other_ones_in_the_original_code(released):
    arrays = golden("cirkd")
    teacher, labels = F.normalize(arrays["feat_t"], dim=1), void_is_255(arrays["labels_small"])
    chance = torch.full((2, 3, 20), 0.001)
    draws = iter(arrays["perms"])
    for n, k in [(n, k) for n in range(2) for k in range(3) if (labels[n] == k).any()]:
        order = next(draws)
        order = order[order >= 0]
        chance[n, k, order] = torch.linspace(1, 0.1, len(order))  # topk gives back this order
    queue = ClassQueue(3, 40, 8)
    queue.keys[:, :40] = arrays["pixel_queue0"]
    keys, there = pixel_keys(teacher, labels, 3, 16, chance, released)
    queue.push(keys.transpose(1, 2).flatten(0, 1), there.transpose(1, 2).flatten(0, 1))
    assert torch.equal(queue.position, arrays["pixel_ptr1"])
    assert torch.allclose(queue.keys[:, :40], arrays["pixel_queue1"], atol=1e-6) == released
    pixels = teacher.movedim(1, 3)
    for k in range(3):
        own = {tuple(p.tolist()) for p in pixels[labels == k]}
        stored = {tuple(p.tolist()) for p in queue.keys[k, : queue.position[k]]}
        assert (stored <= own) == (not released)


# by hand and by definition


def test_pixel_kl_by_hand():
    student, teacher = torch.zeros(1, 2, 1, 1), torch.tensor([math.log(3.0), 0.0]).view(1, 2, 1, 1)
    by_hand = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert pixel_kl(student, teacher).item() == pytest.approx(by_hand, rel=1e-5)
    # one channel: the sigmoid of the difference is the same probability
    assert pixel_kl(torch.zeros(1, 1, 1, 1), teacher[:, :1]).item() == pytest.approx(by_hand, rel=1e-5)
    half = 1 / (1 + math.exp(-math.log(3) / 2))
    warm = 4 * (half * math.log(2 * half) + (1 - half) * math.log(2 * (1 - half)))
    assert pixel_kl(student, teacher, 2.0).item() == pytest.approx(warm, rel=1e-5)


def test_channel_wise_by_hand():
    teacher = torch.tensor([math.log(3.0), 0.0]).view(1, 1, 1, 2) * 4
    by_hand = 16 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert channel_wise(torch.zeros(1, 1, 1, 2), teacher).item() == pytest.approx(by_hand, rel=1e-5)


def test_channel_wise_does_not_see_constants_and_moves_none():
    student, teacher = random(2, 3, 4, 5).requires_grad_(), random(2, 3, 4, 5, seed=1)
    loss = channel_wise(student, teacher)
    shifted = channel_wise(student + random(2, 3, 1, 1, seed=2, scale=5), teacher - 7)
    assert loss.item() == pytest.approx(shifted.item(), rel=1e-4)
    assert gradient(loss, student).sum((2, 3)).abs().max() < 1e-6
    assert channel_wise(teacher + 3, teacher).item() == pytest.approx(0, abs=1e-6)


def test_dist_is_a_correlation_of_rows_and_columns():
    student, teacher = random(2, 4, 3, 3), random(2, 4, 3, 3, seed=1)
    s, t = (z.softmax(1).movedim(1, 3).reshape(-1, 4).numpy() for z in (student, teacher))
    rows = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(s, t, strict=True)])
    columns = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(s.T, t.T, strict=True)])
    assert dist(student, teacher, 1.0, 0.0).item() == pytest.approx(1 - rows, rel=1e-4)
    assert dist(student, teacher, 0.0, 1.0).item() == pytest.approx(1 - columns, rel=1e-4)
    assert dist(2 * teacher[:, :1], teacher[:, :1]).item() < 0.1  # binary: no sign, no gradient of 0


@pytest.mark.parametrize("name", ["kl", "cwd", "dist", "at", "ifvd"])
def test_void_pixels_change_nothing(name):
    labels = torch.zeros(2, 4, 6, dtype=torch.uint8)
    labels[:, :, 2:] = 1
    labels[:, :, 4:] = 255
    valid = annotated(labels, 3)
    losses = {
        "kl": lambda s, t: pixel_kl(s, t, 2.0, valid),
        "cwd": lambda s, t: channel_wise(s, t, 4.0, valid),
        "dist": lambda s, t: dist(s, t, valid=valid),
        "at": lambda s, t: attention_transfer(s, t, valid),
        "ifvd": lambda s, t: intra_class_variation(s, t, labels, 3),
    }
    student, teacher = random(2, 3, 4, 6).requires_grad_(), random(2, 3, 4, 6, seed=1)
    loss = losses[name](student, teacher)
    other = torch.where(valid[:, None], student, 9.0), torch.where(valid[:, None], teacher, random(2, 3, 4, 6, seed=3))
    assert loss.item() == pytest.approx(losses[name](*other).item(), rel=1e-5)
    slope = gradient(loss, student)
    assert slope.masked_select(~valid[:, None]).eq(0).all() and slope.abs().max() > 0
    if name in ("kl", "dist"):  # means over what is there: the same as without the void columns
        crop = {"kl": lambda s, t: pixel_kl(s, t, 2.0), "dist": dist}[name]
        assert loss.item() == pytest.approx(crop(student[..., :4], teacher[..., :4]).item(), rel=1e-5)


def test_all_void_is_zero_with_a_graph():
    student, teacher = random(2, 3, 4, 4).requires_grad_(), random(2, 3, 4, 4, seed=1)
    labels = torch.full((2, 4, 4), 255, dtype=torch.uint8)
    valid = annotated(labels, 3)
    memory = Memory(3, 3, 3, 20)
    losses = [pixel_kl(student, teacher, 1.0, valid), channel_wise(student, teacher, 4.0, valid)]
    losses += [dist(student, teacher, valid=valid)]
    losses += [intra_class_variation(student, teacher, labels, 3), attention_transfer(student, teacher, valid)]
    losses += memory(student, teacher, labels, lambda keys: keys)
    for loss in losses:
        assert loss.item() == 0 and gradient(loss, student).eq(0).all()
    assert memory.pixel.filled.sum() == 0


def test_a_loss_is_zero_between_a_network_and_itself_and_never_moves_the_teacher():
    student, teacher = random(2, 4, 6, 6).requires_grad_(), random(2, 4, 6, 6, seed=1).requires_grad_()
    labels = torch.randint(0, 4, (2, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for loss_of in (
        pixel_kl,
        channel_wise,
        dist,
        pairwise,
        attention_transfer,
        between_images,
        lambda s, t: intra_class_variation(s, t, labels, 4),
    ):
        assert loss_of(student, student.detach()).item() == pytest.approx(0, abs=1e-5)
        loss_of(student, teacher).backward()
    assert teacher.grad is None and student.grad.isfinite().all()


def test_pairwise_is_a_loop_over_pairs():
    student, teacher = random(1, 3, 2, 4), random(1, 5, 2, 4, seed=1)
    s, t = (F.max_pool2d(maps, 2)[0].flatten(1) for maps in (student, teacher))
    pairs = [(i, j) for i in range(2) for j in range(2)]
    square = [
        (F.cosine_similarity(s[:, i], s[:, j], 0) - F.cosine_similarity(t[:, i], t[:, j], 0)) ** 2 for i, j in pairs
    ]
    assert pairwise(student, teacher).item() == pytest.approx(sum(square).item() / 4, rel=1e-5)


def test_class_means_are_those_of_a_loop():
    student, teacher = random(2, 3, 3, 4), random(2, 5, 3, 4, seed=1)
    labels = torch.randint(0, 4, (2, 3, 4), generator=torch.Generator().manual_seed(0)).byte()
    labels[labels == 3] = 255
    square = []
    for n, y, x in (labels != 255).nonzero().tolist():
        same_class = labels[n] == labels[n, y, x]
        cosines = [F.cosine_similarity(f[n, :, y, x], f[n][:, same_class].mean(1), 0) for f in (student, teacher)]
        square.append((cosines[0] - cosines[1]) ** 2)
    by_loop = sum(square).item() / len(square)
    assert intra_class_variation(student, teacher, labels, 3).item() == pytest.approx(by_loop, rel=1e-4)


def test_relations_do_not_see_scale_and_rotation():
    student, teacher = random(2, 4, 4, 4), random(2, 6, 4, 4, seed=1)
    turn = torch.linalg.qr(random(4, 4, seed=2))[0]
    turned = torch.einsum("dc,nchw->ndhw", turn, student) * (0.5 + random(2, 1, 4, 4, seed=3).abs())
    assert between_images(student, teacher, pool=1).item() == pytest.approx(
        between_images(turned, teacher, pool=1).item(), rel=1e-4
    )
    scaled = 3 * teacher[:, :4]
    assert between_images(scaled, teacher[:, :4], pool=1).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_block_by_block_is_what_autograd_does_at_once(masked):
    s, keys_s, t, keys_t = (
        random(*shape, seed=i) for i, shape in enumerate([(2, 5, 3), (4, 6, 3), (2, 5, 7), (4, 6, 7)])
    )
    valid = torch.rand(4, 6, generator=torch.Generator().manual_seed(5)) < 0.7 if masked else None
    weight = torch.rand(2, 5, generator=torch.Generator().manual_seed(6))
    s, keys_s = s.requires_grad_(), keys_s.requires_grad_()

    def rows(anchors, keys):
        logits = torch.einsum("bac,gmc->bagm", anchors, keys) / 0.1
        return (logits if valid is None else logits.masked_fill(~valid, -1e4)).log_softmax(3)

    log_t = rows(t, keys_t)
    plain = (weight[:, :, None, None] * log_t.exp() * (log_t - rows(s, keys_s))).sum()
    ours = similarity_kl(s, keys_s, t, keys_t, weight, 0.1, valid)
    assert ours.item() == pytest.approx(plain.item(), rel=1e-5)
    for a, b in zip(
        torch.autograd.grad(2 * ours, (s, keys_s)), torch.autograd.grad(2 * plain, (s, keys_s)), strict=True
    ):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)


# queues


def test_queue_keeps_the_newest_and_turns_round():
    queue = ClassQueue(2, 3, 1)
    for first in range(0, 8, 2):
        keys = torch.arange(first, first + 2.0).view(2, 1, 1).expand(2, 2, 1)
        queue.push(keys, torch.tensor([[True, first == 0], [True, False]]))
    assert sorted(queue.keys[0, :3, 0].tolist()) == [5, 6, 7] and queue.position.tolist() == [2, 1]
    assert queue.filled.tolist() == [3, 1] and queue.keys[:, 3].eq(0).all()


def test_queue_takes_the_last_of_more_keys_than_it_holds_and_none_that_are_not_finite():
    queue = ClassQueue(1, 3, 1)
    keys = torch.tensor([0.0, 1, 2, math.nan, 4, 5]).view(6, 1, 1)
    queue.push(keys, torch.ones(6, 1, dtype=torch.bool))
    assert sorted(queue.keys[0, :3, 0].tolist()) == [2, 4, 5]


def test_queue_draws_filled_slots_only_and_each_once():
    torch.manual_seed(0)
    queue = ClassQueue(2, 10, 1)
    queue.push(torch.arange(1.0, 7).view(6, 1, 1).expand(6, 2, 1), torch.tensor([[True, False]]).expand(6, 2))
    seen = set()
    for _ in range(20):
        keys, filled = queue.draw(4)
        assert filled[0].all() and not filled[1].any()
        assert len(set(keys[0, :, 0].tolist())) == 4
        seen |= set(keys[0, :, 0].tolist())
    assert seen == {1, 2, 3, 4, 5, 6}
    keys, filled = queue.draw(8)
    assert filled.sum(1).tolist() == [6, 0] and queue.draw(99)[0].shape == (2, 10, 1)


def test_memory_stays_as_large_as_it_is_however_long_it_runs():
    torch.manual_seed(0)
    memory = Memory(3, 5, 2, 30, pixels=4)
    sizes = {name: buffer.shape for name, buffer in memory.named_buffers()}
    labels = torch.zeros(2, 6, 6, dtype=torch.uint8)
    for seed in range(12):
        losses = memory(random(2, 3, 6, 6, seed=seed), random(2, 5, 6, 6, seed=seed), labels, lambda keys: keys)
        assert all(loss.isfinite() and loss >= 0 for loss in losses)
    assert {name: buffer.shape for name, buffer in memory.named_buffers()} == sizes
    assert memory.pixel.filled.tolist() == [30, 0] and memory.region.filled.tolist() == [3, 0]
    assert torch.allclose(memory.pixel.keys[0, :30].norm(dim=1), torch.ones(30), atol=1e-5)
    assert sum(p.grad is not None for p in memory.parameters()) == 0


# grids and features


def test_grid_is_a_mean_of_squares_also_at_a_rim():
    maps = torch.arange(15.0).view(1, 1, 3, 5)
    assert to_grid(maps, 2).flatten().tolist() == [3, 5, 6.5, 10.5, 12.5, 14]
    assert to_grid(maps, 1) is maps
    mask = torch.arange(36).view(1, 6, 6).byte()
    assert labels_on(mask, 3).flatten().tolist() == [7, 10, 25, 28]  # the centres
    assert labels_on(mask, 1) is mask


@pytest.mark.parametrize("size", [33, 37, 50, 100])
def test_a_cell_has_a_label_of_its_own_pixels_also_where_it_is_cut_off(size):
    """The mask says in which cell a pixel lies."""
    row = torch.arange(size) // 8
    mask = (row[:, None] * 13 + row).byte()[None]
    cells = torch.arange(row.max() + 1)
    assert torch.equal(labels_on(mask, 8)[0], (cells[:, None] * 13 + cells).byte())


def test_void_pixels_have_no_part_in_their_cell():
    """Pixels of 255 in cells whose centre has a label: no value and no gradient comes from them."""
    maps, mask = random(1, 3, 8, 8).requires_grad_(), torch.zeros(1, 8, 8, dtype=torch.uint8)
    mask[:, :1], mask[:, 4:, 4:] = 255, 255
    keep = annotated(mask, 3)
    grid = to_grid(maps, 4, keep)
    assert torch.allclose(grid[0, :, 0, 0], maps[0, :, 1:4, :4].mean((1, 2)))
    assert grid[0, :, 1, 1].eq(0).all() and grid.isfinite().all()
    assert gradient(grid.square().sum(), maps).masked_select(~keep[:, None]).eq(0).all()
    assert torch.equal(to_grid(maps, 4, torch.ones_like(keep)), to_grid(maps, 4))


def test_very_negative_logits_are_not_taken_for_void():
    student, teacher = random(1, 2, 4, 4) - 2e5, random(1, 2, 4, 4, seed=1)
    valid = torch.ones(1, 4, 4, dtype=torch.bool)
    valid[:, :2] = False
    found = channel_wise(student, teacher - 2e5, 4.0, valid)
    assert found.item() == pytest.approx(channel_wise(student[:, :, 2:], teacher[:, :, 2:] - 2e5).item(), rel=1e-5)


@pytest.mark.parametrize("size", [40, 37])
def test_interpolated_features_lie_where_the_cells_are(size):
    """A map that says where it is, at a quarter of the resolution; 37 pixels: the last cell is cut off."""
    place = F.avg_pool2d(torch.arange(64.0).view(1, 1, 1, 64).expand(1, 1, 64, 64) + 0.5, 16)
    left = (64 - size) // 2
    found = on_grid(place, (size, size), 64, 8)[0, 0, 0]
    assert found.tolist() == pytest.approx([left + 4 + 8 * k for k in range(5)], abs=1e-3)


@pytest.mark.parametrize(
    "arch", ["PlainUNet", "PointRend", "Unet", "FPN", "PSPNet", "DeepLabV3", "DeepLabV3Plus", "FCN", "STDC1"]
)
def test_features_of_any_network_are_what_its_head_sees(arch):
    net = build_model(arch, "resnet18", width=4).eval()
    tap = FeatureTap(net, arch)
    with torch.no_grad():
        net(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
        found = tap.take((64, 64), 8)
    assert found.shape == (1, tap.channels, 8, 8) and tap.map is None
    with torch.inference_mode():
        net(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert tap.map is None


def test_padding_is_left_out_of_the_features():
    """A map that says where it is, of 40 x 40 images padded to 64 x 64, 12 pixels at each side."""
    place = torch.arange(64.0).view(1, 1, 1, 64).expand(1, 1, 64, 64) + 0.5
    found = on_grid(place, (40, 40), 64, 8)
    assert found.shape == (1, 1, 5, 5)
    assert found[0, 0, 2].tolist() == pytest.approx([12 + 4, 12 + 12, 12 + 20, 12 + 28, 12 + 36], abs=1e-3)
    coarse = F.avg_pool2d(place, 16)
    assert on_grid(coarse, (40, 40), 64, 8)[0, 0, 0].tolist() == pytest.approx([16, 24, 32, 40, 48], abs=1e-3)


# flags


def test_mixture_has_usual_weights_and_given_ones():
    assert mixture("kl") == {"kl": 1.0} and mixture("kl:2, cwd:0,skd") == {"kl": 2.0, "skd": 10.0}
    assert mixture("cirkd") == CIRKD and mixture("cirkd:2")["cirkd_pixel"] == pytest.approx(0.2)
    assert mixture("cirkd:0,kl:0") == {} and mixture("") == {}
    assert mixture(",".join(WEIGHTS)) == WEIGHTS
    for wrong in ("kd", "kl:x", "kl:-1", "kl:nan", ":3", "kl,kl:2", "cirkd,cirkd_pixel"):
        with pytest.raises(InputError, match="--distill"):
            mixture(wrong)


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--teacher", "nowhere.pt"], "no such checkpoint"),
        (["--teacher", ""], "--teacher: name the checkpoint"),
        (["--distill", ""], "say with --distill"),
        (["--cwd-temperature", "0"], "--cwd-temperature 0.0: must be above 0"),
        (["--distill", "skd", "--distill-stride", "1"], "--distill-stride 1"),
        (["--distill", "skd", "--distill-stride", "2"], "--distill-stride 2"),
        (["--distill-stride", "64"], "--distill-stride 64: is more than --size"),
        (["--distill", ","], "--distill ,: names no loss"),
        (["--distill", "cirkd", "--compile"], "--compile: features cannot"),
        (["--distill", "kd"], "--distill kd: use NAME"),
    ],
)
def test_mistakes_are_one_line(flags, what, tiny, tmp_path):
    with pytest.raises(InputError, match=what):
        launch("train_distill.py", tiny, tmp_path, "a", *flags)


def test_teacher_of_other_classes_or_inputs_is_refused(tiny, tmp_path):
    write_teacher(tmp_path / "three.pt", classes=3)
    with pytest.raises(InputError, match="has 3 classes, this run 1"):
        launch("train_distill.py", tiny, tmp_path, "a", "--teacher", str(tmp_path / "three.pt"))
    with pytest.raises(InputError, match=r"train_lad_student\.py"):
        launch("train_distill.py", tiny, tmp_path, "b", "--teacher", str(tiny / "lad_teacher.pt"))


# runs


ALL = ["--distill", "kl,cwd,dist,skd,ifvd,at:10,cwd_feature,cirkd", "--distill-stride", "4", "--cirkd-slots", "40"]


def state_of(folder):
    return read_checkpoint(folder / "last.pt")["losses"][0]


def test_projectors_and_queues_resume_on_the_same_bits(tiny, tmp_path, monkeypatch):
    flags = [*ALL, "--epochs", "3", "--optimizer", "ranger", "--precision", "bf16"]
    whole = launch("train_distill.py", tiny, tmp_path, "whole", *flags)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, 1)
        launch("train_distill.py", tiny, tmp_path, "parts", *flags)
    step = Steps.step

    def asking(self, *args, **kwargs):
        step(self, *args, **kwargs)
        stop.asked = self.images[:2] == (1, 1)  # in the middle of the second epoch

    with monkeypatch.context() as patch, pytest.raises(Paused), stop.listening():
        patch.setattr(Steps, "step", asking)
        launch("train_distill.py", tiny, tmp_path, "parts", *flags)
    assert read_checkpoint(tmp_path / "parts/last.pt")["inside"]["step"] == 2
    parts = launch("train_distill.py", tiny, tmp_path, "parts", *flags)
    own = state_of(tmp_path / "whole")
    assert own["1.memory.pixel.filled"].sum() > 0 and "1.match.weight" in own
    assert same(whole[0], parts[0]) and same(own, state_of(tmp_path / "parts"))
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "parts")


def test_every_part_is_logged_and_the_projector_learns(tiny, tmp_path):
    launch("train_distill.py", tiny, tmp_path, "one", *ALL, "--epochs", "1")
    first = state_of(tmp_path / "one")["1.memory.project.0.weight"]
    row = rows_of(tmp_path / "one")[0]
    assert all(row[f"train_{name}"] > 0 for name in WEIGHTS)
    launch("train_distill.py", tiny, tmp_path, "two", *ALL, "--epochs", "2")
    assert not torch.equal(first, state_of(tmp_path / "two")["1.memory.project.0.weight"])
    assert "teacher" not in " ".join(state_of(tmp_path / "two"))


def test_classes_with_void_and_released_quirks_run(tiny, tmp_path):
    write_teacher(tmp_path / "three.pt", classes=3)
    lists = ["--classes", "3", "--train_csv", "classes.csv", "--valid_csv", "classes_valid.csv", "--test_csv", ""]
    flags = [*ALL, *lists, "--teacher", str(tmp_path / "three.pt"), "--epochs", "1"]
    corrected = launch("train_distill.py", tiny, tmp_path, "a", *flags)
    released = launch("train_distill.py", tiny, tmp_path, "b", *flags, "--distill-compat", "released")
    assert not same(corrected[0], released[0])
    assert 0 < rows_of(tmp_path / "a")[0]["valid_miou"] <= 1


def test_fp16_accumulation_and_another_architecture_run(tiny, tmp_path):
    more = ["--precision", "fp16", "--accumulate", "2", "--skip-nonfinite", "--arch", "FPN", "--encoder", "resnet18"]
    launch("train_distill.py", tiny, tmp_path, "a", *ALL, "--epochs", "1", "--size", "32", *more)
    assert rows_of(tmp_path / "a")[0]["train_cirkd_batch"] >= 0


def test_points_of_pointrend_are_taught_too(tiny, tmp_path):
    more = ["--arch", "PointRend", "--encoder", "resnet18", "--size", "32", "--epochs", "1"]
    launch("train_distill.py", tiny, tmp_path, "a", *ALL, *more)
    assert rows_of(tmp_path / "a")[0]["train_cirkd_batch"] >= 0
    launch("train_lad_teacher.py", tiny, tmp_path, "t", *more, "--precision", "bf16")
    assert rows_of(tmp_path / "t")[0]["train_consistency"] >= 0


def test_teacher_judges_and_teaches_at_once_or_not(tiny, tmp_path):
    script, base = "train_with_KDweight.py", ["--epochs", "2", "--warmup", "0"]
    plain = launch(script, tiny, tmp_path, "plain", *base)
    teacher = ["--teacher", str(tiny / "teacher.pt")]
    neutral = launch(script, tiny, tmp_path, "neutral", *base, *teacher, "--distill", "kl:0,cirkd:0")
    both = launch(script, tiny, tmp_path, "both", *base, *teacher, *ALL)
    assert same(plain[0], neutral[0]) and not same(plain[0], both[0])
    assert rows_of(tmp_path / "both")[0]["train_kl"] > 0


def test_another_teacher_under_the_same_name_is_refused(tiny, tmp_path):
    write_teacher(tmp_path / "mine.pt")
    flags = ["--teacher", str(tmp_path / "mine.pt"), "--epochs", "1"]
    launch("train_distill.py", tiny, tmp_path, "a", *flags)
    write_teacher(tmp_path / "other.pt", classes=1, extra=1)
    (tmp_path / "other.pt").replace(tmp_path / "mine.pt")
    with pytest.raises(InputError, match="another content of --teacher"):
        launch("train_distill.py", tiny, tmp_path, "a", *flags)


def test_student_that_is_taught_more_is_nearer_to_its_teacher(tiny, tmp_path):
    apart = []
    for weight in (0.01, 20):
        launch("train_distill.py", tiny, tmp_path, f"by{weight}", "--distill", f"kl:{weight}", "--epochs", "5")
        apart.append(rows_of(tmp_path / f"by{weight}")[4]["train_kl"] / weight)
    assert apart[1] < 0.3 * apart[0]


def test_two_processes_have_the_same_queues_and_average_the_projector(tiny, tmp_path):
    words = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(ROOT / "train_distill.py"),
        *SMALL,
    ]
    words += ["--data-root", str(tiny), "--run-dir", str(tmp_path), "--name", "two", "--epochs", "2", *ALL]
    words += [f"--{name}_csv={tiny / name}.csv" for name in ("train", "valid", "test")]
    words += ["--teacher", str(tiny / "teacher.pt"), "--cirkd-slots", "400"]
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    own = state_of(tmp_path / "two")
    # background in every image, 6 images a process and epoch: the queue has what both have seen
    assert own["1.memory.region.filled"][0] == 24 == own["1.memory.region.position"][0]
    assert json.loads((tmp_path / "two/args.json").read_text())["processes"] == 2


def test_help_names_every_loss(capsys):
    import train_distill

    with pytest.raises(SystemExit):
        parse(train_distill.Args, ["--help"], train_distill.__doc__)
    text = "".join(capsys.readouterr().out.split())
    assert all(name in text for name in WEIGHTS) and BASE
