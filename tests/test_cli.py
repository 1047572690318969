#!/usr/bin/env python3
"""test_cli.py: the program as its users meet it, through the command line alone.

Every test runs ./run (or $RUN) on the committed fixtures (or those in $FIXTURES), tiny models with
random weights, and compares with the values that another implementation computed for them. Needs
nothing but Python's standard library. The last line says how many checks passed and failed.
"""
import contextlib
import fcntl
import glob
import json
import math
import os
import pty
import re
import resource
import select
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time

from checks import Tensors, check, end

HERE = os.path.dirname(os.path.abspath(__file__))
RUN = os.environ.get("RUN", os.path.join(os.path.dirname(HERE), "run"))
FIXTURES = os.environ.get("FIXTURES", os.path.join(HERE, "fixtures"))
LOGITS, SCORES = 3e-4, 1e-4  # tolerances of plain float32


# ---- files ----



def write(path, text):
    with open(path, "wb") as f:
        f.write(text if isinstance(text, bytes) else text.encode())
    return path


def write_ids(path, ids):
    return write(path, " ".join(map(str, ids)))


def shown(text):
    """Text of others as it leaves the program: what steers a terminal is visible."""
    def escape(c):
        return "\\r" if c[0] == "\r" else "\\x%02x" % ord(c[0]) if ord(c[0]) < 128 else "\\u%04x" % ord(c[0])
    return re.sub("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufffe\uffff]|\r(?!\n)", escape, text)


def distance(a, b):
    return max((abs(x - y) for x, y in zip(a, b)), default=0) if len(a) == len(b) else float("inf")


# ---- running ----

class Result:
    def __init__(self, p):
        self.code, self.out, self.err = p.returncode, p.stdout, p.stderr.decode("utf-8", "replace")

    def text(self):
        return self.out.decode("utf-8", "replace")

    def rows(self):
        return [json.loads(line) for line in self.out.splitlines()]


def run(*args, **options):
    options.setdefault("input", b"")
    command = [RUN] + [a if isinstance(a, bytes) else str(a) for a in args]
    return Result(subprocess.run(command, stdout=options.pop("stdout", subprocess.PIPE),
                                 stderr=subprocess.PIPE, timeout=300, **options))


def works(*args, **options):
    r = run(*args, **options)
    check(r.code == 0, "%s: exit %d, %s" % (" ".join(map(str, args)), r.code, r.err.strip()))
    return r


def fails(code, words, *args, **options):
    """Exit code, one line on stderr that holds the words, nothing on stdout."""
    r = run(*args, **options)
    name = " ".join(str(a)[:60] for a in args)
    check(r.code == code, "%s: exit %d instead of %d: %s" % (name, r.code, code, r.err.strip()))
    last = r.err.strip().split("\n")[-1]
    check(last.startswith("run: ") and words in last, "%s: %r, not %r" % (name, r.err, words))
    check(not r.out, "%s: output in spite of the failure" % name)


class Model:
    def __init__(self, name):
        self.name, self.path = name, os.path.join(FIXTURES, name + ".kvz")
        self.expected = Tensors(os.path.join(FIXTURES, name, "expected.safetensors"))
        self.context = list(self.expected["kvzip.prefix"]) + list(self.expected["kvzip.ctx"])
        self.n_prefix = len(self.expected["kvzip.prefix"])
        extra = len(self.expected["kvzip.ask_first"]) + len(self.expected["kvzip.postfix"])
        self.chunk = self.expected["kvzip.pass_offsets"][1] - extra

    def context_flags(self, directory):
        ids = write_ids(os.path.join(directory, "context.ids"), self.context)
        return ["--ids", ids, "--n-prefix", self.n_prefix, "--chunk", self.chunk, "--kv", "f32"]


# ---- usage ----

COMMANDS = ["generate", "chat", "compress", "ask", "score", "map", "logits", "tokenize", "bench", "eval",
            "calibrate", "info"]


def test_usage(m):
    r = run()
    check(r.code == 2 and "usage: run" in r.err and not r.out, "run alone prints the usage, exit 2")
    r = works("-h")
    check(all("run " + c in r.text() for c in COMMANDS) and not r.err, "run -h lists the commands")
    for c in COMMANDS:
        r = works(c, "-h")
        check(r.text().startswith("usage: run " + c) and "examples:" in r.text(), c + " -h")
        check(works(c, m.path, "x", "--json", "-h").out == r.out, c + ": -h anywhere")
    check(run("generate", m.path, "-p", "-h", "-n", "1").code == 0, "-h as a value is a value")
    fails(2, "unknown command 'frobnicate'", "frobnicate")
    fails(2, "needs MODEL", "generate")
    fails(2, "unexpected argument 'two'", "generate", m.path, "two")
    fails(2, "unknown flag --bogus", "info", m.path, "--bogus")
    fails(2, "unknown flag -x", "generate", m.path, "-x")
    fails(2, "--json takes no value", "generate", m.path, "--json=yes")
    fails(2, "-n: its value N is missing", "generate", m.path, "-p", "a", "-n")
    for value in ["abc", "-5", "", "1e3", "99999999999"]:
        fails(2, "-n %s: needs a whole number" % value, "generate", m.path, "-p", "a", "-n", value)
    for value in ["1.5", "nan", "-0.1", "0", "inf", "x", ""]:
        fails(2, "--ratio %s: needs a number" % value, "compress", m.path, "-p", "a", "-o", "x",
              "--ratio", value)
    for flag, value in [("--temp", "-1"), ("--top-p", "1.1"), ("-j", "0"), ("--seed", "x")]:
        fails(2, "%s %s: needs" % (flag, value), "generate", m.path, "-p", "a", flag, value)
    fails(2, "--kv q9: needs f16, f32, q8, q4, q2 or keys/values", "generate", m.path, "-p", "a", "--kv", "q9")
    fails(2, "--level x: there are pair layer uniform", "compress", m.path, "-o", "x", "-p", "a", "--level", "x")
    fails(2, "--isa mmx", "generate", m.path, "-p", "a", "--isa", "mmx")
    score = ["score", m.path, "-p", "a", "-o", "/tmp/x"]
    fails(2, "--policy best: there are kvzip", *score, "--policy", "best")
    fails(2, "no parameter 'window'", *score, "--set", "window=3")
    fails(2, "window needs a whole number from 1", *score, "--policy", "snapkv", "--set", "window=0")
    fails(2, "needs key=value", *score, "--set", "window")
    fails(2, "only one of", "generate", m.path, "-p", "a", "-f", "b")
    fails(2, "needs -p TEXT", "compress", m.path, "-o", "/tmp/x")
    fails(2, "needs -o", "compress", m.path, "-p", "a")
    fails(2, "--depth 5,x", "bench", m.path, "--depth", "5,x")


def test_flags(m, d):
    """A flag counts once, together with what it fits, and one that says the default changes nothing."""
    text, out = ["-p", "The code of Chen is 12. " * 20], ["-o", d + "/flags.kvc"]
    compress = ["compress", m.path, *text, *out]
    fails(2, "-f is given twice", "score", m.path, "-f", m.path, "-f", m.path, *out)
    fails(2, "--ratio is given twice", *compress, "--ratio", 0.5, "--ratio=0.2")
    fails(2, "window is given twice", *compress, "--policy", "snapkv", "--set", "window=8,window=9")
    for flag, values in [("-n", [" 5", "0x10", "+5", "5abc", "1e1"]), ("--temp", [" 1", "0x1", "nan", "inf", "1abc", "+1"]),
                         ("-j", ["0", "", "1e0"]), ("--seed", ["-1", " 7"]), ("--top-p", ["0x1p-1", "nan"])]:
        for v in values:
            fails(2, "%s %s: needs" % (flag, v), "generate", m.path, "-p", "a", flag, v)
    short = ["generate", m.path, "--temp", "0", "-q"]
    check(works(*short, "-pThe code", "-n5", "-j1").out == works(*short, "-p", "The code", "-n", "5", "-j", "1").out, "-n5, -j1")
    for bad, says in (("-q3", "unknown flag -q3"), ("-x3", "unknown flag -x3"), ("-n5x", "-n 5x: needs"), ("-nn", "-n n: needs")):
        fails(2, says, *short, "-p", "a", bad)
    release = works("--version").out.decode()
    with open(os.path.join(HERE, "..", "python", "kvzip.py")) as f:
        check(works("version").out.decode() == release == "kvzip.c %s\n" % re.search('__version__ = "(.*)"', f.read())[1], "--version: " + release)
    fails(2, "needs at most 16 whole numbers", "bench", m.path, "--prompt", "1.5")
    fails(2, "needs a whole number", *compress, "--policy", "snapkv", "--set", "window=0x8")
    for words, flags in [("--budget says already", ["compress", *compress[1:], "--budget", 9, "--ratio", 0.5]),
                         ("--window has no effect", [*compress, "--window", 9]),
                         ("--system has no effect", [*compress, "--raw", "--system", "x"]),
                         ("--task has no effect", ["score", m.path, "--ids", d + "/x", *out, "--task", "x"]),
                         ("--policy has no effect", ["generate", m.path, "-p", "a", "--policy", "knorm"]),
                         ("--level has no effect", ["chat", m.path, "--ratio", 1, "--level", "pair"]),
                         ("--bos has no effect", ["tokenize", m.path, "--decode", "--bos"]),
                         ("--ratio has no effect", ["eval", "--merge", d + "/x", "--ratio", 1]),
                         ("--policy has no effect", ["eval", m.path, "--ppl", d + "/x", "--policy", "knorm"])]:
        fails(2, words, *flags)
    for words, flags in [("--seed has no effect", ["generate", m.path, "-p", "a", "-n", 1, "--temp", 0, "--seed", 1]),
                         ("--policy has no effect", [*compress, "--ratio", 1, "--policy", "knorm"])]:
        check("run: warning: " + words in works(*flags).err and words not in works(*flags, "-q").err, words)

    def cache(*flags):
        works(*compress, "-q", *flags)
        return open(d + "/flags.kvc", "rb").read()
    profile = d + "/flags.kvp"
    works("calibrate", m.path, "-f", write(d + "/flags.txt", SAMPLE), "-o", profile, "-q", "--chunk", 50)
    with_it = ["--profile", profile]
    plain, by_profile = cache(), cache(*with_it)
    for flags in [["--policy", "kvzip"], ["--level", "pair"], ["--ratio", "0.3"], ["--score-attn", "full"], ["--chunk", "2000"],
                  ["--kv", "f16"], ["--policy", "kvzip", "--level", "pair", "--ratio", "0.3"]]:
        check(cache(*flags) == plain, "%s, the default, changes the cache" % flags)
    for flags in [["--policy", "expected"], ["--level", "profile"], ["--policy", "expected", "--level", "profile"]]:
        check(cache(*with_it, *flags) == by_profile, "%s, the default with a profile, changes the cache" % flags)
    r = works(*compress, *with_it, "--json")
    row, facts = r.rows()[0], info(d + "/flags.kvc")
    want = {"policy": "expected", "level": "profile", "profile": profile}
    check(all(row[k] == v == facts[k] for k, v in want.items()), "what was chosen: %s %s" % (row, facts))
    check("[policy expected, level profile, profile %s" % profile in r.err, "what was chosen is said: %s" % r.err)
    works(*compress, "--policy", "snapkv", "--set", "window=8")
    facts = info(d + "/flags.kvc")
    check((facts["policy"], facts["level"], facts["profile"], facts["set"]) == ("snapkv", "pair", "none", "window=8"), "info: %s" % facts)
    works(*compress, "--budget", 20)
    check(info(d + "/flags.kvc")["budget"] == "20", "info: the budget")
    check("--profile has no effect" in works(*compress, *with_it, "--policy", "knorm").err, "a profile that nothing uses")
    live = cache("--stream")
    for flags in [["--window", "128"], ["--policy", "expected"], ["--level", "pair"]]:
        check(cache("--stream", *flags) == live, "%s, the default while tokens come, changes the cache" % flags)
    talk = ["generate", m.path, *text, "-n", 200, "--ignore-eos", "--seed", 3, "--json"]
    ids = works(*talk).rows()[0]["ids"]
    for flags in [["--temp", 0.7], ["--top-p", 0.95], ["--ratio", 1]]:
        check(works(*talk, *flags).rows()[0]["ids"] == ids, "%s, the default, changes the text" % flags)


