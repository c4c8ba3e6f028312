# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""
Cost of a turn by its number, RxT against a Llama of the same decoder shape; the same as `rxt bench`.

    python benchmarks/turn_cost.py --size tiny --output benchmarks/results/turn_cost_tiny.json
"""

import argparse
import sys

from rxt_hf.evaluation.speed import add_arguments, run

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    sys.exit(run(parser.parse_args()))
