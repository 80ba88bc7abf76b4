"""Command lines from dataclasses: every field is a flag, spelled with dashes or underscores."""

import argparse
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import MISSING, dataclass, fields
from types import NoneType
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

from utils.errors import InputError, RankError, out_of_memory, say
from utils.interrupt import RESUME, Paused, stop

stop.before_anything_begins()
# flags that are shares or probabilities
SHARES = ("weight_floor", "t_start", "t_end", "slope_change", "correction_threshold", "consistency_confidence")
SHARES += ("unreliable", "ema_decay", "mix_prob", "anchor_threshold")
SHARES += ("ohem_threshold", "confidence", "feature_share", "iou_momentum")


@dataclass
class TrainArgs:
    train_csv: Annotated[str, "training list (CSV)"]
    valid_csv: Annotated[str, "validation list; it chooses the checkpoint"]
    test_csv: Annotated[str, "clean test list, looked at once at the end; empty: no test"] = ""
    name: Annotated[str, "run name; everything is written to run_dir/name", "-n"] = "run"
    run_dir: Annotated[str, "parent of every run folder"] = "runs"
    data_root: Annotated[str, "folder that relative paths in the lists start from"] = "."
    epochs: Annotated[int, "passes over the training list", "-e"] = 1
    batch_size: Annotated[int, "images a step and process", "-b"] = 16
    learning_rate: Annotated[float, "starting step size; 0.1 suits ranger, 1e-3 adamw", "-l"] = 0.1
    load: Annotated[str, "checkpoint whose weights the network starts from", "-f"] = ""
    arch: Annotated[
        str, "PlainUNet, PointRend, FCN, OCRNet, STDC1, STDC2, or any of segmentation-models-pytorch (Unet, ...)"
    ] = "PlainUNet"
    encoder: Annotated[str, "segmentation-models-pytorch encoder; PlainUNet has none"] = "resnet34"
    encoder_weights: Annotated[str, "none, or imagenet (fetched from the network at first use)"] = "none"
    width: Annotated[int, "first width of PlainUNet; 64 is the published network"] = 64
    size: Annotated[int, "images are resized to size x size; 0 keeps them as they are"] = 321
    classes: Annotated[int, "1: binary masks; more: class indices, 255 is ignored"] = 1
    augment: Annotated[Literal["none", "flip", "crop", "strong"], "augmentation of the training images"] = "none"
    optimizer: Annotated[Literal["ranger", "adamw", "sgd"], "update rule"] = "ranger"
    weight_decay: Annotated[float, "decoupled weight decay (sgd: L2)"] = 5e-4
    scheduler: Annotated[Literal["step", "cosine", "poly", "none"], "learning rate over the run"] = "step"
    step_epochs: Annotated[int, "scheduler step: epochs between two cuts"] = 25
    step_gamma: Annotated[float, "scheduler step: factor of a cut"] = 0.5
    loss: Annotated[
        Literal["ce", "gce", "sce", "nr_dice", "t_loss"],
        "cross entropy, or one that trusts labels less; gce is the first to try where many pixels are wrong",
    ] = "ce"
    gce_q: Annotated[float, "loss gce: 0 is cross entropy, 1 is the mean absolute error, which learns slowly"] = 0.7
    sce_alpha: Annotated[float, "loss sce: factor of cross entropy; the paper's for CIFAR-10, 6 for CIFAR-100"] = 0.1
    sce_beta: Annotated[float, "loss sce: factor of the reverse cross entropy; 1 and 0.1 there"] = 1.0
    dice_gamma: Annotated[float, "loss nr_dice: exponent; 2 is the Dice loss, smaller forgives more"] = 1.5
    clip_value: Annotated[float, "gradients are clipped to +- this before the step; 0: never"] = 0.1
    precision: Annotated[Literal["fp32", "bf16", "fp16"], "bf16 is faster wherever the hardware has it"] = "fp32"
    accumulate: Annotated[int, "batches whose gradients make one update"] = 1
    compile: Annotated[bool, "compile the networks: the first step takes minutes, the others less time"] = False
    skip_nonfinite: Annotated[bool, "leave out batches whose loss is not finite, and log them, instead of stopping"] = (
        False
    )
    save_minutes: Annotated[float, "save inside an epoch too, this often; 0: only after it"] = 30.0
    pictures: Annotated[int, "epochs between two pictures of a few training images; also after the last; 0: none"] = 10
    select: Annotated[Literal["best", "last"], "tested checkpoint: best on validation, or last"] = "best"
    theta0: Annotated[int, "boundary score: width of the boundary operator, odd"] = 3
    theta: Annotated[int, "boundary score: odd; (theta - 1) / 2 pixels of tolerance"] = 5
    seed: Annotated[int, "one seed for weights, order and augmentation"] = 0
    workers: Annotated[int, "loader processes; -1: some, where a GPU would wait for augmentation or decoding"] = -1
    cache_gb: Annotated[float, "decoded lists up to this size are kept"] = 8.0
    cache_dir: Annotated[str, "folder of decoded images, shared by all runs; empty: RUN_DIR/.cache"] = ""
    cpu: Annotated[bool, "ignore any GPU"] = False
    compat: Annotated[Literal["none", "nlkd"], "nlkd: the arithmetic of the released code, faults included"] = "none"


