#!/usr/bin/env bash
# Makes weights/tiny again, from nothing: draws its world, then on one core the model learns what things look like, to look for
# what is asked, to point at what is named, to talk about all of it and tell the painter of pictures, what it is still weak in,
# to tell the others, to do it all in one talk, and to outline; on another core painters learn pictures, clips and sounds. Last it
# is asked about files it has not seen. Run in the repository, inside its virtual environment, with two cores free that multiply
# bfloat16 (AMX) and a C++ compiler; without either leave out precision=bf16, compile=1 and --fast, and wait.
set -euo pipefail
export OMP_NUM_THREADS=1 ONEDNN_PRIMITIVE_CACHE_CAPACITY=20000        # batches differ in size, and each size has its kernels
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=4294967296    # keep memory
S=shapes U=unseen
learn() { echo "== $SECONDS s: $*"; python train.py system=tiny workers=1 "$@"; }
paint() { python paint.py $S/$1.json --out runs/painters/$2 --tokenizer $S/tokenizer.model "${@:3}"; }
embed() { python paint.py $S/$1.json --embed runs/painters/$2; }
TALK="log_every=50 pack=320 precision=bf16 compile=1"
python shapes.py --out $S --clips 4000
python shapes.py --out $U --questions 1000
paint drawings image --steps 9000 & painter=$!
learn stage=1 out=runs/tiny1 tokenizer=$S/tokenizer.model data=$S/video_pairs.json,$S/audio_pairs.json@0.7,$S/numbers.json@0.28,regs:$S/parts_train.jsonl@0.55
learn stage=2 out=runs/tiny2 init=runs/tiny1/weights batch=8 pack=320 precision=bf16 data=$S/looks.json@0.1
learn stage=2 out=runs/tiny3 init=runs/tiny2/weights batch=8 micro=4 data=recs:$S/names_train.jsonl@0.16,$S/looks.json@0.03
wait $painter
embed drawings_wishes image
python paint.py runs/tiny3/weights --writers runs/painters --out runs/writers
(paint video_pairs video --steps 7000 --batch 16 --fast; paint audio_pairs audio --steps 7000 --fast) & painters=$!
learn stage=2 out=runs/tiny4 init=runs/writers lr=8e-4 $TALK data=recs:$S/recs_train.jsonl@0.63,rounds:$S/CB_LC.json@0.34,rounds:$S/CB_MRG.json@0.02,$S/facts.json@0.09,$S/counts.json@0.12,$S/conversations.json@0.06,regs:$S/regs_train.jsonl@0.06,$S/sounds.json@0.25,$S/clips.json@0.5,pope:$S/POPE_adversarial.jsonl@0.03,pope:$S/POPE_random.jsonl@0.015,nextgpt:$S/drawings_wishes.json@0.38
learn stage=2 out=runs/tiny5 init=runs/tiny4/weights lr=4e-4 $TALK data=regs:$S/regs_train.jsonl@0.08,$S/sounds.json@0.5,$S/facts.json@0.09,$S/counts.json@0.06,$S/conversations.json@0.05,$S/clips.json@0.15,recs:$S/recs_train.jsonl@0.05,rounds:$S/CB_LC.json@0.02,pope:$S/POPE_adversarial.jsonl@0.01,nextgpt:$S/drawings_wishes.json@0.06
learn stage=2 out=runs/tiny6 init=runs/tiny5/weights lr=4e-4 $TALK data=$S/sounds.json@1.0,$S/facts.json@0.15,$S/conversations.json@0.12,$S/clips.json@0.4,$S/counts.json@0.08,recs:$S/recs_train.jsonl@0.09,regs:$S/regs_train.jsonl@0.06,rounds:$S/CB_LC.json@0.05,pope:$S/POPE_adversarial.jsonl@0.03,pope:$S/POPE_random.jsonl@0.01,nextgpt:$S/drawings_wishes.json@0.15
wait $painters
embed video_wishes video
embed audio_wishes audio
python paint.py runs/tiny6/weights --writers runs/painters --out runs/writers_of_all
learn stage=2 out=runs/tiny7 init=runs/writers_of_all lr=6e-4 $TALK data=nextgpt:$S/video_wishes.json@0.8,nextgpt:$S/audio_wishes.json@0.3,nextgpt:$S/drawings_wishes.json@0.2,$S/sounds.json@0.4,$S/facts.json@0.12,$S/conversations.json@0.12,$S/clips.json@0.3,$S/counts.json@0.05,recs:$S/recs_train.jsonl@0.08,regs:$S/regs_train.jsonl@0.03,rounds:$S/CB_LC.json@0.04,pope:$S/POPE_adversarial.jsonl@0.02,pope:$S/POPE_random.jsonl@0.03
learn stage=2 out=runs/tiny8 init=runs/tiny7/weights lr=6e-4 $TALK data=nextgpt:$S/video_wishes.json,nextgpt:$S/audio_wishes.json@0.05,nextgpt:$S/drawings_wishes.json@0.15,$S/sounds.json@0.15,$S/facts.json@0.04,$S/conversations.json@0.05,$S/clips.json@0.4,$S/counts.json@0.05,recs:$S/recs_train.jsonl@0.06,regs:$S/regs_train.jsonl@0.02,rounds:$S/CB_LC.json@0.02,pope:$S/POPE_random.jsonl@0.01
learn stage=2 out=runs/tiny9 init=runs/tiny8/weights lr=7e-4 $TALK data=nextgpt:$S/talks.json@1.0,nextgpt:$S/video_wishes.json,nextgpt:$S/audio_wishes.json@0.2,nextgpt:$S/drawings_wishes.json@0.2,$S/sounds.json@0.5,$S/clips.json@0.8,$S/facts.json@0.28,$S/conversations.json@0.25,$S/counts.json@0.08,recs:$S/recs_train.jsonl@0.15,regs:$S/regs_train.jsonl@0.06,rounds:$S/CB_LC.json@0.1,pope:$S/POPE_adversarial.jsonl@0.03,pope:$S/POPE_random.jsonl@0.03
export OMP_NUM_THREADS=2
learn stage=3 out=runs/tiny10 init=runs/tiny9/weights save_dtype=float16 data=res:$S/RES_train.jsonl@0.085
echo "== $SECONDS s: learned"
ask() { python evaluate.py runs/tiny10/weights "$@"; }
judge() { python paint.py $1 --judge "${@:2}"; }
ask $U/questions.json --out runs/tiny10/answers.jsonl
ask $U/REC_test.jsonl --task rec --out runs/tiny10/rec
ask $U/RES_test.jsonl --task res --out runs/tiny10/res
ask $U/POPE_random.jsonl --task pope --out runs/tiny10/pope
ask $U/REG_test.jsonl --task caption --out runs/tiny10/regions
ask $U/CB_LC.json --task rounds --out runs/tiny10/rounds
ask $U/talks.json --task talks --out runs/tiny10/talks
cp -r runs/painters runs/tiny10/weights/
judge $U/drawings_wishes.json runs/tiny10/weights --known $S/drawings_wishes.json
for kind in video audio; do judge $U/${kind}_wishes.json runs/tiny10/weights; done
cp -r runs/tiny10/weights/* weights/tiny/
echo "== $SECONDS s in all"
