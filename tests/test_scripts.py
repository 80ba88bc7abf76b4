"""Every training script: runs, resumes exactly, equals the baseline at its neutral setting, and keeps to its room."""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import LISTS, SHORT

from utils.args import TrainArgs, parse
from utils.checkpoint import Checkpoint, load_network, read_checkpoint
from utils.dataset import ListDataset
from utils.errors import InputError
from utils.evaluate import evaluate
from utils.run import Run

ROOT = Path(__file__).parents[1]
EVERY = [path.name for path in sorted(ROOT.glob("train_*.py"))]
SCRIPTS = [name for name in EVERY if name != "train_ieg.py"]  # that one knows images with labels, not lists of masks
BASE = "train_without_weight.py"
# plain SGD on a network without dropout: nothing but the method under test can make two runs differ
SMALL = ["--size", "16", "--arch", "PlainUNet", "--width", "4", "--batch-size", "4", "--learning-rate", "0.05"]
SMALL += ["--optimizer", "sgd", "--cpu"]
NEUTRAL = {
    "train_with_weight.py": ["--train_csv", "ones.csv"],
    "train_with_Teacher_weight.py": ["--train_csv", "ones.csv"],
    "train_with_KDweight.py": ["--train_csv", "ones.csv", "--t-start", "0", "--t-end", "0", "--warmup", "0"],
    "train_early_correction.py": ["--slope-change", "1", "--consistency", "0"],
    "train_decoupling.py": ["--init-epochs", "99", "--unit", "image"],
    "train_co_teaching.py": ["--forget-rate", "0"],
    "train_co_teaching+.py": ["--forget-rate", "0", "--init-epochs", "99"],
    "train_spatial_correction.py": ["--rounds", "0"],
    "train_ieg_seg.py": ["--method", "supervised"],
    "train_distill.py": ["--distill", "kl:0,cirkd:0"],
    "train_lad_student.py": ["--distill", "cwd:0"],
}


def launch(script, tiny, run_dir, name, *more):
    module = importlib.import_module(Path(script).stem)  # a string, so the "+" in the name is no obstacle
    lists = ["--train_csv", "train.csv", "--valid_csv", "valid.csv", "--test_csv", "test.csv", *more]
    lists = [str(tiny / word) if word.endswith(".csv") else word for word in lists]
    lists = [
        word for flag, name in LISTS.get(module.__name__, {}).items() for word in (f"--{flag}", str(tiny / name))
    ] + lists
    flags = [*SMALL, *SHORT.get(module.__name__, []), "--data-root", str(tiny), "--run-dir", str(run_dir)]
    flags += ["--name", name, *lists]
    module.main(parse(args_of(module), flags))
    return read_checkpoint(run_dir / name / "last.pt")["nets"]


def args_of(module):
    return next(getattr(module, name) for name in ("Args", "WeightArgs", "TrainArgs") if hasattr(module, name))


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


def rows_of(folder):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


class Interrupted(Exception):
    pass


def interrupt_after(monkeypatch, epoch):
    """Kill the next run at the worst moment: the epoch is logged, its checkpoint not yet written."""
    save = Checkpoint.save

    def dying(self, now, score, net=0):
        if now == epoch:
            raise Interrupted
        save(self, now, score, net)

    monkeypatch.setattr(Checkpoint, "save", dying)


@pytest.mark.parametrize("script", SCRIPTS)
def test_interrupted_run_ends_on_the_same_bits(script, tiny, tmp_path, monkeypatch):
    flags = ["--epochs", "3", "--augment", "strong", "--optimizer", "ranger"]
    if script == "train_with_KDweight.py":
        flags += ["--warmup", "1"]
    whole = launch(script, tiny, tmp_path, "whole", *flags)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, 1)
        launch(script, tiny, tmp_path, "parts", *flags)
    parts = launch(script, tiny, tmp_path, "parts", *flags, "--workers", "2")
    assert all(map(same, whole, parts))
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "parts")


@pytest.mark.parametrize("script", NEUTRAL)
def test_neutral_setting_is_the_baseline(script, tiny, tmp_path):
    plain = launch(BASE, tiny, tmp_path, "plain", "--epochs", "2", "--augment", "flip")
    method = launch(script, tiny, tmp_path, "method", "--epochs", "2", "--augment", "flip", *NEUTRAL[script])
    assert same(plain[0], method[0])


