"""The Sentence Transformers module: the same vectors as AutoModel's, what the library does with them, saving with all
code however the class was imported, and training by the library's own trainer."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    quantize_embeddings,
)
from transformers import AutoModel, AutoProcessor, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module, get_relative_import_files

from conftest import ROOT, text_config
from gircse.training.publishing import export
from test_loading import DTYPE_ARGUMENTS, problems, run_fresh

try:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
except ImportError:  # before sentence-transformers 5.4
    from sentence_transformers.losses import MultipleNegativesRankingLoss

TEXTS = ["a red fox", "", "how do I renew the card that was stolen from me last week?", "rain", "a red fox runs"]
PROMPT = "Instruct: Retrieve semantically similar text.\nQuery: "
SUFFIX = " In short:"
CODE = [f"{part}_gircse.py" for part in ("configuration", "modeling", "processing", "sentence")]
# The name of this argument changed in sentence-transformers 5.4.
PROCESSOR_ARGUMENT = "processor_kwargs"
if PROCESSOR_ARGUMENT not in inspect.signature(SentenceTransformer.__init__).parameters:
    PROCESSOR_ARGUMENT = "tokenizer_kwargs"


def make_processor(**settings):
    processor_class = get_class_from_dynamic_module("processing_gircse.GircseProcessor", str(ROOT))
    return processor_class(AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True), max_length=64, **settings)


def make_folder(gircse, folder: Path, **settings) -> Path:
    """A tiny model with the root's tokenizer, exported as training does."""
    torch.manual_seed(0)
    processor = make_processor(**settings)
    text = text_config("qwen2", vocab_size=len(processor.tokenizer), pad_token_id=0)
    config = gircse.GircseConfig(text_config=text, num_steps=3)
    export(gircse.GircseModel(config), processor, folder)
    return folder


@pytest.fixture(scope="module")
def folder(gircse, tmp_path_factory) -> Path:
    return make_folder(gircse, tmp_path_factory.mktemp("exported") / "tiny", suffix=SUFFIX)


@pytest.fixture(scope="module")
def loaded(folder) -> SentenceTransformer:
    return load(folder)


@pytest.fixture
def model(loaded):
    """What a test changes of it is undone."""
    length = loaded.max_seq_length
    yield loaded
    loaded.max_seq_length = length


def load(folder: Path, **kwargs) -> SentenceTransformer:
    return SentenceTransformer(str(folder), trust_remote_code=True, device="cpu", **kwargs)


def auto_embeddings(folder: Path, prompt: str | None = None, k: int | None = None) -> np.ndarray:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    rows = [model.generate_embedding(**processor(text, prompt=prompt), k=k) for text in TEXTS]
    return torch.cat(rows).numpy()


def cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return (left * right).sum(-1) / np.linalg.norm(left, axis=-1) / np.linalg.norm(right, axis=-1)


class Inputs:
    """Keeps what the model is given while the block runs: `ids` has each row's token ids, longest text first."""

    def __init__(self, model: SentenceTransformer) -> None:
        self.model, self.ids = model[0].model, []

    def __enter__(self) -> Inputs:
        self.hook = self.model.register_forward_pre_hook(self.keep)
        return self

    def keep(self, module, args) -> None:
        self.ids += [ids[mask.bool()].tolist() for ids, mask in zip(*args[:2], strict=True)]

    def __exit__(self, *_) -> None:
        self.hook.remove()


# The same vectors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [None, 1, 7])
def test_encode_gives_the_vectors_of_generate_embedding(folder, model, k):
    embeddings = model.encode(TEXTS, prompt=PROMPT, k=k)
    assert embeddings.shape == (5, 32) and embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    assert cosines(embeddings, auto_embeddings(folder, PROMPT, k)).min() > 0.9999
    # k and the prompt matter, or the line above says nothing.
    assert cosines(embeddings, auto_embeddings(folder, PROMPT, 5)).max() < 0.9999
    assert cosines(embeddings, auto_embeddings(folder, None, k)).max() < 0.9999


