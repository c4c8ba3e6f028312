# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
r"""
A stage of the curriculum from a YAML file, with `transformers.Trainer`:

    rxt train pretraining --config pretraining.yaml
    rxt train memory_aware --config memory_aware.yaml --learning_rate 1e-3 --report_to tensorboard

The file holds fields of [`RunArguments`] and of `TrainingArguments` (`PreferenceArguments` for the stage preference);
the command line overrides it. A run goes on from the last checkpoint in `output_dir`. At the end `output_dir` holds
model, tokenizer, code and card, and is what the next stage's `model` names. Several processes are started by

    torchrun --nproc_per_node 2 -m rxt_hf.cli train memory_aware --config memory_aware.yaml

and on several machines by the same line on each machine, here two with eight devices:

    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint first-machine:29500 \
        -m rxt_hf.cli train memory_aware --config memory_aware.yaml

Data are JSONL files, folders with `train.jsonl` (and `test.jsonl` for `eval_data`), or data sets of the Hub by name,
see `rxt_hf.data.readers`. Pre-training also takes `.txt` files, whose documents blank lines separate, and rows with
`text`. Preference data are dialogues with `rejected` beside answers, or rows with `chosen` and `rejected`.
"""

import copy
import dataclasses
import difflib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from transformers import (
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedConfig,
    Trainer,
    TrainingArguments,
    get_scheduler,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ..chat_template import source_pieces, train_tokenizer
from ..configuration_rxt import RxTConfig
from ..convert import adapter_config
from ..data.batching import StepCollator, StepDataset, bucket_by_turns
from ..data.collator import RxTEpisodeCollator, RxTPreTrainingCollator
from ..data.files import read_object, read_text
from ..data.readers import ENDINGS, Episodes, converted_rows, find_file, is_hub_name, pack_texts, said, sampled
from ..data.rows import checked_text, to_episode
from ..hub import export, model_card
from ..loading import load_whole, refuse_adapter
from ..modeling_rxt import RxTForCausalLM
from ..presets import PRESETS
from .arguments import DataArguments, ModelArguments, RxTTrainingArguments, as_list, check_lowest, json_object
from .preference import (
    PreferenceArguments,
    PreferenceTrainer,
    encode_preferences,
    preference_interactions,
)
from .pretraining import RxTForPreTraining
from .stages import STAGES, set_training_stage, unfreezing_optimizer

logger = logging.get_logger(__name__)

PREFERENCE = "preference"
STAGE_NAMES = (*STAGES, PREFERENCE)
# what a run has said about itself, so that another stage does not go on from its checkpoints
RUN_NAME = "run.json"
RECIPE: dict[str, Any] = {
    "logging_steps": 10,
    "save_steps": 100,
    "save_total_limit": 2,
    "report_to": "none",
    # asked for by name, or bf16 is refused
    "use_cpu": not torch.accelerator.is_available(),
}


@dataclass
class RunArguments(ModelArguments, DataArguments):
    """Arguments of a run, besides `TrainingArguments`."""

    eval_data: list[str] = field(
        default_factory=list, metadata={"help": "Data of eval_loss at the end of the run, given like data."}
    )
    eval_dialogues: int = field(default=100, metadata={"help": "Dialogues sampled per source of eval_data."})
    turns: int = field(default=8, metadata={"help": "Longest dialogue in turns; longer ones are cut."})
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub name of the tokenizer (default: the model's; a new one is trained on the data)."
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention implementation, such as eager or flash_attention_2."}
    )
    mlm_loss_coef: float = field(
        default=0.5, metadata={"help": "Weight of the loss on masked tokens, in the stages that have it."}
    )
    memory_noise_std: float = field(
        default=0.2, metadata={"help": "Noise on what the decoder reads in those stages, as a share of its size."}
    )
    lora_rank: int = field(
        default=0,
        metadata={"help": "Rank of LoRA on the decoder, with the memory trained whole; 0 trains everything."},
    )
    unfreeze: dict | str | None = field(
        default=None,
        metadata={
            "help": "JSON object from prefixes of parameter names to the step at which they start to be trained."
        },
    )

    @property
    def first_steps(self) -> dict[str, int]:
        return {start: int(step) for start, step in json_object("unfreeze", self.unfreeze).items()}

    def number(self, split: str) -> int | None:
        """Dialogues of each source of a split."""
        return self.dialogues if split == "train" else self.eval_dialogues

    def __post_init__(self) -> None:
        ModelArguments.__post_init__(self)
        DataArguments.__post_init__(self)
        self.eval_data, self.unfreeze = as_list(self.eval_data), self.first_steps
        check_lowest(self, 0, "mlm_loss_coef", "memory_noise_std", "lora_rank")
        check_lowest(self, 1, "turns")


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse(
    stage: str, words: Sequence[str] = (), config: str | os.PathLike | None = None
) -> tuple[RunArguments, TrainingArguments]:
    """
    Returns the arguments of a run. The command line overrides the YAML file `config`, which overrides our defaults.

    Raises: `ValueError` for an unknown key or word, and for a value of the wrong type; `OSError` without the file.
    """
    training = PreferenceArguments if stage == PREFERENCE else RxTTrainingArguments
    parser = _Parser(cast("Any", (RunArguments, training)), prog=f"rxt train {stage}", allow_abbrev=False)
    parser.set_defaults(output_dir=f"rxt-{stage}", **RECIPE)
    known = {each.name for kind in (RunArguments, training) for each in dataclasses.fields(cast("Any", kind))}
    parser.set_defaults(**({} if config is None else read_config(Path(config), known)))
    found: Any = parser.parse_args_into_dataclasses(
        list(words), look_for_args_file=False, return_remaining_strings=True
    )
    options, args, unknown = cast("tuple[RunArguments, TrainingArguments, list[str]]", found)
    if unknown:
        raise ValueError(f"The argument {unknown[0]!r} is unknown{_meant(unknown[0].lstrip('-'), known)}.")
    # the losses come in one forward, and a PEFT model's signature hides the labels
    args.label_names = ["labels"]
    return options, args


def read_config(path: Path, known: set[str]) -> dict[str, Any]:
    """Reads the fields of a YAML file; numbers stay text, so argparse checks them like those of the command line."""
    import yaml

    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected lines of `name: value`.")
    for name in content:
        if name not in known:
            raise ValueError(f"{path} has the unknown key {name!r}{_meant(str(name), known)}.")
    # YAML reads 1e-3 as a word, and argparse reads it as a number
    return {name: str(value) if isinstance(value, int | float) else value for name, value in content.items()}


def _meant(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check(stage: str, options: RunArguments, args: TrainingArguments) -> None:
    """Raises `ValueError` or `OSError` for settings that are certain to fail later, before anything is loaded."""
    if stage not in STAGE_NAMES:
        raise ValueError(f"There is no training stage {stage!r}; the stages are {list(STAGE_NAMES)}.")
    options.check_data()
    for source, split in [(each, "train") for each in options.data] + [(each, "test") for each in options.eval_data]:
        if _plain_text(source, split) and stage != "pretraining":
            raise ValueError(f"{source} is plain text: the stage {stage} needs dialogues.")
    if options.model is None:
        if options.preset not in PRESETS:
            raise ValueError(f"There is no preset {options.preset!r}, only {list(PRESETS)}.")
        if stage == PREFERENCE or options.lora_rank:
            raise ValueError(f"{'LoRA' if options.lora_rank else stage} needs a model to start from: give model.")
    elif Path(options.model).exists() and Path(options.model).resolve() == Path(str(args.output_dir)).resolve():
        raise ValueError(f"model and output_dir are both {options.model}: name another folder for the result.")
    else:
        refuse_adapter(options.model)
    if options.unfreeze and (options.lora_rank or args.max_steps < 1):
        raise ValueError("unfreeze needs max_steps, and no lora_rank.")
    if stage == "memory_aware" and options.turns < 2:
        raise ValueError("memory_aware needs dialogues of two turns or more, got turns=1: one turn reads no memory.")
    if unknown := sorted(set(options.config_fields) - {each.name for each in dataclasses.fields(RxTConfig)}):
        raise ValueError(f"override has {unknown[0]!r}, which is no field of RxTConfig.")
    if args.fp16 and args.device.type == "cpu":
        raise ValueError("fp16 needs a GPU: use bf16 on a CPU.")
    if args.label_smoothing_factor and (stage != "memory_aware" or args.torch_compile):
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} is for memory_aware without torch_compile: Trainer "
            "smooths next tokens by their logits alone, and the other losses would be lost."
        )
    said = Path(str(args.output_dir)) / RUN_NAME
    if said.is_file() and (other := read_object(said)["stage"]) != stage:
        raise ValueError(f"{args.output_dir} holds a run of the stage {other}: name another output_dir for {stage}.")


