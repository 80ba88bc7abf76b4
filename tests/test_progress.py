"""What a run shows while it works: its bar, its lines, its pictures, and how its weights rank the images."""

import io
import json
import sys
from functools import partial

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_resume import walk
from test_scripts import launch, rows_of

from utils import steps
from utils.averages import Averages
from utils.lists import read_list
from utils.logs import duration
from utils.pictures import BOTH, NEITHER, ONLY_MASK, ONLY_PREDICTION, choose, draw

KD = "train_with_KDweight.py"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_one_bar_an_epoch_with_loss_and_images_a_second(tiny, tmp_path, monkeypatch):
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr(steps, "tqdm", partial(steps.tqdm, mininterval=0, miniters=1))  # else fast epochs show nothing
    launch(KD, tiny, tmp_path, "bar", "--train_csv", "train.csv", "--epochs", "2", "--workers", "0")
    text = shown.getvalue()
    assert "epoch 1/2" in text and "epoch 2/2" in text and "epoch 3" not in text
    assert "img/s" in text and "/12 [" in text, "13 images: the last batch of one is left out"
    assert "loss 0." in text


def test_no_bar_where_there_is_no_terminal(tiny, tmp_path, capsys):
    launch(KD, tiny, tmp_path, "quiet", "--train_csv", "train.csv", "--epochs", "2")
    shown = capsys.readouterr()
    assert shown.err == ""
    lines = shown.out.splitlines()
    assert len(lines) == 3 and all(line.startswith("quiet  ") for line in lines)
    assert "left " in lines[0] and "left " not in lines[1]


def test_the_loss_of_the_bar_is_a_moving_average(tmp_path):
    _, run, _ = walk(tmp_path, 6, batch_size=2, losses=torch.ones_like)
    # w goes 0, -1, -2: so do the losses
    assert run.recent == pytest.approx(0.9 * (0.9 * 0 + 0.1 * -1) + 0.1 * -2)


def test_times_are_for_people():
    assert [duration(s) for s in (3.4, 89, 91, 5000, 7300)] == ["3 s", "89 s", "2 min", "83 min", "2.0 h"]


class Stub:
    """As much of a Run as Averages needs."""

    def __init__(self, noisy):
        dataset = type("Dataset", (), {"noisy": np.array(noisy), "__len__": lambda self: len(self.noisy)})()
        self.device, self.spoilt, self.images = torch.device("cpu"), False, (0, 0, dataset, [])
        self.args, self.dir = type("Args", (), {"skip_nonfinite": False}), "run"

    def carry(self, _, item):
        return item

    def sum(self, tensor):
        return tensor

    def see(self, index):
        self.images = (*self.images[:3], torch.tensor(index))


def test_rank_of_the_weights_is_the_chance_to_tell_clean_from_noisy():
    run = Stub([0, 0, 1, 1, -1, 0])
    stats = Averages(run)
    stats.add(loss=torch.ones(2))
    run.see([3, 0, 4])
    stats.keep(weight=torch.tensor([0.5, 0.9, 0.0]))
    run.see([2, 1])
    stats.keep(weight=torch.tensor([0.1, 0.5]))
    # clean 0.9 and 0.5, noisy 0.1 and 0.5, one unknown and one never seen: of four pairs 3 right, one equal
    assert stats.result()["train_weight_auroc"] == pytest.approx(3.5 / 4)
    assert np.allclose(stats.of_images()["weight"][:5], [0.9, 0.5, 0.1, 0.5, 0.0])
    assert np.isnan(stats.of_images()["weight"][5])


def test_values_of_images_survive_a_stop_inside_an_epoch():
    run = Stub([0, 1])
    stats = Averages(run)
    stats.add(loss=torch.ones(1))
    run.see([0])
    stats.keep(weight=torch.tensor([0.75]))
    again = Averages(run)
    again.load_state_dict(stats.state_dict())
    run.see([1])
    again.keep(weight=torch.tensor([0.25]))
    assert again.result()["train_weight_auroc"] == 1.0


@pytest.mark.parametrize("noisy", [[-1] * 4, [0] * 4, [1] * 4])
def test_no_rank_where_only_one_kind_is_known(noisy):
    run = Stub(noisy)
    stats = Averages(run)
    stats.add(loss=torch.ones(1))
    run.see([0, 1, 2, 3])
    stats.keep(weight=torch.arange(4.0))
    assert set(stats.result()) == {"train_loss"}


