"""Generation: what the memory keeps gives the same logits as computing all anew, and what is drawn
from them."""

import itertools
import math

import pytest
import torch
from conftest import START, build, random_batch, tiny_args, wake_up

import train_gpt
from train_gpt import GPT, Memory, MicroBatch, RunError, choose_token, generate, next_logits

WINDOWS = 6, 13  # tokens; shorter than the texts
LENGTH = 40

# Each with all weights random, so that every switch tells in the logits.
CONFIGS = {
    "modern": dict(num_layers=4, value_embeddings=2),
    "baseline": dict(num_layers=2, tied_head=True, activation="gelu", document_masking=False,
                     qk_norm="none", attention_scale=0.0, rotary_fraction=1.0, norm_embed=False,
                     logit_softcap=0.0, value_embeddings=0, skip_connections=False,
                     embed_shortcut=False),
    "record": dict(num_layers=5, attention_dim=16, key_offset=True, bigram_rows=97,
                   attention_gate=True, output_mixing=True, unigram_power=0.5),
    "every other switch": dict(num_heads=4, num_kv_heads=2, attention_softcap=5.0, qk_norm="l2",
                               learned_positions=True, activation="swiglu", bias=True,
                               block_norm="layernorm", norm_gain=True, softcap_kind="shifted"),
    "bigrams in the residual": dict(bigram_rows=97, embed_shortcut=False),
}
NO_WINDOWS = "baseline"


def make(name: str, **overrides) -> tuple[GPT, tuple[int, int]]:
    model = build(tiny_args(**CONFIGS[name] | overrides))
    return model, (0, 0) if name == NO_WINDOWS else WINDOWS


def uncached_logits(model: GPT, windows, tokens: list[int]) -> torch.Tensor:
    """Logits after each of the tokens, (T, V), computed all at once."""
    inputs = torch.tensor([tokens]).int()
    ends = torch.tensor([0, len(tokens)]).int()
    batch = MicroBatch(inputs, inputs, ends, len(tokens), whole_rows=False)
    with torch.no_grad():
        return model.logits(model.hidden(batch, windows)[0])


def cached_logits(model: GPT, windows, tokens: list[int], prompt: int) -> torch.Tensor:
    """Logits after the first `prompt` tokens, and after each one that follows."""
    memory = Memory(len(tokens), torch.device("cpu"))
    inputs = torch.tensor([tokens]).int()
    parts = [inputs[:, :prompt], *inputs[:, prompt:].split(1, dim=1)]
    return torch.stack([next_logits(model, windows, part, memory) for part in parts])


