"""The images that a command line names, and the names under which something is written for each of them."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from utils.errors import InputError
from utils.images import SUFFIXES
from utils.lists import read_list, stem_of
from utils.logs import read_record, replace_text


@dataclass(frozen=True)
class Source:
    """An image file, and the path without suffix, relative to the output folder, of what is made of it."""

    path: Path
    name: str


def find_images(words: Iterable[str], data_root=".", recursive: bool = False, out: Path | None = None) -> list[Source]:
    """The images of files, folders and CSV lists (column img), in order; a file named twice counts once.

    A folder gives its images by name, with `recursive` also those below it, under the names of their sub folders,
    without what lies in `out`. InputError for a word that is none of these, and for a folder without images.
    """
    found = {}
    for word in words:
        path = Path(word)
        if path.is_dir():
            sources = _in_folder(path, recursive, out)
        elif path.suffix.lower() == ".csv":
            names = read_list(path, ("img",))["img"]
            sources = [Source(Path(data_root) / name, stem_of(name)) for name in names]
        elif path.exists():
            sources = [Source(path, path.stem)]
        else:
            raise InputError(f"{word}: no such file or folder")
        for source in sources:
            found.setdefault(source.path.absolute(), source)
    return list(found.values())


class Claim:
    """The files written for each image in one folder: which are ours, and `todo`, the images that need theirs written.

    A note in the folder, `predict.json`, says of which image and with which settings each was made; those up to date
    stay. InputError where two images would write one file, or where a file would take the place of an image, or
    (without `overwrite`) of something that was not made of this very image.
    """

    def __init__(self, out: Path, sources: list[Source], files: Callable, settings: dict, overwrite: bool = False):
        self.out, text = out, json.dumps(settings, sort_keys=True)
        self.settings = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.files = {source: files(source.name) for source in sources}
        self._check_unique()
        note = read_record(out / "predict.json")
        self.made, self.known = (x if isinstance(x, dict) else {} for x in (note.get("images"), note.get("settings")))
        self.made = {name: entry for name, entry in self.made.items() if _is_entry(entry)}
        self.known[self.settings] = settings
        if not overwrite:
            self._check_foreign()
        self.todo = [source for source in sources if overwrite or not self._up_to_date(source)]
        for source in self.todo:  # claimed, but of no settings until it is complete
            files = list(dict.fromkeys(self.made.get(source.name, {}).get("files", []) + self.files[source]))
            self.made[source.name] = {"image": str(source.path.absolute()), "settings": "", "files": files}
        out.mkdir(parents=True, exist_ok=True)
        self.write_note()

    def finished(self, source: Source) -> None:
        """All files of this image are written; those of earlier settings that are no longer asked for go."""
        entry, files = self.made[source.name], self.files[source]
        for file in set(entry["files"]) - set(files):
            (self.out / file).unlink(missing_ok=True)
        self.made[source.name] = entry | {"settings": self.settings, "files": files}

    def write_note(self) -> None:
        """Keep what is known so far."""
        used = {entry["settings"] for entry in self.made.values()} | {self.settings}
        known = {key: settings for key, settings in self.known.items() if key in used}
        replace_text(self.out / "predict.json", json.dumps({"settings": known, "images": self.made}, indent=1) + "\n")

    def _check_unique(self):
        images, owner = {source.path.resolve() for source in self.files}, {}
        for source, file in ((source, file) for source, files in self.files.items() for file in files):
            other = owner.setdefault(file, source)
            if other != source:
                both = f"{other.path} and {source.path} would both be written to {self.out / file}"
                raise InputError(f"{both}; use two --out folders, or one folder that holds both with --recursive")
            if (self.out / file).resolve() in images:
                raise InputError(f"{self.out / file}: is one of the images and would be replaced; choose another --out")

    def _check_foreign(self):
        for source, files in self.files.items():
            entry = self.made.get(source.name, {})
            ours = entry.get("files", []) if entry.get("image") == str(source.path.absolute()) else []
            foreign = next((file for file in files if file not in ours and (self.out / file).exists()), None)
            if foreign:
                what = f"was made of {entry['image']}" if foreign in entry.get("files", []) else "is not of this tool"
                raise InputError(f"{self.out / foreign}: exists and {what}; choose another --out, or --overwrite")

    def _up_to_date(self, source):
        if self.made.get(source.name, {}).get("settings") != self.settings:
            return False
        try:
            newest = source.path.stat().st_mtime_ns
            return all((self.out / file).stat().st_mtime_ns >= newest for file in self.files[source])
        except OSError:  # one of them is missing
            return False


def _is_entry(entry) -> bool:
    return isinstance(entry, dict) and {"image", "settings", "files"} <= entry.keys()


def digest(path) -> str:
    """16 hexadecimal digits of a file's content; InputError if there is none."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError:
        raise InputError(f"{path}: no such checkpoint") from None


def _in_folder(folder, recursive, out):
    every = sorted(folder.rglob("*") if recursive else folder.iterdir())
    sources = [
        Source(path, str(path.relative_to(folder).with_suffix("")))
        for path in every
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    ]
    if out and out.resolve() != folder.resolve():
        sources = [source for source in sources if not source.path.resolve().is_relative_to(out.resolve())]
    if not sources:
        more = "" if recursive else "; --recursive also looks into its sub folders"
        raise InputError(f"{folder}: no images in this folder{more}")
    return sources
