"""Networks by name: the paper's plain U-Net, PointRend, and what segmentation-models-pytorch has."""

import difflib
import http.client
import urllib.error

import torch
from torch import Tensor, nn

from utils.errors import InputError, first_line, out_of_memory
from utils.models.padding import pad_to
from utils.models.plain_unet import PlainUNet
from utils.models.pointrend import PointRend
from utils.points import PointLogits

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Segmenter(nn.Module):
    """A network behind one door: uint8 RGB (N, 3, H, W) of any size in, logits (N, outputs, H, W) of that size out.

    Scales and normalises the image, pads it by reflection to what the network can divide, and crops the logits back.
    PointRend gives `PointLogits` in training.
    """

    def __init__(self, net: nn.Module, stride: int, mean, std):
        super().__init__()
        self.net, self.stride = net, stride
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255)

    def forward(self, image: Tensor) -> Tensor | PointLogits:
        x = (image.float() - self.mean) / self.std
        if self.stride == 1:
            return self.net(x)
        h, w = x.shape[2:]
        x, top, left = pad_to(x, self.stride)
        return self.net(x)[:, :, top : top + h, left : left + w]


def build_model(arch: str, encoder: str = "", encoder_weights: str = "none", classes: int = 1, width: int = 64):
    """A `Segmenter` with `classes` outputs; InputError for an unknown name or weights that cannot be fetched.

    PlainUNet sees images in [0, 1], as published; the others the normalisation their encoder was trained with.
    """
    if arch == "PlainUNet":
        if encoder_weights not in ("none", ""):
            raise InputError("--encoder-weights: PlainUNet has no pretrained weights; use `--encoder-weights none`")
        return Segmenter(PlainUNet(classes, width), 16, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    if arch not in architectures():
        raise InputError(f"--arch {arch}: unknown architecture; {_suggest(arch, architectures())}")
    net = _from_library(arch, encoder, None if encoder_weights in ("none", "") else encoder_weights, classes)
    stride = 32 if net.requires_divisible_input_shape else 1
    return Segmenter(net, stride, *_normalisation(encoder, encoder_weights))


def architectures() -> dict:
    """Every network by name."""
    import segmentation_models_pytorch as smp  # two seconds, which PlainUNet and `--help` do not spend

    own = {"PlainUNet": PlainUNet, "PointRend": PointRend}
    return own | {cls.__name__: cls for cls in smp.MODEL_ARCHITECTURES_MAPPING.values()}


def parameters(net: nn.Module) -> int:
    """How many numbers the network learns."""
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


def _from_library(arch, encoder, weights, classes):
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
            encoder_name=encoder, encoder_weights=weights, in_channels=3, classes=classes, **more
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
