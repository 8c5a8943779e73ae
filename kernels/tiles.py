"""Helpers that kernels share: program order, dropout from (seed, index), and dots of mixed width."""

import triton
import triton.language as tl


@triton.jit
def grouped_order(pid, blocks_m, blocks_n, GROUP_M: tl.constexpr):
    """(block_m, block_n) of a program: GROUP_M rows of blocks are walked together, so that L2 serves both operands."""
    first_m = (pid // (GROUP_M * blocks_n)) * GROUP_M
    rows = tl.minimum(blocks_m - first_m, GROUP_M)
    within = pid % (GROUP_M * blocks_n)
    return first_m + within % rows, within // rows


@triton.jit
def _philox_4x32(seed, counter, ROUNDS: tl.constexpr):
    """Four uint32 words of Philox-4x32 for int64 counters, as peft_ops.reference.dropout defines them.

    A 64-bit product gives both halves in one instruction; tl.randint4x multiplies twice.
    """
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0, c1 = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    c2, c3 = tl.zeros(counter.shape, tl.uint32), tl.zeros(counter.shape, tl.uint32)
    for _ in tl.static_range(ROUNDS):
        a, b = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (b >> 32).to(tl.uint32) ^ c1 ^ k0, (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = b.to(tl.uint32), a.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def dropout_keep(seed, rows, first_col, K, threshold, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """bool [BLOCK_M, BLOCK_K]: which elements of a tile of an [M, K] tensor are kept.

    rows: int64 [BLOCK_M]; the tile's columns start at first_col, a multiple of 8. Eight neighbours in a row share one
    Philox call of 7 rounds: 16 bits each, kept where bits >= threshold (peft_ops.reference.dropout).
    """
    octet = first_col // 8 + tl.arange(0, BLOCK_K // 8)
    counter = rows[:, None] * tl.cdiv(K, 8) + octet[None, :]
    r0, r1, r2, r3 = _philox_4x32(seed, counter, 7)
    words = tl.join(tl.join(r0, r2), tl.join(r1, r3))  # [..., word // 2, word % 2]: words in order 0, 1, 2, 3
    bits = tl.join(words << 16, words)  # 16 bits at the top: what lies below them does not change the comparison
    return tl.reshape(bits, (BLOCK_M, BLOCK_K)) >= tl.cast(threshold, tl.uint32) << 16


@triton.jit
def group_block(block, R, BLOCK_R: tl.constexpr):
    """(group, r [BLOCK_R], inside [BLOCK_R]) of a block of columns in groups of R; no block is in two."""
    blocks = tl.cdiv(R, BLOCK_R)
    group = block // blocks
    within = block % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    return group, group * R + within, within < R


@triton.jit
def mixed_dot(x, w, acc, PRECISION: tl.constexpr):
    """acc + x·w in float32 for x [I, J] and w [J, L] of any float dtypes, on the matrix unit.

    A float32 w against a 16-bit x (a float32 adapter on a 16-bit base) is split into 16-bit pieces that hold its 22 to
    24 bits, so the product is as exact as in float32 while x stays as it lies. PRECISION is for two float32 operands.
    """
    if x.dtype == w.dtype:
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    elif x.dtype == tl.float32:
        acc = tl.dot(x, w.to(tl.float32), acc, input_precision=PRECISION)
    else:
        high = w.to(x.dtype)
        rest = w.to(tl.float32) - high.to(tl.float32)
        acc = tl.dot(x, high, acc)
        if x.dtype == tl.bfloat16:
            middle = rest.to(x.dtype)
            acc = tl.dot(x, middle, acc)
            acc = tl.dot(x, (rest - middle.to(tl.float32)).to(x.dtype), acc)
        else:  # float16 would lose the rest among its subnormals
            acc += tl.dot(x, (rest * 2048.0).to(x.dtype)) * (1.0 / 2048.0)
    return acc


@triton.jit
def low_rank_tile(
    s_ptr, b_ptr, seed_ptr, m, first_n, M, N, R, stride_sm, stride_bn, stride_br, scale, threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of scale · keep ∘ (s [M, R] b [N, R]ᵀ), float32: rows m (int64), BLOCK_N columns from first_n."""
    n = first_n + tl.arange(0, BLOCK_N).to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        s = tl.load(s_ptr + m[:, None] * stride_sm + r[None, :],
                    mask=(m[:, None] < M) & (r[None, :] < R), other=0.0)  # fmt: skip
        b = tl.load(b_ptr + n[None, :] * stride_bn + r[:, None] * stride_br,
                    mask=(n[None, :] < N) & (r[:, None] < R), other=0.0)  # fmt: skip
        acc = tl.dot(s * scale, b.to(tl.float32), acc, input_precision=PRECISION)
    if DROPOUT:
        acc = tl.where(dropout_keep(tl.load(seed_ptr), m, first_n, N, threshold, BLOCK_M, BLOCK_N), acc, 0.0)
    return acc
