# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""The command line `rxt`. A user's mistake costs one sentence on stderr and exit code 2."""

import contextlib
import re
import signal
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from typer.core import TyperCommand

TALK, MAKE, MEASURE, ABOUT = "Talk", "Make a model", "Measure", "About"
LOADING, ANSWERS = "Loading the model", "Answers"
app = typer.Typer(
    help="Reactive Transformers: chat with a model that has a memory.",
    subcommand_metavar="VERB [OPTIONS]",
    pretty_exceptions_enable=False,
)


def main(argv: list[str] | None = None) -> int:
    """Runs one verb and returns the exit code."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace"), (sys.stderr, "replace")):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors=errors)
    argv = sys.argv[1:] if argv is None else argv
    verb = f"rxt {argv[0]}" if argv[:1] and argv[0] in VERBS else "rxt"
    try:
        return app(argv, prog_name="rxt", standalone_mode=False) or 0
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 0
    except typer.TyperException as error:
        print(f"{verb}: {' '.join(error.format_message().split())} (see {verb} --help)", file=sys.stderr)
        return 2
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        from .terminal_chat import sentence

        print(f"{verb}: {sentence(error)}", file=sys.stderr)
        return 2


class _Lists(TyperCommand):
    """Takes the values of an option one after the other, as in `--turns 1 2 3`; none make an empty list."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        names = {name for each in self.params if getattr(each, "multiple", False) for name in each.opts}
        words, option = [], None
        for position, word in enumerate(args):
            if word.startswith("--"):
                option = word if word in names else None
                is_empty = option is not None and all(other.startswith("--") for other in args[position + 1 :][:1])
                words += [word, ""] if is_empty else [] if option else [word]
            else:
                words += [option, word] if option else [word]
        return super().parse_args(ctx, words)


def _parser(
    parse: Callable[[str], Any], expected: str, is_right: Callable[[Any], bool] = bool
) -> Callable[[str], Any]:
    """Returns a parser of an option's value, whose errors say the value and what is expected."""

    def parsed(text: str) -> Any:
        # no value of a list, see _Lists
        if text == "":
            return None
        try:
            value = parse(text)
        except ValueError:
            value = None
        if value is None or not is_right(value):
            raise typer.BadParameter(f"{text} is not {expected}")
        return value

    return parsed


def _bytes(text: str) -> int:
    factor = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}.get(text[-1:].upper(), 1)
    return int(text if factor == 1 else text[:-1]) * factor


_count = _parser(int, "a whole number of at least 1", lambda number: number >= 1)
_temperature = _parser(float, "between 0 and inf", lambda number: 0 <= number < float("inf"))
_probability = _parser(float, "between 0 and 1", lambda number: 0 <= number <= 1)
_size = _parser(_bytes, "a number of bytes, such as 20G")
_layers = _parser(lambda text: [int(layer) for layer in text.split(",")], "a list of layers, such as 0,2,4")


def _option(help: str, metavar: str | None = None, parser: Any = None, *, panel: str | None = None) -> Any:
    return typer.Option(help=help, metavar=metavar, parser=parser, rich_help_panel=panel, show_default=False)


def _switch(name: str, help: str) -> Any:
    return typer.Option(name, help=help, show_default=False)


Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="Model folder or Hub name, or smollm2 for the larger demo (default: the demo).",
        show_default=False,
    ),
]
Seed = Annotated[
    int | None, _option("Seed of sampling and of a random initial memory (default: none).", "N", panel=LOADING)
]
Device = Annotated[
    str | None, _option("Device, such as cpu or cuda:0 (default: a GPU if there is one).", "NAME", panel=LOADING)
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    _option("Dtype of the weights (default: that of the file).", panel=LOADING),
]
Memory = Annotated[str | None, _option("Memory file to go on from.", "FILE")]
Temperature = Annotated[
    float | None, _option("Temperature of sampling (default: 0, greedy).", "T", _temperature, panel=ANSWERS)
]
TopP = Annotated[float | None, _option("Probability to sample from (default: 1).", "P", _probability, panel=ANSWERS)]
MaxNewTokens = Annotated[int | None, _option("Longest answer in tokens (default: 128).", "N", _count, panel=ANSWERS)]
Folder = Annotated[str, typer.Argument(metavar="FOLDER", help="Target: a new or empty folder, or an earlier export.")]


