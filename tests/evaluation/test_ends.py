"""What is foreseen of answers' ends: the table against single rows, the picture, the callback."""

from __future__ import annotations

import pytest
import torch
from small_trainers import make

from llm_diffusion.data.tiny import tiny_dataset
from llm_diffusion.evaluation.callbacks import ForeseenEndsCallback
from llm_diffusion.evaluation.ends import COLUMNS, foresee_ends, plot_ends


def test_the_table_is_the_mean_of_single_rows(tiny) -> None:
    """Row by row: prompt, canvas, one plain forward; nothing shown."""
    model, tokenizer = tiny
    examples = list(tiny_dataset(12, split="test"))
    report = foresee_ends(model, tokenizer, examples, canvas=80)
    places, true, errors = [], [], []
    for example in examples:
        prompt = tokenizer.apply_chat_template(example["messages"][:-1], add_generation_prompt=True, return_dict=False)
        length = len(tokenizer(example["messages"][-1]["content"])["input_ids"]) + 1
        ids = torch.tensor([prompt + [tokenizer.mask_token_id] * 80])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double()
        logits[:, tokenizer.mask_token_id] = -torch.inf
        said = logits.softmax(-1)[:, tokenizer.eos_token_id]
        places.append(said[length - 1].item())
        errors.append(abs(next((i + 1 for i in range(80) if said[i] >= 0.5), 81) - length))
        true.append(length)
    assert report.examples == 12 and [length for _, length in report.curves] == true[:8]
    assert report.table[0.0]["probability"] == pytest.approx(sum(places) / 12, rel=1e-3)
    assert report.table[0.0]["error"] == pytest.approx(sum(errors) / 12, rel=1e-6)
    assert report.table[0.0]["over"] + report.table[0.0]["under"] <= 1
    assert set(report.table) == {0.0, 0.25, 0.5, 0.75} and all(
        set(row) == set(COLUMNS) for row in report.table.values()
    )
    again = foresee_ends(model, tokenizer, examples, canvas=80)
    assert again.table == report.table and "shown" in str(report)


def test_answers_longer_than_the_canvas_are_left_out(tiny) -> None:
    examples = list(tiny_dataset(12, split="test"))
    assert foresee_ends(*tiny, examples, canvas=24, revealed=(0.0,)).examples < 12
    with pytest.raises(ValueError, match="`canvas`=2"):
        foresee_ends(*tiny, examples, canvas=2)


def test_the_picture_and_the_callback(tmp_path, tokenizer) -> None:
    trainer = make(tmp_path, tokenizer, max_canvas=40, first_step_share=0.5, evaluation=tiny_dataset(4, split="test"))
    examples = list(tiny_dataset(6, split="test"))
    trainer.add_callback(ForeseenEndsCallback(trainer, examples, canvas=40, path=tmp_path / "ends.png"))
    trainer.evaluate()
    logged = {name: value for row in trainer.state.log_history for name, value in row.items()}
    report = foresee_ends(trainer.model, trainer.processing_class, examples, canvas=40, revealed=(0.0,))
    assert {f"eval_end_{name}": logged[f"eval_end_{name}"] for name in COLUMNS} == {
        f"eval_end_{name}": value for name, value in report.table[0.0].items()
    }
    assert (tmp_path / "ends.png").read_bytes()[:4] == b"\x89PNG"
    plot_ends(report, tmp_path / "again.png")
