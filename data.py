"""From files to batches: tokenizers, prompts, media, data sets. Knows no model; sizes are passed in.

In order: tokenizers, systems and templates, images, geometry, video, audio, samples, render, collate, data sets.
Letters: B batch, T tokens, M media, S clips, F frames, H W height width; waveforms are (channels, samples) in -1..1.
What a user typed or a file holds never becomes a special token: prompts are lists of pieces that know their source.
"""
import gzip
import html
import json
import math
import random
import re
import sys
import unicodedata
import wave
from collections import defaultdict
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache, partial
from itertools import accumulate, chain, groupby
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from PIL import Image, ImageSequence

IGNORE = -100                           # label of a token that is not trained
FAULTS = ValueError, OSError, MemoryError               # what a user can mend; anything else is a mistake of ours


def told(error):
    """What an error says, in a line; of one from a loader's process without the traceback that torch puts before it."""
    return re.sub(r"(?s)^Caught .*\n", "", str(error).rstrip())[:500]


def program(main):
    """Run a program's main. A fault that its user can mend ends it with a line on stderr and status 2, no traceback."""
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None                         # as shells do: 128 + SIGINT
    except FAULTS as error:
        print(f"{Path(sys.argv[0]).stem}: {told(error)}", file=sys.stderr)
        raise SystemExit(2) from None


# ---- Tokenizers

class Piece(NamedTuple):
    """A stretch of a prompt. Only `special` pieces become special tokens; `learn` marks what training predicts."""
    text: str
    special: bool = False
    learn: bool = False
    count: int = 1                      # of a special token
    medium: object = None               # whose features replace these tokens, or the Signal that they are


CUT = Piece("", special=True)           # no token: texts on both sides of it are encoded on their own


class Tokenizer:
    """Sentencepiece LLaMA tokenizer with added tokens {token: id}, cutting as the slow one does. Raises ValueError."""
    # legacy: every stretch between special tokens is encoded on its own, so it starts with the dummy prefix. The later
    # rule (NExT-Chat) takes that prefix off again and thereby turns some words into <unk>.
    CONTROL = {"<unk>": 0, "<s>": 1, "</s>": 2}

    def __init__(self, path, added=(), legacy=True, bos=1):
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file; a tokenizer.model is needed")
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{path}: not a sentencepiece model ({str(error).splitlines()[0]})") from None
        self.added, self.legacy, self.bos = dict(added), legacy, bos
        self.special = {**self.CONTROL, **self.added}
        self.names = {id: name for name, id in self.special.items()}
        longest = sorted(self.special, key=len, reverse=True)   # first, so that none hides another that begins with it
        self.cut = re.compile("(" + "|".join(map(re.escape, longest)) + ")")

    def parse(self, text, learn=False):
        """Pieces of a trusted string, in which the names of special tokens count."""
        return [Piece(t, t in self.special, learn) for t in self.cut.split(text) if t]

    def encode(self, text, bos=True, parse_special=False):
        """Ids of a string or of pieces. A plain string never yields a special id unless parse_special is set."""
        if isinstance(text, str):
            text = self.parse(text) if parse_special else [Piece(text)]
        return self.encode_pieces(text, bos)[0]

    def encode_pieces(self, pieces, bos=True):
        """-> ids, learn flags, slots [(medium, position of its first token)]."""
        ids, learn, slots = [self.bos] * bos, [False] * bos, []
        for text, flags, special in self.runs(pieces):
            new, learned = self.encode_run(text, flags, first=len(ids) == bos)              # nothing yet but <s>
            ids, learn = ids + new, learn + learned
            if special.medium is not None:
                slots.append((special.medium, len(ids)))
            if special.text:                                    # CUT is no token
                ids += [self.special[special.text]] * special.count
                learn += [special.learn] * special.count
        return ids, learn, slots

    def runs(self, pieces):
        """Yields text up to a special piece, learn flags of its characters, that piece. Blanks at added tokens go."""
        left, text, flags = CUT, "", []
        for piece in [*pieces, CUT]:
            if piece.special:
                start = len(text) - len(text.lstrip()) if left.text in self.added else 0
                end = len(text.rstrip()) if piece.text in self.added else len(text)
                yield text[start:end], flags[start:end], piece
                left, text, flags = piece, "", []
            else:
                text += piece.text if self.legacy else piece.text.replace("▁", " ")
                flags += [piece.learn] * len(piece.text)

    def encode_run(self, text, flags, first):
        """Ids of a text, and whether each is learned: if its last character is."""
        text.encode()                                           # refuses half a surrogate pair by a ValueError
        tokens = self.sp.encode(text, out_type=str)
        ids = self.sp.piece_to_id(tokens)
        # Of a character in bytes, <0xC3> <0xA9>, the first counts. The dummy prefix is no character of the text.
        widths = [token[3] not in "89AB" if self.sp.is_byte(id) else len(token) for id, token in zip(ids, tokens)]
        learn = [flags[max(end - 2, 0)] for end in accumulate(widths)]
        if tokens and not (self.legacy or first or text[0] == " "):
            bare = tokens[0].removeprefix("▁")                  # parity: slow tokenizer with legacy=False
            if bare:
                ids[0] = self.sp.piece_to_id(bare)
            else:
                del ids[0], learn[0]
        return ids, learn

    def decode(self, ids):
        """Text of ids: ordinary runs by sentencepiece, added tokens by name, joined with single spaces; not 0, 1, 2."""
        parts = []
        for special, run in groupby(ids, lambda id: id in self.names):
            if special:
                parts += [self.names[id] for id in run if id not in self.CONTROL.values()]
            else:
                parts.append(self.sp.decode([id for id in run if id < len(self.sp)]))       # a model may have spare rows
        return " ".join(parts)


class TextStream:
    """Ids in, printable text out: holds back bytes of unfinished characters and text that may begin a stop string."""
    def __init__(self, tok, stop=()):
        self.tok, self.stop = tok, [s for s in stop if s]
        self.ids, self.shown, self.text, self.done = [], 0, "", False

    def push(self, id):
        """New text that is now certain. Sets `done` once a stop string came; the stop string is never shown."""
        self.ids.append(id)
        self.text = self.tok.decode(self.ids)
        for stop in self.stop:
            self.text, found, _ = self.text.partition(stop)
            self.done |= bool(found)
        return self.show(len(self.text) if self.done else self.safe())

    def safe(self):
        """How much of the text can no longer change."""
        end = len(self.text.rstrip("\ufffd"))                   # stands for bytes of an unfinished character
        held = (n for stop in self.stop for n in range(1, len(stop)) if self.text[:end].endswith(stop[:n]))
        return end - max(held, default=0)

    def flush(self):
        return self.show(len(self.text))

    def show(self, end):
        new, self.shown = self.text[self.shown:end], max(self.shown, end)
        return new


@lru_cache
def byte_symbols():
    """Printable stand-in for each byte, in the order of CLIP's vocabulary (GPT-2's trick: merges are lines of text)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = sorted({*range(256)}.difference(plain))            # blanks and control characters
    return dict(zip(plain + others, map(chr, [*plain, *range(256, 256 + len(others))])))


def kind_of(c):
    """L letter, N number, a blank for itself, S other white space, O the rest."""
    if c.isspace():
        return " " if c == " " else "S"
    major = unicodedata.category(c)[0]
    return major if major in "LN" else "O"


def split_words(text, first, words):
    """Stretches of a text where `first` matches it, else where `words` matches its kinds of characters."""
    kinds, at = "".join(map(kind_of, text)), 0                  # re has no \p{L}, with which the originals split
    while at < len(text):
        match = first.match(text, at) or words.match(kinds, at)
        if match:
            yield text[at:match.end()]
        at = match.end() if match else at + 1


def read_merges(path, n=None):
    """{pair of symbols: rank}, best first, of a merges.txt or a .gz of one. The first line is a title."""
    open_text = gzip.open if str(path).endswith(".gz") else open
    with open_text(path, "rt", encoding="utf-8") as f:
        return {tuple(line.split()): i for i, line in enumerate(filter(None, f.read().split("\n")[1:n]))}


def merge(parts, rank):
    """Merge neighbouring symbols of a word, best ranked pair first."""
    while known := [pair for pair in zip(parts, parts[1:]) if pair in rank]:
        best, merged = min(known, key=rank.get), parts[:1]
        for part in parts[1:]:
            if (merged[-1], part) == best:
                merged[-1] += part
            else:
                merged.append(part)
        parts = merged
    return parts


class CLIPTokenizer:
    """CLIP's lower-case byte-pair tokenizer, without ftfy, from bpe_simple_vocab_16e6.txt.gz or a merges.txt."""
    # pad: what fills up, special wherever it stands: "<|endoftext|>" or "!" (Hugging Face). Empty: zeros (OpenAI).
    WORDS = re.compile(r"L+|N|O+")      # of kinds of characters: runs of letters, single digits, runs of anything else

    def __init__(self, path, pad=""):
        self.rank = read_merges(path, 48895)                    # OpenAI's file has more lines than its vocabulary uses
        symbols = [*byte_symbols().values()]
        vocab = [*symbols, *(s + "</w>" for s in symbols), *map("".join, self.rank)]
        self.ids = {symbol: i for i, symbol in enumerate(vocab)}
        self.start, self.end = len(vocab), len(vocab) + 1
        self.special = {"<|startoftext|>": self.start, "<|endoftext|>": self.end}
        self.first = re.compile("|".join(map(re.escape, self.special)) + "|'s|'t|'re|'ve|'m|'ll|'d")
        self.pad, self.special[pad] = pad, (self.ids | self.special).get(pad, 0)

    def words(self, text):
        return split_words(re.sub(r"\s+", " ", text.strip()).lower(), self.first, self.WORDS)

    def word_ids(self, word):
        if word in self.special:
            return [self.special[word]]
        parts = [byte_symbols()[b] for b in word.encode()]
        parts[-1] += "</w>"                                     # the end of a word
        return [self.ids[part] for part in merge(parts, self.rank)]

    def encode(self, text):
        parts = re.split(f"({re.escape(self.pad)})", text) if self.pad else [html.unescape(html.unescape(text))]
        return [i for part in parts for word in self.words(part) for i in self.word_ids(word)]

    def __call__(self, text, length=77, keep_end=True):
        """(length,) int64: start, text, end, padding."""
        room = length - 2 if keep_end else None                 # parity: ChatBind, NExT-GPT: long texts lose their end
        ids = [self.start, *self.encode(text)[:room], self.end][:length]
        return torch.tensor(ids + [self.special[self.pad]] * (length - len(ids)))


