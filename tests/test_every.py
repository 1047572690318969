#!/usr/bin/env python3
"""test_every.py: every policy and level that -h lists, through the program: each compresses to the share
asked for, around each other, by thresholds, with questions, and while tokens come; and what is refused.

RUN, FIXTURES as for test_cli.py. The last line says how many checks passed and failed.
"""
import json
import os
import re
import subprocess
import sys
import tempfile

from checks import Tensors, check, end

HERE = os.path.dirname(os.path.abspath(__file__))
RUN = os.environ.get("RUN", os.path.join(os.path.dirname(HERE), "run"))
FIXTURES = os.environ.get("FIXTURES", os.path.join(HERE, "fixtures"))
SMOL = os.path.join(FIXTURES, "smol.kvz")
TEXT = "The miller kept seven geese by the old bridge. In spring the river rose, and the bridge went with it. " * 3
ASKS = ["finch", "task"]  # these need a question
NAMED = ["h2o", "scissorhands", "criticalkv", "finch", "task", "nacl", "pyramidinfer", "infinipot", "fastgen", "duo",
         "chunkkv", "dcp", "ltp", "lagkv", "leverage", "simlayerkv", "triattention", "curdkv", "tova", "keydiff", "qfilters"]
DECODE = ["h2o", "tova", "scissorhands", "keydiff", "triattention"]


def run(*args):
    return subprocess.run([RUN, *map(str, args)], input=b"", capture_output=True, timeout=300)


def works(*args):
    p = run(*args)
    check(p.returncode == 0, "%s: %s" % (" ".join(map(str, args)), p.stderr.decode().strip()))
    return [json.loads(line) for line in p.stdout.splitlines()] if "--json" in args else p.stdout.decode()


def refuses(words, *args):
    p = run(*args)
    lines = p.stderr.decode().strip().split("\n")
    check(p.returncode == 2 and not p.stdout and len(lines) == 1 and words in lines[0],
          "%s: exit %d, %r, not %r" % (" ".join(map(str, args)), p.returncode, p.stderr.decode(), words))


def listed(flag):
    """Names in -h below a flag."""
    text = run("compress", "-h").stdout.decode()
    rows = re.search(r"(?m)^  %s .*\n((?: {20,}.*\n)+)" % flag, text)[1]
    return re.findall(r"(?m)^ {26}([a-z0-9+]+): ", rows)


