"""The model against references written here, and who may influence whom."""

import dataclasses
import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, baseline_args, build, random_batch, tiny_args, wake_up

import train_gpt
from train_gpt import (
    GPT,
    MicroBatch,
    Rotary,
    RunError,
    linear_cross_entropy,
    sample_vocabulary,
    sdpa_attention,
)

NO_WINDOWS = (0, 0)
LENGTHS = [20, 1, 43, 3, 50, 11]  # of the documents in two rows of 64


# -----------------------------------------------------------------------------
# Attention


def naive_attention(q, k, v, batch, window, scale, softcap=0.0):
    """A softmax over the keys that each query may see, in float64, one sequence at a time."""
    shape = q.shape
    q, k, v = (x.double().flatten(0, 1).transpose(0, 1) for x in (q, k, v))  # H, N, K
    bounds = batch.cu_seqlens.tolist()
    outputs = []
    for start, end in zip(bounds, bounds[1:], strict=False):
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        distance = distance if batch.is_causal else distance.abs()
        hidden = (distance < 0) | (distance > (window or end))
        scores = scale * q[:, start:end] @ k[:, start:end].mT
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        outputs.append(weights @ v[:, start:end])
    return torch.cat(outputs, 1).transpose(0, 1).reshape(shape)


def outputs_and_gradients(attention, batch, window, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    q, k, v, upstream = torch.randn(4, 2, 64, 3, 8, generator=generator)
    leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    y = attention(*leaves, batch, window, 0.3)
    assert y.shape == q.shape and y.dtype == dtype
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(dtype))]


BATCHES = {
    "whole rows": dict(),
    "documents": dict(lengths=LENGTHS),
    "one token each": dict(lengths=[1] * 128),
}


@pytest.mark.parametrize("window", [0, 1, 7, 64])
@pytest.mark.parametrize("layout", BATCHES.values(), ids=BATCHES)
def test_sdpa_attention_equals_a_naive_softmax_forward_and_backward(layout, window):
    batch = random_batch(tiny_args(), **layout)
    got = outputs_and_gradients(sdpa_attention, batch, window)
    expected = outputs_and_gradients(naive_attention, batch, window, torch.float64)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-6, rtol=1e-5)


def naive_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, window_size):
    """What FlashAttention documents of a packed causal call, (tokens, heads, head_dim)."""
    assert torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q.dtype == torch.int32
    assert max_q == max_k >= int(cu_seqlens_q.diff().max())
    left, right = window_size
    assert right in (0, left) and (left > 0 or left == -1), "-1 is no limit, 0 is none but itself"
    batch = MicroBatch(None, None, cu_seqlens_q, max_q, False, is_causal=right == 0)
    y = naive_attention(q[None], k[None], v[None], batch, 0 if left == -1 else left, scale)
    return y[0].to(q.dtype)


def fake_flash(**marks):
    """A module like flash_attn, whose function does the arithmetic naively."""

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None,
        causal=False, window_size=(-1, -1),
    ):
        assert causal == (window_size[1] == 0) and softmax_scale is not None
        module.calls += 1
        return naive_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                            softmax_scale, window_size)

    module = types.SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func, calls=0)
    return module


@pytest.fixture
def flash_modules(monkeypatch):
    """Set what `import flash_attn_interface` and `import flash_attn` find; None: not installed."""

    def install(interface=None, flash=None):
        monkeypatch.setitem(sys.modules, "flash_attn_interface", interface)
        monkeypatch.setitem(sys.modules, "flash_attn", flash)

    return install


def fake_varlen_attn(monkeypatch):
    varlen = pytest.importorskip("torch.nn.attention.varlen")

    def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        return naive_varlen(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    return train_gpt.varlen_attention


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 1, 7])
@pytest.mark.parametrize("layout", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("backend", ["flash", "varlen"])
def test_packed_backends_are_called_so_that_they_equal_sdpa(
    flash_modules, monkeypatch, backend, layout, window, causal
):
    flash_modules(interface=fake_flash())
    attention = (train_gpt.load_flash_attention() if backend == "flash"
                 else fake_varlen_attn(monkeypatch))
    batch = random_batch(tiny_args(), **layout)._replace(is_causal=causal)
    got = outputs_and_gradients(attention, batch, window)
    expected = outputs_and_gradients(sdpa_attention, batch, window)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)


def test_flash_attention_3_wins_over_2_and_none_is_fine(flash_modules):
    new, old = fake_flash(), fake_flash()
    batch = random_batch(tiny_args())
    flash_modules(new, old)
    outputs_and_gradients(train_gpt.load_flash_attention(), batch, 0)
    assert (new.calls, old.calls) == (1, 0)
    flash_modules(None, old)
    outputs_and_gradients(train_gpt.load_flash_attention(), batch, 0)
    assert (new.calls, old.calls) == (1, 1)
    flash_modules(None, None)
    assert train_gpt.load_flash_attention() is None
    flash_modules(types.SimpleNamespace(), None)  # installed, but another version
    assert train_gpt.load_flash_attention() is None


