"""Standard tasks from small local files in each data set's own schema, and what is said where something is missing."""

import copy
import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import beacon
from beacon.evaluation.harness import SUITES, evaluate_tasks
from beacon.evaluation.harness.babilong import length_name
from beacon.evaluation.harness.local_data import split_files
from beacon.evaluation.harness.ruler import NEEDLES, PromptsDoNotFit, punkt_found, ruler_overrides
from beacon.evaluation.harness.running import check_data, length_metric
from beacon.evaluation.harness.tasks import choose, suite_of, task_manager
from tests.evaluation.tiny import tiny_llama

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore:Using slow pure-python SequenceMatcher:UserWarning")

WORDS = [*"ABCD0123456789", "yes", "no", "kitchen", "garden", "The", "is", "####", ".", ":", "needle"]
COUNTS = {
    "ruler": 13,
    "longbench": 21,
    "longbench_e": 13,
    "longbench2": 20,
    "infinitebench": 11,
    "babilong": 5,
    "mmlu": 57,
    "hellaswag": 1,
    "arc": 2,
    "gsm8k": 1,
}


@pytest.fixture(scope="module")
def tokenizer():
    """A word or a sign is a token, so that RULER's prompts are as long as with a real tokenizer."""
    vocabulary = {word: at for at, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def model(tokenizer):
    config = beacon.BeaconConfig(window=32, ratios=(4, 8, 32), reserve=16)
    return beacon.wrap(tiny_llama(len(tokenizer), num_hidden_layers=1), config)


@pytest.fixture(scope="module")
def manager():
    return task_manager()


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path_factory):
    """No hub, no cache of earlier runs, and the list of tasks (seconds) once."""
    import datasets

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _one_list_of_tasks(monkeypatch, manager):
    monkeypatch.setattr("beacon.evaluation.harness.running.task_manager", lambda: manager)


def write(path: Path, rows: list[dict], kind: str = "jsonl") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "parquet":
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run(model, tokenizer, tasks, **settings):
    return evaluate_tasks(model, tokenizer, tasks, **{"ratios": 8, "limit": 2, "batch_size": 4, **settings})


# -- what stands for what --------------------------------------------------------------------------------------------


def test_suites_have_the_tasks_that_were_published(manager) -> None:
    chosen = choose(list(SUITES), manager)
    assert {name: len(tasks) for name, tasks in chosen.items()} == COUNTS
    assert all(task.endswith("_e") for task in chosen["longbench_e"])
    assert {*chosen["ruler"]} >= {*NEEDLES}
    assert all(suite_of(task, manager) == suite for suite, tasks in chosen.items() for task in tasks)


def test_single_tasks_and_suites_together(manager) -> None:
    chosen = choose(["arc", "arc_easy", "babilong_qa7", "mmlu_anatomy", "mmlu_anatomy"], manager)
    assert chosen == {"arc": ["arc_challenge", "arc_easy"], "": ["babilong_qa7", "mmlu_anatomy"]}


@pytest.mark.parametrize("names", [["lonbench"], ["arc", "hellaswog"], []])
def test_unknown_tasks_are_told_the_valid_ones(model, tokenizer, names) -> None:
    with pytest.raises(ValueError, match="tasks must be suites or tasks of theirs, got") as failure:
        run(model, tokenizer, names)
    assert all(suite in str(failure.value) for suite in SUITES)
    assert not names or f"did you mean {'longbench' if names[0] == 'lonbench' else 'hellaswag'}" in str(failure.value)


# -- short texts -----------------------------------------------------------------------------------------------------


