"""Scaled dot-product attention, the one operation every tower of this code shares.

In order: the plain reference, torch's fused call, the switch between them.
Letters: B batch, nh query heads, nkv key/value heads, T queries, S keys, hd head dim.
Maths: Vaswani et al. 2017; grouped queries (nkv < nh): Ainslie et al. 2023.
"""
import torch
import torch.nn.functional as F


def causal_mask(T, S, device):
    """(T, S) bool, True where query t may see key s. The last query sees every key, so a cache may be longer than T."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


# ---- Reference

def reference_attention(q, k, v, *, causal=False, bias=None):
    """The formula, softmax(q k^T / sqrt(hd) + bias) v, in float32 or better. Slow and obvious: the tests lean on it."""
    B, nh, T, hd = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.to(wide).repeat_interleave(nh // x.shape[1], dim=1) for x in (k, v))      # (B, nh, S, hd)
    scores = q.to(wide) @ k.transpose(-2, -1) * hd ** -0.5                              # (B, nh, T, S)
    if bias is not None:
        scores = scores + bias
    if causal:
        scores = scores.masked_fill(~causal_mask(T, k.shape[2], q.device), -torch.inf)
    return (scores.softmax(-1) @ v).to(q.dtype)                                         # (B, nh, T, hd)


# ---- Torch

def torch_attention(q, k, v, *, causal=False, bias=None):
    """torch's fused kernels. Its is_causal aligns to the first key, ours to the last, so a mask is built where they differ."""
    T, S = q.shape[2], k.shape[2]
    if causal and T > 1 and (T != S or bias is not None):
        mask = causal_mask(T, S, q.device)
        bias = mask if bias is None else bias.masked_fill(~mask, -torch.inf)
        causal = False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal and T > 1,
                                          enable_gqa=q.shape[1] != k.shape[1])


# ---- The switch

BACKENDS = {"reference": reference_attention, "torch": torch_attention}
backend = "torch"                       # tests set this to "reference"; models never look at it


def attention(q, k, v, *, causal=False, bias=None):
    """Attend with the chosen backend.

    q (B, nh, T, hd), k and v (B, nkv, S, hd) with nkv dividing nh; bias broadcasts to (B, nh, T, S) and is added to
    the scores. causal: query t sees keys up to S - T + t. Returns (B, nh, T, hd) in q's dtype.
    """
    return BACKENDS[backend](q, k, v, causal=causal, bias=bias)
