"""The assembled model: readers put vectors into a LLaMA at placeholder tokens; writers (boxes, media) will take them out.

In order: configs and presets, LLaMA (RoPE, LoRA, KV cache, blocks), readers, Model, token generation, load and save.
Letters: B batch, T tokens, C width, nh heads, nkv key/value heads, hd head dim, V vocabulary, M media, n tokens per medium.
Papers: LLaMA (Touvron et al. 2023), RoPE (Su et al. 2021), LoRA (Hu et al. 2021), LLaVA (Liu et al. 2023).
Layout is that of the public checkpoints: separate q, k, v and half-rotation RoPE, so converting them only renames.
"""
import json
import math
import os
import shutil
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from attention import attention
from vision import CLIPConfig, CLIPVision, ImageBind, ImageBindConfig, TowerConfig, merge_heads, split_heads

FORMAT = 1                              # of weights folders; load() refuses a newer one


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


@dataclass(frozen=True)
class ModelConfig:
    llm: LLMConfig | None = None        # None = a folder that holds only an encoder
    imagebind: ImageBindConfig | None = None
    clip: CLIPConfig | None = None
    reads: dict[str, str] = field(default_factory=dict)     # media kind -> reader
    system: str = "plain"               # row of data.SYSTEMS: special tokens, templates
    template: str = ""                  # row of data.TEMPLATES; empty = the system's own
    bos: int = 1
    eos: tuple[int, ...] = (2,)
    added_tokens: dict[str, int] = field(default_factory=dict)
    media: dict = field(default_factory=dict)               # fields of data.MediaSpec that differ from its defaults

    def n_token(self, kind):
        """Placeholder tokens that one medium of this kind takes."""
        return self.clip.n_patch if self.reads[kind] == "clip" else self.imagebind.n_token(TOWERS.get(kind, kind))


TOWERS = {"image": "vision", "video": "vision"}         # media kinds that share a tower of ImageBind; the others have their own
IMAGEBIND_READS = {kind: "imagebind" for kind in ("image", "video", "audio", "depth", "thermal", "imu")}
VICUNA_V0 = LLMConfig(norm_eps=1e-6, max_len=2048, vocab_size=32001)
CHATBIND_TOKENS = {"[PAD]": 32000, "<im_patch>": 32001, "<im_start>": 32002, "<im_end>": 32003}
TINY = ModelConfig(
    llm=LLMConfig(dim=192, n_layer=4, n_head=3, n_kv_head=3, mlp_dim=512, vocab_size=603, max_len=1024, tied=True),
    imagebind=ImageBindConfig(
        towers={"vision": TowerConfig(128, 5, 2, 3, (2, 64, 64), (2, 8, 8), stem_norm=False, pre_norm=True, bias_kv=False,
                                      scale=False),
                "audio": TowerConfig(96, 4, 2, 1, (64, 204), (64, 12))},
        out_dim=192, patches=True),
    reads={kind: "imagebind" for kind in ("image", "video", "audio")}, system="tiny",
    added_tokens={"<im_patch>": 600, "<im_start>": 601, "<im_end>": 602},
    media=dict(image_size=64, video_clips=2, video_crops=1, mel_bins=64, audio_clips=1))

PRESETS = {
    "vicuna-7b-v1.5": ModelConfig(llm=LLMConfig()),
    "vicuna-7b-v0": ModelConfig(llm=VICUNA_V0),
    "llama-2-13b": ModelConfig(llm=LLMConfig(dim=5120, n_layer=40, n_head=40, n_kv_head=40, mlp_dim=13824)),
    "clip-vit-l-14": ModelConfig(clip=CLIPConfig(image_size=224), reads={"image": "clip"}),
    "clip-vit-l-14-336": ModelConfig(clip=CLIPConfig(), reads={"image": "clip"}),
    "imagebind-huge": ModelConfig(imagebind=ImageBindConfig(), reads=IMAGEBIND_READS),
    "chatbind-7b": ModelConfig(llm=replace(VICUNA_V0, vocab_size=32004), imagebind=ImageBindConfig(), system="chatbind",
                               reads=IMAGEBIND_READS, added_tokens=CHATBIND_TOKENS),
    "tiny": TINY,
}


