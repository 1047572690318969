#!/usr/bin/env python3
"""test_docs.py: what the documents say is true. Links lead somewhere, code they quote stands where they say, files and
functions they name are there, the README's policy, extracted and patched in, builds, runs and scores as it says, and its
Quick start runs.

Run after `make run`. The last line says how many checks passed and failed.
"""
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile

from checks import Tensors, check, end

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DOCS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "bench/README.md", "eval/README.md", "docs/adding.md", "docs/answers.md",
        "docs/figures.md", "docs/files.md", "docs/install.md", "docs/kvzip.md", "docs/methods.md", "docs/python.md", "docs/readers.md", "docs/serve.md", "docs/speed.md", "docs/trust.md",
        "docs/tutorial/README.md"]
MODEL = "tests/fixtures/smol.kvz"
TABLES = "// ---- the tables ----\n"       # the policy's function goes before this line of policies.c
POLICIES = "const Policy policies[] = {\n"  # and its row after this one


def read(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as f:
        return f.read()


# ---- words ----

def anchors(text):
    """The names that headings of a document get as links."""
    heads = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads}


def check_links(doc, text):
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        path = os.path.normpath(os.path.join(os.path.dirname(doc), path)) if path else doc
        there = os.path.exists(os.path.join(ROOT, path))
        check(there and (not anchor or anchor in anchors(read(path))), f"{doc}: {target} leads nowhere")


def check_names(doc, text):
    """`file.c` is there, and so is `function` of `file.c:function`."""
    for path in re.findall(r"`((?:[a-z]+/)*[a-z_0-9]+\.(?:c|h|py|sh|md|txt))`", text):
        near = os.path.join(os.path.dirname(doc), path)
        check(any(os.path.exists(os.path.join(ROOT, p)) for p in (path, near)), f"{doc}: there is no {path}")
    for path, name in re.findall(r"`((?:[a-z]+/)*[a-z_0-9]+\.[ch]):(\w+)`", text):
        found = os.path.exists(os.path.join(ROOT, path)) and re.search(rf"(?m)^[a-zA-Z].*\b{name}\b", read(path))
        check(found, f"{doc}: there is no {name} in {path}")


def folded(text):
    """Lines without indentation, so that a quote may stand further left than its source."""
    return "\n".join(line.strip() for line in text.strip().splitlines())


def check_quotes(doc, text):
    """Code under a line <!-- from FILE --> stands in FILE; a line of two dots leaves something out."""
    for path, code in re.findall(r"<!-- from (\S+) -->\n```c\n(.*?)```", text, re.S):
        for part in re.split(r"^\s*\.\.\s*$", code, flags=re.M):
            check(folded(part) in folded(read(path)), f"{doc}: not in {path}: {part.strip()[:70]} ..")


def check_readme(text):
    check(len(text.split()) <= 1500, f"README.md has {len(text.split())} words, 1500 at most")
    rows = re.findall(r"^\| \[?`([a-z_/]+\.[ch])`(?:\]\(\S+\))? \| ([\d,]+) \|", text, re.M)
    check(len(rows) > 4, "README.md counts the lines of the files to read")
    for path, lines in rows:
        have = len(read(path).splitlines())
        check(abs(have - int(lines.replace(",", ""))) <= 0.1 * have, f"{path} has {have} lines, README.md says {lines}")


# ---- methods ----

def check_methods():
    """docs/methods.md has a row for each policy and names each level, and the README counts them."""
    rows = lambda table: re.findall(r'{\.name = "([a-z0-9+]+)",\s+\.(?:head|live|score|pool) =', re.search(r"(?s)const %s\[\] = {\n(.*?)\n};" % table, read("policies.c"))[1])
    doc, policies, levels = read("docs/methods.md"), rows("Policy policies"), rows("Level levels")
    told = re.findall(r"(?m)^\| `([a-z0-9+]+)` \| (?:\[?2\d{3}|\| nothing)", doc)
    check(len(policies) > 30 and sorted(told) == sorted(policies), f"docs/methods.md: not one row for each of {set(told) ^ set(policies)}")
    part = doc[doc.index("## Levels"):]
    check(all(f"`{level}`" in part for level in levels), f"docs/methods.md names not all levels of {levels}")
    said = re.search(r"(\d+) \[other methods\]\(docs/methods.md\)", read("README.md"))
    check(said and int(said[1]) == len(policies) - 1, f"README.md counts {said and said[1]} other methods, {len(policies) - 1} are there")


# ---- the README's policy ----

