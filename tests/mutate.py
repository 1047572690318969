"""mutate.py: valid files with one thing wrong, read by the real commands.

usage: mutate.py RUN [--plain PROGRAM] [--mutants N] [--first N] [--seed S] [--jobs J]
       mutate.py RUN --intact [--jobs J]

RUN is a program built with the sanitizers (`make mutants` does that), PROGRAM the same without. A mutant is a model, a cache, a profile, tasks,
results, ids, questions or a text of the fixtures in which a few things are changed that a reader of files would not
expect: numbers of the metadata, shapes (with the file laid out again, so that only the meaning is wrong), dtypes,
indices, lengths, floats that are none, pieces cut off or there twice. Two commands read each. A finding is a signal,
a sanitizer's report, an exit code other than 0, 1 or 2, more than one line of error, or 10 s of a processor: a command
that takes those under the sanitizers is given to PROGRAM, which must end within them. The same seed makes the same
mutants; those found are left in build/mutants with the command that shows them.

With --intact all commands read the files as they are, with several threads, and must succeed (`make tsan`).
"""
import argparse
import concurrent.futures
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FIXTURES = os.path.join(ROOT, "tests", "fixtures")
MODELS = ["smol-q8", "smol-q4", "gemma3", "qwen3"]
TEXT = "The miller kept seven geese by the old bridge. In spring the river rose, and the bridge went with it. " * 2
INTS = [-2**31, -2**30, -65, -64, -2, -1, 0, 1, 2, 3, 7, 8, 31, 63, 64, 65, 127, 128, 255, 256, 257, 4096, 2**16,
        2**24, 2**30 - 1, 2**30, 2**30 + 1, 2**31 - 1]
NUMBERS = ["-1", "0", "1", "2", "3", "63", "64", "65", "16777216", "16777217", "1073741824", "2147483647",
           "2147483648", "4294967296", "9223372036854775808", "1e308", "1e-308", "-0", "nan", "inf", "-inf", "", " ",
           "0x10", "1.5", "x", "\x1b[31m", "é" * 300, "%s%n"]
FLOATS = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e-45, -1e-40, 3e38, -3e38, 65504.0, 1e-7, 1.0]
SIZES = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "F64": 8}
PACK = {"U8": "B", "I8": "b", "F16": "e", "I32": "i", "U32": "I", "F32": "f", "I64": "q", "F64": "d"}

# ---- containers ----


def read_container(data):
    """A safetensors file as metadata and [name, dtype, shape, bytes], in the order of the file."""
    n = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + n])
    meta = header.pop("__metadata__", {})
    tensors = [[name, t["dtype"], list(t["shape"]), bytearray(data[8 + n + t["data_offsets"][0]:
                                                                   8 + n + t["data_offsets"][1]])]
               for name, t in header.items()]
    return meta, tensors


def write_container(meta, tensors):
    """The way back: offsets follow the data, names may repeat, and each tensor keeps its alignment where it can."""
    parts, at = [json.dumps("__metadata__") + ":" + json.dumps(meta)], 0
    for name, dtype, shape, data in tensors:
        parts.append("%s:%s" % (json.dumps(name), json.dumps(
            {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]})))
        at += len(data)
    header = ("{" + ",".join(parts) + "}").encode()
    header += b" " * (-(8 + len(header)) % 64)
    return struct.pack("<Q", len(header)) + header + b"".join(bytes(t[3]) for t in tensors)


def count(shape):
    n = 1
    for size in shape:
        n *= size
    return n


