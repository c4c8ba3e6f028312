# Copyright 2026 the rxt_hf authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The file of a memory: safetensors with a header of one spelling and a checksum, written as a whole or not at all."""

import contextlib
import hashlib
import json
import math
import os
import reprlib
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, deserialize

try:
    import fcntl
except ImportError:  # Windows: concurrent saves to one path are not serialised there
    fcntl = None


FORMAT = "rxt_hf.STMCache"
FORMAT_VERSION, INT8_FORMAT_VERSION = "1", "2"
# A real header has about 400 bytes. The limit also bounds the depth and the time of the JSON parser.
MAX_HEADER_BYTES = 4096
FILE_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
STORED_DTYPES = FILE_DTYPES | {"I64": torch.int64, "I8": torch.int8}


class StateError(ValueError):
    """A memory state that cannot be saved, or a state file that is refused."""


class Header(NamedTuple):
    """The header of a state file. `to_bytes` is the only spelling that is written and accepted."""

    dtype: str
    shape: tuple[int, ...]
    fingerprint: str | None
    is_int8: bool = False
    checksum: str = ""

    @property
    def tensors(self) -> dict[str, tuple[str, tuple[int, ...], tuple[int, int]]]:
        """Dtype, shape and place of what the file holds."""
        parts = [("turns", "I64", self.shape[:1]), ("states", self.dtype, self.shape)]
        if self.is_int8:
            parts[1:] = [("scales", "F32", self.shape[:3]), ("states", "I8", self.shape)]
        # big numbers come before smaller ones, which keeps every tensor aligned
        tensors, start = {}, 0
        for name, dtype, shape in parts:
            end = start + math.prod(shape) * STORED_DTYPES[dtype].itemsize
            tensors[name], start = (dtype, shape, (start, end)), end
        return tensors

    def to_bytes(self) -> bytes:
        version = INT8_FORMAT_VERSION if self.is_int8 else FORMAT_VERSION
        metadata = {"format": FORMAT, "format_version": version, "checksum": self.checksum}
        if self.is_int8:
            metadata["dtype"] = self.dtype
        if self.fingerprint is not None:
            metadata["fingerprint"] = self.fingerprint
        header: dict[str, Any] = {"__metadata__": metadata}
        for name, (dtype, shape, place) in self.tensors.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": place}
        raw = json.dumps(header, separators=(",", ":")).encode("ascii")
        return raw + b" " * (-len(raw) % 8)

    def with_checksum(self, *body: Any) -> "Header":
        digest = hashlib.sha256(self._replace(checksum="").to_bytes())
        for part in body:
            digest.update(part)
        return self._replace(checksum=digest.hexdigest())


def encode(states: torch.Tensor, turns: torch.Tensor, fingerprint: str | None, dtype: torch.dtype | None) -> list[Any]:
    """Returns the parts of a file: length of the header, header, turns and states, in `dtype` if given."""
    states, turns = states.detach().cpu(), turns.cpu()
    as_int8 = dtype is torch.int8
    if dtype is not None and not as_int8:
        states = states.to(dtype)
    names = {dtype: name for name, dtype in FILE_DTYPES.items()}
    if states.dtype not in names:
        raise StateError(f"Cannot save states of {states.dtype}, expected one of {list(names)}.")
    if states.numel() == 0:
        raise StateError(f"Cannot save empty states of shape {tuple(states.shape)}.")
    _check_numbers("Cannot save the memory", states, turns)
    header = Header(names[states.dtype], tuple(states.shape), fingerprint, as_int8)
    tensors = (turns, *_to_int8(states)) if as_int8 else (turns, states)
    body = [tensor.reshape(-1).view(torch.uint8).numpy() for tensor in tensors]
    header = header.with_checksum(*body)
    raw = header.to_bytes()
    if len(raw) > MAX_HEADER_BYTES:
        raise StateError(f"Cannot save a header of {len(raw)} bytes, limit {MAX_HEADER_BYTES}: long fingerprint.")
    return [len(raw).to_bytes(8, "little"), raw, *body]


def check_header_length(start: bytes, size: int, name: str) -> None:
    """Raises [`StateError`] if the first bytes of a file of `size` bytes announce a header that it cannot have."""
    length = int.from_bytes(start, "little")
    if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        limit = f"expected at most {MAX_HEADER_BYTES} and no more than the file holds"
        raise StateError(f"{name} is refused: its {size} bytes announce a header of {length} bytes, {limit}.")


