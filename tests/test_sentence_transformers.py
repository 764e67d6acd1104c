"""The Sentence Transformers module: the same vectors as `generate_embedding`, prompts, lengths, and what the library
makes of the vectors."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer, quantize_embeddings, util
from transformers import AutoProcessor

from helpers import DTYPE_ARGUMENTS, ROOT, export_tiny
from sentence_helpers import PROMPT, SUFFIX, TEXTS, Inputs, auto_embeddings, cosines, golden_ids, load

# The name of this argument changed in sentence-transformers 5.4.
PROCESSOR_ARGUMENT = "processor_kwargs"
if PROCESSOR_ARGUMENT not in inspect.signature(SentenceTransformer.__init__).parameters:
    PROCESSOR_ARGUMENT = "tokenizer_kwargs"


# The same vectors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [None, 1, 7])
def test_encode_gives_the_vectors_of_generate_embedding(exported, sentence_model, k):
    embeddings = sentence_model.encode(TEXTS, prompt=PROMPT, k=k)
    assert embeddings.shape == (5, 32) and embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    assert cosines(embeddings, auto_embeddings(exported, PROMPT, k)).min() > 0.9999
    # k and the prompt matter, or the line above says nothing.
    assert cosines(embeddings, auto_embeddings(exported, PROMPT, 5)).max() < 0.9999
    assert cosines(embeddings, auto_embeddings(exported, None, k)).max() < 0.9999


def test_root_model_encodes_as_auto_model_does():
    model = load(ROOT)
    prompt = model[0].processor.prompt_for("Retrieve semantically similar text.")
    for k in (None, 20):
        embeddings = model.encode(TEXTS, prompt_name="STS12", k=k)
        assert cosines(embeddings, auto_embeddings(ROOT, prompt, k)).min() > (
            0.9999 if model.dtype == torch.float32 else 0.999
        )
    assert model.similarity_fn_name == "cosine" and model.prompts["STS12"] == prompt


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batch_size_change_nothing(exported, side):
    model = load(exported, **{PROCESSOR_ARGUMENT: {"padding_side": side}})
    assert model.tokenizer.padding_side == side
    assert cosines(model.encode(TEXTS, batch_size=1), model.encode(TEXTS, batch_size=5)).min() > 0.99999


def test_number_of_steps_of_the_configuration(exported, sentence_model):
    embeddings = sentence_model.encode(TEXTS)
    assert cosines(embeddings, sentence_model.encode(TEXTS, k=3)).min() > 0.99999
    other = load(exported, config_kwargs={"num_steps": 6})
    assert other[0].model.config.num_steps == 6
    assert cosines(other.encode(TEXTS), sentence_model.encode(TEXTS, k=6)).min() > 0.99999


@pytest.mark.parametrize("k, error", [(0, ValueError), (-1, ValueError), ("3", TypeError), (2.0, TypeError)])
def test_wrong_k_is_refused(sentence_model, k, error):
    with pytest.raises(error, match=re.escape(f"k={k!r} must be an int >= 1")):
        sentence_model.encode(TEXTS, k=k)


@pytest.mark.parametrize("k", [np.int64(2), np.int32(2), torch.tensor(2)])
def test_k_may_be_any_integer(sentence_model, k):
    np.testing.assert_array_equal(sentence_model.encode(TEXTS, k=k), sentence_model.encode(TEXTS, k=2))


@pytest.mark.parametrize("k", [True, np.float64(2)])
def test_a_truth_value_or_a_fraction_is_no_k(sentence_model, k):
    with pytest.raises(TypeError, match=re.escape(f"k={k!r} must be an int >= 1")):
        sentence_model.encode(TEXTS, k=k)


@pytest.mark.parametrize("texts", [["a", None], [3], ["a", "\ud800"]])
def test_what_is_no_text_is_refused(sentence_model, texts):
    ours = r"text\[\d\] is .* \(Counted in a batch: `encode` sorts texts by their length.\)"
    with pytest.raises((TypeError, ValueError), match=f"{ours}|can only concatenate str"):  # the library before 5.4
        sentence_model.encode(texts, prompt=PROMPT)


def test_one_text_and_none(sentence_model):
    assert sentence_model.encode("rain").shape == (32,)
    assert len(sentence_model[0].preprocess("rain")["input_ids"]) == 1
    assert len(sentence_model.encode([])) == 0


def test_all_outputs_of_a_text(sentence_model):
    found = sentence_model.encode(TEXTS[:2], output_value=None)
    assert [set(row) for row in found] == [{"input_ids", "attention_mask", "sentence_embedding"}] * 2
    embeddings = np.stack([row["sentence_embedding"].numpy() for row in found])
    np.testing.assert_allclose(embeddings, sentence_model.encode(TEXTS[:2]), atol=1e-6)


def test_there_are_no_embeddings_of_tokens(sentence_model):
    with pytest.raises(ValueError, match="output_value='token_embeddings': .* Use 'sentence_embedding' or None"):
        sentence_model.encode(TEXTS, output_value="token_embeddings")
    # What the error names instead.
    inputs = getattr(sentence_model, "preprocess", sentence_model.tokenize)(TEXTS)
    states = sentence_model[0].model(**inputs).step_states
    assert states.shape == (5, 3, 32)
    mean = torch.nn.functional.normalize(states.mean(1), dim=-1).detach().numpy()
    np.testing.assert_allclose(mean, sentence_model.encode(TEXTS), atol=1e-5)


@pytest.mark.parametrize(
    "name, instruction",
    [
        ("STS12", "Retrieve semantically similar text."),
        ("NQ-query", "Given a question, retrieve Wikipedia passages that answer the question."),
        ("Banking77Classification.v2", "Given an online banking query, find the corresponding intents."),
        ("query", "Given a web search query, retrieve relevant passages that answer the query."),
        ("document", None),
    ],
)
def test_prompt_by_name_gives_the_golden_ids(sentence_model, name, instruction):
    prefix = f"Instruct: {instruction}\nQuery: " if instruction else ""
    with Inputs(sentence_model) as inputs:
        sentence_model.encode(["a red fox"], prompt_name=name)
        sentence_model.encode(["a red fox"], prompt=prefix)
    assert inputs.ids == [golden_ids(f"{prefix}a red fox") + golden_ids(SUFFIX)] * 2


def test_queries_and_documents(sentence_model):
    with Inputs(sentence_model) as inputs:
        sentence_model.encode_query("rain")
        sentence_model.encode_document("rain")
    query = sentence_model.prompts["query"] + "rain"
    assert inputs.ids == [golden_ids(query) + golden_ids(SUFFIX), golden_ids("rain") + golden_ids(SUFFIX)]


def test_root_has_the_prompts_of_all_tasks_of_the_paper():
    """By which names, and which others, is the recipe's."""
    prompts = json.loads((ROOT / "config_sentence_transformers.json").read_text(encoding="utf-8"))["prompts"]
    paper = json.loads((ROOT / "recipes/root_model/instructions.json").read_text(encoding="utf-8"))
    template = json.loads((ROOT / "processor_config.json").read_text(encoding="utf-8"))["prompt_template"]
    # mteb has none of the instruction-following tasks, so that they have no names there.
    assert {template.replace("{instruction}", text) for text in paper["mteb"].values()} <= set(prompts.values())
    # What mteb looks for first, so that documents of a retrieval task don't get its queries' prompt.
    assert "NQ" not in prompts and "NQ-document" not in prompts and prompts["document"] == ""
    assert {"BIOSSES", "SCIDOCS-query", "AskUbuntuDupQuestions", "STS22.v2"} <= set(prompts)
    sides = [prompts[f"CQADupstackGisRetrieval-{side}"] for side in ("query", "document")]
    assert sides[0] != sides[1]


