"""Speed and memory beside what a user would pick instead: same weights, same inputs, in turn A B A B, medians.

    python bench.py --cpu --threads 2
    python bench.py --cpu --threads 1 --layers 2 --only sam unet-sd15
    python bench.py --cuda --only decode decode-int4

In order: sizes, checkpoints, cases, measuring, the report. Random checkpoints of the sizes below are written once to
--folder by transformers and converted like anybody's; painters and SAM hold the same random tensors on both sides. Each
side has a process of its own, whose peak memory is told. A share is what the machine's own limit would take (weights
read at the speed of a matrix-vector product, operations at that of a large matrix product, both measured first) over
what we took. With one thread of a CPU, time is the processor's, which others do not lengthen. It writes BENCHMARKS.md.
"""
import argparse
import datetime
import importlib
import inspect
import json
import math
import os
import platform
import re
import resource
import shlex
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import attention
import chat
import convert_weights
import data
import generate as G
import model as M
import train as training
import vision

HERE = Path(__file__).parent


# ---- Sizes

LLM = {                                 # transformers' names; per device
    "cpu": dict(hidden_size=2048, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4,
                intermediate_size=5632, vocab_size=32000),
    "cuda": dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32,
                 intermediate_size=11008, vocab_size=32000),
}
SMALL_LLM = dict(hidden_size=768, num_hidden_layers=8, num_attention_heads=12, num_key_value_heads=12,
                 intermediate_size=2048, vocab_size=32000)              # of the training step
CLIP = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
            patch_size=14)
SAM = vision.SAMConfig()
SAM_NAMES = [(r"^", "vision_encoder."), ("blocks", "layers"), (r"\.norm(\d)", r".layer_norm\1"),
             ("neck.0", "neck.conv1"), ("neck.1", "neck.layer_norm1"), ("neck.2", "neck.conv2"),
             ("neck.3", "neck.layer_norm2"), ("patch_embed.proj", "patch_embed.projection")]    # ours to transformers'
