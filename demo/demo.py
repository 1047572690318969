#!/usr/bin/env python3
"""The main job on a real document: compress it once, ask it eight questions, from all of its cache and from 30%.

    python3 demo/demo.py models/smollm2.kvz          (make demo fetches the model and runs this)

Exits 1 when the full cache answers fewer than seven questions, or the compressed one two fewer than the full one.
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


def ask_all(model, folder, ratio):
    """Compresses at a ratio and asks everything -> figures of the compression, answers, decode tokens/s of the
    questions one at a time and together."""
    cache = os.path.join(folder, f"{ratio}.kvc")
    figures = run("compress", model, "-f", TEXT, "-o", cache, "--ratio", str(ratio))[0]
    ask = ("ask", model, cache, "-f", QUESTIONS, "--stop", ".", "-n", "48")
    rows, together = run(*ask, "--batch", "1"), run(*ask)
    if [r["answer"] for r in rows] != [r["answer"] for r in together]:
        sys.exit("asked together, the questions got other answers than one at a time")
    tokens = sum(r["n_answer"] for r in rows)
    return figures, rows, tokens / sum(map(decode_s, rows)), tokens / max(map(decode_s, together))


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    model = sys.argv[1]
    wanted = open(os.path.join(HERE, "answers.txt")).read().splitlines()
    with tempfile.TemporaryDirectory() as folder:
        full, full_rows, full_speed, full_batch = ask_all(model, folder, 1)
        small, small_rows, small_speed, small_batch = ask_all(model, folder, 0.3)

    right = [0, 0]
    print(f"\n{full['n_ctx']} tokens of demo/chronicle.txt, read once, asked {len(wanted)} questions\n")
    for want, a, b in zip(wanted, full_rows, small_rows):
        marks = ["x" if want in r["answer"] else " " for r in (a, b)]
        right = [n + (m == "x") for n, m in zip(right, marks)]
        print(f"{a['question']}\n  [{marks[0]}] full  {a['answer']}\n  [{marks[1]}] 0.3   {b['answer']}")
    print(f"\n{'':24}{'full cache':>12}{'0.3 kept':>12}")
    print(f"{'answers right':24}{right[0]:>12}{right[1]:>12}")
    print(f"{'cache':24}{full['bytes'] / 1e6:>9.1f} MB{small['bytes'] / 1e6:>9.1f} MB")
    print(f"{'decode, tokens/s':24}{full_speed:>12.0f}{small_speed:>12.0f}")
    print(f"{'all questions together':24}{full_batch:>12.0f}{small_batch:>12.0f}")
    print(f"{'time to read':24}{full['prefill_s']:>10.2f} s{small['prefill_s']:>10.2f} s")
    print(f"{'time to score':24}{'-':>12}{small['score_s']:>10.2f} s")
    print(f"""
What next?
  your own text:   ./run compress {model} -f demo/chronicle.txt -o town.kvc && ./run ask {model} town.kvc "Who is the mayor?"
  your own model:  .venv/bin/python export.py MODEL_DIR_OR_GGUF -o models/mine.kvz
  a conversation:  ./run chat {model} -c town.kvc""")
    sys.exit(0 if right[0] >= 7 and right[1] >= right[0] - 1 else 1)


if __name__ == "__main__":
    main()
