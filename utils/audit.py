"""Shows which masks of a list look wrong: scores, reasons and a ranking by a teacher, and a page with the worst first.

Run     python utils/audit.py train.csv --teacher runs/fold0/last.pt runs/fold1/last.pt runs/fold2/last.pt --folds 3
        python utils/audit.py train.csv --teacher masks/teacher --out audit
Writes  OUT/index.html (open it in a browser; its ticks export lists for training), OUT/audit.csv, OUT/thumbs, and with
        checkpoints the teacher's masks in OUT/masks.

Which score: `soft` (of checkpoints) finds regions of which the teacher is sure, and so the fewest of its own mistakes;
`iou`, or `margin`, what differs most; `bf` coarse or shifted contours. Several are combined by their mean rank. No
score sees an error that the teacher has learned: train it on masks you trust, and say --trusted.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import pandas as pd
from tqdm import tqdm

from utils import audit_page
from utils.args import launch
from utils.audit_notes import BIAS, Note, check_labels, leaked, weak
from utils.errors import InputError, report_bad_rows, warn
from utils.get_weight import checkpoint_in, is_trusted, teacher_masks
from utils.images import check_sizes, read_mask, write_mask
from utils.label_quality import SCORES, SOFT, VERDICTS, combine, explain, ranking_report, soft_scores, suggest
from utils.lists import read_list, unique_stems, write_list
from utils.logs import read_record, replace_text
from utils.scores import QUALITIES, pair_scores
from utils.sources import digest
from utils.store import in_threads, key_of, stamp_files

_AHEAD = 8  # images whose probabilities may wait at a time
_OURS = ("index.html", "audit.csv", "ranking.svg", "ranking-dark.svg", "ranking.png")


@dataclass
class Args:
    list: Annotated[str, "list to audit (img, filename; iterations where the noise is known)", "positional"]
    teacher: Annotated[list[str], "checkpoints (several: averaged), or one folder of <stem>.png masks, or their list"]
    out: Annotated[str, "folder of the page and everything it needs"] = "audit"
    rank_by: Annotated[
        list[str],
        f"{' '.join(SCORES)}; several: mean of their ranks. Parts missing or added: soft, or iou; coarse "
        "contours: bf. Empty: soft with checkpoints, else iou",
    ] = field(default_factory=list)
    folds: Annotated[int, "K: of the K checkpoints each image is judged by those that never saw it"] = 0
    trusted: Annotated[bool, "the teacher was trained on masks you trust; else the page warns"] = False
    show: Annotated[int, "how many images are pictured, the worst first (of any score at least 24); 0: all"] = 300
    thumb: Annotated[int, "longest side of a picture in pixels"] = 320
    cuts: Annotated[list[float], "deviations below usable masks that suggest to check, and to fix or drop"] = field(
        default_factory=lambda: [2.0, 3.0]
    )
    temperature: Annotated[float, "soft score: towards 0 the worst pixel alone counts"] = 0.1
    classes: Annotated[int, "of mask folders (1: binary; more: class indices, 255 is ignored); checkpoints know it"] = 1
    theta0: Annotated[int, "boundary score: width of the boundary operator, odd"] = 3
    theta: Annotated[int, "boundary score: odd; (theta - 1) / 2 pixels of tolerance"] = 5
    data_root: Annotated[str, "folder that relative paths in the lists start from"] = "."
    size: Annotated[int, "network input; -1: the size the checkpoint was trained with; 0: as the images are"] = -1
    batch_size: Annotated[int, "images a step"] = 16
    workers: Annotated[int, "loader processes"] = 0
    precision: Annotated[Literal["fp32", "bf16"], "bf16 is faster wherever the hardware has it"] = "fp32"
    cpu: Annotated[bool, "ignore any GPU"] = False


class Source(NamedTuple):
    """Where the teacher's masks are or go, its classes, and what is to be judged: (row, probability, (H, W))."""

    paths: list[str]
    classes: int
    items: Iterator[tuple[int, np.ndarray | None, tuple | None]]
    soft: bool
    leaks: int


