"""What a network makes of a few training images: one picture a run and epoch, in its folder and in TensorBoard."""

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from utils.averages import Averages
from utils.checkpoint import bare
from utils.dataset import ListDataset
from utils.errors import writing
from utils.images import IGNORE, write_picture
from utils.lists import write_list
from utils.losses import hard
from utils.overlay import palette
from utils.present import classes_in, restrict
from utils.scores import pair_scores

ROWS, CELL, GAP, TEXT = 6, 168, 8, 22
PAPER, INK = (255, 255, 255), (30, 30, 30)
# apart in brightness too, so that they differ in print
ONLY_MASK, ONLY_PREDICTION, BOTH, NEITHER = (240, 140, 60), (40, 90, 190), (205, 205, 205), (60, 60, 64)
HEADS = ("image", "given mask", "prediction", "difference")
KINDS = {0: "clean", 1: "noisy"}


def show(run, epoch: int, net, dataset: ListDataset, stats: Averages, labels: bool = False) -> None:
    """Draw and save, every --pictures epochs and after the last, what `net` predicts for some training images.

    Beside each its mask, where they differ, how well they agree and the weight it had. The values that every image had
    in this epoch go to sample_weights.csv. All processes call it, and one of them writes. With `labels` only classes of
    an image's mask are predicted.
    """
    every, done = run.args.pictures, epoch + 1
    if not every or (done % every and done != run.args.epochs):
        return
    values = stats.of_images()
    if not run.main:
        return
    chosen = choose(dataset.noisy)
    pairs = [dataset.plain(i) for i in chosen]
    rows = [(image, mask, _predict(run, net, image, mask if labels else None)) for image, mask in pairs]
    texts = [_caption(run.args, dataset, i, row, values) for i, row in zip(chosen, rows, strict=True)]
    page = draw(rows, texts, f"{run.args.name}, epoch {done}, {dataset.path}", run.args.classes)
    folder = run.dir / "pictures"
    with writing(folder):
        folder.mkdir(exist_ok=True)
        write_picture(folder / f"epoch_{done:04d}.png", page)
        if values:
            write_list(dataset.frame[["img"]].assign(noisy=dataset.noisy, **values), run.dir / "sample_weights.csv")
        run.writer.add_image("training", page, epoch, dataformats="HWC")
        for name, of_images in values.items():
            for kind, text in KINDS.items():
                some = of_images[(dataset.noisy == kind) & ~np.isnan(of_images)]
                if len(some):
                    run.writer.add_histogram(f"{name}/{text}", some, epoch)
        run.writer.flush()


def choose(noisy: np.ndarray, count: int = ROWS) -> list[int]:
    """Which images to show, always the same: half of them noisy and half clean where that is known, spread evenly."""
    groups = [np.flatnonzero(noisy == kind) for kind in (1, 0)]
    if not all(map(len, groups)):
        groups = [np.arange(len(noisy))]
    each = count // len(groups)
    places = [np.linspace(0, len(group) - 1, min(each, len(group))).round().astype(int) for group in groups]
    return [int(i) for group, at in zip(groups, places, strict=True) for i in group[at]]


@torch.inference_mode()
def _predict(run, net, image, mask):
    net = bare(net).eval()
    batch = torch.from_numpy(image.copy())[None].to(run.device).permute(0, 3, 1, 2)
    with run.autocast():
        logits = net(batch)
    if mask is not None:
        logits = restrict(logits, classes_in(torch.from_numpy(mask.copy())[None].to(run.device), logits.shape[1]))
    return hard(logits)[0].cpu().numpy()


def _caption(args, dataset, i, row, values) -> str:
    _, mask, prediction = row
    scores = pair_scores(prediction, mask, args.classes, args.theta0, args.theta)
    parts = [dataset.frame["img"].iloc[i], KINDS.get(int(dataset.noisy[i]), "")]
    parts += [f"IoU {scores['iou']:.2f}", f"BF {scores['bf']:.2f}"]
    parts += [f"{name} {value[i]:.2f}" for name, value in values.items()]
    return "   ".join(part for part in parts if part)


def draw(rows: list[tuple], texts: list[str], title: str, classes: int = 1) -> np.ndarray:
    """The picture (h, w, 3) RGB of `rows` (image (H, W, 3), mask, prediction, (H, W) each) with a line under each."""
    sizes = [_fit(*row[0].shape[:2]) for row in rows]
    width = max(w for _, w in sizes)
    step, top = width + GAP, 2 * TEXT + GAP
    height = top + sum(h + TEXT + GAP for h, _ in sizes) + TEXT
    page = Image.new("RGB", (GAP + len(HEADS) * step, height), PAPER)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    pen.text((GAP, 4), _shorten(pen, title, font, page.width - 2 * GAP), INK, font)
    for column, head in enumerate(HEADS):
        pen.text((GAP + column * step, TEXT + 6), head, INK, font)
    y = top
    for (image, mask, prediction), size, text in zip(rows, sizes, texts, strict=True):
        for column, cell in enumerate(_cells(image, mask, prediction, size, classes)):
            page.paste(Image.fromarray(cell), (GAP + column * step, y))
        pen.text((GAP, y + size[0] + 3), _shorten(pen, text, font, page.width - 2 * GAP), INK, font)
        y += size[0] + TEXT + GAP
    _legend(pen, font, y, ["agreed", "only in the mask", "only predicted"] if classes == 1 else ["agreed", "differs"])
    return np.asarray(page)


def _cells(image, mask, prediction, size, classes) -> list[np.ndarray]:
    given, predicted = (_colour(m, classes) for m in (mask, prediction))
    difference = np.full((*mask.shape, 3), NEITHER, np.uint8)
    difference[(mask > 0) & (mask == prediction)] = BOTH
    if classes == 1:
        difference[mask > prediction] = ONLY_MASK
        difference[mask < prediction] = ONLY_PREDICTION
    else:
        difference[(mask != prediction) & (mask != IGNORE)] = ONLY_MASK
    photo = cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)
    maps = [cv2.resize(m, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT) for m in (given, predicted, difference)]
    return [photo, *maps]


def _colour(mask, classes) -> np.ndarray:
    """(H, W) class indices -> (H, W, 3): light and dark grey for one class, else a colour each, the ignored white."""
    if classes == 1:
        return np.where(mask[..., None] > 0, BOTH, NEITHER).astype(np.uint8)
    colours = np.full((IGNORE + 1, 3), PAPER, np.uint8)
    colours[:classes] = palette(classes)
    colours[0] = NEITHER
    return colours[mask]


def _fit(height, width) -> tuple[int, int]:
    zoom = CELL / max(height, width)
    return max(1, round(height * zoom)), max(1, round(width * zoom))


def _shorten(pen, text, font, room) -> str:
    while pen.textlength(text, font) > room:
        text = "…" + text[2:]
    return text


def _legend(pen, font, y, names) -> None:
    x = GAP
    for colour, name in zip((BOTH, ONLY_MASK, ONLY_PREDICTION), names, strict=False):
        pen.rectangle((x, y + 2, x + 12, y + 14), colour)
        pen.text((x + 18, y), name, INK, font)
        x += 18 + round(pen.textlength(name, font)) + 20
