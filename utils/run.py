"""The furniture every script shares: devices, seeds, precision, batches, one optimizer step, the log."""

import fcntl
import hashlib
import json
import math
import os
import random
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_value_
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

from utils.checkpoint import bare, image_keys, load_weights
from utils.errors import InputError
from utils.logs import read_jsonl
from utils.models import build_model

PACKAGES = ("torchvision", "segmentation-models-pytorch", "albumentations", "opencv-python-headless", "numpy", "pandas")
FREE = {"workers", "run_dir", "cache_gb", "cache_dir", "cpu"}  # flags that may change between the parts of one run


class Batches(Sampler):
    """Batches of this process's share of the indices: shuffled by (seed, epoch) for training, else in order.

    Evaluation counts every index once. Training gives every process equally many, and leaves out a last batch of one
    image, which BatchNorm cannot normalise.
    """

    def __init__(self, n: int, batch_size: int, rank: int, world: int, seed: int | None = None):
        self.n, self.size, self.rank, self.world, self.seed, self.epoch = n, batch_size, rank, world, seed, 0

    def __iter__(self):
        order = torch.arange(self.n)
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = torch.randperm(self.n, generator=generator)
        own = order[self.rank : self._used() : self.world].tolist()
        return iter([own[i : i + self.size] for i in range(0, len(own), self.size)][: len(self)])

    def __len__(self):
        own = len(range(self.rank, self._used(), self.world))
        whole, rest = divmod(own, self.size)
        alone = self.seed is not None and rest == 1 and whole > 0 and self.size > 1
        return whole + (rest > 0) - alone

    def _used(self):
        return self.n if self.seed is None else self.n - self.n % self.world


