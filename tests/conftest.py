"""Fixtures that tests of several files share."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported, which reads it once

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from helpers import (
    IDS,
    MASK,
    ROOT,
    export_tiny,
    make_rows,
    make_tokenizer,
    processor_class,
    text_config,
    tiny_text_config,
)


@pytest.fixture(scope="session")
def gircse() -> SimpleNamespace:
    """The repo's remote code, imported as `from_pretrained` imports it."""
    model = get_class_from_dynamic_module("modeling_gircse.GircseModel", str(ROOT))
    module = sys.modules[model.__module__]
    return SimpleNamespace(GircseModel=model, GircseConfig=module.GircseConfig, GircseOutput=module.GircseOutput)


@pytest.fixture
def make_model(gircse):
    def make(backbone: str = "qwen2", *, dtype=torch.float32, seed: int = 0, text_changes=None, **axes):
        torch.manual_seed(seed)
        config = gircse.GircseConfig(text_config=text_config(backbone, **(text_changes or {})), **axes)
        model = gircse.GircseModel(config).to(dtype).eval()
        # How the backbone is driven is tried at the first text: now, so that tests can count passes.
        model.generate_embedding(torch.tensor([[3, 4]]), k=None if model.config.step_token == "none" else 1)
        return model

    return make


@pytest.fixture
def batch():
    """Right-padded ids of four texts of different lengths, (4, 11), and their mask."""
    generator = torch.Generator().manual_seed(7)
    lengths = torch.tensor([11, 4, 1, 8])
    mask = (torch.arange(11) < lengths[:, None]).long()
    ids = torch.randint(3, 99, (4, 11), generator=generator)
    return ids * mask, mask


@pytest.fixture
def ids_and_mask():
    return torch.tensor(IDS), torch.tensor(MASK)


@pytest.fixture
def make_plain(tmp_path):
    """Saves a tiny plain causal LM and returns it with its folder."""

    def make(backbone: str = "qwen2", *, dtype=torch.float32, **changes) -> tuple[nn.Module, str]:
        torch.manual_seed(3)
        language_model = AutoModelForCausalLM.from_config(text_config(backbone, **changes)).to(dtype).eval()
        folder = tmp_path / f"plain-{backbone}"
        language_model.save_pretrained(folder)
        return language_model, str(folder)

    return make


@pytest.fixture(scope="session")
def exported(gircse, tmp_path_factory) -> Path:
    """A tiny model with the root's tokenizer and a suffix, exported as training does. Tests leave it as it is."""
    return export_tiny(gircse, tmp_path_factory.mktemp("exported") / "tiny", suffix=" In short:")


