#!/bin/sh
# Synthetic memory tasks with models of half a million parameters, on one CPU core: what `remember.json`, `rewrite.json`,
# `babi.json` and `babi_objects.json` in `benchmarks/results` hold (`result.json` of the four folders). Runs that were
# stopped go on from their last checkpoints.
#
#   OMP_NUM_THREADS=1 sh examples/recipes/memory_tasks.sh out
#
# Further options, such as --max_steps 10, go to all.
set -e
export PYTHONPATH="examples${PYTHONPATH:+:$PYTHONPATH}"
out=$1
shift
python -m memory_tasks.train --output_dir "$out/remember" --tasks remember --size 40 \
    --test_sizes 10 20 30 40 50 --generator '{"key_length": 1, "num_symbols": 64}' "$@"
python -m memory_tasks.train --output_dir "$out/rewrite" --tasks rewrite --size 16 \
    --test_sizes 16 50 100 200 --max_steps 4000 --history 48 --generator '{"key_length": 1}' "$@"
python -m memory_tasks.train --output_dir "$out/babi" --tasks babi1 babi6 babi8 babi11 --size 5 \
    --max_steps 6000 --hint 0.25 "$@"
python -m memory_tasks.train --output_dir "$out/babi_objects" --tasks babi2 babi3 babi7 --size 5 \
    --max_steps 6000 --hint 0.25 "$@"
