"""The wrapped model as the harness wants it: :class:`BeaconLM`, registered there as ``beacon``."""

from __future__ import annotations

import functools
import json
import logging
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from beacon.assets import default_model
from beacon.config import check_ratio
from beacon.evaluation.harness.answers import answer, end_ids, special_id
from beacon.evaluation.harness.contexts import Tokens
from beacon.evaluation.harness.methods import answer_by_method, choose_method, score_by_method
from beacon.evaluation.harness.reading import ContextReader, Question
from beacon.evaluation.harness.scoring import score
from beacon.evaluation.methods import Method, as_stock
from beacon.evaluation.methods.greedy import neutral_decoding
from beacon.evaluation.methods.held import native_context
from beacon.identity import Wrapping
from beacon.saving import load_adapter
from beacon.weights import CONFIG_FILE

logger = logging.getLogger(__name__)


def require_harness() -> None:
    """Raise an ImportError that says what to install if the harness is not there."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as err:
        raise ImportError(
            "standard tasks are run by EleutherAI's lm-evaluation-harness, got no module lm_eval; "
            "pip install 'activation-beacon[eval]'."
        ) from err


@functools.cache
def beacon_lm() -> Any:
    """The class ``BeaconLM``, made when it is first asked for: it derives from one of the harness's.

    Raises:
        ImportError: The harness is not installed.
    """
    require_harness()
    import lm_eval.models  # noqa: F401  (the registry fills itself only as long as it is empty)
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM

    name = "BeaconLM"
    members = {"__doc__": BeaconRequests.__doc__, "__module__": __name__, "__qualname__": name}
    return register_model("beacon")(type(name, (BeaconRequests, HFLM), members))


class BeaconRequests:
    """A wrapped model in the harness: contexts of any length, each read once, scored without the logits of all.

    Args:
        pretrained: A wrapped model; or, as ``from_pretrained`` takes it, what to load and wrap (``default``: the model
            that ships with the package).
        adapter: Where the beacons of a model that is loaded are: a folder or hub id. None takes those beside it.
        ratios: As in the model's forward (an int, or one per window); None for the configured policy.
        stock: Measure a model as the harness itself would, by its own code: texts are cut to their last tokens, as many
            as the native context holds. The model need not be wrapped. For the baseline of that name, which reads
            everything as in tasks of our own, see ``method``.
        method: Measure a baseline in place of the beacons, by name (``stock``, ``yarn``, ``truncate-middle``; see
            :func:`beacon.evaluation.make_method`) or a method itself. It reads what it reads anywhere else.
        batch_size: Contexts read together.
        max_length: Longest text, of which the end is read; None sets no limit.
        **kwargs: As of the harness's ``HFLM``, such as ``tokenizer``, ``device``, ``dtype``.

    Raises:
        CannotRun: ``method`` needs a question apart from the text.
        NotImplementedError: ``batch_size="auto"``.
        TypeError: A model that is not wrapped; ratios of another type.
        ValueError: No adapter, a ratio that the model cannot have, a ``max_length`` below 1, an unknown method, or
            one beside ``stock`` or ``ratios``.
    """

    model: Any
    tokenizer: Any
    cache_hook: Any
    rank: int
    batch_size: int
    device: torch.device
    max_gen_toks: int
    eot_token_id: int | None
    prefix_token_id: int
    think_end_token: Any
    mixed_precision_dtype: torch.dtype | None
    _model: Any
    _max_length: int | None

    def __init__(
        self,
        pretrained: Any,
        adapter: str | Path | None = None,
        ratios: int | list[int] | None = None,
        stock: bool = False,
        batch_size: int | str = 1,
        max_length: int | None = None,
        method: str | Method | None = None,
        **kwargs: Any,
    ) -> None:
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise NotImplementedError(
                f"batch_size must be a number of contexts, got {batch_size!r} (texts have no longest length to try "
                "'auto' with); pass for example 4."
            )
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be at least 1 token, got {max_length}; leave it out for no limit.")
        if method is not None and (stock or ratios is not None):
            raise ValueError(
                f"method says how texts are read, got stock={stock} and ratios={ratios} beside it; leave them out."
            )
        self.stock, self.ratios = bool(stock), ratios
        self.method: Method | None = None
        self._cuts = 0
        self._adapter: str | Path | None = None
        if isinstance(pretrained, (str, Path)):
            self._adapter = None if self.stock else _adapter_of(pretrained, adapter)
            pretrained = str(default_model() if str(pretrained) == "default" else pretrained)
            kwargs.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
        base: Any = super()
        base.__init__(pretrained, batch_size=int(batch_size), max_length=max_length, **kwargs)
        if not self.stock and not isinstance(getattr(self.model, "beacon_wrapping", None), Wrapping):
            raise TypeError(
                f"the model must be wrapped, got a {type(self.model).__name__}; call beacon.wrap or "
                "beacon.load_adapter first, or pass stock=True to measure it as it is."
            )
        if not self.stock:
            _check_ratios(ratios, self.model.beacon_config.step)
        if method is not None:
            self.method, self.ratios = choose_method(method, self.model, self.tokenizer)
        self.ends = end_ids(self.model, self.tokenizer)

    def _create_model(self, *args: Any, **kwargs: Any) -> None:
        base: Any = super()
        base._create_model(*args, **kwargs)
        if self._adapter is not None:
            self._model = load_adapter(self._model, self._adapter)

    @property
    def max_length(self) -> int:
        """Longest text: for the wrapped model there is none unless the caller set one."""
        if self._max_length:
            return self._max_length
        if not self.stock:
            return sys.maxsize
        if isinstance(getattr(self.model, "beacon_wrapping", None), Wrapping):
            return native_context(self.model)
        base: Any = super()
        longest: int = base.max_length
        return longest

    # -- requests ----------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Score continuations, given as (strings, tokens of the context, tokens of the continuation)."""
        if self.stock:
            base: Any = super()
            with as_stock(self.model):
                results: list[tuple[float, bool]] = base._loglikelihood_tokens(requests, disable_tqdm, override_bs)
                return results
        done = {number: (0.0, True) for number, (_, _, tokens) in enumerate(requests) if not tokens}
        if self.method is not None:
            return self._scored_by_method(self.method, requests, done, disable_tqdm)
        askers = self._askers({n: requests[n] for n in range(len(requests)) if n not in done})
        with self._bar(len(requests), "scoring", disable_tqdm) as bar, self._autocast():
            for reading in self._reader().read(askers):
                part = [(row, number) for row, question in enumerate(reading.questions) for number in askers[question]]
                scores = score(self.model, reading, [(row, tuple(requests[number][2])) for row, number in part])
                for (_, number), result in zip(part, scores, strict=True):
                    done[number] = result
                    if requests[number][0] is not None:  # documents have a key of their own
                        self.cache_hook.add_partial("loglikelihood", requests[number][0], result)
                bar.update(len(part))
        return [done[number] for number in range(len(requests))]

    def _scored_by_method(
        self,
        method: Method,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        done: dict[int, tuple[float, bool]],
        disable_tqdm: bool,
    ) -> list[tuple[float, bool]]:
        texts: dict[int, tuple[Tokens, Tokens]] = {}
        for number, (_, context, tokens) in enumerate(requests):
            if tokens:
                kept = self._fitting(tuple(context) or (self.prefix_token_id,), len(tokens) - 1)
                texts[number] = kept, tuple(tokens)
        self._report_cuts()
        with self._bar(len(requests), "scoring", disable_tqdm) as bar, self._autocast():
            for scored in score_by_method(method, self.model, texts):
                done |= scored
                for number, result in scored.items():
                    if requests[number][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[number][0], result)
                bar.update(len(scored))
        return [done[number] for number in range(len(requests))]

    def _askers(self, requests: dict[int, tuple[Any, list[int], list[int]]]) -> dict[Question, list[int]]:
        """What must be read for continuations to be scored, with the numbers of the requests that ask for it."""
        alike: dict[Tokens, list[int]] = defaultdict(list)
        for number, (_, tokens, _) in requests.items():
            alike[tuple(tokens) or (self.prefix_token_id,)].append(number)
        kept: dict[Tokens, list[int]] = defaultdict(list)
        for whole, numbers in alike.items():
            # the last token of all foresees nothing that is asked
            kept[self._fitting(whole, max(len(requests[number][2]) for number in numbers) - 1)] += numbers
        self._report_cuts()
        askers: dict[Question, list[int]] = defaultdict(list)
        for context, numbers in kept.items():
            # one token, such as the prefix before a document, is nothing to share
            for group in [numbers] if len(context) > 1 else [[number] for number in numbers]:
                askers[context, max(len(requests[number][2]) for number in group)] += group
        return askers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole documents, each read once from its beginning to its end."""
        base: Any = super()
        if self.stock:
            results: list[float] = base.loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
            return results
        texts, sums = [request.args[0] for request in requests], []
        with self._bar(len(texts), "scoring", disable_tqdm) as bar:
            for first in range(0, len(texts), self.batch_size):
                some = texts[first : first + self.batch_size]
                parts = [(None, [self.prefix_token_id], base.tok_encode(text)) for text in some]
                for text, (total, _) in zip(some, self._loglikelihood_tokens(parts, disable_tqdm=True), strict=True):
                    self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
                    sums.append(total)
                bar.update(len(some))
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers to contexts, each up to one of its stop strings or an end token."""
        if self.stock:
            base: Any = super()
            with as_stock(self.model):
                results: list[str] = base.generate_until(requests, disable_tqdm=disable_tqdm)
                return results
        alike: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            alike[json.dumps(request.args[1], sort_keys=True, default=str)].append(number)
        done: dict[int, str] = {}
        with self._bar(len(requests), "answering", disable_tqdm) as bar, self._autocast():
            for numbers in alike.values():
                texts = {number: requests[number].args[0] for number in numbers}
                for answered in self._answers(texts, requests[numbers[0]].args[1]):
                    done |= answered
                    for number, text in answered.items():
                        self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    bar.update(len(answered))
        return [done[number] for number in range(len(requests))]

    def _answers(self, texts: dict[int, str], given: dict[str, Any]) -> Iterator[dict[int, str]]:
        """Answers by request number, batch by batch, to contexts that share their generation settings."""
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

        settings: dict[str, Any] = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        eos = None if self.eot_token_id is None else self.tokenizer.decode(self.eot_token_id)
        stops = handle_stop_sequences(settings.pop("until", None), eos=eos)
        named = {stop: special_id(self.tokenizer, stop) for stop in stops}
        ends = sorted({*self.ends, *(token for token in named.values() if token is not None)})
        spelled = [stop for stop, token in named.items() if token is None]  # to be looked for after every token
        room = settings.pop("max_gen_toks")
        if settings.pop("max_length", None) is not None:
            logger.warning("max_length among the generation settings is not used: max_gen_toks limits an answer")
        if not settings["do_sample"]:
            settings.pop("temperature", None)
        asked: dict[Question, list[int]] = defaultdict(list)
        for number, text in texts.items():
            asked[self._fitting(self._encode(text), room), room].append(number)
        self._report_cuts()
        if self.method is not None:
            contexts = ((context, numbers) for (context, _), numbers in asked.items())
            for numbers, tokens in answer_by_method(self.method, self.model, contexts, room, ends, settings):
                yield dict.fromkeys(numbers, self._text(tokens, stops))
            return
        for reading in self._reader().read(asked):
            # a greedy answer is the same for all who ask, drawn ones are not
            groups = [
                (row, group)
                for row, question in enumerate(reading.questions)
                for group in ([[number] for number in asked[question]] if settings["do_sample"] else [asked[question]])
            ]
            answers = answer(
                self.model,
                self.tokenizer,
                reading,
                [row for row, _ in groups],
                max_new_tokens=room,
                stops=spelled,
                ends=ends,
                **settings,
            )
            yield {
                number: self._text(tokens, stops)
                for (_, group), tokens in zip(groups, answers, strict=True)
                for number in group
            }

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **settings: Any) -> Any:
        """What the harness's own code decodes with: the stock model by the same rules, up to the same tokens."""
        base: Any = super()
        with neutral_decoding(self.model):
            return base._model_generate(context, max_length, stop, **{"eos_token_id": self.ends or None, **settings})

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text.

        Raises:
            ValueError: The tokenizer has no chat template.
        """
        check_chat_template(self.tokenizer)
        base: Any = super()
        text: str = base.apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt)
        return text

    # -- parts -------------------------------------------------------------------------------------------------------

    def _reader(self) -> ContextReader:
        return ContextReader(self.model, self.ratios, self.batch_size)

    def _encode(self, text: str) -> Tokens:
        base: Any = super()
        return tuple(base.tok_encode(text)) or (self.prefix_token_id,)

    def _text(self, tokens: list[int], stops: list[str]) -> str:
        """The answer as the task gets it: without thoughts, special tokens, and what follows a stop string."""
        from lm_eval.models.utils import postprocess_generated_text

        thought = self.think_end_token
        thinks = isinstance(thought, int) and thought in tokens
        if thinks:
            tokens = tokens[len(tokens) - tokens[::-1].index(thought) :]
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        stripped: str = postprocess_generated_text(
            generation=text.lstrip() if thinks else text,
            stop=stops,
            think_end_token=thought if isinstance(thought, str) else None,
        )
        return stripped

    def _fitting(self, context: Tokens, room: int) -> Tokens:
        """The end of a context that leaves room in the longest text allowed; all of it as a rule."""
        limit = self.max_length - room
        if limit < 1:
            raise ValueError(
                f"max_length must leave room for a context, got {self.max_length} for {room} tokens after it; raise it."
            )
        if len(context) > limit:
            self._cuts += 1
            return context[-limit:]
        return context

    def _report_cuts(self) -> None:
        if self._cuts:
            logger.warning("%d contexts were cut to their ends: max_length is %d", self._cuts, self.max_length)
        self._cuts = 0

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = self.mixed_precision_dtype
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def _bar(self, total: int, what: str, hidden: bool) -> Any:
        from tqdm import tqdm

        settings = (
            {"disable": True} if hidden or self.rank else {}
        )  # else tqdm's own default, which a caller may change
        return tqdm(total=total, desc=what, **settings)


def check_chat_template(tokenizer: Any) -> None:
    """Refuse a tokenizer without a chat template.

    Raises:
        ValueError: It has none.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the chat template needs a tokenizer that has one, got one without; leave chat_template out, or set "
            "tokenizer.chat_template to the format that the model was trained with."
        )


def _adapter_of(pretrained: str | Path, adapter: str | Path | None) -> str | Path:
    if adapter is not None:
        return adapter
    if str(pretrained) == "default":
        return default_model() / "adapter"
    if (Path(pretrained) / CONFIG_FILE).is_file():
        return pretrained
    raise ValueError(
        f"adapter must name the beacons of {pretrained}, got none and no {CONFIG_FILE} beside it; pass adapter=FOLDER, "
        "or stock=True to measure the model without beacons."
    )


def _check_ratios(ratios: Any, stride: int) -> None:
    if ratios is None:
        return
    if not isinstance(ratios, (int, list)):
        raise TypeError(f"ratios must be an int, a list of ints or None, got {ratios!r}; pass for example 8.")
    for ratio in ratios if isinstance(ratios, list) else [ratios]:
        check_ratio(ratio, stride)
