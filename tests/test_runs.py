"""Whole runs, most of them tiny: their logs, their determinism, and how they fail."""

import contextlib
import hashlib
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import (
    ONE_RANK,
    ROOT,
    random_documents,
    run_ranks,
    run_train,
    wait_for,
    write_shard,
    write_tokens,
)

import train_gpt

sys.path.insert(0, str(ROOT / "records"))

from logs import source_files  # noqa: E402  needs the path above

TINY = (
    "--track sample --recipe sample --model_dim 16 --num_heads 2 --num_layers 2 "
    "--value_embeddings 1 --row_length 64 --max_document_length 64 --batch_size 256 "
    "--device_batch_size 128 --val_batch_size 256 --val_tokens 512 --train_steps 4 "
    "--val_loss_every 2 --window_start 128 --window_end 128"
).split()
SAMPLE = ROOT / "data" / "sample"
STEP_LINE = re.compile(
    r"step:\d+/\d+ (val_loss:\d+\.\d{5} )?train_time:\d+ms step_avg:\d+\.\d{2}ms"
)
BLOWS_UP = ["--head_lr", "1e38"]  # the loss of step 2 is no number


class Run(NamedTuple):
    status: int
    out: str
    err: str
    path: Path | None  # of the log
    train_losses: list[float]  # to the last bit
    val_losses: list[tuple[int, float]]
    model: train_gpt.GPT | None

    @property
    def log(self) -> str:
        return self.path.read_text()

    @property
    def steps(self) -> list[str]:
        """The lines that tools read."""
        return [line for line in self.log.splitlines() if line.startswith("step:")]


def run_main(folder: Path, *options, tty: bool = False, plot: bool = False, **replaced) -> Run:
    """train_gpt.main() here, on the CPU, with the TINY options, logging to folder / "logs".

    `replaced` are names of train_gpt to replace meanwhile. Warms up only if `options` say so.
    """
    seen = SimpleNamespace(train=[], val=[], model=None)

    def take_losses(path, train_losses, val_losses, args):
        seen.train, seen.val = train_losses, val_losses
        if plot:
            plot_losses(path, train_losses, val_losses, args)

    def take_model(*args):
        seen.model = gpt(*args)
        return seen.model

    plot_losses, gpt = train_gpt.plot_losses, replaced.pop("GPT", train_gpt.GPT)
    logs, out, err = folder / "logs", io.StringIO(), io.StringIO()
    out.isatty = lambda: tty
    argv = ["train_gpt.py", *TINY, "--kernel_warmup=false", f"--log_dir={logs}"]
    argv += map(str, options)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    torch.set_num_threads(1)
    try:
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            patch.setattr(sys, "argv", argv)
            patch.setattr(torch.cuda, "is_available", lambda: False)
            patch.setattr(train_gpt, "plot_losses", take_losses)
            patch.setattr(train_gpt, "GPT", take_model)
            for name, value in replaced.items():
                patch.setattr(train_gpt, name, value)
            status = train_gpt.main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    paths = sorted(logs.glob("*.txt")) if logs.is_dir() else []
    path = paths[-1] if paths else None
    return Run(status, out.getvalue(), err.getvalue(), path, seen.train, seen.val, seen.model)


def check_failed(run: Run, *named: str) -> None:
    """Exit status 1, one message for a person on stderr, that names these; also in the log."""
    assert run.status == 1
    assert run.err.startswith("error: ") and "Traceback" not in run.err
    for text in named:
        assert text in run.err
    if run.path:
        assert run.err.strip() in run.log


def val_texts(log: str) -> list[str]:
    return re.findall(r"^step:.* val_loss:(\S+)", log, re.MULTILINE)


# -----------------------------------------------------------------------------
# The log of a run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Run:
    """Five steps, validated after each second one and at the end."""
    folder = tmp_path_factory.mktemp("tiny")
    return run_main(folder, "--run_id=my.run", "--train_steps=5", "--log_every=2", plot=True)


def test_a_run_succeeds_and_says_so(tiny):
    assert tiny.status == 0
    assert tiny.err == ""
    assert tiny.model is not None and len(tiny.train_losses) == 5


def test_the_log_begins_with_the_exact_source(tiny):
    source = (ROOT / "train_gpt.py").read_text()
    assert tiny.log.startswith(source)
    assert tiny.log[len(source) :].startswith("\n" + "=" * 100 + "\n")


def test_the_log_has_the_source_of_the_kernels_too_if_they_are_used():
    script, kernels = (ROOT / name for name in ("train_gpt.py", "triton_kernels.py"))
    for switch in (None, "--triton_kernels", "--fp8_head", "--fp8_blocks"):
        used = switch is not None
        args = train_gpt.parse_hyperparameters([*TINY, *[switch] * used])
        files = source_files(train_gpt.read_source(args))
        assert files.pop("train_gpt.py").rstrip() == script.read_text().rstrip()
        assert files == ({"triton_kernels.py": kernels.read_text()} if used else {})


def test_the_record_recipe_made_tiny_trains_here_and_says_what_is_off(tmp_path):
    switches = "fp8_head", "fp8_blocks", "fp8_gradients", "triton_kernels"
    run = run_main(tmp_path, "--recipe", "sample-record", "--train_steps", "60",
                   "--val_loss_every", "60", "--tokens_ahead", "3",
                   *(f"--{switch}" for switch in switches))
    assert run.status == 0, run.err
    losses = [loss for _, loss in run.val_losses]
    assert losses[-1] < losses[0] - 0.1
    for switch in switches:
        assert f"--{switch} is off here: " in run.out and f"--{switch} is off here: " in run.log
        assert f"hyperparameter {switch}: False" in run.log


