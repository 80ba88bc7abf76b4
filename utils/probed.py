"""A noisy list beside a small clean one, the probe: batches hold images of both."""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch

from utils.args import TrainArgs
from utils.augment import photometric
from utils.dataset import ListDataset, check_leak, open_lists, reading
from utils.errors import InputError, warn
from utils.images import IGNORE, check_sizes

PROBE, STRONG = 1, 2  # streams of draws beside that of the images
TRIES = 10  # views of a probe image that are drawn until one holds a foreground


@dataclass
class ProbedArgs(TrainArgs):
    probe_csv: Annotated[str, "a small list of clean masks, on which the labels of the others are judged"] = ""
    method: Annotated[
        Literal["supervised", "l2r", "ieg"],
        "l2r: masks count as much as they help the probe; ieg: labels are replaced, too; supervised: the baseline",
    ] = "ieg"
    level: Annotated[Literal["image", "patch", "pixel"], "what has a weight, and a label that is kept or not"] = "patch"
    patch: Annotated[int, "level patch: its side in pixels"] = 8
    floor: Annotated[float, "share of the plain loss in the weighted one; 1: all of it; -1: l2r 0.5, ieg 0"] = -1.0
    class_shares: Annotated[
        Literal["auto", "on", "off"],
        "every class keeps its share of the loss, whatever its pixels weigh; auto: where one is rarer than 1 in 20",
    ] = "auto"
    relabel: Annotated[bool, "ieg: labels that do not help the probe give way to the network's own"] = True
    hysteresis: Annotated[float, "ieg: labels stay unless the gain of replacing them is this times the mean one"] = 0.0
    pseudo_floor: Annotated[float, "ieg: labels stay where no class of the network's own is as probable"] = 0.0
    grad_eps_init: Annotated[float, "ieg: trust in the given labels where they are judged and weighted"] = 0.9
    temperature: Annotated[float, "ieg: sharpening of the network's own labels; 1: none"] = 0.5
    mix: Annotated[
        Literal["none", "cutmix", "mixup"], "ieg: mixtures of probe, images and strong views, learnt besides"
    ] = "cutmix"
    ce_factor: Annotated[float, "ieg: weight of the mixtures that do not begin with the probe"] = 5.0
    consistency_factor: Annotated[float, "ieg: weight of the divergence of strong from weak views"] = 20.0
    meta_step: Annotated[float, "step of the look-ahead before the probe is asked; 0: none, as l2r was published"] = 0.0
    meta_momentum: Annotated[float, "momentum of that step, with --optimizer sgd"] = 0.9
    meta_grad: Annotated[Literal["jvp", "difference"], "difference: for networks without forward derivative"] = "jvp"