# ---- tokens ----

def test_tokenize(m):
    e = m.expected
    for i in range(e.rows("tok.text")):
        text = bytes(e.ragged("tok.text", i))
        for name, flags in [("tok.ids_plain", []), ("tok.ids", ["--special"]),
                            ("tok.ids_special", ["--special", "--bos"])]:
            got = run("tokenize", m.path, *flags, input=text).out
            want = " ".join(map(str, e.ragged(name, i))).encode() + b"\n"
            check(got == want, "%s: tokenize %s of %r: %r" % (m.name, name, text, got))
        ids = " ".join(map(str, e.ragged("tok.ids", i))).encode()
        got = run("tokenize", m.path, "--decode", input=ids).out
        check(got == bytes(e.ragged("tok.decoded", i)), "%s: decode %d: %r" % (m.name, i, got))


def test_tokenize_input(m, d):
    text = "Where is it?\nThere."
    want = works("tokenize", m.path, "-p", text).out
    check(works("tokenize", m.path, "-f", write(d + "/t", text)).out == want, "tokenize -f FILE")
    check(works("tokenize", m.path, "-f", "-", input=text.encode()).out == want, "tokenize -f -")
    check(works("tokenize", m.path, "-p", "-", input=text.encode()).out == want, "tokenize -p -")
    check(works("tokenize", m.path, "-p", "").out == b"\n", "no text: an empty line")
    ids = works("tokenize", m.path, "-p", text, "--json").rows()[0]["ids"]
    check(ids == [int(x) for x in want.split()], "tokenize --json")
    junk = bytes(range(1, 256)) + b"\xc3\x28 \xf0\x9f\x98"
    r = works("tokenize", m.path, "--decode", input=works("tokenize", m.path, input=junk).out)
    check(r.out == junk, "bytes that are no UTF-8 come back as they were")
    fails(1, "'1x' at byte 5 is not a token id", "tokenize", m.path, "--decode", input=b"1 2  1x 3")
    fails(1, "is not a token id", "tokenize", m.path, "--decode", input=b"-1")
    fails(1, "is not a token id", "tokenize", m.path, "--decode", input=b"99999999999999999999")


def test_drafts(m, d):
    """The same answers in fewer steps."""
    text = os.path.join(FIXTURES, "real", "town.txt")
    ask = ["ask", m.path, d + "/draft.kvc", "Who?", "And then?", "-n", "60", "--ignore-eos"]
    for kv in ("f16", "q8", "q8/q4"):
        works("compress", m.path, "-f", text, "-o", d + "/draft.kvc", "--ratio", "0.5", "--kv", kv)
        plain = works(*ask, "--draft", 0)
        check("drafted" not in plain.err and works(*ask).out == plain.out, "--draft: its default changes no answer, %s" % kv)
        for n in (2, 7):
            r = works(*ask, "--draft", n)
            check(r.out == plain.out, "--draft %d, %s: %r instead of %r" % (n, kv, r.out, plain.out))
            check(re.search(r"\d+ of \d+ drafted", r.err), "--draft %d, %s tells what came of it: %s" % (n, kv, r.err))
    check("no effect: tokens are not" in works(*ask, "--draft", 3, "--temp", 1).err, "--draft: no effect on drawn tokens")
    fails(2, "--draft", *ask, "--draft", 8)


READERS = {"quest": ("budget=100000", "budget=64,layers=0"), "topk": ("budget=100000", "budget=9,first=3,last=10"),
           "infinigen": ("alpha=1000,most=1", "layers=0,alpha=0.5"), "magicpig": ("every=1", "bits=4,tables=8"),
           "minference": ("vertical=1000", "vertical=1,slash=1"), "bigbird": ("last=1000", "last=0,random=1"),
           "strided": ("stride=1", "last=0,stride=9")}


def test_readers(m, d):
    """Reading all pages by a reader is reading all; less is counted, with drafts, threads, evicted and rounded pairs."""
    text = os.path.join(FIXTURES, "real", "town.txt")
    write(d + "/read.txt", (open(text).read() * 20)[:9000])
    works("compress", m.path, "-f", d + "/read.txt", "-o", d + "/read.kvc", "--ratio", 0.5)
    works("compress", m.path, "-f", d + "/read.txt", "-o", d + "/codes.kvc", "--policy", "knorm", "--demote", "q2", "--kv", "q8/q4")
    ask = ["ask", m.path, d + "/read.kvc", "Who?", "And then?", "-n", 40, "--ignore-eos"]
    generate = ["generate", m.path, "-f", d + "/read.txt", "-n", 20, "--temp", 0, "--ignore-eos", "--json"]
    plain, told = works(*ask), works(*generate).rows()[0]
    check("pages" not in plain.err and "pages_read" not in told, "without --reader nothing is said of pages")
    for name, (whole, less) in READERS.items():
        flags = ["--reader", name, "--set"]
        r = works(*ask, *flags, whole)
        check(r.out == plain.out, "--reader %s of all pages: %r instead of %r" % (name, r.out, plain.out))
        check("%s read 1.000 of the pages" % name in r.err, "--reader %s of all pages: %s" % (name, r.err))
        r = works(*generate, *flags, less).rows()[0]
        check(r["reader"] == name and 0 < r["pages_read"] <= 1, "--reader %s: %s" % (name, r))
        check(name in ("topk", "infinigen", "magicpig") or r["pages_read"] < 0.6, "--reader %s reads %s" % (name, r["pages_read"]))
        check((r["ids"] != told["ids"]), "--reader %s changes nothing" % name)
        check(works(*generate, *flags, less, "-j", 1).rows()[0]["ids"] == r["ids"], "--reader %s: threads" % name)
        if name != "minference":
            one = works(*ask, *flags, less, "--batch", 1, "--draft", 0).out
            check(works(*ask, *flags, less, "--draft", 7).out == one != plain.out, "--reader %s: drafts and batches" % name)
        works("ask", m.path, d + "/codes.kvc", "Who?", "-n", 20, *flags, less)
        works(*generate, *flags, less + ",sink=6", "--budget", 300, "--policy", "streaming")
    short = ["generate", m.path, "-p", "a", "-n", 1]
    fails(2, "--reader x: there are none quest topk", *short, "--reader", "x")
    fails(2, "--reader quest,topk: needs one name", *short, "--reader", "quest,topk")
    fails(2, "--reader: needs a name", *short, "--reader", "")
    fails(2, "there is no --reader", *short, "--set", "budget=3")
    fails(2, "--set has no effect: there is no --reader", *ask, "--set", "budget=3")
    fails(2, "reader quest has no parameter 'tables'", *short, "--reader", "quest", "--set", "tables=3")
    fails(2, "have no parameter 'tables'", *short, "--reader", "quest", "--set", "tables=3", "--budget", 9)
    fails(2, "budget is given twice", *short, "--reader", "quest", "--set", "budget=3,budget=4")
    fails(2, "budget needs a whole number from 0", *short, "--reader", "quest", "--set", "budget=-1")
    fails(2, "clusters needs a whole number from 0 to 16", *short, "--reader", "topk", "--set", "clusters=17")
    check(works(*short, "--reader", "none", "-q").out, "--reader none")
    need = [re.search(r"cache ([\d.]+) MB, more ([\d.]+) MB", run(*short[:4], "-n", 50000, "--mem", 1, *flags).err)
            for flags in ((), ("--reader", "quest"), ("--reader", "magicpig"))]
    cache, more = [float(n[1]) for n in need], [float(n[2]) for n in need]
    check(cache[0] == cache[2] and more[0] < more[1] < more[2] - cache[0], "--mem counts digests: %s" % [n[0] for n in need])


def test_readers_measured(m, d):
    """bench and eval measure readers beside reading all."""
    rows = works("bench", m.path, "--prompt", 300, "--depth", 400, "--ratio", 1, "--batch", 1, "-n", 2, "--json",
                 "--reader", "quest,minference,strided", "--set", "layers=0,budget=64,vertical=1,slash=1,last=0").rows()[1:]
    got = [(r["work"], r["reader"]) for r in rows if r["work"] in ("prefill", "decode") and r["depth"] == (400 if r["work"] == "decode" else 0)]
    check(got == [("prefill", None), ("prefill", "minference"), ("prefill", "strided"), ("prefill", None), ("decode", None),
                  ("decode", "quest"), ("decode", "strided")], "bench --reader: %s" % got)
    check(all((r["pages_read"] < 1) == (r["reader"] is not None) for r in rows), "bench --reader: %s" % rows)
    task = dict(TASKS[0], context="The code of Chen is 12, and that of Rosa is 7. " * 40)
    args = ["eval", m.path, write(d + "/read.jsonl", json.dumps(task)), "-n", 12, "--kv", "f32,q8", "--policy", "knorm",
            "--ratio", "1,0.5", "--json", "--reader", "quest,bigbird"]
    for sets, all_read in (("layers=99,last=1000", True), ("layers=0,budget=64,random=0,last=0", False)):
        rows = works(*args, "--set", sets).rows()
        read = {r["kv"]: r["pages_read"] for r in rows if "reader" in r}
        names = ["f32+quest", "q8+quest", "f32+bigbird", "q8+bigbird"]
        check(list(read) == names, "eval --reader: %s" % read)
        check(all((x == 1) == all_read for x in read.values()), "eval --reader: %s" % read)
        kl = {(r["policy"], r["ratio"], r["kv"]): r["value"] for r in rows if r.get("metric") == "kl"}
        check(len(kl) == 2 * 6 + 6, "eval --reader: every page type once more: %s" % kl)
        for name in names:
            plain, other = kl["knorm", 0.5, name.split("+")[0]], kl["knorm", 0.5, name]
            noise = 1e-5 if name[0] == "f" else 1e-2  # answers come in short runs, which read codes as they are
            check(abs(plain - other) < noise if all_read else abs(plain - other) > noise, "eval: KL of %s: %g, %g" % (name, plain, other))
            check((kl["full", 1, name] < 0.01) == all_read or name[0] == "q", "eval: KL of %s: %g" % (name, kl["full", 1, name]))
    fails(2, "--reader has no effect: --ppl", "eval", m.path, "--ppl", d + "/read.txt", "--reader", "quest")
    fails(2, "together at most", *args[:4], "7", "--reader", "quest", "--kv", ",".join(["f16"] * 9))
    fails(2, "no policy, level or reader here has a parameter 'tables'", *args, "--set", "tables=3")


