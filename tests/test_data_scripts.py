"""The scripts in data/ and the sample that is committed: on a CPU, without a network."""

import dataclasses
import gzip
import hashlib
import importlib.util
import itertools
import json
import lzma
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
import cached_fineweb10B as cached
import decode
import fineweb

import train_gpt
from train_gpt import RunError, check_shard, estimate_shards, parse_hyperparameters

ROOT = Path(__file__).resolve().parents[1]
MERGES = ["t h", "th e", "Ġ the", "a n", "an d"]  # Ġ stands for a space
EOT = 256 + len(MERGES)
TEXTS = [f"{i}: the cat and the dog{' and on' * (i % 7)}\n\n naïve 中文 🙂" for i in range(150)]
TEXTS[3] = "a literal <|endoftext|> is text\r\nlike any other"


def byte_letters() -> list[str]:
    """GPT-2's letter for each byte: itself if it prints, else one from code point 256 on."""
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in prints]
    letters = {byte: chr(byte) for byte in prints}
    letters |= {byte: chr(256 + n) for n, byte in enumerate(others)}
    return letters  # in the order of GPT-2's ids


def write_vocab(folder: Path, merges: list[str]) -> Path:
    """encoder.json and vocab.bpe of the 256 bytes and `merges`, then <|endoftext|>."""
    tokens = [*byte_letters().values(), *(merge.replace(" ", "") for merge in merges)]
    encoder = {token: id for id, token in enumerate([*tokens, "<|endoftext|>"])}
    folder.mkdir(parents=True)
    (folder / "encoder.json").write_text(json.dumps(encoder), encoding="utf-8")
    (folder / "vocab.bpe").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def vocab(tmp_path_factory) -> Path:
    return write_vocab(tmp_path_factory.mktemp("vocab") / "tiny", MERGES)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    lines = [json.dumps({"text": text, "id": index}) for index, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def make(*argv, vocab: Path, out: Path, **options) -> dict:
    """Run data/fineweb.py in this process and return its sidecar."""
    defaults = dict(name="t", out_dir=out, vocab_dir=vocab, val_tokens=100, num_workers=1)
    flags = [x for key, value in (defaults | options).items() for x in (f"--{key}", value)]
    fineweb.main([str(x) for x in (*argv, *flags)])
    return json.loads((out / "t.json").read_text())


def read_tokens(path: Path) -> np.ndarray:
    header = np.fromfile(path, dtype="<i4", count=256)
    tokens = np.fromfile(path, dtype="<u2", offset=1024)
    assert header[:3].tolist() == [20240520, 1, len(tokens)] and not header[3:].any()
    assert check_shard(path) == len(tokens)
    return tokens


def read_texts(*paths: Path) -> list[str]:
    """Texts of shards, decoded without the scripts; each shard must start with a document."""
    byte_of = {letter: byte for byte, letter in byte_letters().items()}
    strings = [*byte_letters().values(), *(merge.replace(" ", "") for merge in MERGES)]
    pieces = [bytes(byte_of[letter] for letter in string) for string in strings]
    texts = []
    for path in paths:
        tokens = read_tokens(path)
        starts = np.flatnonzero(tokens == EOT)
        assert starts[0] == 0
        for document in np.split(tokens, starts[1:]):
            texts.append(b"".join(pieces[token] for token in document[1:]).decode())
    return texts


def shards(out: Path, kind: str) -> list[Path]:
    return sorted(out.glob(f"t_{kind}_*.bin"))


def failure(capsys, main, *argv, **kwargs) -> str:
    """What a command that must fail tells the person."""
    with pytest.raises(SystemExit) as stop:
        main([str(x) for x in argv], **kwargs)
    assert stop.value.code not in (0, None)
    return capsys.readouterr().err + str(stop.value.code)


# -----------------------------------------------------------------------------
# data/fineweb.py


def test_round_trip(tmp_path, vocab):
    source = write_jsonl(tmp_path / "docs.jsonl", ["", *TEXTS, " \n"])
    sidecar = make(source, vocab=vocab, out=tmp_path / "out", shard_tokens=1_000)
    val, train = shards(tmp_path / "out", "val"), shards(tmp_path / "out", "train")
    assert [path.name for path in val] == ["t_val_000000.bin"]
    assert [path.name for path in train[:2]] == ["t_train_000001.bin", "t_train_000002.bin"]
    assert read_texts(*val, *train) == TEXTS
    assert sidecar["dropped"] == {"empty": 2, "in_val": 0}


def test_encoding(tmp_path, vocab):
    source = write_jsonl(tmp_path / "docs.jsonl", ["the the", "hand"])
    make(source, vocab=vocab, out=tmp_path, val_tokens=3)  # just what the first document has
    ids = {letter: id for id, letter in enumerate(byte_letters().values())}
    assert read_tokens(*shards(tmp_path, "val")).tolist() == [EOT, 257, 258]
    assert read_tokens(*shards(tmp_path, "train")).tolist() == [EOT, ids["h"], 260]


def test_a_vocabulary_is_read_anew(tmp_path, vocab):
    """tiktoken caches by path; a changed vocabulary in the same place must not go unnoticed."""
    code = "import sys, fineweb; from pathlib import Path\n" \
           "print(fineweb.load_encoding(Path(sys.argv[1])).eot_token)"
    for merges in (MERGES, MERGES[:2]):
        folder = write_vocab(tmp_path / "same", merges)
        run = subprocess.run([sys.executable, "-c", code, folder], cwd=ROOT / "data",
                             capture_output=True, text=True)
        assert run.stdout.strip() == str(256 + len(merges)), run.stderr
        shutil.rmtree(folder)


@pytest.mark.parametrize("val_tokens", [1, 100, 1_000])
def test_val_is_the_first_whole_documents(tmp_path, vocab, val_tokens):
    source = write_jsonl(tmp_path / "docs.jsonl", TEXTS)
    make(source, vocab=vocab, out=tmp_path, val_tokens=val_tokens)
    tokens = read_tokens(*shards(tmp_path, "val"))
    last = np.flatnonzero(tokens == EOT)[-1]
    assert last < val_tokens <= len(tokens)  # enough, and not one document more
    texts = read_texts(*shards(tmp_path, "val"))
    assert texts == TEXTS[: len(texts)]


def test_no_train_document_is_in_val(tmp_path, vocab):
    texts = [*TEXTS[:60], *TEXTS[:10], *TEXTS[50:60]]  # repeats of val and of train documents
    source = write_jsonl(tmp_path / "docs.jsonl", texts)
    sidecar = make(source, vocab=vocab, out=tmp_path, val_tokens=500)
    val, train = (read_texts(*shards(tmp_path, kind)) for kind in ("val", "train"))
    assert 5 < len(val) < 50
    assert not set(val) & set(train)
    assert Counter(train) == Counter(text for text in texts if text not in val)
    assert sidecar["dropped"]["in_val"] == sum(text in val for text in texts[len(val) :]) > 5


def test_sidecar(tmp_path, vocab):
    source = write_jsonl(tmp_path / "docs.jsonl", TEXTS)
    sidecar = make(source, vocab=vocab, out=tmp_path, shard_tokens=1_000)
    assert set(sidecar["files"]) == {path.name for path in tmp_path.glob("*.bin")}
    for name, entry in sidecar["files"].items():
        path, tokens = tmp_path / name, read_tokens(tmp_path / name)
        assert entry["tokens"] == len(tokens) and entry["bytes"] == path.stat().st_size
        assert entry["documents"] == (tokens == EOT).sum()
        assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sidecar["inputs"] == ["docs.jsonl"]
    assert str(tmp_path) not in (tmp_path / "t.json").read_text()


def test_any_number_of_workers_makes_the_same_shards(tmp_path, vocab):
    source = write_jsonl(tmp_path / "docs.jsonl", TEXTS * 4)
    one = make(source, vocab=vocab, out=tmp_path / "one", shard_tokens=5_000)
    two = make(source, vocab=vocab, out=tmp_path / "two", shard_tokens=5_000, num_workers=2)
    assert len(one["files"]) > 2 and one["files"] == two["files"]


def test_seed(tmp_path, vocab):
    source = write_jsonl(tmp_path / "docs.jsonl", TEXTS)
    texts = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make(source, vocab=vocab, out=tmp_path / name, seed=seed)
        texts[name] = read_texts(*shards(tmp_path / name, "val"), *shards(tmp_path / name, "train"))
        assert texts[name] != TEXTS and sorted(texts[name]) == sorted(TEXTS)
    assert texts["a"] == texts["b"] != texts["c"]


def test_only_a_document_larger_than_a_shard_is_split(tmp_path, vocab):
    long = "".join(f" {i}" for i in range(200))
    texts = [*TEXTS[:20], long, *TEXTS[20:30]]
    source = write_jsonl(tmp_path / "docs.jsonl", texts)
    make(source, vocab=vocab, out=tmp_path, shard_tokens=300)
    paths = shards(tmp_path, "train")
    assert max(map(check_shard, paths)) == 300
    parts = read_texts(*shards(tmp_path, "val"), *paths)
    assert "".join(parts) == "".join(texts)
    assert [part for part in parts if part not in long] == [*TEXTS[:30]]


def test_input_types(tmp_path, vocab):
    lines = write_jsonl(tmp_path / "a.jsonl", TEXTS[:5]).read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.replace(b'"text"', b'"body"')))
    (tmp_path / "c.jsonl.xz").write_bytes(lzma.compress(lines))
    (tmp_path / "d.txt").write_bytes(b"one document\r\nin two lines")
    for names, field, expected in (
        (["a.jsonl"], "text", TEXTS[:5]),
        (["b.jsonl.gz"], "body", TEXTS[:5]),
        (["d.txt", "c.jsonl.xz"], "text", ["one document\r\nin two lines", *TEXTS[:5]]),
    ):
        out = tmp_path / names[0].replace(".", "_")
        make(*(tmp_path / name for name in names), vocab=vocab, out=out, val_tokens=1, field=field)
        assert read_texts(*shards(out, "val"), *shards(out, "train")) == expected


