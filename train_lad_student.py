"""Distillation from a label-assisted teacher: the student never sees a label, but what the teacher makes of it.

Paper    Qiu et al., "Make a strong teacher with label assistance", ECCV 2024. Any teacher of train_lad_teacher.py whose
         classes are those of the student; losses as in train_distill.py, channel-wise distillation by default.
         --label-channel gives it the released student's fourth input channel, always zero.
Run      python train_lad_student.py --train_csv TRAIN.csv --valid_csv VALID.csv --test_csv TEST.csv --name lad \\
             --teacher runs/lad_teacher/best.pt
2 GPUs   torchrun --standalone --nproc_per_node=2 train_lad_student.py ... (same flags)
Results  benchmarks/lad.md
"""

from dataclasses import dataclass
from typing import Annotated

from torch import nn

from utils.args import TrainArgs, launch
from utils.averages import Averages
from utils.checkpoint import Checkpoint
from utils.dataset import open_lists
from utils.distill import ON_LOGITS, DistillArgs, check_distill, distiller, each, mixture
from utils.errors import InputError
from utils.evaluate import evaluate, named, test_once
from utils.lad import LabelArgs, check_label, label_map
from utils.methods.robust_losses import build_loss, learnt
from utils.optim import build_optimizer
from utils.pictures import show
from utils.run import Run


@dataclass
class Args(LabelArgs, DistillArgs, TrainArgs):
    distill: DistillArgs.__annotations__["distill"] = "cwd"
    code_noise: LabelArgs.__annotations__["code_noise"] = 0.02
    draws: Annotated[int, "paintings of the label whose predictions the teacher averages; released: 1, codes fixed"] = 1
    label_channel: Annotated[bool, "with the released student's fourth input channel, which is always zero"] = False


def main(args: Args) -> None:
    check_distill(args, needed=True)
    check_label(args)
    if args.draws < 1:
        raise InputError(f"--draws {args.draws}: must be 1 or more")
    if args.draws > 1 and set(mixture(args.distill)) - ON_LOGITS:
        raise InputError(f"--draws {args.draws}: averages predictions, not features; use --distill kl, cwd or dist")
    run = Run(args)
    if run.finished():
        return
    train, valid, test = run.loaders(open_lists(args))
    net, criterion = run.build(extra=int(args.label_channel)), build_loss(args).to(run.device)
    distil = distiller(run, net, test, labelled=True)
    own = nn.ModuleList([criterion, distil])
    optimizer, schedule = build_optimizer(args, net, len(train), own)
    checkpoint = Checkpoint(run, nets=[net], optimizers=[optimizer], schedules=[schedule], losses=[own])

    for epoch in checkpoint.epochs(args.epochs):
        stats = Averages(run, lr=schedule.get_last_lr()[0])
        for batch in run.batches(train, epoch, [net]):
            mask = batch["mask"]
            with run.autocast():
                logits = net(batch["image"])
                target = distil.ask(batch["image"], *(label_map(args, mask) for _ in range(args.draws)))
            loss = criterion(logits, mask)
            terms = distil(logits, target, mask)
            run.step(net, optimizer, schedule, loss.mean() + sum(terms.values()))
            stats.add(batch["noisy"], loss=loss)
            stats.add(**each(terms, len(mask)))
        scores = evaluate(run, net, valid)
        run.log(epoch=epoch, seconds=run.seconds(), **stats.result(), **learnt(criterion), **named("valid", scores))
        show(run, epoch, net, train.dataset, stats)
        checkpoint.save(epoch, scores["score"])
    test_once(run, checkpoint, test)


if __name__ == "__main__":
    launch(main, Args)