@pytest.mark.parametrize("name", ["auto", "sdpa"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cpu_attends_through_sdpa(flash_modules, name, dtype):
    flash_modules(fake_flash(), fake_flash())
    args = tiny_args(attention=name, dtype=dtype)
    assert train_gpt.choose_attention(args, CPU) == ("sdpa", sdpa_attention)


@pytest.mark.parametrize(
    "capability, settings, expected",
    [
        ((9, 0), dict(), "flash"),
        ((8, 0), dict(attention="varlen"), "varlen"),
        ((8, 0), dict(attention="sdpa"), "sdpa"),
        ((7, 5), dict(), "sdpa"),
        ((9, 0), dict(dtype="float32"), "sdpa"),
        ((9, 0), dict(document_masking=False), "sdpa"),  # nothing to pack
        ((9, 0), dict(document_masking=False, window_start=128, window_end=128), "flash"),
    ],
)
def test_a_gpu_gets_the_first_attention_that_works_on_it(
    flash_modules, monkeypatch, capability, settings, expected
):
    flash_modules(fake_flash(), None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    args = tiny_args(**dict(attention="auto", dtype="bfloat16") | settings)
    assert train_gpt.choose_attention(args, torch.device("cuda", 0))[0] == expected


def test_a_cap_on_attention_goes_to_a_flash_attention_that_knows_it_and_never_to_varlen(
    flash_modules, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    args = tiny_args(attention="auto", dtype="bfloat16", attention_softcap=5.0)
    gpu, given = torch.device("cuda", 0), []

    def knowing(q, k, v, *bounds, softcap=0.0, **settings):
        given.append(softcap)
        return torch.zeros_like(q)

    flash_modules(types.SimpleNamespace(flash_attn_varlen_func=knowing), None)
    name, attention = train_gpt.choose_attention(args, gpu)
    assert name == "flash"
    q = torch.randn(2, 64, 2, 8)
    attention(q, q, q, random_batch(tiny_args()), 0, 0.3, 5.0)
    attention(q, q, q, random_batch(tiny_args()), 0, 0.3)
    assert given == [5.0, 0.0]
    flash_modules(fake_flash(), None)  # knows of no cap
    assert train_gpt.choose_attention(args, gpu)[0] == "sdpa"
    with pytest.raises(RunError, match="no --attention_softcap"):
        train_gpt.choose_attention(dataclasses.replace(args, attention="varlen"), gpu)


def test_a_gpu_without_flash_attention_gets_varlen(flash_modules, monkeypatch):
    flash_modules(None, None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    args = tiny_args(attention="auto", dtype="bfloat16")
    assert train_gpt.choose_attention(args, torch.device("cuda", 0))[0] == "varlen"
    args = tiny_args(attention="flash", dtype="bfloat16")
    with pytest.raises(RunError, match="FlashAttention installed.*auto, sdpa, varlen"):
        train_gpt.choose_attention(args, torch.device("cuda", 0))


@pytest.mark.parametrize("name", ["varlen", "flash"])
def test_attention_that_does_not_run_here_is_refused_with_what_does(name):
    args = tiny_args(attention=name, dtype="bfloat16")
    with pytest.raises(RunError, match=f"--attention {name}.*use one of: auto, sdpa"):
        train_gpt.choose_attention(args, CPU)


# -----------------------------------------------------------------------------
# Who may influence whom


def gradient_per_token(model, batch, windows):
    """Gradient of the loss with respect to what each token looks up, (rows x T, numbers)."""
    tables = [model.embed, *model.value_embeds]
    gradients = torch.autograd.grad(model(batch, windows), [table.weight for table in tables])
    tokens = batch.inputs_BT.flatten().long()
    assert tokens.unique().numel() == tokens.numel(), "each token has to stand for one position"
    return torch.cat([gradient[tokens] for gradient in gradients], dim=1)


def influence(model, batch, position, windows):
    """How strongly each token acts on the logits of one position.

    With another target there, the loss changes by a difference of that position's logits alone;
    so the gradient changes at the tokens that these logits depend on.
    """
    targets = batch.targets_BT.clone()
    targets.view(-1)[position] = (targets.view(-1)[position] + 1) % model.args.vocab_size
    before = gradient_per_token(model, batch, windows)
    after = gradient_per_token(model, batch._replace(targets_BT=targets), windows)
    return (after - before).norm(dim=1)


def distinct_batch(args, lengths=None):
    batch = random_batch(args, rows=2, lengths=lengths)
    inputs = torch.randperm(args.vocab_size, generator=torch.Generator().manual_seed(2))[:128]
    return batch._replace(inputs_BT=inputs.int().view(2, 64))


def influential(model, batch, position, windows) -> set[int]:
    """The tokens that act on a position; nothing lies near the line between acting and not."""
    strength = influence(model, batch, position, windows)
    acts = strength > 3e-6 * strength.max()
    assert strength[~acts].max() < 1e-7 * strength.max()
    return set(acts.nonzero().flatten().tolist())


VARIANTS = {
    "modern": dict(),
    "offset": dict(key_offset=True, bigram_rows=97),
    "groups": dict(num_heads=4, num_kv_heads=2, attention_softcap=5.0, learned_positions=True,
                   activation="swiglu", block_norm="layernorm", norm_gain=True, bias=True,
                   qk_norm="l2"),
    "baseline": baseline_args(
        row_length=64, vocab_size=256, num_layers=2, num_heads=2, model_dim=32, dtype="float32",
        tied_head=False,
    ),
}


def variant(name, **overrides):
    base = VARIANTS[name]
    args = base if dataclasses.is_dataclass(base) else tiny_args(**base)
    return dataclasses.replace(args, **overrides)


@pytest.mark.parametrize("position", [0, 1, 40, 63, 64, 100])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_position_sees_itself_and_all_before_it_in_its_row_and_nothing_after(name, position):
    args = variant(name)
    row_start = position // 64 * 64
    seen = influential(build(args), distinct_batch(args), position, NO_WINDOWS)
    assert seen == set(range(row_start, position + 1))


@pytest.mark.parametrize("windows", [NO_WINDOWS, (2, 4)])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_position_sees_nothing_of_other_documents(name, windows):
    args = variant(name)
    model, batch = build(args), distinct_batch(args, LENGTHS)
    reach = sum(windows) + args.key_offset if any(windows) else 128
    for document, length in enumerate(LENGTHS):
        start = sum(LENGTHS[:document])
        last = start + length - 1
        seen = influential(model, batch, last, windows)
        assert seen == set(range(max(start, last - reach), last + 1))


@pytest.mark.parametrize("num_layers, short, long", [(2, 1, 1), (3, 2, 1), (4, 3, 1), (5, 3, 2)])
def test_every_fourth_layer_and_the_last_look_back_far_and_the_others_little(
    num_layers, short, long
):
    args = tiny_args(num_layers=num_layers)
    model, batch = build(args), distinct_batch(args)
    for windows in ((1, 2), (2, 3)):
        reach = short * windows[0] + long * windows[1]
        assert influential(model, batch, 60, windows) == set(range(60 - reach, 61))


@pytest.mark.parametrize("windows", [NO_WINDOWS, (2, 4)])
@pytest.mark.parametrize("softcap", [0, 5])
def test_with_hidden_tokens_a_position_sees_both_sides_within_its_document(windows, softcap):
    args = tiny_args(masked_share=0.2, attention_softcap=softcap)
    model = build(args)
    for lengths in (LENGTHS, [64, 64]):
        batch = distinct_batch(args, lengths)._replace(is_causal=False)
        reach = sum(windows) if any(windows) else 128
        for position in (0, 15, 40, 70, 126):
            end = next(total for i in range(len(lengths))
                       if (total := sum(lengths[: i + 1])) > position)
            start = end - lengths[[sum(lengths[: i + 1]) for i in range(len(lengths))].index(end)]
            seen = influential(model, batch, position, windows)
            assert seen == set(range(max(start, position - reach),
                                     min(end, position + reach + 1)))


# -----------------------------------------------------------------------------
# The loss


def our_cross_entropy(x, weight, targets, softcap, chunk_size, offsets=None, **switches):
    args = tiny_args(logit_softcap=softcap, loss_chunk_size=chunk_size, **switches)
    return linear_cross_entropy(x, weight, targets[:, None], torch.ones(1), offsets, args, 16.0)


def sample(targets, log_weights, size):
    tokens, offsets, places = sample_vocabulary(targets[None, :, None], log_weights, size)
    return tokens[0], offsets[0], places[0, :, 0]


def reference_cross_entropy(x, weight, targets, softcap):
    logits = x @ weight.T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets.long(), reduction="sum")


@pytest.mark.parametrize("chunk_size", [1, 7, 24, 60, 1000])
@pytest.mark.parametrize("softcap", [0.0, 3.0, 15.0])
def test_the_chunked_loss_equals_cross_entropy_forward_and_backward(softcap, chunk_size):
    x, weight = 4 * torch.randn(60, 16), torch.randn(91, 16)
    targets = torch.randint(91, (60,)).int()
    values = []
    for dtype, function in (
        (torch.float64, reference_cross_entropy),
        (torch.float32, lambda *args: our_cross_entropy(*args, chunk_size)),
    ):
        leaves = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        loss = function(*leaves, targets, softcap)
        values.append([loss.detach(), *torch.autograd.grad(0.37 * loss, leaves)])
    for expected, got in zip(*values, strict=True):
        torch.testing.assert_close(got.double(), expected, atol=2e-5, rtol=1e-5)
    with torch.no_grad():
        without = our_cross_entropy(x, weight, targets, softcap, chunk_size)
    torch.testing.assert_close(without, values[1][0], atol=0, rtol=1e-6)


@pytest.mark.parametrize("softcap", [15.0, 70.0])
def test_logits_that_are_all_far_below_the_cap_lose_no_precision(softcap):
    x, weight = torch.full((4, 2), -100.0), torch.full((300, 2), 100.0)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            loss = our_cross_entropy(x, weight, torch.ones(4).int(), softcap, 3)
        assert loss.item() / 4 == pytest.approx(math.log(300), rel=1e-5)


def test_the_chunked_loss_does_not_overflow():
    x, weight = torch.full((4, 2), 100.0), torch.tensor([[100.0, 100.0], [-100.0, 0.0]])
    for softcap, expected in ((0.0, 4 * 30_000.0), (15.0, 4 * 30.0), (70.0, 4 * 140.0)):
        loss = our_cross_entropy(x, weight, torch.ones(4).int(), softcap, 3)
        assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("softcap", [0.0, 15.0, 70.0])
def test_equal_logits_lose_the_log_of_the_vocabulary_whatever_the_cap(softcap):
    x, weight = torch.zeros(3, 8), torch.randn(50_257, 8)
    loss = our_cross_entropy(x, weight, torch.arange(3).int(), softcap, 2)
    assert loss.item() / 3 == pytest.approx(math.log(50_257), rel=1e-6)


# -----------------------------------------------------------------------------
# A sample of the vocabulary in the training loss


def test_a_sample_holds_every_target_once_and_stands_for_the_whole_vocabulary():
    targets = torch.tensor([5, 9, 5, 290, 0]).int()
    drawn, factors = set(), []
    for _ in range(600):
        tokens, offsets, places = sample(targets, torch.zeros(300), 12)
        assert len(set(tokens.tolist())) == 12 and places.dtype == torch.int32
        assert torch.equal(tokens[places.long()], targets.long())
        is_target = torch.isin(tokens, targets)
        assert is_target.sum() == 4 and (offsets[is_target] == 0).all()
        [factor] = set(offsets[~is_target].exp().tolist())  # equal weights, equal parts
        factors.append(factor)
        drawn |= set(tokens.tolist())
    assert drawn == set(range(300))
    assert sum(factors) / 600 == pytest.approx(296 / 8, rel=0.06)


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_the_expected_sum_over_a_sample_is_the_sum_over_the_vocabulary(spread):
    exp_logits, targets = torch.rand(300) * 5, torch.tensor([3, 4]).int()
    weights, sums = spread * torch.randn(300), []
    for _ in range(4_000):
        tokens, offsets, _ = sample(targets, weights, 100)
        sums.append((exp_logits[tokens] * offsets.exp()).sum())
    error = torch.stack(sums).std().item() / len(sums) ** 0.5
    expected = exp_logits.sum().item()
    assert torch.stack(sums).mean().item() == pytest.approx(expected, abs=4 * error)
    assert error < 0.01 * expected


def test_tokens_of_larger_weight_are_drawn_more_often_and_then_count_less():
    weights, counts = torch.zeros(300), torch.zeros(300)
    weights[100:200] = math.log(10)
    for _ in range(200):
        tokens, offsets, _ = sample(torch.tensor([0]).int(), weights, 61)
        counts[tokens] += 1
        heavy = (tokens >= 100) & (tokens < 200)
        light = ~heavy & (tokens != 0)
        gap = offsets[light].min() - offsets[heavy].max()
        assert gap.item() == pytest.approx(math.log(10), abs=1e-4)
    assert counts[100:200].mean() > 4 * counts[1:100].mean()


def test_a_sample_by_frequency_comes_nearer_to_the_whole_loss():
    bias, rows = -3 * torch.rand(2_000).cumsum(0) / 400, 50
    logits, targets = torch.randn(rows, 2_000) + bias, torch.arange(rows).int()
    errors = []
    for weights in (torch.zeros(2_000), bias):
        found = []
        for _ in range(100):
            tokens, offsets, _ = sample(targets, weights, 200)
            found.append((logits[:, tokens] + offsets).logsumexp(-1) - logits.logsumexp(-1))
        errors.append(torch.stack(found).square().mean().sqrt())
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize("chunk_size", [8, 1000])
@pytest.mark.parametrize("softcap", [0.0, 15.0])
@pytest.mark.parametrize("biased", [False, True])
def test_each_chunk_loses_the_cross_entropy_over_a_sample_of_its_own(biased, softcap, chunk_size):
    x, weight = 4 * torch.randn(40, 16), torch.randn(91, 16)
    targets, bias = torch.randint(91, (40, 2)).int(), torch.randn(91) if biased else None
    leaves, ahead = (x.requires_grad_(), weight.requires_grad_()), torch.tensor([1.0, 0.5])
    args = tiny_args(logit_softcap=softcap, loss_chunk_size=chunk_size, vocab_size=91,
                     sampled_vocab=60)
    with torch.random.fork_rng():
        loss = linear_cross_entropy(x, weight, targets, ahead, bias, args, 16.0)
    losses, log_weights = [0.0, 0.0], bias if biased else torch.zeros(91)
    chunks = targets.unflatten(0, (-1, min(chunk_size, 40)))
    drawn = sample_vocabulary(chunks, log_weights, 60)  # the same as above
    for some_x, tokens, offsets, places in zip(x.split(chunk_size), *drawn, strict=True):
        logits = some_x.double() @ weight.double()[tokens].T
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        logits = logits + offsets + log_weights[tokens]
        for k in range(2):
            losses[k] = losses[k] + F.cross_entropy(
                logits, places[:, k].long(), reduction="sum", ignore_index=-1)
    expected = losses[0] + 0.5 * losses[1]
    for got, wanted in zip([loss.detach(), *torch.autograd.grad(loss, leaves)],
                           [losses[0].detach(), *torch.autograd.grad(expected, leaves)],
                           strict=True):
        torch.testing.assert_close(got.double(), wanted.double(), atol=5e-5, rtol=1e-5)


def test_targets_that_find_no_place_in_a_sample_have_neither_loss_nor_gradient():
    x, weight = torch.randn(30, 8, requires_grad=True), torch.randn(99, 8)
    tokens, offsets, places = sample(torch.arange(30).int(), torch.zeros(99), 20)
    kept = places >= 0
    assert kept.sum() == 20
    loss = our_cross_entropy(x, weight[tokens], places, 15.0, 30, offsets)
    same = our_cross_entropy(x[kept], weight[tokens], places[kept], 15.0, 30, offsets)
    torch.testing.assert_close(loss, same)
    assert torch.equal(torch.autograd.grad(loss, x)[0].any(-1), kept)


@pytest.mark.parametrize("softcap", [0.0, 15.0])
@pytest.mark.parametrize("chunk_size", [7, 1000])
def test_the_gradient_is_that_of_all_tokens_ahead_and_the_loss_that_of_the_next(
    softcap, chunk_size
):
    x, weight = (4 * torch.randn(48, 16)).requires_grad_(), torch.randn(91, 16, requires_grad=True)
    targets, ahead = torch.randint(91, (2, 24)).int(), torch.tensor([1.0, 0.5, 0.125])
    logits = x @ weight.T
    logits = (softcap * torch.tanh(logits / softcap) if softcap else logits).view(2, 24, 91)
    losses = [F.cross_entropy(logits[:, : 24 - k].flatten(0, 1), targets[:, k:].flatten().long(),
                              reduction="sum") for k in range(3)]
    expected = sum(w * loss for w, loss in zip(ahead, losses, strict=True))
    args = tiny_args(logit_softcap=softcap, loss_chunk_size=chunk_size)
    loss = linear_cross_entropy(x, weight, train_gpt.next_tokens(targets, 3), ahead, None, args,
                                16.0)
    torch.testing.assert_close(loss, losses[0])
    for got, wanted in zip(*(torch.autograd.grad(y, (x, weight)) for y in (loss, expected)),
                           strict=True):
        torch.testing.assert_close(got, wanted, atol=5e-5, rtol=1e-4)


def test_the_next_tokens_end_with_their_row():
    targets = torch.tensor([[1, 2, 3], [4, 5, 6]]).int()
    assert train_gpt.next_tokens(targets, 3).tolist() == [
        [1, 2, 3], [2, 3, -1], [3, -1, -1], [4, 5, 6], [5, 6, -1], [6, -1, -1]]


def test_a_sample_keeps_the_tokens_ahead_and_the_ends_of_rows():
    targets = torch.randint(500, (2, 30)).int()
    targets[0, 3] = 0  # which is no -1
    ahead = train_gpt.next_tokens(targets, 3)
    tokens, _, places = sample_vocabulary(ahead[None], torch.zeros(500), 80)
    assert torch.equal(places[0] < 0, ahead < 0)
    assert torch.equal(tokens[0, places[0].long()][places[0] >= 0], ahead[ahead >= 0].long())


def test_chunks_hold_their_own_targets_and_draw_the_rest_independently():
    targets = torch.arange(60).view(2, 30, 1).int()
    tokens, _, _ = sample_vocabulary(targets, torch.zeros(5_000), 1_030)
    sets = [set(some.tolist()) for some in tokens]
    for some, own in zip(sets, targets.flatten(1).tolist(), strict=True):
        assert len(some) == 1_030 and some >= set(own)
    assert 100 < len(sets[0] & sets[1]) < 300  # 1,000 of 5,000, twice


def test_each_chunk_stands_for_the_whole_vocabulary_however_many_targets_it_has():
    few, many = torch.zeros(600), torch.arange(600)
    targets = torch.stack([few, many])[..., None].int()
    sizes = []
    for _ in range(20):
        _, offsets, _ = sample_vocabulary(targets, torch.zeros(2_000), 1_000)
        sizes.append(offsets.exp().sum(1))
    assert torch.stack(sizes).mean(0).tolist() == pytest.approx([2_000, 2_000], rel=0.02)


def test_a_model_that_samples_moves_the_sampled_rows_of_its_head_alone():
    args = tiny_args(sampled_vocab=130, loss_chunk_size=64)
    model, batch = build(args), random_batch(args, rows=1)
    assert batch.targets_BT.numel() == 64
    model(batch, NO_WINDOWS).backward()
    assert model.head.grad.any(-1).sum() == 130
    targets = batch.targets_BT.flatten().long()
    assert model.head.grad[targets].any(-1).all()


def test_a_sample_of_all_tokens_is_the_vocabulary():
    args = tiny_args(sampled_vocab=300)  # of 256
    model, batch = build(args), random_batch(args)
    loss = model(batch, NO_WINDOWS).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(batch, NO_WINDOWS), loss)


@pytest.mark.parametrize("size", [130, 300])
def test_a_logit_bias_is_added_after_the_cap_in_training_sampling_and_validation(size):
    args = tiny_args(unigram_power=0.5, sampled_vocab=size, loss_chunk_size=64)
    model, batch = build(args), random_batch(args)
    bias = 3 * torch.randn(args.vocab_size)
    model.logit_bias.copy_(bias)
    model.head.data.zero_()  # so that the bias alone decides
    expected = -bias.log_softmax(0)[batch.targets_BT.long()].sum()
    with torch.no_grad():
        torch.testing.assert_close(model(batch, NO_WINDOWS), expected)
    if size > args.vocab_size:
        torch.testing.assert_close(model(batch, NO_WINDOWS), expected)
        return
    losses = [model(batch, NO_WINDOWS).detach() for _ in range(300)]
    assert torch.stack(losses).mean().item() == pytest.approx(expected.item(), rel=0.01)


def test_the_model_returns_the_sum_over_all_tokens():
    args = tiny_args()
    model = build(args)
    rows = random_batch(args, rows=4)
    parts = [
        MicroBatch(rows.inputs_BT[i : i + 1], rows.targets_BT[i : i + 1],
                   torch.tensor([0, 64]).int(), 64, True)
        for i in range(4)
    ]
    total = sum(model(part, NO_WINDOWS).item() for part in parts)
    assert model(rows, NO_WINDOWS).item() == pytest.approx(total, rel=1e-6)
    assert total / rows.targets_BT.numel() > 1


@pytest.mark.parametrize("embed_shortcut", [True, False])
def test_a_pair_comes_in_with_the_shortcut_of_the_embedding_or_else_at_the_start(embed_shortcut):
    args = tiny_args(bigram_rows=97, embed_shortcut=embed_shortcut)
    model, batch = build(args), random_batch(args)
    torch.nn.init.normal_(model.bigram_embed.weight)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[:2]))
    model(batch, NO_WINDOWS)
    [(x, x0)] = seen
    embedding = train_gpt.norm(model.embed(batch.inputs_BT), args.norm_eps)
    assert torch.equal(x, embedding if embed_shortcut else x0)
    assert not torch.equal(x0, embedding)
    if embed_shortcut:  # a little of it from the start
        assert GPT(args).blocks[0].residual_lambdas.tolist() == pytest.approx([1.0, 0.05])


def test_a_pair_of_tokens_has_its_row_and_a_first_token_is_paired_with_itself():
    args = tiny_args(bigram_rows=97)
    model, batch = build(args), random_batch(args, lengths=LENGTHS)
    model(batch, NO_WINDOWS).backward()
    tokens, starts = batch.inputs_BT.flatten().tolist(), set(batch.cu_seqlens.tolist())
    pairs = {(token, tokens[i] if i in starts else tokens[i - 1]) for i, token in enumerate(tokens)}
    rows = model.bigram_embed.weight.grad.abs().sum(1).nonzero().flatten().tolist()
    assert set(rows) == {((36_313 * token) ^ (27_191 * before)) % 97 for token, before in pairs}


def test_with_the_key_offset_a_long_layer_finds_a_token_by_the_one_before_it():
    """Keys that do not rotate at all come whole from the token before, in long layers only."""
    args = tiny_args(num_layers=4, rotary_fraction=0.0, key_offset=True)
    keys = []

    def attention(q, k, v, batch, window, scale, softcap):
        keys.append(k)
        return sdpa_attention(q, k, v, batch, window, scale)

    batch = random_batch(args, lengths=LENGTHS)
    for key_offset in (False, True):
        torch.manual_seed(0)
        model = GPT(dataclasses.replace(args, key_offset=key_offset), attention)
        model(batch, NO_WINDOWS)
    starts = torch.tensor(sorted(set(batch.cu_seqlens.tolist()) - {128}))
    for plain, offset in zip(keys[:3], keys[4:7], strict=True):
        assert torch.equal(plain, offset)
    plain, offset = keys[3].flatten(0, 1), keys[7].flatten(0, 1)
    expected = plain.roll(1, dims=0)
    expected[starts] = plain[starts]
    assert torch.equal(offset, expected) and not torch.equal(offset, plain)


# -----------------------------------------------------------------------------
# Switches against what they should compute


@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("layout", BATCHES.values(), ids=BATCHES)
def test_a_softcap_bends_the_logits_of_attention(layout, window):
    batch, cap = random_batch(tiny_args(), **layout), 0.5
    capped = lambda *args: sdpa_attention(*args, softcap=cap)  # noqa: E731
    bent = lambda *args: naive_attention(*args, softcap=cap)  # noqa: E731
    got = outputs_and_gradients(capped, batch, window)
    expected = outputs_and_gradients(bent, batch, window, torch.float64)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_queries_in_a_row_share_a_head_of_keys_and_values(softcap):
    batch = random_batch(tiny_args(), lengths=LENGTHS)
    q, k, v = torch.randn(2, 64, 6, 8), *torch.randn(2, 2, 64, 2, 8)
    repeated = [x.repeat_interleave(3, dim=2) for x in (k, v)]
    expected = sdpa_attention(q, *repeated, batch, 7, 0.3, softcap)
    torch.testing.assert_close(sdpa_attention(q, k, v, batch, 7, 0.3, softcap), expected)


def test_packed_attention_gets_as_many_heads_of_keys_as_of_queries(monkeypatch):
    attention = fake_varlen_attn(monkeypatch)
    batch = random_batch(tiny_args(), lengths=LENGTHS)
    q, k, v = torch.randn(2, 64, 6, 8), *torch.randn(2, 2, 64, 2, 8)
    torch.testing.assert_close(attention(q, k, v, batch, 7, 0.3),
                               sdpa_attention(q, k, v, batch, 7, 0.3))


def test_fewer_heads_of_keys_are_the_model_whose_heads_of_keys_are_equal():
    few = build(tiny_args(num_heads=4, num_kv_heads=2, attention_softcap=3.0, value_embeddings=0))
    many = build(tiny_args(num_heads=4, attention_softcap=3.0, value_embeddings=0))
    weights = few.state_dict()
    for name in weights:
        if name.endswith("qkv"):  # (2 queries + key + value, 2 heads, K) of each head of keys
            parts = weights[name].unflatten(1, (2, 8))
            q = parts[:2].transpose(0, 1).flatten(0, 1)  # the queries of a head of keys in a row
            k, v = (part.repeat_interleave(2, dim=0) for part in parts[2:])
            weights[name] = torch.stack([part.flatten(0, 1) for part in (q, k, v)])
    many.load_state_dict(weights)
    batch = random_batch(few.args, lengths=LENGTHS)
    assert few(batch, (8, 16)).item() == pytest.approx(many(batch, (8, 16)).item(), rel=1e-6)


@pytest.mark.parametrize("kind, expected", [
    ("rmsnorm", lambda x, g, b: g * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()),
    ("layernorm", lambda x, g, b: b + g * (x - x.mean(-1, keepdim=True))
     / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()),
])
def test_norms_are_what_they_are_called(kind, expected):
    norm = train_gpt.Norm(tiny_args(block_norm=kind, norm_gain=True, bias=True))
    gain, bias, x = torch.rand(32), torch.randn(32), 3 * torch.randn(5, 32) + 1
    norm.gain.data = gain
    if kind == "layernorm":
        norm.bias.data = bias
    torch.testing.assert_close(norm(x), expected(x, gain, bias), atol=1e-5, rtol=1e-5)
    assert sum(1 for _ in train_gpt.Norm(tiny_args(block_norm=kind)).parameters()) == 0


@pytest.mark.parametrize("activation, expected", [
    ("relu2", lambda h: h.clamp_min(0) ** 2), ("relu", lambda h: h.clamp_min(0)),
    ("gelu", lambda h: h * (1 + torch.erf(h / 2**0.5)) / 2), ("silu", lambda h: h * h.sigmoid()),
    ("swiglu", lambda h: h[..., :6] * h[..., 6:] * h[..., 6:].sigmoid()),
    ("swiglu-wide", lambda h: h[..., :6] * h[..., 6:] * h[..., 6:].sigmoid()),
])
def test_activations_are_what_they_are_called(activation, expected):
    h = 2 * torch.randn(3, 12)
    torch.testing.assert_close(train_gpt.activate(h, activation), expected(h))


def test_swiglu_has_as_many_weights_or_as_wide_a_layer():
    def sizes(activation):
        mlp = train_gpt.MLP(tiny_args(model_dim=96, activation=activation))
        return sum(p.numel() for p in mlp.parameters()), mlp.projection.size(1)

    weights, width = sizes("relu2")
    assert sizes("swiglu") == (weights, width * 2 / 3)
    assert sizes("swiglu-wide") == (weights * 3 / 2, width)


def test_learned_places_reach_over_the_longest_row():
    args = tiny_args(learned_positions=True, val_row_length=128)
    rows = random_batch(tiny_args(row_length=128, val_batch_size=128), rows=1)
    assert math.isfinite(build(args)(rows, NO_WINDOWS).item())


def test_the_warm_up_of_hidden_tokens_sees_both_sides():
    for share in (0.0, 0.2):
        batch = train_gpt.random_micro_batch(tiny_args(masked_share=share), 256, training=True)
        assert batch.is_causal == (share == 0)


def test_with_a_bias_a_product_is_exact_whatever_the_bound():
    x, weight, bias = torch.randn(16, 32), torch.randn(48, 32), torch.randn(48)
    torch.testing.assert_close(train_gpt.linear(x, weight, 10.0, bias), x @ weight.T + bias)


def test_learned_places_count_from_each_documents_start():
    args = tiny_args()
    is_first = torch.zeros(2, 64, dtype=torch.bool)
    batch = random_batch(args, lengths=LENGTHS)
    is_first.view(-1)[batch.cu_seqlens[:-1].long()] = True
    expected = torch.cat([torch.arange(length) for length in LENGTHS]).view(2, 64)
    assert torch.equal(train_gpt.places(is_first), expected)


def test_huge_logits_leave_the_gradient_finite():
    logits = torch.tensor([[43_463.0, 1e6, -1e6, 0.0]])
    for kind in ("tanh", "shifted", "isru"):
        losses, grad = train_gpt.cross_entropy(logits.clone(), torch.tensor([[3]]), torch.ones(1),
                                               None, 4, 15.0, 1.0, torch.float32, kind)
        assert losses.isfinite().all() and grad.isfinite().all(), kind


@pytest.mark.parametrize("kind, expected", [
    ("tanh", lambda x: 4 * torch.tanh(x / 4)), ("shifted", lambda x: 4 * torch.tanh((x + 5) / 4)),
    ("isru", lambda x: x / (1 + (x / 4) ** 2).sqrt()),
])
def test_a_softcap_of_each_kind_has_its_own_curve_and_gradient(kind, expected):
    logits = (3 * torch.randn(6, 9)).requires_grad_()
    targets, ahead = torch.randint(9, (6, 1)), torch.ones(1)
    losses, grad = train_gpt.cross_entropy(
        logits.detach().clone(), targets, ahead, None, 9, 4.0, 1.0, torch.float32, kind)
    reference = F.cross_entropy(expected(logits), targets[:, 0], reduction="none")
    torch.testing.assert_close(losses, reference.detach())
    torch.testing.assert_close(grad, torch.autograd.grad(reference.sum(), logits)[0])
    args = tiny_args(logit_softcap=4.0, softcap_kind=kind)
    x, weight = torch.randn(6, 5), torch.randn(9, 5)
    with torch.no_grad():  # as validation and generation see it
        total = linear_cross_entropy(x, weight, targets, ahead, None, args, 16.0)
    torch.testing.assert_close(
        total, F.cross_entropy(expected(x @ weight.T), targets[:, 0], reduction="sum"))


# -----------------------------------------------------------------------------
# Every switch

SWITCHES = [
    dict(activation="relu2"),
    dict(activation="gelu"),
    dict(activation="relu"),
    dict(activation="silu"),
    dict(activation="swiglu"),
    dict(activation="swiglu-wide"),
    dict(bias=True),
    dict(bias=True, block_norm="layernorm", norm_gain=True),
    dict(block_norm="layernorm"),
    dict(norm_gain=True),
    dict(qk_norm="none"),
    dict(qk_norm="l2"),
    dict(attention_softcap=1.0),
    dict(num_kv_heads=1),
    dict(num_kv_heads=2, num_heads=4),
    dict(learned_positions=True),
    dict(learned_positions=True, rotary_fraction=0.0),
    dict(tied_head=True, untie_frac=0.5),
    dict(softcap_kind="shifted"),
    dict(softcap_kind="isru"),
    dict(attention_scale=0.0),
    dict(attention_output_scale=0.2),
    dict(rotary_fraction=0.0),
    dict(rotary_fraction=1.0),
    dict(rotary_base=10_000.0),
    dict(norm_eps=1e-3),
    dict(norm_embed=False),
    dict(tied_head=True),
    dict(logit_softcap=0.0),
    dict(key_offset=True),
    dict(key_offset=True, rotary_fraction=0.0),
    dict(bigram_rows=97),
    dict(value_embeddings=0),
    dict(value_embeddings=2),
    dict(skip_connections=False),
    dict(embed_shortcut=False),
    dict(embed_shortcut=False, bigram_rows=97),
    dict(mlp_ratio=2),
    dict(num_heads=1),
    dict(num_heads=3, attention_dim=24),
    dict(attention_gate=True),
    dict(output_mixing=True),
    dict(output_mixing=True, num_layers=1, value_embeddings=0),
    dict(num_layers=5),
    dict(num_layers=1, value_embeddings=0),
]


def loss_and_gradients(args, batch, windows):
    model = build(args)
    loss = model(batch, windows)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("switch", [{}, *SWITCHES], ids=str)
def test_every_switch_trains_every_parameter_and_matters(switch):
    args = tiny_args(**dict(num_layers=4) | switch)
    batch = random_batch(args, lengths=LENGTHS)
    loss, gradients = loss_and_gradients(args, batch, (8, 16))
    assert math.isfinite(loss)
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert gradient.isfinite().all() and gradient.abs().max() > 1e-7, name
    default = tiny_args(**dict(num_layers=4) | ({"tied_head": True} if args.untie_frac else {}))
    if args != default and not args.untie_frac:  # which begins as a tied head
        assert loss != loss_and_gradients(default, batch, (8, 16))[0]


@pytest.mark.parametrize("zero_init", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_a_fresh_model_has_finite_gradients_for_every_parameter(zero_init, tied):
    args = tiny_args(num_layers=4, zero_init_projections=zero_init, tied_head=tied)
    torch.manual_seed(3)
    model = GPT(args)
    model(random_batch(args), NO_WINDOWS).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
    assert any(p.grad.abs().max() > 0 for p in model.parameters())


def test_masking_and_windows_change_what_is_computed():
    args = tiny_args()
    whole, cut = random_batch(args), random_batch(args, lengths=LENGTHS)
    model = build(args)
    losses = [model(batch, windows).item() for batch in (whole, cut)
              for windows in (NO_WINDOWS, (4, 8), (4, 9), (5, 8))]
    assert len(set(losses)) == 8


@pytest.mark.parametrize("residual_dtype", ["bfloat16", "float32"])
def test_bfloat16_stays_near_float32(residual_dtype):
    args = tiny_args(num_layers=4)
    batch = random_batch(args, lengths=LENGTHS)
    exact = build(args)(batch, NO_WINDOWS)
    model = build(tiny_args(num_layers=4, dtype="bfloat16", residual_dtype=residual_dtype))
    rough = model(batch, NO_WINDOWS)
    rough.backward()
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(exact.item(), rel=0.01)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())


# -----------------------------------------------------------------------------
# Initial weights


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    one, same, other = (build(tiny_args(), awake=False, seed=seed) for seed in (1, 1, 2))
    for a, b in zip(one.parameters(), same.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one.embed.weight, other.embed.weight)
    assert not torch.equal(one.blocks[0].attn.qkv, other.blocks[0].attn.qkv)


def test_an_untied_head_of_zeros_predicts_all_tokens_alike():
    args = tiny_args()
    batch = random_batch(args)
    for softcap in (0.0, 15.0):
        model = build(dataclasses.replace(args, logit_softcap=softcap), awake=False)
        loss = model(batch, NO_WINDOWS).item() / batch.targets_BT.numel()
        assert loss == pytest.approx(math.log(256), abs=1e-5)


def test_projections_start_at_zero_only_when_asked():
    for zero in (True, False):
        model = build(tiny_args(zero_init_projections=zero), awake=False)
        outputs = [model.head, *(p for name, p in model.named_parameters() if "projection" in name)]
        assert len(outputs) == 5
        assert all((p.abs().max() == 0) == zero for p in outputs)


def test_weights_start_in_the_spread_of_a_linear_layer_and_unit_embeddings():
    model = build(tiny_args(zero_init_projections=False), awake=False)
    for name, p in model.named_parameters():
        if "embed" in name:
            assert p.std().item() == pytest.approx(1, abs=0.03)
        elif p.ndim > 1:
            bound = p.size(-1) ** -0.5
            assert 0.95 * bound < p.abs().max() <= bound
            assert p.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    tied = build(tiny_args(tied_head=True), awake=False).embed.weight
    assert 0.95 * 32**-0.5 < tied.abs().max() <= 32**-0.5


def test_a_parameter_that_nobody_initialises_is_named():
    class Extended(GPT):
        def reset_parameters(self):
            self.tilt = torch.nn.Parameter(torch.empty(3))
            super().reset_parameters()

    with pytest.raises(RunError, match="tilt.*reset_parameters"):
        Extended(tiny_args())


# -----------------------------------------------------------------------------
# Rotary position embedding


def rotate(x, **overrides):
    """x (T, K) rotated at positions 0 to T - 1."""
    args = tiny_args(model_dim=x.size(1), num_heads=1, row_length=len(x), val_tokens=len(x),
                     batch_size=len(x), device_batch_size=len(x), val_batch_size=len(x),
                     max_document_length=8, **overrides)
    return Rotary(args)(x[None, :, None])[0, :, 0]


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_rotation_keeps_norms_and_depends_on_the_distance_alone_even_far_out(fraction):
    q, k = torch.randn(2, 16).double()
    length = 16_384
    rotated_q, rotated_k = (
        rotate(x.float().expand(length, -1), rotary_fraction=fraction).double() for x in (q, k)
    )
    torch.testing.assert_close(rotated_q.norm(dim=1), q.norm().expand(length), rtol=1e-6, atol=0)
    for distance in (0, 1, 5, 300):
        products = (rotated_q[distance:] * rotated_k[: length - distance]).sum(1)
        assert products.max() - products.min() < 1e-5
    for distance in (1, 5):
        apart = (rotated_q[distance] * rotated_k[0]).sum() - (rotated_q[0] * rotated_k[0]).sum()
        assert (apart.abs() > 1e-3) == (fraction > 0)


@pytest.mark.parametrize("base, fraction", [(10_000.0, 1.0), (1_024.0, 0.5)])
def test_rotation_angles_at_far_positions_equal_those_in_float64(base, fraction):
    x = torch.randn(16_384, 16)
    active = round(8 * fraction)
    frequency = [base ** -(i / active) if i < active else 0.0 for i in range(8)]
    angle = torch.outer(torch.arange(16_384).double(), torch.tensor(frequency, dtype=torch.float64))
    turned = torch.polar(torch.ones_like(angle), -angle) * torch.complex(*x.double().chunk(2, 1))
    expected = torch.cat([turned.real, turned.imag], 1)
    got = rotate(x, rotary_base=base, rotary_fraction=fraction)
    torch.testing.assert_close(got.double(), expected, atol=2e-6, rtol=0)
    rough = rotate(x.bfloat16(), rotary_base=base, rotary_fraction=fraction)
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.double(), expected, atol=0.02, rtol=0.02)


