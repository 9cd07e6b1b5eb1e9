"""Talk with a model about pictures, sounds and clips, about boxes in pictures, and have it draw.

In order: command line, Session (the conversation), drawings, overlay, terminal, Chat (commands), start.
A Session knows no terminal, so any front end can use it:

    session = chat.open_session("weights/nextchat-7b-336")
    text, boxes, masks, picture = session.ask("What is [0] looking at?", "dog.jpg", boxes=[(34, 50, 210, 333)])

It keeps the keys and values of all that was said: a new message costs only its own tokens, and each medium is read and
encoded once. Letters: T tokens, C width, n features, m boxes. Boxes are x1, y1, x2, y2 in pixels of the last picture.
Text typed by a user never becomes a special token. Text that is not ours loses its control characters before printing.
"""
import argparse
import atexit
import base64
import difflib
import glob
import io
import json
import os
import re
import shlex
import signal
import sys
import time
import wave
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.util import find_spec
from itertools import chain, count, cycle, groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from weakref import WeakKeyDictionary

# ---- Command line

TINY = Path(__file__).with_name("weights") / "tiny"
FITS = {                                # kind of medium: what its file may hold, see contents
    "image": ("image", "animation"), "audio": ("audio", "video"), "video": ("video", "animation"), "depth": ("",),
    "thermal": ("image",), "imu": ("",)}
SETTINGS = {                            # name: default, least, most, meaning
    "temperature": (0.0, 0, 100, "spread of sampling; 0 takes the likeliest token"),
    "top_k": (50, 0, 1 << 24, "sample among the k likeliest tokens; 0 = all"),
    "top_p": (1.0, 0, 1, "sample among the likeliest tokens that share this probability"),
    "repetition_penalty": (1.0, 0.1, 10, "above 1 discourages what the answer said already"),
    "beams": (1, 1, 16, "above 1: the likeliest of so many answers that are followed, without sampling"),
    "max_new_tokens": (256, 1, 1 << 24, "longest answer"),
    "seed": (0, 0, (1 << 62) - 1, "where sampling and drawing start"),
    "steps": (0, 0, 999, "steps of a drawing; 0 = as many as its painter likes"),
    "guidance": (0.0, 0, 100, "how closely drawings follow their text, 1 not at all; 0 = as its painter likes"),
    "graph": (0, 0, 1, "1: on a GPU each token is one launch, a CUDA graph; not yet tried on one"),
}
EXAMPLES = """examples:
  python chat.py                                          chat with the small model that comes along
  python chat.py weights/chatbind-7b --temperature 0.2    chat with converted weights
  python chat.py -p "What is this?" --image dog.jpg       one question; stdout gets the answer, nothing else
  python chat.py -p "What do you hear?" --audio a.wav --json
  python chat.py weights/nextchat-7b-336 -p "What is [0]?" --image dog.jpg --box 34 50 210 333 --out found
  python chat.py < questions.txt                          a turn per line

In the chat, /help lists the commands, and a file dragged into the terminal is attached."""


def setting(name, value):
    """The value of a setting, from a number or its text. Raises ValueError saying what is allowed."""
    if name not in SETTINGS:
        raise ValueError(f"no setting {name!r:.40}; there are {', '.join(SETTINGS)}")
    default, least, most, _ = SETTINGS[name]
    with suppress(ValueError, OverflowError, TypeError):
        number = round(type(default)(value), 4)
        if least <= number <= most:
            return number
    raise ValueError(f"{name} is a number from {least} to {most}, not {value!r:.40}")


