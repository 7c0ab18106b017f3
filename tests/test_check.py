"""Is it a record? Each rule of records/check.py against logs that break it, one way at a time."""

import hashlib
import json
import math
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT
from record_logs import (
    BY_CORE,
    SOURCE,
    our_log,
    public_log,
    shard_lines,
    step_lines,
    write_core,
    write_logs,
)

import train_gpt

import check as checker  # isort: skip  records/ is on the path from here on
from check import CANNOT_TELL, FAIL, PASS, TRACKS, check  # isort: skip
from logs import LogError, read_logs  # isort: skip

SEEDS = (1337, 1338, 1339)


def check_texts(folder, *texts, track=None, script=SOURCE):
    return check(read_logs(write_logs(folder, *texts, script=script)), track)


def run_check(*arguments):
    return subprocess.run([sys.executable, ROOT / "records" / "check.py", *map(str, arguments)],
                          capture_output=True, text=True, timeout=60)


def assert_only(report, status, rule, reason):
    """This rule alone does not pass, and its reason says what is wrong."""
    wrong = {name: finding for name, finding in report.findings.items() if finding.status != PASS}
    assert list(wrong) == [rule], wrong
    assert wrong[rule].status == status
    assert re.search(reason, wrong[rule].reason), wrong[rule].reason
    assert not report.is_record
    assert rule in report.verdict and report.verdict.startswith("not ")


# -----------------------------------------------------------------------------
# Records


def test_three_good_logs_are_a_record(tmp_path):
    report = check_texts(tmp_path, *(our_log(seed) for seed in SEEDS))
    assert report.is_record and report.is_sound, report.findings
    assert report.verdict.startswith("a record of single-gpu: mean 20.200 s")
    assert report.findings["target"].reason == (
        "n 3, mean val_loss 3.37580, sample standard deviation 0.00010; target 3.3821")
    assert "one-sided t-test, n 3" in report.findings["significance"].reason
    assert report.findings["training tokens"].reason == (
        "15,728,640 training tokens; allowed: 5,000,000,000")


def test_one_log_is_a_record_by_a_z_test_with_a_stated_sigma(tmp_path):
    report = check_texts(tmp_path, our_log())
    assert report.is_record, report.findings
    # (3.3821 - 3.3757) / 0.0019 = 3.37 standard deviations
    assert "p 0.000378" in report.findings["significance"].reason
    assert "z-test with sigma 0.0019, n 1" in report.findings["significance"].reason


@pytest.mark.parametrize("unit", ["ms", "s", "mixed"])
def test_the_unit_of_the_times_does_not_matter(tmp_path, unit):
    texts = [our_log(seed, step_lines(steps=2000, unit=unit, final=3.37 + seed * 1e-6,
                                      step_time=0.51237), train_steps=2000) for seed in SEEDS]
    report = check_texts(tmp_path, *texts)
    assert report.is_record, report.findings


@pytest.mark.parametrize("name", ["seed", "run_id", "log_dir", "log_wandb"])
def test_runs_of_a_record_may_differ_in_seed_and_names(tmp_path, name):
    texts = our_log(1), our_log(2, **({name: "other"} if name != "seed" else {}))
    assert check_texts(tmp_path, *texts).is_record


def test_three_joined_logs_are_the_same_record(tmp_path):
    assert check_texts(tmp_path, "".join(our_log(seed) for seed in SEEDS)).is_record


def test_the_script_may_stand_one_folder_up(tmp_path):
    write_logs(tmp_path)
    paths = write_logs(tmp_path / "logs", our_log(), script=None)
    assert check(read_logs(paths)).is_record


def test_our_own_measurements_are_sound_but_no_record(tmp_path):
    source = (ROOT / "records/webmix/2026-11-21_Modern").iterdir()
    report = check(read_logs(sorted(p for p in source if p.suffix == ".txt")), "webmix")
    assert report.is_sound and not report.is_record
    assert report.verdict.startswith("a sound measurement; webmix has no target")


def test_the_sample_runs_of_this_repository_are_a_record_also_one_alone():
    folder = ROOT / "records/sample/2026-11-21_EightSeeds"
    together, alone = check(read_logs([folder])), check(read_logs([folder / "sample-seed1337.txt"]))
    assert together.track_name == "sample" and together.is_record and alone.is_record
    assert "t-test, n 8" in together.findings["significance"].reason
    assert "z-test with sigma" in alone.findings["significance"].reason


