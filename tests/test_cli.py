# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
import io
import json
import os
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

import rxt_hf
from rxt_hf import RxTConfig, RxTForCausalLM, STMCache, cli
from rxt_hf.chat_template import train_tokenizer
from rxt_hf.cli import VERBS, main
from rxt_hf.session import RxTSession
from rxt_hf.terminal_chat import COMMANDS

EXAMPLES = Path(__file__).parent.parent / "examples"
GOLDEN = Path(os.environ.get("RXT_GOLDEN") or Path(__file__).parents[2] / "shared" / "golden")
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


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_script_with_a_byte_order_mark_has_its_comment_and_its_commands(rxt, folder, tmp_path, ends):
    script = tmp_path / "script.txt"
    for lines, said in ((["# note", "/memory", "/quit"], ["/memory", "/quit"]), (["/quit", "hello"], ["/quit"])):
        script.write_bytes(ends.join([*lines, ""]).encode("utf-8-sig"))
        for options, typed in ((["--script", script], b""), ([], script.read_bytes())):
            code, out, err = rxt("chat", folder, *options, typed=typed)
            shown = [line[5:] for line in out.splitlines() if line.startswith("you> ")]
            assert (code, err) == (0, "")
            assert shown == (said if options or lines[0] != "# note" else lines)
            assert ("rxt> " in out) == (shown[0] == "# note")


def test_version_is_that_of_the_package(rxt):
    assert rxt("--version") == (0, f"rxt {rxt_hf.__version__}\n", "")


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

    monkeypatch.setattr("rxt_hf.terminal_chat.typed_lines", interrupted)
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
    elif fault == "an adapter":
        (path / "config.json").unlink()
        (path / "adapter_config.json").write_text("{}")
    elif fault == "no weights":
        (path / "model.safetensors").unlink()
    elif fault in WEIGHTS:
        weights = load_file(path / "model.safetensors")
        norm = weights.pop("model.norm.weight")
        weights |= WEIGHTS[fault](norm)
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    elif fault == "other layers":
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    else:
        (path / fault).write_bytes((path / fault).read_bytes()[:100])


WEIGHTS = {
    "lacks a weight": lambda norm: {},
    "another shape": lambda norm: {"model.norm.weight": norm[1:].clone()},
    "a weight too many": lambda norm: {"model.norm.weight": norm, "model.norm.bias": norm.clone()},
    "not a number": lambda norm: {"model.norm.weight": norm.fill_(float("nan"))},
}
FAULTS = {
    "another shape": "another shape than its configuration says for model.norm.weight",
    "a weight too many": "no place in its configuration for model.norm.bias",
    "not a number": "NaN or infinity in model.norm.weight",
    "an adapter": "is a PEFT adapter, not a model",
    "not an RxT": 'type "llama", not an RxT',
    "no weights": "no file named model.safetensors",
    "lacks a weight": "lacks model.norm.weight",
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
    "no verb": ([], "Missing command"),
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
    "tokens": (["chat", "MODEL", "--max-new-tokens", "0"], "0 is not a whole number of at least 1"),
    "words": (["chat", "MODEL", "--max-new-tokens", "few"], "few is not a whole number"),
    "device": (["chat", "MODEL", "--device", "abacus"], "^rxt chat: There is no device 'abacus' here"),
    "dtype": (["chat", "MODEL", "--dtype", "int8"], "int8"),
    "bench size": (["bench", "--size", "1t"], "1t"),
    "bench turns": (["bench", "--turns", "0"], "0 is not a whole number of at least 1"),
    "bench device": (["bench", "--device", "abacus"], "abacus"),
    "bench output": (["bench", "--output", "no/f"], "No such file or directory: no/f"),
    "export of nothing": (["export", "no/such/folder", "new"], "There is no model folder"),
    "export to a file": (["export", "MODEL", "mine/notes.txt"], "notes.txt is a file"),
    "export over others": (["export", "MODEL", "mine"], "mine holds other files"),
    "no card": (["export", "MODEL", "new", "--card", "none"], "No such file or directory: none"),
    "card that is no JSON": (
        ["export", "MODEL", "new", "--card", "mine/notes.txt"],
        "notes.txt: this is not JSON",
    ),
    "card of a wrong type": (["export", "MODEL", "new", "--card", "mine/card.json"], "card.json is refused"),
    "convert over others": (["convert", "MODEL", "mine"], "mine holds other files"),
    "convert an RxT": (["convert", "MODEL", "new"], "Cannot convert .* 'rxt' is not covered"),
    "convert nothing": (["convert", "EMPTY", "new"], "Cannot convert 'empty': .*holds neither model.safetensors"),
    "layers": (["convert", "MODEL", "new", "--memory-layers", "0;2"], "0;2 is not a list of layers"),
    "nowhere to save": (["generate", "MODEL", "--query", "hi", "--save-memory", "no/f"], "There is no folder .*/no$"),
    "a folder to save": (["generate", "MODEL", "--query", "hi", "--save-memory", "mine"], "is a folder.* mine$"),
    "a device that is not there": (["chat", "MODEL", "--device", "xpu:7"], "There is no device 'xpu:7' here"),
    "a device without numbers": (["chat", "MODEL", "--device", "meta"], "There is no device 'meta' here"),
    "top-p at 0": (
        ["generate", "MODEL", "--query", "hi", "--temperature", "0", "--top-p", "0.9"],
        "top-p has no effect",
    ),
    "top-p at 0 in a chat": (["chat", "MODEL", "--temperature", "0", "--top-p", "0.9"], "top-p has no effect"),
    "binary config": (["train", "finetuning", "--config", "mine/binary"], "mine/binary is a binary file"),
    "UTF-16 config": (["train", "finetuning", "--config", "mine/utf16"], "mine/utf16 is UTF-16"),
    "binary script": (["chat", "MODEL", "--script", "mine/binary"], "mine/binary is a binary file"),
    "Latin-1 script": (["chat", "MODEL", "--script", "mine/latin1"], r"mine/latin1, line 2: this is not UTF-8.*0xe9"),
    "UTF-16 card": (["export", "MODEL", "new", "--card", "mine/utf16"], "mine/utf16 is UTF-16"),
    "empty data": (["eval", "MODEL", "--data", "mine/empty.jsonl"], "mine/empty.jsonl is empty"),
}


