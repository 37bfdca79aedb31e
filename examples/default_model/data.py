"""Documents of the default model, the standard library's sources, encoded and split."""

from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from beacon.evaluation import is_held_out, read_documents
from tokenizer import load_or_train


class Corpus:
    """Encoded documents of one split: one stream of tokens and the borders of the documents in it.

    Attributes:
        tokens: uint16 [length]; each document begins and ends with the end-of-text token.
        starts: int64 [documents + 1]; document i is `tokens[starts[i] : starts[i + 1]]`.
    """

    def __init__(self, tokens: np.ndarray, starts: np.ndarray) -> None:
        self.tokens, self.starts = tokens, starts

    def document(self, index: int) -> np.ndarray:
        """Tokens of one document, uint16 [length]."""
        return self.tokens[self.starts[index] : self.starts[index + 1]]

    def __len__(self) -> int:
        return len(self.starts) - 1


def load_corpus(work: Path) -> tuple[PreTrainedTokenizerFast, Corpus, Corpus]:
    """Tokenizer and both splits, from the cache in `work` or made anew.

    Args:
        work: folder of build products.

    Returns:
        The tokenizer, the training split and the held-out split.
    """
    data = work / "data"
    if not (data / "held_out_starts.npy").exists():
        data.mkdir(parents=True, exist_ok=True)
        documents = read_documents()
        tokenizer = load_or_train(
            work / "tokenizer", (text for name, text in documents.items() if not is_held_out(name))
        )
        for split, wanted in (("train", False), ("held_out", True)):
            texts = [text for name, text in documents.items() if is_held_out(name) == wanted]
            encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
            arrays = [np.array([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id], np.uint16) for ids in encoded]
            np.save(data / f"{split}_tokens.npy", np.concatenate(arrays))
            np.save(data / f"{split}_starts.npy", np.cumsum([0, *map(len, arrays)]))
    tokenizer = load_or_train(work / "tokenizer", iter(()))
    splits = [
        Corpus(np.load(data / f"{split}_tokens.npy", mmap_mode="r"), np.load(data / f"{split}_starts.npy"))
        for split in ("train", "held_out")
    ]
    return tokenizer, *splits
