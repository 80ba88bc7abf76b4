"""Pages that open from disk, without a network: styles, scripts and small pictures are inside the file."""

import base64
from pathlib import Path

import cv2
import jinja2
import numpy as np

from utils.logs import replace_text

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,  # names of files and runs are text, whatever they contain
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_page(path: Path, template: str, **values) -> None:
    """Fill a template of utils/templates and write the page, complete or not at all."""
    replace_text(path, _TEMPLATES.get_template(template).render(**values))


def encode(rgb: np.ndarray) -> bytes:
    """(H, W, 3) uint8 RGB -> the bytes of a WebP picture."""
    bgr = cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".webp", bgr, [cv2.IMWRITE_WEBP_QUALITY, 80])[1].tobytes()


def data_uri(content: bytes, kind: str = "image/webp") -> str:
    """The content of a picture file as the `src` of an <img>."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
