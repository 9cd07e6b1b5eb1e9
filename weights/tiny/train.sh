#!/usr/bin/env bash
# Makes weights/tiny again, from nothing: draws its world, learns captions, then conversations, and asks 1,000 questions
# about files it has not seen. Run in the repository, inside its virtual environment. About an hour on two cores.
set -euo pipefail
python shapes.py --out shapes
python shapes.py --out unseen --questions 1000
python train.py system=tiny stage=1 data=shapes/captions.json tokenizer=shapes/tokenizer.model out=runs/tiny1 beta2=0.99 precision=bf16 warmup=0.08 micro=24
python train.py system=tiny stage=2 data=shapes/conversations.json init=runs/tiny1/weights out=runs/tiny2 beta2=0.99 precision=bf16 save_dtype=float16 micro=12
python evaluate.py runs/tiny2/weights unseen/questions.json --out runs/tiny2/answers.jsonl
cp runs/tiny2/weights/* weights/tiny/
