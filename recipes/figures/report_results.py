"""Write the tables of README.md and docs/ and draw the pictures, from results/ and benchmarks/results/.

    python recipes/figures/report_results.py

Replaces what stands between `<!-- table NAME -->` and `<!-- end -->`, the `model-index` at the end of the card's
metadata, and the pictures in assets/.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from gircse.evaluation import report
from recipes.figures import speed_tables

ROOT = Path(__file__).resolve().parents[2]
RESULTS, ASSETS = ROOT / "results", ROOT / "assets"
CHOSEN_ON = "sts_stsbenchmark_dev"  # settings were fitted to it: in no mean
NAMES = {
    "causal_eos": "Causal-EOS",
    "bidirectional_avg": "Bidirectional-Avg",
    "gircse": "GIRCSE",
    "last_step": "generation, loss on the last step",
    "no_refinement": "+ loss on every step",
    "mean": "steps averaged",
    "mixed_steps": "mixed steps",
    "causal_avg": "no generation, mean of the text's states",
    "causal_eos_generating": "Causal-EOS made to generate",
}
COMPARED = [(NAMES[method], method, None) for method in ("causal_eos", "bidirectional_avg")]
COMPARED += [(f"GIRCSE, k = {k}", "gircse", k) for k in (1, 5, 20)]
STARTS = [(f"GIRCSE, end token, k = {k}", "gircse_end_token", k) for k in (1, 5, 20)]
STARTS += [(f"{name}, long warm-up", f"{method}_long_warm_up", k) for name, method, k in COMPARED]
STABLE = {
    "paper": "paper's prompt, T = 1, LoRA at 1e-4",
    "papers_prompt": "paper's prompt, T = 2",
    "end_token": "paper's prompt, then the end token, T = 2",
    "t1": "T = 1",
    "t1_warm_up": "T = 1, warm-up of 50 steps for 10",
    "gradient_0.1": "T = 1, a tenth of d<sub>k</sub>'s gradient",
    "t2": "T = 2",
    "t4": "T = 4",
    "t_learned": "T trained, from 2",
    "lora_1e-4": "T = 2, LoRA at 1e-4",
    "lora": "T = 2, LoRA at 2e-4",
    "lora_5e-4": "T = 2, LoRA at 5e-4",
    "causal_eos": "Causal-EOS",
}
UNEQUAL = {
    "gircse": "GIRCSE, 20k samples",
    "mixed_steps": "the same, mixed steps",
    "small_model": "a distilled model of 20 M parameters",
    "root": "root model",
}
COLORS = {"gircse": "tab:green", "causal_eos": "tab:blue", "bidirectional_avg": "tab:orange"}
STEPS = [1, 3, 5, 10, 15, 20]
ALL = "All tasks"
# A task of each kind that no training pair comes from, for the card's metadata, at the k of the root's configuration.
SHOWN = ("sickr", "mrpc", "hwu64_intent", "stackoverflow", "xquad", "scenario_action-scenario")
SHOWN_K = 5


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def scored(name: str) -> dict:
    """A model's results. Tasks of which a sample of the rows was evaluated, in a file of their own, say so."""
    found, file = read(RESULTS / f"{name}.json"), RESULTS / f"{name}_sampled.json"
    if not file.exists():
        return found
    sampled, rows = read(file), {row["task"]: row for row in found["tasks"]}
    rows |= {row["task"]: {**row, "sample": sampled["settings"]["sample"]} for row in sampled["tasks"]}
    return {**found, "tasks": list(rows.values())}


def group_means(rows: list[dict], k: int | None) -> dict[str, float]:
    """Group of tasks to the mean of its scores, and of all tasks. A model without steps has one column, which holds for
    every k."""
    means = report.means(unseen(rows))
    return {name.partition(" (")[0]: scores.get("None", scores.get(str(k))) for name, scores in means.items()}


def unseen(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["task"] != CHOSEN_ON]


def experiments() -> list[dict]:
    paths = sorted((RESULTS / "experiments").glob("*-seed*.json"))
    return [read(path) for path in paths]


def runs_of(runs: list[dict], method: str, samples: int, seed: int | None = None) -> list[dict]:
    return [r for r in runs if (r["method"], r["samples"]) == (method, samples) and seed in (None, r["seed"])]


def table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def spread(values: list[float]) -> str:
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def line(name: str, runs: list[dict], k: int | None) -> list[str]:
    means = [group_means(run["tasks"], k) for run in runs]
    return [name, *(spread([found[group] for found in means]) for group in means[0])]


