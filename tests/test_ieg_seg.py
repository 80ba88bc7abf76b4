"""IEG and L2R on masks: the arithmetic against arrays computed in closed form, and the script."""

import os
import subprocess
import sys

import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score
from test_ieg import close, golden
from test_scripts import BASE, ROOT, SMALL, launch, rows_of, same
from torch import nn

from utils.args import parse
from utils.errors import InputError
from utils.losses import per_image_loss
from utils.methods import ieg, ieg_maps
from utils.methods.meta import derivative, gradient, parameters_of
from utils.probed import ProbedArgs

SCRIPT = "train_ieg_seg.py"
PLAIN = ["--method", "ieg", "--floor", "1", "--no-relabel", "--mix", "none", "--consistency-factor", "0"]
CLASSES = ["--train_csv", "classes.csv", "--valid_csv", "classes_valid.csv", "--test_csv", "", "--classes", "3"]
CLASSES += ["--probe_csv", "classes_trusted.csv"]


class Linear(nn.Module):
    """A linear head a pixel on maps (N, D, H, W)."""

    def __init__(self, kernel, bias=None):
        super().__init__()
        self.kernel, self.bias = (
            nn.Parameter(kernel),
            nn.Parameter(torch.zeros(kernel.shape[1]) if bias is None else bias),
        )

    def forward(self, features):
        return torch.einsum("ndhw,dc->nchw", features, self.kernel) + self.bias[:, None, None]


def maps(array):
    return array.movedim(-1, 1)


def test_scores_weights_and_kept_labels_of_pixels_patches_and_images():
    g = golden("seg")
    net, weak, strong = Linear(g["kernel"], g["bias"]), maps(g["feat_weak"]), maps(g["feat_strong"])
    valid, count = g["valid"].bool(), g["valid_probe"].bool().sum()
    label, truth = (ieg.one_hot(g[name], 3).double() for name in ("y", "y_probe"))

    def probe_loss(forward):
        return (ieg.soft_loss(forward(maps(g["feat_probe"])), truth) * g["valid_probe"]).sum() / count

    _, direction = gradient(net, parameters_of(net), probe_loss)
    close(direction["kernel"], g["probe_grad_kernel"])
    (z,), (dz,) = derivative(net, parameters_of(net), direction, lambda forward: (forward(weak),))
    close(dz, maps(g["logits_dot"]))
    score = ieg.alignment(z, label, dz)
    close(score * valid, g["score_pixel"] * valid)
    for level, name in (("pixel", "pixel"), ("image", "image"), ("patch", "patch2")):
        weight = ieg.weights_of(ieg_maps.pool(score, valid, level, 2))
        close(weight, g[f"weight_{name}"])
        close(ieg_maps.spread(weight, valid, level, 2).sum(), weight.sum())
    pseudo = ieg.pseudo_label([z, net(strong).detach()], norm=False)
    close(pseudo, maps(g["pseudo"]))
    keep = ieg_maps.kept_labels(ieg.label_gain(z, label, pseudo, dz), pseudo, valid, flags(level="pixel"))
    assert torch.equal(keep & valid, g["lambda_star"].bool() & valid)


def test_scores_of_one_class():
    g = golden("seg")
    net, valid = Linear(g["bin_kernel"][:, None]), g["valid"].bool()
    label, z, dz = (g[f"bin_{name}"][:, None] for name in ("y", "logits", "logits_dot"))
    close(net(maps(g["feat_weak"])).detach()[:, 0] * valid, g["bin_logits"] * valid, 0.2)  # the arrays' net has a bias
    score = ieg.alignment(z, label, dz)
    close(score * valid, g["bin_score"] * valid)
    close(ieg.weights_of(ieg_maps.pool(score, valid, "pixel")), g["bin_weight_pixel"])
    pseudo = g["bin_pseudo"][:, None]
    keep = ieg_maps.kept_labels(ieg.label_gain(z, label, pseudo, dz), pseudo, valid, flags(level="pixel"))
    assert torch.equal(keep & valid, g["bin_lambda_star"].bool() & valid)


def flags(**more):
    lists = ["--train_csv", "a", "--valid_csv", "b", "--probe_csv", "c"]
    args = parse(ProbedArgs, lists)
    for name, value in more.items():
        setattr(args, name, value)
    return args


