"""The page: well-formed, self-contained, with every figure it was given, and nothing it was not."""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from rich.console import Console

from llm_diffusion.evaluation.report import page, show

VOID = {"meta", "img", "br"}
POINT = {"tokens_per_forward": 2.5, "first_token": 0.01, "last_token": 0.2, "memory": None}
RESULTS = {
    "settings": {"model": "<tiny>", "seed": 7, "decoding": {"threshold": 0.9}},
    "provenance": {"git_revision": "abc123", "torch": "2.13.0"},
    "notes": ["No BLEU & ROUGE"],
    "models": {
        "AR base": {
            "likelihood": {"nats_per_token": 1.25, "estimator": "autoregressive"},
            "tasks": {"gsm8k, exact_match": 0.5},
        },
        "converted": {
            "likelihood": {"nats_per_token": 1.5, "standard_error": 0.01, "estimator": "exact_count"},
            "answers": {"exact match, mean, %": 91.25},
        },
    },
    "levels": [(0.5, 0.75, 100), (1.0, 2.5, 50)],
    "frontier": [
        {
            "label": label,
            "settings": settings,
            "exact_match": match,
            "tokens_per_second": speed,
            "on_frontier": best,
            **POINT,
        }
        for label, settings, match, speed, best in (
            ("autoregressive", None, 99.0, 100.0, True),
            ("threshold 0.5", {"threshold": 0.5}, 90.0, 300.0, True),
            ("threshold 0.9", {"threshold": 0.9}, 89.0, 200.0, False),
        )
    ],
    "calibration": {"bins": [(0.5, 0.45, 10), (0.95, 0.9, 30)], "error": 0.05},
    "eos": {"pairs": [(5, 5), (6, 4), (7, None)], "accuracy": 33.3, "ended": 66.7},
    "trace": [[("a", "new"), ("_", "mask")], [("a", "old"), ("<b>", "new")]],
    "paired": [
        {
            "what": "prompts: all kinds",
            "n": 77,
            "shares": {"AR base": (50.0, 40.25, 60.0), "converted": (75.0, 61.5, 88.0)},
            "differences": [
                {
                    "first": "AR base",
                    "second": "converted",
                    "points": 25.0,
                    "interval": (12.5, 37.5),
                    "only_first": 3,
                    "only_second": 22,
                    "p_value": 0.00015,
                }
            ],
        }
    ],
    "worked": {
        name: {
            "summary": {"worked answers": 1, "first wrong step, mean": None},
            "answers": [
                {
                    "question": "How many?",
                    "answer": f"answer of {name}",
                    "right": name == "AR base",
                    "first_wrong_step": None if name == "AR base" else 4,
                    "superfluous": [0, 8],
                    "judge": {"right": False, "first_wrong_step": 6},
                }
            ],
        }
        for name in ("AR base", "converted")
    },
    "samples": [{"prompt": "Is 1 < 2?", "reference": "yes", "converted": "<script>alert(1)</script>"}],
}


class Page(HTMLParser):
    """Refuses tags that do not close, and collects what a reader sees."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.texts, self.images, self.tags = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def whole() -> str:
    return page(RESULTS)


def test_the_first_line_says_what_is_compared(whole) -> None:
    assert "<h1>Evaluation of &lt;tiny&gt;: converted beside AR base</h1>" in whole


def test_every_figure_is_on_the_page(whole) -> None:
    shown = Page(whole)
    text = "|".join(filter(str.strip, shown.texts))
    figures = ("1.25", "1.5", "0.01", "91.25", "0.75", "Expected calibration error 0.050")
    names = ("exact_count", "gsm8k, exact_match", "autoregressive", "threshold 0.5", "AR base", "abc123", "<b>")
    rows = (
        "66.7 % of the answers end, 33.3 %",
        "No BLEU & ROUGE",
        "prompts: all kinds|77|50.0 [40.2, 60.0]|75.0 [61.5, 88.0]",
        "prompts: all kinds|converted - AR base|+25.0 [+12.5, +37.5]|3|22|0.00015",
        "How many?|AR base|answer of AR base|yes|–|1, 9|no|7",
        "How many?|converted|answer of converted|no|5|1, 9|no|7",
    )
    for wanted in (*figures, *names, *rows):
        assert wanted in text, wanted
    assert "<script>alert(1)</script>" in shown.texts and "script" not in shown.tags  # shown, not run


def test_the_terminal_has_the_figures() -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    show(RESULTS, console)
    text = console.export_text()
    for wanted in ("91.25", "50.0 [40.2, 60.0]", "+25.0 [+12.5, +37.5]", "0.00015", "McNemar", "worked answers"):
        assert wanted in text, wanted
    assert "answer of AR base" not in text


def test_pictures_are_inside_and_drawn(whole) -> None:
    shown = Page(whole)
    assert [image["alt"] for image in shown.images] == [
        "Loss by noise level",
        "Speed and quality",
        "Calibration of confidence",
        "Where answers end",
    ]
    for image in shown.images:
        kind, _, data = image["src"].partition(",")
        svg = ElementTree.fromstring(base64.b64decode(data))
        assert kind == "data:image/svg+xml;base64" and svg.tag.endswith("svg")
        assert len(svg.findall(".//{http://www.w3.org/2000/svg}path")) > 5
    assert not re.findall(r'(?:src|href)="(?!data:)', whole)  # nothing beside it


def test_the_same_results_give_the_same_page(whole) -> None:
    assert page(RESULTS) == whole


@pytest.mark.parametrize("section", ["levels", "frontier", "calibration", "eos", "trace", "samples", "worked"])
def test_sections_without_figures_are_left_out(section) -> None:
    empty = {"settings": {}, "provenance": {}, "models": {}}
    assert Page(page({**empty, section: RESULTS[section]})).tags.count("h2") == 2 + (
        section == "worked"
    )  # and the settings


def test_one_model_alone_is_compared_with_nobody() -> None:
    row = {**RESULTS["paired"][0], "shares": {"AR base": (50.0, 40.0, 60.0)}, "differences": []}
    shown = Page(page({"settings": {}, "provenance": {}, "models": {"AR base": {}}, "paired": [row]}))
    assert "50.0 [40.0, 60.0]" in shown.texts and "p" not in shown.texts


def test_an_almost_empty_evaluation_has_a_page() -> None:
    shown = Page(page({"settings": {}, "provenance": {}, "models": {"AR base": {}}, "notes": []}))
    assert shown.tags.count("h2") == 1 and not shown.images


@pytest.mark.slow
def test_a_browser_draws_it(tmp_path, whole) -> None:
    """Headless, where there is a browser: every picture is decoded, and nothing is fetched."""
    browser = next((found for name in ("chromium", "google-chrome") if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no chromium here")
    check = (
        "<script>onload = () => { document.body.dataset.drawn = [...document.images].filter(i => i.naturalWidth > 100).length;"
        " document.body.dataset.fetched = performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length }"
        "</script></body>"
    )
    (tmp_path / "report.html").write_text(whole.replace("</body>", check))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    dom = subprocess.run(
        [browser, *options, (tmp_path / "report.html").as_uri()], capture_output=True, text=True, timeout=120
    ).stdout
    assert 'data-drawn="4"' in dom and 'data-fetched="0"' in dom
