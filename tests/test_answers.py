#!/usr/bin/env python3
"""test_answers.py: how answers are made, through the command line: samplers and forms that answers must have.

Runs ./run (or $RUN) and build/test_constrain (or $BUILD's) on a committed fixture. Needs nothing but Python's standard
library. The last line says how many checks passed and failed.
"""
import json
import os
import subprocess
import sys

from checks import check, end

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
RUN = os.environ.get("RUN", os.path.join(ROOT, "run"))
SMOL = os.path.join(HERE, "fixtures", "smol.kvz")


def run(*args):
    p = subprocess.run([RUN, *map(str, args)], capture_output=True, stdin=subprocess.DEVNULL, timeout=60)
    return p.returncode, p.stdout, p.stderr.decode("utf-8", "replace")


def generate(*args):
    code, out, err = run("generate", SMOL, "-p", "The code of", "-n", 20, "--ignore-eos", "--json", "-j", 1, *args)
    check(code == 0, "%s: exit %s, %s" % (args, code, err))
    return json.loads(out)["ids"] if code == 0 else None


def refused(code, words, *args):
    got, out, err = run(*args)
    check(got == code and words in err and err.count("\n") == 1 and not out, "%s: exit %s, %s" % (args, got, err))


# ---- samplers ----

def test_samplers():
    hot = ["--temp", 2, "--seed", 3, "--top-p", 1]
    greedy, free = generate("--temp", 0), generate(*hot)
    check(greedy != free == generate(*hot), "the seed decides")
    for flags in [["--top-k", 0], ["--min-p", 0], ["--repeat-penalty", 1], ["--frequency-penalty", 0], ["--presence-penalty", "0"],
                  ["--top-k", 10 ** 6], ["--repeat-last-n", 0, "--repeat-penalty", 2]]:
        check(generate(*hot, *flags) == free, "%s changes nothing" % flags)
    for flags in [["--top-k", 1], ["--min-p", 1], ["--top-k", 9, "--min-p", 1]]:
        check(generate(*hot, *flags) == greedy, "%s leaves the likeliest token" % flags)
    for flags in [["--top-k", 3], ["--min-p", 0.2], ["--repeat-penalty", 1.5], ["--frequency-penalty", 2], ["--presence-penalty", -2],
                  ["--logit-bias", "%d=100" % (greedy[0] + 1)]]:
        check(generate(*hot, *flags) != free, "%s changes the answer" % flags)
    nucleus = ["--temp", 2, "--seed", 3, "--top-p", 0.3]
    check(generate(*nucleus) != generate(*nucleus, "--temp-last"), "--temp-last changes what --top-p leaves")
    check(set(generate("--temp", 0, "--logit-bias", "7=100,9=-100")) == {7}, "a bias is added")
    check(len(set(generate("--temp", 0, "--presence-penalty", 2, "--frequency-penalty", 2, "--repeat-penalty", 100))) > len(set(greedy)),
          "penalties count at temperature 0, too")


def test_sampler_flags():
    p = ["generate", SMOL, "-p", "a", "-n", 1]
    for flag, values in [("--top-k", ["-1", "x", "1.5"]), ("--min-p", ["1.1", "-0.1"]), ("--repeat-penalty", ["0", "nan", "101"]),
                         ("--frequency-penalty", ["2.1", "-3"]), ("--presence-penalty", ["x"]), ("--repeat-last-n", ["-1"]),
                         ("--logit-bias", ["", "5", "5=", "=1", "5=101", "5=1,", "5=x", "-5=1", "5=1,6", "5=1;6=1", "99999999999=1"])]:
        for v in values:
            refused(2, "%s %s: needs" % (flag, v), *p, flag, v)
    refused(1, "token 99999 is not in the vocabulary", *p, "--logit-bias", "5=1,99999=1")
    for flag, value in [("--top-k", 3), ("--min-p", 0.1)]:
        code, _, err = run(*p, "--temp", 0, flag, value)
        check(code == 0 and "%s has no effect" % flag in err, "%s at temperature 0: %s" % (flag, err))
    code, _, err = run(*p, "--repeat-last-n", 5)
    check(code == 0 and "--repeat-last-n has no effect" in err, "--repeat-last-n alone: %s" % err)
    for command in ("generate", "ask", "chat"):
        text = run(command, "-h")[1].decode()
        check(all(f in text for f in ("--top-k", "--min-p", "--repeat-penalty", "--logit-bias")), "%s -h" % command)


def main():
    test_samplers()
    test_sampler_flags()
    return end("test_answers")


if __name__ == "__main__":
    sys.exit(main())
