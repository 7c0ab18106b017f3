"""./run.sh screen: the runs of a plan, several at a time, and the table of their logs."""

import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, wait_for
from test_attempt import SHORT
from test_commands import environment

sys.path.insert(0, str(ROOT / "records"))

from logs import LogError  # noqa: E402  needs the path above
from screen import read_plan  # noqa: E402

PLAN = """\
# What a switch is worth
control:
no-norm: --qk_norm none     # queries and keys as they are
"""


def start(plan: Path, *options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, ROOT / "records" / "screen.py", plan, "--log_dir", plan.parent / "logs",
         *map(str, options), *SHORT], cwd=ROOT, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def screen(plan: Path, *options) -> subprocess.CompletedProcess:
    process = start(plan, *options)
    out, err = process.communicate(timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture
def plan(tmp_path) -> Path:
    path = tmp_path / "plan.txt"
    path.write_text(PLAN)
    return path


@pytest.fixture(scope="module")
def screened(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """A folder of a plan with the logs of its four runs, and what the command said of them."""
    folder = tmp_path_factory.mktemp("screened")
    (folder / "plan.txt").write_text(PLAN)
    return folder, screen(folder / "plan.txt", "--seeds", 2, "--seed", 5, "--per_gpu", 2)


def test_a_plan_is_a_name_and_options_on_each_line():
    assert read_plan(PLAN) == {"control": [], "no-norm": ["--qk_norm", "none"]}


@pytest.mark.parametrize("text, problem", [
    ("", "empty"), ("# nothing\n", "empty"), ("a:\n--qk_norm none\n", "line 2"),
    ("a:\n\na: --qk_norm none\n", "line 3.*'a' above"), ("a b: --qk_norm none\n", "line 1"),
    ("../a:\n", "line 1"),
])
def test_what_is_no_plan_is_refused_with_its_line(text, problem):
    with pytest.raises(LogError, match=problem):
        read_plan(text)


def test_every_line_runs_with_every_seed_and_the_table_compares_them_with_the_first(screened):
    folder, done = screened
    assert done.returncode == 0, done.stdout + done.stderr
    logs = {path.stem: path.read_text() for path in (folder / "logs").glob("*.txt")}
    assert set(logs) == {"control-seed5", "control-seed6", "no-norm-seed5", "no-norm-seed6"}
    for name, log in logs.items():
        assert f"\nhyperparameter seed: {name[-1]}\n" in log
        value = "rms" if name.startswith("control") else "none"
        assert f"\nhyperparameter qk_norm: {value}\n" in log
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")][2:]
    assert re.match(r"\| none: the control, control-seed5.txt \| 2 \|", rows[0])
    assert re.match(r"\| `qk_norm`: rms -> none \| 2 \| .* \| [+-]0\.\d{4} \| ", rows[1])
    assert len(rows) == 2


def test_what_is_done_is_not_done_again_and_what_was_cut_off_is(screened):
    plan = screened[0] / "plan.txt"
    whole, cut = (screened[0] / "logs" / f"{name}-seed5.txt" for name in ("control", "no-norm"))
    before = whole.read_text()
    text = cut.read_text()
    cut.write_text(text[: text.index("step:2/2")])
    done = screen(plan, "--seed", 5)
    assert done.returncode == 0, done.stderr
    assert "2 runs, 1 of them done" in done.stdout and "control-seed5: " not in done.stdout
    assert whole.read_text() == before and "step:2/2 val_loss:" in cut.read_text()
    assert cut.with_suffix(".cut-off").read_text() == text[: text.index("step:2/2")]
    # It would mix runs that were made differently.
    other = screen(plan, "--seed", 5, "--embed_lr", 0.01)
    assert other.returncode == 1 and "another embed_lr" in other.stderr


def test_an_option_that_train_gpt_refuses_is_named_before_anything_runs(plan):
    plan.write_text(PLAN + "typo: --qk_nrom false\n")
    done = screen(plan)
    assert done.returncode == 1 and not (plan.parent / "logs").exists()
    assert "did you mean --qk_norm" in done.stderr and "'typo'" in done.stderr


def test_runs_that_would_end_at_a_target_are_refused_before_anything_runs(plan):
    done = screen(plan, "--stop_at_target", "--target", 11)
    assert done.returncode == 1 and not (plan.parent / "logs").exists()
    assert "leave out --stop_at_target" in done.stderr


@pytest.mark.parametrize("line, option", [("a: --seed 5", []), ("a:", ["--run_id=x"]),
                                          ("a: --log-dir=x", [])])
def test_what_each_run_is_given_here_is_not_for_the_plan(plan, line, option):
    plan.write_text(line)
    done = screen(plan, *option)
    assert done.returncode == 1 and not (plan.parent / "logs").exists()
    assert "which each run has of its own here" in done.stderr


def test_a_plan_that_is_not_there_is_missed(tmp_path):
    done = screen(tmp_path / "none")
    assert done.returncode == 2 and "none; it comes first" in done.stderr


def test_a_run_that_fails_leaves_the_others_alone(plan):
    plan.write_text("control:\nbad: --head_lr 1e38\n" + PLAN.splitlines()[2])
    done = screen(plan, "--per_gpu", 2)
    assert done.returncode == 1
    assert "bad-seed1337: ended with exit status 1" in done.stdout
    assert re.search(r"^\| `qk_norm`: rms -> none \|", done.stdout, re.MULTILINE)


def test_without_a_run_that_ended_well_there_is_no_table(plan):
    plan.write_text("control: --head_lr 1e38\n")
    done = screen(plan)
    assert done.returncode == 1
    assert "no table: not one run has ended well" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_waits_for_its_turn_before_its_clock_starts(plan):
    plan.write_text("control:\n")
    log = plan.parent / "logs" / "control-seed1337.txt"
    log.parent.mkdir()
    with open(log.with_name(".turn-cpu"), "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        process = start(plan)
        wait_for(process, lambda: log.exists() and "\nwarm-up: none\n" in log.read_text())
        time.sleep(1.5)
        assert "\nstep:0/2 " not in log.read_text() and process.poll() is None
    process.communicate(timeout=60)
    assert "\nstep:2/2 val_loss:" in log.read_text()
    seconds = int(re.search(r"^step:2/2 val_loss:\S+ train_time:(\d+)ms", log.read_text(),
                            re.MULTILINE)[1]) / 1000
    assert seconds < 1.5


def test_a_screening_runs_once_and_when_stopped_stops_its_runs_and_keeps_what_is_done(plan):
    plan.write_text("control:\nlong: --train_steps 400 --model_dim 256\n")
    process = start(plan)
    long = plan.parent / "logs" / "long-seed1337.txt"
    wait_for(process, lambda: long.exists() and "\nstep:1/400 " in long.read_text())
    again = screen(plan)
    assert again.returncode == 1 and "is being run in" in again.stderr
    os.kill(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "control-seed1337: val_loss" in out
    assert "stopped by SIGTERM" in long.with_suffix(".cut-off").read_text()
    assert "step:2/2 val_loss:" in long.with_name("control-seed1337.txt").read_text()
