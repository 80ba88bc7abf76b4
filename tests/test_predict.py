"""predict.py from a checkpoint and files to files."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import test_scripts
import torch
from PIL import Image

import predict
from utils import export as exporting
from utils import predict_mask
from utils.args import launch, parse
from utils.checkpoint import load_network, read_checkpoint, write_checkpoint
from utils.errors import InputError
from utils.images import read_image, read_mask
from utils.inference import Plan, Probabilities, predict_probability
from utils.models import build_model
from utils.overlay import draw_overlay, palette

ROOT = Path(__file__).parents[1]


def checkpoint(path, classes=1, size=32, side=40, seed=0):
    """A checkpoint of a small network with random weights, with some of every class in its output."""
    torch.manual_seed(seed)
    net = build_model("PlainUNet", classes=classes, width=4).eval()
    with torch.inference_mode():
        logits = net(torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)).transpose(0, 1).flatten(1)
    spread = logits.std(1)
    net.net.head.weight.data /= spread.view(-1, 1, 1, 1)
    net.net.head.bias.data = (net.net.head.bias.data - logits.mean(1)) / spread
    model = {"arch": "PlainUNet", "encoder": "", "classes": classes, "width": 4, "size": size}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(path, {"models": [model], "nets": [net.state_dict()], "net": 0, "side": side})
    return path


def photograph(path, height=50, width=70, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC))
    return path


def run(*words):
    predict.main(parse(predict.Args, [*map(str, words), "--cpu"]))


def expected(path, image, present=None, **plan):
    net, state = load_network(path)
    plan = {"size": state["model"]["size"], "side": state["side"]} | plan
    return predict_probability(Probabilities([net]).eval(), read_image(image), Plan(**plan), present)


def test_masks_overlays_and_probabilities_of_files_and_folders(tmp_path, capsys):
    net, out = checkpoint(tmp_path / "run/best.pt"), tmp_path / "out"
    first, small = photograph(tmp_path / "a.jpg"), photograph(tmp_path / "folder/b.png", 20, 9, seed=1)
    large = photograph(tmp_path / "folder/c.bmp", 90, 200, seed=2)  # its shorter side is more than twice 40: windows
    (tmp_path / "folder/notes.txt").write_text("not an image")
    run(net, first, tmp_path / "folder", "--out", out, "--overlay", "--probability")
    for image, how in ((first, "resize"), (small, "resize"), (large, "slide")):
        probability = expected(net, image, mode=how)[0]
        mask, stored = read_mask(out / f"{image.stem}.png"), cv2.imread(str(out / f"{image.stem}_prob.png"), -1)
        assert stored.shape == mask.shape == read_image(image).shape[:2]
        assert np.abs(stored / 255 - probability).max() <= 0.51 / 255
        assert (mask == (probability > 0.5))[np.abs(probability - 0.5) > 1e-4].all()
        assert read_image(out / f"{image.stem}_overlay.jpg").shape == read_image(image).shape
    assert 0 < read_mask(out / "c.png").mean() < 1
    assert len(list(out.iterdir())) == 3 * 3 + 1
    assert "3 images predicted" in capsys.readouterr().out


def test_class_indices_and_an_array_of_probabilities_for_several_classes(tmp_path):
    net, image = checkpoint(tmp_path / "run/best.pt", classes=3, size=0), photograph(tmp_path / "a.jpg", 33, 47)
    run(net, image, "--out", tmp_path / "out", "--probability", "--overlay")
    probability, stored = expected(net, image), np.load(tmp_path / "out/a_prob.npz")["probability"]
    assert stored.dtype == np.uint8 and stored.shape == (3, 33, 47)
    assert np.abs(stored / 255 - probability).max() <= 0.51 / 255
    assert (read_mask(tmp_path / "out/a.png", 3) == probability.argmax(0)).mean() > 0.999
    assert len(np.unique(probability.argmax(0))) > 1


def test_averages_mirrors_and_scales_reach_the_network(tmp_path):
    nets = [checkpoint(tmp_path / f"{seed}/best.pt", seed=seed) for seed in range(2)]
    image = photograph(tmp_path / "a.jpg")
    how = {"mode": "slide", "scales": (0.5, 1.0), "flip": True, "overlap": 0.25, "window": 16}
    flags = ["--mode", "slide", "--scales", "0.5", "1", "--flip", "--overlap", "0.25", "--window", "16"]
    run(nets[0], image, "--more", nets[1], "--out", tmp_path / "out", "--probability", *flags)
    mean = np.mean([expected(net, image, **how) for net in nets], axis=0)[0]
    stored = cv2.imread(str(tmp_path / "out/a_prob.png"), cv2.IMREAD_UNCHANGED)
    assert np.abs(stored / 255 - mean).max() <= 0.51 / 255
    with pytest.raises(InputError, match="different classes"):
        run(nets[0], image, "--more", checkpoint(tmp_path / "3/best.pt", 3), "--out", tmp_path / "out2")


def test_the_masks_are_those_of_predict_mask(tiny, tmp_path):
    net = checkpoint(tmp_path / "run/best.pt")
    words = ["--checkpoint", str(net), "--out", str(tmp_path / "teacher"), "--cpu", "--data-root", str(tiny)]
    predict_mask.main(parse(predict_mask.Args, ["--list", str(tiny / "test.csv"), *words]))
    run(net, tiny / "test.csv", "--data-root", tiny, "--out", tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "teacher").glob("*.png"))
    assert names == sorted(path.name for path in (tmp_path / "out").glob("*.png")) and len(names) == 4
    for name in names:
        assert (read_mask(tmp_path / "out" / name) == read_mask(tmp_path / "teacher" / name)).mean() > 0.999


def test_a_training_run_says_how_large_its_images_were(tiny, tmp_path):
    test_scripts.launch("train_without_weight.py", tiny, tmp_path, "run", "--epochs", "1", "--size", "16")
    assert read_checkpoint(tmp_path / "run/best.pt")["side"] == 32
    test_scripts.launch(
        "train_without_weight.py", tiny, tmp_path, "memory", "--epochs", "1", "--cache-dir", "/dev/null"
    )
    assert read_checkpoint(tmp_path / "memory/last.pt")["side"] == 32


def test_a_photograph_turned_by_its_exif_orientation_gets_an_upright_mask(tmp_path):
    net, image = checkpoint(tmp_path / "run/best.pt"), photograph(tmp_path / "up/a.png", 40, 60)
    upright = Image.open(image)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: shown after a turn by 90 degrees to the right
    (tmp_path / "turned").mkdir()
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned/a.png", exif=exif)
    run(net, tmp_path / "up", "--out", tmp_path / "one")
    run(net, tmp_path / "turned", "--out", tmp_path / "two")
    masks = [read_mask(tmp_path / name / "a.png") for name in ("one", "two")]
    assert masks[0].shape == (40, 60) and np.array_equal(*masks)


def test_damaged_images_are_named_and_the_others_written(tmp_path, capsys):
    net = checkpoint(tmp_path / "run/best.pt")
    photograph(tmp_path / "in/a.png"), photograph(tmp_path / "in/c.png", seed=1)
    (tmp_path / "in/b.png").write_bytes((tmp_path / "in/a.png").read_bytes()[:300])
    with pytest.raises(SystemExit) as ended:
        launch(predict.main, predict.Args, [str(net), str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--cpu"])
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.err.count("\n") == 1 and "1 of 3 images" in said.err
    assert "b.png: truncated" in said.err and "2 images predicted" in said.out
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["a.png", "c.png"]


def test_equal_stems_are_refused_or_keep_their_sub_folders(tmp_path):
    net = checkpoint(tmp_path / "run/best.pt")
    photograph(tmp_path / "in/x/a.png"), photograph(tmp_path / "in/y/a.jpg", seed=1)
    with pytest.raises(InputError, match="would both be written to"):
        run(net, tmp_path / "in/x", tmp_path / "in/y", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="--recursive also looks"):
        run(net, tmp_path / "in", "--out", tmp_path / "out")
    run(net, tmp_path / "in", "--recursive", "--out", tmp_path / "out")
    assert (tmp_path / "out/x/a.png").exists() and (tmp_path / "out/y/a.png").exists()
    photograph(tmp_path / "in/y/a_prob.png")
    with pytest.raises(InputError, match="would both be written to"):
        run(net, tmp_path / "in/y", "--out", tmp_path / "other", "--probability")


def test_files_that_are_not_ours_are_not_replaced(tmp_path):
    net, image = checkpoint(tmp_path / "run/best.pt"), photograph(tmp_path / "in/a.jpg")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.png").write_bytes(b"mine")
    with pytest.raises(InputError, match="is not of this tool"):
        run(net, image, "--out", tmp_path / "out")
    assert (tmp_path / "out/a.png").read_bytes() == b"mine" and len(list((tmp_path / "out").iterdir())) == 1
    run(net, image, "--out", tmp_path / "out", "--overwrite")
    assert read_mask(tmp_path / "out/a.png").shape == (50, 70)
    with pytest.raises(InputError, match="was made of"):
        run(net, photograph(tmp_path / "other/a.jpg", seed=5), "--out", tmp_path / "out")
    photo = photograph(tmp_path / "in/b.png")
    for flags in ([], ["--overwrite"]):
        with pytest.raises(InputError, match="is one of the images"):
            run(net, photo, "--out", tmp_path / "in", *flags)


def test_the_same_command_does_what_is_left_and_other_settings_everything(tmp_path, capsys):
    net, out = checkpoint(tmp_path / "run/best.pt"), tmp_path / "out"
    for i in range(3):
        photograph(tmp_path / f"in/{i}.png", seed=i)

    def again(*flags):
        run(net, tmp_path / "in", "--out", out, *flags)
        return capsys.readouterr().out

    assert "3 images predicted" in again("--overlay")
    (out / "1.png").unlink()
    assert "1 image predicted; 2 were there already" in again("--overlay")
    assert "0 images predicted; 3 were there already" in again()
    assert (out / "1_overlay.jpg").exists()  # it still fits its mask
    assert "3 images predicted" in again("--flip")
    assert not (out / "1_overlay.jpg").exists()  # it would show the mask before
    photograph(tmp_path / "in/2.png", seed=9)
    assert "1 image predicted; 2 were there already" in again("--flip")
    for damaged in ({"images": 3}, {"images": {"1": 3}}):
        (out / "predict.json").write_text(json.dumps(damaged))
        with pytest.raises(InputError, match="is not of this tool"):
            again("--flip")


def test_predictions_inside_the_folder_of_images_are_no_images(tmp_path, capsys):
    net, folder = checkpoint(tmp_path / "run/best.pt"), tmp_path / "in"
    photograph(folder / "a.png")
    for count in ("1 image predicted", "0 images predicted; 1 were there already"):
        run(net, folder, "--recursive", "--out", folder / "predictions")
        assert count in capsys.readouterr().out


def test_flags_may_stand_anywhere(tmp_path):
    args = parse(predict.Args, ["a.pt", "--flip", "x.jpg", "y.jpg", "--scales", "1", "2", "--out", "o", "z.jpg"])
    assert args.images == ["x.jpg", "y.jpg", "z.jpg"] and args.scales == [1, 2] and args.flip and args.out == "o"
    assert parse(predict.Args, ["a.pt", "--export", "onnx"]).images == []


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--overlap", "1"], "--overlap"),
        (["--scales", "0"], "--scales"),
        (["--batch-size", "0"], "--batch-size"),
        (["missing.jpg"], "no such file or folder"),
        ([], "no images"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, flags, what):
    with pytest.raises(SystemExit) as ended:
        launch(predict.main, predict.Args, [str(checkpoint(tmp_path / "run/best.pt")), *flags])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and what in said


def test_overlays_tint_every_class_but_the_first_and_draw_contours():
    image, mask = np.full((40, 60, 3), 100, np.uint8), np.zeros((40, 60), np.uint8)
    mask[10:30, 10:30], mask[10:30, 30:50] = 1, 2
    shown, colours = draw_overlay(image, mask, 3), palette(3)
    assert (shown[mask == 0] == 100).all()
    assert (shown[10, 12:48] == colours[mask[10, 12:48]]).all()
    assert (shown[20, 29] == colours[1]).all() and (shown[20, 30] == colours[2]).all()
    assert np.abs(shown[20, 20] - (0.55 * 100 + 0.45 * colours[1])).max() <= 1
    many = palette(22).astype(int)
    apart = np.abs(many[:, None] - many).sum(2) + 999 * np.eye(22, dtype=int)
    assert apart.min() > 40
    assert (palette(1)[1] == palette(2)[1]).all()


def classify(classes=1, **more):
    torch.manual_seed(1)
    return Probabilities([build_model("PlainUNet", classes=classes, width=4, **more)]).eval()


ABOUT = {"arch": "PlainUNet", "encoder": "", "classes": 3, "width": 4, "size": 32}


def test_torchscript_needs_no_code_of_ours_and_takes_any_size(tmp_path, capsys):
    net, image = checkpoint(tmp_path / "run/best.pt", 3), photograph(tmp_path / "a.jpg", 40, 56)
    run(net, image, "--export", "torchscript", "--out", tmp_path / "out")
    assert "agrees with the network on 4 batches" in capsys.readouterr().out and (tmp_path / "out/a.png").exists()
    np.save(tmp_path / "in.npy", np.stack([read_image(image)] * 2))
    code = (
        "import json, numpy, torch; about = {'about.json': ''}; net = torch.jit.load('out/run-best.pt', None, about); "
        "assert json.loads(about['about.json'])['size'] == 32; "
        "numpy.save('out.npy', net(torch.from_numpy(numpy.load('in.npy'))))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    found = np.load(tmp_path / "out.npy")
    assert np.abs(found - expected(net, image, size=0)).max() < 1e-5
    with pytest.raises(InputError, match="exists"):
        run(net, "--export", "torchscript", "--out", tmp_path / "out")


@pytest.mark.slow
def test_onnx_takes_any_batch_and_size(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    net = checkpoint(tmp_path / "run/best.pt", 3)
    run(net, "--export", "onnx", "--out", tmp_path / "out")
    session = runtime.InferenceSession(tmp_path / "out/run-best.onnx", providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map["size"] == "32"
    image = photograph(tmp_path / "a.png", 45, 71)
    found = session.run(None, {"image": np.stack([read_image(image)] * 5)})[0]
    assert np.abs(found - expected(net, image, size=0)).max() < 1e-5


@pytest.mark.parametrize("kind", ["torchscript", "onnx"])
def test_an_export_that_disagrees_is_refused_and_removed(kind, tmp_path, monkeypatch):
    path = tmp_path / f"net{exporting.SUFFIXES[kind]}"
    good = getattr(exporting, f"_run_{kind}") if kind == "torchscript" else None
    if kind == "torchscript":
        monkeypatch.setattr(exporting, "_run_torchscript", lambda part: lambda x: good(part)(x) + 1e-3)
    else:  # what is written is never run: the comparison alone decides
        pytest.importorskip("onnxscript")
        monkeypatch.setattr(exporting, "_write_onnx", lambda *_: None)
        monkeypatch.setattr(exporting, "_run_onnx", lambda part: lambda x: torch.zeros(len(x), 3, *x.shape[1:3]))
    with pytest.raises(InputError, match="was not written: what it computes differs"):
        exporting.export(classify(3), path, kind, ABOUT, [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_an_export_of_one_size_says_so(tmp_path, monkeypatch, capsys):
    class Fixed(torch.nn.Module):
        """Adds a map of the size it was traced with."""

        def forward(self, image):
            shape = [int(side) for side in image.shape[2:]]
            return image[:, :1].float() / 255 + torch.arange(shape[0]).view(-1, 1) / 99

    path = tmp_path / "net.pt"
    exporting.export(Probabilities([Fixed()]), path, "torchscript", ABOUT, [])
    assert "takes images of 32x32 only" in capsys.readouterr().err
    assert torch.jit.load(path)(torch.zeros(4, 32, 32, 3, dtype=torch.uint8)).shape == (4, 1, 32, 32)
    with pytest.raises(InputError, match="was not written"):
        exporting.export(Probabilities([Fixed()]), tmp_path / "other.pt", "torchscript", ABOUT | {"size": 0}, [])
    assert [file.name for file in tmp_path.iterdir()] == ["net.pt"]


def test_missing_packages_are_named_with_their_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match="pip install onnx onnxscript onnxruntime"):
        exporting.export(classify(3), tmp_path / "net.onnx", "onnx", ABOUT, [])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torchscript", "onnx"])
@pytest.mark.parametrize("arch", ["Unet", "DeepLabV3Plus", "PointRend"])
def test_library_architectures_export_at_any_size(arch, kind, tmp_path, capsys):
    if kind == "onnx":
        pytest.importorskip("onnxscript")
    net = Probabilities([build_model(arch, "resnet18", classes=2)]).eval()
    exporting.export(net, tmp_path / f"net{exporting.SUFFIXES[kind]}", kind, ABOUT, [])
    assert "only" not in capsys.readouterr().err


def test_help_runs_from_anywhere(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "predict.py", "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "--export" in done.stdout and "Mode" in done.stdout


def test_a_list_names_its_images_by_stem(tmp_path):
    net = checkpoint(tmp_path / "run/best.pt")
    photograph(tmp_path / "set/deep/a.v2.png")
    pd.DataFrame({"img": ["deep/a.v2.png"]}).to_csv(tmp_path / "list.csv", index=False)
    run(net, tmp_path / "list.csv", "--data-root", tmp_path / "set", "--out", tmp_path / "out")
    assert (tmp_path / "out/a.v2.png").exists()
