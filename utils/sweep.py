"""What the run folders of a sweep hold, finished or not: settings, epochs, test scores, and how each of them ended."""

import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from utils.errors import InputError, warn
from utils.lists import read_list
from utils.logs import read_jsonl, read_record

SCORES = {"test_iou": "IoU", "test_miou": "mIoU", "test_dice": "Dice", "test_bf": "BF"}
# of images with one label each: at the last end of a period of the learning rate, after the last step, the best pass
ACCURACIES = {
    "test_cycle_end_accuracy": "accuracy",
    "test_accuracy": "last accuracy",
    "test_best_accuracy": "best accuracy",
}
ACCURACY = (
    "Accuracy is that of the averaged weights at the last end of a period of the learning rate, last accuracy that "
    "after the last step. Best accuracy is that of the best pass, chosen on the test images, and flattered by it."
)
ORDER = ("teacher", "clean", "supervised", "no_weight")
ORDER += ("teacher_miou", "teacher_bf", "teacher_bm", "teacher_pixel", "teacher_both")
ORDER += ("kd_miou", "kd_bf", "kd_bm", "kd_pixel", "kd_both", "l2r", "ieg")
# they saw what no row of the comparison does: clean masks, trusted ones, all of them, or the label of a test image
BOUNDS = ("clean", "teacher", "all_masks", "lad_teacher")
BOUNDS += ("ce_stage1", "cce_stage1", "cce_pct_stage1")  # or its image-level classes
INTERRUPTED = {75, 129, 130, 143}  # exit codes of a run that saved, or that a signal ended: it goes on
STATES = ("finished", "trained", "running", "unfinished", "failed", "never started")


@dataclass(frozen=True)
class Found:
    """A run as it lies on the disk; `epochs` are the lines of its log by epoch (from 0), `test` is the last line."""

    folder: Path
    state: str  # of STATES; trained: to its end, without a test list
    note: str = ""
    args: dict = field(default_factory=dict)
    epochs: dict[int, dict] = field(default_factory=dict)
    test: dict = field(default_factory=dict)
    log: Path | None = None  # what it printed

    @property
    def noise(self) -> str:
        """The folder above, if it says a noise ratio, and maybe a kind ("noise60", "noise60-polygon"), else nothing."""
        above = self.folder.parent
        return printable(above.name) if above.name.startswith("noise") and _part(above) else ""

    @property
    def row(self) -> str:
        """The folder's name without the seed; teachers of folds keep the folder above."""
        name, above = re.sub(r"_s\d+$", "", self.folder.name), self.folder.parent.name
        return printable(f"{above}/{name}" if re.match(r"folds\d", above) else name)

    @property
    def seed(self) -> int:
        """The seed of its arguments; without them, the one in its name, or 0."""
        said = self.args.get("seed")
        of_name = re.search(r"_s(\d+)$", self.folder.name)
        return said if isinstance(said, int) else int(of_name[1]) if of_name else 0

    @property
    def sweep(self) -> Path:
        """The folder of its sweep: the one above, or above its noise ratio."""
        above = self.folder.parent
        return above.parent if _part(above) else above

    def series(self, key: str) -> dict[int, float]:
        """A number of the log by epoch; of two networks the validation scores of the one that was better there."""
        found = {epoch: _number(_better(line, key)) for epoch, line in self.epochs.items()}
        return {epoch: value for epoch, value in found.items() if not math.isnan(value)}

    def best_epoch(self) -> int | None:
        """The epoch (from 0) that was tested; before the test, the best one so far on the validation list."""
        if isinstance(self.test.get("best_epoch"), int):
            return self.test["best_epoch"]
        scores = self.series("valid_score")
        return max(scores, key=scores.get) if scores else None


def _part(folder: Path) -> bool:
    """Whether a folder is the part of a sweep with one noise, or one fold; a sweep named noise3 has logs of its own."""
    return bool(re.match(r"(noise|folds)\d", folder.name)) and not (folder / "logs").is_dir()