def _plain_text(source: str, split: str) -> Path | None:
    """Returns the file of a source, if it is plain text."""
    path = find_file(source, split, (*ENDINGS, ".txt"))
    return path if path is not None and path.suffix == ".txt" else None


def texts_of(source: str, split: str, options: RunArguments) -> Iterator[str]:
    """Documents of a source; a dialogue is one, its texts in order."""
    if path := _plain_text(source, split):
        found = filter(None, map(str.strip, read_text(path).split("\n\n")))
    else:
        rows = converted_rows(source, _row_text, split, skip_bad_rows=options.skip_bad_rows)
        found = (text for _, text in rows)
    yield from islice(found, options.number(split))


def _row_text(row: Any) -> str | None:
    if isinstance(row, Mapping) and row.get("text") is not None:
        return checked_text(row["text"], "text")
    episode = to_episode(row)
    return None if episode is None else _as_text(episode)


def _as_text(dialogue: Mapping[str, Any]) -> str:
    return "\n".join(text for turn in dialogue["interactions"] for text in said(turn))


def preferences_of(source: str, split: str, options: RunArguments) -> list[list[dict]]:
    """Dialogues with `rejected`."""
    rows = converted_rows(source, _preferences, split, skip_bad_rows=options.skip_bad_rows)
    found = (turns for _, turns in islice(rows, options.number(split)))
    return [turns[: options.turns] for turns in found if any(turn.get("rejected") for turn in turns[: options.turns])]


