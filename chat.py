"""Talk with a model about pictures, sounds and clips.

In order: command line, Session (the conversation), terminal (text, pictures, typing), Chat (commands), start.
A Session knows no terminal, so any front end can use it. It keeps the keys and values of all that was said: a new
message costs only its own tokens, and each medium is read and encoded once. Letters: T tokens, C width, n features.
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
import sys
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from weakref import WeakKeyDictionary

# ---- Command line

TINY = Path(__file__).with_name("weights") / "tiny"
KINDS = ("image", "audio", "video", "depth", "thermal", "imu")
SETTINGS = {                            # name: default, least, most, meaning
    "temperature": (0.0, 0, 100, "spread of sampling; 0 takes the likeliest token"),
    "top_k": (50, 0, 1 << 24, "sample among the k likeliest tokens; 0 = all"),
    "top_p": (1.0, 0, 1, "sample among the likeliest tokens that share this probability"),
    "repetition_penalty": (1.0, 0.1, 10, "above 1 discourages what the answer said already"),
    "max_new_tokens": (256, 1, 1 << 24, "longest answer"),
    "seed": (0, 0, (1 << 63) - 1, "where sampling starts"),
}
EXAMPLES = """examples:
  python chat.py                                          chat with the small model that comes along
  python chat.py weights/chatbind-7b --temperature 0.2    chat with converted weights
  python chat.py -p "What is this?" --image dog.jpg       one question; stdout gets the answer, nothing else
  python chat.py -p "What do you hear?" --audio a.wav --json
  python chat.py < questions.txt                          a turn per line

