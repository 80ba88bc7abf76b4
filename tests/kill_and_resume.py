"""Kills a training run at random moments, goes on with the same command, and compares with a run that was left alone.

Run   python tests/kill_and_resume.py --script train_co_teaching.py --kills 20 -- --precision bf16 --workers 2
Says what was killed and whether weights, optimizers and log are the same bits; exit code 1 if they are not.
"""

import argparse
import importlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1])]

import torch
from conftest import LISTS, SHORT, draw_lists

from utils.args import launch
from utils.checkpoint import read_checkpoint

FLAGS = "--size 16 --arch PlainUNet --width 4 --batch-size 2 --epochs 5 --learning-rate 0.01 --augment strong --cpu"


def command(module, root: Path, name: str, more: list[str]) -> tuple:
    """What `launch` takes for this script on the lists below `root`."""
    lists = [f"--{kind}_csv={root / kind}.csv" for kind in ("train", "valid", "test")]
    lists += [f"--{flag}={root / name}" for flag, name in LISTS.get(module.__name__, {}).items()]
    where = ["--data-root", str(root), "--run-dir", str(root / "runs"), "--name", name]
    flags = next(getattr(module, kind) for kind in ("Args", "WeightArgs", "TrainArgs") if hasattr(module, kind))
    return module.main, flags, [*FLAGS.split(), *SHORT.get(module.__name__, []), *lists, *where, *more]


def start(what: tuple, log: Path, before=None) -> int:
    """The process number of a fork that runs the command; `before` is called in it first."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background was told to ignore it
        sys.stdout = sys.stderr = log.open("a", buffering=1)
        os.dup2(sys.stdout.fileno(), 1), os.dup2(sys.stdout.fileno(), 2)
        if before:
            before()
        launch(*what)
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def finish(child: int) -> int:
    """The exit code of a fork, -9 if it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def same(a, b) -> bool:
    """Whether two nested collections of tensors and numbers are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two run folders, times aside."""
    found = []
    for name in ("last.pt", "best.pt"):
        if not same(read_checkpoint(one / name), read_checkpoint(other / name)):
            found.append(name)
    logs = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (one, other)]
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in log] for log in logs]
    return found + ["log.jsonl"] * (rows[0] != rows[1])


def kill_and_compare(script: str, root: Path, kills: int, seed: int, more: list[str], number=signal.SIGKILL) -> dict:
    """Kill runs of a script until `kills` are dead, let each end at last, and count what was not as it should be."""
    module, draw = importlib.import_module(Path(script).stem), random.Random(seed)
    log, began = root / "out.txt", time.time()
    assert finish(start(command(module, root, "whole", more), log)) == 0, log.read_text()[-2000:]
    lasts, told = time.time() - began, {"killed": 0, "runs": 0, "different": [], "codes": set()}
    while told["killed"] < kills:
        name = f"killed{told['runs']}"
        while True:
            child = start(command(module, root, name, more), log)
            if told["killed"] < kills:
                time.sleep(draw.uniform(0, 0.6 * lasts))
                os.kill(child, number)
            code = finish(child)
            told["codes"].add(code)
            if code == 0:
                break
            assert code in (-number, 75), log.read_text()[-2000:]
            told["killed"] += 1
        told["runs"] += 1
        assert told["runs"] <= 20 * kills, "the signals come when the runs are over, or are not heard"
        told["different"] += differences(root / "runs/whole", root / "runs" / name)
    return told


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", default="train_without_weight.py")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", default="SIGKILL", choices=["SIGKILL", "SIGTERM", "SIGINT"])
    args, more = parser.parse_known_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        draw_lists(Path(folder))
        more = [word for word in more if word != "--"]
        told = kill_and_compare(args.script, Path(folder), args.kills, args.seed, more, getattr(signal, args.signal))
    print(f"{args.script} {' '.join(more)}: {told['killed']} times {args.signal} in {told['runs']} runs")
    print(f"different from the run left alone: {told['different'] or 'nothing'}")
    return bool(told["different"])


if __name__ == "__main__":
    sys.exit(main())
