"""Weight-only quantisation of the language model: int8 with a scale per output channel, int4 with one per group.

In order: numbers to integers and back, our compiled product, the layer, the walk over a model.
Letters: N output channels, K input channels, G channels of a group, g groups = K / G, M vectors.
Decoding reads every weight once per token, so half or a quarter of the bytes is up to 2 or 4 times the speed. On a CPU
with AVX-512 VNNI and a C compiler, quantize.c multiplies packed bytes: vectors are cut into bytes too, two digits each,
so that they keep 16 bits and only the weights have fewer. On other CPUs torch's own products do it, int4 at two thirds
of the speed. Elsewhere, and as the reference, weights are expanded and multiplied as usual.
"""
import copy
import ctypes
import os
import shutil
import subprocess
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

KINDS = {"int8": 8, "int4": 4}          # bits
PART = 1024                             # output channels that are expanded at a time, into the cache


# ---- Numbers

def to_int8(weight):
    """(N, K) floats -> int8 of the same shape and bfloat16 scales (N): weight = int8 * scale, off by half a scale."""
    scale = (weight.abs().amax(1) / 127).clamp(min=1e-30).bfloat16()
    return (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def to_int4(weight, group):
    """(N, K) floats -> 0 ... 15 (N, K) int32, bfloat16 scale and zero (g, N, 2): weight = (int4 - 8) * scale + zero."""
    parts = weight.unflatten(1, (-1, group))                                                # (N, g, G)
    low, high = parts.aminmax(dim=2)
    scale = ((high - low) / 15).clamp(min=1e-30).bfloat16().float()
    zero = (low + 8 * scale).bfloat16().float()
    values = ((parts - zero[..., None]) / scale[..., None]).round().add(8).clamp(0, 15)
    return values.flatten(1).int(), torch.stack([scale, zero], -1).transpose(0, 1).contiguous().bfloat16()


# ---- Our product

@cache
def compiled():
    """quantize.c as a library, compiled for this very CPU in half a second; None where that cannot be."""
    compiler = os.environ.get("CC") or shutil.which("cc")
    if not compiler or not torch.cpu.get_capabilities().get("avx512_vnni"):
        return None
    source = Path(__file__).with_suffix(".c")
    with tempfile.TemporaryDirectory() as folder:       # a library that is loaded needs its file no more
        out = Path(folder) / "quantize.so"
        command = [*compiler.split(), "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", source, "-o", out]
        try:
            subprocess.run(command, check=True, capture_output=True)
            library = ctypes.CDLL(out)
        except (OSError, subprocess.CalledProcessError):
            return None
    library.most = library.few()
    flag, address, size = ctypes.c_int, ctypes.c_void_p, ctypes.c_long
    library.multiply.argtypes = [flag, *[address] * 4, flag, *[size] * 4]
    library.expand.argtypes = [flag, *[address] * 3, flag, *[size] * 3]
    return library


# ---- Layer

class QuantLinear(nn.Module):
    """A Linear without bias in 8 or 4 bits, made from a plain one. No gradients. Raises ValueError.

    Multiplies packed weights on a CPU, in an order that the first product brings them into; elsewhere (or packed=False)
    by weights that it expands, and so does torch where an int8 matrix meets a prompt's many rows.
    """

    def __init__(self, linear, bits, group=64, packed=True):
        super().__init__()
        (N, K), weight = linear.weight.shape, linear.weight.detach().float()
        if linear.bias is not None or bits not in (4, 8) or bits == 4 and (group not in (32, 64, 128) or K % group):
            raise ValueError(f"cannot quantise a {K} -> {N} Linear to {bits} bits in groups of {group}: bits are 4 or "
                             "8, groups 32, 64 or 128 and divide the input channels, and there is no bias")
        self.in_features, self.out_features, self.bits, self.group = K, N, bits, group
        self.packs = packed and (bits == 8 or N % 16 == 0)
        weight, scale = to_int8(weight) if bits == 8 else to_int4(weight, group)
        if bits == 4:
            weight = (weight[:, ::2] << 4 | weight[:, 1::2]).to(torch.uint8)                # (N, K / 2), two in a byte
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.view(torch.int16))      # bits of bfloat16, which .to(dtype) leaves alone
        self.register_buffer("packed", None, persistent=False)      # as who multiplies wants it, in place of weight

    def values(self):
        """The integers of 4 bits, (N, K)."""
        return torch.stack([self.weight >> 4, self.weight & 15], -1).flatten(1)

    def expand(self):
        """The weights as floats, (N, K); not of packed ones."""
        scale = self.scale.view(torch.bfloat16).float()
        if self.bits == 8:
            return self.weight.float() * scale[:, None]
        scale, zero = scale.transpose(0, 1)[..., None].unbind(2)                            # (N, g, 1) each
        return ((self.values().unflatten(1, (-1, self.group)).float() - 8) * scale + zero).flatten(1)

    def forward(self, x):
        if x.device.type != "cpu" or not self.packs:
            return F.linear(x, self.expand().to(x.dtype))
        library = self.in_features % 32 == self.out_features % 16 == 0 and compiled()
        y = self.multiply(x if x.dtype == torch.bfloat16 else x.float(), library) if library else self.by_torch(x)
        return y.to(x.dtype)

    def multiply(self, x, library):
        """By quantize.c: (..., K) bfloat16 or float32 -> (..., N)."""
        N, K, bits, half = self.out_features, self.in_features, self.bits, x.dtype == torch.bfloat16
        if self.packed is None:
            self.pack()
        G, M, x, y = K if bits == 8 else self.group, x.numel() // K, x.contiguous(), x.new_empty(*x.shape[:-1], N)
        w, scale = self.packed.data_ptr(), self.scale.data_ptr()
        if M <= library.most:
            library.multiply(bits, w, scale, x.data_ptr(), y.data_ptr(), half, M, N, K, G)
            return y
        room = x.new_empty(K * min(N, PART))
        for n in range(0, N, PART):
            part = room[:K * (N - n)].view(K, -1)                                           # W^T of some rows of W
            at = w + n * K * bits // 8, scale + n * K // G * 4
            library.expand(bits, *at, part.data_ptr(), half, part.shape[1], K, G)
            y[..., n:n + PART] = x @ part
        return y

    def pack(self):
        """Into the order of quantize.c: blocks of 16 rows, (N / 16, K / 4 or 8, 16, 4) bytes, a lane of 4 columns for
        each row; in 4 bits the columns above them share their bytes. Scale and zero: (N / 16, g, 2, 16)."""
        if self.bits == 8:
            blocks = (self.weight.view(torch.uint8) ^ 128).unflatten(1, (-1, 4)).unflatten(0, (-1, 16)).transpose(1, 2)
            scale = torch.stack([self.scale, torch.zeros_like(self.scale)], -1)[None]       # zeros for zeros
        else:
            pairs = self.values().unflatten(1, (-1, 2, 4)).unflatten(0, (-1, 16)).transpose(1, 2)
            blocks, scale = pairs[..., 0, :] | pairs[..., 1, :] << 4, self.scale
        self.scale = scale.unflatten(1, (-1, 16)).permute(1, 0, 3, 2).contiguous()
        self.packed, self.weight = blocks.contiguous(), None

    def by_torch(self, x):
        """By torch's products, (..., K) -> (..., N); a prompt's many rows by expanded weights where it is slow."""
        flat, scale = x.reshape(-1, self.in_features).bfloat16(), self.scale.view(torch.bfloat16)
        if self.bits == 8:
            if len(flat) > 256:
                return F.linear(x, self.expand().to(x.dtype))
            if self.weight.data_ptr() % 64:                     # out of a file: torch's product may stumble over it
                self.weight = self.weight.clone()
            y = torch._weight_int8pack_mm(flat, self.weight, scale)
        else:
            if self.packed is None:
                self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(self.values().int(), 1)
                self.weight = None
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.packed, self.group, scale)
        return y.view(*x.shape[:-1], self.out_features)


