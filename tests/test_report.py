"""The report: paired statistics, states of runs, what is marked, and the page in a real browser."""

import csv
import json
import math
import re
import subprocess
import sys
from functools import partial

import cv2
import numpy as np
import pandas as pd
import pytest
from browser import addresses, broken_pictures, column, console_errors, open_page, overflow, sort_by
from scipy import stats

from utils import report
from utils.errors import InputError
from utils.paired import holm, paired_difference
from utils.plots import schedules
from utils.report_page import rendered, result_rows
from utils.sweep import find_runs, frame_of

HOSTILE = "a<script>alert(1)</script> |$x ü"


def write_run(root, name, bf=None, seed=0, epochs=3, planned=3, **more):
    """A run folder with `epochs` lines, a test line if `bf` is given, and further settings."""
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"seed": seed, "epochs": planned, "test_csv": "t.csv", **more}))
    env = {"commit": "0123456789abcdef", "dirty": False, "torch": "2.x", "device": "cpu"}
    (folder / "env.json").write_text(json.dumps(env))
    rows = []
    for epoch in range(epochs):
        scores = {f"valid_{key}": 0.5 + 0.1 * epoch for key in ("iou", "miou", "dice", "bf", "score", "accuracy")}
        loss = {"train_loss": 0.5, "train_loss_clean": 0.4, "train_loss_noisy": 0.6, "T": 0.1 * epoch, "lr": 0.1}
        rows.append({"epoch": epoch, "seconds": 2.0, **loss, **scores})
    if bf is not None:
        rows.append({"split": "test", "best_epoch": 1} | {f"test_{k}": bf - 0.1 for k in ("iou", "miou", "dice")})
        rows[-1]["test_bf"] = bf
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_sweep(root):
    for ratio, scale in ((30, 0.5), (60, 1.0)):
        for seed in (0, 1, 2):
            for row, low in (("no_weight", 0.3), ("kd_bf", 0.1), ("teacher_bf", 0.15)):
                bf = 0.9 - scale * low - 0.01 * seed - 0.003 * seed * (row == "kd_bf")
                write_run(root, f"noise{ratio}/{row}_s{seed}", bf, seed)
    for seed in (0, 1, 2):
        write_run(root, f"noise0/clean_s{seed}", 0.9 - 0.01 * seed, seed)
    write_run(root, "teacher", 0.95)
    (root / "weights").mkdir()
    lines = [f"{i}.png,m{i}.png,{7 * (i % 2)},{0.9 - 0.5 * (i % 2)}" for i in range(8)]
    (root / "weights/train_noisy_60_trusted_weight_bfscore.csv").write_text(
        "\n".join(["img,filename,iterations,weight", *lines]) + "\n"
    )


def test_a_paired_difference_by_hand():
    # differences 0.1, 0.2, 0.3: mean 0.2, deviation 0.1, error 0.1 / sqrt 3, t(0.975, 2) = 4.302653
    found = paired_difference(pd.Series([0.5, 0.7, 0.9, 0.1], [0, 1, 2, 9]), pd.Series([0.4, 0.5, 0.6], [0, 1, 2]))
    half = 4.302652729911275 * 0.1 / math.sqrt(3)
    assert found["pairs"] == 3 and found["difference"] == pytest.approx(0.2)
    assert (found["low"], found["high"]) == (pytest.approx(0.2 - half), pytest.approx(0.2 + half))
    # t = 2 sqrt 3 with two degrees of freedom: p = 1 - t / sqrt(2 + t^2)
    assert found["p"] == pytest.approx(1 - math.sqrt(12 / 14))


def test_paired_differences_are_those_of_scipy_whatever_the_order_of_the_seeds():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.8, 0.1, 7), rng.normal(0.7, 0.1, 7)
    order = rng.permutation(7)
    found = paired_difference(pd.Series(a, range(7)), pd.Series(b[order], order))
    known = stats.ttest_rel(a, b)
    interval = known.confidence_interval()
    assert found["p"] == pytest.approx(known.pvalue)
    assert (found["low"], found["high"]) == (pytest.approx(interval.low), pytest.approx(interval.high))


