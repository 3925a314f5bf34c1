"""The masked-diffusion loss: its formula, its precision, and that it estimates a known likelihood without bias."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from collators import collator_of
from oracle import MarkovChain

from llm_diffusion.objective.losses import (
    entropy,
    loss_weights,
    relative_error,
    soft_cross_entropy,
    token_nll,
    total_variation,
)
from llm_diffusion.objective.modes import IGNORE_INDEX
from llm_diffusion.objective.noise import NOISE_SCHEDULES, get_noise_schedule, stratified_times
from llm_diffusion.training.collator import DataCollatorForMaskedDiffusion

CHAIN = MarkovChain(n_states=8, length=32)
N_ROWS = 4096


def weighted_nll(logits, targets, weights):
    """What the trainer does with the terms."""
    terms = token_nll(logits, targets)
    return (terms * weights).sum(), terms.detach()


def random_rows(n: int, vocabulary: int = 13) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(n, V) logits, (n,) targets, (n,) weights."""
    generator = torch.Generator().manual_seed(n)
    logits = 4 * torch.randn(n, vocabulary, generator=generator)
    return logits, torch.randint(vocabulary, (n,), generator=generator), torch.rand(n, generator=generator) * 9


@pytest.mark.parametrize("n", [1, 2, 50])
def test_loss_is_the_weighted_sum(n: int) -> None:
    logits, targets, weights = random_rows(n)
    logits.requires_grad_()
    loss, terms = weighted_nll(logits, targets, weights)
    log_probs = logits.double().log_softmax(-1)
    expected = torch.stack([-log_probs[i, targets[i]] for i in range(n)])
    torch.testing.assert_close(terms.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss.double(), (expected * weights).sum(), rtol=1e-5, atol=1e-6)
    loss.backward()
    one_hot = torch.nn.functional.one_hot(targets, logits.shape[-1])
    gradient = weights[:, None] * (log_probs.detach().exp() - one_hot)
    torch.testing.assert_close(logits.grad.double(), gradient, rtol=1e-5, atol=1e-6)


def test_loss_of_a_batch_is_the_sum_of_its_parts() -> None:
    rows = random_rows(50)
    whole, _ = weighted_nll(*rows)
    parts = sum(weighted_nll(*(value[cut] for value in rows))[0] for cut in (slice(0, 7), slice(7, 8), slice(8, 50)))
    torch.testing.assert_close(whole, parts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_scored_in_fp32(dtype: torch.dtype) -> None:
    logits, targets, weights = random_rows(50)
    logits = logits.to(dtype).requires_grad_()
    loss, terms = weighted_nll(logits, targets, weights)
    expected, expected_terms = weighted_nll(logits.float(), targets, weights)
    assert loss.dtype == terms.dtype == torch.float32
    assert torch.equal(loss, expected) and torch.equal(terms, expected_terms)
    # The point of it: scored in their own type they would be off by more than rounding of the sum.
    assert (torch.nn.functional.cross_entropy(logits, targets, reduction="none").float() - terms).abs().max() > 1e-4
    loss.backward()
    assert logits.grad.dtype == dtype


def test_nothing_masked_is_a_zero_with_a_gradient() -> None:
    weight = torch.ones(4, 13, requires_grad=True)
    loss, terms = weighted_nll(torch.zeros(0, 4) @ weight, torch.zeros(0, dtype=torch.long), torch.zeros(0))
    loss.backward()
    assert loss.item() == 0 and terms.shape == (0,) and torch.equal(weight.grad, torch.zeros(4, 13))


def weights_of(kind: str, t: float = 0.25, masked: str = "m.mm..m") -> torch.Tensor:
    hidden = torch.tensor([[letter == "m" for letter in masked]])
    times = torch.full(hidden.shape, t)
    probability, elbo = get_noise_schedule("linear")(times)
    return loss_weights(kind, elbo, probability, hidden, torch.ones_like(hidden, dtype=torch.long))


def test_loss_weights() -> None:
    assert (weights_of("elbo") == 4).all()
    assert (weights_of("uniform") == 1).all()
    assert (weights_of("clipped") == 4).all() and (weights_of("clipped", 0.001) == 10).all()
    torch.testing.assert_close(weights_of("snr"), torch.full((1, 7), 3**0.5))
    torch.testing.assert_close(weights_of("snr", 0.8), torch.full((1, 7), 0.5))
    assert (weights_of("snr", 1.0) == 0).all()


def test_cart_is_the_sum_over_visible_tokens() -> None:
    """Written out token by token; with nothing visible it is nothing, and other texts are no context."""
    for pattern in ("m.mm..m", "mmmmmmm", "......."):
        for n in range(7):
            want = 0.0
            for i, letter in enumerate(pattern):
                if letter == "." and i != n:
                    want += 0.5 * 0.3 * 0.7 ** (abs(n - i) - 1)
            assert weights_of("cart", masked=pattern)[0, n].item() == pytest.approx(want, abs=1e-6)
    masked = torch.tensor([[True, False, False, True]])
    ones = torch.ones(1, 4)
    two_texts = loss_weights("cart", ones, ones, masked, torch.tensor([[1, 1, 2, 2]]))
    assert two_texts[0].tolist() == pytest.approx([0.15, 0.0, 0.0, 0.15])


@pytest.mark.parametrize("kind", ["", "ELBO", "mean"])
def test_unknown_weight_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="loss_weight"):
        weights_of(kind)