def test_trained_folder_has_the_prompts_in_its_own_template(gircse, tmp_path):
    folder = export_tiny(gircse, tmp_path / "other", prompt_template="[{instruction}]")
    prompts = json.loads((folder / "config_sentence_transformers.json").read_text(encoding="utf-8"))["prompts"]
    assert prompts["STS12"] == "[Retrieve semantically similar text.]" and prompts["document"] == ""
    assert all(prompt[0] + prompt[-1] == "[]" and "Instruct: " not in prompt for prompt in prompts.values() if prompt)


@pytest.mark.skipif(not hasattr(util, "check_version_requirements"), reason="older releases don't check them")
def test_a_library_that_is_too_old_is_named_before_anything_loads(exported, tmp_path):
    path = shutil.copytree(exported, tmp_path / "model") / "config_sentence_transformers.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    assert set(settings["requirements"]) == {"torch", "transformers"}
    settings["requirements"]["transformers"] = ">=99"
    path.write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(ImportError, match="transformers>=99"):
        SentenceTransformer(str(path.parent), trust_remote_code=True)


def test_max_seq_length_cuts_the_text_and_keeps_the_suffix(sentence_model):
    assert sentence_model.max_seq_length == 64
    if "sentence_transformers.base" in sys.modules:  # from 5.4 on
        assert "'max_seq_length': 64" in str(sentence_model)
    text, suffix = "how do I renew the card that was stolen from me last week? " * 20, golden_ids(SUFFIX)
    room = 24 - len(suffix)
    with Inputs(sentence_model) as inputs:
        whole = sentence_model.encode(text)
        sentence_model.max_seq_length = 24
        cut = sentence_model.encode([text, "rain"], prompt=PROMPT)
    ids = golden_ids(PROMPT + text)
    assert inputs.ids == [
        golden_ids(text)[: 64 - len(suffix)] + suffix,
        ids[:room] + suffix,
        golden_ids(PROMPT + "rain")[:room] + suffix,
    ]
    assert cosines(whole, cut[0]) < 0.9999
    if "sentence_transformers.base" in sys.modules:  # before, the prompt comes as a part of the text
        sentence_model.max_seq_length = len(golden_ids(PROMPT)) + len(suffix)
        with pytest.raises(ValueError, match="prompt: the prompt .* leaves none for a text"):
            sentence_model.encode([text, "rain"], prompt=PROMPT)
    sentence_model.max_seq_length = len(suffix)
    with pytest.raises(ValueError, match=f"max_length must be an int greater than the suffix's {len(suffix)} tokens"):
        sentence_model.encode(text)


