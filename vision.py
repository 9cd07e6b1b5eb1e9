"""Encoders: CLIP's vision tower, ImageBind with its six modalities, SAM's image encoder, Swin, backbone of a detector.

In order: shared layers, CLIP ViT, ImageBind (config, stems, towers, model), SAM ViT, Swin.
Letters: B batch, T tokens, C width, nh heads, hd head dim, N patches, H W height width, F frames, S clips.
Papers: CLIP (Radford et al. 2021), ImageBind (Girdhar et al. 2023), Segment Anything (Kirillov et al. 2023),
Swin (Liu et al. 2021). Inputs are made by data.py. Names inside SAM are those of its public checkpoints.
"""
from dataclasses import dataclass, field
from math import isqrt, log, prod, sqrt

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

    def forward(self, x, causal=False, bias=None):
        q, k, v = (split_heads(w(x), self.n_head) for w in (self.wq, self.wk, self.wv))     # (B, nh, T, hd)
        return self.wo(merge_heads(attention(q, k, v, causal=causal, bias=bias)))


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
    """One modality. The stem follows from `patch`: 3 or 2 sizes = convolution, 1 = windows of a signal, 0 = words."""
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
    early: tuple[int, ...] = ()         # widths of 3 x 3 convolutions of stride 2 before the patches; small towers learn
                                        # shapes from a tenth of the pictures that way (Xiao et al. 2021)

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

    def __init__(self, dim, n_head, bias_kv=False):
        super().__init__()
        self.n_head = n_head
        self.wqkv, self.wo = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.bias_k, self.bias_v = (nn.Parameter(torch.zeros(1, 1, dim)) if bias_kv else None for _ in range(2))

    def forward(self, x, causal=False, bias=None):
        q, k, v = self.wqkv(x).chunk(3, dim=-1)                                             # (B, T, C) each
        if self.bias_k is not None:
            k = torch.cat([k, self.bias_k.expand(len(x), 1, -1)], dim=1)                    # (B, T + 1, C)
            v = torch.cat([v, self.bias_v.expand(len(x), 1, -1)], dim=1)
        q, k, v = (split_heads(y, self.n_head) for y in (q, k, v))
        return self.wo(merge_heads(attention(q, k, v, causal=causal, bias=bias)))


def early_convs(cfg):
    """Frames (B, channels, F, H, W) -> (B, width, F, H / 2^k, W / 2^k), k convolutions with GroupNorm and GELU."""
    widths = (cfg.channels, *cfg.early)
    return nn.Sequential(*(layer for a, b in zip(widths, widths[1:]) for layer in (
        nn.Conv3d(a, b, (1, 3, 3), (1, 2, 2), (0, 1, 1)), nn.GroupNorm(8, b), nn.GELU())))


def make_stem(cfg):
    """What turns an input into tokens: a convolution over patches, a matrix per signal window, or word vectors."""
    if len(cfg.patch) == 3:
        patch = (cfg.patch[0], *(n >> len(cfg.early) for n in cfg.patch[1:]))               # of what early_convs leaves
        return nn.Conv3d((cfg.channels, *cfg.early)[-1], cfg.dim, patch, patch, bias=False)
    if len(cfg.patch) == 2:
        return nn.Conv2d(cfg.channels, cfg.dim, cfg.patch, cfg.stride or cfg.patch, bias=False)
    return nn.Linear(cfg.channels * cfg.patch[0], cfg.dim, bias=False) if cfg.patch else nn.Embedding(cfg.channels, cfg.dim)


