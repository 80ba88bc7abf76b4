"""Reading photographs and masks, and writing masks: one place that knows every encoding."""

import io
import logging
import os
import stat
import struct
import warnings
import zlib
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps

from utils.errors import InputError, writing

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")  # of the images in a folder
IGNORE = 255  # pixels of a many-class mask that count nowhere
MAX_PIXELS = 178_956_970  # larger images are taken for decompression bombs; Pillow draws the line here too
_MAX_BYTES = 8 * MAX_PIXELS  # four channels of 16 bits, not compressed
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
_PALETTE = 3  # PNG colour type; OpenCV would expand the indices to colours
_EXIF = b"eXIf", b"Exif\0", b"EXIF"  # how PNG, JPEG and WebP announce it

Image.MAX_IMAGE_PIXELS = None  # the limit above is checked instead, with a message that names the file and its size
Image.init()
_OTHER = sorted({"AVIF", "BMP", "GIF", "JPEG2000", "PPM", "TIFF", "WEBP"} & Image.OPEN.keys())
# Every failure is reported here with the name of its file; the libraries would add several lines without one.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def read_image(path) -> np.ndarray:
    """A photograph as (H, W, 3) uint8 RGB, upright by its EXIF orientation and without its alpha channel.

    16 bits a channel become 8; of several frames the first is read. InputError for a file that is missing, damaged or
    no image, or whose header claims more than MAX_PIXELS.
    """
    return _decode(path, _read_bytes(path), cv2.IMREAD_COLOR_RGB)


def read_mask(path, classes: int = 1) -> np.ndarray:
    """A mask as (H, W) uint8 class indices, upright by its EXIF orientation.

    `classes` 1: the file holds {0, 1} or {0, 255}, the result 0 and 1. More: class indices below `classes`, or 255
    for pixels to ignore. RGB(A) masks with equal channels count as grey. InputError for anything else.
    """
    raw = _read_bytes(path)
    # OpenCV turns photographs by their EXIF orientation, but nothing that it is to leave unchanged.
    turned = any(name in raw for name in _EXIF)
    palette = raw.startswith(_PNG) and raw[25:26] == bytes([_PALETTE])
    mask = _decode_pillow(path, raw) if palette or turned else _decode(path, raw, cv2.IMREAD_UNCHANGED)
    if mask.ndim == 3:
        colour = mask[..., : 3 if mask.shape[2] >= 3 else 1]
        alpha = mask[..., -1] if mask.shape[2] in (2, 4) else mask[:1, :1, 0]
        if (alpha != alpha[0, 0]).any() and (colour == colour[0, 0]).all():
            raise InputError(f"{path}: the mask is in the alpha channel; store it as one grey value a pixel")
        if (colour != colour[..., :1]).any():
            raise InputError(f"{path}: a mask in colour; store one grey value a pixel (0/255, 0/1 or a class index)")
        mask = np.ascontiguousarray(mask[..., 0])
    if mask.dtype != np.uint8:
        raise InputError(f"{path}: a {mask.dtype} mask; store it with 8 bits a pixel")
    return to_binary(mask, path) if classes == 1 else _check_classes(mask, classes, path)


