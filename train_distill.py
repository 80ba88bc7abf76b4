"""Distillation: the student learns from the masks and from a frozen teacher's logits and features.

Papers   Hinton et al., 2015 (kl). SKD: Liu et al., CVPR 2019. IFVD: Wang et al., ECCV 2020. CWD: Shu et al., ICCV 2021.
         CIRKD: Yang et al., CVPR 2022. DIST: Huang et al., NeurIPS 2022. AT: Zagoruyko & Komodakis, ICLR 2017.
         --distill kl,cwd:3 adds them up with weights. Where the teacher judges the masks instead of teaching:
         train_with_KDweight.py, which takes --distill too.
Run      python train_distill.py --train_csv TRAIN.csv --valid_csv VALID.csv --test_csv TEST.csv --name kl \\
             --teacher runs/teacher/best.pt --distill kl
2 GPUs   torchrun --standalone --nproc_per_node=2 train_distill.py ... (same flags)
Results  benchmarks/lad.md
"""

from dataclasses import dataclass

from torch import nn

from utils.args import TrainArgs, launch
from utils.averages import Averages
from utils.checkpoint import Checkpoint
from utils.dataset import open_lists
from utils.distill import DistillArgs, check_distill, distiller, each
from utils.evaluate import evaluate, named, test_once
from utils.methods.robust_losses import build_loss, learnt
from utils.optim import build_optimizer
from utils.pictures import show
from utils.run import Run


@dataclass
class Args(DistillArgs, TrainArgs):
    distill: DistillArgs.__annotations__["distill"] = "kl"


def main(args: Args) -> None:
    check_distill(args, needed=True)
    run = Run(args)
    if run.finished():
        return
    train, valid, test = run.loaders(open_lists(args))
    net, criterion = run.build(), build_loss(args).to(run.device)
    distil = distiller(run, net, test)
    own = nn.ModuleList([criterion, distil])
    optimizer, schedule = build_optimizer(args, net, len(train), own)
    checkpoint = Checkpoint(run, nets=[net], optimizers=[optimizer], schedules=[schedule], losses=[own])

    for epoch in checkpoint.epochs(args.epochs):
        stats = Averages(run, lr=schedule.get_last_lr()[0])
        for batch in run.batches(train, epoch, [net]):
            with run.autocast():
                logits = net(batch["image"])
                target = distil.ask(batch["image"])
            loss = criterion(logits, batch["mask"])
            terms = distil(logits, target, batch["mask"])
            run.step(net, optimizer, schedule, loss.mean() + sum(terms.values()))
            stats.add(batch["noisy"], loss=loss)
            stats.add(**each(terms, len(loss)))
        scores = evaluate(run, net, valid)
        run.log(epoch=epoch, seconds=run.seconds(), **stats.result(), **learnt(criterion), **named("valid", scores))
        show(run, epoch, net, train.dataset, stats)
        checkpoint.save(epoch, scores["score"])
    test_once(run, checkpoint, test)


if __name__ == "__main__":
    launch(main, Args)
