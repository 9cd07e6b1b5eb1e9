"""Ask a model the questions of a file and count the right answers.

    python evaluate.py weights/tiny unseen/questions.json
    python evaluate.py weights/nextchat-7b-336 --task rec REC_refcoco_unc_val.jsonl --images train2014 --out runs/rec
    python evaluate.py weights/tiny --task rounds unseen/CB_LC.json --out runs/rounds
    python evaluate.py weights/chatterbox --task ground grouding_qa.json --images val2017 --out runs/ground
    python evaluate.py weights/chatbind-7b --task vqa questions.jsonl --images val2014 --out runs/vqa
    python evaluate.py review -q questions.jsonl -a other.jsonl runs/vqa/answers.jsonl -r rules.json --judge ./judge -o out.jsonl

The tasks are rec, res, pope, caption, rounds, talks, vqa and sqa, and ChatterBox's ground and refer. A task goes on
where it stopped, and shares the work under torchrun --standalone --nproc_per_node=N; ranks never talk, each writes a file.
In order: metrics (exact match, ScienceQA, reviews by a judge), boxes and masks (REC, RES), answers (POPE, PointQA,
GQA), captions (CIDEr-D, Vedantam et al., arXiv 1411.5726), tasks (what a row of predictions holds, and its figures),
predictions (files that grow row by row and survive a kill), the run, answer files with ScienceQA and a judge.
A question is right if the answer is the expected one but for case and blanks. An answer to ScienceQA that commits to no
choice is asked to go on, after "ANSWER:".
"""
import argparse
import hashlib
import json
import math
import os
import random
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch
from tqdm import tqdm

import data
import datasets
import model as M


# ---- Metrics

def normal(text):
    return " ".join(text.lower().split())


def accuracy(rows):                     # rows {kind, text, answer} -> {kind: (right, asked)} by name, `all` last
    right = Counter(row["kind"] for row in rows if normal(row["text"]) == normal(row["answer"]))
    asked = Counter(row["kind"] for row in rows)
    return {kind: (right[kind], asked[kind]) for kind in sorted(asked)} | {"all": (right.total(), asked.total())}


def choices(text):                      # ScienceQA: the letters an answer commits to; it counts if there is exactly one
    return re.findall(r"The answer is ([A-Z]).", text)


def review_scores(review):              # the two numbers of its first line, [-1, -1] if it has not exactly two
    try:
        first, second = (float(x) for x in review.split("\n")[0].replace(",", " ").split(" "))
        return [first, second]
    except ValueError:                  # parity: "8, 9" too, which splits into three
        return [-1, -1]


def summarise_reviews(reviews):         # -> {category: mean scores, second over first in percent}, `all` too
    groups = {"all": [review["tuple"] for review in reviews]}
    for review in reviews:
        groups.setdefault(review["category"], []).append(review["tuple"])
    means = {name: [round(sum(column) / len(rows), 3) for column in zip(*rows)] for name, rows in groups.items()}
    return {name: {"mean": mean, "ratio": round(100 * mean[1] / mean[0], 1) if mean[0] else None} for name, mean in means.items()}


# ---- Boxes and masks

