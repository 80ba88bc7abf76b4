"""What a run survives: kills, signals, damaged checkpoints, full disks, numbers that are not finite, little memory."""

import importlib
import json
import os
import pydoc
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import test_scripts
import torch
from conftest import draw_lists
from kill_and_resume import command, differences, finish, kill_and_compare, start
from test_scripts import BASE, ROOT, SCRIPTS, SMALL, rows_of, same

import utils.checkpoint
import utils.evaluate
import utils.interrupt
from utils.args import TrainArgs, launch
from utils.averages import Averages
from utils.batches import Batches
from utils.checkpoint import read_checkpoint, write_checkpoint
from utils.errors import InputError
from utils.interrupt import RESUME, Paused, stop
from utils.run import Run
from utils.steps import Steps

STEPS = 3  # of an epoch with the flags of test_scripts: 13 images in fours, and one alone, which is left out


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    return draw_lists(tmp_path_factory.mktemp("lists"))


@pytest.fixture
def root(lists, tmp_path):
    """The images and lists, with a folder for runs of its own."""
    for path in lists.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def run_in_fork(root, name, *more, script=BASE, before=None):
    """(exit code, output) of a script in a process of its own."""
    module, log = importlib.import_module(Path(script).stem), root / f"{name}.txt"
    code = finish(start(command(module, root, name, [*more]), log, before))
    text = log.read_text()
    log.unlink()
    return code, text


# kills


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "how"),
    [(s, how) for s in SCRIPTS for how in ("--precision fp32", "--precision bf16 --workers 2")]
    + [(s, "--save-minutes 1e-9") for s in (BASE, "train_co_teaching+.py")],
)
def test_killed_at_random_moments(script, how, root):
    kills = 12 if (script, how) == (BASE, "--precision fp32") else 3
    told = kill_and_compare(script, root, kills, len(how), how.split())
    assert told["killed"] == kills and not told["different"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "number"), [(BASE, signal.SIGINT), (BASE, signal.SIGTERM), ("train_co_teaching+.py", signal.SIGTERM)]
)
def test_signalled_at_random_moments(script, number, root):
    told = kill_and_compare(script, root, 6, 2, ["--workers", "1"], number)
    assert not told["different"] and told["codes"] == {0, RESUME}


MOMENTS = {
    "before anything is written": ("utils.run.replace_text", 1),
    "flushing the first checkpoint": ("os.fsync", 4),
    "between best.pt and last.pt": ("utils.checkpoint.write_checkpoint", 2),
    "while last.pt is put aside": ("utils.checkpoint._link", 1),
    "before last.pt gets its name": ("pathlib.Path.replace", 8),
    "in a step": ("utils.steps.Steps.step", 9),
    "in an evaluation": ("utils.evaluate.pixel_counts", 4),
    "between log and checkpoint": ("utils.run.Run._tensorboard", 2),
    "before the test": ("utils.checkpoint.Checkpoint.chosen", 1),
}


def kill_at(target, nth):
    """Replace a function by one that kills its process when it is called for the `nth` time."""

    def arm():
        where, name = target.rsplit(".", 1)
        owner = pydoc.locate(where)
        real, calls = getattr(owner, name), iter(range(1, 10_000))

        def deadly(*args, **kwargs):
            if next(calls) == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(owner, name, deadly)

    return arm


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_a_chosen_moment(moment, root):
    flags = ["--epochs", "3"]
    assert run_in_fork(root, "whole", *flags)[0] == 0
    assert run_in_fork(root, "killed", *flags, before=kill_at(*MOMENTS[moment]))[0] == -signal.SIGKILL
    code, text = run_in_fork(root, "killed", *flags)
    assert code == 0, text
    assert not differences(root / "runs/whole", root / "runs/killed")
    assert not list((root / "runs/killed").glob(".*.writing"))


