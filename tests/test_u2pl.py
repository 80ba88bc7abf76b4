"""U2PL: schedules and losses against the original code, its neutral setting, what it logs, resuming, two processes."""

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import test_resume
import test_scripts
import torch
import torch.nn.functional as F
from kill_and_resume import differences
from test_scripts import BASE, ROOT, SMALL, rows_of, same

from utils.args import parse
from utils.checkpoint import load_network, read_checkpoint
from utils.ema import average_decay, follow, teacher_of
from utils.errors import InputError
from utils.losses import ohem_loss, per_pixel_loss
from utils.methods.u2pl import (
    as_classes,
    confident_loss,
    masked_quantile,
    pseudo_labels,
    rank_window,
    released_split,
    reliable_loss,
    split_pixels,
    unreliable_share,
)
from utils.mixing import cut, draw_mask, mix, rectangles, to_grid
from utils.models import build_model
from utils.models.heads import WithHeads
from utils.optim import rate_factor
from utils.unlabelled import UnlabelledDataset, open_semi

GOLDEN = Path(__file__).parent / "golden"
U2PL = "train_u2pl.py"
FEW = ["--anchors", "6", "--negatives", "8", "--features", "8", "--bank", "40", "--max-keys", "10", "--bank-first", "0"]


def golden(name):
    return {key: torch.from_numpy(array) for key, array in np.load(GOLDEN / f"u2pl_{name}.npz").items()}


def test_entropy_by_hand():
    prob = torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25], [1 / 3] * 3, [0.98, 0.01, 0.01]])
    label, confidence, entropy = pseudo_labels(prob.log()[:, :, None, None])
    assert entropy.flatten().tolist() == pytest.approx([0.80182, 1.08053, 1.09861, 0.11190], abs=1e-5)
    assert label.flatten().tolist() == [0, 0, 0, 0] and torch.allclose(confidence.flatten(), prob.amax(1))
    threshold = masked_quantile(entropy, torch.ones_like(entropy, dtype=torch.bool), 0.8)
    assert threshold.item() == pytest.approx(1.087762, abs=1e-5)
    for share in (0.8, 1.0):
        at = masked_quantile(entropy, torch.ones_like(entropy, dtype=torch.bool), share)
        loss, kept = reliable_loss(torch.zeros(4, 3, 1, 1), label, entropy, at)
        assert loss.item() == pytest.approx(1.464816, abs=1e-5) and kept.flatten().tolist() == [True, True, False, True]


@pytest.mark.parametrize("percent", [80, 90, 100])
def test_unsupervised_loss_of_the_original(percent):
    d = golden("unsup")
    _, _, entropy = pseudo_labels(d["teacher_logits"])
    assert torch.allclose(entropy, d["entropy"], atol=1e-6)
    threshold = masked_quantile(entropy, d["target"] != 255, percent / 100)
    assert threshold.item() == pytest.approx(d[f"p{percent}_thresh"].item(), abs=1e-6)
    logits = d["student_logits"].requires_grad_()
    loss, kept = reliable_loss(logits, d["target"], entropy, threshold)
    loss.backward()
    assert torch.equal(d["target"].masked_fill(~kept, 255), d[f"p{percent}_target_after"])
    assert loss.item() == pytest.approx(d[f"p{percent}_loss"].item(), abs=1e-5)
    assert torch.allclose(logits.grad, d[f"p{percent}_grad"], atol=1e-7)


def test_masked_quantile_is_numpys():
    values, valid = torch.rand(2, 50), torch.rand(2, 50) < 0.7
    for share in (0.0, 0.13, 0.5, 0.999, 1.0):
        assert masked_quantile(values, valid, share).item() == pytest.approx(
            np.percentile(values[valid].numpy(), 100 * share), abs=1e-6
        )
    assert masked_quantile(values, valid & False, 0.5) == float("inf")


