"""Convert a GPT-2 to SSA, train it with groups of parameters of their own, and undo the conversion.

The new parameters are ordinary parameters of the layers that attend: ``transformer.h.0.attn.ssa.q_gate`` and
so on. They start at zero, where the model computes what it did before, and take larger steps than the rest.
"""

import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import attnrewrite


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=48,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config)


def repeated_sequences(batch: int, length: int) -> torch.Tensor:
    """Make token ids whose second half repeats the first: only attention can predict it."""
    half = torch.randint(48, (batch, length // 2))
    return torch.cat([half, half], dim=1)


def parameter_groups(model: torch.nn.Module) -> list[dict[str, object]]:
    """Sort the parameters into base weights, gates, and gains, which are single numbers and do not decay."""
    groups: dict[str, list[torch.nn.Parameter]] = {"base": [], "gate": [], "gain": []}
    for name, parameter in model.named_parameters():
        kind = name.rsplit("_", 1)[-1] if ".ssa." in name else "base"
        groups[kind].append(parameter)
    return [
        {"params": groups["base"], "lr": 3e-3, "weight_decay": 0.01},
        {"params": groups["gate"], "lr": 3e-2, "weight_decay": 0.01},
        {"params": groups["gain"], "lr": 3e-2, "weight_decay": 0.0},
    ]


def main() -> None:
    model = tiny_gpt2().eval()
    ids = repeated_sequences(8, 32)
    with torch.no_grad():
        before = model(ids, use_cache=False).logits

    attnrewrite.convert(model, attnrewrite.SSAConfig(), example_inputs=(ids,), example_kwargs={"use_cache": False})
    with torch.no_grad():
        converted = model(ids, use_cache=False).logits
    print(f"logits before and after conversion differ by {float((converted - before).abs().max()):.1e}")
    if not torch.allclose(converted, before, atol=1e-5):
        raise SystemExit("the converted model does not start as the same function")

    added = {name: parameter for name, parameter in model.named_parameters() if ".ssa." in name}
    for name, parameter in added.items():
        print(f"  {name} {list(parameter.shape)}")

    model.train()
    optimizer = torch.optim.AdamW(parameter_groups(model))
    losses: list[float] = []
    for step in range(30):
        logits = model(ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 10 == 9:
            print(f"step {step + 1:2}: loss {losses[-1]:.3f}")
    if losses[-1] > 0.8 * losses[0]:
        raise SystemExit(f"the loss did not fall: {losses[0]:.3f} to {losses[-1]:.3f}")
    still = [name for name, parameter in added.items() if not bool(parameter.any())]
    if still:
        raise SystemExit(f"not trained: {', '.join(still)}")

    attnrewrite.restore(model)
    if any(".ssa." in name for name in model.state_dict()):
        raise SystemExit("restore left parameters behind")
    print("restored: the model has no new parameters")


if __name__ == "__main__":
    main()
