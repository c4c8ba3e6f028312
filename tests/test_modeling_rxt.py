# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""What the model guarantees beside its numbers, which test_reference_parity.py compares with the reference."""

import copy
import functools
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash
from transformers import DynamicCache, EncoderDecoderCache
from transformers.utils import logging

from rxt_hf import RxTForCausalLM, StateError, STMCache
from rxt_hf.fingerprint_rxt import fingerprints_match
from rxt_hf.layers_rxt import eager_attention_forward, one_query_attention
from rxt_hf.memory_rxt import RxTResidualGate

from .models import (
    EXPERTS,
    IN_PASSING,
    JOINT,
    close,
    counted_calls,
    random_ids,
    random_memory,
    tiny_config,
    tiny_model,
)

IDS = random_ids(2, 6)
FULL = torch.ones(2, 6, dtype=torch.long)
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
MASKS = {"full": FULL, "left": LEFT, "right": LEFT.flip(1), "silent row": torch.tensor([[0] * 6, [1] * 6])}
each_memory_attention = pytest.mark.parametrize(
    "memory_attention_type", ["simple", "self", "interlayer", "self_interlayer"]
)


@pytest.fixture(scope="module", autouse=True)
def without_gradients(one_thread):
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def memory(model):
    return random_memory(model)


# ---- the memory is a value that is read


def test_logits_depend_on_every_row_layer_and_slot_of_the_memory(model, memory):
    logits = model(IDS, stm_cache=memory).logits
    assert (logits - model(IDS).logits).abs().max() > 1e-3
    for layer in range(2):
        for slot in range(5):
            states = memory.states.clone()
            states[0, layer, slot] += 1
            change = (model(IDS, stm_cache=states).logits - logits).abs().amax(dim=(1, 2))
            assert change[0] > 1e-3
            assert change[1] == 0


def test_initial_memory_is_read_by_default_and_comes_as_a_copy(model):
    parameter = model.model.initial_memory
    initial = model.init_stm(2)
    assert torch.equal(initial.states, torch.stack([parameter, parameter]))
    assert initial.turns.tolist() == [0, 0]
    assert torch.equal(model(IDS).logits, model(IDS, stm_cache=initial).logits)
    initial.states += 1
    assert not torch.equal(initial.states[0], parameter)
    assert torch.equal(initial.states[0], initial.states[1])


def test_random_initial_memory_is_seedable_and_has_the_configured_spread():
    model = tiny_model(memory_init="random", memory_init_std=3.0, num_memory_slots=200)
    first, again = (model.init_stm(2, generator=torch.Generator().manual_seed(7)).states for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, model.init_stm(2).states)
    assert first.std().item() == pytest.approx(3.0, rel=0.05)
    assert "model.initial_memory" not in model.state_dict()
    torch.manual_seed(1)
    once = model.init_stm(1).states
    torch.manual_seed(1)
    assert torch.equal(once, model.init_stm(1).states)


def test_zero_initial_memory_is_zero():
    assert tiny_model(memory_init="zeros").init_stm(3).states.abs().max() == 0


def test_forward_hands_back_the_memory_it_read(model, memory):
    read = model(IDS, stm_cache=memory).stm_cache
    assert torch.equal(read.states, memory.states)
    assert read.turns.tolist() == [3, 3]
    plain = model(IDS, stm_cache=memory.states).stm_cache
    assert torch.equal(plain.states, memory.states)
    assert torch.equal(model(IDS).stm_cache.states, model.init_stm(2).states)


def test_update_gives_a_new_memory_and_leaves_the_old_one_bit_identical(model, memory):
    before = memory.states.clone()
    new = model.update_memory(memory, IDS)
    assert torch.equal(memory.states, before)
    assert (new.states - before).abs().amax(dim=(2, 3)).min() > 1e-3
    assert new.turns.tolist() == [4, 4]
    assert memory.turns.tolist() == [3, 3]
    assert torch.equal(model.update_memory(memory.states, IDS).states, new.states)
    embeds = model.get_input_embeddings()(IDS)
    assert torch.equal(model.update_memory(memory, inputs_embeds=embeds).states, new.states)
    assert new.nbytes == memory.nbytes


def test_update_of_no_memory_starts_from_the_initial_one(model):
    new = model.update_memory(None, IDS)
    assert torch.equal(new.states, model.update_memory(model.init_stm(2), IDS).states)
    assert new.turns.tolist() == [1, 1]
    assert new.fingerprint == model.memory_fingerprint()


def test_silent_row_keeps_its_memory_and_its_number_of_turns(model, memory):
    new = model.update_memory(memory, IDS, MASKS["silent row"])
    assert torch.equal(new.states[0], memory.states[0])
    assert not torch.equal(new.states[1], memory.states[1])
    assert new.turns.tolist() == [3, 4]
    episode = torch.stack([IDS, IDS], dim=1)
    mask = torch.stack([FULL, MASKS["silent row"]], dim=1)
    assert model(episode, attention_mask=mask, stm_cache=memory).stm_cache.turns.tolist() == [4, 5]


