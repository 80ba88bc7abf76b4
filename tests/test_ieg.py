"""IEG and L2R: the arithmetic of a step against arrays of the original code and against the unrolled definition."""

import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from utils.errors import InputError
from utils.methods import ieg
from utils.methods.ieg_images import Mixed, further_losses, judge, judge_in_step, label_losses, total
from utils.methods.meta import (
    derivative,
    gradient,
    look_ahead,
    momentum_of,
    parameters_of,
    probe_direction,
    step_along,
)
from utils.models.views import ManyViews, batch_statistics

GOLDEN = Path(__file__).parent / "golden"


def golden(name):
    return {key: torch.from_numpy(np.asarray(array)) for key, array in np.load(GOLDEN / f"ieg_{name}.npz").items()}


def close(a, b, tolerance=1e-10):
    a, b = (torch.as_tensor(value).detach().double() for value in (a, b))
    assert a.shape == b.shape and (a - b).abs().max() <= tolerance


def flags(**more):
    how = {"method": "ieg", "meta_step": 0.1, "meta_momentum": 0.9, "decay": 5e-4, "grad_eps_init": 0.9}
    how |= {"relabel": True, "reweight": True, "consistency_factor": 20.0, "ce_factor": 5.0}
    how |= {"temperature": 0.5, "logit_norm": True, "meta_pseudo_grad": "code", "meta_grad": "jvp"}
    return SimpleNamespace(**how | more)


class Small(nn.Module):
    """The network of the golden step: x w1, BatchNorm if it has gamma, tanh, h w2 + b2."""

    def __init__(self, state):
        super().__init__()
        for name, value in state.items():
            self.register_parameter(name, nn.Parameter(value.clone()))
        self.norm = "gamma" in state

    def forward(self, x):
        h = x @ self.w1
        if self.norm:
            h = F.batch_norm(h, None, None, self.gamma, self.beta, True, eps=1e-5)
        return torch.tanh(h) @ self.w2 + self.b2


@pytest.mark.parametrize("net", ["mlp", "bn"])
@pytest.mark.parametrize(("mode", "prefix"), [("code", "code_"), ("detach", "stop_")])
def test_a_whole_step_is_that_of_the_original_code(net, mode, prefix):
    """Coefficients, every part of the loss, gradients, momentum, parameters and their average."""
    g = golden(f"step_{net}")
    alpha, mu, lr, trust, decay, p, k = g["hyper"].tolist()
    state = {name[3:]: value for name, value in g.items() if name.startswith("p0_")}
    model = Small(state)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=decay)
    for name, parameter in model.named_parameters():
        optimizer.state[parameter]["momentum_buffer"] = g[f"mom0_{name}"].clone()
    settings = flags(meta_step=alpha, meta_momentum=mu, decay=decay, grad_eps_init=trust, meta_pseudo_grad=mode)
    label, probe_label = (ieg.one_hot(g[f"in_y_{name}"], 4).double() for name in ("noisy", "probe"))
    views = g["in_x_weak"], g["in_x_strong"]
    share, partner, pick = ieg.mixup_shares(g["in_mix_U"]), g["in_mix_perm"], g["in_probe_pick"]
    rows = torch.cat([g["in_x_probe"][pick], *views])
    mixture = Mixed(ieg.mix_rows(rows, share, partner), share, partner, pick)
    logits = [model(view) for view in views]
    mixed = model(mixture.image)
    probe = g["in_x_probe"], probe_label
    verdict = judge(model, logits, views, label, probe, momentum_of(model, optimizer), settings)
    pseudo = ieg.pseudo_label([z.detach() for z in logits])
    close(pseudo, g[prefix + "pseudo"])
    close(verdict.weight, g[prefix + "omega_star"])
    assert torch.equal(verdict.keep.double(), g[prefix + "lambda_star"].double())
    close(verdict.probe_loss + decay_loss(look(model, g, prefix), decay), g[prefix + "meta_loss"])
    close(mixture.labels(probe_label, pseudo), g[prefix + "mix_labels"])
    parts = label_losses(logits[0], label, pseudo, verdict, settings)
    parts |= further_losses([*logits, mixed], mixture, probe_label, pseudo, settings)
    names = {"lambda": "L_lambda", "omega": "L_omega", "probe": "L_p_beta", "mixed": "L_u_beta", "kl": "KL"}
    for name, theirs in names.items():
        close(parts[name], g[prefix + theirs])
    loss = total(parts, p, k)
    close(loss + decay_loss(parameters_of(model), decay), g[prefix + "total"])
    loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        close(optimizer.state[parameter]["momentum_buffer"], g[f"{prefix}mom1_{name}"])
        close(parameter.detach(), g[f"{prefix}p1_{name}"])
        decay_1 = ieg.average_decay(1)
        close(decay_1 * state[name] + (1 - decay_1) * parameter.detach(), g[f"{prefix}ema1_{name}"])


