"""Read a long text once, ask it several things: the README's ten lines on the shipped model.

python examples/quickstart.py
"""

import argparse
import inspect

from transformers import AutoModelForCausalLM, AutoTokenizer

import beacon


def long_text(key: str) -> str:
    """About 4,000 tokens of real code with a passkey in the middle."""
    code = inspect.getsource(argparse)
    middle = code.index("\n", 6000) + 1
    return code[:middle] + f"# the pass key is {key}\n" + code[middle:13000]


def main() -> None:
    """Compress once, fork and ask."""
    folder = beacon.default_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = beacon.load_adapter(AutoModelForCausalLM.from_pretrained(folder), folder / "adapter")

    ids = tokenizer(long_text("48213"), return_tensors="pt").input_ids
    cache = model.compress(ids, ratios=8)
    print(cache.stats()[0])
    for question, count in (("\n# the pass key is ", 2), ("\n\nclass ArgumentParser(", 5)):  # a key is two tokens
        new = tokenizer(question, return_tensors="pt").input_ids
        answer = model.generate(new, past_key_values=cache.fork(), max_new_tokens=count, do_sample=False)
        print(repr(tokenizer.decode(answer[0])))


if __name__ == "__main__":
    main()