# ---- numbers ----

def test_logits(m, d):
    e, out = m.expected, d + "/logits"
    ids = write_ids(d + "/prompt.ids", e["prefill.ids"])
    works("logits", m.path, "--ids", ids, "-o", out, "--kv", "f32")
    t = Tensors(out)
    n, vocab = t.shape["logits"]
    check(list(t["ids"]) == list(e["prefill.ids"]) and n == len(t["ids"]), m.name + ": logits' ids")
    logits = t["logits"]
    want = e["prefill.logits"]
    worst = max(distance(logits[r * vocab:(r + 1) * vocab], want[i * vocab:(i + 1) * vocab])
                for i, r in enumerate(e["prefill.rows"]))
    check(worst < LOGITS, "%s: logits differ by %g" % (m.name, worst))
    best = [max(range(vocab), key=logits[r * vocab:(r + 1) * vocab].__getitem__) for r in range(n)]
    check(best == list(e["prefill.argmax"]), m.name + ": argmax of every row")
    works("logits", m.path, "--ids", ids, "-o", d + "/one", "--kv", "f32", "-j", "1")
    r = works("logits", m.path, "--ids", ids, "-o", d + "/copied", "--kv", "f32", "--weights", "copy")
    check(open(d + "/copied", "rb").read() == open(out, "rb").read(), "--weights copy: other logits")
    check("copied" in r.err, "--weights copy says so: %s" % r.err)
    check(Tensors(d + "/one").raw["logits"] == t.raw["logits"], "-j 1 gives the same bits")
    r = works("generate", m.path, "--ids", ids, "-n", 24, "--temp", 0, "--ignore-eos", "--json",
              "--kv", "f32").rows()[0]
    check(r["ids"] == list(e["prefill.greedy"]), m.name + ": greedy continuation")


def test_score(m, d):
    for policy, name in [("kvzip", "kvzip.score"), ("kvzip+", "kvzip.score_plus")]:
        works("score", m.path, *m.context_flags(d), "--policy", policy, "-o", d + "/scores")
        t = Tensors(d + "/scores")
        check(t.shape["scores"] == m.expected.shape[name], "%s: shape of %s" % (m.name, name))
        worst = distance(t["scores"], m.expected[name])
        check(worst < SCORES, "%s: %s differs by %g" % (m.name, name, worst))
        check(list(t["ids"]) == m.context, m.name + ": score's ids")
        check(list(t["layers"]) == list(m.expected["kvzip.layers"]), m.name + ": score's layers")
        check((t.meta["n_prefix"], t.meta["policy"]) == (str(m.n_prefix), policy), "metadata")


def kept_positions(cache, layers):
    """keep [layer][head][n_ctx] of a saved cache, flat, from the positions in its pages."""
    t = Tensors(cache)
    n_prefix, n_ctx = int(t.meta["n_prefix"]), int(t.meta["n_ctx"])
    n_heads, pos, page, keep = t.shape["len"][1], t["pos"], 0, []
    for head, (n, dropped) in enumerate(zip(t["len"], t["dropped"])):
        flags = bytearray(n_prefix + n_ctx)
        for i in range(n - dropped):
            flags[pos[page * 64 + i]] = 1
        page += (n + 63) // 64 - dropped // 64
        if head // n_heads in layers:
            keep += flags[n_prefix:]
            check(all(flags[:n_prefix]), "the prefix stays")
    return keep


def test_compress(m, d):
    e, cache, n_ctx = m.expected, d + "/cache", len(m.expected["kvzip.ctx"])
    n_heads = e.shape["kvzip.score"][0] * e.shape["kvzip.score"][1]
    pairs = n_heads * n_ctx
    for mask, flags in [("pair", ["--ref-ties"]), ("pair_exact", []), ("head", ["--level", "head"]),
                        ("pair_uniform", ["--level", "uniform"]), ("plus_pair", ["--ref-ties"])]:
        policy = "kvzip+" if mask == "plus_pair" else "kvzip"
        for r in ["30", "60"]:
            if mask == "head":
                flags = flags[:2] + ["--ref-ties"]
            row = works("compress", m.path, *m.context_flags(d), *flags, "--policy", policy,
                        "--ratio", "0." + r, "-o", cache, "--json").rows()[0]
            want = e["mask.%s.r%s" % (mask, r)]
            got = kept_positions(cache, e["kvzip.layers"])
            check(got == list(want), "%s: mask.%s.r%s" % (m.name, mask, r))
            check(abs(row["kept"] - sum(want) / pairs) < 1e-6, "kept is the achieved share")
            check(row["bytes"] < row["full_bytes"] and row["n_ctx"] == n_ctx, "bytes, n_ctx")
            if mask == "pair":
                check_query(m, d, cache, "evict.r" + r)
    works("compress", m.path, *m.context_flags(d), "--ratio", 1, "-o", cache)
    check_query(m, d, cache, "evict.r100")


def check_query(m, d, cache, name):
    """Logits of the query after the cache, and of the greedy ids that follow it."""
    e, greedy = m.expected, m.expected[name + ".greedy"]
    query = list(e["kvzip.query"])
    ids = write_ids(d + "/query.ids", query + list(greedy))
    works("logits", m.path, "-c", cache, "--ids", ids, "-o", d + "/query")
    logits, want = Tensors(d + "/query")["logits"], e[name + ".logits"]
    worst = distance(logits[:len(want)], want)
    check(worst < LOGITS, "%s: %s differs by %g" % (m.name, name, worst))
    vocab = e.shape[name + ".logits"][1]
    for i, g in enumerate(greedy):
        row = logits[(len(query) - 1 + i) * vocab:(len(query) + i) * vocab]
        check(max(range(vocab), key=row.__getitem__) == g, "%s: %s.greedy %d" % (m.name, name, i))


# ---- questions ----

ASK_FIELDS = {"question", "answer", "n_prompt", "n_answer", "seconds", "tokens_per_s", "finish_reason", "seed"}


def test_ask(m, d):
    cache = d + "/ask.kvc"
    works("compress", m.path, "-p", "The code of Chen is 12. The code of Rosa is 7.", "-o", cache)
    asked = ["What is the code of Chen?", "And of Rosa?", "What is the code of Chen?"]
    many = works("ask", m.path, cache, *asked, "-n", 12, "--json", "--ignore-eos").rows()
    check([r["question"] for r in many] == asked, "questions come back in order")
    check(all(set(r) == ASK_FIELDS and r["n_answer"] == 12 for r in many), "fields of ask")
    check(many[0]["answer"] == many[2]["answer"], "a question leaves no trace")
    flags = ["-n", 12, "--json", "--ignore-eos"]
    answers = [r["answer"] for r in many]

    def same(what, *args, **options):
        got = [r["answer"] for r in works("ask", m.path, cache, *flags, *args, **options).rows()]
        check(got == answers, "%s: %r" % (what, got))

    questions = write(d + "/questions", "\n".join(["", asked[0], "  ", asked[1] + "\r", asked[2]]))
    same("questions from a file", "-f", questions)
    same("questions from stdin", input=open(questions, "rb").read())
    same("questions from -f -", "-f", "-", input=open(questions, "rb").read())
    same("arguments first, then the file", asked[0], "-f", write(d + "/rest", "\n".join(asked[1:])))
    same("three together", *asked, "--batch", 3)
    same("batches that do not fit", *asked, "--batch", 2)
    same("in order after --", "--", *asked)
    kept = [r["answer"] for r in works("ask", m.path, cache, *asked, *flags, "--keep").rows()]
    check(kept[0] == answers[0] and kept[2] != answers[2], "--keep makes a conversation")
    text = works("ask", m.path, cache, asked[0], "-n", 12, "--ignore-eos", "-q")
    check(text.text() == shown(answers[0]) + "\n" and not text.err, "plain output: answer and newline")
    test_answer_prefix(m, d, cache, asked[0])


def test_answer_prefix(m, d, cache, question):
    flags = ["-n", 8, "--json", "--ignore-eos"]
    by_flag = works("ask", m.path, cache, question, *flags, "--answer-prefix", "It is").rows()[0]
    line = write(d + "/tab", question + "\tIt is\n \tIt is\n" + question + "\n")
    by_tab = works("ask", m.path, cache, "-f", line, *flags).rows()
    check(by_flag["answer"].startswith("It is"), "the answer starts with its prefix")
    check(by_tab[0]["answer"] == by_flag["answer"], "a prefix after a tab")
    check(not by_tab[1]["answer"].startswith("It is"), "is for its own line alone")
    for args in [[question, "--answer-prefix", "It is "], ["-f", write(d + "/tab", question + "\tIt is ")]]:
        check("ends with a space" in works("ask", m.path, cache, "-n", 1, *args).err, "a space that the next word has")
    check("space" not in works("ask", m.path, cache, question, "-n", 1, "--answer-prefix", "It is:\n").err, "a newline may")
    fails(1, "number 2 of the arguments: no question in it", "ask", m.path, cache, question, " ", question)
    plain = ["ask", m.path, cache, question, "-n", 8, "--ignore-eos", "-q"]
    plain += ["--answer-prefix", "It is"]
    whole = works(*plain).out
    stop = whole[6:8]
    cut = works(*plain, "--stop", stop).out
    check(cut.strip() == whole[:whole.index(stop, 5) + 2].strip(), "--stop: %r" % cut)
    odd = b"caf\xc3\xa9 \xff\"\\\x01\xe2\x82"
    fails(1, "a question: not UTF-8 at byte 6 (line 1), 0xff", "ask", m.path, cache, odd, "-n", 1, "--json")
    row = works("ask", m.path, cache, odd[:6] + b"\"\\\x01\x7f", "-n", 1, "--json").rows()[0]
    check(row["question"] == "café \"\\\x01\x7f", "JSON of any text: %r" % row["question"])


