"""Update rules and learning-rate schedules, by name."""

import math

import torch
from torch.optim.lr_scheduler import LambdaLR


class Ranger(torch.optim.RAdam):
    """RAdam with Lookahead and decoupled weight decay, without gradient centralisation.

    The optimizer of the released NLKD code (pytorch_ranger 0.1.1): Liu et al., ICLR 2020, and Zhang et al.,
    "Lookahead", NeurIPS 2019: every `k` steps the slow weights move a share `alpha` towards the fast ones, which
    then start again from there.
    """

    def __init__(self, params, lr=1e-3, betas=(0.95, 0.999), eps=1e-5, weight_decay=0.0, k=6, alpha=0.5):
        super().__init__(params, lr, betas, eps, weight_decay, decoupled_weight_decay=True)
        for group in self.param_groups:
            group |= {"k": k, "alpha": alpha, "steps": 0}

    @torch.no_grad()
    def step(self, closure=None):
        # RAdam makes its state only for parameters that have none, so the slow weights join it afterwards.
        fresh = {
            p: p.clone() for g in self.param_groups for p in g["params"] if p.grad is not None and not self.state[p]
        }
        loss = super().step(closure)
        for p, slow in fresh.items():
            self.state[p]["slow"] = slow
        for group in self.param_groups:
            group["steps"] += 1
            moved = [p for p in group["params"] if "slow" in self.state[p]]
            if moved and group["steps"] % group["k"] == 0:
                slow = [self.state[p]["slow"] for p in moved]
                torch._foreach_lerp_(slow, moved, group["alpha"])
                torch._foreach_copy_(moved, slow)
        return loss


def build_optimizer(args, net, steps_per_epoch: int, loss=None):
    """The optimizer of the flags for one network, and its schedule, which takes one step a step.

    What a `loss` has to learn is a second group of parameters, without weight decay.
    """
    rate, decay = args.learning_rate, args.weight_decay
    params = [{"params": list(net.parameters())}]
    own = [] if loss is None else list(loss.parameters())
    if own:
        params.append({"params": own, "weight_decay": 0.0})
    if args.optimizer == "ranger":
        optimizer = Ranger(params, rate, weight_decay=decay)
    elif args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(params, rate, weight_decay=decay, fused=True)
    else:
        optimizer = torch.optim.SGD(params, rate, momentum=0.9, weight_decay=decay, fused=True)
    return optimizer, LambdaLR(optimizer, lambda step: rate_factor(args, step, steps_per_epoch))


def rate_factor(args, step: int, steps_per_epoch: int) -> float:
    """Learning rate at a step, as a share of the starting one; `step` is constant within an epoch, as published."""
    done = min(1.0, step / max(1, args.epochs * steps_per_epoch))
    if args.scheduler == "step":
        return args.step_gamma ** (step // max(1, steps_per_epoch) // args.step_epochs)
    if args.scheduler == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return (1 - done) ** 0.9 if args.scheduler == "poly" else 1.0
