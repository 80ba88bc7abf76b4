"""What a small clean set says of a batch: its gradient, one virtual step ahead, and the derivative along it.

A coefficient of a noisy example (its weight, the trust in its label) is good if raising it would lower the loss of the
clean set, the probe. With one virtual step of SGD the derivative of that loss by the coefficient is, exactly, minus the
step times the product of the example's gradient and the probe's gradient G (Ren et al., "Learning to reweight examples
for robust deep learning", ICML 2018). All these products come from the derivative of the batch's logits along G, one
forward pass with tangents: no gradient of a gradient, and BatchNorm counts.
"""

from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from utils.errors import InputError, first_line
from utils.models.views import batch_statistics, carrying_tangents

Named = dict[str, Tensor]  # a tensor for every parameter of a network, by its name
# length of a finite difference, as a share of the parameters' own length: a deep network that has not learnt bends so
# much that 1e-3 points elsewhere, and from 1e-6 on float32 begins to round the difference
RELATIVE = 1e-5


def parameters_of(net: nn.Module) -> Named:
    """What a network learns, as it is now, without gradient; a view, not a copy."""
    return {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}


def gradient(net: nn.Module, parameters: Named, loss: Callable, scale: float = 1.0) -> tuple[Tensor, Named]:
    """(value, gradient by the parameters) of `loss`(forward), a scalar; `forward` gives the logits of an image batch.

    The backward pass is that of `scale` x the value, which keeps small float16 gradients from vanishing.
    """
    leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    with batch_statistics(net), torch.enable_grad():
        value = loss(lambda image: functional_call(net, leaves, (image,)))
    found = torch.autograd.grad(value * scale, list(leaves.values()), materialize_grads=True)
    return value.detach(), {name: g / scale for name, g in zip(leaves, found, strict=True)}


def gradient_of(value: Tensor, net: nn.Module) -> Named:
    """The gradient of a scalar that was computed with the network itself; its graph stays."""
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(value, list(named.values()), retain_graph=True, materialize_grads=True)
    return dict(zip(named, found, strict=True))


@torch.no_grad()
def momentum_of(net: nn.Module, optimizer) -> Named:
    """The momentum buffers of SGD; zeros where there are none yet, and for other optimizers."""
    states = {name: optimizer.state[p].get("momentum_buffer") for name, p in net.named_parameters() if p.requires_grad}
    own = parameters_of(net)
    return {name: torch.zeros_like(own[name]) if buffer is None else buffer for name, buffer in states.items()}


@torch.no_grad()
def look_ahead(parameters: Named, gradients: Named, momentum: Named, step: float, inertia=0.9, decay=0.0) -> Named:
    """The parameters after one virtual step of SGD: p - step (inertia m + g + decay p)."""
    return {name: p - step * (inertia * momentum[name] + gradients[name] + decay * p) for name, p in parameters.items()}


def probe_direction(net, inner: Tensor | None, momentum: Named, probe_loss: Callable, step, inertia, decay, scale=1.0):
    """(the probe's loss, its gradient G), both one virtual step ahead: eq. 2 of IEG.

    The step follows the gradient of `inner`, the mean loss of the noisy batch as the network itself computed it, or,
    where that is None (L2R, whose weights begin at 0), weight decay and momentum alone. G includes the decay. With a
    `step` of 0 G is that of the network as it is.
    """
    ahead = parameters_of(net)
    if step:
        zeros = {name: torch.zeros_like(p) for name, p in ahead.items()} if inner is None else {}
        ahead = look_ahead(ahead, zeros or gradient_of(inner, net), momentum, step, inertia, decay)
    value, found = gradient(net, ahead, probe_loss, scale)
    if decay:
        found = {name: g + decay * ahead[name] for name, g in found.items()}
    return value, found


@torch.no_grad()
def derivative(net: nn.Module, parameters: Named, direction: Named, compute: Callable, how: str = "jvp"):
    """(values, derivatives along `direction`) of the tensors of `compute`(forward), tuples; no gradient is kept.

    `how` "jvp": forward-mode differentiation, one pass that also carries tangents. "difference": the finite difference
    of two plain passes with the same dropout, for networks with an operation that has no forward derivative; in
    float32, since it subtracts numbers that are nearly equal. InputError for a network of that kind with "jvp".
    """

    def at(parameters):
        return compute(lambda image: functional_call(net, parameters, (image,)))

    if how == "difference":
        with batch_statistics(net):
            return _difference(at, parameters, direction)
    # the fused kernels of attention have no forward derivative
    with batch_statistics(net, along=True), sdpa_kernel(SDPBackend.MATH), _said():
        return jvp(at, (parameters,), (direction,))


def step_along(net: nn.Module, own: nn.Module, direction: Named, image: Tensor) -> tuple[Tensor, Tensor]:
    """(logits, their derivative along `direction`) of a pass that is also that of the real step: its graph is kept.

    `net` is the network as it is trained, perhaps in a wrapper around `own`, whose parameters `direction` names. A
    third of a plain step cheaper than `derivative` and a pass of its own. InputError as there.
    """
    along = {id(p): direction[name] for name, p in own.named_parameters() if name in direction}
    with forward_ad.dual_level(), carrying_tangents(net), sdpa_kernel(SDPBackend.MATH):
        duals = {name: forward_ad.make_dual(p, along[id(p)]) for name, p in net.named_parameters() if id(p) in along}
        with _said():
            logits, tangent = forward_ad.unpack_dual(functional_call(net, duals, (image,)))
    return logits, tangent.detach()


@contextmanager
def _said():
    try:
        yield
    except NotImplementedError as error:
        what = f"this network has no forward derivative ({first_line(error)})"
        raise InputError(f"--meta-grad jvp: {what}; use --meta-grad difference") from None


def _difference(at, parameters, direction):
    lengths = [torch.stack(torch._foreach_norm(list(named.values()))).norm() for named in (parameters, direction)]
    step = RELATIVE * lengths[0] / lengths[1].clamp(min=1e-30)
    device = next(iter(parameters.values())).device
    with torch.autocast(device.type, enabled=False):
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            here = at(parameters)
        there = at({name: p + step * direction[name] for name, p in parameters.items()})  # drops what `here` dropped
    return here, tuple((b - a) / step for a, b in zip(here, there, strict=True))
