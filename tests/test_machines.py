#!/usr/bin/env python3
"""test_machines.py: more than one machine: shards of an evaluation (eval/parallel.sh, eval/slurm.sh), and two servers behind haproxy
(docs/haproxy.cfg), one of which is killed.

Run after `make run`. What is not installed (GNU parallel, haproxy) is skipped and named. The last line says how many checks passed and failed.
"""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

from checks import check, end
from test_cli import RUN, Model, works, write
from test_serve import MODEL, TEXT, Server

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# ---- evaluation ----

def tasks(path, n):
    rows = [{"task": "goats", "context": "Ada keeps %d goats and Tom %d. " % (i, i + 3) * 6, "metric": "contained",
             "questions": [{"question": "How many has Ada?", "answers": [str(i)]}, {"question": "And Tom?", "answers": [str(i + 3)]}]}
            for i in range(n)]
    return write(path, "".join(json.dumps(r) + "\n" for r in rows))


def told(*words, **env):
    return subprocess.run([str(w) for w in words], cwd=ROOT, env=dict(os.environ, **env), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          timeout=300)


def same_as_one(what, d, out, table, one):
    check(open(out, "rb").read() == open(d + "/one", "rb").read(), what + ": the results are not those of one run")
    check(table == one, "%s: another table: %r" % (what, table))