def test_perturbing_one_row_changes_the_others_by_exactly_nothing(model, memory):
    other_ids, other = IDS.clone(), memory.states.clone()
    other_ids[1], other[1] = other_ids[1].flip(0), other[1] + 1
    assert torch.equal(model(IDS, stm_cache=memory).logits[0], model(other_ids, stm_cache=other).logits[0])
    written, otherwise = model.update_memory(memory, IDS).states, model.update_memory(other, other_ids).states
    assert torch.equal(written[0], otherwise[0])
    assert not torch.equal(written[1], otherwise[1])


def test_update_that_is_not_finite_raises_and_keeps_the_old_memory(model, memory):
    broken, before = copy.deepcopy(model), memory.states.clone()
    broken.model.memory_attention.layers[1].write_attn.v_proj.weight[0, 0] = float("nan")
    with pytest.raises(StateError, match="not finite"):
        broken.update_memory(memory, IDS)
    with pytest.raises(StateError, match="not finite"):
        broken.generate(IDS, stm_cache=memory, max_new_tokens=2)
    assert torch.equal(memory.states, before)
    broken.generate(IDS, stm_cache=memory, max_new_tokens=2, update_memory=False)


def test_fingerprint_names_the_weights_and_not_their_precision(model):
    fingerprint = model.memory_fingerprint()
    for dtype in (torch.bfloat16, torch.float64):
        assert fingerprints_match(copy.deepcopy(model).to(dtype).memory_fingerprint(), fingerprint)
    assert not fingerprints_match(tiny_model(seed=1).memory_fingerprint(), fingerprint)


# ---- layers and options


def test_only_memory_layers_read_and_the_memory_has_a_layer_for_each():
    model = tiny_model(num_hidden_layers=4, memory_layers=[1, 3])
    memory = random_memory(model)
    assert [hasattr(layer, "memory_cross_attn") for layer in model.model.layers] == [False, True, False, True]
    assert model.init_stm(2).states.shape == memory.states.shape == (2, 2, 5, 32)
    output = model(IDS, stm_cache=memory, output_hidden_states=True)
    for index, reader in enumerate((1, 3)):
        states = memory.states.clone()
        states[:, index] += 1
        hidden = model(IDS, stm_cache=states, output_hidden_states=True).hidden_states
        changed = [not torch.equal(a, b) for a, b in zip(hidden, output.hidden_states, strict=True)]
        # the embeddings, then what each layer puts out
        assert changed == [layer >= reader for layer in range(-1, 4)]
    turn = model.generate(IDS, stm_cache=memory, max_new_tokens=3)
    assert torch.equal(turn.stm_cache.states, model.update_memory(memory, turn.sequences).states)


def test_a_cache_filled_with_the_keys_and_values_of_a_memory_reads_it():
    model = tiny_model(memory_layers=[1])
    memory = random_memory(model)
    within, across = DynamicCache(), DynamicCache()
    for index, keys_values in enumerate(model.model.memory_keys_values(memory.states)):
        across.update(*keys_values, index)
    embeds = model.model.embed_tokens(IDS)
    filled = model.model.decode(embeds, None, None, cache=EncoderDecoderCache(within, across))
    assert torch.equal(filled, model.model.decode(embeds, memory.states))


def test_a_replay_is_the_loop_over_its_interactions():
    model = tiny_model()
    memory = random_memory(model, batch_size=1)
    interactions = [random_ids(3 + 5 * turn % 11, seed=turn).tolist() for turn in range(40)]
    expected = memory
    with torch.no_grad():
        for token_ids in interactions:
            expected = model.update_memory(expected, torch.tensor([token_ids]))
    before = memory.states.clone()
    replayed = model.replay(memory, interactions)
    close(replayed.states, expected.states)
    assert (replayed.states - model.replay(memory, interactions[:-1]).states).abs().max() > 0.01
    assert replayed.turns.tolist() == expected.turns.tolist() == [43]
    assert torch.equal(memory.states, before)
    assert model.replay(None, []).turns.tolist() == [0]
    with pytest.raises(ValueError, match="without a token"):
        model.replay(memory, [[3], []])
    with pytest.raises(ValueError, match="stm_cache has shape"):
        model.replay(random_memory(model, batch_size=2), interactions)


