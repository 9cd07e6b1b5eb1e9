"""The assembled model: readers put vectors into a LLaMA at placeholder tokens, writers take them out at signal tokens.

In order: configs and presets, LLaMA (RoPE, LoRA, KV cache, blocks), readers, writers, Model, generation, load and save.
Letters: B batch, T tokens, C width, nh heads, nkv key/value heads, hd head dim, V vocabulary, M media, n tokens each.
Papers: LLaMA (Touvron et al. 2023), RoPE (Su et al. 2021), LoRA (Hu et al. 2021), LLaVA (Liu et al. 2023),
NExT-Chat (Zhang et al. 2023), ChatterBox (Tian et al. 2024), NExT-GPT (Wu et al. 2023).
Layout is that of the public checkpoints: separate q, k, v and half-rotation RoPE, so converting them only renames.
"""
import ctypes
import json
import math
import os
import re
import shutil
import sys
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import NamedTuple, get_args, get_origin

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch.overrides import TorchFunctionMode

from attention import attention
from generate import OutputProjection, Painter, PainterConfig, ProjectionConfig, channels_last
from locate import (BoxHead, DeformableAttention, Locator, LocatorConfig, RegionConfig, RegionEncoder, best_box,
                    box_loss, cycle_loss, loc_encoder, locator_losses, mask_losses)
from quantize import join, quantize as quantize_llm
from vision import (HUGE, CLIPConfig, CLIPVision, ImageBind, ImageBindConfig, SAMConfig, TowerConfig, merge_heads,
                    split_heads)

FORMAT = 1                              # of weights folders; load() refuses a newer one
BIG = 2 << 30                           # bytes of weights, see usual_dtype
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
CODES = {dtype: code for code, dtype in DTYPES.items()}         # of safetensors


# ---- Configs and presets

@dataclass(frozen=True)
class LLMConfig:                        # defaults: Vicuna-7B v1.5
    dim: int = 4096                     # C, width of the residual stream
    n_layer: int = 32
    n_head: int = 32
    n_kv_head: int = 32                 # fewer than n_head = grouped queries
    mlp_dim: int = 11008
    vocab_size: int = 32000             # rows of the embedding, added tokens included
    norm_eps: float = 1e-5
    max_len: int = 4096                 # tokens the positions were trained for
    rope_theta: float = 10000.0
    rope_factor: float = 1.0            # Llama-3 scaling: stretch of the low frequencies; 1 = none
    rope_low: float = 1.0               # wavelengths above rope_train_len / rope_low are stretched in full,
    rope_high: float = 4.0              # those below rope_train_len / rope_high not at all
    rope_train_len: int = 8192
    tied: bool = False                  # lm_head shares the embedding's matrix
    head_dim: int = 0                   # 0 = dim / n_head
    lora_rank: int = 0                  # 0 = plain Linear
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    lora_targets: str = "wq wk wv wo"   # which of wq wk wv wo gate up down carry LoRA

    @property
    def hd(self):                       # channels of a head
        return self.head_dim or self.dim // self.n_head


@dataclass(frozen=True)
class ModelConfig:
    llm: LLMConfig | None = None        # None = a folder that holds only an encoder
    imagebind: ImageBindConfig | None = None
    clip: CLIPConfig | None = None
    sam: SAMConfig | None = None        # of the <at> writer; None = boxes without masks
    region: RegionConfig | None = None
    locator: LocatorConfig | None = None
    projections: dict[str, ProjectionConfig] = field(default_factory=dict)      # of writers that prompt diffusion
    projector_depth: int = 1            # of the CLIP reader: Linear, then depth - 1 times GELU and Linear
    reads: dict[str, str] = field(default_factory=dict)     # media kind -> reader
    writes: dict[str, tuple[str, ...]] = field(default_factory=dict)    # writer -> its signal tokens, in order
    system: str = "plain"               # row of data.SYSTEMS: special tokens, templates
    template: str = ""                  # row of data.TEMPLATES; empty = the system's own
    bos: int = 1
    eos: tuple[int, ...] = (2,)
    added_tokens: dict[str, int] = field(default_factory=dict)
    media: dict = field(default_factory=dict)               # fields of data.MediaSpec that differ from its defaults
    quantized: str = ""                 # int8 or int4: the LLM's matrices as quantize.py keeps them; empty = floats

    def n_token(self, kind):
        """Placeholder tokens that one medium of this kind takes. ValueError if the model reads none."""
        if kind not in self.reads:
            raise ValueError(f"this model reads no {kind}")
        if self.reads[kind] == "imagebind":
            return self.imagebind.n_token(TOWERS.get(kind, kind))
        return self.clip.n_patch if self.reads[kind] == "clip" else 1

    def signal(self, writer):
        """Ids of a writer's signal tokens, in order."""
        return [self.added_tokens[token] for token in self.writes[writer]]


TOWERS = {"image": "vision", "video": "vision"}         # kinds that share a tower of ImageBind; others have their own
IMAGEBIND_READS = {kind: "imagebind" for kind in ("image", "video", "audio", "depth", "thermal", "imu")}
LLAMA_13B = LLMConfig(dim=5120, n_layer=40, n_head=40, n_kv_head=40, mlp_dim=13824)
VICUNA_V0 = LLMConfig(norm_eps=1e-6, max_len=2048, vocab_size=32001)
CHATBIND_TOKENS = {"[PAD]": 32000, "<im_patch>": 32001, "<im_start>": 32002, "<im_end>": 32003}
TINY = ModelConfig(
    llm=LLMConfig(dim=192, n_layer=6, n_head=3, n_kv_head=3, mlp_dim=512, vocab_size=605, max_len=1024, rope_theta=1e6,
                  tied=True),
    imagebind=ImageBindConfig(
        towers={"vision": TowerConfig(128, 1, 2, 3, (2, 64, 64), (2, 8, 8), stem_norm=False, pre_norm=True,
                                      bias_kv=False, scale=False, early=(64, 128, 192)),
                "audio": TowerConfig(96, 4, 2, 1, (64, 204), (64, 12))},
        out_dim=192, patches=True),
    sam=SAMConfig(128, 8, 64, 3, 2, 128, window=4, global_layers=(1,), prompt_dim=32, dec_head=2, dec_mlp_dim=64,
                  iou_dim=32),
    system="tiny", writes={"at": ("<at>",)},
    reads={"image": "imagebind", "video": "imagebind", "audio": "imagebind", "box": "box"},
    added_tokens={"<im_patch>": 600, "<im_start>": 601, "<im_end>": 602, "<at>": 603, "<boxes>": 604},
    media=dict(image_size=64, square=True, sam_size=128, video_clips=2, video_crops=1, mel_bins=64, audio_clips=1))

CHATTERBOX_TOKENS = {"[VG]": 32000, "<im_patch>": 32001, "<im_start>": 32002, "<im_end>": 32003, "<bbox>": 32004}
NEXTCHAT_TOKENS = {"<im_patch>": 32000, "<im_start>": 32001, "<im_end>": 32002, "<at>": 32003, "<boxes>": 32004}
NEXTCHAT = ModelConfig(
    llm=LLMConfig(vocab_size=32005), clip=CLIPConfig(), sam=SAMConfig(), projector_depth=2, system="nextchat",
    reads={"image": "clip", "box": "box"}, writes={"at": ("<at>",)}, added_tokens=NEXTCHAT_TOKENS,
    media=dict(image_size=336, square=True, sam_size=1024))
