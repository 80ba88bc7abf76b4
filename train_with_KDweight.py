"""NLKD: teacher and student judge every annotation together, and the image counts accordingly.

Paper    Liang et al., "NLKD: using coarse annotations for semantic segmentation based on knowledge distillation",
         ICASSP 2021. w = T s + (1 - T) t: the teacher's score t is in the list, the student's own s is taken anew at
         every step, from hard masks and without a gradient; T is 0 for --warmup epochs, then grows to --t-end.
         --level pixel: one weight a pixel, s^T t^(1 - T) of the probabilities that student and teacher give its label,
         low beside the contour; after the authors' later BAKD (2025). Lists by utils/predict_mask.py --support.
         --distill kl --teacher CHECKPOINT: a teacher also teaches, as in train_distill.py.
Run      python train_with_KDweight.py --train_csv WEIGHTS.csv --valid_csv VALID.csv --test_csv TEST.csv --name bf_kd
2 GPUs   torchrun --standalone --nproc_per_node=2 train_with_KDweight.py ... (same flags)
Results  benchmarks/nlkd.md
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from torch import nn

from utils.args import WeightArgs, launch
from utils.averages import Averages
from utils.checkpoint import Checkpoint
from utils.distill import DistillArgs, check_distill, distiller, each
from utils.evaluate import evaluate, named, test_once
from utils.lists import weight_score
from utils.losses import hard
from utils.methods.robust_losses import build_loss, learnt
from utils.methods.weighting import (
    effective_size,
    mix_weights,
    mixing,
    released_student_quality,
    student_quality,
    weigh_pixels,
    weighted_mean,
)
from utils.optim import build_optimizer
from utils.pictures import show
from utils.run import Run
from utils.support import open_weighted


@dataclass
class Args(DistillArgs, WeightArgs):
    quality: Annotated[
        Literal["auto", "miou", "bf", "bm", "iou", "dice"],
        "the student's score; auto: the one behind the list's weights",
    ] = "auto"
    student_theta: Annotated[
        int, "--theta of the student's score; smaller where --size shrinks the masks; 0: --theta"
    ] = 0
    warmup: Annotated[int, "epochs before the student has a say"] = 10
    t_start: Annotated[float, "the student's share in the first epoch after that"] = 0.05
    t_end: Annotated[float, "the student's share in the last epoch"] = 0.5


def main(args: Args) -> None:
    check_distill(args)
    run = Run(args)
    if run.finished():
        return
    train, valid, test = run.loaders(open_weighted(args))
    quality, pixel = args.quality, args.level != "sample"
    if quality == "auto" and not pixel:
        quality = weight_score(train.dataset.frame, args.train_csv)
    theta = args.student_theta or args.theta
    net, criterion = run.build(), build_loss(args).to(run.device)
    distil = distiller(run, net, test)
    own = nn.ModuleList([criterion, distil])
    optimizer, schedule = build_optimizer(args, net, len(train), own)
    checkpoint = Checkpoint(run, nets=[net], optimizers=[optimizer], schedules=[schedule], losses=[own])

    for epoch in checkpoint.epochs(args.epochs):
        stats = Averages(run, lr=schedule.get_last_lr()[0])
        share = mixing(epoch, args.epochs, args.warmup, args.t_start, args.t_end)
        for batch in run.batches(train, epoch, [net]):
            with run.autocast():
                logits = net(batch["image"])
                target = distil.ask(batch["image"])
            loss, student = criterion(logits, batch["mask"]), None
            if pixel:
                product, weight = weigh_pixels(logits, batch, share, args, criterion.per_pixel)
            elif share > 0 and args.compat == "nlkd":
                student = released_student_quality(logits, batch["mask"], args.theta0, theta)
            elif share > 0:
                student = student_quality(hard(logits), batch["mask"], quality, args.classes, args.theta0, theta)
                stats.add(batch["noisy"], student=student)
            if not pixel:
                weight = mix_weights(batch["weight"], student, share, args.weight_floor)
                product = weight * loss
            mean = run.mean(weight.mean()) if args.normalise == "weight" else None
            terms = distil(logits, target, batch["mask"])
            total = weighted_mean(product, weight, args.normalise, mean) + sum(terms.values())
            run.step(net, optimizer, schedule, total)
            stats.add(batch["noisy"], loss=loss, weight=weight)
            stats.add(weight_square=weight**2, **each(terms, len(loss)))
            stats.keep(weight=weight)
        scores, means = evaluate(run, net, valid), stats.result() | learnt(criterion)
        size = effective_size(means["train_weight"], means["train_weight_square"], len(train.dataset))
        means |= {"effective_size": size, "T": share}
        run.log(epoch=epoch, seconds=run.seconds(), **means, **named("valid", scores))
        show(run, epoch, net, train.dataset, stats)
        checkpoint.save(epoch, scores["score"])
    test_once(run, checkpoint, test)


if __name__ == "__main__":
    launch(main, Args)
