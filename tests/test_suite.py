#!/usr/bin/env python3
"""test_suite.py: sets of tasks, what their caches cost, and the page that an evaluation ends in.

On the smallest fixture: a folder of task files is one set, an interrupted run and shards give what one run
gives, the page is XML and has every figure. The last line says how many checks passed and failed.
"""
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml

from checks import check, end
from test_cli import Model, fails, works, write

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SVG = "{http://www.w3.org/2000/svg}"
HTML = "{http://www.w3.org/1999/xhtml}"


def task(name, context, metric="contained", answers=("7",), n=2):
    return json.dumps({"task": name, "context": context * 20, "metric": metric, "max_tokens": 4, "questions": [
        {"question": "Which %d?" % i, "answers": list(answers)} for i in range(n)]}) + "\n"


def make_set(folder):
    os.makedirs(folder)
    write(folder + "/a.jsonl", "".join(task("goats", "Ada keeps %d goats. " % n) for n in (3, 4, 5)))
    write(folder + "/b.jsonl", task("birds & <bees>", "Bo has a bird. ", "rouge", n=3))
    write(folder + "/.hidden.jsonl", "no tasks")
    write(folder + "/notes.txt", "no tasks")


def timeless(path):
    """A file of results without what two runs cannot have alike."""
    with open(path, encoding="utf-8") as f:
        return re.sub(r", \"tokens_per_s\": [^,]*", "", f.read())


def table(page, title):
    """The rows of the first table with this title: a method's cells."""
    for t in page.iter(HTML + "table"):
        head, *rows = ["".join(r.itertext()) if r is None else [("".join(c.itertext())) for c in r] for r in t.iter(HTML + "tr")]
        if head[0] == title:
            return head[1:], {r[0]: r[1:] for r in rows}
    return None


# ---- a set ----

def test_set(m, d):
    make_set(d + "/tasks/small-60")
    args = ["eval", m.path, "--suite", "small", "--length", 60, "--policy", "knorm,streaming", "--ratio", "1,0.5,0.1",
            "--level", "uniform", "--kv", "f16,q8"]
    r = works(*args, "-o", d + "/whole", cwd=d)
    check("[page: %s/whole.html]" % d in r.err, "--suite says where its page is: %s" % r.err)
    cells = [json.loads(line) for line in open(d + "/whole")][1:]
    order = [c["context"] for c in cells if c["policy"] == "full" and c["kv"] == "f16"]
    names = {c["context"]: c["task"] for c in cells}
    check(order == [1, 2, 3, 4], "a set's contexts have their places: %s" % order)
    check(list(names.values()) == ["goats", "birds & <bees>", "goats", "goats"], "files take turns: %s" % names)
    check({c["metric"] for c in cells if c["task"] == "goats"} == {"contained"}, "each task has its metric")
    size = {(c["kv"], c["policy"], c["ratio"]): c["bytes"] for c in cells if c["context"] == 1}
    check(size["f16", "knorm", 0.1] < size["f16", "knorm", 0.5] < size["f16", "full", 1], "bytes by ratio: %s" % size)
    check(size["q8", "full", 1] < size["f16", "full", 1] and size["f16", "knorm", 1] == size["f16", "full", 1], "bytes")
    timed = [(c["policy"], c["ratio"], c["kv"]) for c in cells if c.get("tokens_per_s", 0) > 0 and c["ratio"] < 1]
    check(all(timed.count(x) == 3 for x in timed) and len(set(timed)) == 8, "three contexts are timed: %s" % timed)

    lines = open(d + "/whole", "rb").read().splitlines(True)
    write(d + "/cut", b"".join(lines[:9]) + lines[9][:30])
    again = works(*args, "-o", d + "/cut", "--page", d + "/cut.html", "--json", cwd=d).rows()
    check(timeless(d + "/cut") == timeless(d + "/whole"), "an interrupted set goes on to the same results")
    for i in (1, 2):
        r = works(*args, "-o", d + "/shard%d" % i, "--shard", "%d/2" % i, cwd=d)
        check(not os.path.exists(d + "/shard%d.html" % i), "a shard makes no page by itself")
    joined = works("eval", "--merge", d + "/shard1", d + "/shard2", "-o", d + "/both", "--page", d + "/both.html", "--json").rows()
    check(timeless(d + "/both") == timeless(d + "/whole"), "shards give the results of one run")
    bare = lambda rows: [dict(r, tokens_per_s=0) for r in rows]  # noqa: E731
    check(bare(joined) == bare(again), "and its table")
    known = works(*args, "-o", d + "/whole", "--page", d + "/known.html", "--show", cwd=d)
    check("wanted" not in known.text() and open(d + "/known.html").read() == open(d + "/whole.html").read(),
          "nothing is done again, and the page is the same")
    return d + "/whole"