def comparison(runs: list[dict], samples: int, rows: list[tuple[str, str, int | None]]) -> str:
    head = ["", *group_means(runs[0]["tasks"], 1)]
    return table(head, [line(name, runs_of(runs, method, samples), k) for name, method, k in rows])


def comparison_by_task(runs: list[dict], samples: int) -> str:
    found = []
    for _, method, k in COMPARED:
        seeds = [{row["task"]: row["scores"][str(k)] for row in r["tasks"]} for r in runs_of(runs, method, samples)]
        found.append({task: spread([scores[task] for scores in seeds]) for task in seeds[0]})
    rows = sorted(runs[0]["tasks"], key=lambda row: (row["group"], row["task"]))
    lines = [[row["task"], *(column[row["task"]] for column in found)] for row in rows]
    return table(["task", *(name for name, _, _ in COMPARED)], lines)


def learning_rates() -> str:
    """What each method's rate is chosen by (recipes/paper/compare_methods.py)."""
    lines = []
    for method, rates in read(RESULTS / "comparison" / "learning_rates.json").items():
        for rate, found in rates.items():
            row = [f"{float(rate):g}", f"{found['held_out_accuracy']:.1f}", f"{found['sts_dev']:.1f}"]
            lines.append([NAMES[method], *row])
    return table(["method", "learning rate", "held-out accuracy", "STS-Benchmark, development"], lines)


def unequal_steps() -> str:
    """nDCG@10, mean of the retrieval tasks."""
    columns = ("1 in 1", "5 in 5", "20 in 20", "1 in 5", "1 in 20", "20 in 1")
    head = ["k of queries / of documents", *(column.replace("in", "/") for column in columns)]
    head += ["1, then 20", "relevant in shortlist", "documents that any query asks k = 20 of"]
    lines = []
    for path in sorted((RESULTS / "unequal_steps").glob("*.json")):
        tasks = read(path)["tasks"].values()
        values = [mean(task["ndcg_at_10"][column] for task in tasks) for column in columns]
        values.append(mean(task["coarse_to_fine"]["ndcg_at_10"] for task in tasks))
        shares = ("relevant_in_shortlist", "documents_rescored")
        shares = [mean(task["coarse_to_fine"][name] for task in tasks) for name in shares]
        lines.append([UNEQUAL[path.stem], *(f"{v:.1f}" for v in values), *(f"{v:.0f} %" for v in shares)])
    return table(head, lines)


def ablation(runs: list[dict], samples: int) -> str:
    head = ["k = 5", *group_means(runs[0]["tasks"], 1)]
    lines = [line("no generation (Causal-EOS)", runs_of(runs, "causal_eos", samples, 0), None)]
    lines += [line(NAMES[m], runs_of(runs, m, samples, 0), 5) for m in ("causal_avg", "last_step", "no_refinement")]
    lines.append(line("+ refinement penalty (GIRCSE)", runs_of(runs, "gircse", samples, 0), 5))
    lines += [line(f"GIRCSE, {NAMES[m]}", runs_of(runs, m, samples, 0), 5) for m in ("mean", "mixed_steps")]
    return table(head, lines)


def root_by_group(models: dict[str, dict]) -> str:
    root = models["root"]["tasks"]
    columns = {f"k = {k}": group_means(root, k) for k in STEPS}
    columns["MiniLM"] = group_means(models["minilm"]["tasks"], None)
    groups = list(group_means(root, 1))
    head = ["mean of", *columns]
    return table(head, [[group, *(f"{column[group]:.1f}" for column in columns.values())] for group in groups])


def root_by_task(models: dict[str, dict]) -> str:
    minilm = {row["task"]: row["scores"]["None"] for row in models["minilm"]["tasks"]}
    lines = []
    for row in sorted(models["root"]["tasks"], key=lambda row: (row["group"], row["task"])):
        scores = [f"{row['scores'][str(k)]:.1f}" for k in STEPS]
        name = f"{row['task']} ({row['sample']} rows)" if "sample" in row else row["task"]
        lines.append([name, row["metric"], *scores, f"{minilm[row['task']]:.1f}"])
    return table(["task", "metric", *(f"k = {k}" for k in STEPS), "MiniLM"], lines)


