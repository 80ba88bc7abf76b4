"""The sweep's command lines, the way it goes on after a failure, and which room may import which."""

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import draw_set

ROOT = Path(__file__).parents[1]


def dry_run(*words, **env):
    own = {k: v for k, v in os.environ.items() if k not in ("DATA", "NOISE")}
    env = own | {"DRY_RUN": "1", "PRECISION": "bf16"} | env
    return subprocess.run(["bash", "run.sh", *words], cwd=ROOT, env=env, capture_output=True, text=True)


def test_paper_has_the_ten_published_command_lines():
    lists = "--valid_csv data/csv/valid_noisy_60.csv --test_csv data/csv/test.csv"
    end = "--epochs 100 --batch-size 4 --learning-rate 0.1"

    def line(script, train, name):
        return f"python {script} --train_csv data/csv/{train}.csv {lists} --name {name} {end}"

    weights = "train_noisy_60_PointRend_weight_{}score"
    expected = [line("train_without_weight.py", "train_noisy_60", "train_noisy_60_noweight")]
    for script, kind in (("train_with_Teacher_weight.py", "noKD"), ("train_with_KDweight.py", "KD")):
        for score in ("miou", "bf", "bm"):
            expected.append(line(script, weights.format(score), f"train_noisy_60_{score}weight_{kind}"))
    for name in ("train_decoupling", "train_co_teaching", "train_co_teaching+"):
        expected.append(line(f"{name}.py", "train_noisy_60", name))
    assert dry_run("paper").stdout.splitlines() == expected


def test_published_command_lines_mean_the_published_setting():
    from utils.args import TrainArgs

    args = TrainArgs("a", "b")
    assert (args.arch, args.width, args.size, args.optimizer, args.weight_decay) == (
        "PlainUNet",
        64,
        321,
        "ranger",
        5e-4,
    )
    assert (args.scheduler, args.step_epochs, args.step_gamma, args.clip_value) == ("step", 25, 0.5, 0.1)


def test_sweep_has_twelve_rows_and_a_clean_one():
    lines = [line for line in dry_run().stdout.splitlines() if "--name noise" in line]
    names = sorted(line.split("--name ")[1].split()[0] for line in lines)
    rows = ["co_teaching", "co_teaching+", "decoupling", "no_weight"]
    rows += [f"{kind}_{score}" for kind in ("teacher", "kd") for score in ("miou", "bf", "bm", "pixel")]
    assert names == sorted(["noise0/clean_s0", *(f"noise60/{row}_s0" for row in rows)])


def test_losses_and_early_correction_are_rows_for_those_who_name_them():
    done = dry_run(ONLY="t_loss early_correction gce", NOISE="20", SEEDS="0 1")
    lines = [line for line in done.stdout.splitlines() if "--name noise" in line]
    names = [line.split("--name ")[1].split()[0] for line in lines]
    assert names == [f"noise20/{row}_s{seed}" for seed in (0, 1) for row in ("gce", "t_loss", "early_correction")]
    for loss, line in zip(("gce", "t_loss"), lines, strict=False):
        assert "train_without_weight.py" in line and line.endswith(f"--loss {loss}")
    assert "train_early_correction.py" in lines[2] and "get_weight" not in done.stdout
    assert "rows are clean no_weight " in dry_run(ONLY="gcee").stderr


def test_sweep_takes_its_settings_from_the_environment():
    env = {
        "NOISE": "10 20",
        "SEEDS": "3 4",
        "OP": "dilate",
        "EPOCHS": "20",
        "SIZE": "64",
        "ARCH": "FPN",
        "ENCODER": "resnet34",
    }
    lines = dry_run(ONLY="clean kd_bm", **env).stdout.splitlines()
    noise = next(line for line in lines if "generate_noisy_label" in line)
    assert "--ratios 10 20 " in noise and "--op dilate" in noise
    runs = [line for line in lines if "--name noise" in line]
    assert len(runs) == 2 + 4 and sum("train_with_KDweight.py" in line for line in runs) == 4
    for word in ("--epochs 20 ", "--size 64 ", "--arch FPN ", "--encoder resnet34 "):
        assert all(word in line for line in runs)
    assert all("--quality bm --warmup 2 --student-theta 3" in line for line in runs if "KD" in line)


