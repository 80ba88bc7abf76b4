"""One pass over a list: every score, every image once, however many processes share the work."""

import torch

from utils.checkpoint import bare
from utils.losses import hard
from utils.metrics import confusion, sample_scores, split_iou
from utils.scores import ratio


@torch.inference_mode()
def evaluate(run, net, loader) -> dict[str, float]:
    """Scores of a network on a list, each in [0, 1].

    `iou` (binary: foreground) and `miou` come from pixel counts summed over the list; `dice` and `bf` (boundary F1) are
    means over images; `score` = (iou + dice + bf) / 3 chooses checkpoints. `--compat nlkd` adds `compat_miou`,
    a / (2 - a) of each batch's pixel accuracy a, which the released code calls mIoU.
    """
    run.share_buffers(net)
    args, net = run.args, bare(net).eval()
    counts = torch.zeros(max(2, args.classes), max(2, args.classes), dtype=torch.int64, device=run.device)
    sums = torch.zeros(5, dtype=torch.float64, device=run.device)  # images, dice, bf, batches, compat
    for batch in run.batches(loader):
        with run.autocast():
            pred = hard(net(batch["image"]))
        mask = batch["mask"]
        of_batch = confusion(pred, mask, args.classes)
        scores = sample_scores(pred, mask, args.classes, args.theta0, args.theta)
        counts += of_batch
        accuracy = ratio(of_batch.diagonal().sum(), of_batch.sum())
        one, n = torch.ones((), device=run.device), torch.tensor(float(len(mask)), device=run.device)
        new = [n, scores["dice"].double().sum(), scores["bf"].double().sum(), one, accuracy / (2 - accuracy)]
        sums += torch.stack([x.double() for x in new])
    images, dice, bf, batches, compat = run.sum(sums).tolist()
    assert images == len(loader.dataset), f"{images} images evaluated of {len(loader.dataset)}"
    found = split_iou(run.sum(counts)) | {"dice": dice / images, "bf": bf / images}
    found["score"] = (found["iou"] + found["dice"] + found["bf"]) / 3
    return found | ({"compat_miou": compat / batches} if args.compat == "nlkd" else {})


def named(prefix: str, scores: dict) -> dict:
    """{"iou": x} -> {"prefix_iou": x}."""
    return {f"{prefix}_{key}": value for key, value in scores.items()}


def test_once(run, checkpoint, loader) -> None:
    """The last line of a run: the chosen checkpoint on the test list, once, if there is one."""
    checkpoint.wait()
    if loader is None:
        run.log(split="none")
    else:
        epoch, which, net = checkpoint.chosen(run.args.select)
        scores = evaluate(run, net, loader)
        run.log(split="test", checkpoint=run.args.select, best_epoch=epoch, net=which, **named("test", scores))
    run.close()
