"""What the evaluations of this folder share: score token sequences with the model of a run."""

import argparse
import json
import math
import os
import random
import sys
import time
import urllib.request
from bisect import bisect_left, insort
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# The last, because records/ has files of the same names.
sys.path.append(str(Path(__file__).resolve().parents[1] / "data"))
from fineweb import load_encoding

from train_gpt import (
    DOCUMENT_START,
    GPT,
    MicroBatch,
    Ranks,
    RunError,
    join_ranks,
    load_run,
    of_all_ranks,
    prefetch,
    print_error,
    split,
)

DOWNLOADS = Path(__file__).resolve().parents[1] / "data" / "evals"
HEAD_TOKENS = 1_024  # whose logits exist at once: 0.2 GB with GPT-2's vocabulary
EXAMPLES = 256  # whose sequences exist at once


class Sequence(NamedTuple):
    tokens: np.ndarray  # int32, without DOCUMENT_START, which always comes before
    count: int  # so many at the end are scored, at least one


class Score(NamedTuple):
    """Of the scored tokens of a sequence."""

    losses: np.ndarray  # cross entropies, nats, float32
    likeliest: np.ndarray  # bool, whether it was the likeliest token; of equals, the first is
    is_cut: bool  # the sequence was too long for the model, and lost its beginning


def pack(lengths: list[int], row_length: int) -> list[list[int]]:
    """Indices of the lengths in rows that hold `row_length`, by best fit, the longest first."""
    rows, rooms = [], []  # (what is left, row), sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(rooms, (lengths[i], 0))
        if place == len(rooms):
            rows.append([])
            rooms.append((row_length, len(rows) - 1))
        room, row = rooms.pop(place)
        rows[row].append(i)
        insort(rooms, (room - lengths[i], row))
    return rows


def lay_out(
    rows: list[list[int]], inputs: list[np.ndarray], row_length: int, device: torch.device
) -> tuple[MicroBatch, dict[int, int]]:
    """The rows as a batch, and where in the flattened batch each of the inputs begins."""
    inputs_BT = np.full((len(rows), row_length), DOCUMENT_START, dtype=np.int32)
    starts, ends = {}, [0]
    for number, row in enumerate(rows):
        place = number * row_length
        for i in row:
            starts[i] = place
            inputs_BT.reshape(-1)[place : place + len(inputs[i])] = inputs[i]
            place += len(inputs[i])
            ends.append(place)
        if place < (number + 1) * row_length:  # a sequence that nobody looks at
            ends.append((number + 1) * row_length)
    inputs_BT = torch.from_numpy(inputs_BT).to(device)
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=device)
    return MicroBatch(inputs_BT, inputs_BT, cu_seqlens, row_length, whole_rows=False), starts


