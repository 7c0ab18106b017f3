"""Read a trace of torch.profiler: what ran, which part of a training step it was, and its limit.

    for kernel in read_trace(Path("trace.json"), of_gpu=True):
        print(kernel.name, kernel.time, part_of(kernel, sizes))

Only the standard library, so that a trace can be read anywhere. Times are microseconds, as there.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

BLOCKS, HEAD = "matrix products: blocks", "matrix products: head"
ATTENTION, LOSS, POINTWISE = "attention", "loss", "norms and other pointwise"
TABLES, COPIES, OTHER, RANGE = "embedding tables", "copies and fills", "other", "optimizer: "
COMMUNICATION = "communication"
PARTS = (BLOCKS, HEAD, ATTENTION, LOSS, POINTWISE, TABLES, f"{RANGE}Muon", f"{RANGE}Adam", COPIES,
         COMMUNICATION, OTHER)

# -----------------------------------------------------------------------------
# What ran


class Op(NamedTuple):
    """An operator or a named range of the CPU; of its arguments, the tensors and their memory."""

    name: str
    start: float
    end: float
    shapes: tuple[tuple[int, ...], ...]
    bytes: tuple[int, ...]


class Kernel(NamedTuple):
    """`time` is the kernel's own; `stack` the operators that launched it, outermost first."""

    name: str
    start: float
    end: float
    time: float
    stack: tuple[Op, ...]

    @property
    def launcher(self) -> Op | None:
        """The operator whose arguments are this kernel's, if the trace has it.

        A whole compiled graph or a node of autograd has arguments too, but of many kernels; so has
        any operator around one of Inductor's kernels but the one that has the kernel's name.
        """
        op = self.stack[-1] if self.stack else None
        if op and (op.name.startswith(("triton", self.name)) or self.name.startswith(op.name)
                   or "::" in op.name and "autograd::" not in op.name
                   and not self.name.startswith("triton_")):
            return op
        return None

    @property
    def is_copy(self) -> bool:
        op = self.launcher
        return bool(COPY_KERNEL.fullmatch(self.name) or op and COPY_OP.fullmatch(op.name))


def read_op(event: dict) -> Op:
    args = event.get("args", {})
    dims, tensors = args.get("Input Dims", ()), []
    for shape, dtype, strides in zip(
        dims, args.get("Input type", ()), args.get("Input Strides", dims), strict=False
    ):
        # A list of tensors has a list of shapes, and no dtypes.
        if shape and all(isinstance(n, int) for n in shape):
            # An expanded dimension has a stride of 0 and takes no memory.
            stored = math.prod(n for n, stride in zip(shape, strides, strict=False) if stride)
            tensors.append((tuple(shape), stored * BYTES.get(dtype, 0)))
    shapes, sizes = zip(*tensors, strict=True) if tensors else ((), ())
    return Op(event["name"], event["ts"], event["ts"] + event.get("dur", 0), shapes, sizes)


def read_trace(path: Path, of_gpu: bool) -> list[Kernel]:
    """The GPU's kernels, copies and fills in a trace; else the CPU's operators, by own time."""
    text = path.read_text(encoding="utf-8", errors="replace")
    events = [e for e in json.loads(text, strict=False)["traceEvents"] if e.get("ph") == "X"]
    threads, operators, by_correlation, by_external = defaultdict(list), [], {}, {}
    for event in events:
        if event.get("cat") in ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver"):
            threads[event.get("pid"), event.get("tid")].append(event)
    for thread in threads.values():
        stack = []
        for event in sorted(thread, key=lambda e: (e["ts"], -e.get("dur", 0))):
            args = event.get("args", {})
            while stack and stack[-1].end <= event["ts"]:
                stack.pop()
            if event["cat"].startswith("cuda"):
                by_correlation[args.get("correlation")] = tuple(stack)
                continue
            stack.append(read_op(event))
            by_external[args.get("External id")] = tuple(stack)
            if event["cat"] == "cpu_op":
                operators.append(tuple(stack))
    if not of_gpu:
        return own_times(operators)
    kernels = []
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            args, time = event.get("args", {}), event.get("dur", 0)
            stack = (by_correlation.get(args.get("correlation", "none"))
                     or by_external.get(args.get("External id", "none"), ()))
            name, start, end = event["name"], event["ts"], event["ts"] + time
            if event["cat"] != "kernel":
                # It need not move the arguments of the operator: products clear a workspace.
                moved = args.get("bytes", 0) * (2 if "DtoD" in name else 1)
                stack += (Op(name, start, end, ((moved,),), (moved,)),)
            kernels.append(Kernel(name, start, end, time, stack))
    return kernels


def own_times(stacks: list[tuple[Op, ...]]) -> list[Kernel]:
    """Operators, each the end of its stack, less the time of the operators right inside them."""
    own = {id(stack[-1]): stack[-1].end - stack[-1].start for stack in stacks}
    for *outer, op in stacks:
        if parent := next((id(o) for o in reversed(outer) if id(o) in own), None):
            own[parent] -= op.end - op.start
    return [Kernel(stack[-1].name, stack[-1].start, stack[-1].end, max(0, own[id(stack[-1])]),
                   stack) for stack in stacks]


def busy_time(kernels: Iterable[Kernel]) -> float:
    """Time in which at least one of the kernels runs, microseconds."""
    total, until = 0.0, -math.inf
    for kernel in sorted(kernels, key=lambda k: k.start):
        total += max(0, kernel.end - max(kernel.start, until))
        until = max(until, kernel.end)
    return total


# -----------------------------------------------------------------------------
# Which part of the step