def test_refused(m, d):
    args = ["eval", m.path]
    fails(1, "tasks/none-4000: not there: python3 eval/make_tasks.py suite none --tokens 4000 makes it", *args, "--suite", "none", cwd=d)
    fails(2, "--length has no effect", *args, "x", "--length", 5)
    fails(2, "--suite needs MODEL alone", *args, "x", "--suite", "small")
    fails(2, "--suite has no effect: --merge", "eval", "--merge", "x", "--suite", "small")
    fails(2, "--page has no effect: --ppl", *args, "--ppl", "x", "--page", "y")
    folder = d + "/folder"
    os.makedirs(folder)
    fails(1, "folder: a folder without a .jsonl file", *args, folder)
    write(folder + "/a.jsonl", task("a", "x "))
    write(folder + "/b.jsonl", task("b", "x ") + "{")
    fails(1, "folder: b.jsonl: line 2: ", *args, folder)
    write(folder + "/b.jsonl", "")
    fails(1, "folder: b.jsonl: no tasks in it", *args, folder)
    os.remove(folder + "/b.jsonl")
    before = open(folder + "/a.jsonl").read()
    for flag in ("-o", "--page", "--chart"):
        fails(1, "is read by this command", *args, folder, flag, folder + "/a.jsonl")
    fails(1, "also written", *args, folder, "--page", d + "/p", "--chart", d + "/p")
    check(open(folder + "/a.jsonl").read() == before, "a set's files stay as they are")
    for metric, answer, words in (("number", "none", "has no number"), ("code", "two words", "marked wrong itself")):
        write(folder + "/a.jsonl", task("a", "x ", metric, [answer]))
        fails(1, words, *args, folder)


def test_memory(m, d):
    """What a task says of its answers' length counts, not the flag alone."""
    def need(most):
        questions = [{"question": "Q%d?" % i, "answers": ["7"]} for i in range(32)]
        return write(d + "/need.jsonl", json.dumps({"context": "Ada has a bird. ", "max_tokens": most, "questions": questions}))
    args = ["eval", m.path, need(4), "--ratio", 1, "--mem", "60M", "-n", 1]
    works(*args)
    need(60000)
    fails(1, "--mem has 60.0 MB", *args)


def test_paper(m, d):
    """Every task of the paper's set is read, asked and marked; the page has them all."""
    command = [sys.executable, os.path.join(ROOT, "eval", "make_tasks.py"), "suite", "paper", "--tokens", "100", "-n", "1", "-q", "1"]
    subprocess.run(command, cwd=d, check=True, capture_output=True)
    r = works("eval", m.path, "--suite", "paper", "--length", 100, "--policy", "streaming", "--ratio", "0.3", "-n", 4, "-q",
              "--json", cwd=d)
    rows = [row for row in r.rows() if row["metric"] not in ("same", "kl", "nll", "mean")]
    names = {name[:-6] for name in os.listdir(d + "/tasks/paper-100")}
    alone = {"refusal_harmful", "refusal_harmless", "mix_needles", "mix_keys"}
    check({row["task"] for row in rows} == names - {"refusal"} | alone, "every task has a row: %s" % rows)
    check({row["metric"] for row in rows} >= {"contained", "exact", "choice", "qa", "rouge", "code"}, "metrics: %s" % rows)
    page = xml.parse(d + "/tasks/paper-100.html").getroot()
    check(len(list(page.iter(HTML + "h3"))) == len(names) + 3 == 31, "a chapter for each task")


