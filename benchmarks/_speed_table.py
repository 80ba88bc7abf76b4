"""The figures of benchmarks/speed.py: kept in a JSON file, shown on a page, and compared ratio by ratio.

Run   python benchmarks/_speed_table.py NEW.json [AGAIN.json ...] --against benchmarks/speed.json
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from utils.args import launch
from utils.errors import InputError
from utils.logs import read_record, replace_text
from utils.report import fill_block

LOSS = 0.10  # of a ratio, from which on a change counts as a regression
SAME, WORSE, NOTHING = 0, 1, 2  # exit codes of a comparison


@dataclass
class Args:
    new: Annotated[list[str], "JSON files just measured on one machine; of several the best counts", "positional"]
    against: Annotated[str, "JSON file with the ratios that must not be lost"] = "benchmarks/speed.json"


def figure(what, ours, rival, unit, ratio, better, limit=None, of="ratio", **more) -> dict:
    """One measurement: our figure and its rival's, both in `unit`, and their ratio, of which "larger" or "smaller" is
    `better`. `limit` is what `of` ("ratio", or "ours", which must stay below it) has to reach."""
    if limit is None:
        target, met = "", None
    else:
        value, up = (ours, False) if of == "ours" else (ratio, better == "larger")
        target = f"{'≥' if up else '≤'} {limit}{'' if of == 'ratio' else ' ' + unit}"
        met = value >= limit if up else value <= limit
    numbers = {"what": what, "ours": ours, "rival": rival, "unit": unit, "ratio": ratio, "better": better}
    return numbers | {"target": target, "met": met} | more


def merge(path: Path, device: str, kind: str, mode: str, figures: dict, profiles: dict) -> dict:
    """Put the figures of a device into the file, beside what other devices, modes and settings have there."""
    everything = read_record(path)
    own = everything.setdefault(device, {"kind": kind, "full": {}, "quick": {}, "profiles": {}})
    own[mode] |= figures
    own["profiles"] |= profiles
    replace_text(path, json.dumps(everything, indent=1, ensure_ascii=False) + "\n")
    return everything


def lost(new: dict, old: dict) -> float:
    """The share by which a ratio is worse than before, above 0 if it is; 0.11 fails, 0.09 does not."""
    change = new["ratio"] / old["ratio"] - 1
    return -change if old["better"] == "larger" else change


def compare(new: list[dict], against: dict, loss: float = LOSS) -> tuple[int, list[str]]:
    """Exit code and lines for the quick ratios of files `new` of one device against a committed file.

    The same device is looked for first, then one of the same kind; a ratio of another setting is not looked at.
    """
    device, own = next(iter(new[0].items()), ("", {"kind": "", "quick": {}}))
    others = [name for name in against if against[name]["kind"] == own["kind"]]
    names = [device] if device in against else others
    names = [name for name in names if set(against[name]["quick"]) & set(own["quick"])]
    if not names:
        return NOTHING, [f"nothing to compare with: no quick figures of a {own['kind'] or 'device'} in these settings"]
    old, lines, worse = against[names[0]]["quick"], [f"against {names[0]}"], []
    for key in (key for key in own["quick"] if key in old):
        found = [file[device]["quick"][key] for file in new if key in file.get(device, own)["quick"]]
        best = min(found, key=lambda one, key=key: lost(one, old[key]))
        share = lost(best, old[key])
        line = f"{key}: ratio {old[key]['ratio']:.3f} -> {best['ratio']:.3f} ({old[key]['better']} is better)"
        (worse if share > loss else lines).append(f"WORSE by {share:.0%}  {line}" if share > loss else f"ok  {line}")
    measured = {_section(key) for key in own["quick"]}
    lines += [f"not measured here  {key}" for key in old if key not in own["quick"] and _section(key) in measured]
    return (WORSE if worse else SAME), lines + worse


def _section(key):
    return key.partition("/")[0]


def as_markdown(everything: dict) -> str:
    """A section a device: its figures against their targets, and where the time of a training step goes."""
    parts = [_device(name, everything[name]) for name in sorted(everything)]
    for kind, name in (("cpu", "CPU"), ("cuda", "GPU")):
        if not any(own["kind"] == kind for own in everything.values()):
            parts.append(f"## {name}\n\nnot run here")
    return "\n\n".join(parts)


def fill(page: str, everything: dict) -> None:
    """Replace the tables of the page."""
    fill_block(Path(page), "speed", as_markdown(everything))


def _device(name, own):
    mode = "full" if own["full"] else "quick"
    rows = own[mode]
    title = f"## {name}" + ("" if mode == "full" else " (quick figures only)")
    lines = [title, "", "| what | ours | rival | unit | ratio (lowest – highest) | target | met |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows.values():
        spread = f" ({row['spread'][0]:.3f} – {row['spread'][1]:.3f})" if row.get("spread") else ""
        rival = f"{_number(row['rival'])} {row.get('rival_is', '')}".strip()
        met = {True: "yes", False: "**no**", None: ""}[row["met"]]
        cells = [row["what"], _number(row["ours"]), rival, row["unit"], f"{row['ratio']:.3f}{spread}", row["target"]]
        lines.append(f"| {' | '.join([*cells, met])} |")
    if own["profiles"]:
        lines += ["", *_profiles(own["profiles"])]
    told = {f"{row['command']} (commit {row['commit']}, {row['threads']} threads)": None for row in rows.values()}
    return "\n".join([*lines, "", "Measured by:", "", *(f"    {line}" for line in told)])


def _profiles(profiles):
    groups, lines = {}, []  # a table for all scripts, and one for anything else, which has parts of its own
    for name, shares in profiles.items():
        head = "share of an epoch" if name.startswith("train_") else "share of the time"
        groups.setdefault(head if name.startswith("train_") else name, (head, {}))[1][name] = shares
    for head, rows in groups.values():
        phases = list(dict.fromkeys(phase for shares in rows.values() for phase in shares))
        lines += ["", f"| {head} | {' | '.join(phases)} |", "|---" * (len(phases) + 1) + "|"]
        for name, shares in rows.items():
            cells = (f"{shares[phase]:.1%}" if phase in shares else "" for phase in phases)
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines[1:]


def _number(value) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def main(args: Args) -> None:
    """Print a line for every ratio; exit code 1 if one is worse by more than 10 %, 2 if there is nothing to compare."""
    files = [read_record(path) for path in args.new]
    if not all(files):
        raise InputError(f"{args.new[files.index({})]}: no figures there; speed.py --quick --out writes them")
    code, lines = compare(files, read_record(args.against))
    print("\n".join(lines))
    raise SystemExit(code)


if __name__ == "__main__":
    launch(main, Args)
