"""evals/: scoring, HellaSwag and CORE, with tiny models on a CPU and tasks made up by us."""

import dataclasses
import json
import math
import random
import shutil
import sys
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, ONE_RANK, ROOT, START, build, run_ranks, tiny_args
from record_logs import BY_CORE, our_log
from test_data_scripts import MERGES, write_vocab

import train_gpt
from train_gpt import MicroBatch, Ranks

sys.path.insert(0, str(ROOT / "evals"))
import core  # noqa: E402  needs the path above
import hellaswag  # noqa: E402
import scoring  # noqa: E402
from check import FAIL, PASS, check  # noqa: E402
from fineweb import load_encoding  # noqa: E402
from logs import read_log  # noqa: E402
from scoring import Sequence, judge_examples, pack, score  # noqa: E402

SAMPLE = ROOT / "evals" / "sample"
WINDOWS = (8, 16)
VOCABULARY = dict(vocab_size=START + 1, value_embeddings=0)  # with START, and small all the same
MODERN = VOCABULARY | dict(key_offset=True, bigram_rows=512, output_mixing=True, unigram_power=0.5,
                           attention_gate=True, num_layers=4)
BASELINE = VOCABULARY | dict(
    document_masking=False, activation="gelu", qk_norm="none", attention_scale=0.0,
    norm_embed=False, tied_head=True, logit_softcap=0.0, skip_connections=False,
    embed_shortcut=False)


def model_like(settings: dict) -> train_gpt.GPT:
    return build(tiny_args(**settings)).requires_grad_(False)


def random_sequences(count: int, longest: int = 64) -> list[Sequence]:
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, longest + 1, count)
    tokens = [rng.integers(0, START, length, dtype=np.int32) for length in lengths]
    return [Sequence(some, int(rng.integers(1, len(some) + 1))) for some in tokens]


def plain(model, tokens, windows=WINDOWS) -> tuple[np.ndarray, np.ndarray, float]:
    """Losses of the tokens after START, whether each is the likeliest; the model's own sum."""
    inputs = torch.tensor([[START, *tokens[:-1]]], dtype=torch.int32)
    targets = torch.tensor(np.array([tokens]))
    ends = torch.tensor([0, len(tokens)], dtype=torch.int32)
    batch = MicroBatch(inputs, targets, ends, len(tokens), whole_rows=True)
    with torch.no_grad():
        logits = model.logits(model.hidden(batch, windows)[0])
        total = float(model(batch, windows))
    chances = logits.double().softmax(-1)
    at = torch.arange(len(tokens)), targets[0].long()
    return (-chances[at].log()).numpy(), (chances[at] >= chances.max(-1).values).numpy(), total


