"""What the recipes write into pages and read from files: tables, settings of runs, prompts, the manifest of data."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import HfArgumentParser

from conftest import ROOT

sys.path.extend(str(ROOT / "recipes" / folder) for folder in ("", "root_model", "paper", "figures"))
import try_lengths

import check_data
import compare_methods
import report_results
import train_autoregembed
import train_gircse
from gircse.training.arguments import ModelArguments

LEARNED = [f"{name}-seed0" for name in ("untrained", "learned_tokens", "compressed", "autoregembed")]  # tokens


def test_report_leaves_out_what_settings_were_chosen_on():
    rows = [{"task": task, "group": "STS", "scores": {"1": score}} for task, score in (("a", 10), ("b", 20))]
    rows.append({"task": report_results.CHOSEN_ON, "group": "STS", "scores": {"1": 99}})
    rows.append({"task": "c", "group": "Clustering", "scores": {"1": 60}})
    assert report_results.group_means(rows, 1) == {"Clustering": 60, "STS": 15, "All tasks": 30}
    assert report_results.group_means([{"task": "a", "group": "STS", "scores": {"None": 7}}], 5) == {"STS": 7}


def test_report_fills_a_table_in_and_again():
    text = "before\n<!-- table one -->\nold\n<!-- end -->\nafter"
    once = report_results.fill(text, {"one": "| new |"})
    assert once == "before\n<!-- table one -->\n| new |\n<!-- end -->\nafter"
    assert report_results.fill(once, {"one": "| new |"}) == once
    with pytest.raises(ValueError, match="no place for table 'two'"):
        report_results.fill(text, {"two": ""})


def test_pages_hold_the_tables_of_the_results():
    models = {name: report_results.read(ROOT / f"results/{name}.json") for name in ("root", "minilm")}
    made = report_results.tables(models, report_results.comparison_runs())
    counts = {"README.md": 2, "docs/results.md": 11, "docs/root_model.md": 2, "docs/speed.md": 17}
    assert {page: len(tables) for page, tables in made.items()} == counts
    for page, tables in made.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        assert report_results.fill(text, tables) == text, page
    card = (ROOT / "README.md").read_text(encoding="utf-8")
    assert report_results.with_model_index(card, models["root"]) == card
    with pytest.raises(ValueError, match="no place for a model-index"):
        report_results.with_model_index(card.replace("model-index:", "model-list:"), models["root"])


def test_every_run_of_the_comparison_has_settings_that_training_takes(tmp_path, monkeypatch):
    commands = {}
    monkeypatch.setattr(
        compare_methods, "call", lambda command, log, threads: commands.update({log.parent.name: command})
    )
    backbone = tmp_path / "backbone"
    backbone.mkdir()
    (backbone / "config.json").write_text('{"model_type": "llama"}')
    places = {"backbone": backbone, "data": Path("DATA"), "runs": tmp_path}
    args = SimpleNamespace(**places, threads=1, training="--logging_steps 7")
    for run in compare_methods.plan():
        compare_methods.train(run, compare_methods.OTHER_RATES.get(run.method, 1e-4), args, tmp_path / run.name)
        assert not run.start or run.start in commands  # what a run goes on from comes before it
    results = {path.stem for path in (ROOT / "results/comparison").glob("*-seed*.json")}
    assert results <= {*commands, "causal_eos_generating-seed0"}

    parser = HfArgumentParser((ModelArguments, train_gircse.GircseTrainingArguments, train_gircse.DataArguments))
    models, settings = {}, {}
    for name, command in commands.items():
        arguments = command[2:]
        if command[1] == "train_autoregembed.py":
            options, arguments = train_autoregembed.parse(arguments)
            assert options.decoder == str(backbone)
            arguments += [
                "--model_name_or_path",
                options.model_name_or_path,
                "--step_token",
                options.step_token or "learned",
                "--tuning",
                options.tuning,
            ]
        parsed = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
        models[name], settings[name], data, rest = parsed
        changed = ["--contrast", "2"] if "_two-" in name else ["--objective", name.partition("-")[0]]
        assert rest in ([], changed)
        assert bool(rest) == name.startswith(("last_step", "gircse_two", "causal_eos_two", "answers"))
        assert (data.max_length, settings[name].per_device_train_batch_size) == (64, 16)
        method = name.partition("-")[0]
        stages = ("compressed", "compressed_soft", "autoregembed", "warmed_up")  # of two, which share 640 steps
        assert settings[name].max_steps == (1 if method == "untrained" else 320 if method in stages else 640)
        assert settings[name].seed == int(name[-1])
        assert settings[name].logging_steps == 7  # the last one given counts
        rates = {f"{method}_lora": ("lora", rate) for method, rate in compare_methods.LORA_RATES.items()}
        rates |= {"answers": ("full", 5e-5), "untrained": ("full", 1e-30), "autoregembed": ("full", 2e-5)}
        rates |= dict.fromkeys(("compressed", "compressed_soft"), ("full", 5e-5))
        assert (models[name].tuning, settings[name].learning_rate) == rates.get(method, ("full", 1e-4))
    axes = {
        name: (model.step_token or "soft", model.attention or "causal", model.pooling or "mean")
        for name, model in models.items()
    }
    for name, found in axes.items():
        eos, both_ways = name.startswith("causal_eos"), name.startswith("bidirectional_avg")
        pooling = "last" if eos else "mean_with_prompt" if name == "answers-seed0" else "mean"
        attention = "bidirectional" if both_ways else "causal"
        tokens = {"answers-seed0": "hard"} | dict.fromkeys(LEARNED, "learned")
        token = "none" if eos or both_ways else tokens.get(name, "soft")
        assert found == (token, attention, pooling)
    starts = {name: Path(model.model_name_or_path) for name, model in models.items()}
    assert starts["autoregembed-seed0"] == tmp_path / "compressed-seed0"
    assert starts["warmed_up-seed0"] == tmp_path / "compressed_soft-seed0"
    assert starts["compressed-seed0"] == starts["answers-seed0"] == backbone
    assert settings["no_refinement-seed0"].refinement_weight == 0


def test_every_length_is_trained_from_its_shortened_backbone(tmp_path, monkeypatch):
    commands = []

    def call(command: list[str], log: Path, threads: int) -> None:
        commands.append(command)
        (log.parent / "config.json").write_text('{"text_config": {"num_hidden_layers": 7}}')

    monkeypatch.setattr(compare_methods, "call", call)
    monkeypatch.setattr(compare_methods, "held_out_accuracy", lambda folder: {"1": 1.0})
    monkeypatch.setattr(compare_methods, "scores", lambda folder: [{"scores": {"1": 2.0}}])
    places = {"backbone": "SMOLLM2", "data": "DATA", "runs": tmp_path, "output": tmp_path / "lengths.json"}
    monkeypatch.setattr("sys.argv", ["try_lengths.py", *(f"--{name}={place}" for name, place in places.items())])
    try_lengths.main()
    rows = json.loads((tmp_path / "lengths.json").read_text())
    scores = {"held_out_accuracy": {"1": 1.0}, "sts_dev": {"1": 2.0}}
    assert rows == [{"left_out": left_out, "layers": 7, **scores} for left_out in try_lengths.LEFT_OUT]
    trained = [command[3] for command in commands if command[1].endswith("train_objective.py")]
    assert trained == ["SMOLLM2", *(str(tmp_path / f"{name}-backbone") for name in ("18-28", "20-27", "10-17"))]


def test_prompts_are_under_mtebs_names_alone():
    """Both sides alike under one name; a task that mteb lacks under none; types for tasks of one's own."""
    pytest.importorskip("mteb", reason="mteb is in requirements-eval.txt")
    import write_prompts

    paper = {"MSMARCO-Q": "Find.", "Lost": "Seek.", "BIOSESSES": "Compare.", "Same-Q": "Sort.", "Same-C": "Sort."}
    paper |= {"Both-Q": "Ask.", "Both-C": "Answer."}
    known = {"MSMARCO", "BIOSSES", "BIOSSES.v2", "Same", "Both", "Unheard"}
    found = write_prompts.prompts(paper, known, "<{instruction}>")
    expected = {"document": "", "query": "<Find.>", "MSMARCO-query": "<Find.>", "Same": "<Sort.>"}
    expected |= {"BIOSSES": "<Compare.>", "BIOSSES.v2": "<Compare.>"}
    expected |= {"Both-query": "<Ask.>", "Both-document": "<Answer.>"}
    types = {name: f"<{instruction}>" for name, instruction in write_prompts.TYPES.items()}
    assert types["STS"] == types["PairClassification"] == "<Retrieve semantically similar text.>"
    assert types["Classification"] == "<Classify the given text.>" and "Reranking" not in types
    assert found == expected | types


