"""Predictions that keep to the classes of an image: evaluate.py, predict.py, predict_mask.py."""

import json
import sys
from types import ModuleType
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from test_evaluate import make_list, scores
from test_predict import checkpoint, expected, photograph, run

from utils import dense_crf, predict_mask
from utils.args import parse
from utils.checkpoint import load_network, read_checkpoint, write_checkpoint
from utils.class_scores import confusion
from utils.dense_crf import refine
from utils.errors import InputError
from utils.images import read_image, read_mask, resize_image, resize_mask, write_mask
from utils.inference import Plan, Probabilities, predict_probability, to_probability
from utils.lists import image_labels, read_list

HOW = [{}, {"scales": (0.5, 1.0), "flip": True}, {"mode": "slide", "size": 0, "window": 24, "flip": True}]


class Fixed(torch.nn.Module):
    """Logits of three classes that are the same everywhere."""

    def __init__(self, *logits):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(logits))

    def forward(self, image):
        return self.logits.view(1, -1, 1, 1).expand(len(image), -1, *image.shape[2:])


def masks(*words, root):
    predict_mask.main(parse(predict_mask.Args, [*map(str, words), "--cpu", "--data-root", str(root)]))


@pytest.mark.parametrize("how", HOW)
def test_probabilities_of_absent_classes_are_0_however_large_their_logits(how):
    image, present = np.zeros((40, 30, 3), np.uint8), np.array([True, True, False])
    plan = Plan(**({"size": 16} | how))
    net = Probabilities([Fixed(1.0, 2.0, 500.0)]).eval()
    found = predict_probability(net, image, plan, present)
    assert np.allclose(found[0], 1 / (1 + np.e), atol=1e-6) and not found[2].any()
    assert predict_probability(net, image, plan)[2].min() > 0.999


def test_binary_masks_keep_to_their_classes_too(tmp_path):
    net, path = checkpoint(tmp_path / "run/best.pt"), make_list(tmp_path)
    frame = read_list(path)
    frame["label"] = ["0", "1", "0 1", "1 0"]
    frame.drop(columns="line").to_csv(path, index=False)
    found = scores(tmp_path, net, "--list", path, "--data-root", tmp_path, "--image-labels")
    total = 0
    for i, row in enumerate(frame.itertuples()):
        mask = read_mask(tmp_path / row.filename)
        pred = (expected(net, tmp_path / row.img)[0] > 0.5).astype(np.uint8)
        total = total + confusion(np.full_like(pred, i) if i < 2 else pred, mask, 2)
    assert found["confusion"] == total.tolist()


def test_masks_of_the_classes_of_an_image_over_scales_and_mirrored(tmp_path):
    net, path = checkpoint(tmp_path / "run/best.pt", classes=4), make_list(tmp_path, 4)
    frame = read_list(path)
    frame["label"] = ["0 3", "1", "0 1 2 3", "2 0"]
    frame.drop(columns=["line", "filename"]).to_csv(tmp_path / "weak.csv", index=False)
    words = ["--list", tmp_path / "weak.csv", "--checkpoint", net, "--image-labels", "--out", tmp_path / "m"]
    masks(*words, "--scales", "0.5", "1", "--flip", root=tmp_path)
    present, network = image_labels(frame, 4, path), load_network(net)[0].eval()
    for i, row in enumerate(frame.itertuples()):
        found = read_mask(tmp_path / f"m/{i}.png", 4)
        assert set(np.unique(found)) <= set(map(int, row.label.split()))
        maps = []
        for size in (16, 32):
            image = torch.from_numpy(resized(tmp_path / row.img, size))[None].permute(0, 3, 1, 2)
            held = torch.from_numpy(present[i : i + 1])
            with torch.inference_mode():
                both = to_probability(network(image), held), to_probability(network(image.flip(3)).flip(3), held)
            maps.append(torch.nn.functional.interpolate(sum(both) / 2, (32, 32), mode="bilinear"))
        whole = predict_mask.to_mask((sum(maps) / 2)[0].numpy(), found.shape)
        assert (whole == found).mean() > 0.999


