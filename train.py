"""One training loop for every system and stage, on one core or many GPUs. A row of STAGES is one: what learns and how.

    python train.py system=tiny stage=1 data=shapes/captions.json tokenizer=shapes/tokenizer.model out=runs/tiny1
    python train.py system=tiny stage=2 data=shapes/conversations.json init=runs/tiny1/weights out=runs/tiny2
    torchrun --standalone --nproc-per-node 8 train.py system=chatbind stage=2 init=weights/chatbind data=chat.json out=runs/2

In order: settings, stages, schedules, what learns and how fast, one step, preparing, the loop.
Flags are the fields of Settings, written --steps 100, --steps=100 or steps=100. The same command again resumes, on
any number of processes: they share out weights, gradients and optimizer (ranks.py) and compute what one would.
"""
import argparse
import difflib
import json
import math
import random
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from collections import ChainMap, Counter, deque
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import chain, count, islice
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import datasets
import model as M
from ranks import (FULL, checkpoints, fill, find_checkpoint, gather_once, join, leave_ranks, local, plan, ranks,
                   restore, rows, save_checkpoint, shard, share, step_of, whole)


# ---- Settings and stages

@dataclass
class Settings:
    config: str = ""                    # JSON of settings, such as settings.json of a run; flags beside it count more
    system: str = "tiny"                # with stage: the row of STAGES
    stage: int = 1
    data: str = "shapes/conversations.json"     # files, FORMAT:FILE (see datasets.py), commas between; or a folder
    media: str = ""                     # folder of media, or of a folder for each source of a mixture; default: data's
    init: str = ""                      # weights folder to start from; empty: a new model of the preset called `system`
    templates: str = ""                 # what samples ask: JSON or folder of the originals, or v0; default: our words
    front: int = 0                      # 1 = media go before the words of their message (sep_image_conv_front)
    tokenizer: str = ""                 # tokenizer.model for a new model
    projector: str = ""                 # stage 1's learned tensors (its model.safetensors), laid over init
    out: str = "runs/tiny"              # checkpoints, metrics.jsonl and, at the end, the folder `weights`
    export: str = ""                    # write the model, as the newest checkpoint has it, as this folder, and leave
    epochs: float = 0                   # this and the next eight: the default = the stage's own
    batch: int = 0                      # samples per update, whatever the number of processes
    lr: float = 0.0
    warmup: float = -1.0                # share of steps in which lr rises
    weight_decay: float = -1.0
    beta2: float = 0.0                  # of AdamW
    save_every: int = 0
    keep: int = 0                       # newest checkpoints kept
    max_len: int = 0                    # tokens per sample; of a longer one the last words go
    steps: int = 0                      # overrides epochs
    micro: int = 0                      # samples per forward of a process; the rest is accumulated; 0 = all at once
    pack: int = 0                       # put short samples into common rows of so many tokens; 0 = a row for each
    clip: float = 1.0                   # gradient norm; 0 = as it comes
    seed: int = 0
    workers: int = 2                    # loader processes; the order of the data does not depend on them
    log_every: int = 10
    max_bad: int = 100                  # unusable records that may be replaced
    skip_nonfinite: int = 0             # updates that may be left out because a loss or gradient is not finite
    resume: str = "auto"                # auto, none, or a checkpoint folder
    device: str = ""                    # default: cuda if there is one
    precision: str = ""                 # of the maths: bf16 or fp32; default: bf16 on a GPU, else fp32
    checkpoint: str = ""                # recompute backward: block = all of a block, select = all but its products
    compile: int = 0                    # 1 = torch.compile every block
    save_dtype: str = ""                # of the final weights: float16, bfloat16; default as trained
    plan: int = 0                       # print what learns, and memory on so many processes (init may be a preset)
    stop_after: int = 0                 # leave after so many steps with a checkpoint, as a signal would


@dataclass(frozen=True)
class Stage:
    learn: str                          # parameters that learn: regex, matched in full against their names
    lr: float
    batch: int
    epochs: float = 1
    rows: tuple[str, ...] = ()          # of the embedding, only the rows of these tokens learn
    rates: dict = field(default_factory=dict)       # parameters (regex) that learn at so many times the rate
    schedule: str = "cosine"            # row of SCHEDULES
    warmup: float = 0.03
    first_lr: float = 0.0               # of the very first update, whatever the schedule says; 0 = as it says
    weight_decay: float = 0.0
    beta2: float = 0.999
    draw: bool = False                  # caption files teach to draw, not to caption
    save_every: int = 1000
    keep: int = 3
    max_len: int = 2048
    mock: bool = False                  # every micro-batch ends with datasets.mock
    sam: bool = True                    # SAM sees the pictures, and where all boxes have masks these are learned
    ordered: bool = False               # batches come in the order of the mixture
    weights: dict = field(default_factory=dict)     # of losses by name; the others count once
    hush: str = ""                      # a batch with losses of this writer teaches no text
    turns: bool = False                 # data sets take turns, a batch of each, until the largest was seen
    words: bool = False                 # learn no sentences but which words each has, see Model.word_loss


