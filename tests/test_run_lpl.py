"""run_lpl.sh: the command lines of both stages, what is never reused, and mistakes in the settings."""

import json
import os
import subprocess
import sys

import pytest
from test_evaluate import make_list
from test_run_sh import lines, stand_in, sweep
from test_scripts import ROOT


def dry_run(**env):
    own = {k: v for k, v in os.environ.items() if k not in ("DATA", "TRAIN", "TEST", "WEAK", "ONLY", "SEEDS")}
    env = own | {"DRY_RUN": "1", "PRECISION": "bf16", "SWEEP": "x", "LABELLED": "5"} | env
    return subprocess.run(["bash", "run_lpl.sh"], cwd=ROOT, env=env, capture_output=True, text=True)


def test_both_stages_and_both_evaluations():
    lines = dry_run(ONLY="ce cce cce_pct", SEEDS="0 1", CLASSES="11", TRAIN="t.csv", VALID="v.csv", TEST="e.csv").stdout
    lines = [line for line in lines.splitlines() if "prepare_data" not in line]
    tools = [line.split()[1] for line in lines]
    second = ["utils/predict_mask.py", "evaluate.py", "train_without_weight.py"] * 6
    assert tools == ["train_lpl.py"] * 6 + second + ["evaluate.py"] * 6 + ["utils/report.py"]
    assert [line.split("--preset ")[1].split()[0] for line in lines[:6]] == ["ce", "cce", "cce_pct"] * 2
    with_labels = [line for line in lines if "evaluate.py" in line and line.endswith("--image-labels")]
    assert len(with_labels) == 6 and all("_stage1_" in line for line in with_labels)
    for line in lines:
        if "train_without_weight" in line:
            name = line.split("--name ")[1].split()[0].replace("stage2", "stage1")
            assert f"--train_csv runs/x/masks/{name}_with_true.csv " in line
            assert any(f"--out runs/x/masks/{name}" in made for made in lines)
    assert lines[-1].endswith("--baseline ce_stage2 --out runs/x")


def test_a_weak_list_takes_the_place_of_the_rest():
    lines = dry_run(WEAK="tags.csv", TRAIN="t.csv", VALID="v.csv").stdout.splitlines()
    (split,) = [line for line in lines if "prepare_data.py split" in line]
    assert " --weak tags.csv " in split and split.endswith("--out runs/x/lists/seed0")
    weak = [line for line in lines if "train_lpl" in line or "predict_mask" in line]
    assert len(weak) == 6 and all("runs/x/lists/seed0/unlabelled_5.csv " in line for line in weak)
    assert not any("evaluate.py" in line for line in lines) and "supervised" in lines[-1]  # no test list


MISTAKES = [
    ({"ONLY": "lpl"}, "ONLY=lpl: no row lpl; rows are supervised ce cce cce_pct all_masks"),
    ({"EPOCHS": "x"}, "EPOCHS=x"),
    ({"POWER": "-3"}, "POWER=-3: a number of 0 or more"),
    ({"CRF": "yes"}, "CRF=yes: 1 for masks"),
    ({"SCALES": "a b"}, "SCALES=a b: numbers from 0.05 to 20"),
    ({"SCALES": "1 0"}, "SCALES=1 0: numbers from 0.05 to 20"),
    ({"SELECT": "foo"}, "SELECT=foo: best or last"),
    ({"DRY_RUN": "", "WEAK": "none.csv"}, "WEAK=none.csv: no such file"),
    ({"DRY_RUN": "", "TRAIN": "none.csv", "VALID": "v.csv"}, "TRAIN=none.csv: no such file"),
]


@pytest.mark.parametrize(("env", "said"), MISTAKES)
def test_mistakes_in_the_settings(env, said, tmp_path):
    folder = stand_in(tmp_path / "a")
    done = sweep(folder, command=("./run_lpl.sh",), **({"DATA": "", "DRY_RUN": "1", "LABELLED": "4"} | env))
    assert done.returncode == 2 and done.stderr.startswith(f"error: {said}") and done.stderr.count("\n") == 1
    assert not (folder / "calls").exists() and not (folder / "runs").exists()


@pytest.mark.parametrize(("crf", "flag"), [("", ""), ("0", ""), ("1", " --crf")])
def test_crf_is_a_switch(crf, flag):
    (made,) = [line for line in dry_run(CRF=crf, ONLY="ce").stdout.splitlines() if "predict_mask" in line]
    assert f"--flip{flag} --true-masks" in made


@pytest.mark.parametrize(("crf", "needs"), [("0", ""), ("1", " requirements-crf.txt")])
def test_the_library_of_the_crf_is_asked_for_before_anything_runs(crf, needs, tmp_path):
    folder = stand_in(tmp_path / "a")
    (folder / "setup.sh").write_text('set_up() { fail "asked for $*"; }\n')
    done = sweep(folder, CRF=crf, command=("./run_lpl.sh",))
    assert done.returncode == 2 and done.stderr == f"error: asked for requirements.txt{needs}\n"
    assert (ROOT / "requirements-crf.txt").read_text().startswith("pydensecrf2")


