"""What a user gets wrong: one clear line that names the file and the row, before the first epoch, exit code 2."""

import io
import os
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import test_scripts
from conftest import draw_set
from PIL import Image

from utils.args import TrainArgs, launch
from utils.errors import InputError
from utils.images import read_image, read_mask, read_pair, resize_mask, to_binary, write_mask
from utils.lists import inspect_list, join, read_list, unique_stems, weight_score, write_list

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path):
    """Four images with masks and a list of them that a test may spoil."""
    rows = draw_set(tmp_path, 4)
    pd.DataFrame(rows, columns=["img", "filename"]).assign(weight=0.5).to_csv(tmp_path / "list.csv", index=False)
    return tmp_path


def train(folder, *flags, script="train_without_weight.py"):
    lists = ["--train_csv", "list.csv", "--valid_csv", "list.csv", "--test_csv", ""]
    return test_scripts.launch(script, folder, folder / "runs", "r", *lists, *flags)


def spoil(folder, row, **cells):
    frame = pd.read_csv(folder / "list.csv", dtype=str)
    for column, value in cells.items():
        frame.loc[row, column] = value
    frame.to_csv(folder / "list.csv", index=False)


def fails(folder, pattern, *flags, **how):
    with pytest.raises(InputError, match=pattern) as caught:
        train(folder, *flags, **how)
    assert "\n" not in str(caught.value)
    assert not (folder / "runs/r/log.jsonl").exists()


def encoded(kind, picture=None, **how):
    """The bytes of a 32x32 photograph (or `picture`, RGB) in a format of Pillow."""
    if picture is None:
        picture = np.random.default_rng(3).integers(0, 256, (32, 32, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, kind, **how)
    return file.getvalue()


def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_bomb():
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


def jpeg_bomb():
    raw = bytearray(encoded("JPEG"))
    struct.pack_into(">HH", raw, raw.index(b"\xff\xc0") + 5, 60000, 60000)
    return bytes(raw)


def bmp_bomb():
    raw = bytearray(encoded("BMP"))
    struct.pack_into("<ii", raw, 18, 60000, 60000)
    return bytes(raw)


def tiff_bomb():
    tags = [(256, 60000), (257, 60000), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 60000), (279, 16)]
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + body + bytes(20)