def decay_loss(parameters, decay):
    return decay / 2 * sum(value.square().sum() for value in parameters.values())


def look(model, g, prefix):
    return {name: g[f"{prefix}thetahat_{name}"] for name in parameters_of(model)}


@pytest.mark.parametrize("net", ["mlp", "bn"])
@pytest.mark.parametrize(("mode", "prefix"), [("code", "code_"), ("detach", "stop_")])
def test_coefficients_are_the_derivatives_that_double_back_propagation_gives(net, mode, prefix):
    """Also the look-ahead and G; the arrays hold what the original code's unrolled graph gave."""
    g = golden(f"step_{net}")
    model = Small({name[3:]: value for name, value in g.items() if name.startswith("p0_")})
    momentum = {name: g[f"mom0_{name}"] for name in parameters_of(model)}
    label = ieg.one_hot(g["in_y_noisy"], 4).double()
    omega, trust = (torch.full((8,), value, dtype=torch.float64, requires_grad=True) for value in (1 / 8, 0.9))
    z = model(g["in_x_weak"])
    pseudo = ieg.pseudo_label([z, model(g["in_x_strong"])])
    pseudo = pseudo if mode == "code" else pseudo.detach()
    inner = (omega * ieg.soft_loss(z, ieg.blend(label, pseudo, trust[:, None]))).sum()
    named = dict(model.named_parameters())
    inner = inner + decay_loss(named, 5e-4)
    grads = torch.autograd.grad(inner, list(named.values()), create_graph=True)
    ahead = {name: p - 0.1 * (0.9 * momentum[name] + d) for (name, p), d in zip(named.items(), grads, strict=True)}
    probe_label = ieg.one_hot(g["in_y_probe"], 4).double()
    probe = ieg.soft_loss(functional_call(model, ahead, (g["in_x_probe"],)), probe_label).mean()
    d_omega, d_trust = torch.autograd.grad(probe + decay_loss(ahead, 5e-4), [omega, trust])
    close(d_omega, g[prefix + "grad_omega"], 1e-9)
    close(d_trust, g[prefix + "grad_lambda"], 1e-9)

    inner = ieg.soft_loss(z, ieg.blend(label, pseudo, 0.9)).mean()
    loss = lambda forward: ieg.soft_loss(forward(g["in_x_probe"]), probe_label).mean()  # noqa: E731
    _, direction = probe_direction(model, inner, momentum, loss, 0.1, 0.9, 5e-4)
    for name, value in direction.items():
        close(value, g[f"{prefix}gmeta_{name}"], 1e-9)

    def answers(forward):
        z = forward(g["in_x_weak"])
        return z, ieg.pseudo_label([z, forward(g["in_x_strong"])])

    (z, _), (dz, dg) = derivative(model, parameters_of(model), direction, answers)
    moved = [dg] if mode == "code" else []
    target = ieg.blend(label, pseudo.detach(), 0.9)
    close(-0.1 * ieg.alignment(z, target, dz, *moved, share=0.1), g[prefix + "grad_omega"], 1e-9)
    gain = ieg.label_gain(z, label, pseudo.detach(), dz, *moved)
    close(0.1 / 8 * gain, g[prefix + "grad_lambda"], 1e-9)


def linear(g):
    model = nn.Linear(2, 3).double()
    model.weight.data, model.bias.data = g["W"].T.contiguous(), g["b"].clone()
    return model