class Tower(nn.Module):
    """Stem, transformer, head of one ImageBind modality: input -> (B, n, out_dim), unit length times its scale."""

    def __init__(self, cfg, out_dim, patches=False):
        super().__init__()
        self.cfg, self.patches = cfg, patches
        words = not cfg.patch
        self.early, self.stem = early_convs(cfg), make_stem(cfg)
        self.stem_norm = nn.LayerNorm(cfg.dim, 1e-5) if cfg.stem_norm else nn.Identity()
        self.cls = None if words else nn.Parameter(torch.zeros(1, 1, cfg.dim))
        self.pos = nn.Parameter(torch.zeros(1, cfg.size[0] if words else 1 + cfg.n_patch, cfg.dim))
        self.pre_norm = nn.LayerNorm(cfg.dim, 1e-6) if cfg.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(cfg.dim, 4 * cfg.dim, StackedAttention(cfg.dim, cfg.n_head, cfg.bias_kv), F.gelu, 1e-6)
            for _ in range(cfg.n_layer))
        self.norm = nn.LayerNorm(cfg.dim, 1e-6)
        self.head = nn.Linear(cfg.dim, out_dim, bias=False)
        self.register_buffer("log_scale", torch.tensor(log(1 / 0.07)) if cfg.scale else None)       # as CLIP begins

    def tokens(self, x):
        """Stem, class token in front, positions: input -> (B, T, C)."""
        if self.cls is None:
            return self.stem(x) + self.pos
        if isinstance(self.stem, nn.Conv3d):
            x = self.early(x.unsqueeze(2) if x.ndim == 4 else x)                            # (B, 3, F, H, W)
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

    Inputs: vision (B, 3, H, W) or clips (B, S, 3, F, H, W); audio (B, S, 1, mel, frames); depth and thermal
    (B, 1, H, W); imu (B, 6, time); text ids (B, 77). parity: any input of 5 or more dimensions is read as clips.
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


# ---- SAM ViT

@dataclass(frozen=True)
class SAMConfig:                        # defaults: sam_vit_h_4b8939.pth
    image_size: int = 1024              # pixels per side
    patch_size: int = 16
    dim: int = 1280                     # dim to global_layers: the image encoder
    n_layer: int = 32
    n_head: int = 16
    mlp_dim: int = 5120
    window: int = 14                    # patches per side of the squares inside which layers attend,
    global_layers: tuple[int, ...] = (7, 15, 23, 31)    # except these, which see the whole image
    prompt_dim: int = 256               # of image features, prompts and the mask decoder
    mask_dim: int = 16                  # channels between a mask given as prompt and its embedding
    n_mask: int = 4                     # mask tokens: the first for a clear prompt, the others for an ambiguous one
    dec_layer: int = 2                  # dec_layer to iou_dim: the mask decoder
    dec_head: int = 8
    dec_mlp_dim: int = 2048
    iou_dim: int = 256

    @property
    def grid(self):
        """Patches per side."""
        return self.image_size // self.patch_size


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def __init__(self, dim):
        super().__init__(dim, 1e-6)

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class SAMMLP(nn.Module):
    """MLP under SAM's names."""

    def __init__(self, dim, mlp_dim, act):
        super().__init__()
        self.lin1, self.lin2, self.act = nn.Linear(dim, mlp_dim), nn.Linear(mlp_dim, dim), act

    def forward(self, x):
        return self.lin2(self.act(self.lin1(x)))


def relative_positions(table, side):
    """(2 side - 1, hd) table -> (side, side, hd): row i - j for query i, key j. Other lengths are resized linearly."""
    if len(table) != 2 * side - 1:
        table = F.interpolate(table.float().T[None], 2 * side - 1, mode="linear")[0].T.to(table.dtype)
    i = torch.arange(side, device=table.device)
    return table[i[:, None] - i + side - 1]


def relative_scores(q, table_h, table_w):
    """What queries add to their scores by key row and key column: (B, nh, T, hd) -> (B, nh, T, H), (B, nh, T, W)."""
    side = isqrt(q.shape[2])
    q = q.unflatten(2, (side, side))                                                        # (B, nh, H, W, hd)
    rel_h = torch.einsum("bnhwc,hkc->bnhwk", q, relative_positions(table_h, side))
    rel_w = torch.einsum("bnhwc,wkc->bnhwk", q, relative_positions(table_w, side))
    return rel_h.flatten(2, 3), rel_w.flatten(2, 3)