def test_steps_of_uneven_length_are_not_taken_for_validations(tmp_path):
    """On a busy machine: times that vary as on the sample track, with three validations."""
    generator = np.random.default_rng(0)

    def uneven(seed):
        steps = np.cumsum(generator.lognormal(0, 0.4, 40))
        return replace_times(step_lines(), lambda step, _: steps[step - 1] if step else 0.0)

    for seed in range(20):
        report = check_texts(tmp_path / str(seed), our_log(seed, lines=uneven(seed)))
        assert report.findings["validation untimed"].status == PASS, report.findings


# -----------------------------------------------------------------------------
# One fault in the second of three logs. (rule, status, reason, what is wrong with the log)


def with_lines(change, **settings):
    """A log whose step lines `change` has edited, in place or by returning others."""
    lines = step_lines(**dict(final=3.3755) | settings)
    return dict(lines=change(lines) or lines)


def replace_times(lines, change):
    """The lines with change(step, seconds) as train_time, and a step_avg that fits."""
    def edit(line):
        step, time = (int(n) for n in re.match(r"step:(\d+)/.*train_time:(\d+)ms", line).groups())
        seconds = change(step, time / 1000)
        return re.sub(r"train_time.*", f"train_time:{1000 * seconds:.0f}ms "
                      f"step_avg:{1000 * seconds / max(1, step):.2f}ms", line)
    return [edit(line) for line in lines]