@pytest.mark.parametrize("patch", [3, 4, 8])
def test_units_share_out_what_they_weigh_also_at_the_edge(patch):
    torch.manual_seed(0)
    score, valid = torch.rand(2, 7, 10), torch.rand(2, 7, 10) > 0.3
    means = ieg_maps.pool(score, valid, "patch", patch)
    for n, top, left in ((0, 0, 0), (1, 7 // patch * patch, 9 // patch * patch)):
        cell = (n, slice(top, top + patch), slice(left, left + patch))
        if valid[cell].any():
            close(means[n, top // patch, left // patch], score[cell][valid[cell]].mean(), 1e-6)
    close(ieg_maps.to_pixels(means, valid, "patch", patch)[1, 6, 9], means[1, 6 // patch, 9 // patch])
    weight = means / means.sum()
    every = ieg_maps.spread(weight, valid, "patch", patch)
    filled = ieg_maps.pool(valid.float(), torch.ones_like(valid), "patch", patch) > 0
    assert not every[~valid].any()
    close(every.sum(), weight[filled].sum(), 1e-6)


def test_the_mean_of_a_units_pixels_is_its_gradient():
    """An image's score is that of the mean loss of its pixels: image level is L2R of whole masks."""
    g = golden("seg")
    close(ieg_maps.pool(g["score_pixel"], g["valid"].bool(), "image")[0],
          g["score_pixel"][0][g["valid"][0].bool()].mean())  # fmt: skip


def test_void_does_not_count_and_does_not_touch_others():
    torch.manual_seed(1)
    score, valid = torch.randn(2, 4, 4), torch.ones(2, 4, 4, dtype=torch.bool)
    valid[0, :2] = False
    changed = score.clone()
    changed[0, :2] = 99.0
    for level in ("image", "patch", "pixel"):
        a, b = (ieg_maps.spread(ieg.weights_of(ieg_maps.pool(s, valid, level, 2)), valid, level, 2)
                for s in (score, changed))  # fmt: skip
        assert torch.equal(a, b) and not a[0, :2].any()


def test_classes_keep_their_share_where_one_is_rare():
    mask = torch.zeros(1, 10, 10, dtype=torch.uint8)
    mask[0, 0, :2], mask[0, 9] = 1, 255
    valid, weight = mask != 255, torch.zeros(1, 10, 10)
    weight[0, 4:6, 5], weight[0, 0, 1] = 0.4, 0.2
    kept = ieg_maps.keep_class_shares(weight, mask, valid, "auto")
    close(kept.sum(), 1.0, 1e-6)
    close(kept[0, 0, 1], 2 / 90, 1e-6)
    close(kept[0, 4, 5], 44 / 90, 1e-6)
    assert torch.equal(ieg_maps.keep_class_shares(weight, mask, valid, "off"), weight)
    mask[0, 0] = 1  # 10 of 90: no longer rare
    assert torch.equal(ieg_maps.keep_class_shares(weight, mask, valid, "auto"), weight)
    assert not torch.equal(ieg_maps.keep_class_shares(weight, mask, valid, "on"), weight)


def test_a_floor_mixes_with_the_plain_loss():
    weight, valid = torch.rand(2, 4, 4), torch.ones(2, 4, 4, dtype=torch.bool)
    assert torch.equal(ieg_maps.factors(weight, valid, 1.0), torch.ones(2, 4, 4))
    close(ieg_maps.factors(torch.full((2, 4, 4), 1 / 32), valid, 0.0), torch.ones(2, 4, 4), 1e-6)
    assert ieg_maps.floor_of(flags(method="l2r")) == 0.5 and ieg_maps.floor_of(flags()) == 0
    assert ieg_maps.floor_of(flags(floor=0.2)) == 0.2


def test_labels_are_kept_by_hysteresis_and_where_the_network_is_not_sure():
    gain, valid = torch.tensor([[[-1.0, 1.0, 3.0]]]), torch.ones(1, 1, 3, dtype=torch.bool)
    pseudo = torch.tensor([[[[0.4, 0.45, 0.9]], [[0.6, 0.55, 0.1]]]])
    for more, expected in (({}, [1, 0, 0]), ({"hysteresis": 1.0}, [1, 1, 0]), ({"pseudo_floor": 0.6}, [1, 1, 0])):
        keep = ieg_maps.kept_labels(gain, pseudo, valid, flags(level="pixel", **more))
        assert keep.flatten().tolist() == [bool(one) for one in expected]


@pytest.mark.parametrize("kind", ["cutmix", "mixup"])
def test_mixtures_take_labels_along(kind):
    """Images that are their own label stay so, whatever they are mixed with."""
    torch.manual_seed(2)
    probe, image = torch.randint(0, 2, (3, 6, 6, 3)).byte(), torch.randint(0, 2, (3, 6, 6, 3)).byte()
    batch = {"image": image.permute(0, 3, 1, 2), "strong": image, "probe": probe}
    mixed = ieg_maps.draw_mixture(batch, kind)
    assert mixed.image.shape == (9, 3, 6, 6) and mixed.partner.sort().values.tolist() == list(range(9))
    label = mixed.join(*(maps.permute(0, 3, 1, 2)[:, :1].float() for maps in (probe, image, image)))
    close(label, mixed.image[:, :1], 1e-6)
    if kind == "cutmix":
        assert ((label == 0) | (label == 1)).all() and 0.3 < mixed.keep.float().mean() < 0.7


def test_mixed_losses_are_means_over_pixels_with_a_label():
    torch.manual_seed(3)
    mask, truth = torch.tensor([[[0, 255]]]).byte(), torch.tensor([[[1, 1]]]).byte()
    pseudo, out = torch.rand(1, 2, 1, 2).softmax(1), torch.randn(3, 2, 1, 2)
    keep, rows = torch.ones(3, 1, 2, dtype=torch.bool), torch.arange(3)
    mixed = ieg_maps.Mixed(None, keep, rows, torch.zeros(1, dtype=torch.int64))
    found = ieg_maps.mixed_losses(out, mixed, {"mask": mask, "probe_mask": truth}, pseudo, 2)
    close(found["probe"], per_image_loss(out[:1], truth)[0], 1e-6)
    each = ieg.soft_loss(out[1:], pseudo.expand(2, -1, -1, -1))
    close(found["mixed"], each[:, 0, 0].mean(), 1e-6)


@pytest.mark.parametrize("lists", [[], CLASSES])
@pytest.mark.parametrize("how", [["--method", "supervised"], ["--method", "l2r", "--floor", "1"], PLAIN])
def test_neutral_settings_are_the_baseline(how, lists, tiny, tmp_path):
    flags = ["--epochs", "2", "--augment", "flip"]
    base = lists[:-2] if lists else []
    plain = launch(BASE, tiny, tmp_path, "plain", *flags, *base)
    method = launch(SCRIPT, tiny, tmp_path, "method", *flags, *lists, *how)
    assert same(plain[0], method[0])


@pytest.mark.parametrize("level", ["image", "patch", "pixel"])
@pytest.mark.parametrize(("method", "lists"), [("l2r", []), ("ieg", CLASSES)])
def test_every_level_learns_and_says_what_it_decided(method, level, lists, tiny, tmp_path):
    flags = ["--epochs", "1", "--method", method, "--level", level, "--patch", "4", *lists]
    nets = launch(SCRIPT, tiny, tmp_path, level, *flags)
    assert all(value.isfinite().all() for value in nets[0].values())
    row = rows_of(tmp_path / level)[0]
    assert 0 < row["train_effective_share"] <= 1 and row["train_probe_loss"] > 0 and 0 <= row["train_weight_auroc"] <= 1
    if method == "l2r":
        assert "train_kept" not in row  # none could give way
    else:
        assert row["train_kept"] == 1 if level == "image" else 0 < row["train_kept"] < 1
    assert {"train_loss_omega"} <= set(row) and ("train_loss_kl" in row) == (method == "ieg")


SETTINGS = ["--precision bf16 --mix mixup", "--precision fp16 --optimizer sgd --meta-step 0.1"]
SETTINGS += ["--meta-grad difference --augment crop", "--accumulate 2 --skip-nonfinite"]


@pytest.mark.parametrize("more", SETTINGS)
def test_settings_run(more, tiny, tmp_path):
    nets = launch(SCRIPT, tiny, tmp_path, "a", "--epochs", "1", *more.split())
    assert all(value.isfinite().all() for value in nets[0].values())
    assert "train_loss_mixed" in rows_of(tmp_path / "a")[0]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--probe_csv", ""], "--method ieg: name a list of clean masks with --probe_csv"),
        (["--probe_csv", "noisy.csv"], "masks are noisy by the column iterations, the first in line 3"),
        (["--probe_csv", "test.csv"], "is also in .*trusted.csv|No image may be in both lists"),
        (["--loss", "gce"], "--loss gce: this script learns by cross entropy"),
        (["--no-relabel"], "--no-relabel: mixtures need"),
        (["--floor", "2"], "--floor 2.0: must lie between -1 and 1"),
        (["--meta-step", "-1"], "--meta-step -1.0: must be 0 or more"),
        (["--patch", "0"], "--patch 0: must be 1 or more"),
    ],
)
def test_mistakes_are_one_line(more, says, tiny, tmp_path):
    with pytest.raises(InputError, match=says):
        launch(SCRIPT, tiny, tmp_path, "a", "--epochs", "1", *more)


def test_a_probe_that_is_also_validated_on_is_said(tiny, tmp_path, capsys):
    flags = ["--epochs", "1", "--method", "l2r"]
    launch(SCRIPT, tiny, tmp_path, "a", *flags)
    assert "5 images of" in (said := capsys.readouterr().err) and "are in the probe" in said
    launch(SCRIPT, tiny, tmp_path, "b", *flags, "--select", "last")
    assert "are in the probe" not in capsys.readouterr().err


def test_weights_and_kept_labels_are_held_against_clean_masks():
    torch.manual_seed(4)
    mask, clean = torch.randint(0, 3, (2, 2, 6, 6)).byte()
    mask[0, 0], clean[1, :2] = 255, 255
    valid = (mask != 255) & (clean != 255)
    weight, keep = torch.randint(0, 4, (2, 6, 6)) / 2, torch.rand(2, 6, 6) > 0.5
    verdict = ieg_maps.Verdict(weight, keep, None, None)
    found = ieg_maps.against_clean(verdict, mask, clean, 3)
    shares = {name: float(part.sum() / whole.sum()) for name, (part, whole) in found.items()}
    right = (mask == clean)[valid]
    assert shares["right_labels"] == pytest.approx(right.float().mean().item())
    assert shares["kept_precision"] == pytest.approx(right[keep[valid]].float().mean().item())
    assert shares["pixel_auroc"] == pytest.approx(roc_auc_score(right, weight[valid]))
    found = ieg_maps.against_clean(verdict._replace(keep=None), mask, mask, 3)
    assert "kept_precision" not in found and [float(value) for value in found["pixel_auroc"]] == [0, 0]


@pytest.mark.parametrize("augment", ["flip", "crop", "strong"])
def test_clean_masks_are_augmented_like_those_that_are_learnt(augment, tiny, tmp_path):
    """Where they are the same every label is right, whatever the view; else some are not."""
    frame = pd.read_csv(tiny / "train.csv")
    frame.assign(clean=frame["filename"]).to_csv(tiny / "same.csv", index=False)
    frame.assign(clean=frame["filename"].to_list()[::-1]).to_csv(tiny / "other.csv", index=False)
    for name, right in (("same", True), ("other", False)):
        flags = ["--train_csv", f"{name}.csv", "--epochs", "1", "--augment", augment, "--method", "l2r"]
        launch(SCRIPT, tiny, tmp_path, name, *flags)
        row = rows_of(tmp_path / name)[0]
        assert (row["train_right_labels"] == 1) == right and ("train_pixel_auroc" in row) != right


def test_a_probe_that_is_also_trained_on_is_said(tiny, tmp_path, capsys):
    frame = pd.read_csv(tiny / "trusted.csv")
    frame["img"] = pd.read_csv(tiny / "train.csv")["img"][: len(frame)]
    frame.to_csv(tiny / "known.csv", index=False)
    launch(SCRIPT, tiny, tmp_path, "a", "--epochs", "1", "--method", "l2r", "--probe_csv", "known.csv")
    assert (
        f"{len(frame)} images of" in (said := capsys.readouterr().err) and "leave them out of one of the lists" in said
    )


def test_an_exchanged_probe_is_another_run(tiny, tmp_path):
    copy = tiny / "probe_copy.csv"
    frame = pd.read_csv(tiny / "trusted.csv")
    frame.to_csv(copy, index=False)
    launch(SCRIPT, tiny, tmp_path, "a", "--epochs", "1", "--probe_csv", "probe_copy.csv")
    frame[:-1].to_csv(copy, index=False)
    with pytest.raises(InputError, match="another content of --probe_csv"):
        launch(SCRIPT, tiny, tmp_path, "a", "--epochs", "1", "--probe_csv", "probe_copy.csv")


@pytest.mark.slow
def test_two_processes_train_one_network(tiny, tmp_path):
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / SCRIPT), *SMALL]
    words += ["--data-root", str(tiny), "--run-dir", str(tmp_path), "--name", "two", "--epochs", "1"]
    words += ["--batch-size", "3", "--optimizer", "sgd", "--meta-step", "0.1"]
    words += [f"--{name}_csv={tiny / name}.csv" for name in ("train", "valid", "test")]
    words += [f"--probe_csv={tiny / 'trusted.csv'}"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    row = rows_of(tmp_path / "two")[0]
    assert 0 < row["train_kept"] <= 1 and row["train_loss_mixed"] > 0
