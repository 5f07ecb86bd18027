#!/usr/bin/env python3
"""The same model in PyTorch, to be timed beside ours on one machine. Needs torch 2.10 or later.

It restates the recurrent Llama of arXiv 2511.07384 with the arithmetic, the order and the habits on
the host of the code that was released with the paper (`authors`), and once with what PyTorch offers
beyond that (`compile` for training, `static` for decoding).

  --check DIR     loss, logits, states and every gradient against a fixture (test/fixtures/tiny)
  --bench train   optimizer steps; with --draw R those of a training whose depths are drawn, the
                  time that torch.compile takes for them counted and told apart
  --bench decode  greedy decoding
  --bench ops     matrix products, attention and copies on a GPU

Each measurement is a line of JSON on stdout. Exit codes: 0 done, 1 the check failed, 2 bad usage or
no GPU. Nothing in make test needs it; make bench-cuda uses it where it can.
"""
import argparse
import contextlib
import json
import math
import os
import re
import resource
import statistics
import struct
import sys
import time
import warnings
from dataclasses import dataclass
from glob import glob
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def fail(message):
    print(f"pytorch_peer: {message}", file=sys.stderr)
    sys.exit(2)


# ---- Configuration and weights ------------------------------------------------------------------
@dataclass(frozen=True)
class Config:
    width: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    layers: tuple  # prelude, core, coda
    theta: float
    scaling: dict | None = None  # Llama 3's rescaled frequencies
    eps: float = 1e-5
    state_std: float = 0.008703882797784892
    embed_scale: float = 1.0
    tied: bool = False

    @property
    def head_dim(self):
        return self.width // self.heads


LLAMA3 = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
PRESETS = {
    "tinyllama": Config(2048, 32, 4, 5632, 32000, (4, 8, 4), 10000.0),
    "llama3.2": Config(2048, 32, 8, 8192, 128256, (4, 6, 4), 500000.0, LLAMA3),
    "smollm2": Config(576, 9, 3, 1536, 49152, (4, 6, 4), 100000.0),
    "tiny": Config(64, 4, 2, 176, 512, (1, 2, 1), 10000.0),
}
# From the names in checkpoints to the names of the modules below.
RENAMES = (
    ("transformer.wte.", "embed."),
    ("transformer.core_block.", "core."),
    ("transformer.ln_f.", "norm_final."),
    ("transformer.", ""),
    ("lm_head.", "head."),
    (".attn.Wqkv.", ".attn.qkv."),
    (".attn.proj.", ".attn.out."),
    (".mlp.fc.", ".mlp.gate_up."),
    (".mlp.proj.", ".mlp.down."),
    (".norm_1.", ".norm_attn."),
    (".norm_2.", ".norm_mlp."),
)
TYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I32": torch.int32,
    "I64": torch.int64,
}


def module_name(name):
    for theirs, ours in RENAMES:
        name = name.replace(theirs, ours)
    return name


