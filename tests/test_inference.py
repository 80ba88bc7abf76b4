"""Probabilities of whole images and of windows: what must come out follows from networks that see single pixels."""

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from utils import inference
from utils.inference import Plan, Probabilities, axis_windows, enlarge, predict_probability, slide


class Pointwise(nn.Module):
    """Logits that depend on their own pixel only."""

    def __init__(self, classes=1, seed=0):
        super().__init__()
        self.conv = nn.Conv2d(3, classes, 1)
        generator = torch.Generator().manual_seed(seed)
        self.conv.weight.data = torch.randn(classes, 3, 1, 1, generator=generator)
        self.seen = []

    def forward(self, image):
        self.seen.append(tuple(image.shape))
        return self.conv(image.float() / 64 - 2)


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@torch.inference_mode()
def direct(net, image):
    logits = net(torch.from_numpy(image).permute(2, 0, 1)[None])[0]
    return (logits.sigmoid() if len(logits) == 1 else logits.softmax(0)).numpy()


@pytest.mark.parametrize("length", [1, 5, 31, 32, 33, 48, 63, 64, 65, 97, 1000])
@pytest.mark.parametrize("overlap", [0, 0.3, 0.5, 0.95])
def test_windows_cover_every_pixel_with_weights_that_sum_to_one(length, overlap):
    starts, weights = axis_windows(length, 32, overlap)
    assert (weights > 0).all() and weights.shape == (len(starts), min(32, length))
    total = np.zeros(length)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + len(weight)] += weight
    assert np.allclose(total, 1, atol=1e-12)
    assert starts[0] == 0 and starts[-1] == max(0, length - 32)
    assert (np.diff(starts) <= max(1, 32 * (1 - overlap))).all()


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize(
    ("shape", "window", "overlap"),
    [((75, 101), 32, 0.5), ((40, 33), 17, 0.3), ((64, 64), 32, 0), ((20, 90), 32, 0.75), ((9, 7), 32, 0.5)],
)
def test_windows_of_a_pointwise_network_give_its_own_output(classes, shape, window, overlap):
    net, image = Pointwise(classes), picture(*shape)
    plan = Plan(size=window, mode="slide", overlap=overlap, batch_size=3)
    found = predict_probability(Probabilities([net]), image, plan)
    assert found.shape == (classes, *shape) and found.dtype == np.float32
    expected = direct(net, image)
    assert np.abs(found - expected).max() < 2e-6
    assert all(seen[2:] == (min(window, shape[0]), min(window, shape[1])) for seen in net.seen[:-1])


