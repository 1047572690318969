#!/usr/bin/env python3
"""peer.py: runs llama.cpp and ./run in turn and prints what both reach. Called by peer.sh.

A race is some work for the peer and some calls of ./run bench with the rows that each call answers. The peer first
does the work once with every setting that a row allows, and each row keeps the fastest. Then come the rounds: before
each of our calls the peer runs with the settings that the call's rows need, so that the two figures of a ratio are
taken one after the other, on a machine in the same mood. Reading and scoring a long context is the expensive part:
one call gives all rows of a depth.
"""
import argparse
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from typing import NamedTuple

from newfile import new_file

RUN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "run")
TRAINED = 8192  # tokens SmolLM2 was trained for: beyond it only speed means something, and one round must do
LONG = 4096     # prompts from here on are read once a round; shorter ones three times
SHARED = 2048   # tokens of the context that several sequences share


class Setting(NamedTuple):
    """How the peer runs. repack: weights laid out anew for this CPU as they are loaded."""
    weights: str
    flash: bool = True
    cache: str = "f16"
    repack: bool = True

    def __str__(self):
        return (f"{self.weights.upper()}, fa {'on' if self.flash else 'off'}" +
                (f", {self.cache} cache" if self.cache != "f16" else "") + ("" if self.repack else ", no repack"))


class Work(NamedTuple):
    """What the peer does: reads a prompt, then that many sequences continue it for n tokens."""
    prompt: int
    n: int = 1
    batches: tuple = (1,)


class Row(NamedTuple):
    title: str
    metric: str     # of the peer: prefill, or decode and the number of sequences
    settings: list  # the peer's, of which the fastest is kept
    ours: dict      # fields that tell our row from the others of the call


class Call(NamedTuple):
    """A call of ./run bench and what is taken from it."""
    args: list
    rows: list
    scores: tuple = ()  # (title, full or local): seconds of scoring over seconds of reading


class Race(NamedTuple):
    work: Work
    calls: list


def output(args, errors=False, cwd=None):
    """-> what it prints; errors: to stderr as well."""
    done = subprocess.run(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=cwd)
    if done.returncode:
        raise RuntimeError(f"{' '.join(args)}\n{done.stderr.decode(errors='replace')[-2000:]}")
    return (done.stdout + (done.stderr if errors else b"")).decode(errors="replace")


