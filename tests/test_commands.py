"""run.sh: its commands, what it hands on, and the Python it finds or makes."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

TINY = (
    "--track=sample --model_dim=16 --num_heads=2 --num_layers=2 --value_embeddings=0 "
    "--row_length=64 --max_document_length=64 --batch_size=256 --device_batch_size=128 "
    "--val_batch_size=256 --val_tokens=512 --train_steps=2 --val_loss_every=0 --window_start=128 "
    "--window_end=128 --kernel_warmup=false --run_id=run"
).split()
LAUNCHER_VARIABLES = ("NPROC", "NNODES", "NODE_RANK", "RDZV_ENDPOINT", "RDZV_ID", "RDZV_BACKEND",
                      "MASTER_ADDR", "MASTER_PORT")


def environment(path_first: Path | None = None, **variables) -> dict[str, str]:
    """This one on a CPU, with the Python that runs the tests, or `path_first`, first on PATH."""
    first = path_first or Path(sys.executable).parent
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    path = os.pathsep.join([str(first), os.environ["PATH"]])
    settings = {"PATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return kept | settings | variables


def start(*argv, folder: Path = ROOT, cwd: Path = ROOT, **env) -> subprocess.Popen:
    return subprocess.Popen(
        ["bash", str(folder / "run.sh"), *map(str, argv)], cwd=cwd, env=environment(**env),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )


def finish(*processes: subprocess.Popen, timeout=120) -> list[subprocess.CompletedProcess]:
    """Wait for processes that need each other: where one fails, the others are stopped soon."""
    deadline = time.monotonic() + timeout
    while None in (states := [process.poll() for process in processes]):
        if any(states):
            deadline = min(deadline, time.monotonic() + 10)
        if time.monotonic() > deadline:
            for process in processes:
                process.terminate()  # torchrun then ends its own processes
            break
        time.sleep(0.05)
    done = []
    for process in processes:
        out, err = process.communicate(timeout=60)
        done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return done


def run(*argv, **where) -> subprocess.CompletedProcess:
    [done] = finish(start(*argv, **where))
    return done


def hyperparameters(log: str) -> dict[str, str]:
    lines = [line for line in log.splitlines() if line.startswith("hyperparameter ")]
    return dict(line.removeprefix("hyperparameter ").split(": ", 1) for line in lines)


# -----------------------------------------------------------------------------
# Commands


@pytest.mark.parametrize("word", ["help", "-h", "--help"])
def test_help_lists_the_commands(word, tmp_path):
    done = run(word, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    for command in ("baseline", "attempt", "submit", "check", "test", "help"):
        assert f"./run.sh {command} " in done.stdout
    assert "NPROC" in done.stdout and "train_gpt.py -h" in done.stdout


def test_the_check_command_has_a_help_of_its_own():
    done = run("check", "-h")
    assert done.returncode == 0 and "Pre-flight" in done.stdout and "--matrix_lr" not in done.stdout


@pytest.mark.parametrize("processes, options, problem", [
    ("1", ["--device_batch_size", "4096"], "does not divide the 2048 tokens"),
    ("3", [], "which 3 ranks cannot share")])
def test_the_check_command_sees_a_batch_that_cannot_be_shared_out(processes, options, problem):
    done = run("check", *options, NPROC=processes)
    assert done.returncode == 1 and problem in done.stdout and "not ready yet" in done.stdout


@pytest.mark.parametrize("word", ["trian", "train_gpt.py", "-x"])
def test_an_unknown_command_is_refused_with_the_known_ones(word):
    done = run(word)
    assert done.returncode == 2 and done.stdout == ""
    assert f"'{word}'" in done.stderr and "./run.sh baseline" in done.stderr


def test_the_test_command_hands_its_arguments_to_pytest(tmp_path):
    done = run("test", "--co", "tests/test_commands.py", "-k", "lists_the", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "test_help_lists_the_commands[-h]" in done.stdout
    assert "test_an_unknown" not in done.stdout
    assert run("test", "--co", "tests/no_such_file.py").returncode == 4  # as pytest says


def test_options_of_a_wrong_name_reach_train_gpt_and_its_status_comes_back():
    done = run("--track", "sample", "--train_step", "3")
    assert done.returncode == 2
    assert "did you mean --train_steps" in done.stderr


def test_an_error_of_the_run_is_the_error_of_the_command(tmp_path):
    done = run("train", *TINY, f"--data_path={tmp_path / 'none'}", f"--log_dir={tmp_path}")
    assert done.returncode == 1
    assert "error: no train shards" in done.stderr


def test_the_baseline_command_trains_the_baseline_of_this_machine(tmp_path):
    """From any folder; an option of the user's wins over the recipe's."""
    options = [option for option in TINY if "track" not in option]  # found: there is no GPU
    done = run("baseline", *options, "--adam_eps=1e-7", f"--log_dir={tmp_path}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    values = hyperparameters((tmp_path / "run.txt").read_text())
    assert (values["track"], values["recipe"]) == ("sample", "sample-baseline")
    assert (values["optimizer"], values["activation"]) == ("adam", "gelu")
    assert (values["train_steps"], values["adam_eps"]) == ("2", "1e-07")
    assert "step:2/2 val_loss" in done.stdout
    assert "1 ranks" in (tmp_path / "run.txt").read_text()


# -----------------------------------------------------------------------------
# Processes and machines


@pytest.mark.parametrize("number", ["0", "two", "-1"])
def test_a_number_of_processes_that_is_none_is_refused(number):
    done = run(*TINY, NPROC=number)
    assert done.returncode == 2 and f"NPROC must be a number of processes, got '{number}'" in (
        done.stderr)


@pytest.mark.parametrize("number", ["0", "two", "2:", "1:b"])
def test_a_number_of_machines_that_is_none_is_refused(number):
    done = run(*TINY, NNODES=number)
    assert done.returncode == 2 and f"NNODES must be a number of machines, or FEWEST:MOST, got " \
        f"'{number}'" in done.stderr


def test_a_series_of_sizes_names_one_for_a_cpu_where_there_is_no_gpu():
    done = run("miniseries")
    assert done.returncode == 1 and "--recipes sample-baseline,sample-record" in done.stderr


def test_a_series_of_sizes_has_its_own_lengths():
    done = run("miniseries", "--recipes", "sample-record", "--depths", "1", "--train_steps", "2")
    assert done.returncode == 1 and "--train_steps would be the same for all runs" in done.stderr


@pytest.mark.parametrize("option, instead", [
    ("--depth=4", "--depths"), ("--target-param-data-ratio=2", "--ratios"),
    ("--recipe=record", "--recipes")])
def test_a_series_refuses_what_it_sets_itself(option, instead):
    done = run("miniseries", "--recipes", "sample-record", "--depths", "1", option)
    assert done.returncode == 1 and f"name them with {instead}\n" in done.stderr


def test_nproc_is_the_number_of_processes(tmp_path):
    done = run(*TINY, f"--log_dir={tmp_path}", NPROC="2")
    assert done.returncode == 0, done.stderr
    assert "\ntokens per step: 256 = 2 ranks x 1 " in (tmp_path / "run.txt").read_text()
    assert done.stdout.count("step:2/2 val_loss") == 1


def run_two_machines(folder: Path, *others_options: str) -> list[subprocess.CompletedProcess]:
    """run.sh twice, as on two machines; the second with more options."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    where = dict(NNODES="2", NPROC="1", MASTER_ADDR="localhost", MASTER_PORT=str(port))
    return finish(*(
        start(*TINY, f"--log_dir={folder / str(rank)}", *more, NODE_RANK=str(rank), **where)
        for rank, more in enumerate([(), others_options])))


