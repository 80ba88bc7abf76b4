"""Kinds of noise: what each does, how much of it costs a given IoU, and the lists that are made with them."""

import json

import cv2
import numpy as np
import pandas as pd
import pytest

from utils import add_noise
from utils import generate_noisy_label as tool
from utils.args import launch, parse
from utils.errors import InputError
from utils.images import read_mask, write_mask
from utils.lists import read_list
from utils.noise import KINDS, apply_noise, find_strength, signed_distance
from utils.noise_plan import assign_kinds
from utils.scores import pair_scores

BINARY = [kind for kind in KINDS if kind != "confusion"]


def rng(seed=0):
    return np.random.default_rng(seed)


def disc(size=96, radius=24, centre=None):
    y, x = np.mgrid[:size, :size]
    cy, cx = centre or (size // 2, size // 2)
    return ((y - cy) ** 2 + (x - cx) ** 2 <= radius**2).astype(np.uint8)


def body(size=96):
    """A region with a thin part and a hole."""
    mask = disc(size)
    mask[10:40, 44:52] = 1
    mask[44:52, 44:52] = 0
    return mask


def corner(i):
    """Two thick arms, turned and of a size of its own for every `i`: far from a box and from an ellipse."""
    arm, turn = 28 + i, cv2.getRotationMatrix2D((64, 64), 8 + 11 * i, 1)
    points = np.array([[20, 20], [104, 20], [104, 20 + arm], [20 + arm, 20 + arm], [20 + arm, 104], [20, 104]], float)
    points = points @ turn[:, :2].T + turn[:, 2]
    return cv2.fillPoly(np.zeros((128, 128), np.uint8), [points.round().astype(np.int32)], 1)


def photo(mask):
    colours = np.where(mask[..., None] > 0, (200, 80, 60), (60, 90, 190))
    return np.clip(colours + rng(1).normal(0, 12, (*mask.shape, 3)), 0, 255).astype(np.uint8)


def classes_map(size=96):
    """Three bands, a disc of class 3, and a strip to ignore."""
    mask = np.repeat(np.arange(3, dtype=np.uint8), size // 3)[:, None].repeat(size, 1)
    mask[disc(size, 14) > 0] = 3
    mask[:, -4:] = 255
    return mask


@pytest.mark.parametrize("kind", BINARY)
def test_every_kind_reaches_the_severity_asked_for(kind):
    mask = body()
    image = photo(mask)
    strength, left = find_strength([(mask, image, rng)], kind, 0.8)
    noisy = apply_noise(mask, kind, strength, rng(), 1, image)
    assert noisy.dtype == np.uint8 and set(np.unique(noisy)) == {0, 1}
    assert pair_scores(noisy, mask)["iou"] == pytest.approx(left)


@pytest.mark.parametrize("kind", BINARY)
def test_severities_of_every_kind_are_told_apart_on_several_masks(kind):
    """On one mask a superpixel, an erosion or a polygon changes by steps; the mean over masks comes close."""
    masks = [corner(i) for i in range(3 if kind == "superpixel" else 8)]  # which takes long
    pairs = [(mask, photo(mask), lambda i=i: rng(i)) for i, mask in enumerate(masks)]
    for severity in (0.9, 0.8, 0.7):
        strength, left = find_strength(pairs, kind, severity)
        assert left == pytest.approx(severity, abs=0.04 if kind in ("polygon", "superpixel") else 0.02), strength
        found = [apply_noise(mask, kind, strength, key(), 1, image) for mask, image, key in pairs]
        scores = [pair_scores(noisy, mask)["iou"] for noisy, mask in zip(found, masks, strict=True)]
        assert np.mean(scores) == pytest.approx(left)


@pytest.mark.parametrize("kind", ["markov", "markov_grow", "markov_shrink"])
def test_a_walk_is_that_of_the_whole_mask(kind):
    """The walk by its definition, on the whole map; the tool's looks at the surroundings of the region only."""
    cross = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], np.uint8)
    for seed, (mask, steps) in enumerate([(body(), 150), (disc(90, 12, (2, 88)), 100), (disc(60, 3), 70)]):
        draws, walked = rng(seed), mask.copy()
        for _ in range(steps):
            grows = draws.random() < {"markov": 0.5, "markov_grow": 0.8, "markov_shrink": 0.2}[kind]
            edge = np.flatnonzero((cv2.dilate if grows else cv2.erode)(walked, cross) != walked)
            walked.ravel()[edge[draws.random(len(edge)) < 0.05]] ^= 1
        walked = (cv2.GaussianBlur(walked * np.uint8(255), (5, 5), 2) > 127).astype(np.uint8)
        noisy = KINDS[kind].change(mask, steps, rng(seed))
        assert np.array_equal(noisy, walked)


