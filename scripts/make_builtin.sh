#!/usr/bin/env bash
# The built-in model from its base: prompts, its own answers, training, the delta, what it is worth, the card.
#
#   scripts/make_builtin.sh --data DATA               an hour and a half of answers, half as much of training, two cores
#   scripts/make_builtin.sh --data DATA --gpu         28 M tokens and more epochs, for one large GPU
#   scripts/make_builtin.sh --smoke                   every step once, in minutes; teaches nothing
#
# --data DATA      gsm8k/, oasst-en-100/, synthetic-conversations/, standard-ebooks/ to learn from, human-eval/,
#                  cnn-dailymail/, spec-bench/ and wikitext-2/ to measure with; what is missing to learn from is left out
# --work FOLDER    where everything goes (build/builtin); run again, it goes on where it was stopped
# --install        put delta and card into the package at the end
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
# Large blocks stay mapped: a third more training speed on Linux.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 GLIBC_TUNABLES=glibc.malloc.hugetlb=1

data=data work=build/builtin size=cpu install=
while [ $# -gt 0 ]; do
  case $1 in
    --data) data=$2; shift ;;
    --work) work=$2; shift ;;
    --smoke) size=smoke ;;
    --gpu) size=gpu ;;
    --install) install=yes ;;
    *) echo "unknown option $1; the head of this file lists them" >&2; exit 2 ;;
  esac
  shift
done

base=smollm2-135m-base
case $size in
  # Half of what is learnt on a CPU are the answers to maths, the narrowest kind; of the documents a fourth.
  cpu)   questions=1600 share=1 maths=2924 others=1000 documents=4 tokens=256 batch=48 settings=() ;;
  gpu)   questions=40000 share=20 maths=7473 others=40000 documents=1 tokens=256 batch=256
         settings=(length=1024 batch_size=32 steps=null epochs=5 'exits=[4]') ;;
  smoke) questions=4 share=0.002 maths=4 others=4 documents=1 tokens=16 batch=8
         settings=(steps=3 batch_size=2 length=128 last_every=2 save_every=3 log_every=1 warmup=1 'exits=[4]') ;;
esac
mkdir -p "$work"

say() { printf '\n== %s\n' "$*"; }
answer() {  # KIND MAX_NEW_TOKENS LIMIT [OPTIONS]
  local kind=$1 budget=$2 limit=$3; shift 3
  if [ -s "$work/prompts/$kind.jsonl" ]; then
    layerskip distill-data $base --prompts "$work/prompts/$kind.jsonl" --output "$work/own/$kind.jsonl" \
      --limit "$limit" --max-new-tokens "$((budget < tokens ? budget : tokens))" --batch $batch "$@"
    # One answer of forty is never trained on: the gate and the tuner look at these.
    awk 'NR % 40 != 8' "$work/own/$kind.jsonl" > "$work/train/$kind.jsonl"
    awk 'NR % 40 == 8' "$work/own/$kind.jsonl" > "$work/held/$kind.jsonl"
  fi
}

say "questions the model asks itself"
python scripts/builtin_prompts.py "$work/open" --open-turns $questions
layerskip distill-data $base --prompts "$work/open/open.jsonl" --no-chat --separator "" --temperature 1 \
  --max-new-tokens $((tokens < 96 ? tokens : 96)) --batch $batch --output "$work/questions.jsonl"

say "prompts and documents"
[ -s "$work/prompts/sources.json" ] ||
  python scripts/builtin_prompts.py "$work/prompts" --data "$data" --questions "$work/questions.jsonl" --share $share

say "its own answers"
mkdir -p "$work/own" "$work/train" "$work/held"
answer maths 256 $maths
answer code 160 $others --no-chat --separator ""
answer summaries 128 $others
answer chat 256 $others
[ ! -s "$work/prompts/documents.jsonl" ] ||
  awk "NR % $documents == 0" "$work/prompts/documents.jsonl" > "$work/train/documents.jsonl"
[ $size != cpu ] || [ ! -s "$work/train/maths.jsonl" ] || cp "$work/train/maths.jsonl" "$work/train/maths-again.jsonl"

say "training"
resume=; [ -d "$work/run" ] && resume=--resume
[ -f "$work/run/config.json" ] ||
  layerskip train smollm2-135m "data=$work/train" "output=$work/run" "${settings[@]}" $resume
python - "$work/held" > "$work/tune.jsonl" <<'PYTHON'
import json, sys
from pathlib import Path

for file in sorted(Path(sys.argv[1]).glob("*.jsonl")):
    for line in (json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:6] if line):
        told = {"messages": line["messages"][:-1]} if "messages" in line else {"prompt": line["prompt"]}
        print(json.dumps(told))
PYTHON
[ $size = smoke ] || layerskip tune "$work/run" --prompts "$work/tune.jsonl" --seconds 120 --save

say "the delta"
printf '{"licence": "Apache-2.0", "trained_on": "%s", "commit": "%s"}\n' \
  "$([ $size = gpu ] && echo a GPU || echo a CPU)" "$(git rev-parse --short HEAD 2>/dev/null || echo unknown)" \
  > "$work/about.json"
layerskip pack-delta $base "$work/run" --output "$work/smollm2-135m.safetensors" --size-mb 24 --about "$work/about.json"
python - "$work" <<'PYTHON'
import shutil, sys
from pathlib import Path
from layerskip.checkpoint.delta import apply_delta
from layerskip.checkpoint.resolve import resolve

work = Path(sys.argv[1])
shutil.rmtree(work / "model", ignore_errors=True)
apply_delta(resolve("smollm2-135m-base"), work / "smollm2-135m.safetensors", work / "model")
PYTHON

say "what it is worth"
layerskip generate "$work/model" "What is the capital of France?" --mode self-speculative --max-new-tokens 24
if [ $size != smoke ]; then
  python benchmarks/builtin.py --model "$work/model" --base $base --data "$data" --limit 12 --hf --save --name smollm2-135m
  python benchmarks/builtin_cost.py --model "$work/model" --base $base --data "$data" --quality-limit 200 --save \
    --name smollm2-135m
fi
python scripts/model_card.py --run "$work/run" --sources "$work/prompts/sources.json" --train "$work/train" \
  --delta "$work/smollm2-135m.safetensors" --output "$work/smollm2-135m.md"

if [ -n "$install" ]; then
  cp "$work/smollm2-135m.safetensors" "$work/smollm2-135m.md" src/layerskip/checkpoint/
fi
say "done: $work/smollm2-135m.safetensors, $work/smollm2-135m.md"
