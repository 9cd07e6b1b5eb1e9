#!/usr/bin/env bash
# Makes weights/tiny again, from nothing: draws its world, learns words and places, then conversations, then to look for what is
# asked, and asks 1,000 questions about files it has not seen. Run in the repository, inside its virtual environment, with two
# cores free: about 70 minutes.
set -euo pipefail
export OMP_NUM_THREADS=2
python shapes.py --out shapes
python shapes.py --out unseen --questions 1000
python train.py system=tiny stage=1 data=shapes/words.json@0.8,regs:shapes/regs_train.jsonl@0.5 tokenizer=shapes/tokenizer.model out=runs/tiny1 workers=1
python train.py system=tiny stage=2 data=shapes/looks.json@0.6,shapes/conversations.json@0.35,recs:shapes/recs_train.jsonl@0.15 init=runs/tiny1/weights out=runs/tiny2 workers=1
python train.py system=tiny stage=2 data=shapes/glances.json@0.36,shapes/conversations.json@0.13,shapes/sounds.json@0.5 init=runs/tiny2/weights out=runs/tiny3 workers=1 save_dtype=float16
python evaluate.py runs/tiny3/weights unseen/questions.json --out runs/tiny3/answers.jsonl
cp runs/tiny3/weights/* weights/tiny/