def test_zero_initialised_cross_attention_reads_nothing_at_first():
    torch.manual_seed(0)
    model = RxTForCausalLM(tiny_config(cross_attention_zero_init=True)).eval()
    memory = random_memory(model)
    assert torch.equal(model(IDS, stm_cache=memory).logits, model(IDS).logits)
    # the other projections are those of any layer
    assert model.model.layers[1].self_attn.o_proj.weight.abs().max() > 0
    model.model.layers[1].memory_cross_attn.o_proj.weight += 1
    assert not torch.equal(model(IDS, stm_cache=memory).logits, model(IDS).logits)


GATES = [
    ("linear", "slot", "element"),
    ("linear", "mean", "slot"),
    ("static", "slot", "element"),
    ("elementwise", "mean", "slot"),
]


@pytest.mark.parametrize(("kind", "status", "granularity"), GATES)
def test_gates_start_spread_over_the_slots_around_the_configured_value(kind, status, granularity):
    fields = {"memory_gate_type": kind, "memory_gate_status": status, "memory_gate_granularity": granularity}
    gate = RxTForCausalLM(tiny_config(**fields, memory_gate_init=-3.0)).model.memory_attention.layers[1].write_gate
    found = {"linear": gate.gate_bias, "static": gate.gate, "elementwise": gate.gate}[kind]
    found = gate.gate.bias if found is None else found
    expected = torch.tensor([-5.0, -4.0, -3.0, -2.0, -1.0])
    close(found, expected.view(-1, *[1] * (found.dim() - 1)).expand_as(found))


def test_gate_blends_in_float32_where_bfloat16_would_lose_the_old_memory():
    config = tiny_config(memory_gate_type="static", memory_gate_granularity="layer")
    gate = RxTResidualGate(config).bfloat16()
    gate.gate.fill_(8.0)
    old = torch.full((1, 5, 32), 1000.0, dtype=torch.bfloat16)
    blended = gate(old, torch.zeros_like(old))
    assert blended.dtype == torch.bfloat16
    torch.testing.assert_close(blended.float(), torch.full((1, 5, 32), 0.3354), rtol=0.01, atol=0)


def test_memory_keeps_its_precision_under_a_model_of_another(model, memory):
    half = copy.deepcopy(model).bfloat16()
    embeds = half.get_input_embeddings()(IDS)
    for initial in ("random", "zeros"):
        assert tiny_model(memory_init=initial).bfloat16().init_stm(2).dtype == torch.bfloat16
    assert half.init_stm(2).dtype == torch.bfloat16
    for kept in (memory, memory.to(torch.bfloat16)):
        assert half.update_memory(kept, IDS).dtype == kept.dtype
        assert half.update_memory(kept, inputs_embeds=embeds, attention_mask=LEFT).dtype == kept.dtype
        assert half.generate(IDS, stm_cache=kept, max_new_tokens=2).stm_cache.dtype == kept.dtype
        assert half(IDS[:, None], stm_cache=kept).stm_cache.dtype == kept.dtype
        assert half(IDS, stm_cache=kept).logits.dtype == torch.bfloat16
    # a float32 memory is not rounded on its way: only the update is
    finer = (half.update_memory(memory, IDS).states * 256).frac()
    assert (finer != 0).float().mean() > 0.9
    assert model.update_memory(memory.to(torch.bfloat16), IDS).dtype == torch.bfloat16


def test_recorded_weights_of_the_memory_cover_all_slots():
    model = tiny_model(attn_implementation="eager", cross_attention_num_attention_heads=2)
    output = model(IDS, stm_cache=random_memory(model), output_attentions=True)
    assert [weights.shape for weights in output.cross_attentions] == [(2, 2, 6, 5)] * 2
    assert [weights.shape for weights in output.attentions] == [(2, 4, 6, 6)] * 2
    for weights in output.cross_attentions:
        close(weights.sum(-1), torch.ones(2, 2, 6))


# ---- padding and the cache within a turn


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_neither_logits_nor_memory(model, memory, side):
    mask = MASKS[side]
    logits, written = model(IDS, attention_mask=mask, stm_cache=memory).logits, model.update_memory(memory, IDS, mask)
    for row in range(2):
        ids, alone = IDS[row][mask[row].bool()][None], memory.select(row)
        close(logits[row][mask[row].bool()], model(ids, stm_cache=alone).logits[0])
        close(written.states[row], model.update_memory(alone, ids).states[0])


@pytest.mark.parametrize("options", [{}, EXPERTS, {"sliding_window": 3}], ids=["dense", "experts", "sliding"])
def test_cached_forward_of_a_left_padded_turn_equals_the_whole_one(options):
    model = tiny_model(**options)
    memory = random_memory(model)
    whole = model(IDS, attention_mask=LEFT, stm_cache=memory).logits
    prompt = model(IDS[:, :3], attention_mask=LEFT[:, :3], stm_cache=memory, use_cache=True)
    cache, parts = prompt.cache, [prompt.logits]
    for end in range(4, 7):
        step = model(IDS[:, end - 1 : end], attention_mask=LEFT[:, :end], stm_cache=memory, cache=cache)
        parts.append(step.logits)
    close(torch.cat(parts, dim=1)[LEFT.bool()], whole[LEFT.bool()])