In the chat, /help lists the commands, and a file dragged into the terminal is attached."""


def setting(name, value):
    """The value of a setting, from a number or its text. Raises ValueError saying what is allowed."""
    if name not in SETTINGS:
        raise ValueError(f"no setting {name!r:.40}; there are {', '.join(SETTINGS)}")
    default, least, most, _ = SETTINGS[name]
    try:
        number = round(type(default)(value), 4)
    except (ValueError, OverflowError):
        number = float("nan")
    if not least <= number <= most:
        raise ValueError(f"{name} is a number from {least} to {most}, not {value!r:.40}")
    return number


def parse_args():
    parser = argparse.ArgumentParser(description="Talk with a model about pictures, sounds and clips.", epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("weights", nargs="?", default=TINY, help="weights folder (weights/tiny)")
    add("-p", "--prompt", metavar="TEXT", help="ask this one question and end")
    for kind in KINDS:
        add(f"--{kind}", dest="media", metavar="FILE", action="append", default=[],
            type=lambda path, kind=kind: (path, kind), help=f"attach {kind} to the first message; repeatable")
    add("--json", action="store_true", help="print each answer as a JSON object")
    add = parser.add_argument_group("sampling").add_argument
    for name, (default, _, _, meaning) in SETTINGS.items():
        add(f"--{name.replace('_', '-')}", metavar="N", default=default, help=f"{meaning} ({default})")
    add = parser.add_argument_group("model").add_argument
    add("--device", help="cuda, mps, cpu ... (the best there is)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (bfloat16 on cuda, else float32)")
    add("--context", type=int, default=0, metavar="N", help="tokens to remember (as many as the model was trained for)")
    add("--parse-special", action="store_true", help="typed names of special tokens count, as in the originals")
    add = parser.add_argument_group("terminal").add_argument
    add("--pictures", choices=("auto", "kitty", "iterm", "blocks", "off"), default="auto", help="show pictures (auto)")
    add("--no-history", action="store_true", help="do not keep typed lines for the next time")
    return parser.parse_args()


if __name__ == "__main__":
    ARGS = parse_args()                 # before the imports that take seconds, so that --help answers at once

import torch
from safetensors import SafetensorError

import data
from model import KVCache, generate, load

# ---- Session

FITS = {"image": ("image", "animation"), "thermal": ("image",), "audio": ("audio", "video"),
        "video": ("video", "animation"), "depth": ("",), "imu": ("",)}          # what the file of a medium may hold


@dataclass(eq=False)
class Turn:
    """A message with its media, the answer, and what it took to make."""
    text: str
    media: list
    answer: str = ""
    prompt: list = ()                   # ids that asked for the answer
    ids: list = ()                      # generated
    reused: int = 0                     # prompt tokens whose keys and values were there already
    dropped: int = 0                    # oldest turns that went to make room
    clock: tuple = (0, 0, 0, 0)         # at the start, with media encoded, at the first and the last new id


class Session:
    """A conversation. `say` and `retry` yield the answer in pieces; at their end the turn stands in `turns`.

    What fails raises (ValueError or OSError where the user can mend it, or MemoryError) and changes nothing.
    """

    def __init__(self, model, tok, system, template, spec=data.MediaSpec(), context=0, parse_special=False, **settings):
        self.model, self.tok, self.system, self.template, self.spec = model, tok, system, template, spec
        self.weight, self.parse_special = model.llm.embed.weight, parse_special
        self.max_len = min(context or model.cfg.llm.max_len, model.cfg.llm.max_len)
        self.generator, self.settings = torch.Generator(self.weight.device), {}
        for name, row in SETTINGS.items():
            self.set(name, settings.get(name, row[0]))
        self.system_text = ""                           # in place of the template's
        self.turns, self.pending = [], []               # pending: media that go with the next message
        self.cache, self.held = None, []                # held: for each place of the cache, its id or the Medium there
        self.features = WeakKeyDictionary()             # Medium -> (n, C)

    def set(self, name, value):
        """Change a setting; a seed starts sampling afresh."""
        self.settings[name] = setting(name, value)
        if name == "seed":
            self.generator.manual_seed(self.settings[name])

    @property
    def media(self):
        """All media; users count them from 1."""
        return [medium for turn in self.turns for medium in turn.media] + self.pending

    def read(self, path, kind=""):
        """The Medium of a file, of the kind that its content suggests or of a given one. Raises MediaError."""
        path, reads = os.path.expanduser(path), self.model.cfg.reads
        found = data.sniff(path)
        if found == "image" and getattr(data.open_image(path), "n_frames", 1) > 1:
            found = "animation"
        kind = kind or {"animation": "video" if "video" in reads else "image"}.get(found, found)
        if found not in FITS.get(kind, ()):
            raise data.MediaError(f"{path}: not readable as {kind or 'a medium'}, its type is {found or 'unknown'}")
        if kind not in reads:
            raise data.MediaError(f"{path}: this model reads {', '.join(reads) or 'only text'}, not {kind}")
        return data.Medium(kind, path, data.read_media(path, kind, self.spec))

    def last(self):
        """The last turn. Raises ValueError if there is none."""
        if not self.turns:
            raise ValueError("nothing was said yet")
        return self.turns[-1]

    def say(self, text, media=()):
        """Answer a message with the pending and the given media. Closing the iterator keeps what was said so far."""
        return self.answer([*self.turns, Turn(text, [*self.pending, *media])])

    def retry(self):
        """Answer the last message anew."""
        return self.answer([*self.turns[:-1], Turn(self.last().text, self.last().media)])

    def undo(self):
        """Forget the last turn; returns it."""
        last, self.turns = self.last(), self.turns[:-1]
        return last

    def drop(self, medium):
        """Take a medium out of the conversation."""
        for media in (self.pending, *(turn.media for turn in self.turns)):
            if medium in media:
                media.remove(medium)

    def clear(self):
        """Forget all turns and media; settings and the system text stay."""
        self.turns, self.pending = [], []

    def save(self, path):
        """Write the conversation as JSON, media by their paths. Never replaces a file."""
        turns = [{"text": turn.text, "media": [{"path": os.path.abspath(m.path), "kind": m.kind} for m in turn.media],
                  "answer": turn.answer} for turn in self.turns]
        with open(os.path.expanduser(path), "x", encoding="utf-8") as file:
            json.dump({"system": self.system_text, "turns": turns}, file, indent=1)

    def load(self, path):
        """Go on with a saved conversation; its media are read again."""
        try:
            saved = json.loads(data.check_file(os.path.expanduser(path)).read_text(encoding="utf-8"))
            turns = [Turn(str(row["text"]), [self.read(str(m["path"]), str(m["kind"])) for m in row["media"]],
                          str(row["answer"])) for row in saved["turns"]]
            system = str(saved["system"])
            self.tok.encode("".join([system, *(turn.text + turn.answer for turn in turns)]))    # refuses odd unicode
        except data.MediaError:
            raise
        except (LookupError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not a saved conversation ({type(error).__name__}: {error})") from None
        self.turns, self.pending, self.system_text = turns, [], system

    def prompt(self, turns):
        """-> ids that ask for the last turn's answer, [(Medium, its first place)]."""
        rows = []
        for turn in turns:
            below = [part for medium in turn.media for part in ("\n", medium)]
            rows += [[turn.text, *below] if self.system.media_last else [*turn.media, turn.text], [turn.answer]]
        rows[-1] = None                                 # the answer that is asked for
        parts = data.conversation_pieces(rows, self.tok, self.system, self.template, self.model.cfg.n_token)
        if self.system_text:                            # a plain piece, since users type it
            parts[0] = [data.Piece(self.system_text + (re.search(r"[#\s]*$", self.template.system)[0] or " "))]
        pieces = [piece for part in parts for piece in part]
        if self.parse_special:
            pieces = [p for piece in pieces for p in ([piece] if piece.special else self.tok.parse(piece.text))]
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
        """Generate the last turn's answer, running only what the cache does not hold yet; then keep the turns."""
        kept, ids, slots = self.fit(turns)
        places, turn = list(ids), kept[-1]
        for medium, at in slots:
            n = self.model.cfg.n_token(medium.kind)
            places[at:at + n] = [medium] * n
        same = next((i for i, (a, b) in enumerate(zip(places, self.held)) if a != b), min(len(places), len(self.held)))
        turn.prompt, turn.dropped = ids, len(turns) - len(kept)
        turn.reused = min(same, len(ids) - 1)           # one token must run, to say what comes next
        if self.cache:
            self.cache.pos = turn.reused
        try:
            self.cache = self.cache or KVCache(self.model.llm, 1, self.max_len)
            yield from self.decode(turn, slots)
        except (KeyboardInterrupt, GeneratorExit):
            if turn.answer:
                self.keep(kept)
            raise
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
            self.cache = None
            raise MemoryError("out of memory: lower --context, attach less, or try --dtype bfloat16") from None
        finally:
            self.held = [*places, *turn.ids][:self.cache.pos if self.cache else 0]
        self.keep(kept)

    def keep(self, turns):
        """Make turns the history; media that went with the last one are no longer pending."""
        self.turns, self.pending = turns, [medium for medium in self.pending if medium not in turns[-1].media]

    def decode(self, turn, slots):
        """Run the rest of the prompt, then yield the answer as its text becomes certain, without blanks around it."""
        start = time.perf_counter()
        embeds = self.embed(turn.prompt, slots, turn.reused)
        encoded = first = time.perf_counter()
        options = {name: value for name, value in self.settings.items() if name != "seed"}
        options["max_new_tokens"] = min(options["max_new_tokens"], self.max_len - len(turn.prompt))
        stream, turn.ids = data.TextStream(self.tok, [self.template.stop]), []
        ids = generate(self.model, embeds, cache=self.cache, generator=self.generator, **options)
        for id in chain(ids, [None]):                   # None: the end, when all that was held back comes out
            if id is None:
                stream.flush()
            else:
                first = first if turn.ids else time.perf_counter()
                turn.ids.append(id)
                stream.push(id)
                turn.clock = start, encoded, first, time.perf_counter()
            text = stream.text[:stream.shown].strip()
            new, turn.answer = text[len(turn.answer):], text
            if new:
                yield new
            if stream.done:
                break

    @torch.inference_mode()
    def embed(self, ids, slots, start):
        """Embeddings (1, T - start, C) of the places from `start` on, with media written over their placeholders."""
        x = self.model.llm.embed(torch.tensor([ids[start:]], device=self.weight.device))
        for medium, at in slots:
            if at + self.model.cfg.n_token(medium.kind) > start:
                new = self.encode(medium)[max(start - at, 0):]                              # (n, C)
                x[0, max(at - start, 0):][:len(new)] = new
        return x

    def encode(self, medium):
        """Features (n, C) of a medium, computed once."""
        if medium not in self.features:
            x = medium.tensor[None].to(self.weight.device, self.weight.dtype)
            self.features[medium] = self.model.read(medium.kind, x)[0]
        return self.features[medium]


