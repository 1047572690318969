#!/usr/bin/env python3
"""test_files.py: whatever a command writes, no other file is touched, and what is cut or damaged is one line.

Runs ./run (or $RUN) on the committed fixtures; needs nothing but Python's standard library.
"""
import fcntl
import os
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import time

from checks import Tensors, check, end

HERE = os.path.dirname(os.path.abspath(__file__))
RUN = os.environ.get("RUN", os.path.join(os.path.dirname(HERE), "run"))
MODEL = os.path.join(HERE, "fixtures", "smol-q8.kvz")
TASK = ('{"task": "mill", "context": "The mill was built by Ann Grey.", "metric": "contained", '
        '"questions": [{"question": "Who built it?", "answers": ["Ann"]}]}\n')


def run(*words, **options):
    p = subprocess.run([RUN, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                       timeout=120, **options)
    return p.returncode, p.stderr.decode("utf-8", "replace")


def works(*words, **options):
    code, err = run(*words, **options)
    check(code == 0, "%s: status %d: %s" % (words[:1], code, err))


def fails(what, *words, code=1, **options):
    """One line that says what, and the status."""
    got, err = run(*words, **options)
    check(got == code and what in err and err.count("\n") == 1 and err.startswith("run: "),
          "%s: expected '%s', status %d: found %d: %s" % (words[:1], what, code, got, err))


def read(path):
    with open(path, "rb") as f:
        return f.read()


def write(path, data):
    with open(path, "wb") as f:
        f.write(data if isinstance(data, bytes) else data.encode())
    return path


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def compress(out, text="The mill was built by Ann Grey.", **options):
    works("compress", MODEL, "-p", text, "-o", out, "-q", "-j", "1", **options)


def temporaries(d):
    return sorted(name for name in os.listdir(d) if name.endswith(".tmp"))


# ---- what an output is ----

def test_links_and_modes(d):
    real, link, chain = d + "/real.kvc", d + "/link.kvc", d + "/chain.kvc"
    compress(real)
    os.symlink("real.kvc", link)
    os.symlink(link, chain)
    os.chmod(real, 0o600)
    before = read(real)
    compress(chain, "Another text.")
    check(os.path.islink(chain) and os.path.islink(link) and read(real) != before, "a link is followed to its end")
    check(mode(real) == 0o600, "the mode stays: %o" % mode(real))
    os.symlink("fresh.kvc", d + "/dangling.kvc")
    compress(d + "/dangling.kvc", preexec_fn=lambda: os.umask(0o027))
    check(os.path.islink(d + "/dangling.kvc") and mode(d + "/fresh.kvc") == 0o640, "a new file: the link's, and umask")
    os.symlink("loop", d + "/loop")
    fails("loop: cannot be written: Too many levels", "compress", MODEL, "-p", "x", "-o", d + "/loop", "-q")
    check(temporaries(d) == [], "nothing is left: %s" % temporaries(d))


def test_not_through_planted_links(d):
    """Under the temporary's name lies a link to something dear."""
    victim = write(d + "/victim", "precious\n")
    plant = lambda: [os.symlink(victim, d + "/x.kvc.%d.%d.tmp" % (os.getpid(), i)) for i in range(3)]
    compress(d + "/x.kvc", preexec_fn=plant)
    check(read(victim) == b"precious\n" and not os.path.islink(d + "/x.kvc"), "a planted link is not written through")
    Tensors(d + "/x.kvc")
    for name in temporaries(d):
        os.remove(d + "/" + name)


def test_dead_temporaries(d):
    out = d + "/dead.kvc"
    write(out + ".999999.0.tmp", "half of a file")
    write(out + ".mine.0.tmp", "somebody's")
    write(d + "/other.kvc.999999.0.tmp", "of another file")
    with open(out + ".999998.0.tmp", "wb") as alive:
        fcntl.lockf(alive, fcntl.LOCK_EX)
        compress(out)
        check(temporaries(d) == ["dead.kvc.999998.0.tmp", "dead.kvc.mine.0.tmp", "other.kvc.999999.0.tmp"],
              "only the temporary of a dead writer goes: %s" % temporaries(d))
    for name in temporaries(d):
        os.remove(d + "/" + name)


def test_never_an_input(d):
    """Every path that is read, under each of its names."""
    text, ids = write(d + "/text", "Ann Grey built the mill of Gavi in 1803. " * 9), write(d + "/ids", "5 6 7 8 9 10 11 12")
    cache, profile, tasks = d + "/in.kvc", d + "/in.kvp", write(d + "/tasks", TASK)
    model = shutil.copy(MODEL, d + "/model.kvz")
    compress(cache)
    works("calibrate", MODEL, "-f", text, "-o", profile, "-q")
    works("eval", MODEL, tasks, "--ratio", "1", "-o", d + "/in.results", "-q")
    inputs = {path: read(path) for path in (text, ids, cache, profile, tasks, model, d + "/in.results")}
    os.link(text, d + "/hard")
    os.symlink(profile, d + "/soft")
    for out, words in (
            (model, ("compress", model, "-f", text)), (text, ("compress", MODEL, "-f", text)),
            (d + "/hard", ("compress", MODEL, "-f", text)), (d + "/../" + os.path.basename(d) + "/text",
                                                            ("map", MODEL, "-f", text)),
            (ids, ("score", MODEL, "--ids", ids)), (cache, ("logits", MODEL, "-p", "x", "-c", cache)),
            (profile, ("compress", MODEL, "-f", text, "--profile", profile)),
            (d + "/soft", ("score", MODEL, "-f", text, "--profile", profile)),
            (tasks, ("eval", MODEL, tasks)), (profile, ("eval", MODEL, tasks, "--profile", profile)),
            (d + "/in.results", ("eval", "--merge", d + "/in.results")), (text, ("calibrate", MODEL, "-f", text)),
            (model, ("calibrate", model, "-f", text))):
        fails("is read by this command: it cannot be written", *words, "-o", out, "-q")
    for chart, words in ((tasks, ("eval", MODEL, tasks)), (d + "/in.results", ("eval", "--merge", d + "/in.results"))):
        fails("is read by this command: it cannot be written", *words, "--chart", chart, "-q")
    for chart in ("new.results", d + "/new.results", "./new.results"):
        fails("is also written by this command", "eval", MODEL, tasks, "-o", "new.results", "--chart", chart, "-q", cwd=d)
    check(not os.path.exists(d + "/new.results"), "a refusal makes no file")
    for path, data in inputs.items():
        check(read(path) == data, path + " is as it was")
    works("calibrate", model, "--into", "-f", text, "-o", model, "-q")  # the one that may


def test_refused_before_work(d):
    """Unwritable places, found before the model is even looked at."""
    fails("cannot be written: No such file", "compress", "/no/model", "-p", "x", "-o", d + "/no/such/x", "-q")
    fails("cannot be written: not a regular file", "compress", "/no/model", "-p", "x", "-o", d, "-q")
    fails("cannot be written: not a regular file", "score", "/no/model", "-p", "x", "-o", "/dev/null", "-q")
    fails("cannot be written: not a regular file", "eval", "/no/model", "tasks", "--chart", "/dev/stdout", "-q")
    os.mkfifo(d + "/pipe")
    fails("cannot be written: not a regular file", "map", "/no/model", "-p", "x", "-o", d + "/pipe", "-q")
    fails("cannot be written: File name too long", "map", "/no/model", "-p", "x", "-o", d + "/" + "n" * 300, "-q")
    if os.geteuid() != 0:
        os.chmod(write(d + "/kept", "x"), 0o444)
        fails("cannot be written: Permission denied", "map", "/no/model", "-p", "x", "-o", d + "/kept", "-q")


# ---- results ----

def test_results(d):
    tasks, out = write(d + "/tasks", TASK), d + "/out.results"
    evaluate = ("eval", MODEL, tasks, "--ratio", "1", "-q", "-n", "4")
    for name, data in (("note", "first line\nsecond line without newline"), ("one", "one line"), ("nul", b"\0\0\0"),
                       ("model", read(MODEL))):
        path = write(d + "/" + name, data)
        code, err = run(*evaluate, "-o", path)
        check(code == 1 and err.count("\n") == 1, "%s is no file of results: %d: %s" % (name, code, err))
        check(read(path) == (data if isinstance(data, bytes) else data.encode()), name + " is as it was")
    works(*evaluate, "-o", out)
    whole = read(out)
    write(out, whole[:-9])  # a last line that was cut
    fails("results of other tasks", "eval", MODEL, tasks, "--ratio", "1", "-q", "-n", "5", "-o", out)
    check(read(out) == whole[:-9], "refused results are as they were, cut line and all")
    works(*evaluate, "-o", out)
    check(read(out) == whole, "and where they go on, the cut line is made again")
    with open(out, "r+b") as other:
        fcntl.lockf(other, fcntl.LOCK_EX)
        fails("another process is writing to it", *evaluate, "-o", out)
        fails("another process is writing to it", "compress", MODEL, "-p", "x", "-o", out, "-q")
    fails("no/tasks", "eval", MODEL, "no/tasks", "-o", d + "/none", "-q")
    check(not os.path.exists(d + "/none"), "nothing is made for tasks that are not there")


# ---- signals and damage ----

def test_interrupted(d):
    """Ctrl-C at any time: the old file and status 130, or the new one and 0."""
    out = d + "/int.kvc"
    compress(out)
    old = read(out)
    for i in range(12):
        write(out, old)
        p = subprocess.Popen([RUN, "compress", MODEL, "-p", "word " * 300, "-o", out, "-q"], stderr=subprocess.PIPE)
        time.sleep(0.008 * i)
        p.send_signal(signal.SIGINT)
        p.communicate(timeout=60)
        check((p.returncode == 0) == (read(out) != old), "Ctrl-C %d: status %d" % (i, p.returncode))
        Tensors(out)
    check(temporaries(d) == [], "nothing is left: %s" % temporaries(d))


def test_cut_while_read(d):
    """The model's file shrinks while it is mapped."""
    model = shutil.copy(MODEL, d + "/cut.kvz")
    p = subprocess.Popen([RUN, "generate", model, "-p", "Once", "-n", "100000", "--budget", "64", "--ignore-eos", "-q",
                          "-j", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    p.stdout.read(1)
    os.truncate(model, 4096)
    _, err = p.communicate(timeout=60)
    check(p.returncode == 1 and err.decode().count("\n") == 1 and "cut.kvz: was cut while it was being read" in
          err.decode(), "a model that is cut: status %d: %s" % (p.returncode, err))


def test_no_numbers(d):
    """NaN in one weight: an error that names the layer, and no results that could not go on."""
    model, tasks = d + "/nan.kvz", write(d + "/tasks", TASK)
    t = Tensors(MODEL)
    for name, layer in (("layers.0.rms_ffn", "layer 0"), ("layers.1.rms_ffn", "layer 1"), ("rms_final", "layer 2")):
        data = bytearray(read(MODEL))
        data[t.at[name]:t.at[name] + 4] = struct.pack("<f", float("nan"))
        write(model, bytes(data))
        what = layer + " gave infinity or what is no number"
        fails(what, "generate", model, "-p", "Once", "-n", "2", "-q")
        fails(what, "logits", model, "-p", "Once", "-o", d + "/nan.logits", "-q")
        fails(what, "eval", model, tasks, "--ratio", "1,0.5", "-o", d + "/nan.results", "-q")
        check(b"nan" not in read(d + "/nan.results") and b"null" not in read(d + "/nan.results"), "no cell of it")
        os.remove(d + "/nan.results")


def main():
    for test in (test_links_and_modes, test_not_through_planted_links, test_dead_temporaries, test_never_an_input,
                 test_refused_before_work, test_results, test_interrupted, test_cut_while_read, test_no_numbers):
        with tempfile.TemporaryDirectory() as d:
            test(d)
    sys.exit(end("test_files"))


if __name__ == "__main__":
    main()
