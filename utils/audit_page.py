"""What the label audit shows: a strip of four panels an image, the curves of known noise, and the page around them."""

from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from utils.images import IGNORE, check_sizes, read_image, read_mask, write_bytes
from utils.label_quality import VERDICTS, precision_at
from utils.overlay import palette
from utils.page import encode, write_page

GIVEN, SEEN, OTHER = (255, 200, 40), (36, 84, 236), (220, 40, 160)  # bright, dark: apart also without colours
VOID = 128  # grey of pixels that count nowhere
AXES = (
    ("k worst images", "share of them that is noisy"),
    ("share of the noisy images that is found (recall)", "share of noisy images among those (precision)"),
    ("share of the clean images that is taken for noisy", "share of the noisy images that is found"),
)
FIRST_PAGE = 24  # images on a page of the gallery
PANELS = ("image", "given mask", "teacher mask", "disagreement")
MEANINGS = {
    "soft": "probability that the teacher gives the given labels, mostly at the worst pixels",
    "margin": "iou in which a pixel counts by how sure the teacher is of its disagreement",
    "iou": "overlap of the given and the teacher's mask",
    "bf": "agreement of the two outlines within a few pixels",
    "miou": "mean of the overlap over object and background",
    "bm": "mean of bf and miou",
    "dice": "as iou; the same order",
    "sure": "how sure the teacher is where it disagrees; no score of the mask",
}


def draw(target: Path, image_path, mask_path, pred_path, classes: int, side: int) -> tuple[int, int]:
    """Write one picture of the four PANELS beside each other, of `side` pixels at most; (width, height) of a panel."""
    image, mask, pred = read_image(image_path), read_mask(mask_path, classes), read_mask(pred_path, classes)
    check_sizes(image_path, image.shape[:2], mask_path, mask.shape)
    scale = min(1.0, side / max(mask.shape))
    width, height = (max(1, round(length * scale)) for length in mask.shape[::-1])
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    mask, pred = (cv2.resize(m, (width, height), interpolation=cv2.INTER_NEAREST_EXACT) for m in (mask, pred))
    if classes == 1:
        panels = [image, _outline(image, mask, GIVEN), _outline(image, pred, SEEN), _apart(image, mask, pred)]
    else:
        panels = [image, _labels(image, mask, classes), _labels(image, pred, classes), _confused(image, mask, pred)]
    write_bytes(target, encode(np.hstack(panels)))
    return width, height


def _outline(image, mask, colour):
    shown = image.copy()
    inside = mask > 0
    shown[inside] = (0.65 * image[inside] + 0.35 * np.array(colour)).astype(np.uint8)
    contours, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(shown, contours, -1, colour, 2)


