#!/usr/bin/env python3
"""test_documents.py: several documents in one cache: -f a -f b, and --append.

Run after `make run`. The last line says how many checks passed and failed.
"""
import itertools
import os
import tempfile

from checks import Tensors, check, end
from test_cli import Model, fails, works, write, write_ids

A = "The mill of Gavi was built by Ann Grey, who kept forty goats and a blue boat. " * 4
B = "Bus nine leaves Orly at noon. Its driver, Tom, sells plums and old maps of the coast.\n" * 4
C = "The lamp on the pier is green, and nobody knows who lights it.\n" * 3


def pairs_of(path):
    """Per head of a saved f32 or f16 cache its pairs in order: (position, key, value) as bytes."""
    c = Tensors(path)
    size = 4 if c.dtype["v"] == "F32" else 2
    d, heads, page = c.shape["v"][2], [], 0
    for length, dropped in zip(c["len"], c["dropped"]):
        head = []
        for t in range(length - dropped):
            p, i = page + t // 64, t % 64
            k = b"".join(c.raw["k"][(p * d + j) * 64 * size + i * size:][:size] for j in range(d))
            head.append((c["pos"][p * 64 + i], k, c.raw["v"][(p * 64 + i) * d * size:][:d * size]))
        heads.append(head)
        page += -(-(length - dropped) // 64)
    return c, heads


def ids_of(m, text):
    return [int(x) for x in works("tokenize", m.path, "-p", text).text().split()]


def test_cache(m, d, a, b):
    """What -f a -f b saves: ids of each, the first as it is alone, the second's own share, no pair of the empty line gone."""
    one, two = d + "/one.kvc", d + "/two.kvc"
    works("compress", m.path, "-f", a, "-o", one, "-j", 1)
    rows = works("compress", m.path, "-f", a, "-f", b, "-o", two, "-j", 1, "--json", "-q").rows()
    c, heads = pairs_of(two)
    alone, first = pairs_of(one)
    n_a, line, n_b = len(ids_of(m, A)), ids_of(m, "\n\n"), len(ids_of(m, B))
    n_prefix = int(c.meta["n_prefix"])
    begin = n_prefix + n_a + len(line)
    ids = list(alone["ids"]) + line + ids_of(m, B)
    check(list(c["ids"]) == ids and int(c.meta["n_ctx"]) == len(ids) - n_prefix, "-f a -f b: other ids")
    says = "%d-%d kvzip/pair ratio 0.3; %d-%d kvzip/pair ratio 0.3" % (n_prefix, n_prefix + n_a - 1, begin, begin + n_b - 1)
    check(c.meta["documents"] == says, "documents: %s, not %s" % (c.meta.get("documents"), says))
    check(works("info", two, "--json").rows()[0]["documents"] == says, "info: documents")
    check(works("info", one, "--json").rows()[0]["documents"] == "one" and "documents" not in alone.meta, "info: one document")
    check([(r["document"], r["n_ctx"]) for r in rows] == [(a, n_a), (b, n_b)], "compress: a row for each document")
    heads_at = [i for i in range(len(heads)) if c["window"][i // c.shape["len"][1]] == 0]
    for i in heads_at:
        check(heads[i][:len(first[i])] == first[i], "head %d: the first document is not as it was alone" % i)
        check([p for p, _, _ in heads[i] if n_prefix + n_a <= p < begin] == list(range(n_prefix + n_a, begin)), "the line between went")
    kept = sum(p >= begin for i in heads_at for p, _, _ in heads[i])
    check(kept == int(0.3 * (len(heads_at) * n_b)) == rows[1]["n_kept"], "the second document keeps %d pairs" % kept)
    check(works("ask", m.path, two, "Who?", "-n", 3, "-q", "-j", 1).out == works("ask", m.path, two, "Who?", "-n", 3, "-q").out, "ask")


def test_append(m, d, a, b):
    """Adding later is the same to the bit, for any threads, types of pages, and ways to evict."""
    both, one, added = d + "/both.kvc", d + "/a.kvc", d + "/added.kvc"
    ways = [[], ["--stream"], ["--budget", 40], ["--ratio", 1], ["--policy", "expected"], ["--policy", "snapkv", "--level", "layer"],
            ["--policy", "kvzip+", "--chunk", 50], ["--raw", "--policy", "keydiff"], ["--score-attn", "local"]]
    kvs = ["f16", "f32", "q8", "q4", "q8/q4"]
    for i, (way, kv) in enumerate(zip(ways + ways[:1] * 4, itertools.cycle(kvs))):
        works("compress", m.path, "-f", a, "-f", b, "-o", both, "--kv", kv, "-j", 1, "-q", *way)
        works("compress", m.path, "-f", a, "-o", one, "--kv", kv, "-j", 1, "-q", *way)
        works("compress", m.path, "--append", one, "-f", b, "-o", added, "-j", 2, "-q", *way)
        check(open(both, "rb").read() == open(added, "rb").read(), "%s, %s, %s: --append differs" % (m.name, kv, way))
    works("compress", m.path, "--append", one, "-f", b, "-o", one, "-q")  # into itself
    check(open(one, "rb").read() == open(both, "rb").read(), "--append into the cache itself")


def test_whole(m, d, a, b):
    """Nothing evicted: what a cache of all ids at once holds, to the bit."""
    works("compress", m.path, "-f", a, "-f", b, "-o", d + "/two.kvc", "--ratio", 1, "-q", "-j", 1)
    c, heads = pairs_of(d + "/two.kvc")
    ids = write_ids(d + "/all.ids", c["ids"])
    works("compress", m.path, "--ids", ids, "--n-prefix", c.meta["n_prefix"], "-o", d + "/all.kvc", "--ratio", 1, "-q", "-j", 1)
    works("logits", m.path, "-p", "Who?", "-c", d + "/two.kvc", "-o", d + "/two.logits", "-j", 1)
    works("logits", m.path, "-p", "Who?", "-c", d + "/all.kvc", "-o", d + "/all.logits", "-j", 1)
    x, y = Tensors(d + "/two.logits")["logits"], Tensors(d + "/all.logits")["logits"]
    check(max(abs(i - j) for i, j in zip(x, y)) < 2e-3 and len(x) == len(y), "two documents read differently than one text")
    check([p for p, _, _ in heads[0]] == [p for p, _, _ in pairs_of(d + "/all.kvc")[1][0]], "positions have gaps")


def test_ratios(m, d, a, b):
    """Each document by its own ratio, and what was there before stays, also a fitted one, and a third."""
    cache = d + "/ratios.kvc"
    works("compress", m.path, "-f", a, "-o", cache, "--ratio", 0.2, "--fit", "both", "--kv", "f32", "-q")
    before = pairs_of(cache)[1]
    works("compress", m.path, "--append", cache, "-f", b, "-o", cache, "--ratio", 0.5, "--policy", "knorm", "--level", "uniform", "-q")
    works("compress", m.path, "--append", cache, "-p", C, "-o", cache, "--budget", 9, "--policy", "expected", "-q")
    c, heads = pairs_of(cache)
    check(all(h[:len(f)] == f for h, f in zip(heads, before)) and len(c["bias"]) > 0, "--append changes a fitted document")
    parts = [p.split(" ", 1) for p in c.meta["documents"].split("; ")]
    check([p[1] for p in parts] == ["kvzip/pair ratio 0.2 fit both", "knorm/uniform ratio 0.5", "expected/pair budget 9"],
          "documents: %s" % c.meta["documents"])
    spans = [tuple(map(int, p[0].split("-"))) for p in parts]
    for text, (lo, hi) in zip((A, B, C), spans):
        check(list(c["ids"][lo:hi + 1]) == ids_of(m, text), "documents: %d-%d are not its ids" % (lo, hi))
    n_b, n_c = (hi - lo + 1 for lo, hi in spans[1:])
    lo, hi = spans[1]
    check(all(sum(lo <= p <= hi for p, _, _ in h) == n_b // 2 for h in heads), "the second keeps its half in each head")
    lo, hi = spans[2]
    check(sum(lo <= p <= hi for h in heads for p, _, _ in h) <= 9 * len(heads), "the third has a budget of 9")
    check(works("ask", m.path, cache, "Who?", "-n", 3, "-q").out != b"", "ask of three documents")


def test_map(m, d, a, b):
    """map draws what compress keeps, of all documents, and says where each is."""
    page = d + "/two.html"
    row = works("map", m.path, "-f", a, "-f", b, "-o", page, "--json", "-q").rows()[0]
    rows = works("compress", m.path, "-f", a, "-f", b, "-o", d + "/two.kvc", "--json", "-q").rows()
    line = len(ids_of(m, "\n\n"))
    check(row["documents"] == [[0, rows[0]["n_ctx"]], [rows[0]["n_ctx"] + line, rows[1]["n_ctx"]]], "map: %s" % row["documents"])
    heads = rows[0]["n_pairs"] // rows[0]["n_ctx"]
    check(row["n_kept"] == rows[0]["n_kept"] + rows[1]["n_kept"] + line * heads, "map: %d pairs stay" % row["n_kept"])


def test_refused(m, d, a, b):
    cache, demoted = d + "/refused.kvc", d + "/demoted.kvc"
    works("compress", m.path, "-f", a, "-o", cache, "-q")
    works("compress", m.path, "-f", a, "-o", demoted, "--demote", "q2", "-q")
    before = open(cache, "rb").read()
    more = ["compress", m.path, "--append", cache, "-f", b, "-o", d + "/no.kvc"]
    fails(1, "its prefix does not come first", "compress", m.path, "--append", demoted, "-f", b, "-o", d + "/no.kvc")
    fails(1, "made with another model", "compress", Model("llama").path, *more[2:])
    for flag in (["--system", "x"], ["--task", "x"]):
        fails(2, "the saved cache has its own", *more, *flag)
    fails(2, "--fit: of several documents", *more, "--fit", "values")
    fails(2, "--demote: nothing can follow", *more, "--demote", "q2")
    fails(2, "--fit: of several documents", "map", m.path, "-f", a, "-f", b, "-o", d + "/no.html", "--fit", "both")
    fails(2, "-f is given twice", "score", m.path, "-f", a, "-f", b, "-o", d + "/no")
    fails(2, "16 texts at most", "compress", m.path, *["-f", a] * 17, "-o", d + "/no.kvc")
    fails(2, "only one of -p, -f and --ids", "compress", m.path, "-f", a, "-p", "x", "-o", d + "/no.kvc")
    fails(1, "nothing to read", "compress", m.path, "-f", a, "-f", write(d + "/empty", ""), "-o", d + "/no.kvc")
    fails(1, "gone: ", "compress", m.path, "-f", a, "-f", d + "/gone", "-o", d + "/no.kvc")
    fails(1, "is read by this command", "compress", m.path, "-f", a, "-f", b, "-o", b)
    fails(1, "%s: " % a, "compress", m.path, "--append", a, "-f", b, "-o", d + "/no.kvc")
    fails(1, "--mem has 1.0 MB", *more, "--mem", "1M")
    check(open(cache, "rb").read() == before and not os.path.exists(d + "/no.kvc"), "what was refused left something")


def main():
    with tempfile.TemporaryDirectory() as d:
        a, b = write(d + "/a.txt", A), write(d + "/b.txt", B)
        smol, gemma = Model("smol"), Model("gemma3")
        for m in (smol, gemma):
            test_cache(m, d, a, b)
            test_whole(m, d, a, b)
            test_map(m, d, a, b)
            test_append(m, d, a, b)
        test_ratios(smol, d, a, b)
        test_refused(smol, d, a, b)
    return end("test_documents")


if __name__ == "__main__":
    raise SystemExit(main())