OWN = Settings.__dataclass_fields__.keys() & Stage.__dataclass_fields__.keys()     # what a flag may override
TOWER, PROJECTOR, SIGNALS = r"readers\.\w+\.tower\..*", r"readers\.\w+\.projector\..*", r"writers\.\w+\.proj\..*"
TOKENS, LORA = r"llm\.embed\.weight|llm\.lm_head\.weight", r"llm\..*\.lora_[AB]"
BOXES, MASKS = r"readers\.box\..*|writers\.at\.loc_decoder\..*", r"writers\.at\.seg_prompt_mlp\..*|writers\.at\.sam\..*"
TINY_WORDS = r"readers\.imagebind\..*|writers\.at\.loc_decoder\..*"
MASK_DECODER = r"writers\.at\.seg_prompt_mlp\..*|writers\.at\.sam\.mask_decoder\..*"
LOCATOR = r"writers\.vg\.query\..*|writers\.vg\.locator\.(?!swin\.).*"
NEXTCHAT = Stage(rf"{PROJECTOR}|llm\..*|{BOXES}", lr=2e-5, batch=64, epochs=3, max_len=4096, save_every=5000, mock=True,
                 sam=False, weights={"at_l1": 2, "at_giou": 0.2})
# parity: ChatterBox's Swin runs without gradient. All rows of the vocabulary learn.
CHATTERBOX = Stage(rf"{TOKENS}|{LORA}|readers\.region\..*|{LOCATOR}", lr=3e-5, batch=960, epochs=5, schedule="linear",
                   warmup=1 / 300, beta2=0.95, save_every=50, weights={"vg_focal": 2, "vg_l1": 5, "vg_giou": 2},
                   hush="vg")
# parity: all of the embedding and of lm_head learn in every stage, and the first update has a rate of its own
NEXTGPT = Stage(f"{TOKENS}|{PROJECTOR}", lr=5e-4, batch=18, schedule="logarithmic", warmup=0.1, first_lr=4e-4,
                weight_decay=1e-3, beta2=0.95, max_len=512, turns=True)
# The union: first what stands between the parts, then the language model too, then what outlines and what finds.
OMNI_JOINTS = rf"{TOKENS}|{PROJECTOR}|{BOXES}|readers\.region\..*|writers\.vg\.query\..*|{SIGNALS}"
OMNI = Stage(OMNI_JOINTS, lr=5e-4, batch=64, weights=NEXTCHAT.weights | CHATTERBOX.weights | {"vid_l2": 2})
TINY = Stage(r".*", lr=1e-3, batch=16, warmup=0.05, beta2=0.99, rates={TOWER: 0.3, SIGNALS: 3},
             weights={"at_l1": 0.5, "at_giou": 0.05, "at_cycle_hidden": 0.01, "at_cycle_box": 0.1,
                      "img_l2": 0.2, "vid_l2": 0.2, "aud_l2": 0.2})
