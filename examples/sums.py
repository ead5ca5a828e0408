"""The data of the examples: sums, as texts, as tokens, and as answers of which one is wrong."""

import random


def questions(count, seed=0):
    """Pairs of a question and its answer."""
    draw = random.Random(seed)
    pairs = [(draw.randrange(10), draw.randrange(10)) for _ in range(count)]
    return [(f"What is {a} plus {b}?", str(a + b)) for a, b in pairs]


def make_sums(tokenizer, count, seed=0, length=32):
    """Padded rows of tokens with labels, as a model takes them."""
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = []
    for question, answer in questions(count, seed):
        text = f"{question} {answer}{tokenizer.eos_token}"
        row = tokenizer(
            text, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        row = {name: row[name][0] for name in ("input_ids", "attention_mask")}
        row["labels"] = row["input_ids"].masked_fill(row["attention_mask"] == 0, -100)
        rows.append(row)
    return rows


def conversations(count, seed=0):
    """Rows of trl's SFTTrainer: a prompt and its completion."""
    return [
        {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": answer}],
        }
        for question, answer in questions(count, seed)
    ]


def preferences(count, seed=0):
    """Rows of trl's DPOTrainer: a prompt, a right answer and a wrong one."""
    return [
        {
            "prompt": [{"role": "user", "content": question}],
            "chosen": [{"role": "assistant", "content": answer}],
            "rejected": [{"role": "assistant", "content": "I do not know."}],
        }
        for question, answer in questions(count, seed)
    ]
