"""Noisy masks and their lists from clean lists, at one or several noise ratios.

Paper   NLKD, ICASSP 2021; --preset nlkd repeats the published assignment.
Run     python utils/generate_noisy_label.py --train-csv train.csv --valid-csv valid.csv --ratios 20 40 60 \\
            --out-csv data/csv --out-masks data/person

A ratio r gives train_noisy_r.csv and valid_noisy_r.csv, with the rows of the clean lists in their order, and the masks
in iteration_noisy_r/. The same command again does nothing, or makes what is missing.
"""

import hashlib
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import pandas as pd
from tqdm import tqdm

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from utils.add_noise import OPS, coarsen
from utils.args import launch
from utils.errors import InputError, report_bad_rows
from utils.images import read_mask, write_mask
from utils.lists import read_list, unique_stems, write_list
from utils.logs import read_record, replace_text
from utils.prepare_data import draw_test, pool_of
from utils.store import in_threads

NLKD_RATIOS = (10, 20, 30, 40, 50, 60)
NLKD_LEVELS = (6, 7, 8, 9, 10)


@dataclass
class Args:
    out_csv: Annotated[str, "folder of the noisy lists"]
    out_masks: Annotated[str, "folder that gets one folder of noisy masks a ratio"]
    train_csv: Annotated[str, "clean training list"] = ""
    valid_csv: Annotated[str, "clean validation list; it gets noise too, as a real one would have"] = ""
    test_csv: Annotated[str, "test list; it stays clean, --preset nlkd checks it"] = ""
    data_root: Annotated[str, "folder that relative paths in the lists start from"] = "."
    ratios: Annotated[list[int], "percent of the masks that become noisy"] = field(default_factory=lambda: [60])
    levels: Annotated[list[int], "lowest and highest number of iterations"] = field(default_factory=lambda: [6, 10])
    op: Annotated[Literal["both", "erode", "dilate"], "both: a fair coin for every mask"] = "both"
    seed: Annotated[int, "one seed for which masks, their levels and operations"] = 2020
    preset: Annotated[Literal["none", "nlkd"], "nlkd: the published assignment, for the published split"] = "none"
    trusted: Annotated[int, "also write trusted.csv: this many clean images, from the validation list first"] = 0
    workers: Annotated[int, "threads; 0: one a CPU core"] = 0
    list: Annotated[str, "one clean list, instead of --train-csv and --valid-csv"] = ""


class Output(NamedTuple):
    """One ratio: the plan as a frame (img, clean, role, line, stem, iterations, op) and where things go."""

    ratio: int
    plan: pd.DataFrame
    folder: Path
    lists: dict[str, Path]
    record: Path
    expected: dict


