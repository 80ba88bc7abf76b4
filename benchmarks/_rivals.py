"""What benchmarks/speed.py measures against each other: the real scripts, and the least that any of them must do."""

import contextlib
import importlib
import io
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from itertools import pairwise

import cv2
import torch
from torch.nn.utils import clip_grad_value_

from utils import evaluate as evaluation
from utils import get_weight, images, steps
from utils.args import TrainArgs, parse
from utils.averages import Averages
from utils.boundary import soft_boundary_f
from utils.checkpoint import Checkpoint
from utils.lists import read_list
from utils.logs import read_jsonl
from utils.losses import per_image_loss
from utils.methods.robust_losses import CrossEntropy
from utils.models import Segmenter, build_model
from utils.optim import build_optimizer
from utils.run import Run


def decode_only(files, workers: int, read) -> None:
    """Read every file and do nothing else, in `workers` threads that have nothing to wait for."""

    def some(k):
        for path in files[k::workers]:
            read(path)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(some, range(workers)))


def script(name: str):
    """The module of a training script."""
    return importlib.import_module(name)


def beside_script(bench, name: str, flags: list[str], rounds: int, rival) -> dict[str, list[float]]:
    """Images a second of `rounds` epochs of a script after its first, and of `rival`, which runs in the pauses.

    Everything between two log lines of the script is in: loading, augmentation, training, validation (on one image),
    the log, the checkpoint. An epoch is compared with what `rival` reached just before and just after it.
    """
    module, folder, rates, log = script(name), f"{name}_{time.time_ns()}", [], Run.log
    kind = next(getattr(module, cls) for cls in ("Args", "WeightArgs", "TrainArgs") if hasattr(module, cls))
    args = parse(kind, [*flags, f"--name={folder}", f"--epochs={rounds + 1}"])

    def log_and_pause(run, **row):
        log(run, **row)
        if "epoch" in row:
            rates.append(rival())
            run.started = time.time()  # the pause is not the script's

    Run.log = log_and_pause
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            module.main(args)
    finally:
        Run.log = log
    folder = bench.folder / "runs" / folder
    seconds = [row["seconds"] for row in read_jsonl(folder / "log.jsonl") if "seconds" in row][1:]
    shutil.rmtree(folder)
    images = len(read_list(args.train_csv))
    around = [2 / (1 / before + 1 / after) for before, after in pairwise(rates)]
    return {"ours": [images / t for t in seconds], "rival": around}


class Bare:
    """Forward, backward, clip and update on one batch that stays on the device, with one network or two."""

    def __init__(self, bench, nets: int = 1, size: int = 0, classes: int = 1):
        args = self.args = parse(TrainArgs, bench.flags("none.csv", size, classes))
        self.bench, shape = bench, (args.batch_size, args.size, args.size)
        pixels = torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, device=bench.device)
        self.image = pixels.permute(0, 3, 1, 2)  # channels last, as the scripts have it
        self.mask = torch.randint(0, max(2, classes), shape, dtype=torch.uint8, device=bench.device)
        self.nets = [build_model(args.arch, args.encoder, "none", classes, args.width).train() for _ in range(nets)]
        self.nets = [net.to(bench.device, memory_format=torch.channels_last) for net in self.nets]
        self.optimizers = [build_optimizer(args, net, 100)[0] for net in self.nets]

    def step(self) -> None:
        bf16 = self.args.precision == "bf16"
        with torch.autocast(self.bench.device.type, torch.bfloat16, enabled=bf16):
            logits = [net(self.image) for net in self.nets]
        for net, optimizer, z in zip(self.nets, self.optimizers, logits, strict=True):
            per_image_loss(z, self.mask).mean().backward()
            clip_grad_value_(net.parameters(), self.args.clip_value)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def rate(self, steps: int) -> float:
        """Images a second over so many steps."""
        self.step()
        return len(self.image) / self.bench.seconds(self.step, steps)


