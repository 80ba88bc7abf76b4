"""IEG and L2R on images with labels: noise, probe, views, networks against the original's numbers, and the script."""

import fcntl
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from PIL import Image
from test_ieg import golden
from test_scripts import ROOT, Interrupted, interrupt_after, rows_of, same
from torch.utils.flop_counter import FlopCounterMode

import train_ieg
from utils import policies
from utils.accuracy import accuracy
from utils.args import parse
from utils.checkpoint import read_checkpoint
from utils.class_folders import Pixels
from utils.ema import follow, take_buffers
from utils.errors import InputError
from utils.ieg_args import check_ieg
from utils.interrupt import Paused, stop
from utils.label_noise import COARSE, noisy_labels, per_class_of, split_probe, transition
from utils.labelled import Labelled, centre, open_labelled, read_dataset, shifted, zoomed
from utils.models.classify import build_classifier, decay_groups
from utils.run import Run
from utils.steps import Steps

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """CIFAR-10 in class folders, ten images of a class to train and two to test; a class is a shade of grey."""
    root = tmp_path_factory.mktemp("cifar")
    for part, count in (("train", 10), ("test", 2)):
        for k, name in enumerate(CLASSES):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                rng = np.random.default_rng([k, i, len(part)])
                image = np.clip(25 * k + rng.normal(0, 9, (32, 32, 3)), 0, 255).astype(np.uint8)
                cv2.imwrite(str(root / part / name / f"{i:04d}.png"), image)
    return root


def launch(folder, run_dir, name, *more):
    flags = ["--dataset", "cifar10_uniform_0.4", "--network-name", "small", "--data-root", str(folder), "--cpu"]
    flags += ["--batch-size", "20", "--max-iteration", "8", "--probe-per-class", "2", "--run-dir", str(run_dir)]
    train_ieg.main(parse(train_ieg.Args, [*flags, "--name", name, *more]))
    return read_checkpoint(run_dir / name / "last.pt")["nets"]


def test_noise_is_that_of_the_released_loader():
    g = {name: value.numpy() for name, value in golden("noise").items()}
    for name, kind, ratio, classes in (("T_uniform10_r80", "uniform", 0.8, 10), ("T_asym10_r40", "asymmetric", 0.4, 10),
                                       ("T_uniform100_r40", "uniform", 0.4, 100),
                                       ("T_asym100_r40", "asymmetric", 0.4, 100)):  # fmt: skip
        matrix = transition(kind, ratio, classes)
        assert np.allclose(matrix, g[name], atol=1e-12) and np.allclose(matrix.sum(1), 1)
    assert (g["cifar100_coarse"] == COARSE).all()
    assert (noisy_labels(g["y_clean"], "asymmetric", 0.4, 10, 12345) == g["asym40_seed12345"]).all()
    assert (noisy_labels(g["y_clean"], "uniform", 0.8, 10, 3) == g["unif80_seed3"]).all()
    for classes, ratio, flipped in g["actual_flip_rate_uniform"]:
        assert 1 - transition("uniform", ratio, int(classes))[0, 0] == pytest.approx(flipped)


def test_noise_may_leave_the_true_class_out():
    clean = np.repeat(np.arange(10), 500)
    noisy = noisy_labels(clean, "uniform", 0.5, 10, 0, include_true=False)
    assert (noisy != clean).mean() == pytest.approx(0.5, abs=0.03)
    assert np.bincount(noisy[clean == 3], minlength=10)[[0, 9]].min() > 10
    assert np.diag(transition("uniform", 0.5, 10, include_true=False)) == pytest.approx(0.5)
    assert (noisy_labels(clean, "uniform", 0.0, 10, 0) == clean).all()


def test_probe_is_balanced_interleaved_and_apart():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 30))
    kept, probe = split_probe(labels, 10, 3, 5)
    assert labels[probe].tolist() == [*range(10)] * 3 and len(kept) == 270 and not set(kept) & set(probe)
    again, other = split_probe(labels, 10, 3, 5)[1], split_probe(labels, 10, 3, 6)[1]
    assert (again == probe).all() and (other != probe).any()
    assert [per_class_of(50_000, 10, r) for r in (0.002, 0.0002, 0.0006)] == [10, 1, 3]
    assert per_class_of(50_000, 100, 0.02) == 10
    with pytest.raises(InputError, match=r"--probe-dataset-hold-ratio 0\.001: no image of a class; take 0\.002"):
        per_class_of(50_000, 100, 0.001)
    with pytest.raises(InputError, match="--probe-per-class 30: class 0 has 30 images"):
        split_probe(labels, 10, 30, 0)


