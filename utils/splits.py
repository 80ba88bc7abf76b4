"""Labelled and unlabelled halves of a list: drawn here, or read from and written to the text lists of published splits.

Text lists: UniMatch and ST++ write `JPEGImages/x.jpg SegmentationClass/x.png`, an image and its mask; U2PL writes one
word, for Pascal VOC the id `2007_000032`, for Cityscapes the image `leftImg8bit/train/.../x_leftImg8bit.png`.
"""

import math
import os
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd

from utils.errors import InputError, report_bad_rows, warn
from utils.image_labels import classes_of_masks, with_image_labels
from utils.lists import image_labels, read_list
from utils.written import write_new_lists, write_new_text

_CITY = ("leftImg8bit/", "_leftImg8bit.png"), ("gtFine/", "_gtFine_labelTrainIds.png")


@dataclass
class LabelledArgs:
    csv: Annotated[str, "list with the columns img and filename", "positional"]
    out: Annotated[str, "folder that gets labelled_K.csv and unlabelled_K.csv for every K"]
    labelled: Annotated[list[int], "how many images keep their masks; several counts give nested lists"] = field(
        default_factory=list
    )
    fraction: Annotated[list[str], "the same as shares, such as 1/16 1/8; rounded up, as the published splits"] = field(
        default_factory=list
    )
    seed: Annotated[int, "seed of the draw; of one seed smaller lists are the beginning of larger ones"] = 0
    balanced: Annotated[bool, "draw the class next that the fewest chosen images hold, so that rare ones occur"] = False
    image_labels: Annotated[bool, "write the classes of every image, from its mask, as column label"] = False
    classes: Annotated[int, "of the masks, for --balanced, --image-labels; 1: masks of 0/1 or 0/255"] = 1
    keep_masks: Annotated[bool, "masks of unlabelled images stay listed, for logs on pseudo labels only"] = False
    extra: Annotated[list[str], "lists of images without masks that are unlabelled in every case"] = field(
        default_factory=list
    )
    weak: Annotated[str, "list with img and label: unlabelled_K.csv is this, without the labelled images"] = ""
    data_root: Annotated[str, "folder that relative paths in the list start from"] = "."


@dataclass
class TextArgs:
    file: Annotated[str, "published text list (.txt), or a list (.csv) to be written as one", "positional"]
    out: Annotated[str, "the list to write: .csv, or .txt"]
    style: Annotated[Literal["auto", "pairs", "voc", "cityscapes"], "a line holds image and mask, an id, an image"] = (
        "auto"
    )
    root: Annotated[str, "folder that the paths of the text list start from; stands before them in the CSV"] = ""
    masks: Annotated[str, "style voc: folder of the masks"] = "SegmentationClassAug"
    images_only: Annotated[bool, "leave the masks out, for an unlabelled list"] = False


def split_labelled(args: LabelledArgs) -> None:
    """Draw the images that keep their masks, for semi-supervised training; the others become an unlabelled list."""
    write_new_lists(draw_splits(args), Path(args.out))


def convert_text(args: TextArgs) -> None:
    """Turn a published text list into a CSV list, or a CSV list into one."""
    kinds = Path(args.file).suffix.lower(), Path(args.out).suffix.lower()
    if kinds == (".txt", ".csv"):
        write_new_lists({Path(args.out).name: csv_of_text(args)}, Path(args.out).parent)
    elif kinds == (".csv", ".txt"):
        write_new_text(args.out, text_of_csv(args))
    else:
        raise InputError(f"{args.file}, --out {args.out}: one of them must end in .txt, the other in .csv")


def draw_order(count: int, seed: int, classes_of: np.ndarray | None = None) -> np.ndarray:
    """An order of `count` images whose first k are the k labelled ones, for every k.

    With `classes_of` (count, classes) bool the next image is one with the class that the fewest images so far hold, of
    several the class that is rarest in the list; without, every order is equally likely.
    """
    order = np.random.default_rng(seed).permutation(count)
    if classes_of is None:
        return order
    has, left = classes_of[order], np.ones(count, bool)
    rarity, chosen = has.sum(0), []
    held, remaining = np.zeros_like(rarity), rarity.copy()
    for _ in range(count):
        wanted = np.lexsort((rarity, held, remaining == 0))[0]
        first = int(np.argmax(left & has[:, wanted] if remaining[wanted] else left))
        left[first], held, remaining = False, held + has[first], remaining - has[first]
        chosen.append(first)
    return order[chosen]


