"""evals/report.py, on tiny runs on a CPU and on logs made from parameters, without a network."""

import dataclasses
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_train
from record_logs import our_log, step_lines
from test_evals_use import (  # noqa: F401  trained and vocab are fixtures
    call,
    trained,
    vocab,
)

import train_gpt

sys.path.insert(0, str(ROOT / "evals"))
import bpb  # noqa: E402  needs the path above
import core  # noqa: E402
import export  # noqa: E402
import facts  # noqa: E402
import hellaswag  # noqa: E402
import report  # noqa: E402

SAMPLE = ROOT / "evals" / "sample"
STEPS = ["--train_steps", "6", "--resume_anyway"]


@pytest.fixture
def logs(trained, tmp_path) -> Path:  # noqa: F811
    """A folder of the trained run a.run, to write to."""
    return Path(shutil.copytree(trained / "logs", tmp_path / "private" / "logs"))


def write_report(run, folder: Path, *argv, vocab: Path | None = None) -> str:  # noqa: F811
    """The report of a run; with samples if the vocabulary is given."""
    samples = [] if vocab else ["--samples", 0]
    assert call(report, run, *samples, *argv, "--out", folder / "out.md", vocab=vocab) == 0
    return (folder / "out.md").read_text("utf-8")


def rows(text: str, section: str = "") -> dict[str, list[str]]:
    """The rows of the tables of a section, or of those before the first, by their first cell."""
    part = re.split(r"^## ", text, flags=re.MULTILINE)
    part = part[0] if not section else next(p for p in part if p.startswith(f"{section}\n"))
    found = [re.split(r"(?<!\\)\|", line[2:-2]) for line in part.split("\n")
             if line.startswith("| ") and not line.startswith("| ---")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in found}


def core_result(count: int = 22, mean: float = 0.3, name: str = "t{}", **more) -> dict:
    task = dict(examples=1234, shots=3, cut=5, accuracy=0.4321, accuracy_error=0.0123,
                baseline=0.25, centered=0.2428, centered_error=0.0164)
    return dict(task="core", run="a.run", step=4, is_core=count == 22, mean=mean,
                mean_error=0.0051, tasks={name.format(i): task for i in range(count)}) | more


def write_json(path: Path, result: dict) -> Path:
    path.write_text(json.dumps(result))
    return path


def test_numbers_are_those_of_the_files(logs, vocab, capsys):  # noqa: F811
    """With evaluations as they write them, beside the log."""
    options = ["a.run", "--log_dir", logs]
    assert call(bpb, *options, "--json", logs / "a.run.bpb.json", vocab=vocab) == 0
    for module, data in ((core, ["--bundle", SAMPLE / "core_bundle"]),
                         (hellaswag, ["--data", SAMPLE / "hellaswag.jsonl"])):
        module.command_line([str(x) for x in (*options, *data, "--vocab_dir", vocab, "--json",
                                              logs / f"a.run.{module.__name__}.json")])
    assert call(report, *options, vocab=vocab) == 0
    out, err = capsys.readouterr()
    assert out.endswith(f"{logs / 'a.run.report.md'}\n") and "left out" not in err
    text = (logs / "a.run.report.md").read_text("utf-8")
    state = json.loads((logs / "a.run" / "step_000004" / "state.json").read_text())
    log = (logs / "a.run.txt").read_text()
    summary = rows(text)

    assert text.startswith("# Run a.run\n")
    assert summary["val_loss"] == [f"{state['val_losses'][-1][1]:.5f} at step 4"]
    assert summary["train_time"] == [f"{state['train_time']:,.3f} s"]
    assert summary["step"] == ["4 of 4"] and summary["track, recipe"] == ["sample, sample"]
    assert summary["target"] == ["7.2, not reached"]
    assert summary["training tokens"] == ["1,024"]
    assert summary["tokens per second"] == [f"{1024 / state['train_time']:,.0f}"]
    assert summary["processes, on a CPU"] == ["1"]
    assert summary["parameters"] == re.findall("^parameters: (.*)$", log, re.MULTILINE)
    assert state["source"] in summary["source"][0]
    assert "not a record of sample" in summary["records/check.py"][0]
    assert "resumed" not in summary and "private" not in text

    found = {task: json.loads((logs / f"a.run.{task}.json").read_text()) for task in report.TASKS}
    assert summary["bits per byte"] == [f"{found['bpb']['bpb']:.5f} on 512 tokens"]
    assert summary["HellaSwag"][0].startswith(f"{found['hellaswag']['accuracy']:.4f} ± ")
    assert "10 examples, 0 shots" in summary["HellaSwag"][0]
    assert summary["CORE"][0].startswith("not measured in full")
    scores = rows(text, "Evaluations")
    for name, task in found["core"]["tasks"].items():
        assert scores[name] == [
            str(task["examples"]), str(task["shots"]), str(task["cut"]),
            f"{task['accuracy']:.4f} ± {task['accuracy_error']:.4f}", f"{task['centered']:.4f}"]
    assert scores["mean"][-1].startswith(f"{found['core']['mean']:.4f} ± ")
    assert "Not measured" not in text and "0.256525" not in text

    losses = rows(text, "Losses")
    for step, loss in state["val_losses"]:
        [time] = re.findall(rf"^step:{step}/4 val_loss:\S+ train_time:(\d+)ms", log, re.MULTILINE)
        assert losses[str(step)] == [f"{loss:.5f}", f"{int(time) / 1000:.3f}"]
    assert len(losses) == 1 + len(state["val_losses"])
    for name, size, sha256 in state["data"]:
        assert rows(text, "Data")[name] == [f"{size:,}", sha256]
    assert rows(text, "System")["versions"] == re.findall("^Python .*$", log, re.MULTILINE)[:1]
    changed = text.partition("## Settings")[2].partition("<details>")[0]
    assert "| model_dim | 16 |" in changed and "activation" not in changed
    assert rows(text, "Settings")["activation"] == ["relu2"]


