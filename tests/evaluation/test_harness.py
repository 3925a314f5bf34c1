"""The harness's view of a model, and its tasks on local files."""

from __future__ import annotations

import json
import runpy
import sys

import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.registry import model_registry

from llm_diffusion import UserError
from llm_diffusion.evaluation.harness import DiffusionLM, run_tasks
from llm_diffusion.evaluation.likelihood import DEFAULT_LENGTH, likelihood, log_likelihood_bound
from llm_diffusion.evaluation.tasks import local_tasks
from llm_diffusion.generation.config import DiffusionGenerationConfig
from llm_diffusion.generation.generate import generate, generate_autoregressive

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of the harness itself


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=a, idx=0) for a in arguments]


@pytest.fixture(scope="module")
def lm(tiny):
    return DiffusionLM(
        *tiny, autoregressive=False, n_samples=16, batch_size=3, max_new_tokens=6, threshold=0.9, progress=False
    )


PAIRS = [("Tom has 23", " apples."), ("Sort the letters: k d", " e a"), ("3 6 9", " 12")]


def test_loglikelihood_is_the_bound(lm, tiny) -> None:
    found = lm.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True)
    want = log_likelihood_bound(*tiny, [p for p, _ in PAIRS], [c for _, c in PAIRS], n_samples=16)
    assert [value for value, _ in found] == pytest.approx([-nats for nats in want.nats], abs=1e-4)


@pytest.mark.parametrize("autoregressive", [False, True])
def test_is_greedy_tells_whether_the_model_would_write_it(tiny, autoregressive) -> None:
    model, tokenizer = tiny
    lm = DiffusionLM(model, tokenizer, autoregressive=autoregressive, n_samples=8, progress=False)
    chat = [{"role": "user", "content": "Sort the letters: k d e a"}]
    context = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    if autoregressive:
        written = generate_autoregressive(model, **context, max_new_tokens=3, do_sample=False)
    else:
        written = generate(model, **context, max_new_tokens=3)
    ids = written[0, context["input_ids"].shape[1] :].tolist()
    other = [*ids[:-1], (ids[-1] + 1) % 400]
    requested = [(("", ""), context["input_ids"][0].tolist(), completion) for completion in (ids, other)]
    assert [same for _, same in lm._loglikelihood_tokens(requested)] == [True, False]


def test_is_greedy_is_one_token_a_step_whatever_the_model_was_saved_with(tiny, monkeypatch) -> None:
    model, tokenizer = tiny
    ids = tokenizer("Sort the letters: k d e a", return_tensors="pt")["input_ids"]
    one_by_one = generate(model, ids, max_new_tokens=8)[0, ids.shape[1] :].tolist()
    saved = {"threshold": 0.01, "mask_token_id": tokenizer.mask_token_id, "max_new_tokens": 64}
    monkeypatch.setattr(model, "generation_config", DiffusionGenerationConfig(**saved))
    at_once = generate(model, ids, max_new_tokens=8)[0, ids.shape[1] :].tolist()
    assert at_once != one_by_one
    lm = DiffusionLM(model, tokenizer, autoregressive=False, n_samples=8, progress=False)
    requested = [(("", ""), ids[0].tolist(), completion) for completion in (one_by_one, at_once)]
    assert [same for _, same in lm._loglikelihood_tokens(requested)] == [True, False]


def test_one_answer_to_a_request(tiny) -> None:
    with pytest.raises(UserError, match="`num_return_sequences`=2"):
        DiffusionLM(*tiny, temperature=1.0, num_return_sequences=2)


def test_ar_scores_are_those_of_the_loss(tiny) -> None:
    lm = DiffusionLM(*tiny, autoregressive=True, progress=False)
    rolled = lm.loglikelihood_rolling(requests("loglikelihood_rolling", ("Tom has 23 apples.",)))
    first, whole = lm.loglikelihood(
        requests("loglikelihood", ("", "Tom has"), ("", "Tom has 23 apples.")), disable_tqdm=True
    )
    assert rolled[0] == pytest.approx(whole[0], abs=1e-4) and whole[0] < first[0]  # the end token stands before both
    with_empty = requests("loglikelihood_rolling", ("",), ("Tom has 23 apples.",), ("",))
    assert lm.loglikelihood_rolling(with_empty) == [0.0, pytest.approx(rolled[0], abs=1e-4), 0.0]
    assert lm.loglikelihood_rolling(with_empty[:1]) == [0.0]
    plain = likelihood(*tiny, ["Tom has 23 apples."], autoregressive=True)
    assert plain.nats[0] < -whole[0]  # there the first token is not scored


