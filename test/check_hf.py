#!/usr/bin/env python3
"""What we write, opened by transformers 4.57.1 and 5.23.0, and what these write, by us.

    make && python3 test/check_hf.py [PLACE]

Makes a virtual environment for each version in PLACE, where they are kept, or else in a temporary
folder: torch alone takes 5 GB. Nothing in make test needs it. PLACE/torch may be a link to an
environment that has torch and numpy already. Checked are

    plain models      logits and greedy text of what convert writes; what transformers saves, by us
    tokenizers        ids, of the fixtures and of a GGUF's
    recurrent models  modeling_retrofit.py: logits, losses and gradients against the authors'
                      numbers, and logits and greedy text against infer's; padding on both sides, a
                      cache, bf16, and what save_pretrained writes, by us
    lm-eval 0.4.13    doc/inference.md's line with a task of our own: the accuracy of infer --tasks

Exit codes: 0 all as it should be, 1 not.
"""
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BIN = os.path.abspath(os.environ.get("BIN", ROOT))
FIXTURES = os.path.join(ROOT, "test/fixtures")
CODE = os.path.join(ROOT, "modeling_retrofit.py")
MODELS = ("tiny", "llama3", "head64", "olmo2", "qwen2", "qwen3")
STYLES = ("llama2_style", "llama3_style", "olmo2_style", "qwen2_style", "smollm_style")
TORCH = ["torch==2.15.0", "numpy==2.4.6"]
ENVIRONMENTS = {
    "transformers-4.57.1": ["transformers==4.57.1"],
    "transformers-5.23.0": ["transformers==5.23.0"],
    "lm-eval-transformers-4.57.1": ["lm_eval[hf]==0.4.13", "transformers==4.57.1"],
    "lm-eval-transformers-5.23.0": ["lm_eval[hf]==0.4.13", "transformers==5.23.0"],
}
counts = {"passed": 0, "failed": 0}


def check(ok, what):
    counts["passed" if ok else "failed"] += 1
    if not ok:
        print(f"FAILED {what}")


