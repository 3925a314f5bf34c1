"""Rules beyond quotas and thresholds, forward for forward against published algorithms written for one row in plain Python."""

import math

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

import llm_diffusion as ld
from llm_diffusion.generation.step import Rows, Window, ban_words, guide, penalise_repetition, without_bad_words
from llm_diffusion.models.sampling import BANNED
from llm_diffusion.objective.noise import (
    ORDER_STREAM,
    row_keys,
    uniform,
)

MASK, LENGTH = 31, 8


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


def window_of(canvas, open_, columns=None):
    canvas, open_ = torch.tensor(canvas), torch.tensor(open_).bool()
    columns = torch.arange(canvas.shape[1]).expand(len(canvas), -1) if columns is None else torch.tensor(columns)
    zero, everywhere = torch.zeros(len(canvas), dtype=torch.long), torch.arange(canvas.shape[1]).expand_as(canvas)
    rows = Rows(
        ids=canvas,
        attention_mask=(canvas != 0).long(),  # 0 is padding here
        open=open_,
        confidence=torch.zeros(canvas.shape),
        places=everywhere,
        block=torch.zeros_like(canvas),
        keys=zero,
        index=zero,
        active=zero,
        steps_left=zero,
        steps_done=zero,
        busy=zero.bool(),
        post_steps=zero,
    )
    return Window(rows, columns, open_.gather(-1, columns), (canvas == MASK) & open_, zero == 0, block=0, block_steps=0)


def left_padded(rows):
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }


@pytest.mark.parametrize("penalty", [1.7, 0.6])
def test_repetition_is_the_hosts_on_what_is_committed(penalty):
    """Position by position against the host's own processor, fed the committed text without the position itself."""
    window = window_of(
        [[5, 6, 5, MASK, 7, MASK, 9], [0, 0, 8, 8, MASK, 6, MASK]], [[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1]]
    )
    logits = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    got = penalise_repetition(logits, window, penalty)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)
    for row in range(2):
        for column in range(7):
            seen = [
                int(token)
                for i, token in enumerate(window.rows.ids[row])
                if window.visible[row, i] and not (i == column and window.open[row, i])
            ]
            want = theirs(torch.tensor([seen]), logits[row, column][None].clone())
            torch.testing.assert_close(got[row, column][None], want)


def test_a_forbidden_sequence_is_seen_from_every_side():
    words = [[3, 4, 5], [9]]
    window = window_of([[3, MASK, 5, MASK, 4, 5, MASK, 3, 4, MASK, MASK, 5]], [[0, 1, 0, 1, 0, 0, 1, 0, 0, 1, 1, 0]])
    logits = ban_words(torch.zeros(1, 12, 32), window, words)
    banned = {(int(i), int(token)) for i, token in (logits[0] == BANNED).nonzero()}
    assert banned == {(1, 4), (3, 3), (9, 5)} | {(i, 9) for i in range(12)}


def test_commits_that_would_write_it_together_are_taken_back():
    window = window_of([[MASK, MASK, MASK, 3, MASK, 8]] * 2, [[1, 1, 1, 0, 1, 0]] * 2)
    tokens = torch.tensor([[3, 4, 6, 0, 4, 0], [3, 4, 6, 0, 5, 0]])
    chosen = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 1, 0]]).bool()
    score = torch.tensor([[0.1, 0.9, 0.2, 0, 0.5, 0], [0.2, 0.1, 0.3, 0, 0.9, 0]])
    kept = without_bad_words(chosen, tokens, score, window, [[3, 4]])
    assert kept.tolist() == [[False, True, True, False, False, False], [False, False, False, False, True, False]]


def contains(row, word):
    return any(row[i : i + len(word)] == word for i in range(len(row)))


@pytest.mark.parametrize(
    "settings",
    [{}, {"steps": 1}, {"threshold": 0.05}, {"factor": 2.0, "block_length": 3}, {"temperature": 1.5}],
    ids=str,
)
def test_forbidden_words_never_appear(random_diffuser, settings):
    """Sequences and tokens of the free answers are forbidden one by one, the seam to the prompt included."""
    model, found = random_diffuser(True), 0
    prompts = [[11 + i, 12, 13] for i in range(6)]
    common = {"max_new_tokens": 8, "eos_token_id": None, **settings}
    free = ld.generate(model, **left_padded(prompts), **common)
    for row in range(6):
        for start in (2, 4, 6):  # the first one begins in the prompt
            word = free[row, start : start + 2 + row % 2].tolist()
            answers = ld.generate(model, **left_padded(prompts), bad_words_ids=[word, [int(free[0, 5])]], **common)
            assert not (answers == MASK).any()
            for prompt, answer in zip(prompts, answers.tolist(), strict=True):
                assert not contains(answer, word)
                assert free[0, 5] not in answer[len(prompt) :]
            found += 1
    assert found == 18


