# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""The model against the float64 reference, option by option, with every parameter random."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rxt_hf.configuration_rxt import RxTConfig
from rxt_hf.memory_rxt import RxTResidualGate

from .reference_rxt import Reference, random_model, randomize

BATCH, TURNS, TOKENS, VOCAB = 4, 3, 8, 50
TOLERANCE = 1e-5

SQA = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 6}
HEADS_BY_ROLE = {
    "head_dim": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "memory_encoder_num_attention_heads": 4,
    "memory_encoder_num_key_value_heads": 1,
    "cross_attention_num_attention_heads": 2,
    "cross_attention_num_key_value_heads": 2,
    "memory_attention_num_attention_heads": 3,
    "memory_attention_num_key_value_heads": 1,
    "interlayer_attention_num_attention_heads": 4,
    "interlayer_attention_num_key_value_heads": 2,
}
BIASES = {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
CASES = {
    "defaults": {},
    "more slots than tokens": {"num_memory_slots": 11},
    "gqa": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
    "sqa": SQA,
    "heads by role": HEADS_BY_ROLE,
    "qk norm": {"use_qk_norm": True, "num_key_value_heads": 2},
    "biases": BIASES,
    "gated attention": {"use_gated_attention": True, "num_key_value_heads": 2},
    "gated cross-attention only": {"use_gated_cross_attention": True},
    "gated encoder only": {"use_gated_memory_encoder_attention": True},
    "sliding window": {"sliding_window": 3},
    "alternating sliding window": {"sliding_window": 2, "layer_types": ["sliding_attention", "full_attention"]},
    "layers without rope": {"no_rope_layers": [1]},
    "stateless layers around": {"num_hidden_layers": 4, "memory_layers": [1, 2]},
    "untied head with bias": {"tie_word_embeddings": False, "lm_head_bias": True},
    "no final norm": {"use_final_norm": False, "tie_word_embeddings": False},
    "rope base, eps, act, width": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
        "rms_norm_eps": 0.1,
        "hidden_act": "gelu",
        "memory_encoder_intermediate_size": 28,
    },
    "simple, static": {"memory_attention_type": "simple", "memory_gate_type": "static"},
    "self, tanh": {"memory_attention_type": "self", "memory_gate_activation": "tanh"},
    "self-interlayer": {"memory_attention_type": "self_interlayer", "num_hidden_layers": 3},
    "self-interlayer, no gate": {"memory_attention_type": "self_interlayer", "memory_gate_activation": "none"},
    "interlayer, gate over slots": {
        "num_hidden_layers": 3,
        "memory_gate_status": "linear",
        "memory_gate_granularity": "slot",
    },
    "moe": MOE,
    "moe with one shared expert": MOE
    | BIASES
    | {"num_shared_experts": 1, "shared_expert_intermediate_size": 12, "use_weighted_shared_experts": True},
    "moe with two shared experts": MOE | {"num_shared_experts": 2, "num_experts_per_tok": 3},
    "moe in one layer": MOE | {"moe_layers": [1], "num_shared_experts": 2, "use_weighted_shared_experts": True},
    "everything": HEADS_BY_ROLE
    | BIASES
    | MOE
    | {
        "num_hidden_layers": 3,
        "memory_layers": [0, 2],
        "use_qk_norm": True,
        "use_gated_attention": True,
        "no_rope_layers": [2],
        "sliding_window": 4,
        "num_shared_experts": 2,
        "memory_attention_type": "self_interlayer",
        "memory_gate_activation": "tanh",
    },
}
# what a form of reading, encoding or writing the memory is crossed with
EXTRAS = {
    "gqa, qk norm": {"use_qk_norm": True, "num_key_value_heads": 2},
    "biases": BIASES,
    "layers without rope": {"no_rope_layers": [1], "num_hidden_layers": 3},
    "sliding windows": {"sliding_window": 2, "layer_types": ["sliding_attention", "full_attention"]},
    "upper layers": {"num_hidden_layers": 4, "memory_layers": [2, 3], "use_gated_attention": True},
    "a layer between": {"num_hidden_layers": 3, "memory_layers": [1], "num_memory_slots": 11},
    "experts": MOE | {"num_shared_experts": 1, "sliding_window": 3},
}
FORMS = {
    f"{reading}, {places}, {encoding}, {writing}": {
        "memory_reading": reading,
        "memory_positions": places,
        "memory_encoding": encoding,
        "memory_writing": writing,
    }
    for reading, places in (("cross_attention", "none"), ("joint", "none"), ("joint", "rank"))
    for encoding in ("encoder", "decoder", "decoder_in_passing")
    for writing in ("attention", "selection")
}
CASES |= {
    f"{name}; {extra}": form | EXTRAS[extra]
    for (name, form), extra in zip(FORMS.items(), itertools.cycle(EXTRAS), strict=False)
}


