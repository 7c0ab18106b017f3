"""Training by recorded graphs, on a CPU: a stand-in for CUDA graphs runs the model again."""

from contextlib import contextmanager

import pytest
import torch
from conftest import CPU, ONE_RANK, random_documents, tiny_args, write_shard

import train_gpt
from train_gpt import (
    GPT,
    Recorded,
    RunError,
    build_optimizers,
    plan_data,
    train_batches,
    train_step,
)


class Graph:
    """What a CUDA graph does: computes the same from the same memory into the same memory."""

    recording = None  # the graph that notes what the model is called with

    def replay(self):
        model, inputs, loss, grads, is_first = self.recorded
        params = list(model.parameters())
        before = [p.grad for p in params]
        model.zero_grad(set_to_none=True)
        again = model(*inputs)
        again.backward()
        loss.detach().copy_(again.detach())
        for grad, p in zip(grads, params, strict=True):
            grad.copy_(p.grad) if is_first else grad.add_(p.grad)
        for p, grad in zip(params, before, strict=True):
            p.grad = grad


@pytest.fixture
def graphs(monkeypatch):
    """All graphs made, by a model that is called as the compiled one would be."""
    made = []

    @contextmanager
    def graph(new, pool, capture_error_mode):
        Graph.recording = new
        yield
        model, inputs, loss, is_first = new.called
        new.recorded = model, inputs, loss, [p.grad for p in model.parameters()], is_first
        Graph.recording = None
        made.append(new)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(train_gpt, "borrowed", lambda tensor: tensor)
    return made


def noted(model):
    def call(*inputs):
        is_first = next(model.parameters()).grad is None
        loss = model(*inputs)
        Graph.recording.called = model, inputs, loss, is_first
        return loss

    return call


def train(args, train_shards, recorded: bool):
    torch.manual_seed(0)
    model = GPT(args)
    optimizers = build_optimizers(model, args)
    recorder = None
    if recorded:
        most = max(shard.most_sequences for shard in train_shards)
        recorder = Recorded(noted(model), optimizers, args, CPU, most)
        recorder.record_all(1)
    batches = train_batches([shard.path for shard in train_shards], args, ONE_RANK)
    losses = [train_step(model, optimizers, some, step, args, ONE_RANK, recorder)
              for step, (some, _) in enumerate(batches)]
    return torch.stack(losses), model


@pytest.fixture
def args(tmp_path):
    write_shard(tmp_path / "a_train_1.bin", random_documents(1, 120, 60))
    write_shard(tmp_path / "a_val_0.bin", random_documents(0, 30, 60))
    return tiny_args(data_path=tmp_path, vocab_size=50_257, batch_stages="256,768", train_steps=4,
                     device_batch_size=128, max_document_length=40, window_start=128,
                     window_end=256, tokens_ahead=2, bigram_rows=31, key_offset=True,
                     val_tokens=512)


def test_training_by_recorded_graphs_is_training(args, graphs):
    shards, _ = plan_data(args)
    losses, model = train(args, shards, recorded=False)
    again, recorded = train(args, shards, recorded=True)
    assert len(losses) == 4 and torch.allclose(again, losses, atol=1e-6)
    for (name, p), q in zip(model.named_parameters(), recorded.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6), name


def test_there_are_graphs_for_each_windows_of_the_first_micro_batch_and_of_others(args, graphs):
    shards, _ = plan_data(args)
    windows = [train_gpt.attention_windows(step, args) for step in range(4)]
    assert windows == [(64, 128), (128, 256), (128, 256), (128, 256)]
    train(args, shards, recorded=True)
    # Two micro-batches with either windows, then six with the larger ones.
    assert len(graphs) == 2 + 2


def test_what_cannot_be_recorded_says_how_to_do_without(args, graphs):
    model = GPT(args)

    def fails(*inputs):
        raise RuntimeError("operation not permitted when stream is capturing")

    recorder = Recorded(fails, build_optimizers(model, args), args, CPU, 9)
    with pytest.raises(RunError, match="not permitted when .*; --cuda_graphs false does without"):
        recorder.record_all(1)
