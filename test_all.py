"""Every test, in the order of the code: attention, vision, model, data, convert, train, shapes, chat, docs.

Golden tests compare with what the original code computed (folder GOLDEN_DIR, default golden/): every size, seed and case
comes from the fixtures. Vocabularies of others are found through LLAMA_TOKENIZER and CLIP_BPE.
"""
import ast
import io
import itertools
import json
import os
import pickle
import pty
import random
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace as Thing

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import attention
import chat
import convert_weights as cw
import data
import evaluate
import model as M
import shapes
import train
from vision import CLIPConfig, CLIPVision, ImageBind, ImageBindConfig, HUGE

HERE = Path(__file__).parent
GOLDEN = Path(os.environ.get("GOLDEN_DIR", HERE / "golden"))
SHARED = HERE.parent / "shared"
LLAMA_TOKENIZER = Path(os.environ.get("LLAMA_TOKENIZER", SHARED / "golden/tokenizer.model"))
CLIP_BPE = Path(os.environ.get("CLIP_BPE", SHARED / "golden/imagebind/bpe_simple_vocab_16e6.txt.gz"))
PARITY = 1e-4                           # of the output's scale: float32 sums in another order


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
    """A fixture of another system, from GOLDEN_DIR or from where all fixtures lie; skips where it is absent."""
    path = next((p for p in (GOLDEN, SHARED / "golden") if (p / f"{name}.json").exists()), None)
    return (json.loads((path / f"{name}.json").read_text()), None, None) if path else pytest.skip(f"{name}.json is absent")


def close(meta, tensors, name, got, tol=PARITY, where=None):
    """A computed tensor equals the stored (strided) one within tol of its scale (where the bool mask says so)."""
    stride, want = meta.get("stride", {}).get(name, 1), tensors[name].flatten().double()
    keep = torch.ones_like(want, dtype=torch.bool) if where is None else where.expand_as(got).flatten()[::stride]
    want, got = want[keep], got.detach().flatten()[::stride].double()[keep]
    assert got.shape == want.shape, f"{name}: {got.shape} against {want.shape}"
    diff, scale = (got - want).abs().max().item(), max(want.abs().max().item(), 1e-30)
    assert diff <= tol * scale, f"{name}: off by {diff:.3g} at scale {scale:.3g}"


# ---- Vision

def golden_imagebind(config, weights, **more):
    """An ImageBind of a fixture's sizes, filled from original keys."""
    towers = {}
    for kind, huge in HUGE.items():
        if f"{kind}_embed_dim" not in config:
            continue
        towers[kind] = M.replace(huge, dim=config[f"{kind}_embed_dim"], n_layer=config[f"{kind}_num_blocks"],
                                 n_head=config[f"{kind}_num_heads"])
    bind = ImageBind(ImageBindConfig(towers, config["out_embed_dim"]))
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


# ---- Model

def golden_llm(c, **more):
    return M.LLMConfig(dim=c["hidden_size"], n_layer=c["num_hidden_layers"], n_head=c["num_attention_heads"],
                       n_kv_head=c.get("num_key_value_heads", c["num_attention_heads"]), mlp_dim=c["intermediate_size"],
                       vocab_size=c["vocab_size"], norm_eps=c["rms_norm_eps"], max_len=c["max_position_embeddings"], **more)


