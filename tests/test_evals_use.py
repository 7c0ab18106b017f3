"""evals/sample.py, evals/bpb.py and evals/export.py, on tiny models on a CPU, without a network."""

import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import (
    ONE_RANK,
    ROOT,
    START,
    build,
    run_ranks,
    run_train,
    tiny_args,
    write_shard,
    write_tokens,
)

import train_gpt

sys.path.insert(0, str(ROOT / "evals"))
import bpb
import export
import sample

TEXTS = ["naïve 中文 🙂 and\n\nmore", "", "the cat — “so” — sat; <|endoftext|> is text", "ÄÖÜß" * 9]
TRAIN = (
    "--track sample --recipe sample --model_dim 16 --num_heads 2 --num_layers 2 "
    "--value_embeddings 1 --row_length 64 --max_document_length 64 --batch_size 256 "
    "--device_batch_size 128 --val_batch_size 256 --val_tokens 512 --train_steps 4 "
    "--val_loss_every 2 --window_start 128 --window_end 128 --run_id a.run --save_every -1"
).split()
TOKEN = "hf_" + "Secret" * 6
WRITTEN = ["README.md", "model.safetensors", "state.json", "train_gpt.py"]


def letters() -> Iterator[str]:
    """GPT-2's letters for the bytes, in the order of their ids."""
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    yield from map(chr, prints)
    yield from (chr(256 + n) for n in range(256 - len(prints)))


@pytest.fixture(scope="module")
def vocab(tmp_path_factory) -> Path:
    """A vocabulary as large as GPT-2's: bytes and pairs of them, which may cut a character."""
    folder = tmp_path_factory.mktemp("vocab") / "pairs"
    folder.mkdir()
    pairs = list(itertools.islice(itertools.product(letters(), letters()), START - 256))
    encoder = {token: i for i, token in enumerate([*letters(), *map("".join, pairs)])}
    (folder / "encoder.json").write_text(json.dumps(encoder | {"<|endoftext|>": START}), "utf-8")
    lines = ["#version: 0.2", *(f"{first} {second}" for first, second in pairs), ""]
    (folder / "vocab.bpe").write_text("\n".join(lines), "utf-8")
    return folder


def save(folder: Path, model: train_gpt.GPT, **state) -> Path:
    """A checkpoint as a run saves it; `state` by name."""
    step = state.get("step", 4)
    whole = dict(
        format=train_gpt.CHECKPOINT_FORMAT, hyperparameters=dataclasses.asdict(model.args),
        source="0" * 64, data=[["fineweb_train_000001.bin", 9, "ab"],
                               ["fineweb_val_000000.bin", 8, "cd"]],
        train_losses=[7.0] * step, val_losses=[[i, 8.0 - i / 10] for i in range(step + 1)],
        tokens=sum(map(model.args.batch_size_at, range(step))),
        reached=None, step=step, train_time=12.345, rng=[{"cpu": "AAAA"}], lr_multiplier=0.5)
    tensors = {train_gpt.MODEL_FILE: model.state_dict(),
               train_gpt.OPTIMIZER_FILE: {"x": torch.ones(1)}}
    return train_gpt.Checkpoints(folder, train_gpt.Log()).write(tensors, whole | state)


def call(module, *argv, vocab: Path | None = None) -> int:
    """Exit status of the script; a message counts as 1, as it does for Python."""
    options = [] if vocab is None else ["--vocab_dir", vocab]
    try:
        module.main([str(x) for x in (*argv, *options)])
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code
    return 0


def large_args(**overrides) -> train_gpt.Hyperparameters:
    """Tiny, but for the vocabulary, which is GPT-2's."""
    return tiny_args(**dict(vocab_size=START + 1, model_dim=16) | overrides)


RECIPES = {"sample": {}, "sample-baseline": dict(row_length=64, num_layers=2),
           "sample-record": dict(bigram_rows=97, sampled_vocab=0, num_layers=4)}


@pytest.fixture(scope="module", params=RECIPES)
def any_run(tmp_path_factory, request) -> Path:
    """A checkpoint of a random model of the recipe."""
    recipe = request.param
    overrides = RECIPES[recipe] | (dict(value_embeddings=0) if "baseline" in recipe else {})
    model = build(large_args(recipe=recipe, **overrides))
    return save(tmp_path_factory.mktemp("any") / "run", model)


