#!/usr/bin/env bash
# Test on Rain100H and on Rain100L, each with the bundled model that is best there. Extra arguments go to test.py:
#
#     bash main.sh --device cuda
#     bash main.sh --save_path CHECKPOINT
#
# The images go to results/SET/MODEL. A set that is not under datasets/test is named, and the bundled sample is tested
# instead.
set -euo pipefail
cd "$(dirname "$0")"

derain() {  # SET MODEL [OPTION...]
    echo "== $1"
    python test.py --save_path "logs/SAPNet/$2" --test_data_path "datasets/test/$1" "${@:3}"
}

sample=false
for pair in Rain100H:Model11 Rain100L:Rain100L; do
    name=${pair%:*} model=${pair#*:}
    if [ -d "datasets/test/$name" ]; then
        derain "$name" "$model" "$@"
    else
        echo "datasets/test/$name is not there: README.md, section Data, says where to get it; testing the bundled sample instead"
        sample=true
    fi
done
if $sample; then
    derain RainSample Model11 "$@"
fi