FAULTS = {
    "first steps missing": ("complete", FAIL, "its first line is of step 4",
                            with_lines(lambda lines: lines[4:])),
    "an error": ("complete", FAIL, "error: val_loss is nan at step 40",
                 dict(end="error: val_loss is nan at step 40")),
    "stopped": ("complete", FAIL, "stopped by SIGTERM", dict(end="stopped by SIGTERM")),
    "a damaged line": ("complete", FAIL, "a line cannot be read: 'step:9/40 train_ti'",
                       with_lines(lambda lines: lines.insert(9, "step:9/40 train_ti"))),
    "NaN on the way": ("finite", FAIL, "log1.txt: val_loss nan at step 20",
                       with_lines(lambda lines: [
                           re.sub(r"(step:20/40 val_loss:)\S+", r"\1nan", line)
                           for line in lines])),
    "infinity on the way": (
        "finite", FAIL, "val_loss inf at step 0",
        with_lines(lambda lines: [re.sub(r"(step:0/40 val_loss:)\S+", r"\1inf", line)
                                  for line in lines])),
    "same losses": ("independent", FAIL, "log1.txt and log0.txt have the same losses",
                    dict(seed=1338, lines=step_lines(final=3.3757))),
    "same seed": ("independent", FAIL, "seed 1337 was used 2 times",
                  dict(seed=1337, lines=step_lines(final=3.3761))),
    "other learning rate": ("settings", FAIL, "matrix_lr is 0.05 in log0.txt and 0.06 in log1.txt",
                            dict(matrix_lr=0.06)),
    "a setting more": ("settings", FAIL, "window is None in log0.txt and 5 in log1.txt",
                       dict(window=5)),
    "other length": ("settings", FAIL, "train_steps differs between the logs: 40 in 2, 50 in 1",
                     dict(train_steps=50)),
    "a step twice": ("clock", FAIL, "log1.txt: step 6 stands there twice",
                     with_lines(lambda lines: lines.insert(7, lines[6]))),
    "time goes back": ("clock", FAIL, "the time goes back at step 35",
                       with_lines(lambda lines: replace_times(
                           lines, lambda step, time: time - 1.1 * (step >= 35)))),
    "step_avg does not fit": (
        "clock", FAIL, r"at step 25 train_time is 12.630 s, but step_avg x steps is 10.",
        with_lines(lambda lines: [re.sub(r"(step:25/40 .*step_avg:).*", r"\g<1>400.00ms", line)
                                  for line in lines])),
    "time made smaller, step_avg forgotten": (
        "clock", FAIL, r"at step 40 train_time is 19.800 s, but step_avg x steps is 20.200 s",
        with_lines(lambda lines: [line.replace("train_time:20200", "train_time:19800")
                                  for line in lines])),
    "no step_avg": ("clock", CANNOT_TELL, "log1.txt has no step_avg on some lines",
                    with_lines(lambda lines: [re.sub(" step_avg.*", "", line) for line in lines])),
    "validation on the clock": (
        "validation untimed", FAIL, r"log1.txt: a validation takes as long as 0\.[89]\d steps",
        with_lines(lambda lines: None, validation_time=0.45)),
    "long validation on the clock": (
        "validation untimed", FAIL, r"a validation takes as long as 9\.\d\d steps",
        with_lines(lambda lines: None, validation_time=5.0)),
    "validation at every step": (
        "validation untimed", CANNOT_TELL, "no validation with enough lines of steps around it",
        with_lines(lambda lines: None, val_every=2)),
    "another shard": ("data", FAIL, "train data is fineweb_train_000003.bin where "
                      "fineweb_train_000002.bin should be",
                      dict(shards=[line.replace("000002", "000003") for line in shard_lines()])),
    "shards out of order": ("data", FAIL, "fineweb_train_000002.bin where fineweb_train_000001",
                            dict(shards=[shard_lines()[i] for i in (1, 0, 2)])),
    "a shard twice": ("data", FAIL, "fineweb_train_000001.bin where fineweb_train_000002",
                      dict(shards=[shard_lines()[i] for i in (0, 0, 2)])),
    "val shard trained on": ("data", FAIL, "fineweb_val_000000.bin where fineweb_train_000001",
                             dict(shards=[line.replace("fineweb_train_000001", "fineweb_val_000000")
                                          for line in shard_lines()])),
    "no val shard": ("data", FAIL, "val data is no shard where fineweb_val_000000.bin should be",
                     dict(shards=shard_lines()[:-1])),
    "other data": ("data", FAIL, "webmix_train_000001.bin where fineweb_train_000001",
                   dict(shards=shard_lines("webmix"))),
    "other content": ("data", FAIL, "log1.txt and log0.txt have other data",
                      dict(shards=[re.sub(r"\w{8}$", "0" * 8, line) for line in shard_lines()])),
    "more shards": ("data", FAIL, "log1.txt and log0.txt have other data",
                    dict(shards=shard_lines(train=3))),
    "shards not named": ("data", CANNOT_TELL, "log1.txt does not name its shards",
                         dict(shards=[])),
    "other source": ("source", FAIL, "the logs start with 2 different sources",
                     dict(source=SOURCE + "\nx = 1\n")),
    "warm-up not declared": ("warm-up", CANNOT_TELL, "log1.txt does not say its warm-up",
                             dict(warmup="")),
    "other warm-up": ("warm-up", FAIL, "warm-up differs between the logs",
                      dict(warmup="warm-up: none")),
    "flags in the environment": (
        "compile flags", FAIL, "log1.txt ran with TORCHINDUCTOR_MAX_AUTOTUNE=1",
        dict(environment="NCCL_VERSION=2 TORCHINDUCTOR_MAX_AUTOTUNE=1 TRITON_X=1")),
    "other GPU": ("machine", FAIL, "hardware differs .*: NVIDIA H200 in 2, NVIDIA B200 in 1",
                  dict(gpu="NVIDIA B200")),
    "other torch": ("machine", FAIL, r"torch differs between the logs: 2.11.0\+cu130 in 2",
                    dict(torch="2.10.0")),
    "two ranks in one": ("machine", FAIL, "number of ranks differs", dict(ranks=2)),
    "resumed": ("marks", FAIL, "log1.txt: resumed from step 500",
                dict(marks="resumed from step 500")),
    "overridden": ("marks", FAIL, "log1.txt: not a record: target is 3.5 instead of 3.3821",
                   dict(marks="not a record: target is 3.5 instead of 3.3821")),
}


@pytest.mark.parametrize("name", FAULTS)
def test_one_fault_in_one_log_fails_its_rule_and_no_other(tmp_path, name):
    rule, status, reason, settings = FAULTS[name]
    bad = our_log(**dict(seed=1340) | settings)
    report = check_texts(tmp_path, our_log(1337), bad, our_log(1339))
    assert_only(report, status, rule, reason)


# The same fault in all logs.
COMMON_FAULTS = {
    "too few val_tokens": ("val tokens", FAIL, "524288 instead of 1048576",
                           dict(val_tokens=524_288)),
    "hidden tokens": ("val tokens", FAIL, "log0.txt predicts hidden tokens",
                      dict(masked_share=0.15)),
    "too many tokens": ("training tokens", FAIL, "5,200,000,000 training tokens; allowed: 5,000,",
                        dict(batch_size=130_000_000)),
    "batch size unknown": ("training tokens", CANNOT_TELL, "does not say its batch_size",
                           dict(batch_size="large")),
    "short shards": ("data", FAIL, "fineweb_train_000001.bin has 99 bytes instead of 200,001,024",
                     dict(shards=shard_lines(num_bytes=99))),
    "two ranks": ("machine", FAIL, "2 ranks instead of 1", dict(ranks=2)),
}


