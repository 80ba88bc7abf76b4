"""Writes a teacher's masks for a list: from one checkpoint, an average of several, or leak-free from folds.

Run   python utils/predict_mask.py --list TRAIN.csv --checkpoint runs/teacher/last.pt --out masks/teacher --trusted
      python utils/predict_mask.py --list TRAIN.csv --folds 3 --checkpoint runs/fold0/last.pt runs/fold1/last.pt ...
      with --support also OUT/support and OUT_support.csv, TRAIN.csv with a column for train_*.py --level pixel
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from utils.args import launch
from utils.checkpoint import image_keys, load_network
from utils.errors import InputError, report_bad_rows, warn
from utils.images import IGNORE, check_sizes, read_image, read_mask, resize_image, write_mask, write_picture
from utils.inference import enlarge, to_mask, to_probability
from utils.interrupt import loader_processes
from utils.lists import from_root, read_list, unique_stems, write_list
from utils.logs import read_record, replace_text
from utils.sources import digest
from utils.store import key_of, stamp_files


@dataclass
class Args:
    list: Annotated[str, "images to predict (CSV with a column img)"]
    checkpoint: Annotated[list[str], "one or more checkpoints; the probabilities of several are averaged"]
    out: Annotated[str, "folder of the masks; a list OUT.csv and OUT/teacher.json are written with them"]
    folds: Annotated[int, "K: of the K checkpoints each image is predicted by those that never saw it"] = 0
    trusted: Annotated[
        bool | str,
        "say that the teacher was trained on masks you trust, else get_weight.py warns; with a LIST: check that it was "
        "trained on images of this list alone, and on none of --list",
    ] = False
    support: Annotated[bool, "also write how likely the list's masks are, pixel by pixel, for --level pixel"] = False
    data_root: Annotated[str, "folder that relative paths in the list start from"] = "."
    size: Annotated[int, "network input; -1: the size the checkpoint was trained with; 0: as the images are"] = -1
    batch_size: Annotated[int, "images a step"] = 16
    workers: Annotated[int, "loader processes"] = 0
    precision: Annotated[Literal["fp32", "bf16"], "bf16 is faster wherever the hardware has it"] = "fp32"
    cpu: Annotated[bool, "ignore any GPU"] = False


class Teachers(NamedTuple):
    """Networks on their device, what they are (size, classes), who predicts which image, and how many images leak."""

    nets: list
    model: dict
    use: np.ndarray
    leaks: int
    device: torch.device


class Images(Dataset):
    """Photographs of a list, resized for the network, with their own height and width."""

    def __init__(self, frame, root, size):
        self.paths, self.size = [Path(root) / img for img in frame["img"]], size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        try:
            image = read_image(self.paths[i])
        except InputError as error:
            return i, None, str(error)
        shown = resize_image(image, self.size) if self.size else image
        return i, torch.from_numpy(shown), image.shape[:2]


def main(args: Args) -> None:
    """Predict, or do nothing where the same masks are there already."""
    frame = read_list(args.list, ("img", "filename") if args.support else ("img",))
    stems, out = unique_stems(frame, args.list), Path(args.out)
    paths = [out / f"{stem}.png" for stem in stems]
    supports = [out / "support" / f"{stem}.png" for stem in stems] if args.support else []
    record = {"checkpoints": [f"{p} {digest(p)}" for p in args.checkpoint]}
    record |= {k: v for k, v in asdict(args).items() if k in ("folds", "trusted", "size", "precision")}
    if isinstance(args.trusted, str):
        record["trusted"] = f"{args.trusted} {_names(read_list(args.trusted, ('img',)))}"
    record["images"] = _names(frame)
    if args.support:  # it is about the masks of the list too
        record["support"] = key_of("support", _stamps(frame, args))
    about = out / "teacher.json"
    if read_record(about) == record and all(p.exists() for p in paths + supports):
        print(f"{out}: {len(paths)} masks are there already")
        return
    teachers = load_teachers(frame, args.checkpoint, args)
    _claim(out, about, paths, args.list)
    if supports:
        supports[0].parent.mkdir(exist_ok=True)
    classes, bad = teachers.model["classes"], []
    for i, probability, shape in probabilities(frame, teachers, args):
        write_mask(paths[i], to_mask(probability, shape), classes)
        if supports:
            try:
                mask = read_mask(Path(args.data_root, frame["filename"].iloc[i]), classes)
                check_sizes(frame["img"].iloc[i], shape, frame["filename"].iloc[i], mask.shape)
            except InputError as error:
                bad.append((int(frame["line"].iloc[i]), str(error)))
            else:
                write_picture(supports[i], support_of(enlarge(probability, shape), mask))
    report_bad_rows(args.list, bad, "Correct or remove these rows.")
    write_list(pd.DataFrame({"img": frame["img"], "filename": _in_root(paths, args)}), f"{out}.csv")
    if supports:
        supported = frame.drop(columns="line").assign(support=_in_root(supports, args))
        write_list(supported, f"{out}_support.csv")
    replace_text(about, json.dumps(record, indent=1) + "\n")
    count = len(args.checkpoint)
    print(f"{out}: {len(paths)} masks from {count} checkpoint{'s' * (count > 1)}; their list is {out}.csv")


def support_of(probability: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """p(given label) x 255 of every pixel, (H, W) uint8, from (C, H, W) probabilities and a mask (H, W); 255 of void.

    C = 1: `probability` is that of label 1.
    """
    if len(probability) == 1:
        given = np.where(mask == 1, probability[0], 1 - probability[0])
    else:
        void = mask == IGNORE
        given = np.take_along_axis(probability, np.where(void, 0, mask)[None].astype(np.int64), 0)[0]
        given = np.where(void, 1, given)
    return (given * 255).round().clip(0, 255).astype(np.uint8)


def _names(frame) -> str:
    return hashlib.sha256("\n".join(frame["img"]).encode()).hexdigest()[:16]


def _stamps(frame, args) -> list:
    found = stamp_files([str(Path(args.data_root, name)) for name in frame["filename"]])
    bad = [(line, str(one)) for line, one in zip(frame["line"], found, strict=True) if isinstance(one, InputError)]
    report_bad_rows(args.list, bad, "Correct --data-root, the list or the files.")
    return found


def _in_root(paths, args) -> list[str]:
    return [from_root(path, args.data_root) for path in paths]


def _claim(out: Path, about: Path, paths: list[Path], source: str) -> None:
    """Make the folder ours before anything in it is overwritten; InputError if it holds files of somebody else."""
    listed = Path(f"{out}.csv")
    if not about.exists():
        foreign = next((p for p in paths if p.exists()), listed if listed.exists() else None)
        if foreign:
            raise InputError(f"{foreign}: exists and was not written by this tool; choose another --out")
    if listed.exists() and listed.samefile(source):
        raise InputError(f"{listed}: the list of the masks would overwrite --list; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    replace_text(about, json.dumps({"complete": False}) + "\n")


def load_teachers(frame, checkpoints, args) -> Teachers:
    """The networks of `checkpoints`, ready to predict the images of a list; InputError if they do not go together."""
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    nets, states = zip(*(load_network(p) for p in checkpoints), strict=True)
    nets = [net.to(device, memory_format=torch.channels_last).eval() for net in nets]
    if isinstance(getattr(args, "trusted", False), str):
        check_trusted(frame, checkpoints, states, args)
    use = who_predicts(frame, states, args)
    classes = {state["model"]["classes"] for state in states}
    if len(classes) > 1:
        raise InputError(f"{', '.join(map(str, checkpoints))}: they have different classes: {sorted(classes)}")
    leaks = 0 if args.folds else int(_seen(frame, states).any(axis=1).sum())
    return Teachers(nets, states[0]["model"], use, leaks, device)


def who_predicts(frame, states, args) -> np.ndarray:
    """(images, checkpoints) bool: which teacher predicts which image.

    With --folds only those not trained on the image; InputError for an image all of them have seen. Else all, with a
    warning on stderr if some were trained on images of the list.
    """
    unseen = ~_seen(frame, states)
    if args.folds:
        if args.folds != len(states):
            raise InputError(f"--folds {args.folds}: needs as many checkpoints, not {len(states)}")
        bad = [(row.line, f"every teacher was trained on {row.img}") for row in frame[~unseen.any(axis=1)].itertuples()]
        bad += [(row.line, f"no teacher was trained on {row.img}") for row in frame[unseen.all(axis=1)].itertuples()]
        report_bad_rows(args.list, bad, "Cut folds with utils/prepare_data.py folds and train one teacher on each.")
        return unseen
    leaks = int((~unseen).any(axis=1).sum())
    if leaks:
        what = f"{leaks} of {len(frame)} images trained the teacher itself, which will agree with their masks"
        warn(f"{what}; use --folds for masks without this leak")
    return np.ones_like(unseen)


def check_trusted(frame, checkpoints, states, args) -> None:
    """InputError unless every teacher was trained on images of the list --trusted only, and on none of the judged list.

    Images are told apart by the stems of their files. Weights that training began with (--load) are not looked at.
    """
    trusted = image_keys(read_list(args.trusted, ("img",))["img"])
    for path, state in zip(checkpoints, states, strict=True):
        if "images" not in state:
            raise InputError(f"{path}: does not say which images trained it; leave the list after --trusted out")
        count = int((~torch.isin(state["images"], trusted)).sum())
        if count:
            what = f"{count} of the {len(state['images'])} images that trained it are not in {args.trusted}"
            raise InputError(f"{path}: {what}; train the teacher on that list alone")
    known = frame[_seen(frame, states).any(axis=1)]
    bad = [(row.line, f"{row.img} trained the teacher") for row in known.itertuples()]
    report_bad_rows(args.list, bad, f"Take them out of the judged list, or out of {args.trusted} and train again.")


def probabilities(frame, teachers: Teachers, args) -> Iterator[tuple[int, np.ndarray, tuple[int, int]]]:
    """(row, (C, h, w) float32 probabilities at the network's size, (H, W) of the image) of every image, in order.

    One batch is in memory at a time. Images that cannot be read raise one InputError, which names all of them.
    """
    size = teachers.model["size"] if args.size < 0 else args.size
    images = Images(frame, args.data_root, size)
    batch_size = args.batch_size if size else 1
    loader = DataLoader(images, batch_size, collate_fn=list, **loader_processes(args.workers))
    bad = []
    for batch in tqdm(loader, f"predicting {args.list}", leave=False, disable=None):
        bad += [(int(frame["line"].iloc[i]), shape) for i, image, shape in batch if image is None]
        batch = [sample for sample in batch if sample[1] is not None]
        if bad or not batch:
            continue
        image = torch.stack([sample[1] for sample in batch])
        probability = _predict(image, teachers.use[[sample[0] for sample in batch]], teachers, args.precision)
        for (i, _, shape), p in zip(batch, probability.cpu().numpy(), strict=True):
            yield i, p, shape
    report_bad_rows(args.list, bad, "Correct or remove these rows.")


@torch.inference_mode()
def _predict(image, use, teachers, precision):
    """(N, H, W, 3) uint8 -> (N, C, H, W): the mean of the networks that predict each image."""
    device = teachers.device
    image = image.to(device).permute(0, 3, 1, 2)
    share = torch.from_numpy(use).to(device).float()
    share = share / share.sum(1, keepdim=True)
    probability = 0
    for k, net in enumerate(teachers.nets):
        if share[:, k].any():
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                logits = net(image)
            probability = probability + to_probability(logits) * share[:, k, None, None, None]
    return probability


def _seen(frame, states) -> np.ndarray:
    """(images, checkpoints) bool: which checkpoint was trained on which image."""
    return np.stack([_trained_on(frame["img"], state) for state in states], axis=1)


def _trained_on(images, state) -> np.ndarray:
    return torch.isin(image_keys(images), state.get("images", torch.empty(0, dtype=torch.int64))).numpy()


if __name__ == "__main__":
    launch(main, Args)
