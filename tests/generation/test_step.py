"""Rules beyond quotas and thresholds, forward for forward against published algorithms written for one row in plain Python."""

import math

import pytest
import torch

import llm_diffusion as ld
from llm_diffusion.objective.noise import (
    ORDER_STREAM,
    row_keys,
    uniform,
)

MASK, LENGTH = 31, 8
LOOPED = {"revision": "remdm-loop", "steps": 8, "remasking": "random", "eta": 0.1}


def probabilities(model, canvas, guidance=1.0, start=0, penalty=1.0):
    """One row's tokens -> the distribution of every position, the mask token banned."""
    shift = model.config.diffusion["right_shift_logits"]
    with torch.no_grad():
        logits = model(torch.tensor([canvas])).logits[0].double()
        if guidance != 1.0:  # LLaDA: the prompt is masks
            blind = model(torch.tensor([[MASK] * start + canvas[start:]])).logits[0].double()
            logits = blind + guidance * (logits - blind)
    rows = []
    for i in range(len(canvas)):
        row = logits[max(i - 1, 0) if shift else i].tolist()
        said = {token for j, token in enumerate(canvas) if token != MASK and j != i}
        row = [(v * penalty if v < 0 else v / penalty) if token in said else v for token, v in enumerate(row)]
        row[MASK] = -1e9
        weights = [math.exp(value - max(row)) for value in row]
        rows.append([weight / sum(weights) for weight in weights])
    return rows


def entropy_of(p):
    return -sum(x * math.log(x) for x in p if x > 0)


SCORES = {
    "low_confidence": lambda p, token: p[token],
    "entropy": lambda p, token: -entropy_of(p),
    "margin": lambda p, token: sorted(p)[-1] - sorted(p)[-2],
}


def by_factor(order, score, probs, factor):
    """Fast-dLLM, its loop's last candidate put right."""
    n = 0
    for rank, i in enumerate(order, start=1):
        if rank > 1 and score[i] < 1 - factor / (rank + 1):
            break
        n = rank
    return order[:n]


def by_entropy_bound(order, score, probs, bound):
    """EB-Sampler."""
    chosen, entropies = [], []
    for i in order:
        entropies.append(entropy_of(probs[i]))
        if chosen and sum(entropies) - max(entropies) > bound:
            break
        chosen.append(i)
    return chosen


def denoise(
    model,
    prompt,
    *,
    block_length=LENGTH,
    remasking="low_confidence",
    guidance_scale=1.0,
    repetition_penalty=1.0,
    **rule,
):
    """LLaDA's loop with another rule in its middle: the canvas after every step."""
    start, canvases = len(prompt), []
    canvas = [*prompt, *[MASK] * LENGTH]
    for left in range(start, start + LENGTH, block_length):
        block = range(left, min(left + block_length, start + LENGTH))
        while MASK in [canvas[i] for i in block]:
            probs = probabilities(model, canvas, guidance_scale, start, repetition_penalty)
            masked = [i for i in block if canvas[i] == MASK]
            token = {i: probs[i].index(max(probs[i])) for i in masked}
            if remasking == "left_to_right":
                score = {i: -i for i in masked}
            else:
                score = {i: SCORES[remasking](probs[i], token[i]) for i in masked}
            order = sorted(masked, key=lambda i: (-score[i], i))
            if "factor" in rule:
                chosen = by_factor(order, score, probs, rule["factor"])
            elif "entropy_bound" in rule:
                chosen = by_entropy_bound(order, score, probs, rule["entropy_bound"])
            else:
                chosen = order[:1]
            for i in chosen:
                canvas[i] = token[i]
            canvases.append(list(canvas))
    return canvases


