"""evaluate.py: against scikit-learn on the same predictions, the run's own log, and arrays from the original code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import test_scripts
import torch
import torch.nn.functional as F
from sklearn.metrics import confusion_matrix, jaccard_score
from test_predict import checkpoint, expected, photograph
from torch import nn

import evaluate
from utils import class_scores
from utils.args import launch, parse
from utils.checkpoint import image_keys, read_checkpoint, write_checkpoint
from utils.class_scores import areas_of, class_table, confusion, format_table, mean_scores, read_names
from utils.errors import InputError
from utils.images import read_mask, write_mask
from utils.inference import Plan, axis_windows, predict_probability
from utils.lists import image_labels, read_list
from utils.metrics import sample_scores

ROOT = Path(__file__).parents[1]
GOLDEN = np.load(Path(__file__).parent / "golden/u2pl_eval.npz")


def run(*words):
    evaluate.main(parse(evaluate.Args, [*map(str, words), "--cpu"]))


def scores(folder, *words):
    run(*words, "--json", folder / "scores.json")
    return json.loads((folder / "scores.json").read_text())


def make_list(root, classes=1, count=4, name="list"):
    """Photographs of several sizes with blocks of classes for masks, and their list."""
    rows = []
    for i in range(count):
        rng = np.random.default_rng(i)
        height, width = 40 + 3 * i, 60 - 5 * i
        photograph(root / f"{name}/{i}.png", height, width, seed=i)
        small = rng.integers(0, max(classes, 2), (4, 5), dtype=np.uint8)
        mask = cv2.resize(small, (width, height), interpolation=cv2.INTER_NEAREST)
        if classes > 1:
            mask[:3] = 255
        (root / "masks").mkdir(exist_ok=True)
        write_mask(root / f"masks/{name}{i}.png", mask, classes)
        present = [str(label) for label in np.unique(mask) if label != 255]
        rows.append((f"{name}/{i}.png", f"masks/{name}{i}.png", " ".join(present)))
    pd.DataFrame(rows, columns=["img", "filename", "label"]).to_csv(root / f"{name}.csv", index=False)
    return root / f"{name}.csv"


def by_hand(net, path, root, classes, present=None, **plan):
    """(pred, mask) of every row, from single predictions."""
    pairs = []
    for i, row in enumerate(read_list(path).itertuples()):
        p = expected(net, root / row.img, None if present is None else present[i], **plan)
        pairs.append((p[0] > 0.5 if classes == 1 else p.argmax(0), read_mask(root / row.filename, classes)))
    return pairs


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("flags", [[], ["--mode", "slide", "--size", "0", "--window", "24", "--flip"], ["--size", "0"]])
def test_scores_are_those_of_scikit_learn_on_the_same_predictions(tmp_path, classes, flags, capsys):
    net, path = checkpoint(tmp_path / "run/best.pt", classes=classes), make_list(tmp_path, classes)
    found = scores(tmp_path, net, "--list", path, "--data-root", tmp_path, "--csv", tmp_path / "each.csv", *flags)
    plan = {"mode": "slide", "size": 0, "window": 24, "flip": True} if "--flip" in flags else {"size": 0}
    pairs = by_hand(net, path, tmp_path, classes, **(plan if flags else {}))
    pred, mask = (np.concatenate([m.ravel() for m in some]) for some in zip(*pairs, strict=True))
    known, labels = mask != 255, range(max(classes, 2))
    each = jaccard_score(mask[known], pred[known], labels=labels, average=None)
    assert np.allclose([row["iou"] for row in found["classes"]], each, atol=1e-12)
    assert found["confusion"] == confusion_matrix(mask[known], pred[known], labels=labels).tolist()
    assert found["scores"]["miou"] == pytest.approx(each.mean(), abs=1e-12)
    assert found["scores"]["accuracy"] == pytest.approx((pred == mask)[known].mean(), abs=1e-12)
    recall = [(pred[mask == k] == k).mean() for k in labels]
    assert found["scores"]["class_accuracy"] == pytest.approx(np.mean(recall), abs=1e-12)
    single = [sample_scores(*(torch.from_numpy(m.astype(np.uint8))[None] for m in pair), classes) for pair in pairs]
    table = pd.read_csv(tmp_path / "each.csv")
    for key in ("dice", "bf"):
        values = [float(one[key]) for one in single]
        assert found["scores"][key] == pytest.approx(np.mean(values), abs=1e-6)
        assert np.allclose(table[key], values, atol=1e-6)
    assert table["img"].tolist() == [f"list/{i}.png" for i in range(4)]
    assert table["pixels"].tolist() == [int((m != 255).sum()) for _, m in pairs]
    assert ("iou" in found["scores"]) == (classes == 1) and "4 images at their own size" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["train_without_weight.py", "train_co_teaching.py"])
def test_like_training_gives_the_logged_test_line_bit_for_bit(tiny, tmp_path, script):
    more = ["--epochs", "2", "--batch-size", "3", "--theta", "3"]
    test_scripts.launch(script, tiny, tmp_path, "run", *more)
    logged = test_scripts.rows_of(tmp_path / "run")[-1]
    words = ["--list", tiny / "test.csv", "--data-root", tiny, "--like-training"]
    found = scores(tmp_path, tmp_path / "run/best.pt", *words)
    for key in ("iou", "miou", "dice", "bf", "score"):
        assert found["scores"][key] == logged[f"test_{key}"]
    assert found["classes"][1]["iou"] == pytest.approx(logged["test_iou"], abs=1e-12)


def test_like_training_of_several_classes_with_bfloat16(tiny, tmp_path):
    lists = ["--train_csv", "classes.csv", "--valid_csv", "classes_valid.csv", "--test_csv", "classes_test.csv"]
    rows = [(f"image/{i:03d}.png", f"classes/{i:03d}.png") for i in range(18, 22)]
    pd.DataFrame(rows, columns=["img", "filename"]).to_csv(tiny / "classes_test.csv", index=False)
    flags = ["--classes", "3", "--precision", "bf16", "--epochs", "1", "--size", "0", *lists]
    test_scripts.launch("train_without_weight.py", tiny, tmp_path, "run", *flags)
    logged = test_scripts.rows_of(tmp_path / "run")[-1]
    words = [tmp_path / "run/best.pt", "--list", tiny / "classes_test.csv", "--data-root", tiny]
    found = scores(tmp_path, *words, "--like-training")
    assert all(found["scores"][key] == logged[f"test_{key}"] for key in ("iou", "miou", "dice", "bf", "score"))
    own = scores(tmp_path, *words, "--precision", "bf16")  # nothing was resized: the same predictions
    assert own["scores"]["miou"] == pytest.approx(logged["test_miou"], abs=0.02)


def test_image_level_labels_restrict_what_is_predicted(tmp_path):
    net, path = checkpoint(tmp_path / "run/best.pt", classes=4), make_list(tmp_path, 4)
    frame = read_list(path)
    frame["label"] = ["0 3", "1", "0 1 2 3", "2 0"]
    frame.drop(columns="line").to_csv(path, index=False)
    words = [net, "--list", path, "--data-root", tmp_path]
    free, bound = scores(tmp_path, *words), scores(tmp_path, *words, "--image-labels")
    present = image_labels(frame, 4, path)
    assert present.tolist() == [[1, 0, 0, 1], [0, 1, 0, 0], [1, 1, 1, 1], [1, 0, 1, 0]]
    pairs = by_hand(net, path, tmp_path, 4, present)
    total = sum(confusion(pred.astype(np.uint8), mask, 4) for pred, mask in pairs)
    assert bound["confusion"] == total.tolist() != free["confusion"]
    assert set(np.unique(pairs[1][0])) == {1} and set(np.unique(pairs[3][0])) == {0, 2}


def test_several_checkpoints_scales_and_mirrors_are_averaged(tmp_path):
    nets = [checkpoint(tmp_path / f"{seed}/best.pt", classes=3, seed=seed) for seed in range(2)]
    path = make_list(tmp_path, 3)
    words = ["--scales", "0.5", "1", "--flip", "--batch-size", "3"]
    found = scores(tmp_path, nets[0], "--more", nets[1], "--list", path, "--data-root", tmp_path, *words)
    total = 0
    for row in read_list(path).itertuples():
        both = [expected(net, tmp_path / row.img, scales=(0.5, 1.0), flip=True) for net in nets]
        pred = np.mean(both, axis=0).argmax(0).astype(np.uint8)
        total = total + confusion(pred, read_mask(tmp_path / row.filename, 3), 3)
    difference = np.abs(np.array(found["confusion"]) - total).sum()
    assert difference <= 4  # pixels on the edge between two classes, by rounding


def test_two_processes_count_every_image_once(tmp_path):
    net, path = checkpoint(tmp_path / "run/best.pt", classes=3), make_list(tmp_path, 3, count=5)
    words = [str(net), "--list", str(path), "--data-root", str(tmp_path), "--cpu", "--batch-size", "1"]
    one = scores(tmp_path, *words[:-3], "--batch-size", "1")
    there = ["--json", str(tmp_path / "two.json"), "--csv", str(tmp_path / "two.csv")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, "evaluate.py", *words, *there], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "two.json").read_text()) == one
    assert len(pd.read_csv(tmp_path / "two.csv")) == 5 and done.stdout.count("5 images") == 1


def test_counts_are_those_of_the_original_code():
    total = 0
    for pred, mask in zip(GOLDEN["pred"].astype(np.uint8), GOLDEN["target"].astype(np.uint8), strict=True):
        total = total + confusion(pred, mask, 5)
    areas = areas_of(total)
    assert (areas[0] == GOLDEN["inter"]).all() and (areas[2] == GOLDEN["tgt"]).all()
    assert (areas[1] + areas[2] - areas[0] == GOLDEN["union"]).all()
    assert mean_scores(areas)["miou"] == pytest.approx(float(GOLDEN["miou"]), abs=1e-12)


class Original(nn.Module):
    """The golden network: a convolution of stride 2, enlarged; its logits moved into [0, 1], as means allow."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.conv.weight.data, self.conv.bias.data = (torch.from_numpy(GOLDEN[f"conv_{x}"]) for x in "wb")

    def forward(self, image):
        logits = F.interpolate(self.conv(image), image.shape[2:], mode="bilinear", align_corners=True)
        return (logits + 10) / 20


