"""Sequences of the base training: plain code, passkey questions, repeated chunks."""

import numpy as np
from transformers import PreTrainedTokenizerFast

from beacon.evaluation import passkey_line
from data import Corpus

NUM_DIGITS = 5
FAR_COPY_WEIGHT = 2.0


class TaskSampler:
    """Draws training sequences; deterministic given the generator's state.

    Args:
        corpus: encoded documents.
        tokenizer: tokenizer of the corpus.
        rng: source of randomness; save its state to resume.
        digit_weight: loss weight of a passkey digit that the context determines.
    """

    def __init__(
        self, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator, digit_weight: float = 5.0
    ) -> None:
        self.corpus, self.tokenizer, self.rng, self.digit_weight = corpus, tokenizer, rng, digit_weight
        self.vocab_size = len(tokenizer)
        tokens = tokenizer.convert_ids_to_tokens(list(range(self.vocab_size)))
        # A token that begins with a line feed marks a line's end, and "\n# ..." before it is what the
        # tokenizer gives for the text with the line put in there.
        self.begins_line_end = np.array([token.startswith("Ċ") for token in tokens])
        self.lengths = np.diff(corpus.starts)

    def code(self, seqlen: int) -> np.ndarray:
        """A contiguous window of one document that is long enough, int64 [seqlen]."""
        fits = np.maximum(self.lengths - seqlen + 1, 0).astype(float)
        document = self.rng.choice(len(fits), p=fits / fits.sum())
        # One in twenty begins where the document does, so that the first token is learned too.
        offset = 0 if self.rng.random() < 0.05 else self.rng.integers(self.lengths[document] - seqlen + 1)
        return self.corpus.document(document)[offset : offset + seqlen].astype(np.int64)

    def encode_passkey(self, digits: str) -> list[int]:
        """Tokens of a line feed and the passkey line without its own, digits last."""
        return self.tokenizer("\n" + passkey_line(digits)[:-1], add_special_tokens=False)["input_ids"]

    def insert_line(self, code: np.ndarray, position: int, line: list[int]) -> tuple[np.ndarray, int]:
        """Put a line at the line end nearest to a position.

        Returns:
            The longer sequence, and the index just after the inserted line.
        """
        ends = np.flatnonzero(self.begins_line_end[code])
        at = int(ends[np.abs(ends - position).argmin()]) if len(ends) else position
        return np.concatenate([code[:at], line, code[at:]]), at + len(line)

    def passkey(self, seqlen: int, depth: float | None = None, apart: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Code with a passkey line and one to three questions, the last at the end (or near, in training).

        Args:
            seqlen: tokens of the sequence.
            depth: where the key is, 0 the start and 1 the end; None draws one and more questions.
            apart: tokens of code between the key and the questions, at least; above 0 the last question is at the end.

        Returns:
            Tokens int64 [seqlen] and loss weights of each token as a target, float32 [seqlen].
        """
        line = self.encode_passkey("".join(map(str, self.rng.integers(0, 10, NUM_DIGITS))))
        drawn = self._far_places(seqlen, apart, len(line)) if apart and depth is None else self._places(depth)
        body = seqlen - len(drawn) * len(line)
        sequence = self.code(body)
        marks = []
        for place in drawn[::-1]:  # from the back, so that earlier insertions shift all later marks alike
            if place == 1.0:
                sequence, after = np.concatenate([sequence, line]), len(sequence) + len(line)
            else:
                sequence, after = self.insert_line(sequence, int(place * body), line)
            marks = [after, *(mark + len(line) for mark in marks)]
        weights = np.ones(seqlen, np.float32)
        weights[marks[0] - NUM_DIGITS : marks[0]] = 0.0  # random digits teach nothing
        for mark in marks[1:]:
            weights[mark - NUM_DIGITS : mark] = self.digit_weight
        return sequence, weights

    def _places(self, depth: float | None) -> np.ndarray:
        """Shares of the text before the key and each question."""
        if depth is not None:
            return np.array([depth, 1.0])
        drawn = np.sort(self.rng.random(int(self.rng.integers(1, 4)) + 1))
        if self.rng.random() < 0.5:
            drawn[0] *= self.rng.random()  # the sorted minimum alone would favour middling distances
        if self.rng.random() < 0.6:
            drawn[-1] = 1.0
        return drawn

    def _far_places(self, seqlen: int, apart: int, line: int) -> np.ndarray:
        """Likewise, with the key anywhere and at least ``apart`` tokens of code before every question."""
        body = seqlen - 3 * line
        key = self.rng.integers(0, body - apart + 1)
        middle = self.rng.integers(key + apart, max(body - apart, key + apart) + 1)
        return np.array([key, middle, body] if middle <= body - apart else [key, body]) / body

    def copy(self, seqlen: int) -> tuple[np.ndarray, np.ndarray]:
        """A chunk that comes again; returns as `passkey` does.

        Short sequences are tiled with their chunk from end to end, mostly one of random tokens: nothing
        but an induction head foresees those, and it formed within 80 steps of 4096 tokens so (it had
        not within 370 steps of sparser copies in 256 tokens).
        """
        rng, weights = self.rng, np.ones(seqlen, np.float32)
        chunk_len = int(rng.integers(6, seqlen // 3))
        kind = rng.choice(("code", "shuffled", "uniform"), p=(0.2, 0.4, 0.4))
        if kind == "uniform":
            chunk = rng.integers(1, self.vocab_size, chunk_len)
        else:
            chunk = self.code(chunk_len) if kind == "code" else rng.permutation(self.code(2000))[:chunk_len]
        if rng.random() < 128 / seqlen:
            weights[:chunk_len] = 0.0
            return np.tile(chunk, seqlen // chunk_len + 1)[:seqlen], weights
        sequence = self.code(seqlen)
        first, second = np.sort(rng.integers(0, seqlen - 2 * chunk_len + 1, 2)) + [0, chunk_len]
        for at in (first, second):
            sequence[at : at + chunk_len] = chunk
        # What cannot be foreseen carries no loss: random tokens once, and where the text is cut.
        weights[first : first + (1 if kind == "code" else chunk_len)] = 0.0
        weights[second] = 0.0
        return sequence, weights

    def far_copy(self, seqlen: int) -> tuple[np.ndarray, np.ndarray]:
        """A chunk of 96 tokens or more, tiled from end to end; returns as `passkey` does.

        What comes next stands further back than most of a window of 128, so that it is found through beacons or not at
        all: a loss at every token that rewards copying through memory. Passkeys alone reward it at five tokens of a
        sequence, and after 3 million tokens nothing had formed.
        """
        rng, weights = self.rng, np.full(seqlen, FAR_COPY_WEIGHT, np.float32)
        chunk_len = int(rng.integers(96, max(seqlen // 2, 97)))
        kind = rng.choice(("code", "shuffled", "uniform"), p=(0.2, 0.4, 0.4))
        if kind == "uniform":
            chunk = rng.integers(1, self.vocab_size, chunk_len)
        else:
            chunk = self.code(chunk_len) if kind == "code" else rng.permutation(self.code(2000))[:chunk_len]
        weights[:chunk_len] = 0.0
        return np.tile(chunk, seqlen // chunk_len + 1)[:seqlen], weights

    def batch(self, rows: int, seqlen: int, passkey_share: float, copy_share: float) -> tuple[np.ndarray, np.ndarray]:
        """Draw a batch; returns tokens and weights [rows, seqlen]."""
        drawn = []
        for kind in self.rng.random(rows):
            if kind < passkey_share:
                drawn.append(self.passkey(seqlen))
            elif kind < passkey_share + copy_share:
                drawn.append(self.copy(seqlen))
            else:
                drawn.append((self.code(seqlen), np.ones(seqlen, np.float32)))
        tokens, weights = zip(*drawn, strict=True)
        return np.stack(tokens), np.stack(weights)