def main(args: Args) -> None:
    """Write the audit, or do nothing where the same one is there already; prints what was found."""
    soft = _check(args)
    args.rank_by = list(dict.fromkeys(args.rank_by)) or (["soft"] if soft else ["iou"])
    frame = read_list(args.list)
    out, record = Path(args.out), _record(args, frame, soft)
    if read_record(out / "audit.json") == record and all((out / name).exists() for name in _OURS[:2]):
        print(f"{out / 'index.html'}: the audit is there already")
        return
    source = _checkpoints(frame, args) if soft else _masks(frame, args)
    check_labels(frame, source.classes, args)
    _claim(out, soft)
    trusted = args.trusted or (not soft and is_trusted(args.teacher[0]))
    if not trusted:
        warn(BIAS.text)
    scores, reasons = _judge_all(frame, source, args)
    notes = _notes(trusted, source.leaks, scores["iou"])
    table, scores = _rank(frame, scores, reasons, args)
    paths = [source.paths[i] for i in table["row"]]
    sizes = _pictures(table, scores, paths, source.classes, args)
    write_list(_as_list(table, scores), out / "audit.csv")
    about = {"list": args.list, "teacher": args.teacher, "folds": args.folds, "rank_by": args.rank_by}
    about |= {"notes": notes, "classes": source.classes, "cuts": args.cuts, "key": _key_of_list(frame)}
    reports = _reports(table, scores, args.rank_by, out)
    audit_page.write(out / "index.html", table, scores, sizes, reports, about)
    replace_text(out / "audit.json", json.dumps(record, indent=1) + "\n")
    _say(table, reports, out)


def _check(args) -> bool:
    """Whether the teacher is checkpoints; InputError for flags that no audit can use."""
    soft = all(str(t).endswith(".pt") for t in args.teacher)
    for folder in args.teacher:
        if checkpoint := checkpoint_in(folder):
            raise InputError(f"--teacher {folder}: is a run folder; did you mean {checkpoint}?")
    if not soft and len(args.teacher) > 1:
        raise InputError("--teacher: give checkpoints (.pt), or one folder of masks, or one list of masks")
    unknown = [name for name in args.rank_by if name not in SCORES]
    if unknown:
        raise InputError(f"--rank-by {unknown[0]}: known scores are {', '.join(SCORES)}")
    needs = [name for name in args.rank_by if name in SOFT and not soft]
    if needs:
        raise InputError(f"--rank-by {needs[0]}: needs probabilities; give the teacher's checkpoints, not its masks")
    if args.folds and not soft:
        raise InputError("--folds: masks are what they are; give the checkpoints of the folds")
    if len(args.cuts) != 2 or not 0 < args.cuts[0] <= args.cuts[1]:
        raise InputError(f"--cuts {' '.join(map(str, args.cuts))}: give two positive numbers, the smaller one first")
    for flag in ("theta0", "theta"):
        if getattr(args, flag) < 1 or getattr(args, flag) % 2 == 0:
            raise InputError(f"--{flag} {getattr(args, flag)}: must be odd and positive")
    for flag, least in (("show", 0), ("thumb", 16), ("batch_size", 1), ("workers", 0)):
        if getattr(args, flag) < least:
            raise InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be {least} or more")
    if not 1 <= args.classes <= 255 or not args.temperature >= 1e-3:
        raise InputError("--classes must lie between 1 and 255, --temperature be 0.001 or more")
    return soft