@pytest.fixture(scope="session")
def embed(exported):
    """What `AutoModel` gives, text by text: (B, d), or (B, k, d)."""
    model = AutoModel.from_pretrained(exported, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(exported, trust_remote_code=True)

    def embed(texts: list[str], instruction: str | None = None, **settings) -> torch.Tensor:
        rows = [model.generate_embedding(**processor(text, instruction=instruction), **settings) for text in texts]
        return torch.cat(rows)

    return embed


# Training. What needs datasets and accelerate is imported in the fixtures: the tests of loading do without.


@pytest.fixture(scope="session")
def training_cache(tmp_path_factory):
    """Pairs are cached below the tests' own folder."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache of pairs for one test: whether a file is read anew is seen."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="session")
def processor():
    return processor_class()(make_tokenizer(), max_length=100)  # and 20 steps fit the backbone's 128 positions


@pytest.fixture(scope="session")
def workplace(processor, training_cache, tmp_path_factory):
    """A saved tiny model with dropout, 60 pairs, and the arguments of a run of 14 steps in two epochs."""
    from training_helpers import tiny_model

    folder = tmp_path_factory.mktemp("runs")
    tiny_model(text_changes={"attention_dropout": 0.1}).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    with (folder / "pairs.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in make_rows(60, lambda i: 2 + i % 3))
    argv = f"--model_name_or_path {folder / 'model'} --train_data {folder / 'pairs.jsonl'} --tuning full --k 2 "
    argv += "--learning_rate 1e-3 --num_train_epochs 2 --per_device_train_batch_size 8 --held_out 3 --temperature 0.1 "
    argv += "--logging_steps 1 --save_steps 3 --report_to none --use_cpu True --disable_tqdm True "
    argv += "--dataloader_pin_memory False"
    return SimpleNamespace(folder=folder, argv=argv.split())


@pytest.fixture(scope="session")
def straight(workplace):
    """The folder of a run that nothing interrupts, and what its logger said."""
    from train_gircse import main

    output, messages = workplace.folder / "straight", []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("gircse").addHandler(handler)
    try:
        main([*workplace.argv, "--output_dir", str(output)])
    finally:
        logging.getLogger("gircse").removeHandler(handler)
    return SimpleNamespace(folder=output, messages=messages)


@pytest.fixture(scope="session")
def lora(workplace):
    """A LoRA run of 4 steps from a plain causal LM, and the model of this process at its export."""
    from gircse.training.publishing import export
    from train_gircse import main

    base = workplace.folder / "plain"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_text_config(tie_word_embeddings=True)).save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    argv = f"--model_name_or_path {base} --train_data {workplace.folder / 'pairs.jsonl'} --tuning lora --lora_r 4 "
    argv += "--learning_rate 0.02 --max_steps 4 --per_device_train_batch_size 4 --k 3 --num_steps 4 --held_out 8 "
    logger = "tensorboard" if importlib.util.find_spec("tensorboard") else "none"
    argv += "--sub_batch_size 5 --logging_steps 1 --save_steps 2 --use_cpu True --disable_tqdm True "
    argv += f"--dataloader_pin_memory False --report_to {logger}"
    output, kept = workplace.folder / "lora", SimpleNamespace()

    def watched(model, processor, *args, **kwargs):
        kept.inputs = processor(["a red thing", "cold"], instruction="find the answer")
        kept.unmerged = model.eval().get_base_model().generate_embedding(**kept.inputs, k=4)
        kept.model = export(model, processor, *args, **kwargs)
        return kept.model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gircse.training.trainer.export", watched)
        elsewhere = workplace.folder / "elsewhere"
        elsewhere.mkdir()
        patch.chdir(elsewhere)
        main([*argv.split(), "--output_dir", str(output)])
        kept.beside = list(elsewhere.iterdir())
    kept.argv, kept.folder, kept.base = argv.split(), output, base
    return kept


# Evaluation


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory) -> Path:
    """Local tasks of every layout."""
    from evaluation_helpers import write_data

    return write_data(tmp_path_factory.mktemp("files") / "data")


@pytest.fixture(scope="session")
def model_folder(gircse, tmp_path_factory) -> Path:
    from evaluation_helpers import make_folder

    return make_folder(gircse, tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def static_folder(tmp_path_factory) -> Path:
    """A Sentence Transformers model of another kind."""
    from sentence_transformers import SentenceTransformer

    try:
        from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    except ImportError:  # before sentence-transformers 5.4
        from sentence_transformers.models import StaticEmbedding

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True).backend_tokenizer
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=8)], device="cpu")
    model.prompts = {"STS": "compare: ", "query": "query: ", "document": "passage: "}
    path = tmp_path_factory.mktemp("static") / "model"
    model.save_pretrained(str(path))
    return path


@pytest.fixture
def registry(static_folder, monkeypatch) -> Callable:
    """Enters the static model into mteb's registry as org/NAME, with a loader of its own, as 7B embedders have."""
    from mteb.models import ModelMeta
    from mteb.models.instruct_wrapper import InstructSentenceTransformerModel
    from mteb.models.model_implementations import MODEL_REGISTRY

    def enter(name: str, loader: Callable = InstructSentenceTransformerModel, **kwargs) -> str:
        def load_folder(model: str, revision: str, **options):
            return loader(str(static_folder), None, **options)

        fields = ModelMeta.create_empty().model_dump() | {"name": f"org/{name}", "revision": "1"}
        meta = ModelMeta(**fields | {"loader": load_folder, "loader_kwargs": kwargs})
        monkeypatch.setitem(MODEL_REGISTRY, meta.name, meta)
        return meta.name

    return enter


# Bulk embedding


@pytest.fixture(scope="module")
def cluster():
    """One local Ray for the tests that kill nothing."""
    ray = pytest.importorskip("ray")
    ray.shutdown()  # one that tests of another file may have left
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


# Sentence Transformers


@pytest.fixture(scope="session")
def loaded_sentence_model(exported):
    from sentence_helpers import load

    return load(exported)


@pytest.fixture
def sentence_model(loaded_sentence_model):
    """What a test changes of it is undone."""
    length = loaded_sentence_model.max_seq_length
    yield loaded_sentence_model
    loaded_sentence_model.max_seq_length = length
