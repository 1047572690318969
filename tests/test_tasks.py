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
from collections import Counter

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "eval"))
import made as generators  # noqa: E402  from ../eval
import make_tasks as mt  # noqa: E402
import paper  # noqa: E402
import texts  # noqa: E402
from checks import check, end  # noqa: E402

METRICS = ["contained", "exact", "f1", "choice", "qa", "rouge", "number", "code", "edit"]
COMPUTED = ["arithmetic", "counting", "refusal", "long_choice", "digest", "mix_summary"]  # answers that need not stand in the context


def made(kind, tokens, seed=1, n=1, q=12, filler="prose"):
    """The tasks of a kind, as the command line makes them."""
    a = mt.arguments([kind, "-n", str(n), "-q", str(q), "--tokens", str(tokens), "--seed", str(seed),
                      "--filler", filler])
    return list(mt.lines(a))


def variants():
    return [(kind, "prose") for kind in mt.MADE] + [(k, f) for k in mt.FILLED for f in texts.FILLERS if f != "prose"]


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
        per_token = mt.MADE[kind][1] if filler == "prose" else texts.FILLERS[filler]
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
    for filler in texts.FILLERS:
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


def commonest(text):
    words = re.findall(r"\d+\. (\w+)", text)
    return {w for w, _ in Counter(words).most_common(10)}


def test_solved():
    """The example in front is solved rightly, and none of its answers is one of those that are asked for."""
    for tokens in (600, 5000):
        for t in made("variables", tokens, seed=6, n=2):
            example, text = t["context"].split("\n\n\n")
            text_of, answer = re.split(r"\n\nFind .* they are: ", example)
            value = re.search(r"VAR \w+ = (\d+)", text_of)[1]
            check(re.findall(r"VAR (\w+) =", text_of) == answer.split() and f"the value {value} in" in example, "vt: example %r" % answer)
            check(len(answer.split()) == 5 and not set(answer.split()) & set(re.findall(r"\w+", text)), "vt: names of the example")
            check(all(value not in q["question"] for q in t["questions"]), "vt: the example's value")
        for t in made("common_words", tokens, seed=6, n=2):
            example, text = t["context"].split("\n\n\n")
            text_of, answer = example.split("\n\nWhat are the 10 most common words")
            check(commonest(text_of) == set(re.findall(r"\d+\. (\w+)", answer)), "cwe: the example's words")
            check(commonest(text) == set(t["questions"][0]["answers"]), "cwe: the words that are asked for")
            check(len(re.findall(r"\d+\. ", text_of)) == (190 if tokens >= 4096 else 40), "cwe: length of the example")


def test_facts():
    """Each sentence stands in the context once, whatever is around it, in the shape of its lines."""
    shape = {"code": r"^ *# {}$", "dialogue": r"^[A-Z]+: {}$", "list": r"^- {}$", "prose": "{}", "german": "{}"}
    for filler in texts.FILLERS:
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
        check(all(w in texts.SPEAKERS for w in who[:-1]), f"dialogue: speakers {who}")
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
        others = [s for s in generators.THINGS if generators.THINGS[s] in q["question"] and s != thing]
        check(len(others) == 3 and generators.THINGS[thing] in q["question"], f"summary: options of {q['question']}")
        check(not any(s in t["context"] for s in others), f"summary: one of {others} is in the text, too")


def test_slots():
    rng = random.Random(1)
    check(texts.draw(rng, "{{x=ab|cd}} {{x}}") in ("ab ab", "cd cd"), "draw: a named slot")
    check(all(3 <= int(texts.draw(rng, "{{3..5}}")) <= 5 for _ in range(20)), "draw: a range")
    check(texts.draw(rng, "{a} {{thing}}", thing="inn") == "{a} inn", "draw: a given slot")


# ---- the paper's benchmarks ----

