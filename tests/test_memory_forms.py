# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""Joint reading, encoding by the decoder and writing by choice: what holds beside the numbers of the reference."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TextStreamer

from rxt_hf import RxTConfig, RxTForCausalLM, STMCache
from rxt_hf.evaluation.memory import look_inside
from rxt_hf.memory_rxt import RxTMemorySelection, filled_slots

from .models import IN_PASSING, JOINT, SIZES, close, counted_calls, random_ids, tiny_model

SLOTS = 12
FORMS = [
    {"memory_reading": reading, "memory_positions": places, "memory_encoding": encoding, "memory_writing": writing}
    for reading, places in (("cross_attention", "none"), ("joint", "none"), ("joint", "rank"))
    for encoding in ("encoder", "decoder", "decoder_in_passing")
    for writing in ("attention", "selection")
]
CHOOSING = [form for form in FORMS if form["memory_writing"] == "selection"]


def names(forms):
    return ["-".join(form.values()) for form in forms]


each_form = pytest.mark.parametrize("form", FORMS, ids=names(FORMS))
each_choosing_form = pytest.mark.parametrize("form", CHOOSING, ids=names(CHOOSING))
each_joint_form = pytest.mark.parametrize("form", [JOINT, IN_PASSING], ids=names([JOINT, IN_PASSING]))
LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])


pytestmark = pytest.mark.usefixtures("one_thread")


def model_of(form, bptt_turns=None, **options):
    sizes = {"num_hidden_layers": 3, "num_key_value_heads": 2, "num_memory_slots": SLOTS, "memory_init": "zeros"}
    model = tiny_model(**(sizes | form | options))
    model.set_bptt_turns(bptt_turns)
    return model


def memory_of(model, filled, batch_size=2, seed=99):
    """Random slots, of which those at `filled` are not empty."""
    config = model.config
    shape = (batch_size, config.num_memory_layers, config.num_memory_slots, config.hidden_size)
    states = torch.zeros(shape)
    states[:, :, filled] = torch.randn(
        *shape[:2], len(filled), shape[3], generator=torch.Generator().manual_seed(seed)
    )
    return STMCache(states, turns=2)


def written(model, turns=2, batch_size=2):
    """A memory that the model wrote."""
    memory = model.init_stm(batch_size)
    with torch.no_grad():
        for turn in range(turns):
            memory = model.update_memory(memory, random_ids(batch_size, 5 + turn, seed=50 + turn))
    return memory


# ---- empty slots


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("is_padded", [False, True])
@torch.no_grad()
def test_without_a_filled_slot_the_logits_are_those_of_a_plain_decoder_bit_for_bit(
    dtype, attention, tokens, is_padded
):
    model = model_of(JOINT, memory_layers=[1, 2]).to(dtype)
    fields = {name: size for name, size in SIZES.items() if name != "num_memory_slots"}
    fields |= {"num_hidden_layers": 3, "num_key_value_heads": 2, "tie_word_embeddings": True}
    plain = LlamaForCausalLM(LlamaConfig(**fields)).eval().to(dtype)
    weights = {name: tensor for name, tensor in model.state_dict().items() if "memory" not in name}
    plain.load_state_dict(weights)
    for either in (model, plain):
        either.set_attn_implementation(attention)
    ids = random_ids(2, tokens + 3)
    mask = torch.ones_like(ids)
    mask[0, : 2 * is_padded] = 0
    arguments = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    arguments |= {"attention_mask": mask} if is_padded else {}
    found, expected = model(ids, stm_cache=model.init_stm(2), **arguments), plain(ids, **arguments)
    assert torch.equal(found.logits[mask.bool()], expected.logits[mask.bool()])
    caches, parts = [None, None], [[], []]
    for piece in (slice(0, tokens), slice(tokens, tokens + 2), slice(tokens + 2, tokens + 3)):
        step = {name: value[:, : piece.stop] for name, value in arguments.items()}
        step["position_ids"] = arguments["position_ids"][:, piece]
        for index, either in enumerate((model, plain)):
            memory = {} if index else {"stm_cache": model.init_stm(2)}
            output = either(ids[:, piece], cache=caches[index], use_cache=True, **step, **memory)
            caches[index] = output.cache
            parts[index].append(output.logits)
    found, expected = (torch.cat(part, dim=1)[mask.bool()] for part in parts)
    assert torch.equal(found, expected)