@pytest.mark.parametrize("script", [name for name in NEUTRAL if "spatial" not in name])
def test_method_differs_from_the_baseline_elsewhere(script, tiny, tmp_path):
    flags = ["--warmup", "0"] if script == "train_with_KDweight.py" else []
    flags = ["--num-gradual", "1"] if "co_teaching" in script else flags
    plain = launch(BASE, tiny, tmp_path, "plain", "--epochs", "3")
    method = launch(script, tiny, tmp_path, "method", "--epochs", "3", *flags)
    assert not same(plain[0], method[0])


@pytest.mark.parametrize("script", EVERY)
def test_script_keeps_to_its_room(script):
    text = (ROOT / script).read_text()
    tree = ast.parse(text)
    calls = {n.func.attr for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)}
    assert not calls & {"backward", "state_dict", "all_reduce", "cuda", "item"}, "belongs in utils/run.py"
    doc = ast.get_docstring(tree)
    assert all(word in doc for word in ("Run ", "2 GPUs ", "Results ", script))
    assert len(text.splitlines()) <= 120


def test_finished_run_is_left_alone(tiny, tmp_path, capsys):
    launch(BASE, tiny, tmp_path, "a", "--epochs", "1")
    before = (tmp_path / "a" / "log.jsonl").read_bytes()
    launch(BASE, tiny, tmp_path, "a", "--epochs", "1")
    assert "finished, nothing to do" in capsys.readouterr().out
    assert (tmp_path / "a" / "log.jsonl").read_bytes() == before


def test_other_arguments_under_the_same_name_are_refused_by_flag(tiny, tmp_path):
    launch(BASE, tiny, tmp_path, "a", "--epochs", "1")
    with pytest.raises(InputError, match=r"--seed 0 \(now 3\)"):
        launch(BASE, tiny, tmp_path, "a", "--epochs", "1", "--seed", "3")


def test_another_content_of_a_list_is_refused(tiny, tmp_path):
    copy = tiny / "copy.csv"
    copy.write_text((tiny / "train.csv").read_text())
    launch(BASE, tiny, tmp_path, "a", "--epochs", "1", "--train_csv", "copy.csv")
    copy.write_text("\n".join((tiny / "train.csv").read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(InputError, match="another content of --train_csv"):
        launch(BASE, tiny, tmp_path, "a", "--epochs", "1", "--train_csv", "copy.csv")


def test_a_cut_off_log_line_is_mended(tiny, tmp_path, monkeypatch):
    whole = launch(BASE, tiny, tmp_path, "whole", "--epochs", "2")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, 1)
        launch(BASE, tiny, tmp_path, "parts", "--epochs", "2")
    with (tmp_path / "parts" / "log.jsonl").open("a") as log:
        log.write('{"epoch": 1, "train_')
    assert same(whole[0], launch(BASE, tiny, tmp_path, "parts", "--epochs", "2")[0])
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "parts")


def test_clipping_comes_before_the_step_and_not_in_compat_mode(tiny, tmp_path):
    free = launch(BASE, tiny, tmp_path, "free", "--epochs", "1", "--clip-value", "0")
    tight = launch(BASE, tiny, tmp_path, "tight", "--epochs", "1", "--clip-value", "1e-4")
    released = launch(BASE, tiny, tmp_path, "released", "--epochs", "1", "--clip-value", "1e-4", "--compat", "nlkd")
    assert not same(free[0], tight[0])
    assert same(free[0], released[0])
    assert "valid_compat_miou" in rows_of(tmp_path / "released")[0]


def test_load_starts_from_a_checkpoint(tiny, tmp_path):
    first = launch(BASE, tiny, tmp_path, "first", "--epochs", "1")
    after = launch(BASE, tiny, tmp_path, "next", "--epochs", "1", "-l", "1e-12", "-f", str(tmp_path / "first/last.pt"))
    weights = [k for k in first[0] if k.endswith("weight")]
    assert all(torch.allclose(first[0][k], after[0][k], atol=1e-8) for k in weights)


def test_kd_takes_the_score_from_the_list_and_reports_its_schedule(tiny, tmp_path):
    launch("train_with_KDweight.py", tiny, tmp_path, "kd", "--epochs", "3", "--warmup", "1")
    assert [row.get("T") for row in rows_of(tmp_path / "kd")[:3]] == [0.0, 0.05, 0.5]