@pytest.mark.parametrize(
    "text", ["cifar10", "cifar10_uniform", "mnist_uniform_0.4", "cifar10_uniform_1.4", "cifar10_pair_0.4"]
)
def test_names_of_data_sets(text):
    with pytest.raises(InputError, match=f"--dataset {text}: not a data set with its noise"):
        read_dataset(text)
    assert read_dataset("cifar100_asymmetric_0.4") == ("cifar100", "asymmetric", 0.4)
    assert read_dataset("webvisionmini_5") == ("webvisionmini", "none", 5.0)


def test_policies_are_the_released_ones():
    g = golden_tables()
    for kind in ("cifar", "imagenet"):
        theirs = zip(g[f"{kind}_op"], g[f"{kind}_prob"], g[f"{kind}_level"], strict=True)
        names = g[f"{kind}_ops"]
        expected = [[(str(names[o[k]]), pytest.approx(p[k]), l[k]) for k in (0, 1)] for o, p, l in theirs]  # noqa: E741
        assert policies.POLICIES[kind] == expected
    assert [len(policies.POLICIES[kind]) for kind in ("cifar", "imagenet")] == [95, 25]


def golden_tables():
    return np.load(Path(__file__).parent / "golden/ieg_autoaugment_tables.npz")


def test_operations_do_what_their_levels_say():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)
    image = Image.fromarray(pixels)

    def done(name, level, seed=0):
        return np.asarray(policies.operate(image, name, level, np.random.default_rng(seed)))

    assert (done("Solarize", 0) == pixels).all() and (done("Identity", 9) == pixels).all()
    assert (done("Solarize", 10) == 255 - pixels).all() and (done("Invert", 3) == 255 - pixels).all()
    assert (done("Posterize", 5) == pixels & 0b11000000).all()
    assert np.abs(done("Brightness", 5).astype(int) - pixels).max() <= 1
    for seed in range(3):
        moved = done("TranslateX", 4, seed)
        left, right = (moved[:, 4:] == pixels[:, :-4]).all(), (moved[:, :-4] == pixels[:, 4:]).all()
        assert left != right and (moved[:, :4] if left else moved[:, -4:]).max() == policies.GREY
    assert ((done("Cutout", 8) == policies.GREY).all(2)).sum() >= 64
    assert (np.asarray(policies.cutout(image, 0, rng)) == pixels).all()
    for name in policies.RANDAUGMENT:
        assert done(name, 7).shape == pixels.shape


def test_two_operations_run_the_other_way_for_imagenet():
    """Solarize inverts what is at least 25.6 x level there, and Posterize keeps 0.4 x level bits, at least one."""
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)

    def done(name, level):
        return np.asarray(policies.operate(Image.fromarray(pixels), name, level, np.random.default_rng(0), large=True))

    assert (done("Solarize", 3) == np.where(pixels < 76, pixels, 255 - pixels)).all()
    assert (done("Solarize", 10) == pixels).all() and (done("Solarize", 0) == 255 - pixels).all()
    for level, mask in ((10, 0b11110000), (6, 0b11000000), (2, 0b10000000)):
        assert (done("Posterize", level) == pixels & mask).all()


def test_views():
    rng, image = np.random.default_rng(0), np.random.default_rng(1).integers(1, 256, (32, 32, 3)).astype(np.uint8)
    assert shifted(image, 2, rng, 0).shape == image.shape
    assert {(shifted(image, 0, rng, 0) == image).all() for _ in range(20)} == {True, False}
    large = np.random.default_rng(1).integers(0, 256, (300, 256, 3)).astype(np.uint8)
    assert zoomed(large, rng).shape == centre(large).shape == (224, 224, 3)
    assert (centre(large) == np.asarray(Image.fromarray(large[38:262, 16:240]))).all()  # 256 x 224 / 256 = 224 pixels


