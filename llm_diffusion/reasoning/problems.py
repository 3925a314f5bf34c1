r"""Problems with one right answer, read from the records of well-known datasets, and the check of an answer to each.

    form        a record                                                      an answer is right when
    gsm8k       question, answer ending in `#### 72`                          its final number is the same
    math        problem, solution with one boxed answer                       its boxed answer is the same
    logiqa      options, correct_option (or answer, label), query, context    it picks the same letter
    hotpotqa    question, answer; type, context, supporting_facts             it is the same after normalising (F1 beside it)
    countdown   input `44,15,79,50`, output `44-15=29,79-29=50`               it holds, uses each number once, reaches the last
    sudoku      input, output: grids of digits (0 is blank)                   it is a solution that keeps the givens
    sort … fill the tiny tasks, as chats                                      it is the one right answer, found by rule

Chats and prompts with completions of any dataset are read too: the form is seen in their text. A puzzle is solved by the rules
of the game, however a model writes it (`44-15=29,79-29=50` or `79-(44-15)=50`), not by equality with the reference.
References: countdown, Gandhi et al. 2024 (arXiv 2404.03683).
"""

from __future__ import annotations

import re
import string
import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import dropwhile, pairwise, takewhile
from pathlib import Path
from typing import Any

from .. import UserError
from ..data.datasets import load_any
from ..data.tiny import tiny_dataset
from .worked_answers import NUMBER, PLAIN_SIGNS, evaluate, final_answer, normalised, number, same_answer

WORKED_FORMS = ("gsm8k", "math")  # whose steps can be judged
LETTERS = string.ascii_uppercase
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
        kind: what the record calls its kind of task; the form where it names none.
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
    problem = _read({name: value for name, value in record.items() if value is not None})
    if not all((text or "").strip() for text in (problem.question, problem.answer, problem.reference)):
        raise UserError(f"the question or the answer is empty in the record {textwrap.shorten(str(record), 120)}.")
    kind = record.get("kind")
    return replace(problem, kind=kind if isinstance(kind, str) else problem.form)


def _read(record: dict) -> Problem:
    match record:
        case {"messages": [*prompt, {"role": "assistant", "content": answer}]} if prompt:
            return _seen_in_text(tuple(prompt), answer or "")
        case {"messages": _}:
            raise UserError("`messages` must be a prompt followed by an assistant turn.")
        case {"prompt": prompt, "completion": answer}:
            answer = answer if isinstance(answer, str) else answer[-1]["content"] or ""
            return _seen_in_text(_ask(prompt) if isinstance(prompt, str) else tuple(prompt), answer)
        case {"options": _}:
            return _from_logiqa(record)
        case {"problem": question, "solution": answer} if final_answer(answer) is None:
            raise UserError(f"`solution` has no boxed answer: {textwrap.shorten(answer, 120)}.")
        case {"problem": question, "solution": answer}:
            return _worked(_ask(question), answer)
        case {"question": question, "answer": str(answer)}:
            return _from_hotpotqa(record) if final_answer(answer) is None else _worked(_ask(question), answer)
        case {"input": question, "output": answer}:
            form = "sudoku" if set(question) <= set(string.digits + "\n") else "countdown"
            return Problem(_ask(question), answer, form, answer)
    raise UserError(
        f"a record with the columns {sorted(record)} is no problem that can be read; give `messages`, `prompt` + `completion`, "
        "`question` + `answer` (text), `problem` + `solution`, `input` + `output`, or `options` + `correct_option`."
    )


def _ask(text: str) -> tuple[dict, ...]:
    return ({"role": "user", "content": text},)


def _seen_in_text(prompt: tuple[dict, ...], answer: str) -> Problem:
    form = next((form for form in _RULES if _solves(form, prompt[-1]["content"] or "", answer)), None)
    return Problem(prompt, answer, form, answer) if form else _worked(prompt, answer)


def _worked(prompt: tuple[dict, ...], answer: str) -> Problem:
    final = final_answer(answer)
    form = "plain" if final is None else "math" if "\\boxed{" in answer else "gsm8k"
    return Problem(prompt, answer, form, final or answer)


def _from_logiqa(record: dict) -> Problem:
    context, question, options, index = logiqa_parts(record)
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    asked = _ask("\n".join(filter(None, [context, question, listed])))
    return Problem(asked, _explained(record, LETTERS[index]), "logiqa", LETTERS[index], tuple(options))