@torch.no_grad()
def score(
    model: GPT, windows: tuple[int, int], sequences: list[Sequence], batch_tokens: int = 0
) -> list[Score]:
    """Score the sequences, in their order, whatever they are packed with.

    A sequence of more tokens than a row of the model has places (1,024 in `baseline`) keeps its
    end, after a DOCUMENT_START. That matters where a prompt has many solved examples, or a long
    text. A batch has at most `batch_tokens`, or is one row; 0: as many as the run's validation, on
    a CPU at most 8,192. Sequences that differ in their last token alone are computed once. RunError
    if a token is outside the vocabulary, or if the GPU's memory runs out.
    """
    args, device, most = model.args, model.head_weight.device, len(model.rotary.cos)
    batch_tokens = batch_tokens or args.val_batch_size
    if device.type == "cpu":
        batch_tokens = min(batch_tokens, 8_192)
    whole = [Sequence(tokens[-most:], min(count, most)) for tokens, count in sequences]
    inputs, users = [], {}  # the inputs of one or more sequences, and those sequences
    for i, (tokens, _) in enumerate(whole):
        if (largest := max(DOCUMENT_START, int(tokens.max()))) >= args.vocab_size:
            raise RunError(f"token {largest} is outside the model's vocabulary of "
                           f"{args.vocab_size:,}; give --vocab_dir with the run's own vocabulary")
        before = np.append(np.int32(DOCUMENT_START), tokens[:-1])
        same = users.setdefault(before.tobytes(), [])
        if not same:
            inputs.append(before)
        same.append(i)
    lengths, groups, scores = list(map(len, inputs)), list(users.values()), [None] * len(whole)
    # Few different shapes, because a GPU's kernels are chosen anew for each, and aligned ones.
    row_length = min(most, -(-max(lengths, default=1) // 64) * 64)
    rows, rows_per_batch = pack(lengths, row_length), max(1, batch_tokens // row_length)
    for first in range(0, len(rows), rows_per_batch):
        batch, starts = lay_out(rows[first : first + rows_per_batch], inputs, row_length, device)
        members = [i for k in starts for i in groups[k]]
        ends = np.array([start + lengths[k] for k, start in starts.items() for _ in groups[k]])
        counts = [whole[i].count for i in members]
        places = np.concatenate([np.arange(end - count, end)
                                 for end, count in zip(ends, counts, strict=True)])
        targets = np.concatenate([whole[i].tokens[-whole[i].count :] for i in members])
        try:
            found = score_places(model, windows, batch, places, targets)
        except torch.OutOfMemoryError:
            raise RunError(f"out of GPU memory with batches of {batch.inputs_BT.numel():,} tokens; "
                           f"try --batch_tokens {batch_tokens // 2}") from None
        parts = [np.split(values, np.cumsum(counts)[:-1]) for values in found]
        for i, losses, likeliest in zip(members, *parts, strict=True):
            scores[i] = Score(losses, likeliest, len(sequences[i].tokens) > most)
    return scores


def score_places(
    model: GPT, windows: tuple[int, int], batch: MicroBatch, places: np.ndarray, targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Losses of the targets at these places of the flattened batch; which of them are likeliest."""
    device = batch.inputs_BT.device
    x_ND = model.hidden(batch, windows).flatten(0, 1)
    places_N, targets_N = (torch.from_numpy(array).long().to(device) for array in (places, targets))
    losses, likeliest = [], []
    for place, target in split(HEAD_TOKENS, places_N, targets_N):
        # In 32 bits: with 16, rounding would decide between tokens that are nearly as likely.
        logits = model.logits(x_ND[place].float())
        losses.append(F.cross_entropy(logits, target, reduction="none"))
        likeliest.append(logits.argmax(-1) == target)
    return torch.cat(losses).cpu().numpy(), torch.cat(likeliest).cpu().numpy()


def judge_examples(
    scorer: Callable, ranks: Ranks, count: int, make: Callable, judge: Callable, title: str = ""
) -> list:
    """judge(i, the scores of the sequences make(i)) for each i below `count`, on every rank.

    Each rank takes its share of the examples: `scorer` takes a list of sequences, as `score` does,
    and `make` is called in threads.
    """
    mine = range(ranks.rank, count, ranks.world_size)
    verdicts = []
    bar = tqdm(total=len(mine), desc=title, unit=" examples", leave=False,
               disable=True if ranks.rank else None)  # None: unless it is a terminal
    chunks = (mine[k : k + EXAMPLES] for k in range(0, len(mine), EXAMPLES))
    with bar, ThreadPoolExecutor() as pool:
        for chunk, made in prefetch((chunk, list(pool.map(make, chunk))) for chunk in chunks):
            scores = iter(scorer([sequence for sequences in made for sequence in sequences]))
            for i, sequences in zip(chunk, made, strict=True):
                verdicts.append(judge(i, [next(scores) for _ in sequences]))
            bar.update(len(chunk))
    parts = of_all_ranks(verdicts, ranks)
    return [parts[i % ranks.world_size][i // ranks.world_size] for i in range(count)]


def few_shot(index: int, shots: int, count: int, name: str) -> list[int]:
    """`shots` of the `count` examples other than `index`, always the same; as CORE draws them."""
    if count <= shots:
        raise RunError(f"{name} has {count} examples; {shots} shots before each need {shots + 1}")
    drawn = random.Random(1234 + index).sample(range(count - 1), shots)
    return [i + (i >= index) for i in drawn]


def standard_error(accuracy: float, count: int) -> float:
    return math.sqrt(accuracy * (1 - accuracy) / count)


def encode(encoding, text: str) -> np.ndarray:
    return np.array(encoding.encode_ordinary(text), dtype=np.int32)


def read_jsonl(path: Path, *fields: str) -> list[dict]:
    """The objects in a file of JSON lines, each with these fields. RunError if it is another."""
    records = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        for number, line in enumerate(lines, 1):
            if line.strip():
                records.append(json.loads(line))
                if missing := [field for field in fields if field not in records[-1]]:
                    raise ValueError(f"line {number} has no {' and no '.join(missing)}")
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError) as error:
        raise RunError(f"{path} is not as expected: {error}") from None
    if not records:
        raise RunError(f"{path} is empty")
    return records


def download(url: str, path: Path, advice: str) -> Path:
    """The file at `path`, fetched from `url` if it is not there yet. RunError with the advice."""
    if not path.exists():
        part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        print(f"downloading {url} to {path}", file=sys.stderr)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            urllib.request.urlretrieve(url, part)
            part.replace(path)
        except OSError as error:
            raise RunError(f"could not download {url} ({error}); {advice}") from None
        finally:
            part.unlink(missing_ok=True)
    return path


def main(parser: argparse.ArgumentParser, argv: list[str] | None, evaluate: Callable) -> None:
    """Command line of an evaluation; exits with a message on any failure.

    `evaluate(args, encoding, judged, ranks)` returns lines for a person and a dict of numbers, and
    `judged(count, make, judge, title)` is `judge_examples` with the model.
    """
    add = parser.add_argument
    add("run", metavar="RUN",
        help="a run_id, `latest`, or the folder of a checkpoint or of an exported model")
    add("--log_dir", default="logs", help="folder of the logs (default: %(default)s)")
    add("--max_examples", type=int, default=0, help="the first so many; 0: all (default)")
    add("--batch_tokens", type=int, default=0,
        help="tokens per forward pass and GPU; changes memory only (default: as the validation)")
    add("--vocab_dir", type=Path, help="folder of encoder.json and vocab.bpe (default: download)")
    add("--json", type=Path, metavar="FILE", help="write the numbers here too")
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if isinstance(value, int) and value < 0:
            parser.error(f"--{name}: got {value}, expected 0 or more")
    started, ranks = time.perf_counter(), None
    try:
        ranks = join_ranks()
        model, windows, state = load_run(args.run, ranks.device, args.log_dir)
        scorer = partial(score, model, windows, batch_tokens=args.batch_tokens)
        encoding = load_encoding(args.vocab_dir)
        lines, numbers = evaluate(args, encoding, partial(judge_examples, scorer, ranks), ranks)
        val_loss = state["val_losses"][-1][1] if state.get("val_losses") else None
        seconds = time.perf_counter() - started
        facts = dict(run=state["run"], step=state["step"], val_loss=val_loss, seconds=seconds)
        if ranks.rank == 0:
            print(*lines, sep="\n")
            print(f"run {state['run']}, step {state['step']}, "
                  f"val_loss {'unknown' if val_loss is None else f'{val_loss:.5f}'}; "
                  f"{seconds:.1f} s")
            if args.json:
                args.json.write_text(json.dumps(facts | numbers, indent=1) + "\n", encoding="utf-8")
        if ranks.world_size > 1:
            dist.barrier()  # gloo has been seen to abort at the end; by now all is written
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        print_error(error, ranks)
        sys.exit(1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
