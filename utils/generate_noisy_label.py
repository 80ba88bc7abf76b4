"""Noisy masks and their lists from clean lists, at one or several noise ratios.

Paper   NLKD, ICASSP 2021; --preset nlkd repeats the published assignment.
Run     python utils/generate_noisy_label.py --train-csv train.csv --valid-csv valid.csv --ratios 20 40 60 \\
            --out-csv data/csv --out-masks data/person
        python utils/generate_noisy_label.py ... --kinds polygon:0.5 jitter:0.3 missing:0.2 --severity 0.8

Without --kinds masks are eroded or dilated by --levels. Kinds of noise are those of utils/add_noise.py; each gets the
strength at which its masks keep a mean IoU of --severity, so that kinds compare at equal damage. A ratio r gives
train_noisy_r.csv and valid_noisy_r.csv, with the rows of the clean lists in their order, and the masks in
iteration_noisy_r/. The same command again does nothing, or makes what is missing.
"""

import hashlib
import json
import os
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from tqdm import tqdm

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from utils.add_noise import coarsen
from utils.args import launch
from utils.errors import InputError, report_bad_rows
from utils.images import read_mask, read_pair, write_mask
from utils.lists import from_root, read_list, unique_stems, write_list
from utils.logs import read_record, replace_text
from utils.noise_args import Args, complete
from utils.noise_mixture import Mixture
from utils.noise_plan import assign, assign_kinds, assign_nlkd, draw_trusted
from utils.store import in_threads


class Output(NamedTuple):
    """One ratio: the plan as a frame (img, clean, role, line, stem, iterations, op) and where things go."""

    ratio: int
    plan: pd.DataFrame
    folder: Path
    lists: dict[str, Path]
    record: Path
    expected: dict


def main(args: Args) -> None:
    """Write the masks and lists of every ratio; unusable input is an InputError before anything is written."""
    args = complete(args)
    pool = _read_pool(args)
    mixture, searched = Mixture(args) if args.kinds else None, False
    if mixture:
        mixture.recall(pool, Path(args.out_masks, "strengths.json"))
        searched = bool(mixture.lacking)
    if searched:  # a search reads masks too, but would not say in which rows the bad ones are
        _check_masks(args, pool, mixture)
        mixture.find_strengths(pool)
    outputs = [_plan(args, pool, ratio, mixture) for ratio in dict.fromkeys(args.ratios)]
    unmade = [_unmade(args, output) for output in outputs]
    if not searched and any(rows is None or len(rows) for rows in unmade):
        _check_masks(args, pool, mixture)
    for output, rows in zip(outputs, unmade, strict=True):
        _make(args, output, rows, mixture)
    if mixture:
        mixture.remember()
    if args.trusted:
        _write_trusted(args, pool)


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


def _check_masks(args: Args, pool: pd.DataFrame, mixture: Mixture | None) -> None:
    """Decode all masks, and the images a kind looks at: all bad rows come in one message, before any writing."""
    look = mixture is not None and "superpixel" in mixture.chances

    def fault(row) -> str:
        try:
            if look:
                read_pair(Path(args.data_root, row.img), Path(args.data_root, row.clean), args.classes)
            else:
                read_mask(Path(args.data_root, row.clean), args.classes)
        except InputError as error:
            return str(error)
        return ""

    for role, path in _sources(args).items():
        rows = pool[pool["role"] == role]
        faults = _in_threads(args, fault, list(rows.itertuples()), f"checking {role}")
        bad = [(line, text) for line, text in zip(rows["line"], faults, strict=True) if text]
        report_bad_rows(path, bad, "Correct --data-root, the list or the files.")


def _in_threads(args: Args, function, items, what: str) -> list:
    found = in_threads(function, items, args.workers)  # OpenCV works outside the interpreter lock
    return list(tqdm(found, what, len(items), disable=None, leave=False))


