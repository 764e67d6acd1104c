"""Train the encoder of AutoRegEmbed (arXiv 2502.11401), in two stages, and save or publish it as a Hub repo.

    python train_autoregembed.py --stage compression --model_name_or_path LM --train_data answers.jsonl --output_dir one
    python train_autoregembed.py --stage alignment --decoder LM --model_name_or_path one --train_data nli.jsonl \\
        --output_dir two

The encoder appends K learned tokens to a text and averages their last states. In the first stage a frozen causal LM,
the decoder, has to say a row's positive from the states of its query: an answer to the question, or whatever else the
row's instruction asks of its text. In the second one, on pairs with one hard negative each, a query has to be as good a
start for its positive as the positive itself, and a better one than the negative. Scores of the model before this
stage, which its loss takes in, are kept in the output folder.

All other arguments are those of train_gircse.py. Their defaults here are the paper's: all weights, 5 learned tokens,
batches of 32, a cosine schedule, and for the stages rates of 1e-5 and 5e-6, 1 epoch and 4. The rate of a LoRA
(--tuning lora), which the paper doesn't train, is that of train_gircse.py.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

import train_gircse
from gircse.loading import base_of, dtype_argument, is_gircse, only_gguf_file, whole_weights
from gircse.training.autoregembed import AlignmentTrainer, CompressionTrainer, ConditionalTrainer

STAGES = {"compression": CompressionTrainer, "alignment": AlignmentTrainer}
SHARED = "--k 5 --per_device_train_batch_size 32 --lr_scheduler_type cosine --warmup_ratio 0.05"
EPOCHS = {"compression": "1", "alignment": "4"}
RATES = {"compression": "1e-5", "alignment": "5e-6"}  # of all weights
OF_ALIGNMENT = ("beta", "tau", "reference_sign")


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The arguments of this command, and those of train_gircse.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--stage", choices=STAGES, required=True)
    parser.add_argument("--model_name_or_path", required=True, help="the causal LM, or what the first stage has made")
    parser.add_argument("--decoder", help="the causal LM (the model, if it is one)")
    tokens = "of a new model: learned, or soft or hard (learned)"
    parser.add_argument("--step_token", choices=["learned", "soft", "hard"], help=tokens)
    parser.add_argument("--tuning", choices=["full", "lora"], default="full", help="full for all weights (full)")
    parser.add_argument("--target_length", type=int, default=128, help="most tokens that the decoder says (128)")
    parser.add_argument("--beta", type=float, help="of the alignment (0.1)")
    parser.add_argument("--tau", type=float, help="of the alignment (0.1)")
    sign = "of the reference term: 1 as in the authors' code, -1 as in DPO (1)"
    parser.add_argument("--reference_sign", type=int, choices=[1, -1], help=sign)
    options, rest = parser.parse_known_args(argv)
    found = ["--gguf_file"] if only_gguf_file(options.model_name_or_path) else []
    merged = sorted({"--adapter", "--gguf_file"} & {argument.partition("=")[0] for argument in rest + found})
    if merged and not options.decoder:
        parser.error(f"{', '.join(merged)} needs --decoder too: the folder or id of the causal LM that is to say texts")
    if options.target_length < 2:
        parser.error(f"--target_length {options.target_length} must be at least 2, a token and the end")
    given = [name for name in OF_ALIGNMENT if getattr(options, name) is not None]
    if given and options.stage != "alignment":
        parser.error(f"--{', --'.join(given)} without effect: leave it out, or choose --stage alignment")
    options.decoder = options.decoder or options.model_name_or_path
    if is_gircse(options.decoder):
        parser.error(f"--decoder must be the causal LM that {options.decoder} was made from: it is a GIRCSE model")
    return options, rest


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    options, rest = parse(argv)
    settings = {name: value for name in OF_ALIGNMENT if (value := getattr(options, name)) is not None}
    trainer = partial(STAGES[options.stage], target_length=options.target_length, **settings)
    given = [*SHARED.split(), "--num_train_epochs", EPOCHS[options.stage], "--tuning", options.tuning]
    given += ["--learning_rate", RATES[options.stage]] if options.tuning == "full" else []
    new = only_gguf_file(options.model_name_or_path) or not is_gircse(options.model_name_or_path)
    if step_token := options.step_token or ("learned" if new else None):
        given += ["--step_token", step_token]
    given += ["--num_steps", "5"] if new and step_token == "learned" else []
    given += [*rest, "--model_name_or_path", options.model_name_or_path]
    train_gircse.main(given, partial(with_decoder, trainer, options.decoder))


def with_decoder(make_trainer: Any, name: str, model: Any, *args: Any, **kwargs: Any) -> ConditionalTrainer:
    """The trainer with its decoder.

    Raises:
        ValueError: the decoder's states are not of the model's size, or its vocabulary is another.
    """
    base = base_of(model)
    with whole_weights():
        decoder: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, **dtype_argument(base.dtype))
    tables = [m.get_input_embeddings().weight for m in (decoder, base)]  # which the decoder reads, and states replace
    of_decoder, of_model = (f"{table.shape[0]:,} tokens of {table.shape[1]:,} dimensions" for table in tables)
    if of_decoder != of_model:
        remedy = "give the LM that it was made from"
        raise ValueError(f"decoder={name!r} embeds {of_decoder}, the model {of_model}: {remedy}")
    return make_trainer(model, *args, decoder=decoder, **kwargs)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
