"""Make shards of GPT-2 tokens from your own text, or from FineWeb itself.

    python data/fineweb.py docs.jsonl more.jsonl.xz --name mine --out_dir data/mine
    python data/fineweb.py books/*.txt --name books --out_dir data/books --val_tokens 100000
    python data/fineweb.py --dataset sample-10BT --name fineweb --out_dir data/fineweb

Inputs: JSON lines (.jsonl, .jsonl.gz, .jsonl.xz), parquet, or plain text (one file, one document).
The first whole documents with --val_tokens tokens become the val shard, the others the train
shards. A document is <|endoftext|> and its text; nothing in a text counts as a special token.
"""

import argparse
import functools
import gzip
import hashlib
import itertools
import json
import lzma
import math
import multiprocessing
import os
import platform
import random
import re
import signal
import sys
import tempfile
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tqdm import tqdm

# train_gpt is imported where it is needed: the workers import this file, and can do without torch.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
OPENERS = {".jsonl": open, ".gz": gzip.open, ".xz": lzma.open}
INPUT_TYPES = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".parquet", ".txt")
DATASETS = ("sample-10BT", "sample-100BT", "sample-350BT")
MOST_TOKENS = 2_000_000_000  # of a shard, whose header counts them in 32 bits
BATCH = 64  # documents that a worker gets at once

# -----------------------------------------------------------------------------
# Text


def read_text(path: Path, field: str) -> Iterator[tuple[str, dict]]:
    yield "it", {field: path.read_bytes().decode()}  # bytes: line ends stay as they are


def read_jsonl(path: Path, field: str) -> Iterator[tuple[str, dict]]:
    with OPENERS[path.suffix](path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                if line.strip():
                    yield f"line {number}", json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number} is not JSON: {error}") from None


def read_parquet(path: Path, field: str) -> Iterator[tuple[str, dict]]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError("parquet needs pyarrow: pip install pyarrow") from None
    with ParquetFile(path) as table:
        # Without the column, all others are read, so that the error can name them.
        columns = [field] if field in table.schema_arrow.names else None
        batches = table.iter_batches(columns=columns)
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
        yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))


def read_documents(path: Path, field: str) -> Iterator[str]:
    """Texts of one file; ValueError with the file, and the line or row, if it cannot be read."""
    read = {".txt": read_text, ".parquet": read_parquet}.get(path.suffix, read_jsonl)
    try:
        for place, record in read(path, field):
            if not isinstance(record, dict):
                raise ValueError(f"{place} is not a JSON object")
            if not isinstance(record.get(field), str):
                raise ValueError(f"{place} has no text in field {field!r}; its fields are: "
                                 f"{', '.join(record)} (--field names another)")
            yield record[field]
    except (ValueError, OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path}: {error}") from error


def dataset_files(dataset: str) -> Iterator[Path]:
    """Parquet files of a FineWeb sample, each downloaded just before it is read."""
    from cached_fineweb10B import retry
    from huggingface_hub import HfApi, hf_hub_download

    repository, folder = "HuggingFaceFW/fineweb", dataset.replace("-", "/")
    listing = retry(lambda: list(HfApi().list_repo_tree(repository, folder, repo_type="dataset")))
    for filename in sorted(entry.path for entry in listing if entry.path.endswith(".parquet")):
        yield Path(retry(hf_hub_download, repository, filename, repo_type="dataset"))


# -----------------------------------------------------------------------------
# Tokens


@functools.cache
def load_encoding(vocab_dir: Path | None) -> tiktoken.Encoding:
    """GPT-2's encoding from tiktoken, or one like it from `encoder.json` and `vocab.bpe`.

    <|endoftext|> gets the id after the last of the merges. ValueError if the files do not fit.
    """
    if vocab_dir is None:
        try:
            return tiktoken.get_encoding("gpt2")
        except OSError as error:
            raise ValueError(f"tiktoken cannot download GPT-2's vocabulary ({error}); check the "
                             "connection, or give --vocab_dir FOLDER with encoder.json and "
                             "vocab.bpe") from None
    files = [vocab_dir / name for name in ("vocab.bpe", "encoder.json")]
    try:
        # With the hashes, tiktoken's cache cannot return what was at the same path before.
        hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
        ranks = data_gym_to_mergeable_bpe_ranks(*map(str, files), *hashes)
    except (ValueError, AssertionError, KeyError, OSError) as error:
        raise ValueError(f"{vocab_dir} is no vocabulary in GPT-2's format, encoder.json and "
                         f"vocab.bpe: {type(error).__name__} {error}") from error
    return tiktoken.Encoding(
        vocab_dir.resolve().name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": len(ranks)},
    )


def encode_batch(vocab_dir: Path | None, texts: list[str]) -> list[np.ndarray]:
    """Each text as uint16 tokens [length], the first of which is <|endoftext|>."""
    encoding = load_encoding(vocab_dir)
    return [
        np.array([encoding.eot_token, *encoding.encode_ordinary(text)], dtype="<u2")
        for text in texts
    ]