def test_published_prompts_are_those_of_the_recipe():
    mteb = pytest.importorskip("mteb", reason="mteb is in requirements-eval.txt")
    import write_prompts

    def read(name: str) -> dict:
        return json.loads((ROOT / name).read_text(encoding="utf-8"))

    known = {task.metadata.name for task in mteb.get_tasks(exclude_superseded=False)}
    template = read("processor_config.json")["prompt_template"]
    expected = write_prompts.prompts(read("recipes/root_model/instructions.json")["mteb"], known, template)
    assert read("config_sentence_transformers.json")["prompts"] == expected


def test_a_folder_of_data_is_checked_against_the_manifest(tmp_path):
    manifest = {}
    for name, lines in {
        "text/a.txt.gz": "one\ntwo\n",
        "train/b.jsonl.gz": "{}\n",
        "eval/c.jsonl.gz": "{}\n{}\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir()
        path.write_bytes(gzip.compress(lines.encode(), mtime=0))
        manifest[name] = {"rows": lines.count("\n"), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert check_data.differences(tmp_path, manifest) == []

    whole = (tmp_path / "text/a.txt.gz").read_bytes()
    (tmp_path / "text/a.txt.gz").write_bytes(gzip.compress(b"one\n", mtime=0))
    (tmp_path / "train/b.jsonl.gz").unlink()
    (tmp_path / "eval/c.jsonl.gz").write_bytes(gzip.compress(b"{}\n[]\n", mtime=0))
    (tmp_path / "train/more.jsonl.gz").touch()
    assert check_data.differences(tmp_path, manifest) == [
        "text/a.txt.gz: 1 rows instead of 2",
        "train/b.jsonl.gz: missing",
        "eval/c.jsonl.gz: as many rows, but other bytes",
        "train/more.jsonl.gz: not in the manifest",
    ]
    (tmp_path / "text/a.txt.gz").write_bytes(whole[:-4])
    assert check_data.differences(tmp_path, manifest)[0] == "text/a.txt.gz: not a whole gzip file"


def test_the_page_of_the_data_holds_the_manifests_table():
    manifest = check_data.read_manifest()
    assert check_data.table(manifest) in (ROOT / "recipes/DATA.md").read_text(encoding="utf-8")
    assert all(re.fullmatch("[0-9a-f]{64}", known["sha256"]) and known["rows"] > 0 for known in manifest.values())
    # what the result of an evaluation was measured on
    tasks = {row["task"].partition("-")[0] for row in report_results.read(ROOT / "results/root.json")["tasks"]}
    assert {task for task in tasks if not any(name.startswith(f"eval/{task}") for name in manifest)} == set()
