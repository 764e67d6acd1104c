"""What tests share: tiny models with random weights, their tokenizers, processors and rows, and fresh processes. All of
it runs on a CPU and without a network."""

from __future__ import annotations

import gzip
import importlib.util
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers
from packaging.requirements import Requirement
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast
from transformers.dynamic_module_utils import get_class_from_dynamic_module

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # also in a process that runs a file of the tests as a script
    sys.path.insert(0, str(ROOT))

MODEL_PARTS = "adapters backbone configuration inputs modeling single_pass soft_tokens static_steps step_loop".split()
MODEL_FILES = [f"{part}_gircse.py" for part in MODEL_PARTS]
REMOTE_FILES = (*MODEL_FILES, "processing_gircse.py")
# transformers took up `dtype=` in 4.56 and goes on taking `torch_dtype=`; our models take both everywhere.
DTYPE_ARGUMENTS = ["torch_dtype", "dtype"]
# Before transformers 4.56 bitsandbytes needs a GPU.
OLD = tuple(map(int, transformers.__version__.split(".")[:2])) < (4, 56)
HAS_BITSANDBYTES = bool(importlib.util.find_spec("bitsandbytes")) and (not OLD or torch.cuda.is_available())
needs_bitsandbytes = pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes can't be used here")
IDS = [[5, 17, 60, 33, 8], [0, 0, 42, 9, 77]]
MASK = [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]

# Backbones

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
# Sliding windows are shorter than the tests' texts, so that they matter.
BACKBONES = {
    "qwen2": SMALL,  # its head is not tied to the embedding
    "qwen2-tied": {**SMALL, "tie_word_embeddings": True},
    "qwen3": {**SMALL, "head_dim": 8},
    "llama": SMALL,
    "mistral": {**SMALL, "sliding_window": 6},
    "gemma2": {**SMALL, "head_dim": 8, "sliding_window": 6, "final_logit_softcapping": 1.5, "query_pre_attn_scalar": 8},
    "gemma3_text": {**SMALL, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "phi3": SMALL,
    "gpt2": {
        "vocab_size": 99,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 128,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_neo": {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 3,
        "num_heads": 4,
        "attention_types": [[["global", "local", "local"], 1]],
        "window_size": 6,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "opt": {
        "vocab_size": 99,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 32,
        "init_std": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "mpt": {"vocab_size": 99, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 128, "initializer_range": 0.2},
    "cohere": {**SMALL, "logit_scale": 0.3},
    "granite": {**SMALL, "logits_scaling": 3.0, "embedding_multiplier": 2.0},
}


def text_config(name: str, **changes):
    settings = {**BACKBONES[name], **changes}
    config = AutoConfig.for_model(name.split("-")[0], **settings)
    if name.startswith("opt") or name == "gpt2":
        for dropout in ("dropout", "attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"):
            if hasattr(config, dropout):
                setattr(config, dropout, 0.0)
    return config


def room(model, name: str):
    """The module `name` of the remote code that a model, or its class, is of."""
    package = (model if isinstance(model, type) else type(model)).__module__.rpartition(".")[0]
    return sys.modules[f"{package}.{name}"]


# A procedure of others, written out


def laser(model, ids, mask, thinking_steps: int) -> torch.Tensor:
    """Each row by itself: the mean of h_0 and of the states of T - 1 soft tokens, (B, d), not normalised; every step
    is a full pass of the causal LM."""
    lm, rows = model.language_model, []
    table = lm.get_input_embeddings().weight
    for row_ids, row_mask in zip(ids, mask, strict=True):
        sequence, states = table[row_ids[row_mask.bool()]][None], []
        for _ in range(thinking_steps):
            output = lm(inputs_embeds=sequence, use_cache=False, output_hidden_states=True)
            states.append(output.hidden_states[-1][0, -1])
            soft = torch.softmax(output.logits[:, -1], dim=-1) @ table
            sequence = torch.cat([sequence, soft[:, None]], dim=1)
        rows.append(torch.stack(states).mean(0))
    return torch.stack(rows)


# Rows, tokenizers and processors

WORDS = "red blue green tall small old new fast slow warm cold dark bright wet dry loud quiet soft hard round".split()


def make_rows(count: int, negatives=lambda index: index % 3) -> list[dict]:
    """Rows of unlike lengths; `negatives(i)` hard negatives for row i."""
    rows = []
    for i in range(count):
        first, second = WORDS[i % 20], WORDS[(7 * i + 3) % 20]
        rows.append(
            {
                "query": f"which {first} thing {i} is {second}" + " or not" * (i % 4),
                "pos": [f"the {second} thing {i} is {first}" + " indeed" * (i % 3)],
                "neg": [f"nothing {first} {i} here {j}" for j in range(negatives(i))],
                "instruction": "find the answer" if i % 2 else "",
                "source": "one",
                "symmetric": False,
                "label": None,
            }
        )
    return rows


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    sentences = [text for row in make_rows(20, lambda i: 1) for text in (row["query"], *row["pos"], *row["neg"])]
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=["<pad>", "<bos>", "<eos>"],  # ids 0, 1, 2, as the tiny backbones have them
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "attention_mask"],
        eos_token="<eos>",
        pad_token="<pad>",
    )


def tiny_text_config(**changes):
    return text_config("qwen2", **{"vocab_size": 400, "num_hidden_layers": 2, **changes})


def processor_class():
    return get_class_from_dynamic_module("processing_gircse.GircseProcessor", str(ROOT))


def write_rows(path: Path, rows: list) -> str:
    """Writes rows (or raw lines, where a row is a str) as JSON lines, gzipped if the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") if path.suffix == ".gz" else path.open("w", encoding="utf-8") as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    return str(path)


def make_processor(**settings):
    """The root's tokenizer in a processor with a shorter limit."""
    return processor_class()(AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True), max_length=64, **settings)


