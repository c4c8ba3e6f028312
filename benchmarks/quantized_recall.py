# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""
Recall of the demo with weights, or the memory, in fewer bits; greedy and closed loop, as in fact_recall.py.

    PYTHONPATH=examples python benchmarks/quantized_recall.py --output benchmarks/results/quantized_recall.json

Weights in int8 need torchao, in nf4 bitsandbytes; an arm whose package is missing is left out. A memory in fewer bits
is the worst case: it goes through a file of that dtype after every turn. About 3 minutes on one core.
"""

import argparse
import json
import logging
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from demo.recall import recall
from fact_recall import DIALOGUES
from tables import fewer_bits
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast, TorchAoConfig

import rxt_hf
from rxt_hf import STMCache
from rxt_hf.evaluation.speed import environment

LENGTHS = (8, 16)


def load(folder: str, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **({"dtype": torch.float32} | options)).eval()


def load_int8(folder: str):
    from torchao.quantization import Int8WeightOnlyConfig

    return load(folder, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))


def load_nf4(folder: str):
    return load(folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))


def load_stored(folder: str, dtype: torch.dtype):
    """The model with every memory that it writes put through a file of that dtype."""
    model = load(folder)
    write = model.update_memory

    def update_memory(*args, **kwargs) -> STMCache:
        with tempfile.TemporaryDirectory() as path:
            write(*args, **kwargs).save(Path(path, "memory"), dtype=dtype)
            return STMCache.load(Path(path, "memory"))

    model.update_memory = update_memory
    return model


def load_reader(folder: str, load_quantised: Callable):
    """A quantised model that reads what the float32 model has written about its answers."""
    model = load_quantised(folder)
    model.update_memory = load(folder).update_memory
    return model


# what is told in the table: how it is loaded, the package it needs, the dtype of its memory's file
ARMS = {
    "float32": (load, None, None),
    "bfloat16 weights": (partial(load, dtype=torch.bfloat16), None, None),
    "int8 weights (torchao)": (load_int8, "torchao", None),
    "nf4 weights (bitsandbytes)": (load_nf4, "bitsandbytes", None),
    "bfloat16 memory": (partial(load_stored, dtype=torch.bfloat16), None, torch.bfloat16),
    "int8 memory": (partial(load_stored, dtype=torch.int8), None, torch.int8),
    "int8 weights, memory written in float32": (partial(load_reader, load_quantised=load_int8), "torchao", None),
    "nf4 weights, memory written in float32": (partial(load_reader, load_quantised=load_nf4), "bitsandbytes", None),
}


def file_bytes(model, dtype: torch.dtype | None) -> dict[str, int]:
    """Bytes on disk of the weights, and of one conversation's memory."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        weights = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        model.init_stm(1).save(Path(folder, "memory"), dtype=dtype)
        return {"weight_bytes": weights, "memory_file_bytes": Path(folder, "memory").stat().st_size}


def measure(name: str, folder: str, tokenizer, share: float) -> dict:
    load_arm, _, dtype = ARMS[name]
    model, rows = load_arm(folder), []
    for turns in LENGTHS:
        dialogues = max(2, int(DIALOGUES[turns] * share))
        rows.append(recall(model, tokenizer, num_turns=turns, num_dialogues=dialogues))
        print(f"  {name:42}{turns:3} turns  recall {rows[-1]['recall']}", flush=True)
    return file_bytes(model, dtype) | {"recall": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(rxt_hf.DEMO))
    parser.add_argument("--share", type=float, default=1.0, help="share of the dialogues to play")
    parser.add_argument("--output", default="quantized_recall.json")
    options = parser.parse_args()
    # bitsandbytes tells of each matrix product which kernel it has not found
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    packages = [name for name in ("torchao", "bitsandbytes") if find_spec(name)]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.model)
    report = {
        "environment": environment("cpu") | {name: version(name) for name in packages},
        "share_of_dialogues": options.share,
        "arms": {
            name: measure(name, options.model, tokenizer, options.share)
            for name, (_, package, _) in ARMS.items()
            if package is None or package in packages
        },
    }
    Path(options.output).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    print(fewer_bits(report))


if __name__ == "__main__":
    main()