def run(*command, **options):
    """stdout of a program; the script ends where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def convert(*arguments):
    run(os.path.join(BIN, "convert"), *arguments)


def infer(*arguments):
    return run(os.path.join(BIN, "infer"), *arguments)


# ---- Outside: environments and files ------------------------------------------------------------
def site_packages(environment):
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return os.path.join(environment, "lib", version, "site-packages")


def make_environment(place, name, packages):
    """One that sees the packages of PLACE/torch too. Returns its python."""
    path = os.path.join(place, name)
    python = os.path.join(path, "bin/python")
    if not os.path.exists(python):
        run(sys.executable, "-m", "venv", path)
        if name != "torch":
            with open(os.path.join(site_packages(path), "torch.pth"), "w") as link:
                link.write(site_packages(os.path.join(place, "torch")) + "\n")
        run(python, "-m", "pip", "install", "-q", *packages)
    return python


def fixture_models():
    return [name for name in MODELS if os.path.isdir(os.path.join(FIXTURES, name))]


def write_models(work):
    """What a user would have: plain models rewritten, recurrent ones with the modelling code."""
    for name in fixture_models():
        source = os.path.join(FIXTURES, name)
        convert("--from", f"{source}/base", "--to", f"{work}/{name}.plain")
        convert("--from", f"{source}/recurrent", "--to", f"{work}/{name}", "--hf-code", CODE)
    lookup = os.path.join(FIXTURES, "lookup/base")
    layers = ("--prelude", "0", "--core", "1", "--coda", "2")
    convert("--from", lookup, "--to", f"{work}/lookup.plain")
    convert("--from", lookup, "--to", f"{work}/lookup", *layers, "--hf-code", CODE)
    gguf = os.path.join(FIXTURES, "reports/gguf_rope_a/model.gguf")
    convert("--from", gguf, "--to", f"{work}/gguf")
    for style in STYLES:
        write_tokenizer(os.path.join(FIXTURES, "tokenizers", style), f"{work}/{style}")


def write_tokenizer(source, target):
    """With a class by which transformers 4 and 5 follow tokenizer.json, or do what it says."""
    os.mkdir(target)
    shutil.copy(os.path.join(source, "tokenizer.json"), target)
    with open(os.path.join(source, "tokenizer_config.json")) as file:
        config = json.load(file)
    if config["tokenizer_class"] != "Qwen2Tokenizer":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    with open(os.path.join(target, "tokenizer_config.json"), "w") as file:
        json.dump(config, file)


def check_lm_eval(python, work, name):
    """The line of doc/inference.md, but for the task, which is the demo's."""
    tasks, count = os.path.join(work, "tasks.jsonl"), 128
    with open(os.path.join(FIXTURES, "lookup/tasks.jsonl")) as file:
        lines = file.readlines()[:count]
    with open(tasks, "w") as file:
        file.writelines(lines)
    os.makedirs(f"{work}/task", exist_ok=True)
    metric = {"aggregation": "mean", "higher_is_better": True}
    task = {
        "task": "lookup",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": tasks}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [dict(metric, metric="acc"),
                        {"metric": "perplexity", "aggregation": "perplexity",
                         "higher_is_better": False}],
    }
    with open(f"{work}/task/lookup.yaml", "w") as file:
        json.dump(task, file)  # JSON is YAML
    model = f"{work}/lookup"
    arguments = f"pretrained={model},mean_recurrence=4,trained_state_init=zero,dtype=float32"
    run(os.path.join(os.path.dirname(python), "lm_eval"), "--model", "hf", "--tasks", "lookup",
        "--include_path", f"{work}/task", "--batch_size", "16", "--output_path", f"{work}/{name}",
        "--model_args", f"{arguments},trust_remote_code=True",
        env=offline(work, HF_DATASETS_OFFLINE="1"))
    found = []
    for folder, _, files in os.walk(f"{work}/{name}"):
        found += [os.path.join(folder, file) for file in files if file.startswith("results")]
    with open(found[0]) as file:
        theirs = json.load(file)["results"]["lookup"]
    ours = json.loads(infer("--model", model, "--tasks", tasks, "--recurrences", "4", "--json",
                            "--state-init", "zero"))
    accuracy, loss = ours["results"][0]["acc"], ours["results"][0]["loss"]
    check(abs(theirs["acc,none"] - accuracy) < 1e-6, f"{name}: accuracy {theirs} {ours}")
    check(abs(math.log(theirs["perplexity,none"]) - loss) < 1e-4, f"{name}: loss {theirs} {ours}")


def offline(work, **more):
    more.update(HF_HOME=f"{work}/home", HF_HUB_OFFLINE="1", PYTHONWARNINGS="ignore",
                TQDM_DISABLE="1")
    return dict(os.environ, **more)


def outside(place):
    os.makedirs(place, exist_ok=True)
    make_environment(place, "torch", TORCH)
    pythons = {name: make_environment(place, name, packages)
               for name, packages in ENVIRONMENTS.items()}
    with tempfile.TemporaryDirectory() as work:
        write_models(work)
        for name, python in pythons.items():
            if name.startswith("lm-eval"):
                check_lm_eval(python, work, name)
                continue
            done = subprocess.run([python, os.path.abspath(__file__), "--inside", work],
                                  stdout=subprocess.PIPE, text=True, env=offline(work))
            print(f"{name}: {done.stdout}", end="")
            numbers = re.search(r"(\d+) passed, (\d+) failed", done.stdout)
            check(numbers and done.returncode == 0, f"{name}: exit code {done.returncode}")
            for key, number in zip(("passed", "failed"), numbers.groups() if numbers else ()):
                counts[key] += int(number)


# ---- Inside one of the environments -------------------------------------------------------------
def read_tensors(path):
    import torch
    types = {"F32": torch.float32, "I32": torch.int32, "I64": torch.int64}
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
        data = file.read()
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        flat = torch.frombuffer(bytearray(data[begin:end]), dtype=types[entry["dtype"]])
        tensors[name] = flat.reshape(entry["shape"])
    return tensors


def load(directory, dtype="float32"):
    import torch
    import transformers
    key = "dtype" if transformers.__version__ >= "4.56" else "torch_dtype"
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, **{key: getattr(torch, dtype)})


def close(a, b, limit, what):
    error = float((a.double() - b.double()).norm() / b.double().norm())
    check(error < limit, f"{what}: relative error {error:.1e}, not below {limit:.0e}")