class Recording(LogitsProcessor):
    """Keeps what it is shown, and changes nothing."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen += [row.tolist() for row in input_ids]
        return scores


def test_processors_see_the_text_on_the_left(random_diffuser):
    model, recording = random_diffuser(True), Recording()
    rows = [[11, 12, 13], [14]]
    settings = {"max_new_tokens": 3, "eos_token_id": None, "remasking": "left_to_right"}
    free = ld.generate(model, **left_padded(rows), **settings)
    with_ = ld.generate(model, **left_padded(rows), logits_processor=LogitsProcessorList([recording]), **settings)
    assert torch.equal(free, with_)
    for row in free.tolist():  # left to right, the text before the token to be committed is complete
        for n in (3, 4, 5):
            assert row[:n] in recording.seen
    assert [11, 12, 13, MASK] in recording.seen  # a later position still has masks on its left
    assert all(len(row) in (3, 4, 5) for row in recording.seen)


@pytest.mark.parametrize("attention", ["bidirectional", "block"])
def test_a_processor_of_the_host_has_its_way(random_llama, tokenizer, attention):
    options = {"attention": "block", "block_length": 4} if attention == "block" else {}
    model = ld.convert_to_diffusion(random_llama(initializer_range=0.3), tokenizer, **options)
    batch = left_padded([[21, 22, 23], [24]])
    settings = {"max_new_tokens": 9, "eos_token_id": None}
    free = ld.generate(model, **batch, **settings)
    unwanted = free[:, 3:].unique().tolist()
    processed = ld.generate(model, **batch, logits_processor=[SuppressTokensLogitsProcessor(unwanted)], **settings)
    assert not set(unwanted) & set(processed[:, 3:].unique().tolist())
    assert torch.equal(processed, ld.generate(model, **batch, suppress_tokens=unwanted, **settings))


def test_guidance_by_formula():
    conditional, unconditional = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    w = 1.5  # LLaDA's cfg_scale
    want = unconditional + (w + 1) * (conditional - unconditional)
    torch.testing.assert_close(guide(torch.cat([conditional, unconditional]), w + 1), want)


def test_llada_and_host_name_guidance_alike(random_diffuser):
    model, prompt = random_diffuser(True), torch.tensor([[11, 12, 13]])
    settings = {"max_new_tokens": 6, "eos_token_id": None, "return_dict_in_generate": True}
    ours = ld.generate(model, prompt, guidance_scale=2.5, **settings)
    lladas = ld.generate(model, prompt, cfg_scale=1.5, **settings)
    free = ld.generate(model, prompt, cfg_scale=0.0, **settings)
    assert torch.equal(ours.sequences, lladas.sequences)
    assert not torch.equal(ours.sequences, free.sequences)
    # Both passes of a step count.
    assert ours.nfe.tolist() == [12] and free.nfe.tolist() == [6]
    assert ours.tokens_per_forward.tolist() == [0.5] and free.tokens_per_forward.tolist() == [1.0]


# -- several answers


def test_several_answers_to_one_prompt(random_diffuser):
    model, rows = random_diffuser(True), [[11, 12, 13], [14]]
    settings = {"max_new_tokens": 6, "eos_token_id": None, "temperature": 1.0, "seed": 5}
    several = ld.generate(model, **left_padded(rows), num_return_sequences=4, **settings)
    assert several.shape == (8, 9)
    for i, row in enumerate(rows):
        own = several[4 * i : 4 * i + 4]
        assert all(answer[3 - len(row) : 3].tolist() == row for answer in own)
        assert len({tuple(answer.tolist()) for answer in own}) == 4
        # The same whatever the batch, and however the copies are asked for.
        alone = ld.generate(model, torch.tensor([row]), num_return_sequences=4, **settings)
        assert torch.equal(alone[:, len(row) :], own[:, 3:])
        assert torch.equal(ld.generate(model, torch.tensor([row] * 4), **settings), alone)
    other = ld.generate(model, **left_padded(rows), num_return_sequences=4, **{**settings, "seed": 6})
    assert not torch.equal(other, several)


@pytest.mark.parametrize(
    "settings", [{"alg_temp": 0.5}, {"remasking": "random"}, {"do_sample": True, "top_p": 0.9}], ids=str
)
def test_answers_differ_by_their_order_too(random_diffuser, settings):
    common = {"max_new_tokens": 12, "eos_token_id": None, "num_return_sequences": 8}
    answers = ld.generate(random_diffuser(True), torch.tensor([[11, 12]]), **common, **settings)
    assert len({tuple(answer.tolist()) for answer in answers}) > 3