def find_runs(folders) -> list[Found]:
    """Every run in these folders, once, also one that left a log but no folder; InputError if there is none."""
    found, without = {}, []
    for given in folders:
        folder = Path(os.path.abspath(given))  # "." has no name
        inside = [path for path in _run_folders(folder) if path.resolve() not in found]
        bar = tqdm(inside, "runs", disable=None, leave=False, delay=1)
        runs = {path.resolve(): _read(path) for path in bar}
        roots = {folder} | {run.sweep for run in runs.values() if folder in run.sweep.parents}
        ghosts = [run for root in sorted(roots) for run in _without_folder(root)]
        runs |= {run.folder.resolve(): run for run in ghosts if run.folder.resolve() not in runs}
        if not runs and not any(folder.resolve() in (path, *path.parents) for path in found):
            without.append(str(given))
        found |= runs
    what = f"{', '.join(without)}: no run folder there (a run has an args.json)"
    if not found:
        raise InputError(what)
    if without:
        warn(what)
    return list(found.values())


def frame_of(runs: list[Found], alone: bool = False) -> pd.DataFrame:
    """One row a run: `sweep` (empty where there is only one), `noise`, `row`, `seed`, `state`, `note`, test scores.

    `alone`: of the runs whose network is shown the label, tested without it; their rows are called `... without label`.
    """
    sweeps, scores = sweep_names(runs), scores_of(runs)
    first, name = ("test_no_label", "{} without label") if alone else ("test", "{}")
    rows = []
    for run in runs:
        if alone and not any(key.startswith(first) for key in run.test):
            continue
        row = {"sweep": sweeps[run.sweep], "noise": run.noise, "row": name.format(run.row), "seed": run.seed}
        row |= {"state": run.state, "note": run.note}
        rows.append(row | {score: _number(run.test.get(key.replace("test", first))) for key, score in scores.items()})
    columns = ["sweep", "noise", "row", "seed", "state", "note", *scores.values()]
    return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(scores.values(), float))


def scores_of(runs: list[Found]) -> dict[str, str]:
    """The test scores of these runs, by their key in the log: `SCORES`, or `ACCURACIES` where none has seen a mask.

    A run that ended before it wrote its arguments says nothing of that.
    """
    known = [run for run in runs if run.args]
    return ACCURACIES if known and all("network_name" in run.args for run in known) else SCORES


def scores_in(table: pd.DataFrame) -> list[str]:
    """The columns of a table that are test scores."""
    return [name for name in (*SCORES.values(), *ACCURACIES.values()) if name in table]


def further_masks(runs: list[Found]) -> list[str]:
    """A sentence for every list of clean masks that some tested rows see besides their training list: which rows."""
    seen = {}
    for run in runs:
        name = run.args.get("probe_csv") or run.args.get("trusted_csv")
        if name and run.test and run.args.get("method") != "supervised":
            seen.setdefault(name, set()).add(run.row)
    return [
        f"Also see the {_count(name)}clean masks of {printable(name)}: {', '.join(sorted(rows))}."
        for name, rows in sorted(seen.items())
    ]


def _count(path):
    try:
        return f"{len(read_list(path, ('img',)))} "
    except (InputError, OSError):
        return ""  # the sweep was made elsewhere


def sweep_names(runs: list[Found]) -> dict[Path, str]:
    """What tells the sweeps apart: the part of their paths that they do not share; nothing where there is one."""
    sweeps = list(dict.fromkeys(run.sweep for run in runs))
    if len({sweep.resolve() for sweep in sweeps}) == 1:
        return dict.fromkeys(sweeps, "")
    common = os.path.commonpath([sweep.resolve().parent for sweep in sweeps])
    return {sweep: printable(os.path.relpath(sweep.resolve(), common)) for sweep in sweeps}