# -----------------------------------------------------------------------------
# sample.py


def reciting(texts_tokens: list[int], folder: Path) -> Path:
    """A run whose model says these tokens, each of which stands there once, then <|endoftext|>."""
    args = large_args(model_dim=32, value_embeddings=0, skip_connections=False, logit_softcap=0.0)
    model = build(args, awake=False)  # blocks add nothing at first
    chain = [START, *texts_tokens, START]
    with torch.no_grad():
        known = train_gpt.norm(model.embed.weight[chain[:-1]], args.norm_eps)
        model.head[chain[1:]] = known
    return save(folder / "recites", model)


@pytest.mark.parametrize("prompt", ["", "naïve 🙂"])
def test_sample_prints_what_an_uncached_computation_gives(any_run, vocab, capsys, prompt):
    encoding = sample.load_encoding(vocab)
    model, windows, _ = train_gpt.load_run(str(any_run), torch.device("cpu"))
    tokens = prompt_tokens = [START, *encoding.encode_ordinary(prompt)]
    for _ in range(25):
        inputs = torch.tensor([tokens]).int()
        batch = train_gpt.MicroBatch(inputs, inputs, torch.tensor([0, len(tokens)]).int(),
                                     len(tokens), whole_rows=True)
        hidden = model.hidden(batch, windows)[0, -1:]
        tokens = [*tokens, model.logits(hidden).argmax().item()]
    text = encoding.decode(tokens[len(prompt_tokens):])
    assert call(sample, any_run, prompt, "--tokens", 25, "--temperature", 0, vocab=vocab) == 0
    out, err = capsys.readouterr()
    assert out == prompt + text + "\n"
    assert re.fullmatch(r"25 tokens in \d+\.\d\d s, \d+\.\d\d s of them for the first two; "
                        r"then [\d,]+ tokens per second\n", err)


class Terminal(io.RawIOBase):
    """Keeps what each write brings."""

    def __init__(self):
        self.writes = []

    def writable(self):
        return True

    def write(self, data):
        self.writes.append(bytes(data))
        return len(data)


def test_sample_streams_whole_characters_and_ends_with_the_document(
    tmp_path, vocab, capsys, monkeypatch
):
    text = "é中 ü🙂xyz"
    tokens = sample.load_encoding(vocab).encode_ordinary(text)
    assert len(set(tokens)) == len(tokens)
    run, terminal = reciting(tokens, tmp_path), Terminal()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(terminal), "latin-1"))
    assert call(sample, run, "--temperature", 0, "--tokens", 60, vocab=vocab) == 0
    pieces = [piece.decode("utf-8") for piece in terminal.writes]  # raises if one is cut
    assert pieces == ["é", "中", " ", "ü", "🙂", "xy", "z", "\n"]  # as they come
    assert f"{len(tokens) + 1} tokens in" in capsys.readouterr().err


def test_stream_text(vocab):
    """It reads no further than it writes, and bytes that are no text come out as in tiktoken."""
    encoding = sample.load_encoding(vocab)
    tokens = torch.randint(START, (500,)).tolist()
    assert "".join(sample.stream_text(tokens, encoding)) == encoding.decode(tokens)
    smile = [encoding.encode_single_token(bytes([byte])) for byte in "🙂".encode()]
    read = []
    pieces = sample.stream_text((read.append(x) or x for x in [*smile, *smile[:2]]), encoding)
    assert [next(pieces) for _ in range(4)] == ["", "", "", "🙂"] and read == smile
    assert list(pieces) == ["", "", "\ufffd"]
    assert "".join(sample.stream_text([START, START + 40], encoding)) == ""


def test_the_prompt_may_come_last(any_run, vocab, capsys):
    texts = []
    for words in ((any_run, "ab", "--tokens", 5), (any_run, "--tokens", 5, "ab")):
        assert call(sample, "--vocab_dir", vocab, "--temperature", 0, *words) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith("ab")