def test_every_kind_of_noise_has_lists_weights_and_rows_of_its_own():
    env = {"KINDS": "markov_grow missing:0.3+box:0.7", "SEVERITY": "0.7", "NOISE": "40", "SWEEP": "x", "SIZE": "96"}
    lines = dry_run(ONLY="clean no_weight teacher_bf kd_pixel", **env).stdout.splitlines()
    made = [line for line in lines if "generate_noisy_label" in line]
    assert "--kinds markov_grow --severity 0.7 " in made[0] and "--kinds missing:0.3 box:0.7 --severity 0.7 " in made[1]
    names = [line.split("--name ")[1].split()[0] for line in lines if "train_w" in line]
    rows = [f"noise40-{kind}-0.7/{row}_s0" for kind in ("markov-grow", "missing-0.3-box-0.7") for row in
            ("no_weight", "teacher_bf", "kd_pixel")]  # fmt: skip
    assert sorted(names) == sorted(["teacher", "noise0/clean_s0", *rows])
    assert sum("weights/markov-grow-0.7" in line for line in lines) == 2  # written by one tool, read by one row
    pixel = [line for line in lines if "kd_pixel" in line]
    assert all("--level pixel" in line and "_support.csv" in line for line in pixel)
    supports = {line.split("--train_csv ")[1].split()[0] for line in pixel}
    written = {line.split("--out ")[1].split()[0] + "_support.csv" for line in lines if "--support" in line}
    assert supports == written and len(supports) == 2
    trusted = {line.split("--valid_csv ")[1].split()[0] for line in lines if "train_w" in line}
    assert trusted == {"runs/x/lists/trusted-20.csv"}
    assert sum(line.startswith("cp ") and line.endswith("trusted-20.csv") for line in lines) == 2


def test_a_named_sweep_grows_by_kinds_and_severities():
    def lines(**env):
        return dry_run(ONLY="clean no_weight teacher_bf", SWEEP="x", **env).stdout.splitlines()

    before = lines(KINDS="polygon")
    after = lines(KINDS="erode polygon", SEVERITY="0.8 0.7")
    assert set(before) < set(after)
    names = [line.split("--name ")[1].split()[0] for line in after if "train_w" in line]
    assert len(set(names)) == len(names) == 2 + 2 * 2 * 2


def test_spatial_correction_has_its_epochs_its_trusted_list_and_a_bias_of_the_size():
    lines = dry_run(ONLY="spatial_correction", SIZE="96", EPOCHS="5", SWEEP="x").stdout.splitlines()
    line = next(line for line in lines if "train_spatial" in line)
    assert line.endswith("--epochs 15 --rounds 2 --trusted_csv runs/x/lists/both/trusted.csv --min-bias 0.3750")


def test_l2r_and_ieg_ask_the_trusted_list():
    lines = dry_run(ONLY="l2r ieg", SWEEP="x").stdout.splitlines()
    runs = [line for line in lines if "train_ieg_seg" in line]
    assert [line.split("--name ")[1].split()[0] for line in runs] == ["noise60/l2r_s0", "noise60/ieg_s0"]
    for method, line in zip(("l2r", "ieg"), runs, strict=True):
        assert line.endswith(f"--method {method} --probe_csv runs/x/lists/both/trusted.csv --select last")
    (line,) = [line for line in dry_run(ONLY="l2r", SWEEP="x", VALID="noisy").stdout.splitlines() if "_seg" in line]
    assert line.endswith("--select best") and "--valid_csv runs/x/lists/both/valid_noisy_60.csv" in line
    assert not any("train_ieg_seg" in line for line in dry_run(SWEEP="x").stdout.splitlines())


def test_classes_reach_every_command(tmp_path):
    street = tmp_path / "street.csv"
    street.write_text("img,filename\n")
    lines = dry_run(CLASSES="11", DATA=str(street), ONLY="kd_bf kd_pixel").stdout.splitlines()
    without = ("prepare_data", "predict_mask", "report", "cp ")
    used = [line for line in lines if not any(word in line for word in without)]
    assert len(used) == 5 and all("--classes 11 " in line + " " for line in used)
    noise = next(line for line in lines if "generate_noisy_label" in line)
    assert "--kinds jitter polygon missing confusion --severity 0.8" in noise
    given = dry_run(CLASSES="11", DATA=str(street), NOISE="0", TEACHER="folds", ONLY="no_weight").stdout
    assert "--kinds" not in given and "--name noise0/no_weight_s0" in given


def test_cleaned_labels_are_made_and_trained_on_where_the_row_is_named():
    lines = dry_run(ONLY="cleaned", SWEEP="x").stdout.splitlines()
    made = next(line for line in lines if "--write-labels" in line)
    assert "--score bf" in made and "--out runs/x/weights " in made and "train_noisy_60.csv" in made
    row = next(line for line in lines if "--name noise60/cleaned_s0" in line)
    assert "train_without_weight.py" in row and "runs/x/weights/train_noisy_60_trusted_cleaned_bf.csv" in row
    assert "cleaned" not in dry_run(SWEEP="x").stdout


def test_fold_teachers_are_asked_for_unseen_images_only():
    lines = dry_run(TEACHER="folds", ONLY="teacher_bf").stdout.splitlines()
    predict = next(line for line in lines if "predict_mask" in line)
    assert "--folds 2" in predict and "--trusted" not in predict and predict.count("last.pt") == 2