class Bench:
    """Both programs, and the file that every figure goes to."""

    def __init__(self, a):
        self.a = a
        self.out = a.out
        self.tried = {}  # (setting, work) -> [figures]

    def log(self, **fields):
        if self.out:
            self.out.write(json.dumps(fields) + "\n")
            self.out.flush()

    def peer(self, s, work, rnd):
        """-> {"prefill": tokens/s, "decode 1": tokens/s, ..}"""
        repeats = 1 if work.prompt >= LONG or len(work.batches) > 1 else 3
        room = work.prompt + work.n * max(work.batches) + 512
        threads = str(self.a.threads)
        args = [os.path.join(os.path.abspath(self.a.bin), "llama-batched-bench"),
                "-m", s.weights + ".gguf", "-t", threads, "-tb", threads,
                "-c", str(room), "-pps", "-npp", ",".join([str(work.prompt)] * repeats), "-ntg", str(work.n),
                "-npl", ",".join(map(str, work.batches)), "-fa", "on" if s.flash else "off",
                "-ctk", s.cache, "-ctv", s.cache]
        if self.a.ik:
            args += ["-rtr"] if s.repack else []
        else:
            args += ["-kvu"] + ([] if s.repack else ["--no-repack"])
        # The fork prints its table to stderr, and writes a log where it is started.
        lines = output(args, errors=True, cwd=self.a.models).splitlines()
        cells = [line.split("|") for line in lines if re.match(r"\|\s*\d+ \|", line)]
        figures = {"prefill": statistics.median(float(c[6]) for c in cells)}
        for b in work.batches:
            figures[f"decode {b}"] = statistics.median(float(c[8]) for c in cells if int(c[3]) == b)
        self.log(who="peer", round=rnd, setting=s._asdict(), work=work._asdict(), tokens_per_s=figures)
        return figures

    def ours(self, args, rnd):
        """-> rows of ./run bench"""
        args = ["bench", *args, "-j", str(self.a.threads), "--json", "-q"]
        args += ["--isa", self.a.isa] if self.a.isa else []
        rows = [json.loads(line) for line in output([RUN, *args]).splitlines()]
        self.log(who="ours", round=rnd, args=args, rows=rows)
        return rows

    def fastest(self, settings, work, metric):
        """The setting with which the peer does most of `metric`. All are tried, twice where that is cheap."""
        if len(settings) == 1:
            return settings[0]
        new = [s for s in settings if (s, work) not in self.tried]
        for s in new * (1 if work.prompt >= LONG else 2):
            try:
                self.tried.setdefault((s, work), []).append(self.peer(s, work, "trial"))
            except RuntimeError:  # a cache type that this build or CPU lacks
                self.log(who="peer", round="trial", setting=s._asdict(), failed=True)
        return max(settings, key=lambda s: max((figures[metric] for figures in self.tried[s, work]), default=0))

    def race(self, race):
        """Runs the rounds and prints the rows. -> the peer's settings, {title: Setting}"""
        rows = [row for call in race.calls for row in call.rows]
        best = {row.title: self.fastest(row.settings, race.work, row.metric) for row in rows}
        pairs, scores = {row.title: [] for row in rows}, {}
        for rnd, call in itertools.product(range(self.a.rounds), race.calls):
            theirs = {s: self.peer(s, race.work, rnd) for s in dict.fromkeys(best[r.title] for r in call.rows)}
            ours = self.ours(call.args, rnd)
            for row in call.rows:
                mine = pick(ours, row.ours)["tokens_per_s"]
                pairs[row.title].append((theirs[best[row.title]][row.metric], mine))
            for title, attn in call.scores:
                score = pick(ours, {"work": "score", "score_attn": attn})
                read = pick(ours, {"work": "prefill", "n": score["n"]})
                scores.setdefault(title, []).append(score["seconds"] / read["seconds"])
        for title, both in pairs.items():
            print_row(title, both, best[title])
        for title, ratios in scores.items():
            print(f"| {title:39} | {'':>9} | {'':>9} | {spread(ratios)} | |", flush=True)
        return best


def pick(rows, fields):
    """The last row that has these values."""
    return [r for r in rows if all(r.get(k) == v for k, v in fields.items())][-1]


def spread(ratios):
    return f"{statistics.median(ratios):5.2f} | {min(ratios):5.2f} to {max(ratios):.2f}"


def print_row(title, pairs, setting):
    theirs, ours = (statistics.median(p[i] for p in pairs) for i in (0, 1))
    print(f"| {title:39} | {theirs:9.1f} | {ours:9.1f} | {spread([o / t for t, o in pairs])} | {setting} |", flush=True)


# ---- speed ----

def kernels(a, weights):
    """Settings that differ in what a short context can tell apart. llama.cpp repacks only quantized weights."""
    return [Setting(w, fa, repack=r) for w in weights for fa in (True, False) for r in (True, False)
            if r or a.ik or w.startswith("q")]


def prefill_races(a):
    for n in a.prompt:
        weights = ["q8_0", "q4_0"] + ([] if a.shape else ["bf16"])
        settings, ours = kernels(a, weights), {"work": "prefill", "n": n}
        args = ["--prompt", str(n), "--depth", "0", "--batch", "1", "-n", "1"]
        yield Race(Work(n), [Call([os.path.join(a.models, f"{mine}.kvz"), *args],
                                  [Row(f"prefill {n}, {mine}", "prefill", settings, ours)]) for mine in ("q8", "q4")])


