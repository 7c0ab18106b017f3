"""What only a GPU can show: its kernels against their plain twins. Skipped without one."""

import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, tiny_args

import train_gpt
from train_gpt import MicroBatch, Ranks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def packed_batch(rows: int = 2, length: int = 1024) -> MicroBatch:
    inputs, targets = torch.randint(256, (2, rows, length)).int().cuda()
    starts = torch.tensor([0, 100, 101, 612, length, length + 3, rows * length]).int().cuda()
    return MicroBatch(inputs, targets, starts, length, whole_rows=False)


def outputs_and_gradients(attention, batch, window, kv_heads=3):
    generator = torch.Generator("cuda").manual_seed(1)
    q, k, v, grad = (
        torch.randn((*batch.inputs_BT.shape, heads, 64), generator=generator, device="cuda",
                    dtype=torch.bfloat16)
        for heads in (3, kv_heads, kv_heads, 3)
    )
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    y = attention(q, k, v, batch, window, 0.12)
    return [y, *torch.autograd.grad(y, leaves, grad)]


def relative_error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("window", [0, 64, 300])
@pytest.mark.parametrize("name", ["varlen", "flash"])
def test_fast_attention_equals_its_plain_twin_forward_and_backward(name, window):
    attention = train_gpt.varlen_attention
    if name == "flash" and (attention := train_gpt.load_flash_attention()) is None:
        pytest.skip("FlashAttention is not installed")
    batch = packed_batch()
    found = outputs_and_gradients(attention, batch, window)
    expected = outputs_and_gradients(train_gpt.sdpa_attention, batch, window)
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < 1e-2


@pytest.mark.parametrize("window", [0, 64])
def test_attention_to_both_sides_and_with_one_head_of_keys_equals_its_plain_twin(window):
    batch = packed_batch()._replace(is_causal=False)
    found, expected = (outputs_and_gradients(attention, batch, window, kv_heads=1) for attention in
                       (train_gpt.varlen_attention, train_gpt.sdpa_attention))
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < 1e-2


def test_8_bit_gradients_are_added_up_exactly():
    a = train_gpt.float8_gradient(torch.rand(256, 32_768, device="cuda"), 2.0**10)
    b = train_gpt.float8(torch.rand(256, 32_768, device="cuda"))
    values = [x.values.double() * x.scale.double() for x in (a, b)]
    fast, exact = (relative_error(train_gpt.product(a, b, torch.float32, is_gradient),
                                  values[0] @ values[1].T) for is_gradient in (False, True))
    assert exact < 1e-3 and exact < fast / 2


NEWER = dict(key_offset=True, attention_dim=64, unigram_power=0.5, bigram_rows=101, bigram_lr=0.05,
             muon_beta2=0.9, row_moments=True, batch_stages="512,1024", tokens_ahead=3,
             triton_kernels=True)
SWITCHED = dict(num_heads=4, num_kv_heads=2, activation="swiglu", bias=True, qk_norm="l2",
                learned_positions=True, block_norm="layernorm", norm_gain=True,
                tied_head=True, untie_frac=0.5, softcap_kind="isru", muon_steps=4)
HIDDEN = dict(masked_share=0.2, num_kv_heads=1, grad_clip=1.0)
EIGHT_BITS = dict(triton_kernels=True, fp8_head=True, fp8_blocks=True)
ALL_EIGHT_BITS = EIGHT_BITS | dict(fp8_gradients=True)


def train_some_steps(
    compile: bool, steps: int = 6, writes: bool = False, records: bool = False, **switches
) -> list[float]:
    """The losses; if it `writes`, a text between any two steps; if it `records`, as CUDA graphs."""
    args = tiny_args(
        vocab_size=1000, row_length=128, max_document_length=64, batch_size=1024,
        device_batch_size=512, val_batch_size=512, window_start=128, window_end=256,
        train_steps=steps, dtype="bfloat16", attention="varlen", compile=compile, **switches,
    )
    ranks = Ranks(0, 1, torch.device("cuda", 0))
    torch._dynamo.reset()  # it counts the graphs of all tests against the limit of one function
    torch.manual_seed(0)
    model = train_gpt.GPT(args, train_gpt.varlen_attention).to(ranks.device)
    optimizers = train_gpt.build_optimizers(model, args)
    compiled = train_gpt.compile_model(model) if compile else model
    train_gpt.warm_up(model, compiled, optimizers, args, ranks)
    recorded = None
    if records:
        recorded = train_gpt.Recorded(compiled, optimizers, args, ranks.device,
                                      most_sequences=args.device_batch_size)
        recorded.record_all(1)
    batch = train_gpt.random_micro_batch(args, args.device_batch_size, True)
    clock = train_gpt.Clock(ranks.device)
    clock.start()
    losses = []
    for step in range(steps):
        # Documents of 1 token, of 2, of 4, ...: their number compiles nothing.
        length = 2**step
        documents = torch.arange(0, args.device_batch_size + 1, length, dtype=torch.int32)
        batches = [batch._replace(cu_seqlens=documents)] * args.grad_accum_steps(step, 1)
        losses.append(train_gpt.train_step(compiled, optimizers, batches, step, args, ranks,
                                           recorded).item())
        if writes:
            with train_gpt.sixteen_bits(model):
                assert len(list(train_gpt.generate(model, (64, 128), [5], 20))) == 20
    clock.stop()
    assert clock.recompilations == 0
    assert clock.seconds > 0
    return losses