def test_l2r_has_the_weights_of_both_codes():
    g = golden("l2r_linear")
    model, label, truth = linear(g), ieg.one_hot(g["Y"], 3).double(), ieg.one_hot(g["Y_probe"], 3).double()
    zeros = momentum_of(model, torch.optim.SGD(model.parameters()))
    probe = g["X_probe"], truth

    def scores(inner, step, decay):
        loss = lambda forward: ieg.soft_loss(forward(g["X_probe"]), truth).mean()  # noqa: E731
        _, found = probe_direction(model, inner, zeros, loss, step, 0.0, decay)
        (z,), (dz,) = derivative(model, parameters_of(model), found, lambda forward: (forward(g["X"]),))
        return ieg.alignment(z, label, dz), torch.cat([found["weight"].T, found["bias"][None]])

    score, direction = scores(None, 0.0, 0.0)
    close(score, g["score_original"])
    close(direction, g["probe_grad_original"])
    close(ieg.original_weights(score), g["weight_original"])
    score, direction = scores(None, 0.1, 5e-4)
    close(-0.1 * score, g["grad_eps_repo"])
    close(direction, g["probe_grad_repo"])
    settings = flags(method="l2r")
    verdict = judge(model, [model(g["X"])], [g["X"]], label, probe, zeros, settings)
    close(verdict.weight, g["weight_repo"])
    assert verdict.keep is None
    logits, again = judge_in_step(model, model, g["X"], label, probe, zeros, settings)
    close(again.weight, g["weight_repo"])
    close(logits, model(g["X"]))
    inner = ieg.soft_loss(model(g["X"]), label).mean()
    score, direction = scores(inner, 0.1, 5e-4)
    close(direction, g["probe_grad_eps0_uniform"])
    close(ieg.weights_of(score, 0.1), g["weight_eps0_uniform"])


def test_components_are_those_of_the_original_code():
    g = golden("components")
    weak, strong = g["logits_weak"], g["logits_strong"]
    close(ieg.normalised(weak), g["logit_norm_weak"])
    close(ieg.pseudo_label([weak, strong]), g["guessed"])
    close(ieg.pseudo_label([weak, strong], temperature=1), g["guessed_T1"])
    close(ieg.consistency(weak, strong), g["kl_per_sample"])
    close(20 * ieg.consistency(weak, strong).mean(), g["consistency_loss_k20"])
    close(ieg.mixup_shares(g["mix_U"]), g["mix_lambda"])
    for classes, largest in g["max_conf_after_norm"].tolist():
        rows = torch.full((5, int(classes)), -1.0, dtype=torch.float64)
        rows[:, 0] = classes - 1
        assert ieg.normalised(rows).softmax(1).max().item() == pytest.approx(largest, abs=1e-6)


def test_schedule_and_average_are_those_of_the_original_code():
    g = golden("schedule")
    for first in (499, 490, 500):
        rates = [0.1 * ieg.restart_factor(step, first) for step in g["steps"].tolist()]
        close(torch.tensor(rates, dtype=torch.float64), g[f"lr_first{first}"], 1e-9)
    ends = g["exact_cycle_ends_499"].tolist()
    assert ieg.cycle_ends(499, 200_000) == [round(end) if end != 1247.5 else 1247 for end in ends]
    assert ieg.cycle_ends(499, 1246) == [499]
    for first in (490, 499):
        assert ieg.cycle_ends(first, 200_000, rounded=True) == g[f"cycle_end_eval_steps_{first}"].tolist()
    decays = [ieg.average_decay(step) for step in g["ema_steps"].tolist()]
    close(torch.tensor(decays, dtype=torch.float64), g["ema_decay"])


class Convolutions(nn.Sequential):
    """BatchNorm, pooling and interpolation, as a segmentation network has them."""

    def __init__(self, classes=3):
        layers = [nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Upsample(scale_factor=2)]
        super().__init__(*layers, nn.Conv2d(6, classes, 1))