def estimates(
    collator: DataCollatorForMaskedDiffusion, noisy: dict[str, torch.Tensor], chain: MarkovChain = CHAIN
) -> torch.Tensor:
    """(B,) fp64: every row's own sum of w * nll, the oracle being the model."""
    logits = chain(noisy["inputs"]["input_ids"])
    if collator.record.right_shift_logits:
        logits = logits.roll(-1, dims=1)  # state i - 1 holds what is known of token i; nothing asks for token 0
    keep = noisy["targets"] != IGNORE_INDEX
    weights = noisy["weights"][keep]
    loss, terms = weighted_nll(logits[keep], noisy["targets"][keep], weights)
    rows = keep.nonzero()[:, 0]
    own = torch.zeros(len(keep), dtype=torch.float64).index_add_(0, rows, (terms * weights).double())
    assert own.sum().item() == pytest.approx(loss.item(), rel=1e-4)
    return own


def repeated(x: torch.Tensor, n_rows: int, prompt: int = 0) -> dict[str, torch.Tensor]:
    """A batch of the same row: `x` is (1, L), of which the first `prompt` tokens are not trained."""
    ids = x.expand(n_rows, -1)
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < prompt, IGNORE_INDEX)
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def collator_for(schedule: str, right_shift: bool = False) -> DataCollatorForMaskedDiffusion:
    return collator_of(
        pad_token_id=0,
        mask_token_id=CHAIN.mask_token_id,
        noise_schedule=schedule,
        right_shift_logits=right_shift,
    )


@pytest.mark.parametrize("schedule", sorted(NOISE_SCHEDULES))
@pytest.mark.parametrize("right_shift, prompt", [(False, 0), (False, 12), (True, 1), (True, 12)])
def test_loss_estimates_the_exact_likelihood(schedule: str, right_shift: bool, prompt: int) -> None:
    """Of the answer given the prompt; the chain makes the bound tight, so that only noise is left."""
    collator, x = collator_for(schedule, right_shift), CHAIN.sample(1, seed=1)
    noisy = collator.corrupt(repeated(x, N_ROWS, prompt), seed=0, step=0, rows=torch.arange(N_ROWS), n_rows=N_ROWS)
    values = estimates(collator, noisy)
    exact = -(CHAIN.log_prob(x) - (CHAIN.log_prob(x[:, :prompt]) if prompt else 0)).item()
    error = (values.std() / N_ROWS**0.5).item()
    assert error < 0.03 * exact
    assert abs(values.mean().item() - exact) < 3 * error