WINDOWS = {"full": {}, "windows": {"sliding_window": 3}}


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
@pytest.mark.parametrize("form", [*CHOOSING, FORMS[8]], ids=names([*CHOOSING, FORMS[8]]))
@torch.no_grad()
def test_empty_slots_change_no_number_wherever_they_stand(form, window):
    small, large = model_of(form, num_memory_slots=5, **window), model_of(form, **window)
    reading = {name: tensor for name, tensor in small.state_dict().items() if "memory_attention" not in name}
    large.load_state_dict(reading, strict=False)
    memory, places = memory_of(small, [0, 1, 2, 3, 4]), [1, 2, 5, 6, 10]
    holes = memory_of(large, [])
    holes.states[:, :, places] = memory.states
    for mask in (torch.ones_like(LEFT), LEFT):
        ids = random_ids(2, 7)
        arguments = {"attention_mask": mask, "max_new_tokens": 5, "eos_token_id": None, "update_memory": False}
        expected = small(ids, attention_mask=mask, stm_cache=memory).logits
        found = large(ids, attention_mask=mask, stm_cache=holes).logits
        close(found[mask.bool()], expected[mask.bool()], 5e-6)
        tokens = [
            model.generate(ids, stm_cache=states, output_logits=True, **arguments, **cache)
            for model, states in ((small, memory), (large, holes))
            for cache in ({}, {"cache_implementation": "static", "disable_compile": True})
        ]
        for other in tokens[1:]:
            assert torch.equal(other.sequences, tokens[0].sequences)
            close(torch.stack(other.logits), torch.stack(tokens[0].logits), 1e-5)


@pytest.mark.parametrize("form", [JOINT, CHOOSING[1]], ids=names([JOINT, CHOOSING[1]]))
@torch.no_grad()
def test_a_row_without_a_slot_computes_beside_others_what_it_does_alone(form):
    model = model_of(form, attention_bias=True, attention_output_bias=True)
    memory, ids = memory_of(model, [0, 1, 2]), random_ids(2, 7)
    memory.states[0] = 0
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        together = model(ids, attention_mask=LEFT, stm_cache=memory).logits[0, 3:]
        close(together, model(ids[:1, 3:], stm_cache=model.init_stm(1)).logits[0], 2e-6)


@pytest.mark.parametrize("attention_bias", [False, True])
@torch.no_grad()
def test_a_token_whose_embedding_is_zero_is_read_in_every_step_as_in_the_first(attention_bias):
    """The embedding of padding is zeros, and a template may end turns with it."""
    model = model_of(JOINT, attention_bias=attention_bias)
    model.get_input_embeddings().weight[0] = 0
    memory = memory_of(model, [0, 1, 2, 3])
    memory.states[:, 0, 1] = 0
    ids = random_ids(2, 6)
    whole, cache = model(ids, stm_cache=memory).logits, None
    for end in range(1, 7):
        output = model(ids[:, end - 1 : end], stm_cache=memory, cache=cache, use_cache=True)
        cache = output.cache
        close(output.logits[:, 0], whole[:, end - 1])
    other = STMCache(memory.states.clone())
    other.states[:, :, 1] = 0
    assert (model(ids, stm_cache=other).logits - whole).abs().max() > 1e-3


@each_joint_form
@torch.no_grad()
def test_a_perturbed_row_changes_the_others_by_exactly_nothing(form):
    model = model_of(form)
    memory, ids = memory_of(model, [0, 1, 2, 3]), random_ids(2, 7)
    other, other_ids = STMCache(memory.states.clone()), ids.clone()
    other.states[1, :, 4:9] = 1.0
    other_ids[1] = ids[1].flip(0)
    assert torch.equal(model(ids, stm_cache=memory).logits[0], model(other_ids, stm_cache=other).logits[0])
    one, two = (model.update_memory(*pair).states for pair in ((memory, ids), (other, other_ids)))
    assert torch.equal(one[0], two[0])
    assert not torch.equal(one[1], two[1])


