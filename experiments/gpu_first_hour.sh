#!/usr/bin/env bash
# One command that settles on an NVIDIA GPU what no machine without one can say, the most valuable first.
#
#   bash experiments/gpu_first_hour.sh                 25 minutes; results in runs/gpu_first_hour/ as soon as they are there
#   SMALL=1 bash experiments/gpu_first_hour.sh         the same steps in Triton's interpreter, small: a rehearsal of 4 minutes
#   STEPS="machine correct" bash ...                   some of the steps only
#   MINUTES=10 FOLDER=/elsewhere PYTHON=python3 bash ...
#
# A step that fails or runs out of its time does not stop the next ones. steps.txt says how each ended. What a step
# prints is in STEP.txt, its rows in gpu_*.jsonl and mqar_cell.jsonl, line by line: a run that is cut loses nothing.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
FOLDER=${FOLDER:-runs/gpu_first_hour}
STEPS=${STEPS:-machine correct speed step ncu tests sanitizer cell}
MINUTES=${MINUTES:-25}
SMALL=${SMALL:-}
mkdir -p "$FOLDER" || exit 1

if [ -n "$SMALL" ]; then
    export TRITON_INTERPRET=1
    SPEED="--lengths 64 128 --tokens 128"
    CELL="--lengths 32 --pairs 4 --d-models 16 --seeds 0 --epochs 1 --examples 64 --test-examples 8 --test-lengths 32"
    CELL="$CELL --learning-rates .003 --vocab-size 64"
    MINUTES=60
    NCU=""
    SANITIZER=""
else
    SPEED=""
    CELL="--preset paper-ladder --lengths 256 --pairs 32 --d-models 32"
    NCU="ncu --set full --clock-control none --kernel-name regex:.*_kernel --launch-count 14"
    SANITIZER="compute-sanitizer --tool memcheck"
fi

# run NAME SECONDS COMMAND...: its output goes to NAME.txt line by line, its end to steps.txt
run() {
    local name=$1 limit=$2 started=$SECONDS status
    shift 2
    [[ " $STEPS " == *" $name "* ]] || return
    if ! command -v "$1" > /dev/null; then
        echo "$name: left out, $1 is not installed" | tee -a "$FOLDER/steps.txt"
        return
    fi
    [ -n "$SMALL" ] && limit=$((4 * limit))  # the limits are meant for a card
    echo "== $name (at most $limit s)"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$FOLDER/$name.txt"
    status=${PIPESTATUS[0]}
    [ "$status" = 124 ] && status="out of time"
    echo "$name: ended with $status after $((SECONDS - started)) s" | tee -a "$FOLDER/steps.txt"
}
BENCHMARK=("$PYTHON" -u -m experiments.benchmark_gpu --rows "$FOLDER")

run machine 60 "$PYTHON" -c "
import torch, triton
print('torch', torch.__version__, 'triton', triton.__version__)
print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU')"
# 1. Is it right, in every type; does any bit move between runs?
run correct 300 "${BENCHMARK[@]}" correct
# 2. How fast, beside softmax and flash-linear-attention, T = 8,192 first; then the variants of the kernels
run speed 480 "${BENCHMARK[@]}" speed --variants $SPEED --figure "$FOLDER/speed.png"
# 3. A training step of the language models of 147 M parameters at T = 4,096
run step 120 "${BENCHMARK[@]}" step
# 4. Where the time goes: occupancy, reasons of stalls, bank conflicts of the five kernels
run ncu 150 $NCU "$PYTHON" -c "
import torch
from rebased import triton_kernels as gpu
heads, T, options = 1, 128, {}
if torch.cuda.is_available():
    heads, T, options = 128, 8192, {'device': 'cuda', 'dtype': torch.bfloat16}
q, k = (torch.rand(heads, 1, T, 16, **options).requires_grad_() for _ in 'qk')
v = torch.rand(heads, 1, T, 64, **options).requires_grad_()
for _ in range(2):
    gpu.chunked_attention(q, k, v, (0, 0, 1)).sum().backward()
print('gradients are finite:', q.grad.isfinite().all().item())"
# 5. The tests that need a GPU; then memory: reads and writes beyond a tensor
TESTS=("$PYTHON" -m pytest -v -p no:cacheprovider)
run tests 150 "${TESTS[@]}" tests/test_triton_kernels.py tests/test_benchmark_gpu.py -k "not interpreter and not compiled"
run sanitizer 120 $SANITIZER "${TESTS[@]}" tests/test_triton_kernels.py -k "any_size or equals_the_definition"
# 6. Table 1's cell (L 256, d 32, 32 pairs), for what is left of the minutes; the next call goes on from there
LEFT=$((60 * MINUTES - SECONDS))
run cell $((LEFT > 60 ? LEFT : 60)) "$PYTHON" -u -m experiments.mqar $CELL --mixers rebased based x2 \
    --output "$FOLDER/mqar_cell.jsonl" --figure "$FOLDER/mqar_cell.png"
echo
cat "$FOLDER/steps.txt"
