#!/usr/bin/env python3
"""test_tasks.py: the task files of eval/make_tasks.py, and the texts beside it. Needs no model.

Of every kind: the same arguments give the same lines, contexts are about as long as asked for, answers
stand in the context or follow from it, and lines have what `run eval` wants. The last line says how
many checks passed and failed.
"""
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "eval"))
import make_tasks as mt  # noqa: E402  from ../eval
from checks import check, end  # noqa: E402

METRICS = ["contained", "exact", "f1", "choice"]
COMPUTED = ["arithmetic", "counting", "refusal"]  # answers that need not stand in the context


def made(kind, tokens, seed=1, n=1, q=12, filler="prose"):
    """The tasks of a kind, as the command line makes them."""
    a = mt.arguments([kind, "-n", str(n), "-q", str(q), "--tokens", str(tokens), "--seed", str(seed),
                      "--filler", filler])
    return list(mt.lines(a))


def variants():
    return [(kind, "prose") for kind in mt.MADE] + [(k, f) for k in mt.FILLED for f in mt.FILLERS if f != "prose"]


# ---- lines ----

def check_line(t, what):
    ok = isinstance(t["context"], str) and t["context"] and t["metric"] in METRICS and t["questions"]
    check(ok, f"{what}: context, metric, questions")
    check(t.get("max_tokens", 1) >= 1 and t.get("stop", ".") != "", f"{what}: max_tokens or stop")
    check("\0" not in t["context"] and "{{" not in t["context"], f"{what}: an unfilled slot, or a zero byte")
    for q in t["questions"]:
        ok = q["question"] and q["answers"] and all(isinstance(a, str) and a.strip() for a in q["answers"])
        check(ok, f"{what}: a question: {q}")


def test_lines():
    for kind, filler in variants():
        for tokens in (300, 500, 2000, 8000):
            for t in made(kind, tokens, seed=tokens, filler=filler):
                check_line(t, f"{kind}, {filler}, {tokens}")
        for q in (1, 30):  # more questions than a short context has room for, too
            for t in made(kind, 300, q=q, filler=filler):
                check_line(t, f"{kind}, {filler}, {q} questions")
                check(len(t["questions"]) <= q, f"{kind}: {len(t['questions'])} questions, not {q}")


def test_same_again():
    for kind, filler in variants():
        text = [json.dumps(t) for t in made(kind, 700, seed=3, n=3, filler=filler)]
        check(text == [json.dumps(t) for t in made(kind, 700, seed=3, n=3, filler=filler)], f"{kind}: not the same twice")
        first = made(kind, 700, seed=3, filler=filler)
        check(text[:len(first)] == [json.dumps(t) for t in first], f"{kind}: the first context depends on how many follow")
        other = [json.dumps(t) for t in made(kind, 700, seed=4, filler=filler)]
        check(other != text[:len(first)], f"{kind}, {filler}: another seed, the same context")


# Recorded results belong to these bytes: of 3 contexts of 1,000 tokens, seed 1.
RECORDED = {
    "facts": "335f3843d35a9a447ba8efded76cda22",
    "passages": "b7aa6d11743d3838ca74513fa50f6bbd",
    "needles": "832be798eccf2cbcae4fe8df318d0d00",
}


def test_recorded():
    for kind, want in RECORDED.items():
        out = subprocess.run([sys.executable, os.path.join(ROOT, "eval", "make_tasks.py"), kind, "-n", "3"],
                             capture_output=True, check=True).stdout
        check(hashlib.md5(out).hexdigest() == want, f"{kind}: other tasks than those that results are recorded for")


# ---- lengths ----

def test_lengths():
    """In characters, against what make_tasks takes for a token; heads and a last unit come on top."""
    for kind, filler in variants():
        if kind in ("variables", "needle_multikey_3", "common_words", "frequent_words"):
            continue  # lines of different density: see test_dense; words of any
        per_token = mt.MADE[kind][1] if filler == "prose" else mt.FILLERS[filler]
        for tokens in (1000, 2000, 8000):
            for t in made(kind, tokens, seed=2, filler=filler):
                off = len(t["context"]) - tokens * per_token
                check(abs(off) < 0.06 * tokens * per_token + 400, f"{kind}, {filler}, {tokens}: off by {off:.0f} characters")


