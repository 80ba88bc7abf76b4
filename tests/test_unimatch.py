"""UniMatch and FixMatch: their neutral setting, what a step learns from, and what views are labelled with."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from test_scripts import BASE, launch, rows_of, same

from utils.methods.unimatch import label_views

SCRIPT = "train_unimatch.py"


@pytest.mark.parametrize("lists", [["--unlabelled_csv", "unlabelled.csv"], ["--unlabelled_csv", ""]])
def test_without_unlabelled_weight_it_is_the_baseline(tiny, tmp_path, lists):
    flags = ["--epochs", "2", "--augment", "flip"]
    plain = launch(BASE, tiny, tmp_path, "plain", *flags)
    method = launch(SCRIPT, tiny, tmp_path, "method", *flags, *lists, "--unsup-weight", "0")
    assert same(plain[0], method[0])


@pytest.mark.parametrize("preset", ["unimatch", "fixmatch"])
@pytest.mark.parametrize("classes", [1, 3])
def test_it_learns_from_unlabelled_images(tiny, tmp_path, preset, classes):
    lists = ["--train_csv", "classes.csv", "--valid_csv", "classes_valid.csv", "--test_csv", "", "--classes", "3"]
    flags = ["--epochs", "2", "--confidence", "0.4", "--mix-prob", "1", *(lists if classes == 3 else [])]
    nets = launch(SCRIPT, tiny, tmp_path, preset, *flags, "--preset", preset)
    alone = launch(SCRIPT, tiny, tmp_path, "alone", *flags, "--unsup-weight", "0")
    row = rows_of(tmp_path / preset)[1]
    assert not same(nets[0], alone[0]) and row["train_loss_strong"] > 0 and row["train_reliable"] > 0
    assert ("train_loss_features" in row) == (preset == "unimatch")


def test_views_have_the_labels_of_the_weak_image():
    """The network here says class 1 where the first channel is bright, with more confidence the brighter it is."""

    class Bright(torch.nn.Module):
        def forward(self, image):
            assert not self.training
            return SimpleNamespace(logits=image[:, :1].float() / 50 - 2)

    torch.manual_seed(0)
    run = SimpleNamespace(autocast=nullcontext)
    weak = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8)
    batch = {"weak": weak, "strong": torch.stack([weak, weak], 1), "truth": (weak[..., 0] > 99).byte()}
    net = Bright().train()
    for mix_prob in (0.0, 1.0):
        plain, views = label_views(run, net, batch, mix_prob)
        assert net.training and torch.equal(plain.label, (plain.image[:, 0] > 100).long())
        for view in views:
            assert torch.equal(view.label, (view.image[:, 0] > 100).long())
            assert torch.equal(view.truth, (view.image[:, 0] > 99).byte())
            assert view.confidence.min() >= 0.5 and torch.equal(view.image, plain.image) == (mix_prob == 0)
        assert torch.equal(views[0].image, views[1].image) == (mix_prob == 0)