AUDIO = dict(in_channels=8, out_channels=8, block_out_channels=(256, 512, 768, 1280), attention_head_dim=8,
             cross_attention_dim=(256, 512, 768, 1280), class_embed_type="simple_projection",
             class_embeddings_concat=True, projection_class_embeddings_input_dim=512,
             down_block_types=["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 3,
             up_block_types=["CrossAttnUpBlock2D"] * 3 + ["UpBlock2D"])
UNETS = {                               # ours, diffusers' class and what it is told, latents of one sample, its prompt
    "sd15": (G.SD15.unet, "UNet2DConditionModel", dict(attention_head_dim=8, cross_attention_dim=768), (4, 64, 64),
             (77, 768)),
    "zeroscope": (G.ZEROSCOPE.unet, "UNet3DConditionModel", dict(attention_head_dim=64, cross_attention_dim=1024),
                  (4, 24, 40, 72), (77, 1024)),
    "audioldm": (G.AUDIOLDM.unet, "UNet2DConditionModel", AUDIO, (8, 128, 16), (512,)),
}
LLAMA = ("LlamaConfig", "LlamaForCausalLM")             # transformers' classes of a checkpoint
PEERS = {"llm": LLAMA, "small": LLAMA, "clip": ("CLIPVisionConfig", "CLIPVisionModel")}
VAE = dict(block_out_channels=G.SD15.vae.widths, layers_per_block=2, down_block_types=["DownEncoderBlock2D"] * 4,
           up_block_types=["UpDecoderBlock2D"] * 4)
PROMPT, NEW, TRAIN = 512, 32, (2, 256)  # tokens of a prompt, of an answer, of a training batch
FINE_TUNE, STEPS = (8, 512), 4          # tokens of a batch of fine-tuning, batches of a run


class Job(NamedTuple):
    """One side of a case: what to time, and how much a run does."""
    run: object                         # a function of nothing
    amount: float                       # units per run
    bytes: float = 0                    # weights read per run
    flops: float = 0
    disk: bool = False                  # waiting for it counts
    around: object = nullcontext        # what comes before and after it, untimed


class Case(NamedTuple):
    """A row of the table. build(side, settings, *args) gives the Job of "ours" or of one of the peers."""
    build: object
    args: tuple
    unit: str                           # "/s" of it is printed
    checkpoint: str = ""                # of folder_of, that both load
    peers: tuple = ("transformers",)
    devices: str = "cpu cuda"


# ---- Checkpoints

def make(package, name, *args, **more):
    """package.name(...), imported only where it is wanted: its size is not ours."""
    return getattr(importlib.import_module(package), name)(*args, **more)


def folder_of(s, name, side):
    """The folder of a random checkpoint in theirs or our format, made where it is absent."""
    sizes = {"llm": LLM[s.device], "small": SMALL_LLM, "clip": CLIP}[name]
    sizes = sizes | {"num_hidden_layers": s.layers or sizes["num_hidden_layers"]}
    home = s.folder / f"{name}-{s.device}-{sizes['num_hidden_layers']}-{str(s.dtype)[6:]}"
    if not (home / "ours").exists():    # which is written last
        config, model = PEERS[name]
        torch.manual_seed(0)
        made = make("transformers", model, make("transformers", config, **sizes))
        made.to(s.dtype).save_pretrained(home / "transformers")
        convert_weights.convert([home / "transformers"], home / "ours")
    return home / side


def load(s, name, side, dtype=None, quantize=""):       # a side's model in eval mode on the device
    folder, dtype = folder_of(s, name, side), dtype or s.dtype
    if side == "ours":
        return M.load(folder, s.device, dtype, quantize)
    import transformers
    return getattr(transformers, PEERS[name][1]).from_pretrained(folder, dtype=dtype).to(s.device).eval()


def shared(side, s, ours, theirs, names=()):
    """A side's module in eval mode, from functions that make them; both hold the same random tensors."""
    with torch.device("meta"):          # no memory but that of the tensors
        mine = G.channels_last(ours())                          # as load_painter lays them out
        model = mine if side == "ours" else theirs()
    torch.manual_seed(0)
    state = {}
    for key, like in mine.state_dict().items():
        x = torch.empty(like.shape, dtype=s.dtype, device=s.device).uniform_(-0.05, 0.05)
        for old, new in names if side != "ours" else ():
            key = re.sub(old, new, key)
        state[key] = torch.empty_like(like, dtype=s.dtype, device=s.device).copy_(x) if side == "ours" else x
    model.load_state_dict(state, assign=True)
    return model.eval()


def noise(s, *shape):                   # made on the CPU, so that every device gets the same
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(s.device, s.dtype)


def tokens(s, rows, n):                 # (rows, n), none of the special three
    g = torch.Generator().manual_seed(1)
    return torch.randint(3, 32000, (rows, n), generator=g).to(s.device)


def n_weight(model, *without):          # weights that every token meets
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith(without))


# ---- Cases

def prefill(side, s, n, quantize=""):
    model, ids = load(s, "llm", side, quantize=quantize), tokens(s, 1, n)
    if side != "ours":
        return Job(lambda: model(ids, use_cache=True, logits_to_keep=1).logits[:, 0], n)
    M.fuse(model)
    llm = model.llm
    sizes = (layer.in_features * layer.out_features for layer in llm.blocks.modules() if hasattr(layer, "in_features"))
    return Job(lambda: llm.lm_head(llm(llm.embed(ids), M.KVCache(llm, 1, n))[:, -1]), n, flops=2 * n * sum(sizes))


def answer(model, ids, n, side, replay=None):           # greedy answer of exactly n tokens
    if side != "ours":
        return model.generate(ids, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0)
    if replay:
        replay.cache.pos = 0
    return list(M.generate(model, model.llm.embed(ids), max_new_tokens=n, cache=replay and replay.cache, replay=replay))


