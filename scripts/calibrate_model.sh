#!/usr/bin/env bash
# Calibrate a model for FP8 inference: the flags of vllm-gaudi's calibrate_model.sh,
# the work of `gaudi-calib calibrate`. Relative paths are the caller's.
set -euo pipefail

usage() {
    cat <<'EOF'
Usage: calibrate_model.sh -m MODEL -d DATASET -o OUT [options] [-- options of gaudi-calib calibrate]

Measures a model, computes its FP8 scales and prints the QUANT_CONFIG path and the serve command.

  -m MODEL    required: directory or Hugging Face name of the model
  -d DATASET  required: dataset file, directory or Hugging Face name, or `builtin`;
              repeatable, also as DATASET=WEIGHT
  -o OUT      required: directory to write OUT/<model>/ into
  -b SIZE     batch size of the measurement (default: 32)
  -l COUNT    number of samples taken from the dataset (default: all)
  -t SIZE     tensor parallel size to calibrate for (default: 1)
  -r RANKS    also unify to this many ranks; must divide -t
  -u          expert parallelism: ranks hold whole experts
  -e          enforce eager execution
  -h          show this help

Example: calibrate_model.sh -m ./Llama-3.1-8B-Instruct -d builtin -o ./out -t 2 -r 1
EOF
}

fail() {
    printf 'Error: %s\n  fix:   %s\n' "$1" "$2" >&2
    exit 2
}

find_program() {
    local here
    here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    command -v gaudi-calib && return
    [[ -x $here/.venv/bin/gaudi-calib ]] && echo "$here/.venv/bin/gaudi-calib" && return
    return 1
}

model='' out='' datasets=() arguments=()
# getopts knows no long options, and a path after `--` may be called --help.
[[ ${1-} == --help ]] && { usage; exit 0; }
while getopts ':m:d:o:b:l:t:r:ueh' flag; do
    case $flag in
        m) model=$OPTARG ;;
        d) [[ $OPTARG ]] && datasets+=(-d "$OPTARG") ;;
        o) out=$OPTARG ;;
        b | l | t | r) arguments+=("-$flag" "$OPTARG") ;;
        u | e) arguments+=("-$flag") ;;
        h) usage; exit 0 ;;
        :) fail "-$OPTARG needs a value" "$0 -h shows every option" ;;
        *) fail "no such option: -$OPTARG" "$0 -h shows every option" ;;
    esac
done
parsed=$((OPTIND - 1))
if (($# > parsed)) && [[ $parsed == 0 || ${!parsed} != -- ]]; then
    fail "unexpected argument: ${!OPTIND}" "put options of gaudi-calib calibrate after --"
fi
shift "$parsed"

[[ $model ]] || fail "-m is missing" "give the directory or Hugging Face name of the model: -m MODEL"
((${#datasets[@]})) || fail "-d is missing" "give a dataset, or the one that is shipped: -d builtin"
[[ $out ]] || fail "-o is missing" "give the directory to write to: -o OUT"
program=$(find_program) || fail "gaudi-calib is not installed" "pip install gaudi-calib, or run make venv in the repository"

exec "$program" calibrate -m "$model" "${datasets[@]}" -o "$out" "${arguments[@]}" "$@"
