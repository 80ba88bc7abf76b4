"""Co-teaching on noisy masks: each network learns from the images that its peer finds cleanest.

Paper    Han et al., "Co-teaching: robust training of deep neural networks with extremely noisy labels", NeurIPS 2018.
         --preset nlkd: the adaptation in the released NLKD code (top half of a batch by IoU with the label, always).
Run      python train_co_teaching.py --train_csv NOISY.csv --valid_csv VALID.csv --test_csv TEST.csv --name co_teaching
2 GPUs   torchrun --standalone --nproc_per_node=2 train_co_teaching.py ... (same flags)
Results  benchmarks/nlkd.md
"""

from dataclasses import dataclass
from typing import ClassVar

from utils.args import RankArgs, launch
from utils.averages import Averages
from utils.checkpoint import Checkpoint
from utils.dataset import open_lists
from utils.evaluate import evaluate_all, named, test_once
from utils.methods.robust_losses import build_loss, learnt
from utils.methods.selection import (
    Window,
    cleanness,
    dropped_share,
    examples,
    forget_rate,
    keep_cleanest,
    selected_loss,
    selection_stats,
)
from utils.optim import build_optimizer
from utils.pictures import show
from utils.run import Run


@dataclass
class Args(RankArgs):
    PRESETS: ClassVar = {
        "paper": {},
        "nlkd": {
            "score": "iou",
            "forget_rate": 0.5,
            "schedule": "constant",
            "keep_rule": "nlkd",
            "normalise": "batch",
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
            chosen = []
            for i, peer in enumerate((1, 0)):
                keep = keep_cleanest(scores[peer], forget, args.keep_rule, recent=window.recent(peer))
                count = run.mean(keep.sum()) if args.normalise == "selected" else len(keep)
                some = args.window == 1 or bool(run.mean(keep.sum()) > 0)
                loss = selected_loss(losses[i], keep, count)
                run.step(nets[i], optimizers[i], schedules[i], loss, clip=args.clip_value, when=some)
                stats.add(loss=losses[i], **selection_stats(keep, batch["noisy"]))
                chosen.append(keep)
            if args.unit == "image":
                stats.keep(weight=sum(chosen) / 2, cleanness=sum(scores) / 2)
            window.add(*scores)
        scores = evaluate_all(run, nets, valid)
        both = named("valid_a", scores[0]) | named("valid_b", scores[1])
        run.log(epoch=epoch, seconds=run.seconds(), forget=forget, **stats.result(), **learnt(*criteria), **both)
        better = int(scores[1]["score"] > scores[0]["score"])
        show(run, epoch, nets[better], train.dataset, stats)
        checkpoint.save(epoch, scores[better]["score"], net=better)
    test_once(run, checkpoint, test)


if __name__ == "__main__":
    launch(main, Args)
