#!/usr/bin/env bash
# Makes weights/tiny again, from nothing: draws its world, a painter learns to paint it, then the model learns what things look
# like, to look for what is asked, to point at what is named, to talk about all of it and tell the painter, what it is still weak
# in, and to outline; last it is asked about files it has not seen. Run in the repository, inside its virtual environment, with
# two cores free that multiply bfloat16 (AMX) and a C++ compiler; without either leave out precision=bf16 or compile=1, and wait.
set -euo pipefail
export OMP_NUM_THREADS=2 ONEDNN_PRIMITIVE_CACHE_CAPACITY=20000        # batches differ in size, and each size has its kernels
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=4294967296    # keep memory
S=shapes U=unseen
learn() { echo "== $SECONDS s: $*"; python train.py system=tiny workers=1 "$@"; }
python shapes.py --out $S --clips 4000
python shapes.py --out $U --questions 1000
echo "== $SECONDS s: painter"
python paint.py $S/drawings.json --out runs/painters/image --steps 8000 --tokenizer $S/tokenizer.model
python paint.py $S/drawings_wishes.json --embed runs/painters/image
learn stage=1 out=runs/tiny1 tokenizer=$S/tokenizer.model data=$S/video_pairs.json@1.4,$S/audio_pairs.json@0.7,$S/numbers.json@0.28,regs:$S/parts_train.jsonl@0.55
learn stage=2 out=runs/tiny2 init=runs/tiny1/weights batch=8 pack=320 precision=bf16 data=$S/looks.json@0.1
learn stage=2 out=runs/tiny3 init=runs/tiny2/weights batch=8 micro=4 data=recs:$S/names_train.jsonl@0.16,$S/looks.json@0.03
python paint.py runs/tiny3/weights --writers runs/painters --out runs/writers
learn stage=2 out=runs/tiny4 init=runs/writers lr=8e-4 log_every=50 pack=320 precision=bf16 compile=1 data=recs:$S/recs_train.jsonl@0.63,rounds:$S/CB_LC.json@0.34,rounds:$S/CB_MRG.json@0.02,$S/facts.json@0.09,$S/counts.json@0.12,$S/conversations.json@0.06,regs:$S/regs_train.jsonl@0.06,$S/sounds.json@0.25,$S/clips.json@0.5,pope:$S/POPE_adversarial.jsonl@0.03,pope:$S/POPE_random.jsonl@0.015,nextgpt:$S/drawings_wishes.json@0.38,nextgpt:$S/talks.json@0.12
learn stage=2 out=runs/tiny5 init=runs/tiny4/weights lr=4e-4 log_every=50 pack=320 precision=bf16 compile=1 data=regs:$S/regs_train.jsonl@0.15,$S/sounds.json@0.35,$S/counts.json@0.05,$S/facts.json@0.05,$S/clips.json@0.3,$S/conversations.json@0.03,recs:$S/recs_train.jsonl@0.04,rounds:$S/CB_LC.json@0.03,pope:$S/POPE_adversarial.jsonl@0.015,nextgpt:$S/drawings_wishes.json@0.04
learn stage=3 out=runs/tiny6 init=runs/tiny5/weights save_dtype=float16 data=res:$S/RES_train.jsonl@0.085
echo "== $SECONDS s: learned"
ask() { python evaluate.py runs/tiny6/weights "$@"; }
ask $U/questions.json --out runs/tiny6/answers.jsonl
ask $U/REC_test.jsonl --task rec --out runs/tiny6/rec
ask $U/RES_test.jsonl --task res --out runs/tiny6/res
ask $U/POPE_random.jsonl --task pope --out runs/tiny6/pope
ask $U/REG_test.jsonl --task caption --out runs/tiny6/regions
ask $U/CB_LC.json --task rounds --out runs/tiny6/rounds
cp -r runs/painters runs/tiny6/weights/
for judged in runs/painters/image runs/tiny6/weights; do
    python paint.py $U/drawings_wishes.json --judge $judged --known $S/drawings_wishes.json
done
cp -r runs/tiny6/weights/* weights/tiny/
echo "== $SECONDS s in all"