def test_windows_and_whole_images_are_those_of_the_original_code():
    image = np.ascontiguousarray(GOLDEN["image"][0].transpose(1, 2, 0))
    slide = Plan(size=0, mode="slide", window=24, overlap=1 / 3, blend="count", batch_size=3)
    for plan, wanted in ((slide, "slide_out"), (Plan(size=0), "whole_out")):
        found = predict_probability(Original(), image, plan) * 20 - 10
        assert np.abs(found - GOLDEN[wanted]).max() < 2e-5


@pytest.mark.parametrize(
    ("length", "window", "overlap", "starts"),
    [(1024, 769, 1 / 3, [0, 255]), (2048, 769, 0.333, [0, 513, 1026, 1279]), (40, 24, 1 / 3, [0, 16])]
    + [(57, 24, 1 / 3, [0, 16, 32, 33]), (20, 24, 1 / 3, [0]), (48, 24, 0, [0, 24])],
)
def test_published_windows_stand_where_the_papers_put_them(length, window, overlap, starts):
    found, weights = axis_windows(length, window, overlap, "count")
    assert found.tolist() == starts
    total = np.zeros(length)
    for start, weight in zip(found, weights, strict=True):
        total[start : start + len(weight)] += weight
    assert np.allclose(total, 1)


def test_confusion_counts_pixels_in_pieces(monkeypatch):
    rng = np.random.default_rng(0)
    pred, mask = rng.integers(0, 200, (2, 31, 17)).astype(np.uint8)
    mask[rng.random(mask.shape) < 0.2] = 255
    monkeypatch.setattr(class_scores, "_CHUNK", 50)
    known = mask != 255
    assert (confusion(pred, mask, 200) == confusion_matrix(mask[known], pred[known], labels=range(200))).all()


