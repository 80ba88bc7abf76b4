"""A mixture of kinds of noise at equal damage: the strength of every kind, and the noisy mask of every image."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from utils import contour, noise
from utils.errors import InputError, warn
from utils.images import read_image, read_mask
from utils.logs import read_record, replace_text
from utils.noise import KINDS, apply_noise, find_strength
from utils.noise_plan import generator
from utils.scores import pair_scores
from utils.store import in_threads, key_of, stamp_files

SAMPLE = 64  # masks whose mean IoU decides the strength of a kind
SLOW = {"superpixel": 8}  # kinds that take a large part of a second a mask
FAR = 0.05  # from the IoU that was asked for: then the kind cannot reach it


class Mixture:
    """The flags --kinds, --severity, --strength, --confusion and --classes; InputError for what cannot be made."""

    def __init__(self, args):
        named = [_kind_and_chance(word) for word in args.kinds]
        self.args, self.chances = args, dict(named)
        unknown = [kind for kind in self.chances if kind not in KINDS]
        if unknown:
            raise InputError(f"--kinds {unknown[0]}: known kinds are {', '.join(KINDS)}")
        if not all(0 < chance < float("inf") for chance in self.chances.values()):
            raise InputError(f"--kinds {' '.join(args.kinds)}: a chance is a positive number, as in polygon:0.7")
        if len(self.chances) < len(named):
            raise InputError(f"--kinds {' '.join(args.kinds)}: a kind is named twice; give it once, with one chance")
        if not 0.05 <= args.severity < 1:
            raise InputError(f"--severity {args.severity}: an IoU from 0.05 up to, but not, 1")
        if args.strength and len(args.strength) != len(self.chances):
            raise InputError(f"--strength: needs one positive number for each of the {len(self.chances)} kinds")
        for kind, strength in zip(self.chances, args.strength, strict=False):
            if not 0 < strength <= KINDS[kind].most:
                limits = f"more than 0 and at most {KINDS[kind].most} {KINDS[kind].unit}"
                raise InputError(f"--strength {strength:g}: {kind} takes {limits}")
        if args.confusion and "confusion" not in self.chances:
            raise InputError(f"--confusion {args.confusion}: only kind confusion has a matrix; add it to --kinds")
        if "confusion" in self.chances and args.classes == 1:
            raise InputError("--kinds confusion: needs --classes of 2 or more; for binary masks there is `missing`")
        self.matrix = _read_matrix(args) if args.confusion else None
        self.strengths = dict(zip(self.chances, args.strength, strict=False))
        self.note = None

    @property
    def lacking(self) -> list[str]:
        """The kinds whose strength is not known yet."""
        return [kind for kind in self.chances if kind not in self.strengths]

    def recall(self, pool: pd.DataFrame, note: Path) -> None:
        """Read from `note` the strengths that were found before for the lists `pool` (img, clean, stem)."""
        if not self.lacking:
            return
        found, record = read_record(note), {"about": self._about(pool)}
        if found.get("about") == record["about"]:
            self.strengths = {k: v for k, v in found["strengths"].items() if k in self.chances}
        self.note = (note, record) if self.lacking else None

    def find_strengths(self, pool: pd.DataFrame) -> None:
        """Find the strength of every kind that lacks one on a sample of `pool`, whatever the order, and say it."""
        rows = list(self._sample(pool).itertuples())
        for kind in tqdm(self.lacking, "strengths", leave=False, disable=None):
            how = self.args.severity, self.args.classes, self.matrix, self.args.workers
            some = in_threads(lambda row, kind=kind: self._read(row, kind), rows[: SLOW.get(kind)], self.args.workers)
            strength, left = find_strength(list(some), kind, *how)
            self.strengths[kind] = float(f"{strength:.4g}")
            print(f"{kind}: strength {strength:.4g} ({KINDS[kind].unit}) leaves a mean IoU of {left:.3f}")
            if left > self.args.severity + FAR:
                warn(f"--severity {self.args.severity}: {kind} cannot cost as much on these masks")

    def remember(self) -> None:
        """Write the strengths that were found."""
        if self.note:
            path, record = self.note
            replace_text(path, json.dumps(record | {"strengths": self.strengths}, indent=1) + "\n")

    def _sample(self, pool) -> pd.DataFrame:
        """SAMPLE rows of `pool`, by a draw of each image's own: the order of the list is of no matter."""
        draws = {stem: generator(self.args.seed, "sample", stem).random() for stem in pool["stem"]}
        return pool.set_index("stem", drop=False).loc[sorted(draws, key=lambda i: (draws[i], i))[:SAMPLE]]

    def _about(self, pool) -> str:
        """All that strengths follow from, in short: the code, and the sample by its files' time of change and size."""
        rows = self._sample(pool)
        files = [str(Path(self.args.data_root, name)) for column in ("clean", "img") for name in rows[column]]
        stamps = [found for found in stamp_files(files) if not isinstance(found, InputError)]
        matrix = None if self.matrix is None else self.matrix.tolist()
        how = rows["stem"].tolist(), self.args.severity, self.args.seed, self.args.classes, matrix
        return key_of("strength", stamps, _rule(), *how)

    def make(self, row) -> tuple[np.ndarray | None, float]:
        """The noisy mask of a row (img, clean, stem, op), None where the noise would take a class away, and its IoU."""
        clean, image, key = self._read(row, row.op)
        noisy = apply_noise(clean, row.op, self.strengths[row.op], key(), self.args.classes, image, self.matrix)
        iou = pair_scores(noisy, clean, self.args.classes)["iou"]
        return (None, 1.0) if (noisy == clean).all() else (noisy, iou)

    def _read(self, row, kind) -> tuple[np.ndarray, np.ndarray | None, Callable]:
        mask = read_mask(Path(self.args.data_root, row.clean), self.args.classes)
        image = read_image(Path(self.args.data_root, row.img)) if kind == "superpixel" else None
        if image is not None and image.shape[:2] != mask.shape:
            raise InputError(f"{row.img} and {row.clean} have different sizes")
        return mask, image, lambda: generator(self.args.seed, "strength", row.stem)


def _kind_and_chance(word: str) -> tuple[str, float]:
    kind, _, chance = word.partition(":")
    try:
        return kind, float(chance or 1)
    except ValueError:
        return kind, float("nan")


def _rule() -> str:
    """The code by which strengths are found: those that other code found are not these."""
    code = b"".join(Path(file).read_bytes() for file in (noise.__file__, contour.__file__, __file__))
    return hashlib.blake2b(code, digest_size=16).hexdigest()


def _read_matrix(args) -> np.ndarray:
    try:
        matrix = np.loadtxt(args.confusion, delimiter=",", ndmin=2)
    except (OSError, ValueError) as error:
        raise InputError(f"--confusion {args.confusion}: {error}") from None
    whole = matrix.shape == (args.classes, args.classes) and (matrix >= 0).all() and (matrix.sum(1) <= 1 + 1e-6).all()
    if not whole:
        what = f"needs {args.classes} rows of as many chances, which sum to 1 at most"
        raise InputError(f"--confusion {args.confusion}: {what}")
    return matrix