@pytest.mark.parametrize("classes", [1, 3])
def test_every_pixel_has_its_own_unrolled_derivative(classes):
    """With one coefficient a pixel, through BatchNorm, in float64: jvp is the definition, a difference is near it."""
    torch.manual_seed(0)
    net, x, probe = Convolutions(classes).double(), torch.randn(2, 3, 8, 8).double(), torch.randn(4, 3, 8, 8).double()
    label, truth = (ieg.one_hot(torch.randint(0, max(2, classes), (n, 8, 8)), classes).double() for n in (2, 4))
    named = dict(net.named_parameters())
    epsilon = torch.zeros(2, 8, 8, dtype=torch.float64, requires_grad=True)
    with batch_statistics(net):
        inner = (epsilon * ieg.soft_loss(net(x), label)).sum()
        grads = torch.autograd.grad(inner, list(named.values()), create_graph=True)
        ahead = {name: p - d for (name, p), d in zip(named.items(), grads, strict=True)}
        loss = ieg.soft_loss(functional_call(net, ahead, (probe,)), truth).mean()
    (definition,) = torch.autograd.grad(-loss, epsilon)
    value, direction = gradient(net, parameters_of(net), lambda forward: ieg.soft_loss(forward(probe), truth).mean())
    close(value, loss.detach())
    for how in ("jvp", "difference"):
        (z,), (dz,) = derivative(net, parameters_of(net), direction, lambda forward: (forward(x),), how)
        score = ieg.alignment(z, label, dz)
        assert not dz.requires_grad and (score * definition >= 0).double().mean() > 0.97
        assert torch.corrcoef(torch.stack([score.flatten(), definition.flatten()]))[0, 1] > 0.99
        if how == "jvp":
            close(score, definition, 1e-12)


def test_a_difference_drops_the_same_in_both_passes():
    """In float32; with masks of their own the two passes would differ by the masks, not by the step."""
    torch.manual_seed(8)
    net = nn.Sequential(*list(Convolutions())[:-1], nn.Dropout(0.5), nn.Conv2d(6, 3, 1)).train()
    x, label = torch.randn(4, 3, 8, 8), ieg.one_hot(torch.randint(0, 3, (4, 8, 8)), 3)
    own = parameters_of(net)
    _, direction = gradient(net, own, lambda forward: ieg.soft_loss(forward(x), label).mean())
    found = []
    for how in ("jvp", "difference"):
        torch.manual_seed(9)
        (z,), (dz,) = derivative(net, own, direction, lambda forward: (forward(x),), how)
        found.append((z, dz.flatten(), torch.rand(1)))
    close(found[0][0], found[1][0], 1e-5)
    assert torch.corrcoef(torch.stack([found[0][1], found[1][1]]))[0, 1] > 0.99
    assert found[0][2] == found[1][2]  # and leaves the generator where one pass does