def test_max_seq_length_none_is_all_that_there_is_room_for(sentence_model):
    positions = sentence_model[0].model.config.text_config.max_position_embeddings
    sentence_model.max_seq_length = None
    assert sentence_model.max_seq_length == positions - sentence_model[0].model.config.num_steps
    with Inputs(sentence_model) as inputs:
        sentence_model.encode("how do I renew the card? " * 50)
    assert len(inputs.ids[0]) == positions - sentence_model[0].model.config.num_steps


def test_max_seq_length_is_any_integer(sentence_model):
    sentence_model.max_seq_length = np.int64(20)
    assert sentence_model.max_seq_length == 20 and type(sentence_model.max_seq_length) is int
    for wrong in (0, 20.0, "20", True):
        with pytest.raises(ValueError, match=f"max_length must be an int >= 1, got {wrong!r}"):
            sentence_model.max_seq_length = wrong
    assert sentence_model.max_seq_length == 20


@pytest.mark.skipif(PROCESSOR_ARGUMENT == "tokenizer_kwargs", reason="a module gets no k with the texts before 5.4")
def test_more_steps_leave_less_room_for_the_text(sentence_model):
    text, positions = (
        "how do I renew the card? " * 50,
        sentence_model[0].model.config.text_config.max_position_embeddings,
    )
    with Inputs(sentence_model) as inputs:
        sentence_model.encode(text, k=positions - 10)
        sentence_model.max_seq_length = positions
        sentence_model.encode(text)
    assert [len(ids) for ids in inputs.ids] == [10, positions - sentence_model[0].model.config.num_steps]
    with pytest.raises(ValueError, match=f"k={positions} takes all positions of the backbone"):
        sentence_model.encode(text, k=positions)