def our_logits(work, directory, tokens, *options):
    out = os.path.join(work, "logits.safetensors")
    ids = ",".join(str(int(token)) for token in tokens)
    infer("--model", directory, "--tokens", ids, "--logits", out, *options)
    return read_tensors(out)["logits"]


def same_text(work, directory, model, *options, **more):
    """Greedy text of a few prompts, by both."""
    import torch
    import transformers
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    with open(os.path.join(FIXTURES, "lookup/tasks.jsonl")) as file:
        prompts = [json.loads(file.readline())["prompt"] for _ in range(4)]
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            text = model.generate(ids, max_new_tokens=12, do_sample=False, **more)[0]
        theirs = tokenizer.decode(text[ids.shape[1]:], skip_special_tokens=True)
        ours = infer("--model", directory, "--prompt", prompt, "--max-tokens", "12", *options)
        ours = ours.removeprefix(prompt).removesuffix("\n")
        check(ours.strip() == theirs.strip(), f"{directory}: {prompt!r}: {ours!r}, not {theirs!r}")


def check_plain(work):
    import torch
    for name in fixture_models():
        directory = f"{work}/{name}.plain"
        numbers = read_tensors(os.path.join(FIXTURES, name, "forward_backward.safetensors"))
        tokens = numbers["tokens"].long()
        model = load(directory)
        with torch.no_grad():
            logits = model(tokens).logits
        close(logits, numbers["base.logits"], 1e-5, f"{directory}: the authors' logits")
        close(our_logits(work, directory, tokens[0]), logits[0], 1e-5, f"{directory}: ours")
        saved = tempfile.mkdtemp(dir=work)
        model.save_pretrained(saved)
        close(our_logits(work, saved, tokens[0]), logits[0], 1e-5, f"{directory}: saved again")
    directory = f"{work}/lookup.plain"
    same_text(work, directory, load(directory))


def check_tokenizers(work):
    import transformers
    for style in STYLES:
        tokenizer = transformers.AutoTokenizer.from_pretrained(f"{work}/{style}")
        saved = f"{work}/{style}.saved-by-{transformers.__version__}"
        tokenizer.save_pretrained(saved)
        with open(os.path.join(FIXTURES, "tokenizers", style, "cases.json")) as file:
            cases = json.load(file)
        for case in cases:
            ids = tokenizer(case["text"])["input_ids"]
            check(ids == case["ids_with_special"], f"{style}: {case['text']!r}: {ids}")
        for text in ("Hello, world 123", "  two  spaces\n"):
            ours = infer("--tokenizer", saved, "--prompt", text, "--print-tokens").split()
            ids = tokenizer(text)["input_ids"]
            check([int(id) for id in ours] == ids, f"{saved}: {text!r}: {ours}, not {ids}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(f"{work}/gguf")
    for text in ("the cat", " Hello  world! 12"):
        ours = infer("--tokenizer", f"{work}/gguf", "--prompt", text, "--print-tokens").split()
        ids = tokenizer(text)["input_ids"]
        check([int(id) for id in ours] == ids, f"GGUF: {text!r}: {ours}, not {ids}")


def check_runs(model, numbers, name):
    """Losses, logits and gradients with n recurrences without and k with gradient. One more token
    makes the labels, which the authors hold against the logits beside them, those of the next."""
    import torch
    tokens, labels, state = numbers["tokens"].long(), numbers["labels"].long(), numbers["s0"]
    none = torch.full_like(labels[:, :1], -100)
    longer = {
        "input_ids": torch.cat((tokens, tokens[:, :1]), dim=1),
        "labels": torch.cat((none, labels), dim=1),
        "initial_state": torch.cat((state, state[:, :1]), dim=1),
    }
    for key in numbers:
        found = re.fullmatch(r"n(\d+)k(\d+)\.loss", key)
        if not found:
            continue
        run = key.removesuffix(".loss")
        model.zero_grad()
        output = model(num_steps=(int(found[1]), int(found[2])), **longer)
        output.loss.backward()
        close(output.loss.detach(), numbers[key], 1e-5, f"{name} {run}: loss")
        close(output.logits.detach()[:, :-1], numbers[f"{run}.logits"], 1e-5, f"{name} {run}")
        for label, parameter in model.named_parameters():
            close(parameter.grad, numbers[f"{run}.grad.{label}"], 1e-4, f"{name} {run}: {label}")


def check_generation(model, tokens, name):
    """With a cache as without, in a row with padding as alone."""
    import torch
    more = {"num_steps": 3, "initial_state": "zero"}
    row, short = tokens[:1, :8], tokens[:1, 1:5]
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **more}
    expected = row
    for _ in range(8):
        logits = model(expected, **more).logits[:, -1:]
        expected = torch.cat((expected, logits.argmax(-1)), dim=1)
    check(torch.equal(model.generate(row, **greedy), expected), f"{name}: with a cache")
    pad = torch.zeros(1, 4, dtype=torch.long)
    mask = torch.tensor([[1] * 8, [0] * 4 + [1] * 4])
    rows = torch.cat((row, torch.cat((pad, short), dim=1)))
    both = model.generate(rows, attention_mask=mask, **greedy)
    alone = model.generate(short, **greedy)
    check(torch.equal(both[:1], expected), f"{name}: the longer row of two")
    check(torch.equal(both[1:, 8:], alone[:, 4:]), f"{name}: the shorter, padded on the left")
    right = model(torch.cat((short, pad), dim=1), attention_mask=mask.flip(-1)[1:], **more).logits
    close(right[:, :4], model(short, **more).logits, 1e-5, f"{name}: padded on the right")
    model.generate(row, max_new_tokens=4, num_beams=2, pad_token_id=0, **more)


