"""Rows through the trainers: at construction and at the call, as streams, packed; and tokenizers as people have them.

The forms of rows, and what is refused, are in `tests/data/test_tokens.py`.
"""

import copy
import math

import pytest
from datasets import Dataset
from rows import as_source, with_other_end
from small_trainers import make, tiny_model
from transformers import AutoModelForCausalLM

from llm_diffusion import DiffusionSFTConfig, DiffusionSFTTrainer, UserError
from llm_diffusion.data.tiny import tiny_dataset
from llm_diffusion.models.checkpoints import TINY_MODEL_PATH
from llm_diffusion.objective.modes import IGNORE_INDEX

CHAT = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]


def spread(turns):
    """A chat in ShareGPT's keys."""
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns]


@pytest.mark.parametrize("source", ["map", "generator", "mapped", "parquet"])
def test_sets_are_prepared_alike_at_construction_and_at_the_call(tmp_path, tokenizer, source):
    """As chats, in ShareGPT's form and as streams: the same loss, of the answers alone."""
    rows = [{"messages": row["messages"]} for row in tiny_dataset(8, split="test")]
    shared = [{"conversations": spread(row["messages"])} for row in rows]
    trainer = make(tmp_path, tokenizer, evaluation=Dataset.from_list(rows), dataset=as_source(shared, source, tmp_path))
    labels = next(iter(trainer.get_train_dataloader()))["labels"]
    prompts = [tokenizer.apply_chat_template(row["messages"][:1], return_dict=False) for row in rows]
    assert (labels[:, : min(map(len, prompts))] == IGNORE_INDEX).all()
    want = trainer.evaluate()["eval_loss"]
    for raw in (rows, shared):
        assert trainer.evaluate(as_source(raw, source, tmp_path))["eval_loss"] == pytest.approx(want, rel=1e-6)
    assert trainer.evaluate({"a": as_source(rows, source, tmp_path)})["eval_a_loss"] == pytest.approx(want, rel=1e-6)


LONG = {"messages": [{"role": "user", "content": "1 2 3 4 5 6 7 8 9 " * 4}, {"role": "assistant", "content": "4"}]}


def test_evaluation_rows_are_counted_and_none_left_is_refused(tmp_path, tokenizer, caplog):
    short = [{"messages": row["messages"]} for row in tiny_dataset(2)]
    trainer = make(tmp_path, tokenizer, evaluation=short + [LONG] * 2, max_length=70)
    assert "eval_dataset: 2 of 4 rows: nothing left to train on after `max_length`=70" in caplog.text
    for data in ([LONG] * 2, as_source([LONG] * 2, "generator", None)):
        with pytest.raises(UserError, match="`eval_dataset`: 2 of 2 rows"):
            trainer.evaluate(data)
    caplog.clear()
    trainer.evaluate(as_source(short + [LONG], "generator", None))
    assert "eval_dataset: 1 of 3 rows: nothing left" in caplog.text
    with pytest.raises(UserError, match="`train_dataset`: 2 of 2 rows"):
        make(tmp_path, tokenizer, dataset=as_source([LONG] * 2, "generator", None), max_length=70)


def test_packing_cuts_counts_and_drops_before_it_packs(tmp_path, tokenizer, caplog):
    short = [{"messages": row["messages"]} for row in tiny_dataset(6)]
    settings = {"packing": True, "max_length": 70, "eos_tail": 0, "random_canvas": 0.0}
    trainer = make(tmp_path, tokenizer, dataset=short + [LONG] * 3, **settings)
    alone = make(tmp_path, tokenizer, dataset=short, **settings)
    assert "train_dataset: 3 of 9 rows: nothing left to train on after `max_length`=70" in caplog.text

    def trained(trainer):
        return sum(label != IGNORE_INDEX for row in trainer.train_dataset for label in row["labels"])

    assert trained(trainer) == trained(alone) > 0
    with pytest.raises(UserError, match="`packing_strategy`: 'bfd_split'"):
        make(tmp_path, tokenizer, dataset=short, packing_strategy="bfd_split", **settings)
    text = [{"text": "1 2 3 4 5 6 7 8 9 " * 10}] * 2
    split = make(tmp_path, tokenizer, dataset=text, packing_strategy="bfd_split", **settings)
    assert sum(len(row["input_ids"]) for row in split.train_dataset) == 2 * 181  # nothing lost


