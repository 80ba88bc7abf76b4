"""The speed report: what counts as a regression, how figures are kept and shown, and that all can be measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import _speed_table as table
from benchmarks import speed
from utils.checkpoint import Checkpoint
from utils.run import Run

ROOT = Path(__file__).parents[1]


def figure(ratio, better="larger", **more):
    about = {"command": "python speed.py", "commit": "0123456789", "threads": 1}
    return table.figure("a thing", 10.0 * ratio, 10.0, "img/s", ratio, better, **about | more)


def file_of(device="box | torch 9", kind="cpu", **ratios):
    quick = {name: figure(*value) for name, value in ratios.items()}
    return {device: {"kind": kind, "full": {}, "quick": quick, "profiles": {}}}


@pytest.mark.parametrize(
    ("better", "now", "code"),
    [("larger", 0.91, 0), ("larger", 0.89, 1), ("larger", 2.0, 0), ("smaller", 1.09, 0), ("smaller", 1.11, 1)],
)
def test_a_loss_of_more_than_a_tenth_is_a_regression(better, now, code):
    found, lines = table.compare([file_of(a=(now, better), b=(1, better))], file_of(a=(1.0, better), b=(1, better)))
    assert found == code
    assert len([line for line in lines if line.startswith("WORSE")]) == code
    assert any(line.startswith("ok  b") for line in lines)


def test_every_lost_ratio_is_listed_and_the_better_of_two_measurements_counts():
    old = file_of(a=(1.0,), b=(1.0, "smaller"), c=(1.0,))
    bad = file_of(a=(0.5,), b=(2.0, "smaller"), c=(1.0,))
    code, lines = table.compare([bad], old)
    assert code == 1
    assert [line.split()[3].rstrip(":") for line in lines if line.startswith("WORSE")] == ["a", "b"]
    assert table.compare([bad, file_of(a=(0.95,), b=(3.0, "smaller"), c=(0.5,))], old)[0] == 1
    assert table.compare([bad, file_of(a=(0.95,), b=(1.05, "smaller"), c=(0.5,))], old)[0] == 0


def test_like_is_compared_with_like():
    new = file_of(a=(0.1,))
    same_kind = file_of("other | torch 9", a=(1.0,))
    gpu = file_of("card | torch 9", "cuda", a=(1.0,))
    assert table.compare([new], same_kind | gpu)[0] == 1
    assert table.compare([new], gpu)[0] == 2
    assert table.compare([new], file_of(another_setting=(1.0,)))[0] == 2
    assert table.compare([new], {})[0] == 2
    # its own device first, whatever others have
    assert table.compare([new], same_kind | file_of(a=(0.1,)))[0] == 0
    full = file_of(b=(1.0,))
    full["box | torch 9"]["full"] = {"a": figure(1.0)}
    assert table.compare([new], full)[0] == 2, "a long measurement is no measure for a quick one"


def test_what_is_not_measured_any_more_is_said():
    old = {name: (1.0,) for name in ("training/a, bf16", "training/b", "evaluation/c")}
    code, lines = table.compare([file_of(**{"training/b": (1.0,)})], file_of(**old))
    assert code == 0
    assert [line for line in lines if "not measured" in line] == ["not measured here  training/a, bf16"]


def test_targets_hold_for_the_ratio_or_for_our_figure():
    assert table.figure("x", 1, 1, "img/s", 0.95, "larger", 0.95)["met"] is True
    assert table.figure("x", 1, 1, "img/s", 0.94, "larger", 0.95)["met"] is False
    assert table.figure("x", 1, 1, "img/s", 1.16, "smaller", 1.15)["met"] is False
    assert table.figure("x", 0.09, 5, "ms", 9.0, "smaller", 0.1, of="ours")["met"] is True
    assert table.figure("x", 0.11, 5, "ms", 0.0, "smaller", 0.1, of="ours")["met"] is False
    assert table.figure("x", 1, 1, "ms", 1.0, "smaller")["met"] is None


def test_figures_are_kept_by_device_and_mode(tmp_path):
    path = tmp_path / "speed.json"
    table.merge(path, "box", "cpu", "full", {"a": figure(1.0), "b": figure(1.0)}, {})
    table.merge(path, "box", "cpu", "quick", {"a": figure(0.7)}, {})
    table.merge(path, "card", "cuda", "full", {"a": figure(0.5)}, {"script": {"forward": 1.0}})
    table.merge(path, "box", "cpu", "full", {"a": figure(0.9)}, {})
    found = json.loads(path.read_text())
    assert {name: row["ratio"] for name, row in found["box"]["full"].items()} == {"a": 0.9, "b": 1.0}
    assert found["box"]["quick"]["a"]["ratio"] == 0.7
    assert found["card"]["full"]["a"]["ratio"] == 0.5
    assert found["card"]["profiles"] == {"script": {"forward": 1.0}}


def test_the_page_says_what_is_not_met_and_what_was_not_run(tmp_path):
    page = tmp_path / "speed.md"
    page.write_text("before\n<!-- speed -->\nold\n<!-- /speed -->\nafter\n")
    full = {"a": figure(0.9, limit=0.95, spread=[0.85, 0.93]), "b": figure(0.96, limit=0.95)}
    profiles = {"train_a": {"forward": 0.75, "rest": 0.25}, "train_b": {"forward": 0.5, "loader": 0.5}}
    profiles["reading"] = {"decode": 1.0}
    everything = {"box": {"kind": "cpu", "full": full, "quick": {}, "profiles": profiles}}
    table.fill(page, everything)
    text = page.read_text()
    assert "| a thing | 9 | 10 | img/s | 0.900 (0.850 – 0.930) | ≥ 0.95 | **no** |" in text
    assert "| 0.960 | ≥ 0.95 | yes |" in text
    assert "| train_a | 75.0% | 25.0% |  |" in text
    assert "| share of the time | decode |\n|---|---|\n| reading | 100.0% |" in text
    assert "## GPU\n\nnot run here" in text
    assert "## CPU" not in text
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    everything["card"] = everything["box"] | {"kind": "cuda"}
    assert "not run here" not in table.as_markdown(everything)


def test_the_committed_page_shows_the_committed_figures():
    everything = json.loads((ROOT / "benchmarks/speed.json").read_text())
    assert table.as_markdown(everything) in (ROOT / "benchmarks/speed.md").read_text()


def test_exit_codes_of_a_comparison(tmp_path, capsys):
    new, old = tmp_path / "new.json", tmp_path / "old.json"
    new.write_text(json.dumps(file_of(a=(0.5,))))
    for content, code in ((file_of(a=(1.0,)), 1), (file_of(a=(0.5,)), 0), ({}, 2)):
        old.write_text(json.dumps(content))
        with pytest.raises(SystemExit) as done:
            table.main(table.Args([str(new)], str(old)))
        assert done.value.code == code
        assert capsys.readouterr().out


def test_regress_refuses_a_wrong_flag():
    words = ["bash", str(ROOT / "benchmarks/regress.sh"), "--only", "cooking"]
    env = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    assert done.returncode == 2
    assert "cooking" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Flags of a measurement that takes seconds."""
    for name, value in {"SIDE": 32, "PAIRS": 40, "ROWS": (20, 40), "CLASSES": (2, 5)}.items():
        monkeypatch.setattr(speed, name, value)
    flags = {"arch": "PlainUNet", "width": 4, "size": 16, "batch_size": 2, "images": 4, "repeats": 1}
    flags |= {"precision": "fp32", "quick": True, "cpu": True, "page": ""}
    return speed.Args(out=str(tmp_path / "speed.json"), **flags)


