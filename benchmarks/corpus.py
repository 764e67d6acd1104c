"""A corpus of mixed lengths end to end through Sentence Transformers: texts a second and wasted padding.

    python benchmarks/corpus.py --output benchmarks/results

The root model and its backbone as Causal-EOS, both through `SentenceTransformer.encode`, which sorts by length, and a
plain loop over `generate_embedding` in the order of the corpus. Texts are made up of random words; their lengths follow
those of the documents of three retrieval sets (MedQuAD, SciTLDR and XQuAD; quantiles below, in the root's tokens).
Ratios are medians over rounds in which the routes take turns.
"""

from __future__ import annotations

import random
import statistics

import torch
from sentence_transformers import SentenceTransformer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from common import CAUSAL_EOS, DEVICE, ROOT, Table, in_turns, load_root, parser, ratio, variant

# Tokens of a document at 0 %, 5 %, ..., 100 %.
QUANTILES = [15, 68, 95, 123, 146, 166, 185, 201, 216, 231, 245, 258, 270, 281, 289, 298, 308, 317, 333, 365, 851]


def corpus(tokenizer, size: int) -> list[str]:
    """Texts of random words of one token each."""
    draw = random.Random(0)
    words = [word for word in tokenizer.convert_ids_to_tokens(range(1000, 8000)) if word.startswith("Ġ")]
    lengths = [draw.uniform(*QUANTILES[place : place + 2]) for place in draw.choices(range(20), k=size)]
    return ["".join(draw.choices(words, k=int(n))).replace("Ġ", " ") for n in lengths]


def main() -> None:
    options = parser(__doc__, rounds=3)
    options.add_argument("--texts", type=int, default=512)
    options.add_argument("--batch_size", type=int, default=32)
    options.add_argument("--steps", type=int, nargs="+", default=[1, 5, 20])
    args = options.parse_args()

    gircse, processor = load_root()
    texts = corpus(processor.tokenizer, args.texts)
    module = get_class_from_dynamic_module("sentence_gircse.SentenceGircse", str(ROOT))

    def sentence_transformer(model) -> SentenceTransformer:
        return SentenceTransformer(modules=[module(model.eval(), processor)], device=DEVICE)

    ours, eos = sentence_transformer(gircse), sentence_transformer(variant(gircse, **CAUSAL_EOS))

    def naive(k: int) -> None:
        for start in range(0, len(texts), args.batch_size):
            inputs = processor(texts[start : start + args.batch_size]).to(DEVICE)
            gircse.generate_embedding(**inputs, k=k).cpu()

    routes = {"eos": lambda: eos.encode(texts, batch_size=args.batch_size)}
    for k in args.steps:
        routes[f"sorted {k}"] = lambda k=k: ours.encode(texts, batch_size=args.batch_size, k=k)
        routes[f"naive {k}"] = lambda k=k: naive(k)

    def wasted(route: str) -> float:
        """The share of padding among the token ids that the model is given."""
        counts = torch.zeros(2)

        def count(module, args, kwargs) -> None:
            mask = args[1] if len(args) > 1 else kwargs["attention_mask"]
            counts.add_(torch.tensor([(mask == 0).sum(), mask.numel()]))

        hooks = [m.register_forward_pre_hook(count, with_kwargs=True) for m in (gircse, eos[0].model)]
        routes[route]()
        for hook in hooks:
            hook.remove()
        return float(counts[0] / counts[1])

    times = in_turns(routes, args.rounds)
    table = Table(
        route="{}", k="{}", texts_per_second="{:.1f}", padding="{:.1%}", over_causal_eos="{:.2f}x", over_naive="{:.2f}x"
    )
    for route in routes:
        name, _, k = route.partition(" ")
        names = {"eos": "Causal-EOS", "sorted": "GIRCSE", "naive": "GIRCSE, naive loop"}
        table.add(
            route=names[name],
            k=k or None,
            texts_per_second=len(texts) / statistics.median(times[route]),
            padding=wasted(route),
            over_causal_eos=ratio(times, route, "eos"),
            over_naive=ratio(times, route, f"naive {k}") if k else None,
        )
    table.save(args.output)


if __name__ == "__main__":
    main()
