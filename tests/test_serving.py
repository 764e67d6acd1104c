"""`pipeline("feature-extraction")`, and loads that save memory: device maps with offload, int8 weights."""

from __future__ import annotations

import functools
import json

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoProcessor, BitsAndBytesConfig, pipeline

from helpers import DTYPE_ARGUMENTS, HAS_BITSANDBYTES, OLD, ROOT, needs_bitsandbytes, text_config

TEXTS = ["a red fox", "how do I renew the card that was stolen from me last week?", "rain"]
BATCH = {"input_ids": torch.tensor([[5, 17, 60, 33, 8], [7, 7, 42, 9, 77]]), "attention_mask": torch.ones(2, 5).long()}
DECODER = "language_model.model"
PARTS = [f"{DECODER}.embed_tokens", f"{DECODER}.norm", f"{DECODER}.rotary_emb", "language_model.lm_head"]
PARTS += [f"{DECODER}.layers.{index}" for index in range(3)]


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)


@pytest.fixture(scope="module")
def exact(processor) -> torch.Tensor:
    """The root model's embeddings in float32, (3, d)."""
    return load_root(torch_dtype=torch.float32).generate_embedding(**processor(TEXTS), k=5)


def load_root(**settings):
    return AutoModel.from_pretrained(ROOT, trust_remote_code=True, **settings)


def check(model, processor, exact: torch.Tensor, least: float = 0.99) -> float:
    """The least cosine with float32, of inference and with gradients on."""
    inputs = processor(TEXTS).to(model.device)
    cosines = [
        F.cosine_similarity(found.detach().cpu(), exact)
        for found in (model.generate_embedding(**inputs, k=5), model(**inputs, k=5).embeddings)
    ]
    assert torch.stack(cosines).min() >= least
    return torch.stack(cosines).min().item()


# Pipelines ----------------------------------------------------------------------------------------------------------


def test_pipeline_gives_the_embedding(processor):
    """Of the tokens that the tokenizer makes of the bare text."""
    embed = pipeline("feature-extraction", model=str(ROOT), trust_remote_code=True, device="cpu")
    rows = [processor.tokenizer(text, return_tensors="pt")["input_ids"] for text in TEXTS]
    expected = torch.cat([embed.model.generate_embedding(row) for row in rows])
    found = embed(TEXTS)
    assert torch.tensor(found).shape == (3, 1, embed.model.config.hidden_size)
    assert F.cosine_similarity(torch.tensor(found)[:, 0], expected).min() > 0.9999
    assert F.cosine_similarity(torch.tensor(found)[:, 0], expected.roll(1, 0)).max() < 0.9999
    assert torch.tensor(embed("rain")).shape == (1, embed.model.config.hidden_size)


def test_pipeline_with_the_processor_takes_instructions(processor):
    """Which the README shows: the prompt, the suffix and the truncation of this model."""
    embed = pipeline("feature-extraction", model=str(ROOT), tokenizer=processor, trust_remote_code=True, device="cpu")
    instruction = "Retrieve semantically similar text."
    expected = embed.model.generate_embedding(**processor([*TEXTS, ""], instruction=instruction))
    found = torch.tensor(embed([*TEXTS, ""], tokenize_kwargs={"instruction": instruction}))[:, 0]
    assert F.cosine_similarity(found, expected).min() > 0.9999
    batches = embed(TEXTS, batch_size=2, tokenize_kwargs={"instruction": instruction})
    assert F.cosine_similarity(torch.tensor(batches)[:, 0], expected[:3]).min() > 0.9999
    bare = torch.tensor(embed(TEXTS))[:, 0]
    assert F.cosine_similarity(bare, expected[:3]).max() < 0.9999


def test_config_names_a_tokenizer_class(gircse, tmp_path):
    """transformers 4 gives a pipeline no tokenizer without one."""
    gircse.GircseConfig(text_config=text_config("qwen2")).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert gircse.GircseConfig.from_pretrained(tmp_path).tokenizer_class == "PreTrainedTokenizerFast"
    assert gircse.GircseConfig(tokenizer_class="Other").tokenizer_class == "Other"


# Offload ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [None, 0.75])
def test_root_model_under_device_map_auto(processor, exact, tmp_path, share):
    settings = {} if share is None else {"max_memory": {"cpu": int(share * 4 * load_root().num_parameters())}}
    model = load_root(device_map="auto", offload_folder=str(tmp_path), torch_dtype=torch.float32, **settings)
    if share:  # the layers did not fit
        assert "disk" in model.hf_device_map.values()
        assert any(parameter.is_meta for parameter in model.parameters())
    assert check(model, processor, exact) > 0.99999