def test_cache_of_a_caller_is_filled_whatever_its_class(model, memory):
    whole = model(IDS, stm_cache=memory).logits
    cache = DynamicCache()
    first = model(IDS[:, :4], stm_cache=memory, cache=cache)
    assert cache.get_seq_length() == 4
    rest = model(IDS[:, 4:], stm_cache=memory, cache=cache)
    close(torch.cat([first.logits, rest.logits], dim=1), whole)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_cache_goes_by_its_name_of_every_version_of_transformers(model, memory, name):
    def started(model):
        cache = model(IDS[:, :4], stm_cache=memory, use_cache=True).cache
        assert cache.get_seq_length() == 4
        return cache

    # transformers' own models warn of the older name since they have the newer one
    is_old = name == "past_key_values"
    warned = functools.partial(pytest.warns, FutureWarning, match="is deprecated") if is_old else nullcontext
    expected, cache = model(IDS, stm_cache=memory).logits[:, 4:], started(model)
    answer = {"max_new_tokens": 3, "do_sample": False, "stm_cache": memory}
    with warned():
        rest = model(IDS[:, 4:], stm_cache=memory, **{name: cache})
    assert rest.cache is cache
    close(rest.logits, expected)
    with warned():
        inner = model.model(IDS[:, 4:], stm_cache=memory, **{name: started(model.model)})
    close(model.lm_head(inner.last_hidden_state), expected)
    cache = started(model)
    with warned():
        answered = model.generate(IDS, **answer, **{name: cache}).sequences
    assert torch.equal(answered, model.generate(IDS, **answer).sequences)
    assert cache.get_seq_length() == IDS.shape[1] + 2


def test_memory_other_than_the_one_behind_the_cache_is_refused(model, memory):
    def started():
        return model(IDS, stm_cache=memory, use_cache=True).cache

    following = random_ids(2, 1, seed=1)
    expected = model(following, stm_cache=memory, cache=started()).logits
    # an equal memory, and none at all, is the one that the turn was started with
    for same in (memory.fork(), memory.states.clone(), None):
        assert torch.equal(model(following, stm_cache=same, cache=started()).logits, expected)
    for other in (STMCache(memory.states + 1), memory.states * 0):
        with pytest.raises(ValueError, match="another memory than the stm_cache given"):
            model(following, stm_cache=other, cache=started())
    with pytest.raises(ValueError, match=r"\(3, 2, 5, 32\), expected \(2, 2, 5, 32\)"):
        model(following, stm_cache=torch.zeros(3, 2, 5, 32), cache=started())
    # a caller's own object is filled and keeps no memory: what is in it is read, and nothing else is taken for it
    own = EncoderDecoderCache(DynamicCache(), DynamicCache())
    model(IDS, stm_cache=memory, cache=own)
    with pytest.raises(ValueError, match="does not know which memory"):
        model(following, stm_cache=memory, cache=own)
    assert torch.equal(model(following, cache=own).logits, expected)


def test_cached_keys_and_values_of_one_turn_never_reach_the_next(model, memory):
    first = model(IDS, stm_cache=memory, use_cache=True)
    other = STMCache(memory.states.flip(2) + 1)
    second = model(IDS, stm_cache=other, use_cache=True)
    assert (second.logits - first.logits).abs().max() > 1e-3
    assert torch.equal(second.logits, tiny_model()(IDS, stm_cache=other).logits)


def test_router_loss_is_part_of_the_loss_and_counts_real_tokens_only():
    model = tiny_model(**EXPERTS)
    memory = random_memory(model, batch_size=1)
    plain = model(IDS[:1], labels=IDS[:1], stm_cache=memory, output_router_logits=False)
    output = model(IDS[:1], labels=IDS[:1], stm_cache=memory)
    assert plain.aux_loss is None
    assert output.aux_loss > 1
    close(output.loss, plain.loss + 0.5 * output.aux_loss)
    for pad_left in (0, 3):
        ids, mask = torch.zeros(1, 9, dtype=torch.long), torch.zeros(1, 9, dtype=torch.long)
        ids[:, pad_left : pad_left + 6], mask[:, pad_left : pad_left + 6] = IDS[:1], 1
        close(model(ids, attention_mask=mask, stm_cache=memory).aux_loss, output.aux_loss, tolerance=1e-6)


