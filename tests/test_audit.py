"""The label audit: its scores and words, what it ranks first, and what its page exports."""

import json
import time
import weakref

import cv2
import numpy as np
import pandas as pd
import pytest
import test_scripts
from browser import broken_pictures, console_errors, open_page, overflow
from conftest import draw_set

from utils import audit, audit_page, label_quality, overlay, plots, predict_mask
from utils.args import parse
from utils.audit_notes import weak
from utils.errors import InputError
from utils.images import read_mask, write_mask
from utils.label_quality import explain, precision_at, ranking_report, soft_scores, suggest
from utils.lists import read_list


def run(root, out, *words, csv="list.csv"):
    words = [root / csv, "--data-root", root, "--out", out, "--cpu", *words]
    audit.main(parse(audit.Args, list(map(str, words))))
    return pd.read_csv(out / "audit.csv")


@pytest.fixture
def faulty(tmp_path):
    """20 drawn images with their masks, of which 3 listed ones are broken; the true masks are the teacher's."""
    root = tmp_path / "set"
    rows = draw_set(root, 20)
    (root / "given").mkdir()
    for i, (_, name) in enumerate(rows):
        mask = read_mask(root / name)
        if i == 4:
            mask[:] = 0
        if i == 9:
            mask[:, : mask.nonzero()[1].max() - 2] = 0
        if i == 15:
            mask[:] = np.roll(mask, 8, axis=0)
        write_mask(root / "given" / f"{i:03d}.png", mask)
    frame = pd.DataFrame(rows, columns=["img", "filename"])
    frame["filename"] = frame["filename"].str.replace("mask/", "given/")
    frame["iterations"] = [int(i in (4, 9, 15)) for i in range(20)]
    frame["site"] = [f'a, "{i}"' for i in range(20)]
    frame.to_csv(root / "list.csv", index=False)
    return root


@pytest.fixture(scope="module")
def teacher(tiny, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    flags = ["--train_csv", "valid.csv", "--test_csv", "", "--epochs", "3", "--size", "32"]
    test_scripts.launch("train_without_weight.py", tiny, runs, "teacher", *flags)
    return runs / "teacher/last.pt"


def softmin_by_hand(values, temperature):
    """As cleanlab defines it: the inner product of s and softmax(1 - s), pixel by pixel."""
    powers = [np.exp((1 - v) / temperature) for v in values]
    return sum(v * p for v, p in zip(values, powers, strict=True)) / sum(powers)


def test_soft_score_of_two_and_of_three_classes_is_the_softmin_by_definition():
    rng = np.random.default_rng(0)
    p, mask = rng.random((1, 5, 7)), rng.integers(0, 2, (5, 7)).astype(np.uint8)
    given = [p[0, y, x] if mask[y, x] else 1 - p[0, y, x] for y in range(5) for x in range(7)]
    for temperature in (0.1, 1.0):
        assert soft_scores(p, mask, temperature)["soft"] == pytest.approx(softmin_by_hand(given, temperature))
    p = rng.dirichlet(np.ones(3), (5, 7)).transpose(2, 0, 1)
    mask = rng.choice([0, 1, 2, 255], (5, 7)).astype(np.uint8)
    given = [p[mask[y, x], y, x] for y in range(5) for x in range(7) if mask[y, x] != 255]
    assert soft_scores(p, mask)["soft"] == pytest.approx(softmin_by_hand(given, 0.1))


def test_margin_counts_a_pixel_by_how_sure_the_teacher_is():
    mask = np.array([[1, 1, 0, 0]], np.uint8)
    found = soft_scores(np.array([[[0.9, 0.3, 0.8, 0.1]]]), mask)
    # apart are the second pixel, 0.7 - 0.3, and the third, 0.8 - 0.2, of three in either mask
    assert found["margin"] == pytest.approx(1 - (0.4 + 0.6) / 3)
    assert found["sure"] == pytest.approx(0.5)
    certain = soft_scores(np.array([[[1.0, 0.0, 1.0, 0.0]]]), mask)
    assert certain["margin"] == pytest.approx(1 / 3)  # IoU


def test_scores_of_void_and_of_nothing():
    void = np.full((2, 2), 255, np.uint8)
    found = soft_scores(np.full((3, 2, 2), 1 / 3), void)
    assert found["soft"] == found["margin"] == 1 and np.isnan(found["sure"])
    assert soft_scores(np.zeros((1, 2, 2)), np.zeros((2, 2), np.uint8))["margin"] == 1


def box(y0, y1, x0, x1, side=100):
    mask = np.zeros((side, side), np.uint8)
    mask[y0:y1, x0:x1] = 1
    return mask


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (box(20, 80, 30, 70), "agrees"),
        (box(0, 0, 0, 0), "mask empty"),
        (box(0, 100, 0, 100), "mask full"),
        (1 - box(18, 82, 28, 72), "inverted"),
        (box(30, 90, 38, 78), "shifted by 13 px"),
        (box(20, 50, 30, 70), "part missing"),
        (box(20, 80, 30, 70) | box(5, 15, 80, 98), "extra region"),
        (box(23, 77, 33, 67), "boundary off (too tight)"),
        (box(17, 83, 27, 73), "boundary off (too wide)"),
    ],
)
def test_reason_names_the_planted_fault(given, reason):
    assert explain(box(20, 80, 30, 70), given) == reason


