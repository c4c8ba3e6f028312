# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""The command line `rxt`: a table of verbs. A user's mistake costs one sentence on stderr and exit code 2."""

import argparse
import contextlib
import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NoReturn

# A model may produce any character; those that steer a terminal are not for it to write. Tab and line feed stay.
_PRINTABLE = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160)), "\ufffd")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: list[str] | None = None) -> int:
    """Runs one verb and returns the exit code."""
    from . import __version__ as version

    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace"), (sys.stderr, "replace")):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors=errors)
    argv = sys.argv[1:] if argv is None else argv
    parser = _Parser(prog="rxt", description="Reactive Transformers: chat with a model that has a memory.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {version}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb", parser_class=_Parser)
    for verb, (description, add_arguments, _) in VERBS.items():
        verb_parser = verbs.add_parser(verb, help=description, description=description)
        # some arguments belong to modules that take seconds to import
        if verb in argv[:1]:
            add_arguments(verb_parser)
    try:
        args = parser.parse_args(argv)
        return VERBS[args.verb][2](args)
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # the reader of our output has gone; without this, Python would complain when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        print(f"rxt {args.verb}: {_sentence(error)}", file=sys.stderr)
        return 2


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # some errors say their reason on the lines behind the first, or break a sentence over several lines
    end = next((number for number, line in enumerate(lines[:5], 1) if line.endswith((".", "!", "?", ")"))), 1)
    return " ".join(lines[:end] if end > 1 else lines[: 1 + lines[0].endswith((":", ","))])


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="model folder or Hub name (default: the demo)")
    parser.add_argument("--seed", type=int, help="seed of sampling and of a random initial memory (default: none)")
    parser.add_argument("--device", help="device, such as cpu or cuda:0 (default: a GPU if there is one)")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")


def _add_conversation_arguments(parser: argparse.ArgumentParser) -> None:
    _add_model_arguments(parser)
    parser.add_argument("--memory", metavar="FILE", help="memory file to go on from")
    parser.add_argument("--temperature", type=_number(0.0), metavar="T", help="for sampling (default: 0, greedy)")
    parser.add_argument("--top-p", type=_number(0.0, 1.0), metavar="P", help="probability to sample from (default: 1)")
    parser.add_argument("--max-new-tokens", type=_positive, metavar="N", help="longest answer, tokens (default: 128)")


def _number(low: float, high: float = float("inf")) -> Callable[[str], float]:
    def parse(text: str) -> float:
        number = float(text)
        if not low <= number <= high or number == float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return number

    parse.__name__ = "number"
    return parse


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of tokens, expected at least 1")
    return number


_positive.__name__ = "whole number"


def _folder(model: str | None) -> str:
    import rxt_hf

    if model is None:
        return str(rxt_hf.DEMO)
    path = Path(model).expanduser()
    if path.is_dir():
        return str(path)
    # everything that is not spelled like owner/name on the Hub is a folder that is missing
    if path.exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", model):
        raise ValueError(f"There is no model folder {model!r}.")
    return model


def _load_model(args: argparse.Namespace) -> tuple[Any, Any]:
    folder = _folder(args.model)
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed
    from transformers.utils import logging

    import rxt_hf  # noqa: F401  (registers the model type)

    from .loading import load_whole, refuse_adapter

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.seed is not None:
        set_seed(args.seed)
    device = _device(args.device)
    with _refused(f"Cannot load the model {folder!r}"):
        refuse_adapter(folder)
        model_type = AutoConfig.from_pretrained(folder).model_type
        if model_type != "rxt":
            raise ValueError(f'it holds a model of type "{model_type}", not an RxT')
        model = load_whole(AutoModelForCausalLM, folder, dtype=args.dtype)
        return model.to(device), AutoTokenizer.from_pretrained(folder)


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
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {_sentence(error)}") from error


def _generate_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    sampled = {name: value for name in ("temperature", "top_p") if (value := getattr(args, name)) is not None}
    greedy = sampled.get("temperature") == 0 or not sampled
    if greedy and "top_p" in sampled:
        raise ValueError("--top-p has no effect at --temperature 0, which does not sample: leave out one of them.")
    kwargs = {"do_sample": False} if greedy else {"do_sample": True, **sampled}
    return kwargs if args.max_new_tokens is None else {**kwargs, "max_new_tokens": args.max_new_tokens}


