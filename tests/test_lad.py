"""What a label-assisted teacher sees, against arrays of the original code; its stem, its agreement, both scripts."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import write_teacher
from test_scripts import BASE, ROOT, SMALL, launch, rows_of, same

from utils.args import TrainArgs
from utils.checkpoint import load_network, read_checkpoint
from utils.dataset import ListDataset
from utils.distill import Distiller
from utils.errors import InputError
from utils.evaluate import evaluate
from utils.images import write_mask
from utils.lad import LabelArgs, label_map, shown
from utils.losses import per_image_loss
from utils.methods.distillation import channel_wise
from utils.methods.lad import agreement, label_codes, noised_label
from utils.models import build_model, parameters
from utils.models.stdc import BLOCKS, STDCEncoder, conv
from utils.run import Run

TEACHER, STUDENT = "train_lad_teacher.py", "train_lad_student.py"


def golden(name):
    with np.load(Path(__file__).parent / "golden" / f"lad_{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def void_is_255(labels):
    return torch.where(labels < 0, 255, labels).byte()


def some_labels(n=2, classes=5, side=12, seed=0):
    mask = torch.randint(0, classes + 1, (n, side, side), generator=torch.Generator().manual_seed(seed)).byte()
    return torch.where(mask == classes, 255, mask)


# the label map


def test_paintings_are_those_of_the_original_code():
    arrays = golden("noise")
    mask = void_is_255(arrays["targets"])
    for path in range(2):
        label = noised_label(mask, arrays["codes"][path], 0.03, 100, arrays["pixel"][path])
        assert torch.allclose(label[:, 0], arrays[f"teacher_in{path + 1}"][:, 3], atol=5e-5)
    codes = label_codes(mask, 21, "fixed")
    assert torch.allclose(codes[1], arrays["distill_codes"], atol=1e-6)
    label = noised_label(mask, codes, 0.02, 100, arrays["distill_pixel"])
    assert torch.allclose(label[:, 0], arrays["distill_teacher_in"][:, 3], atol=5e-5)


def test_fixed_codes_of_21_classes():
    label = noised_label(
        torch.tensor([[[0, 11, 255]]]).byte(),
        label_codes(torch.zeros(1, 1, 1).byte(), 21, "fixed"),
        0,
        100,
        torch.zeros(1, 1, 1, 3),
    )
    assert label.flatten().tolist() == pytest.approx([-110, 0, 100], abs=1e-4)


@pytest.mark.parametrize("kind", ["gaussian", "grid", "spread", "fixed"])
def test_a_class_is_one_number_and_classes_differ(kind):
    torch.manual_seed(0)
    mask = some_labels()
    codes = label_codes(mask, 5, kind)
    label = noised_label(mask, codes, 0.0, 100, torch.randn(2, 1, 12, 12))
    for n in range(2):
        levels = {int(k): set(label[n, 0][mask[n] == k].tolist()) for k in mask[n].unique()}
        assert all(len(values) == 1 for values in levels.values())
        assert len(set.union(*levels.values())) == len(levels) == 6
    assert torch.equal(codes[0], codes[1]) == (kind == "fixed")


def test_order_of_class_ids_does_not_matter():
    mask = some_labels()
    codes, other = label_codes(mask, 5, "gaussian"), torch.tensor([3, 0, 4, 1, 2])
    renamed = torch.where(mask == 255, 255, other[mask.long().clamp(max=4)]).byte()
    moved = torch.cat([torch.empty(2, 5).scatter(1, other.expand(2, 5), codes[:, :5]), codes[:, 5:]], 1)
    pixels = torch.randn(2, 1, 12, 12)
    assert torch.equal(noised_label(mask, codes, 0.03, 100, pixels), noised_label(renamed, moved, 0.03, 100, pixels))


def test_statistics_of_gaussian_codes():
    torch.manual_seed(0)
    mask = torch.zeros(4000, 1, 2, dtype=torch.uint8)
    codes = label_codes(mask, 3, "gaussian")
    assert codes.mean().abs() < 0.03 and codes.std() == pytest.approx(1, abs=0.03)
    label = noised_label(mask, codes, 0.03, 100, torch.randn(4000, 1, 1, 2))
    assert (label[..., 0] - label[..., 1]).std() == pytest.approx(3 * math.sqrt(2), rel=0.05)
    assert label.std() == pytest.approx(100, rel=0.05)
    ranks = torch.arange(4.0).expand_as(codes)
    assert abs(np.corrcoef(ranks.flatten(), codes.flatten())[0, 1]) < 0.02  # a number does not say which class it is


def test_spread_codes_keep_their_distance_among_the_classes_of_an_image():
    torch.manual_seed(0)
    mask = torch.zeros(200, 4, 4, dtype=torch.uint8)
    mask[:, 1:], mask[:, 2:], mask[:, 3:] = 7, 140, 255
    codes = label_codes(mask, 150, "spread")[:, [0, 7, 140, 150]]
    assert torch.allclose(codes.sort(1).values, torch.tensor([-1.2, -0.4, 0.4, 1.2]).expand(200, 4), atol=1e-6)
    assert {tuple(order) for order in codes.argsort(1).tolist()} == {
        tuple(order) for order in torch.cartesian_prod(*[torch.arange(4)] * 4).tolist() if len(set(order)) == 4
    }
    assert label_codes(torch.zeros(1, 2, 2).byte(), 3, "spread")[0, 0] == -1.2  # one class alone


def test_smoothing_is_a_mean_of_nine():
    mask = torch.zeros(1, 5, 5, dtype=torch.uint8)
    mask[0, 2, 2] = 1
    label = noised_label(mask, torch.tensor([[0.0, 9.0, 0.0]]), 0.0, 1.0, torch.zeros(1, 1, 5, 5), smooth=1)
    assert label[0, 0, 1:4, 1:4].flatten().tolist() == pytest.approx([1.0] * 9) and label[0, 0, 0].eq(0).all()


def test_many_classes_get_codes_that_keep_apart():
    args = type("Args", (LabelArgs,), {"classes": 30})(code_noise=0.0)
    mask = torch.arange(30).view(1, 5, 6).byte()
    levels = label_map(args, mask).flatten().sort().values
    assert levels.diff().min() == pytest.approx(240 / 29, rel=1e-3)


# stem


@pytest.mark.parametrize(
    ("arch", "encoder"), [("PlainUNet", ""), ("Unet", "resnet18"), ("FPN", "mobileone_s0"), ("STDC1", "")]
)
def test_stem_is_widened_and_the_image_goes_through_as_before(arch, encoder):
    torch.manual_seed(0)
    narrow = build_model(arch, encoder, width=4).eval()
    torch.manual_seed(0)
    wide = build_model(arch, encoder, width=4, extra=1).eval()
    widened = 0
    for (name, a), (other, b) in zip(narrow.state_dict().items(), wide.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b if a.shape == b.shape else b[:, :3])
        if a.shape != b.shape:
            widened += 1
            assert b.shape[1] == 4 and b[:, 3].std() == pytest.approx(a.std().item(), rel=0.5)
    assert widened >= 1
    image = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0)).byte()
    with torch.no_grad():
        assert torch.allclose(narrow(image), wide(image), atol=1e-5)
        one, two = wide(image, torch.full((2, 1, 64, 64), 80.0), torch.zeros(2, 1, 64, 64))
    assert torch.equal(two, wide(image)) and not torch.allclose(one, two, atol=1e-5)


@pytest.mark.parametrize(("init", "deviation"), [("released", 0.1), ("zero", 0.0)])
def test_filter_of_the_label_as_asked(init, deviation):
    torch.manual_seed(0)
    net = build_model("Unet", "resnet18", extra=1, extra_init=init)
    assert net.net.encoder.conv1.weight[:, 3].std().item() == pytest.approx(deviation, rel=0.1)


def test_label_is_as_loud_beside_any_normalisation():
    """Between labels and image the ratio of deviations in grey values is kept."""
    for arch in ("PlainUNet", "FPN"):
        net = build_model(arch, "resnet18", width=4, extra=1)
        seen = {}
        net.net.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.update(x=inputs[0]))
        image = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
        image[..., 32:] = 100
        net.eval()(image, image[:, :1].float())
        steps = (seen["x"][..., -1] - seen["x"][..., 0]).mean((0, 2))
        assert steps[3].item() == pytest.approx(steps[:3].mean().item(), rel=0.02)


def test_zero_channel_gives_its_filter_no_gradient():
    net = build_model("PlainUNet", width=4, extra=1)
    net(torch.zeros(2, 3, 16, 16, dtype=torch.uint8)).sum().backward()
    assert net.net.down[0][0].weight.grad[:, 3].eq(0).all()


# networks that no library has


@pytest.mark.parametrize(("arch", "millions"), [("STDC1", 8.44), ("STDC2", 12.47)])
def test_stdc_has_the_published_number_of_parameters(arch, millions):
    classifier = [conv(1024, 1024, 1), torch.nn.Linear(1024, 1024, bias=False), torch.nn.BatchNorm1d(1024)]
    classifier += [torch.nn.Linear(1024, 1000, bias=False)]
    total = parameters(STDCEncoder(BLOCKS[arch])) + sum(map(parameters, classifier))
    assert round(total / 1e6, 2) == millions


@pytest.mark.parametrize("arch", ["FCN", "OCRNet", "STDC1", "PSPNet", "DeepLabV3"])
def test_networks_learn_and_come_back_from_a_checkpoint(arch, tiny, tmp_path):
    flags = ["--arch", arch, "--encoder", "resnet18", "--size", "32", "--epochs", "1", "--learning-rate", "0.01"]
    launch(BASE, tiny, tmp_path, "a", *flags)
    net, about = load_network(tmp_path / "a/last.pt")
    assert about["model"]["arch"] == arch and net.net.requires_divisible_input_shape in (True, False)
    net = build_model(arch, "resnet18", classes=3).train()
    net(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).square().mean().backward()
    assert all(p.grad is not None for p in net.parameters()) or arch == "PSPNet"  # the library's stops at stride 8


# the losses of both stages


def up(logits):
    return F.interpolate(logits, (16, 24), mode="bilinear", align_corners=True)


def test_teacher_and_student_losses_are_those_of_the_original_code():
    """With its auxiliary heads, which this library's networks do not have, put in by hand."""
    arrays = golden("losses")
    mask = void_is_255(arrays["targets"])
    names = ("L1", "A1", "L2", "A2")
    views = [arrays[name].requires_grad_() for name in names]

    def mean(logits):
        every = per_image_loss(up(logits), mask) * (mask != 255).sum((1, 2))
        return every.sum() / (mask != 255).sum()

    ce = [mean(view) for view in views]
    assert torch.stack(ce).double().tolist() == pytest.approx(arrays["ce"].tolist(), rel=1e-5)
    total = ce[0] + 0.4 * ce[1] + ce[2] + 0.4 * ce[3] + 5 * agreement(views[0], views[2], "cwd")
    assert total.item() == pytest.approx(arrays["total"].item(), rel=1e-5)
    for name, slope in zip(names, torch.autograd.grad(total, views), strict=True):
        assert torch.allclose(slope, arrays[f"g{name}"], rtol=1e-3, atol=1e-5)
    student = mean(arrays["SL"]) + 0.02 * mean(arrays["SA"]) + 3 * channel_wise(arrays["SL"], arrays["TL"])
    assert student.item() == pytest.approx(arrays["s_total"].item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["cwd", "dist", "kl"])
