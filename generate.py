"""Writers of media: latent diffusion that paints pictures, clips and sounds from what a language model hands over.

In order: configs and presets, text towers, convolutions, transformers, UNet, VAE, vocoder, output projection,
schedulers, painter (the parts of one decoder), samplers.
Letters: B batch, F frames, N = B F pictures, C width, H W height width, T tokens, E width of the time embedding.
Papers: latent diffusion (Rombach et al. 2022; Stable Diffusion 1.5), ModelScope video (Wang et al. 2023; ZeroScope v2),
AudioLDM (Liu et al. 2023), HiFi-GAN (Kong et al. 2020), NExT-GPT (Wu et al. 2023), DDIM (Song et al. 2021),
PLMS (Liu et al. 2022), DPM-Solver++ (Lu et al. 2022), guidance (Ho and Salimans 2022). The layers of UNets, VAEs and
vocoder have the names of the published files.
"""
import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from attention import attention
from vision import Block, CLIPAttention, StackedAttention, merge_heads, quick_gelu, split_heads


# ---- Configs and presets

@dataclass(frozen=True)
class UNetConfig:                       # defaults: Stable Diffusion 1.5
    channels: int = 4                   # of the latents, in and out
    widths: tuple[int, ...] = (320, 640, 1280, 1280)        # per level, full size first
    n_head: tuple[int, ...] = (8, 8, 8, 8)                  # per level
    attends: tuple[bool, ...] = (True, True, True, False)   # which levels have transformers; the middle always has one
    n_resnet: int = 2                   # per level on the way down; one more on the way up
    context_dim: int = 768              # of the prompt's tokens; 0 = nothing to look at
    class_dim: int = 0                  # of a vector that joins the time embedding; 0 = none
    video: bool = False                 # layers along time after those in space
    groups: int = 32                    # of the group norms

    @property
    def time_dim(self):
        """E: the time embedding, and as much again for the class vector."""
        return 4 * self.widths[0] * (2 if self.class_dim else 1)


@dataclass(frozen=True)
class VAEConfig:                        # defaults: Stable Diffusion 1.5 and ZeroScope
    channels: int = 3
    latent: int = 4                     # channels of the latents
    widths: tuple[int, ...] = (128, 256, 512, 512)          # each level after the first halves the picture
    n_resnet: int = 2
    groups: int = 32
    scale: float = 0.18215              # latents are what the encoder gives times this
    patch: int = 0                      # nothing learned instead: latents are squares of so many pixels along a side

    @property
    def factor(self):
        """Pixels per latent along a side."""
        return self.patch or 2 ** (len(self.widths) - 1)


@dataclass(frozen=True)
class TextConfig:                       # defaults: the text tower of CLIP ViT-L/14
    dim: int = 768
    n_layer: int = 12
    n_head: int = 12
    mlp_dim: int = 3072
    vocab_size: int = 49408
    max_len: int = 77                   # rows of the position table
    act: str = "quick_gelu"             # or gelu
    norm_eps: float = 1e-5
    out_dim: int = 0                    # CLAP: width of the one vector that a text becomes; 0 = CLIP, a state per token
    start: int = 49406
    end: int = 49407
    pad: int = 49407


@dataclass(frozen=True)
class VocoderConfig:                    # defaults: AudioLDM
    mel_bins: int = 64
    rate: int = 16000                   # samples per second
    width: int = 1024                   # halved by each upsampling
    up_rates: tuple[int, ...] = (5, 4, 2, 2, 2)
    up_kernels: tuple[int, ...] = (16, 16, 8, 4, 4)
    kernels: tuple[int, ...] = (3, 7, 11)                   # of the residual blocks side by side
    dilations: tuple[int, ...] = (1, 3, 5)                  # of the layers in each of them

    @property
    def hop(self):
        """Samples per mel frame."""
        return math.prod(self.up_rates)


@dataclass(frozen=True)
class ProjectionConfig:                 # defaults: NExT-GPT, pictures
    llm_dim: int = 4096
    n_signal: int = 4                   # signal tokens in
    n_query: int = 77                   # prompt tokens out
    out_dim: int = 768
    dim: int = 512
    n_layer: int = 4                    # of the encoder, and of the decoder
    n_head: int = 4
    mlp_dim: int = 2048


@dataclass(frozen=True)
class PainterConfig:                    # defaults: Stable Diffusion 1.5
    unet: UNetConfig = UNetConfig()
    vae: VAEConfig = VAEConfig()
    text: TextConfig | None = TextConfig()                  # None = the caller brings the negative prompt
    vocoder: VocoderConfig | None = None
    proj: ProjectionConfig | None = None                    # from a language model; None = prompts are encoded text
    scheduler: str = "plms"             # row of SCHEDULERS
    beta_start: float = 0.00085         # noise added by the first of the 1000 training steps
    beta_end: float = 0.012             # and by the last
    size: tuple = ()                    # what to paint if nobody says: H W, F H W or seconds; () = SIZES
    steps: int = 50                     # likewise
    guidance: float = 7.5
    clean: bool = False                 # the UNet predicts the clean picture, not the noise

    @property
    def kind(self):
        """What it paints: img, vid or aud, the writer that prompts it."""
        return "aud" if self.vocoder else "vid" if self.unet.video else "img"


