#!/usr/bin/env python3
"""make_tasks.py: task files for `run eval`, made from nothing or from data sets that a user has.

  make_tasks.py facts -n 20 --tokens 1000 --seed 1 > facts.jsonl
  make_tasks.py squad dev-v1.1.json -n 100 > squad.jsonl
  run eval smollm2.kvz facts.jsonl --policy kvzip,snapkv --ratio 1,0.3

  make_tasks.py suite paper --tokens 4000 -n 5 -q 4          # tasks/paper-4000/, a file a task
  run eval smollm2.kvz --suite paper --length 4000

One line is one context with questions that are asked of it one by one. The text between facts is
prose, or with --filler code, dialogue, a list or German, and was written for this project (filler*.txt);
once it is used up, it is put together from parts, so that a context may be of any length. The same
arguments give the same file. Lengths are in tokens of a vocabulary of about 50,000 and are met within
a few percent where the text is filler; RULER's instructions come on top. Sources of the tasks: RULER
(arXiv 2404.06654), SCBench (2412.10319), LongBench (2308.14508), L-Eval (2307.11088), InfiniteBench
(2402.13718), SQuAD (1606.05250), HotpotQA (1809.09600), GSM8K (2110.14168), RepoQA (2406.06025).
"""
import argparse
import functools
import json
import os
import random
import sys

import made
import paper
from convert import CONVERTED
from texts import FILLERS

MADE = {**made.MADE, **paper.KINDS}
FILLED, SUITES = made.FILLED, paper.SUITES
DOCUMENTS = {"qa_1": "squad", "qa_2": "hotpot"}  # the flag with the file that their documents may come from


def natural(text):
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) < 1 << 31:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def arguments(argv=None):
    kinds = [f"  {name:18} {make.__doc__}" for name, (make, _) in MADE.items()]
    files = [f"  {name:18} {make.__doc__}" for name, make in CONVERTED.items()]
    p = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__,
                                epilog="kinds:\n" + "\n".join(kinds) + "\n\nkinds that need a FILE:\n" + "\n".join(files))
    p.add_argument("kind", choices=[*MADE, *CONVERTED, "suite"], metavar="KIND")
    p.add_argument("file", nargs="?", metavar="FILE", help="the data set to convert, or the suite's name: " + ", ".join(SUITES))
    p.add_argument("-n", type=natural, default=10, metavar="N", help="contexts (default 10), of a suite for each task")
    p.add_argument("-q", type=natural, default=12, metavar="N", help="questions per context at most (default 12)")
    p.add_argument("--tokens", type=natural, default=1000, help="length of a context, about (default 1000)")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--filler", choices=FILLERS, default="prose", help=f"text around the sentences of {', '.join(FILLED)}")
    p.add_argument("--name", help="name of the task in the results (default: the kind)")
    p.add_argument("--squad", metavar="FILE", help="qa_1, suite: documents and questions of SQuAD")
    p.add_argument("--hotpot", metavar="FILE", help="qa_2, suite: documents and questions of HotpotQA")
    p.add_argument("-o", dest="out", metavar="DIR", help="suite: the folder to make (default tasks/NAME-TOKENS)")
    a = p.parse_args(argv)
    if (a.kind in CONVERTED or a.kind == "suite") != (a.file is not None):
        p.error(f"{a.kind} {'takes no FILE' if a.kind in MADE else 'needs a name' if a.kind == 'suite' else 'needs a FILE'}")
    if a.kind == "suite" and a.file not in SUITES:
        p.error(f"there is no suite {a.file}, only {', '.join(SUITES)}")
    if a.filler != "prose" and a.kind not in FILLED:
        p.error(f"{a.kind} takes no --filler")
    for kind, flag in DOCUMENTS.items():
        if getattr(a, flag) and a.kind not in (kind, "suite"):
            p.error(f"{a.kind} takes no --{flag}")
    if a.out and a.kind != "suite":
        p.error(f"{a.kind} takes no -o")
    return a


def maker(a):
    """make(rng, chars, n) of the kind, and the characters of a token of it."""
    make, chars_per_token = MADE[a.kind]
    flag = DOCUMENTS.get(a.kind)
    if flag and getattr(a, flag):
        make = functools.partial(make, **{flag: getattr(a, flag)})
    if a.filler != "prose":
        return functools.partial(make, kind=a.filler), FILLERS[a.filler]
    return make, chars_per_token


def lines(a):
    if a.kind in CONVERTED:
        yield from CONVERTED[a.kind](a.file, a.q, int(a.tokens * 4.4))
        return
    make, chars_per_token = maker(a)
    for i in range(a.n):
        rng = random.Random(f"{a.kind} {a.seed} {i}")  # context i is the same however many there are
        made_now = make(rng, int(a.tokens * chars_per_token), a.q)
        yield from made_now if isinstance(made_now, list) else [made_now]


def suite(a):
    """A folder with a file for each task of a set; one that is there stays as it is."""
    folder = a.out or os.path.join("tasks", f"{a.file}-{a.tokens}")
    os.makedirs(folder)
    for name, kind in SUITES[a.file].items():
        one = argparse.Namespace(**{**vars(a), "kind": kind, "name": None, "n": (a.n + 10) // 11 if kind == "niah" else a.n})
        with open(os.path.join(folder, name + ".jsonl"), "w", encoding="utf-8") as out:
            for line in lines(one):
                line["task"] = name if line["task"] == kind else line["task"]
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
    print(f"{folder}: {len(SUITES[a.file])} tasks", file=sys.stderr)


def write(a, out):
    for i, line in enumerate(lines(a)):
        if a.kind in CONVERTED and i == a.n:
            break
        if a.name:
            line["task"] = a.name
        out.write(json.dumps(line, ensure_ascii=False) + "\n")
    out.flush()


def main():
    a = arguments()
    sys.stdout.reconfigure(encoding="utf-8")
    try:
        if a.kind == "suite":
            suite(a)
        else:
            write(a, sys.stdout)
    except KeyboardInterrupt:
        sys.exit("make_tasks: interrupted")
    except OSError as e:
        if e.filename is None:  # the reader of a pipe has gone, or the disk is full: no second try at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(f"make_tasks: {e.filename or 'standard output'}: {e.strerror}")
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as e:
        files = [f for f in (a.file if a.kind in CONVERTED else None, a.squad, a.hotpot) if f]
        if not files:
            raise
        what = a.kind if a.kind in CONVERTED else " or ".join(f for f in DOCUMENTS.values() if getattr(a, f))
        sys.exit(f"make_tasks: {ascii(', '.join(files))[1:-1]}: not a {what} data set "
                 f"({type(e).__name__}: {ascii(str(e))[1:-1]})")


if __name__ == "__main__":
    main()
