"""Data: records become examples, token ids with a label for every token that is to be learned.

An example's `labels[i]` is `input_ids[i]` where that token is trained on and IGNORE elsewhere; the
first token is never trained on, as nothing predicts it. What is trained on:

- conversations, `train_on="answers"`: what the assistant says, up to and with its end-of-turn
  token. The spans come from the template's `{% generation %}` marks if it has them, else from the
  rendered text: the answer is what stands between "everything before it, with the generation
  prompt" and "everything up to it". The conversation is tokenized once and whole, so the ids are
  those that the model sees at inference; a token counts as answer if it begins inside the span.
- `train_on="all"`, and plain text: every token.

Some templates render an earlier turn differently once others follow (they drop its reasoning):
then the answer stands nowhere in the whole as it was generated, and the conversation is taken apart
into one example per answer, each with what came before it.

Length: a conversation longer than `max_length` loses its end, and is dropped if no answer is
left; a text is cut into pieces that share one token, so that every token is predicted once.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qlora_native.records import DataError, Message, Record

IGNORE = -100
_GENERATION_MARK = re.compile(r"\{%-?\s*generation\b")
TrainOn = Literal["answers", "all"]
# A tokenizer is a transformers.PreTrainedTokenizerBase; untyped, as transformers is optional.
Tokenizer = Any


@dataclass(frozen=True)
class Example:
    """One sequence: token ids and, for each, itself or IGNORE as the label."""

    origin: str  # the record, or the piece of it: "file.jsonl:12", "book.txt#3"
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def labelled(self) -> int:
        return sum(label != IGNORE for label in self.labels)


@dataclass
class TokenizeReport:
    """What tokenizing did to the records; shown to the user."""

    records: int = 0
    cut: int = 0  # conversations that lost their end to max_length
    dropped: int = 0  # records without a token left to train on
    taken_apart: int = 0  # conversations that became one example per answer
    straddling: int = 0  # answers whose first characters share a token with the prompt

    def lines(self) -> list[str]:
        said = [
            (self.cut, "longer than max_length: cut at the end"),
            (self.dropped, "without a token left to train on: dropped"),
            (self.taken_apart, "taken apart, one example per answer: the chat template renders "
             "earlier turns differently"),
            (self.straddling, "answers begin inside a token of the prompt: that token is not "
             "trained on"),
        ]  # fmt: skip
        return [f"{count} of {self.records} records {what}" for count, what in said if count]


def tokenize(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    train_on: TrainOn = "answers",
) -> tuple[list[Example], TokenizeReport]:
    """Turns records into examples of at most `max_length` tokens.

    Raises:
        DataError: a conversation, and a tokenizer without a chat template; or a template that
            refuses the conversation. The record is named.
    """
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, got {max_length}")
    if train_on not in ("answers", "all"):
        raise ValueError(f'train_on must be "answers" or "all", got {train_on!r}')
    report = TokenizeReport(records=len(records))
    examples: list[Example] = []
    for record in records:
        if record.text:
            found = _text_examples(record, tokenizer, max_length)
        elif not tokenizer.chat_template:
            found = [_joined_example(record, tokenizer, train_on)]
        else:
            found = _chat_examples(record, tokenizer, train_on, report)
        report.cut += any(len(example.input_ids) > max_length for example in found)
        kept = [example for example in (_cut(e, max_length) for e in found) if example.labelled]
        report.dropped += not kept
        examples += kept
    return examples, report


def split_held_out(
    examples: Sequence[Example], held_out: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Parts examples into (training, held out).

    `held_out` is a fraction below 1, or a number of examples. The choice depends on the seed and on
    each example's own tokens alone: equal examples fall on the same side, and the order of the file
    does not matter. Both lists keep the file's order.
    """
    count = round(len(examples) * held_out) if held_out < 1 else int(held_out)
    if held_out > 0:
        count = max(count, 1)
    if count >= len(examples):
        raise DataError(
            f"held_out={held_out:g} leaves no example to train on (there are {len(examples)}); "
            "give more data or a smaller held_out"
        )
    scores = [_score(example, seed) for example in examples]
    chosen = set(sorted(set(scores))[:count])
    training = [example for example, s in zip(examples, scores, strict=True) if s not in chosen]
    held = [example for example, s in zip(examples, scores, strict=True) if s in chosen]
    if not training:
        raise DataError("every example fell into the held-out part: are they all the same?")
    return training, held


