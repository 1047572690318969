#!/usr/bin/env python3
"""test_fitted.py: --fit as users drive it: what it draws, what comes after it.

Run after `make run`. The last line says how many checks passed and failed.
"""
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile

from checks import Tensors, check, end
from test_cli import RUN, Model, fails, works, write, write_ids

TEXT = "The mill of Gavi was built by Ann Grey, who kept forty goats and a blue boat. " * 8
TASK = {"task": "mill", "context": TEXT, "metric": "contained",
        "questions": [{"question": "Who built the mill?", "answers": ["Ann"]},
                      {"question": "What did she keep?", "answers": ["goats"]}]}

# ---- map ----

def kept_biases(cache, n_prefix):
    """{(layer, head): biases of the pairs of the context, by their positions} of a saved cache that is fitted."""
    biases, page, n = {}, 0, cache.shape["len"][1]
    for i, (length, dropped) in enumerate(zip(cache["len"], cache["dropped"])):
        pages = -(-(length - dropped) // 64)
        rows = slice(page * 64, (page + pages) * 64)
        pairs = sorted(zip(cache["pos"][rows], cache["bias"][rows]))
        biases[i // n, i % n] = [b for p, b in pairs if p >= n_prefix]
        page += pages
    return biases


def test_map_fitted(m, d):
    """The page has the biases that compress saves; what they stand for, and nothing of it without them."""
    page, text = d + "/fitted.html", ["-p", "Ada keeps 40 goats & Ann none. " * 12, "--ratio", "0.2", "--json"]
    plain = works("map", m.path, *text, "-o", page).rows()[0]
    html = open(page, encoding="utf-8").read()
    check(plain["fit"] is None and plain["stands_for"] == 1 and "data-bias" not in html, "map: biases without --fit")
    row = works("map", m.path, *text, "-o", page, "--fit", "values").rows()[0]
    shown = open(page, encoding="utf-8").read()
    check(row["fit"] == "values" and shown.replace(", fitted values", "") == html, "map: --fit values is not drawn")
    r = works("map", m.path, *text, "-o", page, "--fit", "both")
    html, row = open(page, encoding="utf-8").read(), r.rows()[0]
    saved = works("compress", m.path, *text, "--fit", "both", "-o", d + "/fitted.kvc").rows()[0]
    check(row["fit"] == "both" and row["n_kept"] == plain["n_kept"] == saved["n_kept"], "map: a fit changes what stays")
    biases = kept_biases(Tensors(d + "/fitted.kvc"), saved["n_prefix"])
    cells = [re.findall("data-layer='([0-9]+)'.*?data-bias='([-0-9. ]*)'>", h) for h in re.findall("<tr><th>head.*", html)]
    far = [abs(float(a) - b) for g, head in enumerate(cells) for l, drawn in head
           for a, b in itertools.zip_longest(drawn.split(), biases[int(l), g], fillvalue=99)]
    check(len(far) == row["n_kept"] and max(far) < 0.0051, "map: other biases than those that are saved")
    mean = sum(math.exp(b) for g, head in enumerate(cells) for l, _ in head for b in biases[int(l), g]) / row["n_kept"]
    check(abs(row["stands_for"] / mean - 1) < 1e-3 and "Each stands for %.2f pairs" % mean in html, "map: stands for %g" % mean)
    check("each stands for %.2f;" % mean in r.err, "map: %s" % r.err)
    check("has no effect" in works("map", m.path, *text[:2], "--ratio", "1", "--fit", "both", "-o", page).err, "map: --fit of all")
    fails(2, "--fit has no effect", "map", m.path, *text, "-o", page, "--fit", "both", "--demote", "q2")


# ---- as tokens come ----


def test_streamed(m, d):
    """What is evicted while a context is read is fitted each time; the same pairs stay, and any threads give the same."""
    long = ["-f", write(d + "/long", TEXT * 3), "--json"]
    for how in (["--ratio", "0.3", "--stream"], ["--budget", "150", "--kv", "q8"]):
        rows, bytes = [], set()
        for fit in ("none", "values", "merge", "pool", "both"):
            rows += works("compress", m.path, *long, *how, "--fit", fit, "-o", d + "/streamed.kvc").rows()
        check([r["fit"] for r in rows] == [None, "values", "merge", "pool", "both"], "%s: fitted %s" % (how, [r["fit"] for r in rows]))
        check(len({r["n_kept"] for r in rows}) == 1 and rows[0]["n_kept"] < rows[0]["n_pairs"], "%s: a fit changes how many stay" % how)
        check(any(b for b in Tensors(d + "/streamed.kvc")["bias"]), "%s: no biases are saved" % how)
        check("fit                both" in works("info", d + "/streamed.kvc").text(), "%s: info does not say it" % how)
        for threads in "123":
            works("compress", m.path, *long, *how, "--fit", "both", "-o", d + "/threads.kvc", "-j", threads)
            bytes.add(open(d + "/threads.kvc", "rb").read())
        check(len(bytes) == 1, "%s: threads change what is fitted" % how)
    works("ask", m.path, d + "/streamed.kvc", "Who built the mill?", "-n", "4")
    for fit in ("none", "both"):
        works("compress", m.path, *long, "--budget", "100000", "--fit", fit, "-o", d + "/all-%s.kvc" % fit)
    plain, fitted = (Tensors(d + "/all-%s.kvc" % fit).raw for fit in ("none", "both"))
    check(plain == fitted, "nothing went, but something was fitted")


# ---- results ----

def cells(path):
    return [json.loads(line) for line in open(path, "rb").read().splitlines()[1:]]


def test_eval_fits(m, d):
    """Several fits in one run give what each gives alone; files tell them apart, and so do tables and charts."""
    args = ["eval", m.path, write(d + "/fit.jsonl", json.dumps(TASK) + "\n"), "--policy", "knorm", "--ratio", "1,0.2", "-n", "8"]
    file, chart = d + "/fits", d + "/fits.svg"
    rows = works(*args, "--fit", "none,values,both", "-o", file, "--chart", chart, "--json").rows()
    for fit in ("none", "values", "both"):
        alone = works(*args, "--fit", fit, "--json").rows()
        check(alone == [r for r in rows if r["fit"] == fit or r["policy"] == "full"], "eval: --fit %s alone differs" % fit)
    kl = {(r["policy"], r["fit"], r["ratio"]): r["value"] for r in rows if r["metric"] == "kl"}
    check(set(kl) == {("full", "none", 1)} | {("knorm", f, r) for f in ("none", "values", "both") for r in (1, 0.2)},
          "eval: rows %s" % sorted(kl))
    check(kl["knorm", "both", 0.2] != kl["knorm", "values", 0.2] != kl["knorm", "none", 0.2], "eval: fits that make no difference")
    check(kl["knorm", "both", 1] == kl["full", "none", 1], "eval: ratio 1 is the full cache, however it is fitted")
    check({c["fit"] for c in cells(file)} == {"none", "values", "both"}, "eval: the column of the file")
    kinds = works(*args, "--fit", "none,merge,pool", "--json").rows()
    merged = [r["value"] for r in kinds if r["metric"] == "kl" and r["ratio"] == 0.2]
    check(len(set(merged)) == 3 and merged[0] == kl["knorm", "none", 0.2], "eval: merging makes no difference: %s" % merged)
    drawn = open(chart, encoding="utf-8").read()
    check(len(re.findall(">knorm pair, f16[^<]*<", drawn)) == 3 and ">knorm pair, f16, fitted both<" in drawn, "eval: the chart's lines")
    table = works("eval", "--merge", file).text()
    lines = re.findall(r"\n  knorm pair f16( values| both)? +[0-9]", table)
    check(sorted(lines) == 4 * [""] + 4 * [" both"] + 4 * [" values"], "eval: the table: %s" % table)
    before = open(file, "rb").read()
    works(*args, "--fit", "none,values,both", "-o", file)
    check(open(file, "rb").read() == before, "eval: with nothing left to do, the file grew")
    some = d + "/some"
    works(*args, "--fit", "both", "-o", some)
    works(*args, "--fit", "none,values,both", "-o", some)
    key = lambda c: json.dumps(c, sort_keys=True)  # noqa: E731
    check(sorted(cells(some), key=key) == sorted(cells(file), key=key), "eval: fits added to a file")
    shown = works(*args, "--fit", "both", "--show", "--json").rows()
    check({r["fit"] for r in shown if "question" in r} == {"none", "both"}, "eval --show: which fit")
    for fit, words in (("", "--fit needs 1 to 16 names"), ("bias", "--fit bias: needs one of"), ("none,x", "--fit x: needs one of")):
        fails(2, words, *args, "--fit", fit)
    fails(2, "keeps what --fit replaces", *args, "--kv", "f16,f16+q2", "--fit", "none,values")
    fails(2, "--fit has no effect", "eval", "--merge", file, "--fit", "both")


def test_results_without_fit(m, d):
    """Results of before there was a fit are those of none: resumed, merged, contradicted."""
    args = ["eval", m.path, write(d + "/fit.jsonl", json.dumps(TASK) + "\n"), "--policy", "knorm", "--ratio", "0.2", "-n", "8"]
    new, old = d + "/new", d + "/old"
    rows = works(*args, "-o", new, "--json").rows()
    lines = open(new).read().replace(', "fit": "none"', "")
    check('"fit"' not in lines, "eval: the old format: %s" % lines)
    write(old, lines)
    check(works("eval", "--merge", old, "--json").rows() == rows, "eval: results without a fit are not those of none")
    check(works("eval", "--merge", old, new, "--json").rows() == rows, "eval: merged with newer ones they are there twice")
    works(*args, "-o", old)
    check(open(old).read() == lines, "eval: resumed, known cells are done again")
    works(*args, "--fit", "none,both", "-o", old)
    check(open(old).read().startswith(lines) and [c.get("fit") for c in cells(old)] == [None, None, "both"], "eval: a fit added")
    cell = json.loads(lines.splitlines()[-1])
    cell["value"] = [1 - v for v in cell["value"]]
    other = write(d + "/other", lines.splitlines()[0] + "\n" + json.dumps(cell) + "\n")
    fails(1, "policy knorm, ratio 0.2 is there already with other values, fit none", "eval", "--merge", new, other)
    cell["fit"] = 5
    fails(1, "fit", "eval", "--merge", write(other, lines.splitlines()[0] + "\n" + json.dumps(cell) + "\n"))


# ---- while it is fitted ----

def until(fd, word):
    """What a terminal shows up to the word, or all of it."""
    seen = b""
    while word not in seen:
        try:
            new = os.read(fd, 4096)
        except OSError:  # its other end is closed
            return seen
        seen += new
        if not new:
            return seen
    return seen


def test_progress(m, d):
    """Fitting shows how far it is, and Ctrl-C ends it as it ends reading: status 130, one line, no file."""
    ids = write_ids(d + "/many.ids", [30 + i * 7919 % 600 for i in range(1500)])
    slow = ["--ids", ids, "--policy", "streaming", "--ratio", "0.9", "--fit", "both", "--isa", "scalar", "-j", "1", "-o", d + "/stopped"]
    for command in ("compress", "map"):
        lead, follow = os.openpty()
        p = subprocess.Popen([RUN, command, m.path, *slow], stdout=subprocess.PIPE, stderr=follow, env=dict(os.environ, TERM="xterm"))
        os.close(follow)
        seen = until(lead, b"\rfit ")
        p.send_signal(signal.SIGINT)
        seen += until(lead, b"no such word")
        out, _ = p.communicate(timeout=60)
        os.close(lead)
        last = seen.decode().strip().split("\n")[-1]
        check(b"\rfit " in seen, "%s --fit shows no progress: %r" % (command, seen))
        check(p.returncode == 130 and last.endswith("\r\033[Krun: interrupted"), "%s: exit %d, %r" % (command, p.returncode, last))
        check(not out and not os.path.exists(d + "/stopped"), "an interrupted %s leaves a file" % command)


# ---- what comes after a fitted context ----

def compressed(m, d, name, *flags):
    """A cache of TEXT: its path, and the row that compress prints."""
    path = d + "/" + name
    row = works("compress", m.path, "-f", write(d + "/mill.txt", TEXT), "--ratio", "0.2", "--json", "-q", "-o", path, *flags).rows()[0]
    return path, row


def test_again(m, d):
    """A fitted cache is not compressed again: whichever way is tried, one line says so."""
    cache, _ = compressed(m, d, "once.kvc", "--fit", "both")
    before = open(cache, "rb").read()
    fails(1, "once.kvc: ", "compress", m.path, "-f", cache, "-o", d + "/twice.kvc", "--fit", "both")
    fails(2, "unexpected argument", "compress", m.path, cache, "-p", TEXT, "-o", d + "/twice.kvc")
    check(open(cache, "rb").read() == before, "what is refused changes the cache")


def test_budget(m, d):
    """A conversation about a saved cache with a budget: what is said is evicted, what was compressed stays."""
    talk = "".join("Who built the mill, and who came in year %d?\n" % i for i in range(24)).encode()
    for flags in ((), ("--fit", "both")):
        cache, _ = compressed(m, d, "budget.kvc", *flags)
        before = open(cache, "rb").read()

        def answers(*how):
            r = works("chat", m.path, "-c", cache, "-n", 12, "--ignore-eos", "--temp", 0, "--json", *how, input=talk)
            return [row["answer"] for row in r.rows()], r.err

        whole, _ = answers()
        roomy, err = answers("--budget", 100000)
        check(roomy == whole and "evicting: policy" in err, "a budget that is never reached changes nothing: %s" % err[:200])
        for how in (("--budget", 64, "--window", 64), ("--ratio", 0.5, "--window", 64)):
            small, _ = answers(*how)
            check(len(small) == 24 and small[:2] == whole[:2], "%s: the first answers are those of the whole cache" % (how,))
            check(small != whole, "%s: later ones see less of what was said" % (how,))
        check(open(cache, "rb").read() == before, "the file stays as it is")


def test_questions(m, d):
    """Questions together, one at a time and in a conversation: the answers that a fitted context gives."""
    flags = ["-n", 12, "--ignore-eos", "--json", "-q"]
    asked = ["Who built the mill?", "What did she keep?", "And the boat?", "Who?"]
    answers = {}
    for fit in ("none", "both"):
        cache, _ = compressed(m, d, "asked.kvc", "--fit", fit)
        of = lambda *args: [r["answer"] for r in works("ask", m.path, cache, *args, *flags).rows()]  # noqa: E731
        answers[fit] = of(*asked)
        check(all(of(*asked, "--batch", b) == answers[fit] for b in (1, 3)), "fit %s: batches change answers" % fit)
        check([of(q)[0] for q in asked] == answers[fit], "fit %s: questions together change answers" % fit)
        check(of(*asked, "-j", 1) == of(*asked, "-j", 3) == answers[fit], "fit %s: threads change answers" % fit)
        turns = of(*asked, "--keep")
        chat = works("chat", m.path, "-c", cache, "--temp", 0, *flags, input="\n".join(asked).encode()).rows()
        check([r["answer"] for r in chat] == turns, "fit %s: chat's turns are not those of ask --keep" % fit)
        check(turns[0] == answers[fit][0] and turns[1:] != answers[fit][1:], "fit %s: turns that see each other" % fit)
    check(answers["both"] != answers["none"], "a fit that changes no answer: %s" % answers)


def test_pages(m, d):
    """Every type of page takes a fit: the same biases, values settled as others are, and it pays in each."""
    biases = {}
    for kv in ("f32", "f16", "q8", "q4", "q8/q4", "q2"):
        cache, row = compressed(m, d, "pages.kvc", "--fit", "both", "--kv", kv)
        facts, saved = works("info", cache, "--json").rows()[0], Tensors(cache)
        check(facts["fit"] == "both" and facts["kv"].lower() == kv, "info: %s" % facts)
        plain, less = compressed(m, d, "plain.kvc", "--kv", kv)
        more = facts["bytes"] - works("info", plain, "--json").rows()[0]["bytes"]
        check(row["bytes"] - less["bytes"] == more == 256 * saved.shape["bias"][0], "--kv %s: biases take %d bytes" % (kv, more))
        biases[kv] = saved["bias"]
        works("ask", m.path, cache, "Who?", "-n", 3, "-q")
    check(all(b == biases["f16"] for kv, b in biases.items() if kv != "f32"), "biases depend on what pages settle to")
    rows = works("eval", m.path, write(d + "/fit.jsonl", json.dumps(TASK) + "\n"), "--policy", "kvzip", "--ratio", "0.2", "-n", "8",
                 "--kv", "f16,f32,q8,q4,q8/q4", "--fit", "none,both", "--json").rows()
    kl = {(r["kv"], r["fit"]): r["value"] for r in rows if r["metric"] == "kl" and r["ratio"] == 0.2}
    check(all(kl[kv, "both"] < 0.8 * kl[kv, "none"] for kv, _ in kl), "a fit that does not pay: %s" % kl)


def main():
    smol = Model("smol")
    with tempfile.TemporaryDirectory() as d:
        test_map_fitted(smol, d)
        test_map_fitted(Model("gemma3"), d)
        test_eval_fits(smol, d)
        test_streamed(smol, d)
        test_results_without_fit(smol, d)
        test_again(smol, d)
        test_pages(smol, d)
        test_progress(smol, d)
        for m in (smol, Model("gemma3")):
            test_questions(m, d)
            test_budget(m, d)
    return end("test_fitted")


if __name__ == "__main__":
    sys.exit(main())
