# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""Files that people write: text with or without a byte-order mark, packed with gzip or not, or something else."""

import gzip
import json
import os
import sys
import zlib
from collections.abc import Iterator
from itertools import chain
from typing import Any

_GZIP, _UTF8_MARK = b"\x1f\x8b", b"\xef\xbb\xbf"
_OTHER_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def read_lines(path: str | os.PathLike) -> Iterator[tuple[int, bytes]]:
    """
    Number, from 1, and bytes of each line of a UTF-8 file, unpacked if it begins as gzip does, whatever its name.

    Raises: `ValueError` that names the file if it is UTF-16, binary, or gzip that is cut short.
    """
    number = 0
    with open(path, "rb") as file:
        lines: Any = gzip.GzipFile(fileobj=file) if file.peek(2).startswith(_GZIP) else file
        try:
            if kind := _other_kind(lines.peek(1024)[:1024]):
                raise ValueError(f"{path} is {kind}, expected text in UTF-8.")
            for number, line in enumerate(lines, 1):
                yield number, line.removeprefix(_UTF8_MARK) if number == 1 else line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            reason = "ends too early" if isinstance(error, EOFError) else f"is damaged: {error}"
            raise ValueError(f"{path}, line {number + 1}: the gzip file {reason}.") from error


def _other_kind(head: bytes) -> str | None:
    for mark, name in _OTHER_MARKS.items():
        if head.startswith(mark):
            return name
    if b"\0" not in head:
        return None
    # in plain text without a mark, one byte of every pair is zero
    is_wide = any(half.count(0) > 0.7 * len(half) and half.count(0) > 2 for half in (head[::2], head[1::2]))
    return "UTF-16 without a byte-order mark" if is_wide else "a binary file"


def decode(line: bytes) -> str:
    """The text of a line; raises `ValueError` with the first byte that is not UTF-8."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{line[error.start]:02x} at place {error.start + 1}"
        raise ValueError(f"this is not UTF-8 but perhaps Latin-1 ({byte}), save the file as UTF-8.") from error


def read_text(path: str | os.PathLike) -> str:
    """All of a text file, with `\\n` at its line ends; raises `ValueError` with file and line for anything else."""
    lines = []
    for number, line in read_lines(path):
        try:
            lines.append(decode(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return "".join(lines).replace("\r\n", "\n").replace("\r", "\n")


def parse_json(text: str) -> Any:
    """`json.loads`; raises `ValueError` for everything that it cannot read."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.strip() else ""
        raise ValueError(f"this is not JSON: {error.msg} ({line}column {error.colno}).") from error
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply.") from error
    except ValueError as error:
        raise ValueError(f"a number has more than {sys.get_int_max_str_digits()} digits.") from error


def read_object(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON object in a file; raises `ValueError` with the file's name for anything else."""
    try:
        content = parse_json(read_text(path))
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected an object.")
    return content


def read_rows(path: str | os.PathLike) -> Iterator[tuple[str, Any]]:
    """
    Place ("FILE, line 7") and content of each row of a file of JSON: a line, as bytes, or an item of an array.

    Raises: `ValueError` if the file is empty, is no text, or begins as an array and is none.
    """
    lines = ((number, line) for number, line in read_lines(path) if line.strip())
    first = next(lines, None)
    if first is None:
        raise ValueError(f"{path} is empty, expected a row of JSON in each line.")
    if not first[1].lstrip().startswith(b"["):
        for number, line in chain([first], lines):
            yield f"{path}, line {number}", line
        return
    text = read_text(path)
    try:
        rows = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not rows:
        raise ValueError(f"{path} is an empty array, expected rows.")
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row