def _pale(image):
    """The photograph in grey of middle brightness, so that bright and dark marks stand out from all of it."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return np.repeat((110 + 0.35 * grey).astype(np.uint8)[..., None], 3, 2)


def _apart(image, mask, pred):
    shown = _pale(image)
    shown[(mask > 0) & (pred == 0)] = GIVEN
    shown[(pred > 0) & (mask == 0)] = SEEN
    return shown


def _labels(image, mask, classes):
    table = np.full((256, 3), VOID, np.uint8)
    table[:classes] = palette(classes)  # class 0 shows the photograph
    share = np.where(mask == 0, 0, 0.55)[..., None]
    return ((1 - share) * image + share * table[mask]).astype(np.uint8)


def _confused(image, mask, pred):
    shown = _pale(image)
    shown[(mask != pred) & (mask != IGNORE)] = OTHER
    return shown


def draw_curves(out: Path, scores: dict[str, np.ndarray], noisy: np.ndarray) -> None:
    """Write ranking.svg, ranking-dark.svg and ranking.png: precision at k, precision over recall, and ROC of scores."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
    from sklearn.metrics import precision_recall_curve, roc_curve

    from utils.plots import COLOURS, DASHES, INK, MARKERS, SOFT, plain, render  # loads matplotlib, mostly not needed

    figure = Figure(figsize=(12, 4.3))
    figure.subplots_adjust(0.05, 0.23, 0.985, 0.97, wspace=0.2)
    panels = figure.subplots(1, 3)
    base, k = noisy.mean(), np.arange(1, len(noisy) + 1)
    # a colour and a marker each, so that they can be told apart in grey too; scores of equal order lie on each other
    for i, (name, values) in enumerate(scores.items()):
        style = {"color": COLOURS[i % 7], "marker": MARKERS[i], "linestyle": DASHES[i % 4], "lw": 1.4, "ms": 5}
        precision, recall, _ = precision_recall_curve(noisy, -values)
        wrong, found, _ = roc_curve(noisy, -values)
        for axes, x, y in zip(panels, (k, recall, wrong), (precision_at(values, noisy), precision, found), strict=True):
            axes.plot(x, y, label=name, markevery=_places(len(x), i), **style)
    chance = {"color": SOFT, "lw": 1, "label": f"by chance (precision {base:.2f})"}
    for axes, (x, y) in zip(
        panels, (((1, len(k)), (base, base)), ((0, 1), (base, base)), ((0, 1), (0, 1))), strict=True
    ):
        axes.plot(x, y, **chance)
        plain(axes)
        axes.set_ylim(0, 1.03)
    panels[0].set(xlim=(1, max(2, len(k))))
    for axes in panels[1:]:
        axes.set(xlim=(0, 1))
        axes.xaxis.set_major_locator(MaxNLocator(5))
    for axes, (x, y) in zip(panels, AXES, strict=True):
        axes.set_xlabel(x, color=INK, fontsize=9)
        axes.set_ylabel(y, color=INK, fontsize=9)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="lower center", ncols=5, frameon=False, fontsize=9, labelcolor=INK
    )
    light, dark, png = render(figure)
    write_bytes(out / "ranking.svg", light.encode())
    write_bytes(out / "ranking-dark.svg", dark.encode())
    write_bytes(out / "ranking.png", png)


def _places(count, turn):
    """Which of the points of a curve carry a marker: about 8, not the same for every curve."""
    step = max(1, count // 8)
    return turn * step // 8, step


def write(path: Path, table: pd.DataFrame, scores: dict, sizes: dict, reports: dict, about: dict) -> None:
    """Write the page of an audit; `table` and `scores` have the worst first, `sizes` {place: (width, height)}."""
    own = [c for c in table if c not in ("row", "line", "verdict", "reason", "rank")]
    text = table[own].astype(object).where(table[own].notna(), "").map(str)
    data = {
        "key": about["key"],
        "columns": own,
        "rows": text.to_numpy().tolist(),
        "order": table["row"].tolist(),
        "verdicts": table["verdict"].tolist(),
        "reasons": table["reason"].tolist(),
        "scoreNames": [name for name in MEANINGS if name in scores],
        "scores": {name: [None if np.isnan(v) else round(v, 3) for v in x.tolist()] for name, x in scores.items()},
        "noisy": (table["iterations"] > 0).tolist() if "iterations" in table else None,
        "sizes": sizes,
        "panels": PANELS,
        "verdictNames": VERDICTS,
        "perPage": FIRST_PAGE,
    }
    counts = table["verdict"].value_counts()
    base = float((table["iterations"] > 0).mean()) if reports else None
    write_page(
        path,
        "audit.html",
        data=data,
        about=about,
        count=len(table),
        pictured=len(sizes),
        counts={verdict: int(counts.get(verdict, 0)) for verdict in VERDICTS},
        meanings={name: text for name, text in MEANINGS.items() if name in scores},
        reports=reports,
        base=base,
        teacher=about["teacher"],
        colours=["#" + bytes(rgb.tolist()).hex() for rgb in palette(about["classes"])] if about["classes"] > 1 else [],
        void=f"#{VOID:02x}{VOID:02x}{VOID:02x}",
    )