@dataclass
class WeightArgs(TrainArgs):
    weight_floor: Annotated[float, "no sample weight is smaller than this"] = 0.0
    normalise: Annotated[Literal["batch", "weight"], "divide a batch's loss by its images, or by its weights"] = "batch"
    level: Annotated[
        Literal["sample", "pixel", "both"],
        "a weight an image; a pixel (lists with column support); both (columns weight and support): masks whose scores "
        "are good count whole, others by the pixels that are --sure",
    ] = "sample"
    guard: Annotated[
        float, "level pixel, both: pixels from the contour of the mask over which trust returns; 0: none"
    ] = 1.0
    sure: Annotated[float, "level both: a pixel of a bad mask counts if its label has this probability"] = 0.9


@dataclass
class TwoNetArgs(TrainArgs):
    arch2: Annotated[str, "architecture of the second network; empty: as the first"] = ""
    encoder2: Annotated[str, "encoder of the second network; empty: as the first"] = ""
    preset: Annotated[Literal["paper", "nlkd"], "paper: the method's own paper; nlkd: as the released NLKD code"] = (
        "paper"
    )
    unit: Annotated[Literal["image", "pixel"], "what is selected"] = "image"
    normalise: Annotated[Literal["selected", "batch"], "divide the loss by the selected examples, or by all"] = (
        "selected"
    )


@dataclass
class RankArgs(TwoNetArgs):
    score: Annotated[Literal["loss", "iou", "bf", "bm", "miou"], "how a network ranks the examples"] = "loss"
    forget_rate: Annotated[float, "share to drop; -1: the noisy share of the list if known, else 0.2"] = -1.0
    schedule: Annotated[Literal["linear", "linear_then_2tau", "constant"], "how that share is reached"] = "linear"
    num_gradual: Annotated[int, "epochs until the full share is dropped"] = 10
    exponent: Annotated[float, "shape of the way there (c of the paper)"] = 1.0
    keep_rule: Annotated[Literal["round", "nlkd"], "keep max(1, round((1 - r) n)), or n - floor(r n)"] = "round"
    window: Annotated[int, "batches that are ranked together, so that small ones do not quantise the share"] = 1