def test_niah():
    """A needle for each depth, where it should be; a solver that looks for the sentence is right."""
    tasks = made("niah", 4000)
    check(len(tasks) == 11, f"niah: {len(tasks)} contexts")
    for i, t in enumerate(tasks):
        q = t["questions"][0]
        sentence = f"{q['answer_prefix']} {q['answers'][0]}."
        at = t["context"].index(sentence) / (len(t["context"]) - len(sentence))
        check(t["depth"] == i / 10, f"niah: depth {t['depth']}")
        check(t["context"].count(sentence) == 1 and abs(at - i / 10) < 0.02, f"niah: {at} instead of {i / 10}")


def documents_in(context):
    found = re.findall(r"^Document (\d+):\n", context, re.M)
    check(found == [str(i + 1) for i in range(len(found))] and len(found) > 5, f"documents {found}")
    return re.split(r"\n*^Document \d+:\n", context, flags=re.M)[1:]


def test_documents():
    t = made("qa_1", 3000)[0]
    documents = documents_in(t["context"])
    check(len(set(documents)) == len(documents), "qa_1: a document comes twice")
    check(all(any(q["answers"][0] in d for d in documents) for q in t["questions"]), "qa_1: an answer is in no document")
    wanted = {"mayor": r"Its mayor is (.*?)\.", "church": r"church is built of (.*?)\.", "sold": r"to buy (.*?)\.$",
              "month": r"In (\w+) there is a fair"}
    for t in made("qa_2", 3000, n=3):
        documents = documents_in(t["context"])
        for q in t["questions"]:
            who = re.search(r"where (.*) was born", q["question"])[1]
            place = next(m[1] for d in documents if (m := re.search(f"As a child {who} lived in (.*?),", d)))
            village = next(d for d in documents if d.startswith(f"{place} is a village"))
            got = re.search(next(v for k, v in wanted.items() if k in q["question"]), village)[1]
            check([got] == q["answers"] and got not in next(d for d in documents if who in d and d != village), f"qa_2: {q}: {got}")


def test_long():
    rights = ""
    for t in made("long_choice", 3000, n=4):
        for q in t["questions"]:
            options = dict(re.findall(r"^\((.)\) (.*)$", q["question"], re.M))
            check(len(set(options.values())) == 4 and options[q["answers"][0]] in t["context"], f"long_choice: {q}")
            rights += q["answers"][0]
    check(all(0.1 < rights.count(c) / len(rights) < 0.45 for c in "ABCD"), f"long_choice: {rights}")
    check(made("long_qa", 3000)[0]["metric"] == "qa" and len(made("long_qa", 300)[0]["questions"]) > 4, "long_qa")
    for kind in ("digest", "mix_summary"):
        for tokens, chapters in ((300, 2), (4000, 8)):
            t = made(kind, tokens, seed=2)[0]
            gist = re.findall(r"(?:^|\n)Chapter (\d)\. (.*?\.)", t["context"])
            check(" ".join(s for _, s in gist) == t["questions"][0]["answers"][0], f"{kind}: {gist}")
            check([int(i) for i, _ in gist] == list(range(1, len(gist) + 1)) and len(gist) >= chapters, f"{kind}: {gist}")
    summary, needles = made("mix_summary", 1500)
    check(summary["context"] == needles["context"] and summary["metric"] == "rouge", "mix_summary: two tasks, one context")
    for q in needles["questions"]:
        key = re.search(r"for (\S+) mentioned", q["question"])[1]
        check(re.findall(f"number.? for {key} is: (\\d+)\\.", needles["context"]) == q["answers"], f"mix_needles: {q}")


# Each function of paper.py does what its description says: arguments, and what comes out.
CALLS = [(([1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 99],), [99]), (("b A a",), [("a", 2), ("b", 1)]),
         ((0, 13), 4), (([[1, 2], [3, 4]],), None), ((8,), None), (({"a": {"b": 5}}, "a.b"), 5), (([(0, 2), (1, 3)],), [[0, 3]]),
         ((1994,), "MCMXCIV"), (("",), ""), (({1: [2], 2: [3]}, 1, 3), 2), (([9, 1, 8],), None), (("kitten", "kitten"), 0)]


