"""Lists of images without masks, and the batches of labelled and unlabelled images that semi-supervised scripts see."""

import numpy as np
import torch
from torch.utils.data import Dataset

from utils.augment import photometric
from utils.dataset import ListDataset, check_leak, open_lists, reading
from utils.errors import InputError
from utils.images import IGNORE, read_image

WEAK, STRONG = 1, 2  # streams of draws beside that of the labelled images


class UnlabelledDataset(ListDataset):
    """A `ListDataset` that needs no masks (column `img` only); without them every pixel of `mask` is 255, unknown.

    Masks that the list has are for the log: nothing learns from them.
    """

    need = ("img",)

    def __init__(self, path, *args, **how):
        self.known = False
        super().__init__(path, *args, **how)

    def _paths(self):
        self.known = "filename" in self.frame
        if not self.known:  # whatever reads a mask reads the image in its place
            self.frame["filename"] = self.frame["img"]
        return super()._paths()

    def _decode(self, i):
        return super()._decode(i) if self.known else [self._decode_image(i), self._decode_mask(i)]

    def _decode_mask(self, i):
        if self.known:
            return super()._decode_mask(i)
        return self._finished(i, np.full(read_image(self.files[0][i]).shape[:2], IGNORE, np.uint8))

    def _labels(self, mask):
        return not self.known or super()._labels(mask)


class PairedDataset(Dataset):
    """A labelled and an unlabelled image a sample; as many samples as the unlabelled list has rows.

    `image`, `mask`, `noisy`, `index` are of the labelled list: each image comes as often as any other, or once more,
    in an epoch, or, if it is the longer one, a new part of the list every epoch. With `views` of 1 or more also `weak`
    (H, W, 3) uint8, the unlabelled image under the augmentation of the labelled ones, and `truth` (H, W), its mask if
    the list has one, else 255; further views, `strong` (views - 1, H, W, 3), are `weak` with changed colours and blur.
    Draws are keyed by (seed, epoch, image), so that a sample does not depend on what was asked for before.
    """

    def __init__(self, labelled: ListDataset, unlabelled: UnlabelledDataset, views: int = 1):
        self.labelled, self.unlabelled, self.views = labelled, unlabelled, views
        self.path, self.frame, self.noisy, self.plain = labelled.path, labelled.frame, labelled.noisy, labelled.plain
        self.change = photometric() if views > 1 else None
        self.order = (-1, None, None)

    def __len__(self):
        return len(self.unlabelled)

    def __getitem__(self, i):
        return {name: values[0] for name, values in self.__getitems__([i]).items()}

    def __getitems__(self, indices):
        """The batch of these samples, `image` (B, H, W, 3), ..., as `ListDataset` has it."""
        rows, times, others = self._rows(np.asarray(indices))
        pairs = [self._drawn(self.labelled, i, n) for i, n in zip(rows, times, strict=True)]
        batch = {"image": _stack([image for image, _ in pairs]), "mask": _stack([mask for _, mask in pairs])}
        batch |= {"noisy": torch.from_numpy(self.noisy[rows]), "index": torch.from_numpy(rows)}
        if not self.views:
            return batch
        pairs = [self._drawn(self.unlabelled, i, -WEAK) for i in others]
        batch |= {"weak": _stack([image for image, _ in pairs]), "truth": _stack([mask for _, mask in pairs])}
        if self.change:
            views = [
                np.stack([self.change(image, self._seed(i, -STRONG - k)) for k in range(self.views - 1)])
                for i, (image, _) in zip(others, pairs, strict=True)
            ]
            batch["strong"] = _stack(views)
        return batch

    collate = staticmethod(ListDataset.collate)

    @property
    def epoch(self) -> int:
        return self.labelled.epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self.labelled.epoch = self.unlabelled.epoch = epoch

    def takes_time(self) -> bool:
        return self.views > 1 or self.labelled.takes_time() or self.unlabelled.takes_time()

    def one_shape(self) -> bool:
        shapes = np.concatenate([self.labelled.shapes, self.unlabelled.shapes])
        return bool((shapes == shapes[0]).all())

    def side(self) -> int:
        return self.labelled.side()

    def _rows(self, places):
        """(row of the labelled list, how often it came before, row of the unlabelled list) of places in an epoch."""
        if self.order[0] != self.epoch:
            rng = np.random.default_rng([self.labelled.seed, self.epoch, WEAK])
            self.order = self.epoch, rng.permutation(len(self.labelled)), rng.permutation(len(self))
        _, some, others = self.order
        times, row = np.divmod(places, len(self.labelled))
        last = times == len(self) // len(self.labelled)  # a part of the list, and not always the same
        return np.where(last, some[row], row), times, others[places]

    def _drawn(self, dataset, i, stream):
        image, mask = dataset.plain(i)
        if dataset.augment is None:
            return image, mask
        # the first time an image comes in an epoch its draw is that of a `ListDataset`
        return dataset.augment(image, mask, self._seed(i, stream) if stream else dataset.key(i))

    def _seed(self, i, stream):
        key = [self.labelled.seed, self.epoch, int(i), abs(int(stream)), int(stream < 0)]
        return int(np.random.SeedSequence(key).generate_state(1)[0])


def _stack(arrays) -> torch.Tensor:
    return torch.from_numpy(np.stack(arrays))


def open_semi(args, views: int) -> list[Dataset]:
    """The training (a `PairedDataset`), validation and (if there is one) test list, all files checked.

    Without --unlabelled_csv the training list is the labelled one alone, if `views` is 0.
    """
    lists = open_lists(args)
    if not args.unlabelled_csv:
        if views:
            raise InputError("--unlabelled_csv: name a list of images (CSV with a column img)")
        return lists
    unlabelled = UnlabelledDataset(args.unlabelled_csv, augment=args.augment, seed=args.seed, **reading(args))
    if args.test_csv:
        check_leak(lists[-1], unlabelled)
    lists[0] = PairedDataset(lists[0], unlabelled, views)
    if not lists[0].one_shape():
        raise InputError(f"{args.unlabelled_csv}: images of different sizes with --size 0; use --size N")
    return lists
