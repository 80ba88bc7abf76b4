"""Passes that leave no trace in BatchNorm, and a network that sees several views of a batch in one call."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def batch_statistics(net: nn.Module, along: bool = False) -> Iterator[None]:
    """Have BatchNorm use the statistics of each batch, as this process alone sees it, and keep none of them.

    With `along` its forward derivative takes two passes over the tangents instead of many; it has no other one then.
    """
    layers = [(layer, layer.track_running_stats) for layer in net.modules() if isinstance(layer, _BatchNorm)]
    for layer, _ in layers:
        layer.track_running_stats = False
        layer.forward = partial(_normalise, layer, along and layer.affine)
    try:
        yield
    finally:
        for layer, tracked in layers:
            layer.track_running_stats = tracked
            del layer.forward


def _normalise(layer, along, x):
    # not as SyncBatchNorm, which would wait for other processes; in float32, since the forward derivative of a layer
    # with 16-bit input and 32-bit parameters comes out in another type than its value
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if along:
        return _NormAlong.apply(wide, layer.weight, layer.bias, layer.eps)[0].to(x.dtype)
    return _BatchNorm.forward(layer, wide).to(x.dtype)


class _NormAlong(torch.autograd.Function):
    """y = g (x - m) s + b with the batch's mean m and 1 / standard deviation s, and its derivative along a tangent.

    dy = g s dx + (dg - g s^2 c) s (x - m) + db - g s mean(dx), where c = mean((x - m) dx).
    """

    @staticmethod
    def forward(x, weight, bias, eps):
        return torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_forward(*inputs[:2], *output[1:])

    @staticmethod
    def jvp(ctx, dx, dweight, dbias, _):
        x, weight, mean, scale = ctx.saved_tensors
        axes, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
        dmean = dx.mean(axes)
        together = (x * dx).mean(axes) - mean * dmean
        of_dx = weight * scale
        of_x = (dweight - of_dx * scale * together) * scale
        rest = dbias - of_dx * dmean - of_x * mean
        found = torch.addcmul(rest.view(shape), dx, of_dx.view(shape))
        return torch.addcmul(found, x, of_x.view(shape)), None, None


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
