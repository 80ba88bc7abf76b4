"""Scores every annotation of a list against teacher masks and writes weight lists.

Paper   NLKD, ICASSP 2021: the weight of a sample is the agreement of its annotation with the teacher's mask, as mIoU,
        boundary F1 (bf), or their mean (bm).
Run     python utils/get_weight.py --list data/csv/train_noisy_60.csv --teacher masks/PointRend --out data/csv
Writes  OUT/<list>_<teacher>_weight_<score>score.csv with img, filename, weight and all scores; with --write-labels
        OUT/<list>_<teacher>_cleaned_<score>.csv, where bad masks give way to the teacher's.
"""

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from mmap import mmap
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import cv2
import numpy as np
from tqdm import tqdm

from utils.args import launch
from utils.cleaned import check_threshold, clean_lists
from utils.errors import InputError, report_bad_rows, warn
from utils.images import read_mask, resize_mask
from utils.interrupt import in_loader_process
from utils.label_quality import weight_report
from utils.lists import join, read_list, unique_stems, write_lists
from utils.logs import read_record, replace_text
from utils.scores import QUALITIES, count_pair, pair_scores, scores_of_counts

MOST = 64  # rows that a process takes at a time; fewer of a short list, so that all end together
FEW = 8  # rows that are not worth a process of their own: starting it takes as long as scoring them


@dataclass
class Args:
    list: Annotated[str, "annotated list (img, filename; iterations where the noise is known)"]
    teacher: Annotated[list[str], "folders of <stem>.png masks, or lists img,filename; several are averaged"]
    out: Annotated[str, "folder of the weight lists"]
    name: Annotated[str, "teacher name in the file names; empty: from the first folder"] = ""
    score: Annotated[list[str], "which weights to write: miou bf bm dice iou"] = field(
        default_factory=lambda: ["miou", "bf", "bm"]
    )
    share: Annotated[list[float], "share of every teacher in the weight; empty: equal"] = field(default_factory=list)
    bm_share: Annotated[float, "share of bf in bm; 0.5 is published"] = 0.5
    classes: Annotated[int, "1: binary masks; more: class indices, 255 is ignored"] = 1
    theta0: Annotated[int, "boundary score: width of the boundary operator, odd"] = 3
    theta: Annotated[int, "boundary score: odd; (theta - 1) / 2 pixels of tolerance"] = 5
    size: Annotated[int, "compare the masks at size x size; 0: as they are"] = 0
    write_labels: Annotated[bool, "in place of weights, lists with the teacher's masks for bad ones"] = False
    threshold: Annotated[float, "with it: masks of a lower score are replaced; -1: found from the scores"] = -1
    data_root: Annotated[str, "folder that relative paths in the lists start from"] = "."
    workers: Annotated[int, "processes; 0: one a core"] = 0


def main(args: Args) -> dict:
    """Write a list for every score, or do nothing where the same ones are there.

    Returns {score: quality report or {}} and prints it where the noise is known.
    """
    shares = _check(args)
    what = "cleaned" if args.write_labels else "weight"
    record, note = _record(args), Path(args.out) / f".{Path(args.list).stem}_{_teacher_name(args)}_{what}.json"
    if record and read_record(note) == record and all(_path(s, args).exists() for s in args.score):
        print(f"{_path(args.score[0], args)}: {'labels' if args.write_labels else 'weights'} are there already")
        return {}
    frame = read_list(args.list)
    teachers = [teacher_masks(t, frame, args) for t in args.teacher]
    for teacher in args.teacher:
        _warn_if_biased(teacher)
    values, bad = _score_all(frame, teachers, shares, args)
    lines = frame["line"].to_numpy()
    bad = [(int(lines[i]), text) for i, text in bad]
    report_bad_rows(args.list, bad, "Correct or remove these rows; every image needs a mask of every teacher.")
    scores = dict(zip(QUALITIES, values.T.round(8), strict=True))
    scores["bm"] = (args.bm_share * scores["bf"] + (1 - args.bm_share) * scores["miou"]).round(8)
    paths = {name: _path(name, args) for name in args.score}
    if args.write_labels:
        reports = clean_lists(frame, teachers, shares, scores, paths, args)
    else:
        reports = _write(frame, scores, paths)
    if record:
        replace_text(note, json.dumps(record, indent=1) + "\n")
    return reports