def make_config(**options) -> RxTConfig:
    base = {
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_memory_slots": 5,
        "max_position_embeddings": 16,
        "output_router_logits": "num_experts" in options,
    }
    return RxTConfig(**(base | options))


def make_episode() -> SimpleNamespace:
    """Rows without padding, padded left, padded right, and one that is silent in the second turn."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(1, VOCAB, (BATCH, TURNS, TOKENS), generator=generator)
    mask = torch.ones_like(input_ids)
    mask[1, :, :3], mask[1, 2, :5] = 0, 0
    mask[2, :, 6:], mask[2, 1, 4:] = 0, 0
    mask[3, 1], mask[3, 2, :1] = 0, 0
    is_start = mask.cumsum(-1) <= 2
    labels = input_ids.masked_fill((mask == 0) | is_start, -100)
    return SimpleNamespace(input_ids=input_ids * mask, attention_mask=mask, labels=labels)


def make_states(config, dtype=torch.float32):
    """Random slots; where empty ones take no part, rows that are full, half filled, empty, and filled with one."""
    shape = (BATCH, config.num_memory_layers, config.num_memory_slots, config.hidden_size)
    states = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    if config.memory_reading == "joint" or config.memory_writing == "selection":
        states[1, :, 2:], states[2], states[3, :, 1:] = 0, 0, 0
    return states.to(dtype)


def close(actual, expected, tolerance=TOLERANCE):
    # a memory under a tanh gate grows in every turn, and float32 errs by a share of that
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance * max(1, expected.abs().max().item()))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def case(request):
    config = make_config(**request.param)
    model, episode = random_model(config), make_episode()
    reference = Reference(config, model.state_dict())
    return SimpleNamespace(
        config=config, model=model, reference=reference, states=make_states(config), **vars(episode)
    )


@torch.no_grad()
def test_logits_of_one_turn_equal_the_reference(case):
    for t in range(TURNS):
        ids, mask = case.input_ids[:, t], case.attention_mask[:, t]
        output = case.model(ids, attention_mask=mask, stm_cache=case.states, output_hidden_states=True)
        hiddens, logits = case.reference.decoder(ids, case.states, mask)
        real = mask.bool()
        close(output.logits[real], logits[real])
        # hidden_states: the embeddings, then every layer; the last one carries the final norm
        for actual, expected in zip(output.hidden_states[1:-1], hiddens[:-1], strict=True):
            close(actual[real], expected[real])


@torch.no_grad()
def test_memory_after_each_of_three_updates_equals_the_reference(case):
    cache, expected = case.states, case.states.double()
    for t in range(TURNS):
        ids, mask = case.input_ids[:, t], case.attention_mask[:, t]
        cache = case.model.update_memory(cache, ids, mask)
        expected = case.reference.update(expected, case.reference.encode(ids, mask, expected), mask)
        close(cache.states, expected)


@torch.no_grad()
def test_a_silent_row_keeps_its_memory_bit_identical(case):
    new = case.model.update_memory(case.states, case.input_ids[:, 1], case.attention_mask[:, 1])
    assert torch.equal(new.states[3], case.states[3])


@torch.no_grad()
def test_encoded_states_equal_the_reference(case):
    ids, mask, inner = case.input_ids[:, 0], case.attention_mask[:, 0], case.model.model
    encoded, _ = inner.encoded_states(inner.embed_tokens(ids), mask, case.states)
    for actual, expected in zip(encoded, case.reference.encode(ids, mask, case.states), strict=True):
        close(actual[mask.bool()], expected[mask.bool()])


@torch.no_grad()
def test_episode_loss_and_final_memory_equal_the_turn_loop(case):
    loss = case.reference.episode_loss(case.input_ids, case.attention_mask, case.labels, case.states)
    states = case.states
    for t in range(TURNS):
        ids, mask = case.input_ids[:, t], case.attention_mask[:, t]
        states = case.reference.update(states, case.reference.encode(ids, mask, states), mask)
    episode = {"attention_mask": case.attention_mask, "labels": case.labels, "stm_cache": case.states}
    for implementation in ("eager", "sdpa"):
        case.model.set_attn_implementation(implementation)
        output = case.model(case.input_ids, **episode, output_router_logits=False)
        close(output.loss, loss)
        close(output.stm_cache.states, states)
    assert set(case.model.state_dict()) - case.reference.used <= {"lm_head.weight", "model.initial_memory"}
    assert ("lm_head.weight" in case.reference.used) != case.config.tie_word_embeddings


def of_rows(reference, router_logits, mask, counts):
    """The balancing losses of rows, which count by `counts`."""
    losses = [
        reference.load_balancing_loss([logits[row] for logits in router_logits], mask[row]) if mask[row].any() else 0.0
        for row in range(len(counts))
    ]
    return sum(loss * share for loss, share in zip(losses, counts / counts.sum(), strict=True))


FORMS_IN_FLOAT64 = {
    f"{name}; {extra}": form | EXTRAS[extra]
    for (name, form), extra in itertools.product(FORMS.items(), EXTRAS)
    if form["memory_writing"] == "selection"
    and (form["memory_reading"] == "joint" or form["memory_encoding"] == "decoder")
}


@pytest.mark.parametrize("options", FORMS_IN_FLOAT64.values(), ids=FORMS_IN_FLOAT64.keys())
@torch.no_grad()
def test_reading_and_writing_by_choice_equal_the_reference_in_float64(options):
    (model, reference, _), episode = make_pair(options), make_episode()
    states = make_states(model.config, torch.float64)
    for t in range(TURNS):
        ids, mask = episode.input_ids[:, t], episode.attention_mask[:, t]
        _, logits = reference.decoder(ids, states, mask)
        found = model(ids, attention_mask=mask, stm_cache=states)
        close(found.logits[mask.bool()], logits[mask.bool()], 1e-10)
        written = model.update_memory(states, ids, mask).states
        close(written, reference.update(states, reference.encode(ids, mask, states), mask), 1e-10)
        states = written


@pytest.mark.parametrize("options", [MOE, CASES["everything"]], ids=["all layers", "with shared experts"])
@torch.no_grad()
def test_load_balancing_loss_of_an_episode_counts_real_tokens_only(options):
    config, episode = make_config(**options), make_episode()
    model = random_model(config)
    reference, states, turns = Reference(config, model.state_dict()), model.init_stm(BATCH).states, []
    for t in range(TURNS):
        ids, mask = episode.input_ids[:, t], episode.attention_mask[:, t]
        turns.append(reference.router_logits(ids, states, mask))
        turn = model(ids, attention_mask=mask, stm_cache=states.float())
        close(turn.aux_loss, of_rows(reference, turns[-1], mask, mask.sum(-1)))
        states = reference.update(states, reference.encode(ids, mask), mask)
    by_layer = [torch.stack(layer, dim=1) for layer in zip(*turns, strict=True)]
    expected = of_rows(reference, by_layer, episode.attention_mask, episode.labels[..., 1:].ne(-100).sum((1, 2)))
    output, plain = model(**vars(episode)), model(**vars(episode), output_router_logits=False)
    close(output.aux_loss, expected)
    close(output.loss, plain.loss.double() + config.router_aux_loss_coef * expected)


GATES = [
    (kind, status, granularity)
    for kind in ("static", "elementwise", "linear")
    for status in ("mean", "linear", "slot")
    for granularity in ("layer", "slot", "element")
    if not (kind == "linear" and status != "slot" and granularity == "element")
    and not (kind == "elementwise" and status == "slot" and granularity != "element")
]


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "none"])
@pytest.mark.parametrize("kind, status, granularity", GATES)
@torch.no_grad()
def test_each_gate_alone_equals_the_reference(kind, status, granularity, activation):
    config = make_config(
        memory_gate_type=kind,
        memory_gate_status=status,
        memory_gate_granularity=granularity,
        memory_gate_activation=activation,
    )
    old, new = torch.randn(2, BATCH, 5, 24, generator=torch.Generator().manual_seed(3)).unbind()
    gate = RxTResidualGate(config)
    holder = randomize(nn.ModuleDict({"write_gate": gate}), seed=4)
    close(gate(old, new), Reference(config, holder.state_dict()).gate("write_gate", old, new))


class ExactRotaryEmbedding(nn.Module):
    """The model's tables are float32 in every dtype; a gradient can be compared in float64 with exact ones only."""

    def __init__(self, config):
        super().__init__()
        j = torch.arange(0, config.head_dim, 2, dtype=torch.float64)
        self.frequencies = config.rope_parameters["rope_theta"] ** (-j / config.head_dim)

    def forward(self, x, position_ids):
        angles = (position_ids[..., None] * self.frequencies).repeat(1, 1, 2)
        return angles.cos(), angles.sin()