def _preferences(row: Any) -> list[dict[str, Any]] | None:
    if isinstance(row, Mapping) and row.get("chosen") is not None:
        return preference_interactions(row)
    episode = to_episode(row)
    return None if episode is None else episode["interactions"]


def features_of(
    stage: str,
    sources: Sequence[str],
    split: str,
    options: RunArguments,
    config: RxTConfig,
    tokenizer: Any,
) -> list[dict[str, Any]]:
    """Returns the features of the stage's collator; raises `ValueError` if the stage can learn nothing from them."""
    needs = "no answer within the limits of turns and tokens"
    tokens = options.tokens or min(config.max_position_embeddings, tokenizer.model_max_length)
    if stage == "pretraining":
        texts = chain.from_iterable(texts_of(source, split, options) for source in sources)
        found, needs = list(pack_texts(tokenizer, texts, tokens)), "no text"
    elif stage == PREFERENCE:
        pairs = (preferences_of(source, split, options) for source in sources)
        found = [encode_preferences(tokenizer, turns, config.vocab_size) for turns in chain.from_iterable(pairs)]
        needs = "no rejected answer"
    else:
        dialogues = chain.from_iterable(
            sampled(source, split, options.number(split), skip_bad_rows=options.skip_bad_rows) for source in sources
        )
        limits: dict[str, int] = {"max_tokens": tokens, "vocab_size": config.vocab_size}
        episodes = Episodes(tokenizer, dialogues, max_turns=options.turns, **limits)
        found: list[dict[str, Any]] = [episodes[index] for index in range(len(episodes))]
        if stage == "finetuning":
            found = [turn for episode in found for turn in _single_turns(episode)]
        if stage == "memory_aware":
            many, found = len(found), [episode for episode in found if len(episode["labels"]) > 1]
            if found and len(found) < many:
                logger.warning(f"{many - len(found)} of {many} dialogues have one turn, which reads no memory.")
            needs = "no dialogue of two turns or more" if many else needs
    if not found:
        raise ValueError(f"There is {needs} in {', '.join(sources)}: nothing to learn for the stage {stage}.")
    return found


def _single_turns(episode: Mapping[str, list[list[int]]]) -> Iterator[dict[str, list[int]]]:
    for ids, labels in zip(episode["input_ids"], episode["labels"], strict=True):
        if any(label != -100 for label in labels):
            yield {"input_ids": ids, "labels": labels}


def in_batches(features: Sequence[dict[str, Any]], max_batch_tokens: int) -> StepDataset:
    """Batches of features of about as many turns and tokens, see [`bucket_by_turns`]."""
    rows = [row if isinstance(row[0], list) else [row] for row in (feature["input_ids"] for feature in features)]
    sizes = [(len(turns), max(map(len, turns))) for turns in rows]
    largest = max(turns * tokens for turns, tokens in sizes)
    if largest > max_batch_tokens:
        raise ValueError(
            f"max_batch_tokens={max_batch_tokens} does not hold the largest item of the data, of {largest} padded "
            "tokens: raise it, or cut dialogues by turns and tokens."
        )
    return StepDataset(features, bucket_by_turns(sizes, max_batch_tokens=max_batch_tokens))