NEXTCHAT_224 = replace(NEXTCHAT, clip=CLIPConfig(image_size=224), media=NEXTCHAT.media | {"image_size": 224})

SIGNALS = {name: tuple(f"[{name.upper()}{i}]" for i in range(n)) for name, n in (("img", 4), ("vid", 24), ("aud", 8))}
NEXTGPT_TAGS = "{'<Img>'}", "{'</Img>'}"                # parity: as published, so <Img> in a prompt is ordinary text
NEXTGPT_TOKENS = {token: 32000 + i for i, token in enumerate(sum(SIGNALS.values(), NEXTGPT_TAGS))}
NEXTGPT = ModelConfig(
    llm=replace(VICUNA_V0, vocab_size=32038, lora_rank=32, lora_dropout=0.1), system="nextgpt", writes=SIGNALS,
    imagebind=ImageBindConfig({"vision": HUGE["vision"], "audio": replace(HUGE["audio"], scale=False)}),    # parity
    reads={kind: "imagebind" for kind in ("image", "video", "audio")}, added_tokens=NEXTGPT_TOKENS,
    projections={"img": ProjectionConfig(), "vid": ProjectionConfig(n_signal=24, out_dim=1024),
                 "aud": ProjectionConfig(n_signal=8, n_query=1, out_dim=512)})

OMNI_TOKENS = {token: 32000 + i for i, token in enumerate(
    ("<im_patch>", "<im_start>", "<im_end>", "<at>", "<boxes>", "[VG]", *sum(SIGNALS.values(), ())))}
OMNI = replace(                         # every reader and writer at once, which no published system has
    NEXTCHAT, llm=LLMConfig(vocab_size=32000 + len(OMNI_TOKENS)), imagebind=ImageBindConfig(), system="omni",
    region=RegionConfig(out_dim=4096), locator=LocatorConfig(), projections=NEXTGPT.projections,
    added_tokens=OMNI_TOKENS, reads=IMAGEBIND_READS | {"image": "clip", "box": "box", "region": "region"},
    writes={"at": ("<at>",), "vg": ("[VG]",)} | SIGNALS, media=NEXTCHAT.media | {"clip_size": 224, "det_size": 512})

PRESETS = {
    "vicuna-7b-v1.5": ModelConfig(llm=LLMConfig()),
    "vicuna-7b-v0": ModelConfig(llm=VICUNA_V0),
    "llama-2-13b": ModelConfig(llm=LLAMA_13B),
    "clip-vit-l-14": ModelConfig(clip=CLIPConfig(image_size=224), reads={"image": "clip"}),
    "clip-vit-l-14-336": ModelConfig(clip=CLIPConfig(), reads={"image": "clip"}),
    "imagebind-huge": ModelConfig(imagebind=ImageBindConfig(), reads=IMAGEBIND_READS),
    "chatbind-7b": ModelConfig(llm=replace(VICUNA_V0, vocab_size=32004), imagebind=ImageBindConfig(), system="chatbind",
                               reads=IMAGEBIND_READS, added_tokens=CHATBIND_TOKENS),
    "nextchat-7b-336": NEXTCHAT,
    "nextchat-7b-224": NEXTCHAT_224,
    "nextchat-13b-224": replace(NEXTCHAT_224, llm=replace(LLAMA_13B, vocab_size=32005)),
    "chatterbox-13b": ModelConfig(
        llm=replace(LLAMA_13B, vocab_size=32005, lora_rank=16, lora_alpha=16, lora_dropout=0.05, lora_targets="wq wv"),
        clip=CLIPConfig(image_size=224), region=RegionConfig(), locator=LocatorConfig(), system="chatterbox",
        reads={"image": "clip", "region": "region"}, writes={"vg": ("[VG]",)}, added_tokens=CHATTERBOX_TOKENS,
        media=dict(det_size=512)),
    "nextgpt-7b-tiva": NEXTGPT,
    "omni-7b": OMNI,
    "tiny": TINY,
}


# ---- LLaMA

def rope_table(cfg, length, device):
    """cos and sin (length, hd) of every position, float32; Llama-3's scaling blends stretched and plain frequencies."""
    freqs = cfg.rope_theta ** -(torch.arange(0, cfg.hd, 2, device=device).float() / cfg.hd)         # (hd / 2)
    if cfg.rope_factor != 1:
        turns = cfg.rope_train_len * freqs / (2 * math.pi)
        plain = ((turns - cfg.rope_low) / (cfg.rope_high - cfg.rope_low)).clamp(0, 1)
        freqs = freqs * plain + freqs / cfg.rope_factor * (1 - plain)
    angles = torch.outer(torch.arange(length, device=device).float(), freqs).repeat(1, 2)   # (length, hd)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Half-rotation RoPE: channel j turns with j + hd / 2. x (B, nh, T, hd), cos and sin (T, hd) or (B, 1, T, hd)."""
    a, b = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-b, a], dim=-1) * sin.to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)      # parity: rounded before


class Linear(nn.Linear):
    """W x. On a CPU the one row of a decoding step goes through mv, which reads weights faster than a product does, and
    the rows of a short prompt as W x^T, for which bfloat16 weights stay as they lie: x W^T would rearrange them all."""

    def __init__(self, n_in, n_out, device=None):
        super().__init__(n_in, n_out, bias=False, device=device)

    def forward(self, x):
        rows, few = x.numel() // self.in_features, 256 if x.dtype == torch.bfloat16 else 1
        if rows > few or x.device.type != "cpu" or torch.is_grad_enabled():
            return super().forward(x)
        y = self.weight @ x.flatten() if rows == 1 else (self.weight @ x.flatten(0, -2).T).T                # (rows, N)
        return y.view(*x.shape[:-1], self.out_features)     # lies as (N, rows), which the next product likes


def linear_of(weight):
    """The Linear of a matrix (n_out, n_in)."""
    layer = Linear(weight.shape[1], len(weight), device="meta")
    layer.weight = nn.Parameter(weight)
    return layer


class LoRALinear(Linear):
    """A Linear that owns its low-rank update: W x + alpha / rank * B A x. The base weight keeps its name and path."""

    def __init__(self, n_in, n_out, rank, alpha, dropout=0.0):
        super().__init__(n_in, n_out)
        self.lora_A, self.lora_B = nn.Parameter(torch.zeros(rank, n_in)), nn.Parameter(torch.zeros(n_out, rank))
        self.scale, self.dropout = alpha / rank, nn.Dropout(dropout)

    def forward(self, x):
        return super().forward(x) + self.scale * F.linear(F.linear(self.dropout(x), self.lora_A), self.lora_B)

    def merge(self):
        """The plain Linear with the update folded in."""
        return linear_of(self.weight + self.scale * self.lora_B @ self.lora_A)


def linear(cfg, name, n_in, n_out):
    """The Linear called `name`, with LoRA where the config asks for it."""
    if cfg.lora_rank and name in cfg.lora_targets.split():
        return LoRALinear(n_in, n_out, cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout)
    return Linear(n_in, n_out)


class KVCache:
    """Static keys and values of all layers, (n_layer, B, nkv, max_len, hd). The first `pos` places are filled."""

    def __init__(self, llm, batch, max_len):
        cfg = llm.cfg
        self.k = llm.embed.weight.new_empty(cfg.n_layer, batch, cfg.n_kv_head, max_len, cfg.hd)
        self.v, self.pos, self.max_len = torch.empty_like(self.k), 0, max_len

    def append(self, layer, k, v):
        """Write (B, nkv, T, hd) behind what layer `layer` holds; returns views of all its keys and values."""
        end = self.pos + k.shape[2]
        self.k[layer, :, :, self.pos:end], self.v[layer, :, :, self.pos:end] = k, v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def reorder(self, rows):
        """Row r continues what row rows[r] held (beam search)."""
        pos = self.pos
        self.k[:, :, :, :pos], self.v[:, :, :, :pos] = self.k[:, rows, :, :pos], self.v[:, rows, :, :pos]


