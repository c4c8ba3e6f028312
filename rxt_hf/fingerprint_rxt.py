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
"""Which weights a memory belongs to: those in effect, named by what they write. And where offloaded weights are."""

import base64
import binascii
import hashlib
import struct
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

PREFIX = "write"
PROBE_TOKENS = 16
SKETCH_SIZE = 256
# Shares of what a write changes. Rounding all weights and activations to bfloat16 was seen to move it by up to 0.02,
# to float16 by 0.002; a merge of adapters in float32 by 1e-6.
TOLERANCES = {"float64": 5e-4, "float32": 5e-4, "float16": 1e-2, "bfloat16": 6e-2}

_known: weakref.WeakKeyDictionary[nn.Module, tuple[Any, str]] = weakref.WeakKeyDictionary()
_known_lock = threading.Lock()


def memory_fingerprint(model: nn.Module) -> str:
    """
    Returns the fingerprint of [`RxTForCausalLM.memory_fingerprint`] for an [`RxTModel`]. It is computed again when the
    weights in effect have changed, and is kept outside of the model, which does not change.
    """
    state = weights_state(model)
    with _known_lock:
        known = _known.get(model)
    if known is not None and known[0] == state:
        return known[1]
    fingerprint = _fingerprint(model)
    with _known_lock:
        _known[model] = (state, fingerprint)
    return fingerprint


def fingerprints_match(found: str | None, expected: str | None) -> bool:
    """
    Returns whether a memory with the fingerprint `found` may go on with weights of the fingerprint `expected`: if they
    are equal, or have the same hash of weights (64 hexadecimal digits are such a hash alone), or write the same up to
    rounding: in no memory layer do the sketches differ by more than the share of `TOLERANCES`
    for the coarser dtype.
    """
    if found == expected or found is None or expected is None:
        return found == expected
    (found_hash, *found_sketch), (expected_hash, *expected_sketch) = _parsed(found), _parsed(expected)
    if found_hash == expected_hash != "":
        return True
    if not found_sketch or not expected_sketch:
        return False
    (found_dtype, found_layers), (expected_dtype, expected_layers) = found_sketch, expected_sketch
    if found_layers.shape != expected_layers.shape:
        return False
    sizes = torch.maximum(found_layers.norm(dim=1), expected_layers.norm(dim=1))
    tolerance = max(TOLERANCES[found_dtype], TOLERANCES[expected_dtype])
    return bool(((found_layers - expected_layers).norm(dim=1) <= tolerance * sizes).all())


