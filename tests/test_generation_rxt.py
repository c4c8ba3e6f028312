# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""`generate` with a memory: what it returns, costs, refuses, and shares between rows and conversations."""

import copy
import logging
import sys
import threading
import warnings

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, CompileConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation import (
    GenerateBeamDecoderOnlyOutput,
    GenerateDecoderOnlyOutput,
    StoppingCriteria,
    StoppingCriteriaList,
)

import rxt_hf
from rxt_hf import RxTForCausalLM, STMCache
from rxt_hf.generation_rxt import RxTGenerateBeamOutput, RxTGenerateOutput

from .models import EXPERTS, close, counted_calls, random_ids, random_memory, tiny_model

IDS = random_ids(2, 6)
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
BEAMS = {"num_beams": 3}
each_search = pytest.mark.parametrize("search", [{}, BEAMS], ids=["greedy", "beams"])


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def memory(model):
    return random_memory(model)


def answer(model, ids, memory, tokens=5, **options):
    """A turn whose answer has exactly `tokens` tokens, unless the options name an end."""
    options = {"max_new_tokens": tokens, "min_new_tokens": 0 if "eos_token_id" in options else tokens} | options
    return model.generate(ids, stm_cache=memory, **options)


def assert_same_turn(found, expected, tolerance=1e-5):
    assert torch.equal(found.sequences, expected.sequences)
    close(found.stm_cache.states, expected.stm_cache.states, tolerance)
    assert torch.equal(found.stm_cache.turns, expected.stm_cache.turns)


# ---- what comes back


@each_search
def test_turn_gives_a_new_memory_and_leaves_the_old_one_bit_identical(model, memory, search):
    before = memory.states.clone()
    turn = answer(model, IDS, memory, **search)
    assert type(turn) is (RxTGenerateBeamOutput if search else RxTGenerateOutput)
    assert isinstance(turn, GenerateBeamDecoderOnlyOutput if search else GenerateDecoderOnlyOutput)
    assert torch.equal(memory.states, before)
    assert memory.turns.tolist() == [3, 3]
    assert turn.stm_cache.turns.tolist() == [4, 4]
    assert (turn.stm_cache.states - before).abs().amax(dim=(2, 3)).min() > 1e-3


def test_output_is_a_plain_tensor_and_nothing_is_written_unless_the_memory_is_asked_for(model):
    # computed once, by a write of its own
    model.memory_fingerprint()
    with counted_calls(model.model.memory_encoder) as writes:
        plain = model.generate(IDS, max_new_tokens=4)
        assert isinstance(plain, torch.Tensor)
        assert writes == [0]
        turn = model.generate(IDS, max_new_tokens=4, return_dict_in_generate=True)
        assert writes == [1]
    assert torch.equal(turn.sequences, plain)
    assert_same_turn(turn, model.generate(IDS, stm_cache=model.init_stm(2), max_new_tokens=4), tolerance=0)


@each_search
def test_turn_without_update_hands_back_the_same_memory_and_can_be_repeated(model, memory, search):
    first, second = (answer(model, IDS, memory, update_memory=False, **search) for _ in range(2))
    assert torch.equal(first.sequences, second.sequences)
    for turn in (first, second):
        assert torch.equal(turn.stm_cache.states, memory.states)
        assert turn.stm_cache.turns.tolist() == [3, 3]
    assert torch.equal(answer(model, IDS, memory, **search).sequences, first.sequences)


def test_initial_memory_handed_back_is_no_view_of_the_parameter(model):
    turn = model.generate(IDS, max_new_tokens=2, update_memory=False, return_dict_in_generate=True)
    before = model.model.initial_memory.detach().clone()
    assert torch.equal(turn.stm_cache.states[0], before)
    turn.stm_cache.states.fill_(9.0)
    assert torch.equal(model.model.initial_memory, before)


def test_memory_may_be_a_plain_tensor(model, memory):
    turn = answer(model, IDS, memory.states)
    assert isinstance(turn.stm_cache, STMCache)
    expected = answer(model, IDS, memory)
    assert torch.equal(turn.sequences, expected.sequences)
    assert torch.equal(turn.stm_cache.states, expected.stm_cache.states)


