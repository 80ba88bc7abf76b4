"""The flags of utils/generate_noisy_label.py."""

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from utils.errors import InputError
from utils.noise import KINDS
from utils.noise_plan import NLKD_LEVELS

LEFT_OUT = {"levels": [6, 10], "op": "both", "severity": 0.8}  # flags of which some exclude others, so none is preset


@dataclass
class Args:
    out_csv: Annotated[str, "folder of the noisy lists"]
    out_masks: Annotated[str, "folder that gets one folder of noisy masks a ratio"]
    train_csv: Annotated[str, "clean training list"] = ""
    valid_csv: Annotated[str, "clean validation list; it gets noise too, as a real one would have"] = ""
    test_csv: Annotated[str, "test list; it stays clean, --preset nlkd checks it"] = ""
    data_root: Annotated[str, "folder that relative paths in the lists start from"] = "."
    ratios: Annotated[list[int], "percent of the masks that become noisy"] = field(default_factory=lambda: [60])
    levels: Annotated[list[int] | None, "lowest and highest number of iterations, without --kinds; else 6 10"] = None
    op: Annotated[Literal["both", "erode", "dilate"] | None, "without --kinds; else both: a fair coin a mask"] = None
    seed: Annotated[int, "one seed for which masks, their levels and operations"] = 2020
    preset: Annotated[Literal["none", "nlkd"], "nlkd: the published assignment, for the published split"] = "none"
    trusted: Annotated[int, "also write trusted.csv: this many clean images, from the validation list first"] = 0
    workers: Annotated[int, "threads; 0: one a CPU core"] = 0
    kinds: Annotated[list[str], f"{' '.join(KINDS)}; several are a mixture, with chances: polygon:0.7 missing:0.3"] = (
        field(default_factory=list)
    )
    severity: Annotated[float | None, "mean IoU of noisy against clean masks that each kind is to leave; else 0.8"] = (
        None
    )
    strength: Annotated[list[float], "strength of every kind, instead of --severity"] = field(default_factory=list)
    confusion: Annotated[str, "CSV without head, C x C: the chance of class i to be labelled j (kind confusion)"] = ""
    classes: Annotated[int, "1: binary masks; more: class indices, 255 is ignored; needs --kinds"] = 1
    list: Annotated[str, "one clean list, instead of --train-csv and --valid-csv"] = ""


def complete(args: Args) -> Args:
    """The flags with a value for each that was left out; InputError for what cannot be, or not together."""
    _check(args)
    return replace(args, **{name: value for name, value in LEFT_OUT.items() if getattr(args, name) is None})


def _check(args: Args) -> None:
    for ratio in args.ratios:
        if not 0 <= ratio <= 100:
            raise InputError(f"--ratios {ratio}: a ratio is a percentage, 0 to 100")
    _check_together(args)
    if args.levels and (len(args.levels) != 2 or not 1 <= args.levels[0] <= args.levels[1]):
        raise InputError(f"--levels {' '.join(map(str, args.levels))}: give the lowest (1 or more) and the highest")
    for flag in ("seed", "trusted", "workers"):
        if getattr(args, flag) < 0:
            raise InputError(f"--{flag} {getattr(args, flag)}: must be 0 or more")
    if [bool(path) for path in (args.list, args.train_csv, args.valid_csv)] not in ([1, 0, 0], [0, 1, 1]):
        raise InputError("give --train-csv and --valid-csv, or --list alone")
    if not 1 <= args.classes <= 255 or (args.classes > 1 and not args.kinds):
        raise InputError(f"--classes {args.classes}: 1 to 255, and more than 1 with --kinds only")
    if args.preset == "nlkd":
        if not args.test_csv:
            raise InputError(
                "--preset nlkd needs --test-csv: the published noise follows from the draw of the test set"
            )
        if args.levels not in (None, [NLKD_LEVELS[0], NLKD_LEVELS[-1]]) or args.op not in (None, "both"):
            raise InputError("--preset nlkd has levels 6 to 10 and --op both; leave these two flags out")


def _check_together(args: Args) -> None:
    """No flag is passed over in silence: those of --kinds go with it, those of erosion by levels without it."""
    if args.preset == "nlkd" and args.kinds:
        raise InputError("--preset nlkd erodes and dilates; leave --kinds out")
    flags = ("levels", "op", "severity", "strength", "confusion")
    given = [name for name in flags if getattr(args, name) not in (None, [], "")]
    for name in given:
        if args.kinds and name in ("levels", "op"):
            raise InputError(f"--{name}: of no use beside --kinds, which have --severity or --strength; leave one out")
        if not args.kinds and name not in ("levels", "op"):
            raise InputError(f"--{name}: of no use without --kinds; give them too, or leave it out")
    if {"severity", "strength"} <= {*given}:
        raise InputError("--severity and --strength: the one is found from the other; leave one out")
