"""What a user gets wrong: one clear line that names the file and the row, before the first epoch, exit code 2."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import test_scripts
from conftest import draw_set

from utils.args import TrainArgs, launch
from utils.errors import InputError
from utils.images import read_image, read_mask, resize_mask, to_binary, write_mask
from utils.lists import join, read_list, unique_stems, weight_score, write_list

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
    with pytest.raises(InputError, match=r"the loss of epoch \d is (nan|inf); lower --learning-rate"):
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
    from PIL import Image

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
