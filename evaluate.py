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


def mean(values):                       # of numbers or truths but None, which is no value, and the mean of none
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


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


def summary(scores):                    # pairs -> their means, the second in percent of the first
    first, second = (round(sum(column) / len(scores), 3) for column in zip(*scores))
    return {"mean": [first, second], "ratio": round(100 * second / first, 1) if first else None}


def summarise_reviews(reviews):         # -> {category: summary}, `all` too
    groups = {"all": [review["tuple"] for review in reviews]}
    for review in reviews:
        groups.setdefault(review["category"], []).append(review["tuple"])
    return {name: summary(scores) for name, scores in groups.items()}


# ---- Boxes and masks

def box_iou(a, b):
    """Boxes (n, 4) and (n, 4) xyxy -> (n,). parity: invalid boxes are taken as they are."""
    side = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0)         # (n, 2)
    inter = side.prod(1)
    return inter / ((a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - inter)


def ious(boxes, targets):               # of pairs, 0 where there is no box (None): one beside the picture stands for it
    found = [(-2, -2, -1, -1) if box is None else box for box in boxes]
    return box_iou(*torch.tensor([found, targets], dtype=torch.float64))                    # (2, n, 4) -> (n,)


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
    p, r = mean(is_yes[said_yes].tolist()), mean(said_yes[is_yes].tolist())
    return {"accuracy": float((said_yes == is_yes).mean()), "precision": p, "recall": r,
            "f1": 2 * p * r / (p + r) if p else None, "yes_ratio": float(said_yes.mean())}


# ---- Captions

def caption_text(text):                 # the caption in a model's output
    return said(text).lower().split("</s>")[0]


def cleaned(text):                      # parity: what ChatterBox's cleaned figures leave; of "A man and his dog" dog
    text = re.sub(" ?It is |it is |There is |at region0 |istant: ", "", text)
    before, mark, behind = re.split(r"(\.|, |is |\Z)", text, maxsplit=1)
    return behind if mark == "is " else before


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
    seen = Counter(gram for texts in references for gram in set().union(*map(ngrams, texts)))       # images that have it
    images = math.log(len(references))

    def vector(words):                  # tf-idf weights of n-grams, their norms by n, how many words
        weights = {gram: n * (images - math.log(max(seen[gram], 1))) for gram, n in ngrams(words).items()}
        norms = [math.sqrt(sum(w * w for gram, w in weights.items() if len(gram) == n)) for n in range(1, 5)]
        return weights, norms, len(words)

    def similarity(a, b):
        (wa, na, la), (wb, nb, lb) = a, b
        dots = [0.0] * 4
        for gram, w in wa.items():                              # clipped: saying a word again does not help
            dots[len(gram) - 1] += min(w, wb.get(gram, 0.0)) * wb.get(gram, 0.0)
        cosines = [dot / (x * y) if x * y else dot for dot, x, y in zip(dots, na, nb)]
        return sum(cosines) / 4 * math.exp(-(la - lb) ** 2 / 72)                            # of lengths, sigma 6
    pairs = zip(map(vector, candidates), references)
    return [10 * sum(similarity(ours, vector(text)) for text in texts) / len(texts) for ours, texts in pairs]


def meteor(candidates, references):     # by pycocoevalcap and Java, None where they are not installed
    try:
        from pycocoevalcap.meteor.meteor import Meteor
        ours, theirs = [[" ".join(words)] for words in candidates], [[*map(" ".join, texts)] for texts in references]
        return Meteor().compute_score(dict(enumerate(theirs)), dict(enumerate(ours)))[0]
    except (ImportError, OSError):
        return None


# ---- Tasks: what the model said about a sample -> a row of the predictions file; rows -> figures

def boxes_in(turn):
    return data.parts_of([turn], data.Box)


def text_in(turn, between=""):
    return between.join(data.parts_of([turn], str))


def as_regions(turn):
    return [replace(part, kind="region") if isinstance(part, data.Box) else part for part in turn]


def rec_row(sample, out):               # out["boxes"]: (n, 4) of the frame, of which the first counts, and in pixels
    box, pixels = (next(iter(out[name].tolist()), None) for name in ("boxes", "pixels"))
    return {"box": box, "target": boxes_in(sample.turns[-1])[0].tensor.tolist(), "pixels": pixels}


def res_row(sample, out):               # out["masks"]: bool (n, H, W). parity: more than one counts as none
    target = boxes_in(sample.turns[-1])[0].mask
    mask = np.asarray(out["masks"][0]) if len(out["masks"]) == 1 else np.zeros_like(target)
    return dict(zip(("intersection", "union"), overlap(mask, target)), rle=datasets.mask_rle(mask))


def text_row(sample, out):              # out["text"]: the answer
    return {"text": unspace(out["text"]), "target": text_in(sample.turns[-1])}


def refer_row(sample, out):             # several references
    return {"text": out["text"], "target": data.parts_of(sample.turns[-1:], str)}


def grounding(reply, answer):           # least IoU of boxes in order, 0 if their numbers differ; None: no true box
    found, true = ([box.tensor for box in boxes_in(turn)] for turn in (reply, answer))
    if not true:
        return None
    return box_iou(torch.stack(found), torch.stack(true)).min().item() if len(found) == len(true) else 0.0


def wished(reply, answer):              # whether both ask painters for the same; None if neither asks for anything
    ours, true = ([signal.writer for signal in data.parts_of([turn], data.Signal)] for turn in (reply, answer))
    return ours == true if ours or true else None


def rounds_row(sample, out):            # out["replies"]: to each question a list of texts, Boxes and Signals
    answers, replies = sample.turns[1::2], out["replies"]
    return {"text": [text_in(reply, " ") for reply in replies], "target": [text_in(answer, " ") for answer in answers],
            "iou": [*map(grounding, replies, answers)], "drawn": [*map(wished, replies, answers)]}


def pope_figures(rows):
    return {name: pope([rule(row["text"]) for row in rows], [yes_or_no(row["target"]) for row in rows])
            for name, rule in (("nextchat", yes_or_no), ("llava", yes_or_no_llava))}


def caption_of(row):                    # one reference, or a list -> whether one is met; words, those of the references
    targets = [row["target"]] if isinstance(row["target"], str) else row["target"]
    made, *true = (caption_text(text) for text in (row["text"], *targets))
    return normal(made) in map(normal, true), tokenise(made), [tokenise(text) for text in true]


def caption_figures(rows):              # CIDEr-D is times 100
    right, ours, theirs = zip(*map(caption_of, rows))
    scores = cider(ours, theirs)
    return {"right": mean(right), "cider": 100 * sum(scores) / len(scores), "meteor": meteor(ours, theirs)}


def refer_figures(rows):
    rest = [row | {"text": cleaned(row["text"])} for row in rows]
    return {"raw": caption_figures(rows), "cleaned": caption_figures(rest)}


def rounds_of(row):                     # a dialogue -> of each round: text right, box found, its IoU, media right
    text = [normal(a) == normal(b) for a, b in zip(row["text"], row["target"])]
    return text, [None if x is None else x >= 0.5 for x in row["iou"]], row["iou"], row["drawn"]


def rounds_figures(rows):
    """Shares of right texts and of boxes found, over all rounds and over the first, second ...; mean IoU; shares of
    dialogues without a fault and of answers that ask for the right media."""
    text, box, iou, drawn = zip(*map(rounds_of, rows))
    whole = [False not in chain(*dialogue) for dialogue in zip(text, box, drawn)]
    return {"text": mean(chain(*text)), "text_by_round": [*map(mean, zip_longest(*text))],
            "box": mean(chain(*box)), "box_by_round": [*map(mean, zip_longest(*box))],
            "iou": mean(chain(*iou)), "dialogues": mean(whole), "drawn": mean(chain(*drawn))}


def counted(count, *keys):              # figures that a metric gives of these columns of the rows
    return lambda rows: count(*([row[key] for row in rows] for key in keys))


TASKS = {                               # task -> (sample, what the model said) -> row; rows -> figures
    "rec": (rec_row, counted(rec, "box", "target")), "ground": (rec_row, counted(ground, "box", "target")),
    "refer": (refer_row, refer_figures), "res": (res_row, counted(res, "intersection", "union")),
    "pope": (text_row, pope_figures), "caption": (text_row, caption_figures),
    "rounds": (rounds_row, rounds_figures), "talks": (rounds_row, rounds_figures)}


# ---- Predictions

def whole_lines(path):                  # what they hold, and the bytes they fill: a kill may have cut the last one
    raw = path.read_bytes()
    size, rows = raw.rfind(b"\n") + 1, []
    for i, line in enumerate(raw[:size].splitlines()):
        with data.naming(path, i, line):
            rows.append(json.loads(line))
    return rows, size


def read_rows(path, run):               # and the bytes they fill; ValueError if they are of another run
    rows, size = whole_lines(path)
    if rows and rows[0] != run:
        raise ValueError(f"{path}: predictions of another run, {json.dumps(rows[0]):.200}; move them away")
    return rows[1:], size


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
                media = [medium.path for medium in data.parts_of(sample.turns[:1], data.Medium)]
                append(file, {"index": i, "id": sample.id, "media": media, "prompt": text_in(sample.turns[0]), **row})


def read_predictions(folder, run):      # the rows of all ranks in the order of their samples, each once
    paths = sorted(Path(folder).glob("predictions-*.jsonl"))
    rows = {row["index"]: row for path in paths for row in read_rows(path, run)[0]}
    return sorted(rows.values(), key=lambda row: row["index"])


# ---- Run

# Tokens of an answer at most, as NExT-Chat, ChatterBox and LLaVA were evaluated
LENGTHS = {"res": 20, "pope": 20, "caption": 500, "refer": 320, "rounds": 320, "talks": 320, "vqa": 1024, "sqa": 1024}
MIN_SCORE = 0.3                                                 # of a box that was looked for; below: none


class Asker:
    """A model of a weights folder, with what it takes to ask it. Raises OSError or ValueError naming the fault."""

    def __init__(self, folder, device="cpu", dtype="float32", template="", quantize=""):
        self.model = M.load(folder, device, getattr(torch, dtype), quantize)
        cfg, self.weight = self.model.cfg, self.model.llm.embed.weight          # weight: for its device and dtype
        self.system, self.spec = data.SYSTEMS[cfg.system], data.MediaSpec(**cfg.media)
        self.tok = data.tokenizer_of(folder / "tokenizer.model", cfg)
        self.template = data.TEMPLATES[template or cfg.template or self.system.template]
        self.signals = set().union(*map(cfg.signal, cfg.projections))

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
        """The greedy answer to turns or the rest of one that is begun -> text, all ids, hidden states it came from."""
        r, hidden, at = self.render([*turns, None]), [], next(iter(self.model.feeds), -1)
        room = self.model.cfg.llm.max_len - len(r.ids)
        r = r._replace(ids=r.ids + self.tok.encode(begun, bos=False)[-room:])
        embeds, mask = self.embed(r)
        stream, ids = data.TextStream(self.tok, (self.template.stop,)), list(r.ids)
        for id in M.generate(self.model, embeds, max_new_tokens=max_new_tokens, hidden=hidden, attn_mask=mask):
            ids.append(self.tok.special[self.system.box[-1]] if ids[-1] == at else id)      # <boxes> is after <at>
            if id not in self.signals:                          # these are for painters, no text
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
        _, ids, hidden = self.answer([question], max_new_tokens)
        picture = data.parts_of([question], data.Medium)[0]
        image, start = picture.sam[None].to(self.weight), len(ids) - len(hidden)
        found = M.read_out(self.model, ids, hidden, "at", start, image=image)
        return data.Geometry(*picture.size).masks_to_pixels(found[1]).cpu() if found else torch.zeros(0)

    def boxes_of(self, turns, ids, hidden):             # (n, 4): said at `<at>`, or looked for where that is asked
        start = len(ids) - len(hidden)                          # of the answer
        if "at" in self.model.writers and (found := M.read_out(self.model, ids, hidden, "at", start)):
            return found[0].float().cpu()
        if self.tok.special.get(self.system.find) not in ids[:start]:
            return torch.zeros(0, 4)
        image = data.parts_of(turns[:1], data.Medium)[0].det[None].to(self.weight)
        boxes, score = M.read_out(self.model, [*ids[:start], -1], hidden[:1], "vg", image=image)
        return boxes[score > MIN_SCORE].float().cpu()

    @torch.inference_mode()
    def reply(self, turns, max_new_tokens):
        """The greedy answer to turns as texts, Boxes and Signals; a box that is looked for comes after the text."""
        text, ids, hidden = self.answer(turns, max_new_tokens)
        boxes = [data.Box((), tensor=box) for box in self.boxes_of(turns, ids, hidden)]
        texts = text.split(" ".join(self.system.box)) if self.system.box else [text]
        said, cfg = ids[len(ids) - len(hidden):-1], self.model.cfg
        wishes = [data.Signal(name) for name in cfg.projections for _ in M.signal_runs(said, cfg.signal(name))[0]]
        return [part for part in chain(*zip_longest(texts, boxes)) if part] + wishes

    def converse(self, turns, max_new_tokens):          # replies to all questions, each after those before
        said, replies = [], []
        for question, answer in zip(turns[::2], turns[1::2]):
            if "vg" in self.model.writers:
                # parity: ChatterBox forgets earlier boxes, and looks for one wherever the true answer has any
                said = [[part for part in turn if not isinstance(part, data.Box)] for turn in said]
                question = as_regions(question) + [data.Box((), kind="find")] * bool(boxes_in(answer))
            full = len(self.render([*said, question, None]).ids) >= self.model.cfg.llm.max_len
            replies.append([] if full else self.reply([*said, question], max_new_tokens))       # [] is no right answer
            said += [question, replies[-1]]
        return replies

    def predict(self, task, sample):    # what the model says about a sample of a task, as the task's row wants it
        data.load_media(sample.turns, replace(self.spec, sam_size=self.spec.sam_size * (task == "res")))
        question = sample.turns[0]
        if "box" not in self.model.cfg.reads:           # ChatterBox reads what is in a box, not where that is
            question = as_regions(question)
        if task in ("rec", "ground"):
            picture, boxes = data.parts_of([question], data.Medium)[0], self.point(question)
            return {"boxes": boxes, "pixels": data.Geometry(*picture.size, self.spec.square).to_pixels(boxes)}
        if task == "res":
            return {"masks": self.segment(question, LENGTHS[task])}
        if task in ("rounds", "talks"):
            return {"replies": self.converse(sample.turns, LENGTHS[task])}
        text = self.answer([question], LENGTHS[task])[0]
        if task == "sqa" and len(choices(text)) != 1:           # parity: LLaVA's --answer-prompter does so with all
            text += "\n The answer is " + self.answer([question], 64, f"{text} ###\nANSWER:")[0]
        return {"text": text}


def read_samples(args):
    prompts = datasets.load_prompts(args.templates) if args.templates else datasets.PROMPTS
    file, media = args.questions, args.media or args.questions.parent
    refcoco = "refcoco-" * file.name.startswith("CB-refcoco")   # in these boxes end in width and height
    format = {"caption": "reg", "rounds": refcoco + "rounds"}.get(args.task, args.task)
    samples = (SOURCES[args.task](file, media) if args.task in SOURCES else
               datasets.Rows(file, format, media, prompts, args.seed))
    if not samples:
        raise ValueError(f"{file}: holds no questions")
    return samples


def check(model, args):                 # ValueError for one that cannot do the task
    if args.task in ("rec", "ground") and not {"at", "vg"} & set(model.writers):
        raise ValueError(f"{args.weights}: this model says no boxes")
    if args.task == "res" and not model.cfg.sam:
        raise ValueError(f"{args.weights}: this model makes no masks")


def identity(args):                     # what tells a run of a task from others
    digest = hashlib.sha256(args.questions.read_bytes()).hexdigest()
    made = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(args.weights.glob("*.safetensors"))]
    return {"task": args.task, "weights": str(args.weights), "file": digest, "templates": str(args.templates or ""),
            "template": args.template or "", "seed": args.seed, "dtype": args.dtype, "media": str(args.media or ""),
            "quantize": args.quantize, "made": hashlib.sha256(repr(made).encode()).hexdigest()}     # may be replaced


