"""What the harness measures on a run is what it measures on the merged model by itself."""

import json
import random
import shutil
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers.pre_tokenizers import Sequence, Split
from tokenizers.processors import TemplateProcessing

from monteclora.data.chat import use_template
from monteclora.data.encoding import IGNORED, encode
from monteclora.errors import ConfigError
from monteclora.evaluation.harness import harness
from monteclora.runs.loading import load_run
from tests.tasks.rows import GSM8K, write_split

lm_eval = pytest.importorskip("lm_eval")


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    write_split(tmp_path / "data", "gsm8k", "test", [{**GSM8K, "question": f"w{i} ?"} for i in range(4)])
    monkeypatch.setenv("MONTECLORA_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return shutil.copytree(trained["pairs"], tmp_path / "run")


@pytest.fixture
def task_files(tmp_path):
    """Local task files: options by likelihood, and answers that are generated."""
    rows = [{"question": f"w{i} w{i + 3}", "options": [f"w{i + 7}", f"w{i + 9} w1"], "gold": i % 2} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/rows.jsonl\ntest_split: test\n"
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "choose.yaml").write_text(
        "task: choose\noutput_type: multiple_choice\n"
        + common
        + 'doc_to_text: "{{question}}"\ndoc_to_choice: "{{options}}"\ndoc_to_target: "{{gold}}"\n'
        "metric_list:\n  - metric: acc\n  - metric: acc_norm\n"
    )
    (folder / "write.yaml").write_text(
        "task: write\noutput_type: generate_until\n"
        + common
        + 'doc_to_text: "{{question}}"\ndoc_to_target: "{{options[0]}}"\n'
        "generation_kwargs: {until: [], max_gen_toks: 5, do_sample: false}\nmetric_list:\n  - metric: exact_match\n"
    )
    return folder


def responses(samples):
    return {task: [row["filtered_resps"] for row in rows] for task, rows in samples.items()}


def test_equals_the_harness_on_the_merged_model(run, task_files, tmp_path):
    ours = harness(run, ["choose", "write"], include=task_files, limit=5, batch_size=2)
    loaded = load_run(run)
    loaded.model.merge_and_unload().save_pretrained(tmp_path / "merged")
    loaded.tokenizer.save_pretrained(tmp_path / "merged")
    theirs = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "merged"), "dtype": "float32"},
        tasks=["choose", "write"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(task_files), include_defaults=False),
        limit=5,
        batch_size=2,
        device="cpu",
        bootstrap_iters=0,
    )
    for task, metrics in theirs["results"].items():
        numbers = {name: value for name, value in metrics.items() if isinstance(value, float)}
        assert numbers == pytest.approx({name: ours.results[0][task][name] for name in numbers})
    found, expected = responses(ours.samples[0]), responses(theirs["samples"])
    assert found["write"] == expected["write"]
    assert len(found["write"]) == len(found["choose"]) == 5
    for one, other in zip(found["choose"], expected["choose"], strict=True):
        assert [x[0] for x in one] == pytest.approx([x[0] for x in other], abs=1e-4)


def test_draws_are_measured_with_the_posterior_in_place(run, task_files):
    result = harness(run, ["choose"], include=task_files, num_samples=2, seed=3)
    assert len(result.results) == result.num_samples == 2
    one, two = (responses(samples)["choose"] for samples in result.samples)
    mean = responses(harness(run, ["choose"], include=task_files).samples[0])["choose"]
    assert one != two
    assert one != mean
    again = harness(run, ["choose"], include=task_files, num_samples=2, seed=3)
    assert responses(again.samples[1])["choose"] == two


def test_global_generators_are_left_alone(run, task_files):
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    harness(run, ["choose"], include=task_files, limit=2)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())


def test_gsm8k_is_asked_as_in_training_from_local_rows(run):
    result = harness(run, ["gsm8k"], limit=3)
    assert {"exact_match,strict-match", "exact_match,flexible-extract"} <= set(result.results[0]["gsm8k"])
    (first, *_) = result.samples[0]["gsm8k"]
    assert "Solve the problem step by step" in first["arguments"][0][0]


@pytest.mark.parametrize("template", [None, "chatml"])
@pytest.mark.parametrize("beginning", [False, True])
def test_gsm8k_is_asked_in_the_tokens_of_training(run, monkeypatch, template, beginning):
    """With a chat template and without one, and whether or not the tokenizer puts a token before every text."""
    loaded = load_run(run)
    # a line break is a token, as it is to the tokenizers of language models
    loaded.tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Split(" ", "removed"), Split("\n", "isolated")])
    if beginning:
        loaded.tokenizer.bos_token = "[CLS]"
        loaded.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="[CLS] $A", special_tokens=[("[CLS]", 2)]
        )
    if template:
        use_template(loaded.tokenizer, template)
    monkeypatch.setattr("monteclora.evaluation.harness.load_run", lambda *_, **__: loaded)
    asked, generate = [], loaded.model.generate

    def generated(**inputs):
        masks = inputs["attention_mask"].bool()
        asked.extend(ids[mask].tolist() for ids, mask in zip(inputs["input_ids"], masks, strict=True))
        return generate(**inputs)

    monkeypatch.setattr(loaded.model, "generate", generated)
    result = harness(run, ["gsm8k"], batch_size=3)
    docs = {sample["doc"]["prompt"]: sample["doc"] for sample in result.samples[0]["gsm8k"]}
    learned = encode(Dataset.from_list(list(docs.values())), "causal_lm", loaded.tokenizer, 48, "completion").dataset
    starts = [next(i for i, label in enumerate(row["labels"]) if label != IGNORED) for row in learned]
    expected = [row["input_ids"][:start] for row, start in zip(learned, starts, strict=True)]
    assert sorted(asked) == sorted(expected)
    assert len(expected) == 4
    assert template or all(ids[-1] == loaded.tokenizer.unk_token_id for ids in asked)  # the line break
    assert not beginning or template or all(ids[0] == 2 for ids in asked)


def test_what_cannot_be_run_is_refused(run, trained, task_files, monkeypatch):
    with pytest.raises(ConfigError, match="the harness cannot run no_such_task"):
        harness(run, ["no_such_task"], include=task_files)
    with pytest.raises(ConfigError, match="trained a classifier"):
        harness(trained["texts"], ["gsm8k"])
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"monteclora\[harness\]"):
        harness(run, ["gsm8k"])
