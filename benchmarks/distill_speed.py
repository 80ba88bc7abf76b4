"""What a loss of --distill costs: seconds and peak memory of whole training steps, with it and with plain KL.

Run     python benchmarks/distill_speed.py --distill cirkd                  # 512 x 512, batch 8, 21 classes
        python benchmarks/distill_speed.py --precision bf16 --encoder resnet101 --teacher-encoder resnet101
A step is the student's and the teacher's forward pass, the losses, the student's backward pass. Each is measured in a
process of its own, CIRKD's with full queues. On a CPU seconds are those of the process, which other processes hardly
change, and memory is the largest resident set.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from contextlib import nullcontext
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
    for flag, default in (("size", 512), ("batch", 8), ("classes", 21), ("repeats", 1)):
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--distill", default="cirkd", help="what is measured, beside kl alone")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # what a process of its own measures
    a = parser.parse_args()
    if a.only:
        print(json.dumps(measure(a, a.only)))
        return
    found, rows = [], ("kl", a.distill if a.distill.startswith("kl") else f"kl,{a.distill}")
    for losses in rows:
        words = [sys.executable, __file__, *sys.argv[1:], "--only", losses]
        found.append(json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    print(
        f"{a.arch} {a.encoder}, teacher {a.teacher_encoder}, {a.classes} classes, {a.size} x {a.size}, batch {a.batch}"
    )
    print(f"{a.precision}, {device}, torch {torch.__version__}")
    for losses, (took, peak) in zip(rows, found, strict=True):
        print(f"{losses:12} {took:.3f} s a step, {peak:.0f} MiB")
    print(f"together {found[1][0] / found[0][0]:.2f} times as long")


def measure(a, losses: str) -> tuple[float, float]:
    """(seconds of a step, peak memory in MiB) with these losses."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    nets = [build_model(a.arch, encoder, classes=a.classes) for encoder in (a.encoder, a.teacher_encoder)]
    student, teacher = (net.to(device, memory_format=torch.channels_last) for net in nets)
    teacher.requires_grad_(False).eval()
    flags = {field.name: field.default for field in fields(DistillArgs)} | {"distill": losses, "classes": a.classes}
    run = SimpleNamespace(args=SimpleNamespace(**flags), device=device, world=1, join=lambda keys: keys)
    distil = Distiller(run, student, teacher, (a.arch, a.arch))
    if hasattr(distil, "memory"):
        for queue in (distil.memory.pixel, distil.memory.region):
            queue.keys.copy_(torch.nn.functional.normalize(torch.randn_like(queue.keys), dim=2))
            queue.filled.fill_(queue.size)
    mask = torch.randint(0, a.classes, (a.batch, 8, 8), device=device, dtype=torch.uint8)
    mask = mask.repeat_interleave(a.size // 8, 1).repeat_interleave(a.size // 8, 2)
    image = torch.randint(0, 256, (a.batch, 3, a.size, a.size), device=device, dtype=torch.uint8)
    bf16 = torch.autocast(device.type, torch.bfloat16) if a.precision == "bf16" else nullcontext()

    def step():
        with bf16:
            logits, target = student(image), distil.ask(image)
        (per_image_loss(logits, mask).mean() + sum(distil(logits, target, mask).values())).backward()

    took = seconds(step, a.repeats, device)
    if device.type == "cuda":
        return took, torch.cuda.max_memory_allocated() / 2**20
    return took, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


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
