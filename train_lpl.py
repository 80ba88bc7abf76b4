"""Learning pseudo labels, stage 1: few images with masks, many with their classes only; two networks teach each other.

Paper    Wang et al., "Learning pseudo labels for semi-and-weakly supervised semantic segmentation", Pattern Recognition
         132, 2022. --preset takes parts away: cce (HybridNet alone, its soft-max over the classes of an image), ce
         (over all classes). --preset released: numbers and arithmetic of the released code.
Run      python train_lpl.py --train_csv STRONG.csv --weak_csv WEAK.csv --valid_csv VALID.csv --test_csv TEST.csv
             --classes C --name lpl
         The networks need the classes of an image: in validation and test those of its mask; test_no_label_... none.
         Stage 2: utils/predict_mask.py --image-labels writes masks for WEAK.csv, train_without_weight.py learns them.
2 GPUs   torchrun --standalone --nproc_per_node=2 train_lpl.py ... (same flags)
Results  benchmarks/lpl.md
"""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch

from utils.args import launch
from utils.averages import Averages
from utils.checkpoint import Checkpoint
from utils.evaluate import evaluate_all, named, plain, test_once, with_labels
from utils.methods.lpl import (
    DynamicEvaluation,
    Tally,
    cross_labels,
    cross_losses,
    cross_scores,
    hybrid_losses,
    total,
    weight_scores,
)
from utils.optim import build_optimizer
from utils.pictures import show
from utils.run import Run
from utils.semi_args import WeakArgs
from utils.tagged import open_tagged

RELEASED = {"compat": "released", "optimizer": "sgd", "learning_rate": 1e-3, "weight_decay": 4e-5, "scheduler": "poly"}


@dataclass
class Args(WeakArgs):
    preset: Annotated[Literal["cce_pct", "cce", "ce", "released"], "rung of the ladder"] = "cce_pct"

    PRESETS: ClassVar = {
        "cce_pct": {},
        "cce": {"pct_weight": 0.0},
        "ce": {"pct_weight": 0.0, "class_aware": False},
        "released": RELEASED | {"batch_size": 5, "size": 384, "clip_value": 0.0},
    }


def main(args: Args) -> None:
    run = Run(args)
    if run.finished():
        return
    cross, weak = args.pct_weight > 0, args.pct_weight > 0 or args.cls_weight > 0
    train, valid, test = run.loaders(open_tagged(args, views=int(weak)))
    nets = [run.build(index) for index in range(1 + cross)]  # HybridNet, PseudoNet
    # the released code moves the learning rate of the first network only
    flags = [args, replace(args, scheduler="none") if args.compat == "released" else args]
    built = [build_optimizer(some, net, len(train)) for some, net in zip(flags, nets, strict=False)]
    optimizers, schedules = zip(*built, strict=True)
    evaluation = DynamicEvaluation(args.classes, args.iou_momentum, args.pct_power, args.compat == "released")
    evaluation = evaluation.to(run.device)
    more = {"evaluations": [evaluation]} if cross else {}
    checkpoint = Checkpoint(run, nets=nets, optimizers=optimizers, schedules=schedules, **more)

    for epoch in checkpoint.epochs(args.epochs):
        stats = Averages(run, lr=schedules[0].get_last_lr()[0])
        tally = run.carry("tally", Tally(args.classes, run.device))
        for batch in run.batches(train, epoch, nets):
            image, count = batch["image"], len(batch["image"])
            if weak:
                image = torch.cat([image, batch["weak"].permute(0, 3, 1, 2)])
            with run.autocast():
                logits = [net(image) for net in nets]
            losses = hybrid_losses(logits[0], batch, args)
            if cross:
                goal = cross_labels(run, logits, batch, evaluation)
                losses |= cross_losses([each[count:] for each in logits], goal, batch["weak_present"], args)
                run.step(nets[1], optimizers[1], schedules[1], losses["pseudo"])
                tally.add(goal, batch["truth"])
                stats.add(**weight_scores(goal.weight))
            loss = total(losses, args)
            run.step(nets[0], optimizers[0], schedules[0], loss)
            stats.add(loss=loss[None], **{f"loss_{name}": value[None] for name, value in losses.items()})
        scores = evaluate_all(run, nets, valid, with_labels)
        both = named("valid", scores[0]) if not cross else named("valid_a", scores[0]) | named("valid_b", scores[1])
        found = cross_scores(evaluation, run.sum(tally.areas)) if cross else {}
        run.log(epoch=epoch, seconds=run.seconds(), **stats.result(), **found, **both)
        better = int(cross and scores[1]["score"] > scores[0]["score"])
        show(run, epoch, nets[better], train.dataset, stats, labels=True)
        checkpoint.save(epoch, scores[better]["score"], net=better)
    test_once(run, checkpoint, test, {"test": with_labels, "test_no_label": plain})


if __name__ == "__main__":
    launch(main, Args)