# ---- figures ----

def results(path, tasks):
    """{task: {(policy, ratio): values}} as a file of results, bytes and speed by the ratio."""
    lines = [json.dumps({"settings": "a model, tasks & settings"})]
    for place, (name, methods) in enumerate(tasks.items()):
        for (policy, ratio), value in methods.items():
            cell = {"task": name, "metric": "contained", "policy": policy, "level": "pair", "kv": "f16", "context": place + 1,
                    "ratio": ratio, "kept": ratio, "value": value, "bytes": int(ratio * (1 << 20)), "tokens_per_s": 10 / ratio}
            cell.update({k: [0] * len(value) for k in ("same", "kl", "nll")})
            lines.append(json.dumps(cell))
    return write(path, "\n".join(lines) + "\n")


def test_means(d):
    path = results(d + "/means", {
        "easy": {("full", 1): [1, 1, 1, 1], ("p", 0.5): [1, 1, 1, 0]},
        "half": {("full", 1): [1, 0], ("p", 0.5): [0, 0]},
        "hopeless": {("full", 1): [0, 0, 0, 0], ("p", 0.5): [1, 0, 0, 0]}})
    rows = works("eval", "--merge", path, "--json", "--page", d + "/means.html").rows()
    of = {(r["policy"], r["task"]): r for r in rows if r["metric"] in ("contained", "mean")}
    check(of["full", "all tasks"]["value"] == 0.75 and of["p", "all tasks"]["value"] == 0.375, "the mean of two tasks")
    for policy in ("full", "p"):
        easy, half, both = (of[policy, name] for name in ("easy", "half", "all tasks"))
        low = both["value"] - math.hypot(easy["value"] - easy["low"], half["value"] - half["low"]) / 2
        high = both["value"] + math.hypot(easy["high"] - easy["value"], half["high"] - half["value"]) / 2
        check(abs(both["low"] - low) < 1e-6 and abs(both["high"] - high) < 1e-6, "its interval: %s" % both)
        check(both["n"] == 6 and both["bytes"] == easy["bytes"] and both["tokens_per_s"] == easy["tokens_per_s"], "%s" % both)
    page = xml.parse(d + "/means.html").getroot()
    head, mean = table(page, "mean, %")
    check(head == ["1", "0.5"] and mean["p pair, f16"][0] == "" and mean["p pair, f16"][1].startswith("37.5 ±"), "%s" % mean)
    check(table(page, "MiB of a context in memory")[1]["p pair, f16"] == ["", "0.50"], "the page's bytes")
    check(table(page, "tokens/s of one answer, where measured")[1]["full pair, f16"] == ["10.0", ""], "the page's speed")
    text = "".join(page.itertext())
    check("easy half." in text and "a model, tasks & settings" in text, "which tasks count: %s" % text[:600])
    axes = [t.text for t in page.iter(SVG + "text") if t.text in ("share of pairs kept", "MiB of the context in memory", "tokens/s")]
    check(sorted(set(axes)) == ["MiB of the context in memory", "share of pairs kept", "tokens/s"], "three axes: %s" % axes)
    part = results(d + "/part", {
        "easy": {("full", 1): [1, 1], ("p", 0.5): [1, 0]}, "half": {("full", 1): [1, 0], ("p", 0.5): [0, 0]},
        "begun": {("full", 1): [1, 1]}})
    both = [r["value"] for r in works("eval", "--merge", part, "--json").rows() if r["metric"] == "mean"]
    check(both == [0.75, 0.25], "a task that is not done for all methods does not count: %s" % both)
    one = results(d + "/one", {"easy": {("full", 1): [1, 1]}})
    check("mean" not in works("eval", "--merge", one).text(), "one task is its own mean")


