#!/usr/bin/env python3
"""peer_python.py: KVzip in Python (kvpress on transformers, bf16) and ./run compress in turn. Called by peer.sh --python.

Both get the same ids: the chat template's prefix and prose of this repository, cut to length. Theirs are the times of
a prefill alone, of a prefill under KVzipPress, which then repeats the context and chooses what goes, and of decoding
greedily after either. Ours are the times of the program from start to exit, file to file, and of `run ask` with the
file. kvpress masks what it evicts and keeps it in memory, so its decode does not become faster.
"""
import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time

os.environ.update(TRANSFORMERS_VERBOSITY="error", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")

import torch
import transformers
from kvpress import KVzipPress
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from newfile import new_file

HERE = os.path.dirname(os.path.abspath(__file__))
RUN = os.path.join(HERE, "..", "run")
PROSE = [os.path.join(HERE, "..", p) for p in ("eval/filler.txt", "demo/chronicle.txt")]
RATIO, STEPS = 0.3, 32


def load(gguf, folder):
    """The model in bf16. KVzipPress opens the tokenizer by the model's path, so it is saved to a folder of its own."""
    if not os.path.exists(os.path.join(folder, "config.json")):
        at = {"pretrained_model_name_or_path": os.path.dirname(gguf), "gguf_file": os.path.basename(gguf)}
        AutoTokenizer.from_pretrained(**at).save_pretrained(folder)
        AutoModelForCausalLM.from_pretrained(**at, dtype=torch.bfloat16).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def context(tokenizer, n):
    """-> ids, how many of them are the prefix: the template up to the context, then n tokens."""
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "####"}], tokenize=False,
                                         add_generation_prompt=True)
    prefix = tokenizer.encode(chat.split("####")[0], add_special_tokens=False)
    text = tokenizer.encode("\n".join(open(p).read() for p in PROSE), add_special_tokens=False)
    if len(text) < n:
        sys.exit(f"there are only {len(text)} tokens of prose")
    return prefix + text[:n], len(prefix)


def seconds(fn):
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def decode(model, cache, position):
    """Seconds a greedy step takes with this cache."""
    token = torch.tensor([[1]])

    def step(i):
        nonlocal token
        out = model(input_ids=token, past_key_values=cache, position_ids=torch.tensor([[position + i]]))
        token = out.logits[:, -1:].argmax(-1)

    step(0)
    return seconds(lambda: [step(i) for i in range(1, STEPS + 1)]) / STEPS


def theirs(model, ids):
    ids, plain, kept = torch.tensor([ids]), DynamicCache(), DynamicCache()
    read = seconds(lambda: model.model(input_ids=ids, past_key_values=plain))
    full = decode(model, plain, ids.shape[1])

    def compress():
        with KVzipPress(compression_ratio=1 - RATIO)(model):
            model.model(input_ids=ids, past_key_values=kept)

    return {"prefill": ids.shape[1] / read, "compress": seconds(compress), "decode": 1 / full,
            "decode kept": 1 / decode(model, kept, ids.shape[1])}


def ours(a, ids, n_prefix):
    out = {}
    with tempfile.TemporaryDirectory() as folder:
        cache, text = os.path.join(folder, "c.kvc"), os.path.join(folder, "ids")
        open(text, "w").write(" ".join(map(str, ids)))
        for ratio, name in ((1, "decode"), (RATIO, "decode kept")):
            args = [RUN, "compress", a.kvz, "--ids", text, "--n-prefix", str(n_prefix), "-o", cache,
                    "--ratio", str(ratio), "-j", str(a.threads), "--json", "-q"]
            start = time.perf_counter()
            row = json.loads(subprocess.run(args, stdout=subprocess.PIPE, check=True).stdout)
            out["compress"] = time.perf_counter() - start
            if ratio == 1:
                out["prefill"] = len(ids) / row["prefill_s"]
            args = [RUN, "ask", a.kvz, cache, "What is this about?", "-n", str(STEPS), "--ignore-eos",
                    "-j", str(a.threads), "--json", "-q"]
            out[name] = json.loads(subprocess.run(args, stdout=subprocess.PIPE, check=True).stdout)["tokens_per_s"]
    return out


def main():
    p = argparse.ArgumentParser(prog="peer.sh --python", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("gguf")
    p.add_argument("kvz", help="the same model for ./run")
    p.add_argument("folder", help="where transformers keeps it")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    p.add_argument("--tokens", default="852,3408", help="lengths of the context")
    p.add_argument("-o", dest="out", type=new_file, help="new file: every figure of every round, one JSON object a line")
    a = p.parse_args()
    logging.getLogger("kvpress").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(a.threads)
    torch.set_grad_enabled(False)
    model, tokenizer = load(a.gguf, a.folder)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, bf16, {a.threads} threads, "
          f"{a.rounds} rounds, {RATIO} of the pairs kept\n\n"
          "| work | kvpress | kvzip.c | ratio | extremes |\n|---|---|---|---|---|", flush=True)
    for n in map(int, a.tokens.split(",")):
        ids, n_prefix = context(tokenizer, n)
        rounds = []
        for i in range(a.rounds):
            rounds.append((theirs(model, ids), ours(a, ids, n_prefix)))
            if a.out:
                line = {"tokens": n, "round": i, "kvpress": rounds[-1][0], "kvzip.c": rounds[-1][1]}
                a.out.write(json.dumps(line) + "\n")
                a.out.flush()
        for key, title, unit in (("prefill", "prefill, full cache", "/s"), ("compress", "read, score, evict", " s"),
                                 ("decode", "decode, full cache", "/s"), ("decode kept", "decode, KVzip 0.3", "/s")):
            x, y = ([r[i][key] for r in rounds] for i in (0, 1))
            gain = [t / o if unit == " s" else o / t for t, o in zip(x, y)]
            print(f"| {n} tokens: {title} | {statistics.median(x):.1f}{unit} | {statistics.median(y):.1f}{unit} | "
                  f"{statistics.median(gain):.1f} | {min(gain):.1f} to {max(gain):.1f} |", flush=True)


if __name__ == "__main__":
    main()
