"""Weight-only quantisation of the language model: int8 with a scale per output channel, int4 with one per group.

In order: numbers to integers and back, the layer, the walk over a model.
Letters: N output channels, K input channels, G channels of a group, g groups = K / G.
Decoding reads every weight once per token, so half or a quarter of the bytes is up to 2 or 4 times the speed. On a CPU
torch multiplies the packed integers; elsewhere, and as the reference, weights are expanded and multiplied as usual.
Where the CPU has instructions for products of bytes (VNNI), vectors are cut into bytes too: two digits each, so that
they keep 16 bits and only the weights have 8. The second digit costs no time: reading weights does.
"""
import copy
from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F

KINDS = {"int8": 8, "int4": 4}          # bits
VNNI = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_vnni", "avx_vnni"))


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


def digits(x):
    """(M, K) floats -> int8 (2 M, K), high digits, then low ones, and steps (M, 1): x = step * (high + low / 254)."""
    step = x.abs().amax(1, keepdim=True).clamp_(min=1e-30) / 127
    x = x / step
    high = x.round()
    return torch.cat([high, x.sub_(high).mul_(254).round_()]).to(torch.int8), step


# ---- Layer

class QuantLinear(nn.Module):
    """A Linear without bias in 8 or 4 bits, made from a plain one. No gradients. Raises ValueError.

    Multiplies by torch's integer products on a CPU, which take the weights over in an order of their own; elsewhere (or
    packed=False) by weights that it expands, and so where an int8 matrix meets a prompt's many rows without VNNI.
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
        self.register_buffer("packed", None, persistent=False)      # in torch's own order, in place of weight

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
        many = self.bits == 8 and not VNNI and x.numel() > 256 * self.in_features
        if many or not self.packs or x.device.type != "cpu":
            return F.linear(x, self.expand().to(x.dtype))
        flat, scale = x.reshape(-1, self.in_features), self.scale.view(torch.bfloat16)
        if self.bits == 8 and VNNI:
            if self.packed is None:
                self.packed, self.weight = torch.ops.onednn.qlinear_prepack(self.weight, None), None
                self.steps = scale.float(), torch.zeros(len(scale), dtype=torch.int32)      # and where they start
            flat, step = digits(flat.float())
            y = torch.ops.onednn.qlinear_pointwise(
                flat, 1.0, 0, self.packed, *self.steps, None, 1.0, 0,
                x.dtype if x.dtype == torch.bfloat16 else torch.float32, "none", [], "")            # (2 M, N)
            high, low = y.chunk(2)
            y = torch.add(high, low, alpha=1 / 254) * step
        elif self.bits == 8:
            if self.weight.data_ptr() % 64:                     # out of a file: torch's product may stumble over it
                self.weight = self.weight.clone()
            y = torch._weight_int8pack_mm(flat.bfloat16(), self.weight, scale)
        else:
            if self.packed is None:
                self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(self.values().int(), 1)
                self.weight = None
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat.bfloat16(), self.packed, self.group, scale)
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)


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
