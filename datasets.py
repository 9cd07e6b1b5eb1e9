"""Data set files of the published systems -> Samples.

In order: masks (COCO polygons and run lengths), records, parts of turns, prompts, NExT-Chat's formats, mixtures;
NExT-GPT; ChatterBox. Nothing in a file is trusted: text stays text, numbers are checked, what is wrong is a DataError
naming file and record; functions here raise one, or a KeyError, for a bad record. Boxes are xyxy pixels of the picture.
Formats: Shikra (arXiv 2306.15195), NExT-Chat (2311.04498), NExT-GPT (2309.05519), ChatterBox (2401.13307).
"""
import json
import math
import re
import sys
from functools import partial
from itertools import chain, repeat
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import Callable, NamedTuple

import numpy as np
import torch

from data import (MAX_PIXELS, TAGS, Box, Conversations, DataError, MediaError, Medium, Sample, Signal, Unfit, captioned,
                  check_box, check_file, from_user, is_box, llava_sample, naming, nonempty, parts_of, read_records,
                  safe_join)


# ---- Masks

def edge(a, b):
    """Lattice points from a to b (each int (2,)), one a step along the longer axis, as COCO's routine draws them."""
    axis = int(abs(b - a)[1] > abs(b - a)[0])                   # 0: x is the longer
    if a[axis] > b[axis]:
        return edge(b, a)[::-1]
    steps = np.arange(b[axis] - a[axis] + 1)
    slope = (b - a)[1 - axis] / max(len(steps) - 1, 1)
    points = np.empty((len(steps), 2), int)
    points[:, axis] = a[axis] + steps
    points[:, 1 - axis] = (a[1 - axis] + slope * steps + 0.5).astype(int)
    return points


def polygon_mask(xy, height, width):
    """Corners (n, 2) in pixels -> uint8 (H, W). The outline is drawn five times as large; columns flip where it is."""
    corners = (5 * xy + 0.5).astype(int)
    line = np.concatenate([edge(a, b) for a, b in zip(corners, np.roll(corners, -1, axis=0))])              # (points, 2)
    (x0, y0), (x1, y1) = line[:-1].T, line[1:].T
    x = (np.where(x1 < x0, x1, x1 - 1) + 0.5) / 5 - 0.5         # back at the scale of pixels
    y = np.ceil(((np.minimum(y0, y1) + 0.5) / 5 - 0.5).clip(0, height))
    crossing = (x0 != x1) & (x == np.floor(x)) & (x >= 0) & (x < width)                     # at a column's middle
    flips = np.bincount((x * height + y)[crossing].astype(int), minlength=height * width)[:height * width]
    return (flips.cumsum() % 2).astype(np.uint8).reshape(width, height).T                   # pixels go column by column


def rle_counts(text):
    """COCO's compressed run lengths -> a list: five bits a character, low first, differences from two runs back."""
    numbers = re.findall("[P-o]{0,6}[0-O]", text)               # "0" is 0; from "P" on, the sixth bit, more follows
    if "".join(numbers) != text:
        raise DataError(f"run lengths {text!r:.40}: not COCO's compressed form")
    counts = []
    for number in numbers:
        value = sum((ord(c) - 48 & 31) << 5 * i for i, c in enumerate(number))
        sign = 16 << 5 * (len(number) - 1)                      # the highest bit
        counts.append((value ^ sign) - sign + (counts[-2] if len(counts) > 2 else 0))
    return counts


def rle_text(counts):
    """The compressed form of run lengths, see rle_counts."""
    out, steps = [], np.array(counts, np.int64)
    steps[3:] -= steps[1:-2]
    for value in steps.tolist():
        more = True
        while more:
            low, value = value & 31, value >> 5
            more = value != -(low >> 4)                         # all that is left is the sign
            out.append(chr(48 + low + 32 * more))
    return "".join(out)


def rle_mask(rle):
    """COCO run lengths {size: [H, W], counts: text or list} -> uint8 (H, W)."""
    (height, width), counts = rle["size"], rle["counts"]
    counts = rle_counts(counts) if isinstance(counts, str) else counts
    if not is_list(counts, int) or min(counts, default=0) < 0 or sum(counts) != height * width:
        raise DataError(f"run lengths that do not fill {height}x{width}")
    runs = np.repeat(np.arange(len(counts)) % 2, counts)        # zeros come first, then ones and zeros take turns
    return runs.astype(np.uint8).reshape(width, height).T       # column by column


def mask_rle(mask):
    """Mask (H, W) -> COCO's compressed run lengths."""
    flat = np.asarray(mask, bool).T.reshape(-1)
    starts = np.flatnonzero(np.diff(flat, prepend=False))       # of runs; that of zeros, the first, may be empty
    return {"size": list(mask.shape), "counts": rle_text(np.diff([0, *starts, flat.size]))}


def segmentation_mask(parts, height, width):
    """A list of polygons [x1, y1, x2, ...] or of run lengths -> their sum, uint8 (H, W)."""
    if not is_list([height, width], int) or min(height, width) < 1 or height * width > MAX_PIXELS:
        raise DataError(f"a picture of {width!r:.20}x{height!r:.20}")
    total = np.zeros((height, width), np.uint8)
    for part in parts:                                          # parity: above 1 where polygons overlap
        if not isinstance(part, dict):
            total += polygon_mask(corners(part, height, width), height, width)
        elif part["size"] == [height, width]:
            total += rle_mask(part)
        else:
            raise DataError(f"a mask of {part['size']!r:.40} for a picture of {[height, width]}")
    return total


def corners(numbers, height, width):
    """A polygon of a file as (n, 2), not further outside than the picture is large."""
    if not is_list(numbers, int, float) or len(numbers) % 2 or not 6 <= len(numbers) <= 20000:
        raise DataError(f"polygon {numbers!r:.60}: three or more pairs of numbers are expected")
    xy = np.array(numbers, float).reshape(-1, 2)
    if not (abs(xy) <= 2 * max(height, width)).all():
        raise DataError(f"polygon {numbers!r:.60}: far outside its picture of {width}x{height}")
    return xy


# ---- Records

class Lines:
    """The records of a .jsonl file, read when asked for: only the places of the lines are held."""
    LONGEST = 1 << 20                   # bytes of a record

    def __init__(self, path):
        self.path = path
        with open(path, "rb") as file:
            self.ends = np.cumsum([0, *(len(line) for line in file)])

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        start, end = self.ends[i], self.ends[i + 1]
        if end - start > self.LONGEST:
            raise DataError(f"{self.path}: line {i + 1}: longer than a megabyte")
        with open(self.path, "rb") as file:
            file.seek(start)
            line = file.read(end - start)
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.path}: line {i + 1}: {error}") from None


def field(row, key, kind=str):
    """row[key], which must be of a kind."""
    value = row[key]
    if not isinstance(value, kind):
        raise DataError(f"{key} is {value!r:.40}, not of type {getattr(kind, '__name__', 'str or int')}")
    return value


def texts(row, key):
    """row[key], one or more texts."""
    if not row[key] or not is_list(row[key], str):
        raise DataError(f"{key} is {row[key]!r:.40}, not one or more texts")
    return row[key]


def is_list(value, *kinds):
    """Whether a value is a list of some kinds (bool does not count as a number)."""
    return isinstance(value, list) and set(map(type, value)) <= set(kinds)


