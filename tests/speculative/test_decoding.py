"""Lossless decoding: greedy output is the base's own token for token, sampled output is distributed as the base's."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llm_diffusion.generation.canvas import fill_masks
from llm_diffusion.generation.generate import _settings, generate, generate_autoregressive
from llm_diffusion.models.forward import forward_state
from llm_diffusion.models.lm_head import train_rows_alone
from llm_diffusion.models.loading import load_diffusion_model
from llm_diffusion.speculative.adapters import AdapterSwitch
from llm_diffusion.speculative.decoding import LosslessDecoder, copied
from llm_diffusion.speculative.schedule import Curve, DraftSchedule, PassCosts
from llm_diffusion.speculative.training import check_drafts

EOS, PAD, MASK = 2, 0, 63
FREE = PassCosts(*[Curve((1, 80), (1.0, 1.0))] * 3)
CHEAP_DRAFTS = PassCosts(*(Curve((1, 80), (c, 2 * c)) for c in (1.0, 0.1, 9.0)))  # of trees
DEAR = PassCosts(*[Curve((1, 80), (1.0, 80.0))] * 3)


def drafter(model, block_length: int = 4, std: float = 0.05):
    """A model with adapters that draft: the wider `std`, the worse."""
    model.config.diffusion = {
        "attention": "lossless",
        "block_length": block_length,
        "clean_context": "causal",
        "right_shift_logits": True,
        "mask_token_id": model.config.vocab_size - 1,
    }
    mask = model.config.vocab_size - 1
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", trainable_token_indices=[mask]))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "trainable_tokens_delta" in name:
            parameter.data.normal_(std=std)
    return model.eval()


def prompts(rows: int = 6, longest: int = 9, vocab_size: int = 60):
    """Ragged prompts, padded on the left."""
    ids = torch.randint(5, vocab_size, (rows, longest), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : row % longest] = 0
    return ids * mask, mask


def at_costs(model, costs: PassCosts, block_length: int = 4) -> None:
    """Has a model decode as where passes cost this."""
    decode_by(model, DraftSchedule(block_length, costs))


def decode_by(model, schedule: DraftSchedule) -> None:
    base = model.get_base_model()
    key = base.device, base.dtype, torch.get_num_threads(), schedule.block_length
    forward_state(base).draft_schedule = key, schedule


def same_as_base(model, block: int = 20, **settings) -> torch.Tensor:
    ids, mask = prompts()
    common = {"max_new_tokens": block, "eos_token_id": EOS, "pad_token_id": PAD}
    want = generate_autoregressive(model, ids, attention_mask=mask, do_sample=False, **common)
    got = generate(model, ids, mask, return_dict_in_generate=True, **common, **settings)
    assert torch.equal(got.sequences, want)
    return got


@pytest.mark.parametrize("outcomes", [None, 0, 1, 8])
@pytest.mark.parametrize("block_length", [2, 4, 8])
@pytest.mark.parametrize("std", [0.0, 0.05, 0.5])
def test_greedy_is_the_base_whatever_is_drafted(random_llama, block_length, outcomes, std) -> None:
    model = drafter(random_llama(vocab_size=64), block_length, std)
    got = same_as_base(model, draft_outcomes=outcomes)
    assert (got.accepted.max() > 1) or std  # drafts of the base itself are right now and then
    answers = torch.where(
        torch.isin(got.sequences[:, 9:], torch.tensor([EOS])).any(-1), (got.sequences[:, 9:] != PAD).sum(-1), 20
    )
    assert torch.equal(got.accepted.clamp(min=0).sum(-1), answers)
    assert torch.equal(got.tokens_per_forward, answers / got.nfe)


class Copies(TorchDispatchMode):
    """How often a matrix was copied to put rows into it, as PEFT makes the `weight` of an embedding with trained rows."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.index_copy.default
        return func(*args, **(kwargs or {}))


def test_no_call_copies_the_vocabulary(random_llama) -> None:
    model = drafter(random_llama(vocab_size=64))
    train_rows_alone(model)  # as loading does
    with Copies() as copies:
        assert len(model.get_base_model().get_input_embeddings().weight) == 64
        assert copies.count == 1
        generate(model, *prompts(), max_new_tokens=8, eos_token_id=EOS, pad_token_id=PAD)
    assert copies.count == 1


