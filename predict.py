"""Masks, overlays and probabilities of new images of any size from a trained network; or the network as a file.

Run     python predict.py runs/bf_kd/best.pt photo.jpg folder/ list.csv --out predictions --overlay --probability
        python predict.py runs/bf_kd/best.pt --export onnx
Writes  OUT/<stem>.png           mask: 0 and 255, or class indices
        OUT/<stem>_overlay.jpg   the image with the classes above 0 tinted and outlined
        OUT/<stem>_prob.png      probability of the foreground x 255; many classes: <stem>_prob.npz with the array
                                 `probability` (classes, height, width), x 255
Mode    auto resizes the whole image to the network's input, as training did, unless its shorter side is more than
        twice as long as that of the training images: then windows slide over it at the scale of training. Checkpoints
        that do not say how large their training images were resize always. A network trained with --size 0 gets
        images as they are, and windows of 1024 x 1024 above 4 million pixels.
"""

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from tqdm import tqdm

from utils.args import launch
from utils.checkpoint import load_network
from utils.errors import InputError, report_bad_rows
from utils.export import SUFFIXES, export
from utils.images import read_image, write_bytes, write_mask, write_picture
from utils.inference import Probabilities, in_batches, inputs_of
from utils.lists import image_labels, read_list
from utils.overlay import draw_overlay
from utils.plans import PlanArgs, check_plan, plan_of
from utils.sources import Claim, Source, digest, find_images
from utils.store import in_threads

AHEAD = 8  # images that wait for the network, and as many results for the disk: each may be large
SHOWN = 20  # bad images that are named


@dataclass
class _Checkpoint:
    checkpoint: Annotated[str, "best.pt or last.pt of any training script", "positional"]


@dataclass
class Args(PlanArgs, _Checkpoint):
    images: Annotated[list[str], "images, folders of images, lists (CSV with a column img)", "positional"] = field(
        default_factory=list
    )
    more: Annotated[list[str], "further checkpoints; the probabilities of all are averaged"] = field(
        default_factory=list
    )
    out: Annotated[str, "folder of everything that is written"] = "predictions"
    overlay: Annotated[bool, "also write <stem>_overlay.jpg"] = False
    probability: Annotated[bool, "also write <stem>_prob.png, of several classes <stem>_prob.npz"] = False
    export: Annotated[Literal["none", "onnx", "torchscript"], "write the network to OUT, and check that it agrees"] = (
        "none"
    )
    image_labels: Annotated[bool, "predict only classes of an image's column label; takes lists alone"] = False
    recursive: Annotated[bool, "also the images in sub folders; OUT gets the same sub folders"] = False
    data_root: Annotated[str, "folder that relative paths in the lists start from"] = "."
    overwrite: Annotated[bool, "write everything again, whatever has its name in OUT"] = False
    cpu: Annotated[bool, "ignore any GPU"] = False


@dataclass
class Work:
    """An image on its way: what the network is to see of it, or why it cannot be read; then its probabilities."""

    source: Source
    image: np.ndarray | None = None
    inputs: list[np.ndarray] | None = None
    shape: tuple[int, int] = (0, 0)
    present: np.ndarray | None = None
    bands: Iterator[tuple[int, np.ndarray]] | None = None
    mask: np.ndarray | None = None
    probability: np.ndarray | None = None
    fault: str = ""


def main(args: Args) -> None:
    """Predict what is not predicted yet; InputError after the last image if some could not be read."""
    check_plan(args)
    if not args.images and args.export == "none":
        raise InputError("no images: name files, folders or lists (or --export)")
    sources = find_images(args.images, args.data_root, args.recursive, Path(args.out)) if args.images else []
    checkpoints = [args.checkpoint, *args.more]
    nets, states = zip(*(load_network(path, args.net) for path in checkpoints), strict=True)
    net, plan = Probabilities(nets).eval(), plan_of(states, args)
    if args.export != "none":
        _export(net, states[0]["model"], sources, plan, args)
    if not sources:
        return
    classes = states[0]["model"]["classes"]
    settings = {"checkpoints": [f"{path} {digest(path)}" for path in checkpoints]}
    settings |= {key: value for key, value in asdict(plan).items() if key != "batch_size"}
    settings["scales"] = list(plan.scales)
    present = _classes_of_images(args, classes) if args.image_labels else None
    if present:  # other labels make other masks
        found = {str(path): held.tolist() for path, held in present.items()}
        settings["image_labels"] = hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]
    settings |= {"net": args.net} if args.net >= 0 else {}
    claim = Claim(
        Path(args.out), sources, lambda name: list(_files(name, classes, args).values()), settings, args.overwrite
    )
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    try:
        bad = _predict(net.to(device, memory_format=torch.channels_last), claim, plan, classes, present, args)
    finally:
        claim.write_note()
    there, made = len(sources) - len(claim.todo), len(claim.todo) - len(bad)
    kept = f"; {there} were there already" if there else ""
    print(f"{args.out}: {made} image{'s' * (made != 1)} predicted{kept}")
    if bad:
        named = "; ".join(bad[:SHOWN]) + (f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else "")
        raise InputError(f"{len(bad)} of {len(sources)} images could not be predicted: {named}")


