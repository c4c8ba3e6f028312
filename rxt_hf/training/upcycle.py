# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""
Teaches a converted language model to use its memory, and measures what it recalls.

    rxt convert path/to/language-model base --slots 64 --memory-layers 0,5,10,15,20,25
    python -m rxt_hf.training.upcycle --model base --data path/to/dialogues --output_dir out

runs to the end, or resumes from the last checkpoint in `out`. The base stays frozen, and checkpoints hold only what is
trained: see `rxt_hf.convert.adapter_config`. Data are folders with `train.jsonl.gz` and `test.jsonl.gz`, see
`rxt_hf.data.readers`. At the end `out/model` is the merged model, and `out/recall.json` holds the loss on the words
that only earlier turns tell: with the memory, with it cleared, and with another dialogue's, by distance in turns. With
`--source path/to/language-model` the language model is measured too, on the query alone and on all turns before.
With `--quantization nf4` (or int8) the frozen base is held in 4 (or 8) bits while the memory and LoRA train in float32
(QLoRA, arXiv 2305.14314); the adapter is then merged into the base as it is on the disk, and that is measured.
`rxt export out/model folder --card out/card.json` makes a folder for the Hub.
"""

import json
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from random import Random
from typing import Any, Literal, get_args

import torch
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
    TorchAoConfig,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from ..chat_template import source_pieces
from ..convert import adapter_config
from ..convert.template import turn_pieces
from ..data.collator import RxTEpisodeCollator
from ..data.readers import Episodes, bucket_by_turns, endless_batches
from ..evaluation.memory import DISTANCES, Memory, recalled_at, sampled, token_losses
from ..evaluation.speed import environment
from ..modeling_rxt import RxTForCausalLM
from .loop import CountingTrainer, CpuBudget, StepCollator, parse

RECIPE: dict[str, Any] = {
    "max_steps": 600,
    "learning_rate": 2e-4,
    "adam_beta2": 0.98,
    "weight_decay": 0.01,
    "warmup_steps": 20,
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 0.5,
    # one item of the data set is one step
    "per_device_train_batch_size": 1,
    "train_sampling_strategy": "sequential",
    "remove_unused_columns": False,
    "bf16": True,
    # asked for by name, or bf16 is refused
    "use_cpu": not torch.accelerator.is_available(),
    "logging_steps": 10,
    "save_steps": 50,
    "save_total_limit": 2,
    "report_to": "none",
    "seed": 1,
}


@dataclass
class UpcycleArguments:
    """Arguments of the recipe, besides `TrainingArguments`."""

    model: str = field(metadata={"help": "Folder of the converted model and its tokenizer."})
    data: list[str] = field(metadata={"help": "Folders with the splits train and test."})
    source: str | None = field(
        default=None, metadata={"help": "Folder or Hub name of the source language model, measured for comparison."}
    )
    turns: int = field(default=8, metadata={"help": "Longest training dialogue in turns; tests use whole dialogues."})
    tokens: int = field(
        default=64, metadata={"help": "Longest interaction in tokens; a dialogue is cut before a longer one."}
    )
    tokens_per_step: int = field(default=2048, metadata={"help": "Most padded tokens of a step, over all turns."})
    labelled_share: float = field(
        default=0.1, metadata={"help": "Share of the answers without a recalled word that are learned."}
    )
    recall_weight: float = field(default=3.0, metadata={"help": "Extra loss weight of recalled tokens."})
    quantization: Literal["none", "nf4", "int8"] = field(
        default="none",
        metadata={"help": "Quantisation of the frozen base: none, nf4 (needs bitsandbytes) or int8 (needs torchao)."},
    )
    memory_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the memory modules (default: learning_rate)."}
    )
    lora_rank: int = field(default=8, metadata={"help": "Rank of LoRA on the frozen decoder."})
    dialogues: int | None = field(default=None, metadata={"help": "Dialogues sampled per folder (default: all)."})
    test_dialogues: int = field(default=200, metadata={"help": "Test dialogues sampled per folder."})
    cpu_seconds: float | None = field(
        default=None, metadata={"help": "Budget of the run in CPU seconds (default: none)."}
    )


class TrainingSteps(Dataset):
    """One item is one step's list of episodes, a function of its index alone, so that a run resumes exactly."""

    def __init__(self, episodes: Episodes, steps: int, options: UpcycleArguments):
        self.episodes, self.labelled_share = episodes, options.labelled_share
        self.steps = list(islice(endless_batches(episodes, options.tokens_per_step), steps))

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        rng = Random(index)
        features = [self._feature(episode, rng) for episode in self.steps[index]]
        if all(label == -100 for feature in features for row in feature["labels"] for label in row):
            # a step needs something to learn
            features[0]["labels"] = self.episodes[self.steps[index][0]]["labels"]
        return features

    def _feature(self, index: int, rng: Random) -> dict[str, Any]:
        feature, recall = self.episodes[index], self.episodes.recall_labels[index]
        if recall is None:
            return feature | {"recall_labels": [[-100] * len(row) for row in feature["labels"]]}
        labels = [
            row if max(recalled) >= 0 or rng.random() < self.labelled_share else [-100] * len(row)
            for row, recalled in zip(feature["labels"], recall, strict=True)
        ]
        return feature | {"labels": labels, "recall_labels": recall}


