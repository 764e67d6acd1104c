#!/usr/bin/env bash
# Publishes a model of make.sh, or of heal.sh if there is one: copies it OVER the weights, configuration and tokenizer
# at the root of the repository, then evaluates the root and its teacher, and writes their results, the tables of the
# pages and the pictures anew: all but results/two_stage.json, whose command is in docs/results.md.
# Usage: recipes/root_model/publish.sh DATA RUNS [TEACHER], as given to make.sh
# What was overwritten is in git. An evaluation that was interrupted goes on when the command is repeated.
set -euo pipefail
data=$(realpath "$1") runs=$(realpath -m "$2") minilm=sentence-transformers/all-MiniLM-L6-v2
teacher=${3:-$minilm}
[ -d "$teacher" ] && teacher=$(realpath "$teacher")
cd "$(dirname "$0")/../.."
[ -d "$runs/healed" ] && model=$runs/healed || model=$runs/gircse

# The root is the model; the code is here already. All files are looked for before the first one is overwritten.
files=(config.json model.safetensors processor_config.json tokenizer.json tokenizer_config.json)
for file in "${files[@]/#/$model/}" "$model/training_curves.png"; do
    [ -f "$file" ] || { echo "$file is missing: run the recipe that makes $model to its end first" >&2; exit 1; }
done
python -c "from sentence_transformers import MultiVectorEncoder"  # of several_vectors.py: 6.0 or newer
cp "${files[@]/#/$model/}" .
# In shards, which upload and resume one by one; it removes the file that was copied, and those of a model before.
python - <<'END'
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file

save_torch_state_dict(load_file("model.safetensors"), ".", max_shard_size="85MB")
END
cp "$model/training_curves.png" assets/training_curves.png

# Results don't tell where the data and the runs lay, so that the commands read the same wherever they were made.
keep() { sed -e "s#$data/#DATA/#g" -e "s#$runs/#runs/#g" -e "s#$teacher#$minilm#g" "$1" > "$2"; }

# 256 tokens a text for both models alike, which is also where MiniLM cuts by itself. The batch changes the time alone.
settings=(--tasks local --data "$data/eval" --max_length 256 --batch_size 64)
python evaluate_gircse.py --model . "${settings[@]}" --dtype bfloat16 --output_dir "$runs/eval-root"
keep "$runs/eval-root/results.json" results/root.json
python evaluate_gircse.py --model "$teacher" --model_name "$minilm" "${settings[@]}" --output_dir "$runs/eval-minilm"
keep "$runs/eval-minilm/results.json" results/minilm.json
settings=(--data "$data/eval" --max_length 256 --batch_size 64 --dtype bfloat16)
for name in unequal_steps several_vectors; do
    [ $name = unequal_steps ] && tasks=(retrieval_xquad_en) || tasks=(retrieval_xquad_en retrieval_scitldr)
    python recipes/paper/$name.py --model . --tasks "${tasks[@]}" "${settings[@]}" --output "$runs/$name.json"
    keep "$runs/$name.json" results/$name.json
done
python recipes/figures/draw_tokens.py --model . assets/tokens.png
python recipes/figures/report_results.py
