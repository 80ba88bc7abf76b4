"""Spatial correction: a network trained on biased masks says where they should be, as soon as its bias is known.

Paper    Yao et al., "Learning to segment from noisy annotations: a spatial correction approach", ICLR 2023. Train;
         measure on clean masks by how many pixels the predicted contours lie too far out; replace the training masks
         by predictions moved back by as many; train again from the first weights. --rounds times, or until the bias is
         below --min-bias. --rounds 0 is the baseline.
Run      python train_spatial_correction.py --train_csv TRAIN.csv --valid_csv CLEAN_VALID.csv --test_csv TEST.csv -n sc
2 GPUs   torchrun --standalone --nproc_per_node=2 train_spatial_correction.py ... (same flags)
Results  benchmarks/jsrt.md
"""

from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from typing import Annotated, Literal

from utils.args import TrainArgs, launch
from utils.averages import Averages
from utils.checkpoint import Checkpoint
from utils.corrected import CorrectedDataset
from utils.dataset import open_lists
from utils.errors import InputError, say
from utils.evaluate import evaluate, named, test_once
from utils.methods.robust_losses import build_loss, learnt
from utils.methods.spatial_correction import Rounds, contour_bias, corrected_mask
from utils.optim import build_optimizer
from utils.pictures import show
from utils.relabel import Restart, list_mean, open_trusted, relabel
from utils.run import Run


@dataclass
class Args(TrainArgs):
    trusted_csv: Annotated[str, "clean masks that tell the bias; empty: the validation list, which must be clean"] = ""
    rounds: Annotated[int, "corrections; --epochs is shared out among rounds + 1 trainings; 0: the baseline"] = 2
    correction: Annotated[
        Literal["score", "distance"],
        "score: logits are changed beside the contour, as published; distance: the contour moves by the whole bias",
    ] = "score"
    min_bias: Annotated[float, "pixels at --size; with a smaller bias masks stay, and the run ends. 1 at 256"] = 1.0


def main(args: Args) -> None:
    if not (0 <= args.rounds < args.epochs and args.min_bias >= 0):
        raise InputError(f"--rounds {args.rounds}, --min-bias {args.min_bias}: 0 or more, and fewer rounds than epochs")
    if args.correction == "score" and args.classes > 1:
        raise InputError("--correction score: published for one class; use --correction distance with --classes")
    run = Run(args)
    if run.finished():
        return
    lists = open_lists(args, kind=CorrectedDataset)
    train, valid, test = run.loaders(lists)
    trusted, stage = run.loader(open_trusted(args, lists)), -(-args.epochs // (args.rounds + 1))
    rounds, net, criterion = Rounds(args.classes, len(train.dataset)), run.build(), build_loss(args).to(run.device)
    train.dataset.follow(rounds.version, run.dir / "corrected")
    optimizer, schedule = build_optimizer(replace(args, epochs=stage), net, len(train), criterion)
    first = Restart(net, criterion, optimizer, schedule)
    parts = {"nets": [net], "optimizers": [optimizer], "schedules": [schedule]}
    checkpoint = Checkpoint(run, **parts, losses=[criterion], rounds=[rounds])

    for epoch in takewhile(lambda _: not rounds.over, checkpoint.epochs(args.epochs)):
        corrected = {}
        if rounds.made < epoch // stage:
            change = partial(corrected_mask, bias=rounds.known(), how=args.correction)
            corrected = relabel(run, net, train.dataset, epoch, change)
            rounds.corrected(epoch)
            first.again()
        stats = Averages(run, lr=schedule.get_last_lr()[0], round=int(rounds.made), **corrected)
        for batch in run.batches(train, epoch, [net]):
            with run.autocast():
                logits = net(batch["image"])
            loss = criterion(logits, batch["mask"])
            run.step(net, optimizer, schedule, loss.mean())
            stats.add(batch["noisy"], loss=loss)
        scores, row = evaluate(run, net, valid), stats.result() | learnt(criterion)
        if args.rounds and (epoch + 1) % stage == 0:
            bias = list_mean(run, net, trusted, partial(contour_bias, classes=args.classes))
            row |= rounds.measured(bias, args.min_bias)
            if rounds.over:
                say(f"{run.dir}: no bias of {args.min_bias} pixels or more; the masks stay from here on")
        run.log(epoch=epoch, seconds=run.seconds(), **row, **named("valid", scores))
        show(run, epoch, net, train.dataset, stats)
        checkpoint.save(epoch, scores["score"])
    test_once(run, checkpoint, test)


if __name__ == "__main__":
    launch(main, Args)