def test_what_is_judged_without_relabelling_is_the_loss_of_the_given_labels():
    torch.manual_seed(7)
    net = nn.Sequential(Convolutions(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double().train()
    x, probe = torch.randn(4, 3, 8, 8).double(), torch.randn(4, 3, 8, 8).double()
    label = ieg.one_hot(torch.tensor([0, 1, 2, 0]), 3).double()
    zeros = momentum_of(net, torch.optim.SGD(net.parameters()))
    with batch_statistics(net):
        inner = ieg.soft_loss(net(x), label).mean()
    _, direction = probe_direction(
        net, inner, zeros, lambda forward: ieg.soft_loss(forward(probe), label).mean(), 0.1, 0.9, 5e-4
    )
    (z,), (dz,) = derivative(net, parameters_of(net), direction, lambda forward: (forward(x),))
    logits, settings = [net(x), net(x + 0.1)], flags(relabel=False)
    verdict = judge(net, logits, [x, x + 0.1], label, (probe, label), zeros, settings)
    close(verdict.weight, ieg.weights_of(ieg.alignment(z, label, dz), 0.1), 1e-9)
    assert verdict.keep is None and set(verdict.of_labels()) == {"weight"}


@pytest.mark.parametrize("wrap", [lambda net: net, ManyViews])
def test_the_pass_of_a_step_carries_the_derivative_and_is_unchanged(wrap):
    torch.manual_seed(0)
    own, x = nn.Sequential(Convolutions(), nn.Dropout(0.5)).double().train(), torch.randn(4, 3, 8, 8).double()
    plain = deepcopy(own)
    direction = {name: torch.randn_like(p) for name, p in parameters_of(own).items()}
    torch.manual_seed(1)
    (_,), (expected,) = derivative(own, parameters_of(own), direction, lambda forward: (forward(x),))
    torch.manual_seed(1)
    logits, along = step_along(wrap(own), own, direction, x)
    torch.manual_seed(1)
    assert torch.equal(logits, plain(x)) and not along.requires_grad
    close(along, expected, 1e-12)
    torch.manual_seed(1)
    logits.square().sum().backward(), plain(x).square().sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(own.parameters(), plain.parameters(), strict=True))
    own(x)  # the second pass of `plain`
    assert all(torch.equal(a, b) for a, b in zip(own.buffers(), plain.buffers(), strict=True))
    assert not any(module._forward_hooks for module in own.modules())


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.eval(),
        lambda layer: setattr(layer, "momentum", None),
        lambda layer: layer.requires_grad_(False),
    ],
)
@pytest.mark.parametrize("kind", [{}, {"affine": False}, {"track_running_stats": False}])
def test_the_pass_of_a_step_leaves_unusual_layers_as_they_are(kind, change):
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(6, **kind)
    own = nn.Sequential(nn.Conv2d(3, 6, 3), layer, nn.ReLU(), nn.Conv2d(6, 2, 1)).double().train()
    change(layer)
    plain, x = deepcopy(own), torch.randn(4, 3, 8, 8).double()
    direction = {name: torch.randn_like(p) for name, p in parameters_of(own).items()}
    logits, along = step_along(own, own, direction, x)
    here = plain(x)
    assert torch.equal(logits, here)
    assert all(torch.equal(a, b) for a, b in zip(own.buffers(), plain.buffers(), strict=True))
    aside = {name: p + 1e-7 * direction[name] for name, p in parameters_of(plain).items()}
    if layer.training:
        here = functional_call(plain, parameters_of(plain), (x,))
    close(along, (functional_call(plain, aside, (x,)) - here) / 1e-7, 1e-4)


@pytest.mark.slow
def test_two_processes_average_the_gradients_of_a_pass_with_tangents(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(GOLDEN.parents[1])}
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


TWO = """
from copy import deepcopy

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from utils.methods.meta import parameters_of, step_along
from utils.models.views import ManyViews

distributed.init_process_group("gloo")
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)).double()
halves, direction = torch.randn(2, 5, 3, 6, 6).double(), {n: torch.randn_like(p) for n, p in parameters_of(net).items()}
alone = [deepcopy(net) for _ in halves]
for one, half in zip(alone, halves):
    one(half).square().sum().backward()
whole = DistributedDataParallel(ManyViews(net), broadcast_buffers=False)
logits, _ = step_along(whole, net, direction, halves[distributed.get_rank()])
logits.square().sum().backward()
for p, a, b in zip(net.parameters(), *(one.parameters() for one in alone)):
    assert torch.allclose(p.grad, (a.grad + b.grad) / 2, rtol=1e-12)
distributed.destroy_process_group()
"""


def test_judging_touches_neither_network_nor_optimizer():
    torch.manual_seed(0)
    net = nn.Sequential(Convolutions(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).train()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    x, probe = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    label = ieg.one_hot(torch.tensor([0, 1, 2, 0]), 3)
    ieg.soft_loss(net(x), label).mean().backward()
    optimizer.step()
    views = [x, x + 0.1]
    logits = [net(view) for view in views]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    momentum = {name: value.clone() for name, value in momentum_of(net, optimizer).items()}
    verdict = judge(net, logits, views, label, (probe, label), momentum_of(net, optimizer), flags())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(torch.equal(value, momentum[name]) for name, value in momentum_of(net, optimizer).items())
    assert any(value.any() for value in momentum.values()) and not verdict.weight.requires_grad
    assert all(layer.track_running_stats for layer in net.modules() if isinstance(layer, nn.BatchNorm2d))
    (logits[0].sum() + logits[1].sum()).backward()  # the graph of the real step is still there


def test_statistics_across_processes_are_left_out_of_it():
    """SyncBatchNorm would wait for others, and refuses a CPU outright where there are any."""
    net = nn.SyncBatchNorm.convert_sync_batchnorm(Convolutions()).train()
    x = torch.randn(2, 3, 8, 8)
    plain = Convolutions().train()
    plain.load_state_dict(net.state_dict())
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="SyncBatchNorm expected input"):
            net(x)
        with batch_statistics(net):
            assert torch.equal(net(x), plain(x))
        with pytest.raises(ValueError, match="SyncBatchNorm expected input"):
            net(x)
    finally:
        torch.distributed.destroy_process_group()


