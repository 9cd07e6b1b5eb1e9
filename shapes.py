"""A small world to learn from: pictures of coloured shapes, clips of a moving shape, rows of beeps, and talk about them.

    python shapes.py --out shapes                      # files to train on, in the formats of the real data sets
    python shapes.py --out unseen --questions 1000     # single questions to test on

In order: words, pictures, clips, sounds, questions and captions, conversations, files.
Everything follows from the seed. Colours, sizes, places, background and pitch jitter from one example to the next.
"""
import argparse
import json
import math
import random
import wave
from dataclasses import dataclass
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

# ---- Words

COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 220), "yellow": (240, 210, 40),
           "purple": (150, 60, 180), "orange": (245, 140, 30), "black": (25, 25, 25), "pink": (245, 150, 190)}
SHAPES = {"circle": 0, "square": 4, "triangle": 3, "star": 10, "cross": 12}     # corners
SIZES = {"small": 14, "big": 23}                                                # radius in pixels
NUMBERS = "no one two three four five".split()
ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
PITCHES = {"low": 220.0, "middle": 700.0, "high": 2200.0}                       # Hz
VOICES = ("flute", "buzzer", "bell")
SIDE, FPS, RATE = 128, 8, 16000


@dataclass
class Thing:
    shape: str
    colour: str
    size: str
    x: float                            # centre, pixels
    y: float
    radius: float

    @property
    def name(self):
        return f"{self.colour} {self.shape}"

    @property
    def place(self):
        row, column = (words[min(int(3 * at / SIDE), 2)] for words, at in ((ROWS, self.y), (COLUMNS, self.x)))
        return f"at the {row} {column}".replace("  ", " ").rstrip() if row or column else "in the centre"


# ---- Pictures

def corners(thing, turn):
    """Outline of a shape around its centre, in pixels."""
    n = SHAPES[thing.shape]
    if thing.shape == "cross":
        a, b = 0.33, 1.0
        unit = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a),
                (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]
    else:
        reach = {"square": 1.2, "triangle": 1.2, "star": 1.15}[thing.shape]
        first = math.pi / 4 if n == 4 else -math.pi / 2
        unit = [(r * math.cos(t), r * math.sin(t)) for i in range(n)
                for r, t in [(reach * (0.45 if n == 10 and i % 2 else 1), first + 2 * math.pi * i / n)]]
    c, s = math.cos(turn), math.sin(turn)
    return [(thing.x + thing.radius * (x * c - y * s), thing.y + thing.radius * (x * s + y * c)) for x, y in unit]


def draw(things, rng, background):
    """Picture (SIDE x SIDE) of things; drawn three times as large and shrunk, so that edges are smooth."""
    image = Image.new("RGB", (3 * SIDE, 3 * SIDE), background)
    pen = ImageDraw.Draw(image)
    for thing in things:
        colour = tuple(max(0, min(255, c + rng.randint(-14, 14))) for c in COLOURS[thing.colour])
        if thing.shape == "circle":
            box = [thing.x - thing.radius, thing.y - thing.radius, thing.x + thing.radius, thing.y + thing.radius]
            pen.ellipse([3 * v for v in box], fill=colour)
        else:
            pen.polygon([(3 * x, 3 * y) for x, y in corners(thing, rng.uniform(-0.15, 0.15))], fill=colour)
    return image.resize((SIDE, SIDE), Image.BOX)


def paper(rng):
    """A light background colour."""
    grey = rng.randint(205, 245)
    return tuple(grey + rng.randint(-8, 8) for _ in range(3))


def make_thing(rng, x=None, y=None):
    size = rng.choice(list(SIZES))
    radius = SIZES[size] * rng.uniform(0.92, 1.08)
    edge = 1.25 * radius
    return Thing(rng.choice(list(SHAPES)), rng.choice(list(COLOURS)), size,
                 x or rng.uniform(edge, SIDE - edge), y or rng.uniform(edge, SIDE - edge), radius)


