import json
import logging
import math
import random
import sys

import numpy
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_outputs import CausalLMOutputWithPast

import beacon
from beacon.evaluation import Beacon, ask_passkey, encode, measure_perplexity
from beacon.training.evaluation import EvaluationConfig, LongContextEvaluation, MetricName
from beacon.training.plots import _say_missing, draw
from beacon.training.records import EVALUATIONS, append_record, drop_after, read_records
from tests.evaluation.tiny import CODE, word_tokenizer
from tests.tiny_models import randomize, tiny_model

APPEND = {"window": 16, "stride": 8, "ratios": (4, 2, 8), "ratio_policy": "sequence", "sink": 2}
INTERLEAVE = {
    "window": 16,
    "ratios": (4, 2),
    "ratio_policy": "sequence",
    "placement": "interleave",
    "attention": "full-coverage",
    "attend_beacons": True,
}


def wrapped(settings=None, **changes):
    model = beacon.wrap(tiny_model(vocab_size=320, **changes), beacon.BeaconConfig(**(settings or APPEND)))
    return randomize(model, only="beacon", seed=1)


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture(scope="module")
def shipped():
    folder = beacon.default_model()
    model = beacon.load_adapter(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), folder / "adapter"
    )
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "code.py"
    path.write_text(CODE)
    return str(path)


@pytest.fixture
def alone():
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Oracle(torch.nn.Module):
    """Foresees every next token but those at some places of the answer, and notes how it was called."""

    def __init__(self, wrong=()):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.wrong, self.calls = wrong, []

    def forward(self, input_ids, labels=None, logits_to_keep=0, ratios=None, use_cache=None):
        assert not torch.is_grad_enabled() and not self.training
        self.calls.append((input_ids.clone(), labels, logits_to_keep, ratios, use_cache))
        if labels is not None:
            return CausalLMOutputWithPast(loss=self.weight.sum() + math.log(3))
        foreseen = input_ids[0].roll(-1)[-logits_to_keep:].clone()
        foreseen[list(self.wrong)] += 1
        return CausalLMOutputWithPast(logits=torch.nn.functional.one_hot(foreseen, 400)[None].float())


# -- numbers -----------------------------------------------------------------------------------------------------------


# `measure_perplexity` does not read the last token, and its text goes on. In append placement no target sees beacons of
# its own window; in interleave those of the last window do, unless that holds the last token only: whole windows + 1.
@pytest.mark.parametrize("settings, lengths", [(APPEND, (32, 96, 171)), (INTERLEAVE, (33, 97, 161))])
def test_perplexity_is_what_the_evaluation_package_measures(settings, lengths, tokenizer, source):
    model = wrapped(settings, dtype=torch.float64)
    config = EvaluationConfig(source=source, lengths=lengths, texts=3, targets=20, ratios=(None, 2, 8))
    found = LongContextEvaluation(config, tokenizer)(model)
    texts = list(encode(tokenizer, CODE).split(max(lengths)))[:3]
    for ratio in config.ratios:
        for length in lengths:
            expected = measure_perplexity(model, texts, length, 20, Beacon(ratio))
            # It rounds logits of up to 50 to float32 (6e-8 of them); all else is float64.
            name = f"perplexity_{length}" + ("" if ratio is None else f"_ratio_{ratio}")
            assert math.log(found.pop(name)) == pytest.approx(expected.loss, abs=1e-5)
    assert not found


