"""Triton kernels against their plain twins: on a GPU, or on a CPU in Triton's interpreter."""

import math
import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported
pytest.importorskip("triton", reason="needs Triton: pip install triton")

from conftest import tiny_args  # noqa: E402

import train_gpt  # noqa: E402
import triton_kernels  # noqa: E402

# The interpreter's tanh is exact; a GPU's is good to 2^-11 of the cap.
TOLERANCE = 1e-4 if DEVICE == "cpu" else 2e-2
rounds_to_8_bits = pytest.mark.skipif(
    DEVICE == "cpu", reason="the interpreter drops the carry when it rounds to 8 bits")


def relative_error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [3.0, 15.0])
@pytest.mark.parametrize("num_targets", [1, 3])
@pytest.mark.parametrize("has_offsets", [False, True])
@pytest.mark.parametrize("num_rows, vocab_size, padded",
                         [(1, 7, 7), (65, 130, 192), (3, 4100, 4160)])
def test_the_losses_and_gradients_equal_the_twins(
    num_rows, vocab_size, padded, num_targets, has_offsets, softcap, dtype
):
    logits = (6 * torch.randn(num_rows, padded, device=DEVICE)).to(dtype)
    targets = torch.randint(vocab_size, (num_rows, num_targets), device=DEVICE).int()
    targets[1:2], targets[:, 2:] = -1, -1  # no target
    ahead = torch.tensor([1.0, 0.5, 0.25], device=DEVICE)[:num_targets]
    offsets = 3 * torch.rand(vocab_size, device=DEVICE) if has_offsets else None
    settings = ahead, offsets, vocab_size, softcap, 3.0, torch.float32
    losses, grad = triton_kernels.capped_cross_entropy(logits, targets, *settings)
    expected, expected_grad = train_gpt.cross_entropy(logits.clone(), targets, *settings)
    torch.testing.assert_close(losses, expected, atol=softcap * TOLERANCE, rtol=1e-5)
    assert relative_error(grad, expected_grad) < TOLERANCE
    assert not grad[:, vocab_size:].any() and not grad[1:2].any() and not losses[1:2].any()


@pytest.mark.parametrize("logit", [-1e4, 0.0, 1e4])
def test_neither_end_of_the_largest_cap_overflows(logit):
    logits = torch.full((2, 320), logit, device=DEVICE)
    targets = torch.tensor([[0], [299]], device=DEVICE).int()
    for function in (triton_kernels.capped_cross_entropy, train_gpt.cross_entropy):
        losses, grad = function(logits.clone(), targets, torch.ones(1, device=DEVICE), None, 300,
                                70.0, 1.0, torch.float32)
        assert losses.tolist() == pytest.approx([math.log(300)] * 2, rel=1e-4)
        assert grad.isfinite().all()


@rounds_to_8_bits
def test_gradients_in_8_bits_are_those_in_32_rounded():
    logits = 6 * torch.randn(208, 192, device=DEVICE)
    targets = torch.randint(100, (208, 2), device=DEVICE).int()
    ahead = torch.tensor([1.0, 0.5], device=DEVICE)
    whole, short = (
        triton_kernels.capped_cross_entropy(logits, targets, ahead, None, 100, 15.0, 2.0**14, dtype)
        for dtype in (torch.float32, torch.float8_e5m2))
    assert torch.equal(whole[0], short[0])
    assert torch.equal(whole[1].to(torch.float8_e5m2).float(), short[1].float())
    assert 0 < relative_error(short[1].float(), whole[1]) < 0.1


@pytest.mark.parametrize("shape", [(1, 1), (16, 48), (128, 128), (130, 300)])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_the_transpose_of_8_bit_numbers_is_the_transpose(shape, dtype):
    x = torch.randn(shape, device=DEVICE).to(dtype)
    y = triton_kernels.transposed(x)
    assert y.is_contiguous() and y.dtype == dtype
    assert torch.equal(y.float(), x.float().T)


@pytest.mark.parametrize("rows, width, hidden", [(16, 16, 16), (304, 144, 400), (1024, 128, 256)])
@pytest.mark.parametrize("has_old", [False, True])
def test_relu2_of_a_product_is_written_in_both_layouts(has_old, rows, width, hidden):
    dtype = torch.float8_e4m3fn if DEVICE == "cuda" else torch.float32
    shapes = (rows, width), (hidden, width), (rows, hidden)
    x, weight, old = (torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes)
    old = old.float().abs().to(dtype)
    factor = torch.tensor(0.5, device=DEVICE)
    y, y_T = triton_kernels.relu2_linear(x, weight, old if has_old else None, factor, dtype)
    h = x.float() @ weight.float().T
    expected = 0.5 * (h * old.float().sqrt() if has_old else h.relu().square())
    expected = expected.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    assert y.is_contiguous() and y_T.is_contiguous() and y.dtype == y_T.dtype == dtype
    assert torch.equal(y_T.float(), y.float().T)
    assert relative_error(y, expected) < (1e-6 if DEVICE == "cpu" else 0.04)  # 3 bits of mantissa


@pytest.mark.skipif(DEVICE == "cpu", reason="8-bit floats, of which the interpreter drops a carry")
def test_an_mlp_in_8_bits_equals_its_twin_forward_and_backward():
    found = []
    for device in ("cpu", "cuda"):  # the twin is what a CPU runs
        generator = torch.Generator().manual_seed(1)
        x, up, projection, grad = (
            torch.randn(shape, generator=generator).bfloat16().to(device)
            for shape in ((256, 64), (192, 64), (64, 192), (256, 64)))
        x = train_gpt.norm(x, 1e-6)
        leaves = [tensor.requires_grad_() for tensor in (x, up, projection)]
        bound = torch.tensor(8.0, device=device)
        bound_y = (bound * up.detach().norm(dim=-1).amax()) ** 2
        y = train_gpt.Float8MLP.apply(*leaves, bound, bound_y)
        found.append([y, *torch.autograd.grad(y, leaves, grad)])
    for twin, fused in zip(*found, strict=True):
        assert relative_error(fused.cpu(), twin) < 0.02


@pytest.mark.parametrize("fp8_head", [False, pytest.param(True, marks=rounds_to_8_bits)])
def test_a_whole_head_equals_the_plain_head_forward_and_backward(fp8_head):
    found = []
    for fused in (False, True):
        args = tiny_args(triton_kernels=fused, fp8_head=fp8_head, logit_softcap=15.0,
                         loss_chunk_size=48)
        generator = torch.Generator(DEVICE).manual_seed(1)
        x, weight = (torch.randn(shape, generator=generator, device=DEVICE)
                     for shape in ((96, 64), (131, 64)))
        targets = torch.randint(131, (96, 3), generator=generator, device=DEVICE).int()
        ahead = torch.tensor([1.0, 0.5, 0.25], device=DEVICE)
        x = train_gpt.norm(x, 1e-6)
        x = (x.bfloat16() if DEVICE == "cuda" else x).requires_grad_()
        weight.requires_grad_()
        loss = train_gpt.linear_cross_entropy(x, weight, targets, ahead, None, args, 16.0)
        found.append([loss.detach(), *torch.autograd.grad(loss / 7, (x, weight))])
    for plain, fused in zip(*found, strict=True):
        assert relative_error(fused, plain) < TOLERANCE
