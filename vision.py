"""Encoders: CLIP's vision tower and ImageBind with its six modalities.

In order: shared layers, CLIP ViT, ImageBind (config, stems, towers, model).
Letters: B batch, T tokens, C width, nh heads, hd head dim, N patches, H W height width, F frames, S clips.
Papers: CLIP (Radford et al. 2021), ImageBind (Girdhar et al. 2023). Inputs are made by data.py; sizes are configs here.
"""
from dataclasses import dataclass, field
from math import prod, sqrt

import torch
import torch.nn as nn
import torch.nn.functional as F

from attention import attention


# ---- Shared layers

def split_heads(x, n_head):
    """(B, T, C) -> (B, nh, T, hd)."""
    return x.unflatten(-1, (n_head, -1)).transpose(1, 2)


def merge_heads(x):
    """(B, nh, T, hd) -> (B, T, C)."""
    return x.transpose(1, 2).flatten(2)


def quick_gelu(x):
    """CLIP's sigmoid approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


class MLP(nn.Module):
    def __init__(self, dim, mlp_dim, act):
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(dim, mlp_dim), nn.Linear(mlp_dim, dim), act

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block around a given attention module."""

    def __init__(self, dim, mlp_dim, attn, act, eps):
        super().__init__()
        self.attn_norm, self.attn = nn.LayerNorm(dim, eps), attn
        self.mlp_norm, self.mlp = nn.LayerNorm(dim, eps), MLP(dim, mlp_dim, act)

    def forward(self, x, **attn_args):
        x = x + self.attn(self.attn_norm(x), **attn_args)
        return x + self.mlp(self.mlp_norm(x))


# ---- CLIP ViT

@dataclass(frozen=True)
class CLIPConfig:                       # defaults: openai/clip-vit-large-patch14-336
    image_size: int = 336               # pixels per side
    patch_size: int = 14
    dim: int = 1024
    n_layer: int = 24
    n_head: int = 16
    mlp_dim: int = 4096
    feature_layer: int = -2             # which hidden state is the feature; 0 = embeddings, -1 = last block

    @property
    def n_patch(self):
        return (self.image_size // self.patch_size) ** 2


class CLIPAttention(nn.Module):
    def __init__(self, dim, n_head):
        super().__init__()
        self.n_head = n_head
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x):
        q, k, v = (split_heads(w(x), self.n_head) for w in (self.wq, self.wk, self.wv))     # (B, nh, T, hd)
        return self.wo(merge_heads(attention(q, k, v)))