def test_the_search_tries_small_strengths_first_and_threads_change_nothing(monkeypatch):
    tried, change = [], KINDS["markov"].change

    def noted(region, strength, draws):
        tried.append(strength)
        return change(region, strength, draws)

    pairs = [(body(80 + 8 * i), None, lambda i=i: rng(i)) for i in range(5)]
    monkeypatch.setitem(KINDS, "markov", KINDS["markov"]._replace(change=noted))
    one = find_strength(pairs, "markov", 0.8, workers=1)
    assert max(tried) < 2 * one[0] + 63 and one[1] == pytest.approx(0.8, abs=0.02)
    assert find_strength(pairs, "markov", 0.8, workers=3) == one


def test_what_no_strength_can_cost_gets_the_nearest():
    """A disc is nearly its own ellipse."""
    strength, left = find_strength([(disc(81, 25), None, rng)], "ellipse", 0.5)
    assert left > 0.97 and 0 < strength <= 1


@pytest.mark.parametrize("kind", [kind for kind in BINARY if kind != "superpixel"])  # larger ones can fit better
def test_more_strength_is_more_of_the_same_error(kind):
    mask = body()
    image = photo(mask)
    levels = {"missing": (0.1, 0.3), "spurious": (0.1, 0.5), "box": (0.2, 0.9)}
    levels |= {"ellipse": (0.2, 0.9), "markov": (40, 300), "markov_grow": (20, 80), "markov_shrink": (20, 80)}
    low, high = levels.get(kind, (2, 6))
    some, more = (apply_noise(mask, kind, s, rng(4), 1, image) for s in (low, high))
    assert pair_scores(more, mask)["iou"] < pair_scores(some, mask)["iou"] < 1
    assert np.array_equal(some, apply_noise(mask, kind, low, rng(4), 1, image)), "the same draws, the same mask"
    assert np.array_equal(mask, body()), "the mask itself stays"
    assert np.array_equal(apply_noise(mask, kind, 0, rng(), 1, image), mask)


def test_one_sided_kinds_are_one_sided():
    mask = body()
    for kind, strength in (("erode", 3), ("markov_shrink", 0), ("missing", 0.3)):
        noisy = apply_noise(mask, kind, strength, rng())
        assert not (noisy & ~mask).any(), kind
    for kind, strength in (("dilate", 3), ("spurious", 0.4)):
        assert not (mask & ~apply_noise(mask, kind, strength, rng())).any(), kind
    grown = [apply_noise(mask, "markov_grow", 80, rng(i)).sum() for i in range(5)]
    shrunk = [apply_noise(mask, "markov_shrink", 80, rng(i)).sum() for i in range(5)]
    assert min(grown) > mask.sum() > max(shrunk)


def test_strengths_have_the_units_they_say():
    mask = disc(101, 30)
    for kind, change in (("dilate", 4), ("erode", -4)):
        area = apply_noise(mask, kind, 4, rng()).sum()
        assert area == pytest.approx(np.pi * (30 + change) ** 2, rel=0.04)
    assert apply_noise(mask, "missing", 0.25, rng()).sum() == round(0.75 * mask.sum())
    distance = signed_distance(mask)
    assert distance[50, 50 + 30] == pytest.approx(-0.5) and distance[50, 50 + 31] == pytest.approx(0.5)
    moved = apply_noise(mask, "affine", 7, rng(3))
    centre = np.array([np.mean(a) for a in np.nonzero(moved)]) - 50
    assert np.hypot(*centre) == pytest.approx(7, abs=1.5)


def test_boxes_and_ellipses_at_full_strength():
    mask = np.zeros((80, 80), np.uint8)
    cv2.fillPoly(mask, [np.array([[10, 60], [40, 12], [70, 60]])], 1)
    y, x = np.nonzero(mask)
    box = np.zeros_like(mask)
    box[y.min() : y.max() + 1, x.min() : x.max() + 1] = 1
    assert np.array_equal(apply_noise(mask, "box", 1, rng()), box)
    round_one = disc(81, 25)
    assert pair_scores(apply_noise(round_one, "ellipse", 1, rng()), round_one)["iou"] > 0.98


