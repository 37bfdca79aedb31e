"""Every method by name, so that one run compares them. A new one is a class and a line of the table here."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from beacon.config import POLICIES, check_ratio
from beacon.evaluation.methods.condensed import Beacon
from beacon.evaluation.methods.fine_tuned import FineTuned
from beacon.evaluation.methods.held import native_context
from beacon.evaluation.methods.interface import Method
from beacon.evaluation.methods.kvpress import KVPress
from beacon.evaluation.methods.policy_ratios import BeaconPolicy
from beacon.evaluation.methods.rope_scaling import RopeScaled
from beacon.evaluation.methods.sliding_window import SlidingWindow
from beacon.evaluation.methods.stock import Stock
from beacon.evaluation.methods.truncation import TruncateLeft, TruncateMiddle
from beacon.identity import Wrapping

SINKS = 4
ROPE_TYPES = {"pi": "linear", "dynamic-ntk": "dynamic", "yarn": "yarn"}  # as transformers calls them


@dataclass(frozen=True)
class Baseline:
    """A line of the table.

    Args:
        what: One line of what it is.
        make: Makes it for a model, from options.
        value: The option that stands behind a colon, if any, and how it is called in messages.
        needed: It must be given.
    """

    what: str
    make: Callable[..., Method]
    value: tuple[str, str] | None = None
    needed: bool = False

    def value_in(self, options: Mapping[str, Any]) -> bool:
        """Whether options have what may stand behind a colon."""
        return self.value is not None and bool(options.get(self.value[0]))


def make_method(name: str, model: Any, **options: Any) -> Method:
    """A method by its name.

    Args:
        name: One of ``METHODS``, with a value behind a colon where it takes one: ``beacon:8``, ``beacon:adaptive``,
            ``sliding-window:1024``, ``yarn:4``, ``snapkv:16``, ``fine-tuned:PATH``. It goes before the same option.
        model: The wrapped model that it will read with.
        **options: What else it takes: ``ratio`` or ``policy`` (beacon), ``window`` and ``sinks`` (sliding-window),
            ``factor`` (pi, dynamic-ntk, yarn), ``ratio`` and ``python`` (an interpreter that has kvpress; snapkv,
            expected-attention, streaming-llm, kvzip), ``path`` (fine-tuned). ``tokenizer`` is the model's; those who
            have no use for it ignore it.

    Returns:
        The method.

    Raises:
        TypeError: An option that it does not take, or a model that is not wrapped.
        ValueError: An unknown name, or a value that it cannot have.
    """
    kind, given = check_method(name, **options)
    if not isinstance(getattr(model, "beacon_wrapping", None), Wrapping):
        raise TypeError(f"methods read with a wrapped model, got {type(model).__name__}; call beacon.wrap first.")
    return _TABLE[kind].make(model, **given)


def check_method(name: str, **options: Any) -> tuple[str, dict[str, Any]]:
    """Find out whether there is a method of this name and with these options, before there is a model.

    Returns:
        The name without its value, and all options that it takes.

    Raises:
        TypeError: An option that it does not take.
        ValueError: An unknown name, or one of a folder that is not there.
    """
    kind, colon, value = name.partition(":")
    line = _TABLE.get(kind)
    if line is not None and line.value is not None and colon:
        options[line.value[0]] = value
    spelled = line is not None and (not colon or (line.value is not None and value != ""))
    if line is None or not spelled or (line.needed and not line.value_in(options)):
        close = difflib.get_close_matches(kind, _TABLE)
        hint = f" (did you mean {', '.join(close)}?)" if close and close != [kind] else ""
        raise ValueError(f"method must be one of {', '.join(map(method_form, _TABLE))}; got {name!r}{hint}.")
    known = list(inspect.signature(line.make).parameters)[1:]
    unknown = sorted(set(options) - {*known, "tokenizer"})
    if unknown:
        raise TypeError(f"{kind} takes {', '.join(known) or 'no option'}, got {', '.join(unknown)}; leave it out.")
    if kind == "fine-tuned":
        _check_folder(str(options["path"]))
    return kind, {option: options[option] for option in known if option in options}


def named_option(name: str) -> str | None:
    """The option whose value stands behind the colon of a method's name; None without one."""
    kind, colon, _ = name.partition(":")
    line = _TABLE.get(kind)
    return line.value[0] if colon and line is not None and line.value is not None else None