def decode_races(a):
    for title, weights, mine in (("q8", ["q8_0"], "q8.kvz"), ("q4", ["q4_0"], "q4.kvz"),
                                 ("16 bit", ["f16", "bf16"], "f16.kvz"))[:2 if a.shape else 3]:
        row = Row(f"decode, empty cache, {title}", "decode 1", kernels(a, weights), {"work": "decode"})
        args = [os.path.join(a.models, mine), "--prompt", "1", "--depth", "0", "--batch", "1", "-n", "64"]
        yield Race(Work(1, 64), [Call(args, [row])])


def depth_race(a, n, prefill, decode):
    """prefill, decode: how the peer was fastest on shorter contexts; what long ones can change is tried again."""
    # Other types than f16 need the peer's flash attention. llama.cpp's is slower in bf16, its fork has kernels for it.
    caches = lambda s: [s._replace(flash=True), s._replace(flash=False),
                        *([s._replace(flash=True, cache="bf16")] if a.ik else [])]
    args = [a.q8, "--prompt", "1", "--depth", str(n), "--batch", "1", "-n", "32", "--ratio"]
    at = lambda ratio: {"work": "decode", "depth": n, "ratio": ratio}
    calls = [Call(args + ["1,0.3"],
                  [Row(f"prefill {n}, q8", "prefill", caches(prefill), {"work": "prefill", "n": n}),
                   Row(f"decode at {n}, q8", "decode 1", caches(decode), at(1)),
                   Row(f"decode at {n}, q8, KVzip 0.3", "decode 1", caches(decode), at(0.3))],
                  (("score full / prefill", "full"), ("score local / prefill", "local")))]
    if re.search(r"--kv TYPE\s.*\bq8\b", output([RUN, "bench", "-h"])):
        q8 = caches(decode) + [decode._replace(flash=True, cache="q8_0")]
        calls.append(Call(args + ["1,0.3", "--kv", "q8"],
                          [Row(f"decode at {n}, q8, q8 pages", "decode 1", q8, at(1)),
                           Row(f"decode at {n}, q8, KVzip 0.3, q8 pages", "decode 1", q8, at(0.3))]))
    calls.append(Call(args + ["1", "--chunk", "512"], [], (("score local / prefill, --chunk 512", "local"),)))
    return Race(Work(n, 32), calls)


def batch_race(a):
    rows = [Row(f"decode, {b} on one {SHARED // 1024}K context, q8", f"decode {b}",
                [Setting("q8_0", fa) for fa in (True, False)], {"work": "decode", "batch": b}) for b in a.batch]
    batches = ",".join(map(str, a.batch))
    args = [a.q8, "--prompt", "1", "--depth", str(SHARED), "--ratio", "1", "--batch", batches, "-n", "32"]
    return Race(Work(SHARED, 32, tuple(a.batch)), [Call(args, rows)])


def speed(bench):
    a = bench.a
    print(f"| {'tokens/s':39} | {a.name:>9} | {'kvzip.c':>9} | ratio | extremes | {a.name} at its best |\n"
          f"|{'-' * 41}|{'-' * 11}|{'-' * 11}|---|---|---|", flush=True)
    prefill = decode = Setting("q8_0")
    for race in prefill_races(a):
        prefill = list(bench.race(race).values())[0]
    for race in decode_races(a) if a.decode else ():
        best = list(bench.race(race).values())[0]
        decode = best if best.weights == "q8_0" else decode
    if a.depth:
        bench.race(depth_race(a, a.depth, prefill, decode))
    if a.batch:
        bench.race(batch_race(a))


# ---- cost against context length ----