def test_errors_of_jitter_are_correlated_along_the_contour():
    """Neighbours on a straight contour move alike; pixels far apart do not."""
    mask = np.zeros((256, 256), np.uint8)
    mask[:, :128] = 1
    shifts = [apply_noise(mask, "jitter", 8, rng(i)).sum(1).astype(float) - 128 for i in range(20)]
    near = np.mean([np.corrcoef(s[:-3], s[3:])[0, 1] for s in shifts])
    far = np.mean([np.corrcoef(s[:-100], s[100:])[0, 1] for s in shifts])
    assert near > 0.8 and abs(far) < 0.35
    assert abs(np.mean(shifts)) < 3, "as much too wide as too tight"


def test_a_walk_of_the_contour_flips_a_twentieth_of_it_a_step():
    """One step that grows: of the background beside the contour 5 % is added, before the final smoothing."""
    half = np.zeros((400, 400), np.uint8)
    half[:, :200] = 1
    steps = 400
    grown = np.mean([apply_noise(half, "markov_grow", steps, rng(i))[20:-20].sum(1).mean() - 200 for i in range(3)])
    # 0.8 of the steps push outwards and 0.2 inwards; a rough contour offers more pixels than a straight one
    assert 0.6 * steps * 0.05 < grown < 2.5 * 0.6 * steps * 0.05


def test_a_mask_is_never_emptied_or_filled():
    mask = disc(40, 6)
    for kind, strength in (("erode", 30), ("dilate", 60), ("missing", 1.0)):
        assert np.array_equal(apply_noise(mask, kind, strength, rng()), mask), kind
    empty = np.zeros((20, 20), np.uint8)
    for kind in set(BINARY) - {"superpixel"}:
        assert not apply_noise(empty, kind, 3, rng()).any(), kind


@pytest.mark.parametrize("kind", list(KINDS))
def test_many_classes_stay_classes_and_void_stays_void(kind):
    mask = classes_map()
    image = photo(mask)
    strength = {"superpixel": 16, "confusion": 0.9, "missing": 0.3, "spurious": 0.3, "box": 0.6, "ellipse": 0.6}
    noisy = apply_noise(mask, kind, strength.get(kind, 60 if "markov" in kind else 4), rng(2), 4, image)
    assert set(np.unique(noisy[mask != 255])) <= {0, 1, 2, 3}
    assert np.array_equal(noisy == 255, mask == 255)
    assert (noisy != mask).any()


def test_what_a_class_loses_goes_to_the_class_nearest_by():
    mask = np.zeros((60, 90), np.uint8)
    mask[:, 30:60], mask[:, 60:] = 1, 2

    class First:
        def permutation(self, labels):
            return np.array([1])

    noisy = apply_noise(mask, "erode", 5, First(), 3)
    assert set(noisy[30, 30:35]) == {0} and set(noisy[30, 35:55]) == {1} and set(noisy[30, 55:60]) == {2}


def test_confusion_follows_its_matrix():
    mask = np.zeros((40, 400), np.uint8)
    for k in range(100):
        mask[10:13, 4 * k : 4 * k + 2] = 1
    matrix = np.array([[0, 0, 0], [0, 0.6, 0.4], [0, 0, 0]])
    noisy = apply_noise(mask, "confusion", 1.0, rng(), 3, None, matrix)
    objects = noisy[11, ::4]
    assert set(objects) == {1, 2} and 25 <= (objects == 2).sum() <= 55
    assert (noisy[0] == 0).all()
    none = apply_noise(mask, "confusion", 1.0, rng(), 3, None, np.eye(3))
    assert np.array_equal(none, mask)


def test_kinds_are_drawn_by_their_chances_and_nested():
    ids = [f"{i:04d}" for i in range(2000)]
    kinds = {"polygon": 3.0, "missing": 1.0}
    whole = assign_kinds(ids, 100, kinds, 5).set_index("id")
    assert 0.70 < (whole["op"] == "polygon").mean() < 0.80
    half = assign_kinds(ids[::-1], 50, kinds, 5).set_index("id")
    chosen = half.index[half["iterations"] > 0]
    assert len(chosen) == 1000
    assert (half.loc[chosen, "op"] == whole.loc[chosen, "op"]).all()