def test_policies(d, compress):
    policies = listed("--policy")
    check(set(NAMED) <= set(policies), "-h lists %s" % policies)
    for p in policies + ["chunkkv:kvzip", "criticalkv:h2o", "chunkkv:task", "criticalkv:leverage"]:
        question = ["--question", "What went?"] if p.split(":")[-1] in ASKS else []
        r = works(*compress, "--policy", p, "--ratio", 0.25, *question)[0]
        check(r["policy"] == p and r["n_kept"] == r["n_pairs"] // 4, "%s keeps a quarter: %s" % (p, r))
    for p in ASKS + ["chunkkv:finch"]:
        refuses("policy %s needs --question TEXT" % p, *compress, "--policy", p)
    refuses("there is no question in it", *compress, "--policy", "finch", "--question", " ")
    for p, why in [("think", "drops channels of keys"), ("adakv", "--level layer")]:
        refuses("--policy %s is not one of them: it" % p, *compress, "--policy", p)
        refuses(why, *compress, "--policy", p)
    for bad in ["chunkkv:", "chunkkv:chunkkv", "knorm:chunkkv", "chunkkv:no"]:
        refuses("--policy %s: there are" % bad, *compress, "--policy", bad)


def test_questions(d, score):
    def scores(*flags):
        works(*score, *flags)
        return list(Tensors(d + "/s")["scores"])
    for p in ["snapkv", "nacl", "finch", "task", "chunkkv", "criticalkv"]:
        a, b = (scores("--policy", p, "--question", q) for q in ("How many geese?", "What went with the river?"))
        check(a != b, "%s: two questions, the same scores" % p)
    check(scores("--policy", "snapkv") != scores("--policy", "snapkv", "--question", "Who?"), "snapkv asks a question")
    by_task = scores("--policy", "task", "--task", "Count animals.")
    check(by_task == scores("--policy", "finch", "--task", "Count animals.", "--question", "Count animals."),
          "the task's description is what policy task asks")
    p = run(*score, "--policy", "knorm", "--question", "Who?")
    check(p.returncode == 0 and b"--question has no effect" in p.stderr, "a question that nobody asks is said")


def test_levels(d, compress):
    levels = listed("--level")
    check({"token", "threshold"} <= set(levels), "-h lists %s" % levels)
    for level in levels:
        r = works(*compress, "--level", level, "--policy", "expected")[0]
        check(r["level"] == level and 0 < r["kept"] <= 1, "level %s: %s" % (level, r))
    r = works(*compress, "--level", "token", "--policy", "h2o", "--ratio", 0.5)[0]
    heads = r["n_pairs"] // r["n_ctx"]
    check(r["n_kept"] == r["n_ctx"] // 2 * heads, "level token keeps tokens: %s" % r)
    info = json.loads(run("info", d + "/c", "--json").stdout)
    check(info["pairs"] == (r["n_prefix"] + r["n_ctx"] // 2) * heads, "level token: pairs of tokens %s" % info)


def test_thresholds(d, compress, score):
    for p, at in [("knorm", -5.5), ("kvzip", 0.05), ("kvzap", -3.0), ("dcp", 1.0), ("lagkv", 1.0)]:
        works(*score, "--policy", p)
        t = Tensors(d + "/s")
        n = t.shape["scores"][-1]
        want = sum(x >= at or i % n >= n - 128 for i, x in enumerate(t["scores"]))
        r = works(*compress, "--policy", p, "--threshold", at)[0]
        check(r["n_kept"] == want and abs(r["kept"] - want / r["n_pairs"]) < 1e-6, "%s: %d, not %d" % (p, r["n_kept"], want))
        works("map", *compress[1:-4], "-o", d + "/m.svg", "-q", "--policy", p, "--threshold", at)
    stays = works(*compress, "--policy", "knorm", "--threshold", 0, "--set", "newest=9")[0]
    check(stays["n_kept"] == 9 * stays["n_pairs"] // stays["n_ctx"], "the newest stay: %s" % stays)
    r = works(*compress, "--policy", "keydiff", "--threshold", 0, "--stream", "--json")[0]
    check(0 < r["kept"] < 1, "a threshold while tokens come: %s" % r)
    for flags in (["--ratio", 0.5], ["--level", "pair"], ["--budget", 9], ["--ref-ties"]):
        refuses("%s has no effect: --threshold" % flags[0], *compress, "--threshold", 1, *flags)
    refuses("needs a number", *compress, "--threshold", "much")


def test_eval(d):
    with open(d + "/tasks", "w") as f:
        f.write(json.dumps({"context": TEXT, "metric": "contained", "questions": [
            {"question": "How many geese?", "answers": ["seven"]}]}))
    args = ["eval", SMOL, d + "/tasks", "-n", 3, "--json", "-q"]
    rows = works(*args, "--policy", "h2o,chunkkv:knorm,finch", "--level", "token,uniform", "--ratio", 0.5, "--question", "How many?")
    check({r["policy"] for r in rows} == {"full", "h2o", "chunkkv:knorm", "finch"}, "eval: %s" % rows)
    refuses("policy finch needs --question", *args, "--policy", "h2o,finch")
    rows = [r for r in works(*args, "--policy", "knorm", "--threshold", "-5.5") if r["policy"] == "knorm"]
    check(rows and all(r["level"] == "threshold" and abs(r["ratio"] - r["kept"]) < 1e-3 for r in rows), "eval: %s" % rows)


def test_each_question(d):
    """Each question is answered as if it were the only one, and had been given as --question."""
    questions = [{"question": "How many geese?", "answer_prefix": "There are", "answers": ["seven"]},
                 {"question": "What rose in spring?", "answers": ["river"]}, {"question": "Who?", "answers": ["miller"]}]

    def kl(name, asked, *flags):
        with open(d + "/" + name, "w") as f:
            f.write(json.dumps({"context": TEXT, "metric": "contained", "questions": asked}))
        rows = works("eval", SMOL, d + "/" + name, "-n", 3, "--json", "-q", "--policy", "knorm,finch,snapkv", "--ratio", "0.3", *flags)
        return {r["policy"]: r["value"] for r in rows if r["metric"] == "kl"}
    each = kl("all", questions, "--question-each")
    alone = [kl("one", [q], "--question", q["question"]) for q in questions]
    same = kl("all", questions, "--question", "Who?")
    for p in each:
        mean = sum(a[p] for a in alone) / len(alone)
        check(abs(each[p] - mean) < 1e-6 + 1e-4 * mean, "%s: each question %g, alone %g" % (p, each[p], mean))
    check(each["knorm"] == same["knorm"] and each["finch"] != same["finch"], "who sees a question: %s, %s" % (each, same))
    refuses("choose one", "eval", SMOL, d + "/all", "--policy", "finch", "--question", "Who?", "--question-each")
    p = run("eval", SMOL, d + "/one", "-n", 3, "--policy", "knorm", "--ratio", "0.3", "--question-each")
    check(p.returncode == 0 and b"--question-each has no effect" in p.stderr, "each question that nobody asks is said: %s" % p.stderr)


def test_decoding(d):
    for p in DECODE:
        args = ["generate", SMOL, "-p", TEXT, "-n", 150, "--ignore-eos", "--temp", 0, "--budget", 60, "--window", 20, "--policy", p]
        one, two = (run(*args, "-j", j) for j in (1, 2))
        check(one.returncode == 0 and one.stdout == two.stdout and one.stdout, "generate --policy %s: %s" % (p, one.stderr.decode()))
    p = run("generate", SMOL, "-p", TEXT, "-n", 5, "--budget", 60, "--policy", "snapkv")
    check(p.returncode == 1 and b"policy snapkv looks back at the whole context" in p.stderr, "snapkv cannot stream")


def main():
    with tempfile.TemporaryDirectory() as d:
        with open(d + "/sample", "w") as f:
            f.write(TEXT)
        works("calibrate", SMOL, "-f", d + "/sample", "-o", d + "/profile", "--chunk", 64, "-q")
        text = [SMOL, "-f", d + "/sample", "--profile", d + "/profile", "--kv", "f32"]
        compress, score = ["compress", *text, "-o", d + "/c", "--json", "-q"], ["score", *text, "-o", d + "/s"]
        test_policies(d, compress)
        test_questions(d, score)
        test_each_question(d)
        test_levels(d, compress)
        test_thresholds(d, compress, score)
        test_eval(d)
        test_decoding(d)
    return end("test_every")


if __name__ == "__main__":
    sys.exit(main())