@pytest.mark.skipif(PROCESSOR_ARGUMENT == "tokenizer_kwargs", reason="the library has them since 5.4")
def test_processing_kwargs_of_one_call(sentence_model):
    text = "how do I renew the card? " * 50
    with Inputs(sentence_model) as inputs:
        sentence_model.encode(text, processing_kwargs={"text": {"max_length": 9, "truncation": True}})
        sentence_model.encode(text)
    assert [len(ids) for ids in inputs.ids] == [9, 64]
    for wrong in ({"text": {"padding": "max_length"}}, {"text": {"truncation": False}}, {"image": {}}):
        with pytest.raises(ValueError, match="may only be {'text': {'max_length': N}}"):
            sentence_model.encode(text, processing_kwargs=wrong)


def test_arguments_of_the_library_may_be_given_twice(exported):
    load(exported, model_kwargs={"trust_remote_code": True}, config_kwargs={"trust_remote_code": True})


def test_max_seq_length_at_loading_and_saving(exported, tmp_path):
    model = load(exported, **{PROCESSOR_ARGUMENT: {"model_max_length": 20}})
    assert model.max_seq_length == 20
    model.save_pretrained(str(tmp_path / "saved"))
    assert load(tmp_path / "saved").max_seq_length == 20
    assert AutoProcessor.from_pretrained(tmp_path / "saved", trust_remote_code=True).max_length == 20


# What the library makes of the vectors ------------------------------------------------------------------------------


def dimension(model: SentenceTransformer) -> int:
    """By its name since sentence-transformers 5.4, or the former one."""
    return (getattr(model, "get_embedding_dimension", None) or model.get_sentence_embedding_dimension)()


def test_dimension_similarity_and_truncation(exported, sentence_model):
    embeddings = sentence_model.encode(TEXTS)
    assert dimension(sentence_model) == 32
    np.testing.assert_allclose(sentence_model.similarity(embeddings, embeddings), embeddings @ embeddings.T, atol=1e-5)
    short = load(exported, truncate_dim=8)
    assert dimension(short) == 8
    np.testing.assert_allclose(short.encode(TEXTS), embeddings[:, :8], atol=1e-5)
    normalized = short.encode(TEXTS, normalize_embeddings=True)
    assert normalized.shape == (5, 8)
    np.testing.assert_allclose(np.linalg.norm(normalized, axis=1), 1, atol=1e-5)


def test_precision(sentence_model):
    embeddings = sentence_model.encode(TEXTS)
    binary = sentence_model.encode(TEXTS, precision="binary")
    assert binary.dtype == np.int8 and binary.shape == (5, 32 // 8)
    np.testing.assert_array_equal((binary.astype(int) + 128).astype(np.uint8), np.packbits(embeddings > 0, axis=1))
    small = sentence_model.encode(TEXTS, precision="int8")
    assert small.dtype == np.int8 and small.shape == (5, 32)
    np.testing.assert_array_equal(small, quantize_embeddings(embeddings, "int8"))


@pytest.mark.parametrize("argument", DTYPE_ARGUMENTS)
def test_dtype(exported, sentence_model, argument):
    half = load(exported, model_kwargs={argument: torch.bfloat16})
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    embeddings = half.encode(TEXTS)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    assert 0.99 < cosines(embeddings, sentence_model.encode(TEXTS)).min() < 0.9999999


def test_attn_implementation(exported):
    model = load(exported, model_kwargs={"attn_implementation": "eager"})
    assert model[0].model.language_model.config._attn_implementation == "eager"


@pytest.mark.slow
def test_pool_of_processes(sentence_model):
    pool = sentence_model.start_multi_process_pool(["cpu", "cpu"])
    try:
        embeddings = sentence_model.encode(TEXTS, prompt=PROMPT, k=5, pool=pool, chunk_size=2)
    finally:
        sentence_model.stop_multi_process_pool(pool)
    assert cosines(embeddings, sentence_model.encode(TEXTS, prompt=PROMPT, k=5)).min() > 0.9999
