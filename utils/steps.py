"""What a training loop does at every step: take a batch, make an update, and in between save or stop."""

import math
import os
import random
import sys
import time
import warnings
from collections import deque

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import clip_grad_value_
from tqdm import tqdm

from utils.errors import RankError
from utils.interrupt import Paused, stop

GO_ON, SAVE, SAVE_AND_STOP = range(3)
# the schedule moves on with every batch, also with those that make no update
warnings.filterwarnings("ignore", "Detected call of .lr_scheduler.step", UserWarning)


class Steps:
    """The part of a `Run` that a training loop touches at every step."""

    def __init__(self, args, device: torch.device):
        self.args, self.device = args, device
        self.world, self.rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        self.main = self.rank == 0
        # questions between processes that no device has to wait for
        self.talk = dist.new_group(backend="gloo") if self.world > 1 else None
        self.question = None
        self.checkpoint, self.saved = None, time.time()
        self.carried, self.resumed = {}, {}  # what lives for an epoch, and what it held when the run was saved in one
        self.resume_at = self.position = None  # (epoch, steps done): where to go on; what there is to save
        self.started = time.time()
        self.scalers, self.due, self.doubtful = {}, set(), deque()
        self.recent = None  # the loss as the bar shows it, a moving average
        self.share, self.last, self.spoilt, self.images = 1.0, True, False, []
        self.buffers = {}

    def seed_everything(self, seed: int) -> None:
        random.seed(seed), np.random.seed(seed % 2**32), torch.manual_seed(seed)

    def autocast(self):
        kind = torch.float16 if self.args.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, kind, enabled=self.args.precision != "fp32")

    def batches(self, loader, epoch: int = 0, nets=()):
        """One pass, on this device; a training step is a pure function of (seed, epoch, step, process).

        Between two steps the run is saved when it is time to, and saved and ended when it was asked to stop.
        """
        sampler, first = loader.batch_sampler, 0
        train, rounds = sampler.seed is not None, sampler.fewest()
        if train:
            first = sampler.skip = self.resume_at[1] if self.resume_at and self.resume_at[0] == epoch else 0
            sampler.epoch = loader.dataset.epoch = epoch
            self.images = (epoch, first, loader.dataset, [])
            self.resume_at, stop.saves = None, True
        for net in nets:
            net.train()
        text = f"epoch {epoch + 1}/{self.args.epochs}" if train else "evaluate"
        quiet = not self.main or not sys.stderr.isatty()
        done, count = sampler.images(0, first), sampler.images(0, len(sampler))
        bar = tqdm(desc=text, total=count, unit="img", leave=False, disable=quiet, initial=done)
        for step, batch in enumerate(loader, first):
            if train:
                self.position = (epoch, step) if step else None
            # gradients are not saved, so that there is no stop between batches that make one update
            if step < rounds and not (train and step % self.args.accumulate):
                self._save_or_stop()
            index = batch.pop("index")
            batch = {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}
            if train:
                self._prepare(loader, epoch, step, index, nets)
            # rows of pixels become a channels-last batch without a copy
            yield batch | {"image": batch["image"].permute(0, 3, 1, 2)}
            if train and self.recent is not None:
                bar.set_postfix_str(f"loss {self.recent:.3f}", refresh=False)
            bar.update(len(index))
        bar.close()
        if train:
            self._settle()
            self.position = (epoch, len(sampler))
            self._save_or_stop()

    def step(self, net, optimizer, schedule, loss: Tensor, clip: float | None = None, when=True) -> None:
        """Learn from the loss (mean over a batch): an update after every --accumulate batches, clipped before it.

        Where `when` is False, or the loss is left out by --skip-nonfinite, only the schedule moves on.
        """
        learn = when and self._usable(loss, net)
        scaler = self.scaler(optimizer)
        if learn:
            scaler.scale(loss if self.share == 1 else loss * self.share).backward()
            self.due.add(optimizer)
        if self.last and optimizer in self.due:
            if self.world > 1 and self.args.accumulate > 1 and not learn:
                self._average_gradients(net.parameters())  # it is the last backward pass that would have done it
            self._update(net, optimizer, scaler, self.clip if clip is None else clip)
        schedule.step()

    @property
    def clip(self) -> float:
        # the released single-network scripts clip after the step, which clips nothing
        return 0.0 if self.args.compat == "nlkd" else self.args.clip_value

    def scaler(self, optimizer):
        """The loss scale of an optimizer: keeps small float16 gradients from vanishing; 1 in other precisions."""
        if optimizer not in self.scalers:
            on = self.args.precision == "fp16"
            self.scalers[optimizer] = torch.amp.GradScaler(self.device.type, enabled=on)
        return self.scalers[optimizer]

    def carry(self, name: str, item):
        """Have `item`, which lives for an epoch, saved whenever the run is saved inside one; returns it.

        It has `state_dict` and `load_state_dict`, and gets back what it held where the run goes on inside an epoch.
        """
        if name in self.resumed:
            item.load_state_dict(self.resumed.pop(name))
        self.carried[name] = item
        return item

    def inside(self) -> dict:
        """Where the run stands inside an epoch, for its checkpoint: all processes call it together."""
        self._settle()
        every = self.gather({name: item.state_dict() for name, item in self.carried.items()})
        epoch, step = self.position
        return {"epoch": epoch, "step": step, "seconds": time.time() - self.started, "processes": every}

    def go_on_inside(self, inside: dict) -> None:
        """Take up what `inside` gave."""
        self.resume_at, self.resumed = (inside["epoch"], inside["step"]), inside["processes"][self.rank]
        self.started = time.time() - inside["seconds"]

    def gather(self, item) -> list:
        """What every process has of an object, in the order of the processes."""
        every = [item]
        if self.world > 1:
            every = [None] * self.world
            dist.all_gather_object(every, item, group=self.talk)
        return every

    def seconds(self) -> float:
        """Wall time since the last call, that is of an epoch, without any time in which the run stood still."""
        before, self.started = self.started, time.time()
        return round(self.started - before, 3)

    def _prepare(self, loader, epoch, step, index, nets):
        a, sampler = self.args, loader.batch_sampler
        self.seed_everything(int(np.random.SeedSequence([a.seed, epoch, step, self.rank]).generate_state(1)[0]))
        group = step - step % a.accumulate
        self.share = len(index) / sampler.images(group, a.accumulate)
        self.last = step + 1 == min(group + a.accumulate, len(sampler))
        self.spoilt, self.images = False, (epoch, step, loader.dataset, index)
        for net in nets:
            if self.world > 1:
                net.require_backward_grad_sync = self.last
            if a.skip_nonfinite:
                self.buffers[net] = [b.clone() for b in net.buffers()]

    def _update(self, net, optimizer, scaler, clip):
        self.due.discard(optimizer)
        own = [p for group in optimizer.param_groups[1:] for p in group["params"]]
        if self.world > 1 and own:
            self._average_gradients(own)  # DistributedDataParallel knows the network only
        if scaler.is_enabled():
            scaler.unscale_(optimizer)
        # a scaler leaves updates that are not finite out by itself
        if self.args.skip_nonfinite and not scaler.is_enabled() and not _finite_gradients([*net.parameters(), *own]):
            self._leave_out(net, True)
        else:
            if clip > 0:
                clip_grad_value_(net.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad(set_to_none=True)

    def _average_gradients(self, parameters):
        for p in parameters:
            if p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= self.world

    def _usable(self, loss, net) -> bool:
        loss = loss.detach()
        if self.args.skip_nonfinite:
            finite = loss.isfinite()
            everywhere = finite.float()
            if self.world > 1:
                dist.all_reduce(everywhere, dist.ReduceOp.MIN)
            if not everywhere:
                self._leave_out(net, not finite)
            return bool(everywhere)
        event = None
        if self.device.type == "cuda":
            # the answer is fetched without waiting for it, and read when it is there
            loss, event = loss.to("cpu", non_blocking=True), torch.cuda.Event()
            event.record()
        self.doubtful.append((loss, event, self.images))
        self._settle(wait=False)
        return True

    def _settle(self, wait=True):
        """Read the losses so far, all of them or those that have arrived: each must be finite."""
        while self.doubtful:
            loss, event, images = self.doubtful[0]
            if event is not None and wait:
                event.synchronize()
            elif event is not None and not event.query():
                return
            self.doubtful.popleft()
            if not math.isfinite(loss):
                self._stop_at(images)
            self.recent = float(loss) if self.recent is None else 0.9 * self.recent + 0.1 * float(loss)

    def _stop_at(self, images):
        epoch, step, dataset, index = images
        names = ", ".join(dataset.frame["img"].iloc[index[:10].tolist()])
        more = f" and {len(index) - 10} more" if len(index) > 10 else ""
        remedy = "look at them, lower --learning-rate, set --clip-value, use --precision fp32, or --skip-nonfinite"
        what = f"the loss of step {step + 1} in epoch {epoch + 1} is not finite"
        raise RankError(f"{self.dir}: {what}; its images: {names}{more}. Remedy: {remedy}")

    def _leave_out(self, net, guilty):
        self.spoilt = True
        # the forward pass has moved the BatchNorm statistics; a batch that is left out leaves no trace
        for buffer, before in zip(net.buffers(), self.buffers[net], strict=True):
            buffer.copy_(before)
        _, _, dataset, index = self.images
        self.carried["averages"].leave_out(dataset.frame["img"].iloc[index.tolist()].tolist() if guilty else [])

    def _save_or_stop(self):
        if self.checkpoint:
            self.checkpoint.look()
        wish = self._wish()
        if wish and self.position:
            self.checkpoint.save_inside()
        if wish == SAVE_AND_STOP:
            if self.checkpoint:
                self.checkpoint.wait()
            self.close()
            raise Paused

    def _wish(self) -> int:
        """What is to be done now, the same in every process."""
        minutes = self.args.save_minutes
        late = self.main and 0 < minutes < (time.time() - self.saved) / 60
        wish = SAVE_AND_STOP if stop.asked else SAVE if late else GO_ON
        if self.world == 1:
            return wish
        # asked now, heard at the next step, so that nobody waits
        asked, wishes = self.question, torch.tensor(wish)
        self.question = dist.all_reduce(wishes, dist.ReduceOp.MAX, group=self.talk, async_op=True), wishes
        if asked is None:
            return GO_ON
        asked[0].wait()
        return int(asked[1])

    def close(self) -> None:
        """Wait for the other processes and part from them; the last thing a run does."""
        if self.world > 1:
            dist.barrier(group=self.talk)
            dist.destroy_process_group()


def _finite_gradients(parameters) -> bool:
    norms = torch._foreach_norm([p.grad for p in parameters if p.grad is not None])
    return bool(torch.stack(norms).isfinite().all())
