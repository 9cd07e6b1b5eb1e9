"""A small world to learn from: pictures of coloured shapes, clips of a moving shape, rows of beeps, talk about them.

    python shapes.py --out shapes                      # files to train on, in the formats of the real data sets
    python shapes.py --out unseen --questions 1000     # single questions to test on, and the same annotations

In order: words, pictures, clips, sounds, measuring, questions, pointing, drawings, dialogues, requests, files.
Boxes are pixel x1 y1 x2 y2. Everything follows from the seed; colours, sizes, places, background and pitch jitter.
"""
import argparse
import json
import math
import os
import random
import re
import wave
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import cycle, islice, permutations
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

# ---- Words

COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 220), "yellow": (240, 210, 40),
           "purple": (150, 60, 180), "orange": (245, 140, 30), "black": (25, 25, 25), "pink": (245, 150, 190)}
SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES = {"small": 14, "big": 23}                                                # radius in pixels
NAMES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
NUMBERS = "no one two three four five".split()
ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")                    # thirds of a picture
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}        # y points down, as in all pictures
PITCHES = {"low": 220.0, "middle": 700.0, "high": 2200.0}                       # Hz
VOICES = ("flute", "buzzer", "bell")
PARTIALS = {"flute": [(1, 0)], "bell": [(1, 9), (2.76, 14), (5.4, 22)]}         # times the pitch, how soon gone
SIDE, FPS, RATE = 128, 8, 16000         # pixels of a picture, frames and samples a second
CORES = os.cpu_count()


@dataclass
class Thing:
    shape: str
    colour: str
    size: str
    x: float                            # centre, pixels
    y: float
    radius: float
    turn: float = 0.0                   # radians, known once it is drawn

    @property
    def name(self):
        return f"{self.colour} {self.shape}"

    @property
    def full_name(self):
        return f"{self.size} {self.name}"

    @cached_property
    def nouns(self):
        return [noun.format(**vars(self)) for noun in NOUNS]

    @property
    def place(self):
        row, column = min(int(3 * self.y / SIDE), 2), min(int(3 * self.x / SIDE), 2)
        words = f"{ROWS[row]} {COLUMNS[column]}".split()                        # none, one or two
        return " ".join(["at the", *words]) if words else "in the centre"


# ---- Pictures

def polygon(n, first, *reach):          # n corners from an angle on, which reach so far out in turn
    angles = [first + 2 * math.pi * i / n for i in range(n)]
    return [(r * math.cos(t), r * math.sin(t)) for r, t in zip(cycle(reach), angles)]


ARM = 0.33                              # half the width of a cross's arms
POLYGONS = {"square": polygon(4, math.pi / 4, 1.2), "triangle": polygon(3, -math.pi / 2, 1.2),          # of radius 1
            "star": polygon(10, -math.pi / 2, 1.15, 1.15 * 0.45),
            "cross": [(-ARM, -1), (ARM, -1), (ARM, -ARM), (1, -ARM), (1, ARM), (ARM, ARM),
                      (ARM, 1), (-ARM, 1), (-ARM, ARM), (-1, ARM), (-1, -ARM), (-ARM, -ARM)]}


def corners(t):                         # of a shape, not of a circle, in pixels
    c, s = math.cos(t.turn), math.sin(t.turn)
    return [(t.x + t.radius * (x * c - y * s), t.y + t.radius * (x * s + y * c)) for x, y in POLYGONS[t.shape]]


def draw(things, rng, background):
    """Picture (SIDE x SIDE) of things, notes their turn; drawn three times as large and shrunk, so edges are smooth."""
    image = Image.new("RGB", (3 * SIDE, 3 * SIDE), background)
    pen = ImageDraw.Draw(image)
    for thing in things:
        colour = tuple(max(0, min(255, c + rng.randint(-14, 14))) for c in COLOURS[thing.colour])
        if thing.shape == "circle":
            x, y, r = thing.x, thing.y, thing.radius
            pen.ellipse([3 * (x - r), 3 * (y - r), 3 * (x + r), 3 * (y + r)], fill=colour)
        else:
            thing.turn = rng.uniform(-0.15, 0.15)
            pen.polygon([(3 * x, 3 * y) for x, y in corners(thing)], fill=colour)
    return image.resize((SIDE, SIDE), Image.BOX)


def outline(thing):
    """Polygon around a drawn thing. Pillow cuts to whole fine pixels, fills half of one more left and right."""
    if thing.shape == "circle":
        ends = [(int(3 * (c - thing.radius)) / 3, (int(3 * (c + thing.radius)) + 1) / 3) for c in (thing.x, thing.y)]
        (x, a), (y, b) = [((low + high) / 2, (high - low) / 2) for low, high in ends]       # centre and half axes
        points = [(x + a * math.cos(math.pi * i / 12), y + b * math.sin(math.pi * i / 12)) for i in range(24)]
    else:
        points = [((int(3 * x) + 0.5) / 3 + math.copysign(1 / 6, x - thing.x),
                   (int(3 * y) + 0.5) / 3 + math.copysign(1 / 20, y - thing.y)) for x, y in corners(thing)]
    return [(round(x, 2), round(y, 2)) for x, y in points]