def test_loader_process_does_not_outlive_its_parent(root):
    """Also not one whose parent was killed before it could begin to watch it."""

    def arm():
        begin = utils.interrupt.in_loader_process

        def slowly(worker, parent):
            (root / "loader").write_text(str(os.getpid()))
            while os.getppid() == parent:
                time.sleep(0.01)
            begin(worker, parent)

        utils.interrupt.in_loader_process = slowly

    child = start(command(importlib.import_module(Path(BASE).stem), root, "a", ["--workers", "1"]), root / "out", arm)
    while not (root / "loader").exists() or not (root / "loader").read_text():
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    assert finish(child) == -signal.SIGKILL
    wait_until(lambda: not Path("/proc", (root / "loader").read_text()).exists())


def wait_until(true, seconds=20):
    began = time.time()
    while not true():
        assert time.time() - began < seconds
        time.sleep(0.02)


# signals


def ask_at_step(monkeypatch, nth, number=signal.SIGTERM):
    """Send this process a signal in the `nth` step from now on; counts the steps in the list it returns."""
    step, seen = Steps.step, []

    def asking(self, *args, **kwargs):
        seen.append(1)
        if len(seen) == nth:
            os.kill(os.getpid(), number)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Steps, "step", asking)
    return seen


@pytest.mark.parametrize("script", SCRIPTS)
def test_asked_to_stop_it_goes_on_at_the_next_step(script, tiny, tmp_path, monkeypatch):
    nets = 2 if any(name in script for name in ("co_teaching", "decoupling", "lpl")) else 1
    more = ["--window", "3"] if "co_teaching" in script else []
    flags = ["--epochs", "2", "--augment", "flip", *more]
    whole = test_scripts.launch(script, tiny, tmp_path, "whole", *flags)
    with monkeypatch.context() as patch, pytest.raises(Paused), stop.listening():
        first = ask_at_step(patch, 2 * nets)
        test_scripts.launch(script, tiny, tmp_path, "parts", *flags)
    assert read_checkpoint(tmp_path / "parts/last.pt")["inside"]["step"] == 2
    with monkeypatch.context() as patch:
        rest = ask_at_step(patch, -1)
        parts = test_scripts.launch(script, tiny, tmp_path, "parts", *flags)
    assert all(map(same, whole, parts)) and rows_of(tmp_path / "whole") == rows_of(tmp_path / "parts")
    assert len(first) == 2 * nets and len(first) + len(rest) == 2 * STEPS * nets


