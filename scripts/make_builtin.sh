#!/usr/bin/env bash
# The built-in model from its base: prompts, its own answers, the adapter, the delta, what it is worth, the card.
#
#   scripts/make_builtin.sh --data DATA               5 M tokens of answers in three to four hours, two and a half of training; two cores
#   scripts/make_builtin.sh --data DATA --gpu         28 M tokens, for one large GPU
#   scripts/make_builtin.sh --smoke                   every step once, in minutes; teaches nothing
#
# --data DATA      gsm8k/, oasst-en-100/, synthetic-conversations/, standard-ebooks/ to learn from, human-eval/,
#                  cnn-dailymail/, xsum/, spec-bench/ and wikitext-2/ to measure with; what is missing is left out
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
  cpu)   questions=5000 share=2 asked=30000 continued=3000 tokens=256 batch=48 settings=(epochs=1) ;;
  gpu)   questions=40000 share=20 asked=110000 continued=20000 tokens=256 batch=256
         settings=(length=1024 batch_size=8 epochs=2) ;;
  smoke) questions=4 share=0.002 asked=40 continued=8 tokens=16 batch=8
         settings=(steps=3 batch_size=2 length=512 save_every=3 log_every=1 exit_vocab=512) ;;
esac
mkdir -p "$work"

say() { printf '\n== %s\n' "$*"; }
answer() {  # NAME MAX_NEW_TOKENS LIMIT [OPTIONS]
  local name=$1 budget=$2 limit=$3; shift 3
  if [ -s "$work/prompts/$name.jsonl" ]; then
    layerskip distill-data $base --states --prompts "$work/prompts/$name.jsonl" --output "$work/own/$name.jsonl" \
      --limit "$limit" --max-new-tokens "$((budget < tokens ? budget : tokens))" --batch $batch "$@"
    # One answer of a hundred is never trained on: the run is judged by these, and the tuner looks at them.
    awk 'NR % 100 != 8' "$work/own/$name.jsonl" > "$work/train/$name.jsonl"
    awk 'NR % 100 == 8' "$work/own/$name.jsonl" > "$work/held/$name.jsonl"
    ln -sf "../own/$name.states" "$work/train/$name.states"
  fi
}

say "questions the model asks itself"
python scripts/builtin_prompts.py "$work/open" --open-turns $questions
layerskip distill-data $base --prompts "$work/open/open.jsonl" --no-chat --separator "" --temperature 1 \
  --max-new-tokens $((tokens < 96 ? tokens : 96)) --batch $batch --output "$work/questions.jsonl"

say "prompts"
if [ ! -s "$work/prompts/sources.json" ]; then
  python scripts/builtin_prompts.py "$work/prompts" --data "$data" --questions "$work/questions.jsonl" --share $share
fi
judged=()
for file in human-eval/HumanEval.jsonl spec-bench/dev-120.jsonl cnn-dailymail/summarization.jsonl \
  xsum/summarization.jsonl gsm8k/test.jsonl.gz wikitext-2/test.txt; do
  [ ! -f "$data/$file" ] || judged+=(--judged "$data/$file")
done
[ ${#judged[@]} -eq 0 ] || python scripts/check_prompts.py --drop \
  --train "$work/prompts/asked.jsonl" --train "$work/prompts/continued.jsonl" "${judged[@]}"

say "its own answers"
mkdir -p "$work/own" "$work/train" "$work/held"
answer asked 256 $asked
answer continued 160 $continued --no-chat --separator ""
# What it wrote may be a text it is judged by, too.
[ ${#judged[@]} -eq 0 ] || python scripts/check_prompts.py --drop --train "$work/train" "${judged[@]}"

say "training"
resume=; [ -d "$work/run" ] && resume=--resume
[ -f "$work/run/config.json" ] ||
  layerskip train exit-adapter "model=$base" "data=$work/train" "eval_data=$work/held" "output=$work/run" \
    "${settings[@]}" $resume
# Six prompts of each kind that were not learnt from, without their answers.
python - "$work/held/asked.jsonl" > "$work/tune.jsonl" <<'PYTHON'
import json, sys
from collections import Counter
from pathlib import Path

seen = Counter()
for line in map(json.loads, Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()):
    seen[kind := line["id"].split(":")[0]] += 1
    if seen[kind] <= 6:
        print(json.dumps({"id": line["id"], "messages": line["messages"][:-1]}))
PYTHON
[ $size = smoke ] || layerskip tune "$work/run" --prompts "$work/tune.jsonl" --seconds 240 --save

say "the delta"
printf '{"licence": "Apache-2.0", "trained_on": "%s", "commit": "%s"}\n' \
  "$([ $size = gpu ] && echo a GPU || echo a CPU)" "$(git rev-parse --short HEAD 2>/dev/null || echo unknown)" \
  > "$work/about.json"
layerskip pack-delta $base "$work/run" --output "$work/smollm2-135m.safetensors" --size-mb 12 --about "$work/about.json"
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
speed=
if [ $size = smoke ]; then
  speed="--speed none"
else
  python benchmarks/sources.py --model "$work/model" --data "$data" --methods ar,default,lookup,exit,exit-4 \
    --threads 2 --trials 2 --save --name smollm2-135m
fi
python scripts/model_card.py $speed --run "$work/run" --sources "$work/prompts/sources.json" --train "$work/train" \
  --delta "$work/smollm2-135m.safetensors" --output "$work/smollm2-135m.md"

if [ -n "$install" ]; then
  cp "$work/smollm2-135m.safetensors" "$work/smollm2-135m.md" src/layerskip/checkpoint/
fi
say "done: $work/smollm2-135m.safetensors, $work/smollm2-135m.md"