def box_iou(a, b):
    """Boxes (n, 4) and (n, 4) xyxy -> (n,). parity: invalid boxes are taken as they are."""
    side = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0)         # (n, 2)
    inter = side.prod(1)
    return inter / ((a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - inter)


def ious(boxes, targets):               # of pairs, 0 where there is no box (None)
    found = [i for i, box in enumerate(boxes) if box is not None]
    iou = torch.zeros(len(boxes), dtype=torch.float64)
    if found:
        a, b = (torch.tensor([rows[i] for i in found], dtype=torch.float64) for rows in (boxes, targets))       # (m, 4)
        iou[found] = box_iou(a, b)
    return iou


def rec(boxes, targets):                # -> accuracy (IoU above 0.5), mean IoU; no box (None) is a failure
    iou = ious(boxes, targets)
    return {"accuracy": (iou > 0.5).double().mean().item(), "iou": iou.mean().item(), "failed": boxes.count(None)}


def ground(boxes, targets):             # as ChatterBox counts: an IoU of 0.5 is a success
    iou = ious(boxes, targets)
    hits = iou[iou >= 0.5]
    return {"iou": iou.mean().item(), "success": len(hits) / len(iou), "failed": boxes.count(None),
            "iou_of_successes": hits.mean().item() if len(hits) else None}


def overlap(mask, target):              # pixels of both, of either; a true one counts as often as polygons cover it
    mask, target = np.asarray(mask, np.int64), np.asarray(target, np.int64)
    inter = int((mask * target).sum())
    return inter, int(mask.sum() + target.sum()) - inter


def res(intersections, unions):
    """Pixel counts a sample -> ciou (of the sums), miou (mean), giou (LISA's mean: 1 where both are empty), failed."""
    i, u = np.array(intersections, float), np.array(unions, float)                          # (n,)
    return {"ciou": float(i.sum() / max(u.sum(), 1)), "miou": float((i / u.clip(1)).mean()),
            "giou": float(np.where(u == 0, 1, i / (u + 1e-5)).mean()), "failed": int((i == 0).sum())}


# ---- Answers

ROLE = "ASSISTANT: "
GQA, POINT_QA = re.compile(r"(?:[Tt]he answer is|Answer:) (.+)"), re.compile(r"The answer is (.+?)\.")
UNSPACE = {" " + end: end for end in ".?!,"} | {" ' ": "'"} | {f" {end}": end for end in ("n't", "'m", "'s", "'ve", "'re")}


def unspace(text):                      # take away the blanks that decoding leaves before points and shortened words
    for old, new in UNSPACE.items():
        text = text.replace(old, new)
    return text


def said(text):                         # only the last answer of a whole conversation, lower-cased if there was more
    return text.rsplit(ROLE, 1)[1].lower() if ROLE in text else text


def extract(text, pattern=GQA):         # what the answer is, None unless the pattern fits exactly once
    found = pattern.findall(text)
    return found[0].rstrip(". ") if len(found) == 1 else None


def yes_or_no(text):                    # POPE as NExT-Chat reads it: what "the answer is", else yes if said at all
    text = said(text)
    return extract(text) or ("yes" if "yes" in text else "no")


def yes_or_no_llava(text):              # POPE as LLaVA reads it: no if the first sentence holds a no or not
    return "no" if {"no", "not", "No"} & set(text.split(".")[0].replace(",", "").split(" ")) else "yes"


def pope(predictions, labels):
    """Extracted answers -> accuracy, precision, recall, f1 (None if undefined), yes_ratio. Anything but no is a yes."""
    said_yes, is_yes = (np.array([text.lower() != "no" for text in texts]) for texts in (predictions, labels))
    both = (said_yes & is_yes).sum()
    precision, recall = (float(both / rows.sum()) if rows.any() else None for rows in (said_yes, is_yes))
    return {"accuracy": float((said_yes == is_yes).mean()), "precision": precision, "recall": recall,
            "f1": 2 * precision * recall / (precision + recall) if both else None, "yes_ratio": float(said_yes.mean())}


# ---- Captions

def caption_text(text):                 # the caption in a model's output
    return said(text).lower().split("</s>")[0]


def cleaned(text):                      # parity: what ChatterBox's cleaned figures leave; of "A man and his dog" dog
    text = re.sub(" ?It is |it is |There is |at region0 |istant: ", "", text)
    end = re.search(r"\.|, |is ", text)
    return text if not end else text[end.end():] if end[0] == "is " else text[:end.start()]


WORD = re.compile(r"""
    \w+?(?=n't\b) | n't\b | '(?:s|m|d|re|ve|ll)\b | can(?=not\b) | (?:gon|wan)(?=na\b) | got(?=ta\b)
    | (?:[a-z]\.)+[a-z]\. | (?:mr|mrs|ms|dr|st|jr|vs|etc)\.      # a.m., dr.
    | \d+(?:[.,:/]\d+)*(?:-?\w)*                                 # 1,000 and 3-year-old
    | o'\w+ | \w+(?:[-./@]\w+)*                                  # t-shirt, and/or
    | [^\w\s]""", re.X)
BRACKETS = dict(zip("()[]{}", ("-lrb-", "-rrb-", "-lsb-", "-rsb-", "-lcb-", "-rcb-")))


def tokenise(text):                     # COCO's Penn Treebank words but for rare symbols; no points and quotes
    return [BRACKETS.get(word, word) for word in WORD.findall(text.lower()) if word not in ".?!,:;-'`\"…–—“”‘’"]


def ngrams(words):                      # counts of the 1- to 4-grams of a list of words
    return Counter(tuple(words[i:i + n]) for n in range(1, 5) for i in range(len(words) - n + 1))


def cider(candidates, references):
    """CIDEr-D of tokenised captions, one candidate and a list of references an image -> a score of 0 to 10 an image."""
    counts = [[ngrams(words) for words in texts] for texts in references]
    seen = Counter(gram for texts in counts for gram in set().union(*texts))                # images that have it
    images = math.log(len(references))

    def vector(grams):                  # tf-idf weights of n-grams, their norms by n, the number of bigrams
        weights = {gram: n * (images - math.log(max(seen[gram], 1))) for gram, n in grams.items()}
        norms = [math.sqrt(sum(w * w for gram, w in weights.items() if len(gram) == n)) for n in range(1, 5)]
        return weights, norms, sum(n for gram, n in grams.items() if len(gram) == 2)

    def similarity(a, b):
        (wa, na, la), (wb, nb, lb) = a, b
        dots = [0.0] * 4
        for gram, w in wa.items():                              # clipped: saying a word again does not help
            dots[len(gram) - 1] += min(w, wb.get(gram, 0.0)) * wb.get(gram, 0.0)
        cosines = [dot / (x * y) if x * y else dot for dot, x, y in zip(dots, na, nb)]
        return sum(cosines) / 4 * math.exp(-(la - lb) ** 2 / 72)                            # of lengths, sigma 6
    pairs = [(vector(ngrams(words)), [vector(grams) for grams in texts]) for words, texts in zip(candidates, counts)]
    return [10 * sum(similarity(one, other) for other in others) / len(others) for one, others in pairs]


def meteor(candidates, references):     # by pycocoevalcap and Java, None where they are not installed
    try:
        from pycocoevalcap.meteor.meteor import Meteor          # optional
        return Meteor().compute_score(dict(enumerate(references)), {i: [text] for i, text in enumerate(candidates)})[0]
    except (ImportError, OSError):
        return None


# ---- Tasks: what the model said about a sample -> a row of the predictions file; rows -> figures

def boxes_in(turn):
    return [part for part in turn if isinstance(part, data.Box)]


def media_in(turn):
    return [part.path for part in turn if isinstance(part, data.Medium)]


def text_in(turn, between=""):
    return between.join(part for part in turn if isinstance(part, str))


def rec_row(sample, out):               # out["boxes"]: (n, 4) of the frame, of which the first counts, and in pixels
    box, pixels = (out[name][0].tolist() if len(out[name]) else None for name in ("boxes", "pixels"))
    return {"box": box, "target": boxes_in(sample.turns[-1])[0].tensor.tolist(), "pixels": pixels}


def res_row(sample, out):               # out["masks"]: bool (n, H, W). parity: more than one counts as none
    target = boxes_in(sample.turns[-1])[0].mask
    mask = np.asarray(out["masks"][0]) if len(out["masks"]) == 1 else np.zeros_like(target)
    return dict(zip(("intersection", "union"), overlap(mask, target)), rle=datasets.mask_rle(mask))


def text_row(sample, out):              # out["text"]: the answer
    return {"text": unspace(out["text"]), "target": text_in(sample.turns[-1])}


def refer_row(sample, out):             # several references
    return {"text": out["text"], "target": [part for part in sample.turns[-1] if isinstance(part, str)]}


def grounding(reply, answer):           # least IoU of boxes in order, 0 if their numbers differ; None: no true box
    found, true = ([box.tensor for box in boxes_in(turn)] for turn in (reply, answer))
    if not true:
        return None
    return box_iou(torch.stack(found), torch.stack(true)).min().item() if len(found) == len(true) else 0.0


def wished(reply, answer):              # whether both ask painters for the same; None if neither asks for anything
    ours, true = ([part.writer for part in turn if isinstance(part, data.Signal)] for turn in (reply, answer))
    return ours == true if ours or true else None


def rounds_row(sample, out):            # out["replies"]: to each question a list of texts, Boxes and Signals
    answers, replies = sample.turns[1::2], out["replies"]
    return {"text": [text_in(reply, " ") for reply in replies], "target": [text_in(answer, " ") for answer in answers],
            "iou": [*map(grounding, replies, answers)], "drawn": [*map(wished, replies, answers)]}


def mean(values):                       # of numbers or truths; None stands for a round that has none
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def pope_figures(rows):
    return {name: pope([rule(row["text"]) for row in rows], [yes_or_no(row["target"]) for row in rows])
            for name, rule in (("nextchat", yes_or_no), ("llava", yes_or_no_llava))}


def caption_figures(rows):              # one reference a sample, or a list of them; CIDEr-D is times 100
    made, true = [caption_text(row["text"]) for row in rows], [row["target"] for row in rows]
    true = [[caption_text(text) for text in ([texts] if isinstance(texts, str) else texts)] for texts in true]
    right = mean([normal(a) in map(normal, texts) for a, texts in zip(made, true)])
    ours, theirs = [tokenise(text) for text in made], [[tokenise(text) for text in texts] for texts in true]
    scores = cider(ours, theirs)
    return {"right": right, "cider": 100 * sum(scores) / len(scores),
            "meteor": meteor(map(" ".join, ours), [[" ".join(words) for words in texts] for texts in theirs])}


def refer_figures(rows):
    rest = [row | {"text": cleaned(row["text"])} for row in rows]
    return {"raw": caption_figures(rows), "cleaned": caption_figures(rest)}


def rounds_figures(rows):
    """Shares of right texts and of boxes found (IoU of 0.5 or more), over all rounds and over the first, second ...;
    mean IoU; shares of dialogues without a fault and of answers that ask for the right media."""
    iou, drawn = ([row[key] for row in rows] for key in ("iou", "drawn"))                   # of lists a dialogue
    text = [[normal(a) == normal(b) for a, b in zip(row["text"], row["target"])] for row in rows]
    box = [[None if x is None else x >= 0.5 for x in dialogue] for dialogue in iou]
    whole = [False not in chain(*dialogue) for dialogue in zip(text, box, drawn)]
    return {"text": mean(chain(*text)), "text_by_round": [*map(mean, zip_longest(*text))],
            "box": mean(chain(*box)), "box_by_round": [*map(mean, zip_longest(*box))],
            "iou": mean(chain(*iou)), "dialogues": mean(whole), "drawn": mean(chain(*drawn))}


def box_figures(rows, count):
    return count([row["box"] for row in rows], [row["target"] for row in rows])


TASKS = {                               # task -> (sample, what the model said) -> row; rows -> figures
    "rec": (rec_row, partial(box_figures, count=rec)), "ground": (rec_row, partial(box_figures, count=ground)),
    "refer": (refer_row, refer_figures),
    "res": (res_row, lambda rows: res([row["intersection"] for row in rows], [row["union"] for row in rows])),
    "pope": (text_row, pope_figures), "caption": (text_row, caption_figures),
    "rounds": (rounds_row, rounds_figures), "talks": (rounds_row, rounds_figures)}


# ---- Predictions

def whole_lines(path):                  # and the bytes they fill: a kill may have cut the last one
    raw = path.read_bytes()
    size = raw.rfind(b"\n") + 1
    return raw[:size].splitlines(), size


def read_rows(path, run):               # and the bytes they fill; ValueError if they are of another run
    lines, size = whole_lines(path)
    if lines and lines[0] != json.dumps(run).encode():
        raise ValueError(f"{path}: predictions of another run, {lines[0].decode():.200}; move them away")
    return [json.loads(line) for line in lines[1:]], size


def append(file, row):                  # on the disk when this returns
    file.write(json.dumps(row).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def predict_all(samples, predict, task, folder, run, rank=0, world=1):
    """Rows of `predict(sample)` for every world-th sample from rank on, into folder/predictions-<rank>.jsonl. What an
    earlier start of the same `run` (a dict that tells it from others) finished, with any world, is not done again."""
    path, row_of = Path(folder, f"predictions-{rank}.jsonl"), TASKS[task][0]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    done, (_, size) = {row["index"] for row in read_predictions(folder, run)}, read_rows(path, run)
    with open(path, "ab") as file:
        file.truncate(size)
        if not size:
            append(file, run)
        for i in tqdm(range(rank, len(samples), world), unit="sample", disable=None):
            if i not in done:
                sample = samples[i]
                with data.naming(getattr(samples, "path", task), i, sample.meta):
                    row = row_of(sample, predict(sample))
                append(file, {"index": i, "id": sample.id, "media": media_in(sample.turns[0]),
                              "prompt": text_in(sample.turns[0]), **row})


def read_predictions(folder, run):      # the rows of all ranks in the order of their samples, each once
    paths = sorted(Path(folder).glob("predictions-*.jsonl"))
    rows = {row["index"]: row for path in paths for row in read_rows(path, run)[0]}
    return [rows[i] for i in sorted(rows)]


def figures(task, folder, run, n):      # figures over all n samples. Raises ValueError if some are not there yet
    rows = read_predictions(folder, run)
    if len(rows) != n:
        raise ValueError(f"{folder}: predictions of {len(rows)} samples, {n} are expected; start the run again")
    return {"n": n, **TASKS[task][1](rows)}


# ---- Run

# Tokens of an answer at most, as NExT-Chat, ChatterBox and LLaVA were evaluated
LENGTHS = {"res": 20, "pope": 20, "caption": 500, "refer": 320, "rounds": 320, "talks": 320, "vqa": 1024, "sqa": 1024}
MIN_SCORE = 0.3                                                 # of a box that was looked for; below: none


class Asker:
    """A model of a weights folder, with what it takes to ask it. Raises OSError or ValueError naming the fault."""

    def __init__(self, folder, device="cpu", dtype="float32", template=""):
        self.model = M.load(folder, device, getattr(torch, dtype))
        cfg, self.weight = self.model.cfg, self.model.llm.embed.weight          # weight: for its device and dtype
        self.system, self.spec = data.SYSTEMS[cfg.system], data.MediaSpec(**cfg.media)
        self.tok = data.tokenizer_of(folder / "tokenizer.model", cfg)
        self.template = data.TEMPLATES[template or cfg.template or self.system.template]
        self.signals = {id for name in cfg.projections for id in cfg.signal(name)}

    def embed(self, rendered):          # embeddings (1, T, C) of a prompt, and its attn_mask or None
        length, room = len(rendered.ids), self.model.cfg.llm.max_len
        if length > room:
            raise ValueError(f"{length} tokens, more than the {room} that the model reads")
        batch = data.collate([rendered._replace(labels=rendered.ids, targets=[])], self.model.cfg.n_token,
                             max_len=room, mask_pad=self.system.mask_pad)
        batch = data.to_device(batch, self.weight.device, self.weight.dtype)
        return self.model.embed(batch.ids, batch.media, batch.slots), batch.attn_mask

    def render(self, turns, train=False):               # rendered turns; a last one of None asks for an answer
        return data.render(turns, self.tok, self.system, self.template, self.model.cfg.n_token, train=train)

    @torch.inference_mode()
    def answer(self, turns, max_new_tokens=128, begun=""):
        """The greedy answer to turns (of strings, media, boxes), or the rest of one that is begun -> text, ids of all,
        hidden states it came from."""
        r, hidden, at = self.render([*turns, None]), [], next(iter(self.model.feeds), -1)
        room = self.model.cfg.llm.max_len - len(r.ids)
        r = r._replace(ids=r.ids + self.tok.encode(begun, bos=False)[-room:])
        embeds, mask = self.embed(r)
        stream, ids = data.TextStream(self.tok, (self.template.stop,)), list(r.ids)
        for id in M.generate(self.model, embeds, max_new_tokens=max_new_tokens, hidden=hidden, attn_mask=mask):
            ids.append(self.tok.special[self.system.box[-1]] if ids[-1] == at else id)      # <boxes> is after <at>
            if id in self.signals:                              # to painters, no text
                stream.flush()
            else:
                stream.push(ids[-1])
            if stream.done:
                break
        return stream.text.strip(), ids, hidden

    @torch.inference_mode()
    def point(self, question):
        """The box (1, 4) of the frame that an answer about a place begins with, or that is looked for."""
        if "at" not in self.model.writers:              # ChatterBox looks for it before it answers
            r = self.render([[*question, data.Box((), kind="find")], None])
            h = self.model.llm(self.embed(r)[0])
            return self.boxes_of([question], [*r.ids, -1], [h])
        # parity: nothing is generated; the words before `<at>` are put into the model's mouth
        r = self.render([question, ["Answer: ", data.Box((0, 0, 0, 0), tensor=torch.zeros(4))]], train=True)
        end = r.targets[0][1] + 1
        embeds, mask = self.embed(r._replace(ids=r.ids[:end], slots=[slot for slot in r.slots if slot[1] < end]))
        return self.model.writers["at"](self.model.llm(embeds, attn_mask=mask)[:, -1]).float().cpu()

    @torch.inference_mode()
    def segment(self, question, max_new_tokens):                # bool masks (n, H, W) of the picture for the boxes said
        picture = next(part for part in question if isinstance(part, data.Medium))
        _, ids, hidden = self.answer([question], max_new_tokens)
        image, start = picture.sam[None].to(self.weight), len(ids) - len(hidden)
        found = M.read_out(self.model, ids, hidden, "at", start, image=image)
        return data.Geometry(*picture.size).masks_to_pixels(found[1]).cpu() if found else torch.zeros(0)

    def boxes_of(self, turns, ids, hidden):             # (n, 4): said at `<at>`, or looked for where that is asked
        start = len(ids) - len(hidden)                          # of the answer
        if "at" in self.model.writers and (found := M.read_out(self.model, ids, hidden, "at", start)):
            return found[0]
        asked = [i for i, id in enumerate(ids[:start]) if id == self.tok.special.get(self.system.find)]
        if not asked:
            return []
        image = next(part for part in turns[0] if isinstance(part, data.Medium)).det[None].to(self.weight)
        boxes, score = M.read_out(self.model, [*ids[:start], -1], hidden[:1], "vg", asked[-1], image=image)
        return boxes[score > MIN_SCORE]

    @torch.inference_mode()
    def reply(self, turns, max_new_tokens):
        """The greedy answer to turns as texts, Boxes and Signals; a box that is looked for comes after the text."""
        text, ids, hidden = self.answer(turns, max_new_tokens)
        boxes = [data.Box((), tensor=box.float().cpu()) for box in self.boxes_of(turns, ids, hidden)]
        texts = text.split(" ".join(self.system.box)) if self.system.box else [text]
        said, cfg = ids[len(ids) - len(hidden):-1], self.model.cfg
        wishes = [data.Signal(name) for name in cfg.projections for _ in M.signal_runs(said, cfg.signal(name))[0]]
        return [part for pair in zip_longest(texts, boxes) for part in pair if part] + wishes

    def converse(self, turns, max_new_tokens):          # replies to all questions, each after those before
        said, replies = [], []
        for question, answer in zip(turns[::2], turns[1::2]):
            if "vg" in self.model.writers:
                # parity: ChatterBox forgets earlier boxes, and looks for one wherever the true answer has any
                said = [[part for part in turn if not isinstance(part, data.Box)] for turn in said]
                regions = [replace(part, kind="region") if isinstance(part, data.Box) else part for part in question]
                question = regions + [data.Box((), kind="find")] * bool(boxes_in(answer))
            full = len(self.render([*said, question, None]).ids) >= self.model.cfg.llm.max_len
            replies.append([] if full else self.reply([*said, question], max_new_tokens))       # [] is no right answer
            said += [question, replies[-1]]
        return replies

    def predict(self, task, sample):    # what the model says about a sample of a task, as the task's row wants it
        data.load_media(sample.turns, replace(self.spec, sam_size=self.spec.sam_size * (task == "res")))
        question = sample.turns[0]
        if "box" not in self.model.cfg.reads:           # ChatterBox reads what is in a box, not where that is
            question = [replace(part, kind="region") if isinstance(part, data.Box) else part for part in question]
        if task in ("rec", "ground"):
            picture, boxes = next(part for part in question if isinstance(part, data.Medium)), self.point(question)
            geometry = data.Geometry(*picture.size, self.spec.square)
            return {"boxes": boxes, "pixels": [geometry.to_pixels(box.cpu()) for box in boxes]}
        if task == "res":
            return {"masks": self.segment(question, LENGTHS[task])}
        if task in ("rounds", "talks"):
            return {"replies": self.converse(sample.turns, LENGTHS[task])}
        text = self.answer([question], LENGTHS[task])[0]
        if task == "sqa" and len(choices(text)) != 1:           # parity: LLaVA's --answer-prompter does so with all
            text += "\n The answer is " + self.answer([question], 64, f"{text} ###\nANSWER:")[0]
        return {"text": text}


def read_samples(args):                 # of a task's file
    prompts = datasets.load_prompts(args.templates) if args.templates else datasets.PROMPTS
    media = args.media or args.questions.parent
    if args.task in SOURCES:
        return SOURCES[args.task](args.questions, media)
    format = {"caption": "reg"}.get(args.task, args.task)
    if format == "rounds" and args.questions.name.startswith("CB-refcoco"):     # in these boxes end in width and height
        format = "refcoco-rounds"
    return datasets.Rows(args.questions, format, media, prompts, args.seed)


def run_task(asker, args):              # this rank's share; prints and writes the figures once all is there
    if args.task in ("rec", "ground") and not {"at", "vg"} & set(asker.model.writers):
        raise ValueError(f"{args.weights}: this model says no boxes")
    if args.task == "res" and not asker.model.cfg.sam:
        raise ValueError(f"{args.weights}: this model makes no masks")
    if not (samples := read_samples(args)):
        raise ValueError(f"{args.questions}: holds no questions")
    digest = hashlib.sha256(args.questions.read_bytes()).hexdigest()
    stats = [(file.name, file.stat()) for file in sorted(args.weights.glob("*.safetensors"))]
    made = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]                 # weights may be replaced
    run = {"task": args.task, "weights": str(args.weights), "file": digest, "templates": str(args.templates or ""),
           "template": args.template or "", "seed": args.seed, "dtype": args.dtype, "media": str(args.media or ""),
           "made": hashlib.sha256(repr(made).encode()).hexdigest()}
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))      # torchrun's
    predict_all(samples, partial(asker.predict, args.task), args.task, args.out, run, rank, world)
    if (done := len(read_predictions(args.out, run))) < len(samples):
        return print(f"{done} of {len(samples)} samples are done, other ranks are at the rest")
    result = json.dumps(figures(args.task, args.out, run, len(samples)))
    (args.out / "metrics.json").write_text(result)
    if args.task in ("vqa", "sqa"):
        write_answers(args.out, run)
    print(result)