def _record(args, frame, soft) -> dict:
    """What the audit follows from; InputError for all listed files that are missing."""
    files = [os.path.join(args.data_root, name) for column in ("img", "filename") for name in frame[column]]
    if not soft:
        root, names = teacher_masks(args.teacher[0], frame, args)
        files += [os.path.join(root, name) for name in names]
    stamps = stamp_files(files)
    lines = frame["line"].tolist()
    bad = [(lines[i % len(lines)], str(stamp)) for i, stamp in enumerate(stamps) if isinstance(stamp, InputError)]
    report_bad_rows(args.list, bad, "Correct --data-root, the list or the files; every image needs both masks.")
    record = {k: v for k, v in asdict(args).items() if k not in ("out", "workers", "cpu")}
    if soft:
        record["checkpoints"] = [digest(path) for path in args.teacher]
    rows = hashlib.sha256(frame.to_csv(index=False).encode()).hexdigest()[:16]
    return record | {"trusted": args.trusted or is_trusted(args.teacher[0]), "rows": rows, "files": key_of("a", stamps)}


def _claim(out: Path, soft: bool) -> None:
    """Make the folder ours before anything in it is overwritten; InputError if it holds files of somebody else."""
    if out.exists() and not (out / "audit.json").exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists and was not written by this tool; choose another --out")
    for name in ("thumbs", "masks")[: 1 + soft]:
        (out / name).mkdir(parents=True, exist_ok=True)
    replace_text(out / "audit.json", json.dumps({"complete": False}) + "\n")
    for old in [out / name for name in _OURS] + list((out / "thumbs").glob("*.webp")):
        old.unlink(missing_ok=True)  # an interrupted audit must not stand beside the pictures of another


def _checkpoints(frame, args) -> Source:
    from utils.teachers import load_teachers, probabilities  # loads torch, which masks do not need

    teachers = load_teachers(frame, args.teacher, args)
    paths = [str(Path(args.out) / "masks" / f"{stem}.png") for stem in unique_stems(frame, args.list)]
    classes = teachers.model["classes"]
    return Source(paths, classes, probabilities(frame, teachers, args), True, teachers.leaks)


def _masks(frame, args) -> Source:
    root, names = teacher_masks(args.teacher[0], frame, args)
    items = ((i, None, None) for i in tqdm(range(len(frame)), f"scoring {args.list}", leave=False, disable=None))
    return Source([os.path.join(root, name) for name in names], args.classes, items, False, 0)


def _notes(trusted: bool, leaks: int, iou: np.ndarray) -> list[Note]:
    """What the reader of a ranking has to know about its teacher; warns of one that agrees with few masks."""
    found = weak(iou)
    if found:  # of leaks `load_teachers` warns
        warn(found.text)
    return [note for note in (None if trusted else BIAS, leaked(leaks, len(iou)), found) if note]


def _judge_all(frame, source: Source, args) -> tuple[dict[str, np.ndarray], list[str]]:
    """{score: (n,)} and the reasons, in the order of the list; one InputError names all bad rows."""
    if source.soft:
        from utils.inference import enlarge, to_mask  # loads torch, which masks do not need

    names = [os.path.join(args.data_root, name) for name in frame["filename"]]
    images = [os.path.join(args.data_root, name) for name in frame["img"]]

    def judge(item):
        i, probability, shape = item
        try:
            mask = read_mask(names[i], source.classes)
            if probability is None:
                pred = read_mask(source.paths[i], source.classes)
                check_sizes(names[i], mask.shape, source.paths[i], pred.shape)
            else:
                check_sizes(images[i], shape, names[i], mask.shape)
                probability = enlarge(probability, shape)
                pred = to_mask(probability, shape)
                write_mask(source.paths[i], pred, source.classes)
        except InputError as error:
            return i, str(error), ""
        found = pair_scores(pred, mask, source.classes, args.theta0, args.theta)
        if probability is not None:
            found |= soft_scores(probability, mask, args.temperature)
        return i, found, explain(pred, mask, source.classes)

    kept = (*QUALITIES, *SOFT, "sure") if source.soft else QUALITIES
    scores, reasons, bad = {name: np.ones(len(frame)) for name in kept}, [""] * len(frame), []
    for i, found, reasons[i] in in_threads(judge, source.items, wait=_AHEAD):
        if isinstance(found, str):
            bad.append((int(frame["line"].iloc[i]), found))
        else:
            for name in kept:
                scores[name][i] = found[name]
    report_bad_rows(args.list, bad, "Correct or remove these rows.")
    return scores, reasons