def write_arc(data: Path, kind: str = "jsonl") -> None:
    for config, count in (("ARC-Easy", 3), ("ARC-Challenge", 2)):
        rows = [
            {
                "id": f"q{number}",
                "question": f"The needle is {number} ?",
                "choices": {"text": ["yes", "no", "the garden", "4"], "label": ["A", "B", "C", "D"]},
                "answerKey": "ABCD"[number % 4],
            }
            for number in range(count)
        ]
        name = "test-00000-of-00001.parquet" if kind == "parquet" else "test.jsonl"
        write(data / "ai2_arc" / config / name, rows, kind)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_arc(model, tokenizer, tmp_path, kind) -> None:
    write_arc(tmp_path, kind)
    report = run(model, tokenizer, "arc", data=tmp_path, limit=None)
    assert {name: task["documents"] for name, task in report["tasks"].items()} == {"arc_challenge": 2, "arc_easy": 3}
    assert set(report["tasks"]["arc_easy"]["metrics"]) == {"acc", "acc_norm"}
    easy, hard = (report["tasks"][name]["metrics"]["acc"] for name in ("arc_easy", "arc_challenge"))
    mean = report["suites"]["arc"]["metrics"]["acc"]
    assert mean["value"] == pytest.approx((easy["value"] + hard["value"]) / 2)
    assert mean["stderr"] == pytest.approx((easy["stderr"] ** 2 + hard["stderr"] ** 2) ** 0.5 / 2)
    assert report["suites"]["arc"]["documents"] == 5 and report["method"] == "beacon" and report["ratios"] == 8
    assert json.loads(json.dumps(report)) == report
    limited = run(model, tokenizer, "arc", data=tmp_path, limit=1)
    assert limited["suites"]["arc"]["documents"] == 2
    assert limited["tasks"]["arc_easy"]["metrics"]["acc"]["stderr"] is None