def test_agreement_is_symmetric_and_zero_between_equals(kind):
    one, other = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.randn(2, 3, 4, 4)
    assert agreement(one, other, kind).item() == pytest.approx(agreement(other, one, kind).item(), rel=1e-5)
    assert agreement(one, one.clone(), kind).item() == pytest.approx(0, abs=1e-4)


# scripts


@pytest.mark.parametrize(
    ("arch", "stem"), [("PlainUNet", "net.down.0.0.weight"), ("DeepLabV3", "net.encoder.conv1.weight")]
)
def test_teacher_that_is_not_shown_the_label_is_the_baseline(arch, stem, tiny, tmp_path):
    """DeepLabV3 has dropout, whose draws are not those of the label maps."""
    flags = ["--epochs", "2", "--augment", "flip", "--arch", arch, "--encoder", "resnet18"]
    plain = launch(BASE, tiny, tmp_path, "plain", *flags)[0]
    blind = launch(TEACHER, tiny, tmp_path, "blind", *flags, "--code-gain", "0", "--consistency-weight", "0")[0]
    assert torch.equal(plain.pop(stem), blind.pop(stem)[:, :3]) and same(plain, blind)
    rows, other = rows_of(tmp_path / "plain"), rows_of(tmp_path / "blind")
    assert [row["train_loss"] for row in rows[:2]] == [row["train_loss"] for row in other[:2]]
    assert other[0]["valid_iou"] == other[0]["valid_no_label_iou"] == rows[0]["valid_iou"]


