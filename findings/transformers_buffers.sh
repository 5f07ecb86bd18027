#!/bin/sh
# from_pretrained of Hugging Face's transformers 5.23.0 leaves buffers uninitialised that a model of
# one's own computes in __init__ and does not save (persistent=False): it makes the model without
# memory, fills in what the file has, and gives the rest memory as it is. In 4.57.1 they have their
# values. RoPE's frequencies are such buffers in most modelling files that come with checkpoints
# (trust_remote_code): these load, and compute something else. Nothing says so.
#
#     register_buffer("scale", torch.arange(1.0, 5.0), persistent=False)
#     4.57.1: 1 2 3 4          5.23.0: what the memory held
#
# The authors' files of the recurrent models are of this kind: doc/models.md keeps them to
# transformers 4. Our modeling_retrofit.py has no buffers.
set -e
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.15.0 numpy==2.4.6
cat > "$work/buffers.py" <<'PYTHON'
import sys
import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel


class ScaledConfig(PretrainedConfig):
    model_type = "scaled"


class Scaled(PreTrainedModel):
    config_class = ScaledConfig

    def __init__(self, config):
        super().__init__(config)
        self.linear = torch.nn.Linear(4, 4, bias=False)
        self.register_buffer("scale", torch.arange(1.0, 5.0), persistent=False)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight)

    def forward(self, x):
        return self.linear(x) * self.scale


model = Scaled(ScaledConfig())
model.save_pretrained(sys.argv[1])
loaded = Scaled.from_pretrained(sys.argv[1])
same = torch.equal(model.linear.weight, loaded.linear.weight)
equal = torch.equal(model.scale, loaded.scale)
print(transformers.__version__, "scale", *loaded.scale.tolist())
assert same, "the weights are other ones"
assert equal == transformers.__version__.startswith("4."), "the behaviour has changed"
PYTHON
for version in 4.57.1 5.23.0; do
    "$work/venv/bin/pip" install -q transformers==$version
    HF_HUB_OFFLINE=1 "$work/venv/bin/python" "$work/buffers.py" "$work/model" 2> "$work/errors" ||
        { cat "$work/errors"; exit 1; }
    ! grep -qi "scale\|buffer" "$work/errors" || { cat "$work/errors"; exit 1; }
done