# ---- Parts of turns

MAX_BOXES = 100                         # in a record


def box_of(row, mask=None):
    """The box of a record, inside its picture where the record says how large that is."""
    return Box(check_box(row["bbox"], row.get("width", np.inf), row.get("height", np.inf)), mask)


def boxes_of(row, key="boxes"):
    """The boxes of a record as tuples."""
    rows = field(row, key, list)
    if len(rows) > MAX_BOXES:
        raise DataError(f"{len(rows)} {key}, more than {MAX_BOXES}")
    return [check_box(box) for box in rows]


def pick(boxes, numbers):
    """Fresh Boxes of a list of box numbers."""
    if not is_list(numbers, int) or not set(numbers) <= set(range(len(boxes))):
        raise DataError(f"box numbers {numbers!r:.40}, there are {len(boxes)} boxes")
    return [Box(boxes[n]) for n in numbers]


def phrases(text, groups, boxes):
    """"<ph_st>a dog<ph_ed> runs", [[0]] -> ["a dog", Box, " runs"]."""
    first, *chunks = text.replace("<ph_st>", "").split("<ph_ed>")
    if len(chunks) != len(groups):
        raise DataError(f"{len(chunks)} phrases with boxes, {len(groups)} lists of box numbers")
    return [first, *chain(*([*pick(boxes, group), chunk] for group, chunk in zip(groups, chunks)))]


def bare(text):
    return text.replace("<ph_st>", "").replace("<ph_ed>", "")


def words(tokens, boxes):
    """VCR's lists of words and of lists of box numbers -> parts with blanks between them."""
    if not isinstance(tokens, list):
        raise DataError(f"words {tokens!r:.40}: a list is expected")
    parts = []
    for token in tokens:
        parts += [" ", token] if isinstance(token, str) else [" ", *pick(boxes, token)]
    return parts[1:]


def answer_is(text):
    return [f"The answer is {text}."]


# ---- Prompts

PROMPTS = {
    "REC": ("<image> Where is <expr> in the image?", "<image> Where is <expr>?", "<image> Can you point out <expr>?",
            "<image> What is the position of <expr>?", "<image> In this picture, where is <expr>?",
            "<image> Show me the location of <expr>."),
    "REG": ("<image> What is region <objs>?", "<image> What is <objs>?", "<image> Can you say in short what <objs> is?",
            "<image> In one phrase, who or what is at <objs>?", "<image> How would you tell <objs> from the rest?"),
    "GC": ("<image> What is at <objs>?", "<image> What can be seen in region <objs>?",
           "<image> In a few words, what does <objs> show?", "<image> Can you caption the region <objs>?"),
    "VQA": ("<image> <question>", "<image> <question> Answer in short.", "<image> In a word or two: <question>",
            "<image> Can you answer this? <question>"),
    "VQA_CoT": ("<image> <question> Please explain.", "<image> <question> Think first, then answer.",
                "<image> <question> Say why.", "<image> Can you reason about this? <question>"),
    "VQA_BCoT": ("<image> <question> Please mention related object locations.",
                 "<image> <question> Please include object locations and explain.",
                 "<image> <question> Point at what you speak of, and say why."),
    "flickr30k": ("<image> Can you describe the image and include object locations?",
                  "<image> What is going on here, and where is each thing?",
                  "<image> In one sentence with locations: what is shown?"),
    "image_cap": ("<image> What is in the image?", "<image> Can you describe the image?",
                  "<image> In one sentence, what does this show?", "<image> How would you caption this picture?"),
}
V0 = {                                  # what NExT-Chat's README names for its models of 224 pixels
    "REC": ("Where is <expr> in the <image>?",),
    "flickr30k": ("Can you provide a description of the image <image> and include the locations for each mentioned "
                  "object?",),
    "VQA_BCoT": ("<image> <question> Please include object locations and explain.",),
}
PLACES = {"image", "expr", "objs", "question"}


def load_prompts(path):
    """Prompts from JSON in a layout of the originals, from NExT-Chat's folder of it, or "v0"; ours for other tasks."""
    if str(path) == "v0":
        return PROMPTS | V0
    path = Path(path)
    try:
        lists = {file.stem: json.loads(file.read_bytes()) for file in path.glob("*.json")}
        return PROMPTS | prompts_in(lists or json.loads(path.read_bytes()))
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None


def prompts_in(tables):
    """Prompts by task, in NExT-Chat's layout or ChatterBox's."""
    if not isinstance(tables, dict):
        raise DataError(f"lists of prompts by task are expected, not {type(tables).__name__}")
    if "v1" in tables:
        return prompts_in(tables["v1"])
    if "placeholder" in tables:
        return talks_of(tables)
    return {task: prompts_of(tables, task) for task in tables}


def prompts_of(tables, task):
    """Those of a task in NExT-Chat's {task: [prompt, ...]}."""
    for prompt in texts(tables, task):
        places = re.findall(r"<(\w+)>", prompt)
        if places.count("image") != 1 or not set(places) <= PLACES:
            raise DataError(f"{task}: {prompt!r:.80}: places are one <image> and some of {sorted(PLACES)}")
    return tuple(tables[task])


class Ask(NamedTuple):
    """Makes the first question of a sample from one of its prompts."""
    prompts: tuple
    picture: Medium
    rng: np.random.Generator

    def __call__(self, **values):
        """Parts of a prompt drawn at random, each <name> in it replaced by the parts of that name."""
        values["image"] = [self.picture]
        start, *chunks = re.split(r"<(\w+)>", str(self.rng.choice(self.prompts)))           # text, name, text
        filled = ([*values[name], text] for name, text in zip(chunks[::2], chunks[1::2]))
        return nonempty([start, *chain(*filled)])


# ---- Formats: (record, ask) -> turns

def caption(row, ask):
    """COCO captions."""
    return [ask(), [field(row, "caption")]]


def flickr(row, ask):
    """Flickr30k: captions whose phrases have boxes."""
    return [ask(), phrases(field(row, "sentence"), field(row, "boxes_seq", list), boxes_of(row))]


def rec(row, ask):
    """RefCOCO and Visual Genome: an expression, find its box."""
    text = field(row, "expression") if "expression" in row else str(ask.rng.choice(texts(row, "expressions")))
    return [ask(expr=[text]), ["Answer: ", box_of(row), " ."]]


def res(row, ask):
    """As rec, with a mask, about one of several expressions."""
    mask = segmentation_mask(field(row, "mask", list), row["height"], row["width"])
    return [ask(expr=[str(ask.rng.choice(texts(row, "expressions")))]), ["Answer: ", box_of(row, mask), " ."]]


def reg(row, ask):
    """RefCOCO and Visual Genome: a box, say what it holds."""
    text = field(row, "expression") if "expression" in row else texts(row, "expressions")[0]
    return [ask(objs=[box_of(row)]), [text]]


def each_region(row, ask, turns):
    """All regions of a picture, a question each: turns is reg or rec."""
    asks = chain([ask], repeat(ask._replace(picture="")))       # the picture is shown once
    return list(chain(*map(turns, field(row, "regions", list), asks)))


def vqa(row, ask):
    """VQAv2; its test questions come without annotation."""
    answer = field(row["annotation"], "multiple_choice_answer") if row.get("annotation") else "UNKNOWN"
    return [ask(question=[field(row, "question")]), answer_is(answer)]


