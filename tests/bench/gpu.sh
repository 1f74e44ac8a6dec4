#!/usr/bin/env bash
# What only a GPU can say, meant for five minutes of an H100: the speed of a training step, where its time goes, and which changes
# of it pay; and in ten more whether a search finds a better mixture than uniform at the size of pythia-70m, and what that
# mixture does for pythia-410m.
#
#     bash tests/bench/gpu.sh [DATA [SIDE …]]         # sides of tests.bench beside reweight, such as "litgpt compiled", if installed
#     MINUTES=15 bash tests/bench/gpu.sh              # with enough time for all of it
#
# DATA should have ten documents or more of every domain to measure on: prepare.py --val-fraction 0.2 --test-fraction 0.1.
#
# A part ends after the seconds that stand before it, and all of them after the minutes; the search, which comes last, goes on
# where it was stopped when this is called again.
set -euo pipefail
cd "$(dirname "$0")/../.."
data=${1:-data/sample}

part() {
    local limit=$((60 * ${MINUTES:-5} - SECONDS))
    printf '\n[%d s] %s\n' "$SECONDS" "${*:2}"
    if ((limit > $1)); then limit=$1; fi
    if ((limit < 1)); then echo "no time left"; return; fi
    timeout --kill-after=5 "$limit" "${@:2}" || echo "(status $?, which is 124 where its $limit s were over)"
}

nvidia-smi -L
for side in reweight "${@:2}"; do
    part 50 python -m tests.bench --tasks train --turns 3 --sides "$side" --models pythia-70m --sequences 32
    part 50 python -m tests.bench --tasks train --turns 3 --sides "$side" --models pythia-410m --sequences 16
    part 60 python -m tests.bench --tasks train --turns 3 --sides "$side" --models pythia-1b --sequences 8
done
part 50 python tests/bench/variants.py --profile
part 150 python tests/bench/variants.py --turns 3
part 120 python tests/bench/variants.py --turns 2 --steps 1 --micro-batches 8 --only "cast once"
# Whether larger micro-batches than train.py's, 8 of 64 sequences, would pay.
for model in pythia-70m pythia-410m pythia-1b; do
    for rows in 8 16; do
        part 40 python tests/bench/variants.py --turns 2 --steps 1 --only present --model "$model" --sequences "$rows" \
            --micro-batches $((64 / rows))
    done
done
test -d "$data" || part 60 python prepare.py
part 600 python tests/bench/scoreboard.py --data "$data" --model scratch:pythia-70m --seq-len 1024 --lr 1e-3 \
    --base-sequences 8000 --eval-sequences 200 --seeds 2 --runs 0 --rows experts "reweight multiplicative" "reweight, excess" \
    --transfer experts --larger pythia-410m --out out/gpu
