"""How close scoring, training and evaluation come to what the machine can do, measured and never estimated.

Run     python benchmarks/speed.py                                       # everything, an hour on two CPU cores
        python benchmarks/speed.py --quick --only training --data my_set   # my_set/image and my_set/mask
Writes  benchmarks/speed.json, a section a device and torch version, and the tables of benchmarks/speed.md.

Rivals take turns in one process (A B A B ...), and each turn of ours stands against the turns just before and just
after it, so that a machine that grows slower meanwhile moves no ratio. Figures and ratios are medians of the rounds.
"""

import contextlib
import io
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import cv2
import numpy as np
import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import _speed_table as table
from benchmarks._rivals import (
    Bare,
    Phases,
    beside_script,
    decode_only,
    parts_of_evaluation,
    parts_of_scoring,
    parts_of_training,
    script,
    three_passes,
)
from utils import get_weight
from utils.args import TrainArgs, WeightArgs, launch, parse
from utils.boundary import soft_boundary_f
from utils.dataset import ListDataset, open_lists
from utils.errors import InputError
from utils.evaluate import evaluate
from utils.images import read_mask, write_mask
from utils.logs import read_jsonl
from utils.losses import hard
from utils.methods.weighting import student_quality, weigh_pixels
from utils.metrics import sample_scores
from utils.prepare_data import DemoArgs, draw_demo
from utils.run import Run
from utils.scores import pair_scores

ROOT = Path(__file__).resolve().parents[1]
SIDE = 321  # of the masks that are scored: the published size
CLASSES = (2, 12, 21, 150)
PAIRS = 4000  # that get_weight scores; a quarter of it with --quick, where its start and end still weigh more
OPENED = (1000, 10_000)  # images of the lists that are opened
ROWS = (10_000, 100_000, 1_000_000)  # of the lists whose memory is measured; without the last with --quick


@dataclass
class Args:
    only: Annotated[list[str], "sections: scoring training evaluation growth; empty: all"] = field(default_factory=list)
    data: Annotated[str, "folder with image/ and mask/; empty: draws the demo set into a temporary folder"] = ""
    images: Annotated[int, "images of an epoch; 0: 240 on a CPU, 6400 on a GPU, a fifth with --quick"] = 0
    size: Annotated[int, "side of the training images; 0: 96 on a CPU, 321 on a GPU"] = 0
    batch_size: Annotated[int, "images a step; 0: 8 on a CPU, 16 on a GPU"] = 0
    arch: Annotated[str, "architecture"] = "Unet"
    encoder: Annotated[str, "encoder"] = "resnet18"
    width: Annotated[int, "first width of PlainUNet"] = 64
    precision: Annotated[Literal["auto", "fp32", "bf16"], "auto: bf16 where the hardware has it"] = "auto"
    workers: Annotated[int, "loader processes of the scripts; -1: none on a CPU, 8 on a GPU"] = -1
    threads: Annotated[int, "threads of torch"] = 1
    repeats: Annotated[int, "rounds; 0: 5, or 3 with --quick"] = 0
    quick: Annotated[bool, "the figures that regress.sh compares, in minutes"] = False
    out: Annotated[str, "JSON file that the figures are merged into"] = "benchmarks/speed.json"
    page: Annotated[str, "page whose tables are replaced; empty: none"] = "benchmarks/speed.md"
    cpu: Annotated[bool, "ignore any GPU"] = False


