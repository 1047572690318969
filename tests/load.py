#!/usr/bin/env python3
"""load.py: many clients at once ask `run serve`, as they do: whole and in streams, about documents, slowly, by halves, or leaving.

usage: load.py MODEL [SECONDS [CLIENTS [SEED]]]

Says how many requests a second were answered, how long the first token and whole answers took, and what memory the server
took after a quarter of the time and at the end. Ends with 1 if anything was answered otherwise than it should, or memory grew
by more than a tenth.
"""
import http.client
import json
import os
import random
import sys
import tempfile
import threading
import time

from test_serve import TEXT, Server

QUESTIONS = ["Who built the bridge?", "What is a river?", "Count to five.", "Name a colour.", "How old is the town?", "Why?"]


class Load:
    """What all clients share: the server, and what they met."""

    def __init__(self, server, seconds):
        self.s, self.end = server, time.time() + seconds
        self.lock = threading.Lock()
        self.times, self.first, self.errors = {}, [], []

    def note(self, kind, start, first=None):
        with self.lock:
            self.times.setdefault(kind, []).append(time.time() - start)
            if first:
                self.first.append(first - start)

    def wrong(self, kind, what):
        with self.lock:
            self.errors.append("%s: %s" % (kind, what))

    def expect(self, ok, kind, what):
        if not ok:
            self.wrong(kind, what)


class Client(threading.Thread):
    def __init__(self, load, seed):
        super().__init__()
        self.load, self.random, self.number = load, random.Random(seed), seed
        self.c = None

    def run(self):
        kinds = [self.chat] * 6 + [self.stream] * 6 + [self.document] * 4 + [self.slow, self.half, self.leave, self.add, self.look]
        while time.time() < self.load.end:
            kind = self.random.choice(kinds)
            try:
                kind(kind.__name__)
            except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError) as e:
                self.load.wrong(kind.__name__, repr(e))
                self.c = None

    # ---- requests ----

    def body(self, **more):
        text = " ".join(self.random.sample(QUESTIONS, self.random.randrange(1, 4)))
        messages = [{"role": "user", "content": text}]
        if self.random.random() < 0.3:
            messages = [*messages, {"role": "assistant", "content": "I see."}, {"role": "user", "content": "And then?"}]
        return {"messages": messages, "max_tokens": self.random.randrange(1, 25), "seed": self.random.randrange(1000), **more}

    def begin(self, path, body):
        """An answer that has begun, on the connection that this client keeps."""
        if self.c is None:
            self.c = http.client.HTTPConnection("127.0.0.1", self.load.s.port, timeout=120)
        self.c.request("POST", path, body if isinstance(body, bytes) else json.dumps(body))
        return self.c.getresponse()

    def ask(self, kind, body, path="/v1/chat/completions"):
        r = self.begin(path, body)
        data = json.loads(r.read())
        self.load.expect(r.status == 200, kind, "%d %s" % (r.status, data))
        return data

    def pieces(self, kind, body, wait=0):
        """A stream, read to its end; when its first token came."""
        r, first, last = self.begin("/v1/chat/completions", dict(body, stream=True)), None, b""
        self.load.expect(r.status == 200, kind, "status %d" % r.status)
        for line in iter(r.readline, b""):
            first = first or (time.time() if line.startswith(b"data: ") else None)
            last = line if line.strip() else last
            time.sleep(wait)
        self.load.expect(last == b"data: [DONE]\n", kind, "ends with %r" % last)
        return first

    # ---- what clients do ----

    def chat(self, kind):
        start, body = time.time(), self.body()
        r = self.ask(kind, body)
        self.load.expect(1 <= r["usage"]["completion_tokens"] <= body["max_tokens"], kind, "usage %s" % r["usage"])
        self.load.note(kind, start)

    def stream(self, kind):
        start = time.time()
        self.load.note(kind, start, self.pieces(kind, self.body()))

    def document(self, kind):
        start = time.time()
        self.load.note(kind, start, self.pieces(kind, self.body(document=self.random.choice(("town", "river")))))

    def slow(self, kind):
        start = time.time()
        self.pieces(kind, self.body(), 0.02)
        self.load.note(kind, start)

    def half(self, kind):
        """A request of which only a part comes."""
        body = json.dumps(self.body()).encode()
        request = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        start = time.time()
        with self.load.s.socket() as c:
            c.sendall(request[:self.random.randrange(1, len(request))])
            time.sleep(self.random.random())
        self.load.note(kind, start)

    def leave(self, kind):
        """A stream that is not read to its end."""
        body = json.dumps(self.body(max_tokens=1000, stream=True)).encode()
        start = time.time()
        with self.load.s.socket() as c:
            c.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
            c.recv(self.random.randrange(1, 3000))
        self.load.note(kind, start)

    def add(self, kind):
        """A document is read, and goes again."""
        name, start = "doc%d" % self.number, time.time()
        at = self.random.randrange(2000)
        self.ask(kind, TEXT[at:at + 600].encode(), "/v1/documents?ratio=0.5&name=" + name)
        status, r = self.load.s.ask("DELETE", "/v1/documents/" + name)[::2]
        self.load.expect(status == 200, kind, "DELETE: %d %s" % (status, r))
        self.load.note(kind, start)

    def look(self, kind):
        start = time.time()
        for path in ("/health", "/metrics", "/slots", "/v1/documents", "/v1/models"):
            status, _, data = self.load.s.ask("GET", path)
            self.load.expect(status == 200 and data, kind, "%s: %d" % (path, status))
        self.load.note(kind, start)


def share(times, p):
    return sorted(times)[min(len(times) - 1, int(p * len(times)))] if times else 0


def memory(s):
    """Bytes of the server that are its own, not the model's file."""
    with open("/proc/%d/status" % s.p.pid) as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("RssAnon"))


def main():
    model, seconds, clients, seed = [*sys.argv[1:], *("60", "16", "1")[len(sys.argv) - 2:]]
    with tempfile.TemporaryDirectory() as folder, Server("--docs", folder, model=model, threads=os.cpu_count()) as s:
        for name, text in ("town", TEXT[:2000]), ("river", TEXT[1000:]):
            status, doc = s.post("/v1/documents?ratio=0.3&name=" + name, text)
            assert status == 200, doc
        load = Load(s, float(seconds))
        all_of_them = [Client(load, int(seed) * 1000 + i) for i in range(int(clients))]
        start = time.time()
        for c in all_of_them:
            c.start()
        time.sleep(float(seconds) / 4)
        early = memory(s)
        for c in all_of_them:
            c.join()
        took, late = time.time() - start, memory(s)
    answered = sum(map(len, load.times.values()))
    for kind, times in sorted(load.times.items()):
        print("%-9s %5d  p50 %.3f s  p99 %.3f s" % (kind, len(times), share(times, 0.5), share(times, 0.99)))
    whole = [t for kind in ("chat", "stream", "document") for t in load.times.get(kind, [])]
    print("%d clients, %.0f s: %.1f requests/s, %d errors" % (int(clients), took, answered / took, len(load.errors)))
    print("first token p50 %.3f s, p99 %.3f s; whole answers p50 %.3f s, p99 %.3f s" % (
        share(load.first, 0.5), share(load.first, 0.99), share(whole, 0.5), share(whole, 0.99)))
    print("memory %.1f MB after a quarter, %.1f MB at the end" % (early / 1e6, late / 1e6))
    print("\n".join(sorted(set(load.errors))[:10]), end="")
    return 1 if load.errors or s.code != 0 or late > 1.1 * early + 1e6 else 0


if __name__ == "__main__":
    sys.exit(main())