@each_search
def test_update_from_explicit_ids_is_the_update_that_generate_did(model, memory, search):
    turn = answer(model, IDS, memory, attention_mask=LEFT, **search)
    mask = torch.cat([LEFT, torch.ones(2, turn.sequences.shape[1] - 6)], dim=1)
    close(turn.stm_cache.states, model.update_memory(memory, turn.sequences, mask).states, tolerance=0)


def test_next_turn_reads_what_the_last_one_wrote(model, memory):
    first = answer(model, IDS, memory)
    prompt = random_ids(2, 4, seed=1)
    second = answer(model, prompt, first.stm_cache, output_logits=True)
    read = model(prompt, stm_cache=first.stm_cache).logits[:, -1]
    close(second.logits[0], read)
    assert (read - model(prompt, stm_cache=memory).logits[:, -1]).abs().max() > 1e-3


def test_random_memory_of_one_call_is_read_and_written_alike():
    model = tiny_model(memory_init="random")
    torch.manual_seed(5)
    turn = model.generate(IDS, max_new_tokens=3, return_dict_in_generate=True, output_logits=True)
    torch.manual_seed(5)
    drawn = model.init_stm(2)
    close(turn.logits[0], model(IDS, stm_cache=drawn).logits[:, -1])
    close(turn.stm_cache.states, model.update_memory(drawn, turn.sequences).states, tolerance=0)


def test_prompt_may_be_left_out(model):
    turn = model.generate(max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True)
    assert turn.sequences.shape == (1, 4)
    assert turn.sequences[0, 0] == model.config.bos_token_id
    close(turn.stm_cache.states, model.update_memory(None, turn.sequences).states, tolerance=0)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True}], ids=["beams", "sampling"])
def test_each_returned_sequence_comes_with_a_memory_of_its_own(model, memory, options):
    torch.manual_seed(0)
    turn = answer(model, IDS, memory, attention_mask=LEFT, num_return_sequences=2, **options)
    assert turn.sequences.shape[0] == turn.stm_cache.batch_size == 4
    assert len(set(map(tuple, turn.sequences.tolist()))) == 4
    mask = torch.cat([LEFT.repeat_interleave(2, 0), torch.ones(4, turn.sequences.shape[1] - 6)], dim=1)
    close(turn.stm_cache.states, model.update_memory(memory.repeat(2), turn.sequences, mask).states)
    unwritten = answer(model, IDS, memory, num_return_sequences=2, update_memory=False, **options)
    assert torch.equal(unwritten.stm_cache.states, memory.states[[0, 0, 1, 1]])


@pytest.mark.parametrize("copies", [1, 2])
@each_search
def test_embeddings_alone_give_the_turn_of_their_ids(model, memory, search, copies):
    options = {"attention_mask": LEFT, "num_return_sequences": copies, **(search or BEAMS if copies > 1 else search)}
    embeds = model.get_input_embeddings()(IDS).detach()
    found = model.generate(inputs_embeds=embeds, stm_cache=memory, max_new_tokens=5, min_new_tokens=5, **options)
    expected = answer(model, IDS, memory, **options)
    assert torch.equal(found.sequences, expected.sequences[:, 6:])
    close(found.stm_cache.states, expected.stm_cache.states)
    both = model.generate(IDS, inputs_embeds=embeds, stm_cache=memory, max_new_tokens=5, min_new_tokens=5, **options)
    assert_same_turn(both, expected)


def test_update_memory_of_a_generation_config_survives_its_file(model, memory, tmp_path):
    GenerationConfig(update_memory=False, max_new_tokens=3).save_pretrained(tmp_path)
    config = GenerationConfig.from_pretrained(tmp_path)
    assert config.update_memory is False
    assert torch.equal(model.generate(IDS, config, stm_cache=memory).stm_cache.states, memory.states)
    overridden = model.generate(IDS, config, stm_cache=memory, update_memory=True)
    assert not torch.equal(overridden.stm_cache.states, memory.states)