def lengths() -> str:
    """What a backbone without some of its layers makes of the same short training."""
    head = ["layers left out", "layers", "held-out accuracy, k = 1 / 5 / 20"]
    head.append("STS-Benchmark, development, k = 1 / 5 / 20")
    lines = []
    for row in read(RESULTS / "lengths.json"):
        cells = [
            " / ".join(f"{row[name][str(k)]:.1f}" for k in (1, 5, 20)) for name in ("held_out_accuracy", "sts_dev")
        ]
        lines.append([row["left_out"].replace(" ", " to "), str(row["layers"]), *cells])
    return table(head, lines)


def stable_start() -> str:
    """Gradients of an untrained backbone."""
    head = ["prompt", "T", "share of d<sub>k</sub>'s gradient", "losses L<sub>1</sub> to L<sub>5</sub>"]
    head += ["norms of their gradients, layers", "norm of the sum's, all weights"]
    lines = []
    for row in read(RESULTS / "stable_training" / "start.json"):
        cells = [row["prompt"], f"{row['temperature']:g}", f"{row['share']:g}"]
        cells += [" ".join(f"{x:.1f}" for x in row["losses"]), " ".join(f"{x:.0f}" for x in row["layers"])]
        lines.append([*cells, f"{row['all_weights']:.0f}"])
    return table(head, lines)


def stable_runs() -> str:
    """What training made of each setting: largest norms, losses, scores at k = 1 / 5 / 20."""
    head = ["chat prompt, all weights at 5e-5, unless said", "largest gradient norm after 10 steps"]
    head += ["mean L<sub>1</sub> and L<sub>5</sub>, last 50 steps"]
    found = {name: read(path) for name in STABLE if (path := RESULTS / "stable_training" / f"{name}.json").exists()}
    head += [f"{task['task'].partition('_')[2]}, k = 1 / 5 / 20" for task in found["t2"]["tasks"]]
    lines = []
    for name, run in found.items():
        last = run["log"][-50:]
        losses = [f"{mean(line[step] for line in last):.2f}" for step in ("L_1", "L_5") if step in last[0]]
        cells = [STABLE[name], f"{max(line['grad_norm'] for line in run['log'][10:]):.0f}", ", ".join(losses)]
        lines.append([*cells, *(" / ".join(f"{x:.1f}" for x in task["scores"].values()) for task in run["tasks"])])
    return table(head, lines)


def stable_default() -> str:
    """The default command on a small budget, by seed."""
    head = [
        "seed",
        "mean L<sub>1</sub>, L<sub>5</sub>, last 12 steps",
        "log of the candidates",
        "largest gradient norm",
    ]
    lines = []
    for path in sorted((RESULTS / "stable_training").glob("default_seed*.json")):
        log = read(path)["log"]
        first, last, chance = (mean(line[name] for line in log[-12:]) for name in ("L_1", "L_5", "log_candidates"))
        largest = max(line["grad_norm"] for line in log)
        lines.append([path.stem[-1], f"{first:.2f}, {last:.2f}", f"{chance:.2f}", f"{largest:.0f}"])
    return table(head, lines)


def curve(rows: list[dict]) -> dict[int, float]:
    """The mean over all tasks by k."""
    return {k: group_means(rows, k)[ALL] for k in map(int, rows[0]["scores"])}


def style(axes, **labels: str) -> None:
    axes.set(**labels)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure, name: str) -> None:
    figure.savefig(ASSETS / name, dpi=160)
    pyplot.close(figure)


def draw_curves(runs: list[dict], samples: int) -> None:
    """Figure 2: GIRCSE against its own k = 1, Causal-EOS made to generate against itself without."""
    figure, axes = pyplot.subplots(figsize=(6.4, 3.4), layout="constrained")
    for run in runs_of(runs, "gircse", samples):
        found = curve(run["tasks"])
        label = "GIRCSE, against k = 1 (a line a seed)" if run["seed"] == 0 else None
        gains = [value - found[1] for value in found.values()]
        axes.plot(list(found), gains, color=COLORS["gircse"], marker="o", markersize=3, label=label)
    plain = group_means(runs_of(runs, "causal_eos", samples, 0)[0]["tasks"], None)[ALL]
    found = curve(runs_of(runs, "causal_eos_generating", samples, 0)[0]["tasks"])
    label = "Causal-EOS made to generate, against no generation"
    gains = [value - plain for value in found.values()]
    axes.plot(list(found), gains, color=COLORS["causal_eos"], marker="o", markersize=3, label=label)
    axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    axes.axvspan(5.5, 20.5, color="0.95", zorder=0)
    axes.set_xticks(STEPS)
    style(axes, xlabel="k, generated tokens (trained with 5)", ylabel="mean of all tasks x 100, difference")
    axes.legend(frameon=False, fontsize=8)
    save(figure, "experiments_k_curves.png")


