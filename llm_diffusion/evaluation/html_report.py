"""The results of an evaluation as one page: tables and plots in a single HTML file that needs nothing beside it.

Trade-off: pictures drawn once, as SVG inside the page, which open anywhere and can be archived. Alternative: interactive plots, which
need a script from elsewhere.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

SHOWN = 12  # worked answers on the page; all are in results.json
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.5rem; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .8rem .2rem 0; text-align: right; border-bottom: 1px solid #eee; vertical-align: top }
th:first-child, td:first-child, td.text { text-align: left } td.text { white-space: pre-wrap }
img { max-width: 100% } .note { color: #666 } .trace { font-family: ui-monospace, monospace; white-space: pre-wrap }
.mask { color: #bbb } .new { color: #070; font-weight: bold }
"""


def render(results: dict[str, Any]) -> str:
    """The page of what `report.evaluate` returns; sections without figures are left out."""
    sections = [
        ("Likelihood", _likelihood),
        ("Loss by noise level", _levels),
        ("Tasks", _tasks),
        ("Answers", _answers),
        ("Right on the same documents", _paired),
        ("Worked answers, step by step", _worked),
        ("Speed and quality", _frontier),
        ("Calibration of confidence", _calibration),
        ("Where answers end", _eos),
        ("One answer as it is denoised", _trace),
        ("Samples", _samples),
        ("Settings", _settings),
    ]
    body = "".join(f"<h2>{escape(title)}</h2>{text}" for title, section in sections if (text := section(results)))
    title = f"Evaluation of {escape(str(results['settings'].get('model', 'a model')))}"
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in results.get("notes", []))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head>'
        f"<body><h1>{title}</h1>{notes}{body}</body></html>\n"
    )


# -- parts of a page


def _number(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "", None: "–"}[value]
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = []
    for row in rows:
        cells_of_row = "".join(
            f'<td class="text">{escape(value)}</td>' if isinstance(value, str) else f"<td>{_number(value)}</td>"
            for value in row
        )
        lines.append(f"<tr>{cells_of_row}</tr>")
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _side_by_side(results: dict[str, Any], key: str) -> str:
    """Figures in rows, models in columns."""
    models = {name: values[key] for name, values in results["models"].items() if values.get(key)}
    names = list(dict.fromkeys(name for values in models.values() for name in values))
    rows = [[name, *(values.get(name) for values in models.values())] for name in names]
    return _table(["", *models], rows) if models else ""