def test_shipped_model_with_weakened_beacons(shipped):
    """Weakened, as the comparison says little where every key is found."""
    model, tokenizer = shipped
    config = EvaluationConfig(
        lengths=(300, 1024), texts=2, targets=128, ratios=(8, 32), passkey_lengths=(600,), passkey_depths=(0.2, 0.8)
    )
    evaluation = LongContextEvaluation(config, tokenizer)
    evaluation.check(model.beacon_config)
    whole = evaluation(model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.beacon_v_proj.weight.mul_(0.3)
    found = evaluation(model)
    texts, prompts = evaluation._texts, evaluation._prompts[600]
    assert len(prompts) == 4 and {len(prompt.ids) for prompt in prompts} == {600}
    exact = []
    for ratio in (8, 32):
        for length in (300, 1024):
            expected = measure_perplexity(model, texts, length, 128, Beacon(ratio)).loss
            # float32, windows grouped into passes in another way: logits differ by rounding, at most 1e-5 each.
            assert math.log(found[f"perplexity_{length}_ratio_{ratio}"]) == pytest.approx(expected, abs=1e-5)
        greedy = [ask_passkey(model, tokenizer, prompt, Beacon(ratio)).exact for prompt in prompts]
        assert found[f"passkey_exact_600_ratio_{ratio}"] == sum(greedy) / 4
        exact += greedy
    assert 0 < sum(exact) < 8
    assert whole["perplexity_1024_ratio_8"] < found["perplexity_1024_ratio_8"]
    assert 10 < whole["perplexity_300_ratio_8"] < found["perplexity_300_ratio_8"] < 60
    assert whole["passkey_exact_600_ratio_8"] == 1.0
    assert found["passkey_600_ratio_8"] > found["passkey_exact_600_ratio_8"]


# With 78 tokens "adaptive" takes ratio 2 as long as it does not know of the 5 that follow, and 4 if it does.
@pytest.mark.parametrize("policy", ["sequence", "adaptive"])
@pytest.mark.parametrize("right", [(1, 1, 1, 1, 1), (1, 0, 1, 1, 0), (0, 0, 0, 0, 0)])
def test_passkey_tokens_are_those_of_reading_step_by_step(policy, right, tokenizer, source):
    settings = {"ratios": (2, 4, 8), "ratio_policy": policy, "native_context": 48, "reserve": 0}
    model = wrapped({**APPEND, **settings})
    config = EvaluationConfig(source=source, texts=2, passkey_lengths=(78,), passkey_depths=(0.3, 0.6), passkey_seed=1)
    evaluation = LongContextEvaluation(config, tokenizer)
    for prompt in evaluation._prompts[78]:
        # A random model never finds the digits, so the answer becomes what it foresees, or anything else.
        answer: list[int] = []
        for place in right:
            ids = torch.cat([prompt.ids, torch.tensor(answer, dtype=torch.int64)])
            foreseen = int(model(ids[None], expected_length=83).logits[0, -1].argmax())
            answer.append(foreseen if place else (foreseen + 1) % 256)
        object.__setattr__(prompt, "answer", tuple(answer))
    assert evaluation(model) == {"passkey_78": pytest.approx(sum(right) / 5), "passkey_exact_78": float(all(right))}


@pytest.mark.parametrize("wrong, share, exact", [((), 1.0, 1.0), ((0,), 0.8, 0.0), ((4,), 0.8, 0.0), ((5,), 1.0, 1.0)])
def test_passkey_shares(wrong, share, exact, tokenizer, source):
    config = EvaluationConfig(source=source, texts=2, passkey_lengths=(100, 200), passkey_seed=3)
    found = LongContextEvaluation(config, tokenizer)(Oracle(wrong))
    assert found == {
        "passkey_100": pytest.approx(share),
        "passkey_exact_100": exact,
        "passkey_200": pytest.approx(share),
        "passkey_exact_200": exact,
    }


def test_calls(tokenizer, source):
    config = EvaluationConfig(
        source=source,
        lengths=(60, 40),
        texts=2,
        targets=20,
        ratios=(None, 8),
        passkey_lengths=(90,),
        passkey_depths=(0.5,),
    )
    oracle = Oracle()
    evaluation = LongContextEvaluation(config, tokenizer)
    found = evaluation(oracle)
    assert found["perplexity_60"] == pytest.approx(3)
    assert [(ids.shape, keep, ratios, cache) for ids, _, keep, ratios, cache in oracle.calls] == [
        (shape, keep, ratio, False)
        for ratio in (None, 8)
        for shape, keep in [((1, 60), 0)] * 2 + [((1, 40), 0)] * 2 + [((1, 95), 6)] * 2
    ]
    long, short = oracle.calls[0], oracle.calls[2]
    assert torch.equal(long[0][:, -40:], short[0])  # only the beginning moves, not the targets
    for ids, labels, *_ in (long, short):
        assert torch.equal(labels[:, -20:], ids[:, -20:]) and bool((labels[:, :-20] == -100).all())
    evaluation(oracle)
    half = len(oracle.calls) // 2
    assert all(torch.equal(a[0], b[0]) for a, b in zip(oracle.calls[:half], oracle.calls[half:], strict=True))
    without = EvaluationConfig(source=source, lengths=(60, 40), texts=2, targets=20)
    alone = Oracle()
    LongContextEvaluation(without, tokenizer)(alone)  # passkeys in longer texts do not move the targets of text 0
    assert torch.equal(alone.calls[0][0], long[0])


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_wrapped_for_several_processes(way, tokenizer, source, alone, monkeypatch):
    config = EvaluationConfig(
        source=source, lengths=(50, 120), texts=2, targets=20, ratios=(None, 2), passkey_lengths=(90,)
    )
    evaluation = LongContextEvaluation(config, tokenizer)
    model = wrapped().train()
    expected = evaluation(model)
    for name in ("compress", "generate"):
        monkeypatch.setattr(type(model), name, None)
    if way == "ddp":
        outer = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        outer = fully_shard(model, mesh=mesh)
    assert evaluation(outer) == expected
    assert outer.training and model.training
    ids = torch.arange(100)[None]
    outer(input_ids=ids, labels=ids).loss.backward()  # training goes on
    assert model.model.beacon_embed_tokens.weight.grad is not None


# -- nothing else changes ----------------------------------------------------------------------------------------------


def test_modes_come_back(tokenizer, source):
    config = EvaluationConfig(source=source, lengths=(50,), texts=1, targets=20)
    model = wrapped(attention_dropout=0.5)
    expected = LongContextEvaluation(config, tokenizer)(model)
    model.train()
    model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    assert LongContextEvaluation(config, tokenizer)(model) == expected  # without dropout
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.is_grad_enabled()
    broken = LongContextEvaluation(EvaluationConfig(source=source, lengths=(50,), targets=20, ratios=(3,)), tokenizer)
    with pytest.raises(ValueError, match="stride must divide by ratio"):
        broken(model)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.is_grad_enabled()


def test_random_states_stay(tokenizer, source):
    config = EvaluationConfig(source=source, lengths=(50,), texts=2, targets=20, passkey_lengths=(60,))
    model = wrapped({**APPEND, "ratio_policy": "step-random"}, attention_dropout=0.5).train()
    torch.manual_seed(5), random.seed(5), numpy.random.seed(5)

    def states():
        name, keys, *rest = numpy.random.get_state()
        return torch.get_rng_state().tolist(), random.getstate(), (name, keys.tolist(), *rest)

    before = states()
    evaluation = LongContextEvaluation(config, tokenizer)
    evaluation.check(model.beacon_config)
    first = evaluation(model)
    assert states() == before
    assert evaluation(model) == first


def test_texts_are_made_once_and_late(tokenizer, source):
    class Counting:
        eos_token_id = tokenizer.eos_token_id
        calls = 0

        def __call__(self, *args, **kwargs):
            self.calls += 1
            return tokenizer(*args, **kwargs)

        def decode(self, *args):
            return tokenizer.decode(*args)

    counting = Counting()
    config = EvaluationConfig(source=source, lengths=(50,), texts=2, targets=20, passkey_lengths=(60,))
    evaluation = LongContextEvaluation(config, counting)
    assert counting.calls == 0
    evaluation.check(beacon.BeaconConfig(**APPEND))
    made = counting.calls
    assert made > 0
    evaluation(Oracle())
    evaluation(Oracle())
    assert counting.calls == made


def test_nothing_to_measure():
    evaluation = LongContextEvaluation(EvaluationConfig(source="nowhere"), None)
    evaluation.check(beacon.BeaconConfig(ratio_policy="retrieval"))
    assert evaluation(None) == {}


# -- sources and errors ------------------------------------------------------------------------------------------------


def test_longest_documents_of_a_jsonl_file(tmp_path, tokenizer):
    pieces = ["def a(): pass\n", CODE[: len(CODE) // 2], "x = 1\n" * 3, CODE[:9000]]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": piece, "length": 1}) for piece in pieces) + "\n\n")
    evaluation = LongContextEvaluation(EvaluationConfig(source=str(path), lengths=(99,), texts=2, targets=9), tokenizer)
    wanted = sorted((pieces[1], pieces[3]), key=len, reverse=True)
    for text, piece in zip(evaluation._texts, wanted, strict=True):
        assert torch.equal(text, encode(tokenizer, piece)[:99])


def test_the_library_is_the_default_source(shipped):
    tokenizer = shipped[1]
    oracle = Oracle()
    LongContextEvaluation(EvaluationConfig(lengths=(400,), texts=2), tokenizer)(oracle)
    assert [call[0].shape for call in oracle.calls] == [(1, 400)] * 2


@pytest.mark.parametrize(
    "text, message",
    [
        ("not json\n", "one JSON object a line, got line 1"),
        ('{"text": "a"}\n{"content": "a"}\n', "text column of strings, got line 2"),
        ('["a"]\n', "text column of strings, got line 1"),
        ('{"text": "def"}\n' * 3, "must give 4 texts of 300 tokens .* got 0 of them and at most [1-9] tokens"),
        ("", "got 0 of them and at most 0 tokens"),
    ],
)
def test_bad_jsonl(text, message, tmp_path, tokenizer):
    path = tmp_path / "texts.jsonl"
    path.write_text(text)
    evaluation = LongContextEvaluation(EvaluationConfig(source=str(path), lengths=(300,)), tokenizer)
    with pytest.raises(ValueError, match=message):
        evaluation.check(beacon.BeaconConfig())


def test_check_refuses_before_the_training(tmp_path, tokenizer, source):
    def check(settings=None, **changes):
        config = EvaluationConfig(**{"source": source, "lengths": (50,), "targets": 20, **changes})
        LongContextEvaluation(config, tokenizer).check(beacon.BeaconConfig(**(settings or APPEND)))

    check()
    with pytest.raises(ValueError, match="ratios of the evaluation: stride must divide by ratio, got stride=8 and rat"):
        check(ratios=(None, 3))
    with pytest.raises(ValueError, match="must be numbers where ratio_policy='retrieval'"):
        check({**APPEND, "ratio_policy": "retrieval"})
    check({**APPEND, "ratio_policy": "retrieval"}, ratios=(8,))
    with pytest.raises(ValueError, match=r"must give 4 texts of 300 tokens .* got 3 of them and at most 300 tokens"):
        check(lengths=(50, 300), texts=4)
    with pytest.raises(ValueError, match=r"must give 4 texts of 2000 tokens .* got 0 of them and at most 999 tokens"):
        check(lengths=(50, 2000))
    with pytest.raises(ValueError, match="must give 1 texts of 100000 tokens"):
        check(passkey_lengths=(100_000,), texts=1)
    with pytest.raises(ValueError, match="length must leave room for text"):
        check(passkey_lengths=(10,))
    with pytest.raises(FileNotFoundError, match="must be 'python-library' or a file, got 'python'"):
        check(source="python")


@pytest.mark.parametrize(
    "error, message, changes",
    [
        (TypeError, "source must be a str", {"source": None}),
        (TypeError, r"lengths must be a list, got 4096; write \[4096\]", {"lengths": 4096}),
        (TypeError, "each of lengths must be an int, got str '4k'", {"lengths": ["4k"]}),
        (TypeError, "each of ratios must be an int, got bool True", {"ratios": [True]}),
        (TypeError, "passkey_depths must be numbers, got '0.5'", {"passkey_depths": ["0.5"]}),
        (TypeError, "texts must be an int, got float 1.5", {"texts": 1.5}),
        (ValueError, "texts must be at least 1, got 0", {"texts": 0}),
        (ValueError, "targets must be at least 1, got 0", {"targets": 0}),
        (ValueError, "lengths must exceed targets, got 256 and targets=256", {"lengths": [512, 256]}),
        (ValueError, "lengths must name every value once", {"lengths": [512, 512]}),
        (ValueError, "ratios must name at least one value", {"ratios": []}),
        (ValueError, "each of ratios must be at least 0, got -8", {"ratios": [-8]}),
        (ValueError, "passkey_depths must name at least one value", {"passkey_depths": []}),
        (ValueError, "passkey_depths must lie between 0 and 1, got 10", {"passkey_depths": [10]}),
        (ValueError, "each of passkey_lengths must be at least 1", {"passkey_lengths": [0]}),
        (ValueError, "passkey_seed must be at least 0", {"passkey_seed": -1}),
    ],
)
def test_bad_configurations(error, message, changes):
    with pytest.raises(error, match=message):
        EvaluationConfig(**changes)


def test_lists_become_tuples():
    config = EvaluationConfig(lengths=[512, 1024], ratios=[None, 8], passkey_lengths=[600], passkey_depths=[0, 1])
    assert (config.lengths, config.ratios, config.passkey_depths) == ((512, 1024), (None, 8), (0, 1))
    assert config.longest == 1024 and EvaluationConfig().longest == 0
    assert hash(config) == hash(
        EvaluationConfig(lengths=(512, 1024), ratios=(None, 8), passkey_lengths=(600,), passkey_depths=(0, 1))
    )


@pytest.mark.parametrize("name", ["perplexity_4096", "passkey_exact_1024_ratio_8", "passkey_1024_ratio_0"])
def test_names(name):
    assert str(MetricName.parse(name)) == name
    assert MetricName.parse("eval_" + name) is None and MetricName.parse("loss") is None


# -- the record --------------------------------------------------------------------------------------------------------


def test_record(tmp_path):
    path = tmp_path / "run" / EVALUATIONS
    assert read_records(path) == []
    drop_after(path, 10)
    assert not path.exists()
    append_record(path, 10, 1000, {"perplexity_512": 8.5})
    append_record(path, 20, 2000, {"perplexity_512": math.inf, "passkey_512": 0.5})
    assert path.read_text().splitlines()[0] == '{"step": 10, "tokens": 1000, "perplexity_512": 8.5}'
    first, second = read_records(path)
    assert first == {"step": 10, "tokens": 1000, "perplexity_512": 8.5}
    assert math.isnan(second["perplexity_512"]) and second["passkey_512"] == 0.5
    with pytest.raises(ValueError, match="must not be named step or tokens, got tokens"):
        append_record(path, 30, 3000, {"tokens": 1})


@pytest.mark.parametrize("cut", ['{"step": 30, "tok', '{"step": 30, "tokens": 5}'])
def test_a_cut_last_line_is_no_record(cut, tmp_path):
    path = tmp_path / EVALUATIONS
    append_record(path, 10, 1000, {})
    with path.open("a") as file:
        file.write(cut)
    assert [record["step"] for record in read_records(path)] == [10]
    append_record(path, 20, 2000, {})
    assert [record["step"] for record in read_records(path)] == [10, 20]
    assert "30" not in path.read_text()


def test_records_after_a_step_are_dropped(tmp_path):
    path = tmp_path / EVALUATIONS
    for step in (10, 20, 30, 40):
        append_record(path, step, 100 * step, {"passkey_512": 0.1})
    lines = path.read_text().splitlines(keepends=True)
    drop_after(path, 40)
    assert path.read_text() == "".join(lines)
    drop_after(path, 25)
    assert path.read_text() == "".join(lines[:2])
    assert [file.name for file in tmp_path.iterdir()] == [EVALUATIONS]
    drop_after(path, 0)
    assert read_records(path) == []


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"tokens": 1}', '{"step": null, "tokens": 1}'])
def test_a_bad_line_is_named(line, tmp_path):
    path = tmp_path / EVALUATIONS
    append_record(path, 10, 1000, {})
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match="got line 2"):
        read_records(path)


# -- plots -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    from matplotlib.figure import Figure

    seen, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (seen.append(self), save(self, *args, **kwargs))
    )
    return seen