SD15 = PainterConfig(proj=ProjectionConfig())
ZEROSCOPE = PainterConfig(
    unet=UNetConfig(n_head=(5, 10, 20, 20), context_dim=1024, video=True),
    text=TextConfig(dim=1024, n_layer=23, n_head=16, mlp_dim=4096, act="gelu", pad=0),
    proj=ProjectionConfig(n_signal=24, out_dim=1024), scheduler="ddim")
AUDIOLDM = PainterConfig(               # parity: 8 heads on every level, as converted; trained were heads 64 wide
    unet=UNetConfig(channels=8, widths=(256, 512, 768, 1280), attends=(False, True, True, True), context_dim=0,
                    class_dim=512),
    vae=VAEConfig(channels=1, latent=8, widths=(128, 256, 512), scale=0.9654927849769592),
    text=TextConfig(vocab_size=50265, max_len=514, act="gelu", norm_eps=1e-12, out_dim=512, start=0, end=2, pad=1),
    vocoder=VocoderConfig(), proj=ProjectionConfig(n_signal=8, n_query=1, out_dim=512),
    scheduler="ddim", beta_start=0.0015, beta_end=0.0195)


# ---- Text towers

ACTS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class CLIPText(nn.Module):
    """CLIP's text tower up to its last norm: ids (B, T) -> (B, T, C). parity: padding is read like any other word."""

    def __init__(self, cfg):
        super().__init__()
        self.embed, self.pos = nn.Embedding(cfg.vocab_size, cfg.dim), nn.Embedding(cfg.max_len, cfg.dim)
        self.blocks = nn.ModuleList(
            Block(cfg.dim, cfg.mlp_dim, CLIPAttention(cfg.dim, cfg.n_head), ACTS[cfg.act], cfg.norm_eps)
            for _ in range(cfg.n_layer))
        self.norm = nn.LayerNorm(cfg.dim, cfg.norm_eps)

    def forward(self, ids):
        x = self.embed(ids) + self.pos.weight[:ids.shape[1]]                                # (B, T, C)
        for block in self.blocks:
            x = block(x, causal=True)
        return self.norm(x)


class PostBlock(Block):
    """The same parts with the norms behind the sums, as in BERT."""

    def forward(self, x, **attn_args):
        x = self.attn_norm(x + self.attn(x, **attn_args))
        return self.mlp_norm(x + self.mlp(x))


class CLAPText(nn.Module):
    """CLAP's text tower, a RoBERTa with a head: ids (B, T) -> unit vectors (B, out_dim). Padding is not looked at."""

    def __init__(self, cfg):
        super().__init__()
        self.pad = cfg.pad
        self.embed, self.pos = nn.Embedding(cfg.vocab_size, cfg.dim), nn.Embedding(cfg.max_len, cfg.dim)
        self.kind = nn.Embedding(1, cfg.dim)            # there was one kind of sentence
        self.embed_norm = nn.LayerNorm(cfg.dim, cfg.norm_eps)
        self.blocks = nn.ModuleList(
            PostBlock(cfg.dim, cfg.mlp_dim, CLIPAttention(cfg.dim, cfg.n_head), ACTS[cfg.act], cfg.norm_eps)
            for _ in range(cfg.n_layer))
        self.pool = nn.Linear(cfg.dim, cfg.dim)
        self.fc1, self.fc2 = nn.Linear(cfg.dim, cfg.out_dim), nn.Linear(cfg.out_dim, cfg.out_dim)

    def forward(self, ids):
        word = ids != self.pad                                                              # (B, T)
        places = word.cumsum(1) * word + self.pad       # words count from pad + 1, padding stays there
        x = self.embed_norm(self.embed(ids) + self.kind.weight[0] + self.pos(places))       # (B, T, C)
        bias = x.new_zeros(word.shape).masked_fill(~word, -torch.inf)[:, None, None]        # (B, 1, 1, T)
        for block in self.blocks:
            x = block(x, bias=bias)
        x = torch.tanh(self.pool(x[:, 0]))                                                  # (B, C)
        return F.normalize(self.fc2(F.relu(self.fc1(x))), dim=-1)                           # (B, out_dim)


# ---- Convolutions

def channels_last(model):
    """Lay the weights of convolutions out with channels innermost, as CPUs and tensor cores want them; what they make
    then lies so too, (N, H, W, C) in memory, through all layers. Values and shapes stay."""
    for p in model.parameters():
        if p.ndim > 3:
            p.data = p.data.contiguous(memory_format=torch.channels_last if p.ndim == 4 else torch.channels_last_3d)
    return model


class GroupNorm(nn.GroupNorm):
    """torch's. Its kernel for channels that lie innermost squares before it takes the mean off: in float32 that mean
    has to be near 0 already."""

    def forward(self, x):
        if x.dtype == torch.float32 and x.device.type == "cpu" and not x.is_contiguous():
            n = x.shape[1] // self.num_groups                                               # channels of a group
            near = x.detach().flatten(2)[:, ::n, :1].repeat_interleave(n, dim=1)            # (N, C, 1): one value each
            x = x - near.view(*x.shape[:2], *[1] * (x.ndim - 2))
        return super().forward(x)


