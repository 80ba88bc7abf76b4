"""Reading photographs and masks, and writing masks: one place that knows every encoding."""

import os
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from utils.errors import InputError

IGNORE = 255  # pixels of a many-class mask that count nowhere
_PNG = b"\x89PNG\r\n\x1a\n"
_PALETTE = 3  # PNG colour type; OpenCV would expand the indices to colours


def read_image(path) -> np.ndarray:
    """A photograph as (H, W, 3) uint8 RGB; InputError if it is missing or cannot be decoded."""
    return _decode(path, _read_bytes(path), cv2.IMREAD_COLOR_RGB)


def read_mask(path, classes: int = 1) -> np.ndarray:
    """A mask as (H, W) uint8 class indices.

    `classes` 1: the file holds {0, 1} or {0, 255}, the result 0 and 1. More: class indices below `classes`, or 255
    for pixels to ignore. RGB(A) masks with equal channels count as grey. InputError for anything else.
    """
    raw = _read_bytes(path)
    if raw[:8].tobytes() == _PNG and raw.size > 25 and raw[25] == _PALETTE:
        mask = _decode_palette(path)
    else:
        mask = _decode(path, raw, cv2.IMREAD_UNCHANGED)
    if mask.ndim == 3:
        colour = mask[..., : 3 if mask.shape[2] >= 3 else 1]
        if (colour != colour[..., :1]).any():
            raise InputError(f"{path}: a mask in colour; store one grey value a pixel (0/255, 0/1 or a class index)")
        mask = np.ascontiguousarray(mask[..., 0])
    if mask.dtype != np.uint8:
        raise InputError(f"{path}: a {mask.dtype} mask; store it with 8 bits a pixel")
    return to_binary(mask, path) if classes == 1 else _check_classes(mask, classes, path)


def read_pair(image_path, mask_path, classes: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """A photograph (H, W, 3) and its mask (H, W), both uint8; InputError for what either lacks or unequal sizes."""
    image, mask = read_image(image_path), read_mask(mask_path, classes)
    if image.shape[:2] != mask.shape:
        sizes = f"{image.shape[1]}x{image.shape[0]}, its mask {mask_path} {mask.shape[1]}x{mask.shape[0]}"
        raise InputError(f"{image_path} is {sizes}")
    return image, mask


def to_binary(mask: np.ndarray, name="mask") -> np.ndarray:
    """{0, 1}, {0, 255} or bool -> uint8 {0, 1}, same shape; InputError for other values."""
    if mask.dtype == bool:
        return mask.astype(np.uint8)
    top = int(mask.max(initial=0))
    ones = cv2.countNonZero(mask) if mask.ndim == 2 else np.count_nonzero(mask)
    if top not in (0, 1, 255) or (top == 255 and np.count_nonzero(mask == 255) != ones):
        values = np.unique(mask)
        some = ", ".join(map(str, values[:6])) + (", ..." if len(values) > 6 else "")
        raise InputError(f"{name}: mask values {some}; a binary mask holds 0 and 1, or 0 and 255")
    return mask if top <= 1 and mask.dtype == np.uint8 else (mask > 0).astype(np.uint8)


def write_mask(path, mask: np.ndarray, classes: int = 1) -> None:
    """Write (H, W) class indices as an 8-bit grey PNG, {0, 1} as 0 and 255; complete or not at all."""
    path = Path(path)
    grey = to_binary(mask) * np.uint8(255) if classes == 1 else mask.astype(np.uint8)
    done, png = cv2.imencode(".png", grey)
    if not done:
        raise InputError(f"{path}: the mask cannot be encoded as PNG")
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_bytes(png.tobytes())
    part.replace(path)


def resize_image(image: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) -> (size, size, 3): area average when shrinking, bilinear when growing."""
    how = cv2.INTER_AREA if min(image.shape[:2]) >= size else cv2.INTER_LINEAR
    return image if image.shape[:2] == (size, size) else cv2.resize(image, (size, size), interpolation=how)


def resize_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """(H, W) -> (size, size) by the nearest pixel: a mask never gets values it did not hold."""
    same = mask.shape == (size, size)
    return mask if same else cv2.resize(mask, (size, size), interpolation=cv2.INTER_NEAREST_EXACT)


def _read_bytes(path) -> np.ndarray:
    try:
        raw = np.fromfile(path, np.uint8)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    if raw.size == 0:
        raise InputError(f"{path}: the file is empty")
    return raw


def _decode(path, raw: np.ndarray, how: int) -> np.ndarray:
    # OpenCV fills what a truncated file lacks with grey and says nothing, so the end marker is looked for first.
    end = b"IEND" if raw[:8].tobytes() == _PNG else b"\xff\xd9" if raw[:2].tobytes() == b"\xff\xd8" else b""
    if end and end not in raw[-65536:].tobytes():
        raise InputError(f"{path}: truncated, the end of the file is missing")
    try:
        image = cv2.imdecode(raw, how)
    except cv2.error:
        image = None
    if image is None:
        raise InputError(f"{path}: not an image that can be decoded")
    return image


def _decode_palette(path) -> np.ndarray:
    try:
        with Image.open(path) as picture:
            return np.asarray(picture)
    except (OSError, SyntaxError, ValueError):
        raise InputError(f"{path}: not an image that can be decoded") from None


def _check_classes(mask: np.ndarray, classes: int, path) -> np.ndarray:
    wrong = (mask >= classes) & (mask != IGNORE)
    if wrong.any():
        value = int(mask[wrong].max())
        raise InputError(f"{path}: class {value}, but --classes {classes} allows 0 to {classes - 1} and 255 (ignore)")
    return mask
