"""One training loop for every system and stage. A stage is a row of STAGES: what learns, on what, with which numbers.

    python train.py system=tiny stage=1 data=shapes/captions.json tokenizer=shapes/tokenizer.model out=runs/tiny1
    python train.py system=tiny stage=2 data=shapes/conversations.json init=runs/tiny1/weights out=runs/tiny2
    python train.py system=chatbind stage=1 init=weights/chatbind data=cc3m/chat.json media=cc3m/images out=runs/stage1

In order: settings, stages, what learns and how fast, one step, checkpoints, the loop.
Flags are the fields of Settings, written --steps 100, --steps=100 or steps=100. Running the same command again resumes.
"""
import argparse
import hashlib
import json
import math
import random
import re
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from itertools import count, islice
from pathlib import Path

import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import model as M


# ---- Settings and stages

@dataclass
class Settings:
    system: str = "tiny"                # with stage: the row of STAGES
    stage: int = 1
    data: str = "shapes/conversations.json"     # one or more LLaVA or caption files, separated by commas
    media: str = ""                     # folder that media names start from; default: beside each file
    init: str = ""                      # weights folder to start from; empty: a new model of the preset called `system`
    tokenizer: str = ""                 # tokenizer.model for a new model
    projector: str = ""                 # stage 1's learned tensors (its model.safetensors), laid over init
    out: str = "runs/tiny"              # checkpoints, metrics.jsonl and, at the end, the folder `weights`
    epochs: float = 0                   # this and the next six: 0 = the stage's own
    steps: int = 0                      # overrides epochs
    batch: int = 0                      # samples per update, whatever the number of devices
    lr: float = 0.0
    save_every: int = 0
    keep: int = 0                       # newest checkpoints kept
    micro: int = 0                      # samples per forward; batch / micro are accumulated; 0 = batch
    max_len: int = 2048                 # tokens per sample
    warmup: float = 0.03                # share of steps in which lr rises
    clip: float = 1.0                   # gradient norm
    weight_decay: float = 0.0
    beta2: float = 0.999                # of AdamW
    seed: int = 0
    workers: int = 2
    log_every: int = 10
    max_bad: int = 100                  # unusable records that may be replaced
    resume: str = "auto"                # auto, none, or a checkpoint folder
    device: str = ""                    # default: cuda if there is one
    precision: str = ""                 # of the maths: bf16 or fp32; default: bf16 on a GPU, else fp32
    save_dtype: str = ""                # of the final weights: float16, bfloat16; default as trained
    stop_after: int = 0                 # leave after so many steps with a checkpoint, as a signal would


@dataclass(frozen=True)
class Stage:
    learn: str                          # parameters that learn: regex, matched in full against their names
    lr: float
    batch: int
    epochs: float = 1
    rows: tuple[str, ...] = ()          # of the embedding, only the rows of these tokens learn
    slow: str = ""                      # parameters (regex) that learn at `slow_lr` times the rate
    slow_lr: float = 1.0
    save_every: int = 1000
    keep: int = 3


PROJECTOR = r"readers\.\w+\.projector\..*"
TOWER = r"readers\.\w+\.tower\..*"
STAGES = {
    ("chatbind", 1): Stage(PROJECTOR + r"|llm\.embed\.weight", lr=2e-3, batch=128, rows=("<im_start>", "<im_end>"),
                           save_every=2400, keep=1),
    ("chatbind", 2): Stage(PROJECTOR + r"|llm\..*", lr=2e-5, batch=32, epochs=3, save_every=5000),
    # A new encoder at the full rate learns within 100 steps to say the same of every picture, and stays there long.
    ("tiny", 1): Stage(r".*", lr=1.5e-3, batch=48, slow=TOWER, slow_lr=0.1),
    ("tiny", 2): Stage(r".*", lr=1e-3, batch=48, slow=TOWER, slow_lr=0.3),
}


def parse_settings(argv):
    """Settings from the command line; --help lists every field. An unknown name ends with the nearest known ones."""
    notes = dict(re.findall(r"^    (\w+): .*?  # (.*)$", Path(__file__).read_text(), re.M))
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for f in fields(Settings):
        note = f"{notes.get(f.name, '')} (default {f.default!r})".replace("%", "%%")
        p.add_argument(f"--{f.name.replace('_', '-')}", f"--{f.name}", dest=f.name, type=f.type, default=f.default,
                       metavar=f.type.__name__, help=note)
    argv = [a if a.startswith("-") or "=" not in a else f"--{a}" for a in argv]
    return Settings(**vars(p.parse_args(argv)))


