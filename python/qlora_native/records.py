"""Records: what a training file holds, read with the file and the line named in every error.

Accepted files: `.jsonl`/`.ndjson` (one object a line), `.json` (an array of objects), `.txt`/`.md`
(the whole file is one text). Accepted objects, told apart by their keys:

    {"messages": [{"role": …, "content": …}, …], "tools": […]?}          a conversation
    {"conversations": [{"from": "human"|"gpt"|…, "value": …}, …]}        the same, ShareGPT's way
    {"prompt": …, "completion": …}                                       one turn (strings)
    {"question": …, "answer": …}   {"instruction": …, "input"?: …, "output": …}
    {"text": …}                                                          plain text

One-turn records may carry "system". Other keys are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Message = dict[str, Any]

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}
_ONE_TURN_KEYS = (("prompt", "completion"), ("question", "answer"), ("instruction", "output"))
_ACCEPTED = (
    '"messages", "conversations", "prompt" + "completion", "question" + "answer", '
    '"instruction" + "output", or "text"'
)


class DataError(ValueError):
    """A training file that cannot be used; the message names the file, the line and the remedy."""


@dataclass(frozen=True)
class Record:
    """Either a conversation (`messages`) or plain text (`text`), and where it was read."""

    origin: str  # "file.jsonl:12"
    messages: tuple[Message, ...] = ()
    text: str = ""
    tools: tuple[Any, ...] = ()
    # A {"prompt", "completion"} record: without a chat template its strings are joined as they are.
    joinable: bool = False


def read_records(paths: Sequence[str | Path]) -> list[Record]:
    """Reads every file in order; raises DataError on the first thing that is not a record."""
    records: list[Record] = []
    for path in paths:
        found = list(_read_file(Path(path)))
        if not found:
            raise DataError(f"{path}: holds no records")
        records += found
    return records


def _read_file(path: Path) -> Iterator[Record]:
    suffix = path.suffix.lower()
    if suffix not in {".jsonl", ".ndjson", ".json", ".txt", ".md"}:
        raise DataError(
            f"{path}: unknown kind of file {suffix or '(no extension)'!r}; wanted .jsonl (one JSON "
            "object a line), .json (an array of objects) or .txt (plain text)"
        )
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if suffix in {".txt", ".md"}:
        text = _decode(content, str(path))
        if text.strip():
            yield Record(origin=path.name, text=text)
    elif suffix == ".json":
        yield from _read_json_array(_decode(content, str(path)), path)
    else:
        yield from _read_json_lines(content, path)


def _read_json_lines(content: bytes, path: Path) -> Iterator[Record]:
    for number, line in enumerate(content.split(b"\n"), start=1):
        place = f"{path}:{number}"
        text = _decode(line, place).strip()
        if not text:
            continue
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{place}: not JSON ({error.msg} at column {error.colno}); every line must be one "
                "JSON object"
            ) from None
        yield _record(value, place, f"{path.name}:{number}")


def _read_json_array(text: str, path: Path) -> Iterator[Record]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        hint = (
            " (one object a line? then name the file .jsonl)" if "Extra data" in error.msg else ""
        )
        raise DataError(f"{path}:{error.lineno}: not JSON ({error.msg}){hint}") from None
    if not isinstance(values, list):
        raise DataError(f"{path}: wanted an array of records, got {_kind(values)}")
    for index, value in enumerate(values):
        yield _record(value, f"{path}[{index}]", f"{path.name}[{index}]")


def _record(value: object, place: str, origin: str) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{place}: a record must be a JSON object, got {_kind(value)}")
    if "messages" in value:
        messages = _messages(value["messages"], place)
        return Record(origin, messages=messages, tools=_tools(value.get("tools"), place))
    if "conversations" in value:
        return Record(origin, messages=_sharegpt(value["conversations"], place))
    for ask, answer in _ONE_TURN_KEYS:
        if ask in value and answer in value:
            turn = _one_turn(value, ask, answer, place)
            return Record(origin, messages=turn, joinable=ask == "prompt" and len(turn) == 2)
    if "text" in value:
        return Record(origin, text=_string(value, "text", place))
    keys = ", ".join(repr(key) for key in list(value)[:8]) or "none"
    raise DataError(f"{place}: a record needs the keys {_ACCEPTED}; got {keys}")


def _messages(value: object, place: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise DataError(f'{place}: "messages" must be a non-empty list, got {_kind(value)}')
    for index, message in enumerate(value):
        where = f"{place}: messages[{index}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f'{where} must be an object with a "role" and a "content"')
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise DataError(f'{where} must have a "content" that is a string')
    if not any(message["role"] == "assistant" for message in value):
        roles = ", ".join(message["role"] for message in value)
        raise DataError(f'{place}: no message has the role "assistant" (roles: {roles})')
    return tuple(value)


def _sharegpt(value: object, place: str) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise DataError(f'{place}: "conversations" must be a list, got {_kind(value)}')
    messages = []
    for index, turn in enumerate(value):
        role = _SHAREGPT_ROLES.get(str(turn.get("from"))) if isinstance(turn, dict) else None
        if role is None:
            raise DataError(
                f'{place}: conversations[{index}] needs "from" (one of '
                f'{", ".join(_SHAREGPT_ROLES)}) and "value"'
            )
        messages.append({"role": role, "content": turn.get("value")})
    return _messages(messages, place)


def _one_turn(value: Message, ask: str, answer: str, place: str) -> tuple[Message, ...]:
    prompt = _string(value, ask, place)
    if ask == "instruction" and value.get("input"):
        prompt += "\n\n" + _string(value, "input", place)
    turn = [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": _string(value, answer, place)},
    ]
    if value.get("system"):
        turn.insert(0, {"role": "system", "content": _string(value, "system", place)})
    return tuple(turn)


def _tools(value: object, place: str) -> tuple[Any, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise DataError(f'{place}: "tools" must be a list, got {_kind(value)}')
    return tuple(value)


def _string(value: Message, key: str, place: str) -> str:
    text = value[key]
    if not isinstance(text, str) or not text:
        raise DataError(f'{place}: "{key}" must be a non-empty string, got {_kind(text)}')
    return text


def _decode(content: bytes, place: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: not UTF-8 (byte {error.start}); save the file as UTF-8"
        ) from None


def _kind(value: object) -> str:
    if isinstance(value, str):
        return "an empty string" if not value else "a string"
    names = {dict: "an object", list: "a list", type(None): "null", bool: "a boolean"}
    return names.get(type(value), "a number")
