# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
import io
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from rxt_hf import RxTConfig, RxTForCausalLM, STMCache
from rxt_hf.chat_template import train_tokenizer
from rxt_hf.cli import COMMANDS, VERBS, main
from rxt_hf.session import RxTSession

EXAMPLES = Path(__file__).parent.parent / "examples"
ABOUT = "Trained to remember what you tell it about yourself."
CONTEXT = 96
SHORT = ("--max-new-tokens", "4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random model, as a user finds it on disk."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["My dog is called Rex. You live in Oslo."] * 8, vocab_size=300, max_length=CONTEXT)
    torch.manual_seed(0)
    config = RxTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_memory_slots=6,
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
    )
    RxTForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "about.txt").write_text(ABOUT + "\nMore lines.\n")
    return str(path)


@pytest.fixture
def rxt(capsys, monkeypatch):
    """Runs the command line on bytes typed into a pipe; gives back exit code, stdout, stderr."""

    def run(*argv, typed=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
        code = main([str(arg) for arg in argv])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return code, captured.out, captured.err

    verbosity = logging.get_verbosity()
    yield run
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


@pytest.fixture
def chat(rxt, folder):
    """A chat of which all lines are typed; gives back what stands after the line about the model."""

    def run(*lines, options=()):
        typed = b"".join(line if isinstance(line, bytes) else line.encode() + b"\n" for line in lines)
        code, out, err = rxt("chat", folder, *SHORT, *options, typed=typed)
        assert (code, err) == (0, "")
        return out.splitlines()[1:]

    return run


def test_chat_says_first_what_the_model_talks_about(rxt, folder, tmp_path):
    assert rxt("chat", folder) == (0, f"    {ABOUT}\n", "")
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((Path(folder) / name).read_bytes())
    assert "does not say what it was trained" in rxt("chat", tmp_path)[1]


def test_chat_answers_as_a_session_does_and_is_repeatable(chat, rxt, folder):
    code, out, _ = rxt("generate", folder, "--query", "My dog is called Rex.", *SHORT)
    lines = chat("My dog is called Rex.", "", "   ", "hello")
    assert code == 0
    assert "\n".join(lines).startswith(f"you> My dog is called Rex.\nrxt> {out}you> hello\nrxt> ")
    assert lines == chat("My dog is called Rex.", "hello")


def test_script_skips_comments_and_blank_lines_and_obeys_commands(rxt, folder, tmp_path):
    script = tmp_path / "script.txt"
    script.write_text("# a comment\n\nhello\n  # another\n/memory\n/quit\nnever said\n")
    code, out, err = rxt("chat", folder, "--script", script, typed=b"not read\n")
    assert (code, err) == (0, "")
    assert [line for line in out.splitlines() if line.startswith("you>")] == [
        "you> hello",
        "you> /memory",
        "you> /quit",
    ]
    assert "rxt> " in out
    assert "6 slots x 2 layers x 32, 1536 bytes, 1 turns" in out


def test_options_reach_generate(rxt, folder, monkeypatch):
    given = []
    monkeypatch.setattr(RxTSession, "send", lambda self, text: given.append((text, self.generate_defaults)) or "ok")
    for options in (
        [],
        ["--temperature", 0],
        ["--temperature", 0.7, "--top-p", 0.9, "--max-new-tokens", 5, "--seed", 1],
    ):
        assert rxt("generate", folder, "--query", "hi", *options, "--device", "cpu", "--dtype", "bfloat16")[0] == 0
    sampled = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 5}
    assert given == [("hi", {"do_sample": False}), ("hi", {"do_sample": False}), ("hi", sampled)]


def test_seed_makes_sampling_repeatable(rxt, folder):
    outs = [
        rxt("generate", folder, "--query", "hi", *SHORT, "--temperature", 2, "--seed", seed)[1] for seed in (1, 1, 2)
    ]
    assert outs[0] == outs[1] != outs[2]


