"""./run.sh attempt: several seeds, checked, compared, and put into a record folder."""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, wait_for
from record_logs import BY_CORE, SOURCE, our_log, step_lines, write_logs
from test_commands import TINY, environment

from attempt import offer_folder  # isort: skip  records/ is on the path from here on
from check import check  # isort: skip
from logs import read_logs  # isort: skip

SHORT = [option for option in TINY if not option.startswith("--run_id")]
LONGER = [*SHORT, "--train_steps=400", "--model_dim=256"]
WHOLE = [*SHORT, "--val_tokens=16384", "--val_batch_size=4096"]  # as the track asks for


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """What a run needs of this repository, so that nothing is written into it."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("train_gpt.py", "run.sh", "requirements.txt", "data", "records"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns(
                "20*", "*10B", "__pycache__"))
        else:
            shutil.copy(source, folder / name)
    return folder


def attempt(checkout: Path, *options, **variables) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(checkout / "run.sh"), "attempt", *map(str, options)], cwd=checkout, text=True,
        env=environment(**variables), capture_output=True, timeout=240, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def two_runs(checkout):
    """A finished attempt after a baseline run of the same machine."""
    baseline = subprocess.run(
        ["bash", "run.sh", "baseline", *SHORT, "--run_id=base"], cwd=checkout, env=environment(),
        capture_output=True, text=True, timeout=240)
    assert baseline.returncode == 0, baseline.stderr
    return attempt(checkout, "-n", 2, "--run_id=two", "--seed=5", "--name=Unproved", "--by=Ada",
                   "--description=A tiny model", *SHORT)


def test_each_run_has_its_seed_and_its_log(checkout, two_runs):
    for seed in (5, 6):
        log = (checkout / "logs" / f"two-seed{seed}.txt").read_text()
        assert f"\nhyperparameter seed: {seed}\n" in log and "\nstep:2/2 val_loss:" in log
        assert "\nhyperparameter log_dir: logs\n" in log  # and not where this person's folder is


def test_the_rules_are_checked_and_the_status_says_that_it_is_no_record(two_runs):
    assert re.search(r"^two-seed6\.txt +6 +2 +512 ", two_runs.stdout, re.MULTILINE)
    assert re.search(r"^marks +fail +two-seed5\.txt: not a record: ", two_runs.stdout, re.MULTILINE)
    assert "verdict: not a record of sample: " in two_runs.stdout
    assert two_runs.returncode == 1


def test_it_is_compared_with_the_baseline_of_this_machine(two_runs):
    assert re.search(r"^baseline +base\.txt ", two_runs.stdout, re.MULTILINE)
    assert re.search(r"^mine +two-seed5\.txt ", two_runs.stdout, re.MULTILINE)
    assert re.search(r"mean time .* as fast$", two_runs.stdout, re.MULTILINE)
    assert "NOT COMPARABLE" not in two_runs.stdout


def test_the_folder_is_filled_in_and_a_failure_goes_to_the_negative_ones(checkout):
    done = attempt(checkout, "-n", 1, "--run_id=good", "--seed=5", "--name=Tiny", "--by=Ada",
                   "--description=A tiny model", *WHOLE)
    [folder] = (checkout / "records" / "negative").iterdir()
    record = json.loads((folder / "record.json").read_text())
    assert folder.name == f"{record['date']}_Tiny" and record["contributors"] == ["Ada"]
    assert record["description"] == "A tiny model" and record["runs_attempted"] == 1
    assert record["logs"] == ["good-seed5.txt"]
    assert (folder / "train_gpt.py").read_text() == (checkout / "train_gpt.py").read_text()
    for name in record["logs"]:
        assert (folder / name).read_bytes() == (checkout / "logs" / name).read_bytes()
    assert f"made {folder}" in done.stdout


def test_logs_that_prove_nothing_make_no_folder(checkout, two_runs):
    assert "error: check.py does not pass the logs:\n    val tokens: " in two_runs.stderr
    assert not list((checkout / "records").glob("*/*_Unproved"))


@pytest.mark.parametrize("log, words", [
    (our_log(), "log0.txt --name NAME --description 'THE IDEA IN A LINE' --by 'YOUR NAME' "
                "--attempted 1\n"),
    (our_log(lines=step_lines(steps=40, final=4.0)), "--attempted 1 --negative\n"),
    (our_log(val_tokens=524_288), "so that they have no record folder"),
    (our_log(**BY_CORE), "--attempted 1\n"),
    (our_log(**BY_CORE, marks="not a record: data_path is x"), "so that they have no record")])
def test_without_a_name_and_a_terminal_the_command_for_the_folder_is_shown_if_there_can_be_one(
        monkeypatch, capsys, tmp_path, log, words):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    runs = read_logs(write_logs(tmp_path, log))
    offer_folder(check(runs), argparse.Namespace(name=None, description=None, by=None, n=1))
    out = capsys.readouterr().out
    assert words in out and ("record.py" in out) == ("--attempted" in words)


def test_a_failing_seed_is_told_and_the_others_count(checkout):
    (checkout / "logs").mkdir(exist_ok=True)
    (checkout / "logs" / "taken-seed7.txt").write_text("in the way")
    done = attempt(checkout, "-n", 2, "--run_id=taken", "--seed=7", *SHORT)
    assert "error: seed 7 ended with exit status 1" in done.stderr
    assert "taken-seed8.txt" in done.stdout and done.returncode == 1
    assert (checkout / "logs" / "taken-seed7.txt").read_text() == "in the way"


def test_without_any_finished_run_there_is_an_error(checkout):
    done = attempt(checkout, "-n", 1, "--no_such_option", "3")
    assert done.returncode == 1 and "did you mean" not in done.stdout
    assert "no run ended well" in done.stderr and "--no_such_option" in done.stderr


@pytest.mark.parametrize("options, words", [
    (["-n", "0"], "-n must be at least 1, got 0"), (["--parallel"], "--parallel needs GPUs")])
def test_wrong_options_are_refused_before_anything_runs(checkout, options, words):
    done = attempt(checkout, *options, *SHORT)
    assert done.returncode == 2 and words in done.stderr


@pytest.mark.parametrize("answers", [[EOFError], ["Wider", KeyboardInterrupt]])
def test_no_answer_makes_no_folder_and_shows_the_command_for_it(monkeypatch, capsys, tmp_path,
                                                                answers):
    def answer(question):
        found = answers.pop(0)
        if isinstance(found, str):
            return found
        raise found

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    runs = read_logs(write_logs(tmp_path, our_log()))
    offer_folder(check(runs), argparse.Namespace(name=None, description=None, by=None, n=1))
    assert f"records/record.py {tmp_path / 'log0.txt'} --name NAME" in capsys.readouterr().out


@pytest.fixture
def pretended(checkout, tmp_path):
    """An attempt with a stand-in for run.sh: each run notes its options, and its log is `text`."""
    folder = tmp_path / "checkout"
    shutil.copytree(checkout / "records", folder / "records")
    (folder / "run.sh").write_text(
        '#!/bin/bash\necho "$*" >> options\nmkdir -p logs\n'
        'while [ "$1" != --run_id ]; do shift; done\ncp log "logs/$2.txt"\n')
    (folder / "run.sh").chmod(0o755)
    (folder / "train_gpt.py").write_text(SOURCE)

    def run(text: str, *options) -> tuple[subprocess.CompletedProcess, str]:
        (folder / "log").write_text(text)
        done = subprocess.run(
            [sys.executable, str(folder / "records" / "attempt.py"), "-n", "1", *options],
            text=True, capture_output=True, timeout=60, cwd=folder, stdin=subprocess.DEVNULL)
        return done, (folder / "options").read_text()

    run.folder = folder
    return run


def test_sound_runs_on_a_track_of_core_are_no_failure_and_told_how_to_go_on(pretended):
    done, options = pretended(our_log(**BY_CORE), "--track=time-to-gpt2", "--run_id=a", "--by=Ada",
                              "--name=Early", "--depth=24")
    assert done.returncode == 0 and not done.stderr
    assert options.startswith("train --save_every -1 --depth=24 --track time-to-gpt2 --seed 1337 ")
    place = pretended.folder / "logs" / "a-seed1337"
    assert f"\npython evals/core.py {place} --json {place}.core.json\n" in done.stdout
    assert f"records/record.py {place}.txt --name Early --description 'THE IDEA" in done.stdout
    assert "--by Ada --attempted " in done.stdout
    assert "negative" not in done.stdout
    assert not list((pretended.folder / "records").glob("*/*_Early"))


def test_nobody_is_asked_for_a_folder_that_has_to_wait_for_core(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail(question))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    runs = read_logs(write_logs(tmp_path, our_log(1, **BY_CORE), our_log(2, **BY_CORE)))
    offer_folder(check(runs), argparse.Namespace(name=None, description=None, by=None, n=2))
    assert len(re.findall("^python evals/core.py ", capsys.readouterr().out, re.MULTILINE)) == 2


def test_runs_on_a_track_of_core_that_fail_another_rule_are_a_failure(pretended):
    mark = "not a record: data_path is data/sample instead of data/fineweb10B"
    done, _ = pretended(our_log(**BY_CORE, marks=mark), "--track=time-to-gpt2")
    assert done.returncode == 1 and "evals/core.py" in done.stdout  # as the reason of `target`
    assert "\npython evals/core.py" not in done.stdout and mark in done.stdout


def test_only_where_core_is_the_claim_the_end_is_saved(pretended):
    done, options = pretended(our_log(), "--track", "single-gpu")
    assert done.returncode == 0 and "save_every" not in options and "CORE" not in done.stdout


def test_an_attempt_by_core_leaves_a_model_to_measure_unless_told_otherwise(checkout):
    options = [*SHORT, "--track=time-to-gpt2", "--recipe=sample", "--data_path=data/sample"]
    done = attempt(checkout, "-n", 1, "--run_id=core", *options)
    assert (checkout / "logs" / "core-seed1337" / "step_000002" / "state.json").exists()
    assert re.search(r"^marks +fail +core-seed1337.txt: not a record: data_path is data/sample ",
                     done.stdout, re.MULTILINE) and done.returncode == 1
    attempt(checkout, "-n", 1, "--run_id=none", *options, "--save-every=0")
    assert (checkout / "logs" / "none-seed1337.txt").exists()
    assert not (checkout / "logs" / "none-seed1337").exists()


def test_ctrl_c_stops_all_seeds_and_names_the_logs(checkout):
    process = subprocess.Popen(
        ["bash", str(checkout / "run.sh"), "attempt", "-n", "3", "--run_id=stop", *LONGER],
        cwd=checkout, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True)
    log = checkout / "logs" / "stop-seed1337.txt"
    wait_for(process, lambda: log.exists() and "\nstep:1/" in log.read_text())
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"stopped; logs so far: {log}\n" in errors
    assert log.read_text().rstrip().endswith("stopped by Ctrl-C")
    assert not (checkout / "logs" / "stop-seed1338.txt").exists()


def test_side_by_side_each_run_has_a_gpu_of_its_own(checkout, tmp_path):
    """With a stand-in for run.sh and two pretended GPUs: what each run is given."""
    folder = tmp_path / "checkout"
    shutil.copytree(checkout / "records", folder / "records")
    (folder / "run.sh").write_text(
        '#!/bin/bash\nsleep 1\nwhile [ $# -gt 0 ]; do [ "$1" = --run_id ] && id=$2; shift; done\n'
        'echo "$CUDA_VISIBLE_DEVICES $(date +%s.%N)" > "$OLDPWD/$id"\necho hello\nexit 1\n')
    (folder / "run.sh").chmod(0o755)
    (folder / "torch.py").write_text(
        "class cuda:\n    device_count = staticmethod(lambda: 2)\n")
    done = subprocess.run(
        [sys.executable, str(folder / "records" / "attempt.py"), "-n", "4", "--parallel",
         "--run_id=run"], text=True, capture_output=True, timeout=60, cwd=folder,
        env=environment(PYTHONPATH=str(folder), CUDA_VISIBLE_DEVICES="3,5", OLDPWD=str(tmp_path)))
    assert done.returncode == 1 and "no run ended well" in done.stderr
    gpus = {seed: (tmp_path / f"run-seed{seed}").read_text().split()[0]
            for seed in (1337, 1338, 1339, 1340)}
    assert sorted(gpus.values()) == ["3", "3", "5", "5"] and gpus[1337] != gpus[1338]
    times = sorted(float((tmp_path / f"run-seed{seed}").read_text().split()[1]) for seed in gpus)
    assert times[1] - times[0] < 0.7 < times[2] - times[1]  # two at a time
    assert (folder / "logs" / "run-seed1337.console").read_text() == "hello\n"
