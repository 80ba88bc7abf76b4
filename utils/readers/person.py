"""Supervisely Person (2018): a project export, JSON with bitmaps and polygons, as images and masks of one size."""

import base64
import binascii
import json
import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np

from utils.errors import InputError, warn
from utils.images import MAX_PIXELS, SUFFIXES, read_image, resize_image, resize_mask, write_mask, write_picture
from utils.lists import from_root
from utils.readers.common import Job, SetArgs, claim, compare_counts, convert, finish, rows_of

PUBLISHED = {"all": 5711}
FOLDERS = ("train", "train_mask")  # where `./run.sh paper` looks for images and masks, below data/Supervisely
REMEDY = "it must be a project export: folders with img and ann in them"


@dataclass
class PersonArgs(SetArgs):
    size: Annotated[int, "images and masks become size x size; 0: as they are. 321 is published"] = 321
    people: Annotated[list[str], "class titles that are foreground; all others, `neutral` too, are background"] = field(
        default_factory=lambda: ["person_bmp", "person_poly"]
    )


def prepare(args: PersonArgs) -> None:
    """Supervisely Person: writes OUT/train/ID.png, OUT/train_mask/ID.png (all persons merged) and all.csv."""
    if args.size < 0:
        raise InputError(f"--size {args.size}: must be 0 or more")
    found = _items(Path(args.root))
    settings = {"dataset": "person", "root": str(Path(args.root).absolute()), "size": args.size, "people": args.people}
    claim(args.out, settings, FOLDERS)
    _check_titles([ann for _, ann in found], args)
    jobs = []
    for number, (image, ann) in enumerate(found, 1):
        targets = tuple(Path(args.out, folder, f"{number}.png") for folder in FOLDERS)
        jobs.append(Job((image, ann), targets, lambda i=image, a=ann, t=targets: _write(i, a, t, args)))
    converted = convert(jobs, args.workers)
    frame = rows_of([job.targets for job in jobs], args.data_root)
    compare_counts(args.root, {"all": len(frame)}, PUBLISHED)
    frame = frame.assign(source=[from_root(image, args.root) for image, _ in found])
    finish(args.out, {"all": frame}, converted=converted)


def draw_mask(annotation: dict, people: list[str], path) -> np.ndarray:
    """The mask (H, W) uint8 of 0 and 1 of an annotation: the union of its objects whose class title is in `people`.

    Bitmaps stand at their origin (x, y), and what lies outside the image is cut off. Polygons and rectangles include
    their contour; the holes of a polygon, contour included, are cut out of that polygon only, and not of another
    object below. Points and lines have no area. InputError for an annotation without size or a damaged object.
    """
    try:
        mask = np.zeros((annotation["size"]["height"], annotation["size"]["width"]), np.uint8)
        for thing in annotation["objects"]:
            if thing["classTitle"] in people:
                mask |= _draw(thing, mask.shape)
    except (KeyError, TypeError, ValueError, AttributeError, binascii.Error, zlib.error, cv2.error) as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        raise InputError(f"{path}: a damaged annotation ({what}); get the file again") from None
    return mask


def _draw(thing: dict, shape: tuple[int, int]) -> np.ndarray:
    canvas = np.zeros(shape, np.uint8)
    if thing.get("bitmap"):
        _paste(canvas, _bitmap(thing["bitmap"]["data"]), thing["bitmap"]["origin"])
        return canvas
    kind = thing.get("geometryType") or thing.get("type")
    exterior = _points(thing["points"]["exterior"])
    if kind == "rectangle":
        (left, top), (right, bottom) = exterior.min(0), exterior.max(0)
        cv2.rectangle(canvas, (int(left), int(top)), (int(right), int(bottom)), 1, cv2.FILLED)
    elif kind in ("polygon", None) and len(exterior) > 2:
        cv2.fillPoly(canvas, [exterior], 1)
        cv2.fillPoly(canvas, [_points(hole) for hole in thing["points"].get("interior") or []], 0)
    return canvas


