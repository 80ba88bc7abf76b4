"""L2R and IEG on masks: a few clean ones judge, at every step, what the noisy ones of a batch are worth.

Paper    Ren et al., "Learning to reweight examples for robust deep learning", ICML 2018 (--method l2r), and Zhang et
         al., "Distilling effective supervision from severe label noise", CVPR 2020 (--method ieg): a label that does
         not help the clean set gives way to the network's own, and mixtures of both sets and two views of every image
         teach besides. Weights belong to images, patches or pixels (--level). --method supervised is the baseline.
Run      python train_ieg_seg.py --train_csv TRAIN.csv --probe_csv CLEAN.csv --valid_csv VALID.csv --test_csv TEST.csv
             --method ieg --name ieg
2 GPUs   torchrun --standalone --nproc_per_node=2 train_ieg_seg.py ... (same flags)
Results  benchmarks/ieg.md
"""

from utils.args import launch
from utils.averages import Averages
from utils.checkpoint import Checkpoint, bare
from utils.evaluate import evaluate, named, test_once
from utils.losses import per_image_loss
from utils.methods.ieg import pseudo_label
from utils.methods.ieg_images import total
from utils.methods.ieg_maps import against_clean, agreement, draw_mixture, judge, label_losses, mixed_losses
from utils.models.views import ManyViews
from utils.optim import build_optimizer
from utils.pictures import show
from utils.points import dense
from utils.probed import ProbedArgs as Args
from utils.probed import open_probed
from utils.run import Run


def main(args: Args) -> None:
    run = Run(args)
    if run.finished():
        return
    train, valid, test = run.loaders(open_probed(args))
    net = run.build(around=ManyViews)
    optimizer, schedule = build_optimizer(args, net, len(train))
    nets = [bare(net).net]
    checkpoint = Checkpoint(run, nets=nets, optimizers=[optimizer], schedules=[schedule])

    for epoch in checkpoint.epochs(args.epochs):
        stats = Averages(run, lr=schedule.get_last_lr()[0])
        for batch in run.batches(train, epoch, [net]):
            image, mask, mixed, pseudo = batch["image"], batch["mask"], None, None
            views = [image]
            if "strong" in batch:
                views.append(batch["strong"].permute(0, 3, 1, 2))
                mixed = draw_mixture(batch, args.mix) if args.mix != "none" else None
                views += [] if mixed is None else [mixed.image]
            with run.autocast():
                out, *others = net(*views) if len(views) > 1 else [net(image)]
            loss = per_image_loss(out, mask)
            if args.method == "supervised":
                run.step(net, optimizer, schedule, loss.mean())
                stats.add(batch["noisy"], loss=loss)
                continue
            if args.method == "ieg" and args.relabel:
                pseudo = pseudo_label([dense(one).detach() for one in (out, others[0])], args.temperature, norm=False)
            with run.autocast():
                verdict = judge(nets[0], optimizer, batch, out, pseudo, args)
            parts = label_losses(out, mask, pseudo, verdict, args)
            if mixed is not None:
                parts |= mixed_losses(others[1], mixed, batch, pseudo, args.classes)
            if "strong" in batch and args.consistency_factor > 0:
                parts |= agreement(out, others[0], mask, args.classes)
            run.step(net, optimizer, schedule, total(parts, args.ce_factor, args.consistency_factor))
            decided = verdict.of_images(mask, args.classes)
            stats.add(batch["noisy"], loss=loss, **decided)
            if "clean" in batch:
                stats.add(**against_clean(verdict, mask, batch["clean"], args.classes))
            stats.add(probe_loss=verdict.probe_loss[None], effective_share=verdict.share[None])
            stats.add(**{f"loss_{name}": part[None] for name, part in parts.items()})
            stats.keep(**decided)
        scores = evaluate(run, nets[0], valid)
        run.log(epoch=epoch, seconds=run.seconds(), **stats.result(), **named("valid", scores))
        show(run, epoch, nets[0], train.dataset, stats)
        checkpoint.save(epoch, scores["score"])
    test_once(run, checkpoint, test)


if __name__ == "__main__":
    launch(main, Args)
