"""The recipes on a few made texts and tiny models: each runs as its head says, and does what it says there."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, HfArgumentParser

from conftest import ROOT
from helpers import make_tokenizer, text_config

sys.path.extend(str(ROOT / "recipes" / folder) for folder in ("", "root_model", "paper", "figures"))
import align_vectors
import check_data
import compare_methods
import distil
import experiments
import graphs
import report_results
import reset_weights
import shorten
import train_gircse
from gircse.loading import load
from gircse.training.arguments import ModelArguments

SAMPLE = ROOT / "sample_pairs.jsonl"


def recipe(name: str, *arguments: object) -> str:
    command = [sys.executable, f"recipes/{name}.py", *map(str, arguments)]
    environment = os.environ | {"TORCH_COMPILE_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a backbone, texts with vectors of a made teacher, and a model distilled from these."""
    folder = tmp_path_factory.mktemp("recipes")
    rows = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    torch.manual_seed(0)
    backbone = AutoModelForCausalLM.from_config(text_config("llama", vocab_size=400, initializer_range=0.02))
    backbone.save_pretrained(folder / "backbone")
    make_tokenizer().save_pretrained(folder / "backbone")

    texts = list(dict.fromkeys(row["query"] for row in rows))[:128]
    # the teacher knows a text by its first letter, which a student has to learn
    letters = torch.nn.functional.normalize(torch.randn(256, 32, generator=torch.Generator().manual_seed(0)), dim=-1)
    vectors = np.stack([letters[ord(text[0]) % 256].numpy() for text in texts]).astype(np.float16)
    (folder / "teacher").mkdir()
    (folder / "teacher/texts.json").write_text(json.dumps(texts), encoding="utf-8")
    np.save(folder / "teacher/vectors.npy", vectors)
    settings = "--batch_size 16 --learning_rate 1e-2 --max_steps 96 --max_length 40"
    where = ("--vectors", folder / "teacher", "--output_dir", folder / "distilled")
    recipe("root_model/distil", "--model_name_or_path", folder / "backbone", *where, *settings.split())
    return SimpleNamespace(folder=folder, texts=texts, vectors=torch.from_numpy(vectors).float())


def test_vectors_are_aligned_with_a_students_without_changing_a_similarity():
    teacher, noise = (torch.randn(200, n, generator=torch.Generator().manual_seed(n)) for n in (6, 10))
    teacher = torch.nn.functional.normalize(teacher, dim=-1)
    turn = torch.linalg.qr(noise[:10])[0][:, :6]  # orthonormal columns: how the student's space lies
    student = teacher @ turn.T + 0.05 * noise + 3  # all of the student's vectors lie to one side
    aligned = align_vectors.alignment(teacher, student)
    torch.testing.assert_close(aligned.T @ aligned, torch.eye(6), atol=1e-5, rtol=0)
    assert (aligned - turn).abs().max() < 0.05
    with pytest.raises(ValueError, match="10 dimensions don't fit into the model's 6"):
        align_vectors.alignment(student, teacher)


@pytest.mark.slow
def test_aligned_vectors_are_what_distillation_reads(made, tmp_path):
    """A teacher with fewer dimensions than the student."""
    (tmp_path / "teacher").mkdir()
    shutil.copy(made.folder / "teacher/texts.json", tmp_path / "teacher")
    narrow = torch.nn.functional.normalize(made.vectors[:, :20], dim=-1)
    np.save(tmp_path / "teacher/vectors.npy", narrow.numpy().astype(np.float16))
    where = ("--vectors", tmp_path / "teacher", "--output_dir", tmp_path / "aligned", "--fit_on", "64")
    said = recipe("root_model/align_vectors", "--model_name_or_path", made.folder / "backbone", *where)
    aligned = distil.TeacherTexts(str(tmp_path / "aligned"))
    vectors = torch.stack([vector for _, vector in aligned])
    assert aligned.texts == made.texts and vectors.shape == (128, 32)
    torch.testing.assert_close(vectors @ vectors.T, narrow @ narrow.T, atol=5e-3, rtol=0)
    assert float(re.search(r"before any training: (-?\d\.\d+)", said)[1]) > 0.1


