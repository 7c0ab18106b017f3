"""The validation loss, and the warm-up that has to leave no trace."""

import copy

import pytest
import torch
from conftest import (
    ONE_RANK,
    START,
    build,
    random_batch,
    random_documents,
    random_tokens,
    run_ranks,
    tiny_args,
    write_shard,
    write_tokens,
)

import train_gpt
from train_gpt import (
    GPT,
    MicroBatch,
    RunError,
    TokenRows,
    build_optimizers,
    evaluate,
    plan_data,
    train_step,
    warm_up,
)

WINDOWS = (16, 32)


def val_args(**overrides):
    """10 rows of 64 tokens; the last of three batches is smaller than the others."""
    return tiny_args(**dict(val_tokens=640, val_batch_size=256) | overrides)


@pytest.fixture
def stream(tmp_path):
    """A folder whose validation shard is a stream of 700 tokens of the tiny vocabulary."""
    write_tokens(tmp_path / "a_train_1.bin", random_tokens(1, 4 * 512 + 1))
    write_tokens(tmp_path / "a_val_0.bin", random_tokens(2, 700))
    return tmp_path


def stream_args(folder, **overrides):
    return val_args(data_path=folder, document_masking=False, **overrides)


def val_data(args):
    _, shards = plan_data(args)
    return [TokenRows(shard.path, args, training=False) for shard in shards]


def val_loss(ranks, args, windows=WINDOWS):
    return evaluate(build(args), val_data(args), args, windows, ranks)


def row_batch(tokens, start, length):
    """One row of the stream, its sequences found by looking for START."""
    inputs, targets = tokens[start : start + length], tokens[start + 1 : start + length + 1]
    bounds = [0, *(i for i in range(1, length) if inputs[i] == START), length]
    return MicroBatch(torch.tensor([inputs]).int(), torch.tensor([targets]).int(),
                      torch.tensor(bounds).int(), length, len(bounds) == 2)


def naive_loss(args, tokens):
    model = build(args)
    starts = range(0, args.val_tokens, args.max_val_length)
    with torch.no_grad():
        losses = [model(row_batch(tokens, i, args.max_val_length), WINDOWS) for i in starts]
    return sum(loss.item() for loss in losses) / args.val_tokens


def test_the_loss_is_the_mean_over_the_rows_of_the_stream(stream):
    tokens = random_tokens(2, 700)
    for val_tokens in (64, 640):
        args = stream_args(stream, val_tokens=val_tokens)
        assert val_loss(ONE_RANK, args) == pytest.approx(naive_loss(args, tokens), rel=1e-6)


def test_the_loss_is_the_mean_over_hidden_tokens(stream):
    args = stream_args(stream, masked_share=0.2, vocab_size=257)
    rows, model, losses = val_data(args)[0], build(args), []
    with torch.no_grad():
        for i in range(10):
            batch = rows.micro_batch(i, 1)
            logits = GPT.hidden(model, batch, WINDOWS) @ model.head_weight.T
            logits = 15 * torch.tanh(logits / 15)
            hidden = batch.targets_BT >= 0
            losses += torch.nn.functional.cross_entropy(
                logits[hidden], batch.targets_BT[hidden].long(), reduction="none").tolist()
    assert len(losses) == 10 * 13
    assert val_loss(ONE_RANK, args) == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    with pytest.raises(RunError, match="--masked_share"):
        model.logits(torch.zeros(1, 32))


def test_longer_rows_let_tokens_see_further_back(stream):
    tokens, losses = random_tokens(2, 700), []
    for val_row_length in (0, 128, 320):
        args = stream_args(stream, val_tokens=640, val_batch_size=640,
                           val_row_length=val_row_length)
        losses.append(val_loss(ONE_RANK, args))
        assert losses[-1] == pytest.approx(naive_loss(args, tokens), rel=1e-6)
    assert len(set(losses)) == 3


def test_the_loss_is_the_mean_over_documents_that_do_not_see_each_other(tmp_path):
    documents = random_documents(3, 20, 60)
    tokens = [token for text in documents for token in (START, *text)]
    write_shard(tmp_path / "a_train_1.bin", random_documents(1, 200, 60))
    write_shard(tmp_path / "a_val_0.bin", documents)
    args = val_args(data_path=tmp_path, vocab_size=50_257, model_dim=16, num_heads=1,
                    max_document_length=8, val_tokens=320, batch_size=256)
    assert val_loss(ONE_RANK, args) == pytest.approx(naive_loss(args, tokens), rel=1e-6)


def test_the_loss_uses_the_windows_it_is_given(stream):
    args = stream_args(stream)
    losses = {val_loss(ONE_RANK, args, windows) for windows in ((0, 0), WINDOWS, (16, 16))}
    assert len(losses) == 3


def test_the_loss_does_not_depend_on_the_batch_size(stream):
    losses = [val_loss(ONE_RANK, stream_args(stream, val_batch_size=64 * rows))
              for rows in (1, 2, 3, 4, 10, 50)]
    assert losses == pytest.approx([losses[0]] * 6, rel=1e-6)


def test_the_loss_covers_several_shards(stream):
    args = stream_args(stream)
    expected = val_loss(ONE_RANK, args)
    tokens = random_tokens(2, 700)
    write_tokens(stream / "a_val_0.bin", tokens[:257])
    write_tokens(stream / "a_val_1.bin", tokens[256:])
    assert val_loss(ONE_RANK, args) == pytest.approx(expected, rel=1e-6)
    args = stream_args(stream, val_tokens=512)  # only a part of the second
    assert val_loss(ONE_RANK, args) == pytest.approx(naive_loss(args, tokens), rel=1e-6)