def test_parquet(tmp_path, vocab, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"body": TEXTS, "n": range(150)}), tmp_path / "a.parquet")
    make(tmp_path / "a.parquet", vocab=vocab, out=tmp_path, field="body")
    assert read_texts(*shards(tmp_path, "val"), *shards(tmp_path, "train")) == TEXTS
    message = failure(capsys, fineweb.main, tmp_path / "a.parquet", "--name", "u", "--out_dir",
                      tmp_path, "--vocab_dir", vocab)
    assert "a.parquet" in message and "'text'" in message and "body, n" in message


def test_parquet_without_pyarrow(tmp_path, vocab, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    message = failure(capsys, fineweb.main, tmp_path / "a.parquet", "--name", "t", "--out_dir",
                      tmp_path, "--vocab_dir", vocab, "--num_workers", 1)
    assert "pip install pyarrow" in message


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("bad.jsonl", b'{"text": "good"}\n\n{"text": oops}\n', ["bad.jsonl", "line 3", "JSON"]),
        ("bad.jsonl", b'{"text": "good"}\n{"txt": "x"}\n', ["line 2", "'text'", "txt"]),
        ("bad.jsonl", b'{"text": "good"}\n{"text": 5}\n', ["bad.jsonl", "line 2", "'text'"]),
        ("bad.jsonl", b'{"text": "good"}\n["text"]\n', ["bad.jsonl", "line 2", "object"]),
        ("bad.jsonl", b'{"text": "good"}\n{"text": "\xff"}\n', ["bad.jsonl", "line 2"]),
        ("bad.jsonl.xz", lzma.compress(b'{"text": "good"}\n')[:-9], ["bad.jsonl.xz"]),
        ("bad.jsonl.gz", b"not gzip", ["bad.jsonl.gz"]),
        ("bad.txt", b"\xff\xfe", ["bad.txt", "utf-8"]),
        ("bad.csv", b"x", ["bad.csv", ".jsonl"]),
        ("bad.jsonl", None, ["bad.jsonl", "no such file"]),
    ],
)
def test_a_bad_input_leaves_nothing(tmp_path, vocab, capsys, name, content, expected, workers):
    good = write_jsonl(tmp_path / "good.jsonl", TEXTS)  # enough for several shards before the fault
    if content is not None:
        (tmp_path / name).write_bytes(content)
    out = tmp_path / "out"
    argv = [good, tmp_path / name, "--name", "t", "--out_dir", out, "--vocab_dir", vocab]
    argv += ["--val_tokens", 100, "--shard_tokens", 1_000, "--num_workers", workers]
    message = failure(capsys, fineweb.main, *argv)
    assert all(part in message for part in expected), message
    assert not out.exists() or not list(out.iterdir())


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--val_tokens", 10**6], ["1,000,000", "--val_tokens"]),
        (["--val_tokens", 0], ["--val_tokens", "got 0"]),
        (["--shard_tokens", 1], ["--shard_tokens", "got 1"]),
        (["--num_workers", 0], ["--num_workers", "got 0"]),
        (["--name", "../t"], ["--name", "'../t'"]),
        (["--dataset", "sample-10BT"], ["input files or --dataset"]),
        (["--vocab_dir", "nowhere"], ["nowhere", "encoder.json", "vocab.bpe"]),
    ],
)
def test_bad_options(tmp_path, vocab, capsys, options, expected):
    source = write_jsonl(tmp_path / "docs.jsonl", TEXTS)
    argv = [source, "--name", "t", "--out_dir", tmp_path, "--vocab_dir", vocab]
    message = failure(capsys, fineweb.main, *argv, "--num_workers", 1, *options)
    assert all(part in message for part in expected), message
    assert [path.name for path in tmp_path.iterdir()] == ["docs.jsonl"]


