"""Teach a causal LM, as a GIRCSE model, the embeddings that a stronger encoder has for plain texts.

    python recipes/root_model/distil.py --model_name_or_path runs/backbone --vectors runs/aligned --max_steps 2000 \\
        --output_dir runs/distilled

`--vectors` is a folder of teacher_vectors.py or align_vectors.py, with vectors of the backbone's hidden size. The loss
is 1 - cos(z_K, vector), mean over the texts. K is drawn anew for each batch, so that an embedding is good after any
number of steps (in a mean over z_1..z_K, the last of 20 would weigh a twentieth of the first); so is whether its texts
go bare or under an instruction. Instructions are drawn from the many that ship with the model: where a model has seen
few, the words of any other one change the embedding as if they were part of the text. A run that was interrupted goes
on from its last checkpoint when the command is repeated.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_pt_utils import LengthGroupedSampler

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from gircse.loading import load
from gircse.training.publishing import export
from gircse.training.trainer import ATTENTION_KERNELS
from graphs import GraphedLoop
from teacher_vectors import TeacherTexts
from train_gircse import last_checkpoint, state_of

SIMILAR = "Retrieve semantically similar text."
# The instructions that write_prompts.py gives the model. Those that begin with "Classify" are left out: they ask for
# one aspect of a text, such as its sentiment, where the teacher's vector holds its whole meaning. Three that ask for an
# intent or a scenario in other words stay.
SHIPPED = json.loads(Path(__file__).with_name("instructions.json").read_text(encoding="utf-8"))["mteb"].values()
INSTRUCTIONS = sorted({text for text in SHIPPED if not text.startswith("Classify")})
# 5 is what the root model takes where nobody asks for another number. Evaluations go to 20, but a batch with 20 steps
# takes three times as long as one with 5, and 20 are nearly as good as 5 after training with 5 alone
# (results/lengths.json). Fewer are left to ICR, which trains every one.
STEPS = (5, 5, 5, 10)


def distillation_loss(embeddings: Tensor, vectors: Tensor) -> Tensor:
    """Mean of 1 - cos over texts: (): float32.

    Args:
        embeddings: (B, d), z_K, unit norm.
        vectors: (B, d), the teacher's, unit norm.
    """
    return 1 - (embeddings.float() * vectors.float()).sum(-1).mean()


def draw_steps(inputs: dict[str, Tensor], steps: Sequence[int], most_tokens: int) -> int:
    """K for a batch; of more than `most_tokens` it is the smallest, since each step keeps a copy of its KV cache for
    the way back."""
    return random.choice(steps) if inputs["input_ids"].numel() <= most_tokens else min(steps)


def embed(model: Any, inputs: dict[str, Tensor], args: argparse.Namespace, loop: GraphedLoop | None) -> Tensor:
    """z_K, (B, d), after a number of steps drawn for the batch; by graphs if there is a loop of them."""
    k = draw_steps(inputs, args.steps, args.most_tokens)
    if loop is None:
        with sdpa_kernel(ATTENTION_KERNELS):
            return model(**inputs, k=k).embeddings
    return loop(**inputs, k=k, rows=args.batch_size)[:, -1]


class TeacherCollator:
    """Texts and vectors to the inputs of one step, under an instruction drawn for the batch."""

    def __init__(self, processor: Any, max_length: int) -> None:
        self.processor, self.max_length = processor, max_length

    def __call__(self, rows: Sequence[tuple[str, Tensor]]) -> dict[str, Tensor]:
        texts, vectors = zip(*rows, strict=True)
        instruction = random.choice([None, None, SIMILAR, *random.choices(INSTRUCTIONS, k=2)])
        inputs = self.processor(list(texts), instruction=instruction, max_length=self.max_length)
        return {**inputs, "vectors": torch.stack(vectors)}


def teacher_loader(texts: TeacherTexts, processor: Any, batch_size: int, max_length: int, seed: int) -> Any:
    """Batches of texts of like length; each text once an epoch, in another order each time.

    Raises:
        ValueError: there are fewer texts than a batch has.
    """
    if len(texts) < batch_size:
        raise ValueError(f"batch_size={batch_size}, but there are {len(texts)} texts with vectors: lower it")
    order = torch.Generator().manual_seed(seed)
    sampler = LengthGroupedSampler(batch_size, lengths=list(map(len, texts.texts)), generator=order)
    collator = TeacherCollator(processor, max_length)
    workers = 2 if torch.cuda.is_available() else 0  # a GPU would wait for the tokenizer
    return torch.utils.data.DataLoader(
        texts, batch_size, sampler=sampler, collate_fn=collator, drop_last=True, num_workers=workers
    )


def pass_over(loader: Any, steps: int) -> None:
    """Draws the orders of the whole epochs in so many steps, as those of later epochs follow from them."""
    for _ in range(steps // len(loader)):
        list(loader.sampler)


class DistillingTrainer(Trainer):
    def __init__(self, *args: Any, loader: Any, settings: argparse.Namespace, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loader, self.settings = loader, settings
        self.loop = GraphedLoop(self.model, settings.graph_lengths) if settings.graph_lengths else None

    def get_train_dataloader(self) -> Any:
        return self.accelerator.prepare(self.loader)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # Trainer's estimate knows token batches only

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any) -> Tensor:
        vectors = inputs.pop("vectors")
        return distillation_loss(embed(model, inputs, self.settings, self.loop), vectors)


def add_arguments(parser: argparse.ArgumentParser, batch_size: str) -> None:
    """Those of the teacher's batches; `batch_size` names the option for their size."""
    add = parser.add_argument
    add("--vectors", required=True, help="folder of teacher_vectors.py or align_vectors.py")
    add(batch_size, dest="batch_size", type=int, default=32, help="texts a step that the teacher knows")
    add("--steps", type=int, nargs="+", default=STEPS, help="K of a batch is drawn from these")
    most = "of a batch with more than the fewest steps, padding included, as memory allows"
    add("--most_tokens", type=int, default=2048, help=most)
    add("--graph_lengths", type=int, nargs="*", help="on a GPU: lengths of texts for which CUDA graphs are made (none)")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="a causal LM or a GIRCSE model")
    add_arguments(parser, "--batch_size")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--logit_temperature", type=float, help="T of a new model's soft tokens (2)")
    parser.add_argument("--num_steps", type=int, help="K at inference of a new model (20)")
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--max_length", type=int, default=128, help="longest text in tokens")
    parser.add_argument("--attn_implementation", help="eager is faster than SDPA on a CPU (benchmarks/attention.py)")
    parser.add_argument("--max_steps", type=int, required=True)
    parser.add_argument("--save_steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def training_arguments(args: argparse.Namespace) -> TrainingArguments:
    return TrainingArguments(
        output_dir=args.output_dir,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=args.max_steps // 20,
        weight_decay=0.01,
        max_steps=args.max_steps,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=20,
        save_steps=args.save_steps,
        save_total_limit=1,
        report_to="none",
        remove_unused_columns=False,
        seed=args.seed,
    )


def main() -> None:
    args = parse_args()
    set_seed(args.seed)
    axes = {"logit_temperature": args.logit_temperature, "num_steps": args.num_steps}
    model, processor = load(args.model_name_or_path, attn_implementation=args.attn_implementation, **axes)
    texts = TeacherTexts(args.vectors)
    if texts.vectors.shape[1] != model.config.hidden_size:
        raise ValueError(
            f"vectors of {texts.vectors.shape[1]} dimensions, but the model has {model.config.hidden_size}"
        )
    loader = teacher_loader(texts, processor, args.batch_size, args.max_length, args.seed)
    trainer = DistillingTrainer(model, training_arguments(args), train_dataset=texts, loader=loader, settings=args)
    checkpoint = last_checkpoint(Path(args.output_dir))
    if checkpoint:
        pass_over(loader, state_of(checkpoint)["global_step"])
    trainer.train(resume_from_checkpoint=checkpoint)
    export(model, processor, args.output_dir)


if __name__ == "__main__":
    main()
