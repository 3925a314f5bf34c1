"""Trees of drafts, against a search through all paths, and against walking along what the base predicts."""

from itertools import product

import pytest
import torch
from transformers import DynamicCache

from llm_diffusion.speculative.trees import accept_tree, likeliest_tree, reorder_columns


def paths_of(tree, row: int) -> list[tuple[int, ...]]:
    """The path of tokens to each of a tree's tokens, by walking back along its parents."""
    tokens, parents = tree.tokens[row].tolist(), tree.parents[row].tolist()
    found = []
    for at in range(len(tokens)):
        path, now = (), at + 1
        while now:
            path, now = (tokens[now - 1], *path), parents[now - 1]
        found.append(path)
    return found


@pytest.mark.parametrize("vocab, m", [(4, 4), (6, 3), (3, 1), (5, 2)])
@pytest.mark.parametrize("n", [1, 3, 7, 12])
@pytest.mark.parametrize("sharpness", [0.2, 3.0])
def test_the_tree_has_the_likeliest_paths(vocab, m, n, sharpness):
    logits = torch.randn(5, m, vocab, generator=torch.Generator().manual_seed(n)) * sharpness
    tree = likeliest_tree(logits, n)
    for row, log_p in enumerate(logits.log_softmax(-1).tolist()):
        every = [path for length in range(1, m + 1) for path in product(range(vocab), repeat=length)]
        score = {path: sum(log_p[place][token] for place, token in enumerate(path)) for path in every}
        want = sorted(every, key=lambda path: -score[path])[:n]
        found = paths_of(tree, row)
        assert len(set(found)) == len(found) == min(n, len(every))
        # Scores, not paths: near ties may fall either way.
        assert sorted(score[path] for path in found) == pytest.approx(sorted(score[path] for path in want), abs=0.01)
        best = [max(range(vocab), key=place.__getitem__) for place in log_p]
        chain = [list(path) == best[: len(path)] for path in found]
        assert tree.chain[row].tolist() == chain == sorted(chain, reverse=True)
        ranked = [found[at] for at in tree.ranks[row].argsort().tolist()]
        assert [score[path] for path in ranked] == pytest.approx(sorted(map(score.get, ranked), reverse=True), abs=0.01)
        for at, path in enumerate(found):
            seen = [other for other, sees in zip(found, tree.sees[row, at + 1, 1:].tolist(), strict=True) if sees]
            assert sorted(seen, key=len) == [path[:length] for length in range(1, len(path) + 1)]
    assert tree.sees[:, :, 0].all() and not tree.sees[:, 0, 1:].any()
    assert (tree.parents <= torch.arange(tree.parents.shape[-1])).all()  # what is followed stands before


def test_banned_tokens_and_sure_guesses_make_no_odd_tree():
    logits = torch.full((1, 3, 4), -1e9)
    logits[..., 2] = 0  # one token has all of the probability, and the log of it is 0
    tree = likeliest_tree(logits, 8)
    assert [path for path in paths_of(tree, 0) if set(path) == {2}] == [(2,), (2, 2), (2, 2, 2)]
    assert len(set(paths_of(tree, 0))) == 8 and tree.ranks[0, :3].tolist() == [0, 1, 2]


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_guesses_that_are_no_numbers_still_make_a_tree(odd, share):
    chance = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 4, 6, generator=chance)
    logits[torch.rand(logits.shape, generator=chance) < share] = odd
    tree = likeliest_tree(logits, 9)
    assert (tree.parents <= torch.arange(9)).all()
    for row in range(8):
        assert len(set(paths_of(tree, row))) == 9 and max(map(len, paths_of(tree, row))) <= 4


@pytest.mark.parametrize("seed", range(6))
def test_the_path_that_the_base_takes(seed):
    chance = torch.Generator().manual_seed(seed)
    tree = likeliest_tree(torch.randn(16, 4, 3, generator=chance) * 2, 9)
    target = torch.randn(16, 10, 3, generator=chance)
    accepted, order, token = accept_tree(tree, target)
    lengths = set()
    for row in range(16):
        tokens, parents, best = tree.tokens[row].tolist(), tree.parents[row].tolist(), target[row].argmax(-1).tolist()
        path = [0]
        while following := [at + 1 for at in range(9) if parents[at] == path[-1] and tokens[at] == best[path[-1]]]:
            path += following
        assert accepted[row] == len(path) - 1 and order[row, : len(path)].tolist() == path
        assert sorted(order[row].tolist()) == list(range(10)) and token[row] == best[path[-1]]
        lengths.add(len(path))
    assert len(lengths) > 2


def test_columns_of_a_cache_are_put_in_order():
    cache = DynamicCache()
    states = torch.arange(2 * 3 * 6 * 4.0).view(2, 3, 6, 4)
    cache.update(states.clone(), -states, 0)
    reorder_columns(cache, torch.tensor([[0, 3, 1, 2], [0, 1, 3, 2]]), 3)
    for row, columns in enumerate(([0, 1, 2, 5, 3], [0, 1, 2, 3, 5])):
        assert torch.equal(cache.layers[0].keys[row, :, :5], states[row, :, columns])
        assert torch.equal(cache.layers[0].values[row, :, :5], -states[row, :, columns])