def test_root_model_encodes_as_auto_model_does():
    if not (ROOT / "model.safetensors").exists():
        pytest.skip("the repo root holds no model.safetensors, so there is no published model to load")
    model = load(ROOT)
    for k in (None, 20):
        embeddings = model.encode(TEXTS, prompt_name="STS12", k=k)
        assert cosines(embeddings, auto_embeddings(ROOT, PROMPT, k)).min() > (
            0.9999 if model.dtype == torch.float32 else 0.999
        )
    assert model.similarity_fn_name == "cosine" and model.prompts["STS12"] == PROMPT


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batch_size_change_nothing(folder, side):
    model = load(folder, **{PROCESSOR_ARGUMENT: {"padding_side": side}})
    assert model.tokenizer.padding_side == side
    assert cosines(model.encode(TEXTS, batch_size=1), model.encode(TEXTS, batch_size=5)).min() > 0.99999


def test_number_of_steps_of_the_configuration(folder, model):
    embeddings = model.encode(TEXTS)
    assert cosines(embeddings, model.encode(TEXTS, k=3)).min() > 0.99999
    other = load(folder, config_kwargs={"num_steps": 6})
    assert other[0].model.config.num_steps == 6
    assert cosines(other.encode(TEXTS), model.encode(TEXTS, k=6)).min() > 0.99999


@pytest.mark.parametrize("k, error", [(0, ValueError), (-1, ValueError), ("3", TypeError), (2.0, TypeError)])
def test_wrong_k_is_refused(model, k, error):
    with pytest.raises(error, match=re.escape(f"k={k!r} must be an int >= 1")):
        model.encode(TEXTS, k=k)


@pytest.mark.parametrize("k", [np.int64(2), np.int32(2), torch.tensor(2)])
def test_k_may_be_any_integer(model, k):
    np.testing.assert_array_equal(model.encode(TEXTS, k=k), model.encode(TEXTS, k=2))


@pytest.mark.parametrize("k", [True, np.float64(2)])
def test_a_truth_value_or_a_fraction_is_no_k(model, k):
    with pytest.raises(TypeError, match=re.escape(f"k={k!r} must be an int >= 1")):
        model.encode(TEXTS, k=k)


@pytest.mark.parametrize("texts", [["a", None], [3]])
def test_what_is_no_text_is_refused(model, texts):
    with pytest.raises(TypeError, match="must be a str|can only concatenate str"):  # by us, or the library before 5.4
        model.encode(texts, prompt=PROMPT)


def test_one_text_and_none(model):
    assert model.encode("rain").shape == (32,)
    assert len(model.encode([])) == 0


def test_all_outputs_of_a_text(model):
    found = model.encode(TEXTS[:2], output_value=None)
    assert [set(row) for row in found] == [{"input_ids", "attention_mask", "sentence_embedding"}] * 2
    embeddings = np.stack([row["sentence_embedding"].numpy() for row in found])
    np.testing.assert_allclose(embeddings, model.encode(TEXTS[:2]), atol=1e-6)


def test_there_are_no_embeddings_of_tokens(model):
    with pytest.raises(ValueError, match="output_value='token_embeddings': .* Use 'sentence_embedding' or None"):
        model.encode(TEXTS, output_value="token_embeddings")
    # What the error names instead.
    inputs = getattr(model, "preprocess", model.tokenize)(TEXTS)
    states = model[0].model(**inputs).step_states
    assert states.shape == (5, 3, 32)
    mean = torch.nn.functional.normalize(states.mean(1), dim=-1).detach().numpy()
    np.testing.assert_allclose(mean, model.encode(TEXTS), atol=1e-5)


# Prompts and lengths ------------------------------------------------------------------------------------------------


def golden_ids(text: str) -> list[int]:
    return AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)(text, add_special_tokens=False)["input_ids"]


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
def test_prompt_by_name_gives_the_golden_ids(model, name, instruction):
    prefix = f"Instruct: {instruction}\nQuery: " if instruction else ""
    with Inputs(model) as inputs:
        model.encode(["a red fox"], prompt_name=name)
        model.encode(["a red fox"], prompt=prefix)
    assert inputs.ids == [golden_ids(f"{prefix}a red fox") + golden_ids(SUFFIX)] * 2