def open_session(folder=TINY, device=None, dtype=None, **options):
    """The Session of a weights folder, on the best device there is. Raises OSError or ValueError naming the fault."""
    device = torch.device(device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
    model = load(folder, device, getattr(torch, dtype or ("bfloat16" if device.type == "cuda" else "float32")))
    cfg = model.cfg
    if cfg.llm is None or cfg.system not in data.SYSTEMS:
        raise ValueError(f"{folder}: holds no model to talk with (system {cfg.system!r})")
    system = data.SYSTEMS[cfg.system]
    tok = data.Tokenizer(Path(folder) / "tokenizer.model", cfg.added_tokens, system.legacy)
    if max(tok.sp.get_piece_size() - 1, *tok.special.values()) >= cfg.llm.vocab_size:
        raise ValueError(f"{tok.path}: has more tokens than the model, {cfg.llm.vocab_size}")
    template = data.TEMPLATES[cfg.template or system.template]
    return Session(model, tok, system, template, data.MediaSpec(**cfg.media), **options)


# ---- Terminal

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
INLINE = re.compile(r"""(?<!\S)@("[^"]+"|'[^']+'|(?:\\.|\S)+)""")


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
    term, program = env.get("TERM", ""), env.get("TERM_PROGRAM", "")
    if "TMUX" in env or term.startswith(("tmux", "screen")):
        return "off"
    if "KITTY_WINDOW_ID" in env or term in ("xterm-kitty", "xterm-ghostty") or program in ("ghostty", "WezTerm"):
        return "kitty"
    if program == "iTerm.app" or env.get("LC_TERMINAL") == "iTerm2":
        return "iterm"
    return "blocks" if env.get("COLORTERM") in ("truecolor", "24bit") and not env.get("NO_COLOR") else "off"


def draw(picture, how):
    """The characters that show a picture: half blocks of two pixels, or a PNG in escape codes of kitty or iTerm2."""
    picture = picture.convert("RGB")
    picture.thumbnail((60, 48) if how == "blocks" else (480, 320))
    if how == "blocks":
        pixels = [[picture.getpixel((x, y)) for x in range(picture.width)] for y in range(picture.height)]
        pairs = zip(pixels[::2], pixels[1::2] + pixels[-1:])                    # an odd last row is doubled
        lines = ["".join("\033[38;2;%d;%d;%d;48;2;%d;%d;%dm▀" % (*a, *b) for a, b in zip(*pair)) for pair in pairs]
        return "".join(line + "\033[0m\n" for line in lines)
    png = io.BytesIO()
    picture.save(png, "PNG")
    text = base64.b64encode(png.getvalue()).decode()
    if how == "iterm":
        return f"\033]1337;File=inline=1;size={len(png.getvalue())};width={picture.width}px:{text}\a\n"
    chunks = [text[i:i + 4096] for i in range(0, len(text), 4096)]
    codes = [f"{'' if i else 'f=100,a=T,q=2,'}m={int(i < len(chunks) - 1)};{chunk}" for i, chunk in enumerate(chunks)]
    return "".join(f"\033_G{code}\033\\" for code in codes) + "\n"


def file_names(text):
    """Names in a line: all of it if that is a file, else words as a shell reads them. ValueError if a quote is open."""
    whole = os.path.expanduser(text)
    return [whole] if os.path.isfile(whole) else [os.path.expanduser(word) for word in shlex.split(text)]


def dragged(text):
    """The files that a line names and nothing else, as when they are dragged into the terminal; or []."""
    try:
        names = file_names(text)
    except ValueError:
        return []
    quoted = len(names) == 1 and text[0] in "'\"" and os.path.isabs(names[0])   # a file even if it is not there
    return names if quoted or all(map(os.path.isfile, names)) else []


def complete(text, state):
    """readline's completer: commands at the start of a line, and files."""
    mark, start = re.fullmatch(r"(@?)(.*)", re.sub(r"\\(.)", r"\1", text), re.S).groups()
    files = sorted(glob.glob(glob.escape(os.path.expanduser(start)) + "*"))
    names = [f"/{name}" for name in COMMANDS if f"/{name}".startswith(text) and text]
    names += [mark + re.sub(r"""([\s'"\\()&;])""", r"\\\1", path) + "/" * os.path.isdir(path) for path in files]
    return names[state] if state < len(names) else None


def use_readline(history):
    """Line editing, completion and, with `history`, the lines of the last time. Windows has no readline."""
    with suppress(ImportError, OSError):
        import readline
        readline.set_completer(complete)
        readline.set_completer_delims(" \t\n")
        readline.parse_and_bind("bind ^I rl_complete" if "libedit" in str(readline.__doc__) else "tab: complete")
        if history:
            path = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "nanomni/history"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
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
                if not self.interactive:
                    raise
                log("\nCtrl-C stops an answer; Ctrl-D or /quit ends the chat")
            except Exception as error:                  # even a mistake of ours must not cost the conversation
                log(f"{error if isinstance(error, (ValueError, OSError, MemoryError)) else repr(error)!s:.500}", 31)

    def line(self, text):
        """Do what a line asks: attach files, run a command, or say it."""
        files = dragged(text)
        if text.startswith('"""'):
            self.say(self.block(text[3:]))
        elif files and (os.path.isabs(files[0]) or all(map(data.sniff, files))):
            self.add(files)
        elif text.startswith("/") and not text.startswith("//"):
            self.command(*text[1:].split(None, 1))
        else:
            self.say(self.inline(text.removeprefix("/")))

    def block(self, text):
        """Text up to three closing quotes, taken as it stands."""
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
        paths = [word for match in INLINE.findall(text) for word in file_names(match)]
        self.add([path if os.path.isfile(path) else path.rstrip(".,;:!?)") for path in paths])
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
        if picture and self.interactive and self.pictures != "off":
            print(draw(picture, self.pictures), end="", flush=True)

    def say(self, text):
        if text.strip():
            self.stream(self.session.say(text))

    def stream(self, pieces):
        """Print an answer while it comes. Ctrl-C ends it and keeps what was said."""
        try:
            with closing(pieces):
                for piece in pieces:
                    print("" if self.args.json else clean(piece), end="", flush=True)
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            return print(" [stopped]")
        turn = self.session.last()
        report = {"prompt": turn.text, "text": turn.answer, "media": [medium.path for medium in turn.media],
                  "tokens": len(turn.ids), "seconds": round(turn.clock[3] - turn.clock[0], 3),
                  "seed": self.session.settings["seed"], "model": str(self.args.weights)}
        print(clean(json.dumps(report)) if self.args.json else "", flush=True)
        if turn.dropped:
            log(f"the context is full: the oldest {turn.dropped} turns are forgotten")

    def medium(self, text):
        """The medium that `#2` means; `last` or nothing is the last."""
        media, match = self.session.media, re.fullmatch(r"#?([1-9]\d{0,5})|last|", text)
        if not match or int(match[1] or 1) > len(media):
            raise ValueError(f"no such medium among {len(media)}; /media lists them")
        return media[int(match[1] or 0) - 1]

    def list_media(self, _):
        rows = [(medium, f"in message {i}") for i, turn in enumerate(self.session.turns, 1) for medium in turn.media]
        rows += [(medium, "not sent yet") for medium in self.session.pending]
        return "\n".join(f"#{i} {m.kind} {m.path} {where}" for i, (m, where) in enumerate(rows, 1)) or "no media"

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
                yield f"{id}{tok.names.get(id) or tok.sp.id_to_piece(id)!r}" + f"*{n}" * (n > 1)
        turn, tok = self.session.last(), self.session.tok
        return f"prompt: {' '.join(show(turn.prompt))}\nanswer: {' '.join(show(turn.ids))}"

    def stats(self, _):
        turn, n = self.session.last(), len(self.session.last().ids)
        encode, prefill, decode = (b - a for a, b in zip(turn.clock, turn.clock[1:]))
        return (f"encode {encode:.2f} s, prefill {len(turn.prompt) - turn.reused} tokens in {prefill:.2f} s, "
                f"{turn.reused} reused, {n} new tokens at {max(n - 1, 0) / (decode or 1):.1f} tok/s, "
                f"context {len(turn.prompt) + n} of {self.session.max_len}")

    def info(self, _=""):
        model, weight = self.session.model, self.session.weight
        return (f"{self.args.weights}: {sum(p.numel() for p in model.parameters()) / 1e6:,.1f} M parameters, "
                f"{str(weight.dtype)[6:]} on {weight.device}, context {self.session.max_len}, "
                f"reads {', '.join(['text', *model.cfg.reads])}")

    def help(self, _):
        rows = {f"/{name} {usage}": text for name, (_, usage, text) in COMMANDS.items()
                if name not in KINDS or name in self.session.model.cfg.reads}
        return "\n".join(f"{left:22} {text}" for left, text in rows.items())

    def quit(self, _):
        raise EOFError


COMMANDS = {                            # name: what runs, usage, help
    **{kind: (lambda chat, text, kind=kind: chat.add(file_names(text), kind), "FILE ...", f"attach {kind} files")
       for kind in KINDS},
    "media": (Chat.list_media, "", "list what is attached"),
    "show": (lambda chat, text: chat.show(chat.medium(text)), "[#k|last]", "describe a medium and show its picture"),
    "drop": (lambda chat, text: chat.session.drop(chat.medium(text)), "[#k|last]", "take a medium out again"),
    "retry": (lambda chat, _: chat.stream(chat.session.retry()), "", "answer the last message anew"),
    "undo": (lambda chat, _: f"taken back: {chat.session.undo().text}", "", "forget the last message and its answer"),
    "clear": (lambda chat, _: chat.session.clear(), "", "forget all messages and media"),
    "save": (lambda chat, text: chat.session.save(text), "FILE.json", "write the conversation to a new file"),
    "load": (lambda chat, text: chat.session.load(text), "FILE.json", "go on with a saved conversation"),
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

def main(args):
    """One question or a chat; returns the exit code."""
    for stream in filter(None, (sys.stdin, sys.stdout, sys.stderr)):
        stream.reconfigure(errors="replace")            # odd bytes in names or input are no reason to end
    try:
        options = {name: vars(args)[name] for name in ("context", "parse_special", *SETTINGS)}
        session = open_session(args.weights, args.device, args.dtype, **options)
        chat = Chat(session, args)
        for path, kind in args.media:
            chat.add([path], kind)
        if args.prompt is not None:
            chat.say(args.prompt)
            return 0
        if chat.interactive:
            use_readline(not args.no_history)
            log(chat.info() + "\n/help lists the commands; Ctrl-D ends")
        chat.run()
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, MemoryError, RuntimeError, AssertionError, SafetensorError) as error:
        log(f"{error!s:.500}", 31)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(ARGS))