def test_samples_do_not_depend_on_what_was_asked_for_before():
    images = Pixels(map(str, range(40)), np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3)).astype(np.uint8))
    truth = np.arange(40) % 10
    for kind in ("autoaug", "randaug"):
        made = [Labelled("x", images, truth, train=True, strong=kind, seed=1) for _ in range(2)]
        for one in made:
            one.probe = Labelled("x", images.some(range(20)), truth[:20], train=True)
            one.epoch = 3
        made[0].__getitems__([7, 9])
        a, b = (one.__getitems__(list(range(10))) for one in made)
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert sorted(a["probe_label"].tolist()) == list(range(10))  # balanced
        assert not torch.equal(a["image"], a["strong"])
        made[1].epoch = 4
        assert not torch.equal(a["image"], made[1].__getitems__(list(range(10)))["image"])


@pytest.mark.parametrize(
    ("name", "classes", "numbers", "norms", "tensors"),
    [("wrn28-10", 10, 36_220_634, 25, 77), ("wrn28-10", 100, 36_278_324, 25, 77), ("resnet29", 10, 840_730, 28, 89),
     ("resnet29", 100, 863_860, 28, 89)],
)  # fmt: skip
def test_networks_have_the_parameters_of_the_original(name, classes, numbers, norms, tensors):
    net = build_classifier(name, classes)
    assert sum(p.numel() for p in net.parameters()) == numbers and len(list(net.parameters())) == tensors
    assert sum(isinstance(layer, torch.nn.BatchNorm2d) for layer in net.modules()) == norms


def test_networks_take_images_as_they_are_read():
    image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    for name in ("resnet29", "resnet50", "small"):
        net = build_classifier(name, 7).eval()
        with torch.inference_mode():
            assert net(image).shape == (2, 7)
            assert torch.equal(net(image), net(image.float()))
    groups = decay_groups(build_classifier("resnet29", 10), "resnet29", 1e-4)
    assert [group["weight_decay"] for group in groups] == [1e-4, 0.0] and len(groups[0]["params"]) == 32
    assert len(decay_groups(build_classifier("small", 10), "small", 1e-4)) == 1
    relus = [sum(block.relu for block in build_classifier("resnet29", 10, on).net.blocks) for on in (False, True)]
    assert relus == [0, 8]


PLAIN = ["--method", "ieg", "--no-relabel", "--no-reweight", "--mix", "none", "--consistency-factor", "0"]


def test_ieg_without_its_parts_is_the_baseline(folder, tmp_path):
    plain = launch(folder, tmp_path, "plain", "--method", "supervised")
    parts = launch(folder, tmp_path, "parts", *PLAIN)
    assert all(map(same, plain, parts))
    assert not same(plain[0], launch(folder, tmp_path, "l2r", "--method", "l2r")[0])


def test_names_of_the_released_flags_are_known():
    flags = ["--dataset", "cifar10_uniform_0", "--meta_stepsize", "0.2", "--cos-t-mul", "2", "--cos_m_mul", "0.8"]
    args = parse(train_ieg.Args, [*flags, "--probe-hold-ratio", "0.004"])
    assert (args.meta_step, args.t_mul, args.m_mul, args.probe_dataset_hold_ratio) == (0.2, 2.0, 0.8, 0.004)


@pytest.mark.parametrize("method", ["supervised", "l2r", "ieg"])
def test_interrupted_between_epochs_and_inside_one_it_ends_on_the_same_bits(method, folder, tmp_path, monkeypatch):
    flags = ["--method", method]
    whole = launch(folder, tmp_path, "whole", *flags)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, 1)
        launch(folder, tmp_path, "parts", *flags)
    step, seen = Steps.step, []

    def asking(self, *args, **how):
        seen.append(1)
        if len(seen) == 2:
            stop.asked = True
        return step(self, *args, **how)

    with monkeypatch.context() as patch, pytest.raises(Paused), stop.listening():
        patch.setattr(Steps, "step", asking)
        launch(folder, tmp_path, "parts", *flags)
    parts = launch(folder, tmp_path, "parts", *flags, "--workers", "1")
    assert all(map(same, whole, parts)) and rows_of(tmp_path / "whole") == rows_of(tmp_path / "parts")


@pytest.mark.parametrize("method", ["supervised", "l2r", "ieg"])
def test_stopped_in_the_evaluation_it_ends_on_the_same_bits(method, folder, tmp_path, monkeypatch):
    flags = ["--method", method, "--first-period", "3"]
    whole = launch(folder, tmp_path, "whole", *flags)

    def asking(*args):
        stop.asked = True
        return accuracy(*args)

    with monkeypatch.context() as patch, pytest.raises(Paused), stop.listening():
        patch.setattr(train_ieg, "accuracy", asking)
        launch(folder, tmp_path, "parts", *flags)
    parts = launch(folder, tmp_path, "parts", *flags)
    assert all(map(same, whole, parts)) and rows_of(tmp_path / "whole") == rows_of(tmp_path / "parts")


