"""The Llama that the benchmarks run, its inputs, and the work that it cannot do without."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import create_causal_mask

if TYPE_CHECKING:
    from suite.registry import Size


def config(size: Size, implementation: str, layers: int) -> LlamaConfig:
    """Return the configuration of a Llama with one of transformers' attention implementations."""
    return LlamaConfig(
        vocab_size=size["vocabulary"],
        hidden_size=size["hidden"],
        intermediate_size=size["mlp"],
        num_hidden_layers=layers,
        num_attention_heads=size["heads"],
        num_key_value_heads=size["kv_heads"],
        max_position_embeddings=4096,
        use_cache=False,
        attn_implementation=implementation,  # type: ignore[call-arg]  # taken by the base class
    )


class Logits(torch.nn.Module):
    """A Llama that maps token ids to logits; equal sizes get equal weights."""

    def __init__(self, size: Size, implementation: str, layers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(config(size, implementation, layers))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        logits: torch.Tensor = self.model(input_ids=ids).logits
        return logits


class Attention(torch.nn.Module):
    """The attention of one Llama layer, with the mask and the rotary embedding that the model gives it."""

    def __init__(self, size: Size, implementation: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        base = LlamaForCausalLM(config(size, implementation, 1)).model
        self.config = base.config
        self.rotary = base.rotary_emb
        self.attention = base.layers[0].self_attn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output [B, N, hidden]."""
        positions = torch.arange(x.shape[1], device=x.device)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=None,
            past_key_values=None,
            position_ids=positions,
        )
        out: torch.Tensor = self.attention(x, self.rotary(x, position_ids=positions), mask)[0]
        return out


def token_ids(size: Size) -> torch.Tensor:
    """Return the same random tokens every time, [1, N]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, size["vocabulary"], (1, size["length"]), generator=generator)


def hidden_states(size: Size) -> torch.Tensor:
    """Return the same random layer input every time, [1, N, hidden]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, size["length"], size["hidden"], generator=generator)


def flops(module: torch.nn.Module, size: Size, layers: int) -> dict[str, float]:
    """Return what a forward pass has to multiply: the linear layers, and the visible half of each attention.

    A backward pass has to do twice as much again.
    """
    tokens, width = size["length"], size["hidden"]
    weights = sum(m.weight.numel() for m in module.modules() if isinstance(m, torch.nn.Linear))
    pairs = tokens * (tokens + 1) / 2
    return {"linear": 2.0 * tokens * weights, "attention": layers * 4.0 * pairs * width}


def outputs(module: torch.nn.Module, compiled: Any, x: torch.Tensor) -> torch.Tensor:
    """Return output and every gradient in one vector: what two providers have to agree on."""
    module.zero_grad(set_to_none=True)
    out = compiled(x)
    train(out)
    found = [out.detach(), *(p.grad for p in module.parameters() if p.grad is not None)]
    module.zero_grad(set_to_none=True)
    return torch.cat([t.flatten().float() for t in found])


def train(out: torch.Tensor) -> None:
    """Run the backward pass of a plain loss."""
    out.float().square().mean().backward()  # type: ignore[no-untyped-call]  # torch has no types for it