@pytest.mark.parametrize("label", [torch.full((1, 2, 2), 255), torch.zeros(1, 2, 2, dtype=torch.int64)])
def test_no_reliable_pixel_is_a_loss_of_zero(label):
    logits, entropy = torch.randn(1, 3, 2, 2, requires_grad=True), torch.ones(1, 2, 2)
    loss, kept = reliable_loss(logits, label, entropy, masked_quantile(entropy, label != 255, 0.8))
    loss.backward()
    assert loss.item() == 0 and not kept.any() and logits.grad.eq(0).all()


def test_masks_and_schedule_of_the_original():
    d = golden("masks")
    entropy = pseudo_labels(d["teacher_logits_u_large"])[2]
    for epoch in (0, 20, 79):
        share = unreliable_share(epoch, 80, 0.2)
        assert 100 * share == pytest.approx(d[f"e{epoch}_high_alpha_t"].item())
        assert 100 * (1 - share) == pytest.approx(d[f"percent_{epoch}"].item())
        split = released_split(d["label_u_aug"], entropy, share)
        assert torch.equal(to_grid(split.reliable, (6, 8)), d[f"e{epoch}_high_low_mask_all"][2:, 0].bool())
        assert torch.equal(to_grid(split.unreliable, (6, 8)), d[f"e{epoch}_high_high_mask_all"][2:, 0].bool())


def test_split_of_the_paper():
    label, entropy = torch.randint(0, 3, (2, 9, 9)), torch.rand(2, 9, 9)
    label[0, 0] = 255
    shares = []
    for share in (0.0, 0.1, 0.3):
        threshold = masked_quantile(entropy, label != 255, 1 - share)
        split = split_pixels(label, entropy, share, threshold)
        assert not (split.reliable & split.unreliable).any() and not (label == 255)[split.reliable].any()
        shares.append(split.unreliable.sum() / (label != 255).sum())
    assert shares[0] == 0 and shares[1:] == pytest.approx([0.1, 0.3], abs=0.01)


def test_confident_loss_counts_what_is_below_the_threshold_as_zero():
    logits, label = torch.randn(1, 3, 1, 4), torch.tensor([[[0, 2, 1, 255]]])
    loss, kept = confident_loss(logits, label, torch.tensor([[[0.96, 0.5, 0.95, 1.0]]]), 0.95)
    each = F.cross_entropy(logits, label.clamp(max=2), reduction="none")[0, 0]
    assert loss.item() == pytest.approx(((each[0] + each[2]) / 3).item()) and kept.sum() == 2


def test_schedules_of_the_original():
    d = golden("sched")
    decays = [average_decay(k, 0.99) for k in range(len(d["ema_decay"]))]
    assert decays == pytest.approx(d["ema_decay"].tolist()) and average_decay(-5, 0.99) == 0
    args = parse(
        test_scripts.TrainArgs, ["--train_csv", "a", "--valid_csv", "b", "--epochs", "4", "--scheduler", "poly"]
    )
    rates = [0.01 * rate_factor(args, i, 25) for i in range(100)]
    assert rates == pytest.approx(d["poly_lr"].tolist())


@pytest.mark.parametrize(("threshold", "kept"), [(0.7, 10), (0.3, 60), (0.7, 200), (0.3, 1), (0.7, 0)])
def test_hard_examples_of_the_original(threshold, kept):
    d = golden("sup")
    logits = d["main"].requires_grad_()
    loss = ohem_loss(logits, d["target"], threshold, kept)
    loss.backward()
    assert loss.item() == pytest.approx(d[f"ohem_t{threshold}_k{kept}_loss"].item(), abs=1e-5)
    assert torch.allclose(logits.grad, d[f"ohem_t{threshold}_k{kept}_grad"], atol=1e-6)


def test_auxiliary_loss_of_the_original():
    d = golden("sup")
    both = [ohem_loss(d[name], d["target"], 0.7, 10) for name in ("main", "aux")]
    assert (both[0] + 0.4 * both[1]).item() == pytest.approx(d["aux_ohem_loss"].item(), abs=1e-5)