def test_classes_that_do_not_occur_count_nowhere_and_show_a_dash():
    #               class 0, 1, 2 (only predicted), 3 (nowhere)
    areas = np.array([[6, 2, 0, 0], [8, 2, 2, 0], [8, 4, 0, 0]])
    table = class_table(areas, ["sky", "sea", "sun", "moon"])
    assert np.allclose(table["iou"][:3], [6 / 10, 2 / 4, 0]) and np.isnan(table["iou"][3])
    assert np.allclose(table["accuracy"][:2], [6 / 8, 2 / 4]) and table["accuracy"][2:].isna().all()
    assert np.allclose(table["precision"][:3], [6 / 8, 1, 0]) and np.allclose(table["dice"][:2], [12 / 16, 4 / 6])
    found = mean_scores(areas)
    assert found == pytest.approx({"miou": (0.6 + 0.5 + 0) / 3, "accuracy": 8 / 12, "class_accuracy": 0.625})
    lines = format_table(table).splitlines()
    assert lines[1].split() == ["0", "sky", "60.00", "75.00", "75.00", "75.00", "66.67"]
    assert lines[4].split() == ["3", "moon", "-", "-", "-", "-", "0.00"]
    assert mean_scores(np.zeros((3, 2)))["miou"] == 1


def test_names_of_classes(tmp_path, capsys):
    (tmp_path / "names.txt").write_text("sky\nsea\n\nsun\n")
    (tmp_path / "names.csv").write_text("index,name,group\n0,sky,0\n1,sea,0\n2,sun,1\n")
    assert read_names(tmp_path / "names.txt", 3) == read_names(tmp_path / "names.csv", 3) == ["sky", "sea", "sun"]
    net, path = checkpoint(tmp_path / "run/best.pt", classes=3), make_list(tmp_path, 3)
    run(net, "--list", path, "--data-root", tmp_path, "--names", tmp_path / "names.csv")
    assert "1 sea" in capsys.readouterr().out
    (tmp_path / "mixed.csv").write_text("index,name\n1,sky\n0,sea\n2,sun\n")
    with pytest.raises(InputError, match="not 0, 1, 2"):
        read_names(tmp_path / "mixed.csv", 3)
    with pytest.raises(InputError, match="3 names, but the checkpoint has 4"):
        read_names(tmp_path / "names.txt", 4)