def test_the_harness_scores_the_same_by_its_own_evaluation(model, tokenizer, tmp_path, manager) -> None:
    import lm_eval

    from beacon.evaluation.harness import BeaconLM

    write_arc(tmp_path)
    report = run(model, tokenizer, "arc_easy", data=tmp_path, limit=None)
    files = {"test": str(tmp_path / "ai2_arc/ARC-Easy/test.jsonl")}
    task = {"task": "arc_easy", "dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    task |= {"training_split": None, "validation_split": None}
    lm = BeaconLM(model, tokenizer=copy.deepcopy(tokenizer), ratios=8)
    own = lm_eval.simple_evaluate(model=lm, tasks=[{"group": "one", "task": [task]}], task_manager=manager)
    assert own["results"]["arc_easy"]["acc,none"] == report["tasks"]["arc_easy"]["metrics"]["acc"]["value"]


def test_hellaswag(model, tokenizer, tmp_path) -> None:
    rows = [
        {
            "ind": number,
            "activity_label": "Needle",
            "ctx_a": "The needle is",
            "ctx_b": "the garden",
            "ctx": "The needle is the garden",
            "endings": ["is yes.", "is no.", "[title] is kitchen.", "is 4."],
            "source_id": "x",
            "split": "val",
            "split_type": "indomain",
            "label": str(number % 4),
        }
        for number in range(3)
    ]
    write(tmp_path / "hellaswag" / "data" / "validation-00000-of-00001.parquet", rows, "parquet")
    report = run(model, tokenizer, "hellaswag", data=tmp_path)
    assert report["tasks"]["hellaswag"]["documents"] == 2
    assert set(report["suites"]["hellaswag"]["metrics"]) == {"acc", "acc_norm"}


def test_mmlu_with_solved_examples(model, tokenizer, tmp_path) -> None:
    rows = [
        {"question": f"The needle {n}", "subject": "anatomy", "choices": ["yes", "no", "1", "2"], "answer": n % 4}
        for n in range(5)
    ]
    write(tmp_path / "mmlu" / "anatomy" / "test-00000-of-00001.parquet", rows, "parquet")
    assert run(model, tokenizer, "mmlu_anatomy", data=tmp_path)["tasks"]["mmlu_anatomy"]["shots"] == 0
    with pytest.raises(FileNotFoundError, match=r"mmlu_anatomy needs the split dev of cais/mmlu, got no anatomy/dev"):
        run(model, tokenizer, "mmlu_anatomy", data=tmp_path, num_fewshot=5)
    write(tmp_path / "mmlu" / "anatomy" / "dev-00000-of-00001.parquet", rows, "parquet")
    task = run(model, tokenizer, "mmlu_anatomy", data=tmp_path, num_fewshot=5)["tasks"]["mmlu_anatomy"]
    assert task["shots"] == 5 and task["documents"] == 2 and 0 <= task["metrics"]["acc"]["value"] <= 1


def test_gsm8k(model, tokenizer, tmp_path, monkeypatch) -> None:
    rows = [{"question": f"The needle is {n} ?", "answer": f"The needle is {n} .\n#### {n}"} for n in range(9)]
    for split in ("train", "test"):
        write(tmp_path / "gsm8k" / "main" / f"{split}.jsonl", rows)
    read = []
    inner = model.compress
    monkeypatch.setattr(model, "compress", lambda ids, *args, **kw: read.append(str(ids)) or inner(ids, *args, **kw))
    task = run(model, tokenizer, "gsm8k", data=tmp_path)["tasks"]["gsm8k"]
    first = list(read)
    read.clear()
    random.seed(7)
    assert run(model, tokenizer, "gsm8k", data=tmp_path)["tasks"]["gsm8k"] == task and read == first
    assert task["shots"] == 5
    assert set(task["metrics"]) == {"exact_match,strict-match", "exact_match,flexible-extract"}
    assert run(model, tokenizer, "gsm8k", data=tmp_path, num_fewshot=0)["tasks"]["gsm8k"]["shots"] == 0


# -- long texts ------------------------------------------------------------------------------------------------------


def long_text(count: int, seed: int = 0) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


@pytest.mark.parametrize("column", ["question", "input"])  # as the harness's copy has it, and LongBench's own files
def test_longbench(model, tokenizer, tmp_path, column) -> None:
    rows = [
        {
            column: "The needle is ?",
            "context": long_text(400, number),
            "answers": ["yes", "no"],
            "length": (3999, 8000, 4000)[number],
            "dataset": "qasper",
            "language": "en",
            "all_classes": None,
            "_id": str(number),
        }
        for number in range(3)
    ]
    write(tmp_path / "LongBench" / "data" / "qasper.jsonl", rows)
    write(tmp_path / "LongBench" / "qasper_e" / "test.jsonl", rows)
    labelled = [{**row, "dataset": "trec", "all_classes": ["yes", "no"], "answers": ["yes"]} for row in rows]
    write(tmp_path / "LongBench" / "trec" / "test-00000-of-00001.parquet", labelled, "parquet")
    names = ["longbench_qasper", "longbench_qasper_e", "longbench_trec"]
    tasks = run(model, tokenizer, names, data=tmp_path)["tasks"]
    assert set(tasks) == set(names) and all(task["documents"] == 2 for task in tasks.values())
    assert set(tasks["longbench_qasper"]["metrics"]) == {"score", "qa_f1_score"}
    parts = {f"{metric}, {part}" for metric in ("score", "qa_f1_score") for part in ("0-4k", "8k+")}
    assert set(tasks["longbench_qasper_e"]["metrics"]) == {"score", "qa_f1_score", *parts}
    assert set(tasks["longbench_trec"]["metrics"]) == {"score", "classification_score"}


def test_longbench2_reads_a_context_once(model, tokenizer, tmp_path, monkeypatch) -> None:
    asked = {"question": "The needle ?", "choices": ["yes", "no", "1", "2"], "length": "short"}
    rows = [{"context": long_text(900, n), **asked, "answer": n} for n in range(2)]
    write(tmp_path / "longbench-v2" / "detective" / "train.jsonl", rows)
    read = []
    inner = model.compress
    monkeypatch.setattr(model, "compress", lambda ids, *args, **kw: read.append(len(ids)) or inner(ids, *args, **kw))
    task = run(model, tokenizer, "longbench2_detective", data=tmp_path, batch_size=1)["tasks"]["longbench2_detective"]
    assert task["documents"] == 2 and set(task["metrics"]) == {"acc", "acc, short"}
    assert read == [1, 1]


def test_infinitebench(model, tokenizer, tmp_path) -> None:
    folder = tmp_path / "InfiniteBench"
    plain = {"id": 0, "context": long_text(500), "input": "The needle ?", "answer": ["1234"], "options": []}
    choice = {**plain, "answer": ["no"], "options": ["yes", "no", "1", "2"]}
    write(folder / "passkey.jsonl", [plain, {**plain, "id": 1}])
    write(folder / "math_find.jsonl", [{**plain, "answer": [72]}, {**plain, "answer": [7.5]}])
    write(folder / "longbook_choice_eng.jsonl", [choice])
    write(folder / "code_debug.jsonl", [choice])
    names = [f"infinitebench_{name}" for name in ("passkey", "math_find", "longbook_choice_en", "code_debug")]
    tasks = run(model, tokenizer, names, data=tmp_path)["tasks"]
    assert {name: tasks[name]["documents"] for name in names} == dict(zip(names, (2, 2, 1, 1), strict=True))
    assert all(set(task["metrics"]) == {"score"} for task in tasks.values())


def test_babilong_has_a_metric_for_every_length(model, tokenizer, tmp_path) -> None:
    for name, size in (("0k", 10), ("1k", 300), ("2k", 600)):
        rows = [{"input": long_text(size, n), "question": "The needle ?", "target": "kitchen"} for n in range(3)]
        folder = "babilong" if name == "2k" else "babilong-1k-samples"  # either of the two that were published
        write(tmp_path / folder / name / "qa1-00000-of-00001.parquet", rows, "parquet")
    report = run(model, tokenizer, "babilong_qa1", data=tmp_path, lengths=[0, 1024, 2000], limit=2)
    task = report["tasks"]["babilong_qa1"]
    assert set(task["metrics"]) == {"0k", "1k", "2k"} and task["shots"] == 2
    with pytest.raises(FileNotFoundError, match=r"needs the split qa1 of RMT-team/babilong-1k-samples, got no 4k/qa1"):
        run(model, tokenizer, "babilong_qa1", data=tmp_path, lengths=[4096])
    assert [length_name(n) for n in (131072, 128000, 10**6, 10**7)] == ["128k", "125k", "1M", "10M"]
    with pytest.raises(ValueError, match="whole thousands of tokens, got 1500"):
        run(model, tokenizer, "babilong_qa1", data=tmp_path, lengths=[1500])


def write_ruler(data: Path) -> None:
    """All that RULER's thirteen tasks are made from."""
    write(data / "paul_graham_essays" / "train.jsonl", [{"text": f"{long_text(1500, n)} ."} for n in range(3)])
    english = data / "nltk_data" / "tokenizers" / "punkt_tab" / "english"
    english.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        (english / name).write_text("")
    paragraphs = [
        {
            "context": f"The needle {n} is in the garden.",
            "qas": [
                {"question": f"where is {n}?", "answers": [{"text": "the garden"}], "is_impossible": False},
                {"question": "nobody knows?", "answers": [], "is_impossible": True},
            ],
        }
        for n in range(6)
    ]
    articles = [{"title": "x", "paragraphs": part} for part in (paragraphs[:3], paragraphs[3:])]
    (data / "squad").mkdir()
    (data / "squad" / "dev-v2.0.json").write_text(json.dumps({"version": "v2.0", "data": articles}))
    hotpot = [
        {
            "question": f"where is {n}?",
            "answer": "garden",
            "context": [[f"Title {n}", ["The needle is ", "in the garden."]], ["Other", ["The kitchen."]]],
        }
        for n in range(4)
    ]
    (data / "hotpotqa").mkdir()
    (data / "hotpotqa" / "hotpot_dev_distractor_v1.json").write_text(json.dumps(hotpot))


def test_ruler(model, tokenizer, tmp_path, capsys, monkeypatch) -> None:
    import nltk

    monkeypatch.setattr(nltk, "download", lambda *_: pytest.fail("it reached for the network"))
    write_ruler(tmp_path)
    report = run(model, tokenizer, "ruler", data=tmp_path, lengths=[1200], limit=1)
    assert len(report["tasks"]) == 13
    assert all(set(task["metrics"]) == {"1200"} for task in report["tasks"].values())
    assert 0 <= report["suites"]["ruler"]["metrics"]["1200"]["value"] <= 1
    assert "Num noises" not in capsys.readouterr().out
    task = run(model, tokenizer, "ruler_qa_squad", data=tmp_path, lengths=[1200, 1500], limit=2)["tasks"][
        "ruler_qa_squad"
    ]
    assert task["documents"] == 2 and set(task["metrics"]) == {"1200", "1500"}
    prompts = {}
    state = random.getstate(), list(nltk.data.path)
    for order in (["niah_single_2", "ruler_vt", "ruler_cwe"], ["ruler_cwe", "ruler_vt", "niah_single_2"]):
        for task in order:
            made = ruler_documents(task, tokenizer, tmp_path)
            assert made == prompts.setdefault(task, made)
            assert 600 < len(tokenizer(made[0]["input"]).input_ids) < 1200
    assert (random.getstate(), nltk.data.path) == state


def ruler_documents(task, tokenizer, data):
    with punkt_found([task], data):
        return ruler_overrides(task, tokenizer, [1200], 2, data)["custom_dataset"](version=1.0)["test"].to_list()


def test_ruler_grades_every_length_by_itself(tokenizer, tmp_path) -> None:
    grade = ruler_overrides("niah_multivalue", tokenizer, [1200], 2, None)["process_results"]
    assert grade({"max_length": 1200, "outputs": ["12", "34"]}, ["it is 12 "]) == {"1200": 0.5}
    grade = ruler_overrides("ruler_qa_squad", tokenizer, [1200], 2, None)["process_results"]
    assert grade({"max_length": 1200, "outputs": ["the garden"]}, ["THE GARDEN"]) == {"1200": 1.0}


@pytest.mark.parametrize(
    "task, words",
    [
        ("niah_single_2", r"hides needles in essays, got no train.jsonl .* hf download baber/paul_graham_essays"),
        ("ruler_qa_squad", r"is made from the development set of SQuAD 2.0, got no .*squad/dev-v2.0.json"),
        ("ruler_qa_hotpot", r"HotpotQA's development set with distractors, got no .*hotpot_dev_distractor_v1.json"),
    ],
)
def test_ruler_names_the_texts_it_lacks(model, tokenizer, tmp_path, task, words) -> None:
    with pytest.raises(FileNotFoundError, match=words):
        run(model, tokenizer, task, data=tmp_path)


def test_ruler_names_the_splitter_it_lacks(model, tokenizer, tmp_path, monkeypatch) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    write(tmp_path / "paul_graham_essays" / "train.jsonl", [{"text": "The needle ."}])
    with pytest.raises(FileNotFoundError, match=r"NLTK's punkt_tab, got none in .*nltk_data .*nltk.downloader"):
        run(model, tokenizer, "niah_multikey_1", data=tmp_path)


@pytest.mark.parametrize("task", ["ruler_vt", "ruler_cwe"])
def test_ruler_refuses_what_would_never_fit(model, tokenizer, tmp_path, task) -> None:
    with pytest.raises(PromptsDoNotFit, match=f"{task} must fit its smallest prompt, got"):
        run(model, tokenizer, task, data=tmp_path, lengths=[300])


# -- settings and mistakes -------------------------------------------------------------------------------------------


def test_missing_data_says_what_to_put_where(model, tokenizer, tmp_path) -> None:
    with pytest.raises(FileNotFoundError) as failure:
        run(model, tokenizer, "gsm8k", data=tmp_path)
    message = str(failure.value)
    assert "the split test of openai/gsm8k" in message or "the split train of openai/gsm8k" in message
    assert f"in {tmp_path / 'gsm8k'}" in message
    assert f"hf download openai/gsm8k --repo-type dataset --local-dir {tmp_path / 'gsm8k'}" in message
    with pytest.raises(FileNotFoundError, match="data must be a folder with a folder per data set, got nowhere"):
        run(model, tokenizer, "gsm8k", data="nowhere")


def test_without_a_folder_the_hub_is_asked_and_its_absence_named(model, tokenizer) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"data of arc_easy must be at hand, got: .* Pass data=FOLDER .*ai2_arc"
    ):
        run(model, tokenizer, "arc_easy")


