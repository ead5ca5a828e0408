"""The demo's text: chatterbot-corpus' English dialogues, as training and held-out records.

Its YAML files hold lists of utterances. In most files these alternate between two speakers; in two
they are one question and several answers to it. Both become {"messages": [...]} records. Equal
records count once (one file repeats ten pairs a thousand times). Records that share a user's line,
spelt alike but for case and punctuation, stand on the same side of the split: no question that is
asked in the test was answered in training.

Everything is decided by the text alone, so that every run on every machine has the same split.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from qlora_native.loading.errors import CheckpointError

PACKAGE = "chatterbot-corpus"
HELD_OUT = 0.1  # of the groups of records that share a question
_ANSWERS_TO_ONE_QUESTION = {"computers", "emotion"}

Utterances = tuple[str, ...]  # user, assistant, user, assistant, …


@dataclass(frozen=True)
class Split:
    """Dialogues to train on, and dialogues that training never sees."""

    train: list[Utterances]
    held_out: list[Utterances]


def load_split(show: Sequence[str] = ()) -> Split:
    """The corpus, split; dialogues with a question of `show` are always held out."""
    return split(read_corpus(), show)


def read_corpus() -> list[Utterances]:
    """All dialogues of the installed package, each once, in the order of its files."""
    import yaml

    dialogues: dict[Utterances, None] = {}
    for path in _corpus_files():
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        for entry in content["conversations"]:
            if isinstance(entry, list):  # one entry is a stray string
                lines = [str(line).strip() for line in entry]
                dialogues.update(
                    dict.fromkeys(_dialogues(lines, path.stem in _ANSWERS_TO_ONE_QUESTION))
                )
    return list(dialogues)


def split(dialogues: Iterable[Utterances], show: Sequence[str] = ()) -> Split:
    """Hold out whole groups of dialogues, chosen by a hash of their smallest question."""
    shown = {same_question(question) for question in show}
    parts = Split([], [])
    for group in _groups(list(dialogues)):
        questions = {same_question(line) for dialogue in group for line in dialogue[::2]}
        held_out = bool(questions & shown) or _fraction(min(questions)) < HELD_OUT
        (parts.held_out if held_out else parts.train).extend(group)
    return parts


def write_records(path: Path, dialogues: Iterable[Utterances]) -> None:
    """JSON Lines of {"messages": [{"role", "content"}, …]}."""
    roles = ("user", "assistant")
    with path.open("w", encoding="utf-8") as file:
        for dialogue in dialogues:
            messages = [
                {"role": roles[turn % 2], "content": line} for turn, line in enumerate(dialogue)
            ]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def same_question(line: str) -> str:
    """What spellings of one question have in common: its words, without case and punctuation."""
    return " ".join(re.findall(r"\w+", line.casefold())) or line


def _dialogues(lines: list[str], answers_to_one: bool) -> list[Utterances]:
    if answers_to_one:
        return [(lines[0], answer) for answer in lines[1:] if answer]
    whole = lines[: len(lines) // 2 * 2]  # a last line without an answer teaches nothing
    return [tuple(whole)] if whole and all(whole) else []


def _groups(dialogues: list[Utterances]) -> list[list[Utterances]]:
    """Connected components of "has a question in common", in order of first appearance."""
    leader = list(range(len(dialogues)))

    def find(index: int) -> int:
        while leader[index] != index:
            leader[index] = leader[leader[index]]
            index = leader[index]
        return index

    first_with: dict[str, int] = {}
    for index, dialogue in enumerate(dialogues):
        for line in dialogue[::2]:
            other = find(first_with.setdefault(same_question(line), index))
            mine = find(index)
            leader[max(mine, other)] = min(mine, other)
    groups: dict[int, list[Utterances]] = {}
    for index, dialogue in enumerate(dialogues):
        groups.setdefault(find(index), []).append(dialogue)
    return list(groups.values())


def _fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text only."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _corpus_files() -> list[Path]:
    try:
        files = distribution(PACKAGE).files or []
    except PackageNotFoundError:
        files = []
    english = [file for file in files if file.suffix == ".yml" and file.parent.name == "english"]
    if not english:
        raise CheckpointError(
            f"the demo's text is in the package {PACKAGE}: pip install --no-deps {PACKAGE}"
        )
    return sorted(Path(str(file.locate())) for file in english)
