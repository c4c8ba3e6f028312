#!/bin/sh
# Trains models of equal size on the same dialogues, with equal label masks, and measures what they recall:
#
#   OMP_NUM_THREADS=1 OPTIONS='--override {"num_memory_slots":64}' \
#       sh examples/recipes/dialogues.sh out path/to/sgd path/to/star
#
# is what `benchmarks/results/dialogues.json` holds. A run that was stopped goes on from its last checkpoint when the
# same line is run again. The sizes of arXiv 2510.03561 and the comparison of its table 3, on public dialogues, for a
# GPU (nobody has run these two yet, only a smoke test):
#
#   SIZE=micro ARMS="rxt current_turn full_history" OPTIONS="--vocab_size 7500 --max_batch_tokens 65536 \
#       --max_steps 20000 --learning_rate 1e-3" sh examples/recipes/dialogues.sh out path/to/sgd path/to/star
#
# and the same with SIZE=mini. ARMS are those of examples/demo/baselines.py, SIZE is a name of rxt_hf.presets.PRESETS,
# OPTIONS are further ones of benchmarks/train_dialogues.py.
set -e
export PYTHONPATH="examples${PYTHONPATH:+:$PYTHONPATH}"
out=$1
shift
measured=""
for arm in ${ARMS:-rxt current_turn full_history mamba sliding_window}; do
    # shellcheck disable=SC2086
    python benchmarks/train_dialogues.py --arm "$arm" --preset "${SIZE:-tiny}" --data "$@" --output_dir "$out/$arm" $OPTIONS
    measured="$measured --arm $arm=$out/$arm"
done
# shellcheck disable=SC2086
python benchmarks/dialogues.py --data "$@" $measured --output "$out/dialogues.json"