def llada21(model, prompt, *, block_length=LENGTH, threshold, editing_threshold, max_post_steps=16):
    """LLaDA2.1's `generate`, the whole canvas visible: drafts above a threshold, edits, then passes until nothing is edited."""
    start, canvases = len(prompt), []
    canvas = [*prompt, *[MASK] * LENGTH]
    for left in range(start, start + LENGTH, block_length):
        block, post_steps = range(left, min(left + block_length, start + LENGTH)), 0
        while True:
            masked = [i for i in block if canvas[i] == MASK]
            if not masked:
                post_steps += 1
            if post_steps > max_post_steps:
                break
            probs = probabilities(model, canvas)
            token = {i: probs[i].index(max(probs[i])) for i in block}
            sure = [i for i in masked if probs[i][token[i]] >= threshold]
            chosen = sure or sorted(masked, key=lambda i: -probs[i][token[i]])[:1]
            edited = [
                i for i in block if i not in masked and probs[i][token[i]] > editing_threshold and token[i] != canvas[i]
            ]
            for i in [*chosen, *edited]:
                canvas[i] = token[i]
            canvases.append(list(canvas))
            if not masked and not edited:
                break
    return canvases


def p2(model, prompt, *, steps, block_length=LENGTH, remasking="low_confidence"):
    """P2 with self-planning: after step i of n, the n - i in n least sure are masks."""
    start, canvases = len(prompt), []
    canvas = [*prompt, *[MASK] * LENGTH]
    lefts = range(start, start + LENGTH, block_length)
    n = max(1, steps // len(lefts))
    for left in lefts:
        block = range(left, min(left + block_length, start + LENGTH))
        for step in range(1, n + 1):
            probs = probabilities(model, canvas)
            token = {i: probs[i].index(max(probs[i])) if canvas[i] == MASK else canvas[i] for i in block}
            score = {i: SCORES[remasking](probs[i], token[i]) for i in block}
            low = sorted(block, key=lambda i: (score[i], i))[: len(block) * (n - step) // n]
            for i in block:
                canvas[i] = MASK if i in low else token[i]
            canvases.append(list(canvas))
    return canvases


def prompts(n):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, MASK, (1 + 3 * i % 5,), generator=generator).tolist() for i in range(n)]


def run(model, rows, **settings):
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ld.generate(
        model,
        ids,
        mask,
        max_new_tokens=LENGTH,
        return_dict_in_generate=True,
        output_history=True,
        **{"eos_token_id": None, **settings},
    )


def seen_by(output, row, length):
    return [canvas[row, -length - LENGTH :].tolist() for canvas in output.history]