def decode(side, s, quantize="", graph=False):          # peers stay in floats: all that comes without another package
    ids = tokens(s, 1, 8)
    if side != "ours":
        model = load(s, "llm", side)
        return Job(lambda: answer(model, ids, NEW, side), NEW)
    model = load(s, "llm", side, quantize=quantize)
    model.cfg = replace(model.cfg, eos=())                      # random weights may say anything, also the end
    M.fuse(model)                       # as chat.py does
    size = sum(x.nbytes for name, x in model.llm.state_dict().items() if not name.startswith("embed"))
    replay = M.Replay(model.llm, M.KVCache(model.llm, 1, ids.shape[1] + NEW)) if graph else None
    return Job(lambda: answer(model, ids, NEW, side, replay), NEW, bytes=NEW * size)    # a token reads all weights once


FIRST = """
import torch
folder, device, dtype, threads, *ids = sys.argv[1:]
torch.set_num_threads(int(threads))
ids = torch.tensor([[int(i) for i in ids]], device=device)
"""
STARTS = {                              # programs that print the first token of an answer; ours begins as chat.py does
    "ours": ("import os, sys\nfrom contextlib import suppress\nfrom pathlib import Path\nfrom threading import Thread\n"
             + inspect.getsource(chat.read_ahead)) + """
Thread(target=read_ahead, args=(sys.argv[1],), daemon=True).start()
""" + FIRST + """
import model
it = model.load(folder, device, getattr(torch, dtype))
model.fuse(it)
print(next(model.generate(it, it.llm.embed(ids), max_new_tokens=1)), flush=True)
""",
    "transformers": "import sys" + FIRST + """
from transformers import LlamaForCausalLM
it = LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device)
print(it.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)[0, -1].item(), flush=True)
"""}


def answer_of(process, who):            # the next line that it prints; one that prints none has failed
    if not (line := process.stdout.readline()):
        raise SystemExit(f"{who} ended with status {process.wait()}")
    return line


def forget(folder):                     # its files go out of the page cache
    for path in folder.iterdir():
        with open(path) as file:
            os.fsync(file.fileno())     # what is not written yet would stay
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def start(side, s, cold):
    """A program from its start to the first token: Python, imports, weights out of the page cache or from the disk."""
    ids, folder = tokens(s, 1, 8)[0].tolist(), folder_of(s, "llm", side).resolve()
    command = [sys.executable, "-c", STARTS[side], folder, s.device, str(s.dtype)[6:], s.threads, *ids]
    home = HERE if side == "ours" else s.folder                 # where datasets.py is not taken for the package
    last = None

    @contextmanager
    def around():
        if cold:
            forget(folder)
        yield
        last.wait()

    def run():
        nonlocal last
        last = subprocess.Popen(map(str, command), cwd=home, stdout=subprocess.PIPE)
        return torch.tensor(float(answer_of(last, f"the program of {side}")))
    return Job(run, 1, disk=True, around=around)


def conversion(side, s):                # of a language model; nobody else does it
    source = folder_of(s, "llm", "transformers")
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    return Job(lambda: convert_weights.convert([source], s.folder / "converted", overwrite=True), size / 1e9, disk=True)


def clip(side, s, batch):
    """The hidden states that chat models read; of a cut tower the last, for there one block less would be a lot."""
    tower, x = load(s, "clip", side), noise(s, batch, 3, CLIP["image_size"], CLIP["image_size"])
    layer = -1 if s.layers else -2
    if side != "ours":
        return Job(lambda: tower(x, output_hidden_states=True).hidden_states[layer][:, 1:], batch)
    tower = tower.readers.clip.tower
    tower.cfg, n_token = replace(tower.cfg, feature_layer=layer), batch * tower.pos.num_embeddings
    return Job(lambda: tower(x), batch, flops=2 * n_token * n_weight(tower.blocks))


def imagebind(side, s):                 # a picture through ImageBind-Huge, which no package has
    cfg = replace(vision.HUGE["vision"], n_layer=s.layers or vision.HUGE["vision"].n_layer)
    tower, x = shared(side, s, lambda: vision.Tower(cfg, 1024, False), None), noise(s, 1, 3, *cfg.size[1:])
    return Job(lambda: tower(x), 1, flops=2 * tower.pos.shape[1] * n_weight(tower.blocks))