def webp_bomb():
    size = struct.pack("<I", 59999)[:3]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + size + size + encoded("WEBP", lossless=True)[12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


def with_thumbnail(cut):
    """A JPEG whose EXIF thumbnail is a whole JPEG with its own end marker, cut to a share of its length."""
    thumbnail, raw = encoded("JPEG", quality=30), encoded("JPEG")
    body = b"Exif\0\0" + bytes(20) + thumbnail
    raw = raw[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + raw[2:]
    return raw[: round(len(raw) * cut)]


def png_with_wrong_middle():
    raw = bytearray(encoded("PNG"))
    raw[len(raw) // 2] ^= 1
    return bytes(raw)


LISTS = ["--train_csv", "a", "--valid_csv", "b"]
BOMB = "the file claims 60000x60000, more than 178 million pixels; make it smaller, or correct it"
HOSTILE = {
    "empty": (lambda: b"", "the file is empty"),
    "text": (lambda: b"no picture at all", "not an image that can be decoded"),
    "truncated png": (lambda: encoded("PNG")[:1500], "truncated, the end of the file is missing"),
    "png without its last byte": (lambda: encoded("PNG")[:-1], "truncated, the end of the file is missing"),
    "png signature": (lambda: encoded("PNG")[:8], "truncated, the end of the file is missing"),
    "damaged png": (png_with_wrong_middle, "damaged, a checksum of the PNG is wrong; get the file again"),
    "truncated jpeg": (lambda: encoded("JPEG")[:-9], "truncated, the end of the file is missing"),
    "jpeg cut before its frame": (lambda: encoded("JPEG")[:30], "truncated, the end of the file is missing"),
    "jpeg cut behind its thumbnail": (lambda: with_thumbnail(0.9), "truncated, the end of the file is missing"),
    "truncated bmp": (lambda: encoded("BMP")[:200], "not an image that can be decoded"),
    "truncated tiff": (lambda: encoded("TIFF")[:100], "not an image that can be decoded"),
    "truncated webp": (lambda: encoded("WEBP")[:60], "truncated, the end of the file is missing"),
    "png bomb": (png_bomb, BOMB),
    "jpeg bomb": (jpeg_bomb, BOMB),
    "bmp bomb": (bmp_bomb, BOMB),
    "tiff bomb": (tiff_bomb, BOMB),
    "webp bomb": (webp_bomb, BOMB),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_one_line_and_takes_no_memory(name, folder, capfd):
    make, says = HOSTILE[name]
    (folder / "image/001.png").write_bytes(make())
    tracemalloc.start()  # numpy and OpenCV report their arrays to it
    try:
        for read in (read_image, read_mask):
            with pytest.raises(InputError) as caught:
                read(folder / "image/001.png")
            assert str(caught.value) == f"{folder}/image/001.png: {says}"
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()
    fails(folder, rf"list\.csv: 1 bad row: line 3: .*image/001\.png: {says}\. Correct or remove these rows\.")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["/dev/zero", "image", "pipe"])
def test_what_is_no_regular_file_is_refused_at_once(name, folder):
    os.mkfifo(folder / "pipe")
    spoil(folder, 1, img=name)
    what = "a folder" if name == "image" else "not a regular file"
    fails(folder, rf"1 bad row: line 3: .*{name}: {what}; correct the path")


def test_file_larger_than_any_image_is_not_read(folder):
    with open(folder / "image/001.png", "wb") as file:
        file.truncate(10**11)  # sparse: it takes no room on the disk
    fails(folder, r"line 3: .*001\.png: a file of 100\.0 GB is no image; correct the path")


def test_nul_byte_in_a_path(folder):
    text = (folder / "list.csv").read_bytes()
    (folder / "list.csv").write_bytes(text.replace(b"image/001.png", b"image/\x00001.png"))
    fails(folder, r"list\.csv: 1 bad row: line 3: a NUL byte in img image/\\x00001\.png\. Correct the path")
    with pytest.raises(InputError, match=r"'a\\x00b': not a path \(NUL byte\)"):
        read_image("a\0b")


def test_blanks_and_other_scripts_in_paths(folder):
    names = "image/ä b ж 図.png", "mask/ñ  ß,'.png"
    for old, new in zip(("image/001.png", "mask/001.png"), names, strict=True):
        (folder / old).rename(folder / new)
    spoil(folder, 1, img=names[0], filename=names[1])
    train(folder)


def test_list_of_one_row_and_a_batch_larger_than_it(folder):
    pd.read_csv(folder / "list.csv")[:1].to_csv(folder / "list.csv", index=False)
    train(folder, "--batch-size", "64", "--size", "32")
    assert len(test_scripts.rows_of(folder / "runs/r")) == 2


@pytest.mark.parametrize("value", [0, 255])
def test_all_empty_and_all_full_masks_train(value, folder):
    for path in (folder / "mask").iterdir():
        cv2.imwrite(str(path), np.full((32, 32), value, np.uint8))
    train(folder)


def test_batch_larger_than_the_list(folder):
    train(folder, "--batch-size", "64")
    assert len(test_scripts.rows_of(folder / "runs/r")) == 2


@pytest.mark.parametrize("flags", [["--size", "16"], ["--size", "0"]])
def test_images_of_one_pixel_train(flags, folder):
    one_pixel(folder)
    train(folder, *flags)


def test_single_image_too_small_for_batch_norm_is_one_line(folder, capsys):
    one_pixel(folder)
    with pytest.raises(SystemExit) as caught:
        launch(lambda _: train(folder, "--size", "0", "--batch-size", "1"), TrainArgs, LISTS)
    assert caught.value.code == 2
    says = "error: BatchNorm met one value a channel: use a larger --batch-size or --size, or another --arch"
    assert capsys.readouterr().err.splitlines()[-1] == says


def one_pixel(folder):
    for i in range(4):
        cv2.imwrite(str(folder / f"image/00{i}.png"), np.full((1, 1, 3), 50 * i, np.uint8))
        cv2.imwrite(str(folder / f"mask/00{i}.png"), np.full((1, 1), 255 * (i % 2), np.uint8))


def test_missing_image(folder):
    spoil(folder, 2, img="image/none.png")
    fails(folder, r"list\.csv: 1 bad row: line 4: .*image/none\.png: no such file")


def test_unreadable_image(folder):
    (folder / "image/001.png").write_bytes(b"no picture at all")
    fails(folder, r"line 3: .*image/001\.png: not an image")


@pytest.mark.parametrize("keep", [0, 0.5])
def test_empty_and_truncated_image(folder, keep):
    raw = (folder / "image/001.png").read_bytes()
    (folder / "image/001.png").write_bytes(raw[: int(len(raw) * keep)])
    fails(folder, r"line 3: .*image/001\.png: (the file is empty|truncated)")


def test_image_and_mask_of_different_sizes(folder):
    write_mask(folder / "mask/003.png", np.zeros((32, 31), np.uint8))
    fails(folder, r"line 5: .*image/003\.png is 32x32, its mask .*mask/003\.png 31x32")


def test_mask_with_other_values(folder):
    cv2.imwrite(str(folder / "mask/000.png"), np.arange(1024, dtype=np.uint8).reshape(32, 32) % 7)
    fails(folder, r"line 2: .*mask/000\.png: mask values 0, 1, 2, .*a binary mask holds 0 and 1, or 0 and 255")


def test_mask_class_out_of_range(folder):
    cv2.imwrite(str(folder / "mask/000.png"), np.full((32, 32), 5, np.uint8))
    fails(folder, r"line 2: .*class [0-9]+, but --classes 3 allows 0 to 2", "--classes", "3")


def test_all_bad_rows_are_counted_and_ten_shown(tmp_path):
    rows = draw_set(tmp_path, 14)
    bad = [(img.replace("image", "gone"), mask) if i < 12 else (img, mask) for i, (img, mask) in enumerate(rows)]
    pd.DataFrame(bad, columns=["img", "filename"]).to_csv(tmp_path / "list.csv", index=False)
    with pytest.raises(InputError) as caught:
        train(tmp_path)
    assert "12 bad rows" in str(caught.value) and "and 2 more" in str(caught.value)
    assert str(caught.value).count("no such file") == 10


@pytest.mark.parametrize("text", ["", "img,filename\n"])
def test_empty_list(folder, text):
    (folder / "list.csv").write_text(text)
    fails(folder, r"list\.csv: the (file is empty|list has no rows)")


def test_missing_list(folder):
    (folder / "list.csv").unlink()
    fails(folder, r"list\.csv: no such file")


@pytest.mark.parametrize("value", ["1.2", "-0.1", "nan", "", "1e400", "high"])
def test_bad_weight(folder, value):
    spoil(folder, 1, weight=value)
    fails(folder, r"list\.csv: 1 bad row: line 3: ", script="train_with_Teacher_weight.py")


def test_noise_levels_are_no_weights(folder):
    frame = pd.read_csv(folder / "list.csv").rename(columns={"weight": "iterations"}).assign(iterations=[0, 6, 0, 10])
    frame.to_csv(folder / "list.csv", index=False)
    fails(folder, "no column `weight`; `iterations` is the noise level", script="train_with_KDweight.py")


def test_leak_between_train_and_test(folder):
    frame = pd.read_csv(folder / "list.csv")
    frame.assign(img=["./image/003.png", *frame["img"][1:3], "image/../image/000.png"])[3:].to_csv(
        folder / "held.csv", index=False
    )
    fails(
        folder, r"list\.csv: 1 bad row: line 2: image/000\.png is also in .*held\.csv line 2", "--test_csv", "held.csv"
    )


def test_unknown_encoder_and_architecture(folder):
    fails(
        folder, "--encoder resnet19: unknown encoder; did you mean resnet1", "--arch", "Unet", "--encoder", "resnet19"
    )
    fails(folder, "--arch Unett: unknown architecture; did you mean Unet", "--arch", "Unett")


def test_no_network_for_pretrained_weights(folder, monkeypatch):
    import segmentation_models_pytorch as smp

    def offline(*_, **__):
        raise OSError("Name or service not known\nmore")

    monkeypatch.setattr(smp.Unet, "__init__", offline)
    flags = ["--arch", "Unet", "--encoder", "resnet18", "--encoder-weights", "imagenet"]
    fails(folder, "cannot be fetched .Name or service not known.; without a network use", *flags)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--epochs", "0"], "--epochs 0"),
        (["--batch-size", "-1"], "--batch-size -1"),
        (["--learning-rate", "nan"], "--learning-rate nan"),
        (["--theta", "4"], "--theta 4"),
        (["--size", "-3"], "--size -3"),
        (["--seed", "-1"], "--seed -1"),
        (["--classes", "3", "--compat", "nlkd"], "--compat nlkd"),
        (["--arch", "PAN", "--encoder", "resnet18", "--size", "64"], "--arch PAN: cannot take --size 64"),
        (["--load", "nothing.pt"], "nothing.pt: no such checkpoint"),
    ],
)
def test_flags_no_run_can_use(folder, flags, says):
    fails(folder, says, *flags)


def test_code_in_a_checkpoint_is_refused(folder):
    import pickle

    class Evil:
        def __reduce__(self):
            return print, ("this must never be printed",)

    (folder / "evil.pt").write_bytes(pickle.dumps({"nets": Evil()}))
    fails(folder, "evil.pt: not a checkpoint that can be read", "--load", str(folder / "evil.pt"))


def test_images_of_different_sizes_need_a_size_or_single_batches(folder):
    cv2.imwrite(str(folder / "image/000.png"), np.zeros((40, 32, 3), np.uint8))
    cv2.imwrite(str(folder / "mask/000.png"), np.zeros((40, 32), np.uint8))
    fails(folder, "images of different sizes with --size 0", "--size", "0")
    train(folder, "--size", "0", "--batch-size", "1")


def test_second_process_on_a_run_folder_is_refused(folder):
    code = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
    code += "print('held', flush=True); time.sleep(60)"
    (folder / "runs/r").mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", code, str(folder / "runs/r/.lock")], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        try:
            fails(folder, "another process runs here")
        finally:
            other.kill()
    train(folder)


def test_a_mistake_is_one_line_and_exit_code_2(capsys):
    def main(args):
        raise InputError("list.csv: line 3: wrong")

    with pytest.raises(SystemExit) as caught:
        launch(main, TrainArgs, ["--train_csv", "a", "--valid_csv", "b"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: list.csv: line 3: wrong\n"


def test_a_script_started_as_a_file_ends_with_one_line(folder):
    words = [sys.executable, str(ROOT / "train_co_teaching+.py"), "--train_csv", "no.csv", "--valid_csv", "list.csv"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: no.csv: no such file")
    assert "Traceback" not in done.stderr


def test_binary_masks_in_a_run_of_many_classes(folder):
    fails(folder, "for 0/255 masks use --classes 1", "--classes", "3")


def test_loss_that_is_not_finite_ends_the_run(folder):
    says = r"the loss of step \d in epoch \d is not finite; its images: image/00\d.png, image/00\d.png\. Remedy: "
    with pytest.raises(InputError, match=says):
        train(folder, "--learning-rate", "1e30", "--clip-value", "0", "--epochs", "3", "--batch-size", "2")
    assert not (folder / "runs/r/best.pt").exists() or "nan" not in (folder / "runs/r/log.jsonl").read_text().lower()


def test_one_value_a_channel_is_one_line(folder, capsys):
    def main(args):
        train(folder, "--arch", "DeepLabV3", "--encoder", "resnet18", "--batch-size", "1", "--size", "32")

    with pytest.raises(SystemExit) as caught:
        launch(main, TrainArgs, ["--train_csv", "a", "--valid_csv", "b"])
    assert caught.value.code == 2 and "use a larger --batch-size" in capsys.readouterr().err


def test_another_number_of_processes_is_another_run(folder, monkeypatch):
    train(folder)
    args = folder / "runs/r/args.json"
    args.write_text(args.read_text().replace('"processes": 1', '"processes": 2'))
    with pytest.raises(InputError, match=r"--processes 2 \(now 1\)"):
        train(folder)


# the CSV contract


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("img,filename,iterations\na.png,m/a.png,0\nb.png,m/b.png,6\n", {"img", "filename", "iterations"}),
        ("img,filename,weight\na.png,m/a.png,0\nb.png,m/b.png,0.25\n", {"img", "filename", "weight"}),
        (",0\na.png,m/a.png\nb.png,m/b.png\n", {"img", "filename"}),
        (",0,1\na.png,m/a.png,0\nb.png,m/b.png,7\n", {"img", "filename", "iterations"}),
        (",0,1\na.png,m/a.png,0.5\nb.png,m/b.png,0.25\n", {"img", "filename", "weight"}),
        ("\ufeffimage,mask\r\na.png,m/a.png\r\nb.png,m/b.png\r\n", {"img", "filename"}),
        (",img,filename\n0,a.png,m/a.png\n1,b.png,m/b.png\n", {"img", "filename"}),
        ("img,filename\na.png,m/a.png,\nb.png, m/b.png ,\n", {"img", "filename"}),
        ('filename,extra,img\n"m/a.png",1,"a.png"\nm/b.png,2,b.png\n', {"img", "filename", "extra"}),
    ],
)
def test_published_and_friendly_layouts_load(tmp_path, text, columns):
    (tmp_path / "l.csv").write_text(text, encoding="utf-8")
    frame = read_list(tmp_path / "l.csv")
    assert frame["img"].tolist() == ["a.png", "b.png"] and frame["filename"].tolist() == ["m/a.png", "m/b.png"]
    assert set(frame.columns) == columns | {"line"}


def test_column_1_that_could_be_either_is_refused(tmp_path):
    (tmp_path / "l.csv").write_text(",0,1\na.png,m/a.png,0\nb.png,m/b.png,1\n")
    with pytest.raises(InputError, match="name it `iterations` or `weight`"):
        read_list(tmp_path / "l.csv")


def test_line_numbers_count_blank_lines(tmp_path):
    (tmp_path / "l.csv").write_text("img,filename\n\n\na.png,a\n,b\n")
    with pytest.raises(InputError, match="line 5: empty cell"):
        read_list(tmp_path / "l.csv")


@pytest.mark.parametrize("level", ["6.5", "1e30", "-1"])
def test_noise_levels_are_whole_numbers(level, tmp_path):
    (tmp_path / "l.csv").write_text(f"img,filename,iterations\na.png,a,{level}\n")
    with pytest.raises(InputError, match="line 2: iterations"):
        read_list(tmp_path / "l.csv")


def test_repeated_image_is_refused(tmp_path):
    (tmp_path / "l.csv").write_text("img,filename\na.png,a\nb.png,b\na.png,c\n")
    with pytest.raises(InputError, match=r"line 4: a\.png is listed before"):
        read_list(tmp_path / "l.csv")


def test_lists_join_by_image_whatever_the_order():
    left = pd.DataFrame({"img": ["a", "b", "c"]})
    right = pd.DataFrame({"img": ["c", "a", "b"], "filename": ["3", "1", "2"]})
    assert join(left, right, "x")["filename"].tolist() == ["1", "2", "3"]
    with pytest.raises(InputError, match="1 images of the list are missing, the first is c"):
        join(left, right[1:], "x")


def test_written_list_reads_back(tmp_path):
    frame = pd.DataFrame({"img": ["ü b.png", 'a"c.png'], "filename": ["x,y.png", "z.png"], "weight": [0.25, 1.0]})
    write_list(frame, tmp_path / "l.csv")
    assert read_list(tmp_path / "l.csv").drop(columns="line").equals(frame)
    assert [p.name for p in tmp_path.iterdir()] == ["l.csv"]


def test_score_behind_the_weights(tmp_path):
    frame = pd.DataFrame({"img": ["a"], "weight": [0.5], "bf": ["0.5"], "miou": ["0.7"]})
    assert weight_score(frame, "x.csv") == "bf"
    assert weight_score(frame[["img", "weight"]], "d/train_noisy_60_PointRend_weight_bmscore.csv") == "bm"


def test_colliding_stems_are_refused():
    frame = pd.DataFrame({"img": ["a/1.png", "b/1.png"], "line": [2, 3]})
    with pytest.raises(InputError, match="line 3: stem `1`"):
        unique_stems(frame, "l.csv")


def test_every_kind_of_bad_row_is_found_at_once(tmp_path):
    rows = [
        "a.png,m,0.5,0",
        "./a.png,m,1e400,0",
        "../x.png,m,0.5,0",
        ",m,nan,0",
        "d/../../y.png,m,high,1.5",
        "b.png,m,1,3",
    ]
    (tmp_path / "l.csv").write_text("img,filename,weight,iterations\n" + "\n".join(rows) + "\n")
    frame, bad = inspect_list(tmp_path / "l.csv")
    assert bad == [
        (3, "./a.png is listed before in line 2 and weight 1e400"),
        (4, "img ../x.png leaves the root"),
        (5, "empty cell and weight nan"),
        (6, "img d/../../y.png leaves the root and iterations 1.5 and weight high"),
    ]
    assert frame["line"].tolist() == [2, 3, 4, 5, 6, 7] and frame["weight"][5] == 1
    with pytest.raises(InputError) as caught:
        read_list(tmp_path / "l.csv")
    assert "4 bad rows: line 3: ./a.png is listed before in line 2" in str(caught.value)
    assert "Write an absolute path, or start --data-root higher up. List an image once." in str(caught.value)


def test_paths_that_leave_the_root(folder):
    spoil(folder, 0, img="../image/000.png")
    spoil(folder, 3, filename="mask/../../mask/003.png")
    fails(
        folder,
        r"2 bad rows: line 2: img \.\./image/000\.png leaves the root; line 5: filename .*leaves the root\. Write",
    )
    spoil(folder, 0, img=str(folder / "image/000.png"))
    spoil(folder, 3, filename="mask/../mask/003.png")
    train(folder)


def test_tools_write_no_path_that_leaves_the_root(folder, monkeypatch):
    from utils import generate_noisy_label, prepare_data

    (folder / "work").mkdir()
    monkeypatch.chdir(folder / "work")
    prepare_data.split_folder(prepare_data.FolderArgs("../image", "../mask", "csv"))
    how = {"train_csv": "csv/train.csv", "valid_csv": "csv/valid.csv", "levels": [1, 2], "ratios": [100], "trusted": 1}
    generate_noisy_label.main(generate_noisy_label.Args("csv", "../noisy", **how))
    lists = [read_list(path) for path in Path("csv").glob("*.csv")]
    assert len(lists) == 7
    cells = {cell for frame in lists for name in ("img", "filename", "clean") if name in frame for cell in frame[name]}
    assert all(Path(cell).is_absolute() and ".." not in cell for cell in cells)


def test_names_with_dots_do_not_leave_the_root(tmp_path):
    (tmp_path / "l.csv").write_text("img,filename\n..a.png,...m.png\na/..b.png,c..d\n")
    assert len(read_list(tmp_path / "l.csv")) == 2


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"img;filename\na;b\n", "its columns are separated by `;`; a list must be separated by commas"),
        (b"img\tfilename\na\tb\n", "its columns are separated by tabs; a list must be separated by commas"),
        (b"img\na\n", "no column `filename`; its columns are img, line"),
        ("img,filename\nü,b\n".encode("latin1"), "not UTF-8 text; save the list as CSV in UTF-8"),
        ("img,filename\na,b\n".encode("utf-16"), "not UTF-8 text; save the list as CSV in UTF-8"),
        (b'img,filename\na,b\n"c,d\ne,f\n', "not a CSV list: the quote in row 3 is never closed; close it, or "),
        (
            b"img,filename\na,b\nc,d,e\n",
            "not a CSV list: Expected 2 fields in line 3, saw 3; put cells that hold a comma",
        ),
        (b"\xef\xbb\xbf", "the file is empty"),
    ],
)
def test_whole_file_faults_have_a_remedy(raw, says, folder):
    (folder / "list.csv").write_bytes(raw)
    with pytest.raises(InputError) as caught:
        train(folder)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_quotes_that_swallow_a_row(tmp_path):
    (tmp_path / "l.csv").write_text('img,filename\na,"m\nb,m"\nc,m\nc,n\n')
    assert inspect_list(tmp_path / "l.csv")[1] == [
        (2, "a line break in filename m\\nb,m"),
        (5, "c is listed before in line 4"),
    ]