def test_everything_can_be_measured(small, tmp_path):
    figures = speed.main(small)
    assert {key.split("/")[0] for key in figures} == set(speed.SECTIONS)
    kept = json.loads((tmp_path / "speed.json").read_text())
    (device,) = kept
    assert device.endswith(f"| torch {torch.__version__}")
    assert kept[device]["quick"] == figures
    assert kept[device]["full"] == {}
    assert all(row["ratio"] > 0 and row["threads"] == 1 and row["commit"] for row in figures.values())
    assert table.compare([kept], kept)[0] == 0


def test_the_parts_of_a_script_are_its_time(small, tmp_path):
    bench = speed.Bench(small, tmp_path)
    before = torch.Tensor.to, torch.Tensor.backward, torch.optim.AdamW.step, Run.log, Checkpoint.save
    speed.profiles(bench, bench.flags(bench.list_of(4)), 2)
    scripts = dict(bench.profiles)
    speed._end_to_end(bench, 4, 1, "32x32")
    speed.evaluation(bench)
    scoring, evaluating = (bench.profiles[name] for name in bench.profiles if name not in scripts)
    wanted = {"list", "read", "check the file", "decode", "check the values", "count pixels", "arithmetic", "write"}
    assert set(scoring) == wanted | {"rest"} and set(evaluating) >= {"loader", "forward", "scores", "rest"}
    for shares in (scoring, evaluating):
        assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) > 0
    bench.profiles = scripts
    assert before == (torch.Tensor.to, torch.Tensor.backward, torch.optim.AdamW.step, Run.log, Checkpoint.save)
    for name, shares in bench.profiles.items():
        assert sum(shares.values()) == pytest.approx(1), name
        assert {"forward", "loss", "backward", "update", "loader", "validation", "log", "checkpoint"} <= set(shares)
        assert ("method" in shares) == ("without" not in name)
        assert min(shares.values()) > 0


def test_a_list_is_opened_anew_and_from_what_was_decoded(small, tmp_path):
    bench = speed.Bench(small, tmp_path)
    speed._opening(bench, 20)
    row = bench.figures["growth/list, 20"]
    assert 0 < row["ours"] < row["rival"]