class Bench:
    """What all sections share: the device, a folder with images and lists, and the figures found so far."""

    def __init__(self, args: Args, folder: Path):
        self.args, self.folder = args, folder
        self.cuda = torch.cuda.is_available() and not args.cpu
        self.device = torch.device("cuda" if self.cuda else "cpu")
        self.kind = self.device.type
        name = torch.cuda.get_device_name() if self.cuda else f"{_processor()}, {os.cpu_count()} cores"
        self.name = f"{name} | torch {torch.__version__}"
        self.size, self.batch = args.size or (321 if self.cuda else 96), args.batch_size or (16 if self.cuda else 8)
        self.images = args.images or (6400 if self.cuda else 240) // (5 if args.quick else 1)
        self.images = max(2, round(self.images / self.batch)) * self.batch  # every batch is whole
        self.workers = args.workers if args.workers >= 0 else 8 if self.cuda else 0
        self.rounds = args.repeats or (3 if args.quick else 5)
        self.precision = args.precision if args.precision != "auto" else "bf16" if _has_bf16(self.cuda) else "fp32"
        self.figures, self.profiles, self.linked = {}, {}, {}
        self.about = {"command": " ".join(["python", *sys.argv]), "commit": _commit(), "threads": args.threads}
        self.base = _base_files(args, folder)

    def setting(self, size=0, batch=0) -> str:
        size, batch = size or self.size, batch or self.batch
        a, plain = self.args, self.args.arch == "PlainUNet"
        return f"{a.arch} {a.width if plain else a.encoder}, {size}x{size}, batch {batch}, {self.precision}"

    def flags(self, train="", size=0, classes=1, augment="none", workers=None) -> list[str]:
        """Flags of a training script, without the name of the run."""
        a, workers = self.args, self.workers if workers is None else workers
        words = f"--data-root={self.folder} --run-dir={self.folder / 'runs'} --train-csv={train}"
        words += f" --valid-csv={self.list_of(1, 'valid')} --size={size or self.size} --batch-size={self.batch}"
        words += f" --arch={a.arch} --width={a.width} --encoder={a.encoder} --precision={self.precision}"
        words += f" --optimizer=adamw --learning-rate=1e-3 --classes={classes} --augment={augment} --workers={workers}"
        return words.split() + ["--cpu"] * (not self.cuda)

    def list_of(self, count: int, name: str = "train") -> Path:
        """A list of `count` images, hard links to the few files of the set, each of which is decoded on its own."""
        path = self.folder / f"{name}_{count}.csv"
        if not path.exists():
            rows = [self._link(name, i) for i in range(count)]
            frame = pd.DataFrame(rows, columns=["img", "filename"])
            noise = np.arange(count) % 2
            frame.assign(iterations=6 * noise, weight=1 - 0.5 * noise, bf=1 - 0.5 * noise).to_csv(path, index=False)
        return path

    def _link(self, name, i):
        made = []
        for kind, source in zip(("image", "mask", "teacher"), self.base[i % len(self.base)], strict=True):
            to = self.folder / kind / f"{name}_{i:07d}{source.suffix}"
            if not to.exists():
                os.link(source, to)
            made.append(str(to.relative_to(self.folder)))
        return made[:2]

    def add(self, key, what, found, unit, better, limit=None, invert=False, **more) -> None:
        """Keep a figure; `found` has what we and our rival reached in every round: {"ours": [...], "rival": [...]}."""
        ours, rival = found["ours"], found["rival"]
        ratios = [b / a if invert else a / b for a, b in zip(ours, rival, strict=True)]
        more |= {"spread": [min(ratios), max(ratios)]} if len(ratios) > 1 else {}
        row = table.figure(what, median(ours), median(rival), unit, median(ratios), better, limit, **more, **self.about)
        self.figures[key] = row
        print(f"{key}: {row['ours']:.4g} against {row['rival']:.4g} {unit}, ratio {row['ratio']:.3f}", flush=True)

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, work, times: int = 1) -> float:
        """Seconds of one call, with the device done before and after."""
        self.sync()
        start = time.perf_counter()
        for _ in range(times):
            work()
        self.sync()
        return (time.perf_counter() - start) / times

    def interleave(self, rivals: dict, rounds=0, warm=True) -> dict[str, list[float]]:
        """What every rival returned in every round, after one round that does not count.

        What stands against the first of them is the mean of just before and just after it, so that a machine that grows
        slower or faster meanwhile does not count for either.
        """
        before = {name: work() for name, work in rivals.items()} if warm else {}
        found = {name: [] for name in rivals}
        for _ in range(rounds or self.rounds):
            for i, (name, work) in enumerate(rivals.items()):
                now = work()
                found[name].append((before.get(name, now) + now) / 2 if i else now)
                before[name] = now
        return found


def main(args: Args) -> dict:
    """Measure the sections, merge what was found into the JSON file, fill the page; returns the figures of this run."""
    unknown = [name for name in args.only if name not in SECTIONS]
    if unknown:
        raise InputError(f"--only {unknown[0]}: sections are {', '.join(SECTIONS)}")
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="speed-") as folder:
        bench = Bench(args, Path(folder))
        for name in args.only or SECTIONS:
            SECTIONS[name](bench)
            # after every section, so that an hour is not lost
            mode = "quick" if args.quick else "full"
            profiles = {} if args.quick else bench.profiles  # shares of short runs say little
            everything = table.merge(Path(args.out), bench.name, bench.kind, mode, bench.figures, profiles)
    if args.page:
        table.fill(args.page, everything)
    return bench.figures