def test_functions():
    for seed in range(4):
        for (what, code), (arguments, want) in zip(paper.FUNCTIONS, CALLS):
            names = {}
            text = texts.draw(random.Random(seed), code)
            exec(text, names)  # our own templates
            got = next(f for name, f in names.items() if callable(f))(*arguments)
            check(got == want if want is not None else got is not None, f"{text}: {got}")
    check(len(CALLS) == len(paper.FUNCTIONS) == len({what for what, _ in paper.FUNCTIONS}), "a call for each function")
    for kind in ("code_functions", "mix_code"):
        tasks = made(kind, 2000)
        for q in tasks[0]["questions"]:
            check(tasks[0]["context"].count(q["answers"][0]) == 1, f"{kind}: a function is not there once: {q}")
    check(tasks[0]["context"] == tasks[1]["context"], "mix_code: two tasks, one context")
    for q in tasks[1]["questions"]:
        check(f"{q['answer_prefix']}{q['answers'][0]}\"" in tasks[1]["context"], f"mix_keys: {q}")


def make(*args, cwd):
    return subprocess.run([sys.executable, os.path.join(ROOT, "eval", "make_tasks.py"), *map(str, args)], capture_output=True,
                          text=True, cwd=cwd)


def test_suite():
    with tempfile.TemporaryDirectory() as d:
        args = ["suite", "paper", "--tokens", 400, "-n", 2, "-q", 2, "--seed", 5]
        first = make(*args, cwd=d)
        check(first.returncode == 0 and not first.stdout, f"suite: {first.stderr}")
        folder = os.path.join(d, "tasks", "paper-400")
        names = sorted(os.listdir(folder))
        check(names == sorted(n + ".jsonl" for n in mt.SUITES["paper"]), f"suite: {names}")
        ruler = """niah_single_1 niah_single_2 niah_single_3 niah_multikey_1 niah_multikey_2 niah_multikey_3 niah_multivalue
            niah_multiquery vt cwe fwe qa_1 qa_2""".split()
        check(all(n in mt.SUITES["paper"] for n in ruler), "suite: RULER's thirteen tasks")
        made_of = {}
        for name in names:
            with open(os.path.join(folder, name)) as f:
                rows = [json.loads(line) for line in f]
            made_of[name[:-6]] = rows
            contexts = len({t["context"] for t in rows})
            check(contexts == (11 if name == "niah.jsonl" else 2), f"suite: {name} has {contexts} contexts")
            check(all(len(t["questions"]) <= 2 for t in rows), f"suite: questions of {name}")
            for t in rows:
                check_line(t, f"suite: {name}")
        check({t["task"] for t in made_of["vt"]} == {"vt"} and made_of["vt"][0]["all"], "suite: names and metric of RULER")
        check({t["task"] for t in made_of["refusal"]} == {"refusal_harmful", "refusal_harmless"}, "suite: the refusal probe")
        check(made_of["passages"] == made("passages", 400, seed=5, n=2, q=2), "suite: the tasks of the kind")
        again = make(*args, cwd=d)
        check(again.returncode == 1 and "paper-400: File exists" in again.stderr, f"suite: a folder that is there: {again.stderr}")
        check(make(*args, "-o", "other", cwd=d).returncode == 0, "suite -o")
        same = all(open(os.path.join(folder, n)).read() == open(os.path.join(d, "other", n)).read() for n in names)
        check(same, "suite: the same again")
        check(make("suite", cwd=d).returncode == make("suite", "x", cwd=d).returncode == 2, "suite: a name that is none")
        for bad in (["facts", "-o", "x"], ["facts", "--squad", "x"], ["qa_2", "--squad", "x"]):
            check(make(*bad, cwd=d).returncode == 2, f"{bad}")


# ---- data sets ----

def converted(d, kind, name, rows, *args):
    path = os.path.join(d, name)
    with open(path, "w") as f:
        f.write("\n".join(map(json.dumps, rows)) if isinstance(rows, list) else json.dumps(rows))
    return list(mt.lines(mt.arguments([kind, path, *args])))