def check_saved(work, directory, model, tokens, logits):
    """infer's logits of convert's files, and of those that save_pretrained makes of them."""
    import torch
    saved = tempfile.mkdtemp(dir=work)
    model.save_pretrained(saved)
    again = load(saved)(tokens, num_steps=8, initial_state="zero").logits
    check(torch.equal(again, logits), f"{directory}: saved and loaded")
    for files in (directory, saved):
        ours = our_logits(work, files, tokens[0], "--recurrences", "8", "--state-init", "zero")
        close(ours, logits[0], 1e-5, f"{directory}: infer on {files}")


def check_bf16(directory, model, tokens):
    """Within twice what rounding explains: eight roundings a block, each of 2^-9."""
    config, options = model.config, {"num_steps": 2, "initial_state": "zero"}
    ends = config.n_layers_in_prelude + config.n_layers_in_coda
    blocks = ends + 2 * config.n_layers_in_recurrent_block
    rounded = load(directory, "bfloat16")(tokens, **options).logits
    limit = 2 * 2**-9 * math.sqrt(8 * blocks)
    close(rounded, model(tokens, **options).logits, limit, f"{directory}: bf16")


def check_recurrent(work):
    import torch
    for name in fixture_models():
        directory = f"{work}/{name}"
        numbers = read_tensors(os.path.join(FIXTURES, name, "forward_backward.safetensors"))
        tokens = numbers["tokens"].long()
        model = load(directory)
        check_runs(model, numbers, name)
        with torch.no_grad():
            check_generation(model, tokens, name)
            for r in (1, 2, 4, 8):
                logits = model(tokens[:1], num_steps=r, initial_state="zero").logits
                close(logits, numbers[f"zero.r{r}.logits"], 1e-5, f"{name}: r = {r}")
            check_saved(work, directory, model, tokens[:1], logits)
            check_bf16(directory, model, tokens)
            drawn = model(tokens[:1], num_steps=2, initial_state="normal").logits
            check(bool(drawn.isfinite().all()), f"{name}: a normal start state")
    directory = f"{work}/lookup"
    options = ("--recurrences", "4", "--state-init", "zero")
    same_text(work, directory, load(directory), *options, num_steps=4, initial_state="zero")


def inside(work):
    import transformers
    transformers.logging.set_verbosity_error()
    check_plain(work)
    check_tokenizers(work)
    check_recurrent(work)


def main():
    if sys.argv[1:2] == ["--inside"]:
        inside(sys.argv[2])
    elif len(sys.argv) == 2:
        outside(os.path.abspath(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as place:
            outside(place)
    print(f"{counts['passed']} passed, {counts['failed']} failed")
    sys.exit(counts["failed"] > 0)


if __name__ == "__main__":
    main()
