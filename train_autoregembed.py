"""Train the encoder of AutoRegEmbed (arXiv 2502.11401), in two stages, and save or publish it as a Hub repo.

    python train_autoregembed.py --stage compression --model_name_or_path LM --train_data answers.jsonl --output_dir one
    python train_autoregembed.py --stage alignment --decoder LM --model_name_or_path one --train_data nli.jsonl \\
        --output_dir two

The encoder appends K learned tokens to a text and averages their last states. In the first stage a frozen causal LM,
the decoder, has to say a row's positive from the states of its query: an answer to the question, or whatever else the
row's instruction asks of its text. In the second one, on pairs with one hard negative each, a query has to be as good a
start for its positive as the positive itself, and a better one than the negative. Scores of the model before this
stage, which its loss takes in, are kept in the output folder.

All other arguments are those of train_gircse.py. Their defaults here are the paper's: 5 learned tokens, batches of 32,
a cosine schedule, and for the stages rates of 1e-5 and 5e-6, 1 epoch and 4.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import train_gircse
from gircse.loading import is_gircse
from gircse.training.autoregembed import AlignmentTrainer, CompressionTrainer, ConditionalTrainer

STAGES = {"compression": CompressionTrainer, "alignment": AlignmentTrainer}
DEFAULTS = {
    "compression": "--learning_rate 1e-5 --num_train_epochs 1",
    "alignment": "--learning_rate 5e-6 --num_train_epochs 4",
}
SHARED = (
    "--step_token learned --num_steps 5 --k 5 --per_device_train_batch_size 32 --lr_scheduler_type cosine "
    "--warmup_ratio 0.05"
)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--stage", choices=STAGES, required=True)
    parser.add_argument("--model_name_or_path", required=True, help="the causal LM, or what the first stage has made")
    parser.add_argument("--decoder", help="the causal LM (the model, if it is one)")
    parser.add_argument("--target_length", type=int, default=128, help="most tokens that the decoder says (128)")
    parser.add_argument("--beta", type=float, default=0.1, help="of the alignment (0.1)")
    parser.add_argument("--tau", type=float, default=0.1, help="of the alignment (0.1)")
    sign = "of the reference term: 1 as in the authors' code, -1 as in DPO (1)"
    parser.add_argument("--reference_sign", type=int, choices=[1, -1], default=1, help=sign)
    options, rest = parser.parse_known_args(argv)
    name = options.decoder or options.model_name_or_path
    if is_gircse(name):
        parser.error(f"--decoder must be the causal LM that {name} was made from; {name} is a GIRCSE model")
    if options.target_length < 2:
        parser.error(f"--target_length {options.target_length} must be at least 2, a token and the end")
    settings: dict[str, Any] = {"target_length": options.target_length}
    if options.stage == "alignment":
        settings |= {"beta": options.beta, "tau": options.tau, "reference_sign": options.reference_sign}
    given = [*SHARED.split(), *DEFAULTS[options.stage].split(), *rest]
    trainer = partial(STAGES[options.stage], **settings)
    train_gircse.main(
        [*given, "--model_name_or_path", options.model_name_or_path], partial(with_decoder, trainer, name)
    )


def with_decoder(make_trainer: Any, name: str, model: Any, *args: Any, **kwargs: Any) -> ConditionalTrainer:
    """The trainer with its decoder.

    Raises:
        ValueError: the decoder's states are not of the model's size, or its vocabulary is another.
    """
    decoder: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, torch_dtype=torch.float32)
    config = (model.get_base_model() if hasattr(model, "get_base_model") else model).config
    sizes = {"hidden_size": config.hidden_size, "vocab_size": config.text_config.vocab_size}
    for what, size in sizes.items():
        found = getattr(decoder.config.get_text_config(), what)
        if found != size:
            raise ValueError(
                f"decoder={name!r} has {what} {found}, the model {size}: give the LM that it was made from"
            )
    return make_trainer(model, *args, decoder=decoder, **kwargs)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
