#!/usr/bin/env python3
"""faults.py: what is left when memory, disk or patience ends. Not a part of `make test`: needs strace, and minutes.

Every allocation fails in turn, in every command; the system calls of saving fail, one after the other and with each
error they may have; Ctrl-C comes at every system call of saving and at random moments, kill -9 as well. Afterwards the
file is the old one or the new one, byte for byte, the program has said one line or nothing, and what a killed one left
lying is cleared away by the next. `faults.py long` takes every site; without it some are left out. $SEED varies them.
"""
import concurrent.futures
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from checks import check, end

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
RUN = os.environ.get("RUN", os.path.join(ROOT, "run"))
STATIC = os.environ.get("STATIC", RUN)  # linked so that no system call comes before main
MODEL = os.path.join(HERE, "fixtures", "smol-q8.kvz")
LONG = "long" in sys.argv[1:]
rng = random.Random(int(os.environ.get("SEED", "1")))

TEXT = "The old mill of Gavi was built by Ann Grey in 1803. Its wheel has forty paddles of oak.\n" * 4
TASK = ('{"task": "mill", "context": "The mill was built by Ann Grey.", "metric": "contained", '
        '"questions": [{"question": "Who built it?", "answers": ["Ann"]}]}\n')


def start(folder, *words, wrap=(), env=None, program=RUN):
    with open(os.path.join(folder, "questions")) as stdin:
        return subprocess.Popen([*wrap, program, *words], cwd=folder, stdin=stdin, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, env=env)


def finish(p, timeout=120):
    out, err = p.communicate(timeout=timeout)
    return p.returncode, err.decode("utf-8", "replace")


def must(folder, *words):
    code, err = finish(start(folder, *words))
    assert code == 0, (words, code, err)


def read(path):
    with open(path, "rb") as f:
        return f.read()


def make_inputs(folder):
    """All that commands read, in one folder."""
    for name, text in (("text", TEXT), ("tasks", TASK), ("questions", "Who?\nWhen?\n")):
        with open(os.path.join(folder, name), "w") as f:
            f.write(text)
    must(folder, "calibrate", MODEL, "-f", "text", "-o", "profile", "-q")
    must(folder, "compress", MODEL, "-f", "text", "-o", "cache", "-q")
    must(folder, "eval", MODEL, "tasks", "--ratio", "1,0.5", "-o", "results", "-q")


COMMANDS = [
    ("compress", MODEL, "-f", "text", "-o", "out", "-q", "-j", "2"),
    ("ask", MODEL, "cache", "-f", "questions", "-q", "-n", "4"),
    ("compress", MODEL, "-f", "text", "-o", "out", "-q", "--stream", "--profile", "profile", "--kv", "q8/q4"),
    ("compress", MODEL, "-f", "text", "-o", "out", "-q", "--demote", "q2", "--json"),
    ("generate", MODEL, "-f", "text", "-q", "-n", "8", "--budget", "40", "--top-p", "0.9", "--temp", "1", "--seed", "1"),
    ("chat", MODEL, "-q", "-n", "4"),
    ("score", MODEL, "-f", "text", "-o", "out", "-q", "--policy", "kvzip"),
    ("map", MODEL, "-f", "text", "-o", "out", "-q"),
    ("logits", MODEL, "-f", "text", "-c", "cache", "-o", "out", "-q"),
    ("tokenize", MODEL, "-f", "text"),
    ("eval", MODEL, "tasks", "--ratio", "1,0.5", "-o", "out", "--chart", "chart", "-q", "-n", "4"),
    ("eval", MODEL, "--ppl", "text", "-n", "32", "-q"),
    ("eval", "--merge", "results", "-o", "out", "--chart", "chart"),
    ("calibrate", MODEL, "-f", "text", "-o", "out", "-q"),
    ("info", MODEL), ("info", "cache", "--json"), ("info", "profile"),
]


def one_line(err):
    """At most a sentence, and no report of anything else."""
    lines = err.splitlines()
    return len(lines) <= 1 and all(line.startswith("run: ") for line in lines)