@pytest.mark.parametrize("name", COMMON_FAULTS)
def test_one_fault_in_all_logs_fails_its_rule_and_no_other(tmp_path, name):
    rule, status, reason, settings = COMMON_FAULTS[name]
    report = check_texts(tmp_path, *(our_log(seed, **settings) for seed in SEEDS))
    assert_only(report, status, rule, reason)


UNFINISHED = {
    "it ends at step 40 of 40, without a validation": lambda lines: lines[:-1],
    "it ends at step 30 of 40": lambda lines: lines[:34],
    "it ends at step 34 of 40, without a validation": lambda lines: lines[:38],
    "it has no validation": lambda lines: [line for line in lines if "val_loss" not in line],
}


@pytest.mark.parametrize("reason", UNFINISHED)
def test_a_run_without_its_final_validation_is_no_record(tmp_path, reason):
    cut = our_log(1338, UNFINISHED[reason](step_lines()), end="")
    report = check_texts(tmp_path, our_log(1337), cut, our_log(1339))
    assert report.findings["complete"] == (FAIL, f"log1.txt: {reason}")
    assert not report.is_record and not report.is_sound


def test_val_tokens_that_differ_fail(tmp_path):
    report = check_texts(tmp_path, our_log(1), our_log(2, val_tokens=524_288))
    assert report.rules_with(FAIL) == ["settings", "val tokens"]
    assert report.findings["val tokens"].reason == (
        "val_tokens differs between the logs: 1048576 in 1, 524288 in 1")


def finals(*losses):
    return [our_log(seed, step_lines(final=loss)) for seed, loss in enumerate(losses)]


def test_a_target_that_is_missed_fails_with_its_p(tmp_path):
    report = check_texts(tmp_path, *finals(3.3830, 3.3835, 3.3840))
    assert report.rules_with(FAIL) == ["target", "significance"] and report.is_sound
    assert "mean val_loss 3.38350" in report.findings["target"].reason


@pytest.mark.parametrize("losses, test", [
    ((3.38, 3.3815, 3.3825, 3.3801), "t-test"), ((3.3810,), "z-test"), ((3.380, 3.3798), "z-test")])
def test_a_mean_that_may_be_luck_fails(tmp_path, losses, test):
    report = check_texts(tmp_path, *finals(*losses))
    assert_only(report, FAIL, "significance", f"p 0.* that the true mean is not .*{test}.* 0.01")


def test_the_mean_counts_and_not_the_best_run(tmp_path):
    report = check_texts(tmp_path, *finals(3.30, 3.38, 3.47))
    assert report.rules_with(FAIL) == ["target", "significance"]


@pytest.mark.parametrize("loss", ["nan", "inf", "-inf"])
def test_a_last_loss_that_is_no_number_is_no_record(tmp_path, loss):
    lines = step_lines()
    lines[-1] = re.sub(r"val_loss:\S+", f"val_loss:{loss}", lines[-1])
    for texts in ([our_log(lines=lines)], [our_log(lines=lines), our_log(1338), our_log(1339)]):
        report = check_texts(tmp_path, *texts)
        assert "finite" in report.rules_with(FAIL)
        assert f"val_loss {loss} at step 40" in report.findings["finite"].reason


def test_a_log_that_is_given_twice_fails(tmp_path):
    report = check_texts(tmp_path, our_log(), our_log())
    assert_only(report, FAIL, "independent", "log1.txt and log0.txt have the same losses")


def test_logs_of_one_name_in_two_folders_are_two_logs(tmp_path):
    paths = [*write_logs(tmp_path / "a", our_log(1, gpu="NVIDIA B200")),
             *write_logs(tmp_path / "b", our_log(2))]
    assert_only(check(read_logs(paths)), FAIL, "machine", "NVIDIA B200 in 1, NVIDIA H200 in 1")


def test_steps_out_of_order_fail(tmp_path):
    lines = step_lines()
    lines[5], lines[6] = lines[6], lines[5]
    report = check_texts(tmp_path, our_log(lines=lines))
    assert "complete" in report.rules_with(FAIL) and not report.is_record