@pytest.mark.parametrize(
    ("words", "env", "says"),
    [
        (["papr"], {}, "./run.sh papr"),
        ([], {"OP": "grow"}, "OP=grow"),
        ([], {"KINDS": "polygon missing:"}, "missing: is not KIND"),
        ([], {"KINDS": "polygon", "SEVERITY": "80"}, "SEVERITY=80"),
        ([], {"TEACHER": "none"}, "TEACHER=none"),
        ([], {"NOISE": "0"}, "TRUSTED=list.csv"),
        ([], {"NOISE": "60%"}, "NOISE=60%"),
        ([], {"ONLY": "kd_bff"}, "no row kd_bff"),
        ([], {"VALID": "clean"}, "VALID=clean"),
        ([], {"EPOCHS": "abc"}, "EPOCHS=abc"),
        ([], {"JOBS": "0"}, "JOBS=0"),
        ([], {"CLASSES": "x"}, "CLASSES=x"),
        ([], {"CLASSES": "11"}, "name your own with DATA"),
        ([], {"SEEDS": "a"}, "SEEDS=a"),
        ([], {"TRUSTED": "none.csv"}, "TRUSTED=none.csv"),
    ],
)
def test_wrong_settings_are_one_line_and_exit_code_2(words, env, says):
    done = dry_run(*words, **env)
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1


FAKE_PYTHON = r"""#!/bin/bash
# Stands in for Python: a command is work that takes a moment, is done once, and is saved when TERM comes.
case "$*" in *device_count*) echo "${FAKE_GPUS:-0}"; exit;; -) exit;; esac
key=$(echo "$*" | md5sum | cut -c1-12)
trap 'echo "$*" >>saved; exit 75' TERM
echo "$*" >>calls
if [ -e "finished/$key" ]; then echo finished, nothing to do; exit; fi
case "$*" in *"${FAIL:-nothing fails}"*)
  until [ -z "$HOLD" ] || grep -q "$HOLD" work; do sleep 0.02; done
  echo boom
  exit "${CODE:-3}";;
esac
previous=""
for word in "$@"; do
  case "$previous" in --out|--out-csv|--out-masks) mkdir -p "$word"; touch "$word/$key";; esac
  previous=$word
done
echo "$* on GPU ${CUDA_VISIBLE_DEVICES:-none}" >>work
case "$*" in *"${HOLD:-nothing is held}"*) for _ in {1..3000}; do sleep 0.02; done;; esac
for _ in 1 2 3 4 5 6; do sleep "${STEP:-0}"; done
trap '' TERM
mkdir -p finished
touch "finished/$key"
echo "$*" >>done
"""


def stand_in(folder):
    """A folder with the real sweeps and slurm.sh, and a stand-in for Python."""
    (folder / "benchmarks").mkdir(parents=True)
    for path in (ROOT / "sweep.sh", *ROOT.glob("run*.sh")):
        shutil.copy(path, folder)
    shutil.copy(ROOT / "benchmarks/slurm.sh", folder / "benchmarks")
    (folder / "setup.sh").write_text("find_python() { PY=$PWD/python; }\nset_up() { find_python; }\n")
    (folder / "python").write_text(FAKE_PYTHON)
    (folder / "python").chmod(0o755)
    for name in ("image", "mask"):
        (folder / "mine" / name).mkdir(parents=True)
    return folder


def settings(**env):
    own = ("DATA", "NOISE", "SEEDS", "ONLY", "SWEEP", "JOBS", "NPROC", "DRY_RUN", "CUDA_VISIBLE_DEVICES")
    clean = {k: v for k, v in os.environ.items() if k not in own and not k.startswith("SLURM")}
    return clean | {"DATA": "mine", "PRECISION": "fp32", "JOBS": "2"} | env


def sweep(folder, *words, command=("./run.sh",), **env):
    return subprocess.run([*command, *words], cwd=folder, env=settings(**env), capture_output=True, text=True)


