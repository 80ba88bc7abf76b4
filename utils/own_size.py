"""Predictions for a list compared with its masks at the masks' own size, every image once."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils.class_scores import areas_of, class_table, confusion, mean_scores
from utils.errors import InputError, report_bad_rows
from utils.images import read_pair
from utils.inference import Plan, in_batches, inputs_of
from utils.scores import pair_scores
from utils.store import in_threads, stamp_files

AHEAD = 8  # images that wait for the network, and as many predictions for their scores: each may be large


@dataclass
class Work:
    """A row of a list on its way: what the network is to see of it, then its prediction, then what that is worth."""

    row: int
    image: np.ndarray | None = None
    inputs: list[np.ndarray] | None = None
    shape: tuple[int, int] = (0, 0)
    mask: np.ndarray | None = None
    present: np.ndarray | None = None
    bands: Iterator[tuple[int, np.ndarray]] | None = None
    pred: np.ndarray | None = None
    fault: str = ""
    counts: np.ndarray | None = None
    scores: dict | None = None
    lacks: bool = False


def evaluate_files(steps, net, frame, plan: Plan, present: np.ndarray | None, classes: int, args) -> dict:
    """Scores of a `Probabilities` on a list (`read_list`), each in [0, 1], by all processes of `steps` together.

    `present` (N, C) bool, of binary masks (N, 2), restricts what is predicted. Returns `scores` of the list, `areas`
    (3, classes) and the `confusion` they come from, `images`, the scores of every row, and `lacking`, the number of
    images whose masks hold classes that `present` lacks. InputError names every row that is bad; from the first on the
    network rests. `args` has `list`, `data_root`, `theta0` and `theta`.
    """
    paths = [[str(Path(args.data_root, name)) for name in frame[column]] for column in ("img", "filename")]
    _check_files(frame, paths, args.list)
    rows, faults = range(steps.rank, len(frame), steps.world), []

    def read(row):
        try:
            image, mask = read_pair(paths[0][row], paths[1][row], classes)
        except InputError as error:
            faults.append((int(frame["line"].iloc[row]), str(error)))
        if faults:
            return Work(row)
        slides = plan.slides(mask.shape)
        inputs = None if slides else inputs_of(image, plan)
        one = None if present is None else present[row]
        return Work(row, image if slides else None, inputs, mask.shape, mask, one)

    def score(work):
        if work.mask is not None:
            _judge(work, classes, args)
        return work

    total, images, lacking = np.zeros((max(classes, 2),) * 2, np.int64), {}, 0
    works = _through_network(net, in_threads(read, rows, wait=AHEAD), plan)
    quiet = None if steps.main else True
    for work in tqdm(in_threads(score, works, wait=AHEAD), f"evaluating {args.list}", len(rows), False, disable=quiet):
        if work.scores:
            total, images[work.row], lacking = total + work.counts, work.scores, lacking + work.lacks
    shares = steps.gather((total, images, faults, lacking))
    remedy = "Correct or remove these rows, or evaluate a checkpoint of as many classes."
    report_bad_rows(args.list, [one for _, _, some, _ in shares for one in some], remedy)
    every = {row: scores for _, some, *_ in shares for row, scores in some.items()}
    assert sorted(every) == list(range(len(frame))), "an image was left out or counted twice"
    found = _of_list(sum(total for total, *_ in shares), [every[row] for row in range(len(frame))], classes, args)
    return found | {"lacking": sum(lacking for *_, lacking in shares)}


def _check_files(frame, paths, name):
    """InputError for files that are missing, and for an image listed under two paths, before the network runs."""
    first, bad = {}, []
    for line, *pair in zip(frame["line"], *(stamp_files(some) for some in paths), strict=True):
        errors = [str(stamp) for stamp in pair if isinstance(stamp, InputError)]
        if errors:
            bad.append((int(line), errors[0]))
        elif first.setdefault(pair[0][0], int(line)) != int(line):
            bad.append((int(line), f"{pair[0][0]} is the image of line {first[pair[0][0]]} too"))
    report_bad_rows(name, bad, "Correct --data-root or these rows; every image counts once.")


def _through_network(net, works, plan):
    for work, bands in in_batches(net, works, plan):
        work.bands = bands
        if work.image is not None:  # windows are run while their rows are asked for, which must happen here
            _decide(work)
        yield work


def _decide(work):
    """The predicted mask from bands of rows."""
    work.pred = np.empty(work.shape, np.uint8)
    for top, band in work.bands:
        work.pred[top : top + band.shape[1]] = band[0] > 0.5 if len(band) == 1 else band.argmax(0)


def _judge(work, classes, args):
    if work.pred is None:
        _decide(work)
    work.counts = confusion(work.pred, work.mask, max(classes, 2))
    scores = pair_scores(work.pred, work.mask, classes, args.theta0, args.theta)
    work.scores = {key: float(scores[key]) for key in ("iou", "miou", "dice", "bf")}
    work.scores["accuracy"] = mean_scores(areas_of(work.counts))["accuracy"]
    work.lacks = work.present is not None and bool(areas_of(work.counts)[2][~work.present].any())
    work.scores["pixels"] = int(work.counts.sum())
    work.image = work.mask = work.pred = work.bands = None


def _of_list(counts, images, classes, args) -> dict:
    areas = areas_of(counts)
    if classes > 1 and not areas[2, 1:].any():
        what = "no mask holds a class above 0 other than 255, which means ignore"
        raise InputError(f"{args.list}: {what}; the checkpoint has {classes} classes")
    scores = mean_scores(areas)
    if classes == 1:
        scores = {"iou": float(class_table(areas)["iou"].fillna(1.0)[1])} | scores
    scores |= {key: float(np.mean([image[key] for image in images])) for key in ("dice", "bf")}
    return {"scores": scores, "areas": areas, "images": images, "confusion": counts.tolist()}