def test_talk(m, d):
    """What an answer is does not depend on what else is asked, and how it ended is said."""
    cache, asked = d + "/talk.kvc", ["Tell me.", "Who was it?", "And where?", "Who was it?"]
    works("compress", m.path, "-p", "The code of Chen is 12. The code of Rosa is 7.", "-o", cache, "-q")
    ask = ["ask", m.path, cache, "-n", 12, "--ignore-eos"]
    drawn = [*ask, "--temp", 2, "--seed", 7]
    together = [r["answer"] for r in works(*drawn, "--json", *asked).rows()]
    check([r["answer"] for r in works(*drawn, "--json", "--batch", 1, *asked).rows()] == together, "--batch changes what a seed gives")
    alone = [works(*drawn, "--json", q).rows()[0]["answer"] for q in asked]
    check(alone == together, "other questions change what a seed gives")
    check(len(set(together)) == 3, "every question has its own numbers: %s" % together)
    row = works(*ask, "--temp", 2, "--json", asked[0]).rows()[0]
    again = works(*ask, "--temp", 2, "--seed", row["seed"], "--json", asked[0]).rows()[0]
    check(again["answer"] == row["answer"], "the seed that is shown repeats the answer")
    r = works(*ask, "--temp", 2, asked[0])
    check(re.search(r"seed \d+; cut at 12 tokens", r.err), "seed and cut in the figures: %s" % r.err)
    greedy = works(*ask, "--json", asked[0]).rows()[0]
    check(greedy["seed"] is None and greedy["finish_reason"] == "length", "greedy: no seed; finish_reason: %s" % greedy)
    text = greedy["answer"]
    stops = ["--stop", text[6:8], "--stop", text[2:5]]
    for flags in [stops, stops[2:] + stops[:2]]:
        row = works(*ask, "--json", asked[0], *flags).rows()[0]
        check(row["answer"] == text[:5].strip() and row["finish_reason"] == "stop", "the first of two stop texts: %s" % row)
    fails(2, "an empty text", *ask, asked[0], "--stop", "")
    for args in [["compress", m.path, "-p", "a"], ["eval", "--merge", cache]]:
        fails(2, "-: stdout is no file", *args, "-o", "-", cwd=d)
    check(not os.path.exists(d + "/-"), "no file of the name -")
    fails(1, "it has no name", "compress", m.path, "-p", "a", "-o", "")


def test_apart(m, d):
    """Only the first line of an answer begins at the margin where there are several."""
    cache, text = d + "/apart.kvc", write(d + "/apart.q", "Who?\tOne\nWhere?\tTwo\n")
    works("compress", m.path, "-p", "The code of Chen is 12.", "-o", cache, "-q")
    ask = ["ask", m.path, cache, "-n", 0, "-q", "--answer-prefix", "One\n\ntwo\n  three"]
    check(works(*ask, "Who?").out == b"One\n\ntwo\n  three\n", "one answer is as it is")
    both = b"One\n  \n  two\n    three\n" * 2
    check(works(*ask, "Who?", "Where?").out == both, "two answers: lines after the first are indented")
    check(works(*ask, "--batch", 1, "Who?", "Where?").out == both, "the same one at a time")
    check(works(*ask, input=b"Who?\nWhere?\n").out == both, "and from a pipe")
    check(works("ask", m.path, cache, "-f", text, "-n", 0, "-q").out == b"One\nTwo\n", "answers of one line: a line each")