def test_too_few_pairs_or_equal_differences_have_no_interval():
    one = paired_difference(pd.Series([0.5], [0]), pd.Series([0.3, 0.1], [0, 1]))
    assert one["pairs"] == 1 and one["difference"] == pytest.approx(0.2) and math.isnan(one["p"])
    none = paired_difference(pd.Series([0.5], [4]), pd.Series([0.3], [0]))
    assert none["pairs"] == 0 and math.isnan(none["difference"]) and math.isnan(none["low"])
    same = paired_difference(pd.Series([0.4, 0.6], [0, 1]), pd.Series([0.3, 0.5], [0, 1]))
    assert same["difference"] == pytest.approx(0.1) and math.isnan(same["p"]) and math.isnan(same["high"])
    lost = paired_difference(pd.Series([0.4, np.nan], [0, 1]), pd.Series([0.3, 0.5], [0, 1]))
    assert lost["pairs"] == 1


def test_holm_by_hand():
    # sorted 0.01, 0.02, 0.03, 0.04: times 4, 3, 2, 1 = 0.04, 0.06, 0.06, 0.04; none may be smaller than one before it
    assert holm([0.04, np.nan, 0.01, 0.03, 0.02]) == pytest.approx([0.06, np.nan, 0.04, 0.06, 0.06], nan_ok=True)
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0]) and len(holm([])) == 0


def test_the_table_has_differences_and_the_closed_gap(tmp_path):
    write_sweep(tmp_path)
    table = report.main(report.Args([str(tmp_path)]))
    line = table[(table["row"] == "kd_bf") & (table["noise"] == "60")].iloc[0]
    # seeds differ by 0.2, 0.197, 0.194
    assert line["difference"] == pytest.approx(0.197) and line["pairs"] == 3
    assert line["closed"] == pytest.approx(0.197 / 0.3)
    assert line["p"] == pytest.approx(stats.ttest_1samp([0.2, 0.197, 0.194], 0).pvalue)
    # teacher_bf has equal differences at every seed, so that only the two kd_bf are comparisons
    assert table["p"].notna().sum() == 2
    other = table[(table["row"] == "kd_bf") & (table["noise"] == "30")].iloc[0]
    smaller = min(line["p"], other["p"])
    assert line["p_holm"] == pytest.approx(max(2 * smaller, line["p"] if line["p"] > smaller else 0))
    bounds = table[table["row"].isin(["clean", "teacher", "no_weight"])]
    assert bounds["difference"].isna().all() and bounds["closed"].isna().all()
    text = (tmp_path / "table.md").read_text()
    assert "| 60 | kd_bf | +0.197 | +0.190 to +0.204 | < 0.001 | < 0.001 | 3 |" in text
    with (tmp_path / "table.csv").open() as file:
        head = next(csv.reader(file))
    assert head[:4] == ["noise", "row", "seeds", "IoU"] and head[-6:] == [*report.COLUMNS]


def test_rows_that_see_clean_masks_besides_are_named_under_the_table(tmp_path):
    write_sweep(tmp_path)
    report.main(report.Args([str(tmp_path)]))
    pages = [tmp_path / name for name in ("table.md", "report.html")]
    assert not any("Also see" in page.read_text() for page in pages)
    trusted = tmp_path / "trusted.csv"
    trusted.write_text("img,filename\na.png,b.png\nc.png,d.png\n")
    for row, more in (("l2r", {"method": "l2r"}), ("ieg", {"method": "ieg"}), ("plain", {"method": "supervised"})):
        write_run(tmp_path, f"noise60/{row}_s0", 0.6, probe_csv=str(trusted), **more)
    write_run(tmp_path, "noise60/spatial_correction_s0", 0.6, trusted_csv=str(trusted))
    write_run(tmp_path, "noise60/other_s0", 0.6, trusted_csv="gone.csv")
    report.main(report.Args([str(tmp_path)]))
    for page in pages:
        text = page.read_text()
        assert f"Also see the 2 clean masks of {trusted}: ieg, l2r, spatial_correction." in text
        assert "Also see the clean masks of gone.csv: other." in text


def test_the_best_row_of_a_ratio_is_marked_and_no_bound_ever_is(tmp_path):
    write_sweep(tmp_path)
    write_run(tmp_path, "noise60/same_s0", 0.79, 0)  # kd_bf has 0.8, 0.787, 0.774: mean 0.787
    rows = result_rows(report.summary(frame_of(find_runs([tmp_path]))))
    best = {(line["noise"], line["row"]): line["best"] for line in rows}
    everything = {"IoU", "mIoU", "Dice", "BF"}
    assert best["60", "same"] == everything and best["60", "kd_bf"] == set()
    assert best["30", "kd_bf"] == everything and best["30", "no_weight"] == set()
    assert best["0", "clean"] == best["", "teacher"] == set()


