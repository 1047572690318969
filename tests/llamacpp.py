#!/usr/bin/env python3
"""llamacpp.py: ids and greedy texts of ten prompts, and perplexity, against llama.cpp on the same weights. By hand:

    tests/llamacpp.py LLAMA_CPP_BIN MODEL.gguf MODEL.kvz [--text FILE] [-n 32]

Both files hold the same numbers in f32 (llama-quantize to f32; export.py --type f32). Ids must be equal. Where a
text differs, both continuations are printed with the gap between our two likeliest tokens at that place: a gap
below 0.05 is a matter of rounding, and llama.cpp keeps its cache in half precision.
"""
import argparse
import ast
import json
import os
import re
import subprocess
import sys
import tempfile

import numpy as np
from safetensors.numpy import load_file

RUN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "run")
PROMPTS = ["The capital of France is", "Once upon a time, in a village by the sea,", "def fibonacci(n):\n    ",
           "Water boils at a temperature of", "Die Hauptstadt von Deutschland ist", "1, 2, 4, 8, 16,",
           "To make bread you need flour, water,", "Le chat est assis sur", "The largest planet of the solar system is",
           "Q: What is the opposite of hot?\nA:"]


def out(*args, **kw):
    return subprocess.run(args, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, **kw).stdout.decode()


def gap(model, text):
    """Difference of the two largest logits after the last token of a text."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "l")
        subprocess.run([RUN, "logits", model, "-p", text, "-o", path, "-q", "--kv", "f32"], check=True)
        last = np.sort(load_file(path)["logits"][-1])
    return last[-1] - last[-2]


def compare(a, prompt):
    tokenize = [os.path.join(a.bin, "llama-tokenize"), "-m", a.gguf, "-p", prompt, "--ids", "--log-disable", "--no-escape"]
    theirs = ast.literal_eval(out(*tokenize).strip().splitlines()[-1])
    ours = [int(i) for i in out(RUN, "tokenize", a.kvz, "-p", prompt, "--bos").split()]
    their_text = out(os.path.join(a.bin, "llama-completion"), "-m", a.gguf, "-p", prompt, "-n", str(a.n), "--temp", "0",
                     "-no-cnv", "--no-display-prompt", "--no-warmup", "--no-escape", "-t", "2", stdin=subprocess.DEVNULL)
    our_text = out(RUN, "generate", a.kvz, "-p", prompt, "-n", str(a.n), "--temp", "0", "-q")
    clean = lambda s: re.sub(r"\s*\[end of text\]\s*$", "", s).rstrip()
    x, y = clean(their_text), clean(our_text)
    x = x[len(prompt):] if x.startswith(prompt) else x
    y = y[len(prompt):] if y.startswith(prompt) else y
    same = 0
    while same < min(len(x), len(y)) and x[same] == y[same]:
        same += 1
    equal = same == min(len(x), len(y))
    print(f"ids {'equal' if ours == theirs else f'DIFFER {ours} {theirs}'}, "
          f"text {'equal' if equal else 'differs'}: {prompt!r}")
    if not equal:
        print(f"  theirs {x!r}\n  ours   {y!r}\n  gap of our logits there {gap(a.kvz, prompt + y[:same]):.3f} (about)")
    return ours == theirs, equal


def perplexity(a):
    theirs = subprocess.run([os.path.join(a.bin, "llama-perplexity"), "-m", a.gguf, "-f", a.text, "-t", "2", "-c", "512"],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True).stdout.decode()
    theirs = float(re.search(r"Final estimate: PPL = ([0-9.]+)", theirs).group(1))
    ours = json.loads(out(RUN, "eval", a.kvz, "--ppl", a.text, "--json", "-q"))["value"]
    print(f"perplexity: llama.cpp {theirs:.4f}, ours {ours:.4f}, {100 * (ours / theirs - 1):+.3f}%")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("bin")
    p.add_argument("gguf")
    p.add_argument("kvz")
    p.add_argument("--text")
    p.add_argument("-n", type=int, default=32)
    a = p.parse_args()
    results = [compare(a, prompt) for prompt in PROMPTS]
    print(f"{sum(r[0] for r in results)} of {len(results)} ids equal, {sum(r[1] for r in results)} texts equal")
    if a.text:
        perplexity(a)
    sys.exit(0 if all(r[0] for r in results) else 1)


if __name__ == "__main__":
    main()