class Given(NamedTuple):
    """What the layers of a UNet are told beside their input. Those of a VAE are told nothing (None)."""
    time: torch.Tensor                  # (N, E), already through SiLU
    text: dict                          # {attention: (keys, values) of the prompt}; the others look at their own input
    n_frame: int


class Resnet(nn.Module):
    """(N, n_in, H, W) -> (N, n_out, H, W), with the time embedding (time_dim wide, 0 = none) added in between."""

    def __init__(self, n_in, n_out, groups, eps, time_dim=0):
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(groups, n_in, eps), nn.Conv2d(n_in, n_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, n_out) if time_dim else None
        self.norm2, self.conv2 = GroupNorm(groups, n_out, eps), nn.Conv2d(n_out, n_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()

    def forward(self, x, given):
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is not None:
            h = h + self.time_emb_proj(given.time)[:, :, None, None]
        for layer in (self.norm2, F.silu, self.conv2):  # a name for each result would keep it in memory
            h = layer(h)
        return self.conv_shortcut(x) + h


class FrameConv(nn.Conv3d):
    """A convolution along time alone: (B, C, F, H W) -> the same, in two dimensions for speed."""

    def forward(self, x):
        return F.conv2d(x, self.weight.squeeze(-1), self.bias, padding=(1, 0))


class TemporalConv(nn.Module):
    """Four convolutions along time, their sum with the input: (N, C, H, W) -> the same."""

    def __init__(self, dim, groups):
        super().__init__()
        for i in range(1, 5):
            drop = [nn.Identity()] if i > 1 else []     # dropout in training, which shifts the published names
            self.add_module(f"conv{i}", nn.Sequential(GroupNorm(groups, dim), nn.SiLU(), *drop,
                                                      FrameConv(dim, dim, (3, 1, 1))))

    def forward(self, x, given):
        h = x.unflatten(0, (-1, given.n_frame)).transpose(1, 2).flatten(3)                  # (B, C, F, H W)
        h = self.conv4(self.conv3(self.conv2(self.conv1(h))))
        return x + h.transpose(1, 2).flatten(0, 1).view_as(x)                               # (N, C, H, W)


class Downsample(nn.Module):
    """Half the height and width. UNets pad by one on each side; VAEs (pad 0) only on the right and below."""

    def __init__(self, dim, pad):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride=2, padding=pad)

    def forward(self, x):
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """To a given (H, W), or twice the size: nearest pixels, then a convolution."""

    def __init__(self, dim):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x, size=None):
        return self.conv(F.interpolate(x, size, None if size else 2))


# ---- Transformers

class Attention(nn.Module):
    """Attention to x itself, or to keys and values made before with `kv`, context_dim wide."""

    def __init__(self, dim, n_head, context_dim=0, bias=False):
        super().__init__()
        self.n_head, self.context_dim = n_head, context_dim
        self.to_q = nn.Linear(dim, dim, bias)
        self.to_k, self.to_v = (nn.Linear(context_dim or dim, dim, bias) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def kv(self, context):
        """Keys and values (B, nh, T, hd) of a context (B, T, context_dim)."""
        return tuple(split_heads(w(context), self.n_head) for w in (self.to_k, self.to_v))

    def forward(self, x, kv=None):
        k, v = kv or self.kv(x)
        q = self.to_q(x).reshape(len(k), -1, x.shape[-1])           # the frames of a clip share its prompt
        return self.to_out[0](merge_heads(attention(split_heads(q, self.n_head), k, v)).reshape(x.shape))


class PixelAttention(Attention):
    """One head that looks over all pixels: (N, C, H, W) -> the same."""

    def __init__(self, dim, groups):
        super().__init__(dim, 1, bias=True)
        self.group_norm = GroupNorm(groups, dim, 1e-6)

    def forward(self, x, given):
        h = self.group_norm(x).flatten(2).transpose(1, 2)                                   # (N, H W, C)
        return x + super().forward(h).transpose(1, 2).unflatten(2, x.shape[2:])


class GEGLU(nn.Module):
    """A layer of which one half gates the other."""

    def __init__(self, dim, mlp_dim):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * mlp_dim)

    def forward(self, x):
        halves = zip(self.proj.weight.chunk(2), self.proj.bias.chunk(2))    # of one product they would lie apart
        x, gate = (F.linear(x, *half) for half in halves)
        return F.gelu(gate).mul_(x)                             # in place: these are the widest of all