@pytest.mark.parametrize("costs", [FREE, CHEAP_DRAFTS])
def test_end_tokens_end_rows_and_free_them(random_llama, costs) -> None:
    """Of an unsure model, so that rows end at different places."""
    model = drafter(random_llama(vocab_size=8, seed=3), 4)
    at_costs(model, costs)
    ids, mask = prompts(8, 6, 8)
    common = {"max_new_tokens": 24, "eos_token_id": [2, 6], "pad_token_id": PAD}
    want = generate_autoregressive(
        model, ids, attention_mask=mask, do_sample=False, suppress_tokens=[7], **common
    )  # the mask token is nobody's answer
    got = generate(model, ids, mask, return_dict_in_generate=True, **common)
    assert torch.equal(got.sequences, want)
    ended = torch.isin(want[:, 6:], torch.tensor([2, 6])).any(-1)
    assert 0 < ended.sum() < len(ended)
    assert got.nfe[ended].max() < got.nfe[~ended].max()


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 7])
def test_any_number_of_new_tokens(random_llama, limit) -> None:
    got = same_as_base(drafter(random_llama(vocab_size=64), 4), limit)
    assert limit > 1 or (got.nfe == 1).all()  # the prompt's own pass says the first


def test_a_known_end_needs_no_verification(random_llama) -> None:
    """With drafts that are never right, every pass but the prompt's says one token more than it is asked to verify."""
    model = drafter(random_llama(vocab_size=64), 4, std=5.0)
    ids, mask = prompts(1)
    settings = {"eos_token_id": None, "draft_outcomes": 4, "return_dict_in_generate": True}
    got = generate(model, ids, mask, max_new_tokens=6, **settings)
    assert (got.accepted <= 2).all()  # no draft was right: one token a pass, and the last with the one before it
    assert got.accepted[got.accepted > 0].sum() == 6 == got.nfe.item()


def test_other_architectures_and_their_layouts() -> None:
    """Layers that see rows one under the other (OPT, shared experts), scaled embeddings (BioGPT), GPT-2's transposed weights."""
    small = {
        "vocab_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "hidden_size": 32,
    }
    configs = [
        transformers.OPTConfig(**small, ffn_dim=64, word_embed_proj_dim=32, init_std=0.2),
        transformers.BioGptConfig(**small, intermediate_size=64, initializer_range=0.2, scale_embedding=True),
        transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2),
        transformers.PhiConfig(**small, intermediate_size=64, initializer_range=0.2),
    ]
    for config in configs:
        torch.manual_seed(0)
        model = drafter(AutoModelForCausalLM.from_config(config).eval(), 4)
        for rows in (1, 3):
            ids, mask = prompts(rows)
            common = {"max_new_tokens": 10, "eos_token_id": None, "pad_token_id": PAD}
            want = generate_autoregressive(
                model, ids, attention_mask=mask, do_sample=False, suppress_tokens=[63], **common
            )
            assert torch.equal(generate(model, ids, mask, draft_outcomes=4, **common), want), config.model_type
            at_costs(model, CHEAP_DRAFTS)
            assert torch.equal(generate(model, ids, mask, **common), want), config.model_type
        check_drafts(model, 63, checkpointing=False)


def test_processors_of_the_base_are_said_to_be_left_out(random_llama, caplog) -> None:
    model, (ids, mask) = drafter(random_llama(vocab_size=64)), prompts(1)
    model.get_base_model().generation_config.repetition_penalty = 1.3
    generate(model, ids, mask, max_new_tokens=4)
    assert "repetition_penalty" in caplog.text
    caplog.clear()
    generate(model, ids, mask, max_new_tokens=4, repetition_penalty=1.0)
    assert "repetition_penalty" not in caplog.text


def test_one_by_one_as_in_a_batch(random_llama) -> None:
    model, (ids, mask) = drafter(random_llama(vocab_size=64), 4), prompts()
    settings = {"max_new_tokens": 20, "eos_token_id": None, "return_dict_in_generate": True}
    for temperature, outcomes in ((0.0, 4), (1.0, 4), (1.0, None), (1.0, 2)):
        settings |= {"temperature": temperature, "draft_outcomes": outcomes}
        batch = generate(model, ids, mask, **settings)
        for row in range(len(ids)):
            one = ids[row : row + 1, mask[row].bool()]
            alone = generate(model, one, **settings)
            assert torch.equal(alone.sequences[0, one.shape[1] :], batch.sequences[row, 9:])
            # A pass that makes one row's missing draft is every row's.
            assert alone.nfe <= batch.nfe[row] if outcomes == 2 else alone.nfe == batch.nfe[row]


