#!/usr/bin/env bash
# Makes weights/tiny again, from nothing: draws its world, learns words, then conversations, and asks 1,000 questions about
# files it has not seen. Run in the repository, inside its virtual environment. About an hour on two cores.
set -euo pipefail
python shapes.py --out shapes --vocab-size 600
python shapes.py --out unseen --questions 1000
python train.py system=tiny stage=1 data=shapes/words.json tokenizer=shapes/tokenizer.model out=runs/tiny1 warmup=0.15 epochs=1.2
python train.py system=tiny stage=1 data=shapes/picture_words.json init=runs/tiny1/weights out=runs/tiny2 epochs=2.5
python train.py system=tiny stage=2 data=shapes/conversations.json init=runs/tiny2/weights out=runs/tiny3 micro=24 epochs=0.65 save_dtype=float16
python evaluate.py runs/tiny3/weights unseen/questions.json --out runs/tiny3/answers.jsonl
cp runs/tiny3/weights/* weights/tiny/