def test_sampling_the_vocabulary_compiles_nothing_after_the_warm_up():
    losses = train_some_steps(True, sampled_vocab=640, loss_chunk_size=128, **EIGHT_BITS)
    assert losses[-1] < losses[0] - 0.5


def test_texts_between_the_steps_change_no_loss_and_compile_nothing():
    silent, writing = (train_some_steps(True, writes=writes, **ALL_EIGHT_BITS)
                       for writes in (False, True))
    assert writing == pytest.approx(silent, abs=0.02)


@pytest.mark.parametrize("switches", [{}, NEWER, SWITCHED, HIDDEN, EIGHT_BITS, ALL_EIGHT_BITS],
                         ids=["modern", "newer", "switched", "hidden", "8bit", "8bit-gradients"])
def test_compiled_training_equals_eager_training_and_compiles_nothing_after_the_warm_up(switches):
    compiled, eager = (train_some_steps(compile, **switches) for compile in (True, False))
    share = switches.get("masked_share", 1)  # of tokens that the mean is over
    assert compiled == pytest.approx(eager, abs=0.02 / share)
    assert compiled[-1] < compiled[0] - 0.5


@pytest.mark.parametrize("switches", [NEWER, SWITCHED, ALL_EIGHT_BITS],
                         ids=["newer", "switched", "8bit-gradients"])
def test_training_as_cuda_graphs_equals_training_kernel_by_kernel(switches):
    # Sequences are from 512 to 16, in graphs that were recorded with 512.
    one_by_one, recorded = (train_some_steps(True, records=records, **switches)
                            for records in (False, True))
    assert recorded == pytest.approx(one_by_one, abs=0.02)
    assert recorded[-1] < recorded[0] - 0.5


def test_a_replayed_token_has_the_logits_of_one_that_is_computed_anew():
    args = tiny_args(vocab_size=51_000, row_length=256, max_document_length=256, num_layers=4,
                     batch_size=512, device_batch_size=512, val_batch_size=512,
                     window_start=128, window_end=128, dtype="bfloat16", attention="varlen",
                     key_offset=True, bigram_rows=101, attention_gate=True, output_mixing=True)
    torch.manual_seed(0)
    model = train_gpt.GPT(args, train_gpt.varlen_attention).cuda().requires_grad_(False)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    prompt, windows = [train_gpt.DOCUMENT_START, *range(60)], (64, 128)
    tokens = list(train_gpt.generate(model, windows, prompt, 100, temperature=0))
    inputs = torch.tensor([prompt + tokens[:-1]], device="cuda").int()
    ends = torch.tensor([0, inputs.size(1)], device="cuda").int()
    batch = MicroBatch(inputs, inputs, ends, inputs.size(1), whole_rows=False)
    logits = model.logits(model.hidden(batch, windows)[0, len(prompt) - 1 :])
    chosen = logits.gather(1, torch.tensor(tokens, device="cuda")[:, None])
    assert len(tokens) > 50
    assert (logits.amax(1, keepdim=True) - chosen).max() < 0.05  # 16 bits round


OPTIONS = ("--track sample --recipe record --data_path data/sample --model_dim 128 "
           "--attention_dim 128 --num_heads 1 --num_layers 6 --row_length 1024 --batch_size 2048 "
           "--device_batch_size 1024 --val_row_length 1024 --val_batch_size 4096 --val_tokens 8192 "
           "--loss_chunk_size 1024 --sampled_vocab 4096 --train_steps 40 --run_id run "
           "--val_loss_every 20").split()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_as_one(tmp_path):
    found = []
    for launcher in ((), ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")):
        # Ranks draw samples of their own.
        done = run_python(*launcher, "train_gpt.py", *OPTIONS, "--sampled_vocab=0",
                          f"--log_dir={tmp_path / str(len(found))}")
        found.append(re.findall(r"val_loss:(\S+)", done))
    assert len(found[0]) == 3
    for one, two in zip(*found, strict=True):
        assert float(one) == pytest.approx(float(two), abs=0.05)


def test_a_resumed_run_goes_on_with_the_losses_of_one_that_was_not_stopped(tmp_path):
    found = []
    for name in ("whole", "resumed"):
        log_dir = f"--log_dir={tmp_path / name}"
        done = run_python("train_gpt.py", *OPTIONS, "--save_every=20", log_dir)
        if name == "resumed":
            shutil.rmtree(tmp_path / name / "run" / "step_000040")
            done = run_python("train_gpt.py", "--resume=latest", log_dir)
            assert "resumed: step 20 of 40" in done
        found.append(re.findall(r"step:40/40 val_loss:(\S+)", done)[-1])
    assert float(found[0]) == pytest.approx(float(found[1]), abs=0.05)


def run_python(*argv) -> str:
    done = subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True,
                          timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout
