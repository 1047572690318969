#!/usr/bin/env python3
"""test_fitted.py: --fit as users drive it: what it draws, what comes after it.

Run after `make run`. The last line says how many checks passed and failed.
"""
import itertools
import math
import re
import sys
import tempfile

from checks import Tensors, check, end
from test_cli import Model, fails, works

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


def main():
    smol = Model("smol")
    with tempfile.TemporaryDirectory() as d:
        test_map_fitted(smol, d)
        test_map_fitted(Model("gemma3"), d)
    return end("test_fitted")


if __name__ == "__main__":
    sys.exit(main())