class Attention(nn.Module):
    def __init__(self, cfg, layer):
        super().__init__()
        self.layer, self.n_head, self.n_kv_head = layer, cfg.n_head, cfg.n_kv_head
        self.wq = linear(cfg, "wq", cfg.dim, cfg.n_head * cfg.hd)
        self.wk = linear(cfg, "wk", cfg.dim, cfg.n_kv_head * cfg.hd)
        self.wv = linear(cfg, "wv", cfg.dim, cfg.n_kv_head * cfg.hd)
        self.wo = linear(cfg, "wo", cfg.n_head * cfg.hd, cfg.dim)
        self.wqkv = None                                    # wq, wk and wv in one, after fuse()

    def forward(self, x, rope, cache, **hides):
        nh, nkv = self.n_head, self.n_kv_head
        x = self.wqkv(x) if self.wqkv else torch.cat([self.wq(x), self.wk(x), self.wv(x)], dim=-1)
        qk, v = split_heads(x.contiguous(), nh + 2 * nkv).split([nh + nkv, nkv], dim=1)
        q, k = rotate(qk, *rope).split([nh, nkv], dim=1)                                    # (B, nh or nkv, T, hd)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)                                           # (B, nkv, S, hd)
        return self.wo(merge_heads(attention(q, k, v, causal=True, **hides)))


class SwiGLU(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.gate = linear(cfg, "gate", cfg.dim, cfg.mlp_dim)
        self.up = linear(cfg, "up", cfg.dim, cfg.mlp_dim)
        self.down = linear(cfg, "down", cfg.mlp_dim, cfg.dim)
        self.gate_up = None                                 # gate and up in one, after fuse()

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1) if self.gate_up else (self.gate(x), self.up(x))
        return self.down(F.silu(gate) * up)


def as_multiplied(x):
    """x in the type of autocast's products: one copy to keep for the backward pass, where each would make its own."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class LLMBlock(nn.Module):
    def __init__(self, cfg, layer):
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(cfg.dim, cfg.norm_eps), Attention(cfg, layer)
        self.mlp_norm, self.mlp = RMSNorm(cfg.dim, cfg.norm_eps), SwiGLU(cfg)

    @torch.no_grad()
    def aim(self):
        """Start as a look-up by content: a query agrees with keys of vectors like its own, and what is found comes back
        as it was (Trockman & Kolter 2023, Mimetic initialization of self-attention layers)."""
        attn, (nh, nkv) = self.attn, (self.attn.n_head, self.attn.n_kv_head)
        nn.init.orthogonal_(attn.wk.weight)
        nn.init.orthogonal_(attn.wv.weight)
        k, v = (layer.weight.unflatten(0, (nkv, -1)).repeat_interleave(nh // nkv, 0).flatten(0, 1)      # a row of heads
                for layer in (attn.wk, attn.wv))
        for weight, same in (attn.wq.weight, k), (attn.wk.weight, attn.wk.weight):
            weight.copy_((same + 0.5 * torch.randn_like(same) * same.shape[1] ** -0.5) / 1.25 ** 0.5)
        attn.wo.weight.copy_(v.T * (0.5 * nkv / nh))
        self.mlp.down.weight.mul_(0.2)

    def forward(self, x, rope, cache, **hides):
        x = x + self.attn(as_multiplied(self.attn_norm(x)), rope, cache, **hides)
        return x + self.mlp(as_multiplied(self.mlp_norm(x)))


def places(segments):
    """Position of every token in its own segment, (B, T) int -> (B, T)."""
    at = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    first = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    return at - (at * first).cummax(1).values


class LLM(nn.Module):
    """LLaMA. A call takes embeddings (B, T, C) and gives normalised hidden states (B, T, C)."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.rope = cfg, 2 * [torch.empty(0)]     # a table of positions, made when first asked for
        self.embed = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.blocks = nn.ModuleList(LLMBlock(cfg, i) for i in range(cfg.n_layer))
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.lm_head = Linear(cfg.dim, cfg.vocab_size)
        if cfg.tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, x, cache=None, attn_mask=None, segments=None):
        """attn_mask (B, T) bool hides padding that is not on the right; positions count on through it. segments (B, T)
        int: rows packed from several samples; a token sees its own segment, and counts from its start."""
        start = 0 if cache is None else cache.pos
        rope, bias = self.positions(start, start + x.shape[1], x), None                     # (T, hd) each
        if segments is not None:
            rope = [table[places(segments)][:, None] for table in rope]                     # (B, 1, T, hd)
        if attn_mask is not None:
            bias = x.new_zeros(attn_mask.shape).masked_fill(~attn_mask, torch.finfo(x.dtype).min)
            bias = bias[:, None, None]                                                      # (B, 1, 1, T)
        x = self.layers(x, rope, cache, bias=bias, segments=segments)
        if cache is not None:
            cache.pos += x.shape[1]
        return x

    def layers(self, x, rope, cache, **hides):
        for block in self.blocks:
            x = block(x, rope, cache, **hides)
        return self.norm(x)

    def positions(self, start, end, x):
        """cos and sin (end - start, hd) in x's type; the table is made once, and again when it must grow or move."""
        if len(self.rope[0]) < end or self.rope[0].device != x.device:
            with torch.inference_mode(False):           # a model that has spoken may learn
                self.rope = rope_table(self.cfg, max(end, self.cfg.max_len), x.device)
        return [table[start:end].to(x.dtype) for table in self.rope]


# ---- Readers
# reader(kind, payload, model) gives the embeddings (M, n, C) of M media of one kind.

class ImageBindReader(nn.Module):
    """One medium -> ImageBind -> Linear -> n soft tokens. All kinds share the projector."""

    def __init__(self, cfg, dim):
        super().__init__()
        self.tower = ImageBind(cfg)
        self.projector = nn.Linear(cfg.out_dim, dim) if dim else nn.Identity()

    def forward(self, kind, x, model):
        return self.projector(self.tower(TOWERS.get(kind, kind), x))                        # (M, n, C)


class CLIPReader(nn.Module):
    """Image -> CLIP patch features -> Linear, or more of them with GELU between -> one soft token per patch."""

    def __init__(self, cfg, dim, depth=1):
        super().__init__()
        self.tower, layers = CLIPVision(cfg), [nn.Linear(cfg.dim, dim) if dim else nn.Identity()]
        for _ in range(depth - 1):
            layers += nn.GELU(), nn.Linear(dim, dim)
        self.projector = nn.Sequential(*layers) if depth > 1 else layers[0]

    def forward(self, kind, x, model):
        """x: pictures (M, 3, H, W), or the levels that a RegionReader made of them, of which this is the deepest."""
        return self.projector(self.tower(x) if torch.is_tensor(x) else x[-1])               # (M, N, C)


class BoxReader(nn.Sequential):
    """Box (xyxy in 0..1 of the square picture) -> one soft token."""

    def __init__(self, dim):
        super().__init__(*loc_encoder(dim))

    def forward(self, kind, boxes, model):
        return super().forward(boxes)[:, None]                                              # (M, 1, C)


