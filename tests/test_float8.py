"""8-bit floats, through their plain twins: how exact they are, and that nothing overflows."""

import pytest
import torch
from conftest import random_batch, tiny_args, wake_up

import train_gpt
from train_gpt import MLP, Float8, Norm, float8, float8_gradient, linear, norm, product


def value(x: Float8) -> torch.Tensor:
    return x.values.double() * x.scale.double()


def relative_error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_numbers_of_any_size_keep_three_bits_of_mantissa(size):
    x = size * torch.randn(100, 32)
    rounded = value(float8(x, 4 * x.abs().max()))
    large = x.abs() > x.abs().max() / 1000
    error = ((rounded - x).abs() / x.abs())[large]
    assert 1 / 40 < error.max() <= 1 / 16


@pytest.mark.parametrize("size", [0.0006, 0.05, 1.0, 15.9])
def test_weights_of_all_usual_sizes_keep_three_bits_of_mantissa(size):
    x = size * (1 + torch.rand(100, 32)).clamp_max(16 / size)
    error = (value(float8(x)) - x).abs() / x
    assert error.max() <= 1 / 16


def test_zeros_stay_zeros():
    assert not value(float8(torch.zeros(3, 16))).any()


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e2])
def test_a_gradient_keeps_two_bits_over_a_wide_range_without_looking_at_it(size):
    grad = size * torch.randn(100, 32)
    error = ((value(float8_gradient(grad, 2.0**6)) - grad).abs() / grad.abs())
    assert 1 / 20 < error[grad.abs() > size / 100].max() <= 1 / 8


def test_a_gradient_out_of_range_is_cut_off_and_no_infinity():
    assert value(float8_gradient(torch.tensor([[1e9, -1e9]]), 2.0**6)).isfinite().all()


def test_the_transpose_is_a_copy_without_gaps():
    x = float8(torch.randn(3, 5))
    assert x.T.values.is_contiguous()
    assert torch.equal(value(x.T), value(x).T)


def test_a_product_is_that_of_the_rounded_factors():
    a, b = float8(torch.randn(20, 32)), float8(torch.randn(7, 32))
    got = product(a, b, torch.float32)
    torch.testing.assert_close(got.double(), value(a) @ value(b).T, atol=1e-4, rtol=1e-4)
    plain = torch.randn(20, 32), torch.randn(7, 32)
    assert torch.equal(product(*plain, torch.float32), plain[0] @ plain[1].T)


def test_a_linear_map_and_its_gradients_come_near_the_exact_ones():
    x, weight = norm(torch.randn(2, 30, 64), 1e-6), torch.randn(48, 64) / 8
    grad = torch.randn(2, 30, 48) / 100
    found = []
    for bound in (None, 8.0):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        y = linear(*leaves, bound)
        found.append([y.detach(), *torch.autograd.grad(y, leaves, grad)])
    (y, grad_x, grad_weight), (y8, grad_x8, grad_weight8) = found
    assert 0.005 < relative_error(y8, y) < 0.05
    assert 0.005 < relative_error(grad_x8, grad_x) < 0.1
    assert torch.equal(grad_weight8, grad_weight)  # this one is not in 8 bits


def test_what_is_beyond_the_bound_is_cut_off():
    rounded = value(float8(torch.tensor([[3.0, -5.0, 1.0]]), 2.0))
    assert rounded[0].tolist() == pytest.approx([2.0, -2.0, 1.0])


@pytest.mark.parametrize("size", [1e-7, 1e-4, 1e-1, 10.0])
def test_gradients_of_any_usual_size_keep_two_bits(size):
    x, weight = norm(torch.randn(30, 64), 1e-6).requires_grad_(), torch.randn(48, 64) / 8
    grad = size * torch.randn(30, 48)
    (got,) = torch.autograd.grad(linear(x, weight, 8.0), x, grad)
    assert relative_error(got, grad @ weight) < 0.1


@pytest.mark.parametrize("activation", ["relu2", "relu", "gelu", "silu"])
@pytest.mark.parametrize("size", [1e-3, 0.1, 1.0])
def test_the_bounds_in_an_mlp_hold_and_are_reached_in_the_worst_case(
    activation, size, monkeypatch
):
    """By an input parallel to the longest row of weights, but for the rounding to 8 bits."""
    mlp, seen = MLP(tiny_args(fp8_blocks=True, activation=activation)), []

    def watched(x, *bound):
        if bound:
            seen.append((x.abs().max() / bound[0]).item())
        return float8(x, *bound)

    D = mlp.up.size(1)
    with torch.no_grad():
        for p in mlp.parameters():
            p.normal_(std=size)
        mlp.up[3] *= 3
        x = torch.stack([D**0.5 * mlp.up[3] / mlp.up[3].norm(), D**0.5 * torch.eye(D)[5]])
        monkeypatch.setattr(train_gpt, "float8", watched)
        got = mlp(x[None], D**0.5)
        mlp.fp8 = False
        expected = mlp(x[None], D**0.5)
    # GELU and SiLU let small numbers through by half.
    is_half = size < 0.01 and activation in ("gelu", "silu")
    assert seen[0] == pytest.approx(1)
    if activation != "silu" or size != 0.1:  # in between
        assert seen[1] == pytest.approx(0.5 if is_half else 1, rel=0.1)
    assert relative_error(got, expected) < 0.2


