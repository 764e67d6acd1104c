#!/usr/bin/env bash
# Makes the root model: the teacher's vectors, distillation, GIRCSE training.
# Usage: recipes/root_model/make.sh BACKBONE DATA RUNS [TEACHER]
#   BACKBONE SmolLM2-135M-Instruct: HuggingFaceTB/SmolLM2-135M-Instruct or its folder
#   DATA     a folder with text/, train/ and eval/ (recipes/DATA.md; recipes/check_data.py checks one)
#   RUNS     where all that is made goes; when the command is repeated, distillation goes on from its last checkpoint,
#            and no step that is done is done again
#   TEACHER  a Sentence Transformers model, by default sentence-transformers/all-MiniLM-L6-v2
# The model ends in RUNS/gircse, and no file of the repository changes: publish.sh copies it to the root.
#
# A reason stands beside each number that is not the script's default.
# "not tuned" means that no comparison with another value is on record; so it is with the defaults.
set -euo pipefail
[ -d "$1" ] && backbone=$(realpath "$1") || backbone=$1
data=$(realpath "$2") runs=$(realpath -m "$3") teacher=${4:-sentence-transformers/all-MiniLM-L6-v2}
[ -d "$teacher" ] && teacher=$(realpath "$teacher")
cd "$(dirname "$0")/../.."
mkdir -p "$runs"

# The MEDI triplets state no licence: they stay out of weights that are published.
mapfile -t files < <(ls "$data"/text/*.txt.gz "$data"/train/*.jsonl.gz | grep -v nli_medi_1000)
texts=(
    --most_of_a_file 8000     # so that dictionaries and novels don't outweigh the rest; not tuned
    --long_of_a_file 500      # whole documents, which would otherwise be known by their sentences alone; not tuned
)
[ -f "$runs/teacher/vectors.npy" ] ||
    python recipes/root_model/teacher_vectors.py --text "${files[@]}" --teacher "$teacher" "${texts[@]}" \
        --output_dir "$runs/teacher"

[ -f "$runs/aligned/vectors.npy" ] ||
    python recipes/root_model/align_vectors.py --model_name_or_path "$backbone" --vectors "$runs/teacher" \
        --output_dir "$runs/aligned"

# CUDA graphs, since one process launches kernels too slowly to keep a GPU busy with so small a model (graphs.py). Each
# length has a graph of its own, which keeps its memory: all together, up to 120 GB. For a smaller GPU, smaller batches;
# without one, leave the lengths out.
gpu=(--attn_implementation eager --graph_lengths)
distillation=(
    --num_steps 5              # beyond which the model gains nothing
    --max_steps 700            # 150 s of an H200
    --batch_size 256           # not tuned
    --learning_rate 4e-4       # for batches of 256; not tuned
    --max_length 96            # longer texts take memory; the teacher's vector is of the whole text
    --most_tokens 0            # none with 10 steps, for memory
    "${gpu[@]}" 40 64 96
)
[ -f "$runs/distilled/model.safetensors" ] ||
    python recipes/root_model/distil.py --model_name_or_path "$backbone" --vectors "$runs/aligned" \
        "${distillation[@]}" --output_dir "$runs/distilled"

pairs=(
    --pairs 22400 --longest 2000  # of some sources all
    --label_classes               # so that batches of film reviews are of reviews alone, and their opposites count
    --twice cad_imdb_sentiment    # the one source that asks for what a teacher of whole meanings doesn't see
)
[ -f "$runs/pairs.jsonl" ] ||
    python recipes/choose_pairs.py --data "$data" --output "$runs/pairs.jsonl" "${pairs[@]}"

training=(
    --tuning full              # as in distillation; not tuned
    --max_steps 330            # 150 s of an H200
    --per_device_train_batch_size 48  # for memory
    --learning_rate 1e-4       # the best of three for SmolLM2-135M (results/comparison/learning_rates.json)
    --temperature 0.05         # tau: the teacher's cosines are on this scale (its own was trained at 0.05)
    --teacher_weight 20        # beside the sum of 5 steps; not tuned
    --teacher_batch_size 64    # for memory
    --most_tokens 3072         # with 10 steps: texts of up to 48 tokens
    --max_length 192           # of the pairs' long documents, for memory
    --held_out 0               # it is evaluated as a whole
    --bf16 "${gpu[@]}" 48 96 --pair_graph_lengths 80 --dataloader_num_workers 2
    --save_dtype bfloat16      # half the size of the published file
    --save_strategy no         # a run takes minutes
)
[ -f "$runs/gircse/model.safetensors" ] ||
    python recipes/root_model/train_with_teacher.py --vectors "$runs/aligned" \
        --model_name_or_path "$runs/distilled" --train_data "$runs/pairs.jsonl" --output_dir "$runs/gircse" \
        "${training[@]}"

echo "The model is in $runs/gircse. To see how it does before anything is overwritten:"
echo "  python evaluate_gircse.py --model $runs/gircse --tasks local --data $data/eval --sample 500 --max_length 256" \
    "--output_dir $runs/eval-gircse"
echo "To copy it over the root's files, and write the root's scores, tables and pictures anew:"
echo "  recipes/root_model/publish.sh $data $runs $teacher"