@pytest.mark.parametrize("options", [[], ["--kernel_warmup", "true"], ["--sampled_vocab", "2000"]])
def test_a_model_starts_from_the_frequencies_of_its_training_tokens(tmp_path, options):
    run = run_main(tmp_path, "--unigram_power", "1", "--train_steps", "1", *options)
    train, val = (np.fromfile(next(SAMPLE.glob(f"*_{kind}_*.bin")), "<u2", offset=1024)
                  for kind in ("train", "val"))
    counts = np.bincount(train[:1_000_000], minlength=50_257) + 1
    expected = np.log(counts.sum() / counts[val[1:513]]).mean()
    assert run.val_losses[0] == (0, pytest.approx(expected, abs=1e-5))


def test_the_log_names_versions_machine_and_commit(tiny):
    facts = tiny.log.split("=" * 100 + "\n")[-3]
    python = ".".join(map(str, sys.version_info[:3]))
    for fact in (f"Python {python}", f"torch {torch.__version__}", f"numpy {np.__version__}"):
        assert fact in facts
    [commit] = re.findall(r"^git commit: (.*)$", facts, re.MULTILINE)
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if git.returncode:
        assert commit == "none"
    else:
        assert re.fullmatch(r"[0-9a-f]{40} \((clean|with uncommitted changes)\)", commit)
        assert commit.startswith(git.stdout.strip())


def test_the_log_names_the_date_in_utc(tiny):
    [date] = re.findall(r"^date: (.*) UTC$", tiny.log, re.MULTILINE)
    age = datetime.now(UTC) - datetime.fromisoformat(date + "+00:00")
    assert timedelta(0) <= age < timedelta(hours=1)


def test_the_log_names_settings_of_the_compiler_that_come_from_outside(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("TORCH", "PYTORCH_", "TRITON_", "CUBLAS_", "CUDNN_", "NCCL_")):
            monkeypatch.delenv(name)
    cpu = torch.device("cpu")
    assert "\nenvironment: no settings\n" in train_gpt.describe_machine(cpu)
    monkeypatch.setenv("TORCHINDUCTOR_MAX_AUTOTUNE", "1")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/home/somebody/cache")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert ("\nenvironment: PYTORCH_ALLOC_CONF=expandable_segments:True "
            "TORCHINDUCTOR_MAX_AUTOTUNE=1\n") in train_gpt.describe_machine(cpu)


def test_the_log_names_the_data_with_sizes_and_hashes(tiny):
    for kind, name in (("train", "sample_train_000001.bin"), ("val", "sample_val_000000.bin")):
        [line] = re.findall(rf"^{kind} data: (.*)$", tiny.log, re.MULTILINE)
        content = (SAMPLE / name).read_bytes()
        path, size, *words = line.rsplit(" ", 4)
        assert Path(path).samefile(SAMPLE / name)
        assert [size, *words[:2]] == [str(len(content)), "bytes", "sha256"]
        assert words[2] == hashlib.sha256(content).hexdigest()


def test_the_log_has_every_hyperparameter_with_its_final_value(tiny):
    logged = dict(re.findall(r"^hyperparameter (\w+): (.*)$", tiny.log, re.MULTILINE))
    folder = tiny.path.parent
    args = train_gpt.parse_hyperparameters(
        [*TINY, "--run_id=my.run", "--train_steps=5", "--log_every=2", f"--log_dir={folder}",
         "--kernel_warmup=false"]
    )
    assert logged == {name: str(value) for name, value in vars(args).items()}
    assert logged["recipe"] == "sample" and logged["embed_lr"] == "0.5"  # not the default


def test_the_log_counts_parameters_and_tokens(tiny):
    vocab, dim, tables = 50_257, 16, 3  # embedding, head, one for values
    block = 12 * dim**2  # qkv 3, attention output 1, MLP 4 + 4
    scalars = 2 * (2 + 2) + 1  # value and residual lambdas of two layers, one skip
    total, active = vocab * dim * tables + 2 * block + scalars, vocab * dim + 2 * block
    assert f"\nparameters: {total:,} in all, {active:,} in" in tiny.log
    assert total == sum(p.numel() for p in tiny.model.parameters())
    assert "\ntokens per step: 256 = 1 ranks x 2 micro-batches x 128\n" in tiny.log


def test_step_lines_are_as_tools_expect_them(tiny):
    for line in tiny.steps:
        assert STEP_LINE.fullmatch(line), line
    validated = [line for line in tiny.steps if "val_loss" in line]
    assert [line.split()[0] for line in validated] == [f"step:{s}/5" for s in (0, 2, 4, 5)]
    trained = [line.split()[0] for line in tiny.steps if "val_loss" not in line]
    assert trained == [f"step:{s}/5" for s in range(1, 6)]
    assert "\nstep:0/5 val_loss" in tiny.log.split("=" * 100)[-1]  # after the header


def test_step_lines_are_in_order_and_their_times_rise(tiny):
    numbers, times, averages = zip(
        *((int(line.split(":")[1].split("/")[0]), int(re.search(r"train_time:(\d+)", line)[1]),
           float(re.search(r"step_avg:(.*)ms", line)[1])) for line in tiny.steps), strict=True,
    )
    assert list(numbers) == sorted(numbers)
    assert list(times) == sorted(times)
    assert times[0] <= 5  # the clock starts at step 0
    for step, elapsed, average in zip(numbers, times, averages, strict=True):
        assert step == 0 or average * step == pytest.approx(elapsed, abs=0.51 + 0.005 * step)