def scene(rng):
    """One to five things that do not touch, in reading order."""
    wanted, things = rng.randint(1, 5), []
    while len(things) < wanted:
        new = make_thing(rng)
        if all(math.hypot(new.x - t.x, new.y - t.y) > 1.2 * (new.radius + t.radius) for t in things):
            things.append(new)
        elif rng.random() < 0.02:
            things = []                 # no room left: start over
    return sorted(things, key=lambda t: (int(3 * t.y / SIDE), t.x))


# ---- Clips

def clip(rng):
    """A thing on its way across the picture in three seconds -> thing, way, frames."""
    thing, (way, (dx, dy)) = make_thing(rng), rng.choice(list(WAYS.items()))
    room, path = SIDE / 2 - 1.25 * thing.radius, rng.uniform(0.75, 1.0)
    across = rng.uniform(-0.8, 0.8) * room
    background, seed, frames = paper(rng), rng.random(), []
    for i in range(3 * FPS):
        along = room * path * (2 * i / (3 * FPS - 1) - 1)
        thing.x = SIDE / 2 + (dx * along if dx else across)
        thing.y = SIDE / 2 + (dy * along if dy else across)
        frames.append(draw([thing], random.Random(seed), background))
    return thing, way, frames


# ---- Sounds

def beep(voice, hz, seconds):
    t = np.arange(int(seconds * RATE)) / RATE
    if voice == "flute":
        x = np.sin(2 * np.pi * hz * t)
    elif voice == "buzzer":
        x = 2 * (hz * t % 1) - 1
    else:
        x = sum(np.sin(2 * np.pi * hz * k * t) * np.exp(-t * d) / k for k, d in ((1, 9), (2.76, 14), (5.4, 22)))
    fade = np.minimum(1, np.minimum(t, t[::-1]) / 0.01)
    return x * fade


def sound(rng):
    """One to four equal beeps in two seconds -> count, pitch, voice, samples."""
    count, (pitch, hz), voice = rng.randint(1, 4), rng.choice(list(PITCHES.items())), rng.choice(VOICES)
    hz *= 2 ** rng.uniform(-0.3, 0.3)
    slot = 2 / count if count > 1 else rng.uniform(0.6, 2)
    slot = min(slot, rng.uniform(0.4, 0.66))
    x = np.random.RandomState(rng.randrange(2 ** 31)).randn(2 * RATE) * rng.uniform(0.001, 0.006)
    start = rng.uniform(0.02, 2 - count * slot + 0.02)
    for i in range(count):
        tone = beep(voice, hz, slot * 0.6) * rng.uniform(0.25, 0.6)
        at = int((start + i * slot) * RATE)
        x[at:at + len(tone)] += tone[:max(len(x) - at, 0)]
    return count, pitch, voice, x


# ---- Questions and captions
# Each gives (kind, question, answer). Answers name what was asked about, so that they can be checked word by word.

def a(name):
    return ("an " if name[0] in "aeio" else "a ") + name


def plural(n, noun):
    noun += "" if n == 1 else "es" if noun.endswith("s") else "s"
    return f"There {'is' if n == 1 else 'are'} {NUMBERS[n]} {noun}."


def only(things, key):
    """The things that no other shares `key` with."""
    return [t for t in things if sum(getattr(u, key) == getattr(t, key) for u in things) == 1]


def ask_colour(things, rng):
    if unique := only(things, "shape"):
        t = rng.choice(unique)
        ask = rng.choice(["What colour is the {}?", "What color is the {}?", "Which colour does the {} have?"])
        return "colour", ask.format(t.shape), f"The {t.shape} is {t.colour}."


def ask_shape(things, rng):
    if unique := only(things, "colour"):
        t = rng.choice(unique)
        ask = rng.choice(["What shape is the {} one?", "Which shape is {}?", "What is the {} thing?"])
        return "shape", ask.format(t.colour), f"The {t.colour} one is a {t.shape}."


def ask_count(things, rng):
    kind = rng.choice(["all", "all", "shape", "colour"])
    ask = rng.choice(["How many {} are there?", "How many {} do you see?"])
    if kind == "all":
        return "count", ask.format("shapes"), plural(len(things), "shape")
    words = list(SHAPES if kind == "shape" else COLOURS)
    word = getattr(rng.choice(things), kind) if rng.random() < 0.8 else rng.choice(words)
    n = sum(getattr(t, kind) == word for t in things)
    if kind == "colour":
        return "count", ask.format(f"{word} shapes"), plural(n, f"{word} shape")
    return "count", ask.format(word + ("es" if word.endswith("s") else "s")), plural(n, word)