@pytest.mark.parametrize("argv, message", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_costs_one_sentence_and_exit_code_2(rxt, folder, tmp_path, monkeypatch, argv, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "mine" / "card.json").write_text('{"results": 5}')
    (tmp_path / "mine" / "binary").write_bytes(b"\x89PNG\r\n\0\0\0\x0d")
    (tmp_path / "mine" / "utf16").write_bytes("model: x".encode("utf-16"))
    (tmp_path / "mine" / "latin1").write_bytes(b"hello\ncaf\xe9\n")
    (tmp_path / "mine" / "empty.jsonl").write_text("\n")
    before = {path.name for path in (tmp_path / "mine").iterdir()}
    monkeypatch.chdir(tmp_path)
    code, out, err = rxt(*({"MODEL": folder, "EMPTY": "empty"}.get(arg, arg) for arg in argv))
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("rxt")
    assert re.search(message, err)
    assert not (tmp_path / "new").exists()
    assert {path.name for path in (tmp_path / "mine").iterdir()} == before


def test_help_names_every_verb_and_exits_with_0(rxt):
    code, out, err = rxt("--help")
    assert (code, err) == (0, "")
    assert all(verb in out for verb in VERBS)
    for verb in VERBS:
        assert rxt(verb, "--help")[0] == 0


def test_help_of_train_shows_our_options_before_those_of_trainer(rxt):
    out = rxt("train", "finetuning", "--help")[1]
    ours, theirs, preference = (out.index(name) for name in ("--max_batch_tokens", "--warmup_steps", "--loss_type"))
    assert ours < theirs < preference
    assert out.count("--learning_rate ") == 1


def test_progress_is_shown_on_a_terminal_alone(capsys, monkeypatch):
    for is_terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda is_terminal=is_terminal: is_terminal, raising=False)
        with cli._progress("Loading"):
            print("answer")
        captured = capsys.readouterr()
        assert captured.out == "answer\n"
        assert ("Loading" in captured.err) == is_terminal


def test_env_names_versions_device_and_attention(rxt):
    code, out, _ = rxt("env")
    facts = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert code == 0
    assert facts["torch"] == torch.__version__
    assert facts["device"].endswith("CPU threads")
    assert facts["attention"].startswith("eager, sdpa")


def test_export_writes_a_folder_that_chats_with_a_card_of_measured_numbers_and_pushes_it(
    rxt, folder, tmp_path, monkeypatch
):
    from huggingface_hub import HfApi

    uploads = []
    monkeypatch.setattr(HfApi, "create_repo", lambda api, repo_id, exist_ok: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "upload_folder", lambda api, **kwargs: uploads.append(kwargs["repo_id"]))
    result = {"dataset_name": "Facts", "dataset_type": "facts", "metric_type": "recall", "metric_value": 0.977}
    (tmp_path / "card.json").write_text(json.dumps({"results": [result], "data": "Generated dialogues."}))
    target = tmp_path / "out"
    for options in ([], ["--card", tmp_path / "card.json", "--push", "me/facts"]):
        assert rxt("export", folder, target, *options) == (0, f"{target}\n", "")
    card = (target / "README.md").read_text()
    assert "| recall | Facts | 0.977 |" in card and "Generated dialogues." in card and "me/facts" in card
    assert uploads == ["me/facts"]
    assert (target / "modeling_rxt.py").is_file()
    answer = rxt("generate", folder, "--query", "hello", *SHORT)
    assert rxt("generate", target, "--query", "hello", *SHORT) == answer