def test_a_network_that_is_shown_the_label_is_a_bound_and_has_a_row_without_it(tmp_path):
    folder = write_run(tmp_path, "noise60/lad_teacher", 0.9)
    line = {"split": "test", "test_bf": 0.9, "test_miou": 0.8, "test_no_label_bf": 0.3, "test_no_label_miou": 0.2}
    (folder / "log.jsonl").write_text(json.dumps({"epoch": 0}) + "\n" + json.dumps(line) + "\n")
    for row, bf in (("lad_s0", 0.6), ("baseline_s0", 0.5)):
        write_run(tmp_path, f"noise60/{row}", bf)
    table = report.main(report.Args([str(tmp_path)], baseline="baseline"))
    scores = table.set_index("row")[["mIoU", "BF"]].round(3).T.to_dict("list")
    assert scores["lad_teacher"] == [0.8, 0.9] and scores["lad_teacher without label"] == [0.2, 0.3]
    best = {line["row"]: line["best"] for line in result_rows(table)}
    assert best["lad_teacher"] == set() and "BF" in best["lad"]


def test_images_with_one_label_each_are_reported_by_their_accuracy(tmp_path):
    for row, low in (("supervised", 0.3), ("l2r", 0.2)):
        for seed in (0, 1):
            folder = write_run(tmp_path, f"noise40/{row}_s{seed}", seed=seed, network_name="small", method=row)
            found = {"test_accuracy": 0.8 - low, "test_cycle_end_accuracy": 0.9 - low + 0.02 * seed, "test_top5": 1.0}
            with (folder / "log.jsonl").open("a") as file:
                file.write(json.dumps({"split": "test"} | found | {"test_best_accuracy": 0.95 + low}) + "\n")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/noise40_ieg_s0.log").write_text("error: no such flag\n")
    (tmp_path / "logs/noise40_ieg_s0.log.code").write_text("2\n")
    write_run(tmp_path, "noise40/ieg_s1", epochs=2, network_name="small", max_iteration=100)
    table = report.main(report.Args([str(tmp_path)], baseline="supervised"))
    assert table["row"].tolist() == ["supervised", "l2r"] and "BF" not in table
    assert table["accuracy"].tolist() == pytest.approx([0.61, 0.71])
    assert table["last accuracy"].tolist() == pytest.approx([0.5, 0.6])
    assert table["difference"].dropna().tolist() == pytest.approx([0.1])
    page, text = ((tmp_path / name).read_text() for name in ("report.html", "table.md"))
    assert "accuracy − supervised" in page and "on the test images after each pass" in page
    assert "gap closed" not in page + text and "chosen on the test images" in text
    assert "ieg, seed 0: failed, before it began; exit code 2: error: no such flag" in text
    assert result_rows(table)[1]["best"] == {"accuracy", "last accuracy"} and not result_rows(table)[0]["best"]
    with pytest.raises(InputError, match="--score BF: these runs have accuracy, last accuracy, best accuracy"):
        report.main(report.Args([str(tmp_path)], score="BF"))


def test_rows_that_look_the_same_are_best_together(tmp_path):
    for row, bf in (("a", 0.80004), ("b", 0.8), ("c", 0.7)):
        write_run(tmp_path, f"noise60/{row}_s0", bf)
    rows = result_rows(report.summary(frame_of(find_runs([tmp_path]))))
    assert [line["row"] for line in rows if "BF" in line["best"]] == ["a", "b"]