def test_two_machines_train_one_model(tmp_path):
    done = run_two_machines(tmp_path)
    assert [machine.returncode for machine in done] == [0, 0], done[0].stderr + done[1].stderr
    [log] = tmp_path.glob("*/run.txt")  # one of them logs
    assert log.parent.name == "0"
    assert "\ntokens per step: 256 = 2 ranks x 1 " in log.read_text()
    assert "step:2/2 val_loss" in done[0].stdout and "step:2/2" not in done[1].stdout


def test_machines_that_were_started_for_different_runs_do_not_train_together(tmp_path):
    done = run_two_machines(tmp_path, "--seed=7", "--train_steps=3")
    assert [machine.returncode for machine in done] == [1, 1]
    assert ("rank 1 was started for another run than rank 0: seed is 7 instead of 1337; "
            "train_steps is 3 instead of 2; start all machines with the same options") in (
        done[0].stderr)
    assert "rank 1 was started for another run" in done[1].stderr
    assert not list(tmp_path.glob("*/run.txt"))


@pytest.mark.parametrize("last_token, expected", [
    (None, "error: where rank 1 is: no train shards "), (b"\0\0", "the data are other shards")])
def test_all_machines_have_to_have_the_same_data(last_token, expected, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(ROOT / "data/sample", folder)
    [shard] = folder.glob("*_train_*.bin")
    if last_token is None:
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-2] + last_token)
    done = run_two_machines(tmp_path, f"--data_path={folder}")
    assert [machine.returncode for machine in done] == [1, 1] and expected in done[0].stderr


# -----------------------------------------------------------------------------
# Pythons, GPUs and data, all pretended

