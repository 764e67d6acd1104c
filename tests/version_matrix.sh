#!/usr/bin/env bash
# Runs the tests of loading, embedding, serving, Sentence Transformers, training and publishing on several versions of
# transformers, each in a virtual environment of its own with the versions of the other packages that pip matches to it,
# and prints a table. The oldest transformers comes with the oldest of all other packages that requirements*.txt allow,
# torch aside. Usage: tests/version_matrix.sh [VERSION[@PYTHON] ...]; the default is below.
set -uo pipefail
cd "$(dirname "$0")/.."
versions=("$@")
# The last entry is what pip installs by default, on the newest Python that torch is built for.
[ ${#versions[@]} -gt 0 ] || versions=("4.51.3" "4.57.*" "5.0.*" "5.23.*" "5.24.*" "*@python3.13")
tests=(
    modeling backbones laser prefill speed processing losses
    loading loading_dtype round_trip remote_code merged_adapters adapters hub
    handler serving sentence_transformers sentence_saving
    rows pairs pairs_columns pairs_hub bad_rows data collator
    gradient_cache accuracy training_arguments training_start training_processes training_resume training_log
    training_export convert autoregembed
    readme # whose block with two adapters the newest transformers runs with a newer peft alone
)
files=("${tests[@]/#/tests/test_}") && files=("${files[@]/%/.py}")
packages=(torch transformers sentence-transformers peft huggingface-hub)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
table="| python | $(printf '%s | ' "${packages[@]}")result |\n|---|$(printf -- '---|%.0s' "${packages[@]}")---|\n"
sed -nE '/^(torch|transformers)>/d; s/^([a-z_-]+)>=([0-9.]+).*/\1==\2/p' requirements{,-train,-dev}.txt >"$work/oldest"
failed=0
for leg in "${versions[@]}"; do
    version="${leg%@*}" python=python3
    [ "$version" = "$leg" ] || python="${leg#*@}"
    [ "$version" = 4.51.3 ] && oldest=(-c "$work/oldest") || oldest=()
    environment="$work/transformers-${leg//\*/x}"
    "$python" -m venv "$environment" &&
        "$environment/bin/pip" install -q -r requirements-train.txt pytest orjson sentence-transformers \
            "transformers==$version" "${oldest[@]}" || { failed=1; continue; }
    HF_HOME="$environment/hf" "$environment/bin/python" -m pytest -q -p no:cacheprovider "${files[@]}" 2>&1 |
        tee "$environment/log"
    [ "${PIPESTATUS[0]}" -eq 0 ] || failed=1
    found=$("$environment/bin/python" -c "
import platform, sys
from importlib.metadata import version
print(platform.python_version(), *map(version, sys.argv[1:]), sep=' | ')" "${packages[@]}")
    table+="| $found | $(tail -n 1 "$environment/log" | tr -d '=' | sed 's/^ *//; s/ *$//') |\n"
done
printf "\n$table"
exit $failed