def parse_args():
    parser = argparse.ArgumentParser(description="Talk with a model about pictures, sounds and clips.", epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("weights", nargs="?", default=TINY, help="weights folder (weights/tiny)")
    add("-p", "--prompt", metavar="TEXT", help="ask this one question and end; @FILE attaches a file")
    for kind in FITS:
        add(f"--{kind}", dest="media", metavar="FILE", action="append", default=[],
            type=lambda path, kind=kind: (path, kind), help=f"attach {kind} to the first message; repeatable")
    add("--box", dest="boxes", nargs=4, metavar=("X1", "Y1", "X2", "Y2"), action="append", default=[],
        help="box in the picture, pixels; [0] in the message is the first one; repeatable")
    add("--find", action="store_true", help="let the model look for a box that answers the message (ChatterBox)")
    add("--json", action="store_true", help="print each answer as a JSON object")
    add("--out", type=Path, metavar="FOLDER",
        help="write the picture of each answer with boxes, and its masks, as PNG; and all that is drawn (drawn)")
    add = parser.add_argument_group("sampling").add_argument
    for name, (default, _, _, meaning) in SETTINGS.items():
        add(f"--{name.replace('_', '-')}", metavar="N", default=default, help=f"{meaning} ({default})")
    add = parser.add_argument_group("model").add_argument
    add("--device", help="cuda, mps, cpu ... (the best there is)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (bfloat16 on cuda "
        "and, for big ones, on CPUs that multiply it; else float32)")
    add("--quantize", choices=("int8", "int4"), default="", help="keep the language model in 8 or 4 bits")
    add("--context", type=int, default=0, metavar="N", help="tokens to remember (as many as the model was trained for)")
    add("--templates", metavar="FILE", help="JSON of conversation templates, in the layout of the originals")
    add("--template", metavar="NAME", default="", help="row of that, or of data.TEMPLATES (the model's own)")
    add("--painters", metavar="FOLDER", help="holds a folder for each painter (painters, in the weights folder)")
    add("--no-draw", action="store_true", help="leave the painters out")
    add("--parse-special", action="store_true", help="typed names of special tokens count, as in the originals")
    add = parser.add_argument_group("terminal").add_argument
    add("--pictures", choices=("auto", "kitty", "iterm", "blocks", "off"), default="auto", help="show pictures (auto)")
    add("--no-history", action="store_true", help="do not keep typed lines for the next time")
    return parser.parse_args()


def read_ahead(folder):
    """Have the system read weights into memory while Python imports: page by page, when they are needed, takes longer."""
    files = [path for path in Path(folder).glob("*") if path.is_file()]
    for path in sorted(files, key=os.path.getsize):             # config.json would else have to wait for the weights
        with suppress(OSError, AttributeError), open(path, "rb") as f:          # macOS: none; load says what is wrong
            for at in range(0, os.path.getsize(path), 1 << 22):                 # Linux heeds no more at a time
                os.posix_fadvise(f.fileno(), at, 1 << 22, os.POSIX_FADV_WILLNEED)


if __name__ == "__main__":              # before the imports, which take seconds
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:   # scripts in the background have it ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C ends us without a word, until a chat begins
    ARGS = parse_args()
    Thread(target=read_ahead, args=(ARGS.weights,), daemon=True).start()

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import data
from datasets import mask_rle
from generate import DRAW, PainterConfig
from model import (KVCache, Replay, beam_search, find_device, fuse, generate, keep_memory, load, load_painter,
                   read_config, read_out, signal_runs, usual_dtype)

# ---- Session

MIN_IOU, MIN_SCORE = 0.3, 0.3           # of masks by SAM's own estimate, of boxes that were looked for; below: none


@dataclass(eq=False)
class Turn:
    """A message with its media, the answer, and what it took to make."""
    text: str
    media: list
    answer: str = ""                    # boxes in it are spelled in pixels
    given: list = ()                    # Boxes that the message names
    found: list = field(default_factory=list)                   # Boxes that the model found
    find: bool = False                  # the model shall look for a box
    score: float | None = None          # probability of the best box that it looked for
    picture: data.Medium | None = None  # in which boxes lie
    prompt: list = ()                   # ids that asked for the answer
    ids: list = ()                      # generated
    made: dict = field(default_factory=dict)            # writer: what it made of its signal tokens among them
    drawn: list = field(default_factory=list)           # Drawings of that, one after another
    fault: str = ""                     # why a painter failed; what was said and drawn before stands
    stray: list = ()                    # signal tokens that came in no complete run, so nothing was made of them
    reused: int = 0                     # prompt tokens whose keys and values were there already
    dropped: int = 0                    # oldest turns that went to make room
    clock: list = (0, 0, 0, 0)          # seconds: at the start, with media encoded, at the first and the last new id

    @property
    def boxes(self):
        """Boxes that were found, [[x1, y1, x2, y2]] in pixels; they may reach out of the picture."""
        return [list(box.xyxy_px) for box in self.found]

    @property
    def masks(self):
        """Bool masks (m, H, W) of those boxes; None if the model makes none."""
        masks = [box.mask for box in self.found if box.mask is not None]
        return np.stack(masks) if masks else None


def spell(box):
    """A box as text, whole pixels."""
    return "[" + ", ".join(f"{x:.0f}" for x in box.xyxy_px) + "]"


def last_picture(media):
    return next((medium for medium in reversed(media) if medium.kind == "image"), None)


def contents(path):
    """What a file holds: what data.sniff says, or "animation" for a picture of several frames."""
    found = data.sniff(path)
    picture = data.open_image(path) if found == "image" else None
    moves = getattr(picture, "n_frames", 1) > 1 and picture.format != "MPO"     # a photo with a small one of itself
    return "animation" if moves else found


def name_boxes(text, boxes):
    """Parts of a text with the Boxes where it names them, [0] or [1, 2]; without a name all of them at its end."""
    parts = data.box_references(text)                   # text, numbers, text ... text
    if not boxes or len(parts) == 1:
        return [text, *boxes]
    if (most := max(chain(*parts[1::2]))) >= len(boxes):
        raise ValueError(f"there is no box {most}; boxes are counted from 0 to {len(boxes) - 1}")
    out = []
    for before, numbers in zip(parts[::2], parts[1::2]):
        out += [before, *(boxes[i] for i in numbers)]
    return [*out, parts[-1]]


class Session:
    """A conversation. `say` and `retry` yield the answer in pieces; at their end the turn stands in `turns`.
    What fails raises (one of data.FAULTS where the user can mend it) and changes nothing, but for Turn.fault."""

    def __init__(self, model, tok, system, template, spec=data.MediaSpec(), context=0, parse_special=False, painters=(),
                 **settings):
        self.painters = dict(painters)                  # writer: folder of its painter
        self.load_painter = cache(load_painter)         # when first needed; most talks draw nothing
        self.model, self.tok, self.system, self.template, self.spec = model, tok, system, template, spec
        self.weight, self.parse_special = model.llm.embed.weight, parse_special     # weight: for its device and dtype
        self.box_kinds = [kind for kind in ("box", "region") if kind in model.cfg.reads]    # the first unless told
        self.wishes = [name for name in model.writers if name not in ("at", "vg")]  # writers that need no picture
        self.max_len = min(context or model.cfg.llm.max_len, model.cfg.llm.max_len)         # tokens
        self.generator, self.settings = torch.Generator(self.weight.device), {}
        for name, row in SETTINGS.items():
            self.set(name, settings.get(name, row[0]))
        self.system_text = ""                           # in place of the template's
        self.turns, self.pending, self.boxes = [], [], []       # pending, boxes: what goes with the next message
        self.cache, self.replay, self.held = None, None, []     # held: for each place of the cache, its id or Medium
        self.features = WeakKeyDictionary()             # Medium -> (n, C)
        self.seen = WeakKeyDictionary()                 # picture -> levels, see model.RegionReader

    def set(self, name, value):
        """Change a setting; a seed starts sampling afresh."""
        self.settings[name] = setting(name, value)
        if name == "seed":
            self.generator.manual_seed(self.settings[name])

    @cached_property
    def folder(self):
        """Of pictures that came as pixels; goes when the session does."""
        return TemporaryDirectory()

    @property
    def media(self):
        """All media; users count them from 1."""
        return [*chain(*(turn.media for turn in self.turns)), *self.pending]

    def read(self, path, kind=""):
        """The Medium of a file, of the kind that its content suggests or of a given one. Raises MediaError."""
        path, reads = os.path.expanduser(path), self.model.cfg.reads
        found = contents(path)          # to a model that reads no clips an animation is its first picture
        kind = kind or {"animation": "video" if "video" in reads else "image"}.get(found, found)
        if found not in FITS.get(kind, ()):
            raise data.MediaError(f"{path}: not readable as {kind or 'a medium'}, its type is {found or 'unknown'}")
        if kind not in reads:
            raise data.MediaError(f"{path}: this model reads {', '.join(reads) or 'only text'}, not {kind}")
        medium = data.Medium(kind, path)
        data.load_medium(medium, self.spec)
        return medium

    def box(self, xyxy_px, picture, kind=""):
        """The Box of a user's pixels in a picture. Raises ValueError if it is none, or if the model reads no such."""
        if not (kinds := [one for one in self.box_kinds if kind in ("", one)]):
            raise ValueError(f"this model reads no {kind or 'boxe'}s")
        if picture is None:
            raise ValueError("a box needs a picture; attach one first")
        box = data.Box(tuple(map(float, xyxy_px)), picture=picture, kind=kinds[0])
        data.place_boxes([box], data.Geometry(*picture.size, self.spec.square), self.spec)
        return box

    def add_box(self, xyxy_px, kind=""):
        """Have a box in the last picture go with the next message; returns its name there."""
        self.boxes.append(self.box(xyxy_px, last_picture(self.media), kind))
        return f"[{len(self.boxes) - 1}] is {spell(self.boxes[-1])}"

    def found(self, frame, picture, kind=""):
        """The Box of a place (4,) in the frame of a picture, where the model put it."""
        geometry = data.Geometry(*(picture.size if picture else (1, 1)), self.spec.square)  # without a picture: 0..1
        kind = kind if kind in self.box_kinds else [*self.box_kinds, "box"][0]
        return data.Box(tuple(geometry.to_pixels(frame.cpu()).tolist()), tensor=frame, picture=picture, kind=kind)

    def last(self):
        """The last turn. Raises ValueError if there is none."""
        if not self.turns:
            raise ValueError("nothing was said yet")
        return self.turns[-1]

    def say(self, text, media=(), boxes=(), find=False):
        """Answer a message with the pending and the given media. Closing the iterator keeps what was said so far.

        boxes: pixels of the last picture. "[0]" or "[1, 2]" in the text names boxes of the message or, if it has none,
        of the last turn with boxes. find: look for a box that answers the message (ChatterBox's [VG]).
        """
        picture = last_picture([*self.media, *media])
        given = [*self.boxes, *(self.box(box, picture) for box in boxes)] or self.earlier_boxes(text)
        if find and "vg" not in self.model.writers:
            raise ValueError("this model does not look for boxes on demand; ask it in words")
        if find and picture is None:
            raise ValueError("a search needs a picture; attach one first")
        return self.answer([*self.turns, Turn(text, [*self.pending, *media], given=given, find=find, picture=picture)])

    def earlier_boxes(self, text):
        """Boxes of the last turn that has any, if a text names some."""
        if len(data.box_references(text)) == 1:
            return []
        return next(filter(None, (turn.found or turn.given for turn in reversed(self.turns))), [])

    def ask(self, text, image=None, boxes=(), find=False):
        """One turn in one call -> its text, boxes [[x1, y1, x2, y2]], masks (m, H, W) or None, overlay or None.

        image: a file, or a picture of Pillow's or its pixels (H, W, 3), which become a file of this session.
        """
        if not isinstance(image, (str, os.PathLike, type(None))):
            picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
            image = new_name(self.folder.name, "{}.png")
            picture.convert("RGB").save(image)
        "".join(self.say(text, [self.read(image)] if image else [], boxes, find))
        turn = self.last()
        if turn.fault:
            raise ValueError(turn.fault)
        return turn.answer, turn.boxes, turn.masks, overlay(turn)

    def retry(self):
        """Answer the last message anew."""
        last = self.last()
        anew = Turn(last.text, last.media, given=last.given, find=last.find, picture=last.picture)
        return self.answer([*self.turns[:-1], anew])

    def undo(self):
        """Forget the last turn; returns it."""
        last, self.turns = self.last(), self.turns[:-1]
        return last

    def drop(self, medium):
        """Take a medium out of the conversation."""
        for media in (self.pending, *(turn.media for turn in self.turns)):
            media[:] = [one for one in media if one is not medium]
        self.boxes = [box for box in self.boxes if box.picture is not medium]

    def clear(self):
        """Forget all turns and media; settings and the system text stay."""
        self.turns, self.pending, self.boxes = [], [], []

    def save(self, path):
        """Write the conversation as JSON, media by their paths. Never replaces a file."""
        def place(medium):              # None: the box lies in no picture
            return medium and os.path.abspath(medium.path)

        def rows(boxes):
            return [{"frame": box.tensor.tolist(), "picture": place(box.picture), "kind": box.kind} for box in boxes]
        turns = [{"text": turn.text, "media": [{"path": place(m), "kind": m.kind} for m in turn.media],
                  "answer": turn.answer, "find": turn.find, "picture": place(turn.picture),
                  "given": rows(turn.given), "found": rows(turn.found)} for turn in self.turns]
        with open(os.path.expanduser(path), "x", encoding="utf-8") as file:
            json.dump({"system": self.system_text, "turns": turns}, file, indent=1)

    def load(self, path):
        """Go on with a saved conversation; its media are read again."""
        try:
            saved, pictures = json.loads(data.check_file(os.path.expanduser(path)).read_bytes()), {None: None}
            turns = [self.restore(row, pictures) for row in saved["turns"]]
            system = str(saved["system"])
            self.tok.encode("".join([system, *(turn.text + turn.answer for turn in turns)]))    # refuses odd unicode
        except data.MediaError:
            raise
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: not a saved conversation ({type(error).__name__}: {error})") from None
        self.turns, self.pending, self.boxes, self.system_text = turns, [], [], system

    def restore(self, row, pictures):
        """The Turn of a saved row. pictures: {path: Medium} of the turns before it, which gets its own."""
        turn = Turn(str(row["text"]), [self.read(str(m["path"]), str(m["kind"])) for m in row["media"]])
        pictures |= {os.path.abspath(m.path): m for m in turn.media if m.kind == "image"}

        def picture(path):              # of an earlier turn, or one that is no longer in the conversation
            if path not in pictures:
                pictures[path] = self.read(str(path), "image")
            return pictures[path]

        def boxes(rows):
            return [self.found(torch.tensor(box["frame"]).float().view(4), picture(box["picture"]), box.get("kind"))
                    for box in rows if self.box_kinds]
        turn.answer, turn.picture = str(row["answer"]), picture(row.get("picture"))
        turn.find = bool(row.get("find")) and "vg" in self.model.writers
        turn.given, turn.found = boxes(row.get("given", ())), boxes(row.get("found", ()))
        return turn

    def question(self, turn, current):
        """Parts of a message: its text with Boxes, and media before it or, a line each, below. Raises ValueError."""
        parts = name_boxes(turn.text, turn.given)
        if current:
            signal = [data.Piece(self.model.cfg.writes["vg"][0], special=True)] if turn.find else []
            parts = [self.template.ask, *parts, *signal]
        else:                                           # parity: ChatterBox forgets regions and [VG] of earlier rounds
            parts = [part for part in parts if getattr(part, "kind", "") != "region"]
        if not self.system.media_last:
            return [*turn.media, *parts]
        return [*parts, *chain(*(("\n", medium) for medium in turn.media))]

    def reply(self, turn):
        """Parts of an answer: its text, with Boxes where they are spelled in it."""
        parts = [turn.answer]
        for box in () if turn.find else turn.found:     # what was looked for is not in the text
            before, spelled, after = parts[-1].partition(spell(box))
            parts[-1:] = [before, box, after] if spelled else [before]
        return parts

    def prompt(self, turns):
        """-> ids that ask for the last turn's answer, [(Medium or Box, its first place)]."""
        rows = chain(*((self.question(turn, current=False), self.reply(turn)) for turn in turns[:-1]))
        rows = [*rows, self.question(turns[-1], current=True), None]            # None: the answer that is asked for
        parts = data.conversation_pieces(rows, self.tok, self.system, self.template, self.model.cfg.n_token)
        if self.system_text:                            # a plain piece, since users type it; it ends as the template's
            blanks = re.search(r"[#\s]*$", self.template.system)[0]
            parts[0] = [data.Piece(self.system_text + (blanks or " "))]
        pieces = chain(*parts)
        if self.parse_special:
            pieces = chain(*([piece] if piece.special else self.tok.parse(piece.text) for piece in pieces))
        ids, _, slots = self.tok.encode_pieces(pieces)
        return ids, slots

    def fit(self, turns):
        """-> newest turns that leave room for an answer, ids, slots. Raises ValueError if one alone is too long."""
        room = min(self.settings["max_new_tokens"], self.max_len // 2)          # a lavish limit costs no history
        for first in range(len(turns)):
            ids, slots = self.prompt(turns[first:])
            if len(ids) + room <= self.max_len:
                break
        if len(ids) >= self.max_len:
            raise ValueError(f"the message takes {len(ids)} tokens, the context has {self.max_len}: shorten it")
        return turns[first:], ids, slots

    def answer(self, turns):
        """Generate the last turn's answer; then keep the turns."""
        kept, ids, slots = self.fit(turns)
        turn = kept[-1]
        turn.prompt, turn.dropped = ids, len(turns) - len(kept)
        try:
            yield from self.run(turn, slots)
        except (KeyboardInterrupt, GeneratorExit):
            if turn.answer or turn.made:
                self.keep(kept)
            raise
        except (*data.FAULTS, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):    # a CPU's words for it
                self.cache, self.replay, self.held = None, None, []             # the largest that can be given back
                error = MemoryError("out of memory: lower --context, attach less, or try --dtype bfloat16")
            if not turn.made:
                raise error from None
            turn.fault = str(error) or repr(error)
        self.keep(kept)

    def run(self, turn, slots):
        """Yield the answer in pieces, running only what the cache does not hold yet; note what it holds then."""
        places = list(turn.prompt)
        for medium, at in slots:                        # ids alone do not tell which medium stands there
            n = self.model.cfg.n_token(medium.kind)
            places[at:at + n] = [medium] * n
        turn.reused = self.reusable(turn, places)
        self.cache = cache = self.cache or KVCache(self.model.llm, 1, self.max_len)             # one for all turns
        cache.pos = turn.reused
        try:
            yield from self.decode(turn, slots, places)
        finally:
            self.held = places[:cache.pos]

    def reusable(self, turn, places):
        """How many places of a prompt need not run. The last must, since it says what comes next, and the one before a
        [VG], since its state is the query."""
        if self.settings["beams"] > 1:                  # beams have a cache of their own
            return 0
        pairs = zip(places, [*self.held, None])         # None: where the cache ends at the latest
        same = next((i for i, (now, then) in enumerate(pairs) if now != then), len(places) - 1)
        return min(same, self.asked(turn) - 1)

    def keep(self, turns):
        """Make turns the history; media and boxes that went with the last one are no longer pending."""
        self.turns, self.pending = turns, [medium for medium in self.pending if medium not in turns[-1].media]
        self.boxes = [box for box in self.boxes if box not in turns[-1].given]

    def decode(self, turn, slots, places):
        """Run the rest of the prompt, then yield the answer as its text becomes certain. `places` gets what is fed."""
        start = time.perf_counter()
        embeds = self.embed(turn.prompt, slots, turn.reused)
        turn.clock, hidden = [start, time.perf_counter(), 0, 0], []     # hidden: states (1, T', C) of each pass, T' new
        for text in self.texts(self.parts(turn, embeds, hidden, places)):
            turn.clock[3] = time.perf_counter()
            new, turn.answer = text[len(turn.answer):], text
            if new:
                yield new
        self.write(turn, hidden[:len(turn.ids)])        # beams went on behind what ends the answer
        self.outline(turn, places[len(turn.prompt):], hidden)
        self.paint(turn)

    def new_ids(self, turn, embeds, hidden):
        """Ids of an answer, as they are generated; beams give theirs at the end."""
        most = min(self.settings["max_new_tokens"], self.max_len - len(turn.prompt))
        if (beams := self.settings["beams"]) > 1:
            turn.clock[2] = turn.clock[1]               # how long the first alone took, nobody knows
            return beam_search(self.model, embeds, n_beam=beams, max_new_tokens=most, hidden=hidden)
        how = {name: self.settings[name] for name in ("temperature", "top_k", "top_p", "repetition_penalty")}
        self.replay = (self.replay or Replay(self.model.llm, self.cache)) if self.settings["graph"] else None
        return generate(self.model, embeds, cache=self.cache, max_new_tokens=most, generator=self.generator,
                        hidden=hidden, replay=self.replay, **how)

    @torch.inference_mode()
    def parts(self, turn, embeds, hidden, places):
        """Ids of an answer, with a Box for whatever id follows `<at>`: the model is fed the box it meant there."""
        at, before, turn.ids = next(iter(self.model.feeds), -1), None, []
        for i, id in enumerate(self.new_ids(turn, embeds, hidden)):
            turn.clock[2] = turn.clock[2] or time.perf_counter()
            if turn.find and i == 0:
                self.search(turn, hidden[0])            # whatever the answer says, its question was read
            part, told = id, id
            if before == at:
                frame = self.model.writers["at"](hidden[i][:, -1])[0]                       # (1, C) -> (4,)
                part, told = self.found(frame, turn.picture), self.tok.special[self.system.box[-1]]
                turn.found.append(part)
            places.append(part)
            turn.ids.append(told)
            before = id                                 # as it came: that is what the model feeds by
            yield part

    def texts(self, parts):
        """The certain text of an answer, after each part and at the end: Boxes spelled out, no words to painters."""
        text, said, stream = "", "", data.TextStream(self.tok, [self.template.stop])
        silent = {None, *self.model.feeds}.union(*(self.model.cfg.signal(name) for name in self.wishes))
        for part in chain(parts, [None]):               # None: the end
            if isinstance(part, data.Box):
                said, stream = f"{text} {spell(part)}", data.TextStream(self.tok, [self.template.stop])
            elif part in silent:                        # all that was held back comes out
                stream.flush()
            else:
                stream.push(part)
            text = f"{said} {stream.text[:stream.shown].strip()}".strip()
            yield text
            if stream.done:
                return

    def write(self, turn, hidden):
        """Let the writers make what the answer asks for; hidden: what the model thought at each place."""
        stray = []
        for name in self.wishes:
            prompts = read_out(self.model, [*turn.prompt, *turn.ids], hidden, name, len(turn.prompt))
            if prompts is not None:
                turn.made[name] = prompts
            stray += signal_runs(turn.ids[:-1], self.model.cfg.signal(name))[1]
        turn.stray = [self.tok.names[turn.ids[at]] for at in sorted(stray)]

    def paint(self, turn):
        """Have the painters that are there draw what the writers asked for."""
        how = {name: self.settings[name] or None for name in ("steps", "guidance")}         # None: as the painter likes
        for name in [name for name in turn.made if name in self.painters]:
            painter = self.load_painter(self.painters[name], self.weight.device, self.weight.dtype)
            vocoder, prompts = painter.cfg.vocoder, turn.made[name]             # of sounds, each drawn from one vector
            rate, prompts = (vocoder.rate, prompts) if vocoder else (8, prompts[:, None])   # (m, 1, C), (m, 1, T, C)
            for i, prompt in enumerate(prompts):
                made = DRAW[name](painter, prompt, seed=self.settings["seed"] + i, **how)[0].cpu().numpy()
                turn.drawn.append(Drawing(name, made, rate))

    @torch.inference_mode()
    def outline(self, turn, parts, hidden):
        """Give the boxes among the parts of an answer their masks, if there is a SAM; empty where it doubts them."""
        pointed = {part: h[:, -1] for part, h in zip(parts, hidden) if isinstance(part, data.Box)}      # (1, C) each
        image = getattr(turn.picture, "sam", None)
        if not pointed or image is None or not self.model.cfg.sam:
            return
        h = torch.cat([*pointed.values()])                                                  # (m, C)
        _, logits, iou = self.model.writers["at"].write(h, self.model, image[None].to(h))
        logits = logits * (iou >= MIN_IOU)[..., None, None]                                 # (m, 1, S, S)
        for box, mask in zip(pointed, data.Geometry(*turn.picture.size).masks_to_pixels(logits)):
            box.mask = mask.cpu().numpy()

    def asked(self, turn):
        """Where in its prompt a turn asks for a box, at the last [VG]; behind it if it does not."""
        if not turn.find:
            return len(turn.prompt)
        return len(turn.prompt) - 1 - turn.prompt[::-1].index(self.tok.special[self.model.cfg.writes["vg"][0]])

    def search(self, turn, h):
        """Look for the box that the message asks for. h (1, T', C): hidden states of the prompt's end."""
        image = turn.picture.det[None].to(h)
        boxes, score = read_out(self.model, [*turn.prompt, -1], [h], "vg", self.asked(turn), image=image)
        turn.score = score.item()
        turn.found = [self.found(boxes[0], turn.picture)] if turn.score > MIN_SCORE else []

    @torch.inference_mode()
    def embed(self, ids, slots, start):
        """Embeddings (1, T - start, C) of the places from `start` on, with media written over their placeholders."""
        x = self.model.llm.embed(torch.tensor([ids[start:]], device=self.weight.device))
        for medium, at in slots:
            if at + self.model.cfg.n_token(medium.kind) > start:                # else the cache holds all of it
                new = self.encode(medium)[max(start - at, 0):]                              # (n, C)
                x[0, max(at - start, 0):][:len(new)] = new
        return x

    def encode(self, medium):
        """Features (n, C) of a medium, computed once."""
        if medium not in self.features:
            x = medium.tensor[None].to(self.weight)
            if medium.kind == "region":
                image_of = torch.zeros(1, dtype=torch.long, device=x.device)    # it lies in the first and only picture
                x = {"image": self.levels(medium.picture), "boxes": x, "image_of": image_of}
            elif medium.kind == "image" and "region" in self.model.readers:
                x = self.levels(medium)
            self.features[medium] = self.model.read(medium.kind, x)[0]
        return self.features[medium]

    def levels(self, picture):
        """What CLIP sees in a picture, for the model itself and for regions of the picture; computed once."""
        if picture not in self.seen:
            image = picture.tensor[None].to(self.weight)
            self.seen[picture] = self.model.readers["region"].levels(image, self.model)
        return self.seen[picture]


def find_painters(folder, projections):
    """{writer: folder} of painters in a folder that may not be there. Raises ValueError for one that does not fit."""
    found = {}
    configs = sorted(Path(folder).glob("*/config.json"))
    for path in (path.parent for path in configs if b'"unet"' in path.read_bytes()):            # others may lie there, too
        cfg = read_config(path, PainterConfig)
        wants = cfg.unet.context_dim or cfg.unet.class_dim                      # width of its prompts
        proj = projections.get(cfg.kind)
        if proj and proj.out_dim != wants:
            raise ValueError(f"{path}: paints from vectors of {wants} numbers, this model makes {proj.out_dim}")
        found[cfg.kind] = path
    return found


def open_language(folder, cfg, templates, template):
    """The Tokenizer, System and Template of a weights folder. Raises ValueError if it is not for talking."""
    if cfg.llm is None or cfg.system not in data.SYSTEMS:
        raise ValueError(f"{folder}: holds no model to talk with (system {cfg.system!r})")
    system = data.SYSTEMS[cfg.system]
    tok = data.tokenizer_of(Path(folder) / "tokenizer.model", cfg)
    known = data.TEMPLATES | (data.load_templates(templates) if templates else {})
    if (name := template or cfg.template or system.template) not in known:
        raise ValueError(f"no template {name!r:.40}; there are {', '.join(known)}")
    return tok, system, known[name]


def open_session(folder=TINY, device=None, dtype=None, quantize="", painters=None, templates=None, template="",
                 **options):
    """The Session of a weights folder, on the best device there is. Raises OSError or ValueError naming the fault.

    painters: folder with a folder of each; default: `painters` in the weights folder, if it is there; "": none.
    templates: file of conversation templates, see data.load_templates; one of a name of ours replaces it.
    template: name of a template; default: the one in config.json, else the system's.
    """
    keep_memory()
    device = find_device(device)
    model = load(folder, device, getattr(torch, dtype) if dtype else usual_dtype(folder, device), quantize)
    cfg = model.cfg
    tok, system, template = open_language(folder, cfg, templates, template)
    if not cfg.llm.lora_rank:
        fuse(model)
    found = {} if painters == "" else find_painters(painters or Path(folder) / "painters", cfg.projections)
    if painters and not found:
        raise ValueError(f"{painters}: holds no folder of a painter")
    return Session(model, tok, system, template, data.MediaSpec(**cfg.media), painters=found, **options)


# ---- Drawings

WHAT = {"img": "picture", "vid": "clip", "aud": "sound"}


@dataclass
class Drawing:
    """Something that was drawn. content: pixels (H, W, 3) or (F, H, W, 3), or samples (T,) in -1..1."""
    kind: str                           # img, vid or aud
    content: np.ndarray
    rate: int = 8                       # frames or samples a second

    @property
    def picture(self):
        """Something to look at: the picture or the middle of the clip; None for sounds."""
        if self.kind != "aud":
            return Image.fromarray(self.content if self.kind == "img" else self.content[len(self.content) // 2])

    @property
    def ending(self):
        """Of its file: png, wav, and mp4 or, where PyAV is missing, gif."""
        return {"img": "png", "vid": "mp4" if find_spec("av") else "gif", "aud": "wav"}[self.kind]

    def write(self, file):
        if self.ending == "mp4":
            write_mp4(self.content, self.rate, file)
        elif self.kind == "aud":
            with wave.open(file, "wb") as f:
                f.setnchannels(1), f.setsampwidth(2), f.setframerate(self.rate)
                f.writeframes((self.content.clip(-1, 1) * 32767).astype("<i2").tobytes())       # 16 bits a sample
        else:
            first, *rest = map(Image.fromarray, self.content.reshape(-1, *self.content.shape[-3:]))         # (H, W, 3)
            first.save(file, self.ending, save_all=bool(rest), append_images=rest, duration=1000 // self.rate, loop=0)


def write_mp4(frames, rate, file):
    """uint8 frames (F, H, W, 3) as a film; H.264 wants even sides, so the last row or column may be there twice."""
    import av                                           # extra [media]
    frames = np.pad(frames, [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)], "edge")
    with av.open(file, "w", "mp4") as film:
        stream = film.add_stream("libx264" if "libx264" in av.codecs_available else "mpeg4", rate, options={"crf": "15"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"                      # what every player reads
        for frame in chain(map(av.VideoFrame.from_ndarray, frames), [None]):                # None: what is held back
            film.mux(stream.encode(frame))


def new_name(folder, pattern):
    """The first path of a pattern with a {number} that is free; the folder is made."""
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return next(name for i in count(1) if not (name := folder / pattern.format(i)).exists())


def write_drawing(drawing, folder):
    """A drawing as a file of a new number; never replaces a file. Returns its name."""
    name = new_name(folder, f"{WHAT[drawing.kind]}-{{:04}}.{drawing.ending}")
    with open(name, "xb") as file:
        drawing.write(file)
    return name


# ---- Overlay

COLOURS = "#F76566", "#18ACBA", "#9400D3", "#454926", "#4E72B8"


def overlay(turn):
    """The picture of a turn with the boxes and masks that were found in it; None if there are none."""
    return drawn(turn.picture, turn.found) if turn.found and turn.picture else None


def drawn(medium, boxes):
    """A picture with Boxes and their masks in it, numbered."""
    picture = data.read_image(medium.path)
    em = max(10, min(36, max(picture.size) // 16))      # height of the numbers, pixels
    font, limits = ImageFont.load_default(em), np.array(picture.size * 2) - 1
    for box, colour in zip(boxes, cycle(COLOURS)):
        if box.mask is not None:
            picture.paste(colour, mask=Image.fromarray(box.mask.astype(np.uint8) * 128))    # alpha 0.5
    pen = ImageDraw.Draw(picture)
    for i, (box, colour) in enumerate(zip(boxes, cycle(COLOURS))):
        corners = np.nan_to_num(np.array(box.xyxy_px)).clip(0, limits).reshape(2, 2)
        (x1, y1), (x2, y2) = np.sort(corners, axis=0)
        pen.rectangle((x1, y1, x2, y2), outline=colour, width=max(1, em // 5))
        pen.rectangle((x1, y2 - 1.2 * em, x1 + (len(str(i)) + 0.8) * 0.6 * em, y2), fill=colour)
        pen.text((x1 + 0.24 * em, y2 - 0.6 * em), str(i), "white", font, anchor="lm")
    return picture


def write_overlay(turn, picture, folder):
    """Overlay and masks of a turn as PNG files of a new number; never replaces a file. Returns the overlay's name."""
    name = new_name(folder, "turn-{:04}.png")
    masks = {f"-mask-{i}": Image.fromarray(box.mask) for i, box in enumerate(turn.found) if box.mask is not None}
    for tail, image in ({"": picture} | masks).items():
        with open(name.with_stem(name.stem + tail), "xb") as file:
            image.save(file, "PNG")
    return name


# ---- Terminal

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
TERMINALS = [                           # variable, what it says, how such a terminal shows pictures; the first that fits
    ("TMUX", ".+", "off"), ("TERM", "(tmux|screen).*", "off"), ("KITTY_WINDOW_ID", ".+", "kitty"),
    ("TERM", "xterm-(kitty|ghostty)", "kitty"), ("TERM_PROGRAM", "ghostty|WezTerm", "kitty"),
    ("TERM_PROGRAM", r"iTerm\.app", "iterm"), ("LC_TERMINAL", "iTerm2", "iterm"), ("NO_COLOR", ".+", "off"),
    ("COLORTERM", "truecolor|24bit", "blocks")]
INLINE = re.compile(r"""(?:^|\s+)@("[^"]+"|'[^']+'|(?:\\.|\S)+?(?=[.,;:!?)]*(?:\s|$)))""")    # a ? after it stays
DRAGGED = re.compile(r"""("/[^"]+"|'/[^']+'|/(?:\\.|[^\s'"\\])+)(?:\s+|$)""")


def clean(text):
    """Text without what could steer a terminal: C0 but newline and tab, DEL, C1."""
    return CONTROL.sub("", str(text))


def log(text, colour=2):
    """A line on stderr, dim (2) or red (31) if that is a terminal."""
    coloured = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    print(f"\033[{colour}m{clean(text)}\033[0m" if coloured else clean(text), file=sys.stderr, flush=True)


@data.guarded
def preview(path, kind):
    """What people want to know of a medium: its size or length; and its first picture, or None."""
    if kind == "audio":
        x, rate = data.read_audio(path)
        return f"{x.shape[1] / rate:.1f} s", None
    if kind in ("depth", "imu"):
        return "", None
    if data.sniff(path) == "image":
        picture = data.read_image(path)
    else:
        container, stream = data.open_media(path, "video")
        picture = next(container.decode(stream)).to_image()
    return "{}x{}".format(*picture.size), picture


def protocol(env):
    """How the terminal of this environment shows pictures."""
    return next((how for name, says, how in TERMINALS if re.fullmatch(says, env.get(name, ""), re.S)), "off")


def half_blocks(picture):
    """Two pixels a character, one above the other: the colour of a half block and of what is behind it."""
    pixels = np.pad(picture, [(0, picture.height % 2), (0, 0), (0, 0)], "edge")             # (H, W, 3), H even
    pairs = np.concatenate([pixels[::2], pixels[1::2]], axis=2)                             # (H / 2, W, 6)
    line = "\033[38;2;%d;%d;%d;48;2;%d;%d;%dm▀" * pairs.shape[1] + "\033[0m\n"
    return (line * len(pairs)) % tuple(pairs.ravel())


def draw(picture, how):
    """The characters that show a picture: half blocks of two pixels, or a PNG in escape codes of kitty or iTerm2."""
    picture = picture.convert("RGB")
    if how == "blocks":
        picture.thumbnail((60, 48))
        return half_blocks(picture)
    picture.thumbnail((480, 320))
    png = io.BytesIO()
    picture.save(png, "PNG")
    text = base64.b64encode(png.getvalue()).decode()
    if how == "iterm":
        return f"\033]1337;File=inline=1;size={len(png.getvalue())};width={picture.width}px:{text}\a\n"
    *chunks, last = re.findall(".{1,4096}", text)                               # kitty takes no more at a time
    codes = [*(f"m=1;{chunk}" for chunk in chunks), f"m=0;{last}"]              # m=1: more of it comes
    codes[0] = "f=100,a=T,q=2," + codes[0]                                      # a PNG, to be shown, without an answer
    return "".join(f"\033_G{code}\033\\" for code in codes) + "\n"


def file_names(text):
    """Names in a line: all of it if that is a file, else words as a shell reads them. ValueError if a quote is open."""
    whole = os.path.expanduser(text)
    return [whole] if os.path.isfile(whole) else [os.path.expanduser(word) for word in shlex.split(text)]


def one_file(text):
    """The name in a line that holds no more."""
    if len(names := file_names(text)) != 1:
        raise ValueError("one file is wanted; put quotes around a name with blanks")
    return names[0]


def dragged(text):
    """A line with an @ before each file that it begins with, as when these are dragged into the terminal."""
    match = DRAGGED.match(text)         # in quotes it is a file even if it is not there
    if match and (match[1][0] != "/" or os.path.isfile(file_names(match[1])[0])):
        return "@" + match[0] + dragged(text[match.end():])
    return text


def only_media(text):
    """The media files that a line names, and nothing else; or []."""
    with suppress(ValueError, OSError):
        return names if all(map(data.sniff, names := file_names(text))) else []
    return []


def complete(text, state):
    """readline's completer: commands at the start of a line, and files."""
    mark, start = re.fullmatch(r"(@?)(.*)", re.sub(r"\\(.)", r"\1", text), re.S).groups()    # @my\ dog -> @, my dog
    files = sorted(glob.glob(glob.escape(os.path.expanduser(start)) + "*"))
    names = [f"/{name}" for name in COMMANDS if f"/{name}".startswith(text) and text]
    names += [mark + re.sub(r"""([\s'"\\()&;])""", r"\\\1", path) + "/" * os.path.isdir(path) for path in files]
    return [*names, None][state]


def use_readline(history):
    """Line editing, completion and, with `history`, the lines of the last time. Windows has no readline."""
    with suppress(ImportError, OSError):
        import readline
        readline.set_completer(complete)
        readline.set_completer_delims(" \t\n")
        libedit = "libedit" in str(readline.__doc__)    # what macOS has under that name, with other words
        readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
        if history:
            path = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "nanomni/history"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)                      # what people ask is nobody else's business
            readline.read_history_file(path)
            readline.set_history_length(1000)
            atexit.register(readline.write_history_file, path)


# ---- Chat

class Chat:
    """A Session in a terminal. Answers and lists go to stdout; remarks and errors to stderr."""

    def __init__(self, session, args):
        self.session, self.args = session, args
        self.interactive = args.prompt is None and sys.stdin.isatty() and sys.stdout.isatty()
        self.pictures = protocol(os.environ) if args.pictures == "auto" else args.pictures

    def run(self):
        """Take lines until they end. Whatever goes wrong with one of them, the conversation goes on."""
        while True:
            try:
                self.line(input("> " * self.interactive).strip())
            except EOFError:
                return
            except KeyboardInterrupt:
                log("\nCtrl-C stops an answer; Ctrl-D or /quit ends the chat")
            except data.FAULTS as error:
                log(f"{error!s:.500}", 31)
            except Exception as error:                  # even a mistake of ours must not cost the conversation
                log(f"{error!r:.500}", 31)

    def line(self, text):
        """Do what a line asks: attach files, run a command, or say it."""
        text, files = dragged(text), only_media(text)
        if text.startswith('"""'):
            self.say(self.block(text[3:]))
        elif files:
            self.add(files)
        elif text.startswith("/") and not text.startswith("//"):
            self.command(*text[1:].split(None, 1))
        else:
            self.say(self.inline(text.removeprefix("/")))

    def block(self, text):
        """Text up to three closing quotes or the end of the input, taken as it stands."""
        with suppress(EOFError):
            while '"""' not in text:
                text += "\n" + input(". " * self.interactive)
        return text.partition('"""')[0].strip("\n")

    def command(self, name="", rest=""):
        """Run a command by name and print what it returns. An unknown one is never said to the model."""
        name = ALIASES.get(name, name)
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, 1)
            hint = f"did you mean /{near[0]}?" if near else "/help lists the commands"
            raise ValueError(f"no command or file /{name:.80}; {hint}")
        run, usage, _ = COMMANDS[name]
        if usage.startswith("FILE") and not rest:
            raise ValueError(f"usage: /{name} {usage}")
        if reply := run(self, rest):
            print(clean(reply), flush=True)

    def inline(self, text):
        """Attach the files that @path names in a message; returns it without them. A missing one is an error."""
        self.add(chain(*map(file_names, INLINE.findall(text))))
        return INLINE.sub("", text).strip()

    def add(self, paths, kind=""):
        """Attach files to the next message: all of them, or none if one cannot be read."""
        media = [self.session.read(path, kind) for path in paths]
        self.session.pending += media
        for medium in media:
            self.show(medium)

    def show(self, medium):
        """Describe a medium, with its picture where the terminal can show one."""
        facts, picture = preview(medium.path, medium.kind)
        log(f"#{self.session.media.index(medium) + 1} {medium.kind} {Path(medium.path).name} {facts}")
        self.draw(picture)

    def draw(self, picture):
        if picture and self.interactive and self.pictures != "off":
            print(draw(picture, self.pictures), end="", flush=True)

    def say(self, text, find=False):
        if text.strip():
            self.stream(self.session.say(text, find=find or self.args.find))

    def add_box(self, text, kind=""):
        return self.session.add_box(re.sub(r"[\[\](),]", " ", text).split(), kind)

    def stream(self, pieces):
        """Print an answer while it comes, then what belongs to it. Ctrl-C ends it and keeps what was said."""
        try:
            with closing(pieces):
                for piece in pieces:
                    print("" if self.args.json else clean(piece), end="", flush=True)
        except KeyboardInterrupt:
            return print(" [stopped]")
        self.finish(self.session.last())

    def finish(self, turn):
        """End the line of an answer, or report it, and say what came of it. Raises ValueError if a painter failed."""
        files = [str(write_drawing(drawing, self.args.out or "drawn")) for drawing in turn.drawn]
        print(clean(self.report(turn, files)) if self.args.json else "", flush=True)
        if turn.stray:
            log(f"asked for media, but not with a complete run of signal tokens: {' '.join(turn.stray)}")
        self.show_drawings(turn, files)
        self.show_boxes(turn)
        if turn.dropped:
            log(f"the context is full: the oldest {turn.dropped} turns are forgotten")
        if turn.fault:
            raise ValueError(turn.fault)

    def report(self, turn, files):      # for programs, as JSON
        masks = [mask_rle(box.mask) for box in turn.found if box.mask is not None]
        return json.dumps({"prompt": turn.text, "text": turn.answer, "media": [medium.path for medium in turn.media],
                           "boxes": turn.boxes, "score": turn.score, "masks": masks, "files": files, "fault": turn.fault,
                           "tokens": len(turn.ids), "seconds": round(turn.clock[3] - turn.clock[0], 3),
                           "seed": self.session.settings["seed"], "model": str(self.args.weights)})

    def show_drawings(self, turn, files):
        """Name and show what the writers made, and name the painters that are missing."""
        for drawing, name in zip(turn.drawn, files):
            log(f"{WHAT[drawing.kind]}: {name}")
            self.draw(drawing.picture)
        for name in turn.made.keys() - WHAT.keys():             # of a writer that is no painter's
            log(f"{name}: {turn.made[name].tolist()}")
        missing = " or a ".join(WHAT[name] for name in WHAT if name in {*turn.made} - {*self.session.painters})
        if missing and not self.args.no_draw:
            log(f"no painter for a {missing}: put its folder into `painters` of the weights, or name --painters")

    def show_boxes(self, turn):
        """List the boxes that were found and show them, here and in the folder for them."""
        if turn.find and not turn.found:
            return log(f"no box found, the best has a score of {turn.score:.2f}")
        size = " of {}x{}".format(*turn.picture.size) if turn.picture else ""
        score = f" score {turn.score:.2f}" if turn.find else ""
        for i, box in enumerate(turn.found):
            log(f"box {i}: {spell(box)}{size}{score}")
        if picture := overlay(turn):
            self.draw(picture)
            if self.args.out:
                log(f"written: {write_overlay(turn, picture, self.args.out)}")

    def medium(self, text):
        """The medium that `#2` means; `last` or nothing is the last."""
        numbered = {str(i): medium for i, medium in enumerate(self.session.media, 1)}
        number = str(len(numbered)) if text in ("", "last") else text.removeprefix("#")
        if number not in numbered:
            raise ValueError(f"no such medium among {len(numbered)}; /media lists them")
        return numbered[number]

    def list_media(self, _):
        where = {m: f"in message {i}" for i, turn in enumerate(self.session.turns, 1) for m in turn.media}
        rows = [f"#{i} {m.kind} {m.path} {where.get(m, 'not sent yet')}" for i, m in enumerate(self.session.media, 1)]
        return "\n".join(rows) or "no media"

    def set(self, text):
        if text:
            self.session.set(*[*text.split(None, 1), ""][:2])
        return "\n".join(f"{name} {value}" for name, value in self.session.settings.items())

    def set_system(self, text):
        self.session.system_text = text
        return "" if text else "back to the system text of the template"

    def raw(self, _):
        """Ids and pieces of the last prompt and answer; repr keeps them harmless."""
        def show(ids):
            for id, run in groupby(ids):
                n = len(list(run))
                piece = tok.sp.id_to_piece(id) if id < len(tok.sp) else ""      # a model may have spare rows
                yield f"{id}{tok.names.get(id, piece)!r}" + f"*{n}" * (n > 1)
        turn, tok = self.session.last(), self.session.tok
        return f"prompt: {' '.join(show(turn.prompt))}\nanswer: {' '.join(show(turn.ids))}"

    def stats(self, _):
        turn, n = self.session.last(), len(self.session.last().ids)
        encode, prefill, decode = np.diff(turn.clock)
        when = f"in {prefill:.2f} s" if prefill else "at once with the answer"                 # of beams
        return (f"encode {encode:.2f} s, prefill {len(turn.prompt) - turn.reused} tokens {when}, "
                f"{turn.reused} reused, {n} new tokens at {max(n - 1, 0) / (decode or 1):.1f} tok/s, "
                f"context {len(turn.prompt) + n} of {self.session.max_len}")

    def info(self, _=""):
        model, cfg, weight = self.session.model, self.session.model.cfg, self.session.weight
        able = {"points": "at" in cfg.writes, "masks": cfg.sam, "finds": "vg" in cfg.writes}
        able |= {f"draws a {WHAT[name]}": name in self.session.painters for name in cfg.projections}
        size = sum(x.nbytes for x in chain(model.parameters(), model.buffers())) / 1e6
        facts = [f"{size:,.0f} MB of weights", f"{str(weight.dtype)[6:]} on {weight.device}",        # without "torch."
                 f"context {self.session.max_len}", f"reads {', '.join(['text', *cfg.reads])}"]
        return f"{self.args.weights}: {', '.join([*facts, *(what for what, can in able.items() if can)])}"

    def help(self, _):
        hidden = {*FITS, "region"} - {*self.session.model.cfg.reads}
        rows = [f"{f'/{name} {usage}':22} {text}" for name, (_, usage, text) in COMMANDS.items() if name not in hidden]
        return "\n".join(rows)

    def quit(self, _):
        raise EOFError


COMMANDS = {                            # name: what runs, usage, help
    **{kind: (lambda chat, text, kind=kind: chat.add(file_names(text), kind), "FILE ...", f"attach {kind} files")
       for kind in FITS},
    "box": (Chat.add_box, "X1 Y1 X2 Y2", "a box for the next message, pixels; the first is [0]"),
    "region": (lambda chat, text: chat.add_box(text, "region"), "X1 Y1 X2 Y2", "the same, known by what is in it"),
    "find": (lambda chat, text: chat.say(text, find=True), "QUESTION", "ask, and look for a box that answers"),
    "media": (Chat.list_media, "", "list what is attached"),
    "show": (lambda chat, text: chat.show(chat.medium(text)), "[#k|last]", "describe a medium and show its picture"),
    "drop": (lambda chat, text: chat.session.drop(chat.medium(text)), "[#k|last]", "take a medium out again"),
    "retry": (lambda chat, _: chat.stream(chat.session.retry()), "", "answer the last message anew"),
    "undo": (lambda chat, _: f"taken back: {chat.session.undo().text}", "", "forget the last message and its answer"),
    "clear": (lambda chat, _: chat.session.clear(), "", "forget all messages and media"),
    "save": (lambda chat, text: chat.session.save(one_file(text)), "FILE.json", "write the conversation to a new file"),
    "load": (lambda chat, text: chat.session.load(one_file(text)), "FILE.json", "go on with a saved conversation"),
    "set": (Chat.set, "[KEY VALUE]", "show the settings, change one"),
    "system": (Chat.set_system, "[TEXT]", "replace the system text; alone: back to the template's"),
    "raw": (Chat.raw, "", "ids and pieces of the last prompt and answer"),
    "stats": (Chat.stats, "", "time and tokens of the last answer"),
    "info": (Chat.info, "", "what the model is and reads"),
    "help": (Chat.help, "", "this list, also /?"),
    "quit": (Chat.quit, "", "end, also /exit, /bye, Ctrl-D"),
}
ALIASES = {"?": "help", "exit": "quit", "bye": "quit"}


# ---- Start

def talk(args):
    """Answer the one question, or the lines that come, about what the command line attaches."""
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)         # now, not after an answer
    options = {name: vars(args)[name] for name in ("context", "parse_special", "template", *SETTINGS)}
    painters = "" if args.no_draw else args.painters
    session = open_session(args.weights, args.device, args.dtype, args.quantize, painters, args.templates, **options)
    chat = Chat(session, args)
    for path, kind in args.media:
        chat.add([path], kind)
    for box in args.boxes:
        log(chat.add_box(" ".join(box)))
    if args.prompt is not None:
        if not (text := chat.inline(args.prompt)):
            raise ValueError("-p holds no question")
        return chat.say(text)
    if chat.interactive:
        use_readline(not args.no_history)
        log(chat.info() + "\n/help lists the commands; Ctrl-D ends")
        signal.signal(signal.SIGINT, signal.default_int_handler)
    chat.run()


def main(args):
    """One question or a chat; returns the exit code."""
    for stream in filter(None, (sys.stdin, sys.stdout, sys.stderr)):
        stream.reconfigure(errors="replace")            # odd bytes in names or input are no reason to end
    try:
        talk(args)
    except (*data.FAULTS, RuntimeError) as error:
        log(f"{error!s:.500}", 31)
        return 2
    return 0


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):                      # Windows has none
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)   # `| head -1` ends us without a word, as other programs
    sys.exit(main(ARGS))