def test_answers_are_cut_and_long_prompts_keep_their_ends(lm, tiny) -> None:
    model, tokenizer = tiny
    prompt = "Sort the letters: k d e a"
    (whole,) = lm.generate_until(requests("generate_until", (prompt, {"until": []})))
    ids = generate(model, **tokenizer(prompt, return_tensors="pt"), max_new_tokens=6, threshold=0.9)
    assert whole == tokenizer.decode(ids[0, len(tokenizer(prompt)["input_ids"]) :], skip_special_tokens=True)
    (cut,) = lm.generate_until(requests("generate_until", (prompt, {"until": [whole[1:3], "never"]})))
    assert cut == whole[: whole.find(whole[1:3])]
    both = lm.generate_until(
        requests("generate_until", (prompt, {"until": []}), ("a " * 2 * DEFAULT_LENGTH + prompt, {}))
    )
    assert both[0] == whole and isinstance(both[1], str)


def test_the_task_sets_what_the_user_leaves_open(lm) -> None:
    settings, until = lm._answer_settings({"until": "\n", "max_gen_toks": 99, "do_sample": False, "temperature": 0.7})
    assert settings == {"max_new_tokens": 6, "threshold": 0.9, "temperature": 0.0, "seed": 0} and until == ["\n"]


def test_chats_go_through_the_template(lm, tiny) -> None:
    chat = [{"role": "user", "content": "hi"}]
    text = lm.apply_chat_template(chat)
    assert lm.tok_encode(text) == tiny[1].apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Local files of every task, two lines each."""
    folder = tmp_path_factory.mktemp("data")
    rows = {
        "lambada_test.jsonl": [{"text": "Tom has 23 apples."}, {"text": "Sort the letters"}],
        "gsm8k/train.jsonl": [
            {"question": f"What is {i} + 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"} for i in range(9)
        ],
        "gsm8k/test.jsonl": [{"question": "What is 1 + 1?", "answer": "It is 2.\n#### 2"}] * 2,
        "math/math500_test.jsonl": [{"problem": "What is $1+1$?", "solution": "It is $\\boxed{2}$.", "answer": "2"}]
        * 2,
        "cd3_test.jsonl": [
            {"input": f"{i},2,3,{i + 5}", "output": f"{i}+2={i + 2},{i + 2}+3={i + 5}"} for i in range(10)
        ],
        "cd4_test.jsonl": [
            {"input": f"{i},1,1,1,{i + 3}", "output": f"{i}+1={i + 1},1+1=2,{i + 1}+2={i + 3}"} for i in range(10)
        ],
        "sudoku_4x4_12.jsonl": [
            {"input": f"{row}\n3412\n2143\n4321", "output": "1234\n3412\n2143\n4321"}
            for row in ("1230", "1204", "1034", "0234", "1200", "1004", "0034", "0230", "0204")
        ],
        "logiqa_test.jsonl": [
            {
                "context": "Cats sleep.",
                "query": "Then?",
                "options": [f"No {n}.", "Tom, a cat, sleeps."],
                "correct_option": 1,
            }
            for n in range(2)
        ],
    }
    for name, lines in rows.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("\n".join(map(json.dumps, lines)) + "\n")
    questions = [{"question": "Are they?", "answer": "yes", "type": "comparison"}] * 2
    (folder / "hotpot_dev_v1_simplified.json").write_text(json.dumps(questions))
    return folder


def test_tasks_run_on_local_files(lm, data) -> None:
    names = ["lambada_openai", "gsm8k", "hotpotqa", "hendrycks_math500", "logiqa", "countdown3", "countdown4"]
    assert sorted(local_tasks(data)) == sorted([*names, "sudoku_4x4_12"])
    found = run_tasks(lm, names, data=str(data), limit=2)
    assert found["results"]["lambada_openai"]["perplexity,none"] > 1
    assert found["results"]["gsm8k"]["exact_match,flexible-extract"] in (0.0, 0.5, 1.0)
    assert "What is" in found["samples"]["gsm8k"][0]["arguments"][0][0]
    for name in names:
        assert len({sample["doc_id"] for sample in found["samples"][name]}) == 2


def test_chat_templates_reach_the_model(lm, data) -> None:
    found = run_tasks(lm, ["hotpotqa"], data=str(data), limit=1, chat_template=True)
    (prompt, _) = found["samples"]["hotpotqa"][0]["arguments"][0]
    assert prompt.startswith("<|im_start|>user\nQuestion: Are they?") and prompt.endswith("<|im_start|>assistant\n")


def test_right_answers_are_counted(lm, data, monkeypatch) -> None:
    monkeypatch.setattr(type(lm), "generate_until", lambda self, requested: [" Yes" for _ in requested])
    assert run_tasks(lm, ["hotpotqa"], data=str(data))["results"]["hotpotqa"]["exact_match,none"] == 1.0


def test_puzzles_are_judged_by_their_rules(lm, data, monkeypatch) -> None:
    """Right answers that no file holds count, wrong ones do not; the name of several tasks stands for all of them."""
    requested = []

    def answer(self, requests):
        requested.extend(request.args[0] for request in requests)
        return [solve(request.doc["input"]) for request in requests]

    def solve(puzzle):
        if "\n" in puzzle:
            return " 1234\n3412\n2143\n4321" if puzzle.startswith("12") else puzzle
        first, *_, target = map(int, puzzle.split(","))
        if target == first + 3:  # of four numbers
            return f" {first}+(1+1)+1={target}"
        return f"3+2=5,{first}+5={target}" if first % 2 else f"{first}+2={target}"

    monkeypatch.setattr(type(lm), "generate_until", answer)
    found = run_tasks(lm, ["countdown", "sudoku"], data=str(data))
    shares = {task: metrics["exact_match,none"] for task, metrics in found["results"].items()}
    assert shares == {"countdown3": 0.5, "countdown4": 1.0, "sudoku_4x4_12": pytest.approx(3 / 9)}
    question = next(
        text
        for text in requested
        if text.endswith("Reach 5 from 0,2,3, each used once, by + - * / in equations.\nAnswer:")
    )
    assert question.count("Reach") == 9 and "in equations.\nAnswer: 1+2=3,3+3=6\n\n" in question
    (grid,) = [text for text in requested if text.endswith("Solve the sudoku:\n1204\n3412\n2143\n4321")]
    assert grid.count("sudoku") == 9 and "4321\n1234\n3412\n2143\n4321\n\n" in grid


@pytest.mark.parametrize(
    "record",
    [
        {"context": "Cats sleep.", "query": "Then?", "options": ["No.", "Tom sleeps."], "correct_option": 1},
        {"context": "Cats sleep.", "question": "Then?", "options": ["No.", "Tom sleeps."], "label": "b"},
        {"id": 3, "text": "Cats sleep.", "question": "Then?", "options": ["No.", "Tom sleeps."], "answer": 1},
    ],
)
def test_every_copy_of_logiqa_is_asked_alike(lm, tmp_path, monkeypatch, record) -> None:
    (tmp_path / "logiqa_test.jsonl").write_text(json.dumps(record) + "\n")
    requested = []

    def score(self, requests, **kwargs):
        requested.extend(request.args for request in requests)
        return [(-1.0 if "Tom" in request.args[1] else -2.0, False) for request in requests]

    monkeypatch.setattr(type(lm), "loglikelihood", score)
    assert run_tasks(lm, ["logiqa"], data=str(tmp_path))["results"]["logiqa"]["acc,none"] == 1.0
    question = "Passage: Cats sleep.\nQuestion: Then?\nChoices:\nA. No.\nB. Tom sleeps.\nAnswer:"
    assert requested == [(question, " No."), (question, " Tom sleeps.")]


@pytest.mark.slow  # it reads the definitions of all its tasks
def test_the_harness_own_command_line_knows_the_model(tmp_path, monkeypatch) -> None:
    """`python -m llm_diffusion.evaluation.harness` with a task of the user's own; the figures are in its own results file."""
    (tmp_path / "a.jsonl").write_text('{"q": "Sort the letters: k d e a"}\n' * 2)
    task = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "a.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "a d e k",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match"}],
    }
    (tmp_path / "mine.yaml").write_text(json.dumps(task))
    model = ["--model", "llm_diffusion", "--model_args", "pretrained=tiny,threshold=0.9", "--tasks", "mine"]
    own = ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"), "--limit", "2"]
    monkeypatch.setattr(sys, "argv", ["harness", *model, *own])
    monkeypatch.delitem(
        model_registry._objs, "llm_diffusion"
    )  # as in a process of its own, which registers it as `__main__`
    monkeypatch.delitem(sys.modules, "llm_diffusion.evaluation.harness")
    runpy.run_module("llm_diffusion.evaluation.harness", run_name="__main__")
    (written,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(written.read_text())
    assert found["results"]["mine"]["exact_match,none"] in (0, 1) and found["n-samples"]["mine"]["effective"] == 2
    assert found["config"]["model"] == "llm_diffusion" and found["config"]["decoding"]["threshold"] == 0.9


def test_bad_input(tmp_path, tiny) -> None:
    with pytest.raises(UserError, match="`data`"):
        local_tasks(tmp_path)
    with pytest.raises(UserError, match="`data`"):
        local_tasks(tmp_path / "no")
    with pytest.raises(ValueError, match="`batch_size`"):
        DiffusionLM(*tiny, batch_size="auto")
    with pytest.raises(ValueError, match="steps_"):
        DiffusionLM(*tiny, steps_=3)
    short = DiffusionLM(*tiny, max_length=16, max_new_tokens=16)
    with pytest.raises(ValueError, match="max_new_tokens"):
        short.generate_until(requests("generate_until", ("a", {})))


def test_an_untrained_model_is_evaluated_as_what_it_is(tiny, caplog) -> None:
    assert DiffusionLM(*tiny).autoregressive
    assert "evaluated as the autoregressive model" in caplog.text
