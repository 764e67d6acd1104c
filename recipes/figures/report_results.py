"""Write the tables of README.md and docs/ and draw the pictures, from results/ and benchmarks/results/.

    python recipes/figures/report_results.py

Replaces what stands between `<!-- table NAME -->` and `<!-- end -->`, the `model-index` at the end of the card's
metadata, and the pictures in assets/.
"""

from __future__ import annotations

import json
import re
import shlex
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
from recipes.figures.speed_tables import table

ROOT = Path(__file__).resolve().parents[2]
RESULTS, ASSETS = ROOT / "results", ROOT / "assets"
CHOSEN_ON = "sts_stsbenchmark_dev"  # settings were fitted to it: in no mean
NAMES = {
    "causal_eos": "Causal-EOS",
    "bidirectional_avg": "Bidirectional-Avg",
    "gircse": "GIRCSE",
    "causal_eos_generating": "Causal-EOS made to generate",
    "untrained": "learned tokens, untrained",
    "learned_tokens": "ICR on learned tokens",
    "answers": "hard tokens, trained to answer",
    "compressed": "AutoRegEmbed, first stage",
    "autoregembed": "AutoRegEmbed, both stages",
    "warmed_up": "GIRCSE after AutoRegEmbed's first stage",
}
# Method and k. The first two are there to compare with.
SYSTEMS = {"causal_eos": None, "gircse": 5, "answers": 3, "untrained": 5, "learned_tokens": 5}
SYSTEMS |= {"compressed": 5, "autoregembed": 5, "warmed_up": 5}
DATA = {"pairs": "pairs", "answers": "short answers", "triplets": "NLI triplets"}
DATA |= {"contexts": "answers, abstracts, definitions"}
# A row of a table: its name, the runs' method, and k.
COMPARED = [(NAMES[method], method, None) for method in ("causal_eos", "bidirectional_avg")]
COMPARED += [(f"GIRCSE, k = {k}", "gircse", k) for k in (1, 5, 20)]
VARIANTS = [(f"{NAMES['causal_eos_generating']}, k = {k}", "causal_eos_generating", k) for k in (1, 5, 20)]
VARIANTS += [
    (f"{name}{change}", f"{method}{variant}", k)
    for variant, change in (("_two", ", 2 queries contrasted"), ("_lora", ", LoRA"))
    for name, method, k in COMPARED
]
# Table 3's rows; of one seed, as two of them have no more.
PARTS = [
    ("no generation (Causal-EOS)", "causal_eos", None),
    ("generation, loss on the last step", "last_step", 5),
    ("+ loss on every step", "no_refinement", 5),
    ("+ refinement penalty (GIRCSE)", "gircse", 5),
]
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
}
COLORS = {"gircse": "tab:green", "causal_eos": "tab:blue"}
STEPS = [1, 3, 5, 10, 15, 20]
ALL = "All tasks"
# A task of each kind that no training pair comes from, for the card's metadata, at the k of the root's configuration.
SHOWN = ("sickr", "mrpc", "hwu64_intent", "stackoverflow", "xquad", "scenario_action-scenario")
SHOWN_K = 5
# Data sets of the evaluation that no training pair of the root comes from, nor is of their domain and question, as the
# film reviews by sentiment are of SST-2's.
OUT_OF_DOMAIN = ("sickr", "trec", "hwu64", "stackoverflow", "xquad", "mrpc")


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def group_means(rows: list[dict], k: int | None) -> dict[str, float]:
    """Group of tasks to the mean of its scores, and of all tasks. A model without steps has one column, which holds for
    every k."""
    means = report.means(unseen(rows))
    return {name.partition(" (")[0]: scores.get("None", scores.get(str(k))) for name, scores in means.items()}


def unseen(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["task"] != CHOSEN_ON]


def comparison_runs() -> dict[str, list[dict]]:
    """Method to its runs, by seed (recipes/paper/compare_methods.py)."""
    runs: dict[str, list[dict]] = {}
    for path in sorted((RESULTS / "comparison").glob("*-seed*.json")):
        run = read(path)
        runs.setdefault(run["method"], []).append(run)
    return runs


def spread(values: list[float]) -> str:
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def comparison(runs: dict[str, list[dict]], rows: list[tuple[str, str, int | None]]) -> str:
    """Accuracy on held-out pairs and means by kind of task, of the runs that were made."""
    lines, head = [], ["", "held-out pairs", *group_means(runs["causal_eos"][0]["tasks"], None)]
    for name, method, k in rows:
        if not (found := runs.get(method)):
            continue
        pairs = [accuracy[str(k or 1)] for run in found if (accuracy := run["held_out_accuracy"])]
        means = [group_means(run["tasks"], k) for run in found]
        kinds = [spread([group[kind] for group in means]) for kind in means[0]]
        lines.append([name, spread(pairs) if pairs else "", *kinds])
    return table(head, lines)


