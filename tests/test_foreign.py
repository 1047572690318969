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

from checks import Tensors, check, end
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
    evil = {k: EVIL + k for k in ["task", "policy", "level", "kv", "fit"]}
    results = results_file(d + "/evil.results", **evil)
    r = works("eval", "--merge", results, "--chart", d + "/evil.svg", "-q")
    check(not steers(r.out) and SEEN + "task" in r.text(), "a table of hostile names: %r" % r.text())
    works("eval", "--merge", results, "--page", d + "/evil.html", "-q")
    page = open(d + "/evil.html", "rb").read()
    check(not steers(page) and SEEN.replace("\\nx", "\nxtask") in "".join(xml.fromstring(page).itertext()), "a page of hostile names")
    check(r.text().count("\n") == works("eval", "--merge", results_file(d + "/plain", task="b")).text().count("\n"),
          "a name makes no line of a table")
    plain = results_file(d + "/plain")
    check(works("eval", "--merge", plain, plain).out == works("eval", "--merge", plain).out, "the same cells twice count once")
    fails(1, "context 1, policy kvzip, ratio 1 is there already", "eval", "--merge", plain, results_file(d + "/x", value=[0, 0]))
    for cell in [dict(value=[float("1e39"), 0]), dict(value=[None, 0]), dict(same=[-5, 0]), dict(ratio=7), dict(ratio=0),
                 dict(kept=-1)]:
        fails(1, "from 0 to 1", "eval", "--merge", results_file(d + "/x", **cell))
    fails(1, "finite number", "eval", "--merge", results_file(d + "/x", kl=[float("1e39"), 0]))
    fails(1, '"ratio" is given twice', "eval", "--merge", write(d + "/x", open(plain).read().replace('"ratio"', '"ratio": 1, "ratio"')))
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
        check(r.text().rstrip("\n") == shown(text).rstrip("\n") and not steers(r.out.replace(b"\r\n", b"\n")), "an answer: %r" % r.out)
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


# ---- coming in ----

QUESTION = "Who built the mill?\n"
NO_TEXT = [  # bytes of a file, words of the line that refuses it; the last field: tokenize takes it, with a warning
    (b"Who built\0 the mill?\n", "a zero byte at byte 9 (line 1), not text", True),
    (QUESTION.encode("utf-16-le"), "UTF-16 (iconv -f utf-16le -t utf-8)?", True),
    (QUESTION.encode("utf-16-be"), "UTF-16 (iconv -f utf-16be -t utf-8)?", True),
    (("\ufeff" + QUESTION).encode("utf-16-le"), "text in UTF-16, not text: iconv -f utf-16 -t utf-8", False),
    (("\ufeff" + QUESTION).encode("utf-16-be"), "text in UTF-16, not text: iconv -f utf-16 -t utf-8", False),
    (("\ufeff" + QUESTION).encode("utf-32-le"), "text in UTF-32, not text: iconv", False),
    ("Who?\nOder der Müller, über Jahre?\n".encode("latin-1"), "0xfc: Latin-1, it seems (iconv -f latin1 -t utf-8)", True),
    ("One.\nWho built \u201ethe mill\u201c?\n".encode("cp1252"), "0x84: Windows-1252, it seems", True),
    ("日本語の文章です".encode("shift-jis") * 3, "another encoding", True),
    ("Schön, wie über Jahre. ".encode() + b"\xff\n", "damaged UTF-8", True),
    ("Wer war der Müller".encode()[:14], "the last character is cut off", True),
    (b"\x1f\x8b\x08\0\0\0\0\0\0\3abc", "a gzip file, not text: unpack it first (gunzip)", False),
    (b"%PDF-1.7\n%\xe2\xe3\n", "a PDF file, not text: make text of it (pdftotext)", False),
    (b"PK\3\4" + bytes(22) + b"\x0e\0\0\0word/document.xml", "a Word document, not text: save it as plain text", False),
    (b"PK\3\4" + bytes(22) + b"\x05\0\0\0a.txt", "a zip archive, not text", False),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a git-lfs pointer", False),
    (b"\x89PNG\r\n\x1a\n", "a picture, not text", False),
    (b"GGUF\3\0\0\0", "a GGUF file, not text", False)]