class RegionReader(RegionEncoder):
    """Boxes (R, 4) xyxy in 0..1, each of one of the pictures, which come as levels -> one soft token per box."""

    def levels(self, image, model):
        """What CLIP sees in pictures (M, 3, H, W) at several depths, shallow to deep: (M, N, C) each."""
        clip = model.readers["clip"].tower
        wanted = range(clip.cfg.n_layer - 1, 0, -3)[:self.cfg.n_level]
        return [x[:, 1:] for i, x in enumerate(clip.hidden_states(image)) if i in wanted]

    def forward(self, kind, payload, model):
        levels = payload["image"]
        boxes = [payload["boxes"][payload["image_of"] == i] for i in range(len(levels[0]))]
        return super().forward(levels, boxes)[:, None]                                      # (R, 1, C)


# ---- Writers
# writer.write(h, model, ...) gives its output for hidden states h of its signal tokens, writer.loss(h, target, model)
# its losses. `shift`: h is taken so many places further on. `feeds`: what follows the signal token is fed in as
# writer.feed(h, model), not as the embedding of its id.

class BoxWriter(BoxHead):
    """<at> -> box, and with SAM its mask; the box, encoded again, is the next input (NExT-Chat's pix2emb)."""
    shift, feeds = 0, True

    def feed(self, h, model):
        return model.read("box", self(h))                                                   # (m, C) -> (m, 1, C)

    def write(self, h, model, image=None):
        """h (m, C), image (1 or m, 3, S, S) for SAM -> boxes (m, 4), mask logits (m, 1, S, S), predicted IoU (m, 1)."""
        masks = self.masks(h, self.sam.encode(image)) if image is not None else (None, None)
        return self(h), *masks

    def loss(self, h, target, model):
        """Of masks (m, 1, S, S) where the target has them, else of boxes (m, 4) and the cycles box -> vector -> box."""
        if "masks" in target:
            return mask_losses(*self.masks(h, self.sam.encode(target["image"])), target["masks"])
        encode, boxes = (lambda b: model.read("box", b)[:, 0]), self(h)
        mock = "mock" in target
        return box_loss(boxes, target["boxes"], mock) | cycle_loss(encode, self, h, boxes, target["given"], mock)


class LocatorWriter(nn.Module):
    """[VG] -> the query with which GroundingDINO looks for a box in the picture (ChatterBox)."""
    shift, feeds = -1, False            # parity: the hidden state before [VG], as if it had been predicted

    def __init__(self, dim, locator):
        super().__init__()
        self.query = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, locator.dim))
        self.locator = Locator(locator)

    def write(self, h, model, image):
        """h (m, C), image (m, 3, S, S) -> the best box of each, xyxy (m, 4) in 0..1, and its probability (m,)."""
        return best_box(self.locator(image, self.query(h)[:, None])[-1])

    def loss(self, h, target, model):
        """Of one box each, (m, 4) cxcywh in 0..1 of image (m, 3, S, S)."""
        return locator_losses(self.locator(target["image"], self.query(h)[:, None]), target["boxes_cxcywh"][:, None])


class SignalWriter(nn.Module):
    """A run of n signal tokens -> the prompt that a diffusion model's own text tower would have made (NExT-GPT)."""
    shift, feeds = 0, False

    def __init__(self, name, cfg):
        super().__init__()
        self.name, self.proj = name, OutputProjection(cfg)

    def write(self, h, model):
        """h (m * n, C): the states of m complete runs -> prompts (m, n_query, out_dim)."""
        signal = torch.tensor(model.cfg.signal(self.name), device=h.device)                 # (n,)
        return self.proj(h.unflatten(0, (-1, len(signal))), model.llm.embed(signal))

    def loss(self, h, target, model):
        """Mean distance to what the text tower makes of the captions: embeds (m, n_query, out_dim), or (m, out_dim)."""
        prompts, embeds = self.write(h, model), target["embeds"]
        if embeds[0].numel() != prompts[0].numel():
            raise ValueError(f"{self.name}: caption embeddings of {list(embeds.shape[1:])}, but prompts here are "
                             f"{list(prompts.shape[1:])}; use those of the diffusion model that this writer prompts")
        return {"l2": (prompts - embeds.view_as(prompts)).float().norm(dim=-1).mean()}


# ---- Model

class HeadLoss(torch.autograd.Function):
    """Summed cross-entropy of labels (n,) after h (n, C) times weight (V, C), `chunk` rows at a time: logits never fill
    memory, and as their gradients are made beside them, none is computed again (Hsu et al. 2024, Liger)."""

    @staticmethod
    def forward(ctx, h, weight, labels, chunk):
        kind, grad_h, grad_weight = h.device.type, *ctx.needs_input_grad[:2]
        w = weight.to(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else h.dtype)
        dh = torch.empty_like(h) if grad_h else None
        dw, total = torch.zeros_like(weight) if grad_weight else None, 0
        for at in torch.arange(len(h), device=h.device).split(chunk):
            x, label = h[at].to(w.dtype), labels[at, None]
            log_p = (x @ w.T).float().log_softmax(-1)                                       # (chunk, V)
            total = total - log_p.gather(1, label).sum()
            if any(ctx.needs_input_grad):       # of a logit: its probability, less 1 at the label
                d = log_p.exp_().scatter_add_(1, label, -torch.ones_like(label, dtype=log_p.dtype)).to(w.dtype)
            if grad_h:
                dh[at] = (d @ w).to(dh.dtype)
            if grad_weight:
                dw += d.T @ x
        ctx.grads = dh, dw
        return total

    @staticmethod
    def backward(ctx, scale):
        grads, ctx.grads = ctx.grads, None                      # scaled in place, so good for one pass
        return *(d if d is None else d.mul_(scale) for d in grads), None, None


def lm_loss(lm_head, h, labels, chunk=512):
    """Mean cross-entropy of the next token; only labelled places (not -100) reach the vocabulary."""
    keep = labels[:, 1:] != -100
    h, labels = h[:, :-1][keep], labels[:, 1:][keep]                                        # (n, C), (n,)
    return HeadLoss.apply(h, lm_head.weight, labels, chunk) / len(h)


def box_share(boxes, n):
    """Boxes (R, 4) xyxy in 0..1 -> share of each that lies in each of the n patches of its square picture, (R, n)."""
    side = math.isqrt(n)
    start = torch.arange(side, device=boxes.device) / side
    low, high = boxes[..., None].float().split(2, dim=1)                                    # (R, 2, 1)
    covers = (torch.minimum(high, start + 1 / side) - torch.maximum(low, start)).clamp(min=1e-6)        # (R, 2, side)
    share = (covers[:, 1, :, None] * covers[:, 0, None]).flatten(1)                         # rows of patches first
    return share / share.sum(1, keepdim=True)