def test_explicit_generation_config_goes_with_a_memory_without_a_warning(model, memory, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    # transformers warns once in a process
    logging.Logger.warning_once.cache_clear()
    config = GenerationConfig(max_new_tokens=3, pad_token_id=0, eos_token_id=2)
    before = config.to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        turn = model.generate(IDS, generation_config=config, stm_cache=memory)
    assert isinstance(turn, RxTGenerateOutput)
    assert caplog.records == []
    assert config.to_dict() == before
    assert isinstance(model.generate(IDS, generation_config=config), torch.Tensor)
    config.return_dict_in_generate = True
    assert isinstance(model.generate(IDS, generation_config=config), RxTGenerateOutput)


# ---- rows


@each_search
def test_rows_of_a_batch_over_three_turns_equal_single_rows(model, memory, search):
    batch, alone = memory, [memory.select(0), memory.select(1)]
    for number in range(3):
        ids = random_ids(2, 4 + number, seed=number)
        turn = answer(model, ids, batch, **search)
        batch = turn.stm_cache
        for row in range(2):
            single = answer(model, ids[row : row + 1], alone[row], **search)
            assert torch.equal(single.sequences[0], turn.sequences[row])
            alone[row] = single.stm_cache
    close(batch.states, STMCache.cat(alone).states)


@each_search
def test_left_padding_changes_neither_tokens_nor_memory(model, memory, search):
    turn = answer(model, IDS, memory, attention_mask=LEFT, **search)
    short = answer(model, IDS[:1, 2:], memory.select(0), **search)
    long = answer(model, IDS[1:], memory.select(1), **search)
    assert torch.equal(turn.sequences[0, 2:], short.sequences[0])
    assert torch.equal(turn.sequences[1], long.sequences[0])
    close(turn.stm_cache.states, STMCache.cat([short.stm_cache, long.stm_cache]).states)


def test_padding_is_found_without_a_mask(model, memory):
    padded = IDS * LEFT
    assert_same_turn(answer(model, padded, memory), answer(model, padded, memory, attention_mask=LEFT), tolerance=0)


def test_padding_changes_nothing_in_a_mixture_of_experts():
    model = tiny_model(**EXPERTS)
    memory = random_memory(model)
    turn = answer(model, IDS, memory, attention_mask=LEFT)
    short = answer(model, IDS[:1, 2:], memory.select(0))
    assert torch.equal(turn.sequences[0, 2:], short.sequences[0])
    close(turn.stm_cache.states[:1], short.stm_cache.states)


@pytest.mark.parametrize("padded_with_end", [False, True])
@each_search
def test_row_that_ends_early_writes_nothing_behind_its_end(model, memory, search, padded_with_end):
    if search:
        search = search | {"length_penalty": -10.0, "early_stopping": True}
    for end in range(3, 50):
        options = {"eos_token_id": end, "pad_token_id": end if padded_with_end else 0, "attention_mask": LEFT * 0 + 1}
        turn = answer(model, IDS, memory, **options, **search)
        width = turn.sequences.shape[1]
        lengths = [min(width, [*row.tolist(), end].index(end, 6) + 1) for row in turn.sequences]
        if min(lengths) < width:
            break
    assert min(lengths) < max(lengths) == width
    for row, length in enumerate(lengths):
        # beam search takes a padding token of 0 for none, and fills up with the end
        assert set(turn.sequences[row, length:].tolist()) <= {options["pad_token_id"], end}
        written = model.update_memory(memory.select(row), turn.sequences[row : row + 1, :length])
        close(turn.stm_cache.states[row], written.states[0])
    embeds = model.get_input_embeddings()(IDS).detach()
    by_embeds = model.generate(inputs_embeds=embeds, stm_cache=memory, max_new_tokens=5, **options, **search)
    close(by_embeds.stm_cache.states, turn.stm_cache.states)


def test_row_that_another_criterion_stops_writes_nothing_behind_its_stop(model, memory):
    class FirstRowIsShort(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([input_ids.shape[1] >= 8, False])

    criteria = StoppingCriteriaList([FirstRowIsShort()])
    turn = answer(model, IDS, memory, stopping_criteria=criteria)
    assert turn.sequences[0, 8:].tolist() == [0, 0, 0]
    close(turn.stm_cache.states[0], model.update_memory(memory.select(0), turn.sequences[:1, :8]).states[0])
    close(turn.stm_cache.states[1], model.update_memory(memory.select(1), turn.sequences[1:]).states[0])


# ---- cost


def cost(model, turn):
    with FlopCounterMode(display=False) as counter:
        output = turn()
    cache = output.cache
    layers = cache.self_attention_cache.layers + cache.cross_attention_cache.layers
    sizes = [(layer.keys.shape, layer.keys.nbytes + layer.values.nbytes) for layer in layers]
    return output.stm_cache, (counter.get_total_flops(), cache.get_seq_length(), sizes, output.stm_cache.nbytes)


def test_fifth_turn_costs_what_the_first_one_did(model):
    memory, costs = random_memory(model), []
    for number in range(5):
        ids = random_ids(2, 6, seed=number)
        memory, spent = cost(model, lambda ids=ids, memory=memory: answer(model, ids, memory))
        costs.append(spent)
    assert costs == [costs[0]] * 5
    assert costs[0][0] > 0
    # the last token is never fed
    assert costs[0][1] == 6 + 5 - 1


@pytest.mark.parametrize(
    "options",
    [{}, BEAMS, {"cache_implementation": "static"}, {"num_return_sequences": 2, "do_sample": True}],
    ids=["greedy", "beams", "static", "sampling"],
)
def test_keys_and_values_of_the_memory_are_computed_once_a_layer_and_turn(model, memory, options):
    projections = [getattr(layer.memory_cross_attn, f"{name}_proj") for layer in model.model.layers for name in "kvq"]
    with counted_calls(*projections) as counts:
        for turn in (1, 2):
            memory = answer(model, IDS, memory, tokens=8, **options).stm_cache.select([0, 1])
            assert counts == [turn, turn, 8 * turn] * 2


def test_memory_is_written_once_and_after_the_last_token(model, memory):
    events = []

    class Streamer:
        def put(self, value):
            events.append(value.numel())

        def end(self):
            events.append("end")

    hook = model.model.memory_encoder.register_forward_pre_hook(lambda *_: events.append("write"))
    answer(model, IDS[:1], memory.select(0), tokens=3, streamer=Streamer())
    hook.remove()
    assert events == [6, 1, 1, 1, "end", "write"]


# ---- ways to generate


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"prefill_chunk_size": 2},
        {"num_beams": 1, "cache_implementation": "dynamic"},
    ],
    ids=["static cache", "no cache", "prefill in chunks", "dynamic cache"],
)
@pytest.mark.parametrize("mask", [LEFT, LEFT * 0 + 1], ids=["padded", "full"])
def test_way_to_cache_changes_nothing(model, memory, options, mask):
    expected = answer(model, IDS, memory, attention_mask=mask)
    assert_same_turn(answer(model, IDS, memory, attention_mask=mask, **options), expected)


