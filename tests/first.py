#!/usr/bin/env python3
"""first.py: how soon the first token comes about a long document that a server read before it was started again.

usage: first.py MODEL [TOKENS [ROUNDS]]

A server reads a document of about so many tokens (default 3000), compresses and saves it, and ends. In each round another one is
started, asked a question without the document, then three about it, over HTTP; the medians of the times to the first token are
shown beside what reading the whole document again would take. Ends with 1 if the first question on the document takes more than
1.2 times what the following ones do (the median of the rounds), or if the document's tokens are not all cached.
"""
import json
import os
import random
import statistics
import sys
import tempfile
import time

from test_serve import Server, check, end, until

PEOPLE = ["Ann Grey", "Bo Marsh", "Cato Reed", "Dora Flint", "Emil Stone", "Fay Brook", "Gil Hart", "Hana Wells"]
THINGS = ["mill", "bridge", "school", "inn", "bakery", "library", "well", "tower", "garden", "market"]
QUESTIONS = ["Who built the mill of Number %d Street, in which year was it built, what was it made of, and who paid for it in the end?" % n for n in (17, 41, 63, 88)]


def document(words):
    rng, text = random.Random(1), []
    while len(text) < words:
        text += ("%s built the %s of Number %d Street in %d; it was made of %s and paid for by %s." % (
            rng.choice(PEOPLE), rng.choice(THINGS), rng.randrange(99), rng.randrange(1500, 1990), rng.choice(("oak", "brick", "slate")),
            rng.choice(PEOPLE))).split()
    return " ".join(text)


def first_token(s, question, document=None):
    """Seconds to the first token, tokens of the prompt, how many of them were cached. Models without a chat answer too."""
    path = b"/v1/chat/completions" if document else b"/v1/completions"
    asked = {"messages": [{"role": "user", "content": question}], "document": document} if document else {"prompt": question}
    data = json.dumps({"max_tokens": 4, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}, **asked}).encode()
    with s.socket() as c:
        start = time.perf_counter()
        c.sendall(b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (path, len(data), data))
        got = c.recv(65536)
        while b"data: " not in got:
            piece = c.recv(65536)
            if not piece:
                raise OSError("no stream: %r" % got)
            got += piece
        took = time.perf_counter() - start
        for piece in iter(lambda: c.recv(65536), b""):
            got += piece
    usage = json.JSONDecoder().raw_decode(got[got.rindex(b'"usage": {') + 9:].decode())[0]
    return took, usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


def main():
    model, tokens, rounds = [*sys.argv[1:], *("3000", "7")[len(sys.argv) - 2:]]
    threads = os.cpu_count()
    with tempfile.TemporaryDirectory() as folder:
        with Server("--docs", folder, "--ratio", 0.3, model=model, threads=threads) as s:
            text = document(int(tokens) * 2 // 3)
            status, doc = s.post("/v1/documents?name=town", text, timeout=3600)
            check(status == 200, "the document is read: %s" % doc)
        times = {name: [] for name in ("alone", "after", "loaded")}
        for _ in range(int(rounds)):
            with Server("--docs", folder, model=model, threads=threads) as s:
                first_token(s, "Hello")  # the model's file is in memory now
                check(until(lambda: s.get("/v1/documents/town")[1]["loaded"]), "the document is loaded before anybody asks")
                times["alone"].append(first_token(s, QUESTIONS[0])[0])
                took, n, cached = first_token(s, QUESTIONS[1], document="town")
                times["after"].append(took)
                check(cached >= doc["tokens"] and n > cached, "all %d tokens of the document are cached: %d of %d" % (doc["tokens"], cached, n))
                times["loaded"].append(statistics.mean(first_token(s, q, document="town")[0] for q in QUESTIONS[2:]))
    alone, after, loaded = (statistics.median(times[name]) for name in ("alone", "after", "loaded"))
    ratio = statistics.median(a / b for a, b in zip(times["after"], times["loaded"]))
    print("document: %d tokens, %.1f MB of %.1f, read in %.1f s, scored in %.1f s; question: %d tokens" % (
        doc["tokens"], doc["bytes"] / 1e6, doc["full_bytes"] / 1e6, doc["read_s"], doc["score_s"], n - doc["tokens"]))
    print("first token: %.3f s of the question alone, %.3f s after the restart, %.3f s once loaded: %.2f times" % (
        alone, after, loaded, ratio))
    check(ratio <= 1.2, "the first question takes as long as others: %s" % times)
    return end("first")


if __name__ == "__main__":
    sys.exit(main())