@torch.no_grad()
def test_a_shorter_backbone_is_the_kept_layers_in_their_order():
    model = AutoModelForCausalLM.from_config(text_config("llama", num_hidden_layers=5)).eval()
    ids = torch.arange(3, 12)[None]
    states = model.model(ids, output_hidden_states=True).hidden_states
    position = torch.arange(9)[None]
    expected = states[1]
    for layer in model.model.layers[3:]:
        made = layer(expected, position_embeddings=model.model.rotary_emb(expected, position), position_ids=position)
        expected = made[0] if isinstance(made, tuple) else made
    shorten.leave_out(model, 1, 2)
    assert model.config.num_hidden_layers == len(model.model.layers) == 3
    found = model.model(ids, use_cache=True)
    torch.testing.assert_close(found.last_hidden_state, model.model.norm(expected), atol=1e-5, rtol=1e-4)
    assert found.past_key_values.get_seq_length(2) == 9
    for first, last in ((0, 2), (2, 1), (1, 3)):
        with pytest.raises(ValueError, match=f"leave_out {first} {last}: must be some of layers 0 to 2, not all"):
            shorten.leave_out(model, first, last)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loop_of_the_graphs_is_the_models(make_model, side):
    """Values and gradients, after padding to fixed lengths and rows."""
    model = make_model("qwen2-tied", logit_temperature=2.0).train()
    model.language_model.config._attn_implementation = "eager"
    ids, mask = torch.arange(3, 21).reshape(3, 6), torch.ones(3, 6, dtype=torch.long)
    mask[0, :2], mask[1, :3] = 0, 0
    if side == "right":
        ids, mask = ids.flip(1), mask.flip(1)
    expected = model(ids, mask, k=3).step_embeddings
    weights = torch.randn_like(expected)
    parameters = [*model.parameters()]
    gradients = torch.autograd.grad((expected * weights).sum(), parameters)
    loop = graphs.GraphedLoop(model, (4, 16, 8))
    found = loop(ids, mask, k=3, rows=5)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    for ours, theirs in zip(torch.autograd.grad((found * weights).sum(), parameters), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    assert list(loop.graphs) == [(5, 8, 3)]
    with pytest.raises(ValueError, match=r"a text has 6 tokens, more than the last of lengths=\[4\]"):
        graphs.GraphedLoop(model, [4])(ids, mask, k=3, rows=5)


@torch.no_grad()
def cosines(path, made, k: int) -> float:
    model, processor = load(path)
    z = model.eval()(**processor(made.texts), k=k).embeddings
    return 1 - distil.distillation_loss(z, made.vectors).item()


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 12])
def test_distillation_teaches_every_number_of_steps(made, k):
    before, after = (cosines(made.folder / name, made, k) for name in ("backbone", "distilled"))
    assert before < 0.2 and after > before + 0.3


def test_distillation_loss_is_one_minus_the_mean_cosine():
    z = torch.eye(3)[:2]
    assert distil.distillation_loss(z, torch.eye(3)[[0, 0]]).item() == pytest.approx(0.5)


@pytest.mark.slow
def test_the_teachers_batches_are_of_like_length_and_take_each_text_once_an_epoch(made):
    texts = distil.TeacherTexts(str(made.folder / "teacher"))
    _, processor = load(made.folder / "distilled")
    loader = distil.teacher_loader(texts, processor, 10, 40, seed=0)
    first, second = list(loader.sampler), list(loader.sampler)
    assert sorted(first) == sorted(second) == list(range(len(texts))) and first != second
    lengths = [len(texts[row][0]) for row in first]
    within = np.mean([max(lengths[i : i + 10]) - min(lengths[i : i + 10]) for i in range(0, 120, 10)])
    assert within < (max(lengths) - min(lengths)) / 2
    batch = next(iter(loader))
    assert len(batch["input_ids"]) == len(batch["vectors"]) == 10 and len(loader) == len(texts) // 10


@pytest.mark.slow
def test_vectors_of_another_size_are_refused(made, tmp_path):
    np.save(tmp_path / "vectors.npy", np.zeros((1, 5), np.float16))
    (tmp_path / "texts.json").write_text('["a text"]')
    command = ["--model_name_or_path", made.folder / "backbone", "--vectors", tmp_path, "--output_dir", tmp_path / "o"]
    command += ["--max_steps", "1"]
    with pytest.raises(AssertionError, match="5 dimensions, but the model has 32"):
        recipe("root_model/distil", *command)


def logged(folder) -> list[dict]:
    lines = (folder / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


def train(name: str, made, folder, *arguments: str) -> list[dict]:
    """The log of two steps from the distilled model."""
    settings = "--tuning full --max_steps 2 --logging_steps 1 --k 3 --held_out 16 --report_to none --max_length 60"
    settings += " --per_device_train_batch_size 8 --save_strategy no --mix_sources"
    where = ("--model_name_or_path", made.folder / "distilled", "--output_dir", folder)
    recipe(name, *where, *settings.split(), *arguments)
    assert (folder / "model.safetensors").exists()
    return logged(folder)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["icr", "last_step", "mixed_steps"])