def shown(noise: str) -> str:
    """The noise of a folder as tables show it: "60" of "noise60", "60 polygon" of "noise60-polygon"."""
    return noise.removeprefix("noise").replace("-", " ", 1)


def rank(row: str) -> int:
    """The place of a row in tables and figures; rows that are not known come after all others."""
    return ORDER.index(row) if row in ORDER else len(ORDER)


def printable(name) -> str:
    """A name of a file as text that any file takes: bytes that are no UTF-8 and control characters are spelt out."""
    text = str(name).encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _run_folders(folder):
    for path, names, files in os.walk(folder):
        names[:] = sorted(name for name in names if not name.startswith("."))
        if "args.json" in files:
            yield Path(path)


def _read(folder):
    args, rows = read_record(folder / "args.json"), read_jsonl(folder / "log.jsonl")
    epochs = {row["epoch"]: row for row in rows if isinstance(row.get("epoch"), int)}
    test = next((row for row in rows if row.get("split") == "test"), {})
    log = _printed(folder)
    state, note = _state(folder, args, epochs, {row.get("split") for row in rows}, log)
    return Found(folder, state, note, args, epochs, test, log)


def _state(folder, args, epochs, ends, log):
    planned, code = args.get("epochs", "?"), _code(log)
    done = f"{len(epochs)} of {planned} epochs"
    if "max_iteration" in args:  # rounded to whole passes
        done = f"{epochs[max(epochs)].get('step', '?') if epochs else 0} of {args['max_iteration']} steps"
    if "test" in ends:
        return "finished", ""
    if "none" in ends or (len(epochs) == planned and not args.get("test_csv", "yes")):
        return "trained", "no test list"
    if _locked(folder / ".lock"):
        return "running", done
    if code not in {None, 0} | INTERRUPTED:
        return "failed", f"{done}; exit code {code}: {_last_line(log)}"
    if not args and not epochs:
        return "never started", "args.json is damaged"
    return "unfinished", f"{done}, not tested" if len(epochs) == planned else done


def _without_folder(root):
    """Runs of a sweep that were given a log, but came to no folder: the data was wrong, or they have just begun."""
    for log in sorted((root / "logs").glob("*.log")):
        name = re.sub(r"^((?:noise|folds)\d+(?:-[^_]+)?)_", r"\1/", log.stem)
        code = _code(log)
        if (root / name / "args.json").exists() or code == 0:
            continue
        if code is None or code in INTERRUPTED:
            yield Found(root / name, "never started", log=log)
        else:
            yield Found(root / name, "failed", f"before it began; exit code {code}: {_last_line(log)}", log=log)


def _printed(folder):
    """The file that has what a run printed, LOGS/noise60_kd_bf_s0.log for LOGS/../noise60/kd_bf_s0, if there is one."""
    for root in list(folder.parents)[:3]:
        path = root / "logs" / f"{'_'.join(folder.relative_to(root).parts)}.log"
        if path.exists():
            return path
    return None


def _code(log):
    try:
        return int(Path(f"{log}.code").read_text())
    except (OSError, ValueError):
        return None


def _last_line(log):
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").split("\n")
    # a progress bar writes over its line
    said = [line.split("\r")[-1].strip() for line in lines if line.strip()]
    return printable(said[-1][:300]) if said else "it printed nothing"


def _locked(path) -> bool:
    """Whether a living process holds the lock of a run folder; it is only asked for, not taken."""
    try:
        file = path.open("rb")
    except OSError:
        return False
    with file:
        try:
            os.lockf(file.fileno(), os.F_TEST, 0)
        except OSError:
            return True
    return False


def _better(line, key):
    if not key.startswith("valid_") or key in line:
        return line.get(key)
    a, b = (_number(line.get(f"valid_{net}_score")) for net in "ab")
    return line.get(key.replace("valid_", "valid_b_" if b > a else "valid_a_"))


def _number(value) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan
