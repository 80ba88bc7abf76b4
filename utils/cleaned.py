"""Lists whose worst masks give way to a teacher's: what `utils/get_weight.py --write-labels` writes."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from utils.errors import InputError, report_bad_rows, warn
from utils.images import IGNORE, check_sizes, read_mask, write_mask
from utils.label_quality import lowest_usable
from utils.lists import from_root, unique_stems, write_list
from utils.scores import pair_scores
from utils.store import in_threads


def check_threshold(args) -> None:
    """InputError for a --threshold that makes no sense."""
    if not (args.threshold == -1 or 0 <= args.threshold <= 1):
        raise InputError(f"--threshold {args.threshold}: must lie between 0 and 1, or be -1 to be found")
    if args.threshold != -1 and not args.write_labels:
        raise InputError(f"--threshold {args.threshold}: is for --write-labels; weights have no threshold")


def clean_lists(frame: pd.DataFrame, teachers: list, shares: np.ndarray, scores: dict, paths: dict, args) -> dict:
    """For every score {name: (n,)} the list at its path, and beside it the masks that take the place of bad ones.

    Bad are those with a score below `args.threshold`, or where that is -1 below `lowest_usable`; the new ones are a
    `vote` of the `teachers`, (folder, file names) in the order of `frame`. The given mask goes to the column `given`,
    `replaced` is 0 or 1, and `iterations`, which is about the given mask, becomes `given_iterations`: nobody knows the
    noise of the new one. Returns {name: report}: `replaced`, `threshold` and what `replacement_report` knows.
    """
    return {name: _clean_list(frame, teachers, shares, scores[name], name, path, args) for name, path in paths.items()}


def _clean_list(frame, teachers, shares, score, name, path, args) -> dict[str, float]:
    threshold = lowest_usable(score) if args.threshold < 0 else args.threshold
    replaced = score < threshold
    masks = [Path(path.with_suffix(""), f"{stem}.png") for stem in unique_stems(frame, args.list)]
    ious = _replace(frame, teachers, shares, replaced, masks, args)
    new = [from_root(p, args.data_root) for p in masks]
    table = frame.drop(columns=["weight", "line"], errors="ignore").rename(columns={"iterations": "given_iterations"})
    table = table.assign(filename=np.where(replaced, new, frame["filename"]))
    table = table.assign(given=frame["filename"], replaced=replaced.astype(int), **{f"given_{name}": score})
    write_list(table, path)
    noisy = (frame["iterations"] > 0).to_numpy() if "iterations" in frame else None
    report = {"replaced": int(replaced.sum()), "threshold": threshold} | replacement_report(replaced, noisy, ious)
    shown = "  ".join(f"{key} {value:.4f}" for key, value in report.items() if key != "replaced")
    print(f"{path}: {report['replaced']} of {len(frame)} masks replaced  {shown}")
    if report.get("iou_after", 1) < report.get("iou_before", 0):
        warn(f"{path}: the new labels are worse than the given ones; lower --threshold, or find a better teacher")
    if report["replaced"] in (0, len(frame)):
        what = "none of the masks is" if not report["replaced"] else "all masks are"
        warn(f"{path}: {what} replaced; the scores go from {score.min():.4f} to {score.max():.4f}, see --threshold")
    return report


def replacement_report(replaced: np.ndarray, noisy: np.ndarray | None, ious: np.ndarray) -> dict[str, float]:
    """How good a replacement was: `replaced` (n,) bool, `noisy` (n,) bool or None, `ious` (n, 2) before and after.

    `precision` is the noisy share of what was replaced, `recall` the replaced share of what is noisy, if any.
    `iou_before` and `iou_after` are the labels' mean IoU with the clean masks, over the rows whose IoUs are not NaN.
    """
    found = {}
    if noisy is not None and replaced.any():
        found["precision"] = float(noisy[replaced].mean())
    if noisy is not None and noisy.any():
        found["recall"] = float(replaced[noisy].mean())
    known = ~np.isnan(ious).any(1)
    if known.any():
        found |= dict(zip(("iou_before", "iou_after"), ious[known].mean(0).tolist(), strict=True))
    return found


def vote(masks: list[np.ndarray], shares: np.ndarray, given: np.ndarray) -> np.ndarray:
    """The label of most teachers at every pixel: masks and `given` (H, W) uint8, `shares` their voices -> (H, W) uint8.

    Of a tie `given` wins if it is in it, else the lowest label. What a teacher marks 255 is no vote, and pixels that
    are 255 in `given` stay so.
    """
    result, most = given.copy(), np.full(given.shape, -1.0)
    for label in np.unique(np.stack([*masks, given])):
        if label == IGNORE:
            continue
        votes = sum(share * (mask == label) for share, mask in zip(shares, masks, strict=True))
        votes = votes + 1e-9 * (given == label)
        result[votes > most] = label
        most = np.maximum(votes, most)
    return np.where(given == IGNORE, given, result)


def _replace(frame, teachers, shares, replaced, masks, args) -> np.ndarray:
    """Write the new masks; IoUs of the labels with the `clean` masks before and after, (n, 2), NaN if unknown."""
    masks[0].parent.mkdir(parents=True, exist_ok=True)
    given, lines = frame["filename"].tolist(), frame["line"].tolist()
    clean = frame["clean"].tolist() if "clean" in frame else [""] * len(frame)

    def one(i):
        try:
            before = read_mask(Path(args.data_root, given[i]), args.classes)
            after = before
            if replaced[i]:
                seen = [read_mask(os.path.join(root, names[i]), args.classes) for root, names in teachers]
                after = vote(seen, shares, before)
                write_mask(masks[i], after, args.classes)
            if not clean[i]:
                return np.nan, np.nan
            truth = read_mask(Path(args.data_root, clean[i]), args.classes)
            check_sizes(given[i], before.shape, clean[i], truth.shape)
            return tuple(pair_scores(m, truth, args.classes)["iou"] for m in (before, after))
        except InputError as error:
            return lines[i], str(error)

    rows = [i for i in range(len(frame)) if replaced[i] or clean[i]]
    found = list(tqdm(in_threads(one, rows), f"cleaning {args.list}", len(rows), leave=False, disable=None))
    report_bad_rows(args.list, [two for two in found if isinstance(two[1], str)], "Correct or remove these rows.")
    ious = np.full((len(frame), 2), np.nan)
    ious[rows] = np.array(found, float).reshape(-1, 2)
    return ious