def read_safetensors(path):
    if not os.path.exists(path):
        fail(f"{path}: no such file")
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
        data = bytearray(file.read())
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        raw = torch.frombuffer(data[begin:end], dtype=torch.uint8)
        tensors[name] = raw.view(TYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def read_config(directory):
    path = os.path.join(directory, "config.json")
    if not os.path.exists(path):
        fail(f"{path}: no such file: a recurrent model's directory is needed")
    with open(path) as file:
        c = json.load(file)
    rope = c.get("rope_scaling") or c.get("rope_parameters") or {}
    kind = rope.get("rope_type", "default")
    theta = c.get("rope_theta") or rope.get("rope_theta")
    if c.get("qk_bias") or c.get("bias") or kind not in ("default", "llama3") or not theta:
        fail(f"{path}: biases, rope type {kind!r} or a missing rope_theta are not covered here")
    init = c.get("init_values", {})
    return Config(
        width=c["n_embd"],
        heads=c["n_heads"],
        kv_heads=c["num_key_value_heads"],
        intermediate=c["intermediate_size"],
        vocab=c.get("padded_vocab_size", c["vocab_size"]),
        layers=(
            c["n_layers_in_prelude"],
            c["n_layers_in_recurrent_block"],
            c["n_layers_in_coda"],
        ),
        theta=float(theta),
        scaling=rope if kind == "llama3" else None,
        eps=c["norm_eps"],
        state_std=init.get("std", Config.state_std),
        embed_scale=init.get("embed_scale", 1.0),
        tied=bool(c.get("tie_embeddings", False)),
    )


# ---- The model ----------------------------------------------------------------------------------
class Matrix(nn.Module):
    """A linear map without bias. `live`, when set, is a differentiable copy of lower precision that
    all uses in a pass share."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.live = None

    def forward(self, x):
        return F.linear(x, self.weight if self.live is None else self.live)


class Norm(nn.Module):
    """RMSNorm: a chain of operations in fp32, the gain after rounding back; `fused`: one call."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps
        self.fused = False

    def forward(self, x):
        if self.fused:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        with torch.autocast(device_type=x.device.type, enabled=False):
            wide = x.float()
            unit = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
            return unit.type_as(x) * self.weight


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    swapped = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos) + (swapped * sin)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads = c.heads
        self.kv_heads = c.kv_heads
        self.head_dim = c.head_dim
        self.fused = False
        self.qkv = Matrix(c.width, (c.heads + 2 * c.kv_heads) * c.head_dim)
        self.out = Matrix(c.width, c.width)

    def split(self, packed, rope):
        """q, k and v as (batch, heads, length, head_dim), q and k rotated."""
        batch, length, _ = packed.shape
        cos, sin = rope
        if self.fused:  # q and k together; sin has the sign of the swapped half already
            heads = packed.view(batch, length, -1, self.head_dim).transpose(1, 2)
            qk, v = heads.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
            qk = torch.addcmul(qk * cos, qk.roll(self.head_dim // 2, -1), sin)
            q, k = qk.split([self.heads, self.kv_heads], dim=1)
            return q, k, v
        widths = [n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)]
        parts = packed.split(widths, dim=2)
        q, k, v = (t.view(batch, length, -1, self.head_dim).transpose(1, 2) for t in parts)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def forward(self, x, rope, cache=None):
        batch, length, width = x.shape
        q, k, v = self.split(self.qkv(x), rope)
        if cache is not None:
            k, v = cache.extend(k, v)
        if 1 < length < k.shape[2]:
            raise NotImplementedError("several tokens behind others in a cache")
        causal = length == k.shape[2]
        y = F.scaled_dot_product_attention(
            q, k, v, dropout_p=0.0, is_causal=causal, enable_gqa=True
        )
        return self.out(y.transpose(1, 2).reshape(batch, length, width).contiguous())


class Mlp(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_up = Matrix(c.width, 2 * c.intermediate)
        self.down = Matrix(c.intermediate, c.width)
        self.act = nn.SiLU()

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(self.act(gate) * up)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm_attn = Norm(c.width, c.eps)
        self.attn = Attention(c)
        self.norm_mlp = Norm(c.width, c.eps)
        self.mlp = Mlp(c)

    def forward(self, x, rope, cache=None):
        x = self.attn(self.norm_attn(x), rope, cache) + x
        return self.mlp(self.norm_mlp(x)) + x


def rope_frequencies(c):
    frequencies = 1.0 / (c.theta ** (torch.arange(0, c.head_dim, 2).float() / c.head_dim))
    s = c.scaling
    if s is None:
        return frequencies
    # Long wavelengths are stretched by the factor, short ones stay, between them a linear ramp.
    turns = s["original_max_position_embeddings"] / (2 * math.pi / frequencies)
    ramp = s["high_freq_factor"] - s["low_freq_factor"]
    keep = ((turns - s["low_freq_factor"]) / ramp).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / s["factor"])


class RecurrentLlama(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.compiled = False
        self.fused = False
        self.table = None  # cosines and sines, where they are made once
        prelude, core, coda = c.layers
        self.embed = nn.Embedding(c.vocab, c.width)
        self.head = Matrix(c.width, c.vocab)
        self.prelude = nn.ModuleList(Block(c) for _ in range(prelude))
        self.core = nn.ModuleList(Block(c) for _ in range(core))
        self.coda = nn.ModuleList(Block(c) for _ in range(coda))
        self.adapter = Matrix(2 * c.width, c.width)
        self.norm_final = Norm(c.width, c.eps)
        if c.tied:
            self.head.weight = self.embed.weight
        self.register_buffer("frequencies", rope_frequencies(c), persistent=False)

    @torch.no_grad()
    def randomize(self, seed=0):
        torch.manual_seed(seed)
        for p in self.parameters():
            if p.ndim == 2:
                p.normal_(0.0, math.sqrt(1 / (5 * self.c.width)))

    def load(self, tensors):
        state = {module_name(k): v for k, v in tensors.items() if "inv_freq" not in k}
        if self.c.tied:
            state.setdefault("head.weight", state["embed.weight"])
        self.load_state_dict(state, strict=True)

    # Three ways beyond what was released.
    def compile_parts(self, mode):
        options = {"dynamic": False, "mode": None if mode == "default" else mode}
        self.prelude_part = torch.compile(self.prelude_part, **options)
        self.core_part = torch.compile(self.core_part, **options)
        self.coda_part = torch.compile(self.coda_part, **options)
        self.compiled = True

    def fuse(self):
        """For decoding: norms in one call, q and k rotated together, a table of cosines and sines,
        the head at the last position alone."""
        for module in self.modules():
            if hasattr(module, "fused"):
                module.fused = True

    def set_live(self, dtype):
        """Gives every matrix a copy in `dtype`, once per pass; gradients flow back to the fp32
        masters. None drops the copies."""
        for module in self.modules():
            if isinstance(module, Matrix):
                module.live = None if dtype is None else module.weight.to(dtype)

    # The pieces of a pass.
    @torch.no_grad()
    def rope(self, positions, dtype):
        with torch.autocast(device_type=positions.device.type, enabled=False):
            column = self.frequencies[None, :, None].float()
            phase = (column @ positions[None, None, :].float()).transpose(1, 2)
            phase = torch.cat((phase, phase), dim=-1)[:, None]
            return phase.cos().to(dtype), phase.sin().to(dtype)

    @torch.no_grad()
    def rope_from_table(self, first, length, dtype):
        end = first + length
        if self.table is None or self.table[0].shape[2] < end or self.table[0].dtype != dtype:
            capacity = 1 << (end - 1).bit_length()
            positions = torch.arange(capacity, device=self.frequencies.device).float()
            phase = torch.outer(positions, self.frequencies).repeat(1, 2)[None, None]
            cos = phase.cos()
            sin = phase.sin()
            if self.fused:
                sin[..., : self.c.head_dim // 2].neg_()
            self.table = (cos.to(dtype), sin.to(dtype))
        return tuple(t[:, :, first:end] for t in self.table)

    def first_state(self, e, scale):
        state = torch.randn_like(e)
        std = self.c.state_std * scale
        if std == 0:
            return state.zero_()
        nn.init.trunc_normal_(state, mean=0.0, std=std, a=-3 * std, b=3 * std)
        return state * self.c.embed_scale if self.c.embed_scale != 1 else state

    def prelude_part(self, e, rope, cache=None):
        for block in self.prelude:
            e = block(e, rope, cache)
        return e

    def core_part(self, s, e, rope, cache=None):
        x = self.adapter(torch.cat([s, e], dim=-1))
        for block in self.core:
            x = block(x, rope, cache)
        return x

    def coda_part(self, x, rope, cache=None, labels=None, keep_logits=True):
        for block in self.coda:
            x = block(x, rope, cache)
        x = self.norm_final(x)
        logits = self.head(x[:, -1:] if self.fused else x)
        if labels is None:
            return x, logits, None
        logits = logits.float()
        rows = logits.view(-1, logits.shape[-1])
        loss = F.cross_entropy(rows, labels.view(-1), ignore_index=-100)
        return x, logits if keep_logits else None, loss

    def embedded(self, ids):
        e = self.embed(ids)
        return e if self.c.embed_scale == 1 else e * self.c.embed_scale

    def forward(self, ids, steps, labels=None, state=None, cache=None, positions=None,
                init_scale=1.0, stats=False, keep_logits=True):
        """steps: recurrences without gradient, with gradient. positions: a tensor; where cosines
        come from the table, the first position."""
        once = self.compiled or self.fused
        length = ids.shape[1]
        e = self.embedded(ids)
        if once:
            rope = self.rope_from_table(positions or 0, length, e.dtype)
        elif positions is None:
            rope = self.rope(torch.arange(length, device=ids.device), e.dtype)
        else:
            rope = self.rope(positions, e.dtype)
        if cache is not None:
            cache.begin(length)
        e = self.prelude_part(e, rope, cache)
        s = self.first_state(e, init_scale) if state is None else state.clone()
        if self.compiled and self.adapter.live is not None:
            s = s.to(self.adapter.live.dtype)  # the adapter rounds its input to this type anyway
        with torch.no_grad():
            for _ in range(steps[0]):
                s = self.core_part(s, e, rope, cache)
        for _ in range(steps[1]):
            s = self.core_part(s, e, rope, cache)
        latent = s.detach() if once else s.clone().detach()
        if cache is not None:
            cache.enter_coda()
        x, logits, loss = self.coda_part(s, rope, cache, labels, keep_logits or stats)
        return SimpleNamespace(
            loss=loss,
            perplexity=None if loss is None else loss.clone().detach().exp(),
            latent=latent,
            logits=logits if keep_logits else None,
            stats=training_stats(logits, x, latent) if stats else None,
        )


def training_stats(logits, x, latent):
    """The released code computes this for every micro-batch, inside autograd, and keeps it until
    the backward pass is over."""
    p = torch.softmax(logits.float(), dim=-1)
    moved = (x - latent).norm(dim=-1)
    return {
        "entropy": torch.where(p > 0, -p * p.log(), 0).sum(dim=-1),
        "moved": moved,
        "relative": moved / latent.norm(dim=-1),
    }


def build(args, device):
    """The model of --model, or one of --config's shape with random weights, in fp32."""
    model = RecurrentLlama(read_config(args.model) if args.model else PRESETS[args.config])
    if args.model:
        tensors = {}
        paths = sorted(glob(os.path.join(args.model, "*.safetensors")))
        for path in paths:
            tensors.update(read_safetensors(path))
        if not paths:
            fail(f"{args.model}: no *.safetensors")
        model.load(tensors)
    else:
        model.randomize()
    return model.to(device=device, dtype=torch.float32)


# ---- Caches and decoding ------------------------------------------------------------------------
class DictCache:
    """As released: an entry of a dict for each token and use of a layer, stacked at each use."""

    def __init__(self):
        self.keys = {}
        self.values = {}
        self.seen = 0

    def begin(self, length):
        self.seen += length
        self.slot = torch.tensor(-1)
        self.stride = 1

    def enter_coda(self):  # whose slots are the negative ones
        self.slot = torch.tensor(0)
        self.stride = -1

    def extend(self, k, v):
        self.slot += self.stride
        slot = int(self.slot)
        first = self.seen - k.shape[-2]
        both = []
        for store, fresh in ((self.keys, k), (self.values, v)):
            shelf = store.setdefault(slot, {})
            for i, entry in enumerate(fresh.unbind(dim=-2)):
                shelf[first + i] = entry
            both.append(torch.stack(list(shelf.values()), dim=-2))
        return both


class FlatCache:
    """Allocated once: a pair (batch, kv heads, length, head_dim) for each use of a layer, written
    in place, read as views."""

    def __init__(self, c, r, batch, length, device, dtype):
        uses = c.layers[0] + r * c.layers[1] + c.layers[2]
        shape = (uses, batch, c.kv_heads, length, c.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype).unbind(0)
        self.values = torch.zeros(shape, device=device, dtype=dtype).unbind(0)
        self.seen = 0

    def begin(self, length):
        self.first = self.seen
        self.seen += length
        self.slot = -1

    def enter_coda(self):
        pass

    def extend(self, k, v):
        self.slot += 1
        both = []
        for store, fresh in ((self.keys, k), (self.values, v)):
            store[self.slot].narrow(2, self.first, fresh.shape[2]).copy_(fresh)
            both.append(store[self.slot].narrow(2, 0, self.seen))
        return both


class Stopwatch:
    """The seconds to the first token, and from there to the last."""

    def __init__(self, sync, tokens):
        self.sync = sync
        self.tokens = tokens
        self.stamps = []
        self.stamp()

    def stamp(self):
        self.sync()
        self.stamps.append(time.perf_counter())

    def token(self, i):
        if i in (0, self.tokens - 1):
            self.stamp()

    def spans(self):
        return self.stamps[1] - self.stamps[0], self.stamps[-1] - self.stamps[1]


@torch.no_grad()
def generate_as_released(model, prompt, new, r, sync):
    """The ids grow by concatenation, and the host looks at every token."""
    batch, length = prompt.shape
    cache = DictCache()
    ids = prompt
    positions = torch.arange(length, device=prompt.device)
    unfinished = torch.ones(batch, dtype=torch.long, device=prompt.device)
    watch = Stopwatch(sync, new)
    for i in range(new):
        fed = ids[:, positions].clone()
        out = model(fed, (r, 0), cache=cache, positions=positions, init_scale=0.0)
        logits = out.logits[:, -1, :].to(copy=True, dtype=torch.float32)
        token = torch.argmax(logits, dim=-1, keepdim=True)
        ids = torch.cat([ids, token], dim=-1)
        positions = positions[-1:] + 1
        for b in range(batch):
            if unfinished[b].bool() and token[b, 0].item() < 0:
                unfinished[b] = 0
        if unfinished.max() == 0:
            break
        watch.token(i)
    return ids, *watch.spans()


@torch.inference_mode()
def generate_static(model, prompt, new, r, sync):
    batch, length = prompt.shape
    dtype = model.embed.weight.dtype
    cache = FlatCache(model.c, r, batch, length + new, prompt.device, dtype)
    pieces = [prompt]
    watch = Stopwatch(sync, new)
    for i in range(new):
        first = 0 if i == 0 else length + i - 1
        out = model(pieces[-1], (r, 0), cache=cache, positions=first, init_scale=0.0)
        pieces.append(torch.argmax(out.logits[:, -1, :], dim=-1, keepdim=True))
        watch.token(i)
    return torch.cat(pieces, dim=-1), *watch.spans()


def generate(model, prompt, new, r, mode, sync=lambda: None):
    """Greedy text from the zero state: all ids, seconds to the first token, and for the rest."""
    way = generate_as_released if mode == "authors" else generate_static
    return way(model, prompt, new, r, sync)


# ---- Optimizers ---------------------------------------------------------------------------------
def orthogonalize(g, fast):
    """Five quintic Newton-Schulz iterations in bf16. `fast` folds sums into matrix products."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.size(0) > g.size(1)
    x = g.bfloat16()
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        s = x @ x.mT
        if fast:
            x = torch.addmm(x, torch.addmm(s, s, s, beta=b, alpha=c), x, beta=a)
        else:
            x = a * x + (b * s + c * s @ s) @ x
    return x.mT if tall else x


class MuonAdam(torch.optim.Optimizer):
    """Muon for the matrices of blocks and adapter, Adam for embedding, head and gains. As released
    it walks from parameter to parameter; `fast` leaves Adam's part to the fused AdamW."""

    def __init__(self, model, fast, lr=1e-3, adam_lr=5e-5, decay=1e-4):
        body = []
        rest = []
        for name, p in model.named_parameters():
            by_adam = any(word in name for word in ("norm", "embed", "head"))
            (rest if by_adam else body).append(p)
        muon = {"params": body, "lr": lr, "muon": True}
        adam = {"params": rest, "lr": adam_lr, "muon": False}
        super().__init__([muon, adam], {"decay": decay})
        self.fast = fast
        self.fused = None
        if fast:
            self.fused = torch.optim.AdamW(
                rest, lr=adam_lr, betas=(0.9, 0.95), eps=1e-10, weight_decay=decay, fused=True
            )

    def muon_update(self, p):
        state = self.state[p]
        if not state:
            state["m"] = torch.zeros_like(p)
        state["m"].lerp_(p.grad, 1 - 0.95)
        update = orthogonalize(p.grad.lerp_(state["m"], 0.95), self.fast)
        update *= max(1, p.size(0) / p.size(1)) ** 0.5
        return update

    def adam_update(self, p):
        state = self.state[p]
        if not state:
            state.update(m=torch.zeros_like(p), v=torch.zeros_like(p), t=0)
        state["t"] += 1
        state["m"].lerp_(p.grad, 1 - 0.9)
        state["v"].lerp_(p.grad.square(), 1 - 0.95)
        mean = state["m"] / (1 - 0.9 ** state["t"])
        square = state["v"] / (1 - 0.95 ** state["t"])
        return mean / (square.sqrt() + 1e-10)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if self.fused and not group["muon"]:
                self.fused.step()
                continue
            for p in group["params"]:
                update = self.muon_update(p) if group["muon"] else self.adam_update(p)
                p.mul_(1 - group["lr"] * group["decay"])
                p.add_(update, alpha=-group["lr"])


def make_optimizer(model, kind, fast):
    if kind == "muon":
        return MuonAdam(model, fast)
    return torch.optim.AdamW(
        model.parameters(),
        lr=5e-5,
        weight_decay=1e-4,
        betas=(0.9, 0.95),
        eps=1e-8,
        fused=True if fast else None,
    )


# ---- Measurements -------------------------------------------------------------------------------
class Clock:
    """Marks on the device's own time: events on a GPU, the host's clock on a CPU. Spans are read
    after sync()."""

    def __init__(self, device):
        self.cuda = device.type == "cuda"

    def sync(self):
        if self.cuda:
            torch.cuda.synchronize()

    def mark(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, begin, end):
        return begin.elapsed_time(end) if self.cuda else (end - begin) * 1e3

    def median_ms(self, work, rounds, warmup=5):
        for _ in range(warmup):
            work()
        spans = []
        for _ in range(rounds):
            begin = self.mark()
            work()
            spans.append((begin, self.mark()))
        self.sync()
        return statistics.median(self.ms(*span) for span in spans)


def report(device, **facts):
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name()
    else:
        facts["device"] = f"cpu, {torch.get_num_threads()} threads"
    facts["torch"] = torch.__version__
    rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in facts.items()}
    print(json.dumps(rounded), flush=True)


def flops_per_token(c, length, n, k):
    qkv = c.width * (c.heads + 2 * c.kv_heads) * c.head_dim
    weights = qkv + c.width * c.width + 3 * c.width * c.intermediate
    layer = 2 * weights + 2 * length * c.width
    once = (c.layers[0] + c.layers[2]) * layer + 2 * c.width * c.vocab
    recurrence = c.layers[1] * layer + 2 * 2 * c.width * c.width
    return 3 * once + (n + 3 * k) * recurrence


class Training:
    """Optimizer steps on random tokens, with the released loop's looks of the host at the device
    (`fast`: without)."""

    def __init__(self, args, device):
        self.args = args
        self.device = device
        self.clock = Clock(device)
        self.fast = args.mode == "compile"
        self.depths = (args.no_grad_steps, args.grad_steps)
        self.bf16 = args.precision == "bf16"
        self.model = build(args, device).train()
        self.optimizer = make_optimizer(self.model, args.optimizer, self.fast)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1.0)
        self.generator = torch.Generator().manual_seed(1)
        self.walls = []
        self.passes = []
        self.updates = []
        if device.type == "cuda":  # as the released train.py does
            torch.set_float32_matmul_precision("high")
            torch.backends.cudnn.benchmark = True
        if self.fast:
            self.model.compile_parts(args.compile_mode)

    def micro_step(self, tokens):
        args = self.args
        where = {"dtype": torch.long, "device": self.device, "non_blocking": True}
        ids = tokens[:, :-1].to(**where)
        nothing_masked = torch.zeros_like(tokens[:, :-1], dtype=torch.bool)
        labels = torch.where(nothing_masked, -100, tokens[:, 1:]).to(**where)
        if not self.fast:
            (labels != -100).sum().item()  # the released loop counts supervised tokens here
        elif self.bf16:
            self.model.set_live(torch.bfloat16)
        with torch.autocast(
            device_type=self.device.type,
            dtype=torch.bfloat16,
            enabled=self.bf16,
            cache_enabled=False,
        ):
            out = self.model(
                ids, self.depths, labels=labels, stats=not self.fast, keep_logits=False
            )
        (out.loss / args.accum).backward()  # `out`, and with it the statistics, outlives backward
        self.model.set_live(None)
        return out.loss.detach(), out.perplexity.detach()

    def update(self):
        parameters = self.model.parameters()
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm=1.0, norm_type=2.0)
        if not self.fast:
            norm.item()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()

    def step(self, timed):
        args = self.args
        shape = (args.micro_batch, args.seq_len + 1)
        batches = [
            torch.randint(0, self.model.c.vocab, shape, generator=self.generator)
            for _ in range(args.accum)
        ]
        self.clock.sync()
        start = time.perf_counter()
        begin = self.clock.mark()
        for tokens in batches:
            loss, perplexity = self.micro_step(tokens)
            if not self.fast:
                loss.item()
                perplexity.item()
        middle = self.clock.mark()
        self.update()
        end = self.clock.mark()
        self.clock.sync()
        if timed:
            self.walls.append((time.perf_counter() - start) * 1e3)
            self.passes.append(self.clock.ms(begin, middle))
            self.updates.append(self.clock.ms(middle, end))
        return float(loss)


