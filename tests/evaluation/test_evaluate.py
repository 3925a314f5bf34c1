"""Everything together: figures are those of the parts, every setting is in the file, and two processes find what one finds."""

from __future__ import annotations

import copy
import json
import math
import re

import pytest
from accelerate import PartialState
from rich.console import Console
from small_trainers import make
from transformers import AutoTokenizer

import llm_diffusion as ld
from llm_diffusion import UserError
from llm_diffusion.data.tiny import tiny_dataset
from llm_diffusion.evaluation.answers import evaluate_answers
from llm_diffusion.evaluation.evaluate import (
    BASE,
    CONVERTED,
    SAME_WEIGHTS,
    provenance,
    read_prompts,
    read_texts,
    run,
    task_figures,
)
from llm_diffusion.evaluation.likelihood import likelihood
from llm_diffusion.evaluation.metrics import AnswersCallback
from llm_diffusion.evaluation.report import write_report
from llm_diffusion.evaluation.statistics import compared_answers
from llm_diffusion.main import cli
from llm_diffusion.models.checkpoints import TINY_MODEL_PATH
from llm_diffusion.models.record import update_record
from llm_diffusion.reasoning.problems import read_problem

TEXTS = ["Tom has 23 apples. Tom gets 45 more.", "Sort the letters: k d e a"]


@pytest.fixture(scope="module")
def trained(tiny):
    """The embedded model with a record of a trained model: what its figures are does not matter here."""
    model, tokenizer = copy.deepcopy(tiny)
    update_record(model, conversion_steps=1)
    return model, tokenizer


@pytest.fixture(scope="module")
def results(trained):
    examples = list(tiny_dataset(6, split="test"))
    decoding = {"max_new_tokens": 8, "threshold": 0.9, "block_length": 8}
    options = {"n_samples": 16, "seed": 3, "batch_size": 5, "axes": {"threshold": [0.5, 0.9]}}
    return ld.evaluate(*trained, texts=TEXTS, examples=examples, decoding=decoding, **options)


def test_figures_are_those_of_the_parts(results, trained) -> None:
    bound = likelihood(*trained, TEXTS, n_samples=16, seed=3)
    mine, base = results["models"][CONVERTED], results["models"][SAME_WEIGHTS]
    assert mine["likelihood"]["nats_per_token"] == pytest.approx(bound.nats_per_token, abs=1e-4)
    assert mine["likelihood"]["standard_error"] == pytest.approx(bound.standard_error, abs=1e-4)
    exact = likelihood(*trained, TEXTS, autoregressive=True)
    assert base["likelihood"]["bits_per_byte"] == pytest.approx(exact.bits_per_byte, abs=1e-4)
    report = evaluate_answers(
        *trained, list(tiny_dataset(6, split="test")), max_new_tokens=8, threshold=0.9, block_length=8, seed=3
    )
    assert mine["answers"]["exact match, mean, %"] == report.mean
    assert [sample[CONVERTED] for sample in results["samples"]] == report.answers
    assert len(results["frontier"]) == 3 and results["frontier"][0]["settings"] is None
    assert results["calibration"]["bins"] and len(results["eos"]["pairs"]) == 6 and results["trace"]


def test_models_are_compared_answer_by_answer(results, trained) -> None:
    """On the very answers that are scored."""
    examples = list(tiny_dataset(6, split="test"))
    settings = {"max_new_tokens": 8, "threshold": 0.9, "block_length": 8, "seed": 3}
    answers = {
        SAME_WEIGHTS: evaluate_answers(*trained, examples, autoregressive=True, max_new_tokens=8).answers,
        CONVERTED: evaluate_answers(*trained, examples, **settings).answers,
    }
    assert results["paired"] == compared_answers([read_problem(example) for example in examples], answers, seed=3)
    (arithmetic,) = results["worked"][CONVERTED]["answers"]
    assert arithmetic["answer"] == answers[CONVERTED][0]


def test_several_models_answer_the_same_problems(trained, tiny) -> None:
    """Each with its own decoding, taken one after the other; the first is looked into; one that was never trained is decoded as AR."""
    examples, taken = list(tiny_dataset(3, split="test")), []

    def others():
        for name, loaded, steps in (("b", trained, 2), ("c", tiny, 1)):
            taken.append(name)
            yield name, loaded, {"max_new_tokens": 8, "steps": steps}

    decoding = {"max_new_tokens": 8, "steps": 4}
    found = ld.evaluate(*trained, examples=examples, decoding=decoding, name="a", others=others())
    assert list(found["models"]) == [SAME_WEIGHTS, "a", "b", "c"] and taken == ["b", "c"]
    for name, settings in (("a", decoding), ("b", {"max_new_tokens": 8, "steps": 2})):
        assert [row[name] for row in found["samples"]] == evaluate_answers(*trained, examples, **settings).answers
    assert [row["c"] for row in found["samples"]] == [row[SAME_WEIGHTS] for row in found["samples"]]
    assert found["notes"] == [
        "c is not trained as a diffusion model: it is evaluated as the autoregressive model it is."
    ]
    assert len(found["paired"][-1]["differences"]) == 6 and len(found["trace"]) == 4


