"""The recurrent model of retrofit.h in PyTorch, for Hugging Face's transformers 4.46 to 5.x.

`convert --hf-code modeling_retrofit.py` puts this file beside a checkpoint, whose config.json then
names it, and train carries it along. From there on

    model = AutoModelForCausalLM.from_pretrained(DIRECTORY, trust_remote_code=True)
    model.generate(**tokenizer("The capital of France is", return_tensors="pt"), num_steps=8)

and whatever else loads models by the Auto classes works, lm-evaluation-harness among them.

It is also the method once more, short and slow. B rows of T tokens, width d, H query heads and G
key/value heads of h numbers, P blocks of prelude, C of core, D of coda, r recurrences:

    e      = prelude(wte[tokens])
    s_0    = 0, or normal, what lies beyond three standard deviations drawn again
    s_i    = core(A·concat(s_{i-1}, e))      i = 1 … r
    logits = lm_head·RMSNorm(coda(s_r))
"""
import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

# Where a config says how RoPE is scaled: transformers 5 has rope_theta in there too.
ROPE = "rope_parameters" if hasattr(PretrainedConfig, "rope_scaling") else "rope_scaling"


class RavenConfig(PretrainedConfig):
    """config.json by the authors' names; keys that are not used here are kept. Three say how a
    block differs from a Llama's: block_norm "post", qk_norm "full" or "head", qkv_bias."""

    model_type = "huginn_raven"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "n_embd",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "vocab_size": "padded_vocab_size",
    }

    def __init__(
        self,
        n_embd=2048,
        n_heads=32,
        num_key_value_heads=None,
        intermediate_size=5632,
        vocab_size=32000,
        padded_vocab_size=None,
        max_position_embeddings=2048,
        n_layers_in_prelude=4,
        n_layers_in_recurrent_block=8,
        n_layers_in_coda=4,
        mean_recurrence=8,
        mean_backprop_depth=8,
        norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=None,
        rope_parameters=None,
        block_norm=None,
        qk_norm=None,
        qkv_bias=False,
        trained_state_init="normal",
        init_values=None,
        tie_word_embeddings=False,
        **other_keys,
    ):
        self.n_embd = n_embd
        self.n_heads = n_heads
        self.num_key_value_heads = num_key_value_heads or n_heads
        self.head_dim = n_embd // n_heads
        self.intermediate_size = intermediate_size
        self.padded_vocab_size = padded_vocab_size or vocab_size
        self.max_position_embeddings = max_position_embeddings
        self.n_layers_in_prelude = n_layers_in_prelude
        self.n_layers_in_recurrent_block = n_layers_in_recurrent_block
        self.n_layers_in_coda = n_layers_in_coda
        self.n_layers = n_layers_in_prelude + n_layers_in_recurrent_block + n_layers_in_coda
        self.mean_recurrence = mean_recurrence
        self.mean_backprop_depth = mean_backprop_depth
        self.norm_eps = norm_eps
        rope = dict(rope_scaling or rope_parameters or {})
        self.rope_theta = rope.get("rope_theta", rope_theta)
        setattr(self, ROPE, rope or None)
        self.block_norm = block_norm
        self.qk_norm = qk_norm
        self.qkv_bias = qkv_bias
        self.trained_state_init = trained_state_init
        self.init_values = init_values or {"std": math.sqrt(2 / (5 * 5280)), "embed_scale": 1.0}
        for key in ("n_layers", "head_dim"):  # follow from the others
            other_keys.pop(key, None)
        if tie_word_embeddings:
            raise ValueError("tie_word_embeddings is true: a recurrent model has its own head")
        super().__init__(tie_word_embeddings=False, **other_keys)


def rope_frequencies(config, device):
    """θ^(-2i/h) for each pair of a head's dimensions, rescaled as config.json says: all of them
    divided by the factor (linear), or, by Llama 3's rule, only the slow ones, whose wavelength is
    more than original/low positions, with a smooth transition up to those of original/high."""
    pairs = torch.arange(0, config.head_dim, 2, device=device).float()
    frequencies = config.rope_theta ** (-pairs / config.head_dim)
    scaling = getattr(config, ROPE) or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "linear":
        return frequencies / scaling["factor"]
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / scaling["factor"])
    if kind != "default":
        raise ValueError(f"rope_scaling is of type {kind}: only default, linear and llama3 exist")
    return frequencies


