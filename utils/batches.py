"""Which images make the batches of a pass."""

import torch
from torch.utils.data import Sampler


class Batches(Sampler):
    """Batches of this process's share of the indices: shuffled by (seed, epoch) for training, else in order.

    Evaluation counts every index once. Training gives every process equally many, and leaves out a last batch of one
    image, which BatchNorm cannot normalise. The first `skip` batches of a pass are left out: they are done.
    """

    def __init__(self, n: int, batch_size: int, rank: int, world: int, seed: int | None = None):
        self.n, self.size, self.rank, self.world, self.seed = n, batch_size, rank, world, seed
        self.epoch = self.skip = 0

    def __iter__(self):
        order = torch.arange(self.n)
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = torch.randperm(self.n, generator=generator)
        own = order[self.rank : self._used() : self.world].tolist()
        return iter([own[i : i + self.size] for i in range(0, len(own), self.size)][self.skip : len(self)])

    def __len__(self):
        whole, rest = divmod(self._own(), self.size)
        alone = self.seed is not None and rest == 1 and whole > 0 and self.size > 1
        return whole + (rest > 0) - alone

    def images(self, first: int, batches: int) -> int:
        """How many indices `batches` batches hold together, from the `first` on."""
        return min(self._own(), min(first + batches, len(self)) * self.size) - first * self.size

    def fewest(self) -> int:
        """How many batches every process has, whatever its share."""
        return len(self) if self.seed is not None else -(-(self.n // self.world) // self.size)

    def _own(self):
        return len(range(self.rank, self._used(), self.world))

    def _used(self):
        return self.n if self.seed is None else self.n - self.n % self.world
