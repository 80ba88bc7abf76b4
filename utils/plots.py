"""The figures of a report: learning curves, scores against noise, schedules, weight histograms; nothing of pyplot.

Every figure can be read without colour: rows have panels of their own, or markers and line styles. A figure is drawn
once, for a light page; for a dark one the colours in its SVG are exchanged.
"""

import io
import math
import warnings
from itertools import cycle

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from utils.sweep import Found, scores_in

MADE_BY = "NLKD utils/report.py"
INK, SOFT, GRID, BLUE, ORANGE = "#1b1f24", "#57606a", "#d0d7de", "#0072b2", "#d55e00"
# the colour-blind-safe colours of Okabe and Ito without their yellow, which vanishes on white
COLOURS = (BLUE, ORANGE, "#009e73", "#cc79a7", "#e69f00", "#56b4e9", INK)
DARK = {INK: "#e3e6ea", SOFT: "#9aa4af", GRID: "#363d45", BLUE: "#4aa8e8", ORANGE: "#ff8f4a"}
MARKERS, DASHES = "osD^vPX*<>", ("-", "--", "-.", ":")
TEXT = {
    "svg.fonttype": "none",  # text stays text: small files, and a reader can search in them
    "svg.hashsalt": "nlkd",
    "hatch.linewidth": 0.6,
}
WIDTH, PANEL, HEAD, FOOT = 10.4, 1.75, 0.55, 0.5  # inches
Rows = dict[str, list[Found]]  # the runs of every row
LONGEST = 26  # characters of a name that a panel has room for


def render(figure: Figure) -> tuple[str, str, bytes]:
    """A figure as SVG for a light page, SVG for a dark page (both without background), and PNG on white."""
    svg, png = io.StringIO(), io.BytesIO()
    with matplotlib.rc_context(TEXT), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # names in other scripts; a browser has the letters
        figure.savefig(svg, format="svg", transparent=True, metadata={"Creator": MADE_BY, "Date": None})
        figure.savefig(png, format="png", dpi=110, facecolor="white", metadata={"Software": MADE_BY})
    light = svg.getvalue()
    dark = light
    for old, new in DARK.items():
        dark = dark.replace(old, new)
    return light, dark, png.getvalue()


def curves(rows: Rows, keys: dict[str, str], unit: str, references: Rows) -> Figure | None:
    """A panel for each row: numbers of the log over the epochs, thin for a seed, bold for the mean over seeds.

    `keys` maps up to three keys of the log to what they are called; the third is for rows without the first two.
    `references` are rows whose mean of the first key is drawn into every panel. `unit` is the label of the y axis.
    None if no run has any of the keys.
    """
    rows = {name: runs for name, runs in rows.items() if any(run.series(key) for run in runs for key in keys)}
    if not rows:
        return None
    figure, panels = _grid(rows)
    looks = dict(zip(keys, ((BLUE, "-"), (ORANGE, (0, (4, 1))), (INK, "-.")), strict=False))
    styles = {}
    dashes = dict(zip(references, ("--", ":"), strict=False))
    behind = [(name, _mean(references[name], next(iter(keys))), dash) for name, dash in dashes.items()]
    for panel, (name, runs) in zip(panels, rows.items(), strict=True):
        for other, mean, dash in behind:
            if other != name and len(mean):
                panel.plot(mean.index + 1, mean, color=SOFT, linestyle=dash, linewidth=1.1)
        there = [key for key in keys if any(run.series(key) for run in runs)]
        own = [key for key in there if key in list(keys)[:2]] or there
        for key in own:
            styles[key] = looks[key]
            _draw_seeds(panel, runs, key, *looks[key])
    panels[0].set_xlim(0.5, max(epoch for runs in rows.values() for run in runs for epoch in run.epochs) + 1.5)
    handles = [Line2D([], [], color=c, linestyle=d, linewidth=1.9) for c, d in styles.values()]
    handles += [Line2D([], [], color=SOFT, linestyle=dash, linewidth=1.1) for _, mean, dash in behind if len(mean)]
    _legend(figure, handles, [*(keys[key] for key in styles), *(name for name, mean, _ in behind if len(mean))])
    _label(figure, panels, "epoch", unit)
    return figure