def test_uniform_weights_are_no_likelihood() -> None:
    """Guards the test above: it can tell a wrong weight from the right one."""
    collator, x = collator_for("linear"), CHAIN.sample(1, seed=1)
    collator.settings.loss_weight = "uniform"
    values = estimates(collator, collator.corrupt(repeated(x, 512), seed=0, step=0, rows=torch.arange(512), n_rows=512))
    exact = -CHAIN.log_prob(x).item()
    assert abs(values.mean().item() - exact) > 10 * (values.std() / 512**0.5).item()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("size", [4, 16])
def test_stratified_times_lower_the_variance(schedule: str, size: int) -> None:
    """Of the loss of `size` rows given their times, its mean over masks taken exactly.

    The masks' own share of the variance is the same for both, and its heavy tail in 1 / t would hide the rest.
    """
    chain, n_steps = MarkovChain(n_states=8, length=8), 300
    x = chain.sample(1, seed=1).expand(2**chain.length, -1)
    masked = torch.tensor(list(itertools.product([False, True], repeat=chain.length)))
    ce = -chain.log_conditionals(x, ~masked).gather(-1, x[..., None]).squeeze(-1)
    cost, n_masked = (ce * masked).sum(-1), masked.sum(-1)

    def deviation(times: torch.Tensor) -> float:
        probability, weight = get_noise_schedule(schedule)(times)
        p = probability.double()[:, None]
        expected = weight * ((p**n_masked * (1 - p) ** (chain.length - n_masked)) @ cost)
        return expected.view(n_steps, size).mean(-1).std().item()

    one_step = torch.arange(size)
    stratified = torch.cat([stratified_times(0, step, one_step, size) for step in range(n_steps)])
    # Strata are dealt out at random, so that a few rows of a very large batch have independent times.
    independent = stratified_times(0, 0, torch.arange(n_steps * size), n_steps * size)
    assert deviation(stratified) < 1.5 / size**0.5 * deviation(independent)


def exact_count(right_shift: bool = False) -> DataCollatorForMaskedDiffusion:
    collator = collator_for("linear", right_shift)
    collator.settings.exact_mask_count = True
    return collator


@pytest.mark.parametrize("right_shift, prompt", [(False, 0), (False, 12), (True, 1), (True, 12)])
def test_exact_counts_estimate_the_exact_likelihood(right_shift: bool, prompt: int) -> None:
    collator, x = exact_count(right_shift), CHAIN.sample(1, seed=1)
    noisy = collator.corrupt(repeated(x, N_ROWS, prompt), seed=0, step=0, rows=torch.arange(N_ROWS), n_rows=N_ROWS)
    values = estimates(collator, noisy)
    exact = -(CHAIN.log_prob(x) - (CHAIN.log_prob(x[:, :prompt]) if prompt else 0)).item()
    error = (values.std() / N_ROWS**0.5).item()
    assert abs(values.mean().item() - exact) < 3 * error


def test_exact_counts_over_strata_are_far_less_noisy() -> None:
    """Means of 8 draws: counts on strata against independent times with one draw a token."""
    x, n_means = CHAIN.sample(1, seed=1), 200

    def deviation(collator: DataCollatorForMaskedDiffusion, stratified: bool) -> float:
        parts = []
        for step in range(n_means):
            rows, n_rows = (torch.arange(8), 8) if stratified else (torch.arange(8) + 8 * step, 8 * n_means)
            step = step if stratified else 0
            noisy = collator.corrupt(repeated(x, 8), seed=0, step=step, rows=rows, n_rows=n_rows)
            parts.append({**noisy, "inputs": noisy["inputs"]["input_ids"]})
        every = {name: torch.cat([part[name] for part in parts]) for name in ("inputs", "targets", "weights")}
        values = estimates(collator, {**every, "inputs": {"input_ids": every["inputs"]}})
        return values.view(n_means, 8).mean(-1).std().item()

    independent = deviation(collator_for("linear"), False)
    assert deviation(exact_count(), True) <= 0.65 * independent