# masks and images


def encodings():
    mask = np.zeros((9, 7), np.uint8)
    mask[2:5, 3:6] = 1
    grey = mask * 255
    rgba = np.dstack([grey, grey, grey, np.full_like(grey, 255)])
    return mask, {"01": mask, "0255": grey, "rgb": np.dstack([grey] * 3), "rgba": rgba}


@pytest.mark.parametrize("name", encodings()[1])
def test_mask_encodings_read_alike(name, tmp_path):
    mask, stored = encodings()
    cv2.imwrite(str(tmp_path / "m.png"), stored[name])
    assert (read_mask(tmp_path / "m.png") == mask).all()


@pytest.mark.parametrize("mode", ["1", "P"])
def test_bilevel_and_palette_masks_keep_their_indices(mode, tmp_path):
    mask, _ = encodings()
    picture = Image.fromarray(mask * 255).convert("1") if mode == "1" else Image.fromarray(mask)
    if mode == "P":
        picture.putpalette([9, 9, 9, 200, 0, 0])
    picture.save(tmp_path / "m.png")
    assert (read_mask(tmp_path / "m.png", 1 if mode == "1" else 2) == mask).all()


def test_colour_and_16_bit_masks_are_refused(tmp_path):
    cv2.imwrite(str(tmp_path / "c.png"), np.dstack([np.zeros((4, 4), np.uint8), *[np.full((4, 4), 255, np.uint8)] * 2]))
    cv2.imwrite(str(tmp_path / "d.png"), np.zeros((4, 4), np.uint16))
    with pytest.raises(InputError, match="a mask in colour"):
        read_mask(tmp_path / "c.png")
    with pytest.raises(InputError, match="uint16"):
        read_mask(tmp_path / "d.png")