@pytest.mark.parametrize(
    "backbone, offloaded",
    # Tied weights are kept from the disk: transformers itself can't offload them.
    [("qwen2-tied", "layers"), ("qwen2", "layers"), ("qwen2", "head"), ("qwen2", "embedding"), ("qwen2", "both")],
)
@pytest.mark.parametrize("route", ["from_pretrained", "from_causal_lm"])
def test_any_part_may_be_offloaded(gircse, make_model, tmp_path, backbone, offloaded, route):
    made, prefix, settings = make_model(backbone, num_steps=3), "", {}
    if route == "from_causal_lm":
        made, prefix, settings = made.language_model, "language_model.", {"num_steps": 3}
    made.save_pretrained(tmp_path / "model")
    load = functools.partial(getattr(gircse.GircseModel, route), str(tmp_path / "model"), **settings)
    expected = load().generate_embedding(**BATCH)
    parts = {
        "layers": [f"{DECODER}.layers.1", f"{DECODER}.layers.2"],
        "head": ["language_model.lm_head"],
        "embedding": [f"{DECODER}.embed_tokens"],
        "both": ["language_model.lm_head", f"{DECODER}.embed_tokens"],
    }[offloaded]
    places = dict.fromkeys(PARTS, "cpu") | dict.fromkeys(parts, "disk")
    places = {name.removeprefix(prefix): place for name, place in places.items()}
    model = load(device_map=places, offload_folder=str(tmp_path / "offload"))
    assert any(parameter.is_meta for parameter in model.parameters())
    for found in (model.generate_embedding(**BATCH), model(**BATCH).embeddings.detach()):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    found = gircse.GircseModel.from_pretrained(tmp_path / "saved").generate_embedding(**BATCH)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# Quantized weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_root_model_in_int8_by_torchao(processor, exact, dtype):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    model = load_root(quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), torch_dtype=dtype)
    kinds = {name: type(parameter) for name, parameter in model.named_parameters()}
    whole = {name for name, kind in kinds.items() if kind is torch.nn.Parameter}
    # The linear layers are in int8; the token embedding and the head are not.
    assert any("embed_tokens" in name for name in whole) and not any("proj.weight" in name for name in whole)
    assert type(model.get_output_embeddings().weight) is torch.nn.Parameter
    assert model.get_input_embeddings().weight.dtype == model.get_output_embeddings().weight.dtype == dtype
    assert 0.99 < check(model, processor, exact) < 0.9999999


def test_root_model_with_activations_in_int8_by_torchao(processor, exact):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig
    from transformers import TorchAoConfig

    # Its states in float32 move by more than float32 rounds when a row is padded, and it is no other backbone for that.
    model = load_root(quantization_config=TorchAoConfig(Int8DynamicActivationInt8WeightConfig()))
    assert check(model, processor, exact, least=0.9) < 0.9999999


@pytest.mark.parametrize("kind", ["torchao", "8bit", "4bit"])
def test_tied_weights_stay_tied_when_quantized(make_model, tmp_path, kind):
    if kind == "torchao":
        pytest.importorskip("torchao")
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        quantization = TorchAoConfig(Int8WeightOnlyConfig())
    elif not HAS_BITSANDBYTES:
        pytest.skip("bitsandbytes can't be used here")
    else:
        quantization = BitsAndBytesConfig(**{f"load_in_{kind}": True})
    make_model("qwen2-tied", num_steps=3).save_pretrained(tmp_path)
    model = type(make_model("qwen2-tied")).from_pretrained(
        tmp_path, quantization_config=quantization, torch_dtype=torch.float32
    )
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.get_input_embeddings().weight.dtype == torch.float32


@needs_bitsandbytes
@pytest.mark.parametrize(
    "settings, least", [({"load_in_8bit": True}, 0.95), ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, 0.8)]
)
def test_root_model_by_bitsandbytes(processor, exact, settings, least):
    model = load_root(quantization_config=BitsAndBytesConfig(**settings), torch_dtype=torch.float32)
    assert model.get_output_embeddings().weight.dtype == torch.float32
    found = model.generate_embedding(**processor(TEXTS).to(model.device), k=5)
    assert least < F.cosine_similarity(found.cpu(), exact).min() < 0.99999


# dtype --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", DTYPE_ARGUMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_root_model_in_any_dtype(processor, exact, argument, dtype):
    model = load_root(**{argument: dtype})
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    check(model, processor, exact)


@pytest.mark.parametrize("argument", DTYPE_ARGUMENTS[: 1 if OLD else 2])  # which is the pipeline's own
def test_pipeline_honours_dtype(argument):
    embed = pipeline(
        "feature-extraction", model=str(ROOT), trust_remote_code=True, device="cpu", **{argument: "bfloat16"}
    )
    assert embed.model.dtype == torch.bfloat16
    assert torch.tensor(embed("rain")).norm() == pytest.approx(1, abs=1e-3)