def test_turn_may_go_on_from_the_cache_of_the_same_memory(model, memory):
    def started():
        with torch.no_grad():
            return model(IDS, stm_cache=memory, use_cache=True).cache

    longer = torch.cat([IDS, random_ids(2, 3, seed=1)], dim=1)
    assert_same_turn(answer(model, longer, memory, cache=started()), answer(model, longer, memory))
    with pytest.raises(ValueError, match="another memory than the stm_cache given"):
        answer(model, longer, STMCache(memory.states + 1), cache=started())


def test_steps_of_three_compiled_turns_share_one_whole_graph(model):
    torch._dynamo.reset()
    # the initial memory is a parameter, those after it are not
    compiled, plain, graphs = model.init_stm(2), model.init_stm(2), []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    config = CompileConfig(fullgraph=True, dynamic=False, backend=backend, mode=None)
    # elsewhere than on an accelerator generate compiles only if told so
    config._compile_all_devices = True
    for number in range(3):
        ids = random_ids(2, 6, seed=number)
        expected = answer(model, ids, plain)
        turn = answer(model, ids, compiled, cache_implementation="static", compile_config=config)
        assert_same_turn(turn, expected)
        plain, compiled = expected.stm_cache, turn.stm_cache
    assert len(graphs) == 1


def draft_model(name, model):
    if name == "llama":
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=50, pad_token_id=0, **sizes)).eval()
    options = {"same class": {}, "other memory": {"num_memory_slots": 7, "num_hidden_layers": 1}}
    return model if name == "itself" else tiny_model(seed=3, **options[name])