def test_shards(m, d):
    """Shards by GNU parallel, as tasks of a Slurm array, and one after the other: byte for byte what one run gives."""
    words = [RUN, "eval", m.path, tasks(d + "/tasks.jsonl", 7), "--ratio", "1,0.3", "--policy", "kvzip,knorm", "-n", 4]
    one = works(*words[1:], "-o", d + "/one", "-q", "-j", 1).out
    for i in 3, 1, 2:
        works(*words[1:], "-o", d + "/by.%d" % i, "--shard", "%d/3" % i, "-q", "-j", 1)
    r = works("eval", "--merge", *[d + "/by.%d" % i for i in (2, 3, 1)], "-o", d + "/by")
    check(open(d + "/by", "rb").read() == open(d + "/one", "rb").read(), "--merge in any order is one run")
    for i in 1, 2, 3:
        r = told("eval/slurm.sh", d + "/slurm", *words, SLURM_ARRAY_TASK_ID=str(i), SLURM_ARRAY_TASK_COUNT="3", SLURM_CPUS_PER_TASK="1")
        check(r.returncode == 0, "slurm.sh: %r" % r.stderr)
    r = works("eval", "--merge", *[d + "/slurm.%d" % i for i in (1, 2, 3)], "-o", d + "/slurm")
    same_as_one("slurm.sh", d, d + "/slurm", r.out, one)
    for script, args in ("parallel.sh", []), ("parallel.sh", [3, d + "/x"]), ("slurm.sh", [d + "/x", *words]):
        r = told("eval/" + script, *args)
        check(r.returncode == 2 and b"usage: " in r.stderr, "%s %s: %d %r" % (script, args[:1], r.returncode, r.stderr))
    if not shutil.which("parallel"):
        print("parallel.sh: skipped, no GNU parallel")
        return
    r = told("eval/parallel.sh", 3, d + "/par", *words)
    check(r.returncode == 0, "parallel.sh: %r" % r.stderr)
    same_as_one("parallel.sh", d, d + "/par", r.stdout, one)
    with open(d + "/par.2", "r+b") as f:  # as if it had been killed while it wrote
        f.truncate(os.path.getsize(d + "/par.2") // 2)
    r = told("eval/parallel.sh", 3, d + "/par", *words)
    same_as_one("parallel.sh once more", d, d + "/par", r.stdout, one)
    r = told("eval/parallel.sh", 2, d + "/bad", *words, "--policy", "none")
    check(r.returncode != 0 and not os.path.exists(d + "/bad"), "parallel.sh: a shard that fails: %d" % r.returncode)


# ---- serving ----

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Proxy(Server):
    """haproxy with docs/haproxy.cfg, in front of these servers."""

    def __init__(self, d, servers):
        self.port = free_port()
        with open(os.path.join(ROOT, "docs", "haproxy.cfg")) as f:
            text = f.read().replace("127.0.0.1:8090", "127.0.0.1:%d" % self.port)
        for port, server in zip((8081, 8082), servers):
            text = text.replace("127.0.0.1:%d" % port, "127.0.0.1:%d" % server.port)
        self.p = subprocess.Popen(["haproxy", "-db", "-q", "-f", write(d + "/haproxy.cfg", text)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(200):
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", self.port)) == 0:
                    break
            time.sleep(0.02)


def figure(server, name):
    return int(re.search(r"^llamacpp:%s (\d+)" % name, server.ask("GET", "/metrics")[2].decode(), re.M).group(1))


def answered(server):
    """Tokens that a server has written."""
    return figure(server, "tokens_predicted_total")


def owner(proxy, servers, name, **how):
    """Which of the servers answers a question about the document; -1: none does."""
    before = [answered(s) if s.p.poll() is None else 0 for s in servers]
    status, body = proxy.chat("Who built it?", document=name, **how)
    for _ in range(200):  # figures follow the answer
        after = [answered(s) if s.p.poll() is None else 0 for s in servers]
        grown = [i for i in range(len(servers)) if after[i] > before[i]]
        if grown:
            break
        time.sleep(0.01)
    check(status == 200 and len(grown) == 1, "%s: status %s, %s answered: %s" % (name, status, grown, body))
    return grown[0] if grown else -1


def test_servers(d):
    """Requests about a document go to one of two servers; when that is killed the other one answers from the shared folder."""
    if not shutil.which("haproxy"):
        print("haproxy.cfg: skipped, no haproxy")
        return
    docs = d + "/docs"
    os.mkdir(docs)
    with Server("--docs", docs) as one, Server("--docs", docs) as two, Proxy(d, (one, two)) as proxy:
        servers, names = (one, two), ["town%d" % i for i in range(6)]
        for i, name in enumerate(names):
            text = TEXT[:600 + 10 * i]
            how = ("/v1/documents?name=%s&ratio=0.5" % name, text) if i % 2 else ("/v1/documents", {"name": name, "text": text, "ratio": 0.5})
            status, body = proxy.post(*how)
            check(status in (200, 201), "a document by haproxy: %s %s" % (status, body))
        holds = {name: owner(proxy, servers, name) for name in names}
        print("documents of the two servers: %s" % list(holds.values())) if os.environ.get("VERBOSE") else None
        check(set(holds.values()) == {0, 1}, "all documents are on one server: %s" % holds)
        check(all(owner(proxy, servers, name) == at for name, at in holds.items()), "a name goes to another server")
        answers = {name: proxy.chat("Who built it?", document=name)[1]["choices"][0]["message"]["content"] for name in names}
        c = proxy.ask("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 60000}], "max_tokens": 1, "document": names[0]})
        check(c[0] in (200, 400), "a long question: %s" % c[0])  # 400: more tokens than the model was trained for
        killed = servers[holds[names[0]]]
        got = []
        asks = threading.Thread(target=lambda: got.append(proxy.chat("Go on.", document=names[0], max_tokens=1000, ignore_eos=True)))
        asks.start()
        for _ in range(500):  # it is being answered, and nothing of it has been sent
            if figure(killed, "requests_processing") > 0:
                break
            time.sleep(0.01)
        check(not got, "a question is answered before it can be interrupted")
        killed.p.send_signal(signal.SIGKILL)
        killed.p.wait()
        asks.join(120)
        check(got and got[0][0] == 200 and got[0][1]["usage"]["completion_tokens"] == 1000, "the question that was being answered: %s" % got[:1])
        begin, failed = time.monotonic(), 0
        for name in names * 3:
            status, body = proxy.chat("Who built it?", document=name)
            failed += status != 200 or body["choices"][0]["message"]["content"] != answers[name]
        check(failed == 0, "%d of %d questions after kill -9 have no answer, or another one" % (failed, 3 * len(names)))
        check(time.monotonic() - begin < 30, "questions wait after kill -9")
        left = [name for name, at in holds.items() if servers[at] is not killed]
        check(all(servers[owner(proxy, servers, name)] is not killed for name in left), "names of the other server stay")
        check(proxy.ask("DELETE", "/v1/documents/" + names[0])[0] == 200 and not os.path.exists(docs + "/%s.kvc" % names[0]), "DELETE")


def main():
    with tempfile.TemporaryDirectory() as d:
        test_shards(Model("smol"), d)
        test_servers(d)
    return end("test_machines")


if __name__ == "__main__":
    sys.exit(main())