STAGES = {
    ("chatbind", 1): Stage(PROJECTOR + r"|llm\.embed\.weight", lr=2e-3, batch=128, rows=("<im_start>", "<im_end>"),
                           save_every=2400, keep=1),
    ("chatbind", 2): Stage(PROJECTOR + r"|llm\..*", lr=2e-5, batch=32, epochs=3, save_every=5000),
    ("nextchat", 1): replace(NEXTCHAT, epochs=2),
    ("nextchat", 2): replace(NEXTCHAT, save_every=4950),
    ("nextchat", 3): replace(NEXTCHAT, learn=MASK_DECODER, mock=False, sam=True, weights={"lm": 0, "at_focal": 20}),
    ("chatterbox", 1): CHATTERBOX,
    ("chatterbox", 2): replace(CHATTERBOX, ordered=True),
    ("nextgpt", 1): NEXTGPT,
    ("nextgpt", 2): replace(NEXTGPT, learn=f"{TOKENS}|{SIGNALS}", batch=8, draw=True),
    ("nextgpt", 3): replace(NEXTGPT, learn=f"{TOKENS}|{LORA}|{PROJECTOR}|{SIGNALS}", batch=4, first_lr=5e-4,
                            weights={"vid_l2": 2}),
    ("omni", 1): OMNI,
    ("omni", 2): replace(OMNI, learn=OMNI_JOINTS + r"|llm\..*", lr=2e-5, epochs=2),
    ("omni", 3): replace(OMNI, learn=f"{MASK_DECODER}|{LOCATOR}", lr=2e-5,
                         weights=OMNI.weights | {"lm": 0, "at_focal": 20}),
    # Encoders first learn words: with a language model that knows nothing yet they would learn to say the same of all.
    # The words' own vectors stay as they are: what is seen comes to lie close to them, where a look-up finds it.
    ("tiny", 1): Stage(TINY_WORDS, lr=2e-3, batch=16, warmup=0.05, beta2=0.99, words=True,
                      weights={"words": 6, "at_l1": 10, "at_giou": 1}),
    ("tiny", 2): TINY,
    ("tiny", 3): Stage(MASKS, lr=2e-3, batch=16, warmup=0.05, beta2=0.99, weights={"lm": 0, "at_focal": 20}),
}
CHOICES = {"precision": ("", "bf16", "fp32"), "checkpoint": ("", "block", "select"),
           "save_dtype": ("", "float16", "bfloat16", "float32")}


def with_stage(s):
    """Settings with the stage's own numbers where no flag gives others, and its row of STAGES."""
    if (s.system, s.stage) not in STAGES:
        known = ", ".join(f"{system} {number}" for system, number in STAGES)
        raise SystemExit(f"train: no stage {s.stage} of {s.system}; there are: {known}")
    stage = STAGES[s.system, s.stage]
    own = {name: getattr(stage, name) for name in OWN if getattr(s, name) == getattr(Settings, name)}
    return replace(s, **own), stage


def integer(text):
    """An int, written 1000 or 1e3, or a switch, true or false."""
    number = float({"true": 1, "false": 0}.get(text.lower(), text))
    if not number.is_integer():
        raise ValueError
    return int(number)


def parser():
    """A flag for every field of Settings; --help lists them."""
    notes = dict(re.findall(r"^    (\w+): .*?  # (.*)$", Path(__file__).read_text(), re.M))
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    for f in fields(Settings):
        note = f"{notes.get(f.name, '')} (default {f.default!r})".replace("%", "%%")
        p.add_argument(*dict.fromkeys(f"--{f.name.replace('_', by)}" for by in "-_"), dest=f.name, help=note,
                       type=integer if f.type is int else f.type, metavar=f.type.__name__, choices=CHOICES.get(f.name))
    return p


def parse_settings(argv):
    """Settings from the command line. An unknown name ends with the nearest known ones."""
    p, argv = parser(), [re.sub(r"^(\w[\w-]*=)", r"--\1", word) for word in argv]
    if path := p.parse_known_args(argv, Settings())[0].config:
        try:
            argv = [f"--{name}={value}" for name, value in json.loads(Path(path).read_text()).items()] + argv
        except (ValueError, AttributeError) as error:
            p.error(f"{path}: no JSON object of settings ({error})")
    s, unknown = p.parse_known_args(argv, Settings())
    if unknown:
        near = difflib.get_close_matches(unknown[0].lstrip("-").split("=")[0], asdict(s))
        p.error(f"there is no {unknown[0]}; near it: {', '.join(near) or 'nothing'}")
    for name, x in asdict(s).items():
        if not isinstance(x, str) and x != getattr(Settings, name) and not 0 <= x < math.inf:
            p.error(f"{name}={x}: give a number from 0 on")
    s.device = s.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return s


# ---- Schedules: factor of the learning rate at an update

def schedule(step, steps, warmup):
    """Linear from 0 over ceil(warmup * steps), then half a cosine to 0."""
    rise = math.ceil(warmup * steps)
    return step / rise if step < rise else 0.5 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1)))


def linear(step, steps, warmup):
    """Linear from 0 over ceil(warmup * steps), then linear to 0 (ChatterBox)."""
    rise = math.ceil(warmup * steps)
    return step / rise if step < rise else max(0, steps - step) / max(steps - rise, 1)


def logarithmic(step, steps, warmup):
    """Logarithmic over max(10, warmup * steps), then linear to 0. parity: NExT-GPT's scheduler runs one update late."""
    rise, step = max(10, int(warmup * steps)), max(step - 1, 0)
    return math.log(step + 1) / math.log(rise) if step < rise else max(0, steps - step) / max(steps - rise, 1)