@pytest.mark.parametrize("name", ["itself", "same class", "other memory", "llama"])
def test_draft_model_changes_neither_tokens_nor_memory(model, memory, name):
    draft, row = draft_model(name, model), memory.select(0)
    expected = answer(model, IDS[:1], row, tokens=9)
    assert_same_turn(answer(model, IDS[:1], row, tokens=9, assistant_model=draft), expected)
    plain = model.generate(IDS[:1], max_new_tokens=9)
    assert torch.equal(model.generate(IDS[:1], max_new_tokens=9, assistant_model=draft), plain)


def test_draft_model_of_the_same_shape_reads_the_memory(model, memory):
    draft, read = copy.deepcopy(model), []
    draft.model.register_forward_pre_hook(lambda _, args, kwargs: read.append(kwargs["stm_cache"]), with_kwargs=True)
    row = memory.select(0)
    answer(model, IDS[:1], row, assistant_model=draft)
    assert len(read) > 0
    assert all(torch.equal(states, row.states) for states in read)


def test_prompt_lookup_changes_neither_tokens_nor_memory(model, memory):
    ids, row = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]]), memory.select(0)
    expected = answer(model, ids, row, tokens=9)
    assert_same_turn(answer(model, ids, row, tokens=9, prompt_lookup_num_tokens=3), expected)


# ---- many conversations on one model


def conversation(model, seed, turns=3):
    memory, tokens = model.init_stm(1), []
    for number in range(turns):
        turn = answer(model, random_ids(1, 5, seed=10 * seed + number), memory)
        memory = turn.stm_cache
        tokens.append(turn.sequences)
    return [*tokens, memory.states]


def test_interleaved_conversations_equal_separate_ones(model):
    expected = [conversation(model, seed) for seed in (1, 2)]
    memories, found = [model.init_stm(1), model.init_stm(1)], [[], []]
    for number in range(3):
        for index, seed in enumerate((1, 2)):
            turn = answer(model, random_ids(1, 5, seed=10 * seed + number), memories[index])
            memories[index] = turn.stm_cache
            found[index].append(turn.sequences)
    for index in range(2):
        parts = [*found[index], memories[index].states]
        assert all(torch.equal(*pair) for pair in zip(parts, expected[index], strict=True))


@pytest.mark.parametrize("rounds", [20, pytest.param(300, marks=pytest.mark.slow)])
def test_conversations_in_two_threads_equal_separate_ones(model, rounds):
    expected = {seed: conversation(model, seed) for seed in (1, 2)}
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    for _ in range(rounds):
        found, start = {}, threading.Barrier(2)

        def run(seed, found=found, start=start):
            start.wait()
            found[seed] = conversation(model, seed)

        threads = [threading.Thread(target=run, args=(seed,)) for seed in expected]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found.keys() == expected.keys()
        for seed in expected:
            assert all(torch.equal(*pair) for pair in zip(found[seed], expected[seed], strict=True))
    sys.setswitchinterval(interval)


# ---- bad input


@pytest.mark.parametrize("value", ["no", 0, 1])
def test_update_memory_must_be_true_or_false(model, memory, value):
    with pytest.raises(ValueError, match=f'update_memory must be True, False or "async", got {value!r}'):
        model.generate(IDS, stm_cache=memory, update_memory=value)
    with pytest.raises(ValueError, match="update_memory must be True"):
        model.generate(IDS, GenerationConfig(update_memory=value, max_new_tokens=2), stm_cache=memory)