def vqa_e(row, ask):
    """VQA-E: an answer with its explanation, behind which a score may stand."""
    why, = texts(row | {"explanation": field(row, "explanation", list)[:1]}, "explanation")
    answer = field(row, "multiple_answers")
    return [ask(question=[field(row, "question")]), [f"{why} So the answer is {answer}."]]


def vqa_x(row, ask):
    """VQA-X: an answer with its justification."""
    why, answer = "".join(texts(row, "justification")), field(row, "multiple_choice_answer")
    return [ask(question=[field(row, "question")]), [f"{why} So the answer is {answer}."]]


def pope(row, ask):
    """POPE: is some object in the picture?"""
    return [ask(question=[field(row, "text")]), answer_is(field(row, "label") + " ")]


def llava(row, ask):
    """LLaVA's conversations as they are, <image> marking the place of the picture."""
    turns = llava_sample({**row, "image": "picture"}, "").turns
    for medium in parts_of(turns, Medium):
        medium.path = ask.picture.path
    return turns


def gpt4gen(row, ask, version):
    """Shikra's reasoned answers: a the answer alone, c reasons without boxes, bc reasons with boxes."""
    boxes = boxes_of(row)
    question = phrases(field(row, "question"), field(row, "question_boxes_seq", list), boxes)
    if version == "bc":
        answer = phrases(field(row, "cot_with_ans"), field(row, "answer_boxes_seq", list), boxes)
    else:
        answer = [field(row, "answer") if version == "a" else bare(field(row, "cot_with_ans"))]
    return [ask(question=question), answer]


LETTERS = "ABCD"
VCR_CHOOSE = " You should decide on the best choice{}and output the corresponding letter."
VCR = {                                 # version -> its turns, each the names of parts of vcr
    "q-a": ("question", "answer"), "q-ra": ("question", "rationale answer"), "qc-a": ("question options", "letter"),
    "qc-ra": ("question options", "rationale letter"), "qc-rac": ("question options", "rationale answer letter"),
    "qa-r": ("question given why", "rationale"), "q-a-q-r": ("question", "answer", "why", "rationale"),
    "qac-r": ("question given choices", "reason"),
    "qc-a-qc-r": ("question options", "letter", "choices", "reason"),
}


def vcr(row, ask, version):
    """Visual commonsense reasoning: questions about boxes, four answers and four rationales to choose from."""
    boxes = [check_box(box[:4]) for box in field(row, "boxes", list)[:MAX_BOXES]]           # the fifth is a score
    options, letter, answer = choices_of(row, "answer", boxes)
    choices, reason, rationale = choices_of(row, "rationale", boxes)
    parts = {                           # each begins with what stands between it and the part before it
        "question": [" ", "QUESTION: ", *words(field(row, "question", list), boxes)],
        "options": [" \n", "OPTIONS:", *options, VCR_CHOOSE.format(" ")],
        "choices": [" \n", "RATIONALE OPTIONS:", *choices, VCR_CHOOSE.format(" that explains the above answer ")],
        "given": [" \n", "ANSWER: ", *answer],
        "why": [" ", "You should explain the reason for the above answer."],
        "answer": [" ", *answer], "rationale": [" ", *rationale],
        "letter": [" ", *answer_is(f"({letter})")], "reason": [" ", *answer_is(f"({reason})")],
    }
    first, *others = ([part for name in names.split() for part in parts[name]][1:] for names in VCR[version])
    return [ask(question=first), *others]


def choices_of(row, kind, boxes):
    """Parts " (A) ... (B) ..." of four texts to choose from, the letter of the right one, its parts."""
    choices = [words(text, boxes) for text in field(row, f"{kind}_choices", list)]
    label = row[f"{kind}_label"]
    if label not in range(4) or type(label) is not int:
        raise DataError(f"{kind}_label {label!r:.20}: 0, 1, 2 or 3 is expected")
    lettered = [part for letter, choice in zip(LETTERS, choices) for part in (f" ({letter}) ", *choice)]
    return lettered, LETTERS[label], choices[label]


def point_qa(row, ask, key="question"):
    """A question about what lies in a box. The original's variants with points in place of boxes are left out."""
    return [ask(question=[field(row, key), box_of(row)]), answer_is(str(field(row, "answer", (str, int))) + " ")]


def visual7w(row, ask):
    """Which of some boxes? They are listed in a random order."""
    boxes, answer = boxes_of(row, "candidates"), check_box(row["answer"])
    if answer not in boxes:
        raise DataError(f"answer {answer} is none of the candidates")
    ask.rng.shuffle(boxes)
    listed = [part for box in boxes for part in (Box(box), " ")]
    return [ask(question=[field(row, "question"), " Candidates: ", *listed, "answer in box format."]),
            ["The answer is ", Box(answer), " ."]]


def gqa(row, ask, version):
    """a the answer, c reasons, bc reasons with boxes, s the steps of the question's program."""
    # Forms that need the scene graphs are left out; no published model was trained on them.
    answer = answer_is(field(row, "answer"))
    if version in ("c", "bc"):
        cot = field(row, "cot", dict)
        text = field(cot, "value")
        answer = [bare(text)] if version == "c" else phrases(text, field(cot, "seq", list), boxes_of(cot))
    elif version == "s":
        steps = [re.sub(r" \([^()]*\)$", "", step) for step in field(row, "semanticStr").split("->")]
        answer = ["->".join(steps) + ". ", *answer]
    return [ask(question=[field(row, "question")]), answer]


def clevr(row, ask, version):
    """a the answer, s the steps of the question's program. The original's form with points is left out."""
    answer = answer_is(field(row, "answer"))
    if version == "s":
        answer = [" -> ".join(map(step_of, field(row, "program", list))) + " ", *answer]
    return [ask(question=[field(row, "question")]), answer]


def step_of(one):
    """filter_color:red[0] for a step with that value, which takes what step 0 found."""
    value, inputs = (",".join(map(str, field(one, key, list))) for key in ("value_inputs", "inputs"))
    return field(one, "function") + f":{value}" * bool(value) + f"[{inputs}]" * bool(inputs)


class Format(NamedTuple):
    turns: Callable                     # (record, ask) -> turns
    prompts: str = ""                   # task in PROMPTS
    picture: str = "img_path"           # key of the picture's name
    name: str = "*"                     # its file, * being the name
    unpack: Callable | None = None      # what a .json file holds -> its records; no lambda: rows go to loader processes
    stretch: bool = False               # the picture, see data.Medium
    moves: bool = False                 # the picture is shifted and mirrored at random, see move


