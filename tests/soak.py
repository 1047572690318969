#!/usr/bin/env python3
"""soak.py: many questions to one cache, many turns of one chat, several processes at once. Not a part of `make test`.

Memory must be flat once the first tenth has passed, the first question's answer the same when it is asked again at the
end, and processes that share a model and a cache must not disturb each other. `soak.py long` asks 10,000 questions and
takes 2,000 turns; without it a tenth.
"""
import json
import os
import subprocess
import sys
import tempfile

from checks import check, end

HERE = os.path.dirname(os.path.abspath(__file__))
RUN = os.environ.get("RUN", os.path.join(os.path.dirname(HERE), "run"))
MODEL = os.path.join(HERE, "fixtures", "smol-q8.kvz")
TIMES = 10 if "long" in sys.argv[1:] else 1
SLACK = 1 << 20  # bytes that memory may vary by
FIRST = "Who built the mill of Gavi?"


def resident(pid):
    """Private memory in bytes: what is mapped from files does not count."""
    with open("/proc/%d/statm" % pid) as f:
        _, all_pages, shared = map(int, f.read().split()[:3])
    return (all_pages - shared) * os.sysconf("SC_PAGESIZE")


def converse(words, lines):
    """Puts the lines one by one, each after the answer to the one before; yields (answer, memory)."""
    p = subprocess.Popen([RUN, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    out = p.stdout if hasattr(p.stdout, "peek") else os.fdopen(os.dup(p.stdout.fileno()), "rb")
    for line in lines:
        p.stdin.write((line + "\n").encode())
        yield json.loads(out.readline())["answer"], resident(p.pid)
    p.stdin.close()
    check(p.wait() == 0, "%s: status %d" % (words[0], p.returncode))


def flat(name, memory):
    """No more at the end than when a tenth was over."""
    start, most = memory[len(memory) // 10], max(memory[len(memory) // 10:])
    print("%s: %d answers, %.2f MB after a tenth, %.2f MB at most after it" % (name, len(memory), start / 1e6, most / 1e6))
    check(most <= start + SLACK, "%s: memory grows from %d to %d bytes" % (name, start, most))


def questions(cache, n):
    lines = [FIRST] + ["What is number %d of %d?" % (i, n) for i in range(n - 2)] + [FIRST]
    answers, memory = zip(*converse(("ask", MODEL, cache, "-n", "3", "--json", "-q"), lines))
    check(answers[0] == answers[-1], "the first question is answered otherwise at the end: %r, %r" % (answers[0], answers[-1]))
    flat("ask", memory)


def turns(n):
    words = ("chat", MODEL, "-n", "3", "--budget", "64", "--window", "16", "--temp", "0", "--json", "-q")
    _, memory = zip(*converse(words, ["Turn number %d." % i for i in range(n)]))
    flat("chat --budget", memory)


def together(cache):
    """Processes at once on one model and one cache say what one alone says."""
    words = [RUN, "ask", MODEL, cache, FIRST, "When?", "Why?", "-n", "24", "-q"]
    alone = subprocess.run(words, stdout=subprocess.PIPE).stdout
    for _ in range(2 * TIMES):
        some = [subprocess.Popen(words, stdout=subprocess.PIPE) for _ in range(4)]
        check(all(p.communicate()[0] == alone and p.returncode == 0 for p in some), "four processes at once differ from one")


def main():
    with tempfile.TemporaryDirectory() as d:
        text, cache = os.path.join(d, "text"), os.path.join(d, "cache")
        with open(text, "w") as f:
            f.write("The mill of Gavi was built by Ann Grey in 1803. " * 12)
        subprocess.run([RUN, "compress", MODEL, "-f", text, "-o", cache, "-q"], check=True)
        questions(cache, 1000 * TIMES)
        turns(200 * TIMES)
        together(cache)
    sys.exit(end("soak"))


if __name__ == "__main__":
    main()
