"""ADELE: the labels of a class are corrected once the network begins to memorise them, by its own sure predictions.

Paper    Liu et al., "Adaptive early-learning correction for segmentation from noisy annotations", CVPR 2022. The
         training IoU of every class is fitted by a (1 - exp(-b t^c)); when the slope has fallen by --slope-change since
         the first epoch, the given masks are corrected after this and every later epoch: a pixel becomes that class
         where the mean over --scales is sure of it. The predictions at these scales are kept alike by --consistency,
         at the cost of a forward and backward pass for each scale. Corrected masks, of the newest epochs, are in
         runs/NAME/corrected; `--slope-change 1 --consistency 0` is train_without_weight.py.
Run      python train_early_correction.py --train_csv NOISY.csv --valid_csv VALID.csv --test_csv TEST.csv --name adele
2 GPUs   torchrun --standalone --nproc_per_node=2 train_early_correction.py ... (same flags)
Results  benchmarks/corrections.md
"""

from dataclasses import dataclass, field
from typing import Annotated

from utils.args import TrainArgs, launch
from utils.averages import Averages
from utils.checkpoint import Checkpoint, bare
from utils.corrected import CorrectedDataset, correct_labels
from utils.dataset import open_lists
from utils.evaluate import evaluate, named, test_once
from utils.methods.early_learning import EarlyLearning, at_scales, class_overlaps, scale_divergence
from utils.methods.robust_losses import build_loss, learnt
from utils.optim import build_optimizer
from utils.pictures import show
from utils.run import Run


@dataclass
class Args(TrainArgs):
    slope_change: Annotated[float, "a class is corrected once its IoU slope fell by this share; 1: never"] = 0.9
    correction_threshold: Annotated[float, "only where a class is more probable; 0.7 corrects more, 0.95 less"] = 0.8
    background: Annotated[
        bool,
        "class 0 is what is left over: pixels may become it as soon as any class is corrected; --no-background: "
        "a class like the others, with a curve and a turn of its own, where 0 is sky or road",
    ] = True
    scales: Annotated[list[float], "scales at which images are seen besides 1"] = field(
        default_factory=lambda: [0.7, 1.5]
    )
    consistency: Annotated[
        float, "factor of the divergence of the scales; 0: none, with 3.7 times fewer pixels a step"
    ] = 1.0
    consistency_confidence: Annotated[float, "no such term for images on which no pixel is as sure"] = 0.8


def main(args: Args) -> None:
    run = Run(args)
    if run.finished():
        return
    train, valid, test = run.loaders(open_lists(args, kind=CorrectedDataset))
    early = EarlyLearning(args.epochs, args.classes, len(train.dataset), args.background)
    train.dataset.follow(early.version, run.dir / "corrected")
    net, criterion = run.build(), build_loss(args).to(run.device)
    optimizer, schedule = build_optimizer(args, net, len(train), criterion)
    parts = {"nets": [net], "optimizers": [optimizer], "schedules": [schedule]}
    checkpoint = Checkpoint(run, **parts, losses=[criterion], corrections=[early])

    for epoch in checkpoint.epochs(args.epochs):
        stats = Averages(run, lr=schedule.get_last_lr()[0])
        for batch in run.batches(train, epoch, [net]):
            image, mask = batch["image"], batch["mask"]
            with run.autocast():
                every = [net(image)]
                if args.consistency > 0:
                    every += at_scales(bare(net), image, args.scales)
            losses = [criterion(logits, mask) for logits in every]
            loss = sum(losses) / len(losses)
            if args.consistency > 0:
                divergence = scale_divergence(every, mask, args.consistency_confidence)
                loss = loss + args.consistency * divergence
                stats.add(divergence=divergence)
            run.step(net, optimizer, schedule, loss.mean())
            stats.add(batch["noisy"], loss=losses[0])
            stats.add(**class_overlaps(every[0], mask, early.first))
        scores, means = evaluate(run, net, valid), stats.result()
        means |= early.fit(epoch, means)
        due = run.gather(early.due(means, args.slope_change))[0]
        if (due or early.done()) and epoch + 1 < args.epochs:
            means |= correct_labels(run, net, train.dataset, early, due, args)
        run.log(epoch=epoch, seconds=run.seconds(), **means, **learnt(criterion), **named("valid", scores))
        show(run, epoch, net, train.dataset, stats)
        checkpoint.save(epoch, scores["score"])
    test_once(run, checkpoint, test)


if __name__ == "__main__":
    launch(main, Args)
