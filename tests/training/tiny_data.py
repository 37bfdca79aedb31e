"""Small files to train on, and a tokenizer with chat templates."""

import copy
import json
from functools import cache
from pathlib import Path

from transformers import AutoTokenizer

from beacon import default_model
from beacon.training.data import DataConfig, build_dataset

HEAD = "{% for m in messages %}<{{ m.role }}>\n"
END = "{% endfor %}{% if add_generation_prompt %}<assistant>\n{% endif %}"
PLAIN = HEAD + "{{ m.content }}<|endoftext|>\n" + END
MARKED = (
    HEAD + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|endoftext|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|endoftext|>{% endif %}{{ '\n' }}" + END
)
# Drops what the assistant said before, as templates of reasoning models drop earlier thoughts.
FORGETFUL = HEAD + "{% if m.role != 'assistant' or loop.last %}{{ m.content }}{% endif %}<|endoftext|>\n" + END

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "what is one plus one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "and one more"},
    {"role": "assistant", "content": "three of them"},
]


@cache
def _tokenizer():
    return AutoTokenizer.from_pretrained(default_model())


def tokenizer(template: str | None = None):
    """The shipped model's tokenizer, to be changed at will."""
    own = copy.deepcopy(_tokenizer())
    own.chat_template = template
    return own


def write_jsonl(path: Path, rows: list) -> str:
    """A file with a line for each row; strings are lines already."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def words(count: int, word: str = "def") -> str:
    """A text of ``count`` tokens."""
    return " ".join([word] * count)


def build(sources, *, template: str | None = None, window: int = 8, stride: int = 4, **settings):
    """The data set and the report of some sources."""
    config = DataConfig(sources=sources, **settings)
    return build_dataset(config, tokenizer(template), window=window, stride=stride)


def origins(dataset) -> list[str]:
    return [example["origin"] for example in dataset]