def rough_tokens(text):
    """About as many tokens as a vocabulary of 50,000 makes of it: digits and capitals one by one."""
    return sum(1 if p.isdigit() or not p.isalnum() else max(1, round(len(p) / (2.2 if p.isupper() else 5)))
               for p in re.findall(r"\d|[^\W\d_]+|[^\w\s]", text))


def test_dense():
    for kind, tokens, tolerance in (("variables", 500, 0.3), ("variables", 1000, 0.2), ("variables", 8000, 0.2),
                                    ("common_words", 8000, 0.25)):
        n = rough_tokens(made(kind, tokens)[0]["context"])
        check(abs(n / tokens - 1) < tolerance, f"{kind}, {tokens}: about {n} tokens")
    check(len(made("key_value", 500)[0]["questions"]) < 8, "key_value: more pairs than 500 tokens have room for")


def test_repetition():
    """No paragraph of a long context comes more than twice, and few come twice: slots make them differ."""
    for filler in mt.FILLERS:
        context = made("facts", 8000, q=1, filler=filler)[0]["context"]
        paragraphs = context.split("\n\n")
        again = len(paragraphs) - len(set(paragraphs))
        check(again <= 0.1 * len(paragraphs), f"{filler}: {again} of {len(paragraphs)} paragraphs repeated")
        most = max(paragraphs.count(p) for p in set(paragraphs))
        check(most <= 2, f"{filler}: a paragraph comes {most} times")


# ---- answers ----

def test_contained():
    for kind, filler in variants():
        if kind in COMPUTED:
            continue
        for t in made(kind, 1200, seed=5, n=2, filler=filler):
            for q in t["questions"]:
                there = [a in t["context"] for a in q["answers"]]
                check(all(there) if t.get("all") else any(there), f"{kind}, {filler}: {q['answers']} not in the context")


def test_facts():
    """Each sentence stands in the context once, whatever is around it, in the shape of its lines."""
    shape = {"code": r"^ *# {}$", "dialogue": r"^[A-Z]+: {}$", "list": r"^- {}$", "prose": "{}", "german": "{}"}
    for filler in mt.FILLERS:
        t = made("facts", 1500, filler=filler)[0]
        for q in t["questions"]:
            sentence = re.escape(f"{q['answer_prefix']} {q['answers'][0]}.")
            found = re.findall(shape[filler].format(sentence), t["context"], re.M)
            check(len(found) == 1, f"facts, {filler}: {sentence} {len(found)} times")


def test_speakers():
    """Nobody speaks twice in a row, unless two facts met."""
    t = made("facts", 4000, filler="dialogue")[0]
    for paragraph in t["context"].split("\n\n"):
        who = [line.split(":")[0] for line in paragraph.split("\n")]
        check(all(w in mt.SPEAKERS for w in who[:-1]), f"dialogue: speakers {who}")
        twice = sum(a == b for a, b in zip(who, who[1:]))
        check(twice == 0, f"dialogue: {twice} times the same speaker again: {who}")


def test_counting():
    for t in made("counting", 1000, n=4):
        for q in t["questions"]:
            what = q["answer_prefix"][len("The number of people who "):-len(" is")]
            needle = what.replace("live in", "lives in") if what.startswith("live") else what.replace(" at home", "").replace("keep", "keeps")
            check(str(t["context"].count(needle + ".")) == q["answers"][0], f"counting: {what}: {q['answers']}")


def test_comparing():
    right_first = total = 0
    for t in made("comparing", 1000, n=8):
        for q in t["questions"]:
            a, b = re.match(r"Who .*?, (.*) or (.*)\?", q["question"]).groups()
            values = [int(re.search(re.escape(name) + r" (?:is|was born in) (\d+)", t["context"])[1]) for name in (a, b)]
            best = (min if "earlier" in q["question"] else max)(values)
            check(q["answers"] == [(a, b)[values.index(best)]], f"comparing: {q}, {values}")
            right_first += q["answers"][0] == a
            total += 1
    check(0.35 < right_first / total < 0.65, f"comparing: the first is right in {right_first} of {total}")


def test_summary():
    t = made("summary", 2000)[0]
    thing = t["questions"][0]["answers"][0]
    check(t["context"].count(thing) > 20, "summary: the subject is not what the text speaks of")
    for q in t["questions"][1:]:
        others = [s for s in mt.THINGS if mt.THINGS[s] in q["question"] and s != thing]
        check(len(others) == 3 and mt.THINGS[thing] in q["question"], f"summary: options of {q['question']}")
        check(not any(s in t["context"] for s in others), f"summary: one of {others} is in the text, too")


