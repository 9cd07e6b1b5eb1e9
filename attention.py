"""Scaled dot-product attention, the one operation every tower of this code shares.

In order: what hides keys and what is added to scores, the plain reference, torch's fused call, Triton kernels (tiles,
forward, backward, decoding), their launchers, the switch.
Letters: B batch, nh query heads, nkv key/value heads, T queries, S keys, hd head dim; in kernels m are places of
queries, n of keys, a tile is BM queries by BN keys.
Papers: Vaswani et al. 2017; grouped queries (nkv < nh) Ainslie et al. 2023; online softmax and recomputation in tiles,
FlashAttention-2 (Dao 2023); split keys, Flash-Decoding (Dao et al. 2023); relative positions, MViTv2 (Li et al. 2021).
"""
from __future__ import annotations      # `constexpr` stays a word where there is no triton

import itertools
import math
import os
from contextlib import suppress

import torch
import torch.nn.functional as F

triton = None                           # the switch below then stays on torch
if torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ:       # elsewhere it would take 0.2 s of every start
    with suppress(ImportError):         # Windows
        import triton
        import triton.language as tl
        from triton.language import constexpr
jit = triton.jit if triton else lambda kernel: kernel


# ---- What a query sees

def visible_keys(T, S, causal, segments, device):
    """Bool mask that broadcasts to (B, 1, T, S), None if every key is visible. The last query sees every key."""
    mask = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T) if causal and T > 1 else None
    if segments is not None:
        same = segments[:, None, :, None] == segments[:, None, None, :]                     # (B, 1, T, T)
        mask = same if mask is None else same & mask
    return mask


def relative_bias(rel_h, rel_w):
    """Decomposed relative positions in full: (B, nh, T, H), (B, nh, T, W) -> (B, nh, T, H * W), key s at row s // W."""
    # by a product with ones and zeros: as exact as sums, which would run along 14 numbers at a time
    rows, columns = (torch.eye(rel.shape[-1], dtype=rel.dtype, device=rel.device) for rel in (rel_h, rel_w))
    spread = torch.cat([rows.repeat_interleave(len(columns), 1), columns.repeat(1, len(rows))])     # (H + W, H * W)
    return torch.cat([rel_h, rel_w], -1) @ spread


# ---- Reference

