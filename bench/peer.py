#!/usr/bin/env python3
"""Alternates ./run bench and llama-bench and prints medians and their ratio. Called by peer.sh."""
import argparse
import json
import os
import re
import statistics
import subprocess
import sys

RUN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "run")


def ours(model, work, n, depth, ratio, threads, kv="f16"):
    """Tokens/s of one row of ./run bench; `score` gives seconds of scoring over seconds of reading."""
    prompt, depths = (n, 0) if work == "prefill" else (1, depth)
    args = [RUN, "bench", model, "--prompt", str(prompt), "--depth", str(depths), "--ratio", str(ratio), "--batch", "1",
            "-n", str(n if work == "decode" else 1), "-j", str(threads), "--kv", kv, "--json", "-q"]
    rows = [json.loads(line) for line in subprocess.run(args, stdout=subprocess.PIPE, check=True).stdout.splitlines()]
    return [r["tokens_per_s"] for r in rows if r["work"] == work and r["ratio"] == ratio][-1]


def peer(bench, model, work, n, depth, threads, flash):
    args = [bench, "-m", model, "-t", str(threads), "-r", "1", "-o", "json", "-fa", str(flash), "-d", str(depth),
            "-p", str(n if work == "prefill" else 0), "-n", str(n if work == "decode" else 0)]
    out = subprocess.run(args, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True).stdout
    return json.loads(out)[0]["avg_ts"]


def batched(bench, models, batch, depth, threads):
    """Tokens/s of `batch` sequences together after a shared context of `depth` tokens: the peer's and ours."""
    tool = os.path.join(os.path.dirname(bench), "llama-batched-bench")
    args = [tool, "-m", os.path.join(models, "q8_0.gguf"), "-t", str(threads), "-tb", str(threads), "-c", str(2 * depth + 4096),
            "-npp", str(depth), "-ntg", "32", "-npl", str(batch), "-pps", "-kvu"]
    out = subprocess.run(args, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True).stdout.decode()
    theirs = [float(line.split("|")[8]) for line in out.splitlines() if re.match(rf"\|\s+{depth} ", line)][-1]
    args = [RUN, "bench", os.path.join(models, "q8.kvz"), "--prompt", "1", "--depth", str(depth), "--ratio", "1", "--batch",
            str(batch), "-n", "32", "-j", str(threads), "--json", "-q"]
    rows = [json.loads(line) for line in subprocess.run(args, stdout=subprocess.PIPE, check=True).stdout.splitlines()]
    return theirs, [r["tokens_per_s"] for r in rows if r["work"] == "decode"][-1]


def print_row(title, pairs):
    ratios = sorted(ours / theirs for theirs, ours in pairs)
    theirs, ours = (statistics.median(p[i] for p in pairs) for i in (0, 1))
    print(f"{title:36}{theirs:12.1f}{ours:12.1f}{statistics.median(ratios):8.2f}  ({ratios[0]:.2f}, {ratios[-1]:.2f})",
          flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("bench")
    p.add_argument("models")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4)
    p.add_argument("--prompt", default="512,2048")
    p.add_argument("--depth", type=int, default=8192)
    p.add_argument("--batch", default="1,4,8")
    a = p.parse_args()
    at = lambda name: os.path.join(a.models, name)
    # title, work, tokens, depth, ratio kept here, our weights, the peer's
    cells = [(f"prefill {n}", "prefill", int(n), 0, 1, "q8.kvz", "q8_0.gguf") for n in a.prompt.split(",")]
    cells += [("decode, empty cache, q8", "decode", 64, 0, 1, "q8.kvz", "q8_0.gguf"),
              ("decode, empty cache, q4", "decode", 64, 0, 1, "q4.kvz", "q4_0.gguf"),
              ("decode, empty cache, 16 bit", "decode", 64, 0, 1, "f16.kvz", "bf16.gguf")]
    if a.depth:
        cells += [(f"decode at {a.depth}, q8", "decode", 32, a.depth, 1, "q8.kvz", "q8_0.gguf"),
                  (f"decode at {a.depth}, q8, kvzip 0.3", "decode", 32, a.depth, 0.3, "q8.kvz", "q8_0.gguf")]
    print(f"{'tokens/s, median of ' + str(a.rounds):36}{'llama.cpp':>12}{'kvzip.c':>12}{'ratio':>8}  (lowest, highest ratio)")
    for title, work, n, depth, ratio, mine, theirs in cells:
        flash = max((0, 1), key=lambda fa: peer(a.bench, at(theirs), work, n, depth, a.threads, fa))
        pairs = []
        for _ in range(a.rounds):
            pairs.append((peer(a.bench, at(theirs), work, n, depth, a.threads, flash),
                          ours(at(mine), work, n, depth, ratio, a.threads)))
        print_row(title, pairs)
    for batch in map(int, a.batch.split(",") if a.batch else []):
        print_row(f"decode, {batch} on one 2K context", [batched(a.bench, a.models, batch, 2048, a.threads)
                                                         for _ in range(a.rounds)])


if __name__ == "__main__":
    sys.exit(main())
