"""What a training step costs beside its arithmetic: waits for the device, compiled models, streams."""

import copy

import pytest
import torch
from small_trainers import LORA, make, tiny_model
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from llm_diffusion import load_diffusion_model
from llm_diffusion.data.tiny import tiny_dataset

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


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.filterwarnings("ignore:`torch.jit.*:DeprecationWarning")  # torch's own compiler imports it
@pytest.mark.filterwarnings("ignore:.*SwigPy.*:DeprecationWarning")
@pytest.mark.slow  # the compiler
def test_a_compiled_model_trains_to_the_same_losses(tmp_path, tokenizer):
    """And is compiled for the first lengths alone: afterwards they are symbols."""
    settings = {"attention": "block", "max_steps": 4, "learning_rate": 1e-3}
    plain = make(tmp_path / "plain", tokenizer, **settings)
    plain.train()
    torch._dynamo.reset()
    counters.clear()
    compiled = make(tmp_path / "compiled", tokenizer, **settings, torch_compile=True, torch_compile_backend="eager")
    compiled.train()
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
    assert 0 < counters["stats"]["unique_graphs"] <= 12


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit", "adafactor"])
def test_small_optimisers_train_as_adamw_does(tmp_path, optim):
    def run(**settings):
        model, words = load_diffusion_model("tiny", device="cpu")  # 8 bits are for matrices of 4,096 numbers and more
        trainer = make(tmp_path, words, model, max_steps=4, learning_rate=2e-4, **settings)
        trainer.train()
        return trainer

    reference, small = run(), run(optim=optim)
    assert losses(small) == pytest.approx(losses(reference), rel=0.1)
    assert losses(small) != losses(reference)
    moments = {v.dtype for state in small.optimizer.state.values() for v in state.values() if torch.is_tensor(v)}
    assert (torch.uint8 in moments) == ("8bit" in optim)


def test_adapters_on_an_int8_base_train_as_on_the_whole_one(tmp_path, tokenizer):
    def run(quantization):
        model, words = load_diffusion_model("tiny", device="cpu", quantization=quantization)
        trainer = make(tmp_path / str(quantization), words, model, LORA, max_steps=6, learning_rate=5e-3)
        trainer.train()
        return losses(trainer)

    assert run("int8") == pytest.approx(run(None), rel=0.03)


def test_a_stream_trains_and_goes_on_to_the_digit(tmp_path, tokenizer):
    """An `IterableDataset`, which has no length and is read again up to where it was."""

    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    runs = [
        make(tmp_path, tokenizer, dataset=tiny_dataset(64).to_iterable_dataset(), shuffle_dataset=False, **settings)
        for _ in range(2)
    ]
    runs[0].train()
    runs[1].train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(runs[0])[2:] == losses(runs[1])[-2:] and len(losses(runs[0])) == 4