def test_mixing_of_the_original():
    d = golden("mix")
    for kind in ("cutmix", "classmix"):
        keep = d[f"{kind}_mask"].bool()
        for name in ("image", "label", "conf"):
            assert torch.equal(mix(d[name], keep), d[f"{kind}_{name}"])
    image, label = cut(d["image"], d["label"], d["cutout_mask"].bool())
    assert torch.equal(image, d["cutout_image"]) and torch.equal(label, d["cutout_label"])


def test_rectangles_cover_half_and_classmix_half_of_the_classes():
    torch.manual_seed(0)
    areas = rectangles(200, 65, 47).float().mean((1, 2))
    assert areas.min() > 0.48 and areas.max() < 0.52
    assert rectangles(3, 1, 1).shape == (3, 1, 1) and rectangles(3, 2, 3).any()
    label = torch.randint(0, 5, (8, 6, 6))
    label[0] = 3
    label[1, :3] = 255
    keep = draw_mask("classmix", label, 5)
    for one, kept in zip(label, keep, strict=True):
        classes = one[one != 255].unique()
        chosen = one[kept].unique()
        assert len(chosen) == len(classes) // 2 and torch.equal(kept, torch.isin(one, chosen))


def test_one_channel_is_two_classes():
    logits, mask = torch.randn(2, 1, 3, 3), torch.randint(0, 2, (2, 3, 3))
    both = as_classes(logits)
    assert torch.allclose(both.softmax(1)[:, 1], logits[:, 0].sigmoid())
    assert torch.allclose(F.cross_entropy(both, mask, reduction="none"), per_pixel_loss(logits, mask), atol=1e-6)


def test_window_of_ranks():
    assert rank_window(21, 0, 20) == (3, 20) and rank_window(2, 0, 20) == (1, 2) and rank_window(19, 5, 20) == (5, 19)


# networks


@pytest.mark.parametrize("size", [32, 50])
@pytest.mark.parametrize("arch", ["PlainUNet", "Unet", "DeepLabV3Plus", "FPN"])
def test_heads_leave_the_network_as_it_is(arch, size):
    net = build_model(arch, "resnet18", classes=3, width=4).eval()
    image = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    plain = net(image)
    both = WithHeads(net, 8, True).eval()
    before = {name: value.clone() for name, value in both.state_dict().items()}
    out = both(image)
    assert torch.equal(out.logits, plain) and both.net.state_dict().keys() == net.state_dict().keys()
    assert out.feature.shape[:2] == (2, 8) and abs(out.feature.shape[2] - size / 4) <= 1
    assert out.auxiliary.shape == plain.shape
    twice = both(image, perturbed=1).logits  # in evaluation nothing is dropped
    assert torch.allclose(twice, plain[[0, 1, 1]], atol=1e-5)
    dropped = both.train()(image, perturbed=1).logits
    assert not torch.allclose(dropped[1], dropped[2])
    both.load_state_dict(before), both.eval()
    teacher = teacher_of(both)
    assert torch.equal(teacher(image).logits, plain) and not any(p.requires_grad for p in teacher.parameters())
    assert torch.equal(both.net(image), plain)  # without its heads it perturbs nothing


class Alone:
    """What `follow` asks of a run."""

    device = torch.device("cpu")

    def share_buffers(self, net):
        pass


@pytest.mark.parametrize("buffers", [True, False])
def test_teacher_follows_parameters_and_statistics(buffers):
    student = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    teacher = teacher_of(student)
    student(torch.randn(5, 2))
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    with torch.no_grad():
        student[0].weight += 1
    follow(Alone(), teacher, student, 0.75, buffers)
    new, goal = teacher.state_dict(), student.state_dict()
    assert torch.allclose(new["0.weight"], before["0.weight"] + 0.25)
    expected = before["1.running_mean"].lerp(goal["1.running_mean"], 0.25 * buffers)
    assert torch.allclose(new["1.running_mean"], expected)
    assert new["1.num_batches_tracked"] == goal["1.num_batches_tracked"] * buffers
    follow(Alone(), teacher, student, 0.0, buffers)
    assert same(teacher.state_dict(), goal)


# lists


