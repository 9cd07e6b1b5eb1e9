"""Ask a model the questions of a file and count the right answers.

    python evaluate.py weights/tiny unseen/questions.json
    python evaluate.py weights/nextchat-7b-336 --task rec REC_refcoco_unc_val.jsonl --images train2014 --out runs/rec

The tasks are rec, res, pope and caption. The second command goes on where it was stopped, and shares the work under
torchrun --standalone --nproc_per_node=N; ranks never talk, each writes a file of its own.
In order: metrics (exact match, ScienceQA, reviews by a judge), boxes and masks (REC, RES), answers (POPE, PointQA,
GQA), captions (CIDEr-D, Vedantam et al., arXiv 1411.5726), tasks (what a row of predictions holds, and its figures),
predictions (files that grow row by row and survive a kill), the run. A question is right if the answer is the expected
one but for case and blanks.
"""
import argparse
import hashlib
import json
import math
import os
import re
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import datasets
import model as M


# ---- Metrics

def normal(text):
    return " ".join(text.lower().split())


def accuracy(rows):
    """Rows with `kind`, `text`, `answer` -> {kind: (right, asked)}, kinds in order of their names, `all` last."""
    right = Counter(row["kind"] for row in rows if normal(row["text"]) == normal(row["answer"]))
    asked = Counter(row["kind"] for row in rows)
    return {kind: (right[kind], asked[kind]) for kind in sorted(asked)} | {"all": (right.total(), asked.total())}


def choices(text):
    """ScienceQA: the letters an answer commits to; it counts if there is exactly one."""
    return re.findall(r"The answer is ([A-Z]).", text)


def review_scores(review):
    """The two scores in the first line of a judge's review, [-1, -1] if it does not hold exactly two numbers."""
    try:
        first, second = (float(x) for x in review.split("\n")[0].replace(",", " ").split(" "))
        return [first, second]
    except ValueError:
        return [-1, -1]


def summarise_reviews(reviews):
    """Rows with category and tuple -> {category: mean scores and second over first in percent}, `all` included."""
    groups = {"all": []}
    for review in reviews:
        for name in ("all", review["category"]):
            groups.setdefault(name, []).append(review["tuple"])
    means = {name: [round(sum(column) / len(rows), 3) for column in zip(*rows)] for name, rows in groups.items()}
    return {name: {"mean": mean, "ratio": round(100 * mean[1] / mean[0], 1)} for name, mean in means.items()}


# ---- Boxes and masks