def test_no_inputs(tmp_path, capsys):
    assert "input" in failure(capsys, fineweb.main, "--name", "t", "--out_dir", tmp_path)


def test_val_must_leave_something_to_train_on(tmp_path, vocab, capsys):
    source = write_jsonl(tmp_path / "docs.jsonl", ["the cat"] * 5)
    message = failure(capsys, fineweb.main, source, "--name", "t", "--out_dir", tmp_path,
                      "--vocab_dir", vocab, "--val_tokens", 1, "--num_workers", 1)
    assert "none to train on" in message


def test_existing_shards_are_kept_unless_told(tmp_path, vocab, capsys):
    source = write_jsonl(tmp_path / "docs.jsonl", TEXTS)
    out = tmp_path / "out"
    make(source, vocab=vocab, out=out, shard_tokens=1_000)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    argv = [source, "--name", "t", "--out_dir", out, "--vocab_dir", vocab, "--num_workers", 1]
    assert "--overwrite" in failure(capsys, fineweb.main, *argv, "--val_tokens", 100)
    failure(capsys, fineweb.main, *argv, "--overwrite", "--val_tokens", 10**6)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before

    make(source, "--overwrite", vocab=vocab, out=out, val_tokens=200)
    assert sorted(path.name for path in out.iterdir()) == [
        "t.json", "t_train_000001.bin", "t_val_000000.bin",
    ]
    assert read_texts(*shards(out, "val"), *shards(out, "train")) == TEXTS


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no space")])
def test_shards_that_cannot_all_be_replaced_are_all_kept(tmp_path, vocab, monkeypatch, error):
    source, out = write_jsonl(tmp_path / "docs.jsonl", TEXTS), tmp_path / "out"
    make(source, vocab=vocab, out=out, shard_tokens=1_000)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    replace = os.replace
    for number in range(99):  # the move that fails

        def fail_once(source, target, number=number, calls=itertools.count()):  # noqa: B008
            if next(calls) == number:
                raise error
            replace(source, target)

        monkeypatch.setattr(fineweb.os, "replace", fail_once)
        try:
            make(source, "--overwrite", vocab=vocab, out=out, val_tokens=200)
            break
        except SystemExit:
            assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert number == len(before) + 3  # the old ones, and two shards and their sidecar
    assert {path.name for path in out.iterdir()} == {
        "t.json", "t_train_000001.bin", "t_val_000000.bin"}