def test_an_operation_without_forward_derivative_is_said_with_the_remedy():
    class Odd(Convolutions):
        def forward(self, x):
            x = super().forward(x).flatten(2)[:, None]
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(x, x, x)[0]

    net, x = Odd(), torch.randn(2, 3, 8, 8)
    own = parameters_of(net)
    with pytest.raises(InputError, match=r"--meta-grad jvp: this network has no forward derivative.*difference"):
        derivative(net, own, own, lambda forward: (forward(x),))
    with pytest.raises(InputError, match=r"--meta-grad jvp: this network has no forward derivative.*difference"):
        step_along(net, net, own, x)
    assert derivative(net, own, own, lambda forward: (forward(x),), "difference")[1][0].isfinite().all()


def test_a_probe_like_the_batch_favours_it_as_a_whole():
    """With the same images, labels and no decay the scores add up to B |gradient of the mean loss|^2."""
    torch.manual_seed(1)
    net, x = Convolutions().double(), torch.randn(2, 3, 8, 8).double()
    label = ieg.one_hot(torch.randint(0, 3, (2, 8, 8)), 3).double()
    _, direction = gradient(net, parameters_of(net), lambda forward: ieg.soft_loss(forward(x), label).mean())
    (z,), (dz,) = derivative(net, parameters_of(net), direction, lambda forward: (forward(x),))
    squares = sum(value.square().sum() for value in direction.values())
    close(ieg.alignment(z, label, dz).sum(), label[:, 0].numel() * squares, 1e-9)


def test_weights_are_clipped_scaled_and_never_blow_up():
    score = torch.tensor([3.0, -1.0, 0.0, 1.0, float("nan"), float("inf")])
    weight = ieg.weights_of(score)
    close(weight, torch.tensor([3, 0, 0, 1, 0, 0]) / (4 + 1e-5), 1e-7)
    assert not ieg.weights_of(-score.abs()).any() and not ieg.original_weights(torch.full((3,), -1.0)).any()
    close(ieg.weights_of(score[:4], 100.0), weight[:4], 1e-5)
    close(ieg.effective_share(weight[:4]), 16 / 10 / 4, 1e-6)
    assert ieg.effective_share(torch.zeros(3)) == 0


def test_pseudo_labels_add_up_and_keep_the_order():
    torch.manual_seed(2)
    views = torch.randn(2, 5, 4, dtype=torch.float64).unbind()
    g = ieg.pseudo_label(views)
    close(g.sum(1), torch.ones(5))
    mean = ieg.pseudo_label(views, temperature=1)
    assert torch.equal(g.argsort(1), mean.argsort(1)) and (g.max(1).values >= mean.max(1).values).all()
    close(ieg.pseudo_label([7 * views[0], views[1]]), g, 1e-7)
    shifted = [view + torch.arange(5.0)[:, None] for view in views]
    close(ieg.pseudo_label(shifted, norm=False), ieg.pseudo_label(views, norm=False))
    assert (ieg.pseudo_label(shifted) - g).abs().max() > 0.01


def test_one_channel_is_two_classes_with_logits_0_and_z():
    torch.manual_seed(3)
    z, s, dz = torch.randn(3, 2, 1, 4, 4, dtype=torch.float64)
    mask = torch.randint(0, 2, (2, 4, 4))
    two = [torch.cat([0 * one, one], 1) for one in (z, s, dz)]
    y, y2 = ieg.one_hot(mask, 1).double(), ieg.one_hot(mask, 2).double()
    g, g2 = ieg.pseudo_label([z, s], norm=False), ieg.pseudo_label(two[:2], norm=False)
    close(g[:, 0], g2[:, 1])
    close(ieg.soft_loss(z, ieg.blend(y, g, 0.9)), ieg.soft_loss(two[0], ieg.blend(y2, g2, 0.9)))
    close(ieg.alignment(z, y, dz), ieg.alignment(two[0], y2, two[2]))
    close(ieg.label_gain(z, y, g, dz), ieg.label_gain(two[0], y2, g2, two[2]))
    close(ieg.consistency(z, s), ieg.consistency(*two[:2]))