def box(thing):                         # around a drawn thing
    xs, ys = zip(*outline(thing))
    return [min(xs), min(ys), max(xs), max(ys)]


def paper(rng):                         # a light background colour
    grey = rng.randint(205, 245)
    return tuple(grey + rng.randint(-8, 8) for _ in range(3))


def make_thing(rng):                    # of any kind, wholly inside the picture
    size = rng.choice(list(SIZES))
    radius = SIZES[size] * rng.uniform(0.92, 1.08)
    edge = 1.25 * radius                # no corner reaches farther, however it is turned
    return Thing(rng.choice(list(SHAPES)), rng.choice(list(COLOURS)), size,
                 rng.uniform(edge, SIDE - edge), rng.uniform(edge, SIDE - edge), radius)


def scene(rng):                         # one to five things that do not touch, in reading order
    wanted, things = rng.randint(1, 5), []
    while len(things) < wanted:
        new = make_thing(rng)
        if all(math.hypot(new.x - t.x, new.y - t.y) > 1.2 * (new.radius + t.radius) for t in things):
            things.append(new)
        elif rng.random() < 0.02:
            things = []                 # no room left: start over
    return sorted(things, key=lambda t: (int(3 * t.y / SIDE), t.x))


# ---- Clips and sounds

def clip(rng):                          # a thing on its way across the picture in three seconds -> thing, way, frames
    thing, (way, (dx, dy)) = make_thing(rng), rng.choice(list(WAYS.items()))
    room, path = SIDE / 2 - 1.25 * thing.radius, rng.uniform(0.75, 1.0)
    across = rng.uniform(-0.8, 0.8) * room
    background, seed, frames = paper(rng), rng.random(), []
    for i in range(3 * FPS):
        along = room * path * (2 * i / (3 * FPS - 1) - 1)                       # from one edge to the other
        thing.x = SIDE / 2 + dx * along + abs(dy) * across
        thing.y = SIDE / 2 + dy * along + abs(dx) * across
        frames.append(draw([thing], random.Random(seed), background))           # of the same colour and turn
    return thing, way, frames


def beep(voice, hz, seconds):           # samples in -1..1, (T,)
    t = np.arange(int(seconds * RATE)) / RATE                                   # (T,)
    if voice == "buzzer":               # a saw
        x = 2 * (hz * t % 1) - 1
    else:                               # a pure tone; a bell's partials are no multiples, the higher the sooner gone
        x = sum(np.sin(2 * np.pi * hz * k * t) * np.exp(-t * d) / k for k, d in PARTIALS[voice])
    fade = np.minimum(1, np.minimum(t, t[::-1]) / 0.01)                         # no click at either end
    return x * fade


def sound(rng):                         # one to four equal beeps in two seconds -> count, pitch, voice, samples
    count, (pitch, hz), voice = rng.randint(1, 4), rng.choice(list(PITCHES.items())), rng.choice(VOICES)
    hz *= 2 ** rng.uniform(-0.3, 0.3)
    slot = 2 / count if count > 1 else rng.uniform(0.6, 2)                      # seconds from beep to beep
    slot = min(slot, rng.uniform(0.4, 0.66))
    x = np.random.RandomState(rng.randrange(2 ** 31)).randn(2 * RATE) * rng.uniform(0.001, 0.006)       # (T,), a hiss
    start = rng.uniform(0.02, 2 - count * slot + 0.02)
    for i in range(count):
        tone = beep(voice, hz, slot * 0.6) * rng.uniform(0.25, 0.6)
        at = int((start + i * slot) * RATE)
        x[at:at + len(tone)] += tone[:max(len(x) - at, 0)]
    return count, pitch, voice, x


# ---- Measuring
# What a drawn picture, clip or sound shows, found by plain rules: the judge of models that draw.

def blobs(picture):
    """Picture of any size -> (fill colour, area, x, y, the blob alone at a fixed size (32, 32)) of all but specks."""
    pixels, at, out = np.asarray(picture.convert("RGB").resize((SIDE, SIDE)), float), np.arange(SIDE), []
    ground = np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]), 0)         # (3,)
    apart = np.linalg.norm(pixels - ground, axis=2)                                                     # (H, W)
    parts = Image.fromarray((apart > 55).astype("int32"))       # 1: of a blob not seen yet, 2: of this one
    while len(left := np.argwhere(np.asarray(parts) == 1)):
        ImageDraw.floodfill(parts, tuple(left[0, ::-1].tolist()), 2)
        region = np.asarray(parts) == 2
        parts = Image.fromarray(np.asarray(parts) * ~region)
        if region.sum() > 60:
            fill = np.median(pixels[region & (apart > 0.7 * apart[region].max())], 0)       # edges may be soft
            cover = region * np.clip((pixels - ground) @ (fill - ground) / np.sum((fill - ground) ** 2), 0, 1)
            area = cover.sum()                                  # cover (H, W): of a pixel on an edge a part
            x, y = cover.sum(0) @ at / area, cover.sum(1) @ at / area
            grid = np.linspace(-1, 1, 32) * area ** 0.5         # the stamp grows with the blob: size does not matter
            rows, columns = (np.rint(c + grid).clip(0, SIDE - 1).astype(int) for c in (y, x))
            out.append((fill, area, x + 0.5, y + 0.5, cover[np.ix_(rows, columns)]))
    return out