def _version(is_asked: bool) -> None:
    if is_asked:
        from . import __version__

        print(f"rxt {__version__}")
        raise typer.Exit


@app.callback()
def _rxt(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command(rich_help_panel=TALK)
def chat(
    model: Model = None,
    demo: Annotated[
        Literal["tiny", "smollm2"] | None, _option("Which demo, if no MODEL is given (default: tiny).", "NAME")
    ] = None,
    script: Annotated[str | None, _option("Read the user's lines from FILE; # starts a comment line.", "FILE")] = None,
    system: Annotated[str | None, _option("System prompt, written into the memory once.", "TEXT")] = None,
    memory: Memory = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    max_new_tokens: MaxNewTokens = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Talk with a model."""
    from . import terminal_chat

    # before the model is loaded: a misspelt name should not cost that wait
    lines = None if script is None else terminal_chat.script_lines(Path(script).expanduser())
    if demo is not None and model is not None:
        raise ValueError(f"Give a model or --demo, not both: got {model!r} and --demo {demo}.")
    model = model if demo in (None, "tiny") else demo
    sampling = _sampling(temperature, top_p, max_new_tokens)
    loaded = _load_model(model, seed, device, dtype)
    session = _open_session(loaded, sampling, memory, system)
    conversations = terminal_chat.TerminalChat(session, echoes=lines is not None or not sys.stdin.isatty())
    conversations.say(terminal_chat.about(_folder(model), loaded[0]))
    conversations.run(terminal_chat.typed_lines() if lines is None else lines)


@app.command(rich_help_panel=TALK)
def generate(
    query: Annotated[str, _option("Message to the model.", "TEXT")],
    model: Model = None,
    save_memory: Annotated[str | None, _option("File for the memory after the turn.", "FILE")] = None,
    memory: Memory = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    max_new_tokens: MaxNewTokens = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Print the answer to one query."""
    from .terminal_chat import PRINTABLE, new_file

    # before the model is loaded: an answer whose memory cannot be saved is lost
    target = None if save_memory is None else new_file(Path(save_memory).expanduser())
    sampling = _sampling(temperature, top_p, max_new_tokens)
    session = _open_session(_load_model(model, seed, device, dtype), sampling, memory)
    print(session.send(query).translate(PRINTABLE), flush=True)
    if target is not None:
        session.save(target)


@app.command(rich_help_panel=TALK)
def serve(
    model: Model = None,
    host: Annotated[
        str, _option("Address (default: 127.0.0.1); others than this machine's need --tokens.")
    ] = "127.0.0.1",
    port: Annotated[int, _option("Port (default: 8000).")] = 8000,
    name: Annotated[str | None, _option("The model's name for clients (default: that of its folder).")] = None,
    tokens: Annotated[str | None, _option("Who may ask: lines of TOKEN TENANT.", "FILE")] = None,
    store: Annotated[
        str, _option("SQLite file, redis://HOST:PORT, or memory (default: rxt-serve.sqlite).", "URL")
    ] = "rxt-serve.sqlite",
    keep: Annotated[Literal["text", "none"], _option("Whether to store what was said (default: none).")] = "none",
    max_rows: Annotated[int | None, _option("Turns at once (default: half the free memory).", "N", _count)] = None,
    max_bytes: Annotated[int | None, _option("Size of the store, such as 20G (default: any).", "N", _size)] = None,
    compile: Annotated[bool, _switch("--compile", "Compile the step (torch.compile).")] = False,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Serve a model's conversations to OpenAI's clients."""
    from .serving.app import build_app
    from .serving.app import serve as listen
    from .serving.guard import check_address, read_tokens
    from .serving.service import Settings
    from .serving.store import open_store

    tenants = None if tokens is None else read_tokens(Path(tokens).expanduser())
    check_address(host, tenants is not None)
    loaded, tokenizer = _load_model(model, seed, device, dtype)
    if tokenizer.chat_template is None:
        raise ValueError("The tokenizer has no chat template: use rxt_hf.chat_template.add_control_tokens.")
    print(f"model   {_folder(model)}, {loaded.num_parameters() / 1e6:.1f} million parameters", flush=True)
    states = open_store(store)
    text = "kept" if keep == "text" else "not kept"
    print(f"store   {store}, {states.usage().records} states; text is {text}", flush=True)
    settings = Settings(
        name=name or Path(_folder(model)).resolve().name,
        tokens=tenants,
        keeps_text=keep == "text",
        max_rows=max_rows,
        max_bytes=max_bytes,
        compiles=compile,
    )
    server = build_app(loaded, tokenizer, states, settings)
    service = server.app.state.service
    print(f"engine  {service.engine.max_rows} turns at once, {service.memory_bytes} bytes a memory", flush=True)
    print(f"listens http://{host}:{port}, model {settings.name!r}; Ctrl-C ends", flush=True)
    # uvicorn ends what runs, and then lets the signal do what it did before
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        listen(server, settings, host, port)
    finally:
        print("ended   all turns are answered", flush=True)


class _Training(TyperCommand):
    """Shows the options of a run and those of transformers' Trainer, ours first."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        import dataclasses

        from transformers import TrainingArguments

        from .training.preference import PreferenceArguments
        from .training.run import RunArguments

        super().format_help(ctx, formatter)
        shown: set[str] = set()
        for title, kind in (
            ("Options of the run", RunArguments),
            ("Options of transformers' Trainer", TrainingArguments),
            ("Options of the stage preference", PreferenceArguments),
        ):
            table = Table(title=title, title_justify="left", box=None, show_header=False, padding=(0, 2, 0, 1))
            for field in dataclasses.fields(kind):
                if field.name not in shown:
                    help = " ".join(str(field.metadata.get("help", "")).split())
                    table.add_row(f"--{field.name}", re.split(r"(?<=\.) ", help)[0])
            shown |= {field.name for field in dataclasses.fields(kind)}
            Console(markup=False, highlight=False).print(table)


@app.command(rich_help_panel=MAKE, cls=_Training, context_settings={"ignore_unknown_options": True})
def train(
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="Stage of the curriculum, such as pretraining.")],
    words: Annotated[
        list[str] | None, typer.Argument(metavar="OPTIONS", help="Options of the run and of Trainer, see below.")
    ] = None,
    config: Annotated[str | None, _option("YAML file of options; the command line overrides it.", "FILE")] = None,
) -> None:
    """Train a stage of the curriculum."""
    from .training.run import run

    run(stage, words or [], config)


@app.command(rich_help_panel=MAKE)
def convert(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Llama, Mistral, Qwen2/3 or SmolLM3 by folder or name, or a folder of RxT's authors.",
        ),
    ],
    folder: Folder,
    slots: Annotated[int | None, _option("Slots of each memory layer (default: 64).", "N")] = None,
    memory_layers: Annotated[
        Any, _option("Decoder layers that read the memory (default: all).", "0,2,4", _layers)
    ] = None,
    salience: Annotated[
        str | None, _option("Dialogues (split train, or a file) to learn what to keep.", "DATA")
    ] = None,
) -> None:
    """Make an RxT of a pretrained language model."""
    source, target = _folder(model), _target(folder)
    from transformers.utils import logging

    from .convert import fit_salience
    from .data.readers import Episodes, sampled
    from .hub import export, model_card

    logging.disable_progress_bar()
    options = {"slots": slots, "memory_layers": memory_layers, "salience": salience}
    with _refused(f"Cannot convert {source!r}"), _progress("Converting"):
        converted, tokenizer, facts = _converted(
            source, {name: value for name, value in options.items() if value is not None}
        )
    if tokenizer is not None:
        limit = converted.config.max_position_embeddings
        tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
    if salience is not None:
        dialogues = sampled(str(Path(salience).expanduser()), "train", 400)
        with _progress("Learning what to keep"):
            found = fit_salience(converted, Episodes(tokenizer, dialogues, max_tokens=tokenizer.model_max_length))
    base_model = source if source == model and not Path(source).is_dir() else Path(source).resolve().name
    export(converted, target, tokenizer, card=model_card(converted, target.name, base_model=base_model, **facts))
    memory = f"{converted.config.num_memory_layers} layers of {converted.config.num_memory_slots} slots"
    print(f"{target}: memory of {memory}{'' if tokenizer else '; no tokenizer was found that fits'}")
    if salience is not None:
        print(f"salience: {found['held']:.0%} of the words that are recalled were held when they were asked for")


