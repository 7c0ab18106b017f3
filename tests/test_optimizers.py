"""Muon and Adam against hand computations, over any number of ranks and micro-batches."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from conftest import (
    CPU,
    ONE_RANK,
    build,
    random_batch,
    random_tokens,
    run_ranks,
    tiny_args,
    write_tokens,
)

import train_gpt
from train_gpt import (
    GPT,
    Adam,
    Muon,
    Ranks,
    RunError,
    build_optimizers,
    train_batches,
    train_step,
)
from train_gpt import zeropower_via_newtonschulz5 as zeropower

ITERATIONS = ["polar-express", "newton-schulz"]


# -----------------------------------------------------------------------------
# Orthogonalisation


def matrix_with(singular_values, rows, columns, seed=0):
    """U diag(s) V^T in float64, and U V^T."""
    generator = torch.Generator().manual_seed(seed)
    n = len(singular_values)
    U, V = (torch.linalg.qr(torch.randn(size, n, generator=generator).double())[0]
            for size in (rows, columns))
    return U @ torch.diag(torch.as_tensor(singular_values).double()) @ V.T, U, V


@pytest.mark.parametrize("iteration, low, high", [("polar-express", 0.83, 1.17),
                                                  ("newton-schulz", 0.65, 1.2)])
@pytest.mark.parametrize("rows, columns", [(24, 24), (24, 60), (60, 24)])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_singular_values_end_near_one_and_the_vectors_stay(
    iteration, low, high, rows, columns, size
):
    G, U, V = matrix_with(np.linspace(0.02, 2.0, 24), rows, columns)
    X = zeropower((size * G[None]).float(), iteration)[0].double()
    rotated = U.T @ X @ V
    values = rotated.diag()
    assert low < values.min() and values.max() < high
    torch.testing.assert_close(rotated, torch.diag(values), atol=2e-3, rtol=0)
    torch.testing.assert_close(U @ rotated @ V.T, X, atol=2e-3, rtol=0)  # and no other directions


def test_more_steps_come_nearer():
    G, U, V = matrix_with(np.linspace(0.02, 2.0, 24), 24, 24)
    errors = [(zeropower(G[None].float(), steps=steps)[0].double() - U @ V.T).norm().item()
              for steps in (1, 3, 5, 7)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.6 * errors[-2]


@pytest.mark.parametrize("iteration", ITERATIONS)
@pytest.mark.parametrize("shape", [(8, 8), (8, 20), (20, 8)])
def test_a_stack_of_matrices_is_done_one_by_one(iteration, shape):
    G = torch.randn(5, *shape) * torch.tensor([1, 10, 0.1, 3, 0])[:, None, None]
    X = zeropower(G, iteration)
    assert X.shape == G.shape
    for one, whole in zip(G, X, strict=True):
        torch.testing.assert_close(zeropower(one[None], iteration)[0], whole, atol=1e-5, rtol=1e-5)
    assert X[4].abs().max() == 0


def test_random_matrices_are_orthogonalised_within_wide_bounds():
    for iteration in ITERATIONS:
        X = zeropower(torch.randn(4, 32, 64), iteration)
        values = torch.linalg.svdvals(X)
        assert 0.5 < values.min() and values.max() < 1.5


def test_the_two_iterations_differ():
    G = torch.randn(1, 8, 8)
    assert not torch.allclose(*(zeropower(G, iteration) for iteration in ITERATIONS), atol=0.01)


# -----------------------------------------------------------------------------
# Adam


def parameters(*shapes):
    return [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]


def named(group):
    return [(f"p{i}", p) for i, p in enumerate(group)]


@pytest.mark.parametrize("eps", [1e-10, 1e-3])
@pytest.mark.parametrize("betas", [(0.8, 0.95), (0.9, 0.999)])
def test_adam_equals_torchs_adamw(betas, eps):
    ours = [parameters((7, 5), (3,)), parameters((4, 3, 2), (1,))]
    theirs = [[torch.nn.Parameter(p.detach().clone()) for p in group] for group in ours]
    lrs = [0.02, 0.1]
    adam = Adam([dict(params=named(g), lr=lr) for g, lr in zip(ours, lrs, strict=True)], 0, 1,
                fuse=False, betas=betas, eps=eps, weight_decay=0.1)
    adamw = torch.optim.AdamW([dict(params=g, lr=lr) for g, lr in zip(theirs, lrs, strict=True)],
                              betas=betas, eps=eps, weight_decay=0.1)
    for step in range(15):
        for groups in zip(adam.param_groups, adamw.param_groups, strict=True):
            for group in groups:
                group["lr"] *= 1.1 if step < 7 else 0.8
        for a, b in zip(sum(ours, []), sum(theirs, []), strict=True):
            a.grad = torch.randn(a.shape) * 10 ** (step % 3 - 1)
            b.grad = a.grad.clone()
        adam.step()
        adamw.step()
        for a, b in zip(sum(ours, []), sum(theirs, []), strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_in_a_group_of_rows_adam_divides_a_row_by_its_root_mean_square():
    ours = parameters((7, 5), (2, 5))
    expected = torch.cat([p.detach().clone() for p in ours])
    adam = Adam([dict(params=named(ours), lr=0.1, unit_ndim=1, row_moments=True)], 0, 1, fuse=False,
                betas=(0.5, 0.75), eps=1e-10, weight_decay=0.1)
    first, second = torch.zeros(9, 5), torch.zeros(9, 1)
    for step in range(1, 5):
        gradient = torch.randn(9, 5) * torch.linspace(0.1, 3, 9)[:, None]
        ours[0].grad, ours[1].grad = gradient[:7].clone(), gradient[7:].clone()
        adam.step()
        first = 0.5 * first + 0.5 * gradient
        second = 0.75 * second + 0.25 * gradient.square().mean(1, keepdim=True)
        update = first / (1 - 0.5**step) / (second / (1 - 0.75**step)).sqrt()
        expected = expected * (1 - 0.1 * 0.1) - 0.1 * update
        # The first moments are rounded to 8 bits of mantissa between the steps.
        torch.testing.assert_close(torch.cat(ours).detach(), expected, atol=2e-3, rtol=0)
    dtypes = {name: value.dtype for name, value in adam.state[ours[0]].items() if name != "step"}
    assert dtypes == dict(exp_avg=torch.bfloat16, exp_avg_sq=torch.float32)


def test_every_group_has_a_kernel_compiled_for_it(monkeypatch):
    args = tiny_args(optimizer="adam", attention_dim=16, value_embeddings=1, output_mixing=True,
                     bigram_rows=97, row_moments=True, learned_positions=True, compile=True)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = build(args)
    [adam] = build_optimizers(model, args)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    adam.step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(adam.param_groups) > 8


# -----------------------------------------------------------------------------
# Muon


@pytest.mark.parametrize("iteration", ITERATIONS)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape, scale", [((6, 6), 1.0), ((6, 24), 1.0), ((24, 6), 2.0)])
def test_muon_equals_the_hand_computation(shape, scale, nesterov, iteration):
    ours = parameters(shape, (2, *shape))  # three matrices
    expected = torch.cat([p.detach().clone().view(-1, *shape) for p in ours])
    muon = Muon([dict(params=named(ours), lr=0.1)], 0, 1, fuse=False, momentum=0.9,
                nesterov=nesterov, iteration=iteration, steps=5, weight_decay=0.5, beta2=0.0)
    buffer = torch.zeros(3, *shape)
    for momentum, lr in ((0.9, 0.1), (0.8, 0.05), (0.8, 0.2)):
        muon.param_groups[0].update(momentum=momentum, lr=lr)
        gradient = torch.randn(3, *shape)
        ours[0].grad, ours[1].grad = gradient[0].clone(), gradient[1:].clone()
        muon.step()
        buffer = momentum * buffer + (1 - momentum) * gradient
        direction = (1 - momentum) * gradient + momentum * buffer if nesterov else buffer
        expected = expected * (1 - lr * 0.5) - lr * scale * zeropower(direction, iteration)
        got = torch.cat([p.detach().view(-1, *shape) for p in ours])
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("shape, dim", [((6, 6), 1), ((24, 6), 1), ((6, 24), 0)])
def test_normuon_evens_out_the_rows_or_columns_and_keeps_the_norm(shape, dim):
    ours = parameters(shape)
    expected = ours[0].detach().clone()
    muon = Muon([dict(params=named(ours), lr=0.1)], 0, 1, fuse=False, momentum=0.0, beta2=0.8,
                nesterov=False, iteration="polar-express", steps=5, weight_decay=0.0)
    mean_squares = torch.zeros(1)
    for _ in range(3):
        gradient = torch.randn(shape) * torch.linspace(0.1, 3, shape[0])[:, None]
        ours[0].grad = gradient.clone()
        muon.step()
        update = zeropower(gradient[None], "polar-express")[0]
        mean_squares = 0.8 * mean_squares + 0.2 * update.square().mean(dim, keepdim=True)
        even = update / mean_squares.sqrt()
        even *= update.norm() / even.norm()
        expected = expected - 0.1 * max(1, shape[0] / shape[1]) ** 0.5 * even
        torch.testing.assert_close(ours[0].detach(), expected, atol=2e-5, rtol=1e-4)


# -----------------------------------------------------------------------------
# Which parameter is where


def groups_of(model, args):
    """{name: (optimizer, group)}; a name in two groups fails."""
    found = {}
    for optimizer in build_optimizers(model, args):
        for group in optimizer.param_groups:
            for name, p in zip(group["param_names"], group["params"], strict=True):
                assert name not in found and p is dict(model.named_parameters())[name]
                found[name] = optimizer, group
    return found


LRS = dict(matrix_lr=0.01, embed_lr=0.02, bigram_lr=0.05, head_lr=0.03, scalar_lr=0.04)


def expected_lr(name, tied=False):
    if name == "head" or tied and name == "embed.weight":
        return 0.03
    if name == "bigram_embed.weight":
        return 0.05
    if "embed" in name:
        return 0.02
    return 0.04 if name.endswith("lambdas") else 0.01


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("optimizer", ["muon", "adam"])
def test_every_parameter_is_in_one_group_with_the_learning_rate_of_its_kind(optimizer, tied):
    args = tiny_args(num_layers=4, value_embeddings=2, optimizer=optimizer, tied_head=tied,
                     bigram_rows=97, muon_momentum=0.9, muon_nesterov=False, weight_decay=0.3,
                     **LRS)
    model = build(args)
    found = groups_of(model, args)
    assert set(found) == {name for name, _ in model.named_parameters()}
    for name, (holder, group) in found.items():
        assert group["lr"] == group["initial_lr"] == expected_lr(name, tied), name
        assert group["weight_decay"] == 0.3
        is_muon = optimizer == "muon" and expected_lr(name, tied) == 0.01
        assert isinstance(holder, Muon if is_muon else Adam), name
        if is_muon:
            assert (group["momentum"], group["nesterov"]) == (0.9, False)
            assert group["iteration"] == "polar-express"
        else:
            assert (group["betas"], group["eps"]) == ((0.8, 0.95), 1e-10)


def test_only_embedding_tables_have_moments_of_rows():
    args = tiny_args(row_moments=True, bigram_rows=97, value_embeddings=1, output_mixing=True)
    rows = {name for name, (_, group) in groups_of(build(args), args).items()
            if group.get("row_moments")}
    assert rows == {"embed.weight", "bigram_embed.weight", "value_embeds.0.weight"}


def test_building_the_optimizers_changes_no_weight():
    args = tiny_args(num_layers=3)
    model, untouched = build(args), build(args)
    build_optimizers(model, args)
    for a, b in zip(model.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(a, b)


class Extended(GPT):
    """A model with a parameter that forward does not use."""

    def reset_parameters(self):
        super().reset_parameters()
        self.unused = torch.nn.Parameter(torch.ones(3))


def test_a_parameter_that_forward_does_not_use_is_named_before_anything_is_hidden():
    args = tiny_args()
    model = Extended(args)
    optimizers = build_optimizers(model, args)
    with pytest.raises(RunError, match="parameter unused got no gradient"):
        train_step(model, optimizers, [random_batch(args, rows=8)], 0, args, ONE_RANK)


def test_an_added_parameter_is_optimised_too():
    class Scaled(Extended):
        def forward(self, *args):
            return super().forward(*args) * self.unused.mean()

    args = tiny_args(**LRS)
    model = Scaled(args)
    assert groups_of(model, args)["unused"][1]["lr"] == 0.04
    train_step(model, build_optimizers(model, args), [random_batch(args, rows=8)], 0, args,
               ONE_RANK)
    assert (model.unused != 1).all()


# -----------------------------------------------------------------------------
# The same training on any number of ranks, in any micro-batches


OPTIMIZERS = {
    "muon": dict(optimizer="muon"),
    "adam": dict(optimizer="adam"),
    "normuon": dict(optimizer="muon", muon_beta2=0.9, key_offset=True, bigram_rows=31,
                    bigram_lr=0.05, batch_stages="512,1024", tokens_ahead=3,
                    train_steps=3),
    "rows": dict(bigram_rows=31, row_moments=True),
    "clipped": dict(grad_clip=0.01),
    "hidden tokens": dict(masked_share=0.1, vocab_size=254),
    "untied late": dict(tied_head=True, untie_frac=0.5, activation="swiglu", bias=True),
}


def training_args(**overrides):
    """3 layers and 253 tokens: neither matrices nor numbers can be shared out evenly."""
    settings = dict(num_layers=3, vocab_size=253, model_dim=20, num_heads=1, mlp_ratio=3,
                    document_masking=False, zero_init_projections=False, window_start=32,
                    window_end=32, weight_decay=0.1, device_batch_size=64, **LRS)
    return tiny_args(**settings | overrides)


def train_on(ranks, args, shard, gathers=False):
    """Losses, and the model and the optimizers after training on a shard.

    If it `gathers`, then after each step, as for validations.
    """
    torch.manual_seed(7)
    model = GPT(args)
    optimizers = build_optimizers(model, args, ranks.rank, ranks.world_size)
    losses = []
    for step, (batches, exchanges) in enumerate(train_batches([shard], args, ranks)):
        losses.append(train_step(model, optimizers, batches, step, args, ranks,
                                 exchanges=exchanges))
        for optimizer in optimizers if gathers else []:
            optimizer.gather()
    assert len(losses) == args.train_steps
    return torch.stack(losses), model, optimizers


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def train_steps(ranks, args, shard):
    """Losses and weights after training on a shard."""
    losses, model, optimizers = train_on(ranks, args, shard)
    for optimizer in optimizers:
        optimizer.gather()
    return losses, weights_of(model)


@pytest.fixture(scope="session")
def shard(tmp_path_factory):
    """Four steps of 512 tokens."""
    path = tmp_path_factory.mktemp("shards") / "tokens_train_1.bin"
    return write_tokens(path, random_tokens(5, 4 * 512 + 1, vocab_size=253))


@pytest.fixture(scope="session")
def on_one_rank(shard):
    torch.manual_seed(0)
    return {name: train_steps(ONE_RANK, training_args(**settings), shard)
            for name, settings in OPTIMIZERS.items()}


def assert_same_training(got, expected):
    torch.testing.assert_close(got[0], expected[0], atol=1e-5, rtol=1e-5)
    for name, weight in expected[1].items():
        torch.testing.assert_close(got[1][name], weight, atol=2e-5, rtol=1e-4, msg=name)


def train_all(ranks, shard):
    return [train_steps(ranks, training_args(**settings), shard)
            for settings in OPTIMIZERS.values()]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_train_as_one(shard, on_one_rank, tmp_path, world_size):
    results = run_ranks(train_all, world_size, tmp_path / "ranks", shard)
    for rank in results:
        for got, same, expected in zip(rank, results[0], on_one_rank.values(), strict=True):
            assert_same_training(got, expected)
            for name, weight in got[1].items():
                assert torch.equal(weight, same[1][name]), f"ranks differ in {name}"


@pytest.mark.parametrize("num_rows", [10, 12])
def test_what_ranks_ask_for_is_what_its_owners_are_asked_for(num_rows):
    looked_up = [torch.tensor(rows) for rows in ([[7, 0], [7, 3]], [[9, 8], [4, 7]], [[2, 2]])]
    plans = [train_gpt.plan_exchange(num_rows, looked_up, Ranks(rank, 3, CPU)) for rank in range(3)]
    asked = [plan.theirs.split(plan.asked) for plan in plans]
    for rank, plan in enumerate(plans):
        found = plan.mine.split(plan.counts)
        for owner in range(3):
            used = sorted({row for row in looked_up[rank].flatten().tolist() if row % 3 == owner})
            expected = [] if owner == rank else used
            assert found[owner].tolist() == expected
            assert [3 * i + owner for i in asked[owner][rank].tolist()] == expected


def what_a_step_sends(ranks, shard):
    """The exchanges of a step (rows received, rows sent, width), the numbers of weights that it
    gathers, and this rank's tokens.
    """
    args = training_args(bigram_rows=997, value_embeddings=1, num_heads=1, num_kv_heads=1,
                         attention_dim=24, batch_size=128, device_batch_size=64, train_steps=2)
    model = build(args)
    optimizers = build_optimizers(model, args, ranks.rank, ranks.world_size)
    exchanged, gathered = [], []
    exchange, gather = torch.distributed.all_to_all_single, train_gpt.all_gather

    def noted_exchange(output, input, *arguments, **options):
        exchanged.append([len(output), len(input), output.size(1)])
        return exchange(output, input, *arguments, **options)

    def noted_gather(whole, *arguments):
        gathered.append(whole.numel())
        return gather(whole, *arguments)

    torch.distributed.all_to_all_single, train_gpt.all_gather = noted_exchange, noted_gather
    batches, exchanges = next(train_batches([shard], args, ranks))
    train_step(model, optimizers, batches, 0, args, ranks, exchanges=exchanges)
    return torch.tensor(exchanged), gathered, batches[0].inputs_BT.flatten()


def test_of_tables_a_step_sends_only_the_rows_that_it_looks_up(shard, tmp_path):
    results = run_ranks(what_a_step_sends, 2, tmp_path / "ranks", shard)
    wanted = []
    for rank, (_, _, tokens) in enumerate(results):
        before = torch.cat([tokens[:1], tokens[:-1]])
        pairs = (36_313 * tokens.long() ^ 27_191 * before.long()) % 997
        wanted.append([len(set(rows[rows % 2 != rank].tolist())) for rows in (tokens, pairs)])
    assert wanted[0] != wanted[1]
    for rank, (exchanged, gathered, _) in enumerate(results):
        (tokens, pairs), (tokens_sent, pairs_sent) = wanted[rank], wanted[1 - rank]
        # The embedding and a value table, of 24 dimensions, at once.
        fetched = [[tokens, tokens_sent, 20 + 24], [pairs, pairs_sent, 20]]
        summed = [[sent, received, width] for received, sent, width in fetched]
        assert sorted(exchanged[:2].tolist()) == sorted(fetched)
        assert sorted(exchanged[2:].tolist()) == sorted(summed)
        # The head is as large as the embedding, and smaller than the other tables.
        assert max(gathered) == 253 * 20 and gathered.count(253 * 20) == 1


def train_in_16_bits(ranks, shard):
    """Losses, the weights that this rank computes with, and those that it gathers at the end."""
    args = training_args(bigram_rows=31, dtype="bfloat16")
    losses, model, optimizers = train_on(ranks, args, shard)
    used = weights_of(model)
    for optimizer in optimizers:
        optimizer.gather()
    return losses, used, weights_of(model)


def test_ranks_send_what_products_round_to_and_keep_all_bits_of_what_they_own(shard, tmp_path):
    (losses, used, whole), (same, others, gathered) = run_ranks(
        train_in_16_bits, 2, tmp_path / "ranks", shard)
    expected, _, alone = train_in_16_bits(ONE_RANK, shard)
    assert torch.equal(losses, same)
    torch.testing.assert_close(losses, expected, atol=0.02, rtol=0)
    for name, weight in whole.items():
        assert torch.equal(weight, gathered[name]), name
        assert (weight - alone[name]).norm() < 0.1 * alone[name].norm(), name
        if weight.ndim > 1 and "embed" not in name:
            assert torch.equal(used[name].bfloat16(), others[name].bfloat16()), name
        else:
            assert "embed" in name or torch.equal(used[name], others[name]), name
    # Of three layers the first rank owns the second, with the padding; what others own is rounded.
    is_exact = [torch.equal(used[f"blocks.{i}.mlp.up"], whole[f"blocks.{i}.mlp.up"])
                for i in range(3)]
    assert is_exact == [True, True, False]
    rounded = whole["blocks.2.mlp.up"].bfloat16().float()
    assert torch.equal(used["blocks.2.mlp.up"], rounded)


IN_16_BITS = [dict(residual_dtype="bfloat16"), dict(residual_dtype="float32", tied_head=True),
              dict(residual_dtype="bfloat16", learned_positions=True)]


def losses_without_and_with_gathering(ranks, shard):
    args = [training_args(dtype="bfloat16", bigram_rows=31, **some) for some in IN_16_BITS]
    return [[train_on(ranks, some, shard, gathers)[0] for gathers in (False, True)]
            for some in args]


def test_what_is_gathered_for_a_validation_does_not_change_the_training(shard, tmp_path):
    for found in run_ranks(losses_without_and_with_gathering, 2, tmp_path / "ranks", shard):
        for settings, (without, gathered) in zip(IN_16_BITS, found, strict=True):
            assert torch.equal(without, gathered), settings


def test_the_sizes_of_these_tests_do_not_share_out_evenly():
    args = training_args()
    uneven = [sum(p.numel() if p.ndim < 2 or "embed" in name else len(p.view(-1, *p.shape[-2:]))
                  for name, p in zip(group["param_names"], group["params"], strict=True))
              for optimizer in build_optimizers(build(args), args)
              for group in optimizer.param_groups]
    assert any(units % 2 for units in uneven)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("device_batch_size", [128, 512])
def test_the_micro_batch_size_does_not_change_the_training(
    shard, on_one_rank, device_batch_size, optimizer
):
    args = training_args(**OPTIMIZERS[optimizer], device_batch_size=device_batch_size)
    assert_same_training(train_steps(ONE_RANK, args, shard), on_one_rank[optimizer])


@pytest.mark.parametrize("limit", [0.01, 1e9])
def test_a_clipped_gradient_is_torchs(limit):
    args = tiny_args(optimizer="adam", grad_clip=limit)
    model, batch = build(args), random_batch(args, rows=8)
    (model(batch, (0, 0)) / args.batch_size).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    expected = [p.grad.clone() for p in model.parameters()]
    norm = torch.stack([grad.norm() for grad in expected]).norm()
    assert norm == pytest.approx(limit, rel=1e-3) if limit == 0.01 else norm > 0.02
    for p in model.parameters():
        p.grad = None
    optimizers, seen = build_optimizers(model, args), []
    for optimizer in optimizers:
        optimizer.update = lambda p, grad, state, group: seen.append(
            (grad * group["grad_scale"]).square().sum())
    train_step(model, optimizers, [batch], 0, args, ONE_RANK)
    assert sum(seen).sqrt() == pytest.approx(norm.item(), rel=1e-3)


def test_a_tied_head_goes_its_own_way_from_its_step_on():
    args = tiny_args(tied_head=True, untie_frac=0.5, train_steps=4)
    model = build(args, awake=False)
    optimizers, equal = build_optimizers(model, args), []
    tied = build(tiny_args(tied_head=True, train_steps=4), awake=False)
    tied.load_state_dict({name: weight for name, weight in model.state_dict().items()
                          if name != "head"})
    tied_optimizers = build_optimizers(tied, tied.args)
    for step in range(4):
        batch = random_batch(args, rows=8, seed=step)
        train_step(model, optimizers, [batch], step, args, ONE_RANK)
        train_step(tied, tied_optimizers, [batch], step, tied.args, ONE_RANK)
        equal.append((torch.equal(model.head, model.embed.weight),
                      torch.allclose(model.embed.weight, tied.embed.weight, atol=1e-5)))
    assert equal == [(True, True)] * 2 + [(False, False)] * 2


def test_a_step_reports_the_mean_loss_and_takes_the_gradient_of_it():
    args = tiny_args(optimizer="adam")
    model = build(args)
    parts = [random_batch(args, rows=4, seed=seed) for seed in (1, 2)]
    losses = [model(part, (0, 0)) for part in parts]
    mean = sum(losses) / args.batch_size
    gradients = torch.autograd.grad(mean, list(model.parameters()))
    seen = []

    class Recorder:
        param_groups, reductions = [dict(initial_lr=1.0)], []

        def fetch(self, exchanges):
            pass

        def reduce(self):
            scale = self.param_groups[0]["grad_scale"]
            seen.extend(scale * p.grad for p in model.parameters())

        def update_shares(self):
            return []

        def zero_grad(self, set_to_none):
            model.zero_grad(set_to_none)

    loss = train_step(model, [Recorder()], parts, 0, args, ONE_RANK)
    assert loss.item() == pytest.approx(mean.item(), rel=1e-6)
    for got, expected in zip(seen, gradients, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-7, rtol=1e-4)
    assert all(p.grad is None for p in model.parameters())


def test_tokens_further_ahead_move_the_weights_early_and_not_late():
    """Adam's first step has the size of the rate, so that only its direction can differ."""
    moved = {}
    for count in (1, 3):
        for step in (0, 9):
            args = tiny_args(optimizer="adam", tokens_ahead=count, train_steps=10, **LRS)
            model, batch = build(args), random_batch(args, rows=8)
            loss = train_step(model, build_optimizers(model, args), [batch], step, args, ONE_RANK)
            moved[count, step] = loss, model.blocks[0].mlp.up.detach().clone()
    for step in (0, 9):
        assert moved[1, step][0] == moved[3, step][0]  # the loss is that of the next token
    assert not torch.allclose(moved[1, 0][1], moved[3, 0][1], atol=1e-4)
    assert torch.allclose(moved[1, 9][1], moved[3, 9][1], atol=1e-6)


def test_training_lowers_the_loss():
    args = tiny_args(train_steps=12, embed_lr=0.1, matrix_lr=0.02)
    model, batch = build(args, awake=False), random_batch(args, rows=8)
    optimizers = build_optimizers(model, args)
    losses = [train_step(model, optimizers, [batch], step, args, ONE_RANK).item()
              for step in range(12)]
    assert losses[-1] < 0.7 * losses[0]


def test_a_step_uses_the_schedule_of_its_number():
    args = tiny_args(train_steps=10, warmup_frac=0.5, cooldown_frac=0.0, optimizer="muon", **LRS)
    model = build(args)
    optimizers = build_optimizers(model, args)
    train_step(model, optimizers, [random_batch(args, rows=8)], 1, args, ONE_RANK)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(0.4 * group["initial_lr"])
    assert optimizers[0].param_groups[0]["momentum"] == pytest.approx(
        train_gpt.muon_momentum(1, dataclasses.replace(args)))
