"""The results of an evaluation: `results.json`, one HTML page that needs nothing beside it, tables on the terminal."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from rich.console import Console
from rich.table import Table
from rich.text import Text

SHOWN = 12  # single answers on the page; all are in results.json
BESIDE = {
    "Likelihood": "Bounds are upper bounds; their standard errors are those of the noise. An AR model's figures are exact.",
    "Tasks": "",
    "Answers": "",
}
ON_TERMINAL = (*BESIDE, "Right on the same documents", "Worked answers")
SPEED = (
    "label",
    "exact_match",
    "tokens_per_second",
    "tokens_per_forward",
    "first_token",
    "last_token",
    "memory",
    "on_frontier",
)


@dataclass
class Section:
    """What stands under one heading.

    Args:
        tables: (head, rows).
        series: of a picture, (label, x, y, matplotlib's format); `axes` has the labels of its axes.
        trace: words with their state, after every step.
    """

    title: str
    tables: Sequence[tuple[Sequence[str], Sequence[Sequence[Any]]]] = ()
    note: str = ""
    series: Sequence[tuple[str, Sequence[float], Sequence[float], str]] = ()
    axes: tuple[str, str] = ("", "")
    trace: Sequence[Sequence[tuple[str, str]]] = ()


def write_report(results: dict[str, Any], folder: Path) -> None:
    """`results.json` and `report.html` in a folder, which is made."""
    html, text = page(results), json.dumps(results, indent=1) + "\n"  # both, before anything is written
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(text)
    (folder / "report.html").write_text(html)


def page(results: dict[str, Any]) -> str:
    """The page of what `evaluate` returns."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    environment.filters |= {"cell": cell, "picture": picture}
    shown = {"model": results["settings"].get("model", "a model"), "notes": results.get("notes", [])}
    return environment.get_template("report.html.jinja").render(sections=sections(results), **shown)


def show(results: dict[str, Any], console: Console) -> None:
    """The figures as tables of a terminal or a log."""
    for section in sections(results):
        for head, rows in section.tables if section.title in ON_TERMINAL else ():
            table = Table(title=section.title, caption=section.note)
            for i, name in enumerate(head):
                table.add_column(Text(name), justify="right" if i else "left")
            for row in rows:
                table.add_row(*(Text(cell(value)) for value in row))
            console.print(table)


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
    values = {**results["settings"], **results["provenance"]}
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
    def series(name: str, style: str, mine: list[dict[str, Any]]) -> tuple[str, list[float], list[float], str]:
        return name, [p["tokens_per_second"] for p in mine], [p["exact_match"] for p in mine], style

    edge = sorted((p for p in points if p["on_frontier"]), key=lambda p: p["tokens_per_second"])
    lines = [
        series("autoregressive", "s", [p for p in points if p["settings"] is None]),
        series("diffusion", "o", [p for p in points if p["settings"] is not None]),
        series("frontier", "--", edge),
    ]
    tables = [([name.replace("_", " ") for name in SPEED], [[point[name] for name in SPEED] for point in points])]
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


def _samples(samples: list[dict[str, str]]) -> list[Section]:
    return [Section("Samples", [(list(samples[0]), [list(row.values()) for row in samples[:SHOWN]])])]


BUILDERS = {
    "paired": _paired,
    "worked": _worked,
    "levels": _levels,
    "frontier": _frontier,
    "calibration": _calibration,
    "eos": _eos,
    "trace": lambda steps: [Section("One answer as it is denoised", trace=steps)],
    "samples": _samples,
}