class TransformerBlock(nn.Module):
    """Self-attention, attention to the prompt (without one: self-attention again), MLP: (N, T, C) -> the same."""

    def __init__(self, dim, n_head, context_dim):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.attn1, self.attn2 = Attention(dim, n_head), Attention(dim, n_head, context_dim)
        self.ff = nn.ModuleDict({"net": nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))})

    def forward(self, x, text):
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), text.get(self.attn2))
        return x + self.mlp(self.norm3(x))

    def mlp(self, x):
        """On a CPU in pieces: what is widest would be new memory each time, see model.keep_memory."""
        n = -(-4 * x.numel() // 2 ** 24)                            # rounded up
        if n == 1 or x.device.type != "cpu":
            return self.ff.net(x)
        return torch.cat([self.ff.net(part) for part in x.flatten(0, 1).chunk(n)]).view_as(x)


class Transformer(nn.Module):
    """A transformer block over the pixels of each picture: (N, C, H, W) -> the same. project: Linear or 1x1 Conv2d."""

    def __init__(self, dim, n_head, groups, context_dim=0, inner=0, project=nn.Linear):
        super().__init__()
        inner = inner or dim
        self.norm = GroupNorm(groups, dim, 1e-6)
        self.proj_in, self.proj_out = project(dim, inner), project(inner, dim)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(inner, n_head, context_dim)])

    def mix(self, h, text):
        """(N, T, C) -> the same. A 1x1 convolution is a Linear."""
        h = F.linear(h, self.proj_in.weight.flatten(1), self.proj_in.bias)
        h = self.transformer_blocks[0](h, text)
        return F.linear(h, self.proj_out.weight.flatten(1), self.proj_out.bias)

    def forward(self, x, given):
        h = self.norm(x).flatten(2).transpose(1, 2)                                         # (N, H W, C)
        return x + self.mix(h, given.text).transpose(1, 2).unflatten(2, x.shape[2:])


class TemporalTransformer(Transformer):
    """A transformer block over the frames of each pixel. parity: the norm's statistics span the frames."""

    def forward(self, x, given):
        h = self.norm(x.unflatten(0, (-1, given.n_frame)).transpose(1, 2))                  # (B, C, F, H, W)
        B, C, _, H, W = h.shape
        h = self.mix(h.permute(0, 3, 4, 2, 1).reshape(B * H * W, -1, C), given.text)        # (B H W, F, C)
        return x + h.reshape(B, H, W, -1, C).permute(0, 3, 4, 1, 2).flatten(0, 1)           # (N, C, H, W)


# ---- UNet

class Stage(nn.Module):
    """The layers of one resolution: resnets, each followed by what there is of the others, then a change of size."""

    def __init__(self, resnets, attentions=(), temp_convs=(), temp_attentions=(), down=(), up=()):
        super().__init__()
        self.resnets, self.temp_convs = nn.ModuleList(resnets), nn.ModuleList(temp_convs)
        self.attentions, self.temp_attentions = nn.ModuleList(attentions), nn.ModuleList(temp_attentions)
        self.downsamplers, self.upsamplers = nn.ModuleList(down), nn.ModuleList(up)

    def layer(self, i, x, given):
        """Resnet i and what follows it."""
        for kind in (self.resnets, self.temp_convs, self.attentions, self.temp_attentions):
            x = kind[i](x, given) if i < len(kind) else x
        return x

    def forward(self, x, given=None):
        for i in range(len(self.resnets)):
            x = self.layer(i, x, given)
        for resize in (*self.downsamplers, *self.upsamplers):
            x = resize(x)
        return x


def make_stage(cfg, level, sizes, n_attn, **resize):
    """A UNet's Stage. sizes: (n_in, n_out) of each resnet; n_attn of them are followed by transformers."""
    dim, heads = cfg.widths[level], cfg.n_head[level]
    resnets = [Resnet(n_in, n_out, cfg.groups, 1e-5, cfg.time_dim) for n_in, n_out in sizes]
    project = nn.Linear if cfg.video else partial(nn.Conv2d, kernel_size=1)
    attentions = [Transformer(dim, heads, cfg.groups, cfg.context_dim, project=project) for _ in range(n_attn)]
    if not cfg.video:
        return Stage(resnets, attentions, **resize)
    return Stage(resnets, attentions, [TemporalConv(dim, cfg.groups) for _ in sizes],
                 [TemporalTransformer(dim, heads, cfg.groups) for _ in range(n_attn)], **resize)


class TimeEmbedding(nn.Module):
    """Steps (B,) -> (B, 4 dim): cosines and sines of `dim` wavelengths, then two layers."""

    def __init__(self, dim):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, 4 * dim)

    def forward(self, t):
        half = self.linear_1.in_features // 2
        angles = t.float()[:, None] * torch.exp(torch.arange(half, device=t.device) * (-math.log(10000) / half))
        x = torch.cat([angles.cos(), angles.sin()], dim=-1)                                 # (B, dim)
        return self.linear_2(F.silu(self.linear_1(x.to(self.linear_1.weight.dtype))))