def test_no_text(m, d):
    """Whatever command reads a text, what is none is refused with the same words, and named."""
    cache, task = d + "/in.kvc", '{"context": "a", "questions": [{"question": "b", "answers": ["c"]}]}'
    works("compress", m.path, "-p", "The mill was built by Ann Grey.", "-o", cache)
    for data, words, bytes_ in NO_TEXT:
        bad, out = write(d + "/bad", data), d + "/x"
        before = [["generate", m.path, "-f", bad], ["compress", m.path, "-f", bad, "-o", out],
                  ["ask", m.path, cache, "-f", bad], ["eval", m.path, bad], ["calibrate", m.path, "-f", bad, "-o", out]]
        for args in before if data is not NO_TEXT[0][0] else before + [
                ["score", m.path, "-f", bad, "-o", out], ["map", m.path, "-f", bad, "-o", out],
                ["logits", m.path, "-f", bad, "-o", out], ["logits", m.path, "--ids", bad, "-o", out],
                ["eval", m.path, "--ppl", bad], ["tokenize", m.path, "--decode", "-f", bad]]:
            fails(1, words, *args)
        fails(1, words, "generate", m.path, input=data)
        r = run("tokenize", m.path, "-f", bad)
        check(r.code == (0 if bytes_ else 1) and words in r.err and r.err.count("\n") == 1, "tokenize: %r" % r.err)
        check(not bytes_ or works("tokenize", m.path, "--decode", input=r.out).out == data, "tokenize keeps any bytes")
    for args in [["ask", m.path, cache], ["chat", m.path]]:
        fails(1, "stdin: line 2: a zero byte at byte 3", *args, "-q", input=b"\nWho\0?\n")
        fails(1, "stdin: line 1: not UTF-8 at byte 3", *args, "-q", input=b"Who\xe9?\n")
        fails(1, "stdin: line 1: a carriage return", *args, "-q", input=b"Who?\rAnd?\r")
    for flag in ["--system", "--task"]:
        fails(1, flag + ": not UTF-8 at byte 1", "compress", m.path, "-p", "a", "-o", d + "/x", flag, b"a\xe9b")
    fails(1, "--answer-prefix: not UTF-8", "ask", m.path, cache, "q", "--answer-prefix", b"\xe9")
    fails(1, "-p: not UTF-8 at byte 1", "generate", m.path, "-p", b"a\xe9b")
    fails(1, "cannot open: Is a directory", "ask", m.path, cache, "-f", d)
    fails(1, "no question in it", "ask", m.path, cache, "-f", write(d + "/empty", b""))
    fails(1, "no tasks in it", "eval", m.path, d + "/empty")
    fails(1, "empty: line 1: an empty context", "eval", m.path, write(d + "/empty", task.replace('"context": "a"', '"context": ""')))
    for args in [["compress", m.path, "-f", "/dev/zero", "-o", d + "/x"], ["eval", m.path, "/dev/zero"]]:
        fails(1, "/dev/zero: more than 256 MB and no end", *args)
    with open("/dev/zero", "rb") as endless:
        fails(1, "stdin: line 1: more than 256 MB and no end", "ask", m.path, cache, "-q", input=None, stdin=endless)
    check(not os.path.exists(d + "/x"), "a refused text leaves no file")


def test_text_after_all(m, d):
    """Texts that begin as other files do."""
    for text in ["24karat gold is heavy.", "GGUF is a format.", "BZh is no word.", "PAR1 of the report", "<html>A page.</html>",
                 "PK\n", "{\"settings\": 1}", "BM", "", "a", "é"]:
        works("compress", m.path, "-f", write(d + "/after", text), "-o", d + "/after.kvc", "-q")


