"""Training sequences: plain code, code with needles and questions, repeated chunks."""

import numpy as np
from transformers import PreTrainedTokenizerFast

from corpus import Corpus
from prompts import Needle, draw_needles
from scales import STRIDE

COPY_WEIGHT = 2.0  # of a far copy's tokens, which also marks them
ANSWER_WEIGHT = 5.0  # of the tokens of an answer that the context determines
KINDS = ("passkey", "number", "topic")
KIND_SHARES = (0.5, 0.35, 0.15)


class Sequences:
    """Draws training sequences; deterministic given the generator's state.

    Args:
        corpus: Encoded packages.
        tokenizer: Tokenizer of the corpus.
        rng: Source of randomness; save its state to resume.
    """

    def __init__(self, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator) -> None:
        self.corpus, self.tokenizer, self.rng = corpus, tokenizer, rng
        self.vocab_size = len(tokenizer)
        tokens = tokenizer.convert_ids_to_tokens(list(range(self.vocab_size)))
        # A token that begins with a line feed marks a line's end, and "\n# ..." before it is what the
        # tokenizer gives for the text with the line put in there.
        self.begins_line_end = np.array([token.startswith("Ċ") for token in tokens])
        self.lengths = np.diff(corpus.starts)

    def code(self, seqlen: int) -> np.ndarray:
        """A contiguous stretch of one package, which may cross its files, int64 ``[seqlen]``."""
        fits = np.maximum(self.lengths - seqlen + 1, 0).astype(float)
        if not fits.any():
            raise ValueError(f"a package must have {seqlen} tokens, got at most {self.lengths.max()}; ask for fewer.")
        document = self.rng.choice(len(fits), p=fits / fits.sum())
        offset = self.rng.integers(self.lengths[document] - seqlen + 1)
        return self.corpus.document(document)[offset : offset + seqlen].astype(np.int64)

    def encode(self, needle: Needle) -> tuple[list[int], int]:
        """Tokens of a line feed and a needle, and how many of the last ones are the answer."""
        whole, question = (
            self.tokenizer("\n" + text, add_special_tokens=False)["input_ids"]
            for text in (needle.line, needle.question)
        )
        same = next((n for n, (a, b) in enumerate(zip(whole, question, strict=False)) if a != b), len(question))
        return whole, len(whole) - same

    def insert(self, code: np.ndarray, events: list[tuple[float, list[int], bool]]) -> tuple[np.ndarray, list[int]]:
        """Put lines at the line ends nearest to where they are wanted; at 1.0 they are appended.

        Args:
            code: Tokens.
            events: (share of the code before the line, its tokens, whether just there and not at a line end), in order.

        Returns:
            The longer sequence, and the index just after every inserted line.
        """
        ends = np.flatnonzero(self.begins_line_end[code])
        parts, marks, done, length = [], [], 0, 0
        for share, line, exact in events:
            at = len(code) if share >= 1.0 else round(share * len(code))
            if at < len(code) and len(ends) and not exact:
                at = int(ends[np.abs(ends - share * len(code)).argmin()])
            at = max(at, done)
            parts += [code[done:at], np.asarray(line)]
            length += at - done + len(line)
            marks.append(length)
            done = at
        return np.concatenate([*parts, code[done:]]), marks

    def needles(
        self, seqlen: int, kind: str | None = None, apart: int = 0, most: int | None = None, borders: float = 0.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Code with needles of one kind and one to three questions, the last mostly at the end.

        Args:
            seqlen: Tokens of the sequence.
            kind: As in `draw_needles`; None draws it.
            apart: Tokens of code between a needle and a question for it, at least.
            most: Needles, at most; by default one for every 100 tokens and one more, up to 9.
            borders: Share of needles that are moved to a border of two strides, half of them so that it would cut the
                answer; about half are cut (a border may be the text's end, or other lines may move them on).

        Returns:
            Tokens int64 ``[seqlen]`` and loss weights of each token as a target, float32 ``[seqlen]``.
        """
        rng = self.rng
        kind = str(rng.choice(KINDS, p=KIND_SHARES)) if kind is None else kind
        most = 1 + min(8, seqlen // 100) if most is None else most
        count = 1 if kind == "passkey" else int(rng.integers(1, 1 + most))
        lines = [self.encode(needle) for needle in draw_needles(rng, kind, count)]
        asked = [int(n) for n in rng.integers(0, count, rng.integers(1, 4))]  # needles are in the order of the text
        body = seqlen - sum(len(line) for line, _ in lines) - sum(len(lines[n][0]) for n in asked)
        latest = max(0.0, 1.0 - (apart + 16) / body)
        places = rng.random(count) * latest
        if rng.random() < 0.5:
            places *= rng.random()  # uniform places alone would favour middling distances
        places.sort()
        places, moved = self._at_borders(places, body, lines, borders, latest)
        events = [(place, *line, None, cut) for place, line, cut in zip(places, lines, moved, strict=True)]
        for number, n in enumerate(asked):
            earliest = min(places[n] + (apart + 16) / body, 1.0)
            last = number == 0 and (apart or rng.random() < 0.6)
            events.append((1.0 if last else rng.uniform(earliest, 1.0), *lines[n], n, False))
        events.sort(key=lambda event: event[0])
        sequence, marks = self.insert(self.code(body), [(place, line, cut) for place, line, _, _, cut in events])
        weights = np.ones(seqlen, np.float32)
        for (_, _, answer, question, _), mark in zip(events, marks, strict=True):
            weights[mark - answer : mark] = 0.0 if question is None else ANSWER_WEIGHT
        return sequence, weights

    def place(
        self, code: np.ndarray, lines: list[tuple[list[int], int]], borders: float
    ) -> tuple[np.ndarray, list[int]]:
        """Put lines anywhere into code.

        Args:
            code: Tokens.
            lines: As `encode` gives them, in the order of the text.
            borders: As in `needles`.

        Returns:
            The longer sequence, and the index just after every line.
        """
        places = np.sort(self.rng.random(len(lines)))
        places, moved = self._at_borders(places, len(code), lines, borders, 1.0)
        return self.insert(code, [(at, line, cut) for at, (line, _), cut in zip(places, lines, moved, strict=True)])

    def _at_borders(
        self, places: np.ndarray, body: int, lines: list[tuple[list[int], int]], share: float, latest: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Some of the places of needles, as shares of ``body`` tokens, moved to where a border cuts them; and which."""
        if not share:
            return places, np.zeros(len(places), bool)
        lengths, answers = np.array([(len(line), answer) for line, answer in lines]).T
        before = np.cumsum([0, *lengths[:-1]])  # tokens of the needles before each
        within = self.rng.random(len(lines)) < 0.5
        cut = np.where(within, lengths - self.rng.integers(1, np.maximum(answers, 2)), self.rng.integers(0, lengths))
        border = np.round((places * body + before) / STRIDE) * STRIDE
        moved = np.clip((border - cut - before) / body, 0.0, latest)
        chosen = self.rng.random(len(places)) < share
        places = np.where(chosen, moved, places)
        order = np.argsort(places, kind="stable")
        return places[order], chosen[order]

    def passkey(self, seqlen: int, depth: float, kind: str = "passkey") -> tuple[np.ndarray, int]:
        """Code with one needle at a depth (0 the start, 1 the end) and its question at the end, for evaluation.

        Returns:
            Tokens int64 ``[seqlen]`` and how many of the last ones are the answer.
        """
        line, answer = self.encode(draw_needles(self.rng, kind, 1)[0])
        code = self.code(seqlen - 2 * len(line))
        return self.insert(code, [(depth, line, False), (1.0, line, False)])[0], answer

    def copy(self, seqlen: int) -> tuple[np.ndarray, np.ndarray]:
        """A chunk that comes again; returns as `needles` does.

        Short sequences are tiled with their chunk from end to end, mostly one of random tokens: nothing
        but an induction head foresees those, and it formed within 80 steps of 4096 tokens so (it had
        not within 370 steps of sparser copies in 256 tokens).
        """
        rng, weights = self.rng, np.ones(seqlen, np.float32)
        chunk_len = int(rng.integers(6, seqlen // 3))
        kind, chunk = self._chunk(chunk_len)
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

    def far_copy(self, seqlen: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """A chunk of most of a window or more, tiled from end to end; returns as `needles` does.

        What comes next stands further back than most of a window, so that it is found through beacons or not at
        all: a loss at every token that rewards copying through memory. Passkeys alone reward it at a few tokens of a
        sequence, and after 3 million tokens nothing had formed.
        """
        weights = np.full(seqlen, COPY_WEIGHT, np.float32)
        chunk_len = int(self.rng.integers(window * 3 // 4, max(seqlen // 2, window * 3 // 4 + 1)))
        _, chunk = self._chunk(chunk_len)
        weights[:chunk_len] = 0.0
        return np.tile(chunk, seqlen // chunk_len + 1)[:seqlen], weights

    def _chunk(self, length: int) -> tuple[str, np.ndarray]:
        kind = str(self.rng.choice(("code", "shuffled", "uniform"), p=(0.2, 0.4, 0.4)))
        if kind == "uniform":
            return kind, self.rng.integers(1, self.vocab_size, length)
        return kind, self.code(length) if kind == "code" else self.rng.permutation(self.code(2000))[:length]

    def batch(self, rows: int, seqlen: int, needle_share: float, copy_share: float) -> tuple[np.ndarray, np.ndarray]:
        """Draw a batch; returns tokens and weights ``[rows, seqlen]``."""
        drawn = []
        for kind in self.rng.random(rows):
            if kind < needle_share:
                drawn.append(self.needles(seqlen))
            elif kind < needle_share + copy_share:
                drawn.append(self.copy(seqlen))
            else:
                drawn.append((self.code(seqlen), np.ones(seqlen, np.float32)))
        tokens, weights = zip(*drawn, strict=True)
        return np.stack(tokens), np.stack(weights)