def memory_used(device):
    if device.type == "cuda":
        return {
            "peak_memory_GB": torch.cuda.max_memory_allocated() / 1e9,
            "peak_reserved_GB": torch.cuda.max_memory_reserved() / 1e9,
        }
    return {"peak_memory_GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}


def draw_depths(mean, depth, steps):
    """(n, k) of the steps of a training as in the paper, but of so few steps of one micro-batch:
    the curriculum 1-sqrt over three quarters of them, then the authors' draws."""
    pairs = []
    warmup = math.ceil(0.75 * steps)
    for step in range(steps):
        share = 1 - math.sqrt(1 - step / warmup) if step < warmup else 1
        mean_now = max(1, math.ceil(mean * share))
        most = min(mean_now, depth)
        generator = torch.Generator().manual_seed((514229 + step + 1) % (2**31 - 1))
        rate = torch.empty(1).log_normal_(math.log(mean_now) - 0.125, 0.5, generator=generator)
        p = int(torch.poisson(rate, generator=generator)) + 1
        pairs.append((max(p - most, 0), min(p, most)))
    return pairs


def compiled_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def bench_draws(args, device):
    """The steps of a training whose depths are drawn, twice: the first time parts are compiled, and
    for whatever calls for it compiled again; the second time shows what is left of that."""
    training = Training(args, device)
    c = training.model.c
    depths = draw_depths(args.draw, 8, args.steps)
    walls = []
    graphs = [compiled_graphs()]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        training.walls.clear()
        for pair in depths:
            training.depths = pair
            training.step(timed=True)
        walls.append(sum(training.walls) / 1e3)
        graphs.append(compiled_graphs())
    tokens = args.micro_batch * args.seq_len * args.accum * len(depths)
    flops = sum(flops_per_token(c, args.seq_len, *pair) for pair in depths) / len(depths)
    report(
        device,
        bench="draws",
        mode=args.mode,
        config=args.model or args.config,
        precision=args.precision,
        optimizer=args.optimizer,
        micro_batch=args.micro_batch,
        seq_len=args.seq_len,
        draws=" ".join(f"{n},{k}" for n, k in depths),
        wall_s=walls[0],
        steady_wall_s=walls[1],
        graphs=graphs[1] - graphs[0],
        graphs_again=graphs[2] - graphs[1],
        tokens_per_s=tokens / walls[1],
        tokens_per_s_with_compilation=tokens / walls[0],
        **memory_used(device),
        model_tflops=flops * tokens / walls[1] / 1e12,
    )


def bench_train(args, device):
    if args.draw:
        bench_draws(args, device)
        return
    began = time.perf_counter()
    training = Training(args, device)
    for _ in range(args.warmup):
        training.step(timed=False)
    warmup_s = time.perf_counter() - began
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(args.steps):
        loss = training.step(timed=True)

    c = training.model.c
    median = statistics.median(training.walls)
    rate = args.micro_batch * args.seq_len * args.accum / median * 1e3
    flops = flops_per_token(c, args.seq_len, args.no_grad_steps, args.grad_steps)
    share = flops * rate / args.peak_flops if device.type == "cuda" else None
    report(
        device,
        bench="train",
        mode=args.mode,
        config=args.model or args.config,
        layers=list(c.layers),
        precision=args.precision,
        optimizer=args.optimizer,
        micro_batch=args.micro_batch,
        seq_len=args.seq_len,
        accum=args.accum,
        no_grad_steps=args.no_grad_steps,
        grad_steps=args.grad_steps,
        tokens_per_s=rate,
        step_ms=median,
        step_ms_min=min(training.walls),
        step_ms_max=max(training.walls),
        fwd_bwd_ms=statistics.median(training.passes),
        optimizer_ms=statistics.median(training.updates),
        **memory_used(device),
        flops_per_token=flops,
        model_tflops=flops * rate / 1e12,
        mfu=share,
        loss=loss,
        steps=args.steps,
        warmup_s=warmup_s,
        params=sum(p.numel() for p in training.model.parameters()),
    )


def bench_decode(args, device):
    model = build(args, device).eval()
    clock = Clock(device)
    if args.precision == "bf16":
        for p in model.parameters():  # the frequencies stay in fp32
            p.data = p.data.to(torch.bfloat16)
    if args.mode == "static":
        model.fuse()
    shape = (args.micro_batch, args.prompt_len)
    generator = torch.Generator().manual_seed(2)
    prompt = torch.randint(0, model.c.vocab, shape, generator=generator).to(device)
    new = args.new_tokens
    for r in args.recurrences:
        generate(model, prompt, 4, r, args.mode, clock.sync)
        tries = [
            generate(model, prompt, new, r, args.mode, clock.sync) for _ in range(args.repeats)
        ]
        ids = tries[0][0].cpu()
        first = statistics.median(t[1] for t in tries)
        rest = statistics.median(t[2] for t in tries)
        both = statistics.median(t[1] + t[2] for t in tries)
        report(
            device,
            bench="decode",
            mode=args.mode,
            config=args.model or args.config,
            precision=args.precision,
            recurrences=r,
            batch=args.micro_batch,
            prompt_len=args.prompt_len,
            new_tokens=new,
            tokens_per_s=args.micro_batch * (new - 1) / rest,
            ms_per_token=rest / (new - 1) * 1e3,
            prefill_ms=first * 1e3,
            end_to_end_tokens_per_s=args.micro_batch * new / both,
            ids_checksum=int((ids * torch.arange(1, ids.shape[1] + 1)).sum()),
        )


def ops_gemm(args, device):
    """TinyLlama's matrix products: forward, gradient of the input, gradient of the weight."""
    clock = Clock(device)
    M = args.gemm_rows
    shapes = {
        "qkv": (2048, 2560),
        "proj": (2048, 2048),
        "fc": (2048, 11264),
        "down": (5632, 2048),
        "adapter": (4096, 2048),
        "head": (2048, 32000),
    }
    for name, (K, N) in shapes.items():
        x = torch.randn(M, K, device=device, dtype=torch.bfloat16)
        w = torch.randn(N, K, device=device, dtype=torch.bfloat16)
        dy = torch.randn(M, N, device=device, dtype=torch.bfloat16)
        parts = {
            "forward_tflops": lambda: torch.matmul(x, w.mT),
            "dgrad_tflops": lambda: torch.matmul(dy, w),
            "wgrad_tflops": lambda: torch.matmul(dy.mT, x),
        }
        flops = 2 * M * K * N
        rates = {
            part: flops / clock.median_ms(work, args.rounds) / 1e9 for part, work in parts.items()
        }
        report(device, bench="ops", op="gemm", name=name, M=M, K=K, N=N, **rates)


def ops_attention(args, device):
    clock = Clock(device)
    B, H, G, T, D = 8, 32, 4, 1024, 64
    flops = 2 * B * H * T * T * D  # two causal products forward; backward counts 2.5 times that

    def heads(count):
        x = torch.randn(B, T, count, D, device=device, dtype=torch.bfloat16)
        return x.requires_grad_().transpose(1, 2)

    for name, expanded in (("flash", False), ("cudnn", False), ("cudnn", True)):
        q = heads(H)
        k = heads(H if expanded else G)  # expanded: keys and values repeated to all heads
        v = heads(H if expanded else G)
        dy = heads(H).detach()
        facts = {"bench": "ops", "op": "sdpa", "name": name, "kv_expanded": expanded}

        def forward():
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=not expanded)

        try:
            with sdpa_kernel(BACKENDS[name]):
                y = forward()
                ms = clock.median_ms(forward, args.rounds)
                back = clock.median_ms(
                    lambda: torch.autograd.grad(y, (q, k, v), dy, retain_graph=True), args.rounds
                )
        except RuntimeError as error:
            report(device, **facts, error=str(error).splitlines()[0][:200])
            continue
        report(
            device,
            **facts,
            forward_ms=ms,
            backward_ms=back,
            forward_tflops=flops / ms / 1e9,
            backward_tflops=2.5 * flops / back / 1e9,
        )


