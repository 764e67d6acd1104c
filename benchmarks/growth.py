"""How time and memory grow with the text length N, the steps k, the batch and the corpus: fitted exponents.

    python benchmarks/growth.py --output benchmarks/results

The root model at k = 5, one of the four varied at a time. An exponent is the slope of log time (or of log memory beyond
the weights) over log size, by least squares: 1 is linear. Times are medians over rounds in which sizes take turns.
"""

from __future__ import annotations

import statistics

import torch

from common import DEVICE, Table, build, in_turns, parser, peak_bytes

SIZES = {
    "N": [60, 120, 240, 480],
    "k": [5, 10, 20, 40],
    "batch": [8, 16, 32, 64],
    "corpus": [128, 256, 512, 1024],
}


def slope(sizes: list[int], values: list[float]) -> float:
    x, y = torch.tensor(sizes).double().log(), torch.tensor(values).double().log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def main() -> None:
    args = parser(__doc__).parse_args()
    model = build("root")
    weights = sum(p.numel() * p.element_size() for p in model.parameters())

    def encode(N: int = 60, k: int = 5, batch: int = 16, corpus: int | None = None) -> None:
        for _ in range(-(-(corpus or batch) // batch)):
            model.generate_embedding(torch.randint(1000, 8000, (batch, N), device=DEVICE), k=k)

    table = Table(
        what="{}",
        sizes="{}",
        seconds="{}",
        time_exponent="{:.2f}",
        MB_beyond_the_weights="{}",
        memory_exponent="{:.2f}",
    )
    for what, sizes in SIZES.items():
        routes = {size: lambda size=size, what=what: encode(**{what: size}) for size in sizes}
        times = [statistics.median(column) for column in in_turns(routes, args.rounds).values()]
        peaks = [peak_bytes(route, model) - weights for route in routes.values()]
        table.add(
            what=what,
            sizes=sizes,
            seconds=[round(value, 4) for value in times],
            time_exponent=slope(sizes, times),
            MB_beyond_the_weights=[round(peak / 1e6, 1) for peak in peaks],
            memory_exponent=slope(sizes, peaks),
        )
    table.save(args.output)


if __name__ == "__main__":
    main()