def test_what_is_saved_inside_the_first_pass_is_tested_by_its_average(folder, tmp_path, monkeypatch, capsys):
    flags, step, tested = ["--method", "l2r"], Steps.step, []

    def asking(self, *args, **how):
        stop.asked = True
        return step(self, *args, **how)

    def seeing(run, net, loader):
        tested.append({name: value.clone() for name, value in net.state_dict().items()})
        return {"accuracy": 0.0}

    with monkeypatch.context() as patch, pytest.raises(Paused), stop.listening():
        patch.setattr(Steps, "step", asking)
        launch(folder, tmp_path, "a", *flags)
    monkeypatch.setattr("utils.accuracy.accuracy", seeing)
    net, average, _ = launch(folder, tmp_path, "a", *flags, "--eval")
    assert len(tested) == 1 and same(tested[0], average) and not same(tested[0], net)
    with pytest.raises(InputError, match="b: nothing is saved there that could be tested; train first"):
        launch(folder, tmp_path, "b", *flags, "--eval")


def test_what_is_logged_and_written(folder, tmp_path, capsys):
    launch(folder, tmp_path, "a", "--first-period", "3")
    row, last = rows_of(tmp_path / "a")[0], rows_of(tmp_path / "a")[-1]
    for name in ("weight_auroc", "kept_share", "kept_precision", "effective_share", "probe_loss", "pseudo_accuracy",
                 "loss_omega", "loss_lambda", "loss_probe", "loss_mixed", "loss_kl", "zero_weight"):  # fmt: skip
        assert f"train_{name}" in row
    assert row["step"] == 4 and "valid_cycle_end_accuracy" in row and 0 <= last["test_cycle_end_accuracy"] <= 1
    labels, probe = (pd.read_csv(tmp_path / "a" / f"{name}.csv") for name in ("labels", "probe"))
    assert len(labels) == 80 and len(probe) == 20 and not set(labels["img"]) & set(probe["img"])
    assert 0.1 < (labels["label"] != labels["truth"]).mean() < 0.6
    capsys.readouterr()
    launch(folder, tmp_path, "a", "--first-period", "3", "--eval")
    said = capsys.readouterr().out
    assert f"test_accuracy {last['test_accuracy']:.4f}" in said
    assert f"test_cycle_end_accuracy {last['test_cycle_end_accuracy']:.4f}" in said
    assert rows_of(tmp_path / "a")[-1] == last
    frame = labels.assign(label=0)
    frame.to_csv(tmp_path / "a/labels.csv", index=False)
    with pytest.raises(InputError, match="the data have changed since this run began"):
        launch(folder, tmp_path, "a", "--first-period", "3", "--eval")


SETTINGS = ["--compat released --aug-type randaug", "--precision bf16 --meta-grad difference"]
SETTINGS += ["--precision fp16 --true-beta", "--method l2r --meta-step 0 --ema-decay 0", "--mix none --no-reweight"]
SETTINGS += ["--no-relabel --dataset cifar10_asymmetric_0.4", "--method l2r --precision bf16"]
SETTINGS += ["--method l2r --precision fp16"]