class RobertaTokenizer:
    """RoBERTa's byte-pair tokenizer, which CLAP's text tower reads. folder: holds vocab.json and merges.txt."""
    FIRST = re.compile("'s|'t|'re|'ve|'m|'ll|'d")
    WORDS = re.compile(r" ?L+| ?N+| ?O+|[ S]+(?![^ S])|[ S]+")  # a blank belongs to the word behind it

    def __init__(self, folder):
        self.ids = json.loads((Path(folder) / "vocab.json").read_bytes())
        self.rank = read_merges(Path(folder) / "merges.txt")

    def encode(self, text):
        words = ([byte_symbols()[b] for b in word.encode()] for word in split_words(text, self.FIRST, self.WORDS))
        return [self.ids.get(part, self.ids["<unk>"]) for word in words for part in merge(word, self.rank)]


# ---- Systems and templates

@dataclass(frozen=True)
class System:
    """What a system adds to the vocabulary, how it frames a medium, and which templates it uses."""
    template: str                       # for chat
    train_template: str
    added: tuple[str, ...] = ()         # tokens, in the order the original appends them; ids come from config.json
    frame: tuple[str, str, str] = ("<im_start>", "<im_patch>", "<im_end>")  # before, one token per feature, after
    media_last: bool = False            # in chat, media follow the question on a line of their own
    legacy: bool = True                 # tokenizer rule
    box: tuple[str, ...] = ()           # tokens of a box: a reader fills the last; in answers the first asks a writer
    find: str = ""                      # token at the end of a question that asks for a box
    mask_pad: bool = False              # parity: NExT-Chat pads with <unk> and masks it, and words that became it
    signals: dict[str, tuple] = field(default_factory=dict)     # writer -> the tokens of a Signal in an answer


IM = ("<im_patch>", "<im_start>", "<im_end>")


def signals(**counts):
    """The signal tokens of writers: img=2 makes [IMG0] and [IMG1]."""
    return {name: tuple(f"[{name.upper()}{i}]" for i in range(n)) for name, n in counts.items()}


SIGNALS = signals(img=4, vid=24, aud=8)
SYSTEMS = {
    "plain": System("vicuna_v1_1", "vicuna_v1_1"),
    "tiny": System("tiny", "tiny", (*IM, "<at>", "<boxes>"), box=("<at>", "<boxes>"),
                   signals=signals(img=8, vid=4, aud=4)),       # which paint.py adds
    "chatbind": System("multimodal", "llava_v0", ("[PAD]", *IM), media_last=True),
    "nextchat": System("vicuna_v1_1", "vicuna_v1_1", (*IM, "<at>", "<boxes>"), legacy=False,
                       box=("<at>", "<boxes>"), mask_pad=True),
    "chatterbox": System("vicuna_v1_1", "vicuna_v1_1", ("[VG]", *IM, "<bbox>"), box=("<bbox>",), find="[VG]"),
    # The published model has no tokens for its tags (see model.NEXTGPT_TAGS): there they are text. New ones have.
    "nextgpt": System("nextgpt", "nextgpt_train", sum(SIGNALS.values(), ("<Img>", "</Img>")),
                      ("<Img>", "<s>", "</Img> "), signals=SIGNALS),
    "omni": System("vicuna_v1_1", "vicuna_v1_1", (*IM, "<at>", "<boxes>", "[VG]", *sum(SIGNALS.values(), ())),
                   box=("<at>", "<boxes>"), find="[VG]", signals=SIGNALS),
}


def tokenizer_of(path, cfg):
    """The Tokenizer of a model, by its ModelConfig. Raises ValueError for a file of another vocabulary."""
    tok, rows = Tokenizer(path, cfg.added_tokens, SYSTEMS[cfg.system].legacy, cfg.bos), cfg.llm.vocab_size
    n = tok.sp.get_piece_size()
    if max(n - 1, *tok.special.values()) >= rows:               # the highest id
        raise ValueError(f"{path}: has more tokens than the model, {rows}")
    if n + len(tok.added) + 256 < rows:                         # some models have spare rows
        raise ValueError(f"{path}: has {n} tokens, the model {rows}; take the one of the same download")
    return tok


@dataclass(frozen=True)
class Template:
    """Strings around the turns of a conversation. Special tokens may be named; the open turn drops trailing blanks."""
    system: str
    user: tuple[str, str]               # before and after what the user says
    bot: tuple[str, str]                # before and after an answer
    stop: str                           # text that ends an answer
    end: str = ""                       # after the last turn (training)
    first: tuple[tuple[str, str], ...] = ()                     # a built-in opening exchange
    front: str = ""                     # between a medium moved to the front and its message
    drift: bool = False                 # parity: mask labels by separately counted lengths, see drift_labels
    role_once: bool = False             # parity: learn nothing from a spoken role on, see until_role_text
    apart: bool = False                 # parity: questions, answers are encoded alone, see conversation_pieces
    frame: tuple = ()                   # in place of the system's
    ask: str = ""                       # before the text of the open turn


POLITE = ("A chat between a curious {0} and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the {0}'s questions.")
LLAVA = ("You are LLaVA, a large language and {0} assistant trained by UW Madison WAIV Lab."
         "You are able to understand the {1} content that the user provides, and assist the user with a variety of tasks "
         "using natural language.Follow the instructions carefully and explain your answers in detail.")
SIMPLE = ("You are LLaVA, a large language model trained by UW Madison WAIV Lab{}."
          "You are designed to assist human with a variety of tasks using natural language.Follow the instructions carefully.")
HI = "Hi there!  How can I help you today?\n"


def single(system, *first):
    """`###` between turns (the first Vicuna)."""
    return Template(system + "###", ("Human: ", "###"), ("Assistant: ", "###"), "###", first=first)


def two(system, user="USER", bot="ASSISTANT"):
    """A blank after the user, an end token after the assistant (Vicuna v1.1)."""
    return Template(system + " ", (user + ": ", " "), (bot + ": ", "</s>"), "</s>", front=f" {user}: ", role_once=True)


TEMPLATES = {
    "tiny": Template("", ("USER: ", " "), ("ASSISTANT: ", "</s>"), "</s>"),
    "vicuna_v1_1": two(POLITE.format("user")),
    "bair_v1": two("BEGINNING OF CONVERSATION:", bot="GPT"),
    "llava_v0": Template(POLITE.format("human") + "\n\n", ("### Human: ", "\n"), ("### Assistant: ", "\n"), "###", end="### ",
                         front="###Human: ", drift=True),
    "simple": single(SIMPLE.format(", based on LLaMA architecture"), ("Hi!", HI)),
    "simple_legacy": single(SIMPLE.format(""), ("Hi!\n\n### Response:", HI)),
    "multimodal": single(LLAVA.format("vision", "visual"), ("Hi!", HI)),
    "multimodal_audio": single(LLAVA.format("audio", "audio"), ("Hi!", HI)),
    "multimodal_video": single(LLAVA.format("video", "video"), ("Hi!", HI)),
    "llava_v1": two(LLAVA.format("vision", "visual")),
    "llava_v1_audio": two(LLAVA.format("audio", "audio")),
    "llava_v1_video": two(LLAVA.format("video", "video")),
    "nextgpt_train": Template("### ", ("Human: ", "\n"), ("### Assistant: ", "\n###"), "###", apart=True),
    # parity: text behind a medium begins with <s>, like the prompt; the demo puts one more blank before what it asks
    "nextgpt": Template("###", (" Human: ", "\n"), ("### Assistant: ", "\n###"), "###",
                        frame=("<Img>", "<s>", "</Img><s>"), ask=" "),
}