def sam(side, s):                       # SAM's image encoder
    n = s.layers or SAM.n_layer
    cfg = replace(SAM, n_layer=n, global_layers=tuple(i for i in SAM.global_layers if i < n) or (n - 1,))
    sizes = dict(hidden_size=cfg.dim, num_hidden_layers=n, num_attention_heads=cfg.n_head, mlp_dim=cfg.mlp_dim,
                 image_size=cfg.image_size, window_size=cfg.window, global_attn_indexes=cfg.global_layers)
    model = shared(side, s, lambda: vision.SAMImageEncoder(cfg), lambda: make(
        "transformers", "SamVisionModel", make("transformers", "SamVisionConfig", **sizes)), SAM_NAMES)
    x = noise(s, 1, 3, cfg.image_size, cfg.image_size)
    if side == "ours":
        return Job(lambda: model(x), 1)
    return Job(lambda: model(x).last_hidden_state, 1)


def unet(side, s, name):
    """A step with guidance, two samples; what a prompt needs once is not in it. --layers: sides of a quarter."""
    cfg, kind, sizes, shape, prompt = UNETS[name]
    shape = [*shape[:-2], *(n // 4 for n in shape[-2:])] if s.layers else [*shape]
    if cfg.video and s.device == "cpu":
        shape[1] = 4                    # frames
    model = shared(side, s, lambda: G.UNet(cfg), lambda: make("diffusers", kind, **sizes))
    x, prompt = noise(s, 2, *shape), noise(s, 2, *prompt)       # (B, C, H, W) or (B, C, F, H, W); (B, T, C) or (B, C)
    if side == "ours":
        told = {"text": model.read(prompt)} if cfg.context_dim else {"classes": prompt}
        return Job(lambda: model(x, 500, **told), 1)
    text, classes = (prompt, None) if cfg.context_dim else (None, prompt)
    return Job(lambda: model(x, 500, encoder_hidden_states=text, class_labels=classes, return_dict=False)[0], 1)


def vae(side, s):                       # latents to a picture. --layers: of a quarter of its sides
    model = shared(side, s, lambda: G.VAE(G.SD15.vae), lambda: make("diffusers", "AutoencoderKL", **VAE))
    x = noise(s, 1, 4, *[16 if s.layers else 64] * 2)
    if side == "ours":
        return Job(lambda: model.decode(x), 1)
    return Job(lambda: model.decode(x / G.SD15.vae.scale).sample, 1)


def train(side, s):                     # AdamW on every weight, in float32 with autocast to another --dtype
    model, ids = load(s, "small", side, torch.float32).train().requires_grad_(), tokens(s, *TRAIN)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-5)

    @torch.enable_grad()
    def run():
        with torch.autocast(s.device, s.dtype, enabled=s.dtype != torch.float32):
            loss = (M.lm_loss(model.llm.lm_head, model.llm(model.llm.embed(ids)), ids) if side == "ours" else
                    model(ids, labels=ids).loss)
        loss.backward()
        opt.step()
        opt.zero_grad()
    n = n_weight(model, "llm.embed", "model.embed")             # a product forward, two backward, 2 operations each
    return Job(run, math.prod(TRAIN), flops=6 * n * math.prod(TRAIN))


def fine_tune(side, s):
    """Our update of every weight beside transformers' Trainer (which needs accelerate), in float32 with autocast to
    another --dtype; half of a row is learned, as an answer is. In a run of STEPS what surrounds them hardly counts."""
    model, ids = load(s, "small", side, torch.float32).train().requires_grad_(), tokens(s, *FINE_TUNE)
    labels, bf16 = ids.clone(), s.dtype == torch.bfloat16
    labels[:, :FINE_TUNE[1] // 2] = data.IGNORE
    flops = 6 * n_weight(model, "llm.embed", "model.embed", "llm.lm_head", "lm_head") * STEPS * math.prod(FINE_TUNE)
    if side == "ours":
        stage, batch = training.Stage(r".*", lr=1e-5, batch=len(ids)), data.Batch(ids, labels, {}, {})
        opt = training.optimizer(training.learn(model, stage), stage, training.Settings(beta2=stage.beta2))

        def run():
            for step in range(STEPS):
                training.update(model, opt, [batch], stage.lr, 1.0, stage, step, bf16)
    else:
        import transformers
        transformers.trainer.is_datasets_available = lambda: False          # the datasets.py here is not the package
        options = transformers.TrainingArguments(
            str(s.folder / "trainer"), per_device_train_batch_size=len(ids), max_steps=STEPS, learning_rate=1e-5,
            use_cpu=s.device == "cpu", bf16=bf16, report_to=[], save_strategy="no", logging_strategy="no",
            disable_tqdm=True)
        rows = [{"input_ids": row, "labels": answer} for row, answer in zip(ids.cpu(), labels.cpu())]
        run = transformers.Trainer(model, options, train_dataset=rows * STEPS).train
    return Job(torch.enable_grad()(run), STEPS * math.prod(FINE_TUNE), flops=flops)


def fused_attention(side, s, hd, causal, backward):
    """16 k tokens of 2048 / hd heads at length 4096; flops count what causal attention needs."""
    B, nh, T = 4, 2048 // hd, 4096
    q, k, v, do = torch.randn(4, B, nh, T, hd, device=s.device, dtype=torch.bfloat16)       # each (B, nh, T, hd)
    q, k, v = (x.requires_grad_(backward) for x in (q, k, v))
    peer = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}.get(side)

    @torch.set_grad_enabled(backward)
    def forward():
        if peer is None:
            return attention.triton_attention(q, k, v, causal=causal)
        with sdpa_kernel(peer):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    out, flops = forward(), 4 * B * nh * T * T * hd / (2 if causal else 1)
    if not backward:
        return Job(forward, flops / 1e12, flops=flops)
    flops *= 2.5                        # five products where forward has two
    return Job(lambda: torch.autograd.grad(out, (q, k, v), do, retain_graph=True), flops / 1e12, flops=flops)


CASES = {
    "prefill": Case(prefill, (PROMPT,), "token", "llm"),
    "prefill-64": Case(prefill, (64,), "token", "llm"),         # a question in the middle of a talk
    "prefill-int8": Case(prefill, (PROMPT, "int8"), "token", "llm"),
    "prefill-int4": Case(prefill, (PROMPT, "int4"), "token", "llm"),
    "decode": Case(decode, (), "token", "llm"),
    "decode-graph": Case(decode, ("", True), "token", "llm", devices="cuda"),
    "decode-int8": Case(decode, ("int8",), "token", "llm"),
    "decode-int4": Case(decode, ("int4",), "token", "llm"),
    "load": Case(lambda side, s: Job(lambda: load(s, "llm", side), 1), (), "load", "llm"),
    "start": Case(start, (False,), "first token", "llm"),
    "start-from-disk": Case(start, (True,), "first token", "llm"),
    "convert": Case(conversion, (), "GB", "llm", ()),
    "clip": Case(clip, (1,), "image", "clip"),
    "clip-8": Case(clip, (8,), "image", "clip"),
    "imagebind": Case(imagebind, (), "image", "", ()),
    "sam": Case(sam, (), "image"),
    "unet-sd15": Case(unet, ("sd15",), "step", "", ("diffusers",)),
    "unet-zeroscope": Case(unet, ("zeroscope",), "step", "", ("diffusers",)),
    "unet-audioldm": Case(unet, ("audioldm",), "step", "", ("diffusers",)),
    "vae": Case(vae, (), "picture", "", ("diffusers",)),
    "train": Case(train, (), "token", "small"),
    "fine-tune": Case(fine_tune, (), "token", "small"),
} | {f"attention-{hd}{'-causal' * causal}{'-backward' * backward}":
     Case(fused_attention, (hd, causal, backward), "TFLOP", "", ("cudnn", "flash"), "cuda")
     for hd in (64, 80, 128) for causal in (False, True) for backward in (False, True)}


# ---- Measuring

def seconds(job, s, n=1):               # of one run, over n of them
    alone = s.device == "cpu" and s.threads == 1 and not job.disk
    clock = time.process_time if alone else time.perf_counter
    wait = torch.cuda.synchronize if s.device == "cuda" else lambda: None       # kernels run on after the call
    with job.around():
        wait()
        begin = clock()
        for _ in range(n):
            job.run()
        wait()
        took = clock() - begin
    return took / n


def limits(s):
    """Bytes per second of a product of vector and matrix (1 GiB, which no cache holds); operations per second."""
    n = 2048 if s.device == "cpu" else 8192
    weights = torch.ones(2 ** 30 // s.dtype.itemsize // n, n, device=s.device, dtype=s.dtype)
    read = Job(lambda: weights.mv(weights[0]), 1)
    multiply = Job(lambda: weights[:n, :n // 2] @ weights[n:n + n // 2], 1)     # a large one, in the caches
    best = [min(seconds(job, s) for _ in range(s.rounds + 1)) for job in (read, multiply)]     # the first warms up
    return weights.nbytes / best[0], n ** 3 / best[1]           # (n, n / 2) times (n / 2, n)


def peak(s):                            # bytes at most, of this process or one that it started; on a GPU of tensors
    if s.device == "cuda":
        return torch.cuda.max_memory_allocated()
    own = int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc", "self", "status").read_text())[1])     # not the parent's
    return max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) * 1024


def serve(case, side, s):
    """One side in a process of its own: it answers lines of input by the seconds of so many runs, facts, peak bytes."""
    out, sys.stdout = sys.stdout, sys.stderr                # what others print is no answer
    if side == "ours" and case.build not in (conversion, train, fine_tune):
        M.keep_memory()                                     # as chat.py does
    job = case.build(side, s, *case.args)
    for line in sys.stdin:
        if line == "facts\n":
            answer = job[1:4]
        elif line == "peak\n":
            answer = peak(s)
        else:
            answer = seconds(job, s, int(line))
        print(json.dumps(answer), file=out, flush=True)
        if line == "peak\n":
            return


def started(name, side, s):             # what serve answers: a function of a line
    command = [sys.executable, __file__, f"--{s.device}", "--only", name, "--side", side, "--threads", str(s.threads),
               "--layers", str(s.layers), "--folder", str(s.folder), "--dtype", str(s.dtype)[6:]]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(line):
        print(line, file=process.stdin, flush=True)
        return json.loads(answer_of(process, f"{name}: {side}"))
    return ask


def measure(name, s):
    """-> {side: seconds per run, one per round}, {side: (amount, bytes, flops) of a run}, {side: peak bytes}."""
    if CASES[name].checkpoint:
        folder_of(s, CASES[name].checkpoint, "ours")        # so that no side's memory counts the making of it
    sides, facts, often, times = {}, {}, {}, {}
    for side in ("ours", *CASES[name].peers):
        sides[side] = started(name, side, s)
        facts[side] = sides[side]("facts")                  # when this is answered, it is built
    for side, ask in sides.items():     # to warm up
        took = min(ask(1), ask(1))
        often[side], times[side] = math.ceil(0.05 / took) if s.device == "cuda" else 1, []      # short kernels
    for _ in range(s.rounds):           # in turn
        for side, ask in sides.items():
            times[side].append(ask(often[side]))
    return times, facts, {side: ask("peak") for side, ask in sides.items()}


# ---- Report

def row(name, s, roof):                 # a line of the table per peer (one with dashes where there is none)
    case, (times, facts, peaks) = CASES[name], measure(name, s)
    median = {side: statistics.median(taken) for side, taken in times.items()}
    took, (amount, read, flops) = median["ours"], facts["ours"]
    share = f"{100 * max(read / roof[0], flops / roof[1]) / took:.0f}%" if read or flops else "-"
    spread = 100 * (max(times["ours"]) / min(times["ours"]) - 1)
    theirs = {peer: (f"{facts[peer][0] / slow:.4g}", f"{slow / took:.2f}", f"{peaks[peer] / 2 ** 30:.2f}")
              for peer, slow in median.items() if peer != "ours"}
    for peer, (rate, faster, gib) in (theirs or {"-": ("-",) * 3}).items():
        yield (f"| {name} | {amount / took:.4g} {case.unit}/s | {rate} | {peer} | {faster} | {share} "
               f"| {spread:.0f}% | {peaks['ours'] / 2 ** 30:.2f} | {gib} | {s.rounds}, {datetime.date.today()} |")


def machine(s):                         # the machine in words
    if s.device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    lines = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*: (.*)", lines)
    return f"{name[1] if name else platform.processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def write(s, roof, rows):
    """Put rows into the device's table in BENCHMARKS.md in place of older ones; cut models have their own table."""
    path, mark = HERE / "BENCHMARKS.md", f"{s.device}, {s.layers} layers" if s.layers else s.device
    old = path.read_text() if path.exists() else "# Benchmarks\n\nThe docstring of bench.py says how they are made.\n"
    found = re.search(f"<!-- {mark} -->.*<!-- /{mark} -->", old, re.S)
    older = set(CASES) - {line.split()[1] for line in rows}     # no rows of cases that are gone
    kept = found[0].splitlines() if found else []
    rows = rows + [line for line in kept if line.startswith("| ") and line.split()[1] in older]
    rows.sort(key=lambda line: list(CASES).index(line.split()[1]))
    text = "\n".join([
        f"<!-- {mark} -->", f"`python bench.py {shlex.join(sys.argv[1:])}`, {machine(s)}, {str(s.dtype)[6:]}; it reads "
        f"{roof[0] / 1e9:.1f} GB/s, multiplies {roof[1] / 1e12:.3f} TFLOP/s (command of the newest rows).", "",
        "| case | ours | theirs | who | times faster | of the limit | spread | GiB ours | GiB theirs | rounds, day |",
        "|---|---|---|---|---|---|---|---|---|---|", *rows, f"<!-- /{mark} -->"])
    path.write_text(old.replace(found[0], text) if found else f"{old}\n{text}\n")


def native(device):                     # the name of the floats that a device is quickest in
    can = torch.cpu.get_capabilities()
    return "bfloat16" if device == "cuda" or can.get("avx512_bf16") or can.get("amx_bf16") else "float32"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = p.add_mutually_exclusive_group(required=True)
    for name in ("cpu", "cuda"):
        device.add_argument(f"--{name}", dest="device", action="store_const", const=name)
    p.add_argument("--only", nargs="+", choices=CASES, metavar="NAME", help=f"of {', '.join(CASES)}")
    p.add_argument("--rounds", type=int, default=5, help="times that each side runs (default 5)")
    p.add_argument("--threads", type=int, default=2, help="of the CPU (default 2)")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"),
                   help="of both sides (bfloat16; float32 on a CPU that would have to emulate it)")
    p.add_argument("--layers", type=int, default=0, help="cut towers and language models to so many, for a quick look")
    p.add_argument("--folder", type=Path, default=Path("runs/bench"), help="for checkpoints (default runs/bench)")
    p.add_argument("--side", help=argparse.SUPPRESS)        # what started gives
    s = SimpleNamespace(**vars(p.parse_args()))
    s.dtype = getattr(torch, s.dtype or native(s.device))
    torch.set_num_threads(s.threads)
    torch.set_grad_enabled(False)
    if s.side:
        return serve(CASES[s.only[0]], s.side, s)
    roof, rows = limits(s), []
    for name in s.only or [name for name, case in CASES.items() if s.device in case.devices.split()]:
        for line in row(name, s, roof):
            rows.append(line)
            print(line, flush=True)
    write(s, roof, rows)


if __name__ == "__main__":
    main()
