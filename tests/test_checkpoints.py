"""Checkpoints: a run that goes on is the run that never stopped, and nothing good is ever lost."""

import errno
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import CPU, ROOT, run_train, wait_for, write_tokens
from test_runs import BLOWS_UP, TINY, Run, check_failed, more_data, run_main

import train_gpt

sys.path.insert(0, str(ROOT / "records"))

from check import check  # noqa: E402  needs the path above
from logs import read_log  # noqa: E402

# Stages, drawn tokens, moments in 16 bits, and shards that hold some four steps.
OPTIONS = ("--run_id run --train_steps 9 --batch_stages 256,256,512 --val_loss_every 3 --optimizer "
           "muon --muon_beta2 0.9 --row_moments --bigram_rows 101 --key_offset --unigram_power 0.5 "
           "--sampled_vocab 700 --loss_chunk_size 64 --tokens_ahead 3 --document_rests").split()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    tokens = np.random.default_rng(0).integers(0, 900, 7_000)
    tokens[::50] = train_gpt.DOCUMENT_START
    for i in range(5):
        write_tokens(folder / f"a_train_{i:06d}.bin", tokens[1_200 * i : 1_200 * (i + 1)])
    write_tokens(folder / "a_val_000000.bin", tokens[6_000:])
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data) -> Run:
    """A run that nothing stopped, with all its checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    run = run_main(folder, *OPTIONS, f"--data_path={data}", "--save_every=1", KEPT_CHECKPOINTS=99)
    assert run.status == 0, run.err
    return run


def checkpoints(run: Run) -> list[Path]:
    return sorted(run.path.with_suffix("").glob("step_*"))


def go_on(folder: Path, run: Run, step: int | str, *options, **replaced) -> Run:
    """Resume a copy of the run, of which only the checkpoints up to `step` are left."""
    shutil.copytree(run.path.parent, folder / "logs")
    for path in checkpoints(run):
        if path.name > f"step_{step:06d}":
            shutil.rmtree(folder / "logs" / "run" / path.name)
    return run_main(folder, "--resume=run", *OPTIONS, *options, **replaced)


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


def same_end(run: Run, other: Run) -> None:
    assert run.status == 0, run.err
    assert run.train_losses == other.train_losses and run.val_losses == other.val_losses
    found, expected = weights(run), weights(other)
    assert list(found) == list(expected)
    for name in found:
        assert torch.equal(found[name], expected[name]), name


# -----------------------------------------------------------------------------
# Going on


@pytest.mark.parametrize("step", range(1, 9))
def test_a_resumed_run_equals_one_that_was_never_stopped_to_the_last_bit(
    tmp_path, whole, data, step
):
    same_end(go_on(tmp_path, whole, step, f"--data_path={data}"), whole)


def test_it_takes_the_settings_of_the_run_and_needs_no_others(tmp_path, whole):
    shutil.copytree(whole.path.parent, tmp_path / "logs")
    for path in checkpoints(whole)[4:]:
        shutil.rmtree(tmp_path / "logs" / "run" / path.name)
    argv = sys.argv
    for name in ("latest", "run", str(tmp_path / "logs" / "run")):
        args = train_gpt.parse_hyperparameters(
            ["--resume", name, "--log_dir", str(tmp_path / "logs")])
        assert (args.train_steps, args.row_moments, args.batch_stages) == (9, True, "256,256,512")
    assert sys.argv == argv


def test_the_log_goes_on_in_the_same_file_and_says_so(tmp_path, whole, data):
    run = go_on(tmp_path, whole, 4, f"--data_path={data}")
    before, resumed, after = re.split(r"^(resumed: .*)$", run.log, maxsplit=1, flags=re.MULTILINE)
    assert before.startswith(whole.log[: whole.log.index("step:1/9")])
    assert f"step 4 of 9, after {train_time(whole, 4):.3f}" in resumed.replace("s, from", "")
    assert "step:5/9" in after and "step:4/9" not in after and "machine" not in resumed
    assert "GPU:" in after or "CPU:" in after
    [found] = read_log(run.path)
    assert found.steps.tolist() == read_log(whole.path)[0].steps.tolist()
    assert np.all(np.diff(found.times) >= 0)
    assert "resumed: step 4" in check([found]).findings["marks"].reason


def train_time(run: Run, step: int) -> float:
    return json.loads((checkpoints(run)[step - 1] / "state.json").read_text())["train_time"]


def test_the_clock_goes_on_where_it_stood(tmp_path, whole, data):
    run = go_on(tmp_path, whole, 8, f"--data_path={data}")
    [last] = re.findall(r"^step:9/9 train_time:(\d+)ms", run.log.split("resumed:")[1], re.MULTILINE)
    assert 0 <= int(last) / 1000 - train_time(whole, 8) < 5


def test_the_last_two_are_kept_and_the_end_is_saved(tmp_path, data):
    run = run_main(tmp_path, *OPTIONS, f"--data_path={data}", "--save_every=2")
    assert [path.name for path in checkpoints(run)] == ["step_000008", "step_000009"]
    assert list(run.path.with_suffix("").glob(".*")) == []
    run = run_main(tmp_path / "b", *OPTIONS, f"--data_path={data}", "--save_every=-1")
    assert [path.name for path in checkpoints(run)] == ["step_000009"]
    run = run_main(tmp_path / "c", *OPTIONS, f"--data_path={data}")
    assert not run.path.with_suffix("").exists()


def test_after_a_return_to_an_older_one_its_followers_are_the_newest(tmp_path, whole, data):
    shutil.copytree(whole.path.parent, tmp_path / "logs")
    saved = tmp_path / "logs" / "run"
    run = run_main(tmp_path, f"--resume={saved / 'step_000003'}", *OPTIONS, f"--data_path={data}",
                   "--save_every=4")
    assert run.status == 0, run.err
    assert "resumed: step 3" in run.log
    assert sorted(path.name for path in saved.glob("step_*")) == ["step_000008", "step_000009"]
    newest, *_ = train_gpt.checkpoint_folders("latest", str(tmp_path / "logs"))
    assert newest.name == "step_000009"
    same_end(run, whole)


def test_saving_changes_nothing(tmp_path, whole, data):
    same_end(run_main(tmp_path, *OPTIONS, f"--data_path={data}"), whole)


def test_a_run_that_was_killed_at_its_end_gets_its_verdict_and_a_finished_one_is_left_alone(
    tmp_path, whole, data
):
    run = go_on(tmp_path, whole, 9, f"--data_path={data}")
    assert run.status == 1 and "run has ended already, at step 9" in run.err
    assert run.log == whole.log
    run.path.write_text(whole.log[: whole.log.index("\npeak memory: ")])  # without its last "\n"
    run = run_main(tmp_path, "--resume=run", *OPTIONS, f"--data_path={data}")
    same_end(run, whole)
    assert "not reached: val_loss" in run.out and "\nnot a record: resumed\n" in run.log
    assert "\nresumed: step 9 of 9" in run.log


def test_what_was_meant_once_has_to_be_meant_again(tmp_path, whole, data):
    run = go_on(tmp_path, whole, 5, f"--data_path={data}", "--matrix_lr=0.01", "--resume_anyway",
                "--save_every=-1")
    assert run.status == 0, run.err
    run.path.write_text(run.log.replace("\ntarget ", "\n"))
    run = run_main(tmp_path, "--resume=run", *OPTIONS, f"--data_path={data}", "--matrix_lr=0.02")
    assert run.status == 1 and "matrix_lr is 0.02 instead of 0.01" in run.err


def test_a_new_checkpoint_is_kept_although_others_are_of_tomorrow(tmp_path, whole, data):
    shutil.copytree(whole.path.parent, tmp_path / "logs")
    saved = tmp_path / "logs" / "run"
    for path in checkpoints(whole)[5:]:
        shutil.rmtree(saved / path.name)
    for path in saved.glob("step_*"):
        os.utime(path, (2e9, 2e9))
    run = run_main(tmp_path, f"--resume={saved / 'step_000005'}", *OPTIONS, f"--data_path={data}",
                   "--save_every=-1")
    assert run.status == 0, run.err
    assert (saved / "step_000009").is_dir()


def test_a_checkpoint_holds_what_was_when_it_was_made(tmp_path, whole, data):
    """Although it is written later, while the training goes on."""
    save_file = train_gpt.safetensors.torch.save_file

    def write_slowly(tensors, path):
        time.sleep(0.2)
        save_file(tensors, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt.safetensors.torch, "save_file", write_slowly)
        run = run_main(tmp_path, *OPTIONS, f"--data_path={data}", "--save_every=1",
                       KEPT_CHECKPOINTS=99)
    assert run.status == 0, run.err
    for found, expected in zip(checkpoints(run), checkpoints(whole), strict=True):
        states = [train_gpt.read_state(folder)["files"] for folder in (found, expected)]
        assert states[0] == states[1]


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, data, monkeypatch):
    flushed, fsync = [], os.fsync

    def note(descriptor):
        flushed.append(os.path.realpath(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    run = run_main(tmp_path, *OPTIONS, f"--data_path={data}", "--save_every=-1")
    *inside, last = (Path(path) for path in flushed)
    assert last == run.path.with_suffix("")
    assert {path.name for path in inside} == {
        "model.safetensors", "optimizer.safetensors", "state.json", ".step_000009.unfinished"}


def test_the_first_validation_under_the_target_is_still_the_one_after_going_on(tmp_path, data):
    options = [*OPTIONS, f"--data_path={data}", "--target=10.3", "--val_loss_every=1"]
    run = run_main(tmp_path, *options, "--save_every=1", KEPT_CHECKPOINTS=99)
    pattern = re.compile(r"^target .* reached: (val_loss \S+ at step \d), ", re.MULTILINE)
    [reached] = pattern.findall(run.log)
    assert "at step 9" not in reached
    again = go_on(tmp_path / "b", run, 8, *options[len(OPTIONS) :])
    assert pattern.findall(again.log) == [reached] * 2
    lower = go_on(tmp_path / "c", run, 8, *options[len(OPTIONS) :], "--target=1", "--resume_anyway")
    assert "target 1.0 of track sample not reached" in lower.log


def test_a_batch_size_takes_the_place_of_the_stages_of_the_run(whole):
    options = ["--resume=run", f"--log_dir={whole.path.parent}"]
    assert train_gpt.parse_hyperparameters(options).stage_batch_sizes == [256, 256, 512]
    args = train_gpt.parse_hyperparameters([*options, "--batch_size=512"])
    assert args.stage_batch_sizes == [512]


def test_the_clock_stands_still_while_a_checkpoint_is_made(tmp_path, data):
    """Each file takes another 1,000 seconds, by a clock that is put forward."""
    copy, passed = train_gpt.Checkpoints.copy, [0.0]

    class Slow(train_gpt.Checkpoints):
        def copy(self, *arguments):
            passed[0] += 1000
            return copy(self, *arguments)

    slow_time = SimpleNamespace(**vars(time) | dict(
        perf_counter=lambda: time.perf_counter() + passed[0]))
    run = run_main(tmp_path, *OPTIONS, f"--data_path={data}", "--save_every=4", Checkpoints=Slow,
                   time=slow_time)
    [last] = re.findall(r"^step:9/9 train_time:(\d+)ms", run.log, re.MULTILINE)
    assert passed == [6000] and int(last) < 1_000_000
    assert "step_000009, for which the run waited 200" in run.log


@pytest.mark.parametrize("warmup", [True, False])
def test_room_for_checkpoints_is_made_once_and_before_the_clock_if_it_can_be(
    tmp_path, data, warmup
):
    made, reserve, start = [], train_gpt.Checkpoints.reserve, train_gpt.Clock.start

    class Noting(train_gpt.Checkpoints):
        def reserve(self, files):
            made.append({(file, name): (tensor.shape, tensor.dtype)
                         for file, tensors in files.items() for name, tensor in tensors.items()})
            reserve(self, files)

    class Clock(train_gpt.Clock):
        def start(self):
            made.append("clock")
            start(self)

    options = [f"--data_path={data}", "--save_every=4", "--val_loss_every=0"]
    run = run_main(tmp_path, *OPTIONS, *options, f"--kernel_warmup={warmup}", Checkpoints=Noting,
                   Clock=Clock)
    assert run.status == 0
    shapes, = (item for item in made if item != "clock")
    assert ("clock" in made[: made.index(shapes)]) == (not warmup)
    folder = checkpoints(run)[-1]
    saved = {(path.name, name): (tensor.shape, tensor.dtype)
             for path in folder.glob("*.safetensors")
             for name, tensor in safetensors.torch.load_file(path).items()}
    assert shapes == saved


def test_without_memory_that_a_gpu_can_write_to_a_checkpoint_is_written_from_other_memory(tmp_path):
    class OnGPU:
        """To a machine without a GPU, a tensor that wants memory which it does not have."""

        is_cuda = True

        def __init__(self, tensor):
            self.to = tensor.to

    tensors = {train_gpt.MODEL_FILE: {"x": torch.arange(6.0).view(2, 3).T}}
    saves = train_gpt.Checkpoints(tmp_path, train_gpt.Log())
    saves.reserve({file: {name: OnGPU(tensor) for name, tensor in some.items()}
                   for file, some in tensors.items()})
    saves.save(tensors, dict(step=3))
    saves.finish()
    assert saves.problem is None
    found = safetensors.torch.load_file(tmp_path / "step_000003" / train_gpt.MODEL_FILE)
    assert found["x"].equal(tensors[train_gpt.MODEL_FILE]["x"])


def test_a_run_goes_on_under_its_own_name_beside_its_own_log(tmp_path, whole, data, capsys):
    moved = tmp_path / "elsewhere" / "logs"
    shutil.copytree(whole.path.parent, moved)
    for path in checkpoints(whole)[5:]:
        shutil.rmtree(moved / "run" / path.name)
    run_main(tmp_path, f"--resume={moved / 'run'}", *OPTIONS, f"--data_path={data}")
    assert "\nresumed: step 5" in (moved / "run.txt").read_text()
    assert not list((tmp_path / "logs").glob("*.txt"))
    with pytest.raises(SystemExit):
        train_gpt.parse_hyperparameters([f"--resume={moved / 'run'}", "--run_id=fork"])
    assert "--resume goes on as run" in capsys.readouterr().err
    for name in ("a/b", ".hidden"):
        with pytest.raises(SystemExit):
            train_gpt.parse_hyperparameters([*TINY, f"--run_id={name}"])
        assert "must be the name of a file" in capsys.readouterr().err


def test_two_processes_do_not_go_on_with_one_run(tmp_path, whole, data):
    fcntl = pytest.importorskip("fcntl")
    shutil.copytree(whole.path.parent, tmp_path / "logs")
    shutil.rmtree(tmp_path / "logs" / "run" / "step_000009")
    with open(tmp_path / "logs" / "run.txt", "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        run = run_main(tmp_path, "--resume=run", *OPTIONS, f"--data_path={data}")
    assert run.status == 1 and "is being written by another process" in run.err
    assert run.log == whole.log


@pytest.mark.parametrize("before, after, whole_steps", [
    (2, 1, []), (1, 2, ["--device_batch_size=256"])])  # two ranks cannot share those
def test_another_number_of_ranks_goes_on(tmp_path, data, before, after, whole_steps):
    options = [*TINY, *OPTIONS[:6], "--muon_beta2=0.9", "--row_moments", "--bigram_rows=101",
               "--kernel_warmup=false", f"--data_path={data}"]
    options[options.index("256,256,512")] = "256"
    done = run_train(*options, *whole_steps, "--save_every=6", cwd=tmp_path, nproc=before)
    assert done.returncode == 0, done.stderr
    expected = read_log(tmp_path / "logs" / "run.txt")[0].losses
    shutil.rmtree(tmp_path / "logs" / "run" / "step_000009")
    done = run_train("--resume=latest", cwd=tmp_path, nproc=after)
    assert done.returncode == 0, done.stderr
    [run] = read_log(tmp_path / "logs" / "run.txt")
    assert run.losses == pytest.approx(expected, abs=2e-5, nan_ok=True)
    assert "resumed: step 6 of 9" in (tmp_path / "logs" / "run.txt").read_text()


# -----------------------------------------------------------------------------
# What differs


@pytest.mark.parametrize("options, words", [
    (["--matrix_lr=0.01"], "matrix_lr is 0.01 instead of 0.05"),
    (["--train_steps=8"], "train_steps is 8 instead of 9"),
    (["--device_batch_size=256"], "device_batch_size is 256 instead of 128"),
    (["--loss_chunk_size=32"], "loss_chunk_size is 32 instead of 64"),
])
def test_another_setting_is_named_and_wants_to_be_meant(tmp_path, whole, data, options, words):
    run = go_on(tmp_path, whole, 5, f"--data_path={data}", *options)
    assert run.status == 1 and words in run.err and "--resume_anyway" in run.err
    run = run_main(tmp_path, "--resume=run", *OPTIONS, f"--data_path={data}", *options,
                   "--resume_anyway")
    assert run.status == 0, run.err
    assert f"resumed, although {words}" in run.log
    assert run.train_losses[:5] == whole.train_losses[:5]


def test_another_source_and_other_data_are_noticed(tmp_path, whole, data):
    source = train_gpt.read_source
    run = go_on(tmp_path, whole, 5, f"--data_path={data}",
                read_source=lambda args: source(args) + "# faster\n")
    assert run.status == 1 and "the source is another one" in run.err
    other = shutil.copytree(data, tmp_path / "other")
    tokens = np.fromfile(other / "a_train_000001.bin", "<u2", offset=1024)
    tokens[5] += 1
    write_tokens(other / "a_train_000001.bin", tokens)
    run = run_main(tmp_path, "--resume=run", *OPTIONS, f"--data_path={other}")
    assert run.status == 1 and "the data are other shards" in run.err


def test_reports_may_differ(tmp_path, whole, data):
    run = go_on(tmp_path, whole, 5, f"--data_path={data}", "--val_loss_every=0", "--log_every=3")
    assert run.status == 0, run.err
    assert run.train_losses == whole.train_losses


def test_the_dial_is_not_turned_within_a_run(tmp_path, capsys):
    options = [*TINY, "--depth=1", "--target_param_data_ratio=1", "--batch_size=512",
               "--train_steps=4", "--save_every=2", "--sampled_vocab=0"]
    run = run_main(tmp_path, *options, "--run_id=run")
    assert run.status == 0, run.err
    shutil.rmtree(checkpoints(run)[-1])
    same = ["--resume=run", f"--log_dir={run.path.parent}"]
    begun = train_gpt.parse_hyperparameters(options)
    assert begun.batch_stages == "512" and begun.batch_size != 512
    again = train_gpt.parse_hyperparameters([*options, *same])
    assert (again.batch_stages, again.batch_size) == (begun.batch_stages, begun.batch_size)
    capsys.readouterr()
    for option in ("--depth=2", "--recipe=modern", "--target_param_data_ratio=2"):
        with pytest.raises(SystemExit):
            train_gpt.parse_hyperparameters([*same, option, "--resume_anyway"])
        assert "makes another run than run" in capsys.readouterr().err
    [trained] = read_log(run.path)
    done = run_main(tmp_path, *options, "--resume=run")
    assert done.status == 0, done.err
    assert read_log(run.path)[0].losses == pytest.approx(trained.losses, nan_ok=True)


def test_a_run_that_goes_on_to_more_steps_is_one_run_of_the_tokens_it_saw(tmp_path, whole, data):
    run = go_on(tmp_path, whole, 9, f"--data_path={data}", "--train_steps=12", "--resume_anyway")
    assert run.status == 0, run.err
    [one] = read_log(run.path)
    assert one.train_tokens is None  # other stages before
    assert one.train_steps == 12 and list(one.steps[~one.is_val]) == list(range(1, 13))
    state = json.loads((checkpoints(run)[-1] / "state.json").read_text())
    assert state["tokens"] == 3 * (256 + 256 + 512) + 3 * 512


@pytest.mark.parametrize("option, words", [
    ("--num_layers=3", "does not fit this model"),
    ("--row_moments=false", "another --optimizer or --row_moments"),
    ("--optimizer=adam", "another --optimizer"),
    ("--train_steps=4", "is past --train_steps 4"),
])
def test_what_cannot_go_on_is_refused_even_so(tmp_path, whole, data, option, words):
    run = go_on(tmp_path, whole, 5, f"--data_path={data}", option, "--resume_anyway")
    check_failed(run, words)


def test_an_empty_name_resumes_nothing():
    assert train_gpt.parse_hyperparameters([*TINY, "--resume="]) == (
        train_gpt.parse_hyperparameters(TINY))


def test_no_checkpoint_is_told_with_those_that_there_are(tmp_path, whole, capsys):
    for argv, words in (
        (["--resume=other", f"--log_dir={whole.path.parent}"], "there are some of: run"),
        (["--resume=latest", f"--log_dir={tmp_path}"], "--save_every STEPS"),
    ):
        with pytest.raises(SystemExit):
            train_gpt.parse_hyperparameters(argv)
        assert words in capsys.readouterr().err


# -----------------------------------------------------------------------------
# Damage


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


class Bomb:
    """Unpickling it leaves a trace."""

    def __reduce__(self):
        return os.system, ("touch exploded",)


def replace_by_a_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb()))


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("spoil", [truncate, flip_a_bit, Path.unlink, replace_by_a_pickle])
def test_a_damaged_checkpoint_is_told_and_the_one_before_goes_on(
    tmp_path, whole, data, file, spoil, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole.path.parent, tmp_path / "logs")
    for path in checkpoints(whole)[5:]:
        shutil.rmtree(tmp_path / "logs" / "run" / path.name)
    spoil(tmp_path / "logs" / "run" / "step_000005" / file)
    run = run_main(tmp_path, "--resume=run", *OPTIONS, f"--data_path={data}", "--save_every=-1")
    same_end(run, whole)
    assert f"step_000005/{file}" in run.log and "resumed: step 4" in run.log
    assert [path.name for path in checkpoints(run)] == ["step_000004", "step_000009"]  # both whole
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("then, now", [(True, "rms"), (False, "none")])
def test_a_checkpoint_from_when_qk_norm_was_yes_or_no_keeps_its_meaning(
    tmp_path, whole, then, now
):
    shutil.copytree(whole.path.parent, tmp_path / "logs")
    folder = tmp_path / "logs" / "run" / "step_000009"
    state = train_gpt.read_state(folder)
    state["hyperparameters"]["qk_norm"] = then
    train_gpt.write_state(folder, state)
    model, _, _ = train_gpt.load_run(str(folder), CPU)
    assert model.args.qk_norm == now


def test_a_checkpoint_from_when_tokens_were_not_counted_has_those_of_its_steps(tmp_path, whole):
    shutil.copytree(whole.path.parent, tmp_path / "logs")
    folder = tmp_path / "logs" / "run" / "step_000007"
    state = train_gpt.read_state(folder)
    tokens = state.pop("tokens")
    train_gpt.write_state(folder, state)
    assert train_gpt.read_state(folder)["tokens"] == tokens == 6 * 256 + 512


def test_a_checkpoint_of_another_program_is_told_from_ours(tmp_path, whole, data):
    shutil.copytree(whole.path.parent, tmp_path / "logs")
    for path in (tmp_path / "logs" / "run").glob("step_*"):
        (path / "state.json").write_text('{"step": 5}')
    with pytest.raises(train_gpt.RunError, match="is not a checkpoint of this script"):
        train_gpt.load_run("run", CPU, str(tmp_path / "logs"))


def full_disk(tensors, path):
    Path(path).write_bytes(b"half")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path, whole, data, monkeypatch):
    save_file, calls = train_gpt.safetensors.torch.save_file, []

    def fill_up(tensors, path):
        calls.append(path)
        (full_disk if len(calls) > 4 else save_file)(tensors, path)

    monkeypatch.setattr(train_gpt.safetensors.torch, "save_file", fill_up)
    run = run_main(tmp_path, *OPTIONS, f"--data_path={data}", "--save_every=1")
    assert run.status == 1  # the end was to be saved, and is not
    assert "No space left on device" in run.err and "No space left on device" in run.out
    assert run.train_losses == whole.train_losses and "not reached: val_loss" in run.log
    assert [path.name for path in checkpoints(run)] == ["step_000001", "step_000002"]
    assert list(run.path.with_suffix("").glob(".*")) == []
    monkeypatch.undo()
    run = run_main(tmp_path, "--resume=run", *OPTIONS, f"--data_path={data}", "--save_every=1")
    same_end(run, whole)


def test_a_stop_that_a_full_disk_cannot_save_says_so(tmp_path, data, monkeypatch):
    def ask_to_stop(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return 11.0

    monkeypatch.setattr(train_gpt.safetensors.torch, "save_file", full_disk)
    run = run_main(tmp_path, *OPTIONS, f"--data_path={data}", "--save_on_exit",
                   evaluate=ask_to_stop)
    assert run.status == 1 and checkpoints(run) == []
    assert re.search(r"No space left on device; stopped at step \d, which is not saved", run.err)
    assert "whole" not in run.err and "go on with" not in run.out


def test_a_loss_that_is_no_number_leaves_the_last_good_checkpoint(tmp_path, data):
    run = run_main(tmp_path, "--run_id=run", f"--data_path={data}", "--save_every=1",
                   "--train_steps=6", "--matrix_lr=1e-3", *BLOWS_UP)
    check_failed(run, "step 1" if not checkpoints(run) else "step")
    assert all(path.name <= "step_000001" for path in checkpoints(run))
    for path in checkpoints(run):
        model, _, _ = train_gpt.load_run(str(path), CPU)
        assert all(p.isfinite().all() for p in model.parameters())


# -----------------------------------------------------------------------------
# Stopping


def start(folder: Path, *options, nproc: int = 1) -> subprocess.Popen:
    launcher = [sys.executable]
    if nproc > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    return subprocess.Popen(
        [*launcher, str(ROOT / "train_gpt.py"), *map(str, options)], cwd=folder, text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


LONG = [*TINY, "--run_id=run", "--kernel_warmup=false", "--train_steps=120", "--row_moments",
        "--sampled_vocab=700", "--loss_chunk_size=64", "--val_loss_every=40"]


@pytest.fixture(scope="module")
def long_run(tmp_path_factory) -> Path:
    """The log of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("long")
    done = run_train(*LONG, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "logs" / "run.txt"


def losses(log: Path) -> list[str]:
    """The last val_loss of each step, as the log has it."""
    return list(dict(re.findall(r"^step:(\d+)/\S+ val_loss:(\S+)", log.read_text(),
                                re.MULTILINE)).items())


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_asked_to_stop_saves_itself_first(tmp_path, long_run, number, status):
    process, log = start(tmp_path, *LONG, "--save_on_exit"), tmp_path / "logs" / "run.txt"
    wait_for(process, lambda: log.exists() and "\nstep:5/120 train_time" in log.read_text())
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == status, out
    assert "go on with: --resume run" in out and "stopped by" in log.read_text()
    [folder] = (tmp_path / "logs" / "run").glob("step_*")
    assert 5 <= int(folder.name[5:]) < 120
    done = run_train("--resume=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert losses(log) == losses(long_run)


def test_all_ranks_stop_at_the_same_step_if_one_of_them_is_asked_to(tmp_path):
    options = [*LONG, "--save_on_exit", "--train_steps=2000",
               f"--data_path={more_data(tmp_path / 'data')}",
               "--max_document_length=8", "--token_budget=999999999"]
    process, log = start(tmp_path, *options, nproc=2), tmp_path / "logs" / "run.txt"
    wait_for(process, lambda: log.exists() and "\nstep:5/2000 train_time" in log.read_text())
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = [pid for pid in children if "train_gpt.py" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(int(ranks[-1]), signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    [folder] = (tmp_path / "logs" / "run").glob("step_*")
    assert "go on with: --resume run" in log.read_text(), out
    assert len(train_gpt.read_state(folder)["rng"]) == 2


def test_a_run_killed_ten_times_ends_as_one_that_was_not(tmp_path, long_run):
    """The preemption drill: kill -9 at random moments, also while a checkpoint is written."""
    log, rng, options = tmp_path / "logs" / "run.txt", random.Random(5), [*LONG, "--save_every=1"]

    def saved() -> set[str]:
        return {path.name for path in (tmp_path / "logs" / "run").glob("step_*")}

    for _ in range(10):
        before, process = saved(), start(tmp_path, *options)
        wait_for(process, lambda before=before: saved() - before)
        time.sleep(rng.uniform(0, 0.15))
        assert process.poll() is None, "it ended before it was killed"
        process.kill()
        process.communicate()
        options = ["--resume=run"]
    done = run_train(*options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert losses(log) == losses(long_run)
    assert log.read_text().count("\nresumed: step ") == 10


def test_a_run_can_end_at_its_target_and_is_no_record(tmp_path, data):
    run = run_main(tmp_path, *OPTIONS, f"--data_path={data}", "--stop_at_target", "--target=10.3",
                   "--val_loss_every=1", "--save_every=-1")
    assert run.status == 0, run.err
    assert not list(run_main(tmp_path / "b", *OPTIONS, f"--data_path={data}", "--stop_at_target",
                             "--target=10.3").path.parent.glob("*/"))
    last = run_main(tmp_path / "c", *OPTIONS, f"--data_path={data}", "--stop_at_target",
                    "--val_loss_every=0", "--target=10.3")
    assert "reached: val_loss" in last.out and "not a record: stopped" not in last.out
    step, loss = run.val_losses[-1]
    assert loss <= 10.3 < run.val_losses[-2][1] and 0 < step < 9
    assert len(run.train_losses) == step
    assert "\nnot a record: stopped early\n" in run.log and "stopped early" in run.out
    assert [path.name for path in checkpoints(run)] == [f"step_{step:06d}"]
    again = run_main(tmp_path, "--resume=run", *OPTIONS, f"--data_path={data}", "--target=10.3",
                     "--stop_at_target")
    assert again.status == 1 and again.log == run.log
    assert f"has ended already, at step {step}" in again.err
    further = run_main(tmp_path, "--resume=run", *OPTIONS, f"--data_path={data}", "--target=10.3",
                       "--stop_at_target=false")
    assert further.status == 0, further.err
    assert len(further.train_losses) == 9 and further.train_losses[:step] == run.train_losses


# -----------------------------------------------------------------------------
# Use


@pytest.mark.parametrize("recipe", list(train_gpt.RECIPES))
def test_a_run_of_every_recipe_can_be_loaded(tmp_path, recipe):
    small = ("--model_dim=32 --num_layers=4 --num_heads=2 --row_length=64 --max_document_length=64 "
             "--batch_size=256 --device_batch_size=256 --val_batch_size=128 --val_row_length=0 "
             "--val_tokens=512 --train_steps=2 --loss_chunk_size=64 --dtype=float32 "
             "--residual_dtype=float32 --compile=false --value_embeddings=1 --window_start=128 "
             "--window_end=640").split()
    if "attention_dim" in train_gpt.RECIPES[recipe]:
        small.append("--attention_dim=16")
    run = run_main(tmp_path, f"--recipe={recipe}", *small, "--save_every=-1", "--run_id=run")
    assert run.status == 0, run.err
    model, windows, state = train_gpt.load_run("run", CPU, str(tmp_path / "logs"))
    assert state["run"] == "run" and state["step"] == 2
    assert windows == train_gpt.attention_windows(2, model.args)
    args = model.args
    rows = train_gpt.TokenRows(next((ROOT / "data/sample").glob("*_val_*")), args, training=False)
    loss = train_gpt.evaluate(model, [rows], args, windows, train_gpt.Ranks(0, 1, CPU))
    assert loss == pytest.approx(run.val_losses[-1][1], abs=2e-3)  # 8-bit floats are off


def test_a_model_writes_samples_while_it_trains(tmp_path, whole, data):
    class Encoding:
        n_vocab = 50_257

        def decode(self, tokens):
            return " ".join(map(str, tokens))

    run = run_main(tmp_path, *OPTIONS, f"--data_path={data}", "--sample_every=4",
                   load_encoding=Encoding)
    assert run.status == 0, run.err
    samples = dict(re.findall(r"^sample: step (\d+): '(.*)'$", run.log, re.MULTILINE))
    assert list(samples) == ["0", "4", "8", "9"]
    assert samples["8"] != samples["0"] and len(samples["0"].split()) > 5
    assert run.train_losses == whole.train_losses and run.val_losses == whole.val_losses
