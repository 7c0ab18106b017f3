"""Train a GPT-2-small-class language model on FineWeb to a fixed validation loss, fast.

The default track is one GPU, val loss <= 3.3821 on the first 1,048,576 FineWeb validation tokens
with at most 5B training tokens; TRACKS lists the others. Read from top to bottom: hyper-parameters,
data, model, optimizers, schedules, evaluation, logging, main.

    ./run.sh                                                    # finds the hardware and the data
    python train_gpt.py                                         # one GPU, or a CPU (track `sample`)
    torchrun --standalone --nproc_per_node=8 train_gpt.py       # several GPUs share each step
    python train_gpt.py --recipe baseline --train_steps 400     # any hyper-parameter by its name
"""

import argparse
import base64
import copy
import dataclasses
import difflib
import hashlib
import importlib.util
import inspect
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

# -----------------------------------------------------------------------------
# Hyper-parameters, recipes and tracks


@dataclass(frozen=True)
class Hyperparameters:
    """All that defines a run. Edit a default here, or override it: `--train_steps 2000`."""

    # The run
    track: str = "single-gpu"  # a row of TRACKS; without a GPU the default is `sample`
    recipe: str = "modern"  # a row of RECIPES; the default is the track's
    seed: int = 1337  # fixes the initial weights; the order of the data is always the same
    run_id: str = ""  # name of the log; empty: made from the date, the recipe and the seed
    # The claim: a run that changes one of these four is not a record of its track
    data_path: str = "data/fineweb10B"  # folder of *_train_*.bin and *_val_*.bin
    target: float = 0.0  # val loss to reach, nats per token; 0: none
    val_tokens: int = 1_048_576  # the first so many tokens of the val shards
    token_budget: int = 5_000_000_000  # training tokens at most
    # The dial: one of a family of models, in place of the recipe's sizes; the rules are in `dial`
    depth: int = 0  # blocks; sets width, heads, rates, batch and steps too; 0: the recipe's own
    target_param_data_ratio: float = 10.5  # with `depth`: training tokens per weight in products
    # Data and batches
    batch_size: int = 393_216  # tokens per step, over all GPUs and micro-batches
    batch_stages: str = ""  # instead, in stages of equally many steps, as 512,1024
    batch_lr_power: float = 0.5  # learning rates go with (tokens of the step / batch_size)^this
    device_batch_size: int = 49_152  # tokens per micro-batch and GPU; changes memory, not training
    val_batch_size: int = 65_536  # tokens per validation forward and GPU; changes memory only
    row_length: int = 16_384  # tokens per row; no document and no attention crosses a row
    val_row_length: int = 0  # the same for validation; 0: row_length
    document_masking: bool = True  # pack whole documents into rows; false: cut the stream
    max_document_length: int = 2_048  # tokens that a document is cut to
    document_rests: bool = False  # train on what is cut off too, as documents of their own
    masked_share: float = 0.0  # share of tokens to hide, and predict from both sides; 0: next token
    # Model
    vocab_size: int = 50_257  # tokens
    num_layers: int = 12  # blocks
    num_heads: int = 6  # attention heads
    num_kv_heads: int = 0  # heads of keys and values, each for as many queries'; 0: num_heads
    attention_dim: int = 0  # width of queries, keys and values, of all heads; 0: model_dim
    model_dim: int = 768  # width of the residual stream
    mlp_ratio: int = 4  # MLP width / model_dim
    activation: str = "relu2"  # relu2, relu, gelu, silu, swiglu (as many weights), swiglu-wide
    bias: bool = False  # what the blocks' matrix products and gained LayerNorms add, learned
    block_norm: str = "rmsnorm"  # before attention, MLP and head: rmsnorm or layernorm
    norm_gain: bool = False  # those norms have a learned factor on each dimension
    qk_norm: str = "rms"  # of queries and keys: rms, l2 (to a length learned by head) or none
    attention_scale: float = 0.12  # softmax scale; 0: 1/sqrt(width of a head)
    attention_softcap: float = 0.0  # the same cap for attention's; wants FlashAttention; 0: off
    attention_output_scale: float = 1.0  # factor on what attention adds to the residual
    attention_gate: bool = False  # each token scales each head's output, by 0 to 2
    rotary_base: float = 1_024.0  # longest wavelength / 2 pi, tokens
    rotary_fraction: float = 0.5  # share of the head's dimensions that rotate; 0: no rotary
    learned_positions: bool = False  # a table of places in the sequence, beside the embedding
    norm_eps: float = 1e-6  # added to the mean square in RMSNorm
    norm_embed: bool = True  # RMS-normalise the token embedding
    tied_head: bool = False  # the head shares the token embedding's weight
    untie_frac: float = 0.0  # share of the steps after which a tied head goes its own way; 0: none
    logit_softcap: float = 15.0  # logits -> cap * tanh(logits / cap); 0: off
    softcap_kind: str = "tanh"  # tanh; shifted: of logits + 5; isru: x / sqrt(1 + (x / cap)^2)
    unigram_power: float = 0.0  # logits start from log(frequency of the token), times this
    key_offset: bool = False  # long windows: a key's unrotated part is that of the token before
    bigram_rows: int = 0  # rows of a table of hashed token pairs, beside the embedding; 0: off
    value_embeddings: int = 3  # tables added to the values of the first and the last layers
    skip_connections: bool = True  # U-net: outputs of the first half added in the second half
    embed_shortcut: bool = True  # each block mixes the token embedding (and the pair's) back in
    output_mixing: bool = False  # each token adds its own shares of earlier outputs to the last one
    zero_init_projections: bool = True  # attention and MLP outputs and an untied head start at 0
    window_start: int = 256  # tokens that long-window layers look back at the start; 0: no limit
    window_end: int = 1_792  # the same at the end; short-window layers look back half as far
    window_growth: str = "linear"  # linear, geometric or stepwise (in three stages)
    # Optimizers
    optimizer: str = "muon"  # of the hidden matrices: muon or adam; the rest is always adam
    matrix_lr: float = 0.05  # of the hidden matrices
    embed_lr: float = 0.3  # of the token embedding, if it is not tied, and of value embeddings
    bigram_lr: float = 0.6  # of the bigram table
    head_lr: float = 0.008  # of the head, tied or not, and of the output mixing
    scalar_lr: float = 0.04  # of the learned scalars and gates
    muon_momentum: float = 0.95  # reached from 0.85 over the first fifth of the run
    muon_beta2: float = 0.0  # decay of NorMuon's mean squares of each row; 0: plain Muon
    muon_nesterov: bool = True  # look one step ahead along the momentum
    muon_iteration: str = "polar-express"  # polar-express or newton-schulz
    muon_steps: int = 5  # of that iteration
    adam_beta1: float = 0.8  # decay of the first moment
    adam_beta2: float = 0.95  # decay of the second moment
    adam_eps: float = 1e-10  # added to the root of the second moment
    row_moments: bool = False  # embedding tables: one second moment per row, first ones in bfloat16
    weight_decay: float = 0.0  # decoupled, of all parameters; times the learning rate
    grad_clip: float = 0.0  # largest norm of the gradient of a step's mean loss; 0: off
    # Schedule
    train_steps: int = 1_500  # optimizer steps
    warmup_frac: float = 0.0  # share of the steps in which the learning rates rise from 0
    cooldown_frac: float = 0.45  # share of the steps in which they fall
    cooldown_shape: str = "linear"  # linear, cosine or sqrt (1 - the root of what is done)
    final_lr_frac: float = 0.05  # share of the learning rates left at the end
    # Numbers and speed
    dtype: str = "bfloat16"  # of matrix products and attention; weights are float32
    residual_dtype: str = "bfloat16"  # of the residual stream
    loss_chunk_size: int = 4_096  # tokens whose logits exist at once, and that share a sample
    sampled_vocab: int = 0  # tokens that a chunk compares with: its targets, and a sample; 0: all
    tokens_ahead: int = 1  # early in the run, training predicts so many next tokens at once
    attention: str = "auto"  # flash, varlen or sdpa; auto: the first of them that works here
    fp8_head: bool = False  # 8-bit floats in the head's matrix products
    fp8_blocks: bool = False  # and in the blocks', but for attention's output and weight gradients
    fp8_gradients: bool = False  # with fp8_blocks and relu2: and in the MLPs' weight gradients
    triton_kernels: bool = False  # a Triton kernel for the loss of capped logits; 8 bits use others
    compile: bool = True  # torch.compile
    cuda_graphs: bool = False  # launch the kernels of a micro-batch as one; wants kernel_warmup
    kernel_warmup: bool = True  # compile and warm up on random tokens before the clock starts
    # Stopping, and going on
    save_every: int = 0  # steps between checkpoints; the end is one too; -1: only it; 0: none
    save_on_exit: bool = False  # save a checkpoint on SIGTERM and Ctrl-C, then stop
    resume: str = ""  # a run_id, or latest: go on from its last checkpoint, with its settings
    resume_anyway: bool = False  # even if settings, source or data are others now
    stop_at_target: bool = False  # end at the first validation at or under the target; no record
    # Reports
    val_loss_every: int = 125  # steps between validations; 0, -1: only at the end
    log_every: int = 10  # steps between lines on a console that is no terminal
    log_dir: str = "logs"  # folder of the logs
    sample_every: int = 0  # steps between texts that the model writes; -1: only at the end; 0: none
    log_wandb: bool = False  # report to Weights & Biases too
    wandb_project: str = "gpt2-speedrun"  # its project
    wandb_name: str = ""  # its run name; empty: run_id

    @property
    def attention_width(self) -> int:
        return self.attention_dim or self.model_dim

    @property
    def head_dim(self) -> int:
        return self.attention_width // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def kv_width(self) -> int:
        """Width of keys, and of values, of all heads."""
        return self.kv_heads * self.head_dim

    @property
    def stage_batch_sizes(self) -> list[int]:
        """Tokens per step in each stage; without `batch_stages` there is one, of `batch_size`."""
        return [int(size) for size in self.batch_stages.split(",") if size] or [self.batch_size]

    def batch_size_at(self, step: int) -> int:
        """Tokens of the step that begins at `step`, from 0 on."""
        stages = self.stage_batch_sizes
        return stages[min(step * len(stages) // self.train_steps, len(stages) - 1)]

    @property
    def common_rows(self) -> int:
        """Rows that all ranks' micro-batches together have to divide, for every stage to fit."""
        return math.gcd(*self.stage_batch_sizes) // self.row_length

    def describe_batch(self) -> str:
        """Tokens per step, for a person: "393,216", or "65,536 to 393,216"."""
        sizes = self.stage_batch_sizes
        return " to ".join(f"{size:,}" for size in dict.fromkeys((sizes[0], sizes[-1])))

    def describe_run(self) -> str:
        """Track, recipe, length and target, for a person."""
        goal = f" to val_loss {self.target}" if self.target else ""
        return (f"track {self.track}, recipe {self.recipe}: {self.train_steps:,} steps of "
                f"{self.describe_batch()} tokens{goal}")

    @property
    def train_tokens(self) -> int:
        # By stages, as `batch_size_at` has them: there may be too many steps to look at each.
        sizes = self.stage_batch_sizes
        starts = [-(-i * self.train_steps // len(sizes)) for i in range(len(sizes) + 1)]
        return sum(size * (end - start)
                   for size, (start, end) in zip(sizes, pairwise(starts), strict=True))

    @property
    def max_val_length(self) -> int:
        """Tokens in a row of validation, which is also the longest that a sequence can be."""
        return self.val_row_length or self.row_length

    def row_lengths(self, training: bool) -> tuple[int, int]:
        """Tokens in a row, and in the longest sequence that it can hold."""
        if not training:
            return self.max_val_length, self.max_val_length
        cut = self.max_document_length if self.document_masking else self.row_length
        return self.row_length, min(cut, self.row_length)

    def predictions(self, tokens: int, row_length: int) -> int:
        """How many of the tokens of whole rows are predicted."""
        return tokens // row_length * hidden_per_row(row_length, self.masked_share or 1.0)

    @property
    def longest_row(self) -> int:
        return max(self.row_length, self.max_val_length)

    @property
    def samples_vocabulary(self) -> bool:
        """Whether training compares with a sample of the vocabulary, and not with all of it."""
        return 0 < self.sampled_vocab < self.vocab_size

    def grad_accum_steps(self, step: int, world_size: int) -> int:
        return self.batch_size_at(step) // self.device_batch_size // world_size


# The one-GPU benchmark's AdamW baseline; it descends from llm.c's train_gpt2.py.
BASELINE = dict(
    batch_size=524_288, device_batch_size=65_536, row_length=1_024, document_masking=False,
    num_heads=12, activation="gelu", qk_norm="none", attention_scale=0.0,
    attention_output_scale=24**-0.5, rotary_base=10_000.0, rotary_fraction=1.0, norm_embed=False,
    tied_head=True, logit_softcap=0.0, value_embeddings=0, skip_connections=False,
    embed_shortcut=False, zero_init_projections=False, window_start=0, window_end=0,
    optimizer="adam", matrix_lr=0.0018, embed_lr=0.0018, head_lr=0.0018, scalar_lr=0.0018,
    adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8, weight_decay=0.1, train_steps=4_768,
    warmup_frac=256 / 4_768, cooldown_frac=1_024 / 4_768, final_lr_frac=0.0,
    residual_dtype="float32", loss_chunk_size=8_192,
)

# For one Hopper GPU. Why each of these: records/measurements.
RECORD = dict(
    batch_size=65_536, batch_stages="65536,65536,131072", device_batch_size=65_536,
    val_row_length=65_536, document_rests=True, num_layers=10, num_heads=4, attention_dim=512,
    attention_gate=True, key_offset=True, unigram_power=0.5, bigram_rows=5 * 50_304,
    output_mixing=True, matrix_lr=0.025, embed_lr=0.24, bigram_lr=0.5, head_lr=0.0033,
    scalar_lr=0.05, muon_momentum=0.9, muon_beta2=0.9, adam_beta1=0.6, adam_beta2=0.99,
    row_moments=True, weight_decay=0.0017, train_steps=4_125, cooldown_frac=0.55,
    loss_chunk_size=16_384, sampled_vocab=14_336, tokens_ahead=3, fp8_head=True, fp8_blocks=True,
    fp8_gradients=True, triton_kernels=True, cuda_graphs=True,
)

# For Hopper GPUs, one to eight, and the tracks gpt2-small and gpt2-medium; lengths are guesses. The
# learning rates of `medium` are those of the dial. Weight decay made one run of `medium` worse.
SMALL = RECORD | dict(batch_stages="131072,131072,262144", weight_decay=0.0, train_steps=5_200)
MEDIUM = SMALL | dict(
    num_layers=16, num_heads=5, attention_dim=640, model_dim=1_024, embed_lr=0.208, bigram_lr=0.433,
    head_lr=0.00286, scalar_lr=0.0433, train_steps=8_600,
)

EIGHT_BITS = ("fp8_head", "fp8_blocks", "fp8_gradients", "triton_kernels")

# Small enough for two cores of a CPU and some minutes.
TINY = dict(
    batch_size=2_048, device_batch_size=2_048, val_batch_size=8_192, row_length=512,
    max_document_length=512, num_layers=4, num_heads=2, model_dim=96, train_steps=45,
    val_loss_every=15, dtype="float32", residual_dtype="float32", loss_chunk_size=64,
    compile=False, kernel_warmup=False,
)

SAMPLE = TINY | dict(value_embeddings=1, window_start=128, window_end=512, embed_lr=0.5,
                     head_lr=0.02)

# A recipe is a set of overrides of the defaults above, which are the recipe `modern`.
RECIPES: dict[str, dict] = {
    "modern": {},
    "record": RECORD,
    "small": SMALL,
    "medium": MEDIUM,
    "modern-small": dict(train_steps=2_000),
    "modern-medium": dict(num_layers=16, num_heads=8, model_dim=1_024, train_steps=6_000),
    "baseline": BASELINE,
    "sample": SAMPLE,
    "sample-baseline": BASELINE | TINY | dict(attention_output_scale=8**-0.5),
    "sample-record": RECORD | SAMPLE | dict(
        batch_stages="", val_row_length=0, attention_dim=0, attention_gate=False, unigram_power=1.0,
        bigram_rows=4_096, output_mixing=False, bigram_lr=0.25, sampled_vocab=1_024, matrix_lr=0.05,
        weight_decay=0.0, train_steps=12, cooldown_frac=0.45, val_loss_every=6, loss_chunk_size=512,
        tokens_ahead=1, fp8_head=False, fp8_blocks=False, fp8_gradients=False, triton_kernels=False,
        cuda_graphs=False),
}

# What a Hopper GPU is given in place of what every GPU can run.
ON_HOPPER = {"modern": "record", "modern-small": "small", "modern-medium": "medium"}

# A track is a claim: the recipe it starts from, and the four fields that define it.
TRACKS: dict[str, dict] = {
    "single-gpu": dict(recipe="modern", data_path="data/fineweb10B", target=3.3821,
                       val_tokens=1_048_576, token_budget=5_000_000_000),
    "gpt2-small": dict(recipe="modern-small", data_path="data/fineweb10B", target=3.28,
                       val_tokens=10_485_760, token_budget=10_000_000_000),
    "gpt2-medium": dict(recipe="modern-medium", data_path="data/fineweb10B", target=2.92,
                        val_tokens=10_485_760, token_budget=10_000_000_000),
    # Claimed by the CORE score of evals/core.py; made for --depth.
    "time-to-gpt2": dict(recipe="modern", data_path="data/fineweb10B", target=0.0,
                         val_tokens=10_485_760, token_budget=20_000_000_000),
    "sample": dict(recipe="sample-record", data_path="data/sample", target=7.2,
                   val_tokens=16_384, token_budget=2_000_000),
}

CHOICES = {
    "track": tuple(TRACKS),
    "recipe": tuple(RECIPES),
    "activation": ("relu2", "relu", "gelu", "silu", "swiglu", "swiglu-wide"),
    "block_norm": ("rmsnorm", "layernorm"),
    "qk_norm": ("rms", "l2", "none"),
    "softcap_kind": ("tanh", "shifted", "isru"),
    "window_growth": ("linear", "geometric", "stepwise"),
    "optimizer": ("muon", "adam"),
    "muon_iteration": ("polar-express", "newton-schulz"),
    "cooldown_shape": ("linear", "cosine", "sqrt"),
    "dtype": ("bfloat16", "float32"),
    "residual_dtype": ("bfloat16", "float32"),
    "attention": ("auto", "flash", "varlen", "sdpa"),
}


class Ranks(NamedTuple):
    """This process among those of the run, and the device it trains on."""

    rank: int
    world_size: int
    device: torch.device
    local_rank: int = 0  # among those of this machine


class RunError(ValueError):
    """Something a person has to put right; the message says what, and what to do next."""


class CollectiveError(RunError):
    """A RunError that every rank raises, so that one report on each machine is enough."""


def print_error(error: Exception, ranks: "Ranks | None") -> None:
    """Tell a person, once on each machine if every rank raises it; there may be no `ranks` yet."""
    if ranks is None or ranks.local_rank == 0 or not isinstance(error, CollectiveError):
        print(f"error: {error}", file=sys.stderr)


def parse_bool(text: str) -> bool:
    """true, yes, 1 or false, no, 0, in any case; anything else is an argparse error."""
    values = dict(true=True, yes=True, false=False, no=False) | {"1": True, "0": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return values[text.lower()]


@cache
def field_notes() -> dict[str, str]:
    """What the comments of Hyperparameters say, by field."""
    source = inspect.getsource(Hyperparameters)
    return dict(re.findall(r"^    (\w+): \w+ = .*?  # (.*)$", source, re.MULTILINE))


def parse_hyperparameters(argv: list[str]) -> Hyperparameters:
    """Hyper-parameters of a command line: defaults < recipe < track < `--name value`.

    Hyphens and underscores are the same. Exits with status 2 and a message on an unknown name, a
    wrong type, or sizes that do not fit each other.
    """
    notes = field_notes()
    parser = argparse.ArgumentParser(
        prog="train_gpt.py", usage="%(prog)s [--option value ...], or -h for the list of options",
        allow_abbrev=False, argument_default=argparse.SUPPRESS, description=__doc__,
        epilog="Defaults are those of the recipe modern; other recipes, and tracks, set others.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for field in dataclasses.fields(Hyperparameters):
        flags = dict.fromkeys((f"--{field.name}", f"--{field.name.replace('_', '-')}"))
        help_text = f"{notes.get(field.name, '')} (default: {field.default})".replace("%", "%%")
        settings = dict(dest=field.name, help=help_text, choices=CHOICES.get(field.name))
        if field.type is bool:
            settings |= dict(type=parse_bool, nargs="?", const=True, metavar="true|false")
        else:
            settings |= dict(type=field.type, metavar=None if settings["choices"] else "VALUE")
        parser.add_argument(*flags, **settings)
    parser.add_argument("--total_batch_size", "--total-batch-size", metavar="auto|TOKENS",
                        help="batch_size; auto: by the rule of --depth, which is its default")
    parser.add_argument("--fp8", action="store_true",
                        help=f"short for --{' --'.join(EIGHT_BITS)}")
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        names = [f"--{field.name}" for field in dataclasses.fields(Hyperparameters)]
        names += ["--total_batch_size", "--fp8"]
        typed = unknown[0].split("=")[0].replace("-", "_").replace("__", "--", 1)
        near = difflib.get_close_matches(typed, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else "; -h lists the options"
        parser.error(f"unknown option {' '.join(unknown)}{hint}")

    overrides = vars(given)
    if overrides.pop("fp8", False):
        overrides = dict.fromkeys(EIGHT_BITS, True) | overrides
    if (tokens := overrides.pop("total_batch_size", "auto")) != "auto":
        if not tokens.isdecimal():
            parser.error(f"--total_batch_size must be auto or a number of tokens, got {tokens!r}")
        overrides["batch_size"] = int(tokens)
    if "batch_size" in overrides:  # it is asked for in place of the stages of the recipe or run
        overrides.setdefault("batch_stages", "")
    if overrides.get("resume"):
        args = resumed_hyperparameters(overrides, parser)
    else:
        if "target_param_data_ratio" in overrides and overrides.get("depth", 0) <= 0:
            parser.error("--target_param_data_ratio is for --depth, which is not given")
        args = new_hyperparameters(overrides)
    if "device_batch_size" not in overrides:
        args = fit_micro_batch(args)
    if problem := find_problem(args):
        parser.error(problem)
    return args


def new_hyperparameters(overrides: dict) -> Hyperparameters:
    """Those of the recipe and the track, but for the overrides."""
    default_track = "single-gpu" if torch.cuda.is_available() else "sample"
    track = overrides.get("track", default_track)
    recipe = overrides.get("recipe") or default_recipe(track)
    args = Hyperparameters(**RECIPES[recipe] | TRACKS[track])
    overrides = overrides | dict(track=track, recipe=recipe)
    if overrides.get("depth", 0) <= 0:
        return dataclasses.replace(args, **overrides)
    return dial(args, batch_as_stage(overrides))


def fit_micro_batch(args: Hyperparameters) -> Hyperparameters:
    """With the largest micro-batch, up to this one, in which each rank's share of a step goes."""
    if find_problem(args):
        return args
    ranks, rows = int(os.environ.get("WORLD_SIZE", 1)), args.common_rows
    share = rows // ranks if rows % ranks == 0 else rows
    most = args.device_batch_size // args.row_length
    micro_rows = max(n for n in range(1, most + 1) if share % n == 0)
    return dataclasses.replace(args, device_batch_size=micro_rows * args.row_length)


def batch_as_stage(overrides: dict) -> dict:
    """With a depth, the learning rates stay those of the recipe's batch, whatever the batch."""
    overrides = dict(overrides)
    if "batch_size" in overrides and not overrides.get("batch_stages"):
        overrides["batch_stages"] = str(overrides.pop("batch_size"))
    return overrides


def dial(recipe: Hyperparameters, overrides: dict) -> Hyperparameters:
    """The recipe as a model of `depth` blocks; of what is overridden too, the rest is worked out.

    - The width is 64 per block, as in GPT-2 small. Heads keep their width, attention its share (but
      two heads: with one, `record` learns less in 8-bit floats; records/measurements, Miniseries),
      and its outputs GPT-2's scale of 1 / sqrt(2 x blocks), if they have one.
    - Muon's learning rate stays, because its updates are scaled to the shape (Jordan et al. 2024);
      Adam's go with 1 / sqrt(width), as in nanochat (Karpathy 2025), but there scalars' stay.
    - `target_param_data_ratio` training tokens per weight of the matrix products of each token,
      which are those of the blocks and of the head (Hoffmann et al. 2022; embeddings are none).
    - The batch goes with tokens^0.383 (Bergsma et al. 2025), by powers of two, and the learning
      rates with the root of the batch (Malladi et al. 2022), by way of `batch_lr_power`.
    - Learning rate (of matrices) x weight decay x steps stays (Wang and Aitchison 2024).

    The recipe's own model, rates, batch and steps are what the rules start from.
    """
    depth, width = overrides["depth"], 64 * overrides["depth"]
    share = recipe.attention_width / recipe.model_dim
    heads = max(2, round(share * width / recipe.head_dim))
    attention_dim = heads * recipe.head_dim
    rates = {f"{kind}_lr": getattr(recipe, f"{kind}_lr") * (recipe.model_dim / width) ** 0.5
             for kind in LEARNING_RATES if kind != "matrix" or recipe.optimizer == "adam"}
    output_scale = recipe.attention_output_scale
    if output_scale != 1:
        output_scale *= (recipe.num_layers / depth) ** 0.5
    args = dataclasses.replace(
        recipe, num_layers=depth, model_dim=width, num_heads=heads,
        attention_dim=0 if attention_dim == width else attention_dim,
        attention_output_scale=output_scale,
        value_embeddings=min(recipe.value_embeddings, depth // 2), **rates)
    args = dataclasses.replace(args, **overrides)
    if find_problem(dataclasses.replace(args, train_steps=1)):
        return args
    with torch.device("meta"):
        tokens = args.target_param_data_ratio * GPT(args).active_weights
    if "batch_stages" not in overrides:
        growth = 2.0 ** round(0.383 * math.log2(tokens / recipe.train_tokens))
        rows = [max(1, round(growth * size / args.row_length)) for size in args.stage_batch_sizes]
        stages = ",".join(str(n * args.row_length) for n in rows)
        args = dataclasses.replace(args, batch_stages=stages)
    batch, batch_before = (sum(sizes) / len(sizes)
                           for sizes in (args.stage_batch_sizes, recipe.stage_batch_sizes))
    steps = overrides.get("train_steps") or max(1, round(tokens / batch))
    decay = recipe.weight_decay
    if decay and args.matrix_lr:
        rate = args.matrix_lr * (batch / batch_before) ** args.batch_lr_power
        decay *= recipe.matrix_lr * recipe.train_steps / (rate * steps)
    return dataclasses.replace(args, **dict(train_steps=steps, weight_decay=decay) | overrides)


def resumed_hyperparameters(overrides: dict, parser: argparse.ArgumentParser) -> Hyperparameters:
    """Those of the newest checkpoint that can be read, but for the overrides."""
    log_dir = overrides.get("log_dir", Hyperparameters.log_dir)
    problems = []
    for folder in checkpoint_folders(overrides["resume"], log_dir):
        try:
            saved = saved_hyperparameters(read_state(folder))
            here = dict(log_dir=log_dir, resume_anyway=False)  # never those of the run
            run_id = folder.resolve().parent.name
            if overrides.get("run_id", run_id) != run_id:
                parser.error(f"--resume goes on as {run_id}: leave out --run_id, or copy "
                             f"{folder.parent} and its log to the other name")
            for name in ("recipe", "depth", "target_param_data_ratio"):
                if overrides.get(name, saved.get(name)) != saved.get(name):
                    parser.error(f"--{name} {overrides[name]} makes another run than {run_id}, "
                                 f"which has {saved.get(name)}: leave it out, or start a new one "
                                 f"without --resume")
            overrides = batch_as_stage(overrides) if saved.get("depth", 0) > 0 else overrides
            return Hyperparameters(**saved | here | overrides)
        except RunError as error:
            problems.append(str(error))
    parser.error("; ".join(problems) or no_checkpoint(overrides["resume"], log_dir))


def default_recipe(track: str) -> str:
    """The recipe of the track; on Hopper GPUs, if it is not `single-gpu` on several, theirs."""
    recipe = TRACKS[track]["recipe"]
    has_its_gpus = track != "single-gpu" or os.environ.get("WORLD_SIZE", "1") == "1"
    if has_its_gpus and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9:
        return ON_HOPPER.get(recipe, recipe)
    return recipe


def find_problem(args: Hyperparameters) -> str | None:
    """What is wrong with the sizes in `args`, for a person, or None. Knows nothing of ranks."""
    for name, value in dataclasses.asdict(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            return f"--{name} must be a number, got {value}"
    limits = {
        "be at least 1": (lambda value: value >= 1, (
            "batch_size", "device_batch_size", "val_batch_size", "row_length", "val_tokens",
            "max_document_length", "num_layers", "num_heads", "model_dim", "train_steps",
            "loss_chunk_size", "log_every", "vocab_size", "mlp_ratio", "tokens_ahead",
            "muon_steps")),
        "not be negative": (lambda value: value >= 0, (
            "value_embeddings", "val_row_length", "window_start", "depth",
            "attention_dim", "logit_softcap", "unigram_power", "sampled_vocab", "num_kv_heads",
            "attention_softcap", "grad_clip", "bigram_rows", "norm_eps", "weight_decay",
            *(f"{kind}_lr" for kind in LEARNING_RATES))),
        "be above 0": (lambda value: value > 0, (
            "target_param_data_ratio", "rotary_base", "adam_eps")),
        "be at least 0 and below 1": (lambda value: 0 <= value < 1, (
            "adam_beta1", "adam_beta2", "muon_beta2", "muon_momentum")),
        "be between 0 and 1": (lambda value: 0 <= value <= 1, (
            "warmup_frac", "cooldown_frac", "final_lr_frac", "rotary_fraction", "untie_frac",
            "masked_share")),
        "be -1 or more": (lambda value: value >= -1, (
            "val_loss_every", "save_every", "sample_every")),
        "be between 0 and 2^63 - 1": (lambda value: 0 <= value < 2**63, ("seed",)),
    }
    for limit, (holds, names) in limits.items():
        for name in names:
            if not holds(getattr(args, name)):
                return f"--{name} must {limit}, got {getattr(args, name)}"
    if args.stop_at_target and not args.target:
        return "--stop_at_target has no target to stop at: give a --target too"
    if args.tokens_ahead > args.row_length:
        return f"--tokens_ahead {args.tokens_ahead} is more than --row_length {args.row_length}"
    if args.run_id.startswith(".") or re.search(r"[/\\]", args.run_id):
        return f"--run_id must be the name of a file, got {args.run_id!r}"
    if args.logit_softcap > 70:  # exp(cap) * vocab_size has to be a float32
        return f"--logit_softcap must be at most 70, got {args.logit_softcap}"
    for name in ("model_dim", "attention_dim", "row_length", "loss_chunk_size"):
        if (args.fp8_head or args.fp8_blocks) and getattr(args, name) % 16:
            return (f"--{name} must be a multiple of 16 with --fp8_head or --fp8_blocks, got "
                    f"{getattr(args, name)}")
    val_row = "val_row_length" if args.val_row_length else "row_length"
    for name, row in (("device_batch_size", "row_length"), ("val_batch_size", val_row),
                      ("val_tokens", val_row)):
        if getattr(args, name) % getattr(args, row):
            return (f"--{name} {getattr(args, name)} must be a multiple of --{row} "
                    f"{getattr(args, row)}")
    if not re.fullmatch(r"(\d+(,\d+)*)?", args.batch_stages):
        return f"--batch_stages must be numbers, as 65536,131072; got {args.batch_stages!r}"
    for size in args.stage_batch_sizes:
        if size < 1 or size % args.row_length:
            name = "batch_stages" if args.batch_stages else "batch_size"
            return f"--{name} must be a multiple of --row_length {args.row_length}, got {size}"
    chunk = min(args.loss_chunk_size, args.device_batch_size)
    if args.samples_vocabulary and args.device_batch_size % chunk:
        return (f"--device_batch_size {args.device_batch_size} must be a multiple of "
                f"--loss_chunk_size {args.loss_chunk_size} with --sampled_vocab")
    if args.attention_width % args.num_heads or args.head_dim % 4:
        name = "attention_dim" if args.attention_dim else "model_dim"
        return (f"--{name} {args.attention_width} must be --num_heads {args.num_heads} times a "
                f"multiple of 4")
    if args.num_heads % args.kv_heads:
        return f"--num_kv_heads {args.num_kv_heads} must divide --num_heads {args.num_heads}"
    if args.masked_share and (args.samples_vocabulary or args.tokens_ahead > 1
                              or args.sample_every):
        return ("--masked_share hides tokens anywhere: add --sampled_vocab 0 --tokens_ahead 1 "
                "--sample_every 0")
    if args.untie_frac and args.grad_clip:
        return "--grad_clip would count a head that is still tied twice: leave out --untie_frac"
    if args.untie_frac and not args.tied_head:
        return f"--untie_frac {args.untie_frac} is for a head that begins with --tied_head true"
    if 2 * args.value_embeddings > args.num_layers:
        return (f"--value_embeddings {args.value_embeddings} tables serve two layers each, "
                f"but --num_layers is {args.num_layers}")
    if (args.window_start == 0) != (args.window_end == 0) or args.window_start > args.window_end:
        return (f"--window_start {args.window_start} and --window_end {args.window_end} must both "
                f"be 0 (no windows), or rise")
    if args.train_tokens > args.token_budget:
        steps = args.train_steps * args.token_budget // args.train_tokens
        advice = f"--train_steps to {steps:,}" if steps else "--batch_size"
        if args.depth > 0:
            advice = "--target_param_data_ratio, --depth, or --train_steps if it is given"
        return (f"{args.train_steps:,} steps x {args.describe_batch()} tokens are "
                f"{args.train_tokens:,} training tokens, over the budget of {args.token_budget:,}; "
                f"lower {advice}")
    return None


def reasons_not_a_record(args: Hyperparameters, world_size: int) -> list[str]:
    """Where a run departs from the claim of its track; empty: it may be a record."""
    reasons = [f"{name} is {getattr(args, name)} instead of {value}"
               for name, value in TRACKS[args.track].items()
               if name != "recipe" and getattr(args, name) != value]
    if args.masked_share:
        reasons.append("it predicts hidden tokens, from both sides")
    if args.track == "single-gpu" and world_size > 1:
        reasons.append(f"it runs on {world_size} GPUs instead of 1")
    return reasons


# -----------------------------------------------------------------------------
# Data: llm.c shards, cut into rows of documents

SHARD_MAGIC, SHARD_VERSION = 20240520, 1
SHARD_HEADER_INTS = 256  # little-endian int32: magic, version, token count, zeros; then uint16s
DOCUMENT_START = 50_256  # GPT-2's <|endoftext|> stands before each document


def check_shard(path: Path) -> int:
    """Number of tokens in the shard; RunError, for a person, if it is not a whole shard."""
    try:
        header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from None
    if len(header) < SHARD_HEADER_INTS or header[0] != SHARD_MAGIC:
        raise RunError(f"{path} is not a token shard: its first number should be {SHARD_MAGIC}")
    if header[1] != SHARD_VERSION:
        raise RunError(f"{path} has shard version {header[1]}, expected {SHARD_VERSION}")
    expected, size = 4 * SHARD_HEADER_INTS + 2 * int(header[2]), path.stat().st_size
    if size != expected:
        raise RunError(f"{path} has {size:,} bytes, but its header promises {expected:,}: "
                       f"it is truncated or damaged; fetch it again")
    if header[2] < 2:
        raise RunError(f"{path} is empty")
    return int(header[2])


def log_frequencies(path: Path, vocab_size: int) -> Tensor:
    """Log of each token's share, (vocab_size,), float32, of the first million tokens of a shard.

    One is added to each count, so that a token that is not there is rare rather than impossible.
    """
    tokens = np.fromfile(path, dtype="<u2", count=1_000_000, offset=4 * SHARD_HEADER_INTS)
    counts = 1 + np.bincount(tokens, minlength=vocab_size)
    return torch.from_numpy(np.log(counts / counts.sum())).float()


class MicroBatch(NamedTuple):
    """Rows of packed sequences. `max_length`, in tokens, bounds the length of a sequence."""

    inputs_BT: Tensor  # int32
    targets_BT: Tensor  # int32, the token after each input, or the one hidden there, or -1
    cu_seqlens: Tensor  # int32, where sequences start in the flattened rows, then the end
    max_length: int
    whole_rows: bool  # each row is one sequence
    is_causal: bool = True  # a token sees those before it, not those after it

    def to(self, device: torch.device) -> "MicroBatch":
        inputs, targets, cu_seqlens = (t.to(device, non_blocking=True) for t in self[:3])
        # One compiled graph serves every number of sequences, and none is made for other shapes.
        torch._dynamo.mark_static(inputs)
        torch._dynamo.mark_static(targets)
        torch._dynamo.mark_dynamic(cu_seqlens, 0)
        return MicroBatch(inputs, targets, cu_seqlens, *self[3:])


class Exchange(NamedTuple):
    """Rows of a table that ranks look up in a step and that another rank owns; int64.

    Rank r of n owns every n-th row from row r on: frequent tokens come first in a vocabulary.
    """

    mine: Tensor  # that this rank looks up, by owner
    theirs: Tensor  # that others look up, counted among this rank's, by rank
    counts: list[int]  # of `mine`, by owner
    asked: list[int]  # of `theirs`, by rank

    def to(self, device: torch.device) -> "Exchange":
        return self._replace(mine=self.mine.to(device, non_blocking=True),
                             theirs=self.theirs.to(device, non_blocking=True))


def plan_exchanges(
    parts: Iterable[MicroBatch], args: Hyperparameters, ranks: Ranks
) -> dict[str, Exchange]:
    """What is to be exchanged of tables by token and of those by pair, in a step of these parts,
    one of each rank. Every rank can tell, because all of them know the data.
    """
    if ranks.world_size == 1:
        return {}
    parts = list(parts)
    looked_up = {"token": (args.vocab_size, [part.inputs_BT for part in parts])}
    if args.bigram_rows:
        pairs = [hash_pairs(part.inputs_BT.long(), first_tokens(part), args.bigram_rows)
                 for part in parts]
        looked_up["pair"] = args.bigram_rows, pairs
    return {kind: plan_exchange(num_rows, rows, ranks)
            for kind, (num_rows, rows) in looked_up.items()}


def plan_exchange(num_rows: int, rows_by_rank: list[Tensor], ranks: Ranks) -> Exchange:
    """Of one table; each rank's rows may be repeated."""
    share, theirs = -(-num_rows // ranks.world_size), []
    for rank, rows in enumerate(rows_by_rank):
        is_used = torch.zeros(share * ranks.world_size, dtype=torch.bool)
        is_used[rows.flatten().long()] = True
        by_owner = is_used.view(share, ranks.world_size).T
        if rank == ranks.rank:
            by_owner[rank] = False  # it has those
            owner, i = by_owner.nonzero().T
            mine, counts = i * ranks.world_size + owner, by_owner.sum(1).tolist()
        theirs.append(by_owner[ranks.rank].nonzero().flatten())
    asked = list(map(len, theirs))
    tensors = mine, torch.cat(theirs)
    if ranks.device.type == "cuda":
        tensors = (tensor.pin_memory() for tensor in tensors)
    return Exchange(*tensors, counts, asked)


def hidden_per_row(row_length: int, share: float) -> int:
    return max(1, round(share * row_length))


def hide_tokens(
    inputs_T: np.ndarray, share: float, vocab_size: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """A row of which a share is hidden, and as targets what that was, -1 for all others.

    As in BERT (Devlin et al. 2019), of those to be predicted 8 in 10 are the vocabulary's last
    token, one is any token and one stays.
    """
    generator, T = np.random.default_rng(seed), len(inputs_T)
    is_chosen = generator.random(T).argsort() < hidden_per_row(T, share)
    lot = generator.random(T)
    shown = np.where(lot < 0.8, vocab_size - 1, generator.integers(vocab_size - 1, size=T))
    inputs_T = inputs_T.astype(np.int32)  # tokens on the disk have no -1
    return np.where(is_chosen & (lot < 0.9), shown, inputs_T), np.where(is_chosen, inputs_T, -1)


class TokenRows:
    """A shard's tokens cut into rows of equal length, each row a list of sequences.

    Without document masking a row is one sequence, cut from the stream. With it, training rows are
    packed with documents from their first token on: a document is cut at `max_document_length`
    and at the end of its row, and its rest is dropped. Validation drops nothing: the stream is
    cut at each row's end and before each document, so that every token is predicted once. Neither
    does training with `document_rests`: it cuts the stream in the same places, and documents at
    multiples of `max_document_length`.
    RunError if the shard is damaged or does not fit the vocabulary or the masking.
    """

    def __init__(self, path: Path, args: Hyperparameters, training: bool):
        check_shard(path)
        self.tokens = np.fromfile(path, dtype="<u2", offset=4 * SHARD_HEADER_INTS)
        if (largest := int(self.tokens.max())) >= args.vocab_size:
            raise RunError(f"{path} holds token {largest}, outside the vocabulary of "
                           f"{args.vocab_size:,}")
        if args.masked_share and largest == args.vocab_size - 1:
            raise RunError(f"{path} holds token {largest}, the vocabulary's last, which has to "
                           f"stand for hidden ones; give a larger --vocab_size, as 50304")
        self.args = args
        self.row_length, self.max_length = args.row_lengths(training)
        row_starts = np.arange(0, len(self.tokens) - self.row_length, self.row_length)
        documents = row_starts
        if args.document_masking:
            documents = np.flatnonzero(self.tokens[:-1] == DOCUMENT_START)
            if not len(documents):
                raise RunError(f"{path} holds no document start (token {DOCUMENT_START}); with "
                               f"such data use --document_masking false")
            if training and not args.document_rests:
                self._pack(documents)
                return
            if training:
                documents = np.union1d(0, documents)  # a shard may begin within one
                counts = -(-np.diff(documents, append=len(self.tokens)) // self.max_length)
                pieces = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
                documents = np.repeat(documents, counts) + pieces * self.max_length
        end = len(row_starts) * self.row_length
        self.starts = np.union1d(row_starts, documents[documents < end])
        self.lengths = np.diff(self.starts, append=end)
        self.first_sequence = np.searchsorted(self.starts, np.append(row_starts, end))

    def _pack(self, documents: np.ndarray) -> None:
        # The last token of a shard is only ever a target.
        lengths = np.minimum(np.diff(documents, append=len(self.tokens) - 1), self.max_length)
        ends = np.cumsum(lengths)
        first, firsts = 0, [0]
        while first < len(documents):
            row_end = ends[first] - lengths[first] + self.row_length
            last = int(np.searchsorted(ends, row_end))
            if last == len(documents):
                break
            lengths[last] -= ends[last] - row_end
            first = last + 1
            firsts.append(first)
        self.starts, self.lengths = documents[:first], lengths[:first]
        self.first_sequence = np.array(firsts)

    @property
    def num_rows(self) -> int:
        return len(self.first_sequence) - 1

    def micro_batch(self, first_row: int, num_rows: int, pin: bool = False) -> MicroBatch:
        """Rows first_row to first_row + num_rows - 1, in pinned memory if `pin`."""
        sequences = slice(*self.first_sequence[[first_row, first_row + num_rows]])
        starts, lengths = self.starts[sequences], self.lengths[sequences]
        ends = np.cumsum(lengths)
        index = np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths)
        shape, share = (num_rows, self.row_length), self.args.masked_share
        inputs, targets = (self.tokens[i].reshape(shape) for i in (index, index + 1))
        if share:  # the same ones whatever the micro-batch
            rows = [hide_tokens(row, share, self.args.vocab_size, first_row + i)
                    for i, row in enumerate(inputs)]
            inputs, targets = map(np.stack, zip(*rows, strict=True))
        tensors = [torch.from_numpy(array.astype(np.int32))
                   for array in (inputs, targets, np.append(0, ends))]
        return MicroBatch(*(t.pin_memory() if pin else t for t in tensors), self.max_length,
                          not self.args.document_masking, is_causal=not share)


class ShardInfo(NamedTuple):
    path: Path
    num_bytes: int
    sha256: str
    num_rows: int
    most_sequences: int  # in a micro-batch


def inspect_shard(path: Path, args: Hyperparameters, training: bool) -> ShardInfo:
    """Read a shard through: its rows, and its size and hash for the log. RunError if bad."""
    rows = TokenRows(path, args, training)
    with open(path, "rb") as file:  # the tokens have been read
        sha256 = hashlib.sha256(file.read(4 * SHARD_HEADER_INTS))
    sha256.update(rows.tokens)
    starts = np.append(rows.first_sequence[:: args.device_batch_size // args.row_length],
                       rows.first_sequence[-1])
    return ShardInfo(path, path.stat().st_size, sha256.hexdigest(), rows.num_rows,
                     int(np.diff(starts).max()))


def data_folder(args: Hyperparameters) -> Path:
    """Where the shards are: `data_path` as given, else beside this file."""
    path = Path(args.data_path)
    return path if path.is_dir() else Path(__file__).resolve().parent / args.data_path


def find_shards(folder: Path) -> tuple[list[Path], list[Path]]:
    """Training and validation shards in a folder, in the order of their names."""
    return sorted(folder.glob("*_train_*.bin")), sorted(folder.glob("*_val_*.bin"))


def estimate_shards(args: Hyperparameters) -> int:
    """Training shards of 100M tokens that the run needs; an estimate where documents are packed."""
    rows = (100_000_000 - 1) // args.row_length
    if args.document_masking:  # cutting documents drops some 6%; the rest is for safety
        rows = int(rows * (0.98 if args.document_rests else 0.9))
    shards = step = 0
    while step < args.train_steps:
        step += max(1, len(rows_of_steps(rows, step, args)))
        shards += 1
    return shards


def rows_of_steps(num_rows: int, step: int, args: Hyperparameters) -> list[range]:
    """The rows of each step, from `step` on, that fit a shard of so many rows.

    A step never crosses a shard.
    """
    steps, first = [], 0
    while first + (rows := args.batch_size_at(step) // args.row_length) <= num_rows:
        steps.append(range(first, first + rows))
        first, step = first + rows, step + 1
    return steps


def first_steps(shards: list[ShardInfo], args: Hyperparameters) -> list[int]:
    """The step that each shard begins with, and last how many steps all of them hold."""
    steps = [0]
    for shard in shards:
        steps.append(steps[-1] + len(rows_of_steps(shard.num_rows, steps[-1], args)))
    return steps


def skip_shards(
    shards: list[ShardInfo], step: int, args: Hyperparameters
) -> tuple[list[ShardInfo], int]:
    """The shards from the one that `step` reads, and the step that this one begins with."""
    first = first_steps(shards, args)
    i = bisect_right(first, step) - 1
    return shards[i:], first[i]


def inspect_enough(paths: list[Path], args: Hyperparameters, training: bool) -> list[ShardInfo]:
    """Inspect shards in order, several at a time, until they hold the whole run (or all are seen).

    RunError if one of them is bad.
    """
    shards = []
    enough = args.train_steps if training else args.val_tokens // args.max_val_length
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for info in pool.map(lambda path: inspect_shard(path, args, training), paths):
            shards.append(info)
            held = first_steps(shards, args)[-1] if training else sum(s.num_rows for s in shards)
            if held >= enough:
                break
        pool.shutdown(cancel_futures=True)
    return shards


def plan_data(args: Hyperparameters) -> tuple[list[ShardInfo], list[ShardInfo]]:
    """Check the data and count it against the run: the training and validation shards needed.

    RunError if a shard is missing or bad, if there are too few of them, or if a training shard is
    a validation shard under another name.
    """
    folder = data_folder(args)
    train_paths, val_paths = find_shards(folder)
    fetch = "python data/cached_fineweb10B.py"
    for kind, paths in (("train", train_paths), ("val", val_paths)):
        if not paths:
            raise RunError(f"no {kind} shards (*_{kind}_*.bin) in {folder}\n"
                           f"download FineWeb: {fetch} {estimate_shards(args)}\n"
                           f"or name a folder that has shards: --data_path FOLDER")
    val = inspect_enough(val_paths, args, training=False)
    train = inspect_enough(train_paths, args, training=True)

    val_tokens = sum(shard.num_rows for shard in val) * args.max_val_length
    if val_tokens < args.val_tokens:
        raise RunError(f"validation needs {args.val_tokens:,} tokens and one more, but {folder} "
                       f"holds {val_tokens:,} in whole rows; fetch the whole val shard, or lower "
                       f"--val_tokens (not a record)")
    steps = first_steps(train, args)[-1]
    if steps < args.train_steps:
        if steps == 0:
            raise RunError(f"a step of {args.stage_batch_sizes[0]:,} tokens fits in none of the "
                           f"{len(train)} training shards in {folder}; lower --batch_size")
        needed = math.ceil(args.train_steps * len(train) / steps)
        raise RunError(f"{args.train_steps:,} steps of {args.describe_batch()} tokens need "
                       f"{needed} training shards, but the {len(train)} in {folder} hold "
                       f"{steps:,} steps (a step never crosses a shard); download more: {fetch} "
                       f"{needed}, or lower --train_steps")
    if both := {shard.sha256 for shard in train} & {shard.sha256 for shard in val}:
        same = [str(shard.path) for shard in train if shard.sha256 in both]
        raise RunError(f"{', '.join(same)} holds the validation tokens; training must not see them")
    return train, val


def train_batches(
    paths: list[Path], args: Hyperparameters, ranks: Ranks, step: int = 0, first_step: int = 0
) -> Iterator[tuple[list[MicroBatch], dict[str, Exchange]]]:
    """This rank's micro-batches of each step from `first_step` on, while the shards last, and
    what `plan_exchanges` says of the step. The first shard begins with `step`.

    A step is consecutive rows of one shard; the ranks share them out, and the micro-batches share
    out a rank's. The next shard is read while this one is in use.
    """
    pin = ranks.device.type == "cuda"
    rows_per_micro_batch = args.device_batch_size // args.row_length
    for shard in prefetch((TokenRows(path, args, training=True) for path in paths), depth=1):
        for rows in rows_of_steps(shard.num_rows, step, args):
            share = len(rows) // ranks.world_size
            mine = rows[ranks.rank * share : (ranks.rank + 1) * share : rows_per_micro_batch]
            if step >= first_step:
                parts = (shard.micro_batch(row, share) for row in rows[::share])
                yield ([shard.micro_batch(row, rows_per_micro_batch, pin) for row in mine],
                       plan_exchanges(parts, args, ranks))
            step += 1


def prefetch(items: Iterable, depth: int = 2) -> Iterator:
    """The same items, made `depth` ahead in a thread; an error there is raised here."""
    items, end = iter(items), object()
    with ThreadPoolExecutor(1) as maker:
        ahead = deque(maker.submit(next, items, end) for _ in range(depth))
        while (item := ahead.popleft().result()) is not end:
            ahead.append(maker.submit(next, items, end))
            yield item


def random_micro_batch(args: Hyperparameters, num_tokens: int, training: bool) -> MicroBatch:
    """A micro-batch of random tokens in the shapes of real ones, for warming up."""
    generator = torch.Generator().manual_seed(args.seed)
    row_length, max_length = args.row_lengths(training)
    shape = (num_tokens // row_length, row_length)
    # Not two views of one tensor, which a compiled graph would tell from real ones.
    inputs, targets = (torch.randint(args.vocab_size, shape, generator=generator).int()
                       for _ in range(2))
    starts = torch.arange(0, num_tokens, max_length, dtype=torch.int32)
    return MicroBatch(inputs, targets, F.pad(starts, (0, 1), value=num_tokens), max_length,
                      not args.document_masking, is_causal=not args.masked_share)


# -----------------------------------------------------------------------------
# Model. Shapes: B rows, T tokens in a row, D model_dim, H heads, K head_dim, V vocabulary

SDPA_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION,
                 SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # fastest first


def sdpa_attention(
    q_BTHK, k_BTHK, v_BTHK, batch: MicroBatch, window: int, scale: float, softcap: float = 0.0
) -> Tensor:
    """Attention through PyTorch's own kernels; runs anywhere. The plain twin of the others.

    A query sees itself and at most `window` tokens before it (0: no limit), and in a batch that is
    not causal as many after it, within its own sequence. There may be fewer heads of keys and
    values, each for as many queries in a row. Returns (B, T, H, K) in the dtype of `q_BTHK`.
    """
    mask = None
    if window or not batch.whole_rows:
        B, T = q_BTHK.shape[:2]
        position = torch.arange(T, device=q_BTHK.device)
        distance_TT = position[:, None] - position
        token = torch.arange(B * T, device=q_BTHK.device, dtype=torch.int32)
        sequence_BT = torch.searchsorted(batch.cu_seqlens, token, right=True).view(B, T)
        distance_TT = distance_TT if batch.is_causal else distance_TT.abs()
        mask = (distance_TT >= 0) & (sequence_BT[:, :, None] == sequence_BT[:, None, :])
        mask = (mask & (distance_TT <= window) if window else mask)[:, None]
    is_causal = mask is None and batch.is_causal
    with sdpa_kernel(SDPA_BACKENDS, set_priority=True):
        return masked_attention(q_BTHK, k_BTHK, v_BTHK, mask, is_causal, scale, softcap)


def masked_attention(
    q_BTHK, k_BSHK, v_BSHK, mask, is_causal: bool, scale: float, softcap: float
) -> Tensor:
    """Attention where the mask, if any, is true, or else everywhere, or to what is not later.

    Returns (B, T, H, K). With a `softcap` (Gemma 2) the logits exist all at once.
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSHK, v_BSHK))
    if not softcap:
        y = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, is_causal=is_causal,
                                           enable_gqa=q.size(1) != k.size(1))
        return y.transpose(1, 2)
    k, v = (per_query(x, q, dim=1) for x in (k, v))
    logits = softcap * torch.tanh((q @ k.mT).float() * (scale / softcap))
    if mask is None:
        mask = torch.ones_like(logits[0, 0], dtype=torch.bool)
        mask = mask.tril() if is_causal else mask
    return (logits.masked_fill(~mask, -torch.inf).softmax(-1).type_as(v) @ v).transpose(1, 2)


def per_query(x: Tensor, q: Tensor, dim: int) -> Tensor:
    """Keys or values once for each head of queries, where they have fewer."""
    group = q.size(dim) // x.size(dim)
    return x.repeat_interleave(group, dim) if group > 1 else x


def varlen_attention(
    q_BTHK, k_BTHK, v_BTHK, batch: MicroBatch, window: int, scale: float, softcap: float = 0.0
) -> Tensor:
    """`sdpa_attention` through torch.nn.attention.varlen: Ampere or newer GPUs, bf16, no cap."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (per_query(x, q_BTHK, dim=2).flatten(0, 1) for x in (q_BTHK, k_BTHK, v_BTHK))
    y = varlen_attn(q, k, v, batch.cu_seqlens, batch.cu_seqlens, batch.max_length,
                    batch.max_length, scale=scale, window_size=both_ways(window, batch))
    return y.view_as(q_BTHK)


def both_ways(window: int, batch: MicroBatch) -> tuple[int, int]:
    """The window as FlashAttention has it: tokens before and after, -1 for no limit."""
    return window or -1, 0 if batch.is_causal else window or -1


def load_flash_attention(has_softcap: bool = False) -> Callable | None:
    """`sdpa_attention` through an installed FlashAttention 3 or 2, or None."""
    flash = None
    for module in ("flash_attn", "flash_attn_interface"):  # the latter, version 3, wins
        with suppress(ImportError, OSError, AttributeError):
            flash = importlib.import_module(module).flash_attn_varlen_func
    if flash is None or has_softcap and "softcap" not in inspect.signature(flash).parameters:
        return None

    def flash_attention(q_BTHK, k_BTHK, v_BTHK, batch, window, scale, softcap=0.0):
        q, k, v = (x.flatten(0, 1) for x in (q_BTHK, k_BTHK, v_BTHK))
        cap = dict(softcap=softcap) if softcap else {}
        y = flash(q, k, v, batch.cu_seqlens, batch.cu_seqlens, batch.max_length, batch.max_length,
                  softmax_scale=scale, causal=batch.is_causal,
                  window_size=both_ways(window, batch), **cap)
        return y.view_as(q_BTHK)

    return flash_attention


def choose_attention(args: Hyperparameters, device: torch.device) -> tuple[str, Callable]:
    """Name and function of the attention that `args.attention` asks for on this device.

    RunError if it cannot run here.
    """
    modern_gpu = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    usable = {"sdpa": sdpa_attention}
    if modern_gpu and args.dtype == "bfloat16":
        if not args.attention_softcap:
            usable["varlen"] = varlen_attention
        if args.attention in ("auto", "flash") and (
                flash := load_flash_attention(args.attention_softcap > 0)):
            usable["flash"] = flash
    name = args.attention
    if name == "auto":
        rows_are_sequences = not args.document_masking and not args.window_end
        order = ("sdpa",) if rows_are_sequences else ("flash", "varlen", "sdpa")
        name = next(name for name in order if name in usable)
    if name not in usable:
        wants = ", FlashAttention installed" if name == "flash" else ", no --attention_softcap"
        raise RunError(f"--attention {name} does not run here (it wants an Ampere or newer GPU, "
                       f"bfloat16{wants}); use one of: auto, {', '.join(usable)}")
    return name, usable[name]


def switch_off(args: Hyperparameters, device: torch.device) -> tuple[Hyperparameters, list[str]]:
    """`args` without what this device cannot run, and what that is, for a person."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    has_triton = capability >= (7, 5) and importlib.util.find_spec("triton") is not None
    missing = {}
    if capability < (8, 9) or not has_triton:
        reason = ("8-bit floats need Triton and an Ada, Hopper or newer GPU; 16 bits instead, and "
                  "slower")
        missing |= {"fp8_head": reason, "fp8_blocks": reason}
    if capability[0] != 9 or not has_triton:
        missing["fp8_gradients"] = ("its kernel has been tried on Hopper GPUs only; weight "
                                    "gradients in 16 bits instead, and slower")
    if not has_triton:
        missing["triton_kernels"] = ("they need Triton and a Turing GPU or newer; plain PyTorch "
                                     "instead, and slower")
    if device.type != "cuda" or not args.kernel_warmup:
        missing["cuda_graphs"] = "they take a GPU, and --kernel_warmup; kernels one by one instead"
    if args.bias:
        reason = "it wants a bound, which --bias leaves open; 16 bits instead"
        missing |= {"fp8_blocks": reason} | ({"fp8_head": reason} if args.norm_gain else {})
    missing = {name: reason for name, reason in missing.items() if getattr(args, name)}
    notes = [f"--{name} is off here: {reason}" for name, reason in missing.items()]
    return dataclasses.replace(args, **dict.fromkeys(missing, False)), notes


def norm(x: Tensor, eps: float, gain: Tensor | None = None) -> Tensor:
    """RMSNorm over the last dimension (Zhang and Sennrich 2019)."""
    return F.rms_norm(x, (x.size(-1),), gain, eps)


def parameter(*shape: int, when: bool = True) -> nn.Parameter | None:
    """A float32 parameter that `GPT.reset_parameters` fills; None unless `when`."""
    return nn.Parameter(torch.empty(shape)) if when else None


class Norm(nn.Module):
    """`norm`, or LayerNorm (Ba et al. 2016), as `args` say."""

    def __init__(self, args: Hyperparameters):
        super().__init__()
        self.eps, self.kind = args.norm_eps, args.block_norm
        self.largest = args.model_dim**0.5  # number of a normalised vector
        has_bias = args.norm_gain and args.bias and self.kind == "layernorm"
        self.gain = parameter(args.model_dim, when=args.norm_gain)
        self.bias = parameter(args.model_dim, when=has_bias)

    def forward(self, x: Tensor) -> Tensor:
        gain, bias = (None if p is None else p.type_as(x) for p in (self.gain, self.bias))
        if self.kind == "layernorm":
            return F.layer_norm(x, x.shape[-1:], gain, bias, self.eps)
        return norm(x, self.eps, gain)

    def bound(self) -> float | Tensor:
        """The largest number that comes out, without a bias."""
        if self.gain is None:
            return self.largest
        return self.largest * self.gain.detach().abs().amax()


class Float8(NamedTuple):
    """A matrix in 8-bit floats: values (rows without gaps) times scale (a float32 scalar)."""

    values: Tensor
    scale: Tensor
    transposed: Tensor | None = None  # the transpose of the values, if it is there already

    @property
    def T(self) -> "Float8":
        if self.transposed is not None:
            return Float8(self.transposed, self.scale, self.values)
        if self.values.is_cuda:
            from triton_kernels import transposed

            return Float8(transposed(self.values), self.scale)
        return Float8(self.values.T.contiguous(), self.scale)


def float8(x: Tensor, bound=16.0) -> Float8:
    """x rounded to 8-bit floats with 3 bits of mantissa; what is beyond the `bound` is cut off.

    Numbers from there down to a 29,000th of it have all 3 bits. The default is for weights, which
    recipe `record` brings to 1.4 at most in 199M tokens; to look for the largest would take as long
    as the rounding.
    """
    limit = torch.finfo(torch.float8_e4m3fn).max
    scale = float8_scale(torch.as_tensor(bound, device=x.device))
    values = (x.float() * (1 / scale)).clamp(-limit, limit).to(torch.float8_e4m3fn)
    return Float8(values, scale)


def float8_scale(bound: Tensor) -> Tensor:
    """The scale with which 8-bit floats reach just to the bound."""
    return bound.float().clamp_min(1e-12) / torch.finfo(torch.float8_e4m3fn).max


def float8_gradient(grad: Tensor, scale: float) -> Float8:
    """grad * scale rounded to 8-bit floats with 2 bits of mantissa, but 31 powers of two of range.

    With that range a constant serves as the scale.
    """
    limit = torch.finfo(torch.float8_e5m2).max
    values = (grad.float() * scale).clamp(-limit, limit).to(torch.float8_e5m2)
    return Float8(values, grad.new_full((), 1 / scale, dtype=torch.float32))


def product(a_MK, b_NK, dtype: torch.dtype, is_gradient: bool = False) -> Tensor:
    """a @ b.T, (M, N): two tensors of `dtype`, or two of Float8, with a result of `dtype`.

    For 8-bit gradients the matrix units have to add up more exactly, and slower: without, the loss
    was 0.04 higher.
    """
    if not isinstance(a_MK, Float8):
        return a_MK @ b_NK.T
    if not a_MK.values.is_cuda:  # the plain twin
        scale = a_MK.scale * b_NK.scale
        return (a_MK.values.float() @ b_NK.values.float().T * scale).to(dtype)
    return torch._scaled_mm(a_MK.values, b_NK.values.T, a_MK.scale, b_NK.scale, out_dtype=dtype,
                            use_fast_accum=not is_gradient)


class Float8Linear(torch.autograd.Function):
    """x (N, in) times weight (out, in) in 8-bit floats, forward and for the gradient of x.

    `bound` is the largest that |x| can be. The gradient of the weight is a product in the dtype of
    x: in 8-bit floats it would need two transposed copies, which cost what it saves.
    """

    @staticmethod
    def forward(ctx, x_ND, weight_ED, bound):
        weight = float8(weight_ED)
        ctx.save_for_backward(x_ND, *weight)
        return product(float8(x_ND, bound), weight, x_ND.dtype)

    @staticmethod
    def backward(ctx, grad_NE):
        x_ND, *weight = ctx.saved_tensors
        # Of a sum over tokens; 2^10 leaves room for tokens that contribute 100,000 times less than
        # most, and for some that contribute 10,000 times more.
        grad_x = product(float8_gradient(grad_NE, 2.0**10), Float8(*weight).T, x_ND.dtype, True)
        return grad_x, grad_NE.T @ x_ND, None


def linear(x: Tensor, weight: Tensor, bound=None, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times a float32 weight (out, in), and the bias (out,), in the dtype of x.

    In 8-bit floats, without a bias, if a `bound` of |x| is given, a number or a scalar on the
    device of x.
    """
    if bound is None or bias is not None:
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    y = Float8Linear.apply(x.flatten(0, -2), weight.to(x.dtype), bound)
    return y.unflatten(0, x.shape[:-1])


def relu2_linear_float8(x_ND: Float8, weight_ED: Float8, bound: Tensor) -> Float8:
    """ReLU(x @ weight.T)^2 (So et al. 2021), none of it above the `bound`."""
    if not x_ND.values.is_cuda:  # the plain twin
        return float8(F.relu(product(x_ND, weight_ED, torch.float32)).square(), bound)
    from triton_kernels import relu2_linear

    scale = float8_scale(bound)
    factor = (x_ND.scale * weight_ED.scale).square() / scale
    y, y_T = relu2_linear(x_ND.values, weight_ED.values, None, factor, torch.float8_e4m3fn)
    return Float8(y, scale, y_T)


def relu2_linear_gradient(grad_ND: Float8, weight_ED: Float8, y_NE: Float8) -> Float8:
    """The gradient of h where that of y = ReLU(h)^2 is grad @ weight.T; its scale is that of grad.

    The derivative 2 ReLU(h) is 2 sqrt(y), so that h need not be kept. Here the matrix units may add
    up less exactly: the sums are short.
    """
    factor = 2 * weight_ED.scale * y_NE.scale.sqrt()
    if not grad_ND.values.is_cuda:  # the plain twin
        h = grad_ND.values.float() @ weight_ED.values.float().T * y_NE.values.float().sqrt()
        return float8_gradient(h * factor, 1.0)._replace(scale=grad_ND.scale)
    from triton_kernels import relu2_linear

    h, h_T = relu2_linear(grad_ND.values, weight_ED.values, y_NE.values, factor,
                          torch.float8_e5m2)
    return Float8(h, grad_ND.scale, h_T)


class Float8MLP(torch.autograd.Function):
    """ReLU(x @ up.T)^2 @ projection.T for x (N, D), in 8-bit floats, and so all the gradients.

    Those of the weights are sums over N, for which all factors have to lie transposed: the widest
    come from a kernel that writes both layouts at once. The weights are float32. The bounds are of
    |x| and of ReLU^2.
    """

    @staticmethod
    def forward(ctx, x_ND, up_ED, projection_DE, bound, bound_y):
        x, up, projection = float8(x_ND, bound), float8(up_ED), float8(projection_DE)
        y = relu2_linear_float8(x, up, bound_y)
        ctx.save_for_backward(*y, *x[:2], *up[:2], *projection[:2])
        return product(y, projection, x_ND.dtype)

    @staticmethod
    def backward(ctx, grad_ND):
        saved = ctx.saved_tensors
        y, (x, up, projection) = Float8(*saved[:3]), (Float8(*saved[i : i + 2]) for i in (3, 5, 7))
        grad = float8_gradient(grad_ND, 2.0**10)  # as in Float8Linear
        grad_projection = product(grad.T, y.T, torch.float32, True)
        grad_h = relu2_linear_gradient(grad, projection.T, y)
        grad_up = product(grad_h.T, x.T, torch.float32, True)
        return product(grad_h, up.T, grad_ND.dtype, True), grad_up, grad_projection, None, None


class Rotary(nn.Module):
    """Rotary position embedding (Su et al. 2021), of a share of the dimensions.

    Leaving the slower half of the frequencies at zero ("half-truncated") is from the modded-nanogpt
    speedrun (@YouJiacheng).
    """

    def __init__(self, args: Hyperparameters):
        super().__init__()
        pairs = args.head_dim // 2
        active = round(pairs * args.rotary_fraction)  # the first so many pairs rotate
        exponent = torch.arange(active, dtype=torch.float64) / max(1, active)
        frequency = F.pad(args.rotary_base**-exponent, (0, pairs - active))
        positions = torch.arange(args.longest_row, dtype=torch.float64)
        angle_TK = torch.outer(positions, torch.cat([frequency, -frequency]))
        self.register_buffer("cos", angle_TK.cos().float()[:, None], persistent=False)
        self.register_buffer("sin", angle_TK.sin().float()[:, None], persistent=False)
        self.register_buffer("still", (frequency == 0).repeat(2), persistent=False)  # (K,)

    def forward(self, x_BTHK: Tensor, position=None) -> Tensor:
        """Rotate by places in the row, or all by one `position`, (1,) int64."""
        x, T = x_BTHK.float(), x_BTHK.size(1)
        cos, sin = (table[:T] if position is None else table[position]
                    for table in (self.cos, self.sin))
        # A roll swaps the halves. To compute halves and join them takes half as long again.
        rotated = x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin
        return rotated.type_as(x_BTHK)


def shift(x_BTX: Tensor, is_first_BT: Tensor, before_BTX: Tensor | None = None) -> Tensor:
    """What stands one token earlier in the sequence; at a sequence's first token, itself.

    A row of one token that is no sequence's first is told what stands `before` it.
    """
    if before_BTX is not None:
        return before_BTX
    is_first = is_first_BT.view(*is_first_BT.shape, *[1] * (x_BTX.ndim - 2))
    return torch.where(is_first, x_BTX, x_BTX.roll(1, dims=1))  # a row begins with a first token


class Memory:
    """What generation keeps of the tokens so far: of `inputs`, and of each layer's keys and values.

    All have room for `length` tokens, and the tokens so far are counted on the device, so that the
    work for one more token is always the same, and can be replayed.
    """

    def __init__(self, length: int, device: torch.device):
        self.length = length
        self.position = torch.zeros(1, dtype=torch.int64, device=device)  # of the next token
        self.places = torch.arange(length, device=device)
        self.kept: dict[tuple, Tensor] = {}
        self.is_prompt = True  # what comes next is the prompt, and then token after token

    def keep(self, key: tuple, x_BTX: Tensor) -> Tensor:
        """Add these to what is kept under the key; returns all of it, (B, length, ...)."""
        if self.is_prompt:
            self.kept[key] = x_BTX.new_zeros(len(x_BTX), self.length, *x_BTX.shape[2:])
            self.kept[key][:, : x_BTX.size(1)] = x_BTX
        else:
            self.kept[key].index_copy_(1, self.position, x_BTX)
        return self.kept[key]

    def before(self, key: tuple, x_BTX: Tensor) -> Tensor | None:
        """Keep these too, and return those of the token before; None within the prompt."""
        everything = self.keep(key, x_BTX)
        return None if self.is_prompt else everything.index_select(1, self.position - 1)

    def attend(self, layer: int, attention: Callable, q_BTHK, k_BTHK, v_BTHK, batch, window: int,
               scale: float, softcap: float) -> Tensor:
        """Attention within the prompt, or of one token to those so far."""
        k, v = self.keep((layer, "k"), k_BTHK), self.keep((layer, "v"), v_BTHK)
        if self.is_prompt:
            return attention(q_BTHK, k_BTHK, v_BTHK, batch, window, scale, softcap)
        distance = self.position - self.places
        mask = ((distance >= 0) & (distance <= (window or self.length)))[None]
        return masked_attention(q_BTHK, k, v, mask, False, scale, softcap)


class CausalSelfAttention(nn.Module):
    def __init__(self, args: Hyperparameters, attention: Callable, layer: int, is_long: bool,
                 has_value_embedding: bool):
        super().__init__()
        self.layer = layer
        self.key_offset, self.fp8 = args.key_offset and is_long, args.fp8_blocks
        self.kv_heads, self.qk_norm, self.eps = args.kv_heads, args.qk_norm, args.norm_eps
        self.scale = args.attention_scale or args.head_dim**-0.5
        self.softcap = args.attention_softcap
        self.attention = attention
        # Of each head of keys: its queries, the keys, the values (Ainslie et al. 2023).
        parts = args.num_heads // args.kv_heads + 2
        self.qkv = parameter(parts, args.kv_width, args.model_dim)
        self.projection = parameter(args.model_dim, args.attention_width)
        self.qkv_bias = parameter(parts * args.kv_width, when=args.bias)
        self.projection_bias = parameter(args.model_dim, when=args.bias)
        self.qk_length = parameter(args.num_heads, when=args.qk_norm == "l2")
        self.value_lambdas = parameter(2, when=has_value_embedding)
        gate_inputs = min(12, args.model_dim)  # a few dimensions suffice to decide
        self.gate = parameter(args.num_heads, gate_inputs, when=args.attention_gate)

    def forward(
        self, x_BTD, bound, rotary, batch, window, value_embedding_BTD, is_first_BT, memory=None
    ) -> Tensor:
        """`bound`: the largest that |x| can be."""
        B, T, D = x_BTD.shape
        qkv = linear(x_BTD, self.qkv.flatten(0, 1), bound if self.fp8 else None, self.qkv_bias)
        qkv = qkv.view(B, T, len(self.qkv), self.kv_heads, -1)
        q, k, v = qkv.split([len(self.qkv) - 2, 1, 1], dim=2)
        q, k, v = q.transpose(2, 3).flatten(2, 3), k.squeeze(2), v.squeeze(2)
        if self.qk_norm != "none":  # Dehghani et al. 2023
            q, k = norm(q, self.eps), norm(k, self.eps)
        if self.qk_length is not None:  # Henry et al. 2020
            q = q * self.qk_length[:, None].type_as(q)
        attention, position = self.attention, None
        if memory is not None:
            attention = partial(memory.attend, self.layer, attention)
            position = None if memory.is_prompt else memory.position
        q, k = rotary(q, position), rotary(k, position)
        if self.key_offset:
            # So that one layer finds what followed an earlier copy of this token (@classiclarryd).
            before = memory and memory.before((self.layer, "key before"), k)
            k = torch.where(rotary.still, shift(k, is_first_BT, before), k)
        if value_embedding_BTD is not None:  # Zhou et al. 2024, and @KoszarskyB's speedrun record
            lambdas = self.value_lambdas
            v = lambdas[0] * v + lambdas[1] * value_embedding_BTD.view_as(v)
        y = attention(q, k, v, batch, window, self.scale, self.softcap)
        if self.gate is not None:  # lets a head keep silent (@classiclarryd)
            some = x_BTD[..., : self.gate.size(1)].float()
            gate_BTH = 2 * torch.sigmoid(F.linear(some, self.gate))
            y = y * gate_BTH[..., None].type_as(y)
        return linear(y.flatten(-2), self.projection, bias=self.projection_bias)


class MLP(nn.Module):
    def __init__(self, args: Hyperparameters):
        super().__init__()
        self.activation, self.fp8 = args.activation, args.fp8_blocks
        self.fp8_gradients = args.fp8_gradients and args.activation == "relu2"
        hidden = args.mlp_ratio * args.model_dim
        if args.activation == "swiglu":
            hidden = max(1, round(hidden * 2 / 3 / 16)) * 16  # as many weights as without the gate
        has_gate = args.activation.startswith("swiglu")
        self.up = parameter(*[2] * has_gate, hidden, args.model_dim)
        self.projection = parameter(args.model_dim, hidden)
        self.up_bias = parameter(self.up[..., 0].numel(), when=args.bias)
        self.projection_bias = parameter(args.model_dim, when=args.bias)

    def forward(self, x_BTD: Tensor, bound) -> Tensor:
        """`bound`: the largest that |x| can be; and no product with a row of weights is larger
        than that times the row's length, because x is normalised.
        """
        bound_y = None
        if self.fp8:
            bound_y = bound * self.up.detach().norm(dim=-1).amax()
            bound_y = bound_y if self.activation in ("relu", "gelu", "silu") else bound_y**2
        if self.fp8 and self.fp8_gradients:
            x_ND = x_BTD.flatten(0, -2)
            return Float8MLP.apply(x_ND, self.up, self.projection, bound, bound_y).view_as(x_BTD)
        h = linear(x_BTD, self.up.flatten(0, -2), bound if self.fp8 else None, self.up_bias)
        return linear(activate(h, self.activation), self.projection, bound_y, self.projection_bias)


def activate(h: Tensor, activation: str) -> Tensor:
    """ReLU^2 is from So et al. 2021; SwiGLU, whose second half is the gate, from Shazeer 2020."""
    if activation.startswith("swiglu"):
        h, gate = h.chunk(2, dim=-1)
        return h * F.silu(gate)
    return F.relu(h).square() if activation == "relu2" else getattr(F, activation)(h)


class Block(nn.Module):
    def __init__(self, args: Hyperparameters, attention: Callable, layer: int, is_long: bool,
                 has_value_embedding: bool):
        super().__init__()
        self.is_long = is_long
        self.attn = CausalSelfAttention(args, attention, layer, is_long, has_value_embedding)
        self.mlp = MLP(args)
        self.attn_norm, self.mlp_norm = Norm(args), Norm(args)
        self.attn_scale = args.attention_output_scale
        self.dtype = getattr(torch, args.dtype)
        self.residual_lambdas = parameter(2, when=args.embed_shortcut)

    def forward(
        self, x_BTD, x0_BTD, rotary, batch, windows, value_embedding_BTD, is_first_BT, memory=None
    ) -> Tensor:
        x, window = x_BTD, windows[1] if self.is_long else windows[0]
        if self.residual_lambdas is not None:
            x = self.residual_lambdas[0] * x + self.residual_lambdas[1] * x0_BTD
        y = self.attn_norm(x).to(self.dtype)
        y = self.attn(y, self.attn_norm.bound(), rotary, batch, window, value_embedding_BTD,
                      is_first_BT, memory)
        x = x + self.attn_scale * y.type_as(x)
        y = self.mlp(self.mlp_norm(x).to(self.dtype), self.mlp_norm.bound())
        return x + y.type_as(x)


class GPT(nn.Module):
    """The language model; `attention` is one of the attention functions above.

    Weights are float32 and cast where they are used. `reset_parameters` draws them from PyTorch's
    global generator.
    """

    def __init__(self, args: Hyperparameters, attention: Callable = sdpa_attention):
        super().__init__()
        self.args = args
        self.dtype = getattr(torch, args.dtype)
        self.residual_dtype = getattr(torch, args.residual_dtype)
        L, n = args.num_layers, args.value_embeddings
        self.embed = nn.Embedding(args.vocab_size, args.model_dim)
        self.value_embeds = nn.ModuleList(
            nn.Embedding(args.vocab_size, args.kv_width) for _ in range(n)
        )
        self.bigram_embed = self.position_embed = None
        if args.learned_positions:
            self.position_embed = nn.Embedding(args.longest_row, args.model_dim)
        if args.bigram_rows:
            self.bigram_embed = nn.Embedding(args.bigram_rows, args.model_dim)
        # Table i serves layer i and the i-th of the last n layers.
        self.value_table = {i: i for i in range(n)} | {L - n + i: i for i in range(n)}
        self.blocks = nn.ModuleList(
            Block(args, attention, i, i % 4 == 3 or i == L - 1, i in self.value_table)
            for i in range(L)
        )
        self.rotary, self.final_norm = Rotary(args), Norm(args)
        self.mixed = set()  # blocks whose outputs are mixed into the last one's
        if args.output_mixing:
            self.mixed = {1, L // 2 - 1, L - 3} & set(range(L - 1))
            self.mixing_up = parameter(64, args.model_dim)
            self.mixing_down = parameter(1 + len(self.mixed), 64)
        self.skip_lambdas = parameter(L // 2, when=args.skip_connections and L > 1)
        has_head = not args.tied_head or args.untie_frac > 0
        self.head = parameter(args.vocab_size, args.model_dim, when=has_head)
        bias = torch.zeros(args.vocab_size) if args.unigram_power else None
        self.register_buffer("logit_bias", bias)
        self.reset_parameters()

    @property
    def matrix_weights(self) -> int:
        """Weights of the matrix products of each token, without the head's."""
        return sum(p.numel() for name, p in self.named_parameters()
                   if p.ndim > 1 and name != "head" and "embed" not in name)

    @property
    def active_weights(self) -> int:
        """With the head's."""
        return self.matrix_weights + self.head_weight.numel()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise each parameter by its name; RunError names one that nobody thought of."""
        for name, p in self.named_parameters():
            is_output = name.endswith("projection") or name == "head"
            if is_output and self.args.zero_init_projections:
                p.zero_()
            elif (is_output or name.endswith(("qkv", "up"))
                  or name == "embed.weight" and self.args.tied_head):
                bound = p.size(-1) ** -0.5  # nn.Linear's default
                p.uniform_(-bound, bound)
            elif name == "embed.weight" or name.startswith("value_embeds"):
                p.normal_()
            elif (name in ("bigram_embed.weight", "position_embed.weight", "mixing_down")
                  or name.endswith(("gate", "bias"))):
                p.zero_()
            elif name.endswith(("gain", "qk_length", "skip_lambdas")):
                p.fill_(1.0)
            elif name.endswith("value_lambdas"):
                p.fill_(0.5)
            elif name.endswith("residual_lambdas"):
                p.copy_(torch.tensor([1.0, 0.05 if self.args.bigram_rows else 0.0]))
            else:
                raise RunError(f"parameter {name} is not initialised: add it to reset_parameters")
        if self.args.untie_frac:
            self.head.copy_(self.embed.weight)

    def forward(self, batch: MicroBatch, windows: tuple[int, int], ahead_K=None) -> Tensor:
        """Sum of the cross entropies of all tokens, nats, float32.

        `windows`: tokens that (short-window, long-window) layers look back, 0 for no limit.
        `ahead_K`: what the next K tokens weigh in the gradient, float32, by default (1,); the sum
        is of the next token alone in any case.
        """
        x_BTD = self.hidden(batch, windows)
        ahead_K = x_BTD.new_ones(1, dtype=torch.float32) if ahead_K is None else ahead_K
        targets_NK = next_tokens(batch.targets_BT, len(ahead_K))
        return linear_cross_entropy(x_BTD.flatten(0, 1), self.head_weight, targets_NK, ahead_K,
                                    self.logit_bias, self.args, self.final_norm.bound())

    @property
    def head_weight(self) -> Tensor:
        return self.embed.weight if self.head is None else self.head

    def logits(self, x_ND: Tensor) -> Tensor:
        """Logits of the next token, (N, V), float32, for what `hidden` returns."""
        if self.args.masked_share:
            raise RunError("a model of --masked_share predicts hidden tokens, and none that "
                           "follows; train one without it")
        weight = pad_vocabulary(self.head_weight.to(x_ND.dtype))
        return final_logits(x_ND, weight, self.args.vocab_size, self.logit_bias, self.args)

    def hidden(self, batch: MicroBatch, windows: tuple[int, int], memory=None) -> Tensor:
        """What the head is multiplied with, (B, T, D), RMS-normalised, in `dtype`.

        With a `memory`, a call is given a prompt, which is one sequence, or the token after those
        so far.
        """
        args = self.args
        inputs_BT = batch.inputs_BT
        looks_back = args.key_offset or args.bigram_rows or args.learned_positions
        is_first = None
        if looks_back and (memory is None or memory.is_prompt):
            is_first = first_tokens(batch)
        x = self.embed(inputs_BT)
        if self.position_embed is not None:
            x = x + self.position_embed(memory.position if is_first is None else places(is_first))
        x = x.to(self.residual_dtype)
        if args.norm_embed:
            x = norm(x, args.norm_eps)
        x0, skips, mixed = x, [], [x]
        if self.bigram_embed is not None:  # record 62 of the modded-nanogpt speedrun
            token = inputs_BT.long()
            before = memory and memory.before(("token before",), token)
            pairs = hash_pairs(token, is_first, args.bigram_rows, before)
            x0 = x + self.bigram_embed(pairs).to(self.residual_dtype)
            if not args.embed_shortcut:
                x = x0
        value_tables = [table(inputs_BT).to(self.dtype) for table in self.value_embeds]
        for i in range(args.num_layers):
            if self.skip_lambdas is not None and i >= args.num_layers - len(skips):
                x = x + self.skip_lambdas[args.num_layers - 1 - i] * skips.pop()
            value_embedding = value_tables[self.value_table[i]] if i in self.value_table else None
            x = self.blocks[i](x, x0, self.rotary, batch, windows, value_embedding, is_first,
                               memory)
            if self.skip_lambdas is not None and i < args.num_layers // 2:
                skips.append(x)
            if i in self.mixed:
                mixed.append(x)
        if args.output_mixing:  # as in the last layer of MUDD (Xiao et al. 2025)
            hidden = F.gelu(linear(norm(x, args.norm_eps).to(self.dtype), self.mixing_up))
            shares = linear(hidden, self.mixing_down).type_as(x).split(1, dim=-1)
            x = x + sum(share * output for share, output in zip(shares, mixed, strict=True))
        return self.final_norm(x).to(self.dtype)


def first_tokens(batch: MicroBatch) -> Tensor:
    """Whether each token is its sequence's first, (B, T), bool."""
    is_first = batch.inputs_BT.new_zeros(batch.inputs_BT.numel() + 1, dtype=torch.bool)
    is_first[batch.cu_seqlens.long()] = True
    return is_first[:-1].view_as(batch.inputs_BT)


def hash_pairs(token_BT: Tensor, is_first_BT: Tensor, num_rows: int, before=None) -> Tensor:
    """A row for each token and the one before it, as `shift` knows it, (B, T), int64."""
    return (36_313 * token_BT ^ 27_191 * shift(token_BT, is_first_BT, before)) % num_rows


def places(is_first_BT: Tensor) -> Tensor:
    """Each token's place in its sequence, from 0 on, (B, T), int64."""
    token = torch.arange(is_first_BT.numel(), device=is_first_BT.device).view_as(is_first_BT)
    starts = token.where(is_first_BT, 0).flatten().cummax(0).values
    return token - starts.view_as(token)


def next_tokens(targets_BT: Tensor, count: int) -> Tensor:
    """The next `count` tokens at each place, (B * T, count), int32; -1 beyond the row's end."""
    later = [F.pad(targets_BT[:, k:], (0, k), value=-1) for k in range(count)]
    return torch.stack(later, dim=-1).flatten(0, 1)


def linear_cross_entropy(
    x_ND, weight_VD, targets_NK, ahead_K, offsets_V, args: Hyperparameters, bound
) -> Tensor:
    """Sum of the cross entropies, nats, of the logits x @ weight.T, soft-capped if args say so.

    `offsets_V`, if not None, are added to the (capped) logits. The sum is that of the first of K
    targets, while the gradient is that of all of them, each times its weight in `ahead_K`. A target
    of -1 counts for nothing; with `fp8_head`, |x| is at most `bound`. Validation, which is what
    runs without gradients, does without 8-bit floats, and compares with the whole vocabulary.
    """
    if torch.is_grad_enabled():
        return LinearCrossEntropy.apply(x_ND, weight_VD, targets_NK, ahead_K, offsets_V, args,
                                        bound)
    weight = pad_vocabulary(weight_VD.to(x_ND.dtype))
    total = torch.zeros((), dtype=torch.float32, device=x_ND.device)
    for x, targets in split(args.loss_chunk_size, x_ND, targets_NK[:, :1]):
        logits = final_logits(x, weight, len(weight_VD), offsets_V, args)
        of_target = logits.gather(1, targets.clamp_min(0).long())
        losses = log_total(logits, args.logit_softcap) - of_target
        total = total + (losses * (targets >= 0)).sum()
    return total


def final_logits(x_ND, padded_WD, vocab_size: int, offsets_V, args: Hyperparameters) -> Tensor:
    """Logits of the vocabulary, (N, V), float32, capped, and with the offsets if there are any."""
    logits = capped((x_ND @ padded_WD.T)[:, :vocab_size], args.logit_softcap, args.softcap_kind)
    return logits if offsets_V is None else logits + offsets_V


def sample_vocabulary(targets_CNK, log_weights_V, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens for each chunk's loss to compare with: its targets, and others drawn at random.

    Returns (C, size) tokens, different ones in each of C chunks, what to add to their logits
    (float32), and the targets as places among the tokens (int32, -1 stays -1); where there are more
    first targets than places, some get -1, as does a later target that is no first target of the
    chunk, unless it is drawn.
    Tokens of larger weight are drawn more often, and the drawn ones stand for those left out, so
    that the sum of all exp(logits) is expected to be that over the vocabulary: priority sampling
    (Duffield, Lund and Thorup 2007). Jean et al. 2015 trained on parts of the vocabulary before.
    Every chunk draws its own, because it has fewer targets than a micro-batch, which leaves more
    places for others, and because the errors of many samples cancel. So the size of chunks and the
    number of ranks change what is drawn, though not what is expected.
    """
    is_target = log_weights_V.new_zeros(len(targets_CNK), len(log_weights_V))
    is_target = is_target.scatter(1, targets_CNK[:, :, 0].long(), 1.0)
    chance = torch.rand_like(is_target).clamp_min(1e-8)
    priority = (log_weights_V - chance.log() + 1e4 * is_target).sort(descending=True)
    tokens = priority.indices[:, :size]
    left_out = F.pad(priority.values, (0, 1), value=-torch.inf)[:, size : size + 1]  # the first
    # Given that threshold, a token is drawn with the probability exp(log_weight - threshold).
    offsets = (left_out - log_weights_V[tokens]).clamp_min(0) * (1 - is_target.gather(1, tokens))
    place = torch.arange(size, dtype=torch.int32, device=tokens.device).expand_as(tokens)
    places = place.new_full(is_target.shape, -1).scatter(1, tokens, place)
    targets = places.gather(1, targets_CNK.clamp_min(0).long().flatten(1)).view_as(targets_CNK)
    return tokens, offsets, targets.where(targets_CNK >= 0, -1)


def split(size: int, *tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


class LinearCrossEntropy(torch.autograd.Function):
    """The gradients are computed beside the loss, chunk by chunk, so that the logits of a whole
    micro-batch, the largest tensor of the run by far, never exist."""

    @staticmethod
    def forward(ctx, x_ND, weight_VD, targets_NK, ahead_K, offsets_V, args, bound):
        fp8, dtype = args.fp8_head, x_ND.dtype
        # Capped logits have gradients between -2 and 2; times 2^14, few are too small for 8 bits.
        scale, grad_dtype = (2.0**14, torch.float8_e5m2) if fp8 else (1.0, dtype)
        losses_and_gradients = partial(cross_entropy, kind=args.softcap_kind)
        if args.triton_kernels and args.logit_softcap and args.softcap_kind == "tanh":
            from triton_kernels import capped_cross_entropy as losses_and_gradients
        chunk, size = min(args.loss_chunk_size, len(x_ND)), len(weight_VD)
        vocabularies = [(slice(None), offsets_V)]  # one for all chunks, or one for each
        if args.samples_vocabulary:  # by frequencies, if they are there, and else all alike
            weights_V = weight_VD.new_zeros(size) if offsets_V is None else offsets_V
            size, targets_CNK = args.sampled_vocab, targets_NK.unflatten(0, (-1, chunk))
            tokens_CS, offsets_CS, targets_CNK = sample_vocabulary(targets_CNK, weights_V, size)
            vocabularies = list(zip(tokens_CS, offsets_CS + weights_V[tokens_CS], strict=True))
            targets_NK = targets_CNK.flatten(0, 1)
        total = torch.zeros((), dtype=torch.float32, device=x_ND.device)
        grad_weight, grad_x = torch.zeros_like(weight_VD), []
        for i, (x, targets) in enumerate(split(chunk, x_ND, targets_NK)):
            if i < len(vocabularies):
                tokens, offsets = vocabularies[i]
                weight = pad_vocabulary(weight_VD[tokens].to(dtype))
                weight = float8(weight) if fp8 else weight
                weight_T = weight.T
            x = float8(x, bound) if fp8 else x
            losses, grad = losses_and_gradients(
                product(x, weight, dtype), targets, ahead_K, offsets, size, args.logit_softcap,
                scale, grad_dtype)
            total = total + losses.sum()
            grad = Float8(grad, x.scale.new_full((), 1 / scale)) if fp8 else grad
            grad_x.append(product(grad, weight_T, dtype, is_gradient=True))
            grad_rows = product(grad.T, x.T, torch.float32 if fp8 else dtype, is_gradient=True)
            grad_weight[tokens] += grad_rows[:size]
        ctx.save_for_backward(torch.cat(grad_x), grad_weight)
        return total

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_weight = ctx.saved_tensors
        grad_x = (grad_loss * grad_x).type_as(grad_x)
        return grad_x, grad_loss * grad_weight, None, None, None, None, None


def cross_entropy(
    logits_NV, targets_NK, ahead_K, offsets_V, vocab_size: int, softcap: float, scale: float,
    dtype, kind: str = "tanh",
) -> tuple[Tensor, Tensor]:
    """Cross entropies (N,) of the capped logits and the first target, and gradients (N, V).

    The gradients are those of all K targets, weighted by `ahead_K`, times `scale`. `offsets_V`, if
    any, are added to the capped logits. A target of -1 has loss and gradient 0. The columns from
    `vocab_size` on are padding, with gradient 0. On a CPU, new memory costs more than the
    arithmetic, hence the operations in place. The plain twin of a Triton kernel.
    """
    z = capped(logits_NV[:, :vocab_size], softcap, kind)
    y = z if offsets_V is None else z + offsets_V
    total, has_target = log_total(y, softcap), targets_NK >= 0
    losses = (total - y.gather(1, targets_NK[:, :1].clamp_min(0).long())) * has_target[:, :1]
    vocabulary, weights_NK = torch.arange(vocab_size, device=z.device), ahead_K * has_target
    grad = (y - total).exp_().mul_(weights_NK.sum(1, keepdim=True))
    for k, weight in enumerate(ahead_K.unbind()):
        grad.sub_((vocabulary == targets_NK[:, k : k + 1]) * weight)
    if softcap:
        slope = z.div_(softcap).square_().neg_().add_(1)
        grad.mul_(slope.clamp_min_(0).pow_(1.5) if kind == "isru" else slope)
    grad = grad.mul_(scale).to(dtype)
    return losses[:, 0], F.pad(grad, (0, logits_NV.size(1) - vocab_size))


def capped(logits_NV: Tensor, softcap: float, kind: str = "tanh") -> Tensor:
    """Gemma 2's softcap * tanh(logits / softcap), float32, in place if they are; 0: the logits.

    The other kinds are from the modded-nanogpt speedrun: `shifted`, which takes logits for 5 higher
    than they are (record 54), and `isru`, x / sqrt(1 + (x / softcap)^2), of its 350M track.
    """
    logits = logits_NV.float()
    if softcap and kind == "isru":
        return logits.mul_(logits.div(softcap).square_().add_(1).rsqrt_())
    if softcap:  # tanh by way of the sigmoid, which GPUs compute faster
        logits = logits.add_(5) if kind == "shifted" else logits
        logits = logits.mul_(2 / softcap).sigmoid_().mul_(2 * softcap).sub_(softcap)
    return logits


def log_total(z_NV: Tensor, softcap: float) -> Tensor:
    """log(sum(exp(z))), (N, 1). A cap makes the pass for the largest z needless."""
    if softcap:
        return z_NV.exp().sum(-1, keepdim=True).log()
    return torch.logsumexp(z_NV, dim=-1, keepdim=True)


def pad_vocabulary(weight_VD: Tensor) -> Tensor:
    """Rows of zeros up to a multiple of 64 on a GPU, whose matrix units want aligned sizes."""
    return F.pad(weight_VD, (0, 0, 0, -len(weight_VD) % 64)) if weight_VD.is_cuda else weight_VD


# -----------------------------------------------------------------------------
# Optimizers

POLAR_EXPRESS = (  # Amsel et al. 2025, five steps; they are meant for a norm a little below 1
    (8.1566, -22.4833, 15.8788), (4.0429, -2.8089, 0.5000), (3.8917, -2.7725, 0.5061),
    (3.2858, -2.3681, 0.4645), (2.3465, -1.7098, 0.4232),
)
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),)  # Jordan et al. 2024, the same in each step


def zeropower_via_newtonschulz5(
    G_NRC: Tensor, iteration: str = "polar-express", steps: int = 5
) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly, to each of N matrices (R, C).

    Steps X <- (aI + bA + cA^2)X with A = XX^T, in bfloat16 on a GPU; for a tall matrix
    X(aI + bA + cA^2) with A = X^TX, which is smaller. The singular values of the result lie near 1
    rather than at it, which Muon does not mind (Jordan et al. 2024).
    """
    X = G_NRC.bfloat16() if G_NRC.is_cuda else G_NRC.float()
    tall = X.size(-2) > X.size(-1)
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    identity = torch.eye(min(X.shape[-2:]), device=X.device)  # float32, and so is the sum it is in
    factors = POLAR_EXPRESS if iteration == "polar-express" else NEWTON_SCHULZ
    for a, b, c in (factors + factors[-1:] * (steps - len(factors)))[:steps]:
        A = X.mT @ X if tall else X @ X.mT
        A = (a * identity + b * A + c * (A @ A)).type_as(X)
        X = X @ A if tall else A @ X
    return X


class ShardedOptimizer(torch.optim.Optimizer):
    """Base of Muon and Adam: the work of a step is split over ranks, then gathered.

    Each parameter group becomes one flat buffer of units (matrices for Muon, numbers or rows for
    Adam), padded so that every rank owns as many, and its parameters become views of it. A step
    sums the gradients into each rank's share, updates the share, and gathers the shares. With one
    rank the share is everything; the code is the same. Groups are lists of (name, parameter).

    Of a table that is `looked_up` by token or by pair, a rank has only the rows that it owns or was
    told to `fetch`, and sends only gradients of those. What ranks send each other is rounded to
    `sent_dtype`, weights too, of which only the owner has all bits; `gather` brings all of both.
    """

    unit_ndim: int  # dimensions of a unit, unless its group says otherwise
    kernel: Callable  # does the arithmetic of `update`

    def __init__(self, groups: list[dict], rank: int, world_size: int, fuse: bool, **defaults):
        super().__init__(groups, dict(unit_ndim=self.unit_ndim, looked_up="", row_moments=False,
                                      sent_dtype=torch.float32) | defaults)
        if fuse:
            self.kernel = torch.compile(self.kernel, dynamic=False)
        self.rank, self.world_size = rank, world_size
        self.flats: list[Tensor] = []
        self.reductions: list[Callable[[], Tensor]] = []  # wait for this rank's share of the sum
        self.exchanges: dict[str, Exchange] = {}
        for group in self.param_groups:
            group["initial_lr"], group["grad_scale"] = group["lr"], 1.0
            flat = self.flatten([p.detach() for p in group["params"]], group["unit_ndim"])
            first = 0
            for p in group["params"]:
                units = slice(first, first + p.numel() // flat[0].numel())
                p.data, first = flat[units].view_as(p), units.stop
            self.flats.append(flat)

    def flatten(self, tensors: list[Tensor], unit_ndim: int) -> Tensor:
        """The units of all tensors in one tensor, zeros added to share them out evenly."""
        unit_shape = tensors[0].shape[tensors[0].ndim - unit_ndim :]
        units = [tensor.reshape(-1, *unit_shape) for tensor in tensors]
        missing = -sum(map(len, units)) % self.world_size
        if len(units) == 1 and not missing:
            return units[0]  # a large table need not be copied
        return torch.cat([*units, units[0].new_zeros(missing, *unit_shape)])

    def share(self, flat: Tensor, group: dict) -> Tensor:
        """This rank's units of a flat buffer; of a table that is looked up, as `Exchange` says."""
        if group["looked_up"]:
            return flat[self.rank :: self.world_size]
        return flat.chunk(self.world_size)[self.rank]

    def whole(self, share: Tensor, group: dict) -> Tensor:
        """The shares of all ranks put together. All ranks have to call it."""
        if self.world_size == 1:
            return share
        whole = share.new_empty(self.world_size * len(share), *share.shape[1:])
        all_gather(whole, share.contiguous(), self.world_size)()
        if group["looked_up"]:
            whole = whole.unflatten(0, (self.world_size, -1)).transpose(0, 1).flatten(0, 1)
        return whole

    def tables(self, kind: str) -> list[tuple[dict, Tensor]]:
        """Groups of tables that are looked up by token or by pair, and these tables."""
        return [(group, flat) for group, flat in zip(self.param_groups, self.flats, strict=True)
                if group["looked_up"] == kind]

    @torch.no_grad()
    def fetch(self, exchanges: dict[str, Exchange]) -> None:
        """Bring the rows that this step looks up from the ranks that own them."""
        self.exchanges, arrivals = exchanges, []
        for kind, exchange in exchanges.items():
            if tables := self.tables(kind):
                rows = [self.share(table, group)[exchange.theirs].to(group["sent_dtype"])
                        for group, table in tables]
                arrived, wait = send_rows(rows, exchange.asked, exchange.counts)
                arrivals.append((wait, tables, exchange.mine, arrived))
        for wait, tables, mine, arrived in arrivals:
            wait()
            for (_, table), rows in zip(tables, arrived, strict=True):
                table[mine] = rows.float()

    def gather(self) -> None:
        """Bring all rows and all bits of what other ranks own, for other uses than a step."""
        for group, flat in zip(self.param_groups, self.flats, strict=True):
            if self.world_size > 1 and (group["looked_up"] or group["sent_dtype"] != flat.dtype):
                flat.copy_(self.whole(self.share(flat, group), group))

    def send_gradients(self, kind: str) -> Iterator[Callable[[], Tensor]]:
        """Start sending gradients of looked up rows to who owns them; for each table, what waits
        for the sum of this rank's share.
        """
        exchange, tables = self.exchanges[kind], self.tables(kind)
        grads = [group["params"][0].grad for group, _ in tables]
        sent = [grad[exchange.mine].to(group["sent_dtype"])
                for (group, _), grad in zip(tables, grads, strict=True)]
        arrived, wait = send_rows(sent, exchange.counts, exchange.asked)
        for (group, _), grad, rows in zip(tables, grads, arrived, strict=True):
            yield partial(self.add_rows, grad, group, exchange, rows, wait)

    def add_rows(
        self, grad_RD: Tensor, group: dict, exchange: Exchange, rows: Tensor, wait: Callable
    ) -> Tensor:
        wait()
        share = self.share(grad_RD, group)
        if missing := -(-len(grad_RD) // self.world_size) - len(share):
            share = torch.cat([share, share.new_zeros(missing, share.size(1))])
        return share.index_add_(0, exchange.theirs, rows.float())

    @torch.no_grad()
    def reduce(self) -> None:
        """Start summing the gradients over ranks."""
        for group in self.param_groups:
            for name, p in zip(group["param_names"], group["params"], strict=True):
                if p.grad is None:
                    raise RunError(f"parameter {name} got no gradient: nothing in forward uses it")
        of_rows = {kind: self.send_gradients(kind) for kind in self.exchanges}
        for group in self.param_groups:
            if group["looked_up"] in of_rows:
                self.reductions.append(next(of_rows[group["looked_up"]]))
                continue
            grads = self.flatten([p.grad for p in group["params"]], group["unit_ndim"])
            grads = grads.to(group["sent_dtype"])
            wait = reduce_scatter(grads, self.share(grads, group), self.world_size)
            self.reductions.append(partial(self.summed, grads, group, wait))

    def summed(self, grads: Tensor, group: dict, wait: Callable) -> Tensor:
        wait()
        return self.share(grads, group).float()

    @torch.no_grad()
    def square_norm(self) -> Tensor:
        """Of this rank's share of the gradient, scaled as its groups say; the sum is then there."""
        self.reduce()
        shares = [wait() for wait in self.reductions]
        self.reductions = [lambda share=share: share for share in shares]
        return sum((share * group["grad_scale"]).square().sum()
                   for group, share in zip(self.param_groups, shares, strict=True))

    def step(self) -> None:
        step_together([self])

    @torch.no_grad()
    def update_shares(self) -> list[Callable[[], None]]:
        """Update this rank's share of each group; returns what waits for those of the others."""
        gathers, reductions, self.reductions = [], self.reductions, []
        for group, flat, wait in zip(self.param_groups, self.flats, reductions, strict=True):
            share, state = self.share(flat, group), self.state[group["params"][0]]
            self.update(share, wait(), state, group)
            if not group["looked_up"]:
                gathers.append(self.spread(share, flat, group["sent_dtype"]))
        return gathers

    def spread(self, share: Tensor, flat: Tensor, dtype: torch.dtype) -> Callable[[], None]:
        """Start filling the flat buffer with the shares of the other ranks, as they are sent."""
        if dtype == flat.dtype:
            return all_gather(flat, share, self.world_size)
        whole, first = torch.empty_like(flat, dtype=dtype), self.rank * len(share)
        wait = all_gather(whole, share.to(dtype), self.world_size)

        def fill() -> None:
            wait()
            for others in (slice(first), slice(first + len(share), None)):
                flat[others] = whole[others]

        return fill

    def num_units(self, i: int) -> int:
        """Units of a group, without the padding."""
        return sum(p.numel() for p in self.param_groups[i]["params"]) // self.flats[i][0].numel()

    def whole_state(self) -> dict[str, Tensor]:
        """The states of all ranks put together, by group and name. All ranks have to call it."""
        whole = {}
        for i, group in enumerate(self.param_groups):
            for name, value in self.state[group["params"][0]].items():
                if isinstance(value, Tensor) and self.world_size > 1:
                    # A GPU may have no room for all of them.
                    value = self.whole(value, group)[: self.num_units(i)].cpu()
                whole[f"{type(self).__name__}.{i}.{name}"] = torch.as_tensor(value)
        return whole

    def load_whole_state(self, whole: dict[str, Tensor]) -> None:
        """Take this rank's share of what `whole_state` returned, on any number of ranks."""
        for key, value in whole.items():
            kind, i, name = key.split(".")
            if kind == type(self).__name__:
                group, flat = self.param_groups[int(i)], self.flats[int(i)]
                if value.ndim:
                    if len(value) != (units := self.num_units(int(i))):
                        raise ValueError(f"{key} is of {len(value)} units instead of {units}")
                    flat_value = self.flatten([value], group["unit_ndim"])
                    value = self.share(flat_value, group).to(flat.device, copy=True)
                self.state[group["params"][0]][name] = value if value.ndim else value.item()


def step_together(optimizers: list[ShardedOptimizer]) -> None:
    """A step of all optimizers: while one computes, the others' sums and shares are under way."""
    for optimizer in optimizers:
        if not optimizer.reductions:  # or the gradient has been measured
            optimizer.reduce()
    for wait in [wait for optimizer in optimizers for wait in optimizer.update_shares()]:
        wait()


def reduce_scatter(whole: Tensor, share: Tensor, world_size: int) -> Callable[[], None]:
    """Start summing `whole` over ranks into the `share` of it that this rank owns."""
    if world_size == 1:
        return lambda: None
    collective = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return collective(share, whole, async_op=True).wait


def all_gather(whole: Tensor, share: Tensor, world_size: int) -> Callable[[], None]:
    """Start filling `whole` with every rank's `share`."""
    if world_size == 1:
        return lambda: None
    collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return collective(whole, share, async_op=True).wait


def send_rows(
    rows: list[Tensor], counts: list[int], expected: list[int]
) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
    """Start sending so many rows of each table to each rank, all tables at once; what arrives of
    each from them, once it was waited for.
    """
    sent = torch.cat(rows, 1)
    arrived = sent.new_empty(sum(expected), sent.size(1))
    wait = dist.all_to_all_single(arrived, sent, expected, counts, async_op=True).wait
    return arrived.split([some.size(1) for some in rows], 1), wait


def muon_update(
    p_NRC, grad_NRC, grad_scale, buffer_NRC, second_moment, momentum, step_size, decay,
    nesterov: bool, iteration: str, steps: int, beta2: float,
) -> None:
    grad_NRC = grad_NRC * grad_scale
    buffer_NRC.mul_(momentum).add_(grad_NRC * (1 - momentum))
    update = grad_NRC * (1 - momentum) + buffer_NRC * momentum if nesterov else buffer_NRC
    update = zeropower_via_newtonschulz5(update, iteration, steps).float()
    if beta2:
        size = update.norm(dim=(-2, -1), keepdim=True)
        mean_square = update.square().mean(-1 if second_moment.size(-1) == 1 else -2, keepdim=True)
        second_moment.lerp_(mean_square, 1 - beta2)
        update = update * (second_moment + 1e-10).rsqrt()
        update = update * (size / update.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-10))
    p_NRC.mul_(decay).sub_(update * step_size)


class Muon(ShardedOptimizer):
    """Momentum orthogonalised (Jordan et al. 2024), for matrices. A group holds one shape.

    With `beta2`, the rows of the update (its columns, if it is wide) are divided by the root of
    their running mean squares, and the whole is scaled back to its norm: NorMuon (Li et al. 2025).
    """

    unit_ndim, kernel = 2, staticmethod(muon_update)

    def update(self, p_NRC: Tensor, grad_NRC: Tensor, state: dict, group: dict) -> None:
        tall = p_NRC.size(-2) >= p_NRC.size(-1)
        if not state:
            state["momentum_buffer"] = torch.zeros_like(grad_NRC)
            state["second_moment"] = grad_NRC.new_zeros(
                len(p_NRC), *((p_NRC.size(-2), 1) if tall else (1, p_NRC.size(-1))))
        # An update changes a layer's output by as much whatever the layer's shape.
        scale = max(1, p_NRC.size(-2) / p_NRC.size(-1)) ** 0.5
        # Tensors, so that a new value does not compile a new kernel.
        grad_scale, momentum = torch.tensor(group["grad_scale"]), torch.tensor(group["momentum"])
        decay = torch.tensor(1 - group["lr"] * group["weight_decay"])
        step_size = torch.tensor(group["lr"] * scale)
        self.kernel(p_NRC, grad_NRC, grad_scale, state["momentum_buffer"], state["second_moment"],
                    momentum, step_size, decay, group["nesterov"], group["iteration"],
                    group["steps"], group["beta2"])


def adam_update(
    p, grad, grad_scale, exp_avg, exp_avg_sq, beta1, beta2, eps, decay, step_size, root_bias2
) -> None:
    grad = grad * grad_scale
    moment = exp_avg.float().lerp_(grad, 1 - beta1)
    exp_avg.copy_(moment)
    square = grad.square_()
    if exp_avg_sq.shape != square.shape:
        square = square.mean(-1, keepdim=True)
    exp_avg_sq.lerp_(square, 1 - beta2)
    p.mul_(decay).sub_(moment * (step_size / (exp_avg_sq.sqrt() / root_bias2 + eps)))


class Adam(ShardedOptimizer):
    """AdamW (Loshchilov and Hutter 2019), the same numbers as torch.optim.AdamW.

    In a group with `row_moments`, whose units are rows, a row has one second moment, the running
    mean square of its gradients, as in the Adagrad of Mudigere et al. 2021, and first moments are
    bfloat16: less than two thirds of the memory to read and write.
    """

    unit_ndim, kernel = 0, staticmethod(adam_update)

    def update(self, p: Tensor, grad: Tensor, state: dict, group: dict) -> None:
        if not state:
            state["step"] = 0
            by_row = group["row_moments"]
            state["exp_avg"] = torch.zeros_like(p, dtype=torch.bfloat16 if by_row else p.dtype)
            state["exp_avg_sq"] = p.new_zeros(len(p), 1) if by_row else torch.zeros_like(p)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        bias1, bias2 = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
        # Tensors, so that a new value does not compile a new kernel.
        grad_scale = torch.tensor(group["grad_scale"])
        decay = torch.tensor(1 - group["lr"] * group["weight_decay"])
        step_size, root_bias2 = torch.tensor(group["lr"] / bias1), torch.tensor(bias2**0.5)
        self.kernel(p, grad, grad_scale, state["exp_avg"], state["exp_avg_sq"], beta1, beta2,
                    group["eps"], decay, step_size, root_bias2)


LEARNING_RATES = ("matrix", "embed", "bigram", "head", "scalar")  # kinds of parameters


def build_optimizers(
    model: GPT, args: Hyperparameters, rank: int = 0, world_size: int = 1
) -> list[ShardedOptimizer]:
    """Optimizers that hold each parameter of the model once."""
    adam_groups, muon_groups = {}, {}
    for name, p in model.named_parameters():
        if p.ndim < 2 or name.endswith("gate"):
            kind = "scalar"
        elif (name == "head" or name.startswith("mixing")
              or name == "embed.weight" and args.tied_head):  # which does not learn faster
            kind = "head"
        elif name == "bigram_embed.weight":
            kind = "bigram"
        elif "embed" in name:
            kind = "embed"
        else:
            kind = "matrix"
        groups, key, units = adam_groups, kind, {}
        if kind in ("embed", "bigram", "head"):
            key = name  # a group of its own, so that nothing large is copied
            if kind != "head":
                units = dict(unit_ndim=1, row_moments=args.row_moments, looked_up=(
                    "pair" if kind == "bigram" else "" if "position" in name else "token"))
        elif kind == "matrix" and args.optimizer == "muon":
            groups, key = muon_groups, p.shape[-2:]
        # What the passes round it to, or a rank would compute with other bits than the owner; in
        # 8-bit floats it does, which rounds a little otherwise.
        has_all_bits = kind == "scalar" or world_size == 1 or (
            name.removesuffix("embed.weight") in ("", "bigram_", "position_")
            and (args.residual_dtype == "float32" or args.learned_positions))
        sent = torch.float32 if has_all_bits else getattr(torch, args.dtype)
        lr = getattr(args, f"{kind}_lr")
        group = groups.setdefault(key, dict(params=[], lr=lr, sent_dtype=sent) | units)
        group["params"].append((name, p))

    adam = dict(betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_eps)
    muon = dict(momentum=args.muon_momentum, beta2=args.muon_beta2, nesterov=args.muon_nesterov,
                iteration=args.muon_iteration, steps=args.muon_steps)
    if args.compile:  # each shape of a group has a kernel, and the limit of 8 would leave some out
        torch._dynamo.config.recompile_limit = 64
    return [
        kind(list(groups.values()), rank, world_size, fuse=args.compile,
             weight_decay=args.weight_decay, **settings)
        # Muon first: the tables, which are large, are summed meanwhile.
        for kind, groups, settings in ((Muon, muon_groups, muon), (Adam, adam_groups, adam))
        if groups
    ]


# -----------------------------------------------------------------------------
# Schedules: functions of the step, from 0 to train_steps


def lr_multiplier(step: int, args: Hyperparameters) -> float:
    """Factor on the learning rates at this step: a linear rise, a plateau, a fall.

    In a stage of other batches than `batch_size` all of it goes with a power of the batch.
    """
    return (rise_and_fall(step, args)
            * (args.batch_size_at(step) / args.batch_size) ** args.batch_lr_power)


def rise_and_fall(step: int, args: Hyperparameters) -> float:
    warmup_steps = round(args.warmup_frac * args.train_steps)
    cooldown_steps = round(args.cooldown_frac * args.train_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    steps_left = args.train_steps - step
    if steps_left >= cooldown_steps:
        return 1.0
    left = steps_left / cooldown_steps
    if args.cooldown_shape == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    elif args.cooldown_shape == "sqrt":  # Haegele et al. 2024
        left = 1 - (1 - left) ** 0.5
    return args.final_lr_frac + (1 - args.final_lr_frac) * left


def muon_momentum(step: int, args: Hyperparameters) -> float:
    """Muon's momentum at this step: from 0.85 to its final value over the first fifth."""
    done = min(1.0, step / max(1, args.train_steps / 5))
    return 0.85 + done * (args.muon_momentum - 0.85)


def ahead_weights(step: int, args: Hyperparameters) -> list[float]:
    """What the next `tokens_ahead` tokens weigh in the loss: 1, and powers of 1/2 that fall to 0.

    The last of them falls in the first third of the run, the one before it in the second, and so
    on. Predicting several tokens is from Gloeckle et al. 2024, with one head for all of them, and
    for a while only, from the modded-nanogpt speedrun (record 53).
    """
    thirds, count = 3 * step / args.train_steps, args.tokens_ahead
    return [1.0] + [0.5**k * min(1.0, max(0.0, count - k - thirds)) for k in range(1, count)]


def attention_windows(step: int, args: Hyperparameters) -> tuple[int, int]:
    """Tokens that (short-window, long-window) layers look back at this step; 0: no limit.

    They grow with the step in multiples of 64 and 128 tokens.
    """
    done = step / args.train_steps
    if args.window_growth == "stepwise":
        done = min(int(3 * done), 2) / 2
    grown = args.window_start + (args.window_end - args.window_start) * done
    if args.window_growth == "geometric" and args.window_start:
        grown = args.window_start * (args.window_end / args.window_start) ** done
    long = 128 * math.ceil(round(grown / 128, 6))
    return long // 2, long


def set_schedules(optimizers: list[ShardedOptimizer], step: int, args: Hyperparameters) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_multiplier(step, args)
            group["grad_scale"] = 1 / args.predictions(args.batch_size_at(step), args.row_length)
            if "momentum" in group:
                group["momentum"] = muon_momentum(step, args)


# -----------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(
    model: Callable, shards: list[TokenRows], args: Hyperparameters, windows: tuple[int, int],
    ranks: Ranks,
) -> float:
    """Mean cross entropy, nats per token, over exactly the first `val_tokens` validation tokens.

    Each token is predicted once, whatever the batch and the number of ranks. Touches no gradient,
    random generator or training data.
    """
    rows_per_batch = args.val_batch_size // args.max_val_length
    batches, rows_left = [], args.val_tokens // args.max_val_length
    for rows in shards:
        usable = min(rows.num_rows, rows_left)
        rows_left -= usable
        batches += [(rows, first, min(rows_per_batch, usable - first))
                    for first in range(0, usable, rows_per_batch)]
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for rows, first, count in batches[ranks.rank :: ranks.world_size]:
        with memory_advice(args, "val_batch_size"):
            total += model(rows.micro_batch(first, count).to(ranks.device), windows)
    if ranks.world_size > 1:
        dist.all_reduce(total)
    return total.item() / args.predictions(args.val_tokens, args.max_val_length)


# -----------------------------------------------------------------------------
# Generation


def generate(
    model: GPT, windows: tuple[int, int], prompt: list[int], count: int, temperature: float = 1.0,
    top_k: int = 0, top_p: float = 1.0, seed: int = 0,
) -> Iterator[int]:
    """At most `count` tokens that follow the prompt; one that would start a document is the last.

    The prompt has one token at least, and begins with DOCUMENT_START, as documents do.

    They are drawn from exp(logits / temperature), only from the `top_k` likeliest tokens if it is
    not 0, and from the fewest that have `top_p` of the probability (Holtzman et al. 2020); with a
    temperature of 0 it is the likeliest. RunError, before the first, if the model cannot look that
    far.
    """
    if len(prompt) + count > (most := len(model.rotary.cos)):
        raise RunError(f"{len(prompt)} tokens and {count} more are too many: the model was trained "
                       f"on rows of {most} tokens; ask for fewer")
    generator = torch.Generator(model.head_weight.device).manual_seed(seed)
    return draw_tokens(model, windows, prompt, count,
                       partial(choose_token, temperature=temperature, top_k=top_k, top_p=top_p,
                               generator=generator))


def draw_tokens(
    model: GPT, windows: tuple[int, int], prompt: list[int], count: int, choose: Callable
) -> Iterator[int]:
    """The tokens of `generate`; `choose` takes logits, (V,), and returns one of them, ()."""
    device = model.head_weight.device
    memory = Memory(len(prompt) + count, device)
    logits = next_logits(model, windows, torch.tensor([prompt], device=device).int(), memory)
    token = torch.zeros(1, 1, dtype=torch.int32, device=device)
    one_more = partial(next_logits, model, windows, token, memory)
    for i in range(count):
        if i == 1:
            one_more = replayed(one_more, memory)
        if i:
            logits = one_more()
        choice = choose(logits)
        token.copy_(choice)
        yield choice.item()
        if choice.item() == DOCUMENT_START:
            return


@torch.no_grad()
def next_logits(model: GPT, windows: tuple[int, int], inputs_1T: Tensor, memory: Memory) -> Tensor:
    """Logits, (V,), float32, of the token after these; `memory` holds those before, then these."""
    T, ends = inputs_1T.size(1), None
    if memory.is_prompt:
        ends = torch.tensor([0, T], dtype=torch.int32, device=inputs_1T.device)
    batch = MicroBatch(inputs_1T, inputs_1T, ends, T, whole_rows=False)
    logits = model.logits(model.hidden(batch, windows, memory)[:, -1])[0]
    memory.position += T
    memory.is_prompt = False
    return logits


def replayed(function: Callable[[], Tensor], memory: Memory) -> Callable[[], Tensor]:
    """The same function; on a GPU as a CUDA graph, which takes a fraction of the time to launch."""
    if not memory.position.is_cuda:
        return function
    start, stream = memory.position.clone(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is used for the first time cannot be recorded
        function()
    torch.cuda.current_stream().wait_stream(stream)
    memory.position.copy_(start)
    graph = torch.cuda.CUDAGraph()
    # Other threads, as that which makes the batches, may go on meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = function()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def choose_token(logits_V, temperature: float, top_k: int, top_p: float, generator) -> Tensor:
    """A token, (), int64, drawn as `generate` says."""
    if temperature == 0:
        return logits_V.argmax()
    logits, tokens = (logits_V / temperature).sort(descending=True, stable=True)
    chances = logits.softmax(-1)
    left_out = chances.cumsum(-1) - chances >= top_p
    left_out[top_k or len(left_out) :] = True
    left_out[0] = False
    chances[left_out] = 0
    return tokens[torch.multinomial(chances, 1, generator=generator)[0]]


@contextmanager
def sixteen_bits(model: GPT) -> Iterator[None]:
    """Within it the blocks do without 8-bit floats, whose products want multiples of 16 tokens."""
    changed = [module for module in model.modules() if getattr(module, "fp8", False)]
    for module in changed:
        module.fp8 = False
    try:
        yield
    finally:
        for module in changed:
            module.fp8 = True


def write_sample(model: GPT, windows: tuple[int, int], encoding, seed: int) -> str:
    """A text of 100 tokens, if rows are so long, that the model begins by itself."""
    with sixteen_bits(model):
        count = min(100, len(model.rotary.cos) - 1)
        tokens = list(generate(model, windows, [DOCUMENT_START], count, 0.8, seed=seed))
    return encoding.decode([token for token in tokens if token < encoding.n_vocab])


def load_encoding():
    """tiktoken's GPT-2 encoding; RunError if it cannot be had."""
    try:
        import tiktoken

        return tiktoken.get_encoding("gpt2")
    except (ImportError, OSError) as error:
        raise RunError(f"--sample_every needs GPT-2's vocabulary, but tiktoken cannot load it "
                       f"({error}); check the connection, or leave the option out") from None


# -----------------------------------------------------------------------------
# Logging


class Log:
    """The log file of a run: each line is on disk as soon as it is written.

    Drops everything until `create` is called, which only rank 0 does. If the disk fills up, the
    lines go to the console, and to the file once there is room again.
    """

    def __init__(self):
        self.path, self.pending, self.print = None, [], print

    def create(self, path: Path, go_on: bool = False) -> bool:
        """Whether the file is new. RunError if it cannot be written, or is there and not to go on,
        or if another process has it.
        """
        is_new = not (go_on and path.is_file())
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.lock = path.open("xb" if is_new else "ab+")  # held to the end
            lock_file(self.lock)
            if not is_new and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
                self.lock.write(b"\n")  # whoever wrote the last line was killed
            self.lock.flush()
        except BlockingIOError:
            raise RunError(f"{path} is being written by another process, which trains this "
                           f"run") from None
        except OSError as error:
            if path.is_file() and is_new:
                raise RunError(f"{path} exists already; choose another --run_id") from None
            raise RunError(f"cannot write the log {path}: {error.strerror}; free some space, or "
                           f"choose another --log_dir") from None
        self.path = path
        return is_new

    def __call__(self, text: str, console: bool = False) -> None:
        if self.path is None:
            return
        first_failure = not self.pending
        self.pending.append(text + "\n")
        size = None
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                size = file.tell()
                file.write("".join(self.pending))
            self.pending.clear()
        except OSError as error:
            with suppress(OSError):
                if size is not None:
                    os.truncate(self.path, size)  # no half lines
            if first_failure:
                self.print(f"cannot write {self.path}: {error.strerror}; the run goes on, and its "
                           f"lines stand here until there is room")
            console = True
        if console:
            self.print(text)
            sys.stdout.flush()

    def close(self) -> int:
        """Exit status: 0 if the whole log is on disk."""
        if self.pending:
            print(f"error: {self.path} lacks its last {len(self.pending)} entries; they stand "
                  f"above", file=sys.stderr)
        return 1 if self.pending else 0


def has_verdict(path: Path) -> bool:
    """Whether the log of a run has its last line."""
    return path.is_file() and bool(re.search(
        r"^target \S+ of track", path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE))


def lock_file(file) -> None:
    """BlockingIOError if another process has locked it; nothing where files cannot be locked."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except (ImportError, OSError):
        pass


def describe_machine(device: torch.device) -> str:
    """Date, versions, processor or GPU, nvidia-smi, settings and git commit, one fact a line."""

    def run(*command: str) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20,
                                  cwd=Path(__file__).resolve().parent)
            return done.stdout.rstrip() if done.returncode == 0 else ""
        except (OSError, subprocess.TimeoutExpired):
            return ""

    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    lines = [time.strftime("date: %Y-%m-%d %H:%M:%S UTC", time.gmtime()),
             f"{versions}, CUDA {torch.version.cuda}, numpy {np.__version__}", platform.platform()]
    if device.type == "cuda":
        lines.append(f"GPU: {torch.cuda.get_device_name(device)}")
        lines.append(run("nvidia-smi"))
    else:
        lines.append(f"CPU: {platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
                     f"{torch.get_num_threads()} threads")
    # Settings that reach the compiler and its kernels from outside of this file, but no paths.
    settings = [f"{name}={value}" for name, value in sorted(os.environ.items())
                if re.match("TORCH(INDUCTOR|DYNAMO|_)|PYTORCH_|TRITON_|CUBLAS_|CUDNN_|NCCL_", name)
                and not re.search("(DIR|HOME|PATH)$", name)]
    lines.append(f"environment: {' '.join(settings) or 'no settings'}")
    commit = run("git", "rev-parse", "HEAD")
    dirty = "with uncommitted changes" if run("git", "status", "--porcelain") else "clean"
    lines.append(f"git commit: {commit} ({dirty})" if commit else "git commit: none")
    return "\n".join(lines)


def read_source(args: Hyperparameters) -> str:
    """This file, and after a mark the kernels', if the run uses them."""
    uses_kernels = args.triton_kernels or args.fp8_head or args.fp8_blocks
    names = [Path(__file__).name, "triton_kernels.py"][: 1 + uses_kernels]
    files = [Path(__file__).with_name(name).read_text(encoding="utf-8") for name in names]
    return "\n# file: triton_kernels.py\n".join(files)


def log_header(
    log: Log, args: Hyperparameters, model: GPT, ranks: Ranks, attention: str,
    train: list[ShardInfo], val: list[ShardInfo],
) -> None:
    """The source of the run, then all that is needed to run it again."""
    log(read_source(args))
    log("=" * 100)
    log(describe_machine(ranks.device))
    log("=" * 100)
    for kind, shards in (("train", train), ("val", val)):
        for shard in shards:
            log(f"{kind} data: {shard.path} {shard.num_bytes} bytes sha256 {shard.sha256}")
    for name, value in dataclasses.asdict(args).items():
        log(f"hyperparameter {name}: {value}")
    parameters = sum(p.numel() for p in model.parameters())
    active = model.active_weights
    log(f"parameters: {parameters:,} in all, {active:,} in matrix products of each token")
    for batch_size in args.stage_batch_sizes:
        micro_batches = batch_size // args.device_batch_size // ranks.world_size
        log(f"tokens per step: {batch_size:,} = {ranks.world_size} ranks x {micro_batches} "
            f"micro-batches x {args.device_batch_size:,}")
    log(f"training tokens: {args.train_tokens:,}")
    log(f"attention: {attention}")
    for reason in reasons_not_a_record(args, ranks.world_size):
        log(f"not a record: {reason}")
    log("=" * 100)


class Progress:
    """What a run has measured so far, as lines of the log, on the console, and in W&B.

    The loss of a step is read when the next one has been queued, so that the GPU never waits.
    """

    def __init__(self, args: Hyperparameters, ranks: Ranks, log: Log, clock: "Clock", wandb):
        self.args, self.ranks, self.log = args, ranks, log
        self.clock, self.wandb = clock, wandb
        self.train_losses: list[float] = []
        self.val_losses: list[tuple[int, float]] = []
        self.unread, self.reached = None, None
        self.marks: list[str] = []  # why the run is no record, besides the track's reasons
        self.tokens, self.stop_votes = 0, 0.0
        self.bar = None
        if ranks.rank == 0 and sys.stdout.isatty():
            self.bar = tqdm(total=args.train_steps, unit="step", dynamic_ncols=True)
            log.print = self.bar.write

    def state(self) -> dict:
        """What a checkpoint keeps of it."""
        return dict(train_losses=self.train_losses[:], val_losses=self.val_losses[:],
                    reached=self.reached, tokens=self.tokens)

    def load_state(self, state: dict) -> None:
        self.marks.append("resumed")
        self.train_losses = state["train_losses"]
        self.reached = reached_before(state, self.args)
        self.val_losses = [tuple(pair) for pair in state["val_losses"]]
        self.tokens = state["tokens"]
        if self.bar is not None:
            self.bar.update(len(self.train_losses))

    def measure(self, step: int, seconds: float, val_loss: float | None = None) -> str:
        """The part of a log line that other tools read."""
        loss = "" if val_loss is None else f" val_loss:{val_loss:.5f}"
        return (f"step:{step}/{self.args.train_steps}{loss} train_time:{1000 * seconds:.0f}ms "
                f"step_avg:{1000 * seconds / max(1, step):.2f}ms")

    def queued(self, result: Tensor) -> None:
        """One more step was queued; `result` will be its loss, and perhaps the votes to stop."""
        result_and_stamp = result.to("cpu", non_blocking=True), self.clock.stamp()
        self.finish_step()
        self.unread = result_and_stamp

    def finish_step(self) -> None:
        """Wait for the step that was queued, and report it. RunError if its loss is no number."""
        if self.unread is None:
            return
        (result, stamp), self.unread = self.unread, None
        seconds = self.clock.at(stamp)
        loss, *votes = result.flatten().tolist()
        self.stop_votes = sum(votes)
        step = len(self.train_losses) + 1
        self.check_finite("train loss", loss, step)
        self.train_losses.append(loss)
        self.log(self.measure(step, seconds))
        self.tokens += self.args.batch_size_at(step - 1)
        speed = self.tokens / seconds
        if self.wandb:
            self.wandb.log({"train_loss": loss, "train_time": seconds}, step=step)
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s")
            self.bar.update()
        elif self.log.path and (step == 1 or step % self.args.log_every == 0):
            left = seconds / step * (self.args.train_steps - step)
            print(f"step {step}/{self.args.train_steps}  loss {loss:.4f}  {speed:,.0f} tokens/s  "
                  f"{left:.0f} s left", flush=True)

    def validated(self, step: int, val_loss: float) -> None:
        self.check_finite("val_loss", val_loss, step)
        self.val_losses.append((step, val_loss))
        self.log(self.measure(step, self.clock.seconds, val_loss), console=True)
        if self.wandb:
            self.wandb.log({"val_loss": val_loss, "train_time": self.clock.seconds}, step=step)
        if val_loss <= self.args.target and self.reached is None:
            self.reached = self.outcome(step, val_loss)

    def outcome(self, step: int, val_loss: float) -> str:
        return f"val_loss {val_loss:.5f} at step {step}, train_time {self.clock.seconds:.3f}s"

    def check_finite(self, name: str, loss: float, step: int) -> None:
        if math.isfinite(loss):
            return
        last = "none" if not self.val_losses else "step {} val_loss {:.5f}".format(
            *self.val_losses[-1])
        factor = lr_multiplier(max(0, step - 1), self.args)
        rates = ", ".join(f"{kind} {factor * getattr(self.args, f'{kind}_lr'):.3g}"
                          for kind in LEARNING_RATES)
        raise CollectiveError(f"{name} is {loss} at step {step}, with learning rates {rates}; last "
                              f"good validation: {last}; lower the learning rates, or try --dtype "
                              f"float32 to see whether it is a matter of precision")

    def summarize(self, peak_memory: str) -> None:
        """The last lines of the log, the verdict at the end, and the plot beside it."""
        if self.bar is not None:
            self.bar.close()
            self.log.print = print
        if self.wandb:
            self.wandb.finish()
        args = self.args
        self.log(f"peak memory: {peak_memory}", console=True)
        self.log(f"graphs compiled while the clock ran: {self.clock.recompilations}",
                 console=self.clock.recompilations > 0)
        verdict = f"target {args.target or 'none'} of track {args.track}"
        if args.target:
            verdict += " reached" if self.reached else " not reached"
        verdict += f": {self.reached or self.outcome(*self.val_losses[-1])}"
        for mark in self.marks:
            self.log(f"not a record: {mark}")
        if reasons := reasons_not_a_record(args, self.ranks.world_size) + self.marks:
            verdict += f"; not a record: {'; '.join(reasons)}"
        self.log(verdict, console=True)
        if self.log.path:
            picture = self.log.path.with_suffix(".png")
            try:
                plot_losses(picture, self.train_losses, self.val_losses, args)
                print(f"log: {self.log.path}, loss curve: {picture}")
            except (ImportError, OSError) as error:
                print(f"log: {self.log.path}, no loss curve: {error}")


def plot_losses(path: Path, train_losses: list, val_losses: list, args: Hyperparameters) -> None:
    """Write a PNG of the training losses, [loss of step 1, ...], and of [(step, val_loss), ...]."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    axes.plot(range(1, len(train_losses) + 1), train_losses, color="0.7", lw=0.8, label="train")
    axes.plot(*zip(*val_losses, strict=True), "o-", color="tab:blue", ms=3, label="validation")
    shown = [loss for _, loss in val_losses[1:] or val_losses]
    if args.target:
        shown.append(args.target)
        axes.axhline(args.target, color="tab:red", ls="--", lw=1, label=f"target {args.target}")
    axes.set(xlabel=f"step of {args.describe_batch()} tokens", ylabel="loss, nats per token")
    axes.set_title(f"{path.stem}: val_loss {val_losses[-1][1]:.4f}", parse_math=False)
    axes.set_ylim(min(shown) - 0.1, max(shown) + 1.0)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def start_wandb(args: Hyperparameters, run_id: str):
    """A Weights & Biases run; offline unless this machine is logged in."""
    try:
        import wandb
    except ImportError:
        raise RunError("--log_wandb needs the wandb package: pip install wandb") from None
    mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
    return wandb.init(project=args.wandb_project, name=args.wandb_name or run_id, mode=mode,
                      config=dataclasses.asdict(args))


# -----------------------------------------------------------------------------
# Checkpoints: logs/<run_id>/step_001000/ with model.safetensors, optimizer.safetensors, state.json

CHECKPOINT_FORMAT = "gpt2-speedrun checkpoint, version 1"
MODEL_FILE, OPTIMIZER_FILE, STATE_FILE = "model.safetensors", "optimizer.safetensors", "state.json"
KEPT_CHECKPOINTS = 2  # the last two, in case that the last is damaged
# Hyper-parameters that a resumed run may have otherwise: they change nothing in the training. Data
# are known by their hashes.
FREE_TO_DIFFER = {
    "run_id", "data_path", "save_every", "save_on_exit", "resume", "resume_anyway",
    "stop_at_target", "val_loss_every", "sample_every", "log_every", "log_dir", "log_wandb",
    "wandb_project", "wandb_name", "kernel_warmup",
}
PLACES = {"run_id", "data_path", "log_dir"}  # may differ between the machines of one run


def checkpoint_folders(run: str, log_dir: str = "logs") -> list[Path]:
    """Folders of checkpoints, newest first: of a run_id, of the `latest` run, or at a path."""
    at_path = Path(run)
    if (at_path / STATE_FILE).is_file():
        return [at_path]
    runs = Path(log_dir).glob("*/") if run == "latest" else [at_path, Path(log_dir) / run]
    found = [by_age(folder)[::-1] for folder in runs]
    return max(filter(None, found), key=lambda folders: folders[0].stat().st_mtime_ns, default=[])


def by_age(folder: Path) -> list[Path]:
    """A run's checkpoints, the newest last: after a return to an older one it has a lower step."""
    return sorted(folder.glob("step_*/"), key=lambda path: path.stat().st_mtime_ns)


def read_state(folder: Path) -> dict:
    """What the checkpoint says of itself. RunError if it is not one of ours, or damaged."""
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{folder / STATE_FILE} cannot be read: {error}") from None
    is_ours = isinstance(state, dict) and state.get("format") == CHECKPOINT_FORMAT
    if not is_ours or not {"step", "files", "hyperparameters"} <= state.keys():
        raise RunError(f"{folder} is not a checkpoint of this script: its {STATE_FILE} should say "
                       f"{CHECKPOINT_FORMAT!r}")
    if state.pop("sha256", None) != hash_state(state):
        raise RunError(f"{folder / STATE_FILE} was damaged or edited: its SHA-256 does not fit")
    if "tokens" not in state:  # as it was once
        args = Hyperparameters(**saved_hyperparameters(state))
        state["tokens"] = sum(map(args.batch_size_at, range(state["step"])))
    return state


def write_state(folder: Path, state: dict) -> None:
    """What `read_state` reads, with a hash by which it notices damage."""
    text = json.dumps(state | dict(sha256=hash_state(state)), indent=1)
    (folder / STATE_FILE).write_text(text, encoding="utf-8")


def hash_state(state: dict) -> str:
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def read_tensors(folder: Path, name: str, state: dict) -> dict[str, Tensor]:
    """Tensors of a file of the checkpoint, which can hold no code. RunError if it is damaged."""
    path, expected = folder / name, state["files"].get(name)
    if expected is None:
        raise RunError(f"{folder} has no {name}: an exported model can be used, but not go on")
    if not path.is_file():
        raise RunError(f"{path} is missing")
    if (found := path.stat().st_size) != expected["bytes"]:
        raise RunError(f"{path} has {found:,} bytes instead of {expected['bytes']:,}")
    if hash_file(path) != expected["sha256"]:
        raise RunError(f"{path} is damaged: its SHA-256 is not the one in {STATE_FILE}")
    return safetensors.torch.load_file(path)


def hash_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Checkpoint(NamedTuple):
    folder: Path
    state: dict
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    notes: list[str]  # what is wrong with newer ones, or other than in the run that it is of


def open_checkpoint(run: str, log_dir: str = "logs", model_only: bool = False) -> Checkpoint:
    """The newest whole checkpoint of a run. RunError, which says why, if there is none."""
    notes = []
    for folder in checkpoint_folders(run, log_dir):
        try:
            state = read_state(folder)
            model = read_tensors(folder, MODEL_FILE, state)
            optimizer = {} if model_only else read_tensors(folder, OPTIMIZER_FILE, state)
            return Checkpoint(folder, state, model, optimizer, notes)
        except (RunError, OSError, safetensors.SafetensorError) as error:
            notes.append(f"left out a checkpoint: {error}")
    raise RunError(f"{'; '.join(notes)}; no whole checkpoint is left" if notes
                   else no_checkpoint(run, log_dir))


def no_checkpoint(run: str, log_dir: str) -> str:
    known = sorted({folder.parent.name for folder in Path(log_dir).glob("*/step_*/")})
    there = f"there are some of: {', '.join(known)}" if known else "a run writes them with " \
        "--save_every STEPS"
    return f"there is no checkpoint of {run!r} in {log_dir}; {there}"


def saved_hyperparameters(state: dict) -> dict:
    """Those that this script still has, by name."""
    names = {field.name for field in dataclasses.fields(Hyperparameters)}
    saved = {name: value for name, value in state["hyperparameters"].items() if name in names}
    if isinstance(saved.get("qk_norm"), bool):  # as it was once
        saved["qk_norm"] = "rms" if saved["qk_norm"] else "none"
    return saved


def load_run(
    run: str, device: torch.device, log_dir: str = "logs"
) -> tuple[GPT, tuple[int, int], dict]:
    """The model of a run, its attention windows, and the state of the checkpoint, with its "run".

    `run` is a run_id, `latest`, or the path of a checkpoint or of an exported model. The model does
    without 8-bit floats and kernels of ours, so that batches of any size fit, and on a CPU it has
    32 bits. RunError if there is no whole checkpoint.
    """
    folder, state, weights, _, notes = open_checkpoint(run, log_dir, model_only=True)
    for note in notes:
        print(note, file=sys.stderr)
    settings = saved_hyperparameters(state) | dict.fromkeys(EIGHT_BITS, False)
    settings |= dict(attention="auto")
    if device.type == "cpu":
        settings |= dict(dtype="float32", residual_dtype="float32")
    args = Hyperparameters(**settings)
    _, attention = choose_attention(args, device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        model = GPT(args, attention).requires_grad_(False)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise RunError(f"{folder} does not fit this script's model: {error}") from None
    state["run"] = (folder.resolve().parent if folder.name.startswith("step_") else folder).name
    return model, attention_windows(state["step"], args), state


def run_facts(args: Hyperparameters, shards: list[ShardInfo]) -> dict:
    """What has to be the same when a run goes on."""
    return dict(
        format=CHECKPOINT_FORMAT, hyperparameters=dataclasses.asdict(args),
        source=hashlib.sha256(read_source(args).encode()).hexdigest(),
        data=[[shard.path.name, shard.num_bytes, shard.sha256] for shard in shards])


def data_position(shards: list[ShardInfo], step: int, args: Hyperparameters) -> dict:
    """Where the rows of a step begin, for people: steps alone tell a run that goes on."""
    left, first = skip_shards(shards, step, args)
    if not left:
        return {}
    rows = rows_of_steps(left[0].num_rows, first, args)[step - first]
    return dict(shard=left[0].path.name, row=rows.start)


def reached_before(state: dict, args: Hyperparameters) -> str | None:
    """What the run of a checkpoint said of reaching its target, if that is still the target."""
    return state["reached"] if state["hyperparameters"].get("target") == args.target else None


def reopen(args: Hyperparameters, facts: dict, ranks: Ranks) -> tuple[Checkpoint, Path]:
    """The checkpoint to go on from, with notes on what differs from its run, and that run's log.

    RunError if it cannot be gone on with.
    """
    checkpoint = open_checkpoint(args.resume, args.log_dir)
    folder = checkpoint.folder.resolve().parent  # its log stands beside it
    log_path, step = Path(os.path.relpath(f"{folder}.txt")), checkpoint.state["step"]
    files = checkpoint.state["files"]
    if any(others != files for others in of_all_ranks(files, ranks)):
        raise CollectiveError("the ranks found different checkpoints; the folder of the run has to "
                              "be the same one on all machines")
    was_reached = args.stop_at_target and reached_before(checkpoint.state, args)
    if (step == args.train_steps or was_reached) and has_verdict(log_path):
        further = ("--stop_at_target false" if was_reached
                   else "more --train_steps, and --resume_anyway")
        raise CollectiveError(f"{folder.name} has ended already, at step {step}; to train it "
                              f"further: {further}")
    differences = check_same_run(checkpoint.state, facts, args, ranks.world_size)
    if checkpoint.notes and ranks.rank == 0:  # the damaged one is not to be kept instead
        os.utime(checkpoint.folder)
    return checkpoint._replace(notes=checkpoint.notes + differences), log_path


def check_same_run(state: dict, facts: dict, args: Hyperparameters, world_size: int) -> list[str]:
    """What differs from the run that saved the state. RunError if `resume_anyway` is not set."""
    # Other GPUs may need other micro-batches to share a step.
    free = FREE_TO_DIFFER | ({"device_batch_size"} if len(state["rng"]) != world_size else set())
    found = differences(state, facts, free)
    if found and not args.resume_anyway:
        raise CollectiveError(f"this would not be the run that was saved: {'; '.join(found)}; go "
                              f"on all the same with --resume_anyway")
    return [f"resumed, although {difference}" for difference in found]


def differences(then: dict, now: dict, free: set[str]) -> list[str]:
    """How the run of these facts is another than that of `then`, but for the settings in `free`."""
    settings, before = now["hyperparameters"], then["hyperparameters"]
    found = [f"{name} is {settings[name]} instead of {before.get(name, 'absent')}"
             for name in settings if name not in free and settings[name] != before.get(name)]
    found += ["the source is another one"] * (then.get("source") != now["source"])
    return found + ["the data are other shards"] * (then.get("data") != now["data"])


def save_checkpoint(
    checkpoints: "Checkpoints", facts: dict, step: int, model: GPT,
    optimizers: list[ShardedOptimizer], progress: Progress, position: dict, ranks: Ranks,
) -> None:
    """Begin to write a checkpoint. All ranks have to call it; the clock has to stand still."""
    total = torch.stack([p.detach().sum() for p in model.parameters()]).sum().item()
    progress.check_finite("the sum of all weights", total, step)
    tensors = tensors_to_save(model, optimizers)
    rng = {"cpu": encode(torch.get_rng_state())}
    if ranks.device.type == "cuda":
        rng["cuda"] = encode(torch.cuda.get_rng_state(ranks.device))
    rng = of_all_ranks(rng, ranks)
    if ranks.rank == 0:
        checkpoints.save(tensors, facts | progress.state() | dict(
            step=step, train_time=progress.clock.seconds, rng=rng,
            position=position, lr_multiplier=lr_multiplier(step, progress.args),
            attention_windows=attention_windows(step, progress.args)))


def tensors_to_save(
    model: GPT, optimizers: list[ShardedOptimizer]
) -> dict[str, dict[str, Tensor]]:
    """The tensors of each file of a checkpoint. All ranks have to call it."""
    optimizer = {}
    for part in optimizers:
        optimizer |= part.whole_state()
    return {MODEL_FILE: model.state_dict(), OPTIMIZER_FILE: optimizer}


def restore(
    checkpoint: Checkpoint, model: GPT, optimizers: list[ShardedOptimizer], clock: "Clock",
    progress: Progress, ranks: Ranks,
) -> int:
    """Put everything back to where the checkpoint was made; returns its step.

    Takes the tensors out of the checkpoint, or they would stay in memory, and on the disk.
    """
    state, device = checkpoint.state, ranks.device
    if state["step"] > progress.args.train_steps:
        raise CollectiveError(f"{checkpoint.folder} is past --train_steps "
                              f"{progress.args.train_steps}")
    kinds = {key.split(".")[0] for key in checkpoint.optimizer}
    by_row = saved_hyperparameters(state).get("row_moments", False)
    if (kinds != {type(optimizer).__name__ for optimizer in optimizers}
            or by_row != progress.args.row_moments):
        raise CollectiveError(f"{checkpoint.folder} has the state of {', '.join(sorted(kinds))}, "
                              f"with row_moments {by_row}; the run cannot go on with another "
                              f"--optimizer or --row_moments")
    try:
        model.load_state_dict(checkpoint.model)
        for optimizer in optimizers:
            optimizer.load_whole_state(checkpoint.optimizer)
    except (RuntimeError, LookupError, ValueError) as error:
        raise CollectiveError(f"{checkpoint.folder} does not fit this model: {error}") from None
    checkpoint.model.clear()
    checkpoint.optimizer.clear()
    if ranks.rank < len(state["rng"]):
        rng = state["rng"][ranks.rank]
        torch.set_rng_state(decode(rng["cpu"]))
        if device.type == "cuda" and "cuda" in rng:
            torch.cuda.set_rng_state(decode(rng["cuda"]), device)
    else:  # there were fewer ranks then
        torch.manual_seed((progress.args.seed + state["step"] + ranks.rank) % 2**63)
    clock.seconds = state["train_time"]
    progress.load_state(state)
    progress.log(f"resumed: step {state['step']} of {progress.args.train_steps}, after "
                 f"{clock.seconds:.3f}s, from {checkpoint.folder}, on {ranks.world_size} ranks",
                 console=True)
    progress.log(describe_machine(device))
    return state["step"]


def encode(rng_state: Tensor) -> str:
    return base64.b64encode(bytes(rng_state)).decode()


def decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


class Checkpoints:
    """Writes the checkpoints of a run, in a thread, while the training goes on.

    What has a checkpoint's name is whole: it is written under another one, flushed to the disk, and
    renamed. A disk that is full costs a checkpoint, not the run.
    """

    def __init__(self, folder: Path, log: Log):
        self.folder, self.log = folder, log
        self.thread, self.buffers, self.reserving = ThreadPoolExecutor(1), {}, None
        self.step, self.writing = 0, None  # of the one that is being written
        self.problem: str | None = None  # why the last one is not there

    def reserve(self, files: dict[str, dict[str, Tensor]]) -> None:
        """Begin to make room for copies of such tensors.

        Memory on the CPU that a GPU can write to takes seconds to get, and is kept. Where there is
        not enough of it any other does, and takes longer to copy to.
        """
        like = [(file, name, tensor.to("meta"), tensor.is_cuda)
                for file, tensors in files.items() for name, tensor in tensors.items()]

        def work() -> None:
            for file, name, tensor, pin in like:
                room = partial(torch.empty_like, tensor, device="cpu",
                               memory_format=torch.contiguous_format)
                try:
                    self.buffers[file, name] = room(pin_memory=pin)
                except RuntimeError:
                    self.buffers[file, name] = room()

        self.reserving = self.thread.submit(work)

    def save(self, files: dict[str, dict[str, Tensor]], state: dict) -> None:
        """Copy the tensors of each file, and begin to write them; waits for the one before."""
        started = time.perf_counter()
        self.finish()
        if self.reserving is None:
            self.reserve(files)
        self.reserving.result()
        copies = {file: self.copy(file, tensors) for file, tensors in files.items()}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.step, self.waited = state["step"], time.perf_counter() - started
        self.writing = self.thread.submit(self.write, copies, state)

    def copy(self, file: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.buffers[file, name].copy_(tensor, non_blocking=True)
                for name, tensor in tensors.items()}

    def write(self, files: dict[str, dict[str, Tensor]], state: dict) -> Path:
        path = self.folder / f"step_{state['step']:06d}"
        unfinished = self.folder / f".{path.name}.unfinished"
        for old in self.folder.glob(".step_*.unfinished"):
            shutil.rmtree(old)
        unfinished.mkdir(parents=True)
        state["files"] = {}
        for name, tensors in files.items():
            safetensors.torch.save_file(tensors, unfinished / name)
            state["files"][name] = dict(bytes=(unfinished / name).stat().st_size,
                                        sha256=hash_file(unfinished / name))
        write_state(unfinished, state)
        for written in (*unfinished.iterdir(), unfinished):
            flush(written)
        aside = self.folder / f".{path.name}.old.unfinished"
        if path.exists():  # from before the run was resumed
            path.rename(aside)
        unfinished.rename(path)
        flush(self.folder)
        shutil.rmtree(aside, ignore_errors=True)
        others = [old for old in by_age(self.folder) if old != path]
        for old in others[: 1 - KEPT_CHECKPOINTS]:
            shutil.rmtree(old.rename(aside))
        return path

    def look(self) -> None:
        """Log what became of the checkpoint that was being written, if that is known."""
        if self.writing and self.writing.done():
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, and log what became of it."""
        if self.writing is None:
            return
        self.problem = None
        try:
            path = self.writing.result()
            self.log(f"checkpoint: {path}, for which the run waited {self.waited:.2f}s")
        except (OSError, safetensors.SafetensorError) as error:
            self.problem = f"cannot write the checkpoint of step {self.step}: {error}"
            self.log(f"{self.problem}; only that checkpoint is lost", console=True)
            for old in self.folder.glob(".step_*.unfinished"):
                shutil.rmtree(old, ignore_errors=True)
        self.writing = None


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows flushes names by itself
        return
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -----------------------------------------------------------------------------
# Main


def join_ranks() -> Ranks:
    """Join the process group that torchrun describes in the environment, if it does."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, device = int(os.environ.get("LOCAL_RANK", 0)), torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise RunError(f"there is no GPU for local rank {local_rank}: this machine has "
                           f"{torch.cuda.device_count()}; lower --nproc_per_node")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if world_size > 1:
        on_gpu = device.type == "cuda"
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    return Ranks(rank, world_size, device, local_rank)


def on_first_rank(function: Callable, ranks: Ranks, of_machine: bool = False):
    """What `function()` returns on rank 0, for every rank; a RunError there is raised on all.

    With `of_machine`, each machine has a first rank, whose result is for the ranks there.
    """
    result = problem = None
    first = ranks.rank - ranks.local_rank if of_machine else 0
    if ranks.rank == first:
        try:
            result = function()
        except RunError as error:
            problem = str(error) if ranks.rank == 0 else f"where rank {ranks.rank} is: {error}"
    outcomes = of_all_ranks((result, problem), ranks)
    for _, problem in outcomes:
        if problem:
            raise CollectiveError(problem)
    return outcomes[first][0]


def of_all_ranks(value, ranks: Ranks) -> list:
    """The values that the ranks call this with, in their order, on every rank."""
    values = [value] * ranks.world_size
    if ranks.world_size > 1:
        dist.all_gather_object(values, value)
    return values


def check_one_run(facts: dict, ranks: Ranks) -> None:
    """RunError if a rank was started for another run than rank 0: its share would spoil that."""
    first, *others = of_all_ranks(facts, ranks)
    for rank, other in enumerate(others, 1):
        if found := differences(first, other, PLACES):
            raise CollectiveError(f"rank {rank} was started for another run than rank 0: "
                                  f"{'; '.join(found)}; start all machines with the same options "
                                  f"(also those that run.sh adds to fit the memory), train_gpt.py "
                                  f"and data")


def check_accumulation(args: Hyperparameters, world_size: int) -> None:
    """RunError, with the values that would do, unless ranks x micro-batches fill a step."""
    micro_rows = args.device_batch_size // args.row_length
    stages = [size // args.row_length for size in args.stage_batch_sizes]
    if rows := next((rows for rows in stages if rows % world_size), None):
        counts = [n for n in range(1, args.common_rows + 1) if args.common_rows % n == 0]
        name = "a step of --batch_stages" if args.batch_stages else "--batch_size"
        raise CollectiveError(f"{name} {rows * args.row_length} is {rows} rows of --row_length "
                              f"{args.row_length}, which {world_size} ranks cannot share; numbers "
                              f"of ranks (NPROC=... ./run.sh) that can: {counts}")
    share = args.common_rows // world_size
    if share % micro_rows:
        sizes = [n * args.row_length for n in range(1, share + 1) if share % n == 0]
        raise CollectiveError(f"--device_batch_size {args.device_batch_size} does not divide the "
                              f"{share * args.row_length} tokens of each of {world_size} ranks; "
                              f"values that do: {sizes}")


class Clock:
    """Training time, in seconds, without what happens between `stop` and `start`.

    `recompilations` counts the graphs that torch.compile made while it ran: there should be none.
    """

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.recompilations = device, 0.0, 0

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.graphs_at_start, self.started = self.graphs(), self.stamp()

    def stop(self) -> None:
        self.seconds = self.at(self.stamp())
        self.recompilations += self.graphs() - self.graphs_at_start

    def stamp(self):
        """A point in time: when the work that is queued on the device by now will be done."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def at(self, stamp) -> float:
        """The training time at that point; waits for it, not for work queued later."""
        if self.device.type != "cuda":
            return self.seconds + stamp - self.started
        stamp.synchronize()
        return self.seconds + self.started.elapsed_time(stamp) / 1000

    def graphs(self) -> int:
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def add_gradients(
    model: Callable, batches: list[MicroBatch], windows: tuple[int, int], ahead_K: Tensor,
    args: Hyperparameters, device: torch.device,
) -> Tensor:
    """The sum of the losses of a step's micro-batches, and their gradients in the parameters."""
    total = torch.zeros((), device=device)
    for batch in batches:
        # Gradients of sums over tokens, so that micro-batches and ranks simply add up; the
        # optimizers divide by the tokens of the step.
        with memory_advice(args, "device_batch_size"):
            loss = model(batch.to(device), windows, ahead_K)
            loss.backward()
        total += loss.detach()
    return total


class Recorded:
    """Forward and backward passes as CUDA graphs, for when launching takes longer than running.

    A graph is of fixed shapes and windows, so that there is one for each windows, and where a step
    has several micro-batches another one that adds to the first's gradients; empty sequences follow
    the last, up to the most that a micro-batch of the run has. Graphs share their memory: gradients
    last until the next step.
    """

    def __init__(self, model: Callable, optimizers: list[ShardedOptimizer], args: Hyperparameters,
                 device: torch.device, most_sequences: int):
        self.model, self.args = model, args
        self.params = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        batch = random_micro_batch(args, args.device_batch_size, training=True)
        ends = batch.cu_seqlens.new_full((most_sequences + 1,), args.device_batch_size)
        self.batch = batch._replace(cu_seqlens=ends).to(device)
        self.ahead_K = torch.ones(args.tokens_ahead, device=device)
        self.recordings, self.pool = {}, torch.cuda.graph_pool_handle()

    def record_all(self, world_size: int) -> None:
        """Record all steps of the run. Their kernels have to have run before.

        RunError if something in them cannot be recorded.
        """
        try:
            for step in range(self.args.train_steps):
                is_several = self.args.grad_accum_steps(step, world_size) > 1
                with memory_advice(self.args, "device_batch_size"):
                    self.recording(attention_windows(step, self.args), is_several)
        except RuntimeError as error:
            raise RunError(f"a step cannot be recorded as a CUDA graph: {error}; "
                           "--cuda_graphs false does without") from error

    def recording(
        self, windows: tuple[int, int], is_several: bool
    ) -> tuple[list[tuple["torch.cuda.CUDAGraph", Tensor]], list[Tensor]]:
        """Of one micro-batch, or of several: the graph and the loss of the first, and of each
        other; and the gradients.
        """
        if (windows, is_several) in self.recordings:
            return self.recordings[windows, is_several]
        graphs = []
        for _ in range(1 + is_several):
            graph = torch.cuda.CUDAGraph()
            # Other threads, as that which makes the batches, may go on meanwhile.
            with torch.cuda.graph(graph, self.pool, capture_error_mode="thread_local"):
                loss = self.model(self.batch, windows, self.ahead_K)
                loss.backward()
            graphs.append((graph, borrowed(loss.detach())))
        grads = [borrowed(p.grad) for p in self.params]
        for p in self.params:
            p.grad = None
        return self.recordings.setdefault((windows, is_several), (graphs, grads))

    def add_gradients(self, batches: list[MicroBatch], windows, ahead_K: Tensor) -> Tensor:
        """What `add_gradients` does."""
        graphs, grads = self.recording(windows, len(batches) > 1)
        total, ends = torch.zeros_like(self.ahead_K[0]), self.batch.cu_seqlens
        self.ahead_K.copy_(ahead_K)
        for i, batch in enumerate(batches):
            self.batch.inputs_BT.copy_(batch.inputs_BT, non_blocking=True)
            self.batch.targets_BT.copy_(batch.targets_BT, non_blocking=True)
            ends.fill_(self.args.device_batch_size)
            ends[: len(batch.cu_seqlens)].copy_(batch.cu_seqlens, non_blocking=True)
            graph, loss = graphs[min(i, 1)]
            graph.replay()
            total += loss
        for p, grad in zip(self.params, grads, strict=True):
            p.grad = grad
        return total


def borrowed(tensor: Tensor) -> Tensor:
    """The same memory, float32, which others may use once the tensor is gone."""
    array = dict(shape=tuple(tensor.shape), strides=tuple(4 * s for s in tensor.stride()),
                 typestr="<f4", data=(tensor.data_ptr(), False), version=3)
    return torch.as_tensor(SimpleNamespace(__cuda_array_interface__=array), device=tensor.device)


def train_step(
    model: Callable, optimizers: list[ShardedOptimizer], batches: list[MicroBatch], step: int,
    args: Hyperparameters, ranks: Ranks, recorded: Recorded | None = None,
    exchanges: dict[str, Exchange] | None = None,
) -> Tensor:
    """One optimizer step; returns the mean loss of the batch over all ranks, on the device.

    Several ranks need the `exchanges` that `train_batches` gives with the micro-batches.
    """
    set_schedules(optimizers, step, args)
    exchanges = {kind: some.to(ranks.device) for kind, some in (exchanges or {}).items()}
    for optimizer in optimizers:
        optimizer.fetch(exchanges)
    windows = attention_windows(step, args)
    ahead_K = torch.tensor(ahead_weights(step, args), pin_memory=ranks.device.type == "cuda")
    ahead_K = ahead_K.to(ranks.device, non_blocking=True)
    if recorded:
        total = recorded.add_gradients(batches, windows, ahead_K)
    else:
        total = add_gradients(model, batches, windows, ahead_K, args, ranks.device)
    is_tied = step < args.untie_frac * args.train_steps
    if is_tied:
        model.embed.weight.grad += model.head.grad
    if args.grad_clip:
        clip_gradients(optimizers, args.grad_clip, ranks)
    step_together(optimizers)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    if is_tied:
        model.head.data.copy_(model.embed.weight.data)
    if ranks.world_size > 1:
        dist.all_reduce(total)
    return total / args.predictions(args.batch_size_at(step), args.row_length)


def clip_gradients(optimizers: list[ShardedOptimizer], limit: float, ranks: Ranks) -> None:
    """Shrink the gradient of all parameters together to the `limit` of its norm (it waits)."""
    square = sum(optimizer.square_norm() for optimizer in optimizers)
    if ranks.world_size > 1:
        dist.all_reduce(square)
    factor = min(1.0, limit / max(square.item() ** 0.5, 1e-12))
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["grad_scale"] *= factor


def compile_model(model: GPT) -> Callable:
    """The model as one graph, for training, and one for validation, whatever the windows."""
    # Numbers are compiled in, and variables only once they have changed: a second compilation.
    torch.compiler.config.dynamic_sources = "L['windows'][0],L['windows'][1]"
    return torch.compile(model, fullgraph=True)


def warm_up(
    model: GPT, compiled: Callable, optimizers: list[ShardedOptimizer], args: Hyperparameters,
    ranks: Ranks, reserve: Callable | None = None,
) -> None:
    """Compile and run everything once on random tokens, then undo it to the last bit.

    `reserve` is called with the tensors that a checkpoint will hold.
    """
    # On the CPU, because a GPU may have no room for them twice.
    weights = {name: value.to("cpu", copy=True) for name, value in model.state_dict().items()}
    states = copy.deepcopy([optimizer.state_dict() for optimizer in optimizers])
    train_batch = random_micro_batch(args, args.device_batch_size, training=True)
    val_batch = random_micro_batch(args, args.val_batch_size, training=False)
    with torch.random.fork_rng([ranks.device] if ranks.device.type == "cuda" else []):
        # The last step may have other windows, and more micro-batches.
        for step in sorted({0, args.train_steps - 1}):
            with torch.no_grad(), memory_advice(args, "val_batch_size"):
                compiled(val_batch.to(ranks.device), attention_windows(step, args))
            micro_batches = [train_batch] * args.grad_accum_steps(step, ranks.world_size)
            exchanges = plan_exchanges([train_batch] * ranks.world_size, args, ranks)
            train_step(compiled, optimizers, micro_batches, step, args, ranks,
                       exchanges=exchanges)
            if reserve and step == 0:
                tensors = tensors_to_save(model, optimizers)
                if ranks.rank == 0:  # which saves for all
                    reserve(tensors)
    model.load_state_dict(weights)
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict(state)


def prepare(
    model: GPT, optimizers: list[ShardedOptimizer], args: Hyperparameters, ranks: Ranks, log: Log,
    checkpoints: Checkpoints, most_sequences: int,
) -> tuple[Callable, Recorded | None]:
    """The model, compiled, and its passes as CUDA graphs, as far as the options say; all has run.

    Checkpoints reserve their memory meanwhile. Graphs take `most_sequences` in a micro-batch.
    """
    compiled, recorded = compile_model(model) if args.compile else model, None
    if not args.kernel_warmup:
        log("warm-up: none")
        return compiled, recorded
    log("compiling and warming up on random tokens; the clock starts after it", console=True)
    started = time.perf_counter()
    saves = bool(args.save_every or args.save_on_exit)
    warm_up(model, compiled, optimizers, args, ranks, checkpoints.reserve if saves else None)
    if args.cuda_graphs:
        recorded = Recorded(compiled, optimizers, args, ranks.device, most_sequences)
        recorded.record_all(ranks.world_size)
    log(f"warm-up: undone after {time.perf_counter() - started:.1f}s", console=True)
    return compiled, recorded


def check_ranks_agree(model: GPT, ranks: Ranks) -> None:
    """RunError if the ranks ended with different weights."""
    if ranks.world_size == 1:
        return
    checksum = sum(p.detach().double().sum() for p in model.parameters())
    bounds = torch.stack([checksum, -checksum])
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
    if bounds[0] != -bounds[1]:
        raise RunError("the ranks ended with different weights: their work went apart; look at "
                       "the GPUs and their links before trusting this run")


@contextmanager
def memory_advice(args: Hyperparameters, knob: str) -> Iterator[None]:
    """Turn running out of GPU memory into a RunError that names the value of `knob` to try."""
    try:
        yield
    except torch.OutOfMemoryError:
        row_length = args.max_val_length if knob == "val_batch_size" else args.row_length
        rows = getattr(args, knob) // row_length
        smaller = next((n for n in range(rows // 2, 0, -1) if rows % n == 0), None)
        advice = (f"try --{knob} {smaller * row_length}; the training stays the same"
                  if smaller else "this is one row: try a smaller --loss_chunk_size, or a smaller "
                  "model")
        raise RunError(f"out of GPU memory with --{knob} {getattr(args, knob)}; {advice}") from None


def train(args: Hyperparameters, ranks: Ranks, log: Log, stop: "StopSignal") -> None:
    """Train and validate one model, and log it. RunError where a person has to act."""
    args, notes = switch_off(args, ranks.device)
    train_shards, val_shards = on_first_rank(lambda: plan_data(args), ranks, of_machine=True)
    facts = run_facts(args, [*train_shards, *val_shards])
    check_one_run(facts, ranks)
    check_accumulation(args, ranks.world_size)
    attention_name, attention = choose_attention(args, ranks.device)
    run_id = args.run_id or f"{time.strftime('%Y%m%d-%H%M%S')}-{args.recipe}-seed{args.seed}"
    log_path, checkpoint = Path(args.log_dir) / f"{run_id}.txt", None
    if args.resume:
        checkpoint, log_path = reopen(args, facts, ranks)
        notes += checkpoint.notes
    encoding = load_encoding() if args.sample_every else None
    is_new = on_first_rank(lambda: log.create(log_path, go_on=bool(checkpoint)), ranks)

    torch.manual_seed(args.seed)
    model = GPT(args, attention).to(ranks.device)
    if ranks.rank:  # with samples of its own a rank shows the head other tokens
        torch.manual_seed((args.seed + ranks.rank) % 2**63)
    optimizers = build_optimizers(model, args, ranks.rank, ranks.world_size)
    if is_new:
        log_header(log, args, model, ranks, attention_name, train_shards, val_shards)
    wandb = start_wandb(args, log_path.stem) if args.log_wandb and ranks.rank == 0 else None

    log(args.describe_run(), console=True)
    for note in notes:
        log(note, console=True)
    checkpoints = Checkpoints(log_path.with_suffix(""), log)
    most_sequences = max(shard.most_sequences for shard in train_shards)
    compiled, recorded = prepare(model, optimizers, args, ranks, log, checkpoints, most_sequences)
    clock = Clock(ranks.device)
    progress = Progress(args, ranks, log, clock, wandb)
    first_step = 0
    if checkpoint:
        first_step = restore(checkpoint, model, optimizers, clock, progress, ranks)
    shards, shard_step = skip_shards(train_shards, first_step, args)
    batches = prefetch(train_batches([shard.path for shard in shards], args, ranks, shard_step,
                                     first_step))
    val_data = [TokenRows(shard.path, args, training=False) for shard in val_shards]
    clock.start()
    if args.unigram_power and not checkpoint:
        # What the model starts from is training data, so it is on the clock.
        bias = args.unigram_power * log_frequencies(train_shards[0].path, args.vocab_size)
        model.logit_bias.copy_(bias)
    stop.waits = args.save_on_exit
    try:
        for step in range(first_step, args.train_steps + 1):
            is_last, is_stopped = step == args.train_steps, progress.stop_votes > 0
            validates = is_due(step, args.val_loss_every or -1, args)
            samples = is_due(step, args.sample_every, args)
            saves = is_due(step, args.save_every, args)
            if validates or samples or saves or is_stopped:
                progress.finish_step()
                clock.stop()
                for optimizer in optimizers:
                    optimizer.gather()
                windows = attention_windows(step, args)
                if validates and step not in dict(progress.val_losses):  # before it was resumed
                    progress.validated(step, evaluate(compiled, val_data, args, windows, ranks))
                if samples and ranks.rank == 0:
                    text = write_sample(model, windows, encoding, args.seed)
                    log(f"sample: step {step}: {text!r}", console=True)
                if args.stop_at_target and progress.reached and not is_last:
                    progress.marks.append("stopped early")
                    is_last, saves = True, bool(args.save_every)
                if (saves or is_stopped) and step > first_step:
                    save_checkpoint(checkpoints, facts, step, model, optimizers, progress,
                                    data_position(train_shards, step, args), ranks)
                if is_last or is_stopped:
                    break
                clock.start()
            micro_batches, exchanges = next(batches)
            loss = train_step(compiled, optimizers, micro_batches, step, args, ranks, recorded,
                              exchanges)
            progress.queued(stop.add_votes(loss, ranks))
            checkpoints.look()
    finally:
        checkpoints.finish()
    if is_last:
        check_ranks_agree(model, ranks)
        progress.summarize(peak_memory(ranks.device))
    if checkpoints.problem:
        ending = ("the training and its log are whole" if is_last
                  else f"stopped at step {step}, which is not saved")
        raise RunError(f"{checkpoints.problem}; {ending}")
    if not is_last:
        log(f"go on with: --resume {log_path.stem}", console=True)
        raise stop.kind


def is_due(step: int, every: int, args: Hyperparameters) -> bool:
    """Whether to do now what is done every so many steps and at the end; -1: only there; 0: never.
    """
    return every > 0 and step % every == 0 or every != 0 and step == args.train_steps


def peak_memory(device: torch.device) -> str:
    """The most memory the run has held, for the log."""
    if device.type == "cuda":
        return (f"{torch.cuda.max_memory_allocated(device) / 2**20:.0f} MiB allocated, "
                f"{torch.cuda.max_memory_reserved(device) / 2**20:.0f} MiB reserved")
    try:
        import resource
    except ImportError:  # Windows
        return "unknown"
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{kilobytes / 2 ** (20 if sys.platform == 'darwin' else 10):.0f} MiB resident"


class Terminated(BaseException):
    """SIGTERM arrived."""


class StopSignal:
    """SIGTERM or Ctrl-C: ends the run at once, or, while it `waits`, once all has been saved."""

    def __init__(self):
        self.waits, self.asked = False, False
        self.kind = Terminated  # also where another rank was asked

    def __call__(self, signum, frame) -> None:
        self.kind = KeyboardInterrupt if signum == signal.SIGINT else Terminated
        if not self.waits:
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) is self:  # one more ends it, without a traceback
                    signal.signal(number, signal.SIG_DFL)
            raise self.kind
        if not self.asked:
            os.write(2, b"stopping after this step, once all is saved\n")
        self.asked = True

    def add_votes(self, loss: Tensor, ranks: Ranks) -> Tensor:
        """The loss and how many ranks were asked, (2,), so that all find out at the same step.

        The loss alone if nothing `waits`, which costs nothing.
        """
        if not self.waits:
            return loss
        votes = torch.full((), float(self.asked), device=ranks.device)
        if ranks.world_size > 1:
            dist.all_reduce(votes)
        return torch.stack([loss, votes])


def main() -> int:
    """The exit status: 0, 1 after an error, 130 after Ctrl-C, 143 after SIGTERM."""
    args = parse_hyperparameters(sys.argv[1:])
    log, ranks, stop = Log(), None, StopSignal()
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) != signal.SIG_IGN:  # as of jobs in the background
            signal.signal(number, stop)
    try:
        ranks = join_ranks()
        train(args, ranks, log, stop)
        return log.close()
    except RunError as error:
        log(f"error: {error}")
        print_error(error, ranks)
        return 1
    except KeyboardInterrupt:
        log("stopped by Ctrl-C", console=True)
        return 130
    except Terminated:
        log("stopped by SIGTERM", console=True)
        return 143
    except Exception as error:  # as where another rank is gone
        log(f"error: {type(error).__name__}: {error}")
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