SCHEDULES = {"cosine": schedule, "linear": linear, "logarithmic": logarithmic}


# ---- What learns and how fast

def learn(model, stage):
    """Freeze all but what the stage names -> {name: parameter} of that. ValueError for a part that names nothing."""
    named = dict(model.named_parameters())
    for part in re.split(r"\|(?![^(]*\))", stage.learn):         # not at those in parentheses
        if not any(re.fullmatch(part, name) for name in named):
            raise ValueError(f"stage: {part} matches no parameter of this model")
    learned = {name: p for name, p in named.items() if re.fullmatch(stage.learn, name)}
    for name, p in named.items():
        p.requires_grad_(name in learned)
    if stage.rows:
        learn_rows(model, stage.rows)
    return learned


def learn_rows(model, tokens):
    """Of the embedding, let only the rows of these tokens learn."""
    embed, ids = model.llm.embed.weight, torch.tensor([model.cfg.added_tokens[token] for token in tokens])
    keep = torch.zeros(len(embed), 1).index_fill(0, ids, 1)[rows(embed)].to(embed.device)   # of the rows that lie here
    def only_rows(p):
        local(p.grad).mul_(keep)
    embed.register_post_accumulate_grad_hook(only_rows)


def optimizer(learned, stage, s):
    """AdamW over what learns, a group for each of its rates. An embedding of which some rows learn does not decay."""
    groups = {}
    for name, p in learned.items():
        factor = next((factor for part, factor in stage.rates.items() if re.fullmatch(part, name)), 1.0)
        decay = 0.0 if stage.rows and name == "llm.embed.weight" else s.weight_decay
        group = groups.setdefault((factor, decay), {"params": [], "factor": factor, "weight_decay": decay})
        group["params"].append(p)
    return torch.optim.AdamW([*groups.values()], lr=0, betas=(0.9, s.beta2), fused=True)


# ---- One step

def counts(batch):
    """What the losses of a batch are means of: labelled tokens as lm, a writer's signal tokens, and boxes put in."""
    out = Counter({name: target["slots"].shape[1] for name, target in batch.targets.items()})
    out["lm"] = (batch.labels[:, 1:] != data.IGNORE).sum().item() or len(batch.ids)
    if at := batch.targets.get("at"):
        mock = (1 - 1e-10) * ("mock" in at)                     # which counts as little as in locate.mean
        out["at"] -= mock
        out["at_cycle_box"] = len(at["given"]) - mock
    return out


def none_of(payload):
    """No media of the same kind; no regions still have a picture to lie in."""
    if torch.is_tensor(payload):
        return payload[:0].clone()
    return {k: x[:k == "image"].clone() for k, x in payload.items()}


def common_target(target, held):
    """A writer's targets, lent where there are none, without what only some hold, as masks. held: {owner: parts}."""
    owner = min(held)
    if len(held) < ranks()[1]:
        lent = share(target if ranks()[0] == owner else None)[owner]
        target = target or lent | {"slots": torch.zeros_like(lent["slots"])}
    common = set.intersection(*held.values())
    return {part: x for part, x in target.items() if part in common}


def like_others(batches):
    """Yield micro-batches with media (none) and targets of the kinds that any rank has: all must run the same parts."""
    kinds = share([{kind: none_of(payload) for kind, payload in b.media.items()} for b in batches])
    parts = share([{name: set(target) for name, target in b.targets.items()} for b in batches])    # [rank][micro-batch]
    for batch, nones, held in zip(batches, zip(*kinds), zip(*parts)):
        media = dict(sorted({**ChainMap(*nones), **batch.media}.items()))
        slots = dict.fromkeys(media, torch.zeros(2, 0, dtype=torch.long)) | batch.slots
        targets = {name: common_target(batch.targets.get(name), {i: x[name] for i, x in enumerate(held) if name in x})
                   for name in sorted(set().union(*held))}
        yield batch._replace(media=media, slots=slots, targets=targets)


def portions(losses, own, of_all):
    """Losses of a micro-batch as parts of the means over all. own, of_all: its counts, and the sum of those of all."""
    parts = {}
    for name, value in losses.items():
        part = next((part for part in (name, name.split("_")[0]) if part in of_all), "lm")
        parts[name] = value * (own[part] / of_all[part])     # 0 of lent ones: so a gradient reaches what others teach
    return parts


def total_loss(losses, stage, others=()):
    """The weighted sum of losses. Text does not count beside losses that hush it, these or others of the update."""
    weights = dict(stage.weights)
    if stage.hush in {name.split("_")[0] for name in (*losses, *others)}:
        weights["lm"] = 0
    return sum(weights.get(name, 1) * value for name, value in losses.items())