def ask_size(things, rng):
    if unique := only(things, "name"):
        t = rng.choice(unique)
        ask = rng.choice(["Is the {} small or big?", "How big is the {}?"])
        return "size", ask.format(t.name), f"The {t.name} is {t.size}."


def ask_place(things, rng):
    if unique := only(things, "name"):
        t = rng.choice(unique)
        return "place", f"Where is the {t.name}?", f"The {t.name} is {t.place}."


def ask_exists(things, rng):
    names = {t.name for t in things}
    if rng.random() < 0.5:
        name = rng.choice(sorted(names))
    else:
        t = rng.choice(things)          # half right, so that colour and shape must be seen together
        name = rng.choice([f"{t.colour} {rng.choice(list(SHAPES))}", f"{rng.choice(list(COLOURS))} {t.shape}"])
    answer = f"Yes, there is {a(name)}." if name in names else f"No, there is no {name}."
    return "exists", rng.choice(["Is there {}?", "Do you see {}?"]).format(a(name)), answer


def ask_side(things, rng):
    pairs = [(t, u) for t in only(things, "name") for u in only(things, "name") if abs(t.x - u.x) > SIDE / 8]
    if pairs:
        t, u = rng.choice(pairs)
        side = "left" if t.x < u.x else "right"
        return "side", f"Is the {t.name} left or right of the {u.name}?", f"The {t.name} is on the {side}."


def describe(things):
    words = [f"{a(f'{t.size} {t.name}')} {t.place}" for t in things]
    text = " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
    return text[0].upper() + text[1:] + "."


def picture_questions(things, rng):
    kinds = [ask_colour, ask_shape, ask_count, ask_size, ask_place, ask_exists, ask_side]
    return [q for ask in rng.sample(kinds, len(kinds)) if (q := ask(things, rng))] + [
        ("caption", rng.choice(["Describe the picture.", "What is in the picture?"]), describe(things))]


def clip_questions(thing, way, rng):
    to = {"left": "to the left", "right": "to the right"}.get(way, way)
    return [("colour", "What colour is the moving shape?", f"The {thing.shape} is {thing.colour}."),
            ("shape", rng.choice(["What is moving?", "Which shape moves?"]), f"A{a(thing.name)[1:]} is moving."),
            ("way", rng.choice(["Which way does it move?", "Where does the shape go?"]), f"The {thing.shape} moves {to}."),
            ("caption", rng.choice(["Describe the clip.", "What happens in the clip?"]),
             f"A {thing.size} {thing.name} moves {to}.")]


def sound_questions(count, pitch, voice, rng):
    beeps = f"{NUMBERS[count]} {pitch} beep{'s' * (count > 1)} of {a(voice)}"
    return [("count", rng.choice(["How many beeps do you hear?", "How many beeps are there?"]), plural(count, "beep")),
            ("pitch", rng.choice(["How high is the sound?", "Is the sound low, middle or high?"]),
             f"The sound is {pitch}."),
            ("voice", rng.choice(["What makes the sound?", "Which instrument do you hear?"]), f"It is a {voice}."),
            ("caption", rng.choice(["Describe the sound.", "What do you hear?"]), beeps[0].upper() + beeps[1:] + ".")]


# ---- Files

def write_picture(rng, path):
    things = scene(rng)
    draw(things, rng, paper(rng)).save(path, optimize=False)
    return picture_questions(things, rng), describe(things)


def write_clip(rng, path):
    thing, way, frames = clip(rng)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000 // FPS, loop=0)
    questions = clip_questions(thing, way, rng)
    return questions, questions[-1][2]


def write_sound(rng, path):
    *facts, x = sound(rng)
    with wave.open(str(path), "wb") as f:
        f.setnchannels(1), f.setsampwidth(2), f.setframerate(RATE)
        f.writeframes((np.clip(x, -1, 1) * 32767).astype("<i2").tobytes())
    questions = sound_questions(*facts, rng)
    return questions, questions[-1][2]