def _points(points: list) -> np.ndarray:
    return np.array(points, float).reshape(-1, 2).round().astype(np.int32)


def _bitmap(text: str) -> np.ndarray:
    """(H, W) bool: a PNG, deflated once more and in base64; it marks by its alpha channel, or by values above 0."""
    packed = zlib.decompressobj()
    raw = packed.decompress(base64.b64decode(text), MAX_PIXELS)
    picture = cv2.imdecode(np.frombuffer(raw, np.uint8), cv2.IMREAD_UNCHANGED) if raw else None
    if picture is None or not packed.eof:
        raise ValueError("a bitmap that cannot be decoded")
    return (picture if picture.ndim == 2 else picture[..., 3] if picture.shape[2] == 4 else picture.max(2)) > 0


def _paste(canvas: np.ndarray, bitmap: np.ndarray, origin: list[int]) -> None:
    left, top = map(int, origin)
    rows = slice(max(top, 0), max(top + bitmap.shape[0], 0))
    columns = slice(max(left, 0), max(left + bitmap.shape[1], 0))
    inside = canvas[rows, columns]
    cut = bitmap[max(-top, 0) :, max(-left, 0) :]
    inside[:] = cut[: inside.shape[0], : inside.shape[1]]


def _items(root: Path) -> list[tuple[Path, Path]]:
    """(image, annotation) of all datasets of the project, ds2 before ds10, the images of one by name."""
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; {REMEDY}")
    found = []
    for folder in sorted((path.parent for path in [*root.glob("ann"), *root.rglob("*/ann")]), key=_natural):
        images = [path for path in (folder / "img").glob("[!.]*") if path.suffix.lower() in SUFFIXES]
        for image in sorted(images):
            # exports of 2018 name an annotation by the stem, later ones by the whole name
            names = (f"{image.name}.json", f"{image.stem}.json")
            ann = next((folder / "ann" / name for name in names if (folder / "ann" / name).is_file()), None)
            if ann is None:
                raise InputError(f"{image}: no {names[0]} or {names[1]} in {folder / 'ann'}; export the project again")
            found.append((image, ann))
    if not found:
        raise InputError(f"{root}: no images; {REMEDY}")
    return found


def _natural(path: Path) -> list:
    return [[int(word) if word.isdigit() else word for word in re.split(r"(\d+)", part)] for part in path.parts]


def _check_titles(annotations: list[Path], args: PersonArgs) -> None:
    """InputError if no object has a title of --people, and a warning for persons that have no area."""
    titles, lines = set(), 0
    for path in annotations:
        for thing in _read(path).get("objects", []):
            titles.add(thing.get("classTitle"))
            kind = thing.get("geometryType") or thing.get("type")
            lines += thing.get("classTitle") in args.people and kind not in ("bitmap", "polygon", "rectangle", None)
    if not titles & set(args.people):
        raise InputError(
            f"{args.root}: no object is called {' or '.join(args.people)}, but {', '.join(sorted(map(str, titles)))}; "
            "name those that are foreground with --people"
        )
    if lines:
        warn(f"{args.root}: {lines} persons are points or lines, which have no area, and are left out")


def _read(path: Path) -> dict:
    try:
        annotation = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        annotation = None
    if not isinstance(annotation, dict):
        raise InputError(f"{path}: no annotation in JSON; get the file again")
    return annotation


def _write(image_path: Path, ann_path: Path, targets: tuple[Path, Path], args: PersonArgs) -> None:
    image, mask = read_image(image_path), draw_mask(_read(ann_path), args.people, ann_path)
    if image.shape[:2] != mask.shape:
        (h, w), (mask_h, mask_w) = image.shape[:2], mask.shape
        raise InputError(f"{image_path} is {w}x{h}, its annotation {ann_path} {mask_w}x{mask_h}; export both again")
    if args.size:
        image, mask = resize_image(image, args.size), resize_mask(mask, args.size)
    write_mask(targets[1], mask)
    write_picture(targets[0], image)
