"""The features that a network's last layers judge by, on a grid that any two networks can share."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.errors import InputError
from utils.models.pointrend import STRIDE, PointRend


class FeatureTap:
    """The input of the head of a `Segmenter`, (N, channels, ., .), as it was in the newest forward pass with gradients
    or under `no_grad`; what evaluation does in inference mode is not kept.

    The network stays as it is: a hook looks at what passes. `take` gives the map away, so that it is not kept longer.
    """

    def __init__(self, net: nn.Module, arch: str):
        inner = net.net.coarse if isinstance(net.net, PointRend) else net.net
        head = getattr(inner, "segmentation_head", None) or getattr(inner, "head", None)
        if head is None:
            raise InputError(f"--arch {arch}: its features are not known here; use --distill kl, cwd or dist")
        self.stride, self.map = (STRIDE if inner is not net.net else net.stride), None
        self.channels = next(m.in_channels for m in head.modules() if isinstance(m, nn.Conv2d))
        head.register_forward_pre_hook(self._keep)

    def take(self, size, stride: int) -> Tensor:
        """The features of images of `size` (H, W) on a grid of ceil(H / stride) by ceil(W / stride) cells, float32."""
        found, self.map = self.map, None
        return on_grid(found.float(), size, self.stride, stride)

    def _keep(self, _module, inputs):
        if not torch.is_inference_mode_enabled():
            self.map = inputs[0]


def on_grid(features: Tensor, size, padded: int, stride: int) -> Tensor:
    """Features (N, C, ., .) of images padded to a multiple of `padded`, averaged or interpolated to the cells of those
    without padding: (N, C, ceil(H / stride), ceil(W / stride)) for `size` (H, W).
    """
    full = [n + -n % padded for n in size]
    cells = [-(-n // stride) for n in size]
    k = max(1, stride * features.shape[2] // full[0])
    if k > 1:
        features = F.avg_pool2d(features, k, ceil_mode=True, count_include_pad=False)
    if full == list(size) and list(features.shape[2:]) == cells:
        return features
    where = features.new_zeros(1, 2, 3)
    for row, (n, whole, count) in enumerate(zip(reversed(size), reversed(full), reversed(cells), strict=True)):
        wide = count * stride  # the last cell may reach beyond the image
        where[0, row, row] = wide / whole
        where[0, row, 2] = (2 * ((whole - n) // 2) + wide) / whole - 1
    where = where.expand(len(features), 2, 3)
    grid = F.affine_grid(where, [len(features), 1, *cells], align_corners=False)
    return F.grid_sample(features, grid, padding_mode="border", align_corners=False)
