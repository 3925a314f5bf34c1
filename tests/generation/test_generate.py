"""Decoding: against a slow program of its own, and against what it promises."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, pipeline
from transformers.generation.streamers import BaseStreamer

import llm_diffusion as ld
from llm_diffusion.generation.canvas import fill_masks
from llm_diffusion.models.sampling import DiffusionOutput

MASK = 31
MANY_ENDS = list(range(2, 14))  # much of the vocabulary: random models end early, and out of order


def reference(
    model,
    prompt,
    length,
    *,
    steps=None,
    block_length=None,
    threshold=None,
    remasking="low_confidence",
    eos=(),
    grow_canvas=False,
):
    """LLaDA's algorithm for one row without padding, in plain Python: the canvas after every forward pass."""
    right_shift = model.config.diffusion["right_shift_logits"]
    canvas, start, canvases = [*prompt, *[MASK] * length], len(prompt), []
    block_length = block_length or length
    lefts = range(start, start + length, block_length)
    for left in lefts:
        right = min(left + block_length, start + length)
        size = right - left
        passes = size if steps is None else max(1, steps // len(lefts))
        quotas = [size // passes + (i < size % passes) for i in range(passes)]
        while MASK in canvas[left:right]:
            with torch.no_grad():
                logits = model(torch.tensor([canvas[:right] if grow_canvas else canvas])).logits[0].double()
            token, score = {}, {}
            for i in range(left, right):
                if canvas[i] != MASK:
                    continue
                row = logits[i - 1 if right_shift else i].tolist()
                row[MASK] = -1e9
                highest = max(row)
                weights = [math.exp(value - highest) for value in row]
                probs = [weight / sum(weights) for weight in weights]
                token[i] = probs.index(max(probs))
                if remasking == "low_confidence":
                    score[i] = probs[token[i]]
                elif remasking == "margin":
                    score[i] = sorted(probs)[-1] - sorted(probs)[-2]
                else:
                    score[i] = sum(p * math.log(p) for p in probs if p > 0)
            best = sorted(token, key=lambda i: (-score[i], i))
            if threshold is None:
                chosen = best[: quotas.pop(0)]
            else:
                chosen = [i for i in best if score[i] >= threshold] or best[:1]
            for i in chosen:
                canvas[i] = token[i]
            ends = [i for i in range(start, start + length) if canvas[i] in eos and MASK not in canvas[start:i]]
            if ends:
                canvas = [canvas[ends[0]] if value == MASK else value for value in canvas]
            canvases.append(list(canvas))
            if ends:
                return canvases
    return canvases


def prompts(n, seed=0):
    """Prompts of 1 to 7 tokens, end tokens among them: those of a prompt end nothing."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, MASK, (1 + (5 * i + seed) % 7,), generator=generator).tolist() for i in range(n)]


def left_padded(rows):
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def canvases_of(output, row=0, skip=0):
    return [canvas[row, skip:].tolist() for canvas in output.history]


# -- equality with the reference


@pytest.mark.parametrize("right_shift", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"steps": 9},
        {"steps": 4},
        {"steps": 1},
        {"steps": 40},
        {"steps": 6, "block_length": 3},
        {"steps": 3, "block_length": 3},
        {"steps": 2, "block_length": 3},  # fewer steps than blocks: one pass a block
        {"steps": 4, "block_length": 4},  # the last block is shorter
        {"block_length": 2},
        {"block_length": 50},
        {"steps": 6, "block_length": 3, "grow_canvas": True},
        {"block_length": 4, "grow_canvas": True},
        {"steps": 4, "remasking": "entropy"},
        {"steps": 4, "remasking": "margin"},
        {"threshold": 0.3},
        {"threshold": 0.6},
        {"threshold": 1.0},
        {"threshold": 0.3, "block_length": 4},
        {"threshold": 0.3, "block_length": 4, "grow_canvas": True},
        {"threshold": 0.05, "remasking": "margin"},
    ],
    ids=str,
)
def test_equals_the_reference_forward_for_forward(random_diffuser, right_shift, settings):
    for seed in range(2):
        model = random_diffuser(right_shift, seed)
        for prompt, eos in zip(prompts(2, seed), [(), MANY_ENDS], strict=True):
            want = reference(model, prompt, 9, eos=eos, **settings)
            output = ld.generate(
                model,
                torch.tensor([prompt]),
                max_new_tokens=9,
                eos_token_id=list(eos) or None,
                return_dict_in_generate=True,
                output_history=True,
                **settings,
            )
            assert canvases_of(output) == want
            assert output.nfe.tolist() == [len(want)]


def test_threshold_commits_several_and_then_less_than_all(random_diffuser):
    """Keeps the thresholds of the table above honest: neither always one token a pass nor everything at once."""
    passes = [len(reference(random_diffuser(True, s), p, 9, threshold=0.3)) for s in range(2) for p in prompts(4, s)]
    assert min(passes) < 9
    assert max(passes) > 1


@pytest.mark.parametrize("right_shift", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"steps": 4},
        {"steps": 6, "block_length": 3},
        {"block_length": 4, "grow_canvas": True},
        {"threshold": 0.3},
        {"threshold": 0.3, "block_length": 4},
    ],
    ids=str,
)
def test_a_ragged_batch_equals_one_by_one(random_diffuser, right_shift, settings):
    model, rows = random_diffuser(right_shift), prompts(7)
    batch = left_padded(rows)
    width = batch["input_ids"].shape[1]
    common = {
        "max_new_tokens": 9,
        "eos_token_id": MANY_ENDS,
        "return_dict_in_generate": True,
        "output_history": True,
        **settings,
    }
    together = ld.generate(model, **batch, **common)
    for i, row in enumerate(rows):
        want = reference(model, row, 9, eos=MANY_ENDS, **settings)
        seen = canvases_of(together, i, skip=width - len(row))
        # A finished row stands still while the others go on.
        assert seen == want + [want[-1]] * (len(seen) - len(want))
        assert together.nfe[i] == len(want)
    assert len(set(together.nfe.tolist())) > 1, "rows that all stop together test nothing"


# -- promises about every run


@pytest.mark.parametrize("settings", [{}, {"steps": 5}, {"threshold": 0.4}, {"steps": 6, "block_length": 4}], ids=str)
@pytest.mark.parametrize("extra", [{}, {"temperature": 1.0}, {"remasking": "random"}], ids=str)
def test_what_is_committed_stays(random_diffuser, settings, extra):
    batch = left_padded(prompts(5))
    width = batch["input_ids"].shape[1]
    output = ld.generate(
        random_diffuser(True),
        **batch,
        max_new_tokens=10,
        eos_token_id=MANY_ENDS,
        return_dict_in_generate=True,
        output_history=True,
        **settings,
        **extra,
    )
    before = torch.nn.functional.pad(batch["input_ids"], (0, 10), value=MASK)
    for canvas in output.history:
        assert torch.equal(canvas[:, :width], batch["input_ids"])
        committed = before != MASK
        assert torch.equal(canvas[committed], before[committed])
        assert (canvas != before).any(), "a step that commits nothing is a wasted forward"
        before = canvas
    assert not (before == MASK).any()


def test_rows_end_with_the_first_end_token(random_diffuser):
    """Without a mask before it a row stops there; its tail is that token in the canvas, padding in what is returned."""
    model, batch = random_diffuser(True, seed=1), left_padded(prompts(12))
    width, ended = batch["input_ids"].shape[1], 0
    output = ld.generate(
        model,
        **batch,
        max_new_tokens=12,
        eos_token_id=MANY_ENDS,
        pad_token_id=1,
        return_dict_in_generate=True,
        output_history=True,
    )
    free = ld.generate(
        model, **batch, max_new_tokens=12, eos_token_id=None, return_dict_in_generate=True, output_history=True
    )
    assert free.nfe.tolist() == [12] * 12
    for i in range(12):
        returned = output.sequences[i, width:].tolist()
        ends = [j for j, token in enumerate(returned) if token in MANY_ENDS]
        if not ends:
            assert output.nfe[i] == 12
            continue
        assert set(returned[ends[0] + 1 :]) <= {1}
        # The run that knows no end tokens commits the same until here, one token a step.
        last = int(output.nfe[i])
        before_stop, unfilled = free.history[last - 2][i, width:].tolist(), free.history[last - 1][i, width:].tolist()
        first = next(j for j, token in enumerate(unfilled) if token in MANY_ENDS)
        assert first == ends[0]
        assert MASK not in unfilled[:first]
        assert MASK in before_stop[: first + 1], "it could have stopped earlier"
        tail = output.history[-1][i, width:].tolist()[first + 1 :]
        want = [unfilled[first] if token == MASK else token for token in unfilled[first + 1 :]]
        assert tail == want
        ended += MASK in unfilled
    assert ended >= 3, "too few rows stopped with masks left to fill"


def test_without_early_stop_everything_is_decoded(random_diffuser):
    model, batch = random_diffuser(True), left_padded(prompts(6))
    output = ld.generate(
        model, **batch, max_new_tokens=8, eos_token_id=MANY_ENDS, eos_early_stop=False, return_dict_in_generate=True
    )
    free = ld.generate(model, **batch, max_new_tokens=8, eos_token_id=None)
    assert output.nfe.tolist() == [8] * 6
    assert torch.equal(output.sequences, free)


def test_no_mask_token_is_ever_left(random_diffuser):
    """100 random heads that like the mask token. LLaDA's own program leaves it in the answer of some."""
    model, prompt, favoured = random_diffuser(True), torch.tensor([[11, 12, 13]]), 0
    canvas = torch.nn.functional.pad(prompt, (0, 6), value=MASK)
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            model.lm_head.weight.normal_(std=0.3, generator=generator)
            favoured += bool((model(canvas).logits[0, 2:-1].argmax(-1) == MASK).any())
        answer = ld.generate(model, prompt, max_new_tokens=6, steps=2, eos_token_id=None)
        assert answer.shape == (1, 9)
        assert not (answer == MASK).any()
    assert favoured > 2, "the ban had nothing to do"


def test_suppressed_tokens_do_not_appear(random_diffuser):
    model, prompt = random_diffuser(True), torch.tensor([[11, 12, 13]])
    free = ld.generate(model, prompt, max_new_tokens=8, eos_token_id=None)
    banned = sorted(set(free[0, 3:].tolist()))
    answer = ld.generate(model, prompt, max_new_tokens=8, eos_token_id=None, suppress_tokens=banned)
    assert not set(answer[0, 3:].tolist()) & {*banned, MASK}


def test_nfe_counts_forward_passes(random_diffuser):
    model, calls = random_diffuser(True), []
    model.register_forward_hook(lambda *_: calls.append(1))
    for settings, most in (({}, 8), ({"steps": 3}, 3), ({"threshold": 0.3}, 8), ({"steps": 4, "block_length": 4}, 4)):
        calls.clear()
        output = ld.generate(
            model,
            torch.tensor([[11, 12]]),
            max_new_tokens=8,
            eos_token_id=None,
            return_dict_in_generate=True,
            **settings,
        )
        assert output.nfe.tolist() == [len(calls)]
        assert 1 <= len(calls) <= most
        assert output.tokens_per_forward.tolist() == pytest.approx([8 / len(calls)])


def test_tokens_per_forward_counts_through_the_end_token(random_diffuser):
    model, batch = random_diffuser(True, seed=1), left_padded(prompts(12))
    width = batch["input_ids"].shape[1]
    output = ld.generate(
        model, **batch, max_new_tokens=12, steps=6, eos_token_id=MANY_ENDS, pad_token_id=1, return_dict_in_generate=True
    )
    for answer, nfe, rate in zip(
        output.sequences[:, width:].tolist(), output.nfe.tolist(), output.tokens_per_forward.tolist(), strict=True
    ):
        tokens = next((j + 1 for j, token in enumerate(answer) if token in MANY_ENDS), 12)
        assert rate == pytest.approx(tokens / nfe)


def test_filling_gaps_leaves_the_rest_and_ignores_padding(random_diffuser):
    for right_shift in (True, False):
        model = random_diffuser(right_shift)
        settings = ld.DiffusionGenerationConfig(mask_token_id=MASK, eos_token_id=None)
        text = torch.tensor([[11, MASK, 13, MASK, MASK, 16, 17, MASK]])
        want = fill_masks(model, text, torch.ones_like(text), settings).sequences
        assert torch.equal(want[text != MASK], text[text != MASK])
        assert not (want == MASK).any()
        for left, right in ((3, 0), (0, 3), (2, 1)):
            ids = torch.nn.functional.pad(text, (left, right))
            mask = torch.nn.functional.pad(torch.ones_like(text), (left, right))
            filled = fill_masks(model, ids, mask, settings).sequences
            assert torch.equal(filled[:, left : left + 8], want)
            assert torch.equal(filled[mask == 0], ids[mask == 0])


# -- sampling


@pytest.mark.parametrize("settings", [{"temperature": 1.0}, {"remasking": "random"}], ids=str)
def test_noise_depends_on_the_seed_and_on_nothing_else_in_the_batch(random_diffuser, settings):
    model = random_diffuser(True)
    row, others = [11, 12, 13, 14], [[15, 16, 17, 18], [19, 20, 21, 22], [23, 24, 25, 26]]
    common = {"max_new_tokens": 8, "eos_token_id": None, **settings}
    alone = ld.generate(model, torch.tensor([row]), **common)[0]
    assert torch.equal(ld.generate(model, torch.tensor([row]), **common)[0], alone)
    for place in range(4):
        batch = [*others[:place], row, *others[place:]]
        assert torch.equal(ld.generate(model, torch.tensor(batch), **common)[place], alone)
    answers = {tuple(ld.generate(model, torch.tensor([row]), seed=s, **common)[0].tolist()) for s in range(8)}
    assert len(answers) > 4


def test_duplicates_in_a_batch_differ(random_diffuser):
    batch = torch.tensor([[11, 12, 13]] * 16)
    answers = ld.generate(random_diffuser(True), batch, max_new_tokens=8, eos_token_id=None, temperature=1.0)
    assert len({tuple(row) for row in answers.tolist()}) > 12
    greedy = ld.generate(random_diffuser(True), batch, max_new_tokens=8, eos_token_id=None)
    assert len({tuple(row) for row in greedy.tolist()}) == 1


def filtered(logits, temperature, top_k=None, top_p=None):
    """softmax(logits / T) cut to the `top_k` best, then to the fewest that hold `top_p`, by hand."""
    probs = {token: math.exp(value / temperature) for token, value in enumerate(logits) if token != len(logits) - 1}
    ranked = sorted(probs, key=probs.get, reverse=True)[: top_k or len(probs)]
    kept, mass = [], 0.0
    for token in ranked:
        if top_p is not None and mass >= top_p * sum(probs[t] for t in ranked):
            break
        kept.append(token)
        mass += probs[token]
    return torch.tensor([probs[t] / mass if t in kept else 0.0 for t in range(len(logits))])


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"temperature": 1.0, "top_k": 3},
        {"temperature": 1.0, "top_p": 0.7},
        {"temperature": 2.0, "top_k": 6, "top_p": 0.8},
    ],
    ids=str,
)
def test_samples_follow_the_tempered_filtered_distribution(random_diffuser, settings):
    """One mask, thousands of duplicates: the share of every token is its probability (total variation)."""
    model = random_diffuser(True, vocab_size=12)
    canvas = torch.tensor([[4, 5, 6, 11]])
    with torch.no_grad():
        logits = model(canvas).logits[0, 2].tolist()
    counts = torch.zeros(12)
    for seed in range(10):
        batch = canvas[:, :3].repeat(800, 1)
        answers = ld.generate(model, batch, max_new_tokens=1, eos_token_id=None, seed=seed, **settings)[:, 3]
        counts += torch.bincount(answers, minlength=12)
    share = counts / counts.sum()

    def distance(other):
        return (share - other).abs().sum().item() / 2

    want = filtered(logits, **settings)
    assert not counts[want == 0].any()
    assert distance(want) < 0.025
    # Neither the greedy nor a flat answer would pass for this.
    assert distance(filtered(logits, 0.01)) > 0.09
    assert distance(filtered(logits, 100.0)) > 0.1