def together(jobs):
    """Calls each job, two at a time."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 2) as pool:
        for f in [pool.submit(*job) for job in jobs]:
            f.result()


# ---- memory ----

def allocation(inputs, library, words, n):
    """The n-th allocation of a command fails."""
    with tempfile.TemporaryDirectory() as folder:
        for name in os.listdir(inputs):
            os.symlink(os.path.join(inputs, name), os.path.join(folder, name))
        code, err = finish(start(folder, *words, env={**os.environ, "LD_PRELOAD": library, "FAULT": str(n)}))
        left = [name for name in os.listdir(folder) if ".tmp" in name]
        check(code in (0, 1) and one_line(err) and (code == 0) == (err == ""),
              "%s, allocation %d: ended with %d: %s" % (" ".join(words[:1] + words[2:]), n, code, err[-300:]))
        check(not left, "%s, allocation %d: left %s" % (words[0], n, left))


def allocations(inputs, library):
    for words in COMMANDS:
        count = os.path.join(inputs, "count")
        env = {**os.environ, "LD_PRELOAD": library, "FAULT": "0", "FAULT_COUNT": count}
        with tempfile.TemporaryDirectory() as folder:
            for name in os.listdir(inputs):
                os.symlink(os.path.join(inputs, name), os.path.join(folder, name))
            code, err = finish(start(folder, *words, env=env))
        check(code == 0 and err == "", "%s: ended with %d: %s" % (words[0], code, err))
        total = int(read(count))
        os.remove(count)
        sites = range(1, total + 1) if LONG else sorted(rng.sample(range(1, total + 1), min(total, 60)))
        together([(allocation, inputs, library, words, n) for n in sites])
        print("%-40s %5d allocations, %d failed in turn" % (" ".join(words[:1] + words[2:])[:40], total, len(sites)))


# ---- the disk ----

class Saving:
    """A folder in which a cache is saved over an older one."""

    def __init__(self, inputs):
        self.folder = tempfile.mkdtemp()
        for name in os.listdir(inputs):
            os.symlink(os.path.join(inputs, name), os.path.join(self.folder, name))
        self.words = ("compress", MODEL, "-f", "text", "-o", "out", "-q", "-j", "1", "--ratio", "0.5")
        must(self.folder, *self.words)
        self.new = read(self.path("out"))
        must(self.folder, *self.words[:-1], "0.3")
        self.old = read(self.path("out"))
        assert self.old != self.new

    def path(self, name):
        return os.path.join(self.folder, name)

    def again(self):
        """The old file, and nothing beside it."""
        for name in os.listdir(self.folder):
            if name.startswith("out"):
                os.remove(self.path(name))
        with open(self.path("out"), "wb") as f:
            f.write(self.old)

    def left(self):
        return [name for name in os.listdir(self.folder) if name.startswith("out.")]

    def close(self):
        shutil.rmtree(self.folder)


def traced(saving, *inject):
    wrap = ["strace", "-f", "-qq", "-o", "/dev/null", *(w for i in inject for w in ("-e", "inject=" + i))]
    return finish(start(saving.folder, *saving.words, wrap=wrap, program=STATIC))


def calls_of(saving):
    """Number of each system call that the command's own thread makes."""
    log = saving.path("trace")
    finish(start(saving.folder, *saving.words, wrap=["strace", "-ff", "-qq", "-o", log], program=STATIC))
    busiest = max((f for f in os.listdir(saving.folder) if f.startswith("trace.")),
                  key=lambda f: os.path.getsize(saving.path(f)))
    names = re.findall(r"^(\w+)\(", read(saving.path(busiest)).decode("utf-8", "replace"), re.M)
    for f in os.listdir(saving.folder):
        if f.startswith("trace."):
            os.remove(saving.path(f))
    return names


ERRORS = [("write", "ENOSPC"), ("write", "EIO"), ("write", "EDQUOT"), ("fsync", "EIO"), ("fsync", "ENOSPC"),
          ("rename", "EACCES"), ("rename", "ENOSPC"), ("openat", "EACCES"), ("openat", "EMFILE"), ("openat", "EIO"),
          ("mmap", "ENOMEM"), ("read", "EIO"), ("read", "EINTR"), ("write", "EINTR"), ("close", "EIO"), ("lseek", "EIO"), ("fcntl", "ENOLCK"),
          ("ftruncate", "EIO"), ("fstat", "EIO"), ("newfstatat", "EIO"), ("fchmod", "EPERM"), ("readlink", "EIO"),
          ("unlink", "EPERM"), ("clone3", "EAGAIN")]