def test_learned_positions_may_end_behind_the_answer() -> None:
    """Drafts of a GPT-2 at its last position stand behind it."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=29, bos_token_id=None, eos_token_id=EOS
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.transformer.wte.weight.mul_(20)
    same_as_base(drafter(model, 8))


def exact(model, prompt: torch.Tensor, n: int, warp) -> dict[tuple[int, ...], float]:
    """Probability of every continuation of n tokens under the base, by enumeration."""
    found = {}
    vocabulary = range(model.config.vocab_size)
    with model.disable_adapter(), torch.no_grad():
        for text in itertools.product(vocabulary, repeat=n):
            logits = model(torch.cat([prompt, torch.tensor([text])], -1)).logits[0, len(prompt[0]) - 1 : -1]
            logits[:, model.config.vocab_size - 1] = -torch.inf  # the mask token
            probs = warp(logits).softmax(-1)
            found[text] = float(torch.stack([probs[i, token] for i, token in enumerate(text)]).prod())
    return found


@pytest.mark.parametrize(
    ("settings", "outcomes"),
    [({"temperature": 1.0}, 3), ({"temperature": 0.7, "top_k": 3}, 1), ({"temperature": 1.0, "top_p": 0.8}, 0)],
)
def test_samples_are_distributed_as_the_base(random_llama, settings, outcomes) -> None:
    """4,000 samples of three tokens over a vocabulary of 6, mask among them."""
    model = drafter(random_llama(vocab_size=6, initializer_range=0.4, seed=5), 3, std=0.3)
    prompt, n = torch.tensor([[3, 1, 4]]), 4_000

    def warp(logits):
        logits = TemperatureLogitsWarper(settings["temperature"])(None, logits)
        logits = TopKLogitsWarper(settings["top_k"])(None, logits) if "top_k" in settings else logits
        return TopPLogitsWarper(settings["top_p"])(None, logits) if "top_p" in settings else logits

    got = generate(
        model,
        prompt.expand(n, -1),
        max_new_tokens=3,
        eos_token_id=None,
        draft_outcomes=outcomes,
        return_dict_in_generate=True,
        **settings,
    )
    assert got.accepted.max() > 1 and got.accepted[got.accepted > 0].min() == 1  # both ways are taken
    want = exact(model, prompt, 3, warp)
    answers = [tuple(row) for row in got.sequences[:, 3:].tolist()]
    counts = {text: answers.count(text) / n for text in set(answers)}
    distance = sum(abs(counts.get(text, 0.0) - p) for text, p in want.items()) / 2
    error = sum((p * (1 - p) / n) ** 0.5 for p in want.values()) / 2
    assert sum(want.values()) == pytest.approx(1, abs=1e-4)
    assert distance < 2 * error


@pytest.mark.parametrize("trees", [False, True])
def test_drafts_do_not_touch_the_cache(random_llama, trees) -> None:
    """What is left in it is the base's own, up to the rounding of its own pass over the same columns."""
    model = drafter(random_llama(vocab_size=64), 4, std=0.05)
    ids, mask = prompts(3)
    settings = _settings(model.base_model.model, None, {"max_new_tokens": 24, "eos_token_id": None})
    decoder = LosslessDecoder(model, ids, mask, settings)
    if trees:
        decoder.schedule = DraftSchedule(4, CHEAP_DRAFTS)
    with torch.no_grad(), AdapterSwitch(model) as decoder.switch:
        decoder._prefill()
        for _ in range(4):
            assert (decoder.tree is not None) == trees
            decoder._cycle()
    if trees:  # second guesses were accepted, and their columns moved
        drafted = sum(int((accepted - 1).sum()) for accepted in decoder.accepted[1:])
        first_guesses = sum(place * (count - 1) for place, count in enumerate(decoder.schedule.ends))
        assert drafted > first_guesses
    for row in range(3):
        text = decoder.canvas[row, : 9 + int(decoder.done[row])][row:]  # without the padding
        with model.disable_adapter(), torch.no_grad():
            plain = model(text[None], use_cache=True).past_key_values
        for ours, theirs in zip(decoder.cache.layers, plain.layers, strict=True):
            for found, want in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
                torch.testing.assert_close(found[row, :, decoder.valid[row]], want[0], rtol=1e-4, atol=1e-4)


