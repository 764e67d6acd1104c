#!/usr/bin/env bash
# Makes the root model from nothing: tokenizer and backbone, then GIRCSE training, then the scores before and after.
# Usage: recipes/train_root_model.sh DATA RUNS
#   DATA  a folder with text/*.txt.gz (a document a line), train/*.jsonl.gz (pairs, see data_gircse.py) and
#         eval/sts_stsbenchmark_test.jsonl.gz
#   RUNS  where the backbone and the trained model go; both steps go on from their last checkpoint when repeated
set -euo pipefail
data=$(realpath "$1") runs=$2
cd "$(dirname "$0")/.."
mkdir -p "$runs/pairs"

[ -f "$runs/backbone/model.safetensors" ] ||
    python recipes/pretrain_backbone.py --text "$data/text/*.txt.gz" --output_dir "$runs/backbone"

# The MEDI triplets state no licence: they stay out of weights that are published.
for file in "$data"/train/*.jsonl.gz; do
    [ "$(basename "$file")" = nli_medi_1000.jsonl.gz ] || ln -sf "$file" "$runs/pairs/"
done
resume=""
compgen -G "$runs/gircse/checkpoint-*/trainer_state.json" > /dev/null && resume="--resume_from_checkpoint last"
python train_gircse.py --model_name_or_path "$runs/backbone" --train_data "$runs/pairs" --output_dir "$runs/gircse" \
    --tuning full --learning_rate 3e-4 --temperature 0.05 --k 5 --num_steps 5 --num_negatives 1 --max_length 128 \
    --held_out 512 --per_device_train_batch_size 64 --sub_batch_size 48 --max_steps 800 --mix_sources --bf16 \
    --save_dtype bfloat16 --save_steps 250 --save_total_limit 1 --symmetric_sources goemotions cad_imdb_sentiment cad_imdb_content \
    clinc150_domain banking77 clinc150_intent snips stsb snli cad_nli $resume

# The root is the model: its weights, configuration and tokenizer; the code is here already.
for file in config.json model.safetensors processor_config.json tokenizer.json tokenizer_config.json; do
    cp "$runs/gircse/$file" .
done
cp "$runs/gircse/training_curves.png" assets/training_curves.png
python recipes/sts_spearman.py --data "$data/eval/sts_stsbenchmark_test.jsonl.gz" --plot assets/k_curve.png \
    --model "before training=$runs/backbone" "after training=."