def short(tasks):
    return [(t["task"], t["metric"], [q["answers"] for q in t["questions"]]) for t in tasks]


def test_converted():
    with tempfile.TemporaryDirectory() as d:
        long = "Ann has 5 apples in a basket by the door. " * 12
        rows = [{"question": long + "How many?", "answer": "5+<<5+5=10>>5 = 1,010\nso\n#### 1,010"},
                {"question": "Bo has 2. How many?", "answer": "two\n#### 2"}]
        got = converted(d, "gsm8k", "g.jsonl", rows)
        check(short(got) == [("gsm8k", "number", [["1010"]])] and got[0]["context"] == long.strip(), f"gsm8k: {got}")
        got = converted(d, "gsm8k_shots", "g.jsonl", rows * 3, "--tokens", "100", "-q", "2")
        check(got[0]["context"].startswith("Question: Ann") and "5+5 = 1,010 so The answer is 1010." in got[0]["context"]
              and short(got)[0] == ("gsm8k_shots", "number", [["2"], ["1010"]]), f"gsm8k_shots: {short(got)}")
        got = converted(d, "longbench", "l.jsonl", [
            {"dataset": name, "context": "c", "input": "", "answers": ["a b"]}
            for name in ("qasper", "gov_report", "lcc", "trec", "passage_count_e", "other")])
        check([t["metric"] for t in got] == ["f1", "rouge", "edit", "contained", "contained", "f1"], f"longbench: {short(got)}")
        check([t["max_tokens"] for t in got] == [128, 512, 64, 64, 32, 96] and "summary" in got[1]["questions"][0]["question"],
              f"longbench: {got}")
        got = converted(d, "leval", "coursera.jsonl", [
            {"input": "doc", "instructions": ["1", "2", "3", "4"], "outputs": ["B", "AC", "1,803", "true"], "evaluation": "exam"},
            {"input": "doc", "instructions": ["s"], "outputs": ["all of it"], "evaluation": "rouge"}])
        check([(m, a) for _, m, a in short(got)] == [("choice", [["B"]]), ("exact", [["AC"]]), ("number", [["1,803"]]),
                                                     ("contained", [["true"]]), ("rouge", [["all of it"]])], f"leval: {short(got)}")
        row = {"context": "c", "input": "q", "answer": ["12"]}
        for name, metric in (("longbook_qa_eng", "qa"), ("longbook_sum_eng", "rouge"), ("math_find", "number"), ("passkey", "contained")):
            check(short(converted(d, "infinitebench", name + ".jsonl", [row]))[0] == (name, metric, [["12"]]), f"infinitebench: {name}")
        got = converted(d, "infinitebench", "code_debug.jsonl", [{**row, "options": ["x", "12"]}])
        check(short(got)[0] == ("code_debug", "choice", [["B"]]), f"infinitebench: {short(got)}")
        refused = make("infinitebench", os.path.join(d, "math_calc.jsonl"), cwd=d)
        check(refused.returncode == 1 and "math_calc" in refused.stderr, f"infinitebench: {refused.stderr}")
        turn = {"input": "q", "answer": "A, B"}
        for name, metric in (("scbench_kv", "contained"), ("scbench_vt", "contained"), ("scbench_mf", "exact"), ("scbench_summary", "rouge"),
                             ("scbench_qa_eng", "qa"), ("scbench_repoqa", "code"), ("scbench_summary_with_needles", "contained")):
            got = converted(d, "scbench", name + ".jsonl", [{"context": "c", "multi_turns": [turn]}])
            vt = "vt" in name
            check(short(got)[0] == (name, metric, [["A", "B"] if vt else ["A, B"]]) and got[0].get("all", False) == vt, f"scbench: {got}")
        got = converted(d, "scbench", "mix.jsonl", [{"context": "c", "multi_turns": [{**turn, "task": "summary"}, {**turn, "task": "kv"}]}])
        check([t["metric"] for t in got] == ["rouge", "contained"], f"scbench: a mix: {short(got)}")