@pytest.mark.parametrize("schedule", sorted(NOISE_SCHEDULES))
@pytest.mark.parametrize("right_shift, prompt", [(False, 0), (True, 12)])
def test_complementary_masks_estimate_the_exact_likelihood(schedule: str, right_shift: bool, prompt: int) -> None:
    """The mean of both passes, and the second alone too; no token is masked in both, none in neither."""
    collator, x = collator_for(schedule, right_shift), CHAIN.sample(1, seed=1)
    batch, key = repeated(x, N_ROWS, prompt), {"seed": 0, "step": 0, "rows": torch.arange(N_ROWS), "n_rows": N_ROWS}
    first, second = (collator.corrupt(batch, **key, complement=complement) for complement in (False, True))
    assert torch.equal(first["masked"] ^ second["masked"], batch["labels"] != IGNORE_INDEX)
    exact = -(CHAIN.log_prob(x) - (CHAIN.log_prob(x[:, :prompt]) if prompt else 0)).item()
    one, other = estimates(collator, first), estimates(collator, second)
    for values in (other, (one + other) / 2):
        assert abs(values.mean().item() - exact) < 3 * (values.std() / N_ROWS**0.5).item()
    if schedule == "linear":  # where both passes are the same distribution of noise: better than two independent draws
        assert ((one + other) / 2).std() < one.std() / 2**0.5


def random_order_cost(chain: MarkovChain, x: list[int]) -> float:
    """Nats of `x` token by token in a random order, the context redrawn through the flips before every step.

    By enumeration of all texts, contexts and flips with Bayes' rule; no recursion, no time, no weights.
    """
    texts = list(itertools.product(range(chain.n_states), repeat=chain.length))
    prior = chain.log_prob(torch.tensor(texts)).exp().tolist()

    def channel(seen: int, token: int) -> float:
        return (1 - chain.flips) * (seen == token) + chain.flips / chain.n_states

    total = 0.0
    for place in range(chain.length):
        others = [i for i in range(chain.length) if i != place]
        for size in range(chain.length):
            contexts = list(itertools.combinations(others, size))
            for context in contexts:  # in a random order each stands before `place` with the same probability
                for seen in itertools.product(range(chain.n_states), repeat=size):
                    chance = math.prod(channel(s, x[i]) for i, s in zip(context, seen, strict=True))
                    joint = [0.0] * chain.n_states
                    for text, p in zip(texts, prior, strict=True):
                        joint[text[place]] += p * math.prod(
                            channel(s, text[i]) for i, s in zip(context, seen, strict=True)
                        )
                    cost = -math.log(joint[x[place]] / sum(joint))
                    total += chance * cost / len(contexts) / chain.length
    return total


def test_replaced_context_costs_what_enumeration_says() -> None:
    """With the weights as they are; and never less than the likelihood."""
    chain = MarkovChain(n_states=3, length=4, flips=0.3)
    x = chain.sample(1, seed=1)
    collator = collator_of(
        mask_token_id=chain.mask_token_id,
        noise_schedule="linear",
        right_shift_logits=False,
        vocab_size=chain.n_states + 1,
    )
    collator.settings.random_replacement = chain.flips
    noisy = collator.corrupt(repeated(x, N_ROWS), seed=0, step=0, rows=torch.arange(N_ROWS), n_rows=N_ROWS)
    values = estimates(collator, noisy, chain)
    exact, error = random_order_cost(chain, x[0].tolist()), (values.std() / N_ROWS**0.5).item()
    assert abs(values.mean().item() - exact) < 3 * error
    assert exact > -chain.log_prob(x).item() + 0.3
    assert random_order_cost(MarkovChain(3, 4), x[0].tolist()) == pytest.approx(-chain.log_prob(x).item(), rel=1e-6)