def ask_all(asker, args):               # ask the questions of a file, print how many of each kind are answered right
    rows, began = [], time.time()
    with args.out.open("wb") if args.out else nullcontext() as file:
        for sample in tqdm(data.Conversations(args.questions, args.media), unit="question", disable=None):
            question, expected = sample.turns[:2]
            with data.naming(args.questions, len(rows), sample.meta):
                data.load_media([question], asker.spec)
                rows.append({"id": len(rows), "kind": sample.meta.get("kind", ""), "question": text_in(question),
                             "text": asker.answer([question])[0], "answer": text_in(expected)})
            if file:
                append(file, rows[-1])
    if not rows:
        raise ValueError(f"{args.questions}: holds no questions")
    for kind, (right, asked) in accuracy(rows).items():
        print(f"{kind:20}{right:6} of {asked:5}{right / asked:9.1%}")
    print(f"{(time.time() - began) / len(rows):.3f} seconds a question")


# ---- Answer files, ScienceQA, a judge

def question_samples(path, media, read=dict):           # rows {question_id, image, text} -> Samples, pictures come last
    samples = []
    for i, record in enumerate(data.read_records(path)):
        with data.naming(path, i, record):
            row = read(record)
            seen = ["\n", data.Medium("image", str(data.safe_join(media, row["image"])))] if row.get("image") else []
            samples.append(data.Sample([[row["text"], *seen]], str(row["question_id"]), row))
    return samples