# -- settings


def test_the_longest_prompt_fits(random_diffuser):
    answer = ld.generate(random_diffuser(True), torch.tensor([[11, 12, 13]]), max_new_tokens=61, steps=1)
    assert answer.shape[1] <= 64


def test_a_model_without_mask_token_is_refused_and_works_when_it_is_given(random_diffuser):
    model = random_diffuser(False)
    want = ld.generate(model, torch.tensor([[11, 12]]), max_new_tokens=4, eos_token_id=None)
    del model.config.diffusion
    with pytest.raises(ValueError, match="`mask_token_id`"):
        ld.generate(model, torch.tensor([[11, 12]]), max_new_tokens=4)
    given = ld.generate(model, torch.tensor([[11, 12]]), max_new_tokens=4, eos_token_id=None, mask_token_id=MASK)
    assert torch.equal(given, want)


def test_right_padded_prompts_are_refused(random_diffuser):
    batch = {"input_ids": torch.tensor([[11, 12], [13, 0]]), "attention_mask": torch.tensor([[1, 1], [1, 0]])}
    with pytest.raises(ValueError, match="left"):
        ld.generate(random_diffuser(True), **batch, max_new_tokens=4)


def test_an_attention_mask_of_another_shape_is_refused(random_diffuser):
    with pytest.raises(ValueError, match=r"`attention_mask`.*\(1, 3\).*\(1, 2\)"):
        ld.generate(random_diffuser(True), torch.tensor([[11, 12, 13]]), attention_mask=torch.ones(1, 2).long())