def load_templates(path):
    """The originals' JSON {templates: {name: {system, roles, style, sep, sep2, messages}}}. Raises ValueError."""
    out = {}
    try:
        for name, row in json.loads(Path(path).read_bytes())["templates"].items():
            user, bot = row["roles"]
            seps = {"single": (row["sep"], row["sep"]), "two": (row["sep"], row["sep2"])}.get(row["style"])
            if seps is None:
                continue                                        # mpt: for a model none of the four systems ships
            texts = [text for _, text in row["messages"]]
            out[name] = Template(row["system"] + row["sep"], (user + ": ", seps[0]), (bot + ": ", seps[1]), seps[1],
                                 first=tuple(zip(texts[::2], texts[1::2])), role_once=row["style"] == "two")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: not conversation templates in the layout of the originals ({error!r})") from None
    return out


# ---- Images

class MediaError(ValueError):
    """A file that is missing, not the kind of medium expected, or too large. The message names it."""


MAX_BYTES, MAX_PIXELS, MAX_SECONDS, MAX_SIDE = 100 << 20, 50_000_000, 600, 4096
STILLS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)    # of 0..1, red first
SAM_MEAN, SAM_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of 0..255


@dataclass(frozen=True)
class MediaSpec:
    """Sizes and sampling that an encoder wants; defaults: ImageBind-Huge as ChatBind and NExT-GPT feed it."""
    image_size: int = 224
    clip_size: int = 0                  # side of clips, depth and heat maps; 0: as pictures
    crop_round: bool = False            # False: CLIP processor's crop offset (floor); True: ImageBind's (half to even)
    square: bool = False                # pictures are padded to white squares, not cropped (NExT-Chat)
    sam_size: int = 0                   # side of the picture that SAM sees as well; 0: none
    det_size: int = 0                   # side of the picture in which the locator looks for a box; 0: none
    clip_seconds: float = 2.0
    span_end: bool = False              # True: clips reach the file's end (ImageBind); False: released pytorchvideo
    video_clips: int = 5
    video_crops: int = 3
    frames: int = 2                     # per clip
    audio_clips: int = 3
    mel_bins: int = 128
    mel_frames: int = 204
    sample_rate: int = 16000


def check_file(path):
    """Path of an existing file of bearable size. Raises MediaError."""
    if re.match(r"[a-z]+://", str(path), re.I):                 # before Path, which makes one slash of two
        raise MediaError(f"{path}: addresses are not fetched; download the file and give its path")
    path = Path(path)
    if not path.is_file():
        raise MediaError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}")
    if path.stat().st_size > MAX_BYTES:
        raise MediaError(f"{path}: larger than {MAX_BYTES >> 20} MB")
    return path


def open_image(path):
    """PIL image of a still or of an animation. Raises MediaError before any pixel of a too large one is decoded."""
    check_file(path)
    try:
        image = Image.open(path, formats=STILLS)
    except Image.DecompressionBombError:
        raise MediaError(f"{path}: more than {MAX_PIXELS // 10 ** 6} million pixels") from None
    except Exception:
        raise MediaError(f"{path}: not a picture ({', '.join(STILLS)} are read)") from None
    if image.width * image.height > MAX_PIXELS:
        raise MediaError(f"{path}: {image.width}x{image.height} is more than {MAX_PIXELS // 10 ** 6} million pixels")
    return image


def read_image(path):
    """RGB picture (the first frame of an animation). EXIF rotation is ignored, as the originals do."""
    image = open_image(path)
    try:
        if image.mode[0] == "I":                                # grey of 16 bits, which Pillow would clip at 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return image.convert("RGB")                             # only now are pixels decoded
    except Exception as error:
        raise MediaError(f"{path}: damaged picture ({error})") from None


def moved(x, shift, flip):
    """A picture (3, H, W) shifted right and down by pixels, black where nothing comes in, then mirrored."""
    dx, dy = shift
    x = F.pad(x, (dx, -dx, dy, -dy), value=math.nan)            # a negative pad crops
    x = torch.where(x.isnan(), normalise(torch.zeros(3, 1, 1)), x)          # normalised, black is not zero
    return x.flip(-1) if flip else x


def resize_crop(image, size, crop_round):
    """PIL bicubic resize of the short side, then a centre crop of size x size."""
    (w, h), short = image.size, min(image.size)
    if size * size * max(w, h) / short > MAX_PIXELS:
        raise MediaError(f"a picture of {w}x{h} is too long and thin")
    image = image.resize((int(size * w / short), int(size * h / short)), Image.BICUBIC)
    whole = round if crop_round else math.floor                 # Python rounds halves to even numbers
    left, top = (whole((n - size) / 2) for n in image.size)
    return image.crop((left, top, left + size, top + size))


def normalise(x, mean=CLIP_MEAN, std=CLIP_STD):
    """(3, H, W) or, with frames, (3, F, H, W): mean and deviation of each channel taken off."""
    shape = (3,) + (1,) * (x.ndim - 1)
    return (x - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)


def channels_first(pixels):
    """uint8 (H, W, 3) -> float32 (3, H, W), still in 0..255."""
    return torch.from_numpy(pixels).permute(2, 0, 1).float()


def image_tensor(image, spec=MediaSpec()):
    """PIL picture -> (3, size, size) float32."""
    if spec.square:
        image = Geometry(*image.size).pad(image)
    pixels = np.array(resize_crop(image, spec.image_size, spec.crop_round))                 # (size, size, 3)
    return normalise(channels_first(pixels) / 255)


def stretch(pixels, size):
    """uint8 (H, W, 3) -> (size, size, 3) as OpenCV does: two neighbours a side, no smoothing, whole-number weights."""
    def neighbours(n):
        at = ((np.arange(size) + 0.5) * (n / size) - 0.5).astype(np.float32)                # middles of the new pixels
        low = np.floor(at).astype(int)
        weight = np.rint((at - low) * 2048).astype(int)         # 11 bits behind the point
        return low.clip(0, n - 1), (low + 1).clip(0, n - 1), 2048 - weight, weight
    (top, bottom, a, b), (left, right, c, d) = map(neighbours, pixels.shape[:2])
    wide = pixels.astype(int)
    wide = (wide[:, left] * c[:, None] + wide[:, right] * d[:, None]) >> 4                  # (H, size, 3), 7 bits left
    tall = (wide[top] * a[:, None, None] >> 16) + (wide[bottom] * b[:, None, None] >> 16)   # 7 + 11 - 16 = 2 bits
    return (tall + 2 >> 2).astype(np.uint8)                     # rounded


def stretched_tensor(image, spec=MediaSpec()):
    """PIL picture -> (3, size, size) float32, nothing cropped."""
    return normalise(channels_first(stretch(np.array(image), spec.image_size)) / 255)


def map_tensor(image, spec):
    """PIL picture of one channel -> (1, size, size) as it is."""
    return torch.from_numpy(np.array(resize_crop(image, spec.clip_size or spec.image_size, crop_round=True)))[None]


def thermal_tensor(image, spec=MediaSpec()):
    """PIL picture -> (1, size, size) grey in 0..1, not normalised."""
    return map_tensor(image.convert("L"), spec).float() / 255


def depth_tensor(metres, spec=MediaSpec()):
    """Depth map (H, W) in metres -> (1, size, size) normalised disparity for a focal length x baseline of 1."""
    # The recipe is not in ImageBind's code: it follows its issue threads and Omnivore's demo (specs/imagebind 6, open).
    disparity = 1 / torch.as_tensor(metres, dtype=torch.float32).clamp(0.01, 50)
    return (map_tensor(Image.fromarray((disparity.clamp(max=75) / 75).numpy()), spec) - 0.0418) / 0.0295


def imu_tensor(samples, steps=2000):
    """Accelerometer and gyroscope (6, n) -> (6, steps) by linear interpolation."""
    return F.interpolate(torch.as_tensor(samples, dtype=torch.float32)[None], steps, mode="linear", align_corners=True)[0]


# ---- Geometry

