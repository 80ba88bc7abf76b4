"""Ranger against the released optimizer's trajectory, saved and resumed, and the learning-rate schedules."""

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from utils.optim import Ranger, build_optimizer, rate_factor

GOLDEN = Path(__file__).parent / "golden"


def flags(**given):
    plain = {"scheduler": "step", "epochs": 100, "step_epochs": 25, "step_gamma": 0.5, "optimizer": "ranger"}
    return SimpleNamespace(**plain | {"learning_rate": 0.1, "weight_decay": 5e-4} | given)


def two_tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(3, 2), (5,)]]


def descend(params, optimizer, steps, start=0):
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = p.detach() + torch.randn(p.shape, generator=generator)
        optimizer.step()


def test_ranger_follows_the_released_trajectory():
    data = np.load(GOLDEN / "nlkd_ranger.npz")
    p = torch.nn.Parameter(torch.from_numpy(data["p0"].copy()))
    optimizer = Ranger([p], lr=0.1, weight_decay=5e-4)
    for grad, lr, expected in zip(data["grads"], data["lr_used"], data["params"], strict=True):
        optimizer.param_groups[0]["lr"] = float(lr)
        p.grad = torch.from_numpy(grad.copy())
        optimizer.step()
        np.testing.assert_allclose(p.detach(), expected, rtol=0, atol=1e-5)


def test_ranger_minimises_on_its_own_gradients():
    data = np.load(GOLDEN / "nlkd_ranger.npz")
    a = torch.from_numpy(data["A"])
    p = torch.nn.Parameter(torch.from_numpy(data["p0"].copy()))
    optimizer, schedule = build_optimizer(flags(), SimpleNamespace(parameters=lambda: [p]), steps_per_epoch=1)
    for expected, lr in zip(data["params"], data["lr_used"], strict=True):
        assert schedule.get_last_lr() == [pytest.approx(lr)]
        optimizer.zero_grad()
        (0.5 * p @ a @ p).backward()
        optimizer.step()
        schedule.step()
        np.testing.assert_allclose(p.detach(), expected, rtol=0, atol=1e-5)


def test_lookahead_moves_every_k_steps_by_hand():
    p = torch.nn.Parameter(torch.tensor([1.0]))
    twin = torch.nn.Parameter(torch.tensor([1.0]))
    ranger = Ranger([p], lr=0.01, k=3, alpha=0.25)
    radam = torch.optim.RAdam([twin], lr=0.01, betas=(0.95, 0.999), eps=1e-5)
    for step in range(3):
        assert p.item() == twin.item()
        for x, optimizer in ((p, ranger), (twin, radam)):
            x.grad = torch.tensor([2.0 + step])
            optimizer.step()
    assert p.item() == pytest.approx(1 + 0.25 * (twin.item() - 1), abs=1e-7) and twin.item() != 1


@pytest.mark.parametrize("way", ["state_dict", "file"])
@pytest.mark.parametrize("before", [0, 1, 5, 6, 9])
def test_ranger_resumes_bit_for_bit(way, before):
    whole = two_tensors()
    descend(whole, Ranger(whole, lr=0.1, weight_decay=5e-4), before + 14)
    first = two_tensors()
    optimizer = Ranger(first, lr=0.1, weight_decay=5e-4)
    descend(first, optimizer, before)
    state = optimizer.state_dict()
    if way == "file":
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    second = [torch.nn.Parameter(p.detach().clone()) for p in first]
    resumed = Ranger(second, lr=0.7, weight_decay=0.0, k=99)
    resumed.load_state_dict(state)
    descend(second, resumed, 14, start=before)
    assert all(torch.equal(p, q) for p, q in zip(whole, second, strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(first, second, strict=True))


def test_parameters_without_gradient_stay():
    used, idle = two_tensors()
    before = idle.detach().clone()
    optimizer = Ranger([used, idle], lr=0.1, weight_decay=0.5)
    for _ in range(13):
        used.grad = torch.ones_like(used)
        optimizer.step()
    assert torch.equal(idle, before) and not optimizer.state[idle]
    optimizer.zero_grad()
    idle.grad = torch.ones_like(idle)
    optimizer.step()
    assert not torch.equal(idle, before) and torch.equal(optimizer.state[idle]["slow"], before)


@pytest.mark.parametrize("steps", [1, 7, 1125])
def test_step_schedule_halves_every_25_epochs(steps):
    for epoch, rate in [(0, 0.1), (24, 0.1), (25, 0.05), (49, 0.05), (50, 0.025), (75, 0.0125), (99, 0.0125)]:
        within = {0.1 * rate_factor(flags(), epoch * steps + i, steps) for i in range(steps)}
        assert len(within) == 1 and within.pop() == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize("scheduler", ["cosine", "poly"])
def test_smooth_schedules_fall_from_1_to_0(scheduler):
    args = flags(scheduler=scheduler, epochs=8)
    values = [rate_factor(args, step, 5) for step in range(41)]
    assert values[0] == 1 and values[-1] == pytest.approx(0, abs=1e-12)
    assert (np.diff(values) < 0).all()
    middle = {"cosine": 0.5, "poly": 0.5**0.9}[scheduler]
    assert values[20] == pytest.approx(middle, rel=1e-12)
    assert rate_factor(args, 55, 5) == values[-1]  # past the end it stays there


def test_no_schedule_is_constant():
    assert {rate_factor(flags(scheduler="none", epochs=3), step, 4) for step in range(12)} == {1.0}


@pytest.mark.parametrize("name", ["ranger", "adamw", "sgd"])
def test_flags_choose_the_optimizer(name):
    net = torch.nn.Linear(2, 1)
    args = flags(optimizer=name, learning_rate=0.3, weight_decay=0.02, epochs=4, step_epochs=1)
    optimizer, schedule = build_optimizer(args, net, steps_per_epoch=3)
    kind = {"ranger": Ranger, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[name]
    assert type(optimizer) is kind and optimizer.param_groups[0]["weight_decay"] == 0.02
    rates = []
    for _ in range(12):
        rates += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.3] * 3 + [0.15] * 3 + [0.075] * 3 + [0.0375] * 3)