def test_sigterm_leaves_nothing_behind(tmp_path, vocab, monkeypatch):
    source, out = write_jsonl(tmp_path / "docs.jsonl", TEXTS), tmp_path / "out"
    write_shard, handler = fineweb.write_shard, signal.getsignal(signal.SIGTERM)

    def write_and_ask(*args):
        write_shard(*args)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(fineweb, "write_shard", write_and_ask)
    try:
        with pytest.raises(SystemExit) as stop:
            make(source, vocab=vocab, out=out)
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert stop.value.code == 143 and list(out.iterdir()) == []


def test_a_shard_holds_no_more_tokens_than_its_header_can_count(tmp_path, capsys):
    message = failure(capsys, fineweb.main, "docs.jsonl", "--name", "t", "--out_dir", tmp_path,
                      "--shard_tokens", 2**31)
    assert "--shard_tokens" in message and "or fewer" in message


def test_ids_must_fit_16_bits(tmp_path, capsys):
    letters = list(byte_letters().values())
    pairs = [f"{first} {second}" for first in letters for second in letters]
    folder = write_vocab(tmp_path / "large", pairs[: 2**16 - 256])  # the last id is 2**16
    source = write_jsonl(tmp_path / "docs.jsonl", TEXTS)
    message = failure(capsys, fineweb.main, source, "--name", "t", "--out_dir", tmp_path / "out",
                      "--vocab_dir", folder, "--val_tokens", 1)
    assert "65,536" in message


