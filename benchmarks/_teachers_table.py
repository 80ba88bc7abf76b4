"""The table of benchmarks/teachers.sh, from the lists and logs of its folder.

Run   python benchmarks/_teachers_table.py runs/teachers-... --page benchmarks/teachers.md
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import pandas as pd

from utils.args import launch
from utils.errors import InputError
from utils.images import read_mask
from utils.label_quality import weight_report
from utils.logs import read_record
from utils.report import fill_block
from utils.scores import pair_scores

COLUMNS = {"iou": 3, "bf": 3, "auroc": 4, "after": 3, "replaced": 0}
HEAD = "| teacher | test IoU | test BF | AUROC | label IoU, cleaned (given: {:.3f}) | replaced, noisy share | seeds |"


@dataclass
class Args:
    folder: Annotated[str, "what benchmarks/teachers.sh wrote", "positional"]
    page: Annotated[str, "page whose block `teachers` is replaced"] = "benchmarks/teachers.md"


def main(args: Args) -> None:
    folder = Path(args.folder)
    rows = {}
    for path in sorted((folder / "scores").glob("test_*_weight_bfscore.csv")):
        name, _, seed = path.name.removeprefix("test_").removesuffix("_weight_bfscore.csv").rpartition("_s")
        if (folder / f"scores/train_noisy_60_{name}_s{seed}_cleaned_bf.csv").exists():
            rows.setdefault(name, []).append(_of_teacher(folder, f"{name}_s{seed}"))
    if not rows:
        raise InputError(f"{folder}: no teacher has been judged there")
    given = next(iter(rows.values()))[0]["given"]
    lines = [HEAD.format(given), "|---" * 7 + "|"]
    for name, seeds in sorted(rows.items(), key=lambda row: -np.mean([one["bf"] for one in row[1]])):
        cells = [_cell([one[key] for one in seeds], digits) for key, digits in COLUMNS.items()]
        cells[4] += f", {_cell([one['precision'] for one in seeds], 3)}"
        lines.append(f"| {name} | {' | '.join(cells)} | {len(seeds)} |")
    # of the first run: the table itself changes the page, and so the tree, before the others
    about = read_record(min(folder.glob("*/env.json"), key=lambda path: path.stat().st_mtime))
    state = " with changes" if about["dirty"] else ""
    lines += ["", f"Measured: commit {about['commit'][:10]}{state}, torch {about['torch']}, {about['device']}."]
    fill_block(Path(args.page), "teachers", "\n".join(lines))
    print("\n".join(lines))


def _of_teacher(folder: Path, name: str) -> dict[str, float]:
    test = pd.read_csv(folder / f"scores/test_{name}_weight_bfscore.csv")
    weights = pd.read_csv(folder / f"scores/train_noisy_60_{name}_weight_bfscore.csv")
    cleaned = pd.read_csv(folder / f"scores/train_noisy_60_{name}_cleaned_bf.csv")
    noisy, replaced = (weights["iterations"] > 0).to_numpy(), (cleaned["replaced"] == 1).to_numpy()
    given, after = (_mean_iou(cleaned, column) for column in ("given", "filename"))
    return {
        "iou": test["iou"].mean(),
        "bf": test["bf"].mean(),
        "auroc": weight_report(weights["weight"].to_numpy(), noisy)["auroc"],
        "given": given,
        "after": after,
        "replaced": replaced.sum(),
        "precision": noisy[replaced].mean() if replaced.any() else np.nan,
    }


def _mean_iou(cleaned, column) -> float:
    pairs = zip(cleaned[column], cleaned["clean"], strict=True)
    return float(np.mean([pair_scores(read_mask(a), read_mask(b))["iou"] for a, b in pairs]))


def _cell(values, digits) -> str:
    if np.isnan(values).any():
        return ""
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


if __name__ == "__main__":
    launch(main, Args)
