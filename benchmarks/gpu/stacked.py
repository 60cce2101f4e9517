"""S models of GPT-NeoX as one: every parameter has a leading axis, every matrix product is batched,
and attention takes S · B sequences.

S models, B sequences of each, T tokens, d hidden size, V vocabulary.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb

from doremi_train.model.language_model import LanguageModel
from doremi_train.model.optim import OptimizerOptions


class Stacked:
    """Copies of models of one config, with tied embeddings and sequential blocks, as presets have
    them."""

    def __init__(self, models: Sequence[LanguageModel]) -> None:
        inner = [model.inner for model in models]
        config = self.config = inner[0].config
        assert config.tie_word_embeddings and not config.use_parallel_residual, config
        assert config.hidden_act == "gelu", config.hidden_act
        self.parameters: dict[str, Tensor] = torch.func.stack_module_state(inner)[0]  # (S, …) each
        self._rotary = inner[0].gpt_neox.rotary_emb
        self._precision = models[0].precision

    def losses(self, tokens: Tensor) -> Tensor:
        """(S, B, T) nats of tokens[..., 1:] given tokens[..., :-1]; tokens (S, B, T + 1), those of
        a model in its row."""
        bf16 = self._precision == "bf16"
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bf16):
            inputs, targets = tokens[..., :-1], tokens[..., 1:]
            logits = torch.bmm(self._hidden(inputs), self._embedding().transpose(1, 2))
            flat = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            return flat.float().view(targets.shape)

    def _embedding(self) -> Tensor:
        """(S, V, d)."""
        return self.parameters["gpt_neox.embed_in.weight"]

    def _hidden(self, inputs: Tensor) -> Tensor:
        """(S, B · T, d) of inputs (S, B, T)."""
        models, length = len(inputs), inputs.shape[-1]
        first = torch.arange(models, device=inputs.device)[:, None, None] * self.config.vocab_size
        x = F.embedding(inputs + first, self._embedding().flatten(0, 1)).flatten(1, 2)
        turns = self._rotary(x, torch.arange(length, device=x.device)[None])
        for number in range(self.config.num_hidden_layers):
            layer = f"gpt_neox.layers.{number}"
            x = x + self._attention(layer, self._norm(f"{layer}.input_layernorm", x), turns, length)
            wide = self._linear(
                f"{layer}.mlp.dense_h_to_4h", self._norm(f"{layer}.post_attention_layernorm", x)
            )
            x = x + self._linear(f"{layer}.mlp.dense_4h_to_h", F.gelu(wide))
        return self._norm("gpt_neox.final_layer_norm", x)

    def _attention(
        self, layer: str, x: Tensor, turns: tuple[Tensor, Tensor], length: int
    ) -> Tensor:
        together = self._linear(f"{layer}.attention.query_key_value", x)
        shape = (-1, length, self.config.num_attention_heads, together.shape[-1])
        width = together.shape[-1] // self.config.num_attention_heads
        # (S · B, heads, T, width of a head) each
        query, key, value = together.view(*shape[:3], width).transpose(1, 2).chunk(3, -1)
        query, key = apply_rotary_pos_emb(query, key, *turns)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self._linear(f"{layer}.attention.dense", attended.transpose(1, 2).reshape(x.shape))

    def _linear(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.parameters[f"{name}.weight"], self.parameters[f"{name}.bias"]
        return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.parameters[f"{name}.weight"], self.parameters[f"{name}.bias"]
        normed = F.layer_norm(x, x.shape[-1:], eps=self.config.layer_norm_eps)
        return normed * weight[:, None] + bias[:, None]

    def optimizer(self, options: OptimizerOptions) -> torch.optim.Optimizer:
        """As `optim.build` makes one for a single model: decay on matrices alone."""
        every = list(self.parameters.values())
        groups = [
            {"params": [p for p in every if p.ndim > 2], "weight_decay": options.weight_decay},
            {"params": [p for p in every if p.ndim <= 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            groups, lr=options.learning_rate, betas=options.adam_betas, eps=options.adam_epsilon,
            fused=True,
        )  # fmt: skip

    @torch.no_grad()
    def clip(self, largest: float) -> None:
        """Clip the gradient of every model by its own norm."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)  # (S,)
        scale = (largest / (norms + 1e-6)).clamp_max(1.0)
        for gradient in gradients:
            gradient.mul_(scale.view(-1, *[1] * (gradient.ndim - 1)))
