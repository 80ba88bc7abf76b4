"""What the contrast of U2PL costs of a training step: the step without it, its head, its loss.

Run   python benchmarks/u2pl_speed.py --size 512 --batch 8 --classes 21 --arch DeepLabV3Plus --encoder resnet101
A step is the teacher's look at all images, the student's forward and backward pass, the update, and the teacher's own.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from train_u2pl import Args
from utils.ema import follow, teacher_of
from utils.methods.contrast import bank_of_flags, pixel_contrast
from utils.methods.u2pl import as_classes, reliable_loss, supervised_loss, teach, total
from utils.models import build_model
from utils.models.heads import WithHeads

PARTS = {"without": 0.0, "with its head": 0.0, "with head and loss": 0.1}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"size": 512, "batch": 8, "classes": 21, "rounds": 10, "bank": 30_000, "keys": 512}.items():
        flags.add_argument(f"--{name}", type=int, default=value)
    flags.add_argument("--arch", default="DeepLabV3Plus")
    flags.add_argument("--encoder", default="resnet101")
    flags.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    flags.add_argument("--cpu", action="store_true")
    a = flags.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not a.cpu else "cpu")
    steps = {name: step_of(a, device, name != "without", weight) for name, weight in PARTS.items()}
    times = {name: [] for name in steps}
    for _ in range(a.rounds + 1):  # in turn, so that a slow moment meets all of them; the first round warms up
        for name, step in steps.items():
            times[name].append(clock(step, device))
    medians = {name: statistics.median(found[1:]) for name, found in times.items()}
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(
        f"{a.arch} {a.encoder}, {a.classes} classes, {a.batch} + {a.batch} images of {a.size}, {a.precision}, {where}"
    )
    whole = medians["with head and loss"]
    for name, seconds in medians.items():
        print(f"{name:20} {1000 * seconds:8.1f} ms")
    print(f"{'share of the loss':20} {100 * (whole - medians['with its head']) / whole:8.1f} % of the whole step")
    print(f"{'share of both':20} {100 * (whole - medians['without']) / whole:8.1f} % of the whole step")


def step_of(a, device, head, weight):
    """A function that makes one step with random images."""
    torch.manual_seed(0)
    first = 50_000 if a.bank == 30_000 else a.bank
    args = Args("", "", classes=a.classes, contrast_weight=weight, bank=a.bank, bank_first=first, max_keys=a.keys)
    net = WithHeads(build_model(a.arch, a.encoder, classes=a.classes), args.features * head, False, 64)
    student = net.to(device, memory_format=torch.channels_last).train()
    teacher, bank = teacher_of(student), bank_of_flags(args, device)
    optimizer = torch.optim.SGD(student.parameters(), 1e-4, momentum=0.9)
    on = a.precision == "bf16"
    run = SimpleNamespace(autocast=lambda: torch.autocast(device.type, torch.bfloat16, enabled=on), device=device)
    run.share_buffers = lambda net: None
    shape = (a.batch, a.size, a.size)
    image, weak = (torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, device=device) for _ in range(2))
    mask = torch.randint(0, a.classes, shape, dtype=torch.uint8, device=device)
    batch = {"image": image.permute(0, 3, 1, 2), "weak": weak, "mask": mask, "truth": mask}

    def step():
        # without contrast the teacher looks at the unlabelled images only
        goal = teach(run, teacher, batch, args, 0.2)
        with run.autocast():
            out = student(torch.cat([batch["image"], goal.image]))
        losses = {"supervised": supervised_loss(out, mask, args)}
        logits = as_classes(out.logits[a.batch :])
        losses["unsupervised"], _ = reliable_loss(logits, goal.label, goal.entropy, goal.threshold)
        if bank is not None:
            losses["contrast"], _ = pixel_contrast(bank, out.feature, goal, args, lambda tensor: [tensor])
        total(losses, args, out).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        follow(run, teacher, student, 0.99)

    return step


def clock(step, device) -> float:
    """Seconds of a step: of the processor on a CPU, where others may be at work, else on the wall."""
    if device.type == "cpu":
        began = time.process_time()
        step()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