def _check_folder(path: str) -> None:
    """A hub id cannot be told from ``owner/name``, but what can only be a folder must be one."""
    if (path.startswith((".", "/", "~")) or path.count("/") > 1) and not Path(path).is_dir():
        raise ValueError(
            f"fine-tuned must name a model's folder or hub id, got {path!r}, where there is no folder; correct the "
            "path, or write owner/name."
        )


def method_form(name: str) -> str:
    """How a method is written, with the value that it may or must have."""
    line = _TABLE[name]
    if line.value is None:
        return name
    return f"{name}:{line.value[1]}" if line.needed else f"{name}[:{line.value[1]}]"


def _beacon(model: Any, ratio: int | str | None = None, policy: str | None = None) -> Method:
    if isinstance(ratio, str) and not ratio.isdigit():  # behind the colon is either
        if ratio not in POLICIES:
            raise ValueError(f"beacon takes a ratio or one of {', '.join(POLICIES)}, got {ratio!r}; as in beacon:8.")
        if policy not in (None, ratio):
            raise ValueError(f"beacon takes one policy, got {ratio} and {policy}; leave one out.")
        ratio, policy = None, ratio
    if ratio is not None and policy is not None:
        raise ValueError(f"beacon takes a ratio or a policy, got ratio={ratio} and policy={policy}; leave one out.")
    if ratio is not None:
        return Beacon(check_ratio(int(ratio), model.beacon_config.step))
    if policy is None or policy == model.beacon_config.ratio_policy != "retrieval":
        return Beacon()
    return BeaconPolicy(policy)


def _sliding_window(model: Any, window: int | str | None = None, sinks: int = SINKS) -> Method:
    most = native_context(model) - sinks
    window = most if window is None else _number("sliding-window", window, int)
    if window < 1 or sinks < 0:
        raise ValueError(
            f"window must be at least 1 and sinks at least 0, got window={window} and sinks={sinks}; choose others."
        )
    return SlidingWindow(window, sinks)


def _rope(name: str, model: Any, factor: float | str | None = None) -> Method:
    kind: Any = ROPE_TYPES[name]
    return RopeScaled(kind, None if factor is None else _number(name, factor, float))


def _press(press: str, model: Any, ratio: float | str = 8, python: Any = None, tokenizer: Any = None) -> Method:
    return KVPress(press, _number(press, ratio, float), tokenizer, python)


def _number(name: str, value: Any, kind: Any) -> Any:
    try:
        return kind(value)
    except ValueError as err:
        raise ValueError(f"{name} takes a number, got {value!r}; as in {name}:8.") from err


_RATIO = ("ratio", "RATIO")
_FACTOR = ("factor", "FACTOR")
_TABLE = {
    "beacon": Baseline("condensed reading, at a ratio or by a policy", _beacon, ("ratio", "RATIO|POLICY")),
    "stock": Baseline("the stock model, which reads everything", lambda model: Stock()),
    "truncate-middle": Baseline(
        "the stock model reads beginning and end, as LongBench cuts texts", lambda model: TruncateMiddle()
    ),
    "truncate-left": Baseline("the stock model reads the end", lambda model, tokenizer=None: TruncateLeft(tokenizer)),
    "sliding-window": Baseline(
        "the stock model sees the first tokens (attention sinks) and the last", _sliding_window, ("window", "WINDOW")
    ),
    "pi": Baseline("position interpolation: all positions divided by a factor", partial(_rope, "pi"), _FACTOR),
    "dynamic-ntk": Baseline("dynamic NTK: the rotary base grows with the text", partial(_rope, "dynamic-ntk"), _FACTOR),
    "yarn": Baseline("YaRN: slow rotary frequencies divided by a factor", partial(_rope, "yarn"), _FACTOR),
    "snapkv": Baseline("kvpress: what the last tokens attend to stays", partial(_press, "snapkv"), _RATIO),
    "expected-attention": Baseline(
        "kvpress: what future tokens are expected to attend to stays", partial(_press, "expected-attention"), _RATIO
    ),
    "streaming-llm": Baseline(
        "kvpress: the first and the last keys and values stay", partial(_press, "streaming-llm"), _RATIO
    ),
    "kvzip": Baseline(
        "kvpress: what repeating the text needs stays (the rest is masked, not freed)", partial(_press, "kvzip"), _RATIO
    ),
    "fine-tuned": Baseline(
        "another model, fully fine-tuned on long texts", lambda model, path: FineTuned(path), ("path", "PATH"), True
    ),
}
METHODS: dict[str, str] = {name: line.what for name, line in _TABLE.items()}