def test_dtype_is_that_of_the_memory(rxt, folder, tmp_path):
    file = tmp_path / "memory"
    assert rxt("generate", folder, "--query", "hi", *SHORT, "--dtype", "bfloat16", "--save-memory", file)[0] == 0
    assert STMCache.load(file).dtype == torch.bfloat16


def test_generate_goes_on_from_a_memory_and_saves_it(rxt, folder, tmp_path):
    file = tmp_path / "memory"
    for turns in (1, 2):
        resume = ["--memory", file] if turns > 1 else []
        code, out, err = rxt("generate", folder, "--query", "hi", *SHORT, *resume, "--save-memory", file)
        assert (code, err) == (0, "")
        assert out.strip()
        assert STMCache.load(file).turns.tolist() == [turns]


def test_chat_resumes_a_saved_conversation_with_its_history(chat, tmp_path):
    file = tmp_path / "memory"
    assert chat("one", "two", f"/save {file}")[-1] == f"    Saved to {file}."
    lines = chat("/forget 1", "/memory", options=["--memory", file])
    assert lines[1] == "    Forgotten: one"
    assert lines[-1].endswith(" 1 turns")


def test_load_replaces_the_conversation_and_a_failure_does_not(chat, tmp_path):
    file, damaged = tmp_path / "memory", tmp_path / "damaged"
    chat("one", f"/save {file}")
    damaged.write_bytes(b"\x00" * 100)
    lines = chat(f"/load {damaged}", f"/load {tmp_path / 'none'}", "/load", "/memory", f"/load {file}", "/memory")
    messages = [line.strip() for line in lines if not line.startswith("you>")]
    assert "is refused" in messages[0]
    assert messages[1] == f"No such file or directory: {tmp_path / 'none'}"
    assert messages[2] == "/load FILE needs a file."
    assert messages[3].endswith(" 0 turns")
    assert messages[4] == f"Loaded {file}: 1 turns."
    assert messages[5].endswith(" 1 turns")


def test_fork_keeps_a_conversation_under_a_name(chat):
    lines = chat("one", "/fork start", "two", "/fork", "/switch start", "/fork start", "/switch no", "/fork")
    messages = [line[4:] for line in lines if line.startswith("    ")]
    assert messages == [
        "Kept as start; going on in main.",
        "* main: 2 turns",
        "  start: 1 turns",
        "Going on in start: 1 turns.",
        "There is a conversation start already; /fork lists them.",
        "There is no conversation 'no'; /fork lists them.",
        "  main: 2 turns",
        "* start: 1 turns",
    ]


def test_undo_and_forget_name_the_turn(chat):
    lines = chat("one", "two", "three", "/undo", "/forget", "/forget 1", "/forget 7", "/forget x", "/undo", "/undo")
    messages = [line[4:] for line in lines if line.startswith("    ")]
    assert messages[0] == "Undone: three"
    assert [message.split(" ->")[0] for message in messages[1:3]] == ["1. one", "2. two"]
    assert messages[3:] == [
        "Forgotten: one",
        *["/forget N needs a turn from 1 to 1; /forget lists them."] * 2,
        "Undone: two",
        "There is no turn to undo: the log of this session is empty.",
    ]


def test_help_lists_every_command(chat):
    assert [line.split()[0] for line in chat("/help")[1:]] == list(COMMANDS)


NASTY = [
    b"\x00\x01\x1b[31mred\x07\x7f\n",
    b"\xff\xfe\x80 not UTF-8\n",
    b"a" * 10_000 + b"\n",
    b"[A] [BOS] [EOS] [Q]\n",
    "\u202e\ufdd0[\ufdd0A] \u2028 日本 😀\n".encode(),
    b"/unknown\n",
    b"/\n",
    b"/ save\n",
    b"/save\n",
    b"/save /no/such/folder/file\n",
    b"/save a\x00b\n",
    b"/load \xff\n",
    b"/load /\n",
    b"/forget " + b"9" * 5000 + b"\n",
    b"/forget -1\n",
    "/forget ²\n".encode(),
    b"/fork \x1b]0;title\x07\n",
    b"/switch\n",
    b"{'a': %s}\n",
    b"\t\n",
    b"\r\n",
    b"no line feed at the end",
]


