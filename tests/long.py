#!/usr/bin/env python3
"""long.py: a context of 131,072 tokens on a tiny model with one global layer: read, scored, evicted and asked; memory
grows as `run info` says. Part of .ci/run; takes half a minute.

    python3 tests/long.py
"""
import json
import os
import random
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
RUN, MODEL = os.path.join(HERE, "..", "run"), os.path.join(HERE, "fixtures", "gemma3.kvz")
SHORT, LONG, RATIO = 8192, 131072, 0.3
results = []


def check(ok, what):
    results.append(ok)
    if not ok:
        print("long: " + what)


def run(*args):
    """-> rows of JSON, stderr, peak memory in bytes of this child (a process of its own tells it apart)."""
    code = ("import json,resource,subprocess,sys;r=subprocess.run(sys.argv[1:],capture_output=True,text=True);"
            "m=resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss;print(json.dumps([r.returncode,r.stdout,r.stderr,m]))")
    out = subprocess.run([sys.executable, "-c", code, RUN, *args], stdout=subprocess.PIPE, check=True).stdout
    status, stdout, stderr, peak = json.loads(out)
    check(status == 0, f"run {args[0]}: {stderr}")
    return [json.loads(line) for line in stdout.splitlines()], stderr, peak * (1 if sys.platform == "darwin" else 1024)


def compress(folder, n):
    rng = random.Random(1)
    ids = os.path.join(folder, f"{n}.ids")
    cache = os.path.join(folder, f"{n}.kvc")
    with open(ids, "w") as f:
        f.write(" ".join(str(rng.randrange(10, 300)) for _ in range(n)))
    rows, stderr, peak = run("compress", MODEL, "--ids", ids, "-o", cache, "--ratio", str(RATIO), "--score-attn",
                             "local", "--json")
    return rows[0], stderr, peak, cache


def main():
    info = run("info", MODEL, "--json")[0][0]
    with tempfile.TemporaryDirectory() as folder:
        _, _, short_peak, _ = compress(folder, SHORT)
        row, stderr, peak, cache = compress(folder, LONG)
        check(f"{LONG} positions" in stderr, "no warning about positions past the trained length")
        pairs = info["kv_heads"] * LONG  # of the one global layer
        check(row["n_ctx"] == LONG and abs(row["kept"] - int(pairs * RATIO) / pairs) < 1e-8, f"kept {row['kept']}")
        # Pairs of the cache, and 5 bytes a pair for its score and whether it stays.
        want = (LONG - SHORT) * (info["cache_token_f16"] + info["cache_token_read"] + 5 * info["kv_heads"])
        check(abs(peak - short_peak - want) <= 0.05 * want,
              f"{LONG - SHORT} more tokens took {(peak - short_peak) / 1e6:.1f} MB, run info says {want / 1e6:.1f} MB")
        check(os.path.getsize(cache) < 0.35 * LONG * info["cache_token_f16"], "the saved cache is not small")
        answer = run("ask", MODEL, cache, "Who?", "-n", "4", "--ignore-eos", "--raw", "--json")[0][0]
        check(answer["n_answer"] == 4, "no answer after 131,072 tokens")
        print(f"{LONG} tokens read in {row['prefill_s']:.1f} s, scored in {row['score_s']:.1f} s; "
              f"peak memory {peak / 1e6:.1f} MB, of it {(peak - short_peak) / 1e6:.1f} MB for tokens past {SHORT} "
              f"(run info: {want / 1e6:.1f} MB)")
    failed = results.count(False)
    print(f"long: {len(results) - failed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