def test_pipe(m, d):
    """A question in a pipe is answered before the next one comes, half a line when it is whole."""
    cache = d + "/pipe.kvc"
    works("compress", m.path, "-p", "The code of Chen is 12.", "-o", cache, "-q")
    p = subprocess.Popen([RUN, "ask", m.path, cache, "-n", "2", "--json", "-q"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    timer = threading.Timer(30, p.kill)
    timer.start()
    for parts, answers in [([b"One?\n"], ["One?"]), ([b"Tw", b"o?\n"], ["Two?"]), ([b"\n3?\n4?\n"], ["3?", "4?"])]:
        for part in parts:
            p.stdin.write(part)
            p.stdin.flush()
            time.sleep(0.05)
        for want in answers:
            line = p.stdout.readline()
            check(line and json.loads(line)["question"] == want, "a pipe: %r, not %s" % (line, want))
    p.stdin.write(b"Last?")
    p.stdin.close()
    line = p.stdout.readline()
    check(line and json.loads(line)["question"] == "Last?", "a pipe's end ends its last line: %r" % line)
    check(p.wait(timeout=30) == 0, "a pipe: the answers did not come")
    timer.cancel()
    p.stdout.close()


def test_paste(m):
    """Lines that a terminal marks as pasted are one message."""
    pid, fd = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "xterm"
        os.execv(RUN, [RUN, "chat", m.path, "-n", "1", "--temp", "0", "--json"])
    out, timer = b"", threading.Timer(120, os.kill, (pid, signal.SIGKILL))
    timer.start()
    for words, times, typed in [(b"> ", 1, b"\033[200~Name\nall\tof\nthem\033[201~?\n"), (b"\033[?2004h", 2, b"\004"),
                                (b"\033[?2004l", 2, b"")]:
        for _ in range(300):
            if out.count(words) < times and select.select([fd], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):  # it has ended
                    out += os.read(fd, 65536)
        with contextlib.suppress(OSError):
            os.write(fd, typed)
    check(b'"question": "Name\\nall\\u0009of\\nthem?"' in out, "pasted lines: %r" % out)
    check(b"\033[?2004h" in out and b"\033[?2004l" in out, "the terminal is as it was: %r" % out)
    check(os.waitpid(pid, 0)[1] == 0, "chat in a terminal")
    timer.cancel()
    os.close(fd)


def test_system_file(m, d, flags):
    path = write(d + "/system.txt", b"\xef\xbb\xbfYou are brief.\n\n")
    said = [works("chat", m.path, *how, *flags, input=b"What is it?\n").rows()[0]
            for how in (["--system", "You are brief."], ["--system-file", path], ["--system", "Be long and kind."])]
    keys = [(r["n_prompt"], r["answer"]) for r in said]
    check(keys[0] == keys[1] != keys[2], "--system-file is --system: %s" % keys)
    fails(2, "only one of --system and --system-file", "chat", m.path, "--system", "x", "--system-file", path)
    fails(2, "--system-file -", "chat", m.path, "--system-file", "-")
    fails(1, d + "/no: ", "chat", m.path, "--system-file", d + "/no")
    fails(1, "gzip", "chat", m.path, "--system-file", write(d + "/system.gz", b"\x1f\x8b\x08\0aaaaaaaaaaaaaaaa"))
    fails(2, "--system-file has no effect", "compress", m.path, "-p", "a", "-o", d + "/x", "--raw", "--system-file", path)
    fails(1, "cannot be written", "compress", m.path, "-p", "a", "-o", path, "--system-file", path)


def test_orders(m, d, cache, flags):
    """Lines of a chat that begin with a slash."""
    def talk(*lines, how=()):
        r = works("chat", m.path, *how, *flags, input="".join(line + "\n" for line in lines).encode())
        return [(row["question"], row["answer"], row["n_prompt"]) for row in r.rows()], r.err

    plain, _ = talk("What is it?", "And now?", "Then?")
    undone, err = talk("What is it?", "Something else?", "/undo", "And now?", "Then?", "/stats")
    check([row for row in undone if row[0] != "Something else?"] == plain, "/undo leaves no trace: %s" % undone)
    check("4 questions, 24 tokens written" in err, "/stats: %r" % err)
    twice, err = talk("/undo", "What is it?", "/undo", "/undo", "What is it?")
    check(twice[0] == twice[1] == plain[0] and err.count("no question to take back") == 2, "/undo once: %r" % err)
    _, err = talk("/help", "/nothing here", "/save", "/undo it", "/load " + d + "/none", "/doc " + d + "/none", "/doc -",
                  "/save " + d + "/none/x", "/load " + m.path, "/doc " + cache)
    check(all(name in err for name in ("/save", "/load", "/doc", "/stats", "/undo")), "/help: %r" % err)
    lines = [line for line in err.split("\n") if line.startswith("run: /")]
    check(len(lines) == 9 and "/nothing: here: no such order" in lines[0] and "/save: needs a FILE" in lines[1], "refused: %r" % err)
    check([row[0].strip() for row in talk(" /etc is what?")[0]] == ["/etc is what?"], "a space before a slash")

    loaded, _ = talk("/load " + cache, "What is it?", "And now?")
    check(loaded == talk("What is it?", "And now?", how=["-c", cache])[0], "/load is -c: %s" % loaded)
    text = write(d + "/doc.txt", "The code of Chen is 12. " * 20)
    works("compress", m.path, "-f", text, "-o", d + "/doc.kvc")
    asked, err = talk("Before?", "/doc " + text, "What is it?")
    check(asked[1:] == talk("What is it?", how=["-c", d + "/doc.kvc"])[0], "/doc is compress and -c: %s" % err)
    saved, err = talk("What is it?", "And now?", "/save " + d + "/talk.kvc", "Then?")
    check(saved == plain, "/save changes nothing: %s" % err)
    back = [talk("Then?", how=["-c", d + "/talk.kvc"])[0], talk("/load " + d + "/talk.kvc", "Then?")[0]]
    check(back[0] == back[1] and len(back[0]) == 1, "a saved talk goes on: %s" % back)
    ids = Tensors(d + "/talk.kvc")["ids"]
    words = works("tokenize", m.path, "--decode", "-p", " ".join(map(str, ids))).text()
    check(words.index("What is it?") < words.index("And now?") and words.endswith("user\n"), "saved ids: %r" % words)
    for how in ["--budget", 50], ["--ratio", 0.5]:
        _, err = talk("/undo", "/doc " + text, "Well?", how=how)
        check(err.count("evict as tokens come") == 2, "orders and %s: %r" % (how, err))


def test_chat(m, d):
    cache = d + "/chat.kvc"
    works("compress", m.path, "-p", "The code of Chen is 12.", "-o", cache)
    lines = b"What is it?\n\nAnd now?\n"
    flags = ["-n", 6, "--temp", 0, "--ignore-eos", "--json"]
    for where in [[], ["-c", cache], ["--system", "You are brief."]]:
        rows = works("chat", m.path, *where, *flags, input=lines).rows()
        asked = [r["question"] for r in rows]
        check(asked == ["What is it?", "And now?"], "chat answers every line")
        check(all(r["n_answer"] == 6 for r in rows), "chat's answers")
    on_cache = works("chat", m.path, "-c", cache, *flags, input=lines).rows()[0]["answer"]
    asked = works("ask", m.path, cache, "What is it?", *flags).rows()[0]["answer"]
    check(on_cache == asked, "a chat on a context begins as ask does")
    fails(2, "--system", "chat", m.path, "-c", cache, "--system", "x")
    test_system_file(m, d, flags)
    test_orders(m, d, cache, flags)


def test_generate(m, d):
    p = ["generate", m.path, "-p", "The code of"]
    r = works(*p, "-n", 10, "--temp", 0, "--json", "--ignore-eos").rows()[0]
    check(set(r) == {"text", "ids", "n_prompt", "n_answer", "prefill_s", "seconds", "tokens_per_s", "finish_reason", "seed"},
          "fields of generate: %s" % sorted(r))
    check(len(r["ids"]) == r["n_answer"] == 10, "generate's ids")
    plain = works(*p, "-n", 10, "--temp", 0, "--ignore-eos", "-q")
    check(plain.text().rstrip("\n") == shown(r["text"]).rstrip("\n") and not plain.err, "generate's text")
    seeds = [works(*p, "-n", 20, "--seed", s, "--temp", 2, "--json").rows()[0]["ids"]
             for s in (1, 1, 2)]
    check(seeds[0] == seeds[1] != seeds[2], "the seed decides")
    one = works(*p, "-n", 10, "--temp", 3, "--top-p", 0, "--json", "--ignore-eos").rows()[0]
    check(one["ids"] == r["ids"], "--top-p 0 leaves the likeliest token")
    check(works(*p, "-n", 0).out == b"", "-n 0 writes nothing")
    check("written in" in works(*p, "-n", 2).err, "figures on stderr")
    long = write_ids(d + "/long", [5] * 3000)
    r = works("generate", m.path, "--ids", long, "-n", 1)
    check("but the model was trained for" in r.err, "a warning past the trained length: %s" % r.err)


# ---- contexts at the edge ----

def test_edges(m, d):
    cache = d + "/edge.kvc"
    r = works("compress", m.path, "-p", "", "-o", cache, "--json")
    check(r.rows()[0]["n_ctx"] == 0 and "the context is empty" in r.err, "an empty context")
    works("ask", m.path, cache, "Is there anything?", "-n", 2)
    row = works("compress", m.path, "-p", "a", "-o", cache, "--json", "--ratio", 0.5).rows()[0]
    check(row["n_ctx"] == 1, "a context of one token")
    works("ask", m.path, cache, "Is there anything?", "-n", 2)
    fails(1, "nothing to read", "compress", m.path, "--ids", write(d + "/none", " \n"), "-o", cache)
    fails(1, "the context is empty", "score", m.path, "-p", "", "-o", d + "/x")
    fails(1, "none: no question in it", "ask", m.path, cache, "-f", d + "/none")
    fails(1, "arguments: no question in it", "ask", m.path, cache, " ")
    fails(1, "no tokens given", "logits", m.path, "--ids", d + "/none", "-o", d + "/x")
    fails(1, "the prompt is empty", "generate", m.path, "--ids", d + "/none")
    fails(1, "the prompt is empty", "generate", m.path)
    two = write(d + "/two", "1 2")
    fails(2, "--n-prefix 9", "score", m.path, "--ids", two, "--n-prefix", 9, "-o", d + "/x")
    text = "<|im_start|> is text"
    special = works("tokenize", m.path, "-p", text, "--special").out.split()
    works("score", m.path, "-p", text, "-o", d + "/s", "--raw")
    got = [str(i).encode() for i in Tensors(d + "/s")["ids"]]
    check(got[-1:] == special[-1:] and len(got) > len(special), "special text stays text")
    refusing = d + "/refusing.kvz"
    with open(m.path, "rb") as f:
        n, = struct.unpack("<Q", f.read(8))
        header, rest = json.loads(f.read(n)), f.read()
    header["__metadata__"]["chat.system_refused"] = "no such role"
    text_of = json.dumps(header, sort_keys=True).encode()
    text_of += b" " * (-(8 + len(text_of)) % 64)
    with open(refusing, "wb") as f:
        f.write(struct.pack("<Q", len(text_of)) + text_of + rest)
    for command in [["compress", refusing, "-p", "x", "-o", d + "/r"], ["chat", refusing]]:
        fails(1, "no such role", *command, "--system", "Be brief.")
    for flags in [["--task", "Read.\n"], ["--system", "Be brief."], ["--raw"],
                  ["--score-attn", "local"]]:
        works("compress", m.path, "-p", "The code of Chen is 12.", "-o", cache, *flags)
        works("ask", m.path, cache, "Who?", "-n", 2, *(["--raw"] if flags == ["--raw"] else []))


def test_info(m, d):
    cache = d + "/info.kvc"
    row = works("compress", m.path, *m.context_flags(d), "-o", cache, "--json").rows()[0]
    r = works("info", cache, "--json").rows()[0]
    check(abs(r["kept"] - row["kept"]) < 1e-6 and r["ratio"] == 0.3, "info's ratios")
    check(sum(map(sum, r["kept_pairs"])) == row["n_kept"], "info's pairs per head")
    check(r["n_prefix"] == m.n_prefix and r["n_ctx"] == row["n_ctx"], "info's lengths")
    r = works("info", m.path, "--json").rows()[0]
    parts = ["embedding", "attention", "ffn", "head", "tokenizer", "other"]
    check(0 < sum(r[p] for p in parts) <= r["file"], "info's bytes add up")
    check("cache_token_f16" in works("info", m.path).text(), "info in words")
    check("kept pairs" in works("info", cache).text(), "info on a cache in words")
    works("score", m.path, "-p", "abc", "-o", d + "/s")
    check("scores" in works("info", d + "/s").text(), "info on any safetensors file")
    check(works("info", d + "/s", "--json").rows()[0]["tensors"], "as JSON, too")


# ---- profiles, and evicting while tokens come ----

SAMPLE = "The mill stood by the river. " * 20 + "\n=====\n" + "Rows of beans, 14 of them.\n" * 30


def info(path):
    return works("info", path, "--json").rows()[0]


def test_profile(m, other, d):
    profile, cache, sample = d + "/m.kvp", d + "/p.kvc", write(d + "/sample", SAMPLE)
    row = works("calibrate", m.path, "-f", sample, "-o", profile, "--json", "--chunk", 50).rows()[0]
    check(row["n_texts"] == 3 and 0 < row["longest"] < row["n_tokens"], "calibrate: %s" % row)
    check((row["held_out"], row["layer_shares"]) == (0, "kvzip"), "two texts are too few to try layer shares: %s" % row)
    check((info(profile)["layer_shares"], info(m.path)["layer_shares"]) == ("KVzip's", "no profile"), "whose layer shares")
    many = write(d + "/many", "\n=====\n".join(["%s %s" % (SAMPLE.split("=====")[0], i) for i in range(5)]))
    said = works("calibrate", m.path, "-f", many, "-o", d + "/many.kvp", "--chunk", 50).err
    check(re.search(r"layer shares by effect: held-out KL \S+ -> \S+ at 0.3 on 2 texts, (not )?used", said), "what was tried: %s" % said)
    check(("not used" in said) == (info(d + "/many.kvp")["layer_shares"] == "KVzip's"), "what came of it: %s" % said)
    check(0 < row["explained"] <= 1, "what probes explain")
    row = works("calibrate", m.path, "-f", many, "-o", d + "/some.kvp", "--chunk", 50, "--json", "--tokens", 400).rows()[0]
    check(row["n_texts"] == 6 and 390 < row["n_tokens"] - row["longest"] <= 400, "--tokens: the same share of each part: %s" % row)
    check(not glob.glob(d + "/*.unfinished"), "what is done leaves no unfinished work")
    work = write(d + "/mine.kvp.unfinished", "a letter")
    fails(1, "mine.kvp.unfinished: ", "calibrate", m.path, "-f", many, "-o", d + "/mine.kvp", "--chunk", 50)
    check(open(work).read() == "a letter", "a file that is not ours is left alone")
    text = ["-p", "The code of Chen is 12. " * 30, "-o", cache]
    works("compress", m.path, *text)
    check(info(cache)["policy"] == "kvzip", "without a profile KVzip is the default")
    row = works("compress", m.path, *text, "--profile", profile, "--json").rows()[0]
    check(info(cache)["policy"] == "expected", "with one expected attention")
    check(abs(row["n_kept"] - int(row["n_pairs"] * 0.3)) == 0, "shares add up to the ratio")
    for flags in [["--policy", "kvzap"], ["--policy", "kvzap", "--set", "expected=1"],
                  ["--policy", "heads", "--level", "head"], ["--policy", "snapkv", "--level", "profile"]]:
        works("compress", m.path, *text, "--profile", profile, *flags)
    model = d + "/carries.kvz"
    works("calibrate", m.path, "-f", sample, "-o", model, "--into", "--chunk", 50)
    works("calibrate", model, "-f", sample, "-o", model, "--into", "--chunk", 50)
    works("compress", model, *text)
    check(info(cache)["policy"] == "expected", "the model carries its profile")
    works("ask", m.path, cache, "Who?", "-n", 2)  # it is still the same model
    fails(1, "made for another model", "compress", other.path, *text, "--profile", profile)
    fails(1, "needs the model's profile", "compress", m.path, *text, "--policy", "kvzap")
    fails(1, "needs the model's profile", "compress", m.path, *text, "--level", "profile")
    fails(1, "not a profile", "compress", m.path, *text, "--profile", m.path)
    fails(1, "too little text", "calibrate", m.path, "-f", write(d + "/e", ""), "-o", d + "/x")
    fails(1, "is read by this command", "calibrate", m.path, "-f", sample, "-o", m.path)
    cut = write(d + "/cut.kvp", open(profile, "rb").read()[:-100])
    fails(1, cut, "compress", m.path, *text, "--profile", cut)


def test_budget(m, d):
    cache, text = d + "/b.kvc", ["-p", "The code of Chen is 12. " * 150]
    for flags, policy in [([], "expected"), (["--policy", "streaming", "--level", "uniform"], "streaming")]:
        whole = works("compress", m.path, *text, "-o", cache, "--json", "--ratio", 1).rows()[0]
        row = works("compress", m.path, *text, "-o", cache, "--json", "--budget", 100, "--window", 16,
                    *flags).rows()[0]
        heads = row["n_pairs"] // row["n_ctx"]
        check(row["n_kept"] == 100 * heads, "--budget is exact: %s" % row)
        check(row["bytes"] <= row["peak_bytes"] < row["full_bytes"] == whole["full_bytes"],
              "bytes of --budget: %s" % row)
        check(info(cache)["policy"] == policy, "policy of --budget")
        works("ask", m.path, cache, "Who?", "-n", 2)
    row = works("compress", m.path, *text, "-o", cache, "--json", "--ratio", 0.4, "--stream").rows()[0]
    check(row["n_kept"] == int(row["n_pairs"] * 0.4), "--stream keeps --ratio: %s" % row)
    more = ["generate", m.path, "-p", "The code", "-n", 700, "--temp", 0, "--ignore-eos", "--json"]
    full = works(*more).rows()[0]["ids"]
    few = works(*more, "--budget", 40, "--window", 8).rows()[0]["ids"]
    check(few[:40] == full[:40] and len(few) == 700, "writing within a budget")
    check(works(*more, "--budget", 100000).rows()[0]["ids"] == full, "a budget for all changes nothing")
    check(works(*more, "--ratio", 0.2).rows()[0]["ids"][:60] == full[:60], "writing within a ratio")
    works("chat", m.path, "--budget", 50, "-n", 20, "--temp", 0, input=b"Hello\nAnd then?\n" * 8)
    for system in ["Be brief.", "You are a robot. " * 150]:  # longer than a block of rows, and than the budget
        talk = ["chat", m.path, "--system", system, "-n", 8, "--temp", 0, "--json", "--budget"]
        full, few = ([r["answer"] for r in works(*talk, n, "--window", 8, input=b"Hello\nAnd then?\n" * 8).rows()] for n in (9999, 16))
        check(few[0] == full[0] and few != full and len(few) == 16, "the system text stays: %s" % few)
    fails(1, "looks back at the whole context", "compress", m.path, *text, "-o", cache, "--stream",
          "--policy", "snapkv")
    fails(1, "keeps whole heads", "compress", m.path, *text, "-o", cache, "--stream", "--level", "head")
    fails(2, "choose one", "compress", m.path, *text, "-o", cache, "--stream", "--demote", "q2")


# ---- bench ----

BENCH_FIELDS = {"work", "n", "depth", "ratio", "batch", "threads", "tokens_per_s", "seconds",
                "gb_per_s", "gflop_per_s", "share", "bound", "to_prefill", "cache_bytes",
                "score_attn"}
PEAK_FIELDS = {"work", "isa", "threads", "gb_per_s", "f32_gflop_per_s", "q8_gflop_per_s",
               "q4_gflop_per_s", "attention_gflop_per_s"}


def test_bench(m):
    flags = ["--prompt", "16,40", "--depth", "0,100", "--ratio", "1,0.5", "--batch", "1,3", "-n", 4]
    rows = works("bench", m.path, *flags, "--json").rows()
    check(set(rows[0]) == PEAK_FIELDS and rows[0]["work"] == "peak", "bench's peaks come first")
    check(all(rows[0][f] > 0 for f in PEAK_FIELDS - {"work", "isa"}), "bench's peaks: %s" % rows[0])
    check(works("bench", m.path, *flags, "--json", "--isa", "scalar").rows()[0]["isa"] == "scalar", "bench names the set it measured")
    rows = rows[1:]
    check(all(set(r) == BENCH_FIELDS for r in rows), "fields of bench")
    work = [(r["work"], r["depth"], r["ratio"], r["batch"]) for r in rows]
    want = [("decode", 0, 1, 1), ("decode", 0, 1, 3), ("decode", 100, 1, 3),
            ("decode", 100, 0.5, 1), ("load", 100, 0.5, 1), ("score", 100, 1, 1),
            ("prefill", 0, 1, 1)]
    check(all(w in work for w in want), "bench's rows: %s" % work)
    check(all(r["seconds"] > 0 and r["tokens_per_s"] > 0 for r in rows), "bench's figures")
    check(all((r["share"] > 0 and r["gflop_per_s"] > 0 and r["bound"] is not None) ==
              (r["work"] != "load") for r in rows), "shares of the peaks")
    check(all((r["to_prefill"] > 0) == (r["work"] == "score") for r in rows), "score over prefill")
    check("tokens/s" in works("bench", m.path, *flags).text(), "bench as a table")


# ---- failures ----

def perplexity(m, d, ids, window):
    """llama-perplexity's: of each window the second half, from the logits of `run logits`."""
    losses = []
    for at in range(0, len(ids) - window + 1, window):
        part = ids[at:at + window]
        works("logits", m.path, "--ids", write_ids(d + "/w.ids", part), "-o", d + "/w", "--kv", "f32")
        logits = Tensors(d + "/w")["logits"]
        vocab = len(logits) // window
        for i in range(window // 2, window - 1):
            row = logits[i * vocab:(i + 1) * vocab]
            top = max(row)
            losses.append(top + math.log(sum(math.exp(x - top) for x in row)) - row[part[i + 1]])
    return math.exp(sum(losses) / len(losses)), len(losses)


def test_perplexity(m, d):
    text = write(d + "/ppl.txt", "The mill stood by the river, and the river stood by nobody. " * 12)
    ids = [int(i) for i in works("tokenize", m.path, "-f", text).text().split()]
    row = works("eval", m.path, "--ppl", text, "-n", "32", "--kv", "f32", "--json").rows()[0]
    want, n = perplexity(m, d, ids, 32)
    check(row["n"] == n, "--ppl scored %d tokens, not %d" % (row["n"], n))
    check(abs(row["value"] / want - 1) < 1e-4, "--ppl: %g, by its logits %g" % (row["value"], want))
    check(row["low"] < row["value"] < row["high"], "--ppl: the interval leaves the value out")


def test_page_types(m, d):
    cache, sizes = d + "/types.kvc", {}
    text = write(d + "/long.txt", "Ada keeps forty goats and a dog. " * 40)
    args = ["compress", m.path, "-f", text, "--raw", "-o", cache, "--json"]
    for kv, ratio, more in [("f16", 1, []), ("q8", 1, []), ("q4", 1, []), ("q8/q4", 0.5, []),
                            ("f16", 0.3, ["--demote", "q2"]), ("q8", 0.3, ["--demote", "q2"])]:
        row = works(*args, "--kv", kv, "--ratio", str(ratio), *more).rows()[0]
        r = works("info", cache, "--json").rows()[0]
        check(r["kv"] == kv and r["full_bytes"] > 0, "info's page types")
        parts = r["new_bytes"] + r["settled_bytes"] + r["demoted_bytes"]
        check(abs(parts - r["bytes"]) < 1 and (r["settled_bytes"] > 0) == (kv != "f16"), "info's bytes of pages")
        check((r["demoted_bytes"] > 0) == bool(more) and row["bytes"] < row["full_bytes"] * 1.001, "demoted bytes")
        check(abs(r["kept"] + r["demoted"] - row["kept"]) < 1e-6 or more, "nothing is demoted unasked")
        sizes[kv, ratio] = row["bytes"]
        works("ask", m.path, cache, "Who?", "-n", "3", "--raw")
    check(sizes["q4", 1] < sizes["q8", 1] < sizes["f16", 1], "fewer bits, fewer bytes")
    check("q8 pairs" in works("ask", m.path, cache, "Who?", "-n", "1", "--raw", "--kv", "f16").err, "--kv on a cache")
    check("cache_token_q4" in works("info", m.path, "--json").rows()[0], "info's bytes per token")
    fails(2, "--demote q4", *args, "--demote", "q4")
    tasks = write(d + "/kv.jsonl", json.dumps(TASKS[0]))
    rows = works("eval", m.path, tasks, "--ratio", "1,0.5", "-n", "4", "--kv", "f16,q8/q4,f16+q2", "--json").rows()
    check({r["kv"] for r in rows} == {"f16", "q8/q4", "f16+q2"}, "eval: page types are missing")


TASKS = [{"context": "Ada keeps %d goats. " % n * 9, "metric": "contained", "questions": [
    {"question": "How many?", "answer_prefix": "Ada keeps", "answers": [str(n)]},
    {"question": "Who?", "answers": ["Ada", "ada"]}]} for n in (7, 40, 312, 5)]


def test_eval(m, d):
    tasks = write(d + "/tasks.jsonl", "\n".join(map(json.dumps, TASKS)))
    args = ["eval", m.path, tasks, "--policy", "kvzip,streaming", "--ratio", "1,0.5", "-n", "6", "--kv", "f32", "--json"]
    whole = works(*args, "-o", d + "/whole").rows()
    kept_all = [r for r in whole if r["ratio"] == 1]
    check({r["n"] for r in whole} == {8}, "eval: not every question was asked")
    check({r["policy"] for r in whole} == {"full", "kvzip", "streaming"}, "eval: policies are missing")
    check(all(r["value"] == 1 for r in kept_all if r["metric"] == "same"), "eval: ratio 1 changed answers")
    check(all(abs(r["value"]) < 1e-9 for r in kept_all if r["metric"] == "kl"), "eval: ratio 1 has a KL")
    check(all(r["low"] <= r["value"] <= r["high"] for r in whole), "eval: an interval leaves its value out")
    less = [r for r in whole if r["ratio"] == 0.5]
    check(less and all(abs(r["kept"] - 0.5) < 0.02 for r in less), "eval: the achieved share is not the asked one")
    check(any(r["value"] > 0 for r in less if r["metric"] == "kl"), "eval: half of the cache has no KL")
    lines = open(d + "/whole", "rb").read().splitlines(True)
    write(d + "/cut", b"".join(lines[:5]) + lines[5][:20])  # as an interruption leaves it
    check(works(*args, "-o", d + "/cut").rows() == whole, "eval: resumed after a cut line, the table differs")
    check(works(*args, "-o", d + "/cut").rows() == whole, "eval: with nothing left to do, the table differs")
    for i in (1, 2):
        works(*args, "--shard", "%d/2" % i, "-o", d + "/shard%d" % i)
    key = lambda r: json.dumps([r[k] for k in ("task", "policy", "ratio", "metric", "n")] + ["%.6f" % r["value"]])
    joined = works("eval", "--merge", d + "/shard1", d + "/shard2", "--json", "--chart", d + "/c.svg").rows()
    check(sorted(map(key, joined)) == sorted(map(key, whole)), "eval: merged shards differ from the whole")
    chart = open(d + "/c.svg").read()
    check(chart.startswith("<svg") and chart.endswith("</svg>\n"), "eval: the chart is not an SVG")
    merge = ["eval", "--merge", d + "/shard1", d + "/shard2"]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
    r = run(*merge, "--chart", d + "/c.svg", preexec_fn=limit)
    check(r.code == 1 and "c.svg: cannot write" in r.err and r.out, "eval: the table comes without its chart: %s" % r.err)
    check(open(d + "/c.svg").read() == chart, "eval: a full disk leaves the old chart")
    before = open(d + "/shard1", "rb").read()
    fails(1, "shard1: ", "eval", "--merge", d + "/shard1", d + "/shard2", "-o", d + "/shard1")
    works(*merge, "-o", d + "/both")
    joined = open(d + "/both", "rb").read()
    fails(1, "both: ", *merge, "-o", d + "/both", preexec_fn=limit)
    check(open(d + "/both", "rb").read() == joined and len(joined) > 1024, "eval: a full disk leaves the old results")
    check(open(d + "/shard1", "rb").read() == before, "eval: --merge changes no input")
    fails(1, "not a regular file", *args, "--chart", "/dev/null")
    fails(1, "settings", *args[:-1], "--stop", "x", "-o", d + "/whole")
    for say, text in (("line 3: a zero byte", b"".join(lines[:2] + [b"\0" * 40] + lines[2:])),
                      ("line 3: \"settings\" is missing", b"\n \n" + b"".join(lines[1:]))):
        write(d + "/zeros", text)
        fails(1, "zeros: " + say, "eval", "--merge", d + "/zeros")
        fails(1, say, *args, "-o", d + "/zeros")
        check(open(d + "/zeros", "rb").read() == text, "eval: %s: the file stays as it is" % say)
    for text in [b"first line\nsecond line without newline", b"one line", b"{\"set", b"\x08\0\0\0\0\0\0\0{}"]:
        ours = b"{\"settings\"".startswith(text)
        write(d + "/notes", text)
        if ours:
            works(*args, "-o", d + "/notes")
        else:
            fails(1, "notes: ", *args, "-o", d + "/notes")
            check(open(d + "/notes", "rb").read() == text, "eval -o: a file that is no file of results stays whole")
    bad = {"line 2": json.dumps(TASKS[0]) + "\n{", "\"questions\" is missing": '{"context": "a", "metric": "f1"}',
           "metric": json.dumps(dict(TASKS[0], metric="bleu"))}
    for words, text in bad.items():
        fails(1, words, "eval", m.path, write(d + "/bad", text))


def test_eval_show(m, d):
    """Every marked answer is shown, and marking is by words: see test_marks.c."""
    task = {"context": "The soup has vitamin A. Jo writes C++.", "questions": [
        {"question": "Which vitamin?", "answer_prefix": "It has vitamin", "answers": ["A", "\033[2J"]}]}
    tasks = write(d + "/show.jsonl", json.dumps(task))
    args = ["eval", m.path, tasks, "--policy", "streaming", "--ratio", "1,0.5", "-n", "4"]
    rows = [r for r in works(*args, "--show", "--json").rows() if "question" in r]
    check([(r["policy"], r["ratio"]) for r in rows] == [("full", 1), ("streaming", 0.5)], "eval --show: %s" % rows)
    check(all(r["wanted"] == ["A", "\033[2J"] and r["answer"] and r["value"] in (0, 1) for r in rows), "eval --show: %s" % rows)
    text = works(*args, "--show").text()
    check("Which vitamin?" in text and "wanted  A | " in text and "\033" not in text, "eval --show in words: %s" % text)
    task["questions"][0]["answers"] = ["A", " "]
    fails(1, "an empty answer", "eval", m.path, write(d + "/show.jsonl", json.dumps(task)))
    for metric, answer, words in [("exact", "\u200b", "an empty answer"), ("choice", "Paris", "no letter that stands alone")]:
        task["metric"], task["questions"][0]["answers"] = metric, [answer]
        fails(1, words, "eval", m.path, write(d + "/show.jsonl", json.dumps(task)))


def test_eval_flags(m, d):
    args = ["eval", m.path, write(d + "/lists.jsonl", json.dumps(TASKS[0])), "-n", 1]
    fails(2, "--policy needs 1 to 16 names", *args, "--policy", "")
    fails(2, "--policy needs 1 to 16 names", *args, "--policy", ",".join(["knorm"] * 17))
    fails(2, "--kv needs 1 to 16 names", *args, "--kv", "")
    for shard in ["", "1", "0/2", "3/2", " 1/2", "1/2 ", "1/0x2", "1/2/3", "1.5/2"]:
        fails(2, "needs I/N", *args, "--shard", shard)


def test_intervals(d):
    """Eight right answers of eight do not say that all will be right (Wilson); one says nothing about a mean."""
    def rows(value, kl):
        cell = {"task": "t", "metric": "f1", "policy": "p", "level": "", "kv": "f16", "context": 1, "ratio": 1, "kept": 1,
                "value": value, "same": value, "kl": kl, "nll": kl}
        path = write(d + "/intervals", json.dumps({"settings": "x"}) + "\n" + json.dumps(cell) + "\n")
        got = {r["metric"]: r for r in works("eval", "--merge", path, "--json").rows()}
        check("<svg" in (works("eval", "--merge", path, "--chart", d + "/i.svg"), open(d + "/i.svg").read())[1], "a chart")
        return [(r["low"], r["high"]) for r in (got["f1"], got["kl"])]
    near = lambda a, b: all(abs(x - y) < 1e-3 for x, y in zip(a, b))  # noqa: E731
    share, kl = rows([1] * 8, [0.1, 0.2, 0.3, 0.4, 0.1, 0.2, 0.3, 0.4])
    check(near(share, (0.6756, 1)) and near(kl, (0.25 - 0.1, 0.25 + 0.1)), "intervals of 8: %s %s" % (share, kl))
    share, kl = rows([0, 1, 1, 1], [0.1, 0.1, 0.1, 0.4])
    check(near(share, (0.3006, 0.9544)) and near(kl, (0, 0.4137)), "intervals of 4: %s %s" % (share, kl))
    share, kl = rows([0.5, 0.7], [0, 0])
    check(near(share, (0, 1)) and near(kl, (0, 0)), "intervals of 2: %s %s" % (share, kl))
    share, kl = rows([1], [0.1])
    check(near(share, (0.2065, 1)) and kl == (0, None), "intervals of one: %s %s" % (share, kl))


def test_eval_stream(m, d):
    long = dict(TASKS[2], context=TASKS[2]["context"] * 20)  # several blocks, so that early pairs go early
    args = ["eval", m.path, write(d + "/long.jsonl", json.dumps(long)), "--policy", "knorm", "--level", "uniform",
            "--ratio", "0.3", "-n", "4", "--kv", "f32", "--json"]
    once = works(*args).rows()
    check(works(*args, "--stream", "--window", "100000").rows() == once, "eval --stream: all in the window")
    early = works(*args, "--stream", "--window", "0").rows()
    of = lambda rows, metric: [r["value"] for r in rows if r["metric"] == metric and r["ratio"] < 1]
    check(of(early, "kl") != of(once, "kl"), "eval --stream evicts while it reads")
    check([r["kept"] for r in early] == [r["kept"] for r in once], "eval --stream: the share kept")
    check(works(*args, "--stream", "--window", "0", "-o", d + "/early").rows() == early, "eval --stream -o")
    check(works(*args, "--stream", "--window", "0", "-o", d + "/early").rows() == early, "eval --stream: nothing to do")
    fails(1, "settings", *args, "--stream", "--window", "64", "-o", d + "/early")
    fails(1, "settings", *args, "-o", d + "/early")
    settled = works(*args[:-3], "--kv", "f16,q8", "--stream", "--json").rows()
    check(len({r["value"] for r in settled if r["metric"] == "kl" and r["ratio"] < 1}) == 2, "eval --stream: q8 pages")
    many = dict(long, questions=long["questions"] * 20)  # more than decode together
    more = works(*args[:2], write(d + "/many.jsonl", json.dumps(many)), *args[3:], "--stream", "--window", "0").rows()
    check(all(abs(a - b) < 1e-6 for a, b in zip(of(more, "kl"), of(early, "kl"))), "eval --stream: many questions")
    other = lambda old, new: [new if a == old else a for a in args]  # noqa: E731
    fails(2, "looks back at the whole context", *other("knorm", "knorm,snapkv"), "--stream")
    fails(2, "keeps whole heads", *other("uniform", "uniform,head"), "--stream")
    fails(2, "choose one", *other("f32", "f16+q2"), "--stream")


def kept_pairs(cache, n_prefix):
    """{(layer, head): positions in the context} of a saved cache."""
    pairs, page, n = {}, 0, cache.shape["len"][1]
    for i, (length, dropped) in enumerate(zip(cache["len"], cache["dropped"])):
        pages = -(-(length - dropped) // 64)
        pairs[i // n, i % n] = {p - n_prefix for p in cache["pos"][page * 64:(page + pages) * 64] if p >= n_prefix}
        page += pages
    return pairs


def test_map(m, d):
    page, text = d + "/page.html", ["-p", "Ada <b>keeps</b> 40 goats & Über 日本. " * 6, "--ratio", "0.4", "--json"]
    row = works("map", m.path, *text, "-o", page).rows()[0]
    html = open(page, encoding="utf-8").read()
    same = works("compress", m.path, *text, "-o", d + "/page.kvc").rows()[0]
    check(row["n_kept"] == same["n_kept"] and row["n_pairs"] == same["n_pairs"], "map keeps what compress keeps")
    cache = Tensors(d + "/page.kvc")
    layers = [l for l, window in enumerate(cache["window"]) if window == 0]
    stays = kept_pairs(cache, same["n_prefix"])
    cells = [re.findall("data-layer='([0-9]+)'.*?data-kept='([0-9a-f]+)'", h) for h in re.findall("<tr><th>head.*", html)]
    for g, head in enumerate(cells):
        check([int(l) for l, _ in head] == layers, "map: columns are the layers that evict")
        for l, digits in head:
            shown = {4 * i + b for i, x in enumerate(digits) for b in range(4) if int(x, 16) >> b & 1}
            check(shown == stays[int(l), g], "map: layer %s, head %d: not what compress keeps" % (l, g))
    check(html.count("<i>") == row["n_ctx"], "map: an element per token")
    shown = re.sub("</?i>|·", "", html[html.index("<p><i>"):html.index("<script>")])
    check("Ada &lt;b>keeps&lt;/b> 40 goats &amp; Über 日本." in shown, "map: the text")
    whole = works("map", m.path, *text[:2], "--ratio", "1", "--json", "-o", d + "/whole.html").rows()[0]
    check(whole["n_kept"] == whole["n_pairs"], "map --ratio 1: all stay")
    fails(1, "the context is empty", "map", m.path, "-p", "", "-o", page)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
    fails(1, "page.html: cannot write", "map", m.path, *text, "-o", page, preexec_fn=limit)
    check(open(page, encoding="utf-8").read() == html, "map: a full disk leaves the old page")
    check(not [f for f in os.listdir(d) if f.endswith(".tmp")], "map: a full disk leaves nothing else")


def test_files(m, other, d):
    cache = d + "/good.kvc"
    works("compress", m.path, "-p", "The code of Chen is 12.", "-o", cache)
    missing = d + "/missing"
    for args in [["generate", missing, "-p", "a"], ["info", missing], ["ask", m.path, missing, "q"],
                 ["generate", m.path, "-f", missing],
                 ["logits", m.path, "--ids", missing, "-o", d + "/x"]]:
        fails(1, "missing: ", *args)
    fails(1, "No such file", "compress", m.path, "-p", "a", "-o", d + "/no/dir/x")
    fails(1, d, "compress", m.path, "-f", d, "-o", d + "/x")
    fails(1, "not a regular file", "compress", m.path, "-p", "a", "-o", "/dev/null")
    fails(1, "good.kvc: made with another model", "ask", other.path, cache, "q")
    fails(1, "good.kvc: ", "generate", cache, "-p", "a")
    fails(1, other.name, "ask", m.path, other.path, "q")
    text = write(d + "/text", "The code of Chen is 12.")
    fails(1, "is read by this command", "compress", m.path, "-f", text, "-o", text)
    fails(1, "is read by this command", "logits", m.path, "-c", cache, "-p", "a", "-o", cache)
    whole = open(m.path, "rb").read()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for n in [0, 7, 8, 100, header - 1, header, header + 1000, len(whole) - 1]:
        fails(1, "cut.kvz: ", "generate", write(d + "/cut.kvz", whole[:n]), "-p", "a", "-n", 1)
        fails(1, "cut.kvz: ", "info", d + "/cut.kvz")
    whole = open(cache, "rb").read()
    for n in [0, 9, len(whole) // 2, len(whole) - 1]:
        fails(1, "cut.kvc: ", "ask", m.path, write(d + "/cut.kvc", whole[:n]), "q")
    before = sorted(os.listdir(d))
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    fails(1, "full.kvc: ", "compress", m.path, "-f", text, "-o", d + "/full.kvc", preexec_fn=limit)
    fails(1, "full: ", "logits", m.path, "-f", text, "-o", d + "/full", preexec_fn=limit)
    check(sorted(os.listdir(d)) == before, "a full disk leaves no file")


def test_streams(m):
    if os.path.exists("/dev/full"):
        with open("/dev/full", "w") as full:
            for args in [["-h"], ["info", m.path], ["tokenize", m.path, "-p", "abc"],
                         ["generate", m.path, "-p", "abc", "-n", 3, "--ignore-eos"]]:
                r = run(*args, stdout=full)
                check(r.code == 1 and "run: stdout: " in r.err, "%s, disk full: %s" % (args, r.err))
    read, write_end = os.pipe()
    os.close(read)
    r = run("generate", m.path, "-p", "abc", "-n", 3, "--ignore-eos", stdout=write_end)
    os.close(write_end)
    check(r.code == 1 and "run: stdout: Broken pipe" in r.err, "a closed pipe: %s" % r.err)


def test_interrupt(m, d):
    ids = write_ids(d + "/many.ids", [7] * 60000)
    for command in ["compress", "score", "map", "logits"]:
        for sig in [signal.SIGINT, signal.SIGTERM]:
            before = sorted(os.listdir(d))
            p = subprocess.Popen([RUN, command, m.path, "--ids", ids, "-o", d + "/stopped"],
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            time.sleep(0.4)
            p.send_signal(sig)
            out, err = p.communicate(timeout=60)
            last = err.decode().strip().split("\n")[-1]
            check(p.returncode == 128 + sig, "%s: exit %d" % (command, p.returncode))
            check(last == "run: interrupted", "%s: %r" % (command, err))
            check(sorted(os.listdir(d)) == before, "an interrupted %s leaves no file" % command)
    p = subprocess.Popen([RUN, "generate", m.path, "-p", "a", "-n", "1000000", "--ignore-eos",
                          "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    time.sleep(0.4)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=60)
    check(p.returncode == 130 and json.loads(out)["n_answer"] > 0, "Ctrl-C ends a generation")
    reader, writer = os.pipe()  # of a program that does not read
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    p = subprocess.Popen([RUN, "generate", m.path, "-p", "a", "-n", "1000000", "--ignore-eos"], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    time.sleep(1)
    p.send_signal(signal.SIGINT)
    err = p.communicate(timeout=60)[1].decode()
    check(p.returncode == 130 and "Interrupted system call" not in err, "Ctrl-C while nobody reads: exit %d: %s" % (p.returncode, err))
    os.close(reader)


def test_interrupted_chat(m):
    p = subprocess.Popen([RUN, "chat", m.path, "-n", "100000", "--ignore-eos", "--json"],
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    p.stdin.write(b"one\ntwo\n")
    p.stdin.flush()
    for _ in range(2):
        time.sleep(0.4)
        p.send_signal(signal.SIGINT)
        row = json.loads(p.stdout.readline())
        check(0 < row["n_answer"] < 100000, "Ctrl-C ends an answer, not the chat")
    p.stdin.close()
    check(p.wait(timeout=60) == 0, "the end of its input ends the chat")
    p.stdout.close()
    p.stderr.close()


def small_stack():
    resource.setrlimit(resource.RLIMIT_STACK, (256 << 10, 256 << 10))


def test_small_stack(m, d):
    """The stack that the system gives is not what attention needs: a shell's limit changes no bit."""
    text, caches = d + "/stack.txt", []
    write(text, "The mill stood by the river and the miller slept. " * 60)
    for how in [{}, {"preexec_fn": small_stack}]:
        cache = d + "/stack%d" % len(caches)
        works("compress", m.path, "-f", text, "-o", cache, "-j", "2", "-q", **how)
        caches.append(open(cache, "rb").read())
    check(caches[0] == caches[1], "a cache made with a stack of 256 KB is another one")


def test_processors(m):
    """Threads beyond the processors that the process may use only wait for each other."""
    if not hasattr(os, "sched_setaffinity"):
        return
    one = lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # noqa: E731
    flags = ["bench", m.path, "--prompt", 8, "--depth", 0, "--ratio", 1, "--batch", 1, "-n", 1, "--json"]
    check(works(*flags, preexec_fn=one).rows()[0]["threads"] == 1, "threads: not those of the affinity")
    r = works(*flags, "-j", 8, preexec_fn=one)
    check(r.rows()[0]["threads"] == 1 and "may use 1 processor" in r.err, "-j 8 on one processor: %s" % r.err)


def test_fit(m, d):
    """What stays is fitted: the next token's distribution comes nearer to the full cache's, whoever scores."""
    text = write(d + "/fit.txt", "The mill of Gavi was built by Ann Grey, who kept forty goats and a blue boat. " * 8)
    task = {"task": "fit", "context": open(text).read(), "metric": "contained",
            "questions": [{"question": "Who built the mill?", "answers": ["Ann"]},
                          {"question": "What did she keep?", "answers": ["goats"]}]}
    tasks = write(d + "/fit.jsonl", json.dumps(task) + "\n")
    for policy in ("kvzip", "snapkv", "random"):
        kl = {}
        for fit in ("none", "values", "both"):
            rows = works("eval", m.path, tasks, "--policy", policy, "--ratio", "1,0.2", "--fit", fit, "-n", "12", "--json",
                         "-q").rows()
            kl[fit], = (r["value"] for r in rows if r["metric"] == "kl" and r["ratio"] == 0.2)
            check(all(r["value"] < 1e-12 for r in rows if r["metric"] == "kl" and r["ratio"] == 1), "fit: ratio 1 is untouched")
        check(kl["both"] < 0.8 * kl["none"] and kl["values"] < kl["none"], "fit, %s: KL %s" % (policy, kl))
    plain, fitted, again = d + "/plain.kvc", d + "/fitted.kvc", d + "/again.kvc"
    compress = ("compress", m.path, "-f", text, "--ratio", "0.2", "-q", "-o")
    works(*compress, plain)
    works(*compress, fitted, "--fit", "none")
    check(open(plain, "rb").read() == open(fitted, "rb").read(), "--fit none changes no byte")
    row = works(*compress, fitted, "--fit", "both", "--json", "-j", "1").rows()[0]
    works(*compress, again, "--fit", "both", "-j", "3")
    check(row["fit"] == "both" and open(again, "rb").read() == open(fitted, "rb").read(), "fit: the same bits from more threads")
    check("bias" in Tensors(fitted).shape and "bias" not in Tensors(plain).shape, "biases are saved where there are some")
    check(works("info", fitted, "--json").rows()[0]["fit"] == "both", "info shows how a cache was fitted")
    works("ask", m.path, fitted, "Who?", "-n", "3", "-q")
    fails(2, "--fit has no effect", "compress", m.path, "-f", text, "-o", again, "--fit", "both", "--demote", "q2")
    fails(2, "keeps what --fit replaces", "eval", m.path, tasks, "--kv", "f16+q2", "--fit", "both")
    data, at = bytearray(open(fitted, "rb").read()), Tensors(fitted).at["bias"]
    data[at:at + 4] = struct.pack("<f", float("inf"))
    fails(1, "the bias of a pair is no number", "ask", m.path, write(again, bytes(data)), "Who?", "-q")


def test_left_behind(m, d):
    """Pairs that a window left behind, in a layer that has none: ask ended in a segmentation fault."""
    works("compress", m.path, "-p", "The mill was built by Ann Grey. " * 20, "-o", d + "/whole.kvc", "-q")
    with open(d + "/whole.kvc", "rb") as f:
        data = bytearray(f.read())
    for name in ["len", "dropped"]:  # so that as many pages are there as the lengths need
        at = Tensors(d + "/whole.kvc").at[name]
        struct.pack_into("<i", data, at, struct.unpack_from("<i", data, at)[0] + 64)
    write(d + "/left.kvc", bytes(data))
    fails(1, "layer 0 has no window", "ask", m.path, d + "/left.kvc", "Who?")
    fails(1, "layer 0 has no window", "info", d + "/left.kvc")


def test_lying_counts(m, d):
    """Counts that no cache has, each within its type: their sums and differences are refused, not computed."""
    whole = d + "/whole.kvc"
    works("compress", m.path, "-p", "The mill was built by Ann Grey. " * 20, "-o", whole, "-q")
    data, at = open(whole, "rb").read(), Tensors(whole).at["len"]
    longer = bytearray(data)
    struct.pack_into("<i", longer, at, 1 << 30)
    write(d + "/longer.kvc", bytes(longer))
    for command in [["ask", m.path, d + "/longer.kvc", "Who?"], ["info", d + "/longer.kvc"]]:
        fails(1, "a head of 1073741824 pairs less 0, after ", *command)
    n = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + n])
    for key in ["n_prefix", "n_ctx", "next_pos"]:
        header["__metadata__"][key] = str(1 << 30)
    header = json.dumps(header).encode()
    header += b" " * (-(8 + len(header)) % 64)
    write(d + "/counts.kvc", struct.pack("<Q", len(header)) + header + data[8 + n:])
    fails(1, "metadata n_prefix: expected a whole number from 0 to 268435456", "info", d + "/counts.kvc")


def main():
    smol, llama = Model("smol"), Model("llama")
    with tempfile.TemporaryDirectory() as d:
        test_usage(smol)
        test_flags(smol, d)
        test_tokenize_input(smol, d)
        for m in [smol, llama, Model("qwen2"), Model("qwen3"), Model("gemma3")]:
            test_tokenize(m)
            test_drafts(m, d)
            test_logits(m, d)
            test_score(m, d)
            test_compress(m, d)
        test_ask(smol, d)
        test_talk(smol, d)
        test_apart(smol, d)
        test_pipe(smol, d)
        test_paste(smol)
        test_chat(smol, d)
        test_generate(smol, d)
        test_edges(smol, d)
        test_info(smol, d)
        test_profile(smol, llama, d)
        test_budget(smol, d)
        test_page_types(smol, d)
        test_bench(smol)
        test_readers(smol, d)
        test_readers_measured(smol, d)
        test_perplexity(smol, d)
        test_eval(smol, d)
        test_eval_show(smol, d)
        test_eval_flags(smol, d)
        test_intervals(d)
        test_eval_stream(smol, d)
        test_map(smol, d)
        test_map(Model("gemma3"), d)
        test_files(smol, llama, d)
        test_streams(smol)
        test_small_stack(smol, d)
        test_lying_counts(smol, d)
        test_left_behind(smol, d)
        for m in (smol, Model("qwen3"), Model("gemma3")):
            test_fit(m, d)
        test_processors(smol)
        test_interrupt(smol, d)
        test_interrupted_chat(smol)
    return end("test_cli")


if __name__ == "__main__":
    sys.exit(main())