def test_teacher_uses_the_label_and_is_judged_with_and_without_it(tiny, tmp_path):
    """Images without content: only the label can tell where the disc is."""
    lists = {}
    (tmp_path / "grey").mkdir()
    for kind in ("train", "valid"):
        frame = pd.read_csv(tiny / f"{kind}.csv")
        frame["filename"] = [str(tiny / name) for name in frame["filename"]]
        frame["img"] = [str(tmp_path / "grey" / Path(name).name) for name in frame["img"]]
        for name in frame["img"]:
            write_mask(Path(name), np.zeros((32, 32), np.uint8))
        frame.to_csv(tmp_path / f"{kind}.csv", index=False)
        lists[kind] = str(tmp_path / f"{kind}.csv")
    words = ["--train_csv", lists["train"], "--valid_csv", lists["valid"], "--test_csv", ""]
    more = ["--size", "32", "--epochs", "15", "--width", "8", "--learning-rate", "0.1", "--code-noise", "0"]
    launch(
        TEACHER, tiny, tmp_path, "a", *words, *more, "--consistency-weight", "0", "--codes", "fixed", "--pictures", "0"
    )
    row = rows_of(tmp_path / "a")[14]
    assert row["valid_iou"] > 0.9 and row["valid_no_label_iou"] < 0.6
    row = rows_of(tmp_path / "a")[-1]
    assert row == {"split": "none"}