def other_systems(runs: dict[str, list[dict]]) -> str:
    """Means by kind of task of the first seed, and what it was trained on, in steps of as many rows each."""
    lines, head = [], ["", "trained on", "steps", "rate", *group_means(runs["causal_eos"][0]["tasks"], None)]
    for method, k in SYSTEMS.items():
        if found := runs.get(method):
            stages = training(found[0], runs)
            name = NAMES[method] if k is None else f"{NAMES[method]}, k = {k}"
            means = group_means(found[0]["tasks"], k).values()
            cells = [", then ".join(column) for column in zip(*stages, strict=True)]
            lines.append([name, *cells, *(f"{value:.1f}" for value in means)])
    return table(head, lines)


def training(run: dict, runs: dict[str, list[dict]]) -> list[list[str]]:
    """Data, steps and learning rate of a run, after those of the runs that it goes on from."""
    words = shlex.split(run["commands"][0])
    flags = ("--model_name_or_path", "--train_data", "--max_steps", "--learning_rate")
    options = {words[at]: words[at + 1] for at in range(len(words) - 1) if words[at] in flags}  # the last one counts
    start, data, steps, rate = (options[flag] for flag in flags)
    before = runs.get(Path(start).name.partition("-")[0], [])
    return [*(training(before[0], runs) if before else []), [DATA[Path(data).stem], steps, f"{float(rate):g}"]]


def comparison_by_task(runs: dict[str, list[dict]]) -> str:
    columns = {}
    for name, method, k in COMPARED:
        for run in runs.get(method, []):
            for row in run["tasks"]:
                scores = columns.setdefault(name, {}).setdefault(row["task"], [])
                scores.append(row["scores"].get("None", row["scores"].get(str(k))))
    tasks = sorted(runs["causal_eos"][0]["tasks"], key=lambda row: (row["group"], row["task"]))
    lines = [[row["task"], *(spread(column[row["task"]]) for column in columns.values())] for row in tasks]
    return table(["task", *columns], lines)


def learning_rates() -> str:
    """What each method's rate is chosen by (recipes/paper/compare_methods.py)."""
    lines = []
    for method, rates in read(RESULTS / "comparison" / "learning_rates.json").items():
        for rate, found in sorted(rates.items(), key=lambda item: float(item[0])):
            row = [f"{float(rate):g}", f"{found['held_out_accuracy']:.1f}", f"{found['sts_dev']:.1f}"]
            lines.append([NAMES[method], *row])
    return table(["method", "learning rate", "held-out accuracy", "STS-Benchmark, development"], lines)


def unequal_steps() -> str:
    """nDCG@10 by task."""
    columns = ("1 in 1", "5 in 5", "20 in 20", "1 in 5", "1 in 20", "20 in 1")
    head = ["k of queries / of documents", *(column.replace("in", "/") for column in columns)]
    head += ["1, then 20", "relevant in shortlist", "documents embedded again"]
    lines = []
    for name, task in read(RESULTS / "unequal_steps.json")["tasks"].items():
        search = task["coarse_to_fine"]
        values = [*(task["ndcg_at_10"][column] for column in columns), search["ndcg_at_10"]]
        shares = [search["relevant_in_shortlist"], search["documents_rescored"]]
        lines.append([name, *(f"{v:.1f}" for v in values), *(f"{v:.0f} %" for v in shares)])
    return table(head, lines)


def several_vectors() -> str:
    """nDCG@10 by task, way and k."""
    found = read(RESULTS / "several_vectors.json")["ndcg_at_10"]
    steps = list(next(iter(found.values()))["mean"])
    head = ["", *(f"{way}, k = {k}" for k in steps for way in ("mean", "MaxSim"))]
    cells = {name: [f"{ways[way][k]:.1f}" for k in steps for way in ("mean", "maxsim")] for name, ways in found.items()}
    return table(head, [[name, *row] for name, row in cells.items()])


def two_stage() -> str:
    """Texts alone and augmented, by task and model."""
    found = read(RESULTS / "two_stage.json")["scores"]
    models = list(next(iter(found.values())))
    columns = [(model, way) for model in models for way in ("alone", "augmented")]
    rows = {task: [scores[model][way] for model, way in columns] for task, scores in found.items()}
    rows["mean"] = [mean(column) for column in zip(*rows.values(), strict=True)]
    head = ["", *(f"{model.rpartition('/')[2]}, {way}" for model, way in columns)]
    return table(head, [[task, *(f"{value:.1f}" for value in row)] for task, row in rows.items()])


