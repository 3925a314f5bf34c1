"""What a training step costs beside its arithmetic: waits for the device, compiled models, streams."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training import make, tiny_model
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

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
    return SFTTrainer(
        tiny_model(), arguments, train_dataset=tiny_dataset(16), processing_class=copy.deepcopy(tokenizer)
    )


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of the host's own config
@pytest.mark.parametrize("settings", [{}, {"attention": "block"}, {"packing": True}])
def test_a_step_waits_for_the_device_once_more_than_the_host(tmp_path, tokenizer, settings):
    ours = waits_of_a_step(make(tmp_path, tokenizer, max_steps=3, logging_steps=10, **settings))
    theirs = waits_of_a_step(host(tmp_path, tokenizer))
    assert max(ours) <= max(theirs) + 1


def test_a_stream_trains_and_goes_on_to_the_digit(tmp_path, tokenizer):
    """An `IterableDataset`, which has no length and is read again up to where it was."""

    def losses(trainer):
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]

    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    runs = [
        make(tmp_path, tokenizer, dataset=tiny_dataset(64).to_iterable_dataset(), shuffle_dataset=False, **settings)
        for _ in range(2)
    ]
    runs[0].train()
    runs[1].train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(runs[0])[2:] == losses(runs[1])[-2:] and len(losses(runs[0])) == 4