STUB = """#!/usr/bin/env bash
# Notes its arguments; what it can is in files of its folder, and a virtual environment can all.
here=$(cd "$(dirname "$0")" && pwd)
echo "$(basename "$here")/$(basename "$0") $*" >> "$CALLS"
case "$1 ${2:-}" in
    "- ") cat > /dev/null; [ -e "$here/has_packages" ]; exit ;;
    "-c import torch"*) echo "$GPUS"; exit ;;
    "-c "*) [ ! -e "$here/is_old" ]; exit ;;
    "-V ") echo "Python 3.9.1"; exit ;;
    "-m venv")
        [ ! -e "$here/no_venv" ] || exit 1
        mkdir -p "$3/bin"
        cp "$0" "$3/bin/python"
        touch "$3/bin/has_packages"
        exit ;;
esac
case "$1" in data/*) echo "WORLD_SIZE=$WORLD_SIZE" >> "$CALLS" ;; esac
if [ "$1 $2" = "data/check.py --advise" ]; then echo "$ADVICE"; [ ! -e "$here/is_unfit" ]; exit; fi
[ ! -e "$here/fails" ] || exit 7
for name in NNODES NODE_RANK RDZV_ENDPOINT RDZV_ID RDZV_BACKEND MASTER_ADDR MASTER_PORT; do
    variable=PET_$name
    [ -z "${!variable:-}" ] || echo "$variable=${!variable}" >> "$CALLS"
done
timeout=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-}
[ -z "$timeout" ] || echo "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$timeout" >> "$CALLS"
"""


