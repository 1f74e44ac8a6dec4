#!/usr/bin/env bash
# What only a GPU can say, meant for five minutes of an H100: the speed of a training step and, at the size of pythia-70m,
# whether a search finds a better mixture than uniform, with two seeds. Each command goes on where it was stopped.
#
#     bash tests/bench/gpu.sh [DATA [SIDE …]]         # sides of tests.bench beside reweight: transformers, if installed
set -euo pipefail
cd "$(dirname "$0")/../.."
data=${1:-data/sample}
test -d "$data" || python prepare.py
nvidia-smi -L
python -m tests.bench --models pythia-70m pythia-410m pythia-1b --sides reweight "${@:2}" --turns 3
for seed in 0 1; do
    for method in experts reweight; do
        python mix.py --data "$data" --model scratch:pythia-70m --seq-len 1024 --lr 1e-3 --base-sequences 8000 \
            --method $method --seed $seed --resume --out out/gpu/$method-$seed
    done
done
