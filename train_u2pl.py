"""U2PL: learns from few masks and many images, from reliable pseudo-labels and from what unreliable ones rule out.

Paper    Wang et al., "Semi-supervised semantic segmentation using unreliable pseudo-labels", CVPR 2022. --preset takes
         away one part after the other: u2pl_no_contrast, cutmix (all pseudo-labels), mean_teacher (no mixing),
         supervised (as train_without_weight.py). --preset released: numbers and arithmetic of the released code.
Run      python train_u2pl.py --train_csv LABELLED.csv --unlabelled_csv UNLABELLED.csv --valid_csv VALID.csv
             --test_csv TEST.csv --classes C --name u2pl
2 GPUs   torchrun --standalone --nproc_per_node=2 train_u2pl.py ... (same flags)
Results  benchmarks/u2pl.md
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch

from utils.args import launch
from utils.averages import Averages
from utils.checkpoint import Checkpoint, bare
from utils.ema import average_decay, follow, teacher_of
from utils.evaluate import evaluate, named, test_once
from utils.methods.contrast import bank_of_flags, pixel_contrast
from utils.methods.u2pl import (
    as_classes,
    pseudo_scores,
    reliable_loss,
    supervised_loss,
    teach,
    total,
    unreliable_share,
)
from utils.models.heads import WithHeads
from utils.optim import build_optimizer
from utils.pictures import show
from utils.run import Run
from utils.semi_args import ContrastArgs
from utils.unlabelled import open_semi


@dataclass
class Args(ContrastArgs):
    preset: Annotated[
        Literal["u2pl", "u2pl_no_contrast", "cutmix", "mean_teacher", "supervised", "released"], "rung of the ladder"
    ] = "u2pl"
    warm_epochs: Annotated[int, "epochs on masks alone"] = 1
    unreliable: Annotated[float, "share of unreliable pixels at the start; falls to 0"] = 0.2
    ema_decay: Annotated[float, "the share of itself that the teacher keeps at an update; 0.999 for easy data"] = 0.99
    mix: Annotated[Literal["none", "cutmix", "classmix", "cutout"], "mixing of unlabelled images"] = "cutmix"
    mix_prob: Annotated[float, "probability that a batch is mixed"] = 0.5
    aux_weight: Annotated[float, "weight of a second prediction, from the encoder's last stage but one"] = 0.0
    ohem: Annotated[bool, "supervised loss of the hard pixels only"] = False
    ohem_threshold: Annotated[float, "ohem: pixels to whose class more probability is given are easy"] = 0.7
    ohem_kept: Annotated[int, "ohem: pixels of a batch that are kept in any case"] = 100_000
    compat: Annotated[Literal["none", "released"], "released: the arithmetic of the released code, with faults"] = (
        "none"
    )

    PRESETS: ClassVar = {
        "u2pl": {},
        "u2pl_no_contrast": {"contrast_weight": 0.0},
        "cutmix": {"contrast_weight": 0.0, "unreliable": 0.0},
        "mean_teacher": {"contrast_weight": 0.0, "unreliable": 0.0, "mix": "none"},
        "supervised": {"contrast_weight": 0.0, "unsup_weight": 0.0},
        "released": {"compat": "released", "contrast_weight": 1.0, "anchors": 256, "negatives": 50},
    }


def main(args: Args) -> None:
    run = Run(args)
    if run.finished():
        return
    semi = args.unsup_weight > 0 or args.contrast_weight > 0
    train, valid, test = run.loaders(open_semi(args, views=int(semi)))
    bank = bank_of_flags(args, run.device)
    dim = args.features if bank else 0
    student = run.build(around=lambda net: WithHeads(net, dim, args.aux_weight > 0, args.size or 64))
    optimizer, schedule = build_optimizer(args, student, len(train))
    teacher = teacher_of(student) if semi else None
    pair = [bare(student), teacher] if semi else [bare(student)]
    run.about["models"] *= len(pair)
    parts = {"nets": [one.net for one in pair], "heads": [one.heads for one in pair], "banks": [bank] if bank else []}
    checkpoint = Checkpoint(run, optimizers=[optimizer], schedules=[schedule], **parts)

    for epoch in checkpoint.epochs(args.epochs):
        warm, share = epoch < args.warm_epochs, unreliable_share(epoch, args.epochs, args.unreliable)
        stats = Averages(run, lr=schedule.get_last_lr()[0], alpha=share)
        for batch in run.batches(train, epoch, [student]):
            image, count = batch["image"], len(batch["image"])
            if semi and not warm:
                goal = teach(run, teacher, batch, args, share)
                image = torch.cat([image, goal.image])
            with run.autocast():
                out = student(image)
            losses = {"supervised": supervised_loss(out, batch["mask"], args)}
            if semi and not warm:
                logits = as_classes(out.logits[count:])
                losses["unsupervised"], kept = reliable_loss(logits, goal.label, goal.entropy, goal.threshold)
                stats.add(**pseudo_scores(goal, kept))
            if bank and not warm:
                losses["contrast"], numbers = pixel_contrast(bank, out.feature, goal, args, run.every)
                stats.add(**numbers)
            loss = total(losses, args, out)
            run.step(student, optimizer, schedule, loss)
            if semi and run.last:
                update = (schedule.last_epoch - 1 - args.warm_epochs * len(train)) // args.accumulate
                decay = average_decay(update, args.ema_decay)  # until the end of the warm epochs 0
                follow(run, teacher, student, decay, buffers=args.compat == "none")
            stats.add(loss=loss[None], **{f"loss_{name}": value[None] for name, value in losses.items()})
        scores = evaluate(run, parts["nets"][-1], valid)
        fill = {"bank_fill": bank.fill().tolist()} if bank else {}
        run.log(epoch=epoch, seconds=run.seconds(), **stats.result(), **fill, **named("valid", scores))
        show(run, epoch, parts["nets"][-1], train.dataset, stats)
        checkpoint.save(epoch, scores["score"], net=len(pair) - 1)
    test_once(run, checkpoint, test)


if __name__ == "__main__":
    launch(main, Args)
