"""Places in pictures: boxes and masks read off a language model's hidden states, boxes read into it, objects found.

In order: boxes, box coder, SAM's prompts, SAM's mask decoder, SAM, BoxHead, losses; then ChatterBox:
region features, deformable attention, GroundingDINO, matcher and criterion.
Letters: B batch, T tokens, C width, nh heads, hd head dim, h w or H W sides of features, n objects, k prompt tokens,
m masks per object; of the detector S pixels of all maps, L maps, Q queries, P points, R regions.
Boxes are xyxy unless their name says cxcywh, in 0..1 unless it says px. Names inside SAM are those of its checkpoints.
Papers: NExT-Chat (Zhang et al. 2023), ChatterBox (Tian et al. 2024), Segment Anything (Kirillov et al. 2023),
generalised IoU (Rezatofighi et al. 2019), RoIAlign (He et al. 2017), Deformable DETR (Zhu et al. 2021), DINO (Zhang et
al. 2023), GroundingDINO (Liu et al. 2023).
"""
from math import pi
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from attention import attention
from vision import (MLP, LayerNorm2d, SAMImageEncoder, SAMMLP, StackedAttention, Swin, SwinConfig, merge_heads,
                    split_heads)


# ---- Boxes
# Leading dimensions broadcast: iou(a, b) of (n, 4) and (n, 4) is elementwise, iou(a[:, None], b) pairwise.

def to_xyxy(boxes_cxcywh):
    """(..., 4) centre and size -> corners."""
    centre, size = boxes_cxcywh.split(2, dim=-1)
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def area(boxes):
    return (boxes[..., 2:] - boxes[..., :2]).prod(-1)                                       # (..., 4) -> (...)


def overlap(a, b):
    """Areas of intersection and union."""
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    inter = (high - low).clamp(min=0).prod(-1)
    return inter, area(a) + area(b) - inter


def iou(a, b, eps=1e-9):
    """Intersection over union, 0..1. eps keeps boxes without area finite."""
    inter, union = overlap(a, b)
    return inter / (union + eps)


def giou(a, b, eps=1e-9):
    """Generalised IoU, -1..1: IoU less the share of the smallest enclosing box that neither covers."""
    inter, union = overlap(a, b)
    hull = area(torch.cat([torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])], dim=-1))
    return inter / (union + eps) - (hull - union) / (hull + eps)


# ---- Box coder

N_PROMPT = 4                            # SAM prompt tokens that one hidden state gives


def two_layers(n_in, n_mid, n_out):
    return nn.Sequential(nn.Linear(n_in, n_mid), nn.ReLU(), nn.Linear(n_mid, n_out))