class UNet(nn.Module):
    """The noise in latents. Pictures and sounds are (B, C, H, W), clips (B, C, F, H, W); any H and W will do."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, widths = cfg, cfg.widths
        self.time_embedding = TimeEmbedding(widths[0])
        self.class_embedding = nn.Linear(cfg.class_dim, 4 * widths[0]) if cfg.class_dim else None
        self.conv_in = nn.Conv2d(cfg.channels, widths[0], 3, padding=1)
        # parity: 8 heads, whatever the number elsewhere; their width is that of the first level
        self.transformer_in = (TemporalTransformer(widths[0], 8, cfg.groups, inner=8 * (widths[0] // cfg.n_head[0]))
                               if cfg.video else None)
        self.down_blocks, self.up_blocks, skips = nn.ModuleList(), nn.ModuleList(), [widths[0]]
        for level, dim in enumerate(widths):
            sizes = [(skips[-1], dim)] + [(dim, dim)] * (cfg.n_resnet - 1)
            down = [Downsample(dim, pad=1)] if level + 1 < len(widths) else []
            self.down_blocks.append(make_stage(cfg, level, sizes, cfg.attends[level] * len(sizes), down=down))
            skips += [dim] * (len(sizes) + len(down))
        self.mid_block = make_stage(cfg, -1, [(dim, dim)] * 2, 1)
        for level in reversed(range(len(widths))):
            before, dim = dim, widths[level]
            sizes = [(n_in + skips.pop(), dim) for n_in in [before] + [dim] * cfg.n_resnet]
            up = [Upsample(dim)] if level else []
            self.up_blocks.append(make_stage(cfg, level, sizes, cfg.attends[level] * len(sizes), up=up))
        self.conv_norm_out = GroupNorm(cfg.groups, dim)
        self.conv_out = nn.Conv2d(dim, cfg.channels, 3, padding=1)

    def read(self, context):
        """Keys and values of a prompt (B, T, context_dim) for every layer that looks at it: the `text` of a call."""
        return {m: m.kv(context) for m in self.modules() if isinstance(m, Attention) and m.context_dim}

    def given(self, x, t, text, classes):
        """What the layers are told: latents (B, ...) are at steps t (a number or (B,)), classes are vectors (B, c)."""
        time = self.time_embedding(torch.as_tensor(t, device=x.device).expand(len(x)))      # (B, E)
        if self.class_embedding is not None:
            time = torch.cat([time, self.class_embedding(classes)], dim=-1)
        n_frame = x.shape[2] if self.cfg.video else 1
        return Given(F.silu(time).repeat_interleave(n_frame, dim=0), text, n_frame)

    def forward(self, x, t, text=None, classes=None):
        given = self.given(x, t, text or {}, classes)
        if self.cfg.video:
            x = x.transpose(1, 2).flatten(0, 1)                                             # (N, C, H, W)
        x = self.conv_in(x)
        x = self.transformer_in(x, given) if self.cfg.video else x
        skips = [x]
        for stage in self.down_blocks:
            for i in range(len(stage.resnets)):
                x = stage.layer(i, x, given)
                skips.append(x)
            for down in stage.downsamplers:
                x = down(x)
                skips.append(x)
        x = self.mid_block(x, given)
        for stage in self.up_blocks:
            for i in range(len(stage.resnets)):
                x = stage.layer(i, torch.cat([x, skips.pop()], dim=1), given)
            for up in stage.upsamplers:
                x = up(x, skips[-1].shape[-2:])         # a size that was odd on the way down is so again
        x = self.conv_out(F.silu(self.conv_norm_out(x)))
        return x.unflatten(0, (-1, given.n_frame)).transpose(1, 2) if self.cfg.video else x


# ---- VAE

class Coder(nn.Module):
    """Half of a VAE: pictures to latents (down) or back."""

    def __init__(self, cfg, n_in, n_out, widths, down):
        super().__init__()
        deep, stages = cfg.widths[-1], []
        for i, (before, dim) in enumerate(zip((widths[0], *widths), widths)):
            sizes = [before] + [dim] * (cfg.n_resnet - down)                    # the way up has one more
            resize = {}
            if i + 1 < len(widths):
                resize = {"down": [Downsample(dim, pad=0)]} if down else {"up": [Upsample(dim)]}
            stages.append(Stage([Resnet(size, dim, cfg.groups, 1e-6) for size in sizes], **resize))
        self.conv_in = nn.Conv2d(n_in, widths[0], 3, padding=1)
        blocks = nn.ModuleList(stages), nn.ModuleList()
        self.down_blocks, self.up_blocks = blocks if down else blocks[::-1]
        self.mid_block = Stage([Resnet(deep, deep, cfg.groups, 1e-6) for _ in range(2)],
                               [PixelAttention(deep, cfg.groups)])
        self.conv_norm_out = GroupNorm(cfg.groups, widths[-1], 1e-6)
        self.conv_out = nn.Conv2d(widths[-1], n_out, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for stage in (*self.down_blocks, self.mid_block, *self.up_blocks):
            x = stage(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """Pictures (N, channels, H, W) in -1..1 to latents (N, latent, H / factor, W / factor), and back."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.encoder = Coder(cfg, cfg.channels, 2 * cfg.latent, cfg.widths, down=True)
        self.decoder = Coder(cfg, cfg.latent, cfg.channels, cfg.widths[::-1], down=False)
        self.quant_conv = nn.Conv2d(2 * cfg.latent, 2 * cfg.latent, 1)
        self.post_quant_conv = nn.Conv2d(cfg.latent, cfg.latent, 1)

    def moments(self, x):
        """Mean and logarithm of the variance of each latent, before scaling."""
        return self.quant_conv(self.encoder(x)).chunk(2, dim=1)

    def encode(self, x, noise):
        """Latents of pictures; noise is standard normal, of their shape."""
        mean, logvar = self.moments(x)
        return self.cfg.scale * (mean + (logvar.clamp(-30, 20) / 2).exp() * noise)

    def decode(self, latents):
        return self.decoder(self.post_quant_conv(latents / self.cfg.scale))


