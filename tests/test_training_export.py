"""LoRA, and the exported folder: it loads elsewhere, its card tells the scores, and nothing is lost in merging."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from functools import partial

import peft
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from gircse.training.arguments import GircseTrainingArguments, ModelArguments
from gircse.training.card import REMOTE_CODE, model_card
from gircse.training.publishing import CODE_FILES, copy_on_cpu, export, published_files
from helpers import environment, make_rows
from train_gircse import add_lora
from training_helpers import make_trainer, tiny_model

pytestmark = pytest.mark.usefixtures("training_cache")

LOAD = """
import sys, torch
from transformers import AutoModel, AutoProcessor
folder, result = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(["a red thing", "cold"], instruction="find the answer")
assert not {"peft", "train_gircse"} & set(sys.modules)
torch.save(model.generate_embedding(**inputs, k=4), result)
"""


@pytest.mark.slow
def test_lora_export_loads_elsewhere(lora, tmp_path):
    others = ["gircse/training/losses.py", "requirements.txt", "requirements-train.txt", "README.md", "config.json"]
    for name in [*REMOTE_CODE, *CODE_FILES, *others]:
        assert (lora.folder / name).is_file(), name
    keys = load_file(lora.folder / "model.safetensors")
    assert keys and not [key for key in keys if "lora" in key or "base_layer" in key or "base_model" in key]
    said = subprocess.run(
        [sys.executable, "-c", LOAD, str(lora.folder), str(tmp_path / "embeddings.pt")],
        env=environment(tmp_path, HF_MODULES_CACHE=str(tmp_path / "modules")),
        cwd=tmp_path,
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    assert "Do you wish to run" not in said
    merged = lora.model.eval().generate_embedding(**lora.inputs, k=4)
    torch.testing.assert_close(torch.load(tmp_path / "embeddings.pt"), merged, rtol=0, atol=1e-6)
    torch.testing.assert_close(merged, lora.unmerged, rtol=0, atol=1e-4)
    start = type(lora.model).from_causal_lm(str(lora.base)).generate_embedding(**lora.inputs, k=4)
    assert float((start - merged).abs().max()) > 1e-3  # it has learned something


def test_a_tokenizer_alone_gives_what_the_model_takes(tmp_path, processor):
    """Also in transformers 4, where one of a general class gives token types unless its file names the inputs."""
    made = copy.deepcopy(processor)
    made.tokenizer.init_kwargs.pop("model_input_names", None)
    export(tiny_model(), made, tmp_path)
    inputs = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)(["a red thing"])
    assert set(inputs) == {"input_ids", "attention_mask"}


def test_card_tells_the_scores(lora):
    card = (lora.folder / "README.md").read_text()
    rows = [line for line in card.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert [int(row.split("|")[1]) for row in rows] == [1, 3, 5, 10, 20]
    assert card.startswith("---\nlibrary_name: transformers\n") and "batch 4 x 1 x 1" in card


@pytest.mark.parametrize(
    "step_token, said", [("soft", "[GIRCSE]"), ("learned", "learned"), ("none", "generates nothing")]
)
def test_what_the_card_shows_runs(processor, tmp_path, step_token, said):
    pytest.importorskip("sentence_transformers")
    export(tiny_model(step_token=step_token, num_steps=3), processor, tmp_path)
    settings = {"use_cpu": True, "report_to": "none", "learning_rate": 1e-4}
    card = model_card(tmp_path, GircseTrainingArguments(output_dir=str(tmp_path), **settings))
    blocks = card.split("```python\n")[1:]
    assert "accuracy" not in card, "there is none"
    assert said in card and len(blocks) == 2 and ("k=5" in card) == (step_token == "soft")
    for block in blocks:
        names = {}
        exec(block.partition("```")[0].replace('"."', repr(str(tmp_path))), names)
        assert names["embeddings"].shape == (1, 32)


WEB_SEARCH = "Given a web search query, retrieve relevant passages that answer the query."


@pytest.mark.parametrize(
    "instructions, query, shown",
    [
        (["find it"], "find it", '"], instruction="find it")'),
        ([""], "", '"])'),
        (["find it", ""], WEB_SEARCH, '"], instruction="Given a question, retrieve a passage that answers it.")'),
    ],
)
def test_saved_query_prompt_is_what_queries_had_in_training(processor, tmp_path, instructions, query, shown):
    """Else `encode_query` would embed queries in a way that nobody trained or measured."""
    rows = [row | {"instruction": instructions[i % len(instructions)]} for i, row in enumerate(make_rows(4))]
    make_trainer(tiny_model(), processor, tmp_path, rows).export()
    settings = json.loads((tmp_path / "config_sentence_transformers.json").read_text(encoding="utf-8"))
    assert settings["prompts"]["query"] == processor.prompt_for(query)
    assert settings["prompts"]["STS12"] == processor.prompt_for("Retrieve semantically similar text.")
    assert f'processor(["how do I renew a card{shown}\n' in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_learned_tokens_are_trained_beside_lora(processor, tmp_path):
    """LoRA reaches linear layers alone; tokens that start at random must learn all the same, in float32 beside a frozen
    model in bfloat16, too."""
    half = add_lora(tiny_model(step_token="learned", num_steps=3, dtype=torch.bfloat16), ModelArguments(lora_r=2))
    trained = {name: weight.dtype for name, weight in half.named_parameters() if weight.requires_grad}
    assert any("learned_tokens" in name for name in trained) and {*trained.values()} == {torch.float32}
    model = tiny_model(step_token="learned", num_steps=3)
    start = model.learned_tokens.weight.detach().clone()
    peft_model = add_lora(model, ModelArguments(lora_r=2))
    rows = make_rows(4)
    trainer = make_trainer(
        peft_model, processor, tmp_path / "run", rows, max_steps=2, learning_rate=0.1, warmup_steps=1, k=2
    )
    trainer.train()
    merged = export(trainer.model, processor, tmp_path / "out")
    assert not torch.equal(merged.learned_tokens.weight, start)
    assert "learned_tokens.weight" in load_file(tmp_path / "out" / "model.safetensors")


def test_lora_is_merged_in_the_dtype_that_is_saved(processor, tmp_path):
    """In bfloat16, as it is trained, this much would be rounded away."""
    model = add_lora(tiny_model(dtype=torch.bfloat16), ModelArguments(lora_r=2))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=1e-4)
    layer = model.get_base_model().language_model.model.layers[0].self_attn.q_proj
    start, change = layer.weight.detach().float(), layer.get_delta_weight("default").detach().float()
    merged = export(model, processor, tmp_path)
    learned = merged.language_model.model.layers[0].self_attn.q_proj.weight - start
    torch.testing.assert_close(learned, change, rtol=0.05, atol=float(change.abs().max()) / 50)


@pytest.mark.parametrize(("size", "told"), [(1e-5, True), (0.1, False)])
def test_what_saving_would_round_off_is_told(processor, tmp_path, caplog, size, told):
    """A LoRA of weights of about 0.2, of which bfloat16 keeps eight bits: steps of 0.001."""
    model = add_lora(tiny_model(dtype=torch.bfloat16), ModelArguments(lora_r=2))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.fill_(size)
    export(copy.deepcopy(model), processor, tmp_path / "wide", "float32")
    assert "has learned" not in caplog.text
    export(model, processor, tmp_path / "narrow", "bfloat16")
    found = caplog.text.count("% of what the LoRA has learned: save in --save_dtype float32")
    assert found == told


@pytest.mark.parametrize("save_adapter", [False, True])
def test_a_plain_load_of_bfloat16_weights_is_float32(processor, tmp_path, save_adapter):
    """On a CPU without instructions for bfloat16 it would be several times slower."""
    backbone = tmp_path / "backbone"
    tiny_model().language_model.save_pretrained(backbone)
    processor.tokenizer.save_pretrained(backbone)
    model = add_lora(tiny_model(), ModelArguments(lora_r=2))
    torch.nn.init.ones_(next(weight for name, weight in model.named_parameters() if "lora_B" in name))
    export(model, processor, tmp_path / "saved", "bfloat16", str(backbone) if save_adapter else None)
    config = json.loads((tmp_path / "saved" / "config.json").read_text(encoding="utf-8"))
    assert (config["dtype"], config["text_config"]["dtype"]) == ("float32", "float32")
    loaded = AutoModel.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}
    half = AutoModel.from_pretrained(tmp_path / "saved", trust_remote_code=True, torch_dtype=torch.bfloat16)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}


def test_copy_for_export_is_apart_from_the_model():
    model = tiny_model(text_changes={"tie_word_embeddings": True})
    copied = copy_on_cpu(model)
    assert copied.get_output_embeddings().weight is copied.get_input_embeddings().weight
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in copied.state_dict().items())
    kept, changed = (dict(m.named_buffers()) for m in (copied, model))
    assert kept.keys() == changed.keys() and not any(torch.equal(kept[name], changed[name]) for name in kept)


@pytest.mark.parametrize("sharded_first", [True, False])
def test_weights_of_an_earlier_run_in_other_files_go(processor, tmp_path, sharded_first):
    """Loading would take one file before shards, and their index before nothing."""
    for seed, sharded in enumerate((sharded_first, not sharded_first)):
        model = tiny_model()
        torch.nn.init.constant_(model.get_input_embeddings().weight, float(seed))
        if sharded:
            model.save_pretrained = partial(model.save_pretrained, max_shard_size="20KB")
        export(model, processor, tmp_path)
    names = {path.name for path in tmp_path.glob("model*.safetensors*")}
    assert ("model.safetensors" in names) == sharded_first == ("model.safetensors.index.json" not in names)
    found = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    assert {*found.get_input_embeddings().weight.unique().tolist()} == {1.0}


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": r"language_model\..*\.(q_proj|down_proj)"},
        {"target_modules": ["q_proj"], "alpha_pattern": {r"language_model\.model\.layers\.0\.self_attn\.q_proj": 64}},
        {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {r"language_model.*\.up_proj": 2}},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r"language_model\.model\.layers\.0\..*"},
    ],
)
def test_an_adapter_with_patterns_of_names_is_saved_as_the_backbones(processor, tmp_path, settings):
    tiny_model().language_model.save_pretrained(tmp_path / "backbone")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=4, init_lora_weights=False, **settings)).eval()
    inputs = processor(["a red thing", "cold"])
    expected = model.get_base_model().generate_embedding(**inputs, k=3)
    export(model, processor, tmp_path / "saved", adapter_of=str(tmp_path / "backbone"))
    found = AutoModel.from_pretrained(tmp_path / "saved", trust_remote_code=True).generate_embedding(**inputs, k=3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_adapters_that_would_be_lost_are_not_exported(processor, tmp_path):
    """As the model's weights would be, which an adapter of them is saved without."""
    export(tiny_model(), processor, tmp_path)
    model = add_lora(tiny_model(), ModelArguments(lora_r=2)).get_base_model()
    with pytest.raises(ValueError, match=r"has adapters \(default\): call model.merge_adapters\(\) first"):
        export(model, processor, tmp_path)
    assert (tmp_path / "model.safetensors").exists()


def test_only_what_training_wrote_is_uploaded(processor, tmp_path):
    for name in ("customers.csv", ".env", "data/train.parquet", "checkpoint-3/model.safetensors", "notes.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    before = {*tmp_path.rglob("*")}
    export(tiny_model(), processor, tmp_path)
    (tmp_path / "README.md").touch()
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path not in before]
    paths = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    uploaded = {*filter_repo_objects(paths, allow_patterns=published_files(processor))}
    assert uploaded == {path.relative_to(tmp_path).as_posix() for path in written}


def test_untrained_adapter_is_not_exported(processor, tmp_path):
    model = add_lora(tiny_model(), ModelArguments(lora_r=2))
    with pytest.raises(ValueError, match="lora_B"):
        export(model, processor, tmp_path / "out")
    assert not (tmp_path / "out").exists()