@pytest.fixture
def clean(tmp_path):
    """24 photographs with masks of one class, and the same with four."""
    rows = []
    for name in ("image", "mask", "classes"):
        (tmp_path / name).mkdir()
    for i in range(24):
        mask = disc(64, 10 + i % 5, (24 + i % 9, 28 + i % 7))
        cv2.imwrite(str(tmp_path / f"image/{i:02d}.png"), photo(mask)[..., ::-1])
        write_mask(tmp_path / f"mask/{i:02d}.png", mask)
        many = classes_map(96)[:64, :64]
        many[mask > 0] = 3
        write_mask(tmp_path / f"classes/{i:02d}.png", many, 4)
        rows.append((f"image/{i:02d}.png", f"mask/{i:02d}.png", f"classes/{i:02d}.png"))
    frame = pd.DataFrame(rows, columns=["img", "filename", "classes"])
    frame[["img", "filename"]].to_csv(tmp_path / "list.csv", index=False)
    many = frame[["img"]].assign(filename=frame["classes"])
    many.to_csv(tmp_path / "many.csv", index=False)
    return tmp_path


def make(clean, *words, name="list"):
    flags = ["--list", f"{name}.csv", "--out-csv", "out", "--out-masks", "noisy", "--data-root", "."]
    tool.main(parse(tool.Args, [*flags, *map(str, words)]))
    return {p.stem: read_list(p) for p in (clean / "out").glob("*.csv")}


def test_lists_say_kind_strength_and_damage(clean, monkeypatch, capsys):
    monkeypatch.chdir(clean)
    words = ["--kinds", "dilate:2", "jitter", "--severity", "0.75", "--ratios", "50", "100"]
    lists = make(clean, *words)
    found = lists["list_noisy_100"]
    noisy = found[found["iterations"] > 0]
    assert len(noisy) == 24 and set(noisy["op"]) == {"dilate", "jitter"}
    assert noisy.groupby("op")["strength"].nunique().eq(1).all()
    assert noisy["iou"].astype(float).mean() == pytest.approx(0.75, abs=0.06)
    row = noisy.iloc[0]
    iou = pair_scores(read_mask(row["filename"]), read_mask(row["clean"]))["iou"]
    assert float(row["iou"]) == pytest.approx(iou, abs=1e-4)
    half = lists["list_noisy_50"]
    assert (half["iterations"] > 0).sum() == 12
    clean_rows = half[half["iterations"] == 0]
    assert (clean_rows["filename"] == clean_rows["clean"]).all() and set(clean_rows["op"]) == {""}
    before = {p: p.stat().st_mtime_ns for p in clean.rglob("noisy/**/*.png")}
    capsys.readouterr()
    make(clean, *words)
    assert "up to date" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in clean.rglob("noisy/**/*.png")}


def test_strengths_are_found_once_for_the_same_files(clean, monkeypatch, capsys):
    monkeypatch.chdir(clean)
    make(clean, "--kinds", "dilate", "--ratios", "50")
    assert "dilate: strength" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr("utils.noise_mixture.find_strength", None)  # it is not asked again
        make(clean, "--kinds", "dilate", "--ratios", "50", "100")
    first = make(clean, "--kinds", "dilate", "jitter", "--ratios", "100")["list_noisy_100"]
    said = capsys.readouterr().out
    assert "jitter: strength" in said and "dilate: strength" not in said
    for words in (["--severity", "0.7"], ["--seed", "3"]):
        make(clean, "--kinds", "dilate", "--ratios", "50", *words)
        assert "dilate: strength" in capsys.readouterr().out, words
    write_mask(clean / "mask/00.png", disc(64, 20))
    make(clean, "--kinds", "dilate", "jitter", "--ratios", "100")
    assert "dilate: strength" in capsys.readouterr().out, "another mask"
    assert first["strength"].nunique() == 2