def loc_encoder(dim):
    """Boxes (n, 4) -> embeddings (n, C) that the language model reads."""
    return two_layers(4, dim // 2, dim)


def loc_decoder(dim):
    """Hidden states (n, C) -> boxes (n, 4), unbounded."""
    return two_layers(dim, dim // 2, 4)


def seg_prompt_mlp(dim, prompt_dim):
    """Hidden states (n, C) -> SAM prompts (n, N_PROMPT * prompt_dim)."""
    return two_layers(dim, dim, N_PROMPT * prompt_dim)


# ---- SAM's prompts

class PositionEncoding(nn.Module):
    """Random Fourier features of places in 0..1: xy (..., 2) -> (..., C). Its frequencies come with the weights."""

    def __init__(self, dim):
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, dim // 2))

    def forward(self, xy):
        freqs = self.positional_encoding_gaussian_matrix
        angles = 2 * pi * ((2 * xy - 1).to(freqs.dtype) @ freqs)   # parity: places in the type of the weights
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class PromptEncoder(nn.Module):
    """Points, boxes and masks -> SAM's prompt tokens and the map it adds to the image features."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, dim, mid = cfg, cfg.prompt_dim, cfg.mask_dim
        self.pe_layer = PositionEncoding(dim)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, dim) for _ in range(4))   # off, on, first, second corner
        self.not_a_point_embed, self.no_mask_embed = nn.Embedding(1, dim), nn.Embedding(1, dim)
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, mid // 4, 2, 2), LayerNorm2d(mid // 4), nn.GELU(),
            nn.Conv2d(mid // 4, mid, 2, 2), LayerNorm2d(mid), nn.GELU(), nn.Conv2d(mid, dim, 1))

    def grid(self):
        centres = (torch.arange(self.cfg.grid, device=self.no_mask_embed.weight.device) + 0.5) / self.cfg.grid
        xy = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), dim=-1)           # (h, w, 2)
        return self.pe_layer(xy).movedim(-1, 0)[None]       # (1, C, h, w), the centres of the patches

    def points(self, xy_px, labels):
        """Points (n, k, 2) with labels (n, k), 1 on the object, 0 off it, -1 none -> (n, k, C)."""
        kinds = torch.cat([x.weight for x in (*self.point_embeddings[:2], self.not_a_point_embed)])
        places = self.pe_layer((xy_px + 0.5) / self.cfg.image_size) * (labels >= 0)[..., None]
        return places + kinds[labels]                       # label -1 takes the last kind

    def boxes(self, boxes_px):
        """Boxes (n, 4) -> their corners (n, 2, C)."""
        corners = boxes_px.unflatten(-1, (2, 2))
        kinds = torch.cat([x.weight for x in self.point_embeddings[2:]])
        return self.pe_layer((corners + 0.5) / self.cfg.image_size) + kinds

    def masks(self, logits=None):
        """Low-resolution mask logits (n, 1, 4 h, 4 w) -> (n, C, h, w); none -> (1, C, 1, 1)."""
        return self.no_mask_embed.weight[..., None, None] if logits is None else self.mask_downscaling(logits)

    def forward(self, prompts=None, boxes_px=None, points=None):
        """Prompt tokens (n, k, C): given embeddings (n, k, C), then points (xy_px, labels), then corners of boxes."""
        tokens = [] if prompts is None else [prompts]
        if points is not None:
            xy_px, labels = points
            if boxes_px is None:                            # parity: points alone get one more, labelled as none
                xy_px, labels = F.pad(xy_px, (0, 0, 0, 1)), F.pad(labels, (0, 1), value=-1)
            tokens.append(self.points(xy_px, labels))
        if boxes_px is not None:
            tokens.append(self.boxes(boxes_px))
        return torch.cat(tokens, dim=1)


# ---- SAM's mask decoder

class ReLUMLP(nn.Module):
    def __init__(self, n_in, n_mid, n_out, n_layer):
        super().__init__()
        widths = [n_in] + [n_mid] * (n_layer - 1) + [n_out]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:]))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


class DecoderAttention(nn.Module):
    """Attention of (n, T, C) to (n, S, C) at an inner width; either side may be shared by all objects (n = 1)."""

    def __init__(self, dim, inner, n_head):
        super().__init__()
        self.n_head = n_head
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, inner) for _ in range(3))
        self.out_proj = nn.Linear(inner, dim)

    def forward(self, q, k, v):
        q, k, v = (split_heads(w(x), self.n_head) for w, x in zip((self.q_proj, self.k_proj, self.v_proj), (q, k, v)))
        n = len(q) if len(k) == 1 else len(k)                                               # 0 without objects
        return self.out_proj(merge_heads(attention(*(x.expand(n, -1, -1, -1) for x in (q, k, v)))))


class TwoWayBlock(nn.Module):
    """Tokens attend to themselves, then to the image; then the image attends to the tokens."""

    def __init__(self, cfg, first):
        super().__init__()
        dim, self.first = cfg.prompt_dim, first
        self.self_attn = DecoderAttention(dim, dim, cfg.dec_head)
        self.cross_attn_token_to_image = DecoderAttention(dim, dim // 2, cfg.dec_head)
        self.cross_attn_image_to_token = DecoderAttention(dim, dim // 2, cfg.dec_head)
        self.mlp = SAMMLP(dim, cfg.dec_mlp_dim, F.relu)
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.LayerNorm(dim) for _ in range(4))

    def forward(self, x, image, x_pe, image_pe):
        """x and x_pe (n, T, C), image and image_pe (n or 1, h * w, C)."""
        if self.first:                                      # parity: neither positions nor residual here
            x = self.self_attn(x, x, x)
        else:
            x = x + self.self_attn(x + x_pe, x + x_pe, x)
        x = self.norm1(x)
        x = self.norm2(x + self.cross_attn_token_to_image(x + x_pe, image + image_pe, image))
        x = self.norm3(x + self.mlp(x))
        return x, self.norm4(image + self.cross_attn_image_to_token(image + image_pe, x + x_pe, x))


class TwoWayTransformer(nn.Module):
    """TwoWayBlocks, then a last look of the tokens at the image."""

    def __init__(self, cfg):
        super().__init__()
        self.layers = nn.ModuleList(TwoWayBlock(cfg, first=i == 0) for i in range(cfg.dec_layer))
        self.final_attn_token_to_image = DecoderAttention(cfg.prompt_dim, cfg.prompt_dim // 2, cfg.dec_head)
        self.norm_final_attn = nn.LayerNorm(cfg.prompt_dim)

    def forward(self, tokens, image, image_pe):
        """Tokens (n, T, C) and image (n or 1, h * w, C) -> both. Tokens are their own positions."""
        x = tokens
        for layer in self.layers:
            x, image = layer(x, image, tokens, image_pe)
        return self.norm_final_attn(x + self.final_attn_token_to_image(x + tokens, image + image_pe, image)), image


class MaskDecoder(nn.Module):
    """Image features and prompt tokens -> masks, each upscaled features times a filter made of its token."""

    def __init__(self, cfg):
        super().__init__()
        dim = cfg.prompt_dim
        self.transformer = TwoWayTransformer(cfg)
        self.iou_token, self.mask_tokens = nn.Embedding(1, dim), nn.Embedding(cfg.n_mask, dim)
        self.output_upscaling = nn.Sequential(nn.ConvTranspose2d(dim, dim // 4, 2, 2), LayerNorm2d(dim // 4), nn.GELU(),
                                              nn.ConvTranspose2d(dim // 4, dim // 8, 2, 2), nn.GELU())
        self.output_hypernetworks_mlps = nn.ModuleList(ReLUMLP(dim, dim, dim // 8, 3) for _ in range(cfg.n_mask))
        self.iou_prediction_head = ReLUMLP(dim, cfg.iou_dim, cfg.n_mask, 3)

    def forward(self, features, grid, tokens, dense, multimask=False):
        """Mask logits (n, m, 4 h, 4 w) and predicted IoU (n, m): one mask, or with multimask the three alternatives.
        features (n or 1, C, h, w), grid (1, C, h, w), tokens (n, k, C), dense broadcasts to features."""
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight]).expand(len(tokens), -1, -1)
        image, pe = ((x.flatten(2).transpose(1, 2)) for x in (features + dense, grid))      # (n or 1, h * w, C)
        x, image = self.transformer(torch.cat([own, tokens], dim=1), image, pe)
        image = self.output_upscaling(image.transpose(1, 2).unflatten(2, features.shape[2:]))   # (n, C / 8, 4 h, 4 w)
        filters = [mlp(x[:, 1 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)]
        masks = torch.einsum("nmc,nchw->nmhw", torch.stack(filters, dim=1), image)
        keep = slice(1, None) if multimask else slice(0, 1)
        return masks[:, keep], self.iou_prediction_head(x[:, 0])[:, keep]


# ---- SAM

class SAM(nn.Module):
    """Segment Anything: a picture is encoded once, then any number of prompts is decoded to masks."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.image_encoder, self.prompt_encoder = SAMImageEncoder(cfg), PromptEncoder(cfg)
        self.mask_decoder = MaskDecoder(cfg)

    def encode(self, image):
        return self.image_encoder(image)                        # (B, 3, S, S) -> (B, C, h, w)

    def decode(self, features, prompts=None, boxes_px=None, points=None, masks=None, multimask=False):
        """Mask logits (n, m, S, S), float32, and predicted IoU (n, m) of n objects. features of one picture, or of n:
        then object i lies in picture i. Prompts as in PromptEncoder, in pixels of the S x S frame; masks are logits
        (n, 1, 4 h, 4 w). Raises ValueError if pictures and objects do not pair."""
        tokens = self.prompt_encoder(prompts, boxes_px, points)
        if len(features) not in (1, len(tokens)):
            raise ValueError(f"{len(tokens)} objects do not pair with {len(features)} pictures; give one or as many")
        dense = self.prompt_encoder.masks(masks)
        logits, iou_pred = self.mask_decoder(features, self.prompt_encoder.grid(), tokens, dense, multimask)
        return F.interpolate(logits.float(), (self.cfg.image_size,) * 2, mode="bilinear"), iou_pred


class BoxHead(nn.Module):
    """What hidden states (n, C) at `<at>` stand for: a call gives boxes (n, 4), `masks` masks if there is a SAM."""

    def __init__(self, dim, sam=None):
        super().__init__()
        self.loc_decoder = loc_decoder(dim)
        self.seg_prompt_mlp, self.sam = (seg_prompt_mlp(dim, sam.prompt_dim), SAM(sam)) if sam else (None, None)

    def forward(self, h):
        return self.loc_decoder(h)

    def masks(self, h, features):
        """Mask logits (n, 1, S, S) and predicted IoU (n, 1), from hidden states and features of one picture or of n."""
        prompts = self.seg_prompt_mlp(h).unflatten(-1, (N_PROMPT, -1))                      # (n, N_PROMPT, prompt_dim)
        return self.sam.decode(features, prompts, self(h) * self.sam.cfg.image_size)


# ---- Losses
# By name and unweighted; NExT-Chat's weights: l1 2, giou 0.2, cycle_hidden 1, cycle_box 1; focal 20, dice 1, iou 1.

def mean(x, mock):
    """Mean over (n, ...). mock: it all but ignores the last row, unless it is the only one. Nothing: 0."""
    weight = torch.ones_like(x)
    if mock:
        weight[-1:] = 1e-10             # parity: the row of the sample that NExT-Chat appends to every batch
    return (x * weight).sum() / weight.sum().clamp(min=1e-10)


def box_loss(pred, target, mock=False):
    """L1 and GIoU losses of boxes (n, 4). mock: see mean."""
    pred, target = pred.float(), target.float()
    valid = (pred[:, 2:] >= pred[:, :2]).all(-1)            # parity: GIoU is taken of these alone
    return {"l1": mean((pred - target).abs(), mock), "giou": mean(1 - giou(pred[valid], target[valid]), mock)}


def cycle_loss(encoder, decoder, h, pred, boxes, mock=False):
    """Encoded, predicted boxes (n, 4) are their hidden states h (n, C); also decoded, boxes (r, 4) are themselves."""
    return {"cycle_hidden": mean((encoder(pred) - h).float().square(), mock),
            "cycle_box": mean((decoder(encoder(boxes)) - boxes).float().abs(), mock)}


def mask_losses(logits, iou_pred, target):
    """Focal, dice and IoU losses, summed over objects: logits and target (n, 1, S, S), iou_pred (n, 1)."""
    # parity: focal's alpha and dice's smoothing are n, focal is taken of an object's mean cross-entropy, and for the
    # true IoU a pixel is on the object from logit 0.5.
    n, logits, target = len(logits), logits.float().flatten(1), target.float().flatten(1)   # (n, S * S)
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1)      # (n)
    prob, on = logits.sigmoid(), (logits >= 0.5).float()
    inter = (on * target).sum(1)
    true_iou = inter / ((on + target).sum(1) - inter + 1e-7)
    return {"focal": n * ((1 - (-bce).exp()).square() * bce).sum(),
            "dice": (1 - (2 * (prob * target).sum(1) + n) / ((prob + target).sum(1) + n)).sum(),
            "iou": (iou_pred.float()[:, 0] - true_iou).square().sum() / max(n, 1)}


# ---- Region features

@dataclass(frozen=True)
class RegionConfig:                     # defaults: ChatterBox on CLIP ViT-L/14, LLaMA-2-13B
    dim: int = 1024                     # C of the feature maps
    out_dim: int = 5120                 # width of the language model
    box_dim: int = 256                  # inner width of the box's own embedding
    n_level: int = 4                    # maps, shallow to deep; each is made twice as fine as the next
    n_fuse: int = 5                     # rounds that mix neighbouring levels
    groups: int = 64                    # of GroupNorm
    pool: int = 14                      # cells per side of a pooled region


def conv_norm(n_in, n_out, groups, kernel, **more):
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(n_in, n_out, kernel, **more), norm=nn.GroupNorm(groups, n_out)))


