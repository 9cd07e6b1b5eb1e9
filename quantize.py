"""Weight-only quantisation of the language model: int8 with a scale per output channel, int4 with one per group.

In order: numbers to integers and back, the layer, the walk over a model.
Letters: N output channels, K input channels, G channels of a group, g groups = K / G.
Decoding reads every weight once per token, so half or a quarter of the bytes is up to 2 or 4 times the speed. On a CPU
torch multiplies the packed integers; elsewhere, and as the reference, weights are expanded and multiplied as usual.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F


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


# ---- Layer

class QuantLinear(nn.Module):
    """A Linear without bias in 8 or 4 bits, made from a plain one on the device where it will run. No gradients.

    packed None chooses: torch's integer products on a CPU, expanded weights elsewhere. Raises ValueError.
    """

    def __init__(self, linear, bits, group=64, packed=None):
        super().__init__()
        (N, K), weight = linear.weight.shape, linear.weight.detach().float()
        if linear.bias is not None or bits not in (4, 8) or bits == 4 and (group not in (32, 64, 128) or K % group):
            raise ValueError(f"cannot quantise a {K} -> {N} Linear to {bits} bits in groups of {group}: bits are 4 or "
                             "8, groups 32, 64 or 128 and divide the input channels, and there is no bias")
        self.in_features, self.out_features, self.bits, self.group = K, N, bits, group
        self.packed = weight.device.type == "cpu" and (bits == 8 or N % 16 == 0) if packed is None else packed
        weight, scale = to_int8(weight) if bits == 8 else to_int4(weight, group)
        if bits == 4 and self.packed:
            weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight, 1)          # (N, K / 2), torch's order
        elif bits == 4:
            weight = (weight[:, ::2] << 4 | weight[:, 1::2]).to(torch.uint8)                # (N, K / 2), two in a byte
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def expand(self):
        """The weights as floats, (N, K); not of packed int4, whose order is torch's own."""
        if self.bits == 8:
            return self.weight.float() * self.scale.float()[:, None]
        values = torch.stack([self.weight >> 4, self.weight & 15], -1).flatten(1)           # (N, K)
        scale, zero = self.scale.float().transpose(0, 1)[..., None].unbind(2)               # (N, g, 1) each
        return ((values.unflatten(1, (-1, self.group)).float() - 8) * scale + zero).flatten(1)

    def forward(self, x):
        if not self.packed:
            return F.linear(x, self.expand().to(x.dtype))
        flat = x.reshape(-1, self.in_features).bfloat16()                                   # the dtype torch is fast in
        y = (torch._weight_int8pack_mm(flat, self.weight, self.scale) if self.bits == 8 else
             torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.weight, self.group, self.scale))
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)


# ---- Model

def quantize(model, bits, group=64):
    """Replace the Linear layers of model.llm's blocks in place; lm_head, read once per token too, gets 8 bits.

    Raises ValueError for LoRA layers: merge them first.
    """
    for block in model.llm.blocks:
        for part in (block.attn, block.mlp):
            for name, layer in part.named_children():
                if type(layer) is not nn.Linear:
                    raise ValueError(f"{name} is a {type(layer).__name__}: merge LoRA first, and quantise once")
                setattr(part, name, QuantLinear(layer, bits, group))
    model.llm.lm_head = QuantLinear(model.llm.lm_head, 8)