def start(folder, script="./run.sh", **env):
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen([script], cwd=folder, env=settings(**env), **how)


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def tree(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def test_a_failed_run_is_reported_and_does_not_stop_the_others(tmp_path):
    folder = stand_in(tmp_path / "a")
    done = sweep(folder, FAIL="co_teaching.py")
    assert done.returncode == 1
    assert "noise60/co_teaching_s0 FAILED: boom" in done.stdout
    assert done.stderr.splitlines()[0].startswith("1 failed") and "noise60_co_teaching_s0.log" in done.stderr
    calls = lines(folder / "calls")
    assert sum("--name noise" in call for call in calls) == 13
    assert "utils/report.py" in calls[-1]


def test_the_time_left_is_that_of_the_work_left(tmp_path):
    """Three runs of 10 epochs, one with two networks; 8 s for the first ten of forty. Unwritten lists count, too."""
    folder = stand_in(tmp_path / "a")
    functions = (folder / "sweep.sh").read_text()
    start = functions.index("plan()")
    code = functions[start : functions.index("code_of()")]
    (folder / "runs/a").mkdir(parents=True)
    (folder / "runs/a/log.jsonl").write_text('{"epoch": 0}\n' * 10 + '{"split": "test", "best_epoch": 3}\n')
    (folder / "l.csv").write_text("image\n" * 200)
    code += """
    MODE=commands DONE=0
    commands() {
      echo python utils/x.py --epochs 5
      echo python train_without_weight.py --run_dir runs --name a --train_csv l.csv --epochs 10
      echo python train_co_teaching.py --name b --train_csv l.csv --epochs 10
      echo python train_with_KDweight.py --name c --epochs 10
    }
    plan; SECONDS=8 STARTED=0 DONE=0; left
    """
    done = subprocess.run(["bash", "-euc", code], cwd=folder, capture_output=True, text=True)
    assert done.stdout == "; 1 of 3 runs, about 24 s left", done.stderr


def test_threads_of_openmp_are_no_cores(tmp_path):
    """The nproc of coreutils answers OMP_NUM_THREADS where it is set; a sweep still runs a job for every core."""
    folder = stand_in(tmp_path / "a")
    code = ". ./setup.sh; . ./sweep.sh; DRY_RUN=1 NPROC=1 MODE=sweep PRECISION=fp32; machine"
    code += "; echo $JOBS $OMP_NUM_THREADS"
    env = {k: v for k, v in os.environ.items() if k not in ("JOBS", "OMP_NUM_THREADS")} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-euc", code], cwd=folder, capture_output=True, text=True, env=env)
    assert done.stdout == f"{min(4, len(os.sched_getaffinity(0)))} 1\n", done.stderr


def test_a_run_that_somebody_stopped_is_interrupted_not_failed(tmp_path):
    folder = stand_in(tmp_path / "a")
    done = sweep(folder, FAIL="co_teaching.py", CODE="75")
    assert done.returncode == 75 and "noise60/co_teaching_s0 interrupted" in done.stdout
    assert done.stderr.splitlines() == ["interrupted; the same command goes on from here"]
    assert sum("--name noise" in call for call in lines(folder / "calls")) == 13
    assert sweep(folder).returncode == 0
    done = sweep(folder, FAIL="--name teacher", CODE="75", SWEEP="b")
    assert done.returncode == 75 and "failed" not in done.stderr


@pytest.mark.parametrize(
    ("works", "word"), [(1, signal.SIGTERM), (4, signal.SIGINT), (9, signal.SIGHUP), (14, signal.SIGTERM)]
)
def test_an_interrupted_sweep_waits_for_its_runs_and_then_does_what_is_missing(tmp_path, works, word):
    folder = stand_in(tmp_path / "a")
    first = start(folder, STEP="0.05")
    until(lambda: len(lines(folder / "work")) >= works)
    first.send_signal(word)
    _, said = first.communicate(timeout=30)
    assert first.returncode == 75
    assert said.splitlines() == ["interrupted; the same command goes on from here"]
    before = lines(folder / "done")
    assert len(lines(folder / "calls")) == len(before) + len(lines(folder / "saved"))  # nothing is left running
    (folder / "work").unlink()
    assert sweep(folder).returncode == 0
    whole = stand_in(tmp_path / "b")
    assert sweep(whole).returncode == 0
    assert sorted(lines(folder / "done")) == sorted(lines(whole / "done"))
    assert not {line.split(" on GPU")[0] for line in lines(folder / "work")} & set(before)


LADDER = {"LABELLED": "4 8", "SEEDS": "0 1", "ONLY": "supervised u2pl unimatch all_masks"}


def test_every_rung_of_the_ladder_sees_the_same_masks_and_makes_the_same_steps(tmp_path):
    folder = stand_in(tmp_path / "a")
    done = sweep(folder, command=("./run_u2pl.sh",), SWEEP="u", **LADDER)
    assert done.returncode == 0, done.stderr
    runs = [line for line in lines(folder / "calls") if line.startswith("train_")]
    assert len(runs) == len(set(runs)) == 16
    for line in runs:
        count, row, seed = re.search(r"--name labelled(\d+)/(\w+)_s(\d)", line).groups()
        assert f"--unlabelled_csv runs/u/lists/seed{seed}/unlabelled_{count}.csv" in line and f"--seed {seed} " in line
        masks = "runs/u/lists/train.csv" if row == "all_masks" else f"runs/u/lists/seed{seed}/labelled_{count}.csv"
        preset = "supervised" if row == "all_masks" else row
        assert f"--train_csv {masks} " in line and f"--preset {preset} " in line
    assert lines(folder / "calls")[-1].endswith("--score mIoU --baseline supervised --out runs/u")


def test_an_interrupted_ladder_goes_on(tmp_path):
    folder = stand_in(tmp_path / "a")
    first = start(folder, "./run_u2pl.sh", STEP="0.05", SWEEP="u", **LADDER)
    until(lambda: len(lines(folder / "work")) >= 6)
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate(timeout=30)
    assert first.returncode == 75 and said.splitlines()[-1] == "interrupted; the same command goes on from here"
    done = sweep(folder, command=("./run_u2pl.sh",), SWEEP="u", **LADDER)
    runs = [line for line in lines(folder / "done") if line.startswith("train_")]
    assert done.returncode == 0 and len(runs) == len(set(runs)) == 16, done.stderr


def test_every_student_has_the_masks_and_the_teacher_of_its_noise(tmp_path):
    folder = stand_in(tmp_path / "a")
    done = sweep(folder, command=("./run_distill.sh",), SWEEP="d", NOISE="0 60", SEEDS="0 1", ONLY="baseline kl lad")
    assert done.returncode == 0, done.stderr
    runs = [line for line in lines(folder / "calls") if line.startswith("train_")]
    assert len(runs) == len(set(runs)) == 2 * (2 + 3 * 2)
    for line in runs:
        noise, row = re.search(r"--name noise(\S+)/(\w+?)(?:_s\d)? ", line).groups()
        masks = "runs/d/lists/train.csv" if noise == "0" else "runs/d/lists/polygon-0.7/train_noisy_60.csv"
        assert f"--train_csv {masks} " in line
        teacher = {"kl": "teacher", "lad": "lad_teacher"}.get(row)
        assert ("--teacher " in line) == bool(teacher)
        assert not teacher or f"--teacher runs/d/noise{noise}/{teacher}/best.pt " in line
        ends = [i for i, other in enumerate(lines(folder / "calls")) if f"--name noise{noise}/{teacher} " in other]
        assert not teacher or lines(folder / "calls").index(line) > ends[0]


def test_without_its_teacher_no_student_begins(tmp_path):
    folder = stand_in(tmp_path / "a")
    failing = {"FAIL": "--name noise0/lad_teacher", "NOISE": "0", "ONLY": "baseline lad"}
    done = sweep(folder, command=("./run_distill.sh",), SWEEP="d", **failing)
    assert done.returncode == 1 and "no teachers for noise 0" in done.stderr
    assert not [line for line in lines(folder / "calls") if "train_lad_student" in line]


def test_every_row_of_labels_has_the_noise_of_its_folder_and_ieg_its_own_flags(tmp_path):
    folder = stand_in(tmp_path / "a")
    how = LABELS | {"SWEEP": "i", "FLAGS": "--ema-decay 0.5", "IEG_FLAGS": "--ce-factor 1"}
    done = sweep(folder, NOISE="40 80", SEEDS="0 1", STEPS="20", **how)
    assert done.returncode == 0, done.stderr
    runs = [line for line in lines(folder / "calls") if line.startswith("train_")]
    assert len(runs) == len(set(runs)) == 2 * 2 * 3
    for line in runs:
        noise, method, seed = re.search(r"--name noise(\d+)/(\w+)_s(\d) ", line).groups()
        assert f"--dataset cifar10_uniform_0.{noise[0]} --method {method} " in line and f"--seed {seed} " in line
        assert "--ema-decay 0.5" in line and ("--ce-factor 1" in line) == (method == "ieg")
        assert f"--data-root {folder}/mine " in line
    assert lines(folder / "calls")[-1] == "utils/report.py runs/i --baseline supervised"
    sweep(folder, **how | {"SWEEP": "j"}, NOISE="20", ONLY=" l2r ieg", KIND="asymmetric", SET="cifar100")
    assert lines(folder / "calls")[-1] == "utils/report.py runs/j --baseline l2r"
    assert "--dataset cifar100_asymmetric_0.2 --method ieg" in lines(folder / "calls")[-2]


LABELS = {"command": ("./run_ieg.sh",), "DATA": "", "DATA_ROOT": "mine"}
WRONG = [{"SET": "mnist"}, {"KIND": "pair"}, {"NETWORK": "unet"}, {"ONLY": "kd"}, {"STEPS": "0"}, {"BATCH": "1"}]
WRONG += [{"DOWNLOAD": "0"}, {"DATA_ROOT": "gone"}, {"DATA": "mine"}]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_setting_that_labels_do_not_have_is_one_line(wrong, tmp_path):
    folder = stand_in(tmp_path / "a")
    done = sweep(folder, **LABELS | wrong)
    (name, value), *_ = wrong.items()
    said = done.stderr.splitlines()
    assert done.returncode == 2 and len(said) == 1 and said[0].startswith(f"error: {name}=") and value in said[0]
    assert not (folder / "runs").exists()


STAGES = {"LABELLED": "4", "SEEDS": "0 1", "ONLY": "ce cce_pct", "SWEEP": "u", "command": ("./run_lpl.sh",)}


def test_a_second_stage_needs_its_own_first_stage_only(tmp_path):
    folder = stand_in(tmp_path / "a")
    done = sweep(folder, FAIL="--name labelled4/ce_stage1_s0", **STAGES)
    assert done.returncode == 1 and "labelled4/ce_stage1_s0 FAILED: boom" in done.stdout
    calls = lines(folder / "calls")
    assert sum(line.startswith("train_") for line in calls) == 4 + 3 and "utils/report.py" in calls[-1]
    assert not any("ce_stage2_s0" in line and "cce" not in line for line in calls)
    assert sum("--image-labels --scales" in line or line.endswith("--image-labels") for line in calls) == 3
    assert sweep(folder, **STAGES).returncode == 0
    runs = [line for line in lines(folder / "done") if line.startswith("train_")]
    assert len(runs) == len(set(runs)) == 8


def test_interrupted_stages_go_on(tmp_path):
    folder = stand_in(tmp_path / "a")
    how = {key: value for key, value in STAGES.items() if key != "command"}
    first = start(folder, "./run_lpl.sh", STEP="0.05", **how)
    until(lambda: any("stage2" in line for line in lines(folder / "work")))
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate(timeout=30)
    assert first.returncode == 75 and said.splitlines()[-1] == "interrupted; the same command goes on from here"
    done = sweep(folder, **STAGES)
    runs = [line for line in lines(folder / "done") if line.startswith("train_")]
    assert done.returncode == 0 and len(runs) == len(set(runs)) == 8, done.stderr


def test_ctrl_c_reaches_everything_once(tmp_path):
    """A terminal sends SIGINT to the whole process group."""
    folder = stand_in(tmp_path / "a")
    first = start(folder, STEP="0.05")
    until(lambda: len(lines(folder / "work")) >= 5)
    os.killpg(first.pid, signal.SIGINT)
    assert first.communicate(timeout=30)[1].splitlines() == ["interrupted; the same command goes on from here"]
    assert first.returncode == 75 and lines(folder / "saved")


def test_a_tool_that_fails_leaves_no_run_behind(tmp_path):
    folder = stand_in(tmp_path / "a")
    done = sweep(folder, FAIL="prepare_data.py folds runs/x/lists/both/train_noisy_20", TEACHER="folds",
                 NOISE="10 20", ONLY="no_weight kd_bf", SWEEP="x", HOLD="name noise10/kd_bf", JOBS="3")  # fmt: skip
    assert done.returncode == 3
    assert ["kd_bf" in line for line in lines(folder / "saved")] == [True]
    assert len(lines(folder / "calls")) == len(lines(folder / "done")) + 2


def test_the_same_sweep_twice_is_refused_and_another_one_is_not(tmp_path):
    folder = stand_in(tmp_path / "a")
    first = start(folder, STEP="0.2", SWEEP="one")
    until(lambda: len(lines(folder / "work")) >= 4)
    calls = len(lines(folder / "calls"))
    again = sweep(folder, SWEEP="one")
    assert again.returncode == 2 and len(again.stderr.splitlines()) == 1
    assert "runs/one" in again.stderr and str(first.pid) in again.stderr
    assert sweep(folder, SWEEP="two", ONLY="no_weight").returncode == 0
    assert len(lines(folder / "calls")) >= calls
    first.terminate()
    first.communicate(timeout=30)
    assert first.returncode == 75


def test_runs_that_outlive_a_killed_sweep_hold_it_until_they_end(tmp_path):
    folder = stand_in(tmp_path / "a")
    first = start(folder, STEP="0.3", ONLY="no_weight clean", SWEEP="one")
    until(lambda: sum(".py --name" in line for line in lines(folder / "work")) == 2)
    first.kill()
    first.wait()
    again = sweep(folder, ONLY="no_weight clean", SWEEP="one")
    assert again.returncode == 2 and "at work already (process " in again.stderr
    assert len(again.stderr.splitlines()) == 1 and f" {first.pid})" not in again.stderr
    until(lambda: sum(".py --name" in line for line in lines(folder / "done")) == 2)
    until(lambda: sweep(folder, ONLY="no_weight clean", SWEEP="one").returncode == 0)
    assert sum("--name" in line for line in lines(folder / "work")) == 2  # the orphans' work counts
    first.communicate()


def test_two_sweeps_write_into_their_own_folders_only(tmp_path):
    written = {}
    for name in ("one", "two"):
        folder = stand_in(tmp_path / name)
        before = tree(folder)
        assert sweep(folder, SWEEP=name, NOISE="10 20", ONLY="no_weight kd_bf").returncode == 0
        new = tree(folder) - before - {"calls", "work", "done", "finished", "runs"}
        written[name] = {path for path in new if not path.startswith("finished/")}
        assert all(f"runs/{name}/".startswith(path + "/") or path.startswith(f"runs/{name}/") for path in written[name])
    assert written["one"] and not written["one"] & written["two"]


def test_two_first_sweeps_draw_the_demo_set_one_after_the_other(tmp_path):
    folder = stand_in(tmp_path / "a")
    both = [start(folder, DATA="", SWEEP=name, STEP="0.1", ONLY="no_weight") for name in ("one", "two")]
    for process in both:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert sum("prepare_data.py demo" in line for line in lines(folder / "calls")) == 2
    assert sum("prepare_data.py demo" in line for line in lines(folder / "work")) == 1


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"FAKE_GPUS": "2"}, {"0", "1"}),
        ({"FAKE_GPUS": "4", "NPROC": "2"}, {"0,1", "2,3"}),
        ({"FAKE_GPUS": "2", "CUDA_VISIBLE_DEVICES": "5,7"}, {"5", "7"}),
        ({"FAKE_GPUS": "1"}, {"0"}),
        ({"FAKE_GPUS": "0"}, {"none"}),
    ],
)
def test_runs_at_a_time_have_gpus_of_their_own(tmp_path, env, expected):
    folder = stand_in(tmp_path / "a")
    assert sweep(folder, ONLY="no_weight", SEEDS="0 1 2 3 4", STEP="0.02", **({"JOBS": ""} | env)).returncode == 0
    runs = [line for line in lines(folder / "work") if "--name noise" in line]
    assert len(runs) == 5 and {line.split("on GPU ")[1] for line in runs} == expected
    if env.get("NPROC"):
        assert all(f"--standalone --nproc_per_node={env['NPROC']} train_" in line for line in runs)