class Model(nn.Module):
    """Readers, LLM, writers. Nothing here names a system: a preset says which parts exist, what they read or write."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        dim = cfg.llm and cfg.llm.dim
        self.llm = LLM(cfg.llm) if cfg.llm else None
        self.readers, self.writers = nn.ModuleDict(), nn.ModuleDict()
        if cfg.imagebind:
            self.readers["imagebind"] = ImageBindReader(cfg.imagebind, dim)
        if cfg.clip:
            self.readers["clip"] = CLIPReader(cfg.clip, dim, cfg.projector_depth)
        if "box" in cfg.reads:
            self.readers["box"] = BoxReader(dim)
        if cfg.region:
            self.readers["region"] = RegionReader(cfg.region)
        if "at" in cfg.writes:
            self.writers["at"] = BoxWriter(dim, cfg.sam)
        if cfg.locator:
            self.writers["vg"] = LocatorWriter(dim, cfg.locator)
        for name, proj in cfg.projections.items():
            self.writers[name] = SignalWriter(name, proj)
        self.feeds = {cfg.added_tokens[cfg.writes[name][0]]: w for name, w in self.writers.items() if w.feeds}

    def read(self, kind, payload):
        """Embeddings (M, n, C) that M media of one kind put into the prompt."""
        return self.readers[self.cfg.reads[kind]](kind, payload, self)

    def embed(self, ids, media, slots):
        """Token embeddings (B, T, C) with each medium written over its placeholders. ids (B, T); media {kind: stacked
        payloads of M media}; slots {kind: rows and columns, (2, M * n)}."""
        x = self.llm.embed(ids)
        if "region" in media:           # CLIP looks once, for the pictures and for the regions in them
            levels = self.readers["region"].levels(media["image"], self)
            media = media | {"image": levels, "region": media["region"] | {"image": levels}}
        for kind, payload in media.items():
            new = self.read(kind, payload).flatten(0, 1).to(x.dtype)                        # (M * n, C)
            x = x.index_put(tuple(slots[kind]), new)
        return x

    def next_embeds(self, new, fed, h):
        """Embeddings (B, 1, C) of new ids (B, 1). fed (B,): the ids fed last; h (B, C): the hidden states they gave."""
        x = self.llm.embed(new)         # behind a signal that feeds, its output takes the place of any id (NExT-Chat)
        for signal, writer in self.feeds.items():
            if (here := fed == signal).any():
                x = torch.where(here[:, None, None], writer.feed(h, self), x)
        return x

    def box_words(self, x, row, batch):
        """What is seen in R boxes of pictures x (M, n, C), of these rows (M,) of a batch: in all of each box and in one
        patch of it, (R, C) both; the words up to the next box, (R, T); losses of the box, told from either."""
        boxes, (at, start), T = batch.media["box"], batch.slots["box"], batch.labels.shape[1]
        share, of = box_share(boxes, x.shape[1]), (at[:, None] > row).sum(1)                # of: number of its picture
        # The patch, so that every patch knows what it is of, is drawn by the box's own digits: alike on any rank.
        odds = share.square().cumsum(1)
        drawn = (odds < odds[:, -1:] * (1e3 * boxes.float().sum(1, keepdim=True) % 1)).sum(1)
        one = F.one_hot(drawn, x.shape[1]).to(share)
        whole, part = ((look[:, None].to(x.dtype) @ x[of])[:, 0] for look in (share, one))
        told = self.writers["at"](self.llm.norm(torch.cat([whole, part])))                  # as from the last block
        losses = {f"at_{name}": loss for name, loss in box_loss(told, torch.cat([boxes, boxes])).items()}
        end = torch.where(F.pad(at[1:] == at[:-1], (0, 1)), start.roll(-1), T)              # next box of the row
        place = torch.arange(T, device=at.device)
        inside = (place >= start[:, None]) & (place < end[:, None])
        return (whole, part), batch.labels[at].where(inside, -100), losses

    def word_loss(self, batch):
        """Which words a caption has, told from its medium alone: features, averaged, against the vocabulary."""
        # A new encoder learns by this what things look like, without waiting for a language model that learns where to
        # look (Joulin et al. 2016, Learning visual features from large weakly supervised data).
        seen, labels, losses = [], [], {}
        for kind in [kind for kind in batch.media if kind != "box"]:
            x = self.read(kind, batch.media[kind])                                          # (M, n, C)
            row = batch.slots[kind][0, ::x.shape[1]]                                        # (M,)
            boxed = kind == "image" and "box" in batch.media
            alone = ~torch.isin(row, batch.slots["box"][0]) if boxed else slice(None)
            seen.append(x.mean(1)[alone])
            labels.append(batch.labels[row[alone]])                                         # (M, T)
            if boxed:
                parts, words, losses = self.box_words(x, row, batch)
                seen += parts
                labels += [words, words]
        logits, labels = self.llm.lm_head(self.llm.norm(torch.cat(seen))).float(), torch.cat(labels)
        row, column = (labels != -100).nonzero(as_tuple=True)
        words = labels[row, column]
        share = 1 / words.bincount(minlength=logits.shape[1])[words]                        # rare ones count as much
        loss = F.cross_entropy(logits[row], words, reduction="none")
        return {"words": (loss * share).sum() / share.sum()} | losses

    def forward(self, batch, words=False):
        """Named losses of a data.Batch: the text's, and those of writers that have targets in it; or only word_loss."""
        if words:
            return self.word_loss(batch)
        x = self.embed(batch.ids, batch.media, batch.slots)                                 # (B, T, C)
        h = self.llm(x, attn_mask=batch.attn_mask, segments=batch.segments)
        losses = {"lm": lm_loss(self.llm.lm_head, h, batch.labels)}
        for name, target in batch.targets.items():
            (rows, columns), writer = target["slots"], self.writers[name]
            new = writer.loss(h[rows, columns + writer.shift], target, self)                # h: (m, C)
            losses |= {f"{name}_{part}": loss for part, loss in new.items()}
        return losses


def spread(model, name, p):
    """Standard deviation of a parameter that begins as random numbers."""
    if name.endswith("query_embs"):
        return 1
    if p.ndim in (1, 3) or name.endswith("pos.weight"):         # positions, class tokens, extra keys and values
        return 0.02
    std = p[0].numel() ** -0.5                                  # 1 / sqrt(fan in)
    if name.endswith(("wo.weight", "down.weight", "fc2.weight")):
        stack = re.match(r"(.+?)\.\d+\.", name)                 # it adds to the residual stream, 2 a layer
        std /= math.sqrt(2 * (len(model.get_submodule(stack[1])) if stack else 1))
    return std


def initialise(model):
    """Random weights for training from nothing, in place."""
    kinds = nn.LayerNorm, nn.GroupNorm, RMSNorm
    norms = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, kinds)}
    for name, p in model.named_parameters():
        if name in norms:
            nn.init.ones_(p)
        elif name.endswith(("bias", "lora_B")):
            nn.init.zeros_(p)
        else:
            nn.init.normal_(p, std=spread(model, name, p))
    for m in model.modules():
        if isinstance(m, (DeformableAttention, LLMBlock)):
            m.aim()


def parameter_table(model):
    """Lines 'part, parameters, of which learn, dtype', one per part of the model."""
    parts, depth = {}, {"readers": 3, "writers": 2}
    for name, p in model.named_parameters():
        names = name.split(".")
        row = parts.setdefault(".".join(names[:depth.get(names[0], 1)]), [0, 0, p.dtype])
        row[0] += p.numel()
        row[1] += p.numel() * p.requires_grad
    lines = [f"{part:32}{n:>16,}{k:>16,}  {str(dtype)[6:]}" for part, (n, k, dtype) in parts.items()]
    return "\n".join([f"{'part':32}{'parameters':>16}{'learn':>16}", *lines])


# ---- Token generation

def filter_logits(logits, *, temperature, top_k, top_p):
    """Logits (B, V), filtered in customary order: temperature, the k best, the smallest set of mass top_p."""
    logits = logits / temperature
    if top_k:
        worst = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]                    # (B, 1)
        logits = logits.masked_fill(logits < worst, -torch.inf)
    if top_p < 1:
        ordered, index = logits.sort()                                                      # worst first
        drop = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        drop[:, -1] = False
        logits = logits.masked_fill(drop.scatter(1, index, drop), -torch.inf)
    return logits


