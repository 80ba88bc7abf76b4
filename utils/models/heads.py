"""Heads around a network that training uses and the finished network does not have."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.errors import InputError
from utils.models.plain_unet import PlainUNet

STRIDE = 4  # of the features that are contrasted


class Outputs(NamedTuple):
    """What a network with heads returns; what it has no head for is None."""

    logits: Tensor
    feature: Tensor | None = None
    auxiliary: Tensor | None = None


class WithHeads(nn.Module):
    """A `Segmenter` with a representation head and an auxiliary head, each where its size is not 0.

    `dim`: features (N, dim, h, w) from what the network's last layer sees, at stride 4 (or the network's own, where
    that is larger). `auxiliary`: as many outputs as the network has, (N, outputs, H, W), from the encoder's last stage
    but one. The network is `net` and its weights are saved without those of the heads, `heads`.
    """

    def __init__(self, net: nn.Module, dim: int = 0, auxiliary: bool = False, size: int = 64):
        super().__init__()
        self.net, self.heads, self.perturbed = net, nn.ModuleDict(), 0
        self.seen = None  # what the network holds on its way, while this module asks it
        if not isinstance(net.net, PlainUNet) and not hasattr(net.net, "segmentation_head"):
            what = f"--arch {type(net.net).__name__}: has no single last layer to put heads beside"
            raise InputError(f"{what}; use PlainUNet or an architecture of segmentation-models-pytorch")
        last = net.net.head if isinstance(net.net, PlainUNet) else net.net.segmentation_head
        last.register_forward_pre_hook(self._see_features)
        encoder = net.net.stages if isinstance(net.net, PlainUNet) else net.net.encoder
        encoder.register_forward_hook(self._see_stages)
        outputs, features, stage = self._probe(size)
        if dim:
            self.heads["represent"] = nn.Sequential(_block(features, dim), _block(dim, dim), nn.Conv2d(dim, dim, 1))
        if auxiliary and stage is None:
            raise InputError("--aux-weight: the encoder has no stages for it; choose another --encoder, or leave it 0")
        if auxiliary:
            self.heads["auxiliary"] = nn.Sequential(_block(stage, 256), nn.Conv2d(256, outputs, 1))

    def forward(self, image: Tensor, perturbed: int = 0) -> Outputs:
        """image (N, 3, H, W) uint8 -> `Outputs`; see the class.

        The last `perturbed` images have two sets of logits, the second (at the end) with half of the channels between
        encoder and decoder dropped at random: UniMatch (Yang et al., CVPR 2023).
        """
        logits, seen = self._ask(image, perturbed)
        feature, auxiliary, size = None, None, image.shape[2:]
        if "represent" in self.heads:
            feature = self.heads["represent"](self._on_grid(seen["features"], size))
        if "auxiliary" in self.heads:
            stage = self._uncovered(seen["stage"], size)
            auxiliary = F.interpolate(self.heads["auxiliary"](stage), size, mode="bilinear", align_corners=False)
        return Outputs(logits, feature, auxiliary)

    def _ask(self, image, perturbed=0):
        self.seen, self.perturbed = {}, perturbed
        try:
            return self.net(image), self.seen
        finally:
            self.seen = None

    def _see_features(self, _, inputs):
        if self.seen is not None:
            self.seen["features"] = inputs[0]

    def _see_stages(self, _, inputs, output):
        if self.seen is None:
            return None
        maps = [x for x in output if torch.is_tensor(x) and x.dim() == 4]
        self.seen["stage"] = maps[-2] if len(maps) > 1 else None
        return self._perturb(output) if self.perturbed else None

    def _perturb(self, x):
        """What the encoder gives, of the last images twice; maps lose half of their channels the second time."""
        if isinstance(x, (list, tuple)):
            return [self._perturb(one) for one in x]
        if x is None:
            return None
        again = x[-self.perturbed :]
        return torch.cat([x, F.dropout2d(again, 0.5, self.training) if x.dim() == 4 else again])

    @torch.no_grad()
    def _probe(self, size):
        """(outputs, channels before the last layer, channels of the auxiliary stage or None)."""
        training = self.net.training
        device = next(self.net.parameters()).device
        self.net.eval()
        logits, seen = self._ask(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device))
        self.net.train(training)
        stage = seen["stage"]
        return logits.shape[1], seen["features"].shape[1], None if stage is None else stage.shape[1]

    def _on_grid(self, feature, size):
        """Features at stride 4, without those of the padding; at their own stride where it is larger."""
        shrink = STRIDE * feature.shape[2] // (size[0] + -size[0] % self.net.stride)
        feature = F.avg_pool2d(feature, shrink) if shrink > 1 else feature
        return self._uncovered(feature, size)

    def _uncovered(self, feature, size):
        """Cut what belongs to the padding of the image off, to the nearest feature."""
        for dim, n in enumerate(size, 2):
            padding, have = -n % self.net.stride, feature.shape[dim]
            if padding:
                stride = (n + padding) / have
                count = max(1, round(n / stride))
                feature = feature.narrow(dim, min(round(padding // 2 / stride), have - count), count)
        return feature


def _block(a: int, b: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True), nn.Dropout2d(0.1))