@pytest.mark.parametrize("script", ["train_decoupling.py", "train_co_teaching.py", "train_co_teaching+.py"])
def test_selection_logs_how_it_ranks_the_images(script, tiny, tmp_path):
    launch(script, tiny, tmp_path, "a", "--train_csv", "train.csv", "--epochs", "1", "--unit", "image")
    row = rows_of(tmp_path / "a")[0]
    assert 0 <= row["train_weight_auroc"] <= 1
    assert ("train_cleanness_auroc" in row) == ("co_teaching" in script)
    launch(script, tiny, tmp_path, "b", "--train_csv", "train.csv", "--epochs", "1", "--unit", "pixel")
    assert "train_weight_auroc" not in rows_of(tmp_path / "b")[0], "a pixel is not known to be clean"


def test_pictures_come_every_so_often_and_at_the_end(tiny, tmp_path):
    launch(KD, tiny, tmp_path, "a", "--train_csv", "train.csv", "--epochs", "5", "--pictures", "2")
    found = sorted(p.name for p in (tmp_path / "a/pictures").iterdir())
    assert found == ["epoch_0002.png", "epoch_0004.png", "epoch_0005.png"]
    page = cv2.imread(str(tmp_path / "a/pictures/epoch_0005.png"))
    assert page.shape[0] > 6 * 168 and page.shape[1] > 4 * 168
    listed = pd.read_csv(tmp_path / "a/sample_weights.csv")
    assert listed["img"].tolist() == read_list(tiny / "train.csv")["img"].tolist()
    assert listed["weight"].isna().sum() == 1, "the image of the batch that was left out"
    events = EventAccumulator(str(tmp_path / "a"), size_guidance={"images": 0}).Reload()
    assert [e.step for e in events.Images("training")] == [1, 3, 4]
    assert set(events.Tags()["histograms"]) == {"weight/clean", "weight/noisy"}
    assert {"train/weight_auroc", "T", "effective_size", "lr", "valid/iou"} <= set(events.Tags()["scalars"])


def test_without_pictures_nothing_else_changes(tiny, tmp_path):
    flags = ["--train_csv", "train.csv", "--epochs", "2", "--augment", "strong"]
    shown = launch(KD, tiny, tmp_path, "a", *flags, "--pictures", "1")
    none = launch(KD, tiny, tmp_path, "b", *flags, "--pictures", "0")
    assert all(torch.equal(shown[0][k], none[0][k]) for k in none[0])
    assert rows_of(tmp_path / "a") == rows_of(tmp_path / "b")
    assert not (tmp_path / "b/pictures").exists() and not (tmp_path / "b/sample_weights.csv").exists()
    assert json.loads((tmp_path / "b/args.json").read_text())["pictures"] == 0


def test_pictures_show_noisy_and_clean_images_alike():
    assert choose(np.array([0] * 50 + [1] * 50)) == [50, 74, 99, 0, 24, 49]
    assert choose(np.array([-1] * 11)) == [0, 2, 4, 6, 8, 10]
    assert choose(np.array([0, 1])) == [1, 0]
    assert choose(np.array([0])) == [0]


def test_a_picture_tells_what_is_missing_from_what_is_too_much():
    image = np.zeros((168, 168, 3), np.uint8)
    mask, prediction = np.zeros((2, 168, 168), np.uint8)
    mask[:84, :84] = prediction[84:, 84:] = 1
    mask[:84, 84:] = prediction[:84, 84:] = 1
    page = draw([(image, mask, prediction)], ["text"], "title")
    x, y = 8 + 3 * 176, 2 * 22 + 8
    corners = [page[y + 40 + dy, x + 40 + dx] for dy in (0, 84) for dx in (0, 84)]
    assert np.array_equal(corners, [ONLY_MASK, BOTH, NEITHER, ONLY_PREDICTION])
    grey = [int(np.dot(c, (0.299, 0.587, 0.114))) for c in (BOTH, ONLY_MASK, ONLY_PREDICTION, NEITHER)]
    assert min(abs(a - b) for i, a in enumerate(grey) for b in grey[:i]) > 20, "also without colours"