def test_more_processes_than_gpus_is_one_line(tmp_path):
    done = sweep(stand_in(tmp_path / "a"), FAKE_GPUS="2", NPROC="4")
    assert done.returncode == 2 and done.stderr.splitlines() == ["error: NPROC=4: there are 2 GPUs here"]


def test_a_dry_run_writes_nothing_and_prints_what_the_sweep_does(tmp_path):
    folder = stand_in(tmp_path / "a")
    env = {"SWEEP": "with blank & more", "LEVELS": "6 8", "JOBS": "1", "ONLY": "no_weight teacher_bf"}
    before = tree(folder)
    plan = sweep(folder, DRY_RUN="1", **env).stdout
    assert tree(folder) == before
    assert sweep(folder, **env).returncode == 0
    swept = lines(folder / "calls")
    for name in ("calls", "finished", "done"):
        (folder / name).rename(folder / f"{name}_before")
    for line in plan.splitlines():
        assert sweep(folder, command=("bash", "-c", line)).returncode == 0
    assert sorted(lines(folder / "calls")) == sorted(swept) and len(swept) == 8


SCONTROL = '#!/bin/sh\necho "$*" >>scontrol_calls\necho "JobId=1 JobState=${STATE:-RUNNING} Reason=None"\n'
SLURM = {"SLURM_ARRAY_JOB_ID": "41", "SLURM_JOB_ID": "44", "NOISE": "20 60", "SEEDS": "0 1", "JOBS": ""}
SLURM_SH = ("bash", "benchmarks/slurm.sh")