def _open_session(args: argparse.Namespace, model: Any, tokenizer: Any, system: str | None = None) -> Any:
    from .session import RxTSession

    kwargs = _generate_kwargs(args)
    if args.memory is None:
        return RxTSession(model, tokenizer, system=system, **kwargs)
    if system is not None:
        raise ValueError("--system starts a conversation and --memory continues one: give one of them.")
    return RxTSession.load(Path(args.memory).expanduser(), model, tokenizer, **kwargs)


def _add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    _add_conversation_arguments(parser)
    parser.add_argument("--query", required=True, metavar="TEXT", help="message to the model")
    parser.add_argument("--save-memory", metavar="FILE", help="file for the memory after the turn")


def _generate(args: argparse.Namespace) -> int:
    # before the model is loaded: an answer whose memory cannot be saved is lost
    target = None if args.save_memory is None else _new_file(Path(args.save_memory).expanduser())
    _generate_kwargs(args)
    session = _open_session(args, *_load_model(args))
    print(session.send(args.query).translate(_PRINTABLE), flush=True)
    if target is not None:
        session.save(target)
    return 0


def _new_file(path: Path) -> Path:
    """Returns the path if it can be written; raises `OSError` with the folder or the path if not."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, "There is no folder to write to", str(folder))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "This is a folder, expected a file to write", str(path))
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, "The folder may not be written", str(folder))
    return path


def _add_export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="model folder or Hub name")
    parser.add_argument("folder", metavar="FOLDER", help="target: a new or empty folder, or an earlier export")
    parser.add_argument("--push", metavar="REPO", help="Hub repository to upload to, owner/name")
    parser.add_argument("--card", metavar="FILE", help="JSON file with fields of the card: results, base_model, data")


def _export(args: argparse.Namespace) -> int:
    from .data.files import read_object
    from .hub import export, model_card

    folder, facts = _target(args.folder), {} if args.card is None else read_object(Path(args.card).expanduser())
    args.seed, args.device, args.dtype = None, "cpu", "auto"
    model, tokenizer = _load_model(args)
    try:
        card = model_card(model, args.push or folder.name, **facts) if facts else None
    except (TypeError, AttributeError) as error:
        # JSON of other types than model_card takes
        raise ValueError(f"{args.card} is refused: {error}") from error
    export(model, folder, tokenizer, card=card, push_to_hub=args.push)
    print(folder)
    return 0


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


def _add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="Llama, Mistral, Qwen2/3 or SmolLM3 by folder or name, or a folder of RxT's authors",
    )
    parser.add_argument("folder", metavar="FOLDER", help="target: a new or empty folder, or an earlier export")
    parser.add_argument("--slots", type=int, metavar="N", help="slots of each memory layer (default: 64)")
    parser.add_argument(
        "--memory-layers", type=_layers, metavar="0,2,4", help="decoder layers that read the memory (default: all)"
    )
    parser.add_argument("--salience", metavar="DATA", help="dialogues (split train, or a file) to learn what to keep")


def _layers(text: str) -> list[int]:
    return [int(layer) for layer in text.split(",")]


_layers.__name__ = "list of layers, such as 0,2,4"


def _convert(args: argparse.Namespace) -> int:
    source, folder = _folder(args.model), _target(args.folder)
    from transformers.utils import logging

    from .convert import fit_salience
    from .data.readers import Episodes, sampled
    from .hub import export, model_card

    logging.disable_progress_bar()
    with _refused(f"Cannot convert {source!r}"):
        model, tokenizer, facts = _converted(source, args)
    if tokenizer is not None:
        limit = model.config.max_position_embeddings
        tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
    if args.salience is not None:
        dialogues = sampled(str(Path(args.salience).expanduser()), "train", 400)
        found = fit_salience(model, Episodes(tokenizer, dialogues, max_tokens=tokenizer.model_max_length))
    base_model = source if source == args.model and not Path(source).is_dir() else Path(source).resolve().name
    export(model, folder, tokenizer, card=model_card(model, folder.name, base_model=base_model, **facts))
    memory = f"{model.config.num_memory_layers} layers of {model.config.num_memory_slots} slots"
    print(f"{folder}: memory of {memory}{'' if tokenizer else '; no tokenizer was found that fits'}")
    if args.salience is not None:
        print(f"salience: {found['held']:.0%} of the words that are recalled were held when they were asked for")
    return 0


def _converted(source: str, args: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    """Model, tokenizer, and what the card says of the licence."""
    from .convert import convert_tokenizer, from_llm, from_rxlm
    from .convert.rxlm import LICENCE_NOTICE
    from .data.files import read_object

    config = Path(source) / "config.json"
    if not Path(source).is_dir() or (config.is_file() and "model_type" in read_object(config)):
        tokenizer = convert_tokenizer(source)
        slots = {} if args.slots is None else {"num_memory_slots": args.slots}
        model = from_llm(source, tokenizer=tokenizer, memory_layers=args.memory_layers, **slots)
        return model, tokenizer, {"licence_notice": "That of the base model holds."}
    if any(option is not None for option in (args.slots, args.memory_layers, args.salience)):
        raise ValueError(
            "a checkpoint of RxT's authors has its own memory: leave out --slots, --memory-layers and --salience."
        )
    model = from_rxlm(source)
    tokenizer = convert_tokenizer(source, template="control") if (Path(source) / "tokenizer.json").is_file() else None
    if tokenizer is not None and len(tokenizer) > model.config.vocab_size:
        tokenizer = None
    return model, tokenizer, {"license": "other", "license_name": "raml", "licence_notice": LICENCE_NOTICE}


def _env(args: argparse.Namespace) -> int:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch
    from transformers.utils import is_flash_attn_2_available, is_torch_flex_attn_available

    import rxt_hf

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    available = {"flex_attention": is_torch_flex_attn_available(), "flash_attention_2": is_flash_attn_2_available()}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    packages = ("transformers", "torch", "tokenizers", "safetensors", "accelerate", "peft", "flash-attn")
    facts = {
        "rxt_hf": rxt_hf.__version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        **{package: installed(package) for package in packages},
        "device": f"{device}, {torch.get_num_threads()} CPU threads",
        "attention": ", ".join(["eager", "sdpa", *(name for name, is_there in available.items() if is_there)]),
    }
    for name, value in facts.items():
        print(f"{name:<13} {value}")
    return 0


def _add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    from .evaluation.memory import add_arguments

    _add_model_arguments(parser)
    add_arguments(parser)


def _eval(args: argparse.Namespace) -> int:
    from .evaluation.memory import run

    return run(args, *_load_model(args))


def _add_train_arguments(parser: argparse.ArgumentParser) -> None:
    from .training.run import add_arguments

    add_arguments(parser)


def _train(args: argparse.Namespace) -> int:
    from .training.run import run

    return run(args)


def _add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    from .evaluation.speed import add_arguments

    add_arguments(parser)


def _bench(args: argparse.Namespace) -> int:
    from .evaluation.speed import run

    return run(args)


def _add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    _add_model_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address; others than this machine's need --tokens")
    parser.add_argument("--port", type=int, default=8000, help="port; default 8000")
    parser.add_argument("--name", help="the model's name for clients; default: that of its folder")
    parser.add_argument("--tokens", metavar="FILE", help="who may ask: lines of TOKEN TENANT")
    store = "SQLite file, redis://HOST:PORT, or memory; default rxt-serve.sqlite"
    parser.add_argument("--store", metavar="URL", default="rxt-serve.sqlite", help=store)
    parser.add_argument("--keep", choices=["text", "none"], default="none", help="whether to store what was said")
    parser.add_argument("--max-rows", type=_positive, metavar="N", help="turns at once; default: half the free memory")
    parser.add_argument("--max-bytes", type=_bytes, metavar="N", help="size of the store, such as 20G; default: any")
    parser.add_argument("--compile", action="store_true", help="compile the step (torch.compile)")


def _bytes(text: str) -> int:
    factor = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}.get(text[-1:].upper(), 1)
    return int(text if factor == 1 else text[:-1]) * factor


_bytes.__name__ = "number of bytes, such as 20G"


def _serve(args: argparse.Namespace) -> int:
    from .serving.app import build_app, serve
    from .serving.guard import check_address, read_tokens
    from .serving.service import Settings
    from .serving.store import open_store

    tokens = None if args.tokens is None else read_tokens(Path(args.tokens).expanduser())
    check_address(args.host, tokens is not None)
    model, tokenizer = _load_model(args)
    if tokenizer.chat_template is None:
        raise ValueError("The tokenizer has no chat template: use rxt_hf.chat_template.add_control_tokens.")
    print(f"model   {_folder(args.model)}, {model.num_parameters() / 1e6:.1f} million parameters", flush=True)
    store = open_store(args.store)
    text = "kept" if args.keep == "text" else "not kept"
    print(f"store   {args.store}, {store.usage().records} states; text is {text}", flush=True)
    settings = Settings(
        name=args.name or Path(_folder(args.model)).resolve().name,
        tokens=tokens,
        keeps_text=args.keep == "text",
        max_rows=args.max_rows,
        max_bytes=args.max_bytes,
        compiles=args.compile,
    )
    app = build_app(model, tokenizer, store, settings)
    service = app.app.state.service
    print(f"engine  {service.engine.max_rows} turns at once, {service.memory_bytes} bytes a memory", flush=True)
    print(f"listens http://{args.host}:{args.port}, model {settings.name!r}; Ctrl-C ends", flush=True)
    # uvicorn ends what runs, and then lets the signal do what it did before
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        serve(app, settings, args.host, args.port)
    finally:
        print("ended   all turns are answered", flush=True)
    return 0


def _add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    _add_conversation_arguments(parser)
    parser.add_argument("--script", metavar="FILE", help="read the user's lines from FILE; # starts a comment line")
    parser.add_argument("--system", metavar="TEXT", help="system prompt, written into the memory once")


def _chat(args: argparse.Namespace) -> int:
    # before the model is loaded: a misspelt name should not cost that wait
    script = None if args.script is None else _script_lines(Path(args.script).expanduser())
    _generate_kwargs(args)
    model, tokenizer = _load_model(args)
    session = _open_session(args, model, tokenizer, args.system)
    chat = _Chat(session, echoes=script is not None or not sys.stdin.isatty())
    chat.say(_about(_folder(args.model), model))
    try:
        for line in _typed_lines() if script is None else script:
            chat.take(line)
            if chat.is_over:
                break
    except KeyboardInterrupt:
        print()
    return 0


def _about(folder: str, model: Any) -> str:
    """The first line of the model's about.txt, which says what the model was trained to talk about."""
    try:
        about = (Path(folder) / "about.txt").read_text(encoding="utf-8-sig").strip()
        return about.splitlines()[0]
    except (OSError, ValueError, IndexError):
        size = model.num_parameters() / 1e6
        return f"{folder}: {size:.1f} million parameters; it does not say what it was trained to talk about."