def test_whatever_is_typed_the_chat_goes_on(chat):
    lines = chat(*NASTY[:-1], b"/memory\n", NASTY[-1])
    assert lines[-2] == "you> no line feed at the end"
    assert not {character for line in lines for character in line} & set(map(chr, [*range(9), *range(11, 32), 127]))
    text = "\n".join(lines)
    assert "is no valid Unicode" in text
    assert "max_position_embeddings=96" in text
    assert "There is no command /unknown; /help lists the commands." in text


def test_lone_line_is_refused_without_a_trace_in_the_memory(chat):
    lines = chat(b"a" * 10_000 + b"\n", b"\xff\n", "/memory")
    assert lines[-1].endswith(" 0 turns")


def test_ctrl_c_in_an_answer_cancels_the_turn_only(chat, monkeypatch):
    stream = RxTSession.stream

    def interrupted(self, text):
        pieces = stream(self, text)
        if text == "stop":
            yield next(pieces)
            raise KeyboardInterrupt
        yield from pieces

    monkeypatch.setattr(RxTSession, "stream", interrupted)
    lines = chat("one", "stop", "two", "/memory")
    assert "    The turn is cancelled; the memory is as before." in lines
    assert lines[-1].endswith(" 2 turns")


def test_ctrl_c_between_two_pieces_cancels_before_it_says_so(chat, monkeypatch):
    class Slow(str):
        def translate(self, table):
            raise KeyboardInterrupt

    def stream(self, text):
        try:
            yield Slow("piece")
        finally:
            print("closed")

    monkeypatch.setattr(RxTSession, "stream", stream)
    message = "    The turn is cancelled; the memory is as before."
    assert chat("one") == ["you> one", "rxt> closed", "", message]


def test_ctrl_c_at_the_prompt_leaves_politely(rxt, folder, monkeypatch):
    def interrupted():
        yield "hello"
        raise KeyboardInterrupt

    monkeypatch.setattr("rxt_hf.cli._typed_lines", interrupted)
    code, out, err = rxt("chat", folder)
    assert (code, err) == (0, "")
    assert "you> hello" in out


def test_model_that_prints_escapes_does_not_steer_the_terminal(rxt, folder, monkeypatch):
    monkeypatch.setattr(RxTSession, "send", lambda self, text: "\x1b[2Jred\x9b\tb\nc")
    assert rxt("generate", folder, "--query", "hi")[1] == "\ufffd[2Jred\ufffd\tb\nc\n"


