"""FCN and OCRNet on any encoder that can be dilated to stride 8."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.models.stdc import conv


class Dilated(nn.Module):
    """An encoder of segmentation-models-pytorch at stride 8, a decoder and a head; logits as large as the image."""

    requires_divisible_input_shape = False

    def __init__(self, encoder_name: str, encoder_weights: str | None, in_channels: int):
        super().__init__()
        from segmentation_models_pytorch.encoders import get_encoder  # two seconds, which other networks do not spend

        self.encoder = get_encoder(
            encoder_name, in_channels=in_channels, depth=5, weights=encoder_weights, output_stride=8
        )

    def forward(self, x: Tensor) -> Tensor:
        logits = self.segmentation_head(self.decoder(self.encoder(x)))
        return F.interpolate(logits, x.shape[2:], mode="bilinear", align_corners=True)


class FCN(Dilated):
    """Torchvision's FCN head on the last stage (Long et al., CVPR 2015)."""

    def __init__(self, encoder_name: str, encoder_weights: str | None = None, in_channels: int = 3, classes: int = 1):
        super().__init__(encoder_name, encoder_weights, in_channels)
        from torchvision.models.segmentation.fcn import FCNHead

        *layers, last = FCNHead(self.encoder.out_channels[-1], classes)
        self.decoder, self.segmentation_head = nn.Sequential(Last(), *layers), last


class OCRNet(Dilated):
    """Object-contextual representations (Yuan et al., ECCV 2020) on the last two stages, without auxiliary loss.

    The soft regions, which the authors also supervise, learn from the final logits alone.
    """

    def __init__(self, encoder_name: str, encoder_weights: str | None = None, in_channels: int = 3, classes: int = 1):
        super().__init__(encoder_name, encoder_weights, in_channels)
        *_, before, last = self.encoder.out_channels
        self.decoder = ObjectContext(before, last, max(2, classes))
        self.segmentation_head = nn.Conv2d(512, classes, 1)


class ObjectContext(nn.Module):
    """The features of the last stage, 512 channels, beside what the `regions` look like to which each pixel belongs.

    Section 3.2: soft regions from the stage before (7), region features as means weighted by them (4), a relation of
    every pixel to every region by scaled dot products (5), the regions' features mixed by it (6).
    """

    def __init__(self, before: int, last: int, regions: int, width: int = 512, key: int = 256):
        super().__init__()
        self.regions = nn.Sequential(conv(before, width, 3), nn.Dropout2d(0.05), nn.Conv2d(width, regions, 1))
        self.pixels = conv(last, width, 3)
        self.query = nn.Sequential(conv(width, key, 1), conv(key, key, 1))
        self.key = nn.Sequential(conv(width, key, 1), conv(key, key, 1))
        self.value, self.back = conv(width, key, 1), conv(key, width, 1)
        self.join = nn.Sequential(conv(2 * width, width, 1), nn.Dropout2d(0.05))

    def forward(self, features: list[Tensor]) -> Tensor:
        pixels = self.pixels(features[-1])
        share = self.regions(features[-2]).flatten(2).softmax(2)
        objects = (share @ pixels.flatten(2).transpose(1, 2)).transpose(1, 2)[..., None]  # (N, width, regions, 1)
        query, key, value = (
            maps.flatten(2).transpose(1, 2) for maps in (self.query(pixels), self.key(objects), self.value(objects))
        )
        context = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        context = self.back(context.unflatten(2, pixels.shape[2:]))
        return self.join(torch.cat([context, pixels], 1))


class Last(nn.Module):
    """The last of several maps."""

    def forward(self, features: list[Tensor]) -> Tensor:
        return features[-1]
