"""Ask a model the questions of a file and count the right answers.

    python evaluate.py weights/tiny unseen/questions.json

In order: metrics (exact match, ScienceQA, reviews by a judge), the run. A question is right if the answer is the
expected one but for case and blanks.
"""
import argparse
import json
import re
import time
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

import data
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


# ---- Run

@torch.inference_mode()
def answer(model, tok, system, template, spec, question):
    """The greedy answer to one turn, a list of strings and media."""
    for medium in question:
        if not isinstance(medium, str):
            medium.tensor = data.read_media(medium.path, medium.kind, spec)
    r = data.render([question, None], tok, system, template, model.cfg.n_token)
    batch = data.collate([r._replace(labels=r.ids)], model.cfg.n_token)
    stream = data.TextStream(tok, (template.stop,))
    for id in M.generate(model, model.embed(batch.ids, batch.media, batch.slots), max_new_tokens=128):
        stream.push(id)
        if stream.done:
            break
    return stream.text.strip()


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("weights", type=Path, help="weights folder")
    p.add_argument("questions", type=Path, help="LLaVA records of one exchange, each with a `kind`")
    p.add_argument("--media", type=Path, help="folder of the media, default: beside the questions")
    p.add_argument("--out", type=Path, help="write a jsonl file of every answer")
    args = p.parse_args(argv)
    model = M.load(args.weights, dtype=torch.float32)
    system, spec = data.SYSTEMS[model.cfg.system], data.MediaSpec(**model.cfg.media)
    tok = data.Tokenizer(args.weights / "tokenizer.model", model.cfg.added_tokens, system.legacy)
    template, rows, began = data.TEMPLATES[model.cfg.template or system.template], [], time.time()
    for sample in tqdm(data.Conversations(args.questions, args.media), unit="question", disable=None):
        question, [expected] = sample.turns[:2]
        text = answer(model, tok, system, template, spec, question)
        rows.append({"id": len(rows), "kind": sample.meta.get("kind", ""), "question": sample.meta["conversations"][0]["value"],
                     "text": text, "answer": expected})
    if args.out:
        args.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for kind, (right, asked) in accuracy(rows).items():
        print(f"{kind:20}{right:6} of {asked:5}{right / asked:9.1%}")
    print(f"{(time.time() - began) / len(rows):.3f} seconds a question")


if __name__ == "__main__":
    main()