def load_tokenizer(options: RunArguments, start: str | None) -> Any:
    """The tokenizer given, or that of the model, or a new one of the training data."""
    if name := options.tokenizer or start:
        tokenizer: Any = AutoTokenizer.from_pretrained(name)
    else:
        texts = chain.from_iterable(texts_of(source, "train", options) for source in options.data)
        fields = PRESETS[options.preset] | options.config_fields
        tokenizer = train_tokenizer(texts, options.vocab_size, max_length=fields["max_position_embeddings"])
    # in the pieces of a pretrained model's template, neither is needed before a token is to be masked
    needed = ("pad", "bos", "eos", "mask") if source_pieces(tokenizer) is None else ("pad", "eos")
    if missing := [each for each in needed if getattr(tokenizer, f"{each}_token_id") is None]:
        raise ValueError(
            f"The tokenizer {name} has no {missing[0]}_token: see rxt_hf.chat_template.add_control_tokens."
        )
    return tokenizer


def config_of(options: RunArguments, start: str | None, tokenizer: Any) -> RxTConfig:
    """The configuration of `start`, or of a new model; raises `ValueError` if the tokenizer does not fit."""
    fields = options.config_fields
    if start is None:
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
        new: dict[str, Any] = {**PRESETS[options.preset], **fields, "vocab_size": len(tokenizer), **ids}
        return RxTConfig(**new)
    model_type = PreTrainedConfig.get_config_dict(start)[0].get("model_type")
    if model_type != "rxt":
        raise ValueError(f"{start} holds a model of type {model_type!r}: make an RxT of it first (rxt convert).")
    config = RxTConfig.from_pretrained(start, **fields)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, the model's vocabulary only {config.vocab_size}."
        )
    return config


def load_model(stage: str, options: RunArguments, start: str | None, config: RxTConfig) -> RxTForCausalLM:
    """The stage's class with the weights of `start`, or with new ones; in float32."""
    model_class: Any = RxTForCausalLM if stage == PREFERENCE else STAGES[stage][0]
    settings: dict[str, Any] = {}
    if model_class is RxTForPreTraining:
        settings = {"mlm_loss_coef": options.mlm_loss_coef, "memory_noise_std": options.memory_noise_std}
    if start is None:
        model = model_class(config, **settings)
    else:
        settings |= {"may_drop": bool(options.config_fields), "config": config, "dtype": torch.float32}
        model = load_whole(model_class, start, **settings)
    model.set_bptt_turns(options.bptt_turns)
    if options.attn_implementation is not None:
        model.set_attn_implementation(options.attn_implementation)
    return model


def adapted(stage: str, model: RxTForCausalLM, tokenizer: Any, rank: int) -> Any:
    """Returns the model with LoRA on its decoder; parameters that the stage does not train stay frozen."""
    from peft import get_peft_model

    model_with_adapters: Any = get_peft_model(model, adapter_config(model, tokenizer, r=rank, lora_alpha=2 * rank))
    if stage in STAGES:
        for name, parameter in model_with_adapters.named_parameters():
            if not name.removeprefix("base_model.model.").startswith(STAGES[stage][1]):
                parameter.requires_grad_(False)
    return model_with_adapters


def optimizers_of(model: Any, options: RunArguments, args: TrainingArguments) -> tuple[Any, Any]:
    """AdamW with the schedule of [`unfreezing_optimizer`], or what `Trainer` makes itself."""
    if not options.unfreeze:
        return None, None
    idle = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = get_scheduler(
        args.lr_scheduler_type,
        idle,
        args.get_warmup_steps(args.max_steps),
        args.max_steps,
        scheduler_specific_kwargs=cast("dict", args.lr_scheduler_kwargs or {}),
    )
    return unfreezing_optimizer(
        model,
        options.first_steps,
        cast("Any", schedule).lr_lambdas[0],
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
    )


def collator_of(stage: str, tokenizer: Any) -> Any:
    if stage in (PREFERENCE, "memory_aware"):
        return RxTEpisodeCollator(tokenizer.pad_token_id)
    if tokenizer.mask_token_id is None:
        raise ValueError(f"The stage {stage} masks tokens, and the tokenizer has no mask_token.")
    special = [token for token, added in tokenizer.added_tokens_decoder.items() if added.special]
    return RxTPreTrainingCollator(
        tokenizer.pad_token_id, mask_token_id=tokenizer.mask_token_id, special_token_ids=special
    )


