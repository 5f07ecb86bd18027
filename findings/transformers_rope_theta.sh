#!/bin/sh
# A model that Hugging Face's transformers 5.23.0 saved opens in 4.57.1 as another model, without a
# word: version 5 writes RoPE's base in config.json as rope_parameters.rope_theta, which version 4
# keeps as an unknown key while it takes its default for theta. Logits are wrong, whatever the
# family; no error and no warning says so. Saved again by 4.57.1, both thetas are in config.json.
#
#     rope_theta 500000, saved by 5.23.0, opened by 4.57.1: rope_theta 10000.0, other logits
#
# retrofit reads both forms, and where both are there, as 4.57.1 then writes them, takes
# rope_parameters', with a note.
set -e
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.15.0 numpy==2.4.6 transformers==5.23.0
cat > "$work/logits.py" <<'PYTHON'
import sys
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

what, directory = sys.argv[1:]
if what == "make":
    torch.manual_seed(0)
    sizes = dict(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                 num_attention_heads=2, num_key_value_heads=2)
    config = LlamaConfig(**sizes, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    config.initializer_range = 0.3
    LlamaForCausalLM(config).save_pretrained(directory)
model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
if what == "again":
    model.save_pretrained(directory + ".again")
with torch.no_grad():
    logits = model(torch.arange(32)[None]).logits[0, -1]
theta = getattr(model.config, "rope_theta", None)
print(transformers.__version__, "theta", theta or model.config.rope_parameters["rope_theta"],
      "logits", *[f"{x:.4f}" for x in logits[:4]])
PYTHON
export HF_HUB_OFFLINE=1
saved=$("$work/venv/bin/python" "$work/logits.py" make "$work/model")
"$work/venv/bin/pip" install -q transformers==4.57.1
opened=$("$work/venv/bin/python" "$work/logits.py" again "$work/model" 2> "$work/errors")
echo "$saved"
echo "$opened"
changed() {
    echo "the behaviour has changed: $1"
    cat "$work/errors"
    exit 1
}
case $opened in *"theta 10000.0"*) ;; *) changed "theta of 4.57.1" ;; esac
[ "${saved#*logits}" != "${opened#*logits}" ] || changed "equal logits"
! grep -qi "rope\|theta" "$work/errors" || changed "4.57.1 says something"
grep -q '"rope_theta": 500000.0' "$work/model.again/config.json" || changed "rope_parameters"
grep -q '"rope_theta": 10000.0' "$work/model.again/config.json" || changed "rope_theta beside it"
