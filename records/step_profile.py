"""Profile a training step of each batch stage: what takes the time, and how far from its limit.

    python records/step_profile.py [any option of train_gpt.py] [--out FILE.md] [--trace FILE.json]
    torchrun --standalone --nproc_per_node=2 records/step_profile.py [the same]     # of rank 0

In the middle of the steps of each size, one runs with its windows and learning rates: first timed
without the profiler, then profiled. The kernels of the profile are summed by part of the step, and
each part is set against a limit: arithmetic at the rate of a large matrix product, or each tensor
moved once at the memory's bandwidth. What no rule knows is listed as "other". CUDA graphs are timed
as such, and profiled kernel by kernel. Without a GPU the operators' own times stand in for kernels,
and there are no limits. Between ranks, communication goes on beside the rest; what of it nothing
else runs beside has a line of its own.

Of operators other than Inductor's the trace has no results, so that their limit is too low. A limit
of tensors that is beaten is wrong, as when a kernel reads only a part of a large tensor.
8-bit floats can beat the limit of matrix products, which is one of 16 bits.
"""

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

import step_trace
import torch
import torch.distributed as dist
from step_trace import BLOCKS, HEAD, RANGE, Kernel, Limits, Sizes, part_of
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_gpt  # noqa: E402  needs the path above
from train_gpt import Hyperparameters, MicroBatch, Ranks, RunError  # noqa: E402

UNTIMED, PROFILED, LISTED = 5, 2, 25  # steps, steps, kernels

# -----------------------------------------------------------------------------
# FLOPs and tables


