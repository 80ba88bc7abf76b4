"""Networks as ONNX or TorchScript files that need none of this code, each compared with the network before it stays."""

import copy
import json
import logging
import os
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from utils.errors import InputError, first_line, out_of_memory, warn, writing
from utils.logs import to_disk

TOLERANCE = 1e-4  # of probabilities; float32 sums in another order differ by about 1e-6
SMALLEST = 16  # pixels: an image smaller than its padding is padded otherwise than the exported network does
LARGEST = 2**31 - 2**27  # bytes of a single ONNX file, which is one protobuf message
SUFFIXES = {"onnx": ".onnx", "torchscript": ".pt"}


class FromPixels(nn.Module):
    """uint8 RGB (N, H, W, 3), as images are read, -> (N, C, H, W) float32 probabilities."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image.permute(0, 3, 1, 2))


def export(net: nn.Module, path: Path, kind: str, about: dict, images: list[np.ndarray]) -> None:
    """Write a `Probabilities` as "onnx" or "torchscript" to `path`, after a comparison with it on the CPU.

    Any batch and any size from 16 x 16 on; where the architecture does not allow that, one size ("size" of `about`)
    and any batch, with a warning. `about` is kept in the file. The comparison is made on random images and on `images`
    (h, w, 3). InputError, and no file, where it cannot be exported or the largest difference exceeds TOLERANCE.
    """
    if kind == "onnx":
        _check_packages()
    net = FromPixels(copy.deepcopy(net).cpu().float().eval()).requires_grad_(False)
    if sum(p.nbytes for p in net.parameters()) > LARGEST and kind == "onnx":
        raise InputError(f"--export onnx: {path} would exceed 2 GB, which an ONNX file cannot; use torchscript")
    part = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        free, fault = _attempt(net, part, kind, about, _samples(None, images))
        if not free and about["size"]:
            fixed, other = _attempt(net, part, kind, about, _samples(about["size"], images), about["size"])
            if fixed:
                warn(f"--export {kind}: {about['arch']} takes images of {about['size']}x{about['size']} only ({fault})")
            free, fault = fixed, other
        if not free:
            raise InputError(f"--export {kind}: {path} was not written: {fault}")
        with writing(path):
            with part.open("rb") as file:
                to_disk(file)
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    print(f"{path}: agrees with the network on {free[1]} batches, largest difference {free[0]:.1e}")


def _attempt(net, part, kind, about, samples, size=None) -> tuple[tuple[float, int] | None, str]:
    """((largest difference, batches), "") or (None, what went wrong)."""
    write = _write_onnx if kind == "onnx" else _write_torchscript
    shape = (size, size) if size else (67, 75)  # it needs padding, so that padding is exported
    with _quiet():
        try:
            write(net, torch.zeros(2, *shape, 3, dtype=torch.uint8), part, about | {"input": size or "any"}, not size)
            run = _run_onnx(part) if kind == "onnx" else _run_torchscript(part)
            worst = max(_difference(net, run, sample) for sample in samples)
        except OSError:
            raise
        except Exception as error:  # exporters raise anything for an operation that they do not know
            if out_of_memory(error):
                raise
            return None, first_line(error)
    if not worst <= TOLERANCE:
        return None, f"what it computes differs from the network by {worst:.2g} (at most {TOLERANCE} is accepted)"
    return (worst, len(samples)), ""


def _samples(size, images) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = [(3, size, size), (1, size, size)] if size else [(1, 64, 96), (3, 131, 77), (2, 97, 160)]
    batches = [torch.randint(0, 256, (*shape, 3), generator=random, dtype=torch.uint8) for shape in shapes]
    fits = [
        image for image in images if image.shape[:2] == (size, size) or (not size and min(image.shape[:2]) >= SMALLEST)
    ]
    return batches + [torch.from_numpy(np.ascontiguousarray(image))[None] for image in fits]


@torch.inference_mode()
def _difference(net, run: Callable, image: Tensor) -> float:
    expected, found = net(image), run(image)
    if found.shape != expected.shape:
        raise ValueError(f"it gives {tuple(found.shape)} for images of {tuple(image.shape)}")
    return float((found - expected).abs().max())


def _write_onnx(net, example, part, about, free):
    sizes = {0: torch.export.Dim.DYNAMIC}
    if free:
        sizes |= {1: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    names = {"input_names": ["image"], "output_names": ["probability"]}
    program = torch.onnx.export(net, (example,), dynamo=True, dynamic_shapes=(sizes,), verbose=False, **names)
    program.model.metadata_props.update({key: str(value) for key, value in about.items()})
    with writing(part):
        program.save(str(part))


def _write_torchscript(net, example, part, about, _free):
    with torch.no_grad():
        traced = torch.jit.trace(net, example, check_trace=False)  # compared below, on other sizes
    with writing(part):
        torch.jit.save(traced, str(part), _extra_files={"about.json": json.dumps(about)})


def _run_onnx(part):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(part), providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(["probability"], {"image": image.numpy()})[0])


def _run_torchscript(part):
    return torch.jit.load(str(part), map_location="cpu")


def _check_packages():
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        what = f"--export onnx: the package {error.name} is missing"
        raise InputError(f"{what}; pip install onnx onnxscript onnxruntime") from None


@contextmanager
def _quiet():
    """No warnings and logs of the exporters: what counts is the comparison."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