def test_data_are_looked_at_beforehand(tokenizer, tmp_path, manager) -> None:
    write_arc(tmp_path)
    write_ruler(tmp_path)
    write(tmp_path / "babilong" / "1k" / "qa1.jsonl", [])
    names = ["arc_easy", "niah_single_2", "ruler_vt", "ruler_qa_squad", "babilong_qa1"]
    found = check_data(names, data=tmp_path, lengths=[1024])
    shown = {name: [file.relative_to(tmp_path).as_posix() for file in files] for name, files in found.items()}
    assert shown == {
        "arc_easy": ["ai2_arc/ARC-Easy/test.jsonl"],
        "niah_single_2": ["paul_graham_essays/train.jsonl"],
        "ruler_vt": [],
        "ruler_qa_squad": ["squad/dev-v2.0.json"],
        "babilong_qa1": ["babilong/1k/qa1.jsonl"],
    }
    with pytest.raises(FileNotFoundError, match="babilong_qa1 needs the split qa1"):
        check_data(["arc_easy", "babilong_qa1"], data=tmp_path, lengths=[1024, 4096])
    with pytest.raises(FileNotFoundError, match=r"data of arc_easy must be at hand, got: .* Pass data=FOLDER"):
        check_data(["arc_easy"])
    assert [length_metric(name, 4096, manager) for name in names] == [None, "4096", "4096", "4096", "4k"]


