#!/usr/bin/env bash
# Test on Rain100H, then on Rain100L. Extra arguments go to test.py:
#
#     bash main.sh --device cuda
#
# A set that is not under datasets/test is named, and the bundled sample is tested instead.
set -euo pipefail
cd "$(dirname "$0")"

sample=false
for name in Rain100H Rain100L; do
    if [ -d "datasets/test/$name" ]; then
        echo "== $name"
        python test.py --test_data_path "datasets/test/$name" --output_path "results/$name/Model11" "$@"
    else
        echo "datasets/test/$name is not there: README.md, section Data, says where to get it; testing the bundled sample instead"
        sample=true
    fi
done
if $sample; then
    echo "== RainSample"
    python test.py --test_data_path datasets/test/RainSample --output_path results/RainSample/Model11 "$@"
fi
