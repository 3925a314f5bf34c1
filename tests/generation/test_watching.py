"""The picture of a text as it forms: what it shows, when, and that it is a well-formed file on its own."""

import io
import re
import shlex
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

import llm_diffusion as ld
from llm_diffusion.generation.watching import HIDDEN, Watch, shaded
from llm_diffusion.main import cli

SPACE = "{http://www.w3.org/2000/svg}"


def watch(tiny, console=None, **settings):
    model, tokenizer = tiny
    view = Watch(tokenizer, tokenizer.mask_token_id, console)
    batch = tokenizer("Sort the letters: k d e a", return_tensors="pt")
    output = ld.generate(
        model,
        **batch,
        streamer=view,
        return_dict_in_generate=True,
        output_history=True,
        **{"max_new_tokens": 10, "eos_token_id": None, **settings},
    )
    return view, output, batch["input_ids"].shape[1]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"block_length": 4},
        {"threshold": 0.2, "editing_threshold": 0.1, "block_length": 4},
        {"revision": "p2", "steps": 20},
    ],
    ids=str,
)
def test_frames_are_the_history(tiny, settings):
    view, output, start = watch(tiny, **settings)
    *frames, last = view.frames
    for frame, canvas, sure in zip(frames, output.history, output.confidence, strict=True):
        assert [token for token, _ in frame] == canvas[0, start:].tolist()
        assert [probability for _, probability in frame] == pytest.approx(sure[0, start:].tolist())
    assert last == frames[-1]


@pytest.mark.parametrize(
    "settings", [{}, {"revision": "p2", "steps": 20}, {"eos_token_id": list(range(5, 200))}], ids=str
)
def test_the_picture_shows_every_frame(tiny, settings):
    """Evaluates the animation: at the time of a frame exactly its tokens and masks are visible."""
    tokenizer = tiny[1]
    view, output, start = watch(tiny, **settings)
    text = view.svg(seconds_per_step=0.5)
    root = ElementTree.fromstring(text)
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "") and len(text) < 20_000
    style = root.find(f"{SPACE}style").text
    total = len(view.frames) + 8
    assert f"{total * 0.5:.2f}s" in style
    groups = {}
    for group in root.iter(f"{SPACE}g"):
        keys = re.search(r"@keyframes k" + group.get("class")[1:] + r"\{(.*?\})\}", style).group(1)
        marks = [(float(at), float(value)) for at, value in re.findall(r"([\d.]+)%\{opacity:(\d)\}", keys)]
        groups[group.get("class")] = (group, marks)
    n = len(view.frames[-1])
    for number, frame in enumerate(view.frames):
        at = 100 * (number + 0.5) / total
        visible = [
            element
            for group, marks in groups.values()
            if max((time, value) for time, value in marks if time <= at)[1] == 1
            for element in group
        ]
        masks = [element for element in visible if element.tag == f"{SPACE}rect"]
        assert len(masks) == sum(token == tokenizer.mask_token_id for token, _ in frame[:n])
        words = [element.text for element in visible if element.tag == f"{SPACE}text"]
        want = [
            tokenizer.decode([token]).replace("\n", " ")
            for token, _ in frame[:n]
            if token not in tokenizer.all_special_ids
        ]
        assert sorted(words) == sorted(want)
    # Without animation, as in print, the final text stands there.
    still = [group for name, (group, _) in groups.items() if f".{name}{{opacity:1" in style]
    assert sum(len(group) for group in still) == len(want)


def test_colours_say_how_sure_it_was(tiny):
    tokenizer = tiny[1]
    token = tokenizer("a")["input_ids"][0]
    frame = [
        (token, 0.99),
        (token, 0.9),
        (token, 0.6),
        (token, 0.1),
        (tokenizer.mask_token_id, 0.0),
        (tokenizer.eos_token_id, 1.0),
    ]
    text = shaded(tokenizer, frame, tokenizer.mask_token_id)
    assert [str(span.style) for span in text.spans] == ["green", "yellow", "dark_orange", "red", "dim"]
    assert text.plain.endswith(HIDDEN)


def test_the_terminal_shows_it(tiny):
    file = io.StringIO()
    view, _, _ = watch(tiny, Console(file=file, force_terminal=True, width=100))
    assert file.getvalue().count(HIDDEN) > 10 and "\x1b[" in file.getvalue()
    final = shaded(tiny[1], view.frames[-1], tiny[1].mask_token_id).plain
    assert final.splitlines()[0].strip() in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())


def test_one_text_at_a_time(tiny):
    view = Watch(tiny[1], tiny[1].mask_token_id)
    with pytest.raises(ValueError, match="one text.*got 2"):
        view.put(torch.zeros(2, 3))


def test_the_picture_of_the_docs_is_made_by_the_command_beside_it(tmp_path):
    """On the embedded model; the recorded one is a trained model's."""
    docs = Path(__file__).parents[2] / "docs"
    page = (docs / "decoding.md").read_text()
    (line,) = re.findall(r"^llm-diffusion generate .*--svg docs/forming\.svg$", page, flags=re.MULTILINE)
    words = shlex.split(line)[1:]
    made = tmp_path / "forming.svg"
    words[1], words[-1] = "tiny", str(made)
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
    assert "![" in page and "](forming.svg)" in page
    recorded = docs / "forming.svg"
    for picture in (made, recorded):
        root, text = ElementTree.parse(picture).getroot(), picture.read_text()
        assert root.tag == SPACE + "svg" and "http" not in text.replace("http://www.w3.org/2000/svg", "")
        assert text.count("@keyframes") > 3 and root.find(f".//{SPACE}rect[@class='m']") is not None
    assert recorded.stat().st_size < 60_000