def draw_ablation(runs: list[dict], samples: int) -> None:
    rows = [("no generation", "causal_eos", None), ("generation", "last_step", 5)]
    rows += [("+ stepwise loss", "no_refinement", 5), ("+ refinement", "gircse", 5)]
    figure, axes = pyplot.subplots(1, 2, figsize=(7.6, 2.6), layout="constrained", sharey=True)
    for panel, group in zip(axes, (ALL, "Instruction following"), strict=True):
        values = [group_means(runs_of(runs, m, samples, 0)[0]["tasks"], k)[group] for _, m, k in rows]
        bars = panel.barh([name for name, _, _ in rows], values, color=["0.75", "#bcdcc2", "#82c091", "tab:green"])
        panel.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
        panel.set_xlim(0, 1.15 * max(values))
        panel.invert_yaxis() if group == ALL else None
        style(panel, title=group, xlabel="score x 100")
    save(figure, "ablation.png")


def draw_sizes(runs: list[dict]) -> None:
    """Figure 3: the mean of all tasks over the number of training samples. Lines join the seeds that every size has."""
    figure, axes = pyplot.subplots(figsize=(6.4, 3.2), layout="constrained")
    for method, color in COLORS.items():
        sizes = sorted({run["samples"] for run in runs if run["method"] == method})
        found = [{r["seed"]: group_means(r["tasks"], 5)[ALL] for r in runs_of(runs, method, size)} for size in sizes]
        joined = set.intersection(*map(set, found))
        lines = [mean(seeds[seed] for seed in joined) for seeds in found]
        axes.plot(sizes, lines, marker="o", color=color, label=NAMES[method])
        for size, seeds in zip(sizes, found, strict=True):
            axes.plot([size] * len(seeds), list(seeds.values()), ".", color=color, markersize=4, alpha=0.6)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    style(axes, xlabel="training samples", ylabel="mean of all tasks x 100")
    axes.legend(frameon=False, fontsize=8)
    save(figure, "data_size.png")


def with_model_index(text: str, root: dict) -> str:
    """The card with the root's scores in its metadata, of which `model-index` is the last entry."""
    rows = [r for r in root["tasks"] if "sample" not in r and any(name in r["task"] for name in SHOWN)]
    made = report.card_metadata(rows, SimpleNamespace(name="gircse"), SHOWN_K).removeprefix("---\n")
    found = re.match(r"---\n.*?^(model-index:\n.*?^---\n)", text, re.DOTALL | re.MULTILINE)
    if not found:
        raise ValueError("the card's metadata has no place for a model-index")
    return text[: found.start(1)] + made + text[found.end(1) :]


def fill(text: str, tables: dict[str, str]) -> str:
    for name, content in tables.items():
        pattern = re.compile(rf"(<!-- table {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"there is no place for table {name!r}")
        text = pattern.sub(lambda found, content=content: f"{found[1]}{content}\n{found[2]}", text)
    return text


def tables(models: dict[str, dict], runs: list[dict], samples: int) -> dict[str, dict[str, str]]:
    """By page and name."""
    return {
        "README.md": {
            "root_by_group": root_by_group(models),
            "cpu_routes": speed_tables.cpu_routes(speed_tables.read("cpu_routes")["rows"]),
        },
        "docs/results.md": {
            "root_by_task": root_by_task(models),
            "comparison": comparison(runs, samples, COMPARED),
            "starts": comparison(runs, samples, STARTS),
            "ablation": ablation(runs, samples),
            "comparison_by_task": comparison_by_task(runs, samples),
            "unequal_steps": unequal_steps(),
        },
        "docs/root_model.md": {"learning_rates": learning_rates(), "lengths": lengths()},
        "docs/training.md": {
            "stable_start": stable_start(),
            "stable_runs": stable_runs(),
            "stable_default": stable_default(),
        },
        "docs/speed.md": speed_tables.tables(),
    }


def main() -> None:
    models = {name: scored(name) for name in ("root", "minilm")}
    runs = experiments()
    samples = min(run["samples"] for run in runs)
    report.plot(unseen(models["root"]["tasks"]), ASSETS / "k_curve.png")
    draw_curves(runs, samples)
    draw_ablation(runs, samples)
    draw_sizes(runs)
    for page, made in tables(models, runs, samples).items():
        text = fill((ROOT / page).read_text(encoding="utf-8"), made)
        text = with_model_index(text, models["root"]) if page == "README.md" else text
        (ROOT / page).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
