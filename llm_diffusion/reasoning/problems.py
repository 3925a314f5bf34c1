"""Problems with one right answer, read from the records of well-known datasets, and the check of an answer to each.

    form        a record                                                      an answer is right when
    gsm8k       question, answer ending in `#### 72`                          its final number is the same
    math        problem, solution with one boxed answer                       its boxed answer is the same
    logiqa      options, correct_option (or answer, label), query, context    it picks the same letter
    hotpotqa    question, answer; type, context, supporting_facts             it is the same after normalising (F1 beside it)
    countdown   input `44,15,79,50`, output `44-15=29,79-29=50`               it holds, uses each number once, reaches the last
    sudoku      input, output: grids of digits                                it is a solution that keeps the givens
    sort … fill the tiny tasks, as chats                                      it is the one right answer, found by rule

Chats and prompts with completions of any dataset are read too: the form is seen in their text.
Trade-off: a form is told by the columns, so that nobody names it. Alternative: a table of dataset names, which misses local files.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from .. import UserError
from ..data.datasets import load_any
from ..data.tiny import tiny_dataset
from .planning import reaches_countdown, solves_sudoku
from .worked_answers import (
    boxed_span,
    evaluate,
    final_answer,
    same_answer,
)

WORKED_FORMS = ("gsm8k", "math")  # with steps that can be judged
LETTERS = string.ascii_uppercase
TINY_RECORDS = 1000
# name -> (dataset, its configuration or None, split with answers)
HUB_NAMES = {
    "gsm8k": ("openai/gsm8k", "main", "test"),
    "math": ("HuggingFaceH4/MATH-500", None, "test"),
    "logiqa": ("lucasmccabe/logiqa", None, "test"),
    "hotpotqa": ("hotpotqa/hotpot_qa", "distractor", "validation"),
}


@dataclass(frozen=True)
class Problem:
    """A question and a right worked answer.

    Args:
        prompt: messages.
        answer: the worked answer of the record, word for word, or made of its parts where it has none.
        form: see the table above; "plain" where an answer is right only when it is the same text.
        reference: the right final answer.
        entities: names that a wrong bridge may be taken from (hotpotqa).
        bridge: the name that joins the two hops (hotpotqa), or None.
        kind: what the record calls its kind of task; the form where it says nothing.
    """

    prompt: tuple[dict, ...]
    answer: str
    form: str
    reference: str
    options: tuple[str, ...] = ()
    entities: tuple[str, ...] = ()
    bridge: str | None = None
    kind: str = ""

    @property
    def question(self) -> str:
        return self.prompt[-1]["content"]

    def example(self) -> dict:
        """In the shape that trainers and `evaluate_answers` take."""
        completion = [{"role": "assistant", "content": self.answer}]
        return {"prompt": list(self.prompt), "completion": completion, "kind": self.kind}


def read_problem(record: dict) -> Problem:
    """A record of any form in the table above.

    Raises:
        ValueError: no form fits its columns, or it has no answer.
    """
    given = {name: value for name, value in record.items() if value is not None}
    for columns, read in _READERS:
        if columns <= set(given):
            problem = read(given)
            if not all(text.strip() for text in (problem.question, problem.answer, problem.reference)):
                raise UserError(f"the question or the answer is empty in the record {_shortened(record)}.")
            kind = given.get("kind")
            return replace(problem, kind=kind if isinstance(kind, str) else problem.form)
    raise UserError(
        f"a record with the columns {sorted(given)} is no problem that can be read; give `messages`, `prompt` + `completion`, "
        "`question` + `answer`, `problem` + `solution`, `input` + `output`, or `options` + `correct_option`."
    )


def _shortened(record: dict) -> str:
    text = str(record)
    return text if len(text) <= 120 else text[:120] + "…"


def _ask(text: str) -> tuple[dict, ...]:
    return ({"role": "user", "content": text},)


def _from_chat(record: dict) -> Problem:
    turns = list(record["messages"])
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise UserError("`messages` must be a prompt followed by an assistant turn.")
    return _told_by_text(tuple(turns[:-1]), turns[-1]["content"])


def _from_prompt(record: dict) -> Problem:
    prompt, completion = record["prompt"], record["completion"]
    prompt = _ask(prompt) if isinstance(prompt, str) else tuple(prompt)
    return _told_by_text(prompt, completion if isinstance(completion, str) else completion[-1]["content"])


_BEGINNINGS = {
    "Sort the letters: ": "sort",
    "Reverse the letters: ": "reverse",
    "Which is ": "compare",
    "Fill the gap: ": "fill",
    "Solve the sudoku:\n": "sudoku",
}
_COUNTDOWN = re.compile(r"\d+(?:,\d+)+")


def _told_by_text(prompt: tuple[dict, ...], answer: str) -> Problem:
    question = prompt[-1]["content"] or ""
    for beginning, form in _BEGINNINGS.items():
        if question.startswith(beginning) and _RULES[form](question, answer or ""):
            return Problem(prompt, answer, form, answer)
    if _COUNTDOWN.fullmatch(question) and reaches_countdown(question, answer or ""):
        return Problem(prompt, answer, "countdown", answer)
    return _worked(prompt, answer or "")


def _worked(prompt: tuple[dict, ...], answer: str) -> Problem:
    final = final_answer(answer)
    if final is None:
        return Problem(prompt, answer, "plain", answer)
    return Problem(prompt, answer, "math" if boxed_span(answer) else "gsm8k", final)


def _from_math(record: dict) -> Problem:
    problem = _worked(_ask(record["problem"]), record["solution"])
    if problem.form == "plain":
        raise UserError(f"`solution` has no boxed answer in the record {_shortened(record)}.")
    return problem


def _from_logiqa(record: dict) -> Problem:
    context, question, options, index = logiqa_parts(record)
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    final = f"The answer is {LETTERS[index]}."
    asked = _ask("\n".join(filter(None, [context, question, listed])))
    return Problem(asked, _explained(record, final), "logiqa", LETTERS[index], tuple(options))


def logiqa_parts(record: dict) -> tuple[str, str, list[str], int]:
    """Passage, question, options and index of the right one, under any of the names that copies of LogiQA give them.

    Raises:
        ValueError: the right option is not among the options.
    """
    options, right = list(record["options"]), _first(record, "correct_option", "label", "answer")
    index = right
    if isinstance(right, str):
        letter = right.strip().upper()
        index = LETTERS.index(letter) if len(letter) == 1 and letter in LETTERS else right
    if not isinstance(index, int) or not 0 <= index < len(options):
        raise UserError(f"the right option must be a letter or an index of {len(options)} options, got {right!r}.")
    context, question = _first(record, "context", "text", "passage"), _first(record, "query", "question")
    return context or "", question or "", options, index


def _explained(record: dict, final: str) -> str:
    worked = _first(record, "rationale", "explanation", "reasoning")
    return f"{worked.strip()}\n{final}" if worked else final


def _first(record: dict, *names: str) -> object:
    return next((record[name] for name in names if record.get(name) is not None), None)


def _from_question(record: dict) -> Problem:
    answer = record["answer"]
    if not isinstance(answer, str):
        raise UserError(f"`answer` must be text, got {answer!r}.")
    if final_answer(answer) is not None:
        return _worked(_ask(record["question"]), answer)
    return _from_hotpotqa(record)


def _from_hotpotqa(record: dict) -> Problem:
    """The worked answer: a rationale of the record, or its supporting sentences, then the answer."""
    articles = _articles(record.get("context") or [])
    facts = [(title, sentence) for title, sentence in _facts(record, articles) if sentence]
    titles = list(dict.fromkeys(title for title, _ in facts))
    told = " ".join(sentence.strip() for _, sentence in facts)
    final = f"The answer is {record['answer']}."
    explained = _explained(record, final)
    if explained == final and told:
        explained = f"{told}\n{final}"
    # The bridge is the article that another supporting article speaks of.
    bridge = next((t for t in titles if any(t in sentence for other, sentence in facts if other != t)), None)
    entities = tuple(t for t in articles if t not in titles) or _names(record["question"])
    return Problem(
        _ask(record["question"]), explained, "hotpotqa", record["answer"], (), entities, record.get("bridge") or bridge
    )


def _articles(context: dict | list) -> dict[str, list[str]]:
    pairs = zip(context["title"], context["sentences"], strict=True) if isinstance(context, dict) else context
    return {title: list(sentences) for title, sentences in pairs}


def _facts(record: dict, articles: dict[str, list[str]]) -> list[tuple[str, str]]:
    facts = record.get("supporting_facts") or []
    pairs = zip(facts["title"], facts["sent_id"], strict=True) if isinstance(facts, dict) else facts
    return [(title, articles[title][i]) for title, i in pairs if i < len(articles.get(title, ()))]


def _names(question: str) -> tuple[str, ...]:
    """Runs of capitalised words that do not begin the question."""
    runs = re.findall(r"(?<=[\w,] )(?:[A-Z][\w'’.-]*(?: (?=[A-Z\d]))?)+(?:\d+)?", question)
    return tuple(dict.fromkeys(run.strip(" .?") for run in runs if len(run) > 1))


def _from_planning(record: dict) -> Problem:
    question, answer = record["input"], record["output"]
    form = "sudoku" if set(question) <= set(string.digits + "\n") else "countdown"
    return Problem(_ask(question), answer, form, answer)


_READERS: tuple[tuple[set[str], Callable[[dict], Problem]], ...] = (
    ({"messages"}, _from_chat),
    ({"prompt", "completion"}, _from_prompt),
    ({"options"}, _from_logiqa),
    ({"problem", "solution"}, _from_math),
    ({"question", "answer"}, _from_question),
    ({"input", "output"}, _from_planning),
)


def load_records(name: str, limit: int | None = None, split: str = "train", seed: int = 0) -> list[dict]:
    """Records of "tiny", of a local file or folder, of a name in `HUB_NAMES`, or of any dataset of the hub.

    Raises:
        FileNotFoundError, ValueError: nothing there, or nothing in it.
    """
    if name == "tiny":
        return list(tiny_dataset(limit or TINY_RECORDS, seed, split))
    hub, configuration, own_split = HUB_NAMES.get(name, (None, None, None))
    loaded = load_any(name) if hub is None or Path(name).exists() else load_any(hub, configuration)
    rows = loaded.get(split) or loaded.get(own_split) or next(iter(loaded.values()))
    if len(rows) == 0:
        raise UserError(f"`dataset`: {name!r} is empty.")
    return list(rows.select(range(min(limit or len(rows), len(rows)))))


def is_right(problem: Problem, answer: str) -> bool:
    """Whether the final answer in `answer` (whatever a model wrote) is right."""
    if problem.form in _RULES:
        return _RULES[problem.form](problem.question, answer)
    found = extract(problem, answer)
    if found is None:
        return False
    if problem.form == "hotpotqa":
        return normalised_text(found) == normalised_text(problem.reference)
    if problem.form in ("gsm8k", "math"):
        return same_answer(found, problem.reference)
    return found == problem.reference.strip()


def extract(problem: Problem, answer: str) -> str | None:
    """The final answer that a model's text gives; None: it gives none.

    A text that marks no answer counts by its last number (gsm8k), its last lone letter (logiqa) or as a whole (hotpotqa,
    plain); a MATH answer must be boxed or announced.
    """
    marked = final_answer(answer)
    if problem.form == "logiqa":
        letters = re.findall(rf"\b([{LETTERS[: len(problem.options)]}])\b", answer if marked is None else marked)
        return (letters[-1] if marked is None else letters[0]) if letters else None
    if marked is not None and problem.form != "gsm8k":
        return marked
    if problem.form == "gsm8k":
        numeric = evaluate(problem.reference) is not None
        if marked is not None and not numeric:
            return marked
        numbers = re.findall(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?", answer if marked is None else marked)
        if marked is not None:
            return marked if evaluate(marked) is not None or not numbers else numbers[0]
        return numbers[-1] if numbers else None
    return None if problem.form == "math" else answer.strip() or None


def normalised_text(text: str) -> str:
    """SQuAD and HotpotQA: lower case, without punctuation, articles and superfluous blanks."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1(problem: Problem, answer: str) -> float:
    """Word overlap with the reference, 0 to 1 (HotpotQA's second figure; yes, no and noanswer count whole)."""
    found = extract(problem, answer)
    words, wanted = normalised_text(found or "").split(), normalised_text(problem.reference).split()
    if {"yes", "no", "noanswer"} & {" ".join(words), " ".join(wanted)} and words != wanted:
        return 0.0
    shared = sum((Counter(words) & Counter(wanted)).values())
    return 2 * shared / (len(words) + len(wanted)) if shared else 0.0