def test_a_script_beside_the_logs_that_is_another_fails(tmp_path):
    report = check_texts(tmp_path / "a", our_log(), script=SOURCE.replace("64", "65"))
    assert_only(report, FAIL, "source", "is not the train_gpt.py beside them")
    report = check_texts(tmp_path / "b", our_log(), script=None)
    assert_only(report, CANNOT_TELL, "source", "no train_gpt.py beside them")


@pytest.mark.parametrize("script", [SOURCE.replace("\n", "\r\n"), SOURCE + "\n\n",
                                    SOURCE.replace("64\n", "64  \n")])
def test_white_space_at_the_ends_of_lines_makes_no_other_script(tmp_path, script):
    assert check_texts(tmp_path, our_log(), script=script).is_record


def test_the_kernels_in_the_logs_have_to_be_those_beside_them(tmp_path):
    source = SOURCE + "\n# file: triton_kernels.py\nimport triton\n"
    paths = write_logs(tmp_path, *(our_log(seed, source=source) for seed in (1, 2, 3)))
    assert_only(check(read_logs(paths)), FAIL, "source", "is not the triton_kernels.py beside them")
    (tmp_path / "triton_kernels.py").write_text("import triton  # faster\n")
    assert_only(check(read_logs(paths)), FAIL, "source", "is not the triton_kernels.py beside them")
    (tmp_path / "triton_kernels.py").write_text("import triton\n")
    assert check(read_logs(paths)).is_record


def test_nothing_hides_between_two_marks(tmp_path):
    mark = "\n# file: triton_kernels.py\n"
    again = f"{SOURCE}\ncheat = True\n# file: train_gpt.py\n{SOURCE}"
    for hidden in (f"{SOURCE}{mark}cheat = True", again):
        source = f"{hidden}{mark}import triton\n"
        folder = tmp_path / str(len(hidden))
        paths = write_logs(folder, *(our_log(seed, source=source) for seed in (1, 2, 3)))
        (folder / "triton_kernels.py").write_text("import triton\n")
        assert_only(check(read_logs(paths)), FAIL, "source", "not the train_gpt.py beside them")


def test_kernels_that_the_logs_do_not_use_do_not_matter(tmp_path):
    paths = write_logs(tmp_path, *(our_log(seed) for seed in (1, 2, 3)))
    (tmp_path / "triton_kernels.py").write_text("import triton\n")
    assert check(read_logs(paths)).is_record


def test_logs_without_their_source_cannot_be_told(tmp_path):
    report = check_texts(tmp_path, our_log(source="").lstrip("\n"))
    assert report.rules_with(CANNOT_TELL) == ["source", "compile flags"]
    assert report.verdict == ("not shown to be a record of single-gpu: cannot tell source, "
                              "compile flags")


def test_graphs_compiled_on_the_clock_are_mentioned(tmp_path):
    report = check_texts(tmp_path, our_log(end="graphs compiled while the clock ran: 3"))
    assert report.is_record and "3 graphs were compiled" in report.findings["warm-up"].reason


def test_runs_that_validate_only_at_both_ends_have_no_validation_on_the_clock(tmp_path):
    report = check_texts(tmp_path, *(
        our_log(seed, lines=step_lines(val_every=1000, final=3.37 + seed * 1e-4, validation_time=9))
        for seed in range(3)))
    assert report.findings["validation untimed"].status == PASS, report.findings


def test_problems_of_many_logs_are_summed_up(tmp_path):
    report = check_texts(tmp_path, *(our_log(seed, end="stopped by Ctrl-C") for seed in range(7)))
    reason = report.findings["complete"].reason
    assert reason.count("stopped") == 3 and reason.endswith("; and 4 more runs")


def test_queued_steps_of_public_logs_are_no_timed_validations(tmp_path):
    """A step that is stamped when it is queued seems long after a validation, the next short."""
    def queue(step, seconds):
        return seconds - (0.4 if step % 10 != 1 else 0) * (step > 1)

    lines = [line if "val_loss" in line else replace_times([line], queue)[0]
             for line in step_lines()]
    report = check_texts(tmp_path, public_log(lines), track="gpt2-small")
    assert report.findings["validation untimed"].status == PASS, report.findings


# -----------------------------------------------------------------------------
# Flags of the compiler