# -----------------------------------------------------------------------------
# The recipes, written once more


def test_the_baseline_has_gpt2_smalls_parameters():
    with torch.device("meta"):
        model = GPT(baseline_args())
    count = sum(p.numel() for p in model.parameters())
    assert count == 123_532_032 == 50_257 * 768 + 12 * 12 * 768**2
    assert len({p.data_ptr for p in model.parameters()}) == 1 + 12 * 4


def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def rotary(x, base, share):
    """Rotate the first `share` of the frequencies of x (T, H, K), pairs being (i, i + K / 2)."""
    T, _, K = x.shape
    active = round(K / 2 * share)
    frequency = torch.zeros(K // 2).double()
    frequency[:active] = base ** (-torch.arange(active).double() / active)
    turn = torch.polar(torch.ones(1).double(), -torch.arange(T)[:, None, None] * frequency)
    y = torch.complex(x[..., : K // 2], x[..., K // 2 :]) * turn
    return torch.cat([y.real, y.imag], -1)


def attend(q, k, v, visible, scale):
    scores = scale * torch.einsum("qhc,khc->hqk", q, k)
    return torch.einsum("hqk,khc->qhc", scores.masked_fill(~visible, -1e9).softmax(-1), v)


def summed_loss(logits, targets):
    return -logits.log_softmax(-1)[torch.arange(len(targets)), targets.long()].sum()


def reference_baseline(weights, batch, num_layers, heads):
    """Loss of a pre-norm transformer with rotary attention and a tied head, in float64."""
    total = 0.0
    for row, targets in zip(batch.inputs_BT.long(), batch.targets_BT, strict=True):
        x = weights["embed.weight"][row]
        T, D = x.shape
        for i in range(num_layers):
            w = {name: weights[f"blocks.{i}.{name}"] for name in
                 ("attn.qkv", "attn.projection", "mlp.up", "mlp.projection")}
            q, k, v = ((rms(x) @ matrix.T).view(T, heads, -1) for matrix in w["attn.qkv"])
            q, k = rotary(q, 10_000.0, 1.0), rotary(k, 10_000.0, 1.0)
            y = attend(q, k, v, torch.ones(T, T).tril().bool(), (D / heads) ** -0.5)
            x = x + y.reshape(T, D) @ w["attn.projection"].T / 24**0.5
            h = rms(x) @ w["mlp.up"].T
            x = x + h * 0.5 * (1 + torch.erf(h / 2**0.5)) @ w["mlp.projection"].T
        total = total + summed_loss(rms(x) @ weights["embed.weight"].T, targets)
    return total


def reference_modern(weights, batch, num_layers, heads, tables, windows):
    """Loss of the modern recipe with so many value-embedding tables, in float64."""
    total, length = 0.0, batch.inputs_BT.size(1)
    document = torch.searchsorted(batch.cu_seqlens, torch.arange(batch.inputs_BT.numel()),
                                  right=True).view(-1, length)
    for r, (row, targets) in enumerate(zip(batch.inputs_BT.long(), batch.targets_BT, strict=True)):
        x = x0 = rms(weights["embed.weight"][row])
        T, D = x.shape
        outputs = []
        distance = torch.arange(T)[:, None] - torch.arange(T)
        for i in range(num_layers):
            w = {name.removeprefix(f"blocks.{i}."): p for name, p in weights.items()}
            mirror = num_layers - 1 - i
            if i > mirror:  # the second half hears the first, the innermost layers first
                x = x + weights["skip_lambdas"][mirror] * outputs[mirror]
            x = w["residual_lambdas"][0] * x + w["residual_lambdas"][1] * x0
            q, k, v = ((rms(x) @ matrix.T).view(T, heads, -1) for matrix in w["attn.qkv"])
            q, k = (rotary(rms(z), 1_024.0, 0.5) for z in (q, k))
            table = i if i < tables else i - (num_layers - tables) if mirror < tables else None
            if table is not None:
                extra = weights[f"value_embeds.{table}.weight"][row].view(T, heads, -1)
                v = w["attn.value_lambdas"][0] * v + w["attn.value_lambdas"][1] * extra
            window = windows[1] if i % 4 == 3 or mirror == 0 else windows[0]
            visible = (distance >= 0) & (distance <= window)
            visible &= document[r][:, None] == document[r]
            y = attend(q, k, v, visible, 0.12)
            x = x + y.reshape(T, D) @ w["attn.projection"].T
            x = x + (rms(x) @ w["mlp.up"].T).clamp(min=0) ** 2 @ w["mlp.projection"].T
            outputs.append(x)
        logits = 15 * torch.tanh(rms(x) @ weights["head"].T / 15)
        total = total + summed_loss(logits, targets)
    return total


def assert_same_loss_and_gradients(model, batch, windows, reference, *settings):
    weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    expected, loss = reference(weights, batch, *settings), model(batch, windows)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad.double(), weights[name].grad, atol=1e-4, rtol=1e-4,
                                   msg=lambda text, name=name: f"{name}: {text}")


def test_the_baseline_equals_an_independent_implementation_forward_and_backward():
    args = baseline_args(row_length=64, vocab_size=256, num_layers=3, num_heads=4, model_dim=32,
                         dtype="float32")
    model, windows = wake_up(GPT(args), scale=2), train_gpt.attention_windows(0, args)
    assert_same_loss_and_gradients(model, random_batch(args), windows, reference_baseline, 3, 4)


@pytest.mark.parametrize("layers, tables", [(4, 2), (5, 2), (8, 3)])
def test_the_modern_recipe_equals_an_independent_implementation_forward_and_backward(
    layers, tables
):
    args = tiny_args(num_layers=layers, value_embeddings=tables)
    batch = random_batch(args, lengths=LENGTHS)
    assert_same_loss_and_gradients(build(args), batch, (5, 11), reference_modern, layers, 2,
                                   tables, (5, 11))
