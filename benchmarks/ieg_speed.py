"""What a step of L2R and IEG costs beside a plain step: operations, seconds, memory.

Run     python benchmarks/ieg_speed.py --network-name resnet29 --batch 16 --rounds 5
        python benchmarks/ieg_speed.py --network-name wrn28-10 --batch 100 --precision bf16    # on a GPU
A step is forward and backward pass, update, and what the method does besides; no data are read. Operations are those of
convolutions and matrix products. Seconds are medians, on a CPU of the process, so that others do not count; --rounds 0
leaves them out. Memory is the peak that torch held on a GPU; on a CPU that of a process of its own for each step, with
Python and torch in it. "double back-propagation" is L2R by the gradient of a gradient, as the definition has it.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from utils.ieg_args import IegArgs
from utils.methods.ieg import one_hot, pseudo_label, soft_loss, weights_of
from utils.methods.ieg_images import draw_mixture, further_losses, judge, judge_in_step, label_losses, total
from utils.methods.meta import momentum_of
from utils.models.classify import build_classifier
from utils.models.views import ManyViews, batch_statistics

PARTS = {
    "plain": {"method": "supervised"},
    "l2r": {"method": "l2r"},
    "l2r, difference": {"method": "l2r", "meta_grad": "difference"},
    "l2r, double back-propagation": {"method": "l2r", "meta_grad": "double"},
    "ieg": {"method": "ieg"},
    "ieg, --meta-pseudo-grad code": {"method": "ieg", "meta_pseudo_grad": "code"},
    "ieg, difference": {"method": "ieg", "meta_grad": "difference"},
    "ieg without the probe's judgement": {"method": "ieg", "relabel": False, "reweight": False},
}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"batch": 16, "rounds": 5, "size": 32, "classes": 10}.items():
        flags.add_argument(f"--{name}", type=int, default=value)
    flags.add_argument("--network-name", default="resnet29")
    flags.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    flags.add_argument("--cpu", action="store_true")
    flags.add_argument("--peak-of", default="", help=argparse.SUPPRESS)  # what the script asks of itself
    a = flags.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not a.cpu else "cpu")
    if a.peak_of:
        return print(own_peak(step_of(a, device, PARTS[a.peak_of])))
    # before anything is built here, since a process begins with the peak of the one that starts it
    memory = {name: peak_alone(name) for name in PARTS} if device.type == "cpu" else {}
    steps = {name: step_of(a, device, more) for name, more in PARTS.items()}
    times, found = {name: [] for name in steps}, {}
    for name, step in steps.items():
        step()
        with FlopCounterMode(display=False) as counter:
            step()
        found[name] = counter.get_total_flops()
        if device.type != "cpu":
            memory[name] = peak(step)
    for _ in range(a.rounds):  # in turn, so that a slow moment meets all of them
        for name, step in steps.items():
            times[name].append(clock(step, device))
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"{a.network_name}, {a.batch} images of {a.size}, {a.precision}, {where}, torch {torch.__version__}")
    report(found, times if a.rounds else {}, memory)


def report(found: dict, times: dict, memory: dict) -> None:
    """Print the table: operations, seconds where they were taken, bytes; a line for every step."""
    print(
        f"| step | operations | {'seconds | ms | ' if times else ''}peak MiB |\n|---|---|{'---|---|' * bool(times)}---|"
    )
    for name, flops in found.items():
        cells = [name, f"{flops / found['plain']:.2f}x"]
        if times:
            seconds, plain = (statistics.median(times[one]) for one in (name, "plain"))
            cells += [f"{seconds / plain:.2f}x", f"{1000 * seconds:.0f}"]
        print(f"| {' | '.join(cells)} | {memory[name] / 2**20:.0f} |")


def step_of(a, device, more):
    """A function that makes one step on random images."""
    torch.manual_seed(0)
    args = IegArgs("", network_name=a.network_name, weight_decay=5e-4, **more)
    net = ManyViews(build_classifier(a.network_name, a.classes)).to(device, memory_format=torch.channels_last).train()
    own, optimizer = net.net, torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9, weight_decay=5e-4)
    shape = (a.batch, 3, a.size, a.size)
    weak, strong, probe = (torch.randint(0, 256, shape, dtype=torch.uint8, device=device) for _ in range(3))
    label, truth = (one_hot(torch.randint(0, a.classes, (a.batch,), device=device), a.classes) for _ in range(2))
    judged = args.method == "l2r" or args.relabel or args.reweight
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=a.precision == "bf16")

    def losses():
        if args.method == "supervised":
            return {"omega": soft_loss(net(weak), label).mean()}
        if args.meta_grad == "double":
            weight = weights_by_definition(own, weak, label, probe, truth)
            return {"omega": (weight * soft_loss(net(weak), label)).sum()}
        views, mixed, pseudo = [weak], None, None
        if args.method == "ieg":
            views, mixed = [weak, strong], draw_mixture(weak, strong, probe)
        verdict, momentum = None, momentum_of(own, optimizer)
        if args.method == "l2r" and args.meta_grad == "jvp":
            logits, verdict = judge_in_step(net, own, weak, label, (probe, truth), momentum, args)
        else:
            logits = net(*views, *([] if mixed is None else [mixed.image]))
        logits = list(logits) if mixed else [logits]
        if mixed:
            pseudo = pseudo_label([z.detach() for z in logits[:2]])
        if judged and verdict is None:
            verdict = judge(own, logits[:2], views, label, (probe, truth), momentum, args)
        parts = label_losses(logits[0], label, pseudo, verdict, args)
        return parts | (further_losses(logits, mixed, truth, pseudo, args) if mixed else {})

    def step():
        with autocast:
            loss = total(losses(), args.ce_factor, args.consistency_factor)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def weights_by_definition(net, image, label, probe, truth):
    """L2R as it was published: weights of 0, a virtual step, the gradient of the probe's loss through it."""
    named = dict(net.named_parameters())
    epsilon = torch.zeros(len(image), device=image.device, requires_grad=True)
    with batch_statistics(net):
        inner = (epsilon * soft_loss(net(image), label)).sum()
        grads = torch.autograd.grad(inner, list(named.values()), create_graph=True)
        ahead = {name: p - 0.1 * g for (name, p), g in zip(named.items(), grads, strict=True)}
        outer = soft_loss(functional_call(net, ahead, (probe,)), truth).mean()
    return weights_of(-torch.autograd.grad(outer, epsilon)[0])


def clock(step, device) -> float:
    """Seconds of a step: of the process on a CPU, else on the wall."""
    if device.type == "cpu":
        began = time.process_time()
        step()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_alone(name: str) -> int:
    """The most memory that a process of its own held in two steps of a kind, in bytes, by the flags of this one."""
    words = [sys.executable, __file__, *sys.argv[1:], "--peak-of", name]
    return int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def own_peak(step) -> int:
    """The most memory that this process held until two steps were done, in bytes."""
    step(), step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def peak(step) -> int:
    """The most memory that torch held on a GPU during a step, in bytes."""
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated()


if __name__ == "__main__":
    main()
