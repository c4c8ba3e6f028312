# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""Other libraries, used as `docs/ecosystem.md` says: its blocks run, and what they compute is what the model does."""

import math
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rxt_hf
from rxt_hf.chat_template import encode_interaction

# what the other libraries still call is theirs to mend
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]
PAGE = (Path(__file__).parent.parent / "docs" / "ecosystem.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SECTIONS = {part.partition("\n")[0]: BLOCK.findall(part) for part in PAGE.split("\n## ")}
START, *NAMES = SECTIONS
NEEDS = {"TRL": "trl", "PEFT": "peft", "lm-evaluation-harness": "lm_eval", "Gradio": "gradio", "Trainer": "accelerate"}


def run_section(name, folder):
    """All names that the blocks of a section leave; they stand on the first block, and some on Trainer's."""
    pytest.importorskip("datasets")
    found = {}
    for section in dict.fromkeys((START, "Trainer", name) if name in ("PEFT", "Accelerate") else (START, name)):
        pytest.importorskip(NEEDS.get(section, "accelerate"))
        for block in SECTIONS[section]:
            exec(compile(block, f"docs/ecosystem.md, {section}", "exec"), found)
            found.get("short", {}).update(output_dir=str(folder / "out"), use_cpu=True)
    return found


@pytest.mark.parametrize("name", [name for name in NAMES if SECTIONS[name]])
def test_the_blocks_of_the_page_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    found = run_section(name, tmp_path)
    if name == "lm-evaluation-harness":
        assert found["found"]["results"]["dogs"]["exact_match,none"] == 1.0
    if name == "Accelerate":
        assert "Mochi" in found["reply"]
    if name == "Gradio":
        text, session = found["answer"]("My dog is called Mochi.", [], None)
        assert "Mochi" in text and session.turns == 1
        again, session = found["answer"]("Do you remember my dog's name?", [], session)
        assert "Mochi" in again and session.turns == 2


@pytest.fixture(scope="module")
def demo():
    return AutoModelForCausalLM.from_pretrained(rxt_hf.DEMO), AutoTokenizer.from_pretrained(rxt_hf.DEMO)


TURN = ("My dog is called Mochi.", "Thanks, your dog's name is Mochi.")


def own_log_probability(demo):
    model, tokenizer = demo
    encoded = encode_interaction(tokenizer, *TURN)
    labels = torch.tensor([encoded["labels"]])
    return -(model(torch.tensor([encoded["input_ids"]]), labels=labels).loss * (labels != -100).sum()).item()


def trained(trainer_name, row, folder, learning_rate=1e-3, beside=None, **options):
    """The logs of two steps with one row; the decoder must have moved, and what reads the memory with it."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    steps = {"max_steps": 2, "logging_steps": 1, "report_to": "none", "save_strategy": "no", "use_cpu": True}
    arguments = getattr(trl, f"{trainer_name}Config")(
        str(folder), **steps, bf16=False, learning_rate=learning_rate, **options
    )
    # by its path, so that TRL loads the model, and its reference, itself
    trainer = getattr(trl, f"{trainer_name}Trainer")(
        model=str(rxt_hf.DEMO), args=arguments, train_dataset=datasets.Dataset.from_list(row), **(beside or {})
    )
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert any("self_attn" in name for name in moved) and any("memory_cross_attn" in name for name in moved)
    assert not any("memory_attention" in name for name in moved)
    return trainer.state.log_history


QUERY, ANSWER, WRONG = (
    [{"role": role, "content": text}]
    for role, text in (("user", TURN[0]), ("assistant", TURN[1]), ("assistant", "I do not know."))
)


def test_sft_of_trl_learns_the_loss_of_the_model(demo, tmp_path):
    logs = trained(
        "SFT", [{"messages": QUERY + ANSWER}] * 2, tmp_path, per_device_train_batch_size=2, assistant_only_loss=True
    )
    encoded = encode_interaction(demo[1], *TURN)
    tokens = sum(label != -100 for label in encoded["labels"])
    assert logs[0]["loss"] == pytest.approx(-own_log_probability(demo) / tokens, abs=1e-4)
    assert logs[1]["loss"] < logs[0]["loss"]


def test_dpo_of_trl_starts_at_the_models_own_probability(demo, tmp_path):
    row = {"prompt": QUERY, "chosen": ANSWER, "rejected": WRONG}
    logs = trained("DPO", [row] * 2, tmp_path, per_device_train_batch_size=2)
    assert logs[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert logs[0]["logps/chosen"] == pytest.approx(own_log_probability(demo), abs=1e-3)
    assert logs[1]["loss"] < logs[0]["loss"]


def test_kto_of_trl_starts_at_the_models_own_probability(demo, tmp_path):
    rows = [{"prompt": QUERY, "completion": text, "label": text is ANSWER} for text in (ANSWER, WRONG)]
    logs = trained("KTO", rows, tmp_path, per_device_train_batch_size=2)
    assert logs[0]["loss"] == pytest.approx(0.5, abs=1e-4)
    assert logs[0]["logps/chosen"] == pytest.approx(own_log_probability(demo), abs=1e-3)
    assert logs[1]["loss"] < logs[0]["loss"]


def test_grpo_of_trl_learns_from_a_reward(tmp_path):
    seen = []

    def last_is_best(completions, **columns):
        seen.extend(completions)
        return [float(number) for number in range(len(completions))]

    logs = trained(
        "GRPO",
        [{"prompt": QUERY}] * 2,
        tmp_path,
        beside={"reward_funcs": last_is_best},
        per_device_train_batch_size=2,
        num_generations=2,
        max_completion_length=16,
    )
    assert len(seen) == 4 and "Mochi" in seen[0][0]["content"]
    assert logs[0]["reward_std"] > 0 and math.isfinite(logs[1]["loss"])


def test_a_conversation_of_several_turns_is_refused_with_the_reason(tmp_path):
    with pytest.raises(Exception, match="one interaction at a time"):
        trained("SFT", [{"messages": (QUERY + ANSWER) * 2}], tmp_path)


def test_the_harness_obeys_its_limit_and_scores_what_the_model_does(demo):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = demo
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu")
    prompt = harness.apply_chat_template(QUERY)
    for limit in (3, 32):
        settings = {"until": [], "max_gen_toks": limit, "do_sample": False}
        asked = [Instance("generate_until", {}, (prompt, settings), number) for number in range(2)]
        answers = harness.generate_until(asked, disable_tqdm=True)
        assert {len(tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in answers} == {
            min(limit, 11)
        }
    ((score, is_greedy),) = harness.loglikelihood(
        [Instance("loglikelihood", {}, (prompt, TURN[1]), 0)], disable_tqdm=True
    )
    encoded = encode_interaction(tokenizer, *TURN)
    ids, labels = (torch.tensor([encoded[name][:-1]]) for name in ("input_ids", "labels"))
    own = -(model(ids, labels=labels).loss * (labels != -100).sum()).item()
    assert score == pytest.approx(own, abs=1e-4) and is_greedy
