"""COCO-Stuff 164k: 171 classes of things and stuff on COCO 2017 (Caesar et al., CVPR 2018)."""

from pathlib import Path

from utils.images import IGNORE
from utils.readers.common import (
    SetArgs,
    by_name,
    claim,
    compare_counts,
    convert,
    finish,
    folder_of,
    pair,
    remapping,
    rows_of,
    table_of,
)

# of pixel values 0 to 181; the values between, HOLES, are things that nobody annotated
THINGS = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag,
tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard,
tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot,
hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote,
keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear,
hair drier, toothbrush
"""
STUFF = """
banner, blanket, branch, bridge, building-other, bush, cabinet, cage, cardboard, carpet, ceiling-other, ceiling-tile,
cloth, clothes, clouds, counter, cupboard, curtain, desk-stuff, dirt, door-stuff, fence, floor-marble, floor-other,
floor-stone, floor-tile, floor-wood, flower, fog, food-other, fruit, furniture-other, grass, gravel, ground-other, hill,
house, leaves, light, mat, metal, mirror-stuff, moss, mountain, mud, napkin, net, paper, pavement, pillow, plant-other,
plastic, platform, playingfield, railing, railroad, river, road, rock, roof, rug, salad, sand, sea, shelf, sky-other,
skyscraper, snow, solid-other, stairs, stone, straw, structural-other, table, tent, textile-other, towel, tree,
vegetable, wall-brick, wall-concrete, wall-other, wall-panel, wall-stone, wall-tile, wall-wood, water-other, waterdrops,
window-blind, window-other, wood
"""
NAMES = [name.strip() for name in f"{THINGS.strip()}, {STUFF.strip()}".replace(",\n", ", ").split(",")]
HOLES = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
VALUES = 182
PUBLISHED = {"train": 118287, "valid": 5000}
REMEDY = "unpack train2017.zip and val2017.zip into its folder images, stuffthingmaps_trainval2017.zip into annotations"


def classes() -> dict[int, int]:
    """The class of every pixel value of a stuffthingmap: 0 to 170 without gaps, 255 for holes and unlabelled pixels."""
    values = [value for value in range(VALUES) if value not in HOLES]
    return {value: IGNORE for value in (*HOLES, 255)} | {value: index for index, value in enumerate(values)}


def prepare(args: SetArgs) -> None:
    """COCO-Stuff (164k stuffthingmaps): lists train and valid; 171 classes without gaps, unlabelled becomes 255."""
    root = Path(args.root)
    images = folder_of(root, ("images/train2017", "train2017"), REMEDY).parent
    names = ("annotations", "stuffthingmaps", "stuffthingmaps_trainval2017", "annotations/stuffthingmaps")
    masks = folder_of(root, [f"{name}/train2017" for name in names], REMEDY).parent
    claim(args.out, {"dataset": "cocostuff", "root": str(root.absolute())})
    table, jobs, lists = table_of(classes()), [], {}
    for name, split in (("train", "train2017"), ("valid", "val2017")):
        pictures = by_name(images / split, "*.jpg", ".jpg", REMEDY)
        maps = by_name(masks / split, "*.png", ".png", REMEDY)
        pairs = []
        for stem, (image, mask) in pair(pictures, maps, REMEDY).items():
            target = Path(args.out, "mask", split, f"{stem}.png")
            jobs.append(remapping(mask, target, table))
            pairs.append((image, target))
        lists[name] = rows_of(pairs, args.data_root)
    compare_counts(root, {name: len(frame) for name, frame in lists.items()}, PUBLISHED)
    converted = convert(jobs, args.workers)
    finish(args.out, lists, NAMES, len(NAMES), converted)
