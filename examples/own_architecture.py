"""An architecture that transformers does not know: registered as transformers wants it, it converts like any other.

    python examples/own_architecture.py

Nothing here is about diffusion until `load_diffusion_model`, which asks the model by changing its input who attends to whom, makes it
bidirectional (here by `config.is_causal`, which transformers' `create_causal_mask` reads), and asks again.
"""

import torch
import transformers
from torch.nn import functional
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutput

import llm_diffusion as ld
from llm_diffusion.data.tiny import tiny_dataset
from llm_diffusion.models.checkpoints import TINY_MODEL_PATH

TOKENIZER = str(TINY_MODEL_PATH)  # of your model
OUTPUT = "output/own"
STEPS, N_CHATS = 200, 2000


class OwnConfig(transformers.PreTrainedConfig):
    model_type = "own"
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads, max_position_embeddings = 512, 64, 2, 4, 256


class OwnLayer(torch.nn.Module):
    def __init__(self, config: OwnConfig) -> None:
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.norm, self.qkv = torch.nn.LayerNorm(width), torch.nn.Linear(width, 3 * width)
        self.up, self.down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None, is_causal: bool) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, dim=-1))
        x = x + functional.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal).transpose(1, 2).flatten(-2)
        return x + self.down(functional.gelu(self.up(x)))


class OwnForCausalLM(transformers.PreTrainedModel, transformers.GenerationMixin):
    config_class = OwnConfig
    _supports_sdpa = True

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.embed_tokens = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = torch.nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = torch.nn.ModuleList(OwnLayer(config) for _ in range(config.num_hidden_layers))
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, position_ids=None, **kwargs):
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        mask = create_causal_mask(self.config, x, attention_mask, past_key_values=None)
        x = x + self.positions(torch.arange(x.shape[1], device=x.device) if position_ids is None else position_ids)
        for layer in self.layers:
            x = layer(x, mask, mask is None and getattr(self.config, "is_causal", True))
        return CausalLMOutput(logits=self.lm_head(x))


def main() -> None:
    transformers.AutoConfig.register("own", OwnConfig)
    transformers.AutoModelForCausalLM.register(OwnConfig, OwnForCausalLM)
    OwnForCausalLM(OwnConfig()).save_pretrained(f"{OUTPUT}/base")
    transformers.AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(f"{OUTPUT}/base")

    model, tokenizer = ld.load_diffusion_model(f"{OUTPUT}/base")
    print("attention:", ld.probe_attention(model))
    settings = ld.DiffusionSFTConfig(
        OUTPUT, max_steps=STEPS, max_length=128, gradient_checkpointing=False, logging_steps=20, report_to="none"
    )
    trainer = ld.DiffusionSFTTrainer(model, settings, train_dataset=tiny_dataset(N_CHATS), processing_class=tokenizer)
    trainer.train()


if __name__ == "__main__":
    main()