def _plan(args: Args, pool: pd.DataFrame, ratio: int, mixture: Mixture | None) -> Output:
    if mixture:
        noise = assign_kinds(pool["stem"].tolist(), ratio, mixture.chances, args.seed)
    elif args.preset == "nlkd":
        noise = _published(args, pool["stem"].tolist(), ratio)
    else:
        noise = assign(pool["stem"].tolist(), ratio, tuple(args.levels), args.op, args.seed)
    plan = pool.merge(noise, left_on="stem", right_on="id", validate="1:1").drop(columns="id")
    folder = Path(args.out_masks, f"iteration_noisy_{ratio}")
    lists = {role: Path(args.out_csv, f"{role}_noisy_{ratio}.csv") for role in _sources(args)}
    sources = _sources(args) | ({"test": args.test_csv} if args.test_csv else {})
    expected = {name: getattr(args, name) for name in ("seed", "levels", "op", "preset")}
    if mixture:
        expected |= {"kinds": {k: [chance, mixture.strengths[k]] for k, chance in mixture.chances.items()}}
        expected |= {"classes": args.classes, "confusion": _hash(args.confusion) if args.confusion else ""}
    expected |= {
        "masks": from_root(folder, args.data_root),
        "inputs": {role: _hash(path) for role, path in sources.items()},
    }
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


def _make(args: Args, output: Output, unmade: pd.DataFrame | None, mixture: Mixture | None) -> None:
    if unmade is not None and unmade.empty:
        print(f"{output.ratio} %: up to date, nothing to do")
        return
    rows = output.plan[output.plan["iterations"] > 0] if unmade is None else unmade
    output.folder.mkdir(parents=True, exist_ok=True)

    @cache
    def forget() -> None:  # a killed run must not leave lists and a record that vouch for other masks
        for path in (output.record, *output.lists.values()) if unmade is None else ():
            path.unlink(missing_ok=True)

    def one(row) -> tuple[int, float]:
        if mixture:
            noisy, iou = mixture.make(row)
            used = int(noisy is not None)
        else:
            clean = read_mask(Path(args.data_root, row.clean))
            noisy, used, _ = coarsen(clean, row.iterations, row.op, keep_area=args.preset == "none")
            iou = float("nan")
        if used:
            forget()
            write_mask(output.folder / f"{row.stem}.png", noisy, args.classes)
        return used, iou

    made = _in_threads(args, one, list(rows.itertuples()), f"noise {output.ratio} %")
    if unmade is not None:
        print(f"{output.ratio} %: {len(rows)} missing masks made again")
        return
    final = output.plan.copy()
    final.loc[rows.index, ["iterations", "iou"]] = np.array(made, float).reshape(-1, 2)
    if len(rows) and not any(used for used, _ in made):
        what = f"this noise would empty, fill or not change each of the {len(rows)} masks that were drawn"
        remedy = "give another --strength or --severity, or other --kinds" if mixture else "give lower --levels"
        raise InputError(f"--ratios {output.ratio}: {what}; {remedy}")
    _write_lists(output, final.astype({"iterations": int}), mixture)
    _say(output, final, mixture)


def _say(output: Output, final: pd.DataFrame, mixture: Mixture | None) -> None:
    noisy, fewer = final["iterations"] > 0, final["iterations"] < output.plan["iterations"]
    counts, lowered = final.loc[noisy, "op"].value_counts(), ""
    if mixture:
        iou = final[noisy].groupby("op")["iou"].mean()
        what = "; ".join(
            f"{counts[kind]} {kind}, mean IoU {iou[kind]:.3f}" for kind in mixture.chances if kind in counts
        )
    else:
        what = f"{counts.get('erode', 0)} eroded, {counts.get('dilate', 0)} dilated"
        lowered = f"{int((fewer & noisy).sum())} with fewer iterations and "
    print(
        f"{output.ratio} %: {counts.sum()} of {len(final)} masks noisy ({what}), "
        f"{lowered}{int((fewer & ~noisy).sum())} left clean so as not to vanish or "
        f"fill the frame: {', '.join(map(str, output.lists.values()))}"
    )


def _write_lists(output: Output, final: pd.DataFrame, mixture: Mixture | None) -> None:
    noisy = final["iterations"] > 0
    final["filename"] = np.where(noisy, output.expected["masks"] + "/" + final["stem"] + ".png", final["clean"])
    final["op"] = final["op"].where(noisy, "")
    columns = ["img", "filename", "iterations", "op", "clean"]
    if mixture:  # how much noise it is in the unit of its kind, and what it costs
        final["strength"] = final["op"].map(mixture.strengths).fillna(0.0)
        final["iou"] = final["iou"].where(noisy, 1.0).round(4)
        columns += ["strength", "iou"]
    for role, path in output.lists.items():
        write_list(final.loc[final["role"] == role, columns], path)
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


def _hash(path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


if __name__ == "__main__":
    launch(main, Args)