def scoring(bench: Bench) -> None:
    """Scores of mask pairs: the kernel on decoded masks, get_weight from files, and its memory."""
    pairs = [(read_mask(teacher), read_mask(mask)) for _, mask, teacher in bench.base[:24]]
    tensors = [[torch.from_numpy(m)[None, None].float() for m in pair] for pair in pairs]

    def each(work, items):
        return lambda: _milliseconds_of_each(work, items)

    with torch.inference_mode():
        rivals = {"ours": each(pair_scores, pairs), "rival": each(soft_boundary_f, tensors)}
        found = bench.interleave(rivals)
    what, side = "all scores of a pair of decoded masks", f"{pairs[0][0].shape[1]}x{pairs[0][0].shape[0]}"
    rival = {"rival_is": "(max pooling)"}
    bench.add(f"scoring/kernel, {side}", f"{what}, {side}", found, "ms", "smaller", 0.1, of="ours", **rival)
    for classes in CLASSES:
        many = [_class_maps(classes, i) for i in range(4)]
        rivals = {"ours": each(partial(pair_scores, classes=classes), many), "rival": each(soft_boundary_f, tensors)}
        what = f"the same, {classes} classes, {SIDE}x{SIDE}"
        found = bench.interleave(rivals)
        rival = {"rival_is": "(max pooling, binary)"}
        bench.add(f"scoring/kernel, {SIDE}x{SIDE}, {classes} classes", what, found, "ms", "smaller", **rival)
    count = PAIRS // 4 if bench.args.quick else PAIRS
    for workers in sorted({1, 2, len(os.sched_getaffinity(0))}):
        _end_to_end(bench, count, workers, side)
    _memory(bench, ROWS[:2] if bench.args.quick else ROWS)


def _end_to_end(bench, count, workers, side):
    path, out = bench.list_of(count, "score"), bench.folder / "weights"
    files = [bench.folder / kind / f"score_{i:07d}.png" for i in range(count) for kind in ("mask", "teacher")]

    def ours():
        shutil.rmtree(out, ignore_errors=True)
        where = {"teacher": [str(bench.folder / "teacher")], "out": str(out), "data_root": str(bench.folder)}
        with _silent():
            get_weight.main(get_weight.Args(list=str(path), workers=workers, **where))

    def bare(path):
        return cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)

    works = {"ours": ours, "rival": lambda: decode_only(files, workers, read_mask)}
    works["bare"] = lambda: decode_only(files, workers, bare)
    found = bench.interleave({k: lambda work=work: count / bench.seconds(work) for k, work in works.items()})
    what = f"get_weight from PNG files, {count} pairs of {side}, {workers} workers"
    key = f"scoring/get_weight, {count} pairs, {side}, {workers} workers"
    rival = {"rival_is": "(decoding only)"}
    bench.add(key, f"{what}: time", found, "pairs/s", "smaller", 1.15, invert=True, **rival)
    found["rival"] = found["bare"]
    rival = {"rival_is": "(bare imdecode)"}
    bench.add(f"{key}, imdecode", f"{what}: time", found, "pairs/s", "smaller", invert=True, **rival)
    if workers == 1:
        with Phases(parts_of_scoring(), bench.sync, "list") as phases:
            ours()
        bench.profiles[f"get_weight, {count} pairs of {side}"] = phases.shares()


def _milliseconds_of_each(work, items) -> float:
    start, done = time.perf_counter(), 0
    while time.perf_counter() < start + 0.1:  # what takes microseconds is repeated
        for item in items:
            work(*item)
        done += len(items)
    return 1e3 * (time.perf_counter() - start) / done


def _memory(bench, lengths):
    tiny = bench.folder / "tiny"
    tiny.mkdir()
    for i in range(8):
        write_mask(tiny / f"{i}.png", np.eye(16, k=i, dtype=np.uint8))
    nothing = _peak_mib([sys.executable, "-c", f"import sys; sys.path[0] = {str(ROOT)!r}; import utils.get_weight"])
    for n in lengths:
        rows = [(f"{i:07d}.jpg", f"{i % 8}.png") for i in range(n)]
        frame = pd.DataFrame(rows, columns=["img", "filename"])
        path = tiny / f"rows_{n}.csv"
        frame.to_csv(path, index=False)
        frame["filename"] = np.roll(frame["filename"], 1)
        frame.to_csv(tiny / f"teacher_{n}.csv", index=False)
        words = ["--list", path, "--teacher", tiny / f"teacher_{n}.csv", "--data-root", tiny, "--out", tiny / "out"]
        peak = _peak_mib([sys.executable, ROOT / "utils/get_weight.py", *words])
        found, limit = {"ours": [peak], "rival": [nothing]}, 1536 if n >= 1_000_000 else None
        what, rival = (
            f"peak memory of get_weight on {n:,} rows, of its largest process",
            {"rival_is": "(only imported)"},
        )
        bench.add(f"scoring/memory, {n} rows", what, found, "MiB", "smaller", limit, of="ours", **rival)


