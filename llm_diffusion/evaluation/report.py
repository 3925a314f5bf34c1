"""What is found, for people: `results.json` with one HTML page that needs nothing beside it, and tables on the terminal.

The second half is what the main job shows at its end: tables, sample answers, one answer as it forms, and how to load the result.
"""

from __future__ import annotations

import base64
import io
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader
from loguru import logger
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from ..config import HyperParameters
from ..generation.config import decoding_settings
from ..generation.inference import continue_autoregressive
from ..models.files import write_text
from ..models.patching import dtype_name
from ..models.record import record_of
from .answers import AnswerReport, evaluate_answers, prompt_and_reference, question_of
from .metrics import denoising_trace, foresee_ends, plot_ends
from .speed import Timed, compare_decoding, widest_gap
from .statistics import Continuations

TIMED = 3  # prompts that a drafter and its base answer beside each other
SHOWN = 12  # single answers on the page; all are in results.json
BESIDE = {
    "Likelihood": "Bounds are upper bounds; their standard errors are those of the noise. An AR model's figures are exact.",
    "Tasks": "",
    "Answers": "",
}
ON_TERMINAL = (*BESIDE, "Right on the same documents", "Worked answers")


@dataclass
class Section:
    """What stands under one heading."""

    title: str
    tables: Sequence[tuple[Sequence[str], Sequence[Sequence[Any]]]] = ()  # (head, rows)
    note: str = ""
    series: Sequence[tuple[str, Sequence[float], Sequence[float], str]] = ()  # (label, x, y, matplotlib's format)
    axes: tuple[str, str] = ("", "")
    trace: Sequence[Sequence[tuple[str, str]]] = ()  # words with their state, after every step


def write_report(results: dict[str, Any], folder: Path) -> None:
    """`results.json` and `report.html` in a folder, which is made."""
    html, text = page(results), json.dumps(results, indent=1) + "\n"  # both, before anything is written
    write_text(folder / "results.json", text)
    write_text(folder / "report.html", html)