REASONS = {"a": "VQA", "c": "VQA_CoT", "bc": "VQA_BCoT", "s": "VQA_CoT"}        # version -> prompts
FORMATS = {
    "caption": Format(caption, "image_cap"),
    "flickr": Format(flickr, "flickr30k", "image_id", "*.jpg"),
    "rec": Format(rec, "REC"), "res": Format(res, "REC"), "reg": Format(reg, "REG"), "gc": Format(reg, "GC"),
    "recs": Format(partial(each_region, turns=rec), "REC"), "regs": Format(partial(each_region, turns=reg), "REG"),
    "vqa": Format(vqa, "VQA", "image_path"),
    "vqa-e": Format(vqa_e, "VQA_CoT", "file_path"), "vqa-x": Format(vqa_x, "VQA_CoT", "file_path"),
    "pope": Format(pope, "VQA", "image"),
    "llava": Format(llava, picture="image", name="COCO_train2014_*"),
    "pointqa-local": Format(point_qa, "VQA", "file_path"),
    "v7w": Format(visual7w, "VQA", "file_path"),
} | {
    f"gpt4gen-{v}": Format(partial(gpt4gen, version=v), REASONS[v]) for v in ("a", "c", "bc")
} | {
    f"vcr-{v}": Format(partial(vcr, version=v), "VQA_BCoT" if "ra" in v else "VQA", "img_fn") for v in VCR
} | {
    f"pointqa-twice-{v}": Format(partial(point_qa, key=f"{key}_question"), "VQA", "file_path")
    for v, key in (("oq", "obj"), ("sq", "super"), ("gq", "general"))
} | {
    f"gqa-{v}": Format(partial(gqa, version=v), REASONS[v], "imageId", "*.jpg") for v in REASONS
} | {
    f"clevr-{v}": Format(partial(clevr, version=v), REASONS[v], "image_filename", unpack=itemgetter("questions"))
    for v in "as"
}


class Rows:
    """A file in one of FORMATS as Samples, pictures in the folder `images`. Raises ValueError for another format."""
    epoch = 0

    def __init__(self, path, format, images, prompts=PROMPTS, seed=0):
        if format not in FORMATS:
            raise ValueError(f"{path}: no format {format!r}; there are: {', '.join(FORMATS)}")
        self.path, self.images, self.format, self.seed = Path(path), images, FORMATS[format], seed
        self.prompts = (TALKS | prompts).get(self.format.prompts, ())
        self.records = Lines(path) if self.path.suffix == ".jsonl" else read_records(path, self.format.unpack)

    def __len__(self):
        return len(self.records)

    def sizes(self):
        """Rough length of each record."""
        if isinstance(self.records, Lines):
            return np.diff(self.records.ends).tolist()          # without reading them
        return [len(str(record)) for record in self.records]

    def __getitem__(self, i):
        row, rng = self.records[i], np.random.default_rng([self.seed, i, self.epoch])       # whatever came before
        with naming(self.path, i, row):
            return to_sample(row, self.format, self.images, self.prompts, rng)


class Part:
    """A share of a data set: as many of its records, evenly spread; of more than one all, and the rest again."""
    epoch = 0

    def __init__(self, whole, share):
        self.whole, self.path = whole, whole.path
        often, n = divmod(max(round(share * len(whole)), 1), max(len(whole), 1))
        self.index = [*range(len(whole))] * often + np.linspace(0, len(whole) - 1, n).astype(int).tolist()

    def __len__(self):
        return len(self.index)

    def sizes(self):
        sizes = self.whole.sizes()
        return [sizes[i] for i in self.index]

    def __getitem__(self, i):
        self.whole.epoch = self.epoch
        return self.whole[self.index[i]]


def open_set(name, media="", draw=False, prompts=PROMPTS):
    """The data set FILE (LLaVA or caption records), nextgpt:FILE (see Dialogs) or FORMAT:FILE, a row of FORMATS that asks
    in words of `prompts`; media in the folder `media`, default beside the file. FILE@0.25: a quarter of its records,
    FILE@2: all of them twice."""
    if re.search(r"@[\d.]+$", name):
        name, _, share = name.rpartition("@")
        return Part(open_set(name, media, draw, prompts), float(share))
    format, _, path = name.rpartition(":")
    media = media or Path(path).parent
    if format == "nextgpt":
        return Dialogs(path, media, draw)
    return Rows(path, format, media, prompts) if format else Conversations(path, media)


def to_sample(row, format, images, prompts, rng):
    """A record -> Sample. Raises what the standard types raise, too, for a record that is no dict."""
    name = str(field(row, format.picture, (str, int)))
    picture = Medium("image", str(safe_join(images, format.name.replace("*", name))), stretch=format.stretch)
    turns = format.turns(row, Ask(prompts, picture, rng))
    if format.moves:
        move(picture, parts_of(turns, Box), row["width"], row["height"], rng)
    return Sample(turns, str(row.get("id", row.get("question_id", ""))), row)


# ---- Mixtures: lists of items in, a list of items out; an item is (set number, record number)

def shuffled(sources, seed=42, portion=1):
    """One list of all items in a random order, without a seed in their own; a portion above 1 repeats them."""
    whole = sum(sources, [])
    order = list(range(len(whole))) * math.ceil(portion)
    if seed is not None:
        np.random.default_rng(seed).shuffle(order)
    return [whole[i] for i in order[:int(len(whole) * portion)]]


def subset(source, portion, seed=None):
    """The first int(portion * n) items of a source, shuffled before if there is a seed."""
    return shuffled([source], seed, portion)


def interleave(sources, p=None, seed=None, all_exhausted=False):
    """Items of several sources, the next one's drawn with probabilities p, until the first (or each) is used up."""
    n_rounds, used_up = (max, all) if all_exhausted else (min, any)
    lengths = [len(source) for source in sources]
    if p is None:                                               # they take turns
        return [source[i % len(source)] for i in range(n_rounds(lengths)) for source in sources]
    order, at, out = draw(len(sources), p, seed), [0] * len(sources), []                    # at: drawn of each
    while not used_up(i >= n for i, n in zip(at, lengths)):
        s = next(order)
        out.append(sources[s][at[s] % lengths[s]])              # shorter ones start again
        at[s] += 1
    return out


def draw(n, p, seed):
    rng = np.random.default_rng(seed)
    while True:
        yield from rng.choice(n, 1000, p=p).tolist()            # parity: a thousand at a time


def nextchat_1(s, batch, seed, epoch):
    """The first stage, to be shuffled by the trainer."""
    whole = ("vqa", "caption", "rec", "reg", "flickr", "vcr", "v7w")
    return sum((s[name] for name in whole), subset(s["gc"], 1 / 20, 42) + subset(s["recvg"], 1 / 10, 43))


def nextchat_2(s, batch, seed, epoch):
    """The second stage. The original draws the two interleavings without a seed."""
    talk = shuffled([s["gpt4gen"], s["gpt4gen-rd"], subset(s["llava"], 1 / 3, 42)])
    tasks = [s["flickr"], s["rec"], shuffled([s["vqa"], s["vqa-e"], s["vqa-x"]], 43), shuffled([s["vcr"]], 44),
             shuffled([s["caption"], subset(s["gc"], 1 / 15, 42)], 47)]
    return interleave([talk, interleave(tasks, [0.2] * 5, seed)], [0.5, 0.5], seed)


def nextchat_3(s, batch, seed, epoch):
    return s["res"]


