# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""The faster product is the product, has its gradients, and leaves alone what is not a plain linear layer."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rxt_hf import layers_rxt
from rxt_hf.evaluation.speed import count_flops
from rxt_hf.layers_rxt import RxTMLP, linear, project, suits_onednn

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()),
        reason="this torch has no oneDNN, or no MKL beside it",
    ),
]
ROWS, TOKENS, WIDTH, OUT = 2, 96, 128, 160


def operands(has_bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((ROWS, TOKENS, WIDTH), (OUT, WIDTH), (OUT,))
    states, weight, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    return states, weight, bias if has_bias else None


def is_turned(states):
    """The same numbers with the strides of a transposed tensor."""
    return states.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.fixture
def counted(monkeypatch):
    """Calls of the faster kernel."""
    calls = []
    monkeypatch.setattr(layers_rxt, "linear", lambda *args: calls.append(args) or linear(*args))
    return calls


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("layout", [torch.clone, is_turned], ids=["dense", "strided"])
def test_the_faster_product_and_its_gradients_equal_those_in_float64(has_bias, layout):
    leaves = [None if x is None else x.requires_grad_() for x in operands(has_bias)]
    wide = [None if x is None else x.detach().double().requires_grad_() for x in leaves]
    assert suits_onednn(*leaves[:2])
    found, expected = linear(layout(leaves[0]), *leaves[1:]), F.linear(*wide)
    assert type(found.grad_fn).__name__ == "OneDNNLinearBackward"
    # an uneven loss, so that the gradient of each output is another
    weights = torch.linspace(-1, 2, found.numel()).view_as(found)
    (found * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    for leaf, other in zip(leaves, wide, strict=True):
        if leaf is not None:
            torch.testing.assert_close(leaf.grad.double(), other.grad, rtol=1e-5, atol=1e-3)


def test_the_gradient_has_a_gradient():
    found = []
    for product in (linear, F.linear):
        states, weight, bias = (x.requires_grad_() for x in operands())
        (gradient,) = torch.autograd.grad(product(states, weight, bias).pow(3).mean(), states, create_graph=True)
        found.append(torch.autograd.grad(gradient.pow(2).sum(), weight)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_only_what_requires_a_gradient_gets_one():
    states, weight, bias = operands()
    linear(states, weight.requires_grad_(), bias).sum().backward()
    assert weight.grad is not None and states.grad is None and bias.grad is None
    with torch.no_grad():
        assert linear(states, weight, bias).grad_fn is None


@pytest.mark.parametrize("kind", ["float64", "bfloat16", "autocast", "small", "subclass", "vmap"])
def test_other_products_are_those_of_torch(kind):
    states, weight, _ = operands()
    if kind in ("float64", "bfloat16"):
        states, weight = (x.to(getattr(torch, kind)) for x in (states, weight))
    if kind == "small":
        states = states[:, :3]
    if kind == "subclass":
        weight = weight.as_subclass(type("Quantised", (torch.Tensor,), {}))
    product = torch.vmap(linear, in_dims=(0, None)) if kind == "vmap" else linear
    reference = torch.vmap(F.linear, in_dims=(0, None)) if kind == "vmap" else F.linear
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == "autocast"):
        found = product(states, weight)
        assert torch.equal(found, reference(states, weight))
    assert found.dtype == (torch.bfloat16 if kind == "autocast" else states.dtype)


def test_the_memory_and_training_take_the_faster_product_and_a_decoder_that_answers_does_not(counted):
    states = operands()[0]
    for in_memory, trains, expected in ((True, False, 3), (False, True, 3), (False, False, 0)):
        counted.clear()
        RxTMLP(WIDTH, OUT, "silu", bias=False, in_memory=in_memory).train(trains)(states)
        assert len(counted) == expected


def test_a_layer_with_a_hook_or_another_forward_is_called(counted):
    states, seen = operands()[0], []
    hooked, replaced = nn.Linear(WIDTH, OUT), nn.Linear(WIDTH, OUT)
    hooked.register_forward_hook(lambda *args: seen.append("hook"))
    replaced.forward = lambda states: seen.append("forward")
    for module in (hooked, replaced):
        project(module, states, in_memory=True)
    assert seen == ["hook", "forward"] and not counted


def test_flops_of_the_faster_product_are_counted():
    states, weight, bias = (x.requires_grad_() for x in operands())
    forward = 2 * ROWS * TOKENS * WIDTH * OUT
    assert count_flops(lambda: linear(states, weight, bias).sum().backward())[0] == 3 * forward