def against_noise(table: pd.DataFrame) -> Figure | None:
    """Mean test scores of the rows over the noise ratio, with their deviation over seeds; None with one ratio only.

    `table` has a row and a ratio (text, %) a line, as `utils.report.summary` makes it. Rows without a ratio of their
    own, as `clean` and `teacher`, are level lines.
    """
    level = table["row"].isin(["clean", "teacher"])
    table = table[level | pd.to_numeric(table["noise"], errors="coerce").notna()]
    level = level[table.index]
    if table.loc[~level, "noise"].nunique() < 2:
        return None
    names = table.loc[~level, "row"].drop_duplicates().tolist()
    figure = Figure(figsize=(WIDTH, 7.2))
    panels = figure.subplots(2, 2)
    figure.subplots_adjust(0.07, 0.075, 0.8, 0.95, wspace=0.2, hspace=0.3)
    looks = dict(zip(names, _looks(), strict=False))
    known = scores_in(table)
    for panel in panels.flat[len(known) :]:
        panel.remove()
    for panel, score in zip(panels.flat, known, strict=False):
        handles = []
        for i, (name, (colour, marker, dash)) in enumerate(looks.items()):
            line = table[table["row"] == name]
            ratio = line["noise"].astype(float).to_numpy()
            aside = (i - (len(names) - 1) / 2) * 0.25  # so that the bars do not lie on each other
            style = {"color": colour, "marker": marker, "linestyle": dash, "linewidth": 1.3, "markersize": 4.5}
            panel.errorbar(ratio + aside, line[score], line[f"{score} std"].fillna(0), elinewidth=0.7, **style)
            handles.append(Line2D([], [], **style))
        for line, dash in zip(table[level].itertuples(), (":", "-."), strict=False):
            value = table.loc[line.Index, score]
            handles.append(panel.axhline(value, color=SOFT, linestyle=dash, linewidth=1.3))
        panel.set_title(score, loc="left", color=INK, fontsize=9, y=1)
        panel.set_xlabel("noisy training labels (%)", color=INK, fontsize=9)
        panel.set_ylabel(f"{score} on the test list", color=INK, fontsize=9)
        plain(panel)
        panel.set_xticks(sorted(table.loc[~level, "noise"].astype(float).unique()))
    _legend(figure, handles, [*names, *table.loc[level, "row"]], loc="center left", bbox_to_anchor=(0.81, 0.5), ncols=1)
    return figure


