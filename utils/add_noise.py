"""Coarse masks by erosion or dilation, and a picture of one mask under rising noise of any kind.

Paper   NLKD, ICASSP 2021 (levels 6 to 10, erosion or dilation by a fair coin).
Run     python utils/add_noise.py mask.png --out grid.png --levels 0 2 4 6 8 10 --image photo.jpg
        python utils/add_noise.py mask.png --out kinds.png --kinds all --severities 0.9 0.8 0.7 --image photo.jpg
        (with --classes 11 for a mask of class indices)
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from utils.args import launch
from utils.errors import InputError
from utils.images import IGNORE, read_image, read_mask, to_binary
from utils.noise import KINDS, apply_noise, find_strength
from utils.overlay import palette
from utils.scores import pair_scores

OPS = ("erode", "dilate")

CELL = 224  # longer side of a cell of the picture, in pixels
GAP, TOP = 10, 44
ACROSS = 5  # kinds in a line of a picture with one severity
PAPER, INK = (255, 255, 255), (40, 40, 40)
KEPT, BACKGROUND, REMOVED, ADDED = (214, 214, 214), (58, 58, 62), (222, 110, 60), (64, 142, 214)
CONTOUR = (20, 20, 20)

_HELP = "; ".join(f"{name} ({kind.imitates})" for name, kind in KINDS.items())


@dataclass
class Args:
    mask: Annotated[str, "binary mask (0/255 or 0/1), or with --classes one of class indices", "positional"]
    out: Annotated[str, "picture to write (PNG)"]
    levels: Annotated[list[int], "noise levels, one column each; without --kinds, else 0 2 4 6 8 10"] = field(
        default_factory=list
    )
    image: Annotated[str, "photograph to draw under the mask"] = ""
    kinds: Annotated[list[str], f"kinds of noise in place of levels: all, or {_HELP}"] = field(default_factory=list)
    severities: Annotated[
        list[float], "IoU with the original that each kind is to leave, one column each; with --kinds, else 0.9 0.8 0.7"
    ] = field(default_factory=list)
    seed: Annotated[int, "of what is random in a kind"] = 0
    classes: Annotated[int, "1: a binary mask; more: class indices, 255 is ignored; needs --kinds"] = 1


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
    rows = {op: [(coarsen(mask, level, op).mask, "") for level in levels] for op in OPS}
    return _draw(mask, image, rows, [f"level {level}" for level in levels])


def draw_kinds(
    mask: np.ndarray, kinds, severities: list[float], image: np.ndarray | None = None, seed: int = 0, classes: int = 1
) -> np.ndarray:
    """A row a kind of noise, a column an IoU that it is to leave, colours as in `draw_grid`: -> (h, w, 3) RGB.

    Several classes have a colour each, paler where the label is the original's, and the contours of the original.
    """
    rows = {}
    for kind in tqdm(kinds, "kinds", disable=None, leave=False):
        rows[kind] = []
        for severity in severities:
            strength, _ = find_strength([(mask, image, lambda: np.random.default_rng(seed))], kind, severity, classes)
            noisy = apply_noise(mask, kind, strength, np.random.default_rng(seed), classes, image)
            rows[kind].append((noisy, f"{strength:.3g} {KINDS[kind].unit}"))
    return _draw(mask, image, rows, [f"severity {severity}" for severity in severities], classes)


def _draw(mask, image, rows: dict, heads: list[str], classes: int = 1) -> np.ndarray:
    """The page: a line a row of cells under heads; rows of one cell stand side by side, each under its own name."""
    zoom = CELL / max(mask.shape)
    height, width = (max(1, round(side * zoom)) for side in mask.shape)
    font, small = ImageFont.load_default(17), ImageFont.load_default(14)
    lines = [(name, heads if i == 0 else [], cells) for i, (name, cells) in enumerate(rows.items())]
    if len(heads) == 1:
        flat = [(name, cell) for name, (cell,) in rows.items()]
        lines = [("", *map(list, zip(*flat[i : i + ACROSS], strict=True))) for i in range(0, len(flat), ACROSS)]
    left = 28 + round(max(font.getlength(name) for name, _, _ in lines))
    step, line = max(width, 200) + GAP, height + 22 + GAP
    head = TOP - GAP
    wide, high = max(len(cells) for _, _, cells in lines), sum(line + head * bool(names) for _, names, _ in lines)
    page = Image.new("RGB", (left + wide * step, GAP + high + 24), PAPER)
    pen, y = ImageDraw.Draw(page), GAP
    for name, names, cells in lines:
        y += head * bool(names)
        pen.text((left - 14, y + height // 2), name, INK, font, anchor="rm")
        for column, above in enumerate(names):
            pen.text((left + column * step + width // 2, y - 12), above, INK, font, anchor="ms")
        for column, (noisy, text) in enumerate(cells):
            x = left + column * step
            colour, share = _colours(mask, noisy) if classes == 1 else _class_colours(mask, noisy, classes)
            page.paste(Image.fromarray(_cell(mask, colour, share, image, (width, height))), (x, y))
            text = f"IoU {pair_scores(noisy, mask, classes)['iou']:.3f}{', ' * bool(text)}{text}"
            pen.text((x + width // 2, y + height + 16), text, INK, small, anchor="ms")
        y += line
    _legend(pen, page.height - 12, small, left, classes)
    return np.asarray(page)


def _colours(mask, noisy) -> tuple[np.ndarray, np.ndarray]:
    """(H, W, 3) RGB of a noisy mask, and (H, W) how much of it lies over a photograph."""
    colour = np.zeros((*mask.shape, 3), np.uint8)
    colour[:] = BACKGROUND
    colour[noisy > 0] = KEPT
    colour[(noisy == 0) & (mask > 0)] = REMOVED
    colour[(noisy > 0) & (mask == 0)] = ADDED
    return colour, np.where((noisy > 0) & (mask > 0), 0.35, 0.7) * ((noisy > 0) | (mask > 0))


def _class_colours(mask, noisy, classes) -> tuple[np.ndarray, np.ndarray]:
    table = np.full((IGNORE + 1, 3), PAPER, np.uint8)
    table[:classes] = palette(classes)
    table[0] = BACKGROUND
    return table[noisy], np.where(noisy == mask, 0.35, 0.8)


def _cell(mask, colour, share, image, size) -> np.ndarray:
    colour = cv2.resize(colour, size, interpolation=cv2.INTER_NEAREST_EXACT)
    if image is not None:
        photo = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        share = cv2.resize(share, size, interpolation=cv2.INTER_NEAREST_EXACT)[..., None]
        colour = (share * colour + (1 - share) * photo).astype(np.uint8)
    large = cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST_EXACT)
    for label in np.unique(large[large > 0]):
        contours, _ = cv2.findContours((large == label).astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        colour = cv2.drawContours(colour, contours, -1, CONTOUR, 1, cv2.LINE_AA)
    return colour


def _legend(pen, y, font, x, classes) -> None:
    names = [(KEPT, "mask"), (REMOVED, "removed"), (ADDED, "added")] if classes == 1 else []
    for colour, text in (*names, (CONTOUR, "original contour")):
        box = (x, y - 6, x + 16, y - 4) if colour == CONTOUR else (x, y - 11, x + 12, y + 1)
        pen.rectangle(box, colour)
        pen.text((box[2] + 6, y), text, INK, font, anchor="ls")
        x = box[2] + 6 + round(pen.textlength(text, font)) + 20


def main(args: Args) -> None:
    if args.kinds and args.levels:
        raise InputError("--levels: of no use beside --kinds, which have --severities; leave it out")
    if args.severities and not args.kinds:
        raise InputError("--severities: of no use without --kinds; name some, or all")
    levels, severities = args.levels or [0, 2, 4, 6, 8, 10], args.severities or [0.9, 0.8, 0.7]
    if min(levels) < 0:
        raise InputError(f"--levels {min(levels)}: a level is 0 or more")
    known = [kind for kind in KINDS if args.classes > 1 or kind != "confusion"]
    kinds = list(known) if args.kinds == ["all"] else args.kinds
    unknown = [kind for kind in kinds if kind not in known]
    if unknown:
        raise InputError(f"--kinds {unknown[0]}: kinds of {args.classes} class(es) are {', '.join(known)}")
    if not 1 <= args.classes <= 255 or (args.classes > 1 and not kinds):
        raise InputError(f"--classes {args.classes}: 1 to 255, and more than 1 with --kinds only")
    if "superpixel" in kinds and not args.image:
        if args.kinds != ["all"]:
            raise InputError("--kinds superpixel: needs --image")
        kinds.remove("superpixel")
    if not all(0.05 <= severity < 1 for severity in severities):
        raise InputError(f"--severities {' '.join(map(str, severities))}: IoUs from 0.05 up to, but not, 1")
    mask = read_mask(args.mask, args.classes)
    image = read_image(args.image) if args.image else None
    if image is not None and image.shape[:2] != mask.shape:
        raise InputError(f"{args.image}: {image.shape[:2]} pixels, but the mask has {mask.shape}; give a pair")
    out = Path(args.out)
    if out.suffix.lower() != ".png":
        raise InputError(f"--out {out}: the picture is a PNG; end the name with .png")
    out.parent.mkdir(parents=True, exist_ok=True)
    if kinds:
        page = draw_kinds(mask, kinds, severities, image, args.seed, args.classes)
    else:
        page = draw_grid(mask, levels, image)
    Image.fromarray(page).save(out)


if __name__ == "__main__":
    launch(main, Args)
