"""From shards on disk to the micro-batches of each rank and step."""

import dataclasses
import hashlib
import itertools
import re
from functools import partial

import numpy as np
import pytest
import torch
from conftest import (
    CPU,
    ONE_RANK,
    START,
    baseline_args,
    random_documents,
    random_tokens,
    tiny_args,
    write_shard,
    write_tokens,
)

import train_gpt
from train_gpt import (
    Ranks,
    RunError,
    TokenRows,
    log_frequencies,
    plan_data,
    prefetch,
    train_batches,
)

STREAMS = {
    "documents of all sizes": random_documents(0, 120, 90),
    "many short documents": random_documents(1, 900, 2),
    "one giant document": [random_tokens(2, 3000)],
    "a giant between short ones": [[1], [], random_tokens(3, 1500), [2, 3], *[[4]] * 200],
    "documents of exactly a row": [random_tokens(n, 63) for n in range(20)],
}


def data_args(**overrides):
    """Rows of 64 tokens, 4 rows a step, GPT-2's vocabulary."""
    settings = dict(vocab_size=50_257, batch_size=256, device_batch_size=64, max_document_length=40)
    return tiny_args(**settings | overrides)


def flat_tokens(path) -> list[int]:
    return np.fromfile(path, dtype="<u2", offset=1024).tolist()


def test_frequencies_are_shares_of_the_tokens_and_no_token_is_impossible(tmp_path):
    tokens = [START, 7, 7, 7, 2]
    shares = log_frequencies(write_tokens(tmp_path / "a.bin", tokens), 50_257).exp() * (5 + 50_257)
    assert shares.shape == (50_257,) and shares.dtype == torch.float32
    for token, count in ((START, 2), (7, 4), (2, 2), (0, 1)):
        assert shares[token].item() == pytest.approx(count, rel=1e-5)


def sequences_of(batch) -> list[tuple[list[int], list[int]]]:
    """(inputs, targets) of each sequence of a micro-batch, after checking that it is well-formed"""
    inputs, targets = batch.inputs_BT.flatten().tolist(), batch.targets_BT.flatten().tolist()
    bounds = batch.cu_seqlens.tolist()
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    assert bounds[0] == 0 and bounds[-1] == len(inputs) == len(targets)
    assert min(lengths) >= 1 and max(lengths) <= batch.max_length
    assert batch.whole_rows == (set(lengths) == {batch.inputs_BT.size(1)}) or not batch.whole_rows
    assert set(range(0, len(inputs), batch.inputs_BT.size(1))) <= set(bounds), "crosses a row"
    return [(inputs[a:b], targets[a:b]) for a, b in itertools.pairwise(bounds)]


def reference_rows(tokens, row_length, longest) -> list[list[tuple[int, int]]]:
    """(start, length) of the sequences of each training row, in plain Python."""
    starts = [i for i in range(len(tokens) - 1) if tokens[i] == START]
    rows, row, room = [], [], row_length
    for start, following in itertools.pairwise([*starts, len(tokens) - 1]):
        length = min(following - start, longest, room)
        row.append((start, length))
        room -= length
        if room == 0:
            rows.append(row)
            row, room = [], row_length
    return rows


def reference_validation_rows(tokens, row_length) -> list[list[tuple[int, int]]]:
    rows = []
    for start in range(0, len(tokens) - row_length, row_length):
        end = start + row_length
        cuts = [start, *(i for i in range(start + 1, end) if tokens[i] == START), end]
        rows.append([(a, b - a) for a, b in itertools.pairwise(cuts)])
    return rows


def cut(tokens, rows) -> list[tuple[list[int], list[int]]]:
    return [(tokens[start : start + length], tokens[start + 1 : start + length + 1])
            for row in rows for start, length in row]


def all_rows(path, args, training):
    rows = TokenRows(path, args, training)
    return rows.num_rows, rows.num_rows and sequences_of(rows.micro_batch(0, rows.num_rows))


