"""Folders made of weights that were trained elsewhere: LaSER's, and adapters of a plain causal LM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

from convert_gircse import main
from gircse.loading import sentence_transformers_settings
from gircse.training.arguments import ModelArguments
from helpers import laser, make_tokenizer, save_adapter
from train_gircse import load_model

TEXTS = ["a red thing", "cold", ""]


def loaded(folder):
    return (kind.from_pretrained(str(folder), trust_remote_code=True) for kind in (AutoModel, AutoProcessor))


@pytest.fixture
def plain(make_plain):
    tokenizer = make_tokenizer()
    language_model, folder = make_plain("qwen3", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder)
    return language_model, folder


def test_a_laser_checkpoint_gives_the_vectors_of_its_procedure(plain, tmp_path, caplog):
    arguments = ["--pooling", "mean_with_prompt", "--num_steps", "2", "--max_length", "40", "--save_dtype", "float32"]
    arguments += ["--prompt_template", r"<user>\nInstruct: {instruction}\nQuery: ", "--suffix", r"</user>\n"]
    main([plain[1], "--output_dir", str(tmp_path / "made"), *arguments, "--document_prompt", r"<user>\n"])
    model, processor = loaded(tmp_path / "made")
    inputs = processor(TEXTS, instruction="Find.")
    expected = F.normalize(laser(model, inputs["input_ids"], inputs["attention_mask"], 3), dim=-1)
    torch.testing.assert_close(model.generate_embedding(**inputs), expected, atol=1e-5, rtol=1e-4)
    assert processor.prompt_for("Find.") == "<user>\nInstruct: Find.\nQuery: "
    assert (processor.suffix, processor.max_length) == ("</user>\n", 40)
    settings = json.loads((tmp_path / "made/config_sentence_transformers.json").read_text(encoding="utf-8"))
    assert settings["prompts"]["document"] == "<user>\n"
    load_model(ModelArguments(str(tmp_path / "made")))
    assert "documents are trained without the model's prompt for them, '<user>\\n'" in caplog.text
    for ours, theirs in zip(model.language_model.parameters(), plain[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_prompt_of_another_template_is_of_its_model_alone(tmp_path, monkeypatch):
    """As of a converted folder that trains on: the next model's prompts are this one's that have its template."""
    prompts = {"query": "Instruct: Find.\nQuery: ", "document": "<user>\n", "STS": ""}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    settings = {"prompt_template": "Instruct: {instruction}\nQuery: "}
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr("gircse.loading.ROOT", tmp_path)
    found = sentence_transformers_settings("[{instruction}]")["prompts"]
    assert found == {"query": "[Find.]", "document": "", "STS": ""}


@pytest.fixture
def adapter(plain, tmp_path):
    return save_adapter(plain[0], tmp_path / "adapter", std=0.3)


def test_an_adapter_is_merged(plain, adapter, tmp_path):
    made = tmp_path / "made"
    main([plain[1], "--adapter", adapter, "--output_dir", str(made), "--save_dtype", "float32", "--suffix", ""])
    model, processor = loaded(made)
    inputs = processor(TEXTS, instruction="Find.")
    expected = type(model).from_causal_lm(plain[1], adapter=adapter, logit_temperature=1.0)
    found = model.generate_embedding(**inputs, k=3)
    torch.testing.assert_close(found, expected.generate_embedding(**inputs, k=3), atol=1e-5, rtol=1e-4)
    without = type(model).from_causal_lm(plain[1], logit_temperature=1.0)
    assert F.cosine_similarity(found, without.generate_embedding(**inputs, k=3)).max() < 0.999


def test_an_adapter_stays_one(plain, adapter, tmp_path, caplog):
    made = tmp_path / "made"
    main([plain[1], "--adapter", adapter, "--save_adapter", "--output_dir", str(made), "--suffix", ""])
    assert not list(made.glob("*.safetensors"))
    name = "adapter_model.safetensors"
    assert (made / "adapter" / name).read_bytes() == Path(adapter, name).read_bytes()
    settings = json.loads((made / "adapter/adapter_config.json").read_text(encoding="utf-8"))
    assert settings["base_model_name_or_path"] == str(Path(plain[1]).resolve()) and settings["r"] == 4
    assert "loads on this machine alone" in caplog.text
    assert settings["revision"] is None and settings["inference_mode"]  # as Sentence Transformers looks for
    model, processor = loaded(made)
    inputs = processor(TEXTS, instruction="Find.")
    expected = type(model).from_causal_lm(plain[1], adapter=adapter, logit_temperature=1.0)
    found = model.generate_embedding(**inputs, k=3)
    torch.testing.assert_close(found, expected.generate_embedding(**inputs, k=3), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "arguments, error",
    [
        (["--output_dir", "{new}", "--save_adapter", "--adapter", "a", "{gguf}"], r"beside a GGUF file \(a.gguf\)"),
        (["--output_dir", "{full}"], "is there and not an empty folder: choose another"),
        (["--output_dir", "{new}", "--save_adapter"], "save_adapter needs the adapter that is to be saved"),
    ],
)
def test_what_can_not_be_right_is_refused(plain, tmp_path, arguments, error):
    for file in ("full/file", "gguf/a.gguf"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).touch()
    places = {"full": tmp_path / "full", "new": tmp_path / "new", "gguf": tmp_path / "gguf"}
    model = [] if "{gguf}" in arguments else [plain[1]]
    with pytest.raises(ValueError, match=error):
        main([*model, *(argument.format(**places) for argument in arguments)])
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"] and not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="output_dir='.*new' can't be written to.*choose another"):
        main([plain[1], "--output_dir", str(tmp_path / "full" / "file" / "new")])


def test_too_short_a_text_and_an_adapter_of_pickles_are_refused(plain, adapter, tmp_path):
    arguments = [plain[1], "--output_dir", str(tmp_path / "new"), "--suffix", "a b c d e f"]
    with pytest.raises(ValueError, match="max_length"):
        main([*arguments, "--max_length", "3"])
    file = Path(adapter, "adapter_model.safetensors")
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(ValueError, match="has no adapter_model.safetensors: leave --save_adapter out"):
        main([*arguments, "--adapter", adapter, "--save_adapter"])
    assert not [*(tmp_path / "new").iterdir()]


def test_a_gircse_model_is_refused(exported, tmp_path):
    with pytest.raises(ValueError, match="is a GIRCSE model already: load it as it is"):
        main([str(exported), "--output_dir", str(tmp_path / "new")])