def save_run(folder: Path, settings: dict, run_id: str = "tiny") -> train_gpt.GPT:
    """The checkpoint of a run that never was; returns its model."""
    model = model_like(settings)
    state = dict(format=train_gpt.CHECKPOINT_FORMAT, step=4, val_losses=[[0, 7.5], [4, 6.25]],
                 hyperparameters=dataclasses.asdict(model.args))
    checkpoints = train_gpt.Checkpoints(folder / run_id, train_gpt.Log())
    checkpoints.write({train_gpt.MODEL_FILE: model.state_dict()}, state)
    return model


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a vocabulary, and runs whose models have rows of 512 and of 64 tokens."""
    folder = tmp_path_factory.mktemp("evals")
    write_vocab(folder / "vocab", MERGES)
    save_run(folder / "logs", MODERN | dict(row_length=512, batch_size=512, device_batch_size=512,
                                            val_batch_size=512), "modern")
    save_run(folder / "logs", BASELINE, "baseline")
    return folder


def run(command, place: Path, *argv, name: str = "modern") -> dict:
    """The numbers that a command writes."""
    file = place / "numbers.json"
    options = ("--log_dir", place / "logs", "--vocab_dir", place / "vocab", "--json", file)
    command([str(x) for x in (name, *options, *argv)])
    return json.loads(file.read_text())


def failure(command, place: Path, capsys, *argv, name: str = "modern") -> str:
    with pytest.raises(SystemExit) as stop:
        run(command, place, *argv, name=name)
    assert stop.value.code not in (0, None)
    return capsys.readouterr().err


# -----------------------------------------------------------------------------
# scoring.py


def test_pack_fills_rows_with_lengths_in_any_order():
    lengths = random.Random(0).choices(range(1, 101), k=1_000)
    rows = pack(lengths, 100)
    assert sorted(i for row in rows for i in row) == list(range(1_000))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 100
    assert len(rows) <= 1.03 * sum(lengths) / 100


@pytest.mark.parametrize("settings", [MODERN, BASELINE], ids=["modern", "baseline"])
def test_packed_is_alone_is_plain(settings):
    model = model_like(settings)
    some = random_sequences(20)
    some += [Sequence(np.append(some[3].tokens[:-1], np.int32(token)), 2) for token in (7, 8)]
    packed = score(model, WINDOWS, some, batch_tokens=128)
    for (tokens, count), found in zip(some, packed, strict=True):
        alone, = score(model, WINDOWS, [Sequence(tokens, count)])
        losses, likeliest, total = plain(model, tokens)
        assert found.losses.shape == found.likeliest.shape == (count,) and not found.is_cut
        np.testing.assert_allclose(found.losses, alone.losses, atol=2e-5, rtol=1e-5)
        np.testing.assert_allclose(found.losses, losses[-count:], atol=2e-5, rtol=1e-5)
        assert found.likeliest.tolist() == likeliest[-count:].tolist()
        everything, = score(model, WINDOWS, [Sequence(tokens, len(tokens))])
        assert everything.losses.sum() == pytest.approx(total, rel=1e-5)


def test_the_likeliest_tokens_are_found():
    model = model_like(MODERN)
    tokens = [5]
    for _ in range(6):  # greedily
        inputs = torch.tensor([[START, *tokens]], dtype=torch.int32)
        ends = torch.tensor([0, len(tokens) + 1], dtype=torch.int32)
        batch = MicroBatch(inputs, inputs, ends, len(tokens) + 1, True)
        tokens.append(int(model.logits(model.hidden(batch, WINDOWS)[:, -1]).argmax()))
    tokens[4] = (tokens[4] + 1) % START  # and then what follows is another's
    found, = score(model, WINDOWS, [Sequence(np.array(tokens[:5], dtype=np.int32), 4)])
    assert found.likeliest.tolist() == [True, True, True, False]


@pytest.mark.parametrize("settings", [MODERN, BASELINE], ids=["modern", "baseline"])
def test_a_sequence_that_is_too_long_keeps_its_end(settings):
    model = model_like(settings)
    tokens = np.random.default_rng(0).integers(0, START, 150, dtype=np.int32)
    long, end = score(model, WINDOWS, [Sequence(tokens, 9), Sequence(tokens[-64:], 9)])
    assert long.is_cut and not end.is_cut
    np.testing.assert_allclose(long.losses, end.losses, atol=2e-5)
    everything, = score(model, WINDOWS, [Sequence(tokens, 150)])
    assert len(everything.losses) == 64


def test_batches_are_bounded_and_hold_little_else(monkeypatch):
    shapes, plain_score = [], scoring.score_places

    def watched(model, windows, batch, places, targets):
        shapes.append(tuple(batch.inputs_BT.shape))
        return plain_score(model, windows, batch, places, targets)

    monkeypatch.setattr(scoring, "score_places", watched)
    some = random_sequences(100, longest=40)
    twins = [Sequence(np.append(tokens[:-1], np.int32(9)), 1) for tokens, _ in some]
    score(model_like(BASELINE), WINDOWS, some + twins, batch_tokens=200)
    assert {rows * length <= 200 for rows, length in shapes} == {True}
    tokens = sum(len(tokens) for tokens, _ in some)  # the twins cost none
    assert sum(rows * length for rows, length in shapes) < 1.1 * tokens


def test_a_token_outside_the_vocabulary():
    with pytest.raises(train_gpt.RunError, match="50257.*vocabulary of 50,257.*--vocab_dir"):
        score(model_like(MODERN), WINDOWS, [Sequence(np.array([1, START + 1], dtype=np.int32), 1)])


def judge_on(ranks: Ranks, chunk: int) -> list:
    scoring.EXAMPLES = chunk
    model, some = model_like(MODERN), random_sequences(23)
    verdicts = judge_examples(
        partial(score, model, WINDOWS), ranks, 11, lambda i: some[2 * i : 2 * i + 2],
        lambda i, scores: (i, *(float(found.losses.sum()) for found in scores)))
    return torch.tensor(verdicts, dtype=torch.float64)


def test_two_ranks_find_what_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "EXAMPLES", 256)  # undone afterwards
    alone = judge_on(ONE_RANK, 256)
    assert alone[:, 0].tolist() == list(range(11))
    for found in run_ranks(judge_on, 2, tmp_path / "ranks", 3):
        torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)


def test_few_shot_draws_others_always_the_same():
    for index in range(8):
        drawn = scoring.few_shot(index, 7, 8, "task")
        assert sorted([*drawn, index]) == list(range(8))
        others = [i for i in range(8) if i != index]
        expected = random.Random(1234 + index).sample(others, 3)
        assert scoring.few_shot(index, 3, 8, "task") == expected
    with pytest.raises(train_gpt.RunError, match="task has 8 examples; 8 shots"):
        scoring.few_shot(0, 8, 8, "task")


def test_download(tmp_path, capsys):
    (tmp_path / "there").write_text("hello")
    url, path = (tmp_path / "there").as_uri(), tmp_path / "new" / "here"
    assert scoring.download(url, path, "advice").read_text() == "hello"
    (tmp_path / "there").unlink()
    assert scoring.download(url, path, "advice").read_text() == "hello"  # from before
    with pytest.raises(train_gpt.RunError, match="could not download.*; do this"):
        scoring.download(url, tmp_path / "new" / "other", "do this")
    assert list((tmp_path / "new").iterdir()) == [path]


# -----------------------------------------------------------------------------
# hellaswag.py


def stories() -> list[dict]:
    return [json.loads(line) for line in (SAMPLE / "hellaswag.jsonl").read_text().splitlines()]


def test_a_story_with_and_without_a_solved_one(place):
    encoding, all_of_them = load_encoding(place / "vocab"), hellaswag.read_stories(
        SAMPLE / "hellaswag.jsonl")
    story = all_of_them[4]
    for shots in (0, 1):
        found = hellaswag.sequences(all_of_them, 4, shots, encoding)
        before = ""
        if shots:
            index, = scoring.few_shot(4, 1, len(all_of_them), "")
            other = all_of_them[index]
            before = f"{other['ctx']} {other['endings'][int(other['label'])]}\n\n"
        for (tokens, count), ending in zip(found, story["endings"], strict=True):
            assert encoding.decode(tokens[:-count]) == before + story["ctx"]
            assert encoding.decode(tokens[-count:]) == " " + ending


@pytest.mark.parametrize("name", ["modern", "baseline"])
def test_hellaswag_is_what_a_plain_computation_finds(place, capsys, name):
    found = run(hellaswag.command_line, place, "--data", SAMPLE / "hellaswag.jsonl", name=name)
    model, windows, _ = train_gpt.load_run(name, CPU, str(place / "logs"))
    encoding, right = load_encoding(place / "vocab"), dict(mean=0, sum=0)
    most = len(model.rotary.cos)
    for story in stories():
        context, losses = encoding.encode_ordinary(story["ctx"]), []
        for ending in story["endings"]:
            end = encoding.encode_ordinary(" " + ending)
            losses.append(plain(model, [*context, *end][-most:], windows)[0][-len(end) :])
        for how in right:
            values = [getattr(np, how)(some) for some in losses]
            right[how] += int(np.argmin(values)) == story["label"]
    assert found["accuracy"] == right["mean"] / 10 and found["accuracy_sum"] == right["sum"] / 10
    assert (found["examples"], found["step"], found["val_loss"]) == (10, 4, 6.25)
    error = math.sqrt(found["accuracy"] * (1 - found["accuracy"]) / 10)
    assert found["accuracy_error"] == pytest.approx(error)
    printed = capsys.readouterr().out
    assert f"accuracy     {found['accuracy']:.4f} ± {error:.4f}" in printed
    assert "10 examples" in printed and "step 4, val_loss 6.25000" in printed


def test_the_two_accuracies_are_told_apart(place, monkeypatch):
    """One end has the smallest mean, another the smallest sum; the labels follow the first."""
    def rigged(model, windows, sequences, batch_tokens):
        losses = [[1.0, 1.0, 1.0], [2.0], [9.0], [9.0]]
        order = {0: [0, 1, 2, 3], 1: [2, 0, 1, 3], 2: [3, 2, 0, 1], 3: [1, 2, 3, 0]}
        by_label = [order[story["label"]] for story in stories()]
        return [scoring.Score(np.array(losses[k]), None, False) for some in by_label for k in some]

    monkeypatch.setattr(scoring, "score", rigged)
    found = run(hellaswag.command_line, place, "--data", SAMPLE / "hellaswag.jsonl")
    assert (found["accuracy"], found["accuracy_sum"]) == (1.0, 0.0)
    some = run(hellaswag.command_line, place, "--data", SAMPLE / "hellaswag.jsonl",
               "--max_examples", 3)
    assert some["accuracy_error"] == some["accuracy_sum_error"] == 0


def test_some_stories_and_labels_that_are_text(place, tmp_path):
    lines = [json.dumps(story | dict(label=str(story["label"]))) for story in stories()]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    some = run(hellaswag.command_line, place, "--data", tmp_path / "a.jsonl", "--max_examples", 4,
               "--shots", 1, "--batch_tokens", 100)
    assert (some["examples"], some["shots"]) == (4, 1) and some["accuracy"] in (0, .25, .5, .75, 1)


@pytest.mark.parametrize("change, expected", [
    ({"label": ""}, "story 3 has the label ''"),
    ({"label": 4}, "story 3 has the label '4', expected one of 0 to 3"),
    (None, "line 3 has no endings"),
])
def test_stories_that_cannot_be_used(place, tmp_path, capsys, change, expected):
    broken = stories()
    broken[2] = broken[2] | change if change else dict(ctx="A man", label=0)
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, broken)))
    message = failure(hellaswag.command_line, place, capsys, "--data", tmp_path / "a.jsonl")
    assert message.startswith("error: ") and "a.jsonl" in message and expected in message


def test_wrong_arguments(place, tmp_path, capsys):
    fails = partial(failure, hellaswag.command_line, place, capsys)
    assert "no checkpoint of 'other'" in fails(name="other")
    assert "nowhere.jsonl" in fails("--data", tmp_path / "nowhere.jsonl")
    (tmp_path / "text.jsonl").write_text("hello\n")
    assert "text.jsonl is not as expected" in fails("--data", tmp_path / "text.jsonl")
    data = ("--data", SAMPLE / "hellaswag.jsonl")
    assert "10 examples; 10 shots" in fails(*data, "--shots", 10)
    assert "--shots: got -1" in fails(*data, "--shots", -1)
    assert "--max_examples: got -1" in fails(*data, "--max_examples", -1)


# -----------------------------------------------------------------------------
# core.py

MC = core.Task("mc", "multiple_choice", "", 1, "\nAnswer: ", 0.25)
SCHEMA = core.Task("schema", "schema", "", 1, " ", 0.5)
LM = core.Task("lm", "language_modeling", "", 1, "\nAnswer: ", 0.0)


def parts(task, examples, index, place) -> list[tuple[str, str]]:
    """What is not scored and what is, as text."""
    encoding = load_encoding(place / "vocab")
    return [(encoding.decode(tokens[:-count]), encoding.decode(tokens[-count:]))
            for tokens, count in core.sequences(task, examples, index, encoding)]


def test_multiple_choice_scores_what_follows_the_common_beginning(place):
    examples = [dict(query="Q: one?", choices=["the cat", "the dog"], gold=0),
                dict(query="Q: two?", choices=["up", "down"], gold=1)]
    solved = "Q: two?\nAnswer: down\n\n"
    assert parts(MC, examples, 0, place) == [
        (solved + "Q: one?\nAnswer: the ", "cat"), (solved + "Q: one?\nAnswer: the ", "dog")]
    solved = "Q: one?\nAnswer: the cat\n\n"
    assert parts(MC._replace(shots=0), examples, 1, place)[1] == ("Q: two?\nAnswer: ", "down")
    assert parts(MC, examples, 1, place)[0] == (solved + "Q: two?\nAnswer: ", "up")


def test_a_choice_that_begins_another_is_scored_too(place):
    examples = [dict(query="Q", choices=["go", "gone"], gold=0)]
    task = MC._replace(shots=0, delimiter=" ")
    assert parts(task, examples, 0, place) == [("Q g", "o"), ("Q g", "one")]


def test_schema_scores_the_common_end(place):
    examples = [dict(context_options=["Ann sang as Ann", "Ann sang as Kim"],
                     continuation="was glad.", gold=0),
                dict(context_options=["A cat", "A dog"], continuation="barked.", gold=1)]
    solved = "A dog barked.\n\n"
    assert parts(SCHEMA, examples, 0, place) == [
        (solved + "Ann sang as Ann", " was glad."), (solved + "Ann sang as Kim", " was glad.")]


def test_language_modelling_scores_the_end_with_its_space(place):
    examples = [dict(context=" The capital is  ", continuation="Paris"),
                dict(context="Two and two is\n", continuation="four")]
    assert parts(LM._replace(delimiter=" "), examples, 0, place) == [
        ("Two and two is four\n\nThe capital is", " Paris")]
    assert parts(LM, examples, 0, place) == [
        ("Two and two is\nAnswer: four\n\nThe capital is\nAnswer:", " Paris")]


def test_what_is_right():
    def scores(*losses, likeliest=(True,)):
        return [scoring.Score(np.array(some), np.array(likeliest), False) for some in losses]

    assert core.is_right(MC, dict(gold=1), scores([2.0], [1.0, 1.5, 1.0]))  # per token
    assert not core.is_right(SCHEMA, dict(gold=1), scores([1.0, 1.0], [3.0, 3.0]))
    assert core.is_right(LM, {}, scores([5.0, 5.0], likeliest=(True, True)))
    assert not core.is_right(LM, {}, scores([0.1, 0.1], likeliest=(True, False)))


def test_the_list_of_tasks():
    text = '''name: other  # as in DCLM's files
settings:
  label: not a task
icl_tasks:
- label: one
  dataset_uri: a/one.jsonl # a comment
  num_fewshot: [10]
  continuation_delimiter: "\\nAnswer: " # this separates "questions" from answers
# another
-
    label: two
    num_fewshot: [0]

more: 1
'''
    assert core.read_list(text) == [
        dict(label="one", dataset_uri="a/one.jsonl", num_fewshot=[10],
             continuation_delimiter="\nAnswer: "), dict(label="two", num_fewshot=[0])]
    for bad in ("- label: 'single'", "- label", "- label:", "  label: one"):
        with pytest.raises(ValueError, match="cannot read the line"):
            core.read_list(f"icl_tasks:\n{bad}\n")


@pytest.mark.parametrize("name", ["modern", "baseline"])
def test_core_is_what_a_plain_computation_finds(place, capsys, name):
    bundle = SAMPLE / "core_bundle"
    found = run(core.command_line, place, "--bundle", bundle, name=name)
    model, windows, _ = train_gpt.load_run(name, CPU, str(place / "logs"))
    encoding, most = load_encoding(place / "vocab"), len(model.rotary.cos)
    centered, errors, tasks = [], [], core.read_tasks(bundle)
    assert [task.delimiter for task in tasks] == ["\nAnswer: ", " ", " "]
    for task in tasks:
        examples, right, cut = core.read_examples(bundle, task), 0, 0
        for i, example in enumerate(examples):
            some = core.sequences(task, examples, i, encoding)
            found_here = [plain(model, s.tokens[-most:], windows) for s in some]
            means = [losses[-s.count :].mean() for s, (losses, *_) in zip(
                some, found_here, strict=True)]
            right += (found_here[0][1][-some[0].count :].all() if task.kind == "language_modeling"
                      else int(np.argmin(means)) == example["gold"])
            cut += any(len(s.tokens) > most for s in some)
        result = found["tasks"][task.label]
        assert (result["accuracy"], result["cut"]) == (right / len(examples), cut)
        centered.append((right / len(examples) - task.baseline) / (1 - task.baseline))
        assert result["centered"] == pytest.approx(centered[-1])
        share = right / len(examples)
        errors.append((share * (1 - share) / len(examples)) ** 0.5 / (1 - task.baseline))
        assert result["centered_error"] == pytest.approx(errors[-1])
    assert found["mean_error"] == pytest.approx(np.linalg.norm(errors) / 3)
    assert found["mean"] == pytest.approx(np.mean(centered)) and not found["is_core"]
    assert (found["tasks"]["questions"]["cut"] == 6) == (name == "baseline")
    printed = capsys.readouterr().out
    assert f"mean {found['mean']:.4f}" in printed and "not CORE" in printed
    assert "step 4, val_loss 6.25000" in printed


def test_a_perfect_model_has_a_core_of_one_and_chance_none(place, monkeypatch, tmp_path, capsys):
    """With 22 tasks, all of their examples, and answers by rote."""
    lines, rows = ["icl_tasks:"], ["Eval Task,Random baseline"]
    data = tmp_path / "eval_data" / "a.jsonl"
    data.parent.mkdir()
    data.write_text("".join(json.dumps(dict(query="Q", choices=list("abcd"), gold=i % 4)) + "\n"
                            for i in range(8)))
    for i in range(22):
        lines += [f"- label: t{i}", "  dataset_uri: a.jsonl", "  num_fewshot: [0]",
                  "  icl_task_type: multiple_choice"]
        rows.append(f"t{i},25")
    (tmp_path / "core.yaml").write_text("\n".join(lines))
    (tmp_path / "eval_meta_data.csv").write_text("\n".join(rows))
    log = tmp_path / "modern.txt"
    log.write_text(our_log(train_steps=4, **BY_CORE))
    by_rote = [lambda task, example, scores: True,
               lambda task, example, scores: example["gold"] == 0]
    for is_right, mean, shown in zip(by_rote, (1.0, 0.0), ("1.0000", "0.0000"), strict=True):
        monkeypatch.setattr(core, "is_right", is_right)
        found = run(core.command_line, place, "--bundle", tmp_path)
        assert found["is_core"] and found["mean"] == pytest.approx(mean)
        assert f"CORE {shown} ± " in capsys.readouterr().out
        shutil.copy(place / "numbers.json", tmp_path / "modern.core.json")
        target = check(read_log(log)).findings["target"]
        assert target.status == (PASS if mean else FAIL) and f"CORE {mean:.6f};" in target.reason
    some = run(core.command_line, place, "--bundle", tmp_path, "--max_examples", 3)
    assert not some["is_core"] and some["tasks"]["t0"]["examples"] == 3
    one = run(core.command_line, place, "--bundle", tmp_path, "--tasks", "t3,t1")
    assert not one["is_core"] and list(one["tasks"]) == ["t1", "t3"]


def test_examples_come_in_the_order_of_other_implementations(tmp_path):
    (tmp_path / "eval_data").mkdir()
    lines = [json.dumps(dict(context=str(i), continuation="a")) for i in range(10)]
    (tmp_path / "eval_data" / "a.jsonl").write_text("\n".join(lines))
    found = core.read_examples(tmp_path, LM._replace(file="a.jsonl"))
    expected = list(range(10))
    random.Random(1337).shuffle(expected)
    assert [int(example["context"]) for example in found] == expected != list(range(10))


def test_max_examples_changes_no_example(place, monkeypatch):
    bundle = SAMPLE / "core_bundle"
    task = core.read_tasks(bundle)[0]
    examples, encoding = core.read_examples(bundle, task), load_encoding(place / "vocab")
    made = []

    def judged(count, make, judge, title):
        made.append([make(i) for i in range(count)])
        return [(True, False)] * count

    for count in (6, 2):
        core.measure(task, examples, count, encoding, judged)
    for whole, some in zip(made[0][:2], made[1], strict=True):
        for one, other in zip(whole, some, strict=True):
            assert one.tokens.tolist() == other.tokens.tolist() and one.count == other.count


def test_the_bundle_is_downloaded_once_and_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(core, "DOWNLOADS", tmp_path / "downloads")
    monkeypatch.setattr(core, "URL", (tmp_path / "b.zip").as_uri())
    (tmp_path / "b.zip").write_text("no archive")
    with pytest.raises(train_gpt.RunError, match="cannot unpack"):
        core.find_bundle()
    (tmp_path / "downloads" / "eval_bundle.zip").unlink()
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        for path in (SAMPLE / "core_bundle").rglob("*.*"):
            archive.write(path, Path("eval_bundle") / path.relative_to(SAMPLE / "core_bundle"))
    assert len(core.read_tasks(core.find_bundle())) == 3
    assert [path.name for path in (tmp_path / "downloads").iterdir()] == ["eval_bundle"]
    (tmp_path / "b.zip").unlink()
    assert len(core.read_tasks(core.find_bundle())) == 3


def test_bundles_that_cannot_be_used(place, tmp_path, capsys):
    fails = partial(failure, core.command_line, place, capsys)
    assert "core.yaml, eval_meta_data.csv and eval_data/" in fails("--bundle", tmp_path)
    bundle = ("--bundle", SAMPLE / "core_bundle")
    assert "no other; it has questions, who_was_it" in fails(*bundle, "--tasks", "questions,other")

    def write(task: str, baselines: str = "t,50", data: str = "") -> str:
        (tmp_path / "eval_data").mkdir(exist_ok=True)
        (tmp_path / "eval_data" / "a.jsonl").write_text(data)
        (tmp_path / "core.yaml").write_text(f"icl_tasks:\n- label: t\n  dataset_uri: a.jsonl\n"
                                            f"  num_fewshot: [0]\n  icl_task_type: {task}\n")
        (tmp_path / "eval_meta_data.csv").write_text(f"Eval Task,Random baseline\n{baselines}\n")
        return fails("--bundle", tmp_path)

    assert "tasks of kind essay" in write("essay")
    assert "KeyError: 't'" in write("schema", "u,50")
    assert "a.jsonl is empty" in write("schema")
    assert "a.jsonl is not as expected: line 1 has no gold" in write(
        "multiple_choice", data='{"query": "Q", "choices": ["a", "b"]}\n')
    assert "gold is 2, expected one of 0 to 1" in write(
        "multiple_choice", data='{"query": "Q", "choices": ["a", "b"], "gold": 2}\n')