def test_keywords_win_over_the_given_config(random_diffuser):
    model, prompt = random_diffuser(True), torch.tensor([[11, 12, 13]])
    for given in (
        GenerationConfig(max_new_tokens=5, eos_token_id=None),
        ld.DiffusionGenerationConfig(max_new_tokens=5, steps=2, mask_token_id=MASK),
    ):
        output = ld.generate(
            model, prompt, generation_config=given, eos_token_id=None, steps=3, return_dict_in_generate=True
        )
        assert output.sequences.shape == (1, 8)
        assert output.nfe.tolist() == [3]


def test_end_and_padding_tokens_default_to_the_model(random_diffuser):
    model, batch = random_diffuser(True, seed=1), left_padded(prompts(12))
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = MANY_ENDS, 1
    want = ld.generate(model, **batch, max_new_tokens=9, eos_token_id=MANY_ENDS, pad_token_id=1)
    assert torch.equal(ld.generate(model, **batch, max_new_tokens=9), want)
    assert (want == 1).any()


# -- beside the host


def test_output_types(random_diffuser):
    model, prompt = random_diffuser(True), torch.tensor([[11, 12, 13]])
    plain = ld.generate(model, prompt, max_new_tokens=4)
    output = ld.generate(model, prompt, max_new_tokens=4, return_dict_in_generate=True)
    assert isinstance(plain, torch.Tensor)
    assert isinstance(output, DiffusionOutput)
    assert torch.equal(output.sequences, plain)
    assert output.history is None
    assert torch.equal(ld.generate(model, inputs=prompt, max_new_tokens=4), plain)
    assert torch.equal(plain[:, :3], prompt)