@pytest.mark.parametrize("more", SETTINGS)
def test_settings_run(more, folder, tmp_path):
    nets = launch(folder, tmp_path, "a", "--max-iteration", "4", *more.split())
    assert all(value.isfinite().all() for value in nets[0].values())
    if "--ema-decay 0" in more:
        assert same(nets[0], nets[1])
    if "--mix none" in more:
        assert "train_loss_mixed" not in rows_of(tmp_path / "a")[0]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--data-root", "/nowhere"], "--data-root /nowhere: cifar10 is not there .* --download"),
        (["--probe-per-class", "0"], "--method ieg: it needs a probe"),
        (["--dataset", "cifar10_asymmetric"], "not a data set with its noise"),
        (["--ce-factor", "-1"], "--ce-factor -1.0: must be 0 or more"),
        (["--grad-eps-init", "2"], "--grad-eps-init 2.0: must lie between 0 and 1"),
        (["--t-mul", "0.5"], "--t-mul 0.5: must be 1 or more"),
        (["--cos-t-mul", "nan"], "--t-mul nan: must be 1 or more"),
        (["--seed", "-1"], "--seed -1: must be 0 or more"),
        (["--workers", "-5"], "--workers -5: must be -1 or more"),
        (["--weight-decay", "nan"], "--weight-decay nan: must be 0 or more, or -1"),
        (["--weight-decay", "-5"], "--weight-decay -5.0: must be 0 or more, or -1"),
        (["--temperature", "inf"], "--temperature inf: must be a positive number"),
        (["--learning-rate", "inf"], "--learning-rate inf: must be a positive number"),
        (["--test-images", "5"], "--test-images 5: fewer than the 10 classes"),
        (["--train-images", "5"], "--train-images 5: fewer than the 10 classes"),
        (["--dataset", "webvisionmini", "--aug-type", "randaug"], "--aug-type randaug: webvisionmini has"),
        (["--dataset", "webvisionmini"], "train: 10 class folders; 50 are needed"),
    ],
)
def test_mistakes_are_one_line(more, says, folder, tmp_path):
    with pytest.raises(InputError, match=says):
        launch(folder, tmp_path, "a", *more)


def test_webvision_mini_is_read_from_folders_and_zoomed(tmp_path):
    for part, count in (("train", 2), ("val", 1), ("probe", 3)):
        for k in range(51):
            (tmp_path / part / f"n{k:03d}").mkdir(parents=True)
            for i in range(count):
                shade = np.full((20 + k, 40, 3), k, np.uint8)
                cv2.imwrite(str(tmp_path / part / f"n{k:03d}" / f"{i}.png"), shade)
    flags = ["--dataset", "webvisionmini_2", "--data-root", str(tmp_path)]
    train, test, classes = open_labelled(parse(train_ieg.Args, flags))
    assert (classes, len(train), len(test), len(train.probe)) == (50, 100, 50, 100)
    batch = train.__getitems__([0, 99])
    assert batch["image"].shape == batch["strong"].shape == batch["probe"].shape == (2, 224, 224, 3)
    assert batch["image"][1].unique().tolist() == [49] and batch["truth"].tolist() == [0, 49]
    assert (batch["probe"][0, 0, 0, 0] == batch["probe_label"][0]).all()
    assert test.__getitems__([7])["image"].unique().tolist() == [7]


def write_folders(root, part, names, count=1, shape=(8, 8)):
    for name in names:
        (root / part / name).mkdir(parents=True)
        for i in range(count):
            cv2.imwrite(str(root / part / name / f"{i}.png"), np.full((*shape, 3), i, np.uint8))


def opened(root, dataset="cifar10_uniform_0.4", *more):
    return open_labelled(parse(train_ieg.Args, ["--dataset", dataset, "--data-root", str(root), *more]))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            ("test/airplane", "test/zeppelin"),
            "test: lacks airplane and has besides zeppelin; its class folders must be",
        ),
        (("test/airplane", ""), "test: lacks airplane; its class folders must be those of .*train"),
        (("", "train/aardvark"), "test: lacks aardvark; its class folders must be those"),
        (("train/truck/0.png", "train/truck/0.txt"), "train: no image .* in truck; every class needs some"),
        (("test/truck/0.png", "test/truck/0.txt"), "test: no image .* in truck; every class needs some"),
        (("test", ""), "test: lacks airplane, automobile"),
    ],
)
def test_class_folders_are_those_of_the_data_set_in_both_parts(change, says, tmp_path):
    for part in ("train", "test"):
        write_folders(tmp_path, part, CLASSES)
    old, new = change
    if old and new:
        (tmp_path / old).rename(tmp_path / new)
    elif old:
        shutil.rmtree(tmp_path / old)
    else:
        (tmp_path / new).mkdir()
    with pytest.raises(InputError, match=says):
        opened(tmp_path, "cifar10_uniform_0.4", "--method", "supervised", "--probe-per-class", "0")


def test_class_folders_are_as_many_as_the_data_set_has(folder):
    with pytest.raises(InputError, match=r"train: 10 class folders \(airplane.*\); cifar100 has 100"):
        opened(folder, "cifar100_uniform_0.4")


