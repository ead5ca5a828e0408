"""The demo's split: the same everywhere, without repetition, and no question on both sides."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_native.demo import corpus
from qlora_native.demo.corpus import Utterances, same_question, split, write_records

DIALOGUES: list[Utterances] = [
    *((f"question {n}", f"answer {n}") for n in range(200)),
    ("Question 7!", "the same question, spelt otherwise"),
    ("hello", "hi", "question 8", "an answer"),  # joins "hello" and "question 8"
    ("Hello.", "good day"),
]


def questions(dialogues: list[Utterances]) -> set[str]:
    return {same_question(line) for dialogue in dialogues for line in dialogue[::2]}


def test_no_question_stands_on_both_sides() -> None:
    parts = split(DIALOGUES)
    assert not questions(parts.train) & questions(parts.held_out)
    assert sorted(parts.train + parts.held_out) == sorted(DIALOGUES)
    assert 10 < len(parts.held_out) < 35  # a tenth of about 200


def test_the_split_depends_on_the_text_alone() -> None:
    backwards = split(DIALOGUES[::-1])
    parts = split(DIALOGUES)
    assert sorted(backwards.held_out) == sorted(parts.held_out)
    assert sorted(backwards.train) == sorted(parts.train)


def test_shown_questions_are_held_out_with_their_group() -> None:
    held_out = split(DIALOGUES, show=["QUESTION 8", "question 7"]).held_out
    for dialogue in (*DIALOGUES[7:9], *DIALOGUES[-3:]):
        assert dialogue in held_out


def test_spellings() -> None:
    assert same_question("What is  AI?") == same_question("what is ai")
    assert same_question("Isn't it?") != same_question("Is it?")
    assert same_question("???") == "???"


@pytest.mark.parametrize(
    ("lines", "answers_to_one", "dialogues"),
    [
        (["q", "a", "b"], True, [("q", "a"), ("q", "b")]),
        (["q", "a", "b"], False, [("q", "a")]),
        (["q", "a", "r", "b"], False, [("q", "a", "r", "b")]),
        (["q"], False, []),
        (["q", ""], False, []),
    ],
)
def test_lines_become_dialogues(
    lines: list[str], answers_to_one: bool, dialogues: list[Utterances]
) -> None:
    assert corpus._dialogues(lines, answers_to_one) == dialogues


def test_records_are_what_training_reads(tmp_path: Path) -> None:
    write_records(tmp_path / "a.jsonl", [("q", "a", "r", "ü")])
    [line] = (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line) == {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a"},
            {"role": "user", "content": "r"},
            {"role": "assistant", "content": "ü"},
        ]
    }


def test_the_real_corpus() -> None:
    pytest.importorskip("yaml")
    if not _is_installed(corpus.PACKAGE):
        pytest.skip(f"the package {corpus.PACKAGE} is not installed")
    dialogues = corpus.read_corpus()
    assert len(set(dialogues)) == len(dialogues) > 1000
    assert all(len(dialogue) % 2 == 0 and all(dialogue) for dialogue in dialogues)
    parts = corpus.load_split()
    assert not questions(parts.train) & questions(parts.held_out)
    assert 0.07 < len(parts.held_out) / len(dialogues) < 0.15
    assert corpus.load_split() == parts


def _is_installed(package: str) -> bool:
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True
