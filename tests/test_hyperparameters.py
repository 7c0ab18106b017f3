"""The command line, recipes and tracks: what it takes, what it refuses, and what it makes of it."""

import dataclasses
import importlib.util
import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import train_gpt
from train_gpt import lr_multiplier, parse_hyperparameters, reasons_not_a_record

FIELDS = {field.name: field for field in dataclasses.fields(train_gpt.Hyperparameters)}
SMALL = ("--track sample --recipe sample --model_dim 16 --num_heads 2 --num_layers 2 "
         "--row_length 64").split()

# Another value of each field, as text, that is fine next to SMALL.
OTHER = dict(
    track="sample", recipe="sample-baseline", seed="5", run_id="abc", data_path="elsewhere",
    target="2.5", val_tokens="1024", token_budget="3000000", depth="3",
    target_param_data_ratio="2", batch_size="512",
    batch_stages="256,512", batch_lr_power="0.25", device_batch_size="256", val_batch_size="128",
    row_length="32", val_row_length="128", document_masking="false", max_document_length="99",
    document_rests="true", masked_share="0.25", vocab_size="50300", num_layers="6", num_heads="4",
    num_kv_heads="1", attention_dim="48", model_dim="32", mlp_ratio="2", activation="gelu",
    bias="true", block_norm="layernorm", norm_gain="true", qk_norm="none", attention_scale="0.25",
    attention_softcap="30",
    attention_output_scale="0.5", attention_gate="true", rotary_base="500", rotary_fraction="1",
    learned_positions="true",
    norm_eps="1e-4", norm_embed="false", tied_head="true", untie_frac="0.5",
    logit_softcap="30", softcap_kind="isru",
    unigram_power="0.25", key_offset="true", bigram_rows="1009", value_embeddings="0",
    skip_connections="false", embed_shortcut="false", output_mixing="true",
    zero_init_projections="false", window_start="64", window_end="640", window_growth="stepwise",
    optimizer="adam",
    matrix_lr="0.01", embed_lr="0.02", bigram_lr="0.2", head_lr="0.03", scalar_lr="0.5",
    muon_momentum="0.9", muon_beta2="0.9", muon_nesterov="false", muon_iteration="newton-schulz",
    muon_steps="4",
    adam_beta1="0.7", adam_beta2="0.99", adam_eps="1e-7",
    row_moments="true", weight_decay="0.01", grad_clip="1", train_steps="9",
    warmup_frac="0.1", cooldown_frac="0.2", cooldown_shape="sqrt", final_lr_frac="0.3",
    dtype="bfloat16", residual_dtype="bfloat16", loss_chunk_size="32", sampled_vocab="30000",
    tokens_ahead="2", attention="sdpa", fp8_head="true", fp8_blocks="true", fp8_gradients="true",
    triton_kernels="true", compile="true", cuda_graphs="true", kernel_warmup="true", save_every="2",
    save_on_exit="true", resume="latest", resume_anyway="true", stop_at_target="true",
    val_loss_every="3", log_every="7", log_dir="there", sample_every="4", log_wandb="true",
    wandb_project="project", wandb_name="name",
)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def refusal(capsys):
    """Of a command line that has to be refused: the message, after the usage."""

    def refuse(*argv) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            parse_hyperparameters([*SMALL, *map(str, argv)])
        assert stop.value.code == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        return printed.err.split("error:", 1)[1]

    return refuse


def parse_value(name: str, text: str):
    return text == "true" if FIELDS[name].type is bool else FIELDS[name].type(text)


# -----------------------------------------------------------------------------
# Options


def test_every_field_is_tried_below():
    assert list(OTHER) == list(FIELDS)


@pytest.mark.parametrize("hyphens", [False, True])
@pytest.mark.parametrize("equals", [False, True])
def test_an_option_sets_its_field_in_every_spelling(hyphens, equals):
    argv = []
    alone = ("resume", "masked_share", "untie_frac")  # want a checkpoint, no sampling, no clipping
    others = {name: text for name, text in OTHER.items() if name not in alone}
    for name, text in others.items():
        option = "--" + (name.replace("_", "-") if hyphens else name)
        argv += [f"{option}={text}"] if equals else [option, text]
    before, after = parse_hyperparameters(SMALL), parse_hyperparameters(argv)
    for name, text in others.items():
        value = getattr(after, name)
        assert value == parse_value(name, text) and type(value) is FIELDS[name].type
        assert name == "track" or getattr(before, name) != value, "no other value: tests nothing"