def penalise(logits, seen, penalty):
    """Repetition penalty (Keskar et al. 2019): logits of ids seen shrink, divided if positive else multiplied."""
    old = logits.gather(1, seen)
    return logits.scatter(1, seen, torch.where(old > 0, old / penalty, old * penalty))


def choose(logits, seen, *, temperature=0.0, top_k=0, top_p=1.0, repetition_penalty=1.0, generator=None):
    """The next ids (B, 1) after logits (B, V) and ids `seen`: the likeliest at temperature 0, else drawn."""
    if repetition_penalty != 1 and seen:
        logits = penalise(logits, torch.tensor([seen], device=logits.device), repetition_penalty)
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    probs = filter_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p).softmax(-1)
    return torch.multinomial(probs, 1, generator=generator)


class Replay:
    """Steps of one token each as a CUDA graph, which launches at once what Python launches in a thousand pieces.

    A graph knows no Python numbers, so the place of a step is a tensor and the length is that of a whole run of places,
    of which those ahead are hidden. It reads memory, not names: weights and cache must stay where they are, so make it
    after fuse. Without a GPU the same steps run without a graph.
    """
    RUN = 512                           # places a graph serves: what reading keys in vain costs, against one more graph

    def __init__(self, llm, cache):
        self.llm, self.cache, self.end, self.step = llm, cache, 0, None
        self.x = llm.embed.weight.new_empty(1, 1, llm.cfg.dim)
        self.at = torch.zeros(1, dtype=torch.long, device=self.x.device)
        self.rope = llm.positions(0, cache.max_len, self.x)     # held, for the model may replace its table

    def append(self, layer, k, v):      # as the cache does
        self.cache.k[layer].index_copy_(2, self.at, k)
        self.cache.v[layer].index_copy_(2, self.at, v)
        return self.cache.k[layer, :, :, :self.end], self.cache.v[layer, :, :, :self.end]   # (1, nkv, end, hd)

    def run(self):
        rope = [table[self.at] for table in self.rope]                                      # (1, hd)
        ahead = torch.arange(self.end, device=self.x.device) > self.at
        bias = self.x.new_zeros(1, 1, 1, self.end).masked_fill(ahead, torch.finfo(self.x.dtype).min)
        self.h = self.llm.layers(self.x, rope, self, bias=bias)                             # (1, 1, C)

    def captured(self):
        self.run()                      # once before, so that kernels are compiled and libraries are ready
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.run()
        return graph.replay

    def __call__(self, x):
        pos = self.cache.pos
        self.x.copy_(x)
        self.at.fill_(pos)
        if pos >= self.end or not self.step:            # no step: Ctrl-C came while it was made
            self.step, self.end = None, min(pos // self.RUN * self.RUN + self.RUN, self.cache.max_len)
            self.cache.k[:, :, :, pos:self.end] = 0     # what lay there may be no number, nor is 0 times that
            self.cache.v[:, :, :, pos:self.end] = 0
            self.step = self.captured() if x.is_cuda else self.run
        self.step()
        self.cache.pos += 1
        return self.h.clone()           # the next step writes over it


@torch.inference_mode()
def generate(model, embeds, *, cache=None, max_new_tokens=512, seen=(), hidden=None, attn_mask=None, replay=None,
             **sampling):
    """Yield new token ids one by one, an end token last if one comes. Closing the iterator early is fine.

    embeds (1, T, C): places not yet in `cache` (a KVCache; default: a fresh one). seen: ids of the prompt that count as
    repeated. hidden: a list that gets the states (1, T, C) of every pass: the prompt's, then each new id's. attn_mask
    (1, T) bool: places of the prompt that count. replay: a Replay of the cache, that takes its steps; not with an
    attn_mask. sampling: see choose.
    """
    llm, seen, new = model.llm, list(seen), embeds.new_full((1, 1), -1, dtype=torch.long)
    cache = cache or KVCache(llm, 1, embeds.shape[1] + max_new_tokens)
    hidden = [] if hidden is None else hidden
    for i in range(max_new_tokens):
        hidden.append(replay(embeds) if replay and i else llm(embeds, cache, attn_mask))
        if attn_mask is not None:
            attn_mask = F.pad(attn_mask, (0, 1), value=True)
        fed, h = new[:, 0], hidden[-1][:, -1]                                               # (1,), (1, C)
        new = choose(llm.lm_head(h).float(), seen, **sampling)                              # (1, 1)
        seen.append(new.item())
        yield seen[-1]
        if seen[-1] in model.cfg.eos:
            return
        embeds = model.next_embeds(new, fed, h)                                             # (1, 1, C)


class Beam(NamedTuple):
    """What beam search has of a sequence: its score, its ids behind a -1, and the row that each came from."""
    score: float
    ids: list
    rows: list


@torch.inference_mode()
def beam_search(model, embeds, *, n_beam=5, max_new_tokens=512, hidden=None):
    """The best sequence of ids by beam search, with its end token if one came. embeds, hidden: see generate."""
    # parity: transformers 4.31 from embeddings, which all four systems run on. A hypothesis scores its summed log
    # probability over 1 + its ids without the end token; an end token counts only among the n_beam best candidates; the
    # search stops when n_beam are kept and the worst of them is no worse than the best candidate could still become.
    llm, eos, steps, done = model.llm, model.cfg.eos, [], []        # steps: hidden states (n_beam, T, C) of each pass
    cache = KVCache(llm, n_beam, embeds.shape[1] + max_new_tokens)
    embeds = embeds.expand(n_beam, -1, -1)                  # all rows are alike as yet: only one of them may be chosen
    beams = [Beam(0.0, [-1], []), *[Beam(-1e9, [-1], [])] * (n_beam - 1)]
    for step in range(1, max_new_tokens + 1):
        steps.append(llm(embeds, cache))
        h = steps[-1][:, -1]                                                                # (n_beam, C)
        scores = torch.tensor([beam.score for beam in beams], device=h.device)
        total = llm.lm_head(h).float().log_softmax(-1) + scores[:, None]                    # (n_beam, V)
        best, index = total.flatten().topk((1 + max(len(eos), 1)) * n_beam)                 # what may end, and n_beam
        row, id = index // total.shape[1], index % total.shape[1]
        longer = [Beam(score, [*beams[row].ids, id], [*beams[row].rows, row])               # best first
                  for score, row, id in zip(best.tolist(), row.tolist(), id.tolist())]
        ended = [beam._replace(score=beam.score / step) for beam in longer[:n_beam] if beam.ids[-1] in eos]
        done = sorted(done + ended, key=lambda beam: -beam.score)[:n_beam]
        if len(done) == n_beam and done[-1].score >= longer[0].score / (step + 1):
            break
        beams = [beam for beam in longer if beam.ids[-1] not in eos][:n_beam]
        rows, fed, new = torch.tensor([[beam.rows[-1], *beam.ids[-2:]] for beam in beams], device=h.device).T
        cache.reorder(rows)
        embeds = model.next_embeds(new[:, None], fed, h)    # parity: NExT-Chat's h is of rows before they move
    else:
        done += [beam._replace(score=beam.score / (1 + max_new_tokens)) for beam in beams]
    best = max(done, key=lambda beam: beam.score)
    if hidden is not None:
        hidden += [h[row:row + 1] for h, row in zip(steps, best.rows)]
    return best.ids[1:]


def signal_runs(ids, signal):
    """First places of the complete runs of signal ids among ids, and the places of signal ids outside of those."""
    starts = [i for i in range(len(ids)) if list(ids[i:i + len(signal)]) == signal]
    inside = {i + j for i in starts for j in range(len(signal))}
    return starts, sorted({i for i, id in enumerate(ids) if id in signal} - inside)


@torch.inference_mode()
def read_out(model, ids, hidden, writer, start=0, **media):
    """What a writer makes of the complete runs of its signal tokens from place `start` on; None if there is none. ids:
    prompt and answer, of which the last was never fed: a run that it ends is passed over. hidden: of generate."""
    signal, writer = model.cfg.signal(writer), model.writers[writer]
    states = torch.cat(hidden, dim=1)[0]                                                    # (T', C)
    shift = writer.shift - (len(ids) - 1 - len(states))
    starts, _ = signal_runs(ids[:-1], signal)
    h = [states[i + j + shift] for i in starts if i >= start for j in range(len(signal))]
    return writer.write(torch.stack(h), model, **media) if h else None


# ---- Load and save

# (lowest, highest) of a config's numbers: one beyond is damaged, not large
LIMITS = {"n_layer": (0, 1024), "n_head": (0, 4096), "vocab_size": (0, 1 << 21), "feature_layer": (-64, 1 << 24)}


def to_config(cls, values, where):
    """Rebuild a config dataclass from JSON. Raises ValueError naming `where` for unknown fields and absurd sizes."""
    known = {f.name: f.type for f in fields(cls)}
    if unknown := set(values) - known.keys():
        names = ", ".join(sorted(known))
        raise ValueError(f"{where}: unknown field {min(unknown)!r} of {cls.__name__}; known: {names}")
    return cls(**{key: to_field(key, known[key], value, where) for key, value in values.items()})


def to_field(key, kind, value, where):
    """A field of type `kind` from JSON, where tuples are lists and configs are objects."""
    low, high = LIMITS.get(key, (0, 1 << 24))
    if isinstance(value, int) and not low <= value <= high:
        raise ValueError(f"{where}: {key} = {value} is out of bounds")
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, dict):
        return value
    if get_origin(kind) is dict:
        return {name: to_field(name, get_args(kind)[1], item, where) for name, item in value.items()}
    part = next(filter(is_dataclass, (kind, *get_args(kind))), None)                        # of Part or Part | None
    return to_config(part, value, f"{where}: {key}") if part else value