def test_files_of_two_kinds_are_refused(model, tokenizer, tmp_path) -> None:
    rows = [{"question": "The needle ?", "answer": "#### 1"}]
    write(tmp_path / "gsm8k" / "main" / "test.jsonl", rows)
    write(tmp_path / "gsm8k" / "main" / "train-00000-of-00001.parquet", rows, "parquet")
    with pytest.raises(ValueError, match="files of one data set must be of one kind"):
        run(model, tokenizer, "gsm8k", data=tmp_path)


def test_files_are_found_where_copies_have_them(tmp_path) -> None:
    for name in ("test-00001-of-00002.parquet", "test-00000-of-00002.parquet", "test-extra.parquet", "testing.jsonl"):
        write(tmp_path / "one" / name, [])
    assert [path.name for path in split_files(tmp_path, "one", "test")] == [
        "test-00000-of-00002.parquet",
        "test-00001-of-00002.parquet",
    ]
    write(tmp_path / "two.jsonl", [])
    assert split_files(tmp_path, "two", "test") == [tmp_path / "two.jsonl"]
    assert split_files(tmp_path, "two", "train", whole=False) == []
    assert split_files(tmp_path, None, "test") == []


def test_the_chat_template_is_applied_or_missed(model, tokenizer, tmp_path) -> None:
    write_arc(tmp_path)
    with pytest.raises(ValueError, match="the chat template needs a tokenizer that has one"):
        run(model, tokenizer, "arc_easy", data=tmp_path, chat_template=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, unk_token="<unk>", eos_token="</s>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} : {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}"
    )
    plain = run(model, tokenizer, "arc_easy", data=tmp_path, limit=None)
    talked = run(model, tokenizer, "arc_easy", data=tmp_path, limit=None, chat_template=True)
    assert talked["tasks"]["arc_easy"]["documents"] == plain["tasks"]["arc_easy"]["documents"] == 3


