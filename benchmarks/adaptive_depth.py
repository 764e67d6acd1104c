"""Adaptive depth: the steps and the time that `tolerance` saves, at which quality.

    python benchmarks/adaptive_depth.py --choose_on stsb_dev.jsonl.gz --report_on stsb_test.jsonl.gz

The root model. Lines of the files are `{"sentence1", "sentence2", "score"}`; the score is Spearman's correlation x 100
with the cosine. The tolerance is chosen on the first file, as the largest that stays within 0.2 points of all steps
there, and reported on the second. Texts go sorted by length; times are medians over rounds in which routes take turns.
"""

from __future__ import annotations

import pandas
import torch

from common import DEVICE, Table, in_turns, load_root, parser, ratio

INSTRUCTION = "Retrieve semantically similar text."


def main() -> None:
    options = parser(__doc__, rounds=3)
    options.add_argument("--choose_on", required=True)
    options.add_argument("--report_on", required=True)
    options.add_argument("--tolerances", type=float, nargs="+", default=[3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4])
    options.add_argument("--k", type=int, default=20)
    options.add_argument("--batch_size", type=int, default=64)
    args = options.parse_args()

    model, processor = load_root()

    def embed(texts: list[str], tolerance: float | None) -> tuple[torch.Tensor, torch.Tensor]:
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        embeddings = torch.zeros(len(texts), model.config.hidden_size)
        steps = torch.full((len(texts),), args.k)
        for start in range(0, len(order), args.batch_size):
            rows = order[start : start + args.batch_size]
            inputs = processor([texts[i] for i in rows], instruction=INSTRUCTION).to(DEVICE)
            found = model.generate_embedding(**inputs, k=args.k, tolerance=tolerance)
            embeddings[rows], used = (found.cpu(), None) if tolerance is None else (found[0].cpu(), found[1].cpu())
            steps[rows] = steps[rows] if used is None else used
        return embeddings, steps

    def quality(path: str, tolerance: float | None) -> tuple[float, torch.Tensor]:
        data = pandas.read_json(path, lines=True)
        embeddings, steps = embed([*data["sentence1"], *data["sentence2"]], tolerance)
        cosines = (embeddings[: len(data)] * embeddings[len(data) :]).sum(-1)
        return 100 * pandas.Series(cosines.tolist()).rank().corr(data["score"].rank()), steps

    data = pandas.read_json(args.report_on, lines=True)
    texts = [*data["sentence1"], *data["sentence2"]]
    routes = {t: lambda t=t: embed(texts, t) for t in (None, *args.tolerances)}
    times = in_turns(routes, args.rounds)
    full = quality(args.choose_on, None)[0]
    table = Table(
        tolerance="{:g}",
        chosen="{}",
        choose_on="{:.2f}",
        report_on="{:.2f}",
        mean_steps="{:.2f}",
        most_steps="{}",
        time="{:.2f}x",
    )
    chosen = False
    for tolerance in sorted(args.tolerances, reverse=True) + [None]:
        on_choice = quality(args.choose_on, tolerance)[0]
        score, steps = quality(args.report_on, tolerance)
        fits = not chosen and tolerance is not None and on_choice >= full - 0.2
        chosen |= fits
        table.add(
            tolerance=tolerance,
            chosen="chosen" if fits else "",
            choose_on=on_choice,
            report_on=score,
            mean_steps=float(steps.float().mean()),
            most_steps=int(steps.max()),
            time=ratio(times, tolerance, None),
        )
    table.save(args.output)


if __name__ == "__main__":
    main()