def _converted(source: str, options: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """Model, tokenizer, and what the card says of the licence."""
    from .convert import convert_tokenizer, from_llm, from_rxlm
    from .convert.rxlm import LICENCE_NOTICE
    from .data.files import read_object

    config = Path(source) / "config.json"
    if not Path(source).is_dir() or (config.is_file() and "model_type" in read_object(config)):
        tokenizer = convert_tokenizer(source)
        slots = {"num_memory_slots": options["slots"]} if "slots" in options else {}
        model = from_llm(source, tokenizer=tokenizer, memory_layers=options.get("memory_layers"), **slots)
        return model, tokenizer, {"licence_notice": "That of the base model holds."}
    if options:
        raise ValueError(
            "a checkpoint of RxT's authors has its own memory: leave out --slots, --memory-layers and --salience."
        )
    model = from_rxlm(source)
    tokenizer = convert_tokenizer(source, template="control") if (Path(source) / "tokenizer.json").is_file() else None
    if tokenizer is not None and len(tokenizer) > model.config.vocab_size:
        tokenizer = None
    return model, tokenizer, {"license": "other", "license_name": "raml", "licence_notice": LICENCE_NOTICE}


@app.command(rich_help_panel=MAKE)
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder or Hub name.")],
    folder: Folder,
    push: Annotated[str | None, _option("Hub repository to upload to, owner/name.", "REPO")] = None,
    card: Annotated[
        str | None, _option("JSON file with fields of the card: results, base_model, data.", "FILE")
    ] = None,
) -> None:
    """Write a folder for the Hub, with code and card."""
    from . import hub
    from .data.files import read_object

    target, facts = _target(folder), {} if card is None else read_object(Path(card).expanduser())
    loaded, tokenizer = _load_model(model, None, "cpu", "auto")
    try:
        text = hub.model_card(loaded, push or target.name, **facts) if facts else None
    except (TypeError, AttributeError) as error:
        # JSON of other types than model_card takes
        raise ValueError(f"{card} is refused: {error}") from error
    hub.export(loaded, target, tokenizer, card=text, push_to_hub=push)
    print(target)


