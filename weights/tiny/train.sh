#!/usr/bin/env bash
# Makes weights/tiny again, from nothing: draws its world, trains on it, asks 1,000 questions about files it has not seen.
# Run in the repository, inside its virtual environment. About an hour on two cores.
set -euo pipefail
python shapes.py --out shapes
python shapes.py --out unseen --questions 1000
python train.py system=tiny data=shapes/conversations.json tokenizer=shapes/tokenizer.model out=runs/tiny precision=bf16 save_dtype=float16
python evaluate.py runs/tiny/weights unseen/questions.json --out runs/tiny/answers.jsonl
cp runs/tiny/weights/* weights/tiny/