def test_reason_of_objects_and_of_classes():
    two = box(20, 80, 10, 40) | box(20, 80, 60, 90)
    assert explain(two, box(20, 80, 10, 40)) == "object missing"
    assert explain(box(0, 0, 0, 0), two) == "teacher sees nothing"
    given = box(20, 80, 10, 40) * 2
    assert explain(box(20, 80, 10, 40), given, 3) == "1 labelled as 2"
    assert explain(given, np.full((100, 100), 255, np.uint8), 3) == "mask is all void"
    small = box(50, 55, 50, 60)  # a tenth of a small object, however large the image
    assert explain(small, small * 2 - box(50, 55, 50, 59), 3) == "1 labelled as 2"
    assert explain(given, given, 3) == "agrees"


def test_precision_at_k_and_report_have_their_hand_values():
    noisy = np.array([True, False, True, False])
    assert precision_at(np.array([0.1, 0.2, 0.3, 0.4]), noisy).tolist() == pytest.approx([1, 1 / 2, 2 / 3, 1 / 2])
    # of two equal values one is noisy: half a hit is to be expected of the first
    assert precision_at(np.array([0.1, 0.1, 0.3, 0.4]), noisy)[0] == pytest.approx(0.5)
    report = ranking_report(np.array([0.1, 0.2, 0.3, 0.4]), noisy, at=(1, 2, 9))
    assert report == pytest.approx({"AUROC": 3 / 4, "AUPRC": (1 + 2 / 3) / 2, "P@1": 1, "P@2": 0.5, "P@noisy": 0.5})
    assert ranking_report(np.ones(4), np.zeros(4, bool)) == {}


def test_combination_is_the_mean_of_percentile_ranks():
    scores = {"iou": np.array([0.1, 0.9, 0.5, 0.5]), "bf": np.array([0.8, 0.1, 0.2, 0.3])}
    assert label_quality.combine(scores, ["iou", "bf"]).tolist() == pytest.approx([5 / 8, 5 / 8, 4.5 / 8, 5.5 / 8])
    assert label_quality.combine(scores, ["bf"]) is scores["bf"]


def test_verdicts_follow_the_distance_from_the_median_and_the_doubt_of_the_teacher():
    # logit(0.9) = 2.20, logit(0.75) = 1.10: 2.7 of the least deviation, 0.4; logit(0.6) = 0.41: 4.5 of it
    iou = np.array([0.9] * 20 + [0.75, 0.6, 0.3, 0.3])
    sure = np.array([0.9] * 23 + [0.2])
    found = suggest({"iou": iou, "sure": sure}, ["iou"], ["agrees"] * 24)
    assert found == ["keep"] * 20 + ["check", "fix", "drop", "check"]