def backward(model, batches, device, stage, bf16):
    """Gradients of the micro-batches of all ranks -> this rank's parts of the losses, means over all however cut up."""
    rank, world = ranks()
    shares = share([counts(batch) for batch in batches])                    # [rank][micro-batch]
    of_all, here = sum(chain(*shares), Counter()), Counter()
    for i, batch in enumerate(like_others(batches) if world > 1 else batches):
        if world > 1:
            model.set_requires_gradient_sync(i == len(batches) - 1)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):     # weights stay float32
            losses = model(data.to_device(batch, device), words=stage.words)
        parts = portions(losses, shares[rank][i], of_all)
        here.update({name: part.detach() for name, part in parts.items()})
        (total_loss(parts, stage, of_all) * world).backward()               # FSDP takes the mean over ranks
    return {name: value.item() for name, value in here.items()}


def update(model, opt, batches, lr, clip, stage, step=0, bf16=False):
    """One optimizer step over the micro-batches of all ranks -> named losses, and the gradient norm before clipping.
    FloatingPointError on every rank, naming step and loss, before any weight is touched, if something is not finite."""
    learned = sum((group["params"] for group in opt.param_groups), [])
    here, total = backward(model, batches, learned[0].device, stage, bf16), Counter()
    norm = next(whole([torch.nn.utils.clip_grad_norm_(learned, clip or math.inf)])).item()
    for losses in share(here):
        total.update(losses)
    for name, value in ({f"loss {name}": loss for name, loss in total.items()} | {"the gradient norm": norm}).items():
        if not math.isfinite(value):
            raise FloatingPointError(f"step {step}: {name} is {value}; the last checkpoint is untouched")
    for group in opt.param_groups:
        group["lr"] = lr * group.get("factor", 1.0)
    opt.step()
    opt.zero_grad(set_to_none=True)
    return dict(total), norm


# ---- Preparing

def new_model(system, tokenizer):
    """A random model of a preset, its vocabulary taken from a tokenizer."""
    if system not in M.PRESETS or not tokenizer:
        raise SystemExit("train: name weights to start from, init=FOLDER, or for a new model tokenizer=FILE")
    cfg = M.PRESETS[system]
    size = data.Tokenizer(tokenizer).sp.vocab_size()
    added = {token: size + i for i, token in enumerate(data.SYSTEMS[cfg.system].added)}
    model = M.Model(replace(cfg, llm=replace(cfg.llm, vocab_size=size + len(added)), added_tokens=added))
    M.initialise(model)
    return model


def widen(model, precision):
    """Give the tensors of a model that knows what learns the types they train in."""
    for layer in model.modules():
        for p in layer.parameters(recurse=False):
            if p.requires_grad or precision == "fp32" or not isinstance(layer, torch.nn.Linear):
                p.data = p.data.float()


