"""Byte-level BPE tokenizer: 5,120 tokens, numbers in groups of up to three digits."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 5120
END_OF_TEXT = "<|endoftext|>"  # begins and ends every document, id 0
MAX_DIGITS = 3
NUMBERS = ["".join(digits) for n in range(2, MAX_DIGITS + 1) for digits in itertools.product("0123456789", repeat=n)]


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Train the tokenizer.

    Digits are split off in groups of up to three, from the left, and every group is a token, as in Llama 3: a
    passkey of five digits is always two tokens. Runs of white space do merge, which Python code needs.

    Args:
        texts: Training documents; a held-out one must not be among them.

    Returns:
        A tokenizer of exactly `VOCAB_SIZE` tokens with bos = eos = pad = `END_OF_TEXT`.

    Raises:
        ValueError: If the texts are too few to fill the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    no_numbers = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.pre_tokenizer = no_numbers
    learned = VOCAB_SIZE - len(NUMBERS)
    trainer = trainers.BpeTrainer(
        vocab_size=learned,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != learned:
        raise ValueError(
            f"the tokenizer must learn {learned} tokens, got {tokenizer.get_vocab_size()}; give more text."
        )
    return _with_numbers(tokenizer)


def _with_numbers(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Add a token for every number of two and three digits, found whole (no merges lead to it)."""
    state = json.loads(tokenizer.to_str())
    state["model"]["ignore_merges"] = True
    for number in NUMBERS:
        state["model"]["vocab"][number] = len(state["model"]["vocab"])
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(rf"[0-9]{{1,{MAX_DIGITS}}}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def load_or_train(folder: Path, texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Load the tokenizer from a folder, or train it and save it there.

    Args:
        folder: A tokenizer folder; made when missing.
        texts: Training documents, read only when the folder has no tokenizer.

    Returns:
        The tokenizer.
    """
    if not (folder / "tokenizer.json").exists():
        train_tokenizer(texts).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)