@pytest.mark.parametrize("prompt", [1, 2, 10, LENGTH - 1])
@pytest.mark.parametrize("name", CONFIGS)
def test_remembered_and_computed_anew_are_the_same(name, prompt):
    model, windows = make(name)
    tokens = random_batch(model.args, rows=1).inputs_BT[0, :LENGTH].tolist()
    expected = uncached_logits(model, windows, tokens)
    found = cached_logits(model, windows, tokens, prompt)
    assert expected.std(dim=0).mean() > 0.1  # the place in the text matters
    torch.testing.assert_close(found, expected[prompt - 1 :], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("windows, change", [
    ((5, 13), {}), ((7, 13), {}), ((6, 12), {}), ((6, 14), {}),
    *((WINDOWS, {name: 0}) for name in ("key_offset", "attention_gate", "output_mixing",
                                        "bigram_rows", "value_embeddings")),
])
def test_the_comparison_sees_each_of_them(windows, change):
    """A model that differs in one thing has other logits after a text of this length."""
    model, other = make("record")[0], make("record", **change)[0]
    other.load_state_dict(model.state_dict(), strict=False)
    tokens = random_batch(model.args, rows=1).inputs_BT[0, :LENGTH].tolist()
    ours = cached_logits(model, WINDOWS, tokens, 3)
    difference = (cached_logits(other, windows, tokens, 3) - ours).abs()
    assert difference.amax() > 2e-3


# -----------------------------------------------------------------------------
# generate


@pytest.mark.parametrize("name", CONFIGS)
def test_temperature_zero_takes_the_likeliest_each_time(name):
    model, windows = make(name)
    text = prompt = [7, 200, 31]
    for _ in range(30):
        text = [*text, uncached_logits(model, windows, text)[-1].argmax().item()]
    assert list(generate(model, windows, prompt, 30, temperature=0)) == text[3:]
    assert list(generate(model, windows, prompt, 30, top_k=1, seed=5)) == text[3:]
    assert list(generate(model, windows, prompt, 30, top_p=1e-6, seed=5)) == text[3:]


def test_the_seed_decides():
    model, windows = make("modern")
    texts = [list(generate(model, windows, [1, 2], 20, seed=seed)) for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]
    assert all(len(text) == 20 for text in texts)


def test_what_else_is_drawn_changes_nothing():
    """Neither does generation draw from the generator that training uses."""
    model, windows = make("modern")
    state = torch.get_rng_state()
    text = list(generate(model, windows, [1, 2], 20, seed=3))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert list(generate(model, windows, [1, 2], 20, seed=3)) == text


def test_it_ends_where_a_document_would_start():
    model, windows = build(tiny_args(vocab_size=START + 1, unigram_power=1.0)), WINDOWS
    with torch.no_grad():
        model.logit_bias[START] = 100.0
    assert list(generate(model, windows, [START, 5], 20)) == [START]
    with torch.no_grad():
        model.logit_bias[START] = -100.0
    assert len(list(generate(model, windows, [START, 5], 20))) == 20


def test_tokens_come_one_by_one():
    model, windows = make("modern")
    passes = []
    model.blocks[0].register_forward_hook(lambda *_: passes.append(1))
    tokens = generate(model, windows, [1, 2, 3], 20, temperature=0)
    for count, _ in enumerate(itertools.islice(tokens, 5), 1):
        assert len(passes) == count


def test_a_text_can_be_as_long_as_a_row_and_no_longer():
    model, windows = make("modern", val_row_length=128)
    assert len(list(generate(model, windows, [1] * 100, 28))) == 28
    with pytest.raises(RunError, match="100 tokens and 29 more.* 128"):
        next(generate(model, windows, [1] * 100, 29))


# -----------------------------------------------------------------------------
# choose_token

CHANCES = 0.1, 0.5, 0.15, 0.25  # the likeliest are 1, 3, 2, 0


@pytest.mark.parametrize("options, expected", [
    (dict(), CHANCES),
    (dict(temperature=0.5), [0.1**2, 0.5**2, 0.15**2, 0.25**2]),
    (dict(temperature=2.0), [math.sqrt(chance) for chance in CHANCES]),
    (dict(top_k=1), [0, 1, 0, 0]),
    (dict(top_k=3), [0, 0.5, 0.15, 0.25]),
    (dict(top_k=10), CHANCES),
    (dict(top_p=0.4), [0, 1, 0, 0]),
    (dict(top_p=0.74), [0, 0.5, 0, 0.25]),
    (dict(top_p=0.76), [0, 0.5, 0.15, 0.25]),
    (dict(top_p=0.91), CHANCES),
    (dict(top_p=0.76, top_k=2), [0, 0.5, 0, 0.25]),
    (dict(top_p=0.8, temperature=0.5), [0, 0.5**2, 0, 0.25**2]),
])
def test_how_often_each_token_is_drawn(options, expected):
    generator = torch.Generator().manual_seed(0)
    settings = dict(temperature=1.0, top_k=0, top_p=1.0) | options
    logits = torch.tensor(CHANCES).log() + 3.0
    draws = 2_000
    found = [choose_token(logits, **settings, generator=generator).item() for _ in range(draws)]
    for token, chance in enumerate(expected):
        chance /= sum(expected)
        allowed = 4 * math.sqrt(chance * (1 - chance) / draws)  # none at 0 and at 1
        assert abs(found.count(token) / draws - chance) <= allowed + 1e-12


def test_a_text_of_the_model_for_the_log():
    """`write_sample` begins a document, and leaves the model as it was."""
    class Letters:
        n_vocab = 256

        def decode(self, tokens):
            return bytes(tokens).decode("latin-1")

    args = tiny_args(vocab_size=START + 1, row_length=128, max_document_length=128,
                     batch_size=512, model_dim=16, fp8_blocks=True)
    model = GPT(args)
    wake_up(model)
    first, again = (train_gpt.write_sample(model, WINDOWS, Letters(), seed=1) for _ in range(2))
    assert first == again and isinstance(first, str)
    assert all(block.mlp.fp8 and block.attn.fp8 for block in model.blocks)