def disk(inputs):
    saving = Saving(inputs)
    saving.again()
    names, tried = calls_of(saving), 0
    for call, error in ERRORS:
        times = names.count(call) + 2
        for n in range(1, times + 1) if LONG or times < 6 else sorted(rng.sample(range(1, times + 1), 5)):
            saving.again()
            code, err = traced(saving, "%s:error=%s:when=%d" % (call, error, n))
            now, where = read(saving.path("out")), "%s gives %s, call %d" % (call, error, n)
            check(now == (saving.new if code == 0 else saving.old) or (call == "close" and now == saving.new),
                  "%s: status %d, but the file is %s" % (where, code, "new" if now == saving.new else "neither"))
            check(code in (0, 1) and one_line(err), "%s: status %d: %s" % (where, code, err[-300:]))
            check(not saving.left() or call == "unlink", "%s: left %s" % (where, saving.left()))
            tried += 1
    saving.close()
    print("%d failing system calls" % tried)


# ---- signals ----

def interrupts(inputs):
    """Ctrl-C at every system call."""
    saving = Saving(inputs)
    saving.again()
    n_calls, codes = len(calls_of(saving)) + 3, {}
    for n in range(1, n_calls + 1) if LONG else sorted(rng.sample(range(1, n_calls + 1), min(60, n_calls))):
        saving.again()
        code, err = traced(saving, "all:signal=SIGINT:when=%d" % n)
        now = read(saving.path("out"))
        codes[code] = codes.get(code, 0) + 1
        check(now == (saving.new if code == 0 else saving.old), "SIGINT at call %d: status %d" % (n, code))
        check(code in (0, 130, -signal.SIGINT), "SIGINT at call %d: status %d: %s" % (n, code, err))
        check(not saving.left(), "SIGINT at call %d: left %s" % (n, saving.left()))
    saving.close()
    print("SIGINT at each of %d system calls: %s" % (n_calls, codes))


def random_signals(inputs, sig, times):
    """A signal at random moments, without strace."""
    saving = Saving(inputs)
    before = time.time()
    must(saving.folder, *saving.words)
    lasts, outcome, left = time.time() - before, {"old": 0, "new": 0}, 0
    for i in range(times):
        saving.again()
        p = start(saving.folder, *saving.words)
        time.sleep(rng.uniform(0, 1.1 * lasts))
        p.send_signal(sig)
        code, _ = finish(p)
        now = read(saving.path("out"))
        check(now in (saving.old, saving.new), "%s %d: the file is neither old nor new" % (sig.name, i))
        outcome["old" if now == saving.old else "new"] += 1
        if sig == signal.SIGKILL:
            left += len(saving.left())
            must(saving.folder, *saving.words)
            check(read(saving.path("out")) == saving.new, "after SIGKILL %d: the next run saves" % i)
        else:
            check(code in (0, 130, -sig), "%s %d: status %d" % (sig.name, i, code))
            check(now == (saving.new if code == 0 else saving.old), "%s %d: status %d" % (sig.name, i, code))
        check(not saving.left(), "%s %d: left %s" % (sig.name, i, saving.left()))
    saving.close()
    print("%s at %d moments: %s%s" % (sig.name, times, outcome, ", %d temporaries cleared away" % left if left else ""))


def main():
    with tempfile.TemporaryDirectory() as inputs:
        make_inputs(inputs)
        library = os.path.join(inputs, "fault.so")
        subprocess.run([os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O1", "-o", library,
                        os.path.join(HERE, "fault.c"), "-ldl"], check=True)
        allocations(inputs, library)
        disk(inputs)
        interrupts(inputs)
        random_signals(inputs, signal.SIGINT, 300 if LONG else 40)
        random_signals(inputs, signal.SIGKILL, 200 if LONG else 20)
    sys.exit(end("faults"))


if __name__ == "__main__":
    main()