def schedules(runs: list[Found]) -> Figure | None:
    """The student's share T, the share that co-teaching drops, and the learning rate over the epochs; None without any.

    Runs with the same curve are one line, which names their rows.
    """
    keys = {
        "T": "T, the student's share",
        "forget": "share of images dropped",
        "lr": "learning rate",
    }
    found = {key: _alike(runs, key) for key in keys}
    found = {key: lines for key, lines in found.items() if lines}
    if not found:
        return None
    figure = Figure(figsize=(WIDTH, 3.4))
    panels = figure.subplots(1, 3)
    figure.subplots_adjust(0.07, 0.34, 0.985, 0.93, wspace=0.3)
    for panel in panels[len(found) :]:
        panel.remove()
    for panel, (key, lines) in zip(panels, found.items(), strict=False):
        handles = []
        for (curve, _), (colour, marker, dash) in zip(lines[:6], _looks(), strict=False):
            style = {"color": colour, "marker": marker, "linestyle": dash, "linewidth": 1.5, "markersize": 4}
            where = [e + 1 for e, _ in curve], [value for _, value in curve]
            handles += panel.plot(*where, markevery=max(1, len(curve) // 8), **style)
        names = [_short(", ".join(names), 44) for _, names in lines]
        if len(lines) > 6:
            names = [*names[:5], f"{names[5]}; {len(lines) - 6} more curves are left out"]
        panel.set_xlabel("epoch", color=INK, fontsize=9)
        panel.set_ylabel(keys[key], color=INK, fontsize=9)
        plain(panel)
        _legend(panel, handles, names, loc="upper left", bbox_to_anchor=(-0.1, -0.22), ncols=1)
    return figure


def histograms(lists: dict[str, tuple[np.ndarray, np.ndarray | None]]) -> Figure | None:
    """A panel for each weight list: how many clean (filled) and noisy (hatched) masks have which weight.

    `lists` maps a name to weights (n,) in [0, 1] and which masks are noisy (n,) bool, None if that is unknown.
    """
    if not lists:
        return None
    figure, panels = _grid(lists, columns=3)
    edges = np.linspace(0, 1, 21)
    for panel, (weight, noisy) in zip(panels, lists.values(), strict=True):
        noisy = np.zeros(len(weight), bool) if noisy is None else noisy
        panel.hist(weight[~noisy], edges, color=BLUE, alpha=0.45)
        if noisy.any():
            panel.hist(weight[noisy], edges, histtype="step", edgecolor=ORANGE, hatch="////", linewidth=1.4)
        panel.set_xlim(0, 1)
        panel.xaxis.set_major_locator(MaxNLocator(5))
    known = any(noisy is not None for _, noisy in lists.values())
    handles = [Patch(facecolor=BLUE, alpha=0.45)]
    handles += [Patch(facecolor="none", edgecolor=ORANGE, hatch="////")] * known
    _legend(figure, handles, ["clean masks", "noisy masks"] if known else ["masks"])
    _label(figure, panels, "weight of a mask", "masks (count)")
    return figure


def _grid(named, columns=4):
    count = len(named)
    columns = min(columns, max(2, count))
    lines = math.ceil(count / columns)
    height = HEAD + FOOT + PANEL * lines + 0.3 * (lines - 1)
    figure = Figure(figsize=(WIDTH * columns / 4 if columns < 3 else WIDTH, height))
    side = 0.75 / figure.get_figwidth()
    gap = 0.38 / PANEL
    figure.subplots_adjust(side, FOOT / height, 1 - side / 5, 1 - HEAD / height, wspace=0.1, hspace=gap)
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flatten()
    for panel, name in zip(panels, named, strict=False):
        panel.set_title(
            _short(name, LONGEST * 4 // columns), loc="left", color=INK, fontsize=9, parse_math=False, pad=3
        )
        plain(panel)
    for panel in panels:  # places that are given need not be sought, which is a third of the time of a figure
        panel.xaxis.set_label_coords(0.5, -0.2)
        panel.yaxis.set_label_coords(-0.2, 0.5)
    for i, panel in enumerate(panels):
        if i >= count:
            panel.remove()
        else:
            panel.tick_params(labelbottom=i + columns >= count, labelleft=i % columns == 0)
    return figure, panels[:count]


def plain(panel) -> None:
    """Give axes the grid, ticks and spines of every figure, in colours that `render` exchanges for a dark page."""
    panel.grid(color=GRID, linewidth=0.6)
    panel.set_axisbelow(True)
    panel.tick_params(colors=SOFT, labelsize=8, length=2)
    panel.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
    panel.yaxis.set_major_locator(MaxNLocator(4))
    for side, spine in panel.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(SOFT)


def _label(figure, panels, x, y):
    figure.supxlabel(x, fontsize=9, color=INK, y=0.06 / figure.get_figheight(), va="bottom")
    figure.supylabel(y, fontsize=9, color=INK, x=0.06 / figure.get_figwidth(), ha="left")


def _legend(owner, handles, names, **where):
    where = where or {"loc": "upper left", "bbox_to_anchor": (0.06, 1.0), "ncols": len(names)}
    legend = owner.legend(handles, [""] * len(names), frameon=False, fontsize=8, labelcolor=INK, **where)
    for text, name in zip(legend.get_texts(), names, strict=True):  # a name may begin with "_" or hold a "$"
        text.set_parse_math(False)
        text.set_text(_short(name, 48))


def _mean(runs, key) -> pd.Series:
    """The mean over the seeds by epoch, as far as all of the seeds that have the key came."""
    every = [series for run in runs if (series := run.series(key))]
    return pd.DataFrame(every).T.sort_index().dropna().mean(axis=1) if every else pd.Series(dtype=float)


def _draw_seeds(panel, runs, key, colour, dash):
    panel.plot(*_joined(runs, key), color=colour, linewidth=0.6, alpha=0.55)
    mean = _mean(runs, key)
    alone = {"marker": "o", "markersize": 4} if len(mean) == 1 else {}  # a line needs two epochs
    panel.plot(mean.index + 1, mean, color=colour, linestyle=dash, linewidth=1.9, **alone)


def _joined(runs, key):
    """Epochs (from 1) and values of all seeds as one line with gaps, which is drawn much faster than many."""
    every = [run.series(key) for run in runs]
    epochs = [e for one in every for e in (*(epoch + 1 for epoch in one), math.nan)]
    return epochs, [v for one in every for v in (*one.values(), math.nan)]


def _alike(runs, key):
    """[(curve, rows)] of a key: rows with the same curve together; of two that run the same way, the longer one."""
    found = {}
    for run in runs:
        curve = tuple(sorted((epoch, round(value, 9)) for epoch, value in run.series(key).items()))
        if curve:
            longer = next((other for other in found if other[: len(curve)] == curve), None)
            shorter = [other for other in found if curve[: len(other)] == other]
            names = {name: None for other in shorter for name in found.pop(other)} if longer is None else {}
            found.setdefault(longer or curve, {}).update(names | {run.row: None})
    return [(curve, list(names)) for curve, names in found.items()]


def _looks():
    """Colour, marker and line style without end: 7, 10 and 4 of them, in step, so that the first 70 pairs differ."""
    return zip(cycle(COLOURS), cycle(MARKERS), cycle(DASHES), strict=False)


def _short(name, longest) -> str:
    return name if len(name) <= longest else f"{name[: longest - 1]}…"