@pytest.fixture
def pretended(tmp_path):
    """Runs a copy of run.sh with a python3 that only notes its calls.

    `facts` are has_packages, is_old, no_venv, is_unfit or fails. The result also has `calls`, the
    calls that did something: those that only look at the Python or the GPUs are left out.
    """
    folder, bin_folder, calls = tmp_path / "repo", tmp_path / "bin", tmp_path / "calls"
    for made in (folder, bin_folder):
        made.mkdir()
    for name in ("run.sh", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    for name in ("python", "python3", *(f"python3.{minor}" for minor in range(11, 20))):
        (bin_folder / name).write_text(STUB)
        (bin_folder / name).chmod(0o755)

    looks = re.compile(r"\S+ (- .*|-|-c .*|-V|data/check.py --advise.*)|WORLD_SIZE=.*")

    def run_copy(*argv, facts=("has_packages",), gpus=0, advice="", **env):
        for path in bin_folder.glob("*_*"):
            path.unlink()
        for fact in facts:
            (bin_folder / fact).touch()
        calls.write_text("")
        done = run(*argv, folder=folder, path_first=bin_folder, CALLS=str(calls), GPUS=str(gpus),
                   ADVICE=advice, **env)
        noted = calls.read_text().splitlines()
        done.calls = [line for line in noted if not looks.fullmatch(line)]
        done.world_sizes = [line.split("=")[1] for line in noted if line.startswith("WORLD_SIZE=")]
        return done

    run_copy.folder = folder
    return run_copy


def test_a_python_with_the_packages_is_used_as_it_is(pretended):
    done = pretended("--track", "sample", "--seed", "3")
    assert done.returncode == 0, done.stderr
    assert done.calls == ["bin/python3 train_gpt.py --track sample --seed 3"]
    assert not (pretended.folder / ".venv").exists()


def test_a_python_without_the_packages_leads_to_a_venv_that_is_made_once(pretended):
    done = pretended("--track", "sample", facts=())
    assert done.returncode == 0, done.stderr
    make, install, train = done.calls
    assert make == "bin/python3 -m venv .venv"
    assert install.startswith("bin/python -m pip install ")
    assert install.endswith("-r requirements.txt")
    assert train == "bin/python train_gpt.py --track sample"
    assert (pretended.folder / ".venv" / "bin" / "python").exists()
    assert ".venv" in done.stderr

    again = pretended("--track", "sample", facts=())
    assert again.calls == ["bin/python train_gpt.py --track sample"]
    assert again.stderr == ""


def test_a_python_that_is_too_old_is_an_error_with_its_version(pretended):
    done = pretended("--track", "sample", facts=("is_old",))
    assert done.returncode == 1
    assert "3.11" in done.stderr and "Python 3.9.1" in done.stderr
    assert not any("train_gpt.py" in call for call in done.calls)


def test_a_venv_that_cannot_be_made_is_an_error_with_what_to_install(pretended):
    done = pretended(facts=("no_venv",))
    assert done.returncode == 1
    assert "python3-venv" in done.stderr
    assert not any("train_gpt.py" in call for call in done.calls)


def test_the_status_of_the_run_is_the_status_of_the_command(pretended):
    assert pretended("--track", "sample", facts=("has_packages", "fails")).returncode == 7


def test_without_a_gpu_the_sample_track_runs_without_a_download(pretended):
    assert pretended().calls == ["bin/python3 train_gpt.py"]
    assert pretended("baseline").calls == [
        "bin/python3 train_gpt.py --recipe sample-baseline"]


def test_with_gpus_the_single_gpu_track_gets_its_data_and_one_process(pretended):
    done = pretended("--seed=1", gpus=8)
    assert done.calls == [
        "bin/python3 data/cached_fineweb10B.py --seed=1",
        "bin/python3 train_gpt.py --seed=1",
    ]
    done = pretended("baseline", "--seed=1", gpus=1)
    assert done.calls == [
        "bin/python3 data/cached_fineweb10B.py --recipe baseline --seed=1",
        "bin/python3 train_gpt.py --recipe baseline --seed=1",
    ]


@pytest.mark.parametrize("track", [("--track", "gpt2-small"), ("--track=gpt2-small",)])
def test_other_tracks_use_every_gpu(pretended, track):
    done = pretended(*track, gpus=8)
    download, train = done.calls
    options = " ".join(track)
    assert download == f"bin/python3 data/cached_fineweb10B.py {options}"
    assert train == ("bin/python3 -m torch.distributed.run --standalone --nproc_per_node=8 "
                     f"train_gpt.py {options}")


def test_what_the_gpus_memory_asks_for_comes_before_the_options_of_the_user(pretended):
    done = pretended("--device_batch_size=9", gpus=1, advice="--device_batch_size 5 --x 6")
    assert done.calls[-1] == (
        "bin/python3 train_gpt.py --device_batch_size 5 --x 6 --device_batch_size=9")
    assert "--device_batch_size 5 --x 6" in done.stdout
    assert pretended(gpus=1).stdout == ""


def test_a_folder_of_ones_own_data_is_not_downloaded_into(pretended):
    for option in (["--data_path", "mine"], ["--data-path=mine"]):
        assert pretended(*option, gpus=1).calls == [
            f"bin/python3 train_gpt.py {' '.join(option)}"]


def test_a_failing_download_stops_before_training(pretended):
    done = pretended(gpus=1, facts=("has_packages", "fails"))
    assert done.returncode == 7
    assert [call.split()[1] for call in done.calls] == ["data/cached_fineweb10B.py"]


def test_what_these_gpus_cannot_run_is_not_downloaded_for(pretended):
    done = pretended(gpus=3, facts=("has_packages", "is_unfit"))
    assert done.returncode == 1 and not done.calls


def test_the_variables_of_several_machines_reach_torchrun(pretended):
    variables = dict(NNODES="4", NODE_RANK="3", RDZV_ENDPOINT="host:29400", RDZV_ID="id",
                     RDZV_BACKEND="c10d", MASTER_ADDR="addr", MASTER_PORT="29501")
    done = pretended("--track=gpt2-small", "--data_path=mine", gpus=8, **variables)
    [train, *seen] = done.calls
    assert train == ("bin/python3 -m torch.distributed.run --nproc_per_node=8 "
                     "train_gpt.py --track=gpt2-small --data_path=mine")
    assert sorted(seen) == sorted(f"PET_{name}={value}" for name, value in variables.items())
    assert "waiting for all machines (NNODES=4) at host:29400" in done.stderr


@pytest.mark.parametrize("options, seconds", [([], []), (["--save_on_exit"], ["300"])])
def test_torchrun_gives_time_to_save_on_exit(pretended, options, seconds):
    done = pretended("--track=gpt2-small", "--data_path=mine", *options, gpus=2)
    assert [line.split("=")[1] for line in done.calls[1:]] == seconds


@pytest.mark.parametrize("track, variables, world_size", [
    ("single-gpu", {}, 1), ("single-gpu", dict(NPROC="2"), 2), ("gpt2-small", {}, 8),
    ("gpt2-small", dict(NNODES="3"), 24), ("gpt2-small", dict(NNODES="2:4", NPROC="4"), 8)])
def test_download_and_advice_know_of_all_processes(pretended, track, variables, world_size):
    # By them they choose the recipe, as the training will.
    done = pretended("--track", track, gpus=8, **variables)
    assert done.returncode == 0, done.stderr
    assert done.world_sizes == [str(world_size)] * 2
    assert pretended("check", "--track", track, gpus=8, **variables).world_sizes == [
        str(world_size)]


def test_the_check_command_hands_its_arguments_on(pretended):
    assert pretended("check", "--track", "sample").calls == [
        "bin/python3 data/check.py --track sample"]
