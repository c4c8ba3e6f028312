# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""A memory on its way: packed with what is known of it, sealed for the client, and found by the messages behind it."""

import base64
import hashlib
import json
import os
import secrets
from collections.abc import Iterable
from typing import Any

from ..cache_rxt import StateError, STMCache
from ..fingerprint_rxt import fingerprints_match

# a layer norm makes every number of a memory that a model writes small; far from that is no memory but an attack
MAX_ABSOLUTE = 1e4
KEY_BYTES, KEY_ID_BYTES, NONCE_BYTES = 32, 4, 12


def new_id(kind: str) -> str:
    """Returns an id with 128 random bits: one that is known was given."""
    return f"{kind}_{secrets.token_hex(16)}"


def to_json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


class OtherWeightsError(StateError):
    """A memory that other weights wrote: it means nothing to these."""


def pack(about: dict[str, Any], memory: STMCache | None, dtype: Any = None) -> bytes:
    """Packs one value for the store: the length of a JSON object, the object, and the memory's bytes."""
    head = to_json(about)
    return len(head).to_bytes(4, "little") + head + (b"" if memory is None else memory.to_bytes(dtype))


def unpack_about(value: bytes) -> dict[str, Any]:
    """Returns the JSON object alone."""
    return json.loads(value[4 : 4 + int.from_bytes(value[:4], "little")])


def unpack(value: bytes, model: Any, fingerprint: str) -> tuple[dict[str, Any], STMCache]:
    """
    Takes apart what `pack` put together.

    Args:
        model: refuses a memory of another shape.
        fingerprint (`str`): that of `model.memory_fingerprint()`, which takes a while to compute.

    Raises: [`OtherWeightsError`], and [`StateError`] for a damaged memory.
    """
    start = 4 + int.from_bytes(value[:4], "little")
    return json.loads(value[4:start]), read_memory(value[start:], model, fingerprint)


def read_memory(data: bytes, model: Any, fingerprint: str) -> STMCache:
    """
    Reads one conversation's memory from the bytes of an `STMCache` file, of which nothing is trusted.

    Raises: [`OtherWeightsError`], and [`StateError`] for one that is damaged, of another shape, or has numbers that no
    model writes.
    """
    memory = STMCache.from_bytes(data)
    if not fingerprints_match(memory.fingerprint, fingerprint):
        raise OtherWeightsError("The memory was written by other weights than those that are served now.")
    config = model.config
    expected = (1, config.num_memory_layers, config.num_memory_slots, config.hidden_size)
    if tuple(memory.states.shape) != expected:
        raise StateError(f"The memory has the shape {tuple(memory.states.shape)}, expected {expected}.")
    if (largest := float(memory.states.abs().max())) > MAX_ABSOLUTE:
        raise StateError(f"The memory holds a number of size {largest:g}, expected at most {MAX_ABSOLUTE:g}.")
    return memory


class Seal:
    """
    Encrypts states that clients keep (AES-256-GCM): only the tenant that got one can bring it back, unchanged, and
    only to the weights that wrote it.

    Args:
        keys (`list[bytes]` of 32 bytes each): the first one seals; older ones still open.
    """

    def __init__(self, keys: list[bytes]):
        try:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError:
            raise ImportError("Sealed states need the package cryptography: pip install 'rxt-hf[serve]'.") from None
        self._ciphers = {hashlib.sha256(key).digest()[:KEY_ID_BYTES]: AESGCM(key) for key in keys}

    @staticmethod
    def _bound_to(tenant: str, fingerprint: str) -> bytes:
        return json.dumps(["rxt-state-1", tenant, fingerprint]).encode()

    def seal(self, value: bytes, tenant: str, fingerprint: str) -> str:
        """Encrypts a value: base64 text of key id, nonce and ciphertext."""
        key_id, cipher = next(iter(self._ciphers.items()))
        nonce = os.urandom(NONCE_BYTES)
        sealed = cipher.encrypt(nonce, value, self._bound_to(tenant, fingerprint))
        return base64.b64encode(key_id + nonce + sealed).decode()

    def unseal(self, text: str, tenant: str, fingerprint: str) -> bytes:
        """
        Returns the value that `seal` got.

        Raises: [`StateError`] for whatever is not exactly that. It does not say why: the reason would help a forger.
        """
        from cryptography.exceptions import InvalidTag

        try:
            raw = base64.b64decode(text, validate=True)
            nonce, sealed = raw[KEY_ID_BYTES : KEY_ID_BYTES + NONCE_BYTES], raw[KEY_ID_BYTES + NONCE_BYTES :]
            return self._ciphers[raw[:KEY_ID_BYTES]].decrypt(nonce, sealed, self._bound_to(tenant, fingerprint))
        except (ValueError, KeyError, InvalidTag):
            raise StateError(
                "The sealed memory cannot be opened: it is damaged, of another key, or of other weights."
            ) from None


def prefix_keys(fingerprint: str, interactions: Iterable[Any]) -> list[str]:
    """
    Names the memory after each of the interactions (any JSON): a hash of the weights, of it, and of all before.
    """
    digest, keys = hashlib.sha256(fingerprint.encode()).digest(), []
    for interaction in interactions:
        digest = hashlib.sha256(digest + json.dumps(interaction, sort_keys=True).encode()).digest()
        keys.append(digest.hex())
    return keys


__all__ = [
    "OtherWeightsError",
    "Seal",
    "new_id",
    "pack",
    "prefix_keys",
    "read_memory",
    "to_json",
    "unpack",
    "unpack_about",
]
