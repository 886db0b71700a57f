#!/usr/bin/env bash
# Measures the project on a machine with one GPU, unattended:
#
#     benchmarks/accelerator.sh OUTPUT_DIR
#     PARTS="ceilings base" benchmarks/accelerator.sh OUTPUT_DIR
#     TINY=1 benchmarks/accelerator.sh OUTPUT_DIR     # small sizes, to try it on any CPU
#
# PARTS are run in their order, each in a process of its own with its own time limit. A part that fails ends no other.
# OUTPUT_DIR gets accelerator.md, figures.jsonl and log.txt, and the programs and kernels of profiles.
set -uo pipefail
output=$(mkdir -p "$1" && cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
PARTS=${PARTS:-ceilings base attention decode agreement big tiny numbers tests decode-sizes}
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD/benchmarks:$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=2 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export XLA_PYTHON_CLIENT_PREALLOCATE=false # PyTorch needs some of the device's memory, too
tiny=${TINY:+--tiny}

part() { # SECONDS COMMAND...: adds what a command prints to the result
    local limit=$1 started=$SECONDS code
    shift
    timeout --signal=INT --kill-after=10 "$limit" "$@" 2>>"$output/log.txt" | tee -a "$output/accelerator.md"
    code=${PIPESTATUS[0]}
    printf '\n%s s, exit code %s\n\n' "$((SECONDS - started))" "$code" | tee -a "$output/accelerator.md"
    [ "$code" = 0 ] || tail -n 5 "$output/log.txt"
}

measure() { # SECONDS PART OPTIONS...
    local limit=$1
    shift
    part "$limit" "$PYTHON" -m accelerator "$@" --folder "$output" $tiny
}

# Tests of numbers, on the accelerator. They compare with float64 or NumPy, so products need the highest precision.
numeric_tests() {
    export JAX_DEFAULT_MATMUL_PRECISION=highest XLA_FLAGS=
    part 100 "$PYTHON" -m pytest -q --tb=line --maxfail=20 -p no:cacheprovider -o addopts= -o filterwarnings=default \
        tests/test_loss.py tests/test_attention.py tests/test_vocabulary.py tests/test_beam_search.py \
        tests/test_transformer.py
}

numbers() { # the default recipe from its command to its test
    local run
    run=$(mktemp -d)
    if ! "$PYTHON" -c 'from importlib.metadata import version; version("flax-transformer")' 2>/dev/null; then
        # The run card names the version of the package, which is not installed here.
        mkdir "$run/flax_transformer-0.dist-info"
        printf 'Metadata-Version: 2.1\nName: flax-transformer\nVersion: 0\n' >"$run/flax_transformer-0.dist-info/METADATA"
    fi
    part 150 env PYTHONPATH="$PYTHONPATH:$run" "$PYTHON" train.py --run "$run/numbers" ${TINY:+--training.steps 4}
    rm -rf "$run"
}

for name in $PARTS; do
    printf '\n## %s\n\n' "$name" >>"$output/accelerator.md"
    case $name in
        ceilings) measure 60 ceilings ;;
        base) measure 240 training --size base --profile ;;
        big) measure 200 training --size big ;;
        tiny) measure 150 training --size tiny --torch default reduce-overhead ;;
        base-ours) measure 150 training --size base --profile --torch ;;
        big-ours) measure 120 training --size big --torch ;;
        tiny-ours) measure 90 training --size tiny --torch ;;
        attention) measure 120 fused-attention ;;
        decode) measure 150 decoding --profile ;;
        decode-sizes) measure 200 decoding --batch-sizes 512 1 ;;
        agreement) measure 120 agreement ;;
        numbers) numbers ;;
        tests) (numeric_tests) ;;
        *) echo "unknown part: $name" >&2 ;;
    esac
done