def test_a_failure_has_no_traceback(tmp_path):
    argv = [sys.executable, ROOT / "data/fineweb.py", tmp_path / "gone.jsonl", "--name", "t"]
    run = subprocess.run([*argv, "--out_dir", tmp_path], capture_output=True, text=True)
    assert run.returncode == 1 and not run.stdout
    assert "gone.jsonl" in run.stderr and "Traceback" not in run.stderr


def test_interrupt_leaves_nothing(tmp_path, vocab, capsys, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(fineweb.os, "fsync", interrupt)
    source = write_jsonl(tmp_path / "docs.jsonl", TEXTS)
    with pytest.raises(SystemExit) as stop:
        make(source, vocab=vocab, out=tmp_path / "out")
    assert stop.value.code == 130 and not list((tmp_path / "out").iterdir())


def test_dataset_is_downloaded_file_by_file(tmp_path, vocab, monkeypatch):
    """The names that are asked of the hub, and the order; no parquet reader needed."""
    entry = namedtuple("entry", "path")
    asked = []

    class Api:
        def list_repo_tree(self, repository, folder, repo_type):
            assert (repository, folder, repo_type) == ("HuggingFaceFW/fineweb", "sample/10BT",
                                                       "dataset")
            return [entry(f"{folder}/{name}") for name in ("b.parquet", "README.md", "a.parquet")]

    def download(repository, filename, repo_type):
        asked.append(filename)
        return str(tmp_path / filename)

    def read(path, field):
        assert asked[-1].endswith(path.name)
        yield "line 1", {"text": f"the text of {path.name}"}

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(fineweb, "read_parquet", read)
    sidecar = make("--dataset", "sample-10BT", vocab=vocab, out=tmp_path, val_tokens=1)
    assert asked == ["sample/10BT/a.parquet", "sample/10BT/b.parquet"]
    assert read_texts(*shards(tmp_path, "train")) == ["the text of b.parquet"]
    assert "sample-10BT" in sidecar["inputs"][0]


# -----------------------------------------------------------------------------
# data/decode.py


def test_decode(tmp_path, vocab, capsys):
    source = write_jsonl(tmp_path / "docs.jsonl", TEXTS)
    make(source, vocab=vocab, out=tmp_path, val_tokens=2_000)
    (path,) = shards(tmp_path, "val")
    capsys.readouterr()
    decode.main([str(path), "--vocab_dir", str(vocab), "--start", "3", "--documents", "2"])
    out = capsys.readouterr().out
    starts = np.flatnonzero(read_tokens(path) == EOT)
    headers = [f"--- document {i}, token offset {starts[i]}, {starts[i + 1] - starts[i]} tokens"
               for i in (3, 4)]
    assert out == f"{headers[0]}\n{TEXTS[3]}\n{headers[1]}\n{TEXTS[4]}\n"


def test_decode_ends_with_the_shard(tmp_path, vocab, capsys):
    make(write_jsonl(tmp_path / "docs.jsonl", TEXTS), vocab=vocab, out=tmp_path, val_tokens=150)
    (path,) = shards(tmp_path, "val")
    texts = read_texts(path)
    argv = [str(path), "--vocab_dir", str(vocab)]
    capsys.readouterr()
    decode.main([*argv, "--documents", "1000"])
    assert capsys.readouterr().out.count("--- document") == len(texts) > 3
    decode.main(argv)
    assert capsys.readouterr().out.count("--- document") == 3
    message = failure(capsys, decode.main, *argv, "--start", len(texts))
    assert f"0 to {len(texts) - 1}" in message


def test_decode_of_a_shard_that_starts_within_a_document(tmp_path, vocab, capsys):
    path = write_fake_shard(tmp_path / "x.bin", [257, 258, EOT, 260])
    decode.main([str(path), "--vocab_dir", str(vocab)])
    lines = capsys.readouterr().out.splitlines()
    assert "continued" in lines[0] and "offset 0, 2 tokens" in lines[0]
    assert lines[1:] == ["the the", "--- document 1, token offset 2, 2 tokens", "and"]


def test_decode_refuses_what_it_cannot_read(tmp_path, vocab, capsys):
    argv = ["--vocab_dir", vocab]
    assert "gone.bin" in failure(capsys, decode.main, tmp_path / "gone.bin", *argv)
    foreign = write_fake_shard(tmp_path / "x.bin", [EOT, 50_000])
    assert "50000" in failure(capsys, decode.main, foreign, *argv)
    foreign.write_bytes(b"text" * 1_000)
    assert "x.bin" in failure(capsys, decode.main, foreign, *argv)


# -----------------------------------------------------------------------------
# data/cached_fineweb10B.py


def write_fake_shard(path: Path, tokens: list[int]) -> Path:
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + np.array(tokens, dtype="<u2").tobytes())
    return path


