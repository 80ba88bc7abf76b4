"""How many images of a list get the right label."""

import torch

from utils.checkpoint import bare
from utils.evaluate import named


@torch.inference_mode()
def accuracy(run, net, loader) -> dict[str, float]:
    """`accuracy` and `top5`, shares of images whose label is first, or among the first five; each counts once."""
    run.share_buffers(net)
    net, sums = bare(net).eval(), torch.zeros(3, dtype=torch.float64, device=run.device)
    for batch in run.batches(loader):
        with run.autocast():
            logits = net(batch["image"])
        ranks = logits.float().topk(min(5, logits.shape[1]), 1).indices == batch["truth"][:, None]
        sums += torch.stack([ranks[:, 0].sum(), ranks.sum(), torch.ones_like(batch["truth"]).sum()])
    right, among, images = run.sum(sums).tolist()
    assert images == len(loader.dataset), f"{images} images evaluated of {len(loader.dataset)}"
    return {"accuracy": right / images, "top5": among / images}


def finish(run, checkpoint, nets: dict, loader) -> None:
    """The last line of a run: the networks {name: network} on the test images, and the best of all passes.

    There are no other images to choose by, so that the best is a flattered number: report the others. With --eval they
    are printed, for whatever the run has saved.
    """
    checkpoint.wait()
    scores = {}
    for name, net in nets.items():
        scores |= named(name, accuracy(run, net, loader))
    every = [row["valid_accuracy"] for row in run.read_log() if "valid_accuracy" in row]
    scores |= {"test_best_accuracy": max(every)} if every else {}
    if not run.args.eval:
        run.log(split="test", **scores)
    elif run.main:
        print("  ".join(f"{name} {value:.4f}" for name, value in scores.items()))
    run.close()
