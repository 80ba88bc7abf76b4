"""Probabilities of an image of any size: from the whole image or from overlapping windows, over scales and mirrored.

`predict_probability` is the one call for a single image; the steps it is made of let others batch images and write
the rows of a large image while the next are predicted.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.present import restrict

LARGE = 2048 * 2048  # pixels from which on an image is not run whole where training resized nothing
WINDOW = 1024  # of such an image
_WAITING = 2**28  # bytes of images that wait for a batch to be full
_BAND = 2**26  # values of an enlarged map that are in memory at a time


class Probabilities(nn.Module):
    """Networks behind one door: uint8 RGB (N, 3, H, W) -> (N, C, H, W) float32, the mean of their probabilities.

    A network of one output gives the probability of the foreground, others those of all classes, which sum to 1; with
    `present` (N, C) or (N, 2) bool those of other classes are 0.
    """

    def __init__(self, nets):
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, image: Tensor, present: Tensor | None = None) -> Tensor:
        total = to_probability(self.nets[0](image), present)
        for net in self.nets[1:]:
            total = total + to_probability(net(image), present)
        return total / len(self.nets)


@dataclass(frozen=True)
class Plan:
    """How images are run.

    `size`: training resized whole images to size x size, 0: it took them as they are. `side`: the usual shorter side
    of the training images' files in pixels, 0 where nobody knows. `window`: side of a window at the network's input,
    0: as `size`. `blend`: "hann" spreads windows evenly and trusts their middle more; "count" puts them as published
    protocols do, see `axis_windows`. `scales` multiply the size of what the network sees.
    """

    size: int
    side: int = 0
    mode: str = "auto"
    window: int = 0
    overlap: float = 0.5
    blend: str = "hann"
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    batch_size: int = 16
    precision: str = "fp32"

    def slides(self, shape: tuple[int, int]) -> bool:
        """Whether an image of this (H, W) is run in windows.

        With mode auto that is one whose shorter side is more than twice that of the training images or, where training
        resized nothing, one of more than LARGE pixels.
        """
        if self.mode != "auto":
            return self.mode == "slide"
        if self.size:
            return 0 < 2 * self.side < min(shape)
        return shape[0] * shape[1] > LARGE

    @property
    def zoom(self) -> float:
        """Pixels at the network's input for a pixel of an image in windows: as many as training gave."""
        return self.size / self.side if self.size and self.side else 1.0


