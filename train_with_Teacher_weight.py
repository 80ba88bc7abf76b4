"""NLKD without distillation: every image, or every pixel, counts as much as the teacher trusts its mask.

Paper    Liang et al., "NLKD: using coarse annotations for semantic segmentation based on knowledge distillation",
         ICASSP 2021, the rows without KD. The weights come from utils/get_weight.py; those of --level pixel from
         utils/predict_mask.py --support, after the authors' later BAKD (2025); --level both, our own, takes both.
Run      python train_with_Teacher_weight.py --train_csv WEIGHTS.csv --valid_csv VALID.csv --test_csv TEST.csv --name bf
2 GPUs   torchrun --standalone --nproc_per_node=2 train_with_Teacher_weight.py ... (same flags)
Results  benchmarks/nlkd.md
"""

from utils.args import WeightArgs, launch
from utils.averages import Averages
from utils.checkpoint import Checkpoint
from utils.evaluate import evaluate, named, test_once
from utils.methods.robust_losses import build_loss, learnt
from utils.methods.weighting import effective_size, mix_weights, weigh_pixels, weighted_mean
from utils.optim import build_optimizer
from utils.pictures import show
from utils.run import Run
from utils.support import open_weighted


def main(args: WeightArgs) -> None:
    run = Run(args)
    if run.finished():
        return
    train, valid, test = run.loaders(open_weighted(args))
    net, criterion = run.build(), build_loss(args).to(run.device)
    optimizer, schedule = build_optimizer(args, net, len(train), criterion)
    checkpoint = Checkpoint(run, nets=[net], optimizers=[optimizer], schedules=[schedule], losses=[criterion])

    for epoch in checkpoint.epochs(args.epochs):
        stats = Averages(run, lr=schedule.get_last_lr()[0])
        for batch in run.batches(train, epoch, [net]):
            with run.autocast():
                logits = net(batch["image"])
            loss = criterion(logits, batch["mask"])
            if args.level != "sample":
                product, weight = weigh_pixels(logits, batch, 0.0, args, criterion.per_pixel)
            else:
                weight = mix_weights(batch["weight"], None, 0.0, args.weight_floor)
                product = weight * loss
            mean = run.mean(weight.mean()) if args.normalise == "weight" else None
            run.step(net, optimizer, schedule, weighted_mean(product, weight, args.normalise, mean))
            stats.add(batch["noisy"], loss=loss, weight=weight)
            stats.add(weight_square=weight**2)
            stats.keep(weight=weight)
        scores, means = evaluate(run, net, valid), stats.result() | learnt(criterion)
        size = effective_size(means["train_weight"], means["train_weight_square"], len(train.dataset))
        run.log(epoch=epoch, seconds=run.seconds(), effective_size=size, **means, **named("valid", scores))
        show(run, epoch, net, train.dataset, stats)
        checkpoint.save(epoch, scores["score"])
    test_once(run, checkpoint, test)


if __name__ == "__main__":
    launch(main, WeightArgs)