def _peak_mib(words) -> float:
    """Peak memory of a program and of what it starts, in MiB."""
    code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, capture_output=True); "
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    words = [sys.executable, "-c", code, *map(str, words)]
    return int(subprocess.run(words, check=True, capture_output=True, text=True).stdout) / 1024


def training(bench: Bench) -> None:
    """Images a second of the scripts against the bare step, and where the rest of the time goes."""
    quick, train = bench.args.quick, bench.list_of(bench.images)
    bare = {nets: Bare(bench, nets) for nets in (1, 2)}
    flip = bench.flags(train, augment="flip")
    _against_bare(bench, "train_without_weight", flip, bare[1], f"augment flip, {bench.workers} workers")
    kd = [*flip, "--warmup=0"]
    _against_bare(bench, "train_with_KDweight", kd, bare[1], f"augment flip, {bench.workers} workers")
    _against_bare(bench, "train_co_teaching", flip, bare[2], f"augment flip, {bench.workers} workers", "two bare steps")
    if not quick:
        plain = bench.flags(train)
        _against_bare(bench, "train_without_weight", plain, bare[1], f"augment none, {bench.workers} workers")
        for workers in sorted({bench.workers, 1, 2}):
            flags = bench.flags(train, augment="strong", workers=workers)
            _against_bare(bench, "train_without_weight", flags, bare[1], f"augment strong, {workers} workers")
        compiled = [*flip, "--compile"]
        _against_bare(bench, "train_without_weight --compile", compiled, bare[1], "against the step not compiled")
    _student(bench, bare[1])
    if not quick:
        _peak_share(bench, bare[1])
    if bench.cuda:
        _gpu_memory(bench, bare[1], flip)
    if not quick:
        profiles(bench, flip, 3)


def profiles(bench: Bench, flags: list[str], epochs: int) -> None:
    """Where the time of every script goes."""
    for name in ("train_without_weight", "train_with_KDweight", "train_co_teaching"):
        more = ["--warmup=0"] if name == "train_with_KDweight" else []
        with Phases(parts_of_training(script(name)), bench.sync) as phases:
            beside_script(bench, name, [*flags, *more], epochs - 1, lambda: 1.0)
        bench.profiles[f"{name}, {bench.images} images, {bench.setting()}"] = phases.shares()


def _against_bare(bench, name, flags, bare, how, rival="bare step"):
    script_name, steps = name.partition(" ")[0], bench.images // bench.batch
    found = beside_script(bench, script_name, flags, bench.rounds, lambda: bare.rate(steps))
    what, more = f"{name}, {how}; {bench.setting()}, epochs of {bench.images}", {"rival_is": f"({rival})"}
    limit = None if "compile" in name else 0.95
    bench.add(f"training/{name}, {how}, {bench.setting()}", what, found, "img/s", "larger", limit, **more)


def _student(bench, bare):
    logits = torch.randn(bench.batch, 1, bench.size, bench.size, device=bench.device)
    mask = (torch.rand(bench.batch, bench.size, bench.size, device=bench.device) < 0.3).byte()
    works = {"ours": lambda: 1e3 * bench.seconds(lambda: student_quality(hard(logits), mask, "bf"), 30)}
    support = torch.full_like(mask, 200)
    flags = WeightArgs("", "", level="pixel")
    batch = {"mask": mask, "support": support}
    works["pixels"] = lambda: 1e3 * bench.seconds(lambda: weigh_pixels(logits, batch, 0.5, flags), 30)
    works["rival"] = lambda: 1e3 * bench.seconds(bare.step, 4)
    found, rival = bench.interleave(works), {"rival_is": "(bare step)"}
    what = f"the student's quality, share of a step; {bench.setting()}"
    bench.add(f"training/student, {bench.setting()}", what, found, "ms", "smaller", 0.03, **rival)
    found["ours"], what = found["pixels"], f"loss and weights of pixels, share of a step; {bench.setting()}"
    bench.add(f"training/pixels, {bench.setting()}", what, found, "ms", "smaller", 0.03, **rival)


