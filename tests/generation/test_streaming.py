"""Streamers: transformers' own, what each is told and when; and the picture of a text as it forms."""

import io
import re
import shlex
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from transformers import TextDiffusionStreamer, TextStreamer
from transformers.generation.streamers import BaseStreamer

import llm_diffusion as ld
from llm_diffusion.generation.streaming import HIDDEN, Watch, generate_watched
from llm_diffusion.main import cli

MASK = 31


class Recorder(BaseStreamer):
    """Keeps what is put, in order, and the drafts with their confidence."""

    def __init__(self):
        self.puts, self.drafts, self.order, self.ended = [], [], [], 0

    def put(self, value):
        self.puts.append(value.tolist())
        self.order.append("put")

    def put_draft(self, value, confidence=None):
        self.drafts.append((value.tolist(), confidence))
        self.order.append("draft")

    def end(self):
        self.ended += 1


RULES = [
    {},
    {"threshold": 0.3},
    {"threshold": 0.05, "editing_threshold": 0.1},
    {"revision": "p2", "steps": 24},
]


def test_revised_tokens_of_a_sized_canvas_are_put_when_nothing_changes_them(random_diffuser):
    """Each canvas counts its blocks from its own start."""
    common = {"max_new_tokens": 12, "block_length": 4, "length_quantile": 0.01, "initial_length": 2, "length_margin": 2}
    for seed in range(6):
        recorder = Recorder()
        ids = ld.generate(
            random_diffuser(True, seed),
            torch.tensor([[11, 12, 13]]),
            streamer=recorder,
            eos_token_id=29,
            suppress_tokens=[29],
            revision="remdm-rescale",
            eta=0.9,
            remasking="random",
            steps=24,
            **common,
        )
        assert [token for block in recorder.puts for token in block[0]] == ids[0].tolist()


@pytest.mark.parametrize("settings", RULES, ids=str)
def test_blocks_are_put_when_nothing_changes_them(random_diffuser, settings):
    prompt = torch.tensor([[11, 12, 13]])
    common = {"max_new_tokens": 10, "block_length": 4, "eos_token_id": None, "output_history": True}
    for seed in range(4):
        recorder = Recorder()
        output = ld.generate(
            random_diffuser(True, seed), prompt, streamer=recorder, return_dict_in_generate=True, **common, **settings
        )
        first, *blocks = recorder.puts
        assert first == prompt.tolist() and recorder.ended == 1
        ends = [sum(len(block[0]) for block in blocks[: i + 1]) for i in range(len(blocks))]
        assert ends[0] == 4 and set(ends) <= {4, 8, 10}
        assert sum((block[0] for block in blocks), []) == output.sequences[0, 3:].tolist()
        assert recorder.order[-1] == "put"
        lengths = [len(draft[0]) for draft, _ in recorder.drafts]
        assert set(lengths) <= {10, 6, 2} and 6 in lengths, "blocks came late"
        # Every draft is of what was not put yet, with a probability for whatever is no mask.
        for (draft, confidence), canvas in zip(recorder.drafts, output.history, strict=True):
            assert canvas[0, -len(draft[0]) :].tolist() == draft[0]
            assert torch.equal(confidence > 0, torch.tensor(draft) != MASK)