def test_what_has_not_been_measured(logs, tmp_path):
    text = write_report("latest", tmp_path, "--log_dir", logs)
    assert {rows(text)[name][0] for name in ("bits per byte", "CORE", "HellaSwag")} == {
        "not measured"}
    for task in report.TASKS:
        assert (f"python evals/{task}.py logs/a.run/step_000004 --json logs/a.run.{task}.json\n"
                in text)
    assert "None were asked for." in text


def test_a_core_score_stands_above_or_below_that_of_gpt2(logs, tmp_path):
    def line(**options) -> str:
        file = write_json(tmp_path / "some.json", core_result(**options))
        text = write_report("a.run", tmp_path, "--log_dir", logs, "--json", file)
        assert rows(text, "Evaluations")["t20"] == [
            "1,234", "3", "5", "0.4321 ± 0.0123", "0.2428"]
        return rows(text)["CORE"][0]

    assert line(mean=0.256625) == "0.256625 ± 0.0051, 0.000100 above GPT-2's 0.256525"
    assert line(mean=0.156525) == "0.156525 ± 0.0051, 0.100000 below GPT-2's 0.256525"
    for part in (dict(count=21, is_core=True), dict(is_core=False)):
        assert "not measured in full" in line(**part) and "GPT-2" not in line(**part)


def test_results_of_another_run_or_step_are_not_taken(logs, tmp_path, capsys):
    for change in (dict(run="b.run"), dict(step=2)):
        file = write_json(tmp_path / "x.json", core_result(**change))
        assert call(report, "a.run", "--log_dir", logs, "--samples", 0, "--json", file) == 1
        error = capsys.readouterr().err
        assert re.search(r"x.json is of run [ab].run, step [24], but .* run a.run, step 4", error)
        shutil.copy(file, logs / "a.run.core.json")
        text = write_report("a.run", tmp_path, "--log_dir", logs)
        assert rows(text)["CORE"] == ["not measured"]
        assert "left out: " in capsys.readouterr().err
    good = write_json(tmp_path / "y.json", core_result())
    text = write_report("a.run", tmp_path, "--log_dir", logs, "--json", good)
    assert "above" in rows(text)["CORE"][0] and "left out" not in capsys.readouterr().err


@pytest.mark.parametrize("content, expected", [
    ("hello", "is not what bpb, core, hellaswag write with --json"), ("[]", "is not what"),
    ('{"run": "a.run", "step": 4, "task": "chess"}', "is not what"),
    ('{"run": "a.run", "step": 4, "task": "bpb"}', "not as evals/bpb.py writes it.*'bpb'"),
    ('{"run": "a.run", "step": 4, "task": "core", "is_core": true, "tasks": [1]}', "not as evals"),
    (None, "x.json cannot be read"),
    ("twice", "two results of core"),
])
def test_files_that_are_no_results(logs, tmp_path, capsys, content, expected):
    files = [tmp_path / "x.json"] * (2 if content == "twice" else 1)
    if content is not None:
        files[0].write_text(json.dumps(core_result()) if content == "twice" else content)
    assert call(report, "a.run", "--log_dir", logs, "--samples", 0, "--json", *files) == 1
    assert re.search(expected, capsys.readouterr().err)
    assert not (logs / "a.run.report.md").exists()


