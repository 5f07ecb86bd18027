"""Makes test/fixtures/qwen2 and qwen3: what Hugging Face's own layers give when they are prelude, core and coda.

    pip install torch transformers==4.57.1 safetensors
    python3 test/qwen_fixtures.py test/fixtures

The authors have no model of these families, so transformers' decoder layers, whole, are the reference: embedded tokens go
through some of them, then r times through the adapter and others, then through the rest. Gradients are those of the tensors
that a checkpoint of ours has (q, k and v below each other, gate and up too).
"""
import json
import os
import sys

import torch
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

PRELUDE, CORE, CODA = [0], [2, 3], [4]
B, T, N_WITHOUT, N_WITH, V, D = 2, 20, 1, 2, 113, 48
SIZES = dict(vocab_size=V, hidden_size=D, intermediate_size=80, num_hidden_layers=5, num_attention_heads=6,
             num_key_value_heads=2, max_position_embeddings=128, rope_theta=1000000.0, rms_norm_eps=1e-6,
             use_sliding_window=False, bos_token_id=1, eos_token_id=2, attn_implementation="eager")


def randomise(model, generator):
    """Weights that make every term matter: norms away from 1, biases away from 0."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in name:
                p.copy_(1 + 0.3 * noise)
            elif "bias" in name:
                p.copy_(0.3 * noise)
            else:
                p.copy_(noise * (0.5 if "embed" in name else 1.2 / p.shape[-1] ** 0.5))


def through(model, layers, x):
    positions = torch.arange(x.shape[1])[None]
    turns = model.model.rotary_emb(x, positions)
    mask = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)[None, None]
    for i in layers:
        x = model.model.layers[i](x, attention_mask=mask, position_ids=positions, position_embeddings=turns)
        x = x[0] if isinstance(x, tuple) else x
    return x


def forward(model, head, adapter, tokens, state, n, k):
    e = through(model, PRELUDE, model.model.embed_tokens(tokens))
    for i in range(n + k):
        y = torch.cat([state, e], dim=-1) @ adapter.T
        state = through(model, CORE, y)
        if i < n:  # what ran without gradient is a constant
            state = state.detach()
    return state, model.model.norm(through(model, CODA, state)) @ head.T


def ours(model, head, adapter, what):
    """Our names, of the tensors or of their gradients."""
    out = {"transformer.wte.weight": what(model.model.embed_tokens.weight), "lm_head.weight": what(head),
           "transformer.adapter.weight": what(adapter), "transformer.ln_f.weight": what(model.model.norm.weight)}
    for part, layers in ("prelude", PRELUDE), ("core_block", CORE), ("coda", CODA):
        for i, number in enumerate(layers):
            layer, at = model.model.layers[number], f"transformer.{part}.{i}."
            a, m = layer.self_attn, layer.mlp
            out[at + "norm_1.weight"] = what(layer.input_layernorm.weight)
            out[at + "norm_2.weight"] = what(layer.post_attention_layernorm.weight)
            out[at + "attn.Wqkv.weight"] = torch.cat([what(x.weight) for x in (a.q_proj, a.k_proj, a.v_proj)])
            if a.q_proj.bias is not None:
                out[at + "attn.Wqkv.bias"] = torch.cat([what(x.bias) for x in (a.q_proj, a.k_proj, a.v_proj)])
            if hasattr(a, "q_norm"):
                out[at + "attn.q_norm.weight"] = what(a.q_norm.weight)
                out[at + "attn.k_norm.weight"] = what(a.k_norm.weight)
            out[at + "attn.proj.weight"] = what(a.o_proj.weight)
            out[at + "mlp.fc.weight"] = torch.cat([what(m.gate_proj.weight), what(m.up_proj.weight)])
            out[at + "mlp.proj.weight"] = what(m.down_proj.weight)
    return {name: x.detach().contiguous().clone() for name, x in out.items()}


def make(directory, model, extra):
    generator = torch.Generator().manual_seed(7)
    randomise(model, generator)
    base, recurrent = os.path.join(directory, "base"), os.path.join(directory, "recurrent")
    model.save_pretrained(base)
    os.remove(os.path.join(base, "generation_config.json"))
    os.makedirs(recurrent, exist_ok=True)
    tied = model.config.tie_word_embeddings
    head = (model.lm_head.weight.detach().clone() if tied else model.lm_head.weight).requires_grad_()
    adapter = torch.randn(D, 2 * D, generator=generator) / (2 * D) ** 0.5
    adapter.requires_grad_()
    save_file(ours(model, head, adapter, lambda x: x), os.path.join(recurrent, "model.safetensors"), {"format": "pt"})
    config = {"model_type": "huginn_raven", "n_embd": D, "n_heads": 6, "num_key_value_heads": 2, "intermediate_size": 80,
              "padded_vocab_size": V, "vocab_size": V, "max_position_embeddings": 128, "n_layers_in_prelude": len(PRELUDE),
              "n_layers_in_recurrent_block": len(CORE), "n_layers_in_coda": len(CODA), "mean_recurrence": 8,
              "mean_backprop_depth": 4, "norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": False,
              "init_values": {"std": 0.008703882797784892, "embed_scale": 1.0}, **extra}
    with open(os.path.join(recurrent, "config.json"), "w") as file:
        json.dump(config, file, indent=2)

    tokens = torch.randint(V, (B, T), generator=generator)
    labels = torch.randint(V, (B, T), generator=generator)
    labels[0, 3] = labels[1, T - 1] = -100
    state = torch.randn(B, T, D, generator=generator) * 0.5
    out = {"tokens": tokens.int(), "labels": labels.int(), "s0": state, "base.logits": model(tokens).logits.detach()}
    latents, logits = forward(model, head, adapter, tokens, state, N_WITHOUT, N_WITH)
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, V), labels.reshape(-1), ignore_index=-100)
    loss.backward()
    run = f"n{N_WITHOUT}k{N_WITH}"
    out.update({f"{run}.loss": loss.detach().reshape(1), f"{run}.logits": logits.detach(), f"{run}.latents": latents.detach()})
    for name, gradient in ours(model, head, adapter, lambda x: x.grad).items():
        out[f"{run}.grad.{name}"] = gradient
    with torch.no_grad():
        for r in 1, 2, 4, 8:
            out[f"zero.r{r}.logits"] = forward(model, head, adapter, tokens[:1], 0 * state[:1], r, 0)[1]
    save_file(out, os.path.join(directory, "forward_backward.safetensors"), {"format": "pt"})


def main():
    where = sys.argv[1]
    torch.set_num_threads(1)
    qwen2 = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True, sliding_window=4096, max_window_layers=3))
    make(os.path.join(where, "qwen2"), qwen2, {"qkv_bias": True, "qk_norm": None, "block_norm": "pre"})
    qwen3 = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=False))
    make(os.path.join(where, "qwen3"), qwen3, {"qkv_bias": False, "qk_norm": "head", "block_norm": "pre"})


main()