def test_soft_cross_entropy_is_its_formula() -> None:
    logits, _, _ = random_rows(20)
    teacher = random_rows(20)[0].flip(0)
    want = -(teacher.double().softmax(-1) * logits.double().log_softmax(-1)).sum(-1)
    torch.testing.assert_close(soft_cross_entropy(logits, teacher).double(), want, rtol=1e-5, atol=1e-5)
    p = logits.double().softmax(-1)
    torch.testing.assert_close(entropy(logits).double(), -(p * p.log()).sum(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(soft_cross_entropy(logits, logits), entropy(logits), rtol=1e-5, atol=1e-5)
    assert soft_cross_entropy(logits.bfloat16(), teacher.half()).dtype == torch.float32


def test_relative_error_is_one_for_nothing_and_zero_for_the_same() -> None:
    hidden = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    assert relative_error(hidden, hidden).abs().max() == 0
    torch.testing.assert_close(relative_error(torch.zeros_like(hidden), hidden), torch.ones(5))
    torch.testing.assert_close(relative_error(3 * hidden, hidden), torch.full((5,), 4.0))
    nothing = relative_error(hidden.bfloat16(), torch.zeros_like(hidden))
    torch.testing.assert_close(nothing, 1e6 * hidden.bfloat16().float().square().sum(-1))


def test_total_variation_is_the_chance_of_a_rejection() -> None:
    """One minus the sum over words of the smaller probability."""
    logits, teacher = random_rows(20)[0], random_rows(20)[0].flip(0)
    want = 1 - torch.minimum(logits.double().softmax(-1), teacher.double().softmax(-1)).sum(-1)
    found = total_variation(logits.bfloat16().float(), logits.bfloat16())
    assert found.dtype == torch.float32 and found.shape == (20,) and (found == 0).all()
    torch.testing.assert_close(total_variation(logits, teacher).double(), want, rtol=1e-5, atol=1e-6)


def test_entropy_of_more_words_than_fit_into_a_part() -> None:
    assert entropy(torch.zeros(2, 2**22 + 1)).tolist() == pytest.approx([math.log(2**22 + 1)] * 2, rel=1e-4)
    assert entropy(torch.zeros(5, 2**21)).tolist() == pytest.approx([math.log(2**21)] * 5, rel=1e-4)


def teacher_mask(targets: str, n_rows: int = N_ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    """(n,) weighted terms of a flawed student at teacher_mask tokens of different texts: with labels, with the teacher's word."""
    collator = collator_for("linear")
    collator.settings.distillation_targets = targets
    x = CHAIN.sample(n_rows, seed=3)
    batch = {"input_ids": x, "labels": x, "attention_mask": torch.ones_like(x)}
    noisy = collator.corrupt(batch, seed=0, step=0, rows=torch.arange(n_rows), n_rows=n_rows)
    keep = (noisy["targets"] != IGNORE_INDEX) & noisy["teacher_mask"] & (noisy["tokens"] > 0)
    rows, tokens = keep.nonzero()[:, 0], noisy["tokens"][keep]
    # Sharper than the truth, so that label and teacher do not cost the same by accident.
    student = (1.7 * CHAIN.log_conditionals(noisy["inputs"]["input_ids"], ~noisy["masked"])[keep]).clamp(min=-1e4)
    teacher = CHAIN.transition().log()[x[rows, tokens - 1]]
    weights = noisy["weights"][keep]
    return weights * token_nll(student, x[rows, tokens]), weights * soft_cross_entropy(student, teacher)


def test_the_teacher_costs_what_labels_do_where_nothing_to_the_right_is_seen() -> None:
    """And is less noisy there; everywhere else it is wrong, because it does not know what comes after."""
    labels, soft = teacher_mask("causal")
    gap = labels - soft
    assert len(gap) > 1000
    assert abs(gap.mean()) < 3 * gap.std() / len(gap) ** 0.5
    assert soft.var() < labels.var()
    labels, soft = teacher_mask("all")
    gap = labels - soft
    assert abs(gap.mean()) > 10 * gap.std() / len(gap) ** 0.5