def test_what_is_refused(random_llama, random_diffuser) -> None:
    ids, mask = prompts()
    model = drafter(random_llama(vocab_size=64))
    for settings, message in (
        ({"verify": False}, "verify"),
        ({"draft_outcomes": -1}, "draft_outcomes"),
        ({"eos_early_stop": False}, "eos_early_stop"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"repetition_penalty": 1.2}, "repetition_penalty"),
        ({"bad_words_ids": [[3]]}, "bad_words_ids"),
        ({"editing_threshold": 0.5}, "editing_threshold"),
        ({"logits_processor": [print]}, "logits_processor"),
        ({"block_length": 8}, "block_length"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, ids, mask, max_new_tokens=8, **settings)
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, ids[:, :0], mask[:, :0], max_new_tokens=8)
    with pytest.raises(ValueError, match="verify"):
        generate(random_diffuser(True), ids[:1, :4] % 30, max_new_tokens=8, verify=True)
    with pytest.raises(ValueError, match="cannot fill gaps"):
        fill_masks(model, ids, mask, _settings(model.base_model.model, None, {"max_new_tokens": 8}))
    with pytest.raises(ValueError, match="no autoregressive model"):
        generate(model.merge_and_unload(), ids, mask, max_new_tokens=8)


def test_a_quantised_base_is_what_is_kept() -> None:
    """Under nf4 the guarantee is against the quantised base."""
    model, tokenizer = load_diffusion_model("tiny", attention="lossless", block_length=4, quantization="nf4")
    mask = tokenizer.mask_token_id
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", trainable_token_indices=[mask]))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.01)
    batch = tokenizer(
        ["<|im_start|>user\nSort the letters: k d e a<|im_end|>\n<|im_start|>assistant\n"] * 2, return_tensors="pt"
    )
    want = generate_autoregressive(model.eval(), **batch, max_new_tokens=12, do_sample=False)
    assert torch.equal(generate(model, **batch, max_new_tokens=12), want)


@pytest.mark.parametrize("costs", [FREE, CHEAP_DRAFTS])
def test_drafts_in_progress_are_streamed(random_llama, costs) -> None:
    class Drafts:
        def __init__(self) -> None:
            self.seen, self.drafts, self.ended = [], [], False

        def put(self, value: torch.Tensor) -> None:
            self.seen.append(value)

        def put_draft(self, value: torch.Tensor) -> None:
            self.drafts.append(value)

        def end(self) -> None:
            self.ended = True

    model, (ids, mask), streamer = drafter(random_llama(vocab_size=64)), prompts(1), Drafts()
    at_costs(model, costs)
    output = generate(model, ids, mask, max_new_tokens=9, eos_token_id=None, streamer=streamer)
    assert streamer.ended and torch.equal(torch.cat(streamer.seen[1:], -1), output[:, 9:])
    left = [int((draft == MASK).sum()) for draft in streamer.drafts]
    assert left == sorted(left, reverse=True) and left[-1] == 0
    for draft in streamer.drafts:  # what is written stays; finished blocks are no drafts any more
        assert torch.equal(draft[draft != MASK], output[:, -draft.shape[1] :][draft != MASK])


@pytest.mark.parametrize("costs", [FREE, CHEAP_DRAFTS, DEAR])
def test_the_text_is_the_base_s_whatever_passes_cost(random_llama, costs):
    model = drafter(random_llama(vocab_size=64), 4, 0.05)
    ids, mask = prompts()
    common = {"max_new_tokens": 20, "eos_token_id": EOS, "pad_token_id": PAD}
    at_costs(model, costs)
    found = generate(model, ids, mask, return_dict_in_generate=True, **common)
    assert torch.equal(
        found.sequences, generate_autoregressive(model, ids, attention_mask=mask, do_sample=False, **common)
    )
    if costs is DEAR:
        assert int(found.accepted.max()) <= 2  # no draft was tried; the last token comes with the one before it


class Fickle(DraftSchedule):
    """Passes cost something else in every cycle: trees, drafts in advance and rests follow each other in any order."""

    def choose(self, texts: int) -> list[int] | None:
        chance = torch.rand(3, generator=self.chance).tolist()
        self.costs = PassCosts(*(Curve((1, 80), (c, (2 - c) * c)) for c in chance))
        return None if chance[0] < 0.05 else super().choose(texts)


@pytest.mark.parametrize("block_length", [2, 4, 8, 40])
@pytest.mark.parametrize("vocab_size", [8, 64])
def test_the_text_is_the_base_s_whatever_is_tried_in_turn(random_llama, block_length, vocab_size):
    model = drafter(random_llama(vocab_size=vocab_size), block_length, 0.05)
    ids, mask = prompts(5, 9, vocab_size - 1)
    common = {"max_new_tokens": 24, "eos_token_id": EOS, "pad_token_id": PAD}
    want = generate_autoregressive(
        model, ids, attention_mask=mask, do_sample=False, suppress_tokens=[vocab_size - 1], **common
    )
    for seed in range(4):
        schedule = Fickle(block_length, FREE)
        schedule.chance = torch.Generator().manual_seed(seed)
        decode_by(model, schedule)
        assert torch.equal(generate(model, ids, mask, **common), want)


