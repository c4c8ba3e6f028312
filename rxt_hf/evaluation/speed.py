# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""
Cost of a turn by its number: time, FLOPs and bytes of state of RxT against a Llama of the same decoder shape.

    rxt bench --size tiny --output turn_cost.json --plot turn_cost.png

Weights and tokens are random, answers greedy and of a fixed length; what is timed is the whole `generate`, from the
call to each token that it hands to a streamer. The arms:

    rxt                reads its memory and the query; the turn ends when the memory is written
    rxt_async          the same with `update_memory="async"`; the turn ends with the last token
    full_history       re-reads all turns before the query
    persistent_cache   keeps its `DynamicCache` from turn to turn: `generate` gets all ids and the cache
    sliding_window     re-reads the last turns, `window_turns` with the present one, as a chat that cuts old messages
    current_turn       reads the query alone

State is what must be kept until the next turn: the memory, keys and values, or the int64 ids that are read again.
"""

import contextlib
import errno
import gc
import itertools
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from transformers import CompileConfig, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from ..cache_rxt import STMCache
from ..configuration_rxt import RxTConfig
from ..modeling_rxt import RxTForCausalLM
from ..presets import PRESETS

# Llama's proportions at the width and depth of GPT-2 small, the paper's memory attention, half its slots
SIZES: dict[str, dict[str, Any]] = {
    "tiny": PRESETS["tiny"],
    "100m": {
        "vocab_size": 32_000,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 1024,
        "num_memory_slots": 256,
        "memory_attention_type": "interlayer",
        "memory_gate_status": "mean",
        "memory_gate_granularity": "slot",
    },
}
# sparse query attention to the memory in the paper's proportions: half of the query heads, a quarter of the others
SIZES["100m-sqa"] = SIZES["100m"] | {
    "cross_attention_num_attention_heads": 6,
    "cross_attention_num_key_value_heads": 3,
}
ARMS = {
    "rxt": "RxT",
    "rxt_async": "RxT, asynchronous write",
    "full_history": "Llama, full history",
    "persistent_cache": "Llama, persistent KV cache",
    "sliding_window": "Llama, sliding window",
    "current_turn": "Llama, current turn only",
}
# arms with a memory, and how their ratios' names begin
RXT_ARMS = {"rxt": "", "rxt_async": "async_"}
BASELINES = [arm for arm in ARMS if arm not in RXT_ARMS]
DECODED = ("rxt", "current_turn")
METRICS = {
    "first_token_s": ("time to first token, ms", 1e3),
    "token_s": ("time per further token, ms", 1e3),
    "turn_s": ("turn, ms", 1e3),
    "write_s": ("memory write within the turn, ms", 1e3),
    "state_bytes": ("state after the turn, KiB", 1 / 1024),
    "flops": ("GFLOP", 1e-9),
}
LEAST_ROUNDS = 3


def build_models(size: dict, dtype: torch.dtype, device: str, attn: str = "sdpa") -> tuple[Any, Any]:
    """An RxT with random weights, and a Llama with the shape of its decoder; neither has an end token."""
    torch.manual_seed(0)
    config: Any = RxTConfig(**size, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    shared = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "rms_norm_eps initializer_range tie_word_embeddings pad_token_id bos_token_id eos_token_id"
    )
    llama_config: Any = LlamaConfig(
        **{name: getattr(config, name) for name in shared.split()},
        max_position_embeddings=2**20,
        rope_parameters=dict(config.rope_parameters),
    )
    models: list[Any] = []
    for model_class, each in ((RxTForCausalLM, config), (LlamaForCausalLM, llama_config)):
        each._attn_implementation = attn
        with torch.device(device):
            models.append(model_class(each).to(dtype).eval())
    return models[0], models[1]


class TokenTimes(BaseStreamer):
    """When `generate` handed out each token; the prompt, which it hands out first, is not counted."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        del self.times[:1]