# ---- LLaMA

def rope_table(cfg, length, device):
    """cos and sin (length, hd) of every position, float32; Llama-3's scaling blends stretched and plain frequencies."""
    hd = cfg.head_dim or cfg.dim // cfg.n_head
    freqs = cfg.rope_theta ** -(torch.arange(0, hd, 2, device=device).float() / hd)         # (hd / 2)
    if cfg.rope_factor != 1:
        turns = cfg.rope_train_len * freqs / (2 * math.pi)
        plain = ((turns - cfg.rope_low) / (cfg.rope_high - cfg.rope_low)).clamp(0, 1)
        freqs = freqs * plain + freqs / cfg.rope_factor * (1 - plain)
    angles = torch.outer(torch.arange(length, device=device).float(), freqs).repeat(1, 2)   # (length, hd)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Half-rotation RoPE: channel j turns with channel j + hd / 2. x (B, nh, T, hd), cos and sin (T, hd)."""
    a, b = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-b, a], dim=-1) * sin.to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        wide = x.float()                                    # parity: the mean square is taken in float32
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class LoRALinear(nn.Linear):
    """A Linear that owns its low-rank update: W x + alpha / rank * B A x. Base weight keeps its name, so paths never change."""

    def __init__(self, n_in, n_out, rank, alpha, dropout=0.0):
        super().__init__(n_in, n_out, bias=False)
        self.lora_A, self.lora_B = nn.Parameter(torch.zeros(rank, n_in)), nn.Parameter(torch.zeros(n_out, rank))
        self.scale, self.dropout = alpha / rank, nn.Dropout(dropout)

    def forward(self, x):
        return super().forward(x) + self.scale * F.linear(F.linear(self.dropout(x), self.lora_A), self.lora_B)

    def merge(self):
        """The plain Linear with the update folded in."""
        plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(self.weight + self.scale * self.lora_B @ self.lora_A)
        return plain


def linear(cfg, name, n_in, n_out):
    """The Linear called `name`, with LoRA where the config asks for it."""
    if cfg.lora_rank and name in cfg.lora_targets.split():
        return LoRALinear(n_in, n_out, cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout)
    return nn.Linear(n_in, n_out, bias=False)


class KVCache:
    """Static keys and values of all layers, (n_layer, B, nkv, max_len, hd). The first `pos` places are filled."""

    def __init__(self, llm, batch, max_len):
        cfg, weight = llm.cfg, llm.embed.weight
        shape = cfg.n_layer, batch, cfg.n_kv_head, max_len, cfg.head_dim or cfg.dim // cfg.n_head
        self.k, self.v = (torch.empty(shape, device=weight.device, dtype=weight.dtype) for _ in range(2))
        self.pos, self.max_len = 0, max_len

    def append(self, layer, k, v):
        """Write (B, nkv, T, hd) behind what layer `layer` holds; returns views of all its keys and values."""
        end = self.pos + k.shape[2]
        self.k[layer, :, :, self.pos:end], self.v[layer, :, :, self.pos:end] = k, v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def reorder(self, rows):
        """Row r continues what row rows[r] held (beam search)."""
        self.k[:, :, :, :self.pos], self.v[:, :, :, :self.pos] = self.k[:, rows, :, :self.pos], self.v[:, rows, :, :self.pos]


