# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""`rxt chat`: conversations at a terminal, or from a script, and the commands that can be typed in them."""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from .data.files import read_text

# A model may produce any character; those that steer a terminal are not for it to write. Tab and line feed stay.
PRINTABLE = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160)), "\ufffd")


def sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # some errors say their reason on the lines behind the first, or break a sentence over several lines
    end = next((number for number, line in enumerate(lines[:5], 1) if line.endswith((".", "!", "?", ")"))), 1)
    return " ".join(lines[:end] if end > 1 else lines[: 1 + lines[0].endswith((":", ","))])


def new_file(path: Path) -> Path:
    """Returns the path if it can be written; raises `OSError` with the folder or the path if not."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, "There is no folder to write to", str(folder))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "This is a folder, expected a file to write", str(path))
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, "The folder may not be written", str(folder))
    return path


def about(folder: str, model: Any) -> str:
    """The first line of the model's about.txt, which says what the model was trained to talk about."""
    try:
        text = (Path(folder) / "about.txt").read_text(encoding="utf-8-sig").strip()
        return text.splitlines()[0]
    except (OSError, ValueError, IndexError):
        size = model.num_parameters() / 1e6
        return f"{folder}: {size:.1f} million parameters; it does not say what it was trained to talk about."


def script_lines(path: Path) -> list[str]:
    return [line for line in read_text(path).split("\n") if not line.lstrip().startswith("#")]


def typed_lines() -> Iterator[str]:
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


class TerminalChat:
    """The conversations of one `rxt chat`, by name, and what can be typed in it."""

    def __init__(self, session: Any, *, echoes: bool):
        self.name = "main"
        self.conversations = {self.name: session}
        self.echoes = echoes
        self.is_over = False

    def run(self, lines: Iterable[str]) -> None:
        """Takes lines to their end, to /quit or to Ctrl-C."""
        try:
            for line in lines:
                self.take(line)
                if self.is_over:
                    break
        except KeyboardInterrupt:
            print()

    @property
    def session(self) -> Any:
        return self.conversations[self.name]

    def say(self, text: str) -> None:
        print(f"    {text.translate(PRINTABLE)}", flush=True)

    def take(self, line: str) -> None:
        """Answers one line or obeys its command; errors become a message."""
        line = line.strip()
        if not line:
            return
        if self.echoes:
            print(f"you> {line.translate(PRINTABLE)}")
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
            self.say(sentence(error))

    def answer(self, query: str) -> None:
        pieces, is_cancelled = self.session.stream(query), False
        print("rxt> ", end="", flush=True)
        try:
            for piece in pieces:
                print(piece.translate(PRINTABLE), end="", flush=True)
        except KeyboardInterrupt:
            is_cancelled = True
            pieces.close()
        finally:
            print(flush=True)
        if is_cancelled:
            self.say("The turn is cancelled; the memory is as before.")

    def save(self, path: str) -> None:
        self.session.save(new_file(_given(path, "/save FILE")))
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


COMMANDS: dict[str, tuple[str, Callable[[TerminalChat, str], None], str]] = {
    usage.split()[0]: (usage, method, description)
    for usage, method, description in (
        ("/save FILE", TerminalChat.save, "write the memory and the log of the conversation"),
        ("/load FILE", TerminalChat.load, "go on from a saved memory, in place of this conversation"),
        ("/fork [NAME]", TerminalChat.fork, "keep this conversation as NAME and go on in a copy; alone: list"),
        ("/switch NAME", TerminalChat.switch, "go on in the conversation NAME"),
        ("/undo", TerminalChat.undo, "back to before the last turn"),
        ("/forget [N]", TerminalChat.forget, "make the memory what it would be without turn N; alone: list the turns"),
        ("/memory", TerminalChat.memory, "size of the memory"),
        ("/help", TerminalChat.help, "this list"),
        ("/quit", TerminalChat.quit, "leave"),
    )
}