class SAMAttention(nn.Module):
    """Self-attention over patches (B, H, W, C) within squares of side `window`, with relative positions."""

    def __init__(self, dim, n_head, window):
        super().__init__()
        self.n_head, self.window = n_head, window
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.rel_pos_h, self.rel_pos_w = (nn.Parameter(torch.zeros(2 * window - 1, dim // n_head)) for _ in range(2))

    def forward(self, x):
        (B, H, W, _), side = x.shape, self.window
        n = -(-H // side)                                                                   # windows per side
        qkv = self.qkv(x)
        if H % side:                    # parity: zeros fill up the windows and take part; their q, k, v are the bias
            padded, bias = qkv.new_empty(B, n * side, n * side, qkv.shape[-1]), self.qkv.bias.to(qkv.dtype)
            padded[:, :H, :W], padded[:, H:], padded[:, :H, W:] = qkv, bias, bias
            qkv = padded
        qkv = qkv.unflatten(2, (n, side)).unflatten(1, (n, side)).transpose(2, 3)           # (B, n, n, side, side, 3 C)
        q, k, v = (split_heads(x, self.n_head) for x in qkv.flatten(3, 4).flatten(0, 2).chunk(3, dim=-1))
        x = merge_heads(attention(q, k, v, rel=relative_scores(q, self.rel_pos_h, self.rel_pos_w)))
        x = x.unflatten(1, (side, side)).unflatten(0, (B, n, n)).transpose(2, 3)            # (B, n, side, n, side, C)
        return self.proj(x.flatten(3, 4).flatten(1, 2)[:, :H, :W])


class SAMBlock(nn.Module):
    """Block under SAM's names: (B, H, W, C) -> the same."""

    def __init__(self, cfg, window):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(cfg.dim, 1e-6), SAMAttention(cfg.dim, cfg.n_head, window)
        self.norm2, self.mlp = nn.LayerNorm(cfg.dim, 1e-6), SAMMLP(cfg.dim, cfg.mlp_dim, F.gelu)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SAMImageEncoder(nn.Module):
    """SAM's image tower."""

    def __init__(self, cfg):
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, cfg.dim, cfg.patch_size, cfg.patch_size)})
        self.pos_embed = nn.Parameter(torch.zeros(1, cfg.grid, cfg.grid, cfg.dim))
        self.blocks = nn.ModuleList(SAMBlock(cfg, cfg.grid if i in cfg.global_layers else cfg.window)
                                    for i in range(cfg.n_layer))
        self.neck = nn.Sequential(
            nn.Conv2d(cfg.dim, cfg.prompt_dim, 1, bias=False), LayerNorm2d(cfg.prompt_dim),
            nn.Conv2d(cfg.prompt_dim, cfg.prompt_dim, 3, padding=1, bias=False), LayerNorm2d(cfg.prompt_dim))

    def embed(self, image):
        return self.patch_embed["proj"](image).movedim(1, -1) + self.pos_embed              # (B, H, W, C)

    def forward(self, image):
        x = self.embed(image)
        for block in self.blocks:
            x = block(x)
        return self.neck(x.movedim(-1, 1))                      # (B, prompt_dim, H / 16, W / 16)


# ---- Swin

@dataclass(frozen=True)
class SwinConfig:                       # defaults: Swin-B with windows of 12, the backbone of GroundingDINO
    dim: int = 128                      # C of the first stage; each later one doubles it
    depths: tuple[int, ...] = (2, 2, 18, 2)             # blocks per stage
    n_head: tuple[int, ...] = (4, 8, 16, 32)            # per stage
    window: int = 12                    # patches per side
    patch_size: int = 4
    outputs: tuple[int, ...] = (1, 2, 3)                # stages whose maps come out

    @property
    def out_dims(self):
        return [self.dim << i for i in self.outputs]


def to_windows(x, n):
    """(B, H, W, C), sides multiples of n -> (B * windows, n * n, C)."""
    B, H, W, C = x.shape
    return x.view(B, H // n, n, W // n, n, C).transpose(2, 3).reshape(-1, n * n, C)


def from_windows(x, n, H, W):
    """(B * windows, n * n, C) -> (B, H, W, C)."""
    return x.view(-1, H // n, W // n, n, n, x.shape[-1]).transpose(2, 3).reshape(-1, H, W, x.shape[-1])


class WindowAttention(StackedAttention):
    """Self-attention inside windows of a map moved up and left by `shift`, with a learned bias for each distance."""

    def __init__(self, dim, n_head, window, shift):
        super().__init__(dim, n_head)
        self.window, self.shift = window, shift
        self.bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, n_head))

    def bias(self, H, W):
        """(windows of one map or 1, nh, n * n, n * n): by distance; a shift also parts what it brought side by side."""
        n, at = self.window, torch.arange(max(H, W), device=self.bias_table.device)
        y, x = at[:n].repeat_interleave(n), at[:n].repeat(n)                                # (n * n)
        index = (y[:, None] - y + n - 1) * (2 * n - 1) + x[:, None] - x + n - 1
        bias = self.bias_table[index].permute(2, 0, 1)[None]                                # (1, nh, n * n, n * n)
        if not self.shift:
            return bias
        rows, columns = ((at[:size] >= size - n).int() + (at[:size] >= size - self.shift) for size in (H, W))
        region = to_windows((3 * rows[:, None] + columns)[None, ..., None], n)[..., 0]      # (windows, n * n)
        return bias - 100 * (region[:, None] != region[..., None])[:, None].to(bias.dtype)  # parity: -100, not -inf

    def forward(self, x):
        B, H, W, C = x.shape
        x = F.pad(x, (0, 0, 0, -W % self.window, 0, -H % self.window))                      # parity: after the norm
        x = x.roll((-self.shift, -self.shift), (1, 2))
        size, bias = x.shape[1:3], self.bias(*x.shape[1:3])
        x = super().forward(to_windows(x, self.window), bias=bias if len(bias) == 1 else bias.repeat(B, 1, 1, 1))
        x = from_windows(x, self.window, *size).roll((self.shift, self.shift), (1, 2))      # (B, H, W, C), padded
        return x[:, :H, :W]


class Merge(nn.Module):
    """Halves a map and doubles its width: (B, H, W, C) -> (B, H / 2, W / 2, 2 C), four neighbours becoming one."""

    def __init__(self, dim):
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x):
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], dim=-1)           # (B, H / 2, W / 2, 4 C)
        return self.reduction(self.norm(x))