def read_config(folder, cls=ModelConfig):
    """The config of a weights folder, or a painter's. FileNotFoundError or ValueError say what is wrong with what."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no weights folder: it has no config.json (convert_weights.py makes them)")
    try:
        values = json.loads(path.read_text())
        version = int(values.pop("format_version"))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        error = f"{path}: not a config of this code ({error!r}); convert the folder with convert_weights.py"
        raise ValueError(error) from None
    if version > FORMAT:
        raise ValueError(f"{path}: format {version} is newer than this code understands ({FORMAT}); update the code")
    if ("unet" in values) == (cls is ModelConfig):
        what = "a painter, no model to talk with; a model takes it with --painters" if "unet" in values else "no painter"
        raise ValueError(f"{folder}: {what}")
    return to_config(cls, values, path)


def stored_in(path):
    """{tensor name: (type, shape, byte where it begins)} of a safetensors file. Damaged, it raises nearly anything."""
    # The library checks sizes, overlaps, gaps and types; with "pt" it would ask for as much memory as the file is long.
    with open(path, "rb") as f, safe_open(path, "np"):
        n = int.from_bytes(f.read(8), "little")         # length of the header, which the numbers follow
        rows, out = json.loads(f.read(n), object_pairs_hook=list), {}
    for name, row in rows:                              # a dict of json's would hide that a name stands there twice
        if name in out:
            raise ValueError(f"{name} stands in it twice")
        if name != "__metadata__":
            row = dict(row)
            out[name] = DTYPES[row["dtype"]], row["shape"], 8 + n + row["data_offsets"][0]
    return out


def mapped(path):
    """{tensor name: tensor} of a safetensors file, in one mapping: neighbours in the file are neighbours in memory."""
    try:
        stored, out = stored_in(path), {}
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: truncated or damaged ({error}); copy it again") from None
    whole = torch.from_file(str(path), size=os.path.getsize(path), dtype=torch.uint8)
    for name, (dtype, shape, start) in stored.items():
        part = whole[start:start + math.prod(shape) * dtype.itemsize]
        part = part.clone() if start % dtype.itemsize else part
        out[name] = part.view(dtype).view(shape).data       # autograd would take a change of one for a change of all
    return out


def tensors_in(folder):
    """{tensor name: tensor} of a weights folder, mapped. Raises ValueError if a shard is no name of a file there."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return mapped(folder / "model.safetensors")
    try:
        shard_of = json.loads(index.read_bytes())["weight_map"]
        names = set(map(str, shard_of.values()))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: damaged ({error!r}); copy it again") from None
    if odd := names - {path.name for path in folder.iterdir() if path.is_file()}:
        raise ValueError(f"{index}: shard {min(odd)!r} is not a file of this folder")
    shards = {name: mapped(folder / name) for name in names}
    return {key: shards[name][key] for key, name in shard_of.items() if key in shards[name]}


