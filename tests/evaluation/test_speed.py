"""A drafter beside its base: the same texts, counted as they were decoded, and shown so."""

import io

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM

from llm_diffusion.evaluation.report import coloured_by_pass, speed_table
from llm_diffusion.evaluation.speed import Timed, compare_decoding, first_gap, widest_gap
from llm_diffusion.generation.generate import generate_autoregressive
from llm_diffusion.models.checkpoints import TINY_MODEL_PATH
from llm_diffusion.models.loading import load_diffusion_model
from llm_diffusion.models.special_tokens import prompt_ids

PROMPTS = [[{"role": "user", "content": "Sort: 5 3 9"}], "Reverse: a b c"]


@pytest.fixture(scope="module")
def timed():
    model, tokenizer = load_diffusion_model("tiny", attention="lossless", device="cpu")
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).eval()
    drafters = {"ahead": {"draft_outcomes": 1}, "default": {}}
    return model, tokenizer, compare_decoding(model, tokenizer, PROMPTS, 12, drafters)


def test_every_way_decodes_the_base_s_text(timed):
    model, tokenizer, ways = timed
    assert len(ways) == 4
    for number, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt_ids(tokenizer, prompt)])
        want = generate_autoregressive(model, ids, max_new_tokens=12, do_sample=False)
        assert all(torch.equal(way.ids[number], want) for way in ways.values())
    for name in ("ahead", "default"):
        assert sum(map(sum, ways[name].accepted)) == ways[name].tokens
        assert ways[name].tokens_per_second > 0


def test_where_texts_part_the_base_s_two_best_logits_are_compared(timed):
    model, tokenizer, ways = timed
    assert widest_gap(model, ways) is None
    base = AutoModelForCausalLM.from_pretrained(TINY_MODEL_PATH, dtype=torch.float32)
    others, gaps = Timed(), []
    for number, want in enumerate(next(iter(ways.values())).ids):
        found, at = want.clone(), len(prompt_ids(tokenizer, PROMPTS[number]))
        found[0, at] += 1
        with torch.no_grad():
            best, second = base(input_ids=want).logits[0, at - 1].sort(descending=True).values[:2]
        gaps.append(float(best - second))
        assert first_gap(model, want, found) == pytest.approx(gaps[-1], abs=1e-4)
        others.ids.append(found[:, : at + 1])
    assert widest_gap(model, ways | {"other": others}) == pytest.approx(max(gaps), abs=1e-4)


def test_it_is_shown(timed):
    _, tokenizer, ways = timed
    shown = io.StringIO()
    Console(file=shown, width=120).print(speed_table(ways))
    assert shown.getvalue().count("2 of 2") == 4 and "prompt lookup" in shown.getvalue()
    text, way = coloured_by_pass(tokenizer, ways["ahead"]), ways["ahead"]
    assert text.plain == tokenizer.decode(way.ids[0][0, -sum(way.accepted[0]) :].tolist())
    assert len(text.spans) == len(way.accepted[0])
