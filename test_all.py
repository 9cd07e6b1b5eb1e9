"""Every test, in the order of the code: attention, vision, model, data, convert, train, shapes, chat, docs.

Golden tests compare with what the original code computed (folder GOLDEN_DIR, default golden/): every size, seed and case
comes from the fixtures. Vocabularies of others are found through LLAMA_TOKENIZER and CLIP_BPE.
"""
import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import attention
import convert_weights as cw
import data
import evaluate
import model as M
import shapes
import train
from vision import CLIPConfig, CLIPVision, ImageBind, ImageBindConfig, TowerConfig, HUGE

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