def bench_ops(args, device):
    ops_gemm(args, device)
    ops_attention(args, device)
    source = torch.ones(1 << 28, device=device)  # 1 GiB, far beyond the last cache
    target = torch.empty_like(source)
    ms = Clock(device).median_ms(lambda: target.copy_(source), args.rounds)
    rate = 2 * source.nbytes / ms / 1e6
    report(device, bench="ops", op="copy", bytes=source.nbytes, GB_per_s=rate)


# ---- The check ----------------------------------------------------------------------------------
class Worst:
    """The largest relative difference of each quantity."""

    def __init__(self):
        self.of = {}

    def compare(self, what, ours, theirs):
        difference = (ours.detach().float().reshape(theirs.shape) - theirs).abs().max()
        gap = float(difference / theirs.abs().max().clamp_min(1e-30))
        if gap != gap:
            gap = math.inf
        self.of[what] = max(self.of.get(what, 0.0), gap)


def check_case(model, fixture, worst, tag, steps, mode):
    ids = fixture["tokens"].long()
    labels = fixture["labels"].long()
    model.zero_grad(set_to_none=True)
    out = model(ids, steps, labels=labels, state=fixture["s0"], stats=mode == "authors")
    out.loss.backward()
    worst.compare("loss", out.loss, fixture[f"{tag}.loss"])
    worst.compare("logits", out.logits, fixture[f"{tag}.logits"])
    worst.compare("latents", out.latent, fixture[f"{tag}.latents"])
    prefix = f"{tag}.grad."
    expected = {
        module_name(name.removeprefix(prefix)): gradient
        for name, gradient in fixture.items()
        if name.startswith(prefix)
    }
    if set(expected) != {name for name, _ in model.named_parameters()}:
        fail(f"{tag}: the fixture's gradients are not those of the model's parameters")
    for name, p in model.named_parameters():
        worst.compare("gradients", p.grad, expected[name])