@pytest.fixture
def cluster(tmp_path):
    folder = stand_in(tmp_path / "a")
    (folder / "bin").mkdir()
    (folder / "bin/scontrol").write_text(SCONTROL)
    (folder / "bin/scontrol").chmod(0o755)
    return folder


def task(folder, i, **env):
    env = SLURM | {"SLURM_ARRAY_TASK_ID": str(i), "PATH": f"{folder}/bin:{os.environ['PATH']}"} | env
    return sweep(folder, command=SLURM_SH, **env)


def test_every_run_of_a_sweep_is_one_array_task(cluster):
    plan = sweep(cluster, DRY_RUN="1", **SLURM).stdout.splitlines()
    runs = [line.split(" ", 1)[1] for line in plan if " train_" in line and "/python train_" in line]
    count = int(sweep(cluster, "count", command=SLURM_SH, **SLURM).stdout)
    assert count == len(runs) == 1 + 2 + 2 * 2 * 12  # the teacher, two seeds of clean, twelve rows for two ratios
    for i in (0, 7, count - 1):
        assert task(cluster, i).returncode == 0
        assert lines(cluster / "calls")[-1] == runs[i]
    assert len(lines(cluster / "calls")) == 3
    beyond = task(cluster, count)
    assert beyond.returncode == 2 and f"task {count}: the sweep has {count} runs" in beyond.stderr