class Recorder(BaseStreamer):
    """Keeps what it is given, in order."""

    def __init__(self):
        self.calls = []

    def put(self, value):
        self.calls.append(("put", value.clone()))

    def end(self):
        self.calls.append(("end", None))


class DraftRecorder(Recorder):
    def put_draft(self, value):
        self.calls.append(("draft", value.clone()))


def test_streamers_get_prompt_drafts_answer_and_end(random_diffuser):
    model, prompt = random_diffuser(True), torch.tensor([[11, 12, 13]])
    plain, drafts = Recorder(), DraftRecorder()
    common = {"max_new_tokens": 6, "steps": 3, "eos_token_id": None, "return_dict_in_generate": True}
    output = ld.generate(model, prompt, streamer=drafts, output_history=True, **common)
    ld.generate(model, prompt, streamer=plain, **common)
    assert [name for name, _ in drafts.calls] == ["put", "draft", "draft", "draft", "put", "end"]
    assert [name for name, _ in plain.calls] == ["put", "put", "end"]
    for recorder in (plain, drafts):
        assert torch.equal(recorder.calls[0][1], prompt)
        assert torch.equal(recorder.calls[-2][1], output.sequences[:, 3:])
    for (_, draft), canvas in zip(drafts.calls[1:4], output.history, strict=True):
        assert torch.equal(draft, canvas[:, 3:])


