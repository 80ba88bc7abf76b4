"""UniMatch: one network, whose confident labels of a weakly changed image teach it strongly changed views of it.

Paper    Yang et al., "Revisiting weak-to-strong consistency in semi-supervised semantic segmentation", CVPR 2023: two
         views with other colours and CutMix, and one whose features are dropped in part. --preset fixmatch: one view
         (Sohn et al., "FixMatch", NeurIPS 2020). The simple strong baseline of train_u2pl.py.
Run      python train_unimatch.py --train_csv LABELLED.csv --unlabelled_csv UNLABELLED.csv --valid_csv VALID.csv
             --test_csv TEST.csv --classes C --name unimatch
2 GPUs   torchrun --standalone --nproc_per_node=2 train_unimatch.py ... (same flags)
Results  benchmarks/u2pl.md
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch

from utils.args import launch
from utils.averages import Averages
from utils.checkpoint import Checkpoint, bare
from utils.evaluate import evaluate, named, test_once
from utils.losses import per_image_loss
from utils.methods.u2pl import as_classes, confident_loss, pseudo_scores
from utils.methods.unimatch import label_views
from utils.models.heads import WithHeads
from utils.optim import build_optimizer
from utils.pictures import show
from utils.run import Run
from utils.semi_args import SemiArgs
from utils.unlabelled import open_semi


@dataclass
class Args(SemiArgs):
    preset: Annotated[Literal["unimatch", "fixmatch"], "fixmatch: one strong view, no dropped features"] = "unimatch"
    confidence: Annotated[float, "probability from which on a label is learnt"] = 0.95
    views: Annotated[int, "strongly changed views of an image"] = 2
    feature_share: Annotated[float, "share of the unlabelled loss that dropped features have"] = 0.5
    mix_prob: Annotated[float, "probability that a view is mixed by CutMix"] = 0.5

    PRESETS: ClassVar = {"unimatch": {}, "fixmatch": {"views": 1, "feature_share": 0.0}}


def main(args: Args) -> None:
    run = Run(args)
    if run.finished():
        return
    semi = args.unsup_weight > 0
    train, valid, test = run.loaders(open_semi(args, views=1 + args.views if semi else 0))
    net = run.build(around=lambda net: WithHeads(net, size=args.size or 64))
    optimizer, schedule = build_optimizer(args, net, len(train))
    nets = [bare(net).net]
    checkpoint = Checkpoint(run, nets=nets, optimizers=[optimizer], schedules=[schedule])

    for epoch in checkpoint.epochs(args.epochs):
        stats = Averages(run, lr=schedule.get_last_lr()[0])
        for batch in run.batches(train, epoch, [net]):
            image, mask, count = batch["image"], batch["mask"], len(batch["image"])
            features = semi and args.feature_share > 0
            if semi:
                plain, views = label_views(run, bare(net), batch, args.mix_prob)
                image = torch.cat([image, *(view.image for view in views), *[plain.image] * features])
            with run.autocast():
                out = net(image, perturbed=count * features)
            loss = supervised = per_image_loss(out.logits[:count], mask).mean()
            if semi:
                parts = as_classes(out.logits[count:]).split(count)
                pairs = zip(parts, views, strict=False)
                found = [confident_loss(logits, view.label, view.confidence, args.confidence) for logits, view in pairs]
                strong, (_, kept) = sum(loss for loss, _ in found) / len(found), found[0]
                unsupervised = (1 - args.feature_share) * strong
                if features:
                    dropped, _ = confident_loss(parts[-1], plain.label, plain.confidence, args.confidence)
                    unsupervised = unsupervised + args.feature_share * dropped
                    stats.add(loss_features=dropped[None])
                loss = loss + args.unsup_weight * unsupervised
                stats.add(loss_unsupervised=unsupervised[None], loss_strong=strong[None])
                stats.add(**pseudo_scores(views[0], kept))
            run.step(net, optimizer, schedule, loss)
            stats.add(loss=loss[None], loss_supervised=supervised[None])
        scores = evaluate(run, nets[0], valid)
        run.log(epoch=epoch, seconds=run.seconds(), **stats.result(), **named("valid", scores))
        show(run, epoch, nets[0], train.dataset, stats)
        checkpoint.save(epoch, scores["score"])
    test_once(run, checkpoint, test)


if __name__ == "__main__":
    launch(main, Args)
