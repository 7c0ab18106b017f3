"""Triton kernels for NVIDIA GPUs. Each has a plain PyTorch twin in train_gpt.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# Triton's interpreter, which runs the kernels on a CPU, knows no machine instructions.
INTERPRETED = triton.knobs.runtime.interpret
LOG2_E = tl.constexpr(1.4426950408889634)  # stands behind tensors, as the interpreter wants it


@triton.jit
def _tanh(x, INTERPRETED: tl.constexpr):
    if INTERPRETED:
        return 2 * tl.sigmoid(2 * x) - 1
    # One instruction of the special function units, which these kernels keep waiting for.
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32,
                                     is_pure=True, pack=1)


@triton.jit
def _exp2(x, INTERPRETED: tl.constexpr):
    if INTERPRETED:
        return tl.exp2(x)
    # One instruction instead of four, which look after results below 2^-126; here they may be 0.
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32,
                                     is_pure=True, pack=1)


@triton.jit
def _losses(
    logits, targets, offsets, losses, log_totals, softcap: tl.constexpr, vocab_size: tl.constexpr,
    row_stride: tl.constexpr, num_targets: tl.constexpr, HAS_OFFSETS: tl.constexpr,
    BLOCK: tl.constexpr, INTERPRETED: tl.constexpr,
):
    """A program does a row."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    columns = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        inside = start + columns < vocab_size
        x = tl.load(logits + start + columns, mask=inside).to(tl.float32)
        # The cap bounds the sum, so that no pass for a maximum is needed.
        z = _tanh(x * (1 / softcap), INTERPRETED) * (softcap * LOG2_E)
        if HAS_OFFSETS:
            z += tl.load(offsets + start + columns, mask=inside) * LOG2_E
        total += tl.where(inside, _exp2(z, INTERPRETED), 0.0)
    log_total = tl.log(tl.sum(total, 0))
    target = tl.load(targets + row * num_targets)
    column = tl.maximum(target, 0)
    loss = log_total - softcap * _tanh(tl.load(logits + column).to(tl.float32) * (1 / softcap),
                                       INTERPRETED)
    if HAS_OFFSETS:
        loss -= tl.load(offsets + column)
    tl.store(losses + row, tl.where(target < 0, 0.0, loss))
    tl.store(log_totals + row, log_total)


