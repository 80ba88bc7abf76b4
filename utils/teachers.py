"""Networks that predict the images of a list: an average of several, or each image by those that never saw it."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from utils.checkpoint import image_keys, load_network
from utils.errors import InputError, report_bad_rows, warn
from utils.images import read_image
from utils.inference import Plan, inputs_of, to_probability
from utils.interrupt import loader_processes
from utils.lists import read_list


class Teachers(NamedTuple):
    """Networks on their device, what they are (size, classes), who predicts which image, and how many images leak."""

    nets: list
    model: dict
    use: np.ndarray
    leaks: int
    device: torch.device


class Images(Dataset):
    """Photographs of a list, resized for the network at every scale, with their own height and width."""

    def __init__(self, frame, root, plan):
        self.paths, self.plan = [Path(root) / img for img in frame["img"]], plan

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        try:
            image = read_image(self.paths[i])
        except InputError as error:
            return i, None, str(error)
        return i, [torch.from_numpy(shown) for shown in inputs_of(image, self.plan)], image.shape[:2]


def load_teachers(frame, checkpoints, args) -> Teachers:
    """The networks of `checkpoints`, ready to predict the images of a list; InputError if they do not go together."""
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    nets, states = zip(*(load_network(p, getattr(args, "net", -1)) for p in checkpoints), strict=True)
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


def probabilities(
    frame, teachers: Teachers, args, present: np.ndarray | None = None, scales=(1.0,), flip: bool = False
) -> Iterator[tuple[int, np.ndarray, tuple[int, int]]]:
    """(row, (C, h, w) float32 probabilities at the network's size, (H, W) of the image) of every image, in order.

    `present` (N, C) bool, of binary masks (N, 2), keeps to the classes of an image; `scales` and `flip` are averaged
    over. One batch is in memory at a time. Images that cannot be read raise one InputError, which names all of them.
    """
    size = teachers.model["size"] if args.size < 0 else args.size
    plan = Plan(size, scales=tuple(scales), flip=flip, precision=args.precision)
    images = Images(frame, args.data_root, plan)
    batch_size = args.batch_size if size else 1
    loader = DataLoader(images, batch_size, collate_fn=list, **loader_processes(args.workers))
    bad = []
    for batch in tqdm(loader, f"predicting {args.list}", leave=False, disable=None):
        bad += [(int(frame["line"].iloc[i]), shape) for i, image, shape in batch if image is None]
        batch = [sample for sample in batch if sample[1] is not None]
        if bad or not batch:
            continue
        rows = [sample[0] for sample in batch]
        images = [torch.stack(shown) for shown in zip(*(sample[1] for sample in batch), strict=True)]
        held = None if present is None else torch.from_numpy(present[rows]).to(teachers.device)
        shape = (size, size) if size else batch[0][2]
        probability = _predict(images, shape, teachers.use[rows], teachers, plan, held)
        for (i, _, shape), p in zip(batch, probability.cpu().numpy(), strict=True):
            yield i, p, shape
    report_bad_rows(args.list, bad, "Correct or remove these rows.")


@torch.inference_mode()
def _predict(images, shape, use, teachers, plan, present):
    """(N, h, w, 3) uint8 of every scale -> (N, C, *shape): the mean of the networks that predict each image."""
    device, total = teachers.device, 0
    share = torch.from_numpy(use).to(device).float()
    share = share / share.sum(1, keepdim=True)
    for image in images:
        image, probability = image.to(device).permute(0, 3, 1, 2), 0
        for k, net in enumerate(teachers.nets):
            if share[:, k].any():
                with torch.autocast(device.type, torch.bfloat16, enabled=plan.precision == "bf16"):
                    logits = net(image)
                    mirrored = net(image.flip(3)).flip(3) if plan.flip else logits
                found = to_probability(logits, present)
                found = (found + to_probability(mirrored, present)) / 2 if plan.flip else found
                probability = probability + found * share[:, k, None, None, None]
        if probability.shape[2:] != shape:
            probability = F.interpolate(probability, shape, mode="bilinear")
        total = total + probability
    return total / len(images)


def _seen(frame, states) -> np.ndarray:
    """(images, checkpoints) bool: which checkpoint was trained on which image."""
    return np.stack([_trained_on(frame["img"], state) for state in states], axis=1)


def _trained_on(images, state) -> np.ndarray:
    return torch.isin(image_keys(images), state.get("images", torch.empty(0, dtype=torch.int64))).numpy()