def test_the_page_that_explains_it_runs(tmp_path, monkeypatch, capsys) -> None:
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    write_arc(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/evaluation.md", "exec"), {"__name__": "documentation"})
    printed = json.loads(capsys.readouterr().out)
    assert printed["beacon"]["arc"]["documents"] == printed["stock"]["arc"]["documents"] == 5
    assert all(f"`{suite}`" in page for suite in SUITES)


def test_the_stock_model_is_measured_beside(model, tokenizer, tmp_path) -> None:
    write_arc(tmp_path)
    report = run(model, tokenizer, "arc_easy", data=tmp_path, stock=True, ratios=None)
    assert report["method"] == "stock" and report["tasks"]["arc_easy"]["documents"] == 2


def test_model_and_tokenizer_stay_as_they_were(model, tokenizer, tmp_path) -> None:
    write_arc(tmp_path)
    model.train()
    try:
        run(model, tokenizer, "arc_easy", data=tmp_path)
        assert model.training and tokenizer.pad_token is None
        assert not any(parameter.grad is not None for parameter in model.parameters())
    finally:
        model.eval()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"limit": 0}, "limit must be a number of documents, got 0"),
        ({"limit": 0.5}, "limit must be a number of documents, got 0.5"),
        ({"lengths": []}, r"lengths must be numbers of tokens, got \[\]"),
        ({"lengths": 4096}, "lengths must be numbers of tokens, got 4096"),
        ({"num_fewshot": -1}, "num_fewshot must be a whole number of at least 0, got -1"),
        ({"max_length": 0}, "max_length must be a whole number of at least 1, got 0"),
        ({"chat_template": "yes"}, "chat_template must be true or false, got 'yes'"),
    ],
)
def test_bad_settings_are_named(model, tokenizer, settings, words) -> None:
    with pytest.raises(ValueError, match=words):
        run(model, tokenizer, "arc", **settings)
