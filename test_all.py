"""Every test, in the order of the code: attention, vision, locate, generate, model, data, convert, train, shapes, chat, docs.

Golden tests compare with what the original code computed (folder GOLDEN_DIR, default golden/): every size, seed and case
comes from the fixtures. Vocabularies of others are there, too, or found through LLAMA_TOKENIZER and CLIP_BPE.
"""
import ast
import ctypes
import enum
import gc
import importlib
import io
import itertools
import json
import multiprocessing
import os
import pickle
import pty
import random
import re
import resource
import runpy
import select
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import weakref
import zipfile
import zlib
from collections import Counter
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType, SimpleNamespace as Thing

os.environ.setdefault("OMP_NUM_THREADS", "1")                  # tests run side by side, one to a core

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import attention
import bench
import chat
import convert_weights as cw
import data
import datasets
import evaluate
import locate
import generate as G
import model as M
import paint
import quantize
import ranks
import shapes
import train
import vision
from vision import CLIPConfig, CLIPVision, ImageBind, ImageBindConfig, HUGE, SAMConfig, Swin, SwinConfig

HERE = Path(__file__).parent
GOLDEN = Path(os.environ.get("GOLDEN_DIR", HERE / "golden"))
SHARED = HERE.parent / "shared"


def golden_file(name):                  # in GOLDEN_DIR or where all fixtures lie
    return next((path for path in (GOLDEN / name, SHARED / "golden" / name) if path.exists()), GOLDEN / name)


LLAMA_TOKENIZER = Path(os.environ.get("LLAMA_TOKENIZER", golden_file("tokenizer.model")))
CLIP_BPE = Path(os.environ.get("CLIP_BPE", golden_file("imagebind/bpe_simple_vocab_16e6.txt.gz")))
PARITY = 1e-4                           # of the output's scale: float32 sums in another order
KINK = 5e-3                             # gradients behind a million ReLUs: rounding puts some on the other side


# ---- Helpers

def rs(name, seed):
    return np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2 ** 32)


def wave(rate, seconds, seed, channels):
    r, n, out = np.random.RandomState(seed), int(rate * seconds), []
    t = np.arange(n) / rate
    for c in range(channels):
        f = 180 + 70 * c + 20 * r.rand()
        x = 0.35 * np.sin(2 * np.pi * (f * t + (900 + 300 * c) * t * t / (2 * seconds)))
        x = x + 0.15 * np.sin(2 * np.pi * 3100 * t) * (np.sin(2 * np.pi * 3 * t) > 0)
        x = x + 0.05 * r.randn(n) * (0.2 + 0.8 * (t > seconds / 2)) + 0.02
        x[int(0.55 * n):int(0.62 * n)] = 0.0
        out.append(np.clip(x, -0.99, 0.99))
    return (np.stack(out) * 32767).astype(np.int16)


def image(h, w, seed):
    r, (y, x) = np.random.RandomState(seed), np.mgrid[0:h, 0:w]
    a = np.stack([127 + 100 * np.sin(x / 7.0 + seed) + 20 * np.cos(y / 3.0), 255 * ((x // 13 + y // 11) % 2),
                  (x * 3 + y * 5 + seed * 17) % 256], -1)
    return np.clip(a + r.randint(-12, 13, a.shape), 0, 255).astype(np.uint8)


def video(frames, h, w, seed):
    a = image(h, w, seed)
    return np.stack([np.roll(a, 2 * k, axis=1) // 2 + (k * 5) % 120 for k in range(frames)]).astype(np.uint8)


MAKERS = {"wave": wave, "image": image, "video": video}


def rebuild(name, spec, seed):
    """One tensor from its entry in a fixture: the formula of the fixtures' README."""
    if isinstance(spec, dict):
        (kind, args), = spec.items()
        return torch.from_numpy(MAKERS[kind](*args))
    if spec[1] == "uint8":
        return torch.from_numpy(np.floor(rs(name, seed).random_sample(tuple(spec[0])) * 256).astype(np.uint8))
    values = spec[1] + spec[2] * rs(name, seed).standard_normal(tuple(spec[0]))
    return torch.from_numpy(np.asarray(values).astype(np.float32))


def read_golden(name):
    """-> meta, weights (per group where there are groups), tensors (inputs and outputs). Skips where the fixture is absent."""
    if not (GOLDEN / f"{name}.json").exists():
        pytest.skip(f"{GOLDEN}/{name}.json is absent")
    meta = json.loads((GOLDEN / f"{name}.json").read_text())

    def build(entries):
        return {k: build(v) if isinstance(v, dict) and not MAKERS.keys() & v.keys() else rebuild(k, v, meta.get("seed", 0))
                for k, v in entries.items()}
    path = GOLDEN / f"{name}.safetensors"
    return meta, build(meta.get("weights", {})), (load_file(path) if path.exists() else {}) | build(meta.get("inputs", {}))


def read_golden_if_near(name):
    """A fixture of another system."""
    return json.loads(need(golden_file(f"{name}.json"), name).read_text()), None, None


def close(meta, tensors, name, got, tol=PARITY, where=None):
    """A computed tensor equals the stored (strided) one within tol of its scale (where the bool mask says so)."""
    stride, want = meta.get("stride", {}).get(name, 1), tensors[name].flatten().double()
    keep = torch.ones_like(want, dtype=torch.bool) if where is None else where.expand_as(got).flatten()[::stride]
    want, got = want[keep], got.detach().flatten()[::stride].double()[keep]
    assert got.shape == want.shape, f"{name}: {got.shape} against {want.shape}"
    diff, scale = (got - want).abs().max().item(), max(want.abs().max().item(), 1e-30)
    assert diff <= tol * scale, f"{name}: off by {diff:.3g} at scale {scale:.3g}"


# ---- Attention

FEATURES = ("plain", "causal", "bias", "segments", "rel", "short", "decode")


def attention_case(feature, seed, dtype=torch.float32, device="cpu"):
    """Random q, k, v, the output's gradient, and the keywords of one attention call that uses a feature."""
    g = torch.Generator().manual_seed(seed)
    B, nkv, group, T, more = (int(torch.randint(*ends, (), generator=g)) for ends in ((1, 3), (1, 3), (1, 3), (2, 50), (0, 70)))
    hd, keys = (8, 40, 64, 72, 80, 88, 96, 128, 160)[seed % 9], {}

    def normal(*shape):
        return torch.randn(shape, generator=g).to(device, dtype)
    S = {"plain": more + 1, "segments": T, "short": T}.get(feature, T + more)
    if feature == "short":
        B, S = B + 2, (T := min(T, 32))
    if feature == "decode":
        T, S = 1, 1 + 5 * S
        if seed % 2:                                            # places ahead are hidden
            keys["bias"] = normal(1, 1, 1, S)
            keys["bias"][..., 1 + S // 2:] = torch.finfo(dtype).min
    if feature == "bias":                                       # some dimensions do not vary
        shape = [1 if seed >> i & 1 else n for i, n in enumerate((B, nkv * group, T))] + [S]
        keys["bias"] = normal(*shape)
    if feature == "segments":
        keys["segments"] = torch.randint(0, 4, (B, T), generator=g).sort().values.int().to(device)
    if feature == "rel":
        group, W = 1, 1 + seed % 9
        S = W * (S // W + 1)
        keys["rel"] = [normal(B, nkv, T, n) for n in (S // W, W)]
    q, k, v = (normal(B, t, n, hd).transpose(1, 2) for n, t in ((nkv * group, T), (nkv, S), (nkv, S)))
    causal = feature in ("causal", "decode") or feature != "plain" and seed % 2 == 0
    return (q, k, v), normal(B, nkv * group, T, hd), keys | {"causal": causal}


def attention_errors(backend, feature, seed, *case):
    """Largest errors of the output and of three gradients against float64, of each one's scale if above 1."""
    inputs, do, keys = attention_case(feature, seed, *case)
    inputs, (q, *kv) = ([x.detach().to(kind).requires_grad_(feature != "decode") for x in inputs]
                        for kind in (do.dtype, torch.float64))
    got, (k, v) = attention.BACKENDS[backend](*inputs, **keys), (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in kv)
    T, S, place = q.shape[2], k.shape[2], torch.arange(k.shape[2], device=q.device)
    scores = torch.einsum("bhtd,bhsd->bhts", q, k) / q.shape[3] ** 0.5 + keys.get("bias", torch.zeros(())).to(q)
    if "rel" in keys:
        rows, columns, W = *keys["rel"], keys["rel"][1].shape[-1]
        scores = scores + rows[..., place // W] + columns[..., place % W]
    if keys["causal"]:
        scores = scores.masked_fill(place > place[:T, None] + S - T, -torch.inf)
    if "segments" in keys:
        one, other = keys["segments"][:, None, :, None], keys["segments"][:, None, None]
        scores = scores.masked_fill(one != other, -torch.inf)
    want = scores.softmax(-1) @ v
    pairs = [(got, want)]
    if feature != "decode":
        pairs += zip(torch.autograd.grad(got, inputs, do), torch.autograd.grad(want, (q, *kv), do.double()))
    return [((a - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in pairs]


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_attention_equals_float64(backend, feature):
    for seed in range(12):
        assert max(attention_errors(backend, feature, seed)) < 1e-5, seed


@pytest.mark.parametrize("feature", FEATURES[:-1])
def test_attention_that_learns_in_bfloat16_multiplies(feature, monkeypatch):
    real, sizes = attention.reference_attention, []
    monkeypatch.setattr(attention, "reference_attention", lambda *args, **keys: sizes.append(args[0].shape[2]) or real(*args, **keys))
    for seed in range(12):
        assert max(attention_errors("torch", feature, seed, torch.bfloat16)) < 3e-2, seed
    assert sizes


def test_attention_builds_a_long_rel_bias_in_pieces(monkeypatch):
    bias, pieces = attention.relative_bias, []
    monkeypatch.setattr(attention, "relative_bias", lambda *rel: pieces.append(rel[0].shape[1:3]) or bias(*rel))
    q, rel = torch.randn(1, 3, 4096, 8), [torch.randn(1, 3, 4096, 64) for _ in range(2)]
    got = attention.torch_attention(q, q, q, rel=rel)
    assert pieces == [(1, 1024)] * 12 and (got - attention.reference_attention(q, q, q, rel=rel)).abs().max() < 1e-4


@pytest.mark.parametrize("wrong", [dict(T=9, causal=True), dict(nkv=2), dict(segments=torch.zeros(2, 5)),
                                   dict(rel=[torch.zeros(2, 3, 6, 2)] * 2)])
def test_attention_refuses(wrong):
    q, k = torch.zeros(2, 3, wrong.pop("T", 6), 8), torch.zeros(2, wrong.pop("nkv", 3), 8, 8)
    with pytest.raises(ValueError, match="keys|heads|places"):
        attention.attention(q, k, k, **wrong)


def in_subprocess(call, **env):
    """What print(json) of a call of this file gives in a process of its own."""
    command = [sys.executable, "-c", f"import json, test_all; print(json.dumps(test_all.{call}))"]
    done = subprocess.run(command, cwd=HERE, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def interpret_kernels(feature):
    """Worst error of our kernels per dtype, on a CPU."""
    return {name: max(max(attention_errors("triton", feature, seed, getattr(torch, name))) for seed in range(first, first + 2))
            for first, name in enumerate(("float32", "float16"))}


@pytest.mark.slow
@pytest.mark.parametrize("feature", FEATURES)
def test_triton_interpreted_equals_float64(feature):
    pytest.importorskip("triton")
    worst = in_subprocess(f"interpret_kernels({feature!r})", TRITON_INTERPRET="1")
    assert worst["float32"] < 1e-5 and worst["float16"] < 4e-3


def compile_kernels(sm):
    """Compile what calls of all features would launch on a GPU of compute capability sm -> name, shared bytes, wgmma."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction
    here = Thing(get_current_target=lambda: GPUTarget("cuda", sm, 32), get_current_device=lambda: 0,
                 get_current_stream=lambda device: 0)
    triton.runtime.driver.set_active(here)
    run, made = JITFunction.run, []
    JITFunction.run = lambda self, *args, **more: made.append(run(self, *args, **more | {"warmup": True}))
    attention.INTERPRETED = True                                # CPU tensors stand for the GPU's
    cases = dict(causal=(2, "bfloat16"), segments=(7, "float16"), rel=(4, "bfloat16"), bias=(1, "float32"), decode=(7, "bfloat16"))
    for feature, (seed, dtype) in cases.items():
        inputs, do, keys = attention_case(feature, seed, getattr(torch, dtype))
        learns = feature in ("causal", "rel")
        out = attention.triton_attention(*(x.requires_grad_(learns) for x in inputs), **keys)
        if learns:
            out.backward(do)
    return [(kernel.name, kernel.metadata.shared, "wgmma" in kernel.asm["ptx"]) for kernel in made]


@pytest.mark.slow
@pytest.mark.parametrize("sm", [80, 90])
def test_triton_compiles_without_a_gpu(sm, tmp_path):
    pytest.importorskip("triton")
    made = in_subprocess(f"compile_kernels({sm})", TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    assert {name for name, _, _ in made} == {"forward_kernel", "dq_kernel", "dkdv_kernel", "join_kernel"} and len(made) == 10
    assert max(shared for _, shared, _ in made) <= 99 * 1024    # what the smallest of these GPUs give one program
    assert sm < 90 or any(wgmma for _, _, wgmma in made)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("feature", FEATURES)
def test_triton_on_a_gpu_equals_float64(feature, dtype):
    for seed in range(18):
        worst = max(attention_errors("triton", feature, seed, getattr(torch, dtype), "cuda"))
        assert worst < {"float32": 1e-4, "bfloat16": 3e-2, "float16": 4e-3}[dtype], seed


# ---- Vision

def golden_towers(c):
    """ImageBind's config of a fixture's sizes; what the fixture does not tell is as published."""
    towers = {kind: M.replace(huge, dim=c[f"{kind}_embed_dim"], n_layer=c[f"{kind}_num_blocks"],
                              n_head=c[f"{kind}_num_heads"]) for kind, huge in HUGE.items() if f"{kind}_embed_dim" in c}
    if "image_size" in c:
        side = (c["image_size"],) * 2
        depth, thermal, audio = ((c[f"{kind}_kernel_size"],) * 2 for kind in ("depth", "thermal", "audio"))
        told = {"vision": dict(size=(c["video_frames"], *side), patch=tuple(c["kernel_size"])),
                "text": dict(size=(c["text_context_length"],), channels=c["text_vocab_size"]),
                "audio": dict(size=(c["audio_num_mel_bins"], c["audio_target_len"]), patch=audio,
                              stride=(c["audio_stride"],) * 2),
                "depth": dict(size=side, patch=depth), "thermal": dict(size=side, patch=thermal),
                "imu": dict(size=(c["imu_window"],), patch=(c["imu_kernel_size"],))}
        towers = {kind: M.replace(tower, **told[kind]) for kind, tower in towers.items()}
    return ImageBindConfig(towers, c["out_embed_dim"])


def golden_imagebind(config, weights):
    """An ImageBind of a fixture's sizes, filled from original keys."""
    bind = ImageBind(golden_towers(config))
    prefix = "readers.imagebind.tower."
    bind.load_state_dict({k.removeprefix(prefix): v for k, v in cw.rename(weights, cw.IMAGEBIND).items()})
    return bind.eval()


def test_golden_imagebind_model():
    meta, weights, t = read_golden("imagebind/model")
    bind = golden_imagebind(meta["config"], weights)
    for name in meta["inputs"] | {"in.text": 0}:
        case = name.removeprefix("in.")
        kind, x = case.split("_")[0], t[name]
        tower, clips = bind.towers[kind], x.flatten(0, 1) if x.ndim >= 5 else x
        tokens = tower.tokens(clips)
        trunk = tower.trunk(tokens)
        close(meta, t, f"mid.{case}.tokens", tokens[:1] if case == "vision_video" else tokens)
        close(meta, t, f"mid.{case}.trunk", trunk[:1])
        ends = clips.argmax(-1) if kind == "text" else torch.zeros(len(clips), dtype=torch.long)
        close(meta, t, f"mid.{case}.head", tower.head(tower.norm(trunk[torch.arange(len(clips)), ends])))
        close(meta, t, f"out.{case}", bind(kind, x))
        if f"out.chatbind_tokens.{case}" in t:
            assert bind(kind, x).shape == t[f"out.chatbind_tokens.{case}"].shape
            close(meta, t, f"out.chatbind_tokens.{case}", bind(kind, x))
    bind.towers["audio"].log_scale = None                       # NExT-GPT's copy
    close(meta, t, "out.nextgpt.audio", bind("audio", t["in.audio"]))


# ---- Locate

def golden_sam(c):
    return SAMConfig(
        image_size=c["img_size"], patch_size=c["patch_size"], dim=c["embed_dim"], n_layer=c["depth"], n_head=c["num_heads"],
        mlp_dim=int(c["embed_dim"] * c["mlp_ratio"]), window=c["window_size"], global_layers=tuple(c["global_attn_indexes"]),
        prompt_dim=c["prompt_dim"], mask_dim=c["mask_in_chans"], n_mask=c["num_multimask_outputs"] + 1,
        dec_layer=c["dec_depth"], dec_head=c["dec_heads"], dec_mlp_dim=c["dec_mlp"], iou_dim=c["iou_hidden"])


def fill(module, state, prefix):
    """`module` with those tensors of a renamed state that belong at `prefix` of a model."""
    module.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    return module.eval()


@torch.no_grad()
def test_golden_nextchat_sam_encoder():
    meta, weights, t = read_golden("nextchat/sam")
    encoder = fill(locate.SAM(golden_sam(meta["config"])), cw.rename(weights, cw.SAM), "writers.at.sam.").image_encoder
    x = encoder.embed(t["in.images"])
    close(meta, t, "enc.embed", x)
    for i, block in enumerate(encoder.blocks):
        x = block(x)
        close(meta, t, f"enc.block_{i}", x)
    close(meta, t, "enc.features", encoder(t["in.images"]))
    side = t["relpos.q7_k7"].shape[0]
    close(meta, t, "relpos.q7_k7", vision.relative_positions(t["relpos.in"], side))
    assert torch.equal(t["relpos.in"], encoder.blocks[0].attn.rel_pos_h)


@torch.no_grad()
def test_golden_nextchat_sam_prompts_and_masks():
    meta, weights, t = read_golden("nextchat/sam")
    sam = fill(locate.SAM(golden_sam(meta["config"])), cw.rename(weights, cw.SAM), "writers.at.sam.")
    encoder, boxes, points = sam.prompt_encoder, t["box.boxes"], (t["pt.points"], t["pt.labels"].long())
    close(meta, t, "prompt.dense_pe", encoder.grid())
    close(meta, t, "box.sparse", encoder(boxes_px=boxes))
    close(meta, t, "pt.sparse", encoder(points=points))
    close(meta, t, "ptbox.sparse", encoder(points=points, boxes_px=boxes))
    close(meta, t, "box.dense", encoder.masks().expand(len(boxes), -1, *encoder.grid().shape[2:]))
    close(meta, t, "pt.dense", encoder.masks(t["pt.masks"]))
    features, extra, n = sam.encode(t["in.images"]), t["lm.extra_sparse"], len(t["dec.paired_iou"])
    cases = {"single": (features[:1], encoder(extra, boxes), encoder.masks()),
             "multi": (features[:1], encoder(points=points), encoder.masks(t["pt.masks"]), True),
             "paired": (features[:n], encoder(boxes_px=boxes[:n]), encoder.masks())}
    for name, (image, *args) in cases.items():
        masks, iou = sam.mask_decoder(image, encoder.grid(), *args)
        close(meta, t, f"dec.{name}", masks)
        close(meta, t, f"dec.{name}_iou", iou)
    masks, iou = sam.decode(features[:1], extra, boxes)
    close(meta, t, "lm.mask_logits", masks)
    close(meta, t, "lm.iou", iou)


def random_boxes(n, seed):
    """(n, 4) xyxy with whole corners in 0..20, none empty."""
    r = np.random.RandomState(seed)
    low = r.randint(0, 15, (n, 2))
    return torch.from_numpy(np.concatenate([low, low + r.randint(1, 6, (n, 2))], 1)).double()


def test_locate_overlap_equals_counted_cells():
    a, b = random_boxes(23, 0), random_boxes(17, 1)

    def cells(box):
        x0, y0, x1, y1 = map(int, box)
        return {(x, y) for x in range(x0, x1) for y in range(y0, y1)}
    for p, ious, gious in zip(a, locate.iou(a[:, None], b), locate.giou(a[:, None], b)):
        for q, iou, giou in zip(b, ious, gious):
            inter, union = len(cells(p) & cells(q)), len(cells(p) | cells(q))
            hull = len(cells(torch.cat([torch.minimum(p, q)[:2], torch.maximum(p, q)[2:]])))
            assert iou.item() == pytest.approx(inter / union) and giou.item() == pytest.approx(inter / union - 1 + union / hull)


def to_cxcywh(boxes):
    low, high = boxes.split(2, dim=-1)
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def test_locate_box_functions_keep_their_bounds():
    a, b = (random_boxes(500, seed) for seed in (2, 3))
    iou, giou = locate.iou(a, b), locate.giou(a, b)
    assert (0 <= iou).all() and (-1 <= giou).all() and (giou <= iou + 1e-9).all() and iou.max() <= 1
    assert torch.allclose(giou, locate.giou(b, a)) and torch.allclose(giou, locate.giou(a * 7 + 3, b * 7 + 3))
    assert torch.allclose(locate.giou(a, a), torch.ones(500).double()) and iou.min() == 0 and giou.min() < 0
    assert torch.equal(locate.to_xyxy(to_cxcywh(a)), a)
    assert locate.giou(torch.zeros(1, 4), torch.zeros(1, 4)).isfinite().all()


def test_locate_takes_no_boxes_and_padded_words():
    cfg = SAMConfig(image_size=64, patch_size=16, dim=32, n_layer=1, n_head=2, mlp_dim=64, window=2, global_layers=(0,), prompt_dim=32,
                    dec_head=2, dec_mlp_dim=64, iou_dim=32)
    masks = locate.BoxHead(16, cfg).masks(torch.zeros(0, 16), torch.zeros(1, 32, 4, 4))
    assert all(len(x) == 0 for x in masks)
    boxes, logits = torch.rand(1, 3, 4) * 0.5 + 0.2, torch.tensor([[[0.5, -torch.inf]] * 3])
    losses = locate.set_losses((boxes, logits), [torch.tensor([[0.5, 0.5, 0.2, 0.2]])])
    assert all(torch.isfinite(x) for x in losses.values())


def test_locate_box_losses_pass_over_the_mock_alone():
    pred, target = torch.rand(3, 4).sort().values.requires_grad_(), torch.rand(3, 4).sort().values
    for mock in (False, True):
        [grad] = torch.autograd.grad(locate.box_loss(pred, target, mock)["l1"], pred)
        assert (grad.abs().sum(1) > 1e-3).tolist() == [True, True, not mock]


def test_locate_box_loss_without_a_valid_box_is_finite():
    pred = torch.tensor([[0.5, 0.5, 0.2, 0.9]], requires_grad=True)
    losses = locate.box_loss(pred, torch.tensor([[0.1, 0.1, 0.4, 0.4]]))
    sum(losses.values()).backward()
    assert losses["giou"] == 0 and losses["l1"] > 0 and pred.grad.isfinite().all()


def test_locate_decode_refuses_pictures_that_do_not_pair():
    sam = locate.SAM(PEER_SAMS[0])
    with pytest.raises(ValueError, match="3 objects do not pair with 2 pictures"):
        sam.decode(torch.zeros(2, 32, 4, 4), boxes_px=torch.zeros(3, 4))


PEER_SAMS = [SAMConfig(64, 16, 32, 3, 2, 96, 3, (1,), 32, 8, 4, 2, 4, 40, 24),
             SAMConfig(96, 8, 48, 2, 4, 100, 5, (0,), 16, 4, 4, 1, 2, 32, 16),
             SAMConfig(80, 16, 24, 4, 3, 48, 7, (1, 3), 48, 16, 3, 3, 8, 64, 32),
             SAMConfig(64, 8, 16, 2, 1, 64, 8, (), 24, 4, 5, 2, 3, 20, 8)]
PEER_SAM = [                            # ours, as transformers names it
    ("vision_encoder.pos_embed",                                "image_encoder.pos_embed"),
    ("vision_encoder.patch_embed.projection.*",                 "image_encoder.patch_embed.proj.*"),
    ("vision_encoder.layers.{}.layer_norm{1,2}.*",              "image_encoder.blocks.{}.norm{1,2}.*"),
    ("vision_encoder.layers.{}.{attn,mlp}.*",                   "image_encoder.blocks.{}.{attn,mlp}.*"),
    ("vision_encoder.neck.{conv1,layer_norm1,conv2,layer_norm2}.*", "image_encoder.neck.{0,1,2,3}.*"),
    ("shared_image_embedding.positional_embedding",             "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
    ("prompt_encoder.shared_embedding.positional_embedding",    None),
    ("prompt_encoder.{not_a_point_embed,no_mask_embed}.*",      "prompt_encoder.{not_a_point_embed,no_mask_embed}.*"),
    ("prompt_encoder.point_embed.*",                            "prompt_encoder.point_embeddings.*"),
    ("prompt_encoder.mask_embed.{conv1,layer_norm1,conv2,layer_norm2,conv3}.*", "prompt_encoder.mask_downscaling.{0,1,3,4,6}.*"),
    ("mask_decoder.{iou_token,mask_tokens}.*",                  "mask_decoder.{iou_token,mask_tokens}.*"),
    ("mask_decoder.transformer.layers.{}.layer_norm{1,2,3,4}.*", "mask_decoder.transformer.layers.{}.norm{1,2,3,4}.*"),
    ("mask_decoder.transformer.layers.{}.{self_attn,cross_attn_token_to_image,cross_attn_image_to_token,mlp}.*",
     "mask_decoder.transformer.layers.{}.{self_attn,cross_attn_token_to_image,cross_attn_image_to_token,mlp}.*"),
    ("mask_decoder.transformer.{final_attn_token_to_image,layer_norm_final_attn}.*",
     "mask_decoder.transformer.{final_attn_token_to_image,norm_final_attn}.*"),
    ("mask_decoder.{upscale_conv1,upscale_layer_norm,upscale_conv2}.*", "mask_decoder.output_upscaling.{0,1,3}.*"),
    ("mask_decoder.output_hypernetworks_mlps.{}.{proj_in,layers.0,proj_out}.*",
     "mask_decoder.output_hypernetworks_mlps.{}.layers.{0,1,2}.*"),
    ("mask_decoder.iou_prediction_head.{proj_in,layers.0,proj_out}.*", "mask_decoder.iou_prediction_head.layers.{0,1,2}.*")]


def peer_sam(cfg, seed=0):
    """transformers' SAM of these sizes with random weights, and ours with the same."""
    peer = pytest.importorskip("transformers")
    vision_config = peer.SamVisionConfig(
        hidden_size=cfg.dim, output_channels=cfg.prompt_dim, num_hidden_layers=cfg.n_layer, num_attention_heads=cfg.n_head,
        image_size=cfg.image_size, patch_size=cfg.patch_size, window_size=cfg.window, mlp_dim=cfg.mlp_dim,
        global_attn_indexes=list(cfg.global_layers), num_pos_feats=cfg.prompt_dim // 2)
    prompt_config = peer.SamPromptEncoderConfig(hidden_size=cfg.prompt_dim, image_size=cfg.image_size,
                                                patch_size=cfg.patch_size, mask_input_channels=cfg.mask_dim)
    decoder_config = peer.SamMaskDecoderConfig(
        hidden_size=cfg.prompt_dim, mlp_dim=cfg.dec_mlp_dim, num_hidden_layers=cfg.dec_layer,
        num_attention_heads=cfg.dec_head, num_multimask_outputs=cfg.n_mask - 1, iou_head_hidden_dim=cfg.iou_dim,
        layer_norm_eps=1e-5)                                # as in the original; transformers' default is 1e-6
    torch.manual_seed(seed)
    theirs = peer.SamModel(peer.SamConfig(vision_config=vision_config, prompt_encoder_config=prompt_config,
                                          mask_decoder_config=decoder_config)).eval()
    for p in theirs.parameters():
        p.data += 0.1 * torch.randn_like(p)
    ours = locate.SAM(cfg).eval()
    ours.load_state_dict(cw.rename(theirs.state_dict(), PEER_SAM))
    return theirs, ours


@torch.no_grad()
@pytest.mark.parametrize("cfg", PEER_SAMS)
def test_locate_sam_equals_transformers(cfg):
    theirs, ours = peer_sam(cfg)
    image, points = torch.randn(1, 3, cfg.image_size, cfg.image_size), torch.rand(3, 2, 2) * cfg.image_size
    labels, boxes = torch.tensor([[1, 0], [0, -1], [1, 1]]), torch.rand(3, 4) * cfg.image_size
    masks = torch.randn(3, 1, 4 * cfg.grid, 4 * cfg.grid)
    features = ours.encode(image)
    want = theirs.get_image_embeddings(image)
    assert (features - want).abs().max() <= PARITY * want.abs().max()
    for multimask, with_boxes in itertools.product((False, True), repeat=2):
        out = theirs(image_embeddings=want, input_points=points[None], input_labels=labels[None],
                     input_boxes=boxes[None] if with_boxes else None, multimask_output=multimask)
        logits, iou = ours.decode(features, None, boxes if with_boxes else None, (points, labels), None, multimask)
        upscaled = torch.nn.functional.interpolate(out.pred_masks[0], (cfg.image_size,) * 2, mode="bilinear")
        assert (logits - upscaled).abs().max() <= PARITY * upscaled.abs().max()
        assert (iou - out.iou_scores[0]).abs().max() <= PARITY * out.iou_scores.abs().max()
    prompt = theirs.prompt_encoder(None, None, boxes[None], masks)[1]
    assert torch.allclose(ours.prompt_encoder.masks(masks), prompt, atol=1e-5)


@pytest.mark.parametrize("name, table", [("sam_vit_h", "SAM"), ("nextchat-7b-336", "NEXTCHAT")])
def test_locate_public_keys_have_one_row(tmp_path, name, table):
    """Each key of a public checkpoint matches one row, and those of SAM are the tensors of a SAM of ViT-H's sizes."""
    manifest = header_only(name, tmp_path / f"{name}.safetensors")
    source = cw.open_source(tmp_path, cw.open_files(tmp_path))
    dropped = [key for key in manifest if cw.translate(key, getattr(cw, table)) is None]
    assert {row.fate for row in source.rows} <= {"dropped"} and len(source.rows) == len(dropped)
    assert len(source.tensors) + len(dropped) == len(manifest) and all("inv_freq" in key for key in dropped)
    with torch.device("meta"):
        want = {f"writers.at.sam.{k}": x.shape for k, x in locate.SAM(cw.sam_config(source)).state_dict().items()}
    assert {k: x.like.shape for k, x in source.tensors.items() if k.startswith("writers.at.sam.")} == want
    assert cw.sam_config(source) == SAMConfig()


# ---- Ground

def golden_swin(c, **more):
    return SwinConfig(c["embed_dim"], tuple(c["depths"]), tuple(c["num_heads"]), c["window_size"], **more)


def golden_locator_config(c):
    return locate.LocatorConfig(golden_swin(c["swin"]), c["hidden_dim"], c["enc_layers"], c["dec_layers"], c["nheads"],
                                c["dim_feedforward"], c["num_queries"], c.get("enc_n_points", 4))


def golden_locator(c, weights):
    """The locator of a fixture's sizes, filled from GroundingDINO's keys."""
    return fill(locate.Locator(golden_locator_config(c)), cw.rename(weights, cw.GROUNDING_DINO), cw.LOCATOR)


def test_golden_chatterbox_swin():
    meta, weights, t = read_golden("chatterbox/swin")
    c = meta["config"]
    swin = Swin(golden_swin(c, patch_size=c["patch_size"], outputs=tuple(c["out_indices"])))
    fill(swin, cw.rename(weights, cw.GROUNDING_DINO), cw.LOCATOR + "swin.")
    image = t["in.images"].masked_fill(t["in.mask"][:, None], 0)
    close(meta, t, "out.patch_embed", swin.patches(image).permute(0, 3, 1, 2))
    for i, x in zip(c["out_indices"], swin(image)):
        close(meta, t, f"out.stage{i}", x)
        pad = torch.nn.functional.interpolate(t["in.mask"][None].float(), size=x.shape[-2:])[0].bool()
        assert torch.equal(pad, t[f"out.mask{i}"])
        close(meta, t, f"out.pos{i}", locate.geometry(pad, c["pos_embed_dim"])[0].permute(0, 3, 1, 2))


def test_golden_chatterbox_msda():
    meta, weights, t = read_golden("chatterbox/msda")
    c = meta["config"]
    core = [t[f"in.core_{name}"].requires_grad_() for name in ("value", "sampling_locations", "attention_weights")]
    out = locate.deformable_attention(core[0], c["spatial_shapes_hw"], *core[1:])
    close(meta, t, "out.core", out)
    for name, grad in zip(("value", "sampling_locations", "attention_weights"),
                          torch.autograd.grad(out, core, t["in.core_grad_output"])):
        close(meta, t, f"out.core_grad_{name}", grad)
    attn = locate.DeformableAttention(c["embed_dim"], c["num_heads"], c["num_levels"], c["num_points"])
    close(meta, t, "out.initial_sampling_offsets_bias", attn.offsets.bias)
    weights = {f"transformer.decoder.layers.0.cross_attn.{k}": v for k, v in weights.items()}
    fill(attn, cw.rename(weights, cw.GROUNDING_DINO), cw.LOCATOR + "decoder.0.attn.")
    pad = t["in.key_padding_mask"]
    for n, mask in ((2, pad), (4, torch.zeros_like(pad))):
        got = attn(t["in.query"], t["in.value"], t[f"in.reference_points{n}"], c["spatial_shapes_hw"], mask)
        close(meta, t, f"out.module_ref{n}", got)


def golden_region(c, state):
    """The region encoder of a fixture's sizes from a converted checkpoint."""
    cfg = locate.RegionConfig(c["clip"], c["llm"], c["pos_hidden"], c["num_levels"], c["num_fuse"], c["gn"], c["pool"])
    return fill(locate.RegionEncoder(cfg), state, "readers.region.")


def test_golden_chatterbox_roi():
    meta, weights, t = read_golden("chatterbox/roi")
    c = meta["config"]
    region = golden_region(c, cw.rename({f"spi_module.{k}": v for k, v in weights.items()}, cw.CHATTERBOX))
    levels = [t[f"in.feats{i}"] for i in range(c["num_levels"])]
    boxes = [t[f"in.boxes{i}"] for i in range(len(levels[0]))]
    maps = region.enlarge(levels)
    for layer in region.fuse:
        maps = [layer(region.mix(maps, i)).relu() for i in range(len(maps))]
    for i, x in enumerate(maps):
        if f"out.fused{i}" in t:
            close(meta, t, f"out.fused{i}", x)
        pooled = [locate.roi_align(*pair, c["pool"], c["sampling_ratio"]) for pair in zip(x, boxes)]
        close(meta, t, f"out.roi{i}", torch.cat(pooled))
    close(meta, t, "out.pos_embed", region.box_embed(torch.cat(boxes)))
    for i, out in enumerate(region(levels, boxes).split([len(b) for b in boxes])):
        close(meta, t, f"out.query{i}", out)


def check_golden_locator(meta, t, case, locator):
    """What a locator finds in the pictures of a case, and on the way."""
    hs, calls, pad = [], [], t[f"in.{case}.mask"]
    locator.norm.register_forward_hook(lambda module, args, out: hs.append(out))
    propose = locator.propose
    locator.propose = lambda *args: calls.append((*args, propose(*args))) or calls[0][-1]
    found = locator(t[f"in.{case}.images"].masked_fill(pad[:, None], 0), t[f"in.{case}.query"], pad)
    (image, text, pyramid, _, (_, scores, _)), = calls
    assert pyramid.shapes == [tuple(x) for x in t[f"out.{case}.spatial_shapes"].tolist()]
    assert torch.equal(scores[..., 0].topk(meta["config"]["num_queries"]).indices, t[f"out.{case}.topk"])
    inside = dict(valid_ratios=pyramid.valid, memory=image, memory_text=text, enc_logits=scores, hs=torch.stack(hs))
    for name, got in inside.items():
        close(meta, t, f"out.{case}.{name}", got)
    for name, prediction in zip(("interm", *(f"aux{i}" for i in range(len(hs) - 1)), "pred"), found):
        close(meta, t, f"out.{case}.{name}_boxes", prediction.boxes_cxcywh)
        close(meta, t, f"out.{case}.{name}_logits", prediction.logits)
    close(meta, t, f"out.{case}.best_score", locate.best_box(found[-1])[1])
    assert torch.equal(found[-1].logits[..., 0].sigmoid().argmax(1), t[f"out.{case}.best_query"])


def test_golden_chatterbox_locator():
    meta, weights, t = read_golden("chatterbox/locator")
    for case in meta["config"]["cases"]:
        check_golden_locator(meta, t, case, golden_locator(meta["config"], weights))


def golden_chatterbox(meta, weights):
    """The model of a ChatterBox fixture."""
    c, v = meta["config"], meta["config"]["locator"]
    state = cw.rename(weights["state_dict"], cw.CHATTERBOX) | cw.rename(weights["clip"], cw.CLIP)
    llm = M.LLMConfig(dim=c["hidden"], n_layer=c["layers"], n_head=c["heads"], n_kv_head=c["heads"], mlp_dim=c["inter"],
                      vocab_size=c["vocab"] + len(c["ids"]), norm_eps=c["rms_norm_eps"], lora_rank=c["lora_r"],
                      lora_alpha=c["lora_alpha"], lora_targets="wq wv")
    clip = CLIPConfig(c["clip_image"], c["clip_patch"], c["clip_dim"], c["clip_layers"], c["clip_heads"], c["clip_inter"])
    region = locate.RegionConfig(dim=c["clip_dim"], out_dim=c["hidden"], box_dim=c["pos_hidden"], groups=c["gn_groups"])
    model = M.Model(M.replace(M.PRESETS["chatterbox-13b"], llm=llm, clip=clip, region=region, locator=golden_locator_config(v),
                              added_tokens=c["ids"], bos=c["bos"], eos=(c["eos"],)))
    model.load_state_dict(state)
    return model.eval()


def golden_chatterbox_batch(meta, t, case, targets=None):
    """A step of a ChatterBox fixture as a data.Batch; targets: for each image (n, 4) cxcywh, n 0 or 1."""
    ids, special = t[f"in.{case}.input_ids"], meta["config"]["ids"]
    media, boxes = {"image": t["in.clip_images"][:len(ids)]}, [t[f"in.{case}.boxes{i}"] for i in range(len(ids))]
    slots = {"image": (ids == special["<im_patch>"]).nonzero().T, "region": (ids == special["<bbox>"]).nonzero().T}
    if targets is None:
        image_of = torch.cat([torch.full((len(b),), i) for i, b in enumerate(boxes)])
        media["region"] = {"image": media["image"], "boxes": torch.cat(boxes), "image_of": image_of}
        return data.Batch(ids, t[f"in.{case}.labels"], media, slots)
    some = [i for i, x in enumerate(targets) if len(x)]
    target = {"slots": (ids == special["[VG]"]).nonzero()[some].T, "boxes_cxcywh": torch.cat(targets), "image": t["in.det_images"][some]}
    return data.Batch(ids, t[f"in.{case}.labels"], media, slots, {"vg": target})


def close_grads(meta, t, case, model):
    """Compare the gradients that a step of the fixture keeps."""
    named = dict(model.named_parameters())
    for key in (k for k in t if k.startswith(f"out.{case}.grad.")):
        name = cw.translate(key.removeprefix(f"out.{case}.grad."), cw.CHATTERBOX)
        close(meta, t, key, named[name].grad, KINK if ".fuse." in name else PARITY)


def test_golden_chatterbox_referring_step():
    meta, weights, t = read_golden("chatterbox/chatterbox")
    model, mask = golden_chatterbox(meta, weights), t["in.ref.attention_mask"]
    batch = golden_chatterbox_batch(meta, t, "ref")
    x = model.embed(batch.ids, batch.media, batch.slots)
    h = model.llm(x)
    close(meta, t, "out.ref.last_hidden", h * mask[..., None])
    whole = {"inputs_embeds": x * mask[..., None], "logits": model.llm.lm_head(h) * mask[..., None]}
    for what, side, n in re.findall(r"out\.ref\.(\w+)_(to|from)(\d+)", " ".join(t)):         # of a row's tokens
        part = slice(int(n)) if side == "to" else slice(int(n), None)
        close(meta, t, f"out.ref.{what}_{side}{n}", whole[what][:, part])
    with torch.backends.mkldnn.flags(enabled=False):            # whose convolutions round otherwise on every processor
        losses = model(batch)
        losses["lm"].backward()
    close(meta, t, "out.ref.vqa_loss", losses["lm"])
    close_grads(meta, t, "ref", model)


def test_golden_chatterbox_grounding_step():
    meta, weights, t = read_golden("chatterbox/chatterbox")
    model, mask, found = golden_chatterbox(meta, weights), t["in.gnd.attention_mask"], []
    targets = [t[f"in.gnd.boxes{i}"] for i in range(len(mask))]
    model.writers.vg.locator.register_forward_hook(lambda module, args, out: found.append(out))
    model.writers.vg.query.register_forward_hook(lambda module, args, out: found.append(out))
    batch = golden_chatterbox_batch(meta, t, "gnd", targets)
    close(meta, t, "out.gnd.last_hidden", model.llm(model.embed(batch.ids, batch.media, batch.slots)) * mask[..., None])
    losses = model(batch)
    close(meta, t, "out.gnd.query", found[0][:, None])
    close(meta, t, "out.gnd.raw_lm_loss", losses["lm"])
    sets = ["interm", *(f"aux{i}" for i in range(len(found[1]) - 2)), "final"]
    for name, prediction in zip(sets, found[1]):
        picks = [locate.match(*(x[i] for x in prediction), box).item() for i, box in enumerate(targets)]
        assert picks == meta["gnd_matched_query"][name]
        close(meta, t, f"out.gnd.{name.replace('final', 'pred')}_boxes", prediction.boxes_cxcywh)
        close(meta, t, f"out.gnd.{name.replace('final', 'pred')}_logits", prediction.logits)
        for case, wanted in (("mix", [targets[0][:0], *targets[1:]]), ("gnd", targets)):
            for ours, theirs in (("focal", "ce"), ("l1", "bbox"), ("giou", "giou")):
                key = f"loss_{theirs}_{name}".replace("_final", "").replace("_aux", "_")
                got, want = locate.set_losses(prediction, wanted)[ours].item(), meta[f"{case}_losses"][key]
                assert abs(got - want) <= PARITY * max(1, abs(want)), (case, key, got, want)
    total = train.total_loss(losses, train.STAGES["chatterbox", 2])
    close(meta, t, "out.gnd.vg_loss", total)                    # the text's loss does not count beside a box's
    total.backward()
    close_grads(meta, t, "gnd", model)


def test_golden_chatterbox_mixed_step():
    meta, weights, t = read_golden("chatterbox/chatterbox")
    boxes = [t["in.gnd.boxes0"][:0], *(t[f"in.gnd.boxes{i}"] for i in range(1, len(t["in.gnd.input_ids"])))]
    losses = golden_chatterbox(meta, weights)(golden_chatterbox_batch(meta, t, "gnd", boxes))
    close(meta, t, "out.mix.vg_loss", train.total_loss(losses, train.STAGES["chatterbox", 2]))


@torch.no_grad()
def test_golden_chatterbox_generation():
    meta, weights, t = read_golden("chatterbox/chatterbox")
    model, ids, found, hidden = golden_chatterbox(meta, weights), t["in.gen.input_ids"], [], []
    media = {"image": t["in.clip_images"][:1]}
    media["region"] = {"image": media["image"], "boxes": t["in.gen.boxes"], "image_of": torch.zeros(len(t["in.gen.boxes"]))}
    special = meta["config"]["ids"]
    slots = {kind: (ids == special[token]).nonzero().T for kind, token in (("image", "<im_patch>"), ("region", "<bbox>"))}
    new = list(M.generate(model, model.embed(ids, media, slots), hidden=hidden,
                          max_new_tokens=t["out.gen.output_ids"].shape[1] - ids.shape[1]))
    assert ids[0].tolist() + new == t["out.gen.output_ids"][0].tolist()
    model.writers.vg.locator.register_forward_hook(lambda module, args, out: found.append(out[-1]))
    _, score = M.read_out(model, ids[0].tolist() + new, hidden, "vg", image=t["in.det_images"][:1])
    close(meta, t, "out.gen.pred_boxes", found[0].boxes_cxcywh)
    close(meta, t, "out.gen.pred_logits", found[0].logits)
    assert found[0].logits[0, :, 0].argmax().item() == meta["gen_best_query"]
    assert score.item() == pytest.approx(meta["gen_best_score"], rel=PARITY)


SWIN, ENC, DEC = "model.backbone.conv_encoder.model.swin.", "model.encoder.layers.{}.", "model.decoder."
PEER_DINO = [                                                   # transformers' names, q, k and v still apart
    (SWIN + "embeddings.patch_embeddings.projection.*",         "swin.patch.*"),
    (SWIN + "embeddings.norm.*",                                "swin.patch_norm.*"),
    (SWIN + "encoder.layers.{}.blocks.{}.attention.{q,k,v,o}_proj.*", "swin.stages.{}.{}.attn.w{q,k,v,o}.*"),
    (SWIN + "encoder.layers.{}.blocks.{}.attention.relative_position_bias.relative_position_bias_table",
     "swin.stages.{}.{}.attn.bias_table"),
    (SWIN + "encoder.layers.{}.blocks.{}.layernorm_{before,after}.*", "swin.stages.{}.{}.{attn_norm,mlp_norm}.*"),
    (SWIN + "encoder.layers.{}.blocks.{}.mlp.*",                "swin.stages.{}.{}.mlp.*"),
    (SWIN + "encoder.layers.{}.downsample.*",                   "swin.merges.{}.*"),
    (SWIN + "layernorm.*",                                      None),
    ("model.backbone.conv_encoder.model.hidden_states_norms.stage{2,3,4}.*", "swin.norms.{1,2,3}.*"),
    ("model.{text_backbone,text_projection}.*",                 None),
    ("model.input_proj_vision.{}.{0,1}.*",                      "input_proj.{}.{conv,norm}.*"),
    ("model.level_embed",                                       "level_embed"),
    ("model.query_position_embeddings.*",                       "queries.*"),
    ("model.{enc_output,enc_output_norm}.*",                    "{proposal,proposal_norm}.*"),
    ("model.encoder_output_bbox_embed.layers.{0,1,2}.*",        "proposal_box.{0,2,4}.*"),
    (ENC + "text_enhancer_layer.self_attn.{query,key,value,out_proj}.*", "encoder.{}.text.attn.{wq,wk,wv,wo}.*"),
    (ENC + "text_enhancer_layer.layer_norm_{before,after}.*", "encoder.{}.text.{attn_norm,mlp_norm}.*"),
    (ENC + "text_enhancer_layer.fc{1,2}.*",            "encoder.{}.text.mlp.fc{1,2}.*"),
    (ENC + "fusion_layer.{vision_param,text_param}",   "encoder.{}.fusion.{image_gamma,text_gamma}"),
    (ENC + "fusion_layer.layer_norm_{vision,text}.*",  "encoder.{}.fusion.{image_norm,text_norm}.*"),
    (ENC + "fusion_layer.attn.{vision_proj,text_proj}.*", "encoder.{}.fusion.{image_qk,text_qk}.*"),
    (ENC + "fusion_layer.attn.values_{vision,text}_proj.*", "encoder.{}.fusion.{image_v,text_v}.*"),
    (ENC + "fusion_layer.attn.out_{vision,text}_proj.*", "encoder.{}.fusion.{image_out,text_out}.*"),
    (ENC + "deformable_layer.self_attn.{sampling_offsets,attention_weights,value_proj,output_proj}.*",
     "encoder.{}.image.attn.{offsets,weights,wv,wo}.*"),
    (ENC + "deformable_layer.{self_attn_layer_norm,final_layer_norm}.*", "encoder.{}.image.{attn_norm,mlp_norm}.*"),
    (ENC + "deformable_layer.fc{1,2}.*",               "encoder.{}.image.mlp.fc{1,2}.*"),
    (DEC + "layers.{}.{self_attn,encoder_attn_text}.{query,key,value,out_proj}.*",
     "decoder.{}.{self_attn,text_attn}.{wq,wk,wv,wo}.*"),
    (DEC + "layers.{}.encoder_attn.{sampling_offsets,attention_weights,value_proj,output_proj}.*",
     "decoder.{}.attn.{offsets,weights,wv,wo}.*"),
    (DEC + "layers.{}.{self_attn,encoder_attn,encoder_attn_text,final}_layer_norm.*",
     "decoder.{}.{self_norm,attn_norm,text_norm,mlp_norm}.*"),
    (DEC + "layers.{}.fc{1,2}.*",                      "decoder.{}.mlp.fc{1,2}.*"),
    (DEC + "layer_norm.*",                             "norm.*"),
    (DEC + "reference_points_head.layers.{0,1}.*",     "query_pos.{0,2}.*"),
    (DEC + "bbox_embed.*",                             None),
    ("bbox_embed.0.layers.{0,1,2}.*",                           "box.{0,2,4}.*"),
    ("bbox_embed.1.*",                                          None),
]


def peer_locator(seed, window, n_point, n_head, dim):
    """A random transformers GroundingDINO and ours with its weights."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    torch.manual_seed(seed)
    swin = transformers.SwinConfig(embed_dim=16, depths=[1, 2, 2, 1], num_heads=[1, 2, 2, 4], window_size=window,
                                   out_features=["stage2", "stage3", "stage4"])
    bert = transformers.BertConfig(vocab_size=1100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                   intermediate_size=48, max_position_embeddings=64)
    theirs = transformers.GroundingDinoForObjectDetection(transformers.GroundingDinoConfig(
        backbone_config=swin, text_config=bert, d_model=dim, encoder_layers=2, decoder_layers=2, num_queries=12,
        encoder_attention_heads=n_head, decoder_attention_heads=n_head, encoder_ffn_dim=96, decoder_ffn_dim=96,
        encoder_n_points=n_point, decoder_n_points=n_point, max_text_len=32)).eval()
    for name, p in theirs.named_parameters():
        if "text_backbone" not in name:
            torch.nn.init.normal_(p, std=0.3 if p.ndim < 2 else p[0].numel() ** -0.5)
            p.data += 1 if "norm.weight" in name else 0
    swin = SwinConfig(16, (1, 2, 2, 1), (1, 2, 2, 4), window)
    ours = locate.Locator(locate.LocatorConfig(swin, dim, 2, 2, n_head, 96, 12, n_point))
    state = cw.rename(theirs.state_dict(), PEER_DINO)
    for key in [k for k in state if ".wq." in k]:
        parts = [state.pop(key.replace(".wq.", f".{w}.")) for w in ("wq", "wk", "wv")]
        state[key.replace(".wq.", ".wqkv.")] = torch.cat(parts)
    return theirs, fill(ours, state, "")


@pytest.mark.parametrize("sizes", [(3, 4, 4, 64), (2, 2, 6, 96), (4, 1, 2, 32)])
def test_ground_boxes_and_logits_equal_transformers(sizes, monkeypatch):
    monkeypatch.setattr(locate, "LOGIT_EPS", 1e-5)              # theirs; GroundingDINO itself and ChatterBox have 1e-3
    theirs, ours = peer_locator(sum(sizes), *sizes)
    ids = torch.tensor([[101, 7, 8, 9, 1012, 5, 1012, 102], [101, 3, 1012, 6, 1012, 102, 0, 0]])
    phrase = torch.tensor([[0, 1, 1, 1, 1, 2, 2, 3], [0, 1, 1, 2, 2, 3, -1, -1]])
    image, pad, text = torch.randn(2, 3, 136, 170), torch.zeros(2, 136, 170, dtype=torch.bool), []
    pad[1, 130:], pad[1, :, 140:] = True, True
    theirs.model.text_projection.register_forward_hook(lambda module, args, out: text.append(out))
    with torch.no_grad():
        want = theirs(image, ids, attention_mask=(ids > 0).long(), pixel_mask=(~pad).long())
        got, logits = ours(image, text[0], pad, phrase)[-1], want.logits[..., :8]
    assert torch.equal(logits.isinf(), got.logits.isinf())
    for a, b in ((want.pred_boxes, got.boxes_cxcywh), (logits.nan_to_num(neginf=0), got.logits.nan_to_num(neginf=0))):
        assert (a - b).abs().max() <= PARITY * a.abs().max()


@pytest.mark.parametrize("name", ["groundingdino_swinb_cogcoor", "chatterbox_stage2"])
def test_ground_tables_take_every_public_key(name):
    """By exactly one row each, to the names and shapes of full-size models."""
    manifest = json.loads(need(MANIFESTS / f"{name}.json", name).read_text())
    table = cw.CHATTERBOX if name.startswith("chatterbox") else cw.GROUNDING_DINO
    state = {k: tuple(shape) for k, (shape, _) in cw.rename(manifest, table).items()}
    llm = M.replace(M.PRESETS["llama-2-13b"].llm, vocab_size=32005, lora_rank=16, lora_targets="wq wv")
    with torch.device("meta"):
        parts = {cw.LOCATOR: locate.Locator(locate.LocatorConfig())}
        if table is cw.CHATTERBOX:
            parts |= {"readers.region.": locate.RegionEncoder(locate.RegionConfig()), "llm.": M.LLM(llm),
                      "readers.clip.projector.": torch.nn.Linear(1024, 5120),
                      "writers.vg.query.": locate.mlp(5120, 5120, 256)}
    assert state == {prefix + k: tuple(x.shape) for prefix, part in parts.items() for k, x in part.state_dict().items()}


def test_ground_deepspeed_file_gives_its_tensors_only(tmp_path, monkeypatch):
    """Objects of the trainer lie in it too; they are neither built nor a reason to refuse."""
    deepspeed, file = ModuleType("deepspeed"), tmp_path / "mp_rank_00_model_states.pt"
    deepspeed.Settings = type("Settings", (), {"__module__": "deepspeed"})
    deepspeed.Stage = enum.IntEnum("Stage", {"gradients": 2}, module="deepspeed")
    tensors = {"text_hidden_fcs.0.0.weight": torch.randn(3, 4).half(), "tgt_align.bias": torch.arange(5)}
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "deepspeed", deepspeed)
        settings = deepspeed.Settings()
        settings.stage = deepspeed.Stage.gradients
        torch.save({"module": tensors, "ds_config": settings, "global_steps": 7}, file)
    torch.save({"optimizer_state_dict": {"step": 7}}, tmp_path / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    found = cw.open_files(tmp_path)                                     # the folder that DeepSpeed wrote, or the file
    assert found.keys() == cw.open_files(file).keys() == tensors.keys() and all(torch.equal(found[k].read(), x) for k, x in tensors.items())
    torch.save({"module": tensors, "odd": Thing(x=1)}, file)            # any other class is still refused
    with pytest.raises(cw.Refused, match="SimpleNamespace"):
        cw.open_files(file)


def roi_align_by_hand(x, box, cells, samples):
    """RoIAlign of one box, sample by sample."""
    C, H, W = x.shape
    out, sides = torch.zeros(C, cells, cells), torch.tensor([W, H, W, H])
    x1, y1, x2, y2 = (box * sides - 0.5).tolist()
    for i, j in itertools.product(range(cells * samples), repeat=2):
        v, u = y1 + (y2 - y1) * (i + 0.5) / (cells * samples), x1 + (x2 - x1) * (j + 0.5) / (cells * samples)
        if -1 <= v <= H and -1 <= u <= W:
            v, u = min(max(v, 0), H - 1), min(max(u, 0), W - 1)
            for a, b in itertools.product({int(v), min(int(v) + 1, H - 1)}, {int(u), min(int(u) + 1, W - 1)}):
                out[:, i // samples, j // samples] += x[:, a, b] * (1 - abs(v - a)) * (1 - abs(u - b)) / samples ** 2
    return out


def test_ground_roi_align_equals_its_definition():
    for seed in range(12):
        torch.manual_seed(seed)
        x, boxes = torch.randn(2, 3 + seed, 9), torch.rand(3, 4) * 1.6 - 0.3                # some leave the map
        want = torch.stack([roi_align_by_hand(x, box, 3, 2) for box in boxes])
        assert torch.allclose(locate.roi_align(x, boxes, 3), want, atol=1e-5), seed


def test_ground_regions_know_their_image():
    torch.manual_seed(0)
    region = locate.RegionEncoder(locate.RegionConfig(dim=16, out_dim=8, box_dim=8, groups=4, pool=3))
    levels, boxes = [torch.randn(2, 16, 16) for _ in range(4)], [torch.rand(2, 4), torch.rand(1, 4)]
    both = region(levels, boxes)
    alone = [region([x[i:i + 1] for x in levels], [boxes[i]]) for i in range(2)]
    assert torch.allclose(both, torch.cat(alone), atol=1e-5) and both.shape == (3, 8)


def test_ground_assignment_equals_best_permutation():
    r = np.random.RandomState(0)
    for case in range(200):
        N, extra = r.randint(0, 5), r.randint(0, 4)
        cost = r.randn(N + extra, N) if case % 2 else r.randint(0, 4, (N + extra, N))       # with ties
        got = locate.assign(cost)
        best = min(sum(cost[q, n] for n, q in enumerate(rows)) for rows in itertools.permutations(range(N + extra), N))
        assert len(set(got)) == N and abs(sum(cost[q, n] for n, q in enumerate(got)) - best) < 1e-9


def test_ground_assignment_refuses_what_has_no_answer():
    for cost in (np.zeros((2, 3)), np.full((3, 2), np.nan)):
        with pytest.raises(ValueError, match="cannot match"):
            locate.assign(cost)


def test_ground_box_measures_equal_counted_pixels():
    r = torch.Generator().manual_seed(0)
    low = torch.randint(0, 12, (20, 2), generator=r)
    boxes = torch.cat([low, low + torch.randint(1, 9, (20, 2), generator=r)], dim=1)
    y, x = torch.meshgrid(torch.arange(24), torch.arange(24), indexing="ij")
    a, b, c, d = boxes[:, :, None, None].unbind(1)
    cover = ((x >= a) & (x < c) & (y >= b) & (y < d)).flatten(1).double()
    inter, union = cover @ cover.T, 24 * 24 - (1 - cover) @ (1 - cover).T
    hull = (torch.maximum(boxes[:, None, 2:], boxes[:, 2:]) - torch.minimum(boxes[:, None, :2], boxes[:, :2])).prod(-1)
    boxes = boxes.double()
    assert torch.allclose(locate.iou(boxes[:, None], boxes), inter / union, atol=1e-5)
    assert torch.allclose(locate.giou(boxes[:, None], boxes), inter / union - (hull - union) / hull, atol=1e-5)
    assert torch.equal(locate.area(boxes), cover.sum(1))
    assert torch.equal(locate.to_xyxy(to_cxcywh(boxes)), boxes)


def test_ground_extremes_are_bounded():
    """Of two hopeless scores the better box wins, however far apart they are; a box at the border can still move."""
    want = torch.tensor([[0.5, 0.5, 0.2, 0.2]])
    boxes, logits = torch.cat([want, want + 0.02]), torch.tensor([[-40.0], [-30.0]])
    assert locate.match(boxes, logits, want).tolist() == [0]
    edge = locate.inverse_sigmoid(torch.tensor([0.0, 0.5, 1.0])).sigmoid()
    assert torch.allclose(edge, torch.tensor([0.001, 0.5, 0.999]), atol=2e-6)


def test_ground_several_boxes_are_matched_together():
    """A perfect prediction in another order costs nothing but its confidence; every image counts its own targets."""
    torch.manual_seed(0)
    want = [torch.rand(3, 4) * 0.2 + 0.3, torch.rand(1, 4) * 0.2 + 0.3, torch.zeros(0, 4)]
    boxes, logits = torch.rand(3, 5, 4) * 0.1 + 0.8, torch.full((3, 5, 2), -9.0)
    for i, target in enumerate(want):
        rows = torch.randperm(5)[:len(target)]
        boxes[i, rows], logits[i, rows] = target, 9.0
    losses = locate.set_losses(locate.Prediction(boxes, logits), want)
    assert losses["l1"] == 0 and losses["giou"] < 1e-4 and losses["focal"] < 1e-8
    nothing = locate.set_losses(locate.Prediction(boxes, logits.requires_grad_()), [x[:0] for x in want])
    assert all(x == 0 for x in nothing.values()) and nothing["focal"].requires_grad


# ---- Generate

PARTS = "unet", "vae", "text_encoder", "vocoder"
ONE_GREY = 1.01 / 255                   # rounding of a value at a boundary


def fill_painter(files, states):
    """(kind, Painter) of public configs {part: values} and state dicts {part: state}."""
    painter = G.Painter(cw.painter_config(files, "test")).eval()
    state = {f"{part}.{k}": v for part, state in states.items() for k, v in state.items()}
    painter.load_state_dict(cw.rename(state, cw.PAINTER))
    return painter.cfg.kind, painter


def golden_painter(meta, weights):
    files = {part: meta[part] for part in (*PARTS, "scheduler") if part in meta}
    return fill_painter(files | {"tokenizer": meta.get("tokenizer", meta)}, weights)


def golden_run(name, embeds, noise):
    """A fixture's pipeline run: meta, tensors, kind, painter and what passed through it, clips as (B, C, F, H, W)."""
    meta, weights, t = read_golden(name)
    kind, painter = golden_painter(meta, weights)
    run, latents, decoded = Thing(calls=[]), [], []
    painter.unet.register_forward_hook(lambda m, args, out: run.calls.append((args[0], args[1], out)))
    scale = painter.cfg.vae.scale
    painter.vae.post_quant_conv.register_forward_hook(lambda m, args, out: latents.append(args[0] * scale))
    painter.vae.decoder.register_forward_hook(lambda m, args, out: decoded.append(out))
    size = meta.get("audio_length_in_s") or tuple(meta[k] for k in ("num_frames", "height", "width") if k in meta)
    how, B = dict(steps=meta["steps"], guidance=meta["guidance_scale"], noise=t[noise]), len(t[embeds])
    run.media = G.DRAW[kind](painter, t[embeds], size, **how)
    last, run.decoded = (torch.cat(x) for x in (latents, decoded))
    if kind == "vid":
        last, run.decoded = (x.unflatten(0, (B, -1)).transpose(1, 2) for x in (last, run.decoded))
    run.latents = torch.stack([*(x[:B] for x, *_ in run.calls[1:]), last])                  # after each call
    return meta, t, kind, painter, run


@pytest.mark.parametrize("name", ["sd15", "zeroscope", "audioldm"])
def test_golden_diffusion_pipelines(name):
    meta, t, kind, painter, run = golden_run(f"diffusion/{name}", "in.prompt_embeds", "in.latents")
    assert [step for _, step, _ in run.calls] == t["out.timesteps"].tolist()
    guidance, pairs = meta["guidance_scale"], (out.chunk(2) for *_, out in run.calls)
    noise = torch.stack([away + guidance * (towards - away) for away, towards in pairs])
    for key, x in (("out.noise_pred_guided", noise), ("out.latents_per_step", run.latents)):
        close(meta, t, key, x.transpose(2, 3) if kind == "vid" else x)                      # frames first
    if kind == "img":
        close(meta, t, "out.image_float", (run.decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1))
        close(meta, t, "out.image_uint8", run.media.float(), ONE_GREY)
    if kind == "vid":
        close(meta, t, "out.video_float", run.decoded)
        close(meta, t, "out.frames_uint8", run.media.float(), ONE_GREY)
    if kind == "aud":
        close(meta, t, "out.mel", run.decoded)
        close(meta, t, "out.waveform_full", painter.vocoder(run.decoded[:, 0]))
        close(meta, t, "out.waveform", run.media)


@pytest.mark.parametrize("name", ["image", "video", "audio"])
def test_golden_nextgpt_pipelines(name):
    meta, t, kind, painter, run = golden_run(f"nextgpt/pipe_{name}", "prompt_embeds", "latents_in")
    if "caption_ids" in t:
        close(meta, t, "caption_embeds", painter.text(t["caption_ids"]))
    close(meta, t, "negative_prompt_embeds", painter.unprompted(t["prompt_embeds"]))
    assert [step for _, step, _ in run.calls] == meta["unet_timesteps"]
    close(meta, t, "noise_pred", torch.stack([out for *_, out in run.calls]))
    close(meta, t, "latents_per_call", run.latents[-len(meta["callback_timesteps"]):])
    close(meta, t, "latents_out", run.latents[-1])
    if kind == "img":
        close(meta, t, "image", (run.decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1))
    if kind == "vid":
        close(meta, t, "video", run.decoded)
        close(meta, t, "frames_uint8", run.media.float(), ONE_GREY)
    if kind == "aud":
        close(meta, t, "mel", run.decoded)
        close(meta, t, "waveform_full", painter.vocoder(run.decoded[:, 0]))
        close(meta, t, "audio", run.media)


@pytest.mark.parametrize("name", ["sd15", "zeroscope", "audioldm"])
def test_golden_diffusion_parts(name):
    meta, weights, t = read_golden(f"diffusion/{name}")
    kind, painter = golden_painter(meta, weights)
    unet, vae, scale = painter.unet, painter.vae, painter.cfg.vae.scale
    with torch.no_grad():
        if kind == "aud":
            assert torch.equal(t["in.prompt_ids"] != 1, t["in.prompt_mask"].bool())
            close(meta, t, "out.prompt_embeds_normalized", painter.text(t["in.prompt_ids"]))
            told = {"classes": t["unet1.class_labels"]}
        else:
            close(meta, t, "out.prompt_hidden", painter.text(t["in.prompt_ids"]))
            told = {"text": unet.read(t["unet1.context"])}
        close(meta, t, "out.uncond_embeds", painter.unprompted(t["in.prompt_embeds"]))
        close(meta, t, "unet1.out", unet(t["unet1.sample"], t["unet1.timestep"], **told))
        if "vae1.moments" in t:
            close(meta, t, "vae1.moments", torch.cat(vae.moments(t["vae1.mel" if kind == "aud" else "vae1.image"]), 1))
        if "vae1.decoded" in t:
            close(meta, t, "vae1.decoded", vae.decode(t["vae1.latent"] * scale))


@pytest.mark.parametrize("size", ["tiny", pytest.param("full", marks=pytest.mark.slow)])
def test_golden_nextgpt_textfc(size):
    """The projection learned by NExT-GPT, under its names in a checkpoint."""
    meta, weights, t = read_golden(f"nextgpt/textfc_{size}")
    for kind, suffix in {"image": "", "video": "_video", "audio": "_audio"}.items():
        m, state = meta["modalities"][kind], weights.pop(kind)
        names = [("hidden", "dim"), ("nhead", "n_head"), ("enc_layers", "n_layer"), ("ff", "mlp_dim")]
        llm_dim = state["fc.weight"].shape[1]
        cfg = G.ProjectionConfig(llm_dim, m["num_input_tokens"], m["num_output_tokens"], m["out_dim"],
                                 **{ours: meta[theirs] for theirs, ours in names if theirs in meta})
        state = cw.rename({f"gen_text_hidden_fcs{suffix}.0.{k}": v for k, v in state.items()}, cw.OUTPUT_PROJECTION)
        with torch.device("meta"):
            proj = G.OutputProjection(cfg)
        proj.load_state_dict({k.split(".proj.")[1]: v for k, v in state.items()}, assign=True)
        with torch.no_grad():
            close(meta, t, f"{kind}.y", proj(t[f"{kind}.x"], t[f"{kind}.input_embs"]))


def put_merges(meta, name, folder):
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *meta[name]["merges"], ""]), encoding="utf-8")
    (folder / "vocab.json").write_text(json.dumps(meta[name]["vocab"]), encoding="utf-8")
    return folder


def test_golden_diffusion_tokenizers(tmp_path):
    meta, _, _ = read_golden("diffusion/tokenizers")
    for name in ("clip", "clip_pad_bang"):
        tok = data.CLIPTokenizer(put_merges(meta, "clip", tmp_path) / "merges.txt", meta[name]["pad_token"])
        length = meta["clip"]["model_max_length"]
        assert [tok(text, length).tolist() for text in meta["strings"]] == meta[name]["ids"]
    tok, length = data.RobertaTokenizer(put_merges(meta, "roberta", tmp_path)), meta["roberta"]["model_max_length"]
    cfg = replace(paint.PAINTERS["audio"].text, max_len=length + 2, start=0, end=2, pad=1)
    rows = paint.caption_ids(cfg, tok.encode, meta["strings"])
    assert rows.tolist() == meta["roberta"]["ids"] and (rows != 1).int().tolist() == meta["roberta"]["mask"]


@pytest.mark.parametrize("kind, name, of", (("image", "clip", "clip"), ("video", "clip_pad_bang", "clip"), ("audio", "roberta", "roberta")))
def test_golden_diffusion_captions_embedded(kind, name, of, tmp_path):
    """paint.py --embed writes what the tower makes of the original tokenizer's ids; of long captions pictures keep the end."""
    meta, _, _ = read_golden("diffusion/tokenizers")
    ids, n, sound = torch.tensor(meta[name]["ids"]), len(meta[of]["vocab"]), kind == "audio"
    start, end, pad = (0, 2, 1) if sound else (n - 2, n - 1, 0 if kind == "video" else n - 1)
    text = replace(paint.PAINTERS[kind].text, vocab_size=n, max_len=ids.shape[1] + 2 * sound, start=start, end=end, pad=pad)
    painter = G.Painter(replace(paint.PAINTERS[kind], text=text))
    M.save(painter, tmp_path / "painter")
    rows = [{"caption": caption, f"{kind}_name": f"{i}.x"} for i, caption in enumerate(meta["strings"])]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    with pytest.raises(FileNotFoundError, match="painter/merges.txt is missing; copy it"):
        paint.main([f"{tmp_path}/pairs.json", "--embed", f"{tmp_path}/painter"])
    put_merges(meta, of, tmp_path / "painter")
    paint.main([f"{tmp_path}/pairs.json", "--embed", f"{tmp_path}/painter"])
    if kind == "image":
        tok = data.CLIPTokenizer(tmp_path / "painter/merges.txt", meta[name]["pad_token"])
        for row, caption in zip(ids, meta["strings"]):
            row[1:-1] = torch.tensor(tok.encode(caption)[2 - len(row):] + [end] * len(row))[:len(row) - 2]
    with torch.no_grad():
        for i, want in enumerate(painter.text(ids)):
            got = datasets.read_embedding(tmp_path / f"embed/{i}.x.npy")
            assert got.shape == want.shape and (got - want).abs().max() < 2e-3 * want.abs().max()      # kept in 16 bits


def test_generate_clip_vocabulary_of_hub_folders():
    """Ids of known texts in the real vocabulary, which pads and cuts in two ways."""
    path = need(CLIP_BPE, "CLIP_BPE")
    sd, zeroscope = data.CLIPTokenizer(path, "<|endoftext|>"), data.CLIPTokenizer(path, "!")
    ids = {"a photo of a cat": [320, 1125, 539, 320, 2368],
           "it's 3.14, don't!": [585, 568, 274, 269, 272, 275, 267, 847, 713, 256],
           "café 你好": [15304, 47466, 254, 29290, 377]}
    for text, want in ids.items():
        assert sd(text).tolist() == [49406, *want] + [49407] * (76 - len(want))
    assert zeroscope("a!?").tolist() == [49406, 320, 0, 286, 49407] + [0] * 72


def peer_parts(d, tr, kind, r):
    """Random tiny parts of a decoder, {name: module of diffusers or transformers}. r: random.Random that draws sizes."""
    n, dims = r.choice((2, 3)), "3D" if kind == "vid" else "2D"
    attends = [kind != "aud"] + [True] * (n - 2) + [kind == "aud"]
    widths, groups = ([r.choice((32, 64)) for _ in range(n)], 32) if dims == "3D" else (r.choices((16, 24, 32), k=n), 8)
    unet = dict(block_out_channels=widths, layers_per_block=r.choice((1, 2)), norm_num_groups=groups,
                attention_head_dim=r.choice((2, 4, 8)),
                down_block_types=["CrossAttn" * a + "DownBlock" + dims for a in attends], cross_attention_dim=16,
                up_block_types=["CrossAttn" * a + "UpBlock" + dims for a in attends[::-1]])
    vae = dict(block_out_channels=[r.choice((16, 32)) for _ in range(2 + (kind == "aud"))], norm_num_groups=8,
               layers_per_block=r.choice((1, 2)), scaling_factor=r.choice((0.18215, 0.9)))
    vae |= {f"{way}_block_types": [f"{way.title()}{c}coderBlock2D"] * len(vae["block_out_channels"])
            for way, c in (("down", "En"), ("up", "De"))}
    text = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=r.choice((1, 2, 4)),
                vocab_size=50)
    if kind != "aud":
        text = tr.CLIPTextModel(tr.CLIPTextConfig(hidden_act="gelu" if kind == "vid" else "quick_gelu", **text))
        make = d.UNet3DConditionModel if kind == "vid" else d.UNet2DConditionModel
        return {"unet": make(**unet), "vae": d.AutoencoderKL(**vae), "text_encoder": text}
    unet |= dict(in_channels=8, out_channels=8, cross_attention_dim=widths, class_embed_type="simple_projection",
                 class_embeddings_concat=True, projection_class_embeddings_input_dim=12)
    voice = tr.SpeechT5HifiGanConfig(model_in_dim=16, upsample_initial_channel=32, upsample_rates=[5, 4, 2, 2, 2],
                                     upsample_kernel_sizes=[16, 16, 8, 4, 4], normalize_before=False)
    text = tr.ClapTextConfig(projection_dim=12, max_position_embeddings=40, **text)
    vae |= dict(in_channels=1, out_channels=1, latent_channels=8)
    return {"unet": d.UNet2DConditionModel(**unet), "vae": d.AutoencoderKL(**vae),
            "text_encoder": tr.ClapTextModelWithProjection(text), "vocoder": tr.SpeechT5HifiGan(voice)}


SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                set_alpha_to_one=False)


def peer(kind, seed):
    """(their pipeline, our Painter) of the same random tiny decoder."""
    d, tr = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    torch.manual_seed(seed)
    parts = {name: part.eval() for name, part in peer_parts(d, tr, kind, random.Random(seed)).items()}
    for p in (p for part in parts.values() for p in part.parameters()):
        p.data += torch.randn_like(p) * 0.05                    # some layers start as zero
    schedule = (d.PNDMScheduler(skip_prk_steps=True, **SCHEDULE) if kind == "img" else
                d.DDIMScheduler(clip_sample=False, **SCHEDULE))
    more = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False) if kind == "img" else {}
    pipe = {"img": d.StableDiffusionPipeline, "vid": d.TextToVideoSDPipeline, "aud": d.AudioLDMPipeline}[kind]
    pipe = pipe(tokenizer=None, scheduler=schedule, **parts, **more)
    pipe.set_progress_bar_config(disable=True)
    files = {name: part.config.to_dict() if hasattr(part.config, "to_dict") else dict(part.config)
             for name, part in (parts | {"scheduler": schedule}).items()}
    return pipe, fill_painter(files, {name: part.state_dict() for name, part in parts.items()})[1]


@pytest.mark.parametrize("kind", G.DRAW)
def test_generate_pipelines_equal_diffusers(kind):
    """Five steps from the same noise, two prompts at once, end in the same media."""
    shape, size, theirs = {"img": ((4, 4, 8), (8, 16), dict(height=8, width=16)),
                           "vid": ((4, 3, 4, 8), (3, 8, 16), dict(height=8, width=16, num_frames=3)),
                           "aud": ((8, 9, 4), 0.35, dict(audio_length_in_s=0.35))}[kind]
    for seed in range(1 if kind == "vid" else 2):
        pipe, painter = peer(kind, seed)
        noise = torch.randn(2, *shape)
        prompt, negative = (torch.randn(2, 12) if kind == "aud" else torch.randn(2, 7, 16) for _ in range(2))
        given = dict(prompt_embeds=prompt, negative_prompt_embeds=negative, latents=noise, num_inference_steps=5)
        given |= theirs
        how = dict(steps=5, guidance=7.5 if kind != "aud" else 2.5, negative=negative, noise=noise)
        with torch.no_grad():
            got = G.DRAW[kind](painter, prompt, size, **how).float()
            want = torch.as_tensor(pipe(output_type="np", guidance_scale=how["guidance"], **given)[0])
            if kind == "aud":
                assert (got - want).abs().max() <= PARITY * want.abs().max()
                continue
            assert got.shape == want.shape and (got - want * 255).abs().max() <= 1.01
            got = G.denoise(painter, prompt, noise.shape, **how)
            want = pipe(output_type="latent", guidance_scale=how["guidance"], **given)[0]
            assert (got - want).abs().max() <= PARITY * want.abs().max()


@pytest.mark.parametrize("kind", G.DRAW)
def test_generate_text_towers_equal_transformers(kind):
    for seed in range(2):
        pipe, painter = peer(kind, seed)
        ids = torch.randint(3, 48, (3, 20))
        ids[:, 0], ids[1, 9:], ids[2, 2:] = painter.cfg.text.start, painter.cfg.text.pad, painter.cfg.text.pad
        with torch.no_grad():
            want = pipe.text_encoder(ids, attention_mask=(ids != 1).long() if kind == "aud" else None)[0]
            want = want / want.norm(dim=-1, keepdim=True) if kind == "aud" else want
            assert (painter.text(ids) - want).abs().max() <= PARITY * want.abs().max()


def test_generate_vae_encodes_like_diffusers():
    pipe, painter = peer("img", 0)
    image, noise = torch.randn(1, 3, 16, 24), torch.randn(1, 4, 8, 12)
    with torch.no_grad():
        moments = pipe.vae.encode(image).latent_dist
        want = (moments.mean + moments.std * noise) * painter.cfg.vae.scale
        assert (painter.vae.encode(image, noise) - want).abs().max() <= PARITY * want.abs().max()


@pytest.mark.parametrize("name", G.SCHEDULERS)
def test_generate_schedulers_equal_diffusers(name):
    d = pytest.importorskip("diffusers")
    more = dict(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear")
    peers = {"plms": d.PNDMScheduler(skip_prk_steps=True, steps_offset=1, **more),
             "dpm": d.DPMSolverMultistepScheduler(**more),
             "ddim": d.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1, **more)}
    plan, update = G.SCHEDULERS[name]
    for n in range(1, 100):
        peers[name].set_timesteps(n)
        assert plan(n) == peers[name].timesteps.tolist(), n
    for n in (1, 2, 3, 4, 7, 20, 50):
        peers[name].set_timesteps(n)
        times, signal, past = plan(n), G.signal_levels(0.0015, 0.0195), []
        got = want = torch.randn(2, 3, generator=torch.Generator().manual_seed(n))
        for k, t in enumerate(times):
            past = [(got, torch.sin(got + t)), *past[:4]]
            got = update(k, past, times, signal)
            want = peers[name].step(torch.sin(want + t), t, want).prev_sample
            assert (got - want).abs().max() <= PARITY * want.abs().max(), (n, k)


def test_generate_signal_levels_are_the_published():
    for betas, known in (((0.00085, 0.012), {0: .99914998, 1: .99829602, 501: .27499884, 981: .0057755}),
                         ((0.0015, 0.0195), {0: .99849999, 1: .99699444, 501: .11400476, 981: .00020196})):
        for t, level in known.items():
            assert abs(G.signal_levels(*betas)[t] / level - 1) < 3e-5            # as many digits as are given


TINY_PAINTER = G.PainterConfig(
    G.UNetConfig(widths=(8, 16), n_head=(2, 2), attends=(True, False), n_resnet=1, context_dim=8, groups=4),
    G.VAEConfig(widths=(8, 8), n_resnet=1, groups=4), text=None,
    proj=G.ProjectionConfig(llm_dim=12, n_signal=3, n_query=5, out_dim=8, dim=16, n_layer=1, n_head=2, mlp_dim=16))


def test_generate_prompts_do_not_mix_and_seeds_repeat():
    """A batch equals its rows drawn alone, a seed gives one picture, the negative prompt acts through guidance only."""
    torch.manual_seed(0)
    painter, prompts = G.Painter(TINY_PAINTER).eval(), torch.randn(2, 5, 8)
    negative, noise, how = torch.randn(1, 5, 8), torch.randn(2, 4, 5, 6), dict(steps=3, size=(10, 12))
    both = G.draw_image(painter, prompts, negative=negative, noise=noise, **how)
    for i in range(2):
        alone = G.draw_image(painter, prompts[i:i + 1], negative=negative, noise=noise[i:i + 1], **how)
        assert (alone[0].int() - both[i].int()).abs().max() <= 1
    draw = [G.draw_image(painter, prompts, negative=negative, seed=seed, **how) for seed in (3, 3, 4)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
    draw = [G.draw_image(painter, prompts, negative=x, seed=3, guidance=1, **how) for x in (negative, None)]
    assert torch.equal(*draw)


@pytest.mark.parametrize("video", (False, True))
def test_generate_equals_in_any_layout(video):
    """Convolutions with channels innermost in memory compute the same, and leave what they compute so."""
    torch.manual_seed(0)
    cfg = M.replace(TINY_PAINTER.unet, video=video)
    models, x = (G.UNet(cfg).double(), G.VAE(TINY_PAINTER.vae).double()), torch.randn(2, 4, *[3] * video, 8, 6).double()
    text = models[0].read(torch.randn(2, 5, cfg.context_dim).double())
    run = (lambda: models[0](x, 7, text=text)), (lambda: models[1].decode(x if x.ndim == 4 else x[:, :, 0]))
    want = [f() for f in run]
    weights = [p.clone() for m in models for p in m.parameters()]
    for m in models:
        assert G.channels_last(m) is m
    assert all(map(torch.equal, weights, (p for m in models for p in m.parameters())))
    got = [f() for f in run]
    assert all((a - b).abs().max() < 1e-10 for a, b in zip(want, got))
    assert got[1].is_contiguous(memory_format=torch.channels_last)


def test_generate_norms_are_exact_in_any_layout():
    """torch's own kernel for channels that lie innermost is not, where a mean is large beside what varies."""
    torch.manual_seed(0)
    norm = G.GroupNorm(4, 16)
    for far in (0, 10, 1000):
        x = torch.randn(2, 16, 5, 6) + far * torch.randn(16, 1, 1)
        want = torch.nn.functional.group_norm(x.double(), 4)
        for layout in (torch.contiguous_format, torch.channels_last):
            assert (norm(x.contiguous(memory_format=layout)) - want).abs().max() < 1e-5 * (1 + far)


def test_generate_prompts_are_read_once():
    """Keys and values of a prompt are made once per picture, not once per step."""
    painter, seen = G.Painter(TINY_PAINTER), []
    for m in painter.unet.modules():
        if isinstance(m, G.Attention) and m.context_dim:
            m.to_k.register_forward_hook(lambda m, args, out: seen.append(m))
    G.draw_image(painter, torch.zeros(1, 5, 8), negative=torch.zeros(1, 5, 8), steps=3, size=(8, 8))
    assert len(seen) == len(set(seen)) > 0


def test_generate_painter_draws_what_signal_tokens_say():
    torch.manual_seed(0)
    painter, h, embeds = G.Painter(TINY_PAINTER).eval(), torch.randn(1, 3, 12), torch.randn(1, 3, 12)
    how = dict(negative=torch.zeros(1, 5, 8), seed=1, steps=2, size=(8, 8))
    assert torch.equal(painter(h, embeds, **how), G.draw_image(painter, painter.proj(h, embeds), **how))


@pytest.mark.parametrize("clean", (False, True))
def test_generate_patches_are_painted_exactly_by_a_network_that_knows(clean, monkeypatch):
    """Whether it tells the noise or the clean picture. Patches lose nothing."""
    cfg = replace(TINY_PAINTER, vae=G.VAEConfig(patch=2, scale=0.7), unet=replace(TINY_PAINTER.unet, channels=12), clean=clean,
                  scheduler="dpm")
    painter, picture, a = G.Painter(cfg), torch.rand(1, 3, 8, 12) * 2 - 1, G.signal_levels(cfg.beta_start, cfg.beta_end)
    x = painter.vae.encode(picture)
    assert x.shape == (1, 12, 4, 6) and (painter.vae.decode(x) - picture).abs().max() < 1e-6
    monkeypatch.setattr(G.UNet, "forward", lambda self, z, t, text: x if clean else (z - a[t].sqrt() * x) / (1 - a[t]).sqrt())
    made = G.draw_image(painter, torch.zeros(1, 5, 8), (8, 12), guidance=1, steps=5, seed=0)
    assert ((made.permute(0, 3, 1, 2) / 127.5 - 1) - picture).abs().max() < 0.01


def test_generate_configs_that_mean_something_else_are_refused():
    meta, _, _ = read_golden("diffusion/sd15")
    files = {part: meta[part] for part in ("unet", "vae", "text_encoder", "scheduler")}
    assert cw.painter_config(files, "here").scheduler == "plms"
    for part, field, value in (("scheduler", "prediction_type", "v_prediction"), ("unet", "act_fn", "gelu"),
                               ("text_encoder", "hidden_act", "relu"), ("unet", "use_linear_projection", True)):
        with pytest.raises(cw.Refused, match=f"here: {part}: {field} {value!r} is not supported"):
            cw.painter_config(files | {part: meta[part] | {field: value}}, "here")


def manifest(name):
    """{key: shape} of a published checkpoint."""
    path = need(Path(os.environ.get("MANIFESTS", SHARED / "manifests")) / f"{name}.json", name)
    return {key: tuple(shape) for key, (shape, dtype) in json.loads(path.read_text()).items()}


def test_generate_refuses():
    painter, prompt = G.Painter(TINY_PAINTER), torch.zeros(1, 5, 8)
    cases = {"1 to 999": dict(steps=1000), "multiples of 2": dict(size=(8, 7)), "no text tower": {},
             "this size needs": dict(noise=torch.zeros(1, 4, 3, 3))}
    for what, how in cases.items():
        with pytest.raises(ValueError, match=what):
            G.draw_image(painter, prompt, **{"size": (8, 8)} | how)


PUBLIC_PAINTERS = {
    "img": (G.SD15, {"unet": "sd15_unet", "vae": "sd15_{}", "text_encoder": "sd15_text"}),
    "vid": (G.ZEROSCOPE, {"unet": "zeroscope_unet", "vae": "zeroscope_{}", "text_encoder": "zeroscope_text"}),
    "aud": (G.AUDIOLDM, {"unet": "audioldm_l_unet", "vae": "audioldm_{}", "text_encoder": "audioldm_clap_text",
                         "vocoder": "audioldm_vocoder"})}


@pytest.mark.parametrize("vae", ["vae", "vae_newkeys"])
@pytest.mark.parametrize("kind", PUBLIC_PAINTERS)
def test_generate_public_keys(kind, vae):
    """Each key of a published decoder matches one row and has a place of its shape in ours; none of ours stays empty."""
    cfg, names = PUBLIC_PAINTERS[kind]
    theirs = {f"{part}.{k}": shape for part, name in names.items() for k, shape in manifest(name.format(vae)).items()}
    delta = {k: shape for k, shape in manifest("nextgpt_delta_stage12").items() if k.startswith("gen_text_hidden_fcs")}
    proj = cw.rename(delta, cw.OUTPUT_PROJECTION)
    got = cw.rename(theirs, cw.PAINTER) | {k.removeprefix(f"writers.{kind}."): shape for k, shape in proj.items()
                                           if k.startswith(f"writers.{kind}.")}
    with torch.device("meta"):
        assert got == {k: tuple(x.shape) for k, x in G.Painter(cfg).state_dict().items()}


# ---- Model

def golden_llm(c, **more):
    more = {"rope_theta": c.get("rope_theta", 10000.0)} | more
    return M.LLMConfig(dim=c["hidden_size"], n_layer=c["num_hidden_layers"], n_head=c["num_attention_heads"],
                       n_kv_head=c.get("num_key_value_heads", c["num_attention_heads"]), mlp_dim=c["intermediate_size"],
                       vocab_size=c["vocab_size"], norm_eps=c["rms_norm_eps"], max_len=c["max_position_embeddings"], **more)


def golden_chatbind(meta, weights):
    """The chat model of a ChatBind fixture, tower included."""
    c, ids = meta["config"], meta["config"]["special_token_ids"]
    small = c.get("imagebind") or c["imagebind_vision"]
    cfg = M.ModelConfig(llm=golden_llm(c["llama"]), imagebind=golden_towers(small),
                        reads=M.IMAGEBIND_READS, system="chatbind", eos=(ids.get("eos", 2),))
    model = M.Model(cfg)
    model.load_state_dict(cw.rename(weights["state_dict"], cw.CHATBIND) | cw.rename(weights["tower"], cw.IMAGEBIND))
    return model.eval()


def golden_embeds(model, c, ids, features):
    """Embeddings with features (M, n, C) of one medium per row written over that row's placeholders, as model.embed does."""
    x = model.llm.embed(ids)
    for row in range(len(ids)):
        where = (ids[row] == c["special_token_ids"]["im_patch"]).nonzero()[:, 0]
        if len(where):
            x = x.index_put((torch.full_like(where, row), where), features[row].expand(len(where), -1))
    return x


def test_golden_chatbind_forward():
    meta, weights, t = read_golden("chatbind/forward")
    model, c = golden_chatbind(meta, weights), meta["config"]
    for case, row in meta["cases"].items():
        ids, mask, labels = (t[f"in.{case}.{name}"] for name in ("input_ids", "attention_mask", "labels"))
        x = t[f"in.{case}.{row['modality']}"]
        repeat = max(row["repeat_feature_dim"], 1)
        close(meta, t, f"out.{case}.tower_tokens", model.readers.imagebind.tower(row["modality"], x).repeat(1, repeat, 1))
        features = model.read(row["modality"].replace("vision", "image"), x)
        close(meta, t, f"out.{case}.projected", features.repeat(1, repeat, 1))
        embeds = golden_embeds(model, c, ids, features)
        close(meta, t, f"out.{case}.inputs_embeds", embeds)
        h = model.llm(embeds)
        close(meta, t, f"out.{case}.logits", model.llm.lm_head(h), where=mask[..., None].bool())
        close(meta, t, f"out.{case}.loss", M.lm_loss(model.llm.lm_head, h, labels))
    ids = t["in.generate.input_ids"]
    embeds = golden_embeds(model, c, ids, model.read("image", t["in.image.vision"][:1]))
    new = list(M.generate(model, embeds, max_new_tokens=t["out.generate.ids"].shape[1] - ids.shape[1]))
    assert ids[0].tolist() + new == t["out.generate.ids"][0].tolist()


def golden_nextchat(meta, weights, t):
    """The chat model of a NExT-Chat fixture, and where its special tokens stand: (rows, columns) by name."""
    c, v, ids = meta["config"], meta["config"]["clip"], meta["config"]["special_token_ids"]
    clip = CLIPConfig(v["image_size"], v["patch_size"], v["hidden_size"], v["num_hidden_layers"], v["num_attention_heads"],
                      v["intermediate_size"], c["mm_vision_select_layer"])
    weights = weights | {key: t[f"state_dict.{key}"] for key in meta.get("stored_weights", ())}
    state, has_sam = cw.rename(weights, cw.NEXTCHAT), any(key.startswith("sam.") for key in weights)
    cfg = M.replace(M.NEXTCHAT, llm=golden_llm(c["llama"]), clip=clip, sam=golden_sam(c["sam"]) if has_sam else None,
                    projector_depth=c["mm_depth"], added_tokens={"<at>": ids["at"]}, bos=ids["bos"], eos=(ids["eos"],))
    model = M.Model(cfg)
    model.load_state_dict(state, strict=has_sam or "seg_prompt_mlp.0.weight" not in weights)
    return model.eval(), {name: (t["in.input_ids"] == id).nonzero().T for name, id in ids.items()}


def test_golden_nextchat_forward():
    meta, weights, t = read_golden("nextchat/forward")
    model, where = golden_nextchat(meta, weights, t)
    head, c, ids = model.writers.at, meta["config"], meta["config"]["special_token_ids"]
    close(meta, t, "out.clip_penultimate_patches", model.readers.clip.tower(t["in.images"]))
    close(meta, t, "out.projected", model.read("image", t["in.images"]))
    close(meta, t, "out.loc_embeds", model.read("box", t["in.loc_inputs"])[:, 0])
    media = {"image": t["in.images"], "box": t["in.loc_inputs"]}
    x = model.embed(t["in.input_ids"], media, {"image": where["im_patch"], "box": where["boxes"]})
    mask, h = t["in.attention_mask"][..., None], model.llm(x)
    close(meta, t, "out.inputs_embeds", x * mask)
    close(meta, t, "out.last_hidden", h * mask)
    close(meta, t, "out.logits", model.llm.lm_head(h) * mask)
    close(meta, t, "out.boxes", head(h[tuple(where["at"])]))
    seg = cw.rename({k: v for k, v in weights.items() if k.startswith("seg")}, cw.NEXTCHAT)
    mlp = locate.seg_prompt_mlp(c["llama"]["hidden_size"], c["sam"]["prompt_dim"])
    mlp.load_state_dict({k.removeprefix("writers.at.seg_prompt_mlp."): v for k, v in seg.items()})
    close(meta, t, "out.seg_prompts", mlp(h[tuple(where["at"])]).unflatten(-1, (c["num_seg_prompt_tokens"], -1)))
    rows = torch.cat([t["rec.input_ids"], torch.tensor(meta["rec_suffix"]).expand(len(t["rec.input_ids"]), -1)], dim=1)
    keep = torch.cat([t["rec.attention_mask"].bool(), torch.ones_like(rows[:, -len(meta["rec_suffix"]):]).bool()], dim=1)
    x = model.embed(rows, {"image": t["rec.images"]}, {"image": (rows == ids["im_patch"]).nonzero().T})
    at = len(rows[0]) - len(meta["rec_suffix"]) + meta["rec_suffix"].index(ids["at"])
    close(meta, t, "rec.boxes", head(model.llm(x, attn_mask=keep)[:, at]))


def golden_nextchat_batch(meta, t, where, **target):
    """A training fixture as a data.Batch: what the data side would have made of it."""
    labels = t["in.labels"].masked_fill(t["in.input_ids"] == meta["config"]["special_token_ids"]["boxes"], data.IGNORE)
    target["slots"] = where["at"][:, labels[tuple(where["at"])] > 0]
    return data.Batch(t["in.input_ids"], labels, {"image": t["in.images"], "box": t["in.loc_inputs"]},
                      {"image": where["im_patch"], "box": where["boxes"]}, {"at": target}, t["in.attention_mask"].bool())


def golden_gradients(meta, t, model, table, names):
    """Compare gradient norms and the stored gradients with those of the model; names that learn give the global norm."""
    ours = {theirs: dict(model.named_parameters())[cw.translate(theirs, table)].grad for theirs in meta["grad_norms"]}
    for theirs, norm in meta["grad_norms"].items():
        assert ours[theirs].norm().item() == pytest.approx(norm, rel=1e-4), theirs
    for theirs in meta["stored_gradients"]:
        close(meta, t, f"grad.{theirs}", ours[theirs])
    grads = [p.grad for name, p in model.named_parameters() if re.match(names, name) and p.grad is not None]
    assert torch.stack([g.norm() for g in grads]).norm().item() == pytest.approx(meta["grad_norm_all_trainable"], rel=1e-4)


def test_golden_nextchat_train_stage1():
    meta, weights, t = read_golden("nextchat/train_stage1")
    model, where = golden_nextchat(meta, weights, t)
    batch = golden_nextchat_batch(meta, t, where, boxes=t["in.loc_targets"], given=t["in.loc_inputs"], mock=torch.ones(()))
    batch.labels[-1] = data.IGNORE                              # the mock row
    losses = model(batch)
    for name, value in losses.items():
        close(meta, t, f"out.loss_{name.removeprefix('at_')}", value)
    loss = train.total_loss(losses, train.STAGES["nextchat", 1])
    close(meta, t, "out.loss", loss)
    loss.backward()
    golden_gradients(meta, t, model, cw.NEXTCHAT, r"(?!readers\.clip\.tower)")


def test_golden_nextchat_train_stage3():
    meta, weights, t = read_golden("nextchat/train_stage3")
    model, where = golden_nextchat(meta, weights, t)
    masks = torch.zeros(len(t["in.images"]), 1, *t["in.images_sam"].shape[-2:])
    for mask, (x0, y0, x1, y1) in zip(masks, meta["masks_sam_rectangles"]):
        mask[:, y0:y1 + 1, x0:x1 + 1] = 1
    losses = model(golden_nextchat_batch(meta, t, where, masks=masks, image=t["in.images_sam"]))
    del losses["lm"]
    for name, value in losses.items():
        close(meta, t, f"out.loss_{name.removeprefix('at_')}", value)
    loss = train.total_loss(losses, train.STAGES["nextchat", 3])
    close(meta, t, "out.loss", loss)
    train.learn(model, train.STAGES["nextchat", 3])
    loss.backward()
    golden_gradients(meta, t, model, cw.NEXTCHAT, r"writers\.at\.(seg_prompt_mlp|sam\.mask_decoder)\.")


@pytest.mark.parametrize("case", ["greedy", "beam", "greedy_no_box_input"])
def test_golden_nextchat_generate(case):
    meta, weights, t = read_golden("nextchat/generate")
    case = f"beam{meta['num_beams'][1]}" if case == "beam" else case
    model, where = golden_nextchat(meta, weights, t)
    n_box, at = where["boxes"].shape[1], meta["config"]["special_token_ids"]["at"]
    media = {"image": t["in.images"]} | ({} if "no_box" in case else {"box": t["in.loc_inputs"][:n_box]})
    x = model.embed(t["in.input_ids"], media, {"image": where["im_patch"], "box": where["boxes"]})
    hidden, limit = [], t[f"{case}.sequences"].shape[1] - 1
    make = partial(M.beam_search, n_beam=meta["num_beams"][1]) if "beam" in case else M.generate
    ids = list(make(model, x, max_new_tokens=limit if "no_box" in case else meta["max_new_tokens"], hidden=hidden))
    raw = t.get(f"{case}.raw_sequences", t[f"{case}.sequences"])[0, 1:].tolist()
    fixed = [meta["config"]["special_token_ids"]["boxes"] if a == at else b for a, b in zip([0] + ids, ids)]
    assert (fixed if "no_box" in case else ids) == raw and fixed == t[f"{case}.sequences"][0, 1:].tolist()
    image = None if "no_box" in case else t["in.images_sam"]
    prompt = t["in.input_ids"][0].tolist()
    boxes, masks, iou = M.read_out(model, prompt + ids, hidden, "at", len(prompt), image=image)
    close(meta, t, f"{case}.boxes", boxes)
    if image is not None:
        close(meta, t, f"{case}.mask_logits", masks)
        close(meta, t, f"{case}.iou_predictions", iou)


def nextgpt_tokenizer(tokens="published"):
    meta, _, _ = read_golden("nextgpt/process_batch")
    return data.Tokenizer(need(LLAMA_TOKENIZER, "LLAMA_TOKENIZER"), meta["added_tokens"][tokens])


def golden_nextgpt(meta, state, tok):
    """The chat model of a NExT-GPT fixture. Its media are what ImageBind would give, (M, mm_dim)."""
    c, lora = meta["llama"], meta.get("lora", {"r": 0, "alpha": 0})
    llm = M.LLMConfig(c["hidden"], c["layers"], c["heads"], c["heads"], c["intermediate"], c["vocab"], c["rms_eps"], 2048,
                      c["rope_base"], lora_rank=lora["r"], lora_alpha=lora["alpha"])
    mlp_dim = len(state["writers.img.proj.encoder.0.mlp.fc1.bias"])
    projections = {name: M.replace(p, llm_dim=c["hidden"], dim=meta["fc_hidden"], mlp_dim=mlp_dim)
                   for name, p in M.NEXTGPT.projections.items()}
    model = M.Model(M.replace(M.NEXTGPT, llm=llm, projections=projections, added_tokens=tok.added,
                              imagebind=ImageBindConfig({}, meta["mm_dim"])))
    model.load_state_dict(state)
    model.readers.imagebind.tower.forward = lambda kind, x: x[:, None]
    return model.eval()


def nextgpt_render(turns, tok):
    template = data.TEMPLATES["nextgpt_train"]
    return data.render(turns, tok, data.SYSTEMS["nextgpt"], template, lambda kind: 1, train=True)


def nextgpt_turns(meta, name, row):
    """The conversations of a loss fixture's case."""
    if "conversations" in row:
        names = {"image_name": "a.jpg", "mm_name": "b"}
        return [datasets.dialog_turns(names | {"conversation": c}, Path()) for c in row["conversations"]]
    kind = re.sub("To|Text", "", name.split(".")[-1]).lower()   # of ImageToText: image
    if name.endswith("ToText"):
        return [[[data.Medium(kind), "generate a caption"], [text]] for text in meta["captions"]]
    return [[[text], [text, data.Signal(datasets.WRITERS[kind])]] for text in meta["captions"][:row["captions"]]]


def golden_nextgpt_batch(t, name, samples, tok):
    """Turns -> data.Batch, media and caption embeddings taken from the fixture in the order of the samples."""
    rows = []
    for i, turns in enumerate(samples):
        for part in (part for turn in turns for part in turn):
            if isinstance(part, data.Medium):
                part.tensor = t["mm_embeds"][i]
            if isinstance(part, data.Signal):
                part.embeds = t[f"{name}.caption_embs"][i]
        rows.append(nextgpt_render(turns, tok))
    return data.collate(rows, lambda kind: 1, pad=2)


def check_golden_nextgpt(meta, t, model, batch, name, row, names, weights):
    """Ids, states, prompts, losses and gradients of a case. name: of its tensors; names: of what the fixture weighs, in order."""
    mask = t[f"{name}.attention_mask"].bool()
    assert torch.equal(batch.ids != 2, mask) and torch.equal(batch.labels, t[f"{name}.targets"])
    x = model.embed(batch.ids, batch.media, batch.slots)
    h = model.llm(x)
    for what, got in (("inputs_embeds", x), ("last_hidden", h)):
        if f"{name}.{what}" in t:
            close(meta, t, f"{name}.{what}", got, where=mask[..., None])
    for writer, target in batch.targets.items():
        if f"{name}.fc_out" in t:
            close(meta, t, f"{name}.fc_out", model.writers[writer].write(h[tuple(target["slots"])], model))
    losses = model(batch)
    loss = sum(weights.get(key, 1) * value for key, value in losses.items())
    assert loss.item() == pytest.approx(row["loss"], rel=PARITY)
    distance = sum(value.item() for key, value in losses.items() if key != "lm")
    assert distance == pytest.approx(row.get("mse") or 0, rel=PARITY)
    loss.backward()
    for key, norm in zip(names, row.get("grad_norms", ())):
        grad = model.get_parameter(key).grad
        assert (0 if grad is None else grad.norm().item()) == pytest.approx(norm or 0, rel=PARITY, abs=2e-6), key


def check_golden_nextgpt_stage(meta, weights, t, stage, prefix=""):
    """Every case of a fixture whose name begins with `prefix`, trained as the stage's row says."""
    row, state = train.STAGES["nextgpt", stage], cw.rename(weights, cw.NEXTGPT)
    for name in (name for name in meta["cases"] if name.startswith(prefix)):
        tok = nextgpt_tokenizer("fixed" if ".fixed." in name else "published")
        model, stored = golden_nextgpt(meta, state, tok), name.removesuffix("_acc")
        if name != stored:
            model.llm.lm_head.weight.data[t["acc.row_ids"]] = t["acc.rows"]
        stored = stored if f"{stored}.targets" in t else re.sub("Video|Audio", "Image", name)   # equal but for the kind
        learned = train.learn(model, row)
        batch = golden_nextgpt_batch(t, stored, nextgpt_turns(meta, stored, meta["cases"][stored]), tok)
        check_golden_nextgpt(meta, t, model, batch, stored, meta["cases"][name], list(state), row.weights)
        assert {key for key, p in model.named_parameters() if p.grad is not None} <= learned.keys()
        if (grad := f"{name.rpartition('.')[0]}.grad.llama_proj.weight") in t:
            close(meta, t, grad, model.readers.imagebind.projector.weight.grad)


@pytest.mark.parametrize("stage", (1, 2))
def test_golden_nextgpt_stage12_loss(stage):
    check_golden_nextgpt_stage(*read_golden("nextgpt/stage12_loss"), stage, f"stage{stage}.")


def test_golden_nextgpt_stage3_loss():
    check_golden_nextgpt_stage(*read_golden("nextgpt/stage3_loss"), 3)


def golden_nextgpt_generation(tokens="published"):
    """A model that says what the fixture wants, its tokenizer, and {file name: Medium}."""
    meta, weights, t = read_golden("nextgpt/generation")
    tok = nextgpt_tokenizer(tokens)
    model = golden_nextgpt(meta, cw.rename(weights, cw.NEXTGPT), tok)
    model.llm.lm_head.weight.data[t["lm_head.row_ids"]] = t["lm_head.rows"]
    kinds = {"jpg": "image", "wav": "audio", "mp4": "video"}
    media = {name: data.Medium(kinds[name[-3:]], name, x) for name, x in zip(meta["media"], t["media"])}
    return meta, t, model, tok, media


def nextgpt_rows(prompt, media):
    """The turns of an original's prompt. What its splitting at " <" and "> " does beyond finding media is a typed <s>."""
    rows = []
    for text in re.split(r"\n?### (?:Human|Assistant): ", prompt)[1:]:
        found = re.match(r"<(Image|Audio|Video)>(.*?)</\1> ", text)
        text = re.sub(" <|> ", "<s>", text[found.end():] if found else text)
        rows.append([media[found[2]], text] if found else [text])
    return [*rows, None]


@pytest.mark.parametrize("tokens", ("published", "fixed"))
def test_golden_nextgpt_generation_prompts(tokens):
    meta, t, model, tok, media = golden_nextgpt_generation(tokens)
    system, template = data.SYSTEMS["nextgpt"], data.TEMPLATES["nextgpt"]
    session = chat.Session(model, tok, system, template, parse_special=True)
    prefix = {"published": "prompt.", "fixed": "prompt_fixed_tokens."}[tokens]
    cases = [name for name in meta["prompts"] if f"{prefix}{name}.inputs_embeds" in t]
    for name in cases:
        rows = nextgpt_rows(meta["prompts"][name], media)
        parts = data.conversation_pieces(rows, tok, system, template, model.cfg.n_token)
        pieces = [p for part in parts for piece in part for p in ([piece] if piece.special else tok.parse(piece.text))]
        ids, _, slots = tok.encode_pieces(pieces)
        close(meta, t, f"{prefix}{name}.inputs_embeds", session.embed(ids, slots, 0))
        *shown, text = rows[0]
        if len(rows) == 2 and "<s>" not in text:                # what a user types, without the demo's blank
            assert session.prompt([chat.Turn(text.removeprefix(" "), shown)])[0] == ids
    assert cases


def test_golden_nextgpt_generation():
    meta, t, model, tok, _ = golden_nextgpt_generation()
    run, hidden, embeds = meta["runs"]["all"], [], t["prompt.text.inputs_embeds"]
    sampling = {name: run["inputs"][name] for name in ("temperature", "top_p")} | {"top_k": 50}
    ids = list(M.generate(model, embeds, max_new_tokens=len(run["chain"]), hidden=hidden, **sampling))
    assert ids == run["chain"] == t["run.generated_ids"][0, 1:].tolist()
    close(meta, t, "run.hidden_after_prompt", torch.cat(hidden[1:], dim=1))
    text = re.sub("### Human:  ?", "", meta["prompts"][run["prompt"]])
    session = chat.Session(model, tok, data.SYSTEMS["nextgpt"], data.TEMPLATES["nextgpt"])
    session.set("max_new_tokens", run["inputs"]["max_tgt_len"])
    "".join(session.say(text))
    turn = session.turns[-1]
    assert turn.ids == run["chain"] and turn.stray == []
    for (name, pipe), answer in zip({"img": "sd", "vid": "vd", "aud": "ad"}.items(), run["returned"]):
        (start,), _ = M.signal_runs(turn.ids, model.cfg.signal(name))
        close(meta, t, f"run.prompt_embeds.{pipe}", turn.made[name])
        assert answer[name][0] == tok.decode(turn.ids[:start + len(model.cfg.signal(name))])
    session.set("max_new_tokens", meta["runs"]["short"]["max_tgt_len"])
    "".join(session.retry())
    assert [session.turns[-1].answer] == meta["runs"]["short"]["returned"] and not session.turns[-1].made


def test_golden_nextgpt_sampling():
    meta, _, t = read_golden("nextgpt/sampling")
    for i, row in enumerate(meta["cases"]):
        numbers = {name: row[name] for name in ("temperature", "top_k", "top_p")}
        probs = M.filter_logits(t["logits"], **numbers).softmax(-1)
        close(meta, t, f"probs.{i}", probs)
        assert (probs > 0).sum(1).tolist() == row["kept"]


def test_llm_signal_runs_that_are_not_complete_make_nothing():
    signal, rng = [7, 8, 9], random.Random(0)
    assert M.signal_runs([1, 7, 8, 9, 9, 7, 8, 2, 7, 8, 9], signal) == ([1, 8], [4, 5, 6])
    for _ in range(200):
        ids = [rng.choice((1, 7, 8, 9)) for _ in range(12)]
        starts, stray = M.signal_runs(ids, signal)
        assert len(stray) + 3 * len(starts) == sum(id in signal for id in ids)


PEER_LLMS = {                                                   # transformers' LlamaConfig beyond the tiny sizes
    "mha": {},
    "gqa": dict(num_key_value_heads=2),
    "llama3": dict(num_key_value_heads=2, rope_theta=500000.0, max_position_embeddings=512,
                   rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                     original_max_position_embeddings=64)),
    "tied": dict(tie_word_embeddings=True, head_dim=24),
}


def peer_llm(case, seed, vocab=331):
    """A random transformers LLaMA and ours with its weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    c = transformers.LlamaConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=112,
                                 vocab_size=vocab, initializer_range=0.15, **PEER_LLMS[case])
    theirs, rope = transformers.LlamaForCausalLM(c).eval(), PEER_LLMS[case].get("rope_scaling", {})
    more = dict(rope_factor=rope.get("factor", 1.0), rope_train_len=rope.get("original_max_position_embeddings", 8192),
                rope_theta=PEER_LLMS[case].get("rope_theta", 10000.0), tied=c.tie_word_embeddings, head_dim=c.head_dim or 0)
    ours = M.Model(M.ModelConfig(llm=golden_llm(c.to_dict(), **more), eos=(2,)))
    ours.load_state_dict(cw.rename(theirs.state_dict(), cw.LLAMA))
    return theirs, ours.eval()


@pytest.mark.parametrize("case", PEER_LLMS)
def test_llm_logits_equal_transformers(case):
    for seed in range(3):
        theirs, ours = peer_llm(case, seed)
        ids = torch.randint(3, 331, (2, 90))
        mask = torch.ones_like(ids)
        mask[1, :7] = 0                                         # padding on the left
        with torch.no_grad():
            want = theirs(ids, attention_mask=mask, position_ids=torch.arange(90).expand(2, -1)).logits
            got = ours.llm.lm_head(ours.llm(ours.llm.embed(ids), attn_mask=mask.bool()))
        assert ((got - want) * mask[..., None]).abs().max() <= PARITY * want.abs().max()


@pytest.mark.parametrize("case", PEER_LLMS)
def test_llm_greedy_and_beam_ids_equal_transformers(case):
    for seed in range(3):
        theirs, ours = peer_llm(case, seed)
        ids = torch.randint(3, 331, (1, 12))
        theirs.generation_config.eos_token_id, ours.cfg = None, M.replace(ours.cfg, eos=())
        for n_beam in (1, 5):
            want = theirs.generate(ids, max_new_tokens=64, num_beams=n_beam, do_sample=False, pad_token_id=0)[0, 12:].tolist()
            embeds = ours.llm.embed(ids)
            got = list(M.generate(ours, embeds, max_new_tokens=64)) if n_beam == 1 else M.beam_search(ours, embeds, max_new_tokens=64)
            assert got == want, (seed, n_beam)


def test_llm_beam_search_ends_like_transformers():
    ended = 0
    for seed in range(8):
        theirs, ours = peer_llm("mha", seed, vocab=17)          # so few words that the end token comes up
        ids = torch.randint(3, 17, (1, 5))
        want = theirs.generate(ids, max_new_tokens=64, num_beams=5, do_sample=False, pad_token_id=0)[0, 5:].tolist()
        got = M.beam_search(ours, ours.llm.embed(ids), max_new_tokens=64)
        assert got == want, seed
        ended += got[-1] == 2
    assert ended


def test_llm_sampling_filters_equal_transformers():
    lp = pytest.importorskip("transformers.generation.logits_process")
    for seed in range(20):
        torch.manual_seed(seed)
        logits, seen = 3 * torch.randn(1, 97), torch.randint(0, 97, (1, 11))
        temperature, top_k, top_p, penalty = (0.2 + 2 * torch.rand(1)).item(), seed * 5, [1.0, 0.9, 0.5, 0.01][seed % 4], 1 + seed / 10
        want = lp.RepetitionPenaltyLogitsProcessor(penalty)(seen, logits)
        want = lp.TemperatureLogitsWarper(temperature)(seen, want)
        want = lp.TopKLogitsWarper(top_k)(seen, want) if top_k else want
        want = lp.TopPLogitsWarper(top_p)(seen, want) if top_p < 1 else want
        got = M.filter_logits(M.penalise(logits, seen, penalty), temperature=temperature, top_k=top_k, top_p=top_p)
        assert torch.equal(got.isinf(), want.isinf()) and torch.allclose(got.softmax(-1), want.softmax(-1))


def test_llm_cached_steps_equal_one_pass():
    torch.manual_seed(0)
    for case in PEER_LLMS:
        _, ours = peer_llm(case, 0)
        x, cache = ours.llm.embed(torch.randint(0, 331, (2, 40))), M.KVCache(ours.llm, 2, 40)
        with torch.no_grad():
            parts = torch.cat([ours.llm(part, cache) for part in x.split([17, 1, 9, 1, 12], dim=1)], 1)
            assert torch.allclose(parts, ours.llm(x), atol=1e-5)


def test_llm_replayed_steps_equal_plain_ones(monkeypatch):
    """Whatever lies in places ahead, over several runs of places, also where a talk goes back and on."""
    monkeypatch.setattr(M.Replay, "RUN", 7)
    torch.manual_seed(0)
    for case in PEER_LLMS:
        _, ours = peer_llm(case, 0)
        cache, x = M.KVCache(ours.llm, 1, 50), ours.llm.embed(torch.randint(0, 331, (1, 10))).detach()
        cache.k.fill_(torch.nan), cache.v.fill_(torch.nan)
        replay = M.Replay(ours.llm, cache)
        for n in (5, 9, 3):
            cache.pos, states, want = 0, [], []
            got = list(M.generate(ours, x[:, :n], cache=cache, max_new_tokens=40, hidden=states, replay=replay))
            assert got == list(M.generate(ours, x[:, :n], max_new_tokens=40, hidden=want)) and cache.pos == n + len(got) - 1
            assert torch.allclose(torch.cat(states, 1), torch.cat(want, 1), atol=1e-5)


@torch.inference_mode()
def test_llm_replay_reads_what_lay_there_at_first():
    """A graph holds its table of positions, whatever becomes of the model's."""
    _, ours = peer_llm("mha", 0)
    cache, x = M.KVCache(ours.llm, 1, 9), ours.llm.embed(torch.tensor([[3]]))
    replay = M.Replay(ours.llm, cache)
    want, cache.pos = replay(x), 0
    ours.llm.rope = [torch.full_like(table, torch.nan) for table in ours.llm.rope]
    assert torch.equal(replay(x), want) and torch.isfinite(want).all()


def test_llm_replay_that_was_interrupted_starts_afresh():
    _, ours = peer_llm("mha", 0)
    cache, x = M.KVCache(ours.llm, 1, 9), ours.llm.embed(torch.tensor([[3]])).detach()
    replay, want = M.Replay(ours.llm, cache), ours.llm(x)
    cache.k = None                      # as if Ctrl-C came
    with torch.inference_mode(), pytest.raises(TypeError):
        replay(x)
    cache.k = torch.zeros_like(cache.v)
    with torch.inference_mode():
        assert torch.allclose(replay(x), want, atol=1e-5)


def test_llm_lora_starts_as_base_and_merges():
    cfg = M.LLMConfig(dim=32, n_layer=2, n_head=2, n_kv_head=2, mlp_dim=48, vocab_size=50)
    model = M.Model(M.ModelConfig(llm=M.replace(cfg, lora_rank=4, lora_targets="wq wv down")))
    M.initialise(model)
    plain = M.Model(M.ModelConfig(llm=cfg))
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "lora" not in k})
    x = torch.randn(1, 9, 32)
    assert torch.equal(model.llm(x), plain.llm(x))              # lora_B is 0
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=0.1) if "lora_B" in name else None
    want = model.llm(x)
    assert not torch.allclose(want, plain.llm(x))
    M.merge_lora(model)
    assert torch.allclose(model.llm(x), want, atol=1e-5) and model.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_llm_one_row_is_multiplied_like_many(dtype, tol):
    for seed in range(20):
        torch.manual_seed(seed)
        n_in, n_out = torch.randint(1, 300, (2,)).tolist()
        layer = M.LoRALinear(n_in, n_out, 2, 4).to(dtype)
        layer.weight.data.normal_(), layer.lora_B.data.normal_(), layer.lora_A.data.normal_()
        x = torch.randn(3, 1, n_in).to(dtype)
        with torch.no_grad():
            want, one = layer(x), torch.cat([layer(row[None]) for row in x])
        assert one.shape == want.shape and (one - want).abs().max() <= tol * want.abs().max().clamp(min=1)


@torch.no_grad()
def test_llm_rows_of_another_type_go_through_autocast():
    for rows in (1, 3):
        with torch.autocast("cpu", torch.bfloat16):
            assert M.Linear(8, 5)(torch.ones(rows, 8).bfloat16()).dtype == torch.bfloat16


def test_llm_loss_in_chunks_equals_the_whole():
    for seed in range(10):
        torch.manual_seed(seed)
        B, T, C, V = torch.randint(2, 12, (4,)).tolist()
        h, head, labels = torch.randn(B, T, C, requires_grad=True), M.Linear(C, V), torch.randint(V, (B, T))
        labels[torch.rand(B, T) < 0.5] = -100
        labels[0, 1] = 0
        found = []
        for chunk in (1, 3, 1000):
            loss = M.lm_loss(head, h, labels, chunk)
            found.append([loss.detach(), *torch.autograd.grad(loss, (h, head.weight))])
        logits = head(h[:, :-1]).transpose(1, 2)
        want = torch.nn.functional.cross_entropy(logits, labels[:, 1:])
        found.append([want.detach(), *torch.autograd.grad(want, (h, head.weight))])
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for other in found[:3] for a, b in zip(other, found[3]))


@pytest.mark.parametrize("learns", ("h", "weight", ""))
def test_llm_loss_teaches_what_learns(learns):
    h, head, labels = torch.randn(2, 5, 8), M.Linear(8, 11).requires_grad_(learns == "weight"), torch.randint(11, (2, 5))
    h.requires_grad_(learns == "h")
    with torch.autocast("cpu", torch.bfloat16):
        loss = M.lm_loss(head, h, labels)
        want = torch.nn.functional.cross_entropy(head(h[:, :-1]).float().transpose(1, 2), labels[:, 1:])
    assert loss.dtype == torch.float32 and (loss - want).abs() < 1e-3 and loss.requires_grad == bool(learns)
    for x in (h, head.weight):
        if x.requires_grad:
            a, b = (torch.autograd.grad(y, x)[0] for y in (loss, want))
            assert a.dtype == x.dtype and (a - b).abs().max() <= 0.02 * b.abs().max()


def test_llm_fused_matrices_change_nothing():
    for case in PEER_LLMS:
        _, ours = peer_llm(case, 1)
        x = ours.llm.embed(torch.randint(0, 331, (2, 9)))
        want = ours.llm(x)
        M.fuse(ours)
        assert torch.allclose(ours.llm(x), want, atol=1e-5) and ours.llm.blocks[0].attn.wq is None


def test_llm_fused_matrices_of_a_file_take_no_memory(tmp_path):
    theirs, ours = peer_llm("gqa", 1)
    theirs.save_pretrained(tmp_path / "theirs")
    assert cli(tmp_path / "theirs", "--out", tmp_path / "converted").returncode == 0
    M.save(ours, tmp_path / "saved")
    for model in (M.load(tmp_path / name) for name in ("converted", "saved")):
        starts = [layer.weight.data_ptr() for b in model.llm.blocks for layer in (b.attn.wq, b.mlp.gate)]
        M.fuse(model)
        assert starts == [layer.weight.data_ptr() for b in model.llm.blocks for layer in (b.attn.wqkv, b.mlp.gate_up)]
        assert torch.allclose(model.llm(x := torch.randn(1, 9, 64)), ours.llm(x), atol=1e-5)


def test_llm_matrices_are_joined_however_they_lie():
    for seed in range(20):
        torch.manual_seed(seed)
        n, k = torch.randint(1, 9, (2,)).tolist()
        rows, square = torch.randn(6 * n, k), torch.randn(3, k, k)
        raw = torch.randint(0, 99, (6 * k * k,), dtype=torch.uint8)             # of a float32 and a float16 behind it
        wide, narrow = (part.view(kind).view(k, k) for part, kind in zip(raw.split([4 * k * k, 2 * k * k]), (torch.float, torch.half)))
        for parts in (rows.split([n, 2 * n, 3 * n]), rows.split(n)[::-1], rows.split(n)[::2], rows[-n:].split(n), [x.T for x in square],
                      [x.clone() for x in square], [wide, narrow], [rows.clone(), rows]):
            assert torch.equal(M.one_behind_the_other(parts), torch.cat(parts))


def test_llm_with_lora_is_not_fused_in_part():
    cfg = M.LLMConfig(dim=32, n_layer=2, n_head=2, n_kv_head=2, mlp_dim=48, vocab_size=50, lora_rank=2, lora_targets="gate down")
    M.initialise(model := M.Model(M.ModelConfig(llm=cfg)))
    x = torch.randn(1, 4, 32)
    want = model.llm(x)
    with pytest.raises(ValueError, match="merge LoRA"):
        M.fuse(model)
    M.merge_lora(model)
    M.fuse(model)
    assert torch.allclose(model.llm(x), want, atol=1e-5)


def test_clip_equals_transformers():
    transformers = pytest.importorskip("transformers")
    for seed in range(3):
        torch.manual_seed(seed)
        c = transformers.CLIPVisionConfig(hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
                                          image_size=42, patch_size=14, initializer_range=0.2)
        theirs = transformers.CLIPVisionModel(c).eval()
        ours = CLIPVision(CLIPConfig(image_size=42, dim=48, n_layer=3, n_head=4, mlp_dim=80)).eval()
        state = {k if k.startswith("vision_model.") else f"vision_model.{k}": v for k, v in theirs.state_dict().items()}
        ours.load_state_dict({k.removeprefix("readers.clip.tower."): v for k, v in cw.rename(state, cw.CLIP).items()})
        x = torch.randn(2, 3, 42, 42)
        with torch.no_grad():
            for got, want in zip(ours.hidden_states(x), theirs(x, output_hidden_states=True).hidden_states, strict=True):
                assert (got - want).abs().max() <= PARITY * want.abs().max()
            assert torch.equal(ours(x), list(ours.hidden_states(x))[-2][:, 1:])


def test_model_saves_and_loads_what_it_was(tmp_path):
    torch.manual_seed(0)
    model = M.Model(M.TINY).eval()
    M.initialise(model)
    M.save(model, tmp_path / "w")
    again = M.load(tmp_path / "w")
    assert again.cfg == model.cfg and again.llm.lm_head.weight is again.llm.embed.weight
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert M.load(tmp_path / "w", dtype=torch.bfloat16).llm.embed.weight.dtype == torch.bfloat16


def test_model_takes_the_place_of_files_that_cannot_go(tmp_path, monkeypatch):
    one, two = (M.Model(M.ModelConfig(llm=M.LLMConfig(dim=32, n_layer=1, n_head=2, n_kv_head=2, mlp_dim=48, vocab_size=50))) for _ in "ab")
    M.save(one, tmp_path / "w")
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors: None)     # as of another's folder, or of open files on NFS
    M.save(two, tmp_path / "w")
    assert torch.equal(M.load(tmp_path / "w").llm.embed.weight, two.llm.embed.weight)
    assert sum(path.name.startswith("w.tmp") for path in tmp_path.iterdir()) == 1


def test_model_out_of_a_file_learns_matrix_by_matrix(tmp_path):
    def step(p):                                                # as soon as it has a gradient, while others wait for theirs
        torch.nn.init.ones_(p)
    M.save(M.Model(M.ModelConfig(llm=M.LLMConfig(dim=32, n_layer=2, n_head=2, n_kv_head=2, mlp_dim=48, vocab_size=50))), tmp_path / "w")
    learned = [*(model := M.load(tmp_path / "w")).llm.blocks.parameters()]
    for p in learned:
        p.register_post_accumulate_grad_hook(step)
    model.llm(torch.randn(1, 4, 32)).sum().backward()
    assert all((p == 1).all() for p in learned)


BAD_CONFIGS = {
    "newer": ({"format_version": 99}, "newer"), "no version": ({"format_version": None}, "config"), "unknown field": ({"llama": 1}, "llama"),
    "huge": ({"llm": {"dim": 64, "n_layer": 10 ** 9}}, "n_layer"), "negative": ({"llm": {"dim": -1}}, "dim"), "other sizes": ({"clip": {}}, "missing"),
    "words": ({"format_version": "one"}, "config"), "a number": ({"llm": 5}, "describes no model"), "a list": ({"llm": []}, "describes no model"),
    "no heads": ({"llm": {"n_head": 0}}, "describes no model"), "a text": ({"llm": {"dim": "8"}}, "describes no model"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_model_load_names_what_is_wrong(tmp_path, case):
    M.save(M.Model(M.TINY), tmp_path / "w")
    change, match = BAD_CONFIGS[case]
    config = json.loads((tmp_path / "w/config.json").read_text()) | change
    (tmp_path / "w/config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None or k != "format_version"}))
    with pytest.raises(ValueError, match=match):
        M.load(tmp_path / "w")


@pytest.mark.parametrize("cut", (0, 5, 1000, -1000, None))
def test_model_load_names_a_damaged_file(tmp_path, cut):
    M.save(M.Model(MINI), tmp_path / "w")
    path = tmp_path / "w/model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"F32"', b'"U32"') if cut is None else whole[:cut])     # a type that torch has, and we have not
    with pytest.raises(ValueError, match=f"{path}: truncated or damaged"):
        M.load(tmp_path / "w")
    path.unlink()
    path.mkdir()
    with pytest.raises(IsADirectoryError, match=str(path)):
        M.load(tmp_path / "w")


def test_model_loads_of_shards_what_their_index_names(tmp_path):
    model, path = M.Model(MINI), tmp_path / "model.safetensors"
    M.initialise(model)
    M.save(model, tmp_path)
    state, shards = load_file(path), {f"{i}.safetensors": {} for i in range(9)}
    for name in shards:                                         # each has all, and right only those that it is asked for
        for key, x in state.items():
            shards[name][key] = x if zlib.crc32(key.encode()) % 9 == int(name[0]) else torch.zeros_like(x) - 1
        save_file(shards[name], tmp_path / name)
    rows = {key: f"{zlib.crc32(key.encode()) % 9}.safetensors" for key in state}
    path.with_name("model.safetensors.index.json").write_text(json.dumps({"weight_map": rows}))
    assert all(torch.equal(x, model.state_dict()[key]) for key, x in M.load(tmp_path).state_dict().items())


@pytest.mark.parametrize("text", ("", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"llm.embed.weight": 5}}'))
def test_model_load_names_an_index_that_is_none(tmp_path, text):
    M.save(M.Model(MINI), tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(ValueError, match=str(index)):
        M.load(tmp_path)


# ---- Quantize

def random_linear(seed, dtype=torch.float32):
    """A bias-free Linear of random sizes that every group divides, some channels much larger than others."""
    g = torch.Generator().manual_seed(seed)
    n, k = (int(torch.randint(1, 5, (), generator=g)) for _ in range(2))
    layer = torch.nn.Linear(128 * k, 32 * n, bias=False, dtype=dtype)
    layer.weight.data = (torch.randn(32 * n, 128 * k, generator=g) * torch.randn(32 * n, 1, generator=g).exp()).to(dtype)
    return layer


def test_quantize_is_off_by_half_a_step():
    for seed in range(9):
        w = random_linear(seed).weight.detach()
        q = quantize.QuantLinear(random_linear(seed), 8)
        assert ((q.expand() - w).abs() <= w.abs().amax(1, keepdim=True) / 127 * 0.51).all()
        for group in (32, 64, 128):
            parts = w.unflatten(1, (-1, group))
            step, largest = (parts.amax(2) - parts.amin(2)) / 15, parts.abs().amax(2)
            off = (quantize.QuantLinear(random_linear(seed), 4, group, packed=False).expand() - w).unflatten(1, (-1, group))
            assert (off.abs().amax(2) <= 0.51 * step + largest / 200).all()             # zeros are bfloat16


BY = ["torch"] + ["ours"] * bool(quantize.compiled())           # who multiplies


def test_quantize_compiles_where_it_can(monkeypatch):
    vnni = torch.cpu.get_capabilities().get("avx512_vnni")
    assert bool(quantize.compiled()) == bool(vnni and shutil.which(os.environ.get("CC", "cc")))
    for wrong in ("false", "no-such-compiler", "cc --no-such-option"):
        monkeypatch.setenv("CC", wrong)
        assert quantize.compiled.__wrapped__() is None


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("bits, group", [(8, 64), (4, 32), (4, 64), (4, 128)])
def test_quantize_packed_products_equal_expanded_ones(bits, group, by, monkeypatch):
    if by == "torch":
        monkeypatch.setattr(quantize, "compiled", lambda: None)
    for seed in range(6):
        plain, packed = (quantize.QuantLinear(random_linear(seed), bits, group, packed) for packed in (False, True))
        for rows in (1, 2, 3, 5, 16, 70, 140):
            x = torch.randn(2, rows, plain.in_features).bfloat16() * 10.0 ** (seed - 3)
            want = x.float() @ plain.expand().T
            assert (packed(x).float() - want).abs().max() <= 0.02 * want.abs().max(), (seed, rows)
            if by == "ours":                                    # vectors are off by half a step of their two digits
                off = x.float().abs().amax(-1, keepdim=True) / 127 / 254 * 0.52 * plain.expand().abs().sum(1)
                assert ((packed(x.float()) - want).abs() <= off).all(), (seed, rows)
            assert (plain(x.float()) - want).abs().max() <= 1e-5 * want.abs().max()
            assert torch.equal(packed(x.mT.contiguous().mT), packed(x))                     # however it lies


@pytest.mark.parametrize("bits", (8, 4))
def test_quantize_makes_no_number_of_what_is_none(bits):
    layer, x = quantize.QuantLinear(random_linear(0), bits), torch.zeros(5, random_linear(0).in_features)
    x[1, 2], x[2, 3], x[3, 4] = float("nan"), float("inf"), 1
    assert layer(x).isfinite().all(1).tolist() == [True, False, False, True, True] and layer(x)[4].count_nonzero() == 0


@pytest.mark.parametrize("fused", ["never", "before", "after"])
def test_quantize_llm_keeps_its_logits_and_decodes(fused):
    torch.manual_seed(0)
    cfg = M.LLMConfig(dim=128, n_layer=2, n_head=4, n_kv_head=2, mlp_dim=256, vocab_size=80)
    for kind, tol in (("int8", 0.05), ("int4", 0.35)):
        model = M.Model(M.ModelConfig(llm=cfg, eos=()))
        M.initialise(model)
        x = model.llm.embed(torch.randint(0, 80, (1, 12))).detach()
        with torch.no_grad():
            want = model.llm.lm_head(model.llm(x))
            M.fuse(model) if fused == "before" else None
            quantize.quantize(model, kind)
            M.fuse(model) if fused == "after" else None
            got = model.llm.lm_head(model.llm(x))
        assert 0 < (got - want).std() / want.std() < tol
        assert len(list(M.generate(model, x, max_new_tokens=5))) == 5


@pytest.mark.parametrize("kind", quantize.KINDS)
@pytest.mark.parametrize("change", [dict(), dict(tied=True), dict(lora_rank=3, lora_targets="wq down")])
def test_quantize_on_the_way_in_saves_and_loads(tmp_path, kind, change):
    """Quantised while loading, or after, or loaded from a quantised folder: the same model in any type of floats."""
    cfg = M.LLMConfig(dim=64, n_layer=2, n_head=2, n_kv_head=1, mlp_dim=128, vocab_size=80, **change)
    model = M.Model(M.ModelConfig(llm=cfg))
    M.initialise(model)
    for p in model.parameters():
        p.data += 0.02 * torch.randn_like(p)                    # also lora_B
    M.save(model, tmp_path / "float")
    quantize.quantize(model, kind)
    M.save(M.load(tmp_path / "float", quantize=kind), tmp_path / kind)
    x = torch.randn(1, 5, 64)
    with torch.no_grad():
        want = model.llm.lm_head(model.llm(x))
        for got in (M.load(tmp_path / "float", quantize=kind), M.load(tmp_path / kind, dtype=torch.float64).float()):
            assert torch.equal(got.llm.lm_head(got.llm(x)), want) and got.cfg == model.cfg
    small, large = ((tmp_path / name / "model.safetensors").stat().st_size for name in (kind, "float"))
    assert small < large / 2
    with pytest.raises(ValueError, match=f"it is {kind}"):
        M.load(tmp_path / kind, quantize=kind)
    with pytest.raises(ValueError, match="save it before"):
        M.save(got, tmp_path / "late")
    assert not (tmp_path / "late").exists()


@pytest.mark.parametrize("by", BY)
def test_quantize_reads_integers_from_anywhere(by, monkeypatch):
    if by == "torch":
        monkeypatch.setattr(quantize, "compiled", lambda: None)
    for start in (1, 2, 8, 24, 32):                             # bytes behind a round address, as in a mapped file
        layer, same = (quantize.QuantLinear(random_linear(start), 8) for _ in range(2))
        room, x = torch.empty(layer.weight.numel() + 128, dtype=torch.int8), torch.randn(5, layer.in_features)
        start -= room.data_ptr() % 64 - 64
        layer.weight = room[start:start + layer.weight.numel()].view_as(layer.weight).copy_(layer.weight)
        assert torch.equal(layer(x), same(x))


def test_quantize_holds_one_matrix_at_a_time():
    cfg, seen = M.LLMConfig(dim=64, n_layer=2, n_head=2, n_kv_head=1, mlp_dim=128, vocab_size=80), []
    with torch.device("meta"):
        model = M.Model(M.ModelConfig(llm=cfg))

    def fetch(name, layer):
        assert not any(ref() for _, ref in seen)
        seen.append((name, weakref.ref(layer)))
        return layer
    quantize.quantize(model, "int4", fetch)
    assert len(dict(seen)) == 2 * 7 + 1 and not any(ref() for _, ref in seen)


def test_quantize_of_a_conversion(tmp_path):
    theirs, ours = peer_llm(next(iter(PEER_LLMS)), 0)
    theirs.save_pretrained(tmp_path / "theirs")
    done = cli(tmp_path / "theirs", "--out", tmp_path / "out", "--quantize", "int8")
    assert done.returncode == 0, done.stderr
    got, x = M.load(tmp_path / "out"), torch.randn(1, 5, 64)
    quantize.quantize(ours, "int8")
    with torch.no_grad():
        assert torch.equal(got.llm.lm_head(got.llm(x)), ours.llm.lm_head(ours.llm(x)))


def test_quantize_refuses():
    cfg = M.LLMConfig(dim=128, n_layer=1, n_head=4, n_kv_head=2, mlp_dim=256, vocab_size=80, lora_rank=2)
    with pytest.raises(ValueError, match="merge LoRA"):
        M.fuse(M.Model(M.ModelConfig(llm=cfg)))
    for model, kind in ((M.Model(M.ModelConfig(llm=cfg)), "int5"), (M.Model(M.ModelConfig()), "int8")):
        with pytest.raises(ValueError, match="cannot quantise"):
            quantize.quantize(model, kind)
    for linear, bits, group in ((torch.nn.Linear(64, 16), 8, 64), (random_linear(0), 5, 64), (random_linear(0), 4, 48)):
        with pytest.raises(ValueError, match="bits"):
            quantize.QuantLinear(linear, bits, group)


# ---- Bench

def tiny_unet(cfg, kind, sizes, *more):
    """A row of bench.UNETS made small."""
    widths = (64, 64, 128, 128)
    cfg = M.replace(cfg, widths=widths, n_head=(1, 1, 2, 2) if cfg.video else cfg.n_head)
    return cfg, kind, sizes | dict(block_out_channels=widths, cross_attention_dim=cfg.context_dim or widths), *more


TINY_LLM = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128,
                vocab_size=32000)
TINY_BENCH = dict(
    LLM={"cpu": TINY_LLM}, SMALL_LLM=TINY_LLM, CLIP=TINY_LLM | dict(num_key_value_heads=4, image_size=56, patch_size=14),
    SAM=M.replace(SAMConfig(), dim=64, n_head=4, mlp_dim=96, n_layer=3, window=3, image_size=128, global_layers=(1,)),
    UNETS={name: tiny_unet(*row) for name, row in bench.UNETS.items()})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prefill", "decode", "decode-graph", "start", "clip", "sam", "unet-sd15", "unet-zeroscope", "unet-audioldm"])
def test_bench_sides_compute_the_same(name, tmp_path, monkeypatch):
    pytest.importorskip("transformers" if bench.CASES[name].peers == ("transformers",) else "diffusers")
    for key, value in TINY_BENCH.items():
        monkeypatch.setattr(bench, key, value)
    s = Thing(device="cpu", dtype=torch.float32, layers=2, folder=tmp_path, threads=1)
    case = bench.CASES[name]
    with torch.no_grad():
        ours, theirs = (case.build(side, s, *case.args).run() for side in ("ours", *case.peers))
    if isinstance(ours, list):
        ours, theirs = torch.tensor(ours), theirs[0, -len(ours):]
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= PARITY * theirs.abs().max()


def test_bench_names_a_program_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "folder_of", lambda *args: tmp_path)
    monkeypatch.setitem(bench.STARTS, "ours", "raise SystemExit(3)")
    s = Thing(device="cpu", dtype=torch.float32, folder=tmp_path, threads=1)
    with pytest.raises(SystemExit, match="of ours ended with status 3"):
        bench.start("ours", s, False).run()


# ---- Data

def need(path, what):
    if not path.exists():
        pytest.skip(f"{what} is absent ({path})")
    return path


def test_golden_imagebind_audio_fbank():
    meta, _, t = read_golden("imagebind/audio_fbank")
    close(meta, t, "const.mel_banks", data.mel_banks(128, 16000))
    for w in meta["waves"]:
        x, name = t[f"in.{w['name']}"].float() / 32768, w["name"]
        if f"mid.{name}.resampled" in t:
            close(meta, t, f"mid.{name}.resampled", data.resample(x, w["sample_rate"], 16000))
        y = data.resample(x, w["sample_rate"], 16000)[:, :32000]
        close(meta, t, f"mid.{name}.fbank_first_clip", data.fbank((y - y.mean())[0], 128, 16000))
        for variant in ("span_end", "release_0_1_5"):
            spec = data.MediaSpec(span_end=variant == "span_end")
            close(meta, t, f"out.{name}.{variant}", data.audio_tensor(x, w["sample_rate"], spec))


def test_golden_imagebind_image_preproc():
    meta, _, t = read_golden("imagebind/image_preproc")
    for i in range(len(meta["images"])):
        picture = data.Image.fromarray(t[f"in.img{i}"].numpy())
        close(meta, t, f"out.clip_processor.img{i}", data.image_tensor(picture))
        close(meta, t, f"out.imagebind.img{i}", data.image_tensor(picture, data.MediaSpec(crop_round=True)))
        close(meta, t, f"out.thermal.img{i}", data.thermal_tensor(picture))


def test_golden_imagebind_video_preproc():
    meta, _, t = read_golden("imagebind/video_preproc")
    for v in meta["videos"]:
        frames = t[f"in.{v['name']}"].numpy()
        for variant in ("span_end", "release_0_1_5"):
            spec = data.MediaSpec(span_end=variant == "span_end")
            assert data.clip_frames(len(frames), v["fps"], spec) == v[f"{variant}_frames_used"]
            got = data.video_tensor(lambda numbers: frames[numbers], len(frames), v["fps"], spec)
            close(meta, t, f"out.{v['name']}.{variant}", got)
            close(meta, t, f"out.{v['name']}.{variant}.mean", got.mean((-2, -1)))


def test_golden_imagebind_text_tokens():
    meta, _, _ = read_golden("imagebind/text_tokens")
    clip = data.CLIPTokenizer(need(CLIP_BPE, "CLIP_BPE"))
    rows = [row for row in meta["rows"] if clip.encode(row["text"]) == row["bpe"] or not row["ftfy_changes_it"]]
    assert len(rows) > len(meta["rows"]) / 2
    for row in rows:
        assert clip(row["text"]).tolist() == row["ids"], row["text"]
        assert clip(row["text"], keep_end=False).tolist() == row["ids_old_truncation"], row["text"]


CHATBIND_ADDED = {"v0": {"[PAD]": 32000, "<im_patch>": 32001, "<im_start>": 32002, "<im_end>": 32003},
                  "v1": {"<im_patch>": 32000, "<im_start>": 32001, "<im_end>": 32002}}


def chatbind_tokenizer(version):
    return data.Tokenizer(need(LLAMA_TOKENIZER, "LLAMA_TOKENIZER"), CHATBIND_ADDED[version])


def test_golden_chatbind_tokens_conversations():
    meta, _, _ = read_golden("chatbind/tokens")
    for c in meta["conversations"]:
        tok = chatbind_tokenizer(c["version"])
        system, template = data.SYSTEMS["chatbind"], data.TEMPLATES[{"v0": "llava_v0", "v1": "vicuna_v1_1"}[c["version"]]]
        if not c["use_im_start_end"]:
            system = M.replace(system, frame=("", "<im_patch>", ""))
        turns = []
        for row in c["source"]:
            texts = row["value"].split("<image>")
            turns.append([p for text in texts for p in (data.Medium("image"), text) if p != ""][1:])
        if c["sep_image_conv_front"]:
            turns = [data.media_in_front(turn, template) for turn in turns]
        got = data.render(turns, tok, system, template, lambda kind: max(c["repeat"], 1), train=True)
        assert got.ids == c["ids"]
        assert got.labels == c["labels"]


def test_golden_chatbind_tokens_prompts():
    meta, _, _ = read_golden("chatbind/tokens")
    templates, skipped = dict(data.TEMPLATES), []
    if (path := golden_file("chatbind/templates.json")).exists():
        templates = data.load_templates(path) | templates
    for p in meta["prompts"]:
        if p["template"] not in templates:
            skipped.append(p["template"])
            continue
        tok, system = chatbind_tokenizer(p["tokenizer"]), data.SYSTEMS["chatbind"]
        if not p["use_im_start_end"]:
            system = M.replace(system, frame=("", "<im_patch>", ""))
        media = [data.Medium("image")] if p["patches"] else []
        turn = [p["query"] + "\n" * bool(media), *media]
        got = data.render([turn, None], tok, system, templates[p["template"]], lambda kind: p["patches"])
        assert got.ids == p["ids"], p["template"]
        assert templates[p["template"]].stop == p["stop"]
    assert len(skipped) <= 2, skipped


BAD_NAMES = ["", "/etc/passwd", "../a.png", "a/../../b.png", "a/..", "..", "~/a.png", "~root/a", "C:\\a.png", "c:a.png",
             "a\\b.png", "..\\a.png", "a\0.png", "\\\\host\\a", None, 7, ["a.png"], {"a": 1}]
GOOD_NAMES = ["a.png", "b/c.png", "b/..c/d.png", "...", "a b.png", "ü/写.png", "a~b.png"]


def test_golden_nextgpt_process_batch():
    meta, _, t = read_golden("nextgpt/process_batch")
    for c in meta["cases"]:
        tok = nextgpt_tokenizer(c["tokens"])
        named = {"captions": c.get("texts", ()), "cases": {}}
        if c["fn"] == "stage_1":
            turns = [[[data.Medium("image"), c["prompt"]], [text]] for text in c["texts"]]
        elif c["fn"] == "stage_2":
            turns = [[[text], [text, data.Signal(datasets.WRITERS[c["modality"]])]] for text in c["texts"]]
        else:
            turns = nextgpt_turns(named, "", c)
        for i, sample in enumerate(turns):
            r = nextgpt_render(sample, tok)
            frame = "### Human: <Img>" if isinstance(sample[0][0], data.Medium) else "### Human: "
            start = len(tok.encode(frame, parse_special=True)) + (frame[-1] == ">")     # the original puts this in front later
            ids, labels = (row[start:][:c["max_len"]] for row in (r.ids, r.labels))
            pad = t[f"{c['name']}.input_ids"].shape[1] - len(ids)
            assert ids + [2] * pad == t[f"{c['name']}.input_ids"][i].tolist(), c["name"]
            assert labels + [-100] * pad == t[f"{c['name']}.targets"][i].tolist(), c["name"]
    for text, want in meta["process_caption"]:
        assert datasets.process_caption(text) == want


def test_golden_nextgpt_process_batch_tokens():
    meta, _, _ = read_golden("nextgpt/process_batch")
    for tokens, rows in meta["encode"].items():
        tok = nextgpt_tokenizer(tokens)
        for text, ids in rows.items():
            assert tok.encode(text, bos=False, parse_special=True) == ids, text
        assert [tok.decode(ids) for ids in meta["decode_ids"]] == meta["decode"][tokens]
    assert M.NEXTGPT_TOKENS == meta["added_tokens"]["published"]
    assert list(data.SYSTEMS["nextgpt"].added) == list(meta["added_tokens"]["fixed"])
    assert M.SIGNALS == data.SIGNALS


def test_golden_nextgpt_misc():
    meta, _, _ = read_golden("nextgpt/misc")
    for row in meta["sampler"]:
        n, world, rank = row["batch_size"], row["world_size"], row["rank"]
        got = datasets.in_turns(row["sizes"], n, row["torch_seed"])
        assert [batch[rank * n // world:(rank + 1) * n // world] for batch in got] == row["batches"]
    for row in meta["lr"]:
        total, stage = row["total_num_steps"], train.STAGES["nextgpt", 1]
        factor, share = train.SCHEDULES[stage.schedule], row["warmup_num_steps"] / total
        got = [row["warmup_max_lr"] * factor(k, total, share) for k in range(len(row["lr_used_by_update_k"]))]
        got[0] = row["optimizer_lr"]                            # Stage.first_lr
        assert got == pytest.approx(row["lr_used_by_update_k"], rel=1e-9, abs=1e-12)
    tok, stop = nextgpt_tokenizer(), data.TEMPLATES["nextgpt"].stop
    for row in (row for row in meta["stopping"] if len(row["stops"]) > 1 and row["encounters"] == 1):
        stream = data.TextStream(tok, [stop])
        for id in row["input_ids"]:
            stream.push(id)
        assert stream.done == (row["result"] is not False), row # else True, or the original fails on what came twice


def nextgpt_files(tmp_path, rows):
    """A root of NExT-GPT's layout with a data set file."""
    for folder in ("images", "audios", "embed"):
        (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / "images/a.jpg").touch()
    np.save(tmp_path / "embed/b.wav.npy", np.ones(5, np.float16))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return tmp_path / "rows.json"


def say(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


NEXTGPT_RECORDS = {                     # record, its turns: texts, an upper-case letter for a medium, lower for a signal
    "pair": ({"image_name": "a.jpg", "caption": "A *Dog*"}, [["I", "generate a caption"], ["a dog"]]),
    "textual": ({"image_name": "0000", "conversation": say("Hi", "Ho")}, [["Hi"], ["Ho"]]),
    "alpaca": ({"instruction": "Add: ", "input": "1 1", "output": "2"}, [["Add: 1 1"], ["2"]]),
    "pandagpt": ({"image_name": "a.jpg", "conversation": say("What?", "A dog", "Why?", "So")},
                 [["I", "What?"], ["A dog"], ["Why?"], ["So"]]),
    "llava": ({"image": "a.jpg", "conversations": say("<image>\nWhat?", "A dog")}, [["I", "What?"], ["A dog"]]),
    "t2m": ({"mm_name": "x/b.wav", "conversation": [{"from": "human", "value": "Bark", "input_modality": "text"},
             {"from": "gpt", "value": "Here.", "output_modality": "audio"}]}, [["Bark"], ["Here.", "a"]]),
    "t2m as made": ({"image_name": "b.wav", "conversation": [{"from": "human", "value": "Bark", "input_modality": "text"},
                     {"from": "gpt", "value": "Here.", "output_modality": "audio"}]}, [["Bark"], ["Here.", "a"]]),
    "later": ({"output_audio": "b.wav", "conversations": say("Bark", "Here <audio>")}, [["Bark"], ["Here", "a"]]),
    "mosit": ({"image_list": [{"image_name": "a.jpg", "caption": "a dog"}], "video_list": [],
               "audio_list": [{"audio_name": "b.wav", "caption": "woof"}],
               "conversation": say("What does <Image>a dog</Image> say?", "This: <Audio>woof</Audio>")},
              [["What does ", "I", " say?"], ["This: ", "a"]]),
}


@pytest.mark.parametrize("name", NEXTGPT_RECORDS)
def test_data_nextgpt_records(tmp_path, name, capsys):
    record, want = NEXTGPT_RECORDS[name]
    missing = json.loads(json.dumps(record).replace("a.jpg", "none.jpg").replace("b.wav", "none.wav"))
    made = datasets.Dialogs(nextgpt_files(tmp_path, [missing, record, {"conversation": say("alone")}]))
    assert (len(made) == 2) == (missing != record) == ("none." in capsys.readouterr().err)

    def letter(part):
        if isinstance(part, data.Medium):
            return part.kind[0].upper()
        return part if isinstance(part, str) else part.writer[0]
    turns = made[len(made) - 2].turns
    assert [[letter(part) for part in turn] for turn in turns] == want
    assert all(part.embeds.tolist() == [1] * 5 for turn in turns for part in turn if isinstance(part, data.Signal))
    with pytest.raises(data.DataError, match=r"rows.json: record .*alternate"):
        made[len(made) - 1]


@pytest.mark.parametrize("key, value", [("input_modality", "../up"), ("input_modality", "thermal"), ("value", 3), ("from", 0)])
def test_data_nextgpt_bad_records_are_named(tmp_path, key, value):
    rows = [{"image_name": name, "conversation": say("What?", "A dog")} for name in ("a.jpg", "../a.jpg")]
    rows[0]["conversation"][0][key] = value
    made = datasets.Dialogs(nextgpt_files(tmp_path, rows))
    for i in range(2):
        with pytest.raises(data.DataError, match=f"rows.json: record {i}"):
            made[i]
    (tmp_path / "embed/b.wav.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(data.MediaError, match="b.wav.npy"):
        datasets.read_embedding(tmp_path / "embed/b.wav.npy")


def test_data_nextgpt_samples():
    root = need(SHARED / "samples/nextgpt", "samples")
    for name in ("cc3m", "webvid", "audiocap"):
        for tail in ("", "_comprehension", "_generation"):
            for draw in (False, True):
                made = datasets.Dialogs(root / f"{name}{tail}.json", draw=draw)
                assert len(made) and all(len(made[i].turns) == 2 for i in range(len(made)))


def test_data_signals_that_are_cut_off_are_left_out():
    tok, embeds = nextgpt_tokenizer(), torch.zeros(3, 2)
    turns = [[[text], [text, data.Signal("img", embeds=embeds)]] for text in ("a dog", "a dog in a large house")]
    rows = [nextgpt_render(sample, tok) for sample in turns]
    whole, short = (data.collate(rows, lambda kind: 1, max_len=n).targets for n in (99, len(rows[0].ids)))
    assert whole["img"]["slots"].shape == (2, 8) and whole["img"]["embeds"].shape == (2, 3, 2)
    assert short["img"]["slots"][0].tolist() == [0] * 4 and len(short["img"]["embeds"]) == 1


def test_data_regions_of_packed_rows_lie_in_their_own_pictures():
    """Whatever is packed beside them, and pictures without regions between."""
    rows = []
    for i in range(4):
        picture, region = (data.Medium(kind, "", tensor=torch.full((2,), float(i))) for kind in ("image", "region"))
        rows.append(data.Rendered([7, 8, 9], [data.IGNORE, 8, 9], [(picture, 0), *[(region, 1)] * (i != 1)], []))
    for pack in (0, 6, 64):
        region = data.collate(rows, lambda kind: 1, pack=pack).media["region"]
        assert region["image_of"].tolist() == [0, 2, 3]


def test_data_media_go_to_the_front_past_boxes_and_signals():
    picture, box, signal, template = data.Medium("image"), data.Box((0, 0, 1, 1)), data.Signal("img"), data.TEMPLATES["vicuna_v1_1"]
    assert data.media_in_front(["What is ", box, " in ", picture], template) == [picture, " USER: ", "What is ", box, " in "]
    assert data.media_in_front(["What?\n", picture], template) == [picture, " USER: ", "What?"]
    for answer in (["Here: ", box, " ."], ["A dog", signal]):
        assert data.media_in_front(answer, template) == answer


@pytest.mark.parametrize("codec, name", [("aac", "a.m4a"), ("aac", "a.mp4"), ("aac", "a.3gp"), ("libopus", "a.webm")])
def test_data_recordings_without_pictures_are_sounds(codec, name, tmp_path):
    av = pytest.importorskip("av")
    with av.open(tmp_path / name, "w") as file:
        stream = file.add_stream(codec, rate=48000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4800), np.float32), format="fltp", layout="mono")
        frame.rate = 48000
        for part in [*av.AudioResampler(stream.format, "mono", 48000, stream.frame_size).resample(frame), None]:
            file.mux(stream.encode(part))
    assert data.sniff(tmp_path / name) == "audio" and data.read_media(tmp_path / name, "audio").isfinite().all()


def test_data_first_bytes_tell_the_kind(tmp_path):
    for start, kind in ((b"\0\0\0 ftypavif", "image"), (b"\0\0\0 ftypheic", "image"), (b"\0\0\0 ftypisom", "video"), (b"RIFF1234AVI ", "video"),
                        (b"\xff\xfa\x90\x44", "audio"), (b"\xff\xf9\x50\x80", "audio"), (b"RIFF1234WAVE", "audio"), (b"\xff\xfe{\0", "")):
        (tmp_path / "a").write_bytes(start)
        assert data.sniff(tmp_path / "a") == kind, start


@pytest.mark.parametrize("kind, good, bad", [("imu", (6, 9), (9, 6)), ("depth", (4, 5), (5,))])
def test_data_arrays_of_other_shapes_or_with_holes_are_refused(kind, good, bad, tmp_path):
    np.save(tmp_path / "good.npy", np.ones(good))
    assert data.read_media(tmp_path / "good.npy", kind).isfinite().all()
    for values in (np.ones(bad), np.where(np.arange(good[1]) == 2, np.nan, np.ones(good))):
        np.save(tmp_path / "bad.npy", values)
        with pytest.raises(data.MediaError, match="bad.npy: .*is expected"):
            data.read_media(tmp_path / "bad.npy", kind)


def test_data_odd_sample_rates_cost_no_more_than_others():
    t = torch.arange(11127) / 11127
    x, began = torch.sin(2 * torch.pi * 440 * t)[None], time.process_time()
    y = data.resample(x, 11127, 16000)
    want = torch.sin(2 * torch.pi * 440 * torch.arange(y.shape[1]) / 16000)
    assert time.process_time() - began < 1 and abs(y.shape[1] - 16000) < 9
    assert (y[0] - want)[100:4000].abs().max() < 0.2            # in step for a quarter of a second


def test_data_grey_of_16_bits_keeps_its_upper_8(tmp_path):
    grey = image(20, 30, 1)[..., 0]
    for name, pixels in (("a.png", grey), ("b.png", grey * np.uint16(256) + 99)):
        data.Image.fromarray(pixels).save(tmp_path / name)
    one, two = (np.asarray(data.read_image(tmp_path / name)) for name in ("a.png", "b.png"))
    assert (one == grey[..., None]).all() and (two == one).all()


def test_data_wavs_of_no_length_or_too_much_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_SECONDS", 60)
    for seconds in (0, 60, 61):
        with data.wave.open(str(tmp_path / f"{seconds}.wav"), "wb") as f:
            f.setnchannels(1), f.setsampwidth(1), f.setframerate(800)
            f.writeframes(bytes(800 * seconds))
    assert data.read_audio(tmp_path / "60.wav")[0].shape == (1, 48000)
    for name, match in ("61", "61.wav: longer than 1 minutes"), ("0", "0.wav: holds no sound"):
        with pytest.raises(data.MediaError, match=match):
            data.read_audio(tmp_path / f"{name}.wav")


def test_data_pcm_that_ends_too_soon_loses_its_last_sample_alone():
    raw = np.random.RandomState(0).bytes(48)
    for width, channels in itertools.product((1, 2, 3, 4), (1, 2)):
        whole, size = data.pcm(raw, width, channels), width * channels
        for cut in range(1, size + 1):
            assert torch.equal(data.pcm(raw[:-cut], width, channels), whole[:, :-1])


@pytest.mark.parametrize("codec", ["pcm_u8", "pcm_s16le", "pcm_s24le", "pcm_s32le", "pcm_f32le", "flac"])
def test_data_sounds_of_any_sample_size_are_read(codec, tmp_path):
    av, wave = pytest.importorskip("av"), np.random.RandomState(0).uniform(-1, 1, (2, 500)).astype(np.float32)
    with av.open(tmp_path / "a.mkv", "w") as file:
        stream = file.add_stream(codec, rate=8000, layout="stereo")
        frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="stereo")
        frame.rate = 8000
        for part in [*av.AudioResampler(stream.format, "stereo", 8000).resample(frame), None]:
            file.mux(stream.encode(part))
    x, rate = data.read_audio(tmp_path / "a.mkv")
    assert rate == 8000 and x.shape == (2, 500) and np.abs(x.numpy() - wave).max() < 0.01


def test_data_records_that_are_no_text_are_named(world, tmp_path):
    bad = [[{"from": "human", "value": "a"}, {"from": "gpt", "value": value}] for value in (7, None, ["b"], "\ud83d")]
    (tmp_path / "a.json").write_text(json.dumps([{"conversations": rows} for rows in bad]))
    tok = data.Tokenizer(world / "tokenizer.model", {}, True)
    sets, template = [data.Conversations(tmp_path / "a.json")], data.TEMPLATES["vicuna_v1_1"]
    for i in range(4):
        prepared = data.Prepared(sets, tok, data.SYSTEMS["plain"], template, lambda kind: 1, data.MediaSpec())
        with pytest.raises(data.DataError, match=f"a.json: record {i}"):
            prepared[i]


def test_data_draws_anew_in_each_epoch(world):
    rows = datasets.Rows(world / "RES_train.jsonl", "res", world)
    half, asked = datasets.Part(rows, 0.5), set()
    for epoch in range(9):
        half.epoch = epoch
        asked.add(half[0].turns[0][-1])
        assert half[0].turns[0][1:] == half[0].turns[0][1:]
    assert len(asked) > 1


def test_data_media_names_stay_inside_their_folder(tmp_path):
    for name in BAD_NAMES:
        with pytest.raises(data.DataError, match="relative paths"):
            data.safe_join(tmp_path, name)
    for name in GOOD_NAMES:
        assert data.safe_join(tmp_path, name).is_relative_to(tmp_path)


@pytest.mark.parametrize("split", ("train2014", "val2014", "train2017"))
def test_data_finds_pictures_of_coco_by_their_number(tmp_path, split):
    number, folder = "000000441147.jpg", tmp_path / split
    long = folder / (number if split == "train2017" else f"COCO_{split}_{number}")
    assert data.safe_join(folder, number) == data.safe_join(tmp_path, f"{split}/{number}") == long
    assert data.safe_join(folder, long.name) == long
    assert data.safe_join(folder, "0" * 300 + ".jpg").stem == "0" * 300         # and no look at the disk, which would fail
    folder.mkdir(), (folder / number).touch()
    assert data.safe_join(folder, number) == folder / number


BAD_RECORDS = {
    "tag without file": {"conversations": [("human", "<image> a"), ("gpt", "b")]},
    "file without tag": {"image": "a.png", "conversations": [("human", "a"), ("gpt", "b")]},
    "two tags": {"image": "a.png", "conversations": [("human", "<image><image>"), ("gpt", "b")]},
    "tag in the answer": {"image": "a.png", "conversations": [("human", "a"), ("gpt", "<image>")]},
    "two questions": {"conversations": [("human", "a"), ("human", "b")]},
    "no answer": {"conversations": [("human", "a")]},
    "nothing": {"conversations": []},
    "outside": {"image": "../a.png", "conversations": [("human", "<image>"), ("gpt", "b")]},
    "number for text": {"conversations": [("human", 7), ("gpt", "b")]},
    "no conversations": {"image": "a.png"},
}


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_data_bad_records_are_named(tmp_path, case):
    record = dict(BAD_RECORDS[case], id="r77")
    if "conversations" in record:
        record["conversations"] = [{"from": who, "value": text} for who, text in record["conversations"]]
    (tmp_path / "d.json").write_text(json.dumps([record]))
    with pytest.raises(data.DataError, match=r"d\.json: record 0 \(r77\)"):
        data.Conversations(tmp_path / "d.json")[0]


def test_data_broken_files_are_named(tmp_path):
    for name, text in (("a.json", "{"), ("b.jsonl", '{"a": 1}\n{'), ("c.json", '{"a": 1}'), ("d.json", "[" * 100000)):
        (tmp_path / name).write_text(text)
        with pytest.raises(data.DataError, match=re.escape(name)):
            data.Conversations(tmp_path / name)


def test_data_lines_in_a_json_file_are_read(tmp_path):
    row = {"question_id": 1, "image": "a.png", "text": "Is there a dog in the image?", "label": "yes"}
    (tmp_path / "coco_pope_random.json").write_text((json.dumps(row) + "\n") * 3)
    rows = datasets.Rows(tmp_path / "coco_pope_random.json", "pope", tmp_path)
    assert [rows[i].meta for i in range(3)] == [row] * 3


def test_data_files_are_read_once():
    for text in (b'[{"id": 1}]', b'{"id": 1}\n{"id": 2}\n'):
        end, pipe = os.pipe()
        os.write(pipe, text)
        os.close(pipe)
        assert data.read_records(f"/dev/fd/{end}")[0] == {"id": 1}
        os.close(end)


def test_data_files_with_a_mark_before_them_are_read(tmp_path):
    row = {"image_name": "a.png", "caption": "Ein Stück 写"}
    for name, text in (("a.json", json.dumps([row], ensure_ascii=False)), ("b.jsonl", json.dumps(row, ensure_ascii=False) + "\n")):
        for mark in (b"", b"\xef\xbb\xbf"):                    # some editors of Windows write it
            (tmp_path / name).write_bytes(mark + text.encode())
            assert data.read_records(tmp_path / name) == [row]


def test_data_media_limits(tmp_path):
    big = data.Image.new("1", (9000, 6000))
    big.save(tmp_path / "big.png")
    data.Image.new("1", (16000, 12000)).save(tmp_path / "huge.png")
    with pytest.raises(data.MediaError, match="huge.png: more than 50 million pixels"):
        data.read_image(tmp_path / "huge.png")
    data.Image.new("RGB", (20000, 1)).save(tmp_path / "thin.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "big.png").read_bytes()[:2000])
    (tmp_path / "note.png").write_text("not a picture")
    (tmp_path / "x.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile tone.wav\n")
    for name, kind in (("big.png", "image"), ("thin.png", "image"), ("cut.png", "image"), ("note.png", "image"), ("x.eps", "image"),
                       ("list.mp4", "video"), ("note.png", "audio"), ("none.png", "image"), ("note.png", "depth"), (".", "image")):
        with pytest.raises(data.MediaError, match=re.escape(str(tmp_path / name))):
            data.read_media(tmp_path / name, kind)
    for address in ("http://a.b/c.png", "file:///etc/passwd", "https://x", "concat:a|b", "data:image/png;base64,AAAA"):
        with pytest.raises(data.MediaError):
            data.read_media(address, "video")


@pytest.mark.slow
def test_data_damaged_media_raise_nothing_but_media_errors(tmp_path):
    r, samples = np.random.RandomState(0), SHARED / "samples"
    files = [need(samples / "nextgpt/images/001312382.jpg", "samples"), next((samples / "nextgpt/videos").glob("*.mp4"))]
    pytest.importorskip("av")
    data.Image.fromarray(image(30, 40, 1)).save(tmp_path / "a.gif")
    (tmp_path / "a.wav").write_bytes(b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0\x80>\0\0\0}\0\0\2\0\x10\0data\0\0\0\0")
    for path, kind in zip([*files, tmp_path / "a.gif", tmp_path / "a.wav"], ("image", "video", "video", "audio")):
        for i in range(12):
            raw = bytearray(path.read_bytes())
            for at in r.randint(0, min(len(raw), 3000), 1 + i):
                raw[at] = r.randint(256)
            (tmp_path / "damaged").write_bytes(raw[:r.randint(1, len(raw))] if i % 3 == 0 else raw)
            try:
                data.read_media(tmp_path / "damaged", kind)
            except data.MediaError as error:
                assert "damaged" in str(error)


def test_data_bad_samples_are_replaced_by_the_next(world, tmp_path):
    records = json.loads((world / "conversations.json").read_text())
    for i in (2, 3):
        records[i] = {**records[i], "conversations": []}
    (tmp_path / "d.json").write_text(json.dumps(records))
    tok = data.Tokenizer(world / "tokenizer.model", {name: 1000 + i for i, name in enumerate(data.IM)})
    def prepared(max_bad):
        return data.Prepared([data.Conversations(tmp_path / "d.json", world)], tok, data.SYSTEMS["tiny"], data.TEMPLATES["tiny"],
                             M.TINY.n_token, data.MediaSpec(**M.TINY.media), max_bad)
    few = prepared(2)
    assert few[2].ids == few[3].ids == few[4].ids and sorted(few.bad) == [2, 3]
    with pytest.raises(data.DataError, match="record 2 .*more than max_bad = 0"):
        prepared(0)[2]


def test_data_templates_equal_the_originals():
    path = need(golden_file("chatbind/templates.json"), "templates.json")
    theirs = data.load_templates(path)
    for name in theirs.keys() & data.TEMPLATES.keys():
        ours = M.replace(data.TEMPLATES[name], front="")
        assert ours == theirs[name], name
    assert len(theirs.keys() & data.TEMPLATES.keys()) >= 10


def test_data_tokenizer_is_that_of_the_model():
    path, cfg = HERE / "weights/tiny/tokenizer.model", M.read_config(HERE / "weights/tiny")
    tok = data.tokenizer_of(path, M.replace(cfg, bos=2))
    assert tok.encode("red")[0] == 2 and tok.decode([*tok.encode("red"), 5000]) == "red"        # of a spare row
    for rows, match in (300, "more tokens than the model, 300"), (9000, r"has \d+ tokens, the model 9000"):
        with pytest.raises(ValueError, match=match):
            data.tokenizer_of(path, M.replace(cfg, llm=M.replace(cfg.llm, vocab_size=rows)))


def test_data_tokenizer_newer_rule_and_decoding():
    meta, _, _ = read_golden_if_near("nextchat/conversation")
    ids = {f"<{name}>": id for name, id in meta["special_ids"].items() if id >= 32000}
    tok = data.Tokenizer(need(LLAMA_TOKENIZER, "LLAMA_TOKENIZER"), ids, legacy=False)
    for row in meta["tokenise"]:
        assert tok.encode(row["text"], parse_special=True) == row["ids"], row["text"]
        assert tok.encode(row["text"], bos=False, parse_special=True) == row["ids_no_bos"], row["text"]
    for row in meta["decode"]:
        assert tok.decode(row["ids"]) == row["skip_special"]


def test_data_text_stream_equals_whole_text():
    tok = data.Tokenizer(need(LLAMA_TOKENIZER, "LLAMA_TOKENIZER"))
    for text in ("A dog.", "写一句话 😀 👩‍👩‍👧 ok", "naïve ###Human: more", "## not yet # done", "tail ##"):
        ids, stream = tok.encode(text, bos=False), data.TextStream(tok, ("###",))
        shown = "".join(stream.push(id) for id in ids if not stream.done)
        assert shown + stream.flush() == text.split("###")[0] and stream.done == ("###" in text)
        assert "\ufffd" not in shown


# ---- Data: boxes, masks, NExT-Chat's sets

@lru_cache
def newer_tokenizer(added):
    return data.Tokenizer(need(LLAMA_TOKENIZER, "LLAMA_TOKENIZER"), dict(added), legacy=False)


def nextchat_tokenizer(meta):
    names = meta["special_ids"].keys() - {"bos", "eos", "pad", "unk"}
    return newer_tokenizer(tuple((f"<{name}>", meta["special_ids"][name]) for name in sorted(names)))


def unroll(runs):
    return [id for id, n in runs for _ in range(n)]


def nextchat_turns(rows, boxes):
    """Turns of the original's messages, in which `<at> <boxes>` stands for the boxes of the next list of numbers."""
    turns, picture = [], data.Medium("image", tensor=torch.zeros(1))
    for row in rows:
        groups, turns = iter(row.get("boxes_seq") or []), [*turns, []]
        for part in re.split("(<image>|(?:<at> )?<boxes>)", row["value"]):
            turns[-1] += [picture] if part == "<image>" else [data.Box(tuple(boxes[n])) for n in next(groups)] \
                if part.endswith("<boxes>") else [part] * (part != "")
    return turns


def nextchat_render(meta, turns, size, train=True, image_tokens=None):
    n_token = {"image": image_tokens or meta["image_tokens"], "box": 1}.get
    boxes = [part for turn in turns for part in turn or () if isinstance(part, data.Box)]
    data.place_boxes(boxes, data.Geometry(*size), data.MediaSpec())
    system = data.SYSTEMS["nextchat"]
    r = data.render(turns, nextchat_tokenizer(meta), system, data.TEMPLATES[system.template], n_token, train)
    return r, n_token, [box.tensor.tolist() for box, _ in r.slots if isinstance(box, data.Box)]


def floats(rows):
    return torch.tensor(rows).tolist()


def test_golden_nextchat_conversation():
    meta, _, _ = read_golden("nextchat/conversation")
    boxes_id, pad = meta["special_ids"]["boxes"], meta["special_ids"]["pad"]
    for c in meta["cases"]:
        turns = nextchat_turns(c["raw"], c["boxes_pixel"])
        r, n_token, boxes = nextchat_render(meta, turns, c["image_size"])
        assert r.ids == unroll(c["train"]["input_ids_rle"]), c["name"]
        assert r.labels == [data.IGNORE if id == boxes_id else id for id in unroll(c["train"]["labels_rle"])], c["name"]
        assert boxes == floats(c["train"]["loc_inputs"])
        assert [box.tensor.tolist() for box, _ in r.targets] == floats(c["train"]["loc_targets"])
        assert [data.IGNORE if id == pad else id for id in r.ids[1:]] == unroll(c["eval"]["labels_rle"])
        r, _, _ = nextchat_render(meta, [*turns[:-1], None], c["image_size"], train=False)
        assert r.ids == unroll(c["eval"]["input_ids_rle"]), c["name"]


def test_golden_nextchat_conversation_truncation():
    meta, _, _ = read_golden("nextchat/conversation")
    cases, specials = {c["name"]: c for c in meta["cases"]}, meta["special_ids"]
    for t in meta["truncation"]:
        c = cases[t["name"]]
        turns = nextchat_turns(c["raw"], c["boxes_pixel"])
        full, _, _ = nextchat_render(meta, turns, c["image_size"], image_tokens=t["image_tokens"])
        assert full.ids == t["full_input_ids"] and len(full.ids) == t["full_len"]
        protected = {specials[name] for name in ("im_patch", "im_start", "im_end", "at", "boxes")}
        r = data.truncate(full, t["truncation_size"], protected)
        assert r.ids == t["input_ids"]
        assert r.labels == [data.IGNORE if id == specials["boxes"] else id for id in t["labels"]]
        assert [r.ids[at] for box, at in r.slots if box.kind == "box"] == [specials["boxes"]] * len(t["loc_inputs"])
        assert {r.ids[at] for _, at in r.targets} <= {specials["at"]} and len(r.targets) == len(full.targets)


def test_golden_nextchat_conversation_demo_turns():
    meta, _, _ = read_golden("nextchat/conversation")
    for c in meta["interactive"]:
        text = c["text"] if "<image>" in c["text"] else "<image> " + c["text"]
        turns = nextchat_turns([{"value": text, "boxes_seq": c["boxes_seq"]}], c["boxes_pixel"])
        r, _, boxes = nextchat_render(meta, [*turns, None], c["image_size"], train=False)
        assert r.ids == unroll(c["input_ids_rle"]) and boxes == floats(c["loc_inputs"])
    for row in meta["parse_boxes"]:
        parts = data.box_references(row["text"])
        text = "".join("<at> <boxes>" if i % 2 else part for i, part in enumerate(parts))
        assert [text, parts[1::2]] == row["out"]
    for row in meta["decode"]:
        assert evaluate.unspace(nextchat_tokenizer(meta).decode(row["ids"])) == row["eval_text"]


def test_data_boxes_reach_the_batch_in_order():
    meta, _, _ = read_golden("nextchat/conversation")
    cases = [c for c in meta["cases"] if set(unroll(c["train"]["labels_rle"])) != {data.IGNORE}]
    rendered = [nextchat_render(meta, nextchat_turns(c["raw"], c["boxes_pixel"]), c["image_size"])[0] for c in cases]
    batch = data.collate(rendered, {"image": meta["image_tokens"], "box": 1}.get, max_len=4096, mask_pad=True)
    want = torch.tensor([box for c in cases for box in c["train"]["loc_inputs"]])
    assert torch.equal(batch.media["box"], want)
    assert torch.equal(batch.slots["box"].T, (batch.ids == meta["special_ids"]["boxes"]).nonzero())
    at = batch.targets["at"]
    assert torch.equal(at["boxes"], torch.tensor([box for c in cases for box in c["train"]["loc_targets"]]))
    assert torch.equal(at["slots"].T, ((batch.ids == meta["special_ids"]["at"]) & (batch.labels > 0)).nonzero())
    assert "masks" not in at and torch.equal(batch.attn_mask, batch.ids != meta["special_ids"]["unk"])


def test_golden_nextchat_preprocess():
    meta, _, t = read_golden("nextchat/preprocess")
    for i, c in enumerate(meta["cases"]):
        g, picture = data.Geometry(c["width"], c["height"]), data.Image.fromarray(t[f"{i}.image"].numpy())
        spec = data.MediaSpec(image_size=meta["full"][f"{i}.clip"][0][-1], square=True, sam_size=c["sam_tensor_shape"][-1])
        close(meta, t, f"{i}.square", torch.from_numpy(np.array(g.pad(picture))))
        close(meta, t, f"{i}.clip", data.image_tensor(picture, spec))
        close(meta, t, f"{i}.sam_resized_uint8", torch.from_numpy(data.sam_resize(picture, spec.sam_size)))
        sam, mask = data.sam_tensor(picture, spec), data.sam_mask(t[f"{i}.mask"].numpy(), spec.sam_size)
        close(meta, t, f"{i}.sam", sam)
        close(meta, t, f"{i}.sam_sum", sam.double().sum((1, 2)))
        close(meta, t, f"{i}.sam_abs_sum", sam.double().abs().sum((1, 2)))
        close(meta, t, f"{i}.sam_mask", mask[0], tol=0)
        assert g.to_frame(c["boxes_pixel"]).tolist() == c["boxes_normalised"]
        close(meta, t, f"{i}.boxes_restored", g.to_pixels(t[f"{i}.norm_boxes"]))
        logits = torch.nn.functional.interpolate(t[f"{i}.mask_logits_16"], (128, 128), mode="bilinear", align_corners=False)
        close(meta, t, f"{i}.mask_restored", g.masks_to_pixels(logits), tol=0)


def test_data_boxes_come_back_from_the_frame_for_any_picture_size():
    r = np.random.RandomState(5)
    for w, h in r.randint(1, 5000, (100, 2)).tolist():
        corners = np.sort(r.randint(0, (w + 1, h + 1), (50, 2, 2)), axis=1).reshape(-1, 4)
        g = data.Geometry(w, h)
        frame = g.to_frame(corners)
        assert (frame >= 0).all() and (frame <= 1).all()
        assert (g.to_pixels(frame) - torch.tensor(corners)).abs().max() < 1e-9
        assert torch.equal(g.to_pixels(frame.float()).round().long(), torch.tensor(corners))


def golden_format(case):
    """Our name of an original data set class with its arguments; None for what is left out (points, scene graphs)."""
    version = case["args"].get("version", "")
    if "<points>" in json.dumps(case["out"]) or "scene_graph" in case["args"] and version != "q-s":
        return None
    return {"CaptionDataset": "caption", "FlickrDataset": "flickr", "RECDataset": "rec", "REGDataset": "reg",
            "GCDataset": "gc", "RESDataset": "res", "VQAv2Dataset": "vqa", "POPEVQADataset": "pope", "V7W_POINT": "v7w",
            "VQAEXDataset": "vqa-e" if case["args"].get("is_e_dataset") else "vqa-x", "GPT4Gen": f"gpt4gen-{version}",
            "VCRDataset": f"vcr-{version}", "Point_QA_local": "pointqa-local", "InstructDataset": "llava",
            "Point_QA_twice": f"pointqa-twice-{version[:2]}", "GQADataset": f"gqa-{version[2:]}"}.get(case["type"])


def plain(turns):
    """Turns as lists of joined texts, box coordinates and "image", to be compared."""
    runs = [itertools.groupby(turn, key=lambda part: isinstance(part, str)) for turn in turns]
    return [[part for text, group in run for part in (["".join(group)] if text else
             [part.xyxy_px if isinstance(part, data.Box) else part.kind for part in group])] for run in runs]


def test_golden_nextchat_datasets():
    meta, _, _ = read_golden("nextchat/datasets")
    seen, still = set(), Thing(choice=lambda a: a[0], shuffle=lambda a: None)
    for case in filter(golden_format, meta["cases"]):
        name, prompt = golden_format(case), case["args"].get("template_string", "")
        rng = np.random.default_rng(7) if case["args"].get("do_shuffle_choice", True) else still
        for row, out in zip(case["rows"], case["out"], strict=True):
            got = datasets.to_sample(row, datasets.FORMATS[name], "", (prompt,), rng)
            want = nextchat_turns(out["conversations"], out.get("target", {}).get("boxes"))
            assert plain(got.turns) == plain(want), name
            masks = [part.mask for turn in got.turns for part in turn if getattr(part, "mask", None) is not None]
            assert [{"shape": list(m.shape), "sum": m.sum()} for m in masks] == out.get("target", {}).get("masks", [])
        seen.add(name)
    absent = {"recs", "regs", "rounds", "refcoco-rounds", "clevr-a", "clevr-s", "ground", "refer"}            # ours, and of no fixture
    assert seen == set(datasets.FORMATS) - set(datasets.CHATTERBOX) - absent


def test_golden_nextchat_mixture():
    meta, _, _ = read_golden("nextchat/mixture")
    for case in meta["cases"]:
        c = case["cfg"]
        sources = [[f"{s['tag']}{i}" for i in range(s["n"])] for s in c.get("cfgs", [c.get("cfg")])]
        got = {"SubSet": lambda: datasets.subset(sources[0], c["portion"], c.get("seed")),
               "ConcatDataset": lambda: sum(sources, []),
               "ConcatDatasetWithShuffle": lambda: datasets.shuffled(sources, c["seed"], c.get("portion", 1)),
               "InterleaveDateset": lambda: datasets.interleave(
                   sources, c.get("probabilities"), c["seed"], c.get("stopping_strategy") == "all_exhausted")}[c["type"]]()
        assert got == case["items"], c


def test_golden_nextchat_metrics_polygons():
    meta, _, t = read_golden("nextchat/metrics")
    for k, c in enumerate(meta["polygons"]):
        assert np.array_equal(datasets.segmentation_mask(c["poly"], c["h"], c["w"]), t[f"mask_{k}"]), k


def test_data_run_lengths_come_back():
    r = np.random.RandomState(1)
    for k in range(60):
        mask = (r.rand(*r.randint(1, 90, 2)) < r.rand()).astype(np.uint8) if k > 1 else np.full((300, 400), k, np.uint8)
        rle = datasets.mask_rle(mask)
        assert np.array_equal(datasets.rle_mask(rle), mask)
        assert np.array_equal(datasets.rle_mask({**rle, "counts": datasets.rle_counts(rle["counts"])}), mask)


def test_data_masks_equal_pycocotools():
    coco, r = pytest.importorskip("pycocotools.mask"), np.random.RandomState(2)
    for _ in range(100):
        h, w, n = r.randint(1, 70), r.randint(1, 70), r.randint(3, 9)
        xy = r.rand(n, 2) * (w * 1.4, h * 1.4) - (w * 0.2, h * 0.2)
        xy = xy.round(r.randint(3)).ravel().tolist()
        want = coco.frPyObjects([xy], h, w)[0]
        mask = datasets.segmentation_mask([xy], h, w)
        assert np.array_equal(mask, coco.decode(want)) and datasets.mask_rle(mask)["counts"] == want["counts"].decode()


GOOD_ROWS = {
    "rec": {"img_path": "a.png", "expression": "a dog", "bbox": [1, 2, 30, 40], "width": 50, "height": 60},
    "res": {"img_path": "a.png", "expressions": ["a dog"], "bbox": [1, 2, 30, 40], "width": 50, "height": 60,
            "mask": [[1, 2, 9, 2, 9, 30]]},
    "flickr": {"image_id": "7", "sentence": "<ph_st>a<ph_ed> b <ph_st>c<ph_ed>", "boxes": [[1, 2, 3, 4]],
               "boxes_seq": [[0], [0]]},
    "vcr-q-ra": {"img_fn": "a.png", "boxes": [[1, 2, 3, 4, 0.9]], "question": ["who", [0]], "answer_label": 1,
                 "answer_choices": [["x"]] * 4, "rationale_choices": [["y"]] * 4, "rationale_label": 2},
    "v7w": {"file_path": "a.png", "question": "which?", "candidates": [[1, 2, 3, 4], [2, 2, 9, 9]],
            "answer": [2, 2, 9, 9]},
    "gpt4gen-bc": {"img_path": "a.png", "boxes": [[1, 2, 3, 4]], "question": "why?", "question_boxes_seq": [],
                   "cot_with_ans": "<ph_st>it<ph_ed> is", "answer_boxes_seq": [[0]], "answer": "x"},
    "vqa-e": {"file_path": "a.png", "question": "what?", "explanation": ["so", 0.7], "multiple_answers": "x"},
    "pope": {"question_id": 1, "image": "a.png", "text": "is it?", "label": "yes"},
    "llava": {"image": "a.png", "conversations": [{"from": "human", "value": "<image> a"}, {"from": "gpt", "value": "b"}]},
    "vqa": {"image_path": "a.png", "question": "what?", "annotation": {"multiple_choice_answer": "x"}},
    "clevr-s": {"image_filename": "a.png", "question": "any?", "answer": "yes", "program": [
        {"inputs": [], "function": "scene", "value_inputs": []}, {"inputs": [0], "function": "filter_color", "value_inputs": ["red"]}]},
}
ABSENT, NAN, INF = object(), float("nan"), float("inf")
BAD_VALUES = {                          # (format, key) -> values that must be refused
    ("rec", "bbox"): [[1, 2, 3], [1, 2, 3, 4, 5], [], None, 7, "1,2,3,4", {"x": 1}, [1, 2, "3", 4], [[1, 2, 3, 4]], ABSENT,
                      [1, 2, NAN, 4], [1, 2, INF, 4], [-INF, 2, 3, 4], [10 ** 400, 2, 3, 4], [True, 2, 30, 40],
                      [30, 2, 1, 40], [1, 40, 30, 2], [-2, 2, 30, 40], [1, 2, 52, 40], [1, 2, 30, 61.5],
                      "__import__('os').system('true')"],
    ("rec", "expression"): [7, ABSENT],
    ("rec", "img_path"): ["../a.png", ABSENT, 1.5],
    ("res", "mask"): [[[1, 2, 9, 2]], [[1, 2, 9, 2, 9]], [[1, 2, 9, 2, 9, NAN]], [[1, 2, 9, 2, 9, 1e8]], [["a"] * 6], [7], 7,
                      [[[1, 2], [3, 4], [5, 6]]], ABSENT, [{"counts": [3000]}], [{"size": [60, 50], "counts": [3000, 1]}],
                      [{"size": [60, 50], "counts": "0"}], [{"size": [50, 60], "counts": [3000]}],
                      [{"size": [60, 50], "counts": [-1, 3001]}], [{"size": [10 ** 6] * 2, "counts": [10 ** 12]}],
                      [{"size": [60, 50], "counts": "\u00e9"}], [{"size": [60, 50], "counts": "P" * 50}]],
    ("res", "expressions"): [[], "a dog", [7]],
    ("res", "height"): [0, "60", 10 ** 9],
    ("flickr", "boxes_seq"): [[[0]], [[0], [1]], [[0], [-1]], [[0], 0], [[0], [0.0]]],
    ("flickr", "boxes"): [[[1, 2, 3, 4]] * 101, ABSENT, 7, [[1, 2, 3, 4, 5]]],
    ("vqa-e", "explanation"): [[], [7], "text"],
    ("flickr", "image_id"): ["/7"],
    ("vcr-q-ra", "question"): [["who", [1]], "who", [None]],
    ("vcr-q-ra", "answer_label"): [4, -1, True],
    ("vcr-q-ra", "rationale_label"): ["2"],
    ("vcr-q-ra", "answer_choices"): [[], "abcd"],
    ("vcr-q-ra", "boxes"): [[["a", 2, 3, 4]], [7], [[1, 2, 3]]],
    ("v7w", "answer"): [[2, 2, 9, 8], ABSENT],
    ("v7w", "candidates"): [[]],
    ("gpt4gen-bc", "answer_boxes_seq"): [[]],
    ("gpt4gen-bc", "cot_with_ans"): [None],
    ("pope", "label"): [True],
    ("pope", "image"): ["a\0.png"],
    ("llava", "conversations"): [[], [7]],
    ("vqa", "annotation"): [{"x": 1}],
    ("clevr-s", "program"): ["scene", [7], [{"function": "scene"}]],
}
BAD_ROWS = [(*where, value) for where, values in BAD_VALUES.items() for value in values]


def test_data_good_rows_are_read(tmp_path):
    for name, row in GOOD_ROWS.items():
        (tmp_path / "d.jsonl").write_text(json.dumps(row))
        sample, = datasets.Rows(tmp_path / "d.jsonl", name, tmp_path)
        assert "image" in plain(sample.turns)[0] and len(sample.turns) == 2


@pytest.mark.parametrize("number", range(len(BAD_ROWS)))
def test_data_bad_rows_are_named(tmp_path, number):
    name, key, value = BAD_ROWS[number]
    row = {k: v for k, v in (GOOD_ROWS[name] | {key: value}).items() if v is not ABSENT}
    (tmp_path / "d.jsonl").write_text(json.dumps(GOOD_ROWS[name]) + "\n" + json.dumps(row) + "\n")
    rows = datasets.Rows(tmp_path / "d.jsonl", name, tmp_path)
    assert len(rows) == 2 and rows[0]
    with pytest.raises(data.DataError, match=r"d\.jsonl: record 1 "):
        rows[1]


def test_data_bad_lines_are_named(tmp_path):
    lines = ["7", "[]", "null", '"x"', "{", "", "\xff", "[" * 100000, json.dumps({"img_path": "a" * (2 << 20)})]
    (tmp_path / "d.jsonl").write_bytes("\n".join(lines).encode("latin-1"))
    rows = datasets.Rows(tmp_path / "d.jsonl", "rec", tmp_path)
    assert len(rows) == len(lines)
    for i in range(len(lines)):
        with pytest.raises(data.DataError, match=rf"d\.jsonl: (record {i}|line {i + 1})\b"):
            rows[i]
    with pytest.raises(ValueError, match="vcr-q-ra"):
        datasets.Rows(tmp_path / "d.jsonl", "vcr-x", tmp_path)


def test_data_grounding_rows_reach_the_batch(tmp_path):
    meta, _, _ = read_golden("nextchat/conversation")
    data.Image.fromarray(image(60, 50, 1)).save(tmp_path / "a.png")
    rows = [GOOD_ROWS["res"] | {"bbox": [1, 2, 30, y]} for y in (40, 40.5)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    spec, n_token = data.MediaSpec(image_size=28, square=True, sam_size=64), {"image": 4, "box": 1}.get
    rows, tok = datasets.Rows(tmp_path / "d.jsonl", "res", tmp_path), nextchat_tokenizer(meta)
    prepared = data.Prepared([rows], tok, data.SYSTEMS["nextchat"], data.TEMPLATES["vicuna_v1_1"], n_token, spec,
                             where=lambda epoch: [(0, 1), (0, 0), (0, 1)])
    batch = data.collate([prepared[i] for i in range(3)], n_token)
    at = batch.targets["at"]
    assert batch.media["image"].shape == (3, 3, 28, 28) and at["image"].shape == (3, 3, 64, 64)
    assert at["masks"].shape == (3, 1, 64, 64) and set(at["masks"].unique().tolist()) == {0, 1}
    assert torch.equal(at["boxes"], batch.media["box"])
    assert torch.equal(at["boxes"], data.Geometry(50, 60).to_frame([[1, 2, 30, y] for y in (40.5, 40, 40.5)]).float())
    data.Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    with pytest.raises(data.DataError, match=r"d\.jsonl: record 0 .*outside"):
        prepared[1]


def test_data_prompts_lose_no_word(tmp_path):
    meta, _, _ = read_golden("nextchat/conversation")
    for prompts in (*datasets.PROMPTS.values(), *datasets.load_prompts("v0").values()):
        for prompt in prompts:
            ask = datasets.Ask((prompt,), data.Medium("image"), np.random.default_rng(0))
            turn = ask(expr=["the dog"], objs=[data.Box((1, 2, 3, 4))], question=["What is it?"])
            assert 0 not in nextchat_render(meta, [turn, None], (50, 50), train=False)[0].ids, prompt
    (tmp_path / "p.json").write_text(json.dumps({"v1": {"REC": ["<image> <expr>"]}}))
    assert datasets.load_prompts(tmp_path / "p.json") == datasets.PROMPTS | {"REC": ("<image> <expr>",)}
    (tmp_path / "template").mkdir()
    (tmp_path / "template/REC.json").write_text('["<image> <expr>"]')
    assert datasets.load_prompts(tmp_path / "template") == datasets.load_prompts(tmp_path / "p.json")
    bad = {"REC": ["<expr>"]}, {"REC": ["<image> <image>"]}, {"REC": ["<image> <exp>"]}, ["<image>"], {"v1": ["<image>"]}, {"REC": [5]}, {"REC": 5}
    for text in (*map(json.dumps, bad), "no JSON"):
        (tmp_path / "p.json").write_text(text)
        with pytest.raises(data.DataError, match=r"p\.json"):
            datasets.load_prompts(tmp_path / "p.json")


def test_data_text_in_records_stays_text(tmp_path):
    meta, _, _ = read_golden("nextchat/conversation")
    row = GOOD_ROWS["rec"] | {"expression": "<at> <boxes></s> {0} %s <image> <expr>"}
    prompts, rng = ("<image> Where is <expr>?",), np.random.default_rng(0)
    sample = datasets.to_sample(row, datasets.FORMATS["rec"], tmp_path, prompts, rng)
    assert plain(sample.turns)[0] == ["image", " Where is " + row["expression"] + "?"]
    r, _, _ = nextchat_render(meta, sample.turns, (50, 60))
    assert [r.ids.count(meta["special_ids"][name]) for name in ("at", "boxes", "eos")] == [1, 1, 1]


def test_data_mixtures_of_the_stages():
    names = "gc recvg vqa caption rec reg flickr vcr v7w gpt4gen gpt4gen-rd llava vqa-e vqa-x res".split()
    sources = {name: [(s, i) for i in range(60 + s)] for s, name in enumerate(names)}
    first, second, third = (datasets.MIXTURES["nextchat", stage](sources, 0, 0, 0) for stage in (1, 2, 3))
    assert len(first) == 60 // 20 + 61 // 10 + sum(range(62, 69)) and third == sources["res"]
    drawn = {names[s] for s, _ in second}
    assert drawn <= {*names} - {"recvg", "reg", "v7w", "res"} and len(set(second)) == len(second) > 50


def test_data_a_folder_of_published_files_is_mixed(world, tmp_path):
    shutil.copy(world / "RES_train.jsonl", tmp_path / "res3.jsonl")
    (tmp_path / "pictures").mkdir(), (tmp_path / "res").symlink_to(world)                   # where the pictures of `res` lie
    sets, where = datasets.open_mixture(("nextchat", 3), tmp_path, "", 4)
    assert where(0) == where(1) == [(0, i) for i in range(len(sets[0]))] and Path(sets[0][0].turns[0][0].path).is_file()
    with pytest.raises(FileNotFoundError, match="GC_genome196_train.jsonl"):
        datasets.open_mixture(("nextchat", 1), tmp_path, "", 4)
    with pytest.raises(ValueError, match="no mixture is known for stage 1 of tiny"):
        datasets.open_mixture(("tiny", 1), tmp_path, "", 4)
    assert {name.split(":")[0] for name in datasets.SOURCES.values()} <= datasets.FORMATS.keys()


def test_data_clevr_answers_with_its_steps(tmp_path):
    row = GOOD_ROWS["clevr-s"]
    (tmp_path / "CLEVR_train_questions.json").write_text(json.dumps({"info": {}, "questions": [row]}))
    plainly, stepwise = (datasets.Rows(tmp_path / "CLEVR_train_questions.json", f"clevr-{v}", tmp_path)[0] for v in "as")
    assert plain(plainly.turns)[1] == ["The answer is yes."]
    assert plain(stepwise.turns)[1] == ["scene -> filter_color:red[0] The answer is yes."]


def test_data_sets_are_found_and_asked_as_published():
    reasoned = {name for name, row in datasets.FORMATS.items() if row.prompts == "VQA_BCoT" and name.startswith("vcr")}
    assert reasoned == {"vcr-q-ra", "vcr-qc-ra", "vcr-qc-rac"}              # only these answers say why, with boxes
    assert datasets.SOURCES["res"] == "res:res3.jsonl" and datasets.SOURCES["llava"] == "llava:llava_instruct_150k.jsonl"


def test_data_long_samples_lose_words_but_no_boxes(world, tmp_path):
    record = {"image": "pictures/000000.png", "conversation": [{"from": who, "value": text} for who, text in (
        ("human", "Where is it? "), ("gpt", "It is there. " * 20 + "<it:[1, 2, 30, 40]>"))]}
    (tmp_path / "d.json").write_text(json.dumps({"data": [record]}))
    tok = data.Tokenizer(world / "tokenizer.model", {name: 1000 + i for i, name in enumerate(data.SYSTEMS["tiny"].added)})

    def prepared(max_len):
        return data.Prepared([datasets.Rows(tmp_path / "d.json", "rounds", world)], tok, data.SYSTEMS["tiny"],
                             data.TEMPLATES["tiny"], M.TINY.n_token, data.MediaSpec(**M.TINY.media), max_len=max_len)[0]
    whole, cut = prepared(1000), prepared(120)
    assert len(whole.ids) > 150 and len(cut.ids) == 120 and len(cut.targets) == len(cut.slots) - 1 == 1
    assert cut.ids[-2:] == [1003, 1004] and data.collate([cut], M.TINY.n_token).targets["at"]["slots"].tolist() == [[0], [118]]
    with pytest.raises(data.DataError, match="nothing to learn within max_len = 40"):
        prepared(40)


def test_data_mock_sample_has_a_box_to_say():
    meta, _, _ = read_golden("nextchat/conversation")
    system, n_token = data.SYSTEMS["nextchat"], {"image": 4, "box": 1}.get
    r = data.render(datasets.mock(28).turns, nextchat_tokenizer(meta), system, data.TEMPLATES[system.template], n_token, True)
    at = data.collate([r], n_token).targets["at"]
    assert at["boxes"].shape == (1, 4) and r.ids[at["slots"][1, 0]] == meta["special_ids"]["at"] and 0 not in r.ids


# ---- Data: regions, boxes to find, ChatterBox's sets

TALK_TABLES = Path(os.environ.get("CHATTERBOX_TEMPLATES", golden_file("chatterbox/templates.json")))
BOX_SYSTEM = data.SYSTEMS["chatterbox"]


class Recorded:
    """Draws what leads to a recorded text; boxes keep their order or are turned round; no late start, no name replaced."""

    def __init__(self, text="", turned=False):
        self.text, self.turned, self.at = text, turned, 0

    def choice(self, options):
        places = [(9e9, 0, options[0])]
        for option in map(str, options):
            found = re.compile("[^?]{0,40}".join(map(re.escape, option.split("<objs>")))).search(self.text, self.at)
            places += [(found.start(), -len(option), option)] if found else []
        at, _, option = min(places)
        self.at = min(at, len(self.text))
        return option

    def permutation(self, n):
        return np.arange(n)[::-1 if self.turned else 1]

    def integers(self, n):
        return 0

    def random(self):
        return 1


class First(Recorded):
    """Draws the first of everything; names are replaced."""

    def choice(self, options):
        return options[0]

    def random(self):
        return 0


def chatterbox_batch(meta, samples, sizes, train=True):
    """Samples about pictures of some sizes -> Rendered ones, their Batch."""
    config, system = meta["config"], BOX_SYSTEM
    tok = data.Tokenizer(need(LLAMA_TOKENIZER, "LLAMA_TOKENIZER"), config["ids"], system.legacy)
    n_token, rendered = {"image": config["image_tokens"], "region": 1}.get, []
    for turns, size in zip(samples, sizes, strict=True):
        parts = [part for turn in turns for part in turn or () if not isinstance(part, str)]
        data.place_boxes([p for p in parts if isinstance(p, data.Box)], data.Geometry(*size, square=False), data.MediaSpec())
        for picture in (p for p in parts if isinstance(p, data.Medium)):
            picture.tensor, picture.det = torch.zeros(3, 4, 4), torch.full((3, 6, 6), float(size[0]))
        rendered.append(data.render(turns, tok, system, data.TEMPLATES[system.template], n_token, train))
    return rendered, data.collate(rendered, n_token, max_len=config["model_max_length"]) if train else None


def chatterbox_samples(meta):
    """The four recorded batches: name -> [(format, record, recorded text, number of its picture)]."""
    chosen = {"grounding": ["cb-refcoco-gnd", "cb-coco-gnd"], "referring": ["cb-ref", "cb-refcoco-ref"],
              "vqa": ["llava-instruct", "cb-mrg"], "multiround": ["refcocog-regions", "vg-regions"]}
    files = {"refcocog entry": ("refcoco_json", 1), "vg entry": ("vg_json", 0)}
    for row in meta["rows"]:
        records = [datasets.by_picture(meta[files[s][0]])[files[s][1]] if isinstance(s, str) else s for s in row["source"]]
        yield row, [(name, record, text, int(re.search(r"\d+", record.get("image", record.get("file_name")))[0]))
                    for name, record, text in zip(chosen[row["name"]], records, row["text"], strict=True)]


def talks():
    return datasets.load_prompts(need(TALK_TABLES, "CHATTERBOX_TEMPLATES"))


def chatterbox_turns(name, record, text="", image_tokens=0):
    """The turns of a record, drawn so that they give the recorded text in one order of the boxes or the other."""
    format = datasets.FORMATS[name]
    prompts = talks()[format.prompts] if format.prompts else ()
    both = [datasets.to_sample(record, format, "", prompts, Recorded(text, turned)).turns for turned in (False, True)]
    return next((turns for turns in both if prompt_text(turns, image_tokens) == text), both[0])


def prompt_text(turns, image_tokens):
    """A talk as the fixtures show it."""
    names = {"image": f"<im_start>{{{image_tokens} x <im_patch>}}<im_end>", "region": "<bbox>", "find": "[VG]"}
    said = ["".join(part if isinstance(part, str) else names[part.kind] for part in turn) for turn in turns]
    (a, b), (c, d) = data.TEMPLATES["vicuna_v1_1"].user, data.TEMPLATES["vicuna_v1_1"].bot
    return data.TEMPLATES["vicuna_v1_1"].system + "".join((c if i % 2 else a) + x + (d if i % 2 else b) for i, x in enumerate(said))


def test_golden_chatterbox_data_batches():
    meta, _, t = read_golden("chatterbox/data")
    for row, samples in chatterbox_samples(meta):
        kept = json.dumps([record for _, record, _, _ in samples])
        turns = [chatterbox_turns(*sample[:3], meta["config"]["image_tokens"]) for sample in samples]
        assert json.dumps([record for _, record, _, _ in samples]) == kept, "a record was edited"
        assert [prompt_text(turn, meta["config"]["image_tokens"]) for turn in turns] == row["text"]
        rendered, batch = chatterbox_batch(meta, turns, [t[f"in.image{i}"].shape[1::-1] for *_, i in samples])
        name = f"out.{row['name']}."
        assert torch.equal(batch.ids, t[name + "input_ids"].long()) and list(batch.ids.shape) == row["length"]
        assert torch.equal(batch.labels, t[name + "labels"].long())
        assert torch.equal(torch.arange(batch.ids.shape[1]) < torch.tensor([[len(r.ids)] for r in rendered]), t[name + "attention_mask"])
        regions = [[i, at] for i, places in enumerate(row["bbox_positions"]) for at in places]
        assert regions == batch.slots.get("region", torch.empty(2, 0)).T.tolist()
        if regions:
            got, want = batch.media["region"], torch.tensor([box for boxes in row["regions_xyxy"] for box in boxes])
            assert torch.equal(got["boxes"], want) and got["image"] is batch.media["image"]
            assert got["image_of"].tolist() == [i for i, _ in regions]
        asked = [[i, at] for i, places in enumerate(row["vg_positions"]) for at in places]
        assert bool(asked) == ("vg" in batch.targets)
        if asked:
            got, want = batch.targets["vg"], torch.tensor([boxes[0][0] for boxes in row["gt_cxcywh"]])
            assert got["slots"].T.tolist() == asked and (got["boxes_cxcywh"] - want).abs().max() < 1e-6
            assert got["image"][:, 0, 0, 0].tolist() == [t[f"in.image{i}"].shape[1] for *_, i in samples]


def test_golden_chatterbox_data_regions_of_coco_sets():
    meta, _, t = read_golden("chatterbox/data")
    for name, case in meta["opensource_examples"].items():
        file = meta.get(f"{name.removesuffix('30k')}_json", meta["refcoco_json"])
        record, = (r for r in datasets.by_picture(file) if r["file_name"] == case["file"])
        turns = chatterbox_turns(f"{name}-regions", record, case["text"], meta["config"]["image_tokens"])
        assert prompt_text(turns, meta["config"]["image_tokens"]) == case["text"]
        _, batch = chatterbox_batch(meta, [turns], [(record["width"], record["height"])])
        assert torch.equal(batch.media["region"]["boxes"], torch.tensor(case["boxes"])), name
        assert [part.stretch for part in turns[0] if isinstance(part, data.Medium)] == [True]


def test_golden_chatterbox_data_pictures(tmp_path):
    meta, _, t = read_golden("chatterbox/data")
    pictures = [data.Image.fromarray(t[f"in.image{i}"].numpy()) for i in range(len(meta["inputs"]))]
    n, size, side = *meta["full"]["out.grounding.images_clip"][0][::2], meta["full"]["out.grounding.images_0"][0][-1]
    spec = data.MediaSpec(image_size=size, det_size=side)
    close(meta, t, "out.grounding.images_clip", torch.stack([data.image_tensor(p, spec) for p in pictures[:n]]))
    close(meta, t, "out.grounding.images_0", data.det_tensor(pictures[0], spec))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (data.SAM_MEAN, data.SAM_STD))
    pixels = (data.det_tensor(pictures[0], spec) * std + mean).round()
    close(meta, t, "out.grounding.images_uint8_0", pixels, tol=0)
    picture = tmp_path / "a.png"
    pictures[meta["multiround_image_index"]].save(picture)
    medium = data.Medium("image", str(picture), stretch=True)
    data.load_medium(medium, spec)
    close(meta, t, "out.multiround.image", medium.tensor)


def test_golden_chatterbox_data_tokenizer_and_prompts():
    meta, _, _ = read_golden("chatterbox/data")
    tok = data.Tokenizer(need(LLAMA_TOKENIZER, "LLAMA_TOKENIZER"), meta["config"]["ids"], BOX_SYSTEM.legacy)
    assert {token: id for token, id in zip(BOX_SYSTEM.added, range(32000, 32005))} == meta["config"]["ids"]
    for row in meta["tokenizer_chunks"]:
        assert tok.encode(row["text"], parse_special=True) == row["ids"], row["text"]
    assert talks()["talk-coco"].prefix.count(", ".join(meta["coco_classes"])) == 1
    for case in meta["eval_prompts"]:
        said = re.search(r"<im_end>( .*) ASSISTANT:", case["text"])[1]
        kinds = {"[VG]": "find", "<bbox>": "region"}
        parts = [data.Box((1, 2, 3, 4), kind=kinds[p]) if p in kinds else p for p in re.split(r"(\[VG\]|<bbox>)", said) if p]
        (r,), _ = chatterbox_batch(meta, [[[data.Medium("image"), *parts], None]], [(9, 9)], train=False)
        assert [id for id in r.ids if id != meta["config"]["ids"]["<im_patch>"]] == case["ids_without_patches"]
        assert len(r.ids) == case["length"] and not r.targets and "find" not in [x.kind for x, _ in r.slots]


def test_data_media_need_a_token_to_stand_at():
    """A LLaVA has a reader of pictures, but none of the tokens that ChatterBox adds to it."""
    turns, args = [[data.Medium("image")], None], (data.SYSTEMS["plain"], data.TEMPLATES["tiny"], lambda kind: 1)
    path, added = HERE / "weights/tiny/tokenizer.model", {"<im_patch>": 600, "<im_start>": 601, "<im_end>": 602}
    assert len(data.render(turns, data.Tokenizer(path, added), *args).slots) == 1
    with pytest.raises(ValueError, match="no token <im_patch>"):
        data.render(turns, data.Tokenizer(path), *args)


def test_data_stretch_is_within_a_level_of_smooth_interpolation():
    r = np.random.RandomState(0)
    for h, w, size in ((60, 80, 24), (9, 50, 31), (1, 1, 5), (40, 40, 40)):
        pixels = r.randint(0, 256, (h, w, 3)).astype(np.uint8)
        smooth = torch.nn.functional.interpolate(torch.from_numpy(pixels).permute(2, 0, 1)[None].float(), (size, size), mode="bilinear")
        got = torch.from_numpy(data.stretch(pixels, size)).permute(2, 0, 1).float()
        assert (got - smooth[0]).abs().max() < 1.01 and (h != size or torch.equal(got, smooth[0]))


def test_data_chatterbox_chain_asks_at_the_first_single_box():
    meta, _, _ = read_golden("chatterbox/data")
    record, = meta["files"]["CB_LC"]
    for name in ("cb-lc-gnd", "cb-gnd"):
        turns = datasets.to_sample(record, datasets.FORMATS[name], "", (), First()).turns
        assert [part.kind for turn in turns for part in turn if not isinstance(part, str)] == ["image", "find"]
        first = re.search(r"\[(.*?)\]", record["conversation"][1]["value"])[1]
        assert turns[-2][-1].xyxy_px == tuple(map(float, first.split(","))) and len(turns) == 2


def test_data_chatterbox_names_give_way_to_regions():
    said = (("human", "What is on the table? <table:[0, 30, 80, 60]>"),
            ("gpt", "A vase is on the table. <vase:[33, 10, 50, 31]>"))
    record = {"image": "0.png", "conversation": [{"from": who, "value": text} for who, text in said]}
    turns = datasets.to_sample(record, datasets.FORMATS["cb-mrg-ref"], "", (), First()).turns
    assert [part if isinstance(part, str) else part.kind for turn in turns for part in turn] == [
        "image", "\n ", "What is on the region ", "region", " ? ", "A vase is on the region. "]
    assert plain(chatterbox_turns("cb-mrg-ref", record)) == plain(chatterbox_turns("cb-mrg", record))


def test_data_chatterbox_rounds_have_boxes_where_they_are_spoken_of():
    said = (("human", "Is <it> on <region>? <cup:[1, 2, 3, 4], table:[0, 2, 9, 9]>"), ("gpt", "No."),
            ("human", "What near cups is the cup? <cup:[1, 2, 3, 4], hat:[1, 2, 3, 4]>"), ("gpt", "Here. <cup:[1, 2, 3, 4]>"))
    record = {"image": "0.png", "conversation": [{"from": who, "value": text} for who, text in said]}
    turns = datasets.to_sample(record, datasets.FORMATS["rounds"], "", (), First()).turns
    assert [part if isinstance(part, str) else part.kind for turn in turns for part in turn] == [
        "image", "\n ", "Is it ", "box", " ", " on region ", "box", " ", "? ", "No.", "What near cups is the cup", "box", "? ", "box", "Here. ", "box"]


GOOD_TALK = {"image": "a.png", "conversation": [{"from": "human", "value": "Where is <it>? <cup:[1, 2, 30, 40]>"},
                                                {"from": "gpt", "value": "Here. <cup:[1, 2, 30, 40]>"}]}
GOOD_COCO = {"images": [{"id": 1, "file_name": "a.png", "width": 50, "height": 60, "caption": "a small red cup"}],
             "annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 29, 38], "tokens_positive": [[2, 7]], "caption": "a cup"}],
             "categories": [{"id": 1, "name": "cup"}]}
BAD_TALKS = [("gpt", f"Here. <cup:[{box}]>") for box in ("1, 2, 3", "1, 2, 3, 4, 5", "1, 2, a, 4", "1, 2, nan, 4", "1, 2, inf, 4", "30, 2, 1, 4",
             "-9, 2, 3, 4", "__import__('os').system('true')", "[1, 2], 3, 4")] + [
    ("gpt", 7), ("gpt", None), ("human", []), ("human", {"x": 1}), ("human", "Where is it? <cup:[1, 2]>")]
BAD_COCO = [("images", {key: value}) for key, value in (("width", "50"), ("height", None), ("caption", 7), ("file_name", "../a.png"))] + [
    ("annotations", {key: value}) for key, value in (
        ("bbox", [1, 2, 3]), ("bbox", [1, 2, 300, 3]), ("bbox", [1, 2, -3, 3]), ("bbox", "1234"), ("tokens_positive", []),
        ("tokens_positive", [[2, 70]]), ("tokens_positive", [["a", "b"]]))]


@pytest.mark.parametrize("who, value", BAD_TALKS)
def test_data_bad_talks_are_named(tmp_path, who, value):
    rows = [row | {"value": value} if row["from"] == who else row for row in GOOD_TALK["conversation"]]
    (tmp_path / "d.json").write_text(json.dumps({"data": [GOOD_TALK, GOOD_TALK | {"conversation": rows}]}))
    for name in ("cb-coco-gnd", "cb-ref"):
        sets = datasets.Rows(tmp_path / "d.json", name, tmp_path)
        assert len(sets) == 2 and sets[0]
        with pytest.raises(data.DataError, match=r"d\.json: record 1 "):
            sets[1]


@pytest.mark.parametrize("where, value", BAD_COCO)
def test_data_bad_coco_sets_are_named(tmp_path, where, value):
    (tmp_path / "d.json").write_text(json.dumps(GOOD_COCO | {where: [GOOD_COCO[where][0] | value]}))
    (tmp_path / "good.json").write_text(json.dumps(GOOD_COCO))
    assert len(datasets.Rows(tmp_path / "good.json", "flickr30k-regions", tmp_path)[0].turns) == 4
    with pytest.raises(data.DataError, match=r"d\.json: record 0 "):
        datasets.Rows(tmp_path / "d.json", "flickr30k-regions", tmp_path)[0]


def test_data_files_of_another_layout_are_named(tmp_path):
    for text in ("7", "{}", '{"data": 7}', '{"images": [], "annotations": [7], "categories": []}', '{"images": 7, "annotations": [], '
                 '"categories": []}', "{"):
        (tmp_path / "d.json").write_text(text)
        for name in ("cb-ref", "vg-regions"):
            with pytest.raises(data.DataError, match=r"d\.json: "):
                datasets.Rows(tmp_path / "d.json", name, tmp_path)
    (tmp_path / "t.json").write_text('{"placeholder": "x", "refcoco": {}, "coco": {"prefix": 7}}')
    with pytest.raises(data.DataError, match=r"t\.json: coco"):
        datasets.load_prompts(tmp_path / "t.json")


def test_data_unfit_records_are_passed_over_uncounted(tmp_path):
    meta, _, _ = read_golden("chatterbox/data")
    data.Image.fromarray(image(60, 50, 1)).save(tmp_path / "a.png")
    bare = GOOD_TALK | {"conversation": [{"from": "human", "value": "Where is it?"}, {"from": "gpt", "value": "Nowhere."}]}
    (tmp_path / "d.json").write_text(json.dumps({"data": [bare, bare, GOOD_TALK]}))
    tok, n_token = data.Tokenizer(need(LLAMA_TOKENIZER, "LLAMA_TOKENIZER"), meta["config"]["ids"]), {"image": 4, "region": 1}.get
    sets = [datasets.open_set(f"{name}:{tmp_path}/d.json") for name in ("cb-coco-gnd", "cb-ref")]
    spec = data.MediaSpec(image_size=28, det_size=32)
    prepared = data.Prepared(sets, tok, BOX_SYSTEM, data.TEMPLATES["vicuna_v1_1"], n_token, spec)
    batch = data.collate([prepared[i] for i in (0, 3)], n_token)
    vg, region, want = batch.targets["vg"], batch.media["region"], torch.tensor([1 / 50, 2 / 60, 30 / 50, 40 / 60])
    assert vg["image"].shape == (1, 3, 32, 32) and vg["slots"][0].tolist() == [0] and not prepared.bad
    assert torch.equal(region["boxes"], want[None]) and region["image_of"].tolist() == [1] and len(region["image"]) == 2
    corners = torch.cat([vg["boxes_cxcywh"][0, :2] - vg["boxes_cxcywh"][0, 2:] / 2, vg["boxes_cxcywh"][0, :2] + vg["boxes_cxcywh"][0, 2:] / 2])
    assert (corners - want).abs().max() < 1e-6
    (tmp_path / "d.json").write_text(json.dumps({"data": [bare]}))
    with pytest.raises(data.DataError, match=r"d\.json: no usable"):
        data.Prepared([datasets.open_set(f"cb-coco-gnd:{tmp_path}/d.json")], tok, BOX_SYSTEM, None, n_token, spec)[0]


def test_data_boxes_follow_a_picture_that_moves():
    for seed in range(40):
        xyxy = 60, 80, 120, 180
        picture, box, still = data.Medium("image"), data.Box(tuple(xyxy)), torch.zeros(3, 224, 224)
        still[:, xyxy[1]:xyxy[3], xyxy[0]:xyxy[2]] = 9
        datasets.move(picture, [box], 224, 224, np.random.default_rng(seed))
        x1, y1, x2, y2 = map(round, box.xyxy_px)
        seen = data.moved(still, picture.shift, picture.flip)
        assert (seen[:, y1:y2, x1:x2] == 9).all() and (seen == 9).sum() == 3 * 60 * 100
        assert (seen.min() < -1) == any(picture.shift)          # what comes in is black
    edge = data.Box((0, 0, 3, 3))
    assert all(datasets.move(picture, [edge], 224, 224, np.random.default_rng(i)) is None and edge.xyxy_px[2] >= 2 for i in range(9))


def test_data_chatterbox_mixtures_keep_their_rates(monkeypatch):
    names = [*datasets.GROUNDING, *datasets.REFERRING, *datasets.TALKING]
    assert set(names) == set(datasets.CHATTERBOX)
    sources = {name: [(s, i) for i in range(5)] for s, name in enumerate(names)}
    first = np.bincount([s for s, _ in datasets.MIXTURES["chatterbox", 1](sources, 1, 0, 0)])
    monkeypatch.setattr(datasets, "STEPS", 10)
    for stage in (1, 2):                                        # each epoch draws anew, and as many
        one, same, two = (datasets.MIXTURES["chatterbox", stage](sources, 20, 0, epoch) for epoch in (0, 0, 1))
        assert one == same != two and len(one) == len(two)
    assert np.abs(first / 3000 - np.array([*datasets.GROUNDING.values()]) / 15).max() < 0.03 and len(first) == 4
    kinds = [set(np.searchsorted([4, 13], [s for s, _ in batch], side="right")) for batch in np.array(
        datasets.MIXTURES["chatterbox", 2](sources, 20, 0, 0)).reshape(-1, 20, 2).tolist()]
    assert [kind for kind, in kinds].count(0) == 10 and [kind for kind, in kinds][5:6] + [kind for kind, in kinds][-2:] == [2, 1, 2]


# ---- Convert

MANIFESTS = Path(os.environ.get("MANIFESTS", SHARED / "manifests"))
IM_TOKENS = {"<im_patch>": 120, "<im_start>": 121, "<im_end>": 122}
TINY_LLAMA = dict(model_type="llama", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=88,
                  max_position_embeddings=64, rms_norm_eps=1e-5, vocab_size=120)


def llama_state(rows=120, seed=0, norm=1.0, dim=32, n_layer=2, projector=0):
    """fp16 weights under public names; norm 0 makes it look like a delta."""
    r, mlp = np.random.RandomState(seed), 88
    layer = {f"self_attn.{x}_proj": (dim, dim) for x in "qkvo"} | {
        "mlp.gate_proj": (mlp, dim), "mlp.up_proj": (mlp, dim), "mlp.down_proj": (dim, mlp), "input_layernorm": (dim,),
        "post_attention_layernorm": (dim,)}
    shapes = {"model.embed_tokens": (rows, dim), "model.norm": (dim,), "lm_head": (rows, dim)} | {
        f"model.layers.{i}.{name}": shape for i in range(n_layer) for name, shape in layer.items()}
    shapes |= {"model.mm_projector": (dim, projector)} if projector else {}
    out = {f"{k}.weight": torch.from_numpy(r.randn(*s) * 0.02 + norm * (len(s) == 1)).half() for k, s in shapes.items()}
    return out | ({"model.mm_projector.bias": torch.ones(dim).half()} if projector else {})


def put(folder, state, config=TINY_LLAMA, layout="single", tokens=None):
    """Write a checkpoint folder in one of the layouts seen in the wild; returns what to name on the command line."""
    folder.mkdir(parents=True)
    for name, values in {"config.json": config, "added_tokens.json": tokens}.items():
        if values:
            (folder / name).write_text(json.dumps(values))
    keys, (form, *more) = sorted(state), layout.split()
    halves = {"1": keys[::2], "2": keys[1::2]} if more else {"1": keys}
    names = {"single": "model", "bin": "pytorch_model", "pth": "any", "old": "any", "ckpt": "any"}
    files = [f"{names[form]}-{i}.{'safetensors' if form == 'single' else 'bin'}" for i in halves] if more else \
        [f"{names[form]}.{dict(single='safetensors', old='pth').get(form, form)}"]
    for file, part in zip(files, halves.values()):
        part = {k: state[k] for k in part}
        if form == "single":
            save_file(part, folder / file)
        else:
            torch.save({"state_dict": part, "step": 3} if form == "ckpt" else part, folder / file,
                       _use_new_zipfile_serialization=form != "old")
    if more == ["index"]:
        (folder / f"{names[form]}.{'safetensors' if form == 'single' else 'bin'}.index.json").write_text(
            json.dumps({"weight_map": {k: file for file, part in zip(files, halves.values()) for k in part}}))
    return [folder / file for file in files] if more == ["files"] else [folder]


def refused(*args, match="", code=2, **more):
    """The message with which a conversion is refused: one line, the right exit status."""
    with pytest.raises(cw.Refused, match=match) as caught:
        cw.convert(*args, **more)
    assert "\n" not in str(caught.value) and caught.value.code == code, (caught.value.code, str(caught.value))
    return str(caught.value)


def export(folder, out):
    cw.write(cw.plan_export(folder), out, [folder])


def cli(*args):
    return subprocess.run([sys.executable, HERE / "convert_weights.py", *map(str, args)], capture_output=True, text=True)


def same(a, b):
    """Two folders hold the same tensors, bit by bit, and the same config."""
    a, b = ({k: t for file in sorted(x.glob("*.safetensors")) for k, t in load_file(file).items()} for x in (a, b))
    assert a.keys() == b.keys()
    assert [k for k in a if a[k].dtype != b[k].dtype or not torch.equal(a[k], b[k])] == []


def header_only(name, path, fill=()):
    """A sparse safetensors file of a manifest's shapes: full size, no data but ones in the norms."""
    manifest = json.loads(need(MANIFESTS / f"{name}.json", name).read_text())
    codes = {str(dtype).split(".")[1]: (code, dtype.itemsize) for code, dtype in M.DTYPES.items()}
    header, end = {}, 0
    for key, (shape, dtype) in manifest.items():
        start, end = end, end + int(np.prod(shape)) * codes[dtype][1]
        header[key] = {"dtype": codes[dtype][0], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + end)
        for key in (k for k in manifest if k.endswith("norm.weight") and fill):
            f.seek(8 + len(text) + header[key]["data_offsets"][0])
            f.write(np.ones(manifest[key][0], np.float16).tobytes())
    return manifest


def test_golden_chatbind_delta(tmp_path):
    meta, weights, t = read_golden("chatbind/delta")
    base, target = ({k: x.half() for k, x in weights[name].items()} for name in ("base", "target"))
    delta = {k: x.clone() for k, x in target.items()}
    for k, x in base.items():
        delta[k][:len(x)] -= x
        close(meta, t, f"delta.{k}", delta[k], 0)
    config = {k: v for k, v in meta["config"].items() if "vocab" not in k}
    tokens = {name: meta["config"]["base_vocab"] + i for i, name in enumerate(M.CHATBIND_TOKENS)}
    sources = put(tmp_path / "base", base, config) + put(tmp_path / "delta", delta, config, tokens=tokens)
    assert (done := cli(*sources, "--out", tmp_path / "out")).returncode == 0, done.stderr
    back = {ours: theirs for theirs, ours in ((k, cw.translate(k, cw.CHATBIND)) for k in target)}
    for name, x in load_file(tmp_path / "out/model.safetensors").items():
        close(meta, t, f"restored.{back[name]}", x, 0)
    assert M.read_config(tmp_path / "out").added_tokens == tokens


PUBLIC = {"vicuna-7b-v1.5": (), "vicuna-7b-v0": (), "llama-2-13b-hf": (), "clip-vit-large-patch14-336": (),
          "clip-vit-large-patch14": (), "imagebind_huge": (), "chatbind-7b": ("imagebind_huge",),
          "chatbind-7b-vocab32003": ("imagebind_huge",), "chatbind-7b-delta": ("vicuna-7b-v1.5", "imagebind_huge"),
          "nextgpt_7b_tiva_v0": ("vicuna-7b-v0", "imagebind_huge"),
          "nextgpt_delta_stage12": ("vicuna-7b-v0", "imagebind_huge"), "nextchat-7b-336": (),
          "llava-llama-2-13b-chat-lightning-preview": ("clip-vit-large-patch14",),
          "chatterbox_stage2": ("clip-vit-large-patch14",)}


@pytest.mark.parametrize("name", PUBLIC)
def test_convert_public_keys(tmp_path, name):
    """Each key of a public checkpoint matches one row, each tensor of ours comes from one key of the right shape."""
    keys = {}
    for source in (name, *PUBLIC[name]):
        (tmp_path / source).mkdir()
        fill = "delta" not in source
        keys[source] = header_only(source, tmp_path / source / "model.safetensors", fill).keys()
        for key in keys[source]:
            table = cw.TABLES.get(cw.kind_of(keys[source]), cw.TABLE)
            assert sum(cw.compiled(row[0])[0].fullmatch(key) is not None for row in table) == 1
    if "llava" in name:
        (tmp_path / name / "config.json").write_text(json.dumps(TINY_LLAMA | dict(
            model_type="llava", hidden_size=5120, num_hidden_layers=40, num_attention_heads=40, intermediate_size=13824)))
    if "32003" in name:
        (tmp_path / name / "added_tokens.json").write_text(json.dumps({k: i + 32000 for i, k in enumerate(IM_TOKENS)}))
    plan = cw.plan_weights([tmp_path / source for source in keys])
    cw.check(plan)
    assert len(plan.report) == sum(map(len, keys.values()))
    with torch.device("meta"):
        want = {k: tuple(x.shape) for k, x in M.Model(plan.cfg).state_dict().items()}
    assert {k: target.shape for k, target in plan.files["model"].items()} == want


def test_convert_nextgpt_sizes(tmp_path):
    """The published file on its base gives the preset, but for ImageBind's towers; tables fit whole modules, too."""
    paths = [tmp_path / f"{name}.safetensors" for name in ("nextgpt_7b_tiva_v0", "vicuna-7b-v0")]
    for path in paths:
        header_only(path.stem, path, fill=True)
    assert cw.plan_weights(paths).cfg == M.replace(M.NEXTGPT, imagebind=ImageBindConfig({}), reads={})
    with torch.device("meta"):
        want = {key for key in M.Model(M.replace(M.NEXTGPT, imagebind=None)).state_dict() if key.startswith("llm.")}
    for name in ("nextgpt_llm_stage12", "nextgpt_llm_stage3_lora"):
        keys = json.loads(need(MANIFESTS / f"{name}.json", name).read_text())
        got = {cw.translate(key, cw.NEXTGPT) for key in keys} - {None}
        assert got == {key for key in want if "lora" in name or "lora" not in key}


def test_convert_nextgpt(tmp_path):
    """Base, file and tower give the model of the fixture; a wrong added_tokens.json is refused."""
    meta, weights, _ = read_golden("nextgpt/generation")
    c, tok = meta["llama"], nextgpt_tokenizer()
    prefix = "llama_model.base_model.model."
    base = {key.removeprefix(prefix): x for key, x in weights.items() if key.startswith(prefix) and "lora" not in key}
    delta = {key: x for key, x in weights.items() if key.removeprefix(prefix) not in base}
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        base[key], delta[prefix + key] = base[key][:120], base[key]
    config = TINY_LLAMA | dict(hidden_size=c["hidden"], num_hidden_layers=c["layers"], num_attention_heads=c["heads"],
                               intermediate_size=c["intermediate"], rms_norm_eps=c["rms_eps"])
    sources = put(tmp_path / "base", base, config) + put(tmp_path / "nextgpt", delta, {}, tokens=tok.added)
    (tmp_path / "base/special_tokens_map.json").write_text('{"bos_token": "</s>"}')
    cw.convert(sources, tmp_path / "out")
    got, want = M.load(tmp_path / "out"), golden_nextgpt(meta, cw.rename(weights, cw.NEXTGPT), tok)
    assert got.cfg.added_tokens == tok.added and got.cfg.llm.lora_rank == meta["lora"]["r"] and got.cfg.bos == 1
    assert all(torch.equal(x, got.state_dict()[key]) for key, x in want.state_dict().items())
    (tmp_path / "nextgpt/added_tokens.json").write_text(json.dumps({"[IMG0]": 1}))
    refused(sources, tmp_path / "new", match="added_tokens.json")
    refused(sources[1:], tmp_path / "new", match="base model")


def test_convert_public_sizes(tmp_path):
    """Sizes that only shapes tell are those of the presets."""
    for name, preset in {"imagebind_huge": "imagebind-huge", "clip-vit-large-patch14": "clip-vit-l-14",
                         "vicuna-7b-v0": "vicuna-7b-v0", "llama-2-13b-hf": "llama-2-13b",
                         "nextchat-7b-336": "nextchat-7b-336", "chatterbox_stage2": "chatterbox-13b"}.items():
        header_only(name, tmp_path / f"{name}.safetensors", fill=True)
        assert cw.plan_weights([tmp_path / f"{name}.safetensors"]).cfg == M.PRESETS[preset]


def test_convert_table_reversed():
    """Any key that a table maps is found again from its new name."""
    r = random.Random(0)

    def fill(hole):
        rest = ("weight", "bias", "fc1.bias")
        return r.choice(hole[1].split(",")) if hole[1] else r.choice(rest) if hole[1] is None else str(r.randrange(100))
    for table, (theirs, ours, *_) in ((table, row) for table in (cw.TABLE, cw.NEXTCHAT) for row in table * 20):
        key = cw.HOLES.sub(fill, theirs)
        name = cw.translate(key, table)
        assert (name is None) == (ours is None)
        if name:
            assert cw.original(name, [table]) == key


def small_nextchat(monkeypatch):
    """(public weights, tokens, the Model) of a NExT-Chat fixture, whose sizes are now the preset "small"."""
    meta, weights, t = read_golden("nextchat/generate")
    model, _ = golden_nextchat(meta, weights, t)
    tokens = {name: meta["config"]["special_token_ids"][name.strip("<>")] for name in M.NEXTCHAT_TOKENS}
    model.cfg = M.replace(model.cfg, added_tokens=tokens)
    monkeypatch.setitem(M.PRESETS, "small", model.cfg)
    return weights | {key: t[f"state_dict.{key}"] for key in meta["stored_weights"]}, tokens, model


def equal(got, want, tol=0):
    """Whether two models have the same config and weights, these within tol."""
    assert got.cfg == want.cfg
    got, want = got.state_dict(), want.state_dict()
    assert got.keys() == want.keys() and not [k for k, x in want.items() if (got[k] - x).abs().max() > tol]


def test_golden_nextchat_converted(tmp_path, monkeypatch):
    """The model of the fixture comes out of one checkpoint, of parts (CLIP and SAM as published), and of an export of it."""
    weights, tokens, model = small_nextchat(monkeypatch)
    names = {"clip": "model.vision_tower.", "sam": "sam.model.", "chat": ""}
    parts = {name: {k.removeprefix(start): weights.pop(k) for k in [*weights] if k.startswith(start)} for name, start in names.items()}
    folders = [put(tmp_path / name, state, {}, "bin shards", tokens if name == "chat" else None)[0] for name, state in parts.items()]
    cw.convert(folders, tmp_path / "parts", preset="small")
    equal(M.load(tmp_path / "parts"), model)
    export(tmp_path / "parts", tmp_path / "whole")
    whole = load_file(tmp_path / "whole/model.safetensors")
    assert all(torch.equal(whole[names[name] + k], x) for name, state in parts.items() for k, x in state.items() if "inv_freq" not in k)
    cw.convert([tmp_path / "whole"], tmp_path / "again", preset="small")
    same(tmp_path / "parts", tmp_path / "again")
    refused(folders[1:], tmp_path / "new", preset="small", match="MISSING.*clip-vit-large-patch14")


def test_golden_nextchat_stage_2_gets_a_sam(tmp_path, monkeypatch):
    """From what the public stage 2 holds, and SAM, the preset makes what stage 3 starts from."""
    weights, tokens, model = small_nextchat(monkeypatch)
    sam = {key.removeprefix("sam.model."): weights.pop(key) for key in [*weights] if key.startswith("sam.")}
    stage2 = {key: x for key, x in weights.items() if not key.startswith("seg_prompt_mlp.")}
    folders = [put(tmp_path / name, x, {}, "bin shards", t)[0] for name, x, t in (("two", stage2, tokens), ("sam", sam, None))]
    refused(folders, tmp_path / "new", match="MISSING seg_prompt_mlp.*--preset NAME makes it")
    cw.convert(folders, tmp_path / "new", preset="small")
    assert M.load(tmp_path / "new").cfg == model.cfg


def test_golden_chatterbox_converted(tmp_path, monkeypatch):
    """DeepSpeed's file and CLIP give the model of the fixture; LoRA may be folded in."""
    meta, weights, _ = read_golden("chatterbox/chatterbox")
    model = golden_chatterbox(meta, weights)
    monkeypatch.setitem(M.PRESETS, "small", model.cfg)
    state = weights["state_dict"] | {theirs: weights["state_dict"][key] for theirs, key in meta["tied"].items()}
    torch.save({"module": state, "args": Thing(zero=2)}, tmp_path / "evil.pt")
    torch.save({"module": {f"module.{k}" if k[0] == "v" else k: x for k, x in state.items()}, "steps": 3}, tmp_path / "mp_rank_00.pt")
    folder, = put(tmp_path / "clip", weights["clip"], {})
    refused([tmp_path / "evil.pt", folder], tmp_path / "out", match="unsafe", code=3)
    cw.convert([tmp_path / "mp_rank_00.pt", folder], tmp_path / "out")
    equal(M.load(tmp_path / "out"), model)
    cw.convert([tmp_path / "mp_rank_00.pt", folder], tmp_path / "merged", merge_lora=True)
    M.merge_lora(model)
    equal(M.load(tmp_path / "merged"), model, tol=1e-6)


def hub_folder(folder, name, vae_keys="new", layout=("safetensors", "diffusion_pytorch_model", "model")):
    """A fixture's diffusion model as its repository lays it out; returns the Painter it must become."""
    meta, weights, _ = read_golden(f"diffusion/{name}")
    ending, model, text = layout
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"} if vae_keys == "old" else {}
    for part, state in weights.items():
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(meta[part]))
        if part == "vae":
            state = {re.sub("|".join(old) or "^$", lambda found: old[found[0]], k): x for k, x in state.items()}
        file = folder / part / f"{text if part in ('text_encoder', 'vocoder') else model}.{ending}"
        save_file(state, file) if ending == "safetensors" else torch.save(state, file)
        torch.save({"bias": torch.ones(2)}, file.with_suffix(".fp16.bin"))      # another version, to be passed over
    for path, values in (("scheduler/scheduler_config.json", meta["scheduler"]), ("model_index.json", {}), ("tokenizer/vocab.json", {"a": 1}),
                         ("tokenizer/special_tokens_map.json", {"pad_token": meta.get("tokenizer", {}).get("pad_token", "<pad>")})):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(json.dumps(values))
    return golden_painter(meta, weights)[1]


@pytest.mark.parametrize("name, vae_keys, layout", (
    ("sd15", "old", ("safetensors", "diffusion_pytorch_model", "model")),
    ("zeroscope", "new", ("bin", "diffusion_pytorch_model", "pytorch_model")),
    ("audioldm", "old", ("bin", "diffusion_pytorch_model", "pytorch_model"))))
def test_golden_diffusion_converted(tmp_path, name, vae_keys, layout):
    """Old and new names, either kind of file: the painter of the fixture, and what its tokenizer needs; saved, the same."""
    want = hub_folder(tmp_path / "hub", name, vae_keys, layout)
    cw.convert([tmp_path / "hub"], tmp_path / "out")
    equal(M.load_painter(tmp_path / "out"), want)
    assert (tmp_path / "out/vocab.json").is_file()
    M.save(want, tmp_path / "again")
    same(tmp_path / "out", tmp_path / "again")


def test_convert_padding_is_what_the_tokenizer_says(tmp_path):
    """In one of two files, of which the first wins: a word, or an object with all that is known of it."""
    hub_folder(tmp_path / "hub", "zeroscope")
    word, other = {"content": "!", "lstrip": False, "special": True}, "<|endoftext|>"
    for first, second, zero in ((word, other, True), (None, "!", True), (None, word, True), (other, "!", False), (None, None, False)):
        for name, pad in (("special_tokens_map", first), ("tokenizer_config", second)):
            (tmp_path / f"hub/tokenizer/{name}.json").write_text(json.dumps({"pad_token": pad} if pad else {}))
        text = cw.plan_weights([tmp_path / "hub"]).cfg.text
        assert text.pad == (0 if zero else text.end)


def test_convert_refuses_diffusion(tmp_path):
    hub_folder(tmp_path / "hub", "audioldm")
    llama, = put(tmp_path / "llm", llama_state())
    refused([tmp_path / "hub", llama], tmp_path / "out", match="convert it alone")
    refused([tmp_path / "hub"], tmp_path / "out", preset="omni-7b", match="convert it alone")
    path = tmp_path / "hub/scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trained_betas": [0.1]}))
    refused([tmp_path / "hub"], tmp_path / "out", match="trained_betas")
    path.unlink()
    refused([tmp_path / "hub"], tmp_path / "out", match="MISSING scheduler/scheduler_config.json")


def small_omni():
    swin = SwinConfig(16, (1, 1, 1, 1), (1, 1, 1, 1), 4)
    tokens = {token: 100 + i for i, token in enumerate(M.OMNI_TOKENS)}
    sam = SAMConfig(32, 16, 16, 1, 2, 32, 2, (0,), 8, 8, 2, 1, 2, 8, 8)
    return M.replace(
        M.OMNI, llm=M.LLMConfig(32, 2, 4, 4, 88, 100 + len(tokens)), clip=CLIPConfig(28, 14, 32, 11, 2, 48), sam=sam,
        imagebind=ImageBindConfig({"audio": SMALL["audio"]}, 16), region=locate.RegionConfig(32, 32, 8, groups=4, pool=2),
        locator=locate.LocatorConfig(swin, 64, 1, 1, 4, 64, 5), added_tokens=tokens,
        projections={k: M.replace(p, llm_dim=32, n_query=3, out_dim=8, dim=16, n_layer=1, mlp_dim=16) for k, p in M.OMNI.projections.items()})


def made(cfg, seed, *tables, start=""):
    """(random weights of such a model under the public names of these tables)"""
    torch.manual_seed(seed)
    model = M.Model(cfg)
    M.initialise(model)
    found = {cw.original(k, tables): x for k, x in model.state_dict().items() if k.startswith(start)}
    return {k: x.contiguous() for k, x in found.items() if k}


def omni_sources(tmp_path, cfg):
    """What the public checkpoints are to omni-7b, small: {name: path}; ChatterBox's language model is a wider one."""
    tokens = lambda *names: {name: 100 + i for i, name in enumerate(names)}                 # noqa: E731
    lora = M.replace(cfg, llm=M.replace(cfg.llm, lora_rank=2))
    wide = M.replace(cfg, llm=M.replace(cfg.llm, dim=64), region=M.replace(cfg.region, out_dim=64), projector_depth=1)
    chat, gpt, box = M.NEXTCHAT_TOKENS, sum(M.SIGNALS.values(), ("<a>", "<b>")), M.CHATTERBOX_TOKENS
    sized = lambda base, names: M.replace(base, llm=M.replace(base.llm, vocab_size=100 + len(names)))       # noqa: E731
    states = {"vicuna": (llama_state(100), None), "clip": (made(cfg, 1, cw.CLIP), None), "imagebind": (made(cfg, 2, cw.IMAGEBIND), None),
              "sam": (made(cfg, 3, cw.SAM), None), "dino": (made(cfg, 4, cw.GROUNDING_DINO), None),
              "nextchat": (made(sized(cfg, chat), 5, cw.NEXTCHAT), tokens(*chat)), "nextgpt": (made(sized(lora, gpt), 6, cw.NEXTGPT), tokens(*gpt)),
              "chatterbox": (made(sized(wide, box), 7, cw.CHATTERBOX), tokens(*box))}
    states["nextgpt"] = ({k: x for k, x in states["nextgpt"][0].items() if not re.search("layers.*(proj|norm).weight|model.norm", k) or "gen_" in k}, tokens(*gpt))
    return {name: put(tmp_path / name, state, {}, tokens=json_tokens)[0] for name, (state, json_tokens) in states.items()}


GIVERS = {      # a tensor, and the sources that have it, the first to be taken first
    "llm.blocks.1.attn.wq.weight": ("vicuna", "nextchat"), cw.CLS: ("nextchat", "clip"), cw.MASK_TOKENS: ("nextchat", "sam"),
    "writers.vg.locator.level_embed": ("chatterbox", "dino"), "readers.box.0.weight": ("nextchat",), cw.BRIDGE: ("nextgpt",),
    "readers.region.flatten.weight": ("chatterbox",), cw.AUDIO_SCALE: ("imagebind",)}


def test_convert_omni(tmp_path, monkeypatch):
    """A preset is built of parts of all systems: the first source that has a tensor gives it, training makes the rest."""
    cfg = small_omni()
    monkeypatch.setitem(M.PRESETS, "omni-small", cfg)
    folders, never_given = omni_sources(tmp_path, cfg), {"readers.region.out", "writers.vg.query"}
    for names in (folders.keys(), folders.keys() - {"nextchat", "chatterbox", "nextgpt"}):
        plan = cw.plan_weights([folders[name] for name in folders if name in names], "omni-small")
        cw.check(plan)
        for ours, givers in GIVERS.items():
            giver = next((name for name in givers if name in names), None)
            stored = plan.files["model"][ours].stored
            assert isinstance(stored, cw.Made) if giver is None else stored.path.parent == folders[giver], ours
        parts = {row.part for row in plan.report if row.fate == "initialised"}
        assert parts == never_given if "nextchat" in names else parts > never_given
        assert len({row.note for row in plan.report}) < 12      # they are lines of the report, not one a key
    without = [path for name, path in folders.items() if name != "imagebind"]
    refused(without, tmp_path / "new", preset="omni-small", match="MISSING.*imagebind_huge.pth")
    refused([folders["vicuna"], folders["imagebind"]], tmp_path / "new", match="MISSING.*--preset chatbind-7b")


def test_convert_omni_vocabulary(tmp_path, monkeypatch):
    """The words are the first language model's, each added token is its who trained it; what nobody trained is the mean."""
    cfg = small_omni()
    monkeypatch.setitem(M.PRESETS, "omni-small", cfg)
    folders, at = omni_sources(tmp_path, cfg), cfg.added_tokens
    cw.convert(folders.values(), tmp_path / "out", preset="omni-small")
    got = M.load(tmp_path / "out")
    assert got.cfg == cfg and got.llm.embed.weight.dtype == torch.float16
    vicuna, chat, gpt = (load_file(folders[name] / "model.safetensors") for name in ("vicuna", "nextchat", "nextgpt"))
    for x, name in ((got.llm.embed.weight, "model.embed_tokens.weight"), (got.llm.lm_head.weight, "lm_head.weight")):
        assert torch.equal(x[:100], vicuna[name]) and torch.equal(x[at["<at>"]], chat[name][103].half())
        assert torch.equal(x[at["[AUD0]"]], gpt[f"llama_model.{name}"][130].half())
        assert torch.equal(x[at["[VG]"]], vicuna[name].float().mean(0).half())
    again = cw.plan_weights([*folders.values()], "omni-small").files["model"]["writers.vg.query.0.weight"].value()
    assert torch.equal(again, got.writers.vg.query[0].weight) and again.float().std() > 0.1


@pytest.mark.parametrize("system", ("nextchat", "chatterbox", "nextgpt", "chatbind"))
def test_convert_preset_of_bases(tmp_path, system, capsys):
    """A preset of one system begins from the bases it was trained from; only what training makes is initialised."""
    bases = {"nextchat": ("nextchat-7b-336", "vicuna-7b-v1.5", "clip-vit-large-patch14-336", "sam_vit_h"),
             "chatterbox": ("chatterbox-13b", "llama-2-13b-hf", "clip-vit-large-patch14", "groundingdino_swinb_cogcoor"),
             "nextgpt": ("nextgpt-7b-tiva", "vicuna-7b-v0", "imagebind_huge"),
             "chatbind": ("chatbind-7b", "vicuna-7b-v0", "imagebind_huge")}
    preset, *names = bases[system]
    for name in names:
        header_only(name, tmp_path / f"{name}.safetensors", fill=True)
    plan = cw.plan_weights([tmp_path / f"{name}.safetensors" for name in names], preset)
    cw.check(plan)
    assert plan.cfg == M.PRESETS[preset] and plan.files["model"][cw.EMBED].shape[0] == plan.cfg.llm.vocab_size
    parts = {row.part for row in plan.report if row.fate == "initialised"}
    assert parts and not [part for part in parts if part.endswith(("tower", ".sam", "locator"))]
    cw.show(plan)
    assert len(capsys.readouterr().out.splitlines()) < 40       # counts, not a line for each of a thousand keys


def test_convert_preset_takes_the_numbers_of_its_language_model(tmp_path, monkeypatch):
    """Not the preset's: weights of another RoPE base or epsilon would load and talk nonsense."""
    cfg = small_omni()
    monkeypatch.setitem(M.PRESETS, "omni-small", cfg)
    folders = omni_sources(tmp_path, cfg)
    numbers = {"rope_theta": 5e5, "rms_norm_eps": 1e-4, "eos_token_id": 7}
    (folders["vicuna"] / "config.json").write_text(json.dumps(TINY_LLAMA | numbers))
    want = M.replace(cfg.llm, rope_theta=5e5, norm_eps=1e-4, max_len=64)
    assert cw.plan_weights([*folders.values()], "omni-small").cfg == M.replace(cfg, llm=want, eos=(7,))
    assert cw.plan_weights([folders["nextchat"], folders["vicuna"], folders["imagebind"]], "omni-small").cfg == cfg


def test_convert_says_that_a_tokenizer_is_missing(tmp_path, capsys):
    folder, = put(tmp_path / "llm", llama_state())
    for missing in (True, False):
        cw.show(cw.plan_weights([folder]))
        assert ("no source has a tokenizer.model" in capsys.readouterr().out) == missing
        (folder / "tokenizer.model").touch()


LAYOUT_NAMES = ("single files", "single index", "single shards", "bin", "bin index", "bin files", "pth", "ckpt", "old")


def test_convert_layouts(tmp_path):
    state = llama_state()
    cw.convert(put(tmp_path / "a", state), tmp_path / "want")
    for layout in LAYOUT_NAMES:
        cw.convert(put(tmp_path / layout, state, layout=layout), tmp_path / "out" / layout)
        same(tmp_path / "want", tmp_path / "out" / layout)
        assert M.read_config(tmp_path / "want") == M.read_config(tmp_path / "out" / layout)


def test_convert_files_of_numbered_folders_are_no_shards(tmp_path):
    paths = [tmp_path / f"v{i}/model.safetensors" for i in range(2)]
    for path, state in zip(paths, (llama_state(), {"model.mm_projector.weight": torch.ones(32, 16)})):
        put(path.parent, state)
    assert [path for path, _ in cw.group(paths)] == paths


def test_convert_hub_snapshot(tmp_path):
    put(tmp_path / "blobs", llama_state(), layout="single index")
    (tmp_path / "snapshot").mkdir()
    for i, path in enumerate(list((tmp_path / "blobs").iterdir())):
        (tmp_path / "snapshot" / path.name).symlink_to(path.rename(path.with_name(f"{i:040}")))
    cw.convert([tmp_path / "snapshot"], tmp_path / "out")
    cw.convert(put(tmp_path / "plain", llama_state()), tmp_path / "want")
    same(tmp_path / "want", tmp_path / "out")
    (tmp_path / "snapshot").rename(tmp_path / "snapshots")
    refused([tmp_path], tmp_path / "new", match="name one of its folders snapshots")


def test_convert_views(tmp_path):
    """Transposed, sliced and shared storages of a .bin give the values the tensors had."""
    state = llama_state()
    views = {k: x.t().contiguous().t() if x.ndim > 1 else torch.stack([x, x])[1] for k, x in state.items()}
    views["lm_head.weight"] = views["model.embed_tokens.weight"]
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    cw.convert(put(tmp_path / "a", views, layout="bin"), tmp_path / "out")
    cw.convert(put(tmp_path / "b", state), tmp_path / "want")
    same(tmp_path / "want", tmp_path / "out")


@pytest.mark.parametrize("zipped", (True, False))
def test_convert_shared_storage_is_not_written(tmp_path, zipped):
    """Rows of added tokens go into the embedding alone, even where lm_head is the same tensor in the file."""
    state = llama_state(123)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    folder, = put(tmp_path / "a", state, layout="bin" if zipped else "old")
    torch.save({"model.mm_projector.weight": torch.ones(32, 16), "model.mm_projector.bias": torch.zeros(32),
                "model.embed_tokens.weight": torch.ones(123, 32)}, tmp_path / "mm_projector.bin")
    cw.convert([folder, tmp_path / "mm_projector.bin"], tmp_path / "out")
    got = M.load(tmp_path / "out").llm
    assert (got.embed.weight[120:] == 1).all() and torch.equal(got.lm_head.weight, state["lm_head.weight"])


LLAMAS = {"plain": {}, "grouped": dict(num_key_value_heads=2), "tied": dict(tie_word_embeddings=True), "wide": dict(head_dim=32),
          "llama3": dict(rope_scaling=dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0,
                                           high_freq_factor=4.0, original_max_position_embeddings=16)),
          "eos": dict(eos_token_id=[5, 6], bos_token_id=3, rms_norm_eps=1e-5)}


@pytest.mark.parametrize("case", LLAMAS)
def test_convert_llama_parity(tmp_path, case):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    cfg = transformers.LlamaConfig(vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                   num_attention_heads=4, max_position_embeddings=64, **LLAMAS[case])
    theirs = transformers.LlamaForCausalLM(cfg).eval()
    theirs.save_pretrained(tmp_path / "hf")
    cw.convert([tmp_path / "hf"], tmp_path / "ours")
    ours, ids = M.load(tmp_path / "ours"), torch.randint(0, 100, (2, 40))
    with torch.no_grad():
        want, got = theirs(ids).logits, ours.llm.lm_head(ours.llm(ours.llm.embed(ids)))
    assert (want - got).abs().max() <= PARITY * want.abs().max()
    assert (ours.cfg.bos, ours.cfg.eos) == ((3, (5, 6)) if case == "eos" else (1, (2,)))
    export(tmp_path / "ours", tmp_path / "back")
    back, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values()) and torch.equal(back.eval()(ids).logits, want)


@pytest.mark.parametrize("name, values, want", [
    ("config.json", TINY_LLAMA | {"bos_token_id": 0, "eos_token_id": 1}, (1, (2,))),    # early conversions of LLaMA
    ("generation_config.json", {"eos_token_id": [5, 6]}, (1, (5, 6))),
    ("tokenizer_config.json", {"bos_token": {"content": "</s>"}}, (2, (2,))),
    ("special_tokens_map.json", {"bos_token": "</s>"}, (2, (2,)))])                     # Vicuna v0
def test_convert_begins_and_ends_as_all_files_say(tmp_path, name, values, want):
    folder, = put(tmp_path / "a", llama_state())
    (folder / name).write_text(json.dumps(values))
    cfg = cw.plan_weights([folder]).cfg
    assert (cfg.bos, cfg.eos) == want


def test_convert_keeps_added_tokens_of_a_mere_llama(tmp_path):
    cw.convert(put(tmp_path / "a", llama_state(121), tokens={"[PAD]": 120, "far": 500}), tmp_path / "ours")
    assert M.read_config(tmp_path / "ours").added_tokens == {"[PAD]": 120}
    export(tmp_path / "ours", tmp_path / "back")
    assert json.loads((tmp_path / "back/added_tokens.json").read_text()) == {"[PAD]": 120}


@pytest.mark.parametrize("prefix", ("", "vision_model."))
def test_convert_clip_parity(tmp_path, prefix):
    transformers = pytest.importorskip("transformers")
    cfg = transformers.CLIPVisionConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2,
                                        image_size=28, patch_size=14)
    theirs, x = transformers.CLIPVisionModel(cfg).eval(), torch.randn(2, 3, 28, 28)
    state = {prefix + k.removeprefix("vision_model."): v for k, v in theirs.state_dict().items() if "position_ids" not in k}
    put(tmp_path / "hf", state, config=cfg.to_dict())
    cw.convert([tmp_path / "hf"], tmp_path / "ours")
    with torch.no_grad():
        want = theirs(x, output_hidden_states=True).hidden_states
        got = M.load(tmp_path / "ours").readers.clip.tower.hidden_states(x)
        assert all((a - b).abs().max() <= PARITY * a.abs().max() for a, b in zip(want, got, strict=True))
    export(tmp_path / "ours", tmp_path / "back")
    back, info = transformers.CLIPVisionModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values()) and all(torch.equal(v, back.state_dict()[k]) for k, v in theirs.state_dict().items())


SMALL = {kind: M.replace(HUGE[kind], dim=HUGE[kind].dim // 4, n_layer=1, n_head=HUGE[kind].n_head // 4) for kind in HUGE}


def test_convert_export_round_trip(tmp_path):
    """ChatBind with all six towers -> public names -> the same bits and config; the tower file has a text mask."""
    cfg = M.replace(M.PRESETS["chatbind-7b"], llm=M.LLMConfig(32, 2, 4, 4, 88, 123), added_tokens=IM_TOKENS,
                    imagebind=ImageBindConfig(SMALL, 48))
    model = M.Model(cfg)
    M.initialise(model)
    M.save(model.half(), tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "hf")
    mask = load_file(tmp_path / "hf/imagebind.safetensors")["modality_preprocessors.text.mask"]
    assert torch.equal(mask, torch.full((77, 77), -torch.inf).triu(1))
    cw.convert([tmp_path / "hf", tmp_path / "hf/imagebind.safetensors"], tmp_path / "again", max_shard=1e5)
    same(tmp_path / "ours", tmp_path / "again")
    assert M.read_config(tmp_path / "again") == cfg
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 5


def test_convert_export_chatbind_loads_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    state = llama_state(123, projector=16)
    cw.convert(put(tmp_path / "a", state, tokens=IM_TOKENS), tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "hf")
    same(tmp_path / "a", tmp_path / "hf")
    back, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"] and torch.equal(back.lm_head.weight, state["lm_head.weight"])


def test_convert_export_refuses(tmp_path):
    """What has no public names, or not all of them."""
    llm = M.LLMConfig(64, 1, 4, 4, 88, 120)
    for i, cfg in enumerate((small_omni(), M.ModelConfig(llm=M.replace(llm, lora_rank=2)), M.ModelConfig(llm=llm))):
        M.save(M.Model(cfg), tmp_path / str(i))
    M.save(M.load(tmp_path / "2", quantize="int8"), tmp_path / "2")
    for i in range(3):
        with pytest.raises(cw.Refused, match="has no public name; what has all of them is a LLaMA"):
            cw.plan_export(tmp_path / str(i))


PROJECTORS = {"whole": (123, 120), "padded": (124, 120), "two": (2, 120), "none": (0, 120), "fits": (123, 123)}


@pytest.mark.parametrize("case", PROJECTORS)
def test_convert_projector_file(tmp_path, case):
    trained, rows = PROJECTORS[case]
    state, learned = llama_state(rows), torch.randn(trained, 32)
    new = {"model.mm_projector.weight": torch.ones(32, 16), "model.mm_projector.bias": torch.zeros(32)}
    new |= {"model.embed_tokens.weight": learned} if trained else {}
    torch.save(new, tmp_path / "mm_projector.bin")
    cw.convert(put(tmp_path / "llm", state) + [tmp_path / "mm_projector.bin"], tmp_path / "out")
    out, tokens = load_file(tmp_path / "out/model.safetensors"), M.read_config(tmp_path / "out").added_tokens
    embed, total = out["llm.embed.weight"], 124 if case == "padded" else 123
    assert len(embed) == len(out["llm.lm_head.weight"]) == total == max(tokens.values()) + 1
    assert torch.equal(embed[:rows - 3], state["model.embed_tokens.weight"][:rows - 3])
    if trained:
        assert torch.equal(embed[[tokens["<im_start>"], tokens["<im_end>"]]], learned[-2:].half())
    assert torch.equal(out["readers.imagebind.projector.weight"], new["model.mm_projector.weight"])


def without(state, key):
    return {k: x for k, x in state.items() if k != key}


Q = "model.layers.1.self_attn.q_proj.weight"
REFUSALS = {    # sources as (state, added tokens), and what the message says
    "delta alone": ([(llama_state(123, norm=0, projector=16), IM_TOKENS)], "name its base"),
    "two models": ([(llama_state(), None), (llama_state(seed=1), None)], "both whole language models"),
    "full on base": ([(llama_state(), None), (llama_state(123, projector=16), IM_TOKENS)], "both whole language models"),
    "two deltas": ([(llama_state(norm=0), None), (llama_state(norm=0), None)], "both of kind delta"),
    "other width": ([(llama_state(dim=64), None), (llama_state(norm=0), None)], "width 64.*width 32"),
    "other depth": ([(llama_state(n_layer=3), None), (llama_state(norm=0), None)], "3 layers.*2 layers"),
    "too many rows": ([(llama_state(130), None), (llama_state(norm=0), None)], "120, 32. in the delta, .130, 32"),
    "too few rows": ([(llama_state(110), None), (llama_state(123, norm=0, projector=16), IM_TOKENS)], "110 embedding rows"),
    "a row of theirs": ([(llama_state(121), None), (llama_state(123, norm=0, projector=16), IM_TOKENS)], "121 embedding rows"),
    "no tokens": ([(llama_state(123, projector=16), None)], "added_tokens.json"),
    "tokens outside": ([(llama_state(120, projector=16), IM_TOKENS)], "added_tokens.json"),
    "missing": ([(without(llama_state(), Q), None)], f"MISSING.*{Q}"),
    "no head": ([(without(llama_state(), "lm_head.weight"), None)], "MISSING.*lm_head.weight"),
    "no embedding": ([(without(llama_state(), "model.embed_tokens.weight"), None)], "MISSING llm.embed.weight"),
    "unexpected": ([(llama_state() | {"model.layers.0.extra": torch.ones(2)}, None)], "UNEXPECTED model.layers.0.extra"),
    "bias": ([(llama_state() | {Q.replace("weight", "bias"): torch.ones(32)}, None)], "UNEXPECTED.*q_proj.bias"),
    "shape": ([(llama_state() | {Q: torch.ones(32, 31)}, None)], f"MISMATCHED {Q}.*31"),
    "not a model": ([({"foo.weight": torch.ones(2)}, None)], "not a LLaMA, CLIP, SAM"),
    "sam alone": ([({"mask_decoder.iou_token.weight": torch.ones(2, 2)}, None)], "is a sam, useless alone.*--preset nextchat"),
    "locator alone": ([({"transformer.encoder.fusion_layers.0.gamma_v": torch.ones(2)}, None)], "alone.*--preset chatterbox-13b"),
    "projector alone": ([({"model.mm_projector.weight": torch.ones(2, 2)}, None)], "name its base"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_convert_refuses(tmp_path, case):
    sources, match = REFUSALS[case]
    folders = [put(tmp_path / str(i), state, tokens=tokens)[0] for i, (state, tokens) in enumerate(sources)]
    for folder, (state, _) in zip(folders, sources):
        if len(embed := state.get("model.embed_tokens.weight", ())):
            config = TINY_LLAMA | {"hidden_size": embed.shape[1], "num_hidden_layers": 3 if case == "other depth" else 2}
            (folder / "config.json").write_text(json.dumps(config))
    refused(folders, tmp_path / "out", match=match)
    assert not list(tmp_path.glob("out*"))


CONFIGS = {"model_type": "gemma", "hidden_act": "gelu", "hidden_size": 1 << 40, "num_hidden_layers": -1,
           "num_attention_heads": 0, "num_key_value_heads": "many", "intermediate_size": None, "eos_token_id": {},
           "rope_scaling": {"rope_type": "yarn"}}


@pytest.mark.parametrize("field", CONFIGS)
def test_convert_refuses_config(tmp_path, field):
    refused(put(tmp_path / "a", llama_state(), TINY_LLAMA | {field: CONFIGS[field]}), tmp_path / "out")


@pytest.mark.parametrize("odd", ({"mm_vision_select_layer": -1}, {"mm_vision_select_feature": "cls_patch"}, {"mm_use_im_start_end": False}))
def test_convert_refuses_other_features(tmp_path, monkeypatch, odd):
    """A NExT-Chat that reads other features of CLIP, or frames them otherwise, would convert and see something else."""
    weights, tokens, _ = small_nextchat(monkeypatch)
    refused(put(tmp_path / "a", weights, TINY_LLAMA | {"model_type": "nextchat"} | odd, tokens=tokens), tmp_path / "out", match=min(odd))


@pytest.mark.parametrize("name, kind", (("llava", "llava"), ("llava_llama", "llava"), ("llava_image_bind_select", "chatbind")))
def test_convert_llava_is_no_chatbind(tmp_path, name, kind):
    """Their keys are the same; a LLaVA's projector, fed by ImageBind, would give nonsense."""
    folder, = put(tmp_path / "a", llama_state(123, projector=16), TINY_LLAMA | {"model_type": name}, tokens=IM_TOKENS)
    assert cw.open_sources([folder], "")["llm"].kind == kind


def test_convert_refuses_duplicates(tmp_path):
    folder, = put(tmp_path / "a", llama_state(), layout="bin shards")
    torch.save({Q: torch.ones(32, 32)}, folder / "pytorch_model-3.bin")
    assert Q in refused([folder], tmp_path / "out", match="again in")


BAD_INDEX = [{}, {"weight_map": []}, {"weight_map": {}}] + [
    {"weight_map": {Q: name}} for name in ("../model-1.bin", "/etc/passwd", "absent.bin", 3, "..", "a\0b", "")]


def test_convert_refuses_index(tmp_path):
    folder, = put(tmp_path / "a", llama_state(), layout="bin index")
    for text in [*map(json.dumps, BAD_INDEX), "", "[]", "{", "[" * 10 ** 5, "\xff"]:
        (folder / "pytorch_model.bin.index.json").write_text(text, encoding="latin-1")
        refused([folder], tmp_path / "out", code=3)


FILES = {"a web page": b"<!DOCTYPE html><html>login", "Git-LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
         "truncated or damaged": b"", "truncated or": b"\x00" * 100, "truncated": b"garbage" * 50}


@pytest.mark.parametrize("name", ("model.safetensors", "pytorch_model.bin"))
def test_convert_names_other_files(tmp_path, name):
    for match, content in FILES.items():
        (tmp_path / name).write_bytes(content)
        match = "unsafe or damaged|truncated or damaged" if "trunc" in match else match
        assert name in refused([tmp_path], tmp_path / "out", match=match, code=3)


@pytest.mark.parametrize("layout", ("single", "bin", "old"))
def test_convert_refuses_truncated(tmp_path, layout):
    folder, = put(tmp_path / "a", llama_state(), layout=layout)
    file = max(folder.iterdir(), key=lambda path: path.stat().st_size)
    whole = file.read_bytes()
    for n in (1, 9, 100, 5000, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:n])
        refused([folder], tmp_path / "out", match="damaged", code=3)


class Call:
    """Unpickled without care it calls function(*args)."""
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def gadgets(marker):
    touch, words, code = f"touch {marker}", ["touch", str(marker)], f"open({str(marker)!r}, 'w')"
    calls = [Call(*call) for call in (
        (os.system, touch), (os.popen, touch), (eval, code), (exec, code), (compile, code, "x", "exec"), (open, str(marker), "w"),
        (subprocess.Popen, words), (subprocess.call, words), (os.mkdir, str(marker)), (shutil.copy, "/etc/hostname", str(marker)),
        (getattr, os.system, "x"), (__import__, "os"), (pickle.loads, pickle.dumps(Call(os.system, touch))), (torch.load, "x"),
        (Path, "x"))]
    return [{"model.norm.weight": torch.ones(2), "x": call} for call in calls] + calls


@pytest.mark.parametrize("form", ("zip", "old", "raw"))
def test_convert_refuses_code(tmp_path, form):
    """Pickles that call functions when loaded: refused as unsafe, and nothing was called."""
    file, marker = tmp_path / "a.bin", tmp_path / "marker"
    for gadget in gadgets(marker):
        if form == "raw":
            file.write_bytes(pickle.dumps(gadget))
        else:
            torch.save(gadget, file, _use_new_zipfile_serialization=form == "zip")
        refused([file], tmp_path / "out", match="unsafe or damaged|truncated or damaged", code=3)
        assert not marker.exists()


def test_convert_refuses_odd_pickles(tmp_path):
    """Plain data, but no state dict: loops, numbers for names, other kinds of tensor, views of another type."""
    loop = {}
    loop["model"] = loop
    tensors = (torch.eye(3).to_sparse(), torch.ones(3, device="meta"), torch.ones(2, dtype=torch.cfloat),
               torch.ones(1).expand(1 << 40))
    for value in [loop, [], 3, None, {}, {"a": 3}, {1: torch.ones(2)}, torch.ones(3)] + [{"a": x} for x in tensors]:
        torch.save(value, tmp_path / "a.bin")
        refused([tmp_path / "a.bin"], tmp_path / "out", code=3)


def mutated(data, r, n):
    """n damaged copies: bytes changed (mostly near the ends, where headers lie), cut, doubled or dropped."""
    for _ in range(n):
        out = bytearray(data)
        for _ in range(r.choice((1, 1, 4, 30))):
            out[r.choice((r.randrange(len(out)), r.randrange(900), -1 - r.randrange(900)))] = r.randrange(256)
        at = r.randrange(len(out))
        yield r.choice((out, out, out, out[:at], out[:at] + out[at + 8:], out[:at] + out[at - 16:]))


@pytest.mark.parametrize("layout", ("single", "bin", "old", "vae/diffusion_pytorch_model.safetensors", "unet/config.json"))
def test_convert_survives_mutation(tmp_path, layout):
    """A damaged file converts (a changed weight) or is refused; nothing else happens."""
    if "/" in layout:
        hub_folder(folder := tmp_path / "a", "audioldm")
    else:
        folder, = put(tmp_path / "a", llama_state(n_layer=1), TINY_LLAMA | {"num_hidden_layers": 1}, layout)
    file = folder / layout if "/" in layout else max(folder.iterdir(), key=lambda path: path.stat().st_size)
    n, refusals = 15 if "/" in layout else 200, 0
    for raw in mutated(file.read_bytes(), random.Random(0), n):
        file.write_bytes(raw)
        try:
            cw.convert([folder], tmp_path / "out", overwrite=True)
        except cw.Refused as error:
            refusals += 1
            assert "\n" not in str(error) and str(folder) in str(error) or "do not fit" in str(error), error
    assert refusals > (0.1 if "/" in layout else 0.3) * n


def entry(start, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


ONE = json.dumps(entry(0, 8))
HEADERS = {     # a header, and how many bytes follow it
    "duplicate": (f'{{"a":{ONE},"a":{ONE}}}', 8), "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, 12),
    "gap": ({"a": entry(0, 8), "b": entry(16, 24)}, 24), "long": ({"a": entry(0, 8)}, 12), "short": ({"a": entry(0, 8)}, 4),
    "negative": ({"a": entry(-8, 0)}, 8), "reversed": ({"a": entry(8, 0)}, 8), "size": ({"a": entry(0, 8, (3,))}, 8),
    "overflow": ({"a": entry(0, 8, (1 << 33, 1 << 33))}, 8), "type": ({"a": entry(0, 8, dtype="X9")}, 8), "list": ([], 0),
    "complex": ({"a": entry(0, 16, dtype="C64")}, 16), "empty": ({}, 0), "text": ("{nonsense", 0), "utf8": ('{"\xff":1}', 0),
    "null": ({"a": None}, 0), "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, 8), "float": ({"a": entry(0.0, 8.0)}, 8),
    "deep": ("[" * 9999, 0)}


@pytest.mark.parametrize("case", HEADERS)
def test_convert_refuses_header(tmp_path, case):
    header, n = HEADERS[case]
    text = (header if isinstance(header, str) else json.dumps(header)).encode("latin-1")
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(n))
    refused([tmp_path / "a.safetensors"], tmp_path / "out", code=3)


@pytest.mark.parametrize("length", (1, 1 << 27, 1 << 40, (1 << 64) - 1))
def test_convert_refuses_header_length(tmp_path, length):
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", length) + b'{"a":1}   ')
    refused([tmp_path / "a.safetensors"], tmp_path / "out", match="damaged", code=3)


def test_convert_zip_offsets_are_checked(tmp_path):
    """A zip whose records were compressed or moved by another tool is refused, not misread."""
    torch.save(llama_state(), tmp_path / "a.bin")
    file = zipfile.ZipFile
    with file(tmp_path / "a.bin") as old, file(tmp_path / "b.bin", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    refused([tmp_path / "b.bin"], tmp_path / "out", code=3)


def test_convert_dtype_and_shards(tmp_path):
    folder, = put(tmp_path / "a", llama_state())
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16, "keep": torch.float16}.items():
        cw.convert([folder], tmp_path / name, dtype=name, max_shard=9000)
        state = M.load(tmp_path / name).state_dict()
        assert all(torch.equal(x.to(dtype), state[cw.translate(k, cw.LLAMA)]) for k, x in llama_state().items())
        assert {x.dtype for x in state.values()} == {dtype}
        sizes = [path.stat().st_size for path in (tmp_path / name).glob("model-*-of-*.safetensors")]
        assert len(sizes) > 3 and max(sizes) < 20000


def test_convert_output_folder(tmp_path):
    """An existing folder is kept unless told otherwise; one that holds anything else, or a source, always."""
    folder, = put(tmp_path / "a", llama_state())
    cw.convert([folder], tmp_path / "out")
    refused([folder], tmp_path / "out", match="--overwrite")
    cw.convert([folder], tmp_path / "out", dtype="fp32", overwrite=True)
    assert M.load(tmp_path / "out").llm.embed.weight.dtype == torch.float32
    for extra in ("thesis.txt", "lora.safetensors", "painters/image/model.safetensors"):
        shutil.copytree(tmp_path / "out", tmp_path / "home", dirs_exist_ok=True)
        (tmp_path / "home" / extra).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "home" / extra).write_text("mine")
        refused([folder], tmp_path / "home", match=f"it holds {extra.split('/')[0]}", overwrite=True)
        (tmp_path / "home" / extra).unlink()
    refused([folder], folder, match="holds a source", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "home", "out"]


def test_convert_copies_the_deltas_tokenizer(tmp_path):
    """tokenizer.model is copied; that of a delta goes before that of its base."""
    folders = put(tmp_path / "base", llama_state()) + put(tmp_path / "delta", llama_state(norm=0))
    for i, folder in enumerate(folders):
        (folder / "tokenizer.model").write_bytes(bytes([i]))
    for n in (1, 2):
        cw.convert(folders[:n][::-1], tmp_path / "out", overwrite=True)
        assert (tmp_path / "out/tokenizer.model").read_bytes() == bytes([n - 1])


def test_convert_disk_full(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    refused(put(tmp_path / "a", llama_state()), tmp_path / "out", match="0.0 GB free")


@pytest.mark.slow
def test_convert_command_line(tmp_path):
    """Exit codes 0, 2, 3, the report before anything else, one line per error."""
    good, = put(tmp_path / "good", llama_state())
    bad, = put(tmp_path / "bad", without(llama_state(), Q))
    (tmp_path / "evil.bin").write_bytes(b"<html>")
    done = cli(good, "--dry-run", "--report", tmp_path / "report.json")
    assert done.returncode == 0 and "21 renamed    llm" in done.stdout
    assert {row["fate"] for row in json.loads((tmp_path / "report.json").read_text())} == {"renamed"}
    for source, code in ((bad, 2), (tmp_path / "evil.bin", 3), (tmp_path / "nowhere", 2)):
        done = cli(source, "--out", tmp_path / "out")
        assert done.returncode == code and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")
    assert cli("--out", tmp_path).returncode == cli(good).returncode == 2
    assert not (tmp_path / "out").exists()


def test_convert_help_is_instant():
    """It needs no torch, whose import takes seconds."""
    code = "import runpy, sys; sys.argv[1:] = ['--help']; sys.modules['torch'] = None; " \
           "runpy.run_path('convert_weights.py', run_name='__main__')"
    assert "examples:" in subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True).stdout


def test_convert_sources_may_stand_behind_flags(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["convert_weights.py", "a", "--preset", "omni-7b", "b", "--out", "c", "d"])
    assert cw.parse_args().sources == ["a", "b", "d"]


@pytest.mark.parametrize("name", ("SIGINT", "SIGTERM"))
def test_convert_interrupted(tmp_path, name):
    """No folder, no traceback, the exit status of shells; sizes may be in megabytes."""
    code = f"import os, runpy, signal; import model as M; M.write_tensors = lambda *args: os.kill(os.getpid(), signal.{name}); " \
           "runpy.run_path('convert_weights.py', run_name='__main__')"
    folder, = put(tmp_path / "a", llama_state())
    done = subprocess.run([sys.executable, "-c", code, folder, "--out", tmp_path / "out", "--max-shard", "500MB"], cwd=HERE,
                          capture_output=True, text=True)
    assert done.returncode == 130 and not done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert [cw.size(text) for text in ("5GB", "500mb", "2")] == [5e9, 5e8, 2e9]


SLOW_WRITER = """if True:
    import sys
    import convert_weights as cw
    write = cw.write_shard
    cw.write_shard = lambda path, *more: (write(path, *more), print("ready", flush=True), sys.stdin.readline())
    cw.convert([sys.argv[1]], sys.argv[2], max_shard=15000)"""


@pytest.mark.slow
def test_convert_killed(tmp_path):
    """SIGKILL at any shard leaves no output folder, the next run removes what is left, the source is as before."""
    folder, = put(tmp_path / "a", llama_state())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for shard in range(4):
        run = subprocess.Popen([sys.executable, "-c", SLOW_WRITER, folder, tmp_path / "out"], cwd=HERE,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for ready in range(shard + 1):
            run.stdout.readline()
            os.write(run.stdin.fileno(), b"\n" * (ready < shard))
        run.send_signal(signal.SIGKILL)
        run.wait()
        assert not (tmp_path / "out").exists() and list(tmp_path.glob("out.tmp-*"))
    cw.convert([folder], tmp_path / "out")
    assert not list(tmp_path.glob("out.tmp-*")) and M.load(tmp_path / "out")
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


# getrusage would count what the tests themselves held when they started the process
PEAK = """import re, sys, convert_weights as cw
cw.{}
print(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])"""


@pytest.mark.slow
def test_convert_memory(tmp_path):
    """A 1 GB model takes little more memory than its largest tensor (131 MB) beside what reading its headers takes."""
    sizes = (2048, 8, 16, 16, 8192, 32000)
    config = TINY_LLAMA | dict(zip(("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                                    "intermediate_size", "vocab_size"), sizes))
    state = M.Model(M.ModelConfig(llm=M.LLMConfig(*sizes))).half().state_dict()
    put(tmp_path / "a", {cw.original(k): x for k, x in state.items()}, config, "bin shards")
    peaks = [int(subprocess.run([sys.executable, "-c", PEAK.format(call), tmp_path / "a", tmp_path / "out"], cwd=HERE,
                                capture_output=True, text=True).stdout) * 1024
             for call in ("plan_weights(sys.argv[1:2])", "convert(sys.argv[1:2], sys.argv[2])")]
    assert peaks[1] - peaks[0] < 3 * 32000 * 2048 * 2, peaks


# ---- Train

def golden_batch(c, t):
    """The Batch of a ChatBind training fixture: one image per row that has a placeholder."""
    ids, labels = t["in.input_ids"], t["in.labels"]
    rows, columns = (ids == c["special_token_ids"]["im_patch"]).nonzero(as_tuple=True)
    return data.Batch(ids, labels, {"image": t["in.images"][rows]}, {"image": torch.stack([rows, columns])})


@pytest.mark.parametrize("stage", (1, 2))
def test_golden_chatbind_train(stage):
    meta, weights, t = read_golden("chatbind/train")
    model, ids = golden_chatbind(meta, weights), meta["config"]["special_token_ids"]
    model.cfg = M.replace(model.cfg, added_tokens={"<im_start>": ids["im_start"], "<im_end>": ids["im_end"]})
    row, batch, total = train.STAGES["chatbind", stage], golden_batch(meta["config"], t), meta["schedule"]["total_steps"]
    learned = train.learn(model, row)
    opt = torch.optim.AdamW(learned.values(), weight_decay=0.0)
    ours = {"embed_start_end": "llm.embed.weight"} | {k: cw.translate(k, cw.CHATBIND) for k in weights["state_dict"]}

    def check(kind, get):
        for name in [n for n in t if n.startswith(f"out.stage{stage}.{kind}.")]:
            key = name.split(f".{kind}.")[1]
            got = get(dict(model.named_parameters())[ours[key]])
            close(meta, t, name, got[[ids["im_start"], ids["im_end"]]] if key == "embed_start_end" else got)
    model(batch)["lm"].backward()
    check("grad", lambda p: p.grad)
    opt.zero_grad()
    for step, want in enumerate(meta[f"stage{stage}_steps"]):
        lr = row.lr * train.schedule(step, total, 1 / total)
        losses, norm = train.update(model, opt, [batch], lr, meta["optimizer"]["max_grad_norm"], row)
        assert lr == pytest.approx(want["lr"], rel=1e-6)
        assert losses["lm"] == pytest.approx(want["loss"], rel=PARITY)
        assert norm == pytest.approx(want["grad_norm_before_clip"], rel=PARITY)
    check("after", lambda p: p.data)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with a small shapes world and its tokenizer."""
    out = tmp_path_factory.mktemp("world")
    shapes.main(["--out", str(out), "--pictures", "24", "--clips", "6", "--sounds", "6", "--vocab-size", "400"])
    return out


CLOCK = "samples_per_s", "tokens_per_s", "memory_gb"    # what differs from run to run


def test_train_names_the_tokenizer_as_it_is_looked_for(world, tmp_path):
    shutil.copy(world / "tokenizer.model", tmp_path / "bpe400.model")
    run_train(world, tmp_path / "run", f"tokenizer={tmp_path}/bpe400.model", "steps=1", "batch=1")
    assert chat.open_session(tmp_path / "run/weights", "cpu").tok.sp.vocab_size() == 400


def run_train(world, out, *flags):
    train.main(["system=tiny", "stage=2", f"data={world}/conversations.json", f"tokenizer={world}/tokenizer.model", f"out={out}", "batch=4",
                "lr=0.001", "workers=0", "log_every=1", "save_every=1000", *flags])
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("box", ([0.0, 0.0, 1.0, 1.0], [0.5, 0.0, 0.75, 0.5], [0.3, 0.6, 0.31, 0.61], [0.4, 0.4, 0.4, 0.4]))
def test_train_box_share_is_the_area_in_each_patch(box):
    share = M.box_share(torch.tensor([box]), 16)[0].view(4, 4)
    x1, y1, x2, y2 = box
    inside = torch.tensor([[max(min(x2, (i + 1) / 4) - max(x1, i / 4), 1e-6) * max(min(y2, (j + 1) / 4) - max(y1, j / 4), 1e-6)
                            for i in range(4)] for j in range(4)])
    assert torch.allclose(share, inside / inside.sum(), atol=1e-5)


def test_train_words_of_a_box_are_told_by_its_patches(world):
    s, stage, model, prepared = train.prepare(train.parse_settings(["stage=1", f"data=reg:{world}/REG_train.jsonl", "device=cpu",
                                                                    f"tokenizer={world}/tokenizer.model"]))
    batch = data.collate([prepared[i] for i in range(3)], prepared.n_token)
    batch.media["box"][:] = torch.tensor([[0, 0, 0.25, 0.25]])                              # the first two rows of two patches
    seen = []
    model.readers["imagebind"].register_forward_hook(lambda m, args, out: (out.retain_grad(), seen.append(out))[1] and None)
    model(batch, words=True)["words"].backward()
    strength = seen[0].grad.norm(dim=-1).view(3, 8, 8)
    assert strength[:, :2, :2].min() > 100 * strength[:, 2:, 2:].max() > 0


def test_train_asks_in_the_words_of_a_file(world, tmp_path):
    (tmp_path / "asked.json").write_text('{"REC": ["Quo vadis, <expr>?<image>"]}')
    flags = [f"data=rec:{world}/REG_train.jsonl", f"tokenizer={world}/tokenizer.model", f"templates={tmp_path}/asked.json"]
    plain, front = (train.prepare(train.parse_settings(["stage=1", *flags, *more]))[3] for more in ((), ("front=1",)))
    assert plain.tok.decode(plain[0].ids[:8]).startswith("USER: Quo")
    assert front[0].slots[0][1] < plain[0].slots[0][1]


def test_datasets_go_to_loader_processes(world):
    """Where these are no forks (Python 3.14, macOS, Windows), all that a sample is made of must be told them."""
    flags = [f"data=rec:{world}/REC_train.jsonl@0.5", f"tokenizer={world}/tokenizer.model", "device=cpu"]
    prepared = train.prepare(train.parse_settings(["stage=2", *flags]))[3]
    assert pickle.loads(pickle.dumps(prepared))[0].ids == prepared[0].ids and pickle.dumps(datasets.FORMATS)


def test_data_too_little_memory_is_no_fault_of_a_file():
    for read, error in ((lambda path: torch.empty(10 ** 15), MemoryError), (lambda path: 1 / 0, data.MediaError)):
        with pytest.raises(error):
            data.guarded(read)("a.png")


def test_train_errors_of_a_loader_process_name_the_file():
    def fail(samples):
        raise data.MediaError("a.png: no such file")
    with pytest.raises(data.MediaError) as error:
        next(iter(torch.utils.data.DataLoader([0], num_workers=1, collate_fn=fail)))
    assert data.told(error.value) == "data.MediaError: a.png: no such file" and data.told(OSError("one\ntwo")) == "one\ntwo"


def test_datasets_take_a_share(world):
    whole, part = (datasets.open_set(f"rec:{world}/REC_train.jsonl{share}") for share in ("", "@0.25"))
    assert len(part) == round(len(whole) / 4) and len(part.sizes()) == len(part)
    more = datasets.open_set(f"rec:{world}/REC_train.jsonl@2.25")
    assert more.index == [*range(len(whole))] * 2 + part.index
    assert (part[0].meta, part[len(part) - 1].meta) == (whole[0].meta, whole[len(whole) - 1].meta)


def test_train_losses_count_by_their_weights():
    x = torch.nn.Parameter(torch.ones(2))
    ids = torch.ones(1, 2, dtype=torch.long)
    opt = torch.optim.SGD([x], lr=0)
    batch, losses = data.Batch(ids, ids, {}, {}), lambda batch, words: {"a": x[0], "b": x[1]}
    stage = train.Stage("", 0, 1, weights={"b": 2})
    _, norm = train.update(losses, opt, [batch], 0, 9, stage)
    assert norm == pytest.approx(5 ** 0.5)
    train.update(losses, opt, [batch], 1, 0, stage)             # clip=0 does not clip
    assert x.tolist() == [0, -1]


def test_train_nextchat_batches_end_with_the_mock(pointing, world):
    flags = ["system=nextchat", f"init={pointing}/nextchat", f"data=res:{world}/RES_train.jsonl", "batch=3", "steps=1", "workers=0"]
    batches = []
    for number in (1, 3):
        s, stage, model, prepared = train.prepare(train.parse_settings([*flags, f"stage={number}"]))
        batches.append(next(iter(train.batches(prepared, s, stage, 0))))
    boxes, masks = (batch.targets["at"] for batch in batches)
    assert [len(batch.ids) for batch in batches] == [4, 3] and "masks" in masks and "masks" not in boxes and s.max_len == 4096
    assert (batches[0].labels[3] == data.IGNORE).all() and boxes["slots"][0].tolist() == [0, 1, 2, 3]
    assert torch.equal(boxes["boxes"][3], datasets.mock(56).turns[1][1].tensor)
    alone = batches[0]._replace(targets={}, media={}, slots={})
    with torch.no_grad():
        assert all(torch.isfinite(value) for value in model(batches[0]).values()) and model(alone)["lm"] > 0


def test_train_boxes_and_the_mock_count_alike_in_micro_batches(pointing, world):
    files = ",".join(f"{name}:{world}/{file}_train.jsonl" for name, file in (("rec", "REC"), ("reg", "REG")))
    flags = ["system=nextchat", "stage=1", f"init={pointing}/nextchat", f"data={files}", "batch=6", "steps=1", "workers=0", "seed=1"]
    results = []
    for micro in (6, 2, 1):
        s, stage, model, prepared = train.prepare(train.parse_settings([*flags, f"micro={micro}"]))
        opt = train.optimizer(train.learn(model, stage), stage, s)
        losses, norm = train.update(model, opt, list(train.batches(prepared, s, stage, 0)), 0, 1, stage)
        results.append([losses[name] for name in ("lm", "at_l1", "at_cycle_hidden", "at_cycle_box")])
    assert all(result == pytest.approx(results[0], rel=1e-5) for result in results)


def test_train_the_mock_does_not_count(pointing, world, tmp_path):
    """Boxes of micro-batches of which some have none but the mock's."""
    data = f"data=rec:{world}/REC_train.jsonl,caption:{world}/CAP_train.jsonl"
    flags = ["system=nextchat", "stage=1", f"init={pointing}/nextchat", data, "batch=8", "steps=1", "workers=0", "log_every=1", "seed=1"]
    for micro in (1, 8):
        train.main([*flags, f"micro={micro}", f"out={tmp_path}/{micro}"])
    (one,), (eight,) = (log_of(tmp_path / str(micro)) for micro in (1, 8))
    assert all(one[name] == pytest.approx(eight[name], rel=1e-4) for name in ("lm", "at_l1", "at_cycle_hidden"))


@pytest.mark.parametrize("width", (768, 767))
def test_train_nextgpt_stage_2_learns_to_draw(tmp_path, width):
    meta, weights, _ = read_golden("nextgpt/stage12_loss")
    model = golden_nextgpt(meta, cw.rename(weights, cw.NEXTGPT), nextgpt_tokenizer())
    M.save(model, tmp_path / "init", extra=[LLAMA_TOKENIZER])
    path = nextgpt_files(tmp_path, [{"image_name": "a.jpg", "caption": text} for text in meta["captions"]])
    np.save(tmp_path / "embed/a.jpg.npy", np.zeros((77, width), np.float16))
    flags = ["system=nextgpt", "stage=2", f"data=nextgpt:{path}", f"init={tmp_path / 'init'}", f"out={tmp_path / 'run'}", "steps=2",
             "batch=2", "workers=0", "log_every=1"]
    if width != 768:
        with pytest.raises(ValueError, match="img: caption embeddings of .77, 767"):
            train.main(flags)
        return
    train.main(flags)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [set(row) >= {"lm", "img_l2"} for row in rows] == [True, True] and rows[0]["lr"] == 4e-4 and rows[1]["lr"] == 0
    assert json.loads((tmp_path / "run/settings.json").read_text())["max_len"] == 512
    old, new = (weights_of(folder) for folder in (tmp_path / "init", tmp_path / "run/weights"))
    changed = {key.split(".proj.")[0] for key in old if not torch.equal(old[key], new[key])}
    assert changed == {"llm.embed.weight", "llm.lm_head.weight", "writers.img"}


@pytest.mark.slow
@pytest.mark.parametrize("stage", (1, 2, 3))
def test_train_nextgpt_stages_run_on_real_samples(tmp_path, stage):
    root, tokenizer = need(SHARED / "samples/nextgpt", "samples"), CHAT_WEIGHTS / "tokenizer.model"
    endings, system = {"img": "jpg", "vid": "mp4", "aud": "wav"}, data.SYSTEMS["nextgpt"]
    embeds = {kind: datasets.read_embedding(next(root.glob(f"embed/*.{ending}.npy"))) for kind, ending in endings.items()}
    out_dims = {kind: ((1,) + x.shape)[-2:] for kind, x in embeds.items()}
    size, tiny = data.Tokenizer(tokenizer).sp.vocab_size(), M.PRESETS["tiny"]
    llm = replace(tiny.llm, vocab_size=size + len(system.added), lora_rank=2 * (stage == 3), tied=False)
    projections = {kind: G.ProjectionConfig(llm.dim, len(tokens), *out_dims[kind], 16, 1, 2, 16) for kind, tokens in system.signals.items()}
    torch.manual_seed(0)
    model = M.Model(replace(tiny, llm=llm, sam=None, system="nextgpt", writes=system.signals, projections=projections,
                            added_tokens={token: size + i for i, token in enumerate(system.added)},
                            reads={kind: "imagebind" for kind in ("image", "video", "audio")}))
    M.initialise(model)
    M.save(model, tmp_path / "init", [tokenizer])
    tails = ("_generation", "_comprehension") if stage == 3 else ("",)
    files = ",".join(f"nextgpt:{root}/{name}{tail}.json" for tail in tails for name in ("cc3m", "webvid", "audiocap"))
    train.main(["system=nextgpt", f"stage={stage}", f"data={files}", f"init={tmp_path}/init", f"out={tmp_path}/run", "batch=2",
                f"steps={3 * len(tails)}", "workers=0", "log_every=1", "max_bad=0"])
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [[kind for kind in out_dims if f"{kind}_l2" in row] for row in rows] == {
        1: [[]] * 3, 2: [["img"], ["vid"], ["aud"]], 3: [["img"], ["vid"], ["aud"], [], [], []]}[stage]


def test_train_data_sets_take_turns_in_nextgpt():
    prepared, s = Thing(sets=[range(6), range(9)], sizes=[1] * 15), train.Settings(batch=3, seed=5)
    rows = list(itertools.islice(train.numbers(prepared, s, train.STAGES["nextgpt", 1]), 12))
    assert [[i >= 6 for i in row] for row in rows] == [[False] * 3, [True] * 3] * 6
    assert sorted(sum(rows[1:6:2], [])) == list(range(6, 15)) != sum(rows[1:6:2], []) and rows[:6] != rows[6:]


def weights_of(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("cut, workers", [(1, 0), (3, 2), (5, 0)])
def test_resume_equals_straight_run(world, tmp_path, cut, workers):
    more = ["steps=6", "micro=2", f"workers={workers}"]
    straight = run_train(world, tmp_path / "a", *more)
    run_train(world, tmp_path / "b", *more, f"stop_after={cut}")
    assert not (tmp_path / "b/weights").exists()
    resumed = run_train(world, tmp_path / "b", *more)
    for one, two in zip(straight, resumed, strict=True):
        assert {k: v for k, v in one.items() if k not in CLOCK} == {k: v for k, v in two.items() if k not in CLOCK}
    for name in ("weights/model.safetensors", "step_000006/model.safetensors", "step_000006/optim.safetensors"):
        one, two = load_file(tmp_path / "a" / name), load_file(tmp_path / "b" / name)
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.slow
def test_resume_passes_over_damaged_checkpoints(world, tmp_path, capsys):
    run_train(world, tmp_path, "steps=4", "save_every=1", "keep=4", "stop_after=3")
    for step, name in ((3, "model.safetensors"), (2, "state.json")):
        path = tmp_path / f"step_00000{step}" / name
        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        path.write_bytes(damaged)
    assert train.find_checkpoint(tmp_path, "auto").name == "step_000001"
    assert capsys.readouterr().err.count("damaged") == 2


@pytest.mark.slow
def test_resume_keeps_the_newest_k_and_drops_leftovers(world, tmp_path):
    (tmp_path / "step_000009.tmp-123").mkdir(parents=True)
    run_train(world, tmp_path, "steps=5", "save_every=1", "keep=2")
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_000004", "step_000005"]


def test_resume_elsewhere_is_refused_where_a_run_came_further(world, tmp_path):
    run_train(world, tmp_path, "steps=3", "save_every=1", "stop_after=2")
    for flag in ("resume=none", f"resume={tmp_path}/step_000001"):
        with pytest.raises(SystemExit, match="step_000002 is of a run that came further"):
            run_train(world, tmp_path, "steps=3", flag)
    run_train(world, tmp_path, "steps=3", f"resume={tmp_path}/step_000002")


def test_train_stops_before_a_nonfinite_update(world, tmp_path):
    s, stage, model, prepared = train.prepare(train.parse_settings(
        [f"data={world}/conversations.json", f"tokenizer={world}/tokenizer.model", "batch=2", "steps=1", "workers=0"]))
    learned, batch = train.learn(model, stage), next(iter(train.batches(prepared, s, stage, 0)))
    for value in (float("nan"), float("inf")):
        opt, before = torch.optim.AdamW(learned.values()), {k: p.detach().clone() for k, p in learned.items()}
        hook = model.llm.blocks[0].register_forward_hook(lambda m, i, o: o * value)
        with pytest.raises(FloatingPointError, match="step 7: loss lm"):
            train.update(model, opt, [batch], 1e-3, 1.0, train.STAGES["tiny", 2], step=7)
        hook.remove()
        assert all(torch.equal(before[k], p) for k, p in learned.items())


PUBLISHED = {"chatbind": "chatbind-7b", "nextchat": "nextchat-7b-336", "chatterbox": "chatterbox-13b", "nextgpt": "nextgpt-7b-tiva",
             "omni": "omni-7b"}
# what shapes.py writes for each stage: FORMAT:FILE, with commas between
EXAMPLES = {("chatbind", 1): "captions.json", ("chatbind", 2): "conversations.json",
            ("nextchat", 1): "rec:REC_train.jsonl,reg:REG_train.jsonl", ("nextchat", 2): "rec:REC_train.jsonl,caption:CAP_train.jsonl",
            ("nextchat", 3): "res:RES_train.jsonl", ("chatterbox", 1): "cb-lc-gnd:CB_LC.json,cb-mrg-ref:CB_MRG.json,cb-lc:CB_LC.json",
            ("chatterbox", 2): "cb-lc-gnd:CB_LC.json,cb-mrg-ref:CB_MRG.json,cb-lc:CB_LC.json",
            ("nextgpt", 1): "nextgpt:image_pairs.json,nextgpt:video_pairs.json", ("nextgpt", 2): "nextgpt:image_pairs.json",
            ("nextgpt", 3): "nextgpt:image_instruction.json,nextgpt:image_comprehension.json",
            ("tiny", 1): "numbers.json,regs:parts_train.jsonl", ("tiny", 2): "conversations.json,rec:REC_train.jsonl",
            ("tiny", 3): "res:RES_train.jsonl"}


def little(cfg):
    """A model of the same parts and kinds, each as small as it can be."""
    size = dict(dim=32, n_head=2)
    small = dict(llm=M.replace(cfg.llm, **size, n_kv_head=2, n_layer=2, mlp_dim=48))
    if cfg.imagebind:
        small["imagebind"] = M.replace(cfg.imagebind, out_dim=32, towers={
            kind: M.replace(tower, **size, n_layer=1) for kind, tower in cfg.imagebind.towers.items()})
    if cfg.clip:
        small["clip"] = CLIPConfig(56, 14, n_layer=12, mlp_dim=48, **size)
        small["media"] = cfg.media | {"image_size": 56} | {key: 128 for key in ("sam_size", "det_size") if key in cfg.media}
    if cfg.sam:
        small["sam"] = M.TINY.sam
    if cfg.region:
        small["region"] = M.RegionConfig(32, 32, box_dim=16, groups=4, pool=4)
    if cfg.locator:
        small["locator"] = M.LocatorConfig(SwinConfig(16, (1, 1, 1, 1), (2, 2, 4, 4), 4), 32, 1, 2, 4, 48, 20)
    small["projections"] = {name: M.replace(p, llm_dim=32, dim=32, n_layer=1, mlp_dim=48) for name, p in cfg.projections.items()}
    return M.replace(cfg, **small)


@pytest.mark.slow
@pytest.mark.parametrize("system, stage", EXAMPLES)
def test_train_every_stage_steps_on_what_shapes_writes(world, tmp_path, monkeypatch, system, stage):
    monkeypatch.setitem(M.PRESETS, system, little(M.PRESETS[PUBLISHED.get(system, system)]))
    mixed = M.replace(train.STAGES[system, stage], ordered=False, turns=False)              # so that three steps see all kinds
    monkeypatch.setitem(train.STAGES, (system, stage), mixed)
    shutil.copytree(world, tmp_path / "data", symlinks=True)
    for path in (tmp_path / "data/pictures").iterdir():         # what Stable Diffusion's text tower would make of the caption
        (tmp_path / "data/embed").mkdir(exist_ok=True)
        np.save(tmp_path / f"data/embed/{path.name}.npy", np.random.RandomState(0).randn(77, 768).astype(np.float32))
    files = ",".join(f"{kind}{colon}{tmp_path}/data/{name}" for kind, colon, name in
                     (file.rpartition(":") for file in EXAMPLES[system, stage].split(",")))
    flags = [f"system={system}", f"stage={stage}", f"data={files}", f"tokenizer={world}/tokenizer.model", "batch=4", "micro=2",
             "steps=3", "workers=0", "log_every=1", "save_every=1", "keep=3", "device=cpu"]
    train.main(flags + [f"out={tmp_path}/run"])
    first, last = (weights_of(tmp_path / f"run/step_00000{step}") for step in (1, 3))
    assert [row["step"] for row in log_of(tmp_path / "run")] == [1, 2, 3]
    moved = {name for name in first if not torch.equal(first[name], last[name])}
    learn = train.STAGES[system, stage].learn.split("|")
    unmoved = [part for part in learn if not any(re.fullmatch(part, name) for name in moved)]
    assert first.keys() == last.keys() and not unmoved and (tmp_path / "run/weights/config.json").exists()
    train.main(flags + [f"out={tmp_path}/again", f"resume={tmp_path}/run/step_000001"])
    same_files(tmp_path / "run/step_000003", tmp_path / "again/step_000003")


def test_train_stage_rows_only_learn_what_they_name():
    elsewhere = {("omni", 1), ("omni", 2), ("omni", 3)}        # the union's own tests
    assert train.STAGES.keys() == EXAMPLES.keys() | elsewhere
    for system, number in train.STAGES:
        stage = train.STAGES[system, number]
        with torch.device("meta"):
            model = M.Model(M.PRESETS[PUBLISHED.get(system, system)])
        learned = train.learn(model, stage)
        assert learned and all(p.requires_grad == (name in learned) for name, p in model.named_parameters())
        assert system == "tiny" or not any(".tower." in name for name in learned)
    for odd in ("nothing", "llm.*|nothing", r"nothing|llm\..*", r"llm\.(norm|embed)\.weight|no(t|thing)"):
        with pytest.raises(ValueError, match="no.* matches no parameter"):
            train.learn(model, train.Stage(odd, 1.0, 1))
    assert {*train.learn(model, train.Stage(r"llm\.(norm|embed)\.weight", 1.0, 1))} == {"llm.norm.weight", "llm.embed.weight"}


def test_train_settings_reject_what_they_do_not_know(capsys):
    assert train.parse_settings(["steps=3", "--lr=1e-3", "--save-every", "7"]).save_every == 7
    for wrong, told in (("stepz=3", "near it: steps"), ("steps=many", "steps"), ("steps=-1", "steps=-1"), ("lr=nan", "lr=nan")):
        with pytest.raises(SystemExit):
            train.parse_settings([wrong])
        assert told in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.parse_settings(["--help"])
    assert "--steps int, --steps" not in capsys.readouterr().out        # each name once


def test_train_settings_take_whole_numbers_and_switches_as_people_write_them(capsys):
    s = train.parse_settings(["steps=1e3", "compile=true", "front=False", "batch=1_024"])
    assert (s.steps, s.compile, s.front, s.batch) == (1000, 1, 0, 1024) and type(s.steps) is int
    for wrong in ("steps=1.5", "steps=inf", "steps=nan", "compile=yes"):
        with pytest.raises(SystemExit):
            train.parse_settings([wrong])
        assert f"invalid integer value: '{wrong.split('=')[1]}'" in capsys.readouterr().err


def test_train_settings_of_zero_are_not_the_stages_own():
    for flags, warmup in ((("warmup=0", "weight_decay=0"), 0), ((), 0.05)):
        s = train.parse_settings(["stage=2", f"init={HERE / 'weights/tiny'}", "device=cpu", *flags])
        s, *_ = train.begin(s)
        assert (s.warmup, s.weight_decay, s.lr) == (warmup, 0, 1e-3)


def test_train_settings_come_from_a_file(tmp_path, capsys):
    (tmp_path / "s.json").write_text(json.dumps(train.asdict(train.Settings(lr=1e-5, out="a=b c", micro=2, stage=3))))
    s = train.parse_settings([f"config={tmp_path}/s.json", "micro=4"])
    assert (s.lr, s.out, s.micro, s.stage, s.config) == (1e-5, "a=b c", 4, 3, f"{tmp_path}/s.json")
    for text in ("[1]", "{bad"):
        (tmp_path / "s.json").write_text(text)
        with pytest.raises(SystemExit):
            train.parse_settings([f"config={tmp_path}/s.json"])
        assert "s.json: no JSON object" in capsys.readouterr().err


def test_train_order_is_a_permutation_fixed_by_seed_and_epoch():
    for n, batch in ((10, 3), (1000, 7), (2, 5)):
        sizes = [i * 37 % 11 for i in range(n)]
        order = data.epoch_batches(sizes, batch, 1, 2)
        flat = [i for b in order for i in b]
        assert order == data.epoch_batches(sizes, batch, 1, 2) and len(flat) == len(set(flat)) >= min(n, n - batch + 1)
        assert n == 2 or order != data.epoch_batches(sizes, batch, 1, 3)


# ---- Train: the union of all systems

@pytest.fixture(scope="module")
def union(world, tmp_path_factory):
    """A folder with a small model of every part, `init`, and the first and last record of each kind of data."""
    out = tmp_path_factory.mktemp("union")
    M.save(pointing_model("omni", world / "tokenizer.model"), out / "init", [world / "tokenizer.model"])
    for name in ("pictures", "clips", "sounds"):
        (out / name).symlink_to(world / name)
    (out / "embed").mkdir()
    for path in world.glob("*.json*"):
        text = path.read_text()
        rows = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
        rows = {"data": rows["data"][:2]} if isinstance(rows, dict) else [rows[0], rows[-1]]
        (out / path.name).write_text("\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows))
        for kind in shapes.MEDIA:
            for row in rows if path.name == f"{kind}_generation.json" else ():
                np.save(out / "embed" / f"{Path(row[f'output_{kind}']).name}.npy", np.ones((3, 8), np.float32))
    return out


UNION = ("conversations.json rec:REC_train.jsonl cb-gnd:CB_MRG.json cb-ref:CB_LC.json nextgpt:image_generation.json "
         "nextgpt:video_generation.json nextgpt:audio_generation.json")


@pytest.mark.parametrize("stage, sets, losses", [
    (1, UNION, "lm at_l1 at_giou vg_l1 vg_focal img_l2 vid_l2 aud_l2"),
    (2, UNION, "lm at_cycle_box vg_giou img_l2 vid_l2 aud_l2"),
    (3, "res:RES_train.jsonl cb-gnd:CB_MRG.json", "lm at_focal at_dice at_iou vg_l1 vg_giou vg_focal")])
def test_train_union_learns_from_data_of_all_systems(union, tmp_path, stage, sets, losses):
    names = ",".join(re.sub(r"[^:]+$", lambda name: str(union / name[0]), one) for one in sets.split())
    train.main(["system=omni", f"stage={stage}", f"init={union / 'init'}", f"data={names}", f"out={tmp_path}", "steps=2",
                "workers=0", "batch=99", "log_every=1"])
    *_, row = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert set(losses.split()) <= row.keys() and row["bad"] == 0 and row["grad_norm"] > 0
    old, new = (load_file(folder / "model.safetensors") for folder in (union / "init", tmp_path / "weights"))
    moved = {key for key in old if not torch.equal(old[key], new[key])}
    assert moved and all(re.fullmatch(train.STAGES["omni", stage].learn, key) for key in moved)
    assert {key.split(".")[0] for key in moved} == ({"writers"} if stage == 3 else {"llm", "readers", "writers"})


def test_train_union_has_every_part():
    with torch.device("meta"):
        model = M.Model(M.PRESETS["omni-7b"])
    parts = {line.split()[0]: int(line.split()[1].replace(",", "")) for line in M.parameter_table(model).splitlines()[1:]}
    assert {"llm", "readers.imagebind.tower", "readers.clip.tower", "readers.box.0", "readers.region.flatten",
            *(f"writers.{name}" for name in M.OMNI.writes)} <= parts.keys()
    assert 6.7e9 < parts["llm"] < 6.8e9 and 9e9 < sum(parts.values()) < 10e9
    for number in (1, 2, 3):
        assert train.learn(model, train.STAGES["omni", number])


# ---- Ranks

MINI = M.replace(M.TINY, sam=None, media=M.TINY.media | {"sam_size": 0},
                 llm=M.LLMConfig(dim=32, n_layer=2, n_head=2, n_kv_head=2, mlp_dim=48, tied=True, lora_rank=2, lora_dropout=0.1),
                 imagebind=M.replace(M.TINY.imagebind, out_dim=32, towers={
                     kind: M.replace(tower, dim=16, n_layer=1) for kind, tower in M.TINY.imagebind.towers.items()}))
PLAIN = M.replace(MINI, llm=M.replace(MINI.llm, lora_dropout=0.0))
MINI_STAGES = {"full": (r".*", ()), "projector": (train.PROJECTOR, ()), "lora": (train.PROJECTOR + r"|.*lora_[AB]", ()),
               "rows": (train.PROJECTOR + r"|llm\.embed\.weight", ("<im_start>", "<im_end>")), "words": (train.TINY_WORDS, ())}


@pytest.fixture
def mini(monkeypatch, world, tmp_path):
    """mini(out, stage, *flags, n=1, hurt=...) trains a small model in n forked processes, after hurt(); -> their exit codes."""
    for name, cfg in (("mini", MINI), ("plain", PLAIN)):
        monkeypatch.setitem(M.PRESETS, name, cfg)
        for number, (stage, (learn, rows)) in enumerate(MINI_STAGES.items()):
            monkeypatch.setitem(train.STAGES, (name, number), train.Stage(learn, 3e-3, 4, rows=rows, rates={train.TOWER: 0.3},
                                                                          words=stage == "words"))

    def flags(out, stage, more):
        own = [f"stage={list(MINI_STAGES).index(stage)}", f"data={world}/conversations.json", f"tokenizer={world}/tokenizer.model",
               f"out={out}", "device=cpu", "workers=0", "log_every=1", "save_every=100", "steps=12"]
        return own + [f"system={'plain' if '-plain' in more else 'mini'}"] + [flag for flag in more if flag != "-plain"]

    def run(out, stage, *more, n=1, hurt=lambda rank: None):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]

        def one(rank):
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            torch.set_num_threads(1)
            hurt(rank)
            train.main(flags(out, stage, more))
        return finish(start([lambda rank=rank: one(rank) for rank in range(n)]))
    run.here = lambda out, stage, *more: train.main(flags(out, stage, more))
    return run


def start(jobs):
    """Run functions in forked processes; -> the processes."""
    processes = [multiprocessing.get_context("fork").Process(target=job) for job in jobs]
    for p in processes:
        p.start()
    return processes


def finish(processes):
    """Exit codes, in order; once one process fails the others end, as under torchrun."""
    while all(p.exitcode in (None, 0) for p in processes) and any(p.exitcode is None for p in processes):
        time.sleep(0.01)
    for p in processes:
        if any(q.exitcode for q in processes) and p.exitcode is None:
            p.join(0.5)
            p.kill()
        p.join()
    return [p.exitcode for p in processes]


def log_of(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]


def same_files(one, two, names=("model.safetensors", "optim.safetensors")):
    for name in names:
        a, b = load_file(one / name), load_file(two / name)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name


@pytest.mark.slow
@pytest.mark.parametrize("precision", ("fp32", "bf16"))
@pytest.mark.parametrize("stage", MINI_STAGES)
def test_ranks_resume_at_any_step_is_exact(mini, tmp_path, stage, precision):
    more = [f"precision={precision}", "micro=2"]
    mini.here(tmp_path / "a", stage, *more, "save_every=1", "keep=12")
    want = log_of(tmp_path / "a")
    for cut in range(1, 12):
        out = tmp_path / f"b{cut}"
        mini.here(out, stage, *more, f"resume={tmp_path}/a/step_{cut:06}", f"workers={2 * (cut == 6)}")
        assert log_of(out) == want[cut:]
        same_files(tmp_path / "a/step_000012", out / "step_000012")


def test_ranks_resume_needs_the_random_state_of_the_step(mini, tmp_path, monkeypatch):
    mini.here(tmp_path / "a", "lora", "steps=3", "save_every=1")
    monkeypatch.setattr(torch, "manual_seed", lambda seed: None)
    mini.here(tmp_path / "b", "lora", "steps=3", f"resume={tmp_path}/a/step_000001")
    assert log_of(tmp_path / "a")[1:] != log_of(tmp_path / "b")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ("full", "projector", "lora"))
def test_ranks_two_processes_compute_what_one_does(mini, tmp_path, stage):
    more = ["-plain", "steps=20", "batch=8"]
    mini.here(tmp_path / "one", stage, *more)
    assert mini(tmp_path / "two", stage, *more, n=2) == [0, 0]
    assert mini(tmp_path / "packed", stage, *more, "pack=300", "micro=2", n=2) == [0, 0]
    for row, two, packed in zip(*(log_of(tmp_path / name) for name in ("one", "two", "packed")), strict=True):
        assert two["lm"] == pytest.approx(row["lm"], rel=1e-6) and two["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-4)
        assert packed["lm"] == pytest.approx(row["lm"], rel=1e-5)


@pytest.mark.slow
def test_ranks_in_bfloat16_stay_near_one_process(mini, tmp_path):
    more = ["-plain", "steps=6", "batch=8", "precision=bf16"]
    mini.here(tmp_path / "one", "full", *more)
    assert mini(tmp_path / "two", "full", *more, n=2) == [0, 0]
    for one, two in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert two["lm"] == pytest.approx(one["lm"], rel=1e-2)


MIXED = {"plain": "rec:{0}/REC_train.jsonl,{0}/conversations.json",
         "chatterbox": "cb-lc-gnd:{0}/CB_LC.json,cb-mrg-ref:{0}/CB_MRG.json,cb-lc:{0}/CB_LC.json"}


@pytest.mark.slow
@pytest.mark.parametrize("system", MIXED)
def test_ranks_with_other_kinds_than_their_neighbours_compute_what_one_does(mini, pointing, world, tmp_path, system, monkeypatch):
    stage = train.replace(train.STAGES["chatterbox", 2], learn=".*", batch=4, ordered=False)
    monkeypatch.setitem(train.STAGES, ("chatterbox", 1), stage)
    more = ["micro=1", "steps=3", "data=" + MIXED[system].format(world), "seed=3"]
    more += ["-plain"] if system == "plain" else ["system=chatterbox", "stage=1", f"init={pointing}/chatterbox", "media=" + str(world)]
    mini.here(tmp_path / "one", "full", *more)
    assert mini(tmp_path / "two", "full", *more, n=2) == [0, 0]
    for one, two in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert one.keys() == two.keys() and all(two[key] == pytest.approx(one[key], rel=1e-4) for key in one if key != "mfu")


@pytest.mark.slow
def test_ranks_plan_is_what_two_processes_hold(mini, tmp_path):
    held = multiprocessing.Array("d", 2)

    def measure(rank):
        def save(out, step, learned, opt, *rest):
            mine = [train.local(p) for p in learned.values()] + [train.local(x) for x in ranks.moments(learned, opt).values() if x.ndim]
            held[rank] = sum(x.nbytes for x in mine)
        train.save_checkpoint = save
    assert mini(tmp_path, "full", "-plain", "steps=1", n=2, hurt=measure) == [0, 0]
    cfg = M.replace(PLAIN, llm=M.replace(PLAIN.llm, vocab_size=405))
    want = ranks.plan(M.Model(cfg), 2, 64, bf16=False)
    assert max(held) == pytest.approx(want["weights"] + want["moments"], rel=0.01) and want["gradients"] * 2 == want["moments"]


def test_ranks_plan_of_a_13b_step(capsys):
    with torch.device("meta"):
        params = sum(p.numel() for p in M.Model(M.PRESETS["chatterbox-13b"]).parameters())
    total = []
    for n in (1, 8, 64):
        train.main(["system=chatterbox", "stage=2", f"plan={n}", "batch=960", *["micro=6"] * (n == 8)])
        table, memory = capsys.readouterr().out.split(f"micro={6 if n == 8 else 960 // n} samples of 2048 tokens at a time:")
        assert sum(int(row.split()[1].replace(",", "")) for row in table.splitlines()[1:-2]) == params
        total.append(n * float(re.search(r"weights +([\d.]+) GB", memory)[1]))
    assert 2 * params < 1e9 * total[0] < 2.2 * params and total == pytest.approx([total[0]] * 3, rel=0.01)


def test_ranks_plan_measures_what_a_block_keeps():
    cfg, x = M.LLMConfig(dim=32, n_layer=3, n_head=2, n_kv_head=2, mlp_dim=48, vocab_size=50), torch.zeros(1, 20, 32, requires_grad=True)
    block, rope = M.LLMBlock(cfg, 0), M.rope_table(cfg, 20, "cpu")
    real = ranks.kept_bytes(lambda: block(x, rope, None), [*block.parameters(), *rope])
    names = {name for name, _ in block.named_parameters()}
    assert ranks.block_bytes(cfg, 20, False, names) == pytest.approx(real, rel=0.02) and real > 20 * 32 * 4 * 8
    model = M.Model(M.ModelConfig(llm=cfg))
    one, many, short = (ranks.plan(model, n, 20, False, how) for n, how in ((1, ""), (8, ""), (8, "block")))
    assert one["gathered"] == 0 < many["gathered"] and many["moments"] == pytest.approx(one["moments"] / 8, rel=0.1)
    assert short["activations"] < many["activations"] == one["activations"]


@pytest.mark.slow
@pytest.mark.parametrize("stage, files, losses", (("words", ("numbers.json", "regs:parts_train.jsonl"), {"words"}),
                                                  ("full", ("conversations.json", "rec:REC_train.jsonl"), {"lm", "at_l1", "at_cycle_box"})))
def test_ranks_do_without_boxes_that_only_another_has(mini, world, tmp_path, stage, files, losses):
    paths = ",".join(f"{kind}{colon}{world}/{name}" for kind, colon, name in (file.rpartition(":") for file in files))
    more = ["-plain", "steps=20", "batch=4", "micro=2", f"data={paths}"]
    mini.here(tmp_path / "one", stage, *more)
    assert mini(tmp_path / "two", stage, *more, n=2) == [0, 0]
    for row, two in zip(*(log_of(tmp_path / name) for name in ("one", "two")), strict=True):
        assert losses & two.keys() == losses & row.keys()
        assert all(two[name] == pytest.approx(row[name], rel=1e-6, abs=1e-6) for name in losses & row.keys())
        assert two["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-4)
    assert losses <= {name for r in log_of(tmp_path / "one") for name in r}


@pytest.mark.slow
def test_ranks_learn_masks_only_where_all_have_them(mini, world, tmp_path, monkeypatch):
    monkeypatch.setitem(M.PRESETS, "plain", M.replace(PLAIN, sam=M.TINY.sam, media=M.TINY.media))
    more = ["-plain", "steps=12", "batch=4", "micro=2", f"data=rec:{world}/REC_train.jsonl,res:{world}/RES_train.jsonl"]
    assert mini(tmp_path / "two", "full", *more, n=2) == [0, 0]
    kinds = [{"at_l1", "at_dice"} & row.keys() for row in log_of(tmp_path / "two")]
    assert {"at_l1"} in kinds and len(kinds) == 12
    mini.here(tmp_path / "one", "full", *more[:-1], f"data=res:{world}/RES_train.jsonl")
    assert all("at_dice" in row and "at_l1" not in row for row in log_of(tmp_path / "one"))


@pytest.mark.slow
def test_ranks_checkpoints_go_from_any_number_to_any_other(mini, tmp_path):
    for i, path in enumerate(((2, 1), (1, 2), (3, 2), (2, 2))):
        out, more = tmp_path / str(i), ["-plain", "steps=4", "batch=6"]
        assert not any(mini(out, "full", *more, "stop_after=2", n=path[0]) + mini(out, "full", *more, n=path[1]))
    assert log_of(tmp_path / "0")[0]["lm"] == log_of(tmp_path / "3")[0]["lm"]
    mini.here(tmp_path / "straight", "full", *more)
    for i in range(4):
        assert [r["lm"] for r in log_of(tmp_path / str(i))] == pytest.approx([r["lm"] for r in log_of(tmp_path / "straight")], rel=1e-6)
    assert mini(tmp_path / "5", "full", *more, n=2) == [0, 0]
    same_files(tmp_path / "3/step_000004", tmp_path / "5/step_000004")          # same number of ranks: to the bit


@pytest.mark.slow
def test_ranks_hold_only_their_part_of_a_model():
    """In a process that ran nothing before: what earlier tests left would be freed meanwhile, and hide what is taken."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-o", "python_functions=alone_*",
               f"{__file__}::alone_ranks_hold_only_their_part"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]            # 5 if it were not found


def alone_ranks_hold_only_their_part(mini, tmp_path, world, monkeypatch):
    cfg = M.replace(PLAIN, llm=M.replace(PLAIN.llm, dim=256, n_layer=24, n_head=4, n_kv_head=4, mlp_dim=1024, vocab_size=403),
                    added_tokens={token: 400 + i for i, token in enumerate(data.IM)}, writes={})
    finish(start([lambda: M.save(M.Model(cfg), tmp_path / "w", [world / "tokenizer.model"])]))       # leaves no memory behind here
    size, peaks = (tmp_path / "w/model.safetensors").stat().st_size, multiprocessing.Array("d", 2)

    def own():                                  # bytes; mapped pages of the file are the page cache's
        return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    def measure(rank, load=train.load_model):
        def measured(*args, fill=train.fill):
            load(*args)                         # what torch imports and keeps for it is no part of a model: 60 MB
            gc.collect()                        # that model, and what earlier tests left, which would go while we measure
            ctypes.CDLL(None).malloc_trim(0)    # free pages would hide what is taken now
            before = own()

            def watched(*args):
                fill(*args)
                peaks[rank] = max(peaks[rank], own() - before)
            monkeypatch.setattr(train, "fill", lambda named, *file: [watched({name: x}, *file) for name, x in named.items()])
            return load(*args)
        train.load_model = measured
    assert mini(tmp_path / "run", "projector", f"init={tmp_path}/w", "steps=1", n=2, hurt=measure) == [0, 0]
    largest = 4 * 1024 * 256
    for peak in peaks:                          # half of the model, a tensor on its way, 8 MB for sharding itself
        assert 0.48 * size < peak < 0.5 * size + largest + 8e6


@pytest.mark.slow
def test_ranks_killed_at_any_time_resumes_exactly(mini, tmp_path):
    r, more, out = random.Random(5), ["steps=90", "save_every=1", "keep=2"], tmp_path / "b"
    mini.here(tmp_path / "a", "full", *more)
    for _ in range(30):
        (child,) = start([lambda: (torch.set_num_threads(1), mini.here(out, "full", *more))])
        newest = train.find_checkpoint(out, "auto")
        while child.is_alive() and train.find_checkpoint(out, "auto") == newest:
            time.sleep(0.002)
        time.sleep(r.uniform(0, 0.05))
        child.kill()
        child.join()
        assert train.find_checkpoint(out, "auto") == max(out.glob("step_??????"))       # nothing is damaged, the newest counts
    mini.here(out, "full", *more)
    same_files(tmp_path / "a/step_000090", out / "step_000090")
    assert not list(out.glob("*.tmp-*"))


@pytest.mark.slow
def test_ranks_killed_at_any_point_of_a_save_resumes_exactly(mini, tmp_path):
    points, more = [(M, "write_tensors"), (M, "sync"), (os, "rename"), (train.shutil, "rmtree")], ["steps=4", "save_every=1", "keep=1"]
    mini.here(tmp_path / "straight", "full", *more)
    for at in range(1, 13):
        calls = iter(range(1, 100))

        def hurt(rank, after=False):
            for module, name in points:
                def die(*args, real=getattr(module, name), **kw):
                    done = real(*args, **kw)
                    if (tmp_path / f"{at}/step_000001").exists() and next(calls) == at:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return done
                setattr(module, name, die)
        assert mini(tmp_path / str(at), "full", *more, hurt=hurt) == [-signal.SIGKILL]
        assert train.find_checkpoint(tmp_path / str(at), "auto")
        mini.here(tmp_path / str(at), "full", *more)
        same_files(tmp_path / "straight/step_000004", tmp_path / f"{at}/step_000004")


def interrupt(module, name, numbers, step=3):
    """A `hurt` that sends signals to the last rank inside the step-th call of module.name."""
    def hurt(rank):
        calls, real = itertools.count(1), getattr(module, name)

        def send(*args, **kw):
            if next(calls) == step and rank == int(os.environ["WORLD_SIZE"]) - 1:
                for number in numbers:
                    os.kill(os.getpid(), number)
            return real(*args, **kw)
        setattr(module, name, send)
    return hurt


@pytest.mark.slow
@pytest.mark.parametrize("n", (1, 2))
@pytest.mark.parametrize("place", ((train, "update"), (data, "collate"), (train, "save_checkpoint")), ids=("forward", "data", "save"))
def test_ranks_signals_save_and_leave(mini, tmp_path, place, n):
    more = ["save_every=1", "keep=9", "batch=4"]
    for numbers in ((signal.SIGTERM,), (signal.SIGTERM, signal.SIGTERM), (signal.SIGUSR1,))[:1 if place[1] == "update" else 3]:
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        assert mini(out, "projector", *more, n=n, hurt=interrupt(*place, numbers)) == [0] * n
        steps = [p.name for p in sorted(out.glob("step_*"))]
        assert steps[-1] in ("step_000003", "step_000004") and not (out / "weights").exists()
        assert all(ranks.valid(out / name) for name in steps)
        if n == 1:
            mini.here(out, "projector", *more)
            assert [row["step"] for row in log_of(out)] == list(range(1, 13))


@pytest.mark.slow
@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))
def test_train_signals_to_the_whole_group_save_and_leave(world, tmp_path, number):
    """As batch systems and Ctrl-C send them: loader workers get them too."""
    words = ["system=tiny", "stage=2", f"init={HERE / 'weights/tiny'}", f"data={world}/conversations.json", f"out={tmp_path}", "batch=4",
             "steps=5000", "log_every=1", "workers=2"]
    with subprocess.Popen([sys.executable, HERE / "train.py", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                          start_new_session=True) as run:
        while run.poll() is None and not (tmp_path / "metrics.jsonl").exists():
            time.sleep(0.1)
        os.killpg(run.pid, number)
        told = run.communicate()[1]
    assert run.returncode == 0 and len(list(tmp_path.glob("step_*"))) == 1, told[-2000:]


def test_train_says_where_a_published_projector_goes():
    with pytest.raises(SystemExit, match="convert_weights.py vicuna-7b/ mm_projector.bin"):
        train.main([f"init={HERE / 'weights/tiny'}", "projector=mm_projector.bin", "device=cpu"])


def test_train_names_a_device_that_is_not_there():
    with pytest.raises(ValueError, match="no device mtia here"):
        train.main(["device=mtia", f"init={HERE / 'weights/tiny'}"])


def test_train_ends_with_an_error_of_ours(world, tmp_path):
    """Loader workers, which heed no signal, end too: Python waits for them."""
    code = "import sys, train; train.update = None; train.main(sys.argv[1:])"
    words = ["stage=2", f"init={HERE / 'weights/tiny'}", f"data={world}/conversations.json", f"out={tmp_path}", "batch=4", "steps=9", "workers=2"]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=HERE, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "'NoneType' object is not callable" in done.stderr


@pytest.mark.slow
def test_ranks_a_full_disk_leaves_the_last_checkpoint(mini, tmp_path, capfd):
    mini.here(tmp_path / "size", "full", "steps=1")
    whole = max(path.stat().st_size for path in (tmp_path / "size/step_000001").iterdir())
    for i in range(10):
        limit, out = int(whole * 1.1 * i / 9), tmp_path / str(i)

        def hurt(rank, real=train.save_checkpoint):
            def save(out, step, *more):
                if step == 2:
                    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
                try:
                    real(out, step, *more)
                finally:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            train.save_checkpoint = save
        assert mini(out, "full", "steps=3", "save_every=1", "log_every=9", hurt=hurt) == [4 if limit < whole else 0]
        assert train.find_checkpoint(out, "auto").name == ("step_000001" if limit < whole else "step_000003")
        assert not list(out.glob("*.tmp-*")) and (limit >= whole or "make room" in capfd.readouterr().err)


@pytest.mark.parametrize("name", ("state.json", "model.safetensors", "optim.safetensors", "metrics.jsonl"))
def test_ranks_no_room_for_one_file_leaves_the_last_checkpoint(mini, tmp_path, monkeypatch, capsys, name):
    real = io.open

    def full(path, mode="r", *args, **kw):
        if Path(str(path)).name == name and mode[0] in "wax" and list(tmp_path.glob("step_??????")):
            raise OSError(train.FULL[0], "No space left on device", str(path))
        return real(path, mode, *args, **kw)
    monkeypatch.setattr("builtins.open", full)
    monkeypatch.setattr(io, "open", full)
    with pytest.raises(SystemExit) as error:
        mini.here(tmp_path, "projector", "steps=3", "save_every=1")
    assert error.value.code == 4 and "make room" in capsys.readouterr().err
    assert train.find_checkpoint(tmp_path, "auto").name == "step_000001" and not list(tmp_path.glob("*.tmp-*"))


def test_ranks_out_of_memory_says_what_to_lower(mini, tmp_path, monkeypatch, capsys):
    for i, error in enumerate((torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                               RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))):
        def fail(*args, real=train.update, error=error, **kw):
            if args[6] == 2:
                raise error
            return real(*args, **kw)
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(train, "update", fail)
            mini.here(tmp_path / str(i), "projector", "save_every=1")
        assert "lower micro" in capsys.readouterr().err and train.find_checkpoint(tmp_path / str(i), "auto").name == "step_000002"


def test_ranks_damaged_checkpoints_are_seen(mini, tmp_path):
    mini.here(tmp_path, "full", "steps=2", "save_every=1")
    good, other, r = tmp_path / "step_000002", tmp_path / "step_000001", random.Random(3)
    whole, cases = {p.name: p.read_bytes() for p in good.iterdir()}, []
    for name, raw in whole.items():
        flips = [(at, bytes([raw[at] ^ 1 << r.randrange(8)])) for at in (0, 8, len(raw) - 1, *r.sample(range(len(raw)), 4))]
        cases += [{name: raw[:at] + new + raw[at + 1:]} for at, new in flips]
        cases += [{name: raw[:r.randrange(len(raw))]}, {name: raw[:-1]}, {name: b""}, {name: None}, {name: raw + b"\0"}]
        cases += [{name: (other / name).read_bytes()}]
    cases += [{"model.safetensors": whole["optim.safetensors"], "optim.safetensors": whole["model.safetensors"]}]
    cases += [{"state.json": odd} for odd in (b"[1]", b"null", b'{"self": 1}')]
    assert ranks.valid(good) and len(cases) >= 40
    for case in cases:
        for name, raw in (whole | case).items():
            (good / name).unlink(missing_ok=True) if raw is None else (good / name).write_bytes(raw)
        assert train.find_checkpoint(tmp_path, "auto") == other, case.keys()


BAD_VALUES = float("nan"), float("inf"), 1e38


def poison(place, value, model, batch):
    """Put a number where it hurts; -> what to call to take it away again."""
    if place == "input":
        payload = next(iter(batch.media.values()))
        payload.view(-1)[0] = value
        return lambda: payload.view(-1)[0].zero_()
    if place == "weight":
        part = train.local(model.llm.blocks[0].mlp_norm.weight)
        old = part.clone()
        part[0] = value
        return lambda: part.copy_(old)
    at = {"activation": model.llm.norm, "gradient": model.llm.embed, "loss": model.llm.blocks[1]}[place]
    if place == "gradient":
        return at.register_forward_hook(lambda m, i, o: o.register_hook(lambda g: g * value) and None).remove
    return at.register_forward_hook(lambda m, i, o: o * value).remove


def poisoned_updates(world, out, rank):
    """Every bad number in every place on the last rank: no update may leave a weight that is not finite."""
    s, stage, model, prepared = train.prepare(train.parse_settings(
        ["system=plain", "stage=0", f"data={world}/conversations.json", f"tokenizer={world}/tokenizer.model", "batch=4", "steps=9",
         "workers=0", "device=cpu"]))
    learned, n = train.learn(model, stage), train.ranks()[1]
    for place, value in itertools.product(("input", "weight", "activation", "loss", "gradient"), BAD_VALUES):
        opt, batch = train.optimizer(learned, stage, s), next(iter(train.batches(prepared, s, stage, 0)))
        before = {name: train.local(p).clone() for name, p in learned.items()}
        heal = poison(place, value, model, batch) if rank == n - 1 else lambda: None
        poisoned = {name: train.local(p).clone() for name, p in learned.items()}
        try:
            train.update(model, opt, [batch], 1e-3, 1.0, train.STAGES["tiny", 2], step=7)
            stopped = False
        except FloatingPointError as error:
            stopped = "step 7: " in str(error)
        same = all(torch.equal(poisoned[k], train.local(p), ) or poisoned[k].isnan().any() for k, p in learned.items())
        finite = all(train.local(p).isfinite().all() for p in learned.values())
        assert len(set(train.share(stopped))) == 1, (place, value)
        assert same if stopped else finite and value == 1e38, (place, value)
        heal()
        opt.zero_grad()
        with torch.no_grad():
            for k, p in learned.items():
                train.local(p).copy_(before[k])
    Path(f"{out}-{rank}").write_text("every case")


@pytest.mark.parametrize("n", (1, 2))
def test_ranks_all_stop_before_a_nonfinite_update(mini, world, tmp_path, monkeypatch, n):
    def hurt(rank):
        train.train = lambda s: poisoned_updates(world, tmp_path / "done", rank)
    assert mini(tmp_path, "full", n=n, hurt=hurt) == [0] * n
    assert len(list(tmp_path.glob("done-*"))) == n


@pytest.mark.parametrize("n", (1, 2))
def test_ranks_leave_out_as_many_nonfinite_updates_as_they_may(mini, tmp_path, n):
    def hurt(rank, real=train.update):
        def update(model, opt, batches, *args):
            heal = poison("activation", float("nan"), model, batches[0]) if rank == n - 1 and args[3] in (2, 4) else lambda: None
            try:
                return real(model, opt, batches, *args)
            finally:
                heal()
        train.update = update
    for allowed, codes in ((2, [0] * n), (1, [4] * n)):
        assert mini(tmp_path / str(allowed), "full", "steps=6", f"skip_nonfinite={allowed}", n=n, hurt=hurt) == codes
    assert [(row["skipped"], row["grad_norm"] is None, "lm" in row) for row in log_of(tmp_path / "2")] == [
        (0, False, True), (0, False, True), (1, True, False), (1, False, True), (2, True, False), (2, False, True)]
    assert len(log_of(tmp_path / "1")) == 4


def test_ranks_never_save_what_is_not_finite(mini, tmp_path, monkeypatch, capsys):
    def spoil(model, opt, *args, real=train.update):
        result = real(model, opt, *args)
        if args[4] == 1:
            opt.param_groups[0]["params"][0].data.view(-1)[0] = float("nan")
        return result
    monkeypatch.setattr(train, "update", spoil)
    with pytest.raises(SystemExit):
        mini.here(tmp_path, "projector", "save_every=1", "keep=1")
    assert "is not finite" in capsys.readouterr().err and train.find_checkpoint(tmp_path, "auto").name == "step_000001"


def test_ranks_order_depends_on_seed_and_step_alone(mini, world, monkeypatch):
    def stream(rank, n, workers, at=0):
        monkeypatch.setattr(train, "ranks", lambda: (rank, n))
        s = train.Settings(batch=6, micro=1, steps=9, workers=workers, seed=3, max_len=2048)
        return [b.ids.tolist() for b in train.batches(prepared, s, train.STAGES["mini", 0], at)]
    prepared = train.prepare(train.parse_settings(
        ["system=mini", "stage=0", f"data={world}/conversations.json", f"tokenizer={world}/tokenizer.model"]))[3]
    prepared.prepare = lambda number, epoch: data.Rendered([1, number, 5], [data.IGNORE, number, 5], [])
    want = stream(0, 1, 0)
    assert len({json.dumps(ids) for ids in want[:24]}) == 24           # an epoch: every sample once
    assert stream(0, 1, 1) == stream(0, 1, 2) == want and stream(0, 1, 0, at=5) == want[30:]
    for n in (2, 3):
        parts = [stream(rank, n, 0) for rank in range(n)]
        assert [ids for row in zip(*parts) for ids in row] == want


@pytest.mark.parametrize("keep", (1, 2, 3))
def test_ranks_keep_the_newest_complete_ones(mini, tmp_path, monkeypatch, capsys, keep):
    mini.here(tmp_path, "projector", "steps=2", "save_every=1", "keep=9")
    (tmp_path / "step_000001/state.json").write_text("{}")              # damaged: neither counts nor is deleted
    real = train.shutil.rmtree
    def stuck(path, *args, **kw):
        if Path(path).name == "step_000002":
            raise PermissionError(13, "Permission denied", str(path))
        real(path, *args, **kw)
    monkeypatch.setattr(shutil, "rmtree", stuck)
    mini.here(tmp_path, "projector", "steps=6", "save_every=1", f"keep={keep}")
    names = [p.name[-1] for p in sorted(tmp_path.glob("step_*"))]
    assert names == ["1", "2"] + [str(i) for i in range(7 - keep, 7)] and "could not delete" in capsys.readouterr().err


def test_ranks_export_a_checkpoint_as_weights(mini, tmp_path):
    mini.here(tmp_path / "run", "lora", "steps=3", "stop_after=2")
    with pytest.raises(SystemExit, match="no checkpoint to export"):
        mini.here(tmp_path / "other", "lora", f"export={tmp_path}/w")
    mini.here(tmp_path / "run", "lora", "steps=3", f"export={tmp_path}/w", f"data={tmp_path}/gone.json")
    learned, all_of_it = weights_of(tmp_path / "run/step_000002"), M.load(tmp_path / "w").state_dict()
    assert all("lora" in name or "projector" in name for name in learned) and len(learned) < len(all_of_it)
    assert all(torch.equal(all_of_it[name], x) for name, x in learned.items())


def test_ranks_checkpoints_go_on_from_where_their_run_began(mini, tmp_path, world):
    cfg = replace(MINI, llm=replace(MINI.llm, vocab_size=403), added_tokens={token: 400 + i for i, token in enumerate(data.IM)}, writes={})
    for i in range(2):
        M.initialise(model := M.Model(cfg))
        M.save(model, tmp_path / f"w{i}", [world / "tokenizer.model"])
    save_file({"llm.embed.weight": model.llm.embed.weight.detach()}, tmp_path / "p.safetensors")
    began = f"init={tmp_path}/w0", f"projector={tmp_path}/p.safetensors"
    mini.here(tmp_path / "run", "lora", *began, "steps=2", "stop_after=1")
    for other, match in ((began[:1], "projector="), ((f"init={tmp_path}/w1", began[1]), "init=")):
        for more in ((), (f"export={tmp_path}/out",)):
            with pytest.raises(ValueError, match=f"of a run with {match}"):
                mini.here(tmp_path / "run", "lora", *other, "steps=2", *more)
    for other in ("seed=1", "batch=2"):                         # would see other samples, or not all
        with pytest.raises(ValueError, match="of a run with (seed=0|batch=4);"):
            mini.here(tmp_path / "run", "lora", *began, "steps=2", other)
    mini.here(tmp_path / "run", "lora", *began, f"export={tmp_path}/out")


@pytest.mark.parametrize("how", ("checkpoint=block", "checkpoint=select"))
def test_ranks_recomputing_changes_nothing(mini, tmp_path, how):
    mini.here(tmp_path / "a", "lora", "steps=3")
    mini.here(tmp_path / "b", "lora", "steps=3", how)
    same_files(tmp_path / "a/step_000003", tmp_path / "b/step_000003")


@pytest.mark.slow
@pytest.mark.parametrize("how", ((), ("checkpoint=select",)), ids=("plain", "select"))
def test_ranks_compiled_blocks_compute_the_same(mini, tmp_path, monkeypatch, how):
    compiled, real = [], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self) or real(self, backend="aot_eager"))
    mini.here(tmp_path / "a", "full", "steps=3", "-plain")
    mini.here(tmp_path / "b", "full", "steps=3", "-plain", "compile=1", *how)
    assert len(compiled) >= PLAIN.llm.n_layer + 2               # blocks of the towers as well
    for one, two in zip(log_of(tmp_path / "a"), log_of(tmp_path / "b"), strict=True):
        assert two["lm"] == pytest.approx(one["lm"], rel=1e-5) and two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


def test_ranks_metrics_are_finite_numbers_by_name(mini, tmp_path, capsys):
    mini.here(tmp_path, "projector", "steps=2")
    said = capsys.readouterr().out
    assert re.search(r"\nstep 2  lm [\d.]+ .*  tokens_per_s [\d.]+ .*  memory_gb ", said) and "records of" in said and " lr=0.003 " in said
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [list(row) for row in rows] == 2 * [["step", "lm", "lr", "grad_norm", "bad", "skipped", "samples_per_s", "tokens_per_s",
                                                "padding", "mfu", "memory_gb"]]
    assert all(value is None if name == "mfu" else np.isfinite(value) for row in rows for name, value in row.items())


def test_ranks_packed_rows_compute_what_single_ones_do(world, mini):
    s, stage, model, prepared = train.prepare(train.parse_settings(
        ["system=plain", "stage=0", f"data={world}/conversations.json", f"tokenizer={world}/tokenizer.model"]))
    rendered, n_token, grads, padding = [prepared[i] for i in range(24)], prepared.n_token, [], []
    for pack in (0, 256, 1000):
        batch = data.collate(rendered, n_token, pack=pack)
        loss = model.zero_grad() or model(batch)["lm"]
        loss.backward()
        grads.append((loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]))
        padding.append((batch.ids == 0).float().mean().item())
        assert not pack or batch.ids.shape[1] % 64 == 0
    for loss, grad in grads[1:]:
        assert torch.allclose(loss, grads[0][0], rtol=1e-5)
        assert all((a - b).abs().max() <= 1e-5 * b.abs().max().clamp(min=1e-3) for a, b in zip(grad, grads[0][1], strict=True))
    assert padding[2] < padding[0] and (batch.segments > 0).sum() == sum(len(r.ids) for r in rendered)


def test_ranks_schedules_follow_the_originals():
    for row in read_golden_if_near("nextgpt/misc")[0]["lr"]:
        total, peak, rise = row["total_num_steps"], row["warmup_max_lr"], row["warmup_num_steps"]
        for k, want in enumerate(row["lr_used_by_update_k"][1:], 1):
            assert peak * train.logarithmic(k, total, rise / total) == pytest.approx(want, rel=1e-6, abs=1e-12)
    got = [train.linear(k, 100, 0.1) for k in (0, 5, 10, 55, 100)]
    assert got == pytest.approx([0, 0.5, 1, 0.5, 0])


def bad_records(record, folder):
    """Twenty kinds of record that cannot be used; writes the damaged files they name."""
    (name, *_), talk = [record["image"]] if isinstance(record["image"], str) else record["image"], record["conversations"]
    good = (folder / name).read_bytes()
    files = {"empty.png": b"", "text.png": b"not an image", "cut.png": good[:len(good) // 2], "page.png": b"<html></html>",
             "head.png": good[:8], "noise.jpg": b"\xff\xd8\xff" + bytes(range(256)), "gif.png": b"GIF89a\0\0\0\0"}
    for bad, raw in files.items():
        (folder / bad).write_bytes(raw)
    (folder / "folder.png").mkdir(exist_ok=True)
    wrong = [*files, "absent.png", "folder.png", "../up.png", "/etc/passwd", "a\\b.png", "~/a.png"]
    return [{**record, "image": [bad]} for bad in wrong] + [
        {**record, "conversations": rows} for rows in ([], talk[:1], talk[1:], [talk[0], talk[0]], [{"from": "human"}], "text", None)] + [
        {**record, "image": [name] * 9}, {"id": "bare"}, "no record", 7]


@pytest.mark.slow
def test_ranks_bad_samples_are_named_counted_and_replaced(mini, tmp_path, world, capfd):
    shutil.copytree(world, tmp_path / "d", symlinks=True)
    records = json.loads((world / "conversations.json").read_text())
    bad = bad_records(next(r for r in records if "image" in r), tmp_path / "d")
    (tmp_path / "d/d.json").write_text(json.dumps(records + bad))
    more, logs = [f"data={tmp_path}/d/d.json", "steps=1", f"batch={len(records + bad)}", "micro=1"], []
    for workers in (0, 2):
        mini.here(tmp_path / str(workers), "projector", *more, f"workers={workers}")
        told = capfd.readouterr().err
        logs.append(log_of(tmp_path / str(workers)))
        assert logs[-1][0]["bad"] == len(bad) >= 20 and all(f"record {len(records) + i} " in told for i in range(13, len(bad)))
        assert all(name in told for name in ("empty.png", "cut.png", "absent.png", "up.png"))
    assert logs[0] == logs[1]
    with pytest.raises((data.DataError, data.MediaError)):
        mini.here(tmp_path / "none", "projector", *more, f"max_bad={len(bad) - 1}")


@pytest.mark.slow
@pytest.mark.parametrize("place", ((train, "update"), (data, "collate"), (train, "save_checkpoint")), ids=("forward", "data", "save"))
def test_ranks_a_dead_one_ends_all_and_the_next_group_goes_on(mini, tmp_path, place):
    more = ["-plain", "steps=5", "save_every=1"]
    assert mini(tmp_path / "straight", "full", *more, n=2) == [0, 0]
    for dead in (0, 1):
        def hurt(rank, real=getattr(*place), calls=itertools.count(1)):
            setattr(*place, lambda *args, **kw: os._exit(9) if next(calls) == 3 and rank == dead else real(*args, **kw))
        out = tmp_path / str(dead)
        assert mini(out, "full", *more, n=2, hurt=hurt)[dead] == 9
        assert train.find_checkpoint(out, "auto").name == "step_000002"
        assert mini(out, "full", *more, n=2) == [0, 0]
        same_files(tmp_path / "straight/step_000005", out / "step_000005")


TORCHRUN = """
import os, signal, sys, time
sys.path.insert(0, {here!r})
import test_all, train
test_all.M.PRESETS["tiny"], real, attempt = test_all.PLAIN, train.update, os.environ["TORCHELASTIC_RESTART_COUNT"]
def update(*args):
    if args[6] == 3 and os.environ["RANK"] == "1" and attempt == "0":
        {what}
    return real(*args)
train.update = update
if os.environ["RANK"] == "1" and attempt == "1":
    time.sleep(2)               # so that the other looks for this one's address while the store has that of the dead
train.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ("os._exit(1)", "os.kill(os.getppid(), signal.SIGTERM)"))
def test_ranks_torchrun_restarts_the_dead_and_passes_signals_on(world, tmp_path, monkeypatch, what):
    (tmp_path / "run.py").write_text(TORCHRUN.format(here=str(HERE), what=what))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1",
              "--shutdown-timeout", "60", str(tmp_path / "run.py"), "stage=2", "device=cpu", "workers=0", "batch=4", "steps=5", "save_every=1",
              "log_every=1", "lr=0.001", f"data={world}/conversations.json", f"tokenizer={world}/tokenizer.model", f"out={tmp_path}/a"]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=900)
    if "exit" not in what:
        assert "goes on from there" in done.stdout and not (tmp_path / "a/weights").exists()
        done = subprocess.run(launch, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    monkeypatch.setitem(M.PRESETS, "tiny", PLAIN)
    run_train(world, tmp_path / "b", "device=cpu", "steps=5")
    assert [r["lm"] for r in log_of(tmp_path / "a")][-2:] == pytest.approx([r["lm"] for r in log_of(tmp_path / "b")][-2:], rel=1e-6)


def test_ranks_packing_leaves_little_padding():
    r = np.random.RandomState(0)
    share = {0: [], 1024: []}
    for _ in range(20):
        lengths = np.minimum(r.lognormal(5, 0.8, 64).astype(int) + 20, 2048).tolist()       # of an instruction set
        places, rows = data.pack_rows(lengths, 1024)
        cells = [(row, at + i) for (row, at), n in zip(places, lengths) for i in range(n)]
        assert len(set(cells)) == len(cells) == sum(rows) and max(rows) <= max(1024, *lengths)
        for pack, n in ((0, len(lengths) * max(lengths)), (1024, len(rows) * max(rows))):
            share[pack].append(1 - sum(lengths) / n)
    assert np.mean(share[0]) > 0.6 and np.mean(share[1024]) < 0.15


# ---- Evaluate

def test_golden_chatbind_eval():
    meta, _, _ = read_golden("chatbind/eval")
    for row in meta["parse_score"]:
        assert evaluate.review_scores(row["review"]) == row["scores"], row
    assert evaluate.summarise_reviews(meta["reviews"]) == meta["summary"]
    for row in meta["sqa"]:
        assert evaluate.choices(row["text"]) == row["matches"]


def test_evaluate_counts_by_kind():
    rows = [{"kind": kind, "text": text, "answer": "It is  a Star."} for kind, text in
            (("a", "it is a star."), ("a", "It is a star"), ("b", "It is a star."), ("b", ""))]
    assert evaluate.accuracy(rows) == {"a": (1, 2), "b": (1, 2), "all": (2, 4)}


def test_golden_nextchat_metrics():
    meta, _, _ = read_golden("nextchat/metrics")
    got = evaluate.rec(meta["rec"]["preds"], meta["rec"]["targets"])
    assert {k: pytest.approx(v, rel=PARITY) for k, v in meta["rec"]["metrics"].items() if k != "target_failed"} == got
    want = meta["res"]["metrics"]
    assert evaluate.res(meta["res"]["intersections"], meta["res"]["unions"]).items() >= want.items()
    answers, labels = ([evaluate.yes_or_no(text) for text in meta["pope"][key]] for key in ("preds", "targets"))
    assert (answers, labels) == (meta["pope"]["extracted_preds"], meta["pope"]["extracted_targets"])
    assert evaluate.pope(answers, labels) == {k: v for k, v in meta["pope"]["metrics"].items() if "failed" not in k}
    for key, pattern in (("gqa_extract", evaluate.GQA), ("pointqa_extract", evaluate.POINT_QA)):
        assert [evaluate.extract(row["text"], pattern) for row in meta[key]] == [row["out"] for row in meta[key]]
    assert all(evaluate.caption_text(row["text"]) == row["out"] for row in meta["reg_caption_extract"])
    texts, ours = meta["cider"]["references"], meta["cider"]["candidates"]
    scores = evaluate.cider([ours[k][0].split() for k in texts], [[text.split() for text in texts[k]] for k in texts])
    assert scores == pytest.approx(meta["cider"]["per_item"])
    assert sum(scores) / len(scores) == pytest.approx(meta["cider"]["score"])


def test_evaluate_metrics_at_their_edges():
    assert evaluate.rec([None, [0, 0, 1, 1]], [[0, 0, 1, 1]] * 2) == {"accuracy": 0.5, "iou": 0.5, "failed": 1}
    half = [[0, 0, 1, 1]], [[0, 0, 1, 2]]
    assert evaluate.rec(*half)["accuracy"] == 0 and evaluate.rec(*half)["iou"] == 0.5       # above 0.5 is asked, not 0.5
    assert evaluate.ground(*half) == {"iou": 0.5, "success": 1, "failed": 0, "iou_of_successes": 0.5}           # but of ChatterBox
    assert evaluate.ground([None], [[0, 0, 1, 1]]) == {"iou": 0, "success": 0, "failed": 1, "iou_of_successes": None}
    figures = {"ciou": 0.5, "miou": 0.25, "giou": 0.75, "failed": 1}
    assert evaluate.res([0, 1], [0, 2]) == pytest.approx(figures, rel=1e-4)
    assert evaluate.overlap([[1, 0], [1, 1]], [[1, 2], [0, 0]]) == (1, 5)
    never = evaluate.pope(["no", "No"], ["yes", "no"])
    assert never == {"accuracy": 0.5, "precision": None, "recall": 0, "f1": None, "yes_ratio": 0}
    answers = {"No, none": "no", "It is not. yes": "no", "yes. no": "yes", "nothing": "yes"}
    assert {text: evaluate.yes_or_no_llava(text) for text in answers} == answers


@pytest.mark.parametrize("text, left", [("It is a cup, on a table. Yes.", "a cup"), (" It is red.", "red"), ("There is a cup", "a cup"),
                                        ("It is a man and his dog. It barks.", "dog. It barks."), ("a cup at region0 here", "a cup here")])
def test_evaluate_cleaned_answers_keep_their_first_words(text, left):
    row = {"text": text, "target": ["none", left, text]}
    assert evaluate.cleaned(text) == left
    assert [evaluate.refer_figures([row, row])[name]["right"] for name in ("raw", "cleaned")] == [1, 1]
    assert evaluate.refer_figures([row | {"target": ["none", left]}])["raw"]["right"] == 0


CAPTIONS = ["A man in a Blue shirt, riding a bike.", "the dog's tail isn't visible...", "two t-shirts (red) & 3.5 apples",
            "she can't; he'll", "a 12:30 clock - \"old\" one!", "woman at 2nd table?", "1,000 people don't wait",
            "left-most   half-eaten pizza", "I cannot say; gonna eat 1/2", "$5 bill, 50% off", "men's & women's, black/white",
            "guy w/ hat at 6 a.m.", "Dr. #23 at 5 o'clock", "3-year-old's [left] {x} a.b@c.com", "`quoted' 'stop' a--b", "dogs' café, the man,who", "1990s 5ft x * y + z = 3"]


@pytest.mark.slow
def test_evaluate_captions_equal_the_coco_toolkit():
    cider, ptb = (pytest.importorskip(f"pycocoevalcap.{name}") for name in ("cider.cider", "tokenizer.ptbtokenizer"))
    r, vocabulary = np.random.RandomState(3), "a dog cat on the left table red big".split()
    texts = [[[*r.choice(vocabulary, r.randint(1, 9))] for _ in range(1 + r.randint(3))] for _ in range(20)]
    ours = [[*r.choice(vocabulary, r.randint(1, 9))] for _ in texts]
    rows = [{i: [" ".join(words) for words in row] for i, row in enumerate(rows)} for rows in (texts, [[one] for one in ours])]
    mean, each = cider.Cider().compute_score(*rows)
    assert evaluate.cider(ours, texts) == pytest.approx(each.tolist())
    if shutil.which("java"):
        theirs = ptb.PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(CAPTIONS)})
        assert [" ".join(evaluate.tokenise(text)) for text in CAPTIONS] == [theirs[i][0] for i in range(len(CAPTIONS))]


def evaluation_world(n=7):
    """Samples of every task with a stand-in for a model that answers by sample, and a list of whom it was asked about."""
    r, asked, samples = np.random.RandomState(0), [], []
    for i in range(n):
        x, y = r.randint(0, 20, 2)
        box = data.Box((x, y, x + 9, y + 9), np.pad(np.ones((9, 9), np.uint8), ((y, 21 - y), (x, 21 - x))))
        box.tensor = data.Geometry(30, 30).to_frame(box.xyxy_px)[0].float()
        samples.append(data.Sample([["where?"], ["The answer is ", "yes" if i % 2 else "no", " .", box]], str(i),
                                   {"question_id": i, "text": "where?", "target": i % 2, "choices": 2}))

    def predict(sample):
        asked.append(int(sample.id))
        box = sample.turns[1][-1]
        masks, boxes = np.roll(box.mask, int(sample.id), axis=0)[None] > 0, box.tensor[None] + 0.01 * int(sample.id)
        return {"text": f"The answer is {'yes' if int(sample.id) % 3 else 'no'} .", "boxes": boxes, "masks": masks,
                "replies": [["The answer is ", data.Box((), tensor=boxes[0])]], "pixels": 30 * boxes}
    return samples, predict, asked


@pytest.mark.parametrize("task", evaluate.TASKS)
def test_evaluate_two_ranks_equal_one(tmp_path, task, monkeypatch):
    monkeypatch.setattr(evaluate, "meteor", lambda *texts: None)                            # starting Java takes a while
    samples, predict, asked = evaluation_world()
    evaluate.predict_all(samples, predict, task, tmp_path / "one", {"seed": 1})
    evaluate.predict_all(samples, predict, task, tmp_path / "two", {"seed": 1}, 0, 2)
    assert len(evaluate.read_predictions(tmp_path / "two", {"seed": 1})) == 4
    evaluate.predict_all(samples, predict, task, tmp_path / "two", {"seed": 1}, 1, 2)
    one, two = (evaluate.read_predictions(tmp_path / name, {"seed": 1}) for name in ("one", "two"))
    assert one == two and len(one) == len(samples) and sorted(asked) == sorted([*range(7)] * 2)
    assert evaluate.TASKS[task][1](one) == evaluate.TASKS[task][1](two)


def test_evaluate_goes_on_after_a_kill(tmp_path):
    samples, predict, asked = evaluation_world()
    evaluate.predict_all(samples, predict, "res", tmp_path / "whole", {"seed": 1})
    raw = (tmp_path / "whole/predictions-0.jsonl").read_bytes()
    (tmp_path / "cut").mkdir()
    for size in (0, 3, len(raw) // 3, len(raw) // 2, len(raw) - 1, len(raw)):
        (tmp_path / "cut/predictions-0.jsonl").write_bytes(raw[:size])
        left = len(samples) + 1 - max(raw[:size].count(b"\n"), 1)
        asked.clear()
        evaluate.predict_all(samples, predict, "res", tmp_path / "cut", {"seed": 1})
        assert (tmp_path / "cut/predictions-0.jsonl").read_bytes() == raw and len(asked) == left
    with pytest.raises(ValueError, match="another run"):
        evaluate.predict_all(samples, predict, "res", tmp_path / "cut", {"seed": 2})


def evaluate_main(*words):
    evaluate.main([str(word) for word in words])


@pytest.mark.parametrize("task, name", [("rec", "REC_train"), ("res", "RES_train"), ("pope", "POPE_random"), ("caption", "REG_train"),
                                        ("rounds", "CB_LC")])
def test_evaluate_runs_every_task(pointing, world, tmp_path, task, name, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "meteor", lambda *texts: None)
    monkeypatch.setattr(evaluate, "LENGTHS", dict.fromkeys(evaluate.LENGTHS, 4))
    if task == "rounds":
        rows = {"data": json.loads((world / f"{name}.json").read_text())["data"][:3]}
        (tmp_path / "rows.json").write_text(json.dumps(rows))
    else:
        (tmp_path / "rows.jsonl").write_text("".join((world / f"{name}.jsonl").read_text().splitlines(True)[:3]))
    words = pointing / "nextchat", next(tmp_path.glob("rows.*")), "--task", task, "--images", world, "--device", "cpu", "--out"
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank)), monkeypatch.setenv("WORLD_SIZE", "2")
        evaluate_main(*words, tmp_path / "two")
    monkeypatch.delenv("RANK"), monkeypatch.delenv("WORLD_SIZE")
    evaluate_main(*words, tmp_path / "one")
    first, *figures = capsys.readouterr().out.splitlines()
    assert "of 3 samples" in first and figures[0] == figures[1] and json.loads(figures[0])["n"] == 3
    assert (tmp_path / "one/metrics.json").read_text() == figures[1]
    evaluate_main(*words, tmp_path / "half", "--dtype", "bfloat16")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["n"] == 3
    monkeypatch.setattr(evaluate.Asker, "predict", lambda *args: 1 / 0)                     # nothing is asked again
    evaluate_main(*words, tmp_path / "one")


def test_evaluate_rows_tell_picture_words_and_pixels(pointing, world, tmp_path):
    (tmp_path / "rows.jsonl").write_text(line := (world / "REC_train.jsonl").read_text().splitlines()[0])
    words = "--task", "rec", "--images", world, "--device", "cpu", "--out", tmp_path / "out"
    evaluate_main(pointing / "nextchat", tmp_path / "rows.jsonl", *words)
    row, known = json.loads((tmp_path / "out/predictions-0.jsonl").read_text().splitlines()[1]), json.loads(line)
    assert row["media"] == [str(world / known["img_path"])] and known["expression"] in row["prompt"]
    assert [row["pixels"]] == data.Geometry(*data.Image.open(row["media"][0]).size).to_pixels([row["box"]]).tolist()


def test_evaluate_rounds_count_texts_boxes_and_dialogues():
    rows = [{"text": ["It  is red.", "no"], "target": ["it is red. ", "No"], "iou": [0.5, None], "drawn": [None, True]},
            {"text": ["Red.", "no", "b"], "target": ["It is red.", "no", "b"], "iou": [0.3, 0.7, None], "drawn": [None, True, False]}]
    assert evaluate.rounds_figures(rows) == {"text": 0.8, "text_by_round": [0.5, 1, 1], "box": 2 / 3, "box_by_round": [0.5, 1, None],
                                             "iou": pytest.approx(0.5), "dialogues": 0.5, "drawn": 2 / 3}
    assert evaluate.rounds_figures([rows[0] | {"drawn": [None, False]}])["dialogues"] == 0
    box, other = (data.Box((), tensor=torch.tensor(corners)) for corners in ([0, 0, 1, 1.0], [0, 0, 1, 0.5]))
    assert evaluate.grounding([box, "a", other], [box, other]) == 1 and evaluate.grounding([box, box], [box, other]) == 0.5
    assert evaluate.grounding([box], [box, other]) == evaluate.grounding([], [box]) == 0


@pytest.mark.parametrize("name, box", [("CB_MRG.json", (10, 12, 40, 36)), ("CB-refcoco-REF.json", (10, 12, 50, 48))])
def test_evaluate_rounds_read_the_boxes_of_each_file(name, box, tmp_path):
    talk = shapes.turns("What is <it>? <cup:[10, 12, 40, 36]>", "A cup. <cup:[10, 12, 40, 36]>")
    (tmp_path / name).write_text(json.dumps({"data": [{"image": "a.png", "conversation": talk}]}))
    args = Thing(task="rounds", questions=tmp_path / name, media=tmp_path, templates=None, seed=0)
    assert [part.xyxy_px for part in data.parts_of(evaluate.read_samples(args)[0].turns, data.Box)] == [box] * 2


@pytest.mark.parametrize("system, says", [("nextchat", "a <at> <boxes> ."), ("chatterbox", "a .")])
def test_evaluate_rounds_go_on_from_the_models_own_replies(pointing, world, system, says, monkeypatch):
    monkeypatch.setattr(evaluate, "MIN_SCORE", 0)
    asker, asked, looks = evaluate.Asker(pointing / system), [], system == "chatterbox"
    make_say(asker, says)
    monkeypatch.setattr(asker, "answer", lambda turns, n, answer=asker.answer: asked.append(turns) or answer(turns, n))
    sample = datasets.Rows(world / "CB_MRG.json", "rounds", world)[0]
    out = asker.predict("rounds", sample)
    kinds = [[[part.kind for part in turn if isinstance(part, data.Box)] for turn in turns] for turns in asked]
    given = [["region", "find"] if looks else ["box"]] * 2
    assert kinds == ([[["find"]], [[], [], given[0]], [[], [], [], [], given[1]]] if looks else
                     [[[]], [[], ["box"], given[0]], [[], ["box"], given[0], ["box"], given[1]]])
    assert [evaluate.normal(evaluate.text_in(turn)) for turn in out["replies"]] == [says.replace("<at> <boxes> ", "")] * 3
    row = evaluate.rounds_row(sample, out)
    assert all(0 <= iou <= 1 for iou in row["iou"]) and [len(evaluate.boxes_in(turn)) for turn in out["replies"]] == [1] * 3


def test_evaluate_talks_that_fill_the_context_count_as_wrong(pointing, world):
    asker, sample = evaluate.Asker(pointing / "nextchat"), datasets.Rows(world / "CB_MRG.json", "rounds", world)[0]
    data.load_media(sample.turns, asker.spec)
    asker.model.cfg = M.replace(asker.model.cfg, llm=M.replace(
        asker.model.cfg.llm, max_len=len(asker.render([*sample.turns[:2], sample.turns[2], None]).ids)))
    make_say(asker, "no")
    first, *others = asker.predict("rounds", sample)["replies"]
    assert first == ["no"] and others[-1] == [] and evaluate.rounds_row(sample, {"replies": [first, *others]})


WHERE = {"filename": "wide.png", "question": "Where is the dog?", "gt_box": [3, 4, 50, 20.5]}
WHAT = {"file_name": "wide.png", "question": "What is it <bbox>?[[3, 4, 53, 24]]", "answer": ["a dog.", "the dog."]}


def test_golden_chatterbox_evaluation_prompts():
    meta, _, _ = read_golden("chatterbox/data")
    (where, _), (what, _) = (datasets.to_sample(row, datasets.FORMATS[name], "", (), None).turns for name, row in (
        ("ground", WHERE | {"question": "Where is the toilet?"}), ("refer", WHAT)))
    for question, case in zip(([*where, data.Box((1, 2, 3, 4), kind="find")], what), meta["eval_prompts"], strict=True):
        (r,), _ = chatterbox_batch(meta, [[question, None]], [(90, 40)], train=False)
        assert [id for id in r.ids if id != meta["config"]["ids"]["<im_patch>"]] == case["ids_without_patches"]


def test_evaluate_chatterbox_finds_and_reads_what_the_chat_does(pointing, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "MIN_SCORE", 0), monkeypatch.setattr(chat, "MIN_SCORE", 0)
    asker, session = evaluate.Asker(pointing / "chatterbox"), pointing_session(pointing, "chatterbox")
    (tmp_path / "q.json").write_text(json.dumps([WHERE | WHAT | {"question": row["question"]} for row in (WHERE, WHAT)]))
    where, what = (datasets.Rows(tmp_path / "q.json", name, pointing)[i] for i, name in enumerate(("ground", "refer")))
    session.ask(WHERE["question"], pointing / "wide.png", find=True)
    row = evaluate.rec_row(where, asker.predict("ground", where))
    assert row["box"] == pytest.approx(session.last().found[0].tensor.tolist(), abs=1e-5)
    assert row["target"] == pytest.approx([3 / 90, 4 / 40, 53 / 90, 24.5 / 40])
    session.clear()
    session.ask("What is it [0]?" + what.turns[0][-1][1:], pointing / "wide.png", boxes=[(3, 4, 53, 24)])
    row = evaluate.refer_row(what, asker.predict("refer", what))
    assert row["text"].startswith(session.last().answer) and row["target"] == WHAT["answer"]


@pytest.mark.parametrize("task, name", [("rec", "REC_train"), ("caption", "REG_train")])
def test_evaluate_chatterbox_runs_the_tasks_of_boxes(pointing, world, tmp_path, task, name, capsys):
    (tmp_path / "rows.jsonl").write_text("".join((world / f"{name}.jsonl").read_text().splitlines(True)[:2]))
    evaluate_main(pointing / "chatterbox", tmp_path / "rows.jsonl", "--task", task, "--images", world, "--out", tmp_path / "out", "--device", "cpu")
    assert json.loads(capsys.readouterr().out)["n"] == 2


@pytest.mark.parametrize("text, fault", [("red or blue? " * 300, "tokens, more than the 512"), (5, "5 where text")])
def test_evaluate_names_a_question_that_cannot_be_asked(text, fault, pointing, tmp_path):
    rows = [{"question_id": i, "text": text} for i, text in enumerate(("What?", text))]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=f"vqa: record 1 .*{fault}"):
        evaluate_main(pointing / "nextchat", tmp_path / "q.jsonl", "--task", "vqa", "--out", tmp_path / "out", "--device", "cpu")
    assert len(evaluate.whole_lines(tmp_path / "out/predictions-0.jsonl")[0]) == 2


def test_evaluate_asks_in_the_template_that_is_named(pointing, world, tmp_path, monkeypatch):
    (tmp_path / "q.jsonl").write_text(json.dumps({"question_id": 0, "text": "What?"}))
    asked, answer = [], evaluate.Asker.answer
    monkeypatch.setattr(evaluate.Asker, "answer", lambda self, *args: asked.append(self.template) or answer(self, *args))
    words = pointing / "nextchat", tmp_path / "q.jsonl", "--task", "vqa", "--out", tmp_path / "out", "--device", "cpu"
    evaluate_main(*words, "--template", "llava_v1")
    assert asked == [data.TEMPLATES["llava_v1"]]
    with pytest.raises(ValueError, match="predictions of another run"):
        evaluate_main(*words)


def test_evaluate_points_as_the_fixed_ids_do(pointing, world):
    asker, row = evaluate.Asker(pointing / "nextchat"), datasets.Rows(world / "REC_train.jsonl", "rec", world)[0]
    data.load_media(row.turns, asker.spec)
    special, tok, r = asker.tok.special, asker.tok, asker.render([row.turns[0], None])
    suffix = [*tok.encode("Answer:", bos=False), special["<at>"], special["<boxes>"], *tok.encode(".", bos=False), special["</s>"]]
    embeds, mask = asker.embed(r._replace(ids=r.ids + suffix))
    with torch.inference_mode():
        h = asker.model.llm(embeds, attn_mask=mask)[:, len(r.ids) + suffix.index(special["<at>"])]
        assert torch.allclose(asker.model.writers["at"](h), asker.point(row.turns[0]), atol=1e-5)


def test_evaluate_unknown_words_stay_masked_while_answering(pointing, world):
    asker, row = evaluate.Asker(pointing / "nextchat"), datasets.Rows(world / "REC_train.jsonl", "rec", world)[0]
    data.load_media(row.turns, asker.spec)
    pieces, id_of = map(asker.tok.sp.id_to_piece, range(asker.tok.sp.get_piece_size())), asker.tok.sp.piece_to_id
    word = next(piece[1:] for piece in pieces if piece[0] == "▁" and piece[1:] and id_of(piece[1:]) == 0)
    question = [row.turns[0][0], f"{word} is it?"]
    _, ids, hidden = asker.answer([question], 5)
    n, r = len(ids) - len(hidden), asker.render([question, None])
    assert 0 in ids[:n]                                         # behind the picture the word has become <unk>
    embeds, mask = asker.embed(r._replace(ids=ids[:-1]))
    mask[:, n:] = True                                          # but one that is said counts
    with torch.inference_mode():
        want = asker.model.llm(embeds, attn_mask=mask)
    assert (torch.cat(hidden, 1) - want).abs().max() <= PARITY * want.abs().max()


@pytest.mark.parametrize("words", [("--task", "rec"), ("--task", "res"), ("--task", "pope", "--templates", "{bad}")])
def test_evaluate_says_what_is_missing(words, pointing, world, tmp_path):
    (tmp_path / "bad.json").write_text('{"VQA": ["no place for a picture"]}')
    name = world / f"{'POPE_random' if 'pope' in words else 'REC_train'}.jsonl"
    M.save(M.Model(M.replace(M.read_config(pointing / "chatterbox"), locator=None)), tmp_path / "mute", [world / "tokenizer.model"])
    with pytest.raises(ValueError, match="says no boxes|makes no masks|one <image>"):
        evaluate_main(tmp_path / "mute", name, "--out", tmp_path / "out", *(w.format(bad=tmp_path / "bad.json") for w in words))
    with pytest.raises(SystemExit):
        evaluate_main(pointing / "nextchat", name, "--task", "rec")


@pytest.mark.parametrize("key, value, fault", [("height", shapes.SIDE + 2, "a mask of"), ("img_path", "gone.png", r"gone\.png: no such file")])
def test_evaluate_names_file_and_record_of_a_fault(key, value, fault, pointing, world, tmp_path):
    row = json.loads((world / "RES_train.jsonl").read_text().splitlines()[0])
    (tmp_path / "rows.jsonl").write_text(json.dumps(row | {key: value}))
    with pytest.raises(ValueError, match=rf"rows\.jsonl: record 0 .*{fault}"):
        evaluate_main(pointing / "nextchat", tmp_path / "rows.jsonl", "--task", "res", "--images", world, "--out", tmp_path / "out")


# ---- Evaluate: answer files, ScienceQA, a judge

@pytest.fixture
def science(world, tmp_path):
    """Three questions of ScienceQA, one without a picture, and the file of the problems."""
    pictures = ["pictures/000000.png", None, "pictures/000001.png"]
    records = [{"id": str(7 * i), "conversations": shapes.turns("Which?\nOptions: (A) red (B) blue" + "\n<image>" * bool(p), "B.")}
               | ({"image": p} if p else {}) for i, p in enumerate(pictures)]
    (tmp_path / "problems.json").write_text(json.dumps({r["id"]: {"answer": 1, "choices": ["red", "blue"]} for r in records}))
    (tmp_path / "science.json").write_text(json.dumps(records))
    rows = [{"question_id": i, "image": p, "text": "What is this?", "category": "conv"} for i, p in enumerate(pictures)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize("task, name", [("vqa", "questions.jsonl"), ("sqa", "science.json")])
def test_evaluate_writes_answers_as_llava_does(task, name, science, world, pointing, monkeypatch, capsys):
    prompts, replies = [], iter(["It is red. The answer is B.", "The answer is A.", "I cannot say."])
    monkeypatch.setattr(evaluate.Asker, "predict", lambda self, task, sample: prompts.append(sample.turns[0]) or {"text": next(replies)})
    evaluate_main(pointing / "nextchat", science / name, "--task", task, "--images", world, "--out", science / "out", "--device", "cpu")
    rows = data.read_records(science / "out/answers.jsonl")
    assert list(rows[0]) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert len({row["answer_id"] for row in rows}) == 3 and [part[1:2] for part in prompts] == [["\n"], [], ["\n"]]
    figures, guess = json.loads(capsys.readouterr().out), random.Random("14").randrange(2)
    if task == "sqa":
        assert figures == {"n": 3, "accuracy": round(100 * (1 + guess) / 3, 2), "image": 50.0 + 50 * guess, "text": 0.0, "unclear": 1}


def test_evaluate_asks_about_a_picture_below_its_question(science, world, pointing, monkeypatch):
    monkeypatch.setitem(evaluate.LENGTHS, "vqa", 3)
    asker, sample = evaluate.Asker(pointing / "nextchat"), evaluate.question_samples(science / "questions.jsonl", world)[0]
    assert isinstance(asker.predict("vqa", sample)["text"], str) and sample.turns[0][2].tensor is not None


def test_evaluate_science_asks_for_a_choice_after_the_reasons(science, world, pointing, monkeypatch):
    monkeypatch.setitem(evaluate.LENGTHS, "sqa", 3)
    asker, sample = evaluate.Asker(pointing / "nextchat"), evaluate.science_samples(science / "science.json", world)[1]
    said, answer = asker.predict("sqa", sample)["text"].split("\n The answer is ")
    text, ids, hidden = asker.answer(sample.turns, 64, f"{said} ###\nANSWER:")
    assert text == answer and "ANSWER:" in asker.tok.decode(ids[:len(ids) - len(hidden)]) and evaluate.choices(said) == []
    assert len(asker.answer(sample.turns, 1, "word " * 9999)[1]) == asker.model.cfg.llm.max_len + 1


def test_evaluate_judge_without_scores_is_told(science, capsys):
    words = review_words(science)
    (science / "judge2.py").write_text(JUDGE.format(n=9).replace('"8 "', '"Scores: "'))
    evaluate_main(*words, "--judge", f"{sys.executable} {science}/judge2.py", "-o", science / "x.jsonl")
    assert "3 reviews do not begin with two scores, first 3; they count as -1\n" in capsys.readouterr().err


JUDGE = """import json, sys
for row in list(map(json.loads, sys.stdin))[:{n}][::-1]:
    print(json.dumps({{"id": row["id"], "content": "8 " + str(row["prompt"].count("one")) + "\\nGood."}}))"""


def review_words(folder):
    answers = [[{"question_id": i, "text": text * i, "answer_id": text}] for text in ("one", "two") for i in range(3)]
    for name, rows in (("a", answers[:3]), ("b", answers[3:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for [row] in rows))
    (folder / "rules.json").write_text(json.dumps({"conv": {"role": "Helper", "prompt": "Which is better?"}}))
    for n in (2, 9):
        (folder / f"judge{n}.py").write_text(JUDGE.format(n=n))
    return ["review", "-q", folder / "questions.jsonl", "-a", folder / "a.jsonl", folder / "b.jsonl", "-r", folder / "rules.json"]


def test_evaluate_judge_goes_on_where_it_stopped(science, capsys):
    words, out = review_words(science), science / "reviews.jsonl"
    judge = "{} {}/judge{}.py".format
    with pytest.raises(ValueError, match="1 requests without a reply"):
        evaluate_main(*words, "--judge", judge(sys.executable, science, 2), "-o", out)
    evaluate_main(*words, "--judge", judge(sys.executable, science, 9), "-o", out)
    rows = data.read_records(out)
    assert [row["id"] for row in rows] == [2, 1, 3] and list(rows[0]) == [
        "id", "question_id", "answer1_id", "answer2_id", "category", "content", "tuple", "digest"]
    assert rows[1]["tuple"] == [8, 0] and json.loads(capsys.readouterr().out)["all"] == {"mean": [8.0, 1.0], "ratio": 12.5}


def test_evaluate_judge_is_asked_in_the_originals_words(science, capsys):
    words = review_words(science)
    (science / "context.jsonl").write_text(json.dumps({"image": None, "captions": ["x"], "instances": []}) + "".join(
        "\n" + json.dumps({"image": f"pictures/{i:06}.png", "captions": ["a", "b"], "instances": [{"category": "cat", "bbox": [0, 1]}]})
        for i in range(2)))
    evaluate_main(*words, "-c", science / "context.jsonl")
    assert json.loads(capsys.readouterr().out.splitlines()[2])["prompt"] == (
        "[Context]\na\nb\n\ncat: [0, 1]\n\n[Question]\nWhat is this?\n\n[Helper 1]\noneone\n\n[End of Helper 1]\n\n"
        "[Helper 2]\ntwotwo\n\n[End of Helper 2]\n\n[System]\nWhich is better?\n\n")
    (science / "rules.json").write_text('{"default": {"role": "Helper", "prompt": ""}}')
    evaluate_main(*words)                                       # about text alone an unknown category counts as default
    with pytest.raises(ValueError, match="no rule for 'conv'"):
        evaluate_main(*words, "-c", science / "context.jsonl")


@pytest.mark.parametrize("name, text, fault", [
    ("questions.jsonl", "{", "questions.jsonl: line 1"), ("questions.jsonl", "", "holds no questions"), ("questions.jsonl", "{}", "no 'question_id'"),
    ("a.jsonl", "{}", "has no answer"), ("c.jsonl", "{}", "no 'pictures/000000.png'"), ("rules.json", "{", "rules.json: "),
    ("rules.json", "[]", "record 1"), ("rules.json", '{"conv": {"role": "Helper"}}', "no 'prompt'")])
def test_evaluate_judge_is_not_asked_about_broken_files(name, text, fault, science):
    words = review_words(science)
    (science / name).write_text(text)
    with pytest.raises(ValueError, match=fault):
        evaluate_main(*words, *["-c", science / name] * (name == "c.jsonl"))


@pytest.mark.parametrize("flag", ("--judge", "--out"))
def test_evaluate_judge_needs_a_file_and_a_file_a_judge(flag, science, capsys):
    with pytest.raises(SystemExit):
        evaluate_main(*review_words(science), flag, science / "x")
    assert "go together" in capsys.readouterr().err and not (science / "x").exists()


# ---- Shapes

def check_answer(question, answer, things):
    """What is said in an answer holds for the things of a picture."""
    words, names = re.findall(r"\w+", answer.lower()), re.findall("|".join([*shapes.SHAPES, *shapes.COLOURS]), answer)
    meant = [t for t in things if set(names) <= {t.shape, t.colour}]
    if words[0] in ("yes", "no"):
        assert (words[0] == "yes") == bool(meant) and len(names) == 2
    elif words[0] == "there":
        assert len(names) < 2 and words[2] == shapes.NUMBERS[len(meant)]
    else:
        assert len(meant) == 1 and len(names) == 2 and re.search(f"{names[0]}|{names[1]}", question)
        place = meant[0].place.split() if question.startswith("Where") else []
        side = re.search("of the (.*)[?]", question) if words[-1] in shapes.COLUMNS and not place else None
        size = [meant[0].size] if words[-1] in shapes.SIZES else []
        assert words[-len(place + size):] == place + size or not place + size
        assert not side or (words[-1] == "left") == (meant[0].x < next(t.x for t in things if t.name == side[1]))


def test_shapes_answers_follow_from_the_scene():
    for seed in range(300):
        rng = random.Random(seed)
        things = shapes.scene(rng)
        for i, t in enumerate(things):
            assert all(abs(t.x - u.x) + abs(t.y - u.y) > t.radius + u.radius for u in things[:i])
        for kind, question, answer in shapes.picture_questions(things, rng):
            if kind == "caption":
                assert [w for w in re.findall(r"\w+", answer) if w in shapes.SHAPES] == [t.shape for t in things]
            else:
                check_answer(question, answer, things)


def test_shapes_looks_ask_much_and_tell_the_truth():
    rounds = []
    for seed in range(300):
        things = shapes.scene(random.Random(seed))
        record = shapes.looks(shapes.Medium("image", "a.png", [], "", things), random.Random(seed))
        texts = [row["value"] for row in record["conversations"]]
        assert [text.count("<image>") for text in texts] == [1, *[0] * 15][:len(texts)]
        for question, answer in zip(texts[::2], texts[1::2], strict=True):
            check_answer(question, answer, things)
        rounds.append(len(texts) // 2)
    assert max(rounds) == 8 and sum(rounds) > 300 * 5


def test_shapes_sounds_hold_what_they_say():
    for seed in range(40):
        count, pitch, voice, x = shapes.sound(random.Random(seed))
        loud = np.abs(x).reshape(-1, 160).max(1) > 0.05         # 10 ms steps
        starts = [i for i in range(8, len(loud)) if loud[i] and not loud[i - 8:i].any()] + [0] * bool(loud[:8].any())
        assert len(starts) == count, seed
        if voice != "bell":
            peak = np.abs(np.fft.rfft(x)).argmax() / 2          # Hz: two seconds
            assert min(shapes.PITCHES, key=lambda p: abs(np.log(shapes.PITCHES[p] / peak))) == pitch


def test_shapes_world_is_fixed_by_its_seed(world, tmp_path):
    shapes.main(["--out", str(tmp_path), "--pictures", "24", "--clips", "6", "--sounds", "6", "--vocab-size", "400"])
    for path in (p for p in world.rglob("*") if p.is_file() and p.suffix != ".model"):      # that one names its folder
        assert (tmp_path / path.relative_to(world)).read_bytes() == path.read_bytes(), path
    one, two = (data.Tokenizer(folder / "tokenizer.model").sp for folder in (world, tmp_path))
    assert [one.id_to_piece(i) for i in range(one.vocab_size())] == [two.id_to_piece(i) for i in range(two.vocab_size())]


def test_shapes_leaves_other_folders_alone(tmp_path):
    words = ["--out", str(tmp_path), "--questions", "4"]
    for _ in range(2):
        shapes.main(words)                                      # into an empty folder, then into its own
    (tmp_path / "clips").rename(tmp_path / "photos")
    (tmp_path / "questions.json").write_text("mine")
    with pytest.raises(SystemExit):
        shapes.main(words)
    assert (tmp_path / "questions.json").read_text() == "mine"


def test_shapes_scenes_stay_what_their_seeds_gave():
    """Models were trained on these. Per seed: number of things, mean brightness, next random number."""
    before = [(4, 204.66, 0.575953), (2, 200.05, 0.541412), (1, 206.93, 0.949395), (2, 227.45, 0.472749)]
    for seed, (number, mean, following) in enumerate(before):
        rng = random.Random(seed)
        things = shapes.scene(rng)
        picture = shapes.draw(things, rng, shapes.paper(rng))
        assert len(things) == number and rng.random() == pytest.approx(following, abs=1e-6)
        assert np.asarray(picture).mean() == pytest.approx(mean, abs=0.05)              # Pillow may smooth otherwise


def inside(outline, fine=4):
    """How much of every pixel of a picture lies inside a polygon: even-odd rule on a finer grid."""
    x = (np.arange(shapes.SIDE * fine) + 0.5) / fine
    inner = np.zeros((len(x), len(x)), bool)
    for (x0, y0), (x1, y1) in zip(outline, outline[1:] + outline[:1]):
        rows = (x >= min(y0, y1)) & (x < max(y0, y1))
        inner[rows] ^= x[None] < (x0 + (x[rows, None] - y0) * (x1 - x0) / (y1 - y0 or 1))
    return inner.reshape(shapes.SIDE, fine, shapes.SIDE, fine).mean((1, 3))


def test_shapes_masks_and_boxes_are_what_was_drawn():
    y, x = np.mgrid[:shapes.SIDE, :shapes.SIDE] + 0.5
    for seed in range(20):
        rng = random.Random(seed)
        things = shapes.scene(rng)
        pixels = np.asarray(shapes.draw(things, rng, shapes.paper(rng)), float)
        owner = np.argmin([np.hypot(x - t.x, y - t.y) / t.radius for t in things], 0)       # things lie apart
        for i, t in enumerate(things):
            fill = pixels[int(t.y), int(t.x)] - pixels[0, 0]
            drawn = np.clip((pixels - pixels[0, 0]) @ fill / (fill @ fill), 0, 1) * (owner == i)
            mask = inside(shapes.outline(t))
            assert np.minimum(drawn, mask).sum() / np.maximum(drawn, mask).sum() >= 0.97, (seed, t)
            rows, columns = (np.flatnonzero(drawn.max(axis) > 0.1) for axis in (1, 0))      # whole pixels
            edges = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            assert np.abs(np.subtract(edges, shapes.box(t))).max() < 1, (seed, t)


PLACES = "at the (?:top|bottom)(?: left| right)?|at the left|at the right|in the centre"
BEYOND = {"on the left of": lambda t, u: t.x < u.x, "on the right of": lambda t, u: t.x > u.x,
          "above": lambda t, u: t.y < u.y, "below": lambda t, u: t.y > u.y}
MOST = {"leftmost": lambda t: t.x, "rightmost": lambda t: -t.x, "highest": lambda t: t.y, "lowest": lambda t: -t.y}
SENTENCE = re.compile(
    f"the (?:({'|'.join(MOST)}) )?(?:(small|big) )?(?:({'|'.join(shapes.COLOURS)}) )?(thing|{'|'.join(shapes.SHAPES)})"
    f"(?: ({PLACES}))?(?: ({'|'.join(BEYOND)}) the (\\w+) (\\w+))?")


def meant(sentence, things):
    """The things that a referring expression fits, read word by word."""
    most, size, colour, shape, place, side, *other = SENTENCE.fullmatch(sentence).groups()
    found = [t for t in things if size in (None, t.size) and colour in (None, t.colour) and shape in ("thing", t.shape)]
    if place:
        column, row = ("right" in place) - ("left" in place) + 1, ("bottom" in place) - ("top" in place) + 1
        found = [t for t in found if (t.x * 3 // shapes.SIDE, t.y * 3 // shapes.SIDE) == (column, row)]
    if side:
        u, = [t for t in things if [t.colour, t.shape] == other]
        found = [t for t in found if t is not u and BEYOND[side](t, u)]
    return [min(found, key=MOST[most])] if most else found


def test_shapes_expressions_fit_one_thing_alone():
    said = [0, 0, 0, 0]
    for seed in range(60):
        things = shapes.scene(random.Random(seed))
        for t in things:
            kinds = shapes.referring_expressions(t, things)
            said = [n + len(kind) for n, kind in zip(said, kinds)]
            for sentence in itertools.chain(*kinds):
                assert [id(u) for u in meant(sentence, things)] == [id(t)], (seed, sentence)
    assert min(said) > 100                                      # by name, by place, as the outermost, by another thing


def annotations(world, name):
    text = (world / name).read_text()
    return [json.loads(line) for line in text.splitlines()] if name.endswith("l") else json.loads(text)


FIELDS = {"REC_train.jsonl": "img_path bbox expression", "REG_train.jsonl": "img_path bbox expression",
          "RES_train.jsonl": "img_path bbox expressions height width mask", "CAP_train.jsonl": "img_path caption",
          "CWB_flickr_train.jsonl": "image_id sentence boxes boxes_seq", "CB_MRG.json": "image image_wh conversation",
          "CB_LC.json": "image image_wh conversation"}
FIELDS |= {f"POPE_{how}.jsonl": "question_id image text label" for how in ("random", "popular", "adversarial")}
FIELDS |= {f"{kind}_{what}.json": fields.replace("KIND", kind) for kind in data.KINDS for what, fields in
           (("pairs", "KIND_name caption"), ("comprehension", "input_KIND conversations"),
            ("generation", "output_KIND KIND_captions KIND_caption_embeddings conversations"),
            ("instruction", "mm_name output_modality conversation"))}


@pytest.mark.parametrize("name", FIELDS)
def test_shapes_annotations_have_the_fields_of_their_format(world, name):
    rows = annotations(world, name)
    rows = rows["data"] if name.startswith("CB_") else rows
    assert rows and all(set(row) == set(FIELDS[name].split()) for row in rows)
    for row in rows:
        media = [value for value in row.values() if isinstance(value, str) and value[-4:] in (".png", ".gif", ".wav")]
        assert len(media) == ("image_id" not in row) and all((world / path).is_file() for path in media)
        for x1, y1, x2, y2 in [row["bbox"]] if "bbox" in row else row.get("boxes", []):
            assert 0 <= x1 < x2 <= shapes.SIDE and 0 <= y1 < y2 <= shapes.SIDE
        for xs, ys in ((polygon[::2], polygon[1::2]) for polygon in row.get("mask", [])):
            assert len(xs) >= 3 and [min(xs), min(ys), max(xs), max(ys)] == row["bbox"]


@pytest.mark.parametrize("kind", data.KINDS)
def test_shapes_wishes_name_what_is_to_be_drawn(world, kind):
    captions = {row[f"{kind}_name"]: row["caption"] for row in annotations(world, f"{kind}_pairs.json")}
    for row in annotations(world, f"{kind}_instruction.json"):
        ask, reply = row["conversation"]
        assert reply["caption"] == captions[row["mm_name"]] and reply["caption"][1:-1] in ask["value"]
        assert (ask["input_modality"], reply["output_modality"], row["output_modality"]) == ("text", kind, kind)
    for row in annotations(world, f"{kind}_generation.json"):
        ask, reply = row["conversations"]
        caption = captions[row[f"output_{kind}"]]
        assert row[f"{kind}_captions"] == caption and caption[1:-1] in ask["value"]
        assert reply["value"].endswith(f"<{kind}>")


def test_shapes_numbers_and_parts_say_what_captions_say(world):
    said = {row["img_path"]: re.sub(r" ?\b(an?|at the|in the|and)\b", "", row["caption"].lower()).strip(" .").replace(", ", ",")
            for row in annotations(world, "CAP_train.jsonl")}
    for row in annotations(world, "numbers.json"):
        names = re.findall(f"({'|'.join(shapes.COLOURS)}) ({'|'.join(shapes.SHAPES)})", said[row["image_name"]])
        assert row["caption"] == " ".join([shapes.counted(len(names), "shape"), *(f"{c} {s}" for c, s in names)])
    for row in annotations(world, "parts_train.jsonl"):
        for region in row["regions"]:
            text, *sides = re.split(" (?=leftmost|rightmost|highest|lowest)", region["expressions"][0])
            assert len(text.split()) in (4, 5) and text in said[row["img_path"]]
            for way in (way for way, side, _ in shapes.RELATIONS if side in sides):
                at = [np.dot(way, [x1 + x2, y1 + y2]) for x1, y1, x2, y2 in [region["bbox"], *(r["bbox"] for r in row["regions"])]]
                assert at[0] == max(at)


@pytest.fixture(scope="session")
def named(world):
    """Name and centre of the things in every picture of the world, by their boxes in whole pixels."""
    found = {}
    for row in annotations(world, "REG_train.jsonl"):
        x1, y1, x2, y2 = row["bbox"]
        size, colour, shape = row["expression"].split()[1:]
        found.setdefault(row["img_path"], {})[tuple(map(round, row["bbox"]))] = Thing(
            size=size, colour=colour, shape=shape, x=(x1 + x2) / 2, y=(y1 + y2) / 2)
    return found


@pytest.mark.parametrize("name, times", [("names_train.jsonl", 1), ("recs_train.jsonl", 2)])
def test_shapes_regions_are_told_by_what_fits_them(world, named, name, times):
    rows = annotations(world, name)
    assert len(rows) > len(named) / 2
    for row in rows:
        here, boxes = named[row["img_path"]], [tuple(map(round, region["bbox"])) for region in row["regions"]]
        assert all(boxes.count(box) == times for box in boxes)
        for t, said in zip(map(here.get, boxes), (region["expressions"] for region in row["regions"])):
            for text in said:
                most, size, colour, shape, *where = SENTENCE.fullmatch(text).groups()
                assert size in (None, t.size) and colour in (None, t.colour) and shape in ("thing", t.shape)
                assert times == 2 or not any((most, *where)) and [id(u) for u in meant(text, here.values())] == [id(t)]
            assert len(said) <= (6, 7)[times == 1]              # the last two ways twice as often


def test_shapes_grounded_captions_and_pope_answers_are_true(world, named):
    for row in annotations(world, "CWB_flickr_train.jsonl"):
        phrases = re.findall("<ph_st>(.*?)<ph_ed>", row["sentence"])
        here = named[f"pictures/{row['image_id']}.png"]
        assert len(phrases) == len(row["boxes_seq"]) and sorted(sum(row["boxes_seq"], [])) == list(range(len(here)))
        for phrase, seq in zip(phrases, row["boxes_seq"]):
            first, *words = phrase.split()
            for t in (here[tuple(map(round, row["boxes"][i]))] for i in seq):
                if len(seq) == 1:
                    assert first in ("a", "an") and [t.size, t.colour, t.shape][-len(words):] == words
                else:
                    assert first == shapes.NUMBERS[len(seq)] and words[0] in (t.shape + "s", t.shape + "es")
    for how in ("random", "popular", "adversarial"):
        rows = annotations(world, f"POPE_{how}.jsonl")
        assert [row["question_id"] for row in rows] == list(range(1, len(rows) + 1))
        assert [row["label"] for row in rows] == ["yes", "no"] * len(named)
        for row in rows:
            colour, shape = re.fullmatch(r"Is there an? (\w+) (\w+) in the picture\?", row["text"]).groups()
            there = [(t.colour, t.shape) for t in named[row["image"]].values()]
            assert ((colour, shape) in there) == (row["label"] == "yes")
            assert how != "adversarial" or any(colour == c or shape == s for c, s in there)


@pytest.mark.parametrize("name", ["CB_MRG.json", "CB_LC.json"])
def test_shapes_dialogues_are_true_and_linked(world, named, name):
    talks = annotations(world, name)["data"]
    assert len(talks) > 8 and all(len(talk["conversation"]) == 6 for talk in talks)
    for talk in talks:
        here, last = named[talk["image"]], None
        for ask, reply in zip(talk["conversation"][::2], talk["conversation"][1::2]):
            (word, *numbers), = re.findall(r"<([\w ]+):\[(\d+), (\d+), (\d+), (\d+)\]>$", reply["value"])
            t, others = here[tuple(map(int, numbers))], [u for u in here.values() if u is not last]
            assert word in (t.shape, f"{t.colour} {t.shape}")
            if side := re.match(f"What is ({'|'.join(BEYOND)}) ", ask["value"]):
                assert [u for u in others if BEYOND[side[1]](u, last)] == [t]
            elif last:
                word = t.size if "big" in ask["value"] else t.colour
                assert t is last and reply["value"].startswith(f"It is {word}.")
            else:
                assert ask["value"] == f"Where is the {word}?" and [meant(f"the {word}", here.values())] == [[t]]
            if last:                                            # each question speaks of what was found before
                known = f"{last.colour} {last.shape}"
                assert ("[it]" if name == "CB_LC.json" else f"the {known}? <{known}:[") in ask["value"]
            last = t


def test_shapes_talks_show_point_and_wish(world, named):
    """Nothing twice, media and boxes as elsewhere in the world, a picture before what is pointed at, wishes as they are made."""
    prompts = {(kind, Path(row[f"output_{kind}"]).name): row[f"{kind}_captions"]
               for file, kind in (("drawings", "image"), ("video", "video"), ("audio", "audio"))
               for row in annotations(world, f"{file}_wishes.json")}
    talks, seen = annotations(world, "talks.json"), set()
    assert len(talks) == len(annotations(world, "drawings_wishes.json"))
    for talk in talks:
        turns = datasets.turns_of(talk, world)
        shown = [(i, part) for i, turn in enumerate(turns) for part in turn if isinstance(part, data.Medium)]
        made = [(i, part) for i, turn in enumerate(turns) for part in turn if isinstance(part, data.Signal)]
        boxes = [(i, part) for i, turn in enumerate(turns) for part in turn if isinstance(part, data.Box)]
        kinds, writers = [part.kind for _, part in shown], [part.writer for _, part in made]
        assert 1 <= len(kinds) == len(set(kinds)) and 1 <= len(writers) == len(set(writers)) <= 2
        for i, part in shown:
            assert i % 2 == 0 and part.path.endswith(talk[f"input_{part.kind}"]) and Path(part.path).is_file()
        for i, part in made:
            name = Path(part.path).name.removesuffix(".npy")
            assert turns[i][0] == prompts[paint.KINDS[part.writer], name] and i % 2
        for i, box in boxes:
            assert tuple(box.xyxy_px) in named[talk["input_image"]] and i > shown[kinds.index("image")][0]
        seen |= {*kinds, *writers, *["box"] * len(boxes)}
    assert seen == {"image", "video", "audio", "img", "vid", "aud", "box"}


def looks(t):
    return t and (t.shape, t.colour, t.size)


def measured(kind, seed):
    """Whether the measuring rule sees or hears what was made from a seed."""
    rng = random.Random(seed)
    if kind == "scenes":
        things = shapes.scene(rng)
        seen = shapes.look(shapes.draw(things, rng, shapes.paper(rng)))
        return sorted(map(looks, seen)) == sorted(map(looks, things)) and all(
            min(abs(t.x - u.x) + abs(t.y - u.y) for u in seen) < 1 for t in things)
    if kind == "clips":
        thing, way, frames = shapes.clip(rng)
        seen, found = shapes.watch(frames)
        return (looks(seen), found) == (looks(thing), way)
    count, pitch, _, x = shapes.sound(rng)
    return shapes.listen(x) == (count, pitch)


MANY = [pytest.param(kind, 300, marks=pytest.mark.slow) for kind in ("scenes", "clips", "sounds")]


@pytest.mark.parametrize("kind, n", [("scenes", 40), ("clips", 10), ("sounds", 60), *MANY])
def test_shapes_measuring_is_right(kind, n):
    assert sum(measured(kind, 1000 + seed) for seed in range(n)) >= 0.98 * n


def test_shapes_drawings_are_what_their_captions_say():
    right, turned = 0, 0
    for seed in range(30):
        rng = random.Random(seed)
        things, caption = shapes.drawing(rng)
        picture = shapes.draw(things, rng, shapes.paper(rng))
        right += all(shapes.judge("image", caption, picture).values())
        other = shapes.judge("image", caption, picture.transpose(shapes.Image.ROTATE_180))
        turned += bool(other["places"]) and "centre" not in caption and len({t.name for t in things}) == len(things)
        assert not shapes.judge("image", caption, shapes.draw(things[1:], rng, (230, 230, 230)))["shapes"]
    assert right >= 29 and turned == 0


def test_shapes_wishes_are_answered_in_the_words_of_a_painter():
    for seed in range(40):
        rng = random.Random(seed)
        things, caption = shapes.drawing(rng)
        row = shapes.wish(shapes.Medium("image", "drawings/0.png", [], caption, things), rng)
        told, (ask, answer) = row["image_captions"], row["conversations"]
        assert shapes.judge("image", told, shapes.draw(things, rng, shapes.paper(rng)))["things"]
        assert answer["value"] == f"{told} <image>" and caption[1:-1] in ask["value"]
        kinds = [(t.size, t.colour, t.shape) for t in things]
        assert re.findall(r"(small|big) (\w+) (\w+)", told) == kinds and len(told.split()) in (6, 7, 8, 9, 10, 11)


def test_shapes_measuring_finds_nothing_where_nothing_is():
    r = np.random.RandomState(0)
    arrays = r.randint(0, 256, (64, 64, 3)), np.full((64, 64, 3), 220)
    noise, blank = (shapes.Image.fromarray(array.astype(np.uint8)) for array in arrays)
    assert shapes.look(noise) == shapes.look(blank) == [] and shapes.watch([noise, blank]) == (None, None)
    assert shapes.listen(r.randn(32000) * 0.005) == (0, None)
    one = shapes.draw([shapes.Thing("star", "red", "big", 64, 64, 23)], random.Random(0), (230, 230, 230))
    assert shapes.watch([one] * 9)[1] is None and looks(shapes.look(one.resize((64, 64)))[0]) == ("star", "red", "big")


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], *(["--quantize", kind] for kind in quantize.KINDS)])
def test_tiny_weights_answer_about_files_they_have_not_seen(flags, tmp_path, capsys):
    shapes.main(["--out", str(tmp_path), "--questions", "200", "--seed", "7"])
    evaluate.main([str(HERE / "weights/tiny"), str(tmp_path / "questions.json"), *flags])
    rows = re.findall(r"^(\w+).*? +(\d+) of +(\d+)", capsys.readouterr().out, re.M)
    share = {kind: sum(int(r) for k, r, _ in rows if k == kind) / sum(int(n) for k, _, n in rows if k == kind) for kind, _, _ in rows}
    assert share["audio"] >= 0.97 and share["video"] >= 0.97 and share["all"] >= 0.9


@pytest.mark.slow
def test_tiny_weights_point_outline_and_keep_up_a_talk(tmp_path):
    shapes.main(["--out", str(tmp_path), "--questions", "80", "--seed", "8"])
    names = {"rec": "REC_test.jsonl", "res": "RES_test.jsonl", "pope": "POPE_random.jsonl", "rounds": "CB_LC.json", "talks": "talks.json"}
    for task, name in names.items():
        evaluate.main([str(HERE / "weights/tiny"), str(tmp_path / name), "--task", task, "--out", str(tmp_path / task)])
    found = {task: json.loads((tmp_path / task / "metrics.json").read_text()) for task in names}
    assert found["rec"]["accuracy"] >= 0.75 and found["res"]["ciou"] >= 0.65 and found["pope"]["nextchat"]["f1"] >= 0.9
    assert found["rounds"]["text"] >= 0.85 and found["rounds"]["box"] >= 0.85 and found["rounds"]["dialogues"] >= 0.7
    assert found["talks"]["text"] >= 0.9 and found["talks"]["box"] >= 0.9 and found["talks"]["drawn"] >= 0.9


@pytest.mark.slow
def test_tiny_weights_draw_what_captions_and_wishes_say(tmp_path):
    shapes.main(["--out", str(tmp_path), "--questions", "96", "--seed", "9"])
    for file, what in (("drawings", "all"), ("video", "way"), ("audio", "count"), ("audio", "pitch")):
        kind, rows = paint.read_captions(tmp_path / f"{file}_wishes.json")
        captions, wishes, _ = zip(*rows[:40])
        for made in paint.paint(HERE / "weights/tiny/painters" / kind, kind, captions), paint.ask(HERE / "weights/tiny", kind, wishes):
            assert paint.judge(kind, captions, made)[what] >= 0.65, (file, what)
    assert sum(path.stat().st_size for path in (HERE / "weights/tiny").rglob("*") if path.is_file()) <= 12e6


def talk_of_everything(session, folder, number):
    """One conversation that looks, points, asks about the thing pointed at, listens, draws, plays, films and points again, in an
    order by chance that keeps the first three together -> {ability: right}."""
    r, right = random.Random(number), {}
    sound, drawing, clip, other, *pictures = (
        shapes.write_medium((kind, 40 * number + i, 3, folder)) for i, kind in enumerate(("audio", "drawing", "video", "audio", *["image"] * 30)))
    picture, first, last = next((m, *seen) for m in pictures if len(seen := shapes.only(m.things, "shape")) == 2)

    def point(thing):
        _, boxes, masks, _ = session.ask(f"Where is the {thing.shape}?")
        return len(boxes) == 1 and masks is not None and evaluate.box_iou(*torch.tensor([boxes, [shapes.box(thing)]])).item() > 0.5

    def look():
        right["count"] = session.ask("How many shapes are there?", str(folder / picture.name))[0] == (
            f"There are {shapes.NUMBERS[len(picture.things)]} shapes.")
        right["point"] = point(first)
        right["ask about it"] = f"It is {first.size}." in session.ask("How big is it?")[0]

    def listen():
        _, question, answer = sound.questions[0]
        right["listen"] = session.ask(question, str(folder / sound.name))[0] == answer

    def wish(m):
        session.ask(shapes.wish(m, r)["conversations"][0]["value"])
        made = [one for one in session.last().drawn if paint.KINDS[one.kind] == m.kind]
        right[m.kind] = len(made) == 1
        what = {"image": "things", "video": "way", "audio": "count"}[m.kind]
        right[f"{m.kind} as told"] = len(made) == 1 and shapes.judge(m.kind, shapes.drawn(m.things) if m.things else m.caption,
                                                                   paint.shown(m.kind, made[0].content, made[0].rate))[what]
    for part in r.sample([look, listen, *(partial(wish, m) for m in (drawing, clip, other))], 5):
        part()
    right["point again"] = point(last)
    return right


@pytest.mark.slow
def test_tiny_weights_do_everything_in_one_talk(tmp_path):
    session, right, n = chat.open_session(HERE / "weights/tiny", "cpu"), Counter(), 12
    for folder, *_ in shapes.MEDIA.values():
        (tmp_path / folder).mkdir()
    for number in range(n):
        session.clear()
        right.update(talk_of_everything(session, tmp_path, number))
    assert all(right[what] >= (0.9 if what in ("image", "video", "audio") else 0.6) * n for what in right), right


# ---- Chat

CHAT_WEIGHTS = HERE / "weights/tiny"


def chat_session(**settings):
    return chat.open_session(CHAT_WEIGHTS, "cpu", **{"max_new_tokens": 10, **settings})


@pytest.fixture
def chat_files(tmp_path):
    """One file of every kind, with awkward names."""
    pictures = [data.Image.fromarray(image(40, 60, seed)) for seed in range(4)]
    names = [tmp_path / name for name in ("a dog's.png", "clip (1).gif", "tone.wav", "note.txt")]
    pictures[0].save(names[0])
    pictures[1].save(names[1], save_all=True, append_images=pictures[2:], duration=200)
    with data.wave.open(str(names[2]), "wb") as f:
        f.setparams((1, 2, 16000, 0, "NONE", ""))
        f.writeframes(wave(16000, 1.0, 0, 1).tobytes())
    names[3].write_text("not a medium")
    return [str(name) for name in names]


def chat_twin(session):
    """The last turn once more, by a session without a cache."""
    twin = chat_session()
    twin.turns, twin.system_text, last = session.turns[:-1], session.system_text, session.turns[-1]
    "".join(twin.say(last.text, last.media))
    return twin


def same_places(ours, want):
    """Whether two caches hold the same ids and media, and boxes that the model found at the same place."""
    return len(ours) == len(want) and all(
        a.xyxy_px == pytest.approx(b.xyxy_px, abs=1e-2) if isinstance(a, data.Box) and isinstance(b, data.Box) else a == b
        for a, b in zip(ours, want))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_chat_reuse_changes_nothing(seed, chat_files):
    rng, session = random.Random(seed), chat_session(graph=seed % 2)
    for step in range(12):
        act = rng.choice(["say", "say", "say", "retry", "undo", "drop", "system"]) if session.turns else "say"
        if act == "say":
            session.pending += [session.read(rng.choice(chat_files[:3])) for _ in range(rng.randrange(3))]
        if act in ("undo", "drop", "system"):
            {"undo": session.undo, "drop": lambda: session.media and session.drop(rng.choice(session.media)),
             "system": lambda: setattr(session, "system_text", "Be brief.")}[act]()
            continue
        "".join(session.say(f"what is number {step}?") if act == "say" else session.retry())
        twin = chat_twin(session)
        assert session.turns[-1].ids == twin.turns[-1].ids and same_places(session.held, twin.held)
        ours, want = session.cache.k[:, :, :, :session.cache.pos], twin.cache.k[:, :, :, :twin.cache.pos]
        assert (ours - want).abs().max() <= PARITY * want.abs().max()


def test_chat_second_turn_runs_only_the_new(chat_files):
    session = chat_session()
    "".join(session.say("what is this?", [session.read(chat_files[0])]))
    before = len(session.turns[0].prompt)
    "".join(session.say("and now?"))
    assert session.turns[1].reused >= before
    "".join(session.retry())
    assert session.turns[1].reused == len(session.turns[1].prompt) - 1
    session.turns[0].answer = "something else"                  # edited: all from there on runs again
    "".join(session.retry())
    assert before <= session.turns[1].reused < len(session.turns[1].prompt) - 1


def test_chat_same_ids_of_other_media_are_not_reused(chat_files):
    session = chat_session()
    for path in (chat_files[0], chat_files[0], chat_files[2]):
        session.clear()
        "".join(session.say("what is this?", [session.read(path)]))
        assert session.turns[0].reused < session.turns[0].prompt.index(session.tok.special["<im_patch>"]) + 1
        assert chat_twin(session).turns[0].ids == session.turns[0].ids


def test_chat_media_are_encoded_once(chat_files, monkeypatch):
    session, seen = chat_session(), []
    read = session.model.read
    monkeypatch.setattr(session.model, "read", lambda kind, x: seen.append(kind) or read(kind, x))
    session.pending = [session.read(path) for path in chat_files[:3]]
    "".join(session.say("what are these?"))
    monkeypatch.setattr(data, "read_media", None)               # reading once more would fail
    for turn in range(3):
        "".join(session.say("and?"))
        session.system_text = f"Be brief {turn}."
        "".join(session.retry())
    assert seen == ["image", "video", "audio"]


def test_chat_closing_keeps_what_was_said():
    session = chat_session()
    pieces = session.say("hello")
    said = next(pieces) + next(pieces)
    pieces.close()
    assert session.turns[-1].answer == said.strip() and len(session.held) == session.cache.pos
    "".join(session.say("and then?"))
    assert session.turns[-1].ids == chat_twin(session).turns[-1].ids


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), RuntimeError("[...] can't allocate memory")])
@pytest.mark.parametrize("place", ["KVCache", "generate"])
def test_chat_out_of_memory_changes_nothing(error, place, chat_files, monkeypatch):
    session = chat_session()
    "".join(session.say("hello"))
    turns, session.pending = session.turns, [session.read(chat_files[0])]
    session.cache = session.cache if place == "generate" else None
    with monkeypatch.context() as patch, pytest.raises(MemoryError, match="lower"):
        patch.setattr(chat, place, lambda *a, **k: (_ for _ in ()).throw(error))
        "".join(session.say("and this?"))
    assert session.turns is turns and len(session.pending) == 1 and session.cache is None
    "".join(session.say("and this?"))
    assert session.turns[-1].ids == chat_twin(session).turns[-1].ids


def test_chat_full_context_drops_the_oldest():
    session = chat_session(context=120)
    for i in range(12):
        "".join(session.say(f"tell me about number {i}"))
        assert len(session.held) <= 120 and session.turns[-1].text.endswith(str(i))
        assert session.turns[-1].ids == chat_twin(session).turns[-1].ids
    assert 1 < len(session.turns) < 12 and session.turns[-1].dropped
    with pytest.raises(ValueError, match="shorten"):
        "".join(session.say("long " * 500))
    assert len(session.turns) > 1


def test_chat_save_and_load(tmp_path, chat_files):
    session, path = chat_session(), str(tmp_path / "talk.json")
    session.system_text = "Be brief."
    "".join(session.say("what is </s> this?", [session.read(chat_files[1])]))
    session.save(path)
    other = chat_session()
    other.load(path)
    for one in (session, other):
        "".join(one.say("and now?"))
    assert session.turns[-1].prompt == other.turns[-1].prompt and session.turns[-1].ids == other.turns[-1].ids
    with pytest.raises(FileExistsError):
        session.save(path)


BROKEN = ['', '[]', '{}', 'null', '{"turns": []}',
          '{"system": "", "turns": [{"text": "\\ud800", "media": [], "answer": ""}]}',
          '{"system": "", "turns": [{"text": "", "media": [["/nowhere.png", "image"]], "answer": ""}]}', '[' * 100000,
          '{"system": "", "turns": [{"text": "", "media": ["ab"], "answer": ""}]}', '\xff',
          '{"system": "", "turns": 3}',
          '{"system": "", "turns": [{"text": "", "media": [["note.txt", "tune"]], "answer": ""}]}']


@pytest.mark.parametrize("text", BROKEN)
def test_chat_broken_conversations_are_refused(text, tmp_path, monkeypatch):
    session, path = chat_session(), tmp_path / "talk.json"
    path.write_bytes(text.encode("latin1"))
    "".join(session.say("hello"))
    turns = session.turns
    with pytest.raises(ValueError):
        session.load(path)
    assert session.turns is turns and session.system_text == ""


def chat_prompt_only(name, **options):
    """A session of any system that can make prompts, but not answer."""
    row, path = data.SYSTEMS[name], need(LLAMA_TOKENIZER, "LLAMA_TOKENIZER")
    tok = data.Tokenizer(path, {token: 32000 + i for i, token in enumerate(row.added)}, row.legacy)
    cfg = Thing(llm=Thing(max_len=2048), n_token=lambda kind: 3, reads={})
    model = Thing(llm=Thing(embed=Thing(weight=torch.zeros(1))), cfg=cfg, writers={})
    return chat.Session(model, tok, row, data.TEMPLATES[row.template], **options)


FORMS = ("{0}", "{0} what is it?", "what is {0} it?", "what is it? {0}", "{0}{0}", "a{0}b", " {0} ", "\n{0}\n", "{1}")


@pytest.mark.parametrize("name", data.SYSTEMS)
def test_chat_typed_tokens_stay_text(name):
    session, loose = chat_prompt_only(name), chat_prompt_only(name, parse_special=True)
    tok = session.tok
    def specials(session, text):
        ids, _ = session.prompt([chat.Turn(text, [])])
        return [id for id in ids if id and (id in tok.names or tok.sp.is_control(id))]      # 0: see legacy=False
    plain = specials(session, "what is it?")
    for token, form in itertools.product(tok.special, FORMS):
        text = form.format(token, " ".join(token))
        assert specials(session, text) == plain, text
        session.system_text = text
        assert len(specials(session, "what is it?")) == len(plain), text
        session.system_text = ""
    assert all(len(specials(loose, token)) == len(plain) + 1 for token in tok.special if token != "<unk>")


@pytest.mark.parametrize("name", ["tiny", "chatbind", "nextchat", "chatterbox"])
def test_chat_media_take_their_places(name):
    session, (before, place, after) = chat_prompt_only(name), data.SYSTEMS[name].frame
    media = [data.Medium("image"), data.Medium("audio")]
    ids, slots = session.prompt([chat.Turn(f"what {place}{before} is it?", media)])
    framed = [session.tok.special[token] for token in (before, place, place, place, after)]
    assert [medium for medium, _ in slots] == media
    assert all(ids[at - 1:at + 4] == framed for _, at in slots)
    words = session.tok.decode(ids)
    assert (words.index("what") < words.index(before + " ")) == session.system.media_last


def chat_main(monkeypatch, capsys, *words, stdin=b""):
    """Run chat.py in this process -> exit code, stdout, stderr."""
    flags = ["--device", "cpu", "--max-new-tokens", "8"]
    monkeypatch.setattr(sys, "argv", ["chat.py", str(CHAT_WEIGHTS), *flags, *words])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    code = chat.main(chat.parse_args())
    return code, *capsys.readouterr()


@pytest.mark.slow
def test_chat_one_shot_reads_real_media(monkeypatch, capsys):
    kinds = {".jpg": "image", ".wav": "audio", ".mp4": "video"}
    files = [p for p in need(SHARED / "samples", "samples").rglob("*") if p.suffix in kinds]
    for path in files:
        kind = kinds[path.suffix]
        code, out, err = chat_main(monkeypatch, capsys, "-p", "What is this?", f"--{kind}", str(path), "--json")
        row = json.loads(out)
        assert code == 0 and f"#1 {kind} {path.name} " in err and row["media"] == [str(path)]
        assert set(row) == {"prompt", "text", "media", "boxes", "score", "masks", "files", "fault", "tokens", "seconds", "seed", "model"} and row["tokens"] > 0
    assert files


def test_chat_one_shot_prints_only_the_answer(monkeypatch, capsys, chat_files):
    session = chat_session(max_new_tokens=8)
    want = "".join(session.say("How many shapes are there?", [session.read(chat_files[0])]))
    code, out, err = chat_main(monkeypatch, capsys, "-p", "How many shapes are there?", "--image", chat_files[0])
    assert (code, out) == (0, chat.clean(want) + "\n") and err == "#1 image a dog's.png 60x40\n"


BAD = [("--image", "/nowhere.png"), ("--image", "{3}"), ("--audio", "{0}"), ("--image", "/"), ("--depth", "{3}"),
       ("--temperature", "hot"), ("--top-p", "2"), ("--image", "http://example.com/a.png"), ("--device", "toaster"),
       ("-p", ""), ("--painters", "{0}"), ("--painters", str(CHAT_WEIGHTS / "painters/image"))]


@pytest.mark.parametrize("flags", BAD)
def test_chat_one_shot_bad_input(flags, monkeypatch, capsys, chat_files):
    code, out, err = chat_main(monkeypatch, capsys, "-p", "hi", *[flag.format(*chat_files) for flag in flags])
    assert (code, out, err.count("\n")) == (2, "", 1), err


@pytest.mark.parametrize("typed, said", [("see @{} there", "see there"), ("@{} it?", "it?"), ("is it @{}?", "is it?"), ("a@b  (@c) @{}.", "a@b  (@c)."),
                                         ('in "@x" @"{}", who', 'in "@x", who'), ("one @{} two @{}!", "one two!")])
def test_chat_files_in_a_message_leave_its_words(typed, said, tmp_path, chat_files):
    Path(tmp_path / "p.png").write_bytes(Path(chat_files[0]).read_bytes())
    talker = chat.Chat(chat_session(), Thing(prompt="", pictures="off"))
    assert talker.inline(typed.replace("{}", str(tmp_path / "p.png"))) == said and len(talker.session.pending) == typed.count("{}")


def test_chat_files_dragged_in_before_words_are_attached(monkeypatch, capsys, chat_files):
    escaped, quoted = (name(chat_files[1]) for name in (chat_escape, chat.shlex.quote))
    lines = [f"{escaped} what?", f"{quoted} what?", f"{quoted} {escaped}  what?", f"{quoted} '/nowhere/a.png' what?", f"not {quoted}"]
    code, out, err = chat_main(monkeypatch, capsys, "--json", stdin="\n".join(lines).encode())
    rows = [(row["prompt"], len(row["media"])) for row in map(json.loads, out.splitlines())]
    assert rows == [("what?", 1), ("what?", 1), ("what?", 2), (lines[-1], 0)] and "/nowhere/a.png: no such file" in err


@pytest.mark.parametrize("able", [{}, {"amx_bf16": True}, {"avx512_bf16": True}])
def test_chat_big_weights_take_16_bits_where_a_cpu_multiplies_them(able, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    with open(tmp_path / "imagebind.safetensors", "wb") as file:            # not what would be loaded
        file.truncate(M.BIG + 1)
    assert M.usual_dtype(tmp_path, "cpu") == torch.float32
    assert chat_session().weight.dtype == torch.float32 and M.usual_dtype(CHAT_WEIGHTS, "cuda:1") == torch.bfloat16
    monkeypatch.setattr(M, "BIG", 1000)
    assert chat_session().weight.dtype == (torch.bfloat16 if able else torch.float32)
    assert chat.open_session(CHAT_WEIGHTS, "cpu", "float32").weight.dtype == torch.float32


def test_chat_info_counts_what_lies_in_memory():
    args = Thing(prompt="", pictures="off", weights="w")
    sizes = [int(re.match(r"w: (\d+) MB", chat.Chat(chat_session(quantize=kind), args).info())[1]) for kind in ("", "int8", "int4")]
    assert 15 < sizes[0] < 25 and 8 < sizes[1] < 11 and sizes[2] < sizes[1]


def test_chat_raw_shows_rows_without_a_token():
    session = chat_session()
    session.turns = [chat.Turn("", [], prompt=[1, 9999, 9999], ids=[2])]
    assert chat.Chat(session, Thing(prompt="", pictures="off")).raw("") == "prompt: 1'<s>' 9999''*2\nanswer: 2'</s>'"


def test_chat_stats_of_beams_time_all_of_the_search():
    session = chat_session(max_new_tokens=20, beams=3)
    "".join(session.say("what colour is the circle?"))
    said, (_, begin, _, end) = chat.Chat(session, Thing(prompt="", pictures="off")).stats(""), session.last().clock
    assert "at once" in said and float(re.search(r"([\d.]+) tok/s", said)[1]) <= len(session.last().ids) / (end - begin)


def chat_escape(path):
    """A file name as terminals write it when it is dragged in."""
    return re.sub(r"([ '()])", r"\\\1", path)


def test_chat_piped_lines_are_turns(monkeypatch, capsys, chat_files):
    lines = [f'/image "{chat_files[0]}"', "what is it?", chat_files[0], "clip? @" + chat_escape(chat_files[1]),
             '"""two', 'lines @nobody"""', "//slash", "look @/nowhere.png", "/media", '"""cut', "off"]
    code, out, err = chat_main(monkeypatch, capsys, "--json", stdin="\n".join(lines).encode())
    rows = [json.loads(line) for line in out.splitlines()[:4]]
    assert [row["prompt"] for row in rows] == ["what is it?", "clip?", "two\nlines @nobody", "/slash"]
    assert [len(row["media"]) for row in rows] == [1, 2, 0, 0] and code == 0
    assert json.loads(out.splitlines()[-1])["prompt"] == "cut\noff"
    assert out.splitlines()[4].startswith("#1 image") and "/nowhere.png: no such file" in err


ESCAPES = ("\x1b[31m", "\x1b]52;c;eA==\x07", "\x9b2J", "\x1b]0;t\x1b\\", "\x1bP1$r\x1b\\", "\x7f", "\r", "\x08",
           "\x85", "\x00", "\x90q\x9c", "\x1b(0", "\x0e", "\x9d8;;http://a\x9c", "\x1b[6n", "\x1bc", "\x05", "\x0b",
           "\x0c", "\x18")


def test_chat_control_characters_never_reach_the_terminal(capsys):
    talker = chat.Chat(Thing(last=lambda: Thing(dropped=0, text="", answer="", media=[], ids=[], clock=[0] * 4, found=[], boxes=[], find=False,
                                        picture=None, stray=[], drawn=[], made={}, fault=""),
                             settings={"seed": 0}, painters={}), Thing(prompt=None, pictures="off", json=False, weights="", no_draw=False))
    for text in ESCAPES:
        text = f"a\tb\n{text}c{text}"
        for cut in range(len(text)):
            talker.stream(piece for piece in (text[:cut], text[cut:]))
        chat.log(text)
    out, err = capsys.readouterr()
    assert not chat.CONTROL.search(out + err) and not re.search(r"[^\n\t -~]", out + err) and "a\tb\n" in out


PICTURES = {"kitty": r"\x1b_Gf=100,a=T,q=2,m=1;[\w+/=]{4096}\x1b\\(\x1b_Gm=1;[\w+/=]{4096}\x1b\\)*"
                     r"\x1b_Gm=0;[\w+/=]{1,4096}\x1b\\\n",
            "iterm": r"\x1b\]1337;File=inline=1;size=\d+;width=\d+px:[\w+/=]+\x07\n",
            "blocks": r"((\x1b\[38;2(;\d{1,3}){3};48;2(;\d{1,3}){3}m▀){53}\x1b\[0m\n){24}"}


@pytest.mark.parametrize("how", PICTURES)
def test_chat_pictures_are_well_formed(how):
    noise = data.Image.fromarray(np.random.RandomState(0).randint(0, 255, (235, 260, 4), np.uint8))
    text = chat.draw(noise, how)
    assert re.fullmatch(PICTURES[how], text)
    if how != "blocks":
        code = "".join(re.findall(r"[;:]([\w+/=]+)(?:\x1b\\|\x07)", text))
        assert data.Image.open(io.BytesIO(chat.base64.b64decode(code))).size == (260, 235)


TERMINALS = [({"TERM": "xterm-kitty"}, "kitty"), ({"KITTY_WINDOW_ID": "1"}, "kitty"),
             ({"TERM_PROGRAM": "ghostty"}, "kitty"), ({"TERM_PROGRAM": "WezTerm"}, "kitty"),
             ({"TERM_PROGRAM": "iTerm.app", "COLORTERM": "truecolor"}, "iterm"), ({"LC_TERMINAL": "iTerm2"}, "iterm"),
             ({"COLORTERM": "24bit"}, "blocks"), ({"TERM": "xterm"}, "off"),
             ({"TERM": "screen-256color", "COLORTERM": "truecolor"}, "off"),
             ({"TERM": "xterm-kitty", "TMUX": "/tmp/x"}, "off"), ({"COLORTERM": "truecolor", "NO_COLOR": "1"}, "off")]


@pytest.mark.parametrize("env, how", TERMINALS)
def test_chat_picture_protocol(env, how):
    assert chat.protocol(env) == how


def test_chat_photos_with_previews_are_pictures(tmp_path):
    photo, preview = (data.Image.fromarray(image(side, side, 0)) for side in (40, 20))
    photo.save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[preview])
    medium = chat_session().read(tmp_path / "phone.jpg")
    assert medium.kind == "image" and medium.size == (40, 40)


def test_chat_kinds_of_files(chat_files):
    picture, clip, tone, note = chat_files
    session = chat_session()
    assert [session.read(path).kind for path in (picture, clip, tone)] == ["image", "video", "audio"]
    assert [session.read(clip, kind).kind for kind in ("image", "video")] == ["image", "video"]
    for path, kind, words in ((note, "", "not readable as a medium, its type is unknown"), (note, "image", "unknown"),
                              (picture, "audio", "not readable as audio, its type is image"), (clip, "thermal", "not"),
                              (picture, "video", "its type is image"), ("https://a.b/c.png", "", "not fetched"),
                              (picture + "x", "", "no such file"), (picture, "thermal", "reads image, video, audio")):
        with pytest.raises(data.MediaError, match=words):
            session.read(path, kind)


def test_chat_opens_no_connection(monkeypatch, capsys, chat_files):
    def refuse(*a, **k):
        raise AssertionError("a socket was opened")
    monkeypatch.setattr(socket, "socket", refuse)
    urls = [f"{scheme}://example.com/a.png" for scheme in ("http", "https", "file", "ftp", "concat", "rtmp")]
    forms = "/image {}", "/video {}", "/audio {}", "see @{} now", "/load {}"
    lines = [form.format(url) for url in urls for form in forms] + ["/image data:image/png;base64,AA", "/video lavfi:a"]
    script = "\n".join([*lines, chat_files[0], "what?"])
    code, out, err = chat_main(monkeypatch, capsys, "--json", stdin=script.encode())
    assert len(err.splitlines()) == len(lines) + 1 and len(out.splitlines()) == 1 and "socket" not in err


def test_chat_help_is_instant():
    start = time.time()
    command = [sys.executable, "-X", "importtime", "chat.py", "--help"]
    got = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert time.time() - start < 1 and got.returncode == 0 and "examples:" in got.stdout
    assert not re.search(r"\| +(torch|numpy|data)$", got.stderr, re.M)


def test_chat_may_be_interrupted_while_it_starts():
    got = subprocess.Popen([sys.executable, "-X", "importtime", "chat.py", "-p", "hi"], cwd=HERE, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    next(line for line in got.stderr if "numpy" in line)
    got.send_signal(signal.SIGINT)
    assert not re.search("Traceback|terminate", got.communicate()[1]) and got.returncode == -signal.SIGINT


class ChatTerminal:
    """chat.py in a pseudo-terminal. `ask` sends a line and returns what was printed until the next prompt."""

    def __init__(self, tmp_path, *words, program=("chat.py",)):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(HERE)
            os.environ.update(XDG_STATE_HOME=str(tmp_path), TERM="xterm", NO_COLOR="1", OMP_NUM_THREADS="1")
            os.execv(sys.executable, [sys.executable, *program, str(CHAT_WEIGHTS), "--device", "cpu", *words])

    def read(self, until, seconds=180):
        out, end = b"", time.time() + seconds
        while not re.search(until, out.decode(errors="replace")):
            assert time.time() < end and select.select([self.fd], [], [], end - time.time())[0], out
            try:
                out += os.read(self.fd, 65536)
            except OSError:                                     # the other side has closed
                break
        return out.decode(errors="replace")

    def ask(self, line, until=r"\n(\x1b\[\?2004h)?> $"):
        os.write(self.fd, line.encode(errors="surrogateescape") + b"\n")
        return self.read(until)

    def interrupt(self, until=r"\n(\x1b\[\?2004h)?> $"):
        """Ctrl-C, again after a while: readline forgets one that comes between its showing the prompt and its wait for keys."""
        for _ in range(9):
            os.write(self.fd, b"\x03")
            if select.select([self.fd], [], [], 20)[0]:
                return self.read(until)
        raise AssertionError("no answer to Ctrl-C")

    def close(self):
        """Ctrl-D; returns the exit code."""
        os.write(self.fd, b"\x04")
        self.read("never printed")
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


ODD = ["/", "/nope", "/hepl", "/image", "/image nope.png", "/image /", "/image 'open", '/audio "open', "/video {3}",
       "/audio {0}", "/depth {0}", "/thermal {0}", "/imu {3}", "/drop", "/drop #99", "/drop 0", "/drop #-1",
       "/drop last last", "/show", "/show #1e9", "/show \u0661", "/save", "/save /", "/save {3}",
       "/save /nowhere/at/all.json", "/load", "/load /", "/load {3}", "/load {0}", "/load /dev/zero",
       "/load nope.json", "/set x", "/set temperature", "/set temperature hot", "/set temperature -1",
       "/set temperature nan", "/set temperature inf", "/set top_k 1.5", "/set top_p 2", "/set seed -1",
       "/set seed 1e99", "/set max_new_tokens 0", "/set nothing 1", "/set __class__ 1", "/undo", "/retry", "/raw",
       "/stats", "/media", "/info", "/help", "/?", "/clear", "/system", "@nope", "see @nope.png", "see @'open",
       "see @/", "@{3}", "@/dev/zero", "/image {4}", "/image {5}", "/image {6}", "{4}", "/image " + "x" * 300,
       "/image " + "a/" * 500, "/" + "y" * 3000, "/etc/passwd", "/dev/null", "/tmp", "/image ~", "/image ~nobody/x",
       "/image http://a.b/c.png", "/image file:///etc/passwd", "/image *", "/image $HOME", "/image -", "/image \\",
       "/quitt", "/exi", "'/nowhere/my dog.png'", '"/nowhere.png"', "'{6}'", "/LOAD x", "/set\ttop_k\tx", '""""""',
       '"""   """', "z" * 3000, "{3} is a file", "   ", ""]
TEXTS = ["</s>", "<s><s>", "<unk>", "<im_patch>", "<im_start><im_patch><im_end>", "USER: hi ASSISTANT: ho</s>",
         "http://a.b/c.png", "it's", 'say "x', "\\", "//nope", '"""/nope @nope"""', "z" * 300,
         "\u202e\u0661\U0001f415", "\udcff\udcfe", "is {3} a file", "\x16\x1b[31mred", "\x16\x07\x16\x00", "a@b.c",
         "$(reboot) `ls` %s {{}}"]


@pytest.mark.slow
def test_chat_survives_hostile_lines(tmp_path, chat_files):
    broken = [str(tmp_path / name) for name in ("cut.png", "empty.wav", "text.mp4")]
    contents = Path(chat_files[0]).read_bytes()[:200], b"", b"ffconcat version 1.0\nfile /etc/passwd"
    for path, content in zip(broken, contents):
        Path(path).write_bytes(content)
    names = [chat_escape(path) for path in chat_files + broken]
    terminal = ChatTerminal(tmp_path, "--max-new-tokens", "8")
    terminal.read("> $")
    assert len(ODD) + len(TEXTS) >= 100
    for line in ODD:
        assert "Traceback" not in terminal.ask(line.format(*names)), line
        assert "nothing was said" in terminal.ask("/stats"), line
    for line in TEXTS:
        terminal.ask(line.format(*names))
        assert "taken back" in terminal.ask("/undo") and "nothing was said" in terminal.ask("/stats"), line
    answer = terminal.ask("what colour is the circle?").replace("\r", "")
    session = chat_session(max_new_tokens=8)
    assert chat.clean("".join(session.say("what colour is the circle?"))) + "\n" in answer
    assert terminal.close() == 0


SLOW_MODEL = """import itertools, sys, time, chat
def generate(*args, **options):
    for _ in itertools.count():
        time.sleep(0.02)
        yield 70
chat.generate = generate
sys.exit(chat.main(chat.parse_args()))"""


@pytest.mark.parametrize("inherited", (signal.SIG_DFL, signal.SIG_IGN), ids=("plain", "ignored"))
def test_chat_interrupts(tmp_path, inherited):
    before = signal.signal(signal.SIGINT, inherited)
    terminal = ChatTerminal(tmp_path, program=("-c", SLOW_MODEL))
    signal.signal(signal.SIGINT, before)
    terminal.read("> $")
    os.write(terminal.fd, b"hello\n")
    terminal.read(r"hello\r\n(.|\n)*\w\w\w")
    assert " [stopped]" in terminal.interrupt()
    os.write(terminal.fd, b"half a line")
    terminal.read("half a line")
    assert "Ctrl-D or /quit" in terminal.interrupt()
    assert "answer: 70" in terminal.ask("/raw")                 # what was said stays
    assert terminal.close() == 0


def test_chat_completes_commands_and_paths(chat_files):
    def all_of(text):
        return list(itertools.takewhile(bool, (chat.complete(text, i) for i in itertools.count())))
    assert all_of("/se") == ["/set"] and {"/show", "/save", "/set", "/stats", "/system"} <= set(all_of("/s"))
    found, = all_of("@" + chat_files[0][:-6])
    assert chat.shlex.split(found) == ["@" + chat_files[0]]
    assert all_of(str(HERE)[:-1]) and all(name.endswith("/") for name in all_of(str(HERE)) if os.path.isdir(name))


def test_chat_takes_templates_from_a_file(tmp_path):
    row = {"system": "Be brief.", "roles": ["ASKED", "SAID"], "style": "two", "sep": " ", "sep2": "</s>", "messages": []}
    name = data.SYSTEMS["tiny"].template
    (tmp_path / "t.json").write_text(json.dumps({"templates": {name: row}}))
    session = chat_session(max_new_tokens=2, templates=tmp_path / "t.json")
    list(session.say("hello"))
    assert session.tok.decode(session.turns[0].prompt).replace(" ", "") == "Bebrief.ASKED:helloSAID:"
    assert chat_session(template="llava_v1").template == data.TEMPLATES["llava_v1"]
    with pytest.raises(ValueError, match="no template 'v1'; there are .*llava_v1"):
        chat_session(template="v1")
    (tmp_path / "t.json").write_text('{"templates": {"a": {"roles": ["one"]}}}')
    with pytest.raises(ValueError, match=r"t\.json: not conversation templates"):
        chat_session(templates=tmp_path / "t.json")


# ---- Chat: boxes and masks

def pointing_model(system, tokenizer):
    """A random model of a system's parts, small. NExT-Chat's puts its boxes inside the picture."""
    base = M.PRESETS[{"nextchat": "nextchat-7b-336", "chatterbox": "chatterbox-13b", "omni": "omni-7b"}[system]]
    n = data.Tokenizer(tokenizer).sp.get_piece_size()
    llm = M.LLMConfig(dim=32, n_layer=2, n_head=2, n_kv_head=2, mlp_dim=64, vocab_size=n + len(base.added_tokens), max_len=512)
    torch.manual_seed(1)
    model = M.Model(M.replace(
        base, llm=llm, clip=CLIPConfig(image_size=56, patch_size=14, dim=32, n_layer=12, n_head=2, mlp_dim=64),
        sam=base.sam and SAMConfig(image_size=64, patch_size=16, dim=32, n_layer=2, n_head=2, mlp_dim=64, window=2,
                                   global_layers=(1,), prompt_dim=32, dec_head=2, dec_mlp_dim=64, iou_dim=32),
        region=base.region and locate.RegionConfig(dim=32, out_dim=32, box_dim=16, groups=4, pool=2),
        locator=base.locator and locate.LocatorConfig(SwinConfig(dim=16, depths=(1, 1, 1, 1), n_head=(1, 1, 2, 2), window=4),
                                                      dim=32, n_encoder=1, n_decoder=1, n_head=4, mlp_dim=64, n_query=9),
        imagebind=base.imagebind and M.TINY.imagebind,
        projections={name: M.replace(proj, llm_dim=32, n_query=3, out_dim=8, dim=16, n_layer=1, mlp_dim=16)
                     for name, proj in base.projections.items()},
        added_tokens={name: n + i for i, name in enumerate(base.added_tokens)},
        media=(M.TINY.media if base.imagebind else {}) | base.media | {"image_size": 56} | {
            key: n for key, n in (("sam_size", 64), ("det_size", 96), ("clip_size", 64)) if key in base.media}))
    if system == "nextchat":
        with torch.no_grad():
            model.writers["at"].loc_decoder[-1].bias.copy_(torch.tensor([0.3, 0.4, 0.6, 0.7]))
    return model


@pytest.fixture(scope="session")
def pointing(world, tmp_path_factory):
    """Weights folders of small random models, by system, and a picture that is no square."""
    out = tmp_path_factory.mktemp("pointing")
    for system in ("nextchat", "chatterbox"):
        M.save(pointing_model(system, world / "tokenizer.model"), out / system, [world / "tokenizer.model"])
    data.Image.fromarray(image(40, 90, 3)).save(out / "wide.png")
    return out


def pointing_session(pointing, system, says="", **settings):
    """A session; `says`: what its model answers to anything. The id behind `<at>` is never `<boxes>`, which must not matter."""
    session = chat.open_session(pointing / system, "cpu", **{"max_new_tokens": 12, **settings})
    if says:
        make_say(session, says)
    return session


def make_say(session, text):
    """Make the model of a session or Asker answer anything with a text."""
    ids = [*session.tok.encode(text, bos=False, parse_special=True), 2]
    script = itertools.cycle([7 if id == session.tok.special.get("<boxes>") else id for id in ids])
    one_hot = torch.nn.functional.one_hot
    session.model.llm.lm_head.register_forward_hook(
        lambda module, args, out: one_hot(torch.tensor([next(script)]), out.shape[-1]).to(out))


HERE_IT_IS = "the <at> <boxes> , on <at> <boxes> ."


def without_cache(session):
    """The ids and keys of the last turn, and the same made again with nothing in the cache."""
    kept = session.last().ids, session.cache.k[:, :, :, :session.cache.pos].clone()
    session.held = []
    "".join(session.retry())
    assert session.last().reused == 0
    return kept, (session.last().ids, session.cache.k[:, :, :, :session.cache.pos])


def test_chat_boxes_go_in_and_out(pointing):
    session, px = pointing_session(pointing, "nextchat", HERE_IT_IS), (10.0, 5.0, 50.0, 30.0)
    text, boxes, masks, picture = session.ask("what is [0] ?", str(pointing / "wide.png"), [px])
    turn, special = session.last(), session.tok.special
    (_, at), (given, place) = session.prompt([turn])[1]
    frame = (torch.tensor(px) + torch.tensor([0, 25, 0, 25])) / 90
    assert given is turn.given[0] and torch.allclose(given.tensor, frame) and place > at
    assert text == "the {} , on {} .".format(*map(chat.spell, turn.found))
    assert masks.shape == (2, 40, 90) and masks.dtype == bool
    for box, found in zip(boxes, turn.found):
        assert torch.allclose(torch.tensor(box).double(), found.tensor.double() * 90 - torch.tensor([0, 25, 0, 25]))
    assert picture.size == (90, 40) and picture.tobytes() != data.read_image(pointing / "wide.png").tobytes()
    assert [turn.ids[i + 1] for i, id in enumerate(turn.ids) if id == special["<at>"]] == [special["<boxes>"]] * 2


def test_chat_asks_about_pictures_and_pixels(pointing):
    picture = data.Image.open(pointing / "wide.png")
    text, boxes, *_ = pointing_session(pointing, "nextchat", HERE_IT_IS).ask("what is it ?", str(pointing / "wide.png"))
    for given in (pointing / "wide.png", picture, np.asarray(picture.convert("RGB"))):
        session = pointing_session(pointing, "nextchat", HERE_IT_IS)
        assert session.ask("what is it ?", given)[:2] == (text, boxes) and session.ask("and ?")[3].size == picture.size


def test_chat_beams_find_what_beam_search_does(pointing):
    session = pointing_session(pointing, "nextchat", beams=3)
    for text in ("what is it ?", "and then ?"):
        session.ask(text, str(pointing / "wide.png") if not session.turns else None)
        turn, hidden = session.last(), []
        ids, slots = session.prompt(session.turns)
        want = M.beam_search(session.model, session.embed(ids, slots, 0), n_beam=3, max_new_tokens=12, hidden=hidden)
        assert len(turn.ids) == len(want) and all(a == b or before == session.tok.special["<at>"]
                                                  for before, a, b in zip([0, *want], want, turn.ids))
    session.set("beams", 1)
    assert session.ask("and ?") and session.last().reused == 0
    with pytest.raises(ValueError, match="beams is a number from 1 to 16"):
        session.set("beams", 0)


def test_chat_pictures_with_regions_are_encoded_once(pointing):
    session, calls = pointing_session(pointing, "chatterbox"), []
    session.model.readers["clip"].tower.patch.register_forward_hook(lambda *args: calls.append(1))
    session.ask("what is [0] or [1] ?", str(pointing / "wide.png"), [(10, 5, 50, 30), (1, 2, 3, 4)])
    "".join(session.say("and [0] ?", boxes=[(4, 5, 50, 30)]))
    assert len(calls) == 1


def test_model_save_loses_nothing_that_lay_there(tmp_path):
    model = M.load(HERE / "weights/tiny")
    (tmp_path / "w/painters/image").mkdir(parents=True)
    (tmp_path / "w/painters/image/a.txt").write_text("a")
    for config in "", '{"model_type": "llama"}':                # somebody's folder of a model, too
        (tmp_path / "w/config.json").write_text(config)
        with pytest.raises(ValueError, match="would be lost"):
            M.save(model, tmp_path / "w")
    (tmp_path / "w/config.json").write_text('{"format_version": 1}')
    (tmp_path / "link").symlink_to(tmp_path / "w")
    M.save(model, tmp_path / "link")
    assert (tmp_path / "w/painters/image/a.txt").read_text() == "a" and M.load(tmp_path / "w") and (tmp_path / "link").is_symlink()
    M.fuse(model)
    with pytest.raises(ValueError, match="fused"):
        M.save(model, tmp_path / "w")


def test_model_that_has_spoken_may_learn():
    model = M.load(HERE / "weights/tiny", dtype=torch.float32)
    x = model.llm.embed(torch.tensor([[1, 5, 7]]))
    list(M.generate(model, x.detach(), max_new_tokens=2))
    assert M.beam_search(model, x.detach(), max_new_tokens=0) == []
    model.llm(x).sum().backward()


def test_model_regions_and_pictures_are_encoded_at_once(pointing):
    model, calls = M.load(pointing / "chatterbox"), []
    model.readers["clip"].tower.patch.register_forward_hook(lambda *args: calls.append(1))
    pictures, boxes = torch.randn(2, 3, 56, 56), torch.tensor([[0.1, 0.2, 0.6, 0.7]])
    media = {"image": pictures, "region": {"image": pictures, "boxes": boxes, "image_of": torch.tensor([1])}}
    n = model.cfg.clip.n_patch
    slots = {"image": torch.stack([torch.arange(2).repeat_interleave(n), torch.arange(n).repeat(2)]), "region": torch.tensor([[1], [n]])}
    x = model.embed(torch.zeros(2, n + 1, dtype=torch.long), media, slots)
    assert len(calls) == 1 and torch.allclose(x[:, :n], model.read("image", pictures))
    biases = [m.offsets.bias.clone() for m in model.modules() if isinstance(m, locate.DeformableAttention)]
    M.initialise(model)
    fresh = [m.offsets.bias for m in model.modules() if isinstance(m, locate.DeformableAttention)]
    assert len(fresh) and all(torch.equal(a, b) and b.any() for a, b in zip(biases, fresh))


def test_chat_masks_go_to_the_boxes_they_were_made_for(world, pointing, tmp_path, monkeypatch):
    """A model with both writers: the box that was looked for has no mask, those that it pointed at have theirs."""
    monkeypatch.setattr(chat, "MIN_SCORE", 0)
    M.save(pointing_model("omni", world / "tokenizer.model"), tmp_path / "omni", [world / "tokenizer.model"])
    session = pointing_session(tmp_path, "omni", HERE_IT_IS)
    "".join(session.say("where is it ?", [session.read(str(pointing / "wide.png"))], find=True))
    looked, *pointed = session.last().found
    assert looked.mask is None and len(pointed) == 2 and all(box.mask.shape == (40, 90) for box in pointed)


def test_chat_boxes_and_regions_have_a_reader_each(pointing, world, tmp_path):
    M.save(pointing_model("omni", world / "tokenizer.model"), tmp_path / "omni", [world / "tokenizer.model"])
    session, picture, corners = pointing_session(tmp_path, "omni"), str(pointing / "wide.png"), (10, 5, 50, 30)
    session.pending = [session.read(picture)]
    session.boxes = [session.box(corners, session.pending[0], kind) for kind in ("", "region")]
    "".join(session.say("what is [0] and [1] ?"))
    given = session.last().given
    assert [box.kind for box in given] == ["box", "region"] and not torch.equal(*map(session.encode, given))
    session.save(tmp_path / "s.json"), session.load(tmp_path / "s.json")
    for old, new in zip(given, session.last().given, strict=True):
        assert new.kind == old.kind and torch.equal(new.tensor, old.tensor)


def test_chat_boxes_of_an_answer_are_reused(pointing):
    session = pointing_session(pointing, "nextchat", HERE_IT_IS)
    session.ask("what is [0] ?", str(pointing / "wide.png"), [(10, 5, 50, 30)])
    first, held = session.last(), session.held
    assert [part for part in held if isinstance(part, data.Box)] == [first.given[0], *first.found]
    "".join(session.say("and [1] ?"))                           # names a box of the answer
    assert session.last().reused == len(held) and session.last().given == first.found
    assert dict(session.prompt(session.turns)[1]).keys() == {*first.media, *first.given, *first.found}
    (ids, keys), (ids_anew, keys_anew) = without_cache(session)
    assert ids == ids_anew and (keys - keys_anew).abs().max() <= PARITY * keys.abs().max()  # fed back as it is read again


def test_chat_boxes_of_a_random_answer(pointing):
    session = pointing_session(pointing, "nextchat")
    for text in ("what is [0] ?", "and now?", "where?"):
        session.boxes = [session.box((10, 5, 50, 30), session.read(str(pointing / "wide.png")))] * ("[" in text)
        "".join(session.say(text))
        (ids, keys), (ids_anew, keys_anew) = without_cache(session)
        assert ids == ids_anew and (keys - keys_anew).abs().max() <= PARITY * keys.abs().max()


def test_chat_finds_a_box_to_ask_about(pointing, monkeypatch):
    monkeypatch.setattr(chat, "MIN_SCORE", 0)
    session = pointing_session(pointing, "chatterbox")
    signal, region = session.tok.special["[VG]"], session.tok.special["<bbox>"]
    "".join(session.say("hello", [session.read(str(pointing / "wide.png"))]))
    "".join(session.say("where is it?", find=True))
    turn = session.last()
    (x1, y1, x2, y2), = turn.boxes
    want = turn.found[0].tensor.double() * torch.tensor([90, 40, 90, 40])                   # stretched, no square
    assert turn.prompt.count(signal) == 1 and 0 < turn.reused < turn.prompt.index(signal) and 0 < turn.score < 1
    assert torch.allclose(torch.tensor([x1, y1, x2, y2]).double(), want) and turn.masks is None
    "".join(session.retry())
    assert session.last().boxes == turn.boxes and session.last().score == pytest.approx(turn.score)
    "".join(session.say("what is [0] ?"))
    turn, (_, (box, at)) = session.last(), session.prompt(session.turns)[1]
    assert signal not in turn.prompt and turn.prompt[at] == region and box is session.turns[1].found[0]
    assert session.features[box].shape == (1, 32) and turn.reused > 0
    (ids, keys), (ids_anew, keys_anew) = without_cache(session)
    assert ids == ids_anew and (keys - keys_anew).abs().max() <= PARITY * keys.abs().max()
    "".join(session.say("and [0] ?"))
    assert session.last().given == [box]
    "".join(session.say("and now?"))
    assert region not in session.last().prompt                  # regions of earlier rounds are forgotten


def test_chat_search_reads_the_state_before_its_token(pointing):
    session = pointing_session(pointing, "chatterbox")
    picture = session.read(str(pointing / "wide.png"))
    "".join(session.say("where is it?", [picture], find=True))
    turn, (slot,) = session.last(), session.prompt(session.turns)[1]
    at, model = turn.prompt.index(session.tok.special["[VG]"]), session.model
    with torch.inference_mode():
        h = model.llm(session.embed(turn.prompt[:at], [slot], 0))[:, -1]
        boxes, score = model.writers["vg"].write(h, model, picture.det[None])
    assert score.item() == pytest.approx(turn.score, rel=1e-4) and (not turn.found or torch.allclose(boxes[0], turn.found[0].tensor, atol=1e-5))


def test_chat_boxes_are_saved(pointing, tmp_path):
    session, other = (pointing_session(pointing, "nextchat", HERE_IT_IS) for _ in range(2))
    session.ask("what is [0] ?", str(pointing / "wide.png"), [(10, 5, 50, 30)])
    session.save(tmp_path / "talk.json")
    other.load(tmp_path / "talk.json")
    for one in (session, other):
        "".join(one.say("and [0] ?"))
    assert session.last().prompt == other.last().prompt and session.last().ids == other.last().ids
    row = json.loads((tmp_path / "talk.json").read_text())
    for bad in ([[0.5]], [["a"] * 4], 3, [None], [[1] * 5], {"a": 1}):
        row["turns"][0]["found"] = bad
        (tmp_path / "bad.json").write_text(json.dumps(row))
        with pytest.raises(ValueError, match="not a saved conversation"):
            other.load(tmp_path / "bad.json")


def test_chat_saved_boxes_are_words_to_a_model_without_boxes(pointing, tmp_path):
    session, plain = pointing_session(pointing, "nextchat", HERE_IT_IS), chat_session()
    plain.box_kinds = []
    session.ask("what is [0] ?", str(pointing / "wide.png"), [(10, 5, 50, 30)])
    session.save(tmp_path / "talk.json")
    plain.load(tmp_path / "talk.json")
    assert plain.ask("and now?") and plain.turns[0].answer == session.turns[0].answer


def test_chat_boxes_without_a_place_are_refused(pointing):
    session, other = pointing_session(pointing, "nextchat"), pointing_session(pointing, "chatterbox")
    plain = chat_session()
    picture = session.read(str(pointing / "wide.png"))
    for one, words, options in ((session, "needs a picture", dict(boxes=[(1, 1, 2, 2)])),
                                (session, "outside its picture", dict(boxes=[(1, 1, 200, 2)], media=[picture])),
                                (session, "outside its picture of 90x40", dict(boxes=[(-5, 1, 9, 2)], media=[picture])),
                                (session, "four finite numbers", dict(boxes=[(1, 1)], media=[picture])),
                                (session, "no box 2; boxes", dict(boxes=[(1, 1, 5, 5)], media=[picture])),
                                (session, "does not look for boxes", dict(find=True)), (other, "needs a picture", dict(find=True))):
        with pytest.raises(ValueError, match=words):
            "".join(one.say("what is [0, 2] ?", **options))
        assert not one.turns
    if "box" not in plain.model.cfg.reads:
        with pytest.raises(ValueError, match="reads no boxes"):
            plain.say("what is it?", boxes=[(1, 1, 2, 2)])


BOX_LINES = ["", "1", "1 2 3", "1 2 3 4 5", "a b c d", "nan 1 2 3", "1 1 inf 3", "5 5 1 1", "-9 0 5 5", "0 0 91 42", "1e99 0 0 0",
             "0x1 0 5 5", "[1, 2, 3", "1 2 3 \x1b[31m", "\u0661 \u0662 \u0663", "#1", "__import__('os')", "1;2;3;4", "1 2 3 4 " * 99]


def test_chat_box_lines(pointing, tmp_path, capsys, monkeypatch):
    session = pointing_session(pointing, "nextchat", HERE_IT_IS)
    monkeypatch.setattr(chat, "open_session", lambda *args, **options: session)
    lines = [f"/image {pointing / 'wide.png'}", *(f"/box {line}" for line in BOX_LINES), "/find it", "/box [10, 5, 50, 30]", "/box 1 2 3 4",
             "what is [1] ?", "[0]?"]
    monkeypatch.setattr(sys, "argv", ["chat.py", str(pointing / "nextchat"), "--device", "cpu", "--max-new-tokens", "8", "--json",
                                      "--out", str(tmp_path / "found")])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))
    assert chat.main(chat.parse_args()) == 0
    out, err = capsys.readouterr()
    first, second, *rows = out.splitlines()
    rows = [json.loads(row) for row in rows]
    assert [first, second] == ["[0] is [10, 5, 50, 30]", "[1] is [1, 2, 3, 4]"] and "Traceback" not in err and "\x1b" not in err
    assert len(rows) == 2 and len(err.splitlines()) == 1 + len(BOX_LINES) + 1 + 2 * 3, err
    for i, row in enumerate(rows, 1):
        assert len(row["boxes"]) == len(row["masks"]) > 0
        assert [datasets.rle_mask(rle).shape for rle in row["masks"]] == [(40, 90)] * len(row["boxes"])
        mask = np.array(data.Image.open(tmp_path / f"found/turn-{i:04}-mask-0.png"))
        assert (mask.astype(bool) == datasets.rle_mask(row["masks"][0])).all()
        assert data.Image.open(tmp_path / f"found/turn-{i:04}.png").size == (90, 40)
        assert "box 0: [" in err and " of 90x40" in err


def test_chat_one_shot_with_a_box(pointing, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    for system, flags in (("nextchat", ["--box", "10", "5", "50", "30"]), ("chatterbox", ["--find"])):
        words = ["-p", "what is [0] ?", "--image", str(pointing / "wide.png"), "--json", *flags]
        monkeypatch.setattr(sys, "argv", ["chat.py", str(pointing / system), "--device", "cpu", "--max-new-tokens", "8", *words])
        assert chat.main(chat.parse_args()) == 0
        out, err = capsys.readouterr()
        row = json.loads(out)
        assert row["prompt"] == "what is [0] ?" and (row["score"] is not None) == ("score" in err) == (system == "chatterbox")


def test_chat_overlay_draws_any_box(pointing):
    picture = data.Medium("image", str(pointing / "wide.png"), size=(90, 40))
    for px in ((1, 2, 30, 20), (30, 20, 1, 2), (-5e9, -1, 1e9, 99), (float("nan"),) * 4, (float("inf"), 0, -float("inf"), 1), (89, 39, 89, 39)):
        turn = chat.Turn("", [], found=[data.Box(px, mask=np.ones((40, 90), bool))] * 7, picture=picture)
        assert chat.overlay(turn).size == (90, 40) and chat.spell(turn.found[0]).count(",") == 3
    shown = np.array(chat.overlay(chat.Turn("", [], found=[data.Box((0, 0, 0, 0), np.ones((40, 90), bool))], picture=picture)), int)
    half = (np.array(data.read_image(picture.path), int) + [0xF7, 0x65, 0x66]) / 2
    assert (abs(shown - half)[:, 40:] <= 2).all()


# ---- Web

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or ""         # a browser for the test of the page


@pytest.fixture(scope="module")
def web():
    pytest.importorskip("gradio.routes")
    return importlib.import_module("web")


@pytest.fixture(scope="module")
def page(web, tmp_path_factory):
    """The page of weights/tiny at a port of this machine -> port, folder."""
    folder = tmp_path_factory.mktemp("page").resolve()
    (folder / "link.png").symlink_to("/etc/passwd")
    blocks = web.serve(chat_session(max_new_tokens=60), folder)
    yield blocks.server_port, folder
    blocks.close()


def raw_request(port, method, path, headers, body=b""):
    """What a server answers to a request of our making -> status, all bytes."""
    head = {"Host": f"127.0.0.1:{port}", "Connection": "close"} | headers
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in head.items() if value is not None), "", ""]
    with socket.create_connection(("127.0.0.1", port), timeout=30) as s:
        s.sendall("\r\n".join(lines).encode() + body)
        answer = b"".join(iter(partial(s.recv, 1 << 16), b""))
    return int(answer.split()[1]), answer


FILE, JOIN, UPLOAD = (f"/gradio_api/{name}" for name in ("file=", "queue/join", "upload"))
PATH_IN = '{{"data": [[{{"path": {}, "meta": {{"_type": "gradio.FileData"}}}}]], "fn_index": 12, "session_hash": "a"}}'.format
HOSTILE = [                             # status, method, path, headers, body; FOLDER and PORT are filled in
    *((403, "GET", "/", {"Host": host}) for host in
      ("evil.example", "127.0.0.1.evil.example", "127.0.0.1@evil.example", "evil.example:PORT", "0.0.0.0:PORT", "")),
    *((403, "GET", "/config", {"Origin": origin}) for origin in
      ("http://evil.example", "null", "https://127.0.0.1:PORT", "http://localhost:PORT", "http://127.0.0.1:1")),
    (403, "POST", JOIN, {"Origin": "http://evil.example"}, b"{}"),
    *((403, "GET", FILE + name, {}) for name in
      ("/etc/passwd", "FOLDER/link.png", "FOLDER", "FOLDER/nothing.png", "/proc/self/environ", str(HERE / "web.py"), "%00", "~/.ssh/id_rsa",
       "http://127.0.0.1:PORT/", "file:///etc/passwd", str(HERE / "weights/tiny/config.json"), "/etc/passwd%00.png")),
    *((404, "GET", path, {}) for path in
      (FILE + "FOLDER/../../../../etc/passwd", FILE + "%2e%2e/%2e%2e/etc/passwd", FILE + "..%5c..%5cetc", FILE, "/assets/../../etc/passwd",
       "/static/%2e%2e/%2e%2e/routes.py", "/login", "/monitoring", "/docs", "/gradio_api/proxy=http://evil.example/",
       "/gradio_api/stream/a/b/1/playlist.m3u8", "//evil.example/")),
    *((404, "POST", path, {"Content-Length": "2"}, b"{}") for path in
      ("/", "/gradio_api/run/predict", "/gradio_api/call/say", "/gradio_api/vibe-edit", "/gradio_api/component_server")),
    *((405, method, "/", {}) for method in ("PUT", "DELETE", "TRACE", "PATCH")),
    (411, "POST", JOIN, {}), (411, "POST", UPLOAD, {"Transfer-Encoding": "chunked"}, b"0\r\n\r\n"),
    (413, "POST", UPLOAD, {"Content-Length": str(1 << 40)}), (413, "POST", JOIN, {"Content-Length": str(2 << 20)}),
    *((400, "POST", JOIN, {}, body) for body in (b"{", b"\xff", b"[" * 200000)),
    *((403, "POST", JOIN, {}, PATH_IN(json.dumps(name)).encode()) for name in
      ("/etc/passwd", "http://127.0.0.1:PORT/", "FOLDER/../x", "FOLDER", "FOLDER/link.png", 7, None, ["/etc/passwd"])),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", HOSTILE, ids=lambda case: f"{case[1]} {case[2][:50]} {[*case[3].items()]}"[:90])
def test_web_refuses_hostile_requests(page, case):
    port, folder = page
    status, method, path, headers, body = *case, *[b""] * (5 - len(case))
    path, body = path.replace("FOLDER", str(folder)), body.replace(b"FOLDER", str(folder).encode())
    headers = {name: value.replace("PORT", str(port)) for name, value in headers.items()}
    if body and "Transfer-Encoding" not in headers:
        headers.setdefault("Content-Length", str(len(body)))
    got, answer = raw_request(port, method, path.replace("PORT", str(port)), headers, body)
    assert got == status and b"root:" not in answer and b"evil" not in answer
    assert raw_request(port, "GET", "/", {})[0] == 200


@pytest.mark.slow
def test_web_uploads_reach_their_folder_only(page):
    port, folder = page
    part = '--x\r\nContent-Disposition: form-data; name="files"; filename="../../{}"\r\n\r\n<script>\r\n--x--\r\n'.format
    for name in ("evil.html", "..%2f..%2fevil.svg", "a" * 300 + ".png"):
        body = part(name).encode()
        headers = {"Content-Type": "multipart/form-data; boundary=x", "Content-Length": len(body)}
        status, answer = raw_request(port, "POST", UPLOAD, headers, body)
        (path,) = json.loads(answer.partition(b"\r\n\r\n")[2])
        assert status == 200 and folder in Path(path).resolve().parents
    status, answer = raw_request(port, "GET", FILE + path, {})
    assert status == 200 and b"nosniff" in answer and b"default-src 'self'" in answer
    assert not [p for p in folder.parent.glob("evil*")]


def visit_of(web, session, folder):
    for name, _, _ in shapes.MEDIA.values():
        (folder / name).mkdir(exist_ok=True)
    return web.Visit(session, folder)


def test_web_shows_what_a_turn_found(web, pointing, world, tmp_path):
    visit = visit_of(web, pointing_session(pointing, "nextchat", HERE_IT_IS), tmp_path)
    _, picture, note, _ = web.attach(visit, [str(world / "pictures/000000.png")])
    assert picture.size == (shapes.SIDE, shapes.SIDE) and not note
    web.click(visit, Thing(index=(90, 80)))
    assert "[0] is [10, 20, 90, 80]" in web.click(visit, Thing(index=(10, 20)))[2]
    *_, (messages, _, note, _) = web.say(visit, "Where is <b>[0]</b>?", False)
    texts = [m["content"] for m in messages if isinstance(m["content"], str)]
    files = [Path(m["content"]["path"]) for m in messages if not isinstance(m["content"], str)]
    assert texts[0] == "Where is &lt;b&gt;[0]&lt;/b&gt;?" and len(texts) == 2 and not note and not visit.session.boxes
    assert [p.parent for p in files] == [world / "pictures", tmp_path] and len([*tmp_path.glob("turn-*-mask-*")]) == 2


def test_web_plays_what_was_drawn(web, tmp_path):
    shapes_of = {"img": (8, 9, 3), "vid": (4, 8, 9, 3)}
    drawn = [chat.Drawing(kind, np.zeros(shape, np.uint8)) for kind, shape in shapes_of.items()]
    turn, visit = chat.Turn("Draw.", [], drawn=[*drawn, chat.Drawing("aud", np.zeros(800), 8000)]), visit_of(web, chat_session(), tmp_path)
    visit.keep(turn)
    files = [m["content"]["path"] for m in visit.messages([turn]) if isinstance(m["content"], dict)]
    assert [Path(f).suffix[1:] for f in files] == ["png", turn.drawn[1].ending, "wav"] and all(map(data.sniff, files))


def test_web_examples_can_be_sent(web, tmp_path):
    visit = visit_of(web, chat_session(), tmp_path)
    for ability, (need, *_) in web.ABILITIES.items():
        if need in ("image", "video", "audio", "box"):
            text = web.example(visit, ability)[3]
            *_, (messages, _, note, left) = web.say(visit, text, False)
            assert messages[-2]["content"] == text and messages[-1]["content"] and not note
    assert len(visit.session.turns) == 5 and web.undo(visit)[2].startswith("taken back") and not web.clear(visit)[0]


def test_web_stop_keeps_what_was_said(web, tmp_path):
    visit = visit_of(web, chat_session(), tmp_path)
    views = web.say(visit, "hello", False)
    next(views), next(views)
    web.stop(visit)
    *_, (messages, _, note, _) = views
    assert note == "stopped" and 1 <= len(visit.session.turns[0].ids) < 10 and messages[1]["content"]


def test_web_every_event_goes_through_the_queue(web, tmp_path):
    """The guard lets no other call in; a browser's stop was one."""
    assert all(event.queue for event in web.build(chat_session(), tmp_path).fns.values())


def test_web_names_a_port_in_use(web, page, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["web.py", "--port", str(page[0])])
    with pytest.raises(SystemExit):
        data.program(web.main)
    assert re.fullmatch(rf"web: .*in use.* {page[0]}\)+\n", capsys.readouterr().err)


@pytest.mark.slow
def test_web_takes_its_folder_away(web, tmp_path):
    with subprocess.Popen([sys.executable, HERE / "web.py", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env=os.environ | {"TMPDIR": str(tmp_path)}, text=True) as server:
        assert "Ctrl-C ends" in server.stdout.readline() and [*tmp_path.glob("nanomni-*")]
        server.terminate()
        assert server.wait(60) in (0, 130) and not [*tmp_path.glob("nanomni-*")]


def test_web_names_a_template_that_is_none(web, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["web.py", "--port=0", "--template=none"]), monkeypatch.setattr(web.signal, "signal", lambda *args: None)
    with pytest.raises(SystemExit):
        data.program(web.main)
    assert capsys.readouterr().err.startswith("web: no template 'none'; there are tiny, ")


def test_web_names_a_port_that_is_none(web, monkeypatch, capsys):
    for port in ("-1", "65536", "http"):
        monkeypatch.setattr(sys, "argv", ["web.py", f"--port={port}"])
        with pytest.raises(SystemExit):
            web.main()
        assert f"--port: invalid port value: '{port}'" in capsys.readouterr().err


def test_web_says_nothing_without_words(web, tmp_path, chat_files):
    visit = visit_of(web, chat_session(), tmp_path)
    web.attach(visit, chat_files[:1])
    for views, words in ((web.say(visit, " ", False), "needs words"), (web.retry(visit), "nothing was said")):
        *_, (messages, picture, note, _) = views                # without a view, Gradio would empty the page
        assert words in note and len(messages) == 1 and picture and not visit.session.turns


def test_web_corners_belong_to_a_picture(web, tmp_path):
    visit = visit_of(web, chat_session(), tmp_path)
    for corner in (5, 30):
        web.example(visit, "describe")
        assert "opposite corner" in web.click(visit, Thing(index=(corner, corner)))[2] and not visit.session.boxes
    assert "[0] is [20, 10, 30, 30]" in web.click(visit, Thing(index=(20, 10)))[2]


def test_web_undo_takes_back_what_waits_first(web, tmp_path):
    visit = visit_of(web, chat_session(), tmp_path)
    [*web.say(visit, "hello", False)], web.example(visit, "name a box")
    notes = [web.undo(visit)[2] for _ in range(4)]
    assert re.fullmatch(r"taken back: \[.*\]; taken back: .*\.png; taken back: hello; nothing was said yet", "; ".join(notes))
    assert not visit.session.boxes and not visit.session.pending and not visit.session.turns


def test_web_search_without_a_picture_becomes_a_note(web, pointing, tmp_path):
    *_, (_, _, note, text) = web.say(visit_of(web, pointing_session(pointing, "chatterbox"), tmp_path), "where is it ?", True)
    assert "needs a picture" in note and text == "where is it ?"


def test_web_faults_become_notes(web, tmp_path, chat_files):
    visit = visit_of(web, chat_session(), tmp_path)
    assert "not readable" in web.attach(visit, [chat_files[0], chat_files[3]])[2] and not visit.session.pending
    assert "at most" in web.attach(visit, [chat_files[0]] * 21)[2]
    assert "nothing was said" in web.undo(visit)[2]
    for temperature, words in ((-1, "a number from"), (None, "a number from"), (0.5, "")):
        *_, (_, _, note, text) = web.say(visit, "hello", False, temperature)
        assert words in note and (text == "hello") == bool(words)
    assert visit.session.settings["temperature"] == 0.5 and not web.clear(visit)[0]
    *_, (messages, _, note, text) = web.say(visit, "long " * 2000, False)
    assert "shorten it" in note and text.startswith("long") and messages == []


SHOWN = {"point": "img", "draw": "img", "film": "video", "play": "button[aria-label*=lay]"}      # beside the text, by button


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no chromium on the path, and CHROMIUM names none")
def test_web_page_in_a_browser(page, web, tmp_path):
    """Every ability of weights/tiny by its button, then an upload, a box by two clicks, and HTML that must stay text. Pictures
    of the page are kept in the test's folder."""
    with pytest.importorskip("playwright.sync_api").sync_playwright() as play:
        tab = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]).new_page()
        tab.set_default_timeout(60000)
        seen, faults = [], []
        tab.on("request", lambda request: seen.append(request.url))
        tab.on("console", lambda message: message.type == "error" and faults.append(message.text))
        tab.goto(f"http://127.0.0.1:{page[0]}/")
        text, said = tab.locator("#message textarea"), tab.locator(".bot .message-content, .bot.message")
        for name in (name for name in web.ABILITIES if name not in ("find", "name a region")):
            tab.get_by_role("button", name=name, exact=True).click()
            tab.wait_for_function("document.querySelector('#message textarea').value")
            text.press("Enter")
            said.nth(0).wait_for()
            if name in SHOWN:
                tab.locator(f".bot {SHOWN[name]}").nth(0).wait_for()
                assert not any(share.is_visible() for share in tab.get_by_label("Share").all())
            tab.screenshot(path=tmp_path / f"{name}.png")
            tab.get_by_role("button", name="clear", exact=True).click()
            said.nth(0).wait_for(state="detached")
        tab.locator("input[type=file]").first.set_input_files(page[1] / shapes.write_medium(("image", 7, 1, page[1])).name)
        for place in (20, 90):
            tab.locator("#picture img").click(position={"x": place, "y": place})
            tab.wait_for_function("document.querySelector('#note textarea').value")
        tab.wait_for_function("document.querySelector('#note textarea').value.startsWith('[0] is')")
        turned = "[...document.images].filter(one => getComputedStyle(one).imageOrientation != 'none').length"
        assert tab.locator(".user img").count() and not tab.evaluate(turned)    # as models see a photo that lies on its side
        tab.screenshot(path=tmp_path / "two clicks.png")
        text.fill("<img src=x onerror=alert(1)><b>bold</b>")
        text.press("Enter")
        tab.get_by_text("<b>bold</b>").wait_for()
        tab.get_by_role("button", name="Clear", exact=True).click()             # the bin
        said.nth(0).wait_for(state="detached")
        tab.get_by_text("settings").click()
        tab.get_by_label("max_new_tokens").first.fill("1")      # without Enter
        text.fill("hello")
        text.press("Enter")
        tab.wait_for_function("document.querySelector('.bot')?.innerText.trim().match(/^[a-z]+$/i)")
        assert not faults and all(url.startswith((f"http://127.0.0.1:{page[0]}/", "data:", "blob:")) for url in seen)


# ---- Drawing

@pytest.fixture(scope="session")
def drawing(tmp_path_factory):
    """Weights folder of a small random model with signal tokens, and random painters in it."""
    out, tokenizer = tmp_path_factory.mktemp("drawing"), CHAT_WEIGHTS / "tokenizer.model"
    torch.manual_seed(0)
    M.save(train.new_model("tiny", tokenizer).half(), out / "plain", [tokenizer])
    for kind, cfg in paint.PAINTERS.items():
        cfg = replace(cfg, text=replace(cfg.text, vocab_size=data.Tokenizer(tokenizer).sp.vocab_size()), steps=2)
        M.save(G.Painter(cfg).half(), out / "painters" / kind, [tokenizer])
    shutil.copytree(out / "painters/image", out / "first/image")                       # one writer, then the others
    paint.main([str(out / "plain"), "--writers", str(out / "first"), "--out", str(out / "one")])
    paint.main([str(out / "one"), "--writers", str(out / "painters"), "--out", str(out / "weights")])
    (out / "painters").rename(out / "weights/painters")
    return out


SIGNALS = {kind: "".join(tokens) for kind, tokens in data.SYSTEMS["tiny"].signals.items()}


def drawing_session(drawing, says, **settings):
    """A session with a model that answers `says` to anything."""
    session = chat.open_session(drawing / "weights", "cpu", **{"max_new_tokens": 30, **settings})
    script = itertools.cycle([*session.tok.encode(says, bos=False, parse_special=True), 2])
    session.model.llm.lm_head.register_forward_hook(
        lambda module, args, out: torch.nn.functional.one_hot(torch.tensor([next(script)]), out.shape[-1]).to(out))
    return session


def test_paint_writers_leave_all_else_as_it_was(drawing):
    old, new = (weights_of(drawing / name) for name in ("plain", "weights"))
    assert {key.split(".")[1] for key in new.keys() - old.keys()} == set(SIGNALS)
    with pytest.raises(SystemExit, match="has a writer for every painter"):
        paint.main([str(drawing / "weights"), "--writers", str(drawing / "weights/painters"), "--out", str(drawing / "none")])
    assert all(torch.equal(x, new[key][:len(x)] if key == "llm.embed.weight" else new[key]) for key, x in old.items())
    cfg = M.read_config(drawing / "weights")
    assert [cfg.added_tokens[f"[{kind.upper()}0]"] for kind in SIGNALS] == [cfg.signal(kind)[0] for kind in SIGNALS]


def test_chat_draws_what_the_answer_asks_for(drawing):
    session = drawing_session(drawing, "Here: " + "".join(SIGNALS.values()))
    assert session.ask("Draw a dog.")[0] == "Here:" and not session.turns[-1].stray
    first = session.turns[-1].drawn
    assert [(one.kind, one.content.shape) for one in first] == [("img", (32, 32, 3)), ("vid", (8, 32, 32, 3)), ("aud", (16000,))]
    "".join(session.retry())
    again = session.turns[-1].drawn
    session.set("seed", 1)
    "".join(session.retry())
    other = session.turns[-1].drawn

    def apart(one, two):                # in levels of a pixel, or thousandths of a sample; the cache may change the last digits
        return abs(one.content.astype(float) - two.content).max() * (1000 if one.kind == "aud" else 1)
    assert [apart(*pair) <= 2 for pair in zip(first, again, strict=True)] == [True] * 3
    assert [apart(*pair) > 2 for pair in zip(first, other, strict=True)] == [True] * 3


@pytest.mark.parametrize("film", ["mp4", "gif"])
def test_chat_drawings_are_files_and_named(drawing, film, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(chat, "find_spec", {"mp4": lambda _: pytest.importorskip("av"), "gif": lambda _: None}[film])
    session = drawing_session(drawing, "".join(SIGNALS.values()))
    talker = chat.Chat(session, Thing(prompt=None, pictures="off", json=True, weights="", out=tmp_path, find=False))
    talker.say("Draw a dog.")
    talker.say("Draw a cat.")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(name).name for row in rows for name in row["files"]] == [
        f"{name}-000{i}.{ending}" for i in (1, 2) for name, ending in (("picture", "png"), ("clip", film), ("sound", "wav"))]
    picture, clip, sound = rows[0]["files"]
    assert (np.array(data.read_image(picture)) == session.turns[0].drawn[0].content).all()
    assert data.read_video(clip).shape[:2] == (15, 3) and data.read_audio(sound)[0].shape == (1, 16000)


def test_chat_films_show_the_frames(tmp_path):
    pytest.importorskip("av")
    rows, columns = np.mgrid[:33, :50]                                          # odd sides; smooth, for colours are coarse
    frames = np.stack([np.stack([5 * rows, 4 * columns, 20 * i + 0 * rows], 2) for i in range(9)]).astype(np.uint8)
    name = chat.write_drawing(chat.Drawing("vid", frames, 8), tmp_path)
    with data.open_media(name, "video")[0] as film:
        stream = film.streams.video[0]
        seen = np.stack([frame.to_ndarray(format="rgb24") for frame in film.decode(stream)])
    assert stream.average_rate == 8 and seen.shape == (9, 34, 50, 3)
    assert abs(seen[:, :33].astype(float) - frames).mean() < 6


def test_chat_says_which_painter_is_missing(drawing, capsys):
    session = drawing_session(drawing, SIGNALS["img"] + "[VID0]", painters="")
    for no_draw in (False, True):
        args = Thing(prompt=None, pictures="off", json=True, weights="", out=None, find=False, no_draw=no_draw)
        chat.Chat(session, args).say("Draw a dog.")
        out, err = capsys.readouterr()
        assert ("no painter for a picture" in err) != no_draw and json.loads(out)["files"] == [] and "complete run" in err
    with pytest.raises(ValueError, match="vectors of 48 numbers, this model makes 8"):
        chat.find_painters(drawing / "weights/painters", {"img": G.ProjectionConfig(out_dim=8)})
    with pytest.raises(ValueError, match="plain: no painter"):
        M.load_painter(drawing / "plain")


def test_chat_answer_stands_when_a_painter_fails(drawing, tmp_path, capsys, monkeypatch):
    session = drawing_session(drawing, "Here: " + "".join(SIGNALS.values()))
    session.painters["vid"], args = tmp_path / "gone", Thing(prompt=None, pictures="off", json=True, weights="", out=tmp_path, find=False)
    with pytest.raises(ValueError, match="gone"):               # so that -p ends with an error, too
        chat.Chat(session, args).say("Draw a dog.")
    row, turn = json.loads(capsys.readouterr().out), session.last()
    assert row["text"] == "Here:" and "gone" in row["fault"] and len(row["files"]) == len(turn.drawn) == 1
    monkeypatch.setitem(chat.DRAW, "img", lambda *args, **how: torch.empty(10 ** 15))
    with pytest.raises(ValueError, match="out of memory"):
        session.ask("Draw a cat.")
    assert session.last().text == "Draw a cat." and session.last().answer == "Here:" and not session.cache


def test_chat_beams_prompt_painters_as_without(drawing):
    """Also where they went on behind the words that end an answer."""
    made = []
    for beams in (1, 2):
        session = drawing_session(drawing, SIGNALS["img"] + " END of it", beams=beams, painters="")
        session.template = replace(session.template, stop="END")
        session.ask("Draw a dog.")
        made.append(session.last().made["img"])
    assert (made[0] - made[1]).abs().max() < 1e-4 * made[0].abs().max()


def test_chat_finds_painters_beside_other_models(drawing, tmp_path):
    for path in (drawing / "plain", drawing / "weights/painters/image"):
        shutil.copytree(path, tmp_path / path.name)
    assert chat.find_painters(tmp_path, {}) == {"img": tmp_path / "image"}


def test_chat_interrupted_drawing_keeps_the_session(drawing, monkeypatch):
    session = drawing_session(drawing, SIGNALS["img"])
    with monkeypatch.context() as patch:
        patch.setitem(chat.DRAW, "img", lambda *args, **how: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            session.ask("Draw a dog.")
    assert [turn.text for turn in session.turns] == ["Draw a dog."]
    session.ask("Again.")
    assert len(session.turns) == 2 and session.last().drawn


@pytest.mark.slow
def test_paint_trains_judges_and_shows_every_kind(world, tmp_path, capsys):
    for name, kind in (("drawings", "image"), ("video_pairs", "video"), ("audio_pairs", "audio")):
        file, out = f"{world}/{name}.json", f"{tmp_path}/{kind}"
        paint.main([file, "--out", out, "--steps", "4", "--batch", "2", "--tokenizer", f"{world}/tokenizer.model"])
        paint.main([file, "--judge", out, "--count", "2", "--page", f"{out}.png"])
        assert "'all': " in capsys.readouterr().out and data.Image.open(f"{out}.png").height == 150
        paint.main([file, "--embed", out])
        x = datasets.read_embedding(world / "embed" / f"{paint.read_captions(file)[1][0][-1].name}.npy")
        assert x.shape == ((32,) if kind == "audio" else (20, 48))


@pytest.mark.parametrize("flag", ["--judge", "--embed", "--init"])
def test_paint_refuses_painters_of_other_media(flag, drawing, world, tmp_path):
    for file, words in (("audio_pairs", "paints no audio"), ("clips", "no caption pairs"), ("image_comprehension", "no caption pairs")):
        with pytest.raises(ValueError, match="asks for nothing|record 0" if flag == "--embed" else words):
            paint.main([f"{world}/{file}.json", flag, str(drawing / "weights/painters/image"), "--out", str(tmp_path)])


def test_paint_takes_a_tokenizer_of_any_name(world, tmp_path):
    shutil.copy(world / "tokenizer.model", tmp_path / "words.model")
    args = "--steps", "1", "--batch", "1", "--tokenizer", str(tmp_path / "words.model")
    paint.main([f"{world}/drawings.json", "--out", str(tmp_path / "a"), *args])
    assert (tmp_path / "a/tokenizer.model").exists()


def test_paint_embed_wants_a_text_tower(drawing, world, tmp_path):
    painter = M.load_painter(drawing / "weights/painters/image")
    painter.text, painter.cfg = None, replace(painter.cfg, text=None)
    M.save(painter, tmp_path / "a")
    with pytest.raises(ValueError, match="a: this painter has no text tower"):
        paint.main([f"{world}/drawings_wishes.json", "--embed", str(tmp_path / "a")])


def test_paint_goes_on_from_a_painter_whose_text_tower_stays(drawing, world, tmp_path):
    start, file = drawing / "weights/painters/image", f"{world}/drawings.json"
    paint.main([file, "--out", str(tmp_path / "a"), "--init", str(start), "--steps", "2", "--batch", "2"])
    with torch.compiler.set_stance("force_eager"):              # compiling takes minutes
        paint.main([file, "--out", str(tmp_path / "b"), "--init", str(tmp_path / "a"), "--steps", "2", "--batch", "2", "--fast"])
    states = [M.load_painter(path, dtype=torch.float32).state_dict() for path in (tmp_path / "a", tmp_path / "b")]
    same = {name for name, x in states[0].items() if torch.equal(x, states[1][name])}
    assert {name for name in states[0] if name.startswith("text.")} <= same and len(same) < 0.5 * len(states[0])


def test_paint_keeps_matrices_in_a_byte_a_number(drawing, tmp_path):
    painter = M.load_painter(drawing / "weights/painters/audio", dtype=torch.float32)
    M.save(paint.small(painter), tmp_path / "small", [])
    again = M.load_painter(tmp_path / "small", dtype=torch.float32).state_dict()
    assert (tmp_path / "small/model.safetensors").stat().st_size < 1.3 * sum(x.numel() for x in again.values())
    assert all((again[name] - x).abs().max() <= 0.0626 * x.abs().max() for name, x in painter.state_dict().items())


def test_paint_judge_needs_captions_it_does_not_know(world, tmp_path):
    with pytest.raises(SystemExit, match="none is left"):
        paint.main([f"{world}/drawings.json", "--judge", str(tmp_path), "--known", f"{world}/drawings.json"])


def test_train_wishes_teach_the_writers(drawing, world, tmp_path):
    paint.main([f"{world}/drawings_wishes.json", "--embed", str(drawing / "weights/painters/image")])
    train.main(["system=tiny", "stage=2", f"init={drawing}/weights", f"data=nextgpt:{world}/drawings_wishes.json", "batch=4",
                "micro=2", "steps=2", "workers=0", "log_every=1", "device=cpu", f"out={tmp_path}/run"])
    assert all(row["img_l2"] > 0 and row["lm"] > 0 for row in log_of(tmp_path / "run"))
    old, new = weights_of(drawing / "weights"), weights_of(tmp_path / "run/weights")
    assert {name for name in new if name.startswith("writers.img.") and torch.equal(new[name].float(), old[name].float())} == set()


# ---- Docs

OURS = {"attention": set(), "quantize": set(), "vision": {"attention"}, "locate": {"attention", "vision"}, "generate": {"attention", "vision"},
        "model": {"attention", "vision", "locate", "generate", "quantize"}, "data": set(), "datasets": {"data"}, "shapes": {"data", "datasets"},
        "convert_weights": {"model", "generate", "locate", "vision"}, "ranks": {"model"},
        "train": {"model", "data", "datasets", "ranks"},
        "evaluate": {"model", "data", "datasets", "chat"}, "chat": {"model", "generate", "data", "datasets"}, "web": {"chat", "data", "shapes"},
        "paint": {"model", "generate", "data", "datasets", "shapes", "chat"}}
README, HACKING = ((HERE / name).read_text() for name in ("README.md", "HACKING.md"))


@pytest.mark.parametrize("name", OURS)
def test_docs_imports_point_down(name):
    tree = ast.parse((HERE / f"{name}.py").read_text())
    froms = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert (froms | names) & OURS.keys() <= OURS[name]
    assert not {m for m in froms | names if m and m.split(".")[0] in ("transformers", "diffusers", "torchvision", "torchaudio")}


def test_docs_readme_commands_name_real_scripts_and_flags():
    commands = re.findall(r"^(?:.*&& )?(?:\S*/)?python3? (\w+)\.py(.*?)(?:#.*)?$", README, re.M)
    assert len(commands) >= 8
    for script, rest in commands:
        source = (HERE / f"{script}.py").read_text()
        for flag in re.findall(r"(--[a-z][\w-]*)", rest):
            assert f'"{flag}"' in source, (script, flag)
        for name in re.findall(r"(?:^|\s)(\w+)=", rest):
            assert script == "train" and name in train.Settings.__dataclass_fields__, name


def test_docs_readme_counts_keys():
    for sources, counts in re.findall(r"^python convert_weights.py (.*) --out .*# ([\d, ]+) keys$", README, re.M):
        for source, n in zip(sources.split(), counts.split(", ")):
            manifest = need(MANIFESTS, "manifests") / f"{re.split('[/.]', source)[0]}.json"
            assert not manifest.exists() or len(json.loads(manifest.read_text())) == int(n), source


def test_docs_readme_counts_parameters():
    rows = re.findall(r"^\| .*?`([\w-]+)`.* \| ([\d.]+) (B|M) \| ([\d.]+) \| `.*` \|$", README, re.M)
    assert len(rows) == 6
    for name, count, unit, size in rows:
        with torch.device("meta"):
            cfg = M.read_config(HERE / "weights/tiny") if name == "tiny" else M.PRESETS[name]
            n = sum(p.numel() for p in M.Model(cfg).parameters())
        assert f"{n / {'B': 1e9, 'M': 1e6}[unit]:.1f}" == count and abs(2 * n / 1e9 - float(size)) <= 0.05, (name, n)


@pytest.mark.parametrize("command", ("evaluate.py weights/tiny nowhere.json", "evaluate.py nowhere x.json", "chat.py nowhere -p hi",
                                     "evaluate.py review -q nowhere -a nowhere nowhere -r nowhere", "paint.py nowhere --judge weights/tiny",
                                     "train.py system=tiny stage=2 init=weights/tiny data=nowhere out={tmp}",
                                     "convert_weights.py nowhere --out {tmp}", "shapes.py --out /dev/null/nowhere"))
def test_docs_programs_tell_faults_in_a_line(command, tmp_path):
    done = subprocess.run([sys.executable, *command.format(tmp=tmp_path / "out").split()], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 2 and re.search(r"^.*nowhere.*\n\Z", done.stderr, re.M) and "Traceback" not in done.stderr


@pytest.mark.slow
def test_docs_readme_talk_is_what_the_shipped_weights_say(tmp_path):
    """The conversation of the README, said again: the same words and files, boxes to two pixels."""
    command, talk = re.search(r"^\$ python (chat\.py .*)\n((?:.*\n)+?)```", README, re.M).groups()
    asked = [line[2:] for line in talk.splitlines() if line.startswith("> ")]
    shapes.main(["--out", str(tmp_path / "unseen"), "--questions", "20"])       # the first files are those of 1000
    done = subprocess.run([sys.executable, HERE / "chat.py", *command.split()[1:]], cwd=tmp_path, text=True, input="\n".join(asked),
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0 and len(asked) >= 6, done.stdout
    said = iter(done.stdout.splitlines())
    for line in talk.splitlines():
        numbers = [int(n) for n in re.findall(r"\d+", line.partition("[")[2])]
        assert line.startswith("> ") or any(
            re.sub(r"\d+(?=[,\]])", "", line) == re.sub(r"\d+(?=[,\]])", "", other)
            and all(abs(a - int(b)) <= 2 for a, b in zip(numbers, re.findall(r"\d+", other.partition("[")[2]))) for other in said), (line, done.stdout)
        assert not re.match(r"(picture|sound|clip): ", line) or (tmp_path / line.partition(": ")[2]).stat().st_size > 500


@pytest.mark.slow
def test_docs_recipe_of_the_shipped_weights_runs(tmp_path):
    """weights/tiny/train.sh from its first to its last line, with a step instead of thousands, in a smaller world."""
    for path in HERE.glob("*.py"):
        shutil.copy(path, tmp_path)
    shutil.copytree(HERE / "weights", tmp_path / "weights")
    recipe, before = tmp_path / "weights/tiny/train.sh", (HERE / "weights/tiny/model.safetensors").read_bytes()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text(f"""#!/usr/bin/env bash
case $1 in
shapes.py) set -- "$@" --pictures 60 --clips 24 --sounds 24;;
train.py) set -- "$@" steps=1 compile=0;;
esac
case "$*" in *--questions*) set -- "$@" --questions 4;; *--steps*) set -- "${{@/--fast/--batch=16}}" --steps 1;; esac
exec {sys.executable} "$@"
""")
    (tmp_path / "bin/python").chmod(0o755)
    done = subprocess.run(["bash", recipe], cwd=tmp_path, env=os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(re.findall(r"^== \d+ s: stage=", done.stdout, re.M)) == len(re.findall(r"^learn stage", recipe.read_text(), re.M)) == 10
    assert (tmp_path / "weights/tiny/model.safetensors").read_bytes() != before and chat.open_session(tmp_path / "weights/tiny", "cpu")


def test_docs_readme_rows_name_their_tests():
    tables = re.findall(r"^\|.*\| tests \|\n\|[-|]+\n((?:\|.*\n)+)", README, re.M)
    assert len(tables) == 2
    for row in "".join(tables).splitlines():
        for word in re.search(r"`([\w ]+)` \|$", row)[1].split(" or "):
            assert any(word in name for name in globals() if name.startswith("test_")), row


@pytest.mark.slow
@pytest.mark.slow
def test_docs_recipes_make_a_system_that_trains_and_talks(world, tmp_path):
    for path in HERE.glob("*.py"):
        shutil.copy(path, tmp_path)
    blocks = re.findall(r"```python\n# (\w+\.py), below: ([^\n]+)\n(.*?)```", HACKING, re.S)
    assert len(blocks) == HACKING.count("```python") >= 5
    for name, anchor, block in blocks:
        lines = (tmp_path / name).read_text().splitlines(True)
        lines.insert(next(i for i, line in enumerate(lines, 1) if anchor in line), block)
        (tmp_path / name).write_text("".join(lines))
    rows = [{"image": str(path.relative_to(world)), "rgb": [10 * i, 20, 30]} for i, path in enumerate(sorted(world.glob("pictures/*"))[:8])]
    (tmp_path / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = re.search(r"^python (train\.py system=hues .*)$", HACKING, re.M)[1].replace("weights/tiny", str(HERE / "weights/tiny"))
    words = [*command.split(), f"media={world}", "steps=60", "batch=8", "workers=0", "log_every=1"]
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [json.loads(line)["hue_l2"] for line in (tmp_path / "runs/hues/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 60 and 0 < losses[59] < losses[0]
    command = re.search(r"^python (chat\.py runs/hues/.*)#", HACKING, re.M)[1].replace("0.png", str(world / rows[7]["image"]))
    done = subprocess.run([sys.executable, *shlex.split(command)], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "This one:\n" and re.search(r"^hue: \[\[(0\.\d+(, )?){3}\]\]$", done.stderr, re.M), done.stderr


def test_docs_readme_counts_lines_within_a_tenth():
    rows = re.findall(r"^\| `(\w+\.(?:py|c))` \| (\d+) \|", README, re.M)
    assert {name for name, _ in rows} == {p.name for kind in ("*.py", "*.c") for p in HERE.glob(kind)}
    for name, lines in rows:
        assert abs(len((HERE / name).read_text().splitlines()) - int(lines)) <= 0.1 * int(lines), name


def test_docs_ci_runs_the_command_of_the_readme():
    command = next(line for line in README.splitlines() if "bin/pytest" in line)
    assert "README.md" in (HERE / ".ci/run").read_text() and command.startswith("python3 -m venv")