def _rank(frame, scores, reasons, args) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """The list with `rank`, `verdict`, `reason`, `row` (where it stood), and the scores: both with the worst first."""
    verdicts = suggest(scores, args.rank_by, reasons, args.cuts)
    table = frame.assign(row=np.arange(len(frame)), verdict=verdicts, reason=reasons)
    order = np.lexsort((scores["iou"], combine(scores, args.rank_by)))  # ties go by IoU
    table = table.iloc[order].reset_index(drop=True)
    return table.assign(rank=table.index + 1), {name: values[order] for name, values in scores.items()}


def _pictures(table, scores, paths, classes, args) -> dict[int, tuple[int, int]]:
    """Write the pictures of the worst images, {place: (width, height) of a panel}: a first page of every score too."""
    count, first = args.show or len(table), min(args.show, audit_page.FIRST_PAGE)
    chosen = sorted({*range(min(count, len(table))), *(i for x in scores.values() for i in np.argsort(x)[:first])})
    rows = table.loc[chosen, ["img", "filename", "line"]].itertuples()

    def picture(row):
        files = [os.path.join(args.data_root, name) for name in (row.img, row.filename)]
        target = Path(args.out) / "thumbs" / f"{row.Index + 1}.webp"
        try:
            return audit_page.draw(target, *files, paths[row.Index], classes, args.thumb)
        except InputError as error:
            return row.line, str(error)

    drawn = list(tqdm(in_threads(picture, rows), "pictures", len(chosen), leave=False, disable=None))
    report_bad_rows(args.list, [one for one in drawn if isinstance(one[1], str)], "Correct or remove these rows.")
    return {int(i): size for i, size in zip(chosen, drawn, strict=True)}


def _as_list(table, scores) -> pd.DataFrame:
    """audit.csv: a list that every script reads, with what was found beside its own columns."""
    found = {name: values.round(6) for name, values in scores.items()}
    first = ["rank", "img", "filename", "verdict", "reason"]
    others = [c for c in table if c not in (*first, *found, "row", "line")]
    return table[first].assign(**found).join(table[others])


def _reports(table, scores, rank_by, out) -> dict[str, dict[str, float]]:
    """{score: how well it finds the known noise}, drawn into OUT/ranking.svg and .png; empty where it is not known."""
    noisy = table["iterations"].to_numpy() > 0 if "iterations" in table else np.zeros(len(table), bool)
    ranked = {name: scores[name] for name in SCORES if name in scores}
    if len(rank_by) > 1:  # what the page is sorted by stands first
        ranked = {" + ".join(rank_by): combine(scores, rank_by)} | ranked
    reports = {name: ranking_report(values, noisy) for name, values in ranked.items()}
    if not any(reports.values()):
        return {}
    audit_page.draw_curves(out, ranked, noisy)
    return reports


def _key_of_list(frame) -> str:
    """The ticks of a page belong to the images and masks of a list, whichever teacher judged them."""
    return hashlib.sha256("\n".join(frame["img"] + "\t" + frame["filename"]).encode()).hexdigest()[:16]


def _say(table, reports, out) -> None:
    counts = table["verdict"].value_counts()
    told = ", ".join(f"{counts.get(verdict, 0)} {verdict}" for verdict in VERDICTS)
    print(f"{out / 'index.html'}: {len(table)} masks; suggested: {told}")
    wide = max(map(len, reports), default=0) + 2
    for name, report in reports.items():
        print(f"  {name:{wide}}" + "  ".join(f"{k} {v:.3f}" for k, v in report.items()))


if __name__ == "__main__":
    launch(main, Args)
