"""The plain U-Net of the NLKD experiments (Ronneberger et al., MICCAI 2015, with BatchNorm and padded convolutions)."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainUNet(nn.Module):
    """U-Net of widths w, 2w, 4w, 8w, 16w: (N, inputs, H, W) -> (N, outputs, H, W) for any H, W of 16 or more.

    With width 64 and one output it has the 31,043,521 parameters of the published network.
    """

    def __init__(self, outputs: int = 1, width: int = 64, inputs: int = 3):
        super().__init__()
        widths = [width * 2**i for i in range(5)]
        self.down = nn.ModuleList(_block(a, b) for a, b in zip([inputs, *widths[:-1]], widths, strict=True))
        widths.reverse()
        pairs = list(itertools.pairwise(widths))
        self.grow = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in pairs)
        self.up = nn.ModuleList(_block(a, b) for a, b in pairs)
        self.stages = nn.Identity()  # where all that the encoder found can be seen
        self.head = nn.Conv2d(width, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for i, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if i else x)
            skips.append(x)
        *skips, x = self.stages(skips)
        for grow, block in zip(self.grow, self.up, strict=True):
            x, skip = grow(x), skips.pop()
            high, wide = skip.shape[2] - x.shape[2], skip.shape[3] - x.shape[3]
            x = F.pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2))
            x = block(torch.cat([skip, x], 1))
        return self.head(x)


def _block(a: int, b: int) -> nn.Sequential:
    layers = []
    for c in (a, b):
        layers += [nn.Conv2d(c, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)