def science_samples(path, media):
    """ScienceQA's conversations; the choices and the right one's number are in the problems.json beside them."""
    problems = json.loads((path.parent / "problems.json").read_bytes())

    def read(record):
        text, problem = record["conversations"][0]["value"].replace("<image>", "").strip(), problems[str(record["id"])]
        return {"question_id": record["id"], "text": text, "image": record.get("image"), "target": problem["answer"],
                "choices": len(problem["choices"])}
    return question_samples(path, media, read)


def question_row(sample, out):
    kept = {name: sample.meta[name] for name in ("question_id", "target", "choices", "image") if name in sample.meta}
    return {**kept, "prompt": sample.meta["text"], "text": out["text"]}


def choice(row):                        # number of the choice committed to. parity: else any, here always the same
    letters = choices(row["text"])
    number = ord(letters[0]) - ord("A") if len(letters) == 1 else row["choices"]
    return number if number < row["choices"] else random.Random(str(row["question_id"])).randrange(row["choices"])


def percent(rows):                      # of right choices, None of no rows
    return round(100 * sum(choice(row) == row["target"] for row in rows) / len(rows), 2) if rows else None


def science_figures(rows):              # of all, with a picture, without; how many answers named no choice
    seen, blind = [row for row in rows if row.get("image")], [row for row in rows if not row.get("image")]
    return {"accuracy": percent(rows), "image": percent(seen), "text": percent(blind),
            "unclear": sum(len(choices(row["text"])) != 1 for row in rows)}