def attention_pairs(cu_seqlens: Tensor, window: int) -> int:
    """Pairs of a query and a key that it sees: itself and `window` before it (0: no limit)."""
    length = cu_seqlens.long().diff()
    full = length.clamp(max=window + 1) if window else length
    return int((full * (full + 1) // 2 + (length - full) * (window + 1)).sum())


def attention_flops(model: train_gpt.GPT, batches: list[MicroBatch], windows) -> float:
    """FLOPs of attention in a step, the backward pass being 2.5 times the forward."""
    pairs = [sum(attention_pairs(batch.cu_seqlens.cpu(), window) for batch in batches)
             for window in windows]
    width = model.args.attention_width
    return 3.5 * 4 * width * sum(pairs[block.is_long] for block in model.blocks)


def matrix_rate(device: torch.device, size: int = 8192, times: int = 100) -> float:
    """FLOP/s of a bfloat16 product of random square matrices."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    for _ in range(2):  # the first time to warm up
        clock = train_gpt.Clock(device)
        clock.start()
        for _ in range(times):
            torch.mm(a, b, out=out)
        clock.stop()
    return times * 2 * size**3 / clock.seconds


def part_table(
    kernels: list[Kernel], sizes: Sizes, steps: int, step_ms: float, limits: Limits | None,
    flops: dict[str, float],
) -> str:
    """Parts of a step. `flops` per step are of the parts where they are known.

    `kernels` are of so many steps, and `step_ms` is the time of one. Kernels of different parts may
    overlap; what none of them fills is idle.
    """
    parts = defaultdict(list)
    for kernel in kernels:
        parts[part_of(kernel, sizes)].append(kernel)
    lines = ["| part | ms | share | limit, ms | reached | the limit |",
             "| --- | ---: | ---: | ---: | ---: | --- |"]
    for part in dict.fromkeys([*step_trace.PARTS, *parts]):
        if ms := sum(kernel.time for kernel in parts[part]) / steps / 1000:
            limit = "- | - | -"
            if limits and part in flops:
                bound = 1000 * flops[part] / limits.flops
                limit = f"{bound:.3f} | {bound / ms:.0%} | {flops[part] / 1e12:.3f} TFLOP"
            elif limits:
                limit = tensor_limit(parts[part], sizes, steps, limits)
            lines.append(f"| {part} | {ms:.3f} | {ms / step_ms:.1%} | {limit} |")
    exposed, idle = unhidden(kernels, sizes, steps, step_ms)
    if parts[step_trace.COMMUNICATION]:
        lines.append(f"| communication alone | {exposed:.3f} | {exposed / step_ms:.1%} "
                     "| - | - | - |")
    lines += [f"| idle | {idle:.3f} | {idle / step_ms:.1%} | - | - | - |",
              f"| a step | {step_ms:.3f} | 100.0% | - | - | - |"]
    return "\n".join(lines)


def unhidden(
    kernels: list[Kernel], sizes: Sizes, steps: int, step_ms: float
) -> tuple[float, float]:
    """Milliseconds of a step in which only communication runs, and in which nothing does."""
    others = [k for k in kernels if part_of(k, sizes) != step_trace.COMMUNICATION]
    busy, without = (step_trace.busy_time(some) / steps / 1000 for some in (kernels, others))
    return busy - without, max(0, step_ms - busy)


def tensor_limit(kernels: list[Kernel], sizes: Sizes, steps: int, limits: Limits) -> str:
    """The last three cells of a part, over those of its kernels whose tensors are in the trace."""
    # Each operator once, however many kernels it launches.
    known = {id(kernel.launcher): kernel for kernel in kernels if limits.seconds(kernel, sizes)}
    time = sum(kernel.time for kernel in kernels if id(kernel.launcher) in known)
    if not time:
        return "- | - | -"
    bound, moving = (1e6 * sum(some.seconds(kernel, sizes) for kernel in known.values())
                     for some in (limits, limits._replace(flops=float("inf"))))
    if moving > 1.05 * time:
        return f"- | - | wrong, at {moving / time:.0%} of it: not all tensors counted were moved"
    share = time / sum(kernel.time for kernel in kernels)
    return f"{bound / steps / 1000:.3f} | {bound / time:.0%} | tensors of {share:.0%} of the time"


def kernel_table(kernels: list[Kernel], sizes: Sizes, steps: int) -> str:
    """The kernels that take most, matrix products by shape too, and those that no rule knows."""
    times = defaultdict(list)
    for kernel in kernels:
        name, op = kernel.name, kernel.launcher
        if op and step_trace.MATRIX_OP.fullmatch(op.name):
            name = " ".join("x".join(map(str, shape)) for shape in op.shapes[:3]) + f" {name}"
        times[part_of(kernel, sizes), name[:90]].append(kernel.time)
    ranked = sorted(times.items(), key=lambda item: -sum(item[1]))
    lines = ["| ms | calls | part | kernel |", "| ---: | ---: | --- | --- |"]
    lines += [f"| {sum(some) / steps / 1000:.3f} | {len(some) / steps:g} | {part} | `{name}` |"
              for (part, name), some in ranked[:LISTED]]
    if unknown := [f"`{name}`" for (part, name), _ in ranked if part == step_trace.OTHER]:
        lines += ["", f"Not classified: {', '.join(unknown[:LISTED])}"]
    return "\n".join(lines)


# -----------------------------------------------------------------------------
# Running steps


class Trainer(NamedTuple):
    """What train_gpt.train makes before its first step."""

    args: Hyperparameters
    ranks: Ranks
    notes: list[str]  # what of it is not as the options say, for a person
    model: train_gpt.GPT
    compiled: Callable
    optimizers: list[train_gpt.ShardedOptimizer]  # their steps are named ranges of the profile


def build(args: Hyperparameters) -> Trainer:
    """RunError where a person has to act."""
    ranks = train_gpt.join_ranks()
    args, notes = train_gpt.switch_off(args, ranks.device)
    if args.samples_vocabulary and args.sampled_vocab == args.device_batch_size:
        raise RunError(f"--sampled_vocab and --device_batch_size are both {args.sampled_vocab}, "
                       f"but parts of a step are told apart by such sizes; change one of them")
    train_gpt.check_accumulation(args, ranks.world_size)
    name, attention = train_gpt.choose_attention(args, ranks.device)
    torch.manual_seed(args.seed)
    model = train_gpt.GPT(args, attention).to(ranks.device)
    optimizers = train_gpt.build_optimizers(model, args, ranks.rank, ranks.world_size)
    compiled = train_gpt.compile_model(model) if args.compile else model
    if args.kernel_warmup:
        train_gpt.warm_up(model, compiled, optimizers, args, ranks)
    for optimizer in optimizers:
        named = torch.profiler.record_function(f"{RANGE}{type(optimizer).__name__}")
        optimizer.fetch, optimizer.reduce, optimizer.update_shares = map(
            named, (optimizer.fetch, optimizer.reduce, optimizer.update_shares))
    return Trainer(args, ranks, [f"attention {name}", *notes], model, compiled, optimizers)


def middle_steps(args: Hyperparameters) -> dict[int, int]:
    """Of each size of a step, in tokens, the step in the middle of those that have it."""
    steps = defaultdict(list)
    for step in range(args.train_steps):
        steps[args.batch_size_at(step)].append(step)
    return {size: some[len(some) // 2] for size, some in steps.items()}


def made_up_batch(args: Hyperparameters) -> MicroBatch:
    """Random tokens, rare and frequent, in sequences as long as those of web pages."""
    batch = train_gpt.random_micro_batch(args, args.device_batch_size, True)
    random = torch.Generator().manual_seed(args.seed)
    uniform = torch.rand((2, *batch.inputs_BT.shape), generator=random)
    inputs, targets = (args.vocab_size**uniform - 1).int()
    batch = batch._replace(inputs_BT=inputs, targets_BT=targets)
    if batch.whole_rows:
        return batch
    lengths = (400 * torch.randn(args.device_batch_size // 16, generator=random).exp()).int()
    ends = lengths.clamp(16, batch.max_length).cumsum(0)
    rows = torch.arange(0, args.device_batch_size + 1, args.row_length)
    ends = torch.cat([ends[ends < args.device_batch_size], rows])
    return batch._replace(cu_seqlens=ends.unique().int())


def stage_batches(
    args: Hyperparameters, ranks: Ranks, size: int, count: int
) -> tuple[list[tuple[list[MicroBatch], dict]], str]:
    """The micro-batches and exchanges of `count` steps of `size` tokens, and what they hold, for a
    person.
    """
    shards, _ = train_gpt.find_shards(train_gpt.data_folder(args))
    stage = dataclasses.replace(args, batch_size=size, batch_stages="")
    real = list(islice(train_gpt.train_batches(shards[:1], stage, ranks), count) if shards else ())
    if real:
        return [real[i % len(real)] for i in range(count)], f"documents of {shards[0].name}"
    batch = made_up_batch(args)
    exchanges = train_gpt.plan_exchanges([batch] * ranks.world_size, args, ranks)
    micro_batches = [batch.to(ranks.device)] * (size // args.device_batch_size // ranks.world_size)
    return ([(micro_batches, exchanges)] * count,
            f"random tokens for want of shards in {args.data_path}")


def time_steps(run_step: Callable, batches: list, device: torch.device) -> tuple[list[float], int]:
    """Milliseconds of each step, queued without waiting as in training, and graphs compiled."""
    clock = train_gpt.Clock(device)
    clock.start()
    stamps = [clock.stamp()]
    for step_batches in batches:
        run_step(step_batches)
        stamps.append(clock.stamp())
    ends = [1000 * clock.at(stamp) for stamp in stamps]
    clock.stop()
    return [end - start for start, end in pairwise(ends)], clock.recompilations


def queue_time(run_step: Callable, step_batches, device: torch.device) -> float:
    """Milliseconds that the CPU takes to queue a step for a GPU that has nothing else to do.

    If it is about as long as the step, the GPU waits for the CPU.
    """
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    run_step(step_batches)
    took = time.perf_counter() - start
    torch.cuda.synchronize(device)
    return 1000 * took


def profile_steps(
    run_step: Callable, batches: list, device: torch.device, path: Path, as_queued: bool = False
) -> None:
    """Write the trace of all steps but the first, which warms the profiler up.

    If `as_queued`, the trace is of the GPU alone, which slows the CPU little, and no step waits for
    the one before, so that ranks wait for each other no longer than without the profiler.
    """
    profiler = torch.profiler
    phases = profiler.schedule(wait=0, warmup=1, active=len(batches) - 1, repeat=1)
    with profiler.profile(activities=[profiler.ProfilerActivity.CUDA] if as_queued else None,
                          record_shapes=not as_queued, schedule=phases,
                          on_trace_ready=lambda p: p.export_chrome_trace(str(path))) as profile:
        for step_batches in batches:
            run_step(step_batches)
            if device.type == "cuda" and not as_queued:
                torch.cuda.synchronize(device)
            profile.step()


def profile_stage(
    trainer: Trainer, size: int, step: int, own: argparse.Namespace, trace: Path
) -> Iterator[str]:
    """The report of one stage, paragraph by paragraph, each as soon as it is known."""
    args, device, model = trainer.args, trainer.ranks.device, trainer.model
    on_gpu, windows = device.type == "cuda", train_gpt.attention_windows(step, args)
    batches, data = stage_batches(args, trainer.ranks, size, UNTIMED + own.steps + 2 + PROFILED)
    yield (f"## {size:,} tokens per step\n\nStep {step} of {args.train_steps:,}; windows of "
           f"{windows[0]} and {windows[1]} tokens; micro-batches: {len(batches[0][0])}; {data}.")

    recorded = None
    if args.cuda_graphs:
        most = max(len(batch.cu_seqlens) - 1 for some, _ in batches for batch in some)
        recorded = train_gpt.Recorded(trainer.compiled, trainer.optimizers, args, device, most)

    def run_step(batch, recorded=recorded):
        micro_batches, exchanges = batch
        train_gpt.train_step(trainer.compiled, trainer.optimizers, micro_batches, step, args,
                             trainer.ranks, recorded, exchanges)

    if on_gpu:
        torch.cuda.empty_cache()  # what was reserved for the warm-up is not this stage's
        torch.cuda.reset_peak_memory_stats(device)
    for step_batches in batches[:UNTIMED]:
        run_step(step_batches)
    timed, (queued, *profiled) = batches[UNTIMED:][: own.steps], batches[UNTIMED + own.steps :]
    times, compiled = time_steps(run_step, timed, device)
    ms, memory = statistics.median(times), train_gpt.peak_memory(device)
    yield (f"{ms:.3f} ms is the median of {own.steps} steps of {min(times):.3f} to "
           f"{max(times):.3f} ms, in which {compiled} graphs were compiled.")

    if on_gpu:
        yield f"The CPU queues a step in {queue_time(run_step, queued, device):.1f} ms."
    sizes = Sizes(args.vocab_size, args.model_dim, args.bigram_rows, args.device_batch_size,
                  args.sampled_vocab if args.samples_vocabulary else 0)
    if recorded:
        graphs_trace = trace.with_stem(f"{trace.stem}-graphs")
        profile_steps(run_step, [timed[0], *timed], device, graphs_trace, as_queued=True)
        kernels = step_trace.read_trace(graphs_trace, on_gpu)
        exposed, idle = unhidden(kernels, sizes, len(timed), ms)
        yield (f"As CUDA graphs, of a step only communication runs for {exposed:.3f} ms, and "
               f"nothing for {idle:.3f} ms. What follows ran kernel by kernel, because of a "
               "graph's kernels no operator is known.")
    profile_steps(partial(run_step, recorded=None), profiled, device, trace)
    if not (kernels := step_trace.read_trace(trace, on_gpu)):
        yield "The profiler saw nothing run; another profiler may be at work on this machine."
        return
    limits = Limits(own.rate * 1e12, own.bandwidth * 1e12) if on_gpu else None
    head = (sizes.sampled_vocab or args.vocab_size) * args.model_dim
    blocks = model.matrix_weights
    attention = [attention_flops(model, some, windows) for some, _ in profiled[-PROFILED:]]
    share = size / trainer.ranks.world_size
    flops = {BLOCKS: 6 * blocks * share, HEAD: 6 * head * share,
             step_trace.ATTENTION: statistics.fmean(attention)}
    # The profiler slows a CPU's own work; a GPU's kernels take as long as without it.
    span = (max(k.end for k in kernels) - min(k.start for k in kernels)) / PROFILED / 1000
    yield part_table(kernels, sizes, PROFILED, ms if on_gpu else span, limits, flops)
    yield kernel_table(kernels, sizes, PROFILED)
    rate = (flops[BLOCKS] + flops[HEAD]) / ms / 1e9
    reached = f", {rate / own.rate:.1%} of {own.rate:g}" if on_gpu else ""
    yield (f"Model: {rate:.4g} TFLOP/s{reached} on each rank (6 x {blocks + head:,} active weights "
           f"x tokens / time); {1000 * size / ms:,.0f} tokens/s; peak memory {memory}.")


def profile_all(args: Hyperparameters, own: argparse.Namespace) -> Iterator[str]:
    """The report of all stages, paragraph by paragraph. RunError where a person has to act."""
    trainer = build(args)
    device, stages = trainer.ranks.device, middle_steps(args)
    on_gpu = device.type == "cuda"
    machine = torch.cuda.get_device_name(device) if on_gpu else "CPU"
    world_size = trainer.ranks.world_size
    yield (f"# Profile of a training step\n\n{world_size} x {machine}, torch {torch.__version__}; "
           f"recipe {args.recipe}; {'; '.join(trainer.notes)}.")
    if on_gpu:
        yield (f"Limits: {own.rate:g} TFLOP/s (here a product of 8192 x 8192 reaches "
               f"{matrix_rate(device) / 1e12:.0f}) and {own.bandwidth:g} TB/s.")
    with tempfile.TemporaryDirectory() as folder:
        for size, step in stages.items():
            is_kept = own.trace and trainer.ranks.rank == 0
            trace = own.trace if is_kept else Path(folder) / "trace.json"
            if len(stages) > 1:
                trace = trace.with_stem(f"{trace.stem}-{size}")
            yield from profile_stage(trainer, size, step, own, trace)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="step_profile.py [any option of train_gpt.py] [options]", allow_abbrev=False)
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="write the report there too")
    parser.add_argument("--trace", type=Path, metavar="FILE.json",
                        help="keep the trace, for chrome://tracing; one for each size of step, and "
                             "one more of its CUDA graphs")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="timed steps; default 5")
    parser.add_argument("--rate", type=float, default=782.0, metavar="TFLOP/S",
                        help="of a large bfloat16 matrix product; default 782, an H200's")
    parser.add_argument("--bandwidth", type=float, default=4.3, metavar="TB/S",
                        help="of the memory; default 4.3, an H200's")
    own, rest = parser.parse_known_args(argv)
    for name in ("steps", "rate", "bandwidth"):
        if not getattr(own, name) > 0:
            parser.error(f"--{name} must be positive")
    for path in (own.out, own.trace):
        if path and not path.resolve().parent.is_dir():
            parser.error(f"there is no folder {path.resolve().parent}")
    args, paragraphs = train_gpt.parse_hyperparameters(rest), []
    try:
        for paragraph in profile_all(args, own):
            if os.environ.get("RANK", "0") != "0":
                continue
            print(paragraph, end="\n\n", flush=True)
            paragraphs.append(paragraph)
            if own.out:
                own.out.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
    except (RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