@app.command("eval", rich_help_panel=MEASURE, cls=_Lists)
def evaluate(
    model: Model = None,
    data: Annotated[
        list[str] | None,
        _option("Folders with the split test, or files (default: the demo's test set).", "FOLDER ..."),
    ] = None,
    dialogues: Annotated[int, _option("Dialogues sampled per folder (default: 50).", "N", _count)] = 50,
    skip_bad_rows: Annotated[
        bool, _switch("--skip-bad-rows", "Leave out rows that cannot be read, and report how many and why.")
    ] = False,
    tokens: Annotated[
        int,
        _option("Longest interaction in tokens; a dialogue is cut before a longer one (default: 64).", "N", _count),
    ] = 64,
    inside: Annotated[int, _option("Dialogues whose memory is shown turn by turn (default: 4).", "N")] = 4,
    output: Annotated[str, _option("JSON file of all figures (default: eval.json).", "FILE")] = "eval.json",
    report: Annotated[str | None, _option("HTML page of all figures, with charts.", "FILE")] = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Measure what a model's memory holds over dialogues."""
    options = SimpleNamespace(**locals())
    from . import DEMO
    from .evaluation.memory import run

    options.data = data or [str(DEMO)]
    loaded = _load_model(model, seed, device, dtype)
    with _progress("Measuring"):
        tables = run(options, *loaded)
    print(tables)


@app.command(rich_help_panel=MEASURE, cls=_Lists)
def bench(
    size: Annotated[
        str,
        _option("Model size: tiny, 100m (a decoder of that size) or 100m-sqa (fewer heads on the memory).", "NAME"),
    ] = "tiny",
    arms: Annotated[list[str] | None, _option("Models to time (default: all).", "NAME ...")] = None,
    turns: Annotated[
        list[int] | None,
        _option("Turns to time; none times decoding only (default: powers of two to 64).", "N ...", _count),
    ] = None,
    query_tokens: Annotated[int, _option("Tokens of a query (default: 192).", "N", _count)] = 192,
    answer_tokens: Annotated[int, _option("Tokens of an answer (default: 64).", "N", _count)] = 64,
    window_turns: Annotated[
        int, _option("Turns that sliding_window reads, this one included (default: 4).", "N", _count)
    ] = 4,
    longest_full_history: Annotated[
        int, _option("Last turn that full_history plays (default: 64).", "TURN", _count)
    ] = 64,
    batch_size: Annotated[int, _option("Conversations at once (default: 1).", "N", _count)] = 1,
    decode_batch_sizes: Annotated[
        list[int] | None,
        _option("Batch sizes of the decoding test; none times turns only (default: 1 8).", "N ...", _count),
    ] = None,
    compile: Annotated[
        bool, _switch("--compile", "Time decoding with a static cache and torch.compile as well.")
    ] = False,
    peer_shapes: Annotated[
        bool, _switch("--peer-shapes", "Time the shapes that the authors' package was timed at, and nothing else.")
    ] = False,
    repeats: Annotated[int, _option("Rounds; each plays every model once (default: 7).", "N", _count)] = 7,
    limit_s: Annotated[
        float, _option("Seconds after which no fourth or later round begins (default: 120).", "S")
    ] = 120.0,
    dtype: Annotated[Literal["float32", "bfloat16"], _option("Dtype of the weights (default: float32).")] = "float32",
    attn_implementation: Annotated[str, _option("Attention (default: sdpa).", "NAME")] = "sdpa",
    device: Device = None,
    output: Annotated[str, _option("JSON file of the report (default: turn_cost.json).", "FILE")] = "turn_cost.json",
    plot: Annotated[str | None, _option("Picture of the curves; needs matplotlib.", "FILE")] = None,
) -> None:
    """Measure the cost of a turn by its number, against a Llama of the same shape."""
    options = SimpleNamespace(**locals())
    from .evaluation.speed import ARMS, SIZES, run

    options.arms = list(ARMS) if arms is None else arms
    options.turns = [1, 2, 4, 8, 16, 32, 64] if turns is None else [turn for turn in turns if turn]
    options.decode_batch_sizes = (
        [1, 8] if decode_batch_sizes is None else [rows for rows in decode_batch_sizes if rows]
    )
    options.device = str(_device(device))
    for name, found, known in (("--size", [size], SIZES), ("--arms", options.arms, ARMS)):
        if unknown := [each for each in found if each not in known]:
            raise ValueError(f"{name} is {unknown[0]!r}, expected one of {', '.join(known)}.")
    if peer_shapes:
        from .evaluation.peer_shapes import run
    with _progress("Measuring"):
        tables = run(options)
    print(tables)


@app.command(rich_help_panel=ABOUT)
def env() -> None:
    """Print versions and devices, for bug reports."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch
    from transformers.utils import is_flash_attn_2_available, is_torch_flex_attn_available

    from . import __version__

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    available = {"flex_attention": is_torch_flex_attn_available(), "flash_attention_2": is_flash_attn_2_available()}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    packages = ("transformers", "torch", "tokenizers", "safetensors", "accelerate", "peft", "flash-attn")
    facts = {
        "rxt_hf": __version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        **{package: installed(package) for package in packages},
        "device": f"{device}, {torch.get_num_threads()} CPU threads",
        "attention": ", ".join(["eager", "sdpa", *(name for name, is_there in available.items() if is_there)]),
    }
    for name, value in facts.items():
        print(f"{name:<13} {value}")


VERBS = [command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands]


def _folder(model: str | None) -> str:
    from . import DEMO

    if model is None:
        return str(DEMO)
    path = Path(model).expanduser()
    if path.is_dir():
        return str(path)
    if model == "smollm2":
        from .convert.smollm2 import SMOLLM2_DEMO

        return str(SMOLLM2_DEMO)
    # everything that is not spelled like owner/name on the Hub is a folder that is missing
    if path.exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", model):
        raise ValueError(f"There is no model folder {model!r}.")
    return model


def _target(text: str) -> Path:
    """Returns a folder that may be written; raises `ValueError` for one that holds other files."""
    from .data.files import read_object

    folder = Path(text).expanduser()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, expected a folder or nothing.")
    if folder.is_dir() and any(folder.iterdir()):
        config = folder / "config.json"
        if not config.is_file() or read_object(config).get("model_type") != "rxt":
            raise ValueError(f"{folder} holds other files: name a folder that is new, empty or an earlier export.")
    return folder


def _load_model(model: str | None, seed: int | None, device: str | None, dtype: str) -> tuple[Any, Any]:
    folder = _folder(model)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed
    from transformers.utils import logging

    from .convert.smollm2 import SMOLLM2_DEMO, load_smollm2_demo
    from .loading import load_whole, refuse_adapter

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if seed is not None:
        set_seed(seed)
    place = _device(device)
    with _refused(f"Cannot load the model {folder!r}"), _progress("Loading"):
        if folder == str(SMOLLM2_DEMO):
            loaded, tokenizer = load_smollm2_demo()
            return loaded.to(place, dtype=None if dtype == "auto" else getattr(torch, dtype)), tokenizer
        refuse_adapter(folder)
        model_type = AutoConfig.from_pretrained(folder).model_type
        if model_type != "rxt":
            raise ValueError(f'it holds a model of type "{model_type}", not an RxT')
        loaded = load_whole(AutoModelForCausalLM, folder, dtype=dtype)
        return loaded.to(place), AutoTokenizer.from_pretrained(folder)


def _device(name: str | None) -> Any:
    """Returns the device of that name, after trying it out; without a name, a GPU if there is one."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # tried with a number, since a name may be right and the device not there; "meta" gives none back
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        # what torch raises for an unknown name, for a kind of device it was built without, and for a missing plug-in
        there = ", ".join(["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))])
        raise ValueError(f"There is no device {name!r} here to compute on, only {there}.") from error
    return torch.device(name)


@contextlib.contextmanager
def _refused(what: str) -> Generator[None, None, None]:
    """
    Turns any error of reading a folder into one sentence. No narrower class covers them all: tokenizers raises plain
    `Exception` for a damaged tokenizer.json, and the error of safetensors derives from nothing else.
    """
    from .terminal_chat import sentence

    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {sentence(error)}") from error


@contextlib.contextmanager
def _progress(text: str) -> Generator[None, None, None]:
    """Shows on a terminal, until it is done, that something goes on and for how long."""
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    # what is printed meanwhile goes where it was to go
    place: dict[str, Any] = {"console": Console(stderr=True), "redirect_stdout": False, "redirect_stderr": False}
    with Progress(*columns, transient=True, disable=not sys.stderr.isatty(), **place) as shown:
        shown.add_task(text, total=None)
        yield


def _sampling(temperature: float | None, top_p: float | None, max_new_tokens: int | None) -> dict[str, Any]:
    """Arguments of `generate`."""
    greedy = temperature == 0 or (temperature is None and top_p is None)
    if greedy and top_p is not None:
        raise ValueError("--top-p has no effect at --temperature 0, which does not sample: leave out one of them.")
    given = {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens}
    if greedy:
        given["temperature"] = None
    return {"do_sample": not greedy} | {name: value for name, value in given.items() if value is not None}


def _open_session(
    loaded: tuple[Any, Any], sampling: dict[str, Any], memory: str | None, system: str | None = None
) -> Any:
    from .session import RxTSession

    if memory is None:
        return RxTSession(*loaded, system=system, **sampling)
    if system is not None:
        raise ValueError("--system starts a conversation and --memory continues one: give one of them.")
    return RxTSession.load(Path(memory).expanduser(), *loaded, **sampling)


if __name__ == "__main__":
    sys.exit(main())