def test_training_images_are_pointed_out(tmp_path, capsys):
    net, path = checkpoint(tmp_path / "run/best.pt"), make_list(tmp_path)
    write_checkpoint(net, read_checkpoint(net) | {"images": image_keys(["elsewhere/2.jpg", "7.png"])})
    run(net, "--list", path, "--data-root", tmp_path)
    assert "1 of 4 images have names of training images" in capsys.readouterr().err


MISTAKES = {
    "no list": (["--list", "none.csv"], "none.csv: no such file"),
    "no checkpoint": (["none.pt"], "none.pt: no such checkpoint"),
    "theta": (["--theta", "4"], "--theta 4"),
    "scales": (["--scales", "0"], "--scales"),
    "names": (["--names", "list.csv"], "no column `name`"),
    "more": (["--more", "other/best.pt"], "different classes"),
    "no args.json": (["--like-training"], "args.json: missing"),
    "both": (["--like-training", "--flip", "--theta", "7"], "leave --flip, --theta out"),
    "over the list": (["--csv", "list.csv"], "choose another file"),
    "class": (["--list", "wrong.csv"], "line 3: wrong/1.png: class 7"),
    "size": (["--list", "sizes.csv"], "line 2: list/0.png is 60x40"),
    "binary masks": (["--list", "binary.csv"], "no mask holds a class above 0"),
    "twice": (["--list", "twice.csv"], "is the image of line 2 too"),
    "missing": (["--list", "missing.csv"], "line 3: list/none.png: no such file"),
    "labels": (["--list", "labels.csv", "--image-labels"], "line 4: label 0 3"),
    "no labels": (["--list", "sizes.csv", "--image-labels"], "no column `label`"),
}


def spoil(root):
    frame = read_list(make_list(root, 3)).drop(columns="line")
    checkpoint(root / "other/best.pt", classes=5)
    (root / "wrong").mkdir()
    write_mask(root / "wrong/1.png", np.full((43, 55), 7, np.uint8), 9)
    frame.assign(filename=[frame.filename[0], "wrong/1.png", *frame.filename[2:]]).to_csv("wrong.csv", index=False)
    frame.assign(filename=frame.filename[::-1].tolist()).drop(columns="label").to_csv("sizes.csv", index=False)
    binary = [f"masks/zero{i}.png" for i in range(4)]
    for name, other in zip(binary, frame.filename, strict=True):
        write_mask(root / name, (read_mask(root / other, 3) % 2).astype(np.uint8))
    frame.assign(filename=binary).to_csv("binary.csv", index=False)
    os.symlink("0.png", root / "list/link.png")
    frame.assign(img=[*frame.img[:3], "list/link.png"]).to_csv("twice.csv", index=False)
    frame.assign(img=[frame.img[0], "list/none.png", *frame.img[2:]]).to_csv("missing.csv", index=False)
    frame.assign(label=["0", "1", "0 3", "2"]).to_csv("labels.csv", index=False)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch, mistake):
    monkeypatch.chdir(tmp_path)
    flags, what = MISTAKES[mistake]
    checkpoint(Path("run/best.pt"), classes=3), spoil(tmp_path)
    net = [] if flags[0].endswith(".pt") else ["run/best.pt"]
    words = [*net, *([] if "--list" in flags else ["--list", "list.csv"]), *flags, "--json", "out.json", "--cpu"]
    with pytest.raises(SystemExit) as ended:
        launch(evaluate.main, evaluate.Args, words)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and what in said
    assert not Path("out.json").exists()
