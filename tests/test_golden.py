"""Losses and tokens on fixed seeds, stored: a change of structure must not move them. `python tests/test_golden.py` stores them anew.

Every objective trains 20 steps of a small random model; every decoder answers the same prompts with the embedded one.
"""

import copy
import json
import tempfile
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_trainers import LORA, make, tiny_model
from transformers import AutoTokenizer

import llm_diffusion as ld
from llm_diffusion.data.tiny import tiny_dataset, tiny_examples
from llm_diffusion.models.checkpoints import TINY_MODEL_PATH

FILE = Path(__file__).parent / "golden.json"
STEPS = 20

OBJECTIVES = {
    "sft": {},
    "pretrain": {"completion_only_loss": False, "noise_schedule": "cosine"},
    "exact_count": {"exact_mask_count": True, "normalization": "sequence"},
    "complementary": {"complementary_masks": True, "loss_weight": "clipped", "max_steps": 5},
    "replacement": {"random_replacement": 0.1, "loss_weight": "cart", "normalization": "masked"},
    "mask_range": {"min_mask_probability": 0.1, "max_mask_probability": 0.9, "normalization": "length"},
    "unshifted_time": {"right_shift_logits": False, "time_embedding": True},
    "anneal_soft": {"annealing": "soft", "annealing_steps": 12, "loss_weight": "uniform"},
    "anneal_stochastic": {"annealing": "stochastic", "annealing_schedule": "linear", "max_steps": 8},
    "anneal_blocks": {"annealing": "block", "max_length": 64, "max_steps": 8},
    "packed": {"packing": True, "max_length": 96},
    "canvas": {
        "max_canvas": 32,
        "pad_mask_ratio": 0.5,
        "pad_annealing_steps": 10,
        "first_step_share": 0.3,
        "tail": "pad",
    },
    "distilled": {"distillation_weight": 0.5, "distillation_hidden_weight": 0.1, "max_steps": 10},
    "on_policy": {"distillation_weight": 0.5, "distillation_targets": "all", "on_policy_share": 0.5, "max_steps": 6},
    "block": {"attention": "block", "ar_loss_weight": 0.5},
    "block_clean": {"attention": "block", "clean_context": "block", "block_length": 8, "time_embedding": True},
    "block_distilled": {"attention": "block", "distillation_weight": 0.5, "annealing": "block", "max_steps": 10},
    "lossless": {"attention": "lossless", "distillation_weight": 1.0},
    "lossless_labels": {"attention": "lossless", "block_length": 4, "max_steps": 10},
}
PREFERENCES = {
    "dpo": {"num_draws": 2},
    "dpo_block": {"attention": "block", "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2], "num_draws": 1},
    "dpo_trajectory": {"score": "trajectory", "initial_diffusion_steps": 3, "max_steps": 5},
}
DECODERS = {
    "one_a_step": {},
    "steps": {"steps": 8},
    "grown_blocks": {"block_length": 8, "grow_canvas": True, "threshold": 0.6},
    "factor": {"factor": 1.0},
    "entropy_bound": {"entropy_bound": 0.5, "remasking": "entropy"},
    "margin": {"steps": 6, "remasking": "margin", "block_length": 12},
    "random_order": {"steps": 6, "remasking": "random", "seed": 3},
    "left_to_right": {"remasking": "left_to_right"},
    "sampled": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "steps": 12, "seed": 5},
    "ordered_by_chance": {"alg_temp": 0.5, "steps": 8},
    "guided": {"guidance_scale": 1.5, "steps": 8},
    "penalised": {"repetition_penalty": 1.3, "bad_words_ids": [[17, 18]], "suppress_tokens": [20], "steps": 8},
    "p2": {"revision": "p2", "steps": 12},
    "remdm": {"revision": "remdm-conf", "remasking": "random", "eta": 0.2, "steps": 12},
    "remdm_loop": {"revision": "remdm-loop", "remasking": "random", "eta": 0.1, "steps": 12},
    "edited": {"editing_threshold": 0.5, "threshold": 0.5},
    "prefix_cache": {"approximate_cache": "prefix", "block_length": 8, "steps": 12},
    "dual_cache": {"approximate_cache": "dual", "block_length": 8, "cache_refresh_steps": 2},
    "sized": {"length_quantile": 0.9, "initial_length": 8, "length_margin": 2},
}
BLOCK_DECODERS = {
    "block": {},
    "block_threshold": {"threshold": 0.7},
    "block_uncached": {"threshold": 0.7, "use_cache": False},
    "block_sampled": {"temperature": 1.0, "steps": 12, "seed": 2},
    "block_guided": {"guidance_scale": 1.5, "factor": 1.0},
    "block_edited": {"editing_threshold": 0.5, "threshold": 0.5},
}
LOSSLESS_DECODERS = {
    "lossless": {},
    "lossless_two_passes": {"draft_outcomes": 0},
    "lossless_sampled": {"temperature": 0.8, "top_p": 0.95, "seed": 4, "draft_outcomes": 3},
}