def test_eval_writes_figures_and_a_page_of_dialogues_that_are_given(rxt, folder, tmp_path):
    turns = [{"query": "My dog is called Rex.", "answer": "I see."}, {"query": "Who is it?", "answer": "Your dog."}]
    (tmp_path / "test.jsonl").write_text("\n".join([json.dumps({"interactions": turns})] * 2))
    report, page = tmp_path / "eval.json", tmp_path / "eval.html"
    code, out, _ = rxt("eval", folder, "--data", tmp_path, "--output", report, "--report", page)
    assert code == 0 and f"{tmp_path.name}: perplexity of true answers" in out
    assert json.loads(report.read_text())["sources"][tmp_path.name]["dialogues"] == 2
    assert "My dog is called Rex." in page.read_text()
    assert rxt("eval", folder, "--data", tmp_path / "none")[0] == 2


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "hello": 2, "you": 3}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>").save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"vocab_size": 4, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=64)).save_pretrained(path)
    return path


def test_convert_makes_a_folder_that_chats_of_a_language_model(rxt, llama_folder, tmp_path):
    target = tmp_path / "rxt"
    code, out, _ = rxt("convert", llama_folder, target, "--slots", 6, "--memory-layers", "0,2")
    assert (code, out) == (0, f"{target}: memory of 2 layers of 6 slots\n")
    model = RxTForCausalLM.from_pretrained(target)
    assert (model.config.memory_layers, model.config.vocab_size) == ([0, 2], 14)
    assert AutoTokenizer.from_pretrained(target).model_max_length == model.config.max_position_embeddings == 64
    ids = torch.tensor([[1, 2, 3]])
    source = LlamaForCausalLM.from_pretrained(llama_folder)
    assert torch.equal(model(ids).logits[..., :4], source(ids).logits)
    assert f"made from {llama_folder.name}" in (target / "README.md").read_text()
    assert rxt("generate", target, "--query", "hello you", *SHORT)[0] == 0


def test_a_failed_conversion_leaves_the_former_one_as_it_was(rxt, llama_folder, tmp_path):
    target = tmp_path / "rxt"
    assert rxt("convert", llama_folder, target, "--memory-layers", "0")[0] == 0
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    for options, message in ((["--memory-layers", "7"], r"\[7\]"), (["--slots", 0], "num_memory_slots .* got 0")):
        code, out, err = rxt("convert", llama_folder, target, *options)
        assert (code, out) == (2, "")
        assert re.search(message, err) and len(err.splitlines()) == 1
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["rxt"]


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no checkpoints in {GOLDEN}")
def test_convert_reads_a_checkpoint_of_the_authors_and_keeps_their_licence(rxt, tmp_path):
    checkpoint, target = GOLDEN / "att_gqa", tmp_path / "rxt"
    code, out, _ = rxt("convert", checkpoint, target)
    assert (code, out) == (0, f"{target}: memory of 2 layers of 12 slots; no tokenizer was found that fits\n")
    card = (target / "README.md").read_text()
    assert "license: other" in card and "license_name: raml" in card and "non-commercial" in card
    assert RxTForCausalLM.from_pretrained(target).config.vocab_size == 64
    code, _, err = rxt("convert", checkpoint, tmp_path / "new", "--slots", 4)
    assert code == 2 and "leave out --slots" in err and not (tmp_path / "new").exists()


def test_bench_writes_its_report_and_prints_its_tables(rxt, tmp_path):
    report = tmp_path / "report.json"
    smallest = ("--turns", 1, "--query-tokens", 3, "--answer-tokens", 2, "--repeats", 1, "--decode-batch-sizes")
    code, out, err = rxt("bench", "--output", report, "--arms", "rxt", "current_turn", *smallest)
    assert (code, err) == (0, "")
    assert out.startswith("| time to first token, ms; turn | 1 |")
    found = json.loads(report.read_text())
    assert found["turns"]["rxt"]["1"]["state_bytes"] == 2 * 40 * 128 * 4
    assert found["options"]["arms"] == ["rxt", "current_turn"] and found["options"]["decode_batch_sizes"] == []


def test_conversation_script_runs_and_asks_last_for_a_name_outside_the_training_data(rxt, folder):
    from demo.facts import OPEN_REAL_NAMES

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


@pytest.mark.parametrize("fault", [*WEIGHTS, "an adapter"])
def test_training_does_not_start_from_a_broken_model(rxt, folder, tmp_path, fault):
    broken_model(folder, tmp_path, fault)
    short = ("--max_steps", "1", "--dialogues", "4")
    words = ("--model", tmp_path, "--data", rxt_hf.DEMO / "test.jsonl.gz", "--output_dir", tmp_path / "out", *short)
    code, out, err = rxt("train", "memory_aware", *words)
    assert (code, out) == (2, "") and FAULTS[fault] in err


def test_training_says_what_is_wrong_with_its_data_before_it_reads_the_weights(rxt, folder, tmp_path):
    broken_model(folder, tmp_path, "no weights")
    (tmp_path / "train.jsonl").write_text("{}")
    code, out, err = rxt("train", "memory_aware", "--model", tmp_path, "--data", tmp_path / "train.jsonl")
    assert (code, out) == (2, "") and f"{tmp_path / 'train.jsonl'}, line 1: expected" in err