def test_queries_and_documents(model):
    with Inputs(model) as inputs:
        model.encode_query("rain")
        model.encode_document("rain")
    query = model.prompts["query"] + "rain"
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
    folder = make_folder(gircse, tmp_path / "other", prompt_template="[{instruction}]")
    prompts = json.loads((folder / "config_sentence_transformers.json").read_text(encoding="utf-8"))["prompts"]
    assert prompts["STS12"] == "[Retrieve semantically similar text.]" and prompts["document"] == ""
    assert all(prompt[0] + prompt[-1] == "[]" and "Instruct: " not in prompt for prompt in prompts.values() if prompt)


def test_max_seq_length_cuts_the_text_and_keeps_the_suffix(model):
    assert model.max_seq_length == 64 and "'max_seq_length': 64" in str(model)
    text, suffix = "how do I renew the card that was stolen from me last week? " * 20, golden_ids(SUFFIX)
    room = 12 - len(suffix)
    with Inputs(model) as inputs:
        whole = model.encode(text)
        model.max_seq_length = 12
        cut = model.encode([text, "rain"], prompt=PROMPT)
    ids = golden_ids(PROMPT + text)
    assert inputs.ids == [
        golden_ids(text)[: 64 - len(suffix)] + suffix,
        ids[:room] + suffix,
        golden_ids(PROMPT + "rain")[:room] + suffix,
    ]
    assert cosines(whole, cut[0]) < 0.9999
    model.max_seq_length = len(suffix)
    with pytest.raises(ValueError, match=f"max_length must be an int greater than the suffix's {len(suffix)} tokens"):
        model.encode(text)


def test_max_seq_length_none_is_all_that_there_is_room_for(model):
    positions = model[0].model.config.text_config.max_position_embeddings
    model.max_seq_length = None
    assert model.max_seq_length == positions - model[0].model.config.num_steps
    with Inputs(model) as inputs:
        model.encode("how do I renew the card? " * 50)
    assert len(inputs.ids[0]) == positions - model[0].model.config.num_steps


def test_max_seq_length_is_any_integer(model):
    model.max_seq_length = np.int64(20)
    assert model.max_seq_length == 20 and type(model.max_seq_length) is int
    for wrong in (0, 20.0, "20", True):
        with pytest.raises(ValueError, match=f"max_length must be an int >= 1, got {wrong!r}"):
            model.max_seq_length = wrong
    assert model.max_seq_length == 20


@pytest.mark.skipif(PROCESSOR_ARGUMENT == "tokenizer_kwargs", reason="a module gets no k with the texts before 5.4")
def test_more_steps_leave_less_room_for_the_text(model):
    text, positions = "how do I renew the card? " * 50, model[0].model.config.text_config.max_position_embeddings
    with Inputs(model) as inputs:
        model.encode(text, k=positions - 10)
        model.max_seq_length = positions
        model.encode(text)
    assert [len(ids) for ids in inputs.ids] == [10, positions - model[0].model.config.num_steps]
    with pytest.raises(ValueError, match=f"k={positions} takes all positions of the backbone"):
        model.encode(text, k=positions)


@pytest.mark.skipif(PROCESSOR_ARGUMENT == "tokenizer_kwargs", reason="the library has them since 5.4")
def test_processing_kwargs_of_one_call(model):
    text = "how do I renew the card? " * 50
    with Inputs(model) as inputs:
        model.encode(text, processing_kwargs={"text": {"max_length": 9, "truncation": True}})
        model.encode(text)
    assert [len(ids) for ids in inputs.ids] == [9, 64]
    for wrong in ({"text": {"padding": "max_length"}}, {"image": {}}):
        with pytest.raises(ValueError, match="may only be {'text': {'max_length': N}}"):
            model.encode(text, processing_kwargs=wrong)


def test_arguments_of_the_library_may_be_given_twice(folder):
    load(folder, model_kwargs={"trust_remote_code": True}, config_kwargs={"trust_remote_code": True})


def test_max_seq_length_at_loading_and_saving(folder, tmp_path):
    model = load(folder, **{PROCESSOR_ARGUMENT: {"model_max_length": 20}})
    assert model.max_seq_length == 20
    model.save_pretrained(str(tmp_path / "saved"))
    assert load(tmp_path / "saved").max_seq_length == 20
    assert AutoProcessor.from_pretrained(tmp_path / "saved", trust_remote_code=True).max_length == 20