class Patches(nn.Module):
    """Stands in for a VAE: the pixels of a square become the channels of a latent (Li and He 2025, Back to basics)."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg

    def encode(self, x, noise=None):
        return self.cfg.scale * F.pixel_unshuffle(x, self.cfg.patch)

    def decode(self, latents):
        return F.pixel_shuffle(latents, self.cfg.patch) / self.cfg.scale


# ---- Vocoder

class ResidualBlock(nn.Module):
    """Pairs of convolutions along time, the first of each dilated: (B, C, T) -> the same."""

    def __init__(self, dim, kernel, dilations):
        super().__init__()
        self.convs1, self.convs2 = (
            nn.ModuleList(nn.Conv1d(dim, dim, kernel, dilation=d, padding=d * (kernel // 2)) for d in steps)
            for steps in (dilations, [1] * len(dilations)))

    def forward(self, x):
        for one, two in zip(self.convs1, self.convs2):
            x = x + two(F.leaky_relu(one(F.leaky_relu(x, 0.1)), 0.1))
        return x


class Vocoder(nn.Module):
    """HiFi-GAN: log-mel frames (B, T, mel_bins) -> samples (B, about T * hop) in -1..1."""

    def __init__(self, cfg):
        super().__init__()
        dims = [cfg.width >> i for i in range(len(cfg.up_rates) + 1)]
        self.conv_pre = nn.Conv1d(cfg.mel_bins, dims[0], 7, padding=3)
        self.upsampler = nn.ModuleList(
            nn.ConvTranspose1d(n_in, n_out, kernel, rate, padding=(kernel - rate) // 2)
            for n_in, n_out, kernel, rate in zip(dims, dims[1:], cfg.up_kernels, cfg.up_rates))
        self.resblocks = nn.ModuleList(ResidualBlock(dim, k, cfg.dilations) for dim in dims[1:] for k in cfg.kernels)
        self.conv_post = nn.Conv1d(dims[-1], 1, 7, padding=3)

    def forward(self, mel):
        x, n = self.conv_pre(mel.transpose(1, 2)), len(self.resblocks) // len(self.upsampler)
        for i, up in enumerate(self.upsampler):
            x = up(F.leaky_relu(x, 0.1))                                                    # (B, C / 2, T * rate)
            x = sum(block(x) for block in self.resblocks[i * n:(i + 1) * n]) / n
        return torch.tanh(self.conv_post(F.leaky_relu(x, 0.01))).squeeze(1)     # parity: this slope differs


# ---- Output projection

class CrossAttention(StackedAttention):
    """Queries of x, keys and values of a memory, by one stacked matrix."""

    def forward(self, x, memory):
        dim = x.shape[-1]
        (wq, wkv), (bq, bkv) = (p.split([dim, 2 * dim]) for p in (self.wqkv.weight, self.wqkv.bias))
        q, k, v = F.linear(x, wq, bq), *F.linear(memory, wkv, bkv).chunk(2, dim=-1)         # (B, T, C) each
        return self.wo(merge_heads(attention(*(split_heads(y, self.n_head) for y in (q, k, v)))))


class CrossBlock(Block):
    """A block that also looks at a memory."""

    def __init__(self, dim, mlp_dim, n_head):
        super().__init__(dim, mlp_dim, StackedAttention(dim, n_head), F.relu, 1e-5)
        self.cross_norm, self.cross = nn.LayerNorm(dim, 1e-5), CrossAttention(dim, n_head)

    def forward(self, x, memory):
        x = x + self.attn(self.attn_norm(x))
        x = x + self.cross(self.cross_norm(x), memory)
        return x + self.mlp(self.mlp_norm(x))


class OutputProjection(nn.Module):
    """What the language model says at its signal tokens, in the words of a painter: a small encoder-decoder.

    h (B, n_signal, llm_dim) are the last hidden states, after the final norm, embeds the input embeddings of the same
    tokens. Learned queries look at their sum and become a prompt (B, n_query, out_dim).
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.fc, self.model = nn.Linear(cfg.llm_dim, cfg.dim), nn.Linear(cfg.dim, cfg.out_dim)
        self.query_embs = nn.Parameter(torch.zeros(1, cfg.n_query, cfg.dim))
        self.encoder = nn.ModuleList(
            Block(cfg.dim, cfg.mlp_dim, StackedAttention(cfg.dim, cfg.n_head), F.relu, 1e-5)
            for _ in range(cfg.n_layer))
        self.decoder = nn.ModuleList(CrossBlock(cfg.dim, cfg.mlp_dim, cfg.n_head) for _ in range(cfg.n_layer))
        self.encoder_norm, self.decoder_norm = nn.LayerNorm(cfg.dim), nn.LayerNorm(cfg.dim)

    def forward(self, h, embeds):
        x = self.fc(h + embeds)                                                             # (B, n_signal, C)
        for block in self.encoder:
            x = block(x)
        x, y = self.encoder_norm(x), self.query_embs.expand(len(h), -1, -1)                 # y (B, n_query, C)
        for block in self.decoder:
            y = block(y, x)
        return self.model(self.decoder_norm(y))                                             # (B, n_query, out_dim)