def page(results: dict[str, Any]) -> str:
    """The page of what `evaluate` returns."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    environment.filters |= {"cell": cell, "picture": picture}
    title, names = f"Evaluation of {results['settings'].get('model', 'a model')}", list(results["models"])
    title += f": {', '.join(names[1:])} beside {names[0]}" if names[1:] else ""
    shown = {"title": title, "notes": results.get("notes", []), "sections": sections(results)}
    return environment.get_template("report.html.jinja").render(**shown)


def show(results: dict[str, Any], console: Console) -> None:
    """The figures as tables of a terminal or a log."""
    for section in sections(results):
        for head, rows in section.tables if section.title in ON_TERMINAL else ():
            console.print(table(section.title, head, rows, caption=section.note))


def table(title: str, head: Iterable[str], rows: Iterable[Sequence[Any]], left: int = 1, caption: str = "") -> Table:
    """A table of the terminal, its first `left` columns aligned left; an empty row is a line."""
    found = Table(title=title, caption=caption)
    for i, name in enumerate(head):
        found.add_column(Text(name), justify="left" if i < left else "right")
    for row in rows:
        if row:
            found.add_row(*(Text(cell(value)) for value in row))
        else:
            found.add_section()
    return found


def cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "", None: "–"}[value]
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def picture(section: Section) -> str:
    """An SVG image as a data URI; the same for the same results."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # slow to import; `Figure` alone touches no display

    figure, buffer = Figure(figsize=(6.4, 3.8), layout="constrained"), io.BytesIO()
    axes = figure.subplots()
    for label, x, y, style in section.series:
        axes.plot(x, y, style, label=label)
    axes.set(xlabel=section.axes[0], ylabel=section.axes[1])
    axes.grid(alpha=0.3)
    axes.legend()
    with rc_context({"svg.hashsalt": section.title}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"


# -- sections


def sections(results: dict[str, Any]) -> list[Section]:
    """What there are figures for, and the settings."""
    found = []
    for title, note in BESIDE.items():
        models = {name: v[title.lower()] for name, v in results["models"].items() if v.get(title.lower())}
        found += [Section(title, [_columns(models)], note)] if models else []
    for key, build in BUILDERS.items():
        found += build(results[key]) if results.get(key) else []
    values = results["settings"] | results["provenance"]
    return [*found, Section("Settings", [(["setting", "value"], [(name, str(v)) for name, v in values.items()])])]


def _columns(models: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Figures in rows, models in columns."""
    names = dict.fromkeys(name for figures in models.values() for name in figures)
    return ["", *models], [[name, *(figures.get(name) for figures in models.values())] for name in names]


def _paired(rows: list[dict[str, Any]]) -> list[Section]:
    def interval(value: float, low: float, high: float, sign: str = "") -> str:
        return f"{value:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"

    shares = [[row["what"], row["n"], *(interval(*share) for share in row["shares"].values())] for row in rows]
    tables = [(["right, %", "documents", *rows[0]["shares"]], shares)]
    differences = [
        [row["what"], f"{d['second']} - {d['first']}", interval(d["points"], *d["interval"], "+")]
        + [d[name] for name in ("only_first", "only_second", "p_value")]
        for row in rows
        for d in row["differences"]
    ]
    if differences:
        head = ["difference", "second - first", "points", "only first right", "only second right", "p"]
        tables.append((head, differences))
    note = "95 % intervals by Wilson (F1, differences: paired bootstrap); p by McNemar, exact, two-sided, of one comparison."
    return [Section("Right on the same documents", tables, note)]


def _worked(worked: dict[str, dict[str, Any]]) -> list[Section]:
    def labels(row: dict[str, Any]) -> list[Any]:
        step = row["first_wrong_step"]
        return ["yes" if row["right"] else "no", None if step is None else step + 1]

    head, lines = ["question", "model", "answer", "right", "first wrong step", "superfluous steps"], []
    if any("judge" in row for found in worked.values() for row in found["answers"]):
        head += ["judge: right", "judge: first wrong step"]
    for rows in list(zip(*(found["answers"] for found in worked.values()), strict=False))[:SHOWN]:
        for model, row in zip(worked, rows, strict=True):
            superfluous = ", ".join(str(step + 1) for step in row["superfluous"]) or "–"
            judged = labels(row["judge"]) if "judge" in row else []
            lines.append([row["question"], model, row["answer"], *labels(row), superfluous, *judged])
    note = "Every equation is evaluated again; sentences are not judged. Steps are counted from 1."
    summaries = _columns({name: found["summary"] for name, found in worked.items()})
    return [Section("Worked answers", [summaries], note), Section("Worked answers, step by step", [(head, lines)])]


def _levels(levels: list[Sequence[float]]) -> list[Section]:
    axes = ("share of tokens that is masked, up to", "NLL of a masked token, nats")
    tables = [(["masked up to", "nats per masked token", "tokens"], levels)]
    shares, nats, _ = zip(*levels, strict=True)
    return [Section("Loss by noise level", tables, series=[("masked tokens", shares, nats, "o-")], axes=axes)]


def _frontier(points: list[dict[str, Any]]) -> list[Section]:
    names = [name for name in points[0] if name != "settings"]
    tables = [([name.replace("_", " ") for name in names], [[point[name] for name in names] for point in points])]
    groups = {
        ("autoregressive", "s"): [p for p in points if p["settings"] is None],
        ("diffusion", "o"): [p for p in points if p["settings"] is not None],
        ("frontier", "--"): sorted((p for p in points if p["on_frontier"]), key=lambda p: p["tokens_per_second"]),
    }
    lines = [
        (label, [p["tokens_per_second"] for p in mine], [p["exact_match"] for p in mine], style)
        for (label, style), mine in groups.items()
    ]
    return [Section("Speed and quality", tables, series=lines, axes=("tokens a second", "exact match, %"))]


def _calibration(found: dict[str, Any]) -> list[Section]:
    confidence, right, _ = zip(*found["bins"], strict=True)
    series = [("perfect", [0, 1], [0, 1], "--"), ("model", confidence, right, "o-")]
    note = f"Expected calibration error {found['error']:.3f}."
    tables, axes = [(["confidence", "right", "tokens"], found["bins"])], ("confidence", "share that is right")
    return [Section("Calibration of confidence", tables, note, series, axes)]


def _eos(found: dict[str, Any]) -> list[Section]:
    ended = [pair for pair in found["pairs"] if pair[1] is not None]
    longest = max(max(pair) for pair in [(1, 1), *ended])
    same = ("same length", [0, longest], [0, longest], "--")
    series = [same, ("answers that end", [a for a, _ in ended], [b for _, b in ended], "o")]
    note = f"{found['ended']:.1f} % of the answers end, {found['accuracy']:.1f} % where the reference does."
    axes = ("tokens of the reference", "tokens of the answer")
    return [Section("Where answers end", note=note, series=series, axes=axes)]


BUILDERS = {
    "paired": _paired,
    "worked": _worked,
    "levels": _levels,
    "frontier": _frontier,
    "calibration": _calibration,
    "eos": _eos,
    "trace": lambda steps: [Section("One answer as it is denoised", trace=steps)],
    "samples": lambda rows: [Section("Samples", [(list(rows[0]), [list(row.values()) for row in rows[:SHOWN]])])],
}


def show_side_by_side(console: Console, rows: list[Continuations], prompts: list[str]) -> None:
    """A table of the figures, and the answers below each prompt."""
    head, lines = ["model", "pipeline", "nats/token, judged by the first", "tokens/forward", "seconds"], []
    for row in rows:
        judged = f"{row.nll_per_token:.2f}" if any(row.texts) else "empty"
        lines.append([row.model, row.pipeline, judged, f"{row.tokens_per_forward:.2f}", f"{row.seconds:.1f}"])
    console.print(table(f"{len(prompts)} text(s) continued", head, lines, left=2))
    for number, prompt in enumerate(prompts):
        console.print(f"\n{prompt!r}", style="bold", markup=False)
        for row in rows:
            console.print(f"  {row.model}, {row.pipeline}: {row.texts[number]!r}", markup=False, soft_wrap=True)


# -- the end of the main job


def decoding(hp: HyperParameters, model: torch.nn.Module) -> dict[str, Any]:
    """The job's settings over the model's own; `diffusion_steps` are those of a block, unless another rule is set."""
    chosen, own_block = dict(hp.generation), record_of(model).block_length
    if own_block:
        chosen.pop("block_length", None)
    settings = decoding_settings(model, chosen)
    rules = ("steps", "threshold", "factor", "entropy_bound")
    if hp.diffusion_steps and all(chosen.get(rule) is None for rule in rules):
        block = own_block or settings.get("block_length") or settings["max_new_tokens"]
        steps = hp.diffusion_steps * -(-settings["max_new_tokens"] // block)
        settings = decoding_settings(model, {**chosen, "steps": steps})
    return settings


def show_job(
    hp: HyperParameters,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    samples: list[dict],
    reports: dict[str, AnswerReport],
    histories: dict[str, list[dict]],
    final: Path,
    seconds: float,
) -> None:
    """Tables, sample answers, one answer as it forms, a drafter beside its base on the clock, and how to load the result."""
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    console.print(training_table(histories, model))
    if reports:
        console.print(answers_table(reports))
        if accepted := [*reports.values()][-1].accepted:
            console.print(accepted_table(accepted))
    settings = decoding(hp, model)
    answers = evaluate_answers(model, tokenizer, samples, **settings).answers
    for example, answer in zip(samples, answers, strict=True):
        reference = prompt_and_reference(example)[1]
        for label, text in (("prompt", question_of(example)), ("answer", answer), ("reference", reference)):
            console.print(f"{label:>9}  ", end="", style="bold")
            console.print(" / ".join(text.strip().splitlines()) or "(empty)", markup=False)
        console.print()
    if record_of(model).mode.drafts:
        prompts = [prompt_and_reference(example)[0] for example in samples[:TIMED]]
        timed = compare_decoding(model, tokenizer, prompts, settings["max_new_tokens"])
        console.print(speed_table(timed))
        if (gap := widest_gap(model, timed)) is not None:
            note = f"Where texts part, the base's two best logits are at most {gap:.2g} apart: passes over one token and over several"
            console.print(f"{note} round differently in {dtype_name(model)}, hardly ever in float32.", soft_wrap=True)
        console.print("one answer, what a pass brought in one colour:", style="bold")
        console.print(coloured_by_pass(tokenizer, [*timed.values()][-1]), soft_wrap=True)
    else:
        console.print("one answer as it is denoised, step by step:", style="bold")
        styles = {"mask": "bright_black", "new": "bold green", "old": ""}
        for step, words in enumerate(denoising_trace(model, tokenizer, samples[0], settings), start=1):
            parts = [(word, styles[state]) for word, state in words]
            console.print(Text.assemble(f"{step:>4}  ", *parts), soft_wrap=True)
    console.print()
    console.print(f"loss curve: {final.parent / 'loss.png'}; done in {seconds:.0f} s. Load the result:\n", markup=False)
    options = ', quantization="nf4"' if hp.use_qlora else ""
    if not hp.use_qlora and model.device.type == "cpu" and dtype_name(model) != "float32":  # which "auto" is there
        options = f', dtype="{dtype_name(model)}"'
    call = f'DiffusionInference.from_pretrained("{final}"{options})'
    console.print(f"    inference = llm_diffusion.{call}", markup=False, soft_wrap=True)
    console.print('    print(inference.chat([{"role": "user", "content": "…"}]))', markup=False)


def training_table(histories: dict[str, list[dict]], model: torch.nn.Module) -> Table:
    """Of every phase; "preferred" is the share of held-out pairs in which the chosen answer gained more."""
    lasts = {phase: {name: row[name] for row in history for name in row} for phase, history in histories.items()}
    shares = {phase: last.get("eval_rewards/accuracies") for phase, last in lasts.items()}
    head, rows = ["phase", "steps", "seconds", "nats/token", "held-out nats/token"], []
    for phase, last in lasts.items():
        # What a drafter predicts of whole blocks bounds nothing; its loss is shown.
        figures = [last.get(f"{kind}nelbo", last.get(f"{kind}masked_nll")) for kind in ("", "eval_")]
        cells = [None if figure is None else f"{figure:.3f}" for figure in figures]
        rows.append([phase, last["step"], f"{last['train_runtime']:.0f}", *cells])
    if any(share is not None for share in shares.values()):
        head.append("preferred")
        for row, share in zip(rows, shares.values(), strict=True):
            row.append(None if share is None else f"{100 * share:.0f} %")
    return table(f"Training: {record_of(model).training_tokens:,} tokens", head, rows)


def answers_table(reports: dict[str, AnswerReport]) -> Table:
    """Exact match of every model by kind of task, and what the last one keeps of the first one's."""
    first, *_, last = every = list(reports.values())
    figures = {kind: [report.exact_match[kind] for report in every] for kind in first.exact_match}
    figures["mean"] = [report.mean for report in every]
    rows = [
        [name, *(f"{value:.1f}" for value in values), f"{100 * values[-1] / values[0]:.0f} %" if values[0] else None]
        for name, values in figures.items()
    ]
    rows[-1:] = [[], rows[-1], []]
    rows.append(["tokens per forward", *(f"{report.tokens_per_forward:.2f}" for report in every)])
    rows.append(["seconds", *(f"{report.seconds:.1f}" for report in every)])
    if last.accepted:
        same = sum(a == b for a, b in zip(first.answers, last.answers, strict=True))
        rows.append(["same answers as the base", "", f"{same} of {len(first.answers)}"])
    title = f"Exact match on {len(first.answers)} held-out prompts, %"
    return table(title, ["kind of task", *reports, "kept"], rows)


def accepted_table(accepted: dict[int, int]) -> Table:
    """Tokens that a verification yielded, as a histogram."""
    shares = {tokens: count / sum(accepted.values()) for tokens, count in accepted.items()}
    rows = [[tokens, f"{100 * share:.0f} %", "█" * round(40 * share)] for tokens, share in shares.items()]
    return table("Tokens that a verified draft yielded", ["tokens", "share", ""], rows, left=3)


def speed_table(timed: dict[str, Timed]) -> Table:
    """Of every way of decoding tokens a second, also beside the first way's; whether its texts are the same; what drafts yielded."""
    first, *_ = timed.values()
    head = ["decoding", "tokens/s", "to the first", "same text", "tokens per forward", "accepted length"]
    rows = []
    for name, way in timed.items():
        same = sum(torch.equal(a, b) for a, b in zip(first.ids, way.ids, strict=True))
        speed, drafted = way.tokens_per_second, [None, None]
        if way.forwards:
            drafted = [f"{fmean(figures):.2f}" for figures in (way.forwards, sum(way.accepted, []))]
        shares = [f"{speed:.1f}", f"{speed / first.tokens_per_second:.2f}", f"{same} of {len(first.ids)}"]
        rows.append([name, *shares, *drafted])
    return table(f"{len(first.ids)} prompts, one at a time", head, rows)


def coloured_by_pass(tokenizer: PreTrainedTokenizerBase, way: Timed) -> Text:
    """The first answer of a drafter, the tokens of every pass in the next of three colours."""
    passes = way.accepted[0]
    tokens = iter(way.ids[0][0, -sum(passes) :].tolist())
    words = (tokenizer.decode(list(islice(tokens, n))) for n in passes)
    return Text.assemble(*zip(words, cycle(("green", "cyan", "yellow"))))


def show_ends(arguments: Sequence[Any], model: Any, tokenizer: Any, examples: list[dict], picture: Path) -> None:
    """Where the model predicts the ends of held-out answers, if a stage trained it to (`max_canvas`)."""
    if canvas := max((getattr(stage, "max_canvas", None) or 0 for stage in arguments), default=0):
        report = foresee_ends(model, tokenizer, examples, canvas)
        plot_ends(report, picture)
        print(f"{report}\npicture: {picture}\n")


def show_autoregressive(hp: HyperParameters, load: Callable[[], Any], histories: dict[str, list[dict]]) -> None:
    """The end of the job from left to right: held-out perplexity of every stage, and the continuations of `prompts`."""
    for stage, history in histories.items():
        losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
        if losses:
            logger.info(f"{stage}: {losses[-1]:.3f} nats a held-out token, perplexity {math.exp(losses[-1]):.2f}")
    if hp.prompts:
        for answer in continue_autoregressive(*load(), hp.prompts, **hp.generation):
            logger.info(f"continued: {answer!r}")