FORBIDDEN = [
    "torch._inductor.config.coordinate_descent_tuning = True",
    "torch._inductor.config.patch(max_autotune=True)",
    "setattr(torch._inductor.config, 'freezing', True)",
    "inductor = torch._inductor",
    "import torch._inductor.config as settings",
    "from torch._inductor import config",
    "from torch import _inductor",
    "torch.compile(model, mode='reduce-overhead')",
    "torch.compile(model, options={'triton.cudagraphs': True})",
    "torch.compile(model, **settings)",
    "model.compile(mode='reduce-overhead')",
    "from torch import compile\ncompile(model, mode='reduce-overhead')",
    "@torch.compile(mode='reduce-overhead', dynamic=False)\ndef f(): pass",
    "fast = functools.partial(torch.compile, mode='reduce-overhead')",
    "fast = partial(torch.compile, options={})",
    "settings = dict(mode='max-autotune-no-cudagraphs')",
    "os.environ['TORCHINDUCTOR_MAX_AUTOTUNE'] = '1'",
    "os.environ.setdefault('TORCHINDUCTOR_FREEZING', '1')",
    "os.environ['TORCHINDUCTOR_CACHE_DIR_AND_MORE'] = '1'",
    "os.environ.update(TORCHINDUCTOR_FREEZING='1')",
    "os.environ |= {'TORCH_COMPILE_DEBUG': '1'}",
    "if (:",
]
ALLOWED = [
    "torch.compile(model, dynamic=False, fullgraph=True)",
    "@torch.compile\ndef f(): pass",
    "fast = functools.partial(torch.compile, dynamic=False)",
    "torch._dynamo.config.cache_size_limit = 64",
    "import torch._dynamo as dynamo",
    "# torch._inductor.config.freezing = True",
    "def f():\n    '''TORCHINDUCTOR_FREEZING=1, and torch.compile(mode='x'), are forbidden.'''",
    "print('max-autotune is forbidden, and so is torch._inductor.config')",
    "os.environ['TORCHINDUCTOR_CACHE_DIR'] = 'cache'",
    "os.environ['TORCHINDUCTOR_COMPILE_THREADS'] = '4'",
    "re.compile('x', flags=re.M)",
    "open('x', mode='r')",
]


@pytest.mark.parametrize("code", FORBIDDEN)
def test_flags_of_the_compiler_are_found(tmp_path, code):
    source = f"{SOURCE}\n{code}\n"
    report = check_texts(tmp_path, our_log(source=source), script=source)
    where = "not valid Python" if code == "if (:" else "line "
    assert_only(report, FAIL, "compile flags", where)


@pytest.mark.parametrize("code", ALLOWED)
def test_what_is_no_flag_is_not_found(tmp_path, code):
    source = f"{SOURCE}\n{code}\n"
    assert check_texts(tmp_path, our_log(source=source), script=source).is_record


def test_train_gpt_sets_no_flags():
    assert not list(checker.forbidden_flags((ROOT / "train_gpt.py").read_text()))


@pytest.mark.parametrize("environment", [
    "TORCHINDUCTOR_CACHE_DIR=x", "TORCHINDUCTOR_COMPILE_THREADS=14",
    "TORCH_CUDA_ARCH_LIST=9.0a NCCL_NVLS_ENABLE=0", "no settings"])
def test_an_environment_without_flags_passes(tmp_path, environment):
    assert check_texts(tmp_path, our_log(environment=environment)).is_record


# -----------------------------------------------------------------------------
# Other formats, tracks and data


def test_a_public_log_is_told_as_far_as_it_goes(tmp_path):
    source = SOURCE.replace("999", "10485760")
    texts = [public_log(step_lines(final=3.27 + i * 1e-4), source) for i in range(4)]
    report = check_texts(tmp_path, *texts, track="gpt2-small", script=source)
    assert report.rules_with(FAIL) == []
    assert report.rules_with(CANNOT_TELL) == [
        "settings", "training tokens", "data", "warm-up", "machine", "marks"]


def test_an_llm_c_log_is_told_as_far_as_it_goes(tmp_path):
    report = check_texts(tmp_path, "s:0 tel:11.0\ns:250 tel:6.1\n", track="gpt2-small", script=None)
    assert report.rules_with(FAIL) == ["target", "significance"]
    assert "log0.txt has no train_time" in report.findings["time"].reason
    assert {"complete", "time", "clock", "validation untimed", "source"} <= set(
        report.rules_with(CANNOT_TELL))


