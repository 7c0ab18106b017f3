"""Reading logs: ours, the public formats, and what happens to logs on their way."""

import math
import re
import tarfile

import numpy as np
import pytest
from conftest import tiny_args
from record_logs import (
    SEPARATOR,
    SOURCE,
    our_log,
    public_log,
    shard_lines,
    step_lines,
    write_logs,
)

import logs  # isort: skip  records/ is on the path from here on
from logs import LogError, read_log, read_logs  # isort: skip


def read(folder, text):
    """The runs of a log with this text."""
    return read_log(write_logs(folder, text)[0])


def read_one(folder, text):
    (run,) = read(folder, text)
    return run


def assert_same_run(run, other):
    assert run.train_steps == other.train_steps and not run.damaged and not other.damaged
    for name in ("steps", "losses", "times", "step_avgs", "is_val"):
        np.testing.assert_array_equal(getattr(run, name), getattr(other, name))


def test_our_log_says_all_about_its_run(tmp_path):
    run = read_one(tmp_path, our_log(seed=1338))
    assert run.train_steps == 40 and list(run.val_curve[0]) == [0, 10, 20, 30, 40]
    assert list(run.steps[:3]) == [0, 1, 2] and run.times[1] == pytest.approx(0.51)
    assert run.final_loss == 3.3758 and run.train_time == pytest.approx(20.2)
    assert run.step_avgs[-1] == pytest.approx(0.505)
    assert run.source.strip() == SOURCE.strip()
    assert (run.seed, run.batch_sizes, run.train_tokens) == ("1338", [393_216], 40 * 393_216)
    assert run.number("val_tokens") == 1_048_576 and run.hyperparameters["matrix_lr"] == "0.05"
    assert (run.hardware, run.torch, run.world_size) == ("NVIDIA H200", "2.11.0+cu130", 1)
    assert [shard.name for shard in run.shards] == [
        "fineweb_train_000001.bin", "fineweb_train_000002.bin", "fineweb_val_000000.bin"]
    assert [shard.kind for shard in run.shards] == ["train", "train", "val"]


def test_real_logs_of_this_repository_are_read(tmp_path):
    for path in sorted((logs.Path(logs.__file__).parent).glob("*/*/*.txt")):
        (run,) = read_log(path)
        assert run.steps[-1] == run.train_steps and run.is_val[-1] and not run.damaged
        if "peak memory" in run.notes:  # else it was cut off after its last validation
            last = f"val_loss {run.final_loss:.5f} at step {run.train_steps}"
            assert last in run.notes and f"train_time {run.train_time:.3f}s" in run.notes
        assert run.hardware and run.torch and run.shards and run.source and run.world_size


def test_a_public_log(tmp_path):
    run = read_one(tmp_path, public_log(step_lines()))
    assert run.final_loss == 3.375 and run.train_steps == 40 and len(run.steps) == 45
    assert run.hardware == "NVIDIA H100 80GB HBM3"
    assert run.torch == "2.8.0.dev20250524+cu126"
    assert run.number("val_tokens") == 999  # as its source says
    assert run.hyperparameters == {} and run.seed is None and run.train_tokens is None
    assert run.world_size is None and run.shards == []


def test_an_older_public_log_spells_pytorch_another_way_and_starts_its_average_late(tmp_path):
    lines = [re.sub(r"step_avg:.*", "step_avg:nanms", line) if i < 9 else line
             for i, line in enumerate(step_lines())]
    lines = [line.replace(" train_time", " train_loss:4.1234 train_time")
             if "val_loss" not in line else line for line in lines]
    text = public_log(lines).replace("Running PyTorch 2.8.0.dev20250524", "Running pytorch 2.5.0")
    run, plain = read_one(tmp_path / "a", text), read_one(tmp_path / "b", public_log(step_lines()))
    assert run.torch == "2.5.0+cu126" and np.isnan(run.step_avgs[:9]).all()
    run.step_avgs[:9] = plain.step_avgs[:9]
    assert_same_run(run, plain)


