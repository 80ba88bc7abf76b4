"""The memory of CIRKD: queues of a teacher's pixel and region features, class by class, and what a student learns.

Source: Yang et al., "Cross-image relational knowledge distillation for semantic segmentation", CVPR 2022, equations (6)
to (10). `benchmarks/lad.md` numbers what is corrected here.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.methods.relations import similarity_kl


class ClassQueue(nn.Module):
    """The last `size` keys of every class, (classes, size + 1, channels) float32, unit vectors; the last slot is spare.

    `filled` (classes,) says how many slots hold a key, `position` (classes,) where the next one goes.
    """

    def __init__(self, classes: int, size: int, channels: int):
        super().__init__()
        self.size = size
        self.register_buffer("keys", torch.zeros(classes, size + 1, channels))
        self.register_buffer("filled", torch.zeros(classes, dtype=torch.int64))
        self.register_buffer("position", torch.zeros(classes, dtype=torch.int64))

    @torch.no_grad()
    def push(self, keys: Tensor, valid: Tensor) -> None:
        """Add keys (M, classes, channels) where `valid` (M, classes), the oldest go first; nothing waits for the host.

        Of more than `size` keys of a class the last ones stay.
        """
        valid = (valid & keys.isfinite().all(2)).T  # (classes, M)
        order, count = valid.cumsum(1) - 1, valid.sum(1)
        stays = valid & (order >= (count - self.size)[:, None])
        slot = torch.where(stays, (self.position[:, None] + order) % self.size, self.size)
        first = torch.arange(len(slot), device=slot.device)[:, None] * (self.size + 1)
        self.keys.flatten(0, 1).index_copy_(0, (first + slot).flatten(), keys.transpose(0, 1).flatten(0, 1).float())
        self.keys[:, self.size] = 0  # where keys that do not count have gone, in no certain order
        self.position.copy_((self.position + count) % self.size)
        self.filled.copy_((self.filled + count).clamp(max=self.size))

    @torch.no_grad()
    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """`count` keys of every class without repetition, (classes, count, channels), and which of them are filled."""
        count = min(count, self.size)
        chance = torch.rand(len(self.keys), self.size, device=self.keys.device)
        slots = torch.arange(self.size, device=self.keys.device)
        chance, slot = chance.masked_fill(slots >= self.filled[:, None], -1).topk(count, 1)
        keys = self.keys.gather(1, slot[..., None].expand(-1, -1, self.keys.shape[2]))
        return keys, chance >= 0


def pixel_keys(features: Tensor, labels: Tensor, classes: int, count: int, chance: Tensor, released=False):
    """Up to `count` pixels of every image and class, with the highest `chance` first.

    Features (N, C, h, w), `labels` (N, h, w) uint8, `chance` (N, h w) or (N, classes, h w) above 0, drawn at random.
    Returns keys (N, classes, count, C) and whether there is one, (N, classes, count). `released`: of a class with n
    pixels it takes the first n pixels of the image, whatever their class, as the released code does.
    """
    member = labels.flatten(1)[:, None] == torch.arange(classes, device=labels.device)[:, None]  # (N, K, hw)
    if released:
        member = torch.arange(member.shape[2], device=labels.device) < member.sum(2, keepdim=True)
    chance = chance[:, None] if chance.dim() == 2 else chance
    chance, at = torch.where(member, chance, -1.0).topk(min(count, member.shape[2]), 2)
    flat = features.flatten(2).transpose(1, 2)[:, None].expand(-1, classes, -1, -1)
    return flat.gather(2, at[..., None].expand(-1, -1, -1, flat.shape[3])), chance >= 0


def region_keys(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """The mean feature of every image and class as a unit vector, (N, classes, C), and if there is one, (N, classes).

    Features (N, C, h, w), `labels` (N, h, w) uint8; those of `classes` and above are void.
    """
    member = F.one_hot(labels.flatten(1).long().clamp(max=classes), classes + 1)[..., :classes].to(features.dtype)
    sums = (features.flatten(2) @ member).transpose(1, 2)
    return F.normalize(sums, dim=2), member.sum(1) > 0


def memory_kl(student: Tensor, teacher: Tensor, keys: Tensor, filled: Tensor, labels_valid: Tensor, temperature: float):
    """KL(teacher || student) of the softmax of an anchor's cosines with the keys of all classes, mean over anchors.

    Unit features (N, C, h, w), both in the teacher's channels; keys (K, M, C), `filled` (K, M) bool; anchors are the
    pixels where `labels_valid` (N, h, w). 0, with a gradient, where there are none or no keys.
    """
    flat, at = keys.flatten(0, 1)[None], filled.flatten()[None]
    s, t = (maps.flatten(2).transpose(1, 2) for maps in (student, teacher))
    weight = labels_valid.flatten(1).float()
    weight = weight / weight.sum().clamp(min=1) * at.any()
    return similarity_kl(s, flat, t, flat, weight, temperature, at)


class Memory(nn.Module):
    """CIRKD's two queues, and the projector that brings a student's features into the teacher's space.

    Each image adds up to `pixels` keys a class to the pixel queue of `slots` a class, and one to the region queue, a
    tenth as long; a step contrasts its pixels with about 4096 and 1024 keys.
    """

    def __init__(self, channels: int, teacher_channels: int, classes: int, slots: int, pixels: int = 16):
        super().__init__()
        self.classes, self.pixels = classes, pixels
        # only ever in training mode, so that running statistics would never be used
        norm = nn.BatchNorm2d(teacher_channels, track_running_stats=False)
        first = nn.Conv2d(channels, teacher_channels, 1, bias=False)
        second = nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False)
        self.project = nn.Sequential(first, norm, nn.ReLU(inplace=True), second)
        self.pixel = ClassQueue(classes, slots, teacher_channels)
        self.region = ClassQueue(classes, max(1, slots // 10), teacher_channels)

    def forward(self, student, teacher, labels: Tensor, gather: Callable, temperature=0.1, released=False) -> list:
        """(pixel-to-pixel, pixel-to-region) loss; the keys of this step, from all processes, are in the queues first.

        Features (N, C, h, w), `labels` (N, h, w) uint8; `gather` joins a tensor of every process along the first axis.
        """
        teacher = F.normalize(teacher.detach().float(), dim=1)
        student = F.normalize(self.project(student).float(), dim=1)
        chance = torch.rand(len(labels), labels[0].numel(), device=labels.device)
        keys, there = pixel_keys(teacher, labels, self.classes, self.pixels, chance, released)
        self.pixel.push(gather(keys).transpose(1, 2).flatten(0, 1), gather(there).transpose(1, 2).flatten(0, 1))
        keys, there = region_keys(teacher, labels, self.classes)
        self.region.push(gather(keys), gather(there))
        valid = labels < self.classes
        drawn = self.pixel.draw(4096 // self.classes + 1), self.region.draw(1024 // self.classes + 1)
        return [memory_kl(student, teacher, *some, valid, temperature) for some in drawn]
