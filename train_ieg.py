"""IEG and L2R on images with one label each, many of them wrong, and a small clean probe that judges them.

Paper    Zhang et al., "Distilling effective supervision from severe label noise", CVPR 2020 (--method ieg), and Ren et
         al., "Learning to reweight examples for robust deep learning", ICML 2018 (l2r). supervised is the baseline.
Run      python train_ieg.py --dataset cifar10_uniform_0.8 --method ieg --network-name resnet29 --name ieg --download
2 GPUs   torchrun --standalone --nproc_per_node=2 train_ieg.py ... (same flags)
Results  benchmarks/ieg.md
"""

import torch

from utils.accuracy import accuracy, finish
from utils.args import launch
from utils.averages import Averages
from utils.checkpoint import Checkpoint, bare
from utils.ema import follow, take_buffers, teacher_of
from utils.evaluate import named
from utils.ieg_args import IegArgs as Args
from utils.ieg_args import check_ieg
from utils.labelled import open_labelled
from utils.methods.ieg import average_decay, cycle_ends, one_hot, pseudo_label, restart_factor, soft_loss
from utils.methods.ieg_images import draw_mixture, further_losses, judge, judge_in_step, label_losses, log_of, total
from utils.methods.meta import momentum_of
from utils.models.classify import build_classifier, decay_groups
from utils.models.views import ManyViews
from utils.run import Run


def main(args: Args) -> None:
    check_ieg(args)
    run = Run(args)
    if not args.eval and run.finished():
        return
    *data, classes = open_labelled(args, run)
    train, test = run.loader(data[0], train=True), run.loader(data[1])
    args.epochs = max(1, round(args.max_iteration / len(train)))
    run.seed_everything(args.seed)
    net = run.wrap(ManyViews(build_classifier(args.network_name, classes, args.preact_relu)), together=False)
    first = args.first_period or len(train)
    optimizer = torch.optim.SGD(decay_groups(net, args.network_name, args.decay), args.learning_rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: restart_factor(step, first, args.t_mul, args.m_mul)
    )
    own = bare(net).net
    average, at_cycle_end = teacher_of(own), teacher_of(own)
    checkpoint = Checkpoint(run, nets=[own, average, at_cycle_end], optimizers=[optimizer], schedules=[schedule])
    released = args.compat == "released"
    ends = set(cycle_ends(first, args.epochs * len(train), args.t_mul, rounded=released))
    judged = args.method == "l2r" or (args.method == "ieg" and (args.relabel or args.reweight))
    together = args.method == "l2r" and args.meta_grad == "jvp"
    scale = 1024.0 if args.precision == "fp16" else 1.0  # of the probe's loss

    for epoch in checkpoint.reopened() if args.eval else checkpoint.epochs(args.epochs):
        stats = Averages(run, lr=schedule.get_last_lr()[0])
        for batch in run.batches(train, epoch, [net]):
            views, label = [batch["image"]], one_hot(batch["label"], classes)
            verdict = pseudo = mixed = probe = truth = None
            if "probe" in batch:
                probe, truth = batch["probe"].permute(0, 3, 1, 2), one_hot(batch["probe_label"], classes)
            if args.method == "ieg":
                views.append(batch["strong"].permute(0, 3, 1, 2))
                mixed = draw_mixture(*views, probe, args.true_beta) if args.mix != "none" else None
            momentum = momentum_of(own, optimizer) if judged else None
            with run.autocast():
                if together:
                    logits, verdict = judge_in_step(net, own, *views, label, (probe, truth), momentum, args, scale)
                else:
                    logits = net(*views, *([] if mixed is None else [mixed.image]))
            logits = list(logits) if args.method == "ieg" else [logits]
            if args.method == "ieg":
                pseudo = pseudo_label([z.detach() for z in logits[:2]], args.temperature, args.logit_norm)
            if judged and not together:
                with run.autocast():
                    verdict = judge(own, logits[:2], views, label, (probe, truth), momentum, args, scale)
            if judged:
                stats.add(**log_of(verdict, pseudo, batch))
                stats.add(batch["noisy"], **verdict.of_labels())
                stats.keep(weight=verdict.weight)
            loss = soft_loss(logits[0], label)
            parts = {"omega": loss.mean()} if args.method == "supervised" else {}
            parts = parts or label_losses(logits[0], label, pseudo, verdict, args)
            if args.method == "ieg":
                parts |= further_losses(logits, mixed, truth, pseudo, args)
            step = schedule.last_epoch + 1
            behind = released and args.method == "supervised"  # there the average follows before the update
            if behind:
                follow(run, average, own, average_decay(step, args.ema_decay), buffers=False)
            run.step(net, optimizer, schedule, total(parts, args.ce_factor, args.consistency_factor))
            if not behind:
                follow(run, average, own, average_decay(step, args.ema_decay), buffers=not released)
            if released:
                take_buffers(average, own)
            if step in ends:
                follow(run, at_cycle_end, average, 0.0)
            stats.add(batch["noisy"], loss=loss)
            stats.add(**{f"loss_{name}": part[None] for name, part in parts.items()})
        step = schedule.last_epoch  # a run that was stopped after the last step of a pass goes on here
        scores = named("valid", accuracy(run, average, test))
        if ends & set(range(step - len(train) + 1, step + 1)):
            scores |= named("valid_cycle_end", accuracy(run, at_cycle_end, test))
        run.log(epoch=epoch, step=step, seconds=run.seconds(), **stats.result(), **scores)
        checkpoint.save(epoch, scores["valid_accuracy"], net=1)
    tested = {"test": average}
    if any(end <= schedule.last_epoch for end in ends):
        tested["test_cycle_end"] = at_cycle_end
    finish(run, checkpoint, tested, test)


if __name__ == "__main__":
    launch(main, Args)