@pytest.mark.parametrize("block_length", [None, 4])
def test_the_hosts_text_streamer_prints_the_answer(tiny, capsys, block_length):
    model, tokenizer = tiny
    batch = tokenizer("Sort the letters: k d e a", return_tensors="pt")
    settings = {"max_new_tokens": 10, "block_length": block_length}
    answer = model.generate(**batch, **settings)[0, batch["input_ids"].shape[1] :]
    model.generate(**batch, **settings, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out == tokenizer.decode(answer) + "\n"


def test_the_hosts_diffusion_streamer_prints_drafts_and_the_answer(tiny, capsys):
    model, tokenizer = tiny
    batch = tokenizer("Sort the letters: k d e a", return_tensors="pt")
    settings = {"max_new_tokens": 6, "eos_token_id": None}
    answer = model.generate(**batch, **settings)[0, batch["input_ids"].shape[1] :]
    model.generate(**batch, **settings, streamer=TextDiffusionStreamer(tokenizer, skip_prompt=True))
    out = capsys.readouterr().out
    assert out.count("\033[33m") == 6  # yellow drafts, one a step
    assert "<|mask|>" in out.split("\0338")[0]
    assert out.split("\033[J")[-1] == tokenizer.decode(answer) + "\n"  # what stays


def test_several_rows_are_put_at_the_end(random_diffuser):
    recorder, ids = Recorder(), torch.tensor([[11, 12], [13, 14]])
    answer = ld.generate(random_diffuser(True), ids, streamer=recorder, max_new_tokens=8, block_length=2)
    assert recorder.puts == [ids.tolist(), answer[:, 2:].tolist()]


def test_blocks_of_a_block_model_are_counted_from_the_start_of_the_text(random_llama, tokenizer):
    model = ld.convert_to_diffusion(random_llama(), tokenizer, attention="block", block_length=4)
    recorder = Recorder()
    ids, mask = torch.tensor([[0, 0, 21, 22, 23]]), torch.tensor([[0, 0, 1, 1, 1]])
    answer = ld.generate(model, ids, mask, streamer=recorder, max_new_tokens=10, eos_token_id=None)
    assert [len(block[0]) for block in recorder.puts[1:]] == [1, 4, 4, 1]
    assert sum((block[0] for block in recorder.puts[1:]), []) == answer[0, 5:].tolist()


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


def visible_groups(root, seconds):
    """The groups that the animation shows at a time."""
    style = root.find(f"{SPACE}style").text
    total = float(re.search(r"animation:frame ([\d.]+)s", style).group(1))
    shown = {
        kind: float(re.search(kind + r"\{0%\{visibility:visible\}([\d.]+)%", style).group(1))
        for kind in ("frame", "last")
    }
    groups = root.findall(f"{SPACE}g")
    delays = [float(re.search(r"-?[\d.]+", group.get("style")).group()) for group in groups]
    phases = [100 * ((seconds - delay) % total) / total for delay in delays]
    ends = [shown["frame"]] * (len(groups) - 1) + [shown["last"]]
    return [group for group, phase, end in zip(groups, phases, ends, strict=True) if phase < end]


@pytest.mark.parametrize(
    "settings", [{}, {"revision": "p2", "steps": 20}, {"eos_token_id": list(range(5, 200))}], ids=str
)
def test_the_picture_shows_every_frame(tiny, settings):
    """At the time of a frame exactly its tokens and masks are visible, each where the final text has its own."""
    tokenizer = tiny[1]
    view, output, start = watch(tiny, **settings)
    text = view.svg(seconds_per_step=0.5, columns=12)
    root = ElementTree.fromstring(text)
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "") and len(text) < 20_000

    def word(token):
        return "" if token in tokenizer.all_special_ids else tokenizer.decode([token]).replace("\n", " ")

    widths = [
        max(len(tokenizer.decode([token]).rstrip("\n")), 1) * (token not in tokenizer.all_special_ids) or 1
        for token, _ in view.frames[-1]
    ]
    for number, frame in [*enumerate(view.frames), (len(view.frames) + 7, view.frames[-1])]:
        (group,) = visible_groups(root, (number + 0.5) * 0.5)
        lines = ["".join(line.itertext()) for line in group]
        assert max(map(len, lines)) <= 12
        cells = (
            HIDDEN * n if token == tokenizer.mask_token_id else word(token)[:n].ljust(n)
            for n, (token, _) in zip(widths, frame, strict=False)
        )
        assert "".join(lines) == "".join(cells)
    # Without animation, as in print, the final text stands there.
    assert "g:last-child{visibility:visible" in text and group is root.findall(f"{SPACE}g")[-1]


def test_colours_say_how_sure_it_was(tiny):
    tokenizer, file = tiny[1], io.StringIO()
    view = Watch(tokenizer, tokenizer.mask_token_id, Console(file=file, force_terminal=True, color_system="truecolor"))
    view.put(torch.zeros(1, 3))
    token = tokenizer("a")["input_ids"][0]
    ids = torch.tensor([[token] * 4 + [tokenizer.mask_token_id, tokenizer.eos_token_id]])
    view.put_draft(ids, torch.tensor([[0.99, 0.9, 0.6, 0.1, 0.0, 1.0]]))
    assert re.findall(r"\x1b\[([\d;]+)m([^\x1b\s])", file.getvalue()) == [
        *(("32", "a"), ("33", "a"), ("38;5;208", "a"), ("31", "a"), ("2", HIDDEN))
    ]
    shades = re.findall(r'class="(c\d)">a<', view.svg())
    assert shades == ["c0", "c1", "c2", "c3"] and f"</tspan>{HIDDEN}" in view.svg()


def test_the_terminal_shows_it(tiny):
    file = io.StringIO()
    view, output, start = watch(tiny, Console(file=file, force_terminal=True, width=100))
    assert file.getvalue().count(HIDDEN) > 10 and "\x1b[" in file.getvalue()
    final = tiny[1].decode(output.sequences[0, start:], skip_special_tokens=True)
    assert final.splitlines()[0].strip() in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())


def test_one_text_at_a_time(tiny):
    view = Watch(tiny[1], tiny[1].mask_token_id)
    with pytest.raises(ValueError, match="streamer"):
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
        assert "@keyframes" in text and len(root.findall(f"{SPACE}g")) > 3
    assert recorded.stat().st_size < 60_000


def test_rows_of_the_embedding_that_are_no_tokens_are_shown_as_nothing(tiny):
    view = Watch(tiny[1], tiny[1].mask_token_id)
    assert view.cells([(len(tiny[1]) + 5, 0.9)]) == [("", 1)]


def test_a_text_that_is_broken_off_gives_the_cursor_back(tiny):
    class BrokenOff:
        tokenizer, settings = tiny[1], {"mask_token_id": tiny[1].mask_token_id}

        def generate(self, prompt, streamer):
            streamer.put(torch.tensor([[5]]))
            streamer.put_draft(torch.tensor([[5, 6]]))
            raise KeyboardInterrupt

    file = io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        list(generate_watched(BrokenOff(), ["x"], Console(file=file, force_terminal=True)))
    assert file.getvalue().rindex("\x1b[?25h") > file.getvalue().rindex("\x1b[?25l")
