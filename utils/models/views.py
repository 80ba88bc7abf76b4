"""Passes that leave no trace in BatchNorm, and a network that sees several views of a batch in one call."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
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

    dy = g s (dx - mean(dx) - s^2 (x - m) mean((x - m) dx)) + dg s (x - m) + db.
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
        return _norm_tangent(x, dx, weight, dweight, dbias, mean, scale), None, None


def _norm_tangent(x, dx, weight, dweight, dbias, mean, scale):
    # The Jacobian of a normalisation is symmetric: along a tangent it does what the backward pass does to a gradient.
    nothing, eps = None, 0.0  # running statistics and eps are for layers that are not in training
    found, *_ = torch.ops.aten.native_batch_norm_backward(
        dx, x, weight, nothing, nothing, mean, scale, True, eps, [True, False, False]
    )
    of_x, shape = dweight * scale, [1, -1] + [1] * (x.dim() - 2)
    return found.add_(torch.addcmul((dbias - of_x * mean).view(shape), x, of_x.view(shape)))


@contextmanager
def carrying_tangents(net: nn.Module) -> Iterator[None]:
    """Have a pass of training, with its graph, carry tangents that keep no graph of their own.

    Values, running statistics and gradients are those of the pass without tangents; on a CPU to the last bit.
    """
    layers = [layer for layer in net.modules() if isinstance(layer, _BatchNorm) and _learns(layer)]
    others = [one for one in net.modules() if not [*one.children()] and one not in layers]
    hooks = [one.register_forward_hook(_forget_how) for one in others]
    for layer in layers:
        layer.forward = partial(_normalise_along, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
        for hook in hooks:
            hook.remove()


def _learns(layer):
    # any other kind takes torch's own derivative, which it has for a single process only
    usual = layer.training and layer.track_running_stats and layer.momentum is not None and layer.affine
    return usual and layer.weight.requires_grad and layer.bias.requires_grad and not isinstance(layer, nn.SyncBatchNorm)


def _forget_how(_, inputs, output):
    value, tangent = forward_ad.unpack_dual(output)
    return output if tangent is None else forward_ad.make_dual(value, tangent.detach())


def _normalise_along(layer, x):
    (x, dx), (weight, dweight), (bias, dbias) = map(forward_ad.unpack_dual, (x, layer.weight, layer.bias))
    layer.num_batches_tracked.add_(1)
    running = layer.running_mean, layer.running_var
    found, mean, scale = torch.native_batch_norm(x, weight, bias, *running, True, layer.momentum, layer.eps)
    with torch.no_grad():
        tangent = _norm_tangent(x, dx.to(x.dtype), weight, dweight, dbias, mean, scale)
    return forward_ad.make_dual(found, tangent.to(found.dtype))


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
