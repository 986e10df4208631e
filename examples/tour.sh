#!/usr/bin/env bash
# The whole line on the built-in model, in about a minute; the comments say what flows from where to where.
#
#   PATH=$PWD/.venv/bin:$PATH examples/tour.sh [MODEL] [FOLDER]
#
# MODEL is a folder, a hub id, or nothing for the built-in model; tables, pages and the narrow model go to FOLDER.
set -euo pipefail
model=${1:-builtin}
out=${2:-$(mktemp -d)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the built-in model is small: a second thread would mostly wait
step() { printf '\n== %s\n' "$*" >&2; }

# checkpoint -> vocabulary and budget.
# checkpoints/ reads headers and the tokenizer, no weights: names, shapes and roles of all tensors.
step "what the model is made of"
dimscope inspect "$model" --limit 5 -o "$out/model"

# embedding table -> moments -> spectrum -> dimensions, each beside its null.
# vectors/ streams the rows once into a d x d matrix; geometry/ takes everything else from that matrix.
step "how many dimensions the embedding table uses"
dimscope spectrum "$model" --permutations 1 --limit 12

# embedding table -> exact nearest neighbors, in all dimensions and in the first ten.
step "which tokens are near each other"
dimscope neighbors "$model" ' water' --k 5

# checkpoint -> model; text -> windows; both -> hidden states -> moments and a sample of rows -> dimensions by layer.
# texts/ knows no model and geometry/ no layers: activations/ joins them.
step "how many dimensions each layer uses"
dimscope layers "$model" --windows 2 --length 128 --shuffles 1 --no-random-weights -o "$out/layers"

# embedding table -> a map of its rows -> the model runs with the changed table -> loss, KL and agreement.
# interventions/ makes the maps from the same moments; evaluation/ knows no damage.
step "what breaks when dimensions are removed"
dimscope damage "$model" --truncate 75%,25% --noise 0.1 --draws 1 --windows 2 --length 128 -o "$out/damage"

# hidden states -> a basis -> all weights cut to it -> a smaller checkpoint, evaluated beside the dense model.
# narrowing/ rotates and cuts; checkpoints/ writes the files.
step "a model with three quarters of the width"
width=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["hidden_size"] * 3 // 4)' "$out/model/provenance.json")
dimscope narrow "$model" --width "$width" --windows 2 --length 128 -o "$out/narrow"

# The narrow model is an ordinary checkpoint: stock transformers loads it and generates.
step "the narrow model without dimscope"
python - "$out/narrow" <<'PYTHON'
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("Once upon a time", return_tensors="pt")
print(f"hidden size {model.config.hidden_size}, {model.num_parameters():,} parameters")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=24, do_sample=False)[0], skip_special_tokens=True))
PYTHON

step "tables and pages are in $out"