@pytest.mark.parametrize("rename", [lambda k, name: f"{k:02d}", lambda k, name: f"{k}_{name}", lambda k, name: name])
def test_asymmetric_noise_takes_the_classes_in_their_order(rename, tmp_path):
    for part in ("train", "test"):
        write_folders(tmp_path, part, [rename(k, name) for k, name in enumerate(CLASSES)], 2)
    train, _, _ = opened(tmp_path, "cifar10_asymmetric_1", "--probe-per-class", "1")
    assert train.labels.tolist() == [0, 1, 0, 5, 7, 3, 6, 7, 8, 1]
    (tmp_path / "train" / rename(1, "automobile")).rename(tmp_path / "train/car")
    (tmp_path / "test" / rename(1, "automobile")).rename(tmp_path / "test/car")
    with pytest.raises(
        InputError, match=r"asymmetric noise needs class 1 \(automobile\) in this place; name the folders"
    ):
        opened(tmp_path, "cifar10_asymmetric_1", "--probe-per-class", "1")
    assert opened(tmp_path, "cifar10_uniform_1", "--probe-per-class", "1")[2] == 10


@pytest.mark.parametrize(
    ("part", "count", "says"),
    [
        ("probe", 1, "probe/n007: 1 images of the probe, 2 are wanted; --dataset webvisionmini_1"),
        ("probe", 0, "probe: no image .* in n007; every class needs some"),
        ("val", None, "val: lacks n007; every class of train is needed there"),
    ],
)
def test_webvision_has_the_classes_of_train_in_every_part(part, count, says, tmp_path):
    names = [f"n{k:03d}" for k in range(51)]
    for one, images in (("train", 1), ("val", 1), ("probe", 2)):
        write_folders(tmp_path, one, names, images)
    shutil.rmtree(tmp_path / part / "n007")
    if count is not None:
        write_folders(tmp_path, part, ["n007"], count)
    with pytest.raises(InputError, match=says):
        opened(tmp_path, "webvisionmini_2")


def test_the_baseline_without_a_probe_goes_on_and_is_tested(folder, tmp_path, monkeypatch, capsys):
    flags = ["--method", "supervised", "--probe-per-class", "0"]
    whole = launch(folder, tmp_path, "whole", *flags)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, 1)
        launch(folder, tmp_path, "parts", *flags)
    assert all(map(same, whole, launch(folder, tmp_path, "parts", *flags)))
    launch(folder, tmp_path, "parts", *flags, "--eval")
    assert "test_accuracy" in capsys.readouterr().out


def test_torchvision_is_asked_where_there_are_no_folders(tmp_path, monkeypatch):
    asked = []

    def fake(root, train, download):
        asked.append((root, train, download))
        with (root / ".download.lock").open() as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as another run of the sweep would find it
        count = 200 if train else 100
        return SimpleNamespace(data=np.zeros((count, 32, 32, 3), np.uint8), targets=[i % 100 for i in range(count)])

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", fake)
    flags = ["--dataset", "cifar100_asymmetric_1", "--data-root", str(tmp_path), "--download", "--probe-per-class", "1"]
    train, test, classes = open_labelled(parse(train_ieg.Args, flags))
    assert (classes, len(train), len(test)) == (100, 100, 100) and train.noisy.all()
    assert (COARSE[train.labels] == COARSE[train.truth]).all()
    assert asked == [(tmp_path, True, True), (tmp_path, False, True)]


def test_released_average_has_the_running_statistics_of_the_weights(folder, tmp_path):
    net, average, _ = launch(folder, tmp_path, "a", "--compat", "released", "--max-iteration", "4")
    moving = [name for name in net if "running" in name]
    assert moving and all(torch.equal(net[name], average[name]) for name in moving)
    assert not torch.equal(net["net.0.weight"], average["net.0.weight"])
    a, b = torch.nn.BatchNorm2d(2), torch.nn.BatchNorm2d(2)
    b.running_mean += 3
    take_buffers(a, b)
    assert torch.equal(a.running_mean, b.running_mean)


@pytest.mark.parametrize(("method", "behind"), [("supervised", True), ("l2r", False)])
def test_released_average_of_supervised_lags_a_step(method, behind, folder, tmp_path, monkeypatch):
    seen = []

    def seeing(run, average, net, *args, **how):
        seen.append(all(map(torch.equal, average.parameters(), net.parameters())))
        follow(run, average, net, *args, **how)

    monkeypatch.setattr(train_ieg, "follow", seeing)
    launch(folder, tmp_path, "a", "--compat", "released", "--method", method, "--max-iteration", "4")
    assert seen[0] == behind