BOOLS = [name for name, field in FIELDS.items() if field.type is bool]


@pytest.mark.parametrize("text", "true True yes 1 false FALSE no 0".split())
def test_a_bool_is_a_word(text):
    args = parse_hyperparameters([*SMALL, *(f"--{name}={text}" for name in BOOLS)])
    value = text in ("true", "True", "yes", "1")
    assert {name: getattr(args, name) for name in BOOLS} == dict.fromkeys(BOOLS, value)


def test_a_bare_flag_is_true():
    args = parse_hyperparameters([*(f"--{name}" for name in BOOLS), *SMALL])
    assert {name: getattr(args, name) for name in BOOLS} == dict.fromkeys(BOOLS, True)
    assert parse_hyperparameters([*SMALL, "--tied_head"]).tied_head is True


@pytest.mark.parametrize("name", BOOLS)
def test_a_bool_that_is_no_such_word_is_refused(name, refusal):
    assert f"--{name}" in refusal(f"--{name}", "maybe")


@pytest.mark.parametrize("name", [n for n, f in FIELDS.items() if f.type in (int, float)])
def test_a_number_of_the_wrong_type_is_refused(name, refusal):
    wrong = ["many", ""] + ([] if FIELDS[name].type is float else ["4.5", "1e3"])
    for text in wrong:
        message = refusal(f"--{name}={text}")
        assert f"--{name}" in message and FIELDS[name].type.__name__ in message


@pytest.mark.parametrize(
    "typo, meant",
    [
        ("--train_step", "--train_steps"),
        ("--train-step=5", "--train_steps"),
        ("--trian_steps", "--train_steps"),
        ("--Matrix_lr", "--matrix_lr"),
        ("--batchsize", "--batch_size"),
        ("--total_batch-sise", "--total_batch_size"),
    ],
)
def test_a_misspelt_option_is_refused_with_the_likely_one(typo, meant, refusal):
    message = refusal(typo, *([] if "=" in typo else ["5"]))
    assert typo in message and "did you mean" in message
    assert meant in message.split("did you mean")[1]


def test_an_option_like_no_other_is_refused_too(refusal):
    assert "--zzzz" in refusal("--zzzz")
    assert "stray" in refusal("stray")
    assert "--train_steps" in refusal("--train_steps")  # its value is missing


@pytest.mark.parametrize("name", train_gpt.CHOICES)
def test_a_choice_is_refused_outside_its_list_which_is_shown(name, refusal):
    message = refusal(f"--{name}", "nonsense")
    assert f"--{name}" in message and "nonsense" in message
    for choice in train_gpt.CHOICES[name]:
        assert choice in message


def test_recipes_and_tracks_are_all_choices():
    assert train_gpt.CHOICES["track"] == tuple(train_gpt.TRACKS)
    assert train_gpt.CHOICES["recipe"] == tuple(train_gpt.RECIPES)
    for recipe in train_gpt.RECIPES.values():
        assert set(recipe) <= set(FIELDS)
    for track in train_gpt.TRACKS.values():
        assert set(track) <= set(FIELDS) and track["recipe"] in train_gpt.RECIPES


