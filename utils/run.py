"""The furniture every script shares: its folder and its lock, devices, networks, loaders, the log."""

import fcntl
import hashlib
import json
import math
import os
import re
import socket
import subprocess
import sys
import threading
from dataclasses import asdict, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from utils.batches import Batches
from utils.checkpoint import bare, image_keys, load_weights
from utils.errors import InputError, RankError, first_line, out_of_memory, writing
from utils.interrupt import loader_processes
from utils.logs import duration, read_jsonl, read_record, replace_text, to_disk
from utils.models import build_model
from utils.steps import Steps

PACKAGES = ("torchvision", "segmentation-models-pytorch", "albumentations", "opencv-python-headless", "numpy", "pandas")
# files whose content decides about the run
CONTENT = ("train_csv", "valid_csv", "test_csv", "unlabelled_csv", "weak_csv", "probe_csv", "teacher")
# flags that may change between the parts of one run
FREE = {"workers", "run_dir", "cache_gb", "cache_dir", "cpu", "save_minutes", "pictures", "eval", "download"}


class Run(Steps):
    """One run folder, one device, one process of possibly several."""

    def __init__(self, args):
        cuda = torch.cuda.is_available() and not args.cpu
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
        if cuda:
            if device.index >= torch.cuda.device_count():
                there = f"{torch.cuda.device_count()} GPUs on this machine"
                raise RankError(f"--nproc_per_node: at least {device.index + 1} processes, but {there}; start as many")
            torch.cuda.set_device(device)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo")
        super().__init__(args, device)
        self.dir = Path(args.run_dir) / args.name
        self.writer, self.about = None, {"models": []}
        if self.main:
            self._open_folder()
        self.seed_everything(args.seed)

    def build(self, index=0, arch="", encoder="", around=None, extra: int = 0, extra_init="rgb", label: bool = False):
        """The network of the flags (the `index`-th of several), initialised from the seed, wrapped for this device.

        `around`, a function, puts it into a larger module first. With `extra` channels of input it is the same network,
        as far as it sees the image; `label` says that they show it the label.
        """
        a = self.args
        self.seed_everything(a.seed + 10_007 * index)
        arch, encoder = arch or a.arch, encoder or a.encoder
        net = build_model(arch, encoder, a.encoder_weights, a.classes, a.width, extra, extra_init)
        model = {"arch": arch, "encoder": encoder, "classes": a.classes, "width": a.width, "size": a.size}
        model |= {"extra": extra, "label": label} if extra else {}
        self.about["models"].append(model)
        if a.load:
            load_weights(net, a.load, index)
        if a.size:
            self._try(net)
        return self.wrap(around(net) if around else net)

    def _try(self, net):
        image = torch.zeros(1, 3, self.args.size, self.args.size, dtype=torch.uint8)
        try:
            with torch.inference_mode():
                net.eval()(image)
        except (RuntimeError, AssertionError, ValueError) as error:
            if out_of_memory(error):
                raise
            raise InputError(
                f"--arch {self.args.arch}: cannot take --size {self.args.size} ({first_line(error)})"
            ) from None

    def wrap(self, model, together: bool = True):
        """A network on this device, shared by all processes; `together`: BatchNorm's statistics over all their GPUs."""
        model = model.to(self.device, memory_format=torch.channels_last)
        if self.args.compile:
            model.compile()
        if self.world == 1:
            return model
        if self.device.type == "cuda" and together:
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return DistributedDataParallel(model, device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def loader(self, dataset, train: bool = False) -> DataLoader:
        size = self.args.batch_size if dataset.one_shape() else 1
        if train:
            self.about |= {"images": image_keys(dataset.frame["img"]), "side": dataset.side()}
        workers = self.args.workers
        if workers < 0:  # a list in memory is faster without them, and a CPU has better things to do
            cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            workers = min(8, cores - 1) if self.device.type == "cuda" and dataset.takes_time() else 0
        sampler = Batches(len(dataset), size, self.rank, self.world, self.args.seed if train else None)
        if train and not len(sampler):
            raise InputError(f"{dataset.path}: {len(dataset)} images are too few for {self.world} processes")
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=dataset.collate,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),
            # a sample is a function of (seed, epoch, index), so that processes that live on change nothing
            **loader_processes(workers),
        )

    def loaders(self, datasets) -> list:
        """Loaders of the training, validation and test list; None for a test list that was not given."""
        loaders = [self.loader(dataset, train=i == 0) for i, dataset in enumerate(datasets)]
        return loaders if len(loaders) == 3 else [*loaders, None]

    def log(self, **row) -> None:
        """Append one line to log.jsonl and TensorBoard, and print it; lists of names go to log.jsonl only.

        InputError for a loss that is not finite, and for a file that cannot be written.
        """
        if not math.isfinite(row.get("train_loss", 0.0)):
            remedy = "lower --learning-rate, set --clip-value, or use --precision fp32"
            raise InputError(f"{self.dir}: the loss of epoch {row['epoch']} is {row['train_loss']}; {remedy}")
        if not self.main:
            return
        path = self.dir / "log.jsonl"
        with writing(path), path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            to_disk(file)  # before the checkpoint of this epoch
        self._tensorboard(row)
        if row == {"split": "none"}:
            return print(f"{self.args.name}  finished; there is no test list", flush=True)
        shown = {k: v for k, v in row.items() if not isinstance(v, list)}
        shown = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items()]
        to_do = self.args.epochs - 1 - row.get("epoch", self.args.epochs)
        if to_do > 0 and "seconds" in row:
            shown.append(f"left {duration(to_do * row['seconds'])}")
        print(f"{self.args.name}  {'  '.join(shown)}", flush=True)

    def _tensorboard(self, row):
        from torch.utils.tensorboard import SummaryWriter  # takes a second, which a finished run does not spend

        # its thread would print a traceback when the disk is full; the flush below raises the same error here
        threading.excepthook = _quiet_if_full
        with writing(self.dir):
            self.writer = self.writer or SummaryWriter(str(self.dir), purge_step=row.get("epoch"))
            for key, value in row.items():
                if isinstance(value, float):
                    tag = re.sub("^(train|valid|test)_", r"\1/", key)
                    self.writer.add_scalar(tag, value, row.get("epoch", self.args.epochs - 1))
            self.writer.flush()

    def finished(self) -> bool:
        """Whether this run has its last line already; then there is nothing to do, and it says so."""
        done = self._done()
        if done and self.main:
            print(f"{self.dir}: finished, nothing to do")
        if done:
            self.close()
        return done

    def _done(self):
        return any(row.get("split") in ("test", "none") for row in self.read_log())

    def read_log(self) -> list[dict]:
        """The rows of log.jsonl; a last line that was cut off by a kill is left out."""
        return read_jsonl(self.dir / "log.jsonl")

    def keep_log_before(self, epoch: int) -> None:
        """Drop the lines of epochs that will be done again."""
        if self.main and (self.dir / "log.jsonl").exists():
            rows = [row for row in self.read_log() if row.get("epoch", epoch) < epoch]
            replace_text(self.dir / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def sum(self, tensor: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def every(self, tensor: Tensor) -> list[Tensor]:
        """A tensor without gradient, of the same shape everywhere, as all processes have it, in their order."""
        every = [torch.empty_like(tensor) for _ in range(self.world)] if self.world > 1 else [tensor]
        if self.world > 1:
            dist.all_gather(every, tensor.contiguous())
        return every

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            dist.barrier()

    def share_buffers(self, net) -> None:
        """Give every process the buffers (BatchNorm statistics) of the first, which are those that are saved."""
        if self.world > 1:
            for buffer in bare(net).buffers():
                dist.broadcast(buffer, 0)

    def join(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, of one shape and without gradient, one after the other along the first axis."""
        if self.world == 1:
            return tensor
        every = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.world)]
        dist.all_gather(every, tensor.detach().contiguous())
        return torch.cat(every)

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over the processes of a tensor without gradient."""
        return self.sum(tensor.detach().clone().double()) / self.world

    def _open_folder(self):
        path = self.dir / ".lock"
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self.lock = path.open("a+")
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it when the process is gone
        except BlockingIOError:
            self.lock.seek(0)
            who = self.lock.read().strip() or "another process"
            raise InputError(f"{self.dir}: {who} runs here; wait for it or choose another --name") from None
        except OSError as error:
            raise InputError(f"{self.dir}: cannot be written ({error.strerror}); choose another --run-dir") from None
        with writing(path):
            self.lock.truncate(0)
            self.lock.write(f"process {os.getpid()} on {socket.gethostname()}")
            self.lock.flush()
        lists = {k: _digest(getattr(self.args, k)) for k in CONTENT if hasattr(self.args, k)}
        now = asdict(self.args) | {"processes": self.world, "content": lists}
        path = self.dir / "args.json"
        if read_record(path) and any((self.dir / name).exists() for name in ("last.pt", "previous.pt")):
            defaults = {f.name: f.default for f in fields(self.args)}
            differ = _differences(defaults | read_record(path), now)
            if differ:
                raise InputError(f"{self.dir}: was run with {'; '.join(differ)}. Choose another --name or remove it")
        if self._done():
            return  # what is written there is about the processes that did it
        replace_text(path, json.dumps(now, indent=1) + "\n")
        replace_text(self.dir / "env.json", json.dumps(_environment(self.device, self.world), indent=1) + "\n")


def _quiet_if_full(args):
    if not issubclass(args.exc_type, OSError):
        threading.__excepthook__(args)


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