def refit(tensor, rng):
    """The data becomes as long as the shape says: what is missing is repeated."""
    want = count(tensor[2]) * SIZES[tensor[1]]
    data = tensor[3] or bytearray(1)
    tensor[3] = (data * (want // len(data) + 1))[:want]


def realign(tensors):
    """Fillers between tensors make each start on 64 bytes again."""
    out, at = [], 0
    for t in tensors:
        if t[0].startswith("pad."):
            continue
        if at % 64:
            gap = -at % 64
            out.append(["pad.%d" % len(out), "U8", [gap], bytearray(gap)])
            at += gap
        out.append(t)
        at += len(t[3])
    return out


# ---- what is changed ----


def change_meta(meta, tensors, rng):
    if not meta:
        return
    key = rng.choice(sorted(k for k in meta))
    how = rng.random()
    if how < 0.15:
        del meta[key]
    elif how < 0.5 and re.fullmatch(r"-?\d+", meta[key]):
        n = int(meta[key])
        meta[key] = str(rng.choice([n + 1, n - 1, n * 2, n // 2, -n, n * 8, n + 64]))
    elif how < 0.6:
        meta[key] = meta[rng.choice(sorted(meta))]
    else:
        meta[key] = rng.choice(NUMBERS)


def change_shape(meta, tensors, rng):
    t = rng.choice(tensors)
    if not t[2] or rng.random() < 0.2:
        t[2] = t[2] + [1] if rng.random() < 0.5 else [count(t[2])]
        return
    i = rng.randrange(len(t[2]))
    t[2][i] = max(0, rng.choice([0, 1, 2, t[2][i] - 1, t[2][i] + 1, t[2][i] * 2, t[2][i] // 2]))
    if count(t[2]) < 1 << 22 and rng.random() < 0.8:
        refit(t, rng)


def change_dtype(meta, tensors, rng):
    t = rng.choice(tensors)
    t[1] = rng.choice(sorted(SIZES))
    if rng.random() < 0.7:
        refit(t, rng)


def change_list(meta, tensors, rng):
    how, i = rng.random(), rng.randrange(len(tensors))
    if how < 0.4:
        del tensors[i]
    elif how < 0.6:
        tensors.append(json_copy(rng.choice(tensors)))
    elif how < 0.8:
        j = rng.randrange(len(tensors))
        tensors[i][0], tensors[j][0] = tensors[j][0], tensors[i][0]
    else:
        tensors[i][0] = rng.choice(["", "x", "tok_embed", "k", "layers.0.wq", "a" * 400, "\x1b[2J"])


def json_copy(t):
    return [t[0], t[1], list(t[2]), bytearray(t[3])]


def change_numbers(meta, tensors, rng):
    """A few entries of one tensor, or all of them. Small tensors, of lengths and indices, come as often as large."""
    t = rng.choice(tensors)
    size, n = SIZES[t[1]], len(t[3]) // SIZES[t[1]]
    if n == 0:
        return
    pack = PACK.get(t[1])
    places = range(n) if n < 4096 and rng.random() < 0.15 else [rng.randrange(n) for _ in range(rng.choice([1, 1, 4, 30]))]
    same = rng.random() < 0.5
    value = None
    for i in places:
        if value is None or not same:
            value = entry(pack, t[3][i * size:(i + 1) * size], rng)
        t[3][i * size:(i + 1) * size] = value


def entry(pack, old, rng):
    if pack in ("e", "f", "d"):
        x = rng.choice(FLOATS)
        try:
            return struct.pack("<" + pack, x)
        except OverflowError:
            return struct.pack("<" + pack, float("inf"))
    if pack in ("i", "I", "q"):
        n = struct.unpack("<" + pack, bytes(old))[0]
        x = rng.choice(INTS + [n + 1, n - 1, n + 64, n - 64, n * 2])
        bits = 8 * len(old)
        return (x % (1 << bits)).to_bytes(len(old), "little")
    return bytes(rng.choice([0, 1, 2, 3, 127, 128, 255, rng.randrange(256)]) for _ in old)


CHANGES = [change_meta, change_meta, change_shape, change_shape, change_dtype, change_list, change_numbers,
           change_numbers, change_numbers, change_numbers]


def mutate_bytes(data, rng):
    """Anything at all: bits, pieces cut out, there twice or in the wrong place."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        how, n = rng.randrange(6), len(data)
        if n == 0:
            break
        a, b = sorted((rng.randrange(n), rng.randrange(n)))
        b = min(b, a + 200)
        if how == 0:
            data[a] ^= 1 << rng.randrange(8)
        elif how == 1:
            del data[a:]
        elif how == 2:
            data[a:a] = data[a:b]
        elif how == 3:
            del data[a:b]
        elif how == 4:
            data[a:b] = bytes(rng.randrange(256) for _ in range(b - a))
        else:
            data[a:a] = rng.choice([b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\x1b[31m", b"\xed\xa0\x80", b"\r\n", b"\t",
                                    b"\n\n", b"99999999999999999999 ", b"-1 ", b"1e999", b'"', b"[" * 40, b"<|im_end|>"])
    return bytes(data)


def mutate_container(data, rng):
    if rng.random() < 0.1:
        return mutate_bytes(data, rng)
    meta, tensors = read_container(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if tensors:
            rng.choice(CHANGES)(meta, tensors, rng)
    if rng.random() < 0.8:
        tensors = realign(tensors)
    return write_container(meta, tensors)


def change_value(v, rng):
    """One value of a JSON document becomes another."""
    if isinstance(v, (dict, list)) and v and rng.random() < 0.9:
        keys = sorted(v) if isinstance(v, dict) else range(len(v))
        key, how = rng.choice(list(keys)), rng.random()
        if how < 0.12:
            del v[key]
        elif how < 0.2 and isinstance(v, list):
            v.insert(key, v[key])
        else:
            v[key] = change_value(v[key], rng)
        return v
    return rng.choice([None, True, 0, -1, 1.5, 1e308, 2**31, 2**63, 10**400, "", "x", "é\x1b[31m</text>", "\ud800", [], {}, [[]],
                       [1], "0", v, v])


def mutate_lines(data, rng):
    """JSON Lines: a value of one line, or anything."""
    if rng.random() < 0.25:
        return mutate_bytes(data, rng)
    lines = [json.loads(line) for line in data.decode().splitlines()]
    for _ in range(rng.choice([1, 1, 2])):
        how, i = rng.random(), rng.randrange(len(lines))
        if how < 0.1 and len(lines) > 1:
            del lines[i]
        elif how < 0.2:
            lines.append(json.loads(json.dumps(lines[i])))
        else:
            lines[i] = change_value(lines[i], rng)
    text = "\n".join(json.dumps(line) for line in lines) + "\n"
    if rng.random() < 0.3:  # numbers that Python would not write
        text = re.sub(r"\b\d+\b", lambda m: rng.choice([m[0], m[0], m[0], "1e999", "-1e999", "99999999999", "null"]), text)
    return text.encode()


# ---- the files and the commands that read them ----


def tasks_text(*metrics):
    answers = {"contained": ["the miller", "7"], "exact": ["The mill."], "f1": ["seven geese"], "choice": ["c"]}
    tasks = [{"context": TEXT[:120], "task": "mill", "metric": metric, "max_tokens": 3, "stop": ".",
              "questions": [{"question": "Who?", "answers": answers[metric], "answer_prefix": "It was"},
                            {"question": "What?", "answers": ["b"]}]} for metric in metrics]
    return "".join(json.dumps(t) + "\n" for t in tasks).encode()


class Files:
    """Valid files, made by the program itself in a folder of their own."""

    def __init__(self, run, folder):
        self.run, self.folder = run, folder
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
        self.text = self.put("text", TEXT.encode())
        self.questions = self.put("questions", b"Who kept geese?\tThe\nWhat rose?\nHow many?\n")
        self.tasks = self.put("tasks", tasks_text("contained", "choice"))
        self.caches, self.profiles, self.models = [], [], {m: os.path.join(FIXTURES, m + ".kvz") for m in MODELS}
        for m in MODELS:
            for i, flags in enumerate(([], ["--kv", "q8/q4"], ["--demote", "q2"], ["--kv", "f32", "--ratio", "1"])):
                if i == 0 or m in ("smol-q8", "gemma3"):
                    path = os.path.join(folder, "%s.%d.kvc" % (m, i))
                    self.make(["compress", self.models[m], "-f", self.text, "-o", path] + flags)
                    self.caches.append((m, path))
        for m in ("smol-q8", "gemma3"):
            path = os.path.join(folder, m + ".kvp")
            self.make(["calibrate", self.models[m], "-f", self.text, "-o", path])
            self.profiles.append((m, path))
        self.results = os.path.join(folder, "results")
        self.make(["eval", self.models["smol-q8"], self.tasks, "--ratio", "1,0.5", "-o", self.results])
        ids = subprocess.run([run, "tokenize", self.models["smol-q8"], "-f", self.text], capture_output=True).stdout
        self.ids = self.put("ids", ids)

    def put(self, name, data):
        path = os.path.join(self.folder, name)
        with open(path, "wb") as f:
            f.write(data)
        return path

    def make(self, args):
        p = subprocess.run([self.run] + args + ["-q"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if p.returncode != 0:
            sys.exit("mutate.py: %s: status %d: %s" % (" ".join(args), p.returncode, p.stderr))


def model_commands(f, bad, out):
    return [["info", bad], ["info", bad, "--json"], ["tokenize", bad, "-p", "The miller's 7 geese"],
            ["tokenize", bad, "--decode", "--ids", f.ids], ["tokenize", bad, "--special", "--bos", "-f", f.text],
            ["generate", bad, "-p", "The miller", "-n", "3"], ["logits", bad, "-p", "The miller", "-o", out],
            ["compress", bad, "-f", f.text, "-o", out, "--ratio", "0.3"],
            ["compress", bad, "-f", f.text, "-o", out, "--policy", "expected", "--budget", "40", "--window", "8"],
            ["compress", bad, "-f", f.text, "-o", out, "--demote", "q2", "--kv", "q4"],
            ["score", bad, "-f", f.text, "-o", out, "--policy", "kvzip+"], ["map", bad, "-f", f.text, "-o", out],
            ["eval", bad, f.tasks, "--ratio", "0.5"], ["calibrate", bad, "-f", f.text, "-o", out],
            ["ask", bad, f.caches[0][1], "Who?", "-n", "3"], ["chat", bad, "-n", "3", "--system", "Short."],
            ["eval", bad, "--ppl", f.text, "-n", "32"]]


def cache_commands(f, model, bad, out):
    return [["info", bad], ["info", bad, "--json"], ["ask", model, bad, "Who kept geese?", "What rose?", "-n", "3"],
            ["ask", model, bad, "-f", f.questions, "-n", "70", "--keep"], ["chat", model, "-c", bad, "-n", "3"],
            ["ask", model, bad, "Who?", "-n", "4", "--raw", "--temp", "0.8"],
            ["logits", model, "-c", bad, "-p", "The bridge", "-o", out]]


def profile_commands(f, model, bad, out):
    read = ["compress", model, "-f", f.text, "-o", out, "--profile", bad]
    return [["info", bad], read, read + ["--policy", "kvzap"], read + ["--level", "profile", "--ratio", "0.05"],
            read + ["--policy", "kvzap", "--set", "expected=1"], read + ["--stream", "--ratio", "0.4", "--window", "8"],
            ["eval", model, f.tasks, "--profile", bad, "--ratio", "0.3"],
            ["map", model, "-f", f.text, "-o", out, "--profile", bad],
            ["generate", model, "-p", "The", "-n", "30", "--budget", "12", "--window", "4", "--profile", bad]]


def results_commands(f, bad, out):
    return [["eval", "--merge", bad, "--chart", out], ["eval", "--merge", bad, "--json"],
            ["eval", "--merge", f.results, bad, "-o", out],
            ["eval", f.models["smol-q8"], f.tasks, "--ratio", "1,0.5", "-o", bad]]


def tasks_commands(f, bad, out):
    model = f.models["smol-q8"]
    return [["eval", model, bad, "--ratio", "0.5"], ["eval", model, bad, "--ratio", "1", "-o", out, "--chart", out + ".svg"]]


def ids_commands(f, bad, out):
    model = f.models["smol-q8"]
    return [["compress", model, "--ids", bad, "--n-prefix", "3", "-o", out], ["tokenize", model, "--decode", "--ids", bad],
            ["logits", model, "--ids", bad, "-o", out], ["generate", model, "--ids", bad, "-n", "2"]]


def text_commands(f, bad, out):
    model = f.models["smol-q8"]
    return [["ask", model, f.caches[0][1], "-f", bad, "-n", "2"], ["generate", model, "-f", bad, "-n", "2"],
            ["compress", model, "-f", bad, "-o", out], ["tokenize", f.models["gemma3"], "-f", bad],
            ["calibrate", model, "-f", bad, "-o", out], ["eval", model, "--ppl", bad, "-n", "16"]]


def new_mutant(f, rng, bad, out):
    """The bytes of a mutant that is to lie at `bad`, and the commands that read it."""
    kind = rng.choice(["model"] * 4 + ["cache"] * 5 + ["profile"] * 2 + ["results"] * 2 + ["tasks", "ids", "text"])
    read = lambda path: open(path, "rb").read()
    if kind == "model":
        return mutate_container(read(f.models[rng.choice(MODELS)]), rng), model_commands(f, bad, out)
    if kind in ("cache", "profile"):
        model, path = rng.choice(f.caches if kind == "cache" else f.profiles)
        commands = cache_commands if kind == "cache" else profile_commands
        return mutate_container(read(path), rng), commands(f, f.models[model], bad, out)
    if kind == "results":
        return mutate_lines(read(f.results), rng), results_commands(f, bad, out)
    if kind == "tasks":
        return mutate_lines(read(f.tasks), rng), tasks_commands(f, bad, out)
    if kind == "ids":
        return mutate_bytes(read(f.ids), rng), ids_commands(f, bad, out)
    return mutate_bytes(read(rng.choice([f.questions, f.text])), rng), text_commands(f, bad, out)


# ---- running ----

SETTINGS = {"ASAN_OPTIONS": "allocator_may_return_null=1:max_allocation_size_mb=2000:detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1", "OMP_NUM_THREADS": "1"}
OUT_OF_TIME = (-signal.SIGXCPU, -signal.SIGKILL)


SECONDS = 10  # of a processor, that a command may take to refuse a file of these sizes or to read it


STUCK = 300  # by the clock: a command that waits for something that never comes uses no processor
# A shell sets the limits: code of ours between fork and exec (preexec_fn) may wait for a lock of another thread for ever.
LIMITED = ["sh", "-c", "ulimit -c 0; ulimit -t %d; ulimit -S -t %d; exec nice -n 5 \"$@\"" % (SECONDS + 2, SECONDS), "sh"]


def start(args):
    """Status and stderr of a command."""
    try:
        p = subprocess.run(LIMITED + args, input=b"Who kept geese?\nAnd then?\n", capture_output=True, env={**os.environ, **SETTINGS}, timeout=STUCK)
    except subprocess.TimeoutExpired as e:
        return "none after %d s" % STUCK, (e.stderr or b"").decode("utf-8", "replace")
    return p.returncode, p.stderr.decode("utf-8", "replace")


def finding(args, plain):
    """What is wrong with how a command ends, or None; and its stderr."""
    code, err = start(args)
    if code in OUT_OF_TIME and start([plain] + args[1:])[0] not in OUT_OF_TIME:
        return None, err
    return "no end after %d s" % SECONDS if code in OUT_OF_TIME else judge(code, err), err


def judge(code, err):
    """What is wrong with how a command ended, or None."""
    said = [line for line in err.split("\n") if line and "failed to allocate" not in line]
    errors = [line for line in said if line.startswith("run: ") and not line.startswith("run: warning:")]
    other = [line for line in said if not line.startswith(("run: ", "[", "> "))]
    if any("Sanitizer" in line or "runtime error" in line for line in other):
        return "the sanitizer's report"
    if code not in (0, 1, 2):
        return "status %s" % code
    if other or len(errors) != (code != 0):
        return "%d lines of error with status %d" % (len(errors) + len(other), code)
    if any(ord(c) < 32 or ord(c) == 127 for line in said for c in line):
        return "a control character on the terminal"
    return None


def try_mutant(f, programs, seed, i):
    """Findings of one mutant: (what, command, stderr)."""
    rng = random.Random("%d %d" % (seed, i))
    bad, out = os.path.join(f.folder, "bad.%d" % i), os.path.join(f.folder, "out.%d" % i)
    data, commands = new_mutant(f, rng, bad, out)
    found = []
    for args in rng.sample(commands, min(2, len(commands))):
        with open(bad, "wb") as to:
            to.write(data)
        args = [programs[0]] + args + ["-q", "-j", rng.choice(["1", "2"])]
        if args[1] not in ("info", "tokenize") and rng.random() < 0.4:
            args += ["--isa", "scalar"]
        what, err = finding(args, programs[1])
        if what:
            with open(bad + ".found", "wb") as to:
                to.write(data)
            found.append((what, " ".join(args).replace(bad, bad + ".found"), err))
    for path in (bad, out, out + ".svg"):
        if os.path.exists(path):
            os.remove(path)
    return found


def intact(f):
    """All commands over valid files. They add to results, which therefore are copies."""
    out, commands, model = os.path.join(f.folder, "out"), [], dict(f.models)
    for path in model.values():
        commands += model_commands(f, path, out)
    for name, path in f.caches:
        commands += cache_commands(f, model[name], path, out)
    for name, path in f.profiles:
        commands += profile_commands(f, model[name], path, out)
    results = shutil.copy(f.results, os.path.join(f.folder, "more"))
    commands += results_commands(f, results, out) + tasks_commands(f, f.tasks, out + ".more") + ids_commands(f, f.ids, out)
    commands += text_commands(f, f.text, out)
    own_cache = lambda args: args[0] != "ask" or args[2] in [path for name, path in f.caches if model[name] == args[1]]
    return [args for args in commands if own_cache(args)]


def try_intact(f, program, i, args):
    args = [program] + [word.replace(os.path.join(f.folder, "out"), os.path.join(f.folder, "out.%d" % i)) for word in args]
    code, err = start(args + ["-q", "-j", "3"])
    what = judge(code, err) or ("status %d" % code if code else None)
    return [(what, " ".join(args), err)] if what else []


def show(results):
    """Prints findings as they come; returns how many cases there were, and findings."""
    n = found = 0
    for n, all_of in enumerate(results, 1):
        for what, command, err in all_of:
            found += 1
            if found <= 40:
                print("%d: %s\n  %s\n%s" % (n - 1, what, command, "\n".join("    " + e for e in err.split("\n")[:12])), flush=True)
    return n, found


def main():
    p = argparse.ArgumentParser(usage=__doc__)
    p.add_argument("run")
    p.add_argument("--plain", default=os.path.join(ROOT, "run"))
    p.add_argument("--intact", action="store_true")
    p.add_argument("--mutants", type=int, default=500)
    p.add_argument("--first", type=int, default=0, help="the number of the first mutant")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--jobs", type=int, default=os.cpu_count())
    o = p.parse_args()
    begin = time.time()
    programs = [os.path.abspath(o.run), os.path.abspath(o.plain)]
    f = Files(programs[1], os.path.join(ROOT, "build", "intact" if o.intact else "mutants"))
    with concurrent.futures.ThreadPoolExecutor(o.jobs) as pool:
        if o.intact:
            n, found = show(pool.map(lambda job: try_intact(f, programs[0], *job), enumerate(intact(f))))
        else:
            n, found = show(pool.map(lambda i: try_mutant(f, programs, o.seed, i), range(o.first, o.first + o.mutants)))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print("%s, %d findings, %.0f s of processors, %.0f s"
          % ("%d commands" % n if o.intact else "mutants: seed %d, %d mutants" % (o.seed, n), found,
             used.ru_utime + used.ru_stime, time.time() - begin))
    print("mutate: %d passed, %d failed" % (n - found, found))
    return found > 0


if __name__ == "__main__":
    sys.exit(main())