class HubError(Exception):
    """An error of the hub's client with the HTTP status it got."""

    def __init__(self, status: int):
        super().__init__(f"status {status}")
        self.response = namedtuple("Response", "status_code")(status)


class Hub:
    """Stands in for the network: does the `faults` one by one, then gives whole shards."""

    def __init__(self, faults=()):
        self.faults, self.asked, self.pauses = list(faults), [], []

    def fetch(self, filename: str, folder: Path) -> None:
        self.asked.append(filename)
        assert not (folder / filename).exists()
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, BaseException):
            raise fault
        write_fake_shard(folder / filename, [50_256, 1, 2])
        if fault == "truncated":
            (folder / filename).write_bytes((folder / filename).read_bytes()[:-1])


@pytest.fixture
def connect(monkeypatch):
    def connect(*faults, free=10**12) -> Hub:
        hub = Hub(faults)
        monkeypatch.setattr(cached, "fetch", hub.fetch)
        monkeypatch.setattr(cached.time, "sleep", hub.pauses.append)
        usage = namedtuple("usage", "free")(free)
        monkeypatch.setattr(cached.shutil, "disk_usage", lambda folder: usage)
        return hub

    return connect


def wanted(num_shards: int) -> list[str]:
    train = [f"fineweb_train_{number:06d}.bin" for number in range(1, num_shards + 1)]
    return ["fineweb_val_000000.bin", *train]


def test_download(tmp_path, connect, capsys):
    hub = connect()
    cached.main(["3"], tmp_path / "new" / "folder")
    assert hub.asked == wanted(3)
    out = capsys.readouterr().out
    assert "4 files" in out and "0.8 GB" in out
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == \
        sorted(wanted(3))


@pytest.mark.parametrize("options", [[], ["--recipe", "baseline"], ["--train_steps", "600"]])
def test_download_what_the_run_reads(tmp_path, connect, options):
    hub = connect()
    cached.main(options, tmp_path)
    run = parse_hyperparameters(["--track", "single-gpu", *options])
    assert hub.asked == wanted(estimate_shards(run))
    if options == ["--recipe", "baseline"]:
        assert len(hub.asked) == 1 + 26  # 4,768 steps of 524,288 tokens


