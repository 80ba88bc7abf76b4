"""Coarse masks by erosion or dilation, and a picture of one mask under rising noise.

Paper   NLKD, ICASSP 2021 (levels 6 to 10, erosion or dilation by a fair coin).
Run     python utils/add_noise.py mask.png --out grid.png --levels 0 2 4 6 8 10 --image photo.jpg
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from utils.args import launch
from utils.errors import InputError
from utils.images import read_image, read_mask, to_binary

OPS = ("erode", "dilate")

CELL = 224  # longer side of a cell of the picture, in pixels
GAP, LEFT, TOP = 10, 84, 44
PAPER, INK = (255, 255, 255), (40, 40, 40)
KEPT, BACKGROUND, REMOVED, ADDED = (214, 214, 214), (58, 58, 62), (222, 110, 60), (64, 142, 214)
CONTOUR = (20, 20, 20)


@dataclass
class Args:
    mask: Annotated[str, "binary mask (0/255 or 0/1)", "positional"]
    out: Annotated[str, "picture to write (PNG)"]
    levels: Annotated[list[int], "noise levels, one column each"] = field(default_factory=lambda: [0, 2, 4, 6, 8, 10])
    image: Annotated[str, "photograph to draw under the mask"] = ""


class Coarse(NamedTuple):
    mask: np.ndarray
    iterations: int
    op: str


def coarsen(
    mask: np.ndarray, iterations: int, op: str, rng: np.random.Generator | None = None, keep_area: bool = False
) -> Coarse:
    """Erode or dilate a binary mask `iterations` times with a full 3x3 element; the frame does neither.

    `mask` is (H, W) with {0, 1}, {0, 255} or bool and comes back in the same encoding and dtype. `op` is erode, dilate
    or both (one fair coin from `rng`). With `keep_area` the iterations are lowered to the largest number that leaves
    some foreground and some background; a mask that has only one of the two stays as it is, with 0 iterations.
    Returns the mask, the iterations really made and the operation, which is "" where nothing was done.
    Source: NLKD, ICASSP 2021, released code, without its loss of {0, 1} masks.
    """
    if op not in (*OPS, "both") or iterations < 0:
        raise ValueError(f"op {op!r}, iterations {iterations}: op is erode, dilate or both, iterations 0 or more")
    if op == "both":
        if rng is None:
            raise ValueError("op 'both' needs the generator that tosses the coin")
        op = OPS[rng.integers(2)]
    binary = to_binary(mask)
    coarse = _box(binary, iterations, op)
    while keep_area and iterations and not _has_both(coarse):
        iterations -= 1
        coarse = _box(binary, iterations, op)
    if iterations == 0:
        return Coarse(mask.copy(), 0, "")
    return Coarse(coarse.astype(mask.dtype) * mask.max(), iterations, op)


def _box(binary: np.ndarray, iterations: int, op: str) -> np.ndarray:
    # k passes of a 3x3 box are one pass of a (2k+1)x(2k+1) box, which OpenCV splits into a row and a column.
    # Beyond the longer side a larger box sees nothing new.
    side = 2 * min(iterations, max(binary.shape)) + 1
    change = cv2.erode if op == "erode" else cv2.dilate
    return change(binary, np.ones((side, side), np.uint8))


def _has_both(binary: np.ndarray) -> bool:
    return 0 < cv2.countNonZero(binary) < binary.size


def draw_grid(mask: np.ndarray, levels: list[int], image: np.ndarray | None = None) -> np.ndarray:
    """Rows erode and dilate, one column a level: (H, W) {0, 1} and optional (H, W, 3) RGB -> (h, w, 3) RGB.

    Removed pixels are orange, added ones blue, the line is the contour of the original mask.
    """
    zoom = CELL / max(mask.shape)
    height, width = (max(1, round(side * zoom)) for side in mask.shape)
    step = max(width, 120) + GAP
    page = Image.new("RGB", (LEFT + len(levels) * step, TOP + 2 * (height + 22 + GAP) + 24), PAPER)
    pen, font, small = ImageDraw.Draw(page), ImageFont.load_default(17), ImageFont.load_default(14)
    for column, level in enumerate(levels):
        x = LEFT + column * step
        pen.text((x + width // 2, TOP - 12), f"level {level}", INK, font, anchor="ms")
        for row, op in enumerate(OPS):
            y = TOP + row * (height + 22 + GAP)
            coarse = coarsen(mask, level, op).mask
            page.paste(Image.fromarray(_cell(mask, coarse, image, (width, height))), (x, y))
            pen.text((x + width // 2, y + height + 16), f"IoU {_iou(mask, coarse):.3f}", INK, small, anchor="ms")
    for row, op in enumerate(OPS):
        pen.text((LEFT - 14, TOP + row * (height + 22 + GAP) + height // 2), op, INK, font, anchor="rm")
    _legend(pen, page.height - 12, small)
    return np.asarray(page)


def _cell(mask, coarse, image, size) -> np.ndarray:
    colour = np.zeros((*mask.shape, 3), np.uint8)
    colour[:] = BACKGROUND
    colour[coarse > 0] = KEPT
    colour[(coarse == 0) & (mask > 0)] = REMOVED
    colour[(coarse > 0) & (mask == 0)] = ADDED
    colour = cv2.resize(colour, size, interpolation=cv2.INTER_NEAREST_EXACT)
    if image is not None:
        photo = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        share = np.where((coarse > 0) & (mask > 0), 0.35, 0.7) * ((coarse > 0) | (mask > 0))
        share = cv2.resize(share, size, interpolation=cv2.INTER_NEAREST_EXACT)[..., None]
        colour = (share * colour + (1 - share) * photo).astype(np.uint8)
    large = cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST_EXACT)
    contours, _ = cv2.findContours(large, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(colour, contours, -1, CONTOUR, 1, cv2.LINE_AA)


def _legend(pen, y, font) -> None:
    x = LEFT
    for colour, text in ((KEPT, "mask"), (REMOVED, "removed"), (ADDED, "added"), (CONTOUR, "original contour")):
        box = (x, y - 6, x + 16, y - 4) if colour == CONTOUR else (x, y - 11, x + 12, y + 1)
        pen.rectangle(box, colour)
        pen.text((box[2] + 6, y), text, INK, font, anchor="ls")
        x = box[2] + 6 + round(pen.textlength(text, font)) + 20


def _iou(one: np.ndarray, other: np.ndarray) -> float:
    union = np.count_nonzero(one | other)
    return np.count_nonzero(one & other) / union if union else 1.0


def main(args: Args) -> None:
    if min(args.levels) < 0:
        raise InputError(f"--levels {min(args.levels)}: a level is 0 or more")
    mask = read_mask(args.mask)
    image = read_image(args.image) if args.image else None
    if image is not None and image.shape[:2] != mask.shape:
        raise InputError(f"{args.image}: {image.shape[:2]} pixels, but the mask has {mask.shape}; give a pair")
    out = Path(args.out)
    if out.suffix.lower() != ".png":
        raise InputError(f"--out {out}: the picture is a PNG; end the name with .png")
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(draw_grid(mask, args.levels, image)).save(out)


if __name__ == "__main__":
    launch(main, Args)