def test_router_loss_of_a_cached_forward_takes_the_full_mask():
    model = tiny_model(**EXPERTS)
    memory = random_memory(model)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    cache = model(IDS[:, :3], attention_mask=mask[:, :3], stm_cache=memory, use_cache=True).cache
    step = model(IDS[:, 3:], attention_mask=mask, stm_cache=memory, cache=cache)
    alone = [
        model(IDS[row : row + 1, start:end], stm_cache=memory.select(row))
        for row, start, end in ((0, 2, 6), (1, 0, 4))
    ]
    # of each row the new tokens that are real: three of the first, one of the second
    losses = []
    for output, new in zip(alone, (3, 1), strict=True):
        probabilities = torch.cat([logits[-new:] for logits in output.router_logits]).softmax(-1)
        chosen = torch.zeros_like(probabilities).scatter(1, probabilities.topk(2).indices, 1.0)
        losses.append(4 * (chosen.mean(0) * probabilities.mean(0)).sum())
    close(step.aux_loss, (3 * losses[0] + losses[1]) / 4)


def test_logits_to_keep_are_the_last_of_every_turn(model, memory):
    whole = model(IDS, stm_cache=memory).logits
    close(model(IDS, stm_cache=memory, logits_to_keep=2).logits, whole[:, -2:])
    close(model(IDS, stm_cache=memory, logits_to_keep=torch.tensor([0, 3])).logits, whole[:, [0, 3]])
    episode = random_ids(2, 3, 6, seed=2)
    whole = model(episode, stm_cache=memory).logits
    assert whole.shape == (2, 3, 6, 50)
    close(model(episode, stm_cache=memory, logits_to_keep=1).logits, whole[:, :, -1:])


# ---- bad input


@pytest.mark.parametrize("call", ["forward", "episode", "update_memory", "generate"])
@pytest.mark.parametrize("shape", [(3, 2, 5, 32), (2, 3, 5, 32), (2, 2, 4, 32), (2, 2, 5, 16)])
@pytest.mark.parametrize("plain", [True, False])
def test_memory_of_another_shape_is_refused_naming_both_before_any_layer_runs(model, call, shape, plain):
    states = torch.zeros(shape)
    wrong = states if plain else STMCache(states)
    calls = {
        "forward": lambda: model(IDS, stm_cache=wrong),
        "episode": lambda: model(IDS[:, None], stm_cache=wrong),
        "update_memory": lambda: model.update_memory(wrong, IDS),
        "generate": lambda: model.generate(IDS, stm_cache=wrong),
    }
    # generate refuses before the model is called at all
    untouched = [model.model.layers[0], model.model.memory_encoder.layers[0]]
    untouched += [model.model] if call == "generate" else []
    message = rf"{tuple(shape)}, expected (2, 2, 5, 32)".replace("(", r"\(").replace(")", r"\)")
    with counted_calls(*untouched) as counts, pytest.raises(ValueError, match=message):
        calls[call]()
    assert set(counts) == {0}


@pytest.mark.parametrize("shape", [(2, 9), (2, 4), (1, 6), (3, 6)])
def test_mask_of_another_shape_than_the_interaction_is_refused_naming_both(model, memory, shape):
    for call in (lambda mask: model.update_memory(memory, IDS, mask), lambda mask: model(IDS, mask, stm_cache=memory)):
        with pytest.raises(ValueError) as refusal:
            call(torch.ones(shape))
        assert f"{shape}" in str(refusal.value)
        assert "(2, 6)" in str(refusal.value)


@pytest.mark.parametrize("shape", [(2, 6, 3), (2, 6), (2, 2, 6)])
def test_mask_of_another_shape_than_the_episode_is_refused_naming_both(model, memory, shape):
    episode = IDS.unsqueeze(1).expand(-1, 3, -1)
    with pytest.raises(ValueError) as refusal:
        model(episode, torch.ones(shape), stm_cache=memory)
    assert f"{shape}" in str(refusal.value)
    assert "(2, 3, 6)" in str(refusal.value)


def test_input_is_either_ids_or_embeddings(model, memory):
    embeds = model.get_input_embeddings()(IDS)
    close(model(inputs_embeds=embeds, stm_cache=memory).logits, model(IDS, stm_cache=memory).logits)
    for call in (model, model.model, lambda *ids, **kwargs: model.update_memory(memory, *ids, **kwargs)):
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            call()
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            call(IDS, inputs_embeds=embeds)


def test_episode_refuses_a_cache(model, memory):
    cache = model(IDS, stm_cache=memory, use_cache=True).cache
    with pytest.raises(ValueError, match=r"An episode .* keeps no cache"):
        model(IDS[:, None], stm_cache=memory, cache=cache)
    # one that is recomputed turn by turn does not pass it over either
    recomputing = tiny_model().train()
    recomputing.activation_checkpointing_enable()
    with pytest.raises(ValueError, match=r"An episode .* keeps no cache"):
        recomputing(IDS[:, None], labels=IDS[:, None], stm_cache=memory, cache=cache)