@pytest.mark.parametrize("bad", [10, 50, 80])
def test_verdicts_hold_where_most_masks_are_bad(bad):
    """Two groups of scores, whichever is the larger; one group alone is kept, but for its own outliers."""
    rng = np.random.default_rng(bad)
    bf = np.concatenate([rng.uniform(0, 0.15, bad), rng.normal(0.75, 0.06, 100 - bad).clip(0, 1)])
    found = suggest({"bf": bf, "iou": np.full(100, 0.6)}, ["bf"], ["boundary off"] * 100)
    assert set(found[:bad]) == {"fix"} and found[bad:].count("keep") >= 98 - bad
    alone = rng.normal(0.75, 0.06, 100).clip(0, 1)
    assert suggest({"bf": alone, "iou": alone}, ["bf"], ["boundary off"] * 100).count("keep") >= 98


@pytest.mark.parametrize("by", [["iou"], ["bf"], ["iou", "bf"]])
def test_broken_masks_come_first(faulty, tmp_path, by):
    table = run(faulty, tmp_path / "out", "--teacher", faulty / "mask", "--rank-by", *by)
    assert set(table["img"][:3]) == {"image/004.png", "image/009.png", "image/015.png"}
    assert (table["verdict"][:3] != "keep").all() and (table["verdict"][3:] == "keep").all()
    assert table["reason"].tolist()[3:] == ["agrees"] * 17 and "mask empty" in table["reason"].tolist()
    page = (tmp_path / "out/index.html").read_text()  # a combination is judged like its scores
    assert (f"<td>{' + '.join(by)}</td>" in page) and page.count("<td>1.000</td>") >= 2
    assert sorted(read_list(tmp_path / "out/audit.csv")["site"]) == sorted(read_list(faulty / "list.csv")["site"])


def test_page_of_known_noise_has_the_curves_and_says_what_a_teacher_cannot_see(faulty, tmp_path, capsys):
    out = tmp_path / "out"
    table = run(faulty, out, "--teacher", faulty / "mask", "--show", 5)
    assert "warning: Nothing says that the teacher was trained on masks you trust" in capsys.readouterr().err
    page = (out / "index.html").read_text()
    assert "cannot see it" in page and "the teacher agrees with few" not in page
    light, dark = ((out / f"ranking{kind}.svg").read_text() for kind in ("", "-dark"))
    assert (out / "ranking.png").exists() and 'srcset="ranking-dark.svg"' in page
    assert "taken for noisy" in light and plots.INK in light and plots.INK not in dark
    worst = {i + 1 for score in ("miou", "bf", "bm", "iou", "dice") for i in np.argsort(table[score])[:5]}
    assert {int(p.stem) for p in (out / "thumbs").iterdir()} == worst | {1, 2, 3, 4, 5}
    run(faulty, out, "--teacher", faulty / "mask", "--show", 5, "--trusted")
    assert "cannot see it" not in (out / "index.html").read_text()
    (faulty / "mask/teacher.json").write_text(json.dumps({"trusted": True}))
    run(faulty, tmp_path / "two", "--teacher", faulty / "mask")
    assert "cannot see it" not in (tmp_path / "two/index.html").read_text()


def test_same_command_does_nothing_and_another_mask_does_it_again(faulty, tmp_path, capsys):
    out, words = tmp_path / "out", ["--teacher", faulty / "mask"]
    run(faulty, out, *words)
    before = (out / "index.html").stat().st_mtime_ns
    run(faulty, out, *words)
    assert "is there already" in capsys.readouterr().out and (out / "index.html").stat().st_mtime_ns == before
    write_mask(faulty / "given/000.png", np.zeros((32, 32), np.uint8))
    assert "image/000.png" in run(faulty, out, *words)["img"].tolist()[:4]