def test_objectives(made, tmp_path, objective):
    line = train("paper/train_objective", made, tmp_path, "--objective", objective)[0]
    steps = [line[name] for name in line if name.startswith("L_") and name != "L_reg"]
    assert len(steps) == (1 if objective == "last_step" else 3)
    assert line["loss"] == pytest.approx(sum(steps) + line["L_reg"], rel=1e-3)
    assert (line["L_reg"] == 0) >= (objective == "last_step")


@pytest.mark.slow
def test_the_way_back_through_soft_tokens(made, tmp_path):
    """Its gradient is scaled, and the values are not; a learned temperature moves and is what the folder has."""
    settings = ("--learning_rate", "1e-3", "--warmup_ratio", "0", "--max_grad_norm", "1e9")
    plain, same, none = (
        train("paper/train_objective", made, tmp_path / f"share{share}", "--soft_token_gradient", share, *settings)
        for share in ("1", "0.999999", "0")
    )
    assert plain[0]["loss"] == pytest.approx(none[0]["loss"], rel=1e-5)
    assert plain[0]["grad_norm"] == pytest.approx(same[0]["grad_norm"], rel=1e-6)
    assert plain[0]["grad_norm"] != pytest.approx(none[0]["grad_norm"], rel=2e-5)
    learned = train("paper/train_objective", made, tmp_path / "learned", "--learn_temperature", *settings)
    assert learned[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-5) and learned[1]["temperature"] != 1
    config = json.loads((tmp_path / "learned" / "config.json").read_text(encoding="utf-8"))
    assert config["logit_temperature"] != 1 and abs(config["logit_temperature"] - learned[1]["temperature"]) < 0.5


@pytest.mark.slow
def test_a_teacher_adds_its_loss(made, tmp_path):
    teacher = ("--vectors", str(made.folder / "teacher"), "--teacher_batch_size", "16")
    line = train("root_model/train_with_teacher", made, tmp_path, *teacher, "--teacher_weight", "10")[0]
    icr = sum(value for name, value in line.items() if name.startswith("L_"))
    assert 0 < line["loss"] - icr < 10  # 10 x (1 - cos) of a distilled model


@pytest.mark.slow
def test_weights_are_reset_and_trained_alone(made, tmp_path):
    def weights(folder):
        return load(str(folder))[0].state_dict()

    chosen = "layers[.]1[.](?!input)"
    recipe(
        "root_model/reset_weights", made.folder / "distilled", made.folder / "backbone", tmp_path, "--weights", chosen
    )
    backbone, trained, reset = map(weights, (made.folder / "backbone", made.folder / "distilled", tmp_path))
    for name, weight in reset.items():
        assert torch.equal(weight, (backbone if re.search(chosen, name) else trained)[name]), name
    assert any(not torch.equal(reset[name], trained[name]) for name in reset)
    teacher = ("--vectors", str(made.folder / "teacher"), "--steps", "2", "--only", chosen)
    train("root_model/train_with_teacher", made, tmp_path / "again", *teacher, "--warmup_ratio", "0")
    moved = {name for name, weight in weights(tmp_path / "again").items() if not torch.equal(weight, trained[name])}
    assert moved == {name for name in trained if re.search(chosen, name)}
    with pytest.raises(ValueError, match="--weights 'no such' matches no weight, such as language_model"):
        reset_weights.reset(
            torch.nn.ModuleDict({"language_model": torch.nn.Linear(1, 1)}), torch.nn.Module(), "no such"
        )


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
    runs = report_results.experiments()
    models = {name: report_results.read(ROOT / f"results/{name}.json") for name in ("root", "minilm")}
    made = report_results.tables(models, runs, min(run["samples"] for run in runs))
    counts = {"README.md": 1, "docs/results.md": 6, "docs/root_model.md": 2, "docs/training.md": 3, "docs/speed.md": 15}
    assert {page: len(tables) for page, tables in made.items()} == counts
    for page, tables in made.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        assert report_results.fill(text, tables) == text, page
    card = (ROOT / "README.md").read_text(encoding="utf-8")
    assert report_results.with_model_index(card, models["root"]) == card
    with pytest.raises(ValueError, match="no place for a model-index"):
        report_results.with_model_index(card.replace("model-index:", "model-list:"), models["root"])


