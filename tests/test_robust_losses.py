"""Robust losses against hand values, their limits and independent densities; in every script, resumed, shared."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from scipy.stats import multivariate_t
from test_losses import binary, three_classes
from test_scripts import BASE, NEUTRAL, ROOT, SCRIPTS, Interrupted, interrupt_after, launch, rows_of, same

from utils.args import RankArgs, TrainArgs, WeightArgs, check
from utils.checkpoint import load_network, read_checkpoint
from utils.errors import InputError
from utils.losses import per_image_loss, per_pixel_loss
from utils.methods.robust_losses import (
    TLoss,
    build_loss,
    generalised_cross_entropy,
    noise_robust_dice,
    symmetric_cross_entropy,
    t_loss,
)
from utils.optim import build_optimizer

LOSSES = ["ce", "gce", "sce", "nr_dice", "t_loss"]


def loss_of(name, classes=1, **more):
    return build_loss(TrainArgs("", "", loss=name, classes=classes, **more))


def logits_of(p):
    """One image of one row, whose probabilities are `p`."""
    return torch.tensor(p, dtype=torch.float64).logit().view(1, 1, 1, -1)


def one_row(*labels):
    return torch.tensor(labels, dtype=torch.uint8).view(1, 1, -1)


# values by hand


def test_gce_by_hand():
    loss = loss_of("gce")(logits_of([0.9, 0.4]), one_row(1, 1))
    assert loss.item() == pytest.approx(((1 - 0.9**0.7) / 0.7 + (1 - 0.4**0.7) / 0.7) / 2, rel=1e-5)
    ce = torch.rand(7) * 5
    assert torch.equal(generalised_cross_entropy(ce, 0), ce)
    assert torch.allclose(generalised_cross_entropy(ce, 1e-6), ce, rtol=1e-4)
    assert torch.allclose(generalised_cross_entropy(ce, 1), 1 - (-ce).exp(), atol=1e-6)


def test_gce_gradient_by_hand():
    """d/dz (1 - p^q) / q = -p^q (1 - p) for the logit z of the label: wrong labels (small p) pull less than by CE."""
    for p in (0.01, 0.3, 0.99):
        logits = logits_of([p]).float().requires_grad_()
        loss_of("gce")(logits, one_row(1)).sum().backward()
        assert logits.grad.item() == pytest.approx(-(p**0.7) * (1 - p), rel=1e-4)


def test_sce_by_hand():
    loss = loss_of("sce", sce_alpha=0.5, sce_beta=2.0)(logits_of([0.8, 0.3]), one_row(1, 0))
    ce = -math.log(0.8) - math.log(0.7)
    reverse = 4 * 0.2 + 4 * 0.3  # -sum p log q, where log q is 0 for the label and -4 elsewhere
    assert loss.item() == pytest.approx((0.5 * ce + 2 * reverse) / 2, rel=1e-5)
    args = TrainArgs("", "")
    assert (args.sce_alpha, args.sce_beta) == (0.1, 1.0)
    assert torch.equal(symmetric_cross_entropy(torch.rand(5), 0, 0), torch.zeros(5))


def test_sce_of_three_classes_against_the_definition():
    logits, mask = three_classes()
    p, known = logits.softmax(1), mask != 255
    log_label = torch.full_like(p, -4.0)
    log_label.scatter_(1, mask.masked_fill(~known, 0)[:, None].long(), 0.0)
    reverse = -(p * log_label).sum(1)
    expected = 0.1 * per_pixel_loss(logits, mask) + torch.where(known, reverse, 0)
    assert torch.allclose(loss_of("sce", 3).per_pixel(logits, mask), expected, atol=1e-5)


def test_noise_robust_dice_by_hand():
    loss = noise_robust_dice(logits_of([0.9, 0.2, 0.4]), one_row(1, 0, 1), 1.5)
    part = 0.1**1.5 + 0.2**1.5 + 0.6**1.5
    assert loss.item() == pytest.approx(part / (0.81 + 0.04 + 0.16 + 2), rel=1e-4)


def test_noise_robust_dice_of_gamma_2_is_the_dice_loss():
    logits, mask = binary()
    p, g = logits[:, 0].sigmoid(), mask.float()
    dice = 2 * (p * g).sum((1, 2)) / (p**2 + g**2).sum((1, 2))
    assert torch.allclose(noise_robust_dice(logits, mask, 2.0), 1 - dice, atol=1e-5)


def test_noise_robust_dice_is_the_mean_of_the_classes_of_the_mask():
    logits, mask = three_classes()
    mask[0][mask[0] == 2] = 1
    p, known = logits.softmax(1), mask != 255
    for i, classes in enumerate(((0, 1), (0, 1, 2), (0, 1, 2))):
        each = []
        for k in classes:
            a, g = p[i, k][known[i]], (mask[i] == k).float()[known[i]]
            each.append(((a - g).abs() ** 1.5).sum() / ((a**2).sum() + (g**2).sum() + 1e-5))
        assert noise_robust_dice(logits, mask)[i].item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-4)


def test_noise_robust_dice_of_an_empty_mask_is_least_where_nothing_is_predicted():
    mask = torch.zeros(1, 4, 4, dtype=torch.uint8)
    losses = [noise_robust_dice(torch.full((1, 1, 4, 4), z), mask).item() for z in (-9.0, -3.0, 0.0, 3.0)]
    assert losses == sorted(losses) and losses[0] < 1e-5 and len(set(losses)) == 4


@pytest.mark.parametrize("free", [-2.0, 1.0, 4.0])
def test_t_loss_is_the_density_of_a_student_t(free):
    logits, mask = binary()
    loss = TLoss()
    loss.free.data.fill_(free)
    nu = math.exp(free) + 1e-8
    errors = (logits[:, 0].sigmoid() - mask).flatten(1).double().numpy()
    density = multivariate_t(loc=[0.0] * 20, shape=1, df=nu).logpdf(errors)
    assert loss(logits, mask).tolist() == pytest.approx([-d / 20 for d in density], rel=1e-5)


def test_t_loss_of_classes_is_the_density_at_annotated_pixels():
    logits, mask = three_classes()
    for i, loss in enumerate(t_loss(logits, mask, torch.tensor(3.0)).tolist()):
        known = mask[i] != 255
        labels = torch.nn.functional.one_hot(mask[i][known].long(), 3)
        errors = (logits[i].softmax(0)[:, known].T - labels).flatten().double().numpy()
        expected = -multivariate_t(loc=[0.0] * len(errors), shape=1, df=3.0).logpdf(errors) / len(errors)
        assert loss == pytest.approx(expected, rel=1e-5)


def test_t_loss_gradients_agree_with_differences():
    logits, mask = binary(n=2)

    def of(logits, nu):
        return t_loss(logits, mask, nu).double().sum()

    nu = torch.tensor(2.0, requires_grad=True, dtype=torch.float64)
    z = logits.clone().requires_grad_()
    of(z, nu).backward()
    high, low = torch.tensor(2.05, dtype=torch.float64), torch.tensor(1.95, dtype=torch.float64)
    assert nu.grad.item() == pytest.approx((of(logits, high) - of(logits, low)).item() / 0.1, rel=2e-3)
    moved = logits.clone()
    moved[0, 0, 0, 0] += 0.5
    less = logits.clone()
    less[0, 0, 0, 0] -= 0.5
    two = torch.tensor(2.0)
    assert z.grad[0, 0, 0, 0].item() == pytest.approx((of(moved, two) - of(less, two)).item(), rel=0.05)


def test_t_loss_of_a_large_image_keeps_its_digits():
    """The terms are near a million and their sum is not: in float32 the gradient of nu would be noise."""
    mask = torch.zeros(1, 400, 400, dtype=torch.uint8)
    loss = TLoss()
    loss(torch.full((1, 1, 400, 400), -2.0), mask).sum().backward()
    p, nu, size = 1 / (1 + math.exp(2)), loss.nu.item(), 160_000
    digamma = torch.digamma(torch.tensor([(nu + size) / 2, nu / 2], dtype=torch.float64))
    square = size * p * p
    by_hand = (digamma[1] - digamma[0]) / 2 + size / (2 * nu) + math.log1p(square / nu) / 2
    by_hand = by_hand - (nu + size) / 2 * square / nu / (nu + square)
    assert loss.free.grad.item() == pytest.approx(by_hand.item() / size * (nu - 1e-8), rel=1e-4)


# all of them


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("draw", [binary, three_classes])
def test_every_loss(name, draw):
    """Float32 of bf16 logits; no gradient at ignored pixels, one elsewhere; finite at extreme logits."""
    logits, mask = draw()
    loss = loss_of(name, logits.shape[1])
    assert torch.equal(loss(logits.bfloat16(), mask), loss(logits.bfloat16().float(), mask))
    logits.requires_grad_()
    each = loss(logits, mask)
    each.sum().backward()
    assert each.shape == (3,) and each.dtype == torch.float32
    void = (mask == 255)[:, None].expand_as(logits)
    if name == "nr_dice" and draw is three_classes:  # flat where p = g exactly, which does not happen here
        assert logits.grad[~void].count_nonzero() > 0.9 * (~void).sum()
    else:
        assert logits.grad[~void].all()
    assert not logits.grad[void].any()
    extreme = (logits.detach().sign() * 300).requires_grad_()
    loss(extreme, mask).sum().backward()
    assert loss(extreme, mask).isfinite().all() and extreme.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_an_image_without_annotation_costs_nothing(name):
    logits, mask = three_classes()
    mask[1] = 255
    logits.requires_grad_()
    loss = loss_of(name, 3)(logits, mask)
    loss.sum().backward()
    assert loss[1] == 0 and not logits.grad[1].any() and logits.grad.isfinite().all() and logits.grad[0].any()


def test_the_default_is_cross_entropy():
    for draw in (binary, three_classes):
        logits, mask = draw()
        loss = loss_of("ce", logits.shape[1])
        assert torch.equal(loss(logits, mask), per_image_loss(logits, mask)) and not loss.state_dict()
        assert torch.equal(loss_of("gce", logits.shape[1], gce_q=0.0)(logits, mask), per_image_loss(logits, mask))
    assert TrainArgs("", "").loss == "ce"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (TrainArgs("", "", loss="gce", compat="nlkd"), "--loss gce: the released code has cross entropy only"),
        (RankArgs("", "", loss="t_loss", unit="pixel"), "--unit pixel --loss t_loss: this loss is one of a whole"),
        (WeightArgs("", "", loss="nr_dice", level="pixel"), "--level pixel --loss nr_dice: .* ce, gce or sce"),
        (TrainArgs("", "", loss="gce", gce_q=1.5), "--gce-q 1.5: must lie between 0 and 1"),
        (TrainArgs("", "", loss="nr_dice", dice_gamma=0.5), "--dice-gamma 0.5: must lie between 1 and 2"),
        (TrainArgs("", "", loss="sce", sce_beta=-1.0), "--sce-beta -1.0: must be 0 or more"),
    ],
)
def test_what_cannot_be_is_said(args, message):
    with pytest.raises(InputError, match=message):
        check(args)


@pytest.mark.parametrize("optimizer", ["ranger", "adamw", "sgd"])
def test_nu_has_the_rate_of_the_run_and_no_weight_decay(optimizer):
    args = TrainArgs("", "", optimizer=optimizer, learning_rate=0.01, weight_decay=0.3)
    loss = TLoss()
    built, _ = build_optimizer(args, torch.nn.Linear(2, 2), 10, loss)
    groups = [(len(g["params"]), g["lr"], g["weight_decay"]) for g in built.param_groups]
    assert groups == [(2, 0.01, 0.3), (1, 0.01, 0.0)] and built.param_groups[1]["params"][0] is loss.free


# in the scripts

QUICK = ["--epochs", "2", "--augment", "flip"]
OF_CROSS_ENTROPY = ["train_u2pl.py", "train_unimatch.py", "train_lpl.py", "train_ieg_seg.py"]


@pytest.mark.parametrize(
    "script", [name for name in NEUTRAL if name not in OF_CROSS_ENTROPY]
)  # those refuse other losses
@pytest.mark.parametrize("loss", ["gce", "t_loss"])
def test_neutral_setting_is_the_baseline_with_the_same_loss(script, loss, tiny, tmp_path):
    plain = launch(BASE, tiny, tmp_path, "plain", *QUICK, "--loss", loss)
    assert not same(plain[0], launch(BASE, tiny, tmp_path, "ce", *QUICK)[0])
    assert same(plain[0], launch(script, tiny, tmp_path, "method", *QUICK, *NEUTRAL[script], "--loss", loss)[0])


@pytest.mark.parametrize("loss", ["gce", "sce", "nr_dice", "t_loss"])
def test_loss_goes_down(loss, tiny, tmp_path):
    launch(
        BASE, tiny, tmp_path, "a", "--epochs", "4", "--loss", loss, "--optimizer", "adamw", "--learning-rate", "0.01"
    )
    rows = rows_of(tmp_path / "a")
    assert rows[3]["train_loss"] < rows[0]["train_loss"]
    assert ("nu" in rows[0]) == (loss == "t_loss")


ALL_AT_ONCE = "--precision fp16 --accumulate 2 --skip-nonfinite"


@pytest.mark.parametrize(
    ("script", "more"),
    [(s, "") for s in SCRIPTS if s not in OF_CROSS_ENTROPY]
    + [(s, ALL_AT_ONCE) for s in (BASE, "train_co_teaching.py")],
)
def test_t_loss_resumes_on_the_same_bits(script, more, tiny, tmp_path, monkeypatch):
    flags = ["--epochs", "3", "--loss", "t_loss", "--optimizer", "ranger", *more.split()]
    flags += ["--unit", "image"] if script == "train_decoupling.py" else []
    whole = launch(script, tiny, tmp_path, "whole", *flags)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, 1)
        launch(script, tiny, tmp_path, "parts", *flags)
    assert all(map(same, whole, launch(script, tiny, tmp_path, "parts", *flags)))
    rows = rows_of(tmp_path / "whole")
    assert rows == rows_of(tmp_path / "parts")
    name = "nu" if "nu" in rows[0] else "nu_b"
    nu = [row[name] for row in rows[:3]]
    losses = read_checkpoint(tmp_path / "parts/last.pt")["losses"]
    saved = [value for loss in losses for key, value in loss.items() if key.endswith("free")]
    assert len(set(nu)) == 3 and nu[2] == pytest.approx(math.exp(saved[-1]), rel=1e-6)


@pytest.mark.parametrize("script", OF_CROSS_ENTROPY)
def test_scripts_of_cross_entropy_refuse_another_loss(script, tiny, tmp_path):
    with pytest.raises(InputError, match="--loss gce: this script learns by cross entropy"):
        launch(script, tiny, tmp_path, "a", "--loss", "gce")


def test_a_network_trained_with_t_loss_loads_as_any_other(tiny, tmp_path):
    launch(BASE, tiny, tmp_path, "a", "--epochs", "1", "--loss", "t_loss")
    for name in ("best.pt", "last.pt"):
        net, _ = load_network(tmp_path / "a" / name)
        assert net.eval()(torch.zeros(1, 3, 16, 16, dtype=torch.uint8)).shape == (1, 1, 16, 16)
    assert "losses" not in read_checkpoint(tmp_path / "a/best.pt")
    launch(BASE, tiny, tmp_path, "b", "--epochs", "1")
    assert "losses" not in read_checkpoint(tmp_path / "b/last.pt")


def test_pixels_are_selected_and_weighed_by_the_loss(tiny, tmp_path):
    script = "train_co_teaching.py"
    plain = launch(script, tiny, tmp_path, "ce", "--unit", "pixel", "--num-gradual", "1", *QUICK)
    other = launch(script, tiny, tmp_path, "gce", "--unit", "pixel", "--num-gradual", "1", *QUICK, "--loss", "gce")
    assert not same(plain[0], other[0])


def test_two_processes_learn_one_nu(tiny, tmp_path):
    """Each asserts that the gradient is the mean of both, and after every update that the other has the same."""
    code = (
        "import sys, torch, torch.distributed as dist, utils.steps as steps\n"
        "real = steps.Steps._update\n"
        "def update(self, net, optimizer, *rest):\n"
        "    real(self, net, optimizer, *rest)\n"
        "    mine = optimizer.param_groups[1]['params'][0].detach().clone()\n"
        "    theirs = mine.clone()\n"
        "    dist.broadcast(theirs, 0)\n"
        "    assert torch.equal(mine, theirs) and mine != 1\n"
        "steps.Steps._update = update\n"
        "average = steps.Steps._average_gradients\n"
        "def averaged(self, parameters):\n"
        "    (p,) = parameters\n"
        "    mean = p.grad.clone()\n"
        "    dist.all_reduce(mean)\n"
        "    own, mean = p.grad.clone(), mean / 2\n"
        "    average(self, [p])\n"
        "    assert torch.equal(p.grad, mean) and not torch.equal(own, mean)\n"
        "steps.Steps._average_gradients = averaged\n"
        "import train_without_weight as script\n"
        "script.launch(script.main, script.TrainArgs)\n"
    )
    (tmp_path / "checked.py").write_text(code)
    words = ["--size", "16", "--width", "4", "--batch-size", "3", "--epochs", "2", "--optimizer", "sgd", "--cpu"]
    words += ["--learning-rate", "0.05", "--loss", "t_loss", "--data-root", str(tiny), "--run-dir", str(tmp_path)]
    words += [f"--{name}_csv={tiny / name}.csv" for name in ("train", "valid")]
    words += ["--accumulate", "2", "--skip-nonfinite"]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*start, tmp_path / "checked.py", *words], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert log[0]["nu"] != log[1]["nu"]