def write_answers(folder, run):         # answers.jsonl of a finished run, with the keys that LLaVA's judges read
    with open(Path(folder, "answers.jsonl"), "w") as file:
        for row in read_predictions(folder, run):
            name = hashlib.sha256(json.dumps([run, row["question_id"], row["text"]]).encode()).hexdigest()[:22]
            print(json.dumps({key: row[key] for key in ("question_id", "prompt", "text")} | {
                "answer_id": name, "model_id": run["weights"], "metadata": {}}), file=file)


SOURCES = {"vqa": question_samples, "sqa": science_samples, "talks": partial(datasets.Dialogs, learn=False)}
TASKS |= {"vqa": (question_row, lambda rows: {}), "sqa": (question_row, science_figures)}


def review_prompt(question, answers, rule, context):            # parity: the originals' layout
    text, role = "", rule["role"]
    if context:                         # of a picture, which the judge does not see
        boxes = "\n".join(f"{thing['category']}: {thing['bbox']}" for thing in context["instances"])
        text = "[Context]\n{}\n\n{}\n\n".format("\n".join(context["captions"]), boxes)
    text += f"[Question]\n{question['text']}\n\n"
    for k, answer in enumerate(answers, 1):
        text += f"[{role} {k}]\n{answer['text']}\n\n[End of {role} {k}]\n\n"
    return text + f"[System]\n{rule['prompt']}\n\n"