@dataclass(frozen=True)
class Geometry:
    """A picture in the middle of its square: the frame 0..1 of CLIP's and SAM's pictures and of normalised boxes."""
    width: int
    height: int
    square: bool = True                 # False: the frame is the picture itself (ChatterBox)

    @property
    def sides(self):
        """Width and height of the frame, pixels."""
        return (max(self.width, self.height),) * 2 if self.square else (self.width, self.height)

    @property
    def offset(self):
        return (self.sides[0] - self.width) // 2, (self.sides[1] - self.height) // 2        # left and top in it

    def pad(self, image):
        """The white square around a PIL picture. Raises MediaError for one so thin that its square is huge."""
        if max(self.sides) ** 2 > 4 * MAX_PIXELS:
            raise MediaError(f"a picture of {self.width}x{self.height} is too long and thin")
        square = Image.new("RGB", self.sides, (255, 255, 255))
        square.paste(image, self.offset)
        return square

    def to_frame(self, boxes_px):
        """Pixel boxes -> (n, 4) float64 of the frame, clamped to 0..1."""
        boxes = torch.as_tensor(boxes_px, dtype=torch.float64).reshape(-1, 4)
        return ((boxes + torch.tensor(self.offset * 2)) / torch.tensor(self.sides * 2)).clamp(0, 1)

    def to_pixels(self, boxes):
        """(n, 4) of the frame -> (n, 4) float64 pixels, which may lie outside the picture."""
        return torch.as_tensor(boxes, dtype=torch.float64) * torch.tensor(self.sides * 2) - torch.tensor(self.offset * 2)

    def masks_to_pixels(self, logits):
        """Mask logits (n, 1, S, S) of the frame -> bool (n, H, W) of the picture."""
        square = F.interpolate(logits.float(), self.sides[::-1], mode="bilinear", align_corners=False)[:, 0] > 0
        left, top = self.offset
        return square[:, top:top + self.height, left:left + self.width]


def sam_resize(image, size):
    """PIL picture -> uint8 (h, w) or (h, w, 3) whose longer side is `size`."""
    scale = size / max(image.size)
    return np.array(image.resize([int(n * scale + 0.5) for n in image.size], Image.BILINEAR))


def centre(x, size):
    """(C, h, w) -> (C, size, size) with zeros around. parity: SAM itself pads at the right and the bottom."""
    h, w = x.shape[1:]
    left, top = (size - w) // 2, (size - h) // 2
    return F.pad(x, (left, size - w - left, top, size - h - top))


def sam_tensor(image, spec):
    """PIL picture -> (3, S, S), what SAM's image encoder reads."""
    pixels = channels_first(sam_resize(image, spec.sam_size))                               # (3, h, w), one of them S
    return centre(normalise(pixels, SAM_MEAN, SAM_STD), spec.sam_size)


def det_tensor(image, spec):
    """PIL picture -> (3, S, S), stretched, what ChatterBox's locator reads."""
    pixels = np.array(image.resize((spec.det_size,) * 2, Image.BILINEAR))                   # (S, S, 3)
    return normalise(channels_first(pixels), SAM_MEAN, SAM_STD)


def sam_mask(mask, size):
    """(H, W) uint8 -> (1, S, S) float32, a true mask in SAM's frame."""
    return centre(torch.from_numpy(sam_resize(Image.fromarray(mask), size))[None].float(), size)


# ---- Video

def clip_starts(duration, n, spec):
    """Start times of n clips: whole fractions, so that frame numbers round as in the originals."""
    spare = max(Fraction(duration) - Fraction(spec.clip_seconds), Fraction(0))
    return [i * spare / max(n - spec.span_end, 1) for i in range(n)]


def clip_frames(n_frames, fps, spec):
    """Numbers of the frames used, a list per clip: evenly spaced from the first to the last of each clip."""
    out = []
    for start in clip_starts(n_frames / fps, spec.video_clips, spec):
        first = math.ceil(fps * start)
        last = max(min(math.ceil(fps * (start + Fraction(spec.clip_seconds))), n_frames) - 1, first)
        out.append(torch.linspace(first, last, spec.frames).long().tolist())
    return out


def spatial_crops(x, size, n):
    """n crops of (3, F, H, W), its shorter side `size`, along the longer (3: ends and middle; 1: the middle)."""
    H, W = x.shape[-2:]
    for share in (0, 0.5, 1) if n == 3 else (0.5,):
        top, left = math.ceil(share * (H - size)), math.ceil(share * (W - size))            # one of them 0
        yield x[..., top:top + size, left:left + size]


def clip_tensor(frames, size):
    """uint8 arrays (H, W, 3) -> (3, F, h, w), the shorter side `size`. Raises MediaError."""
    x = torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2).float() / 255                # (3, F, H, W)
    H, W = x.shape[-2:]
    short = min(H, W)
    if size * size * max(H, W) / short > MAX_PIXELS / 10:       # of each frame
        raise MediaError(f"a clip of {W}x{H} is too long and thin")
    target = math.floor(H / short * size), math.floor(W / short * size)
    return normalise(F.interpolate(x, target, mode="bilinear", align_corners=False))


def video_tensor(frames, n_frames, fps, spec=MediaSpec()):
    """Frames -> (clips * crops, 3, F, size, size), clip-major. frames: [numbers] -> uint8 arrays (H, W, 3)."""
    clips, size, out = clip_frames(n_frames, fps, spec), spec.clip_size or spec.image_size, []
    wanted = sorted({*chain(*clips)})
    decoded = dict(zip(wanted, frames(wanted)))                 # clips may overlap
    for clip in clips:
        out += spatial_crops(clip_tensor([decoded[i] for i in clip], size), size, spec.video_crops)
    return torch.stack(out)


def read_animation(path):
    """GIF, PNG or WebP -> (frames callable, number of frames, frames per second)."""
    image = open_image(path)
    image.load()                                                # WebP tells its duration only then
    n, ms = getattr(image, "n_frames", 1), image.info.get("duration", 100) or 100

    def frames(numbers):
        return [np.array(frame.convert("RGB")) for i, frame in enumerate(ImageSequence.Iterator(image)) if i in numbers]
    return frames, n, 1000 / ms


DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,wav,mp3,flac,ogg,aac,gif"    # none that opens other files


def open_media(path, kind):
    """PyAV container and its first stream of a kind. Raises MediaError; so do its users through `guarded`."""
    try:
        import av                                               # extra [media], needed for compressed files only
    except ImportError:
        raise MediaError(f"{path}: reading it needs PyAV; install it with: pip install av") from None
    container = av.open(open(check_file(path), "rb"), options={"format_whitelist": DEMUXERS})
    streams = getattr(container.streams, kind)
    if not streams:
        raise MediaError(f"{path}: has no {kind}")
    if container.duration and container.duration / 1e6 > MAX_SECONDS:
        raise MediaError(f"{path}: longer than {MAX_SECONDS // 60} minutes")
    return container, streams[0]


def guarded(read):
    """Whatever a decoder raises becomes a MediaError with the path (PyAV raises many kinds on damaged files)."""
    def wrapped(path, *args):
        try:
            return read(path, *args)
        except MediaError as error:
            if str(path) in str(error):
                raise
            raise MediaError(f"{path}: {error}") from None
        except Exception as error:
            if "can't allocate memory" in str(error):           # torch's words; the file may be good
                raise MemoryError(f"{path}: {error}") from None
            raise MediaError(f"{path}: cannot be decoded ({type(error).__name__}: {error})") from None
    return wrapped


@guarded
def read_video(path, spec=MediaSpec()):
    """Clip of any format -> video_tensor of it."""
    if sniff(path) == "image":
        return video_tensor(*read_animation(path), spec)
    container, stream = open_media(path, "video")
    if max(stream.width, stream.height) > MAX_SIDE:
        raise MediaError(f"{path}: {stream.width}x{stream.height}, more than {MAX_SIDE} on a side")
    fps = float(stream.average_rate)
    n = stream.frames or int(fps * (container.duration or 0) / 1e6)
    n = n or sum(packet.size > 0 for packet in container.demux(stream))         # recordings of browsers tell neither
    return video_tensor(partial(seek_frames, container, stream, fps), n, fps, spec)


def seek_frames(container, stream, fps, numbers):
    """The frames of rising numbers as uint8 (H, W, 3), far ones found by seeking."""
    out, last = [], -math.inf
    slack = min(1, 0.5 / fps / float(stream.time_base))         # ticks that a time may be rounded by, less than a frame
    for number in numbers:
        time = (stream.start_time or 0) + round(number / fps / stream.time_base)
        if number - last > 100:
            container.seek(time, stream=stream)                 # to the key frame before it
            decoder = container.decode(stream)
        frame = next((frame for frame in decoder if frame.pts is None or frame.pts >= time - slack), None)
        out.append(frame.to_ndarray(format="rgb24") if frame else out[-1])                  # headers promise too many
        last = number
    return out


