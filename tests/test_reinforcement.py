# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
import copy
import math
from statistics import fmean, pstdev

import pytest
import torch
from demo.facts import corpus_texts, generate_dialogue
from torch.nn.functional import cosine_similarity, pad

from rxt_hf import DEMO
from rxt_hf.chat_template import encode_interaction, train_tokenizer
from rxt_hf.data.collator import RxTEpisodeCollator
from rxt_hf.data.readers import cut_episode, read_episodes
from rxt_hf.evaluation.text_scores import corpus_bleu, ngram_counts, sentence_bleu, word_ids
from rxt_hf.training.reinforcement import (
    ReinforcementArguments,
    ReinforcementTrainer,
    RepeatedSampler,
    clipped_loss,
    group_advantages,
    mean_embeddings,
    recall_reward,
    sample_episodes,
)

from .models import close, tiny_model
from .reference_rxt import Reference

# peft itself still uses the former name
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
GROUP = 3


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(corpus_texts(50), vocab_size=300, max_length=96)


def model_for(tokenizer, seed=0, **fields):
    return tiny_model(seed, vocab_size=len(tokenizer), max_position_embeddings=128, **fields)


def dialogues(count=2, **options):
    return [generate_dialogue(seed, **{"num_turns": 3} | options) for seed in range(1_000_000, 1_000_000 + count)]