def test_every_setting_is_written(results, tmp_path) -> None:
    write_report(results, tmp_path / "out")
    read = json.loads((tmp_path / "out" / "results.json").read_text())
    settings = read["settings"]
    assert settings["decoding"] == {"max_new_tokens": 8, "threshold": 0.9, "block_length": 8, "seed": 3}
    assert (settings["estimator"], settings["n_samples"], settings["seed"]) == ("exact_count", 16, 3)
    assert settings["diffusion"]["attention"] == "bidirectional" and settings["window"] == 1024
    assert {"git_revision", "torch", "transformers", "python", "device", "time"} <= set(read["provenance"])
    assert "<h2>Calibration of confidence</h2>" in (tmp_path / "out" / "report.html").read_text()


def test_nothing_is_half_written(results, tmp_path) -> None:
    with pytest.raises(TypeError):
        write_report({**results, "odd": object()}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_revision_is_the_checkouts() -> None:
    found = provenance("cpu")
    assert found["llm_diffusion"] and found["device"] == "cpu"
    assert found["git_revision"] is None or len(found["git_revision"].removesuffix("-dirty")) == 40


def test_an_untrained_model_is_evaluated_as_ar_with_a_note(tiny) -> None:
    found = ld.evaluate(*tiny, texts=TEXTS)
    assert list(found["models"]) == [BASE] and "evaluated as the autoregressive model" in found["notes"][0]


def test_a_base_of_its_own_stands_beside(tiny, trained) -> None:
    found = ld.evaluate(*trained, texts=TEXTS, base=tiny, n_samples=8)
    assert list(found["models"]) == [BASE, CONVERTED]


def test_metrics_of_the_harness_by_name() -> None:
    found = {"a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": "N/A"}, "b": {"exact_match,strict-match": 1}}
    assert task_figures(found) == {"a, acc": 0.5, "b, exact_match (strict-match)": 1.0}


def test_tasks_are_in_the_results(trained, tmp_path) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "lambada_test.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    found = ld.evaluate(*trained, tasks=["lambada_openai"], data=str(tmp_path), n_samples=8, limit=2)
    for name, model in found["models"].items():
        assert model["tasks"]["lambada_openai, perplexity"] > 1
        assert model["harness"]["model"]["autoregressive"] == (name != CONVERTED)
    assert found["models"][CONVERTED]["harness"]["model"]["likelihood"]["n_samples"] == 8
    (row,) = found["paired"]
    assert row["what"] == "lambada_openai, acc" and row["n"] == 2
    for name, (share, *_) in row["shares"].items():
        assert share == pytest.approx(100 * found["models"][name]["tasks"]["lambada_openai, acc"])
    json.dumps(found)


def test_bad_input(trained) -> None:
    with pytest.raises(ValueError, match="nothing to measure"):
        ld.evaluate(*trained)
    with pytest.raises(ValueError, match="number 0 is empty"):
        ld.evaluate(*trained, examples=[{"prompt": "a b", "completion": " "}], decoding={"max_new_tokens": 2})


def test_texts(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "b.jsonl").write_text('{"prompt": "one", "completion": "x"}\n')
    assert read_texts(str(tmp_path / "a.txt"), 1) == ["one\n\ntwo"]
    assert read_texts(str(tmp_path / "a.jsonl"), 1) == ["one"]
    with pytest.raises(ValueError, match="`--text`.*no `text`"):
        read_texts(str(tmp_path / "b.jsonl"), None)
    with pytest.raises(UserError, match="`--text`"):
        read_texts(str(tmp_path / "none"), None)


def test_prompts(tmp_path) -> None:
    assert read_prompts("tiny", 3) == list(tiny_dataset(3, split="test"))
    (tmp_path / "a.jsonl").write_text('{"input": "1,2,3", "output": "1+2=3"}\n' * 3)
    (tmp_path / "b.jsonl").write_text('{"prompt": "one", "completion": "x"}\n' * 3)
    assert read_prompts(str(tmp_path / "a.jsonl"), 2) == [{"input": "1,2,3", "output": "1+2=3"}] * 2
    assert read_prompts(str(tmp_path / "b.jsonl"), 2) == [{"prompt": "one", "completion": "x"}] * 2
    (tmp_path / "c.jsonl").write_text('{"odd": 1}\n')
    with pytest.raises(ValueError, match="columns .'odd'."):
        read_prompts(str(tmp_path / "c.jsonl"), None)


