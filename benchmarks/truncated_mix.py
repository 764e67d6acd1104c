"""Would it pay to mix only the m most probable tokens into each soft token? Not an option of the model: tried here.

    python benchmarks/truncated_mix.py --data stsb_dev.jsonl.gz --output benchmarks/results

With m tokens, renormalised, the product of probabilities and embedding matrix becomes a small gather. Time: whole calls
on Qwen2.5-0.5B's shape with random weights, over the exact mix, medians over rounds in which the routes take turns.
Quality: the root model, cosine to the exact embedding (mean and smallest) and Spearman's correlation x 100 on `--data`,
lines of `{"sentence1", "sentence2", "score"}`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pandas
import torch

from common import DEVICE, ROOT, Table, build, in_turns, load_root, parser, ratio

sys.path.insert(0, str(ROOT / "recipes"))
from sts_spearman import INSTRUCTION


@contextmanager
def truncated(model_class: type, m: int | None) -> Iterator[None]:
    def next_token(self, state):
        probabilities = torch.softmax(self._scores(self.get_output_embeddings()(state)), dim=-1)
        values, ids = probabilities.topk(m, sorted=False)  # (B, m)
        values = values / values.sum(-1, keepdim=True)
        embeddings = self.get_input_embeddings()(ids)  # (B, m, d)
        return probabilities, (values.to(embeddings.dtype)[:, None] @ embeddings)[:, 0]

    if m is None:
        yield
    else:
        with mock.patch.object(model_class, "_next_token", next_token):
            yield


def main() -> None:
    options = parser(__doc__, rounds=5)
    options.add_argument("--data", required=True)
    options.add_argument("--sizes", type=int, nargs="+", default=[16, 64, 256, 1024])
    options.add_argument("--k", type=int, default=20)
    options.add_argument("--batch_size", type=int, default=8)
    options.add_argument("--length", type=int, default=32)
    args = options.parse_args()

    model = build("qwen2.5-0.5b")
    ids = torch.randint(1000, 8000, (args.batch_size, args.length), device=DEVICE)

    def timed(m: int | None) -> None:
        with truncated(type(model), m):
            model.generate_embedding(ids, k=args.k)

    sizes = [None, *args.sizes]
    times = in_turns({m: lambda m=m: timed(m) for m in sizes}, args.rounds)

    root, processor = load_root()
    data = pandas.read_json(args.data, lines=True)
    texts = sorted([*data["sentence1"], *data["sentence2"]], key=len)
    place = {text: index for index, text in enumerate(texts)}

    def embed(m: int | None) -> torch.Tensor:
        with truncated(type(root), m):
            parts = [processor(texts[i : i + 64], instruction=INSTRUCTION) for i in range(0, len(texts), 64)]
            return torch.cat([root.generate_embedding(**part.to(DEVICE), k=args.k).cpu() for part in parts])

    exact = embed(None)
    table = Table(m="{}", time="{:.3f}x", mean_cosine="{:.5f}", least_cosine="{:.5f}", spearman="{:.2f}")
    for m in sizes:
        found = embed(m)
        left, right = (found[[place[text] for text in data[side]]] for side in ("sentence1", "sentence2"))
        cosines = (found * exact).sum(-1)
        table.add(
            m=m or "all",
            time=ratio(times, m, None),
            mean_cosine=float(cosines.mean()),
            least_cosine=float(cosines.min()),
            spearman=100 * pandas.Series((left * right).sum(-1).tolist()).rank().corr(data["score"].rank()),
        )
    table.save(args.output, x="m", y=["time", "mean_cosine"], label="over the exact mix")


if __name__ == "__main__":
    main()
