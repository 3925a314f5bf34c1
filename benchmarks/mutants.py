"""Mutants of `objective/`: small faults put into its code one at a time, and the share that its tests notice.

    python benchmarks/mutants.py --mutants 100        # about a minute for ten on one core
    python benchmarks/mutants.py --only noise.py --mutants 1000

A mutant is the room with one comparison, operator, number or flag exchanged for its neighbour; it is caught when tests/objective fails, or
does not end in time. Those that survive are printed: a gap in the tests, or code that means the same.
"""

from __future__ import annotations

import argparse
import ast
import copy
import math
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOM = Path("llm_diffusion/objective")
SWAPS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
SWAPS |= {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Add,
}
SWAPS |= {ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And, ast.Pow: ast.Mult}
SWAPS |= {ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}


def code_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those of annotations and of `setting(…)`, whose defaults and bounds are choices, not logic."""
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns"):
            continue
        for node in value if isinstance(value, list) else [value]:
            if isinstance(node, ast.AST) and not (
                isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setting"
            ):
                yield node
                yield from code_nodes(node)


def changes(node: ast.AST) -> list[Callable[[ast.AST], None]]:
    """What can be exchanged in a node: functions that do so in it, or in its copy."""
    if isinstance(node, ast.Compare):
        kinds = [(place, SWAPS[type(op)]) for place, op in enumerate(node.ops)]
        return [lambda n, place=place, kind=kind: n.ops.__setitem__(place, kind()) for place, kind in kinds]
    if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in SWAPS:
        return [lambda n: setattr(n, "op", SWAPS[type(n.op)]())]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not | ast.Invert):  # twice: undone
        return [lambda n: setattr(n, "operand", ast.UnaryOp(n.op, n.operand))]
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        return [lambda n: setattr(n, "value", not n.value)]
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return [lambda n: setattr(n, "value", n.value + 1)]
    return []


def mutants(source: str) -> Iterator[tuple[int, str, str]]:
    """(line, what was changed, source) of every mutant of a file."""
    tree = ast.parse(source)
    for place, node in enumerate(code_nodes(tree)):
        for number in range(len(changes(node))):
            other = copy.deepcopy(tree)
            changed = list(code_nodes(other))[place]
            before = ast.unparse(changed)
            changes(changed)[number](changed)
            yield (
                node.lineno,
                f"`{before:.60}` -> `{ast.unparse(changed):.60}`",
                ast.unparse(ast.fix_missing_locations(other)),
            )


def caught(folder: Path, name: str = "", seconds: float = math.inf) -> bool:
    """Whether the tests fail, in a fork that finds the libraries imported; those of the file called `name` come first."""
    child = os.fork()
    if child == 0:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
        if seconds < math.inf:  # of the processor, so that what else the machine does catches no mutant
            resource.setrlimit(resource.RLIMIT_CPU, (int(seconds),) * 2)
        import pytest

        tests = folder / "tests/objective"
        own = [file for file in [tests / f"test_{name}"] if file.is_file()]
        os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *map(str, own), str(tests)])))
    return os.waitpid(child, 0)[1] != 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=100, help="a sample of so many, of all files together")
    parser.add_argument("--only", nargs="*", default=None, help="names of files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60, help="no new mutant after these")
    args = parser.parse_args()
    files = [file for file in sorted((ROOT / ROOM).glob("*.py")) if args.only is None or file.name in args.only]
    every = [(file, *mutant) for file in files for mutant in mutants(file.read_text())]
    sample = random.Random(args.seed).sample(every, min(args.mutants, len(every)))

    # Every mutant is a fork of this process: what its tests import is there already.
    import hypothesis  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    sys.dont_write_bytecode = True  # one second has many mutants of a file
    found, survivors, started = Counter(), [], time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(ROOT / "llm_diffusion", folder / "llm_diffusion", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        os.chdir(folder)
        sys.path[:] = [
            str(folder),
            *(path for path in sys.path if Path(path or ".").resolve() not in (ROOT, Path(__file__).parent)),
        ]
        if caught(folder):
            sys.exit("the tests fail without a mutant")
        limit = 60 + 5 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        for file, line, change, source in sample:
            if time.monotonic() - started > 60 * args.minutes:
                break
            (folder / ROOM / file.name).write_text(source)
            right = caught(folder, file.name, limit)
            shutil.copy(file, folder / ROOM)
            found[file.name, right] += 1
            if not right:
                survivors.append(f"- {file.name}:{line} {change}")
                print(survivors[-1], flush=True)
    print("\n| file | caught | tried |\n|---|--:|--:|")
    rows = [(file.name, found[file.name, True], found[file.name, False]) for file in files]
    rows.append(("all", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    for file, right, wrong in rows:
        if right + wrong:
            print(f"| {file} | {right} ({right / (right + wrong):.0%}) | {right + wrong} |")


if __name__ == "__main__":
    main()
