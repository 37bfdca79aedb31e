"""A baseline in the harness: continuations by the logits that it reads, answers by its greedy ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from beacon.evaluation.failures import CannotRun
from beacon.evaluation.harness.contexts import Tokens
from beacon.evaluation.harness.scoring import MAX_LOGITS
from beacon.evaluation.methods import Beacon, BeaconPolicy, Method, make_method
from beacon.evaluation.methods.held import native_context

GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}


def choose_method(method: str | Method, model: Any, tokenizer: Any) -> tuple[Method | None, int | list[int] | None]:
    """What reads: a method, or none and the ratios where beacons do, which the harness's model reads in batches.

    Raises:
        CannotRun: The method needs a question apart from the text.
        ValueError: An unknown name.
    """
    chosen = make_method(method, model, tokenizer=tokenizer) if isinstance(method, str) else method
    if chosen == BeaconPolicy("retrieval"):
        raise CannotRun("retrieval keeps detail where a question points, which the harness does not tell from the text")
    if isinstance(chosen, Beacon):
        return None, list(chosen.ratios) if isinstance(chosen.ratios, tuple) else chosen.ratios
    return chosen, None


def score_by_method(
    method: Method, model: Any, requests: Mapping[int, tuple[Tokens, Tokens]]
) -> Iterator[dict[int, tuple[float, bool]]]:
    """Score continuations.

    Args:
        method: How texts are read.
        model: A wrapped model.
        requests: Context and continuation by number, neither empty.

    Yields:
        By number the sum of the continuation's log-probabilities, in nats, and whether greedy decoding would give it.
        What reads the same, as single letters after one question do, is read once.
    """
    alike: dict[tuple[Tokens, int], list[int]] = defaultdict(list)
    for number, (context, continuation) in requests.items():
        alike[(*context, *continuation[:-1]), len(continuation)].append(number)
    for (text, count), numbers in alike.items():
        targets = torch.tensor([requests[number][1] for number in numbers])  # [continuations, count]
        total, greedy = torch.zeros(len(numbers), dtype=torch.float64), torch.ones(len(numbers), dtype=torch.bool)
        start = len(text) - count
        for first, stop in _pieces(count, _most(model)):
            ids = torch.tensor(text[: start + stop], device=model.device)
            with torch.no_grad():
                logits = method.read(model, ids, stop - first).logits
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # [piece, vocab]
            wanted = targets[:, first:stop].to(logits.device)
            picked = logits[torch.arange(stop - first, device=logits.device), wanted] - logits.logsumexp(dim=-1)
            total += picked.double().sum(dim=1).cpu()
            greedy &= (logits.argmax(dim=-1) == wanted).all(dim=1).cpu()
        yield dict(zip(numbers, zip(total.tolist(), greedy.tolist(), strict=True), strict=True))


def answer_by_method(
    method: Method,
    model: Any,
    contexts: Iterable[tuple[Tokens, Sequence[int]]],
    max_new_tokens: int,
    ends: Sequence[int],
    settings: Mapping[str, Any],
) -> Iterator[tuple[Sequence[int], list[int]]]:
    """Answer contexts. The harness does not tell a text from its question: the question is the last token.

    Args:
        method: How contexts are read.
        model: A wrapped model.
        contexts: Token ids, with the numbers of the requests that ask for them.
        max_new_tokens: Tokens of an answer at most.
        ends: Token ids that end an answer.
        settings: Other settings of ``generate``.

    Yields:
        The numbers and the tokens of their answer.

    Raises:
        NotImplementedError: Settings under which an answer is not greedy.
    """
    other = [f"{name}={settings[name]}" for name, plain in GREEDY.items() if settings.get(name, plain) != plain]
    if other:
        raise NotImplementedError(
            f"{method.name} answers greedily, got {', '.join(other)}; leave the task out, or measure it with beacons."
        )
    for context, numbers in contexts:
        yield numbers, method.answers(model, context[:-1], [context[-1:]], max_new_tokens, ends)[0]


def _most(model: Any) -> int:
    """Tokens whose logits are read at once: what methods that cut texts can tell, and what memory holds."""
    return max(1, min(native_context(model) // 2, MAX_LOGITS // model.config.vocab_size))


def _pieces(count: int, most: int) -> Iterator[tuple[int, int]]:
    for first in range(0, count, most):
        yield first, min(first + most, count)
