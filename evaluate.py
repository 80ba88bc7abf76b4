"""Scores of a trained network on a list, at the images' own size: IoU of every class, mIoU, accuracy, Dice, BF.

Run     python evaluate.py runs/kd/best.pt --list test.csv --names classes.txt --json scores.json --csv images.csv
        python evaluate.py runs/a/best.pt --list test.csv --more runs/b/best.pt --scales 0.75 1 1.25 --flip
        python evaluate.py runs/a/best.pt --list test.csv --like-training      # the run's own test line once more
2 GPUs  torchrun --standalone --nproc_per_node=2 evaluate.py ... (same flags)
Scores  IoU, mIoU and accuracies come from pixel counts over the list, of the classes that occur in it; Dice and BF
        (boundary F1) are means over images. Pixels marked 255 count nowhere, and no mask is resized: probabilities
        are enlarged to its size. --like-training resizes images and masks instead, as the training script did for its
        test line, and gives exactly its scores.
Mode    auto resizes the whole image to the network's input, as training did, unless its shorter side is more than
        twice as long as that of the training images: then windows slide over it at the scale of training. resize with
        --size 0 runs whole images as they are. The sliding evaluation of Cityscapes papers: --mode slide --size 0
        --window 769 --overlap 0.333 --blend count; it averages probabilities, where some codes average logits.
"""

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import pandas as pd
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from utils.args import TrainArgs, launch
from utils.batches import Batches
from utils.checkpoint import image_keys, load_network
from utils.class_scores import class_table, format_table, mean_scores, read_names
from utils.dataset import ListDataset
from utils.errors import InputError, RankError, say, warn
from utils.evaluate import areas_of_list, count_list, plain, scores_of_list, with_labels
from utils.inference import Probabilities
from utils.lists import image_labels, read_list, write_list
from utils.logs import read_record, replace_text
from utils.own_size import evaluate_files
from utils.plans import PlanArgs, check_plan, plan_of
from utils.sources import digest
from utils.steps import Steps


@dataclass
class _Named:
    checkpoint: Annotated[str, "best.pt or last.pt of any training script", "positional"]
    list: Annotated[str, "images and masks to compare with (CSV with img and filename)"]


@dataclass
class Args(PlanArgs, _Named):
    more: Annotated[list[str], "further checkpoints; the probabilities of all are averaged"] = field(
        default_factory=list
    )
    like_training: Annotated[bool, "the run's own test line: its size, batches and precision, masks resized too"] = (
        False
    )
    image_labels: Annotated[bool, "predict only classes of an image's column label: how good pseudo masks are"] = False
    names: Annotated[str, "names of the classes: a text file, one a line, or a CSV with a column name"] = ""
    json: Annotated[str, "file that gets all scores, those of classes, and the confusion matrix"] = ""
    csv: Annotated[str, "file that gets the scores of every image"] = ""
    data_root: Annotated[str, "folder that relative paths in the list start from"] = "."
    theta0: Annotated[int, "boundary score: width of the boundary operator, odd"] = 3
    theta: Annotated[int, "boundary score: odd; (theta - 1) / 2 pixels of tolerance"] = 5
    cpu: Annotated[bool, "ignore any GPU"] = False


# what a run decides for itself when its own test line is asked for
_OF_RUN = {f.name for f in fields(PlanArgs)} | {"more", "image_labels", "csv", "theta0", "theta"}


def main(args: Args) -> None:
    """Evaluate, print the table and write what is asked for; InputError if any row cannot be evaluated."""
    _check(args)
    frame, checkpoints = read_list(args.list), [args.checkpoint, *args.more]
    nets, states = zip(*(load_network(path, args.net) for path in checkpoints), strict=True)
    plan, classes = plan_of(states, args), states[0]["model"]["classes"]
    present = image_labels(frame, max(2, classes), args.list) if args.image_labels else None
    # the background of binary masks is a class of its own here
    names = ["background", "foreground"] if classes == 1 else None
    names = read_names(args.names, max(classes, 2)) if args.names else names
    net, steps = Probabilities(nets).eval(), _start(args)
    try:
        net = net.to(steps.device, memory_format=torch.channels_last)
        _warn_of_leak(frame, states)
        if args.like_training:
            found = _like_training(steps, nets[0], args)
        else:
            found = evaluate_files(steps, net, frame, plan, present, classes, args)
            if found["lacking"]:
                what = f"{found['lacking']} of {len(frame)} images have masks with classes that their label lacks"
                warn(f"{args.list}: {what}; these cannot be predicted, and count as missed")
        if steps.main:
            about = {"checkpoints": [f"{path} {digest(path)}" for path in checkpoints], "images": len(frame)}
            _tell(found, class_table(found["areas"], names), about | {"plan": asdict(plan)}, frame, args)
    finally:
        if steps.world > 1:
            dist.destroy_process_group()