def test_strengths_are_free_of_the_order_of_a_long_list(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(75):  # the masks beyond those that decide a strength are as different as they can be
        write_mask(tmp_path / f"{i:02d}.png", disc(40, 4 + i % 13, (16 + i % 9, 18 + i % 7)))
    rows = pd.DataFrame([(f"image/{i:02d}.png", f"{i:02d}.png") for i in range(75)], columns=["img", "filename"])
    found = []
    for order in (rows, rows.sample(frac=1, random_state=3)):
        order.to_csv("list.csv", index=False)
        where = tmp_path / f"run{len(found)}"
        words = ["--list", "list.csv", "--out-csv", where / "lists", "--out-masks", where / "noisy", "--ratios", "100"]
        tool.main(parse(tool.Args, [*map(str, words), "--kinds", "jitter", "polygon", "missing"]))
        made = read_list(where / "lists/list_noisy_100.csv").sort_values("img")
        masks = {path.name: path.read_bytes() for path in where.rglob("*.png")}
        found.append((made[["img", "op", "strength", "iou"]].to_numpy().tolist(), masks))
        strengths = json.loads((where / "noisy/strengths.json").read_text())["strengths"]
        assert len(strengths) == 3 and len(masks) > 70
    assert found[0] == found[1]


def test_strengths_that_other_code_found_are_found_again(clean, monkeypatch, capsys):
    monkeypatch.chdir(clean)
    make(clean, "--kinds", "dilate", "--ratios", "50")
    note, made = clean / "noisy/strengths.json", capsys.readouterr().out
    assert "dilate: strength" in made
    record = json.loads(note.read_text())
    monkeypatch.setattr("utils.noise_mixture._rule", lambda: "another")
    note.write_text(json.dumps(record | {"strengths": {"dilate": 1.0}}))
    found = make(clean, "--kinds", "dilate", "--ratios", "50")["list_noisy_50"]
    assert "dilate: strength" in capsys.readouterr().out
    assert set(found["strength"].astype(float)) == {0.0, record["strengths"]["dilate"]}


def test_noise_of_an_image_is_free_of_order_and_of_the_other_images(clean, monkeypatch):
    monkeypatch.chdir(clean)
    words = ["--kinds", "elastic", "--strength", "5", "--ratios", "100"]
    make(clean, *words, "--workers", "1")
    first = {p.name: p.read_bytes() for p in clean.glob("noisy/iteration_noisy_100/*.png")}
    frame = pd.read_csv("list.csv")[::-1][:10]
    frame.to_csv("list.csv", index=False)
    make(clean, *words, "--workers", "3")
    assert len(first) == 24
    for p in clean.glob("noisy/iteration_noisy_100/*.png"):
        assert p.read_bytes() == first[p.name]


def test_many_classes_from_the_command_line(clean, monkeypatch):
    monkeypatch.chdir(clean)
    np.savetxt("matrix.csv", np.full((4, 4), 0.25), delimiter=",")
    words = ["--classes", "4", "--kinds", "confusion", "polygon", "--confusion", "matrix.csv", "--ratios", "100"]
    found = make(clean, *words, "--strength", "0.9", "6", name="many")["many_noisy_100"]
    noisy = found[found["iterations"] > 0]
    assert len(noisy) > 15
    for row in noisy.itertuples():
        mask = read_mask(row.filename, 4)
        assert np.array_equal(mask == 255, read_mask(row.clean, 4) == 255)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--kinds", "smudge"], "known kinds are erode, dilate"),
        (["--kinds", "erode:much"], "a chance is a positive number"),
        (["--kinds", "erode:-1"], "a chance is a positive number"),
        (["--kinds", "erode", "--severity", "1.2"], "--severity 1.2"),
        (["--kinds", "erode", "--strength", "1", "2"], "for each of the 1 kinds"),
        (["--kinds", "confusion"], "--classes of 2 or more"),
        (["--classes", "3"], "with --kinds only"),
        (["--kinds", "erode", "--strength", "inf"], "--strength inf: erode takes more than 0 and at most 60 pixels"),
        (["--kinds", "erode", "--strength", "nan"], "--strength nan: erode"),
        (["--kinds", "erode", "--strength", "0"], "--strength 0: erode"),
        (["--kinds", "box", "missing", "--strength", "1", "5"], "--strength 5: missing takes .* most 0.99 of the area"),
        (["--kinds", "polygon:0.3", "polygon:0.7"], "a kind is named twice"),
        (["--kinds", "erode", "--confusion", "m.csv", "--classes", "4"], "--confusion m.csv: only kind confusion"),
        (["--kinds", "erode", "--severity", "0"], "--severity 0"),
        (["--kinds", "erode", "--severity", "0.7", "--strength", "3"], "leave one out"),
        (["--kinds", "erode", "--op", "erode"], "--op: of no use beside --kinds"),
        (["--kinds", "erode", "--levels", "6", "10"], "--levels: of no use beside --kinds"),
        (["--severity", "0.8"], "--severity: of no use without --kinds"),
        (["--severity", "0"], "--severity: of no use without --kinds"),
        (["--strength", "2"], "--strength: of no use without --kinds"),
        (["--confusion", "m.csv"], "--confusion: of no use without --kinds"),
        (["--kinds", "confusion", "--classes", "4", "--confusion", "none.csv"], "none.csv"),
        (["--kinds", "confusion", "--classes", "4", "--confusion", "list.csv"], "list.csv"),
    ],
)
def test_unusable_flags_are_one_line(clean, monkeypatch, words, says):
    monkeypatch.chdir(clean)
    with pytest.raises(InputError, match=says) as error:
        make(clean, *words)
    assert "\n" not in str(error.value)
    assert not (clean / "out").exists() and not (clean / "noisy").exists()


