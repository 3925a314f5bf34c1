"""What a training step costs beside its arithmetic: waits for the device, compiled models, streams."""

import copy

import pytest
import torch
from datasets import IterableDataset
from torch.utils._python_dispatch import TorchDispatchMode
from training import LORA, make, tiny_model
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from llm_diffusion.attention_masks import additive
from llm_diffusion.tiny import tiny_dataset

# What waits for a GPU: reading a number, and finding out how many elements a mask has.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select"}


class Waits(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masked = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        self.count += name in WAITS or masked
        return func(*args, **(kwargs or {}))


class CountSteps(TrainerCallback):
    def __init__(self, waits):
        self.waits, self.at = waits, []

    def on_step_end(self, *args, **kwargs):
        self.at.append(self.waits.count)


def waits_of_a_step(trainer):
    with Waits() as waits:
        counted = CountSteps(waits)
        trainer.add_callback(counted)
        trainer.train()
    return [after - before for before, after in zip(counted.at, counted.at[1:], strict=False)]


def host(tmp_path, tokenizer):
    arguments = SFTConfig(
        str(tmp_path / "host"),
        max_steps=3,
        per_device_train_batch_size=4,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_steps=10,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    return SFTTrainer(tiny_model(), arguments, train_dataset=tiny_dataset(16), processing_class=copy.deepcopy(tokenizer))


@pytest.mark.parametrize("settings", [{}, {"attention": "block"}, {"packing": True}])
def test_a_step_waits_for_the_device_once_more_than_the_host(tmp_path, tokenizer, settings):
    ours = waits_of_a_step(make(tmp_path, tokenizer, max_steps=3, logging_steps=10, **settings))
    theirs = waits_of_a_step(host(tmp_path, tokenizer))
    print(settings, ours, theirs)
    assert max(ours) <= max(theirs) + 1