def test_the_source_at_the_top_is_not_read_as_a_log(tmp_path):
    liar = SOURCE + '\n"""\nstep:40/40 val_loss:1.00000 train_time:1ms step_avg:0.03ms\n"""\n'
    for text in (our_log(source=liar), public_log(step_lines(), source=liar)):
        run = read_one(tmp_path, text)
        assert run.final_loss > 3 and len(run.steps) == 45 and "1.00000" in run.source


@pytest.mark.parametrize("unit", ["s", "mixed"])
def test_times_in_seconds(tmp_path, unit):
    run = read_one(tmp_path / "s", our_log(lines=step_lines(unit=unit, final=3.375)))
    other = read_one(tmp_path / "ms", our_log(lines=step_lines(final=3.375)))
    np.testing.assert_allclose(run.times, other.times, atol=6e-4)
    np.testing.assert_allclose(run.step_avgs, other.step_avgs, atol=6e-4)
    assert np.all(np.diff(run.times) >= 0)  # a validation has the time of its step, exactly


@pytest.mark.parametrize("extra", [" train_loss:4.1234", " mfu:3.06%", " train_loss:nan"])
def test_more_fields_on_a_line_change_nothing(tmp_path, extra):
    plain = step_lines()
    lines = [line + extra if "val_loss" not in line else line for line in plain]
    assert_same_run(read_one(tmp_path / "a", our_log(lines=lines)),
                    read_one(tmp_path / "b", our_log(lines=plain)))


def test_lines_read_one_by_one_are_read_the_same(tmp_path):
    """One odd line keeps numpy from reading the others in one go."""
    for unit in ("ms", "s", "mixed"):
        lines = step_lines(steps=3000, unit=unit, step_time=0.1234)
        odd = [*lines[:4], re.sub(r"step_avg:(\d)", r"step_avg: \1", lines[4]), *lines[5:]]
        assert_same_run(read_one(tmp_path / "a", our_log(lines=odd)),
                        read_one(tmp_path / "b", our_log(lines=lines)))


def test_an_llm_c_log(tmp_path):
    run = read_one(tmp_path, "s:0 tel:11.0092\ns:0 trl:11.0091 lr:0.000001 norm:15.37\n"
                             "s:1 trl:10.9 lr:0.000002 norm:15.24\ns:250 eval:0.25\n"
                             "s:250 tel:6.1710\ns:500 tel:nan\n")
    assert list(run.steps) == [0, 250, 500] and run.is_val.all()
    assert list(run.losses[:2]) == [11.0092, 6.171] and math.isnan(run.final_loss)
    assert run.train_steps is None and math.isnan(run.train_time)


@pytest.mark.parametrize("change", [
    lambda text: text.replace("\n", "\r\n"),
    lambda text: text.replace("\n", "\r"),
    lambda text: "\ufeff" + text,
    lambda text: re.sub(r"^(step:.*)$", "\x1b[32m\\1\x1b[0m", text, flags=re.MULTILINE),
    lambda text: re.sub(r"^(step:.*)$", "\x1b[2K\\1\x1b[1;38;5;9m", text, flags=re.MULTILINE),
    lambda text: re.sub(r"^(step:.*)$", "\r 10%|##   | 4/40\r\\1", text, flags=re.MULTILINE),
    lambda text: text.rstrip("\n"),
    lambda text: text.encode().replace(b"peak", b"\xff\xfe\x00 caf\xe9\npeak"),
], ids=["CRLF", "CR", "BOM", "colours", "more ANSI", "progress bar", "no newline", "not UTF-8"])
def test_what_happens_to_logs_on_their_way_does_no_harm(tmp_path, change):
    run, plain = (read_one(tmp_path / name, text)
                  for name, text in (("a", change(our_log())), ("b", our_log())))
    assert_same_run(run, plain)
    assert run.source == plain.source and run.shards == plain.shards
    assert run.hyperparameters == plain.hyperparameters and run.hardware == plain.hardware


