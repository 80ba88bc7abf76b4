"""PointRend (Kirillov et al., CVPR 2020): a network that looks again at the pixels it is least sure of."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.models.padding import pad_to
from utils.points import PointLogits, draw_points, sample, uncertainty

STRIDE = 32  # of the encoder


class PointRend(nn.Module):
    """Semantic PointRend on any encoder: (N, 3, H, W) -> in training `PointLogits`, else logits (N, classes, H, W).

    The coarse network is the library's FPN, whose logits have a quarter of the image's height and width. The point head
    sees them and the encoder's stages at half and quarter resolution. In training it is asked about H W / 16 pixels, in
    inference about as many at half and again at full resolution: 16 times what the paper takes, whose images are large
    enough for a contour to be a small part of them (benchmarks/teachers.md).
    """

    requires_divisible_input_shape = False  # it pads by itself, so that no point lies outside of the image

    def __init__(self, encoder_name: str, encoder_weights: str | None, in_channels: int = 3, classes: int = 1):
        super().__init__()
        import segmentation_models_pytorch as smp  # two seconds, which other networks do not spend

        how = {"encoder_weights": encoder_weights, "in_channels": in_channels}
        self.coarse = smp.FPN(encoder_name, classes=classes, upsampling=1, **how)
        self.head = PointHead(sum(self.coarse.encoder.out_channels[1:3]), classes)
        self.every = 16  # pixels for a point; 0: no points, the coarse network alone

    def forward(self, x: Tensor) -> Tensor | PointLogits:
        h, w = x.shape[2:]
        x, top, left = pad_to(x, STRIDE)
        features = self.coarse.encoder(x)
        coarse = self.coarse.segmentation_head(self.coarse.decoder(features))
        fine = [maps for maps in features[1:3] if maps.shape[1]]  # some encoders begin with an empty stage
        if self.every and not self.training:
            return self._subdivide(coarse, fine, *x.shape[2:])[:, :, top : top + h, left : left + w]
        whole = _enlarge(coarse, *x.shape[2:])[:, :, top : top + h, left : left + w]
        if not self.every:
            return whole
        at = draw_points(whole, max(1, h * w // self.every))
        padded = (at // w + top) * x.shape[3] + at % w + left
        return PointLogits(whole, self._ask(coarse, fine, padded, *x.shape[2:]), at)

    def _subdivide(self, coarse: Tensor, fine: list[Tensor], height: int, width: int) -> Tensor:
        logits = coarse
        for h, w in ((height // 2, width // 2), (height, width)):
            logits = _enlarge(logits, h, w)
            at = uncertainty(logits).flatten(1).topk(min(height * width // self.every, h * w), 1).indices
            points = self._ask(coarse, fine, at, h, w).to(logits.dtype)
            at = at[:, None].expand(-1, logits.shape[1], -1)
            logits = logits.flatten(2).scatter(2, at, points).view_as(logits)
        return logits

    def _ask(self, coarse, fine, at, height, width) -> Tensor:
        seen = torch.cat([sample(maps, at, height, width) for maps in fine], 1)
        return self.head(seen, sample(coarse, at, height, width))


class PointHead(nn.Module):
    """Three layers for every point: features (N, F, P), coarse logits (N, C, P) -> logits (N, C, P).

    Every layer sees the coarse logits again, as in the semantic variant of the authors' code.
    """

    def __init__(self, features: int, classes: int, width: int = 256):
        super().__init__()
        inputs = [features + classes, width + classes, width + classes]
        self.layers = nn.ModuleList(nn.Conv1d(count, width, 1) for count in inputs)
        self.predict = nn.Conv1d(width + classes, classes, 1)
        for layer in self.layers:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.predict.weight, std=0.001)
        nn.init.zeros_(self.predict.bias)

    def forward(self, x: Tensor, coarse: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.relu(layer(torch.cat([x, coarse], 1)))
        return self.predict(torch.cat([x, coarse], 1))


def _enlarge(logits: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(logits, (height, width), mode="bilinear", align_corners=False)
