"""Speed and memory beside what a user would pick instead: same weights, same inputs, in turn A B A B, medians.

    python bench.py --cpu --threads 2
    python bench.py --cuda --only decode decode-int4

In order: sizes, checkpoints, cases, measuring, the report. Random checkpoints of the sizes below are written once to
--folder by transformers and converted like anybody's. Peak memory comes from a fresh process per side. A share is
what the machine's own limit would take (weights read at the speed of a matrix-vector product, operations at that of a
large matrix product, both measured first) over what we took. The table goes to BENCHMARKS.md.
"""
import argparse
import datetime
import json
import math
import platform
import re
import resource
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import attention
import convert_weights
import model as M
import quantize

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
PROMPT, NEW, TRAIN = 512, 32, (2, 256)  # tokens of a prompt, of an answer, of a training batch


class Job(NamedTuple):
    """One side of a case: what to time, and how much a run does."""
    run: object                         # a function of nothing
    amount: float                       # units per run
    bytes: float = 0                    # weights read per run
    flops: float = 0


class Case(NamedTuple):
    """A row of the table. build(side, settings, *args) gives the Job of "ours" or of one of the peers."""
    build: object
    args: tuple
    unit: str                           # "/s" of it is printed
    peers: tuple = ("transformers",)
    devices: str = "cpu cuda"


# ---- Checkpoints

def folder_of(s, name, side):
    """The folder of a random bfloat16 checkpoint in theirs or our format, made where it is absent."""
    import transformers
    kind, sizes = {"llm": ("Llama", LLM[s.device]), "small": ("Llama", SMALL_LLM), "clip": ("CLIPVision", CLIP)}[name]
    sizes = sizes | {"num_hidden_layers": s.layers or sizes["num_hidden_layers"]}
    home = s.folder / f"{name}-{s.device}-{sizes['num_hidden_layers']}"
    if not (home / "ours").exists():
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**sizes)
        made = getattr(transformers, "LlamaForCausalLM" if kind == "Llama" else "CLIPVisionModel")(config)
        made.bfloat16().save_pretrained(home / "transformers")
        convert_weights.convert([home / "transformers"], home / "ours")
    return home / side


def load(s, name, side, dtype=torch.bfloat16):
    """A side's model in eval mode on the device."""
    folder = folder_of(s, name, side)
    if side == "ours":
        return M.load(folder, s.device, dtype)
    import transformers
    kind = transformers.CLIPVisionModel if name == "clip" else transformers.LlamaForCausalLM
    return kind.from_pretrained(folder, dtype=dtype).to(s.device).eval()


def tokens(s, rows, n):
    g = torch.Generator().manual_seed(1)
    return torch.randint(3, 32000, (rows, n), generator=g).to(s.device)


