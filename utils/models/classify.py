"""Networks that give an image one label: WRN-28-10, ResNet-29 and ResNet-50 as IEG has them, and a small one.

Images go in as they are read, uint8 or mixtures of such, (N, 3, H, W); logits (N, classes) come out.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn


class Classifier(nn.Module):
    """A network behind one door: pixels from 0 to 255 become -1 to 1."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image.float() / 127.5 - 1)


class SameConv(nn.Conv2d):
    """A convolution without bias, padded as TensorFlow does: 3 x 3 with stride 2 on an even size below and right."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1):
        super().__init__(inputs, outputs, kernel, stride, 0 if stride > 1 else kernel // 2, bias=False)

    def forward(self, x):
        if self.stride[0] > 1 and self.kernel_size[0] > 1:
            pads = [self.kernel_size[0] - (n % self.stride[0] or self.stride[0]) for n in reversed(x.shape[2:])]
            x = F.pad(x, [side for pad in pads for side in (pad // 2, pad - pad // 2)])
        return super().forward(x)


def _fit(x, channels: int, stride: int):
    """What a shortcut without parameters makes of x: means of cells, and channels of zeros on both sides."""
    if stride > 1:
        x = F.avg_pool2d(x, stride)
    more = channels - x.shape[1]
    return F.pad(x, (0, 0, 0, 0, more // 2, more - more // 2)) if more else x


class WideUnit(nn.Module):
    def __init__(self, inputs, outputs, stride, first):
        super().__init__()
        self.first, self.outputs, self.stride = first, outputs, stride
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), SameConv(inputs, outputs, 3, stride)
        self.norm2, self.conv2 = nn.BatchNorm2d(outputs), SameConv(outputs, outputs, 3)

    def forward(self, x):
        active = F.relu(self.norm1(x))
        found = self.conv2(F.relu(self.norm2(self.conv1(active))))
        return found + _fit(active if self.first else x, self.outputs, self.stride)


class WideResNet(nn.Module):
    """WRN-28-10 of the AutoAugment release: shortcuts without parameters, also around groups and from the stem."""

    def __init__(self, classes: int, width: int = 10, units: int = 4):
        super().__init__()
        self.stem, self.groups, inputs = SameConv(3, 16, 3), nn.ModuleList(), 16
        self.sizes = [(16 * width, 1), (32 * width, 2), (64 * width, 2)]
        for k, (outputs, stride) in enumerate(self.sizes):
            first = [WideUnit(inputs, outputs, stride, first=k == 0)]
            self.groups.append(nn.Sequential(*first, *[WideUnit(outputs, outputs, 1, False) for _ in range(units - 1)]))
            inputs = outputs
        self.norm, self.head = nn.BatchNorm2d(inputs), nn.Linear(inputs, classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=math.sqrt(2 / (layer.kernel_size[0] ** 2 * layer.out_channels)))
        _plain_head(self.head, 1 / math.sqrt(classes))

    def forward(self, x):
        x = stem = self.stem(x)
        for group, (outputs, stride) in zip(self.groups, self.sizes, strict=True):
            x = group(x) + _fit(x, outputs, stride)
        x = x + _fit(stem, x.shape[1], 4)
        return self.head(F.relu(self.norm(x)).mean((2, 3)))


class Bottleneck(nn.Module):
    """Keras' pre-activation bottleneck; in the released code the first activation is missing (`relu` False)."""

    def __init__(self, inputs, width, outputs, stride, project, norm, relu):
        super().__init__()
        self.relu, self.norm1 = relu, nn.BatchNorm2d(inputs) if norm else nn.Identity()
        self.conv1, self.norm2 = SameConv(inputs, width, 1, stride), nn.BatchNorm2d(width)
        self.conv2, self.norm3 = SameConv(width, width, 3), nn.BatchNorm2d(width)
        self.conv3 = SameConv(width, outputs, 1)
        self.project = SameConv(inputs, outputs, 1, stride) if project else nn.Identity()

    def forward(self, x):
        y = self.norm1(x)
        y = self.conv1(F.relu(y) if self.relu else y)
        y = self.conv3(F.relu(self.norm3(self.conv2(F.relu(self.norm2(y))))))
        return y + self.project(x)