MEDIA = {"image": ("pictures", "png", write_picture), "video": ("clips", "gif", write_clip),
         "audio": ("sounds", "wav", write_sound)}


def write_medium(job):
    """One file of the world -> (kind, its name, questions, caption)."""
    kind, number, seed, out = job
    folder, ending, write = MEDIA[kind]
    name = f"{folder}/{number:06}.{ending}"
    questions, caption = write(random.Random(f"{seed}/{kind}/{number}"), Path(out) / name)
    return kind, name, questions, caption


def conversation(media, rng):
    """LLaVA record: up to five questions about a medium, two about each of several, which are shown one after another."""
    record, turns = {}, []
    for kind, name, questions, _ in media:
        record.setdefault(kind, []).append(name)
        chosen = rng.sample(questions, min(5 if len(media) == 1 else 2, len(questions)))
        for i, (_, question, answer) in enumerate(chosen):
            tag = f"\n<{kind}>" if i == 0 else ""
            turns += [{"from": "human", "value": question + tag}, {"from": "gpt", "value": answer}]
    return {**record, "conversations": turns}


def single_question(medium, rng):
    """LLaVA record of one question, with its kind."""
    kind, name, questions, _ = medium
    what, question, answer = rng.choice(questions)
    turns = [{"from": "human", "value": f"{question}\n<{kind}>"}, {"from": "gpt", "value": answer}]
    return {"kind": f"{kind} {what}", kind: name, "conversations": turns}


def conversations(media, rng, mixed=0.15):
    """Every medium in one record; a share of them two or three to a conversation."""
    media, out = rng.sample(media, len(media)), []
    while media:
        n = rng.choice([2, 3]) if rng.random() < mixed else 1
        out.append(conversation(media[-n:], rng))
        del media[-n:]
    return out


def write_tokenizer(records, path, vocab_size):
    """Sentencepiece model of all texts, with LLaMA's conventions."""
    import sentencepiece
    texts = sorted({turn["value"] for record in records for turn in record["conversations"]})
    texts += ["USER: ASSISTANT:"] * (len(texts) // 5)           # the roles stand in every conversation, in no record
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(path).removesuffix(".model"), vocab_size=vocab_size,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        hard_vocab_limit=False, character_coverage=1.0, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2)
    path.with_suffix(".vocab").unlink()


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True, help="folder to write")
    p.add_argument("--pictures", type=int, default=48000, help="default %(default)s")
    p.add_argument("--clips", type=int, default=8000, help="default %(default)s")
    p.add_argument("--sounds", type=int, default=8000, help="default %(default)s")
    p.add_argument("--questions", type=int, default=0, help="write so many single questions instead of conversations")
    p.add_argument("--seed", type=int, help="default 0, with --questions 1")
    p.add_argument("--vocab-size", type=int, default=600, help="of the tokenizer, default %(default)s")
    args = p.parse_args(argv)
    counts = {"image": args.pictures, "video": args.clips, "audio": args.sounds}
    if args.questions:
        counts = {"image": args.questions // 2, "video": args.questions // 4, "audio": args.questions // 4}
    seed = args.seed if args.seed is not None else int(args.questions > 0)
    for folder, _, _ in MEDIA.values():
        (args.out / folder).mkdir(parents=True, exist_ok=True)
    from tqdm import tqdm
    jobs = [(kind, i, seed, str(args.out)) for kind, n in counts.items() for i in range(n)]
    with Pool() as pool:
        media = list(tqdm(pool.imap(write_medium, jobs, chunksize=64), total=len(jobs), desc="drawing", unit="file", disable=None))
    rng = random.Random(seed)
    if args.questions:
        return (args.out / "questions.json").write_text(json.dumps([single_question(m, rng) for m in media], indent=0))
    records = conversations(media, rng)
    (args.out / "conversations.json").write_text(json.dumps(records, indent=0))
    captions = [{f"{kind}_name": name, "caption": caption} for kind, name, _, caption in media]
    (args.out / "captions.json").write_text(json.dumps(captions, indent=0))
    write_tokenizer(records, args.out / "tokenizer.model", args.vocab_size)


if __name__ == "__main__":
    main()