# ---- What learns and how fast

def learn(model, stage):
    """Freeze all but what the stage names; returns {name: parameter} of what learns.

    Raises ValueError if a part of the pattern names nothing. Embedding rows outside stage.rows get no gradient.
    """
    named = dict(model.named_parameters())
    for part in stage.learn.split("|"):
        if not any(re.fullmatch(part, name) for name in named):
            raise ValueError(f"stage: {part} matches no parameter of this model")
    for name, p in named.items():
        p.requires_grad_(re.fullmatch(stage.learn, name) is not None)
    if stage.rows:
        rows = torch.tensor([model.cfg.added_tokens[token] for token in stage.rows])
        keep = torch.zeros(len(model.llm.embed.weight), 1, device=model.llm.embed.weight.device)
        keep[rows] = 1
        model.llm.embed.weight.register_hook(lambda grad: grad * keep)
    return {name: p for name, p in named.items() if p.requires_grad}


def optimizer(learned, stage, s):
    """AdamW over what learns, in two groups if a part of it learns slowly."""
    slow = [bool(stage.slow) and re.fullmatch(stage.slow, name) is not None for name in learned]
    groups = [{"params": [p for p, is_slow in zip(learned.values(), slow) if is_slow == which], "factor": factor}
              for which, factor in ((False, 1.0), (True, stage.slow_lr))]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0, betas=(0.9, s.beta2), weight_decay=s.weight_decay)


def parameter_table(model):
    """Lines 'part, parameters, of which learn, dtype', one per part of the model."""
    parts = {}
    for name, p in model.named_parameters():
        row = parts.setdefault(".".join(name.split(".")[:3 if name.startswith("readers") else 1]), [0, 0, p.dtype])
        row[0] += p.numel()
        row[1] += p.numel() * p.requires_grad
    lines = [f"{part:32}{n:>16,}{k:>16,}  {str(dtype)[6:]}" for part, (n, k, dtype) in parts.items()]
    return "\n".join([f"{'part':32}{'parameters':>16}{'learn':>16}", *lines])


def schedule(step, steps, warmup):
    """Factor of the learning rate: linear from 0 over ceil(warmup * steps), then half a cosine to 0."""
    rise = math.ceil(warmup * steps)
    if step < rise:
        return step / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1)))


# ---- One step

def to_device(batch, device):
    def move(x):
        return {k: move(v) for k, v in x.items()} if isinstance(x, dict) else x.to(device, non_blocking=True)
    return data.Batch(*map(move, batch))


def update(model, learned, opt, batches, lr, clip, step=0, bf16=False):
    """One optimizer step over micro-batches of equal weight -> mean named losses, gradient norm before clipping.

    Raises FloatingPointError naming step and loss before a weight is touched if anything is not finite.
    """
    device, total = next(iter(learned.values())).device, {}
    amp = torch.autocast(device.type, torch.bfloat16, enabled=bf16)         # weights stay float32
    for batch in batches:
        with amp:
            losses = model(to_device(batch, device))
        for name, value in losses.items():
            if not torch.isfinite(value):
                raise FloatingPointError(f"step {step}: loss {name} is {value.item()}; the last checkpoint is untouched")
            total[name] = total.get(name, 0) + value.item() / len(batches)
        (sum(losses.values()) / len(batches)).backward()
    norm = nn.utils.clip_grad_norm_(learned.values(), clip)
    if not torch.isfinite(norm):
        raise FloatingPointError(f"step {step}: the gradient norm is {norm.item()}; the last checkpoint is untouched")
    for group in opt.param_groups:
        group["lr"] = lr * group.get("factor", 1.0)
    opt.step()
    opt.zero_grad(set_to_none=True)
    return total, norm.item()


# ---- Checkpoints

def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else \
            hashlib.sha256(f.read()).hexdigest()


def names_of(learned, opt):
    """Parameter names in the order in which the optimizer numbers them."""
    names = {id(p): name for name, p in learned.items()}
    return [names[id(p)] for group in opt.param_groups for p in group["params"]]


