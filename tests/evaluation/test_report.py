"""Everything together: figures are those of the parts, every setting is in the file, and nothing is half-written."""

import copy
import json
from dataclasses import asdict

import pytest

import llm_diffusion as ld
from llm_diffusion.data.tiny import tiny_dataset
from llm_diffusion.evaluation.answers import evaluate_answers
from llm_diffusion.evaluation.likelihood import likelihood
from llm_diffusion.evaluation.report import (
    BASE,
    CONVERTED,
    SAME_WEIGHTS,
    provenance,
    task_figures,
    write_report,
)
from llm_diffusion.evaluation.statistics import answer_problems, compare
from llm_diffusion.reasoning.problems import read_problem

TEXTS = ["Tom has 23 apples. Tom gets 45 more.", "Sort the letters: k d e a"]


@pytest.fixture(scope="module")
def trained(tiny):
    """The embedded model in a record that says it was trained: what its figures are does not matter here."""
    model, tokenizer = copy.deepcopy(tiny)
    model.config.diffusion = {**model.config.diffusion, "conversion_steps": 1}
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
    """Right as `compare` counts it, on the very answers that are scored."""
    problems = [read_problem(example) for example in tiny_dataset(6, split="test")]
    settings = {"max_new_tokens": 8, "threshold": 0.9, "block_length": 8, "seed": 3}
    answers = {
        SAME_WEIGHTS: answer_problems(*trained, problems, autoregressive=True, max_new_tokens=8),
        CONVERTED: answer_problems(*trained, problems, **settings),
    }
    want, found = compare(problems, answers, seed=3), results["paired"][-1]
    for name in answers:
        score = want.scores[name]["all"]
        assert found["shares"][name] == pytest.approx((score.exact_match, *score.interval))
    assert found["differences"] == [asdict(want.differences[0])]
    (arithmetic,) = results["worked"][CONVERTED]["answers"]
    assert arithmetic["answer"] == answers[CONVERTED][0]


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


def test_an_untrained_model_is_evaluated_as_ar_and_said_so(tiny) -> None:
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