def reference_attention(q, k, v, *, causal=False, bias=None, segments=None, rel=(), wide=None):
    """softmax(q k^T / sqrt(hd) + bias) v, in float32 or better, or in a type `wide`. Obvious: tests lean on it."""
    B, nh, T, hd = q.shape
    wide = wide or torch.promote_types(q.dtype, torch.float32)
    k, v = (x.to(wide).repeat_interleave(nh // x.shape[1], dim=1) for x in (k, v))          # (B, nh, S, hd)
    scores = (q.to(wide) * hd ** -0.5) @ k.transpose(-2, -1)                                # (B, nh, T, S)
    if bias is not None:
        scores = scores + bias
    if rel:
        scores = scores + relative_bias(*rel)
    if (mask := visible_keys(T, k.shape[2], causal, segments, q.device)) is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).to(q.dtype)                                             # (B, nh, T, hd)


# ---- Torch

def torch_attention(q, k, v, *, causal=False, bias=None, segments=None, rel=()):
    """torch's fused kernels, after writing out the masks they do not know."""
    (B, nh, T, hd), (nkv, S), causal = q.shape, k.shape[1:3], causal and q.shape[2] > 1
    if rel:                             # in pieces that a cache holds: the bias in full would be B x nh x T x S
        rows = max(1, 2 ** 22 // (B * S))
        heads, step = max(1, rows // T), T if causal or segments is not None else min(T, rows)
        if heads < nh or step < T:
            out, same = output(q), dict(causal=causal, segments=segments)
            for i, j in itertools.product(range(0, nh, heads), range(0, T, step)):
                at = slice(None), slice(i, i + heads), slice(j, j + step)
                out[at] = torch_attention(q[at], k[at[:2]], v[at[:2]], rel=[r[at] for r in rel], **same)
            return out
        bias = relative_bias(*rel)
    if T == 1 and bias is None:         # the query heads that share a key/value head are as good as queries
        return F.scaled_dot_product_attention(q.reshape(B, nkv, -1, hd), k, v).view(B, nh, 1, hd)
    if q.requires_grad and q.dtype == torch.bfloat16 and q.device.type == "cpu" and B * nh * T * S < 2 ** 24:
        # the fused backward pass of a CPU multiplies float32, not bfloat16; above, scores would take too much memory
        return reference_attention(q, k, v, causal=causal, bias=bias, segments=segments, wide=q.dtype)
    if segments is not None or causal and (T != S or bias is not None):             # torch aligns to the first key
        mask = visible_keys(T, S, causal, segments, q.device)
        bias, causal = mask if bias is None else bias.masked_fill(~mask, -torch.inf), False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, enable_gqa=nh != nkv)


# ---- Tiles

@jit
def load2(x, offset, ok, HD: constexpr, D1: constexpr, D2: constexpr):
    """Rows at `offset`, 0 where not `ok`, as two tiles of D1 and D2 channels (perhaps none): 80 = 64 + 16, no waste."""
    d = tl.arange(0, D1)
    a = tl.load(x + offset[:, None] + d[None, :], mask=ok[:, None] & (d[None, :] < HD), other=0.0)
    b = a
    if D2 > 0:
        d = D1 + tl.arange(0, D2)
        b = tl.load(x + offset[:, None] + d[None, :], mask=ok[:, None] & (d[None, :] < HD), other=0.0)
    return a, b


@jit
def store2(x, offset, ok, tile, HD: constexpr, D1: constexpr, D2: constexpr):
    """The counterpart of load2."""
    d = tl.arange(0, D1)
    tl.store(x + offset[:, None] + d[None, :], tile[0].to(x.dtype.element_ty), mask=ok[:, None] & (d[None, :] < HD))
    if D2 > 0:
        d = D1 + tl.arange(0, D2)
        tl.store(x + offset[:, None] + d[None, :], tile[1].to(x.dtype.element_ty), mask=ok[:, None] & (d[None, :] < HD))


@jit
def zeros2(rows: constexpr, D1: constexpr, D2: constexpr):             # where sums of two tiles begin
    return tl.zeros([rows, D1], tl.float32), tl.zeros([rows, D2 if D2 > 0 else D1], tl.float32)


@jit
def dot2(a, b, D2: constexpr):
    """a b^T over both parts of the channels. tf32x3: float32 keeps its precision on tensor cores; others ignore it."""
    s = tl.dot(a[0], tl.trans(b[0]), input_precision="tf32x3")
    if D2 > 0:
        s = tl.dot(a[1], tl.trans(b[1]), s, input_precision="tf32x3")
    return s


@jit
def add2(acc, p, x, D2: constexpr):
    """acc + p x for both parts of x."""
    p = p.to(x[0].dtype)
    a = tl.dot(p, x[0], acc[0], input_precision="tf32x3")
    b = acc[1]
    if D2 > 0:
        b = tl.dot(p, x[1], acc[1], input_precision="tf32x3")
    return a, b


@jit
def scores(a, b, m, n, i, h, bh, T, S, scale, extras, CAUSAL: constexpr, MASKED: constexpr, D2: constexpr):
    """A tile of a b^T with what is added to it, in units that `scale` turns into base-2 logarithms.

    m and n are the places of queries and keys shaped to broadcast to the tile, whichever of the two a holds. A hidden
    key gets -1e38, and no bias counts below -1e30: exp2 never meets inf - inf, and hidden stays less than biased away.
    """
    bias, bias_strides, rel_h, rel_w, H, W, segments = extras
    s = dot2(a, b, D2)
    inside = (m < T) & (n < S)
    if bias is not None:
        at = i * bias_strides[0] + h * bias_strides[1] + m * bias_strides[2] + n * bias_strides[3]
        s += tl.maximum(tl.load(bias + at, mask=inside, other=0.0).to(tl.float32), -1e30) * (1.4426950408889634 / scale)
    if rel_h is not None:               # two numbers per query and key block instead of a (nh, T, S) bias
        row = bh * T + m
        s += tl.load(rel_h + row * H + n // W, mask=inside, other=0.0).to(tl.float32) * (1.4426950408889634 / scale)
        s += tl.load(rel_w + row * W + n % W, mask=inside, other=0.0).to(tl.float32) * (1.4426950408889634 / scale)
    if MASKED:
        ok = n < S
        if CAUSAL:
            ok = ok & (n <= m + S - T)
        if segments is not None:
            mine = tl.load(segments + i * T + m, mask=m < T, other=-1)
            ok = ok & (mine == tl.load(segments + i * T + n, mask=n < S, other=-2))
        s = tl.where(ok, s, -1e38)
    return s


@jit
def key_range(m0, row, start, chunk, T, S, spans, BM: constexpr, BN: constexpr, CAUSAL: constexpr):
    """Keys lo ... hi of a chunk that queries m0 ... m0 + BM may see; each sees all of lo ... full: no mask there."""
    lo, full, hi = start, S // BN * BN, tl.minimum(S, start + chunk)
    if CAUSAL:
        hi = tl.minimum(hi, m0 + BM + S - T)
        full = tl.minimum(S, m0 + 1 + S - T) // BN * BN
    if spans[0] is not None:
        lo = tl.load(spans[0] + row) // BN * BN
        hi = tl.minimum(hi, tl.load(spans[1] + row))
        full = lo
    return lo, tl.minimum(full, hi // BN * BN), hi


@jit
def query_range(n0, row, T, S, spans, BM: constexpr, BN: constexpr, CAUSAL: constexpr):
    """Queries lo ... hi that see any of keys n0 ... n0 + BN; free ... hi see all of them."""
    lo, free, hi = 0, 0, T
    if CAUSAL:
        lo = tl.maximum(0, n0 + T - S) // BM * BM
        free = tl.minimum(T, tl.cdiv(tl.maximum(0, n0 + BN - 1 + T - S), BM) * BM)
    if spans[0] is not None:
        lo = tl.maximum(lo, tl.load(spans[0] + row) // BM * BM)
        hi = tl.load(spans[1] + row)
        free = hi
    return lo, free, hi


# ---- Forward

@jit
def forward_kernel(q, k, v, o, lse, strides, extras, spans, nh, group, T, S, chunk, scale, HD: constexpr,
                   D1: constexpr, D2: constexpr, BM: constexpr, BN: constexpr, CAUSAL: constexpr):
    """A program per block of queries and head, and per chunk of keys where decoding splits them: online softmax. lse is
    the base-2 logarithm of each row's sum of exponentials, for the backward pass and for joining chunks."""
    sq, sk, sv, so = strides
    n_block, split = tl.cdiv(T, BM), tl.program_id(1)
    block, bh = n_block - 1 - tl.program_id(0) % n_block, tl.program_id(0) // n_block       # causal: longest rows first
    i, h = (bh // nh).to(tl.int64), bh % nh
    m = block * BM + tl.arange(0, BM)
    queries = load2(q + i * sq[0] + h * sq[1], m * sq[2], m < T, HD, D1, D2)
    k += i * sk[0] + h // group * sk[1]
    v += i * sv[0] + h // group * sv[1]
    most, total, acc = tl.full([BM], -1e38, tl.float32), tl.zeros([BM], tl.float32), zeros2(BM, D1, D2)
    edges = key_range(block * BM, i * n_block + block, split * chunk, chunk, T, S, spans, BM, BN, CAUSAL)
    for part in tl.static_range(2):     # keys that all queries of the block see, then those to mask
        for n0 in range(edges[part], edges[part + 1], BN):
            n = n0 + tl.arange(0, BN)
            keys, values = load2(k, n * sk[2], n < S, HD, D1, D2), load2(v, n * sv[2], n < S, HD, D1, D2)
            s = scores(queries, keys, m[:, None], n[None, :], i, h, bh, T, S, scale, extras, CAUSAL, part == 1, D2)
            new = tl.maximum(most, tl.max(s, 1) * scale)
            p, fade = tl.exp2(s * scale - new[:, None]), tl.exp2(most - new)
            most, total = new, total * fade + tl.sum(p, 1)
            acc = add2((acc[0] * fade[:, None], acc[1] * fade[:, None]), p, values, D2)
    o += split * so[0] + i * so[1] + h * so[2]
    store2(o, m * so[3], m < T, (acc[0] / total[:, None], acc[1] / total[:, None]), HD, D1, D2)
    tl.store(lse + (split * (tl.num_programs(0) // n_block) + bh) * T + m, most + tl.log2(total), mask=m < T)


# ---- Backward

@jit
def dq_kernel(q, k, v, o, do, dq, lse, delta, strides, extras, spans, nh, group, T, S, scale, HD: constexpr,
              D1: constexpr, D2: constexpr, BM: constexpr, BN: constexpr, CAUSAL: constexpr):
    """dq, over the forward's tiles; on the way delta = rowsum(o do), which dkdv_kernel reads."""
    sq, sk, sv, so, sdo, sdq = strides
    n_block = tl.cdiv(T, BM)
    block, bh = n_block - 1 - tl.program_id(0) % n_block, tl.program_id(0) // n_block
    i, h = (bh // nh).to(tl.int64), bh % nh
    m = block * BM + tl.arange(0, BM)
    queries = load2(q + i * sq[0] + h * sq[1], m * sq[2], m < T, HD, D1, D2)
    out = load2(o + i * so[0] + h * so[1], m * so[2], m < T, HD, D1, D2)
    dout = load2(do + i * sdo[0] + h * sdo[1], m * sdo[2], m < T, HD, D1, D2)
    d = tl.sum(out[0].to(tl.float32) * dout[0].to(tl.float32), 1)
    if D2 > 0:
        d += tl.sum(out[1].to(tl.float32) * dout[1].to(tl.float32), 1)
    tl.store(delta + bh * T + m, d, mask=m < T)
    k += i * sk[0] + h // group * sk[1]
    v += i * sv[0] + h // group * sv[1]
    sums, acc = tl.load(lse + bh * T + m, mask=m < T, other=float("inf")), zeros2(BM, D1, D2)
    edges = key_range(block * BM, i * n_block + block, 0, S, T, S, spans, BM, BN, CAUSAL)
    for part in tl.static_range(2):
        for n0 in range(edges[part], edges[part + 1], BN):
            n = n0 + tl.arange(0, BN)
            keys, values = load2(k, n * sk[2], n < S, HD, D1, D2), load2(v, n * sv[2], n < S, HD, D1, D2)
            s = scores(queries, keys, m[:, None], n[None, :], i, h, bh, T, S, scale, extras, CAUSAL, part == 1, D2)
            ds = tl.exp2(s * scale - sums[:, None]) * (dot2(dout, values, D2) - d[:, None])
            acc = add2(acc, ds, keys, D2)
    root = scale * 0.6931471805599453
    store2(dq + i * sdq[0] + h * sdq[1], m * sdq[2], m < T, (acc[0] * root, acc[1] * root), HD, D1, D2)


@jit
def dkdv_kernel(q, k, v, do, dk, dv, lse, delta, strides, extras, spans, nh, group, T, S, scale, HD: constexpr,
                D1: constexpr, D2: constexpr, BM: constexpr, BN: constexpr, CAUSAL: constexpr):
    """A program per block of keys and key/value head: sums over the queries that see it, in every head of its group.

    Tiles lie transposed, keys down and queries across, so that p and ds are left factors as they come.
    """
    sq, sk, sv, sdo, sdk, sdv = strides
    n_block, nkv = tl.cdiv(S, BN), nh // group
    block, row = tl.program_id(0) % n_block, tl.program_id(0) // n_block
    i, hk = (row // nkv).to(tl.int64), row % nkv
    n = block * BN + tl.arange(0, BN)
    keys = load2(k + i * sk[0] + hk * sk[1], n * sk[2], n < S, HD, D1, D2)
    values = load2(v + i * sv[0] + hk * sv[1], n * sv[2], n < S, HD, D1, D2)
    edges = query_range(block * BN, i * n_block + block, T, S, spans, BM, BN, CAUSAL)
    gk, gv = zeros2(BN, D1, D2), zeros2(BN, D1, D2)
    for h in range(hk * group, hk * group + group):
        bh, qh, doh = i * nh + h, q + i * sq[0] + h * sq[1], do + i * sdo[0] + h * sdo[1]
        for part in tl.static_range(2):
            for m0 in range(edges[part], edges[part + 1], BM):
                m = m0 + tl.arange(0, BM)
                queries, dout = load2(qh, m * sq[2], m < T, HD, D1, D2), load2(doh, m * sdo[2], m < T, HD, D1, D2)
                s = scores(keys, queries, m[None, :], n[:, None], i, h, bh, T, S, scale, extras, CAUSAL, part == 0, D2)
                p = tl.exp2(s * scale - tl.load(lse + bh * T + m, mask=m < T, other=float("inf"))[None, :])
                gv = add2(gv, p, dout, D2)
                ds = p * (dot2(values, dout, D2) - tl.load(delta + bh * T + m, mask=m < T, other=0.0)[None, :])
                gk = add2(gk, ds, queries, D2)
    root = scale * 0.6931471805599453
    store2(dk + i * sdk[0] + hk * sdk[1], n * sdk[2], n < S, (gk[0] * root, gk[1] * root), HD, D1, D2)
    store2(dv + i * sdv[0] + hk * sdv[1], n * sdv[2], n < S, gv, HD, D1, D2)


# ---- Decoding

@jit
def join_kernel(parts, lse, o, n_split, n_row, HD: constexpr, D: constexpr, N: constexpr):
    """Weigh the values of chunks, (n_split, n_row, HD), by the softmax of their lse, (n_split, n_row)."""
    row, split, d = tl.program_id(0), tl.arange(0, N), tl.arange(0, D)
    sums = tl.load(lse + split * n_row + row, mask=split < n_split, other=-1e38)
    w = tl.exp2(sums - tl.max(sums, 0))
    at, ok = (split[:, None] * n_row + row) * HD + d[None, :], (split[:, None] < n_split) & (d[None, :] < HD)
    out = tl.sum(tl.load(parts + at, mask=ok, other=0.0) * (w / tl.sum(w, 0))[:, None], 0)
    tl.store(o + row * HD + d, out.to(o.dtype.element_ty), mask=d < HD)


# ---- Launchers

MAX_HEAD_DIM = 160
TILES = {                               # bytes per number, channels up to: queries, keys, warps, stages
    (2, 64):  dict(forward=(128, 128, 8, 2), dq=(128, 64, 8, 2), dkdv=(64, 128, 8, 2), decode=(16, 64, 4, 3)),
    (2, 96):  dict(forward=(128, 64, 8, 2), dq=(64, 64, 4, 2), dkdv=(32, 128, 8, 2), decode=(16, 64, 4, 3)),
    (2, 128): dict(forward=(128, 64, 8, 2), dq=(64, 64, 4, 2), dkdv=(32, 128, 8, 2), decode=(16, 64, 4, 2)),
    (2, 160): dict(forward=(128, 32, 8, 2), dq=(64, 32, 4, 2), dkdv=(32, 64, 8, 2), decode=(16, 32, 4, 3)),
    (4, 64):  dict(forward=(64, 32, 4, 2), dq=(64, 32, 4, 2), dkdv=(32, 64, 4, 2), decode=(16, 32, 4, 2)),
    (4, 160): dict(forward=(64, 32, 8, 1), dq=(32, 32, 4, 1), dkdv=(32, 32, 4, 1), decode=(16, 16, 4, 2)),
}
SHORT = 32                              # sequences up to this long are packed, several to a tile
SPLIT = 256                             # fewest keys that are worth a program of their own when decoding


def channels(hd):
    """Two powers of two, the second perhaps 0, that cover hd channels with the least padding."""
    whole = max(16, triton.next_power_of_2(hd))
    rest = max(16, triton.next_power_of_2(hd - whole // 2))
    return (whole, 0) if rest >= whole // 2 else (whole // 2, rest)


def tile(q, kernel):
    """The row of TILES for q's dtype and head dim."""
    size, D = q.element_size(), sum(channels(q.shape[-1]))
    return next(row[kernel] for (bytes, up_to), row in TILES.items() if bytes == size and D <= up_to)


def launch(kernel, grid, tensors, strided, numbers, tile, causal):
    """Run a kernel on tensors, the strides of some of them (without the last, which is 1) and numbers."""
    hd, strides, (BM, BN, warps, stages) = tensors[0].shape[-1], tuple(x.stride()[:-1] for x in strided), tile
    D1, D2 = channels(hd)
    with torch.cuda.device_of(tensors[0]):                      # Triton launches on the current GPU, wherever q lies
        kernel[grid](*tensors, strides, *numbers, hd ** -0.5 / math.log(2), HD=hd, D1=D1, D2=D2, BM=BM, BN=BN,
                     CAUSAL=causal, num_warps=warps, num_stages=stages, enable_fp_fusion=True)


def spans(segments, size):
    """First key that each block of `size` places may see and the one after its last, two of (B, blocks) int32."""
    if segments is None:
        return None, None
    T, edge = segments.shape[1], F.pad(segments[:, 1:] != segments[:, :-1], (1, 1), value=True)             # (B, T + 1)
    place = torch.arange(T + 1, device=segments.device, dtype=torch.int32)
    start = torch.where(edge, place, 0)[:, :-1].cummax(1).values                            # of each place's segment
    end = torch.where(edge, place, T)[:, 1:].flip(1).cummin(1).values.flip(1)
    return start[:, ::size].contiguous(), end[:, (place[:T:size] + size - 1).clamp(max=T - 1)]


def output(q):
    """Room for the result, heads of a token side by side in memory so that merging them is free."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)


class Fused(torch.autograd.Function):
    """forward_kernel, dq_kernel and dkdv_kernel as one differentiable operation. No gradient for bias and rel."""

    @staticmethod
    def forward(ctx, q, k, v, causal, bias, segments, rel):
        (B, nh, T, _), (nkv, S), o = q.shape, k.shape[1:3], output(q)
        lse, t = q.new_empty(B, nh, T, dtype=torch.float32), tile(q, "forward")
        bias = None if bias is None else bias.expand(B, nh, T, S)   # stride 0 where it does not vary
        segments = None if segments is None else segments.contiguous()
        tables = [*(r.contiguous() for r in rel), *(r.shape[-1] for r in rel)] or [None] * 4
        ctx.causal, ctx.sizes = causal, (nh, nh // nkv, T, S)
        ctx.extras = bias, None if bias is None else bias.stride(), *tables, segments
        launch(forward_kernel, (B * nh * triton.cdiv(T, t[0]), 1), (q, k, v, o, lse), (q, k, v, o[None]),
               (ctx.extras, spans(ctx.extras[-1], t[0]), *ctx.sizes, S), t, causal)
        ctx.save_for_backward(q, k, v, o, lse)
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, o, lse = ctx.saved_tensors
        do = do if do.stride(-1) == 1 else do.contiguous()
        dq, dk, dv, delta = (torch.empty_like(x) for x in (q, k, v, lse))
        rows, t = q.shape[0] * q.shape[1], tile(q, "dq")
        launch(dq_kernel, (rows * triton.cdiv(q.shape[2], t[0]),), (q, k, v, o, do, dq, lse, delta),
               (q, k, v, o, do, dq), (ctx.extras, spans(ctx.extras[-1], t[0]), *ctx.sizes), t, ctx.causal)
        rows, t = k.shape[0] * k.shape[1], tile(q, "dkdv")
        launch(dkdv_kernel, (rows * triton.cdiv(k.shape[2], t[1]),), (q, k, v, do, dk, dv, lse, delta),
               (q, k, v, do, dk, dv), (ctx.extras, spans(ctx.extras[-1], t[1]), *ctx.sizes), t, ctx.causal)
        return dq, dk, dv, None, None, None, None


def decode(q, k, v, bias=None):
    """q (B, nh, 1, hd), bias (B or 1, 1, 1, S): keys are split over enough programs to fill the chip, then joined."""
    (B, nh, _, hd), (nkv, S) = q.shape, k.shape[1:3]
    group, t, rows = nh // nkv, tile(q, "decode"), q.reshape(B, nkv, nh // nkv, hd)         # rows: queries of one head
    wanted = torch.cuda.get_device_properties(q.device).multi_processor_count * 2 if q.is_cuda else 4
    chunk = triton.cdiv(max(SPLIT, triton.cdiv(S, triton.cdiv(wanted, B * nkv))), t[1]) * t[1]
    n_split = triton.cdiv(S, chunk)
    parts, lse = (q.new_empty(n_split, B, nkv, group, n, dtype=torch.float32) for n in (hd, 1))
    extras = (None,) * 7 if bias is None else (x := bias.expand(B, nkv, group, S), x.stride(), *[None] * 5)
    launch(forward_kernel, (B * nkv * triton.cdiv(group, t[0]), n_split), (rows, k, v, parts, lse),
           (rows, k, v, parts), (extras, (None, None), nkv, 1, group, S, chunk), t, False)
    o, D, N = q.new_empty(B, nh, 1, hd), triton.next_power_of_2(hd), triton.next_power_of_2(n_split)
    with torch.cuda.device_of(q):
        join_kernel[(B * nh,)](parts, lse, o, n_split, B * nh, HD=hd, D=D, N=N, enable_fp_fusion=True)
    return o


def learns(*tensors):
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def triton_attention(q, k, v, *, causal=False, bias=None, segments=None, rel=()):
    """Our kernels, on a GPU. Torch takes what they do not: head dims above 160, float64, a bias or rel that learns."""
    if learns(bias, *rel) or q.shape[-1] > MAX_HEAD_DIM or q.element_size() == 8 or not (q.is_cuda or INTERPRETED):
        return torch_attention(q, k, v, causal=causal, bias=bias, segments=segments, rel=rel)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    (B, _, T, _), S, plain = q.shape, k.shape[2], segments is None and not rel
    if plain and T == 1 and (bias is None or bias.shape[1:3] == (1, 1)) and not learns(q, k, v):    # one for all heads
        return decode(q, k, v, bias)
    if plain and bias is None and T == S <= SHORT:                      # attention in time: thousands of samples
        q, k, v = (x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None] for x in (q, k, v))    # (1, nh, B * T, hd)
        segments = torch.arange(B * T, device=q.device, dtype=torch.int32)[None] // T
        o = Fused.apply(q, k, v, causal, None, segments, ())
        return o[0].transpose(0, 1).unflatten(0, (B, T)).transpose(1, 2)                    # (B, nh, T, hd)
    return Fused.apply(q, k, v, causal, bias, segments, rel)


# ---- The switch

INTERPRETED = triton is not None and triton.knobs.runtime.interpret     # TRITON_INTERPRET=1: on a CPU, slowly
BACKENDS = {"reference": reference_attention, "torch": torch_attention, "triton": triton_attention}
backend = "triton" if triton and torch.cuda.is_available() else "torch"   # tests set it; models never look at it


def attention(q, k, v, *, causal=False, bias=None, segments=None, rel=()):
    """Attend with the chosen backend. Returns (B, nh, T, hd) in q's dtype.

    q (B, nh, T, hd), k and v (B, nkv, S, hd) with nkv dividing nh. causal: query t sees keys up to S - T + t.
    bias: floats (B or 1, nh or 1, T or 1, S), added to the scores.
    segments (B, T) int32, T = S: samples packed one after another, each a run of one number that sees only itself.
    rel: SAM's tables (B, nh, T, H) and (B, nh, T, W), S = H * W; rel_h[..., s // W] + rel_w[..., s % W] is added.
    """
    (B, nh, T, _), (nkv, S) = q.shape, k.shape[1:3]
    if nh % nkv:
        raise ValueError(f"{nh} query heads cannot share {nkv} key/value heads")
    if causal and T > S:
        raise ValueError(f"causal attention of {T} queries to {S} keys leaves the first queries without any")
    if segments is not None and not segments.shape == (B, T) == (B, S):
        raise ValueError(f"segments {tuple(segments.shape)} must be (B, T) = {B, T} with as many keys, here {S}")
    if rel and (bias is not None or nh != nkv or S != rel[0].shape[-1] * rel[1].shape[-1]):
        raise ValueError(f"rel needs {rel[0].shape[-1]} x {rel[1].shape[-1]} keys, not {S}, nkv = nh and no bias")
    return BACKENDS[backend](q, k, v, causal=causal, bias=bias, segments=segments, rel=rel)
