"""Small right kernels on which the test bench proves itself."""

import triton
import triton.language as tl


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask=inside), mask=inside)


@triton.jit
def softmax_kernel(x_ptr, y_ptr, columns, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    inside = offsets < columns
    row = tl.program_id(0) * columns
    x = tl.load(x_ptr + row + offsets, mask=inside, other=float("-inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, axis=0))
    y = e / tl.sum(e, axis=0)
    tl.store(y_ptr + row + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def matmul_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    M,
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y [M, N] = x [M, K] @ w [N, K]^T"""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]  # [BM, 1]
    columns = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]  # [1, BN]
    y = tl.zeros([BM, BN], tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        x = tl.load(x_ptr + rows * K + k[None, :], mask=(rows < M) & (k[None, :] < K), other=0.0)  # [BM, BK]
        w = tl.load(w_ptr + columns * K + k[:, None], mask=(columns < N) & (k[:, None] < K), other=0.0)  # [BK, BN]
        y = tl.dot(x, w, y, input_precision=PRECISION)
    tl.store(y_ptr + rows * N + columns, y.to(y_ptr.dtype.element_ty), mask=(rows < M) & (columns < N))
