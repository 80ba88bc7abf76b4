"""Losses of pixels and images against plain loops, and hard masks."""

import math

import pytest
import torch

from utils.losses import hard, per_image_loss, per_pixel_loss


def binary(seed=0, n=3, shape=(4, 5)):
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(n, 1, *shape, generator=generator)
    return logits, torch.randint(0, 2, (n, *shape), generator=generator, dtype=torch.uint8)


def three_classes(seed=0, n=3, shape=(4, 5)):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, 3, *shape, generator=generator)
    mask = torch.randint(0, 4, (n, *shape), generator=generator, dtype=torch.uint8)
    return logits, torch.where(mask == 3, 255, mask)


def test_binary_loss_by_hand():
    logits, mask = binary()
    each = per_pixel_loss(logits, mask)
    for i, y, x in torch.ones_like(mask).nonzero().tolist():
        p = 1 / (1 + math.exp(-logits[i, 0, y, x].item()))
        assert each[i, y, x].item() == pytest.approx(-math.log(p if mask[i, y, x] else 1 - p), rel=1e-4, abs=1e-6)
    assert per_image_loss(logits, mask).tolist() == pytest.approx([each[i].mean().item() for i in range(3)], rel=1e-6)


def test_extreme_logits_stay_finite():
    logits = torch.tensor([200.0, -200.0]).view(2, 1, 1, 1).requires_grad_()
    loss = per_image_loss(logits, torch.zeros(2, 1, 1, dtype=torch.uint8))
    loss.sum().backward()
    assert loss.tolist() == [200, 0] and logits.grad.flatten().tolist() == [1, 0]


def test_three_class_loss_by_hand():
    logits, mask = three_classes()
    mask[2, 1:] = 255  # an image with few annotated pixels counts as much as any other
    each, means = per_pixel_loss(logits, mask), per_image_loss(logits, mask)
    for i in range(3):
        known = []
        for y, x in torch.ones_like(mask[i]).nonzero().tolist():
            z, label = logits[i, :, y, x].tolist(), mask[i, y, x].item()
            if label == 255:
                assert each[i, y, x] == 0
                continue
            known.append(math.log(sum(map(math.exp, z))) - z[label])
            assert each[i, y, x].item() == pytest.approx(known[-1], rel=1e-4, abs=1e-6)
        assert 0 < len(known) < 20 and means[i].item() == pytest.approx(sum(known) / len(known), rel=1e-5)


def test_an_image_without_annotation_costs_nothing():
    logits, mask = three_classes()
    mask[1] = 255
    logits.requires_grad_()
    loss = per_image_loss(logits, mask)
    loss.sum().backward()
    assert loss[1] == 0 and (loss[[0, 2]] > 0).all()
    assert logits.grad.isfinite().all() and not logits.grad[1].any() and logits.grad[0].any()


def test_ignored_pixels_get_no_gradient():
    logits, mask = three_classes()
    logits.requires_grad_()
    per_image_loss(logits, mask).sum().backward()
    void = (mask == 255)[:, None].expand_as(logits)
    assert void.any() and not logits.grad[void].any() and logits.grad[~void].all()


@pytest.mark.parametrize("draw", [binary, three_classes])
def test_bf16_logits_are_computed_in_float32(draw):
    logits, mask = draw()
    short = logits.bfloat16()
    for loss in (per_pixel_loss, per_image_loss):
        assert loss(short, mask).dtype == torch.float32
        assert torch.equal(loss(short, mask), loss(short.float(), mask))


def test_hard_binary_is_above_zero():
    logits = torch.tensor([-1.0, -1e-6, 0.0, 1e-6, 3.0]).view(1, 1, 1, 5).requires_grad_()
    mask = hard(logits)
    assert mask.tolist() == [[[0, 0, 0, 1, 1]]] and mask.dtype == torch.uint8 and not mask.requires_grad


def test_hard_is_the_largest_channel():
    logits = torch.tensor([[1.0, -3.0, 0.0], [2.0, -1.0, -1.0], [0.5, -2.0, 4.0]]).view(1, 3, 1, 3).requires_grad_()
    mask = hard(logits)
    assert mask.tolist() == [[[1, 1, 2]]] and mask.dtype == torch.uint8 and not mask.requires_grad