def labelled_counts(args: LabelledArgs, count: int) -> list[int]:
    """The numbers of labelled images that the flags ask for, each once, ascending; shares of `count` are rounded up.

    ceil gives the published numbers: 92 of 1464, 662 of 10582, 186 of 2975 for 1/16.
    """
    wanted = list(args.labelled)
    for text in args.fraction:
        try:
            share = Fraction(text)
        except (ValueError, ZeroDivisionError):
            raise InputError(f"--fraction {text}: write it as 1/16 or 0.0625") from None
        if not 0 < share <= 1:
            raise InputError(f"--fraction {text}: must lie above 0 and not above 1")
        wanted.append(math.ceil(share * count))
    if not wanted:
        raise InputError("how many labelled images? give --labelled 23 46 or --fraction 1/16 1/8")
    bad = [k for k in wanted if not 1 <= k <= count]
    if bad:
        raise InputError(f"{args.csv}: --labelled {bad[0]}: the list has {count} images; choose between 1 and that")
    return sorted(set(wanted))


def draw_splits(args: LabelledArgs) -> dict[str, pd.DataFrame]:
    """{file name: list} of the labelled and the unlabelled images of every count that is asked for."""
    frame, more, weak = read_list(args.csv), _extra(args), _weak(args)
    if args.seed < 0:
        raise InputError(f"--seed {args.seed}: must be 0 or more")
    counts, lists = labelled_counts(args, len(frame)), {}
    twice = frame["img"][frame["img"].isin(more["img"])].tolist()
    if twice:
        raise InputError(f"--extra: {twice[0]} is in {args.csv} too; an image is in one half only")
    if args.image_labels:
        frame = with_image_labels(frame, args.classes, args.data_root, args.csv)
    held = classes_of_masks(frame, args.classes, args.data_root, args.csv) if args.balanced else None
    frame, order = frame.drop(columns="line"), draw_order(len(frame), args.seed, held)
    if "iterations" not in frame:
        frame.insert(2, "iterations", 0)
    columns = ["img", "filename"] if args.keep_masks else ["img"]
    if "label" in frame and ("label" in more or more.empty):
        columns.append("label")
    for k in counts:
        few = lists[f"labelled_{k}.csv"] = frame.iloc[np.sort(order[:k])]
        if weak is not None:
            lists[f"unlabelled_{k}.csv"] = _without(weak, few, args)
            continue
        rest = pd.concat([frame.iloc[np.sort(order[k:])], more], ignore_index=True)
        lists[f"unlabelled_{k}.csv"] = rest[columns]
    return lists


