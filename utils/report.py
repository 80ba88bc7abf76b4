"""Gathers the test lines of a sweep into one table: on the terminal, as table.md and table.csv, or into a page.

Run   python utils/report.py runs/demo-both
      python utils/report.py runs/demo-both --page benchmarks/nlkd.md --block demo
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import pandas as pd

from utils.args import launch
from utils.errors import InputError
from utils.get_weight import weight_report
from utils.lists import read_list, write_list
from utils.logs import read_jsonl, read_record, replace_text

ORDER = ("teacher", "clean", "no_weight", "teacher_miou", "teacher_bf", "teacher_bm", "kd_miou", "kd_bf", "kd_bm")
SCORES = {"test_iou": "IoU", "test_miou": "mIoU", "test_dice": "Dice", "test_bf": "BF"}


@dataclass
class Args:
    runs: Annotated[list[str], "sweep folders, or single run folders", "positional"]
    out: Annotated[str, "folder of table.md and table.csv; empty: the first of the runs"] = ""
    page: Annotated[str, "page whose block <!-- NAME --> ... <!-- /NAME --> is replaced by the tables"] = ""
    block: Annotated[str, "NAME of that block"] = ""


def main(args: Args) -> pd.DataFrame:
    """Write and print the table; returns it with one row a method and noise."""
    found = collect(args.runs)
    table = summary(found)
    out = Path(args.out or args.runs[0])
    write_list(table, out / "table.csv")
    text = as_markdown(table, found) + weight_table(args.runs) + provenance(args.runs)
    replace_text(out / "table.md", text + "\n")
    if args.page:
        fill_block(Path(args.page), args.block, text)
    print(text)
    return table


def weight_table(folders) -> str:
    """How well the weight lists of the sweeps find the noisy masks, as a table; nothing where the noise is unknown."""
    lines = []
    for path in sorted(p for folder in folders for p in Path(folder).glob("weights/*score.csv")):
        frame = read_list(path, ("img", "weight"))
        noisy = frame["iterations"].to_numpy() > 0 if "iterations" in frame else None
        found = {} if noisy is None else weight_report(frame["weight"].to_numpy(), noisy)
        if found:
            size = f"{found['effective_size']:.0f} of {len(frame)}"
            scores = f"{found['auroc']:.4f} | {found['ap']:.4f} | {found['noisy_share']:.3f}"
            lines.append(f"| {path.stem.replace('_weight', '')} | {scores} | {size} |")
    head = "\n\n| weights | AUROC clean | AP clean | noisy share of weight | effective size |\n|---|---|---|---|---|\n"
    return head + "\n".join(lines) if lines else ""


def provenance(folders) -> str:
    """Commits, torch and machine of the runs, in one line."""
    found = {}
    for path in sorted(p for folder in folders for p in Path(folder).rglob("env.json")):
        env = read_record(path)
        if env:
            dirty = " with local changes" if env["dirty"] else ""
            found |= {f"commit {env['commit'][:10] or 'unknown'}{dirty}, torch {env['torch']}, {env['device']}": None}
    return f"\n\nMeasured: {'; '.join(found)}."


def fill_block(page: Path, name: str, text: str) -> None:
    """Put `text` between the marks of a block in a page; InputError if the page has no such block."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, _, rest = (page.read_text() if page.exists() else "").partition(start)
    _, mark, after = rest.partition(end)
    if not mark:
        raise InputError(f"{page}: no block {start} ... {end}; add these two lines where the table shall stand")
    replace_text(page, f"{before}{start}\n{text}\n{end}{after}")