def read_pair(image_path, mask_path, classes: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """A photograph (H, W, 3) and its mask (H, W), both uint8; InputError for what either lacks or unequal sizes."""
    image, mask = read_image(image_path), read_mask(mask_path, classes)
    check_sizes(image_path, image.shape[:2], mask_path, mask.shape)
    return image, mask


def check_sizes(image_path, image_shape: tuple[int, int], mask_path, mask_shape: tuple[int, int]) -> None:
    """InputError where the (H, W) of an image and of its mask differ; it says so if an EXIF rotation explains it."""
    if image_shape == mask_shape:
        return
    (h, w), (mask_h, mask_w) = image_shape, mask_shape
    why = ""
    if (h, w) == (mask_w, mask_h) and _orientation(image_path) >= 5:
        why = "; the image is turned by its EXIF orientation, the mask is not: turn the mask, or store both upright"
    raise InputError(f"{image_path} is {w}x{h}, its mask {mask_path} {mask_w}x{mask_h}{why}")


def to_binary(mask: np.ndarray, name="mask") -> np.ndarray:
    """{0, 1}, {0, 255} or bool -> uint8 {0, 1}, same shape; InputError for other values."""
    if mask.dtype == bool:
        return mask.astype(np.uint8)
    if mask.dtype == np.uint8:
        ones = mask & 1
        if not (mask + ones).any():  # 255 + 1 is 0 again, and no other value but 0 ends there
            return ones
        if mask.max() == 1:
            return mask
    values = np.unique(mask)
    if not set(values.tolist()) <= {0, 1} and not set(values.tolist()) <= {0, 255}:
        some = ", ".join(map(str, values[:6])) + (", ..." if len(values) > 6 else "")
        raise InputError(f"{name}: mask values {some}; a binary mask holds 0 and 1, or 0 and 255")
    return (mask > 0).astype(np.uint8)


def write_mask(path, mask: np.ndarray, classes: int = 1) -> None:
    """Write (H, W) class indices as an 8-bit grey PNG, {0, 1} as 0 and 255; complete or not at all."""
    write_picture(path, to_binary(mask) * np.uint8(255) if classes == 1 else mask.astype(np.uint8))


def write_picture(path, picture: np.ndarray) -> None:
    """Write (H, W) grey or (H, W, 3) RGB uint8 in the format of the path's suffix; complete or not at all."""
    path = Path(path)
    try:
        done, raw = cv2.imencode(path.suffix, picture if picture.ndim == 2 else picture[..., ::-1])
    except cv2.error:  # a JPEG, for one, has at most 65535 pixels a side
        done = False
    if not done:
        raise InputError(f"{path}: a picture of {picture.shape[1]}x{picture.shape[0]} cannot be encoded")
    write_bytes(path, raw.tobytes())


def write_bytes(path, raw: bytes) -> None:
    """Write a file complete or not at all; what was there stays if it cannot be written."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with writing(path):
            part.write_bytes(raw)
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def resize_image(image: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) -> (size, size, 3): area average when shrinking, bilinear when growing."""
    how = cv2.INTER_AREA if min(image.shape[:2]) >= size else cv2.INTER_LINEAR
    return image if image.shape[:2] == (size, size) else cv2.resize(image, (size, size), interpolation=how)


def resize_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """(H, W) -> (size, size) by the nearest pixel: a mask never gets values it did not hold."""
    same = mask.shape == (size, size)
    return mask if same else cv2.resize(mask, (size, size), interpolation=cv2.INTER_NEAREST_EXACT)


def look_at(path) -> os.stat_result:
    """What the file system says of an image file, without opening it; InputError for what cannot be one."""
    try:
        about = os.stat(path)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    if not stat.S_ISREG(about.st_mode):  # a pipe would wait for ever, a device never end
        what = "a folder" if stat.S_ISDIR(about.st_mode) else "not a regular file"
        raise InputError(f"{path}: {what}; correct the path")
    if about.st_size > _MAX_BYTES:
        raise InputError(f"{path}: a file of {about.st_size / 1e9:.1f} GB is no image; correct the path")
    if about.st_size == 0:
        raise InputError(f"{path}: the file is empty")
    return about


def _read_bytes(path) -> bytes:
    size = look_at(path).st_size
    try:
        with open(path, "rb", buffering=0) as file:  # one read takes it all
            return file.read(size)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path, error) -> InputError:
    if isinstance(error, ValueError):
        return InputError(f"{str(path)!r}: not a path ({'NUL byte' if chr(0) in str(path) else 'encoding'})")
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return InputError(f"{path}: no such file")
    return InputError(f"{path}: cannot be read ({error.strerror or error})")


def _decode(path, raw: bytes, how: int) -> np.ndarray:
    _check_header(path, raw)
    try:
        image = cv2.imdecode(np.frombuffer(raw, np.uint8), how)
    except cv2.error:
        image = None
    if image is None:
        raise InputError(f"{path}: not an image that can be decoded")
    return image


def _decode_pillow(path, raw: bytes) -> np.ndarray:
    _check_header(path, raw)
    try:
        with Image.open(io.BytesIO(raw), formats=["PNG", "JPEG", *_OTHER]) as picture:
            return np.array(ImageOps.exif_transpose(picture))
    except Exception:  # there is no list of what a damaged file makes the decoders raise
        raise InputError(f"{path}: not an image that can be decoded") from None