def trainer_for(model, tokenizer, folder, reference=None, data=None, **arguments):
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1}
    settings |= {"save_strategy": "no", "group_size": GROUP, "max_new_tokens": 6, **arguments}
    return ReinforcementTrainer(
        model,
        ReinforcementArguments(
            str(folder),
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            train_sampling_strategy="sequential",
            **settings,
        ),
        train_dataset=dialogues(8) if data is None else data,
        processing_class=tokenizer,
        reference_model=reference,
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# ---- BLEU


def bleu_of(candidate, reference):
    return sentence_bleu(*word_ids([candidate], [reference])).item()


def test_ngrams_are_counted_at_most_as_often_as_in_the_reference():
    """The example of Papineni et al., and one with every order."""
    candidates, references = word_ids(
        ["the the the the the the the", "a b c a b"], ["the cat is on the mat", "a b c d a b a b"]
    )
    matches, totals = ngram_counts(candidates, references)
    # of the second pair: a b c a b; ab bc ab; abc; none of four tokens
    assert matches.tolist() == [[2, 0, 0, 0], [5, 3, 1, 0]]
    assert totals.tolist() == [[7, 6, 5, 4], [5, 4, 3, 2]]


def test_sentence_bleu_equals_hand_computed_values():
    assert bleu_of("Your dog is Rex .", "My dog is Rex .") == pytest.approx((4 / 5 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)
    assert bleu_of("one dog is Rex two", "one dog was Rex two") == pytest.approx(
        (4 / 5 * 3 / 5 * 1 / 4 * 1 / 3) ** 0.25
    )
    assert bleu_of("a b c d", "a b c d e f") == pytest.approx(math.exp(1 - 6 / 4))
    assert bleu_of("a b c d e f", "a b c d") == pytest.approx((4 / 6 * 4 / 6 * 3 / 5 * 2 / 4) ** 0.25)
    assert bleu_of("Rex.", "Rex.") == pytest.approx(1.0)
    assert bleu_of("rex", "Rex") == bleu_of("", "Rex") == bleu_of("Rex", "") == 0.0


def test_corpus_bleu_sums_counts_before_it_divides():
    columns = word_ids(["a b c d e", "x y z"], ["a b c d f", "x y w v"])
    # 4 + 2 of 5 + 3 words, 3 + 1 of 4 + 2 pairs, 2 + 0 of 3 + 1, 1 + 0 of 2 + 0; 8 words against 9
    expected = (6 / 8 * 4 / 6 * 2 / 4 * 1 / 2) ** 0.25 * math.exp(1 - 9 / 8)
    assert corpus_bleu(*columns) == pytest.approx(expected)
    assert corpus_bleu(*word_ids(["a b c"], ["a b c"])) == 0.0


def test_bleu_of_a_batch_is_that_of_its_rows_wherever_their_tokens_stand():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 4, (20, 7), generator=generator)
    references = torch.randint(0, 4, (20, 9), generator=generator)
    rows[3, 5:], references[4, 2:] = -100, -100
    expected = torch.cat([sentence_bleu(rows[i : i + 1], references[i : i + 1]) for i in range(20)])
    assert len(set(expected.tolist())) > 10
    close(sentence_bleu(rows, references), expected)
    close(sentence_bleu(pad(rows, (4, 3), value=-100), pad(references, (2, 6), value=-1)), expected)


# ---- advantages and loss


def test_advantages_are_those_of_the_paper_and_sum_to_zero_over_a_group():
    rewards = torch.tensor(
        [[1.0, 0.0, 2.0], [0.0, 0.0, 5.0], [0.0, 0.0, 3.5], [0.3, 1.0, 0.0], [0.1, 0.0, 0.0], [0.9, 0.0, 0.0]]
    )
    found = group_advantages(rewards, group_size=3, discount=0.5)
    expected = torch.zeros(6, 3)
    for row in range(6):
        for turn in reversed(range(3)):
            group = rewards[row // 3 * 3 : row // 3 * 3 + 3, turn].tolist()
            expected[row, turn] = (rewards[row, turn] - fmean(group)) / (pstdev(group) + 1e-4)
            expected[row, turn] += 0.5 * expected[row, turn + 1] if turn < 2 else 0.0
    close(found, expected)
    close(found.unflatten(0, (2, 3)).sum(1), torch.zeros(2, 3))
    assert (group_advantages(rewards, group_size=3, discount=0.0)[:3, 1] == 0).all()
    plain = group_advantages(rewards, group_size=3, discount=0.0, scale_by_std=False)
    close(plain[:, 2], torch.tensor([-1.5, 1.5, 0.0, 0.0, 0.0, 0.0]))


def test_loss_equals_a_computation_token_by_token():
    generator = torch.Generator().manual_seed(1)
    now, old, reference = (-2 * torch.rand(2, 3, 4, generator=generator, dtype=torch.double) for _ in range(3))
    advantages = torch.randn(2, 3, generator=generator, dtype=torch.double)
    mask = torch.rand(2, 3, 4, generator=generator) < 0.7
    mask[1, 2] = False
    answers, clipped = [], 0
    for row in range(2):
        for turn in range(3):
            tokens = []
            for token in mask[row, turn].nonzero()[:, 0].tolist():
                at = (row, turn, token)
                ratio, advantage = math.exp(now[at] - old[at]), advantages[row, turn].item()
                limited = min(max(ratio, 0.8), 1.2)
                clipped += min(ratio * advantage, limited * advantage) != ratio * advantage
                quotient = math.exp(reference[at] - now[at])
                divergence = quotient - math.log(quotient) - 1
                tokens.append(min(ratio * advantage, limited * advantage) - 0.3 * divergence)
            answers += [fmean(tokens)] if tokens else []
    assert len(answers) == 5 and 0 < clipped < mask.sum()
    found = clipped_loss(now, old, advantages, mask, clip_range=0.2, reference_log_probs=reference, kl_coef=0.3)
    assert found.item() == pytest.approx(-fmean(answers), abs=1e-12)


def sampled_batch(seed=0):
    """Two rows of three turns, right-padded, with labels at what would have been sampled."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, 50, (2, 3, 8), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 1, 6:], mask[1, 2] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[..., :3] = -100
    advantages = torch.tensor([[0.5, -1.0, 2.0], [-0.5, 1.5, 0.0]])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "advantages": advantages}


def test_loss_on_an_episode_equals_a_float64_computation_under_the_memory_of_its_turns(tokenizer, tmp_path):
    model, batch = tiny_model().double(), sampled_batch()
    reference, answers = Reference(model.config, model.state_dict()), []
    batch["old_log_probs"] = torch.full((2, 3, 7), -4.0, dtype=torch.double)
    for row in range(2):
        memory = reference.initial_states(1)[0]
        for turn in range(3):
            ids = batch["input_ids"][row, turn][batch["attention_mask"][row, turn].bool()]
            if len(ids) == 0:
                continue
            log_p = reference.decode_row(ids, memory)[1].log_softmax(-1)
            ratios = [math.exp(log_p[place - 1, ids[place]].item() + 4.0) for place in range(3, len(ids))]
            advantage = batch["advantages"][row, turn].item()
            answers.append(fmean(min(r * advantage, min(max(r, 0.8), 1.2) * advantage) for r in ratios))
            memory = reference.update_row(memory, reference.encode_row(ids))
    loss = trainer_for(model, tokenizer, tmp_path).compute_loss(model, batch)
    # the model's rotary table is float32
    assert loss.item() == pytest.approx(-fmean(answers), abs=1e-5)


def test_loss_of_fresh_samples_is_the_mean_advantage_and_padding_changes_nothing(tokenizer, tmp_path):
    model, batch = tiny_model().double(), sampled_batch()
    trainer = trainer_for(model, tokenizer, tmp_path)
    assert trainer.compute_loss(model, batch).item() == pytest.approx(-(0.5 - 1.0 + 2.0 - 0.5 + 1.5) / 5, abs=1e-6)
    batch["old_log_probs"] = torch.randn(2, 3, 7, dtype=torch.double, generator=torch.Generator().manual_seed(5)) - 4
    wider = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    padded = {name: pad(batch[name], (0, 3, 0, 2), value=value) for name, value in wider.items()}
    padded |= {"advantages": pad(batch["advantages"], (0, 2), value=9.0)}
    padded |= {"old_log_probs": pad(batch["old_log_probs"], (0, 3, 0, 2))}
    expected = trainer.compute_loss(model, batch).item()
    assert trainer.compute_loss(model, padded).item() == pytest.approx(expected, abs=1e-9)


def test_an_advantage_of_the_last_turn_trains_what_the_first_turn_wrote(tokenizer, tmp_path):
    gradients = []
    for bptt_turns in (None, 1):
        model, batch = tiny_model(), sampled_batch()
        model.set_bptt_turns(bptt_turns)
        batch["advantages"] = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
        trainer_for(model, tokenizer, tmp_path).compute_loss(model, batch).backward()
        gradients.append(model.model.initial_memory.grad)
    assert gradients[0].abs().max() > 1e-5
    # with one turn of back-propagation the write before it starts from a constant
    assert gradients[1] is None or not gradients[1].any()


# ---- sampling


def test_what_was_said_is_in_the_memory_that_the_next_turn_reads(tokenizer):
    """The same tokens as turn by turn with `generate`, which writes what it said."""
    model, dialogue = model_for(tokenizer), dialogues(1)[0]
    torch.manual_seed(3)
    features, answers = sample_episodes(model, tokenizer, [dialogue], group_size=2, max_new_tokens=6)
    torch.manual_seed(3)
    memory = model.init_stm(2)
    for turn, each in enumerate(dialogue["interactions"]):
        prompt = encode_interaction(tokenizer, each["query"])["input_ids"]
        sampling = {"max_new_tokens": 6, "do_sample": True, "top_k": 0}
        out = model.generate(torch.tensor([prompt, prompt]), stm_cache=memory, **sampling)
        memory = out.stm_cache
        for row in range(2):
            said = out.sequences[row, len(prompt) :].tolist()
            said = said[: said.index(2) + 1] if 2 in said else said
            assert features[row]["input_ids"][turn] == prompt + said
            assert features[row]["labels"][turn] == [-100] * len(prompt) + said
            assert answers[row][turn] == tokenizer.decode(said, skip_special_tokens=True)
    assert answers[0] != answers[1]
    batch = RxTEpisodeCollator(0)(features)
    batch.pop("labels")
    with torch.no_grad():
        close(model(**batch).stm_cache.states, memory.states, 1e-4)


def test_samples_of_one_dialogue_stand_together_and_dialogues_may_differ_in_length(tokenizer):
    short, long = generate_dialogue(1, num_turns=2), generate_dialogue(2, num_turns=4)
    long["interactions"][1]["answer"] = None
    features, answers = sample_episodes(model_for(tokenizer), tokenizer, [short, long], group_size=2, max_new_tokens=4)
    assert [len(each["input_ids"]) for each in features] == [len(each) for each in answers] == [2, 2, 4, 4]
    for row, each in enumerate(features):
        for place, turn in enumerate((short, long)[row // 2]["interactions"]):
            prompt = encode_interaction(tokenizer, turn["query"])["input_ids"]
            assert each["input_ids"][place][: len(prompt)] == prompt
            is_answered = turn["answer"] is not None
            assert (max(each["labels"][place]) >= 0) == is_answered
            assert is_answered or each["input_ids"][place] == prompt


# ---- rewards


def test_recall_reward_is_the_share_of_marked_words():
    turn = {"answer": "Rex and Mia", "recall": [[0, 3, 1], [8, 11, 2]]}
    assert [recall_reward(turn, said) for said in ("Mia!", "Mia, Rex", "Rexy", "")] == [0.5, 1.0, 0.0, 0.0]
    assert math.isnan(recall_reward({"answer": "Rex"}, "Rex")) and math.isnan(recall_reward(turn | {"recall": []}, ""))


def test_rewards_compare_with_the_reference_answer_and_the_turn_that_states_the_fact(tokenizer, tmp_path):
    some = (cut_episode(episode, 3) for episode in read_episodes(DEMO, "test"))
    asking = [each for each in some if [span[2] for span in each["interactions"][2].get("recall", [])] == [2]][:2]
    model = model_for(tokenizer)
    trainer = trainer_for(model, tokenizer, tmp_path, group_size=2)
    # the first sample of a dialogue says what the reference says, the second something else
    texts, features = [], []
    for dialogue in asking:
        for say in (lambda turn: turn["answer"], lambda turn: "Hello there."):
            turns = dialogue["interactions"]
            texts.append([say(turn) for turn in turns])
            rows = [encode_interaction(tokenizer, turn["query"], say(turn)) for turn in turns]
            features.append({name: [row[name] for row in rows] for name in ("input_ids", "labels")})
    found = trainer.rewards(model, asking, RxTEpisodeCollator(0)(features), texts)
    close(found["recall"][:, 2], torch.tensor([1.0, 0.0, 1.0, 0.0]))
    close(found["bleu"][::2], torch.ones(2, 3))
    close(found["reference_similarity"][::2], torch.ones(2, 3))
    assert (found["bleu"][1::2] < 0.5).all() and (found["reference_similarity"][1::2] < 0.9).all()

    def mean(ids):
        return model.get_input_embeddings().weight[[token for token in ids if token >= 0]].mean(0)

    # the first turn has none to draw on, the last one draws on the first, where its fact was stated
    assert (found["saved_similarity"][:, 0] == 0).all()
    for row in range(4):
        answer, saved = features[row]["labels"][2], features[row]["input_ids"][0]
        close(found["saved_similarity"][row, 2], cosine_similarity(mean(answer), mean(saved), dim=0))
    assert mean_embeddings(model.get_input_embeddings().weight, torch.tensor([[-100, -1]])).eq(0).all()


def test_a_reward_of_your_own_takes_the_place_of_recall(tokenizer, tmp_path):
    trainer = trainer_for(model_for(tokenizer), tokenizer, tmp_path, group_size=2)
    trainer.reward = lambda turn, answer: float(len(answer))
    batch = RxTEpisodeCollator(0)([{"input_ids": [[1, 4, 9, 5, 9, 2]], "labels": [[-100] * 4 + [9, 2]]}] * 2)
    dialogue = {"interactions": [{"query": "Hi", "answer": "Ho"}]}
    found = trainer.rewards(trainer.model, [dialogue], batch, [["abc"], [""]])
    assert found["recall"].tolist() == [[3.0], [0.0]]


def test_the_reward_of_an_answer_is_the_weighted_sum(tokenizer, tmp_path):
    weights = {"recall": 2.0, "bleu": 0.5, "reference_similarity": 0.25, "saved_similarity": 0.125}
    arguments = {f"{name}_weight": weight for name, weight in weights.items()}
    trainer = trainer_for(model_for(tokenizer), tokenizer, tmp_path, discount=0.0, scale_by_std=False, **arguments)
    parts = {name: torch.rand(6, 3, generator=torch.Generator().manual_seed(i)) for i, name in enumerate(weights)}
    parts["recall"][:, 0] = math.nan
    trainer.rewards = lambda *_: parts
    total = sum(weight * parts[name].nan_to_num() for name, weight in weights.items()).unflatten(0, (2, 3))
    found = trainer.sample(trainer.model, dialogues(2))["advantages"]
    close(found, (total - total.mean(1, keepdim=True)).flatten(0, 1))
    assert trainer._measured[0]["reward/recall"] == pytest.approx(parts["recall"].nanmean().item())


# ---- training


def test_training_raises_the_reward_that_it_is_given(tokenizer, tmp_path):
    """A reward for even tokens: a few hundred samples are enough to see it rise."""
    trainer = trainer_for(
        model_for(tokenizer), tokenizer, tmp_path, max_steps=8, group_size=16, data=dialogues(2, num_turns=2) * 8
    )

    def rewards(model, dialogues, batch, answers):
        says = (batch["labels"] % 2 == 0) & (batch["labels"] >= 0)
        share = says.sum(-1) / batch["labels"].ge(0).sum(-1).clamp(min=1)
        zeros = torch.zeros_like(share)
        return {"recall": share, "bleu": zeros, "reference_similarity": zeros, "saved_similarity": zeros}

    trainer.rewards = rewards
    trainer.train()
    found = [entry["reward/recall"] for entry in trainer.state.log_history if "loss" in entry]
    assert fmean(found[-3:]) > fmean(found[:2]) + 0.15


@pytest.mark.parametrize("updates_per_sample", [1, 2])
def test_a_resumed_run_equals_an_unbroken_one(tokenizer, tmp_path, updates_per_sample):
    options = {"max_steps": 4, "updates_per_sample": updates_per_sample, "bleu_weight": 1.0}
    whole = trainer_for(model_for(tokenizer), tokenizer, tmp_path, save_strategy="steps", save_steps=2, **options)
    whole.train()
    torch.manual_seed(99)
    rest = trainer_for(model_for(tokenizer), tokenizer, tmp_path / "rest", **options)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(losses(whole)) == 4 and losses(rest) == losses(whole)
    start, expected = model_for(tokenizer).state_dict(), whole.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in rest.model.state_dict().items())
    assert max((start[name] - tensor).abs().max() for name, tensor in expected.items()) > 1e-3


def test_samples_are_used_for_as_many_updates_as_asked(tokenizer, tmp_path):
    trainer = trainer_for(
        model_for(tokenizer), tokenizer, tmp_path, max_steps=4, updates_per_sample=2, gradient_accumulation_steps=2,
        per_device_train_batch_size=1,
    )  # fmt: skip
    sampled, used = [], []
    sample, compute_loss = trainer.sample, trainer.compute_loss

    def count(model, batch):
        sampled.append(batch[0]["seed"])
        return sample(model, batch)

    def record(model, inputs, **kwargs):
        used.append(inputs["input_ids"])
        return compute_loss(model, inputs, **kwargs)

    trainer.sample, trainer.compute_loss = count, record
    trainer.train()
    assert sampled == [1_000_000, 1_000_001, 1_000_002, 1_000_003]
    assert len(used) == 8
    for first in (0, 1, 4, 5):
        assert torch.equal(used[first], used[first + 2])
    assert losses(trainer)[0] != losses(trainer)[1], "the second update has other ratios than 1"


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_an_adapter_trains_and_its_reference_is_itself_switched_off(tokenizer, tmp_path, kl_coef):
    peft = pytest.importorskip("peft")
    base = model_for(tokenizer)
    start = copy.deepcopy(base)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, task_type="CAUSAL_LM"))
    trainer = trainer_for(model, tokenizer, tmp_path, kl_coef=kl_coef, learning_rate=5e-2)
    trainer.train()
    assert len(losses(trainer)) == 2
    with torch.no_grad():
        ids = torch.tensor([[1, 7, 8, 9]])
        assert (model(ids).logits - start(ids).logits).abs().max() > 1e-4
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, start(ids).logits)
    batch = trainer.sample(model, dialogues(2))
    assert ("reference_log_probs" in batch) == bool(kl_coef)
    if kl_coef:
        logits = start(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[..., :-1, :]
        targets = batch["labels"][..., 1:]
        expected = logits.log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        close(batch["reference_log_probs"], expected.masked_fill(targets < 0, 0.0))


def test_a_divergence_needs_a_reference_and_a_group_two_samples(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="A reference is needed"):
        trainer_for(model_for(tokenizer), tokenizer, tmp_path, kl_coef=0.1)
    with pytest.raises(ValueError, match="group_size must be at least 2"):
        trainer_for(model_for(tokenizer), tokenizer, tmp_path, group_size=1)
    with pytest.raises(ValueError, match="processing_class is needed"):
        trainer_for(model_for(tokenizer), None, tmp_path)


def test_repeated_sampler_repeats_whole_chunks():
    sampler = RepeatedSampler([3, 1, 4, 1, 5], chunk=2, times=3)
    assert list(sampler) == [3, 1, 3, 1, 3, 1, 4, 1, 4, 1, 4, 1]
    assert len(sampler) == 12