@pytest.mark.parametrize("training", [True, False])
def test_the_training_flag_comes_back(random_diffuser, training):
    # Dropout tells whether decoding ran in evaluation mode.
    model = random_diffuser(True, attention_dropout=0.5)
    want = ld.generate(model, torch.tensor([[11, 12, 13]]), max_new_tokens=6, eos_token_id=None)
    model.train(training)
    answer = ld.generate(model, torch.tensor([[11, 12, 13]]), max_new_tokens=6, eos_token_id=None)
    assert {module.training for module in model.modules()} == {training}
    assert torch.equal(answer, want)
    with pytest.raises(ZeroDivisionError):  # and when decoding breaks off
        ld.generate(model, torch.tensor([[11, 12, 13]]), max_new_tokens=6, logits_processor=[lambda ids, scores: 1 / 0])
    assert model.training is training


def perturbed_lora(model):
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora" in name:
                parameter.normal_(std=0.5)
    return peft.eval()


def test_under_lora_the_adapted_model_decodes(random_llama, tokenizer):
    model = ld.convert_to_diffusion(random_llama(), tokenizer)
    prompt = torch.tensor([[21, 22, 23, 24]])
    bare = model.generate(prompt, max_new_tokens=8, eos_token_id=None)
    peft = perturbed_lora(model)
    adapted = peft.generate(input_ids=prompt, max_new_tokens=8, eos_token_id=None)
    assert torch.equal(ld.generate(peft, prompt, max_new_tokens=8, eos_token_id=None), adapted)
    assert not torch.equal(adapted, bare)
    merged = peft.merge_and_unload()
    assert torch.equal(ld.generate(merged, prompt, max_new_tokens=8, eos_token_id=None), adapted)