# ---- Audio

@guarded
def read_audio(path):
    """-> waveform (channels, samples) float32 in -1..1, sample rate. Wav by the standard library, the rest by PyAV."""
    check_file(path)
    try:
        return read_wav(path)
    except (wave.Error, EOFError):                              # no wav, or one that is compressed or of floats
        return decode_audio(path)


def read_wav(path):
    with wave.open(str(path)) as f:
        width, channels, rate = f.getsampwidth(), f.getnchannels(), f.getframerate()
        x = pcm(f.readframes(MAX_SECONDS * rate + 1), width, channels)
    if x.shape[1] > MAX_SECONDS * rate:
        raise MediaError(f"longer than {MAX_SECONDS // 60} minutes")
    if not x.shape[1]:
        raise MediaError("holds no sound")
    return x, rate


def decode_audio(path):
    container, stream = open_media(path, "audio")
    from av import AudioResampler                               # below open_media, which says if PyAV is missing
    floats = AudioResampler(format="fltp").resample             # channel by channel; of any size, sign and layout
    parts = [part.to_ndarray() for frame in chain(container.decode(stream), [None]) for part in floats(frame)]
    return torch.from_numpy(np.concatenate(parts, 1)), stream.rate


def pcm(data, width, channels):
    """Little-endian PCM of 1 to 4 bytes -> (channels, samples) in -1..1."""
    data = data[:len(data) // (width * channels) * width * channels]                        # a file may end too soon
    x = np.frombuffer(data, np.uint8).reshape(-1, width)
    if width == 1:
        x = x ^ 128                                             # only single bytes have no sign
    x = np.pad(x, ((0, 0), (4 - width, 0))).view("<i4").astype(np.float32) / (1 << 31)      # the upper bytes of four
    return torch.from_numpy(np.ascontiguousarray(x.reshape(-1, channels).T))


def resample(x, rate, new):
    """Windowed-sinc (Hann, width 6, roll-off 0.99) resampling of (channels, samples), as torchaudio computes it."""
    if math.gcd(rate, new) < 25:        # a filter for each of 16,000 places takes gigabytes: 11,127 Hz count as 11,125
        rate = max(round(rate / 25), 1) * 25
    if rate == new:
        return x
    g = math.gcd(rate, new)
    o, n = rate // g, new // g                                  # o old samples last as long as n new ones
    base = 0.99 * min(o, n)                                     # cut-off: what the lower rate cannot hold goes
    width = math.ceil(6 * o / base)
    index = torch.arange(-width, width + o, dtype=torch.float32)[None] / o
    t = ((torch.arange(0, -n, -1, dtype=torch.float32)[:, None] / n + index) * base).clamp(-6, 6)   # (n, 2 width + o)
    window = torch.cos(t * math.pi / 6 / 2) ** 2
    t = t * math.pi
    kernel = torch.where(t == 0, torch.ones_like(t), t.sin() / t) * window * (base / o)     # (n, 2 width + o)
    y = F.conv1d(F.pad(x, (width, width + o))[:, None], kernel[:, None], stride=o)          # (channels, n, blocks)
    return y.transpose(1, 2).flatten(1)[:, :math.ceil(n * x.shape[1] / o)]                  # (channels, samples)


@lru_cache
def mel_banks(bins, rate, n_fft=512, low=20.0):
    """Kaldi's triangular filters (bins, n_fft / 2), the Nyquist bin left out."""
    def mel(f):                                                 # Hz -> mel, a scale in which equal steps sound equal
        return 1127.0 * math.log(1.0 + f / 700.0)
    step = (mel(rate / 2) - mel(low)) / (bins + 1)
    b = torch.arange(bins)[:, None]
    left, centre, right = (mel(low) + (b + i) * step for i in range(3))
    freqs = 1127.0 * (1.0 + rate / n_fft * torch.arange(n_fft // 2) / 700.0).log()[None]
    return torch.minimum((freqs - left) / (centre - left), (right - freqs) / (right - centre)).clamp(min=0)


def fbank(x, bins, rate):
    """Kaldi log-mel energies (frames, bins) of a mono signal: 25 ms frames every 10 ms, Hann window, no dither."""
    size, shift = rate // 40, rate // 100
    x = F.pad(x, (0, max(size - len(x), 0)))                    # the original fails on clips under 25 ms
    frames = x.unfold(0, size, shift)                                                       # (frames, size)
    frames = frames - frames.mean(1, keepdim=True)
    frames = frames - 0.97 * torch.cat([frames[:, :1], frames[:, :-1]], dim=1)              # pre-emphasis
    frames = F.pad(frames * torch.hann_window(size, periodic=False), (0, 512 - size))       # (frames, 512)
    power = torch.fft.rfft(frames).abs().pow(2)[:, :256]                                    # (frames, 256)
    return (power @ mel_banks(bins, rate).T).clamp(min=torch.finfo(torch.float32).eps).log()


def audio_tensor(x, rate, spec=MediaSpec()):
    """Waveform -> (clips, 1, mel bins, mel frames), ImageBind's scaling. Only the first channel is heard."""
    x = resample(x, rate, spec.sample_rate).clone()
    rate, length, out = spec.sample_rate, Fraction(spec.clip_seconds), []
    for start in clip_starts(x.shape[1] / rate, spec.audio_clips, spec):
        clip = x[:, int(start * rate):int((start + length) * rate)]
        clip -= clip.mean()             # parity: in place, so a later clip that overlaps sees the shift
        mel = fbank(clip[0], spec.mel_bins, rate).T[:, :spec.mel_frames]                    # (bins, frames)
        mel = F.pad(mel, (0, spec.mel_frames - mel.shape[1]))   # parity: zeros before scaling, which is not silence
        out.append((mel + 4.268) / 9.138)
    return torch.stack(out)[:, None]


FIRST_BYTES = {                         # kind: how its files begin; the first row that fits counts
    "image": re.compile(rb"\xff\xd8\xff|\x89PNG|GIF8|BM|.{8}WEBP|.{4}ftyp(?:avi|hei|mif)", re.S),  # AVIF, HEIC: named, not read
    "audio": re.compile(rb"ID3|fLaC|OggS|\xff[\xe2\xe3\xf0-\xfb]|.{4}ftypM4A |.{8}WAVE", re.S),
    "video": re.compile(rb"\x1aE\xdf\xa3|.{4}ftyp|.{8}AVI ", re.S),
}


def sniff(path):
    """'image', 'audio', 'video' or '' by what it holds, never by the name. An animation counts as an image."""
    with open(check_file(path), "rb") as f:
        head = f.read(16)
    kind = next((kind for kind, start in FIRST_BYTES.items() if start.match(head)), "")
    return "audio" if kind == "video" and not holds(path, "video") and holds(path, "audio") else kind


def holds(path, kind):
    """Whether PyAV finds a stream of a kind: recordings of phones and browsers are clips without pictures."""
    with suppress(Exception):           # what is wrong with a file is told when it is read
        return bool(open_media(path, kind))


STILL_TENSORS = {"image": image_tensor, "stretched": stretched_tensor, "thermal": thermal_tensor, "sam": sam_tensor,
                 "det": det_tensor}


@guarded
def read_media(path, kind, spec=MediaSpec()):
    """The tensor an encoder reads for one medium. Raises MediaError naming the file."""
    if kind in STILL_TENSORS:
        return STILL_TENSORS[kind](read_image(path), spec)
    if kind == "video":
        return read_video(path, spec)
    if kind == "audio":
        return audio_tensor(*read_audio(path), spec)
    values = np.load(check_file(path), allow_pickle=False)
    if values.ndim != 2 or np.isnan(values).any() or kind == "imu" and len(values) != 6:
        raise MediaError(f"depth in metres (H, W) or motion (6, n), no NaN, is expected; this is {values.shape}")
    return depth_tensor(values, spec) if kind == "depth" else imu_tensor(values)


# ---- Samples

@dataclass(eq=False)                    # a Medium is itself: two of the same file differ, and each can be a key
class Medium:
    kind: str                           # image, video, audio, depth, thermal, imu
    path: str = ""
    tensor: torch.Tensor | None = None
    stretch: bool = False               # to the encoder's square, where its spec would crop (some sets of ChatterBox)
    shift: tuple = (0, 0)               # pixels right and down that the encoder sees it moved,
    flip: bool = False                  # and then mirrored; its boxes have followed (COCO in ChatterBox)
    size: tuple = ()                    # width and height of a picture, pixels
    sam: torch.Tensor | None = None     # the same picture for SAM
    det: torch.Tensor | None = None     # and for the locator


@dataclass(eq=False)
class Box:
    """A box in a turn. In an answer it is what the model shall say, too, with its mask where that is known."""
    xyxy_px: tuple                      # pixels of the picture
    mask: np.ndarray | None = None      # (H, W) uint8
    tensor: torch.Tensor | None = None  # (4,) of the frame
    sam_mask: torch.Tensor | None = None                        # (1, S, S) of the frame
    picture: Medium | None = None       # that it lies in
    kind: str = "box"                   # region: read from the picture there, not from its coordinates (ChatterBox);
                                        # find: what a question asks for, a target of the question's last token
    path = "a box"                      # what messages call it


@dataclass(eq=False)
class Signal:
    """What an answer asks a diffusion model for: the signal tokens of a writer."""
    writer: str                         # img, vid, aud
    path: str = ""                      # of its caption embedding
    embeds: torch.Tensor | None = None  # (tokens, width) or (width,), from the diffusion model's own text tower
    caption: str | None = None


@dataclass
class Sample:
    """A conversation: turns of user and assistant, each a list of strings, Media, Boxes and, in answers, Signals."""
    turns: list[list]
    id: str = ""
    meta: dict = field(default_factory=dict)


class Rendered(NamedTuple):
    ids: list[int]
    labels: list[int]
    slots: list                         # (Medium or Box, position of its first placeholder)
    targets: list = ()                  # (Box, place of the token that asks for it), (Signal, places of its tokens)

    def learns(self, length=None):
        return any(label != IGNORE for label in self.labels[1:length])                      # nothing predicts the first


class Batch(NamedTuple):
    ids: torch.Tensor                   # (B, T)
    labels: torch.Tensor                # (B, T), IGNORE where nothing is learned
    media: dict                         # kind -> stacked payloads of M media
    slots: dict                         # kind -> (2, M * n) rows and columns of their placeholders
    targets: dict = {}                  # writer -> what its signal tokens should give; `slots` (2, m) says where
    attn_mask: torch.Tensor | None = None       # (B, T) bool; None: padding is on the right and needs no mask
    segments: torch.Tensor | None = None        # (B, T) int32: 1, 2, ... for the samples of a packed row, 0 for padding


def load_medium(medium, spec):
    """Fill in what encoders and writers read of a medium. Raises MediaError."""
    medium.tensor = read_media(medium.path, "stretched" if medium.stretch else medium.kind, spec)
    if medium.kind == "image":
        medium.tensor = moved(medium.tensor, [round(by * spec.image_size / 224) for by in medium.shift], medium.flip)
        medium.size = open_image(medium.path).size
        medium.sam = read_media(medium.path, "sam", spec) if spec.sam_size else None
        medium.det = read_media(medium.path, "det", spec) if spec.det_size else None


def load_media(turns, spec):
    """Fill in the tensors of the media and boxes of a conversation. Raises MediaError, or DataError for boxes."""
    media, boxes = parts_of(turns, Medium), parts_of(turns, Box)
    for medium in media:
        load_medium(medium, spec)
    if boxes:
        pictures = [medium for medium in media if medium.kind == "image"]
        if len(pictures) != 1:
            raise DataError(f"boxes need one picture to lie in, there are {len(pictures)}")
        place_boxes(boxes, Geometry(*pictures[0].size, spec.square and not pictures[0].stretch), spec)


def parts_of(turns, kind):
    """The parts of some class in a conversation."""
    return [part for turn in turns for part in turn if isinstance(part, kind)]


def place_boxes(boxes, geometry, spec):
    """Fill in where boxes and their masks lie in the frame of their picture. Raises DataError for one outside."""
    for box in boxes:
        check_box(box.xyxy_px, geometry.width, geometry.height)
        box.tensor = geometry.to_frame(box.xyxy_px)[0].float()
        if box.mask is not None and spec.sam_size:
            if box.mask.shape != (geometry.height, geometry.width):
                raise DataError(f"a mask of {box.mask.shape} for a picture of {geometry.height, geometry.width}")
            box.sam_mask = sam_mask(box.mask, spec.sam_size)


def is_box(box):
    """Whether a value from a file is four numbers, none of them NaN, infinite or huge."""
    four = isinstance(box, (list, tuple)) and len(box) == 4
    return four and all(type(x) in (int, float) and abs(x) < 1e9 for x in box)              # NaN is not below 1e9


def check_box(box, width=math.inf, height=math.inf):
    """The four pixel coordinates of a box from a file, as floats. A pixel outside is let pass. Raises DataError."""
    if not is_box(box):
        raise DataError(f"box {box!r:.80}: four finite numbers x1, y1, x2, y2 are expected")
    x1, y1, x2, y2 = map(float, box)
    if min(x2 - x1, y2 - y1) < 0:
        raise DataError(f"box {box}: its right or lower edge comes first")
    if min(x1, y1, width - x2, height - y2) < -1:
        raise DataError(f"box {box}: outside its picture of {width}x{height}")
    return x1, y1, x2, y2


BOX_REFERENCE = re.compile(r"\[\s*((?:0|[1-9]\d*)(?:\s*,\s*(?:0|[1-9]\d*))*)\s*,?\s*\]")


def box_references(text):
    """"Compare [0] and [1, 2]" -> ["Compare ", [0], " and ", [1, 2], ""]: box numbers between stretches of text."""
    parts = BOX_REFERENCE.split(text)
    parts[1::2] = [list(map(int, numbers.split(","))) for numbers in parts[1::2]]
    return parts


# ---- Render: turns -> token ids, labels, slots, targets

def pieces_of(part, tok, system, n_token, learn):
    """Pieces of a part of a turn: strings stay text, media become framed placeholders, boxes and Signals tokens."""
    if isinstance(part, Piece):
        return [part]
    if isinstance(part, str):
        return [Piece(part, learn=learn)]
    if isinstance(part, Signal):
        return [Piece(token, True, learn, medium=part) for token in system.signals[part.writer]]
    if isinstance(part, Medium):
        before, place, after = system.frame
        if place not in tok.special:
            raise ValueError(f"this model has no token {place} for media to stand at; it is one to train from")
        return [*tok.parse(before), Piece(place, True, count=n_token(part.kind), medium=part), *tok.parse(after)]
    if isinstance(part, Box):
        return box_pieces(part, system, learn)
    raise DataError(f"{part!r:.40} where text is expected")


def box_pieces(box, system, learn):     # the tokens that ask for it and at which it is read
    if box.kind == "find" and not system.find:
        raise DataError("this system has no token that asks for a box to be found")
    if not system.box:
        raise ValueError("this system has no tokens for boxes; leave the boxes out of the turn")
    *signal, reader = [system.find] if box.kind == "find" else system.box
    return [*(Piece(token, True, learn) for token in signal), Piece(reader, True, medium=box)]              # given


def media_in_front(content, template):
    """A turn with its media moved to its front (ChatBind's sep_image_conv_front)."""
    media = parts_of([content], Medium)
    if not media:
        return content
    words = [part for part in content if part not in media]
    if all(isinstance(part, str) for part in words):
        words = ["".join(words).strip()]
    return [*media, template.front, *words]


def conversation_pieces(turns, tok, system, template, n_token):
    """Pieces of a conversation, one list per turn, the system text first. An answer that is None is left open."""
    out, cut = [tok.parse(template.system)], [CUT] * template.apart
    system = replace(system, frame=template.frame or system.frame)
    for i, content in enumerate([[text] for text in chain(*template.first)] + turns):
        before, after = template.bot if i % 2 else template.user
        if content is None:             # the last one, yet to be said
            return [*out, tok.parse(before.rstrip(" "))]
        said = [piece for part in content for piece in pieces_of(part, tok, system, n_token, learn=i % 2 == 1)]
        if i % 2:
            role = before if template.apart else before.rstrip(" ")                         # its blank is learned
            blank = Piece(before[len(role):], learn=True)
            out.append([*tok.parse(role), *cut, blank, *said, *tok.parse(after, learn=True), *cut])
        else:
            opens = i == 0 and isinstance(next(iter(content), None), str)                   # the talk begins with text
            out.append([*tok.parse(before), *cut * opens, *said, *tok.parse(after)])
    return out


def drift_labels(ids, turns, tok):
    """parity: ChatBind v0. Spans are counted on turns encoded alone, each with its own start token and word prefix, so
    they drift by about one token a turn, and two tokens of every user turn are learned."""
    ends = np.cumsum([len(tok.encode(pieces)) for pieces in turns]).tolist()
    labels = np.array(ids)
    labels[:ends[0]] = IGNORE
    for start, end in zip(ends[::2], ends[1::2]):
        labels[start + 2:end] = IGNORE                          # of the user
    return labels.tolist()


def until_role_text(turns, template):
    """parity: labels are found by the assistant's role, so they end before the round in which a speaker says it."""
    for i in range(1, len(turns), 2):
        spoken = "".join(piece.text for piece in chain(*turns[i:i + 2]))
        if spoken.count(" " + template.bot[0]) != 1:
            return turns[:i] + [[piece._replace(learn=False) for piece in turn] for turn in turns[i:]]
    return turns


def render(turns, tok, system, template, n_token, train=False):
    """Turns of user, assistant, user ... -> Rendered; a last one of None asks for an answer. n_token: kind -> placeholders
    per medium. Labels are the answers and what ends them; all IGNORE unless train."""
    pieces = conversation_pieces(turns, tok, system, template, n_token)
    if template.role_once:
        pieces = until_role_text(pieces, template)
    ids, learn, places = tok.encode_pieces(chain(*pieces, tok.parse(template.end * train, learn=True)))
    if not train:
        labels = [IGNORE] * len(ids)
    elif template.drift:
        labels = drift_labels(ids, pieces, tok)
    else:
        labels = [id if learned else IGNORE for id, learned in zip(ids, learn)]
    return Rendered(ids, labels, *slots_and_targets(places, labels, system, train))


def slots_and_targets(places, labels, system, train):
    """[(part, place of a token that stands for it)] -> what readers fill, what writers are to give: see Rendered."""
    slots, targets, signals = [], [], defaultdict(list)
    for part, at in places:
        if isinstance(part, Signal):
            signals[part].append(at)                            # a place per token
        elif part.kind == "find":                               # is in a question, which has no labels
            targets += [(part, at)] if train else []
        else:
            slots.append((part, at))
            asks = at - len(system.box) + 1                     # it is read at its last token, asked for at its first
            if part.kind == "box" and labels[asks] != IGNORE:
                targets.append((part, asks))
    return slots, [*targets, *signals.items()]


def truncate(r, length, protected):
    """At most `length` ids of a Rendered: the last go, save those in `protected`: media and boxes stay whole."""
    if len(r.ids) <= length:
        return r
    loose = np.flatnonzero(~np.isin(r.ids, [*protected]))
    kept = np.delete(np.arange(len(r.ids)), loose[length - len(r.ids):])
    ids, labels = (np.array(row)[kept].tolist() for row in r[:2])
    slots, targets = ([(part, np.searchsorted(kept, at).tolist()) for part, at in parts] for parts in r[2:])
    return Rendered(ids, labels, slots, targets)


def stack_media(rendered, lengths, places, n_token):
    """-> media and slots of a Batch, see collate. Raises ValueError for a medium whose tokens are cut off."""
    media, slots, image_of = defaultdict(list), defaultdict(list), []
    for r, n, (row, at) in zip(rendered, lengths, places):
        picture = len(media["image"])   # of this sample, wherever in a packed row it lies
        for medium, start in r.slots:
            columns = torch.arange(start, start + n_token(medium.kind))
            if columns[-1] >= n:
                raise ValueError(f"{medium.path}: its tokens end at {columns[-1] + 1}, beyond max_len = {n}")
            if medium.kind == "region":
                image_of.append(picture)                        # boxes lie in one picture, see load_media
            media[medium.kind].append(medium.tensor)
            slots[medium.kind].append(torch.stack([torch.full_like(columns, row), at + columns]))
    media, slots = {k: torch.stack(v) for k, v in media.items() if v}, {k: torch.cat(v, 1) for k, v in slots.items()}
    if "region" in media:
        media["region"] = {"boxes": media["region"], "image": media["image"], "image_of": torch.tensor(image_of)}
    return media, slots


def stack_targets(rendered, lengths, places, given):
    """-> targets of a Batch. given: all its boxes (R, 4)."""
    makers, targets = {"at": partial(box_targets, given=given), "vg": find_targets}, {}
    for writer, rows in asked(rendered, lengths, places).items():
        slots, parts, pictures = zip(*rows)
        targets[writer] = {"slots": torch.cat(slots, 1)} | makers.get(writer, signal_targets)(parts, pictures)
    return targets


def asked(rendered, lengths, places):
    """-> {writer: [(slots (2, n) of the tokens that ask, Box or Signal, its picture)]}, nothing that is cut off."""
    found = defaultdict(list, at=[], vg=[])                     # these first: losses are summed in this order
    for r, n, (row, start) in zip(rendered, lengths, places):
        picture = next((medium for medium, _ in r.slots if medium.kind == "image"), None)
        for part, at in r.targets:
            columns = torch.tensor(at).view(-1)                 # one token asks for a box, several for a Signal
            if columns[-1] < n:
                slots = torch.stack([torch.full_like(columns, row), start + columns])
                writer = part.writer if isinstance(part, Signal) else {"box": "at", "find": "vg"}[part.kind]
                found[writer].append((slots, part, picture))
    return {writer: rows for writer, rows in found.items() if rows}


def stacked(parts, name):               # a field of each, (m, ...)
    return torch.stack([getattr(part, name) for part in parts])


def box_targets(boxes, pictures, given):
    out = {"boxes": stacked(boxes, "tensor"), "given": given}                               # (m, 4), (R, 4)
    if all(box.sam_mask is not None for box in boxes):
        out |= {"masks": stacked(boxes, "sam_mask"), "image": stacked(pictures, "sam")}     # (m, 1 or 3, S, S)
    return out


def find_targets(boxes, pictures):
    corners = stacked(boxes, "tensor").view(-1, 2, 2)                                       # (m, 2, 2)
    return {"image": stacked(pictures, "det"),                                              # (m, 3, S, S)
            "boxes_cxcywh": torch.cat([corners.mean(1), corners[:, 1] - corners[:, 0]], 1)}


def signal_targets(signals, pictures):
    return {"embeds": stacked(signals, "embeds").float()}       # (m, ...)


def pack_rows(lengths, width):
    """Samples to rows of `width` tokens or of the longest's -> [(row, first column)] of each, how full each row is."""
    if not width:
        return [(i, 0) for i in range(len(lengths))], lengths
    places, rows, width = [None] * len(lengths), np.zeros(len(lengths), int), max(width, *lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):            # the longest first
        row = np.argmax(rows + lengths[i] <= width)             # the first with room
        places[i] = int(row), int(rows[row])
        rows[row] += lengths[i]
    return places, rows[rows > 0].tolist()


def fill_rows(rendered, lengths, places, shape, pad):
    """-> ids, labels, segments of a Batch."""
    ids, labels = torch.full(shape, pad), torch.full(shape, IGNORE)                         # (B, T) each
    segments = torch.zeros(shape, dtype=torch.int32)
    for r, n, (row, at) in zip(rendered, lengths, places):
        here = row, slice(at, at + n)
        ids[here], labels[here], segments[here] = torch.tensor(r.ids[:n]), torch.tensor(r.labels[:n]), segments[row].max() + 1
        labels[row, at] = IGNORE                                # nothing comes before it to predict it from
    return ids, labels, segments


def collate(rendered, n_token, pad=0, max_len=2048, mask_pad=False, pack=0, mock=None):
    """Rendered samples -> Batch: cut at max_len (never inside media), pad on the right, stack media by kind.

    pack: put short samples into common rows of about so many tokens, told apart by `segments`; 0 = a row for each.
    mock: one more, not learned, see datasets.mock. ValueError: a sample has nothing to learn, or its media do not fit.
    """
    for r in rendered:
        if not r.learns(max_len):
            raise ValueError(f"a sample of {len(r.ids)} tokens has no answer within max_len = {max_len}")
    if mock:
        rendered = [*rendered, mock._replace(labels=[IGNORE] * len(mock.ids))]
    lengths = [min(len(r.ids), max_len) for r in rendered]
    places, rows = pack_rows(lengths, pack)
    width = max(rows) + (-max(rows) % 64 if pack else 0)        # few sizes: kernels are made for each on some machines
    ids, labels, segments = fill_rows(rendered, lengths, places, (len(rows), width), pad)
    media, slots = stack_media(rendered, lengths, places, n_token)
    targets = stack_targets(rendered, lengths, places, media.get("box"))
    if mock and "at" in targets:
        targets["at"]["mock"] = torch.ones(())                  # its losses pass over the last row
    return Batch(ids, labels, media, slots, targets, ids != pad if mask_pad else None, segments if pack else None)


def to_device(batch, device, dtype=None):              # dtype: of what holds floats
    def move(x):
        if isinstance(x, dict):
            return {k: move(v) for k, v in x.items()}
        return x if x is None else x.to(device, dtype if x.is_floating_point() else None, non_blocking=True)
    return Batch(*map(move, batch))


# ---- Data sets: files -> Samples -> Rendered, in batches

class DataError(ValueError):
    """A record that cannot be used. The message names the file and the record."""


class Unfit(DataError):
    """A sound record that holds nothing for this format: no box to find, say. Another one takes its place."""


OUTSIDE = re.compile(r"(?s)\Z|[/~]|[A-Za-z]:|.*[\\\0]|(.*/)?\.\.(/|\Z)")   # none, absolute, a drive, \, NUL, a way up


def safe_join(root, name):
    """root / name for a relative name that stays inside. Links inside the root are followed (people link COCO)."""
    if not isinstance(name, str) or OUTSIDE.match(name):
        raise DataError(f"{name!r}: media are named by relative paths inside their folder")
    path = Path(root) / name
    if re.fullmatch(r"(train|val)2014/\d{12}", f"{path.parent.name}/{path.stem}") and not path.exists():
        return path.with_name(f"COCO_{path.parent.name}_{path.name}")       # LLaVA's files give COCO's number alone
    return path


def read_records(path, unpack=None):
    """The list in a .json file, after `unpack` of what it holds, or the lines of a .jsonl file. Raises DataError."""
    path = Path(path)
    if path.suffix == ".jsonl":
        return read_lines(path, path.open("rb"))                # bytes: json knows UTF-8 and a mark before it
    whole = path.read_bytes()
    if b"}\n{" in whole:                                        # POPE's lines lie in .json files
        return read_lines(path, whole.splitlines())
    try:
        rows = json.loads(whole)
        rows = unpack(rows) if unpack else rows
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: {error}") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: a list of records is expected, not {type(rows).__name__}")
    return rows


def read_lines(path, lines):
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: line {len(rows) + 1}: {error}") from None
    return rows


KINDS = ("image", "video", "audio")
TAGS = re.compile("(<image>|<video>|<audio>)")


def from_user(row):
    return row["from"].lower() in ("human", "user")


def nonempty(parts):
    return [part for part in parts if part != ""]


def names_of(record, kind):
    names = record.get(kind) or record.get(f"input_{kind}") or []
    return [names] if isinstance(names, str) else list(names)


def llava_sample(record, root):
    """LLaVA record {id, image|video|audio: name or names, conversations: [{from, value}]} -> Sample. <image> (or <video>,
    <audio>) in a user's text marks the place of the next medium of that kind; a tag in an answer is plain text."""
    queue = {kind: names_of(record, kind) for kind in KINDS}    # files that have met no tag yet
    turns, rows = [], record["conversations"]
    if rows and not from_user(rows[0]):
        rows = rows[1:]                                         # parity: a leading answer is dropped
    for i, row in enumerate(rows):
        if from_user(row) != (i % 2 == 0):
            raise DataError(f"turn {i + 1}: user and assistant must alternate")
        content = [row["value"]] if i % 2 else at_tags(row["value"], queue, root, f"turn {i + 1}")
        turns.append(nonempty(content))
    for kind in KINDS:
        if queue[kind]:
            raise DataError(f"more {kind} files than <{kind}> tags")
    if len(turns) < 2:
        raise DataError("no question with an answer")
    return Sample(turns[:len(turns) // 2 * 2], str(record.get("id", "")), record)           # an open question goes


def at_tags(text, queue, root, where):
    """A text in parts, the next Medium of a kind for each of its tags. queue: kind -> names of files, taken from it."""
    parts = TAGS.split(text)                                    # text, tag, text, tag, text
    for j in range(1, len(parts), 2):
        kind = parts[j][1:-1]
        if not queue[kind]:
            raise DataError(f"{where}: more <{kind}> tags than media")
        parts[j] = Medium(kind, str(safe_join(root, queue[kind].pop(0))))
    return parts


def captioned(record):
    """Kind and name of the medium of a caption record {image_name|video_name|audio_name, caption}. Raises DataError."""
    for kind in KINDS:
        if f"{kind}_name" in record:
            return kind, record[f"{kind}_name"]
    raise DataError("neither image_name, video_name nor audio_name")


def caption_sample(record, root):
    """Caption record -> Sample that asks for the caption."""
    kind, name = captioned(record)
    medium = Medium(kind, str(safe_join(root, name)))
    return Sample([["generate a caption\n", medium], [record["caption"]]], str(record.get("id", "")), record)


@contextmanager
def naming(path, i, record):
    """Whatever is wrong with record i of a file becomes a DataError that says where."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        name = record.get("id", "") if isinstance(record, dict) else repr(record)
        what = f"no {error}" if isinstance(error, KeyError) else error
        kind = Unfit if isinstance(error, Unfit) else DataError
        raise kind(f"{path}: record {i} ({name!s:.40}): {what}") from None


class Conversations:
    """A file of LLaVA and caption records as Samples. Raises DataError naming file and record for a malformed one."""
    def __init__(self, path, root=None):
        self.path, self.root = Path(path), Path(root or Path(path).parent)
        self.records = read_records(path)

    def __len__(self):
        return len(self.records)

    def sizes(self):
        return [len(str(record)) for record in self.records]

    def __getitem__(self, i):
        record = self.records[i]
        with naming(self.path, i, record):
            return (llava_sample if "conversations" in record else caption_sample)(record, self.root)


@dataclass(eq=False, repr=False)
class Prepared(torch.utils.data.Dataset):
    """Data sets -> Rendered samples with their media loaded. An unusable one gives way to the next and is counted."""
    sets: list
    tok: Tokenizer
    system: System
    template: Template
    n_token: Callable                   # kind -> placeholders of a medium
    spec: MediaSpec
    max_bad: int = 0                    # how many may be replaced before DataError or MediaError ends the run
    media_front: bool = False           # see media_in_front
    where: Callable | None = None       # a mixture: epoch -> its (set, record) numbers in order, as many; None: all
    max_len: int = sys.maxsize          # ids of a sample; of a longer one the last go, but none of media and boxes

    def __post_init__(self):
        self.protected = {*self.tok.added.values(), self.tok.special.get(self.system.frame[1], -1)}         # -1: none
        every = ((s, i) for s, one in enumerate(self.sets) for i in range(len(one)))
        self.epoch, self.items = 0, self.where(0) if self.where else [*every]
        sizes = [one.sizes() for one in self.sets]
        self.sizes = [sizes[s][i] for s, i in self.items]       # rough length of each sample
        self.bad = {}                                           # number of an unusable record: why
        self.is_bad = torch.zeros(len(self), dtype=torch.bool).share_memory_()              # by all loader workers

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        for j in range(i, i + len(self)):
            number = j % len(self)
            try:
                return self.prepare(number, i // len(self))
            except Unfit:
                continue
            except (DataError, MediaError) as error:
                known = bool(self.is_bad[number])
                self.bad[number], self.is_bad[number] = str(error), True
                if self.is_bad.sum() > self.max_bad:
                    raise type(error)(f"{error}; more than max_bad = {self.max_bad} such records") from None
                if not known:
                    print(f"passing over {error}", file=sys.stderr, flush=True)
        raise DataError(f"{self.sets[0].path}: no usable record in the whole data set {self.bad or ''}")

    def prepare(self, number, epoch):
        if self.where and epoch != self.epoch:                  # those of one are kept: they may be millions
            self.epoch, self.items = epoch, self.where(epoch)
        s, i = self.items[number]
        self.sets[s].epoch = epoch      # what a set draws for a record, such as words to ask in, it draws anew in each
        sample = self.sets[s][i]
        with naming(self.sets[s].path, i, sample.meta):
            load_media(sample.turns, self.spec)
            turns = [media_in_front(turn, self.template) if self.media_front else turn for turn in sample.turns]
            r = truncate(self.render(turns), self.max_len, self.protected)
            if len(r.ids) > self.max_len or not r.learns():
                raise DataError(f"nothing to learn within max_len = {self.max_len}")
        return r

    def render(self, turns):
        return render(turns, self.tok, self.system, self.template, self.n_token, train=True)

    def show(self, i):
        """A sample as the model sees it, what it learns in brackets."""
        out, parts = self[i], []
        for learned, run in groupby(zip(out.ids, out.labels), lambda pair: pair[1] != IGNORE):
            text = "".join(self.tok.names.get(id) or self.tok.sp.id_to_piece(id) for id, _ in run)
            parts.append(f"[{text}]" if learned else text)
        return "".join(parts).replace("▁", " ")


def epoch_batches(sizes, batch, seed, epoch, ordered=False):
    """Batches of sample numbers for one epoch, shuffled (unless `ordered`) as the arguments alone decide."""
    order = list(range(len(sizes)))
    if not ordered:
        random.Random(f"{seed}/{epoch}").shuffle(order)
    order = order[:max(len(order) - len(order) % batch, batch)]                             # whole batches, or all
    # Short samples first: micro-batches cut from a batch are padded little, while the batch stays a fair draw.
    return [sorted(order[i:i + batch], key=lambda j: (sizes[j], j)) for i in range(0, len(order), batch)]