def test_samples_have_seeds(any_run, vocab, capsys):
    options = [any_run, "ab", "--tokens", 20, "--top_k", 50, "--top_p", 0.9]
    assert call(sample, *options, "-n", 2, "--seed", 7, vocab=vocab) == 0
    both = re.fullmatch("--- sample 1, seed 7\n(ab.*\n)--- sample 2, seed 8\n(ab.*\n)",
                        capsys.readouterr().out, re.DOTALL)
    assert both and both[1] != both[2]
    assert call(sample, *options, "--seed", 8, vocab=vocab) == 0
    assert capsys.readouterr().out == both[2]


@pytest.mark.parametrize("options, expected", [
    (["", "--tokens", 64], "1 tokens and 64 more are too many.* 64 tokens"),
    (["long " * 40, "--tokens", 1], "too many"),
    (["--log_dir", "nowhere"], None),
    (["--device", "nowhere"], "--device nowhere cannot be used.*--device cpu"),
    (["--vocab_dir", "nowhere"], "nowhere.*encoder.json"),
])
def test_sample_says_what_is_wrong(any_run, vocab, capsys, options, expected):
    run = any_run if expected else "unknown"
    options = options if "--vocab_dir" in options else [*options, "--vocab_dir", vocab]
    assert call(sample, run, *options) == 1
    assert re.search(expected or "no checkpoint of 'unknown' in nowhere", capsys.readouterr().err)


def test_sample_wants_the_vocabulary_of_the_model(tmp_path, vocab, capsys):
    run = save(tmp_path / "run", build(tiny_args()))
    assert call(sample, run, vocab=vocab) == 1
    assert re.search("50,256.*knows 256 tokens", capsys.readouterr().err)


@pytest.mark.parametrize("option", ["--tokens=0", "--temperature=-1", "--top_p=1.5", "--top_k=-1",
                                    "-n=0", "--temperature=nan"])
def test_sample_refuses_bad_options(option, capsys):
    assert call(sample, "run", option) == 2
    assert "expected" in capsys.readouterr().err


# -----------------------------------------------------------------------------
# bpb.py


def write_val(folder: Path, encoding) -> list[list[int]]:
    """A val shard whose targets are whole documents, in two rows; its documents' tokens."""
    documents = [encoding.encode_ordinary(text) for text in TEXTS]
    if sum(map(len, documents)) + len(documents) & 1 == 0:
        documents.append([])  # an even number of targets
    write_shard(folder / "t_val_000000.bin", documents)
    return documents