def test_released_numbers(folder):
    def args(*more):
        found = parse(train_ieg.Args, ["--dataset", "cifar10_uniform_0", "--network-name", *more])
        check_ieg(found)
        return found

    assert args("resnet29").decay == 1e-4 and args("wrn28-10", "--compat", "released").decay == 5e-4
    assert args("resnet29", "--compat", "released").decay == 2e-4
    assert args("resnet29", "--compat", "released", "--weight-decay", "0").decay == 0
    assert [per_class_of(50_000, 10, 0.0006, cut=cut) for cut in (False, True)] == [3, 2]
    flags = ("--data-root", str(folder), "--probe-dataset-hold-ratio", "0.195")
    sizes = [len(open_labelled(args("small", *flags, *more))[0].probe) for more in ([], ["--compat", "released"])]
    assert sizes == [20, 10]


@pytest.mark.parametrize("together", [True, False])
def test_statistics_are_shared_by_gpus_only_where_they_are_wanted(together, monkeypatch):
    class Net(torch.nn.Module):
        def to(self, *where, **how):
            return self

    converted, here = [], SimpleNamespace(device=torch.device("cuda", 0), world=2, args=SimpleNamespace(compile=False))
    monkeypatch.setattr(torch.nn.SyncBatchNorm, "convert_sync_batchnorm", lambda net: converted.append(1) or net)
    monkeypatch.setattr("utils.run.DistributedDataParallel", lambda net, device_ids: net)
    Run.wrap(here, Net(), together=together)
    assert converted == [1] * together


@pytest.mark.slow
def test_memory_of_a_step_is_that_of_a_process_of_its_own(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    speed = importlib.import_module("ieg_speed")
    monkeypatch.setattr(sys, "argv", ["ieg_speed.py", "--network-name", "small", "--batch", "2", "--cpu"])
    assert speed.peak_alone("l2r") > 50 * 2**20
    speed.report({"plain": 100, "l2r": 300}, {}, {"plain": 2**20, "l2r": 3 * 2**20})
    assert "| l2r | 3.00x | 3 |" in capsys.readouterr().out


@pytest.mark.parametrize(("step", "most"), [("l2r", 3.1), ("ieg", 7.8)])
def test_a_step_costs_at_most_so_many_plain_ones(step, most, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    speed = importlib.import_module("ieg_speed")
    how, found = SimpleNamespace(network_name="resnet29", batch=2, size=16, classes=10, precision="fp32"), {}
    for name in ("plain", step):
        work = speed.step_of(how, torch.device("cpu"), speed.PARTS[name])
        with FlopCounterMode(display=False) as counter:
            work()
        found[name] = counter.get_total_flops()
    assert 1 < found[step] / found["plain"] <= most


@pytest.mark.slow
def test_two_processes_train_one_network(folder, tmp_path):
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "train_ieg.py"), "--cpu"]
    words += ["--dataset", "cifar10_uniform_0.4", "--network-name", "small", "--data-root", str(folder)]
    words += ["--name", "two", "--batch-size", "10", "--max-iteration", "8"]
    words += ["--probe-per-class", "2", "--run-dir", str(tmp_path)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert rows_of(tmp_path / "two")[-1]["split"] == "test" and rows_of(tmp_path / "two")[0]["step"] == 4


def test_labels_that_are_right_come_to_weigh_more(tmp_path):
    """Ten drawn pictures in noise, 60 % of the labels drawn anew: after 75 steps the probe tells which."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(40, 216, (10, 8, 8, 3)).repeat(4, 1).repeat(4, 2)
    for part, count in (("train", 50), ("test", 1)):
        for k, name in enumerate(CLASSES):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                image = np.clip(pictures[k] + rng.normal(0, 30, (32, 32, 3)), 0, 255).astype(np.uint8)
                cv2.imwrite(str(tmp_path / part / name / f"{i:04d}.png"), image)
    flags = ["--dataset", "cifar10_uniform_0.6", "--method", "l2r", "--batch-size", "32", "--max-iteration", "75"]
    launch(tmp_path, tmp_path, "run", *flags, "--probe-per-class", "2")
    rows = rows_of(tmp_path / "run")
    assert rows[-2]["train_weight_auroc"] > 0.7 and rows[-2]["train_weight_clean"] > rows[-2]["train_weight_noisy"]