def test_prompt_without_tokens_or_with_too_many_is_refused_and_the_memory_stays(model, memory):
    before = memory.states.clone()
    embeds = torch.zeros(2, 65, 32)
    with counted_calls(model.model) as calls:
        with pytest.raises(ValueError, match="empty"):
            model.generate(IDS[:, :0], stm_cache=memory)
        with pytest.raises(ValueError, match=r"65 tokens.*max_position_embeddings=64"):
            model.generate(random_ids(2, 65), stm_cache=memory)
        with pytest.raises(ValueError, match=r"65 tokens.*max_position_embeddings=64"):
            model.generate(inputs_embeds=embeds, stm_cache=memory)
        with pytest.raises(ValueError, match=r"64 tokens.*no room for an answer"):
            model.generate(random_ids(2, 64), stm_cache=memory)
    assert calls == [0]
    assert torch.equal(memory.states, before)
    assert model.generate(random_ids(2, 63), stm_cache=memory, max_new_tokens=1).stm_cache.turns.tolist() == [4, 4]


@pytest.mark.parametrize("asked", [{"max_new_tokens": 30}, {"max_length": 90}, {"max_new_tokens": 4}])
@pytest.mark.parametrize("kind", ["input_ids", "inputs_embeds"])
def test_an_answer_ends_where_the_positions_of_the_model_end(model, memory, asked, kind, caplog):
    logging.Logger.warning_once.cache_clear()
    prompt = random_ids(2, 60)
    inputs = {kind: prompt if kind == "input_ids" else model.get_input_embeddings()(prompt)}
    out = model.generate(**inputs, stm_cache=memory, do_sample=False, eos_token_id=None, **asked)
    assert out.sequences.shape[1] - 60 * (kind == "input_ids") == 4
    assert out.stm_cache.turns.tolist() == [4, 4]
    if asked == {"max_length": 90} and kind == "input_ids":
        assert "30 new tokens were asked for: the answer ends after 4" in caplog.text


@pytest.mark.parametrize("as_config", [False, True])
def test_each_row_of_a_batch_ends_where_its_own_positions_end(model, memory, as_config):
    prompt = random_ids(2, 60)
    mask = torch.ones_like(prompt)
    mask[1, :7] = 0
    asked = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1, "suppress_tokens": [1, 0]}
    asked = {"generation_config": GenerationConfig(**asked)} if as_config else asked
    out = model.generate(prompt, attention_mask=mask, stm_cache=memory, **asked)
    assert out.sequences.shape == (2, 71) and out.sequences[0, 64:].eq(0).all()
    for row, start in ((0, 0), (1, 7)):
        alone = model.generate(prompt[row : row + 1, start:], stm_cache=memory.select(row), **asked)
        assert torch.equal(alone.sequences[0], out.sequences[row, start : 64 + start])
        close(out.stm_cache.states[row], alone.stm_cache.states[0], 1e-5)


@pytest.mark.parametrize("shape", [(2, 9), (2, 4), (1, 6), (3, 6), (6,)])
def test_mask_of_another_shape_than_the_prompt_is_refused_naming_both(model, memory, shape):
    with pytest.raises(ValueError) as refusal:
        model.generate(IDS, attention_mask=torch.ones(shape), stm_cache=memory)
    assert f"{shape}" in str(refusal.value)
    assert "(2, 6)" in str(refusal.value)


def test_modes_that_would_lose_the_memory_are_refused(model, memory):
    with pytest.raises(ValueError, match="paged"):
        model.generate(IDS, stm_cache=memory, cache_implementation="paged")
    with pytest.raises(ValueError, match="paged"):
        model.generate(IDS, GenerationConfig(cache_implementation="paged"), stm_cache=memory)
    for call in (
        lambda: model.generate_batch([[5, 6]]),
        lambda: model.init_continuous_batching(),
        lambda: model.continuous_batching_context_manager(),
    ):
        with pytest.raises(ValueError, match="Continuous batching would lose the memory"):
            call()


def test_misspelt_argument_is_refused(model, memory):
    with pytest.raises(ValueError, match="stm_cahce"):
        model.generate(IDS, stm_cahce=memory)


def test_failed_turn_leaves_memory_and_model_as_they_were(model, memory):
    class Stop(Exception):
        pass

    class Streamer:
        def put(self, value):
            raise Stop

    before, expected = memory.states.clone(), answer(model, IDS[:1], memory.select(0))
    with pytest.raises(Stop):
        answer(model, IDS[:1], memory.select(0), streamer=Streamer())
    assert torch.equal(memory.states, before)
    assert_same_turn(answer(model, IDS[:1], memory.select(0)), expected, tolerance=0)