def _look_at_row(mask_path, teacher_paths, classes: int, theta0: int, theta: int, size: int) -> list[list[float]]:
    """For every teacher the numbers of `count_pair`, or for several classes its scores in the order of QUALITIES."""
    mask = read_mask(mask_path, classes)
    rows = []
    for path in teacher_paths:
        pred = read_mask(path, classes)
        if pred.shape != mask.shape:
            sizes = f"{mask.shape[1]}x{mask.shape[0]} and {pred.shape[1]}x{pred.shape[0]}"
            raise InputError(f"{mask_path} and {path} have different sizes: {sizes}")
        pair = [resize_mask(m, size) for m in (pred, mask)] if size else (pred, mask)
        if classes == 1:  # the arithmetic is done for all rows at once
            rows.append(count_pair(*pair, theta0, theta))
        else:
            scores = pair_scores(*pair, classes, theta0, theta)
            rows.append([scores[name] for name in QUALITIES])
    return rows


def _score_all(frame, teachers, shares, args) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """(rows, scores) in the order of QUALITIES, averaged over the teachers, and (row, what is wrong) of bad rows."""
    cv2.setNumThreads(0)  # the processes are ours
    count = len(frame)
    numbers = 8 if args.classes == 1 else len(QUALITIES)
    shape = count, len(teachers), numbers
    values = np.frombuffer(mmap(-1, 8 * math.prod(shape))).reshape(shape)  # the processes share it
    sources = [(_prefix(root), names) for root, names in [*teachers, (args.data_root, frame["filename"].tolist())]]
    flags = args.classes, args.theta0, args.theta, args.size

    def work(tasks) -> list[tuple[int, str]]:
        bad = []
        for rows in tasks:
            for i in rows:
                *preds, mask = [os.path.join(root, names[i]) for root, names in sources]
                try:
                    values[i] = _look_at_row(mask, preds, *flags)
                except InputError as error:
                    bad.append((i, str(error)))
        return bad

    with tqdm(total=count, desc=f"scoring {args.list}", leave=False, disable=None) as bar:
        workers = args.workers or len(os.sched_getaffinity(0))
        bad = _share_out(work, count, min(workers, -(-count // FEW)), bar)
    scores = scores_of_counts(values) if args.classes == 1 else values
    return np.einsum("rts,t->rs", scores, shares), bad


def _share_out(work: Callable[[Iterator[range]], list], count: int, workers: int, bar) -> list:
    """What `work` returns for all of range(count), cut into pieces that this process and workers - 1 forks take.

    Processes, since the many short steps between two decoded masks would make threads wait for each other.
    """
    fork = get_context("fork")
    taken, step = fork.Value("q", 0), min(MOST, max(1, count // (64 * workers)))
    found, others = [], []

    def tasks() -> Iterator[range]:
        while True:
            with taken.get_lock():
                first, taken.value = taken.value, taken.value + step
            if first >= count:
                return
            yield range(first, min(first + step, count))
            bar.update(min(taken.value, count) - bar.n)

    def help_out(answer, parent):
        in_loader_process(0, parent)
        bar.disable = True
        try:
            answer.send(work(tasks()))
        except Exception as error:  # it is raised where the user sees it
            answer.send(error)

    try:
        for _ in range(workers - 1):
            mine, theirs = fork.Pipe(duplex=False)
            others.append((fork.Process(target=help_out, args=(theirs, os.getpid()), daemon=True), mine))
            others[-1][0].start()
            theirs.close()  # so that the end of the process is the end of the pipe
        found = work(tasks())
        for _, answer in others:
            more = answer.recv()
            if isinstance(more, Exception):
                raise more
            found += more
    except EOFError:
        raise InputError("a process that scores masks died, mostly of too little memory: try fewer --workers") from None
    finally:
        for process, answer in others:
            if process.pid:
                process.kill()  # a stopped list needs no more of them; one that has answered is at its end
                process.join()
            answer.close()
    return found


def _prefix(root) -> str:
    """What stands before the names in a folder: plain text, since a Path takes as long to build as a file to open."""
    return "" if Path(root) == Path() else str(Path(root))


def _check(args) -> np.ndarray:
    unknown = [s for s in args.score if s not in QUALITIES]
    if unknown:
        raise InputError(f"--score {unknown[0]}: known scores are {', '.join(QUALITIES)}")
    usable = len(args.share) == len(args.teacher) and np.isfinite(args.share).all() and min(args.share, default=0) >= 0
    if args.share and not (usable and sum(args.share) > 0):
        raise InputError(f"--share: needs one share of 0 or more for each of the {len(args.teacher)} teachers")
    if args.workers < 0:
        raise InputError(f"--workers {args.workers}: must be 0 or more")
    check_threshold(args)
    if not 0 <= args.bm_share <= 1:
        raise InputError(f"--bm-share {args.bm_share}: must lie between 0 and 1")
    for flag in ("theta0", "theta"):
        if getattr(args, flag) < 1 or getattr(args, flag) % 2 == 0:
            raise InputError(f"--{flag} {getattr(args, flag)}: must be odd and positive")
    shares = np.array(args.share or [1.0] * len(args.teacher))
    return shares / shares.sum()


def teacher_masks(teacher: str, frame, args) -> tuple[str, list[str]]:
    """The folder that a teacher's masks are in, and the name of each there, in the order of `frame`."""
    if teacher.endswith(".csv"):
        return args.data_root, join(frame[["img"]], read_list(teacher), teacher)["filename"].tolist()
    if not Path(teacher).is_dir():
        raise InputError(f"--teacher {teacher}: no such folder; write the masks with utils/predict_mask.py")
    if checkpoint := checkpoint_in(teacher):
        raise InputError(f"--teacher {teacher}: is a run folder; write the masks of {checkpoint} with predict_mask.py")
    return teacher, [f"{stem}.png" for stem in unique_stems(frame, args.list)]


def checkpoint_in(folder) -> Path | None:
    """The checkpoint that was meant where a run, or a folder of runs, is named instead of a folder of masks."""
    if next(Path(folder).glob("*.png"), None):
        return None
    runs = [Path(folder, name) for name in ("last.pt", "best.pt")]
    return next((p for p in runs if p.exists()), None) or min(Path(folder).glob("*/last.pt"), default=None)


def is_trusted(teacher: str) -> bool:
    """Whether masks (a folder, or its list) say that their teacher was trained on a trusted list."""
    return bool(read_record(Path(teacher.removesuffix(".csv")) / "teacher.json").get("trusted"))


def _warn_if_biased(teacher: str) -> None:
    if not is_trusted(teacher):
        warn(
            f"nothing says that {teacher} was trained on a trusted list. A teacher trained on masks with a one-sided "
            "error learns that error and can rank the masks upside down (README, The teacher)."
        )


def _record(args) -> dict:
    """What the weights follow from; empty where a teacher's masks do not say what they are (utils/predict_mask.py)."""
    notes = [Path(teacher.removesuffix(".csv")) / "teacher.json" for teacher in args.teacher]
    if not all(note.exists() for note in notes) or not Path(args.list).is_file():
        return {}
    files = [*notes, Path(args.list)]
    flags = {k: v for k, v in asdict(args).items() if k not in ("workers", "score")}
    flags["written"] = Path(args.list).stat().st_mtime_ns  # noisy masks that are made again write their list again
    return flags | {"score": sorted(args.score), "content": [hashlib.sha256(f.read_bytes()).hexdigest() for f in files]}


def _teacher_name(args) -> str:
    return args.name or Path(args.teacher[0].removesuffix(".csv")).name


def _path(score: str, args) -> Path:
    end = f"cleaned_{score}" if args.write_labels else f"weight_{score}score"
    return Path(args.out) / f"{Path(args.list).stem}_{_teacher_name(args)}_{end}.csv"


def _write(frame, scores, paths) -> dict[str, dict]:
    weights = {score: scores[score].clip(0, 1) for score in paths}
    kept = [c for c in frame if c not in ("weight", "line")]
    columns = {c: frame[c].to_numpy() if c == "iterations" else frame[c].tolist() for c in kept} | scores
    rest = {c: c for c in columns if c not in ("img", "filename")}
    files = {}
    for score, weight in weights.items():
        columns[f"weight by {score}"] = weight
        files[paths[score]] = {"img": "img", "filename": "filename", "weight": f"weight by {score}"} | rest
    write_lists(columns, files)
    reports = {}
    for score, weight in weights.items():
        report = weight_report(weight, columns["iterations"] > 0) if "iterations" in columns else {}
        shown = "  ".join(f"{k} {v:.4f}" if v < 2 else f"{k} {v:.0f}" for k, v in report.items())
        print(f"{paths[score]}: mean weight {weight.mean():.4f}{'  ' + shown if shown else ''}")
        reports[score] = report
    return reports


if __name__ == "__main__":
    launch(main, Args)