def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_MODEL_PATH)


def preference_rows(n):
    """Answers beside themselves with the words in the other order."""
    rows = []
    for example in tiny_examples(0, kinds=("sort", "arithmetic")):
        question, answer = example["messages"]
        wrong = " ".join(reversed(answer["content"].split())) + "."
        rows.append({"prompt": [question], "chosen": [answer], "rejected": [{**answer, "content": wrong}]})
        if len(rows) == n:
            return rows


def losses(trainer):
    trainer.train()
    history = [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "grad_norm" in log]
    return [[round(float(value), 9) for value in pair] for pair in history]


def train(name, folder):
    if name in PREFERENCES:
        settings = {"max_steps": 10, **PREFERENCES[name]}
        arguments = {"per_device_train_batch_size": 2, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
        arguments |= {"disable_tqdm": True, "logging_steps": 1, "gradient_checkpointing": False, "learning_rate": 1e-3}
        from datasets import Dataset

        return losses(
            ld.DiffusionDPOTrainer(
                tiny_model(),
                args=ld.DiffusionDPOConfig(str(folder), **arguments, **settings),
                train_dataset=Dataset.from_list(preference_rows(16)),
                processing_class=tokenizer(),
                peft_config=LORA,
            )
        )
    settings = {"max_steps": STEPS, "learning_rate": 1e-3, **OBJECTIVES[name]}
    peft_config = LORA if "distill" in name or name in ("on_policy", "lossless_labels", "lossless") else None
    dataset = tiny_dataset(48)
    return losses(make(folder, tokenizer(), tiny_model(tied="block" in name), peft_config, dataset, **settings))


def drafter():
    model, names = ld.load_diffusion_model("tiny", attention="lossless", device="cpu")
    torch.manual_seed(0)
    model = get_peft_model(
        model, LoraConfig(r=4, target_modules="all-linear", trainable_token_indices=[names.mask_token_id])
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    return model.eval(), names


MODELS = {
    "bidirectional": lambda: ld.load_diffusion_model("tiny", device="cpu"),
    "block": lambda: ld.load_diffusion_model("tiny", attention="block", device="cpu"),
    "lossless": drafter,
}


def decode(model, names, settings):
    prompts = [
        names.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False)
        for text in ("Sort the letters: k d e a", "3+4=", "Fill the gap: _ 31 34 37")
    ]
    batch = names.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    settings = {"max_new_tokens": 24, "return_dict_in_generate": True, **settings}
    output = model.generate(**batch, **copy.deepcopy(settings))
    found = {"tokens": output.sequences[:, batch["input_ids"].shape[1] :].tolist(), "nfe": output.nfe.tolist()}
    return found if output.accepted is None else {**found, "accepted": output.accepted.tolist()}


@pytest.fixture(scope="module")
def golden():
    return json.loads(FILE.read_text())


@pytest.fixture(scope="module")
def models():
    return {name: build() for name, build in MODELS.items()}


@pytest.mark.parametrize("name", [*OBJECTIVES, *PREFERENCES])
def test_losses_and_gradients_of_training(name, golden, tmp_path):
    found = train(name, tmp_path)
    # Rounding differs between processors; a change of what is computed is far larger.
    torch.testing.assert_close(torch.tensor(found), torch.tensor(golden[name]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("mode", "name", "settings"),
    [("bidirectional", *case) for case in DECODERS.items()]
    + [("block", *case) for case in BLOCK_DECODERS.items()]
    + [("lossless", *case) for case in LOSSLESS_DECODERS.items()],
)
def test_tokens_of_decoding(mode, name, settings, golden, models):
    found, stored = decode(*models[mode], settings), golden[f"decode_{name}"]
    if mode == "lossless" and "temperature" not in settings:  # greedy drafts follow from what the machine does fast
        for row, accepted in zip(found["tokens"], found["accepted"], strict=True):
            through_end = row.index(2) + 1 if 2 in row else len(row)
            assert sum(n for n in accepted if n > 0) == through_end
        found, stored = found["tokens"], stored["tokens"]
    assert found == stored


def store():
    stored = {}
    for name in [*OBJECTIVES, *PREFERENCES]:
        with tempfile.TemporaryDirectory() as folder:
            stored[name] = train(name, Path(folder))
    decoders = {"bidirectional": DECODERS, "block": BLOCK_DECODERS, "lossless": LOSSLESS_DECODERS}
    for mode, build in MODELS.items():
        for name, settings in decoders[mode].items():
            stored[f"decode_{name}"] = decode(*build(), settings)
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in stored.items())
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    store()
