"""Figures worked out by hand; calibration of models whose confidence is known to be right or wrong; ends, traces, and what a trainer logs."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from evaluation.test_likelihood import Oracle, Row, Whole
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import MarkovChain
from small_trainers import make
from transformers import AutoTokenizer, TrainerCallback
from transformers.modeling_outputs import CausalLMOutput

import llm_diffusion as ld
from llm_diffusion.data.tiny import tiny_dataset
from llm_diffusion.evaluation.answers import encode_prompts, evaluate_answers
from llm_diffusion.evaluation.metrics import (
    COLUMNS,
    AnswersCallback,
    ForeseenEndsCallback,
    calibration,
    denoising_trace,
    distinct_n,
    end_metrics,
    eos_positions,
    foresee_ends,
    ngrams,
    overlap,
    plot_ends,
    reference_rows,
    repetition_rate,
    variety,
    word_repetition_rate,
)
from llm_diffusion.models.checkpoints import TINY_MODEL_PATH


def test_figures_by_hand() -> None:
    assert ngrams("a b  c\nd", 2) == [("a", "b"), ("b", "c"), ("c", "d")]
    assert distinct_n(["a b a", "a c"], 1) == 3 / 5
    assert distinct_n(["a b a", "a c"], 2) == 1.0
    assert distinct_n(["a b a b"], 2) == 2 / 3
    assert distinct_n([""], 1) == 0.0
    # "a b" came before; a text of one word has no pair
    assert repetition_rate(["a b a b", "x"], 2) == pytest.approx(1 / 3)
    assert repetition_rate(["the cat sat on the cat sat on the mat"]) == pytest.approx(2 / 7)
    assert word_repetition_rate(["the the cat", "a a"]) == pytest.approx(2 / 3)
    assert word_repetition_rate(["a"]) == 0.0


def test_variety_has_them_all() -> None:
    assert variety(["a b a b", "x x"]) == {
        "distinct_1": 3 / 6,
        "distinct_2": 3 / 4,
        "repetition": 0.0,
        "word_repetition": 1 / 4,
    }


def test_references_are_checked() -> None:
    with pytest.raises(ValueError, match="one for each of the 2 texts"):
        overlap(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="number 1 is empty"):
        overlap(["a", "b"], ["a", " "])


def test_libraries() -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    texts = ["the cat sat on the mat today", "it is what it is said he"]
    same = overlap(texts, texts)
    assert same["bleu"] == pytest.approx(100) and same["rougeL"] == 1.0 and same["chrf"] == pytest.approx(100)
    assert "version:" in same["sacrebleu"]
    half = overlap(["a b c d", "w x"], ["a b e f", "y z"])
    assert half["rouge1"] == pytest.approx(0.25) and half["rouge2"] == pytest.approx(1 / 6)
    assert half["rougeL"] == pytest.approx(0.25) and half["bleu"] < 50


CHAIN = MarkovChain(n_states=4, length=16)


class Boaster(Whole):
    """The oracle, ten times as sure of itself."""

    def forward(self, *arguments, **keywords):
        return CausalLMOutput(logits=10 * super().forward(*arguments, **keywords).logits)


def chain_rows(n):
    return [Row(tuple(ids), 0, i) for i, ids in enumerate(CHAIN.sample(n, seed=3).tolist())]


def test_a_perfect_model_is_calibrated_and_a_boaster_is_not() -> None:
    rows = chain_rows(400)
    fair = calibration(Whole(CHAIN), rows, batch_size=100)
    assert fair.error < 0.02
    assert all(abs(c - r) < 0.06 for c, r, n in fair.bins if n > 1000) and sum(n for *_, n in fair.bins) > 5000
    boast = calibration(Boaster(CHAIN), rows, batch_size=100)
    assert boast.error > 0.15 and boast.bins[-1][0] > 0.98 > boast.bins[-1][1]


def test_calibration_does_not_depend_on_batches() -> None:
    rows, model = chain_rows(10), Oracle(CHAIN, attention="block", block_length=4, clean_context="block")
    small, large = calibration(model, rows, batch_size=3), calibration(model, rows, batch_size=10)
    assert small.error == pytest.approx(large.error, abs=1e-4)
    assert sum(n for *_, n in small.bins) == sum(n for *_, n in large.bins) > 100


def test_reference_rows_end_with_the_end_token(tiny) -> None:
    _, tokenizer = tiny
    (example,) = tiny_dataset(1, split="test")
    (row,) = reference_rows(tokenizer, [example], 1024)
    assert tokenizer.decode(row.ids[row.first :]) == example["messages"][-1]["content"] + tokenizer.eos_token
    (cut,) = reference_rows(tokenizer, [example], 8)
    assert len(cut.ids) == 8 and cut.ids == row.ids[-8:] and cut.first == max(1, 8 - (len(row.ids) - row.first))


def test_ends_of_answers(tiny) -> None:
    model, tokenizer = tiny
    examples = list(tiny_dataset(12, split="test"))
    report = evaluate_answers(model, tokenizer, examples, autoregressive=True, max_new_tokens=60)
    found = eos_positions(tokenizer, examples, report)
    right = [a == e["messages"][-1]["content"] for a, e in zip(report.answers, examples, strict=True)]
    assert all(a == b for (a, b), hit in zip(found["pairs"], right, strict=True) if hit) and sum(right) > 8
    assert found["accuracy"] >= 100 * sum(right) / 12
    short = evaluate_answers(model, tokenizer, examples, autoregressive=True, max_new_tokens=2)
    assert eos_positions(tokenizer, examples, short)["ended"] == 0


def test_the_trace_ends_with_the_answer(tiny) -> None:
    model, tokenizer = tiny
    (example,) = tiny_dataset(1, split="test")
    settings = {"max_new_tokens": 8, "steps": 4, "eos_early_stop": False}
    steps = denoising_trace(model, tokenizer, example, settings)
    assert len(steps) == 4 and all(len(words) == 8 for words in steps)
    batch = encode_prompts(tokenizer, [example["messages"][:1]])
    ids = ld.generate(model, **batch, **settings)[0, batch["input_ids"].shape[1] :]
    assert [word for word, _ in steps[-1]] == [tokenizer.decode([i]).replace("\n", " / ") for i in ids.tolist()]
    assert [sum(state == "new" for _, state in words) for words in steps] == [2, 2, 2, 2]
    assert [sum(state == "mask" for _, state in words) for words in steps] == [6, 4, 2, 0]


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
        predicted = logits.softmax(-1)[:, tokenizer.eos_token_id]
        places.append(predicted[length - 1].item())
        errors.append(abs(next((i + 1 for i in range(80) if predicted[i] >= 0.5), 81) - length))
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


SETTINGS = {"max_new_tokens": 8, "threshold": 0.9}


class Listener(TrainerCallback):
    """Stands where wandb, trackio and tensorboard stand: gets what they get."""

    def __init__(self) -> None:
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.logs.append(dict(logs))


@pytest.mark.parametrize("kinds", [("sort", "reverse"), ("sort",)])
def test_answers_reach_every_listener(tmp_path, tokenizer, kinds) -> None:
    examples, listener = list(tiny_dataset(6, split="test", kinds=kinds)), Listener()
    trainer = make(tmp_path, tokenizer, evaluation=tiny_dataset(4, split="test"))
    trainer.add_callback(AnswersCallback(trainer, examples, **SETTINGS))
    trainer.add_callback(listener)
    metrics = trainer.evaluate()
    (logged,) = [logs for logs in listener.logs if "eval_samples" in logs]
    report = evaluate_answers(trainer.model, trainer.processing_class, examples, **SETTINGS)
    assert logged["eval_exact_match"] == report.mean == metrics["eval_exact_match"]
    by_kind = {f"eval_exact_match_{kind}": report.exact_match[kind] for kind in kinds if len(kinds) > 1}
    assert {name: value for name, value in logged.items() if name.startswith("eval_exact_match_")} == by_kind
    assert logged["eval_tokens_per_forward"] == pytest.approx(report.tokens_per_forward)
    ends = eos_positions(trainer.processing_class, examples, report)["accuracy"]
    assert logged["eval_eos_accuracy"] == pytest.approx(ends)
    for example, answer in list(zip(examples, report.answers, strict=True))[:4]:
        assert f"{example['messages'][0]['content']} -> {answer} (reference:" in logged["eval_samples"]
    json.dumps(trainer.state.log_history)  # it is saved with every checkpoint


# -- trackers


TRACKERS = [name for name in ("tensorboard", "wandb", "trackio") if importlib.util.find_spec(name)]


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """A run of one step, offline, that reports to every tracker there is: its folder, and the examples it answers."""
    folder, examples = tmp_path_factory.mktemp("followed"), list(tiny_dataset(3, split="test"))
    places = {"TENSORBOARD_LOGGING_DIR": "tensorboard", "WANDB_DIR": "wandb", "TRACKIO_DIR": "trackio"}
    settings = {"report_to": TRACKERS, "project": "followed", "run_name": "one-step", "eval_strategy": "steps"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ({k: str(folder / v) for k, v in places.items()} | {"WANDB_MODE": "offline"}).items():
            patch.setenv(name, value)
        (folder / "wandb").mkdir()
        tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL_PATH)
        trainer = make(folder / "out", tokenizer, evaluation=tiny_dataset(4, split="test"), max_canvas=40, **settings)
        trainer.add_callback(AnswersCallback(trainer, examples, **SETTINGS))
        trainer.add_callback(ForeseenEndsCallback(trainer, examples, canvas=40, path=folder / "ends.png"))
        trainer.train()
        yield folder, examples
        if "wandb" in TRACKERS:
            import wandb

            wandb.finish()


def needs(tracker):
    return pytest.mark.skipif(tracker not in TRACKERS, reason=f"{tracker} is not installed")


FIGURES = {"train/nelbo", "train/masked_accuracy", "eval/nelbo", "eval/exact_match", "eval/end_top1"}


@needs("tensorboard")
def test_tensorboard_has_figures_samples_and_the_picture(followed) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, examples = followed
    read = EventAccumulator(str(folder / "tensorboard")).Reload()
    tags = read.Tags()
    assert FIGURES <= set(tags["scalars"]) and "eval/ends" in tags["images"]
    (samples,) = read.Tensors("eval/samples/text_summary")
    assert examples[0]["messages"][0]["content"] in samples.tensor_proto.string_val[0].decode()
    assert read.Images("eval/ends")[0].encoded_image_string[:4] == b"\x89PNG" and samples.step == 1


@needs("wandb")
def test_wandb_has_figures_the_answers_and_the_picture(followed) -> None:
    import wandb

    folder, examples = followed
    assert set(wandb.run.summary.keys()) >= FIGURES
    (table,) = folder.glob("wandb/**/media/table/eval/answers*.json")
    written = json.loads(table.read_text())
    assert written["columns"] == ["question", "answer", "reference"] and len(written["data"]) == len(examples)
    assert written["data"][0][::2] == [message["content"] for message in examples[0]["messages"]]
    assert len(list(folder.glob("wandb/**/media/images/eval/ends*.png"))) == 1


@needs("trackio")
def test_trackio_has_figures_the_answers_and_the_picture(followed) -> None:
    from trackio.sqlite_storage import SQLiteStorage

    folder, examples = followed
    logs = {name: value for row in SQLiteStorage.get_logs("followed", "one-step") for name, value in row.items()}
    assert set(logs) >= FIGURES
    assert [row["question"] for row in logs["eval/answers"]["_value"]] == [
        example["messages"][0]["content"] for example in examples
    ]
    assert list(folder.glob("trackio/media/**/*.png"))


def test_nothing_to_answer_is_refused(tmp_path, tokenizer) -> None:
    with pytest.raises(ValueError, match="`examples` are empty"):
        AnswersCallback(make(tmp_path, tokenizer), [])


@settings(max_examples=50, deadline=None, derandomize=True)
@given(curve=st.lists(st.floats(0, 1), min_size=1, max_size=9), data=st.data())
def test_metrics_of_the_end_of_one_answer(curve: list[float], data: st.DataObject) -> None:
    length = data.draw(st.integers(1, len(curve)))
    said = torch.tensor(curve)
    got = {name: value.item() for name, value in end_metrics(said[None], torch.tensor([length])).items()}
    here, highest = [], 0.0
    for p in said.tolist():
        here.append(max(p - highest, 0.0))
        highest = max(highest, p)
    better = sum(h > here[length - 1] or (h == here[length - 1] and i < length - 1) for i, h in enumerate(here))
    median = next((i + 1 for i, p in enumerate(said.tolist()) if p >= 0.5), len(curve) + 1)
    want = {"probability": said[length - 1].item(), "top1": better == 0, "reciprocal_rank": 1 / (1 + better)}
    assert got == pytest.approx({**want, "error": median - length}, abs=1e-6)
