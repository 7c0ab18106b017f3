"""records/step_trace.py and step_profile.py: kernels to parts and limits, and a run on a CPU."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, random_documents, tiny_args, write_shard

import train_gpt

sys.path.insert(0, str(ROOT / "records"))

import step_profile  # noqa: E402  needs the path above
from step_trace import Limits, Sizes, busy_time, part_of, read_trace  # noqa: E402

V, D, CHUNK = 50_257, 768, 8_192
SIZES = Sizes(V, D, bigram_rows=251_520, tokens=65_536)
BF16, FLOAT = "c10::BFloat16", "float"


class Trace:
    """A trace as torch.profiler writes it, made up call by call. Times are microseconds."""

    def __init__(self):
        self.events, self.now, self.gpu = [], 100.0, 0.0

    def add(self, category, name, start, duration, thread=1, **args):
        self.events.append(dict(ph="X", cat=category, name=name, pid=7, tid=thread, ts=start,
                                dur=duration, args=args))

    def cpu(self, *names, inputs=(), strides=None, launches=None, gpu_start=None, duration=1.0,
            link=True, category="kernel", thread=1, **extra):
        """Nested operators, the last with `inputs` [(shape, dtype)], that launch a kernel."""
        start = self.now
        self.now += 10 * len(names) + 10
        for depth, name in enumerate(names):
            innermost = depth == len(names) - 1
            args = {"External id": len(self.events) + 1000}
            if innermost and inputs:
                args["Input Dims"] = [shape for shape, _ in inputs]
                args["Input type"] = [dtype for _, dtype in inputs]
                if strides:
                    args["Input Strides"] = strides
            is_range = name.startswith(("optimizer", "##"))
            self.add("user_annotation" if is_range else "cpu_op", name, start + depth,
                     10 * len(names) - 2 * depth, thread, **args)
        if launches is None:
            return
        ids = {"External id": self.events[-1]["args"]["External id"]} if names else {}
        correlation = len(self.events)
        if link:
            self.add("cuda_driver", "cuLaunchKernelEx", start + len(names), 2, thread,
                     correlation=correlation)
        start = self.gpu if gpu_start is None else gpu_start
        self.gpu = max(self.gpu, start + duration)
        self.add(category, launches, start, duration, 99, correlation=correlation, **ids, **extra)

    def read(self, folder, of_gpu=True):
        path = folder / "trace.json"
        other = [{"ph": "M", "name": "process_name", "pid": 7},
                 {"ph": "X", "cat": "gpu_user_annotation", "name": "optimizer: Muon", "pid": 0,
                  "tid": 99, "ts": 0, "dur": 1e6}]
        path.write_text(json.dumps({"traceEvents": other + self.events}))
        return read_trace(path, of_gpu)


def part_of_one(folder, *names, **call) -> str:
    trace = Trace()
    trace.cpu(*names, **call)
    [kernel] = trace.read(folder)
    return part_of(kernel, SIZES)


def bf16(*shapes):
    return [(list(shape), BF16) for shape in shapes]


GEMM = "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_NNN"
# names of the operators around the launch, the last one's inputs, the kernel, the part
CASES = {
    "block product": (["CompiledFunction", "aten::mm"], bf16((65_536, D), (D, 3_072)), GEMM,
                      "matrix products: blocks"),
    "head, padded": (["CompiledFunction", "aten::mm"], bf16((CHUNK, D), (D, 50_304)), GEMM,
                     "matrix products: head"),
    "head in float8": (["aten::_scaled_mm"], [([CHUNK, D], "c10::Float8_e4m3fn"),
                                             ([D, 50_304], "c10::Float8_e4m3fn")],
                       "cutlass::device_kernel<sm90_gemm>", "matrix products: head"),
    "head inside a loss": (["speedrun::head_cross_entropy", "aten::mm"],
                           bf16((50_304, CHUNK), (CHUNK, D)), GEMM, "matrix products: head"),
    "template": (["triton_tem_fused_mm_3"], bf16((512, D), (D, D)), "triton_tem_fused_mm_3",
                 "matrix products: blocks"),
    "split product": (["aten::mm"], bf16((D, 65_536), (65_536, D)), "splitKreduce_kernel<float>",
                      "matrix products: blocks"),
    "unknown kernel of a product": (["aten::bmm"], bf16((4, D, D), (4, D, D)), "kernel_7",
                                    "matrix products: blocks"),
    "graph with the head among its inputs": (["CompiledFunction"], [([V, D], FLOAT)], GEMM,
                                             "matrix products: blocks"),
    "flash attention": (["torch_attn::_varlen_attn", "aten::_flash_attention_forward"], [],
                        "void cutlass::device_kernel<flash::FlashAttnFwdSm90>", "attention"),
    "a fill for attention": (["aten::_flash_attention_backward", "aten::fill_"],
                             [([65_536, D], FLOAT)], "void at::native::vectorized_elementwise",
                             "attention"),
    "own loss kernel": (["speedrun::capped_cross_entropy"], bf16((CHUNK, 50_304)),
                        "_capped_log_total", "loss"),
    "loss by name": ([], [], "_fused_cross_entropy_kernel", "loss"),
    "fused logits": (["CompiledFunction", "triton_red_fused_exp_sum_4"],
                     [([CHUNK, V], FLOAT), ([CHUNK], FLOAT)], "triton_red_fused_exp_sum_4", "loss"),
    "lookup": (["CompiledFunction", "triton_per_fused__to_copy_embedding_rms_norm_0"],
               [([V, D], FLOAT), ([4, 16_384, D], BF16)],
               "triton_per_fused__to_copy_embedding_rms_norm_0", "embedding tables"),
    "summing a table's gradient": (["torch::autograd::AccumulateGrad", "aten::add_"],
                                   [([251_520, D], FLOAT)] * 2, "void at::native::add",
                                   "embedding tables"),
    "pointwise named after attention": (["triton_poi_fused__varlen_attn_backward_mul_5"],
                                        bf16((65_536, D)),
                                        "triton_poi_fused__varlen_attn_backward_mul_5",
                                        "norms and other pointwise"),
    "summing a matrix's gradient": (["torch::autograd::AccumulateGrad", "aten::add_"],
                                    [([3_072, D], FLOAT)] * 2, "void at::native::add",
                                    "norms and other pointwise"),
    "fused without its operator": (["CompiledFunction"], [([V, D], FLOAT), ([CHUNK, V], FLOAT)],
                                   "triton_red_fused_mul_sum_8", "norms and other pointwise"),
    "node of the graph": (["autograd::engine::evaluate_function: CompiledFunctionBackward"],
                          [([V, D], FLOAT)], "void at::native::reduce_kernel",
                          "norms and other pointwise"),
    "own loss kernel in a graph": (["CompiledFunction", "speedrun::capped_cross_entropy"],
                                   bf16((CHUNK, 50_304)), "_gradients", "loss"),
    "own product": (["CompiledFunction", "speedrun::relu2_linear"],
                    [([65_536, D], "c10::Float8_e4m3fn"), ([3_072, D], "c10::Float8_e4m3fn")],
                    "_relu2_linear", "matrix products: blocks"),
    "own transposition": (["speedrun::transposed"], bf16((CHUNK, D)), "_transpose",
                          "copies and fills"),
    "transposed logits": (["speedrun::transposed"], bf16((CHUNK, 50_304)), "_transpose", "loss"),
    "fused cast": (["triton_poi_fused__to_copy_t_12"], bf16((D, D)),
                   "triton_poi_fused__to_copy_t_12", "copies and fills"),
    "product in Muon": (["optimizer: Muon", "aten::baddbmm"], bf16((12, D, D)), GEMM,
                        "optimizer: Muon"),
    "table in Adam": (["optimizer: Adam", "## graph", "triton_poi_fused_add_div_0"],
                      [([4 * V * D], FLOAT)], "triton_poi_fused_add_div_0", "optimizer: Adam"),
    "another optimizer": (["optimizer: Shampoo", "aten::mm"], [], GEMM, "optimizer: Shampoo"),
    "sum that an optimizer starts": (["optimizer: Adam", "c10d::_reduce_scatter_base_"],
                                     [([V, D], FLOAT)], "ncclDevKernel_ReduceScatter_Sum_f32",
                                     "communication"),
    "custom operator": (["speedrun::mystery"], bf16((D, D)), "_mystery", "other"),
    "launched by nobody": ([], [], "_mystery", "other"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_kernel_is_known_by_its_name_its_operators_and_their_shapes(case, tmp_path):
    names, inputs, kernel, part = CASES[case]
    assert part_of_one(tmp_path, *names, inputs=inputs, launches=kernel) == part


@pytest.mark.parametrize("category, name", [("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)"),
                                            ("gpu_memset", "Memset (Device)")])
def test_copies_and_fills_of_the_gpu_count_unless_an_optimizer_made_them(tmp_path, category, name):
    assert part_of_one(tmp_path, "aten::copy_", launches=name, category=category) == (
        "copies and fills")
    assert part_of_one(tmp_path, "optimizer: Muon", "aten::cat", launches=name,
                       category=category) == "optimizer: Muon"


def test_a_kernel_whose_launch_is_missing_finds_its_operator_and_range_all_the_same(tmp_path):
    trace = Trace()
    trace.cpu("optimizer: Adam", "aten::add", launches="k", link=False)
    trace.cpu("aten::mm", inputs=bf16((CHUNK, D), (D, 50_304)), launches="k", link=False)
    assert [part_of(kernel, SIZES) for kernel in trace.read(tmp_path)] == [
        "optimizer: Adam", "matrix products: head"]


def test_operators_enclose_only_what_their_own_thread_launches_while_they_run(tmp_path):
    trace = Trace()
    trace.cpu("optimizer: Adam", launches="first")
    trace.now = 100.0  # at the same time, in the thread of the backward pass
    trace.cpu("aten::mm", inputs=bf16((64, D), (D, D)), launches="second", thread=2)
    trace.now = 200.0
    trace.cpu(launches="third")
    kernels = {kernel.name: kernel for kernel in trace.read(tmp_path)}
    stacks = {name: [op.name for op in kernel.stack] for name, kernel in kernels.items()}
    assert stacks == {"first": ["optimizer: Adam"], "second": ["aten::mm"], "third": []}


def cells(table: str, first: str) -> list[str]:
    [line] = [line for line in table.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture
def kernels(tmp_path):
    """Two steps: kernels that overlap, a gap, a product in Muon, and one that nobody knows."""
    trace = Trace()
    for start in (0, 10_000):
        trace.cpu("aten::mm", inputs=bf16((1_000, D), (D, D)), launches=GEMM, gpu_start=start,
                  duration=2_000)
        trace.cpu("triton_poi_fused_mul_1", inputs=bf16((1_000, 1_000), (1_000, 1_000)),
                  launches="triton_poi_fused_mul_1", gpu_start=start + 1_000, duration=2_000)
        trace.cpu("optimizer: Muon", "aten::baddbmm", launches=GEMM, gpu_start=start + 5_000,
                  inputs=[*bf16((2, D, 4 * D), (2, D, D), (2, D, 4 * D)), ([], "Scalar")],
                  duration=1_000)
        trace.cpu("speedrun::mystery", launches="_mystery", gpu_start=start + 5_200,
                  duration=500)
    return trace.read(tmp_path)


def test_overlapping_kernels_keep_the_gpu_busy_only_once(kernels):
    assert busy_time(kernels) == 2 * (3_000 + 1_000)
    assert busy_time(reversed(kernels)) == busy_time(kernels)


def test_communication_alone_is_what_no_other_kernel_runs_beside(tmp_path):
    trace = Trace()
    trace.cpu("aten::mm", inputs=bf16((D, D), (D, D)), launches=GEMM, gpu_start=0, duration=2_000)
    for start, duration in ((500, 1_000), (1_800, 1_200)):
        trace.cpu("c10d::reduce_", launches="ncclDevKernel_Reduce", gpu_start=start,
                  duration=duration)
    table = step_profile.part_table(trace.read(tmp_path), SIZES, 1, 4.0, None, {})
    assert cells(table, "communication")[1:3] == ["2.200", "55.0%"]
    assert cells(table, "communication alone")[1:3] == ["1.000", "25.0%"]
    assert cells(table, "idle")[1:3] == ["1.000", "25.0%"]


def test_the_table_sums_the_parts_of_a_step_and_what_is_left_is_idle(kernels):
    table = step_profile.part_table(kernels, SIZES, 2, 5.0, None, {})
    rows = {name: cells(table, name)[1:3] for name in (
        "matrix products: blocks", "norms and other pointwise", "optimizer: Muon", "other", "idle",
        "a step")}
    assert rows == {
        "matrix products: blocks": ["2.000", "40.0%"],
        "norms and other pointwise": ["2.000", "40.0%"], "optimizer: Muon": ["1.000", "20.0%"],
        "other": ["0.500", "10.0%"], "idle": ["1.000", "20.0%"], "a step": ["5.000", "100.0%"]}
    assert "| loss |" not in table
    # A profiled step can be slower than a timed one, but no time is negative.
    faster = step_profile.part_table(kernels, SIZES, 2, 3.0, None, {})
    assert cells(faster, "idle")[1] == "0.000"


def test_the_limits_are_flops_tensors_moved_once_and_products_of_the_optimizer(kernels):
    limits = Limits(flops=2e12, bandwidth=1e11)
    table = step_profile.part_table(kernels, SIZES, 2, 5.0, limits,
                                    {"matrix products: blocks": 3e9})
    assert cells(table, "matrix products: blocks")[3:5] == ["1.500", "75%"]
    moved = 2 * 1_000 * 1_000 * 2 / 1e11  # seconds
    assert cells(table, "norms and other pointwise")[3:] == [
        f"{1000 * moved:.3f}", f"{moved / 2e-3:.0%}", "tensors of 100% of the time"]
    product = 2 * 2 * D * D * 4 * D / 2e12
    assert cells(table, "optimizer: Muon")[3:5] == [
        f"{1000 * product:.3f}", f"{product / 1e-3:.0%}"]
    assert cells(table, "other")[3:] == ["-", "-", "-"]


def test_a_limit_counts_an_operator_once_and_compares_only_kernels_that_it_covers(tmp_path):
    trace = Trace()
    trace.cpu("aten::sum", inputs=[([1_000_000], FLOAT)], launches="at::native::a", duration=3)
    again = dict(trace.events[-1]["args"])
    trace.add("kernel", "at::native::b", 3, 5, 99, **again)
    trace.cpu("CompiledFunction", inputs=[([10**9], FLOAT)], launches="triton_red_fused_c",
              gpu_start=8, duration=8)
    table = step_profile.part_table(trace.read(tmp_path), SIZES, 1, 1.0, Limits(1e12, 1e12), {})
    assert cells(table, "norms and other pointwise")[1:] == [
        "0.016", "1.6%", "0.004", "50%", "tensors of 50% of the time"]


def test_a_lookup_moves_a_row_for_each_token_at_most(tmp_path):
    trace = Trace()
    name = "triton_poi_fused_embedding_0"
    trace.cpu(name, inputs=[([251_520, D], FLOAT), ([V, D], FLOAT)], launches=name)
    [kernel] = trace.read(tmp_path)
    assert Limits(1, 1).seconds(kernel, SIZES) == (65_536 + V) * D * 4


CAST, SLICE, CAT = (f"triton_poi_fused_{name}_3" for name in (
    "_to_copy_t", "clone_unbind_view", "cat"))
ZEROS, FP8 = "triton_poi_fused_zeros_3", "c10::Float8_e4m3fn"
ELEMENTWISE = "void at::native::vectorized_elementwise"
# names of the operators around the launch, the last one's inputs, the kernel, what else is known,
# the bytes that are read and written
COPIED = {
    "cast": ([CAST], [([D, D], FLOAT), ([D, D], BF16)], CAST, {}, D * D * (4 + 2)),
    "slice": ([SLICE], bf16((CHUNK, 3 * D), (CHUNK, D)), SLICE, {}, 2 * CHUNK * D * 2),
    "slice written": ([SLICE], bf16((CHUNK, D), (CHUNK, 3 * D)), SLICE, {}, 2 * CHUNK * D * 2),
    "two joined": ([CAT], bf16((CHUNK, D), (CHUNK, D), (2 * CHUNK, D)), CAT, {}, 4 * CHUNK * D * 2),
    "one fused fill": ([ZEROS], [([V, D], FLOAT)], ZEROS, {}, V * D * 4),
    "fill below a lookup's gradient": (["aten::embedding_dense_backward", "aten::fill_"],
                                       [([D, 8], FLOAT), ([], "Scalar")], ELEMENTWISE, {},
                                       D * 8 * 4),
    "copy of an expanded row": (["aten::copy_"], [([CHUNK, D], FLOAT)] * 2, ELEMENTWISE,
                                {"strides": [[D, 1], [0, 1]]}, (CHUNK + 1) * D * 4),
    "own transposition": (["speedrun::transposed"], [([CHUNK, D], FP8)], "_transpose", {},
                          2 * CHUNK * D),
    "inside the GPU": (["aten::copy_"], [([V, D], FLOAT)] * 2, "Memcpy DtoD (Device -> Device)",
                       {"category": "gpu_memcpy", "bytes": 512}, 2 * 512),
    "to the GPU": (["aten::copy_"], [([V, D], FLOAT)] * 2, "Memcpy HtoD (Pinned -> Device)",
                   {"category": "gpu_memcpy", "bytes": 512}, 512),
    "workspace of a product": (["aten::_scaled_mm"], [([CHUNK, D], FP8), ([D, V], FP8)],
                               "Memset (Device)", {"category": "gpu_memset", "bytes": 64}, 64),
    "fill of unknown size": (["aten::mm"], bf16((CHUNK, D), (D, V)), "Memset (Device)",
                             {"category": "gpu_memset"}, 0),
    "Inductor's inside another operator": (["speedrun::loss"], bf16((V, D), (CHUNK, D)), CAST, {},
                                           0),
    "a list of tensors": (["aten::cat"], [([[V, D], [V, D]], "TensorList")], "_Copy", {}, 0),
}


@pytest.mark.parametrize("case", COPIED)
def test_a_copy_or_fill_counts_what_it_moves_itself(case, tmp_path):
    names, inputs, name, known, moved = COPIED[case]
    trace = Trace()
    trace.cpu(*names, inputs=inputs, launches=name, **known)
    [kernel] = trace.read(tmp_path)
    assert Limits(1e30, 1).seconds(kernel, SIZES) == pytest.approx(moved)


@pytest.mark.parametrize("known, expected", [
    ({"bytes": 4_000_000}, ["0.004", "40%", "tensors of 100% of the time"]), ({}, ["-", "-", "-"])])
def test_a_fill_that_a_product_launches_does_not_count_the_product(tmp_path, known, expected):
    trace = Trace()
    trace.cpu("aten::_scaled_mm", inputs=[([CHUNK, D], FP8), ([D, D], FP8)], launches=GEMM,
              duration=90)
    product = dict(trace.events[-1]["args"])
    trace.add("gpu_memset", "Memset (Device)", 90, 10, 99, **product, **known)
    table = step_profile.part_table(trace.read(tmp_path), SIZES, 1, 1.0, Limits(1e14, 1e12), {})
    assert cells(table, "copies and fills")[3:] == expected
    product = 2 * CHUNK * D * D / 1e14
    assert cells(table, "matrix products: blocks")[3:5] == [
        f"{1000 * product:.3f}", f"{product / 90e-6:.0%}"]


@pytest.mark.parametrize("duration, expected", [
    (100, ["0.100", "100%", "tensors of 100% of the time"]),
    (50, ["-", "-", "wrong, at 200% of it: not all tensors counted were moved"])])
def test_a_limit_of_tensors_that_is_beaten_is_called_wrong(tmp_path, duration, expected):
    trace = Trace()
    trace.cpu("triton_poi_fused_mul_1", inputs=bf16((50_000,)), launches="triton_poi_fused_mul_1",
              duration=duration)
    table = step_profile.part_table(trace.read(tmp_path), SIZES, 1, 1.0, Limits(1e12, 1e9), {})
    assert cells(table, "norms and other pointwise")[3:] == expected


def test_the_kernels_are_listed_by_time_with_the_unknown_ones_below(kernels):
    lines = step_profile.kernel_table(kernels, SIZES, 2).splitlines()
    assert [line.split(" | ")[:3] for line in lines[2:6]] == [
        ["| 2.000", "1", "matrix products: blocks"],
        ["| 2.000", "1", "norms and other pointwise"], ["| 1.000", "1", "optimizer: Muon"],
        ["| 0.500", "1", "other"]]
    assert f"`1000x768 768x768 {GEMM}`" in lines[2]
    assert lines[-1] == "Not classified: `_mystery`"


def test_operators_of_a_cpu_have_their_own_time_without_that_of_others_inside(tmp_path):
    trace = Trace()
    trace.add("cpu_op", "aten::linear", 0, 100)
    trace.add("user_annotation", "## range", 10, 70)
    trace.add("cpu_op", "aten::mm", 20, 50)
    trace.add("cpu_op", "aten::fill_", 30, 20)
    trace.add("cpu_op", "aten::mul", 100, 5)
    found = trace.read(tmp_path, of_gpu=False)
    assert {kernel.name: kernel.time for kernel in found} == {
        "aten::linear": 50, "aten::mm": 30, "aten::fill_": 20, "aten::mul": 5}
    assert busy_time(found) == 105


# -----------------------------------------------------------------------------
# Running steps


@pytest.mark.parametrize("window", [0, 1, 3, 6, 7, 100])
def test_attention_pairs_are_those_that_a_mask_would_let_through(window):
    cu_seqlens = torch.tensor([0, 1, 8, 10, 16], dtype=torch.int32)
    expected = sum(
        1 for start, end in zip(cu_seqlens, cu_seqlens[1:], strict=False)
        for query in range(start, end) for key in range(start, query + 1)
        if not window or query - key <= window)
    assert step_profile.attention_pairs(cu_seqlens, window) == expected


def test_attention_flops_count_each_layer_with_its_own_window():
    args = tiny_args(num_layers=5, attention_dim=24)  # long windows in layers 3 and 4
    batch = train_gpt.random_micro_batch(args, 256, True)
    short, long = (step_profile.attention_pairs(batch.cu_seqlens, window) for window in (8, 32))
    flops = step_profile.attention_flops(train_gpt.GPT(args), [batch] * 2, (8, 32))
    assert flops == 14 * 24 * 2 * (3 * short + 2 * long)


def test_each_size_of_step_is_profiled_in_the_middle_of_its_stage():
    args = tiny_args(batch_stages="256,512,768", train_steps=30)
    assert step_profile.middle_steps(args) == {256: 5, 512: 15, 768: 25}
    assert step_profile.middle_steps(tiny_args(train_steps=9)) == {512: 4}
    twice = tiny_args(batch_stages="256,256,512", train_steps=30)
    assert step_profile.middle_steps(twice) == {256: 10, 512: 25}


def test_made_up_batches_look_like_documents_cut_to_rows():
    args = tiny_args(row_length=1_024, device_batch_size=4_096, batch_size=4_096,
                     max_document_length=512, val_batch_size=1_024, val_tokens=1_024)
    batch = step_profile.made_up_batch(args)
    lengths = batch.cu_seqlens.diff()
    assert batch.cu_seqlens[-1] == 4_096 and set(range(0, 4_096, 1_024)) <= set(
        batch.cu_seqlens.tolist())
    assert 0 < lengths.min() < lengths.max() <= batch.max_length == 512
    assert batch.inputs_BT.min() >= 0 and batch.inputs_BT.max() < args.vocab_size
    assert batch.inputs_BT.dtype == batch.cu_seqlens.dtype == torch.int32


def test_queueing_is_timed_without_what_was_queued_before_and_without_the_wait(monkeypatch):
    waits = iter((0.2, 0.2))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: time.sleep(next(waits)))
    took = step_profile.queue_time(lambda batches: time.sleep(batches), 0.05, None)
    assert 50 <= took < 200 and not list(waits)


def profile(*argv, cwd, nproc=1, **env) -> subprocess.CompletedProcess:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | env
    launcher = [sys.executable]
    if nproc > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    return subprocess.run([*launcher, str(ROOT / "records" / "step_profile.py"), *argv],
                          cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


SMALL = ("--track sample --recipe sample --num_layers 2 --model_dim 32 --row_length 64 "
         "--max_document_length 64 --device_batch_size 128 --val_batch_size 128 --window_start 0 "
         "--window_end 0 --batch_stages 128,256 --train_steps 4 --loss_chunk_size 128 --steps 2"
         ).split()


def test_a_run_on_a_cpu_tells_the_parts_of_each_stage(tmp_path):
    documents = random_documents(0, 40, 200)
    write_shard(tmp_path / "few" / "few_train_000001.bin", documents)
    done = profile(*SMALL, "--data_path", "few", "--out", "report.md", "--trace", "trace.json",
                   cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "report.md").read_text()
    assert done.stdout.strip() == report.strip()
    sections = report.split("\n## ")[1:]
    assert [text.split()[0] for text in sections] == ["128", "256"]
    for text in sections:
        assert "documents of few_train_000001.bin" in text and "TFLOP/s" in text
        for part in ("matrix products: blocks", "matrix products: head", "attention", "loss",
                     "norms and other pointwise", "embedding tables", "optimizer: Muon",
                     "optimizer: Adam", "copies and fills", "idle", "a step"):
            assert float(cells(text, part)[1]) >= 0
            assert cells(text, part)[3:] == ["-", "-", "-"]
        # Here the head has 65 times the weights of the blocks.
        assert float(cells(text, "matrix products: head")[1]) > float(
            cells(text, "matrix products: blocks")[1])
    assert "micro-batches: 1;" in sections[0] and "micro-batches: 2;" in sections[1]
    assert {path.name for path in tmp_path.glob("*.json")} == {"trace-128.json", "trace-256.json"}


def test_without_shards_the_tokens_are_made_up_and_the_report_says_so(tmp_path):
    done = profile(*SMALL, "--batch_stages", "", "--batch_size", "128", "--vocab_size", "256",
                   "--data_path", "none", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "random tokens for want of shards in none" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_head_counts_the_tokens_that_the_step_compares_with(tmp_path):
    done = profile(*SMALL, "--vocab_size", "256", "--sampled_vocab", "200", "--batch_stages", "",
                   "--batch_size", "128", "--data_path", "none", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"6 x {2 * 12 * 32**2 + 32 * 200:,} active weights" in done.stdout


def test_of_several_ranks_one_reports_what_of_the_communication_nothing_hides(tmp_path):
    done = profile(*SMALL, "--data_path", "none", "--device_batch_size", "64", cwd=tmp_path,
                   nproc=2)
    assert done.returncode == 0, done.stderr
    first, *sections = done.stdout.split("\n## ")
    assert "\n2 x CPU" in first and [text.split()[0] for text in sections] == ["128", "256"]
    for text in sections:
        assert 0 <= float(cells(text, "communication alone")[1]) <= float(
            cells(text, "communication")[1])


@pytest.mark.parametrize("argv, env, status, message", [
    (["--device_batch_size", "192"], {}, 1, "values that do"),
    (["--sampled_vocab", "128"], {}, 1, "both 128"),  # the micro-batch has 128 tokens too
    (["--out", "missing/report.md"], {}, 2, "there is no folder"),
    (["--steps", "0"], {}, 2, "--steps must be positive"),
    (["--wat", "1"], {}, 2, "unknown option --wat"),
])
def test_mistakes_end_with_a_message_and_a_status(tmp_path, argv, env, status, message):
    done = profile(*SMALL, *argv, cwd=tmp_path, **env)
    assert done.returncode == status
    assert message in done.stderr and "Traceback" not in done.stderr