def semi(tiny, tmp_path, *more):
    words = ["--train_csv", "few.csv", "--unlabelled_csv", "unlabelled.csv", "--valid_csv", "valid.csv", *more]
    words = [str(tiny / word) if word.endswith(".csv") else word for word in words]
    module = importlib.import_module("train_u2pl")
    return parse(module.Args, [*SMALL, "--data-root", str(tiny), "--run-dir", str(tmp_path), *words])


@pytest.fixture
def few(tiny):
    """A list of the first five of the labelled images."""
    pd.read_csv(tiny / "noisy.csv")[:5].to_csv(tiny / "few.csv", index=False)
    return tiny


def test_pairs_take_every_image_equally_often(few, tmp_path):
    paired = open_semi(semi(few, tmp_path), 1)[0]
    seen = []
    for epoch in range(2):
        paired.epoch = epoch
        batch = paired.__getitems__(list(range(len(paired))))
        counts = torch.bincount(batch["index"], minlength=5)
        assert len(paired) == 13 and counts.sum() == 13 and counts.min() == 2 and counts.max() == 3
        seen.append(paired._rows(np.arange(13))[2])
        assert sorted(seen[-1]) == list(range(13))
    assert (seen[0] != seen[1]).any()


def test_longer_labelled_list_is_cut_anew_every_epoch(few, tmp_path):
    pd.read_csv(few / "unlabelled.csv")[:4].to_csv(few / "four.csv", index=False)
    paired = open_semi(semi(few, tmp_path, "--train_csv", "noisy.csv", "--unlabelled_csv", "four.csv"), 1)[0]
    seen = []
    for epoch in range(6):
        paired.epoch = epoch
        seen.append(tuple(paired._rows(np.arange(4))[0]))
        assert len(set(seen[-1])) == 4
    assert len(set(seen)) > 1


@pytest.mark.parametrize("views", [1, 3])
def test_sample_is_a_function_of_seed_epoch_and_place(few, tmp_path, views):
    paired, again = (open_semi(semi(few, tmp_path), views)[0] for _ in range(2))
    paired.epoch = again.epoch = 3
    batch = paired.__getitems__([7, 2, 11])
    for k, i in enumerate([7, 2, 11]):
        alone = again[i]
        assert all(torch.equal(torch.as_tensor(alone[name]), batch[name][k]) for name in batch)
    again.epoch = 4
    assert not torch.equal(again.__getitems__([7, 2, 11])["weak"], batch["weak"])
    if views == 3:
        assert batch["strong"].shape == (3, 2, 16, 16, 3) and not torch.equal(*batch["strong"][0])


def test_unlabelled_masks_are_unknown_unless_the_list_has_them(few):
    without = UnlabelledDataset(few / "unlabelled.csv", few, 16, 3)
    assert without[0]["mask"].eq(255).all()
    pd.read_csv(few / "noisy.csv")[["img", "filename"]].to_csv(few / "masked.csv", index=False)
    assert set(UnlabelledDataset(few / "masked.csv", few, 16)[0]["mask"].unique().tolist()) <= {0, 1}


def test_test_image_among_the_unlabelled_is_refused(few, tmp_path):
    pd.read_csv(few / "test.csv")[["img"]].to_csv(few / "leak.csv", index=False)
    with pytest.raises(InputError, match=r"leak\.csv.*is also in .*test\.csv"):
        open_semi(semi(few, tmp_path, "--unlabelled_csv", "leak.csv", "--test_csv", "test.csv"), 1)


def test_missing_unlabelled_list_is_said(few, tmp_path):
    with pytest.raises(InputError, match="--unlabelled_csv: name a list"):
        open_semi(semi(few, tmp_path, "--unlabelled_csv", ""), 1)


# the script


def train(few, tmp_path, name, *more):
    return test_scripts.launch(U2PL, few, tmp_path, name, "--train_csv", "few.csv", *FEW, *more)