def _check(args):
    check_plan(args)
    for flag in ("theta0", "theta"):
        if getattr(args, flag) < 1 or getattr(args, flag) % 2 == 0:
            raise InputError(f"--{flag} {getattr(args, flag)}: must be odd and positive")
    for path in filter(None, (args.json, args.csv)):
        if Path(path).is_dir() or Path(path).resolve() == Path(args.list).resolve():
            raise InputError(f"{path}: a folder, or the list itself; choose another file to write to")
    if not args.like_training:
        return
    plain = Args(args.checkpoint, args.list)
    other = [name for name in sorted(_OF_RUN) if getattr(args, name) != getattr(plain, name)]
    if other:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in other)
        raise InputError(f"--like-training repeats the test of the run; leave {flags} out")


def _start(args) -> Steps:
    """This process among possibly several, and its device."""
    local, device = int(os.environ.get("LOCAL_RANK", "0")), torch.device("cpu")
    if torch.cuda.is_available() and not args.cpu:
        if local >= torch.cuda.device_count():
            raise RankError(f"--nproc_per_node: this machine has {torch.cuda.device_count()} GPUs; start as many")
        device = torch.device("cuda", local)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")  # nothing but counts travels
    return Steps(args, device)


def _warn_of_leak(frame, states):
    trained = torch.cat([state.get("images", torch.empty(0, dtype=torch.int64)) for state in states])
    leaks = int(torch.isin(image_keys(frame["img"]), trained).sum())
    if leaks:
        warn(f"{leaks} of {len(frame)} images have names of training images; scores on what was trained flatter")


def _like_training(steps, net, args) -> dict:
    """The scores that the run itself would log, by its own pass over a list."""
    record = Path(args.checkpoint).parent / "args.json"
    known = read_record(record)
    if "batch_size" not in known:
        raise InputError(f"{record}: missing or damaged; --like-training reads the settings of the run there")
    steps.args = run = SimpleNamespace(**asdict(TrainArgs("", "")) | known)
    data = ListDataset(args.list, args.data_root, run.size, run.classes, cache_gb=run.cache_gb)
    sampler = Batches(len(data), run.batch_size if data.one_shape() else 1, steps.rank, steps.world)
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=data.collate)
    # train_lpl.py tests with the classes of an image
    labelled = "weak_csv" in known
    forward = with_labels if labelled else plain
    sums = sum(steps.gather(count_list(steps, [net], loader, forward)[0].cpu()))
    areas, scores = areas_of_list(sums, run.classes).numpy(), scores_of_list(sums, len(data), run)
    return {"scores": mean_scores(areas) | scores, "areas": areas, "labels_of": "masks" if labelled else ""}


def _tell(found, table, about, frame, args):
    print(format_table(table))
    how = "as the run tested them" if args.like_training else "at their own size"
    labels_of = found.get("labels_of", "list" if args.image_labels else "")  # whose classes the network was told
    said = {"masks": ", with image-level classes, those of their masks", "list": ", with image-level classes", "": ""}
    print(f"{args.list}: {len(frame)} images {how}{said[labels_of]}")
    print("  ".join(f"{name} {value:.4f}" for name, value in found["scores"].items()))
    if args.json:
        about |= {key: getattr(args, key) for key in ("list", "like_training", "theta0", "theta")}
        about |= {"image_labels": bool(labels_of), "image_labels_of": labels_of or None}
        each = table.astype(object).where(table.notna(), None).to_dict("records")
        about |= {"scores": found["scores"], "classes": each, "confusion": found.get("confusion")}
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        replace_text(args.json, json.dumps(about, indent=1) + "\n")
        say(f"wrote {args.json}")
    if args.csv:
        write_list(pd.DataFrame({"img": frame["img"]}).join(pd.DataFrame(found["images"])), args.csv)
        say(f"wrote {args.csv}")


if __name__ == "__main__":
    launch(main, Args)