class Swin(nn.Module):
    """Image (B, 3, H, W) -> normalised maps (B, C, H, W), one for each of cfg.outputs. Any size: sides are padded."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, dims = cfg, [cfg.dim << i for i in range(len(cfg.depths))]
        self.patch, self.patch_norm = nn.Conv2d(3, cfg.dim, cfg.patch_size, cfg.patch_size), nn.LayerNorm(cfg.dim)
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(dim, 4 * dim, WindowAttention(dim, n_head, cfg.window, i % 2 * (cfg.window // 2)),
                                  F.gelu, 1e-5) for i in range(depth)))
            for dim, depth, n_head in zip(dims, cfg.depths, cfg.n_head))
        self.merges = nn.ModuleList(Merge(dim) for dim in dims[:-1])
        self.norms = nn.ModuleDict({str(i): nn.LayerNorm(dims[i]) for i in cfg.outputs})

    def patches(self, image):
        """(B, 3, H, W) -> (B, H / patch, W / patch, C)."""
        p = self.cfg.patch_size
        image = F.pad(image, (0, -image.shape[3] % p, 0, -image.shape[2] % p))
        return self.patch_norm(self.patch(image).permute(0, 2, 3, 1))

    def forward(self, image):
        x, maps = self.patches(image), []
        for i, stage in enumerate(self.stages):
            x = stage(x if i == 0 else self.merges[i - 1](x))                               # (B, H, W, C)
            if i in self.cfg.outputs:
                maps.append(self.norms[str(i)](x).permute(0, 3, 1, 2))                      # (B, C, H, W)
        return maps