MIXTURES = {                            # (system, stage) -> {name: items}, batch, seed, epoch -> items
    ("nextchat", 1): nextchat_1, ("nextchat", 2): nextchat_2, ("nextchat", 3): nextchat_3,
}
SOURCES = {                             # name in a mixture of NExT-Chat -> format and published file
    "caption": "caption:CAP_coco2014_train.jsonl", "flickr": "flickr:CWB_flickr30k_train.jsonl",
    "rec": "rec:REC_ref3_train.jsonl", "reg": "reg:REC_ref3_train.jsonl", "res": "res:res3.jsonl",
    "recvg": "rec:GC_genome196_train.jsonl", "gc": "gc:GC_genome196_train.jsonl",
    "vqa": "vqa:v2_OpenEnded_mscoco_train2014_questions.jsonl", "vqa-e": "vqa-e:vqa_E_train.jsonl",
    "vqa-x": "vqa-x:vqa_X_train.jsonl", "llava": "llava:llava_instruct_150k.jsonl", "vcr": "vcr-q-ra:vcr_train.jsonl",
    "gpt4gen": "gpt4gen-bc:GPT4GEN_BoxCoT_train.jsonl", "gpt4gen-rd": "gpt4gen-bc:GPT4GEN_RD_BoxCoT_train.jsonl",
    "v7w": "v7w:v7w_pointing_train.jsonl",
}


class Sources(dict):
    """{name: items} of data sets in a folder, each opened when a mixture asks for it; `sets` has them in that order."""
    def __init__(self, folder, media, prompts):
        super().__init__()
        self.folder, self.media, self.prompts, self.sets = Path(folder), Path(media), prompts, []

    def __missing__(self, name):                                # dict asks this for a key that it lacks
        format, file = SOURCES[name].split(":")
        own = self.media / name                                 # a link, perhaps, to where its pictures lie
        self.sets.append(Rows(self.folder / file, format, own if own.is_dir() else self.media, self.prompts))
        self[name] = [(len(self.sets) - 1, i) for i in range(len(self.sets[-1]))]
        return self[name]


def open_mixture(key, folder, media, batch, seed=0, prompts=PROMPTS):
    """Data sets of a folder and the mixture of (system, stage) of them, what Prepared takes as `where`."""
    if key not in MIXTURES:
        raise ValueError(f"{folder}: no mixture is known for stage {key[1]} of {key[0]}; name files, with commas between")
    sources = Sources(folder, media or folder, prompts)
    where = partial(MIXTURES[key], sources, batch, seed)
    where(0)                            # opens the sets
    return sources.sets, where


def mock(image_size):
    """The sample NExT-Chat puts last in every batch of stages 1 and 2: its box parts then always have a gradient."""
    box = Box((), tensor=torch.tensor([0.08, 0.194, 0.381, 0.739]))
    picture = Medium("image", tensor=torch.zeros(3, image_size, image_size))
    return Sample([[picture, " Where is it?"], ["Answer: ", box, " ."]])


# ---- NExT-GPT
# A root folder holds images/, videos/, audios/ and embed/. What a medium's caption becomes in the text tower of the
# diffusion model that draws such media lies in embed/<its file name>.npy, where paint.py --embed puts it.

WRITERS = {"image": "img", "video": "vid", "audio": "aud"}     # kind of medium -> its writer
CAPTION_MARKS = re.compile(r'["()*#:;~]')
INLINE = re.compile(r"<(Image|Video|Audio)>(.*?)</\1>", re.S)


def process_caption(text):
    """A caption as NExT-GPT's pairs have it: lower case, some marks blanked, white space squeezed."""
    text = re.sub(r"\s{2,}", " ", CAPTION_MARKS.sub(" ", text.lower()))
    return text.rstrip("\n").strip(" ")


def shown(kind, name, root):
    return Medium(kind, str(safe_join(root / f"{kind}s", name)))


def drawn(kind, name, root, caption):
    """The Signal that asks for a medium like the one of a file name."""
    return Signal(WRITERS[kind], str(safe_join(root / "embed", PurePosixPath(name).name + ".npy")), caption=caption)


def pair_turns(row, root, draw):
    """A caption record -> turns that ask for the caption, or (draw) for the medium."""
    (kind, name), caption = captioned(row), process_caption(row["caption"])
    if draw:
        return [[caption], [caption, drawn(kind, name, root, row["caption"])]]          # parity: embedded as it came
    return [[shown(kind, name, root), "generate a caption"], [caption]]