@pytest.mark.parametrize("right_shift", [True, False])
@pytest.mark.parametrize(
    ("program", "settings"),
    [
        (denoise, {"factor": 0.5}),
        (denoise, {"factor": 1.3}),
        (denoise, {"factor": 1.3, "block_length": 3}),
        (denoise, {"factor": 0.4, "remasking": "margin"}),
        (denoise, {"entropy_bound": 0.5, "remasking": "entropy"}),
        (denoise, {"entropy_bound": 2.5, "remasking": "entropy", "block_length": 5}),
        (denoise, {"entropy_bound": 1.5}),
        (denoise, {"entropy_bound": 1.5, "remasking": "left_to_right"}),
        (denoise, {"entropy_bound": 0.0}),
        (denoise, {"remasking": "left_to_right"}),
        (denoise, {"guidance_scale": 2.5}),
        (denoise, {"guidance_scale": 0.5, "factor": 1.0}),
        (denoise, {"repetition_penalty": 1.5}),
        (denoise, {"repetition_penalty": 0.7, "guidance_scale": 1.5, "block_length": 4}),
        (llada21, {"threshold": 0.3, "editing_threshold": 0.0}),
        (llada21, {"threshold": 0.3, "editing_threshold": 0.2, "block_length": 3}),
        (llada21, {"threshold": 0.05, "editing_threshold": 0.1, "max_post_steps": 2}),
        (llada21, {"threshold": 0.05, "editing_threshold": 0.0, "max_post_steps": 0}),
        (p2, {"steps": 8}),
        (p2, {"steps": 5}),
        (p2, {"steps": 20}),
        (p2, {"steps": 1}),
        (p2, {"steps": 9, "block_length": 3, "remasking": "margin"}),
        (p2, {"steps": 6, "remasking": "entropy"}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_equals_the_published_algorithm_forward_for_forward(random_diffuser, right_shift, program, settings):
    """Ragged rows in one batch; each must see what the program sees that knows nothing of the others."""
    passes = 2 if "guidance_scale" in settings else 1
    model, rows = random_diffuser(right_shift), prompts(5)
    output = run(model, rows, **settings, revision="p2" if program is p2 else None)
    for i, row in enumerate(rows):
        want = program(model, row, **settings)
        seen = seen_by(output, i, len(row))
        assert seen == want + [want[-1]] * (len(seen) - len(want))
        assert output.nfe[i] == len(want) * passes


def test_the_rules_of_the_table_do_something(random_diffuser):
    """Keeps the table honest: factors and bounds commit several, editing edits and P2 takes back."""
    model, rows = random_diffuser(True), prompts(5)
    for settings in ({"factor": 1.3}, {"entropy_bound": 2.5, "remasking": "entropy"}):
        nfe = run(model, rows, **settings).nfe
        assert nfe.min() < LENGTH and nfe.max() > 1
    changed = taken_back = 0
    for settings in (
        {"threshold": 0.05, "editing_threshold": 0.1, "max_post_steps": 2},
        {"steps": 20, "revision": "p2"},
    ):
        history = run(model, rows, **settings).history
        for before, after in zip(history, history[1:], strict=False):
            changed += int(((before != MASK) & (after != MASK) & (before != after)).sum())
            taken_back += int(((before != MASK) & (after == MASK)).sum())
    assert changed > 3 and taken_back > 3


def remdm(model, prompt, *, revision, steps, eta, block_length=LENGTH, seed=0):
    """ReMDM's programs with greedy tokens and our noise: cap and conf by the published code, a loop at its constant alpha."""
    start, canvases, done = len(prompt), [], 0
    canvas, sure = [*prompt, *[MASK] * LENGTH], {}
    text = torch.tensor([canvas])
    key = row_keys(text, torch.ones_like(text))
    lefts = range(start, start + LENGTH, block_length)
    n = max(1, steps // len(lefts))
    for left in lefts:
        block = range(left, left + block_length)
        for step in range(n):
            t, s = (n - step) / n, (n - step - 1) / n
            probs = probabilities(model, canvas)
            noise = uniform(seed, done, key, torch.arange(len(canvas)), ORDER_STREAM).tolist()
            total = sum(math.exp(-sure[i]) for i in block if canvas[i] != MASK)
            highest = min(1.0, s / (1 - t)) if t < 1 else 1.0
            after = list(canvas)
            for i in block:
                sigma = eta * highest if revision != "remdm" else min(eta, highest)
                if revision == "remdm-conf":
                    sigma *= 0.0 if canvas[i] == MASK else math.exp(-sure[i]) / total
                if canvas[i] != MASK and noise[i] < sigma:
                    after[i] = MASK
                elif canvas[i] == MASK and (s == 0 or noise[i] < (1 - s - (1 - sigma) * (1 - t)) / t):
                    after[i] = probs[i].index(max(probs[i]))
                    sure[i] = probs[i][after[i]]
            canvas, done = after, done + 1
            canvases.append(canvas)
    return canvases


@pytest.mark.parametrize("right_shift", [True, False])
@pytest.mark.parametrize("revision", ["remdm", "remdm-rescale", "remdm-conf"])
@pytest.mark.parametrize("settings", [{"steps": 12, "eta": 0.7}, {"steps": 14, "eta": 1.0, "block_length": 4}], ids=str)
def test_remdm_is_the_published_program_forward_for_forward(random_diffuser, right_shift, revision, settings):
    model, rows = random_diffuser(right_shift), prompts(5)
    output = run(model, rows, revision=revision, remasking="random", **settings)
    taken_back = 0
    for i, row in enumerate(rows):
        want = remdm(model, row, revision=revision, **settings)
        assert seen_by(output, i, len(row)) == want
        taken_back += sum(
            a != MASK == b for x, y in zip(want, want[1:], strict=False) for a, b in zip(x, y, strict=True)
        )
    assert taken_back > 3


@pytest.mark.parametrize(
    "settings",
    [
        {"revision": "remdm", "eta": 0.0},
        {"revision": "remdm", "eta": 0.6},
        {"revision": "remdm-loop", "eta": 0.2},
        {"revision": "remdm-loop", "eta": 0.2, "remdm_loop": [0.8, 0.3, 0.5]},
    ],
    ids=str,
)
def test_remdm_fills_the_canvas_in_its_steps(random_diffuser, settings):
    model, rows = random_diffuser(True), prompts(12)
    output = run(model, rows, remasking="random", steps=20, **settings)
    assert output.nfe.tolist() == [20] * 12
    assert not (output.sequences[:, -LENGTH:] == MASK).any()
    back = [int(((a != MASK) & (b == MASK)).sum()) for a, b in zip(output.history, output.history[1:], strict=False)]
    assert (sum(back) > 0) == (settings["eta"] > 0)
    if settings["revision"] == "remdm-loop":  # nothing is taken back but in the loop
        t_on, t_off, _ = settings.get("remdm_loop", (0.55, 0.05, 0.9))
        assert not any(n for i, n in enumerate(back, start=1) if not t_off < (20 - i) / 20 <= t_on)


def test_revised_rows_end_only_when_nothing_can_change(random_diffuser):
    """An end token that is committed early may be edited away: rows stop with their block, not before."""
    model, rows, ends = random_diffuser(True, seed=1), prompts(10), list(range(2, 14))
    settings = {"threshold": 0.05, "editing_threshold": 0.1, "block_length": 4}
    output = run(model, rows, eos_token_id=ends, pad_token_id=0, **settings)
    stopped = 0
    for i, row in enumerate(rows):
        want = llada21(model, row, **settings)
        n = int(output.nfe[i])
        answer = want[n - 1][len(row) :]
        block_end = next(j for j in range(4, LENGTH + 1, 4) if j == LENGTH or set(answer[:j]) & set(ends))
        first = next((j for j, token in enumerate(answer) if token in ends), LENGTH - 1)
        assert MASK not in answer[:block_end]
        got = output.sequences[i, max(map(len, rows)) :].tolist()
        assert got[: first + 1] == answer[: first + 1]
        stopped += n < len(want)
    assert stopped


def dream(model, prompt, steps, remasking):
    """Dream's loop without noise: of n masks, n over the steps left are filled (its eps, which wastes the first step, is 0)."""
    canvas, canvases = [*prompt, *[MASK] * LENGTH], []
    for step in range(steps):
        masked = [i for i, token in enumerate(canvas) if token == MASK]
        k = (
            len(masked)
            if step == steps - 1
            else int(len(masked) * (1 - (1 - (step + 1) / steps) / (1 - step / steps)) + 1e-9)
        )
        probs = probabilities(model, canvas)
        token = {i: probs[i].index(max(probs[i])) for i in masked}
        score = {i: SCORES[remasking](probs[i], token[i]) for i in masked}
        for i in sorted(masked, key=lambda i: (-score[i], i))[:k]:
            canvas[i] = token[i]
        canvases.append(list(canvas))
    return canvases


@pytest.mark.parametrize("remasking", ["low_confidence", "entropy", "margin"])
@pytest.mark.parametrize("steps", [8, 4, 2])
def test_quotas_are_dreams_where_they_come_out_even(random_diffuser, remasking, steps):
    model, rows = random_diffuser(True), prompts(3)
    output = run(model, rows, steps=steps, remasking=remasking)
    for i, row in enumerate(rows):
        assert seen_by(output, i, len(row)) == dream(model, row, steps, remasking)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"threshold": 0.9, "factor": 1.0}, "`threshold`=0.9 and `factor`=1.0"),
        ({"factor": 1.0, "entropy_bound": 0.1}, "`factor`=1.0 and `entropy_bound`=0.1"),
        ({"factor": 0}, "`factor`.*0"),
        ({"factor": "1"}, "`factor`.*'1'"),
        ({"entropy_bound": -0.1}, "`entropy_bound`.*-0.1"),
        ({"alg_temp": -1.0}, "`alg_temp`.*-1.0"),
        ({"alg_temp": 0.5, "threshold": 0.9}, "`alg_temp`=0.5.*`threshold`=0.9"),
        ({"alg_temp": 0.5, "remasking": "random"}, "`alg_temp`=0.5.*'random'"),
        ({"threshold": 0.9, "remasking": "entropy"}, "`threshold`=0.9.*'entropy'"),
        ({"factor": 0.9, "remasking": "left_to_right"}, "`factor`=0.9.*'left_to_right'"),
        ({"revision": "p3", "steps": 8}, "`revision`.*'p3'"),
        ({"revision": "p2"}, "`revision`='p2'.*`steps`"),
        ({"revision": "p2", "steps": 8, "threshold": 0.5}, "`threshold`=0.5 and `revision`='p2'"),
        ({"revision": "p2", "steps": 8, "remasking": "random"}, "`revision`='p2'.*'random'"),
        ({"revision": "remdm", "steps": 8, "eta": 0.1}, "`revision`='remdm'.*`remasking`='random'"),
        ({"revision": "remdm", "steps": 8, "remasking": "random"}, "`eta`=None"),
        ({"revision": "remdm-conf", "steps": 8, "eta": 0.1}, "`revision`='remdm-conf'.*`remasking`='random'"),
        ({"remdm_loop": [0.5, 0.1, 0.9]}, "`remdm_loop`.*belongs to `revision`='remdm-loop', got None"),
        ({**LOOPED, "remdm_loop": [0.1, 0.5, 0.9]}, "`remdm_loop` must be .*t_off below t_on, got .0.1, 0.5"),
        ({**LOOPED, "remdm_loop": 0.5}, "`remdm_loop` must be .*got 0.5"),
        ({**LOOPED, "remdm_loop": [0.5, 0.1, 1.0]}, "`remdm_loop` must be"),
        ({"eta": 0.1}, "`eta`=0.1"),
        ({"revision": "remdm", "steps": 8, "remasking": "random", "eta": 1.5}, "`eta`.*1.5"),
        ({"revision": "p2", "steps": 8, "editing_threshold": 0.5}, "`editing_threshold`=0.5"),
        ({"editing_threshold": 1.5}, "`editing_threshold`.*1.5"),
        ({"max_post_steps": -1}, "`max_post_steps`.*-1"),
        ({"repetition_penalty": 0.0}, "`repetition_penalty`.*0.0"),
        ({"guidance_scale": -1.0}, "`guidance_scale`.*-1.0"),
        ({"cfg_scale": -1.0}, "`cfg_scale`.*-1.0"),
        ({"cfg_scale": 1.0, "guidance_scale": 2.0}, "`cfg_scale` and `guidance_scale`"),
        ({"num_return_sequences": 0}, "`num_return_sequences`.*0"),
        ({"num_return_sequences": 3}, "`num_return_sequences`=3.*`temperature`"),
        ({"bad_words_ids": [[]]}, "`bad_words_ids`"),
        ({"bad_words_ids": [3]}, "`bad_words_ids`"),
        ({"bad_words_ids": [[3, 4]], "editing_threshold": 0.5}, "`bad_words_ids`"),
    ],
    ids=str,
)
def test_contradictions_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        ld.DiffusionGenerationConfig(**settings)