class Run:
    """One run folder, one device, one process of possibly several."""

    def __init__(self, args):
        self.args = args
        self.world, self.rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        cuda = torch.cuda.is_available() and not args.cpu
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo")
        self.main = self.rank == 0
        self.dir = Path(args.run_dir) / args.name
        self.writer, self.started = None, time.time()
        self.about = {"models": []}
        if self.main:
            self._open_folder()
        self.seed_everything(args.seed)

    def seed_everything(self, seed: int) -> None:
        random.seed(seed), np.random.seed(seed % 2**32), torch.manual_seed(seed)

    def build(self, index: int = 0, arch: str = "", encoder: str = ""):
        """The network of the flags (the `index`-th of several), initialised from the seed, wrapped for this device."""
        a = self.args
        self.seed_everything(a.seed + 10_007 * index)
        arch, encoder = arch or a.arch, encoder or a.encoder
        net = build_model(arch, encoder, a.encoder_weights, a.classes, a.width)
        model = {"arch": arch, "encoder": encoder, "classes": a.classes, "width": a.width, "size": a.size}
        self.about["models"].append(model)
        if a.load:
            load_weights(net, a.load, index)
        if a.size:
            self._try(net)
        return self.wrap(net)

    def _try(self, net):
        image = torch.zeros(1, 3, self.args.size, self.args.size, dtype=torch.uint8)
        try:
            with torch.inference_mode():
                net.eval()(image)
        except (RuntimeError, AssertionError, ValueError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(f"--arch {self.args.arch}: cannot take --size {self.args.size} ({first})") from None

    def wrap(self, model):
        model = model.to(self.device, memory_format=torch.channels_last)
        if self.world == 1:
            return model
        if self.device.type == "cuda":
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return DistributedDataParallel(model, device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.precision == "bf16")

    def loader(self, dataset, train: bool = False) -> DataLoader:
        size = self.args.batch_size if dataset.one_shape() else 1
        if train:
            self.about["images"] = image_keys(dataset.frame["img"])
        return DataLoader(
            dataset,
            batch_sampler=Batches(len(dataset), size, self.rank, self.world, self.args.seed if train else None),
            collate_fn=dataset.collate,
            num_workers=self.args.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),
        )

    def loaders(self, datasets) -> list:
        """Loaders of the training, validation and test list; None for a test list that was not given."""
        loaders = [self.loader(dataset, train=i == 0) for i, dataset in enumerate(datasets)]
        return loaders if len(loaders) == 3 else [*loaders, None]

    def batches(self, loader, epoch: int = 0, nets=()):
        """One pass, on this device. A training pass is a pure function of (seed, epoch, rank)."""
        train = loader.batch_sampler.seed is not None
        if train:
            loader.batch_sampler.epoch = loader.dataset.epoch = epoch
            self.seed_everything(self.args.seed + 7919 * (epoch + 1) + self.rank)
        for net in nets:
            net.train()
        text = f"epoch {epoch + 1}/{self.args.epochs}" if train else "evaluate"
        quiet = not self.main or not sys.stderr.isatty()
        for batch in tqdm(loader, text, leave=False, disable=quiet):
            batch = {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}
            # rows of pixels become a channels-last batch without a copy
            yield batch | {"image": batch["image"].permute(0, 3, 1, 2)}

    def step(self, net, optimizer, schedule, loss: Tensor, clip: float | None = None, when=True) -> None:
        """One update, with gradients clipped before it; where `when` is False only the schedule moves on."""
        if when:
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            clip = self.clip if clip is None else clip
            if clip > 0:
                clip_grad_value_(net.parameters(), clip)
            optimizer.step()
        schedule.step()

    @property
    def clip(self) -> float:
        # the released single-network scripts clip after the step, which clips nothing
        return 0.0 if self.args.compat == "nlkd" else self.args.clip_value

    def log(self, **row) -> None:
        """Append one line to log.jsonl and TensorBoard, and print it; InputError for a loss that is not finite."""
        if not math.isfinite(row.get("train_loss", 0.0)):
            remedy = "lower --learning-rate, set --clip-value, or use --precision fp32"
            raise InputError(f"{self.dir}: the loss of epoch {row['epoch']} is {row['train_loss']}; {remedy}")
        if not self.main:
            return
        with (self.dir / "log.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        from torch.utils.tensorboard import SummaryWriter  # takes a second, which a finished run does not spend

        self.writer = self.writer or SummaryWriter(str(self.dir), purge_step=row.get("epoch"))
        for key, value in row.items():
            if isinstance(value, float):
                self.writer.add_scalar(key.replace("_", "/", 1), value, row.get("epoch", self.args.epochs - 1))
        self.writer.flush()
        shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        print(f"{self.args.name}  {'  '.join(shown)}", flush=True)

    def finished(self) -> bool:
        """Whether this run has its last line already; then there is nothing to do, and it says so."""
        done = any(row.get("split") in ("test", "none") for row in self.read_log())
        if done and self.main:
            print(f"{self.dir}: finished, nothing to do")
        return done

    def read_log(self) -> list[dict]:
        """The rows of log.jsonl; a last line that was cut off by a kill is left out."""
        return read_jsonl(self.dir / "log.jsonl")

    def keep_log_before(self, epoch: int) -> None:
        """Drop the lines of epochs that will be done again."""
        if self.main and (self.dir / "log.jsonl").exists():
            rows = [row for row in self.read_log() if row.get("epoch", epoch) < epoch]
            part = self.dir / ".log.jsonl.writing"
            part.write_text("".join(json.dumps(row) + "\n" for row in rows))
            part.replace(self.dir / "log.jsonl")

    def seconds(self) -> float:
        """Wall time since the last call."""
        before, self.started = self.started, time.time()
        return round(self.started - before, 3)

    def sum(self, tensor: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            dist.barrier()

    def share_buffers(self, net) -> None:
        """Give every process the buffers (BatchNorm statistics) of the first, which are those that are saved."""
        if self.world > 1:
            for buffer in bare(net).buffers():
                dist.broadcast(buffer, 0)

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over the processes of a tensor without gradient."""
        return self.sum(tensor.detach().clone().double()) / self.world

    def _open_folder(self):
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self.lock = (self.dir / ".lock").open("w")
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.dir}: another process runs here; wait for it or choose another --name") from None
        except OSError as error:
            raise InputError(f"{self.dir}: cannot be written ({error.strerror}); choose another --run-dir") from None
        lists = {k: _digest(getattr(self.args, k)) for k in ("train_csv", "valid_csv", "test_csv")}
        now = asdict(self.args) | {"processes": self.world, "content": lists}
        path = self.dir / "args.json"
        if path.exists() and (self.dir / "last.pt").exists():
            differ = _differences(json.loads(path.read_text()), now)
            if differ:
                raise InputError(f"{self.dir}: was run with {'; '.join(differ)}. Choose another --name or remove it")
        path.write_text(json.dumps(now, indent=1) + "\n")
        (self.dir / "env.json").write_text(json.dumps(_environment(self.device, self.world), indent=1) + "\n")


class Averages:
    """Means over an epoch, summed where the tensors are, so that a training loop never waits for the device."""

    def __init__(self, run: Run):
        self.run, self.sums = run, {}

    def add(self, noisy: Tensor | None = None, **values) -> None:
        """Add (n,) tensors, or pairs (parts, wholes) of tensors whose ratio of sums is wanted.

        With `noisy` (n,) (1, 0, or -1 unknown) each value also has a mean over clean and over noisy examples.
        """
        for name, value in values.items():
            if isinstance(value, tuple):
                self._add(name, *value)
                continue
            self._add(name, value, torch.ones_like(value))
            if noisy is not None:
                self._add(f"{name}_clean", value * (noisy == 0), noisy == 0)
                self._add(f"{name}_noisy", value * (noisy == 1), noisy == 1)

    def _add(self, name, part, whole):
        pair = torch.stack([part.detach().sum().double(), whole.detach().sum().double()])
        self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def result(self, prefix: str = "train_") -> dict[str, float]:
        """{prefix + name: mean} over all processes; means of nothing are left out."""
        if not self.sums:
            return {}
        sums = self.run.sum(torch.stack(list(self.sums.values()))).tolist()
        return {prefix + k: part / whole for k, (part, whole) in zip(self.sums, sums, strict=True) if whole > 0}


def _version(package) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _digest(path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16] if path and Path(path).is_file() else ""


def _differences(old: dict, new: dict) -> list[str]:
    flags = sorted((set(old) | set(new)) - FREE - {"content"})
    differ = [f"--{k} {old.get(k)} (now {new.get(k)})" for k in flags if old.get(k) != new.get(k)]
    lists = [k for k, v in new["content"].items() if old.get("content", {}).get(k, v) != v and old.get(k) == new[k]]
    return differ + [f"another content of --{k} {new[k]}" for k in lists]


def _environment(device, world) -> dict:
    root = Path(__file__).resolve().parents[1]

    def git(*words):
        try:
            done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.strip()

    threads = torch.get_num_threads()
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {threads} thread{'s' * (threads > 1)}"
    )
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "packages": {name: _version(name) for name in PACKAGES},
        "device": name,
        "processes": world,
        "command": " ".join(sys.argv),
    }