def test_states_of_runs(tmp_path):
    write_run(tmp_path, "noise60/done_s0", 0.5)
    half = write_run(tmp_path, "noise60/half_s0", epochs=2)
    with (half / "log.jsonl").open("a") as file:
        file.write('{"epoch": 2, "train_l')  # cut off by a kill
    write_run(tmp_path, "noise60/broken_s1", epochs=1, seed=1)
    write_run(tmp_path, "noise60/stopped_s0", epochs=1)
    write_run(tmp_path, "folds60/teacher0", test_csv="")
    empty = tmp_path / "noise60/empty_s3"
    empty.mkdir()
    (empty / "args.json").write_text('{"seed"')
    logs = tmp_path / "logs"
    logs.mkdir()
    codes = {"broken_s1": 2, "stopped_s0": 75, "early_s0": 2, "waiting_s0": None, "done_s0": 0}
    for name, code in codes.items():
        (logs / f"noise60_{name}.log").write_text("start\n 50%|##  |\r100%|####|\nerror: no such file\n\n")
        if code is not None:
            (logs / f"noise60_{name}.log.code").write_text(f"{code}\n")
    runs = {run.row: run for run in find_runs([tmp_path, tmp_path / "noise60"])}
    found = {row: (run.state, run.note, run.seed) for row, run in runs.items()}
    assert found == {
        "done": ("finished", "", 0),
        "half": ("unfinished", "2 of 3 epochs", 0),
        "broken": ("failed", "1 of 3 epochs; exit code 2: error: no such file", 1),
        "stopped": ("unfinished", "1 of 3 epochs", 0),
        "folds60/teacher0": ("trained", "no test list", 0),
        "empty": ("never started", "args.json is damaged", 3),
        "early": ("failed", "before it began; exit code 2: error: no such file", 0),
        "waiting": ("never started", "", 0),
    }
    assert len(find_runs([tmp_path, tmp_path])) == len(runs)