class Turns:
    """
    Turns of `batch_size` conversations for every arm: at turn N the N - 1 turns before it are random ids, keys and
    values of that length, or the memory that N - 1 writes left, one for all conversations.

    Args:
        rxt, llama: from `build_models`.
        turns (`Sequence[int]`): numbers of the turns that can be played.
    """

    def __init__(
        self,
        rxt: Any,
        llama: Any,
        turns: Sequence[int],
        *,
        query_tokens: int,
        answer_tokens: int,
        window_turns: int = 4,
        batch_size: int = 1,
    ):
        self.rxt, self.llama = rxt, llama
        self.query_tokens, self.answer_tokens, self.window_turns = query_tokens, answer_tokens, window_turns
        self.turn_tokens = query_tokens + answer_tokens
        self.batch_size = batch_size
        self._generator = torch.Generator().manual_seed(0)
        self.memories = self._memories_before(turns)

    def ids(self, tokens: int) -> torch.Tensor:
        vocab_size, shape = self.rxt.config.vocab_size, (self.batch_size, tokens)
        return torch.randint(vocab_size, shape, generator=self._generator).to(self.rxt.device)

    @torch.no_grad()
    def _memories_before(self, turns: Sequence[int]) -> dict[int, STMCache]:
        memory, found = self.rxt.init_stm(1), {}
        for turn in range(1, max(turns) + 1):
            if turn > 1:
                memory = self.rxt.update_memory(memory, self.ids(self.turn_tokens)[:1])
            if turn in turns:
                found[turn] = memory.repeat(self.batch_size)
        return found

    def cache_before(self, turn: int) -> DynamicCache:
        """Keys and values of all tokens but the last, which no step has read: as `generate` leaves them."""
        config, cache = self.llama.config, DynamicCache(config=self.llama.config)
        shape = (self.batch_size, config.num_key_value_heads, (turn - 1) * self.turn_tokens - 1, config.head_dim)
        if turn > 1:
            for layer in range(config.num_hidden_layers):
                states = torch.full(shape, 0.01, dtype=self.llama.dtype, device=self.llama.device)
                cache.update(states, states, layer)
        return cache

    def inputs(self, arm: str, turn: int) -> dict[str, Any]:
        """What `generate` is called with."""
        past_turns = {"full_history": turn - 1, "persistent_cache": turn - 1}.get(arm, 0)
        if arm == "sliding_window":
            past_turns = min(turn, self.window_turns) - 1
        ids = self.ids(past_turns * self.turn_tokens + self.query_tokens)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if arm in RXT_ARMS:
            inputs["stm_cache"] = self.memories[turn]
            inputs["update_memory"] = "async" if arm == "rxt_async" else True
        elif arm == "persistent_cache":
            inputs["cache"] = self.cache_before(turn)
        return inputs

    def play(self, arm: str, turn: int, **generate_kwargs: Any) -> dict[str, float]:
        """One timed turn: the seconds that `timed` gives."""
        return self.timed(arm, {**self.inputs(arm, turn), **generate_kwargs})[0]

    def timed(self, arm: str, inputs: dict[str, Any]) -> tuple[dict[str, float], Any]:
        """Seconds of a turn, and the output of `generate`, which is called with `inputs`."""
        times, device = TokenTimes(), self.rxt.device
        synchronize(device)
        start = time.perf_counter()
        output = (self.rxt if arm in RXT_ARMS else self.llama).generate(
            **inputs,
            streamer=times,
            max_new_tokens=self.answer_tokens,
            do_sample=False,
            return_dict_in_generate=True,
        )
        synchronize(device)
        returned = time.perf_counter()
        if arm == "rxt_async":
            output.stm_cache.wait()
        written = time.perf_counter()
        if len(times.times) != self.answer_tokens:
            raise RuntimeError(f"{arm} answered with {len(times.times)} tokens, expected {self.answer_tokens}.")
        first, last = times.times[0], times.times[-1]
        sample = {
            "first_token_s": first - start,
            "token_s": (last - first) / max(1, self.answer_tokens - 1),
            "turn_s": (returned if arm == "rxt" else last) - start,
            "return_delay_s": returned - last,
        }
        return sample | ({"write_s": written - last} if arm in RXT_ARMS else {}), output

    def state_bytes(self, arm: str, output: Any) -> int:
        """Bytes of what `output` leaves for the next turn, read from its tensors."""
        if arm in RXT_ARMS:
            return output.stm_cache.nbytes
        if arm == "persistent_cache":
            return cache_bytes(output["cache"])
        tokens = output.sequences.shape[1]
        read_again = {"full_history": tokens, "sliding_window": (self.window_turns - 1) * self.turn_tokens}
        return output.sequences[:, max(0, tokens - read_again.get(arm, 0)) :].nbytes

    def costs(self, arm: str, turn: int) -> dict[str, int]:
        """FLOPs of a turn, the memory write included, and bytes of state after it. It serves as the warm-up, too."""
        # the counter sees its own thread only
        inputs = self.inputs(arm, turn) | ({"update_memory": True} if arm in RXT_ARMS else {})
        flops, (_, output) = count_flops(lambda: self.timed(arm, inputs))
        return {"flops": flops, "state_bytes": self.state_bytes(arm, output)}


