"""Gathers the runs of a sweep, finished or not, into a page with tables and figures: report.html, table.md, table.csv.

Run   python utils/report.py runs/demo-both
      python utils/report.py runs/demo-both runs/demo-erode --score IoU --baseline decoupling --out runs/both
      python utils/report.py runs/demo-both --page benchmarks/nlkd.md --block demo
"""

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import pandas as pd

from utils.args import launch
from utils.errors import InputError, warn
from utils.get_weight import weight_report
from utils.lists import read_list, write_list
from utils.logs import read_record, replace_text
from utils.paired import COLUMNS, holm, paired_difference
from utils.report_page import Weights, check_ours, write_report
from utils.sweep import ACCURACY, BOUNDS, Found, find_runs, frame_of, further_masks, rank, scores_in, shown


@dataclass
class Args:
    runs: Annotated[list[str], "sweep folders, or single run folders", "positional"]
    out: Annotated[str, "folder of report.html, plots, table.md and table.csv; empty: the first of the runs"] = ""
    score: Annotated[
        Literal["", "IoU", "mIoU", "Dice", "BF", "accuracy"],
        "score of the differences, curves and the closed gap; empty: BF, of images with one label each accuracy",
    ] = ""
    baseline: Annotated[str, "row that the others are compared with, seed by seed"] = "no_weight"
    page: Annotated[str, "page whose block <!-- NAME --> ... <!-- /NAME --> is replaced by the tables"] = ""
    block: Annotated[str, "NAME of that block"] = ""


def main(args: Args) -> pd.DataFrame:
    """Write the report and print the table; returns the table with one row a method and noise."""
    runs = find_runs(args.runs)
    found = frame_of(runs)
    rows, known = sorted(set(found["row"])), scores_in(found)
    score = args.score or ("BF" if "BF" in known else known[0])
    if score not in known:
        raise InputError(f"--score {score}: these runs have {', '.join(known)}")
    if args.baseline not in rows and args.baseline != "no_weight":
        raise InputError(f"--baseline {args.baseline}: no such row; there are {', '.join(rows)}")
    out = Path(args.out or args.runs[0])
    check_ours(out)
    alone = frame_of(runs, alone=True)
    table = summary(pd.concat([found, alone]) if len(alone) else found, score, args.baseline)
    weights = read_weights([*args.runs, *(run.sweep for run in runs)])
    text = as_markdown(table, found, score, args.baseline)
    text += (
        "".join(f"\n\n{_cell(sentence)}" for sentence in further_masks(runs)) + weight_table(weights) + provenance(runs)
    )
    write_list(table, out / "table.csv")
    replace_text(out / "table.md", text + "\n")
    if args.page:
        fill_block(Path(args.page), args.block, text)
    write_report(out, runs, found, table, weights, score, args.baseline, provenance(runs).strip())
    print(f"{text}\n\nreport: {out / 'report.html'}")
    return table


def read_weights(folders) -> list[Weights]:
    """The weight lists of the sweeps, with how well they find the noisy masks; warns of one that cannot be read."""
    places = dict.fromkeys(Path(os.path.abspath(folder)) for folder in folders)  # a run names its sweep's folder too
    paths = sorted(path for place in places for path in place.glob("weights/**/*score.csv"))
    several = len({_above(path)[0] for path in paths}) > 1
    found = []
    for path in paths:
        try:
            frame = read_list(path, ("img", "weight"))
        except InputError as error:
            warn(str(error))
            continue
        name = path.stem.replace("_weight", "")
        noisy = frame["iterations"].to_numpy() > 0 if "iterations" in frame else None
        weight = frame["weight"].to_numpy()
        quality = {} if noisy is None else weight_report(weight, noisy)
        sweep, kind = _above(path)
        name = "/".join([*([sweep.name] if several else []), *kind, name])
        found.append(Weights(name, weight, noisy, quality))
    return found


def _above(path: Path) -> tuple[Path, tuple[str, ...]]:
    """The sweep that a weight list belongs to, and the folders between its `weights` and the list."""
    depth = next(i for i, folder in enumerate(path.parents) if folder.name == "weights")
    return path.parents[depth + 1], path.parent.relative_to(path.parents[depth]).parts


def weight_table(weights: list[Weights]) -> str:
    """How well the weight lists of the sweeps find the noisy masks, as a table; nothing where the noise is unknown."""
    lines = []
    for one in weights:
        if one.quality:
            size = f"{one.quality['effective_size']:.0f} of {len(one.weight)}"
            scores = f"{one.quality['auroc']:.4f} | {one.quality['ap']:.4f} | {one.quality['noisy_share']:.3f}"
            lines.append(f"| {_cell(one.name)} | {scores} | {size} |")
    head = "\n\n| weights | AUROC clean | AP clean | noisy share of weight | effective size |\n|---|---|---|---|---|\n"
    return head + "\n".join(lines) if lines else ""


def provenance(runs: list[Found]) -> str:
    """Commits, torch and machine of the runs, in one line."""
    found = {}
    for run in runs:
        env = read_record(run.folder / "env.json")
        if env:
            dirty = " with local changes" if env.get("dirty") else ""
            commit = str(env.get("commit") or "unknown")[:10]
            found[f"commit {commit}{dirty}, torch {env.get('torch', '?')}, {env.get('device', '?')}"] = None
    return f"\n\nMeasured: {'; '.join(found)}." if found else ""