def test_consistency_draws_the_two_views_together(tiny, tmp_path):
    flags = ["--epochs", "6", "--learning-rate", "0.1"]
    apart = []
    for weight in ("1e-3", "20"):
        launch(
            TEACHER, tiny, tmp_path, f"by{weight}", *flags, "--consistency-weight", weight, "--consistency-stride", "4"
        )
        apart.append(rows_of(tmp_path / f"by{weight}")[5]["train_consistency"] / float(weight))
    assert apart[1] < 0.5 * apart[0]


@pytest.mark.parametrize(
    "how", ["cwd --codes grid", "dist --codes spread --code-smooth 1", "kl --codes fixed --label-init released"]
)
def test_variants_with_classes_and_void_run(how, tiny, tmp_path):
    lists = ["--classes", "3", "--train_csv", "classes.csv", "--valid_csv", "classes_valid.csv", "--test_csv", ""]
    launch(
        TEACHER, tiny, tmp_path, "t", *lists, "--epochs", "1", "--consistency-loss", *how.split(), "--precision", "bf16"
    )
    row = rows_of(tmp_path / "t")[0]
    assert row["train_consistency"] > 0 and {"valid_miou", "valid_no_label_miou"} <= set(row)


def test_evaluation_with_labels_always_draws_the_same(tiny, tmp_path):
    run = Run(TrainArgs("", "", size=16, batch_size=4, cpu=True, run_dir=str(tmp_path), name="a"))
    args = type("Args", (), vars(LabelArgs()) | vars(run.args))()
    net, _ = load_network(tiny / "lad_teacher.pt")
    loader = run.loader(ListDataset(tiny / "valid.csv", tiny, 16))
    first = evaluate(run, net, loader, shown(args, run.device))
    torch.randn(7)
    assert evaluate(run, net, loader, shown(args, run.device)) == first