@torch.no_grad()
def weights_state(model: nn.Module) -> tuple:
    """
    Compares equal as long as no weight and no adapter has changed: identity, version and a few numbers of each tensor
    (a change through `.data` leaves no version), and which adapters are active. Far cheaper than to read the weights.
    """
    state: list[Any] = []
    samples: dict[Any, list[torch.Tensor]] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            # of offloaded weights the tensors change with every use, the numbers do not
            if tensor is None or tensor.is_meta:
                continue
            state.append((id(tensor), 0 if tensor.is_inference() else tensor._version))
            count = tensor.numel()
            if count and type(tensor) in (torch.Tensor, nn.Parameter, nn.Buffer):
                sample = tensor.as_strided((min(4, count),), (max(1, count // 4),), tensor.storage_offset())
                samples.setdefault((tensor.device, tensor.dtype), []).append(sample)
        if "_active_adapter" in vars(module):
            state.append(_adapters_state(vars(module)))
    return (*state, *(_raw(torch.cat(parts)) for parts in samples.values()))


def _adapters_state(layer: dict[str, Any]) -> tuple:
    """Returns the state that PEFT keeps in plain fields of a layer and changes without a trace in any tensor."""
    return tuple(
        repr(layer.get(name)) for name in ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")
    )


def changes_beside_writes(model: nn.Module) -> bool:
    """Returns whether adapters, which a caller may switch at any time, or offloaded weights take part in a write."""
    return any(
        "_active_adapter" in vars(module) or any(getattr(hook, "offload", False) for hook in _hooks(module))
        for module in model.modules()
    )


def loaded_parameter(module: nn.Module, name: str) -> torch.Tensor:
    """
    Returns a parameter that is read outside of its module's forward; of an offloaded one, the copy of accelerate.

    Raises: `ValueError` if there is no such copy.
    """
    parameter = getattr(module, name)
    if not parameter.is_meta:
        return parameter
    for part in module.modules():
        for hook in _hooks(part):
            weights: Any = getattr(hook, "weights_map", None)
            if weights is not None and part is module:
                return weights[name].to(hook.execution_device)
            # a parameter that has no hook of its own is among all that the hooks of its module's parts read from
            everything: Any = getattr(weights, "dataset", ())
            for key in everything:
                if key.rpartition(".")[2] == name:
                    return everything[key].to(hook.execution_device)
    raise ValueError(f"The parameter {name} is offloaded to where it cannot be read, or was never loaded.")


def execution_device(model: nn.Module) -> torch.device:
    """Returns the device that the model computes on, also if its weights are offloaded."""
    device = next(model.parameters()).device
    if device.type == "meta":
        for module in model.modules():
            for hook in _hooks(module):
                if getattr(hook, "execution_device", None) is not None:
                    return torch.device(hook.execution_device)
    return device


def _hooks(module: nn.Module) -> Iterator[Any]:
    """Returns the hooks that accelerate has put around the module's forward."""
    hook = vars(module).get("_hf_hook")
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))


def _raw(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()


class _WithoutDropout(TorchFunctionMode):
    """Switches dropout off in this thread, in any mode of the modules."""

    def __torch_function__(self, func, types, args: tuple = (), kwargs=None):
        kwargs = kwargs or {}
        if func is F.dropout:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            kwargs = {**kwargs, "dropout_p": 0.0}
        return func(*args, **kwargs)


def _fingerprint(model: Any) -> str:
    weights = "" if any("_active_adapter" in vars(module) for module in model.modules()) else _hash_of_weights(model)
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        # weights that are spread over processes are gathered in a whole forward only
        return weights
    dtype, layers = _sketch(model)
    numbers = base64.b64encode(_raw(layers.to(torch.float32))).decode()
    return f"{PREFIX}:{weights}:{dtype}:{len(layers)}:{numbers}"


@torch.no_grad()
def _sketch(model: Any) -> tuple[str, torch.Tensor]:
    """The dtype of a fixed write, and some numbers of what it changes in each memory layer, of (layers, numbers)."""
    config, device = model.config, execution_device(model)
    tokens = torch.linspace(0, config.vocab_size - 1, PROBE_TOKENS, device=device).long()
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, config.num_memory_layers, config.num_memory_slots, config.hidden_size, generator=generator)
    states = states.to(device)
    if config.memory_init == "learned":
        states = states + model.initial_states(1).float()
    with torch.autocast(device.type, enabled=False), _WithoutDropout():
        embeds = model.embed_tokens(tokens[None])
        change = (model.write(states, embeds) - states)[0].flatten(1)
        size = min(max(1, SKETCH_SIZE // len(change)), change.shape[1])
        layers = change[:, :: change.shape[1] // size][:, :size]
        # tokens that an adapter has rows of its own for are not among the fixed ones
        own = _adapted_tokens(model)
        if own:
            rows = model.embed_tokens(torch.tensor([own], device=device)).flatten().float()
            layers = torch.cat([layers, rows[torch.linspace(0, len(rows) - 1, size, device=device).long()][None]])
    return str(embeds.dtype).removeprefix("torch."), layers.cpu()


def _adapted_tokens(model: nn.Module) -> list[int]:
    found: set[int] = set()
    for module in model.modules():
        tokens = vars(module).get("token_indices")
        if isinstance(tokens, dict) and not vars(module).get("_disable_adapters"):
            active = vars(module).get("_active_adapter")
            for name in [active] if isinstance(active, str) else active or ():
                found.update(tokens.get(name, ()))
    return sorted(found)


def _hash_of_weights(model: nn.Module) -> str:
    """
    A hash of a few elements of every parameter, rounded to bfloat16, so that it stays in another dtype or on another
    device. Of a quantised matrix only the kind counts: how it is stored depends on both.
    """
    samples, quantised = [], []
    for module in model.modules():
        for name, given in module.named_parameters(recurse=False):
            parameter: Any = loaded_parameter(module, name) if given.is_meta else given
            whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            if type(whole) not in (torch.Tensor, nn.Parameter):
                quantised.append(type(whole).__name__)
                continue
            flat = whole.detach().flatten()
            samples.append(flat[:: max(1, flat.numel() // 8)][:8].to("cpu", torch.bfloat16))
    digest = hashlib.sha256(_raw(torch.cat(samples)))
    digest.update("".join(quantised).encode())
    return digest.hexdigest()


def _parsed(fingerprint: str) -> tuple:
    """The hash of weights, and if there is a sketch its dtype and its numbers of (layers, numbers)."""
    parts = fingerprint.split(":")
    if len(parts) != 5 or parts[0] != PREFIX:
        return (fingerprint,)
    _, weights, dtype, count, encoded = parts
    try:
        raw = base64.b64decode(encoded, validate=True)
        numbers = torch.tensor(struct.unpack(f"<{len(raw) // 4}f", raw), dtype=torch.float64)
        layers = numbers.view(int(count), -1)
    except (binascii.Error, struct.error, ValueError, RuntimeError):
        return (fingerprint,)
    return (weights, dtype, layers) if dtype in TOLERANCES and len(raw) else (fingerprint,)


__all__ = ["execution_device", "fingerprints_match", "loaded_parameter", "memory_fingerprint", "weights_state"]
