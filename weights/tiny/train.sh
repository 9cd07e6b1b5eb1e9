#!/usr/bin/env bash
# Makes weights/tiny again, from nothing: draws its world, learns what things look like, then to look for what is asked, then to
# talk, and asks 1,000 questions about files it has not seen. Run in the repository, inside its virtual environment, with two
# cores free: about 45 minutes.
set -euo pipefail
export OMP_NUM_THREADS=2
python shapes.py --out shapes
python shapes.py --out unseen --questions 1000
python train.py system=tiny stage=1 data=shapes/video_pairs.json@0.7,shapes/audio_pairs.json@0.7,shapes/numbers.json@0.28,regs:shapes/parts_train.jsonl@0.55 tokenizer=shapes/tokenizer.model out=runs/tiny1 workers=1
python train.py system=tiny stage=2 data=shapes/looks.json@0.1 init=runs/tiny1/weights out=runs/tiny2 workers=1
python train.py system=tiny stage=2 data=shapes/conversations.json@0.2,shapes/looks.json@0.04,shapes/sounds.json@0.3,shapes/clips.json@0.1,shapes/counts.json@0.04,regs:shapes/regs_train.jsonl@0.03,pope:shapes/POPE_adversarial.jsonl@0.02 init=runs/tiny2/weights out=runs/tiny3 workers=1 micro=4 save_dtype=float16
python train.py system=tiny stage=2 data=shapes/conversations.json@0.1,shapes/looks.json@0.02,shapes/sounds.json@0.2,shapes/clips.json@0.1,shapes/counts.json@0.03,pope:shapes/POPE_adversarial.jsonl@0.01 init=runs/tiny3/weights out=runs/tiny4 workers=1 micro=4 save_dtype=float16
python evaluate.py runs/tiny4/weights unseen/questions.json --out runs/tiny4/answers.jsonl
cp runs/tiny4/weights/* weights/tiny/
