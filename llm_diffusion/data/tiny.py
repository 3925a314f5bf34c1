"""The generator of the chat data that the embedded base model was trained on; `tiny` wherever a dataset name goes.

Six kinds of task, each question with exactly one right answer. Figures measured on them rank recipes; they do not predict what
a recipe does to an 8B model.

    kind        question                                           answer
    arithmetic  Tom has 23 apples. Tom gets 45 more. How many …    23+45=68. The answer is 68.
    sort        Sort the letters: k d e a                          a d e k
    reverse     Reverse the letters: k d e a                       a e d k
    compare     Which is greater, 45 or 37?                        45 is greater than 37.
    fill        Fill the gap: 3 6 _ 12 15                          3 6 9 12 15
    sudoku      Solve the sudoku:\\n1004\\n0400\\n…                    1234\\n3412\\n…     (looking ahead helps)
"""

from __future__ import annotations

import itertools
import operator
import random
import string
import zlib
from collections.abc import Iterator
from functools import lru_cache

from datasets import Dataset

from .. import UserError

LEFT_TO_RIGHT_KINDS = ("arithmetic", "sort", "reverse", "compare", "fill")
KINDS = (*LEFT_TO_RIGHT_KINDS, "sudoku")
SPLITS = ("train", "test")

_NAMES = "Tom Ann Bob Eve Sam Mia Leo Zoe".split()
_THINGS = "apples books coins pens cards shells stamps eggs".split()


def _arithmetic(rng: random.Random) -> tuple[str, str]:
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    total = rng.randrange(10, 100)
    sentences, steps = [f"{name} has {total} {thing}."], []
    for _ in range(rng.randrange(1, 4)):
        operation = rng.choice(("gets", "gives", "buys"))
        if operation == "buys":
            bags, size = rng.randrange(2, 10), rng.randrange(2, 10)
            sentences.append(f"{name} buys {bags} bags of {size} {thing}.")
            steps.append(f"{bags}*{size}={bags * size}.")
            change = bags * size
        elif operation == "gets" or total < 12:
            change = rng.randrange(10, 100)
            sentences.append(f"{name} gets {change} more.")
        else:
            change = -rng.randrange(10, min(100, total))
            sentences.append(f"{name} gives away {-change}.")
        steps.append(f"{total}{change:+d}={total + change}.")
        total += change
    question = " ".join(sentences) + f" How many {thing} does {name} have now?"
    return question, " ".join(steps) + f" The answer is {total}."


def _sort(rng: random.Random) -> tuple[str, str]:
    letters = rng.sample(string.ascii_lowercase, rng.randrange(4, 9))
    return "Sort the letters: " + " ".join(letters), " ".join(sorted(letters))


def _reverse(rng: random.Random) -> tuple[str, str]:
    letters = rng.sample(string.ascii_lowercase, rng.randrange(4, 9))
    return "Reverse the letters: " + " ".join(letters), " ".join(reversed(letters))


def _compare(rng: random.Random) -> tuple[str, str]:
    first, second = rng.sample(range(10, 1000), 2)
    word, pick = rng.choice((("greater", max), ("smaller", min)))
    winner = pick(first, second)
    return f"Which is {word}, {first} or {second}?", f"{winner} is {word} than {first + second - winner}."


def _fill(rng: random.Random) -> tuple[str, str]:
    start, step, length = rng.randrange(1, 50), rng.randrange(1, 10), rng.randrange(4, 8)
    terms = [str(start + step * i) for i in range(length)]
    gap = rng.randrange(length)
    question = " ".join("_" if i == gap else term for i, term in enumerate(terms))
    return "Fill the gap: " + question, " ".join(terms)


@lru_cache(maxsize=1)
def _sudoku_grids() -> tuple[str, ...]:
    """All 288 solved 4x4 grids, as 16 digits row by row."""
    rows = ["".join(row) for row in itertools.permutations("1234")]

    def fits(grid: tuple[str, ...], row: str) -> bool:
        if any(a == b for above in grid for a, b in zip(above, row, strict=True)):
            return False
        return len(grid) % 2 == 0 or all(set(grid[-1][c : c + 2]).isdisjoint(row[c : c + 2]) for c in (0, 2))

    grids: list[tuple[str, ...]] = [()]
    for _ in range(4):
        grids = [(*grid, row) for grid in grids for row in rows if fits(grid, row)]
    return tuple("".join(grid) for grid in grids)


def _sudoku(rng: random.Random) -> tuple[str, str]:
    """Nine to twelve of the 16 cells are blank ("0"); puzzles with more than one solution are drawn again."""
    grids = _sudoku_grids()
    while True:
        grid, shown = rng.choice(grids), rng.sample(range(16), rng.randrange(4, 8))
        cells_of = operator.itemgetter(*shown)
        if sum(cells_of(other) == cells_of(grid) for other in grids) == 1:
            break
    cells = "".join(digit if i in shown else "0" for i, digit in enumerate(grid))
    as_rows = ["\n".join(digits[r : r + 4] for r in range(0, 16, 4)) for digits in (cells, grid)]
    return "Solve the sudoku:\n" + as_rows[0], as_rows[1]


_TASKS = dict(zip(KINDS, (_arithmetic, _sort, _reverse, _compare, _fill, _sudoku), strict=True))


def tiny_examples(seed: int = 0, split: str = "train", kinds: tuple[str, ...] = KINDS) -> Iterator[dict]:
    """Endless stream of chats, `{"messages": [user, assistant], "kind": str}`; the kinds take turns.

    Every example has its own generator keyed by (seed, split, index): the stream can be entered anywhere and is the
    same on every machine. A prompt belongs to one split only, by a checksum of its text.

    Args:
        split: "train" or "test" (held out: one prompt in twenty).
        kinds: a subset of `KINDS`.

    Raises:
        ValueError: unknown split or kind.
    """
    if split not in SPLITS:
        raise UserError(f"`split` must be one of {SPLITS}, got {split!r}.")
    if not kinds or set(kinds) - set(KINDS):
        raise UserError(f"`kinds` must be a non-empty subset of {KINDS}, got {kinds!r}.")
    for index in itertools.count():
        rng = random.Random(f"{seed}/{split}/{index}")
        kind = kinds[index % len(kinds)]
        while True:
            question, answer = _TASKS[kind](rng)
            held_out = zlib.crc32(question.encode()) % 20 == 0
            if held_out == (split == "test"):
                break
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield {"messages": messages, "kind": kind}


def tiny_dataset(n: int, seed: int = 0, split: str = "train", kinds: tuple[str, ...] = KINDS) -> Dataset:
    """The first `n` examples of `tiny_examples` as a `datasets.Dataset` with the columns `messages` and `kind`."""
    return Dataset.from_list(list(itertools.islice(tiny_examples(seed, split, kinds), n)))


def is_right(example: dict, answer: str) -> bool:
    """Whether `answer` (text, surrounding blanks ignored) is the one right answer of a tiny example."""
    return answer.strip() == example["messages"][-1]["content"]