def predict_probability(net: nn.Module, image: np.ndarray, plan: Plan, present: np.ndarray | None = None) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (C, H, W) float32 probabilities in [0, 1], by a `Probabilities` on any device.

    `present` (C,) bool, of binary masks (2,): the classes that the image holds; those of others are 0.
    """
    if plan.slides(image.shape[:2]):
        bands = slide(net, image, plan, present)
    else:
        held = None if present is None else present[None]
        bands = enlarged_bands(predict_whole(net, [inputs_of(image, plan)], plan, held)[0], image.shape[:2])
    whole = None
    for top, band in bands:
        if whole is None:
            whole = np.empty((len(band), *image.shape[:2]), np.float32)
        whole[:, top : top + band.shape[1]] = band
    return whole


def inputs_of(image: np.ndarray, plan: Plan) -> list[np.ndarray]:
    """What the network sees of a whole image (H, W, 3) at every scale: (h, w, 3) uint8."""
    shape = (plan.size, plan.size) if plan.size else image.shape[:2]
    return [_resized(image, *(max(1, round(side * scale)) for side in shape)) for scale in plan.scales]


@torch.inference_mode()
def predict_whole(
    net: nn.Module, inputs: list[list[np.ndarray]], plan: Plan, present: np.ndarray | None = None
) -> list[list[np.ndarray]]:
    """Of every image the (C, h, w) float32 probabilities at every scale; inputs of one scale have one shape.

    `present` (N, C) bool, of binary masks (N, 2): the classes that each image holds, where that is known.
    """
    scales = [_run(net, list(tiles), plan, present).cpu().numpy() for tiles in zip(*inputs, strict=True)]
    return [list(maps) for maps in zip(*scales, strict=True)]


def in_batches(net: nn.Module, works: Iterable, plan: Plan) -> Iterator[tuple]:
    """(work, bands) for every work, where whole images of one input size go through the network together.

    A work has `shape`, the (H, W) of its image, `present`, (C,) bool, its classes, or None, and `inputs`, what
    `inputs_of` makes of an image that is run whole, or else `image`, one in windows; with neither its bands are None.
    Bands are (first row, (C, rows, W)), as of
    `slide` and `enlarged_bands`; those of windows must be used up before the next work is asked for.
    """
    waiting = []
    for work in works:
        if work.inputs:
            waiting.append(work)
        else:
            yield work, None if work.image is None else slide(net, work.image, plan, work.present)
        large = sum(one.image.nbytes for one in waiting if one.image is not None) > _WAITING
        if large or len(waiting) == (plan.batch_size if plan.size else 1):
            yield from _together(net, waiting, plan)
            waiting = []
    if waiting:
        yield from _together(net, waiting, plan)


def _together(net, works, plan):
    held = None if works[0].present is None else np.stack([work.present for work in works])
    for work, maps in zip(works, predict_whole(net, [work.inputs for work in works], plan, held), strict=True):
        work.inputs = None
        yield work, enlarged_bands(maps, work.shape)


def enlarged_bands(maps: list[np.ndarray], shape: tuple[int, int]) -> Iterator[tuple[int, np.ndarray]]:
    """The mean of (C, h, w) maps enlarged to (H, W) as (first row, (C, rows, W)), few rows of a large one at a time."""
    height, width = shape
    rows = max(1, _BAND // (len(maps[0]) * width))
    for top in range(0, height, rows):
        if rows >= height:
            parts = [enlarge(one, shape) for one in maps]
        else:
            parts = [_enlarged_rows(one, shape, top, min(top + rows, height)) for one in maps]
        yield top, parts[0] if len(parts) == 1 else sum(parts) / len(parts)


@torch.inference_mode()
def slide(
    net: nn.Module, image: np.ndarray, plan: Plan, present: np.ndarray | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """Probabilities of an image (H, W, 3) in windows, as (first row, (C, rows, W) float32) from top to bottom.

    Overlapping windows are blended by Hann weights that sum to 1 at every pixel. Rows are given away when no window
    below touches them, so a large image needs memory for the rows of one window only.
    """
    grids = [_Grid(image.shape[:2], plan, scale) for scale in plan.scales]
    rows = sorted((int(top), g, k) for g, grid in enumerate(grids) for k, top in enumerate(grid.tops))
    total, done = None, 0
    for top, g, k in rows:
        if top > done:
            yield done, total[:, : top - done].clamp(0, 1).cpu().numpy()
            total, done = total[:, top - done :], top
        for x, part in grids[g].row(net, image, k, plan, present):
            height, width = part.shape[1:]
            if total is None:
                total = part.new_zeros(len(part), height, image.shape[1])
            if total.shape[1] < height:
                total = F.pad(total, (0, 0, 0, height - total.shape[1]))
            total[:, :height, x : x + width] += part
    yield done, total.clamp(0, 1).cpu().numpy()


def axis_windows(length: int, window: int, overlap: float, blend: str = "hann") -> tuple[np.ndarray, np.ndarray]:
    """Starts (n,) of windows that cover an axis, and weights (n, min(window, length)) of their pixels.

    Neighbours overlap by a share of `overlap` in [0, 1) or more. The weights are positive and sum to 1 at every pixel.
    `blend` "hann": evenly spread, each with the weights of a Hann window. "count": ceil(window * (1 - overlap)) pixels
    apart, only the last one pulled back to the border, all equal: the sliding evaluation of Cityscapes papers.
    """
    window = min(window, length)
    if blend == "count":
        step = max(1, math.ceil(round(window * (1 - overlap), 2)))  # an overlap of 0.333 means a third
        starts = np.minimum(np.arange(1 + math.ceil((length - window) / step)) * step, length - window)
        weight = np.ones(window)
    else:
        step = max(1, int(window * (1 - overlap)))
        starts = np.linspace(0, length - window, 1 + math.ceil((length - window) / step)).round().astype(int)
        weight = np.sin(np.pi * (np.arange(window) + 0.5) / window) ** 2
    total = np.zeros(length)
    for start in starts:
        total[start : start + window] += weight
    return starts, np.stack([weight / total[start : start + window] for start in starts])


class _Grid:
    """The windows of an image at one scale: rows times columns."""

    def __init__(self, shape, plan, scale):
        zoom, window = plan.zoom * scale, plan.window or plan.size or WINDOW
        span = max(1, round(window / zoom))
        axes = [axis_windows(side, span, plan.overlap, plan.blend) for side in shape]
        (self.tops, self.high), (self.lefts, self.wide) = axes
        self.shape = self.high.shape[1], self.wide.shape[1]
        # a window that fits is the network's input exactly, also where its span had to be rounded
        self.input = tuple(window if side == span else max(1, round(side * zoom)) for side in self.shape)
        self.high = self.high / len(plan.scales)

    def row(self, net, image, k, plan, present):
        """(left, weighted (C, h, w) probabilities) of every window in the row."""
        (h, w), top = self.shape, self.tops[k]
        for first in range(0, len(self.lefts), plan.batch_size):
            some = slice(first, first + plan.batch_size)
            tiles = [image[top : top + h, x : x + w] for x in self.lefts[some]]
            held = None if present is None else np.tile(present, (len(tiles), 1))
            out = _run(net, [_resized(tile, *self.input) for tile in tiles], plan, held)
            if self.input != self.shape:
                out = F.interpolate(out, self.shape, mode="bilinear")
            weight = self.high[k][:, None] * self.wide[some, None]
            yield from zip(self.lefts[some], out * torch.from_numpy(weight).to(out)[:, None], strict=True)


def _run(net, tiles, plan, present=None) -> Tensor:
    """(N, C, h, w) float32 on the network's device, of at most `batch_size` images at a time."""
    device = next(itertools.chain(net.parameters(), net.buffers())).device
    found = []
    for start in range(0, len(tiles), plan.batch_size):
        some = slice(start, start + plan.batch_size)
        image = torch.from_numpy(np.stack(tiles[some])).to(device).permute(0, 3, 1, 2)
        held = [] if present is None else [torch.from_numpy(present[some]).to(device)]
        with torch.autocast(device.type, torch.bfloat16, enabled=plan.precision == "bf16"):
            out = net(image, *held)
            if plan.flip:
                out = (out + net(image.flip(3), *held).flip(3)) / 2
        found.append(out)
    return torch.cat(found)


