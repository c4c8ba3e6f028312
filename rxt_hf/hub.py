# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""Folders to share: a model that loads with `trust_remote_code=True` without this package, and a written memory."""

import copy
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, hf_hub_download
from transformers import PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .cache_rxt import STMCache
from .modeling_rxt import RxTForCausalLM

AUTO_MAP = {
    "AutoConfig": "configuration_rxt.RxTConfig",
    "AutoModel": "modeling_rxt.RxTForCausalLM",
    "AutoModelForCausalLM": "modeling_rxt.RxTForCausalLM",
}
WEIGHT_FILES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, "model-*-of-*.safetensors")
CARD_NAME = "README.md"
MEMORY_NAME = "memory.stm"
PATENT_NOTICE = """\
The Reactive Transformer architecture is the subject of a pending patent application (P.453260, Reactive AI). The code
that reads these files is an independent implementation from the papers arXiv:2510.03561 and arXiv:2510.01817; it is
not affiliated with or endorsed by Reactive AI, and its licence grants nothing in respect of third parties' patents."""
TEMPLATES = Path(__file__).parent / "templates"


def export(
    model: RxTForCausalLM,
    folder: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    card: str | None = None,
    push_to_hub: str | None = None,
    **save_kwargs: Any,
) -> Path:
    r"""
    Writes weights, configuration, tokenizer, model card and the model's code into a folder that `AutoConfig`,
    `AutoModel`, `AutoModelForCausalLM` and `AutoTokenizer` load with `trust_remote_code=True`, without this package.

    Everything is written beside `folder` first, so an error leaves an earlier export as it was. Then files of the same
    name are replaced, weights of the earlier export are removed, and other files stay. The generation config goes
    without its `max_new_tokens`.

    Args:
        model ([`RxTForCausalLM`]): is not changed; later calls of `save_pretrained` write no code.
        tokenizer (*optional*): saved with its chat template.
        card (`str`, *optional*): text of `README.md`, such as [`model_card`] returns. By default one that is there is
            kept; otherwise a card without results is written.
        push_to_hub (`str`, *optional*): the Hub repository, `"owner/name"`, that the files are uploaded to. It is
            created if it does not exist.
        save_kwargs: go to [`~PreTrainedModel.save_pretrained`], for example `max_shard_size` or `token`.

    Returns: the folder.

    Raises: `TypeError` if `model` is of another class, `ValueError` if it still has adapters, `NotADirectoryError` if
    `folder` is a file.
    """
    if type(model).__name__ != RxTForCausalLM.__name__:
        raise TypeError(
            f"export needs an RxTForCausalLM, got {type(model).__name__}; unwrap the model first "
            "(adapters: merge_and_unload())."
        )
    if any(".base_layer." in name for name, _ in model.named_parameters()):
        raise ValueError("The model has adapters, which an export cannot hold: merge them first (merge_and_unload()).")
    folder = _as_folder(folder)
    if card is None and not (folder / CARD_NAME).exists():
        card = model_card(model, push_to_hub or folder.name)

    names = _replace(folder, lambda partial: _write(model, partial, tokenizer, card, save_kwargs))
    if push_to_hub is not None:
        _upload(folder, push_to_hub, names, save_kwargs.get("token"), "Export of an RxT model", WEIGHT_FILES)
    return folder


def model_card(
    model: RxTForCausalLM,
    name: str,
    *,
    results: Iterable[EvalResult | Mapping[str, Any]] = (),
    base_model: str | None = None,
    datasets: Iterable[str] = (),
    data: str | None = None,
    license: str | None = None,
    licence_notice: str = "",
    **metadata: Any,
) -> str:
    r"""
    Returns the text of a model card: what the model is, how to run it, where it comes from, and the given results. The
    header holds the same for the Hub.

    Args:
        name (`str`): the repository or folder that the example loads.
        results (`Iterable` of `EvalResult` or of mappings of its fields, *optional*): what was measured, for example
            `{"dataset_name": "SGD", "dataset_type": "sgd", "metric_type": "accuracy", "metric_value": 0.5}`.
        base_model (`str`, *optional*): repository of the model that this one was made from.
        datasets (`Iterable[str]`, *optional*): names of the data sets that it was trained on.
        data (`str`, *optional*): a sentence about that data.
        license (`str`, *optional*): licence of the weights (default: Apache-2.0, or "unknown" with a `base_model`).
        licence_notice (`str`): a sentence about that licence.
        metadata: further fields of `huggingface_hub.ModelCardData`, such as `language`.

    Raises: `ValueError` for a result that lacks a field of `EvalResult`, or has another one.
    """
    evaluated, datasets = [_as_result(result) for result in results], list(datasets)
    metadata = {"license": license or ("unknown" if base_model else "apache-2.0")} | metadata
    header = ModelCardData(
        model_name=name.rsplit("/", 1)[-1] if evaluated else None,
        base_model=base_model,
        datasets=datasets or None,
        eval_results=evaluated or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["rxt", "reactive-transformer", "memory", "custom_code"],
        **metadata,
    )
    return str(
        ModelCard.from_template(
            header,
            template_path=str(TEMPLATES / "model_card.jinja"),
            name=name,
            millions=f"{model.num_parameters() / 1e6:.1f}",
            config=model.config,
            datasets=datasets,
            results=evaluated,
            data=data,
            licence_notice=licence_notice,
            patent_notice=PATENT_NOTICE,
        )
    )


