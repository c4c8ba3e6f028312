# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""Files and rows as people have them: each is read as it is meant, or refused in a sentence with file, line, field."""

import copy
import functools
import gzip
import io
import json
import re
import zipfile

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import rxt_hf
from rxt_hf.cli import main
from rxt_hf.data.readers import Episodes, read_episodes
from rxt_hf.serving.guard import read_tokens
from rxt_hf.training import run as training

GOOD = {"query": "My dog is called Rex.", "answer": "Thanks for telling me."}
GOOD_LINE = json.dumps(GOOD).encode() + b"\n"
USER, ASSISTANT = {"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello."}
SYSTEM = {"role": "system", "content": "Be kind."}
PROBE = {"query": "Name?", "answer": "Rex", "answers": ["Rex"], "distance": 1}


def chat(*messages):
    return {"messages": [USER, *messages]}


def said(*others):
    return {"conversations": [{"from": "human", "value": "Hi!"}, *others]}


def call(**function):
    return chat({"role": "assistant", "content": None, "tool_calls": [{"function": function}]})


def turns(**changes):
    return {"interactions": [GOOD, GOOD | changes]}


def probe(**changes):
    return {"interactions": [GOOD], "probes": [PROBE | changes]}


# rows, or the bytes of a line, that stand second in a file, and what is said about them
ROWS = {
    "JSON in JSON": ({"messages": "[]"}, "messages is a text that holds JSON"),
    "interactions in JSON": ({"interactions": json.dumps([GOOD])}, "interactions is a text that holds JSON"),
    "messages that are a text": ({"messages": "Hi!"}, "messages must be a list, got 'Hi!'"),
    "messages that are texts": ({"messages": ["Hi!", "Hello."]}, r"messages\[0\] must be an object"),
    "messages by column": ({"messages": {"role": ["user"], "content": ["Hi!"]}}, "messages must be a list"),
    "numbers for texts": ({"query": 5, "answer": 6}, "query must be text, got 5"),
    "a number that answers": ({"query": "a", "answer": 6}, "answer must be text, got 6"),
    "an answer that is true": (turns(answer=True), r"interactions\[1\].answer must be text, got True"),
    "half of a surrogate pair": (GOOD | {"query": "x \ud83d"}, r"query holds '\\ud83d', half of a surrogate pair"),
    "half a pair in a chat": (chat({"role": "assistant", "content": "\udc00"}), r"messages\[1\].content holds"),
    "half a pair in a system prompt": (turns(instruction="\ud83d"), r"interactions\[1\].instruction holds"),
    "half a pair in a tool call": (call(name="f", arguments={"a": "\ud83d"}), r"messages\[1\].tool_calls\[0\].*holds"),
    "nesting": (b'{"query": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "5,000 digits": (b'{"query": ' + b"9" * 5000 + b', "answer": "a"}', "more than 4300 digits"),
    "no JSON": (b"query: hi", r"not JSON: Expecting value \(column 1\)"),
    "a line that is cut": (b'{"query": "hi", "ans', r"not JSON: Unterminated string .*\(column 17\)"),
    "single quotes": (b"{'query': 'a', 'answer': 'b'}", "not JSON: .*column 2"),
    "Latin-1": ('{"query": "café", "answer": "b"}'.encode("latin-1"), "not UTF-8 but perhaps Latin-1 .*0xe9"),
    "a number": (b"5", "a row must be an object, got 5"),
    "a list": ([GOOD], "a row must be an object"),
    "null": (b"null", "a row must be an object, got None"),
    "an empty row": ({}, r"expected interactions, messages, .*; got the columns \[\]"),
    "other columns": ({"prompt": "a", "completion": "b"}, r"got the columns \['completion', 'prompt'\]"),
    "nulls alone": ({"messages": None, "query": None, "answer": None}, "got the columns"),
    "no turns": ({"interactions": []}, "interactions is empty"),
    "turns that are no list": ({"interactions": 5}, "interactions must be a list, got 5"),
    "a turn that is a text": ({"interactions": ["Hi!"]}, r"interactions\[0\] must be an object, got 'Hi!'"),
    "a turn that is null": ({"interactions": [None]}, r"interactions\[0\] must be an object, got None"),
    "a turn without an answer": ({"interactions": [{"query": "a"}]}, r"interactions\[0\] lacks \['answer'\]"),
    "a query of nothing": ({"interactions": [{"query": None, "answer": "a"}]}, r"interactions\[0\].query is null"),
    "an empty answer": (turns(answer=" "), r"interactions\[1\].answer is empty"),
    "an empty assistant": (chat({"role": "assistant", "content": ""}), r"messages\[1\].content is empty"),
    "an assistant of null": (chat({"role": "assistant", "content": None}), r"messages\[1\].content must be text"),
    "a user of null": ({"messages": [USER | {"content": None}, ASSISTANT]}, r"messages\[0\].content must be text"),
    "an unknown role": (chat({"role": "critic", "content": "a"}), r"messages\[1\]: the role 'critic' is unknown"),
    "a role that is a list": (chat({"role": ["user"], "content": "a"}), r"messages\[1\]: the role \['user'\]"),
    "no role": ({"messages": [{}]}, r"messages\[0\]: the role None is unknown"),
    "an image": (chat(ASSISTANT | {"content": [{"type": "image", "text": "a"}]}), r"content\[0\] must be text"),
    "input_text": ({"messages": [USER | {"content": [{"type": "input_text", "text": "a"}]}]}, r"\[0\] must be text"),
    "a part without text": (chat(ASSISTANT | {"content": [{"type": "text"}]}), r"content\[0\].text must be text"),
    "a weight between": (chat(ASSISTANT | {"weight": 0.5}), r"messages\[1\].weight is 0.5, expected 0"),
    "train that is a text": (turns(train="no"), r"interactions\[1\].train is 'no', expected false"),
    "one answer of two weights": (chat(ASSISTANT, ASSISTANT | {"weight": 0}), r"messages\[1\]: .* differ in weight"),
    "thinking that is a list": (turns(thinking=["a"]), r"interactions\[1\].thinking must be text"),
    "a role of a turn": (turns(role="system"), r"interactions\[1\].role is 'system'"),
    "a call without a name": (call(arguments={}), r"messages\[1\].tool_calls\[0\].function.name must be text"),
    "arguments that are a list": (call(name="f", arguments=[1]), "function.arguments must be an object or its JSON"),
    "calls that are a text": (turns(tool_calls="[]"), r"tool_calls is a text that holds JSON"),
    "an old function call": (chat(ASSISTANT | {"function_call": {"name": "f"}}), "function_call is not read"),
    "recall that is no span": (turns(recall=[[0, "2", 1]]), r"interactions\[1\].recall\[0\] is \[0, '2', 1\]"),
    "recall of no answer": (turns(answer=None, recall=[[0, 2, 1]]), "recall marks words of an answer"),
    "ids that are texts": ({"interactions": [{"query": ["a"], "answer": ["b"]}]}, r"query must be text, or token ids"),
    "ids beside a text": (
        {"interactions": [GOOD, {"query": [11], "answer": [12]}]},
        "is token ids, and interactions",
    ),
    "ids with a history": (
        {"query": [11], "answer": [12], "history": [["a", "b"]]},
        "is token ids, and interactions",
    ),
    "ids for a text": ({"query": [11], "answer": "a"}, r"\[0\].query is token ids, and .*\[0\].answer is"),
    "probes that are a text": ({"interactions": [GOOD], "probes": "Name?"}, "probes must be a list"),
    "a probe without a distance": (probe(distance=None), r"probes\[0\].distance is None"),
    "a probe with a number": (probe(answers=[5]), r"probes\[0\].answers\[0\] must be text, got 5"),
    "a probe without an answer": ({"interactions": [GOOD], "probes": [{"query": "a", "distance": 1}]}, "has neither"),
    "a probe without a place": ({"interactions": [GOOD], "probes": [{"query": "a"}]}, r"probes\[0\] lacks"),
    "ShareGPT of an unknown": (
        {"conversations": [{"from": "bot", "value": "a"}]},
        r"conversations\[0\].from is 'bot'",
    ),
    "ShareGPT of a number": (
        {"conversations": [{"from": "human", "value": 5}]},
        r"conversations\[0\].value must be text",
    ),
    "history that is a text": (GOOD | {"history": "a"}, "history must be a list"),
    "history of triples": (GOOD | {"history": [["a", "b", "c"]]}, r"history\[0\] is .*, expected \[query, answer\]"),
    "Alpaca without an output": ({"instruction": "a", "output": ""}, "output is empty"),
    "two system prompts": (
        {"system": "a", "messages": [{"role": "system", "content": "b"}, ASSISTANT]},
        "system stands",
    ),
    "tools": (chat(ASSISTANT) | {"tools": [{"type": "function"}]}, "tools is not read: describe it"),
    "images": ({"conversations": [USER, ASSISTANT], "images": ["a.png"]}, "images is not read"),
    "a history beside a chat": (chat(ASSISTANT) | {"history": [["a", "b"]]}, "history stands beside turns"),
    "a prompt beside turns": ({"interactions": [GOOD], "system": "Be kind."}, "system stands beside turns"),
    "a weight between beside a chat": (chat(ASSISTANT) | {"weight": 0.5}, "weight is 0.5, expected 0"),
}


def packed(content, cut=None):
    return gzip.compress(content)[:cut]


def zipped():
    file = io.BytesIO()
    zipfile.ZipFile(file, "w").writestr("a.jsonl", GOOD_LINE)
    return file.getvalue()


# name and bytes of a file, and what is said about it behind its name
FILES = {
    "nothing": ("d.jsonl", b"", " is empty"),
    "blank lines": ("d.jsonl", b"\n \n", " is empty"),
    "an empty array": ("d.json", b"[]", " is an empty array"),
    "an array that is cut": ("d.json", b"[\n" + GOOD_LINE, r": this is not JSON: .*\(line 3, column 1\)"),
    "an array with a bad row": (
        "d.json",
        json.dumps([GOOD, {"query": 5, "answer": "a"}]).encode(),
        ", row 2: query must",
    ),
    "UTF-16": ("d.jsonl", GOOD_LINE.decode().encode("utf-16"), " is UTF-16, expected text in UTF-8"),
    "UTF-16 without a mark": ("d.jsonl", GOOD_LINE.decode().encode("utf-16-le"), " is UTF-16 without"),
    "UTF-32": ("d.jsonl", GOOD_LINE.decode().encode("utf-32"), " is UTF-32"),
    "a picture": ("d.jsonl", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", " is a binary file"),
    "a zip": ("d.jsonl", zipped(), " is a binary file"),
    "gzip that is cut": ("d.jsonl.gz", packed(GOOD_LINE * 9, -12), r", line \d+: the gzip file ends too early"),
    "gzip that is damaged": (
        "d.jsonl.gz",
        packed(GOOD_LINE, -8) + b"\0" * 8,
        ", line 2: the gzip file is damaged: CRC check failed",
    ),
    "an answer that nobody gives": ("d.jsonl", b'{"messages": []}\n', " holds no dialogue"),
}


@pytest.fixture(scope="module")
def demo():
    return AutoModelForCausalLM.from_pretrained(rxt_hf.DEMO), AutoTokenizer.from_pretrained(rxt_hf.DEMO)


@pytest.fixture
def refusals(demo, monkeypatch, capsys, tmp_path):
    """What the reader and two verbs say of a file; the model is loaded once for all of them."""
    monkeypatch.setattr("rxt_hf.cli._load_model", lambda *args: demo)
    monkeypatch.setattr(training, "load_model", lambda *args: demo[0])
    monkeypatch.setattr(training, "load_tokenizer", lambda *args: demo[1])

    def say(path, *, is_unanswered=False):
        said = []
        if not is_unanswered:
            with pytest.raises(ValueError) as refused:
                list(read_episodes(path))
            said.append(str(refused.value))
        output = ["--output_dir", str(tmp_path / "out")]
        for argv in (["eval", "--data", str(path)], ["train", "finetuning", "--data", str(path), *output]):
            assert main(argv) == 2
            out, err = capsys.readouterr()
            assert out == "" and err.startswith(f"rxt {argv[0]}: ") and err.count("\n") == 1
            said.append(err.strip())
        return said

    return say


@pytest.mark.parametrize(("row", "message"), ROWS.values(), ids=ROWS)
def test_a_wild_row_costs_one_sentence_with_file_line_and_field(refusals, tmp_path, row, message):
    path = tmp_path / "d.jsonl"
    path.write_bytes(GOOD_LINE + (row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" + GOOD_LINE)
    for said in refusals(path):
        assert re.search(rf"{path}, line 2: .*{message}", said), said
        assert len(said) < 300 + len(str(path))


@pytest.mark.parametrize(("name", "content", "message"), FILES.values(), ids=FILES)
def test_a_wild_file_costs_one_sentence_with_its_name(refusals, tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    for said in refusals(path, is_unanswered="holds no" in message):
        assert re.search(f"{path}{message}", said), said


PLAIN = [{"query": "Hi!", "answer": "Hello."}]
PROMPT = {"query": None, "answer": None, "instruction": "Be kind."}
SPOKEN = [{"from": "human", "value": "Hi!"}, {"from": "gpt", "value": "Hello."}]
ALPACA = {"instruction": "Say hi.", "output": "Hello."}
UNLEARNED = [*PLAIN, {"query": "Hi!", "answer": "Hello.", "train": False}]
# rows that are read, and their interactions
READ = {
    "nulls of a data set": ({"messages": None, "query": "Hi!", "answer": "Hello.", "history": None}, PLAIN),
    "nulls of a turn": ({"interactions": [{**PLAIN[0], "instruction": None, "role": None, "weight": None}]}, PLAIN),
    "ShareGPT": ({"conversations": SPOKEN, "messages": None}, PLAIN),
    "ShareGPT with a prompt": ({"system": "Be kind.", "conversations": SPOKEN}, [PROMPT, *PLAIN]),
    "ShareGPT that is called": ({"conversations": [USER, ASSISTANT]}, PLAIN),
    "a prompt of its own": ({"conversations": [{"from": "system", "value": "Be kind."}, *SPOKEN]}, [PROMPT, *PLAIN]),
    "a tool": (
        {"conversations": [*SPOKEN, {"from": "tool", "value": "-3"}, {"from": "gpt", "value": "Cold."}]},
        [*PLAIN, {"query": "-3", "answer": "Cold.", "role": "tool"}],
    ),
    "Alpaca": (ALPACA, [{"query": "Say hi.", "answer": "Hello."}]),
    "Alpaca with an input": (ALPACA | {"input": "To me."}, [{"query": "Say hi.\nTo me.", "answer": "Hello."}]),
    "Alpaca with an empty input": (ALPACA | {"input": "", "system": ""}, [{"query": "Say hi.", "answer": "Hello."}]),
    "Alpaca with all": (
        ALPACA | {"history": [["Hi!", "Hello."]], "system": "Be kind.", "weight": 0},
        [PROMPT, *PLAIN, {"query": "Say hi.", "answer": "Hello.", "train": False}],
    ),
    "history": (GOOD | {"history": [["Hi!", "Hello."]]}, [*PLAIN, GOOD]),
    "weight of a message": (chat(ASSISTANT | {"weight": 1}, USER, ASSISTANT | {"weight": 0}), UNLEARNED),
    "train of a message": (chat(ASSISTANT, USER | {"weight": 0}, ASSISTANT | {"train": False}), UNLEARNED),
    "a prompt beside null": ({"interactions": None, "system": "Be kind.", **GOOD}, [PROMPT, GOOD]),
    "train of a turn": ({"interactions": [{**PLAIN[0], "train": True}, {**PLAIN[0], "train": False}]}, UNLEARNED),
    "weight of a turn": ({"interactions": [*PLAIN, {**PLAIN[0], "weight": 0.0}]}, UNLEARNED),
    "an unanswered turn": ({"interactions": [*PLAIN, {"query": "Hi!", "answer": None}]}, None),
}


@pytest.mark.parametrize(("row", "interactions"), READ.values(), ids=READ)
def test_a_row_in_a_layout_that_people_have_is_read(demo, row, interactions):
    (episode,) = read_episodes([row])
    assert episode["interactions"] == (interactions or row["interactions"])
    assert Episodes(demo[1], [episode]).sizes[0][0] == len(episode["interactions"])


def places(value, path=()):
    """The path of everything inside a row."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


def test_whatever_stands_in_a_row_it_is_read_or_refused_where_it_is_read(demo):
    whole = {
        **GOOD,
        "thinking": "Hm.",
        "tool_calls": [{"name": "f", "arguments": {}}],
        "recall": [[0, 2, 1]],
        "weight": 1,
    }
    layouts = [row for row, _ in READ.values()] + [
        {"interactions": [whole], "probes": [PROBE]},
        call(name="f", arguments="{}"),
    ]
    others = [None, 5, -1, "", [], {}, True, 1.5, "\ud83d", "[]", ["a"], [1], [[1]], [None], {"a": 1}, 10**30]
    refused = 0
    for row in layouts:
        for path in places(row):
            for other in others:
                changed = copy.deepcopy(row)
                *parents, last = path
                functools.reduce(lambda value, key: value[key], parents, changed)[last] = other
                try:
                    episodes = list(read_episodes([changed]))
                except ValueError as error:
                    assert str(error).startswith("Row 0: ") and "\n" not in str(error)
                    refused += 1
                else:
                    Episodes(demo[1], episodes)
    assert refused > 1000


@pytest.mark.parametrize("row", [chat(ASSISTANT), {"conversations": SPOKEN}, {"interactions": PLAIN}])
@pytest.mark.parametrize("beside", [{"weight": 0}, {"train": False}], ids=["weight", "train"])
def test_nothing_of_a_row_is_learned_that_says_so_beside_its_turns(row, beside):
    (episode,) = read_episodes([row | beside | {"tools": [], "history": []}])
    assert episode["interactions"] == UNLEARNED[1:]


def test_a_probe_has_answers_if_it_has_an_answer_and_the_other_way_round():
    for given in ({"answer": "Rex"}, {"answers": ["Rex"], "answer": None}, {"answers": None, "answer": "Rex"}):
        (episode,) = read_episodes([{"interactions": [GOOD], "probes": [{"query": "Name?", "distance": 1, **given}]}])
        assert episode["probes"] == [PROBE]
    assert list(read_episodes([{"interactions": [GOOD], "probes": None}])) == [{"interactions": [GOOD]}]


def test_what_is_not_to_be_learned_is_read_and_written_as_before(demo):
    tokenizer = demo[1]
    call = {"tool_calls": [{"name": "f", "arguments": {}}]}
    for beside in ({}, call):
        learned, unlearned = (
            Episodes(tokenizer, read_episodes([{"interactions": [GOOD, {**GOOD, **beside, "train": train}]}]))[0]
            for train in (True, False)
        )
        assert learned["input_ids"] == unlearned["input_ids"]
        assert learned["labels"][0] == unlearned["labels"][0]
        assert set(unlearned["labels"][1]) == {-100} != set(learned["labels"][1])


MARK = b"\xef\xbb\xbf"
WHOLE = {
    "a byte-order mark": ("d.jsonl", MARK + GOOD_LINE),
    "a mark in gzip": ("d.jsonl.gz", packed(MARK + GOOD_LINE)),
    "gzip that is not called so": ("d.jsonl", packed(GOOD_LINE)),
    "text that is called gzip": ("d.jsonl.gz", GOOD_LINE),
    "an array": ("d.json", MARK + b"\n [" + GOOD_LINE + b"]\n"),
    "an array that is called lines": ("d.jsonl", json.dumps([GOOD], indent=2).encode()),
    "lines that are called JSON": ("d.json", GOOD_LINE),
    "blank lines and other ends": ("d.jsonl", b"\r\n" + GOOD_LINE.strip() + b" \r\n\r\n"),
    "no end": ("d.jsonl", GOOD_LINE.strip()),
}


@pytest.mark.parametrize(("name", "content"), WHOLE.values(), ids=WHOLE)
def test_a_file_is_read_whatever_its_name_and_mark(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert list(read_episodes(tmp_path / name)) == list(read_episodes(tmp_path, "d")) == [{"interactions": [GOOD]}]


def test_texts_for_pretraining_are_checked_as_dialogues_are(tmp_path):
    options = training.RunArguments()
    path, plain = tmp_path / "d.jsonl", tmp_path / "d.txt"
    path.write_text('{"text": "One."}\n{"text": 5}\n')
    with pytest.raises(ValueError, match=f"{path}, line 2: text must be text, got 5"):
        list(training.texts_of(str(path), "train", options))
    path.write_text('{"text": "One."}\n' + json.dumps(GOOD) + "\n")
    assert list(training.texts_of(str(path), "train", options)) == ["One.", "\n".join(GOOD.values())]
    plain.write_bytes(MARK + b"One.\r\n\r\nTwo.\r\n")
    assert list(training.texts_of(str(plain), "train", options)) == ["One.", "Two."]
    plain.write_bytes(b"One.\n\ncaf\xe9\n")
    with pytest.raises(ValueError, match=f"{plain}, line 3: this is not UTF-8"):
        list(training.texts_of(str(plain), "train", options))


def test_tokens_of_a_server_are_read_with_a_byte_order_mark(tmp_path):
    path, line = tmp_path / "tokens", "a-token-of-some-length alice\n"
    read = []
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_text(line, encoding=encoding)
        read.append(read_tokens(path))
    assert read[0] == read[1] and list(read[0].values()) == ["alice"]
    path.write_text(line, encoding="utf-16")
    with pytest.raises(ValueError, match=f"{path} is UTF-16"):
        read_tokens(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": 5, "rejected": "a"}, "chosen must be a text or a list of messages, got int"),
        ({"prompt": "Hi!", "chosen": [], "rejected": "a"}, "chosen has no answer"),
        ({"chosen": "a", "rejected": None}, "rejected must be a text or a list"),
        ({"prompt": "Hi!", "chosen": [{"role": "assistant", "content": 5}], "rejected": "a"}, "content must be text"),
        ({"interactions": [GOOD | {"rejected": 5}]}, r"interactions\[0\].rejected must be text, got 5"),
    ],
)
def test_preferences_are_checked_as_dialogues_are(tmp_path, row, message):
    good = {"prompt": "Hi!", "chosen": "Hello.", "rejected": "No."}
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(map(json.dumps, [good | {"interactions": None}, row])))
    with pytest.raises(ValueError, match=f"{path}, line 2: .*{message}"):
        list(training.preferences_of(str(path), "train", training.RunArguments()))
    options = training.RunArguments(skip_bad_rows=True)
    (turns,) = training.preferences_of(str(path), "train", options)
    assert turns == [{"query": "Hi!", "answer": "Hello.", "rejected": "No."}]


def test_bad_rows_are_left_out_if_asked_and_counted(tmp_path, caplog):
    path = tmp_path / "d.jsonl"
    path.write_bytes(GOOD_LINE + b"{\n" + b"\xe9\n" + b'{"query": 5, "answer": "a"}\n' + b"5\n" + GOOD_LINE)
    assert list(read_episodes(path, skip_bad_rows=True)) == [{"interactions": [GOOD]}] * 2
    (said,) = caplog.messages
    assert said.startswith("4 of 6 rows are left out: ") and said.count(str(path)) == 3
    assert "line 2: this is not JSON" in said and "line 3: this is not UTF-8" in said and "line 4: query" in said
    path.write_text("5\n6\n")
    with pytest.raises(ValueError, match=f"None of the 2 rows can be read; {path}, line 1: a row must be an object"):
        list(read_episodes(path, skip_bad_rows=True))


def test_every_verb_that_reads_data_leaves_bad_rows_out_if_asked(demo, monkeypatch, capsys, tmp_path):
    seen, path = [], tmp_path / "d.jsonl"
    path.write_bytes(GOOD_LINE + b"{\n" + GOOD_LINE)
    monkeypatch.setattr("rxt_hf.cli._load_model", lambda *args: demo)
    monkeypatch.setattr(training, "load_model", lambda *args: demo[0])
    monkeypatch.setattr(training, "load_tokenizer", lambda *args: demo[1])

    def stop(*args, **kwargs):
        seen.append(len(args[2]))
        raise ValueError("enough")

    monkeypatch.setattr("rxt_hf.evaluation.memory.evaluate_dialogues", stop)
    monkeypatch.setattr(training, "set_training_stage", lambda model, stage: stop(0, 0, [0] * 2))
    for argv in (["eval"], ["train", "finetuning", "--output_dir", str(tmp_path / "out")]):
        assert main([*argv, "--skip-bad-rows", "--data", str(path)]) == 2
        assert "enough" in capsys.readouterr().err
    assert seen == [2, 2]


def test_an_interaction_that_is_too_long_is_named_with_its_line(demo, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(GOOD_LINE + json.dumps(GOOD | {"answer": "7" * 5000}).encode())
    with pytest.raises(ValueError, match=f"{path}, line 2: .* has 50.. tokens"):
        Episodes(demo[1], read_episodes(path))
    with pytest.raises(ValueError, match=r"Dialogue 0: .* has 50.. tokens"):
        Episodes(demo[1], [{"interactions": [GOOD | {"answer": "7" * 5000}]}])


@pytest.mark.parametrize("token", [2048, 10**30], ids=["beyond", "huge"])
@pytest.mark.parametrize("stage", ["memory_aware", "preference"])
def test_token_ids_that_the_model_does_not_have_are_refused(demo, tmp_path, stage, token):
    assert demo[0].config.vocab_size == 2048
    turn = {"query": [11], "answer": [token], "rejected": [12]}
    path = tmp_path / "ids.jsonl"
    path.write_text(json.dumps({"interactions": [turn, turn]}) + "\n")
    with pytest.raises(ValueError, match=f"token id {token} is outside of the model's vocabulary of 2048") as refused:
        training.features_of(stage, [str(path)], "train", training.RunArguments(), demo[0].config, demo[1])
    assert stage == "preference" or str(refused.value).startswith(f"{path}, line 1: ")