class Counter:
    """Stands for the compiled model, counts the rows it is given, and wants no gradients."""

    def __init__(self, model):
        self.model, self.rows = model, 0

    def __call__(self, batch, windows):
        assert not torch.is_grad_enabled()
        self.rows += len(batch.inputs_BT)
        return self.model(batch, windows)


def val_losses(ranks, args_list):
    """(loss, rows that this rank computed) for each of several batch sizes."""
    results = []
    for args in args_list:
        model, shards = Counter(build(args)), val_data(args)
        results.append((evaluate(model, shards, args, WINDOWS, ranks), model.rows))
    return results


def test_the_loss_does_not_depend_on_the_number_of_ranks_and_they_share_the_work(stream, tmp_path):
    args_list = [stream_args(stream, val_batch_size=64 * rows) for rows in (1, 3, 4, 10)]
    alone = val_losses(ONE_RANK, args_list)
    assert [rows for _, rows in alone] == [10] * 4
    results = run_ranks(val_losses, 2, tmp_path / "ranks", args_list)
    for losses in results:
        for (loss, _), (expected, _) in zip(losses, alone, strict=True):
            assert loss == pytest.approx(expected, rel=1e-6)
    assert [[rows for _, rows in losses] for losses in results] == [[5, 6, 6, 10], [5, 4, 4, 0]]


def snapshot(model, optimizers):
    """Weights, gradients, optimizer states and the random generator, all copied."""
    return copy.deepcopy(
        dict(
            weights={name: p.detach() for name, p in model.named_parameters()},
            gradients={name: p.grad for name, p in model.named_parameters()},
            optimizers=[optimizer.state_dict() for optimizer in optimizers],
            random=torch.get_rng_state(),
        )
    )


def assert_identical(a, b, path="state"):
    """Equal to the last bit, whatever the nesting."""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_identical(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for index, pair in enumerate(zip(a, b, strict=True)):
            assert_identical(*pair, f"{path}.{index}")
    else:
        assert a == b, path


def test_evaluation_leaves_everything_as_it_was(stream):
    args = stream_args(stream)
    model = build(args)
    optimizers = build_optimizers(model, args)
    train_step(model, optimizers, [random_batch(args, rows=8)], 0, args, ONE_RANK)
    model(random_batch(args), (0, 0)).backward()
    before = snapshot(model, optimizers)
    shards = val_data(args)
    first = evaluate(model, shards, args, WINDOWS, ONE_RANK)
    assert_identical(snapshot(model, optimizers), before)
    assert evaluate(model, shards, args, WINDOWS, ONE_RANK) == first


# -----------------------------------------------------------------------------
# Warm-up


def warm_args(**overrides):
    return tiny_args(**dict(window_start=128, window_end=256, train_steps=6) | overrides)


@pytest.mark.parametrize("optimizer", ["muon", "adam"])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_the_warm_up_leaves_no_trace(optimizer, steps_before):
    args = warm_args(optimizer=optimizer)
    model = build(args, awake=False)
    optimizers = build_optimizers(model, args)
    for step in range(steps_before):
        train_step(model, optimizers, [random_batch(args, rows=8)], step, args, ONE_RANK)
    before = snapshot(model, optimizers)
    warm_up(model, model, optimizers, args, ONE_RANK)
    assert_identical(snapshot(model, optimizers), before)


def train_after(args, warm):
    model = build(args, awake=False)
    optimizers = build_optimizers(model, args)
    if warm:
        warm_up(model, model, optimizers, args, ONE_RANK)
    losses = [train_step(model, optimizers, [random_batch(args, rows=8, seed=step)], step, args,
                         ONE_RANK).item() for step in range(3)]
    return losses, snapshot(model, optimizers)


def test_training_after_the_warm_up_is_the_same_to_the_last_bit():
    args = warm_args()
    cold, warm = train_after(args, warm=False), train_after(args, warm=True)
    assert cold[0] == warm[0]
    assert_identical(warm[1], cold[1])


class Recorder:
    """Stands for the compiled model, and notes how it is called."""

    def __init__(self, model):
        self.model, self.calls = model, []

    def __call__(self, batch, windows, ahead_K=None):
        kind = "train" if torch.is_grad_enabled() else "val"
        self.calls.append((kind, tuple(batch.inputs_BT.shape), batch.max_length, windows))
        assert batch.inputs_BT.max() < self.model.args.vocab_size
        return self.model(batch, windows, ahead_K)


def test_the_warm_up_runs_the_shapes_and_windows_of_training_and_validation():
    args = warm_args(document_masking=True, max_document_length=24, val_batch_size=192,
                     window_start=128, window_end=512)
    model = build(args)
    recorder = Recorder(model)
    warm_up(model, recorder, build_optimizers(model, args), args, ONE_RANK)
    calls = set(recorder.calls)
    for step in (0, args.train_steps - 1):
        windows = train_gpt.attention_windows(step, args)
        assert ("train", (4, 64), 24, windows) in calls
        assert ("val", (3, 64), 64, windows) in calls
    assert len(recorder.calls) == 2 * (1 + 2)


def test_the_warm_up_runs_each_graph_with_two_windows():
    args = warm_args(train_steps=12, window_start=128, window_end=1280)
    recorder = Recorder(model := build(args))
    warm_up(model, recorder, build_optimizers(model, args), args, ONE_RANK)
    for kind in ("val", "train"):
        assert len({windows for call, *_, windows in recorder.calls if call == kind}) == 2
