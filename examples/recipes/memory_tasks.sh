#!/bin/sh
# Synthetic memory tasks with models of half a million parameters, on one CPU core: what `benchmarks/results/remember.json`
# and `rewrite.json` hold (`result.json` of the two folders). Runs that were stopped go on from their last checkpoints.
#
#   OMP_NUM_THREADS=1 sh examples/recipes/memory_tasks.sh out
#
# Further options, such as --max_steps 10, go to both.
set -e
out=$1
shift
python -m rxt_hf.training.memory_tasks --output_dir "$out/remember" --tasks remember --size 40 \
    --test_sizes 10 20 30 40 50 --generator '{"key_length": 1, "num_symbols": 64}' "$@"
python -m rxt_hf.training.memory_tasks --output_dir "$out/rewrite" --tasks rewrite --size 16 \
    --test_sizes 16 50 100 200 --max_steps 4000 --history 48 --generator '{"key_length": 1}' "$@"