def logiqa_parts(record: dict) -> tuple[str, str, list[str], int]:
    """Passage, question, options and index of the right one, under any of the names that copies of LogiQA give them.

    Raises:
        ValueError: the right option is not among the options.
    """
    options, right = list(record["options"]), _first(record, "correct_option", "label", "answer")
    index = dict(zip(LETTERS, range(26), strict=True)).get(right.strip().upper()) if isinstance(right, str) else right
    if not isinstance(index, int) or not 0 <= index < len(options):
        raise UserError(f"the right option must be a letter or an index of {len(options)} options, got {right!r}.")
    context, question = _first(record, "context", "text", "passage"), _first(record, "query", "question")
    return context or "", question or "", options, index


def _explained(record: dict, answer: str, otherwise: str = "") -> str:
    worked = _first(record, "rationale", "explanation", "reasoning") or otherwise
    return f"{worked.strip()}\nThe answer is {answer}.".lstrip()


def _first(record: dict, *names: str) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)


def _from_hotpotqa(record: dict) -> Problem:
    """The worked answer: a rationale of the record, or its supporting sentences, then the answer."""
    articles, found = dict(_pairs(record, "context", "sentences")), _pairs(record, "supporting_facts", "sent_id")
    facts = [(title, articles[title][i].strip()) for title, i in found if i < len(articles.get(title, ()))]
    titles = dict.fromkeys(title for title, sentence in facts if sentence)
    # The bridge is the article that another supporting article speaks of.
    bridge = next((t for t in titles if any(t in sentence for other, sentence in facts if other != t)), None)
    # Runs of capitalised words that do not begin the question.
    names = re.findall(r"(?<=[\w,] )(?:[A-Z][\w'’.-]*(?: (?=[A-Z\d]))?)+(?:\d+)?", record["question"])
    others = [title for title in articles if title not in titles] or [n.strip(" .?") for n in names if len(n) > 1]
    worked = _explained(record, record["answer"], " ".join(sentence for _, sentence in facts if sentence))
    found = {"entities": tuple(dict.fromkeys(others)), "bridge": record.get("bridge") or bridge}
    return Problem(_ask(record["question"]), worked, "hotpotqa", record["answer"], **found)


def _pairs(record: dict, column: str, second: str) -> list[tuple[str, Any]]:
    """Titles with what belongs to them: lists of pairs in some copies of HotpotQA, two lists in others."""
    found = record.get(column) or []
    return list(zip(found["title"], found[second], strict=True)) if isinstance(found, dict) else list(found)


def load_records(name: str, limit: int | None = None, split: str = "train", seed: int = 0) -> list[dict]:
    """Records of "tiny", of a local file or folder, of a name in `HUB_NAMES`, or of any dataset of the hub.

    Raises:
        FileNotFoundError, ValueError: nothing there, or nothing in it.
    """
    if name == "tiny":
        return list(tiny_dataset(limit or 1000, seed, split))
    hub, configuration, own_split = HUB_NAMES.get(name, (None, None, None))
    loaded = load_any(name) if hub is None or Path(name).exists() else load_any(hub, configuration)
    rows = loaded.get(split) or loaded.get(own_split) or next(iter(loaded.values()))
    if len(rows) == 0:
        raise UserError(f"`dataset`: {name!r} is empty.")
    return list(rows.select(range(min(limit or len(rows), len(rows)))))


def is_right(problem: Problem, answer: str) -> bool:
    """Whether the final answer in `answer` (whatever a model wrote) is right."""
    if problem.form in _RULES:
        return _solves(problem.form, problem.question, answer)
    found = extract(problem, answer)
    if found is None:
        return False
    if problem.form == "hotpotqa":
        return normalised_text(found) == normalised_text(problem.reference)
    return same_answer(found, problem.reference) if problem.form in WORKED_FORMS else found == problem.reference.strip()


def extract(problem: Problem, answer: str) -> str | None:
    """The final answer that a model's text gives; None: it gives none.

    A text that marks no answer counts by its last number (gsm8k), its last lone letter (logiqa) or as a whole (hotpotqa,
    plain); a MATH answer must be boxed or announced.
    """
    marked = final_answer(answer)
    if problem.form == "logiqa":
        parts = re.findall(rf"\b([{LETTERS[: len(problem.options)]}])\b", marked or answer)
        return parts[0 if marked else -1] if parts else None
    if (
        problem.form == "gsm8k"
        and evaluate(problem.reference) is not None
        and evaluate(normalised(marked or "")) is None
    ):
        # A minus behind a number or word is a dash or the sign of a difference.
        parts = re.findall(rf"(?:(?<![\w.)])[-−]\$?)?(?:{NUMBER.pattern})", marked or answer)
        return parts[0 if marked else -1] if parts else marked
    return marked if marked or problem.form in WORKED_FORMS else answer.strip() or None


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


