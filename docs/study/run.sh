#!/usr/bin/env bash
# The study of docs/study.md, from base model to report; that page says what it took on which machine.
#   docs/study/run.sh OUTPUT_FOLDER
# It can be stopped at any time; the same command goes on where it was.
set -euo pipefail
out=$1
ood=arc_challenge,commonsense_qa,hellaswag
ood+=,mmlu_astronomy_continuation,mmlu_conceptual_physics_continuation
ood+=,mmlu_high_school_geography_continuation,mmlu_sociology_continuation

for l2 in 0 1; do
  lora-ensemble train smollm2_arc_easy output="$out/lambda_$l2" lora_l2=$l2 \
    epochs=6 max_steps=null train_limit=100 schedule=constant validation_limit=0
  lora-ensemble sweep "$out/lambda_$l2" --epochs 0,1,3,6 --tasks arc_easy --limit 100 \
    --output "$out/sweeps/lambda_${l2}_in" --model_args dtype=float32
  lora-ensemble sweep "$out/lambda_$l2" --epochs 0,1,3,6 --tasks $ood --limit 30 \
    --output "$out/sweeps/lambda_${l2}_out" --model_args dtype=float32
done

flags=$(printf -- ' --ood %s' ${ood//,/ })
# shellcheck disable=SC2086
lora-ensemble report "$out"/sweeps/* $flags --output "$out/report" --figures 40 --title "LoRA ensembles on ARC-Easy"