def build_trainer(
    stage: str,
    options: RunArguments,
    args: TrainingArguments,
    model: RxTForCausalLM,
    tokenizer: Any,
    data: list[Any],
) -> Trainer:
    """The stage's `Trainer`; `data` are the features to train on, and those to evaluate on or None."""
    collator = collator_of(stage, tokenizer)
    if limit := options.max_batch_tokens:
        data = [found and in_batches(found, limit) for found in data]
        collator = StepCollator(collator)
        args.per_device_train_batch_size = args.per_device_eval_batch_size = 1
    trainer_class: Any = PreferenceTrainer if stage == PREFERENCE else Trainer
    reference = {}
    if stage == PREFERENCE:
        reference["reference_model"] = None if options.lora_rank else copy.deepcopy(model)
    else:
        set_training_stage(model, stage)
    trained: Any = adapted(stage, model, tokenizer, options.lora_rank) if options.lora_rank else model
    return trainer_class(
        trained,
        args,
        train_dataset=data[0],
        eval_dataset=data[1],
        data_collator=collator,
        processing_class=tokenizer,
        optimizers=optimizers_of(trained, options, args),
        **reference,
    )


def train(stage: str, options: RunArguments, args: TrainingArguments) -> Path:
    r"""
    Runs a stage to its end, from the last checkpoint in `args.output_dir` if there is one.

    Returns: `args.output_dir`, a folder as [`rxt_hf.hub.export`] writes it.

    Raises: `ValueError` or `OSError`, before the first step, for settings that do not fit together.
    """
    check(stage, options, args)
    folder = Path(str(args.output_dir))
    checkpoint = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    set_seed(args.seed)
    # a checkpoint of a new model holds its tokenizer, too
    start = options.model or checkpoint
    tokenizer = load_tokenizer(options, start)
    config = config_of(options, start, tokenizer)
    # what is wrong with the data is said before the weights are read
    data = [
        features_of(stage, sources, split, options, config, tokenizer) if sources else None
        for sources, split in ((options.data, "train"), (options.eval_data, "test"))
    ]
    model = load_model(stage, options, start, config).to(args.device)
    trainer = build_trainer(stage, options, args, model, tokenizer, data)
    if trainer.is_world_process_zero():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RUN_NAME).write_text(json.dumps({"stage": stage, **dataclasses.asdict(options)}, indent=1) + "\n")
    measured = {"seconds": trainer.train(resume_from_checkpoint=checkpoint).metrics["train_runtime"]}
    if checkpoint is not None:
        measured["resumed"] = int(checkpoint.rpartition("-")[2])
    if options.eval_data:
        measured["eval_loss"] = trainer.evaluate()["eval_loss"]
    trainer.save_state()
    if not options.lora_rank:
        trainer.save_model()
    elif trainer.is_world_process_zero():
        cast("Any", trainer.model).merge_and_unload().save_pretrained(folder)
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        # what was saved, as the class that chats
        final = RxTForCausalLM.from_pretrained(folder)
        # Trainer has turned it off
        final.config.use_cache = True
        card = model_card(final, folder.name, **card_facts(stage, options, trainer, measured))
        export(final, folder, tokenizer, card=card)
    return folder


def card_facts(stage: str, options: RunArguments, trainer: Trainer, measured: Mapping[str, float]) -> dict[str, Any]:
    """Returns arguments of `rxt_hf.hub.model_card`: origin of the model, data, length of the training and losses."""
    names, tests = (
        [source.partition(":")[0] if is_hub_name(source) else Path(source).name for source in sources]
        for sources in (options.data, options.eval_data)
    )
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    found = [("train", "training loss, as last logged", names, losses[-1:])]
    found += [("test", "evaluation loss", tests, [measured[name] for name in ("eval_loss",) if name in measured])]
    results = [
        {
            "dataset_name": ", ".join(sources),
            "dataset_type": sources[0],
            "dataset_split": split,
            "metric_type": "loss",
            "metric_name": metric,
            "metric_value": round(value, 4),
        }
        for split, metric, sources, values in found
        for value in values
    ]
    base = options.model and (Path(options.model).name if Path(options.model).exists() else options.model)
    resumed = f", from step {measured['resumed']} on" if "resumed" in measured else ""
    lora = f"with LoRA of rank {options.lora_rank}, " if options.lora_rank else ""
    sentence = (
        f"Stage `{stage}` of the curriculum, {lora}{trainer.state.global_step} steps, started from "
        f"{base or 'random weights'}; {measured['seconds']:.0f} s{resumed} on {trainer.args.world_size} x "
        f"{trainer.args.device.type}. Data:"
    )
    return {"base_model": base, "datasets": names, "data": sentence, "results": results}


def run(stage: str, words: Sequence[str] = (), config: str | os.PathLike | None = None) -> None:
    """Trains a stage by the words of a command line and prints the folder of the result."""
    # here, so that a command line can be read without accelerate
    from accelerate import PartialState

    options, args = parse(stage, words, config)
    folder = train(stage, options, args)
    if args.process_index == 0:
        print(folder)
    # gloo's threads, if they still run when the interpreter ends, abort a process that has done all its work
    PartialState().destroy_process_group()