def test_the_tracks_are_those_of_train_gpt():
    assert set(train_gpt.TRACKS) <= set(TRACKS)
    for name, track in train_gpt.TRACKS.items():
        ours = TRACKS[name]
        assert (ours.target, ours.val_tokens, ours.token_budget) == (
            track["target"] or None, track["val_tokens"], track["token_budget"])
        assert ours.data in track["data_path"]


def test_the_hashes_are_those_of_the_sample():
    hashes = json.loads((ROOT / "records/data_hashes.json").read_text())
    assert hashes["sample"] == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((ROOT / "data/sample").glob("*.bin"))}
    assert set(hashes) == {track.data for track in TRACKS.values()}


def test_a_shard_with_another_hash_than_its_track_knows_fails(tmp_path):
    shards = shard_lines("sample", train=1)
    report = check_texts(tmp_path, our_log(shards=shards, track="sample"))
    finding = report.findings["data"]
    assert finding.status == FAIL
    assert re.match("sample_train_000001.bin has sha256 .* instead of b430723", finding.reason)


def test_a_log_of_no_known_track_needs_one_to_be_named(tmp_path):
    for text, found in ((public_log(step_lines()), "no track"),
                        (our_log(track="moon"), "the unknown track 'moon'")):
        with pytest.raises(LogError, match=f"log0.txt names {found}; .*--track single-gpu or"):
            check_texts(tmp_path, text)


# -----------------------------------------------------------------------------
# A claim by CORE


def check_core(folder, *scores, **header):
    """Logs of runs with these CORE scores; None: it was not measured."""
    logs = write_logs(folder, *(our_log(seed, **BY_CORE | header) for seed in range(len(scores))))
    for log, score in zip(logs, scores, strict=True):
        if score is not None:
            write_core(log, **score if isinstance(score, dict) else dict(mean=score))
    return check(read_logs(logs))


@pytest.mark.parametrize("scores, mean", [((0.2566,), "0.256600"), ((0.25, 0.27), "0.260000")])
def test_a_mean_core_score_above_the_tracks_is_a_record(tmp_path, scores, mean):
    report = check_core(tmp_path, *scores)
    assert report.is_record and not report.lacks_core, report.findings
    assert report.verdict.startswith("a record of time-to-gpt2: mean 20.200 s")
    assert report.findings["target"].reason.endswith(f"mean CORE {mean}; needed: above 0.256525")
    summary = report.as_json()
    assert summary["mean_core"] == pytest.approx(float(mean)) and summary["p"] is None
    assert [run["core"] for run in summary["runs"]] == list(scores)


@pytest.mark.parametrize("scores, reason", [
    ((0.256525,), "mean CORE 0.256525; needed: above 0.256525"),
    ((0.25, 0.26), "mean CORE 0.255000; needed")])
def test_a_core_score_that_is_too_low_fails(tmp_path, scores, reason):
    report = check_core(tmp_path, *scores)
    assert_only(report, FAIL, "target", reason)
    assert report.is_sound and not report.lacks_core


@pytest.mark.parametrize("scores, reason", [
    ((0.3, dict(run="log0")), "log1.core.json is of run log0, step 40, not of run log1, step 40: "),
    ((0.3, dict(step=30)), "is of run log1, step 30, not of run log1, step 40: measure it with `p"),
    ((0.3, dict(is_core=False)), "log1.core.json is only a part of CORE: measure it with `python"),
    ((0.3, dict(mean="high")), "log1.core.json is not as evals/core.py writes it .TypeError"),
    ((0.3, dict(mean=math.inf)), "log1.core.json has a mean of inf, which is no score"),
    ((0.3, dict(mean=math.nan)), "a mean of nan"),
    ((0.3, dict(mean=True)), "a mean of True"),
    ((0.3, dict(mean=-(10**400))), "is not as evals/core.py writes it .OverflowError"),
])
def test_a_core_score_that_is_not_that_of_the_run_tells_nothing(tmp_path, scores, reason):
    report = check_core(tmp_path, *scores)
    assert_only(report, CANNOT_TELL, "target", reason)
    assert report.lacks_core and report.as_json()["mean_core"] is None


@pytest.mark.parametrize("text", ["no JSON", "[]", '{"run": "log0", "step": 40, "mean": 0.3}'])
def test_a_file_that_core_has_not_written_tells_nothing(tmp_path, text):
    [log] = write_logs(tmp_path, our_log(**BY_CORE))
    (tmp_path / "log0.core.json").write_text(text)
    assert_only(check(read_logs([log])), CANNOT_TELL, "target", "is not as evals/core.py writes it")