def box_iou(a, b):
    """Boxes (n, 4) and (n, 4) xyxy -> (n,). parity: invalid boxes are taken as they are."""
    side = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0)
    inter = side.prod(1)
    return inter / ((a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - inter)


def rec(boxes, targets):
    """Box lists in the square's frame -> accuracy (IoU above 0.5) and mean IoU. No box (None) is a failure."""
    found = [i for i, box in enumerate(boxes) if box is not None]
    iou = torch.zeros(len(boxes), dtype=torch.float64)
    if found:
        a, b = (torch.tensor([rows[i] for i in found], dtype=torch.float64) for rows in (boxes, targets))
        iou[found] = box_iou(a, b)
    return {"accuracy": (iou > 0.5).double().mean().item(), "iou": iou.mean().item(), "failed": len(boxes) - len(found)}


def overlap(mask, target):
    """Intersection and union, pixels, of a mask and a true one, whose pixels count as often as polygons cover them."""
    mask, target = np.asarray(mask, np.int64), np.asarray(target, np.int64)
    inter = int((mask * target).sum())
    return inter, int(mask.sum() + target.sum()) - inter


def res(intersections, unions):
    """Pixel counts a sample -> ciou (of the sums), miou (mean), giou (LISA's mean: 1 where both are empty), failed."""
    i, u = np.array(intersections, float), np.array(unions, float)
    means = {"miou": i / u.clip(1), "giou": np.where(u == 0, 1, i / (u + 1e-5))}
    return {"ciou": float(i.sum() / max(u.sum(), 1)), **{name: float(values.mean()) for name, values in means.items()},
            "failed": int((i == 0).sum())}


# ---- Answers

ROLE = "ASSISTANT: "
GQA, POINT_QA = re.compile(r"(?:[Tt]he answer is|Answer:) (.+)"), re.compile(r"The answer is (.+?)\.")
UNSPACE = {" " + end: end for end in ".?!,"} | {" ' ": "'"} | {f" {end}": end for end in ("n't", "'m", "'s", "'ve", "'re")}


def unspace(text):
    """Take away the blanks that decoding leaves before points and shortened words."""
    for old, new in UNSPACE.items():
        text = text.replace(old, new)
    return text


def said(text):
    """Only the last answer of a whole conversation, lower-cased if there was more than it."""
    return text.rsplit(ROLE, 1)[1].lower() if ROLE in text else text


def extract(text, pattern=GQA):
    """What the answer is, None unless the pattern fits exactly once."""
    found = pattern.findall(text)
    return found[0].rstrip(". ") if len(found) == 1 else None


def yes_or_no(text):
    """POPE as NExT-Chat reads it: what "the answer is", else yes if that word stands anywhere."""
    text = said(text)
    return extract(text) or ("yes" if "yes" in text else "no")


def yes_or_no_llava(text):
    """POPE as LLaVA reads it: no if the first sentence holds a no or not."""
    return "no" if {"no", "not", "No"} & set(text.split(".")[0].replace(",", "").split(" ")) else "yes"


def pope(predictions, labels):
    """Extracted answers -> accuracy, precision, recall, f1 (None if undefined), yes_ratio. Anything but no is a yes."""
    said_yes, is_yes = (np.array([text.lower() != "no" for text in texts]) for texts in (predictions, labels))
    both = (said_yes & is_yes).sum()
    precision, recall = (float(both / rows.sum()) if rows.any() else None for rows in (said_yes, is_yes))
    return {"accuracy": float((said_yes == is_yes).mean()), "precision": precision, "recall": recall,
            "f1": 2 * precision * recall / (precision + recall) if both else None, "yes_ratio": float(said_yes.mean())}


# ---- Captions

def caption_text(text):
    """The caption in a model's output."""
    return said(text).lower().split("</s>")[0]


WORD = re.compile(r"""
    \w+?(?=n't\b) | n't\b | '(?:s|m|d|re|ve|ll)\b | can(?=not\b) | (?:gon|wan)(?=na\b) | got(?=ta\b)
    | (?:[a-z]\.)+[a-z]\. | (?:mr|mrs|ms|dr|st|jr|vs|etc)\.      # a.m., dr.
    | \d+(?:[.,:/]\d+)*(?:-?\w)*                                 # 1,000 and 3-year-old
    | o'\w+ | \w+(?:[-./@]\w+)*                                  # t-shirt, and/or
    | [^\w\s]""", re.X)
BRACKETS = dict(zip("()[]{}", ("-lrb-", "-rrb-", "-lsb-", "-rsb-", "-lcb-", "-rcb-")))


def tokenise(text):
    """Lower-case words much as the Penn Treebank tokenizer of the COCO toolkit cuts them, without points and quotes.

    It is not that tool: for captions with rare symbols the scores may differ a little.
    """
    return [BRACKETS.get(word, word) for word in WORD.findall(text.lower()) if word not in ".?!,:;-'`\"…–—“”‘’"]


def ngrams(words):
    """Counts of the 1- to 4-grams of a list of words."""
    return Counter(tuple(words[i:i + n]) for n in range(1, 5) for i in range(len(words) - n + 1))


def cider(candidates, references):
    """CIDEr-D of tokenised captions, one candidate and a list of references an image -> a score of 0 to 10 an image."""
    counts = [[ngrams(words) for words in texts] for texts in references]
    seen = Counter(gram for texts in counts for gram in set().union(*texts))
    images = math.log(len(references))

    def vector(grams):
        """tf-idf weights of n-grams, their norms by n, the number of bigrams."""
        weights = {gram: n * (images - math.log(max(seen[gram], 1))) for gram, n in grams.items()}
        norms = [math.sqrt(sum(w * w for gram, w in weights.items() if len(gram) == n)) for n in range(1, 5)]
        return weights, norms, sum(n for gram, n in grams.items() if len(gram) == 2)

    def similarity(a, b):
        (wa, na, la), (wb, nb, lb) = a, b
        dots = [0.0] * 4
        for gram, w in wa.items():
            dots[len(gram) - 1] += min(w, wb.get(gram, 0.0)) * wb.get(gram, 0.0)
        cosines = [dot / (x * y) if x * y else dot for dot, x, y in zip(dots, na, nb)]
        return sum(cosines) / 4 * math.exp(-(la - lb) ** 2 / 72)                            # sigma 6
    pairs = [(vector(ngrams(words)), [vector(grams) for grams in texts]) for words, texts in zip(candidates, counts)]
    return [10 * sum(similarity(one, other) for other in others) / len(others) for one, others in pairs]


def meteor(candidates, references):
    """METEOR of strings by pycocoevalcap and Java, None where they are not installed."""
    try:
        from pycocoevalcap.meteor.meteor import Meteor          # optional: never needed by anything else
        return Meteor().compute_score(dict(enumerate(references)), {i: [text] for i, text in enumerate(candidates)})[0]
    except (ImportError, OSError):
        return None


# ---- Tasks: what the model said about a sample -> a row of the predictions file; rows -> figures

def boxes_in(sample):
    return [part for turn in sample.turns[1::2] for part in turn if isinstance(part, data.Box)]


def text_in(turn):
    return "".join(part for part in turn if isinstance(part, str))


def rec_row(sample, out):
    """out["boxes"]: (n, 4) of the frame, of which the first counts."""
    box = out["boxes"][0].tolist() if len(out["boxes"]) else None
    return {"box": box, "target": boxes_in(sample)[0].tensor.tolist()}


def res_row(sample, out):
    """out["masks"]: bool (n, H, W) of the picture. parity: more than one mask counts as none."""
    target = boxes_in(sample)[0].mask
    mask = np.asarray(out["masks"][0]) if len(out["masks"]) == 1 else np.zeros_like(target)
    return dict(zip(("intersection", "union"), overlap(mask, target)), rle=datasets.mask_rle(mask))


def text_row(sample, out):
    """out["text"]: the answer."""
    return {"text": unspace(out["text"]), "target": text_in(sample.turns[-1])}


def columns(rows, *keys):
    return [[row[key] for row in rows] for key in keys]


def pope_figures(rows):
    return {name: pope([rule(row["text"]) for row in rows], [yes_or_no(row["target"]) for row in rows])
            for name, rule in (("nextchat", yes_or_no), ("llava", yes_or_no_llava))}


def caption_figures(rows):
    """CIDEr-D times 100 and METEOR, one reference a sample."""
    ours, theirs = ([tokenise(caption_text(text)) for text in column] for column in columns(rows, "text", "target"))
    scores = cider(ours, [[words] for words in theirs])
    return {"cider": 100 * sum(scores) / len(scores),
            "meteor": meteor(map(" ".join, ours), [[" ".join(words)] for words in theirs])}


TASKS = {                               # task -> (sample, what the model said) -> row; rows -> figures
    "rec": (rec_row, lambda rows: rec(*columns(rows, "box", "target"))),
    "res": (res_row, lambda rows: res(*columns(rows, "intersection", "union"))),
    "pope": (text_row, pope_figures),
    "caption": (text_row, caption_figures),
}


# ---- Predictions

def read_rows(path, run):
    """Rows of a predictions file, and the bytes they fill: a last line that was not written whole does not count.

    Raises ValueError if its first line says that it belongs to another run.
    """
    raw = path.read_bytes()
    size = raw.rfind(b"\n") + 1
    lines = raw[:size].splitlines()
    if lines and lines[0] != json.dumps(run).encode():
        raise ValueError(f"{path}: predictions of another run, {lines[0].decode():.200}; move them away")
    return [json.loads(line) for line in lines[1:]], size


def append(file, row):
    """A row that is on the disk when this returns."""
    file.write(json.dumps(row).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def predict_all(samples, predict, task, folder, run, rank=0, world=1):
    """Rows of `predict(sample)` for every world-th sample from rank on, into folder/predictions-<rank>.jsonl.

    run: a dict that tells this run from others. What an earlier start of it finished, with any world, is not done again.
    """
    path = Path(folder, f"predictions-{rank}.jsonl")
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
                append(file, {"index": i, "id": sample.id, **TASKS[task][0](sample, predict(sample))})


def read_predictions(folder, run):
    """The rows of all ranks in the order of their samples, each once."""
    paths = sorted(Path(folder).glob("predictions-*.jsonl"))
    rows = {row["index"]: row for path in paths for row in read_rows(path, run)[0]}
    return [rows[i] for i in sorted(rows)]


def figures(task, folder, run, n):
    """Figures over all n samples. Raises ValueError if some are not there yet."""
    rows = read_predictions(folder, run)
    if len(rows) != n:
        raise ValueError(f"{folder}: predictions of {len(rows)} samples, {n} are expected; start the run again")
    return {"n": n, **TASKS[task][1](rows)}


# ---- Run

LENGTHS = {"res": 20, "pope": 20, "caption": 500}               # tokens of an answer at most, as NExT-Chat was evaluated
FORMATS = {"caption": "reg"}                                    # of a task's file, where it has another name


class Asker:
    """A model of a weights folder, with what it takes to ask it. Raises OSError or ValueError naming the fault."""

    def __init__(self, folder, device="cpu"):
        self.model = M.load(folder, device, torch.float32)
        cfg = self.model.cfg
        self.system, self.spec, self.device = data.SYSTEMS[cfg.system], data.MediaSpec(**cfg.media), device
        self.tok = data.Tokenizer(folder / "tokenizer.model", cfg.added_tokens, self.system.legacy)
        self.template = data.TEMPLATES[cfg.template or self.system.template]

    def embed(self, rendered):
        """Embeddings (1, T, C) of a prompt, and its attn_mask or None."""
        batch = data.collate([rendered._replace(labels=rendered.ids)], self.model.cfg.n_token,
                             max_len=self.model.cfg.llm.max_len, mask_pad=self.system.mask_pad)
        to = partial(torch.Tensor.to, device=self.device)
        media, slots = ({kind: to(x) for kind, x in part.items()} for part in (batch.media, batch.slots))
        return self.model.embed(to(batch.ids), media, slots), to(batch.attn_mask) if self.system.mask_pad else None

    def render(self, question, answer=None):
        """Rendered question, with an answer or open for one."""
        n_token = self.model.cfg.n_token
        return data.render([question, answer], self.tok, self.system, self.template, n_token, train=bool(answer))

    @torch.inference_mode()
    def answer(self, question, max_new_tokens=128):
        """The greedy answer to one turn, a list of strings, media and boxes -> text, ids of all, hidden states."""
        r, hidden = self.render(question), []
        embeds, mask = self.embed(r)
        stream, ids = data.TextStream(self.tok, (self.template.stop,)), list(r.ids)
        for id in M.generate(self.model, embeds, max_new_tokens=max_new_tokens, hidden=hidden, attn_mask=mask):
            stream.push(id)
            ids.append(id)
            if stream.done:
                break
        return stream.text.strip(), ids, hidden

    @torch.inference_mode()
    def point(self, question):
        """The box (1, 4) of the frame that an answer begins with which says where something is.

        parity: nothing is generated; the words before `<at>` are put into the model's mouth.
        """
        r = self.render(question, ["Answer: ", data.Box((0, 0, 0, 0), tensor=torch.zeros(4))])
        end = r.targets[0][1] + 1
        embeds, mask = self.embed(r._replace(ids=r.ids[:end], slots=[slot for slot in r.slots if slot[1] < end]))
        return self.model.writers["at"](self.model.llm(embeds, attn_mask=mask)[:, -1]).cpu()

    @torch.inference_mode()
    def segment(self, question, max_new_tokens):
        """Bool masks (n, H, W) of the picture for the boxes in the answer to a turn."""
        picture = next(part for part in question if isinstance(part, data.Medium))
        _, ids, hidden = self.answer(question, max_new_tokens)
        image, start = picture.sam[None].to(self.device), len(ids) - len(hidden)
        found = M.read_out(self.model, ids, hidden, "at", start, image=image)
        return data.Geometry(*picture.size).masks_to_pixels(found[1]).cpu() if found else torch.zeros(0)

    def predict(self, task, sample):
        """What the model says about a sample of a task, for predict_all."""
        data.load_media(sample.turns, replace(self.spec, sam_size=self.spec.sam_size * (task == "res")))
        question = sample.turns[0]
        if task == "rec":
            return {"boxes": self.point(question)}
        if task == "res":
            return {"masks": self.segment(question, LENGTHS[task])}
        return {"text": self.answer(question, LENGTHS[task])[0]}


def run_task(asker, args):
    """Predict this rank's share of what is not predicted yet; print and write the figures once all is there."""
    if args.task == "rec" and "at" not in asker.model.writers or args.task == "res" and not asker.model.cfg.sam:
        raise ValueError(f"{args.weights}: this model {'makes no masks' if args.task == 'res' else 'says no boxes'}")
    prompts = datasets.load_prompts(args.templates) if args.templates else datasets.PROMPTS
    media = args.media or args.questions.parent
    rows = datasets.Rows(args.questions, FORMATS.get(args.task, args.task), media, prompts, args.seed)
    digest = hashlib.sha256(args.questions.read_bytes()).hexdigest()
    run = {"task": args.task, "weights": str(args.weights), "file": digest, "templates": str(args.templates or ""),
           "seed": args.seed}
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    predict_all(rows, partial(asker.predict, args.task), args.task, args.out, run, rank, world)
    if (done := len(read_predictions(args.out, run))) < len(rows):
        return print(f"{done} of {len(rows)} samples are done, other ranks are at the rest")
    result = json.dumps(figures(args.task, args.out, run, len(rows)))
    (args.out / "metrics.json").write_text(result)
    print(result)


def ask_all(asker, args):
    """Ask the questions of a file, print how many of each kind are answered right."""
    rows, began = [], time.time()
    for sample in tqdm(data.Conversations(args.questions, args.media), unit="question", disable=None):
        question, [expected] = sample.turns[:2]
        data.load_media([question], asker.spec)
        rows.append({"id": len(rows), "kind": sample.meta.get("kind", ""), "question": sample.meta["conversations"][0]["value"],
                     "text": asker.answer(question)[0], "answer": expected})
    if args.out:
        args.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for kind, (right, asked) in accuracy(rows).items():
        print(f"{kind:20}{right:6} of {asked:5}{right / asked:9.1%}")
    print(f"{(time.time() - began) / len(rows):.3f} seconds a question")


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("weights", type=Path, help="weights folder")
    p.add_argument("questions", type=Path, help="file of a task, or LLaVA records of one exchange, each with a `kind`")
    p.add_argument("--task", choices=TASKS, help="REC, RES, POPE or region captions")
    p.add_argument("--media", "--images", type=Path, help="folder of the media, default: beside the questions")
    p.add_argument("--out", type=Path, help="of a task: folder of predictions and figures; else jsonl file of every answer")
    p.add_argument("--templates", type=Path, help="JSON of prompts in the layout of the originals, default: ours")
    p.add_argument("--seed", type=int, default=0, help="draws prompts and expressions, default %(default)s")
    p.add_argument("--device", help="default: the best there is, one for each rank")
    args = p.parse_args(argv)
    if args.task and not args.out:
        p.error("--task needs --out FOLDER")
    device = args.device or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    (run_task if args.task else ask_all)(Asker(args.weights, device), args)


if __name__ == "__main__":
    main()