def export_memory(
    stm_cache: STMCache,
    folder: str | os.PathLike,
    *,
    description: str,
    base_model: str,
    license: str = "apache-2.0",
    push_to_hub: str | None = None,
    token: str | bool | None = None,
) -> Path:
    r"""
    Writes a memory and its card into a folder, to be shared: for example a system prompt that has been written once.
    Everything is written beside `folder` first, as in [`export`].

    Args:
        stm_cache ([`STMCache`]): the memory, with the fingerprint of the model that wrote it.
        description (`str`): what the memory holds.
        base_model (`str`): repository of the model that wrote it.
        license (`str`): licence of the text that the memory holds.
        push_to_hub (`str`, *optional*): the Hub repository, `"owner/name"`; created if it does not exist.

    Returns: the folder.

    Raises: [`StateError`] if the memory cannot be saved, `ValueError` if it does not say which model wrote it,
    `NotADirectoryError` if `folder` is a file.
    """
    stm_cache, folder = stm_cache.wait(), _as_folder(folder)
    if stm_cache.fingerprint is None:
        raise ValueError("The memory has no fingerprint of the model that wrote it: start it with model.init_stm().")
    layers, slots, width = stm_cache.states.shape[1:]
    card = ModelCard.from_template(
        ModelCardData(base_model=base_model, license=license, library_name="rxt_hf", tags=["rxt", "rxt-memory"]),
        template_path=str(TEMPLATES / "memory_card.jinja"),
        name=push_to_hub or folder.name,
        description=description,
        turns=", ".join(map(str, stm_cache.turns.tolist())),
        shape=f"{layers} layers of {slots} vectors of {width}",
        patent_notice=PATENT_NOTICE,
    )

    def write(partial: Path) -> None:
        partial.mkdir(parents=True)
        stm_cache.save(partial / MEMORY_NAME)
        (partial / CARD_NAME).write_text(str(card), encoding="utf-8")

    names = _replace(folder, write)
    if push_to_hub is not None:
        _upload(folder, push_to_hub, names, token, "Memory of an RxT model", ())
    return folder


def load_memory(
    repo_or_folder: str | os.PathLike,
    model: RxTForCausalLM | None = None,
    *,
    allow_other_weights: bool = False,
    **hub_kwargs: Any,
) -> STMCache:
    r"""
    Loads the memory that [`export_memory`] wrote, from a folder or the Hub. With `model`, a memory of another model is
    refused (see [`STMCache.load`]), and the memory is on the model's device.

    Args:
        allow_other_weights (`bool`): accepts a memory that other weights wrote, if its shape fits.
        hub_kwargs: go to `huggingface_hub.hf_hub_download`, for example `revision` or `token`.

    Raises: [`StateError`] for a damaged file or another model's, `FileNotFoundError` for a folder without a memory.
    """
    path = Path(repo_or_folder) / MEMORY_NAME
    if not path.parent.is_dir():
        path = hf_hub_download(str(repo_or_folder), MEMORY_NAME, **hub_kwargs)
    device = None if model is None else model.device
    return STMCache.load(path, model=model, device=device, allow_other_weights=allow_other_weights)


def code_files(model: RxTForCausalLM) -> list[Path]:
    """Returns the file that defines the model's class, and all files that it imports relatively."""
    modeling = sys.modules[type(model).__module__].__file__
    if modeling is None:
        raise ValueError(f"{type(model)} comes from no file, so its code cannot be exported.")
    return sorted({Path(modeling), *map(Path, get_relative_import_files(modeling))})


def _as_result(given: EvalResult | Mapping[str, Any]) -> EvalResult:
    if isinstance(given, EvalResult):
        return given
    try:
        fields: dict[str, Any] = {"task_type": "text-generation", **given}
        return EvalResult(**fields)
    except TypeError as error:
        # "EvalResult.__init__() missing 1 required positional argument: 'metric_value'"
        raise ValueError(f"The result {dict(given)} is refused: {str(error).partition(') ')[2]}.") from None


def _as_folder(folder: str | os.PathLike) -> Path:
    path = Path(os.path.abspath(folder))
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file, expected a folder or nothing.")
    return path


def _replace(folder: Path, write: Callable[[Path], None]) -> list[str]:
    """Lets `write` fill a folder beside `folder`, moves it there when it is complete, and returns the file names."""
    # One fixed name per target: what a killed export left is overwritten by the next one.
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write(partial)
        names = sorted(path.name for path in partial.iterdir())
        _move(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return names


def _write(
    model: RxTForCausalLM, folder: Path, tokenizer: PreTrainedTokenizerBase | None, card: str | None, save_kwargs: dict
) -> None:
    model.save_pretrained(folder, **save_kwargs)
    # how long an answer may be is the caller's: in the file it would win over the `max_length` of a call
    generation_config = copy.deepcopy(model.generation_config)
    generation_config.max_new_tokens = None
    generation_config.save_pretrained(folder)
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    # In the file, not on the model: a later save_pretrained brings no code, and must not promise any.
    config["auto_map"] = AUTO_MAP
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for path in code_files(model):
        shutil.copyfile(path, folder / path.name)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if card is not None:
        (folder / CARD_NAME).write_text(card, encoding="utf-8")


def _move(partial: Path, folder: Path) -> None:
    if not folder.exists():
        os.replace(partial, folder)
        return
    # `model.safetensors` of a former export would be loaded in place of new shards
    for path in {path for pattern in WEIGHT_FILES for path in folder.glob(pattern)}:
        path.unlink()
    for path in partial.iterdir():
        os.replace(path, folder / path.name)


def _upload(
    folder: Path, repo_id: str, names: list[str], token: str | bool | None, message: str, former: Sequence[str]
) -> None:
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, exist_ok=True).repo_id
    api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=message,
        allow_patterns=names,
        delete_patterns=list(former),
    )


__all__ = ["export", "export_memory", "load_memory", "model_card"]
