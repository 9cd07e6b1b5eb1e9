#!/usr/bin/env bash
# Makes weights/tiny again, from nothing: draws its world, learns what things look like, to look for what is asked, to point at
# what is named, to talk about all of it, and to outline; then a painter of pictures; last it asks about files it has not seen.
# Run in the repository, inside its virtual environment, with two cores free: about three hours.
set -euo pipefail
export OMP_NUM_THREADS=2
S=shapes U=unseen
learn() { python train.py system=tiny workers=1 "$@"; }
python shapes.py --out $S
python shapes.py --out $U --questions 1000
learn stage=1 out=runs/tiny1 tokenizer=$S/tokenizer.model data=$S/video_pairs.json@0.7,$S/audio_pairs.json@0.7,$S/numbers.json@0.28,regs:$S/parts_train.jsonl@0.55
learn stage=2 out=runs/tiny2 init=runs/tiny1/weights data=$S/looks.json@0.1
learn stage=2 out=runs/tiny3 init=runs/tiny2/weights micro=4 data=recs:$S/names_train.jsonl@0.12,$S/looks.json@0.03
learn stage=2 out=runs/tiny4 init=runs/tiny3/weights micro=4 data=recs:$S/recs_train.jsonl@0.15,rounds:$S/CB_LC.json@0.04,rounds:$S/CB_MRG.json@0.02,regs:$S/regs_train.jsonl@0.03,pope:$S/POPE_adversarial.jsonl@0.02,$S/conversations.json@0.2,$S/looks.json@0.03,$S/counts.json@0.05,$S/sounds.json@0.3,$S/clips.json@0.1
learn stage=2 out=runs/tiny5 init=runs/tiny4/weights micro=4 data=recs:$S/recs_train.jsonl@0.14,rounds:$S/CB_LC.json@0.06,regs:$S/regs_train.jsonl@0.08,pope:$S/POPE_adversarial.jsonl@0.01,$S/facts.json@0.1,$S/conversations.json@0.06,$S/counts.json@0.04,$S/sounds.json@0.25,$S/clips.json@0.05
learn stage=2 out=runs/tiny6 init=runs/tiny5/weights micro=4 data=recs:$S/recs_train.jsonl@0.1,rounds:$S/CB_LC.json@0.05,regs:$S/regs_train.jsonl@0.11,$S/facts.json@0.05,$S/conversations.json@0.08,$S/looks.json@0.01,$S/counts.json@0.02,$S/sounds.json@0.2,$S/clips.json@0.05
learn stage=3 out=runs/tiny7 init=runs/tiny6/weights data=res:$S/RES_train.jsonl@0.085
learn stage=2 out=runs/tiny8 init=runs/tiny7/weights micro=4 lr=3e-4 save_dtype=float16 data=pope:$S/POPE_random.jsonl@0.02,pope:$S/POPE_adversarial.jsonl@0.01,recs:$S/recs_train.jsonl@0.015,regs:$S/regs_train.jsonl@0.015,$S/conversations.json@0.02,rounds:$S/CB_LC.json@0.01,$S/sounds.json@0.03,$S/counts.json@0.005
learn stage=2 out=runs/tiny9 init=runs/tiny8/weights batch=16 micro=4 lr=5e-4 save_dtype=float16 data=recs:$S/recs_train.jsonl@0.045,rounds:$S/CB_LC.json@0.02,regs:$S/regs_train.jsonl@0.035,pope:$S/POPE_random.jsonl@0.008,pope:$S/POPE_adversarial.jsonl@0.005,$S/facts.json@0.015,$S/conversations.json@0.02,$S/counts.json@0.01,$S/sounds.json@0.08,$S/clips.json@0.03
python paint.py $S/drawings.json --out runs/painters/image --tokenizer $S/tokenizer.model
ask() { python evaluate.py runs/tiny9/weights "$@"; }
ask $U/questions.json --out runs/tiny9/answers.jsonl
ask $U/REC_test.jsonl --task rec --out runs/tiny9/rec
ask $U/RES_test.jsonl --task res --out runs/tiny9/res
ask $U/POPE_random.jsonl --task pope --out runs/tiny9/pope
ask $U/REG_test.jsonl --task caption --out runs/tiny9/regions
ask $U/CB_LC.json --task rounds --out runs/tiny9/rounds
python paint.py $U/drawings.json --judge runs/painters/image --known $S/drawings.json
cp runs/tiny9/weights/* weights/tiny/
cp -r runs/painters weights/tiny/