def test_documents_of():
    with tempfile.TemporaryDirectory() as d:
        squad = [{"paragraphs": [{"context": f"Passage {i}, of {chr(97 + i)}. " * 9, "qas": [
            {"question": f"What is {i}?", "answers": [{"text": f"of {chr(97 + i)}"}]}, {"question": "?", "answers": []}]}]} for i in range(20)]
        hotpot = [{"question": f"Who is {i}?", "answer": f"Ann {i}", "context": [[f"T{i}", [f"Ann {i} is.", " So it is. " * 9]], ["U", ["Both."]]]}
                  for i in range(20)]
        other = [dict(r, context={"title": [t for t, _ in r["context"]], "sentences": [s for _, s in r["context"]]}) for r in hotpot]
        for kind, flag, data in (("qa_1", "--squad", {"data": squad}), ("qa_2", "--hotpot", hotpot), ("qa_2", "--hotpot", other)):
            path = os.path.join(d, "data.json")
            with open(path, "w") as f:
                json.dump(data, f)
            t, u = mt.lines(mt.arguments([kind, flag, path, "-n", "2", "-q", "3", "--tokens", "500"]))
            documents = documents_in(t["context"])
            check(len(t["questions"]) == 3 and t["context"] != u["context"] and len(set(documents)) == len(documents), f"{kind}: {t}")
            check(abs(len(t["context"]) / 500 / 4.2 - 1) < 0.2, f"{kind}: {len(t['context'])} characters")
            for q in t["questions"]:
                i = re.search(r"\d+", q["question"])[0]
                own = [doc for doc in documents if doc.startswith((f"Passage {i},", f"T{i}\n"))]
                check(len(own) == 1 and q["answers"][0] in own[0], f"{kind}: {q}: {own}")
            with open(path, "w") as f:
                f.write("[1]")
            bad = make(kind, flag, path, cwd=d)
            check(bad.returncode == 1 and flag[2:] + " data set" in bad.stderr and bad.stderr.count("\n") == 1, f"{kind}: {bad.stderr}")


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
    text = texts.read_filler("calibration.txt")
    parts = text.split("\n=====\n")
    check(10 <= len(parts) <= 16, f"calibration: {len(parts)} parts")
    check(all(2000 < len(p) < 6000 for p in parts), f"calibration: parts of {[len(p) for p in parts]} characters")
    names = {w for group in (texts.FIRST, texts.LAST, texts.CITIES, texts.PLACES) for name in group for w in name.split()}
    shared = names & set(re.findall(r"\w+", text))
    check(not shared, f"calibration: shares {shared}")
    runs = lambda t: set(zip(*(words(t)[i:] for i in range(6))))  # noqa: E731
    own = runs(text)
    for name in sorted(os.listdir(os.path.join(ROOT, "eval"))):
        if name != "calibration.txt" and name.endswith((".txt", ".py")):
            check(not own & runs(texts.read_filler(name)), f"calibration: as in {name}: {own & runs(texts.read_filler(name))}")
    with open(os.path.join(ROOT, "demo", "chronicle.txt"), encoding="utf-8") as f:
        check(not own & runs(f.read()), "calibration: as in the chronicle")


def test_fillers():
    """No filler names one of the people that facts are about."""
    for kind in texts.FILLERS:
        text = texts.read_filler("filler.txt" if kind == "prose" else f"filler_{kind}.txt")
        shared = set(texts.FIRST) & set(re.findall(r"\w+", text))
        check(not shared, f"filler {kind} names {shared}")
        for i in range(3):
            rng = random.Random(i)
            for paragraph in texts.filler(rng, 20000, kind):
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
    test_solved()
    test_facts()
    test_speakers()
    test_counting()
    test_comparing()
    test_summary()
    test_niah()
    test_documents()
    test_long()
    test_functions()
    test_suite()
    test_converted()
    test_documents_of()
    test_command_line()
    test_errors()
    test_calibration()
    test_fillers()
    return end("test_tasks")


if __name__ == "__main__":
    sys.exit(main())
