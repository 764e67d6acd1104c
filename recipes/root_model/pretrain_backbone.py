"""Make a backbone from nothing: a BPE tokenizer and a Qwen2-shaped causal LM, from text files and training pairs.

    python recipes/root_model/pretrain_backbone.py --text 'DATA/text/*.txt.gz' 'DATA/train/*.jsonl.gz' \\
        --output_dir runs/backbone

DATA is described in recipes/DATA.md. Each line of a text file is one document, and so is each distinct text of the
pairs (see gircse/training/pairs.py). The tokenizer is a byte-level BPE trained on the same documents. They are joined
with the end-of-text token and cut into blocks of `--block_size` tokens; every 200th document is held out. With
`--vectors`, a folder of teacher_vectors.py, the backbone starts from a bag of tokens fitted to them (bag_of_tokens.py),
which pretraining leaves as it is. A run that was interrupted goes on from its last checkpoint when the command is
repeated. The folder ends with `pretraining.json`: the command, the held-out loss by tokens seen, and how the model
continues a few beginnings.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

import bag_of_tokens
from teacher_vectors import TeacherTexts, documents

END_OF_TEXT = "<|endoftext|>"
HOLD_OUT_EVERY = 200
# As Qwen2Tokenizer cuts text, which AutoTokenizer takes for a Qwen2 config: words, single digits, signs, white space.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BEGINNINGS = [
    "She opened the door and",
    "Diabetes is a disease in which",
    "In this paper, we propose",
    "What is the capital of",
]


def train_tokenizer(patterns: list[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(documents(patterns), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def token_blocks(
    patterns: list[str], tokenizer: PreTrainedTokenizerFast, size: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out blocks of token ids, each (n, size) uint16 or uint32; documents are shuffled first."""
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    texts = list(documents(patterns))
    held_out, kept = texts[::HOLD_OUT_EVERY], [t for i, t in enumerate(texts) if i % HOLD_OUT_EVERY]
    np.random.default_rng(seed).shuffle(kept)
    blocks = []
    for part in (kept, held_out):
        ids: list[np.ndarray] = []
        for start in range(0, len(part), 4096):
            for row in tokenizer([t + END_OF_TEXT for t in part[start : start + 4096]])["input_ids"]:
                ids.append(np.asarray(row, dtype=dtype))
        stream = np.concatenate(ids)
        blocks.append(stream[: len(stream) // size * size].reshape(-1, size))
    return blocks[0], blocks[1]


class Blocks(torch.utils.data.Dataset):
    def __init__(self, blocks: np.ndarray) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.blocks[index].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


@torch.no_grad()
def continuation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    """24 tokens drawn with nucleus sampling (p 0.9), seed 0."""
    torch.manual_seed(0)
    ids = tokenizer(text, return_tensors="pt")
    out = model.generate(**ids, do_sample=True, top_p=0.9, max_new_tokens=24, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", required=True, help="files or glob patterns: .txt, .jsonl, either .gz")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--vectors", help="folder of teacher_vectors.py; needs as many key/value heads as heads")
    parser.add_argument("--vocab_size", type=int, default=8192)
    parser.add_argument("--hidden_size", type=int, default=384)
    parser.add_argument("--intermediate_size", type=int, default=1024)
    parser.add_argument("--num_layers", type=int, default=6)
    parser.add_argument("--num_heads", type=int, default=6)
    parser.add_argument("--num_key_value_heads", type=int, default=2)
    parser.add_argument("--block_size", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1.5e-3)
    parser.add_argument("--max_steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def make_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A Qwen2-shaped model with random weights; with `--vectors`, its first layer is a bag of tokens, not trained."""
    torch.manual_seed(args.seed)
    model = AutoModelForCausalLM.from_config(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=args.hidden_size,
            intermediate_size=args.intermediate_size,
            num_hidden_layers=args.num_layers,
            num_attention_heads=args.num_heads,
            num_key_value_heads=args.num_key_value_heads,
            max_position_embeddings=2 * args.block_size,
            tie_word_embeddings=not args.vectors,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    if args.vectors:
        teacher = TeacherTexts(args.vectors)
        vectors = torch.from_numpy(np.array(teacher.vectors))
        bag_of_tokens.check(model.config, vectors.shape[1])  # before the minutes that fitting takes
        for parameter in bag_of_tokens.install(bag_of_tokens.fit(teacher.texts, vectors, tokenizer), model):
            parameter.requires_grad = False
    return model


def training_arguments(args: argparse.Namespace) -> TrainingArguments:
    return TrainingArguments(
        output_dir=args.output_dir,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=100,
        weight_decay=0.1,
        adam_beta2=0.95,
        max_steps=args.max_steps,
        bf16=True,
        torch_compile=True,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=50,
        eval_strategy="steps",
        eval_steps=200,
        save_steps=200,
        save_total_limit=1,
        report_to="none",
        seed=args.seed,
    )


def main() -> None:
    args = parse_args()
    output = Path(args.output_dir)
    if (output / "tokenizer.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(output)
    else:
        tokenizer = train_tokenizer(args.text, args.vocab_size, args.block_size)
        tokenizer.save_pretrained(output)
    train, held_out = token_blocks(args.text, tokenizer, args.block_size, args.seed)
    print(f"{train.size:,} training tokens, {held_out.size:,} held-out tokens, vocabulary {len(tokenizer):,}")
    model = make_model(args, tokenizer)
    print(f"{model.num_parameters():,} parameters")
    datasets = {"train_dataset": Blocks(train), "eval_dataset": Blocks(held_out)}
    trainer = Trainer(model, training_arguments(args), **datasets)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(output)))
    model.to(torch.bfloat16).save_pretrained(output)
    tokens_a_step = args.batch_size * args.block_size
    report = {
        "command": shlex.join(["python", *sys.argv]),
        "parameters": model.num_parameters(),
        "training_tokens": train.size,
        "held_out_tokens": held_out.size,
        "held_out_loss": [
            {"tokens_seen": row["step"] * tokens_a_step, "nats_per_token": round(row["eval_loss"], 4)}
            for row in trainer.state.log_history
            if "eval_loss" in row
        ],
        "continuations": {text: continuation(model, tokenizer, text) for text in BEGINNINGS},
    }
    (output / "pretraining.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