def test_every_run_of_the_experiments_has_a_result_and_settings_that_training_takes(tmp_path, monkeypatch):
    commands = {}
    monkeypatch.setattr(experiments, "call", lambda command, log, threads: commands.update({log.parent.name: command}))
    args = SimpleNamespace(backbone=Path("small"), data=Path("DATA"), threads=1)
    for run in experiments.plan(20_000, 40_000, 3):
        experiments.train(run, 3e-4, args, tmp_path / run.name)
    results = {path.stem for path in (ROOT / "results/experiments").glob("*-seed*.json")}
    assert results == {*commands, "causal_eos_generating-20000-seed0"}

    parser = HfArgumentParser((ModelArguments, train_gircse.GircseTrainingArguments, train_gircse.DataArguments))
    models, settings = {}, {}
    for name, command in commands.items():
        parsed = parser.parse_args_into_dataclasses(command[2:], return_remaining_strings=True)
        models[name], settings[name], _, rest = parsed
        assert rest in ([], ["--objective", name.partition("-")[0]])
        assert settings[name].mix_sources and settings[name].seed == int(name[-1])
    axes = {name: (model.step_token, model.attention, model.pooling) for name, model in models.items()}
    assert axes["causal_eos-20000-seed0"] == ("none", "causal", "last")
    assert axes["bidirectional_avg-20000-seed0"] == ("none", "bidirectional", "mean")
    assert axes["causal_avg-20000-seed0"] == ("none", "causal", "mean")
    for method in ("gircse", "causal_eos", "bidirectional_avg"):
        names = (f"{method}-20000-seed1", f"{method}_long_warm_up-20000-seed1")
        assert [settings[name].get_warmup_steps(312) for name in names] == [32, 156]
        assert axes[names[0]] == axes[names[1]]
    assert models["gircse_end_token-20000-seed2"].suffix == models["causal_eos-20000-seed0"].suffix != ""
    assert settings["no_refinement-20000-seed0"].refinement_weight == 0


def test_every_run_of_the_comparison_has_settings_that_training_takes(tmp_path, monkeypatch):
    commands = {}
    monkeypatch.setattr(
        compare_methods, "call", lambda command, log, threads: commands.update({log.parent.name: command})
    )
    places = {"backbone": Path("SMOLLM2"), "data": Path("DATA"), "runs": tmp_path}
    args = SimpleNamespace(**places, threads=1, training="--logging_steps 7")
    for run in compare_methods.plan():
        compare_methods.train(run, 1e-4, 640, args, tmp_path / run.name)
    results = {path.stem for path in (ROOT / "results/comparison").glob("*-seed*.json")}
    assert results <= {*commands, "causal_eos_generating-seed0"}

    parser = HfArgumentParser((ModelArguments, train_gircse.GircseTrainingArguments, train_gircse.DataArguments))
    models, settings = {}, {}
    for name, command in commands.items():
        parsed = parser.parse_args_into_dataclasses(command[2:], return_remaining_strings=True)
        models[name], settings[name], data, rest = parsed
        assert rest in ([], ["--objective", name.partition("-")[0]]) and data.max_length == 64
        batch = settings[name].per_device_train_batch_size, settings[name].gradient_accumulation_steps
        assert batch == ((2, 8) if "_two-" in name else (16, 1)) and settings[name].seed == int(name[-1])
        assert settings[name].logging_steps == 7  # the last one given counts
        tuning = ("lora", 5e-4) if "_lora-" in name else ("full", 1e-4)
        assert (models[name].tuning, settings[name].learning_rate) == tuning
    axes = {name: (model.step_token, model.attention, model.pooling) for name, model in models.items()}
    for name, found in axes.items():
        eos, both_ways = name.startswith("causal_eos"), name.startswith("bidirectional_avg")
        pooling, attention = "last" if eos else "mean", "bidirectional" if both_ways else "causal"
        assert found == ("none" if eos or both_ways else "soft", attention, pooling)
    assert settings["no_refinement-seed0"].refinement_weight == 0


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


STEPS_OF_THE_ROOT_MODEL = (
    "shorten",
    "teacher_vectors",
    "align_vectors",
    "distil",
    "reset_weights",
    "train_with_teacher",
)


def test_the_root_models_steps_import_earlier_ones_alone():
    for number, name in enumerate(STEPS_OF_THE_ROOT_MODEL):
        code = (ROOT / f"recipes/root_model/{name}.py").read_text(encoding="utf-8")
        imported = re.findall(r"^\s*(?:import|from) (\w+)", code, re.MULTILINE)
        assert not set(imported) & set(STEPS_OF_THE_ROOT_MODEL[number:]), name


def test_publishing_stops_before_it_overwrites_when_a_file_is_missing(tmp_path):
    before = hashlib.sha256((ROOT / "config.json").read_bytes()).hexdigest()
    (tmp_path / "gircse").mkdir()
    (tmp_path / "gircse/config.json").write_text("{}")
    command = ["bash", "recipes/root_model/publish.sh", tmp_path, tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "model.safetensors is missing: run recipes/root_model/make.sh" in done.stderr
    assert hashlib.sha256((ROOT / "config.json").read_bytes()).hexdigest() == before