class ResNet29(nn.Module):
    """Keras' ResNet-29 v2 for CIFAR; `preact_relu` True puts the activation in that the released code lacks."""

    def __init__(self, classes: int, preact_relu: bool = False):
        super().__init__()
        self.stem, self.norm, blocks, inputs = SameConv(3, 16, 3), nn.BatchNorm2d(16), [], 16
        for stage, (width, outputs) in enumerate([(16, 64), (64, 128), (128, 256)]):
            for k in range(3):
                stride, start = 2 if stage and not k else 1, not stage and not k
                relu = preact_relu and not start
                blocks.append(Bottleneck(inputs, width, outputs, stride, not k, not start, relu))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.last, self.head = nn.BatchNorm2d(inputs), nn.Linear(inputs, classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.xavier_normal_(layer.weight)
        nn.init.xavier_normal_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x):
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        return self.head(F.relu(self.last(x)).mean((2, 3)))


class PreBlock(nn.Module):
    def __init__(self, inputs, width, stride, project):
        super().__init__()
        outputs = 4 * width
        self.norm1, self.conv1 = _norm(inputs), nn.Conv2d(inputs, width, 1, bias=False)
        self.norm2, self.conv2 = _norm(width), nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.norm3, self.conv3 = _norm(width), nn.Conv2d(width, outputs, 1, bias=False)
        self.project = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if project else None

    def forward(self, x):
        y = F.relu(self.norm1(x))
        x = x if self.project is None else self.project(y)
        return x + self.conv3(F.relu(self.norm3(self.conv2(F.relu(self.norm2(self.conv1(y)))))))


class ResNet50(nn.Module):
    """The pre-activation ResNet-50 (v2) of TensorFlow's official models, for images of about 224 pixels."""

    def __init__(self, classes: int):
        super().__init__()
        self.stem, blocks, inputs = nn.Conv2d(3, 64, 7, 2, 3, bias=False), [], 64
        for stage, (width, count) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)]):
            for k in range(count):
                blocks.append(PreBlock(inputs, width, 2 if stage and not k else 1, not k))
                inputs = 4 * width
        self.blocks = nn.Sequential(*blocks)
        self.last, self.head = _norm(inputs), nn.Linear(inputs, classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)

    def forward(self, x):
        x = F.max_pool2d(F.pad(self.stem(x), (0, 1, 0, 1), value=-math.inf), 3, 2)
        return self.head(F.relu(self.last(self.blocks(x))).mean((2, 3)))


class Small(nn.Sequential):
    """Four convolutions for CPUs; this project's own."""

    def __init__(self, classes: int, width: int = 16):
        layers, inputs = [], 3
        for k, stride in enumerate((1, 2, 2, 2)):
            outputs = width * 2 ** min(k, 2)
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            inputs = outputs
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def _norm(channels):
    return nn.BatchNorm2d(channels, momentum=0.003)


def _plain_head(head, bound):
    nn.init.uniform_(head.weight, -bound, bound)
    nn.init.zeros_(head.bias)


def build_classifier(name: str, classes: int, preact_relu: bool = False) -> Classifier:
    """The network of --network-name: "wrn28-10", "resnet29", "resnet50" or "small"."""
    kinds = {"wrn28-10": WideResNet, "resnet50": ResNet50, "small": Small}
    return Classifier(ResNet29(classes, preact_relu) if name == "resnet29" else kinds[name](classes))


def decay_groups(net: nn.Module, name: str, decay: float) -> list[dict]:
    """Parameters for an optimizer: of "resnet29" the kernels alone decay, of the others everything, as released."""
    if name != "resnet29":
        return [{"params": list(net.parameters()), "weight_decay": decay}]
    kernels, others = ([p for p in net.parameters() if (p.dim() > 1) == wanted] for wanted in (True, False))
    return [{"params": kernels, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