# -----------------------------------------------------------------------------
# Rows


@pytest.mark.parametrize("longest", [1, 7, 40, 64, 500])
@pytest.mark.parametrize("documents", STREAMS.values(), ids=STREAMS)
def test_training_rows_equal_a_plain_python_packing(tmp_path, documents, longest):
    path = write_shard(tmp_path / "shard.bin", documents)
    tokens = flat_tokens(path)
    expected = reference_rows(tokens, 64, longest)
    num_rows, sequences = all_rows(path, data_args(max_document_length=longest), training=True)
    assert num_rows == len(expected)
    assert sequences == (cut(tokens, expected) or 0)


@pytest.mark.parametrize("documents", STREAMS.values(), ids=STREAMS)
def test_validation_rows_equal_a_plain_python_cut_whatever_the_document_limit(tmp_path, documents):
    path = write_shard(tmp_path / "shard.bin", documents)
    tokens = flat_tokens(path)
    expected = reference_validation_rows(tokens, 64)
    assert all_rows(path, data_args(max_document_length=5), training=False) == (
        len(expected), cut(tokens, expected))


def test_validation_rows_can_be_longer_than_training_rows(tmp_path):
    path = write_shard(tmp_path / "shard.bin", STREAMS["documents of all sizes"])
    tokens = flat_tokens(path)
    args = data_args(val_row_length=160, val_batch_size=160, val_tokens=160)
    expected = reference_validation_rows(tokens, 160)
    assert all_rows(path, args, training=False) == (len(expected), cut(tokens, expected))
    assert TokenRows(path, args, training=False).micro_batch(0, 1).max_length == 160
    assert all_rows(path, args, training=True) == all_rows(path, data_args(), training=True)


@pytest.mark.parametrize("training", [True, False])
def test_without_document_masking_rows_are_the_stream_cut_every_row_length(tmp_path, training):
    path = write_shard(tmp_path / "shard.bin", STREAMS["documents of all sizes"])
    tokens = flat_tokens(path)
    args = data_args(document_masking=False)
    num_rows, sequences = all_rows(path, args, training)
    assert num_rows == (len(tokens) - 1) // 64
    assert sequences == cut(tokens, [[(64 * row, 64)] for row in range(num_rows)])
    assert TokenRows(path, args, training).micro_batch(0, 1).whole_rows


@pytest.mark.parametrize("masking", [True, False])
@pytest.mark.parametrize("count, rows", [(64, 0), (65, 1), (128, 1), (129, 2)])
def test_a_row_needs_one_token_more_for_its_last_target(tmp_path, masking, count, rows):
    path = write_tokens(tmp_path / "shard.bin", [START, *range(count - 1)])
    args = data_args(document_masking=masking)
    assert TokenRows(path, args, training=False).num_rows == rows


def test_each_training_sequence_starts_at_a_document_start_and_stays_in_its_document(tmp_path):
    path = write_shard(tmp_path / "shard.bin", STREAMS["documents of all sizes"])
    _, sequences = all_rows(path, data_args(), training=True)
    assert len(sequences) > 50
    for inputs, _ in sequences:
        assert inputs[0] == START and START not in inputs[1:]


def test_a_document_is_cut_at_its_longest_length_and_at_the_end_of_its_row(tmp_path):
    documents = [list(range(100, 160)), list(range(200, 230)), list(range(300, 310)), [7] * 200]
    path = write_shard(tmp_path / "shard.bin", documents)
    _, sequences = all_rows(path, data_args(max_document_length=40), training=True)
    assert [inputs for inputs, _ in sequences] == [
        [START, *range(100, 139)],  # 40 tokens: the longest length
        [START, *range(200, 223)],  # 24 tokens: what the row had left
    ]