def root_by_group(models: dict[str, dict]) -> str:
    sides = {f"k = {k}": ("root", k) for k in STEPS} | {"MiniLM": ("minilm", None)}
    columns = {}
    for head, (model, k) in sides.items():
        rows = models[model]["tasks"]
        new = [row for row in rows if any(name in row["task"] for name in OUT_OF_DOMAIN)]
        columns[head] = group_means(rows, k) | {f"Out of domain, {len(new)} tasks": group_means(new, k)[ALL]}
    groups = list(columns["MiniLM"])
    return table(
        ["mean of", *columns], [[group, *(f"{column[group]:.1f}" for column in columns.values())] for group in groups]
    )


def root_by_task(models: dict[str, dict]) -> str:
    minilm = {row["task"]: row["scores"]["None"] for row in models["minilm"]["tasks"]}
    lines = []
    for row in sorted(models["root"]["tasks"], key=lambda row: (row["group"], row["task"])):
        scores = [f"{row['scores'][str(k)]:.1f}" for k in STEPS]
        lines.append([row["task"], row["metric"], *scores, f"{minilm[row['task']]:.1f}"])
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


def draw_curves(runs: dict[str, list[dict]]) -> None:
    """Figure 2: GIRCSE against its own k = 1, Causal-EOS made to generate against itself without."""
    figure, axes = pyplot.subplots(figsize=(6.4, 3.4), layout="constrained")
    lines = []
    for run in runs["gircse"]:
        found, label = curve(run["tasks"]), f"GIRCSE ({len(runs['gircse'])} seeds), against k = 1"
        lines.append(("gircse", "" if lines else label, found, found[1]))
    found = curve(runs["causal_eos_generating"][0]["tasks"])
    plain = group_means(runs["causal_eos"][0]["tasks"], None)[ALL]
    lines.append(("causal_eos", "Causal-EOS made to generate, against no generation", found, plain))
    for method, label, found, start in lines:
        gains = [value - start for value in found.values()]
        axes.plot(list(found), gains, color=COLORS[method], marker="o", markersize=3, label=label)
    axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    axes.axvspan(5.5, 20.5, color="0.95", zorder=0)
    axes.set_xticks(STEPS)
    axes.set_xlim(0, 20.5)
    style(axes, xlabel="k, generated tokens (trained with 5)", ylabel="mean of all tasks x 100, difference")
    axes.legend(frameon=False, fontsize=8)
    save(figure, "comparison_k_curves.png")


def draw_parts(runs: dict[str, list[dict]]) -> None:
    """Table 3: what each part of the method adds."""
    figure, axes = pyplot.subplots(1, 2, figsize=(8.4, 2.2), layout="constrained", sharey=True)
    for panel, group in zip(axes, (ALL, "Instruction following"), strict=True):
        values = [group_means(runs[method][0]["tasks"], k)[group] for _, method, k in PARTS]
        for (name, method, _), value in zip(PARTS, values, strict=True):
            panel.plot(value, name, "o", color=COLORS["gircse"] if method == "gircse" else "0.5")
            panel.annotate(f"{value:.1f}", (value, name), (7, -3), textcoords="offset points", fontsize=8)
        panel.margins(x=0.25, y=0.15)
        style(panel, title=group, xlabel="score x 100")
    axes[0].invert_yaxis()
    save(figure, "ablation.png")


def with_model_index(text: str, root: dict) -> str:
    """The card with the root's scores in its metadata, of which `model-index` is the last entry."""
    rows = [row for row in root["tasks"] if any(name in row["task"] for name in SHOWN)]
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


def tables(models: dict[str, dict], runs: dict[str, list[dict]]) -> dict[str, dict[str, str]]:
    """By page and name."""
    return {
        "README.md": {
            "root_by_group": root_by_group(models),
            "cpu_routes": speed_tables.cpu_routes(speed_tables.read("cpu_routes")["rows"]),
        },
        "docs/results.md": {
            "root_by_task": root_by_task(models),
            "comparison": comparison(runs, COMPARED + VARIANTS),
            "parts": comparison({method: found[:1] for method, found in runs.items()}, PARTS),
            "comparison_by_task": comparison_by_task(runs),
            "other_systems": other_systems(runs),
            "unequal_steps": unequal_steps(),
            "several_vectors": several_vectors(),
            "two_stage": two_stage(),
            "stable_start": stable_start(),
            "stable_runs": stable_runs(),
            "stable_default": stable_default(),
        },
        "docs/root_model.md": {"learning_rates": learning_rates(), "lengths": lengths()},
        "docs/speed.md": speed_tables.tables(),
    }


def main() -> None:
    models = {name: read(RESULTS / f"{name}.json") for name in ("root", "minilm")}
    runs = comparison_runs()
    report.plot(unseen(models["root"]["tasks"]), ASSETS / "k_curve.png")
    draw_curves(runs)
    draw_parts(runs)
    for page, made in tables(models, runs).items():
        text = fill((ROOT / page).read_text(encoding="utf-8"), made)
        text = with_model_index(text, models["root"]) if page == "README.md" else text
        (ROOT / page).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