def test_logged_losses_are_those_that_were_computed(tiny):
    assert val_texts(tiny.log) == [f"{loss:.5f}" for _, loss in tiny.val_losses]
    assert [step for step, _ in tiny.val_losses] == [0, 2, 4, 5]
    assert tiny.val_losses[0][1] == pytest.approx(math.log(50_257), abs=1e-4)  # the head is 0
    assert tiny.train_losses[0] == pytest.approx(math.log(50_257), abs=1e-4)
    assert tiny.val_losses[-1][1] < tiny.val_losses[0][1] - 0.05  # and it learns


def test_the_log_ends_with_memory_recompilations_and_the_verdict(tiny):
    memory, graphs, verdict = tiny.log.splitlines()[-3:]
    assert re.fullmatch(r"peak memory: \d+ MiB.*", memory)
    assert re.fullmatch(r"graphs compiled while the clock ran: 0", graphs)
    last = re.fullmatch(r"step:5/5 val_loss:(\S+) train_time:(\d+)ms .*", tiny.steps[-1])
    assert "target 7.2 of track sample not reached" in verdict
    assert f"val_loss {last[1]} at step 5" in verdict
    seconds = float(re.search(r"train_time (\d+\.\d{3})s", verdict)[1])
    assert 1000 * seconds == pytest.approx(int(last[2]), abs=1)


def test_the_console_shows_validations_some_steps_and_where_the_log_is(tiny):
    for line in tiny.steps:
        assert (f"{line}\n" in tiny.out) == ("val_loss" in line)
    shown = re.findall(r"^step (\d+)/5  loss (\d+\.\d+)  \S+ tokens/s", tiny.out, re.MULTILINE)
    losses = tiny.train_losses
    assert shown == [(str(step), f"{losses[step - 1]:.4f}") for step in (1, 2, 4)]
    assert str(tiny.path) in tiny.out and "my.run.png" in tiny.out
    assert tiny.log.splitlines()[-1] in tiny.out


def test_the_loss_curve_is_a_picture(tiny):
    from matplotlib import image

    path = tiny.path.parent / "my.run.png"
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = image.imread(path)
    assert min(pixels.shape[:2]) > 200 and pixels[..., :3].std() > 0.01


def test_the_loss_curve_shows_every_loss(tmp_path, monkeypatch):
    """Also a single validation far from the target, as with --val_loss_every 0."""
    from matplotlib import pyplot

    shown = []
    monkeypatch.setattr(pyplot, "close", shown.append)
    args = train_gpt.parse_hyperparameters(TINY)
    for number, val_losses in enumerate([[(0, 10.8), (2, 9.0), (4, 8.0)], [(4, 10.5)]]):
        train_gpt.plot_losses(tmp_path / f"{number}.png", [10.8, 10, 9, 8], val_losses, args)
        axes = shown[number].axes[0]
        train, val = axes.lines[:2]
        assert list(zip(train.get_xdata(), train.get_ydata(), strict=True)) == [
            (1, 10.8), (2, 10), (3, 9), (4, 8)]
        assert list(zip(val.get_xdata(), val.get_ydata(), strict=True)) == val_losses
        low, high = axes.get_ylim()
        assert low < min(args.target, val_losses[-1][1]) and val_losses[-1][1] < high


def test_the_log_has_the_name_that_was_asked_for_and_is_never_overwritten(tiny, tmp_path):
    assert [path.name for path in tiny.path.parent.glob("*.txt")] == ["my.run.txt"]
    before = tiny.log
    again = run_main(tiny.path.parents[1], "--run_id=my.run", "--train_steps=1")
    assert again.status == 1
    assert "my.run.txt" in again.err and "--run_id" in again.err
    assert again.log == before


@pytest.mark.parametrize("never", ["0", "-1"])
def test_a_run_without_a_name_gets_one_from_recipe_and_seed(tmp_path, never):
    run = run_main(tmp_path, "--train_steps=1", "--seed=4321", f"--val_loss_every={never}")
    assert re.fullmatch(r"\d{8}-\d{6}-sample-seed4321", run.path.stem)
    assert [step for step, _ in run.val_losses] == [1]  # validated only at the end
    assert [line.split()[0] for line in run.steps] == ["step:1/1", "step:1/1"]


def test_a_terminal_shows_a_bar_and_whole_validation_lines(tmp_path):
    run = run_main(tmp_path, tty=True)
    assert run.status == 0
    assert "4/4" in run.err and "tokens/s" in run.err  # the bar
    for line in run.steps:
        assert (f"{line}\n" in run.out) == ("val_loss" in line)
    assert not re.search(r"^step \d", run.out, re.MULTILINE)


@pytest.mark.parametrize("name", ["a$x_{$b", "50% of it"])
def test_a_run_may_have_any_name_that_a_file_may_have(tmp_path, name):
    run = run_main(tmp_path, f"--run_id={name}", "--train_steps=1", plot=True)
    assert run.status == 0, run.err
    assert (tmp_path / "logs" / f"{name}.png").stat().st_size > 1_000


# -----------------------------------------------------------------------------
# Verdicts


def test_a_run_on_the_claim_of_its_track_says_nothing_against_a_record(tmp_path):
    run = run_main(tmp_path, "--val_tokens=16384", "--train_steps=1", evaluate=lambda *args: 9.0)
    assert run.status == 0
    assert "not a record:" not in run.log.split("=" * 100 + "\n", 1)[1]
    assert "not a record:" not in run.out
    assert run.log.splitlines()[-1].startswith("target 7.2 of track sample not reached")