def spoken(row):
    """The rows of a conversation."""
    turns = row["conversation"] if "conversation" in row else row["conversations"]
    users = [from_user(turn) for turn in turns]
    if users != [True, False] * max(len(turns) // 2, 1):
        raise DataError(f"user and assistant must alternate, and an answer end the conversation: {users}")
    return turns


def untagged(text, usual="text"):
    """A text without its tags, and the kind of the first: "image" of <image>; the usual one where there is none."""
    tag = TAGS.search(text)
    return (TAGS.sub("", text).strip(), tag[0][1:-1]) if tag else (text, usual)


def file_of(row, kind, i, *keys):
    """The file of that kind for turn i of a record, under one of some keys: each data set has its own."""
    name = next((row[key] for key in (*keys, "image_name") if key in row), None)            # PandaGPT: for any kind
    if kind not in WRITERS or name is None:
        raise DataError(f"turn {i + 1}: {kind!r:.40} is none of {', '.join(WRITERS)}, or the record names no file for it")
    return name


def question_of(row, i, turn, usual, root):
    """The medium that turn i shows, if any, and its text."""
    text, tag = untagged(turn["value"], usual)
    kind = turn.get("input_modality") or tag
    if kind == "text":
        return [text]
    return [shown(kind, file_of(row, kind, i, f"{kind}_name", f"input_{kind}", kind, "mm_name"), root), text]


def answer_of(row, i, turn, root):
    """The text of turn i and what it asks for: a medium, or boxes named as in ChatterBox's sets."""
    text, tag = untagged(turn["value"])
    kind = turn.get("output_modality") or tag
    if kind != "text":
        name = file_of(row, kind, i, "mm_name", f"output_{kind}", f"{kind}_name")
        return [text, drawn(kind, name, root, turn.get("caption", row.get(f"{kind}_captions")))]
    text, boxes = annotated(text, check_box) if "image_wh" in row else (text, [])
    return [text, *(Box(box) for _, box in boxes)]


def dialog_turns(row, root):
    """PandaGPT's and NExT-GPT's conversations -> turns. A turn's modality or its <image> tag tells its medium."""
    turns, out, pictured = spoken(row), [], row.get("image_name") or row.get("image") or ""
    usual = "image" if pictured.strip("0") else "text"          # what the first question shows; 00000000000: none
    for i in range(0, len(turns), 2):
        out += [question_of(row, i, turns[i], usual, root), answer_of(row, i + 1, turns[i + 1], root)]
        usual = "text"
    return out


def mosit_turns(row, root):
    """MosIT's dialogs: {image_list, video_list, audio_list, conversation}; texts hold <Image>its caption</Image>."""
    names = {(kind, item["caption"]): item[f"{kind}_name"] for kind in WRITERS for item in row[f"{kind}_list"]}
    out = []
    for i, turn in enumerate(spoken(row)):
        text, *found = INLINE.split(turn["value"])              # text, kind, caption, text, kind, caption, text
        content = [text]
        for kind, caption, text in zip(found[::3], found[1::3], found[2::3]):
            kind, name = kind.lower(), names[kind.lower(), caption]
            content += [drawn(kind, name, root, caption) if i % 2 else shown(kind, name, root), text]
        out.append(nonempty(content))
    return out


def turns_of(row, root, draw=False):
    """Turns of a record in any format of this section, told by its keys."""
    if "caption" in row:
        return pair_turns(row, root, draw)
    if "instruction" in row:                                    # Alpaca. parity: nothing stands between the two
        return [[row["instruction"] + row["input"]], [row["output"]]]
    return mosit_turns(row, root) if "image_list" in row else dialog_turns(row, root)


def read_embedding(path):
    """Caption embedding of an .npy file, float32 (tokens, width) or (width,). Raises MediaError."""
    try:
        x = np.load(check_file(path), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise MediaError(f"{path}: not an array of numbers ({error!s:.80})") from None
    if x.dtype.kind != "f" or x.ndim not in (1, 2) or not np.isfinite(x).all():
        raise MediaError(f"{path}: not a caption embedding but {x.dtype} {x.shape}, or its numbers are not finite")
    return torch.from_numpy(x.astype(np.float32))


class Dialogs:
    """A file of NExT-GPT's formats as Samples. Records whose media are absent are passed over, named once on stderr."""
    # root: see above; default: beside the file. draw: caption pairs teach to draw, not to caption. learn: read embeddings.

    def __init__(self, path, root=None, draw=False, learn=True):
        self.path, self.root, self.draw, self.learn = Path(path), Path(root or Path(path).parent), draw, learn
        rows = read_records(path)
        absent = [self.absent(row) for row in rows]
        self.records = [row for row, name in zip(rows, absent) if not name]
        if names := sorted({*absent} - {""}):
            some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            print(f"{path}: passing over {len(rows) - len(self)} of {len(rows)} records; absent: {some}", file=sys.stderr)

    def absent(self, row):
        """A file that the record needs and that is not there, or ""."""
        try:
            turns = turns_of(row, self.root, self.draw)
        except (DataError, KeyError, TypeError, AttributeError, IndexError):
            return ""                                           # it raises again when it is asked for
        needed = parts_of(turns, (Medium, Signal) if self.learn else Medium)
        return next((part.path for part in needed if not Path(part.path).is_file()), "")

    def __len__(self):
        return len(self.records)

    def sizes(self):
        return [len(str(record)) for record in self.records]

    def __getitem__(self, i):
        row = self.records[i]
        with naming(self.path, i, row):
            turns = turns_of(row, self.root, self.draw)
        for signal in parts_of(turns, Signal) if self.learn else ():
            signal.embeds = read_embedding(signal.path)
        return Sample(turns, str(row.get("id", "")), row)


def in_turns(sizes, batch, seed):
    """Batches of one epoch over several data sets in NExT-GPT's order, as sample numbers counted through all sets.

    A batch is of one set; they take turns until the largest was seen. Raises ValueError for a set that fills no batch.
    """
    if min(sizes) < batch:
        raise ValueError(f"data sets of {sizes} samples: each must fill a batch of {batch}")
    rng = torch.Generator().manual_seed(seed)

    def batches(start, n):
        while True:                                             # a set that is used up starts again in another order
            own = torch.Generator().manual_seed(torch.empty((), dtype=torch.int64).random_(generator=rng).item())
            order = start + torch.randperm(n, generator=own)                                # as RandomSampler
            yield from order[:n - n % batch].view(-1, batch).tolist()
    starts = np.cumsum([0, *sizes]).tolist()
    sets = [batches(start, n) for start, n in zip(starts, sizes)]
    return [next(one) for _ in range(-(-max(sizes) // batch)) for one in sets]              # until the largest is seen


# ---- ChatterBox
# A Box of kind "region" is what a question is about, one of kind "find" at the end of a question is what it asks for.

class Round(NamedTuple):
    question: str
    given: list                         # [(name, xyxy)] of the question's annotation
    answer: str
    shown: list                         # and of the answer's


ANNOTATION = re.compile(r"<(?!it>|region>)(.+?)>")
IGNORED = re.compile(r";|x1|\?|\[\]|\[0,0,0,0\]")
PLACE = re.compile(r"[<\[](it|region)[>\]]")


def corners_of(box, width=math.inf, height=math.inf):
    """x, y, width, height of a box from a file -> xyxy."""
    if is_box(box):
        box = [*box[:2], box[0] + box[2], box[1] + box[3]]
    return check_box(box, width, height)


def annotated(text, read):
    """"A cup. <cup:[1, 2, 3, 4], red jar:[5, 6, 7, 8]>" -> "A cup. ", [("cup", box), ("red jar", box)]."""
    before, annotation, *_ = [*ANNOTATION.split(text, maxsplit=1), ""]                      # "" where there is none
    if IGNORED.search(annotation):
        return before, []
    boxes = []
    for part in annotation.split("]")[:-1]:                     # cup:[1, 2, 3, 4
        name, _, numbers = part.partition("[")
        try:
            boxes.append((name.strip(" ,:"), read([float(x) for x in numbers.split(",")])))
        except ValueError as error:
            raise DataError(f"annotation {'<' + annotation + '>'!r:.80}: {error}") from None
    return before, boxes


def said(row):
    """The texts of a record's conversation: questions and answers in turn."""
    turns = field(row, "conversation", list)
    speakers = [turn["from"] for turn in turns]
    if speakers[:1] == ["gpt"]:                                 # parity: a leading answer is left out
        turns, speakers = turns[1:], speakers[1:]
    if speakers != (["human", "gpt"] * len(turns))[:len(turns)]:
        raise DataError("turns of human and gpt must alternate")
    if len(turns) < 2:
        raise DataError("no question with an answer")
    return [field(turn, "value") for turn in turns]


def rounds(row, read=check_box, cut=True):
    """The rounds of a record's conversation. read: numbers of an annotation -> xyxy."""
    texts, out = said(row), []
    for question, answer in zip(texts[::2], texts[1::2]):
        if cut and "<" not in question:
            question = question[:-1]                            # parity: without annotation the last character is lost
        out.append(Round(*annotated(question, read), *annotated(answer, read)))
    return out


def talk(rows, prefix, picture):
    """Turns of rounds (question, answer), each a list of parts, with the prefix and the picture in it in front."""
    before, after = prefix.split("<image>")
    question, *turns = chain(*rows)
    return [nonempty(turn) for turn in ([before, picture, after, *question], *turns)]


FRONT = "<image>\n "


def plain(r):
    return [PLACE.sub(r"\1", r.question)], [r.answer]


def asking(r):
    """A round that asks for the first box of its answer."""
    return [*plain(r)[0], Box(r.shown[0][1], kind="find")], [r.answer]


def late_start(rng, n, last):
    """Where a talk of n rounds begins: anywhere, oftener early, but not after the round `last`."""
    places = [rng.integers(2 * n), *(2 * n // part for part in (2, 4, 6, 8))]               # counted in turns
    return min(int(rng.choice(places)) // 2, last) if n > 1 else 0


def up_to(whole, fits, late, rng, lack):
    """A talk from its first round, or a late one, to one that fits -> plain rounds before that, that one. Or Unfit."""
    fit = np.flatnonzero(fits).tolist()
    if not fit:
        raise Unfit(lack)
    start = late_start(rng, len(whole), fit[-1]) if late else 0
    end = fits.index(True, start)
    return [plain(r) for r in whole[start:end]], whole[end]


def cb_gnd(row, ask, read=check_box):
    """A question, find the box of its answer."""
    first = rounds(row, read, cut=False)[0]
    if not first.shown:
        raise Unfit("the first answer has no box")
    return talk([asking(first)], FRONT, ask.picture)


def cb_chain(row, ask, late=False):
    """A talk up to the first question whose answer has just one box: find it. (The original's loader finds none.)"""
    whole = rounds(row)
    before, last = up_to(whole, [len(r.shown) == 1 for r in whole], late, ask.rng, "no answer has just one box")
    return talk([*before, asking(last)], FRONT, ask.picture)


def cb_vqa(row, ask):
    return talk(map(plain, rounds(row)), FRONT, ask.picture)


def cb_mrg(row, ask):
    """A talk up to a question that names one box, if the lot falls on it: "the region" stands there for the name."""
    whole, rows = rounds(row), []
    for r in whole[late_start(ask.rng, len(whole), len(whole) - 1):]:
        name = whole_word(r.given[0][0]) if len(r.given) == 1 else None
        if name and name.search(r.question) and ask.rng.random() < 0.3:
            instead = str(ask.rng.choice(["the region", "this region"]))
            before, after = name.split(r.question, 1)
            region = Box(r.given[0][1], kind="region")
            rows.append(([before + instead + " ", region, " " + after], [name.sub(instead, r.answer)]))
            break
        rows.append(plain(r))
    return talk(rows, FRONT, ask.picture)


def whole_word(name):
    return re.compile(rf"(?<!\w)(?:the )?{re.escape(name)}(?!\w)")


def says_places(r):
    """Whether a question says <it> or <region> once for each of its boxes."""
    return 0 < len(r.given) == len(PLACE.findall(r.question))


def placed(r, kind):
    """Parts of such a question, the boxes behind these words."""
    chunks, parts = PLACE.split(r.question), []                 # text, it, text, region, text
    for text, word, (_, box) in zip(chunks[::2], chunks[1::2], r.given):
        parts += [f"{text}{word} ", Box(box, kind=kind), " "]
    return [*parts, chunks[-1]]


def cb_ref(row, ask, read=check_box, late=True):
    """A talk up to the first question that says where its boxes are."""
    whole, lack = rounds(row, read), "no question says <it> or <region> once for each of its boxes"
    before, last = up_to(whole, [*map(says_places, whole)], late, ask.rng, lack)
    return talk([*before, (placed(last, "region"), [last.answer])], FRONT, ask.picture)


def named(text, given):
    """A text with the box of each name behind its first mention that is left, or else at the end."""
    parts = [text]
    for name, box in given:
        found = whole_word(name).search(parts[-1])
        end = found.end() if found else len(parts[-1])
        parts[-1:] = [parts[-1][:end], Box(box), parts[-1][end:]]
    return parts


def cb_rounds(row, ask, read=check_box):
    """A whole talk for models that say boxes: those of questions in their places or behind the names, those of answers
    at their end."""
    whole = rounds(row, read, cut=False)
    asked = (placed(r, "box") if says_places(r) else named(PLACE.sub(r"\1", r.question), r.given) for r in whole)
    shown = ([r.answer, *(Box(box) for _, box in r.shown)] for r in whole)
    return talk(zip(asked, shown), FRONT, ask.picture)


def cb_where(row, ask):
    """A question of ChatterBox's evaluation, {filename, question, gt_box: x, y, width, height}."""
    return [[ask.picture, " ", field(row, "question")], [Box(corners_of(row["gt_box"]))]]


def cb_what(row, ask):
    """And one of {file_name, question: "What is it <bbox>?[[x1, y1, x2, y2]]", answer: texts}."""
    question, mark, boxes = field(row, "question").partition("?")
    before, after = question.split("<bbox>")
    (box,) = json.loads(boxes)
    short = "Please give a brief answer in one sentence less than 10 words."
    return [[ask.picture, " " + before, Box(check_box(box)), after + mark + short], texts(row, "answer")]


class Talk(NamedTuple):
    """How to speak about the regions of a picture."""
    prefix: str                         # with <image>
    questions: tuple                    # one is drawn for each region, <objs> its place
    heads: tuple                        # before what an answer says
    tails: tuple                        # and after it
    name: str = "region{i} "            # of a region in a question
    limit: int = 15                     # regions
    first: tuple = ()                   # questions about all of them, which the caption answers


QUESTIONS = ("What is at <objs>?", "Can you say what <objs> shows?", "Please tell me about <objs>.",
             "How would you describe <objs>?")
HEADS, TAILS = ("It is a ", "There is a "), (".", " there.")
ONE = Talk("<image>\n Describe the region so that nobody can take another thing for it.", ("<objs>",), HEADS, TAILS,
           name=" ")
TALKS = {                               # ours; load_prompts reads the originals'
    "talk-coco": Talk("<image>\nName the kind of thing in each region.\n", ("<objs>",), HEADS, TAILS, "", 60),
    "talk-refcoco": ONE,
    "talk-refcoco+": ONE._replace(prefix=ONE.prefix + " Do not say where it is."),
    "talk-refcocog": Talk("Here is a picture: <image>\n", QUESTIONS, HEADS, TAILS),
    "talk-vg": Talk("Here is a picture: <image>\n", QUESTIONS, HEADS, TAILS),
    "talk-flickr30k": Talk("Here is a picture: <image>\n", ("Which words speak of <objs>?", "What did you say of <objs>?"),
                           ("It is the ", "There is the "), TAILS, limit=150,
                           first=("What do <objs> show?", "Describe <objs>.")),
}


def talks_of(tables):
    """TALKS of the originals' own words, from ChatterBox's {placeholder, set: {prefix, ...}}."""
    return {name: talk_of(tables, name.removeprefix("talk-")) for name in TALKS}


def talk_of(tables, task):
    """The Talk of a set, which may say "as refcoco"."""
    try:
        row = tables["refcoco"] | {key: value for key, value in tables[task].items() if value != "as refcoco"}
        asks = row.get("first_questions", ()), row.get("follow_questions", row["questions"])
        first, questions = (tuple(q.replace(tables["placeholder"], "<objs>") for q in some) for some in asks)
        prefix = re.sub("{.*?}", ", ".join(row.get("classes", ())), row["prefix"])
        name = "region{i} " if first else row["replace_with"].replace("<bbox>", "")
        one = Talk(prefix, questions, tuple(row["heads"]), tuple(row["tails"]), name, row["max_boxes"], first)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{task}: {type(error).__name__} {error}") from None
    if {prefix.count("<image>"), *(question.count("<objs>") for question in questions + first)} != {1}:
        raise DataError(f"{task}: one <image> in the prefix and one placeholder in each question are expected")
    return one


def by_picture(whole):
    """COCO's {images, annotations, categories} -> images as records, each with its `boxes`: annotations, no crowds."""
    names, boxes = {kind["id"]: kind["name"] for kind in whole["categories"]}, {}
    for one in whole["annotations"]:
        if not one.get("iscrowd"):
            kept = one | {"name": names.get(one["category_id"])}
            kept.pop("segmentation", None)                      # most of the file
            boxes.setdefault(one["image_id"], []).append(kept)
    return [picture | {"boxes": boxes.get(picture["id"], [])} for picture in whole["images"]]


def regions(row, ask, label):
    """[(label, Box)] in a random order, without those that are hardly to be seen."""
    width, height, found = field(row, "width", int), field(row, "height", int), []
    for one in field(row, "boxes", list):
        x1, y1, x2, y2 = box = corners_of(one["bbox"], width, height)                       # of x, y, width, height
        if min(x2 - x1, y2 - y1) >= 1 and 224 * min((x2 - x1) / width, (y2 - y1) / height) >= 2:
            found.append((label(row, one), Box(box, kind="region")))
    if not found:
        raise Unfit("no box that is two pixels large when the picture is 224")
    return [found[i] for i in ask.rng.permutation(len(found))[:ask.prompts.limit]]


def move(picture, boxes, width, height, rng):
    """Half of the time each, shift a picture by up to 32 pixels of 224 and mirror it, and its boxes with it."""
    shift = rng.integers(-32, 33, 2).tolist() if rng.random() < 0.5 else (0, 0)
    size, by = np.array([width, height] * 2), np.array(shift * 2) / 224                     # (4,) pixels, (4,) shares
    xyxy = np.array([box.xyxy_px for box in boxes])                                         # (R, 4)
    new = (xyxy + by * size).clip(0, size)
    if (224 * (new[:, 2:] - new[:, :2]) >= 2 * size[:2]).all():                             # none is out of sight
        picture.shift, xyxy = tuple(shift), new
    picture.flip = bool(rng.random() < 0.5)
    if picture.flip:
        xyxy[:, ::2] = width - xyxy[:, 2::-2]
    for box, place in zip(boxes, xyxy.tolist()):
        box.xyxy_px = tuple(place)


def answer_about(what, ask):
    return [str(ask.rng.choice(ask.prompts.heads)) + what + str(ask.rng.choice(ask.prompts.tails))]


def question_about(questions, parts, rng):
    """One of some questions, the parts in its place for regions."""
    before, after = str(rng.choice(questions)).split("<objs>")
    return [before, *parts, after]


def by_region(row, ask, label):
    rows = []
    for i, (what, box) in enumerate(regions(row, ask, label), 1):
        question = question_about(ask.prompts.questions, [ask.prompts.name.replace("{i}", str(i)), box], ask.rng)
        rows.append((question, answer_about(what, ask)))
    return talk(rows, ask.prompts.prefix, ask.picture)


def ref_caption(row, one):
    if len(field(row, "caption").split()) < 3:
        raise Unfit("a caption of less than three words")
    return row["caption"]


def own_caption(row, one):
    return field(one, "caption").removeprefix("a ")


def category(row, one):
    return field(one, "name")


def low(text):
    return text.lower().removesuffix(".")


def span(row, one):
    """Flickr30k: the first stretch of the caption that speaks of a box."""
    (start, end), caption = one["tokens_positive"][0], field(row, "caption")
    if not 0 <= start < end <= len(caption):
        raise DataError(f"tokens_positive {one['tokens_positive']!r:.40}: outside the caption")
    return low(caption[start:end])


def flickr_regions(row, ask):
    """The caption for all regions together, then which words of it speak of each."""
    found, rng = regions(row, ask, span), ask.rng
    together = [part for i, (_, box) in enumerate(found, 1)
                for part in (ask.prompts.name.replace("{i}", str(i)), box, ",")]
    rows = [(question_about(ask.prompts.first, together, rng), answer_about(low(field(row, "caption")), ask))]
    for i, (what, _) in enumerate(found, 1):
        rows.append((question_about(ask.prompts.questions, [f"region {i}"], rng), answer_about(what, ask)))
    return talk(rows, ask.prompts.prefix, ask.picture)


CHATTERBOX = {
    name: Format(turns, picture="image", unpack=itemgetter("data")) for name, turns in {
        "cb-refcoco-gnd": partial(cb_gnd, read=corners_of), "cb-coco-gnd": cb_gnd, "cb-gnd": partial(cb_chain, late=True),
        "cb-lc-gnd": cb_chain, "cb-lc": cb_vqa, "cb-mrg": cb_vqa, "cb-mrg-ref": cb_mrg, "cb-ref": cb_ref,
        "cb-refcoco-ref": partial(cb_ref, read=corners_of, late=False)}.items()
} | {
    f"{name}-regions": Format(turns, f"talk-{name}", "file_name", unpack=by_picture, stretch=True, moves=name == "coco")
    for name, turns in {
        "coco": partial(by_region, label=category), "refcoco": partial(by_region, label=ref_caption),
        "refcoco+": partial(by_region, label=ref_caption), "refcocog": partial(by_region, label=ref_caption),
        "vg": partial(by_region, label=own_caption), "flickr30k": flickr_regions}.items()
} | {"llava-instruct": Format(llava, picture="image")}
FORMATS |= CHATTERBOX | {"rounds": Format(cb_rounds, picture="image", unpack=itemgetter("data"))}
FORMATS["refcoco-rounds"] = FORMATS["rounds"]._replace(turns=partial(cb_rounds, read=corners_of))
FORMATS |= {"ground": Format(cb_where, picture="filename"), "refer": Format(cb_what, picture="file_name")}

GROUNDING = {"cb-refcoco-gnd": 5, "cb-coco-gnd": 8, "cb-gnd": 1, "cb-lc-gnd": 1}            # how often each is drawn
REFERRING = {"cb-mrg-ref": 3, "cb-ref": 2, "cb-refcoco-ref": 3, "coco-regions": 1, "refcoco-regions": 1,
             "refcoco+-regions": 1, "refcocog-regions": 1, "vg-regions": 1, "flickr30k-regions": 1}
TALKING = {"cb-lc": 2, "cb-mrg": 1, "llava-instruct": 7}
STEPS = 3000                            # of an epoch


def draws(s, rates, n, rng):
    """n items: sources drawn by their rates, an item of each evenly."""
    sources, p = [s[name] for name in rates], np.array([*rates.values()]) / sum(rates.values())
    which = rng.choice(len(rates), n, p=p)
    items = rng.integers(np.array([len(source) for source in sources])[which])
    return [sources[k][i] for k, i in zip(which.tolist(), items.tolist())]


def chatterbox_1(s, batch, seed, epoch):
    return draws(s, GROUNDING, STEPS * batch, np.random.default_rng([seed, epoch]))


def chatterbox_2(s, batch, seed, epoch):
    """An epoch of the second stage, in batches of one kind, in order: one that asks for boxes teaches no text."""
    rng, items = np.random.default_rng([seed, epoch]), []
    for step in range(1, STEPS + 1):
        for rates, every in ((GROUNDING, 1), (REFERRING, 10), (TALKING, 5)):                # every so many steps
            if step % every == 0:
                items += draws(s, rates, batch, rng)
    return items


SOURCES |= {name: f"{name}:{file}" for name, file in {
    "cb-refcoco-gnd": "CB-refcoco-GND.json", "cb-coco-gnd": "CB-coco-GND.json", "cb-gnd": "CB_GND.json",
    "cb-lc-gnd": "CB_LC.json", "cb-lc": "CB_LC.json", "cb-mrg": "CB_MRG.json", "cb-mrg-ref": "CB_MRG.json",
    "cb-ref": "CB_REF.json", "cb-refcoco-ref": "CB-refcoco-REF.json", "coco-regions": "instances_train2017.json",
    "refcoco-regions": "finetune_refcoco_train.json", "refcoco+-regions": "finetune_refcoco+_train.json",
    "refcocog-regions": "finetune_refcocog_train.json", "vg-regions": "vg_train.json",
    "flickr30k-regions": "final_flickr_separateGT_train.json", "llava-instruct": "llava_instruct_150k.json"}.items()}
MIXTURES |= {("chatterbox", 1): chatterbox_1, ("chatterbox", 2): chatterbox_2}
