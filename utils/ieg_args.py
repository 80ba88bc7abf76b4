"""Flags of train_ieg.py; those that the released code has, too, bear its names."""

from dataclasses import dataclass
from typing import Annotated, Literal

from utils.errors import InputError

DECAY = {"wrn28-10": 5e-4, "resnet29": 1e-4, "resnet50": 4e-4, "small": 5e-4}


@dataclass
class IegArgs:
    dataset: Annotated[str, "KIND_NOISE_RATIO: cifar10 or cifar100, uniform or asymmetric; or webvisionmini[_PROBES]"]
    method: Annotated[Literal["supervised", "l2r", "ieg"], "supervised: the baseline"] = "ieg"
    network_name: Annotated[Literal["wrn28-10", "resnet29", "resnet50", "small"], "small is for CPUs"] = "wrn28-10"
    name: Annotated[str, "run name; everything is written to run_dir/name", "-n"] = "run"
    run_dir: Annotated[str, "parent of every run folder"] = "runs"
    data_root: Annotated[str, "train/CLASS/*.png and test/CLASS/*.png (val, probe), or torchvision's CIFAR"] = "data"
    download: Annotated[bool, "let torchvision fetch CIFAR into --data-root"] = False
    max_iteration: Annotated[int, "steps, rounded to whole passes over the training images"] = 100_000
    batch_size: Annotated[int, "images a step and process", "-b"] = 100
    learning_rate: Annotated[float, "of the first period; it is not scaled with the processes", "-l"] = 0.1
    first_period: Annotated[int, "steps of the first period of cosine restarts; 0: a pass"] = 0
    t_mul: Annotated[float, "each period is this times as long as the one before", "--cos-t-mul", "--cos_t_mul"] = 1.5
    m_mul: Annotated[float, "and begins with this times its learning rate", "--cos-m-mul", "--cos_m_mul"] = 0.9
    weight_decay: Annotated[
        float, "L2; -1: the network's own (wrn28-10, small 5e-4, resnet29 1e-4, resnet50 4e-4)"
    ] = -1.0
    preact_relu: Annotated[bool, "resnet29: with the activations that the released code lacks"] = False
    probe_per_class: Annotated[int, "clean images of a class; -1: as --probe-dataset-hold-ratio says"] = -1
    probe_dataset_hold_ratio: Annotated[
        float,
        "share of the images in the probe; -1: 0.002, 0.02 for cifar100",
        "--probe-hold-ratio",
        "--probe_hold_ratio",
    ] = -1.0
    include_true: Annotated[bool, "uniform noise may draw the true class, as in the released code"] = True
    train_images: Annotated[int, "only so many of the training images, alike for every class; 0: all"] = 0
    test_images: Annotated[int, "the same of the test images"] = 0
    aug_type: Annotated[Literal["autoaug", "randaug"], "ieg: what makes the strong view"] = "autoaug"
    grad_eps_init: Annotated[float, "ieg: trust in the given labels where they are judged and weighted"] = 0.9
    meta_step: Annotated[
        float, "step of the look-ahead; 0: none, as L2R was first published", "--meta-stepsize", "--meta_stepsize"
    ] = 0.1
    meta_momentum: Annotated[float, "ieg: momentum of that step"] = 0.9
    meta_pseudo_grad: Annotated[
        Literal["detach", "code"], "ieg: code: labels of the network's own move with its weights, as released; slower"
    ] = "detach"
    meta_grad: Annotated[Literal["jvp", "difference"], "difference: two passes instead of a derivative"] = "jvp"
    temperature: Annotated[float, "ieg: sharpening of the network's own labels; 1: none"] = 0.5
    logit_norm: Annotated[bool, "ieg: logits divided by their root mean square first, as released"] = True
    relabel: Annotated[bool, "ieg: given labels that do not help give way"] = True
    reweight: Annotated[bool, "ieg: given labels are weighted"] = True
    mix: Annotated[Literal["none", "mixup"], "ieg: mixtures of the probe and both views"] = "mixup"
    true_beta: Annotated[bool, "mixup: shares of Beta(0.5, 0.5) as in the paper, not the code's 1 - u^2 / 2"] = False
    ce_factor: Annotated[float, "ieg: weight of the mixtures that do not begin with the probe; 4 for webvisionmini"] = (
        5.0
    )
    consistency_factor: Annotated[float, "ieg: weight of the divergence of the views; 8 for webvisionmini"] = 20.0
    ema_decay: Annotated[float, "of the averaged weights, which are tested; 0: the weights themselves"] = 0.999
    precision: Annotated[Literal["fp32", "bf16", "fp16"], "bf16 is faster wherever the hardware has it"] = "fp32"
    save_minutes: Annotated[float, "save inside a pass too, this often; 0: only after it"] = 30.0
    seed: Annotated[int, "one seed for weights, noise, probe, order and views"] = 0
    workers: Annotated[int, "loader processes; -1: some, where a GPU would wait"] = -1
    cpu: Annotated[bool, "ignore any GPU"] = False
    compat: Annotated[
        Literal["none", "released"],
        "released: as the released code in what benchmarks/ieg.md marks so: --meta-pseudo-grad code; averaged weights "
        "have the BatchNorm statistics of the weights themselves, in supervised they lag a step; resnet29's decay is "
        "doubled; the probe's share is cut off; ends of periods are rounded",
    ] = "none"
    eval: Annotated[bool, "test what the run has saved, and end"] = False

    # what `Run` asks of every script and this one leaves alone
    epochs, accumulate, clip_value, select, compile, skip_nonfinite = 1, 1, 0.0, "last", False, False

    @property
    def decay(self) -> float:
        if self.weight_decay >= 0:
            return self.weight_decay
        # its regulariser lost the factor one half
        return DECAY[self.network_name] * (1 + (self.compat == "released" and self.network_name == "resnet29"))


def check_ieg(args: IegArgs) -> None:
    """Raise InputError for a value that no run can use; --compat released sets what belongs to it."""
    if args.compat == "released":
        args.meta_pseudo_grad = "code"
    whole = {"max_iteration": 1, "batch_size": 2, "probe_per_class": -1, "first_period": 0, "seed": 0, "workers": -1}
    for flag, least in whole.items():
        if getattr(args, flag) < least:
            raise InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be {least} or more")
    for flag in ("meta_step", "ce_factor", "consistency_factor", "save_minutes", "train_images", "test_images"):
        if not 0 <= getattr(args, flag) < float("inf"):
            raise InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be 0 or more")
    shares = ["grad_eps_init", "meta_momentum", "ema_decay", "m_mul"]
    shares += ["probe_dataset_hold_ratio"] * (args.probe_dataset_hold_ratio != -1)
    for flag in shares:
        if not 0 <= getattr(args, flag) <= 1:
            raise InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must lie between 0 and 1")
    for flag in ("learning_rate", "temperature"):
        if not 0 < getattr(args, flag) < float("inf"):
            raise InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be a positive number")
    if not 1 <= args.t_mul < float("inf"):
        raise InputError(f"--t-mul {args.t_mul}: must be 1 or more")
    if not (args.weight_decay == -1 or 0 <= args.weight_decay < float("inf")):
        raise InputError(f"--weight-decay {args.weight_decay}: must be 0 or more, or -1 for the network's own")
    if args.aug_type == "randaug" and args.dataset.startswith("webvisionmini"):
        raise InputError("--aug-type randaug: webvisionmini has the AutoAugment of ImageNet alone; leave it out")
