"""Teacher masks, weight lists, the table: from files to files."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import test_scripts
import torch

from utils import get_weight, lists, predict_mask, prepare_data, report
from utils.args import parse
from utils.checkpoint import image_keys, load_network
from utils.errors import InputError
from utils.images import read_mask, write_mask
from utils.lists import read_list
from utils.scores import pair_scores
from utils.teachers import who_predicts

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"


def predict(tiny, out, *words):
    predict_mask.main(
        parse(predict_mask.Args, ["--data-root", str(tiny), "--out", str(out), "--cpu", *map(str, words)])
    )


def weigh(tiny, out, *words, csv="noisy.csv"):
    words = ["--list", str(tiny / csv), "--out", str(out), "--data-root", str(tiny), *map(str, words)]
    return get_weight.main(parse(get_weight.Args, words))


@pytest.fixture(scope="module")
def teacher(tiny, tmp_path_factory):
    """A teacher trained on the validation images, so that it saw none of the training list."""
    runs = tmp_path_factory.mktemp("runs")
    flags = ["--train_csv", "valid.csv", "--test_csv", "", "--epochs", "20", "--size", "32", "--optimizer", "adamw"]
    test_scripts.launch("train_without_weight.py", tiny, runs, "teacher", *flags, "-l", "1e-2", "--clip-value", "0")
    return runs / "teacher/last.pt"


def test_masks_and_weights_from_a_checkpoint(tiny, teacher, tmp_path, capsys):
    out = tmp_path / "masks"
    predict(tiny, out, "--list", tiny / "noisy.csv", "--checkpoint", teacher, "--trusted")
    assert read_mask(out / "000.png").shape == (32, 32)
    listed = read_list(f"{out}.csv")
    capsys.readouterr()
    weigh(tiny, tmp_path, "--teacher", out, "--name", "t")
    assert "warning" not in capsys.readouterr().err
    got = read_list(tmp_path / "noisy_t_weight_bfscore.csv", ("img", "filename", "weight"))
    assert got["img"].tolist() == listed["img"].tolist() == read_list(tiny / "noisy.csv")["img"].tolist()
    for i in (0, 5, 12):
        own = pair_scores(read_mask(out / f"{i:03d}.png"), read_mask(tiny / got["filename"][i]))
        assert got["weight"][i] == pytest.approx(own["bf"], abs=1e-7)
        assert float(got["miou"][i]) == pytest.approx(own["miou"], abs=1e-7)
    capsys.readouterr()
    weigh(tiny, tmp_path, "--teacher", out, "--name", "t")
    assert "weights are there already" in capsys.readouterr().out
    weigh(tiny, tmp_path, "--teacher", out, "--name", "t", "--theta", 3)
    assert "already" not in capsys.readouterr().out
    weigh(tiny, tmp_path, "--teacher", out, "--name", "t")
    bm = read_list(tmp_path / "noisy_t_weight_bmscore.csv", ("weight",))["weight"]
    assert np.allclose(bm, (got["bf"].astype(float) + got["miou"].astype(float)) / 2, atol=1e-7)


def test_predicting_again_does_nothing_and_a_lost_mask_is_made_again(tiny, teacher, tmp_path, capsys):
    words = ["--list", tiny / "noisy.csv", "--checkpoint", teacher]
    predict(tiny, tmp_path / "m", *words)
    before = (tmp_path / "m/003.png").stat().st_mtime_ns
    predict(tiny, tmp_path / "m", *words)
    assert "are there already" in capsys.readouterr().out
    assert (tmp_path / "m/003.png").stat().st_mtime_ns == before
    (tmp_path / "m/004.png").unlink()
    predict(tiny, tmp_path / "m", *words)
    assert (tmp_path / "m/004.png").exists()


def test_masks_do_not_depend_on_the_batch(tiny, teacher, tmp_path):
    for size in (1, 7):
        predict(tiny, tmp_path / str(size), "--list", tiny / "noisy.csv", "--checkpoint", teacher, "--batch-size", size)
    for i in range(13):
        a, b = (read_mask(tmp_path / s / f"{i:03d}.png") for s in "17")
        assert (a != b).mean() < 0.002  # a logit of about 0 may fall on either side


def test_teacher_that_saw_the_list_is_called_a_leak(tiny, teacher, tmp_path, capsys):
    predict(tiny, tmp_path / "m", "--list", tiny / "valid.csv", "--checkpoint", teacher)
    assert "warning: 5 of 5 images trained the teacher itself" in capsys.readouterr().err


def test_a_trusted_list_is_compared_with_what_trained_the_teacher(tiny, teacher, tmp_path, capsys):
    how = ["--list", tiny / "noisy.csv", "--checkpoint", teacher]
    predict(tiny, tmp_path / "m", *how, "--trusted", tiny / "valid.csv")
    assert json.loads((tmp_path / "m/teacher.json").read_text())["trusted"].startswith(f"{tiny / 'valid.csv'} ")
    assert get_weight.is_trusted(str(tmp_path / "m"))
    assert "warning" not in capsys.readouterr().err
    predict(tiny, tmp_path / "m", *how, "--trusted", tiny / "valid.csv")
    assert "are there already" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"last\.pt: 5 of the 5 images that trained it are not in .*test\.csv"):
        predict(tiny, tmp_path / "n", *how, "--trusted", tiny / "test.csv")
    with pytest.raises(InputError, match=r"valid\.csv: 5 bad rows: line 2: image/013\.png trained the teacher"):
        predict(
            tiny, tmp_path / "n", "--checkpoint", teacher, "--list", tiny / "valid.csv", "--trusted", tiny / "valid.csv"
        )
    with pytest.raises(InputError, match="no such file"):
        predict(tiny, tmp_path / "n", *how, "--trusted", tiny / "lost.csv")
    assert not (tmp_path / "n").exists()


def test_a_checkpoint_that_names_no_images_cannot_be_compared(tiny, teacher, tmp_path):
    state = torch.load(teacher, weights_only=True)
    del state["images"]
    torch.save(state, tmp_path / "old.pt")
    with pytest.raises(InputError, match="does not say which images"):
        how = ["--list", tiny / "noisy.csv", "--trusted", tiny / "valid.csv"]
        predict(tiny, tmp_path / "n", "--checkpoint", tmp_path / "old.pt", *how)


def test_folds_predict_only_what_they_never_saw(tiny, tmp_path):
    prepare_data.cut_folds(prepare_data.FoldsArgs(str(tiny / "noisy.csv"), out=str(tmp_path / "folds"), k=2))
    checkpoints = []
    for k in range(2):
        flags = ["--train_csv", str(tmp_path / f"folds/fold{k}_train.csv"), "--test_csv", "", "--epochs", "1"]
        test_scripts.launch("train_without_weight.py", tiny, tmp_path / "runs", f"t{k}", *flags)
        checkpoints.append(tmp_path / f"runs/t{k}/last.pt")
    frame = read_list(tiny / "noisy.csv")
    nets_states = [load_network(path)[1] for path in checkpoints]
    args = parse(predict_mask.Args, ["--list", "x", "--out", "o", "--folds", "2", "--checkpoint", "a", "b"])
    use = who_predicts(frame, nets_states, args)
    assert (use.sum(1) == 1).all()
    for k in range(2):
        held = set(read_list(tmp_path / f"folds/fold{k}_held_out.csv")["img"])
        assert set(frame["img"][use[:, k]]) == held
    both = [checkpoints[0], checkpoints[0]]
    with pytest.raises(InputError, match="every teacher was trained on"):
        predict(tiny, tmp_path / "m", "--list", tiny / "noisy.csv", "--folds", 2, "--checkpoint", *both)


def test_probabilities_of_several_checkpoints_are_averaged(tiny, teacher, tmp_path):
    predict(tiny, tmp_path / "one", "--list", tiny / "noisy.csv", "--checkpoint", teacher)
    predict(tiny, tmp_path / "two", "--list", tiny / "noisy.csv", "--checkpoint", teacher, teacher)
    assert all(
        (read_mask(tmp_path / "one" / f"{i:03d}.png") == read_mask(tmp_path / "two" / f"{i:03d}.png")).all()
        for i in range(13)
    )


def test_chosen_one_of_two_different_networks_predicts(tiny, tmp_path):
    flags = ["--epochs", "1", "--arch2", "Linknet", "--encoder2", "resnet18", "--test_csv", "", "--size", "32"]
    test_scripts.launch("train_co_teaching.py", tiny, tmp_path, "two", *flags)
    state = load_network(tmp_path / "two/last.pt")[1]
    assert [model["arch"] for model in state["models"]] == ["PlainUNet", "Linknet"]
    assert state["model"] == state["models"][state["net"]]
    predict(tiny, tmp_path / "m", "--list", tiny / "noisy.csv", "--checkpoint", tmp_path / "two/last.pt")


def test_probabilities_are_enlarged_before_they_are_cut():
    probability = np.array([[[0.0, 1.0]]], np.float32)
    assert predict_mask.to_mask(probability, (1, 8))[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert predict_mask.to_mask(np.stack([probability[0], 1 - probability[0]]), (1, 2))[0].tolist() == [1, 0]


def test_biased_teacher_is_warned_about(tiny, tmp_path, capsys):
    weigh(tiny, tmp_path, "--teacher", tiny / "mask")
    assert "learns that error" in capsys.readouterr().err


def test_perfect_teacher_gives_weight_1_and_shares_average(tiny, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for i in range(13):
        write_mask(empty / f"{i:03d}.png", np.zeros((32, 32), np.uint8))
    weigh(tiny, tmp_path, "--teacher", tiny / "mask", "--score", "bf", "iou", "dice", "--name", "same")
    weigh(tiny, tmp_path, "--teacher", tiny / "mask", empty, "--share", 3, 1, "--score", "bf", "--name", "mixed")
    for score in ("bf", "iou", "dice"):
        assert (read_list(tmp_path / f"noisy_same_weight_{score}score.csv")["weight"] == 1).all()
    assert np.allclose(read_list(tmp_path / "noisy_mixed_weight_bfscore.csv")["weight"], 0.75)


def test_teacher_list_is_joined_by_image(tiny, tmp_path):
    frame = read_list(tiny / "noisy.csv")[["img", "filename"]]
    frame[::-1].to_csv(tmp_path / "masks.csv", index=False)
    weigh(tiny, tmp_path, "--teacher", tmp_path / "masks.csv", "--score", "bf", "--name", "x")
    assert (read_list(tmp_path / "noisy_x_weight_bfscore.csv")["weight"] == 1).all()


def test_missing_and_ill_sized_teacher_masks_name_the_row(tiny, tmp_path):
    with pytest.raises(InputError, match=r"13 bad rows: line 2: .*000\.png: no such file"):
        weigh(tiny, tmp_path, "--teacher", tmp_path)
    for i in range(13):
        write_mask(tmp_path / f"{i:03d}.png", np.zeros((30, 32), np.uint8))
    with pytest.raises(InputError, match="have different sizes: 32x32 and 32x30"):
        weigh(tiny, tmp_path, "--teacher", tmp_path)


@pytest.mark.parametrize(
    ("score", "auroc", "noisy_share", "size"),
    [("miou", 0.8124, 0.580, 4432), ("bf", 0.9889, 0.046, 1860), ("bm", 0.9734, 0.443, 3999)],
)
def test_report_of_the_published_weights(score, auroc, noisy_share, size):
    saved = np.load(GOLDEN / "nlkd_split.npz")
    noisy = dict(zip(saved["noise_ids"].tolist(), saved["noise_iterations"].tolist(), strict=True))
    flags = np.array([noisy[i] > 0 for i in saved["train_ids"].tolist()])
    miou, bf = saved["train_weight_miou"].astype(float), saved["train_weight_bf"].astype(float)
    found = get_weight.weight_report({"miou": miou, "bf": bf, "bm": (miou + bf) / 2}[score], flags)
    assert found["auroc"] == pytest.approx(auroc, abs=5e-5)
    assert found["noisy_share"] == pytest.approx(noisy_share, abs=5e-4)
    assert found["effective_size"] == pytest.approx(size, abs=0.6)


def test_report_says_nothing_of_noise_that_is_not_there():
    assert get_weight.weight_report(np.array([0.1, 0.9]), np.array([False, False])) == {}


def test_several_lists_at_once_have_the_text_of_single_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(lists, "_SLICE", 3)
    frame = pd.DataFrame(
        {
            "img": ["a", 'q"uote', "com,ma", "line\nbreak", "", "ä", "7"],
            "n": [0, -1, 10**12, 3, 4, 5, 6],
            "x": [0.0, 1.0, 1e-8, 1 / 3, np.nan, 0.1, 123456789.125],
            "y": [1e22, 5e-324, -0.0, 0.5, 1e16, 0.00001, 0.0001],
        }
    )
    files = {tmp_path / "new/one.csv": {"img": "img", "w": "x", "n": "n"}, tmp_path / "two.csv": {"y": "y", "w": "x"}}
    lists.write_lists({c: frame[c].tolist() if c == "img" else frame[c].to_numpy() for c in frame}, files)
    for path, columns in files.items():
        lists.write_list(frame[list(columns.values())].set_axis(list(columns), axis=1), tmp_path / "alone.csv")
        assert path.read_bytes() == (tmp_path / "alone.csv").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone.csv", "new", "two.csv"]


@pytest.mark.parametrize(
    "img",
    ["a.b", "x/a.tar.gz", "a", ".a", "x/.a", "..a", ".a.b", "a.", "a..", "a/", "a.b/", "a/.", "a/..", "/a.b", "a b.c"],
)
def test_stem_is_that_of_the_path(img):
    assert lists.stem_of(img) == Path(img).stem


def test_image_keys_know_an_image_by_its_stem_however_its_path_is_spelt():
    keys = image_keys(["x/a.png", "./x/../x/a.png", "/abs/x/a.jpg", "x/b.png"])
    assert keys[0] == keys[1] == keys[2] != keys[3]


def test_folds_refuse_images_that_no_teacher_was_trained_on(tiny, teacher, tmp_path):
    words = ["--list", tiny / "noisy.csv", "--folds", 2, "--checkpoint", teacher, teacher]
    with pytest.raises(InputError, match="13 bad rows: line 2: no teacher was trained on"):
        predict(tiny, tmp_path / "m", *words)


def test_masks_never_replace_files_of_somebody_else(tiny, teacher, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    write_mask(own / "004.png", np.zeros((2, 2), np.uint8))
    with pytest.raises(InputError, match=r"004\.png: exists and was not written by this tool"):
        predict(tiny, own, "--list", tiny / "noisy.csv", "--checkpoint", teacher)
    copy = tmp_path / "list.csv"
    copy.write_text((tiny / "noisy.csv").read_text())
    with pytest.raises(InputError, match=r"list\.csv: exists and was not written"):
        predict(tiny, tmp_path / "list", "--list", copy, "--checkpoint", teacher)
    assert copy.read_text() == (tiny / "noisy.csv").read_text()


def write_run(root, name, seed, bf, finished=True):
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"seed": seed, "epochs": 3}))
    env = {"commit": "0123456789abcdef", "dirty": False, "torch": "2.x", "device": "cpu"}
    (folder / "env.json").write_text(json.dumps(env))
    rows = [{"epoch": 0}] + [
        {"split": "test", "test_iou": 0.5, "test_miou": 0.5, "test_dice": 0.5, "test_bf": bf}
    ] * finished
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_table_means_deviations_and_closed_gap(tmp_path, capsys):
    for seed, (low, method, high) in enumerate([(0.5, 0.8, 0.9), (0.6, 0.7, 1.0)]):
        write_run(tmp_path, f"noise60/no_weight_s{seed}", seed, low)
        write_run(tmp_path, f"noise60/kd_bf_s{seed}", seed, method)
        write_run(tmp_path, f"noise0/clean_s{seed}", seed, high)
    write_run(tmp_path, "noise60/decoupling_s0", 0, 0.1, finished=False)
    table = report.main(report.Args([str(tmp_path)])).set_index("row")
    assert table.index.tolist() == ["clean", "no_weight", "kd_bf"]
    assert table.loc["kd_bf", "BF"] == pytest.approx(0.75) and table.loc["kd_bf", "seeds"] == 2
    assert table.loc["kd_bf", "BF std"] == pytest.approx(np.std([0.8, 0.7], ddof=1))
    assert table.loc["kd_bf", "closed"] == pytest.approx((0.75 - 0.55) / (0.95 - 0.55))
    text = (tmp_path / "table.md").read_text()
    assert "| 60 | kd_bf | 0.500 ± 0.000 | 0.500 ± 0.000 | 0.500 ± 0.000 | 0.750 ± 0.071 | 50% | 2 |" in text
    assert "not finished: noise60/decoupling, seed 0: 1 of 3 epochs" in text
    assert pd.read_csv(tmp_path / "table.csv")["row"].tolist() == table.index.tolist()


@pytest.mark.parametrize(
    "tool", ["predict_mask", "get_weight", "audit", "report", "prepare_data", "add_noise", "generate_noisy_label"]
)
def test_tools_run_as_files_from_anywhere(tool, tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / f"utils/{tool}.py"), "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and "Run" in done.stdout


def test_table_goes_into_a_block_of_a_page(tmp_path):
    write_run(tmp_path, "noise60/no_weight_s0", 0, 0.5)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a -->\nold\n<!-- /a -->\nafter\n")
    report.main(report.Args([str(tmp_path)], page=str(page), block="a"))
    text = page.read_text()
    assert text.startswith("before\n<!-- a -->\n| noise %") and text.endswith("<!-- /a -->\nafter\n")
    assert "old" not in text and "commit 0123456789, torch 2.x, cpu" in text
    with pytest.raises(InputError, match="no block <!-- b -->"):
        report.main(report.Args([str(tmp_path)], page=str(page), block="b"))


def test_teachers_of_folds_are_no_rows_and_no_folder_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no run folder there"):
        report.main(report.Args([str(tmp_path)]))
    write_run(tmp_path, "folds60/teacher0", 0, 0.5, finished=False)
    (tmp_path / "folds60/teacher0/args.json").write_text(json.dumps({"seed": 0, "epochs": 1, "test_csv": ""}))
    assert report.main(report.Args([str(tmp_path)])).empty
    assert (tmp_path / "table.md").read_text().startswith("no tested runs")
