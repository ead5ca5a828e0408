"""Records and examples: every accepted form, every error with its place, labels on answers only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_native.data import IGNORE, Example, fingerprint, split_held_out, tokenize
from qlora_native.records import DataError, Record, read_records
from tiny import CHATML, conversations, make_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def chat(*turns: str, system: str | None = None) -> Record:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return Record("chat.jsonl:1", messages=tuple(messages))


def answers_of(example: Example, tokenizer: Any) -> list[str]:
    """The runs of labelled tokens, decoded."""
    runs: list[list[int]] = []
    for i, label in enumerate(example.labels):
        if label == IGNORE:
            continue
        assert label == example.input_ids[i]
        if i == 0 or example.labels[i - 1] == IGNORE:
            runs.append([])
        runs[-1].append(label)
    return [tokenizer.decode(run) for run in runs]


def one(record: Record, tokenizer: Any, **settings: Any) -> Example:
    (example,), _ = tokenize([record], tokenizer, **({"max_length": 256} | settings))
    return example


# ---- reading ----


@pytest.mark.parametrize(
    "record, messages",
    [
        ({"prompt": "p", "completion": "c"}, [("user", "p"), ("assistant", "c")]),
        ({"question": "q", "answer": "a"}, [("user", "q"), ("assistant", "a")]),
        ({"instruction": "i", "output": "o"}, [("user", "i"), ("assistant", "o")]),
        (
            {"instruction": "i", "input": "x", "output": "o", "system": "s"},
            [("system", "s"), ("user", "i\n\nx"), ("assistant", "o")],
        ),
        (
            {"conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}]},
            [("user", "h"), ("assistant", "g")],
        ),
        (
            {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
            [("user", "u"), ("assistant", "a")],
        ),
    ],
)
def test_forms(tmp_path: Path, record: dict[str, Any], messages: list[tuple[str, str]]) -> None:
    (read,) = read_records([write_jsonl(tmp_path / "d.jsonl", [record])])
    assert [(m["role"], m["content"]) for m in read.messages] == messages
    assert read.origin == "d.jsonl:1"


def test_json_array_and_text_files(tmp_path: Path) -> None:
    array = tmp_path / "d.json"
    array.write_text(json.dumps([{"text": "one"}, {"question": "q", "answer": "a"}]))
    text = tmp_path / "d.txt"
    text.write_text("\ufeffthe cat sat", encoding="utf-8")
    records = read_records([array, text])
    assert [r.origin for r in records] == ["d.json[0]", "d.json[1]", "d.txt"]
    assert records[0].text == "one"
    assert records[2].text == "the cat sat"  # without the byte order mark


def test_blank_lines_count_but_hold_nothing(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('\n{"text": "a"}\r\n\n{"text": "b"}')
    assert [r.origin for r in read_records([path])] == ["d.jsonl:2", "d.jsonl:4"]


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "not JSON"),
        ("[1]", "must be a JSON object, got a list"),
        ('{"txt": "a"}', "a record needs the keys .*got 'txt'"),
        ('{"text": ""}', '"text" must be a non-empty string, got an empty string'),
        (
            '{"prompt": "a", "completion": 3}',
            '"completion" must be a non-empty string, got a number',
        ),
        ('{"messages": []}', '"messages" must be a non-empty list'),
        ('{"messages": [{"role": "user"}]}', r'messages\[0\] must have a "content"'),
        ('{"messages": [{"content": "x"}]}', r'messages\[0\] must be an object with a "role"'),
        ('{"messages": [{"role": "user", "content": "x"}]}', 'no message has the role "assistant"'),
        ('{"conversations": [{"from": "cat", "value": "x"}]}', r'conversations\[0\] needs "from"'),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(DataError, match=rf"bad\.jsonl:2: .*{message}"):
        read_records([path])


def test_bad_files_are_named(tmp_path: Path) -> None:
    empty, table, latin = tmp_path / "e.jsonl", tmp_path / "t.csv", tmp_path / "l.jsonl"
    empty.write_text("")
    table.write_text("a,b")
    latin.write_bytes(b'{"text": "ok"}\n{"text": "caf\xe9"}\n')
    lines = tmp_path / "lines.json"
    lines.write_text('{"text": "a"}\n{"text": "b"}')
    for path, message in [
        (empty, "holds no records"),
        (table, "unknown kind of file '.csv'"),
        (latin, "l.jsonl:2: not UTF-8"),
        (lines, "name the file .jsonl"),
        (tmp_path / "none.jsonl", "no such file"),
    ]:
        with pytest.raises(DataError, match=message):
            read_records([path])


# ---- tokens and labels ----


def test_only_the_answer_is_labelled_with_its_end(tokenizer: Any) -> None:
    example = one(chat("the cat", "sat on the mat"), tokenizer)
    assert answers_of(example, tokenizer) == ["sat on the mat<|im_end|>"]


def test_every_answer_of_a_conversation_is_labelled(tokenizer: Any) -> None:
    record = chat("cat", "the cat", "dog", "the dog ran", system="Say it.")
    example = one(record, tokenizer)
    assert answers_of(example, tokenizer) == ["the cat<|im_end|>", "the dog ran<|im_end|>"]


def test_tokens_are_those_of_the_whole_and_of_its_parts(tokenizer: Any) -> None:
    """What inference sees, prompt ids and then answer ids, is what was trained on."""
    for made in conversations(20):
        record = Record("r", messages=tuple(made["messages"]))
        example = one(record, tokenizer)
        whole = tokenizer.apply_chat_template(made["messages"], tokenize=False)
        assert list(example.input_ids) == tokenizer(whole, add_special_tokens=False)["input_ids"]
        prompt = tokenizer.apply_chat_template(
            made["messages"][:1], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        assert list(example.input_ids[: len(prompt)]) == prompt
        assert set(example.labels[: len(prompt)]) == {IGNORE}
        assert example.labels[len(prompt)] == example.input_ids[len(prompt)]


def test_generation_marks_and_prefixes_agree(tokenizer: Any) -> None:
    marked = make_tokenizer(
        "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
        "{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
        "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
        "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    record = chat("cat", "the cat", "dog", "the dog ran")
    assert one(record, marked) == one(record, tokenizer)


def test_a_template_that_rewrites_earlier_turns_is_taken_apart() -> None:
    forgetful = CHATML.replace(
        "message['content']",
        "(message['content'] if loop.last or message['role'] != 'assistant' "
        "else message['content'].split('THINK')[-1])",
    )
    tokenizer = make_tokenizer(forgetful)
    record = chat("cat", "hmTHINKthe cat", "dog", "ohTHINKthe dog")
    examples, report = tokenize([record], tokenizer, max_length=256)
    assert report.taken_apart == 1
    assert [answers_of(e, tokenizer) for e in examples] == [
        ["hmTHINKthe cat<|im_end|>"],
        ["ohTHINKthe dog<|im_end|>"],
    ]
    assert "hmTHINK" not in tokenizer.decode(examples[1].input_ids)


def test_all_tokens_but_the_first_are_labelled_on_request(tokenizer: Any) -> None:
    example = one(chat("cat", "dog"), tokenizer, train_on="all")
    assert example.labels == (IGNORE, *example.input_ids[1:])


def test_text_is_cut_so_that_each_token_is_predicted_once(tokenizer: Any) -> None:
    text = "the cat sat on the mat and the dog ran under a tree " * 9
    whole = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    examples, report = tokenize([Record("b.txt", text=text)], tokenizer, max_length=32)
    assert report.cut == 0 and len(examples) > 2
    assert all(len(e.input_ids) <= 32 for e in examples)
    assert examples[2].origin == "b.txt#2"
    predicted = [label for e in examples for label in e.labels if label != IGNORE]
    assert predicted == whole[1:]


def test_long_conversations_lose_their_end_or_are_dropped(tokenizer: Any) -> None:
    fits = chat("cat", "dog")
    late_answer = chat("the cat sat on the mat " * 10, "dog")
    long_answer = chat("cat", "the cat sat on the mat " * 10)
    examples, report = tokenize([fits, late_answer, long_answer], tokenizer, max_length=80)
    assert [len(e.input_ids) <= 80 for e in examples] == [True, True]
    assert (report.cut, report.dropped) == (2, 1)
    assert any("2 of 3 records longer" in line for line in report.lines())


def test_without_a_template_only_prompt_and_completion_can_be_joined() -> None:
    plain = make_tokenizer(None)
    record = Record("p", messages=chat("the cat", " sat").messages, joinable=True)
    example = one(record, plain)
    assert plain.decode(example.input_ids) == "the cat sat<|im_end|>"
    assert answers_of(example, plain) == [" sat<|im_end|>"]
    with pytest.raises(DataError, match="no chat template"):
        one(chat("cat", "dog"), plain)


def test_a_refusing_template_names_the_record() -> None:
    refusing = make_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match=r"chat\.jsonl:1: .*roles must alternate"):
        one(chat("cat", "dog"), refusing)


# ---- held-out part ----


def made(count: int) -> list[Example]:
    return [Example(f"r{i}", (1, i, 2), (IGNORE, i, 2)) for i in range(count)]


def test_split_is_a_function_of_seed_and_content() -> None:
    examples = made(100)
    training, held = split_held_out(examples, 0.1, seed=3)
    assert (len(training), len(held)) == (90, 10)
    assert set(training) | set(held) == set(examples)
    again, held_again = split_held_out(examples[::-1], 0.1, seed=3)
    assert set(held_again) == set(held) and again == training[::-1]
    assert set(split_held_out(examples, 0.1, seed=4)[1]) != set(held)
    assert len(split_held_out(examples, 7, seed=3)[1]) == 7
    assert split_held_out(examples, 0, seed=3) == (examples, [])


def test_equal_examples_fall_on_the_same_side() -> None:
    examples = [Example(f"r{i}", (1, i % 10), (IGNORE, i % 10)) for i in range(100)]
    training, held = split_held_out(examples, 0.05, seed=0)
    assert held and not {e.input_ids for e in training} & {e.input_ids for e in held}


def test_split_must_leave_something() -> None:
    with pytest.raises(DataError, match="leaves no example to train on"):
        split_held_out(made(3), 3, seed=0)
    with pytest.raises(DataError, match="all the same"):
        split_held_out([Example("r", (1, 2), (IGNORE, 2))] * 5, 0.2, seed=0)


def test_fingerprint_sees_tokens_and_labels() -> None:
    examples = made(5)
    other = [*examples[:4], Example("r4", (1, 4, 2), (IGNORE, IGNORE, 2))]
    assert fingerprint(examples) == fingerprint(made(5)) != fingerprint(other)