def test_turn_stores_nothing_on_a_module(memory):
    model = tiny_model()
    before = [set(vars(module)) for module in model.modules()]
    model.update_memory(answer(model, IDS, memory).stm_cache, IDS)
    assert [set(vars(module)) for module in model.modules()] == before


def test_padding_tokens_that_the_model_says_itself_are_written_like_any_other(model, memory):
    def always_pad(input_ids, scores):
        return scores.index_fill(1, torch.tensor([model.config.pad_token_id]), 1e4)

    out = model.generate(IDS, stm_cache=memory, max_new_tokens=3, logits_processor=[always_pad])
    assert (out.sequences[:, 6:] == model.config.pad_token_id).all()
    expected = model.update_memory(memory, out.sequences)
    close(out.stm_cache.states, expected.states)
    assert not torch.equal(expected.states, model.update_memory(memory, IDS).states)


# ---- guidance


def guided_scores(model, ids, memory, without, scale, tokens):
    """The rule of classifier-free guidance, greedy and without a cache."""
    found = []
    for _ in range(tokens):
        scores, other = (model(each, stm_cache=memory).logits[:, -1].log_softmax(-1) for each in (ids, without))
        found.append(other + scale * (scores - other))
        best = found[-1].argmax(-1, keepdim=True)
        ids, without = torch.cat([ids, best], 1), torch.cat([without, best], 1)
    return found


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("use_cache", [False, True])
def test_guidance_compares_under_the_given_memory(model, memory, negative, use_cache):
    ids, options = random_ids(2, 6), {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    without = random_ids(2, 3, seed=7) if negative else ids[:, -1:]
    options |= {"negative_prompt_ids": without} if negative else {}
    options |= {"use_cache": use_cache, "output_scores": True}
    expected = guided_scores(model, ids, memory, without, 1.7, 4)
    out = model.generate(ids, stm_cache=memory, guidance_scale=1.7, **options)
    for found, wanted in zip(out.scores, expected, strict=True):
        close(found, wanted)
    unguided = guided_scores(model, ids, model.init_stm(2), without, 1.7, 1)
    assert (expected[0] - unguided[0]).abs().max() > 1e-2
    single = model.generate(
        ids[1:],
        stm_cache=memory.select(1),
        guidance_scale=1.7,
        **options | ({"negative_prompt_ids": without[1:]} if negative else {}),
    )
    close(single.scores[-1][0], out.scores[-1][1])
    close(single.stm_cache.states[0], out.stm_cache.states[1])


def test_guided_answers_to_one_prompt_have_its_memory(model, memory):
    options = {"max_new_tokens": 3, "do_sample": True, "num_return_sequences": 2, "guidance_scale": 1.5}
    out = model.generate(random_ids(2, 6), stm_cache=memory, negative_prompt_ids=random_ids(2, 3, seed=7), **options)
    assert out.stm_cache.batch_size == len(out.sequences) == 4


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 2}])
def test_guidance_of_more_than_one_sequence_is_refused(model, memory, options):
    with pytest.raises(ValueError, match=r"guidance_scale=1\.5"):
        model.generate(random_ids(1, 6), stm_cache=memory.select(0), guidance_scale=1.5, **options)


def test_update_memory_of_a_new_models_generation_config_survives_a_save(memory, tmp_path):
    model = tiny_model()
    model.generation_config.update_memory = False
    model.save_pretrained(tmp_path)
    loaded = RxTForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.update_memory is False
    out = loaded.generate(random_ids(2, 6), stm_cache=memory, max_new_tokens=2)
    assert torch.equal(out.stm_cache.states, memory.states)


def test_length_of_a_call_is_obeyed_by_the_demo():
    demo = AutoModelForCausalLM.from_pretrained(rxt_hf.DEMO)
    ids = random_ids(1, 6)
    assert demo.generate(ids, max_length=9, eos_token_id=None).shape == (1, 9)
