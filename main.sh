#!/usr/bin/env bash
# Test Rain100H with the weights for heavy rain and Rain100L with those for light rain. Once a run of yours has left
# weights in logs/SAPNet/Model11, both sets are tested with those. Further arguments go to test.py and win over those
# given here:
#
#     bash main.sh --device cuda
#     bash main.sh --save_path CHECKPOINT
#
# Paths in these are relative to this file's folder. A set that is not under datasets/test is named, and the bundled
# sample is tested instead.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")"

for argument in "$@"; do
    case $argument in
    --test_data_path* | --output_path* | --results_path*)
        echo "main.sh: error: ${argument%%=*}: each set here has its own; expected this option for test.py" >&2
        exit 2
        ;;
    esac
done

missing=false
derain() {  # SET [OPTION...]
    if [ -d "datasets/test/$1" ]; then
        echo "== python test.py --test_data_path datasets/test/$1 ${*:2}"
        python test.py --test_data_path "datasets/test/$1" "${@:2}"
    else
        echo "datasets/test/$1 is not there: README.md, section Data, says where to get it"
        missing=true
    fi
}

heavy=weights/heavy.pth
light=weights/light.pth
if [ -e logs/SAPNet/Model11/net_latest.pth ]; then
    heavy=logs/SAPNet/Model11
    light=logs/SAPNet/Model11
fi
derain Rain100H --save_path "$heavy" "$@"
derain Rain100L --save_path "$light" "$@"
if $missing; then
    derain RainSample "$@"
fi