def _compares(word: str, first: str, second: str, answer: str) -> bool:
    winner, other = sorted((first, second), key=int, reverse=word == "greater")
    return answer.strip() == f"{winner} is {word} than {other}."


def _fills(question: str, answer: str) -> bool:
    given, terms = question.split(), answer.split()
    if len(given) != len(terms) or not all(term.isdecimal() for term in terms):
        return False
    steps = {int(after) - int(before) for before, after in pairwise(terms)}
    return len(steps) <= 1 and all(shown in ("_", term) for shown, term in zip(given, terms, strict=True))


_NUMBER = r"-?\d+(?:\.\d+)?"
_EXPRESSION = re.compile(rf"[\s(]*{_NUMBER}[\s)]*(?:[-+*/][\s(]*{_NUMBER}[\s)]*)*")
_LEAF = re.compile(r"(?:^-|(?<=[-+*/(])-)?\d+(?:\.\d+)?")  # a sign is a sign only where no number stands before it


def reaches_countdown(numbers: str, answer: str) -> bool:
    """Whether the equations of `answer` hold, use each number once (results too) and end at the last of `numbers`.

    Args:
        numbers: separated by commas, the target last.
        answer: equations separated by commas, semicolons or line ends, or one expression: what it marks as its answer, or
            else its first paragraph.
    """
    text = final_answer(answer) or answer.strip().split("\n\n")[0]
    *pool, target = [number(n) for n in numbers.split(",")]
    for equation in re.split(r"[,;\n]", text.translate(PLAIN_SIGNS).strip().rstrip(".")):
        left, _, stated = equation.partition("=")
        value = evaluate(left) if _EXPRESSION.fullmatch(left) else None
        if value is None or ("=" in equation and evaluate(stated) != value):
            return False
        for leaf in _LEAF.findall(re.sub(r"\s", "", left)):
            if number(leaf) not in pool:
                return False
            pool.remove(number(leaf))
        pool.append(value)
    return pool == [target]


def solves_sudoku(puzzle: str, answer: str) -> bool:
    """Whether `answer` fills the blanks ("0") of an n² x n² `puzzle`, digits row by row: rows, columns, boxes once each.

    The grid of an answer is its last lines that are digits (and blanks, bars or commas) alone.
    """
    lines = [re.sub(r"[\s|,]", "", line) for line in reversed(answer.splitlines())]
    filled = [*takewhile(str.isdecimal, dropwhile(lambda line: not line.isdecimal(), lines))][::-1]
    given = puzzle.split()
    n = len(given)
    side = round(n**0.5)
    if side * side != n or [len(row) for row in filled] != [n] * n or any(len(row) != n for row in given):
        return False
    corners = [(r, c) for r in range(0, n, side) for c in range(0, n, side)]
    boxes = [{filled[r + i][c + j] for i in range(side) for j in range(side)} for r, c in corners]
    groups = [*filled, *zip(*filled, strict=True), *boxes]
    kept = all(shown in ("0", digit) for shown, digit in zip("".join(given), "".join(filled), strict=True))
    return kept and all(set(group) == set(string.digits[1 : n + 1]) for group in groups)


# The question of a form, and whether an answer is right, given the groups of the question.
_RULES: dict[str, tuple[str, Callable[..., bool]]] = {
    "sort": ("Sort the letters: (.*)", lambda letters, answer: answer.split() == sorted(letters.split())),
    "reverse": ("Reverse the letters: (.*)", lambda letters, answer: answer.split() == letters.split()[::-1]),
    "compare": (r"Which is (greater|smaller), (\d+) or (\d+)\?", _compares),
    "fill": ("Fill the gap: (.*)", _fills),
    "sudoku": (r"(?:Solve the sudoku:\n)?([\d\n]+)", solves_sudoku),
    "countdown": (r"(\d+(?:,\d+)+)", reaches_countdown),
}


def _solves(form: str, question: str, answer: str) -> bool:
    pattern, rule = _RULES[form]
    match = re.fullmatch(pattern, question)
    return match is not None and rule(*match.groups(), answer)