class UpcycleTrainer(CountingTrainer):
    """`Trainer` with the mean loss of a step's labelled tokens; recalled ones count `1 + recall_weight` times."""

    recall_weight = 0.0

    def weights(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns the weight of each label, in order."""
        is_target = inputs["labels"][..., 1:] != -100
        return 1.0 + self.recall_weight * (inputs["recall_labels"][..., 1:] != -100)[is_target]

    def count(self, inputs):
        return self.weights(inputs).sum()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels, weights = inputs["labels"], self.weights(inputs)
        is_read = (labels[..., 1:] != -100).any(-1)
        episodes = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        outputs = model(**episodes, read_mask=is_read)
        targets = labels[is_read][:, 1:]
        is_target = targets != -100
        losses = F.cross_entropy(outputs.logits[:, :-1][is_target].float(), targets[is_target], reduction="none")
        loss = (losses * weights).sum() / (weights.sum() if num_items_in_batch is None else num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


def recall_batches(
    tokenizer: PreTrainedTokenizerFast, dialogues: Sequence[Mapping[str, Any]], *, max_tokens: int, batch_tokens: int
) -> list[dict[str, torch.Tensor]]:
    """Batches of whole dialogues whose labels are recalled words; `distances` of them are indices into `DISTANCES`."""
    by_distance = [Episodes(tokenizer, recalled_at(dialogues, *limits), max_tokens=max_tokens) for limits in DISTANCES]
    episodes, pad = by_distance[0], RxTEpisodeCollator(tokenizer.pad_token_id)
    largest = max(turns * width for turns, width in episodes.sizes)
    batches = []
    for indices in bucket_by_turns(episodes.sizes, max_batch_tokens=max(batch_tokens, largest)):
        inputs = [episodes[index]["input_ids"] for index in indices]
        labels = [
            pad(
                [
                    {"input_ids": ids, "labels": found.recall_labels[index]}
                    for ids, index in zip(inputs, indices, strict=True)
                ]
            )
            for found in by_distance
        ]
        found = torch.stack([batch["labels"] for batch in labels])
        distances = (found != -100).long().argmax(0)
        batches.append(labels[0] | {"labels": found.amax(0), "distances": distances})
    return [batch for batch in batches if (batch["labels"] != -100).any()]


@torch.no_grad()
def recall_losses(
    model: RxTForCausalLM, batches: Iterable[Mapping[str, torch.Tensor]], memory: Memory = "own"
) -> dict[str, list]:
    """Returns `[nats per token, tokens]` of words that only earlier turns tell, over all and by distance in turns."""
    model.eval()
    losses, distances = [], []
    for batch in batches:
        if memory == "shuffled" and len(batch["labels"]) < 2:
            # there is no other dialogue in it
            continue
        losses.append(token_losses(model, {name: tensor.to(model.device) for name, tensor in batch.items()}, memory))
        distances.append(batch["distances"][..., 1:][batch["labels"][..., 1:] != -100])
    return _by_distance(losses, distances)


@torch.no_grad()
def source_losses(
    source: Any,
    source_tokenizer: Any,
    tokenizer: PreTrainedTokenizerFast,
    batches: Iterable[Mapping[str, torch.Tensor]],
    *,
    history: bool,
) -> dict[str, list]:
    """The same of the language model in its own chat template, which sees the turns before or the query alone."""
    source.eval()
    (pieces, between), losses, distances = _template_pieces(source_tokenizer, tokenizer), [], []
    for batch in batches:
        columns = [batch[name].tolist() for name in ("input_ids", "attention_mask", "labels", "distances")]
        for episode in zip(*columns, strict=True):
            turns = [_in_template(*turn, pieces) + between for turn in zip(*episode, strict=True)]
            for row in [list(chain.from_iterable(turns))] if history else turns:
                ids, labels, kinds = torch.tensor(row or [[0, -100, 0]], device=source.device).T.unsqueeze(1)
                is_target = labels[:, 1:] != -100
                if is_target.any():
                    losses.append(_cross_entropy(source, source.model(ids).last_hidden_state, labels))
                    distances.append(kinds[:, 1:][is_target])
    return _by_distance(losses, distances)


def _template_pieces(source_tokenizer: Any, tokenizer: Any) -> tuple[dict[int, list[int]], list[list[int]]]:
    """
    What the language model's chat template says in place of our control tokens; and the rows of what it says behind
    the end token, which an interaction in its own pieces ends with.
    """
    found, encode = turn_pieces(source_tokenizer), partial(source_tokenizer.encode, add_special_tokens=False)
    if source_pieces(tokenizer) is not None:
        _, _, rest = found.end.partition(tokenizer.eos_token)
        return {}, [[token_id, -100, 0] for token_id in encode(rest)]
    texts = {"[BOS]": "", "[Q]": found.query, "[A]": found.answer, "[EOS]": found.end}
    return {tokenizer.convert_tokens_to_ids(token): encode(text) for token, text in texts.items()}, []


def _in_template(
    ids: list[int], mask: list[int], labels: list[int], kinds: list[int], pieces: Mapping[int, list[int]]
):
    """`[id, label, distance]` of each token."""
    return [
        row
        for token, is_real, label, kind in zip(ids, mask, labels, kinds, strict=True)
        if is_real
        for row in ([[piece, -100, 0] for piece in pieces[token]] if token in pieces else [[token, label, kind]])
    ]


def _cross_entropy(model: Any, hidden_states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of each label but -100; only there the head is computed."""
    is_target = labels[:, 1:] != -100
    logits = model.lm_head(hidden_states[:, :-1][is_target]).float()
    return F.cross_entropy(logits, labels[:, 1:][is_target], reduction="none")


def _by_distance(losses: list[torch.Tensor], distances: list[torch.Tensor]) -> dict[str, list]:
    if not losses:
        return {}
    values, kinds = torch.cat(losses).double().cpu(), torch.cat(distances).cpu()
    chosen = {"all": kinds >= 0} | {f"{low}-{high}": kinds == kind for kind, (low, high) in enumerate(DISTANCES)}
    return {
        name: [round(values[rows].mean().item(), 4), int(rows.sum())] for name, rows in chosen.items() if rows.any()
    }


def measure(
    model: RxTForCausalLM, tokenizer: PreTrainedTokenizerFast, options: UpcycleArguments
) -> dict[str, dict[str, Any]]:
    """Returns the losses of each folder's test dialogues, and the share of the source's gap that the memory closes."""
    results = {}
    for folder in options.data:
        dialogues = sampled(folder, "test", options.test_dialogues)
        sizes = {"max_tokens": options.tokens, "batch_tokens": options.tokens_per_step}
        batches = recall_batches(tokenizer, dialogues, **sizes)
        if not batches:
            raise ValueError(f"No test dialogue of {folder} recalls a word within {options.tokens} tokens a turn.")
        found = {memory: recall_losses(model, batches, memory) for memory in get_args(Memory)}
        if not found["shuffled"]:
            # every batch is one dialogue
            del found["shuffled"]
        if options.source is not None:
            source = AutoModelForCausalLM.from_pretrained(options.source).to(model.device)
            source_tokenizer = AutoTokenizer.from_pretrained(options.source)
            for name, history in (("source_query_only", False), ("source_full_history", True)):
                found[name] = source_losses(source, source_tokenizer, tokenizer, batches, history=history)
            found["gap_closed"] = {
                distance: round(
                    (without - found["own"][distance][0]) / (without - found["source_full_history"][distance][0]), 4
                )
                for distance, (without, _) in found["source_query_only"].items()
            }
        results[Path(folder).name] = found
    return results


def card_facts(results: Mapping[str, Mapping[str, Any]], options: UpcycleArguments) -> dict[str, Any]:
    """Returns arguments of `rxt_hf.hub.model_card`: lineage, and every figure of [`measure`] over all distances."""
    figures = [
        {
            "dataset_name": name,
            "dataset_type": name,
            "dataset_split": "test",
            "metric_type": "loss",
            "metric_name": f"nats per recalled token, {arm.replace('_', ' ')}{' memory' * (arm in get_args(Memory))}",
            "metric_value": losses["all"][0],
        }
        for name, found in results.items()
        for arm, losses in found.items()
        if arm != "gap_closed"
    ]
    return {"base_model": Path(options.source or options.model).name, "datasets": list(results), "results": figures}


def quantized(kind: str) -> dict[str, Any]:
    """Returns arguments of `from_pretrained` that quantise the base, except modules that are trained whole."""
    if kind == "none":
        return {}
    package = {"nf4": "bitsandbytes", "int8": "torchao"}[kind]
    if find_spec(package) is None:
        raise ImportError(f"--quantization {kind} needs {package}: pip install 'rxt_hf[quant]'.")
    whole = [r".*\.memory_\w+", "lm_head"]
    if kind == "nf4":
        config: Any = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=whole)
    else:
        int8 = import_module("torchao.quantization").Int8WeightOnlyConfig()
        config = TorchAoConfig(int8, modules_to_not_convert=whole)
    return {"quantization_config": config}