@pytest.mark.parametrize("weights", [["--preset", "supervised"], ["--unsup-weight", "0", "--contrast-weight", "0"]])
@pytest.mark.parametrize("lists", [["--unlabelled_csv", "unlabelled.csv"], ["--unlabelled_csv", ""]])
def test_without_both_weights_it_is_the_baseline(few, tmp_path, weights, lists):
    flags = ["--epochs", "2", "--augment", "crop"]
    plain = test_scripts.launch(BASE, few, tmp_path, "plain", *flags)
    method = test_scripts.launch(U2PL, few, tmp_path, "method", *flags, *weights, *lists)
    assert len(method) == 1 and same(plain[0], method[0])


@pytest.mark.parametrize("preset", ["u2pl", "u2pl_no_contrast", "cutmix", "mean_teacher", "released"])
@pytest.mark.parametrize("classes", [1, 3])
def test_every_rung_learns_from_unlabelled_images(few, tmp_path, preset, classes):
    lists = ["--train_csv", "classes.csv", "--valid_csv", "classes_valid.csv", "--test_csv", "", "--classes", "3"]
    lists = [] if classes == 1 else lists
    flags = ["--epochs", "3", "--mix-prob", "1", *lists]
    nets = train(few, tmp_path, "rung", *flags, "--preset", preset)
    alone = train(few, tmp_path, "alone", *flags, "--preset", "supervised")
    assert len(nets) == 2 and not same(nets[0], alone[0]) and not same(nets[0], nets[1])
    rows = rows_of(tmp_path / "rung")
    assert "train_loss_unsupervised" not in rows[0] and rows[1]["train_loss_unsupervised"] > 0
    assert ("train_loss_contrast" in rows[2]) == (preset in ("u2pl", "released"))
    if preset in ("u2pl", "released"):
        assert rows[2]["train_anchors"] > 0 and rows[2]["train_bank"] > 0
        assert len(rows[2]["bank_fill"]) == max(2, classes)
    assert ("train_entropy_threshold" in rows[1]) == (preset not in ("cutmix", "mean_teacher"))
    expected = 1.0 if preset in ("cutmix", "mean_teacher") else 1 - rows[2]["alpha"]
    # pixels of equal entropy fall together
    assert expected - 0.1 < rows[2]["train_reliable"] < expected + 0.01


def test_accuracy_of_pseudo_labels_is_logged_where_it_is_known(few, tmp_path):
    train(few, tmp_path, "unknown", "--epochs", "2")
    pd.read_csv(few / "noisy.csv")[["img", "filename"]].to_csv(few / "masked.csv", index=False)
    train(few, tmp_path, "known", "--epochs", "2", "--unlabelled_csv", "masked.csv")
    unknown, known = (rows_of(tmp_path / name)[1] for name in ("unknown", "known"))
    assert "train_pseudo_accuracy" not in unknown and 0 < known["train_pseudo_accuracy"] <= 1
    assert known["train_loss"] == unknown["train_loss"]  # nothing learns from these masks


def test_auxiliary_head_and_hard_examples_train(few, tmp_path):
    flags = ["--epochs", "2", "--arch", "Unet", "--encoder", "resnet18", "--size", "32", "--ohem", "--ohem-kept", "50"]
    train(few, tmp_path, "aux", *flags, "--aux-weight", "0.4")
    state = read_checkpoint(tmp_path / "aux/last.pt")
    assert any(name.startswith("auxiliary") for name in state["heads"][0])


def test_too_few_ranks_are_refused(few, tmp_path):
    with pytest.raises(InputError, match="--rank-low 3 --rank-high 20 with 2 classes"):
        train(few, tmp_path, "ranks", "--rank-low", "3")


def test_the_teacher_is_what_is_tested_and_loaded(few, tmp_path):
    nets = train(few, tmp_path, "run", "--epochs", "2", "--select", "last")
    net, about = load_network(tmp_path / "run/last.pt")
    assert about["net"] == 1 and same(net.state_dict(), nets[1])


def test_teacher_is_the_student_while_it_learns_from_masks_alone(few, tmp_path):
    nets = train(few, tmp_path, "warm", "--epochs", "2", "--warm-epochs", "2")
    assert same(*nets)