def test_mark(m, d):
    """The mark that some editors put in front of UTF-8 is no part of any text."""
    mark, cache, text = "\ufeff", d + "/mark.kvc", "The mill was built by Ann Grey."
    works("compress", m.path, "-f", write(d + "/text", mark + text), "-o", cache)
    ids = Tensors(cache).raw["ids"]
    for args in [["-p", text], ["-p", mark + text]]:
        works("compress", m.path, *args, "-o", cache)
        check(Tensors(cache).raw["ids"] == ids, "a mark in front of a context")
    flags = ["--json", "-n", 4, "--ignore-eos"]
    answer = lambda r: [(x["question"], x["answer"]) for x in r.rows()]
    plain = answer(works("ask", m.path, cache, "Who?", *flags))
    for args, data in [([mark + "Who?"], b""), (["-f", write(d + "/q", mark + "Who?\n")], b""), ([], (mark + "Who?").encode())]:
        check(answer(works("ask", m.path, cache, *args, *flags, input=data)) == plain, "a mark in front of a question")
    for flag in ["--system", "--task"]:
        works("compress", m.path, "-p", text, "-o", cache, flag, "Be brief.")
        ids = Tensors(cache).raw["ids"]
        works("compress", m.path, "-p", text, "-o", cache, flag, mark + "Be brief.")
        check(Tensors(cache).raw["ids"] == ids, "a mark in front of " + flag)
    task = json.dumps(dict(context=text, questions=[dict(question="Who?", answers=["Ann"])]))
    args = ["--ratio", 1, "-n", 4, "--json"]
    plain = works("eval", m.path, write(d + "/t", task + "\n" + task), *args).rows()
    for other in [mark + task + "\n" + task, task + "\r\n" + task + "\r\n", task + "\r" + task]:
        check(works("eval", m.path, write(d + "/t", other), *args).rows() == plain, "tasks with a mark or other line ends")
    fails(1, "line 2: ", "eval", m.path, write(d + "/t", task + "\r\n{"))
    plain = open(results_file(d + "/r", task="other"), "rb").read()
    rows = works("eval", "--merge", d + "/r", "--json").rows()
    check(works("eval", "--merge", write(d + "/r", mark.encode() + plain), "--json").rows() == rows, "results with a mark")
    fails(1, "text in UTF-16, not a file of results", "eval", "--merge", write(d + "/r", plain.decode().encode("utf-16")))
    with open(d + "/long", "wb") as f:
        f.truncate(1 << 42)  # more than memory: its beginning tells
    fails(1, "zeros, as a download leaves", "tokenize", m.path, "-f", d + "/long")
    check(works("logits", m.path, "--ids", write(d + "/i", mark + "1 2 3"), "-o", d + "/l").code == 0, "a mark before ids")
    r = works("tokenize", m.path, "-p", mark + "a")
    check("a byte order mark" in r.err and works("tokenize", m.path, "--decode", input=r.out).out == (mark + "a").encode(),
          "tokenize keeps the mark, and says so")


# ---- files taken for others ----