@pytest.mark.parametrize("colour", [0, 255, (255, 0, 0)])
def test_mask_in_the_alpha_channel_is_refused(colour, tmp_path):
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[..., :3] = colour
    rgba[:2, :, 3] = 255
    cv2.imwrite(str(tmp_path / "m.png"), rgba)
    with pytest.raises(
        InputError, match=r"m\.png: the mask is in the alpha channel; store it as one grey value a pixel"
    ):
        read_mask(tmp_path / "m.png")


def test_alpha_beside_a_grey_mask_is_dropped(tmp_path):
    mask, stored = encodings()
    for alpha in (0, 128, stored["0255"]):
        rgba = stored["rgba"].copy()
        rgba[..., 3] = alpha
        cv2.imwrite(str(tmp_path / "m.png"), rgba)
        Image.fromarray(rgba[..., 2:], "LA").save(tmp_path / "la.png")
        assert (read_mask(tmp_path / "m.png") == mask).all() and (read_mask(tmp_path / "la.png") == mask).all()


def test_masks_are_never_interpolated():
    mask = (np.random.default_rng(0).random((321, 321)) > 0.5).astype(np.uint8)
    for size in (96, 320, 500):
        assert set(np.unique(resize_mask(mask, size))) <= {0, 1}
    assert resize_mask(mask, 321) is mask