def test_autoregressive_decoding_is_the_untouched_base(random_llama, tokenizer):
    prompt = torch.tensor([[21, 22, 23, 24], [25, 26, 27, 28]])
    options = {"max_new_tokens": 10, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    want = random_llama().generate(prompt, **options)
    model = ld.convert_to_diffusion(random_llama(), tokenizer)
    assert torch.equal(ld.generate_autoregressive(model, prompt, **options), want)
    peft = perturbed_lora(model)
    assert torch.equal(ld.generate_autoregressive(peft, prompt, **options), want)
    # Both switches are back: bidirectional, adapter on.
    assert ld.probe_attention(peft) == "bidirectional"
    with peft.disable_adapter():
        off = peft(prompt).logits
    assert not torch.allclose(peft(prompt).logits, off)


def test_the_hosts_pipeline_decodes_by_unmasking(tiny):
    model, tokenizer = tiny
    question, settings = "Sort the letters: k d e a", {"max_new_tokens": 8, "temperature": 0.0}
    encoded = tokenizer(question, return_tensors="pt")
    want = model.generate(**encoded, **settings)[0, encoded["input_ids"].shape[1] :]
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    answer = pipe(question, return_full_text=False, **settings)
    assert answer == [{"generated_text": tokenizer.decode(want, skip_special_tokens=True)}]
    # `threshold` is a setting of ours alone: the host's decoding would refuse it.
    assert len(pipe([question, "3 6"], batch_size=2, threshold=0.5, **settings)) == 2


def test_a_config_object_without_mask_token_takes_the_models(random_diffuser):
    config = ld.DiffusionGenerationConfig(max_new_tokens=2)
    assert ld.generate(random_diffuser(True), torch.tensor([[11]]), generation_config=config).shape == (1, 3)


@pytest.mark.parametrize("settings", [{"temperature": 1.0}, {"remasking": "random"}])
def test_noise_does_not_depend_on_left_padding(random_diffuser, settings):
    model, settings = random_diffuser(True), {"max_new_tokens": 8, "eos_token_id": None, **settings}
    alone = ld.generate(model, torch.tensor([[11, 12]]), **settings)[0]
    padded = torch.tensor([[0, 0, 0, 11, 12]])
    mask = torch.tensor([[0, 0, 0, 1, 1]])
    assert torch.equal(alone, ld.generate(model, padded, attention_mask=mask, **settings)[0, 3:])


def test_a_growing_canvas_does_not_depend_on_the_batch(random_diffuser):
    """Rows that are behind do not see the canvas that others have reached."""
    model = random_diffuser(True)
    settings = {"max_new_tokens": 9, "eos_token_id": None, "threshold": 0.3, "block_length": 3, "grow_canvas": True}
    ids = torch.tensor([[11 + i, 12, 13 + i] for i in range(12)])
    one_by_one = torch.cat([ld.generate(model, row[None], **settings) for row in ids])
    assert torch.equal(ld.generate(model, ids, **settings), one_by_one)


def test_mask_tokens_under_padding_are_left_alone(random_diffuser):
    model, mask_id = random_diffuser(True), 31
    settings = ld.DiffusionGenerationConfig(mask_token_id=mask_id, eos_token_id=None, max_new_tokens=1)
    ids, mask = torch.tensor([[mask_id, mask_id, 11, mask_id, 12]]), torch.tensor([[0, 0, 1, 1, 1]])
    output = fill_masks(model, ids, mask, settings)
    assert output.nfe.item() == 1 and output.sequences[0, :2].tolist() == [mask_id, mask_id]


@pytest.mark.parametrize(
    "setting",
    [
        {"mask_token_id": 999},
        {"bad_words_ids": [[3, 99]]},
        {"suppress_tokens": [-1]},
        {"max_new_tokens": 63},
        {"stepz": 4},
        {"verify": True},
    ],
)
def test_what_would_be_ignored_or_crash_is_refused(random_diffuser, setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        ld.generate(random_diffuser(True), torch.tensor([[11, 12]]), **{"max_new_tokens": 4, **setting})


def test_a_mask_token_in_the_prompt_is_left_alone(random_diffuser):
    prompt = torch.tensor([[11, 31, 12]])
    output = ld.generate(random_diffuser(True), prompt, max_new_tokens=3, eos_token_id=None)
    assert torch.equal(output[:, :3], prompt)


def test_max_length_counts_the_prompt(random_diffuser):
    model, prompt = random_diffuser(True), torch.tensor([[11, 13, 12]])
    assert ld.generate(model, prompt, max_length=8, eos_token_id=None).shape == (1, 8)
    with pytest.raises(ValueError, match="max_length"):
        ld.generate(model, prompt, max_length=3)