def review_requests(questions, answers, rules, contexts=None):
    """What a judge is asked about two lists of answers. rules: {category: {role, prompt}}; contexts: rows {image,
    captions, instances}, or None for text alone. Raises ValueError naming the question where rows do not fit."""
    first, second = ({row.get("question_id"): row for row in rows} for rows in answers)
    seen, out = {row.get("image"): row for row in contexts or ()}, []
    for i, question in enumerate(questions, 1):
        with data.naming("questions", i, question):
            name, category = question["question_id"], question.get("category", "default")
            if name not in first or name not in second:
                raise ValueError(f"question {name} has no answer in one of the files")
            rule = rules.get(category) or contexts is None and rules.get("default")         # of an unknown category
            if not rule:
                raise ValueError(f"question {name}: no rule for {category!r}; there are {', '.join(rules)}")
            one, two, context = first[name], second[name], None if contexts is None else seen[question["image"]]
            out.append({"id": i, "question_id": name, "answer1_id": one.get("answer_id", name),
                        "answer2_id": two.get("answer_id", name), "category": category,
                        "prompt": review_prompt(question, (one, two), rule, context)})
    return out


def review(requests, command, path):
    """Have any program judge: it reads lines of JSON requests, writes a line {id, content} for each, in any order."""
    path.touch()
    lines, size = whole_lines(path)
    done = [json.loads(line) for line in lines]
    digests = {row["id"]: hashlib.sha256(row["prompt"].encode()).hexdigest()[:16] for row in requests}
    if odd := [row["id"] for row in done if row.get("digest") != digests.get(row["id"])]:
        raise ValueError(f"{path}: its review {odd[0]} is of other answers; move the file away")
    known = {row["id"] for row in done}                         # is not asked again
    asked = {row["id"]: row for row in requests if row["id"] not in known}
    with TemporaryFile("w+") as file, open(path, "ab") as out:  # a file: a pipe could fill up while the judge writes
        out.truncate(size)
        file.writelines(json.dumps(row) + "\n" for row in asked.values())
        file.seek(0)
        with subprocess.Popen(shlex.split(command), stdin=file, stdout=subprocess.PIPE, text=True) as judge:
            for line in judge.stdout:
                try:
                    reply = json.loads(line)
                    name, content = reply["id"], str(reply["content"])
                except (ValueError, LookupError, TypeError):
                    raise ValueError(f"{command}: no reply {{id, content}}: {line!r:.80}") from None
                if request := asked.pop(name, None):
                    del request["prompt"]
                    done.append({**request, "content": content, "tuple": review_scores(content), "digest": digests[name]})
                    append(out, done[-1])
    if asked:
        raise ValueError(f"{command}: ended with {judge.returncode}, {len(asked)} requests without a reply; start it again")
    return done


