"""What a training loop learns in an epoch: means over its examples, and the last value of every image."""

import numpy as np
import torch
from torch import Tensor

from utils.errors import InputError


class Averages:
    """Means over an epoch, summed where the tensors are, so that a training loop never waits for the device.

    `constants` are what is known when the epoch begins. An epoch that is taken up inside goes on with what it had.
    """

    def __init__(self, run, **constants):
        self.run, self.constants, self.sums, self.left_out, self.tables = run, constants, {}, [0, []], {}
        run.carry("averages", self)

    def state_dict(self) -> dict:
        sums = {names: sums.cpu() for names, sums in self.sums.items()}
        tables = {name: table.cpu() for name, table in self.tables.items()}
        return {"constants": self.constants, "sums": sums, "left_out": self.left_out, "tables": tables}

    def load_state_dict(self, state: dict) -> None:
        self.constants, self.left_out = state["constants"], state["left_out"]
        self.sums = {names: sums.to(self.run.device) for names, sums in state["sums"].items()}
        self.tables = {name: table.to(self.run.device) for name, table in state["tables"].items()}

    def leave_out(self, images: list[str]) -> None:
        """Count an update that --skip-nonfinite left out, and the images that caused it."""
        self.left_out = [self.left_out[0] + 1, self.left_out[1] + images]

    def add(self, noisy: Tensor | None = None, **values) -> None:
        """Add (n,) tensors, or pairs (parts, wholes) of tensors whose ratio of sums is wanted.

        With `noisy` (n,) (1, 0, or -1 unknown) each value also has a mean over clean and over noisy examples. A batch
        that was left out counts nowhere.
        """
        if self.run.spoilt:
            return
        pairs = {name: value for name, value in values.items() if isinstance(value, tuple)}
        for name, (part, whole) in pairs.items():
            self._add(name, torch.stack([part.detach().sum(), whole.detach().sum()])[:, None].double())
        names = [name for name in values if name not in pairs]
        if not names:
            return
        # all means of a batch at once: a few small kernels, where one for each would hold up a fast device
        each = torch.stack([values[name].detach() for name in names]).double()
        kinds = torch.ones_like(each[:1]) if noisy is None else torch.stack([noisy >= -1, noisy == 0, noisy == 1])
        parts, wholes = (each[:, None] * kinds).sum(2).flatten(), kinds.sum(1).repeat(len(names))
        ends = [""] if noisy is None else ["", "_clean", "_noisy"]
        self._add(",".join(name + end for name in names for end in ends), torch.stack([parts, wholes]))

    def keep(self, **values) -> None:
        """Note a value (n,) of every image of the batch; how well it tells clean from noisy masks is logged."""
        if self.run.spoilt:
            return
        _, _, dataset, index = self.run.images
        index = index.to(self.run.device, non_blocking=True)
        for name, value in values.items():
            if name not in self.tables:
                self.tables[name] = torch.full((len(dataset),), torch.nan, device=self.run.device)
            self.tables[name][index] = value.detach().float()

    def of_images(self) -> dict[str, np.ndarray]:
        """What `keep` noted, from all processes: {name: (images of the list,)}, NaN for images that were left out."""
        found = {}
        for name, table in self.tables.items():
            seen = self.run.sum(torch.stack([table.nan_to_num(), (~table.isnan()).float()]))
            found[name] = (seen[0] / seen[1]).cpu().numpy()
        return found

    def _add(self, names, sums):
        self.sums[names] = self.sums[names] + sums if names in self.sums else sums

    def result(self, prefix: str = "train_") -> dict[str, float]:
        """The constants and {prefix + name: mean} over all processes; means of nothing are left out.

        For what was given to `keep`, name_auroc: the chance that a clean image has a larger value than a noisy one.
        With --skip-nonfinite also how many updates were left out, and because of which images.
        """
        found = dict(self.constants)
        if self.run.args.skip_nonfinite:
            every = self.run.gather(self.left_out)
            found["left_out"], found["left_out_images"] = every[0][0], sorted({i for _, some in every for i in some})
        if not self.sums:
            raise InputError(f"{self.run.dir}: no batch of an epoch had a finite loss; lower --learning-rate")
        names = ",".join(self.sums).split(",")
        parts, wholes = self.run.sum(torch.cat(list(self.sums.values()), 1)).tolist()
        means = zip(names, parts, wholes, strict=True)
        found |= {prefix + name: part / whole for name, part, whole in means if whole > 0}
        ranked = {prefix + f"{name}_auroc": self._auroc(values) for name, values in self.of_images().items()}
        return found | {name: auroc for name, auroc in ranked.items() if auroc is not None}

    def _auroc(self, values):
        noisy = self.run.images[2].noisy
        known = (noisy >= 0) & ~np.isnan(values)
        clean = noisy[known] == 0
        if clean.all() or not clean.any():
            return None
        from sklearn.metrics import roc_auc_score  # a second to import, only needed here

        return float(roc_auc_score(clean, values[known]))