def rotate(x, cos, sin):
    """RoPE. Dimensions i and i + h/2 of a head are a pair. x is (B,heads,T,h)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return wide.to(x.dtype) * self.weight


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        d, h = config.n_embd, config.head_dim
        self.heads, self.kv_heads, self.head_dim = config.n_heads, config.num_key_value_heads, h
        self.qk_norm = None if config.qk_norm == "none" else config.qk_norm
        rows = (self.heads + 2 * self.kv_heads) * h  # q, then k, then v
        self.Wqkv = nn.Linear(d, rows, bias=config.qkv_bias)
        self.proj = nn.Linear(self.heads * h, d, bias=False)
        if self.qk_norm not in (None, "full", "head"):
            raise ValueError(f"qk_norm is {self.qk_norm}: only full and head are supported")
        if self.qk_norm:  # over all heads at once (OLMo-2), or over each (Qwen3)
            full = self.qk_norm == "full"
            self.q_norm = RMSNorm(self.heads * h if full else h, config.norm_eps)
            self.k_norm = RMSNorm(self.kv_heads * h if full else h, config.norm_eps)

    def forward(self, x, rope, mask, cache, slot):
        B, T, _ = x.shape
        h = self.head_dim
        sizes = (self.heads * h, self.kv_heads * h, self.kv_heads * h)
        q, k, v = self.Wqkv(x).split(sizes, dim=-1)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.view(B, T, -1, h) for part in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (B,heads,T,h)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:  # returns the earlier tokens' keys and values with these behind
            k, v = cache.update(k, v, slot)
        k, v = (part.repeat_interleave(self.heads // self.kv_heads, dim=1) for part in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 2 * config.intermediate_size, bias=False)
        self.proj = nn.Linear(config.intermediate_size, config.n_embd, bias=False)

    def forward(self, x):
        gate, up = self.fc(x).chunk(2, dim=-1)
        return self.proj(F.silu(gate) * up)


class Block(nn.Module):
    """A Llama's norms come before attention and MLP, an OLMo-2's after them."""

    def __init__(self, config):
        super().__init__()
        if config.block_norm not in (None, "pre", "post"):
            raise ValueError(f"block_norm is {config.block_norm}: only pre and post are supported")
        self.post = config.block_norm == "post"
        self.norm_1 = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = Attention(config)
        self.norm_2 = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rope, mask, cache, slot):
        if self.post:
            x = x + self.norm_1(self.attn(x, rope, mask, cache, slot))
            return x + self.norm_2(self.mlp(x))
        x = x + self.attn(self.norm_1(x), rope, mask, cache, slot)
        return x + self.mlp(self.norm_2(x))


class RavenForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = RavenConfig
    _no_split_modules = ["Block"]
    _supports_sdpa = True
    _supports_cache_class = True

    def __init__(self, config):
        super().__init__(config)
        d = config.n_embd

        def blocks(count):
            return nn.ModuleList(Block(config) for _ in range(count))

        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.padded_vocab_size, d),
            "prelude": blocks(config.n_layers_in_prelude),
            "adapter": nn.Linear(2 * d, d, bias=False),
            "core_block": blocks(config.n_layers_in_recurrent_block),
            "coda": blocks(config.n_layers_in_coda),
            "ln_f": RMSNorm(d, config.norm_eps),
        })
        self.lm_head = nn.Linear(d, config.padded_vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module):
        """Of what no file has: Huginn's standard deviation, √(2/(5d)). Norms start as ones."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=math.sqrt(2 / (5 * self.config.n_embd)))
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def get_input_embeddings(self):
        return self.transformer.wte

    def set_input_embeddings(self, embeddings):
        self.transformer.wte = embeddings

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, head):
        self.lm_head = head

    def _supports_default_dynamic_cache(self):
        """No: generate() would make a cache of n_layers slots. forward makes one that grows."""
        return False

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, attention_mask=None, **kwargs
    ):
        """The tokens that the cache does not hold yet, and the options of generate for forward."""
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        names = ("use_cache", "num_steps", "initial_state", "logits_to_keep")
        inputs = {name: kwargs[name] for name in names if name in kwargs}
        inputs["input_ids"] = input_ids[:, past:]
        inputs["past_key_values"] = past_key_values
        inputs["attention_mask"] = attention_mask
        return inputs

    def start_state(self, initial_state, e):
        """s_0: "zero", "normal" or numbers (B,T,d). Without one, as in the training."""
        kind = self.config.trained_state_init if initial_state is None else initial_state
        if torch.is_tensor(kind):
            return kind.to(e)
        if kind == "zero":
            return torch.zeros_like(e)
        if kind != "normal":
            raise ValueError(f"the start state is {kind}: it is normal, zero or a tensor")
        std = self.config.init_values["std"]
        state = torch.empty(e.shape, dtype=torch.float32, device=e.device)
        return nn.init.trunc_normal_(state, std=std, a=-3 * std, b=3 * std).to(e)

    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        labels=None,
        use_cache=False,
        num_steps=None,
        initial_state=None,
        logits_to_keep=0,
        return_dict=True,
    ):
        """num_steps: r; or (n, k), n without and k with gradient. r is (r - k, k), where k is at
        most mean_backprop_depth; None is mean_recurrence.
        attention_mask: (B, cached tokens + T), 0 for padding, on either side.
        labels: input_ids, or -100; each is held against the logits of the token before it."""
        B, T = input_ids.shape
        cache = past_key_values
        if use_cache and cache is None:
            cache = DynamicCache()
        past = 0 if cache is None else cache.get_seq_length()
        r = self.config.mean_recurrence if num_steps is None else num_steps
        if not isinstance(r, (tuple, list)):
            k = min(r, self.config.mean_backprop_depth)
            r = (r - k, k)
        n, r = r[0], r[0] + r[1]
        if n < 0 or r < 1:
            raise ValueError(f"num_steps is {num_steps}: there must be at least one")

        # Slots of the cache: prelude i is i, core j at recurrence i is P + i·C + j, then the coda.
        parts = self.transformer
        P, C, D = len(parts.prelude), len(parts.core_block), len(parts.coda)
        if past and len(cache) != P + r * C + D:
            raise ValueError("the cache was filled with another num_steps: begin with a new one")

        # A token attends to what is not padding up to itself. Padding attends to itself, so that
        # all numbers stay finite.
        if attention_mask is None:
            attention_mask = torch.ones(B, past + T, dtype=torch.long, device=input_ids.device)
        if attention_mask.shape != (B, past + T):
            raise ValueError(f"attention_mask is not of shape {(B, past + T)}")
        keys = torch.arange(past + T, device=input_ids.device)
        queries = keys[past:, None]
        mask = attention_mask.bool()[:, None, None, :] & (keys <= queries) | (keys == queries)
        if position_ids is None:  # counted from the row's first token
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]

        x = parts.wte(input_ids)
        angles = position_ids[:, None, :, None] * rope_frequencies(self.config, x.device)
        angles = torch.cat((angles, angles), dim=-1)  # (B,1,T,h)
        rope = (angles.cos().to(x.dtype), angles.sin().to(x.dtype))
        for i, block in enumerate(parts.prelude):
            x = block(x, rope, mask, cache, i)

        e = x
        s = self.start_state(initial_state, e)
        for i in range(r):
            with torch.set_grad_enabled(torch.is_grad_enabled() and i >= n):
                s = parts.adapter(torch.cat((s, e), dim=-1))
                for j, block in enumerate(parts.core_block):
                    s = block(s, rope, mask, cache, P + i * C + j)

        x = s
        for i, block in enumerate(parts.coda):
            x = block(x, rope, mask, cache, P + r * C + i)
        x = parts.ln_f(x)
        logits = self.lm_head(x[:, -logits_to_keep:])  # 0 keeps all

        loss = None
        if labels is not None:
            if logits_to_keep:
                raise ValueError("labels need all logits: leave logits_to_keep out")
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        return output if return_dict else output.to_tuple()
