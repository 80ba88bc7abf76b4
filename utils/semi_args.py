"""Flags of the scripts that learn from few masks and many images."""

from dataclasses import dataclass
from typing import Annotated, Literal

from utils.args import TrainArgs


@dataclass
class SemiArgs(TrainArgs):
    train_csv: Annotated[str, "labelled list (CSV: img,filename)"]
    unlabelled_csv: Annotated[str, "unlabelled list (CSV: img); an epoch is a pass over it"] = ""
    augment: Annotated[Literal["none", "flip", "crop", "strong"], "augmentation of labelled and unlabelled images"] = (
        "crop"
    )
    batch_size: Annotated[int, "labelled, and as many unlabelled, images a step and process", "-b"] = 8
    epochs: Annotated[int, "passes over the unlabelled list (without one: over the labelled list)", "-e"] = 1
    unsup_weight: Annotated[float, "weight of the loss of pseudo-labels"] = 1.0


@dataclass
class ContrastArgs(SemiArgs):
    contrast_weight: Annotated[float, "weight of the contrastive loss"] = 0.1
    anchors: Annotated[int, "pixels of a class that are contrasted a step"] = 50
    negatives: Annotated[int, "negatives of each"] = 256
    temperature: Annotated[float, "of the similarities"] = 0.5
    anchor_threshold: Annotated[float, "the teacher's probability of the class above which a pixel is an anchor"] = 0.3
    rank_low: Annotated[int, "first rank (from 0) at which a class is ruled out; 0: 3, or 1 below five classes"] = 0
    rank_high: Annotated[int, "rank from which on it is no longer one"] = 20
    max_keys: Annotated[int, "new negatives a class, step and process"] = 512
    bank: Annotated[int, "negatives that are kept for a class"] = 30_000
    bank_first: Annotated[int, "the same for class 0; 0: as the others"] = 50_000
    features: Annotated[int, "numbers a pixel that are contrasted"] = 256


@dataclass
class WeakArgs(TrainArgs):
    train_csv: Annotated[str, "strong list, images with masks (CSV: img,filename)"]
    weak_csv: Annotated[str, "weak list, images and their classes (CSV: img,label); an epoch is a pass over it"] = ""
    arch: Annotated[str, "of both networks: any but PointRend; see utils/models"] = "DeepLabV3Plus"
    augment: Annotated[Literal["none", "flip", "crop", "strong"], "augmentation of strong and weak images"] = "crop"
    batch_size: Annotated[int, "strong, and as many weak, images a step and process", "-b"] = 8
    epochs: Annotated[int, "passes over the weak list", "-e"] = 1
    class_aware: Annotated[bool, "soft-max over the classes that an image holds; without: over all"] = True
    cls_weight: Annotated[float, "weight of the image-level classification loss"] = 1.0
    pct_weight: Annotated[float, "weight of PseudoNet's labels for HybridNet; 0: HybridNet alone"] = 1.0
    pct_power: Annotated[float, "exponent of an image's smallest class IoU; 0: all weak images count fully"] = 8.0
    iou_momentum: Annotated[float, "how much a batch counts in the class IoUs beside the one after it"] = 0.99
    compat: Annotated[Literal["none", "released"], "released: the arithmetic of the released code, with faults"] = (
        "none"
    )