def _plot(draw: Callable[[Any], None], alt: str) -> str:
    """An SVG image inside the page."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # `Figure` alone touches no display

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    draw(axes)
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": alt}):  # the same page for the same results
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return f'<img alt="{escape(alt)}" src="data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


# -- sections


def _likelihood(results: dict[str, Any]) -> str:
    table = _side_by_side(results, "likelihood")
    note = "Bounds are upper bounds; their standard errors are those of the noise. An AR model's figures are exact."
    return f'{table}<p class="note">{note}</p>' if table else ""


def _levels(results: dict[str, Any]) -> str:
    levels = results.get("levels")
    if not levels:
        return ""

    def draw(axes: Any) -> None:
        axes.plot([level for level, _, _ in levels], [nats for _, nats, _ in levels], "o-")
        axes.set(xlabel="share of tokens that is masked, up to", ylabel="NLL of a masked token, nats", xlim=(0, 1.02))

    table = _table(["masked up to", "nats per masked token", "tokens"], levels)
    return _plot(draw, "Loss by noise level") + table


def _tasks(results: dict[str, Any]) -> str:
    return _side_by_side(results, "tasks")


def _answers(results: dict[str, Any]) -> str:
    return _side_by_side(results, "answers")


def _paired(results: dict[str, Any]) -> str:
    rows, models = results.get("paired"), list(results["models"])
    if not rows:
        return ""
    lines = []
    for row in rows:
        line = [row["what"], row["n"], *(_with_interval(*row["shares"][name]) for name in models)]
        for found in row["differences"]:
            line += [_with_interval(found["points"], *found["interval"], sign="+"), found["only_first"]]
            line += [found["only_second"], found["p_value"]]
        lines.append(line)
    head = ["right, %", "documents", *models]
    if len(models) > 1:
        head += ["difference, points", f"only {models[0]}", f"only {models[1]}", "p"]
    note = "95 % intervals: of a share by Wilson, of a difference by paired bootstrap. p: McNemar, exact, two-sided, of one comparison."
    return _table(head, lines) + f'<p class="note">{note}</p>'


def _with_interval(value: float, low: float, high: float, sign: str = "") -> str:
    return f"{value:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def _worked(results: dict[str, Any]) -> str:
    worked = results.get("worked")
    if not worked:
        return ""
    names = list(dict.fromkeys(name for found in worked.values() for name in found["summary"]))
    table = _table(["", *worked], [[name, *(w["summary"].get(name) for w in worked.values())] for name in names])
    by_judge = any("judge" in row for found in worked.values() for row in found["answers"])
    head = ["question", "model", "answer", "right", "first wrong step", "superfluous steps"]
    lines = []
    for rows in list(zip(*(found["answers"] for found in worked.values()), strict=False))[:SHOWN]:
        for model, row in zip(worked, rows, strict=True):
            line = [row["question"], model, row["answer"], *_labels(row)]
            line.append(", ".join(str(step + 1) for step in row["superfluous"]) or "–")
            lines.append(line + (_labels(row["judge"]) if by_judge else []))
    note = "Every equation is evaluated again; what is said in words alone is not judged. Steps are counted from 1."
    head += ["judge: right", "judge: first wrong step"] if by_judge else []
    return table + f'<p class="note">{note}</p>' + _table(head, lines)


def _labels(row: dict[str, Any]) -> list[Any]:
    step = row["first_wrong_step"]
    return ["yes" if row["right"] else "no", None if step is None else step + 1]


def _frontier(results: dict[str, Any]) -> str:
    points = results.get("frontier")
    if not points:
        return ""

    def draw(axes: Any) -> None:
        for is_base in (True, False):
            mine = [p for p in points if (p["settings"] is None) == is_base]
            places = [p["tokens_per_second"] for p in mine], [p["exact_match"] for p in mine]
            axes.plot(*places, "s" if is_base else "o", label="autoregressive" if is_base else "diffusion")
        edge = sorted((p["tokens_per_second"], p["exact_match"]) for p in points if p["on_frontier"])
        axes.plot(*zip(*edge, strict=True), "--", color="grey", label="frontier")
        axes.set(xlabel="tokens a second", ylabel="exact match, %")
        axes.legend()

    varied = {
        name
        for p in points
        for q in points
        for name in p["settings"] or {}
        if (q["settings"] or {}).get(name, p["settings"][name]) != p["settings"][name]
    }
    head = [
        "decoding",
        "exact match, %",
        "tokens/s",
        "tokens per forward",
        "first token, s",
        "last token, s",
        "memory, MB",
        "frontier",
    ]
    rows = []
    for p in points:
        way = "autoregressive"
        if p["settings"] is not None:
            way = (
                ", ".join(f"{name} {p['settings'][name]}" for name in sorted(varied) if name in p["settings"])
                or "as set"
            )
        memory = p["memory"] and p["memory"] / 1e6
        figures = [
            p[name] for name in ("exact_match", "tokens_per_second", "tokens_per_forward", "first_token", "last_token")
        ]
        rows.append([way, *figures, memory, p["on_frontier"]])
    return _plot(draw, "Speed and quality") + _table(head, rows)


def _calibration(results: dict[str, Any]) -> str:
    found = results.get("calibration")
    if not found:
        return ""

    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], "--", color="grey", label="perfect")
        axes.plot([c for c, _, _ in found["bins"]], [r for _, r, _ in found["bins"]], "o-", label="model")
        axes.set(xlabel="confidence", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1))
        axes.legend()

    table = _table(["confidence", "right", "tokens"], found["bins"])
    return _plot(draw, "Calibration of confidence") + f"<p>Expected calibration error {found['error']:.3f}.</p>" + table


def _eos(results: dict[str, Any]) -> str:
    found = results.get("eos")
    if not found:
        return ""

    def draw(axes: Any) -> None:
        pairs = [(a, b) for a, b in found["pairs"] if b is not None]
        longest = max([a for a, _ in found["pairs"]] + [b for _, b in pairs])
        axes.plot([0, longest], [0, longest], "--", color="grey")
        if pairs:
            axes.plot(*zip(*pairs, strict=True), "o", alpha=0.5)
        axes.set(xlabel="tokens of the reference", ylabel="tokens of the answer")

    text = f"<p>{found['ended']:.1f} % of the answers end, {found['accuracy']:.1f} % where the reference does.</p>"
    return _plot(draw, "Where answers end") + text


def _trace(results: dict[str, Any]) -> str:
    lines = []
    for number, words in enumerate(results.get("trace") or [], start=1):
        line = "".join(f'<span class="{escape(state)}">{escape(word)}</span>' for word, state in words)
        lines.append(f'<div class="trace">{number:>4}  {line}</div>')
    return "".join(lines)


def _samples(results: dict[str, Any]) -> str:
    samples = results.get("samples")
    return _table(list(samples[0]), [list(sample.values()) for sample in samples]) if samples else ""


def _settings(results: dict[str, Any]) -> str:
    values = {**results["settings"], **results["provenance"]}
    return _table(["setting", "value"], [(name, str(value)) for name, value in values.items()])