# ---- the choice


def selection_of(slots=4, width=16, age=0.0, repeat=0.0):
    selection = RxTMemorySelection(RxTConfig(hidden_size=width, num_attention_heads=4, num_memory_slots=slots))
    with torch.no_grad():
        selection.weight.zero_()[0] = 1.0
        selection.age_penalty.fill_(age)
        selection.repeat_penalty.fill_(repeat)
    return selection


def tokens_of(*saliences, width=16, seed=0):
    """
    States of (1, tokens, width), of the same length each, whose first element is the salience; the others differ.
    """
    states = torch.randn(1, len(saliences), width, generator=torch.Generator().manual_seed(seed))
    for state, salience in zip(states[0], saliences, strict=True):
        state[1:] *= ((width - salience**2) ** 0.5) / state[1:].norm()
        state[0] = salience
    return states


def choose(selection, states, tokens, mask=None):
    mask = torch.ones(tokens.shape[:2], dtype=torch.bool) if mask is None else mask
    return selection(states, [tokens, tokens + 100], mask)


def saliences(states):
    """First elements of the filled slots, in their order."""
    return [round(value, 4) for value in states[0, 0, filled_slots(states)[0], 0].tolist()]


@torch.no_grad()
def test_the_most_salient_stay_bit_identical_in_the_order_of_time_and_the_same_in_all_layers():
    selection, empty = selection_of(), torch.zeros(1, 2, 4, 16)
    first = choose(selection, empty, tokens_of(0.3, 0.1, 0.5))
    assert saliences(first) == [0.3, 0.1, 0.5]
    assert first[:, :, 3].abs().max() == 0
    second = choose(selection, first, tokens_of(0.2, 0.9, 0.05, seed=1))
    assert saliences(second) == [0.3, 0.5, 0.2, 0.9]
    assert torch.equal(second[:, :, 0], first[:, :, 0])
    assert torch.equal(second[:, :, 1], first[:, :, 2])
    close(second[:, 1] - second[:, 0], torch.full((1, 4, 16), 100.0), 1e-4)
    third = choose(selection, second, tokens_of(-0.5, -0.7, seed=2))
    assert torch.equal(third, second)


@torch.no_grad()
def test_what_may_not_be_kept_is_not_and_leaves_the_memory_bit_identical():
    selection = selection_of()
    first = choose(selection, torch.zeros(1, 2, 4, 16), tokens_of(0.3, 0.1))
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    assert torch.equal(choose(selection, first, tokens_of(0.9, 0.8, 0.7, seed=1), nothing), first)
    some = torch.tensor([[False, True, False]])
    assert saliences(choose(selection, first, tokens_of(0.9, 0.8, 0.7, seed=1), some)) == [0.3, 0.1, 0.8]