@torch.no_grad()
def check_decoding(args, model, ids, device):
    """Whether both caches, and a pass without one over the finished text, give the same tokens."""
    twin = build(args, device)
    twin.fuse()
    length = min(8, ids.shape[1])
    agree = True
    for r in (1, 4):
        slow = generate(model, ids[:, :length], 16, r, "authors")[0]
        quick = generate(twin, ids[:, :length], 16, r, "static")[0]
        logits = model(slow[:, :-1], (r, 0), init_scale=0.0).logits
        replay = logits[:, length - 1 :].argmax(-1)
        agree = agree and torch.equal(slow, quick) and torch.equal(slow[:, length:], replay)
    return agree


def check(args, device):
    args.model = os.path.join(args.check, "recurrent")
    fixture = read_safetensors(os.path.join(args.check, "forward_backward.safetensors"))
    model = build(args, device)
    if args.mode == "compile":
        model.compile_parts(args.compile_mode)
    worst = Worst()
    cases = []
    for name in fixture:
        found = re.fullmatch(r"(n(\d+)k(\d+))\.loss", name)
        if found:
            tag, n, k = found.groups()
            cases.append(tag)
            check_case(model, fixture, worst, tag, (int(n), int(k)), args.mode)
    ids = fixture["tokens"].long()
    for name in fixture:
        found = re.fullmatch(r"zero\.r(\d+)\.logits", name)
        if found:
            with torch.no_grad():
                out = model(ids[:1], (int(found[1]), 0), init_scale=0.0)
            worst.compare("zero-state logits", out.logits, fixture[name])
    agree = check_decoding(args, model, ids, device) if args.mode == "authors" else None
    top = max(worst.of.values(), default=math.inf)
    good = bool(cases) and agree is not False and top <= 1e-4
    report(
        device,
        check=args.check,
        mode=args.mode,
        cases=cases,
        max_rel_error=top,
        by_quantity=worst.of,
        decode_modes_agree=agree,
        ok=good,
    )
    return 0 if good else 1