def tokenize(texts: Iterator[str], vocab_dir: Path | None, workers: int) -> Iterator[np.ndarray]:
    """Documents [length] uint16 of the texts, in their order whatever the number of workers."""
    batches = iter(lambda: list(itertools.islice(texts, BATCH)), [])
    if workers == 1:
        for batch in batches:
            yield from encode_batch(vocab_dir, batch)
        return
    ignore_interrupt = (signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    context = multiprocessing.get_context("spawn")  # the same on every system
    with ProcessPoolExecutor(workers, context, signal.signal, ignore_interrupt) as pool:
        pending = deque()
        for batch in batches:
            pending.append(pool.submit(encode_batch, vocab_dir, batch))
            if len(pending) > 4 * workers:  # bounds the memory: read no further ahead
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


# -----------------------------------------------------------------------------
# Shards


def drop_empty(texts: Iterable[str], dropped: Counter) -> Iterator[str]:
    """Texts that hold more than white space; counts the others."""
    for text in texts:
        if text.strip():
            yield text
        else:
            dropped["empty"] += 1


def drop_val(documents: Iterable[np.ndarray], val: list[np.ndarray], dropped: Counter):
    """Documents that are not in `val`; counts the others."""
    digests = {hashlib.sha256(tokens).digest() for tokens in val}  # the tokens determine the text
    for tokens in documents:
        if hashlib.sha256(tokens).digest() in digests:
            dropped["in_val"] += 1
        else:
            yield tokens


def take(documents: Iterator[np.ndarray], num_tokens: int) -> list[np.ndarray]:
    """The first whole documents with `num_tokens` tokens or more; ValueError if there are less."""
    taken, size = [], 0
    while size < num_tokens:
        if (tokens := next(documents, None)) is None:
            raise ValueError(f"--val_tokens is {num_tokens:,}, but the inputs have {size:,} tokens "
                             "in all; give a smaller --val_tokens or more text")
        taken.append(tokens)
        size += len(tokens)
    return taken


def pack(documents: Iterable[np.ndarray], shard_tokens: int) -> Iterator[list[np.ndarray]]:
    """The documents of one shard after the other, none of them cut unless larger than a shard.

    Such a document becomes several, so that each shard starts with a document's first token.
    """
    shard, size = [], 0
    for document in documents:
        for start in range(1, len(document), shard_tokens - 1):
            tokens = np.append(document[:1], document[start : start + shard_tokens - 1])
            if size + len(tokens) > shard_tokens:
                yield shard
                shard, size = [], 0
            shard.append(tokens)
            size += len(tokens)
    if shard:
        yield shard


def write_shard(path: Path, documents: list[np.ndarray], document_start: int) -> dict:
    """Write one shard to the disk and return its entry in the sidecar."""
    from train_gpt import SHARD_HEADER_INTS, SHARD_MAGIC, SHARD_VERSION, check_shard

    tokens = np.concatenate(documents)
    header = np.zeros(SHARD_HEADER_INTS, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(tokens)
    with open(path, "wb") as file:
        file.write(header)
        file.write(tokens)
        file.flush()
        os.fsync(file.fileno())
    sha256 = hashlib.sha256(header)
    sha256.update(tokens)
    return {
        "tokens": check_shard(path),
        "documents": int(np.count_nonzero(tokens == document_start)),
        "bytes": path.stat().st_size,
        "sha256": sha256.hexdigest(),
    }


def make_shards(args: argparse.Namespace, folder: Path) -> dict:
    """Write all shards into `folder` and return the sidecar; ValueError on any bad input."""
    encoding = load_encoding(args.vocab_dir)
    if encoding.max_token_value >= 2**16:
        raise ValueError(f"the vocabulary has ids up to {encoding.max_token_value:,}, but a shard "
                         f"holds ids below {2**16:,}; use a smaller vocabulary")
    paths = dataset_files(args.dataset) if args.dataset else args.inputs
    texts = (text for path in paths for text in read_documents(path, args.field))
    if args.seed is not None:
        texts = list(texts)
        random.Random(args.seed).shuffle(texts)
    dropped = Counter(empty=0, in_val=0)
    bar = tqdm(drop_empty(texts, dropped), unit=" documents", disable=None)
    documents = tokenize(iter(bar), args.vocab_dir, args.num_workers)

    val = take(documents, args.val_tokens)
    train = drop_val(documents, val, dropped)
    shards = itertools.chain([val], pack(train, args.shard_tokens))
    files = {}
    for number, shard in enumerate(shards):
        name = f"{args.name}_{'train' if number else 'val'}_{number:06d}.bin"
        files[name] = write_shard(folder / name, shard, encoding.eot_token)
    if len(files) == 1:
        raise ValueError("the val shard took all documents and left none to train on; give a "
                         "smaller --val_tokens or more text")
    return {
        "files": files,
        "inputs": [f"HuggingFaceFW/fineweb {args.dataset}"] if args.dataset
                  else [path.name for path in args.inputs],
        "encoding": {"name": encoding.name, "document_start": encoding.eot_token},
        "options": {key: getattr(args, key)
                    for key in ("field", "seed", "shard_tokens", "val_tokens")},
        "dropped": dropped,
        "versions": {"python": platform.python_version(), "numpy": np.__version__,
                     "tiktoken": tiktoken.__version__},
    }


def publish(args: argparse.Namespace) -> dict:
    """Make the shards and put them into --out_dir all together, or none of them."""
    for path in args.inputs:
        if not path.name.endswith(INPUT_TYPES):
            raise ValueError(f"{path}: expected a file name that ends in {', '.join(INPUT_TYPES)}")
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
    ours = re.compile(re.escape(args.name) + r"(_(train|val)_\d+\.bin|\.json)")
    args.out_dir.mkdir(parents=True, exist_ok=True)
    old = [path for path in sorted(args.out_dir.iterdir()) if ours.fullmatch(path.name)]
    if old and not args.overwrite:
        raise ValueError(f"{args.out_dir} holds {old[0].name} already; give another --name or "
                         "--out_dir, or --overwrite to replace it")
    prefix = f".{args.name}."
    with tempfile.TemporaryDirectory(".tmp", prefix, args.out_dir) as folder:
        sidecar = make_shards(args, Path(folder))
        new = [Path(folder, name) for name in (*sidecar["files"], f"{args.name}.json")]
        new[-1].write_text(json.dumps(sidecar, indent=2) + "\n", encoding="utf-8")
        # The sidecar goes first and comes last: where it is, the set is whole.
        old.sort(key=lambda path: path.suffix != ".json")
        aside = Path(folder, "old")
        aside.mkdir()
        move_all([(path, place / path.name)
                  for paths, place in ((old, aside), (new, args.out_dir)) for path in paths])
    return sidecar


def move_all(moves: list[tuple[Path, Path]]) -> None:
    """Rename each first path to the second, in order; on an error or Ctrl-C none of them."""
    try:
        for source, target in moves:
            os.replace(source, target)
    except BaseException:
        for source, target in reversed(moves):
            if not source.exists():
                os.replace(target, source)
        raise


def main(argv: list[str] | None = None) -> None:
    """Command line; exits with a message on any failure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("inputs", nargs="*", type=Path, metavar="FILE", help=", ".join(INPUT_TYPES))
    add("--dataset", choices=DATASETS, help="download this part of FineWeb as the input")
    add("--out_dir", type=Path, required=True, help="folder of the shards")
    add("--name", required=True, help="NAME_train_000001.bin, NAME_val_000000.bin, NAME.json")
    add("--field", default="text", help="JSON field or parquet column (default: %(default)s)")
    add("--shard_tokens", type=int, default=100_000_000, help="at most (default: %(default)s)")
    add("--val_tokens", type=int, default=10_485_761,
        help="of the val shard, at least (default: %(default)s)")
    add("--seed", type=int, help="shuffle the documents, all held in memory (default: keep order)")
    add("--num_workers", type=int, default=os.cpu_count() or 1, help="default: %(default)s")
    add("--vocab_dir", type=Path, help="folder of encoder.json and vocab.bpe (default: download)")
    add("--overwrite", action="store_true", help="replace the shards of this name")
    args = parser.parse_args(argv)
    if bool(args.inputs) == bool(args.dataset):
        parser.error("expected input files or --dataset, one of the two")
    if not re.fullmatch(r"\w[\w.-]*", args.name):
        parser.error(f"--name: got {args.name!r}, expected letters, digits, '_', '-' and '.'")
    for key, least, most in (("shard_tokens", 2, MOST_TOKENS), ("val_tokens", 1, MOST_TOKENS),
                             ("num_workers", 1, math.inf)):
        if getattr(args, key) < least:
            parser.error(f"--{key}: got {getattr(args, key)}, expected {least} or more")
        if getattr(args, key) > most:
            parser.error(f"--{key}: got {getattr(args, key)}, expected {most} or fewer")
    # By default it would leave what has been made so far behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sidecar = publish(args)
    except KeyboardInterrupt:
        print("interrupted; no shard was changed", file=sys.stderr)
        sys.exit(130)
    except BrokenExecutor:
        sys.exit("error: a worker process died; if memory ran out, give a smaller --num_workers")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for name, entry in sidecar["files"].items():
        print(f"{name}: {entry['tokens']:,} tokens, {entry['documents']:,} documents")
    print(f"dropped: {sidecar['dropped']['empty']} empty documents and "
          f"{sidecar['dropped']['in_val']} train documents that are in val")


if __name__ == "__main__":
    main()