def save_checkpoint(out, step, learned, opt, settings, keep):
    """Write out/step_N, whole or not at all: what learned, optimizer, random states, hashes. Then drop the oldest."""
    names, (version, key, *rest) = names_of(learned, opt), random.getstate()
    moments = {f"{k}.{names[i]}": v.contiguous() for i, s in opt.state_dict()["state"].items() for k, v in s.items()}
    rng = {"rng.torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        rng["rng.cuda"] = torch.cuda.get_rng_state()
    with M.new_folder(Path(out) / f"step_{step:06}") as folder:
        save_file({k: v.detach().contiguous() for k, v in learned.items()}, folder / "model.safetensors")
        save_file(moments | rng, folder / "optim.safetensors")
        state = {"step": step, "settings": asdict(settings), "random": [version, list(key), *rest],
                 "sha256": {p.name: sha256(p) for p in sorted(folder.iterdir())}}
        state["self"] = hashlib.sha256(json.dumps(state).encode()).hexdigest()
        (folder / "state.json").write_text(json.dumps(state, allow_nan=False))
    for old in sorted(p for p in Path(out).glob("step_*") if valid(p))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def valid(folder):
    """The state of a complete, undamaged checkpoint, else None."""
    try:
        state = json.loads((Path(folder) / "state.json").read_text())
        whole = state.pop("self") == hashlib.sha256(json.dumps(state).encode()).hexdigest()
        whole = whole and all(sha256(Path(folder) / name) == digest for name, digest in state["sha256"].items())
        return state if whole else None
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def find_checkpoint(out, resume):
    """The folder to resume from, or None. auto: the newest valid one in `out`; says which damaged ones it passes over."""
    if resume not in ("auto", "none"):
        if not valid(resume):
            raise SystemExit(f"train: {resume} is not a complete checkpoint")
        return Path(resume)
    for folder in sorted(Path(out).glob("step_??????"), reverse=True) if resume == "auto" else ():
        if valid(folder):
            return folder
        print(f"passing over {folder}: damaged", file=sys.stderr)


def restore(folder, learned, opt):
    """Put a checkpoint back, exactly; returns the number of steps done. Raises ValueError if other tensors learned then."""
    state, weights = valid(folder), load_file(Path(folder) / "model.safetensors")
    if odd := sorted(weights.keys() ^ learned.keys()):
        raise ValueError(f"{folder}: holds other tensors than this stage learns, such as {odd[0]}")
    with torch.no_grad():
        for name, p in learned.items():
            p.copy_(weights[name])
    saved, names = load_file(Path(folder) / "optim.safetensors"), names_of(learned, opt)
    moments = {i: {k: saved[f"{k}.{name}"] for k in ("step", "exp_avg", "exp_avg_sq")} for i, name in enumerate(names)
               if f"step.{name}" in saved}
    opt.load_state_dict({**opt.state_dict(), "state": moments})
    torch.set_rng_state(saved["rng.torch"])
    if "rng.cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["rng.cuda"])
    version, key, *rest = state["random"]
    random.setstate((version, tuple(key), *rest))
    return state["step"]


# ---- The loop

def new_model(system, tokenizer):
    """A random model of a preset, its vocabulary taken from a tokenizer."""
    cfg = M.PRESETS[system]
    size = data.Tokenizer(tokenizer).sp.vocab_size()
    added = {token: size + i for i, token in enumerate(data.SYSTEMS[cfg.system].added)}
    model = M.Model(replace(cfg, llm=replace(cfg.llm, vocab_size=size + len(added)), added_tokens=added))
    M.initialise(model)
    return model


def batches(prepared, s, start):
    """Micro-batches from update number `start` on, in an order that depends on nothing but the seed."""
    micro = s.micro or s.batch

    def indices():
        for epoch in count():
            for batch in data.epoch_batches(prepared.sizes, s.batch, s.seed, epoch):
                yield from (batch[i:i + micro] for i in range(0, len(batch), micro))
    per_update = s.batch // micro
    return DataLoader(prepared, batch_sampler=islice(indices(), start * per_update, s.steps * per_update),
                      num_workers=s.workers, pin_memory=torch.cuda.is_available(),
                      collate_fn=lambda r: data.collate(r, prepared.n_token, max_len=s.max_len),
                      generator=torch.Generator())              # its own, so that the global random state resumes exactly


def prepare(s):
    """Model, data and numbers of a run: -> settings with the stage's numbers filled in, stage, model, prepared data."""
    if (s.system, s.stage) not in STAGES:
        known = ", ".join(f"{system} {number}" for system, number in STAGES)
        raise SystemExit(f"train: no stage {s.stage} of {s.system}; there are: {known}")
    stage = STAGES[s.system, s.stage]
    torch.manual_seed(s.seed)
    random.seed(s.seed)
    tokenizer = s.tokenizer or f"{s.init}/tokenizer.model"
    model = M.load(s.init, dtype=torch.float32) if s.init else new_model(s.system, tokenizer)
    if s.projector:
        extra = load_file(s.projector)
        if unknown := model.load_state_dict(extra, strict=False).unexpected_keys:
            raise SystemExit(f"train: {s.projector}: {unknown[0]} is no tensor of this model")
    cfg = model.cfg
    system = data.SYSTEMS[cfg.system]
    tok, template = data.Tokenizer(tokenizer, cfg.added_tokens, system.legacy), data.TEMPLATES[system.train_template]
    sets = [data.Conversations(path, s.media or None) for path in s.data.split(",")]
    prepared = data.Prepared(sets, tok, system, template, cfg.n_token, data.MediaSpec(**cfg.media), s.max_bad)
    own = {name: getattr(s, name) or getattr(stage, name) for name in ("epochs", "batch", "lr", "save_every", "keep")}
    steps = s.steps or max(int(own["epochs"] * len(prepared)) // own["batch"], 1)
    device = s.device or ("cuda" if torch.cuda.is_available() else "cpu")
    precision = s.precision or ("bf16" if device == "cuda" else "fp32")
    s = replace(s, **own, steps=steps, tokenizer=tokenizer, device=device, precision=precision)
    if s.micro and s.batch % s.micro:
        raise SystemExit(f"train: batch = {s.batch} is not a multiple of micro = {s.micro}")
    return s, stage, model.to(device).train(), prepared


def first_sample(prepared):
    """The first sample as the model sees it, what it learns in brackets."""
    tok, out = prepared.tok, prepared[0]
    runs = [(label != data.IGNORE, tok.names.get(id) or tok.sp.id_to_piece(id)) for id, label in zip(out.ids, out.labels)]
    text = "".join(("[" if on and not before else "]" if before and not on else "") + piece
                   for (on, piece), (before, _) in zip(runs, [(False, "")] + runs))
    return text.replace("▁", " ") + "]" * runs[-1][0]


def main(argv=None):
    s, stage, model, prepared = prepare(parse_settings(argv if argv is not None else sys.argv[1:]))
    learned, out = learn(model, stage), Path(s.out)
    out.mkdir(parents=True, exist_ok=True)
    for left in out.glob("*.tmp-*"):
        shutil.rmtree(left)             # of a run that was killed while saving
    opt = optimizer(learned, stage, s)
    print(parameter_table(model), first_sample(prepared), sep="\n\n")
    (out / "settings.json").write_text(json.dumps(asdict(s), indent=1))
    folder = find_checkpoint(out, s.resume)
    first = restore(folder, learned, opt) if folder else 0
    print(f"\n{len(prepared):,} samples, {s.steps:,} steps of {s.batch}", f"from step {first:,} of {folder}" if folder else "")

    leave = []                          # signals that came: finish the step, save, go
    handlers = {number: signal.signal(number, lambda n, _: leave.append(n))
                for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    loader, per_update = iter(batches(prepared, s, first)), s.batch // (s.micro or s.batch)
    bar, log = tqdm(range(first, s.steps), initial=first, total=s.steps, disable=None), open(out / "metrics.jsonl", "a")
    began, tokens = time.time(), 0
    for step in bar:
        micro = list(islice(loader, per_update))
        lr = s.lr * schedule(step, s.steps, s.warmup)
        losses, norm = update(model, learned, opt, micro, lr, s.clip, step, s.precision == "bf16")
        tokens += sum(b.ids.numel() for b in micro)
        done = step + 1
        if done % s.log_every == 0 or done == s.steps:
            speed = round(tokens / (time.time() - began))
            row = {"step": done, **losses, "lr": lr, "grad_norm": norm, "tokens_per_s": speed}
            print(json.dumps(row, allow_nan=False), file=log, flush=True)
            bar.set_postfix({k: f"{v:.3g}" for k, v in row.items() if k != "step"})
        if done % s.save_every == 0 or done == s.steps or leave or done == s.stop_after:
            save_checkpoint(out, done, learned, opt, s, s.keep)
        if leave or done == s.stop_after:
            break
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if leave or done < s.steps:
        return print(f"stopped after step {done}; the same command goes on from there")
    model.to(dtype=getattr(torch, s.save_dtype) if s.save_dtype else None)
    M.save(model, out / "weights", extra=[s.tokenizer])
    print(f"wrote {out / 'weights'}; talk to it with: python chat.py {out / 'weights'}")


if __name__ == "__main__":
    main()