# ---- a long conversation


@each_memory_attention
def test_after_a_thousand_random_updates_the_memory_is_bounded_and_its_slots_differ(memory_attention_type):
    torch.manual_seed(0)
    model = RxTForCausalLM(tiny_config(memory_attention_type=memory_attention_type)).eval()
    memory = model.init_stm(1)
    largest, turns = memory.states.norm(), random_ids(1000, 1, 6)
    for ids in turns:
        memory = model.update_memory(memory, ids)
        assert memory.states.norm() <= largest
    layers = memory.states[0].double()
    values = torch.linalg.svdvals(layers)
    assert ((values > 1e-3 * values[:, :1]).sum(dim=-1) > 1).all()
    apart = (layers - layers.mean(dim=1, keepdim=True)).pow(2).sum(dim=(1, 2)) / layers.pow(2).sum(dim=(1, 2))
    assert apart.min() > 1e-3
    assert memory.turns.tolist() == [1000]


# ---- attention implementations

SHAPES = {
    "fewer slots than tokens": {},
    "more slots than tokens": {
        "num_key_value_heads": 2,
        "num_memory_slots": 9,
        "memory_attention_type": "self_interlayer",
    },
    "sliding window": {"sliding_window": 3},
    "read jointly": {**JOINT, "num_key_value_heads": 2, "num_memory_slots": 9},
    "read jointly, written in passing": {**IN_PASSING, "memory_layers": [1], "sliding_window": 20},
    "read jointly, written by attention": {"memory_reading": "joint"},
    "chosen, read apart": {"memory_writing": "selection"},
    "norms and gates": {
        "num_memory_slots": 2,
        "use_qk_norm": True,
        "use_gated_attention": True,
        "memory_attention_type": "self",
    },
}


def everything(model, mask):
    """Logits, one token's logits, written memory, and a turn where the mask allows for one."""
    memory = random_memory(model)
    if model.config.memory_reading == "joint":
        memory.states[0, :, 1:] = 0
    outputs = [
        model(IDS, attention_mask=mask, stm_cache=memory).logits[mask.bool()],
        model(IDS[:, :1], stm_cache=memory).logits,
        model.update_memory(memory, IDS, mask).states,
        model.update_memory(memory, IDS[:, :1]).states,
    ]
    if mask[:, -1].all():
        turn = model.generate(IDS, attention_mask=mask, stm_cache=memory, max_new_tokens=4, min_new_tokens=4)
        outputs += [turn.sequences, turn.stm_cache.states]
    return outputs


def assert_equal_to_eager(model, implementation, mask):
    model.config._attn_implementation = "eager"
    expected = everything(model, mask)
    model.config._attn_implementation = implementation
    for found, wanted in zip(everything(model, mask), expected, strict=True):
        close(found, wanted)


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES.keys())
def shaped_model(request):
    return tiny_model(**request.param)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_sdpa_equals_eager(shaped_model, mask):
    assert_equal_to_eager(shaped_model, "sdpa", mask)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_flash_attention_equals_eager_with_kernels_that_know_no_mask(shaped_model, mask, flash_kernels):
    assert_equal_to_eager(shaped_model, "flash_attention_2", mask)
    # a write by choice attends to nothing
    assert set(flash_kernels) >= {"dense"} | ({"ragged"} if shaped_model.model.memory_attention is not None else set())


@pytest.mark.slow
@pytest.mark.parametrize("mask", [LEFT, MASKS["silent row"]], ids=["left", "silent row"])
def test_flex_equals_eager(model, mask):
    assert_equal_to_eager(copy.deepcopy(model), "flex_attention", mask)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels of a CPU were wrong at these shapes")
def test_flex_equals_eager_at_shapes_that_were_wrong():
    """Heads of 16 and 40 slots, with numbers of tokens that are no power of two and one that is."""
    model = tiny_model(num_memory_slots=40, head_dim=16, max_position_embeddings=64)
    for tokens in (3, 8, 16, 20):
        ids = random_ids(1, tokens, seed=tokens)
        model.set_attn_implementation("eager")
        expected = model(ids).logits
        model.set_attn_implementation("flex_attention")
        close(model(ids).logits, expected)


JOINT_REFUSALS = {
    "flex": ("flex_attention", JOINT, {}, "no mask for flex_attention"),
    "window": ("flash_attention_2", {**JOINT, "sliding_window": 3}, {}, "turns longer than the sliding window"),
    "static cache": ("flash_attention_2", JOINT, {"cache_implementation": "static"}, "no mask for flash_attention_2"),
    "slots": ("flash_attention_2", {"memory_writing": "selection"}, {}, "cannot leave out slots"),
}


