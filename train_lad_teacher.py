"""A label-assisted teacher: beside the image it sees the label, noised so that it tells regions, but not classes.

Paper    Qiu et al., "Make a strong teacher with label assistance", ECCV 2024. Each class of an image is painted with a
         random number, and each pixel with noise. Two such paintings go through the network, and it has to predict the
         same from both. The list may be noisy: then so is what the teacher is shown. The network without its label
         channel is evaluated, too. Student: train_lad_student.py.
Run      python train_lad_teacher.py --train_csv TRAIN.csv --valid_csv VALID.csv --test_csv TEST.csv --name lad_teacher
2 GPUs   torchrun --standalone --nproc_per_node=2 train_lad_teacher.py ... (same flags)
Results  benchmarks/lad.md
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from utils.args import TrainArgs, launch
from utils.averages import Averages
from utils.checkpoint import Checkpoint
from utils.dataset import open_lists
from utils.errors import InputError
from utils.evaluate import evaluate, named, plain, test_once
from utils.lad import LabelArgs, check_label, consistency, label_map, painter, shown
from utils.methods.robust_losses import build_loss, learnt
from utils.optim import build_optimizer
from utils.pictures import show
from utils.run import Run


@dataclass
class Args(LabelArgs, TrainArgs):
    consistency_loss: Annotated[
        Literal["cwd", "dist", "kl"], "distance between what it predicts from two paintings"
    ] = "cwd"
    consistency_weight: Annotated[float, "its weight; 0: one painting alone"] = 5.0
    consistency_temperature: Annotated[float, "of cwd and kl: softens both sides"] = 4.0
    consistency_stride: Annotated[int, "compares cells of this many pixels"] = 8
    label_init: Annotated[
        Literal["rgb", "released", "zero"], "filter of the label: as large as those of the image, 0.1 x N(0, 1), or 0"
    ] = "rgb"


def main(args: Args) -> None:
    check_label(args)
    if not (args.consistency_weight >= 0 and args.consistency_temperature > 0 and args.consistency_stride > 0):
        raise InputError("--consistency-weight must be 0 or more, --consistency-temperature and -stride above 0")
    run = Run(args)
    if run.finished():
        return
    train, valid, test = run.loaders(open_lists(args))
    net, criterion = run.build(extra=1, extra_init=args.label_init, label=True), build_loss(args).to(run.device)
    optimizer, schedule = build_optimizer(args, net, len(train), criterion)
    checkpoint = Checkpoint(run, nets=[net], optimizers=[optimizer], schedules=[schedule], losses=[criterion])
    paintings = 2 if args.consistency_weight > 0 else 1

    for epoch in checkpoint.epochs(args.epochs):
        stats = Averages(run, lr=schedule.get_last_lr()[0])
        for batch in run.batches(train, epoch, [net]):
            mask, draws = batch["mask"], painter(run.device)
            with run.autocast():
                views = net(batch["image"], *(label_map(args, mask, draws) for _ in range(paintings)))
            views = views if paintings > 1 else (views,)
            losses = [criterion(view, mask) for view in views]
            apart = consistency(args, views, mask)
            run.step(net, optimizer, schedule, sum(loss.mean() for loss in losses) + apart)
            stats.add(batch["noisy"], loss=sum(losses) / paintings)
            stats.add(consistency=apart.expand(len(mask)))
        scores = evaluate(run, net, valid, shown(args, run.device))
        alone = named("valid_no_label", evaluate(run, net, valid))
        rows = stats.result() | learnt(criterion) | named("valid", scores) | alone
        run.log(epoch=epoch, seconds=run.seconds(), **rows)
        show(run, epoch, net, train.dataset, stats)
        checkpoint.save(epoch, scores["score"])
    test_once(run, checkpoint, test, {"test": shown(args, run.device), "test_no_label": plain})


if __name__ == "__main__":
    launch(main, Args)