def test_without_a_core_score_the_command_that_measures_it_is_told(tmp_path):
    report = check_core(tmp_path / "a b", 0.3, None)
    assert_only(report, CANNOT_TELL, "target", "log1.txt has no CORE score: measure it with ")
    place = tmp_path / "a b" / "log1"
    assert report.findings["target"].reason.endswith(
        f"`python evals/core.py '{place}' --json '{place}.core.json'`")
    assert report.lacks_core and report.as_json()["mean_core"] is None


def test_one_core_score_is_not_that_of_all_runs_in_a_log(tmp_path):
    [log] = write_logs(tmp_path, "".join(our_log(seed, **BY_CORE) for seed in SEEDS))
    write_core(log)
    assert_only(check(read_logs([log])), CANNOT_TELL, "target",
                "log0.txt holds several runs, and a CORE score is of one: give each a log")


def test_what_a_run_says_against_itself_counts_where_core_is_the_claim_too(tmp_path):
    mark = "not a record: data_path is data/webmix instead of data/fineweb10B"
    assert_only(check_core(tmp_path, 0.3, marks=mark), FAIL, "marks", mark)


def test_a_core_score_does_not_help_on_another_track(tmp_path):
    [log] = write_logs(tmp_path, our_log(lines=step_lines(final=3.5)))
    write_core(log)
    report = check(read_logs([log]))
    assert report.rules_with(FAIL) == ["target", "significance"]
    assert report.as_json()["mean_core"] is None


# -----------------------------------------------------------------------------
# The command line


def test_a_record_on_the_command_line(tmp_path):
    write_logs(tmp_path, *(our_log(seed) for seed in SEEDS))
    done = run_check(tmp_path)
    assert done.returncode == 0 and not done.stderr
    lines = done.stdout.splitlines()
    assert lines[1].split() == ["log0.txt", "1337", "40", "15,728,640", "3.37570", "20.200", "s",
                                "505.00", "ms", "NVIDIA", "H200"]
    assert lines[-1].startswith("verdict: a record of single-gpu: mean 20.200 s")
    assert [line.split("  ")[0] for line in lines[5:-2]] == list(checker.RULES)


def test_no_record_on_the_command_line(tmp_path):
    done = run_check("--json", *write_logs(tmp_path, our_log(ranks=2)))
    report = json.loads(done.stdout)
    assert done.returncode == 1 and report["is_record"] is False
    assert report["rules"]["machine"] == {"status": "fail", "reason": "2 ranks instead of 1"}
    assert report["n"] == 1 and report["mean_train_time"] == pytest.approx(20.2)
    assert report["std_val_loss"] is None and 0 < report["p"] < 0.01


def test_json_stays_json_without_numbers(tmp_path):
    lines = [*step_lines()[:-1], "step:40/40 val_loss:nan train_time:1s"]
    write_logs(tmp_path, our_log(lines=lines), "s:0 tel:nan\n", script=None)
    done = run_check("--json", "--track", "single-gpu", tmp_path)
    report = json.loads(done.stdout, parse_constant=lambda text: pytest.fail(f"{text} in JSON"))
    assert done.returncode == 1 and report["mean_val_loss"] is None and report["p"] is None
    assert [run["val_loss"] for run in report["runs"]] == [None, None]


def test_mistakes_on_the_command_line_are_explained(tmp_path):
    (log,) = write_logs(tmp_path, our_log(track="moon"))
    for arguments, advice in (
        ([log], "unknown track 'moon'; say whose rules to use: --track single-gpu or"),
        (["--track", "moon", log], "choose from"), ([tmp_path / "none.txt"], "no such file"),
        (["--script", tmp_path / "none.py", log], "No such file"),
        ([tmp_path / "train_gpt.py"], "holds no run"), ([], "required"),
    ):
        done = run_check(*arguments)
        assert done.returncode == 2 and advice in done.stderr and not done.stdout, done
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("unit", ["ms", "s"])
def test_many_long_logs_take_seconds(tmp_path, unit):
    texts = [our_log(seed, step_lines(4990, 125, 3.375 + seed * 1e-5, unit=unit), train_steps=4990)
             for seed in range(4)]
    paths = write_logs(tmp_path, *texts * 25)
    started = time.perf_counter()
    report = check(read_logs(paths))
    assert time.perf_counter() - started < 4
    assert report.rules_with(FAIL) == ["independent"] and len(report.runs) == 100