def test_to_binary_refuses_a_mixture():
    with pytest.raises(InputError, match="0, 1, 255"):
        to_binary(np.array([[0, 1, 255]], np.uint8))
    assert (to_binary(np.array([[0, 255]], np.uint8)) == [[0, 1]]).all()


def test_images_come_as_rgb(tmp_path):
    cv2.imwrite(str(tmp_path / "i.png"), np.dstack([np.full((3, 3), v, np.uint8) for v in (1, 2, 3)]))
    assert read_image(tmp_path / "i.png")[0, 0].tolist() == [3, 2, 1]


def test_photographs_of_16_bits_are_scaled_to_8(tmp_path):
    values = np.array([[0, 257, 0x80FF], [0xFFFF, 200 * 257, 1]], np.uint16)
    cv2.imwrite(str(tmp_path / "grey.png"), values)
    cv2.imwrite(str(tmp_path / "colour.png"), np.dstack([values] * 3))
    for name in ("grey", "colour"):
        image = read_image(tmp_path / f"{name}.png")
        assert image.dtype == np.uint8 and (image == [[[0], [1], [128]], [[255], [200], [0]]]).all()


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "1"])
def test_photographs_of_every_png_kind_are_rgb_without_alpha(mode, tmp_path):
    picture = Image.new("RGB", (3, 2), (10, 200, 30))
    picture = picture.quantize(8) if mode == "P" else picture.convert(mode)
    if mode in ("LA", "RGBA"):
        picture.putalpha(0)  # transparent all over: what it hides is still the photograph
    picture.save(tmp_path / "i.png")
    # grey by the weights of the standard: 0.299 * 10 + 0.587 * 200 + 0.114 * 30 = 123.8
    grey = [124] * 3
    expected = {"L": grey, "LA": grey, "1": None}.get(mode, [10, 200, 30])
    image = read_image(tmp_path / "i.png")
    assert image.shape == (2, 3, 3) and image.dtype == np.uint8
    assert expected is None or (image == expected).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_exif_turns_photographs_and_masks_alike(kind, tmp_path):
    """Orientation 6: the file lies on its left side, so its left column is the top row of the picture."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.zeros((16, 24), np.uint8)
    stored[:, :8] = 255
    how = {"JPEG": {"quality": 100}, "WEBP": {"lossless": True}}.get(kind, {})
    (tmp_path / "i").write_bytes(encoded(kind, np.dstack([stored] * 3), exif=exif, **how))
    assert (read_image(tmp_path / "i")[:8] == 255).all() and read_image(tmp_path / "i").shape == (24, 16, 3)
    (tmp_path / "m").write_bytes(encoded(kind, stored if kind != "WEBP" else np.dstack([stored] * 3), exif=exif, **how))
    mask = read_pair(tmp_path / "i", tmp_path / "m")[1]
    assert mask[:8].all() and not mask[8:].any()


def test_sizes_that_differ_by_the_exif_rotation_only(folder):
    exif = Image.Exif()
    exif[0x0112] = 8
    (folder / "image/000.png").write_bytes(encoded("JPEG", np.zeros((32, 40, 3), np.uint8), exif=exif))
    write_mask(folder / "mask/000.png", np.zeros((32, 40), np.uint8))
    fails(
        folder,
        r"is 32x40, its mask .*mask/000\.png 40x32; the image is turned by its EXIF orientation, the mask is not",
    )
    write_mask(folder / "mask/000.png", np.zeros((40, 32), np.uint8))
    read_pair(folder / "image/000.png", folder / "mask/000.png")


def test_whole_jpegs_with_thumbnails_and_appended_bytes_are_read(tmp_path):
    plain = encoded("JPEG")
    (tmp_path / "i.jpg").write_bytes(plain)
    image = read_image(tmp_path / "i.jpg")
    for raw in (
        with_thumbnail(1),
        plain + bytes(100_000),
        encoded("JPEG") + encoded("PNG"),
        b"\xff\xd8\xff" + plain[2:],
    ):
        (tmp_path / "i.jpg").write_bytes(raw)
        assert (read_image(tmp_path / "i.jpg") == image).all()
    (tmp_path / "i.jpg").write_bytes(encoded("JPEG", progressive=True))
    assert read_image(tmp_path / "i.jpg").shape == (32, 32, 3)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "TIFF"])
def test_first_of_several_frames_is_read(kind, tmp_path):
    frames = [np.full((8, 8, 3), value, np.uint8) for value in (255, 0)]
    how = {"lossless": True} if kind == "WEBP" else {}
    raw = encoded(kind, frames[0], save_all=True, append_images=[Image.fromarray(frames[1])], **how)
    (tmp_path / "i").write_bytes(raw)
    assert (read_image(tmp_path / "i") == 255).all()
    assert (read_mask(tmp_path / "i") == 1).all()


def test_cut_anywhere_a_file_is_read_whole_or_refused(tmp_path):
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        raw = encoded(kind)
        (tmp_path / "i").write_bytes(raw)
        whole = read_image(tmp_path / "i")
        for length in range(0, len(raw), 61):
            (tmp_path / "i").write_bytes(raw[:length])
            try:
                assert (read_image(tmp_path / "i") == whole).all(), (kind, length)
            except InputError as error:
                assert "\n" not in str(error)
