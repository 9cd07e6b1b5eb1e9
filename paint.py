"""Training of painters (generate.py): a UNet and its text tower together, and for sounds a vocoder first.

    python paint.py shapes/drawings.json --out weights/tiny/painters/image
    python paint.py shapes/video_pairs.json --out weights/tiny/painters/video --fast
    python paint.py shapes/audio_pairs.json --out weights/tiny/painters/audio
    python paint.py unseen/drawings.json --judge weights/tiny/painters/image --known shapes/drawings.json --page a.png
    python paint.py shapes/drawings_wishes.json --embed weights/tiny/painters/image     # captions as a writer's targets
    python paint.py cc3m.json --embed weights/sd15          # likewise for NExT-GPT, by its own painters
    python paint.py weights/tiny --writers weights/tiny/painters --out runs/writers     # then stage 2 of train.py, and
    python paint.py unseen/drawings_wishes.json --judge runs/tiny2/weights --known shapes/drawings_wishes.json

In order: painters, media, vocoder, UNet and text tower, captions, judging, writers, the command.
Letters: as in generate.py. Papers: diffusion that predicts clean patches (Li and He 2025, Back to basics), loss weights
(Hang et al. 2023, min-SNR), mel frames as the loss of a vocoder (Kong et al. 2020, HiFi-GAN). Files are caption pairs,
as shapes.py writes them.
"""
import argparse
import json
import math
import re
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageSequence
from tqdm import tqdm

import chat
import data
import datasets
import generate as G
import model as M
import shapes

# ---- Painters
# One row per kind of media: what learns to paint the small world.

TEXT = G.TextConfig(dim=48, n_layer=2, n_head=4, mlp_dim=128, max_len=20, act="gelu", start=1, end=2, pad=0)
UNET = G.UNetConfig(48, (48, 64), (2, 4), (False, True), n_resnet=1, context_dim=48, groups=8)
PATCH = G.VAEConfig(patch=4, scale=1.5)
VOCODER = G.VocoderConfig(mel_bins=32, rate=8000, width=32, up_rates=(5, 4, 4), up_kernels=(15, 8, 8), kernels=(3, 7),
                          dilations=(1, 3))
# At the last step nothing of a picture may be left: what is still seen there would be believed more than the caption,
# also where it is chance (Lin et al. 2023, Common diffusion noise schedules and sample steps are flawed).
HOW = {"scheduler": "dpm", "clean": True, "steps": 20, "guidance": 1.5, "beta_end": 0.03}
PAINTERS = {
    "image": G.PainterConfig(UNET, PATCH, TEXT, **HOW, size=(32, 32)),
    "video": G.PainterConfig(replace(UNET, widths=(32, 40), n_head=(8, 4), video=True), PATCH, TEXT, **HOW,
                             size=(8, 32, 32)),         # frames, pixels
    "audio": G.PainterConfig(
        replace(UNET, channels=16, widths=(16, 24), context_dim=0, class_dim=32), replace(PATCH, channels=1),
        replace(TEXT, out_dim=32, max_len=34), VOCODER, **HOW, size=(2.0,))}
KINDS = {"img": "image", "vid": "video", "aud": "audio"}


# ---- Media

def read_captions(path):
    """-> the kind of media of a file, (caption, wish for it or "", path of the medium) of each."""
    path = Path(path)
    rows = json.loads(path.read_text())
    try:
        kind = re.sub("output_|_name", "", next(iter(rows[0])))                 # image_name, or output_image of a wish
        if "conversations" not in rows[0]:
            return kind, [(row["caption"], "", path.parent / row[f"{kind}_name"]) for row in rows]
        return kind, [(row[f"{kind}_captions"], row["conversations"][0]["value"], path.parent / row[f"output_{kind}"])
                      for row in rows]
    except (LookupError, TypeError):
        raise ValueError(f"{path}: holds no caption pairs, as shapes.py writes them") from None


def samples(path, voice, n):            # (n,) at the vocoder's rate
    x, rate = data.read_audio(path)
    x = data.resample(x[:1], rate, voice.rate)[0]
    return F.pad(x, (0, n))[:n]