class CLIPVision(nn.Module):
    """CLIP's image tower. A call gives the patch features of `feature_layer`: (B, 3, H, W) -> (B, N, C)."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.patch = nn.Conv2d(3, cfg.dim, cfg.patch_size, cfg.patch_size, bias=False)
        self.cls = nn.Parameter(torch.zeros(cfg.dim))
        self.pos = nn.Embedding(cfg.n_patch + 1, cfg.dim)
        self.pre_norm = nn.LayerNorm(cfg.dim)
        self.blocks = nn.ModuleList(Block(cfg.dim, cfg.mlp_dim, CLIPAttention(cfg.dim, cfg.n_head), quick_gelu, 1e-5)
                                    for _ in range(cfg.n_layer))
        self.norm = nn.LayerNorm(cfg.dim)               # for the pooled output; the chat systems never use it

    def hidden_states(self, image):
        """Yields the n_layer + 1 hidden states (B, 1 + N, C), class token first, computing each only when asked for."""
        x = self.patch(image).flatten(2).transpose(1, 2)                                    # (B, N, C)
        x = torch.cat([self.cls.expand(len(x), 1, -1), x], dim=1)                           # (B, 1 + N, C)
        x = self.pre_norm(x + self.pos.weight)
        yield x
        for block in self.blocks:
            x = block(x)
            yield x

    def forward(self, image):
        wanted = self.cfg.feature_layer % (self.cfg.n_layer + 1)
        for i, x in enumerate(self.hidden_states(image)):
            if i == wanted:
                return x[:, 1:]                                                             # (B, N, C)


# ---- ImageBind

@dataclass(frozen=True)
class TowerConfig:
    """One modality. The stem's kind follows from `patch`: 3 or 2 sizes = convolution, 1 = windows of a signal, 0 = words."""
    dim: int
    n_layer: int
    n_head: int
    channels: int                       # of the input; for words: the vocabulary
    size: tuple[int, ...]               # of the input: (F, H, W), (mel bins, frames), (time,), (words,)
    patch: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()        # default: patch
    stem_norm: bool = True              # LayerNorm after the patches
    pre_norm: bool = False              # LayerNorm before the blocks
    bias_kv: bool = True                # one learned key and value that every query may attend to
    scale: bool = True                  # multiply the unit-length output by a stored temperature

    @property
    def n_patch(self):
        return prod((s - p) // d + 1 for s, p, d in zip(self.size, self.patch, self.stride or self.patch))


HUGE = {                                # imagebind_huge.pth; video goes through vision
    "vision": TowerConfig(1280, 32, 16, 3, (2, 224, 224), (2, 14, 14), stem_norm=False, pre_norm=True, bias_kv=False,
                          scale=False),
    "text": TowerConfig(1024, 24, 16, 49408, (77,), stem_norm=False, bias_kv=False),
    "audio": TowerConfig(768, 12, 12, 1, (128, 204), (16, 16), (10, 10)),
    "depth": TowerConfig(384, 12, 8, 1, (224, 224), (16, 16)),
    "thermal": TowerConfig(768, 12, 12, 1, (224, 224), (16, 16)),
    "imu": TowerConfig(512, 6, 8, 6, (2000,), (8,)),
}


@dataclass(frozen=True)
class ImageBindConfig:                  # defaults: ImageBind-Huge
    towers: dict[str, TowerConfig] = field(default_factory=lambda: HUGE)
    out_dim: int = 1024
    patches: bool = False               # True: an embedding per patch; False, as published: one, the class token's

    def n_token(self, tower):
        """Embeddings that one medium gives."""
        return self.towers[tower].n_patch if self.patches else 1


class StackedAttention(nn.Module):
    """Self-attention with q, k, v in one matrix, as ImageBind stores them, and its optional extra key and value."""

    def __init__(self, dim, n_head, bias_kv):
        super().__init__()
        self.n_head = n_head
        self.wqkv, self.wo = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.bias_k, self.bias_v = (nn.Parameter(torch.zeros(1, 1, dim)) if bias_kv else None for _ in range(2))

    def forward(self, x, causal=False):
        q, k, v = self.wqkv(x).chunk(3, dim=-1)                                             # (B, T, C) each
        if self.bias_k is not None:
            k = torch.cat([k, self.bias_k.expand(len(x), 1, -1)], dim=1)                    # (B, T + 1, C)
            v = torch.cat([v, self.bias_v.expand(len(x), 1, -1)], dim=1)
        q, k, v = (split_heads(y, self.n_head) for y in (q, k, v))
        return self.wo(merge_heads(attention(q, k, v, causal=causal)))


def make_stem(cfg):
    """The layer that turns an input into tokens: a convolution over patches, a matrix per signal window, or word vectors."""
    if len(cfg.patch) > 1:
        conv = nn.Conv3d if len(cfg.patch) == 3 else nn.Conv2d
        return conv(cfg.channels, cfg.dim, cfg.patch, cfg.stride or cfg.patch, bias=False)
    return nn.Linear(cfg.channels * cfg.patch[0], cfg.dim, bias=False) if cfg.patch else nn.Embedding(cfg.channels, cfg.dim)


class Tower(nn.Module):
    """Stem, transformer, head of one ImageBind modality: input -> (B, n, out_dim), unit length times its scale."""

    def __init__(self, cfg, out_dim, patches=False):
        super().__init__()
        self.cfg, self.patches = cfg, patches
        words = not cfg.patch
        self.stem = make_stem(cfg)
        self.stem_norm = nn.LayerNorm(cfg.dim, 1e-5) if cfg.stem_norm else nn.Identity()
        self.cls = None if words else nn.Parameter(torch.zeros(1, 1, cfg.dim))
        self.pos = nn.Parameter(torch.zeros(1, cfg.size[0] if words else 1 + cfg.n_patch, cfg.dim))
        self.pre_norm = nn.LayerNorm(cfg.dim, 1e-6) if cfg.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(cfg.dim, 4 * cfg.dim, StackedAttention(cfg.dim, cfg.n_head, cfg.bias_kv), F.gelu, 1e-6)
            for _ in range(cfg.n_layer))
        self.norm = nn.LayerNorm(cfg.dim, 1e-6)
        self.head = nn.Linear(cfg.dim, out_dim, bias=False)
        self.register_buffer("log_scale", torch.zeros(()) if cfg.scale else None)

    def tokens(self, x):
        """Stem, class token in front, positions: input -> (B, T, C)."""
        if self.cls is None:
            return self.stem(x) + self.pos
        if isinstance(self.stem, nn.Conv3d):
            x = x.unsqueeze(2) if x.ndim == 4 else x                                        # (B, 3, F, H, W)
            x = x.expand(-1, -1, self.cfg.patch[0], -1, -1) if x.shape[2] == 1 else x       # a still is a frozen clip
        if isinstance(self.stem, nn.Linear):
            x = self.stem(x.unfold(-1, *2 * self.cfg.patch).transpose(1, 2).flatten(2))     # (B, N, channels * window)
        else:
            x = self.stem(x).flatten(2).transpose(1, 2)                                     # (B, N, C)
        x = torch.cat([self.cls.expand(len(x), -1, -1), self.stem_norm(x)], dim=1)
        return x + self.positions(x.shape[1] - 1)

    def positions(self, n_patch):
        """Position embeddings, resized bicubically (parity: as one square grid) when the input has another size."""
        first, grid = self.pos.split([1, self.cfg.n_patch], dim=1)
        if n_patch == self.cfg.n_patch:
            return self.pos
        side = int(sqrt(self.cfg.n_patch))
        grid = grid.transpose(1, 2).unflatten(2, (side, side))                              # (1, C, side, side)
        grid = F.interpolate(grid.float(), scale_factor=sqrt(n_patch / self.cfg.n_patch), mode="bicubic")
        return torch.cat([first, grid.to(first.dtype).flatten(2).transpose(1, 2)], dim=1)

    def trunk(self, x):
        """Transformer: (B, T, C) -> (B, T, C)."""
        x = self.pre_norm(x)
        for block in self.blocks:
            x = block(x, causal=self.cls is None)
        return x

    def forward(self, x):
        ends = x.argmax(-1) if self.cls is None else None           # end-of-text is the largest id; the first one wins
        x = self.trunk(self.tokens(x))
        if ends is not None:
            x = x[torch.arange(len(x), device=x.device), ends][:, None]                     # (B, 1, C)
        else:
            x = x[:, 1:] if self.patches else x[:, :1]                                      # (B, n, C)
        x = F.normalize(self.head(self.norm(x)), dim=-1)                                    # (B, n, out_dim)
        return x if self.log_scale is None else x * self.log_scale.exp().clamp(max=100)


class ImageBind(nn.Module):
    """Six modalities, one space. `imagebind(kind, x)` gives (B, n, out_dim), clips averaged and not renormalised.

    Inputs: vision (B, 3, H, W) or clips (B, S, 3, F, H, W); audio (B, S, 1, mel, frames); depth and thermal (B, 1, H, W);
    imu (B, 6, time); text ids (B, 77). parity: any input of 5 or more dimensions is read as clips.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.towers = nn.ModuleDict({kind: Tower(tower, cfg.out_dim, cfg.patches) for kind, tower in cfg.towers.items()})

    def forward(self, kind, x):
        if x.ndim < 5:
            return self.towers[kind](x)
        B, S = x.shape[:2]
        return self.towers[kind](x.flatten(0, 1)).unflatten(0, (B, S)).mean(1)              # (B, n, out_dim)