@triton.jit
def _gradients(
    logits, targets, ahead, offsets, log_totals, grad, scale: tl.constexpr,
    softcap: tl.constexpr, vocab_size: tl.constexpr, num_rows: tl.constexpr,
    row_stride: tl.constexpr, num_targets: tl.constexpr, HAS_OFFSETS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INTERPRETED: tl.constexpr,
):
    """A program does a tile. Offsets from the tile's corner fit 32 bits, which are faster."""
    first_row = tl.program_id(1).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    corner, offset = first_row * row_stride, row * row_stride + column
    is_row = row < num_rows - first_row
    inside = is_row & (column < row_stride)
    x = tl.load(logits + corner + offset, mask=inside).to(tl.float32)
    shift = tl.load(log_totals + first_row + row, mask=is_row) * -LOG2_E
    if HAS_OFFSETS:
        shift += tl.load(offsets + column, mask=column < vocab_size) * LOG2_E
    t = _tanh(x * (1 / softcap), INTERPRETED)
    total_weight = tl.zeros((ROWS, 1), tl.float32)
    hits = 0
    for k in tl.static_range(num_targets):
        target = tl.load(targets + (first_row + row) * num_targets + k, mask=is_row, other=-1)
        total_weight += tl.where(target >= 0, tl.load(ahead + k) * scale, 0.0)
        hits += tl.sum((target // COLUMNS == tl.program_id(0)).to(tl.int32))
    g = _exp2(t * (softcap * LOG2_E) + shift, INTERPRETED) * total_weight
    if hits > 0:  # few tiles hold a target
        for k in tl.static_range(num_targets):
            target = tl.load(targets + (first_row + row) * num_targets + k, mask=is_row, other=-1)
            g -= tl.where(column == target, tl.load(ahead + k) * scale, 0.0)
    g = tl.where(column < vocab_size, g * (1 - t * t), 0.0)
    tl.store(grad + corner + offset, g.to(grad.dtype.element_ty), mask=inside)


@torch.library.custom_op("speedrun::capped_cross_entropy", mutates_args=())
def capped_cross_entropy(
    logits_NV: Tensor, targets_NK: Tensor, ahead_K: Tensor, offsets_V: Tensor | None,
    vocab_size: int, softcap: float, scale: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """What the plain twin, `cross_entropy`, returns.

    Cross entropies (N,) of softcap * tanh(logits / softcap) and the first target, and the gradients
    (N, V) of all targets, weighted by `ahead_K`, times `scale`. The logits have any float type,
    targets are int32, weights and offsets float32. The softcap is 70 at most, so that exp(softcap)
    * vocab_size is a float32. Reads the logits twice and writes the gradients once, in about a
    third of the time that torch.compile takes for the twin.
    """
    logits_NV = logits_NV.contiguous()
    num_rows, row_stride = logits_NV.shape
    num_targets = targets_NK.size(1)
    targets_NK = targets_NK.contiguous()
    losses, log_totals = (logits_NV.new_empty(num_rows, dtype=torch.float32) for _ in range(2))
    _losses[(num_rows,)](
        logits_NV, targets_NK, offsets_V, losses, log_totals, softcap, vocab_size, row_stride,
        num_targets, offsets_V is not None, BLOCK=2048, INTERPRETED=INTERPRETED, num_warps=4)
    grad = torch.empty_like(logits_NV, dtype=dtype)
    ROWS, COLUMNS = 8, 128
    _gradients[triton.cdiv(row_stride, COLUMNS), triton.cdiv(num_rows, ROWS)](
        logits_NV, targets_NK, ahead_K, offsets_V, log_totals, grad, scale, softcap,
        vocab_size, num_rows, row_stride, num_targets, offsets_V is not None, ROWS, COLUMNS,
        INTERPRETED=INTERPRETED, num_warps=1)
    return losses, grad


@capped_cross_entropy.register_fake
def _(logits_NV, targets_NK, ahead_K, offsets_V, vocab_size, softcap, scale, dtype):
    losses = logits_NV.new_empty(len(logits_NV), dtype=torch.float32)
    return losses, logits_NV.new_empty(logits_NV.shape, dtype=dtype)


@triton.jit
def _relu2_linear(
    x, weight, old, factor, y, y_T, num_rows: tl.constexpr, num_columns: tl.constexpr,
    depth: tl.constexpr, HAS_OLD: tl.constexpr, LIMIT: tl.constexpr, TILES: tl.constexpr,
    PROGRAMS: tl.constexpr, SIDE: tl.constexpr,
):
    """A program does every PROGRAMS-th tile; what is outside of the tensors is 0, or not stored."""
    scale = tl.load(factor)
    tiles_per_row: tl.constexpr = (num_columns + SIDE - 1) // SIDE
    for i in tl.range(0, TILES, flatten=not HAS_OLD):
        tile = tl.program_id(0) + i * PROGRAMS
        row, column = tile // tiles_per_row * SIDE, tile % tiles_per_row * SIDE
        h = tl.zeros((SIDE, SIDE), tl.float32)
        for k in range(0, depth, SIDE):
            h = tl.dot(x.load([row, k]), weight.load([column, k]).T, h)
        if HAS_OLD:
            z = h * (tl.sqrt(old.load([row, column]).to(tl.float32)) * scale)
        else:
            z = tl.maximum(h, 0.0)
            z = z * z * scale
        z = tl.minimum(tl.maximum(z, -LIMIT), LIMIT).to(y.dtype)
        y.store([row, column], z)
        y_T.store([column, row], z.T)


@torch.library.custom_op("speedrun::relu2_linear", mutates_args=())
def relu2_linear(
    x_ND: Tensor, weight_ED: Tensor, old_NE: Tensor | None, factor: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """ReLU(x @ weight.T)^2 * factor or, with `old_NE`, x @ weight.T * sqrt(old) * factor.

    Returns it as (N, E) and transposed (E, N), of `dtype`, where what is out of range is cut off.
    All are float32 or 8-bit floats, `factor` is a float32 scalar on the device of x, and sizes are
    multiples of 16. The product never goes to memory, which makes this 1.5 times as fast as the
    product and then a kernel for the rest. The twins are in `relu2_linear_float8` and its gradient.
    """
    x_ND, weight_ED = x_ND.contiguous(), weight_ED.contiguous()
    (num_rows, depth), num_columns = x_ND.shape, len(weight_ED)
    y, y_T = (x_ND.new_empty(shape, dtype=dtype)
              for shape in ((num_rows, num_columns), (num_columns, num_rows)))
    SIDE = 128
    tiles = triton.cdiv(num_rows, SIDE) * triton.cdiv(num_columns, SIDE)
    programs = 3
    if x_ND.is_cuda:
        programs = 2 * torch.cuda.get_device_properties(x_ND.device).multi_processor_count
    x, weight, old, out, out_T = (
        TensorDescriptor.from_tensor(tensor, [SIDE, SIDE])
        for tensor in (x_ND, weight_ED, y if old_NE is None else old_NE.contiguous(), y, y_T))
    _relu2_linear[programs,](
        x, weight, old, factor, out, out_T, num_rows, num_columns, depth, old_NE is not None,
        torch.finfo(dtype).max, triton.cdiv(tiles, programs), programs, SIDE, num_warps=4,
        num_stages=3)
    return y, y_T


@relu2_linear.register_fake
def _(x_ND, weight_ED, old_NE, factor, dtype):
    shape = len(x_ND), len(weight_ED)
    return x_ND.new_empty(shape, dtype=dtype), x_ND.new_empty(shape[::-1], dtype=dtype)


@triton.jit
def _transpose(
    x, y, num_rows: tl.constexpr, num_columns: tl.constexpr, SIDE: tl.constexpr
):
    first_row = tl.program_id(1).to(tl.int64) * SIDE
    first_column = tl.program_id(0).to(tl.int64) * SIDE
    i, j = tl.arange(0, SIDE)[:, None], tl.arange(0, SIDE)[None, :]
    tile = tl.load(x + first_row * num_columns + first_column + i * num_columns + j,
                   mask=(i < num_rows - first_row) & (j < num_columns - first_column), other=0)
    tl.store(y + first_column * num_rows + first_row + i * num_rows + j, tl.trans(tile),
             mask=(i < num_columns - first_column) & (j < num_rows - first_row))


@torch.library.custom_op("speedrun::transposed", mutates_args=())
def transposed(x_RC: Tensor) -> Tensor:
    """The transpose of a matrix of 8-bit numbers, as rows without gaps: x.T.contiguous().

    PyTorch's own copy takes ten times as long. The matrix units read 8-bit operands along rows
    only, so that the transpose has to be made.
    """
    x_RC = x_RC.contiguous()
    num_rows, num_columns = x_RC.shape
    y = x_RC.new_empty(num_columns, num_rows)
    SIDE = 128
    _transpose[triton.cdiv(num_columns, SIDE), triton.cdiv(num_rows, SIDE)](
        x_RC.view(torch.uint8), y.view(torch.uint8), num_rows, num_columns, SIDE, num_warps=8)
    return y


@transposed.register_fake
def _(x_RC):
    return x_RC.new_empty(x_RC.shape[::-1])