def decode(content: bytes, name: str) -> tuple[torch.Tensor, torch.Tensor, str | None]:
    """Returns states, turns and fingerprint of a file; raises [`StateError`] for what `encode` would not write."""
    raw = content[8 : 8 + int.from_bytes(content[:8], "little")]
    header, parts = _parse(content, raw, name)
    # whatever else the header may say, and however it may be spelt: only one is written
    if raw != header.to_bytes():
        raise StateError(f"{name} is refused: its header is spelt in a way that save never writes.")
    body = memoryview(content)[8 + len(raw) :]
    expect(name, "the checksum", header.with_checksum(body).checksum, header.checksum)
    tensors = {
        part: torch.frombuffer(parts[part]["data"], dtype=STORED_DTYPES[dtype]).view(shape)
        for part, (dtype, shape, _) in header.tensors.items()
    }
    states, turns = tensors["states"], tensors["turns"].clone()
    if header.is_int8:
        states = states * tensors["scales"].unsqueeze(-1)
    states = states.to(FILE_DTYPES[header.dtype], copy=True)
    _check_numbers(f"{name} is refused", states, turns)
    return states, turns, header.fingerprint


def _parse(content: bytes, raw: bytes, name: str) -> tuple[Header, dict[str, Any]]:
    """Returns a header that says the same as `raw` where that is right, and the tensors as safetensors found them."""
    try:
        metadata: Any = json.loads(raw.decode("utf-8"))["__metadata__"]
        found = metadata.get("format")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise StateError(f"{name} is refused: its header is not JSON with metadata ({error}).") from None
    expect(name, "the format", found, FORMAT)
    try:
        parts = dict(deserialize(content))
    except SafetensorError as error:
        raise StateError(f"{name} is refused: safetensors cannot read it ({error}).") from None
    is_int8 = "scales" in parts
    version = INT8_FORMAT_VERSION if is_int8 else FORMAT_VERSION
    expect(name, "the format version (update rxt_hf if newer)", metadata.get("format_version"), version)
    expect(
        name, "the list of tensors", sorted(parts), ["scales", "states", "turns"] if is_int8 else ["states", "turns"]
    )
    shape, dtype = tuple(parts["states"]["shape"]), metadata.get("dtype") if is_int8 else parts["states"]["dtype"]
    if dtype not in FILE_DTYPES:
        raise StateError(f"{name} is refused: states have dtype {reprlib.repr(dtype)}, expected {list(FILE_DTYPES)}.")
    if len(shape) != 4 or not all(shape):
        raise StateError(f"{name} is refused: states have shape {shape}, expected four numbers > 0.")
    return Header(dtype, shape, metadata.get("fingerprint"), is_int8, str(metadata.get("checksum"))), parts


def expect(path: Any, name: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise StateError(f"{path} is refused: {name} is {reprlib.repr(found)}, expected {reprlib.repr(expected)}.")


def _to_int8(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales of (batch_size, layers, slots) and codes of the shape of `states`."""
    states = states.float()
    scales = states.abs().amax(-1) / 127
    # cut to 17 bits, which with 7 of a code fit a float32: the next save finds the same scale, and the same codes
    scales = (scales.view(torch.int32) & -(2**7)).view(torch.float32)
    # a slot of zeros has the scale 0, and 0 / 0 is no number
    codes = (states / scales.unsqueeze(-1)).nan_to_num(0.0).round().clamp(-127, 127)
    return scales, codes.to(torch.int8)


def _check_numbers(prefix: str, states: torch.Tensor, turns: torch.Tensor) -> None:
    if not torch.isfinite(states).all():
        raise StateError(f"{prefix}: states hold NaN or Inf, expected finite numbers.")
    if (turns < 0).any():
        raise StateError(f"{prefix}: turns hold {int(turns.min())}, expected numbers >= 0.")


def write_atomically(target: Path, *chunks: Any) -> None:
    # One fixed name per target: what a killed save left is overwritten by the next one, without a search.
    temporary = target.with_name(f".{target.name}.tmp")
    with _only_writer(temporary):
        try:
            with open(temporary, "wb") as file:
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileNotFoundError):
                shutil.copymode(target, temporary)
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    _sync_folder(target.parent)


@contextlib.contextmanager
def _only_writer(temporary: Path) -> Generator[None, None, None]:
    """Lets one save at a time write `temporary`; the lock ends with its process, even a killed one."""
    if fcntl is None:
        yield
        return
    while True:
        with open(temporary, "ab") as file:
            # some network file systems have no locks: a single writer needs none
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            # the writer before us renamed or removed the file that we waited for: open its successor
            if _is_at(file, temporary):
                yield
                return


def _is_at(file: Any, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _sync_folder(folder: Path) -> None:
    # Makes the rename survive a power cut; not every system can do it, and the file is whole either way.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


__all__ = ["StateError", "check_header_length", "decode", "encode", "expect", "write_atomically"]
