"""What training starts from: the prompt of the chat template, the tokenizer, quantized backbones, GGUF files, and
folders that are no model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerFast

from gircse.loading import PAPER_PROMPT
from gircse.training.arguments import ModelArguments
from gircse.training.publishing import export
from helpers import ROOT, make_tokenizer, needs_bitsandbytes, tiny_text_config
from train_gircse import add_lora, load_model, main

pytestmark = pytest.mark.usefixtures("training_cache")


def test_text_of_a_shell_is_read_as_it_is_meant(lora):
    template = r"Instruct: {instruction}\nQuery:\t"
    arguments = ModelArguments(model_name_or_path=str(lora.base), prompt_template=template, suffix=r"\n\\n")
    processor = load_model(arguments)[1]
    assert processor.prompt_template == "Instruct: {instruction}\nQuery:\t" and processor.suffix == "\n\\n"


@pytest.mark.parametrize(
    ("name", "value"), [("step_token", "none"), ("num_steps", 7), ("logit_temperature", 1.5), ("suffix", "<eos>")]
)
def test_what_is_of_a_new_model_is_not_given_up_silently(lora, tmp_path, name, value):
    """As where somebody trains a baseline, but from the default model."""
    model, processor = load_model(ModelArguments(str(lora.base), num_steps=3))
    export(model, processor, tmp_path / "gircse")
    with pytest.raises(ValueError, match=f"{name}={value!r} is for a new model, and .* is a GIRCSE model with"):
        load_model(ModelArguments(str(tmp_path / "gircse"), **{name: value}))
    assert load_model(ModelArguments(str(tmp_path / "gircse"), num_steps=3))[0].config.num_steps == 3


CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|system|>\nBe kind.<|end|>\n{% endif %}{% for m in messages %}"
    "<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TRIMMED = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}</{{ m['role'] }}>{% endfor %}"
    "{% if add_generation_prompt %}<model>{% endif %}"
)


@pytest.mark.parametrize(
    "template, prompt, suffix",
    [
        (CHATML, "<|user|>\nInstruct: {instruction}\nQuery: ", "<|end|>\n<|assistant|>\n"),  # no default message
        (TRIMMED, "<bos><user>Instruct: {instruction}\nQuery: ", "</user><model>"),
        ("{{ messages[-1]['content'] }}|", "Instruct: {instruction}\nQuery: ", "|"),  # knows a single turn
        ("{{ messages[0]['role'] }}", "Instruct: {instruction}\nQuery: ", ""),  # drops the text
        ("{{ raise_exception('no roles') }}", "Instruct: {instruction}\nQuery: ", ""),
        (None, "Instruct: {instruction}\nQuery: ", ""),
    ],
)
def test_prompt_and_suffix_are_a_turn_of_the_chat_template(lora, tmp_path, template, prompt, suffix):
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<bos>"
    tokenizer.chat_template = template
    for name in ("config.json", "model.safetensors"):
        shutil.copy(lora.base / name, tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, processor = load_model(ModelArguments(model_name_or_path=str(tmp_path)))
    assert (processor.prompt_template, processor.suffix) == (prompt, suffix)
    assert model.config.logit_temperature == 2
    papers = ModelArguments(str(tmp_path), prompt_template=PAPER_PROMPT, logit_temperature=1.0)
    model, processor = load_model(papers)
    assert (processor.prompt_template, processor.suffix) == ("Instruct: {instruction}\nQuery: ", "")
    assert model.config.logit_temperature == 1
    processor = load_model(ModelArguments(str(tmp_path), suffix="<eos>"))[1]
    assert (processor.prompt_template, processor.suffix) == ("Instruct: {instruction}\nQuery: ", "<eos>")
    with pytest.raises(ValueError, match="prompt_template must contain '{instruction}', got ''"):
        load_model(ModelArguments(str(tmp_path), prompt_template=""))


# What could not be saved at the end


class Unsaved(PreTrainedTokenizerFast):
    """Saves nothing that a tokenizer is loaded from, as that of the mistral-common package."""

    def save_pretrained(self, folder, *args, **kwargs):
        Path(folder, "tekken.json").write_text("{}")
        return (str(Path(folder, "tekken.json")),)


def test_a_tokenizer_that_cannot_be_saved_is_replaced_or_refused_before_training(lora, tmp_path, monkeypatch):
    original, asked = AutoTokenizer.from_pretrained, []

    def load(path, **kwargs):
        asked.append(kwargs)
        tokenizer = original(path)
        return (
            tokenizer
            if kwargs.get("mistral_format") is False and replaced
            else Unsaved(tokenizer_object=tokenizer.backend_tokenizer)
        )

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", load)
    replaced = True
    processor = load_model(ModelArguments(model_name_or_path=str(lora.base)))[1]
    assert not isinstance(processor.tokenizer, Unsaved) and asked == [{}, {"mistral_format": False}]
    replaced = False
    monkeypatch.setattr("train_gircse.GircseTrainer.train", lambda *args, **kwargs: pytest.fail("trained"))
    with pytest.raises(ValueError, match="the tokenizer can't be saved .*mistral_format=False"):
        main([*lora.argv, "--output_dir", str(tmp_path)])


@pytest.mark.parametrize(
    "options, remedy", [([], "can't be merged.*--save_adapter"), (["--tuning", "full"], "use --tuning lora")]
)
def test_a_quantized_backbone_is_refused_before_training_where_it_could_not_be_saved(
    lora, tmp_path, monkeypatch, options, remedy
):
    original = load_model

    def load(arguments):
        model, processor = original(arguments)
        model.config.text_config.quantization_config = {"quant_method": "torchao"}
        return model, processor

    monkeypatch.setattr("train_gircse.load_model", load)
    monkeypatch.setattr("train_gircse.GircseTrainer.train", lambda *args, **kwargs: pytest.fail("trained"))
    with pytest.raises(ValueError, match=remedy):
        main([*lora.argv, *options, "--output_dir", str(tmp_path)])


@needs_bitsandbytes
def test_lora_of_a_backbone_in_4_bits_loads_as_it_was_trained(tmp_path):
    """Merged into 4 bits, much of it would be rounded off: that is for those alone who ask for 4 bits."""
    torch.manual_seed(0)
    backbone, folder = tmp_path / "backbone", tmp_path / "gircse"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}  # the kernel takes no less
    AutoModelForCausalLM.from_config(tiny_text_config(**sizes)).save_pretrained(backbone)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(backbone, quantization_config=quantization).save_pretrained(backbone)
    make_tokenizer().save_pretrained(backbone)
    model, processor = load_model(ModelArguments(str(backbone)))
    tuned = add_lora(model, ModelArguments(lora_r=4))
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    texts = processor(["a red thing", "cold"])
    exact = tuned.get_base_model().eval().generate_embedding(**texts, k=3)
    export(tuned, processor, folder, adapter_of=str(backbone))
    assert not list(folder.glob("model*.safetensors"))

    def likeness(source, **settings):
        loaded = type(model).from_pretrained(source, **settings)
        return loaded, F.cosine_similarity(loaded.generate_embedding(**texts, k=3), exact).min()

    assert likeness(folder, quantization_config=quantization)[1] < 0.95
    loaded, found = likeness(folder)
    loaded.save_pretrained(tmp_path / "whole")
    assert found > 0.98 and likeness(tmp_path / "whole")[1] == found
    assert "quantization_config" not in loaded.config.to_dict()["text_config"]


@pytest.mark.parametrize(
    "files, said",
    [
        (
            {"adapter_config.json": '{"base_model_name_or_path": "some/base"}'},
            "adapter of 'some/base': train or convert that, .* --adapter",
        ),
        (
            {"adapter_config.json": json.dumps({"base_model_name_or_path": str(ROOT)})},
            r"holds an adapter of .*: merge it by model = AutoModel.from_pretrained\(.*merge_adapters",
        ),
        ({"a.gguf": "", "b.gguf": ""}, "GGUF files .a.gguf, b.gguf., .* by --gguf_file one of"),
        ({"modules.json": "[]"}, "Sentence Transformers model of other modules"),
        ({"pytorch_model.bin": ""}, "has no config.json"),
    ],
)
def test_folders_that_are_no_model_are_told_what_they_are(tmp_path, files, said):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=said):
        load_model(ModelArguments(model_name_or_path=str(tmp_path)))


@pytest.mark.parametrize("path", ["/no/such/folder", "./nowhere", "../a/b", "~/models/m"])
def test_a_path_where_nothing_is_is_not_taken_for_a_hub_id(path):
    with pytest.raises(ValueError, match=f"the model '{path}' is not there .working directory: "):
        load_model(ModelArguments(model_name_or_path=path))


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="model.safetensors' is a file: give its folder"):
        load_model(ModelArguments(model_name_or_path=str(tmp_path / "model.safetensors")))


try:
    import gguf
except ImportError:
    gguf = None


def write_gguf(path: Path) -> None:
    """A tiny Llama in GGUF, with the tokenizer of the other tests."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    vocabulary = json.loads(make_tokenizer().backend_tokenizer.to_str())["model"]
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    for name in ("bos", "eos", "pad"):
        getattr(writer, f"add_{name}_token_id")(0)
    shapes = {"token_embd": (len(tokens), 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    shapes |= {"blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32)}
    shapes |= {"blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (48, 32), "blk.0.ffn_up": (48, 32)}
    shapes |= {"blk.0.ffn_down": (32, 48)}
    generator = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = generator.normal(0, 0.2, shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0 if name == "token_embd" else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.skipif(gguf is None, reason="gguf is not installed")
@pytest.mark.parametrize("named", [False, True])
def test_a_gguf_file_trains_saves_and_loads_from_the_command_line(workplace, tmp_path, named):
    """It is dequantized at loading, and nothing that is saved says otherwise."""
    (tmp_path / "base").mkdir()
    write_gguf(tmp_path / "base" / "tiny.gguf")
    if named:
        write_gguf(tmp_path / "base" / "other.gguf")
    argv = [*workplace.argv, "--max_steps", "2", "--warmup_steps", "1", "--held_out", "0", "--num_steps", "3"]
    argv += ["--model_name_or_path", str(tmp_path / "base"), *(["--gguf_file", "tiny.gguf"] if named else [])]
    main([*argv, "--output_dir", str(tmp_path / "out")])
    assert "quantiz" not in (tmp_path / "out" / "config.json").read_text()
    model, processor = load_model(ModelArguments(model_name_or_path=str(tmp_path / "out")))
    assert model.generate_embedding(**processor(["a red thing"])).shape == (1, 32)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32} and len(processor.tokenizer) > 99
