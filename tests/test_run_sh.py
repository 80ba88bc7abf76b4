"""The sweep's command lines, the way it goes on after a failure, and which room may import which."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def dry_run(*words, **env):
    env = {k: v for k, v in os.environ.items() if k not in ("DATA", "NOISE")} | {"DRY_RUN": "1"} | env
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


def test_sweep_has_ten_rows_and_a_clean_one():
    lines = [line for line in dry_run().stdout.splitlines() if "--name noise" in line]
    names = sorted(line.split("--name ")[1].split()[0] for line in lines)
    rows = ["co_teaching", "co_teaching+", "decoupling", "no_weight"]
    rows += [f"{kind}_{score}" for kind in ("teacher", "kd") for score in ("miou", "bf", "bm")]
    assert names == sorted(["noise0/clean_s0", *(f"noise60/{row}_s0" for row in rows)])


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


def test_fold_teachers_are_asked_for_unseen_images_only():
    lines = dry_run(TEACHER="folds", ONLY="teacher_bf").stdout.splitlines()
    predict = next(line for line in lines if "predict_mask" in line)
    assert "--folds 2" in predict and "--trusted" not in predict and predict.count("last.pt") == 2


@pytest.mark.parametrize(
    ("words", "env", "says"),
    [
        (["papr"], {}, "./run.sh papr"),
        ([], {"OP": "grow"}, "OP=grow"),
        ([], {"TEACHER": "none"}, "TEACHER=none"),
        ([], {"NOISE": "0"}, "TRUSTED=list.csv"),
        ([], {"NOISE": "60%"}, "NOISE=60%"),
        ([], {"ONLY": "kd_bff"}, "no row kd_bff"),
        ([], {"VALID": "clean"}, "VALID=clean"),
        ([], {"EPOCHS": "abc"}, "EPOCHS=abc"),
        ([], {"JOBS": "0"}, "JOBS=0"),
        ([], {"SEEDS": "a"}, "SEEDS=a"),
        ([], {"TRUSTED": "none.csv"}, "TRUSTED=none.csv"),
    ],
)
def test_wrong_settings_are_one_line_and_exit_code_2(words, env, says):
    done = dry_run(*words, **env)
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_failed_run_is_reported_and_does_not_stop_the_others(tmp_path):
    """The real run.sh with a stand-in for Python: every command succeeds except co-teaching."""
    shutil.copy(ROOT / "run.sh", tmp_path)
    (tmp_path / "setup.sh").write_text("set_up() { PY=$PWD/python; }\n")
    fake = '#!/bin/sh\necho "$*" >>calls\ncase "$*" in *torch*) exit 1;; *co_teaching.py*) echo boom; exit 3;; esac\n'
    (tmp_path / "python").write_text(fake)
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "demo/image").mkdir(parents=True)
    (tmp_path / "demo/mask").mkdir()
    env = os.environ | {"DATA": "demo", "PRECISION": "fp32", "JOBS": "2"}
    done = subprocess.run(["bash", "run.sh"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "noise60/co_teaching_s0 FAILED: boom" in done.stdout
    assert done.stderr.splitlines()[0].startswith("1 failed") and "noise60_co_teaching_s0.log" in done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert sum("--name noise" in call for call in calls) == 11
    assert "utils/report.py" in calls[-1]


LAYERS = [
    {"errors", "logs", "interrupt"},
    {"args", "images", "lists"},
    {"demo", "boundary", "store"},
    {"prepare_data", "add_noise", "check_data"},
    {"metrics", "generate_noisy_label"},
    {"losses", "models"},
    {"optim", "methods", "checkpoint", "dataset"},
    {"steps"},
    {"run"},
    {"evaluate", "predict_mask", "get_weight"},
    {"report"},
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
    code = "import sys; import utils.prepare_data, utils.generate_noisy_label; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
