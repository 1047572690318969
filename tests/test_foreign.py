#!/usr/bin/env python3
"""test_foreign.py: text that others wrote, coming in and going out.

Names in models, results and files may hold what a terminal or a browser obeys; it is shown, never sent. What is read as
text is text, or is named for what it is. The last line says how many checks passed and failed.
"""
import json
import os
import re
import struct
import sys
import tempfile
import xml.etree.ElementTree as xml

from checks import check, end
from test_cli import Model, RUN, fails, run, shown, works, write

EVIL = "\x1b]0;p\x07<b>\u202e'\"&\u009b\x7f]]>\nx"  # a title, an override, C1, and a line of its own
SEEN = "\\x1b]0;p\\x07<b>\\u202e'\"&\\u009b\\x7f]]>\\nx"


def steers(data):
    """Whether bytes hold what a terminal obeys."""
    return re.search("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", data.decode("utf-8")) is not None


def with_header(path, source, change):
    """A copy of a safetensors file whose header was changed in place."""
    data = open(source, "rb").read()
    n = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + n])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return write(path, struct.pack("<Q", len(text)) + text + data[8 + n:])


# ---- going out ----

def results_file(path, **cell):
    row = dict(task="facts", metric="contained", policy="kvzip", level="pair", kv="f16", context=1, ratio=1, kept=1,
               value=[1, 0], same=[1, 1], kl=[0, 0], nll=[1, 1])
    lines = [{"settings": EVIL}, dict(row, policy="full", level=""), dict(row, **cell)]
    return write(path, "".join(json.dumps(line) + "\n" for line in lines))


def test_results(d):
    evil = {k: EVIL + k for k in ["task", "policy", "level", "kv"]}
    results = results_file(d + "/evil.results", **evil)
    r = works("eval", "--merge", results, "--chart", d + "/evil.svg", "-q")
    check(not steers(r.out) and SEEN + "task" in r.text(), "a table of hostile names: %r" % r.text())
    check(r.text().count("\n") == works("eval", "--merge", results_file(d + "/plain", task="b")).text().count("\n"),
          "a name makes no line of a table")
    r = works("eval", "--merge", results, "--json", "-q")
    check(not steers(r.out) and r.rows()[-1]["policy"] == EVIL + "policy", "JSON keeps a hostile name")
    svg = xml.parse(d + "/evil.svg").getroot()
    texts = [t.text for t in svg.iter("{http://www.w3.org/2000/svg}text")]
    check(any(t.startswith(SEEN.replace("\\nx", "\nxtask")) for t in texts), "a chart's title: %r" % texts)
    check(not [e for e in svg.iter() if e.tag.endswith("}b")], "a name becomes no element of a chart")
    check(not steers(open(d + "/evil.svg", "rb").read()), "a chart holds no control characters")


def test_names(m, d):
    model = with_header(d + "/evil.kvz", m.path, lambda h: h["__metadata__"].update(name=EVIL, fingerprint=EVIL))
    r = works("info", model)
    check(not steers(r.out) and "model              " + SEEN + "\n" in r.text(), "info shows a model's name: %r" % r.text())
    check(works("info", model, "--json").rows()[0]["model"] == EVIL, "info --json has it as it is")
    page = d + "/page.html"
    works("map", model, "-p", "A\x1b[2J\u202e<b>&\"' ]]> z", "--ratio", 1, "-o", page, "-q")
    check(not steers(open(page, "rb").read()) and "<b>" not in open(page).read(), "a page shows names and text")
    bench = works("bench", model, "--prompt", 8, "--depth", 0, "--ratio", 1, "--batch", 1, "-n", 1)
    check(not steers(bench.out) and SEEN in bench.text(), "bench shows a model's name")
    tensors = with_header(d + "/evil.t", m.path, lambda h: h.update({EVIL: h.pop("pad.0", None) or h.pop(next(iter(
        k for k in h if k.startswith("pad."))))}) or h["__metadata__"].update(format=EVIL))
    r = works("info", tensors)
    check(not steers(r.out) and SEEN in r.text(), "info shows tensors' names")
    r = run("generate", tensors, "-p", "a")
    check(r.code == 1 and not steers(r.err.encode().rstrip(b"\n")) and SEEN in r.err, "an error shows metadata: %r" % r.err)
    for args in [[EVIL], ["generate", EVIL, "-p", "a"], ["generate", m.path, "-f", EVIL], ["info", "--" + EVIL],
                 ["ask", m.path, EVIL, "q"], ["generate", m.path, "-n", EVIL], ["info", m.path, EVIL]]:
        r = run(*args)
        check(r.code > 0 and r.err.count("\n") == 1 and not steers(r.err.encode()) and SEEN in r.err,
              "%r: %r" % (args, r.err))


def test_answers(m, d):
    """Random models write control characters; a pipe gets what a terminal would show, --json the text."""
    seen = 0
    for start in ["The code of", "One", "Where", "1 2", "Chen is"]:
        args = ["generate", m.path, "-p", start, "-n", 40, "--temp", 2, "--seed", 3, "--ignore-eos", "-q"]
        text = works(*args, "--json").rows()[0]["text"]
        r = works(*args)
        check(r.text().rstrip("\n") == shown(text).rstrip("\n") and not steers(r.out), "an answer: %r" % r.out)
        seen += shown(text) != text
    check(seen > 0, "no answer held a control character")
    bytes_ = works("tokenize", m.path, "--decode", input=works("tokenize", m.path, input=b"\x1b[2J\r\xff").out).out
    check(bytes_ == b"\x1b[2J\r\xff", "tokenize --decode is exact in a pipe")
    lead, follow = os.openpty()
    ids = works("tokenize", m.path, "-p", "a\x1b[2J\xe9").out
    code = run("tokenize", m.path, "--decode", input=ids, stdout=follow).code
    os.close(follow)
    text = os.read(lead, 1000)
    os.close(lead)
    check(code == 0 and b"a\\x1b[2J" in text and b"\x1b" not in text, "but not on a terminal: %r" % text)


def main():
    smol = Model("smol")
    with tempfile.TemporaryDirectory() as d:
        test_results(d)
        test_names(smol, d)
        test_answers(smol, d)
    return end("test_foreign")


if __name__ == "__main__":
    sys.exit(main())