def test_checkpoints_add_soft_scores_and_write_masks(tiny, teacher, tmp_path, capsys):
    table = run(tiny, tmp_path / "out", "--teacher", teacher, csv="noisy.csv")
    assert list(pd.read_csv(tmp_path / "out/audit.csv").columns[5:13]) == [*label_quality.SCORES, "sure"]
    assert table["soft"].is_monotonic_increasing and table["margin"].between(0, 1).all()
    predict_mask.main(
        predict_mask.Args(str(tiny / "noisy.csv"), [str(teacher)], str(tmp_path / "m"), data_root=str(tiny), cpu=True)
    )
    assert (read_mask(tmp_path / "m/003.png") == read_mask(tmp_path / "out/masks/003.png")).all()
    capsys.readouterr()
    run(tiny, tmp_path / "leak", "--teacher", teacher, csv="valid.csv")
    assert capsys.readouterr().err.count("5 of 5 images trained the teacher itself") == 1
    assert "trained the teacher itself" in (tmp_path / "leak/index.html").read_text()


def test_few_probabilities_are_in_memory_however_long_the_list_is(tmp_path, monkeypatch):
    rows = draw_set(tmp_path / "set", 1)
    frame = pd.DataFrame(rows * 60, columns=["img", "filename"]).assign(line=range(60))
    alive, most = weakref.WeakSet(), 0

    class Array(np.ndarray):
        __hash__ = object.__hash__  # so that a weak set can hold it

    def items():
        nonlocal most
        for i in range(60):
            p = np.full((1, 32, 32), 0.3, np.float32).view(Array)
            alive.add(p)
            most = max(most, len(alive))
            yield i, p, (32, 32)
            del p

    args = parse(audit.Args, ["x", "--teacher", "t.pt", "--data-root", str(tmp_path / "set")])
    source = audit.Source([str(tmp_path / f"{i}.png") for i in range(60)], 1, items(), True, 0)
    scores, _ = audit._judge_all(frame, source, args)
    assert len(scores["soft"]) == 60 and 1 <= most <= audit._AHEAD + 8


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--teacher", "mask", "--rank-by", "taste"], "--rank-by taste: known scores are"),
        (["--teacher", "mask", "--rank-by", "soft"], "needs probabilities"),
        (["--teacher", "nowhere"], "no such folder"),
        (["--teacher", "image", "mask"], "one folder of masks"),
        (["--teacher", "none.pt"], "no such checkpoint"),
        (["--teacher", "run"], r"run: is a run folder; did you mean .*run/best\.pt\?"),
        (["--teacher", "sweep"], r"sweep: is a run folder; did you mean .*sweep/a/last\.pt\?"),
        (["--teacher", "mask", "--folds", "3"], "--folds"),
        (["--teacher", "mask", "--cuts", "4", "2"], "--cuts 4.0 2.0"),
    ],
)
def test_bad_flags_are_one_line(faulty, tmp_path, words, said):
    for name in ("run/best.pt", "sweep/a/last.pt"):
        (faulty / name).parent.mkdir(parents=True)
        (faulty / name).touch()
    words = [str(faulty / word) if (faulty / word).exists() or word == "none.pt" else word for word in words]
    with pytest.raises(InputError, match=said) as error:
        run(faulty, tmp_path / "out", *words)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_bad_files_name_their_rows_and_leave_foreign_folders_alone(faulty, tmp_path):
    (faulty / "mask/007.png").unlink()
    with pytest.raises(InputError, match=r"list\.csv: 1 bad row: line 9: .*007\.png: no such file"):
        run(faulty, tmp_path / "out", "--teacher", faulty / "mask")
    write_mask(faulty / "mask/007.png", np.zeros((30, 32), np.uint8))
    with pytest.raises(InputError, match=r"line 9: .*given/007\.png is 32x32, its mask .*mask/007\.png 32x30"):
        run(faulty, tmp_path / "out", "--teacher", faulty / "mask")
    (faulty / "empty.csv").write_text("img,filename\n")
    with pytest.raises(InputError, match="the list has no rows"):
        run(faulty, tmp_path / "out", "--teacher", faulty / "mask", csv="empty.csv")
    (tmp_path / "own").mkdir()
    (tmp_path / "own/thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="was not written by this tool"):
        run(faulty, tmp_path / "own", "--teacher", faulty / "given")


@pytest.mark.parametrize("value", [255, 2])
def test_binary_masks_beside_a_teacher_of_classes_are_refused_before_anything_is_replaced(faulty, tmp_path, value):
    for path in (faulty / "given").iterdir():
        mask = read_mask(path)
        write_mask(path, mask * np.uint8(value), 3)
        write_mask(faulty / "mask" / path.name, mask, 3)
    out, words = tmp_path / "out", ["--teacher", faulty / "mask", "--classes", 3]
    if value == 255:
        with pytest.raises(InputError, match=r"list\.csv: the masks hold only 0 and 255, but .* 3 classes; ") as error:
            run(faulty, out, *words)
        assert "\n" not in str(error.value) and not out.exists()
    else:
        run(faulty, out, *words)
        page = (out / "index.html").read_text()
        assert page.count('class="class"') == 2  # classes 1 and 2, in the colours of the pictures
        for colour in overlay.palette(3)[1:]:
            assert "background:#{:02x}{:02x}{:02x}".format(*colour) in page
        pixels = cv2.imread(str(out / "thumbs/20.webp"))[..., ::-1]
        assert pixels.shape[:2] == (32, 128)


def test_a_teacher_that_agrees_with_few_masks_is_noted(faulty, tmp_path, capsys):
    for path in (faulty / "given").iterdir():
        mask = read_mask(path)
        mask[: mask.nonzero()[0].mean().round().astype(int) if mask.any() else 0] = 0
        write_mask(path, mask)
    median = run(faulty, tmp_path / "out", "--teacher", faulty / "mask")["iou"].median()
    assert median < 0.6
    said = f"agrees with few masks (median IoU {median:.2f})"
    assert said in capsys.readouterr().err and said in (tmp_path / "out/index.html").read_text()
    assert weak(np.array([0.5, 0.6, 0.9])) is None and weak(np.array([0.5, 0.59, 0.9]))


HOSTILE = ['</script><script>document.title="x"', 'q"uo,te', "<img src=x onerror=alert(1)>", "ä ö#?%41", "=1+1"]


def test_page_exports_a_list_whatever_the_names_are(tmp_path):
    rows = draw_set(tmp_path / "set", len(HOSTILE))
    root, out = tmp_path / "set", tmp_path / "out"
    frame = pd.DataFrame(rows, columns=["img", "filename"])
    for i, name in enumerate(HOSTILE):
        target = f"image/{name.replace('/', '_')}.png"
        (root / rows[i][0]).rename(root / target)
        frame.loc[i, "img"] = target
    frame["note"] = HOSTILE
    frame.to_csv(root / "list.csv", index=False)
    frame[["img", "filename"]].to_csv(root / "same.csv", index=False)
    run(root, out, "--teacher", root / "same.csv")
    with open_page(out / "index.html") as driver:
        driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
        assert len(driver.find_elements("css selector", ".card")) == len(HOSTILE)
        assert driver.title.startswith("Label audit")
        order = driver.execute_script("return data.rows.map(row => row[0])")
        tick(driver, order.index(frame["img"][1]), "drop")
        tick(driver, order.index(frame["img"][3]), "fix")
        tick(driver, order.index(frame["img"][0]), "keep")
        driver.find_element("id", "kept").click()
        driver.find_element("id", "decisions").click()
        for name in ("kept.csv", "decisions.csv"):
            wait_for(lambda name=name: (tmp_path / name).exists())
        driver.refresh()  # the ticks are still there
        assert driver.execute_script("return keptCsv()") == (tmp_path / "kept.csv").read_text()
        assert console_errors(driver) == []
    kept = read_list(tmp_path / "kept.csv").drop(columns="line")
    pd.testing.assert_frame_equal(kept, frame.drop([1, 3]).reset_index(drop=True), check_dtype=False)
    decided = pd.read_csv(tmp_path / "decisions.csv").set_index("img")["decision"]
    assert decided.to_dict() == {frame["img"][0]: "keep", frame["img"][1]: "drop", frame["img"][3]: "fix"}


def tick(driver, i, value):
    driver.execute_script(f"document.querySelector(`input[name=tick{i}][value={value}]`).click()")


def wait_for(done):
    end = time.monotonic() + 10
    while not done() and time.monotonic() < end:
        time.sleep(0.05)
    assert done()


@pytest.mark.parametrize("width", [390, 1280])
def test_page_filters_and_sorts_and_fits_the_screen(faulty, tmp_path, width):
    out = tmp_path / "out"
    table = run(faulty, out, "--teacher", faulty / "mask", "--show", 0)
    with open_page(out / "index.html", width) as driver:
        assert overflow(driver) == 0
        assert driver.find_element("css selector", ".card h2").text == f"1. {table['img'][0]}"
        first = driver.find_element("css selector", "button.panels").rect["y"]
        head = driver.find_element("css selector", ".note summary")
        assert first < 780 and head.is_displayed() and "cannot see the bias" in head.text
        driver.execute_script(
            "by('filters').open = true; document.querySelectorAll('img').forEach(i => i.loading = 'eager')"
        )
        wait_for(lambda: not broken_pictures(driver))
        driver.find_element("id", "text").send_keys("mask empty")
        assert [h.text for h in driver.find_elements("css selector", ".card h2")] == ["1. image/004.png"]
        driver.find_element("id", "text").clear()
        choose(driver, "noisy", "false")
        assert driver.find_element("id", "shown").text == "17 of 20 images"
        choose(driver, "noisy", "")
        driver.execute_script("by('low').value = 0.5; by('score').value = 'iou'; choose()")
        assert driver.find_element("id", "shown").text == f"{(table['iou'] >= 0.5).sum()} of 20 images"
        driver.execute_script("by('low').value = ''; by('down').checked = true")
        choose(driver, "sort", "bf")
        values = driver.execute_script("return shown.map(i => data.scores.bf[i])")
        assert values == sorted(values, reverse=True) and len(values) == 20
        panels = driver.find_element("css selector", "button.panels")
        driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", panels)  # not below the bar
        panels.click()
        assert driver.execute_script("return by('zoom').open") and overflow(driver) == 0
        assert console_errors(driver) == []


@pytest.mark.parametrize("width", [390, 1280])
def test_a_tall_image_does_not_stretch_its_row(tmp_path, width):
    names = ["image/a.png", "image/b.png"]
    table = pd.DataFrame({"img": names, "filename": names, "row": [0, 1], "rank": [1, 2], "line": [2, 3]})
    table = table.assign(verdict="keep", reason="agrees")
    about = {"list": "x.csv", "teacher": ["m"], "folds": 0, "rank_by": ["iou"], "notes": [], "classes": 1}
    about |= {"cuts": [2.0, 3.0], "key": "k"}
    sizes = {0: (33, 97), 1: (96, 96)}
    audit_page.write(tmp_path / "index.html", table, {"iou": np.array([0.1, 0.2])}, sizes, {}, about)
    with open_page(tmp_path / "index.html", width) as driver:
        tall, square = (p.size["height"] for p in driver.find_elements("css selector", "button.panels"))
        assert 250 < tall < 380 and 120 < square < 380


def choose(driver, control, value):
    script = "by(arguments[0]).value = arguments[1]; by(arguments[0]).dispatchEvent(new Event('change'))"
    driver.execute_script(script, control, value)


def test_page_of_thousands_draws_one_page_of_cards(tmp_path):
    count = 5000
    names = [f"image/{i}.png" for i in range(count)]
    table = pd.DataFrame({"img": names, "filename": names, "row": range(count), "rank": range(1, count + 1)})
    table = table.assign(verdict="keep", reason="agrees", line=range(2, count + 2))
    about = {"list": "x.csv", "teacher": ["m"], "folds": 0, "rank_by": ["iou"], "notes": [], "classes": 1}
    about |= {"cuts": [2.0, 3.0], "key": "k"}
    audit_page.write(tmp_path / "index.html", table, {"iou": np.linspace(0, 1, count)}, {}, {}, about)
    with open_page(tmp_path / "index.html") as driver:
        assert len(driver.find_elements("css selector", ".card")) == 24
        spent = driver.execute_script("const t = performance.now(); choose(); return performance.now() - t")
        assert spent < 1000
        assert driver.find_element("css selector", ".page").text == "page 1 of 209"
