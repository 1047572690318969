#!/usr/bin/env python3
"""test_memory.py: --mem refuses what will not fit, its estimate is near what commands take, and what it advises fits."""
import os
import random
import re
import subprocess
import sys
import tempfile

from checks import check, end

HERE = os.path.dirname(os.path.abspath(__file__))
RUN = os.path.join(HERE, "..", "run")
TOKENS, FACTOR = 8000, 1.35  # an estimate is at most so many times too large or too small
UNIT = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9}
PEAK = ("import resource,subprocess,sys;r=subprocess.run(sys.argv[1:],stdout=subprocess.DEVNULL);"
        "print(r.returncode,resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")


def run(*words):
    p = subprocess.run([RUN, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
    return p.returncode, p.stderr.decode()


def refusal(words, limit):
    """What --mem says: the bytes that are needed, and what would fit."""
    code, err = run(*words, "--mem", limit, "-q")
    m = re.match(r"run: this needs ([\d.]+) (\w+) \(.*--mem has .*; what fits: (.*)\n$", err)
    check(code == 1 and m, "%s --mem %s: %d %s" % (words[0], limit, code, err))
    return (float(m[1]) * UNIT[m[2]], m[3]) if m else (1, "")


def peak(words):
    out = subprocess.run([sys.executable, "-c", PEAK, RUN, *words, "-q"], stdout=subprocess.PIPE).stdout.split()
    check(out[0] == b"0", "%s: status %s" % (words[0], out[0]))
    return int(out[1]) * (1 if sys.platform == "darwin" else 1024)


def estimates(model, ids, cache):
    out = ["-o", cache]
    for words in (["compress", *ids, *out, "--ratio", "1"], ["compress", *ids, *out, "--ratio", "1", "--kv", "q4"],
                  ["compress", *ids, *out, "--policy", "knorm"], ["compress", *ids, *out, "--budget", "2000"],
                  ["generate", *ids, "-n", "4"], ["logits", *ids, "--kv", "f32", "-o", cache + ".logits"]):
        words = [words[0], model, *words[1:]]
        want, got = refusal(words, "1")[0], peak(words)
        check(got / FACTOR < want < got * FACTOR, "%s: %.1f MB estimated, %.1f taken" % (words, want / 1e6, got / 1e6))
        code, err = run(*words, "--mem", "4G")
        check(code == 0 and "--mem" not in err, "%s: refused what fits: %s" % (words[0], err))


def advice(model, ids, cache):
    words = ["compress", model, *ids, "-o", cache, "--policy", "knorm"]
    need = refusal(words, "1")[0]  # by instruction set: some hold pages of f32 that others have in bf16
    for limit in (str(int(need * 0.8)), str(int(need * 0.9))):
        says = refusal(words, limit)[1]
        check(re.match(r"--stream --ratio 0\.\d", says), "advice for %s: %s" % (limit, says))
        flags = says.replace(" with ", " ").split(" or ")[0].split()
        code, err = run(*words, *flags, "--mem", limit, "-q")
        check(code == 0, "the advice for %s does not fit: %s" % (limit, err))


def orders(model, text, cache):
    """/doc and /load of a chat: refused where they do not fit, beside a talk that goes on; the estimate is near what they take."""
    words = [RUN, "chat", model, "-n", "1", "-j", "1", "--temp", "0"]

    def talk(*lines, flags=()):
        p = subprocess.run([sys.executable, "-c", PEAK, *words, *flags], input="".join(line + "\n" for line in lines).encode(),
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        return int(p.stdout.split()[1]) * (1 if sys.platform == "darwin" else 1024), p.stderr.decode()

    for order, path in ("/doc", text), ("/load", cache):
        _, err = talk("Hello", "%s %s" % (order, path), "Who?", flags=["--mem", "11M"])
        m = re.search(r"run: %s: \S+: this needs ([\d.]+) (\w+) \(.*--mem has 11.0 MB; what fits: " % order, err)
        check(m and err.count("written in") == 2, "%s does not fit: %s" % (order, err))
        got, err = talk("Hello", "%s %s" % (order, path), "Who?", flags=["--mem", "1G"])
        check("this needs" not in err and err.count("written in") == 2, "%s fits: %s" % (order, err))
        want = float(m[1]) * UNIT[m[2]] if m else 1
        check(got / FACTOR < want < got * FACTOR, "%s: %.1f MB estimated, %.1f taken" % (order, want / 1e6, got / 1e6))


def forms(model):
    """Pieces and masks of answers that are JSON: the smallest limit that lets them run is higher by 36 bytes a token and 64 masks."""
    def least(*flags):
        low, high = 1 << 20, 1 << 24  # refused, accepted
        while high - low > 256:
            middle = (low + high) // 2
            code = run("generate", model, "-p", "a", "-n", "0", "-j", "1", "-q", *flags, "--mem", str(middle))[0]
            low, high = (middle, high) if code else (low, middle)
        return high

    form = least("--json-object") - least()
    check(abs(form - (640 * 36 + 64 * 640 // 8)) < 600, "JSON counts %d bytes" % form)


def every_command(model, folder):
    path = {}
    for name, text in (("text", "The mill was built by Ann Grey. " * 9),
                       ("tasks", '{"context": "The mill.", "metric": "contained", "questions": '
                                 '[{"question": "Who?", "answers": ["Ann"]}]}\n')):
        path[name] = os.path.join(folder, name)
        with open(path[name], "w") as f:
            f.write(text)
    out = os.path.join(folder, "out")
    cache = os.path.join(folder, "cache")
    check(run("compress", model, "-f", path["text"], "-o", cache)[0] == 0, "compress")
    for words in (["generate", "-p", "a"], ["chat"], ["compress", "-f", path["text"], "-o", out], ["ask", cache, "Who?"],
                  ["score", "-f", path["text"], "-o", out], ["map", "-f", path["text"], "-o", out],
                  ["logits", "-p", "a", "-o", out], ["eval", path["tasks"]], ["eval", "--ppl", path["text"]],
                  ["calibrate", "-f", path["text"], "-o", out], ["bench"]):
        refusal([words[0], model, *words[1:]], "1M")
    check(not os.path.exists(out), "a refused command wrote")
    for bad in ("", "0", "4g", "1.5G", "4GB", "G", "-1", "1e9", " 4G", "1000001G", "9" * 400):
        code, err = run("generate", model, "-p", "a", "--mem", bad)
        check(code == 2 and "--mem" in err, "--mem '%s': %d %s" % (bad, code, err))


def main():
    rng = random.Random(1)
    with tempfile.TemporaryDirectory() as folder:
        path, cache = os.path.join(folder, "ids"), os.path.join(folder, "big")
        with open(path, "w") as f:
            f.write(" ".join(str(rng.randrange(10, 300)) for _ in range(TOKENS)))
        gemma = os.path.join(HERE, "fixtures", "gemma3.kvz")
        estimates(gemma, ["--ids", path], cache)
        advice(gemma, ["--ids", path], cache)
        smol, text = os.path.join(HERE, "fixtures", "smol.kvz"), os.path.join(folder, "text.txt")
        with open(text, "w") as f:
            f.write("The mill was built by Ann Grey, who keeps forty goats. " * 250)
        check(run("compress", smol, "-f", text, "-o", cache, "--ratio", "1")[0] == 0, "compress")
        orders(smol, text, cache)
        forms(smol)
        every_command(os.path.join(HERE, "fixtures", "smol-q8.kvz"), folder)
    sys.exit(end("memory"))


if __name__ == "__main__":
    main()