@pytest.mark.parametrize("implementation, options, arguments, message", JOINT_REFUSALS.values(), ids=JOINT_REFUSALS)
def test_attention_without_a_mask_for_slots_is_refused_once_a_slot_is_filled(
    implementation, options, arguments, message, flash_kernels
):
    model = tiny_model(**options, memory_init="zeros")
    model.config._attn_implementation = implementation
    memory = random_memory(model)
    memory.states[:, :, 2:] = 0
    with pytest.raises(ValueError, match=message):
        model.generate(IDS, stm_cache=memory, max_new_tokens=2, disable_compile=True, **arguments)


def test_implementation_is_chosen_by_the_usual_call(model, memory):
    chosen = copy.deepcopy(model)
    chosen.set_attn_implementation("eager")
    assert chosen(IDS, stm_cache=memory, output_attentions=True).cross_attentions[0].shape == (2, 4, 6, 5)


def attend(queries, keys, values, scale, causal, window):
    """Plain attention of (rows, tokens, heads, head_dim) in the alignment of flash kernels: last query, last key."""
    groups = queries.shape[2] // keys.shape[2]
    keys, values = keys.repeat_interleave(groups, 2), values.repeat_interleave(groups, 2)
    distance = torch.arange(queries.shape[1])[:, None] + (keys.shape[1] - queries.shape[1])
    distance = distance - torch.arange(keys.shape[1])
    hidden = (distance < 0) if causal else torch.zeros_like(distance, dtype=torch.bool)
    if window[0] >= 0:
        hidden |= distance > window[0]
    if window[1] >= 0:
        hidden |= -distance > window[1]
    scores = torch.einsum("bqhd,bkhd->bhqk", queries, keys) * scale
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values)


@pytest.fixture
def flash_kernels(monkeypatch):
    """Stands in for the two kernels of flash-attn, and notes which of them ran."""
    calls = []

    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), deterministic=False
    ):
        calls.append("dense")
        return attend(q, k, v, softmax_scale, causal, window_size)

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        deterministic=False,
    ):
        calls.append("ragged")
        for packed, offsets, longest in ((q, cu_seqlens_q, max_seqlen_q), (k, cu_seqlens_k, max_seqlen_k)):
            assert offsets.dtype == torch.int32
            assert (offsets[0], offsets[-1]) == (0, len(packed))
            assert longest == offsets.diff().max()
        lengths = [offsets.diff().tolist() for offsets in (cu_seqlens_q, cu_seqlens_k, cu_seqlens_k)]
        rows = zip(*(packed.split(sizes) for packed, sizes in zip((q, k, v), lengths, strict=True)), strict=True)
        return torch.cat(
            [attend(*(part[None] for part in row), softmax_scale, causal, window_size)[0] for row in rows]
        )

    kernels = (flash_attn_func, flash_attn_varlen_func, None, flash._pad_input, flash._unpad_input)
    for name in [name for name in vars(flash) if name.startswith("_") and name.endswith(("_fn", "_implementation"))]:
        monkeypatch.setattr(flash, name, None)
    monkeypatch.setattr(flash, "_lazy_imports", lambda *args, **kwargs: kernels)
    return calls


