#!/usr/bin/env python3
"""Prints test/fixtures/influence/scores.tsv: what `convert --report` measures, computed from the
hidden states that Hugging Face's Llama gives.

    pip install torch "transformers==4.57.1"
    python3 test/influence.py >test/fixtures/influence/scores.tsv

Nothing in the build or in `make test` runs it. The models are fixtures, the tokenizer is
lookup/base's, a row is up to min(512, context) tokens of a document."""
import json

import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

FIXTURES = "test/fixtures/"
LINES = FIXTURES + "lookup/tasks.jsonl"
TEXT = FIXTURES + "influence/text.txt"
TOKENIZER = Tokenizer.from_file(FIXTURES + "lookup/base/tokenizer.json")
# model, its file of text, tokens, n
CASES = [
    ("tiny", "text.txt", 300, 1),
    ("tiny", "text.txt", 300, 3),
    ("tiny", "tasks.jsonl", 200, 1),
    ("llama3", "text.txt", 4096, 1),
]


def documents(name):
    if name == "text.txt":
        return [open(TEXT, encoding="utf-8").read().strip()]
    return [json.loads(line)["prompt"].strip() for line in open(LINES, encoding="utf-8")]


def rows(name, tokens, row):
    for document in documents(name):
        ids = TOKENIZER.encode(document).ids[:tokens]
        tokens -= len(ids)
        for i in range(0, len(ids), row):
            yield ids[i : i + row]
        if not tokens:
            return


def streams(model, ids):
    """The residual stream into each layer and out of the last, (L + 1, T, d). hidden_states would
    not do: its last one is behind the final norm."""
    found = []
    places = [*model.model.layers, model.model.norm]
    hooks = [p.register_forward_pre_hook(lambda m, x: found.append(x[0][0])) for p in places]
    with torch.no_grad():
        model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return torch.stack(found).double()


def cosine(a, b):
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


print("model\ttext\ttokens\tn\tlayer\tinfluence\tdistance")
for name, text, tokens, n in CASES:
    model = LlamaForCausalLM.from_pretrained(FIXTURES + name + "/base", dtype=torch.float32)
    row = min(512, model.config.max_position_embeddings)
    x = torch.cat([streams(model, ids) for ids in rows(text, tokens, row)], dim=1)
    layers = len(x) - 1
    for i in range(layers):
        influence = (1 - cosine(x[i], x[i + 1])).mean()
        distance = "-"
        if i + n <= layers:
            distance = f"{(cosine(x[i], x[i + n]).clamp(-1, 1).acos() / torch.pi).mean():.8f}"
        print(f"{name}\t{text}\t{x.shape[1]}\t{n}\t{i}\t{influence:.8f}\t{distance}")
