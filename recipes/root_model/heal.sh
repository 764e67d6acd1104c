#!/usr/bin/env bash
# Trains some of the root model's layers once more: they start from SmolLM2's again, and the others stay as make.sh has
# left them. The published weights have come about so, ten layers and then two of the ten; make.sh by itself makes a
# whole model.
# Usage: recipes/root_model/heal.sh BACKBONE DATA RUNS, after make.sh with the same arguments
# The model ends in RUNS/healed. Two CPU cores with bfloat16 instructions take two hours; when the command is repeated,
# it goes on from its last checkpoint.
set -euo pipefail
[ -d "$1" ] && backbone=$(realpath "$1") || backbone=$1
data=$(realpath "$2") runs=$(realpath -m "$3")
cd "$(dirname "$0")/../.."

pairs=(
    --pairs 9600 --longest 800 # most can be read whole
    --label_classes --twice cad_imdb_sentiment  # as in make.sh
)
[ -f "$runs/short_pairs.jsonl" ] ||
    python recipes/choose_pairs.py --data "$data" --output "$runs/short_pairs.jsonl" "${pairs[@]}"

training=(
    --tuning full
    --per_device_train_batch_size 16
    --learning_rate 2e-4       # not tuned
    --temperature 0.05         # as in make.sh
    --k 10                     # more steps than make.sh's 5, so that later ones don't lose what earlier ones have
    --teacher_weight 40        # make.sh's 20, for twice the steps
    --teacher_batch_size 32 --steps 5 10
    --max_length 192
    --held_out 0
    --bf16 --attn_implementation eager  # faster than SDPA on a CPU, for short texts (docs/speed.md)
    --save_dtype bfloat16
    --save_steps 30 --save_total_limit 1
)

# heal FROM TO WEIGHTS STEPS: the model of RUNS/FROM with the weights whose names match trained anew, in RUNS/TO
heal() {
    local weights=$3 resumed=()
    [ -f "$runs/$2/model.safetensors" ] && return
    [ -f "$runs/$2-reset/model.safetensors" ] ||
        python recipes/root_model/reset_weights.py "$runs/$1" "$backbone" "$runs/$2-reset" --weights "$weights"
    compgen -G "$runs/$2/checkpoint-*/trainer_state.json" > /dev/null && resumed=(--resume_from_checkpoint last)
    python recipes/root_model/train_with_teacher.py --vectors "$runs/aligned" \
        --model_name_or_path "$runs/$2-reset" --train_data "$runs/short_pairs.jsonl" --output_dir "$runs/$2" \
        "${training[@]}" --only "$weights" --max_steps "$4" "${resumed[@]}"
}

# The numbers of steps are not tuned.
heal gircse healed_once 'layers[.]([3-9]|2[89])[.]|layers[.]27[.](mlp|post|self)|model[.]norm' 250
# In the published run the vectors were those of 8,000 texts, aligned with RUNS/healed-reset.
heal healed_once healed 'layers[.](8[.](mlp|post|self)|9[.])|model[.]norm' 100
