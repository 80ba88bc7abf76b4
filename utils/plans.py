"""How images are run, as flags: what predict.py and evaluate.py share."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from utils.errors import InputError
from utils.inference import Plan


@dataclass
class PlanArgs:
    mode: Annotated[Literal["auto", "resize", "slide"], "whole image resized, windows, or what Mode says above"] = (
        "auto"
    )
    size: Annotated[int, "network input; -1: the size of training; 0: as the images are"] = -1
    window: Annotated[int, "side of a window at the network's input; 0: as --size, or 1024 where that is 0"] = 0
    overlap: Annotated[float, "share of a window that the next one sees too"] = 0.5
    blend: Annotated[Literal["hann", "count"], "windows count more in their middle; count: all alike, as published"] = (
        "hann"
    )
    scales: Annotated[list[float], "sizes to average over, as factors"] = field(default_factory=lambda: [1.0])
    flip: Annotated[bool, "average with the mirrored image"] = False
    net: Annotated[int, "network of a checkpoint of two, 0 or 1; -1: the one that validation chose"] = -1
    batch_size: Annotated[int, "images or windows a step"] = 16
    precision: Annotated[Literal["fp32", "bf16"], "bf16 is faster wherever the hardware has it"] = "fp32"


def check_plan(args: PlanArgs) -> None:
    """Raise InputError for a value with which no image can be run."""
    if args.size < -1 or args.window < 0:
        raise InputError("--size must be 0 or more, or -1 for that of training; --window must be 0 or more")
    if not 0 <= args.overlap <= 0.95:
        raise InputError(f"--overlap {args.overlap}: must lie between 0 and 0.95")
    check_scales(args.scales)
    if args.batch_size < 1:
        raise InputError(f"--batch-size {args.batch_size}: must be 1 or more")


def check_scales(scales: list[float]) -> None:
    """Raise InputError for a scale at which no image can be run."""
    if not all(0.05 <= scale <= 20 for scale in scales):
        raise InputError(f"--scales {' '.join(map(str, scales))}: must lie between 0.05 and 20")


def plan_of(states: list[dict], args: PlanArgs) -> Plan:
    """The plan of the flags for checkpoints (`load_network`) that go together; InputError where they do not."""
    models = [state["model"] for state in states]
    classes, sizes = {model["classes"] for model in models}, {model["size"] for model in models}
    if len(classes) > 1:
        raise InputError(f"--more: the checkpoints have different classes: {sorted(classes)}")
    if len(sizes) > 1 and args.size < 0:
        raise InputError(
            f"--more: the checkpoints were trained at different sizes, {sorted(sizes)}; choose with --size"
        )
    return Plan(
        size=models[0]["size"] if args.size < 0 else args.size,
        side=states[0].get("side", 0),
        mode=args.mode,
        window=args.window,
        overlap=args.overlap,
        blend=args.blend,
        scales=tuple(args.scales),
        flip=args.flip,
        batch_size=args.batch_size,
        precision=args.precision,
    )