@pytest.mark.parametrize("beginning", [0, 100])
def test_with_rests_training_predicts_each_token_once_in_short_pieces(tmp_path, beginning):
    documents = [[7] * 35, [8] * 100, [9] * 3, [6] * 400]
    stream = [5] * beginning + [token for document in documents for token in [START, *document]]
    path = write_tokens(tmp_path / "shard.bin", stream)
    args = data_args(max_document_length=40, document_rests=True)
    num_rows, sequences = all_rows(path, args, training=True)
    assert num_rows == (len(stream) - 1) // 64
    assert [token for inputs, _ in sequences for token in inputs] == stream[: 64 * num_rows]
    assert [token for _, targets in sequences for token in targets] == stream[1 : 64 * num_rows + 1]
    position, bounds = 0, set()
    for inputs, _ in sequences:
        assert len(inputs) <= 40 and START not in inputs[1:]
        bounds.add(position)
        position += len(inputs)
    # Cut at rows, at documents, and every 40 tokens from a document's start, and nowhere else.
    cuts, start = set(range(0, 64 * num_rows, 64)), 0
    for at, token in enumerate(stream[: 64 * num_rows]):
        start = at if token == START else start
        cuts |= {at} if (at - start) % 40 == 0 else set()
    assert bounds == cuts


def test_validation_predicts_each_of_the_first_tokens_once(tmp_path):
    path = write_shard(tmp_path / "shard.bin", STREAMS["documents of all sizes"])
    tokens = flat_tokens(path)
    num_rows, sequences = all_rows(path, data_args(max_document_length=7), training=False)
    assert [token for _, targets in sequences for token in targets] == tokens[1 : 64 * num_rows + 1]
    assert 64 * num_rows >= len(tokens) - 65


def test_a_micro_batch_is_the_rows_that_were_asked_for(tmp_path):
    path = write_shard(tmp_path / "shard.bin", STREAMS["documents of all sizes"])
    tokens = flat_tokens(path)
    for training, reference in (
        (True, reference_rows(tokens, 64, 40)),
        (False, reference_validation_rows(tokens, 64)),
    ):
        rows = TokenRows(path, data_args(), training)
        for first, count in ((0, 1), (3, 2), (rows.num_rows - 1, 1)):
            batch = rows.micro_batch(first, count)
            assert batch.inputs_BT.shape == (count, 64)
            assert sequences_of(batch) == cut(tokens, reference[first : first + count])


def test_the_largest_sequence_length_is_known_without_looking_at_the_data(tmp_path):
    path = write_shard(tmp_path / "shard.bin", STREAMS["many short documents"])
    args = data_args(max_document_length=40)
    assert TokenRows(path, args, training=True).micro_batch(0, 1).max_length == 40
    assert TokenRows(path, args, training=False).micro_batch(0, 1).max_length == 64
    assert not TokenRows(path, args, training=True).micro_batch(0, 1).whole_rows


def test_of_each_row_a_share_is_hidden_and_to_be_predicted(tmp_path):
    path = write_tokens(tmp_path / "a.bin", random_tokens(3, 64 * 200 + 1, vocab_size=255))
    args = data_args(document_masking=False, masked_share=0.25, vocab_size=256)
    rows = TokenRows(path, args, training=True)
    batch, stream = rows.micro_batch(0, 200), flat_tokens(path)[:-1]
    original = torch.tensor(stream).view(200, 64)
    chosen = batch.targets_BT >= 0
    assert not batch.is_causal and (chosen.sum(1) == 16).all()
    assert torch.equal(batch.targets_BT[chosen], original[chosen].int())
    assert (batch.targets_BT[~chosen] == -1).all()
    assert torch.equal(batch.inputs_BT[~chosen], original[~chosen].int())
    shares = [is_so.float().mean() for is_so in (
        batch.inputs_BT[chosen] == 255, batch.inputs_BT[chosen] == original[chosen])]
    assert shares == [pytest.approx(0.8, abs=0.02), pytest.approx(0.1, abs=0.02)]
    assert chosen.float().mean(0).std() < 0.1  # no place is preferred
    again = torch.cat([rows.micro_batch(row, 2).inputs_BT for row in range(0, 200, 2)])
    assert torch.equal(again, batch.inputs_BT)
    with pytest.raises(RunError, match="token 254.*--vocab_size"):
        TokenRows(path, dataclasses.replace(args, vocab_size=255), training=True)