# ---- Command line -------------------------------------------------------------------------------
NUMBERS = (  # option, default, least, what
    ("micro-batch", None, 1, "sequences at a time (8 for train, 1 for decode)"),
    ("threads", None, 1, "CPU threads (torch's choice)"),
    ("seq-len", 1024, 1, "train"),
    ("no-grad-steps", 4, 0, "train: recurrences without gradient"),
    ("grad-steps", 4, 1, "train: recurrences with gradient"),
    ("draw", None, 1, "train: depths drawn with this mean, as the curriculum goes, not given"),
    ("accum", 1, 1, "train: micro-batches in an optimizer step"),
    ("steps", 10, 1, "train: optimizer steps that are timed"),
    ("warmup", 3, 0, "train: steps before them, in which parts are compiled"),
    ("prompt-len", 128, 1, "decode"),
    ("new-tokens", 64, 2, "decode"),
    ("repeats", 3, 1, "decode: texts, of which the median counts"),
    ("rounds", 20, 1, "ops: calls, of which the median counts"),
    ("gemm-rows", 8192, 1, "ops: rows of the matrix products"),
)


def list_of_numbers(text):
    try:
        numbers = tuple(int(x) for x in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list like 4,8,16")
    return numbers


def parse(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", metavar="DIR", help="recurrent/, forward_backward.safetensors")
    what.add_argument("--bench", choices=["train", "decode", "ops"])
    option("--config", choices=sorted(PRESETS), default="tinyllama",
           help="a shape, with random weights (%(default)s)")
    option("--model", metavar="DIR", help="config.json and *.safetensors, instead of --config")
    option("--mode", choices=["authors", "compile", "static"], default="authors",
           help="train, check: authors or compile; decode: authors or static (authors)")
    option("--device", choices=["cuda", "cpu"], default="cuda", help="(%(default)s)")
    option("--precision", choices=["bf16", "fp32"], default="bf16",
           help="train: autocast over fp32 masters; decode: of the weights (%(default)s)")
    option("--sdpa", choices=["auto", *BACKENDS], default="auto",
           help="the kernel of attention (torch's choice)")
    option("--optimizer", choices=["adamw", "muon"], default="adamw", help="(%(default)s)")
    option("--compile-mode", choices=["default", "max-autotune-no-cudagraphs"], default="default")
    option("--recurrences", type=list_of_numbers, default=(4, 8, 16, 32), metavar="R,R,...",
           help="decode (4,8,16,32)")
    option("--peak-flops", type=float, default=989e12, help="what mfu divides by (an H100's)")
    for name, default, least, text in NUMBERS:
        shown = text if default is None else f"{text} ({default})"
        option(f"--{name}", type=int, default=default, metavar="N", help=shown)
    args = parser.parse_args(arguments)

    for name, default, least, text in NUMBERS:
        value = getattr(args, name.replace("-", "_"))
        if value is not None and value < least:
            parser.error(f"--{name}: at least {least}")
    if args.mode == ("compile" if args.bench == "decode" else "static"):
        job = f"--bench {args.bench}" if args.bench else "--check"
        parser.error(f"--mode {args.mode} does not apply to {job}")
    args.micro_batch = args.micro_batch or (8 if args.bench == "train" else 1)
    return args


def main():
    args = parse(sys.argv[1:])
    warnings.filterwarnings("ignore")
    if args.threads:
        torch.set_num_threads(args.threads)
    place = "cpu" if args.check else "cuda" if args.bench == "ops" else args.device
    device = torch.device(place)
    if device.type == "cuda" and not torch.cuda.is_available():
        fail("torch sees no GPU (train and decode also run with --device cpu)")
    job = check
    if args.bench:
        job = {"train": bench_train, "decode": bench_decode, "ops": bench_ops}[args.bench]
    pinned = contextlib.nullcontext() if args.sdpa == "auto" else sdpa_kernel(BACKENDS[args.sdpa])
    with pinned:
        return job(args, device) or 0


if __name__ == "__main__":
    sys.exit(main())