def test_a_resumed_run(logs, tmp_path):
    done = run_train("--resume", "a.run", *STEPS, cwd=logs.parent)
    assert done.returncode == 0, done.stderr
    log = logs / "a.run.txt"
    log.write_text(re.sub("^(resumed: .*, on) 1 ranks$", r"\1 2 ranks", log.read_text(),
                          flags=re.MULTILINE))
    text = write_report("a.run", tmp_path, "--log_dir", logs)
    state = json.loads((logs / "a.run" / "step_000006" / "state.json").read_text())
    summary, losses = rows(text), rows(text, "Losses")
    assert summary["resumed"] == ["at step 4; although train_steps is 6 instead of 4"]
    assert summary["processes, on a CPU"] == ["1, then 2"]
    assert summary["step"] == ["6 of 6"] and summary["training tokens"] == ["1,536"]
    assert summary["val_loss"] == [f"{state['val_losses'][-1][1]:.5f} at step 6"]
    assert list(losses) == ["step", "0", "2", "4", "6"] and all(map(all, losses.values()))
    assert rows(text, "System")["fact"] == ["at the start", "from step 4 on"]
    assert all(rows(text, "System")["date"])
    assert "--train_steps 6" in text and "The run was resumed" in text
    assert str(tmp_path) not in text and "private" not in text
    # And of the checkpoint before that, which has nothing of what came after it.
    text = write_report(logs / "a.run" / "step_000004", tmp_path)
    assert rows(text)["step"] == ["4 of 4"] and "6" not in rows(text, "Losses")
    assert "the log ends at step 6, the checkpoint is of 4" in rows(text)["records/check.py"][0]


def test_a_run_without_checkpoints_on_several_gpus(tmp_path, vocab, capsys):  # noqa: F811
    (tmp_path / "private").mkdir()
    log = tmp_path / "private" / "big.txt"
    log.write_text(our_log(
        lines=step_lines(steps=40, val_every=1), ranks=8, gpu="NVIDIA H100 80GB HBM3",
        data_path="/private/mine", matrix_lr=0.07,
        environment="NCCL_DEBUG=INFO TORCH_TRACE=/private/x"))
    for run in (log, "big"):
        text = write_report(run, tmp_path, "--log_dir", log.parent, vocab=vocab)
        summary, losses = rows(text), rows(text, "Losses")
        assert summary["GPUs"] == ["8"] and summary["hardware"] == ["NVIDIA H100 80GB HBM3"]
        assert summary["val_loss"] == ["3.37500 at step 40"]
        assert summary["target"] == ["3.3821, reached at step 39"]
        assert summary["training tokens"] == [f"{40 * 393_216:,}"]
        assert summary["train_time"] == ["20.200 s"]
        assert summary["total time"][0].startswith("at least 87.4 s: ")
        assert len(losses) == 21 and list(losses)[1] == "0" and list(losses)[-1] == "40"
        assert rows(text, "System")["driver"] == ["580.95.05"]
        assert rows(text, "System")["environment"] == ["NCCL_DEBUG=INFO"]
        assert rows(text, "Settings")["data_path"] == ["mine"]
        assert "Not measured: bpb, core, hellaswag. It takes a checkpoint" in text
        assert "None: the run has no checkpoint" in text
        assert "torchrun --standalone --nproc_per_node=8 train_gpt.py" in text
        assert "private" not in text
    assert call(report, "other", "--log_dir", tmp_path) == 1
    assert "no checkpoint of 'other'" in capsys.readouterr().err
    log.write_text(our_log() + "\n".join(step_lines()))
    assert call(report, "big", "--log_dir", log.parent) == 1
    assert "big.txt holds 2 runs" in capsys.readouterr().err


def test_an_exported_model(logs, tmp_path, vocab):  # noqa: F811
    folder = tmp_path / "my-model"
    assert call(export, "a.run", folder, "--log_dir", logs) == 0
    assert call(bpb, folder, "--json", tmp_path / "my-model.bpb.json", vocab=vocab) == 0
    text = write_report(folder, tmp_path, vocab=vocab)
    found = json.loads((tmp_path / "my-model.bpb.json").read_text())
    assert text.startswith("# Exported model my-model\n")
    assert rows(text)["bits per byte"] == [f"{found['bpb']:.5f} on 512 tokens"]
    assert rows(text)["val_loss"] == ["not measured"] and rows(text)["hardware"] == ["unknown"]
    assert "there is no log of the run" in rows(text)["records/check.py"][0]
    assert "an exported model does not keep them" in text
    assert "python evals/core.py my-model --json my-model.core.json" in text
    assert len(re.findall("seed 0:\n\n````*text\n", text)) == len(report.PROMPTS)
    assert str(tmp_path) not in text


