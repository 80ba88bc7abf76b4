"""Baseline: every image counts once. Also trains teachers, on a trusted list or on folds.

Run      python train_without_weight.py --train_csv TRAIN.csv --valid_csv VALID.csv --test_csv TEST.csv --name noweight
2 GPUs   torchrun --standalone --nproc_per_node=2 train_without_weight.py ... (same flags)
Results  benchmarks/nlkd.md
"""

from utils.args import TrainArgs, launch
from utils.averages import Averages
from utils.checkpoint import Checkpoint
from utils.dataset import open_lists
from utils.evaluate import evaluate, named, test_once
from utils.methods.robust_losses import build_loss, learnt
from utils.optim import build_optimizer
from utils.pictures import show
from utils.run import Run


def main(args: TrainArgs) -> None:
    run = Run(args)
    if run.finished():
        return
    train, valid, test = run.loaders(open_lists(args))
    net, criterion = run.build(), build_loss(args).to(run.device)
    optimizer, schedule = build_optimizer(args, net, len(train), criterion)
    checkpoint = Checkpoint(run, nets=[net], optimizers=[optimizer], schedules=[schedule], losses=[criterion])

    for epoch in checkpoint.epochs(args.epochs):
        stats = Averages(run, lr=schedule.get_last_lr()[0])
        for batch in run.batches(train, epoch, [net]):
            with run.autocast():
                logits = net(batch["image"])
            loss = criterion(logits, batch["mask"])
            run.step(net, optimizer, schedule, loss.mean())
            stats.add(batch["noisy"], loss=loss)
        scores = evaluate(run, net, valid)
        run.log(epoch=epoch, seconds=run.seconds(), **stats.result(), **learnt(criterion), **named("valid", scores))
        show(run, epoch, net, train.dataset, stats)
        checkpoint.save(epoch, scores["score"])
    test_once(run, checkpoint, test)


if __name__ == "__main__":
    launch(main, TrainArgs)