def optimizer_of(model: torch.nn.Module, options: UpcycleArguments, args: TrainingArguments) -> torch.optim.Optimizer:
    """Returns AdamW with a learning rate of its own for the memory."""
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups["memory" in name].append(parameter)
    rates = {True: options.memory_learning_rate or args.learning_rate, False: args.learning_rate}
    return torch.optim.AdamW(
        [{"params": parameters, "lr": rates[kind]} for kind, parameters in groups.items()],
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.weight_decay,
    )


def main(argv: list[str] | None = None) -> None:
    from peft import PeftModel, get_peft_model

    options, args = parse(UpcycleArguments, RECIPE, argv)
    folder = Path(str(args.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
    model = RxTForCausalLM.from_pretrained(options.model, dtype=torch.float32, **quantized(options.quantization))
    torch.manual_seed(args.seed)
    dialogues = chain.from_iterable(sampled(path, "train", options.dialogues) for path in options.data)
    episodes = Episodes(tokenizer, dialogues, max_turns=options.turns, max_tokens=options.tokens)
    rank = options.lora_rank
    adapted: Any = get_peft_model(model, adapter_config(model, tokenizer, r=rank, lora_alpha=2 * rank))
    budget = CpuBudget(folder, options.cpu_seconds)
    trainer = UpcycleTrainer(
        model=adapted,
        args=args,
        train_dataset=TrainingSteps(episodes, args.max_steps, options),
        data_collator=StepCollator(tokenizer.pad_token_id),
        callbacks=[budget],
        optimizers=(optimizer_of(adapted, options, args), None),
    )
    trainer.recall_weight = options.recall_weight
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
    seconds = round(budget.seconds(), 1)
    trainer.save_model()
    trainer.save_state()
    if options.quantization != "none":
        whole = RxTForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(args.device)
        adapted = PeftModel.from_pretrained(whole, str(folder))
    merged = adapted.merge_and_unload()
    merged.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    results = measure(merged, tokenizer, options)
    report = {
        "environment": environment(str(merged.device)),
        "command": shlex.join(["python", "-m", "rxt_hf.training.upcycle", *(sys.argv[1:] if argv is None else argv)]),
        "steps": trainer.state.global_step,
        "cpu_seconds": seconds,
        "nats": results,
    }
    for name, content in (("recall.json", report), ("card.json", card_facts(results, options))):
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