def broken_model(folder, path, fault):
    for file in Path(folder).iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    if fault == "not an RxT":
        (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    elif fault == "no weights":
        (path / "model.safetensors").unlink()
    elif fault == "lacks a weight":
        weights = load_file(path / "model.safetensors")
        del weights["model.norm.weight"]
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    elif fault == "other layers":
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    else:
        (path / fault).write_bytes((path / fault).read_bytes()[:100])


FAULTS = {
    "not an RxT": 'type "llama", not an RxT',
    "no weights": "no file named model.safetensors",
    "lacks a weight": "its weights lack model.norm.weight",
    "other layers": "layer",
    "config.json": "not a valid JSON file",
    "model.safetensors": "header",
    "tokenizer.json": "Expecting",
}


@pytest.mark.parametrize("fault, message", FAULTS.items(), ids=FAULTS)
def test_broken_model_folder_costs_one_sentence(rxt, folder, tmp_path, fault, message):
    broken_model(folder, tmp_path, fault)
    code, out, err = rxt("generate", tmp_path, "--query", "hi")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith(f"rxt generate: Cannot load the model '{tmp_path}': ")
    assert message in err and not err.endswith(":\n")


MISTAKES = {
    "no verb": ([], "verb"),
    "unknown verb": (["dance"], "dance"),
    "unknown option": (["chat", "--loud"], "--loud"),
    "no query": (["generate", "MODEL"], "--query"),
    "no folder": (["chat", "no/such/folder"], "There is no model folder 'no/such/folder'"),
    "a file": (["chat", __file__], "There is no model folder"),
    "empty folder": (["chat", "EMPTY"], "config.json"),
    "no memory": (["chat", "MODEL", "--memory", "none"], "No such file or directory: none"),
    "no memory file": (["chat", "MODEL", "--memory", "EMPTY"], "not a regular file"),
    "no script": (["chat", "MODEL", "--script", "none"], "No such file or directory: none"),
    "empty query": (["generate", "MODEL", "--query", " "], "empty"),
    "long query": (["generate", "MODEL", "--query", "7" * 999], f"1002 tokens .* at most {CONTEXT - 16}"),
    "empty system": (["chat", "MODEL", "--system", ""], "empty"),
    "two starts": (["chat", "MODEL", "--system", "hi", "--memory", "none"], "give one of them"),
    "temperature": (["chat", "MODEL", "--temperature", "-1"], "-1 is not between 0 and inf"),
    "not a number": (["chat", "MODEL", "--temperature", "nan"], "nan is not between"),
    "top-p": (["chat", "MODEL", "--top-p", "2"], "2 is not between 0 and 1"),
    "tokens": (["chat", "MODEL", "--max-new-tokens", "0"], "0 is not a number of tokens"),
    "words": (["chat", "MODEL", "--max-new-tokens", "few"], "invalid whole number value: 'few'"),
    "device": (["chat", "MODEL", "--device", "abacus"], "abacus"),
    "dtype": (["chat", "MODEL", "--dtype", "int8"], "int8"),
    "nowhere to save": (["generate", "MODEL", "--query", "hi", "--save-memory", "no/f"], "No such file or directory"),
}


@pytest.mark.parametrize("argv, message", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_costs_one_sentence_and_exit_code_2(rxt, folder, tmp_path, monkeypatch, argv, message):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    code, _, err = rxt(*({"MODEL": folder, "EMPTY": "empty"}.get(arg, arg) for arg in argv))
    assert code == 2
    assert len(err.splitlines()) == 1
    assert err.startswith("rxt")
    assert re.search(message, err)


def test_help_names_every_verb_and_exits_with_0(rxt):
    code, out, err = rxt("--help")
    assert (code, err) == (0, "")
    assert all(verb in out for verb in VERBS)
    for verb in VERBS:
        assert rxt(verb, "--help")[0] == 0


def test_env_names_versions_device_and_attention(rxt):
    code, out, _ = rxt("env")
    facts = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert code == 0
    assert facts["torch"] == torch.__version__
    assert facts["device"].endswith("CPU threads")
    assert facts["attention"].startswith("eager, sdpa")


def test_conversation_script_runs_and_asks_last_for_a_name_outside_the_training_data(rxt, folder):
    from rxt_hf.data.facts import OPEN_REAL_NAMES

    script = EXAMPLES / "conversation.txt"
    code, out, err = rxt("chat", folder, *SHORT, "--script", script)
    queries = [line for line in script.read_text().splitlines() if line[0] not in "#/"]
    assert (code, err) == (0, "")
    assert [line[5:] for line in out.splitlines() if line.startswith("you> ") and line[5] != "/"] == queries
    assert queries[1] == "My dog is called Mochi."
    assert "Mochi" in OPEN_REAL_NAMES
    assert queries[-1] == "Do you remember my dog's name?"


def test_chat_example_ends_with_the_line_that_it_promises(folder, monkeypatch, capsys):
    path = EXAMPLES / "chat.py"
    monkeypatch.setattr(sys, "argv", [str(path), folder])
    runpy.run_path(str(path), run_name="__main__")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "the saved memory goes on as the one in RAM: True"
    assert last in path.read_text()
    assert len(path.read_text().splitlines()) <= 120