class WithoutNumbers(TorchFunctionMode):
    """Modules made in this context start with no numbers."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", "") == "torch.nn.init":  # on meta it makes torch import its compiler: a second
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs or {})


def skeleton(folder, build=Model, cls=ModelConfig):
    """build(config), a Model, of a weights folder on meta, in the stored types, and {name: tensor} as stored, mapped.
    Raises FileNotFoundError, ValueError naming the folder and key that do not fit."""
    cfg = read_config(folder, cls)
    try:
        with torch.device("meta"), WithoutNumbers():
            model = build(cfg)
            if kind := getattr(cfg, "quantized", ""):   # of painters none is
                model.cfg = replace(cfg, quantized="")  # as yet
                quantize_llm(model, kind)
    except Exception as error:          # odd values can break any layer
        raise ValueError(f"{folder}: config.json describes no model ({error!r:.200})") from None
    want, state = model.state_dict(), tensors_in(folder)
    if odd := state.keys() ^ (want.keys() - tied(model)):
        what = "unexpected" if min(odd) in state else "missing"
        raise ValueError(f"{folder}: {min(odd)} is {what} ({len(odd)} keys do not fit config.json)")
    for key, x in state.items():
        if x.shape != want[key].shape:
            raise ValueError(f"{folder}: {key} has shape {list(x.shape)}, config.json asks for {list(want[key].shape)}")
    assign(model, {key: torch.empty_like(x, device="meta") for key, x in state.items()})
    return model, state


def tied(model):
    """{name of a matrix that is another's, and so is not stored: name of that one}."""
    llm = getattr(model, "llm", None)                   # a painter has none
    return {"llm.lm_head.weight": "llm.embed.weight"} if llm and llm.cfg.tied else {}


def tie(model):
    """Make lm_head share the embedding's matrix again if it should: moving a model can part them."""
    if tied(model):
        model.llm.lm_head.weight = model.llm.embed.weight


def assign(model, state):
    """Make stored tensors the model's own."""
    model.load_state_dict(state | {name: state[other] for name, other in tied(model).items()}, assign=True)
    tie(model)


def load(folder, device="cpu", dtype=None, quantize="", build=Model, cls=ModelConfig):
    """The Model of a weights folder, in eval mode, tensors memory-mapped (dtype None: as stored). Raises as skeleton.

    quantize: int8 or int4 (see quantize.py), a matrix at a time; ValueError for a model that is so already.
    """
    model, stored = skeleton(folder, build, cls)

    def fetch(name, layer):             # mapped for this layer alone: what was read leaves memory with it
        stored, shared = tensors_in(folder), tied(model)
        state = {key: stored[shared.get(f"{name}.{key}", f"{name}.{key}")].to(device) for key in layer.state_dict()}
        layer.load_state_dict(state, assign=True)
        return layer
    if quantize:
        quantize_llm(model, quantize, fetch)
    assign(model, {key: stored[key].to(device) if x.is_meta else x for key, x in tensors_of(model).items()})
    return model.to(dtype=dtype).eval()


def find_device(name=None):
    """The torch.device of a name, without one the best there is. Raises ValueError for one that is not there."""
    best = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if name and str(name).split(":")[0] not in ("cpu", best.type):
        raise ValueError(f"there is no device {name} here; leave it out to take the best there is, {best}")
    return torch.device(name or best)


def usual_dtype(folder, device):
    """The type to talk in: bfloat16 on a GPU, and for big weights on a CPU that multiplies it; else float32."""
    big = sum(path.stat().st_size for path in Path(folder).glob("model*.safetensors")) > BIG
    quick = any(torch.cpu.get_capabilities().get(name) for name in ("amx_bf16", "avx512_bf16"))
    return torch.bfloat16 if torch.device(device).type == "cuda" or big and quick else torch.float32


def load_painter(folder, device="cpu", dtype=None):
    """The Painter of a weights folder, as load; `save` writes one. Beside the weights lie files of its tokenizer."""
    return channels_last(load(folder, device, dtype, build=Painter, cls=PainterConfig))


def write_tensors(path, like, values):
    """A safetensors file, tensor by tensor, where the library would hold it all. like: {name: anything with shape and
    dtype}, wide types first (numbers lie at multiples of their width); values: the tensors, in that order."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, x in like.items():
        start, end = end, end + math.prod(x.shape) * x.dtype.itemsize
        header[name] = {"dtype": CODES[x.dtype], "shape": list(x.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()                  # the file: length of the header, header, bytes
    text += b" " * (-(8 + len(text)) % 64)              # numbers begin where wide loads like them to
    with open(path, "xb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for x in values:
            f.write(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    with safe_open(path, "np"):                         # the library agrees
        pass


def write_config(cfg, folder):
    """config.json of a weights folder: the format and every dimension."""
    (Path(folder) / "config.json").write_text(json.dumps({"format_version": FORMAT, **asdict(cfg)}, indent=1))


def sync(path):
    """Force a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


@contextmanager
def new_folder(out):
    """A folder that takes the name `out` when the block ends well and its files are on disk, and else disappears."""
    out = out.resolve()                                     # of a link the folder that it means
    if os.path.ismount(out) or out.is_file():               # could not take the name: said before hours of work
        kind = "file" if out.is_file() else "mount point"
        raise OSError(f"{out} cannot be replaced: it is a {kind}; name a folder in it")
    new = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    old = new.with_name(f"{new.name}-old")
    for left in new, old:
        shutil.rmtree(left, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        for path in (*new.iterdir(), new):
            sync(path)
        with suppress(FileNotFoundError):
            os.rename(out, old)                             # else files that cannot go, as open ones on NFS, bar it
        os.rename(new, out)
        sync(out.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def tensors_of(model):
    """{name: tensor} of a weights folder: wide types first, tied matrices once."""
    state = {key: x for key, x in model.state_dict().items() if key not in tied(model)}
    return dict(sorted(state.items(), key=lambda item: -item[1].dtype.itemsize))


def check_savable(model, state, folder):
    """Refuse a model that has given its matrices away, and a folder that holds other things than weights."""
    if any(getattr(part, "packed", None) is not None for part in model.modules()):
        raise ValueError("a quantised model gives its weights away when it first multiplies: "
                         "save it before, or load it again")
    if "llm.blocks.0.attn.wqkv.weight" in state:
        raise ValueError("a fused model is not for saving: save it before, or load it again")
    config = folder / "config.json"                             # others' folders have one too
    ours = config.is_file() and b'"format_version"' in config.read_bytes()
    if folder.is_dir() and any(folder.iterdir()) and not ours:
        raise ValueError(f"{folder} holds other things than weights, which would be lost; name a new folder")


def save(model, folder, extra=(), values=None):
    """Write a weights folder, whole or not at all, in place of any there: config.json, model.safetensors, copies of the
    `extra` files. values: what to write for tensors_of(model), in its order, if not the tensors. Raises ValueError for
    a quantised model that has spoken."""
    folder, state = Path(folder), tensors_of(model)
    check_savable(model, state, folder)
    with new_folder(folder) as new:
        write_tensors(new / "model.safetensors", state, values or state.values())
        write_config(model.cfg, new)
        for path in map(Path, extra):                           # a tokenizer gets the name under which it is looked for
            shutil.copy(path, new / ("tokenizer.model" if path.suffix == ".model" else path.name))
        for path in folder.glob("*"):
            if path.is_dir():                                   # painters stay; links take no room
                shutil.copytree(path, new / path.name, copy_function=os.link)


def merge_lora(model):
    """Fold every LoRA update into its weight, in place; afterwards the model is as if trained without LoRA."""
    for part in model.llm.modules():
        for name, layer in part.named_children():
            if isinstance(layer, LoRALinear):
                setattr(part, name, layer.merge())
    model.cfg = replace(model.cfg, llm=replace(model.cfg.llm, lora_rank=0))
    model.llm.cfg = model.cfg.llm


def one_behind_the_other(weights):
    """Matrices (N, K) as one, a view of them where they lie so in memory, as those of our files do."""
    first, lengths = weights[0], [len(w) for w in weights]
    with suppress(RuntimeError):                            # their memory ends before
        one = first.as_strided((sum(lengths), first.shape[1]), first.stride())
        if all(w.is_set_to(part) for w, part in zip(weights, one.split(lengths))):
            return one
    return torch.cat(weights)


def side_by_side(layers):
    """Linears that read the same as one."""
    return linear_of(one_behind_the_other([layer.weight.detach() for layer in layers])).requires_grad_(False)


def fuse(model):
    """Join q|k|v and gate|up into one matrix each, in place, for faster generation; such a model is not for saving.
    Raises ValueError for LoRA layers: merge them first."""
    if model.llm.cfg.lora_rank:
        raise ValueError("merge LoRA before fusing")
    one = join if model.cfg.quantized else side_by_side
    for block in model.llm.blocks:
        attn, mlp = block.attn, block.mlp
        attn.wqkv, attn.wq, attn.wk, attn.wv = one([attn.wq, attn.wk, attn.wv]), None, None, None
        mlp.gate_up, mlp.gate, mlp.up = one([mlp.gate, mlp.up]), None, None


def keep_memory():
    """Have this process keep what big tensors leave behind, in huge pages. For glibc; elsewhere nothing changes."""
    # The kernel would clear this memory for every next tensor: layers of SAM take about a tenth less time. Gaps between
    # tensors cost memory, so those above 48 MB give theirs back, and train.py does without.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")      # torch's own switch, read at its first tensor
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 48 << 20)                          # M_MMAP_THRESHOLD: more is a mapping of its own
        libc.mallopt(-1, 2 ** 31 - 1)                       # M_TRIM_THRESHOLD: never