@cache
def patterns():                         # every shape in seven turns -> names, areas at radius 1, blobs (n, 32, 32)
    drawn = [(shape, *blobs(draw([Thing(shape, "black", "big", 64, 64, 40)], random.Random(i), (255, 255, 255)))[0])
             for shape in SHAPES for i in range(7)]
    names, _, areas, _, _, stamps = zip(*drawn)
    return names, [area / 40 ** 2 for area in areas], np.stack(stamps)


def look(picture):
    """The things in a picture, from the top down; a blob that is less than 0.7 (IoU) like every shape is none."""
    names, areas, stamps = patterns()
    things = []
    for fill, area, x, y, seen in blobs(picture):
        likeness = np.minimum(seen, stamps).sum((1, 2)) / np.maximum(seen, stamps).sum((1, 2))          # (n,), soft IoU
        best = likeness.argmax()
        if likeness[best] > 0.7:
            radius = (area / areas[best]) ** 0.5
            colour = min(COLOURS, key=lambda c: np.linalg.norm(fill - COLOURS[c]))
            things.append(Thing(names[best], colour, min(SIZES, key=lambda s: abs(SIZES[s] - radius)), x, y, radius))
    return things


def watch(frames):
    """The thing that most frames show and the way it goes; None for what cannot be told."""
    shown = map(look, frames[::max(len(frames) // 4, 1)] + frames[-1:])         # five frames are enough
    seen = [things[0] for things in shown if len(things) == 1]
    if not seen:
        return None, None
    thing = max(seen, key=lambda t: sum((t.name, t.size) == (u.name, u.size) for u in seen))
    x, y = seen[-1].x - seen[0].x, seen[-1].y - seen[0].y
    way = max(WAYS, key=lambda w: x * WAYS[w][0] + y * WAYS[w][1])
    return thing, way if math.hypot(x, y) > SIDE / 8 else None


def listen(x):
    """Samples in -1..1 -> number of beeps and pitch; 0 and None if all is quiet."""
    step = RATE // 100
    level = np.abs(x[:len(x) // step * step]).reshape(-1, step).max(1)          # of every 10 ms
    loud = np.flatnonzero(level > max(0.05, 0.15 * level.max()))
    count = (np.diff(loud, prepend=-9) > 8).sum().item()                        # after 80 ms of quiet
    spectrum, hz = np.abs(np.fft.rfft(x)), np.fft.rfftfreq(len(x), 1 / RATE)
    peak = hz[(spectrum * (hz > 100)).argmax()]
    return count, min(PITCHES, key=lambda p: abs(math.log(PITCHES[p] / peak))) if count else None


# ---- Questions and captions
# Each gives (kind, question, answer). Answers name what was asked about, so that they can be checked word by word.

def a(name):                            # none of the names begins with a u
    return ("an " if name[0] in "aeio" else "a ") + name


def plural(noun):                       # star -> stars, cross -> crosses
    return noun + ("es" if noun.endswith("s") else "s")


def counted(n, noun):                   # "two stars"
    return f"{NUMBERS[n]} {noun if n == 1 else plural(noun)}"


def there_are(n, noun):
    return f"There {'is' if n == 1 else 'are'} {counted(n, noun)}."


def listing(words):                     # "x, y and z"
    *words, last = words
    return f"{', '.join(words)} and {last}" if words else last


def only(things, key):                  # the things that no other shares `key` with
    count = Counter(getattr(t, key) for t in things)
    return [t for t in things if count[getattr(t, key)] == 1]


FACTS = {                               # kind -> by what one thing is told from all others, questions, answer
    "colour": ("shape", ["What colour is the {}?", "What color is the {}?", "Which colour does the {} have?"],
               "The {t.shape} is {t.colour}."),
    "shape": ("colour", ["What shape is the {} one?", "Which shape is {}?", "What is the {} thing?"],
              "The {t.colour} one is a {t.shape}."),
    "size": ("name", ["Is the {} small or big?", "How big is the {}?"], "The {t.name} is {t.size}."),
    "place": ("name", ["At which place is the {}?"], "The {t.name} is {t.place}.")}


def ask_fact(things, rng, kind):        # None where nothing can be told from all others
    key, asks, answer = FACTS[kind]
    if unique := only(things, key):
        t = rng.choice(unique)
        ask = rng.choice(asks) if len(asks) > 1 else asks[0]    # a choice of one would draw a random number too
        return kind, ask.format(getattr(t, key)), answer.format(t=t)


ask_colour, ask_shape, ask_size, ask_place = (partial(ask_fact, kind=kind) for kind in FACTS)


def ask_count(things, rng):
    key = rng.choice(["all", "all", "shape", "colour"])
    ask = rng.choice(["How many {} are there?", "How many {} do you see?"])
    if key == "all":
        return "count", ask.format("shapes"), there_are(len(things), "shape")
    words = {"shape": SHAPES, "colour": COLOURS}[key]
    word = getattr(rng.choice(things), key) if rng.random() < 0.8 else rng.choice(list(words))     # there may be none
    n = sum(getattr(t, key) == word for t in things)
    noun = {"shape": word, "colour": f"{word} shape"}[key]
    return "count", ask.format(plural(noun)), there_are(n, noun)


def ask_exists(things, rng):            # half and more of what is asked for is there
    names = {t.name for t in things}
    if rng.random() < 0.5:
        name = rng.choice(sorted(names))
    else:
        t = rng.choice(things)          # half right, so that colour and shape must be seen together
        name = rng.choice([f"{t.colour} {rng.choice(list(SHAPES))}", f"{rng.choice(list(COLOURS))} {t.shape}"])
    answer = f"Yes, there is {a(name)}." if name in names else f"No, there is no {name}."
    return "exists", rng.choice(["Is there {}?", "Do you see {}?"]).format(a(name)), answer


def ask_side(things, rng):
    if pairs := [(t, u) for t, u in permutations(only(things, "name"), 2) if abs(t.x - u.x) > SIDE / 8]:
        t, u = rng.choice(pairs)
        side = "left" if t.x < u.x else "right"
        return "side", f"Is the {t.name} left or right of the {u.name}?", f"The {t.name} is on the {side}."


def describe(things):                   # a picture's caption: everything in it and where
    return listing([f"{a(t.full_name)} {t.place}" for t in things]).capitalize() + "."


def picture_questions(things, rng):     # all that fit, in any order, then the caption's
    kinds = [ask_colour, ask_shape, ask_count, ask_size, ask_place, ask_exists, ask_side]
    asked = [ask(things, rng) for ask in rng.sample(kinds, len(kinds))]
    caption = "caption", rng.choice(["Describe the picture.", "What is in the picture?"]), describe(things)
    return [*filter(None, asked), caption]                      # None: no such question fits the picture


def clip_questions(t, way, rng):
    to = {"left": "to the left", "right": "to the right"}.get(way, way)         # up and down as they are
    return [("colour", "What colour is the moving shape?", f"The {t.shape} is {t.colour}."),
            ("shape", rng.choice(["What is moving?", "Which shape moves?"]), f"{a(t.name).capitalize()} is moving."),
            ("way", rng.choice(["Which way does it move?", "Where does the shape go?"]), f"The {t.shape} moves {to}."),
            ("caption", rng.choice(["Describe the clip.", "What happens in the clip?"]),
             f"A {t.full_name} moves {to}.")]


def sound_questions(count, pitch, voice, rng):
    beeps = f"{counted(count, f'{pitch} beep')} of {a(voice)}"
    ask = rng.choice
    return [("count", ask(["How many beeps do you hear?", "How many beeps are there?"]), there_are(count, "beep")),
            ("pitch", ask(["How high is the sound?", "Is the sound low, middle or high?"]), f"The sound is {pitch}."),
            ("voice", ask(["What makes the sound?", "Which instrument do you hear?"]), f"It is a {voice}."),
            ("caption", ask(["Describe the sound.", "What do you hear?"]), beeps.capitalize() + ".")]


# ---- Pointing

NOUNS = "thing|{shape}|{colour} thing|{size} thing|{colour} {shape}|{size} {shape}|{size} {colour} {shape}".split("|")
RELATIONS = [((-1, 0), "leftmost", "on the left of"), ((1, 0), "rightmost", "on the right of"),
             ((0, -1), "highest", "above"), ((0, 1), "lowest", "below")]
GAP = SIDE / 16                         # less than this between two things is no order


def farther(t, u, way):                 # how many pixels t lies on that side of u
    return (t.x * way[0] + t.y * way[1]) - (u.x * way[0] + u.y * way[1])


def beyond(u, way, group):
    """The one thing of a group that lies on that side of u; None if none or several do, or if it is hard to tell."""
    there = [t for t in group if t is not u and farther(t, u, way) > -GAP]
    return there[0] if len(there) == 1 and farther(there[0], u, way) > GAP else None


def extremes(t, group):                 # leftmost, highest ... if it clearly is that in a group of several
    others = [u for u in group if u is not t]
    return [most for way, most, _ in RELATIONS if min((farther(t, u, way) for u in others), default=0) > GAP]


def referring_expressions(t, things):
    """All we can say that fits this thing alone -> lists: by name, by place, as the outermost, by another thing."""
    fits = {noun: [u for u in things if noun in u.nouns] for noun in t.nouns}
    return [[f"the {noun}" for noun, group in fits.items() if len(group) == 1],
            [f"the {noun} {t.place}" for noun, group in fits.items() if t in only(group, "place")],
            [f"the {most} {noun}" for noun, group in fits.items() for most in extremes(t, group)],
            [f"the {noun} {side} the {u.name}" for u in only(things, "name") for way, _, side in RELATIONS
             if beyond(u, way, [t]) for noun, group in fits.items() if beyond(u, way, group) is t]]


def box_rows(pictures, rng, task):
    """All things that can be told apart: for REC an expression, for REG the full name, for RES expressions and mask."""
    rows = []
    for p in pictures:
        for t in p.things:
            if found := [rng.choice(kind) for kind in referring_expressions(t, p.things) if kind]:
                told = {"REC": {"expression": rng.choice(found)}, "REG": {"expression": a(t.full_name)},
                        "RES": {"expressions": found, "height": SIDE, "width": SIDE, "mask": [sum(outline(t), ())]}}
                rows.append({"img_path": p.name, "bbox": box(t)} | told[task])
    return rows


def all_regions(p, rng, texts, times=1):
    """All things that can be told apart, in any order, with texts(thing, its referring expressions by kind, rng)."""
    told = [(t, referring_expressions(t, p.things)) for t in p.things] * times
    rows = [{"bbox": box(t), "expressions": found} for t, said in told if any(said) and (found := texts(t, said, rng))]
    return rows and {"img_path": p.name, "regions": rng.sample(rows, len(rows))}


def bare_words(t, said, rng):           # its looks, its place, the sides of which it is the outermost
    sides = [text.split()[1] for text in said[2] if re.fullmatch(r"the \w+ thing", text)]
    return [" ".join([t.full_name, *t.place.split()[2:], *sides])]


def flickr_row(p, rng):
    """Caption with marked phrases and the boxes of each: every thing and its place, or things counted by shape."""
    if rng.random() < 0.5:
        of = {shape: [i for i, t in enumerate(p.things) if t.shape == shape] for shape in SHAPES}
        parts = [(f"<ph_st>{counted(len(seq), shape) if len(seq) > 1 else a(shape)}<ph_ed>", seq)
                 for shape, seq in of.items() if seq]
    else:
        parts = [(f"<ph_st>{a(t.full_name)}<ph_ed> {t.place}", [i]) for i, t in enumerate(p.things)]
    phrases, seqs = zip(*parts)
    return {"image_id": Path(p.name).stem, "sentence": f"The picture shows {listing(phrases)}.",
            "boxes": [box(t) for t in p.things], "boxes_seq": seqs}


def pope_rows(pictures, rng, kind):
    """Two questions a picture: one after a thing in it, one after one that is not: any, a frequent or a similar one."""
    frequency, rows = Counter(t.name for p in pictures for t in p.things), []
    names = sorted(NAMES, key=lambda name: -frequency[name])
    for p in pictures:
        here = sorted({t.name for t in p.things})
        similar = [name for name in names if set(name.split()) & set(" ".join(here).split())]       # in colour or shape
        others = {"random": names, "popular": names[:10], "adversarial": similar}[kind]
        absent = [name for name in others if name not in here]
        for name, label in ((rng.choice(here), "yes"), (rng.choice(absent), "no")):
            text = f"Is there {a(name)} in the picture?"
            rows.append({"question_id": len(rows) + 1, "image": p.name, "text": text, "label": label})
    return rows


# ---- Drawings
# Pictures that few words tell exactly, to learn drawing from; and whether what a model draws is what was asked for.

def drawing(rng):
    """One thing at a place, or two, one beyond the other; they are big unless sizes are told -> things, caption."""
    things = [make_thing(rng) for _ in range(rng.choice((1, 2, 2)))]
    noun = rng.choice(NOUNS[-3::2])                             # colour and shape, with or without size
    if "size" not in noun:
        for t in things:
            t.size, t.radius = "big", SIZES["big"] * rng.uniform(0.92, 1.08)
    way, _, side = rng.choice(RELATIONS)
    if len(things) == 1:
        way = rng.choice((-1, 0, 1)), rng.choice((-1, 0, 1))    # to any of the nine places
    for t, far in zip(things, (31, -31)):                       # the second opposite to the first
        t.x, t.y = SIDE / 2 + far * way[0] + rng.uniform(-2, 2), SIDE / 2 + far * way[1] + rng.uniform(-2, 2)
    first, *other = [a(noun.format(**vars(t))) for t in things]
    where = f"{rng.choice((side, side.removeprefix('on the ')))} {other[0]}" if other else things[0].place
    return things, f"{first.capitalize()} {where}."


def drawn(things):
    """What a drawing shows, always in the same order of words, so that a model can tell a painter word by word."""
    names = [a(t.full_name) for t in things]
    side = next((side for way, _, side in RELATIONS if farther(things[0], things[-1], way) > SIDE / 4), "")
    where = f"{side.removeprefix('on the ')} {names[1]}" if side else things[0].place
    return f"{names[0].capitalize()} {where}."


def words(names, i):                    # the colours (0) or shapes (1) of names, sorted
    return sorted(name.split()[i] for name in names)


def judge(kind, caption, made):
    """Whether a picture, the frames of a clip or samples (at RATE) are as a caption says: {what: right}."""
    told = re.findall("|".join(NAMES), caption)
    if kind == "audio":
        count, pitch = listen(made)
        return {"count": NUMBERS[count:count + 1] == caption.lower().split()[:1], "pitch": f"{pitch} beep" in caption}
    if kind == "video":
        thing, way = watch(made)
        return {"way": str(way) in re.split(r"\W", caption), "thing": bool(thing) and thing.name in told}
    seen = sorted(look(made), key=lambda t: [*told, t.name].index(t.name))      # in the caption's order, others last
    names = [t.name for t in seen]
    return {"shapes": words(names, 1) == words(told, 1), "colours": words(names, 0) == words(told, 0),
            "things": names == told, "places": len(seen) == len(told) and placed(seen, caption)}


def placed(things, caption):            # whether one thing is at the place told, or the first of two beyond the other
    if len(things) == 1:
        return caption.endswith(f" {things[0].place}.")
    way = next((way for way, _, side in RELATIONS if f" {side.removeprefix('on the ')} " in caption), (0, 0))
    return len(things) == 2 and farther(*things, way) > GAP


# ---- Dialogues and requests

def turns(*texts):                      # LLaVA's: questions and answers in turn
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def dialogue(p, rng, chain):
    """Three rounds, each about what the last one found; None for pictures that give no such thing. A chain says [it]
    and gives only shapes away, so that the rest must be seen; else questions name things with boxes."""
    key = "shape" if chain else "name"

    def here(text, thing):
        return f"{text} <{getattr(thing, key)}:{[round(v) for v in box(thing)]}>"
    known = only(p.things, key)
    links = [(t, side, u) for t in known for way, _, side in RELATIONS if (u := beyond(t, way, p.things)) in known]
    links = links or [(t, "", t) for t in known[:1] if chain]   # else all rounds are about one thing
    if not links:
        return None
    last, side, found = rng.choice(links)
    asked = [("How big is {}?", f"It is {found.size}."), ("What colour is {}?", f"It is {found.colour}.")]
    if chain:
        asked = rng.sample(asked, 2)
    if side:
        asked.insert(0, (f"What is {side} {{}}?", f"{a(getattr(found, key)).capitalize()} is {side} it."))
    texts = [f"Where is the {getattr(last, key)}?", here(f"The {getattr(last, key)} is {last.place}.", last)]
    for ask, answer in asked[:2]:
        texts += [ask.format("[it]") if chain else here(ask.format(f"the {last.name}"), last), here(answer, found)]
        last = found
    return {"image": p.name, "image_wh": [SIDE, SIDE], "conversation": turns(*texts)}


WISHES = {"image": ["Draw {}.", "Can you draw {}?", "Show me a picture of {}."],
          "video": ["Make a clip in which {}.", "Can you show me how {}?", "I want to see how {}."],
          "audio": ["Play {}.", "Can you make a sound of {}?", "Let me hear {}."]}
REPLIES = ["Here it is.", "Of course.", "Sure.", "How about this?"]


def request(m, rng, year):
    """A wish to see or hear a medium, in the format of NExT-GPT's sets of 2023 or of 2024."""
    ask, reply = turns(rng.choice(WISHES[m.kind]).format(m.caption[0].lower() + m.caption[1:-1]), rng.choice(REPLIES))
    if year == 2023:
        return {"mm_name": m.name, "output_modality": m.kind, "conversation": [
            ask | {"input_modality": "text"}, reply | {"caption": m.caption, "output_modality": m.kind}]}
    reply["value"] += f" <{m.kind}>"
    return {f"output_{m.kind}": m.name, f"{m.kind}_captions": m.caption,
            f"{m.kind}_caption_embeddings": Path(m.name).name + ".npy", "conversations": [ask, reply]}


def wish(m, rng):
    """A request that is answered by what will come, in the words that prompt the medium, and by the medium."""
    row, caption = request(m, rng, 2024), drawn(m.things) if m.things else m.caption
    ask, answer = row["conversations"][0], {"from": "gpt", "value": f"{caption} <{m.kind}>"}
    return row | {f"{m.kind}_captions": caption, "conversations": [ask, answer]}


def talks(of, rng):                     # as many as there are drawings; none where a kind of media is missing
    return [talk(drawing, of, rng) for drawing in of["drawing"] if all(of.values())]


def talk(drawing, of, rng):
    """All a model can do, one thing after another, in any order; no kind of medium is shown twice, nor made twice."""
    picture, clip, sound, unused, *made = (rng.choice(of[kind]) for kind in ("image", "video", "audio") * 2)
    shown = rng.choice([(picture,), (picture,), (picture, sound), (picture, sound), (clip,), (sound,)])
    row, parts = {"image_wh": [SIDE, SIDE]}, []
    for m in shown:
        row[f"input_{m.kind}"] = m.name
        parts.append(asked(m.kind, rng.sample(m.questions, rng.randint(1, 2))))
    for m in rng.sample([drawing, *made], rng.randint(1, 2)):
        row |= wish(m, rng)
        parts.append([turn["value"] for turn in row.pop("conversations")])
    first = parts[0]                    # about the picture, if one is shown
    rng.shuffle(parts)
    if picture in shown and (pointing := dialogue(picture, rng, chain=True)):
        texts = [turn["value"].replace("[it]", "it") for turn in pointing["conversation"]]
        parts.insert(rng.randint(parts.index(first) + 1, len(parts)), texts)
    return row | {"conversations": turns(*sum(parts, []))}


def comprehension(m, rng):
    return {f"input_{m.kind}": m.name, "conversations": turns(*asked(m.kind, m.questions[-1:]))}


def pair(m, rng):                       # a caption pair of NExT-GPT's
    return {f"{m.kind}_name": m.name, "caption": m.caption}


def number(m, rng):                     # how many things there are and their names, bare, for a caption
    return pair(m._replace(caption=" ".join([counted(len(m.things), "shape"), *(t.name for t in m.things)])), rng)


# ---- Files

class Medium(NamedTuple):
    kind: str                           # image, video or audio
    name: str                           # of the file, relative to the folder
    questions: list                     # (kind, question, answer); the last one asks for the caption
    caption: str
    things: list                        # in a picture


def write_picture(rng, path):
    things = scene(rng)
    draw(things, rng, paper(rng)).save(path, optimize=False)
    return picture_questions(things, rng), describe(things), things


def write_drawing(rng, path):
    things, caption = drawing(rng)
    draw(things, rng, paper(rng)).save(path, optimize=False)
    return [], caption, things


def write_clip(rng, path):
    thing, way, frames = clip(rng)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000 // FPS, loop=0)
    questions = clip_questions(thing, way, rng)
    return questions, questions[-1][2], []


def write_sound(rng, path):
    *facts, x = sound(rng)
    with wave.open(str(path), "wb") as f:
        f.setnchannels(1), f.setsampwidth(2), f.setframerate(RATE)
        f.writeframes((np.clip(x, -1, 1) * 32767).astype("<i2").tobytes())
    questions = sound_questions(*facts, rng)
    return questions, questions[-1][2], []


MEDIA = {"image": ("pictures", "png", write_picture), "video": ("clips", "gif", write_clip),
         "audio": ("sounds", "wav", write_sound), "drawing": ("drawings", "png", write_drawing)}


def write_medium(job):                  # one file of the world -> Medium
    kind, number, seed, out = job
    folder, ending, write = MEDIA[kind]
    name = f"{folder}/{number:06}.{ending}"
    kind = "image" if kind == "drawing" else kind
    return Medium(kind, name, *write(random.Random(f"{seed}/{kind}/{number}"), Path(out) / name))


def asked(kind, questions):             # texts of rounds; first comes the medium they are about
    texts = [text for _, *words in questions for text in words]
    return [f"<{kind}>\n{text}" for text in texts[:1]] + texts[1:]


def conversation(media, rng):
    """LLaVA record: up to five questions about a medium, two about each of several, shown one after another."""
    record, texts = {}, []
    for kind, name, questions, *_ in media:
        record.setdefault(kind, []).append(name)
        chosen = rng.sample(questions, min(5 if len(media) == 1 else 2, len(questions)))
        texts += asked(kind, chosen)
    return {**record, "conversations": turns(*texts)}


def looks(medium, rng, asks=(ask_colour, ask_shape, ask_count)):
    """LLaVA record: up to eight of `asks` about a picture, so that all there is to learn is which thing is meant."""
    drawn = (rng.choice(asks)(medium.things, rng) for _ in range(24))
    questions = {question[2]: question for question in drawn if question}       # each answer once
    return {"image": [medium.name], "conversations": turns(*asked("image", list(questions.values())[:8]))}


def single_question(m, rng):            # LLaVA record of one question, with its kind
    question = rng.choice(m.questions)
    return {"kind": f"{m.kind} {question[0]}", m.kind: m.name, "conversations": turns(*asked(m.kind, [question]))}


def conversations(media, rng):          # every medium in one record, some two or three to a record
    media, out = rng.sample(media, len(media)), []
    while media:
        n = rng.choice([2, 3]) if rng.random() < 0.15 else 1
        out.append(conversation(media[-n:], rng))
        del media[-n:]
    return out


def each(record, **how):                # a maker of rows: a record of each medium that gives one
    return lambda media, rng: [row for m in media if (row := record(m, rng, **how))]


# File name ({}: train or test) -> kind of media, what makes rows of them. As NExT-Chat, ChatterBox, NExT-GPT have them.
FILES = {f"{task}_{{}}.jsonl": ("image", partial(box_rows, task=task)) for task in ("REC", "RES", "REG")}
FILES |= {f"POPE_{k}.jsonl": ("image", partial(pope_rows, kind=k)) for k in ("random", "popular", "adversarial")}
FILES |= {
    "names_{}.jsonl": ("image", each(all_regions, texts=lambda t, said, rng: said[0])),    # by name alone, at first
    "recs_{}.jsonl": ("image", each(all_regions, times=2, texts=lambda t, said, rng: [          # more often by others
        rng.choice(kind) for kind in said + said[2:] if kind])),
    "regs_{}.jsonl": ("image", each(all_regions, texts=lambda t, said, rng: [a(t.full_name)])),
    "parts_{}.jsonl": ("image", each(all_regions, texts=bare_words)),           # what each word alone calls to mind
    "CAP_{}.jsonl": ("image", each(lambda p, rng: {"img_path": p.name, "caption": p.caption})),
    "CWB_flickr_{}.jsonl": ("image", each(flickr_row)),
    "CB_MRG.json": ("image", each(dialogue, chain=False)), "CB_LC.json": ("image", each(dialogue, chain=True)),
    "clips.json": ("video", each(lambda m, rng: conversation([m], rng))),
    "sounds.json": ("audio", each(lambda m, rng: conversation([m], rng))),
    "looks.json": ("image", each(looks)), "counts.json": ("image", each(looks, asks=(ask_count,))),
    "facts.json": ("image", each(looks, asks=(ask_exists, ask_place, ask_side, ask_size))),
    "numbers.json": ("image", each(number)), "drawings.json": ("drawing", each(pair)), "talks.json": ("all", talks),
    "drawings_wishes.json": ("drawing", each(wish)), "video_wishes.json": ("video", each(wish)),
    "audio_wishes.json": ("audio", each(wish))}
FILES |= {f"{kind}_{name}.json": (kind, rows) for kind in WISHES for name, rows in (
    ("pairs", each(pair)), ("comprehension", each(comprehension)), ("generation", each(request, year=2024)),
    ("instruction", each(request, year=2023)))}


def listed(rows):                       # JSON with a line per record
    return "[" + ",\n".join(map(json.dumps, rows)) + "]\n"


def write_annotations(job):             # one of FILES, from random numbers of its own
    name, media, out, split, seed = job
    rows = FILES[name][1](media, random.Random(f"{seed}/{name}"))
    if name.endswith(".jsonl"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        text = '{"data": ' + listed(rows) + "}" if name.startswith("CB_") else listed(rows)
    (out / name.format(split)).write_text(text)


def write_tokenizer(records, out, vocab_size):
    """Sentencepiece model of what is said in conversations and, less often, about boxes; with LLaMA's conventions."""
    import sentencepiece
    from datasets import PROMPTS                                # not above: workers need no torch
    path, dialogues = out / "tokenizer.model", json.loads((out / "CB_LC.json").read_text())["data"]
    pointing = [json.loads(line)["expression"] for line in open(out / "REC_train.jsonl")]
    texts = sorted({turn["value"] for record in records for turn in record["conversations"]})
    spoken = [re.sub(" *<.*?>", "", turn["value"]) for row in dialogues for turn in row["conversation"]] + pointing
    spoken += sum(WISHES.values(), [*REPLIES, *PROMPTS["REC"], *PROMPTS["REG"]]) * 20
    texts += random.Random(0).sample(sorted(spoken), min(len(spoken), len(texts) // 2))
    texts += ["USER: ASSISTANT:"] * (len(texts) // 5)           # the roles stand in every conversation, in no record
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(path).removesuffix(".model"), vocab_size=vocab_size,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        hard_vocab_limit=False, character_coverage=1.0, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2)
    path.with_suffix(".vocab").unlink()


def write_world(out, counts, split, seed):              # all media, so many of each kind, and all of FILES -> media
    for folder, _, _ in MEDIA.values():
        (out / folder).mkdir(parents=True, exist_ok=True)
    for link in ("images", "videos", "audios"):                 # where NExT-GPT's files have their media
        with suppress(OSError):                                 # there already, or Windows without leave to make links
            (out / link).symlink_to(".")
    jobs = [(kind, i, seed, str(out)) for kind, n in counts.items() for i in range(n)]
    with get_context("spawn").Pool(CORES) as pool:              # a fork of one that decodes video may never wake up
        drawing = pool.imap(write_medium, jobs, chunksize=64)
        media = list(tqdm(drawing, total=len(jobs), desc="drawing", unit="file", disable=None))
        made = iter(media)                                      # in the order of the jobs
        of = {kind: [*islice(made, n)] for kind, n in counts.items()}
        jobs = [(name, of.get(kind, of), out, split, seed) for name, (kind, _) in FILES.items()]      # all: every kind
        shares = sum((jobs[i::CORES] for i in range(CORES)), [])            # a core gets the media once, and its share
        writing = pool.imap(write_annotations, shares, chunksize=-(-len(jobs) // CORES))
        list(tqdm(writing, total=len(jobs), desc="writing", unit="file", disable=None))
    return media


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True, help="folder to write")
    p.add_argument("--pictures", type=int, default=48000, help="and half as many drawings, default %(default)s")
    p.add_argument("--clips", type=int, default=8000, help="default %(default)s")
    p.add_argument("--sounds", type=int, default=8000, help="default %(default)s")
    p.add_argument("--questions", type=int, default=0, help="write so many single questions instead of conversations")
    p.add_argument("--seed", type=int, help="default 0, with --questions 1")
    p.add_argument("--vocab-size", type=int, default=700, help="of the tokenizer, default %(default)s")
    args = p.parse_args(argv)
    ours = all((args.out / folder).is_dir() for folder, *_ in MEDIA.values())
    if args.out.is_file() or any(args.out.glob("*")) and not ours:
        p.error(f"--out: {args.out} holds other things")
    counts = {"image": args.pictures, "video": args.clips, "audio": args.sounds, "drawing": args.pictures // 2}
    split, seed = "train", args.seed or 0
    if args.questions:
        n, split, seed = args.questions // 4, "test", 1 if args.seed is None else args.seed
        counts = {"image": 2 * n, "video": n, "audio": n, "drawing": 2 * n}
    media = [m for m in write_world(args.out, counts, split, seed) if m.questions]          # none about drawings
    rng = random.Random(seed)
    if args.questions:
        return (args.out / "questions.json").write_text(listed(each(single_question)(media, rng)))
    records = conversations(media, rng)
    (args.out / "conversations.json").write_text(listed(records))
    (args.out / "captions.json").write_text(listed(each(pair)(media, rng)))
    write_tokenizer(records, args.out, args.vocab_size)


if __name__ == "__main__":
    from data import program            # here, for it brings torch, which no worker needs
    program(main)