def differing(one, other, path=""):
    """Paths at which two results differ by more than rounding; speeds and dates apart."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        return [
            p
            for k in one
            if "second" not in k and k != "created_at"
            for p in differing(one[k], other[k], f"{path}/{k}")
        ]
    if isinstance(one, list):
        assert len(one) == len(other)
        return [p for i, (a, b) in enumerate(zip(one, other, strict=True)) for p in differing(a, b, f"{path}/{i}")]
    if isinstance(one, float):
        return [] if math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-4) else [f"{path}: {one} {other}"]
    return [] if one == other else [f"{path}: {one} {other}"]


def logged_answers(folder) -> dict[str, float]:
    """What a trainer logs of five answers."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL_PATH)
    trainer = make(folder, tokenizer, evaluation=tiny_dataset(4, split="test"))
    examples = list(tiny_dataset(5, split="test"))
    trainer.add_callback(AnswersCallback(trainer, examples, max_new_tokens=8, threshold=0.9))
    metrics = trainer.evaluate()
    return {name: value for name, value in metrics.items() if "match" in name or "eos" in name}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("", "--prompts"),
        ("tiny --prompts tiny", "`models`"),
        ("--prompts FOLDER/no.jsonl", "`dataset`"),
        ("--prompts tiny --settings {step:1}", "step"),
        ("--prompts tiny --sweep {threshold:0.5}", "`sweep.threshold`"),
        ("--prompts tiny --estimator exact", "`estimator`"),
        ("--prompts tiny --samples 9", "`n_samples`"),
        ("--prompts tiny --judge localhost", "`judge`"),
        ("--prompts tiny --judge http://localhost:1", "`judge_model`"),
        ("--text FOLDER/no.txt", "`--text`"),
        ("--text TEXT --max-length 1", "`max_length`"),
    ],
)
def test_what_the_command_refuses_leaves_nothing(options, named, tmp_path) -> None:
    (tmp_path / "a.txt").write_text("Tom has 23 apples.")
    options = options.replace("FOLDER", str(tmp_path)).replace("TEXT", str(tmp_path / "a.txt"))
    words = [re.sub(r"{(\w+):", r'{"\1":', word) for word in options.split()]
    given = cli.commands["evaluate"].make_context("evaluate", ["tiny", *words]).params
    models, _ = given.pop("models"), given.pop("output")
    with pytest.raises((UserError, OSError), match=named):
        run(models, tmp_path / "out", Console(), **given)
    assert not (tmp_path / "out").exists()


def evaluated(folder):
    """What a trainer logs, and the results of `evaluate`: tasks, a text twice, with noise of its own, and answers."""
    model, tokenizer = ld.load_diffusion_model("tiny", device="cpu")
    update_record(model, conversion_steps=1)
    puzzles = [{"input": f"{i},2,3,{i + 5}", "output": f"{i}+2={i + 2},{i + 2}+3={i + 5}"} for i in range(3)]
    texts = [{"text": "Tom has 23 apples."}] * 2 + [{"text": "Sort the letters"}]
    with PartialState().main_process_first():
        if PartialState().is_main_process:
            model.save_pretrained(folder / "model")
            tokenizer.save_pretrained(folder / "model")
            for name, rows in {"cd3_test": puzzles, "lambada_test": [texts[0]] * 3, "a": texts}.items():
                (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["evaluate", str(folder / "model"), "--prompts", "tiny", "--text", str(folder / "a.jsonl")]
    command += ["--tasks", "countdown3,lambada_openai", "--data", str(folder), "--num-fewshot", "0", "--limit", "3"]
    command += ["--settings", '{"max_new_tokens": 6, "threshold": 0.9}', "--samples", "16", "--batch-size", "2"]
    logged = logged_answers(folder)
    cli([*command, "--output", str(folder / "out")], standalone_mode=False)
    PartialState().wait_for_everyone()  # one writes
    return logged, json.loads((folder / "out" / "results.json").read_text())


def test_two_processes_find_what_one_finds(tmp_path, in_two_processes):
    """In what a trainer logs, and in the one report that is written."""
    first, second = in_two_processes["evaluated"]
    assert (first["said"] + second["said"]).count("report:") == 1
    (logged, both), (logged_alone, one) = first["result"], evaluated(tmp_path)
    assert logged == pytest.approx(logged_alone)
    assert (both["settings"]["processes"], one["settings"]["processes"]) == (2, 1)
    assert len(both["samples"]) == 3 and both["models"]["converted"]["tasks"]
    figures = ("models", "levels", "paired", "worked", "samples")
    assert differing(*({name: found[name] for name in figures} for found in (both, one))) == []
