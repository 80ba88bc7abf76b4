"""STDC-Seg (Fan et al., "Rethinking BiSeNet for real-time semantic segmentation", CVPR 2021), without detail head."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS = {"STDC1": (2, 2, 2), "STDC2": (4, 5, 3)}  # short-term dense concatenations at strides 8, 16 and 32


class STDC(nn.Module):
    """Logits (N, classes, H, W) of images (N, inputs, H, W) of any size; judged at stride 8, enlarged bilinearly."""

    requires_divisible_input_shape = False

    def __init__(self, arch: str, classes: int = 1, inputs: int = 3):
        super().__init__()
        self.encoder = STDCEncoder(BLOCKS[arch], inputs)
        self.refine = nn.ModuleList(AttentionRefinement(c, 128) for c in (512, 1024))
        self.whole = conv(1024, 128, 1)
        self.after = nn.ModuleList(conv(128, 128, 3) for _ in range(2))
        self.fuse = FeatureFusion(256 + 128, 256)
        self.segmentation_head = nn.Sequential(conv(256, 256, 3), nn.Conv2d(256, classes, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        fine, middle, coarse = self.encoder(x)
        context = self.whole(coarse.mean((2, 3), keepdim=True))
        for i, maps in ((1, coarse), (0, middle)):
            context = self.refine[i](maps) + F.interpolate(context, maps.shape[2:])
            target = middle if i else fine
            context = self.after[i](F.interpolate(context, target.shape[2:]))
        logits = self.segmentation_head(self.fuse(fine, context))
        return F.interpolate(logits, x.shape[2:], mode="bilinear", align_corners=True)


class STDCEncoder(nn.Module):
    """The features at strides 8, 16 and 32, of 256, 512 and 1024 channels."""

    def __init__(self, blocks: tuple[int, ...], inputs: int = 3):
        super().__init__()
        self.stem = nn.Sequential(conv(inputs, 32, 3, 2), conv(32, 64, 3, 2))
        stages, before = [], 64
        for count, channels in zip(blocks, (256, 512, 1024), strict=True):
            first = DenseConcatenation(before, channels, 2)
            stages.append(nn.Sequential(first, *(DenseConcatenation(channels, channels) for _ in range(count - 1))))
            before = channels
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        found, x = [], self.stem(x)
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found


class DenseConcatenation(nn.Module):
    """Four convolutions one after the other, of 1/2, 1/4, 1/8 and 1/8 of the channels, side by side."""

    def __init__(self, before: int, channels: int, stride: int = 1):
        super().__init__()
        half = channels // 2
        self.first = conv(before, half, 1)
        self.shrink = self.skip = nn.Identity()
        if stride == 2:
            self.shrink = nn.Sequential(nn.Conv2d(half, half, 3, 2, 1, groups=half, bias=False), nn.BatchNorm2d(half))
            self.skip = nn.AvgPool2d(3, 2, 1)
        quarter, eighth = channels // 4, channels // 8
        self.rest = nn.ModuleList([conv(half, quarter, 3), conv(quarter, eighth, 3), conv(eighth, eighth, 3)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        found, x = [self.skip(x)], self.shrink(x)
        for layer in self.rest:
            x = layer(x)
            found.append(x)
        return torch.cat(found, 1)


class AttentionRefinement(nn.Module):
    """A convolution whose channels are weighed by what the whole image has of them (BiSeNet)."""

    def __init__(self, before: int, channels: int):
        super().__init__()
        self.conv = conv(before, channels, 3)
        self.weigh = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x * self.weigh(x)


class FeatureFusion(nn.Module):
    """Detail and context side by side, mixed, and each channel strengthened by its weight (BiSeNet)."""

    def __init__(self, before: int, channels: int):
        super().__init__()
        self.mix = conv(before, channels, 1)
        self.weigh = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, channels // 4, 1, bias=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels // 4, channels, 1, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, detail: Tensor, context: Tensor) -> Tensor:
        x = self.mix(torch.cat([detail, context], 1))
        return x * self.weigh(x) + x


def conv(before: int, channels: int, size: int, stride: int = 1) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU."""
    layer = nn.Conv2d(before, channels, size, stride, size // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