@pytest.mark.parametrize("key_value_heads", [1, 2, 4])
def test_a_decoded_token_reads_the_memory_without_the_kernel_that_is_slow_for_it(monkeypatch, key_value_heads):
    model = tiny_model(cross_attention_num_key_value_heads=key_value_heads).bfloat16()
    states, queries, attend = (
        random_memory(model).states.bfloat16(),
        [],
        torch.nn.functional.scaled_dot_product_attention,
    )

    def noted(query, key, *args, **kwargs):
        queries.append(query.shape[2])
        return attend(query, key, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    found = [layer.memory_cross_attn for layer in model.model.layers]
    logits = model(IDS[:, :1], stm_cache=states).logits
    assert queries == [1] * len(found)
    model(IDS[:, :2], stm_cache=states)
    assert queries[len(found) :] == [2] * 2 * len(found)
    model.set_attn_implementation("eager")
    close(logits, model(IDS[:, :1], stm_cache=states).logits, 0.1)
    # the same products in full precision
    query, keys, values = torch.randn(2, 4, 1, 8), *torch.randn(2, 2, key_value_heads, 5, 8)
    module = SimpleNamespace(num_key_value_groups=4 // key_value_heads, training=False)
    expected, _ = eager_attention_forward(module, query, keys, values, None, 0.3)
    output, _ = one_query_attention(module, query, keys, values, None, 0.3)
    close(output.reshape(2, 1, 32), expected.reshape(2, 1, 32))


# ---- masks of what is read and written


@pytest.mark.parametrize("given", [None, "cache"])
def test_memory_mask_without_a_tensor_to_mask_is_refused(model, memory, given):
    with pytest.raises(ValueError, match="memory_mask needs an stm_cache that is a tensor"):
        model(IDS, stm_cache=given and memory, memory_mask=torch.ones(2, 5))


@pytest.mark.parametrize(
    "name", ["memory", "stm_cach", "stm", "STM_cache", "memory_states", "write_masks", "smt_cache", "mem", "state"]
)
@pytest.mark.parametrize("part", ["head", "decoder", "episode"])
def test_misspelt_memory_is_refused(model, memory, name, part):
    module = model.model if part == "decoder" else model
    ids = IDS.unsqueeze(1) if part == "episode" else IDS
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}': the memory to read is stm_cache"):
        module(ids, **{name: memory})


@pytest.mark.parametrize("part", ["turn", "episode", "write"])
def test_more_tokens_than_positions_are_warned_of(model, part, caplog):
    limit = model.config.max_position_embeddings
    logger = logging.get_logger("rxt_hf")
    logger.addHandler(caplog.handler)
    for tokens in (limit, limit + 1):
        assert f"An interaction has {tokens - 1} tokens" not in caplog.text
        ids = random_ids(1, tokens, seed=tokens + len(part))
        logger.warning_once.cache_clear()
        if part == "write":
            model.update_memory(None, ids)
        else:
            model(ids if part == "turn" else ids[:, None])
    logger.removeHandler(caplog.handler)
    assert f"An interaction has {limit + 1} tokens, more than max_position_embeddings={limit}" in caplog.text


def test_masks_of_an_episode_and_of_one_turn_are_not_taken_for_each_other(model, memory):
    with pytest.raises(ValueError, match="write_mask is for an episode"):
        model(IDS, stm_cache=memory, write_mask=torch.ones(2, 1))
    with pytest.raises(ValueError, match="memory_mask is for one turn"):
        model(IDS[:, None], stm_cache=memory, memory_mask=torch.ones(2, 5))


# ---- compilation


def test_decoding_step_compiles_to_one_whole_graph(memory):
    torch._dynamo.reset()
    model, following = tiny_model(), random_ids(2, 1, seed=3)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    caches = [model(IDS, stm_cache=memory, use_cache=True).cache for _ in range(2)]
    expected = model(following, stm_cache=memory, cache=caches[0]).logits
    # an equal memory, which cannot be compared within a graph
    close(compiled(following, stm_cache=memory.states.clone(), cache=caches[1]).logits, expected)


@pytest.mark.slow
def test_turn_and_write_compiled_by_inductor_equal_the_plain_ones(memory):
    torch._dynamo.reset()
    model = tiny_model()
    decode = torch.compile(model, fullgraph=True)
    close(decode(IDS, stm_cache=memory.states).logits, model(IDS, stm_cache=memory).logits)
    write = torch.compile(model.model.write, fullgraph=True)
    embeds = model.get_input_embeddings()(IDS)
    close(write(memory.states, embeds, LEFT), model.update_memory(memory, IDS, LEFT).states)


# ---- positions whose frequencies depend on the length

GROWING_ROPES = {
    "longrope": {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 16},
    "dynamic": {"factor": 3.0},
}
each_growing_rope = pytest.mark.parametrize("rope_type", GROWING_ROPES)


def growing_rope_model(rope_type):
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 4.0, **GROWING_ROPES[rope_type]}
    return tiny_model(rope_parameters=rope, max_position_embeddings=64 if rope_type == "longrope" else 16)


@each_growing_rope
def test_threads_with_short_and_long_interactions_do_not_change_each_others_positions(rope_type):
    model = growing_rope_model(rope_type)
    prompts, wrong = [random_ids(1, tokens) for tokens in (8, 40)], [0, 0]
    expected = [model.update_memory(None, ids).states for ids in prompts]
    assert not torch.equal(*(model.model.rotary_emb.frequencies(torch.arange(n)[None]) for n in (8, 40)))

    def turns(index):
        with torch.no_grad():
            for _ in range(200):
                wrong[index] += not torch.equal(model.update_memory(None, prompts[index]).states, expected[index])

    threads = [threading.Thread(target=turns, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [0, 0]


@each_growing_rope
def test_a_long_row_changes_the_positions_of_a_short_one_by_nothing(rope_type):
    model = growing_rope_model(rope_type)
    ids, mask = random_ids(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[1, :34] = 0
    together = model(ids, attention_mask=mask).logits[1, 34:]
    close(together, model(ids[1:, 34:]).logits[0])


@each_growing_rope
def test_frequencies_that_depend_on_the_length_survive_a_load_and_a_move(rope_type, tmp_path):
    model = growing_rope_model(rope_type)
    model.save_pretrained(tmp_path)
    loaded = RxTForCausalLM.from_pretrained(tmp_path)
    ids = random_ids(1, 40)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert {buffer.device.type for buffer in loaded.to("meta").buffers()} == {"meta"}