def test_whole_files_are_kept_and_others_fetched(tmp_path, connect, capsys):
    for name in wanted(2):
        write_fake_shard(tmp_path / name, [50_256, 7])
    with open(tmp_path / wanted(2)[1], "r+b") as file:
        file.truncate(1_025)
    hub = connect()
    cached.main(["2"], tmp_path)
    assert hub.asked == [wanted(2)[1]]
    assert check_shard(tmp_path / wanted(2)[1]) == 3
    assert "1 files to fetch, 0.2 GB; 2 are there" in capsys.readouterr().out
    cached.main(["2"], tmp_path)
    assert len(hub.asked) == 1


def test_a_truncated_download_is_fetched_again_once(tmp_path, connect, capsys):
    hub = connect("truncated")
    cached.main(["1"], tmp_path)
    assert hub.asked == [wanted(1)[0], *wanted(1)]
    assert all(check_shard(tmp_path / name) for name in wanted(1))

    hub = connect("truncated", "truncated")
    message = failure(capsys, cached.main, "1", folder=tmp_path / "other")
    assert wanted(1)[0] in message and "twice" in message
    assert len(hub.asked) == 2 and not list((tmp_path / "other").iterdir())


def test_failures_that_may_pass_are_retried(tmp_path, connect):
    hub = connect(HubError(429), HubError(503), ConnectionResetError("reset"))
    cached.main(["1"], tmp_path)
    assert hub.asked == [wanted(1)[0]] * 4 + wanted(1)[1:]
    assert hub.pauses == sorted(set(hub.pauses)) and len(hub.pauses) == 3


@pytest.mark.parametrize("fault, attempts", [(HubError(404), 1), (PermissionError("no"), 1)])
def test_failures_that_stay_are_not_retried(tmp_path, connect, capsys, fault, attempts):
    hub = connect(*[fault] * 10)
    failure(capsys, cached.main, "1", folder=tmp_path)
    assert len(hub.asked) == attempts and not hub.pauses


def test_offline(tmp_path, connect, capsys):
    hub = connect(*[OSError("Name or service not known")] * 100)
    message = failure(capsys, cached.main, "1", folder=tmp_path)
    assert "Name or service not known" in message and "connection" in message
    assert "data/fineweb.py" in message
    assert 1 < len(hub.asked) < 10


def test_too_little_disk(tmp_path, connect, capsys):
    hub = connect(free=500_000_000)
    message = failure(capsys, cached.main, "2", folder=tmp_path)
    assert "0.5 GB free" in message and "0.6 GB" in message
    assert not hub.asked
    write_fake_shard(tmp_path / wanted(2)[0], [50_256, 7])  # what is there needs no room
    cached.main(["2"], tmp_path)
    assert hub.asked == wanted(2)[1:]


@pytest.mark.parametrize("count", ["0", "104", "-1", "many", "1.5"])
def test_bad_number_of_shards(tmp_path, connect, capsys, count):
    hub = connect()
    assert count in failure(capsys, cached.main, count, folder=tmp_path / "new")
    assert not hub.asked and not (tmp_path / "new").exists()


def test_bad_option(tmp_path, connect, capsys):
    assert "nonsense" in failure(capsys, cached.main, "--recipe", "nonsense", folder=tmp_path)


def test_interrupted_download(tmp_path, connect, capsys):
    connect(KeyboardInterrupt())
    with pytest.raises(SystemExit) as stop:
        cached.main(["1"], tmp_path)
    assert stop.value.code == 130 and "again" in capsys.readouterr().err


# -----------------------------------------------------------------------------
# data/sample