def resize(x, size):
    return F.interpolate(x, size=(size, size), mode="bilinear", align_corners=True)         # (B, C, size, size)


def pool_weights(start, stop, n, cells, samples):
    """What each of n pixels of an axis adds to each cell of the spans start..stop (R,), in pixels: (R, cells, n)."""
    # Every cell averages `samples` linear interpolations; one beyond -1..n counts as 0, others stop at the border.
    steps = (torch.arange(cells * samples, device=start.device) + 0.5) / (cells * samples)
    at = start[:, None] + (stop - start)[:, None] * steps - 0.5                             # (R, cells * samples)
    inside, pixel = (at >= -1) & (at <= n), torch.arange(n, device=start.device)
    weights = (1 - (at.clamp(0, n - 1)[..., None] - pixel).abs()).clamp(min=0) * inside[..., None]
    return weights.unflatten(1, (cells, samples)).mean(2)


def roi_align(x, boxes_xyxy, cells, samples=2):
    """RoIAlign, pixel centres at halves, as matrix products: map (C, H, W), boxes (R, 4) -> (R, C, cells, cells)."""
    C, H, W = x.shape
    x1, y1, x2, y2 = (boxes_xyxy.float() * boxes_xyxy.new_tensor([W, H, W, H]).float()).unbind(-1)
    rows, columns = (pool_weights(*span, cells, samples).to(x.dtype) for span in ((y1, y2, H), (x1, x2, W)))
    return torch.einsum("rph,chw,rqw->rcpq", rows, x, columns)