def n_weight(model, *without):
    """Weights that every token meets."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith(without or ("-",)))


# ---- Cases

def prefill(side, s):
    model, ids = load(s, "llm", side), tokens(s, 1, PROMPT)
    if side != "ours":
        return Job(lambda: model(ids, use_cache=True, logits_to_keep=1), PROMPT)
    llm = model.llm
    return Job(lambda: llm.lm_head(llm(llm.embed(ids), M.KVCache(llm, 1, PROMPT))[:, -1]), PROMPT,
               flops=2 * PROMPT * n_weight(llm, "embed", "lm_head"))


def answer(model, ids, n, side):
    """Greedy answer of exactly n tokens."""
    if side != "ours":
        return model.generate(ids, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0)
    return list(M.generate(model, model.llm.embed(ids), max_new_tokens=n))


def decode(side, s, bits):
    """Peers stay in bfloat16, which is what their users have without a further package."""
    model, ids = load(s, "llm", side), tokens(s, 1, 8)
    size = 0
    if side == "ours":
        size = 2 * n_weight(model.llm, "embed")
        model.cfg = replace(model.cfg, eos=())
        M.fuse(model)
        if bits < 16:
            quantize.quantize(model, bits)
            size = sum(x.numel() * x.element_size() for x in model.llm.buffers())
    return Job(lambda: answer(model, ids, NEW, side), NEW, bytes=NEW * size)


def start(side, s):
    """From the files to the first token, page cache warm."""
    ids = tokens(s, 1, 8)
    folder_of(s, "llm", side)
    return Job(lambda: answer(load(s, "llm", side), ids, 1, side), 1)


def clip(side, s, batch):
    tower, x = load(s, "clip", side), torch.randn(batch, 3, 336, 336, device=s.device, dtype=torch.bfloat16)
    if side != "ours":
        return Job(lambda: tower(x, output_hidden_states=True).hidden_states[-2], batch)
    tower = tower.readers.clip.tower
    return Job(lambda: tower(x), batch, flops=2 * batch * 577 * n_weight(tower, "patch", "pos", "cls"))


def imagebind(side, s, kind, *shape):
    """Huge towers; no other package that people install has them, so the row stands beside the limit alone."""
    c = M.ImageBindConfig({kind: M.ImageBindConfig().towers[kind]})
    tower = M.ImageBind(c).to(s.device, torch.bfloat16).eval()
    x = torch.randn(1, *shape, device=s.device, dtype=torch.bfloat16)
    n_token = math.prod(shape[:-3]) * (c.towers[kind].n_patch + 1)
    return Job(lambda: tower(kind, x), 1, flops=2 * n_token * n_weight(tower.towers[kind].blocks))


def train(side, s):
    """Forward, backward, AdamW on every weight, float32 with bfloat16 autocast."""
    model, ids = load(s, "small", side, torch.float32).train().requires_grad_(), tokens(s, *TRAIN)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-5)

    @torch.enable_grad()
    def run():
        with torch.autocast(s.device, torch.bfloat16):
            loss = (M.lm_loss(model.llm.lm_head, model.llm(model.llm.embed(ids)), ids) if side == "ours" else
                    model(ids, labels=ids).loss)
        loss.backward()
        opt.step()
        opt.zero_grad()
    n = n_weight(model, "llm.embed", "model.embed")
    return Job(run, math.prod(TRAIN), flops=6 * n * math.prod(TRAIN))


def fused_attention(side, s, hd, causal, backward):
    """16 k tokens of 2048 / hd heads at length 4096; flops count what causal attention needs."""
    B, nh, T = 4, 2048 // hd, 4096
    q, k, v, do = torch.randn(4, B, nh, T, hd, device=s.device, dtype=torch.bfloat16)
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
    flops *= 2.5
    return Job(lambda: torch.autograd.grad(out, (q, k, v), do, retain_graph=True), flops / 1e12, flops=flops)


CASES = {
    "prefill": Case(prefill, (), "token"),
    "decode": Case(decode, (16,), "token"),
    "decode-int8": Case(decode, (8,), "token"),
    "decode-int4": Case(decode, (4,), "token"),
    "start": Case(start, (), "first token"),
    "clip": Case(clip, (1,), "image"),
    "clip-8": Case(clip, (8,), "image"),
    "imagebind-image": Case(imagebind, ("vision", 3, 224, 224), "image", ()),
    "imagebind-audio": Case(imagebind, ("audio", 3, 1, 128, 204), "sound", ()),
    "train": Case(train, (), "token"),
} | {f"attention-{hd}{'-causal' * causal}{'-backward' * backward}":
     Case(fused_attention, (hd, causal, backward), "TFLOP", ("cudnn", "flash"), "cuda")
     for hd in (64, 80, 128) for causal in (False, True) for backward in (False, True)}


# ---- Measuring

def seconds(job, s, n=1):
    """Of one run, over n of them."""
    if s.device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(n):
        job.run()
    if s.device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / n


def limits(s):
    """Bytes per second of products of a vector and matrices that no cache holds, operations per second of a large."""
    n = 4096 if s.device == "cpu" else 16384
    weights = torch.randn(8, n, n, device=s.device, dtype=torch.bfloat16)
    read = Job(lambda: [F.linear(weights[0, :1], w) for w in weights], 1)
    multiply = Job(lambda: weights[0, :, :n // 2] @ weights[1, :n // 2], 1)
    best = [min(seconds(job, s) for _ in range(s.rounds)) for job in (read, multiply)]
    return weights.numel() * 2 / best[0], n ** 3 / best[1]


def measure(case, s):
    """{side: seconds per run, one per round}, {side: Job}: warmed up, then in turn."""
    jobs = {side: case.build(side, s, *case.args) for side in ("ours", *case.peers)}
    often = {side: max(1, math.ceil(0.05 / min(seconds(job, s) for _ in range(2)))) for side, job in jobs.items()}
    often = {side: n if s.device == "cuda" else 1 for side, n in often.items()}         # short kernels: many a round
    times = {side: [] for side in jobs}
    for _ in range(s.rounds):
        for side, job in jobs.items():
            times[side].append(seconds(job, s, often[side]))
    return times, jobs


def peak(name, side, s):
    """Peak bytes of one side in a process of its own."""
    command = [sys.executable, __file__, f"--{s.device}", "--only", name, "--peak", side, "--threads", str(s.threads),
               "--layers", str(s.layers), "--folder", str(s.folder)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def run_once(case, side, s):
    """What --peak runs."""
    case.build(side, s, *case.args).run()
    if s.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024                        # Linux counts in KiB


# ---- Report

def row(name, s, roof):
    """A line of the table per peer (one with dashes where there is none)."""
    case = CASES[name]
    times, jobs = measure(case, s)
    memory = {side: peak(name, side, s) / 2 ** 30 for side in jobs}
    took, job = statistics.median(times["ours"]), jobs["ours"]
    share = f"{100 * max(job.bytes / roof[0], job.flops / roof[1]) / took:.0f}%" if job.bytes or job.flops else "-"
    spread = 100 * (max(times["ours"]) / min(times["ours"]) - 1)
    for peer in case.peers or ("-",):
        theirs = statistics.median(times[peer]) if peer in times else None
        rate, faster, theirs_gib = ((f"{jobs[peer].amount / theirs:.4g}", f"{theirs / took:.2f}", f"{memory[peer]:.2f}")
                                    if theirs else ("-", "-", "-"))
        yield (f"| {name} | {job.amount / took:.4g} {case.unit}/s | {rate} | {peer} | {faster} | {share} "
               f"| {spread:.0f}% | {memory['ours']:.2f} | {theirs_gib} |")


def machine(s):
    """The machine in words."""
    if s.device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    lines = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*: (.*)", lines)
    return f"{name[1] if name else platform.processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def write(s, roof, rows):
    """Put the device's table into BENCHMARKS.md in place of an older one."""
    path, date = HERE / "BENCHMARKS.md", datetime.date.today()
    lines = [f"<!-- {s.device} -->", f"`python bench.py {shlex.join(sys.argv[1:])}`, {date}, {machine(s)}; it reads "
             f"{roof[0] / 1e9:.1f} GB/s, multiplies {roof[1] / 1e12:.2f} TFLOP/s in bfloat16; {s.rounds} rounds.", "",
             "| case | ours | theirs | who | times faster | of the limit | spread | GiB ours | GiB theirs |",
             "|---|---|---|---|---|---|---|---|---|", *rows, f"<!-- /{s.device} -->"]
    text = "\n".join(lines)
    old = path.read_text() if path.exists() else "# Benchmarks\n\nThe docstring of bench.py says how they are made.\n"
    found = re.search(f"<!-- {s.device} -->.*<!-- /{s.device} -->", old, re.S)
    path.write_text(old.replace(found[0], text) if found else f"{old}\n{text}\n")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = p.add_mutually_exclusive_group(required=True)
    for name in ("cpu", "cuda"):
        device.add_argument(f"--{name}", dest="device", action="store_const", const=name)
    p.add_argument("--only", nargs="+", choices=CASES, metavar="NAME", help=f"of {', '.join(CASES)}")
    p.add_argument("--rounds", type=int, default=5, help="times that each side runs (default 5)")
    p.add_argument("--threads", type=int, default=2, help="of the CPU (default 2)")
    p.add_argument("--layers", type=int, default=0, help="cut every model to so many: quick, BENCHMARKS.md stays")
    p.add_argument("--folder", type=Path, default=Path("runs/bench"), help="for checkpoints (default runs/bench)")
    p.add_argument("--peak", metavar="SIDE", help="run one side of one case once and print its peak memory in bytes")
    s = SimpleNamespace(**vars(p.parse_args()))
    torch.set_num_threads(s.threads)
    torch.set_grad_enabled(False)
    if s.peak:
        print(run_once(CASES[s.only[0]], s.peak, s))
        return
    roof, rows = limits(s), []
    for name in s.only or [name for name, case in CASES.items() if s.device in case.devices.split()]:
        for line in row(name, s, roof):
            rows.append(line)
            print(line, flush=True)
    if not s.layers:
        write(s, roof, rows)


if __name__ == "__main__":
    main()