def test_prepare_and_table_frame_the_array(cluster):
    assert sweep(cluster, "prepare", command=SLURM_SH, **SLURM).returncode == 0
    calls = lines(cluster / "calls")
    assert sum("get_weight.py" in call for call in calls) == 2 and not any("--name noise" in call for call in calls)
    assert sweep(cluster, "table", command=SLURM_SH, **SLURM).returncode == 0
    assert len(lines(cluster / "calls")) == len(calls) + 1 and "utils/report.py" in lines(cluster / "calls")[-1]


def test_only_an_interrupted_task_is_queued_again(cluster):
    assert task(cluster, 2, FAIL="train_", CODE="75").returncode == 75
    assert lines(cluster / "scontrol_calls")[-1] == "requeue 41_2"
    (cluster / "scontrol_calls").unlink()
    assert task(cluster, 2, FAIL="train_", CODE="75", STATE="CANCELLED").returncode == 75
    assert lines(cluster / "scontrol_calls") == ["show job 41_2"]
    (cluster / "scontrol_calls").unlink()
    assert task(cluster, 2, FAIL="train_", CODE="3").returncode == 3
    assert not lines(cluster / "scontrol_calls")


def test_a_signalled_task_saves_and_is_queued_again(cluster):
    env = settings(**SLURM | {"SLURM_ARRAY_TASK_ID": "3", "STEP": "1", "PATH": f"{cluster}/bin:{os.environ['PATH']}"})
    process = subprocess.Popen(SLURM_SH, cwd=cluster, env=env, stdout=subprocess.DEVNULL)
    until(lambda: lines(cluster / "work"))
    process.terminate()
    assert process.wait(30) == 75
    assert len(lines(cluster / "saved")) == 1 and not lines(cluster / "done")
    assert lines(cluster / "scontrol_calls")[-1] == "requeue 41_3"


