"""Bounds against exact numbers: on the oracle bed every estimator must find -log p(x), in every layout and read-out; windows of long texts."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from oracle import MarkovChain
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutput

import llm_diffusion as ld
from llm_diffusion import UserError, load_diffusion_model
from llm_diffusion.evaluation.likelihood import (
    Row,
    autoregressive_rows,
    block_rows,
    bound_rows,
    likelihood,
    log_likelihood_bound,
    pair_row,
    text_rows,
    windows,
)
from llm_diffusion.objective.estimators import ESTIMATORS

BED = MarkovChain(n_states=8, length=32)
SMALL = MarkovChain(n_states=4, length=8)


class Oracle(torch.nn.Module):
    """A perfect model of a chain that sees what its attention mask shows, at the places its position ids give."""

    def __init__(self, chain: MarkovChain, **record: object) -> None:
        super().__init__()
        self.chain, self.dtype, self.device = chain, torch.float32, torch.device("cpu")
        self.shift = record.get("right_shift_logits", False)
        self.config = SimpleNamespace(diffusion={"mask_token_id": chain.mask_token_id, **record})
        self.rows_seen = 0

    def forward(self, input_ids, attention_mask, position_ids=None, logits_to_keep=None, use_cache=False):
        chain, (n_rows, width) = self.chain, input_ids.shape
        self.rows_seen += n_rows
        place = torch.arange(width).expand(n_rows, width) if position_ids is None else position_ids
        if attention_mask.dim() == 2:
            allowed = (attention_mask > 0)[:, None, :].expand(n_rows, width, width)
        else:
            allowed = attention_mask[:, 0] == 0
        row, query = logits_to_keep.nonzero(as_tuple=True)
        seen = allowed[row, query] & (input_ids[row] != chain.mask_token_id)
        # What is not seen is put into a column that is cut off; both halves of a text have the same places.
        column = torch.where(seen, place[row], chain.length)
        ids = torch.zeros(len(row), chain.length + 1, dtype=torch.long).scatter(1, column, input_ids[row])[:, :-1]
        visible = torch.zeros(len(row), chain.length + 1, dtype=torch.bool).scatter(1, column, seen)[:, :-1]
        target = place[row, query] + self.shift
        logits = chain.log_conditionals(ids, visible)[torch.arange(len(row)), target]
        return CausalLMOutput(logits=F.pad(logits.clamp(min=-1e4), (0, 1), value=-1e4))


class Whole(Oracle):
    """The same of bidirectional, unpadded rows, all at once."""

    def forward(self, input_ids, attention_mask, logits_to_keep=None, use_cache=False):
        assert attention_mask.all()
        self.rows_seen += len(input_ids)
        return CausalLMOutput(logits=self.chain(input_ids)[logits_to_keep])


def rows_of(chain: MarkovChain, n: int, first: int = 0, seed: int = 0) -> list[Row]:
    return [Row(tuple(ids), first, i) for i, ids in enumerate(chain.sample(n, seed).tolist())]


def exact(chain: MarkovChain, row: Row) -> float:
    """-log p(tokens from `first` on | those before), nats."""
    joint = chain.log_prob(torch.tensor([row.ids]))
    if not row.first:
        return float(-joint)
    before = MarkovChain(chain.n_states, row.first, chain.stay).log_prob(torch.tensor([row.ids[: row.first]]))
    return float(before - joint)


LAYOUTS = {
    "own position": {},
    "shifted": {"right_shift_logits": True},
    "blocks": {"attention": "block", "block_length": 3, "clean_context": "causal", "right_shift_logits": True},
    "block-causal": {"attention": "block", "block_length": 4, "clean_context": "block", "right_shift_logits": False},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimates_are_the_exact_likelihood(layout: str, estimator: str) -> None:
    model, rows = Oracle(SMALL, **LAYOUTS[layout]), rows_of(SMALL, 6, first=2)
    block = 3 if estimator == "per_block" and "block_length" not in LAYOUTS[layout] else None
    samples = 8 if estimator == "any_order" else 64
    found = bound_rows(model, rows, estimator=estimator, n_samples=samples, block_length=block)
    wanted = [exact(SMALL, row) for row in rows]
    if estimator == "left_to_right":
        assert found.nats == pytest.approx(wanted, abs=1e-4) and found.standard_error == 0
    else:
        assert abs(sum(found.nats) - sum(wanted)) < 3 * found.standard_error * sum(found.tokens) + 1e-4
        assert 0 < found.standard_error < 0.1
    assert found.tokens == [6] * 6 and found.estimator == estimator


def test_the_expectation_over_all_counts_and_sets_is_exact() -> None:
    """The same number again, without any draw: every set of masks, weighed by its chance."""
    chain = MarkovChain(n_states=3, length=4)
    (row,) = rows_of(chain, 1)
    total = 0.0
    for k in range(1, 5):
        sets = list(itertools.combinations(range(4), k))
        for chosen in sets:
            ids = torch.tensor([row.ids])
            ids[0, list(chosen)] = chain.mask_token_id
            predicted = chain(ids)[0].log_softmax(-1)
            total -= sum(float(predicted[i, row.ids[i]]) for i in chosen) * (4 / k) / len(sets) / 4
    assert total == pytest.approx(exact(chain, row), abs=1e-6)
    found = bound_rows(Whole(chain), [row], n_samples=4096)
    assert found.nats[0] == pytest.approx(total, abs=4 * found.errors[0])


def test_exact_counts_are_within_a_twentieth_of_a_nat_at_128_samples() -> None:
    """RMSE a token over 100 seeds (a text given 100 times has noise of its own each time), and the standard error beside the spread."""
    (row,) = rows_of(BED, 1)
    found = bound_rows(Whole(BED), [Row(row.ids, 0, i) for i in range(100)], n_samples=128, batch_size=4096)
    errors = (torch.tensor(found.nats) - exact(BED, row)) / 32
    spread = float(errors.std())
    assert 0.005 < float(errors.square().mean().sqrt()) < 0.05
    assert abs(float(errors.mean())) < 3 * spread / math.sqrt(100)
    foretold = torch.tensor(found.errors).square().mean().sqrt() / 32
    assert float(foretold) == pytest.approx(spread, rel=0.2)


def test_seeds_draw_anew_and_nothing_else_does() -> None:
    model, rows = Oracle(SMALL), rows_of(SMALL, 4) + [Row(rows_of(SMALL, 1)[0].ids[:5], 1, 4)]
    found = bound_rows(model, rows, n_samples=16, batch_size=1)
    for again in ({"batch_size": 7}, {"batch_size": 1}):
        assert bound_rows(model, rows, n_samples=16, **again).nats == pytest.approx(found.nats, abs=1e-6)
    alone = bound_rows(model, [Row(rows[2].ids, 0)], n_samples=16)
    assert alone.nats[0] == pytest.approx(found.nats[2], abs=1e-6)
    assert bound_rows(model, rows, n_samples=16, seed=1).nats != found.nats


def test_equal_masks_are_computed_once() -> None:
    """A completion of one token has one mask, whatever the number of samples."""
    model, (row,) = Oracle(SMALL), rows_of(SMALL, 1, first=7)
    found = bound_rows(model, [row], n_samples=128)
    assert model.rows_seen == 1 and found.nats[0] == pytest.approx(exact(SMALL, row), abs=1e-5)
    model.rows_seen = 0
    bound_rows(model, [Row(row.ids, 5)], n_samples=128)
    assert model.rows_seen <= 7  # sets of three tokens


def test_levels_are_the_nll_at_each_share_of_masks() -> None:
    """The last level has everything masked: behind a known first token, each token is foretold by the chain alone."""
    chain = MarkovChain(n_states=4, length=5)
    (row,) = rows_of(chain, 1, first=1)
    found = bound_rows(Whole(chain), [row], n_samples=512)
    assert [level for level, _, _ in found.levels] == [
        0.3,
        0.5,
        0.8,
        1.0,
    ]  # up to 1/4, 1/2, 3/4 and all, in bins of a tenth
    ids = torch.tensor([row.ids])
    ids[0, 1:] = chain.mask_token_id
    predicted = chain(ids)[0].log_softmax(-1)
    assert found.levels[-1][1] == pytest.approx(
        -sum(float(predicted[i, row.ids[i]]) for i in range(1, 5)) / 4, abs=1e-4
    )


def test_levels_of_whole_tenths_are_in_the_bins_that_end_there() -> None:
    chain = MarkovChain(n_states=4, length=11)  # ten scored tokens: every count of masks is a tenth
    found = bound_rows(Whole(chain), rows_of(chain, 1, first=1), n_samples=80)
    assert [level for level, _, _ in found.levels] == [i / 10 for i in range(1, 11)]


TEXTS = ["Tom has 23 apples. Tom gets 45 more.", "Sort the letters: k d e a", "3 6 9"]


@pytest.fixture(scope="module")
def models(tiny, tmp_path_factory):
    """The embedded model in every layout; weights are those of the AR model, which is all that these tests need."""
    return {
        "bidirectional": tiny,
        "own position": load_diffusion_model("tiny", right_shift_logits=False, device="cpu"),
        "block": load_diffusion_model("tiny", attention="block", block_length=4, device="cpu"),
        "timed": load_diffusion_model("tiny", time_embedding=True, device="cpu"),
    }


@pytest.mark.parametrize("kind", ["bidirectional", "own position", "block", "timed"])
def test_batches_and_runs_agree_on_a_real_model(models, kind) -> None:
    model, tokenizer = models[kind]
    found = [likelihood(model, tokenizer, TEXTS, n_samples=8, batch_size=size) for size in (1, 5, 16)]
    for other in found[1:]:
        for nats, others, tokens in zip(found[0].nats, other.nats, other.tokens, strict=True):
            assert nats / tokens == pytest.approx(others / tokens, abs=1e-4)
    assert likelihood(model, tokenizer, TEXTS, n_samples=8, batch_size=5).nats == found[1].nats
    context = [tokenizer.decode(tokenizer(text)["input_ids"][:1]) for text in TEXTS]
    assert found[0].n_bytes == [len(text) - len(first) for text, first in zip(TEXTS, context, strict=True)]
    assert found[0].bits_per_byte == pytest.approx(sum(found[0].nats) / math.log(2) / sum(found[0].n_bytes))
    assert found[0].perplexity_bound == pytest.approx(math.exp(found[0].nats_per_token))


def test_the_ar_figure_is_the_loss_of_transformers(tiny) -> None:
    from transformers import AutoModelForCausalLM

    from llm_diffusion.models.checkpoints import TINY_MODEL_PATH

    model, tokenizer = tiny
    original = AutoModelForCausalLM.from_pretrained(TINY_MODEL_PATH, dtype=torch.float32).eval()
    found = likelihood(model, tokenizer, TEXTS, autoregressive=True, batch_size=2)
    for text, nats, tokens in zip(TEXTS, found.nats, found.tokens, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            assert nats / tokens == pytest.approx(float(original(input_ids=ids, labels=ids).loss), abs=1e-5)
    assert found.standard_error == 0 and found.estimator == "autoregressive"


def test_blocks_of_one_with_a_causal_clean_half_are_the_ar_model() -> None:
    model, tokenizer = load_diffusion_model("tiny", attention="block", block_length=1, device="cpu")
    found = likelihood(model, tokenizer, TEXTS, n_samples=8)
    assert found.nats == pytest.approx(likelihood(model, tokenizer, TEXTS, autoregressive=True).nats, abs=1e-3)
    assert found.standard_error == 0


def test_left_to_right_in_a_block_model_is_its_greedy_decoding_score(models) -> None:
    """Against plain forwards over [text, masks to the end of the block], which know nothing of the clean half's layout."""
    from llm_diffusion.objective.attention_masks import additive, block_decoding

    model, tokenizer = models["block"]
    ids = torch.tensor(tokenizer(TEXTS[0])["input_ids"][:12])[None]
    nats = 0.0
    for place in range(1, 12):
        seen = ids[:, : 4 * (place // 4) + 4].clone()
        seen[:, place:] = tokenizer.mask_token_id
        active = torch.tensor([place // 4])
        if place % 4 == 0:  # read from the text before it
            seen, active = seen[:, :place], active - 1
            mask = block_decoding(torch.ones_like(seen), 4, "causal", torch.tensor([99]))
        else:
            mask = block_decoding(torch.ones_like(seen), 4, "causal", active)
        with torch.no_grad():
            logits = model(input_ids=seen, attention_mask=additive(mask)).logits[0, place - 1]
        nats -= float(logits.float().log_softmax(-1)[ids[0, place]])
    found = bound_rows(model, [Row(tuple(ids[0].tolist()), 1)], estimator="left_to_right")
    assert found.nats[0] == pytest.approx(nats, abs=1e-3)


def test_completions_are_ranked(tiny) -> None:
    model, tokenizer = tiny
    prompts, answers = ["Tom has 23 apples.", [{"role": "user", "content": "3 6"}]], [" Tom gets", "9"]
    both = log_likelihood_bound(model, tokenizer, prompts, answers, n_samples=16)
    alone = log_likelihood_bound(model, tokenizer, prompts[1], answers[1], n_samples=16)
    assert both.nats[1] == pytest.approx(alone.nats[0], abs=1e-4)
    assert both.tokens[0] == len(tokenizer("Tom has 23 apples. Tom gets")["input_ids"]) - len(
        tokenizer("Tom has 23 apples.")["input_ids"]
    )


def test_bad_input(tiny) -> None:
    model, tokenizer = tiny
    for settings, message in (
        ({"estimator": "exact"}, "`estimator` must be one of"),
        ({"n_samples": 12}, "`n_samples` must be a multiple"),
        ({"estimator": "per_block"}, "`block_length` is needed"),
        ({"max_length": 1}, "`max_length` must be"),
    ):
        with pytest.raises(ValueError, match=message):
            likelihood(model, tokenizer, TEXTS, **settings)
    with pytest.raises(ValueError, match="text 1 .*at least 2"):
        likelihood(model, tokenizer, ["ab cd", "a"])
    with pytest.raises(ValueError, match="`texts` are empty"):
        text_rows(tokenizer, [])
    with pytest.raises(ValueError, match="adds no token"):
        log_likelihood_bound(model, tokenizer, "ab", "")
    with pytest.raises(ValueError, match="no context before"):
        bound_rows(model, [Row((5, 6), 0)])
    lossless, tokenizer = load_diffusion_model("tiny", attention="lossless", device="cpu")
    with pytest.raises(ValueError, match="autoregressive_rows"):
        likelihood(lossless, tokenizer, TEXTS)
    assert autoregressive_rows(lossless, text_rows(tokenizer, TEXTS)).tokens


@pytest.mark.parametrize(
    ("n", "first", "length", "stride"), list(itertools.product((2, 5, 6, 7, 20), (1, 4), (6, 7), (1, 3, 5)))
)
def test_every_token_is_scored_once_behind_its_own_past(n: int, first: int, length: int, stride: int) -> None:
    first = min(first, n - 1)
    ids = tuple(range(100, 100 + n))
    parts = windows(Row(ids, first, 9), length, stride)
    assert [token for part in parts for token in part.ids[part.first :]] == list(ids[first:])
    for part in parts:
        start = part.ids[0] - 100
        assert part.ids == ids[start : start + len(part.ids)] and part.text == 9
        assert len(part.ids) <= length and part.first >= min(length - stride, first)
    for part in parts[1:]:
        assert len(part.ids) == length and len(part.ids) - part.first <= stride


def test_the_example_of_the_documentation() -> None:
    parts = windows(Row(tuple("abcdefghij"), 1), 6, 3)
    assert ["".join(p.ids[: p.first]) + "".join(p.ids[p.first :]).upper() for p in parts] == [
        "aBCDEF",
        "defGHI",
        "efghiJ",
    ]


def test_a_short_text_is_one_window() -> None:
    assert windows(Row((1, 2, 3), 1), 6, 3) == [Row((1, 2, 3), 1)]


def test_blocks_see_all_before_and_nothing_behind() -> None:
    assert block_rows([Row((1, 2, 3, 4, 5, 6, 7), 2, 5)], 3) == [
        Row((1, 2, 3), 2, 5),
        Row((1, 2, 3, 4, 5, 6), 3, 5),
        Row((1, 2, 3, 4, 5, 6, 7), 6, 5),
    ]


def test_blanks_between_prompt_and_completion_are_scored(tokenizer) -> None:
    for prompt, completion in (("ab cd ", "ef"), ("ab cd", " ef")):
        row = pair_row(tokenizer, prompt, completion)
        assert tokenizer.decode(row.ids[: row.first]) == "ab cd" and tokenizer.decode(row.ids[row.first :]) == " ef"
    assert pair_row(tokenizer, "", "abc").first == 1


@pytest.mark.parametrize(
    ("prompt", "completion", "scored"), [("ab cd ", "ef", " ef"), ("ab cd", " ef", " ef"), ("", "abc", None)]
)
def test_bytes_are_those_of_the_scored_text(tiny, prompt, completion, scored) -> None:
    if scored is None:  # the first token is context
        row = pair_row(tiny[1], prompt, completion)
        scored = tiny[1].decode(row.ids[1:])
        assert len(scored) < len(completion)
    assert log_likelihood_bound(*tiny, prompt, completion, n_samples=8).n_bytes == [len(scored)]


TURNS = [{"role": "user", "content": "3 6"}]
BAD_BOUNDS = [
    (("a", None), {}, "`completion`"),
    ((None, "b"), {}, "`prompt`"),
    ((5, "b"), {}, "`prompt`"),
    (("a", 5), {}, "`completion`"),
    (("a", ["b", None]), {}, "`completion`"),
    (("a", []), {}, "`completion`"),
    (([], []), {}, "`completion`"),
    ((["a", "b"], ["c"]), {}, "`prompt`"),
    ((["a"], ["b", "c"]), {}, "`prompt`"),
    ((["a"], "b"), {}, "`prompt`"),
    ((["a", None], ["b", "c"]), {}, "`prompt`"),
    (("a", "\ud800"), {}, "`completion`"),
    (("a", ""), {}, "`completion`"),
    *((("a", "b"), {"n_samples": n}, "`n_samples`") for n in ("x", None, 0, -8, 7, 1.5, True, 10**7)),
    *((("a", "b"), {"batch_size": n}, "`batch_size`") for n in (0, -1, "x", None, 1.5)),
    *((("a", "b"), {"seed": seed}, "`seed`") for seed in ("x", None, -1, 1.5)),
    *((("a", "b"), {"replicates": n}, "`replicates`") for n in (1, 0, "x", None)),
    *((("a", "b"), {"max_length": n}, "`max_length`") for n in (1, 10**9, -3)),
    (("a", "b"), {"estimator": "x"}, "`estimator`"),
]


@pytest.mark.parametrize(("texts", "settings", "named"), BAD_BOUNDS)
def test_bounds_of_nothing(tiny, texts, settings, named):
    with pytest.raises(UserError, match=named):
        ld.log_likelihood_bound(*tiny, *texts, **settings)


def test_one_prompt_has_many_completions(tiny):
    few = {"n_samples": 8}
    whole = ld.log_likelihood_bound(*tiny, ["3 6", "3 6"], [" 9", " 12 15"], **few)
    assert ld.log_likelihood_bound(*tiny, "3 6", [" 9", " 12 15"], **few).nats == whole.nats
    whole = ld.log_likelihood_bound(*tiny, [TURNS, TURNS], ["9", "12"], **few)
    assert ld.log_likelihood_bound(*tiny, TURNS, ["9", "12"], **few).nats == whole.nats


@pytest.mark.parametrize("autoregressive", [True, False])
def test_weights_that_are_not_finite_have_no_likelihood(random_diffuser, tokenizer, autoregressive):
    model = random_diffuser(True, vocab_size=512)
    torch.nn.init.constant_(model.model.norm.weight, torch.nan)
    with pytest.raises(UserError, match="`model`: its logits are not finite"):
        likelihood(
            model, tokenizer, ["3 6 9"], autoregressive=autoregressive, **({} if autoregressive else {"n_samples": 8})
        )