def collect(folders) -> pd.DataFrame:
    """One row a run: `noise` and `row` from its name (noise60/kd_bf_s0), `seed`, `state`, and the scores it reached."""
    rows = []
    for folder in map(Path, folders):
        for path in sorted(folder.rglob("args.json")):
            args = read_record(path)
            if not args:
                continue  # cut off by a power cut, before anything was trained
            log = read_jsonl(path.with_name("log.jsonl"))
            test = next((line for line in log if line.get("split") == "test"), {})
            name = re.sub(r"_s\d+$", "", path.parent.name)
            epochs = sum("epoch" in line for line in log)
            if epochs == args["epochs"] and not args.get("test_csv", "yes"):
                continue  # a teacher of a fold: trained, never tested
            state = "finished" if test else f"{epochs} of {args['epochs']} epochs"
            above = path.parent.parent.name
            row = {"noise": above if above.startswith("noise") else "", "row": name, "seed": args["seed"]}
            row |= {"state": state, "epoch": test.get("best_epoch")}
            rows.append(row | {column: test.get(key) for key, column in SCORES.items()})
    if not any(True for folder in folders for _ in Path(folder).rglob("args.json")):
        raise InputError(f"{', '.join(map(str, folders))}: no run folder there (a run has an args.json)")
    return pd.DataFrame(rows, columns=["noise", "row", "seed", "state", "epoch", *SCORES.values()])


def summary(found: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over seeds of every row, and the share of the gap between `no_weight` and `clean`.

    `closed` = (BF - BF of no_weight) / (BF of clean - BF of no_weight), from the means of the seeds that all three
    share; empty where the gap is below 0.005 or a row is missing.
    """
    rank = {name: i for i, name in enumerate(ORDER)}
    done = found[found["state"] == "finished"]
    rows = []
    for (noise, name), runs in done.groupby(["noise", "row"]):
        row = {"noise": noise.removeprefix("noise"), "row": name, "seeds": len(runs)}
        for score in SCORES.values():
            row |= {score: runs[score].mean(), f"{score} std": runs[score].std() if len(runs) > 1 else None}
        row["closed"] = _closed(runs, _of(done, noise, "no_weight"), _of(done, None, "clean"))
        rows.append(row)
    table = pd.DataFrame(rows, columns=_columns())
    order = table["row"].map(lambda name: rank.get(name, len(rank)))
    kind = table["row"].map({"teacher": 0, "clean": 1}).fillna(2)
    keys = pd.DataFrame({"k": kind, "n": table["noise"], "o": order, "r": table["row"]})
    return table.loc[keys.sort_values(["k", "n", "o", "r"]).index].reset_index(drop=True)


def as_markdown(table: pd.DataFrame, found: pd.DataFrame) -> str:
    """The table for a page: mean +- std over seeds, and below it what is not finished."""
    if found.empty:
        return "no tested runs"
    lines = ["| noise % | row | IoU | mIoU | Dice | BF | BF gap closed | seeds |", "|---|---|---|---|---|---|---|---|"]
    for row in table.to_dict("records"):
        scores = [_number(row[score], row[f"{score} std"]) for score in SCORES.values()]
        closed = "" if pd.isna(row["closed"]) else f"{row['closed']:.0%}"
        lines.append(f"| {' | '.join([row['noise'], row['row'], *scores, closed, str(row['seeds'])])} |")
    rest = found[found["state"] != "finished"]
    lines += [f"\nnot finished: {r.noise}/{r.row}, seed {r.seed}: {r.state}" for r in rest.itertuples()]
    return "\n".join(lines)


def _columns():
    scores = [name for score in SCORES.values() for name in (score, f"{score} std")]
    return ["noise", "row", "seeds", *scores, "closed"]


def _of(done, noise, name):
    return done[(done["row"] == name) & ((done["noise"] == noise) if noise is not None else True)]


def _closed(runs, low, high):
    seeds = set(runs["seed"]) & set(low["seed"]) & set(high["seed"])
    if not seeds or runs["row"].iloc[0] in ("teacher", "clean", "no_weight"):
        return None
    mean, bottom, top = (frame[frame["seed"].isin(seeds)]["BF"].mean() for frame in (runs, low, high))
    return (mean - bottom) / (top - bottom) if abs(top - bottom) >= 0.005 else None


def _number(mean, std):
    return f"{mean:.3f}" if std is None or pd.isna(std) else f"{mean:.3f} ± {std:.3f}"


if __name__ == "__main__":
    launch(main, Args)