def assign(ids: list[str], ratio: int, levels: tuple[int, int], op: str, seed: int) -> pd.DataFrame:
    """Noise for floor(ratio * n / 100) of n ids: columns id, iterations (0: clean) and op ("", erode, dilate).

    `ratio` is in percent, `levels` the lowest and highest iterations. Every id has its own draws, keyed by (seed, id),
    so the order of `ids` is of no matter; a larger ratio keeps the noise of a smaller one and adds to it; the levels
    are equally frequent, to within one mask.
    """
    draws = {i: _generator(seed, "noise", i) for i in ids}
    ranked = sorted(ids, key=lambda i: (draws[i].random(), i))
    steps = range(levels[0], levels[1] + 1)
    noise = {}
    for rank, i in enumerate(ranked[: ratio * len(ids) // 100]):
        noise[i] = (steps[rank % len(steps)], OPS[draws[i].integers(2)] if op == "both" else op)
    return pd.DataFrame([(i, *noise.get(i, (0, ""))) for i in ids], columns=["id", "iterations", "op"])


def assign_nlkd(ids: list[str], n_test: int, seed: int, ratio: int) -> pd.DataFrame:
    """The published assignment for `ids`, the whole data set: one row for every id outside the test set, sorted.

    Columns as in `assign`. One Python random stream draws the test ids and then the ratios 10, 20, ... 60 one after
    the other, so these are the only ratios it has, and they are not nested. Source: NLKD, ICASSP 2021, released lists.
    """
    if ratio not in NLKD_RATIOS:
        raise InputError(f"--ratios {ratio}: the published ratios are {', '.join(map(str, NLKD_RATIOS))}")
    test, rng = draw_test(ids, n_test, seed)
    pool = pool_of(ids, test)
    for now in NLKD_RATIOS[: NLKD_RATIOS.index(ratio) + 1]:
        drawn = rng.sample(pool, now * len(pool) // 100)
        group = max(1, -(-len(drawn) // len(NLKD_LEVELS)))
        level = {i: NLKD_LEVELS[place // group] for place, i in enumerate(drawn)}
        noise = {i: (level[i], OPS[rng.randint(0, 1)]) for i in pool if i in level}
    return pd.DataFrame([(i, *noise.get(i, (0, ""))) for i in pool], columns=["id", "iterations", "op"])


def draw_trusted(valid: list[str], train: list[str], count: int, seed: int) -> list[str]:
    """`count` ids from `valid`, on which no student trains, and from `train` once `valid` is used up."""
    key = {i: _generator(seed, "trusted", i).random() for i in [*valid, *train]}
    order = [*sorted(valid, key=lambda i: (key[i], i)), *sorted(train, key=lambda i: (key[i], i))]
    return order[:count]


def _generator(seed: int, purpose: str, i: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{purpose} {i}".encode()).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:16], "big")])


def main(args: Args) -> None:
    """Write the masks and lists of every ratio; unusable input is an InputError before anything is written."""
    _check(args)
    pool = _read_pool(args)
    outputs = [_plan(args, pool, ratio) for ratio in dict.fromkeys(args.ratios)]
    unmade = [_unmade(args, output) for output in outputs]
    if any(rows is None or len(rows) for rows in unmade):
        _check_masks(args, pool)
    for output, rows in zip(outputs, unmade, strict=True):
        _make(args, output, rows)
    if args.trusted:
        _write_trusted(args, pool)


def _check(args: Args) -> None:
    for ratio in args.ratios:
        if not 0 <= ratio <= 100:
            raise InputError(f"--ratios {ratio}: a ratio is a percentage, 0 to 100")
    if len(args.levels) != 2 or not 1 <= args.levels[0] <= args.levels[1]:
        raise InputError(f"--levels {' '.join(map(str, args.levels))}: give the lowest (1 or more) and the highest")
    for flag in ("seed", "trusted", "workers"):
        if getattr(args, flag) < 0:
            raise InputError(f"--{flag} {getattr(args, flag)}: must be 0 or more")
    if [bool(path) for path in (args.list, args.train_csv, args.valid_csv)] not in ([1, 0, 0], [0, 1, 1]):
        raise InputError("give --train-csv and --valid-csv, or --list alone")
    if args.preset == "nlkd":
        if not args.test_csv:
            raise InputError(
                "--preset nlkd needs --test-csv: the published noise follows from the draw of the test set"
            )
        if args.levels != [NLKD_LEVELS[0], NLKD_LEVELS[-1]] or args.op != "both":
            raise InputError("--preset nlkd has levels 6 to 10 and --op both; leave these two flags out")


def _sources(args: Args) -> dict[str, str]:
    return {Path(args.list).stem: args.list} if args.list else {"train": args.train_csv, "valid": args.valid_csv}


def _read_pool(args: Args) -> pd.DataFrame:
    frames = []
    for role, path in _sources(args).items():
        frame = read_list(path)
        if "iterations" in frame:
            noisy = frame[frame["iterations"] > 0]
            bad = [(row.line, f"{row.img} has noise level {row.iterations}") for row in noisy.itertuples()]
            report_bad_rows(path, bad, "Noise is made from clean masks: give the clean list.")
        frames.append(frame.rename(columns={"filename": "clean"})[["img", "clean", "line"]].assign(role=role))
    pool = pd.concat(frames, ignore_index=True)
    pool["stem"] = unique_stems(pool, " and ".join(_sources(args).values()))
    if args.trusted > len(pool):
        raise InputError(f"--trusted {args.trusted}: the lists hold only {len(pool)} images")
    return pool


def _check_masks(args: Args, pool: pd.DataFrame) -> None:
    """Decode every clean mask once, so that all bad rows of a list come in one message and before any writing."""

    def fault(clean: str) -> str:
        try:
            read_mask(Path(args.data_root, clean))
        except InputError as error:
            return str(error)
        return ""

    for role, path in _sources(args).items():
        rows = pool[pool["role"] == role]
        faults = _in_threads(args, fault, rows["clean"], f"checking {role}")
        bad = [(line, text) for line, text in zip(rows["line"], faults, strict=True) if text]
        report_bad_rows(path, bad, "Correct --data-root, the list or the files.")


def _in_threads(args: Args, function, items, what: str) -> list:
    found = in_threads(function, items, args.workers)  # OpenCV works outside the interpreter lock
    return list(tqdm(found, what, len(items), disable=None, leave=False))


def _plan(args: Args, pool: pd.DataFrame, ratio: int) -> Output:
    if args.preset == "nlkd":
        noise = _published(args, pool["stem"].tolist(), ratio)
    else:
        noise = assign(pool["stem"].tolist(), ratio, tuple(args.levels), args.op, args.seed)
    plan = pool.merge(noise, left_on="stem", right_on="id", validate="1:1").drop(columns="id")
    folder = Path(args.out_masks, f"iteration_noisy_{ratio}")
    lists = {role: Path(args.out_csv, f"{role}_noisy_{ratio}.csv") for role in _sources(args)}
    sources = _sources(args) | ({"test": args.test_csv} if args.test_csv else {})
    expected = {name: getattr(args, name) for name in ("seed", "levels", "op", "preset")}
    expected |= {"masks": _in_list(args, folder), "inputs": {role: _hash(path) for role, path in sources.items()}}
    if {os.path.abspath(path) for path in lists.values()} & {os.path.abspath(path) for path in sources.values()}:
        raise InputError(f"--out-csv {args.out_csv}: an input list would be overwritten; choose another folder")
    if os.path.abspath(folder) in {os.path.abspath(Path(args.data_root, clean).parent) for clean in pool["clean"]}:
        raise InputError(f"{folder}: clean masks of the lists lie here; choose another --out-masks")
    return Output(ratio, plan, folder, lists, folder.with_suffix(".json"), expected)


def _published(args: Args, stems: list[str], ratio: int) -> pd.DataFrame:
    test = unique_stems(read_list(args.test_csv, need=("img",)), args.test_csv)
    ids = sorted({*stems, *test})
    noise = assign_nlkd(ids, len(test), args.seed, ratio)
    if set(noise["id"]) != set(stems):
        what = f"not the {len(test)} test images that seed {args.seed} draws from all {len(ids)}"
        raise InputError(f"{args.test_csv}: {what}; write the lists with utils/prepare_data.py, or leave --preset out")
    return noise


def _unmade(args: Args, output: Output) -> pd.DataFrame | None:
    """The rows whose mask is missing; None where arguments, lists or clean masks are not those of the record."""
    record = read_record(output.record)
    hashes = {role: _hash(path) for role, path in output.lists.items() if path.is_file()}
    if record != output.expected | {"lists": hashes}:
        return None
    cleans = [Path(args.data_root, clean) for clean in output.plan["clean"]]
    written = output.record.stat().st_mtime_ns
    if not all(clean.is_file() and clean.stat().st_mtime_ns <= written for clean in cleans):
        return None
    noisy = pd.concat([read_list(path) for path in output.lists.values()]).query("iterations > 0")["img"]
    there = set(os.listdir(output.folder)) if output.folder.is_dir() else set()
    plan = output.plan[output.plan["img"].isin(noisy)]
    return plan[[f"{stem}.png" not in there for stem in plan["stem"]]]


def _make(args: Args, output: Output, unmade: pd.DataFrame | None) -> None:
    if unmade is not None and unmade.empty:
        print(f"{output.ratio} %: up to date, nothing to do")
        return
    rows = output.plan[output.plan["iterations"] > 0] if unmade is None else unmade
    output.folder.mkdir(parents=True, exist_ok=True)
    if unmade is None:  # a killed run must not leave lists and a record that vouch for other masks
        for path in (output.record, *output.lists.values()):
            path.unlink(missing_ok=True)

    def one(row) -> int:
        clean = read_mask(Path(args.data_root, row.clean))
        coarse = coarsen(clean, row.iterations, row.op, keep_area=args.preset == "none")
        if coarse.iterations:
            write_mask(output.folder / f"{row.stem}.png", coarse.mask)
        return coarse.iterations

    used = _in_threads(args, one, list(rows.itertuples()), f"noise {output.ratio} %")
    if unmade is not None:
        print(f"{output.ratio} %: {len(rows)} missing masks made again")
        return
    final = output.plan.copy()
    final.loc[rows.index, "iterations"] = used
    _write_lists(output, final)
    counts = final.loc[final["iterations"] > 0, "op"].value_counts()
    lowered = int(((final["iterations"] < output.plan["iterations"]) & (final["iterations"] > 0)).sum())
    print(
        f"{output.ratio} %: {counts.sum()} of {len(final)} masks noisy ({counts.get('erode', 0)} eroded, "
        f"{counts.get('dilate', 0)} dilated), {lowered} with fewer iterations and {used.count(0)} left clean so as not "
        f"to vanish or fill the frame: {', '.join(map(str, output.lists.values()))}"
    )


def _write_lists(output: Output, final: pd.DataFrame) -> None:
    noisy = final["iterations"] > 0
    final["filename"] = np.where(noisy, output.expected["masks"] + "/" + final["stem"] + ".png", final["clean"])
    final["op"] = final["op"].where(noisy, "")
    for role, path in output.lists.items():
        write_list(final.loc[final["role"] == role, ["img", "filename", "iterations", "op", "clean"]], path)
    record = output.expected | {"lists": {role: _hash(path) for role, path in output.lists.items()}}
    replace_text(output.record, json.dumps(record, indent=1) + "\n")


def _write_trusted(args: Args, pool: pd.DataFrame) -> None:
    train = (pool["role"] == "train") & (not args.list)
    chosen = draw_trusted(pool.loc[~train, "stem"].tolist(), pool.loc[train, "stem"].tolist(), args.trusted, args.seed)
    rows = pool.set_index("stem").loc[chosen].rename(columns={"clean": "filename"}).assign(iterations=0)
    table, path = rows[["img", "filename", "iterations"]], Path(args.out_csv, "trusted.csv")
    if not path.is_file() or path.read_text() != table.to_csv(index=False, lineterminator="\n"):
        write_list(table, path)
        print(f"{len(rows)} clean images, {(rows['role'] == 'train').sum()} of them of the training list: {path}")


def _in_list(args: Args, path: Path) -> str:
    root, path = Path(os.path.abspath(args.data_root)), Path(os.path.abspath(path))
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def _hash(path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


if __name__ == "__main__":
    launch(main, Args)