def test_labels_that_agree_are_not_kept_and_void_has_no_class():
    y = ieg.one_hot(torch.tensor([2, 255, 0]), 3)
    assert y.tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]
    tangent = torch.randn(3, 3)
    assert not (ieg.label_gain(tangent, y, y, tangent) < 0).any()  # a tie goes to the pseudo label
    other = y.roll(1, 1)
    assert torch.equal(ieg.label_gain(tangent, y, other, tangent), -ieg.label_gain(tangent, other, y, tangent))


def test_mixing_keeps_targets_on_the_simplex_and_nothing_drawn_is_the_identity():
    torch.manual_seed(4)
    target = torch.rand(6, 3).softmax(1)
    draw, partner = torch.rand(6), torch.randperm(6)
    for released in (True, False):
        share = ieg.mixup_shares(draw, true_beta=not released)
        assert ((share >= 0.5) & (share <= 1)).all()
        close(ieg.mix_rows(target, share, partner).sum(1), torch.ones(6), 1e-6)
    assert torch.equal(ieg.mix_rows(target, ieg.mixup_shares(torch.zeros(6)), partner), target)
    close(ieg.mixup_shares(torch.linspace(0, 1, 100_001, dtype=torch.float64)).mean(), 5 / 6, 1e-5)
    # max(b, 1 - b) of Beta(1/2, 1/2) has mean 1/2 + 1/pi
    close(ieg.mixup_shares(torch.linspace(0, 1, 100_001, dtype=torch.float64), True).mean(), 0.5 + 1 / np.pi, 1e-5)


def test_consistency_teaches_the_strong_view_only():
    weak, strong = (torch.randn(4, 3, requires_grad=True) for _ in range(2))
    ieg.consistency(weak, strong).sum().backward()
    assert strong.grad.abs().sum() > 0 and weak.grad is None
    assert ieg.consistency(weak, weak + 3).abs().max() < 1e-6 and (ieg.consistency(weak, strong) >= 0).all()


def test_plain_coefficients_are_the_plain_loss():
    logits, label = torch.randn(5, 4), ieg.one_hot(torch.randint(0, 4, (5,)), 4)
    verdict = SimpleNamespace(weight=torch.full((5,), 0.2), keep=torch.ones(5, dtype=torch.bool))
    for more in ({"grad_eps_init": 1.0}, {"relabel": False, "reweight": False}):
        parts = label_losses(logits, label, label.roll(1), verdict, flags(**more))
        close(total(parts, 5, 20), F.cross_entropy(logits, label.argmax(1)), 1e-6)


def test_momentum_begins_at_zero_and_the_look_ahead_is_one_step_of_sgd():
    torch.manual_seed(5)
    net = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(2):
        before, momentum = {n: p.clone() for n, p in parameters_of(net).items()}, momentum_of(net, optimizer)
        momentum = {name: value.clone() for name, value in momentum.items()}
        optimizer.zero_grad()
        net(torch.ones(1, 3)).square().sum().backward()
        grads = {name: p.grad.clone() for name, p in net.named_parameters()}
        optimizer.step()
        ahead = look_ahead(before, grads, momentum, 0.1, 0.9, 0.01)
        assert all(torch.allclose(ahead[name], p, atol=1e-6) for name, p in parameters_of(net).items())


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_reduced_precision_gives_finite_scores(precision):
    torch.manual_seed(6)
    net, x = Convolutions(), torch.randn(2, 3, 8, 8)
    label = ieg.one_hot(torch.randint(0, 3, (2, 8, 8)), 3)

    def loss(forward):
        return ieg.soft_loss(forward(x), label).mean()

    def scores():
        _, direction = gradient(net, parameters_of(net), loss, 1024.0)
        (z,), (dz,) = derivative(net, parameters_of(net), direction, lambda forward: (forward(x),))
        return ieg.alignment(z, label, dz)

    exact = scores()
    with torch.autocast("cpu", precision):
        found = scores()
    assert torch.corrcoef(torch.stack([exact.flatten(), found.flatten()]))[0, 1] > 0.95