def _letters(question: str) -> list[str]:
    return question.partition(": ")[2].split()


def _compare_is_right(question: str, answer: str) -> bool:
    asked = re.fullmatch(r"Which is (greater|smaller), (\d+) or (\d+)\?", question)
    if asked is None:
        return False
    word, pair = asked[1], sorted(map(int, asked.groups()[1:]), reverse=asked[1] == "greater")
    return answer.strip() == f"{pair[0]} is {word} than {pair[1]}."


def _fill_is_right(question: str, answer: str) -> bool:
    given, terms = _letters(question), answer.split()
    if len(given) != len(terms) or not all(t.isdecimal() for t in terms):
        return False
    values = list(map(int, terms))
    progression = len({b - a for a, b in zip(values, values[1:], strict=False)}) <= 1
    return progression and all(g in ("_", t) for g, t in zip(given, terms, strict=True))


_RULES: dict[str, Callable[[str, str], bool]] = {
    "sort": lambda question, answer: answer.split() == sorted(_letters(question)),
    "reverse": lambda question, answer: answer.split() == _letters(question)[::-1],
    "compare": _compare_is_right,
    "fill": _fill_is_right,
    "sudoku": lambda question, answer: solves_sudoku(question.partition(":\n")[2] or question, answer),
    "countdown": reaches_countdown,
}