def main_review(argv):                  # write the requests to a judge, or have it answer and print the mean scores
    p = argparse.ArgumentParser(description="Have a program compare two files of answers.", prog="evaluate.py review")
    add, read = p.add_argument, data.read_records
    add("--questions", "-q", type=Path, required=True, help="jsonl {question_id, text, category, image}")
    add("--answers", "-a", type=Path, nargs=2, required=True, help="two answers.jsonl")
    add("--rules", "-r", type=Path, required=True, help="JSON {category: {role, prompt}}")
    add("--context", "-c", type=Path, help="jsonl {image, captions, instances}")
    add("--judge", help="program that reads lines {id, prompt} and writes lines {id, content}; default: print requests")
    add("--out", "-o", type=Path, help="file of reviews")
    args = p.parse_args(argv)
    if bool(args.judge) != bool(args.out):
        p.error("--judge and --out FILE, for its reviews, go together")
    [rules], contexts = read(args.rules, lambda whole: [whole]), args.context and read(args.context)
    requests = review_requests(read(args.questions), map(read, args.answers), rules, contexts)
    if not requests:
        raise ValueError(f"{args.questions}: holds no questions")
    if not args.judge:
        return print(*map(json.dumps, requests), sep="\n")
    reviews = review(requests, args.judge, args.out)
    print(json.dumps(summarise_reviews(reviews)))
    if odd := [row["id"] for row in reviews if row["tuple"] == [-1, -1]]:
        print(f"{len(odd)} reviews do not begin with two scores, first {odd[0]}; they count as -1", file=sys.stderr)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["review"]:
        return main_review(argv[1:])
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("weights", type=Path, help="weights folder")
    p.add_argument("questions", type=Path, help="file of a task, or LLaVA records of one exchange, each with a `kind`")
    p.add_argument("--task", choices=TASKS, help="what the file holds and how it is counted")
    p.add_argument("--media", "--images", type=Path, help="folder of the media, default: beside the questions")
    p.add_argument("--out", type=Path, help="of a task: folder of predictions and figures; else jsonl file of answers")
    p.add_argument("--templates", type=Path, help="prompts: JSON or folder of the originals, or v0; default: ours")
    p.add_argument("--template", choices=data.TEMPLATES, metavar="NAME", help="row of data.TEMPLATES, default: its own")
    p.add_argument("--seed", type=int, default=0, help="draws prompts and expressions, default %(default)s")
    p.add_argument("--device", help="default: the best there is, one for each rank")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
                   help="of the weights, default %(default)s; the others take less memory and time, and move boxes a little")
    args = p.parse_args(argv)
    if args.task and not args.out:
        p.error("--task needs --out FOLDER")
    if args.out and not args.task and not args.out.parent.is_dir():
        p.error(f"--out: {args.out.parent} is no folder")
    device = args.device or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    (run_task if args.task else ask_all)(Asker(args.weights, M.find_device(device), args.dtype, args.template), args)


if __name__ == "__main__":
    data.program(main)
