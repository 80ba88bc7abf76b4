"""Decoupling on noisy masks: two networks learn only where they disagree.

Paper    Malach & Shalev-Shwartz, "Decoupling 'when to update' from 'how to update'", NeurIPS 2017. Its examples are
         pixels here, as a mask is a class a pixel; `--unit image` takes images whose two masks overlap too little.
         --preset nlkd: the adaptation in the released NLKD code (images with an IoU below 0.95).
Run      python train_decoupling.py --train_csv NOISY.csv --valid_csv VALID.csv --test_csv TEST.csv --name decoupling
2 GPUs   torchrun --standalone --nproc_per_node=2 train_decoupling.py ... (same flags)
Results  benchmarks/nlkd.md
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from utils.args import TwoNetArgs, launch
from utils.averages import Averages
from utils.checkpoint import Checkpoint
from utils.dataset import open_lists
from utils.evaluate import evaluate_all, named, test_once
from utils.methods.robust_losses import build_loss, learnt
from utils.methods.selection import differing_examples, examples, fall_back, selected_loss, selection_stats
from utils.optim import build_optimizer
from utils.pictures import show
from utils.run import Run


@dataclass
class Args(TwoNetArgs):
    unit: Annotated[Literal["image", "pixel"], "what is selected"] = "pixel"
    disagree: Annotated[Literal["iou", "bf"], "images disagree where this score of the two masks is low"] = "iou"
    below: Annotated[float, "images disagree below this score; pixels, where the classes differ"] = 0.95
    init_epochs: Annotated[int, "first epochs in which everything is learnt"] = 1
    fallback: Annotated[Literal["skip", "all", "first"], "if nothing is selected: no step, all, or image 0"] = "skip"
    least: Annotated[float, "the loss is divided by at least this share of the examples"] = 0.1

    PRESETS: ClassVar = {
        "paper": {},
        "nlkd": {"unit": "image", "normalise": "batch", "init_epochs": 0, "fallback": "first"},
    }


def main(args: Args) -> None:
    run = Run(args)
    if run.finished():
        return
    train, valid, test = run.loaders(open_lists(args))
    nets = [run.build(0), run.build(1, args.arch2, args.encoder2)]
    criteria = [build_loss(args).to(run.device) for _ in nets]
    built = [build_optimizer(args, net, len(train), loss) for net, loss in zip(nets, criteria, strict=True)]
    optimizers, schedules = zip(*built, strict=True)
    checkpoint = Checkpoint(run, nets=nets, optimizers=optimizers, schedules=schedules, losses=criteria)

    for epoch in checkpoint.epochs(args.epochs):
        stats = Averages(run, lr=schedules[0].get_last_lr()[0])
        for batch in run.batches(train, epoch, nets):
            with run.autocast():
                logits = [net(batch["image"]) for net in nets]
            pairs = zip(logits, criteria, strict=True)
            losses = [examples(z, batch["mask"], args.unit, loss) for z, loss in pairs]
            differ = differing_examples(*logits, batch["mask"], args)
            keep = differ if epoch >= args.init_epochs else differ | True
            keep = fall_back(keep, args.fallback)
            kept = run.mean(keep.sum())
            count = kept.clamp(min=args.least * len(keep)) if args.normalise == "selected" else len(keep)
            some = bool(kept > 0)
            for net, optimizer, schedule, loss in zip(nets, optimizers, schedules, losses, strict=True):
                loss = selected_loss(loss, keep, count)
                run.step(net, optimizer, schedule, loss, clip=args.clip_value, when=some)
            for loss in losses:
                stats.add(loss=loss, **selection_stats(keep, batch["noisy"]))
            if args.unit == "image":
                stats.keep(weight=keep)
        scores = evaluate_all(run, nets, valid)
        both = named("valid_a", scores[0]) | named("valid_b", scores[1])
        run.log(epoch=epoch, seconds=run.seconds(), **stats.result(), **learnt(*criteria), **both)
        better = int(scores[1]["score"] > scores[0]["score"])
        show(run, epoch, nets[better], train.dataset, stats)
        checkpoint.save(epoch, scores[better]["score"], net=better)
    test_once(run, checkpoint, test)


if __name__ == "__main__":
    launch(main, Args)