@pytest.mark.parametrize("name", ["mask/03.png", "image/03.png"])
def test_bad_files_are_named_with_list_and_row_before_any_search(clean, monkeypatch, capsys, name):
    monkeypatch.chdir(clean)
    (clean / name).write_bytes(b"no picture")
    (clean / name.replace("03", "20")).unlink()
    words = ["--list", "list.csv", "--out-csv", "out", "--out-masks", "noisy", "--kinds", "superpixel"]
    with pytest.raises(SystemExit) as stopped:
        launch(tool.main, tool.Args, words)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    assert f"list.csv: 2 bad rows: line 5: {name}" in said and f"line 22: {name.replace('03', '20')}" in said
    assert not (clean / "out").exists() and not (clean / "noisy").exists()


@pytest.mark.parametrize("words", ["--kinds dilate --strength 60", "--kinds erode --strength 0.3", "--levels 90 90"])
def test_no_noise_at_all_is_a_mistake_and_keeps_what_was_there(clean, monkeypatch, words):
    monkeypatch.chdir(clean)
    monkeypatch.setattr(tool, "coarsen", lambda mask, *_, **__: (mask, 0, ""))  # as on masks that nothing may touch
    make(clean, "--kinds", "dilate", "--strength", "2")

    def state():
        return {p: p.read_bytes() for p in clean.rglob("*") if p.is_file()}

    before = state()
    with pytest.raises(InputError, match="60: this noise would empty, fill or not change each of the 14 masks"):
        make(clean, *words.split())
    assert state() == before
    make(clean, *words.split(), "--ratios", "0")
    assert (read_list(clean / "out/list_noisy_0.csv")["iterations"] == 0).all()


def test_a_severity_out_of_reach_is_said(clean, monkeypatch, capsys):
    monkeypatch.chdir(clean)
    make(clean, "--kinds", "ellipse", "--severity", "0.3", "--ratios", "20")
    assert "ellipse cannot cost as much on these masks" in capsys.readouterr().err


def test_the_picture_has_a_row_for_every_kind(tmp_path):
    mask = body()
    write_mask(tmp_path / "mask.png", mask)
    args = add_noise.Args(str(tmp_path / "mask.png"), str(tmp_path / "a.png"), kinds=["all"], severities=[0.9, 0.7])
    add_noise.main(args)
    page = cv2.imread(str(tmp_path / "a.png"))
    rows = len(BINARY) - 1  # without a photograph no superpixels
    assert page.shape[0] == 44 + rows * (224 + 32) + 24
    for words, says in ((["smudge"], "smudge"), (["superpixel"], "--image"), (["confusion"], "confusion")):
        with pytest.raises(InputError, match=says):
            add_noise.main(add_noise.Args(str(tmp_path / "mask.png"), str(tmp_path / "b.png"), kinds=words))
    for flags, says in (({"kinds": ["box"], "levels": [2]}, "--levels"), ({"severities": [0.8]}, "--severities")):
        with pytest.raises(InputError, match=says):
            add_noise.main(add_noise.Args(str(tmp_path / "mask.png"), str(tmp_path / "b.png"), **flags))