def _files(name: str, classes: int, args) -> dict[str, str]:
    """What is written for an image, by kind, relative to the output folder."""
    files = {"mask": f"{name}.png"}
    if args.overlay:
        files["overlay"] = f"{name}_overlay.jpg"
    if args.probability:
        files["probability"] = f"{name}_prob.{'png' if classes == 1 else 'npz'}"
    return files


def _export(net, model, sources, plan, args):
    path = Path(args.out) / f"{Path(args.checkpoint).resolve().parent.name}-{Path(args.checkpoint).stem}"
    path = path.with_name(path.name + SUFFIXES[args.export])
    if path.exists() and not args.overwrite:
        raise InputError(f"{path}: exists; choose another --out, or --overwrite")
    images = []
    for source in sources[:1]:
        images += inputs_of(read_image(source.path), replace(plan, scales=(1.0,)))
    export(net, path, args.export, model | {"size": plan.size}, images)


def _classes_of_images(args, classes) -> dict[Path, np.ndarray]:
    """The classes of every image, (C,) bool, by its path.

    InputError for what is no list, and for labels that are bad, or are not the same wherever an image is listed.
    """
    found, first = {}, {}
    for word in args.images:
        if Path(word).suffix.lower() != ".csv":
            raise InputError(f"--image-labels: {word} is no list; its column label has the classes of each image")
        frame = read_list(word, ("img",))
        bad, present = [], image_labels(frame, max(2, classes), word)
        for name, line, held in zip(frame["img"], frame["line"], present, strict=True):
            path, where = (Path(args.data_root) / name).absolute(), f"{word} line {line}"
            if not np.array_equal(found.setdefault(path, held), held):
                bad.append((int(line), f"{name} has other classes in {first[path]}"))
            first.setdefault(path, where)
        report_bad_rows(word, bad, "Correct one of the two.")
    return found


def _predict(net, claim, plan, classes, present, args) -> list[str]:
    """Writes the files of all images still to do; returns what is wrong with those that cannot be read."""

    def read(source):
        try:
            image = read_image(source.path)
        except InputError as error:
            return Work(source, fault=str(error))
        slides = plan.slides(image.shape[:2])
        inputs = None if slides else inputs_of(image, plan)
        held = present[source.path.absolute()] if present else None
        return Work(source, image if slides or args.overlay else None, inputs, image.shape[:2], held)

    def write(work):
        if not work.fault:
            _write(work, classes, args)
        return work

    bad, works = [], _through_network(net, in_threads(read, claim.todo, wait=AHEAD), plan, args)
    for work in tqdm(in_threads(write, works, wait=AHEAD), "predicting", len(claim.todo), leave=False, disable=None):
        if work.fault:
            bad.append(work.fault)
        else:
            claim.finished(work.source)
    return bad


def _through_network(net, works, plan, args) -> Iterator[Work]:
    """Every image with its mask, or with the bands of probabilities from which a thread may decide it."""
    for work, bands in in_batches(net, works, plan):
        if bands is not None and plan.slides(work.shape):
            _decide(work, _shown(bands, work), args)
        else:
            work.bands = bands
        yield work


def _shown(bands, work):
    """The bands of an image in windows, with a bar of their own: a large image takes minutes."""
    with tqdm(desc=work.source.path.name, total=work.shape[0], unit="row", leave=False, disable=None, delay=1) as bar:
        for top, band in bands:
            yield top, band
            bar.update(band.shape[1])


def _decide(work, bands, args):
    """The mask, and the probabilities in 8 bits where they are asked for, from bands of rows."""
    work.mask = np.empty(work.shape, np.uint8)
    for top, band in bands:
        rows = slice(top, top + band.shape[1])
        work.mask[rows] = band[0] > 0.5 if len(band) == 1 else band.argmax(0)
        if args.probability:
            if work.probability is None:
                work.probability = np.empty((len(band), *work.shape), np.uint8)
            work.probability[:, rows] = (band * 255).round()


def _write(work, classes, args):
    if work.mask is None:
        _decide(work, work.bands, args)
    paths = {kind: Path(args.out) / file for kind, file in _files(work.source.name, classes, args).items()}
    paths["mask"].parent.mkdir(parents=True, exist_ok=True)
    if "overlay" in paths:
        write_picture(paths["overlay"], draw_overlay(work.image, work.mask, classes))
    if "probability" in paths:
        _write_probability(paths["probability"], work.probability)
    write_mask(paths["mask"], work.mask, classes)
    work.image = work.bands = work.mask = work.probability = None


def _write_probability(path, probability):
    if path.suffix == ".png":
        write_picture(path, probability[0])
    else:
        packed = io.BytesIO()
        np.savez_compressed(packed, probability=probability)
        write_bytes(path, packed.getvalue())


if __name__ == "__main__":
    launch(main, Args)