def log_mel(x, voice):
    """Samples (T,) -> (T / hop, mel_bins) around -1..1: a frame every 10 ms, of the 25 ms around it."""
    around = voice.rate // 40 - voice.hop                       # samples of a window that are not the frame's own
    mel = data.fbank(F.pad(x, (around // 2, around)), voice.mel_bins, voice.rate)
    return (mel[:len(x) // voice.hop].clamp(min=-12) + 6) / 6


def read_medium(file, kind, cfg):       # uint8 (3, H, W) or (F, 3, H, W); of a sound its frames (1, T, mel_bins)
    if kind == "audio":
        return log_mel(samples(file, cfg.vocoder, int(cfg.size[0] * cfg.vocoder.rate)), cfg.vocoder)[None]
    high, wide = cfg.size[-2:]
    with Image.open(file) as image:
        frames = [frame.convert("RGB").resize((wide, high), Image.BOX) for frame in ImageSequence.Iterator(image)]
    frames = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
    if kind == "image":
        return frames[0]
    return frames[torch.linspace(0, len(frames) - 1, cfg.size[0]).round().long()]           # evenly over it


# ---- Training

def load_painter(folder, kind):         # ValueError for one that paints other media
    painter = M.load_painter(folder, dtype=torch.float32)
    if KINDS[painter.cfg.kind] != kind:
        raise ValueError(f"{folder}: paints no {kind}")
    return painter


def new_painter(kind, tokenizer):
    """The last layer of every residual branch and of the UNet is zero, so that training starts from plain sums."""
    text = replace(PAINTERS[kind].text, vocab_size=data.Tokenizer(tokenizer).sp.vocab_size())
    painter = G.Painter(replace(PAINTERS[kind], text=text))
    if painter.unet.class_embedding:    # of a unit vector that tells what to paint: it weighs as much as the time
        nn.init.normal_(painter.unet.class_embedding.weight)
    for name, p in painter.named_parameters():
        if name.endswith((".conv2.weight", ".proj_out.weight", "conv4.3.weight", "unet.conv_out.weight")):
            nn.init.zeros_(p)
    return painter


def fit(parameters, loss_of, n, steps, batch, lr, name, save=lambda: None):
    """AdamW for so many steps of random samples out of n; lr rises over a twentieth, then falls along a cosine."""
    opt, mean = torch.optim.AdamW(parameters, lr, (0.9, 0.99), weight_decay=0.01, fused=True), 0
    bar, saves = tqdm(range(steps), desc=name, mininterval=10), {*range(500, steps, 500), steps}
    for step in bar:
        opt.param_groups[0]["lr"] = lr * min(20 * (step + 1) / steps, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        loss = loss_of(torch.randint(n, (batch,)))              # (B,) rows
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        mean += (loss.item() - mean) / min(step + 1, 50)        # of the last 50 or so
        bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
        if step + 1 in saves:
            save()


def fit_vocoder(vocoder, mels, voice, *how):
    """A vocoder whose sounds have the log-mel frames of the originals, and the loudness of each band."""
    # finer spectra would teach it silence: it repeats itself with every frame, so that its pitches are whole multiples
    # of the frames' rate
    def loss_of(rows):
        made, real = torch.stack([log_mel(x, voice) for x in vocoder(mels[rows])]), mels[rows]
        loud, want = (3 * made).exp(), (3 * real).exp()         # (B, T, mel_bins), so that what is loud weighs more
        return (made - real).abs().mean() + (loud - want).abs().mean() / want.mean() / 2
    fit(list(vocoder.parameters()), loss_of, len(mels), *how)


# ---- UNet and text tower

def fit_unet(painter, learned, media, ids, fast, *how):
    """Teach what is learned of a painter the clean latents at a random step. media (n, ...); ids (n + 1, T) of their
    captions and of no text; how: what `fit` takes from its steps on."""
    cfg = painter.cfg
    levels = G.signal_levels(cfg.beta_start, cfg.beta_end)                                  # (1000,) from 1 to 0

    def error(ids, x, t, noise):
        told = painter.text(ids)
        told = {"text": painter.unet.read(told)} if cfg.unet.context_dim else {"classes": told}
        a = levels[t].view(-1, *[1] * (x.ndim - 1))                                         # (B, 1, ...)
        wrong = painter.unet(a.sqrt() * x + (1 - a).sqrt() * noise, t, **told) - x
        return ((a / (1 - a)).clamp(1, 5) * wrong ** 2).mean()                              # 1 to 5, by signal left
    quick = torch.compile(error) if fast else error

    def loss_of(rows):
        told = torch.where(torch.rand(len(rows), 1) < 0.1, ids[-1], ids[rows])              # guidance needs no text too
        x = media[rows]                                         # pixels 0..255, or mel frames, which stay what they are
        x = painter.vae.encode(x / 127.5 - 1 if x.dtype == torch.uint8 else x)      # (B, C, h, w) or (B, F, C, h, w)
        x = x.transpose(1, 2).contiguous() if cfg.unet.video else x                         # (B, C, F, h, w)
        t, noise = torch.randint(1000, (len(rows),)), torch.randn_like(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            loss = quick(told, x, t, noise)
            if cfg.unet.video:          # first frames alone too: where it starts is learned before which way it goes
                loss = loss + error(told, x[:, :, :1], t, noise[:, :, :1])
        return loss
    fit(learned, loss_of, len(media), *how)


# ---- Captions

def encode_captions(painter, folder, captions):
    """What a painter's text tower makes of captions: (n, T, C) or (n, C). Its tokenizer lies beside the weights."""
    cfg, device = painter.cfg.text, painter.text.embed.weight.device
    ids = caption_ids(cfg, splitter(cfg, folder), captions)
    if cfg.out_dim:                     # CLAP does not look at padding
        ids = ids[:, :(ids != cfg.pad).sum(1).max()]
    return torch.cat([painter.text(some.to(device)).cpu() for some in ids.split(64)])


@lru_cache
def splitter(cfg, folder):              # text -> ids, by the tokenizer that lies beside a painter's weights
    if (folder / "tokenizer.model").exists():
        return data.Tokenizer(folder / "tokenizer.model").sp.encode
    for name in ("merges.txt", "vocab.json")[:1 + bool(cfg.out_dim)]:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing; copy it from the tokenizer of the original")
    if cfg.out_dim:
        return data.RobertaTokenizer(folder).encode
    return data.CLIPTokenizer(folder / "merges.txt", "<|endoftext|>" if cfg.pad else "!").encode


def caption_ids(cfg, encode, captions):
    """Captions as sentences of a text tower, (n, T): start, pieces, end, padding. encode: text -> ids."""
    length = cfg.max_len - (cfg.pad + 1 if cfg.out_dim else 0)                              # CLAP counts from there
    # parity: of a long caption NExT-GPT's pictures, padded with the end token, keep the end; all others the start
    part = slice(2 - length, None) if cfg.pad == cfg.end else slice(length - 2)
    return torch.tensor([[cfg.start, *encode(text)[part], cfg.end, *[cfg.pad] * length][:length] for text in captions])


# ---- Judging

def shown(kind, x, rate=0):
    """Pixels, or samples at a rate, as shapes.judge wants them: a picture, a list of them, or samples at its rate."""
    if kind == "audio":
        return data.resample(torch.as_tensor(x)[None], rate, shapes.RATE)[0].numpy()
    if kind == "video":
        return [Image.fromarray(np.asarray(frame)) for frame in x]
    return Image.fromarray(np.asarray(x))


@torch.no_grad()
def paint(folder, kind, captions):      # what a painter makes of captions
    painter, out = load_painter(folder, kind), []
    rate = painter.cfg.vocoder.rate if painter.cfg.vocoder else 0
    for i in tqdm(range(0, len(captions), 20), desc="painting", disable=None):
        made = G.DRAW[painter.cfg.kind](painter, encode_captions(painter, folder, captions[i:i + 20]), seed=i)
        out += [shown(kind, x, rate) for x in made]
    return out


def ask(folder, kind, wishes):
    """What a chat model draws when it is asked to, in a conversation for each wish; None: nothing of that kind."""
    session, out = chat.open_session(folder, dtype="float32"), []
    if kind not in {KINDS[name] for name in session.painters}:
        raise ValueError(f"{folder}: has no painter for {kind}; put the folder `painters` into it")
    for seed, wish in enumerate(tqdm(wishes, desc="asking", disable=None)):
        session.clear()
        session.set("seed", seed)
        session.ask(wish)
        drawn = [shown(kind, one.content, one.rate) for one in session.last().drawn if KINDS[one.kind] == kind]
        out.append(next(iter(drawn), None))
    return out


def judge(kind, captions, made):
    """Shares of media that show what their captions say: {what: share}, all of it last. None shows nothing."""
    right = Counter()
    for caption, one in zip(captions, made):
        row = shapes.judge(kind, caption, one) if one is not None else {"all": False}
        right.update({what: bool(yes) for what, yes in row.items()} | {"all": all(row.values())})
    return {what: round(n / len(captions), 3) for what, n in right.items()}


def tile(made):
    """A picture of a picture, of four frames of a clip, or of the log-mel frames of a sound; 128 pixels high."""
    if made is None:                    # a wish that brought nothing
        made = Image.new("RGB", (128, 128), "white")
    if isinstance(made, list):
        frames = made[::max(len(made) // 4, 1)][:4]
        made = Image.fromarray(np.concatenate(frames, axis=1))
    elif isinstance(made, np.ndarray):
        mel = data.fbank(torch.from_numpy(made).float(), 64, shapes.RATE).T.flip(0)         # (bins, T), low ones below
        made = Image.fromarray(((mel + 16) * 10).clamp(0, 255).byte().numpy())
    return made.convert("RGB").resize((round(made.width * 128 / made.height), 128), Image.NEAREST)


def page(made, captions, columns=4):    # tiles with their captions below, as one picture
    tiles = [tile(one) for one in made]
    wide, high = max(max(t.width for t in tiles), 330) + 8, 128 + 22
    sheet = Image.new("RGB", (columns * wide, -(-len(tiles) // columns) * high), "white")
    for i, (one, caption) in enumerate(zip(tiles, captions)):
        x, y = i % columns * wide + 4, i // columns * high
        sheet.paste(one, (x, y + 2))
        ImageDraw.Draw(sheet).text((x, y + 132), caption, "black")
    return sheet


# ---- Writers of a language model

def wished(path, writer):
    """{file of its embedding: caption} of all that answers ask a writer for, in a file of any format of NExT-GPT's."""
    captions = {}
    for i, row in enumerate(data.read_records(path)):
        with data.naming(path, i, row):
            asked = data.parts_of(datasets.turns_of(row, path.parent, draw=True), data.Signal)
            new = {one.path: one.caption for one in asked if one.writer == writer}
            if None in new.values():
                raise data.DataError("no caption for what it asks for")
        captions |= new
    return captions


@torch.no_grad()
def embed(args):
    """What a text tower makes of the captions of a file: embed/NAME.npy beside it, as NExT-GPT's training wants them."""
    painter = M.load(args.embed, build=G.Painter, cls=G.PainterConfig)      # mapped: only its text tower is read
    if not painter.text:
        raise ValueError(f"{args.embed}: this painter has no text tower")
    captions = wished(args.data, painter.cfg.kind)
    if not captions:
        raise ValueError(f"{args.data}: asks for nothing that {args.embed} paints")
    painter.text.float().to(M.find_device())
    (args.data.parent / "embed").mkdir(exist_ok=True)
    pairs = list(captions.items())
    for i in tqdm(range(0, len(pairs), 64), desc="embedding", disable=None):
        files, texts = zip(*pairs[i:i + 64])
        for file, x in zip(files, encode_captions(painter, args.embed, texts)):
            np.save(file, x.numpy().astype(np.float16))


def add_writers(args):
    """A model with signal tokens and a writer for each painter that had none; all else stays bit by bit what it was."""
    old = M.load(args.data)
    configs = (M.read_config(path.parent, G.PainterConfig) for path in args.writers.glob("*/config.json"))
    painters = {cfg.kind: cfg for cfg in configs}
    wanted = painters.keys() - old.cfg.projections.keys()
    added = {kind: tokens for kind, tokens in data.SYSTEMS[old.cfg.system].signals.items() if kind in wanted}
    if not added:
        raise SystemExit(f"paint: {args.data}: has a writer for every painter in {args.writers}, or its system "
                         f"{old.cfg.system} no signal tokens for them")
    torch.manual_seed(args.seed)
    new = M.Model(with_signals(old.cfg, added, painters, *old.llm.embed.weight.shape))
    M.initialise(new)
    carry_over(old, new)
    M.save(new, args.out, [args.data / "tokenizer.model"])


def carry_over(old, new):               # tensors of a model to one that has more
    state = new.state_dict()
    for name, x in old.state_dict().items():
        if x.shape != state[name].shape:                        # rows of the new tokens, (m, C)
            x = torch.cat([x, state[name][len(x):].to(x.dtype)])
        state[name] = x
    M.assign(new, state)


def with_signals(cfg, added, painters, size, dim):      # a config with these signal tokens too, from id `size` on
    names = sum(added.values(), ())
    prompters = {kind: prompter(painters[kind], dim, len(tokens)) for kind, tokens in added.items()}
    return replace(cfg, llm=replace(cfg.llm, vocab_size=size + len(names)), writes=cfg.writes | added,
                   added_tokens=cfg.added_tokens | {name: id for id, name in enumerate(names, size)},
                   projections=cfg.projections | prompters)


def prompter(cfg, dim, n_signal):
    """ProjectionConfig of what prompts a painter of the small world, in which there are fewer clips and sounds."""
    prompt = (1, cfg.text.out_dim) if cfg.text.out_dim else (cfg.text.max_len, cfg.text.dim)
    width = 96 if cfg.kind == "img" else 48
    return G.ProjectionConfig(dim, n_signal, *prompt, dim=width, n_layer=1, n_head=4, mlp_dim=2 * width)


# ---- The command

def train(args):                        # a painter from caption pairs to its weights folder
    torch.manual_seed(args.seed)
    kind, rows = read_captions(args.data)
    captions, _, files = zip(*rows)
    tokenizer = args.init / "tokenizer.model" if args.init else args.tokenizer
    painter = load_painter(args.init, kind) if args.init else new_painter(kind, tokenizer)
    cfg, learned = painter.cfg, list(painter.unet.parameters())
    media = torch.stack([read_medium(file, kind, cfg) for file in tqdm(files, desc="reading", disable=None)])
    if not args.init:                   # else who prompts the painter knows its text tower and vocoder
        learned += painter.text.parameters()
        if kind == "audio":
            fit_vocoder(painter.vocoder, media[:, 0], cfg.vocoder, args.steps, 4, 2e-3, "vocoder")
    ids = caption_ids(cfg.text, data.Tokenizer(tokenizer).sp.encode, [*captions, ""])

    def save():
        M.save(small(painter), args.out, [tokenizer])
    fit_unet(painter, learned, media, ids, args.fast, args.steps, args.batch, args.lr, "UNet", save)


def small(painter):                     # a copy for the disk: matrices in 8 bits, which paint the same, the rest in 16
    copy = deepcopy(painter).half()
    for p in copy.parameters():
        if p.ndim > 1:
            p.data = p.data.to(torch.float8_e4m3fn)
    return copy


def made_by(args, kind, captions, wishes):              # by a painter, or by a model, which has an LLM
    if "llm" not in json.loads((args.judge / "config.json").read_text()):
        return paint(args.judge, kind, captions)
    if not all(wishes):
        raise SystemExit(f"paint: {args.data}: holds no wishes; a model is judged by the *_wishes.json of shapes.py")
    return ask(args.judge, kind, wishes)


def judge_file(args):                   # of what is made of captions that are not known
    known = {caption for caption, *_ in read_captions(args.known)[1]} if args.known else ()
    kind, rows = read_captions(args.data)
    rows = [row for row in rows if row[0] not in known][:args.count]
    if not rows:
        raise SystemExit(f"paint: {args.data}: {args.known} has all its captions, so that none is left to judge by")
    captions, wishes, _ = zip(*rows)
    made = made_by(args, kind, captions, wishes)
    print(len(captions), judge(kind, captions, made))
    if args.page:
        page(made[:32], captions).save(args.page)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("data", type=Path, help="caption pairs; with --writers the model")
    add("--out", type=Path, help="weights folder to write")
    add("--tokenizer", type=Path, default=chat.TINY / "tokenizer.model", help="default %(default)s")
    add("--steps", type=int, default=9000, help="default %(default)s; a vocoder takes as many first")
    add("--batch", type=int, default=32, help="default %(default)s")
    add("--lr", type=float, default=2e-3, help="default %(default)s")
    add("--seed", type=int, default=0)
    add("--init", type=Path,
        help="a painter to go on from; text tower and vocoder stay, so that who prompts it still can")
    add("--fast", action="store_true", help="bfloat16, compiled; for clips, with AMX and a C++ compiler")
    add("--judge", type=Path, help="a painter to judge by captions, instead of training one; or a model, by wishes")
    add("--embed", type=Path, help="a painter whose text tower reads all captions, instead")
    add("--writers", type=Path, help="folder of painters for which a model gets new signal tokens and writers, instead")
    add("--known", type=Path, help="caption pairs it was trained on, which are left out")
    add("--page", help="picture to write, with the first 32 things that were judged")
    add("--count", type=int, default=300, help="captions to judge by, default %(default)s")
    args = p.parse_args(argv)
    if not (args.judge or args.embed or args.out):
        p.error("--out FOLDER is needed, for what is trained")
    M.keep_memory()
    if args.judge:
        judge_file(args)
    elif args.embed:
        embed(args)
    elif args.writers:
        add_writers(args)
    else:
        train(args)


if __name__ == "__main__":
    data.program(main)