def read_text_list(path, style: str, masks: str = "SegmentationClassAug") -> pd.DataFrame:
    """A published text list as a frame with img, filename (empty where an image has no mask) and `line`.

    Blank lines, Windows line ends and a byte-order mark are nothing. InputError names all lines that are bad: of more
    words than the style has, of an image listed before, of a Cityscapes path that is none.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; download the split, or correct the path")
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text") from None
    style = _style_of(lines) if style == "auto" else style
    rows, bad, first = [], [], {}
    for number, words in enumerate((line.split() for line in lines), 1):
        if not words:
            continue
        if len(words) > (2 if style == "pairs" else 1):
            bad.append((number, f"{len(words)} words"))
            continue
        pair = _pair(words, style, masks)
        if pair is None:
            bad.append((number, f"{words[0]} does not look like {_CITY[0][0]}.../x{_CITY[0][1]}"))
        elif first.setdefault(pair[0], number) != number:
            bad.append((number, f"{pair[0]} is listed before in line {first[pair[0]]}"))
        else:
            rows.append((*pair, number))
    report_bad_rows(path, bad, "Correct these lines, or choose another --style (pairs, voc, cityscapes).")
    if not rows:
        raise InputError(f"{path}: the list is empty")
    return pd.DataFrame(rows, columns=["img", "filename", "line"])


def text_of(frame: pd.DataFrame, style: str, path) -> str:
    """The text list of a frame with img, and for style "pairs" (or auto) filename, without an end of the last line.

    InputError where the id of two images is the same, or an image is none of Cityscapes.
    """
    if style in ("auto", "pairs"):
        if "filename" not in frame:
            return "\n".join(frame["img"])
        return "\n".join(f"{img} {mask}".strip() for img, mask in zip(frame["img"], frame["filename"], strict=True))
    if style == "cityscapes":
        wrong = [name for name in frame["img"] if _pair([name], style, "") is None]
        if wrong:
            raise InputError(f"{path}: {wrong[0]}: no image of Cityscapes; choose --style pairs, or --root")
        return "\n".join(frame["img"])
    ids = frame["img"].map(lambda name: Path(name).stem)
    if ids.duplicated().any():
        raise InputError(f"{path}: two images are called {ids[ids.duplicated()].iloc[0]}; choose --style pairs")
    return "\n".join(ids)


def csv_of_text(args: TextArgs) -> pd.DataFrame:
    """The list of a text list, masks and noise level 0 included unless images only are wanted."""
    frame = read_text_list(args.file, args.style, args.masks)
    said = Path(args.file).parent.name
    if Path(args.file).stem in ("labeled", "labelled") and said.isdigit() and int(said) != len(frame):
        warn(f"{args.file}: {len(frame)} images, but its folder says {said}")
    if not args.images_only:
        bad = [(row.line, f"{row.img} has no mask") for row in frame.itertuples() if not row.filename]
        report_bad_rows(args.file, bad, "Add the second column, or read it with --images-only.")
    for column in ("img", "filename"):
        frame[column] = [str(Path(args.root, name)) if name else name for name in frame[column]]
    return frame[["img"]] if args.images_only else frame[["img", "filename"]].assign(iterations=0)


def text_of_csv(args: TextArgs) -> str:
    """The text list of a CSV list, its paths as they are below --root."""
    frame = read_list(
        args.file, ("img",) if args.images_only or args.style in ("voc", "cityscapes") else ("img", "filename")
    )
    frame = frame.drop(columns="filename", errors="ignore") if args.images_only else frame
    for column in [name for name in ("img", "filename") if name in frame]:
        bad = [(line, f"{name} is not below {args.root}") for line, name in _outside(frame, column, args.root)]
        report_bad_rows(args.file, bad, "Correct --root.")
        frame[column] = [str(Path(name).relative_to(args.root or ".")) for name in frame[column]]
        bad = [(row.line, f"a blank in {column}") for row in frame.itertuples() if " " in getattr(row, column)]
        report_bad_rows(args.file, bad, "Text lists are separated by blanks: rename the files.")
    return text_of(frame, args.style, args.file)


def _outside(frame, column, root):
    rows = zip(frame["line"], frame[column], strict=True)
    return [(line, name) for line, name in rows if root and not Path(name).is_relative_to(root)]


def _style_of(lines) -> str:
    words = [line.split() for line in lines if line.strip()]
    if any(len(line) > 1 for line in words):
        return "pairs"
    if all(_pair(line, "cityscapes", "") for line in words):
        return "cityscapes"
    return "pairs" if any("/" in line[0] or "." in line[0] for line in words) else "voc"


def _pair(words, style, masks):
    if style == "pairs":
        return words[0], words[1] if len(words) > 1 else ""
    if style == "voc":
        return f"JPEGImages/{words[0]}.jpg", f"{masks}/{words[0]}.png"
    (folder, end), (mask_folder, mask_end) = _CITY
    if not (words[0].startswith(folder) and words[0].endswith(end)):
        return None
    return words[0], mask_folder + words[0][len(folder) : -len(end)] + mask_end


def _extra(args) -> pd.DataFrame:
    frames = [read_list(path, ("img", "filename") if args.keep_masks else ("img",)) for path in args.extra]
    if args.image_labels:
        frames = [_labelled(one, path, args) for one, path in zip(frames, args.extra, strict=True)]
    frame = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame({"img": []}, dtype=str)
    if frame["img"].duplicated().any():
        raise InputError(f"--extra: {frame['img'][frame['img'].duplicated()].iloc[0]} is listed twice")
    if frames and any("label" not in one for one in frames):
        frame = frame.drop(columns="label", errors="ignore")
    return frame.drop(columns="line", errors="ignore")


def _weak(args) -> pd.DataFrame | None:
    """The list that takes the place of what is left, its classes checked; None without one."""
    if not args.weak:
        return None
    if args.extra:
        raise InputError("--weak, --extra: one takes the place of the unlabelled images, the other adds some; choose")
    frame = read_list(args.weak, ("img", "label"))
    image_labels(frame, max(2, args.classes), args.weak)
    return frame.drop(columns="line")


def _without(weak, few, args) -> pd.DataFrame:
    """The rows of a list whose images are not in `few`, under whatever path; InputError where none is left."""
    taken = {os.path.realpath(Path(args.data_root, name)) for name in few["img"]}
    left = [os.path.realpath(Path(args.data_root, name)) not in taken for name in weak["img"]]
    if not any(left):
        raise InputError(f"{args.weak}: all its images are among the {len(few)} with masks; lower --labelled")
    return weak[left]


def _labelled(frame, path, args) -> pd.DataFrame:
    """A list of further images with their classes: its own column `label`, checked, else from its masks."""
    if "label" in frame:
        image_labels(frame, max(2, args.classes), path)
        return frame
    if "filename" in frame:
        return with_image_labels(frame, args.classes, args.data_root, path)
    raise InputError(f"--extra {path}: no column `label`, and no masks (column `filename`) that would tell it")