def calls(folder, *parts):
    """The commands so far that hold all of these words."""
    return [line for line in lines(folder / "calls") if all(part in line for part in parts)]


def test_another_power_makes_rows_of_its_own_in_the_same_table(tmp_path):
    folder = stand_in(tmp_path / "a")
    how = {"LABELLED": "4", "SWEEP": "u", "ONLY": "cce cce_pct", "command": ("./run_lpl.sh",)}
    assert sweep(folder, **how).returncode == 0
    first = set(calls(folder, "train_"))
    told = {line.split("--preset ")[1].split()[0]: "--pct-power 8 " in line for line in calls(folder, "train_lpl.py")}
    assert told == {"cce": False, "cce_pct": True}  # side by side, so in any order
    assert sweep(folder, POWER="0.5", **how).returncode == 0
    added = sorted(set(calls(folder, "train_")) - first)
    assert len(added) == 2 and "--pct-power 0.5 --name labelled4/cce_pct_power0.5_stage1_s0 " in added[0]
    masks = "--train_csv runs/u/masks/labelled4/cce_pct_power0.5_stage1_s0_with_true.csv "
    assert masks in added[1] and "--name labelled4/cce_pct_power0.5_stage2_s0 " in added[1]


def test_other_masks_and_scores_are_never_taken_for_those_of_the_settings(tmp_path):
    folder = stand_in(tmp_path / "a")
    how = {"LABELLED": "4", "SWEEP": "u", "ONLY": "supervised cce", "command": ("./run_lpl.sh",)}
    assert sweep(folder, **how).returncode == 0
    for name, env in (("_crf", {"CRF": "1"}), ("_scales1-2", {"SCALES": " 1  2"})):
        (folder / "calls").unlink()
        assert sweep(folder, **env, **how).returncode == 0
        (made,), (second,) = calls(folder, "predict_mask.py"), calls(folder, "train_without_weight.py")
        masks = f"runs/u/masks/labelled4/cce{name}_stage1_s0"
        assert made.endswith(f"--out {masks}") and "--checkpoint runs/u/labelled4/cce_stage1_s0/best.pt " in made
        assert f"--train_csv {masks}_with_true.csv --name labelled4/cce{name}_stage2_s0 " in second
        file = "scores_scales1-2.json" if "SCALES" in env else "scores.json"
        tested = [f"{run}_s0/{file}" for run in ("cce_stage1", "supervised", f"cce{name}_stage2")]
        assert [line.split("labelled4/")[-1].split()[0] for line in calls(folder, "evaluate.py")] == tested


def test_scores_are_measured_again_where_the_labels_are_newer(tmp_path):
    folder = stand_in(tmp_path / "a")
    how = {"LABELLED": "4", "SWEEP": "u", "ONLY": "supervised", "command": ("./run_lpl.sh",)}
    assert sweep(folder, **how).returncode == 0
    run, labels = folder / "runs/u/labelled4/supervised_s0", folder / "runs/u/lists/test_labels.csv"
    run.mkdir(parents=True)
    for path, time, again in ((run / "best.pt", 100, 1), (run / "scores.json", 200, 0), (labels, 300, 1)):
        path.touch()
        os.utime(path, (time, time))
        if path != labels:
            labels.touch()
            os.utime(labels, (50, 50))
        (folder / "calls").unlink()
        assert sweep(folder, **how).returncode == 0
        assert len(calls(folder, "evaluate.py")) == again, path


@pytest.mark.slow
def test_a_real_sweep(tmp_path):
    make_list(tmp_path, 3, count=8)
    env = {
        "TRAIN": "list.csv",
        "VALID": "valid.csv",
        "TEST": "test.csv",
        "CLASSES": "3",
        "LABELLED": "2",
        "EPOCHS": "1",
    }
    for name in ("valid", "test"):
        make_list(tmp_path, 3, count=2, name=name)
    env |= {
        "SIZE": "32",
        "BATCH": "2",
        "ONLY": "cce_pct",
        "PYTHON": sys.executable,
        "SWEEP": "x",
    }
    env |= {"DATA_ROOT": str(tmp_path), "PRECISION": "fp32", "OMP_NUM_THREADS": "1"}
    env |= {name: str(tmp_path / env[name]) for name in ("TRAIN", "VALID", "TEST")}
    for name in ("run_lpl.sh", "setup.sh", "sweep.sh", "requirements.txt", "evaluate.py"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    for path in (*ROOT.glob("train_*.py"), ROOT / "utils"):
        (tmp_path / path.name).symlink_to(path)
    done = subprocess.run(
        ["bash", "run_lpl.sh"], cwd=tmp_path, env=os.environ | env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    sweep = tmp_path / "runs" / env["SWEEP"]
    table = (sweep / "table.md").read_text()
    assert "| cce_pct_stage1 |" in table and "| cce_pct_stage2 |" in table
    for stage, labels in (("stage1", True), ("stage2", False)):
        assert json.loads((sweep / f"labelled2/cce_pct_{stage}_s0/scores.json").read_text())["image_labels"] is labels