@pytest.mark.parametrize("settings", [
    {}, dict(recipe="sample-baseline"), dict(batch_size=1024, matrix_lr="1e-3", compile=True),
    dict(recipe="sample-record", batch_stages="1024,2048", seed=7, logit_softcap=0.0),
    dict(track="single-gpu", recipe="record", batch_size=131_072), dict(data_path="mine"),
    dict(track="single-gpu", recipe="record", batch_size=131_072,
         batch_stages=train_gpt.RECORD["batch_stages"]),
    dict(track="gpt2-small", recipe="modern", depth=12, target_param_data_ratio=10.5,
         train_steps=1_500),
    dict(track="gpt2-small", recipe="baseline", depth=12, target_param_data_ratio=5.0,
         weight_decay=0.1),
    dict(track="gpt2-small", recipe="modern", depth=20, target_param_data_ratio=10.5,
         batch_size=393_216)])
def test_the_command_that_does_it_again_has_the_settings_of_the_run(tmp_path, settings):
    given = dict(track="sample", recipe="sample") | settings
    args = train_gpt.parse_hyperparameters(
        [text for name, value in given.items() for text in (f"--{name}", str(value))])
    hyperparameters = dataclasses.asdict(args) | dict(run_id="it's me")
    (tmp_path / "it's me.txt").write_text(our_log(**hyperparameters))
    text = write_report("it's me", tmp_path, "--log_dir", tmp_path)
    shown = re.search(r"^python train_gpt.py (.*?)\n```", text, re.MULTILINE | re.DOTALL)[1]
    words = shlex.split(shown.replace("\\\n", ""))
    again = dataclasses.asdict(train_gpt.parse_hyperparameters(words))
    assert again == hyperparameters | dict(save_every=-1)
    assert len(words) <= 2 * (len(given) + 3)  # no more than differs


HOSTILE = "```\n# Title\n| a | <b> &amp; [x](http://y) `z` *"


def test_texts_of_others_cannot_break_the_markdown(
    logs, tmp_path, vocab, monkeypatch  # noqa: F811
):
    name = "a|b <img src=x> `c` [d](e) *f* __g__ lambada_openai\n## h {}"
    file = write_json(tmp_path / "x.json", core_result(name=name))
    text = write_report("a.run", tmp_path, "--log_dir", logs, "--json", file)
    lines = [line for line in text.split("\n") if "lambada_openai" in line]
    assert len(lines) == 22 and all(line.count("|") == 7 for line in lines)
    assert not re.search(r"[<>`\[\]*]|__", lines[0])
    assert facts.escape("plain_text, 1.5 (x)") == "plain_text, 1.5 (x)"

    monkeypatch.setattr(report, "PROMPTS", (HOSTILE,))
    text = write_report("a.run", tmp_path, "--log_dir", logs, vocab=vocab)
    outside = re.sub(r"^(````*)text\n.*?\n\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert f"````text\n{HOSTILE}" in text and "`z`" not in outside
    headings = re.findall("^#.*", outside, re.MULTILINE)
    assert headings == ["# Run a.run", *re.findall("^## .*", report.REPORT, re.MULTILINE)]


def test_a_block_has_a_fence_that_its_text_does_not():
    for text in (HOSTILE, "````\n# x\n`````", "plain", "\x00\x1b[31m\r\n```\u2028"):
        first, *inside, last = report.fenced(text).split("\n")
        assert first == f"{last}text" and set(last) == {"`"} and len(last) >= 3
        assert last not in "\n".join(inside) and not re.search(r"[\x00-\x08\x0b-\x1f]",
                                                               "".join(inside))


def test_without_a_connection_there_is_a_report_without_samples(logs, tmp_path, monkeypatch):
    def fails(name):
        raise OSError("no route to host")

    monkeypatch.setattr("tiktoken.get_encoding", fails)
    out = tmp_path / "out.md"
    assert call(report, "a.run", "--log_dir", logs, "--out", out) == 0
    text = out.read_text("utf-8").partition("## Samples")[2]
    assert "None: tiktoken cannot download GPT-2's vocabulary (no route to host)" in text
    assert call(report, "a.run", "--log_dir", logs, "--out", out, vocab=tmp_path) == 1


def test_samples_are_those_of_their_seeds(logs, tmp_path, vocab):  # noqa: F811
    texts = [write_report("a.run", tmp_path, "--log_dir", logs, "--samples", 2, vocab=vocab)
             for _ in range(2)]
    assert texts[0] == texts[1]
    assert re.findall(r", seed (\d):$", texts[0], re.MULTILINE) == ["0", "1"] * len(report.PROMPTS)
    assert "temperature 0.8" in texts[0]
    found = re.findall(r"^(````*)text\n(.*?)\n\1$", texts[0].partition("## Samples")[2],
                       re.MULTILINE | re.DOTALL)[:-1]  # the last is the command
    assert len({text for _, text in found}) == len(found) == 2 * len(report.PROMPTS)
    for i, (_, text) in enumerate(found):
        assert text.startswith(report.PROMPTS[i // 2])
