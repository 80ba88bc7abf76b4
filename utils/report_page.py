"""The page of a report: what stands in its tables, which figures it has, and the newest pictures of some runs."""

import os
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from urllib.parse import quote

import cv2
import numpy as np
import pandas as pd
from tqdm import tqdm

from utils.errors import InputError
from utils.images import write_bytes
from utils.logs import replace_text
from utils.page import data_uri, encode, write_page
from utils.plots import MADE_BY, against_noise, curves, histograms, render, schedules
from utils.sweep import ACCURACY, BOUNDS, SCORES, STATES, further_masks, printable, rank, scores_in, shown, sweep_names

EXAMPLES, WIDEST = 6, 1400  # runs whose pictures are shown; pixels


@dataclass(frozen=True)
class Weights:
    """A weight list: weights (n,), which masks are noisy (n,) bool or None, and `utils.get_weight.weight_report`."""

    name: str
    weight: np.ndarray
    noisy: np.ndarray | None
    quality: dict[str, float]


@dataclass(frozen=True)
class Drawn:
    """A figure in the page: `light` and `dark` are addresses that hold the picture."""

    name: str
    title: str
    light: str
    dark: str


def write_report(out: Path, runs, found, table, weights, score: str, baseline: str, measured: str) -> None:
    """Write report.html, and every figure as PNG and SVG into OUT/plots; existing ones of this tool are replaced.

    `found` has a line for each of `runs`, `table` is the summary, `measured` says where the runs were made.
    """
    figures = _draw(out / "plots", runs, table, weights, score, baseline)
    states = found["state"].value_counts()
    write_page(
        out / "report.html",
        "report.html",
        made_by=MADE_BY,
        title=printable(Path(os.path.abspath(out)).name),
        counts=[(state, int(states[state])) for state in STATES if state in states],
        table=result_rows(table),
        scores=scores_in(table),
        images="accuracy" in table,
        about_accuracy=ACCURACY,
        gap=bool(table["closed"].notna().any()),
        score=score,
        baseline=baseline,
        compared=bool((table["pairs"].fillna(0) > 0).any()),
        comparisons=int(table["p"].notna().sum()),
        several=bool(found["sweep"].any()),
        weights=weights,
        figures=figures,
        examples=_examples(runs, table, score, baseline),
        runs=_run_rows(runs, found, out),
        shared=_shared(runs),
        further=further_masks(runs),
        measured=measured,
    )


def check_ours(out: Path) -> None:
    """InputError if what stands at the place of the page, a table or a figure was not written by this tool."""
    for path in [out / "report.html", *sorted((out / "plots").glob("*.[ps][nv]g"))]:
        if path.exists():
            with path.open("rb") as file:
                ours = MADE_BY.encode() in file.read(4096)
            if not ours:
                raise InputError(f"{path}: exists and was not written by this tool; choose another --out")
    for name, signs in {"table.csv": ("row,seeds,",), "table.md": ("| row |", "no tested runs")}.items():
        path = out / name
        first = path.read_text(errors="replace").partition("\n")[0] if path.is_file() else signs[0]
        if not any(sign in first for sign in signs):
            raise InputError(f"{path}: exists and was not written by this tool; choose another --out")


def result_rows(table: pd.DataFrame) -> list[dict]:
    """The lines of the summary as dicts, NaN as None; `best` names the scores in which a row leads its noise ratio.

    Rows that look the same (three decimals) lead together; `clean` and `teacher` never do, nor does a single row.
    """
    best = {index: set() for index in table.index}
    rows = table[~table["row"].isin(BOUNDS)]
    for _, group in rows.groupby([name for name in ("sweep", "noise") if name in table]):
        for column in set(scores_in(table)) - {"best accuracy"}:  # chosen on the images that it is tested on
            shown = group[column].round(3)
            for index in shown.index[shown == shown.max()] if shown.nunique() > 1 else []:
                best[index].add(column)
    lines = table.astype(object).where(table.notna(), None).to_dict("records")
    return [line | {"best": best[index]} for index, line in zip(table.index, lines, strict=True)]


def rendered(draws, workers: int = 1):
    """What `utils.plots.render` gives for every figure in turn, None for one that has nothing to show.

    `draws` are functions that return a figure or None; with several workers, processes share them.
    """
    if workers < 2:
        yield from map(_render, draws)
        return
    with ProcessPoolExecutor(workers, get_context("forkserver")) as pool:
        yield from pool.map(_render, draws)


