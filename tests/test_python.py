#!/usr/bin/env python3
"""test_python.py: python/kvzip.py gives what the command line gives, to the byte, and neither bad input nor Ctrl-C nor
threads break it.

Run after `make run lib` with a Python that has numpy. The last line says how many checks passed and failed.
"""
import ctypes
import gc
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings

import numpy as np

from checks import Tensors, check, end

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "python"))
import kvzip  # noqa: E402

RUN = os.path.join(ROOT, "run")
FIXTURES = os.path.join(ROOT, "tests", "fixtures")
with open(os.path.join(ROOT, "demo", "chronicle.txt"), encoding="utf-8") as f:
    CHRONICLE = f.read()
TEXT = CHRONICLE[:700]


def run(*args, stdin=""):
    done = subprocess.run([RUN, *map(str, args), "-q"], input=stdin.encode(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    check(done.returncode == 0, f"run {args}: {done.stderr.decode().strip()}")
    return done.stdout.decode()


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def same_file(a, b):
    with open(a, "rb") as f, open(b, "rb") as g:
        return f.read() == g.read()


def refused(words, function, *args, **settings):
    """function raises kvzip.Error with these words, in one line."""
    try:
        function(*args, **settings)
    except kvzip.Error as e:
        check(words in str(e) and "\n" not in str(e), f"{e!r} has not {words!r}")
    else:
        check(False, f"no error: {words}")


def kept_in(path, cache):
    """The mask of kept pairs, from the positions that a file of a cache has in layers without a window."""
    t = Tensors(path)
    pos, length, dropped = np.array(t["pos"]), np.array(t["len"]), np.array(t["dropped"])
    window = t["window"]
    layers, heads = t.shape["len"]
    mask = np.zeros((layers, heads, cache.n_ctx), bool)
    first = 0
    for i in range(layers * heads):
        n = length[i] - dropped[i]
        at = pos[first * 64:first * 64 + n] - cache.n_prefix
        mask[i // heads, i % heads, at[(at >= 0) & (at < cache.n_ctx)]] = True
        first += -(-n // 64)
    return mask[[layer for layer in range(layers) if window[layer] == 0]]


# ---- the same as the command line ----

WAYS = [  # flags, and what they are in Python
    ("", {}),
    ("--ratio 0.5 --policy snapkv --level pyramid --set window=16", dict(ratio=0.5, policy="snapkv", level="pyramid",
                                                                         set="window=16")),
    ("--kv q8/q4 --score-attn local --chunk 60", dict(kv="q8/q4", local=True, chunk=60)),
    ("--demote q2", dict(demote=True)),
    ("--fit both", dict(fit="both")),
    ("--fit both --stream --window 32", dict(fit="both", stream=True, window=32)),
    ("--fit values --budget 40 --window 32", dict(fit="values", budget=40, window=32)),
    ("--budget 40 --window 32 --kv f32", dict(budget=40, window=32, kv="f32")),
    ("--raw --ratio 1", dict(raw=True, ratio=1)),
    ("--system|Be brief.|--task|Read:|--level|head|--ref-ties", dict(system="Be brief.", task="Read:", level="head",
                                                                     ref_ties=True)),
]


def test_caches(folder, model, name):
    """Files, figures, masks and answers of every way to compress are those of `run compress`, `info` and `ask`."""
    source, theirs, ours = (os.path.join(folder, n) for n in ("text", "theirs", "ours"))
    with open(source, "w") as f:
        f.write(TEXT)
    for flags, how in WAYS if name == "smol" else WAYS[:1]:
        words = flags.split("|" if "|" in flags else None)
        figures = json.loads(run("compress", model.path, "-f", source, "-o", theirs, "--json", *words))
        cache = model.compress(TEXT, **how)
        cache.save(ours)
        check(same_file(ours, theirs), f"{name} {flags}: the file is that of run compress")
        for field in ("n_ctx", "n_prefix", "n_pairs", "bytes", "full_bytes", "policy", "level", "set", "fit"):
            check(getattr(cache, field) == figures[field], f"{name} {flags}: {field} {getattr(cache, field)}")
        info = json.loads(run("info", theirs, "--json"))
        kept = cache.kept
        if "--demote" not in flags:
            check(np.array_equal(kept, kept_in(theirs, cache)), f"{name} {flags}: the pairs of the file are kept")
        counts = np.array(info["kept_pairs"])[model.layers]
        check(np.array_equal(kept.sum(2), counts) and cache.n_kept == counts.sum(), f"{name} {flags}: as run info counts")
        loaded = kvzip.Cache.from_file(model, theirs)
        check(np.array_equal(loaded.kept, kept) and loaded.policy == cache.policy, f"{name} {flags}: loading changes nothing")
        told = run("ask", model.path, ours, "Who built it?", "And then?", "-n", 12, "--json", *["--raw"] * ("--raw" in flags))
        for c in (cache, loaded):
            answers = c.ask(["Who built it?", "And then?"], limit=12, raw="--raw" in flags)
            check(answers == [a["answer"] for a in lines(told)], f"{name} {flags}: answers {answers} are those of run ask")


def test_answers(folder, model):
    path = os.path.join(folder, "answers.kvc")
    cache = model.compress(TEXT)
    cache.save(path)
    ask = ["ask", model.path, path, "What?", "--json", "-n"]
    told = lines(run(*ask, 30, "--temp", 0.8, "--seed", 3, "--top-p", 0.9))[0]
    answer = cache.ask("What?", limit=30, temp=0.8, seed=3, top_p=0.9)
    check(answer == told["answer"] and answer.n_answer == told["n_answer"] and answer.n_prompt == told["n_prompt"],
          f"a sampled answer is that of run ask: {answer}")
    check(answer.cut == (told["finish_reason"] == "length"), "and ends for the same reason")
    stop = re.search("[a-z]{3}", answer).group()
    told = lines(run(*ask, 30, "--temp", 0.8, "--seed", 3, "--top-p", 0.9, "--stop", stop, "--stop", "zzz"))[0]
    stopped = cache.ask("What?", limit=30, temp=0.8, seed=3, top_p=0.9, stop=[stop, "zzz"])
    check(stopped == told["answer"] and stopped.endswith(stop) and not stopped.cut, "stop texts end it")
    told = lines(run(*ask, 9, "--answer-prefix", "It was"))[0]
    check(cache.ask("What?", limit=9, answer_prefix="It was") == told["answer"], "the start of an answer")
    pieces = [[], []]
    both = cache.ask(["What?", "Why?"], lambda i, piece: pieces[i].append(piece), limit=20)
    check(["".join(p) for p in pieces] == both and len(pieces[0]) > 3, "pieces are the answers")
    check(cache.ask([f"Question {i}?" for i in range(5)], limit=4, batch=2)
          == [cache.ask(f"Question {i}?", limit=4) for i in range(5)], "in any batch")
    talk = "Hello\nWho are you?\nAnd now?\n"
    for flags, how in [([], {}), (["--temp", 0], {"temp": 0})]:
        told = lines(run("chat", model.path, "-c", path, "-n", 10, "--seed", 5, "--json", *flags, stdin=talk))
        chat = cache.chat()
        answers = [chat.say(line, limit=10, seed=5, **{"temp": 0.7, **how}) for line in talk.splitlines()]
        check(answers == [a["answer"] for a in told], f"a chat about a cache is that of run chat {flags}")
    told = lines(run("chat", model.path, "--system", "Be brief.", "-n", 10, "--temp", 0, "--json", stdin=talk))
    with model.chat(system="Be brief.") as chat:
        check([chat.say(line, limit=10) for line in talk.splitlines()] == [a["answer"] for a in told], "a chat about nothing")


SAMPLERS = [  # flags of run ask, and what they are in Python
    ("--temp 0.9 --top-k 5 --min-p 0.1 --seed 3", dict(temp=0.9, top_k=5, min_p=0.1, seed=3)),
    ("--temp 0.9 --seed 3 --top-p 0.5 --temp-last", dict(temp=0.9, seed=3, top_p=0.5, temp_last=True)),
    ("--repeat-penalty 1.7 --repeat-last-n 20", dict(repeat_penalty=1.7, repeat_last_n=20)),
    ("--frequency-penalty 1.5 --presence-penalty 1", dict(frequency_penalty=1.5, presence_penalty=1)),
    ("--logit-bias 70=30,71=-50", dict(logit_bias={70: 30, 71: -50})),
]


def test_samplers(folder, model):
    """How tokens are drawn, and answers of a form, are those of run ask."""
    path = os.path.join(folder, "answers.kvc")
    cache = model.compress(TEXT)
    cache.save(path)
    ask = ["ask", model.path, path, "What?", "--json", "-n", 40]
    plain = cache.ask("What?", limit=40)
    for flags, how in SAMPLERS:
        told = lines(run(*ask, *flags.split()))[0]["answer"]
        check(cache.ask("What?", limit=40, **how) == told != plain, f"{flags}: {told}")
    schema = {"type": "object", "properties": {"n": {"type": "integer"}, "s": {"enum": ["a", "b"]}},
              "required": ["n", "s"], "additionalProperties": False}
    for flags, how in [(["--json-object"], dict(json_object=True)),
                       (["--json-schema", json.dumps(schema)], dict(json_schema=schema)),
                       (["--json-schema", json.dumps(schema)], dict(json_schema=json.dumps(schema)))]:
        told = lines(run(*ask, *flags))[0]["answer"]
        check(cache.ask("What?", limit=40, **how) == told, f"{flags[0]}: {told}")
    questions = ["What?", "Why?", "Who?"]
    answers = cache.ask(questions, limit=60, json_schema=schema, batch=2)
    done = [a for a in answers if not a.cut]
    check(all(json.loads(a)["s"] in "ab" for a in done) and done, f"answers of a form: {answers}")
    chat = model.chat()
    check(chat.say("What?", limit=60, json_schema=schema)[0] == "{" and chat.say("What?", limit=5)[0] != "{", "in a chat")
    for say, how in [("top_k", dict(top_k=-1)), ("min_p", dict(min_p=2)), ("logit_bias", dict(logit_bias={10**6: 1})),
                     ("logit_bias", dict(logit_bias={1: 200})), ("json_schema: #: there is no type", dict(json_schema={"type": "x"})),
                     ("repeat_penalty", dict(repeat_penalty=float("nan")))]:
        try:
            cache.ask("What?", **how)
            check(False, f"{how} is refused")
        except kvzip.Error as e:
            check(say in str(e), f"{how}: {e}")
    try:
        cache.ask("What?", top_kk=1)
        check(False, "an unknown setting is refused")
    except TypeError as e:
        check("top_kk" in str(e), f"an unknown setting: {e}")


def test_numbers(folder, model):
    """Ids, logits and scores."""
    out, source = os.path.join(folder, "out"), os.path.join(folder, "text")
    ids = model.tokenize(TEXT, bos=True)
    check(ids.tolist() == [int(i) for i in run("tokenize", model.path, "-f", source, "--bos").split()], "ids")
    check(model.detokenize(model.tokenize(TEXT)) == TEXT, "the text of ids")
    ids = ids[:70]  # a block of 64 and a short one
    with open(os.path.join(folder, "ids"), "w") as f:
        f.write(" ".join(map(str, ids)))
    cache = model.compress(TEXT, ratio=0.4)
    cache.save(os.path.join(folder, "cache"))
    for flags, after, kv in [([], None, None), (["--kv", "q8"], None, "q8"), (["-c", folder + "/cache"], cache, None)]:
        run("logits", model.path, "--ids", folder + "/ids", "-o", out, *flags)
        for _ in range(2):
            logits = model.logits(ids, after=after, kv=kv)
            check(logits.tobytes() == Tensors(out).raw["logits"], f"logits are those of run logits {flags}")
    check(np.array_equal(cache.logits(ids[:5]), model.logits(ids[:5], after=cache)), "logits after a cache")
    for policy in ("kvzip", "expected"):
        run("score", model.path, "-f", source, "-o", out, "--policy", policy)
        full = model.compress(TEXT, policy=policy, ratio=1, scores=True)
        saved = Tensors(out)
        check(full.scores.tobytes() == saved.raw["scores"] and list(full.scores.shape) == saved.shape["scores"],
              f"scores are those of run score, {policy}")
        check(full.ids.tobytes() == saved.raw["ids"] and full.kept.all(), "ids, and all pairs are there")
    check(not full.scores.flags.writeable and cache.scores is None, "scores are read-only, and kept when asked for")
    again = model.compress(ids=full.ids, n_prefix=full.n_prefix, ratio=0.4)
    check(np.array_equal(again.kept, cache.kept), "ids in place of a text")


def test_own_policy(folder, model):
    """A mask of one's own: forks keep theirs; evicting by the library's mask is what compress does."""
    full, small = model.compress(TEXT, ratio=1), model.compress(TEXT, ratio=0.3)
    fork = full.fork()
    fork.evict(small.kept)
    check(np.array_equal(fork.kept, small.kept) and full.kept.all(), "the pairs of a mask stay")
    check(fork.bytes == small.bytes and fork.ask("Who?", limit=9) == small.ask("Who?", limit=9), "answers after it")
    even = np.zeros_like(small.kept)
    even[:, :, ::2] = True
    fork.evict(even)
    check(np.array_equal(fork.kept, small.kept & even), "once more: what is gone stays so")
    refused("needs a shape", fork.evict, even[:1])
    path = os.path.join(folder, "own.kvc")
    fork.save(path)
    info = json.loads(run("info", path, "--json"))
    check(info["policy"] == fork.policy == "mask" and fork.level is None, f"a file says that the mask is one's own: {info}")
    check(np.isclose(fork.ratio, fork.n_kept / fork.n_pairs) and full.policy == "kvzip", "and what it leaves")


# ---- errors ----

def test_errors(folder, model):
    cache = model.compress(TEXT[:200])
    refused("/nowhere: cannot open", kvzip.Model, "/nowhere")
    refused("not a safetensors file", kvzip.Model, os.path.join(ROOT, "README.md"))
    refused("/nowhere: cannot open", model.load, "/nowhere")
    refused("model.kvc: ", cache.save, "/nowhere/model.kvc")
    other = kvzip.Model(os.path.join(FIXTURES, "llama.kvz"), threads=1)
    cache.save(os.path.join(folder, "smol.kvc"))
    refused("made with another model", other.load, os.path.join(folder, "smol.kvc"))
    refused("belongs to another model", other.logits, [1], after=cache)
    for ratio in (0, -1, 1.5, float("nan")):
        refused("needs a number above 0", model.compress, TEXT, ratio=ratio)
    for words, how in [("there are kvzip kvzip+", dict(policy="x")), ("there are pair layer", dict(level="x")),
                       ("no parameter", dict(set="x=1")), ("kv x: needs", dict(kv="x")), ("fit x", dict(fit="x")),
                       ("whole numbers from 0", dict(budget=-1)), ("beyond 32 bits", dict(chunk=2**40)),
                       ("looks back", dict(policy="kvzip", stream=True)), ("not with", dict(fit="both", demote=True)),
                       ("cannot open", dict(profile="/nowhere"))]:
        refused(words, model.compress, TEXT, **how)
    refused("zero byte", model.compress, "a\0b")
    refused("zero byte", cache.ask, "a\0b")
    refused("nothing to read", model.compress, "")
    refused("n_prefix 9: there are 3 ids", model.compress, ids=[1, 2, 3], n_prefix=9)
    for ids in ([-1], [model.vocab_size], [2**40]):
        refused(str(ids[0]), model.logits, ids)
        refused(str(ids[0]), model.detokenize, ids)
    refused("nothing in it", cache.ask, "  ")
    refused("temp", cache.ask, "Who?", temp=-1)
    refused("limit", cache.ask, "Who?", limit=-1)
    refused("batch", cache.ask, "Who?", batch=1000)
    refused("has its own", lambda: kvzip.Chat(model, model._worker.call(
        kvzip._lib.kvzip_chat_open, model._open, cache._open, b"x", 0)))
    isa = "scalar" if model.isa != "scalar" else "avx2"
    refused("already uses", kvzip.Model, model.path, isa=isa)


def test_closing(model_path):
    """Handles may be closed in any order; what is closed says so; arrays outlive their cache."""
    model = kvzip.Model(model_path, threads=2)
    cache = model.compress(TEXT[:300], scores=True)
    chat, fork, scores, ids = cache.chat(), cache.fork(), cache.scores, cache.ids
    sums = scores.sum(), ids.sum()
    model.close()
    refused("the model is closed", model.tokenize, "x")
    answer = cache.ask("Who?", limit=3)
    cache.close()
    cache.close()
    refused("the cache is closed", cache.ask, "Who?")
    refused("the cache is closed", lambda: cache.kept)
    del cache, model
    gc.collect()
    check(fork.ask("Who?", limit=3) == answer and len(chat.say("Who?", limit=3)) >= 0, "forks and chats go on")
    fork.close()
    chat.close()
    refused("the chat is closed", chat.say, "x")
    gc.collect()
    check((scores.sum(), ids.sum()) == sums, "arrays are still there")


# ---- Ctrl-C, callbacks, threads ----

def test_interrupt(model):
    """SIGINT ends compress, ask and logits soon, and the model goes on as if they had never been."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background has ignored
    before = model.compress(TEXT, scores=True)
    ids = model.tokenize(CHRONICLE)
    for work in (lambda: model.compress(CHRONICLE * 9), lambda: before.ask("Who?", limit=10**6, ignore_stop=True),
                 lambda: model.logits(np.tile(ids, 20))):
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        start = time.monotonic()
        try:
            work()
            check(False, "Ctrl-C raises KeyboardInterrupt")
        except KeyboardInterrupt:
            check(time.monotonic() - start < 20, "Ctrl-C stops the work")
    after = model.compress(TEXT, scores=True)
    check(np.array_equal(after.scores, before.scores) and after.ask("Who?", limit=9) == before.ask("Who?", limit=9),
          "the model is as it was")


def test_callbacks(model):
    seen = []
    cache = model.compress(TEXT, progress=lambda *step: seen.append(step))
    check(seen[0][0] == "read" and all(done > 0 and total > 0 for _, done, total in seen), f"progress: {seen}")
    refused("interrupted", model.compress, TEXT, progress=lambda *_: True)
    refused("is at work", cache.ask, "Who?", on_text=lambda i, piece: cache.ask("Why?"))
    try:
        cache.ask("Who?", limit=9, on_text=lambda i, piece: 1 // 0)
        check(False, "a callback's exception is raised")
    except ZeroDivisionError:
        check(cache.ask("Who?", limit=9) == model.compress(TEXT).ask("Who?", limit=9), "and nothing else happens")
    chat = cache.chat()
    first = chat.say("Hello", limit=5)
    refused("interrupted", chat.say, "More", on_text=lambda piece: True)
    again = cache.chat()
    check(again.say("Hello", limit=5) == first and again.say("So?", limit=5) == chat.say("So?", limit=5),
          "a message that is stopped was never said")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model.compress(ids=[5] * (model.seq_len + 1), policy="knorm")
    check("trained for" in str(said[0].message), "a warning beyond the trained length")


def test_threads(model):
    cache = model.compress(TEXT)
    alone = cache.ask("Who?", limit=8), model.logits([1, 2, 3])
    wrong = []

    def work():
        for i in range(6):
            shared = cache.fork()
            if shared.ask("Who?", limit=8) != alone[0] or not np.array_equal(model.logits([1, 2, 3]), alone[1]):
                wrong.append(i)
            if not np.array_equal(model.compress(TEXT[:200], policy="knorm").kept, short):
                wrong.append(i)
            shared.close()

    short = model.compress(TEXT[:200], policy="knorm").kept
    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    check(not wrong, f"threads take turns: {wrong}")
    child = os.fork()
    if child == 0:
        try:
            cache.ask("Who?")
        except kvzip.Error as e:
            os._exit(0 if "another process" in str(e) else 1)
        os._exit(2)
    check(os.waitpid(child, 0)[1] == 0, "a model does not survive a fork, and says so")


def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize()


def test_memory(model):
    """200 compressions, questions and errors leave nothing behind."""
    def round_trip(i):
        with model.compress("A few words.", raw=True, scores=True) as cache:
            if i % 4 == 0:
                cache.fork().ask("Who?", limit=2)
            if i % 4 == 1:
                cache.chat().say("Who?", limit=2)
            if i % 4 == 2:
                refused("interrupted", model.compress, "A few words.", raw=True, progress=lambda *_: True)

    if not os.path.exists("/proc/self/statm"):
        return
    for i in range(100):  # until every thread's heap has its size
        round_trip(i)
    gc.collect()
    before = resident()
    for i in range(200):
        round_trip(i)
    gc.collect()
    grown = resident() - before
    check(grown < 2 << 20, f"memory is flat over 200 compressions: {grown} bytes more")


# ---- the library and the documents ----

def test_library():
    """It exports what kvzip.h declares and nothing else, all of which kvzip.py knows; its structs have one size."""
    with open(os.path.join(ROOT, "lib", "kvzip.h")) as f:
        header = f.read()
    declared = set(re.findall(r"KVZIP_API [^;(]*?\b(kvzip_\w+)\(", header))
    check(declared == {"kvzip_" + name for name in kvzip._FUNCTIONS}, "kvzip.py knows every function of kvzip.h")
    for name, (_, args) in kvzip._FUNCTIONS.items():
        text = re.search(r"KVZIP_API [^;(]*?\bkvzip_%s\(([^;]*)\);" % name, header).group(1)
        check(len(args) == (0 if text == "void" else text.count(",") + 1), f"arguments of kvzip_{name}")
    structs = {"kvzip_model_facts": kvzip._ModelFacts, "kvzip_computing": kvzip._Computing, "kvzip_facts": kvzip._Facts,
               "kvzip_reading": kvzip._Reading, "kvzip_asking": kvzip._Asking, "kvzip_answer": kvzip._Answer}
    with tempfile.TemporaryDirectory() as folder:
        source, program = os.path.join(folder, "sizes.c"), os.path.join(folder, "sizes")
        with open(source, "w") as f:
            f.write('#include <stdio.h>\n#include "lib/kvzip.h"\nint main(void) {\n')
            for name, struct in structs.items():
                for field, _ in struct._fields_:
                    f.write(f'printf("%zu ", offsetof({name}, {field}));\n')
                f.write(f'printf("%zu ", sizeof({name}));\n')
            f.write("}\n")
        subprocess.run(["cc", "-std=c11", "-I", ROOT, source, "-o", program], check=True)
        sizes = [int(n) for n in subprocess.run([program], stdout=subprocess.PIPE, check=True).stdout.split()]
    ours = []
    for struct in structs.values():
        ours += [getattr(struct, field).offset for field, _ in struct._fields_] + [ctypes.sizeof(struct)]
    check(ours == sizes, "structs of kvzip.py lie as those of kvzip.h do")
    path = kvzip._lib._name
    done = subprocess.run(["nm", "-D", path], stdout=subprocess.PIPE)
    if done.returncode == 0 and path.endswith(".so"):
        names = [line.split()[-2:] for line in done.stdout.decode().splitlines()]
        exported = {name for kind, name in names if kind in "TDBR"}
        check(exported - {"_init", "_fini"} == declared, f"the library exports {exported ^ declared}")
        wanted = {name.split("@")[0] for kind, name in names if kind == "U"}
        check(not wanted & {"exit", "_exit", "signal", "sigaction", "printf", "puts", "putchar", "perror", "stdout",
                            "stderr"}, "nothing in it prints, exits or touches signals")


def test_stack(path):
    """The stack that the system gives is not what attention needs."""
    code = f"import kvzip; print(len(kvzip.Model({path!r}).compress({TEXT!r}).ask('Who?', limit=4)) >= 0)"
    env = dict(os.environ, PYTHONPATH=os.path.join(ROOT, "python"))
    done = subprocess.run(["sh", "-c", 'ulimit -s 200 && exec "$@"', "sh", sys.executable, "-c", code], env=env,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    check(done.stdout == b"True\n", f"a small stack: {done.returncode} {done.stderr.decode()}")


def test_documents(folder):
    """The first example of docs/python.md, word for word, with a small model."""
    with open(os.path.join(ROOT, "docs", "python.md")) as f:
        code = re.search(r"```python\n(.*?)```", f.read(), re.S).group(1)
    check(len(code.splitlines()) <= 10, "the first example has 10 lines at most")
    os.symlink(os.path.join(FIXTURES, "smol.kvz"), os.path.join(folder, "smollm2.kvz"))
    with open(os.path.join(folder, "town.txt"), "w") as f:
        f.write(TEXT)
    env = dict(os.environ, PYTHONPATH=os.path.join(ROOT, "python"))
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    check(done.returncode == 0 and done.stdout.strip(), "docs/python.md: " + done.stderr.decode())
    check(os.path.exists(os.path.join(folder, "town.kvc")), "and its cache is saved")


def main():
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(FIXTURES, "smol.kvz")
        with kvzip.Model(path) as model:
            model.path = path
            test_caches(folder, model, "smol")
            test_answers(folder, model)
            test_samplers(folder, model)
            test_numbers(folder, model)
            test_own_policy(folder, model)
            test_errors(folder, model)
            test_callbacks(model)
            test_interrupt(model)
            test_threads(model)
            test_memory(model)
        gemma = kvzip.Model(os.path.join(FIXTURES, "gemma3.kvz"))
        gemma.path = os.path.join(FIXTURES, "gemma3.kvz")
        test_caches(folder, gemma, "gemma3")
        test_closing(path)
        test_library()
        test_stack(path)
        test_documents(folder)
    return end("test_python")


if __name__ == "__main__":
    sys.exit(main())
