"""Passes that leave no trace in BatchNorm, and a network that sees several views of a batch in one call."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def batch_statistics(net: nn.Module) -> Iterator[None]:
    """Have BatchNorm use the statistics of each batch, as this process alone sees it, and keep none of them."""
    layers = [(layer, layer.track_running_stats) for layer in net.modules() if isinstance(layer, _BatchNorm)]
    for layer, _ in layers:
        layer.track_running_stats = False
        layer.forward = partial(_normalise, layer)
    try:
        yield
    finally:
        for layer, tracked in layers:
            layer.track_running_stats = tracked
            del layer.forward


def _normalise(layer, x):
    # not as SyncBatchNorm, which would wait for other processes; in float32, since the forward derivative of a layer
    # with 16-bit input and 32-bit parameters comes out in another type than its value
    return _BatchNorm.forward(layer, x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)


class ManyViews(nn.Module):
    """`net` on every one of several batches, a tuple of what it gives; one batch alone gives that itself.

    Each has the BatchNorm statistics of its own, and only the first moves the running ones. All go through one call, as
    DistributedDataParallel wants it.
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, first: Tensor, *others: Tensor):
        found = self.net(first)
        if not others:
            return found
        with batch_statistics(self.net):
            return (found, *[self.net(view) for view in others])