def _orientation(path) -> int:
    """The EXIF orientation, 1 to 8; from 5 on, height and width are exchanged."""
    try:
        with Image.open(path) as picture:
            return int(picture.getexif().get(0x0112, 1))
    except Exception:  # only asked for to explain another fault
        return 1


def _check_header(path, raw: bytes) -> None:
    """InputError, before anything is decoded, for a truncated file, a wrong PNG checksum or too many pixels.

    OpenCV makes room for whatever a header claims, and some versions fill what a truncated file lacks with grey.
    """
    if raw.startswith(_PNG):
        _check_png(path, raw)
    elif raw.startswith(_JPEG):
        _check_jpeg(path, raw)
    elif raw.startswith(b"RIFF") and raw[8:12] == b"WEBP":
        _check_webp(path, raw)
    else:
        try:
            with Image.open(io.BytesIO(raw), formats=_OTHER) as picture:
                size = picture.size
        except Exception:  # there is no list of what a damaged header makes the parsers raise
            raise InputError(f"{path}: not an image that can be decoded") from None
        _check_size(path, *size)


def _check_size(path, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        most = f"more than {MAX_PIXELS // 10**6} million pixels"
        raise InputError(f"{path}: the file claims {width}x{height}, {most}; make it smaller, or correct it")


def _check_png(path, raw: bytes) -> None:
    if raw[12:16] != b"IHDR" or len(raw) < 33:
        raise InputError(f"{path}: truncated, the end of the file is missing")
    _check_size(path, *struct.unpack_from(">II", raw, 16))
    view, at, kind = memoryview(raw), len(_PNG), b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", raw, at) if at + 12 <= len(raw) else (len(raw), b"IEND")
        end = at + 8 + length
        if end + 4 > len(raw):
            raise InputError(f"{path}: truncated, the end of the file is missing")
        critical = kind[0] & 0x20 == 0  # a small first letter marks what a decoder may do without
        if critical and zlib.crc32(view[at + 4 : end]) != struct.unpack_from(">I", raw, end)[0]:
            raise InputError(f"{path}: damaged, a checksum of the PNG is wrong; get the file again")
        at = end + 4


def _check_jpeg(path, raw: bytes) -> None:
    # An EXIF thumbnail has an end marker of its own, and some cameras append to a complete file: only an end marker
    # behind the first scan counts, and it need not be the last thing.
    at, marker = 2, 0
    while marker != 0xDA:
        at = raw.find(b"\xff", at)
        if at < 0 or at + 9 > len(raw):
            raise InputError(f"{path}: truncated, the end of the file is missing")
        marker = raw[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD9:  # markers without a segment
            at += 2
        else:
            if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame header
                height, width = struct.unpack_from(">HH", raw, at + 5)
                _check_size(path, width, height)
            at += 2 + struct.unpack_from(">H", raw, at + 2)[0]
    if raw.rfind(b"\xff\xd9", at) < 0:
        raise InputError(f"{path}: truncated, the end of the file is missing")


def _check_webp(path, raw: bytes) -> None:
    # Pillow has no header check for this format: opening a file makes room for all of its pixels.
    if len(raw) < 30 or len(raw) < 8 + int.from_bytes(raw[4:8], "little"):
        raise InputError(f"{path}: truncated, the end of the file is missing")
    kind = raw[12:16]
    if kind == b"VP8X":
        width, height = (1 + int.from_bytes(raw[at : at + 3], "little") for at in (24, 27))
    elif kind == b"VP8L":
        bits = int.from_bytes(raw[21:25], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    else:
        width, height = (int.from_bytes(raw[at : at + 2], "little") & 0x3FFF for at in (26, 28))
    _check_size(path, width, height)


def _check_classes(mask: np.ndarray, classes: int, path) -> np.ndarray:
    wrong = (mask >= classes) & (mask != IGNORE)
    if wrong.any():
        value = int(mask[wrong].max())
        raise InputError(f"{path}: class {value}, but --classes {classes} allows 0 to {classes - 1} and 255 (ignore)")
    return mask