def test_several_machines_meet_at_the_first(cluster):
    (cluster / "bin/scontrol").write_text("#!/bin/sh\necho node7\necho node8\n")
    (cluster / "bin/srun").write_text('#!/bin/sh\necho "$*" >>srun_calls\n')
    (cluster / "bin/srun").chmod(0o755)
    nodes = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_GPUS_ON_NODE": "4"}
    assert task(cluster, 0, **nodes).returncode == 0
    (call,) = lines(cluster / "srun_calls")
    assert call.startswith("--nodes=2 --ntasks-per-node=1 ") and " -m torch.distributed.run --nnodes=2 " in call
    for word in ("--rdzv_endpoint=node7:20044", "--rdzv_id=44", "--nproc_per_node=4 train_without_weight.py"):
        assert word in call


@pytest.mark.slow
def test_a_real_sweep_interrupted_and_started_again_ends_with_the_same_table(tmp_path):
    for name in ("run.sh", "setup.sh", "sweep.sh", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for path in (*ROOT.glob("train_*.py"), ROOT / "utils"):
        (tmp_path / path.name).symlink_to(path)
    draw_set(tmp_path / "mine", 16)
    env = {"PYTHON": sys.executable, "SIZE": "32", "EPOCHS": "2", "TEACHER_EPOCHS": "2", "TRUSTED": "3", "BATCH": "4"}
    env |= {"LEVELS": "1 2", "ONLY": "no_weight teacher_bf", "OMP_NUM_THREADS": "1", "JOBS": "1"}
    first = start(tmp_path, SWEEP="stopped", **env)
    stopped, whole = tmp_path / "runs/stopped", tmp_path / "runs/whole"
    until(lambda: "epoch" in "".join(lines(stopped / "noise60/no_weight_s0/log.jsonl")), seconds=120)
    first.terminate()
    said = first.communicate(timeout=60)
    assert first.returncode == 75 and not (stopped / "table.csv").exists(), said
    made = [stopped / "teacher/last.pt", *stopped.glob("lists/**/*.csv"), *stopped.glob("noisy/*/*/*.png")]
    written = {path: path.stat().st_mtime_ns for path in made}
    for name in ("stopped", "whole"):
        done = sweep(tmp_path, SWEEP=name, **env)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (stopped / "table.csv").read_text() == (whole / "table.csv").read_text()
    assert len(lines(whole / "table.csv")) == 4  # the head, the teacher and two rows
    assert {path: path.stat().st_mtime_ns for path in made} == written and len(made) > 10


LAYERS = [
    {"errors", "interrupt"},
    {"logs", "ieg_args", "label_noise", "policies"},
    {"args", "images", "lists", "paired", "contour", "present", "dense_crf"},
    {"sweep"},
    {"demo", "scores", "store", "averages", "page", "plots", "inference", "overlay", "sources", "export", "points"},
    {"noise", "plans", "class_scores", "written", "semi_args", "image_labels", "class_folders"},
    {"own_size", "splits", "regroup", "readers"},
    {"prepare_data", "add_noise", "check_data", "boundary", "report_page", "label_quality"},
    {"metrics", "noise_plan", "cleaned"},
    {"losses", "models", "noise_mixture", "noise_args", "mixing"},
    {"optim", "methods", "checkpoint", "augment", "generate_noisy_label"},
    {"dataset", "ema"},
    {"support", "corrected", "batches", "steps", "pictures", "unlabelled", "probed", "labelled"},
    {"distill", "lad", "tagged"},
    {"run", "relabel", "teachers"},
    {"evaluate", "predict_mask", "get_weight", "audit_page", "audit_notes"},
    {"report", "audit", "accuracy"},
]


def test_imports_point_downward_only():
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    for path in (ROOT / "utils").rglob("*.py"):
        room = path.relative_to(ROOT / "utils").parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "utils":
                parts = node.module.split(".")[1:] or [alias.name for alias in node.names]
                assert parts[0] == room or level[parts[0]] < level[room], f"{room} imports {parts[0]}"


def test_no_module_shadows_the_standard_library():
    assert not {path.stem for path in (ROOT / "utils").glob("*.py")} & set(sys.stdlib_module_names) - {"__init__"}


def test_weights_and_noise_tools_do_not_wait_for_torch_where_they_need_none():
    tools = "utils.prepare_data, utils.generate_noisy_label, utils.get_weight"
    code = f"import sys; import {tools}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
