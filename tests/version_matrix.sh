#!/usr/bin/env bash
# Runs the tests of loading, embedding, serving and Sentence Transformers on several versions of transformers,
# each in a virtual environment of its own, and prints a table. Usage: tests/version_matrix.sh [VERSION ...]     (default: 4.51.3 4.57.* 5.0.* and the newest 5.x)
set -uo pipefail
cd "$(dirname "$0")/.."
versions=("$@")
[ ${#versions[@]} -gt 0 ] || versions=("4.51.3" "4.57.*" "5.0.*" "5.*")
tests=(modeling speed processing losses loading handler sentence_transformers)
files=("${tests[@]/#/tests/test_}") && files=("${files[@]/%/.py}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
table="| transformers | python | torch | result |\n|---|---|---|---|\n"
failed=0
for version in "${versions[@]}"; do
    environment="$work/transformers-${version//\*/x}"
    python3 -m venv "$environment" &&
        "$environment/bin/pip" install -q -r requirements-train.txt pytest orjson sentence-transformers "transformers==$version" || { failed=1; continue; }
    HF_HOME="$environment/hf" "$environment/bin/python" -m pytest -q -p no:cacheprovider "${files[@]}" 2>&1 | tee "$environment/log"
    [ "${PIPESTATUS[0]}" -eq 0 ] || failed=1
    read -r transformers torch < <("$environment/bin/python" -c \
        "import torch, transformers; print(transformers.__version__, torch.__version__)")
    python=$("$environment/bin/python" -c "import platform; print(platform.python_version())")
    table+="| $transformers | $python | $torch | $(tail -n 1 "$environment/log" | tr -d '=' | sed 's/^ *//; s/ *$//') |\n"
done
printf "\n$table"
exit $failed
