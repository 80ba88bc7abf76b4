"""Readers of published datasets: tiny folders in the published layouts, pixels checked by hand, one-line errors."""

import base64
import io
import json
import os
import zlib
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torchvision.datasets
from PIL import Image
from scipy.io import savemat

from utils.args import launch_commands
from utils.errors import InputError
from utils.images import read_image, read_mask
from utils.lists import read_list
from utils.prepare_data import COMMANDS, FolderArgs, split_folder
from utils.readers import cityscapes, cocostuff, person, pet, voc
from utils.readers.common import SetArgs, remap, table_of


def write(path: Path, array) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path)
    return path


def photo(path: Path, shape=(4, 4)) -> Path:
    return write(path, np.full((*shape, 3), 90))


def text(path: Path, lines) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(str, lines)) + "\n")
    return path


def pixels(root: Path, name: str) -> list:
    """A mask file as it is stored."""
    return np.array(Image.open(root / name)).tolist()


def run(command: str, *words) -> None:
    launch_commands(COMMANDS, [command, *map(str, words)])


def fails(capsys, command: str, *words) -> str:
    """What a command that ends with code 2 says: one line."""
    with pytest.raises(SystemExit) as stop:
        run(command, *words)
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


# Supervisely Person


def bitmap(mask, origin, title="person_bmp", palette=True) -> dict:
    picture, file = Image.fromarray(np.asarray(mask, np.uint8) * (1 if palette else 255)), io.BytesIO()
    if palette:  # as the publisher writes it: index 0 is transparent, and the colours say nothing
        picture.putpalette([255, 255, 255, 0, 0, 0])
        picture.save(file, "PNG", transparency=0)
    else:
        picture.save(file, "PNG")
    data = base64.b64encode(zlib.compress(file.getvalue())).decode()
    return {
        "classTitle": title,
        "type": "bitmap",
        "points": {"exterior": [], "interior": []},
        "bitmap": {"data": data, "origin": origin},
    }


def polygon(exterior, interior=(), title="person_poly", kind="polygon") -> dict:
    points = {"exterior": exterior, "interior": list(interior)}
    return {"classTitle": title, "type": kind, "points": points, "bitmap": None}


def annotation(objects, height=8, width=10) -> dict:
    return {"tags": [], "size": {"height": height, "width": width}, "objects": objects}


def draw(*objects, height=8, width=10) -> np.ndarray:
    return person.draw_mask(annotation(objects, height, width), ["person_bmp", "person_poly"], "a.json")


@pytest.mark.parametrize("palette", [True, False])
def test_a_bitmap_stands_at_its_origin(palette):
    mask = draw(bitmap([[1, 1, 0], [0, 1, 1]], [4, 2], palette=palette))
    expected = np.zeros((8, 10), np.uint8)
    expected[2, 4:6] = expected[3, 5:7] = 1
    assert mask.tolist() == expected.tolist()


@pytest.mark.parametrize(
    "origin,kept", [([-1, -1], [(0, 0)]), ([-1, 0], [(1, 0)]), ([9, 7], [(7, 9)]), ([20, 20], []), ([-5, 0], [])]
)
def test_what_lies_outside_the_image_is_cut_off(origin, kept):
    assert np.argwhere(draw(bitmap([[1, 0], [0, 1]], origin))).tolist() == [list(one) for one in kept]


def test_a_polygon_keeps_its_contour_and_loses_its_hole():
    mask = draw(polygon([[1, 1], [7, 1], [7, 6], [1, 6]], [[[3, 3], [5, 3], [5, 4], [3, 4]]]))
    expected = np.zeros((8, 10), np.uint8)
    expected[1:7, 1:8] = 1
    expected[3:5, 3:6] = 0
    assert mask.tolist() == expected.tolist()


def test_persons_are_merged_and_a_hole_is_cut_out_of_its_own_polygon_only():
    ring = polygon([[1, 1], [7, 1], [7, 6], [1, 6]], [[[3, 3], [5, 3], [5, 4], [3, 4]]])
    inside = bitmap(np.ones((1, 2)), [3, 3])
    for order in ((ring, inside), (inside, ring)):
        mask = draw(*order)
        assert mask[3, 3:6].tolist() == [1, 1, 0] and mask[4, 3:6].tolist() == [0, 0, 0]
        assert mask.sum() == 6 * 7 - 6 + 2