def show_plan(s):
    """Print what learns, and what memory a step takes on each process, in GB, as `plan` counts it."""
    s, stage = with_stage(s)
    init = s.init or next(name for name, cfg in M.PRESETS.items() if cfg.system == s.system)
    with torch.device("meta"):
        model = M.Model(M.PRESETS[init] if init in M.PRESETS else M.read_config(init)).to(torch.bfloat16)
    learn(model, stage)
    micro = s.micro or -(-s.batch // s.plan)                    # rounded up
    print(M.parameter_table(model) + f"\n\non each process, micro={micro} samples of {s.max_len} tokens at a time:")
    widen(model, s.precision)
    parts = plan(model, s.plan, micro * s.max_len, s.precision != "fp32", s.checkpoint, s.batch // (micro * s.plan))
    for part, size in (parts | {"all": sum(parts.values())}).items():
        print(f"{part:12}{size / 1e9:10.2f} GB")


def load_model(s, stage, spread):
    """The model of `init`, `spread` over the ranks before each reads only its part of every tensor. What learns is
    float32. In bf16 maths the other matrices stay in the type of the file, and are saved as they came."""
    model, stored = M.skeleton(s.init)
    if model.cfg.quantized:
        raise SystemExit(f"train: {s.init} is {model.cfg.quantized}; training takes float weights")
    learn(model, stage)
    widen(model, s.precision)
    spread(model).to_empty(device=s.device)
    M.tie(model)
    fill(M.tensors_of(model), stored, s.init)
    return model


def numbers(prepared, s, stage):
    """Batches of sample numbers, epoch after epoch."""
    for epoch in count():
        if stage.turns:
            yield from datasets.in_turns([*map(len, prepared.sets)], s.batch, s.seed + epoch)
        else:
            ordered = stage.ordered and Path(s.data).is_dir()           # files that are named are no mixture
            for batch in data.epoch_batches(prepared.sizes, s.batch, s.seed, epoch, ordered):
                yield [i + epoch * len(prepared) for i in batch]        # see Prepared.prepare


def deaf(worker):
    """A loader's process leaves it to the loop to heed signals, which come to all processes of a group."""
    for number in LEAVE:
        signal.signal(number, signal.SIG_IGN)


def batches(prepared, s, stage, start):
    """This rank's micro-batches from update number `start` on, in an order that depends on nothing but the seed."""
    rank, world = ranks()
    n = s.batch // s.micro              # micro-batches per update, of all ranks
    def indices():
        for batch in map(torch.tensor, numbers(prepared, s, stage)):
            parts = batch.view(-1, n).T if s.pack else batch.view(n, -1)    # (n, s.micro)
            yield from parts[rank::world].tolist()
    mock = prepared.render(datasets.mock(prepared.spec.image_size).turns) if stage.mock else None
    return DataLoader(prepared, batch_sampler=islice(indices(), start * n // world, s.steps * n // world),
                      num_workers=s.workers, worker_init_fn=deaf, pin_memory=torch.cuda.is_available(),
                      collate_fn=partial(data.collate, n_token=prepared.n_token, max_len=s.max_len, pack=s.pack,
                                         mask_pad=prepared.system.mask_pad, mock=mock),
                      generator=torch.Generator())              # its own, so that it draws nothing from the step's


def lay_over(model, path):
    """Read the tensors that another run learned into a model."""
    if Path(path).suffix != ".safetensors":
        raise SystemExit(f"train: {path}: projector takes model.safetensors of a checkpoint; a published one goes into "
                         f"init: convert_weights.py vicuna-7b/ {path} imagebind_huge.pth --out FOLDER")
    stored, named = M.mapped(path), dict(model.named_parameters())
    if unknown := stored.keys() - named.keys():
        raise SystemExit(f"train: {path}: {min(unknown)} is no tensor of this model")
    fill({name: named[name] for name in stored}, stored, path)


def begin(s):
    """Where a run starts: -> settings with the stage's numbers, types and files filled in, stage, model."""
    s, stage = with_stage(s)
    if s.pack and stage.words:
        raise SystemExit("train: this stage takes a row for a sample; leave out pack")
    torch.manual_seed(s.seed)
    random.seed(s.seed)
    s = replace(s, precision=s.precision or ("fp32" if s.device == "cpu" else "bf16"))
    spread = partial(shard, device=s.device, bf16=s.precision == "bf16", recompute=s.checkpoint, compile=s.compile)
    model = load_model(s, stage, spread) if s.init else spread(new_model(s.system, s.tokenizer).to(s.device))
    if s.projector:
        lay_over(model, s.projector)
    return replace(s, tokenizer=s.tokenizer or f"{s.init}/tokenizer.model"), stage, model.train()


def open_sets(s, stage):
    """Data sets, and in which order a folder's mixture takes their samples (None: one set after the other)."""
    prompts = datasets.load_prompts(s.templates) if s.templates else datasets.PROMPTS
    if Path(s.data).is_dir():
        return datasets.open_mixture((s.system, s.stage), s.data, s.media, s.batch, s.seed, prompts)
    return [datasets.open_set(name, s.media, stage.draw, prompts) for name in s.data.split(",")], None


def prepare(s):
    """All that a run needs: -> settings without gaps, stage, model, prepared data."""
    s, stage, model = begin(s)
    cfg, world, system = model.cfg, ranks()[1], data.SYSTEMS[model.cfg.system]
    tok, template = data.tokenizer_of(s.tokenizer, cfg), data.TEMPLATES[system.train_template]
    sets, where = open_sets(s, stage)
    if empty := [str(one.path) for one in sets if not len(one)]:
        raise ValueError(f"{', '.join(empty)}: no usable record; are the media in {s.media or 'its folder'}?")
    spec = data.MediaSpec(**cfg.media | ({} if stage.sam else {"sam_size": 0}))
    prepared = data.Prepared(sets, tok, system, template, cfg.n_token, spec, s.max_bad, bool(s.front), where, s.max_len)
    seen = max(map(len, sets)) * len(sets) if stage.turns else len(prepared)            # samples in an epoch
    batch = min(s.batch, len(prepared))
    steps, micro = s.steps or max(int(s.epochs * seen) // batch, 1), s.micro or max(batch // world, 1)
    if batch % (micro * world):
        raise SystemExit(f"train: batch = {batch} is not a multiple of micro = {micro} times {world} processes")
    return replace(s, batch=batch, steps=steps, micro=micro), stage, model, prepared


# ---- The loop

LEAVE = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT           # finish the step, save and go
PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}        # bf16 operations a second


def speed(model, device, seen, seconds):
    """Named numbers from (samples, tokens, places) of every rank: rates, shares of padding and of the peak, memory."""
    samples, tokens, places = sum(seen).tolist()
    peak, memory = None, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if device.startswith("cuda"):
        peak = next((peak for chip, peak in PEAK.items() if chip in torch.cuda.get_device_name()), None)
        memory = torch.cuda.max_memory_allocated()
    # per weight: forward 2, backward 2, its own gradient 2 more; recomputing does not count
    flops = sum(p.numel() * (4 + 2 * p.requires_grad) for name, p in model.llm.named_parameters() if "embed" not in name)
    return {"samples_per_s": round(samples / seconds, 2), "tokens_per_s": round(tokens / seconds),
            "padding": round(1 - tokens / places, 4),
            "mfu": peak and round(tokens / seconds * flops / peak / len(seen), 4), "memory_gb": round(memory / 1e9, 3)}


def write_weights(model, s, folder):
    """The model as a weights folder. Every rank takes part."""
    model.to(dtype=getattr(torch, s.save_dtype, None))          # "": as they are
    values = whole(M.tensors_of(model).values())
    if ranks()[0]:
        return deque(values, maxlen=0)                          # hand over the parts that lie here
    M.save(model, folder, extra=[s.tokenizer], values=values)
    print(f"wrote {folder}; talk to it with: python chat.py {folder}")


@contextmanager
def caught(*numbers):
    """Signals that come while inside, as a list: finish the step, save, go."""
    came = []
    with ExitStack() as undo:
        for number in numbers:
            undo.callback(signal.signal, number, signal.signal(number, lambda n, _: came.append(n)))
        yield came


def newest(s):
    """The checkpoint to go on from, or None. Raises ValueError if one that was found is of another run."""
    folder = share(find_checkpoint(s.out, s.resume) if ranks()[0] == 0 else None)[0]
    was = json.loads((folder / "state.json").read_text())["settings"] if folder and s.resume == "auto" else asdict(s)
    # what a run is of and, where it is to go on, what the order of its data depends on (which may be gone)
    names = ("system", "stage", "init", "projector") + ("data", "seed", "batch") * (not s.export)
    if odd := [f"{name}={was[name]}" for name in names if was[name] != getattr(s, name)]:
        raise ValueError(f"{folder}: of a run with {' '.join(odd)}; name another out=, or resume={folder} to go on from it")
    return folder


def open_run(out, s, model, prepared, start, folder):
    """The folder of a run, without what a run that was killed while saving left there. Says what will be done."""
    out.mkdir(parents=True, exist_ok=True)
    for left in out.glob("*.tmp-*"):
        shutil.rmtree(left)
    (out / "settings.json").write_text(json.dumps(asdict(s), indent=1))
    print(M.parameter_table(model), prepared.show(0), sep="\n\n")
    print("", *(f"{len(one):,} records of {one.path}" for one in prepared.sets), sep="\n")
    print("", " ".join(f"{name}={value}" for name, value in asdict(s).items() if value), sep="\n")
    print(f"\n{len(prepared):,} samples, {s.steps:,} steps of {s.batch} on {ranks()[1]} processes",
          f"from step {start:,} of {folder}" if folder else "", flush=True)


def one_step(model, opt, prepared, loader, s, stage, step, may_skip):
    """An update with the next batch -> named losses, gradient norm, rate, (samples, tokens, places) of this rank. No
    losses and None as the norm if it was left out; FloatingPointError if it may not be."""
    rank, world = ranks()
    random.seed(f"{s.seed}/{step}/{rank}")                      # a step's dropout depends on nothing else, and resumes
    torch.manual_seed(random.getrandbits(63))
    micro = list(islice(loader, s.batch // s.micro // world))
    size = sum(torch.tensor([s.micro, (b.ids != 0).sum(), b.ids.numel()]) for b in micro)
    lr = stage.first_lr if step == 0 and stage.first_lr else s.lr * SCHEDULES[stage.schedule](step, s.steps, s.warmup)
    try:
        return *update(model, opt, micro, lr, s.clip, stage, step, s.precision == "bf16"), lr, size
    except FloatingPointError as error:
        samples = [i % len(prepared) for i in next(islice(numbers(prepared, s, stage), step, None))]
        error = FloatingPointError(f"{error}, samples {samples}")
        if not may_skip:
            raise error from None
        opt.zero_grad(set_to_none=True)
        if rank == 0:
            tqdm.write(f"train: {error}; this update is left out", file=sys.stderr)
        return {}, None, lr, size


def show(row, out):
    """The newest numbers: a line of metrics.jsonl, and one above the bar or, where there is none, in a job's log."""
    if ranks()[0] == 0:
        with open(out / "metrics.jsonl", "a") as log:
            print(json.dumps(row, allow_nan=False), file=log)
        tqdm.write("  ".join(f"{name} {value:.5g}" for name, value in row.items() if value is not None))


def resume(s, learned, opt):
    """Go on from the newest checkpoint -> its folder, or None, and how many updates it has done."""
    folder = newest(s)
    start = restore(folder, learned, opt) if folder else 0
    if start > s.steps:
        raise SystemExit(f"train: {folder} is beyond steps={s.steps}; export=FOLDER makes weights of it")
    if s.resume != "auto" and (later := [p for p in checkpoints(s.out) if step_of(p) > start]):
        raise SystemExit(f"train: {later[-1]} is of a run that came further, from which one without resume would go "
                         "on; remove it, or name another out=")
    return folder, start


def train(s):
    """A run from its settings to its weights folder, or to the checkpoint at which it was asked to leave."""
    s, stage, model, prepared = prepare(s)
    gather_once(model)
    learned, out, rank = learn(model, stage), Path(s.out), ranks()[0]
    opt = optimizer(learned, stage, s)
    folder, start = resume(s, learned, opt)
    if rank == 0:
        open_run(out, s, model, prepared, start, folder)
    loader, since, seen, done, skipped = iter(batches(prepared, s, stage, start)), time.time(), 0, start, 0
    with caught(*LEAVE) as leave:
        for step in tqdm(range(start, s.steps), initial=start, total=s.steps, disable=None if rank == 0 else True):
            losses, norm, lr, size = one_step(model, opt, prepared, loader, s, stage, step, skipped < s.skip_nonfinite)
            done, skipped, seen = step + 1, skipped + (norm is None), seen + size
            if s.log_every and done % s.log_every == 0 or done == s.steps:
                row = {"step": done, **losses, "lr": lr, "grad_norm": norm, "bad": int(prepared.is_bad.sum())}
                rates = speed(model, s.device, share(seen), time.time() - since)
                show(row | {"skipped": skipped} | rates, out)
                since, seen = time.time(), 0
            leaving = any(share(bool(leave) or done == s.stop_after))       # one rank got a signal: all go
            if leaving or done % s.save_every == 0 or done == s.steps:
                save_checkpoint(out, done, learned, opt, asdict(s), s.keep)
            if leaving:
                break
    if done == s.steps:
        write_weights(model, s, out / "weights")
    elif rank == 0:
        print(f"stopped after step {done}; the same command goes on from there")


def export(s):
    """The newest checkpoint of a run as a weights folder. Its data may be gone."""
    s, stage, model = begin(s)
    if not (folder := newest(s)):
        raise SystemExit(f"train: {s.out} has no checkpoint to export")
    learned = learn(model, stage)
    restore(folder, learned, optimizer(learned, stage, s))
    write_weights(model, s, Path(s.export))


def advice(error, out):
    """What to do about an error that other settings or a larger disk prevent; nothing about any other."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
        return "lower micro (the batch stays as it is) or max_len, or set checkpoint=block"
    if isinstance(error, FloatingPointError):
        return "lower lr, or look at these samples"
    if getattr(error, "errno", None) in FULL:
        return f"make room in {out}"


def main(argv=None):
    """Run with the command line's settings; a run that cannot go on says what to do, its last checkpoint untouched."""
    s = parse_settings(argv if argv is not None else sys.argv[1:])
    if s.plan:
        return show_plan(s)
    join(s.device)
    try:
        (export if s.export else train)(s)
    except Exception as error:
        traceback.clear_frames(error.__traceback__)     # ends the loader's processes, for which Python would wait
        if not (what := advice(error, s.out)):
            raise
        print(f"train: {data.told(error)}: {what}; the same command goes on from the last checkpoint", file=sys.stderr)
        raise SystemExit(4) from None
    finally:
        leave_ranks()


if __name__ == "__main__":
    data.program(main)