@pytest.mark.parametrize("rows", [1, 4])
def test_the_schedule_is_told_which_tokens_of_trees_were_right(random_llama, rows):
    """Counted again from the text; of rows that go on."""
    model = drafter(random_llama(vocab_size=64), 4, 0.05)
    ids, mask = prompts(rows)
    settings = _settings(model.base_model.model, None, {"max_new_tokens": 16, "eos_token_id": None})
    decoder = LosslessDecoder(model, ids, mask, settings)
    decoder.schedule = DraftSchedule(4, CHEAP_DRAFTS)
    right, drafts, cycles = torch.zeros(31), 0, []
    with torch.no_grad(), AdapterSwitch(model) as decoder.switch:
        decoder._prefill()
        while decoder.rows.numel():
            cycles.append((decoder.tree, decoder.rows, decoder.done[decoder.rows].tolist()))
            decoder._cycle()
            cycles[-1] += (decoder.rows.tolist(),)
    for tree, before, done, after in cycles:
        for at, row in enumerate(before.tolist()):
            if row not in after:
                continue
            drafts += 1
            said, node = decoder.canvas[row, 9 + done[at] + 1 :].tolist(), 0
            for token in said:
                here = (tree.parents[at] == node) & (tree.tokens[at] == token)
                if not here.any():
                    break
                node = int(here.long().argmax()) + 1
                right[tree.ranks[at, node - 1]] += 1
    first = DraftSchedule(4, CHEAP_DRAFTS)
    assert drafts > 3 and right.sum() > 3 and decoder.schedule.drafts[0] == first.drafts[0] + drafts
    told = torch.tensor(decoder.schedule.right) - torch.tensor(first.right)
    torch.testing.assert_close(told, right)


@pytest.mark.parametrize("seed", range(8))
def test_copied_is_what_followed_the_last_tokens_before(seed):
    """Against a search from the end of each text, for three tokens first, then for two."""
    chance, n = torch.Generator().manual_seed(seed), 7
    ids = torch.randint(0, 2 + seed, (12, 30), generator=chance)
    end = torch.randint(0, 30, (12,), generator=chance)
    found, has = copied(ids, end, n)
    for row, last, tokens, copies in zip(ids.tolist(), end.tolist(), found.tolist(), has.tolist(), strict=True):
        text = row[: last + 1]
        spans = [
            (size, at) for size in (3, 2) for at in range(last - size, -1, -1) if text[at : at + size] == text[-size:]
        ]
        spans = [(size, at) for size, at in spans if len(text) > size]
        assert copies == bool(spans)
        if spans:
            size, at = spans[0]
            repeated = text[at + size :]
            assert tokens == [repeated[k % len(repeated)] for k in range(n)]


def test_copies_take_no_pass_and_leave_the_text_to_the_base(random_llama):
    model = drafter(random_llama(vocab_size=64), 8, 0.5)
    ids = torch.tensor([[7, 8, 9, 10, 7, 8, 9, 10, 7, 8]])
    at_costs(model, PassCosts(*(Curve((1, 80), (c, c)) for c in (1.0, 99.0, 99.0))), 8)
    common = {"max_new_tokens": 48, "eos_token_id": None}
    found = generate(model, ids, return_dict_in_generate=True, **common)
    assert torch.equal(found.sequences, generate_autoregressive(model, ids, do_sample=False, **common))
    # Drafts are too dear to be made: what is accepted beyond the base's own token are copies, of a token that repeats.
    assert int(found.accepted.max()) == 8 and found.nfe.item() < 40


def test_costs_are_measured_once_and_grow_with_the_rows(random_llama):
    model = drafter(random_llama(vocab_size=64), 4, 0.05)
    generate(model, prompts()[0][:1], max_new_tokens=4)
    first = forward_state(model).draft_schedule
    generate(model, prompts()[0][:1], max_new_tokens=4)
    assert forward_state(model).draft_schedule is first
    costs = first[1].costs
    for curve in vars(costs).values():
        assert list(curve.seconds) == sorted(curve.seconds) and curve.seconds[0] > 0