# What the library makes of the vectors ------------------------------------------------------------------------------


def dimension(model: SentenceTransformer) -> int:
    """By its name since sentence-transformers 5.4, or the former one."""
    return (getattr(model, "get_embedding_dimension", None) or model.get_sentence_embedding_dimension)()


def test_dimension_similarity_and_truncation(folder, model):
    embeddings = model.encode(TEXTS)
    assert dimension(model) == 32
    np.testing.assert_allclose(model.similarity(embeddings, embeddings), embeddings @ embeddings.T, atol=1e-5)
    short = load(folder, truncate_dim=8)
    assert dimension(short) == 8
    np.testing.assert_allclose(short.encode(TEXTS), embeddings[:, :8], atol=1e-5)
    normalized = short.encode(TEXTS, normalize_embeddings=True)
    assert normalized.shape == (5, 8)
    np.testing.assert_allclose(np.linalg.norm(normalized, axis=1), 1, atol=1e-5)


def test_precision(model):
    embeddings = model.encode(TEXTS)
    binary = model.encode(TEXTS, precision="binary")
    assert binary.dtype == np.int8 and binary.shape == (5, 32 // 8)
    np.testing.assert_array_equal((binary.astype(int) + 128).astype(np.uint8), np.packbits(embeddings > 0, axis=1))
    small = model.encode(TEXTS, precision="int8")
    assert small.dtype == np.int8 and small.shape == (5, 32)
    np.testing.assert_array_equal(small, quantize_embeddings(embeddings, "int8"))


@pytest.mark.parametrize("argument", DTYPE_ARGUMENTS)
def test_dtype(folder, model, argument):
    half = load(folder, model_kwargs={argument: torch.bfloat16})
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    embeddings = half.encode(TEXTS)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    assert 0.99 < cosines(embeddings, model.encode(TEXTS)).min() < 0.9999999


def test_attn_implementation(folder):
    model = load(folder, model_kwargs={"attn_implementation": "eager"})
    assert model[0].model.language_model.config._attn_implementation == "eager"


def test_pool_of_processes(model):
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    try:
        embeddings = model.encode(TEXTS, prompt=PROMPT, k=5, pool=pool, chunk_size=2)
    finally:
        model.stop_multi_process_pool(pool)
    assert cosines(embeddings, model.encode(TEXTS, prompt=PROMPT, k=5)).min() > 0.9999


# Loading and saving -------------------------------------------------------------------------------------------------


def embed_and_save(job_file: str) -> None:
    """What the fresh process runs. It gets this source alone: nothing of the tests or the repo is importable there."""
    import json
    import os
    import sys
    from pathlib import Path

    connections: list[str] = []
    sys.addaudithook(lambda event, args: event == "socket.connect" and connections.append(str(args[1])))

    import torch
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoProcessor

    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    report = {"embeddings": {}, "auto": {}, "prompts": {}, "files": {}}
    for name, source in job["sources"].items():
        if job["imported"]:  # the class from the folder itself, around the two that AutoModel and AutoProcessor load
            sys.path.insert(0, source)
            from sentence_gircse import SentenceGircse

            inner = AutoModel.from_pretrained(source, trust_remote_code=True)
            processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
            model = SentenceTransformer(modules=[SentenceGircse(inner, processor)], device="cpu")
            sys.path.remove(source)
        else:
            model = SentenceTransformer(source, trust_remote_code=True, device="cpu")
        report["embeddings"][name] = torch.tensor(model.encode(job["texts"], k=5))
        report["prompts"][name] = model.prompts
        model.save_pretrained(str(Path(job["save_to"]) / name))
        inner = AutoModel.from_pretrained(source, trust_remote_code=True)
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
        report["auto"][name] = inner.generate_embedding(**processor(job["texts"]), k=5)
    report["connections"], report["path"] = connections, [*sys.path, os.environ.get("PYTHONPATH")]
    torch.save(report, job["report"])


@pytest.fixture(scope="module")
def saved(folder, tmp_path_factory) -> dict:
    """Saved from a folder, from the Hub's cache and by an imported class, each in a process of its own; then all three
    loaded and saved in one more, with what they came from gone."""
    work = tmp_path_factory.mktemp("saved")
    sources = work / "sources"
    shutil.copytree(folder, sources / "folder")
    shutil.copytree(folder, sources / "imported")
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = work / "hub" / "models--me--gircse"
    shutil.copytree(folder, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    names = {"folder": str(sources / "folder"), "imported": str(sources / "imported"), "hub": "me/gircse"}
    reports = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_CACHE", str(work / "hub"))
        for name, source in names.items():
            job = {
                "sources": {name: source},
                "imported": name == "imported",
                "texts": TEXTS,
                "save_to": str(work / "once"),
            }
            reports[name] = run_fresh(embed_and_save, work / f"process_{name}", job)
    shutil.rmtree(sources)
    shutil.rmtree(cached)
    again = {name: str(work / "once" / name) for name in names}
    job = {"sources": again, "imported": False, "texts": TEXTS, "save_to": str(work / "twice")}
    return {"work": work, "once": reports, "twice": run_fresh(embed_and_save, work / "process_again", job)}


@pytest.mark.parametrize("name", ["folder", "hub", "imported"])
def test_saved_folder_loads_elsewhere_and_again(saved, model, name):
    expected = model.encode(TEXTS, k=5)
    for report in (saved["once"][name], saved["twice"]):
        assert report["connections"] == [] and str(ROOT) not in report["path"]
        for kind in ("embeddings", "auto"):
            assert cosines(report[kind][name].numpy(), expected).min() > 0.9999
    if name != "imported":  # a model in memory has no prompts but those given to SentenceTransformer(prompts=...)
        assert saved["twice"]["prompts"][name] == model.prompts
    for folder in (saved["work"] / "once" / name, saved["work"] / "twice" / name):
        assert [entry["type"] for entry in json.loads((folder / "modules.json").read_text(encoding="utf-8"))] == [
            "sentence_gircse.SentenceGircse"
        ]
        for file in CODE:
            assert (folder / file).read_bytes() == (ROOT / file).read_bytes(), file
        for file in folder.glob("*.json"):
            if "auto_map" in (content := json.loads(file.read_text(encoding="utf-8"))):
                assert "--" not in str(content["auto_map"]), file


def test_the_weights_of_two_folders_in_one_class(folder, tmp_path):
    """Every folder makes classes of its own, and `SentenceTransformer.merge` wants models of one."""
    first = load(folder)
    with torch.no_grad():
        for weight in first.parameters():
            weight.add_(torch.ones_like(weight))
    first.save_pretrained(str(tmp_path / "other"))
    first = load(folder)
    module = type(first[0])(type(first[0].model).from_pretrained(tmp_path / "other"), first[0].processor)
    second = SentenceTransformer(modules=[module], device="cpu")
    assert type(load(tmp_path / "other")[0]) is not type(first[0])
    assert [type(part) for part in second.modules()][1:] == [type(part) for part in first.modules()][1:]
    assert second[0].get_config_dict() == first[0].get_config_dict()
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one + 1, other)


def test_class_imported_from_a_package_is_refused(model):
    """It would be saved under the package's name, which is nowhere else."""
    spec = importlib.util.spec_from_file_location("package.sentence_gircse", ROOT / "sentence_gircse.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(ImportError, match="'package.sentence_gircse' would be saved under that name"):
        module.SentenceGircse(model[0].model, model[0].processor)


def test_another_backend_is_refused(folder):
    with pytest.raises(ValueError, match="backend='onnx'"):
        load(folder, backend="onnx")


def test_nothing_loads_without_trust(folder):
    with pytest.raises(ValueError, match="trust_remote_code"):
        SentenceTransformer(str(folder), device="cpu", trust_remote_code=False)


def test_module_only_computes():
    """As the other files that are loaded with the repo, but for the library that asks for it."""
    found = problems((ROOT / "sentence_gircse.py").read_text(encoding="utf-8"))
    assert {re.sub(r"'(sentence_transformers)[\w.]*'", r"\1", problem) for problem in found} == {
        "import of sentence_transformers"
    }
    assert get_relative_import_files(ROOT / "sentence_gircse.py") == []


# Training -----------------------------------------------------------------------------------------------------------


def test_training_with_a_loss_of_the_library(folder, tmp_path):
    model = load(folder)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(0.1)  # to the usual size of fresh weights, with which training is steady
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    anchors, positives = ["red", "cold", "round", "loud"], ["a rose", "ice", "a ball", "thunder"]
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=30,
        per_device_train_batch_size=4,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        logging_steps=1,
        prompts={"anchor": PROMPT},
        save_steps=30,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    rows = Dataset.from_dict({"anchor": anchors, "positive": positives})
    trainer = SentenceTransformerTrainer(model, arguments, rows, loss=MultipleNegativesRankingLoss(model))
    with Inputs(model) as inputs:
        trainer.train()
    assert golden_ids(f"{PROMPT}red") + golden_ids(SUFFIX) in inputs.ids
    assert golden_ids("a rose") + golden_ids(SUFFIX) in inputs.ids
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < 0.5 * losses[0]
    # All of them: the LM head learns through the soft tokens alone.
    assert [name for name, weight in model.named_parameters() if torch.equal(weight, before[name])] == []
    again = load(tmp_path / "run" / "checkpoint-30")
    assert cosines(again.encode(TEXTS), model.encode(TEXTS)).min() > 0.9999


# Adapters -----------------------------------------------------------------------------------------------------------


def add_adapter(model: SentenceTransformer, trained: bool = True, **settings) -> SentenceTransformer:
    """A LoRA by the library's method, as if it were trained."""
    peft = pytest.importorskip("peft")
    settings = {"r": 4, "target_modules": "all-linear", "task_type": "FEATURE_EXTRACTION"} | settings
    try:
        model.add_adapter(peft.LoraConfig(**settings))
    except ValueError as error:
        if "version of PEFT" in str(error):
            pytest.skip("transformers takes no adapters with this version of PEFT")
        raise
    for name, weight in model.named_parameters():
        if trained and "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model


@pytest.fixture(scope="module")
def adapted(folder, tmp_path_factory):
    """A model with an adapter, and the folder that it was saved in."""
    model = add_adapter(load(folder))
    saved = tmp_path_factory.mktemp("adapted") / "saved"
    model.save_pretrained(str(saved))
    return model, saved


def test_a_saved_adapter_is_applied_by_all_that_load(folder, adapted, gircse):
    model, saved = adapted
    expected = model.encode(TEXTS)
    assert cosines(expected, load(folder).encode(TEXTS)).max() < 0.999  # or the lines below say nothing
    assert not list(saved.glob("*.safetensors")) and len(list((saved / "adapter").glob("*.safetensors"))) == 1
    assert json.loads((saved / "config.json").read_text(encoding="utf-8"))["adapter"] == "adapter"
    again = load(saved)
    assert again.active_adapters() == ["default"]
    np.testing.assert_array_equal(again.encode(TEXTS), expected)
    assert cosines(auto_embeddings(saved), expected).min() > 0.9999
    whole = SentenceTransformer(modules=[type(model[0])(gircse.GircseModel.from_pretrained(saved), model[0].processor)])
    assert cosines(whole.encode(TEXTS), expected).min() > 0.9999


def test_a_saved_adapter_is_found_from_elsewhere_and_saved_again(folder, adapted, tmp_path, monkeypatch):
    monkeypatch.chdir(folder.parent)
    model = add_adapter(load(Path(folder.name)))
    model.save_pretrained(str(tmp_path / "one"))
    monkeypatch.chdir(tmp_path)
    load(Path("one")).save_pretrained("two")
    again = load(Path("two"), config_kwargs={"num_steps": 5})
    np.testing.assert_array_equal(again.encode(TEXTS), model.encode(TEXTS, k=5))
    assert again.state_dict().keys() == model.state_dict().keys()


def test_an_adapter_that_transformers_saved_is_applied(adapted, tmp_path):
    """In its own layout, beside what only this repo saves."""
    model, saved = adapted
    shutil.copytree(saved, tmp_path / "saved", ignore=shutil.ignore_patterns("config.json", "adapter"))
    model[0].model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "adapter_config.json").exists() and not (tmp_path / "saved" / "config.json").exists()
    np.testing.assert_array_equal(load(tmp_path / "saved").encode(TEXTS), model.encode(TEXTS))


@pytest.mark.parametrize(
    "names", [r"language_model\..*\.(q_proj|down_proj)", ["language_model.model.layers.1.mlp.up_proj"]]
)
def test_an_adapter_of_some_layers_is_applied(folder, names, tmp_path):
    model = add_adapter(load(folder), target_modules=names)
    model.save_pretrained(str(tmp_path / "saved"))
    assert cosines(auto_embeddings(tmp_path / "saved"), model.encode(TEXTS)).min() > 0.9999
    np.testing.assert_array_equal(load(tmp_path / "saved").encode(TEXTS), model.encode(TEXTS))


def test_merged_adapters_are_saved_as_weights(folder, adapted, tmp_path):
    model, saved = adapted
    merged = load(saved)
    merged[0].merge_adapter()
    merged.save_pretrained(str(tmp_path / "whole"))
    assert {name for name, _ in merged.named_parameters()} == {name for name, _ in load(folder).named_parameters()}
    assert (tmp_path / "whole" / "model.safetensors").exists() and not (tmp_path / "whole" / "adapter").exists()
    for one in (merged, load(tmp_path / "whole")):
        assert cosines(one.encode(TEXTS), model.encode(TEXTS)).min() > 0.9999
    with pytest.raises(ValueError, match="merge_adapter: the model has no adapter"):
        merged[0].merge_adapter()


def test_modules_beside_an_adapter_are_merged(folder):
    model = add_adapter(load(folder), target_modules=["q_proj"], modules_to_save=["lm_head"])
    with torch.no_grad():
        model[0].model.language_model.lm_head.modules_to_save["default"].weight.neg_()
    expected = model.encode(TEXTS)
    assert cosines(expected, load(folder).encode(TEXTS)).max() < 0.999
    model[0].merge_adapter()
    assert cosines(model.encode(TEXTS), expected).min() > 0.9999


@pytest.mark.parametrize("place", ["its own folder", "memory"])
def test_an_adapter_without_another_folder_to_load_it_with_is_merged(folder, tmp_path, place):
    shutil.copytree(folder, tmp_path / "base")
    model = add_adapter(load(tmp_path / "base"))
    expected = model.encode(TEXTS)
    if place == "memory":
        model[0].model.config.name_or_path = ""
        shutil.rmtree(tmp_path / "base")
    model.save_pretrained(str(tmp_path / "base"))
    assert cosines(load(tmp_path / "base").encode(TEXTS), expected).min() > 0.9999
    assert cosines(auto_embeddings(tmp_path / "base"), expected).min() > 0.9999
    np.testing.assert_array_equal(model.encode(TEXTS), expected)  # which keeps its adapter
    assert model.active_adapters() == ["default"]


def test_training_of_an_adapter_goes_on_from_a_checkpoint(folder, tmp_path):
    def train(resume: str | None = None, best: bool = False) -> SentenceTransformer:
        torch.manual_seed(0)
        model = add_adapter(load(folder), trained=False)
        arguments = SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / ("best" if best else "run")),
            max_steps=4,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            save_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            load_best_model_at_end=best,
            metric_for_best_model="eval_loss",
            greater_is_better=True,  # after fewer steps, so that it has to be loaded
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        texts = {"anchor": ["red", "cold", "round", "loud"], "positive": ["a rose", "ice", "a ball", "thunder"]}
        rows = Dataset.from_dict(texts)
        trainer = SentenceTransformerTrainer(
            model, arguments, rows, eval_dataset=rows, loss=MultipleNegativesRankingLoss(model)
        )
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = train().encode(TEXTS)
    assert cosines(whole, load(folder).encode(TEXTS)).max() < 0.9999
    middle = tmp_path / "run" / "checkpoint-2"
    np.testing.assert_array_equal(train(resume=str(middle)).encode(TEXTS), whole)
    best = train(best=True).encode(TEXTS)
    np.testing.assert_array_equal(best, load(middle).encode(TEXTS))
    assert cosines(best, whole).min() < 0.9999
