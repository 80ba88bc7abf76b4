"""Small data that the tests draw themselves."""

import signal
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

from utils.checkpoint import write_checkpoint
from utils.images import write_mask
from utils.models import build_model

# what a script needs beyond --train_csv, --valid_csv and --test_csv
LISTS = {"train_u2pl": {"unlabelled_csv": "unlabelled.csv"}, "train_unimatch": {"unlabelled_csv": "unlabelled.csv"}}
LISTS |= {"train_lpl": {"weak_csv": "weak.csv"}}
LISTS |= {"train_spatial_correction": {"trusted_csv": "trusted.csv"}, "train_ieg_seg": {"probe_csv": "trusted.csv"}}
LISTS |= {"train_distill": {"teacher": "teacher.pt"}, "train_lad_student": {"teacher": "lad_teacher.pt"}}

# a network that has seen so little predicts nothing, and has no bias; test_spatial_correction.py has others
SHORT = {"train_spatial_correction": ["--rounds", "0"]}

# a shell that starts the tests in the background (test.sh does) has them ignore Ctrl-C, and so all that they start
signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)  # the networks here are too small to share, and shared cores would make threads wait


def draw_set(root: Path, count: int, size: int = 32, seed: int = 0, start: int = 0) -> list[tuple[str, str]]:
    """Discs on noise: `count` images and masks below `root`, as (image, mask) paths relative to it."""
    for name in ("image", "mask"):
        (root / name).mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(start, start + count):
        rng = np.random.default_rng([seed, i])
        y, x = np.mgrid[:size, :size]
        centre = rng.integers(8, size - 8, 2)
        mask = ((y - centre[0]) ** 2 + (x - centre[1]) ** 2 < rng.integers(4, 8) ** 2).astype(np.uint8)
        image = np.clip(90 + 70 * mask[..., None] + rng.normal(0, 30, (size, size, 3)), 0, 255).astype(np.uint8)
        cv2.imwrite(str(root / "image" / f"{i:03d}.png"), image)
        write_mask(root / "mask" / f"{i:03d}.png", mask)
        rows.append((f"image/{i:03d}.png", f"mask/{i:03d}.png"))
    return rows


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with images and lists: 13 to train (with weights and noise levels), 5 to validate, 4 to test."""
    return draw_lists(tmp_path_factory.mktemp("tiny"))


def draw_lists(root: Path) -> Path:
    """Fill a folder with what the scripts need, and return it."""
    rows = draw_set(root, 22)
    frame = pd.DataFrame(rows, columns=["img", "filename"])
    frame["iterations"] = [0, 7, 0] * 7 + [0]
    rng = np.random.default_rng(1)
    frame["weight"] = np.where(frame["iterations"] > 0, 0.2, 0.9) + rng.uniform(0, 0.1, len(frame))
    frame["bf"] = frame["weight"]
    frame[:13].to_csv(root / "train.csv", index=False)
    plain = frame.drop(columns=["weight", "bf"])
    plain[:13].to_csv(root / "noisy.csv", index=False)
    plain[13:18].to_csv(root / "valid.csv", index=False)
    plain[13:18].assign(iterations=0).to_csv(root / "trusted.csv", index=False)
    plain[18:].to_csv(root / "test.csv", index=False)
    frame[:13].assign(weight=1.0, bf=1.0).to_csv(root / "ones.csv", index=False)
    plain[:13][["img"]].to_csv(root / "unlabelled.csv", index=False)
    plain[:13][["img"]].assign(label="0 1").to_csv(root / "weak.csv", index=False)
    _write_classes(root, plain)
    write_teacher(root / "teacher.pt")
    write_teacher(root / "lad_teacher.pt", extra=1)
    return root


def write_teacher(path: Path, classes: int = 1, **extra: int) -> None:
    """A checkpoint of a network that knows nothing, but says it loudly."""
    torch.manual_seed(classes)
    net = build_model("PlainUNet", classes=classes, width=6, **extra)
    net.net.head.weight.data *= 10
    model = {"arch": "PlainUNet", "encoder": "", "classes": classes, "width": 6, "size": 16} | extra
    write_checkpoint(path, {"nets": [net.state_dict()], "models": [model], "net": 0})


def _write_classes(root, frame):
    """The same images with masks of classes 0, 1, 2 and a band to ignore."""
    (root / "classes").mkdir()
    names = []
    for name in frame["filename"]:
        mask = (cv2.imread(str(root / name), cv2.IMREAD_GRAYSCALE) > 0).astype(np.uint8)
        mask[:, 16:] *= 2
        mask[:2] = 255
        names.append(f"classes/{Path(name).name}")
        write_mask(root / names[-1], mask, classes=3)
    both = frame.assign(filename=names)
    both[:13][["img"]].assign(label="0 1 2").to_csv(root / "classes_weak.csv", index=False)
    both[:13].assign(weight=0.5, bf=0.5).to_csv(root / "classes.csv", index=False)
    both[13:18].to_csv(root / "classes_valid.csv", index=False)
    both[13:18].assign(iterations=0).to_csv(root / "classes_trusted.csv", index=False)