def test_several_trials_under_one_header(tmp_path):
    lines = [*step_lines(final=3.37), *step_lines(final=3.38), *step_lines(steps=50, final=3.36)]
    runs = read(tmp_path, public_log(lines))
    assert [run.final_loss for run in runs] == [3.37, 3.38, 3.36]
    assert [run.train_steps for run in runs] == [40, 40, 50]
    assert [run.name for run in runs] == ["log0.txt", "log0.txt trial 2", "log0.txt trial 3"]


def test_a_damaged_line_is_reported_once(tmp_path):
    lines = [*step_lines(), "step:7/40 train_", *step_lines(final=3.3)]
    assert [run.damaged for run in read(tmp_path, public_log(lines))] == [["step:7/40 train_"], []]


def test_logs_joined_to_one_file_keep_their_own_headers(tmp_path):
    texts = our_log(seed=1), our_log(seed=2), our_log(seed=3)
    runs = read(tmp_path / "joined", "".join(texts))
    assert [(run.seed, run.trial) for run in runs] == [("1", 1), ("2", 2), ("3", 3)]
    for run, alone in zip(runs, read_logs(write_logs(tmp_path / "apart", *texts)), strict=True):
        assert_same_run(run, alone)
        assert run.shards == alone.shards and run.source == alone.source


CUTS = ["step:40/40", "step:40/40 val_loss:3.3", "step:40/40 val_loss:3.37500 train_time:20",
        "step:40/40 val_loss:3.37500 train_time:20200ms step_avg:50",
        "step:40/40 val_loss:3.37500 train_time:20200ms step_avg:505.00m"]


@pytest.mark.parametrize("last", CUTS)
def test_a_line_that_was_cut_off_is_not_believed(tmp_path, last):
    run = read_one(tmp_path, our_log(lines=[*step_lines()[:-1], last], end="").rstrip("\n"))
    assert run.damaged == [last] and run.steps[-1] == 40 and not run.is_val[-1]


@pytest.mark.parametrize("line", [
    "step:7/40 train_time:-3ms step_avg:505.00ms", "step:7/x train_time:3ms step_avg:505.00ms",
    "step:7/40 val_loss:low train_time:3ms step_avg:5.00ms",
    "step:7/40 train_time:3h step_avg:505.00ms", "step:seven"])
def test_damaged_lines_are_kept_aside(tmp_path, line):
    lines = step_lines()
    run = read_one(tmp_path, our_log(lines=[*lines[:5], line, *lines[5:]]))
    assert run.damaged == [line] and len(run.steps) == len(lines)


@pytest.mark.parametrize("text", [
    "", "\n\n", "hello\n", SOURCE, SOURCE + SEPARATOR + "error: out of memory\n",
    bytes(range(256)) * 500, "\x1b[", "step:", "\r\r\r", SEPARATOR * 3,
    "val_loss:3.2\n", "step:x/y val_loss:3 train_time:1ms step_avg:1ms\n"])
def test_a_file_without_a_run_is_refused_with_a_reason(tmp_path, text):
    with pytest.raises(LogError, match="log0.txt holds no run: no line like 'step:125/1500"):
        read(tmp_path, text)


def test_a_missing_file_and_a_folder_without_logs_are_refused(tmp_path):
    with pytest.raises(LogError, match="nowhere.txt: no such file or folder"):
        read_logs([tmp_path / "nowhere.txt"])
    (tmp_path / "train_gpt.py").write_text(SOURCE)
    with pytest.raises(LogError, match=r"holds no logs \(\*.txt or \*.log or \*.tar.xz\)"):
        read_logs([tmp_path])