# -----------------------------------------------------------------------------
# Steps and ranks


@pytest.fixture
def two_shards(tmp_path):
    return [write_shard(tmp_path / f"{n}.bin", random_documents(n, 90, 90)) for n in (10, 11)]


def steps_of(paths, args, rank=0, world_size=1):
    """Per step the sequences that one rank trains on, its micro-batches in a row."""
    batches = train_batches(paths, args, Ranks(rank, world_size, CPU))
    return [[s for batch in step for s in sequences_of(batch)] for step, _ in batches]


@pytest.mark.parametrize("masking", [True, False])
def test_steps_take_whole_rows_in_order_and_never_cross_a_shard(two_shards, masking):
    args = data_args(batch_size=384, document_masking=masking)
    expected = []
    for path in two_shards:
        tokens = flat_tokens(path)
        rows = (reference_rows(tokens, 64, 40) if masking else
                [[(64 * row, 64)] for row in range((len(tokens) - 1) // 64)])
        assert len(rows) % 6, "the test wants rows that are left over"
        expected += [cut(tokens, rows[i : i + 6]) for i in range(0, len(rows) - 5, 6)]
    assert steps_of(two_shards, args) == expected


@pytest.mark.parametrize(
    "world_size, device_batch_size", [(1, 64), (1, 128), (1, 256), (2, 64), (2, 128), (4, 64)]
)
def test_ranks_share_a_step_out_whatever_their_number_and_micro_batch(
    two_shards, world_size, device_batch_size
):
    args = data_args(device_batch_size=device_batch_size)
    whole = steps_of(two_shards, data_args(device_batch_size=256))
    ranks = [steps_of(two_shards, args, rank, world_size) for rank in range(world_size)]
    assert [sum(shares, []) for shares in zip(*ranks, strict=True)] == whole
    for step, _ in train_batches(two_shards, args, Ranks(0, world_size, CPU)):
        assert len(step) == 256 // device_batch_size // world_size
        assert all(batch.inputs_BT.numel() == device_batch_size for batch in step)


@pytest.mark.parametrize("world_size", [1, 2])
def test_stages_have_steps_of_their_sizes_of_the_same_stream(two_shards, world_size):
    args = data_args(batch_stages="128,256,512", train_steps=9, device_batch_size=64)
    expected, step = [], 0
    for path in two_shards:
        tokens = flat_tokens(path)
        rows = reference_rows(tokens, 64, 40)
        while len(rows) >= (size := (2, 4, 8)[min(step // 3, 2)]):
            expected.append(cut(tokens, rows[:size]))
            rows, step = rows[size:], step + 1
    assert step > 9, "the test wants the last stage to cross into the second shard"
    ranks = [steps_of(two_shards, args, rank, world_size) for rank in range(world_size)]
    assert [sum(shares, []) for shares in zip(*ranks, strict=True)] == expected
    sizes = [[batch.inputs_BT.numel() for batch in step]
             for (step, _), _ in zip(train_batches(two_shards, args, Ranks(0, world_size, CPU)),
                                range(9), strict=False)]
    assert sizes[:3] == [[64] * (2 // world_size)] * 3
    assert sizes[3:6] == [[64] * (4 // world_size)] * 3
    assert args.train_tokens == 3 * (128 + 256 + 512) == world_size * sum(map(sum, sizes))


def test_the_shards_are_used_in_the_order_given(tmp_path):
    paths = [write_shard(tmp_path / f"{n}.bin", random_documents(n, 60, 90)) for n in range(4)]
    a, b, c, d = (steps_of([path], data_args()) for path in paths)
    assert len({len(str(steps)) for steps in (a, b, c, d)}) == 4
    assert steps_of(paths, data_args()) == a + b + c + d
    assert steps_of([paths[i] for i in (2, 0, 3, 1)], data_args()) == c + a + d + b


def test_a_shard_that_turns_bad_during_the_run_is_an_error(two_shards):
    two_shards[1].write_bytes(two_shards[1].read_bytes()[:-2])
    batches = train_batches(two_shards, data_args(), ONE_RANK)
    with pytest.raises(ValueError, match="truncated"):
        list(batches)


# -----------------------------------------------------------------------------
# Prefetching


def test_prefetching_keeps_the_order():
    assert list(prefetch(range(50))) == list(range(50))
    assert list(prefetch([])) == []
    assert list(prefetch([None, 0, False])) == [None, 0, False]


def test_prefetching_reads_only_a_little_ahead():
    seen = []
    endless = (seen.append(n) or n for n in itertools.count())
    assert list(itertools.islice(prefetch(endless, depth=2), 10)) == list(range(10))
    assert len(seen) <= 10 + 2 + 2


def test_an_error_while_prefetching_is_raised_after_the_items_before_it():
    def items():
        yield 1
        yield 2
        raise ValueError("shard 3 is gone")

    fetched = prefetch(items())
    assert [next(fetched), next(fetched)] == [1, 2]
    with pytest.raises(ValueError, match="shard 3 is gone"):
        next(fetched)


# -----------------------------------------------------------------------------
# The plan: is there enough data, and is it good?


def plan_args(folder, **overrides):
    return data_args(data_path=folder, **dict(train_steps=4, val_tokens=512) | overrides)


@pytest.fixture
def folder(tmp_path):
    """Two training shards of more than 4 steps each, a val shard of more than 512 tokens."""
    for n in (1, 2):
        write_shard(tmp_path / f"web_train_{n:06}.bin", random_documents(n, 60, 60))
    write_shard(tmp_path / "web_val_000000.bin", random_documents(0, 30, 60))
    return tmp_path


def refusal(args) -> str:
    with pytest.raises(RunError) as caught:
        plan_data(args)
    return str(caught.value)


def test_the_plan_takes_as_many_shards_in_order_as_the_run_needs(folder):
    rows = [TokenRows(path, plan_args(folder), True).num_rows
            for path in sorted(folder.glob("*train*"))]
    first = rows[0] // 4
    train, val = plan_data(plan_args(folder, train_steps=first))
    assert [shard.path.name for shard in train] == ["web_train_000001.bin"]
    assert [shard.path.name for shard in val] == ["web_val_000000.bin"]
    assert train[0].num_rows == rows[0]
    train, _ = plan_data(plan_args(folder, train_steps=first + 1))
    assert [shard.path.name for shard in train] == [f"web_train_{n:06}.bin" for n in (1, 2)]


def test_the_plan_holds_all_the_steps_it_promises(folder):
    paths = sorted(folder.glob("*train*"))
    args = plan_args(folder, train_steps=len(steps_of(paths, plan_args(folder))))
    train, _ = plan_data(args)
    assert len(steps_of([shard.path for shard in train], args)) == args.train_steps
    refusal(plan_args(folder, train_steps=args.train_steps + 1))


def test_the_plan_counts_the_steps_of_each_stage(folder):
    paths = sorted(folder.glob("*train*"))

    def staged(train_steps):
        return plan_args(folder, batch_stages="64,128,512", train_steps=train_steps)

    most = next(n for n in itertools.count(3) if len(steps_of(paths, staged(n + 1))) < n + 1)
    assert len(steps_of(paths, staged(most))) >= most
    assert most > 1.5 * len(steps_of(paths, plan_args(folder, batch_size=512)))
    train, _ = plan_data(staged(most))
    assert len(steps_of([shard.path for shard in train], staged(most))) >= most
    assert f"hold {len(steps_of(paths, staged(most + 1)))} steps" in refusal(staged(most + 1))


def test_shards_are_identified_by_size_and_hash(folder):
    train, val = plan_data(plan_args(folder))
    for shard in train + val:
        content = shard.path.read_bytes()
        assert shard.num_bytes == len(content)
        assert shard.sha256 == hashlib.sha256(content).hexdigest()


def test_the_baseline_needs_26_shards_of_100_million_tokens():
    assert train_gpt.estimate_shards(baseline_args()) == 26
    one_shard = 99_999_999 // 524_288
    assert train_gpt.estimate_shards(baseline_args(train_steps=one_shard)) == 1
    assert train_gpt.estimate_shards(baseline_args(train_steps=one_shard + 1)) == 2


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("settings", [{}, dict(device_batch_size=128), dict(document_rests=True),
                                      dict(document_masking=False)], ids=str)
def test_the_plan_knows_the_most_sequences_of_a_micro_batch(folder, settings, world_size):
    args = plan_args(folder, **settings)
    steps = len(steps_of(sorted(folder.glob("*train*")), args))
    args = dataclasses.replace(args, train_steps=steps)
    train, _ = plan_data(args)
    counts = [len(batch.cu_seqlens) - 1 for rank in range(world_size)
              for batches, _ in train_batches([shard.path for shard in train], args,
                                              Ranks(rank, world_size, CPU))
              for batch in batches]
    most = max(shard.most_sequences for shard in train)
    # The last rows of a shard may make no step.
    assert max(counts) <= most <= max(counts) + (2 if args.document_masking else 0)


def test_packed_documents_need_some_more_shards_than_tokens_alone():
    args = baseline_args(recipe="modern", train_steps=1_500)
    tokens_alone = 1_500 * args.batch_size / 100e6
    assert tokens_alone * 1.05 < train_gpt.estimate_shards(args) < tokens_alone * 1.3 + 1


def test_too_few_steps_say_how_many_shards_to_download(folder):
    per_shard = [TokenRows(path, plan_args(folder), True).num_rows // 4
                 for path in sorted(folder.glob("*train*"))]
    wanted = 10 * sum(per_shard)
    message = refusal(plan_args(folder, train_steps=wanted))
    needed = re.search(r"cached_fineweb10B.py (\d+)", message)
    assert needed and int(needed[1]) == 20
    assert f"hold {sum(per_shard)} steps" in message and "--train_steps" in message


def test_a_step_that_fits_in_no_shard_is_refused_without_sending_for_more_shards(tmp_path):
    write_tokens(tmp_path / "a_train_1.bin", [START] * 200)
    write_tokens(tmp_path / "a_val_0.bin", [START, *range(600)])
    message = refusal(plan_args(tmp_path))
    assert "--batch_size" in message and "cached_fineweb10B.py" not in message


@pytest.mark.parametrize("kind", ["train", "val"])
def test_missing_shards_name_the_folder_and_the_download(folder, kind):
    for path in folder.glob(f"*{kind}*"):
        path.unlink()
    message = refusal(plan_args(folder))
    assert f"no {kind} shards" in message and str(folder) in message
    assert "python data/cached_fineweb10B.py" in message and "--data_path" in message


def test_a_missing_folder_is_reported_like_missing_shards(tmp_path):
    assert "no train shards" in refusal(plan_args(tmp_path / "nowhere"))


def test_too_few_validation_tokens_are_refused(folder):
    message = refusal(plan_args(folder, val_tokens=6400))
    assert "6,400" in message and "--val_tokens" in message
    held = TokenRows(folder / "web_val_000000.bin", plan_args(folder), False).num_rows * 64
    assert f"{held:,}" in message
    plan_data(plan_args(folder, val_tokens=held))


def test_a_validation_target_past_the_end_is_not_invented(tmp_path):
    write_shard(tmp_path / "a_train_1.bin", random_documents(1, 60, 60))
    val = write_tokens(tmp_path / "a_val_0.bin", [START, *range(511)])
    assert "and one more" in refusal(plan_args(tmp_path, val_tokens=512))
    write_tokens(val, [START, *range(512)])
    plan_data(plan_args(tmp_path, val_tokens=512))


DAMAGES = {
    "another magic number": (dict(magic=20240801), "not a token shard.*20240520"),
    "another version": (dict(version=7), "version 7, expected 1"),
    "fewer tokens than promised": (dict(count=10_000), "truncated or damaged"),
    "more tokens than promised": (dict(count=3), "truncated or damaged"),
    "no document starts": (dict(tokens=[1, 2] * 2000), "no document start.*--document_masking"),
    "a token outside the vocabulary": (dict(tokens=[START, 60_000] * 2000), "token 60000.*50,257"),
    "no tokens": (dict(tokens=[]), "empty"),
}


@pytest.mark.parametrize("kind", ["train_000001", "val_000000"])
@pytest.mark.parametrize("damage, expected", DAMAGES.values(), ids=DAMAGES)
def test_a_bad_shard_is_named_with_what_is_wrong(folder, kind, damage, expected):
    path = folder / f"web_{kind}.bin"
    write_tokens(path, **dict(tokens=flat_tokens(path)) | damage)
    message = refusal(plan_args(folder))
    assert str(path) in message and re.search(expected, message)
    with pytest.raises(ValueError, match=expected):
        TokenRows(path, plan_args(folder), training=True)


@pytest.mark.parametrize("content", [b"", b"short", bytes(1024)])
def test_a_file_that_is_no_shard_is_refused(folder, content):
    path = folder / "web_train_000001.bin"
    path.write_bytes(content)
    assert f"{path} is not a token shard" in refusal(plan_args(folder))


def test_a_bad_shard_that_the_run_does_not_need_is_no_obstacle(folder):
    (folder / "web_train_000002.bin").write_bytes(b"half a download")
    train, _ = plan_data(plan_args(folder, train_steps=2))
    assert len(train) == 1


def test_a_truncated_download_is_refused(folder):
    path = folder / "web_train_000001.bin"
    path.write_bytes(path.read_bytes()[:-1000])
    assert "truncated" in refusal(plan_args(folder))


def test_training_on_the_validation_tokens_is_refused(folder):
    copy = folder / "web_train_000001.bin"
    copy.write_bytes((folder / "web_val_000000.bin").read_bytes())
    message = refusal(plan_args(folder, train_steps=5))
    assert str(copy) in message and "validation tokens" in message


def test_data_without_document_starts_does_without_document_masking(tmp_path):
    write_tokens(tmp_path / "a_train_1.bin", random_tokens(1, 1300))
    write_tokens(tmp_path / "a_val_0.bin", random_tokens(2, 600))
    args = plan_args(tmp_path, document_masking=False, vocab_size=256)
    train, val = plan_data(args)
    assert (train[0].num_rows, val[0].num_rows) == (20, 9)


def test_a_graph_compiled_on_warm_up_tokens_serves_real_ones_and_other_windows(
        tmp_path, monkeypatch):
    args = tiny_args(vocab_size=50_257)
    path = write_shard(tmp_path / "tokens_train_1.bin", random_documents(0, 40, 200))
    real = TokenRows(path, args, training=True).micro_batch(0, args.device_batch_size // 64)
    made_up = train_gpt.random_micro_batch(args, args.device_batch_size, training=True)
    fewer = train_gpt.random_micro_batch(args, 64, training=False)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    compiled = train_gpt.compile_model(train_gpt.GPT(args))
    for batch in (fewer, made_up):
        compiled(batch.to(CPU), (32, 64))
    assert len(graphs) == 2
    compiled(real.to(CPU), (24, 48))
    assert len(graphs) == 2