def fingerprint(examples: Sequence[Example]) -> str:
    """A hash of all tokens and labels: tells whether a resumed run sees the same data."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((example.input_ids, example.labels)).encode())
    return digest.hexdigest()


def _score(example: Example, seed: int) -> bytes:
    return hashlib.sha256(repr((seed, example.input_ids)).encode()).digest()


def _cut(example: Example, max_length: int) -> Example:
    if len(example.input_ids) <= max_length:
        return example
    return Example(example.origin, example.input_ids[:max_length], example.labels[:max_length])


def _example(origin: str, ids: Sequence[int], trained: Sequence[bool]) -> Example:
    labels = [token if on else IGNORE for token, on in zip(ids, trained, strict=True)]
    labels[:1] = [IGNORE] * len(labels[:1])
    return Example(origin, tuple(ids), tuple(labels))


def _text_examples(record: Record, tokenizer: Tokenizer, max_length: int) -> list[Example]:
    # verbose=False: a long text is cut below, so the tokenizer's warning would mislead.
    ids: list[int] = tokenizer(record.text, verbose=False)["input_ids"]
    eos = tokenizer.eos_token_id
    if eos is not None and ids[-1:] != [eos]:
        ids = [*ids, eos]
    starts = range(0, max(len(ids) - 1, 1), max_length - 1)
    pieces = [ids[start : start + max_length] for start in starts]
    names = [
        f"{record.origin}#{n}" if len(pieces) > 1 else record.origin for n in range(len(pieces))
    ]
    return [_example(name, ids, [True] * len(ids)) for name, ids in zip(names, pieces, strict=True)]


def _joined_example(record: Record, tokenizer: Tokenizer, train_on: TrainOn) -> Example:
    """prompt + completion + end of text, for a tokenizer that knows no conversations."""
    if not record.joinable:
        raise DataError(
            f"{record.origin}: a conversation, but the tokenizer has no chat template; take a chat "
            'model, or give {"prompt", "completion"} or {"text"} records'
        )
    prompt, completion = (message["content"] for message in record.messages)
    before: list[int] = tokenizer(prompt, verbose=False)["input_ids"]
    if before[-1:] == [tokenizer.eos_token_id]:
        before = before[:-1]
    answer: list[int] = tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        answer = [*answer, tokenizer.eos_token_id]
    trained = [train_on == "all"] * len(before) + [True] * len(answer)
    return _example(record.origin, before + answer, trained)


def _chat_examples(
    record: Record, tokenizer: Tokenizer, train_on: TrainOn, report: TokenizeReport
) -> list[Example]:
    messages = list(record.messages)
    whole = _render(record, tokenizer, messages)
    if train_on == "all":
        ids = tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]
        return [_example(record.origin, ids, [True] * len(ids))]
    if _GENERATION_MARK.search(str(tokenizer.chat_template)):
        return [_marked_example(record, tokenizer)]

    spans: list[tuple[int, int]] = []
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for i in answers:
        span = _answer_span(record, tokenizer, messages, i, whole)
        if span is None:
            break
        spans.append(span)
    else:
        return [_spanned_example(record.origin, whole, spans, tokenizer, report)]

    report.taken_apart += 1
    examples = []
    for turn, i in enumerate(answers):
        upto = _render(record, tokenizer, messages[: i + 1])
        span = _answer_span(record, tokenizer, messages, i, upto)
        if span is None:
            raise DataError(
                f"{record.origin}: the chat template does not render answer {turn + 1} after its "
                'generation prompt, so its tokens cannot be told apart; use train_on="all"'
            )
        examples.append(
            _spanned_example(f"{record.origin}#{turn}", upto, [span], tokenizer, report)
        )
    return examples


def _answer_span(
    record: Record, tokenizer: Tokenizer, messages: list[Message], i: int, whole: str
) -> tuple[int, int] | None:
    """Characters [begin, end) of `whole` that are answer i; None if it stands otherwise there."""
    before = _render(record, tokenizer, messages[:i], prompt=True) if i else ""
    upto = _render(record, tokenizer, messages[: i + 1])
    if not (upto.startswith(before) and whole.startswith(upto)):
        return None
    eos = tokenizer.eos_token
    last = upto.rfind(eos, len(before)) if eos else -1
    # What a template writes after the end-of-turn token (a line break) is never generated.
    return len(before), (last + len(eos) if last >= 0 else len(upto))


def _spanned_example(
    origin: str,
    text: str,
    spans: list[tuple[int, int]],
    tokenizer: Tokenizer,
    report: TokenizeReport,
) -> Example:
    ids, offsets = _encode(text, tokenizer)
    trained = [any(b <= begin and end <= e for b, e in spans) for begin, end in offsets]
    report.straddling += any(
        begin < b < end for b, _ in spans for begin, end in offsets if end > begin
    )
    return _example(origin, ids, trained)


def _marked_example(record: Record, tokenizer: Tokenizer) -> Example:
    encoded = tokenizer.apply_chat_template(
        list(record.messages),
        tools=list(record.tools) or None,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    trained = [bool(mark) for mark in encoded["assistant_masks"]]
    return _example(record.origin, encoded["input_ids"], trained)


def _render(
    record: Record, tokenizer: Tokenizer, messages: list[Message], prompt: bool = False
) -> str:
    try:
        text: str = tokenizer.apply_chat_template(
            messages,
            tools=list(record.tools) or None,
            tokenize=False,
            add_generation_prompt=prompt,
        )
    except Exception as error:  # jinja raises what the template's author chose to raise
        raise DataError(f"{record.origin}: the chat template refuses it: {error}") from None
    return text


def _encode(text: str, tokenizer: Tokenizer) -> tuple[list[int], list[tuple[int, int]]]:
    if not tokenizer.is_fast:
        raise DataError(
            "the tokenizer gives no character offsets (it is not a fast one), so answers cannot be "
            'found exactly; install its fast version or use train_on="all"'
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return encoded["input_ids"], encoded["offset_mapping"]
