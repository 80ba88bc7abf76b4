"""What the losses of --distill cost beside the rest of a step: seconds for the losses, and for a plain KL step.

Run     python benchmarks/distill_speed.py --distill cirkd                  # a GPU: whole steps at 512 x 512, batch 8
        python benchmarks/distill_speed.py --distill cirkd --plain-batch 2  # the plain step at another batch, scaled up
The losses always have --batch images. On a CPU seconds are those of the process, which other processes do not change.
"""

import argparse
import sys
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1])]

import torch

from utils.distill import DistillArgs, Distiller
from utils.losses import per_image_loss
from utils.models import build_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default in (("arch", "DeepLabV3"), ("encoder", "resnet18"), ("teacher-encoder", "resnet18")):
        parser.add_argument(f"--{flag}", default=default)
    for flag, default in (("size", 512), ("batch", 8), ("plain-batch", 8), ("classes", 21), ("repeats", 1)):
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--distill", default="cirkd")
    a = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    nets = [build_model(a.arch, encoder, classes=a.classes) for encoder in (a.encoder, a.teacher_encoder)]
    student, teacher = (net.to(device, memory_format=torch.channels_last) for net in nets)
    teacher.requires_grad_(False).eval()

    def distiller(text):
        flags = {field.name: field.default for field in fields(DistillArgs)} | {"distill": text, "classes": a.classes}
        run = SimpleNamespace(args=SimpleNamespace(**flags), device=device, world=1, join=lambda keys: keys)
        return Distiller(run, student, teacher, (a.arch, a.arch))

    kl, other = distiller("kl"), distiller(a.distill)
    mask = torch.randint(0, a.classes, (a.batch, 8, 8), device=device, dtype=torch.uint8)
    mask = mask.repeat_interleave(a.size // 8, 1).repeat_interleave(a.size // 8, 2)
    image = torch.randint(0, 256, (a.batch, 3, a.size, a.size), device=device, dtype=torch.uint8)

    def plain():
        x, y = image[: a.plain_batch], mask[: a.plain_batch]
        logits = student(x)
        (per_image_loss(logits, y).mean() + sum(kl(logits, kl.ask(x), y).values())).backward()

    cells = -(-a.size // 8)
    maps = [torch.randn(a.batch, tap.channels, cells, cells, device=device) for tap in other.taps]
    logits = torch.randn(a.batch, a.classes, a.size, a.size, device=device)

    def losses():
        for tap, features in zip(other.taps, maps, strict=True):
            tap.stride, tap.map = 1, features.clone().requires_grad_()
        sum(other(logits.requires_grad_(), logits.detach(), mask).values()).backward()

    step, terms = seconds(plain, a.repeats, device) * a.batch / a.plain_batch, seconds(losses, a.repeats, device)
    print(
        f"{a.arch} {a.encoder}, teacher {a.teacher_encoder}, {a.classes} classes, {a.size} x {a.size}, batch {a.batch}"
    )
    print(f"plain step {step:.2f} s, {a.distill} {terms:.2f} s: together {1 + terms / step:.2f} times as long")


def seconds(work, repeats, device) -> float:
    """The best of `repeats` runs after one to warm up (on a CPU: none)."""
    cuda = device.type == "cuda"
    if cuda:
        work()
    best, clock = float("inf"), time.perf_counter if cuda else time.process_time
    for _ in range(repeats):
        if cuda:
            torch.cuda.synchronize()
        began = clock()
        work()
        if cuda:
            torch.cuda.synchronize()
        best = min(best, clock() - began)
    return best


if __name__ == "__main__":
    main()