def cache_bytes(cache: Any) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def count_flops(function: Callable[[], Any]) -> tuple[int, Any]:
    """FLOPs of the matrix products, attention counted without regard to its mask; and what `function` returns."""
    from torch.utils.flop_counter import FlopCounterMode

    def attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        batch_size, heads, tokens, head_dim = query
        return 2 * batch_size * heads * tokens * key[-2] * (head_dim + value[-1])

    def attention_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        # the scores once more, and the gradients of weights, values, queries and keys: five products for two
        return attention(query, key, value) * 5 // 2

    def product(states: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
        return 2 * prod(states) * weight[0]

    # the kernels that PyTorch's table lacks
    mapping: dict[Any, Any] = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    if torch.backends.mkldnn.is_available():
        mapping[torch.ops.mkldnn._linear_pointwise] = product
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        result = function()
    return counter.get_total_flops(), result


def synchronize(device: torch.device) -> None:
    """Waits for this thread's work on a GPU; an asynchronous write has a stream of its own."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


@contextlib.contextmanager
def no_garbage_collection() -> Generator[None, None, None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


Samples = dict[str, list[dict[str, float]]]


def interleaved(cells: Mapping[str, Callable[[], dict[str, float]]], rounds: int, limit_s: float = 120.0) -> Samples:
    """Runs every cell once in each round; after three rounds no new one begins later than `limit_s`."""
    samples: Samples = {name: [] for name in cells}
    start = time.perf_counter()
    for number in range(rounds):
        if number >= LEAST_ROUNDS and time.perf_counter() - start > limit_s:
            break
        with no_garbage_collection():
            for name, run in cells.items():
                samples[name].append(run())
    return samples


def medians(samples: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(sample[name] for sample in samples) for name in samples[0]}


def ratio(above: list[dict[str, float]], below: list[dict[str, float]], field: str, by: str | None = None) -> float:
    """Median over rounds of one arm's figure by the other's, or by the figure `by`, of the same round."""
    return statistics.median(a[field] / b[by or field] for a, b in zip(above, below, strict=True))


def measure_turns(
    turns: Turns, arms_at: Callable[[int], list[str]], rounds: int, limit_s: float
) -> tuple[dict[str, dict[str, dict]], dict[int, Samples]]:
    """Medians and costs by arm and turn, and the samples by turn and arm."""
    table: dict[str, dict[str, dict]] = {}
    samples: dict[int, Samples] = {}
    for turn in logging.tqdm(sorted(turns.memories), desc="turns", disable=None):
        costs = {arm: turns.costs(arm, turn) for arm in arms_at(turn)}
        samples[turn] = interleaved({arm: partial(turns.play, arm, turn) for arm in costs}, rounds, limit_s)
        for arm, found in samples[turn].items():
            seconds = sorted(sample["turn_s"] for sample in found)
            figures = {**costs[arm], **medians(found), "turn_s_range": [seconds[0], seconds[-1]], "rounds": len(found)}
            table.setdefault(arm, {})[str(turn)] = figures
    return table, samples


def turn_ratios(samples: dict[int, Samples]) -> dict[str, float]:
    """How much sooner than the baselines RxT has its first token and ends its turn; how much later than one turn."""
    found = {}
    fields = {"first_token": "first_token_s", "turn": "turn_s"}
    for turn, cells in samples.items():
        for arm, baseline, (name, field) in itertools.product(RXT_ARMS, BASELINES, fields.items()):
            if arm not in cells or baseline not in cells:
                continue
            name = f"{RXT_ARMS[arm]}{name}"
            if baseline == "current_turn":
                found[f"{name}_slowdown_over_{baseline}_at_{turn}"] = ratio(cells[arm], cells[baseline], field)
            else:
                found[f"{name}_speedup_over_{baseline}_at_{turn}"] = ratio(cells[baseline], cells[arm], field)
    return found


def write_ratios(samples: dict[int, Samples]) -> dict[str, float]:
    """Returns the write's share of a turn, and the part of it that a user waits for if it is asynchronous."""
    found = {}
    written, deferred = ([each for cells in samples.values() for each in cells.get(arm, ())] for arm in RXT_ARMS)
    if written:
        found["write_share_of_turn"] = ratio(written, written, "write_s", "turn_s")
    if deferred:
        found["async_return_share_of_turn"] = ratio(deferred, deferred, "return_delay_s", "turn_s")
        found["async_write_s"] = medians(deferred)["write_s"]
    return found


def flat_ratios(turns: Turns, rounds: int, limit_s: float) -> dict[str, float]:
    """RxT at the last turn by RxT at turn 2 (or the first one played), the two alternating."""
    last, first = max(turns.memories), 2 if 2 in turns.memories else min(turns.memories)
    cells = {str(turn): partial(turns.play, "rxt", turn) for turn in (first, last)}
    samples = interleaved(cells, rounds, limit_s)
    pair, ending = (samples[str(last)], samples[str(first)]), f"at_{last}_over_{first}"
    return {
        f"rxt_turn_{ending}": ratio(*pair, "turn_s"),
        f"rxt_first_token_{ending}": ratio(*pair, "first_token_s"),
    }


def compiled_decoding() -> dict[str, Any]:
    """The arguments with which `generate` compiles the step."""
    compile_config = CompileConfig(dynamic=False)
    # elsewhere than on an accelerator generate compiles only if told so
    compile_config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": compile_config}


def measure_decode(turns: Turns, rounds: int, limit_s: float, *, compiled: bool) -> dict[str, float]:
    """Tokens per second after the first token, RxT against the Llama that reads the same query."""
    kwargs = compiled_decoding() if compiled else {}
    options = {"rxt": {**kwargs, "update_memory": False}, "current_turn": kwargs}
    cells = {arm: partial(turns.play, arm, min(turns.memories), **options[arm]) for arm in options}
    # the second turn is the first that compiles nothing
    interleaved(cells, 2)
    samples = interleaved(cells, rounds, limit_s)
    rates = {f"{arm}_tokens_per_s": turns.batch_size / medians(samples[arm])["token_s"] for arm in cells}
    return {**rates, "share": ratio(samples["current_turn"], samples["rxt"], "token_s"), "rounds": len(samples["rxt"])}


def environment(device: str) -> dict[str, Any]:
    try:
        own_version = version("rxt-hf")
    except PackageNotFoundError:
        own_version = "not installed"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rxt_hf": own_version,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }


def bench(options: SimpleNamespace) -> dict[str, Any]:
    """The report that `rxt bench` writes, for options of its command line."""
    tokens = {"query_tokens": options.query_tokens, "answer_tokens": options.answer_tokens}
    size = dict(SIZES[options.size])
    size["max_position_embeddings"] = max(size["max_position_embeddings"], sum(tokens.values()))
    models = build_models(size, getattr(torch, options.dtype), options.device, options.attn_implementation)
    limits = (options.repeats, options.limit_s)
    ratios, table, decode = {}, {}, {}
    if options.turns:
        turns = Turns(
            *models, options.turns, **tokens, window_turns=options.window_turns, batch_size=options.batch_size
        )

        def arms_at(turn: int) -> list[str]:
            too_long = turn > options.longest_full_history
            return [arm for arm in options.arms if arm != "full_history" or not too_long]

        table, samples = measure_turns(turns, arms_at, *limits)
        ratios = turn_ratios(samples) | write_ratios(samples)
        if "rxt" in options.arms and len(turns.memories) > 1:
            ratios |= flat_ratios(turns, *limits)
    for batch_size in options.decode_batch_sizes:
        turns = Turns(*models, [1], **tokens, batch_size=batch_size)
        for mode in ("eager", "compiled")[: 1 + options.compile]:
            name = f"at_batch_{batch_size}_{mode}"
            decode[name] = measure_decode(turns, *limits, compiled=mode == "compiled")
            ratios[f"decode_share_of_current_turn_{name}"] = decode[name]["share"]
    return {
        "environment": environment(options.device),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "options": {name: value for name, value in vars(options).items() if name != "verb"},
        "sizes": size,
        "parameters": dict(zip(("rxt", "llama"), (model.num_parameters() for model in models), strict=True)),
        "turns": table,
        "decode": decode,
        "ratios": ratios,
    }


def markdown(report: dict[str, Any]) -> str:
    """The report's figures as tables: costs by turn, ratios by turn, decoding, and the other ratios."""
    numbers = sorted({number for found in report["turns"].values() for number in found}, key=int)
    blocks = []
    for field, (title, scale) in METRICS.items():
        rows = {
            ARMS[arm]: {number: figures[field] * scale for number, figures in found.items() if field in figures}
            for arm, found in report["turns"].items()
        }
        blocks.append(rows_by_turn(title, numbers, rows))
    by_turn, others = {}, {}
    for name, value in report["ratios"].items():
        kind, _, number = name.rpartition("_at_")
        if number in numbers:
            by_turn.setdefault(kind, {})[number] = value
        else:
            others[name] = shown(value)
    blocks.append(rows_by_turn("ratio", numbers, by_turn))
    rates = [f"{arm}_tokens_per_s" for arm in DECODED]
    blocks.append(
        [
            ["tokens per second", *(ARMS[arm] for arm in DECODED)],
            *([name, *(shown(figures[rate]) for rate in rates)] for name, figures in report["decode"].items()),
        ]
    )
    blocks.append([["ratio", ""], *map(list, others.items())])
    return "\n\n".join(markdown_table(*block) for block in blocks if len(block) > 1)


def rows_by_turn(title: str, numbers: list[str], rows: dict[str, dict[str, float]]) -> list[list[str]]:
    """A head, and the rows that have a value; where one has none its cell is empty."""
    cells = [
        [name, *(shown(found[number]) if number in found else "" for number in numbers)]
        for name, found in rows.items()
        if found
    ]
    return [[f"{title}; turn", *numbers], *cells]


def shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def markdown_table(head: Sequence[str], *rows: Sequence[str]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install 'rxt-hf[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot(report: dict[str, Any], path: str | os.PathLike) -> None:
    """Four panels by turn, both axes logarithmic."""
    figure, axes = pyplot().subplots(2, 2, figsize=(10, 7), layout="constrained")
    numbers = sorted({int(turn) for by_turn in report["turns"].values() for turn in by_turn})
    panels = ("first_token_s", "turn_s", "state_bytes", "flops")
    for panel, field in zip(axes.flat, panels, strict=True):
        title, scale = METRICS[field]
        for arm, by_turn in report["turns"].items():
            # a logarithmic axis has no place for no state
            points = [(int(turn), figures[field] * scale) for turn, figures in by_turn.items() if figures[field]]
            if points:
                panel.loglog(*zip(*points, strict=True), marker="o", label=ARMS[arm])
        panel.set(title=title, xlabel="turn")
        panel.set_xticks(numbers, map(str, numbers))
        panel.minorticks_off()
    axes.flat[1].legend()
    figure.savefig(path, dpi=120)


def run(options: SimpleNamespace, measure: Callable | None = None, tables: Callable | None = None) -> str:
    """Measures what `rxt bench` does, or something else, writes its files and returns its tables."""
    # a missing package or folder should not cost the wait for the report
    if options.plot is not None:
        pyplot()
    for path in filter(None, (options.output, options.plot)):
        if not Path(path).absolute().parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    report = (measure or bench)(options)
    Path(options.output).write_text(json.dumps(report, indent=1) + "\n")
    if options.plot is not None:
        plot(report, options.plot)
    return (tables or markdown)(report)