class Sizes(NamedTuple):
    """What tells tensors apart by their shapes; `tokens` are those of a micro-batch."""

    vocab_size: int
    model_dim: int
    bigram_rows: int
    tokens: int
    sampled_vocab: int = 0

    def has_vocabulary(self, shape: tuple[int, ...]) -> bool:
        """One of the dimensions is the vocabulary or the sample, as it is or padded."""
        return any(-(-size // n) * n in shape for size in (self.vocab_size, self.sampled_vocab)
                   for n in (1, 8, 16, 32, 64, 128) if size)

    def is_table(self, shape: tuple[int, ...]) -> bool:
        return shape in ((self.vocab_size, self.model_dim), (self.bigram_rows, self.model_dim))


ATTENTION_NAME = re.compile("attention|attn|flash|fmha|sdpa", re.IGNORECASE)
LOSS_NAME = re.compile("cross_?entropy|capped_|nll_loss|log_?softmax|logsumexp", re.IGNORECASE)
MATRIX_KERNEL = re.compile("gemm|gemv|nvjet|cutlass|xmma|cublas|split_?k|matmul|triton_tem|linear",
                           re.IGNORECASE)
MATRIX_OP = re.compile(
    r"(.*::)?_?(mm|addmm|bmm|baddbmm|matmul|(\w+_)?linear|scaled_mm\w*|grouped_mm)")
COPY_OP = re.compile(
    r"aten::(copy_|_to_copy|clone|contiguous|cat|fill_|zero_|zeros|full)|.*::transposed?")
COPY_KERNEL = re.compile(
    r"triton_poi_fused(_(_to_copy|_unsafe_view|as_strided|cat|clone|constant_pad_nd|copy_?|detach|"
    r"expand|fill|full(_like)?|new_zeros|permute|reshape|select|slice|split|squeeze|stack|t|"
    r"transpose|unbind|unsqueeze|view|zeros(_like)?))+(_\d+)?")
COMMUNICATION_NAME = re.compile("nccl|gloo:|c10d::")
KNOWN_NAME = re.compile(r"triton_|aten::|.*at::native|.*autograd::|\w+Backward\d")


def part_of(kernel: Kernel, sizes: Sizes) -> str:
    """The part of the step that a kernel belongs to: one of PARTS, or another optimizer's range.

    A table and its gradient are known by their shape, which an untied head shares.
    """
    name, op = kernel.name, kernel.launcher
    if COMMUNICATION_NAME.match(name) or op and COMMUNICATION_NAME.match(op.name):
        return COMMUNICATION
    for outer in kernel.stack:
        if outer.name.startswith(RANGE):
            return outer.name
    if LOSS_NAME.search(name):
        return LOSS
    # Inductor names a pointwise kernel after the operators around it; a template is a product.
    fused = name.startswith("triton_") and not name.startswith("triton_tem")
    names = name if fused else " ".join([name, *(outer.name for outer in kernel.stack)])
    if not fused and ATTENTION_NAME.search(names):
        return ATTENTION
    if name.startswith(("Memcpy", "Memset")):
        return COPIES
    shapes = op.shapes if op else ()
    if not fused and (MATRIX_KERNEL.search(name) or op and MATRIX_OP.fullmatch(op.name)):
        return HEAD if any(map(sizes.has_vocabulary, shapes)) else BLOCKS
    if "embedding" in names.lower():
        return TABLES
    if LOSS_NAME.search(names) or any(
            sizes.has_vocabulary(shape) and not sizes.is_table(shape) for shape in shapes):
        return LOSS
    if any(map(sizes.is_table, shapes)):
        return TABLES
    if kernel.is_copy:
        return COPIES
    known = KNOWN_NAME.match(name) or op and op.name.startswith("aten::")
    return POINTWISE if known else OTHER


# -----------------------------------------------------------------------------
# How fast it could be

BYTES = {"float": 4, "double": 8, "int": 4, "long int": 8, "c10::BFloat16": 2, "c10::Half": 2,
         "bool": 1, "unsigned char": 1, "signed char": 1, "c10::Float8_e4m3fn": 1,
         "c10::Float8_e5m2": 1}


class Limits(NamedTuple):
    """What a GPU can do at most in a second."""

    flops: float  # of matrix products
    bandwidth: float  # bytes

    def seconds(self, kernel: Kernel, sizes: Sizes) -> float:
        """What it needs to move its launcher's arguments, each once, or for its matrix product.

        0 where the trace tells too little; too little also where results are not among them.
        """
        op, flops = kernel.launcher, 0
        if not op:
            return 0
        traffic = sum(op.bytes)
        if kernel.is_copy and traffic:
            *others, (most, largest) = sorted(zip(map(math.prod, op.shapes), op.bytes, strict=True))
            if others:  # of a buffer that is larger than what is copied, only a slice is moved
                traffic -= largest * max(0, 1 - sum(count for count, _ in others) / most)
            elif "transpose" in op.name:  # the result, of the same size, is not an argument
                traffic *= 2
        elif "embedding" in op.name:  # a row for each token at most
            traffic = sum(size * min(1, sizes.tokens / shape[0]) if sizes.is_table(shape) else size
                          for shape, size in zip(op.shapes, op.bytes, strict=True))
        first = "add" in op.name  # the factors follow what the product is added to
        if MATRIX_OP.fullmatch(op.name) and len(op.shapes) >= first + 2:
            a, b = op.shapes[first : first + 2]
            flops = 2 * math.prod(a) * b[-1] if a[-1:] == b[-2:-1] else 0
        return max(traffic / self.bandwidth, flops / self.flops)