def test_masks_that_nobody_would_read_are_refused(tmp_path, tokenizer):
    rows = Dataset.from_list([{"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1]}] * 4)
    skip = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    with pytest.raises(ValueError, match="skip_prepare_dataset"):
        make(tmp_path, tokenizer, dataset=rows, **skip)
    trainer = make(
        tmp_path, tokenizer, dataset=Dataset.from_list([{"input_ids": [5, 6], "labels": [-100, 6]}] * 4), **skip
    )
    with pytest.raises(ValueError, match="skip_prepare_dataset"):
        trainer.evaluate(rows)


def test_a_transform_runs_at_every_read_where_nothing_is_prepared(tmp_path, tokenizer):
    reads = []

    def draw(batch):
        reads.append(len(reads))
        return {side: [[5, 6, 7 + len(reads)] for _ in batch["text"]] for side in ("input_ids", "labels")}

    rows = Dataset.from_list([{"text": "a"}] * 4).with_transform(draw)
    skip = {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}
    trainer = make(tmp_path, tokenizer, dataset=rows, **skip)
    assert next(iter(trainer.get_train_dataloader()))["input_ids"][0, 2] == 7 + len(reads)
    before = len(reads)
    trainer.train()
    assert len(reads) > before


@pytest.mark.parametrize("row", [{"messages": CHAT}, {"prompt": "a", "completion": "b"}])
def test_a_formatting_function_wins_over_columns(tmp_path, tokenizer, row):
    settings = DiffusionSFTConfig(str(tmp_path), use_cpu=True, report_to="none")
    options = {"processing_class": copy.deepcopy(tokenizer), "formatting_func": lambda row: "2+2=4"}
    trainer = DiffusionSFTTrainer(tiny_model(), settings, train_dataset=[row], **options)
    assert tokenizer.decode(trainer.train_dataset[0]["labels"]) == "2+2=4<|im_end|>"
    settings.completion_only_loss = True
    with pytest.raises(ValueError, match="formatting"):
        DiffusionSFTTrainer(tiny_model(), settings, train_dataset=[row], **options)


@pytest.mark.parametrize("max_canvas", [None, 40])
def test_answers_have_canvases_whatever_ends_them(tmp_path, tokenizer, max_canvas):
    """The tokenizer ends texts with another token than its template ends turns with: the turn's is the answer's end."""
    own, model = with_other_end(tokenizer), tiny_model()
    model.generation_config.eos_token_id = own.eos_token_id
    settings = {"max_canvas": max_canvas, "random_canvas": 0.0, "eos_tail": 8}
    trainer = make(tmp_path, own, model=model, **settings)
    plain = make(tmp_path, tokenizer, **settings)
    ours, theirs = (next(iter(t.get_train_dataloader()))["labels"] for t in (trainer, plain))
    assert ((ours != IGNORE_INDEX) == (theirs != IGNORE_INDEX)).all() and (ours == 2).sum() > 8
    assert set(trainer.model.generation_config.eos_token_id) == {0, 2}  # what `generate` stops at and what is saved


def test_a_tokenizer_is_found_completed_or_refused(tmp_path, tokenizer):
    settings = DiffusionSFTConfig(str(tmp_path), use_cpu=True, report_to="none", model_init_kwargs={"dtype": "float32"})
    own = DiffusionSFTTrainer("tiny", settings, train_dataset=tiny_dataset(2), processing_class=tokenizer)
    assert own.processing_class is tokenizer and tokenizer.mask_token_id == 431
    assert settings.model_init_kwargs == {"dtype": "float32"}  # another trainer may read it
    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL_PATH)
    assert DiffusionSFTTrainer(model, settings, train_dataset=tiny_dataset(2)).processing_class.mask_token_id == 431
    bare = copy.deepcopy(tokenizer)
    bare.mask_token = bare.eos_token = bare.pad_token = None
    model = tiny_model()
    model.generation_config.eos_token_id = None
    trainer = make(tmp_path, bare, model=model)
    assert trainer.processing_class.pad_token == "<|pad|>" and trainer.diffusion_collator.end_token_ids == (2,)
    assert math.isfinite(trainer.train().training_loss)
    with pytest.raises(UserError, match="`eos_token`: '<nope>'"):
        make(tmp_path, tokenizer, eos_token="<nope>")


@pytest.mark.filterwarnings("ignore:`pad_token` is deprecated")
def test_a_padding_token_must_exist(tmp_path, tokenizer):
    with pytest.raises(UserError, match="`pad_token`: '<nope>'"):
        make(tmp_path, tokenizer, pad_token="<nope>")
    assert make(tmp_path, tokenizer, pad_token="<|im_start|>").diffusion_collator.pad_token_id == 1