def make_pair(options):
    """A float64 model, and a reference whose leaves are copies of its parameters."""
    config = make_config(**options)
    model = random_model(config).double()
    # transformers' grouped matrix product does not know float64
    model.set_experts_implementation("eager")
    model.model.rotary_emb = ExactRotaryEmbedding(config)
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in model.named_parameters()}
    return model, Reference(config, leaves), leaves


def compare_gradients(model, leaves, tolerance):
    silent = set()
    for name, parameter in model.named_parameters():
        if leaves[name].grad is None or leaves[name].grad.abs().max() < 1e-9:
            silent.add(name)
        expected = torch.zeros_like(parameter) if leaves[name].grad is None else leaves[name].grad
        actual = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance, msg=lambda text, name=name: name + text)
    # keys that are not rotated all move together with their bias, and a softmax does not see that
    assert all(name.endswith("k_proj.bias") for name in silent), silent


GRADIENT_CASES = {"self-interlayer": CASES["self-interlayer"], "everything": CASES["everything"]}


@pytest.mark.parametrize("options", GRADIENT_CASES.values(), ids=GRADIENT_CASES.keys())
def test_gradients_through_the_memory_equal_autograd_through_the_reference(options):
    (model, reference, leaves), episode = make_pair(options), make_episode()
    reference.episode_loss(**vars(episode), states=reference.initial_states(BATCH)).backward()
    logits = model(episode.input_ids, attention_mask=episode.attention_mask).logits
    # the library's loss is float32
    nn.functional.cross_entropy(logits[:, :, :-1].flatten(0, 2), episode.labels[:, :, 1:].flatten()).backward()
    compare_gradients(model, leaves, tolerance=1e-8)


def test_gradients_with_recomputed_turns_equal_autograd_through_the_reference():
    (model, reference, leaves), episode = make_pair(CASES["self-interlayer"]), make_episode()
    reference.episode_loss(**vars(episode), states=reference.initial_states(BATCH)).backward()
    model.train().activation_checkpointing_enable()
    model(**vars(episode)).loss.backward()
    # the loss is float32, everything behind it float64
    compare_gradients(model, leaves, tolerance=1e-6)


@pytest.mark.parametrize(
    "option, endings",
    [
        ("attention_bias", ("attn.q_proj", "attn.k_proj", "attn.v_proj")),
        ("attention_output_bias", ("attn.o_proj",)),
        ("mlp_bias", ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")),
    ],
)
def test_a_bias_option_gives_a_bias_to_each_of_its_layers_and_to_no_other(option, endings):
    """The reference adds the biases it finds, so that a missing one would pass above."""
    linears = {n: m for n, m in random_model(make_config(**{option: True})).named_modules() if type(m) is nn.Linear}
    assert {n for n, m in linears.items() if m.bias is not None} == {n for n in linears if n.endswith(endings)}