@torch.inference_mode()
def three_passes(run, net, batches) -> None:
    """Evaluation as the original does it: a forward pass each for IoU, Dice and the boundary score by max pooling."""
    for measure in (_iou, _dice, soft_boundary_f):
        for batch in batches:
            with run.autocast():
                logits = net(batch["image"])
            # outputs of several classes are taken by their first, which costs the same
            float(measure((logits[:, :1] > 0).float(), batch["mask"][:, None].float()).mean())


def _iou(pred, mask):
    both = (pred * mask).sum((1, 2, 3))
    return both / (pred.sum((1, 2, 3)) + mask.sum((1, 2, 3)) - both + 1e-7)


def _dice(pred, mask):
    return 2 * (pred * mask).sum((1, 2, 3)) / (pred.sum((1, 2, 3)) + mask.sum((1, 2, 3)) + 1e-7)


FEED = {
    "loader": [(torch.utils.data.dataloader._BaseDataLoaderIter, "__next__")],
    "transfer": [(torch.Tensor, "to")],
    "forward": [(Segmenter, "forward")],
}


def parts_of_training(module) -> dict:
    """What an epoch of a training script is made of."""
    losses = ("weigh_pixels", "weighted_mean", "selected_loss", "examples")
    update = [(torch.optim.AdamW, "step"), (torch.optim.lr_scheduler.LRScheduler, "step")]
    update += [(torch.optim.Optimizer, "zero_grad")]
    return FEED | {
        "loss": [(CrossEntropy, "forward"), *((module, name) for name in losses)],
        "method": [(module, name) for name in ("student_quality", "cleanness", "keep_cleanest", "selection_stats")],
        "backward": [(torch.Tensor, "backward")],
        "clip": [(steps, "clip_grad_value_")],
        "update": update,
        "means": [(Averages, "add"), (Averages, "keep"), (Averages, "result")],
        "seeds": [(Run, "seed_everything")],
        "validation": [(module, "evaluate"), (module, "evaluate_all")],
        "log": [(Run, "log")],
        "checkpoint": [(Checkpoint, "save")],
    }


def parts_of_scoring() -> dict:
    """What get_weight.py does with binary masks."""
    return {
        "list": [(get_weight, "read_list")],
        "read": [(images, "_read_bytes")],
        "check the file": [(images, "_check_header")],
        "decode": [(cv2, "imdecode")],
        "check the values": [(images, "to_binary")],
        "count pixels": [(get_weight, "count_pair")],
        "arithmetic": [(get_weight, "scores_of_counts")],
        "write": [(get_weight, "_write")],
    }


def parts_of_evaluation() -> dict:
    """What evaluate() does."""
    return FEED | {"scores": [(evaluation, "_of_batch"), (evaluation, "scores_of_list")]}


class Phases:
    """Times parts, {name: places (owner, attribute)}, from the first call of `first` on; what one calls counts for it.

    On a GPU every part waits for the device, so that the shares are those of a run without overlap.
    """

    def __init__(self, parts: dict, sync, first: str = "loader"):
        self.sync, self.inside, self.spent, self.start = sync, False, {}, None
        self.parts, self.first = parts, first

    def __enter__(self):
        self.before = []
        for part, places in self.parts.items():
            for owner, name in places:
                if hasattr(owner, name):
                    self.before.append((owner, name, vars(owner).get(name)))
                    setattr(owner, name, self._timed(part, getattr(owner, name)))
        return self

    def __exit__(self, *_):
        self.total = time.perf_counter() - self.start
        for owner, name, old in self.before:
            delattr(owner, name) if old is None else setattr(owner, name, old)

    def shares(self) -> dict[str, float]:
        """The share of every part that occurred, and of the rest."""
        shares = {part: self.spent[part] / self.total for part in self.parts if part in self.spent}
        return shares | {"rest": 1 - sum(shares.values())}

    def _timed(self, part, work):
        @wraps(work)
        def timed(*args, **kwargs):
            if self.inside or (self.start is None and part != self.first):
                return work(*args, **kwargs)
            self.inside, start = True, time.perf_counter()
            self.start = self.start or start
            try:
                return work(*args, **kwargs)
            finally:
                self.sync()
                self.spent[part] = self.spent.get(part, 0.0) + time.perf_counter() - start
                self.inside = False

        return timed