@pytest.mark.parametrize("more", [["--precision", "bf16"], ["--accumulate", "2"], ["--preset", "released"]])
def test_stopped_in_an_epoch_it_goes_on_with_banks_and_teacher(few, tmp_path, monkeypatch, more):
    flags = ["--epochs", "3", *more]
    train(few, tmp_path, "whole", *flags)
    with monkeypatch.context() as patch, pytest.raises(test_resume.Paused), test_resume.stop.listening():
        test_resume.ask_at_step(patch, 5)
        train(few, tmp_path, "parts", *flags)
    assert read_checkpoint(tmp_path / "parts/last.pt")["inside"]["step"] in (1, 2)
    train(few, tmp_path, "parts", *flags, "--workers", "1")
    assert not differences(tmp_path / "whole", tmp_path / "parts")


def torchrun(words):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *map(str, words)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def of_two(few, tmp_path, name):
    words = [ROOT / U2PL, *SMALL, "--data-root", few, "--run-dir", tmp_path, "--name", name, *FEW]
    lists = {"train": "few", "unlabelled": "unlabelled", "valid": "valid", "test": "test"}
    words += [f"--{kind}_csv={few / one}.csv" for kind, one in lists.items()]
    return [*words, "--epochs", "3", "--batch-size", "3", "--precision", "bf16"]


@pytest.mark.slow
def test_two_processes_learn_and_stopped_ones_go_on(few, tmp_path):
    whole = torchrun(of_two(few, tmp_path, "whole"))
    text, _ = whole.communicate()
    assert whole.returncode == 0, text[-2000:]
    rows = rows_of(tmp_path / "whole")
    assert rows[2]["train_loss_contrast"] > 0 and rows[-1]["split"] == "test"
    parts, log = torchrun(of_two(few, tmp_path, "parts")), tmp_path / "parts/log.jsonl"
    while parts.poll() is None and not (log.exists() and log.read_text().count("\n")):
        time.sleep(0.01)
    parts.terminate()
    parts.communicate()
    again = torchrun(of_two(few, tmp_path, "parts"))
    text, _ = again.communicate()
    assert again.returncode == 0, text[-2000:]
    assert not differences(tmp_path / "whole", tmp_path / "parts")


SAME_DATA = """
from types import SimpleNamespace
import torch, torch.distributed as dist
from utils.methods.contrast import MemoryBank, pixel_contrast
from utils.methods.u2pl import Goal
from utils.run import Run

dist.init_process_group("gloo")
torch.manual_seed(0)
net = torch.nn.Conv2d(3, 8, 1)
image, teacher, logits = torch.rand(4, 3, 6, 6), torch.randn(4, 8, 6, 6), 2 * torch.randn(4, 5, 6, 6)
label, entropy = torch.randint(0, 5, (2, 6, 6)), torch.rand(2, 6, 6)
args = SimpleNamespace(rank_low=2, rank_high=5, anchor_threshold=0.1, compat="none", max_keys=30, anchors=9)
args.temperature, args.negatives = 0.5, 7
goal = Goal(image, label, entropy, torch.tensor(0.8), label.byte(), label.byte(), 0.2, logits, teacher)
twice = lambda tensor: [tensor, tensor]
gathered = lambda tensor: Run.every(SimpleNamespace(world=2), tensor)
found = []
for module, every in ((net, twice), (torch.nn.parallel.DistributedDataParallel(net), gathered)):
    torch.manual_seed(1)
    net.zero_grad()
    bank = MemoryBank([40] * 5, 8)
    loss, _ = pixel_contrast(bank, module(image), goal, args, every)
    loss.backward()
    found.append((net.weight.grad.clone(), bank.state_dict()))
(one, alone), (two, shared) = found
assert one.abs().sum() > 0 and torch.allclose(one, two, atol=1e-7), (one, two)
assert all(torch.equal(alone[k], shared[k]) for k in alone) and shared["filled"].sum() > 0
dist.destroy_process_group()
"""


def test_gradient_of_two_processes_with_the_same_data_is_that_of_one(tmp_path):
    (tmp_path / "same.py").write_text(SAME_DATA)
    done = torchrun([tmp_path / "same.py"])
    text, _ = done.communicate()
    assert done.returncode == 0, text[-2000:]
