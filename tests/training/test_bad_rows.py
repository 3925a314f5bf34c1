"""A collator refuses what it cannot lay out, in words that name it."""

import pytest
import torch
from collators import collator_of

from llm_diffusion import DataCollatorForMaskedDiffusion, UserError
from llm_diffusion.models.record import DiffusionRecord
from llm_diffusion.objective.forward_process import NoiseSettings

MODES = {
    "bidirectional": {},
    "block": {"attention": "block", "block_length": 4, "clean_context": "causal"},
    "lossless": {"attention": "lossless", "block_length": 4, "clean_context": "causal"},
}
ROW = {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}
BAD_EXAMPLES = {
    "no rows": ([], "`examples`"),
    "a row that is a list": ([[5, 6]], "`examples`"),
    "a row that is none": ([None], "`examples`"),
    "no ids": ([{"labels": [5]}], "`input_ids`"),
    "ids none": ([{"input_ids": None}], "`input_ids`"),
    "ids text": ([{"input_ids": "Tom"}], "`input_ids`"),
    "ids texts": ([{"input_ids": ["5", "6"]}], "`input_ids`"),
    "ids empty": ([{"input_ids": []}], "`input_ids`"),
    "ids empty beside others": ([ROW, {"input_ids": []}], "`input_ids`"),
    "ids negative": ([{"input_ids": [5, -1]}], "`input_ids`"),
    "ids floats": ([{"input_ids": [5.0, 6.5]}], "`input_ids`"),
    "ids bools": ([{"input_ids": [True, False]}], "`input_ids`"),
    "ids with none": ([{"input_ids": [5, None]}], "`input_ids`"),
    "ids nested": ([{"input_ids": [[5, 6]]}], "`input_ids`"),
    "ids beyond 64 bits": ([{"input_ids": [5, 2**70]}], "`input_ids`"),
    "labels shorter": ([{**ROW, "labels": [5, 6]}], "`labels`"),
    "labels longer": ([{**ROW, "labels": [5] * 9}], "`labels`"),
    "labels floats": ([{**ROW, "labels": [5.0] * 4}], "`labels`"),
    "labels text": ([{**ROW, "labels": "abcd"}], "`labels`"),
    "labels below -100": ([{**ROW, "labels": [-101, 5, 6, 7]}], "`labels`"),
    "texts that do not add up": ([{**ROW, "seq_lengths": [2, 1]}], "`seq_lengths`"),
    "texts beyond the row": ([{**ROW, "seq_lengths": [4, 4]}], "`seq_lengths`"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", BAD_EXAMPLES)
def test_examples_that_are_none(mode, name):
    examples, named = BAD_EXAMPLES[name]
    with pytest.raises(UserError, match=named):
        collator_of(**MODES[mode])(examples)


BAD_OPTIONS = [
    ({"attention": "nonsense"}, "attention"),
    ({"attention": None}, "attention"),
    ({"attention": "block", "clean_context": "causal"}, "block_length"),
    ({**MODES["block"], "block_length": 0}, "block_length"),
    ({**MODES["block"], "block_length": "4"}, "block_length"),
    ({**MODES["lossless"], "block_length": 1}, "block_length"),
    ({"block_length": 4}, "block_length"),
    ({"mask_token_id": -1}, "mask_token_id"),
    ({"mask_token_id": "x"}, "mask_token_id"),
    ({"right_shift_logits": "x"}, "right_shift_logits"),
    ({"pad_token_id": None}, "pad_token_id"),
    ({"pad_token_id": -1}, "pad_token_id"),
    ({"max_canvas": 0}, "max_canvas"),
    ({"eos_tail": -1}, "eos_tail"),
    ({"random_canvas": 1.5}, "random_canvas"),
    ({"loss_weight": "x"}, "loss_weight"),
    ({"noise_schedule": "x"}, "noise_schedule"),
    ({"min_mask_probability": 0.8, "max_mask_probability": 0.2}, "min_mask_probability"),
    ({"min_mask_probability": -1}, "min_mask_probability"),
    ({"random_replacement": 1.0}, "random_replacement"),
]


@pytest.mark.parametrize(("options", "named"), BAD_OPTIONS)
def test_collators_that_cannot_be(options, named):
    with pytest.raises(UserError, match=named):
        collator_of(**options)


@pytest.mark.parametrize("record", [None, "x", []])
def test_a_record_that_is_none(record):
    with pytest.raises(UserError, match="`record`"):
        DataCollatorForMaskedDiffusion(record, 0)


def test_a_model_that_is_not_converted_has_no_noise():
    collator = DataCollatorForMaskedDiffusion(DiffusionRecord(), 0, settings=NoiseSettings())
    with pytest.raises(UserError, match="`mask_token_id` is missing"):
        collator.corrupt(collator([ROW]), seed=0, step=0)


BAD_KEYS = [
    *({"seed": seed} for seed in ("x", None, 1.5, -1)),
    {"rows": torch.arange(3), "n_rows": 3},
    {"rows": torch.arange(2)},
    {"rows": torch.zeros(2, 2), "n_rows": 2},
]


@pytest.mark.parametrize("keys", BAD_KEYS)
def test_keys_of_the_noise_that_are_none(keys):
    collator = collator_of()
    with pytest.raises(UserError, match="`seed`|`rows`"):
        collator.corrupt(collator([ROW, ROW]), **{"seed": 0, "step": 0, **keys})