class Attention(nn.Module):
    def __init__(self, cfg, layer):
        super().__init__()
        hd = cfg.head_dim or cfg.dim // cfg.n_head
        self.layer, self.n_head, self.n_kv_head = layer, cfg.n_head, cfg.n_kv_head
        self.wq = linear(cfg, "wq", cfg.dim, cfg.n_head * hd)
        self.wk = linear(cfg, "wk", cfg.dim, cfg.n_kv_head * hd)
        self.wv = linear(cfg, "wv", cfg.dim, cfg.n_kv_head * hd)
        self.wo = linear(cfg, "wo", cfg.n_head * hd, cfg.dim)

    def forward(self, x, rope, bias, cache):
        q = rotate(split_heads(self.wq(x), self.n_head), *rope)                             # (B, nh, T, hd)
        k = rotate(split_heads(self.wk(x), self.n_kv_head), *rope)                          # (B, nkv, T, hd)
        v = split_heads(self.wv(x), self.n_kv_head)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)                                           # (B, nkv, S, hd)
        return self.wo(merge_heads(attention(q, k, v, causal=True, bias=bias)))


class SwiGLU(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.gate = linear(cfg, "gate", cfg.dim, cfg.mlp_dim)
        self.up = linear(cfg, "up", cfg.dim, cfg.mlp_dim)
        self.down = linear(cfg, "down", cfg.mlp_dim, cfg.dim)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class LLMBlock(nn.Module):
    def __init__(self, cfg, layer):
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(cfg.dim, cfg.norm_eps), Attention(cfg, layer)
        self.mlp_norm, self.mlp = RMSNorm(cfg.dim, cfg.norm_eps), SwiGLU(cfg)

    def forward(self, x, rope, bias, cache):
        x = x + self.attn(self.attn_norm(x), rope, bias, cache)
        return x + self.mlp(self.mlp_norm(x))


class LLM(nn.Module):
    """LLaMA. A call takes embeddings (B, T, C) and gives normalised hidden states (B, T, C)."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.rope = cfg, None
        self.embed = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.blocks = nn.ModuleList(LLMBlock(cfg, i) for i in range(cfg.n_layer))
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.lm_head = nn.Linear(cfg.dim, cfg.vocab_size, bias=False)
        if cfg.tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, x, cache=None, attn_mask=None):
        """attn_mask (B, T) bool hides padding that is not on the right; positions count on through it."""
        start = 0 if cache is None else cache.pos
        rope = self.positions(start, start + x.shape[1], x.device)
        bias = None
        if attn_mask is not None:
            bias = x.new_zeros(attn_mask.shape).masked_fill(~attn_mask, torch.finfo(x.dtype).min)[:, None, None]   # (B, 1, 1, T)
        for block in self.blocks:
            x = block(x, rope, bias, cache)
        if cache is not None:
            cache.pos += x.shape[1]
        return self.norm(x)

    def positions(self, start, end, device):
        """cos and sin (end - start, hd); the table is computed once, and again when it must grow or move."""
        if self.rope is None or len(self.rope[0]) < end or self.rope[0].device != device:
            self.rope = rope_table(self.cfg, max(end, self.cfg.max_len), device)
        return [table[start:end] for table in self.rope]


# ---- Readers

class ImageBindReader(nn.Module):
    """One medium -> ImageBind -> Linear -> n soft tokens. All kinds share the projector."""

    def __init__(self, cfg, dim):
        super().__init__()
        self.tower = ImageBind(cfg)
        self.projector = nn.Linear(cfg.out_dim, dim) if dim else nn.Identity()

    def forward(self, kind, x):
        return self.projector(self.tower(TOWERS.get(kind, kind), x))                        # (M, n, C)


class CLIPReader(nn.Module):
    """Image -> CLIP patch features -> Linear -> one soft token per patch."""

    def __init__(self, cfg, dim):
        super().__init__()
        self.tower = CLIPVision(cfg)
        self.projector = nn.Linear(cfg.dim, dim) if dim else nn.Identity()

    def forward(self, kind, x):
        return self.projector(self.tower(x))                                                # (M, N, C)


# ---- Model

def lm_loss(lm_head, h, labels):
    """Mean cross-entropy of the next token. Only labelled places (not -100) reach the vocabulary."""
    keep = labels[:, 1:] != -100
    return F.cross_entropy(lm_head(h[:, :-1][keep]).float(), labels[:, 1:][keep])


class Model(nn.Module):
    """Readers + LLM. Nothing here names a system: a preset says which parts exist and which reader takes which medium."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        dim = cfg.llm and cfg.llm.dim
        parts = {"imagebind": (ImageBindReader, cfg.imagebind), "clip": (CLIPReader, cfg.clip)}
        self.llm = LLM(cfg.llm) if cfg.llm else None
        self.readers = nn.ModuleDict({name: reader(part, dim) for name, (reader, part) in parts.items() if part})

    def read(self, kind, payload):
        """Embeddings (M, n, C) that M media of one kind put into the prompt."""
        return self.readers[self.cfg.reads[kind]](kind, payload)

    def embed(self, ids, media, slots):
        """Token embeddings (B, T, C) with each medium written over its placeholders.

        ids (B, T); media {kind: stacked payloads of M media}; slots {kind: rows and columns, (2, M * n)}.
        """
        x = self.llm.embed(ids)
        for kind, payload in media.items():
            new = self.read(kind, payload).flatten(0, 1).to(x.dtype)                        # (M * n, C)
            x = x.index_put(tuple(slots[kind]), new)
        return x

    def forward(self, batch):
        """Named losses of a data.Batch."""
        h = self.llm(self.embed(batch.ids, batch.media, batch.slots))                       # (B, T, C)
        return {"lm": lm_loss(self.llm.lm_head, h, batch.labels)}


def initialise(model):
    """Random weights for training from nothing, in place.

    Linear, convolution, lora_A         normal(0, 1 / sqrt(fan in)); those that write to the residual stream / sqrt(2 n_layer)
    embedding, positions, class tokens, extra key and value         normal(0, 0.02)
    norms 1; biases, lora_B 0; log_scale log(1 / 0.07)
    """
    stacks = {name: len(m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    for name, p in model.named_parameters():
        n_layer = next((n for stack, n in stacks.items() if name.startswith(stack + ".")), 1)
        if name.endswith("weight") and "norm" in name.split(".")[-2]:
            nn.init.ones_(p)
        elif name.endswith(("bias", "lora_B")):
            nn.init.zeros_(p)
        elif p.ndim == 1 or p.ndim == 3 or name.endswith(("embed.weight", "pos.weight")):
            nn.init.normal_(p, std=0.02)
        else:
            writes = name.endswith(("wo.weight", "down.weight", "fc2.weight"))
            nn.init.normal_(p, std=p[0].numel() ** -0.5 / (math.sqrt(2 * n_layer) if writes else 1))
    for b in model.buffers():
        b.fill_(math.log(1 / 0.07))


# ---- Token generation

def filter_logits(logits, *, temperature, top_k, top_p):
    """Sampling filters in their customary order: temperature, the k best, the smallest set of mass top_p. logits (B, V)."""
    logits = logits / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, index = logits.sort()                                                      # worst first
        drop = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        drop[:, -1] = False
        logits = logits.masked_fill(drop.scatter(1, index, drop), -torch.inf)
    return logits


def penalise(logits, seen, penalty):
    """Repetition penalty (Keskar et al. 2019): shrink the logits of ids already seen, divided if positive else multiplied."""
    old = logits.gather(1, seen)
    return logits.scatter(1, seen, torch.where(old > 0, old / penalty, old * penalty))


@torch.inference_mode()
def generate(model, embeds, *, cache=None, max_new_tokens=512, temperature=0.0, top_k=0, top_p=1.0,
             repetition_penalty=1.0, seen=(), generator=None):
    """Yield new token ids one by one, an end token last if one comes. Temperature 0 takes the likeliest.

    embeds (1, T, C) are the places not yet in `cache` (a KVCache; default: a fresh one). seen: prompt ids that the
    repetition penalty also counts. generator: torch.Generator for sampling. Closing the iterator early is fine.
    """
    llm, seen = model.llm, list(seen)
    cache = cache or KVCache(llm, 1, embeds.shape[1] + max_new_tokens)
    for _ in range(max_new_tokens):
        logits = llm.lm_head(llm(embeds, cache)[:, -1]).float()                             # (1, V)
        if repetition_penalty != 1 and seen:
            logits = penalise(logits, torch.tensor([seen], device=logits.device), repetition_penalty)
        if temperature == 0:
            new = logits.argmax(-1, keepdim=True)                                           # (1, 1)
        else:
            probs = filter_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p).softmax(-1)
            new = torch.multinomial(probs, 1, generator=generator)
        seen.append(new.item())
        yield seen[-1]
        if seen[-1] in model.cfg.eos:
            return
        embeds = llm.embed(new)                                                             # (1, 1, C)


@torch.inference_mode()
def beam_search(model, embeds, *, n_beam=5, max_new_tokens=512):
    """The best sequence of ids by beam search, its end token included if one came. embeds (1, T, C).

    parity: transformers 4.31 from embeddings, which all four systems run on. A hypothesis scores its summed log
    probability over 1 + its ids without the end token; an end token counts only among the n_beam best candidates; the
    search stops when n_beam are kept and the worst of them is no worse than the best candidate could still become.
    """
    llm = model.llm
    cache = KVCache(llm, n_beam, embeds.shape[1] + max_new_tokens)
    h = llm(embeds.expand(n_beam, -1, -1), cache)[:, -1]                                    # (n_beam, C)
    scores = torch.full((n_beam, 1), -1e9, device=h.device)
    scores[0] = 0
    beams, done = [[] for _ in range(n_beam)], []           # done: (score, ids)
    for step in range(1, max_new_tokens + 1):
        total = llm.lm_head(h).float().log_softmax(-1) + scores                             # (n_beam, V)
        best, index = total.flatten().topk(2 * n_beam)
        rows, new, kept = (index // total.shape[1]).tolist(), (index % total.shape[1]).tolist(), []
        for rank, (score, row, id) in enumerate(zip(best.tolist(), rows, new)):
            if id not in model.cfg.eos:
                kept.append((score, row, id))
            elif rank < n_beam:
                done = sorted(done + [(score / step, beams[row] + [id])], key=lambda x: -x[0])[:n_beam]
            if len(kept) == n_beam:
                break
        beams = [beams[row] + [id] for _, row, id in kept]
        if len(done) == n_beam and done[-1][0] >= best[0].item() / (step + 1):
            break
        cache.reorder(torch.tensor([row for _, row, _ in kept], device=h.device))
        scores = torch.tensor([[score] for score, _, _ in kept], device=h.device)
        if step < max_new_tokens:
            h = llm(llm.embed(torch.tensor([[id] for _, _, id in kept], device=h.device)), cache)[:, -1]
    else:
        done += [(score.item() / (1 + max_new_tokens), ids) for score, ids in zip(scores, beams)]
    return max(done, key=lambda x: x[0])[1]


# ---- Load and save

LIMITS = {"n_layer": 1024, "n_head": 4096, "vocab_size": 1 << 21}     # a config beyond these is damaged, not large


def to_config(cls, values, where):
    """Rebuild a config dataclass from JSON. Raises ValueError naming `where` for unknown fields and absurd sizes."""
    known = {f.name for f in fields(cls)}
    if unknown := set(values) - known:
        raise ValueError(f"{where}: unknown field {min(unknown)!r} of {cls.__name__}; known: {', '.join(sorted(known))}")
    for key, value in values.items():
        if isinstance(value, int) and not (-64 if key == "feature_layer" else 0) <= value <= LIMITS.get(key, 1 << 24):
            raise ValueError(f"{where}: {key} = {value} is out of bounds")
    nested = {"llm": LLMConfig, "imagebind": ImageBindConfig, "clip": CLIPConfig}
    out = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    for key, part in nested.items():
        if cls is ModelConfig and out.get(key) is not None:
            out[key] = to_config(part, out[key], f"{where}: {key}")
    if "towers" in out:
        out["towers"] = {kind: to_config(TowerConfig, t, f"{where}: {kind}") for kind, t in out["towers"].items()}
    return cls(**out)


def read_config(folder):
    """ModelConfig of a weights folder. Raises FileNotFoundError or ValueError, saying what is wrong with which file."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a weights folder: it has no config.json (make one with convert_weights.py)")
    try:
        values = json.loads(path.read_text())
        version = values.pop("format_version")
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not a config of this code ({error!r}); convert the folder with convert_weights.py") from None
    if version > FORMAT:
        raise ValueError(f"{path}: format {version} is newer than this code understands ({FORMAT}); update the code")
    return to_config(ModelConfig, values, path)


def tensor_files(folder):
    """{tensor name: file} of a folder's safetensors. Shard names must be plain names of existing files."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"] if index.is_file() else {}
    for name in set(names.values()):
        if Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"{index}: shard {name!r} is not a file of this folder")
    if names:
        return {key: folder / name for key, name in names.items()}
    with safe_open(folder / "model.safetensors", "pt") as f:
        return {key: folder / "model.safetensors" for key in f.keys()}


def load(folder, device="cpu", dtype=None):
    """The Model of a weights folder, in eval mode, its tensors memory-mapped (dtype None: as stored).

    Raises FileNotFoundError, ValueError naming the file and key that do not fit.
    """
    with torch.device("meta"):
        model = Model(read_config(folder))
    want, state = model.state_dict(), {}
    files = tensor_files(folder)
    tied = {"llm.lm_head.weight"} if model.cfg.llm and model.cfg.llm.tied else set()
    if odd := set(files) ^ (set(want) - tied):
        what = "unexpected" if min(odd) in files else "missing"
        raise ValueError(f"{folder}: {min(odd)} is {what} ({len(odd)} keys do not fit config.json)")
    with ExitStack() as stack:
        opened = {path: stack.enter_context(safe_open(path, "pt", device=str(device))) for path in set(files.values())}
        for key, path in files.items():
            if (shape := opened[path].get_slice(key).get_shape()) != list(want[key].shape):
                raise ValueError(f"{path}: {key} has shape {shape}, config.json asks for {list(want[key].shape)}")
            state[key] = opened[path].get_tensor(key)
    if tied:
        state["llm.lm_head.weight"] = state["llm.embed.weight"]
    model.load_state_dict(state, assign=True)
    if tied:
        model.llm.lm_head.weight = model.llm.embed.weight
    return model.to(dtype=dtype).eval()


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
    new = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        for path in (*new.iterdir(), new):
            sync(path)
        shutil.rmtree(out, ignore_errors=True)
        os.rename(new, out)
        sync(out.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def save(model, folder, extra=()):
    """Write a weights folder, whole or not at all: config.json, model.safetensors and copies of the `extra` files.

    An existing folder is replaced. Tied matrices are stored once.
    """
    state = {key: x.contiguous() for key, x in model.state_dict().items()}
    if model.cfg.llm and model.cfg.llm.tied:
        del state["llm.lm_head.weight"]
    with new_folder(Path(folder)) as new:
        save_file(state, new / "model.safetensors", metadata={"format": "pt"})
        write_config(model.cfg, new)
        for path in extra:
            shutil.copy(path, new)


def merge_lora(model):
    """Fold every LoRA update into its weight, in place; afterwards the model is as if trained without LoRA."""
    for block in model.llm.blocks:
        for part in (block.attn, block.mlp):
            for name, layer in part.named_children():
                if isinstance(layer, LoRALinear):
                    setattr(part, name, layer.merge())
    model.cfg = replace(model.cfg, llm=replace(model.cfg.llm, lora_rank=0))
    model.llm.cfg = model.cfg.llm
