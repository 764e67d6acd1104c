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
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, Qwen2Config

from conftest import ROOT

sys.path.extend(str(ROOT / "recipes" / folder) for folder in ("", "root_model", "paper", "figures"))
import bag_of_tokens
import check_data
import distil
import experiments
import report_results
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
    """A folder with a pretrained backbone, texts with vectors of a made teacher, and a model distilled from these."""
    folder = tmp_path_factory.mktemp("recipes")
    rows = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    (folder / "plain.txt").write_text("\n".join(row["query"] for row in rows), encoding="utf-8")
    sizes = "--vocab_size 400 --hidden_size 32 --intermediate_size 48 --num_layers 2 --num_heads 4 --block_size 64"
    sizes += " --batch_size 8 --max_steps 40 --learning_rate 5e-3"
    texts = ("--text", folder / "*.txt", SAMPLE)
    recipe("root_model/pretrain_backbone", *texts, *sizes.split(), "--output_dir", folder / "backbone")

    texts = list(dict.fromkeys(row["query"] for row in rows))[:128]
    # the teacher knows a text by its first letter, which a student has to learn
    letters = torch.nn.functional.normalize(torch.randn(256, 32, generator=torch.Generator().manual_seed(0)), dim=-1)
    vectors = np.stack([letters[ord(text[0]) % 256].numpy() for text in texts]).astype(np.float16)
    (folder / "teacher").mkdir()
    (folder / "teacher/texts.json").write_text(json.dumps(texts), encoding="utf-8")
    np.save(folder / "teacher/vectors.npy", vectors)
    settings = "--batch_size 16 --learning_rate 1e-2 --epochs 12 --max_length 40"
    where = ("--vectors", folder / "teacher", "--output_dir", folder / "distilled")
    recipe("root_model/distil", "--model_name_or_path", folder / "backbone", *where, *settings.split())
    return SimpleNamespace(folder=folder, texts=texts, vectors=torch.from_numpy(vectors).float())


@pytest.mark.slow
def test_pretraining_reports_and_its_tokenizer_is_what_autotokenizer_loads(made):
    backbone = made.folder / "backbone"
    report = json.loads((backbone / "pretraining.json").read_text(encoding="utf-8"))
    assert report["command"].startswith("python recipes/root_model/pretrain_backbone.py --text")
    assert report["parameters"] == AutoModelForCausalLM.from_pretrained(backbone).num_parameters()
    assert len(report["continuations"]) == 4
    assert report["held_out_loss"][-1]["tokens_seen"] == 40 * 8 * 64
    assert 0 < report["held_out_loss"][-1]["nats_per_token"] < np.log(400)

    from tokenizers import Tokenizer

    written, loaded = Tokenizer.from_file(str(backbone / "tokenizer.json")), AutoTokenizer.from_pretrained(backbone)
    for text in ["It's 2026, isn't it?", "a  b\n\nc\t1,234.5", "naïve café – 日本", "I'LL pay $30!!"]:
        assert written.encode(text).ids == loaded(text)["input_ids"]
        assert loaded.decode(written.encode(text).ids) == text


def fitted_bag(made) -> bag_of_tokens.BagOfTokens:
    tokenizer = AutoTokenizer.from_pretrained(made.folder / "backbone")
    return bag_of_tokens.fit(made.texts, made.vectors, tokenizer, epochs=10, batch_size=32)


def backbone_for_a_bag(**changes):
    sizes = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": False}
    return AutoModelForCausalLM.from_config(Qwen2Config(**sizes | heads | changes))


@pytest.mark.slow
def test_every_position_of_the_first_layer_holds_the_bag_of_the_text_so_far(made):
    bag, model = fitted_bag(made), backbone_for_a_bag()
    tokenizer = AutoTokenizer.from_pretrained(made.folder / "backbone")
    found = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *call: found.append(call[-1][0]))
    bag_of_tokens.install(bag, model)
    near = []
    for text, vector in zip(made.texts[:16], made.vectors, strict=False):
        ids = tokenizer(text)["input_ids"]
        with torch.no_grad():
            model(torch.tensor([ids]))
            expected = bag([ids[: i + 1] for i in range(len(ids))])
        torch.testing.assert_close(torch.nn.functional.normalize(found[-1][0], dim=-1), expected, atol=2e-3, rtol=0)
        near.append(expected[-1] @ vector)
    assert torch.stack(near).mean() > 0.5


@torch.no_grad()
def test_damping_takes_the_layers_back_to_the_bag():
    model = backbone_for_a_bag(num_hidden_layers=3)
    bag_of_tokens.install(bag_of_tokens.BagOfTokens(400, 32), model)
    ids = torch.arange(20)[None]
    found = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *call: found.append(call[-1][0]))
    before = model.model(ids, output_hidden_states=True).hidden_states
    bag = model.get_input_embeddings()(ids) + found[0]
    bag_of_tokens.damp(model, 0.1)
    after = model.model(ids, output_hidden_states=True).hidden_states
    assert 0 < (after[2] - bag).norm() < 0.15 * (before[2] - bag).norm()
    bag_of_tokens.damp(model, 0)
    torch.testing.assert_close(model.model(ids, output_hidden_states=True).hidden_states[2], bag)


@pytest.mark.slow
def test_pretraining_leaves_the_bag_as_it_is(made, tmp_path):
    sizes = "--hidden_size 32 --intermediate_size 48 --num_layers 2 --num_heads 2 --num_key_value_heads 2"
    sizes += " --block_size 64 --batch_size 8 --max_steps 3"
    for file in (made.folder / "backbone").glob("tokenizer*.json"):
        shutil.copy(file, tmp_path)
    texts = ("--text", made.folder / "*.txt", SAMPLE, "--vectors", made.folder / "teacher")
    recipe("root_model/pretrain_backbone", *texts, *sizes.split(), "--output_dir", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, torch_dtype=torch.float32)
    attention = model.model.layers[0].self_attn
    torch.testing.assert_close(attention.v_proj.weight, torch.eye(32))
    norms = model.get_input_embeddings().weight.square().mean(-1).sqrt()
    torch.testing.assert_close(norms, torch.full((400,), 0.5), atol=5e-3, rtol=0)
    assert model.get_output_embeddings().weight.std() < 0.1  # a head of its own


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tie_word_embeddings": True}, "untied embeddings"),
        ({"num_key_value_heads": 1}, "num_key_value_heads is 1"),
        ({"hidden_size": 64}, "32 dimensions, but the model has 64"),
    ],
)
def test_backbones_that_cannot_hold_a_bag_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        bag_of_tokens.install(bag_of_tokens.BagOfTokens(400, 32), backbone_for_a_bag(**changes))


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
    assert plain[0]["grad_norm"] == pytest.approx(same[0]["grad_norm"], rel=1e-3)
    assert plain[0]["grad_norm"] != pytest.approx(none[0]["grad_norm"], rel=1e-3)
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
    counts = {"README.md": 1, "docs/results.md": 6, "docs/training.md": 3, "docs/speed.md": 14}
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


STEPS_OF_THE_ROOT_MODEL = ("teacher_vectors", "bag_of_tokens", "pretrain_backbone", "distil", "train_with_teacher")


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