def export_tiny(
    gircse, folder: Path, *, seed: int = 0, axes: dict | None = None, text: dict | None = None, **settings
) -> Path:
    """A tiny model with the root's tokenizer, exported as training does; `text` is of the backbone's configuration."""
    from gircse.training.publishing import export  # not needed by those who only load

    torch.manual_seed(seed)
    processor = make_processor(**settings)
    text = text_config("qwen2", vocab_size=len(processor.tokenizer), pad_token_id=0, **(text or {}))
    config = gircse.GircseConfig(text_config=text, **{"num_steps": 3, **(axes or {})})
    export(gircse.GircseModel(config), processor, folder)
    return folder


# Weights and adapters


def assert_same_weights(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].dtype == weight.dtype and torch.equal(found[name], weight), name


def edit_weights(file: Path, edit: Callable[[dict], dict | None]) -> None:
    """Changes a safetensors file; `edit` changes the dict in place or returns another."""
    weights = load_file(file)
    weights = edit(weights) or weights
    save_file({name: weight.contiguous() for name, weight in weights.items()}, file, metadata={"format": "pt"})


LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def save_adapter(language_model: nn.Module, folder: Path, *, std: float = 0.1, targets=LORA_TARGETS, **settings) -> str:
    """A trained-looking LoRA of a plain causal LM, made by PEFT alone."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(4)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(language_model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=std) if std else nn.init.zeros_(parameter)
    model.save_pretrained(folder)
    return str(folder)


def loads_beside_others() -> bool:
    """Whether this transformers loads adapters beside others with the peft that is installed."""
    try:
        from transformers.integrations.peft import MIN_PEFT_VERSION

        transformers.utils.check_peft_version(MIN_PEFT_VERSION)
    except ValueError:
        return False
    return True


# Values, gradients and calls of the decoder


def algorithm_1(model, ids, mask, k):
    """The paper's Algorithm 1: all of the sequence again at each step, from the causal LM's own forward pass. Rows are
    done one by one without padding. Returns (B, K, d): z_1..z_K, not normalised."""
    lm = model.language_model
    embed = lm.get_input_embeddings()
    rows = []
    for row_ids, row_mask in zip(ids, mask, strict=True):
        sequence = embed(row_ids[row_mask.bool()])[None]  # (1, N, d)
        length = sequence.shape[1]
        # (V, d), with whatever scaling the module does; by the weight, since a lookup gives padding_idx no gradient.
        table = embed.weight * (embed(torch.tensor(5)) / embed.weight[5]).detach()
        for _ in range(k):
            logits = lm(inputs_embeds=sequence, attention_mask=torch.ones(sequence.shape[:2]), use_cache=False).logits
            soft = torch.softmax(logits[:, -1] / model.config.logit_temperature, dim=-1)
            sequence = torch.cat([sequence, (soft @ table)[:, None]], dim=1)
        output = lm(
            inputs_embeds=sequence,
            attention_mask=torch.ones(sequence.shape[:2]),
            use_cache=False,
            output_hidden_states=True,
        )
        states = output.hidden_states[-1][:, length:]
        rows.append(torch.stack([states[0, : i + 1].mean(0) for i in range(k)]))
    return torch.stack(rows)


def relative(a, b):
    return float(((a - b).norm() / b.norm()).detach())


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def decoder_shapes(model):
    """A list that each call of the decoder appends its rows and positions to."""
    shapes = []
    room(model, "backbone_gircse").decoder_of(model.language_model).register_forward_pre_hook(
        lambda m, args, kwargs: shapes.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    return shapes


def decoder_calls(model, name):
    """A list that each call of the decoder appends its argument `name` to."""
    calls = []
    room(model, "backbone_gircse").decoder_of(model.language_model).register_forward_pre_hook(
        lambda m, args, kwargs: calls.append(kwargs[name]), with_kwargs=True
    )
    return calls


def keeps_a_cache(model):
    """Whether each step runs one new position over a cache, or the whole sequence again."""
    shapes = decoder_shapes(model)
    model.generate_embedding(torch.tensor([[5, 6, 7]]), k=2)
    return shapes[-1][1] == 1


def dtype_for(backbone):
    """float64, but for Gemma 2, whose eager attention makes NaN of rows beyond its window, and for MPT, whose mask
    overflows (transformers 4.51)."""
    return torch.float32 if backbone in ("gemma2", "mpt") else torch.float64


def attention_for(backbone):
    """transformers 4.51 can't make GPT-2's padding mask for SDPA in float64."""
    return {"attn_implementation": "eager"} if backbone == "gpt2" else {}


# Processes


def environment(folder: Path, **changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "datasets"), "TOKENIZERS_PARALLELISM": "false"}
    return {**kept, **offline, **changes}


def outputs_of(processes: list[subprocess.Popen]) -> list[str]:
    """What the processes of one run say, once all have ended well; none outlives the call."""
    try:
        outputs = [process.communicate(timeout=400)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]
    return outputs


def run_fresh(function: Callable[[str], None], folder: Path, job: dict) -> dict:
    """Runs `function(job file)` in a new process in `folder`, offline, with an empty cache and closed stdin."""
    folder.mkdir()
    job_file, report = folder / "job.json", folder / "report.pt"
    job_file.write_text(json.dumps({**job, "report": str(report)}))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "HF_MODULES_CACHE": str(folder / "modules")}
    code = f"{inspect.getsource(function)}\n{function.__name__}({str(job_file)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(report)


def make_handler(folder: Path):
    """As the server does: the file under this name, with its folder first on the path."""
    spec = importlib.util.spec_from_file_location("handler.EndpointHandler", folder / "handler.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setitem(sys.modules, "handler.EndpointHandler", module)
        spec.loader.exec_module(module)
        return module.EndpointHandler(str(folder)), module


def requirements(name: str) -> dict[str, Requirement]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith(("#", "-r"))]
    return {requirement.name: requirement for requirement in found}