@pytest.mark.parametrize("activation", ["swiglu", "swiglu-wide"])
def test_the_bounds_in_a_gated_mlp_hold_in_the_worst_case(activation, monkeypatch):
    mlp, seen = MLP(tiny_args(fp8_blocks=True, activation=activation)), []

    def watched(x, *bound):
        if bound:
            seen.append((x.abs().max() / bound[0]).item())
        return float8(x, *bound)

    D = mlp.up.size(-1)
    with torch.no_grad():
        for p in mlp.parameters():
            p.normal_()
        mlp.up[0, 3] *= 3
        mlp.up[1, 3] = mlp.up[0, 3]  # the longest row is gated by itself
        monkeypatch.setattr(train_gpt, "float8", watched)
        longest = D**0.5 * mlp.up[0, 3] / mlp.up[0, 3].norm()
        mlp(torch.stack([longest, D**0.5 * torch.eye(D)[5]])[None], D**0.5)
    assert seen == [pytest.approx(1), pytest.approx(1, rel=0.1)]


def test_an_mlp_in_8_bits_and_all_of_its_gradients_come_near_the_exact_ones():
    found = []
    for switches in ({}, dict(fp8_blocks=True), dict(fp8_blocks=True, fp8_gradients=True)):
        torch.manual_seed(2)
        mlp = MLP(tiny_args(**switches))
        for p in mlp.parameters():
            p.data.normal_(std=0.2)
        x, grad = norm(torch.randn(2, 80, 32), 1e-6).requires_grad_(), torch.randn(2, 80, 32) / 100
        y = mlp(x, 32**0.5)
        found.append([y.detach(), *torch.autograd.grad(y, (x, mlp.up, mlp.projection), grad)])
    exact, short, shortest = found
    for other, expected in zip(shortest, exact, strict=True):
        assert 0.005 < relative_error(other, expected) < 0.15
    # The same but for the gradients, where more is rounded.
    assert torch.equal(short[0], shortest[0])
    for one, other, expected in zip(short[1:], shortest[1:], exact[1:], strict=True):
        assert relative_error(one, expected) < relative_error(other, expected)


def test_weight_gradients_of_an_mlp_in_8_bits_are_not_rounded_to_16():
    torch.manual_seed(3)
    mlp = MLP(tiny_args(fp8_blocks=True, fp8_gradients=True))
    for p in mlp.parameters():
        p.data.normal_(std=0.2)
    x, grad = norm(torch.randn(2, 80, 32), 1e-6).bfloat16(), torch.randn(2, 80, 32).bfloat16()
    for found in torch.autograd.grad(mlp(x, 32**0.5), mlp.parameters(), grad):
        assert found.dtype == torch.float32
        assert (found != found.bfloat16()).float().mean() > 0.5


def test_the_transpose_that_is_there_already_is_used():
    x = float8(torch.randn(3, 5))
    other = Float8(x.values, x.scale, x.T.values)
    assert other.T.values is other.transposed and other.T.T.values is x.values


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_no_number_of_a_norm_is_above_its_bound(kind):
    some = Norm(tiny_args(block_norm=kind, norm_gain=True, model_dim=64))
    with torch.no_grad():
        some.gain.uniform_(-3, 3)
        largest = some(1e6 * torch.eye(64)).abs().max()
    assert 0.98 * some.bound() < largest <= some.bound()


def test_a_gain_on_the_norms_is_in_the_bounds():
    losses = []
    for on in (False, True):
        torch.manual_seed(1)
        model = wake_up(train_gpt.GPT(tiny_args(
            norm_gain=True, fp8_head=on, fp8_blocks=on, fp8_gradients=on, logit_softcap=0)))
        with torch.no_grad():
            for block in model.blocks:
                for some in (block.attn_norm, block.mlp_norm, model.final_norm):
                    some.gain.fill_(6)
        loss = model(random_batch(model.args), (64, 128))
        loss.backward()
        losses.append([loss.detach(), model.blocks[0].mlp.up.grad])
    for got, expected, most in zip(losses[1], losses[0], (0.02, 0.3), strict=True):
        assert 0 < relative_error(got, expected) < most


def test_validation_does_without_8_bits():
    args = tiny_args(fp8_head=True)
    model = wake_up(train_gpt.GPT(args))
    batch = random_batch(args)
    with torch.no_grad():
        found = model(batch, (64, 128))
    exact = train_gpt.GPT(tiny_args())
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert found == exact(batch, (64, 128))
    assert model(batch, (64, 128)) != found  # training does not


@pytest.mark.parametrize(
    "switches", [["fp8_head"], ["fp8_blocks"], ["fp8_blocks", "fp8_gradients"]], ids=str)
def test_a_model_in_8_bits_trains_almost_like_one_in_32(switches):
    losses = []
    for on in (False, True):
        args = tiny_args(**dict.fromkeys(switches, on), train_steps=12)
        torch.manual_seed(1)
        model = train_gpt.GPT(args)
        optimizers = train_gpt.build_optimizers(model, args)
        batch = random_batch(args, rows=8)
        ranks = train_gpt.Ranks(0, 1, torch.device("cpu"))
        losses.append([
            train_gpt.train_step(model, optimizers, [batch], step, args, ranks).item()
            for step in range(12)
        ])
    exact, short = losses
    assert exact[-1] < exact[0] - 1
    assert short != exact
    assert short == pytest.approx(exact, abs=0.1)