def test_asked_in_an_evaluation_it_does_not_train_again(tiny, tmp_path, monkeypatch):
    whole = test_scripts.launch(BASE, tiny, tmp_path, "whole", "--epochs", "1")
    real = utils.evaluate.pixel_counts

    def asking(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    with monkeypatch.context() as patch, pytest.raises(Paused), stop.listening():
        patch.setattr(utils.evaluate, "pixel_counts", asking)
        test_scripts.launch(BASE, tiny, tmp_path, "parts", "--epochs", "1")
    monkeypatch.setattr(Steps, "step", lambda *_: pytest.fail("trains again"))
    assert same(whole[0], test_scripts.launch(BASE, tiny, tmp_path, "parts", "--epochs", "1")[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_exit_code_says_resume_me(number, root):
    def ask():
        step = Steps.step

        def asking(self, *args, **kwargs):
            os.kill(os.getpid(), number)
            return step(self, *args, **kwargs)

        Steps.step = asking

    code, text = run_in_fork(root, "a", before=ask)
    assert code == RESUME == 75 and text.splitlines()[-1] == "paused; the same command goes on from here"
    assert "Traceback" not in text


def test_asked_before_there_is_anything_to_save(root):
    def ask():
        Run.build = lambda *_: os.kill(os.getpid(), signal.SIGTERM)

    code, text = run_in_fork(root, "a", before=ask)
    assert code == RESUME and "Traceback" not in text and not (root / "runs/a/last.pt").exists(), text
    assert run_in_fork(root, "a")[0] == 0


def test_pressed_twice_it_does_not_wait(root):
    def ask():
        def asking(*_, **__):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)

        Steps.step = asking

    began = time.time()
    assert run_in_fork(root, "a", before=ask)[0] == RESUME and time.time() - began < 30


def test_a_request_that_a_library_takes_for_its_own_error_is_still_a_request():
    """As pydantic does where a signal comes while albumentations is imported; an error of its own stays one."""

    def importing(asked):
        with stop.listening():
            try:
                if asked:
                    os.kill(os.getpid(), signal.SIGTERM)
            except Paused as error:
                raise ValueError("Error building serializer") from error
            raise ValueError("no such thing")

    with pytest.raises(Paused):
        importing(True)
    with pytest.raises(ValueError, match="no such thing"):
        importing(False)


def test_ctrl_c_that_the_parent_ignores_stays_ignored(tiny, tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop.listening():
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop.asked
    finally:
        signal.signal(signal.SIGINT, before)


# checkpoints


def epochs_of(root, count):
    """A run of three epochs that was killed when `count` were done; the run left alone beside it."""
    assert run_in_fork(root, "whole", "--epochs", "3")[0] == 0

    def arm():
        log = Run.log

        def kill(run, **row):
            if row["epoch"] == count:
                run.checkpoint.wait()  # a slow disk may still be writing the epoch before
                os.kill(os.getpid(), signal.SIGKILL)
            log(run, **row)

        Run.log = kill

    assert run_in_fork(root, "parts", "--epochs", "3", before=arm)[0] == -signal.SIGKILL
    return root / "runs/parts"


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 16
    path.write_bytes(raw)


def put_code_in(path):
    torch.save({"nets": [Code()]}, path)


def leave_out_the_optimizers(path):
    state = read_checkpoint(path)
    del state["optimizers"]
    torch.save(state, path)


def other_width(path):
    state = read_checkpoint(path)
    torch.save(state | {"nets": [{k: v.flatten()[:1] for k, v in net.items()} for net in state["nets"]]}, path)


def empty_inside(path):
    torch.save(read_checkpoint(path) | {"inside": {}}, path)


class Code:
    def __reduce__(self):
        return os.system, ("touch /tmp/this_must_never_run",)


@pytest.mark.parametrize(
    "damage", [truncate, flip_a_bit, put_code_in, leave_out_the_optimizers, Path.unlink, other_width, empty_inside]
)
def test_damaged_checkpoint_falls_back_to_the_one_before(damage, root):
    folder = epochs_of(root, 2)
    damage(folder / "last.pt")
    code, text = run_in_fork(root, "parts", "--epochs", "3")
    assert code == 0 and not differences(root / "runs/whole", folder)
    if damage is not Path.unlink:
        assert "warning: " in text and "last.pt" in text and "Going on from" in text and "after 1 epochs" in text
    assert not Path("/tmp/this_must_never_run").exists()


def test_damaged_checkpoint_does_not_replace_the_good_one(root):
    folder = epochs_of(root, 2)
    truncate(folder / "last.pt")
    kill = kill_at("utils.run.Run.log", 2)
    assert run_in_fork(root, "parts", "--epochs", "3", before=kill)[0] == -signal.SIGKILL
    assert [read_checkpoint(folder / name)["epoch"] for name in ("previous.pt", "last.pt")] == [0, 1]


def test_no_good_checkpoint_is_said_and_nothing_is_lost(root):
    folder = epochs_of(root, 2)
    truncate(folder / "last.pt"), truncate(folder / "previous.pt")
    log = (folder / "log.jsonl").read_bytes()
    code, text = run_in_fork(root, "parts", "--epochs", "3")
    assert code == 2 and "last.pt" in text and "previous.pt" in text and "Remove " in text and "Traceback" not in text
    assert (folder / "log.jsonl").read_bytes() == log


@pytest.mark.parametrize("damage", [flip_a_bit, Path.unlink])
@pytest.mark.parametrize("best", [0, 1])
def test_damaged_best_is_written_anew_if_it_can_be_else_said(best, damage, root):
    folder = epochs_of(root, 2)
    state = read_checkpoint(folder / "last.pt")
    write_checkpoint(folder / "last.pt", state | {"best_epoch": best, "best": 2.0})
    damage(folder / "best.pt")
    code, text = run_in_fork(root, "parts", "--epochs", "3")
    assert "best.pt" in text and "Traceback" not in text
    if best:
        assert code == 0 and same(read_checkpoint(folder / "best.pt")["nets"][0], state["nets"][0])
    else:
        assert code == 2 and f"remove {folder} to train again" in text


def test_a_write_that_failed_is_said_when_the_run_is_told_to_stop(root):
    def arm():
        save = utils.checkpoint.write_checkpoint

        def full(path, *rest):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)
            if path.name == "last.pt":
                raise InputError(f"{path}: cannot be written")
            save(path, *rest)

        utils.checkpoint.write_checkpoint = full

    code, text = run_in_fork(root, "a", "--epochs", "2", before=arm)
    assert code == 2 and "cannot be written" in text and "Traceback" not in text, text


def test_a_run_from_before_a_flag_existed_goes_on(root):
    folder = epochs_of(root, 1)
    args = json.loads((folder / "args.json").read_text())
    del args["accumulate"]
    (folder / "args.json").write_text(json.dumps(args))
    assert run_in_fork(root, "parts", "--epochs", "3")[0] == 0
    assert not differences(root / "runs/whole", folder)


@pytest.mark.parametrize("room", [400, 3_000, 30_000])
def test_full_disk_names_the_file_and_keeps_the_last_good_checkpoint(room, root):
    """A limit on the size of files stands in for a full disk: met by args.json, the log, a checkpoint."""
    folder = epochs_of(root, 1)
    good = (folder / "last.pt").read_bytes()

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    code, text = run_in_fork(root, "parts", "--epochs", "3", before=fill)
    assert code == 2 and "Traceback" not in text
    names = {400: ["args.json"], 3000: ["log.jsonl", "best.pt", "last.pt"], 30_000: ["best.pt", "last.pt"]}[room]
    assert any(f"{folder}/{one}: cannot be written" in text for one in names) and "make room" in text
    assert (folder / "last.pt").read_bytes() == good and not list(folder.glob(".*.writing"))
    assert run_in_fork(root, "parts", "--epochs", "3")[0] == 0
    assert not differences(root / "runs/whole", folder)


def test_reader_never_sees_a_part(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    write_checkpoint(path, {"a": 1})

    def break_off(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", break_off)
    with pytest.raises(InputError, match=r"a\.pt: cannot be written .No space left on device.; make room"):
        write_checkpoint(path, {"a": 2}, tmp_path / "b.pt")
    assert read_checkpoint(path) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_saved_inside_an_epoch_when_it_is_time(tiny, tmp_path, monkeypatch):
    flags = ["--epochs", "1", "--save-minutes", "1e-9"]
    whole = test_scripts.launch(BASE, tiny, tmp_path, "whole", *flags)

    class Dead(Exception):
        pass

    def die(*_):
        raise Dead

    with monkeypatch.context() as patch, pytest.raises(Dead):
        patch.setattr("utils.evaluate.pixel_counts", die)
        test_scripts.launch(BASE, tiny, tmp_path, "parts", *flags)
    assert read_checkpoint(tmp_path / "parts/last.pt")["inside"]["step"] == STEPS
    assert same(whole[0], test_scripts.launch(BASE, tiny, tmp_path, "parts", *flags)[0])


# one folder, one process


def test_second_process_on_a_folder_is_refused_at_once(root):
    def hold():
        def hang(*_, **__):
            (root / "started").touch()
            time.sleep(60)

        Steps.step = hang

    module = importlib.import_module(Path(BASE).stem)
    first = start(command(module, root, "a", []), root / "out.txt", hold)
    try:
        while not (root / "started").exists():
            time.sleep(0.05)
        began = time.time()
        code, text = run_in_fork(root, "a")
        assert code == 2 and f"process {first} on " in text and "runs here; wait for it" in text
        assert time.time() - began < 10
    finally:
        os.kill(first, signal.SIGKILL)
        finish(first)
    assert run_in_fork(root, "a")[0] == 0, "the lock of a dead process is taken over"


# precision, accumulation


def test_fp16_goes_on_with_its_loss_scale(tiny, tmp_path, monkeypatch):
    flags = ["--epochs", "2", "--precision", "fp16"]
    whole = test_scripts.launch(BASE, tiny, tmp_path, "whole", *flags)
    with monkeypatch.context() as patch, pytest.raises(Paused), stop.listening():
        ask_at_step(patch, 6)
        test_scripts.launch(BASE, tiny, tmp_path, "parts", *flags)
    assert read_checkpoint(tmp_path / "parts/last.pt")["scalers"][0]["_growth_tracker"] == 6
    assert same(whole[0], test_scripts.launch(BASE, tiny, tmp_path, "parts", *flags)[0])


class Line(torch.nn.Module):
    """One number, so that a loss w x has the gradient x."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(()))
        self.register_buffer("seen", torch.zeros(()))


class Numbers(torch.utils.data.Dataset):
    """Images that are numbers: 1, 2, 3, ..."""

    epoch, path = 0, "numbers.csv"

    def __init__(self, n):
        self.frame = pd.DataFrame({"img": [f"{i}.png" for i in range(n)]})

    def __len__(self):
        return len(self.frame)

    def __getitem__(self, i):
        return {"image": torch.full((1, 1, 1), float(i + 1)), "index": i}


def walk(tmp_path, n, losses=lambda x: x, name="walk", **flags):
    """w after every update of SGD with rate 1 on the mean of `losses` of numbers 1 to n."""
    run = Run(TrainArgs("", "", cpu=True, run_dir=str(tmp_path), name=name, clip_value=0.0, **flags))
    Averages(run)
    net = Line()
    optimizer = torch.optim.SGD(net.parameters(), 1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    sampler = Batches(n, run.args.batch_size, 0, 1, 0)
    loader = torch.utils.data.DataLoader(Numbers(n), batch_sampler=sampler)
    seen = []
    for batch in run.batches(loader, 0, [net]):
        x = batch["image"].flatten()
        net.seen += x.sum()
        run.step(net, optimizer, schedule, (net.w * losses(x)).mean())
        seen.append(float(net.w.detach()))
    return seen, run, net


def test_accumulated_gradients_are_those_of_a_larger_batch(tmp_path):
    """10 numbers in batches of 3, 3, 3 (and 1 left out) against batches of 6 and 3."""
    parts, _, _ = walk(tmp_path, 10, batch_size=3, accumulate=2)
    whole, _, _ = walk(tmp_path, 9, batch_size=3, name="w")
    order = [i + 1 for b in Batches(10, 3, 0, 1, 0) for i in b]
    by_hand = [0, -sum(order[:6]) / 6, -sum(order[:6]) / 6 - sum(order[6:9]) / 3]
    assert parts == pytest.approx(by_hand, rel=1e-6) and len(whole) == 3


def test_accumulation_weighs_a_shorter_last_batch_by_its_images(tmp_path):
    parts, _, _ = walk(tmp_path, 5, batch_size=3, accumulate=2)
    assert parts[-1] == pytest.approx(-3.0)  # the mean of 1 to 5, not the mean of two means


@pytest.mark.parametrize("script", SCRIPTS)
def test_accumulation_runs_everywhere_and_stops_between_updates_only(script, tiny, tmp_path, monkeypatch):
    flags = ["--epochs", "2", "--accumulate", "2"]
    whole = test_scripts.launch(script, tiny, tmp_path, "whole", *flags)
    with monkeypatch.context() as patch, pytest.raises(Paused), stop.listening():
        ask_at_step(patch, 1)
        test_scripts.launch(script, tiny, tmp_path, "parts", *flags)
    assert read_checkpoint(tmp_path / "parts/last.pt")["inside"]["step"] == 2
    assert all(map(same, whole, test_scripts.launch(script, tiny, tmp_path, "parts", *flags)))
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "parts")


# numbers that are not finite


def bad_from(low):
    return lambda x: torch.where(x >= low, torch.nan, x)


def test_loss_that_is_not_finite_names_the_images_of_its_batch(tmp_path):
    order = [i for b in Batches(6, 2, 0, 1, 0) for i in b]
    names = ", ".join(f"{i}.png" for i in order[order.index(5) // 2 * 2 :][:2])
    with pytest.raises(
        InputError, match=f"step {order.index(5) // 2 + 1} in epoch 1 is not finite; its images: {names}"
    ):
        walk(tmp_path, 6, bad_from(6), batch_size=2)


def test_skipped_batches_leave_no_trace_but_a_count(tmp_path):
    order = [i for b in Batches(6, 2, 0, 1, 0) for i in b]
    bad = order.index(5) // 2
    good = [i + 1 for k, i in enumerate(order) if k // 2 != bad]
    seen, run, net = walk(tmp_path, 6, bad_from(6), batch_size=2, skip_nonfinite=True)
    assert seen[-1] == pytest.approx(-sum(good) / 2) and float(net.seen) == sum(good)
    stats = run.carried["averages"]
    assert stats.left_out == [1, [f"{i}.png" for i in order[2 * bad : 2 * bad + 2]]]


def test_gradient_that_is_not_finite_is_skipped_too(tmp_path):
    seen, run, _ = walk(tmp_path, 2, lambda x: x.double() * 1e39 * 10, batch_size=2, skip_nonfinite=True)
    assert seen == [0.0] and run.carried["averages"].left_out[0] == 1


def test_skipped_batches_are_logged_and_survive_a_kill(tiny, tmp_path, monkeypatch):
    from utils.methods import robust_losses

    real = robust_losses.per_image_loss

    def sometimes(logits, mask):
        loss = real(logits, mask)
        return loss * float("inf") if torch.initial_seed() % 2 else loss

    monkeypatch.setattr(robust_losses, "per_image_loss", sometimes)
    flags = ["--epochs", "2", "--skip-nonfinite"]
    whole = test_scripts.launch(BASE, tiny, tmp_path, "whole", *flags)
    rows = rows_of(tmp_path / "whole")
    assert 0 < rows[0]["left_out"] + rows[1]["left_out"] < 8
    assert all(len(row["left_out_images"]) >= row["left_out"] for row in rows[:2])
    with monkeypatch.context() as patch, pytest.raises(Paused), stop.listening():
        ask_at_step(patch, 3)
        test_scripts.launch(BASE, tiny, tmp_path, "parts", *flags)
    assert same(whole[0], test_scripts.launch(BASE, tiny, tmp_path, "parts", *flags)[0])
    assert rows_of(tmp_path / "parts") == rows


# memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a capacity of 139 GiB"),
        MemoryError(),
        lambda: torch.empty(10**15),
    ],
)
def test_out_of_memory_names_the_flags_to_turn_down(error, capsys):
    def main(_):
        if callable(error):
            error()
        raise error

    with pytest.raises(SystemExit) as end:
        launch(main, TrainArgs, ["--train_csv", "a", "--valid_csv", "b"])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("error: out of memory") and len(said.splitlines()) == 1
    assert all(flag in said for flag in ("--batch-size", "--accumulate", "--size", "--precision", "--encoder"))


def test_dead_loader_process_is_one_line(root):
    def arm():
        utils.interrupt.in_loader_process = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)

    code, text = run_in_fork(root, "a", "--workers", "1", before=arm)
    assert code == 2 and "a loader process died" in text and "--workers 0" in text and "Traceback" not in text


# several processes


def torchrun(root, name, *more, script=ROOT / BASE):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    lists = [f"--{kind}_csv={root / kind}.csv" for kind in ("train", "valid", "test")]
    words += [*SMALL, "--data-root", str(root), "--run-dir", str(root / "runs"), "--name", name, *lists, *more]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_two_processes_told_to_stop_go_on_exactly(root):
    flags = ["--epochs", "8", "--augment", "flip", "--precision", "bf16"]
    whole = torchrun(root, "whole", *flags)
    assert whole.wait(120) == 0, whole.stdout.read()
    parts, log = torchrun(root, "parts", *flags), root / "runs/parts/log.jsonl"
    while not log.exists() and parts.poll() is None:
        time.sleep(0.02)
    parts.send_signal(signal.SIGTERM)
    text = parts.communicate(timeout=120)[0]
    assert parts.returncode != 0 and "paused; the same command goes on from here" in text, text
    rest = torchrun(root, "parts", *flags)
    assert rest.wait(120) == 0, rest.stdout.read()
    assert not differences(root / "runs/whole", root / "runs/parts")


@pytest.mark.slow
def test_killed_process_ends_the_whole_job(root):
    script = root / "deadly.py"
    script.write_text(
        "import os, signal\nimport train_without_weight as t\nfrom utils.args import launch\n"
        "from utils.steps import Steps\nstep = Steps.step\n"
        "def deadly(self, *a, **k):\n"
        "    os.kill(os.getpid(), signal.SIGKILL) if self.rank else step(self, *a, **k)\n"
        "Steps.step = deadly\nlaunch(t.main, t.TrainArgs)\n"
    )
    began, job = time.time(), torchrun(root, "a", script=script)
    job.communicate(timeout=120)
    assert job.returncode not in (0, None) and time.time() - began < 90


@pytest.mark.slow
def test_two_processes_leave_a_batch_out_together(root):
    script = root / "spoilt.py"
    script.write_text(
        "import torch, train_without_weight as t\nfrom utils.args import launch\n"
        "from utils.methods import robust_losses as losses\nreal = losses.per_image_loss\n"
        "def sometimes(*a):\n    return real(*a) * (float('nan') if torch.initial_seed() % 7 == 0 else 1)\n"
        "losses.per_image_loss = sometimes\nlaunch(t.main, t.TrainArgs)\n"
    )
    job = torchrun(root, "a", "--epochs", "4", "--skip-nonfinite", "--batch-size", "2", script=script)
    assert job.wait(120) == 0, job.stdout.read()
    rows = rows_of(root / "runs/a")[:4]
    assert sum(row["left_out"] for row in rows) > 0
    assert all(row["left_out"] <= len(row["left_out_images"]) <= 4 * row["left_out"] for row in rows)


@pytest.mark.parametrize("n", [1, 2, 7, 8, 13])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_batches_of_all_processes(n, world, size):
    """Evaluation sees every image once; training gives all processes the same number of steps."""
    shares = [Batches(n, size, rank, world) for rank in range(world)]
    assert sorted(i for share in shares for batch in share for i in batch) == list(range(n))
    assert {share.fewest() for share in shares} == {min(len(list(share)) for share in shares)}
    shares = [Batches(n, size, rank, world, 3) for rank in range(world)]
    steps = [list(share) for share in shares]
    assert len({len(one) for one in steps}) == 1 and all(len(a) == len(b) for a, b in zip(steps, shares, strict=True))
    for share, batches in zip(shares, steps, strict=True):
        assert share.images(0, 99) == sum(map(len, batches))
        share.skip = 2
        assert list(share) == batches[2:]
