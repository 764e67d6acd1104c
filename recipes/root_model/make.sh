#!/usr/bin/env bash
# Makes the root model from nothing: tokenizer and backbone, distillation, GIRCSE training, then its scores.
# Usage: recipes/root_model/make.sh DATA RUNS [TEACHER]
#   DATA     a folder with text/*.txt.gz (a document a line), train/*.jsonl.gz (pairs, see gircse/training/pairs.py) and eval/
#            (gircse/evaluation/tasks.py)
#   RUNS     where all that is made on the way goes; every step goes on from its last checkpoint when repeated
#   TEACHER  a Sentence Transformers model with vectors of 384 numbers, by default sentence-transformers/all-MiniLM-L6-v2
set -euo pipefail
data=$(realpath "$1") runs=$(realpath -m "$2") minilm=sentence-transformers/all-MiniLM-L6-v2
teacher=${3:-$minilm}
[ -d "$teacher" ] && teacher=$(realpath "$teacher")
cd "$(dirname "$0")/../.."
mkdir -p "$runs/pairs" "$runs/sample" results

# The MEDI triplets state no licence: they stay out of weights that are published. Of each file at most 4,000 pairs are
# trained on, so that the dictionaries don't outweigh the tasks. Batches are of one source, but texts of few classes,
# whose rows don't say which, would be false negatives of each other there: these sources count as one.
classes="goemotions|cad_imdb_sentiment|cad_imdb_content|clinc150_domain|banking77|clinc150_intent|snips"
for file in "$data"/train/*.jsonl.gz; do
    name=$(basename "$file")
    [ "$name" = nli_medi_1000.jsonl.gz ] && continue
    ln -sf "$file" "$runs/pairs/"
    [ -f "$runs/sample/$name" ] && continue
    gzip -dc "$file" | shuf -n 4000 --random-source="$file" |
        sed -E "s/\"source\": \"($classes)\"/\"source\": \"classes\"/" | gzip -n > "$runs/sample.part"
    mv "$runs/sample.part" "$runs/sample/$name"
done
texts=("$data/text/*.txt.gz" "$runs/pairs/*.jsonl.gz")

[ -f "$runs/teacher/vectors.npy" ] ||
    python recipes/root_model/teacher_vectors.py --text "${texts[@]}" --teacher "$teacher" --output_dir "$runs/teacher"
[ -f "$runs/backbone/pretraining.json" ] ||
    python recipes/root_model/pretrain_backbone.py --text "${texts[@]}" --vectors "$runs/teacher" --vocab_size 16384 \
        --num_layers 4 --num_key_value_heads 6 --max_steps 1300 --output_dir "$runs/backbone"
[ -f "$runs/distilled/model.safetensors" ] ||
    python recipes/root_model/distil.py --model_name_or_path "$runs/backbone" --vectors "$runs/teacher" \
        --damping 0.1 --learning_rate 5e-4 --num_steps 5 --epochs 0.7 --output_dir "$runs/distilled"
resume=""
compgen -G "$runs/gircse/checkpoint-*/trainer_state.json" > /dev/null && resume="--resume_from_checkpoint last"
[ -f "$runs/gircse/model.safetensors" ] ||
    python recipes/root_model/train_with_teacher.py --vectors "$runs/teacher" --teacher_weight 4 \
        --model_name_or_path "$runs/distilled" --train_data "$runs/sample" --output_dir "$runs/gircse" --tuning full \
        --learning_rate 3e-4 --temperature 0.05 --k 20 --reduction mean --num_negatives 1 --max_length 96 \
        --held_out 512 --per_device_train_batch_size 64 --max_steps 150 --bf16 \
        --save_dtype bfloat16 --save_steps 100 --save_total_limit 1 \
        --symmetric_sources classes stsb snli cad_nli $resume

# The root is the model: its weights, configuration and tokenizer; the code is here already.
for file in config.json model.safetensors processor_config.json tokenizer.json tokenizer_config.json; do
    cp "$runs/gircse/$file" .
done
cp "$runs/gircse/training_curves.png" assets/training_curves.png

# Results don't tell where the data and the runs lay, so that the commands read the same wherever they were made.
keep() { sed -e "s#$data/#DATA/#g" -e "s#$runs/#runs/#g" -e "s#$teacher#$minilm#g" "$1" > "$2"; }
keep "$runs/backbone/pretraining.json" results/pretraining.json

settings=(--tasks local --data "$data/eval" --max_length 256 --batch_size 64)
python evaluate_gircse.py --model . "${settings[@]}" --output_dir "$runs/eval-root"
keep "$runs/eval-root/results.json" results/root.json
python evaluate_gircse.py --model "$teacher" --model_name "$minilm" "${settings[@]}" --output_dir "$runs/eval-minilm"
keep "$runs/eval-minilm/results.json" results/minilm.json
python recipes/paper/unequal_steps.py --model . --data "$data/eval" --max_length 256 --output "$runs/unequal_steps.json"
keep "$runs/unequal_steps.json" results/unequal_steps/root.json
python recipes/figures/draw_tokens.py --model . assets/tokens.png
python recipes/figures/report_results.py
