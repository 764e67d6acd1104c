"""Two-stage generation: texts that a causal LM augments before a model embeds them."""

from __future__ import annotations

import json
import sys

import pytest
import torch

pytest.importorskip("mteb", reason="mteb is in requirements-eval.txt")
from transformers import AutoModelForCausalLM

from conftest import ROOT

sys.path.append(str(ROOT / "recipes/paper"))
import two_stage

from evaluate_gircse import main
from evaluation_helpers import FACETS, QUERIES, SCENES, run, scores
from gircse.evaluation import expansion, subjects
from gircse.evaluation.expansion import REQUEST, Writer
from helpers import make_tokenizer, tiny_text_config


@pytest.fixture
def writer_folder(tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_text_config()).save_pretrained(tmp_path / "writer")
    make_tokenizer().save_pretrained(tmp_path / "writer")
    return tmp_path / "writer"


@pytest.fixture
def make_writer(writer_folder, tmp_path):
    return lambda tokens=6, size=3: Writer(
        str(writer_folder), tmp_path / "kept" / f"{tokens}.jsonl", tokens, size, torch.float32, "cpu", iter
    )


TEXTS = ["a boat on the lake", "snow", "the oven is hot, and so is the pan on it", "tea"]


def test_an_augmentation_is_what_the_writer_says_to_the_papers_request(make_writer):
    """Alone and in a batch."""
    writer = make_writer()
    request = REQUEST.format(tokens=6, instruction="Find the topic.", text="snow") + "\n\nAUGMENTATION:"
    ids = writer.tokenizer(request, return_tensors="pt")["input_ids"]
    said = writer.model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    expected = f"snow\n{writer.tokenizer.decode(said, skip_special_tokens=True).strip()}"
    assert writer(["snow"], "Find the topic.") == [expected] == make_writer()(TEXTS, "Find the topic.")[1:2]
    assert writer(TEXTS, "") == TEXTS  # documents of a search


def test_a_chat_is_asked_in_its_template(make_writer):
    writer = make_writer()
    writer.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<me>"
    asked = writer._request("word " * 2000, "Find {it}.")
    assert asked.startswith("<user>Given the INSTRUCTION") and asked.endswith("<me>") and "Find {it}." in asked
    assert asked.count("word") < expansion.LONGEST + 1


def test_augmentations_are_kept_by_text_and_instruction(make_writer, tmp_path, monkeypatch):
    calls = []
    write = Writer.write
    monkeypatch.setattr(Writer, "write", lambda self, texts, i: calls.append(len(texts)) or write(self, texts, i))
    first = make_writer()(TEXTS[:3], "Find the topic.")
    [file] = (tmp_path / "kept").iterdir()
    assert file.name == "6.jsonl" and calls == [3]
    with file.open("a", encoding="utf-8") as lines:  # as a killed run leaves it
        lines.write('{"key": "12')
    assert make_writer()(TEXTS + TEXTS, "Find the topic.")[:3] == first and calls == [3, 1]
    make_writer()(TEXTS[:1], "Find the tone.")
    make_writer(tokens=2)(TEXTS[:1], "Find the topic.")
    assert calls == [3, 1, 1, 1]
    assert all({*json.loads(line)} == {"key", "augmentation"} for line in file.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("name", ["expansion_tokens", "max_length", "batch_size", "sample"])
def test_sizes_are_at_least_one(capsys, name):
    with pytest.raises(SystemExit):
        main(["--tasks", "STS12", f"--{name}", "0"])
    assert f"argument --{name}: '0' is not a whole number above 0" in capsys.readouterr().err


def test_any_character_is_kept_and_read_again(make_writer, monkeypatch):
    """Also those that str.splitlines takes for an end of a line."""
    monkeypatch.setattr(Writer, "write", lambda self, texts, i: [f"{text}\u2028\x85é\n" for text in texts])
    first = make_writer()(["é", "b"], "Find.")
    monkeypatch.setattr(Writer, "write", None)
    assert make_writer()(["é", "b"], "Find.") == first == ["é\né\u2028\x85é\n", "b\nb\u2028\x85é\n"]


def test_the_recipe_sets_augmented_texts_beside_texts_alone(
    model_folder, static_folder, data_folder, writer_folder, tmp_path, monkeypatch
):
    """Each model's own score, at the k that it was asked for."""
    models = [{"model": str(model_folder), "model_name": "our/own"}, {"model": str(static_folder)}]
    (tmp_path / "models.json").write_text(json.dumps(models))
    output = tmp_path / "two_stage.json"
    argv = ["--models", str(tmp_path / "models.json"), "--tasks", "sts_pairs", "--data", str(data_folder), "--k", "2"]
    more = ["--expand_with", str(writer_folder), "--expansion_tokens", "4", "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["two_stage.py", *argv, *more, "--output", str(output)])
    two_stage.main()
    found = json.loads(output.read_text())["scores"]["sts_pairs"]
    assert {*found} == {"our/own", static_folder.name} and {*found["our/own"]} == {"alone", "augmented"}
    assert found["our/own"]["alone"] != found["our/own"]["augmented"]
    report = run(model_folder, tmp_path / "alone", "--k", "2", data=data_folder, tasks=["sts_pairs"])
    assert found["our/own"]["alone"] == scores(report)["sts_pairs"]["2"]


@pytest.mark.parametrize("loaded", [False, True], ids=["Sentence Transformers", "mteb's loader"])
def test_tasks_are_evaluated_on_augmented_texts(
    loaded, static_folder, registry, data_folder, writer_folder, tmp_path, monkeypatch
):
    """Under the bare instruction of each, and filed apart from the plain ones."""
    model = registry("model", instruction_template="{instruction} ") if loaded else static_folder
    asked: list[tuple[str, set[str]]] = []

    def told(self: Writer, texts: list[str], instruction: str) -> list[str]:
        asked.append((instruction, {*texts}))
        return [f"{text} {text.upper()}" for text in texts]

    tasks, out = ["instruct_scenes-animal", "retrieval_little"], tmp_path / "out"
    plain = run(model, out, data=data_folder, tasks=tasks)
    monkeypatch.setattr(Writer, "__call__", told)
    options = ("--expand_with", str(writer_folder), "--expansion_tokens", "4")
    report = run(model, out, *options, data=data_folder, tasks=tasks)
    name = f"writer@{subjects.content_hash(writer_folder)}"
    assert report["settings"] == {"expand_with": name, "expansion_tokens": 4}
    instructions = {instruction: texts for instruction, texts in asked}
    assert instructions[FACETS["animal"]] == {row["text"] for row in SCENES}
    assert any("Given" in name and texts == {*QUERIES.values()} for name, texts in instructions.items())
    assert scores(report) != scores(plain)
    rows = {row["task"]: row["prompts"] for row in report["tasks"]}
    assert rows["instruct_scenes-animal"]["both, augmented for"] == FACETS["animal"]
    half = run(model, tmp_path / "half", *options, "--dtype", "bfloat16", data=data_folder, tasks=tasks[:1])
    assert half["settings"].get("expansion_dtype") == ("bfloat16" if loaded else None)