@pytest.fixture(scope="module")
def val_run(tmp_path_factory, vocab) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("bpb")
    documents = write_val(folder, bpb.load_encoding(vocab))
    tokens = sum(len(document) + 1 for document in documents) - 1
    sizes = dict.fromkeys(("val_tokens", "val_batch_size"), tokens) | dict.fromkeys(
        ("row_length", "max_document_length", "batch_size", "device_batch_size"), tokens // 2)
    args = large_args(data_path=folder, num_layers=4, bigram_rows=97, unigram_power=1.0,
                      key_offset=True, **sizes)
    model = build(args)
    return SimpleNamespace(path=save(folder / "run", model, step=4), folder=folder, model=model,
                           documents=documents, tokens=tokens)


def hand_loss(model, documents: list[list[int]]) -> float:
    """Nats of all tokens but the first, each within its document, and that within its row."""
    stream = [token for document in documents for token in (START, *document)]
    row = model.args.row_length
    starts = {i for i, token in enumerate(stream[:-1]) if token == START or i % row == 0}
    ends = [*sorted(starts), len(stream) - 1]
    total = 0.0
    for start, end in itertools.pairwise(ends):
        inputs = torch.tensor([stream[start:end]]).int()
        batch = train_gpt.MicroBatch(inputs, inputs, torch.tensor([0, end - start]).int(),
                                     end - start, whole_rows=True)
        with torch.no_grad():
            logits = model.logits(model.hidden(batch, (0, 0))[0])
        total += F.cross_entropy(logits.double(), torch.tensor(stream[start + 1 : end + 1]),
                                 reduction="sum").item()
    return total


def test_bpb_is_loss_in_bits_over_bytes_of_the_text(val_run, vocab, tmp_path, capsys):
    assert call(bpb, val_run.path, "--json", tmp_path / "bpb.json", vocab=vocab) == 0
    encoding = bpb.load_encoding(vocab)
    num_bytes = sum(len(encoding.decode(document).encode()) for document in val_run.documents)
    assert num_bytes == sum(len(text.encode()) for text in TEXTS)
    nats = hand_loss(val_run.model, val_run.documents)
    result = json.loads((tmp_path / "bpb.json").read_text())
    assert result["tokens"] == val_run.tokens and result["bytes"] == num_bytes
    assert result["val_loss"] == pytest.approx(nats / val_run.tokens, rel=1e-5)
    assert result["bpb"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert result["bytes_per_token"] == pytest.approx(num_bytes / val_run.tokens)
    assert result["step"] == 4
    assert result["shards"] == [path.name for path in val_run.folder.glob("*_val_*.bin")]
    out = capsys.readouterr().out
    for figure in (f"bpb {result['bpb']:.5f}", f"val_loss {result['val_loss']:.5f}",
                   f"{val_run.tokens:,} tokens", f"{num_bytes:,} bytes"):
        assert figure in out


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_bpb_of_other_tokens(val_run, vocab, tmp_path, rows):
    """In another folder, with two rows in each of two shards."""
    half = val_run.tokens // 2
    stream = [token for document in val_run.documents for token in (START, *document)]
    for number in (0, 1):
        write_tokens(tmp_path / f"x_val_{number:06d}.bin", stream)
    assert call(bpb, val_run.path, "--data_path", tmp_path, "--val_tokens", rows * half,
                "--json", tmp_path / "bpb.json", vocab=vocab) == 0
    result = json.loads((tmp_path / "bpb.json").read_text())
    targets = (stream[1:] + stream[1:])[: rows * half]
    raw = b"".join(bpb.load_encoding(vocab).decode_single_token_bytes(token)
                   for token in targets if token != START)
    assert (result["tokens"], result["bytes"]) == (rows * half, len(raw))


def test_bpb_passes_over_a_shard_that_has_not_one_row(val_run, vocab, tmp_path, capsys):
    shutil.copytree(val_run.folder, tmp_path / "data", ignore=shutil.ignore_patterns("run"))
    write_tokens(tmp_path / "data" / "a_val_000000.bin", [START, 5, 6])
    for folder in (val_run.folder, tmp_path / "data"):
        assert call(bpb, val_run.path, "--data_path", folder, vocab=vocab) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


def measure(ranks, run: str, vocab: Path) -> dict:
    options = SimpleNamespace(run=run, vocab_dir=vocab, log_dir="logs", data_path=None,
                              val_tokens=None)
    return bpb.bits_per_byte(options, ranks)


def test_bpb_on_two_ranks(val_run, vocab, tmp_path):
    """One row a rank; the figures are those of one process."""
    shutil.copytree(val_run.path, tmp_path / "run")
    state = train_gpt.read_state(tmp_path / "run")
    state["hyperparameters"]["val_batch_size"] = val_run.tokens // 2
    train_gpt.write_state(tmp_path / "run", state)
    one = measure(ONE_RANK, str(val_run.path), vocab)
    for two in run_ranks(measure, 2, tmp_path / "ranks", str(tmp_path / "run"), vocab):
        for name in ("bpb", "val_loss", "tokens", "bytes"):
            assert two[name] == pytest.approx(one[name], rel=1e-6)


@pytest.mark.parametrize("options, expected", [
    (["--data_path", "nowhere"], r"the 0 val shards .* in .*nowhere hold 0"),
    (["--val_tokens", "1"], "--val_tokens 1 must be a multiple of --row_length"),
    (["--val_tokens", "many"], r"validation needs [\d,]+ tokens .* 1 val shards"),
])
def test_bpb_says_what_is_wrong(val_run, vocab, capsys, options, expected):
    options = [str(10 * val_run.tokens) if option == "many" else option for option in options]
    assert call(bpb, val_run.path, *options, vocab=vocab) == 1
    assert re.search(expected, capsys.readouterr().err)


def test_bpb_wants_the_vocabulary_of_the_data(val_run, tmp_path, capsys):
    tokens = {token: i for i, token in enumerate([*letters(), "<|endoftext|>"])}
    (tmp_path / "encoder.json").write_text(json.dumps(tokens), "utf-8")
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\n", "utf-8")
    assert call(bpb, val_run.path, vocab=tmp_path) == 1
    assert re.search(r"hold token 50256, but .* ends at 256", capsys.readouterr().err)


# -----------------------------------------------------------------------------
# export.py


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with logs/ of a tiny run that was trained, logged and saved."""
    folder = tmp_path_factory.mktemp("trained")
    done = run_train(*TRAIN, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def read_card(folder: Path) -> str:
    return (folder / "README.md").read_text("utf-8")


def test_export_of_a_run(trained, tmp_path, capsys):
    out = tmp_path / "my-model"
    assert call(export, "a.run", out, "--log_dir", trained / "logs") == 0
    assert sorted(path.name for path in out.iterdir()) == WRITTEN
    saved = trained / "logs" / "a.run" / "step_000004"
    assert (out / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()
    assert (out / "train_gpt.py").read_bytes() == (ROOT / "train_gpt.py").read_bytes()
    state = json.loads((out / "state.json").read_text())
    full = json.loads((saved / "state.json").read_text())
    assert {"train_losses", "val_losses", "rng"} == full.keys() - state.keys()
    assert list(state["files"]) == ["model.safetensors"]
    assert "log_dir" not in state["hyperparameters"]

    before, windows, _ = train_gpt.load_run("a.run", torch.device("cpu"), str(trained / "logs"))
    model, exported_windows, _ = train_gpt.load_run(str(out), torch.device("cpu"))
    assert exported_windows == windows and model.args.row_length == 64
    for name, weight in before.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])

    card, log = read_card(out), (trained / "logs" / "a.run.txt").read_text()
    assert card.startswith("---\nlicense: mit\nlanguage:\n- en\ntags:\n")
    assert "datasets" not in card  # the sample is not called FineWeb
    assert "# my-model\n" in card
    step, loss = full["val_losses"][-1]
    assert f"| val_loss | {loss:.5f} nats per token, at step {step} |" in card
    for step, loss in full["val_losses"]:
        assert f"| {step} | {loss:.5f} |" in card
    for name, size, sha256 in full["data"]:
        assert f"| {name} | {size} | {sha256} |" in card
    assert f"| train_time | {full['train_time']:.1f} s |" in card
    assert "| training tokens | 1,024 |" in card
    assert "| model_dim | 16 |" in card
    assert re.search(r"\| hardware \| 1 x CPU: .*torch", card) and "CPU: " in log
    verdict = re.search(r"\| records/check.py \| (.*) \|", card)[1]
    assert verdict.startswith("not a record of sample: ") and "val tokens" in verdict
    assert "source" not in verdict  # what is exported is what the log begins with
    assert f"record: {verdict}" in capsys.readouterr().out


def test_export_takes_the_source_from_the_log(trained, tmp_path, monkeypatch):
    """As where train_gpt.py has changed since. Of a source that is not the run's it takes none."""
    monkeypatch.setattr(train_gpt, "read_source", lambda args: "another")
    shutil.copytree(trained / "logs", tmp_path / "logs")
    (tmp_path / "train_gpt.py").write_text("another")
    assert call(export, "latest", tmp_path / "a", "--log_dir", tmp_path / "logs") == 0
    assert (tmp_path / "a" / "train_gpt.py").read_bytes() == (ROOT / "train_gpt.py").read_bytes()
    assert "source" not in re.search(r"\| records/check.py \| (.*)", read_card(tmp_path / "a"))[1]

    log = tmp_path / "logs" / "a.run.txt"
    log.write_text(log.read_text().replace("import", "import ", 1))
    assert call(export, "a.run", tmp_path / "b", "--log_dir", tmp_path / "logs") == 0
    assert not (tmp_path / "b" / "train_gpt.py").exists()
    assert "| source | not here" in read_card(tmp_path / "b")

    log.unlink()
    assert call(export, "a.run", tmp_path / "c", "--log_dir", tmp_path / "logs") == 0
    assert "| records/check.py | not checked: there is no log" in read_card(tmp_path / "c")
    assert "| hardware | unknown |" in read_card(tmp_path / "c")


def test_export_has_the_kernels_too_if_the_run_used_them(tmp_path):
    args = large_args(triton_kernels=True, train_steps=4)
    source = hashlib.sha256(train_gpt.read_source(args).encode()).hexdigest()
    run = save(tmp_path / "run", build(args), source=source)
    assert call(export, run, tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        [*WRITTEN, "triton_kernels.py"])
    for name in ("train_gpt.py", "triton_kernels.py"):
        assert (tmp_path / "out" / name).read_bytes() == (ROOT / name).read_bytes()


def test_export_of_a_checkpoint_before_the_end(trained, tmp_path):
    """The verdict on the log is not one on these weights."""
    shutil.copytree(trained / "logs", tmp_path / "logs")
    folder = tmp_path / "logs" / "a.run" / "step_000004"
    train_gpt.write_state(folder, train_gpt.read_state(folder) | dict(step=2, tokens=512))
    assert call(export, folder, tmp_path / "out") == 0
    card = read_card(tmp_path / "out")
    assert "| not checked: the log ends at step 4, the checkpoint is of 2 |" in card
    assert "| step | 2 of 4 |" in card and "| training tokens | 512 |" in card


def test_export_of_every_recipe(any_run, vocab, tmp_path, capsys):
    """In 16 bits too; the scripts take the exported folder for a run, and say the same."""
    texts = {}
    for name in ("float32", "bfloat16"):
        out = tmp_path / name
        assert call(export, any_run, out, "--dtype", name) == 0
        capsys.readouterr()
        assert call(sample, out, "ab", "--tokens", 10, "--temperature", 0, vocab=vocab) == 0
        texts[name] = capsys.readouterr().out
    assert call(sample, any_run, "ab", "--tokens", 10, "--temperature", 0, vocab=vocab) == 0
    assert texts["float32"] == capsys.readouterr().out
    before = safetensors.torch.load_file(any_run / "model.safetensors")
    for name, x in safetensors.torch.load_file(tmp_path / "bfloat16/model.safetensors").items():
        assert torch.equal(x, before[name].bfloat16() if x.ndim > 1 else before[name]), name
        assert x.dtype == (torch.bfloat16 if x.ndim > 1 else torch.float32)
    card = read_card(tmp_path / "bfloat16")
    assert "datasets:\n- HuggingFaceFW/fineweb\n---\n" in card
    assert "bfloat16 |" in card


def test_export_of_what_fills_in_hidden_tokens_promises_no_texts(tmp_path):
    run = save(tmp_path / "run", build(large_args(masked_share=0.2, value_embeddings=0)))
    assert call(export, run, tmp_path / "out") == 0
    card = read_card(tmp_path / "out")
    assert "It fills in hidden tokens" in card and "sample.py" not in card


def test_export_names_no_folders_and_draws_a_short_curve(tmp_path):
    model = build(large_args(data_path=tmp_path / "home" / "mine", log_dir=tmp_path / "logs",
                             train_steps=100))
    run = save(tmp_path / "run", model, step=100)
    assert call(export, run, tmp_path / "out") == 0
    card, state = read_card(tmp_path / "out"), (tmp_path / "out" / "state.json").read_text()
    assert str(tmp_path) not in card + state
    settings = json.loads(state)["hyperparameters"]
    assert settings["data_path"] == "mine"
    assert not {"log_dir", "wandb_name", "wandb_project", "resume"} & settings.keys()
    curve = card.partition("## Validation")[2].partition("## Data")[0]
    rows = re.findall(r"^\| (\d+) \| [\d.-]+ \|$", curve, re.MULTILINE)
    assert len(rows) == 8 and rows[0] == "0" and rows[-1] == "100"


def test_export_does_not_tell_where_a_log_is_that_cannot_be_read(trained, tmp_path):
    shutil.copytree(trained / "logs", tmp_path / "secret")
    (tmp_path / "secret" / "a.run.txt").write_text("no run\n")
    assert call(export, tmp_path / "secret" / "a.run", tmp_path / "out") == 0
    card = read_card(tmp_path / "out")
    assert "not checked: a.run.txt holds no run" in card and "secret" not in card


def test_export_without_a_validation(tmp_path):
    run = save(tmp_path / "run", build(large_args()), val_losses=[])
    assert call(export, run, tmp_path / "out") == 0
    assert "| val_loss | not measured |" in read_card(tmp_path / "out")


def test_an_export_that_fails_is_not_in_the_way_of_the_next(any_run, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(export, "model_card", raise_no_space)
        assert call(export, any_run, tmp_path / "out") == 1
    assert "No space left" in capsys.readouterr().err and not any((tmp_path / "out").iterdir())
    assert call(export, any_run, tmp_path / "out") == 0


def raise_no_space(*args):
    raise OSError("No space left on device")


def test_export_refuses_a_folder_with_something_in_it(any_run, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    (tmp_path / "empty").mkdir()
    for name in ("full", "full/thesis.txt"):
        assert call(export, any_run, tmp_path / name) == 1
        assert "choose another" in capsys.readouterr().err
    assert os.listdir(tmp_path / "full") == ["thesis.txt"]
    assert call(export, any_run, tmp_path / "empty") == 0
    assert call(export, tmp_path / "empty", tmp_path / "again") == 1
    assert "is an exported model already" in capsys.readouterr().err
    assert call(export, "unknown", tmp_path / "again", "--log_dir", tmp_path) == 1
    assert "no checkpoint of 'unknown'" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


class Hub:
    """Stands for huggingface_hub.HfApi, and keeps what is asked of it. Anything else is an error.
    """

    calls: list[tuple[str, tuple, dict]] = []
    private, error = True, None

    def create_repo(self, *args, **kwargs):
        self.calls.append(("create_repo", args, kwargs))
        if self.error:
            raise self.error

    def repo_info(self, *args, **kwargs):
        return SimpleNamespace(private=self.private)

    def upload_folder(self, *args, **kwargs):
        self.calls.append(("upload_folder", args, kwargs))
        files = sorted(path.name for path in Path(kwargs["folder_path"]).iterdir())
        assert files == [name for name in WRITTEN if name != "train_gpt.py"]


@pytest.fixture
def hub(monkeypatch) -> type[Hub]:
    fake = type("FakeHub", (Hub,), dict(calls=[]))
    monkeypatch.setattr(huggingface_hub, "HfApi", fake)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return fake


@pytest.fixture(scope="module")
def small_run(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("small") / "run", build(tiny_args()))


@pytest.mark.parametrize("private", [False, True])
def test_push_adds_and_never_deletes(small_run, tmp_path, hub, capsys, private):
    options = ["--push", "someone/a-model", *["--private"] * private]
    assert call(export, small_run, tmp_path / "out", *options) == 0
    (create, args, created), (upload, none, uploaded) = hub.calls
    assert (create, args, upload, none) == (
        "create_repo", ("someone/a-model",), "upload_folder", ())
    assert created == dict(private=True if private else None, exist_ok=True)
    assert Path(uploaded.pop("folder_path")) == tmp_path / "out"
    assert uploaded.pop("commit_message")
    assert uploaded == dict(repo_id="someone/a-model")  # no patterns of what to delete
    out, err = capsys.readouterr()
    assert "https://huggingface.co/someone/a-model" in out and TOKEN not in out + err


@pytest.mark.parametrize("error", [
    ConnectionError("cannot reach huggingface.co"), OSError(f"Illegal header b'Bearer {TOKEN}'"),
    RuntimeError("403 Forbidden\nand more"),
])
def test_push_that_fails_keeps_the_folder(small_run, tmp_path, hub, capsys, error):
    hub.error = error
    assert call(export, small_run, tmp_path / "out", "--push", "someone/a-model") == 1
    out, err = capsys.readouterr()
    assert TOKEN not in out + err
    assert f"hf upload someone/a-model {tmp_path / 'out'} ." in err
    train_gpt.load_run(str(tmp_path / "out"), torch.device("cpu"))


def test_push_of_something_private_to_where_all_can_see_it(small_run, tmp_path, hub, capsys):
    hub.private = False
    assert call(export, small_run, tmp_path / "out", "--push", "someone/it", "--private") == 1
    assert "it is there already, and public" in capsys.readouterr().err
    assert [name for name, *_ in hub.calls] == ["create_repo"]


def test_push_without_a_login(small_run, tmp_path, hub, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert call(export, small_run, tmp_path / "out", "--push", "someone/a-model") == 1
    assert re.search("hf auth login.*HF_TOKEN", capsys.readouterr().err)
    assert not hub.calls and not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [["--push", "a-model"], ["--private"]])
def test_push_refuses_bad_options(options, hub, capsys):
    assert call(export, "run", "out", *options) == 2
    assert "USER/NAME" in capsys.readouterr().err and not hub.calls