def _script_lines(path: Path) -> list[str]:
    from .data.files import read_text

    return [line for line in read_text(path).split("\n") if not line.lstrip().startswith("#")]


def _typed_lines() -> Iterator[str]:
    """Lines from the terminal with a prompt, or from a pipe without; ends with the input."""
    if not sys.stdin.isatty():
        # some shells put a byte-order mark before what they pipe
        yield next(sys.stdin, "").removeprefix("\ufeff")
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() its line editing)
    print("    /help lists the commands, /quit or Ctrl-D leaves.")
    while True:
        try:
            yield input("you> ")
        except EOFError:
            print()
            return


class _Chat:
    """The conversations of one `rxt chat`, by name, and what can be typed in it."""

    def __init__(self, session: Any, *, echoes: bool):
        self.name = "main"
        self.conversations = {self.name: session}
        self.echoes = echoes
        self.is_over = False

    @property
    def session(self) -> Any:
        return self.conversations[self.name]

    def say(self, text: str) -> None:
        print(f"    {text.translate(_PRINTABLE)}", flush=True)

    def take(self, line: str) -> None:
        """Answers one line or obeys its command; errors become a message."""
        line = line.strip()
        if not line:
            return
        if self.echoes:
            print(f"you> {line.translate(_PRINTABLE)}")
        command, _, rest = line.partition(" ")
        try:
            if not line.startswith("/"):
                self.answer(line)
            elif command in COMMANDS:
                COMMANDS[command][1](self, rest.strip())
            else:
                self.say(f"There is no command {command[:40]}; /help lists the commands.")
        except BrokenPipeError:
            raise
        except Exception as error:
            # this process holds the only copy of the conversation's memory: no line typed may end it
            self.say(_sentence(error))

    def answer(self, query: str) -> None:
        pieces, is_cancelled = self.session.stream(query), False
        print("rxt> ", end="", flush=True)
        try:
            for piece in pieces:
                print(piece.translate(_PRINTABLE), end="", flush=True)
        except KeyboardInterrupt:
            is_cancelled = True
            pieces.close()
        finally:
            print(flush=True)
        if is_cancelled:
            self.say("The turn is cancelled; the memory is as before.")

    def save(self, path: str) -> None:
        self.session.save(_new_file(_given(path, "/save FILE")))
        self.say(f"Saved to {path}.")

    def load(self, path: str) -> None:
        file, session = _given(path, "/load FILE"), self.session
        loaded = session.load(file, session.model, session.tokenizer, **session.generate_defaults)
        self.conversations[self.name] = loaded
        self.say(f"Loaded {path}: {loaded.turns} turns.")

    def fork(self, name: str) -> None:
        if not name:
            for each, session in self.conversations.items():
                self.say(f"{'*' if each == self.name else ' '} {each}: {session.turns} turns")
        elif name in self.conversations:
            self.say(f"There is a conversation {name} already; /fork lists them.")
        else:
            self.conversations[name] = self.session.fork()
            self.say(f"Kept as {name}; going on in {self.name}.")

    def switch(self, name: str) -> None:
        if name not in self.conversations:
            self.say(f"There is no conversation {name!r}; /fork lists them.")
        else:
            self.name = name
            self.say(f"Going on in {name}: {self.session.turns} turns.")

    def undo(self, _: str) -> None:
        last = self.session.history[-1:]
        self.session.undo()
        self.say(f"Undone: {last[0]['query']}")

    def forget(self, number: str) -> None:
        history = self.session.history
        if not number:
            for place, turn in enumerate(history, start=1):
                self.say(f"{place}. {turn['query']} -> {turn['answer']}")
        elif not number.isdecimal() or not 1 <= int(number[:9]) <= len(history):
            self.say(f"/forget N needs a turn from 1 to {len(history)}; /forget lists them.")
        else:
            self.session.forget(int(number) - 1)
            self.say(f"Forgotten: {history[int(number) - 1]['query']}")

    def memory(self, _: str) -> None:
        memory = self.session.stm_cache
        shape = f"{memory.num_memory_slots} slots x {memory.num_memory_layers} layers x {memory.hidden_size}"
        self.say(f"{shape}, {memory.nbytes} bytes, {self.session.turns} turns")

    def help(self, _: str) -> None:
        for usage, _method, description in COMMANDS.values():
            self.say(f"{usage:<13} {description}")

    def quit(self, _: str) -> None:
        self.is_over = True


