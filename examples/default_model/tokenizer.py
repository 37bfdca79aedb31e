"""Byte-level BPE tokenizer of the default model: 4096 tokens, every digit a token of its own."""

from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 4096
END_OF_TEXT = "<|endoftext|>"  # begins and ends every document, id 0


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Train the tokenizer.

    Digits are split before the byte-level step, so that no merge ever swallows one: a passkey of
    five digits is always five tokens. Runs of white space do merge, which Python code needs.

    Args:
        texts: training documents; a held-out file must not be among them.

    Returns:
        A tokenizer of exactly `VOCAB_SIZE` tokens with bos = eos = pad = `END_OF_TEXT`.

    Raises:
        ValueError: if the texts are too few to fill the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(
            f"the tokenizer must have {VOCAB_SIZE} tokens, got {tokenizer.get_vocab_size()}; give more text."
        )
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
        folder: a tokenizer folder; made when missing.
        texts: training documents, read only when the folder has no tokenizer.

    Returns:
        The tokenizer.
    """
    if not (folder / "tokenizer.json").exists():
        train_tokenizer(texts).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)