def run_task(asker, args):              # this rank's share; prints and writes the figures once all is there
    check(asker.model, args)
    samples, run = read_samples(args), identity(args)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))      # torchrun's
    predict_all(samples, partial(asker.predict, args.task), args.task, args.out, run, rank, world)
    rows = read_predictions(args.out, run)
    if len(rows) < len(samples):
        return print(f"{len(rows)} of {len(samples)} samples are done, other ranks are at the rest")
    result = json.dumps({"n": len(rows), **TASKS[args.task][1](rows)})
    (args.out / "metrics.json").write_text(result)
    if args.task in ("vqa", "sqa"):
        write_answers(args.out / "answers.jsonl", rows, run)
    print(result)


def ask_all(asker, args):               # ask the questions of a file, print how many of each kind are answered right
    samples, rows, began = read_samples(args), [], time.time()
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("wb") if args.out else nullcontext() as file:
        for i, sample in enumerate(tqdm(samples, unit="question", disable=None)):
            question, expected = sample.turns[:2]
            with data.naming(args.questions, i, sample.meta):
                data.load_media([question], asker.spec)
                rows.append({"id": i, "kind": sample.meta.get("kind", ""), "question": text_in(question),
                             "text": asker.answer([question])[0], "answer": text_in(expected)})
            if file:
                append(file, rows[-1])
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