def _peak_share(bench, bare):
    with FlopCounterMode(display=False) as counter:
        bare.step()
    work, n = counter.get_total_flops() / 1e9, 8192 if bench.cuda else 1024
    kind = torch.bfloat16 if bench.precision == "bf16" else torch.float32
    a, b = (torch.randn(n, n, device=bench.device, dtype=kind) for _ in range(2))
    works = {"ours": lambda: work / bench.seconds(bare.step, 4)}
    works["rival"] = lambda: 2e-9 * n**3 / bench.seconds(lambda: a @ b, 20 if bench.cuda else 4)
    found, what = bench.interleave(works), f"matrix arithmetic of a bare step; {bench.setting()}"
    rival = {"rival_is": f"({n}x{n} product)"}
    bench.add(f"training/matrix peak, {bench.setting()}", what, found, "GFLOP/s", "larger", **rival)


def _gpu_memory(bench, bare, flags):
    def peak(work):
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() / 2**20

    ours = peak(lambda: beside_script(bench, "train_without_weight", flags, 1, lambda: 1.0))
    found = {"ours": [ours], "rival": [peak(bare.step)]}
    what = f"peak memory of train_without_weight, beside the bare network; {bench.setting()}"
    bench.add(f"training/memory, {bench.setting()}", what, found, "MiB", "smaller", rival_is="(bare step)")


def evaluation(bench: Bench) -> None:
    """evaluate(), with all its metrics, against inference alone, and against three passes as the original made them."""
    count = bench.images if bench.args.quick else 2 * bench.images
    flags = [*bench.flags(bench.list_of(bench.batch)), "--name=evaluation"]
    flags.append(f"--valid-csv={bench.list_of(count, 'held')}")  # the last of two counts
    with _silent():
        run = Run(parse(TrainArgs, flags))
        loader, net = run.loaders(open_lists(run.args))[1], run.build()
        batches = [{k: v.clone() for k, v in batch.items()} for batch in run.batches(loader)]
    net.eval()

    @torch.inference_mode()
    def bare():
        for batch in batches:
            with run.autocast():
                net(batch["image"])

    works = {"ours": lambda: evaluate(run, net, loader), "rival": bare}
    works["three"] = lambda: three_passes(run, net, batches)
    found = bench.interleave({k: lambda work=work: count / bench.seconds(work) for k, work in works.items()})
    what, name = f"evaluation, all metrics: time; {bench.setting()}", f"evaluation/{{}}, {bench.setting()}"
    rival = {"rival_is": "(inference only)"}
    bench.add(name.format("bare"), what, found, "img/s", "smaller", 1.1, invert=True, **rival)
    with Phases(parts_of_evaluation(), bench.sync) as phases:
        evaluate(run, net, loader)
    bench.profiles[f"evaluation, {count} images, {bench.setting()}"] = phases.shares()
    found["rival"], rival = found["three"], {"rival_is": "(three passes)"}
    bench.add(name.format("three passes"), what, found, "img/s", "smaller", invert=True, **rival)
    run.close()