def to_probability(logits: Tensor, present: Tensor | None = None) -> Tensor:
    """(N, C, H, W) logits -> float32 probabilities: of the foreground for one plane, of all classes for more.

    With `present` (N, C) bool, (N, 2) for one plane, those of other classes are 0.
    """
    logits = logits.float() if present is None else restrict(logits, present)
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)


def to_mask(probability: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(C, h, w) probabilities -> (H, W) uint8 class indices of `shape`: enlarged first, decided afterwards."""
    probability = enlarge(probability, shape)
    return (probability[0] > 0.5).astype(np.uint8) if len(probability) == 1 else probability.argmax(0).astype(np.uint8)


def enlarge(probability: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(C, h, w) -> (C, H, W), bilinear."""
    if probability.shape[1:] == tuple(shape):
        return probability
    return np.stack([cv2.resize(p, (shape[1], shape[0]), interpolation=cv2.INTER_LINEAR) for p in probability])


def _enlarged_rows(probability, shape, top, bottom):
    """Rows `top` to `bottom` of `enlarge`, without the others."""
    h = probability.shape[1]
    y = ((np.arange(top, bottom) + 0.5) * h / shape[0] - 0.5).clip(0, h - 1).astype(np.float32)
    above = y.astype(int)
    below, share = np.minimum(above + 1, h - 1), (y - above)[:, None]
    rows = probability[:, above] * (1 - share) + probability[:, below] * share
    return enlarge(rows, (bottom - top, shape[1]))


def _resized(image, height, width):
    """As training resizes: area average when shrinking, bilinear when growing."""
    if image.shape[:2] == (height, width):
        return image
    how = cv2.INTER_AREA if image.shape[0] >= height and image.shape[1] >= width else cv2.INTER_LINEAR
    return cv2.resize(image, (width, height), interpolation=how)