def run_folder(folder, steps=6):
    for step in range(steps):
        metrics = {}
        for length in (512, 4096):
            for suffix in ("", "_ratio_8"):
                metrics[f"perplexity_{length}{suffix}"] = 8 + 500 * 0.1**step
                metrics[f"passkey_{length}{suffix}"] = step / 10
                metrics[f"passkey_exact_{length}{suffix}"] = step / 20
        append_record(folder / EVALUATIONS, 100 * step, 1000 * step, {**metrics, "other": 1.0})
    return folder


def test_pictures(tmp_path, figures):
    history = [
        {"step": step, "loss": 3 - step / 100, "grad_norm": 1.0, "learning_rate": 1e-4, "tokens_per_second": 5e3}
        for step in range(1, 100)
    ]
    files = draw(run_folder(tmp_path), [*history, {"step": 99, "train_loss": 2.0}])
    assert files == [tmp_path / name for name in ("perplexity.png", "passkey.png", "training.png")]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    perplexity, passkey, training = (figure.get_axes() for figure in figures)
    assert [axes.get_yscale() for axes in perplexity] == ["log", "linear"]
    assert [len(axes.get_lines()) for axes in (*perplexity, *passkey)] == [4, 4, 4, 4]
    assert list(perplexity[0].get_lines()[0].get_xdata()) == [0, 100, 200, 300, 400, 500]
    assert list(passkey[0].get_lines()[0].get_ydata()) == pytest.approx([0, 10, 20, 30, 40, 50])
    assert passkey[0].get_ylim() == (-4, 104)
    assert [len(axes.get_lines()) for axes in training] == [2, 1, 2, 2]  # running means, but of the learning rate
    looks = {(line.get_color(), line.get_linestyle()) for line in perplexity[0].get_lines()}
    assert len(looks) == 4
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels == ["tokens read", "512", "4,096", "ratio", "as configured", "8"]


def test_few_and_odd_numbers(tmp_path, figures):
    assert draw(tmp_path) == []
    append_record(tmp_path / EVALUATIONS, 0, 0, {"perplexity_512": 9.0, "passkey_512": math.nan})
    append_record(tmp_path / EVALUATIONS, 5, 0, {"perplexity_512": math.inf})
    history = [{"step": 1, "loss": math.nan, "grad_norm": 0.0}, {"loss": 2.0}, {"step": 1, "grad_norm": "none"}]
    assert [file.name for file in draw(tmp_path, history)] == ["perplexity.png", "training.png"]
    assert [len(figure.get_axes()) for figure in figures] == [1, 1]
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["tokens read", "512"]


def test_without_matplotlib(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    _say_missing.cache_clear()
    run_folder(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert draw(tmp_path) == draw(tmp_path) == []
    assert [record.message for record in caplog.records if "matplotlib is missing" in record.message] != []
    assert len(caplog.records) == 1
    assert [file.name for file in tmp_path.iterdir()] == [EVALUATIONS]