class RegionEncoder(nn.Module):
    """Boxes of images -> one vector each: maps fused across levels, pooled in the box, plus an embedding of the box."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, C = cfg, cfg.dim
        self.inputs = nn.ModuleList(nn.Conv2d(C + 2, C, 1) for _ in range(cfg.n_level))
        self.fuse = nn.ModuleList(conv_norm(C, C, cfg.groups, 3, padding=1, bias=False) for _ in range(cfg.n_fuse))
        self.pool_convs = nn.ModuleList(nn.Conv2d(C, C, 3, padding=1) for _ in range(cfg.n_level))
        self.flatten = nn.Linear(C * cfg.pool ** 2, C)
        self.box_embed = nn.Sequential(OrderedDict(
            fc1=nn.Linear(4, cfg.box_dim), act1=nn.ReLU(), norm1=nn.LayerNorm(cfg.box_dim),
            fc2=nn.Linear(cfg.box_dim, C), act2=nn.ReLU(), norm2=nn.LayerNorm(C)))
        self.out = nn.Linear(C, cfg.out_dim)

    def enlarge(self, levels):
        """Patch features (B, N, C) of each level -> maps (B, C, H, W), coarser and coarser, that know their places."""
        maps = []
        for i, (x, conv) in enumerate(zip(levels, self.inputs)):
            side = round(x.shape[1] ** 0.5)
            size = side << len(levels) - 1 - i
            x = resize(x.transpose(1, 2).unflatten(2, (side, side)), size)                  # (B, C, H, W)
            at = torch.linspace(-1, 1, size, device=x.device, dtype=x.dtype).expand(len(x), 1, size, size)
            maps.append(conv(torch.cat([x, at, at.mT], dim=1)))
        return maps

    def mix(self, maps, i):
        """Level i with a quarter of its channels from the next level and a quarter from the one before."""
        quarter, size = self.cfg.dim // 4, maps[i].shape[-1]
        after, before = maps[min(i + 1, len(maps) - 1)], maps[max(i - 1, 0)]
        parts = maps[i][:, :-2 * quarter], after[:, -quarter:], before[:, -2 * quarter:-quarter]
        return torch.cat([parts[0], resize(parts[1], size), resize(parts[2], size)], dim=1)

    def forward(self, levels, boxes_xyxy):
        """levels: shallow to deep, (B, N, C) each; boxes_xyxy: for each image (n, 4). Returns (all boxes, out_dim)."""
        maps = self.enlarge(levels)
        for layer in self.fuse:
            maps = [F.relu(layer(self.mix(maps, i))) for i in range(len(maps))]
        x = 0
        for level, conv in zip(maps, self.pool_convs):
            x = x + conv(torch.cat([roi_align(*pair, self.cfg.pool) for pair in zip(level, boxes_xyxy)]))
        x = F.relu(x)                                                                       # (R, C, pool, pool)
        return self.out(self.flatten(x.flatten(1)) + self.box_embed(torch.cat(boxes_xyxy).to(x.dtype)))


# ---- Deformable attention

def deformable_attention(v, shapes, points, weights):
    """Weighted sum of bilinear samples, zero outside the maps: the plain reference. Returns (B, Q, nh * hd).

    v (B, S, nh, hd) holds maps of the given (H, W) end to end; points (B, Q, nh, L, P, 2) are x, y in 0..1 of each map;
    weights (B, Q, nh, L, P).
    """
    B, Q, nh, L, P, _ = points.shape
    grid = (2 * points.float() - 1).transpose(1, 2).flatten(0, 1)                           # (B * nh, Q, L, P, 2)
    maps = v.float().permute(0, 2, 3, 1).flatten(0, 1).split([H * W for H, W in shapes], dim=-1)
    samples = [F.grid_sample(x.unflatten(-1, shape), grid[:, :, i], align_corners=False)    # (B * nh, hd, Q, P)
               for i, (x, shape) in enumerate(zip(maps, shapes))]
    weights = weights.float().transpose(1, 2).reshape(B * nh, 1, Q, L * P)
    out = (torch.cat(samples, dim=-1) * weights).sum(-1)                                    # (B * nh, hd, Q)
    return out.reshape(B, -1, Q).transpose(1, 2).to(v.dtype)


class DeformableAttention(nn.Module):
    """Attention of each query to P points around its reference on each of L maps."""

    def __init__(self, dim, n_head, n_level, n_point):
        super().__init__()
        self.sizes = n_head, n_level, n_point
        self.offsets, self.weights = (nn.Linear(dim, n_head * n_level * n_point * n) for n in (2, 1))
        self.wv, self.wo = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.aim()

    @torch.no_grad()
    def aim(self):
        """Initial offsets: each head looks in its own direction, each further point one pixel further."""
        n_head, n_level, n_point = self.sizes
        angle = torch.arange(n_head) * (2 * pi / n_head)
        ray = torch.stack([angle.cos(), angle.sin()], dim=-1)
        ray = ray / ray.abs().amax(-1, keepdim=True)                                        # (nh, 2) on a square
        bias = ray[:, None, None] * torch.arange(1, n_point + 1)[:, None]                   # (nh, 1, P, 2)
        self.offsets.bias.copy_(bias.expand(-1, n_level, -1, -1).flatten())

    def forward(self, q, v, reference, shapes, pad):
        """Queries q (B, Q, C) read v (B, S, C), of which pad (B, S) is True where nothing is. Returns (B, Q, C).
        reference (B, Q, L, 2 or 4): points x, y with offsets in pixels, or boxes cx, cy, w, h with offsets in halves of
        the box over P."""
        B, Q, _ = q.shape
        nh, L, P = self.sizes
        v = self.wv(v).masked_fill(pad[..., None], 0).unflatten(-1, (nh, -1))               # (B, S, nh, hd)
        offsets = self.offsets(q).float().view(B, Q, nh, L, P, 2)
        weights = self.weights(q).view(B, Q, nh, L * P).softmax(-1).view(B, Q, nh, L, P)
        reference = reference[:, :, None, :, None]                                          # (B, Q, 1, L, 1, 2 or 4)
        if reference.shape[-1] == 2:
            unit = 1 / reference.new_tensor(shapes).flip(-1)[:, None]                       # (L, 1, 2), x first
        else:
            unit = reference[..., 2:] / (2 * P)
        return self.wo(deformable_attention(v, shapes, reference[..., :2] + offsets * unit, weights))


# ---- GroundingDINO

LOGIT_EPS = 1e-3                        # parity: GroundingDINO's, large enough to move boxes at the border


@dataclass(frozen=True)
class LocatorConfig:                    # defaults: GroundingDINO with Swin-B, as in ChatterBox
    swin: SwinConfig = SwinConfig()
    dim: int = 256                      # C
    n_encoder: int = 6                  # layers
    n_decoder: int = 6
    n_head: int = 8                     # half as many where text takes part
    mlp_dim: int = 2048                 # half as wide for text, and inside the fusion of image and text
    n_query: int = 900                  # boxes found in every image
    n_point: int = 4                    # that deformable attention looks at, per head and map

    @property
    def n_level(self):
        return len(self.swin.outputs) + 1                       # maps: those of Swin and the last one halved


class Prediction(NamedTuple):
    """One set of answers. Where a box shows a word is the sigmoid of its logit; padded words have -inf."""
    boxes_cxcywh: torch.Tensor          # (B, Q, 4) in 0..1 of the padded image
    logits: torch.Tensor                # (B, Q, T)


class Pyramid(NamedTuple):
    """The maps of a batch of images, laid end to end."""
    x: torch.Tensor                     # (B, S, C)
    pos: torch.Tensor                   # (B, S, C)
    pad: torch.Tensor                   # (B, S) bool, True outside the image
    centre: torch.Tensor                # (B, S, 2) x, y of each pixel in 0..1 of the image without padding
    valid: torch.Tensor                 # (B, L, 2) part of each map's width and height that is image
    shapes: list                        # L pairs (H, W)

    def points(self, xy):
        """Coordinates (B, n, 2k) of the image without padding -> of each map, (B, n, L, 2k)."""
        return xy[:, :, None] * self.valid.repeat(1, 1, xy.shape[-1] // 2)[:, None]

    def pad_bias(self):
        return hide(self.pad, self.x.dtype)[:, None, None]                                  # (B, 1, 1, S)


class Words(NamedTuple):
    """What does not change about the text tokens of a batch."""
    pos: torch.Tensor                   # (B, T, C)
    pad: torch.Tensor                   # (B, T) bool
    pad_bias: torch.Tensor              # (B, 1, 1, T), -inf at padding
    phrase_bias: torch.Tensor           # (B, 1, T, T), -inf between phrases


def sine(x, dim, temperature=10000):
    """Interleaved sines and cosines of x, whose unit is a whole turn: (...) -> (..., dim), float32."""
    turns = temperature ** (torch.arange(0, dim, 2, device=x.device) / dim)
    angles = x[..., None].float() * 2 * pi / turns
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def inverse_sigmoid(x):
    return (x.clamp(min=LOGIT_EPS) / (1 - x).clamp(min=LOGIT_EPS)).log()


def hide(hidden, dtype):
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, -torch.inf)


def geometry(pad, dim):
    """Of a map with padding pad (B, H, W): positions (B, H, W, C), pixel centres (B, H, W, 2), valid part (B, 2)."""
    B, H, W = pad.shape
    there = ~pad
    y, x = (there.cumsum(i) / (there.sum(i, keepdim=True) + 1e-6) for i in (1, 2))          # (B, H, W)
    pos = torch.cat([sine(y, dim // 2, 20), sine(x, dim // 2, 20)], dim=-1)
    size = torch.stack([there[:, 0].sum(-1), there[:, :, 0].sum(-1)], dim=-1)               # (B, 2), width first
    grid = torch.stack(torch.meshgrid(*(torch.arange(n, device=pad.device) + 0.5 for n in (W, H)), indexing="xy"), -1)
    return pos, grid / size[:, None, None], size / size.new_tensor([W, H])


class CrossAttention(StackedAttention):
    """Multi-head attention of tokens to tokens, its q, k and v matrices stacked in one."""

    def forward(self, q, v, k=None, bias=None):
        """From (B, T, C) to values (B, S, C), whose keys are k or, if there is none, q again. Returns (B, T, C)."""
        stacks = self.wqkv.weight.chunk(3), self.wqkv.bias.chunk(3)
        q, k, v = (split_heads(F.linear(*args), self.n_head) for args in zip((q, q if k is None else k, v), *stacks))
        return self.wo(merge_heads(attention(q, k, v, bias=bias)))


class PostBlock(nn.Module):
    """Transformer block with the norms behind, around a given attention module; positions go into queries and keys."""

    def __init__(self, dim, mlp_dim, attn):
        super().__init__()
        self.attn, self.attn_norm = attn, nn.LayerNorm(dim)
        self.mlp, self.mlp_norm = MLP(dim, mlp_dim, F.relu), nn.LayerNorm(dim)

    def forward(self, x, pos, **attn_args):
        x = self.attn_norm(x + self.attn(x + pos, x, **attn_args))
        return self.mlp_norm(x + self.mlp(x))


class Fusion(nn.Module):
    """Image and text read each other through one matrix of scores, each side normalising it its own way."""

    def __init__(self, dim, inner, n_head):
        super().__init__()
        self.n_head = n_head
        self.image_norm, self.text_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.image_qk, self.text_qk, self.image_v, self.text_v = (nn.Linear(dim, inner) for _ in range(4))
        self.image_out, self.text_out = nn.Linear(inner, dim), nn.Linear(inner, dim)
        self.image_gamma, self.text_gamma = (nn.Parameter(torch.full((dim,), 1e-4)) for _ in range(2))

    def forward(self, image, text, image_bias, text_bias):
        """image (B, S, C), text (B, T, C) and the biases that hide their padding -> both anew."""
        image, text = self.image_norm(image), self.text_norm(text)
        layers = (self.image_qk, image), (self.text_qk, text), (self.image_v, image), (self.text_v, text)
        image_qk, text_qk, image_v, text_v = (split_heads(layer(x), self.n_head) for layer, x in layers)
        to_image = self.image_out(merge_heads(attention(image_qk, text_qk, text_v, bias=text_bias)))
        to_text = self.text_out(merge_heads(attention(text_qk, image_qk, image_v, bias=image_bias)))
        return image + self.image_gamma * to_image, text + self.text_gamma * to_text        # parity: the normed ones


class EncoderLayer(nn.Module):
    """Image and text fused, then each on its own."""

    def __init__(self, cfg):
        super().__init__()
        half = cfg.mlp_dim // 2, cfg.n_head // 2
        self.fusion = Fusion(cfg.dim, *half)
        self.text = PostBlock(cfg.dim, half[0], CrossAttention(cfg.dim, half[1]))
        self.image = PostBlock(cfg.dim, cfg.mlp_dim, DeformableAttention(cfg.dim, cfg.n_head, cfg.n_level, cfg.n_point))

    def forward(self, image, text, pyramid, words):
        image, text = self.fusion(image, text, pyramid.pad_bias(), words.pad_bias)
        text = self.text(text, words.pos, bias=words.phrase_bias)
        image = self.image(image, pyramid.pos, reference=pyramid.points(pyramid.centre), shapes=pyramid.shapes,
                           pad=pyramid.pad)
        return image, text


class DecoderLayer(PostBlock):
    """Queries look at one another, at the text, at the image around their boxes."""

    def __init__(self, cfg):
        super().__init__(cfg.dim, cfg.mlp_dim, DeformableAttention(cfg.dim, cfg.n_head, cfg.n_level, cfg.n_point))
        self.self_attn, self.self_norm = CrossAttention(cfg.dim, cfg.n_head), nn.LayerNorm(cfg.dim)
        self.text_attn, self.text_norm = CrossAttention(cfg.dim, cfg.n_head), nn.LayerNorm(cfg.dim)

    def forward(self, x, pos, image, text, reference, pyramid, words):
        x = self.self_norm(x + self.self_attn(x + pos, x))
        x = self.text_norm(x + self.text_attn(x + pos, text, k=text, bias=words.pad_bias))
        x = self.attn_norm(x + self.attn(x + pos, image, reference, pyramid.shapes, pyramid.pad))
        return self.mlp_norm(x + self.mlp(x))


def mlp(*dims):
    layers = [layer for pair in zip(dims, dims[1:]) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])                          # ReLU only between them


class Locator(nn.Module):
    """GroundingDINO: image and text features -> boxes and how well each fits each text token."""
    # Text features come from whatever wrote them: its BERT gives one per word, ChatterBox's language model a single one.

    def __init__(self, cfg):
        super().__init__()
        self.cfg, C, dims = cfg, cfg.dim, cfg.swin.out_dims
        self.swin = Swin(cfg.swin)
        self.input_proj = nn.ModuleList([conv_norm(dim, C, 32, 1) for dim in dims] +
                                        [conv_norm(dims[-1], C, 32, 3, stride=2, padding=1)])
        self.level_embed = nn.Parameter(torch.zeros(cfg.n_level, C))
        self.encoder = nn.ModuleList(EncoderLayer(cfg) for _ in range(cfg.n_encoder))
        self.proposal, self.proposal_norm, self.proposal_box = nn.Linear(C, C), nn.LayerNorm(C), mlp(C, C, C, 4)
        self.queries = nn.Embedding(cfg.n_query, C)
        self.query_pos = mlp(2 * C, C, C)
        self.decoder = nn.ModuleList(DecoderLayer(cfg) for _ in range(cfg.n_decoder))
        self.norm, self.box = nn.LayerNorm(C), mlp(C, C, C, 4)

    def pyramid(self, image, pad):
        """Pyramid of images (B, 3, H, W), True in pad (B, H, W) outside them."""
        maps = self.swin(image)
        maps = [proj(x) for proj, x in zip(self.input_proj, [*maps, maps[-1]])]             # (B, C, H, W) each
        pads = [F.interpolate(pad[None].float(), size=x.shape[-2:])[0].bool() for x in maps]
        pos, centres, valid = zip(*(geometry(y, self.cfg.dim) for y in pads))
        pos = [y + embed for y, embed in zip(pos, self.level_embed)]
        flat = [torch.cat([y.flatten(1, 2) for y in ys], dim=1) for ys in (pos, centres)]   # (B, S, C), (B, S, 2)
        return Pyramid(torch.cat([x.flatten(2) for x in maps], dim=2).mT, flat[0].to(image.dtype),
                       torch.cat([y.flatten(1) for y in pads], dim=1), flat[1], torch.stack(valid, dim=1),
                       [tuple(x.shape[-2:]) for x in maps])

    def words(self, text, phrase):
        """Words of text (B, T, C) from the number of each token's phrase (B, T), -1 for padding."""
        pad, same = phrase < 0, phrase[:, :, None] == phrase[:, None]
        pos = sine(same.tril(-1).sum(-1), self.cfg.dim).to(text.dtype)                      # place within the phrase
        return Words(pos, pad, hide(pad, text.dtype)[:, None, None], hide(~same, text.dtype)[:, None])

    def score(self, x, text, words):
        return (x @ text.mT).masked_fill(words.pad[:, None], -torch.inf)                    # (B, n, C) -> (B, n, T)

    def propose(self, image, text, pyramid, words):
        """Every pixel as a candidate: features (B, S, C), scores (B, S, T), anchors (B, S, 4) before the sigmoid."""
        centre = pyramid.centre
        sides = torch.cat([centre.new_full((H * W, 2), 0.05 * 2 ** i) for i, (H, W) in enumerate(pyramid.shapes)])
        anchors = torch.cat([centre, sides.expand_as(centre)], dim=-1)                      # (B, S, 4)
        unfit = ((anchors <= 0.01) | (anchors >= 0.99)).any(-1)                             # so is all padding: beyond 1
        x = self.proposal_norm(self.proposal(image.masked_fill(unfit[..., None], 0)))
        return x, self.score(x, text, words), anchors.logit().masked_fill(unfit[..., None], torch.inf)

    def decode(self, image, text, reference, pyramid, words):
        """A Prediction from each layer, which refine the boxes `reference` (B, Q, 4)."""
        # A layer's loss also moves the box it started from: the layer before learns twice (DINO, look forward twice).
        x, out = self.queries.weight.expand(len(image), -1, -1), []
        for layer in self.decoder:
            fixed = reference.detach()
            points = pyramid.points(fixed)                                                  # (B, Q, L, 4)
            pos = sine(points[:, :, 0, [1, 0, 2, 3]], self.cfg.dim // 2).flatten(-2)        # (B, Q, 2 C)
            x = layer(x, self.query_pos(pos.to(x.dtype)), image, text, points, pyramid, words)
            h = self.norm(x)
            out.append(Prediction((self.box(h) + inverse_sigmoid(reference)).sigmoid(), self.score(h, text, words)))
            reference = (self.box(x) + inverse_sigmoid(fixed)).sigmoid()                    # parity: without the norm
        return out

    def forward(self, image, text, pad=None, phrase=None):
        """Predictions of the encoder and of each decoder layer; the last one counts, the others are for training.
        image (B, 3, H, W), pad (B, H, W) True outside; text (B, T, C); phrase (B, T): tokens of one number attend to
        one another, -1 is padding. Without pad images fill the batch, without phrase all tokens are one phrase."""
        pad = image.new_zeros(image[:, 0].shape, dtype=torch.bool) if pad is None else pad
        phrase = text.new_zeros(text.shape[:2], dtype=torch.long) if phrase is None else phrase
        pyramid, words = self.pyramid(image, pad), self.words(text, phrase)
        image = pyramid.x
        for layer in self.encoder:
            image, text = layer(image, text, pyramid, words)
        candidates = self.propose(image, text, pyramid, words)
        best = candidates[1].amax(-1).topk(self.cfg.n_query).indices                        # (B, Q)
        x, logits, anchors = (y.gather(1, best[..., None].expand(-1, -1, y.shape[-1])) for y in candidates)
        boxes = (self.proposal_box(x) + anchors).sigmoid()
        return [Prediction(boxes, logits), *self.decode(image, text, boxes.detach(), pyramid, words)]


def best_box(prediction):
    """The box of each image that fits a text token best, xyxy (B, 4) in 0..1, and its probability (B,)."""
    score, best = prediction.logits.sigmoid().amax(-1).max(-1)
    return to_xyxy(prediction.boxes_cxcywh[torch.arange(len(best), device=best.device), best]), score


# ---- Matcher and criterion

def assign(cost):
    """For each of N columns of a (Q, N) cost a row of its own, cheapest in sum; shortest augmenting paths."""
    cost = np.asarray(cost, dtype=np.float64).T                                             # (N, Q)
    N, Q = cost.shape
    if N > Q or not np.isfinite(cost).all():
        raise ValueError(f"cannot match {N} boxes to {Q} queries: there are too few, or the model has diverged (nan)")
    u, v, owner = np.zeros(N), np.zeros(Q), np.full(Q, -1)                                  # prices; column of each row
    for start in range(N):
        length, back, done = np.full(Q, np.inf), np.full(Q, -1), np.zeros(Q, dtype=bool)
        n, q, reach = start, -1, 0.0
        while n >= 0:
            new = reach + cost[n] - u[n] - v
            better = ~done & (new < length)
            length[better], back[better] = new[better], q
            q = int(np.where(done, np.inf, length).argmin())
            done[q], reach, n = True, length[q], owner[q]
        held = done & (owner >= 0)
        u[start] += reach
        u[owner[held]] += reach - length[held]
        v[done] -= reach - length[done]
        while q >= 0:
            owner[q], q = owner[back[q]] if back[q] >= 0 else start, back[q]
    return np.argsort(np.where(owner < 0, N, owner), kind="stable")[:N]


def focal(p, log_p, log_not_p):
    """Focal loss (Lin et al. 2017; alpha 1/4, gamma 2) of probabilities, should they be 1 and should they be 0."""
    return 0.25 * (1 - p) ** 2 * -log_p, 0.75 * p ** 2 * -log_not_p


@torch.no_grad()
def match(boxes_cxcywh, logits, targets_cxcywh):
    """The query of each target: boxes (Q, 4), logits (Q, T), targets (N, 4) -> (N,) long."""
    p = logits.float().sigmoid()
    high, low = focal(p, (p + 1e-8).log(), (1 - p + 1e-8).log())                            # parity: bounded costs
    cost = (high - low).mean(-1, keepdim=True) + 5 * torch.cdist(boxes_cxcywh, targets_cxcywh, p=1)
    cost = cost - 2 * giou(to_xyxy(boxes_cxcywh)[:, None], to_xyxy(targets_cxcywh), eps=1e-6)
    return torch.as_tensor(assign(cost.cpu()), device=logits.device)


def set_losses(prediction, targets):
    """focal, l1 and giou of one Prediction, per target box. targets: for each image (n, 4) cxcywh; none: left out."""
    boxes, logits = (x.float() for x in prediction)
    queries = [match(boxes[i], logits[i], want.float()) for i, want in enumerate(targets)]
    image = torch.cat([torch.full_like(x, i) for i, x in enumerate(queries)])               # (all targets,)
    query, want = torch.cat(queries), torch.cat(list(targets)).float()
    # Every text token describes every target (ChatterBox has one token), so matched queries should score high on all.
    high, low = focal(logits.sigmoid(), F.logsigmoid(logits), F.logsigmoid(-logits))        # (images, Q, T) each
    matched, got = torch.zeros_like(logits, dtype=torch.bool), boxes[image, query]
    matched[image, query] = True
    matched &= logits > -torch.inf      # words that are padding
    fit = torch.where(matched, high, low)[image.unique()]                                   # (images, Q, T)
    sums = {"focal": fit.sum(), "l1": (got - want).abs().sum(), "giou": (1 - giou(to_xyxy(got), to_xyxy(want), 1e-6)).sum()}
    return {name: x / max(len(want), 1) for name, x in sums.items()}


def locator_losses(predictions, targets):
    """Named losses of a Locator's output, summed over its prediction sets. ChatterBox weighs them 2, 5 and 2."""
    each = [set_losses(prediction, targets) for prediction in predictions]
    return {name: sum(losses[name] for losses in each) for name in each[0]}