def table(bench):
    a = bench.a
    print(f"| tokens | prefill s, {a.name} | prefill s | score full s | score local s | decode/s, {a.name} | "
          "decode/s | decode/s, KVzip 0.3 | cache MB | KVzip 0.3 MB | rounds |\n|" + "---|" * 11, flush=True)
    best = {}
    for n in (1024 << i for i in range(20)):
        if n > a.most:
            break
        work, rounds = Work(n, 32), a.rounds if n <= TRAINED else 1
        if n <= TRAINED or not best:
            flash = [Setting("q8_0", fa) for fa in (True, False)]
            best = {m: bench.fastest(flash, work, m) for m in ("prefill", "decode 1")}
        args = [a.q8, "--prompt", "1", "--depth", str(n), "--batch", "1", "-n", "32", "--ratio", "1,0.3"]
        lines = []
        for rnd in range(rounds):
            theirs = {s: bench.peer(s, work, rnd) for s in dict.fromkeys(best.values())}
            ours = bench.ours(args, rnd)
            full, kept = (pick(ours, {"work": "decode", "ratio": r}) for r in (1, 0.3))
            lines.append((n / theirs[best["prefill"]]["prefill"], pick(ours, {"work": "prefill", "n": n})["seconds"],
                          pick(ours, {"score_attn": "full"})["seconds"], pick(ours, {"score_attn": "local"})["seconds"],
                          theirs[best["decode 1"]]["decode 1"], full["tokens_per_s"], kept["tokens_per_s"],
                          full["cache_bytes"] / 1e6, kept["cache_bytes"] / 1e6))
        middle = [statistics.median(column) for column in zip(*lines)]
        cells = [f"{v:.2f}" if v < 10 else f"{v:.1f}" for v in middle]
        print(f"| {n} | {' | '.join(cells)} | {rounds} |", flush=True)


# ---- all of it ----

def machine(a):
    """What a reader needs to judge the figures."""
    cpu = [platform.processor() or platform.machine()]
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            cpu = [line.split(":")[1].strip() for line in f if line.startswith("model name")] or cpu
    git = ["git", "-C", os.path.dirname(RUN), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout.decode().strip()
    return {"date": time.strftime("%Y-%m-%d"), "cpu": cpu[0], "threads": a.threads, "isa": a.isa or "best", **({"shape": a.shape} if a.shape else {}),
            "commit": commit or "unknown", "peer": a.name, "build": a.bin, "rounds": a.rounds,
            "load": round(os.getloadavg()[0], 1)}


def integers(text):
    return [int(x) for x in text.split(",") if x]


def main():
    p = argparse.ArgumentParser(prog="peer.sh", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("bin", help="the peer's programs")
    p.add_argument("models", help="weights of both programs")
    p.add_argument("--name", default="llama.cpp")
    p.add_argument("--ik", action="store_true", help="the peer takes the flags of ik_llama.cpp")
    p.add_argument("--isa", help="for ./run")
    p.add_argument("--shape", help="the models have random weights of this shape: less is measured unless asked for")
    p.add_argument("--rounds", type=int, default=5)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    p.add_argument("--threads", type=int, default=cores)
    p.add_argument("--prompt", type=integers, help="prefill lengths; '' for none")
    p.add_argument("--no-decode", dest="decode", action="store_false", help="no rows with an empty cache")
    p.add_argument("--depth", type=int, help="context of the long rows; 0 for none")
    p.add_argument("--batch", type=integers, help="sequences on one context; '' for none")
    p.add_argument("--table", action="store_true", help="cost against context length instead")
    p.add_argument("--most", type=int, default=32768, help="the longest context of --table")
    p.add_argument("-o", dest="out", type=new_file, help="new file: every figure of every round, one JSON object a line")
    a = p.parse_args()
    usual = {"prompt": [512], "depth": SHARED, "batch": [1, 8]} if a.shape else {"prompt": [512, 2048], "depth": 8192, "batch": [1, 4, 8]}
    for name, value in usual.items():
        setattr(a, name, value if getattr(a, name) is None else getattr(a, name))
    a.q8 = os.path.join(a.models, "q8.kvz")
    bench, facts = Bench(a), machine(a)
    bench.log(**facts)
    if facts["load"] > 0.5:
        print(f"peer.sh: the machine is busy (load {facts['load']}): figures and ratios will not hold", file=sys.stderr)
    print(", ".join(f"{k} {v}" for k, v in facts.items() if k != "build"), flush=True)
    try:
        table(bench) if a.table else speed(bench)
    except RuntimeError as e:
        sys.exit(f"peer.sh: {e}")


if __name__ == "__main__":
    main()
