"""One pass over a list: every score, every image once, however many processes share the work."""

import torch
from torch import Tensor

from utils.checkpoint import bare
from utils.losses import hard
from utils.metrics import pixel_counts, scores_of, split_iou
from utils.present import classes_in, restrict
from utils.scores import ratio


def plain(net, batch: dict):
    """The logits of a network that sees the image alone."""
    return net(batch["image"])


def with_labels(net, batch: dict):
    """The logits of classes that the mask holds; the others have -inf: as if an image's classes were known."""
    logits = net(batch["image"])
    return restrict(logits, classes_in(batch["mask"], logits.shape[1]))


def evaluate(run, net, loader, forward=plain) -> dict[str, float]:
    """Scores of a network on a list, each in [0, 1].

    `iou` (binary: foreground) and `miou` come from pixel counts summed over the list; `dice` and `bf` (boundary F1) are
    means over images; `score` = (iou + dice + bf) / 3 chooses checkpoints. `--compat nlkd` adds `compat_miou`,
    a / (2 - a) of each batch's pixel accuracy a, which the released code calls mIoU. `forward` (net, batch) -> logits.
    """
    return evaluate_all(run, [net], loader, forward)[0]


@torch.inference_mode()
def evaluate_all(run, nets, loader, forward=plain) -> list[dict[str, float]]:
    """`evaluate` of several networks, which share every batch."""
    for net in nets:
        run.share_buffers(net)
    every = run.sum(count_list(run, nets, loader, forward)).cpu()  # the one time the host waits
    return [scores_of_list(of_net, len(loader.dataset), run.args) for of_net in every]


@torch.inference_mode()
def count_list(run, nets, loader, forward=plain) -> Tensor:
    """What this process's share of a list adds to the scores of each network, a row each, for `scores_of_list`."""
    nets = [bare(net).eval() for net in nets]
    sums, done = [0] * len(nets), [0, 0, 0]  # the first on the device, where they wait for the end
    for batch in run.batches(loader):
        mask = batch["mask"]
        for i, net in enumerate(nets):
            with run.autocast():
                pred = hard(forward(net, batch))
            sums[i] = sums[i] + _of_batch(pred, mask, run.args)
        done = [a + b for a, b in zip(done, (len(mask), 1, mask.numel()), strict=True)]
    rows = 3 + 3 * run.args.classes
    sums = [s if torch.is_tensor(s) else torch.zeros(rows, dtype=torch.float64, device=run.device) for s in sums]
    done = torch.tensor(done, dtype=torch.float64, device=run.device)
    return torch.stack([torch.cat([done, s]) for s in sums])


def _of_batch(pred, mask, args):
    """Sums over a batch: dice, bf, compat, and for every class the pixels in both masks, predicted and annotated."""
    counts = pixel_counts(pred, mask, args.classes, args.theta0, args.theta)
    scores = scores_of(counts)
    areas = torch.stack([counts.inter, counts.pred, counts.mask]).sum(2)
    means = torch.stack([scores["dice"], scores["bf"]]).sum(1, dtype=torch.float64)
    compat = torch.zeros_like(means[:1])
    if args.compat == "nlkd":
        inter, of_pred, of_mask = areas
        accuracy = ratio(mask.numel() - of_pred - of_mask + 2 * inter, mask.numel())
        compat = accuracy / (2 - accuracy)
    return torch.cat([means, compat, areas.flatten()])


def scores_of_list(sums: Tensor, expected: int, args) -> dict[str, float]:
    """The scores of `evaluate` from a row of `count_list`, summed over all processes."""
    images, batches, _, dice, bf, compat = sums[:6].tolist()
    assert images == expected, f"{images} images evaluated of {expected}"
    found = split_iou(*areas_of_list(sums, args.classes)) | {"dice": dice / images, "bf": bf / images}
    found["score"] = (found["iou"] + found["dice"] + found["bf"]) / 3
    return found | ({"compat_miou": compat / batches} if args.compat == "nlkd" else {})


def areas_of_list(sums: Tensor, classes: int) -> Tensor:
    """(3, classes) pixels of every class in both masks, predicted and annotated; binary: background, foreground."""
    inter, pred, mask = areas = sums[6:].view(3, -1)
    if classes > 1:
        return areas
    return torch.cat([torch.stack([sums[2] - pred - mask + inter, sums[2] - pred, sums[2] - mask]), areas], 1)


def named(prefix: str, scores: dict) -> dict:
    """{"iou": x} -> {"prefix_iou": x}."""
    return {f"{prefix}_{key}": value for key, value in scores.items()}


def test_once(run, checkpoint, loader, forwards=None) -> None:
    """The last line of a run: the chosen checkpoint on the test list, once, if there is one.

    `forwards` {prefix of the scores: forward}: other ways of using the network than `plain`.
    """
    checkpoint.wait()
    if loader is None:
        run.log(split="none")
    else:
        epoch, which, net = checkpoint.chosen(run.args.select)
        scores = {}
        for name, forward in (forwards or {"test": plain}).items():
            scores |= named(name, evaluate(run, net, loader, forward))
        run.log(split="test", checkpoint=run.args.select, best_epoch=epoch, net=which, **scores)
    run.close()