def golden_chatbind(meta, weights):
    """The chat model of a ChatBind fixture, tower included."""
    c, ids = meta["config"], meta["config"]["special_token_ids"]
    small = c.get("imagebind") or c["imagebind_vision"]
    towers = {kind: M.replace(HUGE[kind], dim=small[f"{kind}_embed_dim"], n_layer=small[f"{kind}_num_blocks"],
                              n_head=small[f"{kind}_num_heads"]) for kind in HUGE if f"{kind}_embed_dim" in small}
    cfg = M.ModelConfig(llm=golden_llm(c["llama"]), imagebind=ImageBindConfig(towers, small["out_embed_dim"]),
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


@pytest.mark.parametrize("backend", attention.BACKENDS)
def test_attention_backends_equal_float64(backend, monkeypatch):
    monkeypatch.setattr(attention, "backend", backend)
    for seed in range(30):
        g = torch.Generator().manual_seed(seed)
        B, nkv, group, T, hd = (int(torch.randint(1, n, (), generator=g)) for n in (3, 3, 4, 20, 40))
        S = T + int(torch.randint(0, 9, (), generator=g))
        q, k, v = (torch.randn(B, n, t, hd, generator=g) for n, t in ((nkv * group, T), (nkv, S), (nkv, S)))
        bias = torch.randn(1, nkv * group, T, S, generator=g) if seed % 3 == 0 else None
        causal = seed % 2 == 0
        scores = torch.einsum("bhtd,bhsd->bhts", q.double(), k.repeat_interleave(group, 1).double()) / hd ** 0.5
        scores = scores + (0 if bias is None else bias)
        if causal:
            scores[..., torch.arange(S)[None] > torch.arange(T)[:, None] + S - T] = -torch.inf
        want = scores.softmax(-1) @ v.repeat_interleave(group, 1).double()
        assert (attention.attention(q, k, v, causal=causal, bias=bias) - want).abs().max() < 1e-5


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


BAD_CONFIGS = {
    "newer": ({"format_version": 99}, "newer"), "no version": ({"format_version": None}, "config"), "unknown field": ({"llama": 1}, "llama"),
    "huge": ({"llm": {"dim": 64, "n_layer": 10 ** 9}}, "n_layer"), "negative": ({"llm": {"dim": -1}}, "dim"), "other sizes": ({"clip": {}}, "missing"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_model_load_names_what_is_wrong(tmp_path, case):
    M.save(M.Model(M.TINY), tmp_path / "w")
    change, match = BAD_CONFIGS[case]
    config = json.loads((tmp_path / "w/config.json").read_text()) | change
    (tmp_path / "w/config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None or k != "format_version"}))
    with pytest.raises(ValueError, match=match):
        M.load(tmp_path / "w")


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
    for path in (GOLDEN / "chatbind/templates.json", SHARED / "golden/chatbind/templates.json"):
        if path.exists():
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


def test_data_media_names_stay_inside_their_folder(tmp_path):
    for name in BAD_NAMES:
        with pytest.raises(data.DataError, match="relative paths"):
            data.safe_join(tmp_path, name)
    for name in GOOD_NAMES:
        assert data.safe_join(tmp_path, name).is_relative_to(tmp_path)


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


def test_data_media_limits(tmp_path):
    big = data.Image.new("1", (9000, 6000))
    big.save(tmp_path / "big.png")
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
    with pytest.raises(data.DataError, match="record 2"):
        prepared(0)[2]


def test_data_templates_equal_the_originals():
    path = need(SHARED / "golden/chatbind/templates.json", "templates.json")
    theirs = data.load_templates(path)
    for name in theirs.keys() & data.TEMPLATES.keys():
        ours = M.replace(data.TEMPLATES[name], front="")
        assert ours == theirs[name], name
    assert len(theirs.keys() & data.TEMPLATES.keys()) >= 10


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
    codes = {str(dtype).split(".")[1]: (code, dtype.itemsize) for code, dtype in cw.DTYPES.items()}
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
    tokens = {name: 120 + i for i, name in enumerate(M.CHATBIND_TOKENS)}
    sources = put(tmp_path / "base", base, config) + put(tmp_path / "delta", delta, config, tokens=tokens)
    assert (done := cli(*sources, "--out", tmp_path / "out")).returncode == 0, done.stderr
    back = {ours: theirs for theirs, ours in ((k, cw.translate(k, cw.CHATBIND)) for k in target)}
    for name, x in load_file(tmp_path / "out/model.safetensors").items():
        close(meta, t, f"restored.{back[name]}", x, 0)
    assert M.read_config(tmp_path / "out").added_tokens == tokens


PUBLIC = {"vicuna-7b-v1.5": (), "vicuna-7b-v0": (), "llama-2-13b-hf": (), "clip-vit-large-patch14-336": (),
          "clip-vit-large-patch14": (), "imagebind_huge": (), "chatbind-7b": ("imagebind_huge",),
          "chatbind-7b-vocab32003": ("imagebind_huge",), "chatbind-7b-delta": ("vicuna-7b-v1.5", "imagebind_huge")}


@pytest.mark.parametrize("name", PUBLIC)
def test_convert_public_keys(tmp_path, name):
    """Each key of a public checkpoint matches one row, each tensor of ours comes from one key of the right shape."""
    keys = {}
    for source in (name, *PUBLIC[name]):
        (tmp_path / source).mkdir()
        fill = "delta" not in source
        keys[source] = header_only(source, tmp_path / source / "model.safetensors", fill).keys()
        for key in keys[source]:
            assert sum(cw.rewrite(key, row[0], row[0]) == key for row in cw.TABLE) == 1
    if "32003" in name:
        (tmp_path / name / "added_tokens.json").write_text(json.dumps({k: i + 32000 for i, k in enumerate(IM_TOKENS)}))
    plan = cw.plan_weights([tmp_path / source for source in keys])
    cw.check(plan)
    assert len(plan.report) == sum(map(len, keys.values()))
    with torch.device("meta"):
        want = {k: tuple(x.shape) for k, x in M.Model(plan.cfg).state_dict().items()}
    assert {k: target.shape for k, target in plan.files["model"].items()} == want


def test_convert_public_sizes(tmp_path):
    """Sizes that only shapes tell are those of the presets."""
    for name, preset in {"imagebind_huge": "imagebind-huge", "clip-vit-large-patch14": "clip-vit-l-14",
                         "vicuna-7b-v0": "vicuna-7b-v0", "llama-2-13b-hf": "llama-2-13b"}.items():
        header_only(name, tmp_path / f"{name}.safetensors", fill=True)
        assert cw.plan_weights([tmp_path / f"{name}.safetensors"]).cfg == M.PRESETS[preset]


def test_convert_table_reversed():
    """Any key that a table maps is found again from its new name."""
    r = random.Random(0)

    def fill(hole):
        rest = ("weight", "bias", "fc1.bias")
        return r.choice(hole[1].split(",")) if hole[1] else r.choice(rest) if hole[1] is None else str(r.randrange(100))
    for theirs, ours, *_ in cw.TABLE * 20:
        key = cw.HOLES.sub(fill, theirs)
        name = cw.translate(key, cw.TABLE)
        assert (name is None) == (ours is None)
        if name:
            assert cw.translate(name, [(ours, theirs) for theirs, ours, *_ in cw.TABLE if ours]) == key


LAYOUT_NAMES = ("single files", "single index", "single shards", "bin", "bin index", "bin files", "pth", "ckpt", "old")


def test_convert_layouts(tmp_path):
    state = llama_state()
    cw.convert(put(tmp_path / "a", state), tmp_path / "want")
    for layout in LAYOUT_NAMES:
        cw.convert(put(tmp_path / layout, state, layout=layout), tmp_path / "out" / layout)
        same(tmp_path / "want", tmp_path / "out" / layout)
        assert M.read_config(tmp_path / "want") == M.read_config(tmp_path / "out" / layout)


def test_convert_hub_snapshot(tmp_path):
    put(tmp_path / "blobs", llama_state(), layout="single index")
    (tmp_path / "snapshot").mkdir()
    for i, path in enumerate(list((tmp_path / "blobs").iterdir())):
        (tmp_path / "snapshot" / path.name).symlink_to(path.rename(path.with_name(f"{i:040}")))
    cw.convert([tmp_path / "snapshot"], tmp_path / "out")
    cw.convert(put(tmp_path / "plain", llama_state()), tmp_path / "want")
    same(tmp_path / "want", tmp_path / "out")


def test_convert_views(tmp_path):
    """Transposed, sliced and shared storages of a .bin give the values the tensors had."""
    state = llama_state()
    views = {k: x.t().contiguous().t() if x.ndim > 1 else torch.stack([x, x])[1] for k, x in state.items()}
    views["lm_head.weight"] = views["model.embed_tokens.weight"]
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    cw.convert(put(tmp_path / "a", views, layout="bin"), tmp_path / "out")
    cw.convert(put(tmp_path / "b", state), tmp_path / "want")
    same(tmp_path / "want", tmp_path / "out")


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
    "no tokens": ([(llama_state(123, projector=16), None)], "added_tokens.json"),
    "tokens outside": ([(llama_state(120, projector=16), IM_TOKENS)], "added_tokens.json"),
    "missing": ([(without(llama_state(), Q), None)], f"MISSING.*{Q}"),
    "no head": ([(without(llama_state(), "lm_head.weight"), None)], "MISSING.*lm_head.weight"),
    "no embedding": ([(without(llama_state(), "model.embed_tokens.weight"), None)], "MISSING llm.embed.weight"),
    "unexpected": ([(llama_state() | {"model.layers.0.extra": torch.ones(2)}, None)], "UNEXPECTED model.layers.0.extra"),
    "bias": ([(llama_state() | {Q.replace("weight", "bias"): torch.ones(32)}, None)], "UNEXPECTED.*q_proj.bias"),
    "shape": ([(llama_state() | {Q: torch.ones(32, 31)}, None)], f"MISMATCHED {Q}.*31"),
    "not a model": ([({"foo.weight": torch.ones(2)}, None)], "not a LLaMA, CLIP, ImageBind or ChatBind"),
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


@pytest.mark.parametrize("layout", ("single", "bin", "old"))
def test_convert_survives_mutation(tmp_path, layout):
    """A damaged file converts (a changed weight) or is refused; nothing else happens."""
    folder, = put(tmp_path / "a", llama_state(n_layer=1), TINY_LLAMA | {"num_hidden_layers": 1}, layout)
    file, refusals = max(folder.iterdir(), key=lambda path: path.stat().st_size), 0
    for raw in mutated(file.read_bytes(), random.Random(0), 200):
        file.write_bytes(raw)
        try:
            cw.convert([folder], tmp_path / "out", overwrite=True)
        except cw.Refused as error:
            refusals += 1
            assert "\n" not in str(error) and str(folder) in str(error) or "do not fit" in str(error), error
    assert refusals > 60


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
    """An existing folder is kept unless told otherwise; one that is no weights folder or holds a source always."""
    folder, = put(tmp_path / "a", llama_state())
    cw.convert([folder], tmp_path / "out")
    refused([folder], tmp_path / "out", match="--overwrite")
    cw.convert([folder], tmp_path / "out", dtype="fp32", overwrite=True)
    assert M.load(tmp_path / "out").llm.embed.weight.dtype == torch.float32
    (tmp_path / "home").mkdir()
    refused([folder], tmp_path / "home", match="no weights folder", overwrite=True)
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


PEAK = "import sys, resource, convert_weights as cw; cw.{}; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"


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
        losses, norm = train.update(model, learned, opt, [batch], lr, clip=1.0)
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


def run_train(world, out, *flags):
    train.main(["system=tiny", f"data={world}/conversations.json", f"tokenizer={world}/tokenizer.model", f"out={out}", "batch=4",
                "lr=0.001", "workers=0", "log_every=1", "save_every=1000", *flags])
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


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
        assert {k: v for k, v in one.items() if k != "tokens_per_s"} == {k: v for k, v in two.items() if k != "tokens_per_s"}
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


def test_train_stops_before_a_nonfinite_update(world, tmp_path):
    s, stage, model, prepared = train.prepare(train.parse_settings(
        [f"data={world}/conversations.json", f"tokenizer={world}/tokenizer.model", "batch=2", "steps=1", "workers=0"]))
    learned, batch = train.learn(model, stage), next(iter(train.batches(prepared, s, 0)))
    for value in (float("nan"), float("inf")):
        opt, before = torch.optim.AdamW(learned.values()), {k: p.detach().clone() for k, p in learned.items()}
        hook = model.llm.blocks[0].register_forward_hook(lambda m, i, o: o * value)
        with pytest.raises(FloatingPointError, match="step 7: loss lm"):
            train.update(model, learned, opt, [batch], 1e-3, 1.0, step=7)
        hook.remove()
        assert all(torch.equal(before[k], p) for k, p in learned.items())


def test_train_stage_rows_only_learn_what_they_name():
    for (system, number), stage in train.STAGES.items():
        cfg = M.replace(M.TINY, added_tokens={"<im_start>": 601, "<im_end>": 602})
        model = M.Model(cfg)
        learned = train.learn(model, stage)
        assert learned and all(p.requires_grad == (name in learned) for name, p in model.named_parameters())
        assert system == "tiny" or not any(".tower." in name for name in learned)
    with pytest.raises(ValueError, match="no parameter"):
        train.learn(model, train.Stage("nothing", 1.0, 1))


def test_train_settings_reject_what_they_do_not_know(capsys):
    assert train.parse_settings(["steps=3", "--lr=1e-3", "--save-every", "7"]).save_every == 7
    for wrong in (["stepz=3"], ["steps=many"]):
        with pytest.raises(SystemExit):
            train.parse_settings(wrong)
        assert wrong[0].split("=")[0] in capsys.readouterr().err


def test_train_order_is_a_permutation_fixed_by_seed_and_epoch():
    for n, batch in ((10, 3), (1000, 7), (2, 5)):
        sizes = [i * 37 % 11 for i in range(n)]
        order = data.epoch_batches(sizes, batch, 1, 2)
        flat = [i for b in order for i in b]
        assert order == data.epoch_batches(sizes, batch, 1, 2) and len(flat) == len(set(flat)) >= min(n, n - batch + 1)
        assert n == 2 or order != data.epoch_batches(sizes, batch, 1, 3)


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


# ---- Shapes

def test_shapes_answers_follow_from_the_scene():
    for seed in range(300):
        rng = random.Random(seed)
        things = shapes.scene(rng)
        for i, t in enumerate(things):
            assert all(abs(t.x - u.x) + abs(t.y - u.y) > t.radius + u.radius for u in things[:i])
        for kind, question, answer in shapes.picture_questions(things, rng):
            words = re.findall(r"\w+", answer.lower())
            if kind == "colour":
                assert any(t.shape in words and t.colour in words for t in things)
            if kind == "exists":
                assert (words[0] == "yes") == any(t.colour in words and t.shape in words for t in things)
            if kind == "count" and ("shapes are" in question or "shapes do" in question) and "many shapes" in question:
                assert shapes.NUMBERS[len(things)] in words
            if kind == "caption":
                assert [w for w in words if w in shapes.SHAPES] == [t.shape for t in things]


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


@pytest.mark.slow
def test_tiny_weights_answer_about_files_they_have_not_seen(tmp_path, capsys):
    shapes.main(["--out", str(tmp_path), "--questions", "200", "--seed", "7"])
    evaluate.main([str(HERE / "weights/tiny"), str(tmp_path / "questions.json")])
    rows = re.findall(r"^(\w+).*? +(\d+) of +(\d+)", capsys.readouterr().out, re.M)
    share = {kind: sum(int(r) for k, r, _ in rows if k == kind) / sum(int(n) for k, _, n in rows if k == kind) for kind, _, _ in rows}
    assert share["audio"] >= 0.9 and share["all"] >= 0.5        # what the shipped weights do; pictures and clips lag behind


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


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_chat_reuse_changes_nothing(seed, chat_files):
    rng, session = random.Random(seed), chat_session()
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
        assert session.turns[-1].ids == twin.turns[-1].ids and session.held == twin.held
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
    model = Thing(llm=Thing(embed=Thing(weight=torch.zeros(1))), cfg=cfg)
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
        assert set(row) == {"prompt", "text", "media", "tokens", "seconds", "seed", "model"} and row["tokens"] > 0
    assert files


def test_chat_one_shot_prints_only_the_answer(monkeypatch, capsys, chat_files):
    session = chat_session(max_new_tokens=8)
    want = "".join(session.say("What is this?", [session.read(chat_files[0])]))
    code, out, err = chat_main(monkeypatch, capsys, "-p", "What is this?", "--image", chat_files[0])
    assert (code, out) == (0, chat.clean(want) + "\n") and err == "#1 image a dog's.png 60x40\n"


BAD = [("--image", "/nowhere.png"), ("--image", "{3}"), ("--audio", "{0}"), ("--image", "/"), ("--depth", "{3}"),
       ("--temperature", "hot"), ("--top-p", "2"), ("--image", "http://example.com/a.png"), ("--device", "toaster")]


@pytest.mark.parametrize("flags", BAD)
def test_chat_one_shot_bad_input(flags, monkeypatch, capsys, chat_files):
    code, out, err = chat_main(monkeypatch, capsys, "-p", "hi", *[flag.format(*chat_files) for flag in flags])
    assert (code, out, err.count("\n")) == (2, "", 1), err


def chat_escape(path):
    """A file name as terminals write it when it is dragged in."""
    return re.sub(r"([ '()])", r"\\\1", path)


def test_chat_piped_lines_are_turns(monkeypatch, capsys, chat_files):
    lines = [f'/image "{chat_files[0]}"', "what is it?", chat_files[0], "clip? @" + chat_escape(chat_files[1]),
             '"""two', 'lines @nobody"""', "//slash", "look @/nowhere.png", "/media"]
    code, out, err = chat_main(monkeypatch, capsys, "--json", stdin="\n".join(lines).encode())
    rows = [json.loads(line) for line in out.splitlines()[:4]]
    assert [row["prompt"] for row in rows] == ["what is it?", "clip?", "two\nlines @nobody", "/slash"]
    assert [len(row["media"]) for row in rows] == [1, 2, 0, 0] and code == 0
    assert out.splitlines()[4].startswith("#1 image") and "/nowhere.png: no such file" in err


ESCAPES = ("\x1b[31m", "\x1b]52;c;eA==\x07", "\x9b2J", "\x1b]0;t\x1b\\", "\x1bP1$r\x1b\\", "\x7f", "\r", "\x08",
           "\x85", "\x00", "\x90q\x9c", "\x1b(0", "\x0e", "\x9d8;;http://a\x9c", "\x1b[6n", "\x1bc", "\x05", "\x0b",
           "\x0c", "\x18")


def test_chat_control_characters_never_reach_the_terminal(capsys):
    talker = chat.Chat(Thing(last=lambda: Thing(dropped=0, text="", answer="", media=[], ids=[], clock=[0] * 4),
                             settings={"seed": 0}), Thing(prompt=None, pictures="off", json=False, weights=""))
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


class ChatTerminal:
    """chat.py in a pseudo-terminal. `ask` sends a line and returns what was printed until the next prompt."""

    def __init__(self, tmp_path, *words, program=("chat.py",)):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(HERE)
            os.environ.update(XDG_STATE_HOME=str(tmp_path), TERM="xterm", NO_COLOR="1", OMP_NUM_THREADS="1")
            os.execv(sys.executable, [sys.executable, *program, str(CHAT_WEIGHTS), "--device", "cpu", *words])

    def read(self, until, seconds=60):
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


def test_chat_interrupts(tmp_path):
    terminal = ChatTerminal(tmp_path, program=("-c", SLOW_MODEL))
    terminal.read("> $")
    os.write(terminal.fd, b"hello\n")
    terminal.read(r"hello\r\n(.|\n)*\w\w\w")
    os.write(terminal.fd, b"\x03")
    assert " [stopped]" in terminal.read(r"\n(\x1b\[\?2004h)?> $")
    os.write(terminal.fd, b"half a line\x03")
    assert "Ctrl-D or /quit" in terminal.read(r"\n(\x1b\[\?2004h)?> $")
    assert "answer: 70" in terminal.ask("/raw")                 # what was said stays
    assert terminal.close() == 0


def test_chat_completes_commands_and_paths(chat_files):
    def all_of(text):
        return list(itertools.takewhile(bool, (chat.complete(text, i) for i in itertools.count())))
    assert all_of("/se") == ["/set"] and {"/show", "/save", "/set", "/stats", "/system"} <= set(all_of("/s"))
    found, = all_of("@" + chat_files[0][:-6])
    assert chat.shlex.split(found) == ["@" + chat_files[0]]
    assert all_of(str(HERE)[:-1]) and all(name.endswith("/") for name in all_of(str(HERE)) if os.path.isdir(name))


# ---- Docs

OURS = {"attention": set(), "vision": {"attention"}, "model": {"attention", "vision"}, "data": set(), "shapes": set(),
        "convert_weights": {"model", "vision"}, "train": {"model", "data"}, "evaluate": {"model", "data"}, "chat": {"model", "data"}}
README = (HERE / "README.md").read_text()


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


def test_docs_readme_counts_lines_within_a_tenth():
    rows = re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.M)
    assert {name for name, _ in rows} == {p.name for p in HERE.glob("*.py")}
    for name, lines in rows:
        assert abs(len((HERE / name).read_text().splitlines()) - int(lines)) <= 0.1 * int(lines), name


def test_docs_ci_runs_the_command_of_the_readme():
    command = next(line for line in README.splitlines() if "bin/pytest" in line)
    assert "README.md" in (HERE / ".ci/run").read_text() and command.startswith("python3 -m venv")