def test_kd_asks_for_the_score_where_the_list_does_not_tell(tiny, tmp_path):
    lines = [",".join(line.split(",")[:2] + [line.split(",")[3]]) for line in (tiny / "train.csv").read_text().split()]
    (tiny / "bare.csv").write_text("\n".join(lines))
    with pytest.raises(InputError, match="--quality"):
        launch("train_with_KDweight.py", tiny, tmp_path, "kd", "--train_csv", "bare.csv")


@pytest.mark.parametrize("script", [s for s in SCRIPTS if "co_teaching" in s or "decoupling" in s])
@pytest.mark.parametrize("preset", ["paper", "nlkd"])
def test_presets_and_units_run(script, preset, tiny, tmp_path):
    launch(script, tiny, tmp_path, "preset", "--epochs", "1", "--preset", preset)
    if preset == "paper":
        launch(script, tiny, tmp_path, "pixel", "--epochs", "2", "--unit", "pixel")
        launch(script, tiny, tmp_path, "bf", "--epochs", "1", "--unit", "image", *window(script))


def window(script):
    return ["--score", "bf", "--window", "3"] if "co_teaching" in script else ["--disagree", "bf"]


def test_flags_by_hand_win_over_the_preset():
    module = importlib.import_module("train_co_teaching")
    lists = ["--train_csv", "a", "--valid_csv", "b"]
    args = parse(module.Args, [*lists, "--preset", "nlkd", "--forget-rate", "0.25"])
    assert (args.forget_rate, args.score, args.schedule) == (0.25, "iou", "constant")


@pytest.mark.parametrize("dashes", ["--batch-size", "--batch_size", "-b"])
def test_original_flags_with_dashes_and_underscores(dashes):
    words = ["--train_csv", "a", "--valid-csv", "b", "-e", "7", dashes, "3", "-l", "0.5", "-n", "x", "-f", "w.pt"]
    args = parse(TrainArgs, words)
    assert (args.epochs, args.batch_size, args.learning_rate, args.name, args.load) == (7, 3, 0.5, "x", "w.pt")


def test_many_classes_train_and_resume(tiny, tmp_path):
    nets = launch(
        "train_with_KDweight.py",
        tiny,
        tmp_path,
        "c",
        "--epochs",
        "2",
        "--classes",
        "3",
        "--warmup",
        "0",
        "--train_csv",
        "classes.csv",
        "--valid_csv",
        "classes_valid.csv",
        "--test_csv",
        "",
    )
    assert nets[0]["net.head.weight"].shape[0] == 3
    assert 0 < rows_of(tmp_path / "c")[-2]["valid_miou"] <= 1


def test_two_processes_log_what_their_checkpoint_scores(tiny, tmp_path):
    """Two gloo processes: every image once, and the scores are those of the network that is saved."""
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / BASE), *SMALL]
    words += [
        "--data-root",
        str(tiny),
        "--run-dir",
        str(tmp_path),
        "--name",
        "two",
        "--epochs",
        "2",
        "--select",
        "last",
    ]
    words += [f"--{name}_csv={tiny / name}.csv" for name in ("train", "valid", "test")]
    words += ["--learning-rate", "0.5", "--augment", "flip"]
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    log = rows_of(tmp_path / "two")
    args = TrainArgs("", "", size=16, batch_size=4, cpu=True, run_dir=str(tmp_path), name="one")
    run = Run(args)
    net, _ = load_network(tmp_path / "two/last.pt")
    loader = run.loader(ListDataset(tiny / "valid.csv", tiny, 16))
    alone = evaluate(run, net, loader)
    assert alone == pytest.approx({k: log[1][f"valid_{k}"] for k in alone}, abs=1e-6)
    assert log[-1]["split"] == "test" and [row.get("epoch") for row in log] == [0, 1, None]


def test_bf16_run_resumes_on_the_same_bits(tiny, tmp_path, monkeypatch):
    flags = ["--epochs", "2", "--precision", "bf16"]
    whole = launch(BASE, tiny, tmp_path, "whole", *flags)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, 1)
        launch(BASE, tiny, tmp_path, "parts", *flags)
    assert same(whole[0], launch(BASE, tiny, tmp_path, "parts", *flags)[0])
