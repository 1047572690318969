#!/usr/bin/env python3
"""The main job on a real document: compress it once, ask it eight questions of each of five caches: all pairs, 30% of
them chosen by letting the model repeat the document, 30% chosen by the model's profile, 20% chosen so in 8-bit pages,
10% chosen so in 8-bit pages and fitted.

    python3 demo/demo.py models/smollm2.kvz models/smollm2.kvp     (make demo makes both and runs this)
    python3 demo/demo.py models/qwen1.5b.kvz                       (make demo-qwen)

Without a profile there are three: all pairs, and 30% and 10% chosen by letting the model repeat the document, the last
ones fitted; and no question comes with the beginning of its answer, which a model of this size does not need.

Exits 1 when the full cache answers fewer than seven questions, or another one two fewer than the full one (the
smallest: three fewer).
"""
import json
import os
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
RUN = os.path.join(HERE, "..", "run")
TEXT, QUESTIONS = os.path.join(HERE, "chronicle.txt"), os.path.join(HERE, "questions.tsv")


def run(*args):
    """The JSON rows that `run` prints."""
    done = subprocess.run([RUN, *args, "--json", "-q"], stdout=subprocess.PIPE)
    if done.returncode != 0:
        sys.exit(done.returncode)
    return [json.loads(line) for line in done.stdout.decode().splitlines()]


def decode_s(row):
    return row["n_answer"] / row["tokens_per_s"]


def ask_all(model, folder, flags, starts):
    """Compresses with some flags and asks everything -> figures of the compression, answers, decode tokens/s of the
    questions one at a time and together."""
    cache = os.path.join(folder, "demo.kvc")
    figures = run("compress", model, "-f", TEXT, "-o", cache, *flags)[0]
    questions = os.path.join(folder, "questions.tsv")
    with open(QUESTIONS) as f, open(questions, "w") as to:
        to.writelines(line if starts else line.split("\t")[0] + "\n" for line in f)
    ask = ("ask", model, cache, "-f", questions, "--stop", ".", "-n", "48")
    rows, together = run(*ask, "--batch", "1"), run(*ask)
    if [r["answer"] for r in rows] != [r["answer"] for r in together]:
        sys.exit("asked together, the questions got other answers than one at a time")
    tokens = sum(r["n_answer"] for r in rows)
    return figures, rows, tokens / sum(map(decode_s, rows)), tokens / max(map(decode_s, together))


def print_table(columns, caches, right):
    figures = [c[0] for c in caches]
    lines = [("answers right", right, "{}"), ("cache, MB", [f["bytes"] / 1e6 for f in figures], "{:.1f}"),
             ("seconds to read", [f["prefill_s"] for f in figures], "{:.2f}"),
             ("seconds to score and fit", [f["score_s"] + f["fit_s"] for f in figures], "{:.2f}"),
             ("decode, tokens/s", [c[2] for c in caches], "{:.0f}"),
             ("all questions together", [c[3] for c in caches], "{:.0f}")]
    print(f"\n{'':25}" + "".join(f"{name:>16}" for name, _ in columns))
    for name, values, form in lines:
        print(f"{name:25}" + "".join(f"{form.format(v):>16}" for v in values))


def main():
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    model, profile = sys.argv[1], (sys.argv[2:] or [None])[0]
    wanted = open(os.path.join(HERE, "answers.txt")).read().splitlines()
    columns = [("full", ["--ratio", "1"]), ("0.3 repeat", ["--ratio", "0.3", "--policy", "kvzip"]),
               ("0.1, fitted, q8", ["--ratio", "0.1", "--policy", "kvzip", "--kv", "q8", "--fit", "both"])]
    if profile:
        columns[2:] = [("0.3 profile", ["--ratio", "0.3", "--profile", profile]),
                       ("0.2 profile, q8", ["--ratio", "0.2", "--profile", profile, "--kv", "q8"]),
                       ("0.1, fitted, q8", ["--ratio", "0.1", "--profile", profile, "--kv", "q8", "--fit", "both"])]
    with tempfile.TemporaryDirectory() as folder:
        caches = [ask_all(model, folder, flags, starts=bool(profile)) for _, flags in columns]

    right = [0] * len(columns)
    print(f"\n{caches[0][0]['n_ctx']} tokens of demo/chronicle.txt, read once, asked {len(wanted)} questions\n")
    for i, want in enumerate(wanted):
        print(caches[0][1][i]["question"])
        for c, (name, _) in enumerate(columns):
            answer = caches[c][1][i]["answer"]
            right[c] += want in answer
            print(f"  [{'x' if want in answer else ' '}] {name:16} {answer}")
    print_table(columns, caches, right)
    print(f"""
What next?
  your own text:   ./run compress {model} -f demo/chronicle.txt -o town.kvc && ./run ask {model} town.kvc "Who is the mayor?"
  your own model:  .venv/bin/python export.py MODEL_DIR_OR_GGUF -o models/mine.kvz
  its profile:     ./run calibrate models/mine.kvz -o models/mine.kvz --into
  a conversation:  ./run chat {model} -c town.kvc""")
    sys.exit(0 if right[0] >= 7 and min(right) >= right[0] - 1 else 1)


if __name__ == "__main__":
    main()