def test_windows_are_averaged_with_less_weight_at_their_border():
    class Left(nn.Conv2d):
        """Sees only whether a pixel lies in the left half of the window."""

        def forward(self, image):
            x = torch.arange(image.shape[3]).expand(len(image), 1, image.shape[2], -1)
            return torch.where(x < image.shape[3] // 2, 20.0, -20.0)

    found = predict_probability(Probabilities([Left(3, 1, 1)]), picture(8, 12), Plan(size=8, mode="slide"))[0, 0]
    # two windows, 0 to 8 and 4 to 12; columns 4 to 8 are right in the first and left in the second
    hann = np.sin(np.pi * (np.arange(8) + 0.5) / 8) ** 2
    assert np.allclose(found, [1] * 4 + list(hann[:4] / (hann[:4] + hann[4:])) + [0] * 4, atol=1e-5)


def test_windows_see_the_scale_of_training():
    # training shrank files of 64 pixels to 16: a window covers 64 pixels and the network sees 16
    net, image = Pointwise(), cv2.resize(picture(5, 7), (280, 200), interpolation=cv2.INTER_CUBIC)
    plan = Plan(size=16, side=64)
    assert plan.slides((200, 280)) and not plan.slides((128, 5000)) and not Plan(size=16).slides((5000, 5000))
    found = predict_probability(Probabilities([net]), image, plan)
    assert {seen[2:] for seen in net.seen} == {(16, 16)}
    small = direct(net, cv2.resize(image, (70, 50), interpolation=cv2.INTER_AREA))
    assert np.abs(found - enlarge(small, (200, 280))).mean() < 0.01


def test_networks_that_resized_nothing_slide_above_a_number_of_pixels(monkeypatch):
    monkeypatch.setattr(inference, "LARGE", 50 * 50)
    monkeypatch.setattr(inference, "WINDOW", 24)
    net = Pointwise()
    for shape in ((50, 50), (50, 51)):
        found = predict_probability(Probabilities([net]), picture(*shape), Plan(size=0))
        assert np.abs(found - direct(net, picture(*shape))).max() < 2e-6
    assert net.seen[0][2:] == (50, 50) and {seen[2:] for seen in net.seen[2:-1]} == {(24, 24)}


def test_a_whole_image_is_resized_as_in_training_and_its_probabilities_enlarged():
    net, image = Pointwise(3), picture(50, 70)
    found = predict_probability(Probabilities([net]), image, Plan(size=16))
    small = direct(net, cv2.resize(image, (16, 16), interpolation=cv2.INTER_AREA))
    expected = [cv2.resize(plane, (70, 50), interpolation=cv2.INTER_LINEAR) for plane in small]
    assert np.abs(found - np.stack(expected)).max() < 1e-6


@pytest.mark.parametrize("mode", ["resize", "slide"])
def test_scales_and_mirroring_change_nothing_where_the_image_is_constant(mode):
    net, image = Pointwise(3), np.full((45, 61, 3), (200, 30, 90), np.uint8)
    plain = predict_probability(Probabilities([net]), image, Plan(size=20, mode=mode))
    plan = Plan(size=20, mode=mode, scales=(0.5, 1.0, 1.7), flip=True)
    assert np.abs(predict_probability(Probabilities([net]), image, plan) - plain).max() < 2e-6
    assert np.abs(plain - direct(net, image)).max() < 2e-6


def test_scales_and_mirroring_are_means_of_single_runs():
    torch.manual_seed(0)
    net, image = Probabilities([nn.Conv2d(3, 2, 3, padding=1).to(torch.float32)]), picture(40, 30)
    net.nets[0].register_forward_pre_hook(lambda _, inputs: (inputs[0].float() / 64 - 2,))
    parts = [predict_probability(net, image, Plan(size=16, scales=(scale,))) for scale in (0.5, 1.0)]
    both = predict_probability(net, image, Plan(size=16, scales=(0.5, 1.0)))
    assert np.allclose(both, (parts[0] + parts[1]) / 2, atol=1e-6) and not np.allclose(both, parts[0], atol=1e-3)
    turned = predict_probability(net, np.ascontiguousarray(image[:, ::-1]), Plan(size=16))[..., ::-1]
    flipped = predict_probability(net, image, Plan(size=16, flip=True))
    assert np.allclose(flipped, (parts[1] + turned) / 2, atol=1e-5) and not np.allclose(flipped, turned, atol=1e-3)


def test_several_networks_are_averaged():
    nets, image = [Pointwise(3, seed) for seed in range(3)], picture(20, 20)
    found = predict_probability(Probabilities(nets), image, Plan(size=0))
    assert np.allclose(found, np.mean([direct(net, image) for net in nets], axis=0), atol=1e-6)


def test_rows_of_a_large_map_are_those_of_the_whole(monkeypatch):
    maps = [np.random.default_rng(i).random((3, 11, 13), np.float32) for i in range(2)]
    for shape in ((50, 41), (7, 5), (11, 13)):
        whole = np.concatenate([band for _, band in inference.enlarged_bands(maps, shape)], axis=1)
        monkeypatch.setattr(inference, "_BAND", 3 * shape[1] * 4)
        bands = list(inference.enlarged_bands(maps, shape))
        monkeypatch.undo()
        assert [top for top, _ in bands] == list(range(0, shape[0], 4))
        assert np.abs(np.concatenate([band for _, band in bands], axis=1) - whole).max() < 1e-6


def test_windows_need_memory_for_some_rows_only():
    image, alive, most, net = np.zeros((3000, 40, 3), np.uint8), 0, 0, Pointwise(8)
    for top, band in slide(Probabilities([net]), image, Plan(size=20, mode="slide")):
        assert top == alive and band.shape[0] == 8 and band.shape[2] == 40
        assert len(net.seen) * 10 <= top + 40  # windows are run when their rows come, not all before
        alive, most = top + band.shape[1], max(most, band.shape[1])
    assert alive == 3000 and most <= 20


def test_bfloat16_stays_near_and_gives_float32():
    net, image = Pointwise(), picture(30, 30)
    exact, near = (predict_probability(Probabilities([net]), image, Plan(0, precision=p)) for p in ("fp32", "bf16"))
    assert near.dtype == np.float32 and 0 < np.abs(near - exact).max() < 0.05