def write_answers(path, rows, run):     # of a finished run, with the keys that LLaVA's judges read
    with path.open("w") as file:
        for row in rows:
            name = hashlib.sha256(json.dumps([run, row["question_id"], row["text"]]).encode()).hexdigest()[:22]
            print(json.dumps({"question_id": row["question_id"], "prompt": row["prompt"], "text": row["text"],
                              "answer_id": name, "model_id": run["weights"], "metadata": {}}), file=file)


SOURCES = {None: data.Conversations, "vqa": question_samples, "sqa": science_samples,
           "talks": partial(datasets.Dialogs, learn=False)}
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
            one, two = first.get(name), second.get(name)
            if None in (one, two):
                raise ValueError(f"question {name} has no answer in one of the files")
            rule = rules.get(category) or contexts is None and rules.get("default")         # of an unknown category
            if not rule:
                raise ValueError(f"question {name}: no rule for {category!r}; there are {', '.join(rules)}")
            context = None if contexts is None else seen[question["image"]]
            out.append({"id": i, "question_id": name, "answer1_id": one.get("answer_id", name),
                        "answer2_id": two.get("answer_id", name), "category": category,
                        "prompt": review_prompt(question, (one, two), rule, context)})
    return out


def review(requests, command, path):
    """Have any program judge: it reads lines of JSON requests, writes a line {id, content} for each, in any order."""
    path.touch()
    asked = {row["id"]: row for row in requests}
    digests = {name: hashlib.sha256(row["prompt"].encode()).hexdigest()[:16] for name, row in asked.items()}
    done, size = whole_lines(path)
    for row in done:
        if row.get("digest") != digests.get(row["id"]):
            raise ValueError(f"{path}: its review {row['id']} is of other answers; move the file away")
        asked.pop(row["id"], None)                              # is not asked again
    with TemporaryFile("w+") as file, open(path, "ab") as out:  # a file: a pipe could fill up while the judge writes
        out.truncate(size)
        file.writelines(json.dumps(row) + "\n" for row in asked.values())
        file.seek(0)
        with subprocess.Popen(shlex.split(command), stdin=file, stdout=subprocess.PIPE, text=True) as judge:
            for i, line in enumerate(judge.stdout):
                with data.naming(command, i, line):
                    reply = json.loads(line)
                    name, content = reply["id"], str(reply["content"])
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


def parse_args(argv):
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
    p.add_argument("--quantize", choices=("int8", "int4"), default="", help="keep the language model in 8 or 4 bits")
    args = p.parse_args(argv)
    if args.task and not args.out:
        p.error("--task needs --out FOLDER")
    return args


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["review"]:
        return main_review(argv[1:])
    args = parse_args(argv)
    own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else None          # torchrun's
    asker = Asker(args.weights, M.find_device(args.device or own), args.dtype, args.template, args.quantize)
    (run_task if args.task else ask_all)(asker, args)


if __name__ == "__main__":
    data.program(main)
