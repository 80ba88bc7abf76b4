"""What a student is taught by a frozen teacher: the flags, the teacher, and the sum of losses that they name."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from utils.checkpoint import bare, image_keys, load_network
from utils.errors import InputError, warn
from utils.methods.cirkd import Memory
from utils.methods.distillation import annotated, channel_wise, dist, labels_on, pixel_kl, to_grid
from utils.methods.relations import attention_transfer, between_images, intra_class_variation, pairwise
from utils.models.features import FeatureTap
from utils.points import dense

CIRKD = {"cirkd_batch": 1.0, "cirkd_pixel": 0.1, "cirkd_region": 0.1}
# as in the scripts of CIRKD and LAD
WEIGHTS = {"kl": 1.0, "cwd": 3.0, "dist": 1.0, "skd": 10.0, "ifvd": 20.0, "at": 10_000.0, "cwd_feature": 50.0} | CIRKD
ON_LOGITS = {"kl", "cwd", "dist"}


@dataclass
class DistillArgs:
    teacher: Annotated[str, "checkpoint of the teacher, which brings its own architecture"] = ""
    distill: Annotated[
        str,
        f"what the student is taught, kl:1,cwd:3; a name alone has its usual weight. {', '.join(WEIGHTS)}; cirkd",
    ] = ""
    kl_temperature: Annotated[float, "kl: softens both sides"] = 1.0
    cwd_temperature: Annotated[float, "cwd: softens the maps over space"] = 4.0
    cirkd_temperature: Annotated[float, "cirkd: of the similarities; small: only the nearest count"] = 0.1
    cirkd_slots: Annotated[
        int, "cirkd: pixels of each class remembered, a tenth as many regions; classes x slots x channels x 4 bytes"
    ] = 20_000
    distill_stride: Annotated[int, "losses compare cells of this many pixels; 1: every pixel, for kl, cwd, dist"] = 8
    distill_compat: Annotated[
        Literal["none", "released"], "released: void is taught too, CIRKD's queue and others as in the released code"
    ] = "none"


def mixture(text: str) -> dict[str, float]:
    """{"kl": 1.0, "cwd": 3.0} of `kl:1,cwd:3`, without what weighs 0; `cirkd` is three. InputError if unclear."""
    found = {}
    for word in filter(None, text.split(",")):
        name, colon, weight = word.strip().partition(":")
        try:
            weight = float(weight) if colon else None
        except ValueError:
            weight = math.nan
        parts = CIRKD if name == "cirkd" else {name: WEIGHTS.get(name)}
        if None in parts.values() or (weight is not None and not 0 <= weight < math.inf):
            raise InputError(f"--distill {word}: use NAME or NAME:WEIGHT; names are {', '.join(WEIGHTS)} and cirkd")
        factor = 1.0 if weight is None else weight
        for part, usual in parts.items():
            if part in found:
                raise InputError(f"--distill {text}: {part} is there twice")
            found[part] = usual * factor if name == "cirkd" or weight is None else factor
    return {name: weight for name, weight in found.items() if weight > 0}


def check_distill(args, needed: bool = False) -> None:
    """Raise InputError for flags of distillation that do not fit together; `needed`: there must be some."""
    for flag in ("kl_temperature", "cwd_temperature", "cirkd_temperature", "distill_stride", "cirkd_slots"):
        if not 0 < getattr(args, flag) < math.inf:
            raise InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be above 0")
    if args.teacher and not args.distill:
        raise InputError("--teacher: say with --distill what it teaches, e.g. --distill cwd")
    if (needed or args.distill) and not args.teacher:
        raise InputError("--teacher: name the checkpoint of the teacher, e.g. runs/teacher/best.pt")
    if args.teacher and not args.distill.strip(", "):
        raise InputError(f"--distill {args.distill}: names no loss; kl:0 leaves the teacher out")
    if 0 < args.size < args.distill_stride:
        raise InputError(f"--distill-stride {args.distill_stride}: is more than --size {args.size}")
    on_features = set(mixture(args.distill)) - ON_LOGITS
    if on_features and args.compile:
        names = ", ".join(sorted(on_features))
        raise InputError(f"--compile: features cannot be read from a compiled network; leave it or {names} out")
    if on_features and args.distill_stride < 4:
        wanted = f"--distill-stride {args.distill_stride}"
        raise InputError(f"{wanted}: features are compared pair by pair, which is too much; use 4 or more")


def distiller(run, student, test=None, labelled: bool = False) -> "Distiller":
    """What --distill and --teacher of a run say; `labelled`: the teacher is one that is shown the label.

    InputError where its classes or its inputs are not those of this run; a warning where it has seen the test list.
    """
    if not run.args.teacher:
        return Distiller(run, student, None, ("", ""))
    path = run.args.teacher
    net, about = load_network(path)
    model = about["model"]
    if model["classes"] != run.args.classes:
        raise InputError(f"--teacher {path}: has {model['classes']} classes, this run {run.args.classes} (--classes)")
    if model.get("label", bool(model.get("extra"))) != labelled:
        how = ("was not trained", "train_distill.py") if labelled else ("was trained", "train_lad_student.py")
        raise InputError(f"--teacher {path}: {how[0]} with the label as an input; use {how[1]}")
    if test is not None and "images" in about:
        seen = int(torch.isin(image_keys(test.dataset.frame["img"]), about["images"]).sum())
        if seen:
            warn(f"--teacher {path}: was trained on {seen} images of {run.args.test_csv}, which flatters its student")
    net = net.requires_grad_(False).eval().to(run.device, memory_format=torch.channels_last)
    return Distiller(run, student, net, (run.args.arch, model["arch"]))


def each(terms: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """Every loss of a batch as that of each of its `count` images, for the means of the log."""
    return {name: term.expand(count) for name, term in terms.items()}


class Distiller(nn.Module):
    """The losses of --distill between a student and a frozen teacher; its own state are projectors and queues.

    The teacher is no part of that state: it is read from its own file. Without any weight above 0 it is not asked.
    """

    def __init__(self, run, student, teacher, archs: tuple[str, str]):
        super().__init__()
        self.args, self.weights, self.taught = run.args, mixture(run.args.distill), (teacher,)
        self.classes, self.gather = max(2, run.args.classes), run.join
        self.taps = []
        if set(self.weights) - ON_LOGITS:
            self.taps = [FeatureTap(bare(net), arch) for net, arch in zip((student, teacher), archs, strict=True)]
            self._build(*(tap.channels for tap in self.taps))
        self.to(run.device)
        if run.world > 1 and run.device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(self)

    def _build(self, channels, of_teacher):
        self.match = nn.Identity()
        if "cwd_feature" in self.weights and channels != of_teacher:
            self.match = nn.Conv2d(channels, of_teacher, 1, bias=False)
        if {"cirkd_pixel", "cirkd_region"} & set(self.weights):
            self.memory = Memory(channels, of_teacher, self.classes, self.args.cirkd_slots)

    @torch.no_grad()
    def ask(self, image: Tensor, *labels: Tensor) -> Tensor | None:
        """The teacher's logits, None where nothing is taught; for several label maps those of the mean probability."""
        if not self.weights:
            return None
        logits = self.taught[0](image, *labels)
        if not isinstance(logits, tuple):
            return logits
        if logits[0].shape[1] == 1:
            return torch.stack([z.float().sigmoid() for z in logits]).mean(0).logit(1e-6)
        return torch.stack([z.float().log_softmax(1) for z in logits]).logsumexp(0)

    def forward(self, logits: Tensor, target: Tensor | None, mask: Tensor) -> dict[str, Tensor]:
        """{name: weight x loss} from the logits of both, (N, C, H, W), and the mask (N, H, W); {} without any."""
        if not self.weights:
            return {}
        released, stride = self.args.distill_compat == "released", self.args.distill_stride
        known = None if released else annotated(mask, self.args.classes)
        logits, target = (to_grid(dense(z), stride, known) for z in (logits, target))
        labels = labels_on(mask, stride)
        valid = None if released else annotated(labels, self.args.classes)
        losses = self._of_logits(logits, target, valid, released)
        if self.taps:
            maps = [tap.take(mask.shape[1:], stride) for tap in self.taps]
            losses |= self._of_features(*maps, labels, valid, released)
        return {name: weight * losses[name] for name, weight in self.weights.items()}

    def _of_logits(self, logits, target, valid, released):
        a, found = self.args, {}
        if "kl" in self.weights:
            found["kl"] = pixel_kl(logits, target, a.kl_temperature, valid, released)
        if "cwd" in self.weights:
            found["cwd"] = channel_wise(logits, target, a.cwd_temperature, valid)
        if "dist" in self.weights:
            found["dist"] = dist(logits, target, valid=valid)
        return found

    def _of_features(self, student, teacher, labels, valid, released):
        a, found, weights = self.args, {}, self.weights
        if "skd" in weights:
            found["skd"] = pairwise(student, teacher)
        if "at" in weights:
            found["at"] = attention_transfer(student, teacher, valid)
        if "ifvd" in weights:
            found["ifvd"] = intra_class_variation(student, teacher, labels, self.classes, released)
        if "cwd_feature" in weights:
            channels = student.shape[1] if released else 0
            found["cwd_feature"] = channel_wise(self.match(student), teacher, a.cwd_temperature, valid, channels)
        if "cirkd_batch" in weights:
            found["cirkd_batch"] = between_images(student, teacher, a.cirkd_temperature)
        if "cirkd_pixel" in weights or "cirkd_region" in weights:
            both = self.memory(student, teacher, labels, self.gather, a.cirkd_temperature, released)
            found |= dict(zip(("cirkd_pixel", "cirkd_region"), both, strict=True))
        return found