def test_student_has_three_channels_or_the_released_four(tiny, tmp_path):
    flags = ["--epochs", "1", "--draws", "2"]
    three = launch(STUDENT, tiny, tmp_path, "three", *flags)[0]
    four = launch(STUDENT, tiny, tmp_path, "four", *flags, "--label-channel", "--weight-decay", "0")[0]
    stem = "net.down.0.0.weight"
    assert three[stem].shape[1] == 3 and four[stem].shape[1] == 4
    net, about = load_network(tmp_path / "four/last.pt")
    assert about["model"]["extra"] == 1
    torch.manual_seed(0)
    start = build_model("PlainUNet", width=4, extra=1)
    assert torch.equal(net.net.down[0][0].weight[:, 3], start.net.down[0][0].weight[:, 3])  # no gradient, no decay


def test_teacher_of_a_student_never_changes_and_averages_its_draws(tiny, tmp_path):
    run = Run(TrainArgs("", "", size=16, cpu=True, run_dir=str(tmp_path), name="a"))
    run.args.distill = "kl"
    teacher, _ = load_network(tiny / "lad_teacher.pt")
    student = build_model("PlainUNet", width=4)
    distil = Distiller(run, student, teacher.requires_grad_(False).eval(), ("PlainUNet", "PlainUNet"))
    image = torch.randint(0, 256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()
    maps = [40 * torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    mean = sum(distil.ask(image, each).sigmoid() for each in maps) / 3
    assert torch.allclose(distil.ask(image, *maps).sigmoid(), mean, atol=1e-5)
    assert same(before, teacher.state_dict()) and not list(distil.parameters())


def test_mistakes_are_one_line(tiny, tmp_path):
    with pytest.raises(InputError, match=r"was not trained with the label as an input; use train_distill\.py"):
        launch(STUDENT, tiny, tmp_path, "a", "--teacher", str(tiny / "teacher.pt"))
    with pytest.raises(InputError, match="--draws 0"):
        launch(STUDENT, tiny, tmp_path, "a", "--draws", "0")
    with pytest.raises(InputError, match="--draws 2: averages predictions, not features"):
        launch(STUDENT, tiny, tmp_path, "a", "--draws", "2", "--distill", "cwd,at")
    with pytest.raises(InputError, match="--code-noise"):
        launch(TEACHER, tiny, tmp_path, "a", "--code-noise", "-1")
    with pytest.raises(InputError, match="--consistency-weight"):
        launch(TEACHER, tiny, tmp_path, "a", "--consistency-stride", "0")
    write_teacher(tmp_path / "three.pt", classes=3, extra=1)
    with pytest.raises(InputError, match="has 3 classes"):
        launch(STUDENT, tiny, tmp_path, "b", "--teacher", str(tmp_path / "three.pt"))


def test_two_processes_train_a_teacher(tiny, tmp_path):
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / TEACHER), *SMALL]
    words += ["--data-root", str(tiny), "--run-dir", str(tmp_path), "--name", "two", "--epochs", "2"]
    words += [f"--{name}_csv={tiny / name}.csv" for name in ("train", "valid", "test")]
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    row = rows_of(tmp_path / "two")[-1]
    assert row["split"] == "test" and "test_no_label_iou" in row
    assert read_checkpoint(tmp_path / "two/last.pt")["models"][0]["extra"] == 1
