"""Networks by name: any size in, the same size out, masks and padding apart."""

import pytest
import torch

from utils.models import architectures, build_model, parameters
from utils.models.plain_unet import PlainUNet


def test_plain_unet_is_the_published_one():
    assert parameters(build_model("PlainUNet")) == 31_043_521


@pytest.mark.parametrize("arch", [name for name in architectures() if name != "DPT"])
def test_every_architecture_takes_any_size(arch):
    net = build_model(arch, "resnet18", width=4).eval()
    with torch.inference_mode():
        assert net(torch.zeros(1, 3, 131, 165, dtype=torch.uint8)).shape == (1, 1, 131, 165)


def test_padding_is_symmetric_reflection_and_cropped_back():
    class Record(torch.nn.Module):
        def forward(self, x):
            self.seen = x
            return x[:, :1]

    from utils.models import Segmenter

    net = Segmenter(Record(), 8, (0.0,) * 3, (1.0,) * 3)
    image = torch.arange(5 * 6).reshape(1, 1, 5, 6).expand(1, 3, 5, 6).to(torch.uint8)
    out = net(image)
    assert net.net.seen.shape == (1, 3, 8, 8)
    assert torch.allclose(out * 255, image[:, :1].float())
    assert torch.allclose(net.net.seen[0, 0, 0], net.net.seen[0, 0, 2])  # row -1 mirrors row 1


def test_images_smaller_than_the_padding_still_pass():
    net = build_model("FPN", "resnet18").eval()
    with torch.inference_mode():
        assert net(torch.zeros(1, 3, 1, 3, dtype=torch.uint8)).shape == (1, 1, 1, 3)


def test_plain_unet_has_as_many_outputs_as_classes_and_keeps_odd_sizes():
    assert PlainUNet(3, 4)(torch.zeros(2, 3, 33, 47)).shape == (2, 3, 33, 47)


def test_plain_unet_sees_zero_to_one_and_encoders_their_own_normalisation():
    white = torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)
    plain, other = build_model("PlainUNet", width=4), build_model("Unet", "resnet18")
    assert torch.allclose((white - plain.mean) / plain.std, torch.ones(1, 3, 1, 1))
    assert torch.allclose(((white - other.mean) / other.std).flatten()[0], torch.tensor((1 - 0.485) / 0.229))