NO_MODEL = [
    (b"GGUF\3\0\0\0" + bytes(64), "a GGUF file, not a safetensors file: convert it with export.py"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a git-lfs pointer, not a safetensors file: git lfs pull brings the file itself"),
    (b"<!DOCTYPE html><html>Not found</html>", "a web page"), (b"<html><head>", "a web page"),
    (b"PK\3\4" + bytes(22) + b"\x10\0\0\0archive/data.pkl", "a PyTorch file"), (b"PK\3\4" + bytes(60), "a zip archive"),
    (b"\x80\x02\x8a\nl\xfc\x9cF\xf9", "a pickle of PyTorch"), (b"\x08\x07\x12\x07pytorch", "an ONNX model"),
    (b"\x1f\x8b\x08\0\0\0\0\0\0\3" + bytes(40), "a gzip file"), (bytes(5000), "zeros"), (b"lmgg" + bytes(60), "a GGML file"),
    (struct.pack("<7i", 288, 768, 6, 6, 6, -32000, 256) + bytes(100), "a checkpoint of llama2.c"),
    (b"24ka" + bytes(300), "a checkpoint of llama2.c"), (b'{"metadata": {"total_size": 5}, "weight_map": {}}', "folder with export.py"),
    (b'{"architectures": ["LlamaForCausalLM"], "dim": 5}', "folder with export.py"), (b'{"settings": "x"}\n', "a file of results"),
    (b'{"context": "x"}\n', "a file of tasks"), (b"", "an empty file"), (b"abc", "only 3 bytes"), (b"MZqFpD='\n\0\0", "a program")]


def safetensors(path, names, **meta):
    header = {n: dict(dtype="U8", shape=[1], data_offsets=[i, i + 1]) for i, n in enumerate(names)}
    text = json.dumps(dict(header, __metadata__=meta)).encode()
    return write(path, struct.pack("<Q", len(text)) + text + bytes(len(names)))


def test_kinds(m, d):
    cache, profile, scores = d + "/k.kvc", d + "/k.kvp", d + "/k.scores"
    works("compress", m.path, "-p", "The mill was built by Ann Grey.", "-o", cache)
    works("score", m.path, "-p", "The mill was built by Ann Grey.", "-o", scores)
    works("calibrate", m.path, "-f", write(d + "/sample", "Rows of beans, 14 of them. " * 40), "-o", profile)
    for data, words in NO_MODEL:
        bad = write(d + "/bad", data)
        info = [["info", bad]] if b"settings" not in data else []
        for args in info + [["generate", bad, "-p", "a"], ["ask", m.path, bad, "q"], ["tokenize", bad, "-p", "a"],
                     ["compress", m.path, "-p", "a", "-o", d + "/x", "--profile", bad]]:
            fails(1, "bad: ", *args)
            fails(1, words, *args)
    as_cache, as_profile = ["ask", m.path], ["compress", m.path, "-p", "a", "-o", d + "/x", "--profile"]
    for words, args in [("a saved cache, not a converted model", ["generate", cache, "-p", "a"]),
                        ("a profile, not a converted model", ["generate", profile, "-p", "a"]),
                        ("scores of a context, not a converted model", ["generate", scores, "-p", "a"]),
                        ("a converted model, not a saved cache", as_cache + [m.path, "q"]),
                        ("a profile, not a saved cache", as_cache + [profile, "q"]),
                        ("a converted model, not a profile", as_profile + [m.path]),
                        ("a saved cache, not a profile", as_profile + [cache]),
                        ("a safetensors file, not a file of results", ["eval", "--merge", cache]),
                        ("a safetensors file, not text", ["eval", m.path, cache])]:
        fails(1, words, *args)
    hf = safetensors(d + "/hf", ["model.embed_tokens.weight"], format="pt")
    fails(1, "weights that are not converted yet, not a converted model: convert their folder", "generate", hf, "-p", "a")
    gpt2 = safetensors(d + "/gpt2", ["h.0.attn.weight"], format="pt")
    fails(1, "weights that are not converted yet", "generate", gpt2, "-p", "a")
    whole = open(m.path, "rb").read()
    for cut in [len(whole) - 1, len(whole) // 2]:
        fails(1, "cut.kvz: the file is cut: tensor ", "generate", write(d + "/cut.kvz", whole[:cut]), "-p", "a")
    fails(1, "cut.kvz: the file is cut: its header", "generate", write(d + "/cut.kvz", whole[:100]), "-p", "a")
    lora = safetensors(d + "/lora", ["base_model.model.a", "base_model.model.q_proj.lora_A.weight"], format="pt")
    fails(1, "a LoRA adapter, not a converted model: merge it", "generate", lora, "-p", "a")
    newer = safetensors(d + "/newer", ["a"], format="kvzip.c model 9")
    fails(1, 'not a converted model: its format is "kvzip.c model 9"', "generate", newer, "-p", "a")
    for name, words in [("config.json", "a folder of a model: convert it with export.py"),
                        ("adapter_config.json", "a folder of a LoRA adapter")]:
        os.mkdir(d + "/folder")
        write(d + "/folder/" + name, "{}")
        fails(1, words, "generate", d + "/folder", "-p", "a")
        fails(1, words, "info", d + "/folder")
        os.remove(d + "/folder/" + name)
        os.rmdir(d + "/folder")
    os.symlink("blobs/gone", d + "/dangling")
    fails(1, "a link to blobs/gone: No such file", "generate", d + "/dangling", "-p", "a")
    fails(1, "a link to blobs/gone: No such file", "generate", m.path, "-f", d + "/dangling")
    os.mkfifo(d + "/pipe")
    fails(1, "not a regular file", "generate", d + "/pipe", "-p", "a")


# ---- info, and what a model gets ----

def test_info(m, d):
    """info says how the model's text is made, and what profiles and results are."""
    header = Tensors(m.path).meta
    lines = works("info", m.path).text().split("\n")
    row = works("info", m.path, "--json").rows()[0]
    for key in header:
        if key.startswith(("chat.", "kvzip.", "tokenizer.")):
            check(row[key] == header[key], "info --json: %s" % key)
            seen = header[key].replace("\n", "\\n").replace("\t", "\\t")
            check(("%-30s %s" % (key, seen)) in lines, "info: %s" % key)
    check([t["id"] for t in row["stop"]] == [int(i) for i in header["tokenizer.stop_ids"].split(",")], "info: stop ids")
    bos = int(header["tokenizer.bos_id"])
    check([t["id"] for t in row["bos"]] == ([bos] if bos >= 0 else []), "info: bos")
    text = works("tokenize", m.path, "--decode", "-p", str(row["stop"][0]["id"])).text()
    check(row["stop"][0]["text"] == text, "info: a stop token's text")
    check(row["rope_theta"] == header["rope_theta"] and "tokens, " in row["rope"], "info: rope %r" % row["rope"])
    profile, results = d + "/i.kvp", results_file(d + "/i.results", task="other")
    works("calibrate", m.path, "-f", write(d + "/sample", "Rows of beans, 14 of them. " * 40), "-o", profile)
    check("profile_of         %s\n" % m.name in works("info", profile).text(), "info on a profile")
    check(works("info", profile, "--json").rows()[0]["ratios"] == Tensors(profile).shape["profile.ratio"][0], "as JSON")
    check("policies           full, kvzip\n" in works("info", results).text(), "info on results")
    check(works("info", results, "--json").rows()[0]["tasks"] == "facts, other", "info on results as JSON")


def prompts(err):
    """[name, ids, pieces, special ones] of each prompt that --verbose-prompt shows."""
    found = []
    for line in err.split("\n"):
        head, token = re.match(r"\[(\w+): (\d+) tokens\]$", line), re.match(r" *(\d+) '(.*)'( special)?$", line)
        if head:
            found.append((head[1], [], [], []))
        elif token:
            found[-1][1].append(int(token[1]))
            found[-1][2].append(token[2])
            if token[3]:
                found[-1][3].append(int(token[1]))
    return found


def test_verbose(m, d):
    """--verbose-prompt shows the ids that a model gets, and their texts."""
    cache, ids = d + "/v.kvc", lambda text, *flags: [int(i) for i in works("tokenize", m.path, "-p", text, *flags).text().split()]
    name, got, pieces, _ = prompts(works("generate", m.path, "-p", "Who\n\x1b?", "-n", 1, "--verbose-prompt", "-q").err)[0]
    check(name == "prompt" and got == ids("Who\n\x1b?", "--bos") and "".join(pieces).endswith("Who\\n\\x1b?"), "generate: %s" % pieces)
    r = works("compress", m.path, "-p", "It was Ann.", "-o", cache, "--verbose-prompt")
    prefix, context = prompts(r.err)[:2]
    check(prefix[1] + context[1] == list(Tensors(cache)["ids"]) and context[1] == ids("It was Ann."), "compress")
    check(prefix[0] == "prefix" and prefix[3] and not context[3], "compress: special tokens are marked")
    for args in [["ask", m.path, cache], ["chat", m.path]]:
        r = works(*args, "-n", 1, "--verbose-prompt", "--json", "-q", input=b"Who was it?\n")
        name, got, pieces, special = prompts(r.err)[0]
        check(name == "question" and len(got) == r.rows()[0]["n_prompt"] and special, "%s" % args)
        check("Who was it?" in "".join(pieces), "%s: %s" % (args, pieces))
    task = json.dumps(dict(context="It was Ann.", questions=[dict(question="Who was it?", answers=["Ann"])]))
    r = works("eval", m.path, write(d + "/v.jsonl", task), "--ratio", 1, "-n", 1, "--verbose-prompt", "-q")
    check([p[0] for p in prompts(r.err)][:2] == ["prefix", "question"], "eval")
    check(prompts(r.err)[0][1] == prefix[1] and "Who was it?" in "".join(prompts(r.err)[1][2]), "eval's ids")
    check(not works("generate", m.path, "-p", "a", "-n", 1, "-q").err, "nothing without the flag")


# ---- descriptors ----

def test_descriptors(m, d):
    """stdin, stdout and stderr that are closed at the start are missed where they are used, and nothing takes their place."""
    cache, good = d + "/fd.kvc", d + "/good.kvc"
    works("compress", m.path, "-p", "The mill was built by Ann Grey.", "-o", good)
    whole = open(good, "rb").read()
    texts = ["-p", "The mill was built by Ann Grey."]
    for args in [["info", m.path], ["tokenize", m.path, *texts], ["generate", m.path, *texts, "-n", 2], ["-h"], ["ask", "-h"],
                 ["ask", m.path, good, "Who?", "-n", 2], ["compress", m.path, *texts, "-o", cache, "--json"],
                 ["score", m.path, *texts, "-o", d + "/x", "--json"], ["map", m.path, *texts, "-o", d + "/y", "--json"],
                 ["eval", m.path, "--ppl", write(d + "/t", "Rows of beans. " * 20), "-n", 16]]:
        r = run(*args, stdout=None, preexec_fn=lambda: os.close(1))
        check(r.code == 1 and r.err.endswith("run: stdout: it is closed\n"), "%s >&-: %d %r" % (args, r.code, r.err))
        code = run(*args, preexec_fn=lambda: os.close(2)).code
        check(code == 0, "%s 2>&-: %d" % (args, code))
    for closed in [[0], [1], [2], [0, 1], [1, 2], [0, 1, 2]]:
        r = run("compress", m.path, *texts, "-o", cache, preexec_fn=lambda: [os.close(fd) for fd in closed])
        check(r.code == 0 and open(cache, "rb").read() == whole, "compress with %s closed: %d" % (closed, r.code))
        os.remove(cache)
    for args in [["generate", m.path], ["tokenize", m.path], ["ask", m.path, good], ["chat", m.path]]:
        r = run(*args, preexec_fn=lambda: os.close(0))
        check(r.code == 1 and "run: stdin: " in r.err, "%s <&-: %d %r" % (args, r.code, r.err))


def main():
    smol = Model("smol")
    with tempfile.TemporaryDirectory() as d:
        test_no_text(smol, d)
        test_text_after_all(smol, d)
        test_mark(smol, d)
        test_kinds(smol, d)
        test_results(d)
        test_names(smol, d)
        test_answers(smol, d)
        for m in [smol, Model("llama"), Model("gemma3")]:
            test_info(m, d)
        test_verbose(smol, d)
        test_descriptors(smol, d)
    return end("test_foreign")


if __name__ == "__main__":
    sys.exit(main())
