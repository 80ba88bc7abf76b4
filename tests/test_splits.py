"""Labelled and unlabelled halves, published text lists, and masks of groups: hand values, and files byte for byte."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from utils.args import launch_commands
from utils.errors import InputError
from utils.images import read_mask, write_mask
from utils.lists import read_list
from utils.prepare_data import COMMANDS
from utils.regroup import read_mapping
from utils.splits import LabelledArgs, draw_order, labelled_counts, read_text_list

PAIRS = "JPEGImages/2007_000733.jpg SegmentationClass/2007_000733.png\n"
PAIRS += "JPEGImages/2010_004493.jpg SegmentationClass/2010_004493.png"
IDS = "2007_000733\n2010_004493"
CITY = "leftImg8bit/train/ulm/ulm_000001_000019_leftImg8bit.png\n"
CITY += "leftImg8bit/train/jena/jena_000005_000019_leftImg8bit.png"


def tool(*words):
    launch_commands(COMMANDS, [str(word) for word in words])


def make_list(root, masks, name="list.csv"):
    """A list of masks (H, W); their images are never opened."""
    (root / "m").mkdir(exist_ok=True)
    for i, mask in enumerate(masks):
        write_mask(root / f"m/{i}.png", np.asarray(mask, np.uint8), 200)
    rows = [(f"i/{i}.jpg", f"m/{i}.png", f"site {i}") for i in range(len(masks))]
    pd.DataFrame(rows, columns=["img", "filename", "site"]).to_csv(root / name, index=False)
    return root / name


@pytest.mark.parametrize(
    ("count", "shares", "published"),
    [
        (1464, ["1/16", "1/8", "1/4", "1/2", "1"], [92, 183, 366, 732, 1464]),
        (10582, ["1/16", "1/8", "1/4", "1/2"], [662, 1323, 2646, 5291]),
        (2975, ["1/16", "1/8", "1/4", "1/2", "1/30"], [186, 372, 744, 1488, 100]),
        (100, ["0.07", "7/100"], [7]),  # 0.07 * 100 is above 7 in floating point
    ],
)
def test_shares_are_rounded_as_the_published_splits(count, shares, published):
    found = labelled_counts(LabelledArgs("all.csv", "out", fraction=shares), count)
    assert found == sorted(published)


def test_smaller_draws_are_the_beginning_of_larger_ones_and_seeds_differ():
    order = draw_order(50, 3)
    assert sorted(order) == list(range(50)) and (order == draw_order(50, 3)).all()
    assert (order != draw_order(50, 4)).any()
    has = np.random.default_rng(0).random((50, 5)) < 0.5
    balanced = draw_order(50, 3, has)
    assert sorted(balanced) == list(range(50)) and (balanced == draw_order(50, 3, has)).all()


def test_a_balanced_draw_takes_the_class_that_the_fewest_chosen_images_hold():
    # class 0 everywhere, 1 in ten images, 2 in two, 3 in one, 4 nowhere
    has = np.zeros((100, 5), bool)
    has[:, 0], has[20:30, 1], has[[40, 60], 2], has[77, 3] = True, True, True, True
    for seed in range(20):
        order = draw_order(100, seed, has)
        assert order[0] == 77  # the rarest class first
        assert has[order[:3]].sum(0).tolist() == [3, 1, 1, 1, 0]
        assert has[order[:4]].sum(0).tolist() == [4, 1, 2, 1, 0]
        assert has[order[:13]].sum(0).tolist() == [13, 10, 2, 1, 0]  # all there is of them
        assert sorted(order) == list(range(100))


def test_split_writes_both_halves_and_does_nothing_the_second_time(tmp_path, capsys):
    path = make_list(tmp_path, [[[0]]] * 33)
    words = ["split", path, "--labelled", "5", "--fraction", "1/8", "--seed", "1", "--out", tmp_path / "out"]
    tool(*words)
    # ceil(33 / 8) is 5 as well
    labelled, unlabelled = (read_list(tmp_path / f"out/{half}_5.csv", ("img",)) for half in ("labelled", "unlabelled"))
    assert len(labelled) == 5 and len(unlabelled) == 28 and len(list((tmp_path / "out").iterdir())) == 2
    assert list(labelled.columns[:-1]) == ["img", "filename", "iterations", "site"] and (labelled.iterations == 0).all()
    assert list(unlabelled.columns) == ["img", "line"]
    assert sorted([*labelled.img, *unlabelled.img]) == sorted(read_list(path).img)
    capsys.readouterr()
    tool(*words)
    assert "already" in capsys.readouterr().out
    tool("split", path, "--labelled", "9", "20", "--seed", "1", "--out", tmp_path / "more", "--keep-masks")
    nine, twenty = (set(read_list(tmp_path / f"more/labelled_{k}.csv").img) for k in (9, 20))
    assert set(labelled.img) < nine < twenty
    kept = read_list(tmp_path / "more/unlabelled_20.csv")
    assert len(kept) == 13 and (kept.filename == kept.img.str.replace("i/", "m/").str.replace("jpg", "png")).all()


def test_all_labelled_leaves_no_unlabelled_list(tmp_path):
    tool("split", make_list(tmp_path, [[[0]]] * 3), "--fraction", "1", "--out", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["labelled_3.csv"]


def test_a_balanced_split_reads_the_masks_and_extra_images_are_unlabelled(tmp_path):
    masks = [[[0, 255]]] * 10 + [[[0, 2]]]
    path = make_list(tmp_path, masks)
    (tmp_path / "tags.csv").write_text("img,label\nt/1.jpg,0 2\nt/2.jpg,1\n")
    words = ["--labelled", "1", "--balanced", "--classes", "3", "--data-root", tmp_path, "--out", tmp_path / "out"]
    tool("split", path, *words, "--extra", tmp_path / "tags.csv")
    assert read_list(tmp_path / "out/labelled_1.csv").img.tolist() == ["i/10.jpg"]
    assert read_list(tmp_path / "out/unlabelled_1.csv", ("img",)).img.tolist()[-2:] == ["t/1.jpg", "t/2.jpg"]


def test_image_level_classes_come_from_the_masks(tmp_path, capsys):
    path = make_list(tmp_path, [[[0, 255]], [[2, 1]], [[0, 2]], [[1, 1]]])
    words = ["--classes", "3", "--data-root", tmp_path]
    tool("image-labels", path, *words, "--out", tmp_path / "with.csv")
    frame, given = read_list(tmp_path / "with.csv"), read_list(path)
    assert frame.label.tolist() == ["0", "1 2", "0 2", "1"]
    assert frame.drop(columns="label").equals(given)
    tool("image-labels", path, *words, "--out", tmp_path / "with.csv")
    assert "already" in capsys.readouterr().out
    (tmp_path / "tags.csv").write_text("img,label\nt/1.jpg,0 2\n")
    more = ["--extra", tmp_path / "tags.csv", "--out", tmp_path / "out"]
    tool("split", path, "--labelled", "2", "--image-labels", *words, *more)
    few, many = (read_list(tmp_path / f"out/{half}_2.csv", ("img", "label")) for half in ("labelled", "unlabelled"))
    known = dict(zip(frame.img, frame.label, strict=True)) | {"t/1.jpg": "0 2"}
    assert list(many.columns) == ["img", "label", "line"] and len(few) == 2 and len(many) == 3
    assert all(known[row.img] == row.label for half in (few, many) for row in half.itertuples())


def test_a_weak_list_loses_the_images_with_masks_of_every_count(tmp_path):
    """Whatever path they have there; the other rows stay as they are, in their order."""
    path = make_list(tmp_path, [[[0]]] * 5)
    (tmp_path / "link").symlink_to(tmp_path / "i")
    names = [f"i/./{i}.jpg" for i in range(3)] + ["link/3.jpg", str(tmp_path / "i/4.jpg"), "t/9.jpg"]
    (tmp_path / "tags.csv").write_text("img,label,site\n" + "".join(f"{name},0 1,s\n" for name in names))
    words = ["split", path, "--weak", tmp_path / "tags.csv", "--data-root", tmp_path, "--keep-masks", "--image-labels"]
    tool(*words, "--labelled", "2", "5", "--out", tmp_path / "out")
    for k in (2, 5):
        few, weak = (read_list(tmp_path / f"out/{half}_{k}.csv", ("img",)) for half in ("labelled", "unlabelled"))
        taken = {int(Path(name).stem) for name in few.img}
        assert len(taken) == k and weak.img.tolist() == [name for i, name in enumerate(names) if i not in taken]
        assert list(weak.columns[:-1]) == ["img", "label", "site"] and set(weak.label) == {"0 1"}


def test_classes_of_binary_masks(tmp_path):
    path = make_list(tmp_path, [[[0, 255]], [[0, 0]], [[1, 1]]])
    tool("image-labels", path, "--data-root", tmp_path, "--out", tmp_path / "with.csv")
    assert read_list(tmp_path / "with.csv").label.tolist() == ["0 1", "0", "1"]


LABELS = {
    "class": (["--classes", "2"], "line 4: m/2.png: class 2, but --classes 2 allows 0 to 1"),
    "void": (["--classes", "3"], "line 5: its mask holds nothing but 255"),
    "classes": (["--classes", "0"], "--classes 0: must lie between 1 and 255"),
}


@pytest.mark.parametrize("mistake", LABELS)
@pytest.mark.parametrize(
    "words", [["image-labels", "list.csv"], ["split", "list.csv", "--labelled", "1", "--image-labels"]]
)
def test_masks_that_tell_no_label_are_named(words, mistake, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags, what = LABELS[mistake]
    make_list(tmp_path, [[[0]], [[1]], [[2]], [[255]]])
    with pytest.raises(SystemExit) as ended:
        tool(*words, *flags, "--out", "out.csv")
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and what in said and not Path("out.csv").exists()


@pytest.mark.parametrize(
    ("text", "folder", "style"), [(PAIRS, "SegmentationClass", "pairs"), (IDS, "SegmentationClassAug", "voc")]
)
def test_lists_of_pascal_voc_there_and_back_byte_for_byte(tmp_path, text, folder, style):
    (tmp_path / "92").mkdir()
    (tmp_path / "92/labeled.txt").write_text(text)
    tool("text", tmp_path / "92/labeled.txt", "--root", "data/VOC", "--out", tmp_path / "labelled.csv")
    frame = read_list(tmp_path / "labelled.csv")
    assert frame.img.tolist() == [f"data/VOC/JPEGImages/{i}.jpg" for i in ("2007_000733", "2010_004493")]
    assert frame.filename.tolist() == [f"data/VOC/{folder}/{i}.png" for i in ("2007_000733", "2010_004493")]
    assert frame.iterations.tolist() == [0, 0]
    back = ["--root", "data/VOC", "--style", style, "--out", tmp_path / "back.txt"]
    tool("text", tmp_path / "labelled.csv", *back)
    assert (tmp_path / "back.txt").read_text() == text
    tool("text", tmp_path / "92/labeled.txt", "--images-only", "--out", tmp_path / "unlabelled.csv")
    assert (tmp_path / "unlabelled.csv").read_text().splitlines()[:2] == ["img", "JPEGImages/2007_000733.jpg"]


def test_lists_of_cityscapes_there_and_back_byte_for_byte(tmp_path):
    (tmp_path / "one.txt").write_text(CITY)
    names = CITY.split()
    masks = [n.replace("leftImg8bit/", "gtFine/").replace("leftImg8bit.png", "gtFine_labelTrainIds.png") for n in names]
    (tmp_path / "two.txt").write_text("\n".join(f"{a} {b}" for a, b in zip(names, masks, strict=True)))
    for file, style in (("one", "cityscapes"), ("two", "pairs")):
        tool("text", tmp_path / f"{file}.txt", "--out", tmp_path / f"{file}.csv")
        frame = read_list(tmp_path / f"{file}.csv")
        assert frame.img.tolist() == names and frame.filename.tolist() == masks
        tool("text", tmp_path / f"{file}.csv", "--style", style, "--out", tmp_path / f"{file}_back.txt")
        assert (tmp_path / f"{file}_back.txt").read_bytes() == (tmp_path / f"{file}.txt").read_bytes()
    assert masks[0] == "gtFine/train/ulm/ulm_000001_000019_gtFine_labelTrainIds.png"


def test_windows_line_ends_blank_lines_and_a_mark_are_nothing(tmp_path):
    (tmp_path / "dos.txt").write_bytes(b"\xef\xbb\xbfa.jpg a.png\r\n\r\n  \r\nb.jpg\tb.png\r\n")
    frame = read_text_list(tmp_path / "dos.txt", "auto")
    assert frame.values.tolist() == [["a.jpg", "a.png", 1], ["b.jpg", "b.png", 4]]


def test_another_number_than_the_folder_says_is_pointed_out(tmp_path, capsys):
    (tmp_path / "183").mkdir()
    (tmp_path / "183/labeled.txt").write_text(IDS)
    tool("text", tmp_path / "183/labeled.txt", "--out", tmp_path / "a.csv")
    assert "2 images, but its folder says 183" in capsys.readouterr().err


TEXTS = {
    "no mask": ("a.jpg a.png\nb.jpg\n", [], "line 2: b.jpg has no mask"),
    "twice": ("a.jpg a.png\nb.jpg b.png\na.jpg a.png\n", [], "line 3: a.jpg is listed before in line 1"),
    "three words": ("a.jpg a.png 1\n", [], "line 1: 3 words"),
    "not a city": ("x.png\n", ["--style", "cityscapes"], "line 1: x.png does not look like leftImg8bit/"),
    "empty": ("\n\n", [], "the list is empty"),
    "two words": ("a.jpg a.png\n", ["--style", "voc"], "line 1: 2 words"),
}


@pytest.mark.parametrize("mistake", TEXTS)
def test_bad_text_lists_are_one_line(tmp_path, capsys, mistake):
    text, flags, what = TEXTS[mistake]
    (tmp_path / "bad.txt").write_text(text)
    with pytest.raises(SystemExit) as ended:
        tool("text", tmp_path / "bad.txt", "--out", tmp_path / "out.csv", *flags)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and what in said and not (tmp_path / "out.csv").exists()


SPLITS = {
    "too many": (["--labelled", "4"], "--labelled 4: the list has 3 images"),
    "none": (["--labelled", "0"], "--labelled 0"),
    "no count": ([], "how many labelled images"),
    "no share": (["--fraction", "1/0"], "--fraction 1/0"),
    "large share": (["--fraction", "17/16"], "must lie above 0 and not above 1"),
    "seed": (["--labelled", "1", "--seed", "-1"], "--seed -1"),
    "masks": (["--labelled", "1", "--balanced", "--classes", "2"], "line 4: m/2.png: class 2"),
    "both halves": (["--labelled", "1", "--extra", "list.csv"], "is in list.csv too"),
    "no masks": (["--labelled", "1", "--keep-masks", "--extra", "tags.csv"], "tags.csv: no column `filename`"),
    "no labels": (["--labelled", "1", "--image-labels", "--classes", "3", "--extra", "tags.csv"], "no column `label`"),
    "weak without labels": (["--labelled", "1", "--weak", "tags.csv"], "tags.csv: no column `label`"),
    "nothing weak": (["--labelled", "3", "--weak", "all.csv"], "all.csv: all its images are among the 3 with masks"),
    "weak and extra": (["--labelled", "1", "--weak", "all.csv", "--extra", "all.csv"], "--weak, --extra: one takes"),
    "twice": (["--labelled", "1", "--extra", "tags.csv", "tags.csv"], "t.jpg is listed twice"),
}


@pytest.mark.parametrize("mistake", SPLITS)
def test_impossible_splits_are_one_line(tmp_path, capsys, monkeypatch, mistake):
    monkeypatch.chdir(tmp_path)
    flags, what = SPLITS[mistake]
    make_list(tmp_path, [[[0]], [[1]], [[2]]])
    Path("tags.csv").write_text("img\nt.jpg\n")
    Path("all.csv").write_text("img,label\ni/0.jpg,0\ni/2.jpg,1\n")
    with pytest.raises(SystemExit) as ended:
        tool("split", "list.csv", "--out", "out", *flags)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and what in said and not Path("out").exists()


MAPPING = (
    "index,name,group,group_name\n0,null,0,background\n1,hat,1,clothes\n2,shoe,1,clothes\n3,dog,2,animal\n4,void,,\n"
)


def test_masks_of_groups(tmp_path, capsys):
    (tmp_path / "map.csv").write_text(MAPPING)
    path = make_list(tmp_path, [[[0, 1, 2], [3, 4, 255]], [[2, 2, 9]]])  # class 9 is not listed
    words = ["regroup", "--list", path, "--mapping", tmp_path / "map.csv", "--data-root", tmp_path]
    tool(*words, "--out", tmp_path / "groups")
    assert read_mask(tmp_path / "groups/0.png", 3).tolist() == [[0, 1, 1], [2, 255, 255]]
    assert read_mask(tmp_path / "groups/1.png", 3).tolist() == [[1, 1, 255]]
    frame = read_list(tmp_path / "groups.csv")
    assert frame.filename.tolist() == ["groups/0.png", "groups/1.png"] and frame.label.tolist() == ["0 1 2", "1"]
    assert frame.img.tolist() == ["i/0.jpg", "i/1.jpg"] and frame.site.tolist() == ["site 0", "site 1"]
    assert (tmp_path / "groups.txt").read_text() == "background\nclothes\nanimal\n"
    times = [file.stat().st_mtime_ns for file in (tmp_path / "groups").iterdir()]
    (tmp_path / "groups/1.png").unlink()  # as after a kill
    tool(*words, "--out", tmp_path / "groups")
    assert "already" in capsys.readouterr().out and read_mask(tmp_path / "groups/1.png", 3).tolist() == [[1, 1, 255]]
    assert (tmp_path / "groups/0.png").stat().st_mtime_ns in times
    (tmp_path / "map.csv").write_text(MAPPING.replace("3,dog,2", "3,dog,3"))
    with pytest.raises(SystemExit):
        tool(*words, "--out", tmp_path / "groups")
    assert "line 2: " in capsys.readouterr().err
    assert read_mask(tmp_path / "groups/0.png", 3).tolist() == [[0, 1, 1], [2, 255, 255]]


def test_image_level_classes_are_mapped_where_there_are_no_masks(tmp_path):
    (tmp_path / "map.csv").write_text(MAPPING)
    (tmp_path / "tags.csv").write_text("img,label\na.jpg,0 2 3\nb.jpg,1 2 4 9\n")
    tool("regroup", "--list", tmp_path / "tags.csv", "--mapping", tmp_path / "map.csv", "--out", tmp_path / "out")
    assert (tmp_path / "out.csv").read_text() == "img,label\na.jpg,0 1 2\nb.jpg,1\n"


MAPPINGS = {
    "column": ("index,name\n0,a\n", "needs columns index and group"),
    "twice": ("index,group\n0,0\n0,1\n", "line 3: class 0 is in line 2 too"),
    "number": ("index,group\n0,zero\n", "line 2: class 0, group zero"),
    "range": ("index,group\n255,0\n", "line 2: class 255, group 0"),
    "names": ("index,group,group_name\n0,0,a\n1,0,b\n", "group 0 is called b here and a before"),
    "nothing": ("index,group\n0,255\n", "no class has a group"),
}


@pytest.mark.parametrize("mistake", MAPPINGS)
def test_bad_mappings_are_named(tmp_path, mistake):
    text, what = MAPPINGS[mistake]
    (tmp_path / "map.csv").write_text(text)
    with pytest.raises(InputError, match=what):
        read_mapping(tmp_path / "map.csv")
    with pytest.raises(InputError, match="no such file"):
        read_mapping(tmp_path / "none.csv")


def test_masks_that_cannot_be_read_are_named(tmp_path, capsys):
    (tmp_path / "map.csv").write_text(MAPPING)
    path = make_list(tmp_path, [[[0]], [[1]]])
    (tmp_path / "m/1.png").write_bytes(b"no mask")
    words = ["--mapping", tmp_path / "map.csv", "--data-root", tmp_path, "--out", tmp_path / "out"]
    with pytest.raises(SystemExit):
        tool("regroup", "--list", path, *words)
    assert "line 3: " in capsys.readouterr().err and not (tmp_path / "out.csv").exists()