def resized(path, size):
    return resize_image(read_image(path), size)


def test_true_masks_stand_before_written_ones(tmp_path, capsys):
    net, path = checkpoint(tmp_path / "run/best.pt", classes=3), make_list(tmp_path, 3)
    frame = read_list(path).drop(columns="line")
    frame[:1].to_csv(tmp_path / "strong.csv", index=False)
    frame[1:].drop(columns="filename").to_csv(tmp_path / "weak.csv", index=False)
    words = ["--list", tmp_path / "weak.csv", "--checkpoint", net, "--image-labels", "--out", tmp_path / "m"]
    masks(*words, "--true-masks", tmp_path / "strong.csv", root=tmp_path)
    joined = read_list(tmp_path / "m_with_true.csv")
    assert joined.img.tolist() == frame.img.tolist() and joined.pseudo.tolist() == ["0", "1", "1", "1"]
    assert joined.filename.tolist() == [frame.filename[0], "m/1.png", "m/2.png", "m/3.png"]
    written = (tmp_path / "m/1.png").stat().st_mtime_ns
    masks(*words, "--true-masks", tmp_path / "strong.csv", root=tmp_path)
    assert "already" in capsys.readouterr().out and (tmp_path / "m/1.png").stat().st_mtime_ns == written
    pd.read_csv(tmp_path / "weak.csv").assign(label="0").to_csv(tmp_path / "weak.csv", index=False)
    masks(*words, "--true-masks", tmp_path / "strong.csv", root=tmp_path)  # other labels, other masks
    assert not read_mask(tmp_path / "m/1.png", 3).any()
    with pytest.raises(InputError, match=r"weak\.csv: 1 bad row: line 3: list/2\.png has a mask there"):
        frame[2:3].to_csv(tmp_path / "strong.csv", index=False)
        masks(*words, "--true-masks", tmp_path / "strong.csv", root=tmp_path)