def test_a_run_at_work_is_seen_without_touching_its_lock(tmp_path):
    folder = write_run(tmp_path, "noise60/now_s0", epochs=1)
    (folder / ".lock").write_text("")
    assert find_runs([tmp_path])[0].state == "unfinished"
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(folder / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "1\n"
        assert find_runs([tmp_path])[0].state == "running"
        process.communicate("\n")


def test_two_networks_show_the_better_one(tmp_path):
    folder = write_run(tmp_path, "noise60/co_teaching_s0", epochs=0)
    rows = [
        {"epoch": 0, "valid_a_bf": 0.1, "valid_b_bf": 0.2, "valid_a_score": 0.5, "valid_b_score": 0.4},
        {"epoch": 1, "valid_a_bf": 0.3, "valid_b_bf": 0.4, "valid_a_score": 0.5, "valid_b_score": 0.6},
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run,) = find_runs([tmp_path])
    assert run.series("valid_bf") == {0: 0.1, 1: 0.4} and run.best_epoch() == 1


def test_several_sweeps_are_kept_apart(tmp_path):
    for sweep, bf in (("part9", 0.5), ("part10", 0.7)):
        write_run(tmp_path / sweep, "noise60/no_weight_s0", bf)
        write_run(tmp_path / sweep, "noise60/kd_bf_s0", bf + 0.1)
    table = report.main(report.Args([str(tmp_path / "part9"), str(tmp_path / "part10")], out=str(tmp_path / "both")))
    assert table["sweep"].tolist() == ["part9", "part9", "part10", "part10"]
    assert table["BF"].to_numpy() == pytest.approx([0.5, 0.6, 0.7, 0.8])
    assert table["difference"].dropna().to_numpy() == pytest.approx([0.1, 0.1])
    assert "| part10 | 60 | kd_bf |" in (tmp_path / "both/table.md").read_text()


@pytest.mark.parametrize("name", ["noise", "noise3"])
def test_a_sweep_may_be_called_noise(name, tmp_path):
    write_run(tmp_path, f"{name}/teacher", 0.9)
    write_run(tmp_path, f"{name}/noise60-polygon-0.7/kd_bf_s0", 0.8)
    (tmp_path / name / "logs").mkdir(exist_ok=True)
    found = frame_of(find_runs([tmp_path / name]))
    assert set(found["sweep"]) == {""} and dict(zip(found["row"], found["noise"], strict=True)) == {
        "teacher": "",
        "kd_bf": "noise60-polygon-0.7",
    }
    assert set(report.summary(found)["noise"]) == {"", "60 polygon-0.7"}


def test_nothing_finished_one_epoch_and_no_runs(tmp_path):
    write_run(tmp_path / "a", "noise60/kd_bf_s0", epochs=1)
    write_run(tmp_path / "a", "noise60/no_weight_s0", epochs=0)
    assert report.main(report.Args([str(tmp_path / "a")])).empty
    page = (tmp_path / "a/report.html").read_text()
    assert "No run has been tested yet" in page and "1 of 3 epochs" in page and "0 of 3 epochs" in page
    assert (tmp_path / "a/plots/learning_curves-noise60.png").exists()
    (tmp_path / "b").mkdir()
    with pytest.raises(InputError, match="no run folder there"):
        report.main(report.Args([str(tmp_path / "b")]))
    with pytest.raises(InputError, match=r"--baseline kd: no such row; there are kd_bf, no_weight"):
        report.main(report.Args([str(tmp_path / "a")], baseline="kd"))


def test_files_of_somebody_else_stay(tmp_path):
    write_run(tmp_path, "noise60/kd_bf_s0", 0.5)
    (tmp_path / "report.html").write_text("my own page")
    with pytest.raises(InputError, match=r"report\.html: exists and was not written by this tool"):
        report.main(report.Args([str(tmp_path)]))
    assert (tmp_path / "report.html").read_text() == "my own page" and not (tmp_path / "table.md").exists()
    (tmp_path / "report.html").unlink()
    for name in ("table.csv", "table.md"):
        (tmp_path / name).write_text("my,own,table\n")
        with pytest.raises(InputError, match=rf"{name}: exists and was not written by this tool"):
            report.main(report.Args([str(tmp_path)]))
        assert (tmp_path / name).read_text() == "my,own,table\n"
        (tmp_path / name).unlink()
    report.main(report.Args([str(tmp_path)]))
    report.main(report.Args([str(tmp_path)]))  # its own files are replaced
    (tmp_path / "plots/mine.png").write_bytes(b"own")
    with pytest.raises(InputError, match=r"mine\.png: exists"):
        report.main(report.Args([str(tmp_path)]))


def test_a_page_holds_everything_and_names_are_text(tmp_path):
    folder = write_run(tmp_path, f"noise60/{HOSTILE.replace('/', '_')}_s0", 0.5, note=HOSTILE)
    (folder / "pictures").mkdir()
    for epoch in (9, 10):
        cv2.imwrite(str(folder / f"pictures/epoch_{epoch}.png"), np.full((20, 30), epoch, np.uint8))
    (folder / "pictures/epoch_11.png").write_bytes(b"")
    report.main(report.Args([str(tmp_path)]))
    page = (tmp_path / "report.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    assert "<script" not in (tmp_path / "table.md").read_text()
    # pictures are inside; links lead to folders beside the page
    assert all(address.startswith("data:") for address in re.findall(r'(?:src|srcset)="([^"]*)"', page))
    links = re.findall(r'<a href="([^"#]+)"', page)
    assert links and not any(re.match(r"[a-z]+:|/", link) for link in links)
    assert "\\|$x ü" in (tmp_path / "table.md").read_text()


def test_figures_are_the_same_from_one_process_and_from_several(tmp_path):
    write_run(tmp_path, "noise60/kd_bf_s0", 0.5)
    draw = partial(schedules, find_runs([tmp_path]))
    (alone,) = rendered([draw])
    assert list(rendered([draw] * 3, workers=2)) == [alone] * 3
    assert alone[0] != alone[1] and alone[2].startswith(b"\x89PNG")


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_the_page_in_a_browser(tmp_path, width, dark):
    write_sweep(tmp_path)
    write_run(tmp_path, f"noise60/{HOSTILE.replace('/', '_')}_s0", 0.5)
    folder = write_run(tmp_path, "noise60/long_name_" + 60 * "x" + "_s0", epochs=1)
    (folder / "pictures").mkdir()
    cv2.imwrite(str(folder / "pictures/epoch_0.png"), np.zeros((300, 2000, 3), np.uint8))
    report.main(report.Args([str(tmp_path)]))
    with open_page(tmp_path / "report.html", width, 900, dark) as driver:
        pictures = driver.execute_script("return document.images.length")
        assert pictures >= 7 and broken_pictures(driver) == []
        assert overflow(driver) <= 0 and addresses(driver) == []
        shown = driver.execute_script("return document.querySelector('img.drawn').currentSrc.slice(26)")
        half = driver.execute_script("return document.querySelector('source').srcset.slice(26)")
        assert (shown == half) == dark
        sort_by(driver, "#table", 6)
        scores = [float(re.sub(r"★| ± .*", "", cell)) for cell in column(driver, "#table", 6)]
        assert scores == sorted(scores, reverse=True) and len(scores) == 9
        sort_by(driver, "#table", 6)
        assert column(driver, "#table", 6)[0].startswith("0.500")
        sort_by(driver, "#run_table", 3)
        assert column(driver, "#run_table", 3)[0].endswith("unfinished")
        assert console_errors(driver) == []