class ProbedDataset(ListDataset):
    """A `ListDataset` whose batches also hold as many images of `probe`: `probe` (B, H, W, 3), `probe_mask` (B, H, W).

    They are drawn for every batch, each as often as any other or once more, under the augmentation of the images, so
    that a mask without foreground is seldom among them. With `views` also `strong` (B, H, W, 3), the images of the
    batch with changed colours, blurred and with a grey square (CutOut), and `clean` (B, H, W), the clean masks, where
    the list names them. Draws are keyed by (seed, epoch, image).
    """

    def follow(self, probe: ListDataset, views: bool) -> None:
        """Take the probe from this list."""
        self.probe, self.change = probe, photometric() if views else None
        self.compared, self.cleans = self.clean_known(), {}

    def __getitems__(self, indices):
        batch = super().__getitems__(indices)
        rng = np.random.default_rng([self.seed, self.epoch, int(indices[0]), PROBE])
        rows = rng.permutation(len(self.probe))
        pairs = [self._probe_pair(int(rows[k % len(rows)]), i) for k, i in enumerate(indices)]
        for name, arrays in zip(("probe", "probe_mask"), zip(*pairs, strict=True), strict=True):
            batch[name] = torch.from_numpy(np.stack(arrays))
        if self.compared:
            batch["clean"] = torch.from_numpy(np.stack([self._clean_view(i) for i in indices]))
        if self.change:
            strong = [self._strong(image, i) for image, i in zip(batch["image"].numpy(), indices, strict=True)]
            batch["strong"] = torch.from_numpy(np.stack(strong))
        return batch

    def takes_time(self) -> bool:
        return self.change is not None or super().takes_time() or self.probe.takes_time()

    def _probe_pair(self, row, i):
        image, mask = self.probe.plain(row)
        if self.augment is None:
            return image, mask
        for n in range(TRIES):
            view = self.augment(image, mask, self._key(i, PROBE, n))
            if holds_something(view[1]):
                break
        return view

    def _clean_view(self, i):
        image, clean = self.plain(i)[0], self.cleans.get(i)
        if clean is None:
            clean = self.clean(i)
            check_sizes(self.files[0][i], image.shape[:2], self.frame["clean"].iloc[i], clean.shape)
            if self.images[i] is not None:  # a list that is kept decoded; of a larger one nothing is
                self.cleans[i] = clean
        return clean if self.augment is None else self.augment(image, clean, self.key(i))[1]

    def _strong(self, image, i):
        image = self.change(image, self._key(i, STRONG)).copy()
        rng = np.random.default_rng(self._key(i, STRONG, 1))
        height, width = image.shape[:2]
        y, x = rng.integers(height), rng.integers(width)
        image[max(0, y - height // 4) : y + height // 4, max(0, x - width // 4) : x + width // 4] = 128
        return image

    def _key(self, i, *stream):
        return int(np.random.SeedSequence([self.seed, self.epoch, int(i), *stream]).generate_state(1)[0])


def holds_something(mask: np.ndarray) -> bool:
    """Whether a mask holds anything but background and void."""
    return bool(((mask > 0) & (mask < IGNORE)).any())


def open_probed(args) -> list[ListDataset]:
    """The training list (a `ProbedDataset`, unless --method supervised), the validation and, if given, the test list.

    InputError for flags and lists that do not go together.
    """
    _check(args)
    if args.method == "supervised":
        return open_lists(args)
    lists = open_lists(args, kind=ProbedDataset)
    probe = ListDataset(args.probe_csv, **reading(args))
    if len(lists) == 3:
        check_leak(lists[2], probe)
    both = len({*probe.real} & {*lists[1].real})
    if both and args.select == "best":
        warn(
            f"{both} images of {args.valid_csv} are in the probe; they flatter the checkpoint it chooses: --select last"
        )
    known = len({*probe.real} & {*lists[0].real})
    if known:
        what = f"{known} images of {probe.path} are also in {args.train_csv}"
        warn(f"{what}; the probe knows them, and judges their masks there by heart: leave them out of one of the lists")
    noisy = np.flatnonzero(probe.noisy == 1)
    if len(noisy):
        row = probe.frame.iloc[noisy[0]]
        what = f"{len(noisy)} masks are noisy by the column iterations, the first in line {row['line']}: {row['img']}"
        raise InputError(f"{probe.path}: {what}. Labels are judged on clean masks: name a list of such")
    shapes = np.concatenate([lists[0].shapes, probe.shapes])
    if (shapes != shapes[0]).any():
        raise InputError(f"{probe.path}: images of another size than those of {args.train_csv}; use --size N")
    lists[0].follow(probe, views=args.method == "ieg" and sees_strong_views(args))
    return lists


def sees_strong_views(args) -> bool:
    """Whether a part of IEG needs them."""
    return args.relabel or args.mix != "none" or args.consistency_factor > 0


def _check(args):
    if args.method != "supervised" and not args.probe_csv:
        raise InputError(f"--method {args.method}: name a list of clean masks with --probe_csv")
    if args.loss != "ce":
        raise InputError(f"--loss {args.loss}: this script learns by cross entropy; leave --loss out")
    if args.compat == "nlkd":
        raise InputError("--compat nlkd: the released code of NLKD has no such method; leave it out")
    if args.mix != "none" and not args.relabel and args.method == "ieg":
        raise InputError("--no-relabel: mixtures need the network's own labels; use --mix none with it")
    for flag, low, high in (("floor", -1, 1), ("grad_eps_init", 0, 1), ("pseudo_floor", 0, 1), ("meta_momentum", 0, 1)):
        if not low <= getattr(args, flag) <= high:
            raise InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must lie between {low} and {high}")
    for flag in ("hysteresis", "ce_factor", "consistency_factor", "meta_step"):
        if not 0 <= getattr(args, flag) < float("inf"):
            raise InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be 0 or more")
    if args.patch < 1:
        raise InputError(f"--patch {args.patch}: must be 1 or more")