@torch.no_grad()
def test_salience_falls_with_every_later_candidate_and_with_a_later_copy():
    tokens = tokens_of(0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
    empty = torch.zeros(1, 2, 4, 16)
    assert saliences(choose(selection_of(age=0.0), empty, tokens)) == [0.5, 0.4, 0.3, 0.2]
    assert saliences(choose(selection_of(age=0.06), empty, tokens)) == [0.5, 0.4, 0.3, 0.2]
    assert saliences(choose(selection_of(age=0.2), empty, tokens)) == [0.3, 0.2, 0.1, 0.05]
    again = torch.cat([tokens, tokens[:, :1]], dim=1)
    assert saliences(choose(selection_of(repeat=0.0), empty, again)) == [0.5, 0.4, 0.3, 0.5]
    # the older copy goes, in one write and when it is a slot already
    assert saliences(choose(selection_of(repeat=3.0), empty, again)) == [0.4, 0.3, 0.2, 0.5]
    memory = choose(selection_of(), empty, tokens)
    assert saliences(choose(selection_of(repeat=3.0), memory, tokens[:, 1:2])) == [0.5, 0.3, 0.2, 0.4]
    # what is masked, and a free slot, is no later copy and ages nothing
    mask = torch.tensor([[True] * 6 + [False]])
    assert saliences(choose(selection_of(repeat=3.0), empty, again, mask)) == [0.5, 0.4, 0.3, 0.2]
    mask = torch.tensor([[True, False, False, False, False, True]])
    assert saliences(choose(selection_of(slots=1, age=0.1), empty[:, :, :1], tokens, mask)) == [0.5]
    memory = choose(selection_of(), empty, tokens[:, :1])
    assert saliences(choose(selection_of(slots=4, age=0.15), memory, tokens[:, 2:])) == [0.5, 0.2, 0.1, 0.05]


@each_choosing_form
@torch.no_grad()
def test_slots_are_the_states_of_tokens_and_never_of_the_last(form):
    model = model_of(form, num_memory_slots=40)
    memory, ids = model.init_stm(2), random_ids(2, 7)
    mask = LEFT
    memory = model.update_memory(memory, ids, mask)
    assert filled_slots(memory.states).sum(-1).tolist() == [3, 6]
    states, _ = model.model.encoded_states(model.model.embed_tokens(ids), mask, model.init_stm(2).states)
    for layer, tokens in enumerate(states):
        assert torch.equal(memory.states[0, layer, :3], tokens[0, 3:6])
        assert torch.equal(memory.states[1, layer, :6], tokens[1, :6])
    later = model.update_memory(memory, random_ids(2, 9, seed=1))
    assert torch.equal(later.states[0, :, :3], memory.states[0, :, :3])
    assert filled_slots(later.states).sum(-1).tolist() == [11, 14]
    # a turn of one token has nothing to keep
    assert torch.equal(model.update_memory(later, ids[:, :1]).states, later.states)


# ---- episodes


@each_form
@torch.no_grad()
def test_an_episode_is_the_loop_of_its_turns(form):
    model = model_of(form)
    ids, mask = random_ids(3, 4, 7), torch.ones(3, 4, 7, dtype=torch.long)
    mask[0, 1, :3], mask[1, 2, 5:], mask[2, 0], mask[0, 3, 1:], write = 0, 0, 0, 0, torch.ones(3, 4)
    write[1, 1] = write[2, 3] = 0
    memory, logits = model.init_stm(3), []
    for turn in range(4):
        logits.append(model(ids[:, turn], attention_mask=mask[:, turn], stm_cache=memory).logits)
        memory = model.update_memory(memory, ids[:, turn], mask[:, turn] * write[:, turn, None].long())
    episode = model(ids, attention_mask=mask, write_mask=write)
    real = mask.bool()
    close(episode.logits[real], torch.stack(logits, 1)[real])
    close(episode.stm_cache.states, memory.states)
    assert episode.stm_cache.turns.tolist() == memory.turns.tolist()


@each_choosing_form
@torch.no_grad()
def test_a_replay_is_the_loop_of_its_writes(form):
    model = model_of(form)
    turns, memory = [random_ids(4 + 3 * (turn % 3), seed=turn).tolist() for turn in range(6)], model.init_stm(1)
    for turn in turns:
        memory = model.update_memory(memory, torch.tensor([turn]))
    close(model.replay(None, turns).states, memory.states)


# ---- generate

MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 2.0},
    "beams": {"num_beams": 3},
    "several answers": {"do_sample": True, "num_return_sequences": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assistant": {"assistant_model": None},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "no cache": {"use_cache": False},
    "one token": {"max_new_tokens": 1},
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
@each_joint_form
def test_generate_writes_what_an_update_from_its_ids_writes(form, mode):
    model = model_of(form)
    is_single = {"prompt_lookup_num_tokens", "assistant_model"} & set(mode)
    rows = 1 if is_single else 2
    memory = written(model, batch_size=rows)
    mode = {"max_new_tokens": 6} | mode
    if "assistant_model" in mode:
        mode["assistant_model"] = model_of(form, seed=1, num_memory_slots=3)
    for mask in (torch.ones_like(LEFT), LEFT)[:rows]:
        torch.manual_seed(0)
        ids = random_ids(2, 7)[:rows] * mask[:rows]
        output = model.generate(ids, attention_mask=mask[:rows], stm_cache=memory, eos_token_id=None, **mode)
        copies = mode.get("num_return_sequences", 1)
        assert len(output.sequences) == rows * copies
        assert output.hidden_states is None
        whole = torch.cat([mask[:rows], torch.ones(rows, output.sequences.shape[1] - 7, dtype=torch.long)], dim=1)
        with torch.no_grad():
            expected = model.update_memory(
                memory.repeat(copies), output.sequences, whole.repeat_interleave(copies, dim=0)
            )
        close(output.stm_cache.states, expected.states)
        assert output.stm_cache.turns.tolist() == [3] * rows * copies
        if not mode.get("do_sample") and not is_single:
            plain = {**mode, "use_cache": False, "cache_implementation": None}
            again = model.generate(ids, attention_mask=mask, stm_cache=memory, eos_token_id=None, **plain)
            assert torch.equal(again.sequences, output.sequences)


@each_joint_form
def test_a_row_that_ends_early_is_written_up_to_its_end(form):
    model = model_of(form)
    ids, memory = random_ids(2, 7), written(model)
    arguments = {"attention_mask": LEFT, "stm_cache": memory, "max_new_tokens": 6}
    free = model.generate(ids, eos_token_id=None, **arguments).sequences
    output = model.generate(ids, eos_token_id=int(free[0, 8]), **arguments)
    # padding, two tokens of the answer, the second of which ends it
    mask = torch.cat([LEFT, torch.ones(2, output.sequences.shape[1] - 7, dtype=torch.long)], dim=1)
    mask[0, 9:] = 0
    assert mask[0].sum() < mask[1].sum()
    alone = model.update_memory(memory.select(0), free[:1, 3:9])
    close(output.stm_cache.states[:1], alone.states.detach())


@each_joint_form
def test_embeddings_streamers_and_asynchronous_writes_give_the_same_memory(form, capsys):
    class Ids:
        def decode(self, ids, **kwargs):
            return " ".join(map(str, ids))

    model = model_of(form)
    ids, memory = random_ids(1, 7), written(model, batch_size=1)
    arguments = {"stm_cache": memory, "max_new_tokens": 5, "eos_token_id": None}
    expected = model.generate(ids, **arguments)
    embeds = model.get_input_embeddings()(ids).detach()
    by_embeds = model.generate(inputs_embeds=embeds, **arguments)
    assert torch.equal(by_embeds.sequences, expected.sequences[:, 7:])
    later = model.generate(ids, update_memory="async", **arguments)
    streamed = model.generate(ids, streamer=TextStreamer(Ids()), **arguments)
    assert str(int(expected.sequences[0, -1])) in capsys.readouterr().out
    for other in (by_embeds, later, streamed):
        close(other.stm_cache.states, expected.stm_cache.states)
    assert torch.equal(model.generate(ids, update_memory=False, **arguments).stm_cache.states, memory.states)


@each_joint_form
def test_hidden_states_come_back_to_those_who_ask(form):
    model = model_of(form)
    arguments = {"stm_cache": written(model), "max_new_tokens": 3, "eos_token_id": None}
    output = model.generate(random_ids(2, 7), output_hidden_states=True, **arguments)
    assert [steps[0].shape[1] for steps in output.hidden_states] == [7, 1, 1]
    assert len(output.hidden_states[0]) == 4
    assert model.generate(random_ids(2, 7), **arguments).hidden_states is None


def test_a_write_in_passing_computes_nothing_again():
    model = model_of(IN_PASSING)
    memory = written(model)
    with counted_calls(*model.model.layers) as counts:
        model.generate(random_ids(2, 7), stm_cache=memory, max_new_tokens=4, eos_token_id=None)
    # a prefill and three steps
    assert counts == [4] * 3


@pytest.mark.slow
@each_joint_form
def test_static_cache_compiled_as_one_graph_gives_the_same_tokens(form):
    torch._dynamo.reset()
    model = model_of(form)
    ids, memory = random_ids(2, 7), written(model)
    arguments = {"attention_mask": LEFT, "stm_cache": memory, "max_new_tokens": 5, "eos_token_id": None}
    expected = model.generate(ids, **arguments)
    compiled = copy.deepcopy(model)
    compiled.forward = torch.compile(compiled.forward, fullgraph=True)
    found = compiled.generate(ids, cache_implementation="static", **arguments)
    assert torch.equal(found.sequences, expected.sequences)
    close(found.stm_cache.states, expected.stm_cache.states)


# ---- training


def gradients_of(model, ids, **options):
    model.zero_grad()
    output = model(ids, **{"labels": ids} | options)
    output.loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return output.loss.detach(), {name: None if grad is None else grad.clone() for name, grad in found.items()}


@pytest.mark.parametrize("form", CHOOSING[:2] + CHOOSING[3:], ids=names(CHOOSING[:2] + CHOOSING[3:]))
def test_the_salience_learns_from_what_is_read_and_changes_no_number_by_it(form):
    model, ids = model_of(form), random_ids(2, 4, 7)
    with torch.no_grad():
        expected = model(ids, labels=ids)
    model.train()
    with torch.no_grad():
        found = model(ids)
    close(found.logits, expected.logits, 2e-6)
    loss, gradients = gradients_of(model, ids)
    close(loss, expected.loss, 2e-6)
    # what an encoder of its own makes of a token is never the same twice
    learned = ("weight", "age_penalty", "repeat_penalty")[: 2 if form["memory_encoding"] == "encoder" else 3]
    for name in learned:
        assert gradients[f"model.memory_selection.{name}"].abs().max() > 0
    assert not [name for name, gradient in gradients.items() if gradient is None]


def test_the_gradient_of_the_salience_is_that_of_a_bias_of_the_attention():
    """Computed anew: what one more score on a slot would have changed, for the slots of one turn."""
    model = model_of(FORMS[13], num_hidden_layers=1).double().train()
    memory, ids = memory_of(model, [0, 1, 2]).states.double(), random_ids(2, 5)
    labels = random_ids(2, 5, seed=1)

    def loss():
        logits = model(ids, stm_cache=memory).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    loss().backward()
    found = model.model.memory_selection.weight.grad
    bias, step, expected = torch.zeros(2, 3, dtype=torch.float64), 1e-4, torch.zeros_like(found)
    normed = memory[:, 0, :3] / memory[:, 0, :3].pow(2).mean(-1, keepdim=True).sqrt()
    model.eval()
    attend = model.model._masks_behind_slots

    def biased(*arguments):
        return {kind: as_float(mask) for kind, mask in attend(*arguments).items()}

    def as_float(mask):
        mask = torch.zeros_like(mask, dtype=torch.float64).masked_fill(~mask, -1e300)
        return mask + torch.nn.functional.pad(bias, (0, mask.shape[-1] - 3))[:, None, None]

    model.model._masks_behind_slots = biased
    with torch.no_grad():
        for row in range(2):
            for slot in range(3):
                losses = []
                for sign in (1, -1):
                    bias[row, slot] = sign * step
                    losses.append(loss())
                    bias[row, slot] = 0
                expected += (losses[0] - losses[1]) / (2 * step) * normed[row, slot]
    close(found, expected, 1e-6)
    assert expected.abs().max() > 0.01


@each_form
def test_without_turns_to_go_back_no_gradient_passes_through_the_memory(form):
    ids = random_ids(2, 4, 7)
    through, cut = model_of(form).train(), model_of(form, bptt_turns=0).train()
    loss, with_writes = gradients_of(through, ids)
    same, without = gradients_of(cut, ids)
    close(same, loss, 1e-6)
    embeds = cut.get_input_embeddings()(ids).detach().requires_grad_()
    labels = torch.full_like(ids, -100)
    labels[:, 3] = ids[:, 3]
    for model, has_gradient in ((cut, False), (through, True)):
        embeds.grad = None
        model(inputs_embeds=embeds, labels=labels).loss.backward()
        # what was said before is a constant, or is learned
        assert bool(embeds.grad[:, :3].abs().max() > 0) == has_gradient
        assert embeds.grad[:, 3].abs().max() > 0
    for model, has_gradient in ((through, True), (cut, False)):
        learned = model_of(form, memory_init="learned", bptt_turns=model.model.bptt_turns).train()
        _, gradients = gradients_of(learned, ids, labels=labels)
        gradient = gradients["model.initial_memory"]
        is_learned = gradient is not None and bool(gradient.abs().max() > 0)
        # of the first slots, none may be left
        assert is_learned == has_gradient or (has_gradient and form["memory_writing"] == "selection")
    name = "model.layers.0.mlp.down_proj.weight"
    assert form["memory_encoding"] == "encoder" or not torch.allclose(with_writes[name], without[name], atol=1e-7)


@pytest.mark.parametrize("bptt_turns", [None, 0])
@pytest.mark.parametrize("use_reentrant", [True, False])
@each_joint_form
def test_recomputed_episodes_have_the_same_loss_and_gradients(form, use_reentrant, bptt_turns):
    model, ids = model_of(form, bptt_turns=bptt_turns).train(), random_ids(2, 3, 7)
    loss, expected = gradients_of(model, ids)
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    again, found = gradients_of(model, ids)
    close(again, loss, 1e-6)
    for name, gradient in expected.items():
        close(found[name], gradient, 1e-5)
    # one turn is recomputed by layers
    memory = written(model.eval())
    model.train()
    _, found = gradients_of(model, ids[:, 0], stm_cache=memory)
    model.activation_checkpointing_disable()
    _, expected = gradients_of(model, ids[:, 0], stm_cache=memory)
    assert expected["model.memory_selection.weight"].abs().max() > 0
    for name, gradient in expected.items():
        assert (gradient is None) == (found[name] is None)
        if gradient is not None:
            close(found[name], gradient, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_memory_of_another_precision_trains(dtype):
    model = model_of(JOINT).to(dtype).train()
    for memory in (written(model_of(JOINT)), written(model_of(JOINT).bfloat16())):
        for implementation in ("eager", "sdpa"):
            model.set_attn_implementation(implementation)
            _, gradients = gradients_of(model, random_ids(2, 3, 7), stm_cache=memory)
            assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_padding_before_a_turn_gives_no_gradient_that_is_not_finite():
    model, ids = model_of(JOINT).train(), random_ids(2, 3, 7)
    mask = torch.stack([LEFT, LEFT.flip(0), LEFT], dim=1)
    _, gradients = gradients_of(model, ids, attention_mask=mask)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


# ---- files and configurations


def test_a_configuration_of_before_has_the_papers_forms():
    config = RxTConfig.from_dict({"model_type": "rxt", "hidden_size": 32, "num_attention_heads": 4})
    forms = [config.memory_reading, config.memory_positions, config.memory_encoding, config.memory_writing]
    assert forms == list(FORMS[0].values())


@each_form
def test_a_saved_model_reads_and_writes_the_same(form, tmp_path):
    model = model_of(form)
    model.save_pretrained(tmp_path)
    loaded, info = RxTForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    memory, ids = written(model), random_ids(2, 7)
    assert torch.equal(written(loaded).states, memory.states)
    assert torch.equal(loaded(ids, stm_cache=memory).logits, model(ids, stm_cache=memory).logits)
    assert loaded.memory_fingerprint() == model.memory_fingerprint()


# ---- evaluation


@each_form
def test_the_look_inside_a_memory_says_which_slots_each_turn_reads(form):
    model, ids = model_of(form, memory_layers=[1, 2]), random_ids(3, 7).tolist()
    for turns in (1, 3):
        inside = look_inside(model, {"input_ids": ids[:turns], "labels": ids[:turns]}, [{}] * turns)
        read, change = torch.tensor(inside["read"]), torch.tensor(inside["change"])
        assert read.shape == change.shape == (turns, 2, SLOTS)
        assert change.isfinite().all() and (change[0] <= 1).all()
        if form["memory_writing"] == "selection" or form["memory_reading"] == "joint":
            assert read[0].max() == 0
        if turns == 3:
            assert (read[1:].sum(-1) > 0).all()
            if form["memory_writing"] == "selection":
                # the second turn reads what the first has filled
                assert (read[1] > 0).sum(-1).tolist() == [6, 6]
    assert bool(inside["gates"]) == (form["memory_writing"] == "attention")