def fill_block(page: Path, name: str, text: str) -> None:
    """Put `text` between the marks of a block in a page; InputError if the page has no such block."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, _, rest = (page.read_text() if page.exists() else "").partition(start)
    _, mark, after = rest.partition(end)
    if not mark:
        raise InputError(f"{page}: no block {start} ... {end}; add these two lines where the table shall stand")
    replace_text(page, f"{before}{start}\n{text}\n{end}{after}")


def summary(found: pd.DataFrame, score: str = "BF", baseline: str = "no_weight") -> pd.DataFrame:
    """Mean and standard deviation over seeds of every row, the gap it closed, and its difference to the baseline.

    `closed` = (score - that of no_weight) / (that of clean - that of no_weight), from the means of the seeds that all
    three share; empty where the gap is below 0.005 or a row is missing. The other columns are those of
    `utils.paired.paired_difference`, with `p_holm` corrected for all comparisons in the table.
    """
    done, known, rows = found[found["state"] == "finished"], scores_in(found), []
    for (sweep, noise, name), runs in done.groupby(["sweep", "noise", "row"]):
        own = done[done["sweep"] == sweep]
        row = {"sweep": sweep, "noise": shown(noise), "row": name, "seeds": len(runs)}
        for column in known:
            row |= {column: runs[column].mean(), f"{column} std": runs[column].std() if len(runs) > 1 else None}
        row["closed"] = _closed(runs, _of(own, noise, "no_weight"), _of(own, None, "clean"), score)
        base = _of(own, noise, baseline)
        if name not in (*BOUNDS, baseline) and len(base):
            row |= paired_difference(runs.set_index("seed")[score], base.set_index("seed")[score])
        rows.append(row)
    scores = [name for column in known for name in (column, f"{column} std")]
    table = pd.DataFrame(rows, columns=["sweep", "noise", "row", "seeds", *scores, "closed", *COLUMNS])
    table["p_holm"] = holm(table["p"])
    table["pairs"] = table["pairs"].astype("Int64")
    table = _ordered(table)
    return table if found["sweep"].any() else table.drop(columns="sweep")


def as_markdown(table: pd.DataFrame, found: pd.DataFrame, score: str = "BF", baseline: str = "no_weight") -> str:
    """The table for a page: mean +- std over seeds, differences where there are several, and what is not finished."""
    if (found["state"] == "trained").all():
        return "no tested runs"
    first = ["sweep"] if "sweep" in table else []
    known = scores_in(table)
    gap = [f"{score} gap closed"] if table["closed"].notna().any() else []
    head = [*first, "noise %", "row", *known, *gap, "seeds"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"] if len(table) else ["no tested runs"]
    for row in table.to_dict("records"):
        scores = [_number(row[column], row[f"{column} std"]) for column in known]
        closed = ["" if pd.isna(row["closed"]) else f"{row['closed']:.0%}".replace("-0%", "0%")] * len(gap)
        cells = [*(row[name] for name in first), row["noise"], row["row"], *scores, *closed, str(row["seeds"])]
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    if "accuracy" in known and len(table):
        lines.append(f"\n{ACCURACY}")
    lines += _differences(table, first, score, baseline)
    rest = found[~found["state"].isin(["finished", "trained"])]
    for r in rest.itertuples():
        what = r.note if r.state == "unfinished" else ", ".join(filter(None, (r.state, r.note)))
        lines.append(f"\nnot finished: {'/'.join(filter(None, (r.sweep, r.noise, r.row)))}, seed {r.seed}: {what}")
    return "\n".join(lines)


def _differences(table, first, score, baseline):
    """A second table, for rows that have two seeds or more in common with the baseline."""
    rows = table[table["pairs"] >= 2]
    if rows.empty:
        return []
    head = [*first, "noise %", "row", f"{score} - {score} of {baseline}", "95 % interval", "p", "p (Holm)", "pairs"]
    lines = ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for r in rows.to_dict("records"):
        cells = [
            *(r[name] for name in first),
            r["noise"],
            r["row"],
            f"{r['difference']:+.3f}".replace("-0.000", "+0.000"),
        ]
        between = "" if pd.isna(r["low"]) else f"{r['low']:+.3f} to {r['high']:+.3f}"
        cells += [between, _p(r["p"]), _p(r["p_holm"]), str(r["pairs"])]
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return lines


def _p(value) -> str:
    if pd.isna(value):  # differences that are all the same
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _cell(text) -> str:
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text.replace("|", "\\|"))  # names are text, whatever they contain


def _ordered(table):
    kind = table["row"].map({"teacher": 0, "clean": 1}).fillna(2)
    ratio = pd.to_numeric(table["noise"].str.split(" ").str[0], errors="coerce")
    sweep = table["sweep"].str.replace(r"\d+", lambda number: number[0].zfill(9), regex=True)  # 23 before 183
    keys = pd.DataFrame({"s": sweep, "k": kind, "f": ratio, "n": table["noise"]})
    keys = keys.assign(o=table["row"].map(rank), r=table["row"])
    return table.loc[keys.sort_values(list(keys)).index].reset_index(drop=True)


def _of(done, noise, name):
    return done[(done["row"] == name) & ((done["noise"] == noise) if noise is not None else True)]


def _closed(runs, low, high, score):
    seeds = set(runs["seed"]) & set(low["seed"]) & set(high["seed"])
    if not seeds or runs["row"].iloc[0] in (*BOUNDS, "no_weight"):
        return None
    mean, bottom, top = (frame[frame["seed"].isin(seeds)][score].mean() for frame in (runs, low, high))
    return (mean - bottom) / (top - bottom) if abs(top - bottom) >= 0.005 else None


def _number(mean, std):
    if pd.isna(mean):
        return ""
    return f"{mean:.3f}" if std is None or pd.isna(std) else f"{mean:.3f} ± {std:.3f}"


if __name__ == "__main__":
    launch(main, Args)