def test_help_explains_every_field_with_its_comment(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setenv("NO_COLOR", "1")
    with pytest.raises(SystemExit) as stop:
        parse_hyperparameters(["-h"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    paragraphs = [" ".join(text.split()) for text in re.split(r"\n  (?=-)", shown)]
    source = (ROOT / "train_gpt.py").read_text().split("class Hyperparameters:")[1]
    for name in FIELDS:
        line = re.search(rf"^    {name}: .*$", source, re.MULTILINE).group()
        comment = line.split("  # ", 1)[1].strip()
        assert comment, f"{name} is not explained"
        assert [p for p in paragraphs if p.startswith(f"--{name}") and comment in p], name
    assert "./run.sh" in shown and "torchrun" in shown  # how to start it, from the docstring


# -----------------------------------------------------------------------------
# Recipes and tracks


def test_defaults_then_recipe_then_track_then_command_line(monkeypatch):
    recipes, tracks = train_gpt.RECIPES, train_gpt.TRACKS
    recipe = tracks["sample"]["recipe"]
    monkeypatch.setitem(recipes, recipe, recipes[recipe] | dict(target=1.0, log_every=3))
    monkeypatch.setitem(tracks, "sample", tracks["sample"] | dict(target=2.0, val_loss_every=4))
    args = parse_hyperparameters(["--track", "sample"])
    assert args.seed == FIELDS["seed"].default  # neither recipe nor track
    assert args.log_every == 3  # the recipe before the default
    assert args.target == 2.0  # the track before the recipe
    assert args.val_loss_every == 4
    args = parse_hyperparameters(["--target", "3", "--track", "sample", "--log_every", "5"])
    assert (args.target, args.log_every) == (3.0, 5)  # the command line before all


def test_a_recipe_on_the_command_line_replaces_that_of_the_track():
    args = parse_hyperparameters(["--track", "sample", "--recipe", "sample-baseline"])
    assert (args.recipe, args.optimizer, args.target) == ("sample-baseline", "adam", 7.2)
    assert parse_hyperparameters(["--track", "sample"]).optimizer == "muon"


def test_the_default_track_depends_on_a_gpu(monkeypatch):
    assert parse_hyperparameters([]) == parse_hyperparameters(["--track", "sample"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    args = parse_hyperparameters([])
    assert (args.track, args.recipe) == ("single-gpu", "modern")
    assert dataclasses.replace(args) == parse_hyperparameters(["--track", "single-gpu"])


def test_hopper_gpus_have_default_recipes_of_their_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    args = parse_hyperparameters([])
    assert (args.track, args.recipe, args.fp8_blocks) == ("single-gpu", "record", True)
    assert not reasons_not_a_record(args, 1)
    assert parse_hyperparameters(["--recipe", "modern"]).recipe == "modern"
    for track, recipe in (("gpt2-small", "small"), ("gpt2-medium", "medium")):
        for world_size in ("1", "2", "4", "8"):
            monkeypatch.setenv("WORLD_SIZE", world_size)
            args = parse_hyperparameters(["--track", track])
            assert args.recipe == recipe
            assert args.common_rows % int(world_size) == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert parse_hyperparameters([]).recipe == "modern"


@pytest.mark.parametrize(
    "track, target, val_tokens, budget, data_path",
    [
        ("single-gpu", 3.3821, 1_048_576, 5_000_000_000, "data/fineweb10B"),
        ("gpt2-small", 3.28, 10_485_760, None, "data/fineweb10B"),
        ("gpt2-medium", 2.92, 10_485_760, None, "data/fineweb10B"),
        ("time-to-gpt2", 0.0, 10_485_760, None, "data/fineweb10B"),
    ],
)
def test_a_track_claims_its_target_on_its_tokens(track, target, val_tokens, budget, data_path):
    args = parse_hyperparameters(["--track", track])
    assert (args.track, args.target, args.val_tokens) == (track, target, val_tokens)
    assert args.data_path == data_path
    assert budget is None or args.token_budget == budget
    assert args.vocab_size == 50_257
    assert args.train_steps * args.batch_size <= args.token_budget
    assert not reasons_not_a_record(args, 1)


@pytest.mark.parametrize("recipe", train_gpt.RECIPES)
def test_every_recipe_fits_a_track_as_it_is(recipe):
    track = "sample" if recipe.startswith("sample") else "gpt2-medium"
    args = parse_hyperparameters(["--track", track, "--recipe", recipe])
    assert args.recipe == recipe
    for name, value in train_gpt.RECIPES[recipe].items():
        assert getattr(args, name) == value


@pytest.mark.parametrize("switch", ["fp8_head", "fp8_blocks"])
@pytest.mark.parametrize("name, value, fits", [("model_dim", 24, 32), ("loss_chunk_size", 40, 48)])
def test_8_bit_floats_need_sizes_that_are_multiples_of_16(switch, name, value, fits, refusal):
    message = refusal(f"--{name}", value, f"--{switch}")
    assert f"--{name} must be a multiple of 16" in message and str(value) in message
    parse_hyperparameters([*SMALL, f"--{name}", str(value)])
    parse_hyperparameters([*SMALL, f"--{name}", str(fits), f"--{switch}"])


EIGHT_BITS = ["fp8_head", "fp8_blocks", "fp8_gradients"]


@pytest.mark.parametrize("capability, triton, off", [
    ((9, 0), True, []), ((10, 0), True, EIGHT_BITS[2:]), ((8, 9), True, EIGHT_BITS[2:]),
    ((12, 0), True, EIGHT_BITS[2:]), ((9, 0), False, [*EIGHT_BITS, "triton_kernels"]),
    ((8, 0), True, EIGHT_BITS), ((7, 5), True, EIGHT_BITS),
    ((7, 0), True, [*EIGHT_BITS, "triton_kernels"]),
    (None, True, [*EIGHT_BITS, "triton_kernels", "cuda_graphs"]),
])
def test_what_a_device_cannot_run_is_switched_off_by_name(monkeypatch, capability, triton, off):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: triton or None)
    device = torch.device("cuda" if capability else "cpu")
    args = parse_hyperparameters(["--track", "single-gpu", "--recipe", "record"])
    changed, notes = train_gpt.switch_off(args, device)
    assert changed == dataclasses.replace(args, **dict.fromkeys(off, False))
    assert [note.split()[0] for note in notes] == [f"--{name}" for name in off]
    modern = parse_hyperparameters(["--track", "single-gpu", "--recipe", "modern"])
    assert train_gpt.switch_off(modern, device) == (modern, [])


def test_without_a_warm_up_there_are_no_cuda_graphs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    args = parse_hyperparameters(["--track", "single-gpu", "--recipe", "record",
                                  "--kernel_warmup", "false"])
    changed, notes = train_gpt.switch_off(args, torch.device("cuda"))
    assert changed == dataclasses.replace(args, cuda_graphs=False)
    assert [note.split(":")[0] for note in notes] == ["--cuda_graphs is off here"]


@pytest.mark.parametrize("switches, off", [
    (["--norm_gain"], []), (["--bias"], ["fp8_blocks"]),
    (["--bias", "--norm_gain"], ["fp8_head", "fp8_blocks"])])
def test_what_leaves_no_bound_switches_8_bit_floats_off(monkeypatch, switches, off):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    args = parse_hyperparameters(["--track", "single-gpu", "--recipe", "record", *switches])
    changed, notes = train_gpt.switch_off(args, torch.device("cuda"))
    assert changed == dataclasses.replace(args, **dict.fromkeys(off, False))
    assert len(notes) == len(off) and all("bound" in note for note in notes)


def test_the_budget_refuses_a_step_too_many_and_names_the_most(refusal):
    single_gpu = ["--track", "single-gpu", "--recipe", "baseline"]
    most = 5_000_000_000 // 524_288
    assert parse_hyperparameters([*single_gpu, "--train_steps", str(most)]).train_steps == most
    large = ["--row_length", 1024, "--num_layers", 12, "--num_heads", 12, "--model_dim", 768]
    message = refusal(*large, *single_gpu, "--train_steps", most + 1)
    assert "--train_steps" in message and f"{most:,}" in message and "5,000,000,000" in message
    assert "lower --batch_size" in refusal("--batch_size", 2**22)  # not one step fits
    assert "over the budget" in refusal("--train_steps", 10**15)  # and at once


@pytest.mark.parametrize("stages", ["", "256", "256,512", "256,256,1024", "256,512,256,512,1024"])
def test_the_training_tokens_are_those_of_all_steps(stages):
    for steps in range(1, 14):
        args = train_gpt.Hyperparameters(batch_stages=stages, train_steps=steps)
        assert args.train_tokens == sum(map(args.batch_size_at, range(steps)))


def test_the_baseline_recipe_is_that_of_the_benchmark():
    args = parse_hyperparameters(["--track", "single-gpu", "--recipe", "baseline"])
    assert (args.num_layers, args.num_heads, args.head_dim, args.model_dim) == (12, 12, 64, 768)
    assert (args.vocab_size, args.tied_head) == (50_257, True)
    assert (args.rotary_base, args.rotary_fraction) == (10_000.0, 1.0)
    assert (args.norm_eps, args.activation, args.mlp_ratio) == (1e-6, "gelu", 4)
    assert args.attention_output_scale == pytest.approx(1 / 24**0.5, rel=1e-12)
    assert args.attention_scale in (0.0, 0.125)  # 1/sqrt(64)
    rates = {args.matrix_lr, args.embed_lr, args.head_lr, args.scalar_lr}
    assert args.optimizer == "adam" and rates == {0.0018}
    assert (args.adam_beta1, args.adam_beta2, args.weight_decay) == (0.9, 0.95, 0.1)
    assert (args.train_steps, args.batch_size, args.row_length) == (4_768, 524_288, 1_024)
    assert round(args.warmup_frac * args.train_steps) == 256
    assert round(args.cooldown_frac * args.train_steps) == 1_024
    assert args.final_lr_frac == 0.0
    assert (args.dtype, args.residual_dtype) == ("bfloat16", "float32")
    # None of the newer ideas
    assert (args.document_masking, args.window_start, args.window_end) == (False, 0, 0)
    assert args.qk_norm == "none"
    assert not (args.norm_embed or args.logit_softcap or args.value_embeddings)
    assert not (args.skip_connections or args.embed_shortcut or args.zero_init_projections)


# -----------------------------------------------------------------------------
# Sizes that do not fit

WRONG_SIZES = [
    ("--batch_size 100", ["--batch_size", "--row_length 64", "got 100"]),
    ("--batch_stages 128,100", ["--batch_stages", "--row_length 64", "got 100"]),
    ("--batch_stages 128,0", ["--batch_stages", "got 0"]),
    ("--batch_stages 128;256", ["--batch_stages", "'128;256'"]),
    ("--batch_stages 64,999936 --train_steps 5", ["5 steps x 64 to 999,936 tokens", "over the"]),
    ("--device_batch_size 96", ["--device_batch_size 96", "--row_length 64"]),
    ("--val_batch_size 65", ["--val_batch_size 65", "--row_length 64"]),
    ("--val_row_length 96", ["--val_batch_size", "--val_row_length 96"]),
    ("--val_row_length -64", ["--val_row_length", "negative"]),
    ("--sampled_vocab -1", ["--sampled_vocab", "negative"]),
    ("--sampled_vocab 100 --loss_chunk_size 48", ["--device_batch_size", "--loss_chunk_size 48"]),
    ("--val_tokens 1000", ["--val_tokens 1000", "--row_length 64"]),
    ("--model_dim 18", ["--model_dim 18", "--num_heads 2"]),
    ("--model_dim 12", ["--model_dim 12", "--num_heads 2"]),  # an odd number of rotary pairs
    ("--num_heads 3", ["--num_heads 3"]),
    ("--attention_dim 20 --num_heads 3", ["--attention_dim 20", "--num_heads 3"]),
    ("--attention_dim -16", ["--attention_dim", "negative"]),
    ("--unigram_power -1", ["--unigram_power", "negative"]),
    ("--value_embeddings 2", ["--value_embeddings 2", "--num_layers"]),
    ("--value_embeddings -1", ["--value_embeddings"]),
    ("--warmup_frac 1.1", ["--warmup_frac", "1.1"]),
    ("--cooldown_frac -0.1", ["--cooldown_frac", "-0.1"]),
    ("--cooldown_frac nan", ["--cooldown_frac", "nan"]),
    ("--final_lr_frac 2", ["--final_lr_frac", "2"]),
    ("--rotary_fraction 1.5", ["--rotary_fraction", "1.5"]),
    ("--logit_softcap 71", ["--logit_softcap", "at most 70"]),
    ("--seed -1", ["--seed", "between 0"]),
    ("--target nan", ["--target", "nan"]),
    ("--val_loss_every -2", ["--val_loss_every", "-1 or more"]),
    ("--window_start 512 --window_end 256", ["--window_start 512", "--window_end 256"]),
    ("--window_start 0 --window_end 256", ["--window_start 0", "--window_end 256"]),
    ("--window_start 256 --window_end 0", ["--window_start 256", "--window_end 0"]),
    ("--window_start -300", ["--window_start"]),
    ("--bigram_rows -1", ["--bigram_rows"]),
    ("--rotary_base 0", ["--rotary_base"]),
    ("--tokens_ahead 65 --row_length 64", ["--tokens_ahead 65", "--row_length 64"]),
    *((f"--{name} {value}", [f"--{name}"])
      for name in ("adam_beta1", "adam_beta2", "muon_beta2", "muon_momentum")
      for value in (-0.1, 1)),
    *((f"--{name} -0.1", [f"--{name}", "negative"]) for name in ("norm_eps", "weight_decay")),
    *((f"--{kind}_lr -0.1", [f"--{kind}_lr", "negative"]) for kind in train_gpt.LEARNING_RATES),
    ("--adam_eps 0", ["--adam_eps", "above 0"]),
    ("--stop_at_target --target 0", ["--stop_at_target", "give a --target"]),
    *((f"--{name} {value}", [f"--{name}"])
      for name in ("batch_size", "device_batch_size", "val_batch_size", "row_length", "val_tokens",
                   "max_document_length", "num_layers", "num_heads", "model_dim", "train_steps",
                   "loss_chunk_size", "log_every", "vocab_size", "mlp_ratio")
      for value in (0, -64)),
]


def test_a_batch_size_that_is_asked_for_takes_the_place_of_the_recipes_stages():
    options = ["--recipe", "record", "--track", "single-gpu"]
    recipe = parse_hyperparameters(options)
    asked = parse_hyperparameters([*options, "--batch_size", "131072"])
    assert len(recipe.stage_batch_sizes) == 3 and asked.stage_batch_sizes == [131_072]
    both = parse_hyperparameters([*options, "--batch_size", "131072",
                                  "--batch_stages", "65536,131072"])
    assert both.stage_batch_sizes == [65_536, 131_072]


@pytest.mark.parametrize("options, named", WRONG_SIZES, ids=[options for options, _ in WRONG_SIZES])
def test_sizes_that_do_not_fit_are_refused_by_name(options, named, refusal):
    message = refusal(*options.split())
    assert "Traceback" not in message
    for text in named:
        assert text in message


def test_sizes_at_the_edge_are_taken():
    for options in ("--warmup_frac 0 --cooldown_frac 1 --final_lr_frac 1 --rotary_fraction 0",
                    "--window_start 0 --window_end 0", "--window_start 256 --window_end 256",
                    "--value_embeddings 1", "--val_loss_every 0", "--max_document_length 9999",
                    "--batch_size 64 --device_batch_size 64 --val_batch_size 64 --val_tokens 64"):
        parse_hyperparameters([*SMALL, *options.split()])


# -----------------------------------------------------------------------------
# Records


@pytest.mark.parametrize(
    "option", ["data_path=elsewhere", "target=3.5", "val_tokens=16384", "token_budget=4999999999"]
)
def test_a_changed_claim_is_not_a_record(option):
    name, value = option.split("=")
    args = parse_hyperparameters(["--track", "single-gpu", f"--{option}"])
    [reason] = reasons_not_a_record(args, 1)
    assert name in reason and value in reason
    assert str(train_gpt.TRACKS["single-gpu"][name]) in reason


def test_all_reasons_are_named():
    args = parse_hyperparameters(["--track", "single-gpu", "--data_path=x", "--target=4"])
    reasons = "; ".join(reasons_not_a_record(args, 8))
    assert "data_path" in reasons and "target" in reasons and "8 GPUs" in reasons


def test_other_hyperparameters_may_change_in_a_record():
    args = parse_hyperparameters(
        "--track single-gpu --train_steps 99 --seed 3 --matrix_lr 1 --recipe baseline".split()
    )
    assert reasons_not_a_record(args, 1) == []


def test_only_the_single_gpu_track_is_bound_to_one_gpu():
    args = parse_hyperparameters(["--track", "single-gpu"])
    assert reasons_not_a_record(args, 1) == []
    [reason] = reasons_not_a_record(args, 2)
    assert "2 GPUs" in reason
    assert reasons_not_a_record(parse_hyperparameters(["--track", "gpt2-small"]), 8) == []


# -----------------------------------------------------------------------------
# Importing


def test_importing_train_gpt_has_no_side_effects(tmp_path):
    code = """
import json, signal, sys, threading
import numpy, torch
before = signal.getsignal(signal.SIGTERM), torch.get_rng_state(), torch.get_default_dtype()
import train_gpt
after = signal.getsignal(signal.SIGTERM), torch.get_rng_state(), torch.get_default_dtype()
print(json.dumps(dict(
    cuda=torch.cuda.is_initialized(), dist=torch.distributed.is_initialized(),
    same=before[0] == after[0] and torch.equal(before[1], after[1]) and before[2] == after[2],
    threads=[t.name for t in threading.enumerate() if t is not threading.main_thread()],
    heavy=[name for name in ("wandb", "matplotlib", "flash_attn") if name in sys.modules],
)))
"""
    python_path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": python_path,
                        "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code, "--nonsense"], cwd=tmp_path, env=env,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    [line] = done.stdout.splitlines()
    assert json.loads(line) == dict(cuda=False, dist=False, same=True, threads=[], heavy=[])
    assert list(tmp_path.iterdir()) == []


# -----------------------------------------------------------------------------
# The dial of depth


def dialled(recipe: str, depth: int, *options):
    return parse_hyperparameters(["--track", "gpt2-small", "--recipe", recipe, "--depth",
                                  str(depth), "--token_budget", "99000000000", *options])


RECIPES = ["modern", "record", "baseline"]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("depth", [4, 5, 7, 12, 16, 26, 36])
def test_a_model_of_each_depth_follows_the_rules(recipe, depth):
    base, args = train_gpt.RECIPES[recipe], dialled(recipe, depth)
    base = dataclasses.replace(train_gpt.Hyperparameters(), **base)
    assert (args.num_layers, args.model_dim) == (depth, 64 * depth)
    assert args.head_dim == base.head_dim
    share = base.attention_width / base.model_dim
    assert args.num_heads >= 2
    assert abs(args.attention_width - share * args.model_dim) <= base.head_dim / 2 or \
        args.num_heads == 2
    root = (base.model_dim / args.model_dim) ** 0.5
    for kind in train_gpt.LEARNING_RATES:
        factor = 1 if kind == "matrix" and base.optimizer == "muon" else root
        assert getattr(args, f"{kind}_lr") == pytest.approx(factor * getattr(base, f"{kind}_lr"))
    # Weights, counted anew: per block qkv, the output, the MLP; gates, mixing, head.
    width, hidden = args.model_dim, args.mlp_ratio * args.model_dim
    weights = depth * (4 * args.attention_width * width + 2 * hidden * width)
    weights += args.vocab_size * width
    assert args.train_tokens == pytest.approx(10.5 * weights, rel=0.02)
    growth = [a / b for a, b in zip(args.stage_batch_sizes, base.stage_batch_sizes, strict=True)]
    assert len(set(growth)) == 1 and math.log2(growth[0]) == round(math.log2(growth[0]))
    assert args.batch_size == base.batch_size  # what the learning rates are those of
    train_gpt.check_accumulation(args, 1)


def test_the_batch_goes_with_the_tokens_and_the_weight_decay_against_the_steps():
    small, middle, large = (dialled("baseline", depth) for depth in (6, 12, 36))
    assert [a.stage_batch_sizes[0] for a in (small, middle, large)] == [2**18, 2**19, 2**20]
    short, long = (dialled("baseline", 12, "--target_param_data_ratio", str(ratio))
                   for ratio in (2, 100))
    assert [a.stage_batch_sizes[0] for a in (short, long)] == [2**18, 2**20]
    record = [dialled("record", depth, "--target_param_data_ratio", str(ratio))
              for depth, ratio in ((4, 0.5), (16, 20))]

    def shrinks(args) -> float:
        """By how much weights do over the run."""
        rates = [args.matrix_lr * lr_multiplier(step, args) for step in range(args.train_steps)]
        return args.weight_decay * sum(rates)

    for recipe, sizes in (("baseline", (small, middle, large)), ("record", record)):
        whole = shrinks(parse_hyperparameters(["--track", "single-gpu", "--recipe", recipe]))
        assert whole and [shrinks(args) for args in sizes] == pytest.approx([whole] * len(sizes),
                                                                           rel=0.01)
    assert dialled("modern", 24).weight_decay == 0


def test_the_length_follows_the_ratio_and_each_rule_gives_way_to_an_option():
    plain = dialled("modern", 8)
    assert dialled("modern", 8, "--target_param_data_ratio", "21").train_tokens == pytest.approx(
        2 * plain.train_tokens, rel=0.01)
    args = dialled("modern", 8, "--batch_size", "131072", "--device_batch_size", "32768")
    assert (args.stage_batch_sizes, args.device_batch_size) == ([131_072], 32_768)
    assert args.train_tokens == pytest.approx(plain.train_tokens, rel=0.01)
    stages = dialled("record", 12).train_tokens
    for size in ("32768", "524288"):
        args = dialled("record", 12, "--batch_size", size, "--device_batch_size", "32768")
        assert args.stage_batch_sizes == [int(size)]
        assert args.train_tokens == pytest.approx(stages, rel=0.01)
    medium = train_gpt.RECIPES["medium"]
    for name, value in dataclasses.asdict(dialled("record", 16)).items():
        if name.endswith("_lr"):
            assert value == pytest.approx(medium.get(name, value), rel=2e-3)
    args = dialled("modern", 8, "--train_steps", "50", "--embed_lr", "0.5", "--num_heads", "8",
                   "--attention_dim", "256")
    assert (args.train_steps, args.embed_lr, args.num_heads, args.head_dim) == (50, 0.5, 8, 32)
    assert dialled("modern", 8, "--total_batch_size", "auto") == plain
    args = dialled("modern", 8, "--total-batch-size", "131072")
    assert args.stage_batch_sizes == [131_072] and args.batch_size == plain.batch_size
    by_rule, by_hand = dialled("baseline", 30), dialled("baseline", 30, "--batch_size", "1048576")
    assert by_rule == by_hand  # and so are its learning rates
    assert dialled("baseline", 12, "--weight_decay", "0.3").weight_decay == 0.3
    assert dialled("baseline", 12, "--matrix_lr", "0").matrix_lr == 0
    # The budget counts for the model that is asked for, not for the recipe's.
    assert dialled("modern", 4, "--token_budget", "200000000").train_tokens < 200_000_000


@pytest.mark.parametrize("world_size", ["2", "4", "8"])
def test_a_micro_batch_that_is_not_given_suits_the_ranks(monkeypatch, world_size):
    monkeypatch.setenv("WORLD_SIZE", world_size)
    small = ["--track", "gpt2-small", "--recipe", "small"]
    large = ["--track", "single-gpu", "--recipe", "record", "--batch_size", "393216"]
    for args in (dialled("baseline", 6), dialled("modern", 8), dialled("modern", 16),
                 parse_hyperparameters(small), parse_hyperparameters(large)):
        train_gpt.check_accumulation(args, int(world_size))
    given = parse_hyperparameters([*small, "--device_batch_size", "65536"])
    assert given.device_batch_size == 65_536


def test_a_micro_batch_is_as_large_as_the_recipes_where_ranks_can_share_it(monkeypatch):
    for world_size, tokens in (("1", 65_536), ("2", 65_536), ("4", 32_768), ("3", 65_536)):
        monkeypatch.setenv("WORLD_SIZE", world_size)
        args = parse_hyperparameters(["--track", "gpt2-small", "--recipe", "small"])
        assert args.device_batch_size == tokens


def test_gpt2s_scale_of_outputs_goes_with_the_blocks():
    for depth in (6, 12, 24):
        assert dialled("baseline", depth).attention_output_scale == pytest.approx(
            (2 * depth) ** -0.5)
    assert dialled("modern", 6).attention_output_scale == 1


def test_without_depth_nothing_is_dialled(refusal):
    assert "--depth" in refusal("--target_param_data_ratio", "3")
    assert "--depth" in refusal("--depth", "-1")
    assert "above 0" in refusal("--depth", "2", "--target_param_data_ratio", "0")
    assert "lower --target_param_data_ratio, --depth" in refusal("--depth", "8")
    assert "--train_steps" in refusal("--depth", "2", "--train_steps", "0")
    assert "--total_batch_size" in refusal("--total_batch_size", "much")


def test_fp8_is_short_for_all_of_it():
    args = parse_hyperparameters([*SMALL, "--fp8", "--fp8_gradients", "false"])
    assert args.fp8_head and args.fp8_blocks and args.triton_kernels and not args.fp8_gradients