MISTAKES = {
    "class": ("img,label\nlist/0.png,0 3\n", "line 2: label 0 3"),
    "empty": ("img,label\nlist/0.png,0\nlist/1.png,\n", "line 3: empty cell"),
    "column": ("img\nlist/0.png\n", "no column `label`"),
    "scale": ("img,label\nlist/0.png,0\n", "--scales 1.0 0.0: must lie between", "--scales", "1", "0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named_before_a_mask_is_written(mistake, tmp_path):
    text, said, *flags = MISTAKES[mistake]
    net, _ = checkpoint(tmp_path / "run/best.pt", classes=3), make_list(tmp_path, 3)
    (tmp_path / "weak.csv").write_text(text)
    words = ["--list", tmp_path / "weak.csv", "--checkpoint", net, "--image-labels", "--out", tmp_path / "m"]
    with pytest.raises(InputError, match=said):
        masks(*words, *flags, root=tmp_path)
    assert not (tmp_path / "m").exists()


def test_predict_keeps_to_the_classes_of_a_list_and_notices_other_ones(tmp_path):
    net, path = checkpoint(tmp_path / "run/best.pt", classes=3), make_list(tmp_path, 3)
    frame = read_list(path).drop(columns="line")
    for label in ("1", "0 2"):
        frame.assign(label=label).to_csv(path, index=False)
        run(net, path, "--data-root", tmp_path, "--image-labels", "--out", tmp_path / "out")
        found = {int(v) for i in range(4) for v in np.unique(read_mask(tmp_path / f"out/{i}.png", 3))}
        assert found == set(map(int, label.split()))
    with pytest.raises(InputError, match=r"--image-labels: .*a\.png is no list"):
        run(net, photograph(tmp_path / "a.png"), "--image-labels", "--out", tmp_path / "out")


def test_predict_refuses_two_labels_of_an_image(tmp_path):
    net, path = checkpoint(tmp_path / "run/best.pt", classes=3), make_list(tmp_path, 3)
    frame = read_list(path).drop(columns="line")
    frame.assign(label="0 1").to_csv(path, index=False)
    frame[1:3].assign(label=["1 0", "2"]).to_csv(tmp_path / "other.csv", index=False)
    with pytest.raises(
        InputError, match=r"other\.csv: 1 bad row: line 3: list/2\.png has other .*list\.csv line 4\. Corr"
    ):
        run(net, path, tmp_path / "other.csv", "--data-root", tmp_path, "--image-labels", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_labels_that_lack_a_class_of_the_mask_are_counted(tmp_path, capsys):
    net, path = checkpoint(tmp_path / "run/best.pt", classes=3), make_list(tmp_path, 3)
    frame = read_list(path).drop(columns="line")
    held = [sorted(set(np.unique(read_mask(tmp_path / name, 3))) - {255}) for name in frame.filename]
    for lacking in (0, 2):
        labels = [" ".join(map(str, one[i < lacking :])) for i, one in enumerate(held)]
        frame.assign(label=labels).to_csv(path, index=False)
        scores(tmp_path, net, "--list", path, "--data-root", tmp_path, "--image-labels")
        out, said = capsys.readouterr()
        assert "own size, with image-level classes\n" in out
        assert ("2 of 4 images have masks with classes that their label lacks" in said) == (lacking > 0)
        assert ("label lacks" in said) == (lacking > 0)


def test_either_network_of_two_can_be_used(tmp_path):
    first, second = (checkpoint(tmp_path / f"{seed}/best.pt", classes=3, seed=seed) for seed in range(2))
    states = [read_checkpoint(path) for path in (first, second)]
    both = {"models": [s["models"][0] for s in states], "nets": [s["nets"][0] for s in states], "net": 1, "side": 40}
    write_checkpoint(tmp_path / "both.pt", both)
    path = make_list(tmp_path, 3)
    words = ["--list", path, "--data-root", tmp_path]
    for flags, alone in (([], second), (["--net", "0"], first), (["--net", "1"], second)):
        found = scores(tmp_path, tmp_path / "both.pt", *words, *flags)
        assert found["confusion"] == scores(tmp_path, alone, *words)["confusion"]
        out = tmp_path / f"m{len(flags)}{alone.parent.name}"
        masks("--list", path, "--checkpoint", tmp_path / "both.pt", "--out", out, *flags, root=tmp_path)
        pred = expected(alone, tmp_path / "list/0.png", mode="resize").argmax(0)
        assert (read_mask(out / "0.png", 3) == pred).mean() > 0.999
    with pytest.raises(InputError, match=r"--net 2: .*both\.pt has 2, counted from 0"):
        scores(tmp_path, tmp_path / "both.pt", *words, "--net", "2")


def test_like_training_tests_with_the_classes_of_masks_where_the_run_did(tmp_path, capsys):
    """A network that says class 1 before 2 before 0, everywhere."""
    net, path = checkpoint(tmp_path / "run/best.pt", classes=3, size=16), make_list(tmp_path, 3)
    state = read_checkpoint(net)
    state["nets"][0]["net.head.weight"].zero_()
    state["nets"][0]["net.head.bias"].copy_(torch.tensor([0.0, 9.0, 5.0]))
    write_checkpoint(net, state)
    frame = read_list(path)
    drawn = [read_mask(tmp_path / name, 3) for name in frame.filename]
    for i, mask in enumerate(drawn):
        mask[(mask == 1) & (i % 2 == 0)] = 0
        write_mask(tmp_path / frame.filename[i], mask, 3)
    shown = [resize_mask(mask, 16) for mask in drawn]
    known = sum((mask != 255).sum() for mask in shown)
    for flags, says in (({"weak_csv": "weak.csv"}, (2, 1, 2, 1)), ({}, (1, 1, 1, 1))):
        (tmp_path / "run/args.json").write_text(json.dumps({"batch_size": 4, "size": 16, "classes": 3} | flags))
        found = scores(tmp_path, net, "--list", path, "--data-root", tmp_path, "--like-training")
        right = sum((mask == says[i]).sum() for i, mask in enumerate(shown))
        assert found["scores"]["accuracy"] == pytest.approx(right / known)
        assert (found["image_labels"], found["image_labels_of"]) == ((True, "masks") if flags else (False, None))
        assert ("with image-level classes, those of their masks" in capsys.readouterr().out) == bool(flags)


# dense CRF


class Recorder:
    """Stands in for the library: notes what it is told, and gives back the probabilities behind the unary energies."""

    calls: ClassVar = []

    def __init__(self, width, height, labels):
        self.calls.append(("size", (width, height, labels)))

    def setUnaryEnergy(self, unary):
        assert unary.dtype == np.float32 and unary.flags.c_contiguous
        self.unary = unary

    def addPairwiseGaussian(self, **how):
        self.calls.append(("gaussian", how))

    def addPairwiseBilateral(self, rgbim, **how):
        assert rgbim.flags.c_contiguous and rgbim.dtype == np.uint8
        self.calls.append(("bilateral", how | {"image": rgbim.shape}))

    def inference(self, steps):
        self.calls.append(("steps", steps))
        return np.exp(-self.unary)


@pytest.fixture
def crf(monkeypatch):
    package, module = ModuleType("pydensecrf"), ModuleType("pydensecrf.densecrf")
    module.DenseCRF2D, package.densecrf = Recorder, module
    Recorder.calls.clear()
    monkeypatch.setitem(sys.modules, "pydensecrf", package)
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", module)


def test_crf_sees_present_classes_with_the_released_settings(crf):
    probability = np.random.default_rng(0).dirichlet(np.ones(3), (4, 6)).transpose(2, 0, 1).astype(np.float32)
    every = np.insert(probability, 1, 0, axis=0)  # of four classes one is not in the image
    found = refine(every, np.zeros((4, 6, 3), np.uint8)[:, ::-1])
    assert np.allclose(found, every, atol=1e-5) and not found[1].any()
    assert Recorder.calls == [
        ("size", (6, 4, 3)),
        ("gaussian", {"sxy": 3, "compat": 3}),
        ("bilateral", {"sxy": 32, "srgb": 13, "compat": 10, "image": (4, 6, 3)}),
        ("steps", 1),
    ]
    Recorder.calls.clear()
    binary = refine(probability[:1], np.zeros((4, 6, 3), np.uint8))
    assert np.allclose(binary, probability[:1], atol=1e-5) and Recorder.calls[0] == ("size", (6, 4, 2))
    Recorder.calls.clear()
    alone = np.ones((1, 4, 6), np.float32)
    assert refine(alone, np.zeros((4, 6, 3), np.uint8)) is alone and not Recorder.calls


def test_crf_in_the_tool_and_without_the_library(tmp_path, crf, monkeypatch):
    net, path = checkpoint(tmp_path / "run/best.pt", classes=3), make_list(tmp_path, 3)
    words = ["--list", path, "--checkpoint", net, "--crf"]
    masks(*words, "--out", tmp_path / "m", root=tmp_path)
    shapes = [read_image(tmp_path / name).shape[:2] for name in read_list(path).img]
    assert sorted(how for name, how in Recorder.calls if name == "size") == sorted((w, h, 3) for h, w in shapes)
    masks(*words[:-1], "--out", tmp_path / "plain", root=tmp_path)  # the stand-in changes nothing
    for i in range(4):
        assert np.array_equal(read_mask(tmp_path / f"m/{i}.png", 3), read_mask(tmp_path / f"plain/{i}.png", 3))
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    monkeypatch.delitem(sys.modules, "pydensecrf.densecrf")
    with pytest.raises(InputError, match=r"pydensecrf2 is missing; pip install -r requirements-crf\.txt"):
        masks(*words, "--out", tmp_path / "other", root=tmp_path)
    assert not (tmp_path / "other").exists()
    with pytest.raises(InputError, match="pydensecrf2"):
        dense_crf.check_crf()