def _draw(folder, runs, table, weights, score, baseline):
    """Every figure that the runs have something for, written and ready for the page, by section."""
    folder.mkdir(parents=True, exist_ok=True)
    sections, plan = {}, _planned(runs, table, weights, score, baseline)
    # processes take seconds to start, which only many figures are worth
    workers = min(8, len(os.sched_getaffinity(0)), len(plan) // 8)
    drawn = rendered([draw for *_, draw in plan], workers)
    bar = tqdm(drawn, "figures", len(plan), disable=None, leave=False, delay=1)
    for (section, name, title, _), pictures in zip(plan, bar, strict=True):
        if pictures is None:
            continue
        light, dark, png = pictures
        replace_text(folder / f"{name}.svg", light)
        replace_text(folder / f"{name}-dark.svg", dark)
        write_bytes(folder / f"{name}.png", png)
        addresses = [data_uri(svg.encode(), "image/svg+xml") for svg in (light, dark)]
        sections.setdefault(section, []).append(Drawn(name, title, *addresses))
    return sections


def _render(draw):
    figure = draw()
    return None if figure is None else render(figure)


def _planned(runs, table, weights, score, baseline):
    """[(section, file name, title, function that draws)]; a function returns None where it has nothing to show."""
    found, sweeps = [], sweep_names(runs)
    for sweep in dict.fromkeys(sweeps.values()):
        own = [run for run in runs if sweeps[run.sweep] == sweep]
        lines = table[table["sweep"] == sweep] if "sweep" in table else table
        for noise, rows in _by_noise(own).items():
            ratio = f"{shown(noise)} % noise" if noise.removeprefix("noise").isdecimal() else shown(noise)
            title = ", ".join(filter(None, (sweep, ratio)))
            found += _planned_curves(rows, score, baseline, _slug(sweep, noise), title)
        end = _slug(sweep)
        found.append(("noise", f"against_noise{end}", sweep, partial(against_noise, lines)))
        found.append(("schedules", f"schedules{end}", sweep, partial(schedules, own)))
    lists = {one.name: (one.weight, one.noisy) for one in weights}
    found.append(("weights", "weights", "", partial(histograms, lists)))
    return found


def _planned_curves(rows, score, baseline, end, title):
    images = score not in SCORES.values()
    references = {name: rows[name] for name in ((baseline,) if images else ("no_weight", "clean")) if name in rows}
    valid = {f"valid_{score.lower()}": "mean over seeds"}
    what, clean, pure = ("labels", "right", "train_kept_precision") if images else ("masks", "clean", "train_purity")
    split = {"train_loss_clean": f"{clean} {what}", "train_loss_noisy": f"noisy {what}", "train_loss": f"all {what}"}
    weight = {"train_weight_clean": f"{clean} {what}", "train_weight_noisy": f"noisy {what}"}
    picked = {
        "train_kept": f"{'labels' if images else 'images'} that are kept, of all",
        pure: f"{clean} {what}, of those kept",
    }
    unit = "training loss (nats)" if images else "training loss (nats a pixel)"
    scale = "mean weight (sum of a batch: 1)" if images else "mean weight (0 to 1)"
    where = "test images" if images else "validation"
    return [
        ("valid", f"learning_curves{end}", title, partial(curves, rows, valid, f"{score} on {where}", references)),
        ("loss", f"training_loss{end}", title, partial(curves, rows, split, unit, {})),
        ("counted", f"weights_in_training{end}", title, partial(curves, rows, weight, scale, {})),
        ("kept", f"selection{end}", title, partial(curves, rows, picked, "share (0 to 1)", {})),
    ]


def _by_noise(runs):
    """{noise: {row: runs}} in the tables' order; `clean` joins every ratio, teachers stand where nothing else is."""
    ranked = sorted(runs, key=lambda run: (rank(run.row), run.row))
    others = [run for run in ranked if run.row not in BOUNDS and not run.row.startswith("folds")]
    grouped = {}
    for noise in sorted({run.noise for run in others or ranked}, key=_natural):
        chosen = [run for run in ranked if run.noise == noise or run.row == "clean"]
        for run in chosen if not others else [run for run in chosen if run in others or run.row == "clean"]:
            grouped.setdefault(noise, {}).setdefault(run.row, []).append(run)
    return grouped


def _examples(runs, table, score, baseline):
    """(caption, address) of the newest picture of a few runs: the baseline, then the best rows at the highest noise."""
    reached = {(line["noise"], line["row"]): line[score] for line in table.to_dict("records")}

    def order(run):
        noise = shown(run.noise)
        ratio = noise.partition(" ")[0]
        ratio = float(ratio) if ratio.isdecimal() else -1.0
        return -ratio, run.row != baseline, -reached.get((noise, run.row), -1.0), run.row, run.seed

    found, seen = [], set()
    for run in sorted(runs, key=order):
        kind = (run.sweep, run.noise, run.row)
        paths = sorted(run.folder.glob("pictures/epoch_*.png"), key=lambda path: _natural(path.stem))
        picture = None if kind in seen or not paths else _small(paths[-1])
        if picture is not None:
            seen.add(kind)
            name = "/".join(filter(None, (run.noise, run.row)))
            found.append((f"{name}, seed {run.seed}, {printable(paths[-1].stem)}", data_uri(encode(picture))))
        if len(found) == EXAMPLES:
            break
    return found


def _small(path):
    picture = (
        cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR) if path.stat().st_size else None
    )
    if picture is None:
        return None  # cut off while it was written
    scale = min(1.0, WIDEST / picture.shape[1], 16_000 / picture.shape[0])  # WebP ends at 16383 pixels
    if scale < 1:
        picture = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)


def _run_rows(runs, found, out):
    rows = []
    for run, line in zip(runs, found.astype(object).where(found.notna(), None).to_dict("records"), strict=True):
        seconds, best = list(run.series("seconds").values()), run.best_epoch()
        link = _link(run.folder, out) + "/" if run.folder.is_dir() else ""
        log = _link(run.log, out) if run.log else ""
        own = {"link": link, "log": log, "best": None if best is None else best + 1}
        rows.append(line | own | {"seconds": float(np.median(seconds)) if seconds else None})
    return rows


def _link(path, out) -> str:
    return quote(os.fsencode(os.path.relpath(path, os.path.abspath(out))))


def _shared(runs):
    """{flag: value} of the settings that all runs have in common; lists and names are left out."""
    known = [run.args for run in runs if run.args]
    first, rest = (known[0], known[1:]) if known else ({}, [])
    kept = {
        k: v for k, v in first.items() if not isinstance(v, dict | list) and not k.endswith(("_csv", "name", "_dir"))
    }
    same = {k: v for k, v in kept.items() if all(k in args and args[k] == v for args in rest)}
    return {printable(k): printable(v) for k, v in sorted(same.items())}


def _slug(*parts) -> str:
    return "".join("-" + re.sub(r"[^A-Za-z0-9_.+-]+", "_", part) for part in parts if part)


def _natural(text):
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", text)]
