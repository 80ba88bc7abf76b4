"""Co-teaching+ on noisy masks: co-teaching among the images on which the two networks still disagree.

Paper    Yu et al., "How does disagreement help generalization against label corruption?", ICML 2019.
         --preset nlkd: the adaptation in the released NLKD code (top by IoU of the whole batch, if they disagree).
Run      python "train_co_teaching+.py" --train_csv NOISY.csv --valid_csv VALID.csv --test_csv TEST.csv --name plus
2 GPUs   torchrun --standalone --nproc_per_node=2 "train_co_teaching+.py" ... (same flags)
Results  benchmarks/nlkd.md
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from utils.args import RankArgs, launch
from utils.averages import Averages
from utils.checkpoint import Checkpoint
from utils.dataset import open_lists
from utils.evaluate import evaluate_all, named, test_once
from utils.methods.robust_losses import build_loss, learnt
from utils.methods.selection import (
    Window,
    cleanness,
    differing_examples,
    dropped_share,
    examples,
    fall_back,
    forget_rate,
    keep_cleanest,
    plus,
    selected_loss,
    selection_stats,
)
from utils.optim import build_optimizer
from utils.pictures import show
from utils.run import Run


@dataclass
class Args(RankArgs):
    disagree: Annotated[Literal["iou", "bf"], "images disagree where this score of the two masks is low"] = "iou"
    below: Annotated[float, "images disagree below this score; pixels, where the classes differ"] = 0.9
    order: Annotated[Literal["nested", "intersect"], "rank inside the disagreeing, or intersect with them"] = "nested"
    init_epochs: Annotated[int, "first epochs of plain co-teaching"] = 1
    fallback: Annotated[Literal["skip", "all", "first"], "if nothing is selected: no step, all, or image 0"] = "skip"

    PRESETS: ClassVar = {
        "paper": {},
        "nlkd": {
            "score": "iou",
            "forget_rate": 0.6,
            "schedule": "constant",
            "keep_rule": "nlkd",
            "normalise": "batch",
            "order": "intersect",
            "init_epochs": 0,
            "fallback": "first",
        },
    }


def main(args: Args) -> None:
    run = Run(args)
    if run.finished():
        return
    train, valid, test = run.loaders(open_lists(args))
    tau = dropped_share(args.forget_rate, train.dataset.frame)
    nets = [run.build(0), run.build(1, args.arch2, args.encoder2)]
    criteria = [build_loss(args).to(run.device) for _ in nets]
    built = [build_optimizer(args, net, len(train), loss) for net, loss in zip(nets, criteria, strict=True)]
    optimizers, schedules = zip(*built, strict=True)
    checkpoint = Checkpoint(run, nets=nets, optimizers=optimizers, schedules=schedules, losses=criteria)

    for epoch in checkpoint.epochs(args.epochs):
        stats = Averages(run, lr=schedules[0].get_last_lr()[0])
        window = run.carry("window", Window(args.window))
        forget = forget_rate(epoch, args.epochs, tau, args.num_gradual, args.exponent, args.schedule)
        for batch in run.batches(train, epoch, nets):
            mask = batch["mask"]
            with run.autocast():
                logits = [net(batch["image"]) for net in nets]
            losses = [examples(z, mask, args.unit, loss) for z, loss in zip(logits, criteria, strict=True)]
            scores = [
                cleanness(*pair, mask, args.score, args.theta0, args.theta) for pair in zip(logits, losses, strict=True)
            ]
            differ = differing_examples(*logits, mask, args)
            chosen = []
            for i, peer in enumerate((1, 0)):
                if epoch < args.init_epochs:
                    keep = keep_cleanest(scores[peer], forget, args.keep_rule, recent=window.recent(peer))
                else:
                    keep = plus(scores[peer], differ, forget, args.order, args.keep_rule, window.recent(peer))
                    keep = fall_back(keep, args.fallback)
                kept = run.mean(keep.sum())
                loss = selected_loss(losses[i], keep, kept if args.normalise == "selected" else len(keep))
                run.step(nets[i], optimizers[i], schedules[i], loss, clip=args.clip_value, when=bool(kept > 0))
                stats.add(loss=losses[i], disagree=differ.float(), **selection_stats(keep, batch["noisy"]))
                chosen.append(keep)
            if args.unit == "image":
                stats.keep(weight=sum(chosen) / 2, cleanness=sum(scores) / 2)
            nested = args.order == "nested" and epoch >= args.init_epochs
            window.add(*scores, among=differ if nested else None)
        scores = evaluate_all(run, nets, valid)
        both = named("valid_a", scores[0]) | named("valid_b", scores[1])
        run.log(epoch=epoch, seconds=run.seconds(), forget=forget, **stats.result(), **learnt(*criteria), **both)
        better = int(scores[1]["score"] > scores[0]["score"])
        show(run, epoch, nets[better], train.dataset, stats)
        checkpoint.save(epoch, scores[better]["score"], net=better)
    test_once(run, checkpoint, test)


if __name__ == "__main__":
    launch(main, Args)