def test_sample():
    folder = ROOT / "data" / "sample"
    text = (folder / "sample.json").read_text(encoding="utf-8")
    sidecar = json.loads(text)
    assert set(sidecar["files"]) == {path.name for path in folder.glob("*.bin")}
    seen = {}
    for name, entry in sidecar["files"].items():
        tokens = read_tokens(folder / name)
        starts = np.flatnonzero(tokens == 50_256)
        assert starts[0] == 0 and len(starts) == entry["documents"] and tokens.max() == 50_256
        assert len(tokens) == entry["tokens"]
        content = (folder / name).read_bytes()
        assert len(content) == entry["bytes"]
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]
        seen[name] = {document.tobytes() for document in np.split(tokens, starts[1:])}
    assert check_shard(folder / "sample_val_000000.bin") > 98_304
    assert check_shard(folder / "sample_train_000001.bin") > 2_000_000
    assert not seen["sample_val_000000.bin"] & seen["sample_train_000001.bin"]
    assert all("/" not in name and "\\" not in name for name in sidecar["inputs"])


# -----------------------------------------------------------------------------
# data/check.py


@pytest.fixture
def data_check():
    # records/ has a module of that name too.
    spec = importlib.util.spec_from_file_location("data_check", ROOT / "data" / "check.py")
    check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check)
    return check


@pytest.mark.parametrize("world_size, free, expected, has_graphs", [
    (1, 78, None, True), (2, 78, None, True), (4, 78, 32_768, True), (8, 78, 16_384, True),
    (1, 30, 32_768, True), (1, 22, 16_384, True), (2, 13, 16_384, False)])
def test_the_advice_fits_the_memory_and_the_ranks(
        data_check, monkeypatch, world_size, free, expected, has_graphs):
    args = parse_hyperparameters(["--track", "gpt2-small", "--recipe", "small"])
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    advice = data_check.advise(args, free)
    assert re.findall(r"--device_batch_size (\d+)", advice) == [str(expected)] * bool(expected)
    assert advice.endswith(" --cuda_graphs false") == (not has_graphs)
    args = dataclasses.replace(args, device_batch_size=expected or args.device_batch_size)
    train_gpt.check_accumulation(args, world_size)


@pytest.mark.parametrize("world_size, status", [("8", 0), ("6", 1)])
def test_there_is_no_advice_for_ranks_that_cannot_share_the_steps(
        data_check, monkeypatch, capsys, world_size, status):
    monkeypatch.setenv("WORLD_SIZE", world_size)
    monkeypatch.setattr(sys, "argv", "check.py --advise --track gpt2-small --recipe small".split())
    assert data_check.main() == status
    told = "error: a step of --batch_stages 131072 is 8 rows of --row_length 16384, which 6 ranks"
    assert (told in capsys.readouterr().err) == status


@pytest.mark.parametrize("world_size, is_ready", [(2, True), (3, False)])
def test_a_batch_that_ranks_cannot_share_is_told_with_gpus_too(
        data_check, monkeypatch, capsys, world_size, is_ready):
    args = parse_hyperparameters(["--track", "gpt2-small", "--recipe", "small"])
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    monkeypatch.setattr(data_check.torch.cuda, "is_available", lambda: True)
    report = data_check.Report()
    data_check.check_batch(report, args)
    assert report.ready == is_ready
    assert ("which 3 ranks cannot share" in capsys.readouterr().out) != is_ready


def test_the_advice_fits_modern_on_a_card_of_16_gb_and_on_none_of_12(data_check, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    args = parse_hyperparameters(["--track", "single-gpu", "--recipe", "modern"])
    assert data_check.advise(args, 15.5) == "--device_batch_size 16384 --val_batch_size 16384"
    with pytest.raises(RunError, match="about 14 GiB .* are needed at least, but 12 GiB are free"):
        data_check.advise(args, 11.7)


def test_the_estimate_of_memory_agrees_with_what_readme_measured(data_check):
    rows = re.findall(r"^\| `(\S+)` \| ([\d,]+)(?: \(default\))?(?:, `(.*)`)? \| .* / ([\d,]+) MiB",
                      (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"modern", "baseline", "record"} <= {row[0] for row in rows}
    for recipe, size, options, reserved in rows:
        args = parse_hyperparameters(["--track", "single-gpu", "--recipe", recipe,
                                      "--device_batch_size", size.replace(",", ""),
                                      *options.split()])
        measured = int(reserved.replace(",", "")) / 1024 + 0.5  # and CUDA's own
        assert data_check.estimate_memory(args) == pytest.approx(measured, rel=0.1), (recipe, size)