def test_other_classes_are_background_and_rectangles_are_filled():
    mask = draw(bitmap(np.ones((8, 10)), [0, 0], "neutral"), polygon([[2, 1], [4, 3]], kind="rectangle"))
    expected = np.zeros((8, 10), np.uint8)
    expected[1:4, 2:5] = 1
    assert mask.tolist() == expected.tolist()


def make_project(root: Path) -> Path:
    """Datasets ds2 and ds10, annotations named as in 2018 and as today, one image without persons."""
    things = {
        "ds10/b.png": [polygon([[0, 0], [9, 0], [9, 7], [0, 7]])],
        "ds2/z.png": [bitmap(np.ones((4, 5)), [0, 0])],
        "ds2/c.jpeg": [bitmap(np.ones((2, 2)), [0, 0], "neutral")],
    }
    for name, objects in things.items():
        folder, file = name.split("/")
        photo(root / folder / "img" / file, (8, 10))
        stem = file if folder == "ds10" else Path(file).stem
        text(root / folder / "ann" / f"{stem}.json", [json.dumps(annotation(objects))])
    text(root / "meta.json", ["{}"])
    return root


def test_the_person_project_becomes_what_the_published_setting_reads(tmp_path, capsys):
    root, out = make_project(tmp_path / "project"), tmp_path / "Supervisely"
    run("person", root, "--out", out, "--data-root", tmp_path)
    assert "all has 3 images, 5711 were published" in capsys.readouterr().err
    frame = read_list(out / "all.csv")
    assert frame["source"].tolist() == ["ds2/img/c.jpeg", "ds2/img/z.png", "ds10/img/b.png"]
    assert frame["img"].tolist() == [f"Supervisely/train/{i}.png" for i in (1, 2, 3)]
    assert frame["filename"].tolist() == [f"Supervisely/train_mask/{i}.png" for i in (1, 2, 3)]
    masks = [np.array(Image.open(out / "train_mask" / f"{i}.png")) for i in (1, 2, 3)]
    assert not masks[0].any() and (masks[2] == 255).all() and set(np.unique(masks[1])) == {0, 255}
    assert all(mask.shape == (321, 321) for mask in masks) and read_image(out / "train/1.png").shape == (321, 321, 3)
    assert masks[1][: 321 // 2, : 321 // 2].all() and not masks[1][322 // 2 :].any()
    folders = {"images": str(out / "train"), "masks": str(out / "train_mask")}
    split_folder(FolderArgs(out=str(tmp_path / "csv"), test=1, valid=0.5, **folders))
    assert len(read_list(tmp_path / "csv/pool.csv")) == 2


def test_a_person_project_keeps_its_size_on_demand(tmp_path):
    run("person", make_project(tmp_path / "project"), "--out", tmp_path / "out", "--size", 0)
    assert read_mask(tmp_path / "out/train_mask/2.png").tolist() == draw(bitmap(np.ones((4, 5)), [0, 0])).tolist()


@pytest.mark.parametrize(
    "content,said",
    [
        ("{", "no annotation in JSON"),
        (json.dumps(annotation([bitmap(np.ones((2, 2)), [0, 0])], 9, 10)), "is 10x8, its annotation"),
        (json.dumps({"objects": [bitmap(np.ones((2, 2)), [0, 0])]}), "damaged annotation (KeyError: 'size')"),
        (json.dumps(annotation([bitmap([[1]], [0, 0]) | {"bitmap": {"data": "AAAA", "origin": [0, 0]}}])), "damaged"),
        (json.dumps(annotation([polygon([[0, 0], [1, "x"], [2, 2]])])), "damaged annotation"),
    ],
)
def test_a_damaged_annotation_is_named(tmp_path, capsys, content, said):
    root = make_project(tmp_path / "project")
    text(root / "ds2/ann/c.json", [content])
    error = fails(capsys, "person", root, "--out", tmp_path / "out")
    assert said in error and "c.json" in error and not (tmp_path / "out/all.csv").exists()


def test_wrong_person_projects_are_refused(tmp_path, capsys):
    assert "no such folder" in fails(capsys, "person", tmp_path / "none", "--out", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert "no images; it must be a project export" in fails(
        capsys, "person", tmp_path / "empty", "--out", tmp_path / "out"
    )
    root = make_project(tmp_path / "project")
    assert "no object is called dog, but neutral, person_bmp, person_poly" in fails(
        capsys, "person", root, "--out", tmp_path / "out", "--people", "dog"
    )
    (root / "ds2/ann/z.json").unlink()
    assert "z.png: no z.png.json or z.json" in fails(capsys, "person", root, "--out", tmp_path / "out2")


# Oxford-IIIT Pet

TRIMAP = [[1, 3, 2], [1, 2, 2]]


def make_pets(root: Path) -> Path:
    base = root / "oxford-iiit-pet"
    for name in ("Abyssinian_1", "great_pyrenees_2", "Bengal_7"):
        photo(base / "images" / f"{name}.jpg", (2, 3))
        write(base / "annotations/trimaps" / f"{name}.png", TRIMAP)
    text(base / "annotations/trainval.txt", ["great_pyrenees_2 16 2 1", "Abyssinian_1 1 1 1"])
    text(base / "annotations/test.txt", ["Bengal_7 6 1 2"])
    return root


@pytest.mark.parametrize(
    "flags,stored,classes",
    [
        ([], [[255, 255, 0], [255, 0, 0]], 1),
        (["--border", "ignore"], [[1, 255, 0], [1, 0, 0]], 2),
        (["--target", "breed"], [[16, 16, 0], [16, 0, 0]], 38),
        (["--target", "breed", "--border", "ignore"], [[16, 255, 0], [16, 0, 0]], 38),
    ],
)
def test_trimaps_of_pets(tmp_path, capsys, flags, stored, classes):
    run("pet", make_pets(tmp_path / "data"), "--out", tmp_path / "out", *flags)
    said = capsys.readouterr()
    assert f"train with --classes {classes}\n" in said.out and "test has 1 images, 3669 were published" in said.err
    assert pixels(tmp_path, "out/mask/great_pyrenees_2.png") == stored
    frame = read_list(tmp_path / "out/trainval.csv")
    theirs = torchvision.datasets.OxfordIIITPet(tmp_path / "data")
    assert frame["img"].tolist() == [str(path) for path in theirs._images]
    assert frame["label"].astype(int).tolist() == [label + 1 for label in theirs._labels] == [16, 1]
    assert read_mask(frame["filename"][0], classes).shape == (2, 3)
    if classes == 38:
        assert pd.read_csv(tmp_path / "out/classes.csv").loc[16, "name"] == "great pyrenees"


def test_wrong_folders_of_pets_are_refused(tmp_path, capsys):
    out = ("--out", tmp_path / "out")
    assert "--download" in fails(capsys, "pet", tmp_path, *out)
    root = make_pets(tmp_path / "data")
    text(root / "oxford-iiit-pet/annotations/test.txt", ["Bengal_7 60 1 2"])
    assert "test.txt: `Bengal_7 60 1 2` is not `name breed species number`" in fails(capsys, "pet", root, *out)
    make_pets(root)
    write(root / "oxford-iiit-pet/annotations/trimaps/Bengal_7.png", [[0, 1]])
    assert "Bengal_7.png: holds 0, which is no class" in fails(capsys, "pet", root, *out)
    (root / "oxford-iiit-pet/images/Bengal_7.jpg").unlink()
    assert "Bengal_7.jpg: no such file; get the file again" in fails(capsys, "pet", root, *out)


def test_nothing_is_downloaded_unless_asked_for_and_a_failure_is_one_line(tmp_path, capsys, monkeypatch):
    asked = []

    def offline(root, *_, **how):
        asked.append((Path(root).name, how))
        raise OSError("network unreachable")

    for name in ("OxfordIIITPet", "VOCSegmentation"):
        monkeypatch.setattr(torchvision.datasets, name, offline)
    out = ("--out", tmp_path / "out")
    fails(capsys, "pet", tmp_path, *out)
    fails(capsys, "voc", tmp_path, *out)
    assert not asked
    for name in ("pet", "voc"):
        error = fails(capsys, name, tmp_path / name, *out, "--download")
        assert "the download failed (network unreachable); get " in error and ".tar" in error
    assert asked == [("pet", {"download": True}), ("voc", {"download": True})]
    monkeypatch.undo()
    make_pets(tmp_path / "there")
    run("pet", tmp_path / "there", *out, "--download")  # it is there, so the network is not needed


# Pascal VOC 2012 and SBD


def palette_png(path: Path, mask) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(np.asarray(mask, np.uint8))
    picture.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    picture.save(path)


def sbd_mat(path: Path, mask) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    edges = np.empty((20, 1), object)
    edges[:] = [[np.zeros((2, 2))]] * 20
    savemat(
        path, {"GTcls": {"Boundaries": edges, "Segmentation": np.asarray(mask, np.uint8), "CategoriesPresent": [[15]]}}
    )


def make_voc(root: Path) -> tuple[Path, Path]:
    base, sbd = root / "VOC/VOCdevkit/VOC2012", root / "SBD"
    for name in ("2007_a", "2007_b", "2008_c"):
        photo(base / "JPEGImages" / f"{name}.jpg", (2, 2))
        palette_png(base / "SegmentationClass" / f"{name}.png", [[0, 15], [20, 255]])
    text(base / "ImageSets/Segmentation/train.txt", ["2007_b", "2007_a"])
    text(base / "ImageSets/Segmentation/val.txt", ["2008_c"])
    for name in ("2007_a", "2008_c", "2008_d", "2009_e"):
        photo(sbd / "img" / f"{name}.jpg", (2, 2))
        sbd_mat(sbd / "cls" / f"{name}.mat", [[0, 15], [20, 7]])
    text(sbd / "train.txt", ["2009_e", "2008_c"])
    text(sbd / "val.txt", ["2008_d", "2007_a"])
    return root / "VOC", sbd


def test_voc_is_read_as_it_is_and_sbd_leaves_out_its_validation_images(tmp_path, capsys):
    root, sbd = make_voc(tmp_path)
    run("voc", root, "--out", tmp_path / "out", "--data-root", tmp_path)
    assert "train has 2 images, 1464 were published" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["classes.csv", "train.csv", "valid.csv"]
    run("voc", root, "--out", tmp_path / "out", "--data-root", tmp_path, "--sbd", sbd)
    stems = {path.stem: [Path(n).stem for n in read_list(path)["img"]] for path in (tmp_path / "out").glob("[tv]*.csv")}
    assert stems["train"] == ["2007_b", "2007_a"] and stems["valid"] == ["2008_c"]
    assert stems["train_sbd"] == ["2008_d", "2009_e"] and stems["train_aug"] == stems["train"] + stems["train_sbd"]
    theirs = torchvision.datasets.VOCSegmentation(root)
    frame = read_list(tmp_path / "out/train_aug.csv")
    assert [str(tmp_path / name) for name in frame["filename"][:2]] == theirs.targets
    assert read_mask(tmp_path / frame["filename"][0], 21).tolist() == [[0, 15], [20, 255]]
    assert pixels(tmp_path, frame["filename"][2]) == [[0, 15], [20, 7]]


def test_sbd_annotations_are_those_that_torchvision_reads(tmp_path):
    _, sbd = make_voc(tmp_path)
    theirs = torchvision.datasets.SBDataset(sbd, mode="segmentation")
    assert np.array_equal(voc.read_sbd(theirs.masks[0]), np.array(theirs[0][1]))


def test_wrong_voc_folders_are_refused(tmp_path, capsys):
    root, sbd = make_voc(tmp_path)
    words = (root, "--out", tmp_path / "out")
    (sbd / "cls/2008_d.mat").write_bytes(b"MATLAB 5.0 and then nothing")
    assert "2008_d.mat: not an SBD annotation" in fails(capsys, "voc", *words, "--sbd", sbd)
    savemat(sbd / "cls/2008_d.mat", {"GTinst": {"Segmentation": np.zeros((2, 2), np.uint8)}})
    assert "2008_d.mat: not an SBD annotation" in fails(capsys, "voc", *words, "--sbd", sbd)
    sbd_mat(sbd / "cls/2008_d.mat", [[21, 0]])
    assert "2008_d.mat: holds 21" in fails(capsys, "voc", *words, "--sbd", sbd)
    (sbd / "cls/2008_d.mat").unlink()
    assert "2008_d.mat: no such file; get the file again" in fails(capsys, "voc", *words, "--sbd", sbd)
    assert "no folder cls" in fails(capsys, "voc", *words, "--sbd", tmp_path)
    palette_png(root / "VOCdevkit/VOC2012/SegmentationClass/2007_a.png", [[21, 0]])
    assert "2007_a.png: class 21, but --classes 21 allows 0 to 20 and 255 (ignore); get the file again" in fails(
        capsys, "voc", *words
    )
    text(root / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt", ["2008_c", "2008_c"])
    assert "val.txt: names an image twice" in fails(capsys, "voc", *words)
    (root / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").unlink()
    assert "val.txt: cannot be read (No such file or directory)" in fails(capsys, "voc", *words)


# Cityscapes


def test_the_classes_of_cityscapes_are_those_of_the_publisher():
    theirs = {label.id % 256: 255 if label.train_id < 0 else label.train_id for label in cityscapes_labels()}
    assert cityscapes.train_ids() == theirs
    assert list(cityscapes.CLASSES) == [label.name for label in cityscapes_labels() if 0 <= label.train_id < 255]


def cityscapes_labels():
    return torchvision.datasets.Cityscapes.classes


def make_cityscapes(root: Path) -> Path:
    names = {"train": ("aachen", "aachen_000000_000019"), "val": ("lindau", "lindau_000000_000019")}
    for split, (city, name) in names.items():
        photo(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", (2, 3))
        write(root / "gtFine" / split / city / f"{name}_gtFine_labelIds.png", [[7, 0, 255], [33, 24, 29]])
        write(root / "gtFine" / split / city / f"{name}_gtFine_instanceIds.png", [[7, 0, 255], [33, 24, 29]])
        write(root / "gtCoarse" / split / city / f"{name}_gtCoarse_labelIds.png", [[7, 7, 0], [0, 24, 0]])
    write(root / "gtCoarse/train_extra/bayreuth/bayreuth_000000_000042_gtCoarse_labelIds.png", [[8, 9, 10], [0, 0, 0]])
    return root


def test_cityscapes_fine_and_coarse(tmp_path):
    root, out = make_cityscapes(tmp_path / "cityscapes"), tmp_path / "out"
    run("cityscapes", root, "--out", out, "--data-root", tmp_path)
    assert not (out / "train_extra.csv").exists()  # its images are in an archive of their own
    train, coarse = read_list(out / "train.csv"), read_list(out / "train_coarse.csv")
    assert train["img"].tolist() == ["cityscapes/leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png"]
    assert pixels(tmp_path, train["filename"][0]) == [[0, 255, 255], [18, 11, 255]]
    assert pixels(tmp_path, coarse["filename"][0]) == [[0, 0, 255], [255, 11, 255]]
    assert train["iterations"].tolist() == [0] and coarse["iterations"].tolist() == [1]
    assert coarse["clean"].tolist() == train["filename"].tolist() and coarse["op"].tolist() == ["coarse"]
    assert read_list(out / "valid_coarse.csv")["clean"].tolist() == read_list(out / "valid.csv")["filename"].tolist()
    photo(root / "leftImg8bit/train_extra/bayreuth/bayreuth_000000_000042_leftImg8bit.png", (2, 3))
    run("cityscapes", root, "--out", out, "--data-root", tmp_path)
    extra = read_list(out / "train_extra.csv")
    assert pixels(tmp_path, extra["filename"][0]) == [[1, 255, 255], [255, 255, 255]] and "clean" not in extra


def test_train_ids_made_by_the_publishers_scripts_are_used(tmp_path):
    root = make_cityscapes(tmp_path / "cityscapes")
    made = root / "gtFine/train/aachen/aachen_000000_000019_gtFine_labelTrainIds.png"
    write(made, [[0, 255, 255], [18, 11, 255]])
    run("cityscapes", root, "--out", tmp_path / "out")
    assert read_list(tmp_path / "out/train.csv")["filename"].tolist() == [str(made)]
    assert read_list(tmp_path / "out/train_coarse.csv")["clean"].tolist() == [str(made)]


def test_wrong_cityscapes_folders_are_refused(tmp_path, capsys):
    out = ("--out", tmp_path / "out")
    assert "no folder leftImg8bit in it; unpack leftImg8bit_trainvaltest.zip" in fails(
        capsys, "cityscapes", tmp_path, *out
    )
    root = make_cityscapes(tmp_path / "cityscapes")
    write(root / "gtFine/val/lindau/lindau_000000_000019_gtFine_labelIds.png", [[34]])
    assert "lindau_000000_000019_gtFine_labelIds.png: holds 34" in fails(capsys, "cityscapes", root, *out)
    (root / "gtFine/val/lindau/lindau_000000_000019_gtFine_labelIds.png").unlink()
    assert "holds no */*_gtFine_labelIds.png" in fails(capsys, "cityscapes", root, *out)
    photo(root / "leftImg8bit/train/aachen/aachen_000001_000019_leftImg8bit.png")
    assert "aachen_000001_000019_leftImg8bit.png: has no mask" in fails(capsys, "cityscapes", root, *out)


# CamVid, ADE20K, COCO-Stuff


def make_camvid(root: Path, tutorial: bool) -> Path:
    for split in ("train", "val", "test"):
        images, masks = (split, f"{split}annot") if tutorial else (f"{split}/image", f"{split}/mask")
        for stem in ("b_1", "a_2"):
            photo(root / images / f"{split}_{stem}.png", (2, 2))
            write(root / masks / f"{split}_{stem}.png", [[0, 11], [10, 3]])
        if tutorial:
            names = [f"/SegNet/CamVid/{{}}/{split}_{stem}.png" for stem in ("b_1", "a_2")]
            text(root / f"{split}.txt", [f"{n.format(split)} {n.format(split + 'annot')}" for n in names])
    return root


@pytest.mark.parametrize("tutorial", [True, False])
def test_camvid_in_both_layouts(tmp_path, tutorial):
    root = make_camvid(tmp_path / "CamVid", tutorial)
    run("camvid", tmp_path if not tutorial else root, "--out", tmp_path / "out")
    for name, split in (("train", "train"), ("valid", "val"), ("test", "test")):
        frame = read_list(tmp_path / f"out/{name}.csv")
        order = ("b_1", "a_2") if tutorial else ("a_2", "b_1")  # that of the list, or of the names
        assert [Path(one).stem for one in frame["img"]] == [f"{split}_{stem}" for stem in order]
        assert pixels(tmp_path, frame["filename"][0]) == [[0, 255], [10, 3]]
    assert pd.read_csv(tmp_path / "out/classes.csv")["name"].tolist()[8:] == ["car", "pedestrian", "bicyclist"]


def test_wrong_camvid_folders_are_refused(tmp_path, capsys):
    out = ("--out", tmp_path / "out")
    assert "no folder train or camvid/train or CamVid/train in it" in fails(capsys, "camvid", tmp_path, *out)
    root = make_camvid(tmp_path / "data", True)
    text(root / "val.txt", ["val/val_c.png valannot/val_c.png"])
    assert "val_c.png: has no mask;" in fails(capsys, "camvid", root, *out)
    (root / "val.txt").unlink()
    (root / "valannot/val_a_2.png").write_bytes((root / "valannot/val_a_2.png").read_bytes()[:-20])
    assert "val_a_2.png: truncated, the end of the file is missing; get the file again" in fails(
        capsys, "camvid", root, *out
    )
    write(root / "valannot/val_a_2.png", [[12, 0]])
    assert "val_a_2.png: holds 12" in fails(capsys, "camvid", root, *out)
    (root / "testannot/test_a_2.png").unlink()
    assert "test_a_2.png: has no mask" in fails(capsys, "camvid", root, *out)


def test_ade20k_moves_its_classes_down_by_one(tmp_path):
    root = tmp_path / "ADEChallengeData2016"
    for split in ("training", "validation"):
        photo(root / "images" / split / f"ADE_{split}_1.jpg", (1, 4))
        write(root / "annotations" / split / f"ADE_{split}_1.png", [[0, 1, 2, 150]])
    names = ["Idx\tRatio\tTrain\tVal\tStuff\tName", "1\t0.2\t9\t9\t1\twall", "2\t0.1\t9\t9\t1\tbuilding, edifice"]
    text(root / "objectInfo150.txt", names)
    run("ade20k", tmp_path, "--out", tmp_path / "out")
    assert pixels(tmp_path, "out/mask/training/ADE_training_1.png") == [[255, 0, 1, 149]]
    assert len(read_list(tmp_path / "out/valid.csv")) == 1
    assert pd.read_csv(tmp_path / "out/classes.csv")["name"].tolist() == ["wall", "building"]


def test_cocostuff_closes_its_gaps(tmp_path, capsys):
    values = [[0, 10, 11, 12], [90, 91, 181, 255]]
    for split in ("train2017", "val2017"):
        photo(tmp_path / "images" / split / "000000000009.jpg", (2, 4))
        write(tmp_path / "annotations" / split / "000000000009.png", values)
    write(tmp_path / "annotations/val2017/000000000010.png", values)
    run("cocostuff", tmp_path, "--out", tmp_path / "out")
    assert pixels(tmp_path, "out/mask/val2017/000000000009.png") == [[0, 10, 255, 11], [255, 80, 170, 255]]
    assert "1 masks have no image and are left out, the first is 000000000010.png" in capsys.readouterr().err
    labels = "12 street sign, 26 hat, 29 shoe, 30 eye glasses, 45 plate, 66 mirror, 68 window, 69 desk, 71 door"
    holes = [int(label.split()[0]) - 1 for label in f"{labels}, 83 blender, 91 hair brush".split(", ")]
    assert list(cocostuff.HOLES) == holes
    kept = sorted(k for k in cocostuff.classes().values() if k < 255)
    assert kept == list(range(171)) and len(set(cocostuff.NAMES)) == 171
    named = {k: cocostuff.NAMES[cocostuff.classes()[k]] for k in (0, 12, 79, 89, 91, 148, 181)}  # labels.txt, less 1
    assert list(named.values()) == ["person", "stop sign", "toaster", "toothbrush", "banner", "road", "wood"]
    write(tmp_path / "annotations/val2017/000000000009.png", [[182]])
    os.utime(tmp_path / "annotations/val2017/000000000009.png", (2e9, 2e9))
    assert "000000000009.png: holds 182" in fails(capsys, "cocostuff", tmp_path, "--out", tmp_path / "out")


# what all have in common


def test_the_same_command_does_nothing_and_an_interrupted_one_goes_on(tmp_path, capsys):
    root, out = make_camvid(tmp_path / "CamVid", False), tmp_path / "out"
    run("camvid", root, "--out", out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.*")}
    assert "6 masks converted" in capsys.readouterr().out
    run("camvid", root, "--out", out)
    said = capsys.readouterr().out
    assert "the same lists are there already" in said and "converted" not in said
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.*")} == before
    (out / "mask/val/val_a_2.png").unlink()
    write(root / "test/mask/test_b_1.png", [[1, 1], [1, 1]])  # corrected by its owner
    os.utime(root / "test/mask/test_b_1.png", (2e9, 2e9))
    run("camvid", root, "--out", out)
    assert "2 masks converted" in capsys.readouterr().out
    assert pixels(tmp_path, "out/mask/test/test_b_1.png") == [[1, 1], [1, 1]]


def test_masks_made_otherwise_do_not_pass_for_these(tmp_path, capsys):
    root, out = make_pets(tmp_path / "data"), tmp_path / "out"
    run("pet", root, "--out", out)
    before = (out / "mask/Bengal_7.png").read_bytes()
    assert "were made with border pet; choose another --out" in fails(
        capsys, "pet", root, "--out", out, "--border", "ignore"
    )
    assert (out / "mask/Bengal_7.png").read_bytes() == before
    (out / "prepared.json").unlink()
    assert "holds files, and no prepared.json says what they are" in fails(capsys, "pet", root, "--out", out)


def test_a_damaged_mask_stops_before_any_list_is_written(tmp_path, capsys):
    root = make_pets(tmp_path / "data")
    (root / "oxford-iiit-pet/annotations/trimaps/Bengal_7.png").write_bytes(b"")
    assert "Bengal_7.png: the file is empty; get the file again" in fails(
        capsys, "pet", root, "--out", tmp_path / "out"
    )
    assert not list((tmp_path / "out").glob("*.csv"))


def test_a_table_refuses_values_that_it_does_not_know():
    table = table_of({0: 5, 9: 255})
    assert remap(np.array([[0, 9]], np.uint8), table, "m.png").tolist() == [[5, 255]]
    assert remap(np.zeros((0, 3), np.uint8), table, "m.png").shape == (0, 3)
    with pytest.raises(InputError, match=r"m\.png: holds 8"):
        remap(np.array([[0, 8, 3]], np.uint8), table, "m.png")


def test_relative_paths_and_threads(tmp_path, capsys, monkeypatch):
    make_camvid(tmp_path / "CamVid", False)
    monkeypatch.chdir(tmp_path)
    COMMANDS["camvid"][0](SetArgs("CamVid", "out", workers=3))
    assert read_list("out/train.csv")["filename"][0] == "out/mask/train/train_a_2.png"
    assert cv2.imread("out/mask/train/train_a_2.png", cv2.IMREAD_UNCHANGED).ndim == 2
    assert "--workers -1" in fails(capsys, "camvid", "CamVid", "--out", "other", "--workers", -1)
    assert pet.trimap_table(pet.PetArgs("a", "b", border="ignore"), 7)[[1, 2, 3]].tolist() == [1, 0, 255]
