"""What a training run shows: one line of figures a logging step, and a picture of the loss."""

from PIL import Image
from transformers import TrainerState

from llm_diffusion.training.stages import LogLinesCallback, plot_loss


def lines(*logs, first=True):
    written = []
    callback = LogLinesCallback(written.append, "sft")
    callback.on_train_begin()
    state = TrainerState(global_step=5, max_steps=10, is_world_process_zero=first)
    for entry in logs:
        callback.on_log(None, state, None, entry)
    return written


def test_a_line_has_the_figures_that_are_there():
    (line,) = lines({"nelbo": 1.25, "masked_accuracy": 0.5, "learning_rate": 1e-3, "grad_norm": 7})
    assert line.startswith("sft  step 5/10  nats/token 1.25  accuracy 0.5  lr 0.001  ") and "left" in line


def test_a_drafters_loss_stands_where_a_bound_would():
    assert "held-out nats/token 2 " in lines({"eval_masked_nll": 2.0})[0]


def test_the_end_and_other_processes_write_nothing():
    assert lines({"train_runtime": 3.0}, {}, None) == lines({"nelbo": 1.0}, first=False) == []


def test_the_picture_takes_phases_with_and_without_figures(tmp_path):
    histories = {
        "pretrain": [{"step": 1, "nelbo": 3.0}, {"step": 2, "eval_nelbo": 2.5}],
        "draft": [{"step": 1, "masked_nll": 2.0}, {"step": 1, "eval_accepted_length": 1.5}],
        "dpo": [{"step": 1, "loss": 0.7}],
    }
    for name, shown in (("all", histories), ("none", {})):
        plot_loss(shown, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    # Two pictures side by side are wider than one.
    assert Image.open(tmp_path / "all.png").width > 1.5 * Image.open(tmp_path / "none.png").width