def join(layers):
    """Several that read the same as one, none of which has multiplied yet."""
    one, parts = copy.copy(layers[0]), zip(*[(layer.weight, layer.scale) for layer in layers])
    weight, scale = (torch.cat(some, -2 if some[0].dim() > 1 else 0) for some in parts)     # along N
    one._buffers, one.out_features = {"weight": weight, "scale": scale, "packed": None}, len(weight)
    return one


# ---- Model

def merged(layer):
    """A layer without LoRA."""
    return layer.merge() if hasattr(layer, "merge") else layer


def quantize(model, kind, fetch=lambda name, layer: layer):
    """Replace the Linear layers of model.llm in place, LoRA merged; lm_head, read once per token too, gets 8 bits.

    fetch(name, layer) gives each layer, when its turn comes, with its weights in memory. Raises ValueError.
    """
    if kind not in KINDS or model.llm is None or model.cfg.quantized:
        raise ValueError(f"cannot quantise to {kind!r}: kinds are {', '.join(KINDS)}, and the model needs a language "
                         f"model that is not quantised yet (it is {model.cfg.quantized or 'float'})")
    for name in [name for name, layer in model.llm.named_modules() if isinstance(layer, nn.Linear)]:
        owner, _, last = name.rpartition(".")
        owner, bits = model.llm.get_submodule(owner), 8 if name == "lm_head" else KINDS[kind]
        setattr(owner, last, QuantLinear(merged(fetch(f"llm.{name}", getattr(owner, last))), bits))
    model.llm.cfg = replace(model.llm.cfg, tied=False, lora_rank=0)
    model.cfg = replace(model.cfg, llm=model.llm.cfg, quantized=kind)