# ---- Schedulers
# A scheduler is a list of steps to visit and a function update(k, past, times, signal) -> latents after call k of the
# network. past: (latents, noise) of the last calls, newest first. signal: how much of the variance at each of the
# 1000 training steps is picture.

def signal_levels(beta_start, beta_end):
    """(1000,) falling towards 0: the product of 1 - beta, whose square roots are evenly spaced."""
    return (1 - torch.linspace(beta_start ** 0.5, beta_end ** 0.5, 1000) ** 2).cumprod(0)


def even_times(n):
    """n training steps, the noisiest first, the last always 1."""
    return [i * (1000 // n) + 1 for i in reversed(range(n))]


def move(x, noise, a, b):
    """Latents at signal level a -> b, if this is the noise in them."""
    return (b / a).sqrt() * (x - (1 - a).sqrt() * noise) + (1 - b).sqrt() * noise


def ddim(k, past, times, signal):
    """One straight step. parity: the last one ends at training step 0, not at a clean picture."""
    return move(*past[0], signal[times[k]], signal[times[k + 1] if k + 1 < len(times) else 0])


def plms_times(n):
    """The second step is visited twice, so that n steps take n + 1 calls."""
    times = even_times(n)
    return times[:2] + times[1:]


# Weights of the noise of this call and those before it, by call; the repeated call (1) is never used again.
PLMS = [(1,), (1 / 2, 1 / 2), (3 / 2, 0, -1 / 2), (23 / 12, -16 / 12, 0, 5 / 12),
        (55 / 24, -59 / 24, 37 / 24, 0, -9 / 24), (55 / 24, -59 / 24, 37 / 24, -9 / 24)]


def plms(k, past, times, signal):
    """A straight step along noise extrapolated from past calls. Call 1 repeats the first step with a better guess."""
    noise = sum(w * e for w, (_, e) in zip(PLMS[min(k, 5)], past))
    back = 1 if k == 1 else 0
    return ddim(k - back, [(past[back][0], noise)], times, signal)


def dpm_times(n):
    """n training steps from 999 down, evenly spaced up to rounding."""
    return [round(k * (999 / n)) for k in reversed(range(1, n + 1))]


def dpm(k, past, times, signal):
    """DPM-Solver++ of order 2: clean pictures are predicted and extrapolated; the first and the last step are plain."""
    levels = [*signal[times], torch.ones(())]
    clean = [(x - (1 - a).sqrt() * noise) / a.sqrt() for (x, noise), a in zip(past, (levels[k], levels[k - 1]))]
    before, a, b, guess = levels[k - 1], levels[k], levels[k + 1], clean[0]
    lam, lam_next, lam_before = ((v / (1 - v)).log() / 2 for v in (a, b, before))
    if 0 < k < len(times) - 1:
        guess = guess + (lam_next - lam) / (lam - lam_before) / 2 * (clean[0] - clean[1])
    return ((1 - b) / (1 - a)).sqrt() * past[0][0] - b.sqrt() * torch.expm1(lam - lam_next) * guess


SCHEDULERS = {"ddim": (even_times, ddim), "plms": (plms_times, plms), "dpm": (dpm_times, dpm)}


# ---- Painter

class Painter(nn.Module):
    """All parts of one decoder under the names they have in a weights folder."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.proj = OutputProjection(cfg.proj) if cfg.proj else None
        self.text = cfg.text and (CLAPText if cfg.text.out_dim else CLIPText)(cfg.text)
        self.unet, self.vae = UNet(cfg.unet), (Patches if cfg.vae.patch else VAE)(cfg.vae)
        self.vocoder = Vocoder(cfg.vocoder) if cfg.vocoder else None

    def unprompted(self, embeds):
        """The empty text, encoded for use beside these prompts: (1, T, C) or (1, C)."""
        if self.text is None:
            raise ValueError("this painter has no text tower; give `negative`, the embedding of the empty text")
        ids = [self.cfg.text.start, self.cfg.text.end]
        ids += [self.cfg.text.pad] * (embeds.shape[1] - 2)      # parity: of a sound's one vector, the width
        return self.text(torch.tensor([ids], device=embeds.device)).to(embeds.dtype)

    def forward(self, h, embeds, **how):
        """Signal tokens (see OutputProjection) -> media, by draw_image, draw_video or draw_audio."""
        prompt = self.proj(h, embeds)                                                       # (B, n_query, out_dim)
        return DRAW[self.cfg.kind](self, prompt.squeeze(1) if self.vocoder else prompt, **how)


# ---- Samplers
# draw_*(painter, prompt_embeds, size, **how): how is what `denoise` takes.

def denoise(painter, embeds, shape, *, negative=None, steps=None, guidance=None, seed=None, noise=None):
    """The loop from noise to latents of `shape`, for prompts (B, T, C) or (B, C).

    negative: what to steer away from (the empty text); guidance: how much (1 or less: not at all); None: the painter's
    own. The noise to start from may be given; else it is drawn on the CPU: a seed means the same on every device.
    """
    cfg, unet, prompts = painter.cfg, painter.unet, [embeds]
    steps, guidance = cfg.steps if steps is None else steps, cfg.guidance if guidance is None else guidance
    if cfg.scheduler not in SCHEDULERS or not 0 < steps < 1000:
        raise ValueError(f"{cfg.scheduler!r}, {steps} steps; use one of {', '.join(SCHEDULERS)} and 1 to 999 steps")
    if noise is None:
        noise = torch.randn(shape, generator=None if seed is None else torch.Generator().manual_seed(seed))
    if noise.shape != torch.Size(shape):
        raise ValueError(f"noise has shape {list(noise.shape)}; this size needs {list(shape)}")
    if guidance > 1:
        negative = painter.unprompted(embeds) if negative is None else negative
        prompts = [negative.expand_as(embeds), embeds]
    read = torch.cat(prompts)
    told = {"text": unet.read(read)} if cfg.unet.context_dim else {"classes": read}
    plan, update = SCHEDULERS[cfg.scheduler]
    times, signal, past, latents = plan(steps), signal_levels(cfg.beta_start, cfg.beta_end), [], noise.to(embeds)
    for k, t in enumerate(tqdm(times, desc="painting", leave=False, disable=None)):
        preds = unet(torch.cat([latents] * len(prompts)), t, **told).chunk(len(prompts))
        noise_pred = preds[0] + guidance * (preds[-1] - preds[0])       # unguided, there is but one
        if cfg.clean:
            noise_pred = (latents - signal[t].sqrt() * noise_pred) / (1 - signal[t]).sqrt()
        past = [(latents, noise_pred), *past[:4]]
        latents = update(k, past, times, signal)
    return latents


SIZES = {"img": (512, 512), "vid": (24, 320, 576), "aud": (9.0,)}              # NExT-GPT's


def latent_sides(pixels, factor):
    """Height and width of the latents of a picture."""
    if any(n < factor or n % factor for n in pixels):
        raise ValueError(f"a picture of {pixels[0]} x {pixels[1]} pixels; both must be multiples of {factor}")
    return [n // factor for n in pixels]


@torch.no_grad()
def draw_image(painter, prompt_embeds, size=(), **how):
    """Pictures of prompts (B, 77, C): uint8 (B, H, W, 3). size: (H, W) in pixels."""
    size = size or painter.cfg.size or SIZES["img"]
    shape = len(prompt_embeds), painter.cfg.unet.channels, *latent_sides(size, painter.cfg.vae.factor)
    x = painter.vae.decode(denoise(painter, prompt_embeds, shape, **how)).float() / 2 + 0.5     # (B, 3, H, W)
    return (x.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)


@torch.no_grad()
def draw_video(painter, prompt_embeds, size=(), **how):
    """Clips of prompts (B, 77, C): uint8 (B, F, H, W, 3). size: (F, H, W), frames and pixels."""
    size = size or painter.cfg.size or SIZES["vid"]
    shape = len(prompt_embeds), painter.cfg.unet.channels, size[0], *latent_sides(size[1:], painter.cfg.vae.factor)
    frames = denoise(painter, prompt_embeds, shape, **how).transpose(1, 2).flatten(0, 1)        # (N, C, H, W)
    x = torch.cat([painter.vae.decode(frame).float() for frame in frames.split(1)]) / 2 + 0.5   # one by one: memory
    x = (x.clamp(0, 1) * 255).byte()                            # parity: cut off, where pictures are rounded
    return x.permute(0, 2, 3, 1).unflatten(0, (-1, size[0]))


@torch.no_grad()
def draw_audio(painter, prompt_embeds, seconds=None, **how):
    """Sounds of prompts (B, C): float samples (B, seconds * rate) in -1..1. parity: some come out a bit short."""
    cfg, voice = painter.cfg, painter.cfg.vocoder
    seconds = (cfg.size or SIZES["aud"])[0] if seconds is None else seconds
    rows = math.ceil(int(seconds / (voice.hop / voice.rate)) / cfg.vae.factor)
    if rows < 1:
        raise ValueError(f"a sound of {seconds} seconds; the shortest has {voice.hop / voice.rate}")
    shape = len(prompt_embeds), cfg.unet.channels, rows, voice.mel_bins // cfg.vae.factor
    mel = painter.vae.decode(denoise(painter, prompt_embeds, shape, **how))[:, 0]               # (B, T, mel_bins)
    return painter.vocoder(mel).float()[:, :int(seconds * voice.rate)]


DRAW = {"img": draw_image, "vid": draw_video, "aud": draw_audio}