def patched_source(folder, function, row):
    """A copy of the source with the policy in it."""
    src = os.path.join(folder, "src")
    left_out = ("build", "models", ".venv", ".git", "fixtures", "run")
    shutil.copytree(ROOT, src, ignore=lambda d, names: [n for n in names if n in left_out])
    path = os.path.join(src, "policies.c")
    with open(path, encoding="utf-8") as f:
        text = f.read()
    check(text.count(TABLES) == 1 and text.count(POLICIES) == 1, "policies.c has one place for a function and one for a row")
    with open(path, "w", encoding="utf-8") as f:
        f.write(text.replace(TABLES, function + "\n" + TABLES).replace(POLICIES, POLICIES + row))
    return src


def run(src, *args):
    done = subprocess.run([os.path.join(src, "run"), *args], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    check(done.returncode == 0, f"run {' '.join(args)}: {done.stderr.decode().strip()}")
    return done.stdout.decode()


def check_scores(scores, cache):
    """scores are |v|^2 of each pair of the context, as the cache of all pairs holds them."""
    s, t = Tensors(scores), Tensors(cache)
    layers, heads, n = s.shape["scores"]
    _, page, d = t.shape["v"]
    got, v, lengths = s["scores"], t["v"], t["len"]
    wrong = first = 0
    for h in range(layers * heads):
        length = lengths[h]
        for i in range(n):
            at = (first * page + length - n + i) * d
            wrong += not math.isclose(got[h * n + i], sum(x * x for x in v[at:at + d]), rel_tol=1e-4)
        first += -(-length // page)
    check(n > 50 and wrong == 0, f"{wrong} of {layers * heads * n} scores are not |v|^2")


def check_quick_start(text, src):
    """The commands of "Quick start", word for word, with a small model and the demo's text; after `make venv run`."""
    code = re.search(r"## Quick start.*?```\n(.*?)```", text, re.S).group(1)
    lines = code.replace("MODEL", os.path.join(ROOT, "tests", "fixtures", "smol")).splitlines()
    check(len(lines) == 5 and lines[0].startswith("make venv run && "), "README.md's Quick start is five lines")
    os.symlink(os.path.join(ROOT, ".venv"), os.path.join(src, ".venv"))
    shutil.copy(os.path.join(src, "demo", "chronicle.txt"), os.path.join(src, "book.txt"))
    lines[0] = lines[0].replace("make venv run && ", "")
    for line in lines:
        done = subprocess.run(line, shell=True, cwd=src, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        check(done.returncode == 0, f"README.md: {line.split('  ')[0]}: {done.stderr.decode().strip()[-300:]}")
    check(len(done.stdout) > 0, "README.md's questions get answers")


def check_policy(text):
    code = re.findall(r"```c\n(.*?)```", text.split("## Change it")[1].split("\n## ")[0], re.S)
    check(len(code) == 2, "README.md shows a function and a row")
    function, row = code
    check(len((function + row).strip().splitlines()) <= 20, "the README's policy takes 20 lines at most")
    with tempfile.TemporaryDirectory() as folder:
        src = patched_source(folder, function, row)
        done = subprocess.run(["make", "-s", "-j2", "werror=1", "BUILD=build", "run"], cwd=src, stderr=subprocess.PIPE)
        check(done.returncode == 0, "the README's policy builds: " + done.stderr.decode())
        sample, scores, cache = (os.path.join(folder, name) for name in ("text", "scores", "cache"))
        with open(sample, "w") as f:
            f.write(read("demo/chronicle.txt")[:900])
        check("vnorm" in run(src, "compress", "-h"), "run compress -h lists the new policy")
        exact = ("-f", sample, "--kv", "f32", "--isa", "scalar", "-q")
        run(src, "score", MODEL, "-o", scores, "--policy", "vnorm", *exact)
        run(src, "compress", MODEL, "-o", cache, "--ratio", "1", *exact)
        check_scores(scores, cache)
        out = run(src, "compress", MODEL, "-f", sample, "-o", cache, "--policy", "vnorm", "--stream", "--json", "-q")
        check(json.loads(out)["kept"] <= 0.31, "the new policy evicts while tokens come")
        if os.path.exists(os.path.join(ROOT, ".venv", "ok")):
            check_quick_start(text, src)
        else:
            print("test_docs: no .venv, so README.md's Quick start is not run")


def main():
    for doc in DOCS:
        text = read(doc)
        check_links(doc, text)
        check_names(doc, text)
        check_quotes(doc, text)
    check_readme(read("README.md"))
    check_methods()
    check_policy(read("README.md"))
    return end("test_docs")


if __name__ == "__main__":
    sys.exit(main())
