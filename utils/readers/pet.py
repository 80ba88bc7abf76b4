"""Oxford-IIIT Pet: trimaps of 37 breeds of cats and dogs (Parkhi et al., CVPR 2012)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from utils.errors import InputError
from utils.images import IGNORE
from utils.readers.common import (
    Job,
    SetArgs,
    claim,
    compare_counts,
    convert,
    fetch,
    finish,
    folder_of,
    read_ids,
    remapping,
    rows_of,
    table_of,
)

PUBLISHED = {"trainval": 3680, "test": 3669}
BREEDS = 37
PET, BACKGROUND, BORDER = 1, 2, 3  # of a trimap
REMEDY = "unpack images.tar.gz and annotations.tar.gz into it, or let --download get them"


@dataclass
class PetArgs(SetArgs):
    border: Annotated[Literal["pet", "ignore"], "the band around a pet: pet, or ignored (255)"] = "pet"
    target: Annotated[Literal["pet", "breed"], "classes of a mask: pet or not; or 0 and the 37 breeds"] = "pet"
    download: Annotated[bool, "download the dataset into ROOT by torchvision if it is not there"] = False


def prepare(args: PetArgs) -> None:
    """Oxford-IIIT Pet: lists trainval and test, as published, with the breed (1 to 37) as label."""
    base, names = _base(args), {}
    binary = args.target == "pet" and args.border == "pet"
    settings = {"dataset": "pet", "root": str(base.absolute()), "border": args.border, "target": args.target}
    claim(args.out, settings)
    jobs, lists = [], {}
    for split in PUBLISHED:
        pairs, breeds = [], []
        for name, breed in _listed(base / "annotations" / f"{split}.txt"):
            target = Path(args.out, "mask", f"{name}.png")
            jobs.append(_job(base / "annotations" / "trimaps" / f"{name}.png", target, args, breed))
            pairs.append((base / "images" / f"{name}.jpg", target))
            breeds.append(breed)
            names[breed] = name.rpartition("_")[0].replace("_", " ")
        lists[split] = rows_of(pairs, args.data_root).assign(label=breeds)
    compare_counts(base, {split: len(frame) for split, frame in lists.items()}, PUBLISHED)
    converted = convert(jobs, args.workers)
    kinds = ["background", *(names.get(breed, "") for breed in range(1, BREEDS + 1))]
    names = kinds if args.target == "breed" else [] if binary else ["background", "pet"]
    finish(args.out, lists, names, max(1, len(names)), converted)


def trimap_table(args: PetArgs, breed: int) -> np.ndarray:
    """What the values of a trimap become: 0, 1 or the breed, 255; binary masks hold 0 and 255 for the pet."""
    if args.target == "pet" and args.border == "pet":
        return table_of({BACKGROUND: 0, PET: 255, BORDER: 255})
    pet = breed if args.target == "breed" else 1
    return table_of({BACKGROUND: 0, PET: pet, BORDER: pet if args.border == "pet" else IGNORE})


def _base(args: PetArgs) -> Path:
    names = ("annotations", "oxford-iiit-pet/annotations")
    if args.download and not any(Path(args.root, name).is_dir() for name in names):
        from torchvision.datasets import OxfordIIITPet

        address = "images.tar.gz and annotations.tar.gz of https://www.robots.ox.ac.uk/~vgg/data/pets"
        fetch(args.root, lambda: OxfordIIITPet(args.root, download=True), address)
    return folder_of(args.root, names, REMEDY).parent


def _job(trimap: Path, target: Path, args: PetArgs, breed: int) -> Job:
    return remapping(trimap, target, trimap_table(args, breed))


def _listed(path: Path) -> list[tuple[str, int]]:
    """(image, breed) of a list whose lines are `name breed species number`; comments begin with #."""
    rows = []
    for line in read_ids(path, REMEDY):
        words = line.split()
        if line.startswith("#"):
            continue
        if len(words) != 4 or not words[1].isdigit() or not 1 <= int(words[1]) <= BREEDS:
            raise InputError(f"{path}: `{line[:80]}` is not `name breed species number`; get the annotations again")
        rows.append((words[0], int(words[1])))
    return rows