def test_depths(m, d):
    """Where tasks say how deep the answer stands the page has a panel for each ratio, with a point for each depth."""
    task = {"context": "The goats ate the hat. " * 20, "metric": "contained", "questions": [{"question": "Who?", "answers": ["goats"]}]}
    tasks = [dict(task, task="deep", depth=at) for at in (0.5, 0, 1)] + [dict(task, task="flat")]
    path = write(d + "/deep.jsonl", "".join(json.dumps(t) + "\n" for t in tasks))
    works("eval", m.path, path, "--policy", "knorm", "--ratio", "1,0.5", "-n", "3", "-o", d + "/deep", "--page", d + "/deep.html")
    cells = [json.loads(line) for line in open(d + "/deep")][1:]
    check([c.get("depth") for c in cells if c["policy"] == "full"] == [0.5, 0, 1, None], "results keep the depth: %s" % cells)
    lines = open(d + "/deep").read().split("\n")
    for i, line in enumerate(lines[1:-1], 1):  # marks by hand: right at the beginning and the end
        cell = json.loads(line)
        cell["value"] = [float(cell.get("depth") != 0.5)]
        lines[i] = json.dumps(cell)
    shown = works("eval", "--merge", write(d + "/marked", "\n".join(lines)), "--page", d + "/deep.html").text()
    check("0.5" in shown and "66.7" in shown, "the table has all depths together: %s" % shown)
    page = xml.parse(d + "/deep.html").getroot()
    panels = [g for g in page.iter(SVG + "g") if any("kept" in (t.text or "") and t.get("class") == "title" for t in g.iter(SVG + "text"))]
    titles = [t.text for g in panels for t in g.iter(SVG + "text") if t.get("class") == "title"]
    check(titles == ["deep: contained, 1 kept", "deep: contained, 0.5 kept"], "a panel for each ratio: %s" % titles)
    points = [[(float(c.get("cx")), float(c.get("cy"))) for c in g.iter(SVG + "circle")] for g in panels]
    check(points[1] == [(0, 0), (150, 200), (300, 0)] and points[0] == 2 * points[1], "a point for each depth: %s" % points)
    fails(1, "depth", "eval", m.path, write(d + "/bad.jsonl", json.dumps(dict(task, depth=1.5)) + "\n"))


def test_page(m, d, whole):
    """XML without anything from elsewhere: figures of every task, a panel each, names escaped."""
    text = open(whole + ".html", encoding="utf-8").read()
    page = xml.fromstring(text)
    check(page.tag == HTML + "html", "the page is HTML")
    check(not re.search(r"<(script|img|link|iframe|object)|src=|href=|url\(|@import", text), "the page needs nothing from elsewhere")
    titles = ["".join(h.itertext()) for h in page.iter(HTML + "h3")]
    check(titles == ["goats 6 answers", "birds & <bees> 3 answers"], "a chapter per task: %s" % titles)
    head, rows = table(page, "right, %")
    check(head == ["1", "0.5", "0.1"] and len(rows) == 6 and "knorm uniform, q8" in rows, "a line per method: %s" % rows)
    check(len(rows["streaming uniform, f16"]) == 3 and all("±" in c for c in rows["streaming uniform, f16"]), "intervals: %s" % rows)
    panels = [t.text for t in page.iter(SVG + "text") if t.get("class") == "title"]
    check(panels == ["goats: contained", "birds & <bees>: rouge"], "a panel per task: %s" % panels)


def main():
    m = Model("smol")
    with tempfile.TemporaryDirectory() as d:
        whole = test_set(m, d)
        test_page(m, d, whole)
        test_depths(m, d)
        test_refused(m, d)
        test_memory(m, d)
        test_paper(m, d)
        test_means(d)
    return end("test_suite")


if __name__ == "__main__":
    sys.exit(main())