def test_a_folder_stands_for_its_logs_and_no_log_is_read_twice(tmp_path):
    paths = write_logs(tmp_path, our_log(seed=1), our_log(seed=2))
    (tmp_path / "run.log").write_text(our_log(seed=3))
    (tmp_path / "README.md").write_text("step:1/2")
    assert [run.seed for run in read_logs([paths[1], tmp_path, paths[0]])] == ["2", "1", "3"]


def test_an_archive_stands_for_the_logs_in_it_if_there_are_none_beside_it(tmp_path):
    paths = write_logs(tmp_path / "logs", our_log(seed=2), our_log(seed=1))
    (tmp_path / "logs" / "plan.out").write_text("no log")
    archive = tmp_path / "there" / "logs.tar.xz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:xz") as file:
        file.add(tmp_path / "logs", arcname=".")
    for place in (archive, archive.parent):
        runs = read_logs([place])
        assert [(run.name, run.seed) for run in runs] == [("log0.txt", "2"), ("log1.txt", "1")]
        for run, alone in zip(runs, read_logs(paths), strict=True):
            assert run.final_loss == alone.final_loss and run.source == alone.source
    (archive.parent / "alone.txt").write_text(our_log(seed=3))
    assert [run.seed for run in read_logs([archive.parent])] == ["3"]


@pytest.mark.parametrize("content", [b"", b"no archive", None])
def test_a_damaged_archive_or_one_without_logs_is_refused_by_name(tmp_path, content):
    archive = tmp_path / "logs.tar.xz"
    (tmp_path / "README.md").write_text("step:1/2")
    with tarfile.open(archive, "w:xz") as file:
        file.add(tmp_path / "README.md", arcname="README.md")
    if content is not None:
        archive.write_bytes(content)
    with pytest.raises(LogError, match="logs.tar.xz (cannot be read: .|holds no logs)"):
        read_logs([archive])
    archive.write_bytes(archive.read_bytes()[:60])
    with pytest.raises(LogError, match="logs.tar.xz cannot be read: ."):
        read_logs([archive])


def test_numbers_that_are_none_are_unknown(tmp_path):
    run = read_one(tmp_path, our_log(batch_size="many", val_tokens="1e6"))
    assert run.batch_sizes is None and run.train_tokens is None and run.number("val_tokens") is None


@pytest.mark.parametrize("line, value", [
    ("val_tokens: int = 10485760 # how many", 10_485_760),
    ("    val_tokens = 10_485_760", 10_485_760), ("val_tokens = 20 * 524288", 10_485_760),
    ("val_tokens = 1.5", None),
    ("# val_tokens = 5", None), ("val_tokens == 5", None), ("my_val_tokens = 5", None)])
def test_a_number_from_the_source(tmp_path, line, value):
    run = read_one(tmp_path, public_log(step_lines(), source=f"import os\n{line}\n"))
    assert run.number("val_tokens") == value


def test_shards_of_any_folder(tmp_path):
    shards = [line.replace("data/fineweb10B/", "C:\\my data\\") for line in shard_lines(train=1)]
    run = read_one(tmp_path, our_log(shards=shards))
    assert [(s.kind, s.name, s.num_bytes) for s in run.shards] == [
        ("train", "fineweb_train_000001.bin", 200_001_024),
        ("val", "fineweb_val_000000.bin", 200_001_024)]


@pytest.mark.parametrize("train_steps", [7, 9, 10, 40])
def test_tokens_are_counted_stage_by_stage_as_training_does(tmp_path, train_steps):
    stages = "65536,131072,393216"
    run = read_one(tmp_path, our_log(batch_stages=stages, train_steps=train_steps))
    args = tiny_args(batch_stages=stages, train_steps=train_steps, token_budget=10**9)
    sizes = [args.batch_size_at(step) for step in range(train_steps)]
    assert run.train_tokens == args.train_tokens == sum(sizes)
    for step in range(train_steps):
        assert run.tokens_at(step) == sum(sizes[:step])
        assert run.tokens_at(step + 0.25) == sum(sizes[:step]) + sizes[step] / 4