def test_slots():
    rng = random.Random(1)
    check(mt.draw(rng, "{{x=ab|cd}} {{x}}") in ("ab ab", "cd cd"), "draw: a named slot")
    check(all(3 <= int(mt.draw(rng, "{{3..5}}")) <= 5 for _ in range(20)), "draw: a range")
    check(mt.draw(rng, "{a} {{thing}}", thing="inn") == "{a} inn", "draw: a given slot")


def test_command_line():
    def status(*args):
        return subprocess.run([sys.executable, os.path.join(ROOT, "eval", "make_tasks.py"), *args], capture_output=True).returncode
    check(status("passages", "--filler", "code") == 2, "--filler for a kind that takes none")
    check(status("facts", "--filler", "verse") == 2, "a filler that does not exist")
    check(status("facts", "file.json") == 2, "a FILE for a made kind")
    for number in ("0", "-1", "x", "1.5", "9" * 30):
        check(status("facts", "-n", number) == 2 and status("refusal", "-q", number) == 2, f"-n {number}")


def test_errors():
    """One line and exit 1, whatever the data set is and wherever the lines go."""
    def said(*args, to=subprocess.DEVNULL):
        p = subprocess.run([sys.executable, os.path.join(ROOT, "eval", "make_tasks.py"), *args], stdout=to,
                           stderr=subprocess.PIPE, text=True)
        check(p.returncode == 1 and p.stderr.count("\n") == 1, f"{args}: {p.returncode} {p.stderr}")
        return p.stderr

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "data.json")
        check("No such file" in said("squad", path), "a data set that is missing")
        for text in ("", "{}", '{"a": 1}', "[[1]]", "x", "[" * 100000, '[{"context": 1}]', "\0"):
            with open(path, "w") as f:
                f.write(text)
            for kind in mt.CONVERTED:
                if text not in ("", "{}"):  # without a row, there is nothing that could be wrong
                    check("data set" in said(kind, path), f"{kind} from {text[:20]}")
    read, write = os.pipe()
    os.close(read)
    check("Broken pipe" in said("facts", to=write), "a pipe without a reader")
    os.close(write)


# ---- calibration text ----

def words(text):
    return re.findall(r"\w+", text.lower())


def test_calibration():
    """It shares no name and no six words in a row with what is evaluated on."""
    text = mt.read_filler("calibration.txt")
    parts = text.split("\n=====\n")
    check(10 <= len(parts) <= 16, f"calibration: {len(parts)} parts")
    check(all(2000 < len(p) < 6000 for p in parts), f"calibration: parts of {[len(p) for p in parts]} characters")
    names = {w for group in (mt.FIRST, mt.LAST, mt.CITIES, mt.PLACES) for name in group for w in name.split()}
    shared = names & set(re.findall(r"\w+", text))
    check(not shared, f"calibration: shares {shared}")
    runs = lambda t: set(zip(*(words(t)[i:] for i in range(6))))  # noqa: E731
    own = runs(text)
    for name in sorted(os.listdir(os.path.join(ROOT, "eval"))):
        if name != "calibration.txt" and name.endswith((".txt", ".py")):
            check(not own & runs(mt.read_filler(name)), f"calibration: as in {name}: {own & runs(mt.read_filler(name))}")
    with open(os.path.join(ROOT, "demo", "chronicle.txt"), encoding="utf-8") as f:
        check(not own & runs(f.read()), "calibration: as in the chronicle")


def test_fillers():
    """No filler names one of the people that facts are about."""
    for kind in mt.FILLERS:
        text = mt.read_filler("filler.txt" if kind == "prose" else f"filler_{kind}.txt")
        shared = set(mt.FIRST) & set(re.findall(r"\w+", text))
        check(not shared, f"filler {kind} names {shared}")
        for i in range(3):
            rng = random.Random(i)
            for paragraph in mt.filler(rng, 20000, kind):
                check(all(line.strip() for line in paragraph), f"filler {kind}: an empty line")


def main():
    test_slots()
    test_lines()
    test_same_again()
    test_recorded()
    test_lengths()
    test_dense()
    test_repetition()
    test_contained()
    test_facts()
    test_speakers()
    test_counting()
    test_comparing()
    test_summary()
    test_command_line()
    test_errors()
    test_calibration()
    test_fillers()
    return end("test_tasks")


if __name__ == "__main__":
    sys.exit(main())