def test_a_run_without_a_target_neither_reaches_one_nor_misses_it(tmp_path):
    run = run_main(tmp_path, "--target=0", "--train_steps=1", plot=True)
    assert run.status == 0
    last = f"{run.val_losses[-1][1]:.5f} at step 1, train_time "
    assert run.log.splitlines()[-1].startswith(f"target none of track sample: val_loss {last}")
    assert "tokens to val_loss" not in run.out
    assert train_gpt.has_verdict(run.path)


def test_a_run_off_the_claim_of_its_track_says_why_it_is_no_record(tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(SAMPLE, folder)
    run = run_main(tmp_path, f"--data_path={folder}", "--target=11", "--token_budget=9999")
    verdict = run.log.splitlines()[-1]
    first = run.val_losses[0][1]
    assert verdict.startswith(
        f"target 11.0 of track sample reached: val_loss {first:.5f} at step 0, train_time 0.0"
    )
    header = run.log.split("=" * 100)[-2]
    for name, value in (("data_path", str(folder)), ("target", "11.0"), ("val_tokens", "512"),
                        ("token_budget", "9999")):
        assert re.search(rf"^not a record: {name} is {re.escape(value)} ", header, re.MULTILINE)
        assert f"{name} is {value} " in verdict.split("not a record: ")[1]
    assert verdict in run.out


def test_the_verdict_names_the_first_validation_that_reached_the_target(tmp_path):
    losses = iter([10.0, 7.2, 6.0])  # the target itself counts
    run = run_main(tmp_path, evaluate=lambda *args: next(losses))
    [line] = [line for line in run.steps if line.startswith("step:2/4 val_loss")]
    milliseconds = int(re.search(r"train_time:(\d+)ms", line)[1])
    verdict = re.match(r"target 7.2 of track sample reached: val_loss 7.20000 at step 2, "
                       r"train_time (\S+)s", run.log.splitlines()[-1])
    assert 1000 * float(verdict[1]) == pytest.approx(milliseconds, abs=1)


# -----------------------------------------------------------------------------
# The same training, whatever changes memory and speed only


# From zeros, Adam makes large updates of gradients that are mostly rounding error.
AWAKE = "--zero_init_projections=false"


@pytest.fixture(scope="module")
def usual(tmp_path_factory) -> Run:
    return run_main(tmp_path_factory.mktemp("usual"), AWAKE)


def test_the_same_command_gives_the_same_bits(usual, tmp_path):
    torch.manual_seed(99)  # what happened before in the process plays no part
    again = run_main(tmp_path, AWAKE)
    assert again.train_losses == usual.train_losses
    assert again.val_losses == usual.val_losses
    assert val_texts(again.log) == val_texts(usual.log) != []
    weights = usual.model.state_dict()
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_another_seed_gives_another_run_on_the_same_data(usual, tmp_path):
    other = run_main(tmp_path, AWAKE, "--seed=1")
    assert other.val_losses[-1][1] != usual.val_losses[-1][1]
    assert other.val_losses[-1][1] == pytest.approx(usual.val_losses[-1][1], abs=0.5)
    assert not torch.equal(other.model.embed.weight, usual.model.embed.weight)


def test_warming_up_changes_no_bit(usual, tmp_path):
    warm = run_main(tmp_path, AWAKE, "--kernel_warmup=true")
    assert (warm.train_losses, warm.val_losses) == (usual.train_losses, usual.val_losses)
    weights = usual.model.state_dict()
    for name, value in warm.model.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_validating_more_often_changes_no_training(usual, tmp_path):
    often = run_main(tmp_path, AWAKE, "--val_loss_every=1")
    assert often.train_losses == usual.train_losses
    assert [often.val_losses[step] for step in (0, 2, 4)] == usual.val_losses


@pytest.mark.parametrize(
    "option",
    ["device_batch_size=64", "device_batch_size=256", "val_batch_size=64", "val_batch_size=384",
     "loss_chunk_size=50"],
)
def test_options_of_memory_leave_the_losses_alone(option, usual, tmp_path):
    run = run_main(tmp_path, AWAKE, f"--{option}")
    assert run.train_losses == pytest.approx(usual.train_losses, abs=1e-5)
    for (step, loss), (same_step, same_loss) in zip(run.val_losses, usual.val_losses, strict=True):
        assert step == same_step and loss == pytest.approx(same_loss, abs=1e-5)


def test_two_ranks_train_as_one_and_write_one_log(usual, tmp_path):
    done = run_train(*TINY, AWAKE, cwd=tmp_path, nproc=2)
    assert done.returncode == 0, done.stderr
    [log] = (tmp_path / "logs").glob("*.txt")
    assert len(list((tmp_path / "logs").glob("*.png"))) == 1
    text = log.read_text()
    steps = [line for line in text.splitlines() if line.startswith("step:")]
    assert [line.split()[0] for line in steps] == [line.split()[0] for line in usual.steps]
    losses = [float(loss) for loss in val_texts(text)]
    assert losses == pytest.approx([loss for _, loss in usual.val_losses], abs=1.5e-5)
    assert "tokens per step: 256 = 2 ranks x 1 micro-batches x 128" in text
    assert done.stdout.count("step:4/4 val_loss") == 1  # one rank talks


def what_a_rank_draws(ranks, log_dir):
    """The tokens that its first chunk of training is compared with."""
    args = train_gpt.parse_hyperparameters(
        [*TINY, f"--data_path={SAMPLE}", f"--log_dir={log_dir}", "--train_steps=1",
         "--sampled_vocab=1000", "--loss_chunk_size=128"])
    drawn, sample = [], train_gpt.sample_vocabulary

    def noted(*arguments):
        drawn.append(sample(*arguments))
        return drawn[-1]

    train_gpt.sample_vocabulary = noted
    train_gpt.train(args, ranks, train_gpt.Log(), train_gpt.StopSignal())
    return drawn[0][0][0].sort().values


def test_ranks_draw_samples_of_their_own(tmp_path):
    first, second = run_ranks(what_a_rank_draws, 2, tmp_path / "ranks", tmp_path / "logs")
    assert len(first) == len(second) == 1000
    shared = len(set(first.tolist()) & set(second.tolist()))
    assert shared < 500  # frequent ones, and those drawn by chance


def test_ranks_that_cannot_share_a_step_are_told_which_can():
    args = train_gpt.parse_hyperparameters([*TINY, "--batch_size=768", "--device_batch_size=64"])
    with pytest.raises(train_gpt.RunError) as error:
        train_gpt.check_accumulation(args, 5)
    named = json.loads(re.search(r"\[.*\]", str(error.value))[0])
    assert named == [1, 2, 3, 4, 6, 12] and "5 ranks" in str(error.value)
    for world_size in named:
        train_gpt.check_accumulation(args, world_size)


def test_a_micro_batch_that_does_not_fit_names_those_that_do(tmp_path):
    run = run_main(tmp_path, "--batch_size=768", "--device_batch_size=512")
    check_failed(run, "--device_batch_size 512", "768 tokens")
    named = json.loads(re.search(r"\[.*\]", run.err)[0])
    assert named == [64, 128, 192, 256, 384, 768]
    fits = run_main(tmp_path, "--batch_size=768", "--device_batch_size=256", "--train_steps=1")
    assert fits.status == 0
    for size in named:
        args = train_gpt.parse_hyperparameters(
            [*TINY, "--batch_size=768", f"--device_batch_size={size}"])
        train_gpt.check_accumulation(args, 1)


def test_a_rank_without_an_equal_share_of_micro_batches_is_refused_too():
    args = train_gpt.parse_hyperparameters([*TINY, "--batch_size=768", "--device_batch_size=256"])
    train_gpt.check_accumulation(args, 3)
    with pytest.raises(train_gpt.RunError, match="384 tokens of each of 2 ranks") as error:
        train_gpt.check_accumulation(args, 2)
    assert json.loads(re.search(r"\[.*\]", str(error.value))[0]) == [64, 128, 192, 384]


def test_a_micro_batch_has_to_fit_every_stage():
    stages = [*TINY, "--batch_stages=256,384"]
    train_gpt.check_accumulation(train_gpt.parse_hyperparameters(stages), 1)
    with pytest.raises(train_gpt.RunError, match="does not divide the 64 tokens of each of 2"):
        train_gpt.check_accumulation(train_gpt.parse_hyperparameters(stages), 2)
    with pytest.raises(train_gpt.RunError, match="step of --batch_stages 256 .* 3 ranks cannot"):
        train_gpt.check_accumulation(train_gpt.parse_hyperparameters(stages), 3)


# -----------------------------------------------------------------------------
# The clock


def test_the_clock_counts_steps_and_neither_validation_nor_warm_up(tmp_path):
    """A step takes a second here, a validation 100, and warming up 1,000."""
    now = [0.0]

    def taking(seconds, function):
        def slow(*args, **options):
            now[0] += seconds
            return function(*args, **options)

        return slow

    run = run_main(
        tmp_path,
        "--kernel_warmup=true",
        time=SimpleNamespace(**vars(time) | {"perf_counter": lambda: now[0]}),
        train_step=taking(1, train_gpt.train_step),
        evaluate=taking(100, train_gpt.evaluate),
        warm_up=taking(1000, train_gpt.warm_up),
    )
    assert now[0] > 1304
    times = [line.split("train_time:")[1] for line in run.steps]
    assert times == ["0ms step_avg:0.00ms"] + [
        f"{1000 * step}ms step_avg:1000.00ms" for step in (1, 2, 2, 3, 4, 4)
    ]
    assert "train_time 4.000s" in run.log.splitlines()[-1]


# -----------------------------------------------------------------------------
# Data that is missing or wrong


def make_data(folder: Path, train_tokens=4096, val_tokens=1024) -> Path:
    """Two train shards and a val shard of small documents; returns their folder."""
    for number, (name, tokens) in enumerate(
        {"a_train_000001": train_tokens, "a_train_000002": train_tokens,
         "a_val_000000": val_tokens}.items()
    ):
        documents = random_documents(number, tokens // 20, 60, vocab_size=50_000)
        write_shard(folder / f"{name}.bin", documents)
    return folder


def damage(folder: Path, how: str) -> str:
    """Damage the data made above; returns the path of the shard that is wrong."""
    train, val = folder / "a_train_000001.bin", folder / "a_val_000000.bin"
    if how == "truncated":
        train.write_bytes(train.read_bytes()[:-100])
    elif how == "foreign":
        train.write_bytes(b"This is a text. " * 1000)
    elif how == "empty":
        write_tokens(train, [])
    elif how == "no bytes":
        train.write_bytes(b"")
    elif how == "version":
        write_tokens(train, [50_256] * 4096, version=2)
    elif how == "folder":
        train.unlink()
        train.mkdir()
    elif how == "truncated val":
        val.write_bytes(val.read_bytes()[:-1])
        return str(val)
    return str(train)


def test_missing_data_names_the_download(tmp_path):
    run = run_main(tmp_path, f"--data_path={tmp_path / 'nowhere'}")
    check_failed(run, "nowhere", "python data/cached_fineweb10B.py", "--data_path")
    assert run.path is None  # no log of a run that never was
    shards = re.search(r"cached_fineweb10B\.py (\d+)", run.err)[1]
    assert int(shards) == 1


def test_missing_train_shards_are_told_apart_from_val_shards(tmp_path):
    folder = make_data(tmp_path / "data")
    for path in folder.glob("*train*"):
        path.unlink()
    check_failed(run_main(tmp_path, f"--data_path={folder}"), "no train shards", str(folder))


@pytest.mark.parametrize(
    "how",
    ["truncated", "foreign", "empty", "no bytes", "version", "folder", "truncated val"],
)
def test_a_bad_shard_is_named(how, tmp_path):
    folder = make_data(tmp_path / "data")
    path = damage(folder, how)
    check_failed(run_main(tmp_path, f"--data_path={folder}"), path)


def test_too_few_val_tokens_are_counted(tmp_path):
    folder = make_data(tmp_path / "data", val_tokens=256)
    write_tokens(folder / "a_val_000000.bin", [50_256] + [1] * 512)
    enough = run_main(tmp_path, f"--data_path={folder}", "--val_tokens=512", "--train_steps=1")
    assert enough.status == 0, enough.err
    # The last token of 512 is only ever a target.
    write_tokens(folder / "a_val_000000.bin", [50_256] + [1] * 511)
    short = run_main(tmp_path / "2", f"--data_path={folder}", "--val_tokens=512")
    check_failed(short, "512 tokens and one more", "448", "--val_tokens")


def test_too_few_train_tokens_name_how_many_shards_are_needed(tmp_path):
    folder = make_data(tmp_path / "data", train_tokens=4000)
    options = [f"--data_path={folder}", "--train_steps=70"]
    run = run_main(tmp_path, *options)
    check_failed(run, "70 steps", "--train_steps")
    needed = int(re.search(r"cached_fineweb10B\.py (\d+)", run.err)[1])
    have = int(re.search(r"hold (\d+) steps", run.err)[1])
    args = train_gpt.parse_hyperparameters([*TINY, *options[:1], f"--train_steps={have}"])
    train_gpt.plan_data(args)  # so many are really there
    for number in range(3, needed + 1):
        documents = random_documents(number, 200, 60, vocab_size=50_000)
        write_shard(folder / f"a_train_{number:06}.bin", documents)
    train, _ = train_gpt.plan_data(train_gpt.parse_hyperparameters([*TINY, *options]))
    assert needed - 1 <= len(train) <= needed


def test_a_shard_that_breaks_during_the_run_stops_it_with_a_message(tmp_path):
    folder = make_data(tmp_path / "data", train_tokens=400)
    per_shard = train_gpt.inspect_shard(
        folder / "a_train_000001.bin", train_gpt.parse_hyperparameters(TINY), True
    ).num_rows // 4
    assert 0 < per_shard < 4

    def plan_then_break(args):
        plan = train_gpt_plan(args)
        assert len(plan[0]) == 2
        (folder / "a_train_000002.bin").write_bytes(b"gone")
        return plan

    train_gpt_plan = train_gpt.plan_data
    run = run_main(
        tmp_path, f"--data_path={folder}", f"--train_steps={per_shard + 1}", "--val_loss_every=1",
        plan_data=plan_then_break,
    )
    check_failed(run, "a_train_000002.bin")
    assert val_texts(run.log)  # what was measured before


def test_an_error_of_the_loader_is_raised_where_its_batch_is_wanted():
    def items():
        yield 1
        yield 2
        raise ValueError("the disk is gone")

    ahead = train_gpt.prefetch(items())
    assert (next(ahead), next(ahead)) == (1, 2)
    with pytest.raises(ValueError, match="the disk is gone"):
        next(ahead)
    assert list(train_gpt.prefetch(range(50))) == list(range(50))


# -----------------------------------------------------------------------------
# Logs that cannot be written


def test_a_log_folder_that_cannot_be_made_is_named_with_its_option(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for log_dir in (tmp_path / "file", tmp_path / "file" / "logs"):
        run = run_main(tmp_path, f"--log_dir={log_dir}")
        check_failed(run, str(log_dir), "--log_dir")
        assert val_texts(run.out) == []  # before anything was trained
    assert (tmp_path / "file").read_text() == "in the way"


@contextlib.contextmanager
def largest_file(size: int):
    """Files cannot grow beyond `size` bytes: a write fails half done, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_loses_halves_and_doubles_no_line(tmp_path, capsys):
    log = train_gpt.Log()
    log.create(tmp_path / "log.txt")
    lines = [f"line {number} {'x' * number}" for number in range(20)]
    for line in lines[:5]:
        log(line)
    assert capsys.readouterr().out == ""
    size = log.path.stat().st_size
    with largest_file(size + 5):
        for line in lines[5:10]:
            log(line)
            assert log.path.read_text().splitlines() == lines[:5]
    shown = capsys.readouterr().out
    assert shown.count("cannot write") == 1 and str(log.path) in shown
    assert [line for line in shown.splitlines() if line in lines] == lines[5:10]
    for line in lines[10:15]:
        log(line)
        assert log.path.read_text().splitlines() == lines[: lines.index(line) + 1]
    assert capsys.readouterr().out == ""  # quiet again
    with largest_file(log.path.stat().st_size + 5):
        log(lines[15])
    assert capsys.readouterr().out.count("cannot write") == 1
    assert log.close() == 1
    assert str(log.path) in capsys.readouterr().err
    log(lines[16])
    assert log.path.read_text().splitlines() == lines[:17]
    assert log.close() == 0


def test_lines_are_on_disk_as_soon_as_they_are_logged(tmp_path):
    log = train_gpt.Log()
    log("before there is a log: dropped, as on other ranks")
    log.create(tmp_path / "deep" / "log.txt")
    log("one")
    assert log.path.read_text() == "one\n"
    assert log.close() == 0


def test_a_run_goes_on_without_its_log_and_tells_so_at_the_end(usual, tmp_path):
    size = usual.path.stat().st_size
    with largest_file(size - 500):  # room for the header and not for all steps
        run = run_main(tmp_path, AWAKE)
    assert run.status == 1
    assert "error:" in run.err and "lacks its last" in run.err and "Traceback" not in run.err
    assert run.val_losses == usual.val_losses  # trained to the end
    kept = run.log.splitlines()
    assert all(STEP_LINE.fullmatch(line) for line in run.steps) and len(run.steps) < 7
    on_console = [line for line in run.out.splitlines() if line.startswith("step:")]
    assert {line.split(" train_time")[0] for line in run.steps + on_console} == {
        line.split(" train_time")[0] for line in usual.steps
    }
    assert not any("peak memory: " in line and "MiB" in line for line in kept[-2:])
    assert "not reached" in run.out


# -----------------------------------------------------------------------------
# Runs that break off


def test_a_loss_that_is_no_number_stops_the_run_with_what_is_known(tmp_path):
    run = run_main(tmp_path, *BLOWS_UP, "--matrix_lr=0.0625", "--cooldown_frac=0")
    check_failed(run, "nan at step 2", "learning rate", "0.0625", "last good validation: step 0")
    first = f"{run_main(tmp_path / '2', '--train_steps=1').val_losses[0][1]:.5f}"
    assert f"val_loss {first}" in run.err
    assert [line.split()[0] for line in run.steps] == ["step:0/4", "step:1/4"]
    assert val_texts(run.log) == [first]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_validation_that_is_no_number_stops_the_run_too(loss, tmp_path):
    losses = iter([9.5, loss])
    run = run_main(tmp_path, evaluate=lambda *args: next(losses))
    check_failed(run, f"val_loss is {loss} at step 2", "last good validation: step 0 val_loss 9.5")
    assert [line.split()[0] for line in run.steps] == ["step:0/4", "step:1/4", "step:2/4"]


def test_what_nobody_foresaw_stands_in_the_log_too(tmp_path):
    def fails(*args):
        raise RuntimeError("Connection closed by peer")

    with pytest.raises(RuntimeError, match="closed by peer"):
        run_main(tmp_path, evaluate=fails)
    [log] = (tmp_path / "logs").glob("*.txt")
    assert log.read_text().splitlines()[-1] == "error: RuntimeError: Connection closed by peer"


def test_two_ranks_stop_together_at_a_loss_that_is_no_number(tmp_path):
    done = run_train(*TINY, *BLOWS_UP, cwd=tmp_path, nproc=2, timeout=120)
    assert done.returncode == 1
    assert done.stderr.count("error: train loss is nan at step 2") == 1  # one rank reports
    assert 'File "' + str(ROOT / "train_gpt.py") not in done.stderr  # no traceback of ours
    [log] = (tmp_path / "logs").glob("*.txt")
    assert "error: train loss is nan at step 2" in log.read_text().splitlines()[-1]


class ForgetfulGPT(train_gpt.GPT):
    """Runs out of memory on micro-batches of more rows than `rows`, `training` or validating."""

    rows, training_only = 0, True

    def forward(self, batch, *args):
        if torch.is_grad_enabled() == self.training_only and len(batch.inputs_BT) > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().forward(batch, *args)


@pytest.mark.parametrize("warmup", ["true", "false"])
@pytest.mark.parametrize("training", [True, False])
def test_running_out_of_gpu_memory_names_what_to_try_until_it_fits(training, warmup, tmp_path):
    class GPT(ForgetfulGPT):
        rows, training_only = 1, training

    knob = "device_batch_size" if training else "val_batch_size"
    options = [f"--kernel_warmup={warmup}", "--train_steps=1", "--val_tokens=576"]
    options += ["--batch_size=576", "--device_batch_size=64", "--val_batch_size=64"]
    size, tried = 576, []
    while True:
        run = run_main(tmp_path / str(size), *options, f"--{knob}={size}", GPT=GPT)
        if run.status == 0:
            break
        check_failed(run, "out of GPU memory", f"--{knob} {size}", "try")
        size = int(re.search(rf"try --{knob} (\d+)", run.err)[1])
        tried.append(size)
    assert tried == [192, 64]  # nine rows, three, one


def test_running_out_of_gpu_memory_with_one_row_names_another_knob(tmp_path):
    run = run_main(tmp_path, "--device_batch_size=64", "--loss_chunk_size=8192", GPT=ForgetfulGPT)
    check_failed(run, "out of GPU memory", "try a smaller --loss_chunk_size")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> dict[int, tuple[subprocess.CompletedProcess, str]]:
    """Two long runs, of which one gets Ctrl-C and one SIGTERM after the first steps."""
    runs, done = {}, {}
    for number in (signal.SIGINT, signal.SIGTERM):
        folder = tmp_path_factory.mktemp(number.name)
        log, options = folder / "logs" / "run.txt", ["--run_id=run", "--train_steps=2000"]
        process = subprocess.Popen(
            [sys.executable, ROOT / "train_gpt.py", *TINY, *options, "--max_document_length=8",
             "--token_budget=999999999", f"--data_path={more_data(folder / 'data')}"],
            cwd=folder, env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            # A shell that starts the tests in the background makes them ignore Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        runs[number] = process, log
    try:
        for number, (process, log) in runs.items():
            wait_for(process, lambda log=log: (
                log.exists() and "\nstep:3/2000 train_time" in log.read_text()))
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
            done[number] = (
                subprocess.CompletedProcess([], process.returncode, out, err),
                log.read_text(),
            )
    finally:
        for process, _ in runs.values():
            process.kill()
            process.wait()
    return done


def more_data(folder: Path) -> Path:
    """Enough for 2,000 tiny steps."""
    tokens = np.random.default_rng(0).integers(0, 50_000, 530_000)
    tokens[::8] = 50_256
    write_tokens(folder / "a_train_000001.bin", tokens)
    write_tokens(folder / "a_val_000000.bin", tokens[:1001])
    return folder


@pytest.mark.parametrize(
    "number, status, word", [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")]
)
def test_a_stopped_run_ends_its_log_and_says_so(stopped, number, status, word):
    done, log = stopped[number]
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    *lines, last = log.splitlines()
    assert word in last and word in done.stdout
    assert log.endswith("\n")
    assert STEP_LINE.fullmatch(lines[-1])  # all that was measured is whole


def test_a_second_signal_ends_a_run_that_is_ending_without_a_traceback():
    code = ("import os, signal, train_gpt\n"
            "def train(*args):\n    os.kill(os.getpid(), signal.SIGINT)\n"
            "def close(log, *texts, **named):\n    os.kill(os.getpid(), signal.SIGTERM)\n"
            "train_gpt.train, train_gpt.Log.__call__ = train, close\n"
            "train_gpt.main()")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    assert done.returncode == -signal.SIGTERM and done.stderr == ""


# -----------------------------------------------------------------------------
# Weights & Biases


def test_wandb_gets_every_loss_where_nobody_is_logged_in(tmp_path):
    env = {"HOME": str(tmp_path), "WANDB_DIR": str(tmp_path),
           "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = run_train(*TINY, "--log_wandb", "--wandb_project=tests", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    [record] = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = record.read_bytes()
    [log] = (tmp_path / "logs").glob("*.txt")
    for name in ("train_loss", "val_loss", "train_time", "matrix_lr", "tests", log.stem):
        assert name.encode() in content, name
    assert len(val_texts(log.read_text())) == 3


def test_wandb_is_imported_only_when_asked_for(tmp_path):
    code = "import sys, train_gpt; status = train_gpt.main(); print('wandb' in sys.modules, status)"
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, *TINY, "--train_steps=1"], cwd=tmp_path,
                          env=env | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
                          timeout=120)
    assert done.stdout.splitlines()[-1] == "False 0", done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs"]


def test_a_missing_wandb_is_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_failed(run_main(tmp_path, "--log_wandb"), "--log_wandb", "pip install wandb")


def test_a_missing_matplotlib_costs_only_the_curve(tmp_path):
    def cannot(*args):
        raise ImportError("No module named 'matplotlib'")

    run = run_main(tmp_path, plot_losses=cannot)
    assert run.status == 0
    assert "matplotlib" in run.out and str(run.path) in run.out


# -----------------------------------------------------------------------------
# Ranks


def test_ranks_with_different_weights_are_found_out(monkeypatch):
    model = torch.nn.Linear(2, 2)
    train_gpt.check_ranks_agree(model, ONE_RANK)

    def other_rank_is_off(tensor, op):
        tensor[0] += 1e-9 * tensor[0].abs() + 1e-9

    monkeypatch.setattr(train_gpt.dist, "all_reduce", other_rank_is_off)
    with pytest.raises(train_gpt.RunError, match="different weights"):
        train_gpt.check_ranks_agree(model, ONE_RANK._replace(world_size=2))
    monkeypatch.setattr(train_gpt.dist, "all_reduce", lambda tensor, op: None)
    train_gpt.check_ranks_agree(model, ONE_RANK._replace(world_size=2))


def test_a_process_without_a_gpu_of_its_own_is_told_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(train_gpt.RunError, match="local rank 1.*--nproc_per_node"):
        train_gpt.join_ranks()


# -----------------------------------------------------------------------------
# A real run: the sample track as it is, some two minutes


def read_tokens(path: Path) -> np.ndarray:
    return np.fromfile(path, dtype="<u2", offset=1024)


def test_the_sample_track_reaches_its_target_and_beats_word_frequencies(tmp_path):
    done = run_train("--track", "sample", cwd=tmp_path, timeout=1200)  # a second thread would spin
    assert done.returncode == 0, done.stderr
    [log] = (tmp_path / "logs").glob("*.txt")
    text = log.read_text()
    verdict = text.splitlines()[-1]
    assert verdict.startswith("target 7.2 of track sample reached: val_loss ")
    assert "not a record" not in verdict
    losses = [float(loss) for loss in val_texts(text)]
    assert losses[-1] <= 7.2 and losses[0] - losses[-1] > 0.3

    counts = np.bincount(read_tokens(SAMPLE / "sample_train_000001.bin"), minlength=50_257) + 1
    targets = read_tokens(SAMPLE / "sample_val_000000.bin")[1 : 16_384 + 1]
    unigram = -np.log(counts / counts.sum())[targets].mean()
    assert losses[-1] < unigram