def growth(bench: Bench) -> None:
    """How cost grows with the list, the image, the classes and the processes."""
    for classes in CLASSES:
        _classes(bench, classes)
    if bench.args.quick:
        return
    for count in OPENED:
        _opening(bench, count)
    for size in (96, 160, 224, 321):
        images = bench.images  # on a CPU fewer, the larger they are
        images = images if bench.cuda else max(4, images * 96**2 // size**2 // bench.batch) * bench.batch
        flags, bare = bench.flags(bench.list_of(images, f"side{size}"), size=size), Bare(bench, size=size)
        steps = images // bench.batch
        found = beside_script(bench, "train_without_weight", flags, bench.rounds, lambda b=bare, n=steps: b.rate(n))
        what = f"train_without_weight; {bench.setting(size)}, epochs of {images}"
        bench.add(f"growth/size, {bench.setting(size)}", what, found, "img/s", "larger", 0.95, rival_is="(bare step)")
    most = torch.cuda.device_count() if bench.cuda else os.cpu_count()
    if most >= 2:
        flags = bench.flags(bench.list_of(bench.images))
        works = {"rival": lambda: _processes(bench, flags, 1), "ours": lambda: _processes(bench, flags, 2)}
        found = bench.interleave(works, rounds=3, warm=False)
        what = f"train_without_weight in 2 processes; {bench.setting()}"
        bench.add(f"growth/processes, {bench.setting()}", what, found, "img/s", "larger", rival_is="(1 process)")


def _opening(bench, count):
    path, cache = bench.list_of(count, "long"), bench.folder / f"cache_{count}"

    def first():
        shutil.rmtree(cache, ignore_errors=True)
        return again()

    def again():
        with _silent():
            return bench.seconds(lambda: ListDataset(path, bench.folder, bench.size, cache_dir=cache))

    found = bench.interleave({"rival": first, "ours": again}, rounds=2, warm=False)
    what = f"to open a list of {count:,} decoded images, {bench.size}x{bench.size}"
    bench.add(f"growth/list, {count}", what, found, "s", "smaller", rival_is="(the first time)")


def _classes(bench, classes):
    bare = Bare(bench, classes=classes)
    maps = np.stack([_class_maps(classes, i, bench.size) for i in range(bench.batch)], axis=1)
    pred, mask = torch.from_numpy(maps).to(bench.device)
    works = {"ours": lambda: 1e3 * bench.seconds(lambda: sample_scores(pred, mask, classes), 2)}
    works["rival"] = lambda: 1e3 * bench.seconds(bare.step, 2)
    what = f"sample_scores of a batch, {classes} classes; {bench.setting()}"
    found = bench.interleave(works)
    key = f"growth/classes, {classes}, {bench.setting()}"
    bench.add(key, what, found, "ms", "smaller", rival_is="(bare step)")


def _processes(bench, flags, count) -> float:
    name = f"processes_{count}_{time.time_ns()}"
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    words += [ROOT / "train_without_weight.py", *flags, f"--name={name}", "--epochs=3"]
    env = os.environ | {"OMP_NUM_THREADS": str(bench.args.threads), "PYTHONPATH": str(ROOT)}
    subprocess.run(list(map(str, words)), check=True, capture_output=True, env=env)
    seconds = [row["seconds"] for row in read_jsonl(bench.folder / "runs" / name / "log.jsonl") if "seconds" in row]
    shutil.rmtree(bench.folder / "runs" / name)
    return bench.images / median(seconds[1:])


def _class_maps(classes, seed, side=0) -> list[np.ndarray]:
    """A prediction and the mask of blocks of classes that it is a shifted copy of, (side, side) uint8 each."""
    blocks = np.random.default_rng(seed).integers(0, classes, (8, 8), np.uint8)
    mask = cv2.resize(blocks, (side or SIDE,) * 2, interpolation=cv2.INTER_NEAREST)
    return [np.roll(mask, 3, (0, 1)), mask]


def _base_files(args, folder) -> list[tuple[Path, Path, Path]]:
    """Copies of up to 48 images and masks, and a teacher's masks: those of the set, grown by a pixel."""
    source = Path(args.data) if args.data else folder / "set"
    if not args.data:
        with _silent():
            draw_demo(DemoArgs(out=str(source), images=16 if args.quick else 48, size=SIDE))
    masks = {path.stem: path for path in sorted(source.glob("mask/[!.]*.png"))}
    found = [(path, masks[path.stem]) for path in sorted(source.glob("image/[!.]*")) if path.stem in masks][:48]
    if not found:
        raise InputError(f"--data {source}: no image/ and mask/ with equal file stems there")
    for kind in ("image", "mask", "teacher"):
        (folder / kind).mkdir()
    base = []
    for image, mask in found:
        copies = [shutil.copyfile(p, folder / k / f"base_{p.name}") for k, p in (("image", image), ("mask", mask))]
        base.append((*copies, folder / "teacher" / copies[1].name))
        write_mask(base[-1][2], cv2.dilate(read_mask(mask), np.ones((3, 3), np.uint8)))
    return base


@contextlib.contextmanager
def _silent():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def _processor() -> str:
    names = [line.partition(":")[2].strip() for line in _cpuinfo().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _has_bf16(cuda) -> bool:
    return torch.cuda.is_bf16_supported() if cuda else any(w in _cpuinfo() for w in ("avx512_bf16", "amx_bf16"))


def _commit() -> str:
    def git(*words):
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short=10", "HEAD") + "+" * bool(git("status", "--porcelain", "--", "*.py"))


SECTIONS = {"scoring": scoring, "training": training, "evaluation": evaluation, "growth": growth}

if __name__ == "__main__":
    launch(main, Args)