def _given(path: str, usage: str) -> Path:
    if not path:
        raise ValueError(f"{usage} needs a file.")
    return Path(path).expanduser()


COMMANDS: dict[str, tuple[str, Callable[[_Chat, str], None], str]] = {
    usage.split()[0]: (usage, method, description)
    for usage, method, description in (
        ("/save FILE", _Chat.save, "write the memory and the log of the conversation"),
        ("/load FILE", _Chat.load, "go on from a saved memory, in place of this conversation"),
        ("/fork [NAME]", _Chat.fork, "keep this conversation as NAME and go on in a copy; alone: list"),
        ("/switch NAME", _Chat.switch, "go on in the conversation NAME"),
        ("/undo", _Chat.undo, "back to before the last turn"),
        ("/forget [N]", _Chat.forget, "make the memory what it would be without turn N; alone: list the turns"),
        ("/memory", _Chat.memory, "size of the memory"),
        ("/help", _Chat.help, "this list"),
        ("/quit", _Chat.quit, "leave"),
    )
}

VERBS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]] = {
    "chat": ("talk with a model", _add_chat_arguments, _chat),
    "generate": ("one turn: print the answer to one query", _add_generate_arguments, _generate),
    "serve": ("a chat server for OpenAI's clients", _add_serve_arguments, _serve),
    "train": ("a stage of the curriculum from a YAML file", _add_train_arguments, _train),
    "eval": ("what a model's memory holds over dialogues", _add_eval_arguments, _eval),
    "bench": ("cost of a turn by its number, against a Llama of the same shape", _add_bench_arguments, _bench),
    "convert": ("make an RxT of a pretrained language model", _add_convert_arguments, _convert),
    "export": ("a folder for the Hub, with code and card", _add_export_arguments, _export),
    "env": ("versions and devices, for bug reports", lambda parser: None, _env),
}


if __name__ == "__main__":
    sys.exit(main())