def parse(cls, argv=None, doc=None):
    """The dataclass `cls` filled from the command line (or `argv`); InputError for values no run can use."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=_Help, allow_abbrev=False)
    _add_flags(parser, cls)
    presets = getattr(cls, "PRESETS", None)
    if presets:  # a preset moves the defaults; flags given by hand still win
        parser.set_defaults(**presets[parser.parse_known_args(argv)[0].preset])
    # flags may stand between two positional arguments, or between the words of one
    args = cls(**vars(parser.parse_intermixed_args(argv)))
    if isinstance(args, TrainArgs):
        check(args)
    return args


def launch(main, cls, argv=None) -> None:
    """Parse the command line and call `main`.

    A user's mistake becomes one line on stderr and exit code 2; a training run that is told to stop saves, and exits
    with 75, "resume me".
    """
    with _one_line(), stop.listening() if hasattr(cls, "save_minutes") else nullcontext():  # a training run
        main(parse(cls, argv, sys.modules[main.__module__].__doc__))


def launch_commands(commands: dict, argv=None) -> None:
    """`tool.py COMMAND --flags`: `commands` maps a name to (function, dataclass of its flags)."""
    with _one_line():
        doc = sys.modules[next(iter(commands.values()))[0].__module__].__doc__
        parser = argparse.ArgumentParser(description=doc, formatter_class=_Help, allow_abbrev=False)
        several = parser.add_subparsers(dest="command", required=True)
        for name, (function, cls) in commands.items():
            one = several.add_parser(name, help=function.__doc__, description=function.__doc__, formatter_class=_Help)
            _add_flags(one, cls)
        flags = vars(parser.parse_args(argv))
        function, cls = commands[flags.pop("command")]
        function(cls(**flags))


@contextmanager
def _one_line():
    try:
        yield
    except InputError as error:
        # a loader process hands its error over with a traceback; what was said stands at its end
        text = str(error).rpartition("InputError: ")[2].strip()
        say(f"error: {text}", every=isinstance(error, RankError))
        raise SystemExit(2) from None
    except OSError as error:
        say(f"error: {error.filename or 'output'}: {error.strerror or error}", every=True)
        raise SystemExit(2) from None
    except (MemoryError, RuntimeError, ValueError) as error:
        what = _known(error)
        if not what:
            raise
        say(f"error: {what}", every=True)
        raise SystemExit(2) from None
    except Paused:
        say("paused; the same command goes on from here")
        raise SystemExit(RESUME) from None
    except KeyboardInterrupt:
        say("interrupted; the same command goes on")
        raise SystemExit(130) from None


def _known(error) -> str:
    """What a user can do about an error of the libraries below, or nothing."""
    text = str(error)
    if out_of_memory(error):
        first = (text.strip().splitlines() or ["no memory left"])[0].partition(" GPU ")[0][:160]
        smaller = "a smaller --batch-size (with --accumulate the update stays the same)"
        return f"out of memory ({first}): try {smaller}, a smaller --size, --precision bf16, or a smaller --encoder"
    if "DataLoader worker" in text and ("killed" in text or "exited" in text or "bus error" in text.lower()):
        return "a loader process died, mostly of too little memory: try --workers 0, fewer --workers or less --cache-gb"
    if "more than 1 value per channel" in text:
        return "BatchNorm met one value a channel: use a larger --batch-size or --size, or another --arch"
    return ""


def _add_flags(parser, cls) -> None:
    hints = get_type_hints(cls, include_extras=True)
    for f in fields(cls):
        kind, (text, *short) = hints[f.name].__origin__, hints[f.name].__metadata__
        if short == ["positional"]:
            several = {"nargs": "*", "default": []} if f.default_factory is list else {}
            parser.add_argument(f.name, help=text, **_how(kind) | several)
            continue
        names = dict.fromkeys([*short, "--" + f.name.replace("_", "-"), "--" + f.name])
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        needed = {"required": True} if default is MISSING else {"default": default}
        parser.add_argument(*names, dest=f.name, help=text.replace("%", "%%"), **needed, **_how(kind))


def check(args: TrainArgs) -> None:
    """Raise InputError for a value that no training run can use."""
    for flag in ("epochs", "batch_size", "classes", "width", "step_epochs", "accumulate"):
        if getattr(args, flag) < 1:
            raise InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be 1 or more")
    for flag in ("size", "clip_value", "weight_decay", "cache_gb", "seed", "step_gamma", "save_minutes", "pictures"):
        if not getattr(args, flag) >= 0:
            raise InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be 0 or more")
    for scale in getattr(args, "scales", []):
        if not 0.1 <= scale <= 4:
            raise InputError(f"--scales {scale}: must lie between 0.1 and 4")
    if not 0 <= getattr(args, "consistency", 0) < float("inf"):
        raise InputError(f"--consistency {args.consistency}: must be 0 or more")
    if not getattr(args, "guard", 0) >= 0:
        raise InputError(f"--guard {args.guard}: must be 0 or more")
    if args.workers < -1:
        raise InputError(f"--workers {args.workers}: must be 0 or more, or -1 to leave it open")
    if not 0 < args.learning_rate < float("inf"):
        raise InputError(f"--learning-rate {args.learning_rate}: must be a positive number")
    for flag in ("theta0", "theta", "student_theta"):
        if flag == "student_theta" and getattr(args, flag, 0) == 0:
            continue
        if getattr(args, flag) < 1 or getattr(args, flag) % 2 == 0:
            raise InputError(f"--{flag} {getattr(args, flag)}: must be odd and positive")
    for flag in ("window", "num_gradual", "warmup", "init_epochs"):
        if getattr(args, flag, 1) < (flag == "window"):
            raise InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: too small")
    for flag in ("cls_weight", "pct_weight", "pct_power"):
        if not 0 <= getattr(args, flag, 0) < float("inf"):
            raise InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be 0 or more")
    for flag in ("unsup_weight", "contrast_weight", "aux_weight", "warm_epochs", "rank_low", "bank_first", "ohem_kept"):
        if not getattr(args, flag, 0) >= 0:
            raise InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be 0 or more")
    for flag in ("anchors", "negatives", "max_keys", "bank", "features", "rank_high", "views"):
        if getattr(args, flag, 1) < 1:
            raise InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be 1 or more")
    if not getattr(args, "temperature", 1) > 0:
        raise InputError(f"--temperature {args.temperature}: must be a positive number")
    for flag in SHARES:
        if not 0 <= getattr(args, flag, 0) <= 1:
            raise InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must lie between 0 and 1")
    if not (getattr(args, "forget_rate", 0) == -1 or 0 <= getattr(args, "forget_rate", 0) < 1):
        raise InputError(f"--forget-rate {args.forget_rate}: must lie in [0, 1), or be -1 for the share of the list")
    if getattr(args, "unit", "image") == "pixel" and getattr(args, "score", "loss") != "loss":
        raise InputError(f"--unit pixel --score {args.score}: a single pixel has no such score; use --score loss")
    check_loss(args)
    if args.compat == "nlkd" and hasattr(args, "slope_change"):
        raise InputError("--compat nlkd: the released code corrects no labels; leave it out")
    if hasattr(args, "pct_weight") and args.arch == "PointRend":
        raise InputError("--arch PointRend: has no map of logits in training, which this script needs; choose another")
    if (hasattr(args, "unsup_weight") or hasattr(args, "pct_weight")) and args.loss != "ce":
        raise InputError(f"--loss {args.loss}: this script learns by cross entropy; leave --loss out")
    if args.compat == "nlkd" and args.classes > 1:
        raise InputError("--compat nlkd: the released code knows one class only; leave --classes or --compat out")
    if args.classes > 255:
        raise InputError(f"--classes {args.classes}: masks have 8 bits and 255 means ignore, so 255 classes at most")


def check_loss(args: TrainArgs) -> None:
    """Raise InputError for a --loss that the other flags have no use for, or for settings it cannot have."""
    if args.compat == "nlkd" and args.loss != "ce":
        raise InputError(f"--loss {args.loss}: the released code has cross entropy only; leave --compat nlkd out")
    for flag, other in (("unit", "image"), ("level", "sample")):
        if getattr(args, flag, other) != other and args.loss in ("nr_dice", "t_loss"):
            remedy = f"use --{flag} {other}, or --loss ce, gce or sce"
            raise InputError(
                f"--{flag} {getattr(args, flag)} --loss {args.loss}: this loss is one of a whole image; {remedy}"
            )
    if not 0 <= args.gce_q <= 1:
        raise InputError(f"--gce-q {args.gce_q}: must lie between 0 and 1")
    if not 1 <= args.dice_gamma <= 2:
        raise InputError(f"--dice-gamma {args.dice_gamma}: must lie between 1 and 2")
    for flag in ("sce_alpha", "sce_beta"):
        if not 0 <= getattr(args, flag) < float("inf"):
            raise InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be 0 or more")


def _how(kind) -> dict:
    if NoneType in get_args(kind):  # without a default
        return _how(get_args(kind)[0])
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if kind == bool | str:  # a flag that may have a value
        return {"nargs": "?", "const": True}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    if get_origin(kind) is list:
        return {"nargs": "+", "type": get_args(kind)[0]}
    return {"type": kind}


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help texts with defaults, under the module docstring as it is written."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)
