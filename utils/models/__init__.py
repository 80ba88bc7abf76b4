"""Networks by name: the paper's plain U-Net, PointRend, STDC, FCN, OCRNet, and segmentation-models-pytorch's."""

import difflib
import http.client
import urllib.error

import torch
from torch import Tensor, nn

from utils.errors import InputError, first_line, out_of_memory
from utils.models.dilated import FCN, OCRNet
from utils.models.padding import pad_to
from utils.models.plain_unet import PlainUNet
from utils.models.pointrend import PointRend
from utils.models.stdc import BLOCKS, STDC
from utils.points import PointLogits

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Segmenter(nn.Module):
    """A network behind one door: uint8 RGB (N, 3, H, W) of any size in, logits (N, outputs, H, W) of that size out.

    Scales and normalises the image, pads it by reflection to what the network can divide, and crops the logits back.
    PointRend gives `PointLogits` in training. A network with `extra` input channels also takes maps (N, extra, H, W) in
    units of the image, and scales them as it; none means zeros, several give a tuple, one for each.
    """

    def __init__(self, net: nn.Module, stride: int, mean, std, extra: int = 0):
        super().__init__()
        self.net, self.stride, self.extra = net, stride, extra
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255)

    def forward(self, image: Tensor, *maps: Tensor) -> Tensor | PointLogits | tuple:
        x = (image.float() - self.mean) / self.std
        if not self.extra:
            return self._logits(x)
        maps = [each / self.std.mean() for each in maps] or [x.new_zeros(len(x), self.extra, *x.shape[2:])]
        found = tuple(self._logits(torch.cat([x, each], 1)) for each in maps)
        return found[0] if len(found) == 1 else found

    def _logits(self, x):
        if self.stride == 1:
            return self.net(x)
        h, w = x.shape[2:]
        x, top, left = pad_to(x, self.stride)
        return self.net(x)[:, :, top : top + h, left : left + w]


def build_model(
    arch: str,
    encoder: str = "",
    encoder_weights: str = "none",
    classes: int = 1,
    width: int = 64,
    extra: int = 0,
    extra_init: str = "rgb",
):
    """A `Segmenter` with `classes` outputs; InputError for an unknown name or weights that cannot be fetched.

    PlainUNet sees images in [0, 1], as published; the others the normalisation their encoder was trained with. With
    `extra` input channels it is the same network, drawn from the same numbers, and `extra_init` their first filter.
    """
    plain = encoder_weights in ("none", "")
    if arch in ("PlainUNet", *BLOCKS) and not plain:
        raise InputError(f"--encoder-weights: {arch} has no pretrained weights; use `--encoder-weights none`")
    if arch not in architectures():
        raise InputError(f"--arch {arch}: unknown architecture; {_suggest(arch, architectures())}")

    def make(inputs, weights):
        if arch == "PlainUNet":
            return PlainUNet(classes, width, inputs)
        return STDC(arch, classes, inputs) if arch in BLOCKS else _from_library(arch, encoder, weights, classes, inputs)

    net = make(3, None if plain else encoder_weights)
    if extra:
        net = _widened(net, make(3 + extra, None), extra_init)
    if arch == "PlainUNet":
        return Segmenter(net, 16, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), extra)
    stride = 32 if net.requires_divisible_input_shape else 1
    return Segmenter(net, stride, *(IMAGENET if arch in BLOCKS else _normalisation(encoder, encoder_weights)), extra)


@torch.no_grad()
def _widened(net, wide, init):
    """`wide` with the weights of `net`, whose filters of the image stay as they are, bit for bit.

    The others are drawn with the standard deviation of those ("rgb") or with 0.1 ("released"), or are 0 ("zero").
    """
    state, narrow = wide.state_dict(), net.state_dict()
    for name, weight in state.items():
        old = narrow[name]
        if old.shape == weight.shape:
            weight.copy_(old)
            continue
        weight[:, :3] = old
        weight[:, 3:] = {"rgb": old.std(), "released": 0.1, "zero": 0.0}[init] * torch.randn_like(weight[:, 3:])
    wide.load_state_dict(state)
    return wide


def architectures() -> dict:
    """Every network by name."""
    import segmentation_models_pytorch as smp  # two seconds, which `--help` does not spend

    own = {"PlainUNet": PlainUNet, "PointRend": PointRend, "FCN": FCN, "OCRNet": OCRNet}
    own |= dict.fromkeys(BLOCKS, STDC)
    return own | {cls.__name__: cls for cls in smp.MODEL_ARCHITECTURES_MAPPING.values()}


def parameters(net: nn.Module) -> int:
    """How many numbers the network learns."""
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


def _from_library(arch, encoder, weights, classes, inputs):
    import segmentation_models_pytorch as smp
    from huggingface_hub.utils import logging as hub_logging

    if not encoder.startswith("tu-") and encoder not in smp.encoders.encoders:
        raise InputError(
            f"--encoder {encoder}: unknown encoder; {_suggest(encoder, smp.encoders.get_encoder_names())}, or tu-NAME "
            "for an encoder of timm"
        )
    more = {"dynamic_img_size": True} if arch == "DPT" else {}
    hub_logging.set_verbosity_error()  # it would report every retry; the error below says it once
    try:
        return architectures()[arch](
            encoder_name=encoder, encoder_weights=weights, in_channels=inputs, classes=classes, **more
        )
    except (OSError, http.client.HTTPException, urllib.error.URLError) as error:
        raise InputError(
            f"--encoder-weights {weights}: the weights of {encoder} cannot be fetched ({first_line(error)}); "
            "without a network use `--encoder-weights none`"
        ) from None
    except (KeyError, ValueError, RuntimeError) as error:  # what the libraries raise for a name they do not know
        if out_of_memory(error):
            raise
        what = f"--arch {arch} --encoder {encoder} --encoder-weights {weights}"
        raise InputError(f"{what}: {first_line(error)}") from None


def _normalisation(encoder, weights):
    if weights in ("none", ""):
        return IMAGENET  # the library would ask the network even for an encoder without weights
    import segmentation_models_pytorch as smp

    found = smp.encoders.get_preprocessing_params(encoder, weights)
    scale = 255.0 if found.get("input_range", [0, 1])[-1] == 255 else 1.0
    return tuple(m / scale for m in found["mean"]), tuple(s / scale for s in found["std"])


def _suggest(name, names):
    close = difflib.get_close_matches(name, list(names), 3, 0.5)
    return f"did you mean {', '.join(close)}?" if close else f"known are {', '.join(sorted(names)[:12])}, ..."
