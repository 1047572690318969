"""convert.py: task files from data sets that a user has, with the metrics and answer lengths of their authors.

A converter is called with the file's path, the most questions of a context and, for those who put contexts together
themselves, about how many characters one has.
"""
import json
import os
import re

from texts import ask, sentences, task

# ---- files ----


def read_json(path):
    """A JSON file, or one with a JSON object per line."""
    with open(path, encoding="utf-8") as f:
        text = f.read()
    try:
        data = json.loads(text)
    except json.JSONDecodeError:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    return data if isinstance(data, list) else data.get("data", [data])


def as_list(answer):
    return [str(a) for a in answer] if isinstance(answer, (list, tuple)) else [str(answer)]


def stem(path):
    return os.path.splitext(os.path.basename(path))[0]


class Groups:
    """Questions by what makes a task of them: the context, its name, metric and answer length."""

    def __init__(self):
        self.tasks = {}

    def add(self, question, context, name, metric, most, **more):
        if any(a.strip() for a in question["answers"]):
            self.tasks.setdefault((context, name, metric, most, tuple(more.items())), []).append(question)

    def lines(self, n):
        for (context, name, metric, most, more), questions in self.tasks.items():
            yield task(name, context, questions[:n], metric, max_tokens=most, **dict(more))


# ---- SQuAD and HotpotQA ----

def squad_questions(path):
    """Of each passage the text, and its questions that have an answer, with the answers."""
    for article in read_json(path):
        for paragraph in article["paragraphs"]:
            yield paragraph["context"], [(q["question"].strip(), sorted({a["text"] for a in q["answers"]}))
                                         for q in paragraph["qas"] if q["answers"]]


def squad(path, n, chars):
    """SQuAD (dev-v1.1.json, dev-v2.0.json): the questions of each passage that have an answer"""
    for context, asked in squad_questions(path):
        questions = [ask(f"Answer the question using the text above.\nQuestion: {question}", "Answer:", answers)
                     for question, answers in asked]
        if questions:
            yield task("squad", context, questions[:n], max_tokens=32, stop="\n")


def documents_of_squad(path):
    """-> (documents, question, answers) of each question."""
    return [([context], question, answers) for context, asked in squad_questions(path) for question, answers in asked]


def documents_of_hotpot(path):
    """The same of HotpotQA (hotpot_dev_distractor_v1.json, or as the Hugging Face data set has it)."""
    out = []
    for row in read_json(path):
        context = row["context"]
        pairs = zip(context["title"], context["sentences"]) if isinstance(context, dict) else context
        documents = [f"{title}\n{''.join(text)}" for title, text in pairs]
        out.append((documents, row["question"].strip(), [row["answer"]]))
    return out


# ---- GSM8K ----

def gsm8k_answer(row):
    return row["answer"].split("####")[-1].strip().replace(",", "")


def gsm8k(path, n, chars):
    """GSM8K (test.jsonl): context is the problem without its last sentence, which is the question; 72 tokens at least"""
    for row in read_json(path):
        parts = sentences(row["question"].strip())
        context = " ".join(parts[:-1])
        if len(context) < 72 * 4.4:
            continue
        question = parts[-1] + " Think step by step and end with: The answer is"
        yield task("gsm8k", context, [ask(question, "", gsm8k_answer(row))], "number", max_tokens=512)


def gsm8k_shots(path, n, chars):
    """GSM8K: solved problems, up to --tokens of them together, then the next ones as questions"""
    shots, questions = [], []
    for row in read_json(path):
        text = f"Question: {row['question'].strip()}"
        solution = re.sub(r"<<.*?>>", "", row["answer"].split("####")[0])
        if sum(map(len, shots)) < chars:
            shots.append(f"{text}\nAnswer: {' '.join(solution.split())} The answer is {gsm8k_answer(row)}.")
            continue
        questions.append(ask(text, "Answer:", gsm8k_answer(row)))
        if len(questions) == n:
            yield task("gsm8k_shots", "\n\n".join(shots), questions, "number", stop="\n", max_tokens=256)
            shots, questions = [], []
    if questions:
        yield task("gsm8k_shots", "\n\n".join(shots), questions, "number", stop="\n", max_tokens=256)


# ---- LongBench, L-Eval, InfiniteBench ----

LONGBENCH = {  # by the name of the data set: metric, tokens of an answer, and what is asked where a row does not say
    "narrativeqa qasper dureader": ("f1", 128, "Answer:"),
    "multifieldqa_en multifieldqa_zh": ("f1", 64, "Answer:"),
    "hotpotqa 2wikimqa musique triviaqa": ("f1", 32, "Answer:"),
    "gov_report qmsum multi_news vcsum": ("rouge", 512, "Write a summary of the text above."),
    "samsum": ("rouge", 128, "Write a summary of the text above."),
    "trec lsht": ("contained", 64, "Answer:"),
    "passage_retrieval_en passage_retrieval_zh passage_count": ("contained", 32, "Answer:"),
    "lcc repobench-p": ("edit", 64, "Write the next line of the code above."),
}


def longbench(path, n, chars):
    """LongBench (one data set's .jsonl): rows of the same context are put together"""
    groups = Groups()
    for row in read_json(path):
        name = row.get("dataset", "longbench")
        base = name[:-2] if name.endswith("_e") else name
        metric, most, request = next((v for k, v in LONGBENCH.items() if base in k.split()), ("f1", 96, "Answer:"))
        groups.add(ask(row["input"].strip() or request, "", row["answers"]), row["context"], name, metric, most)
    return groups.lines(n)


def leval_metric(evaluation, answer):
    if evaluation == "rouge":
        return "rouge"
    if evaluation != "exam":  # f1; those for a judge have F1 as well
        return "f1"
    if re.fullmatch(r"\(?[A-Da-d]\)?\.?", answer):
        return "choice"
    if re.fullmatch(r"[A-D]{2,4}", answer):
        return "exact"
    return "number" if re.fullmatch(r"-?[\d,]+(\.\d+)?", answer) else "contained"


def leval(path, n, chars):
    """L-Eval (one task's .jsonl): the instructions of each document"""
    groups = Groups()
    for row in read_json(path):
        for question, answer in zip(row["instructions"], row["outputs"]):
            metric = leval_metric(row.get("evaluation", "f1"), answer.strip())
            groups.add(ask(question.strip(), "", answer.strip()), row["input"], stem(path), metric,
                       512 if metric == "rouge" else 96)
    return groups.lines(n)


INFINITEBENCH = {"longbook_qa_eng": ("qa", 40), "longbook_qa_chn": ("f1", 40), "longbook_sum_eng": ("rouge", 1200),
                 "math_find": ("number", 16), "code_run": ("number", 16), "kv_retrieval": ("contained", 50)}


def infinitebench(path, n, chars):
    """InfiniteBench (one task's .jsonl): rows of the same context are put together; not math_calc"""
    name, groups = stem(path), Groups()
    if name == "math_calc":
        raise ValueError("math_calc is marked number by number, for which there is no metric here")
    for row in read_json(path):
        options = row.get("options") or []
        question = row["input"] + "".join(f"\n({c}) {o}" for c, o in zip("ABCD", options))
        answers = as_list(row["answer"])
        if options:
            answers = ["ABCD"[options.index(a)] for a in answers if a in options]
        metric, most = ("choice", 96) if options else INFINITEBENCH.get(name, ("contained", 96))
        groups.add(ask(question.strip(), "", answers), row["context"], name, metric, most)
    return groups.lines(n)


# ---- SCBench ----

SCBENCH = [  # by what a task's name has in it: metric and answer length, as KVzip's authors mark them
    ("repoqa_and_kv", "contained", 96), ("repoqa", "code", 512), ("vt", "contained", 96), ("mf", "exact", 32),
    ("needle", "contained", 96), ("summary", "rouge", 256), ("qa_eng", "qa", 96), ("", "contained", 96),
]


def scbench_metric(name, turn):
    if turn.get("options"):
        return "choice", 96
    return next((metric, most) for part, metric, most in SCBENCH if part in name)


def scbench(path, n, chars):
    """SCBench (.jsonl of one task): every turn is a question on its own"""
    groups = Groups()
    for row in read_json(path):
        for turn in row.get("multi_turns") or row["turns"]:
            options = turn.get("options") or []
            question = turn["input"] + "".join(f"\n({c}) {o}" for c, o in zip("ABCDEFGH", options))
            answers = as_list(turn["answer"])
            if options:
                answers = [a if len(a) == 1 else "ABCDEFGH"[options.index(a)] for a in answers]
            name = turn.get("task") or row.get("task") or stem(path)
            metric, most = scbench_metric(name, turn)
            if "vt" in name.split("_"):
                answers = [a for one in answers for a in one.split(", ")]
            groups.add(ask(question.strip(), "", answers), row["context"], name, metric, most,
                       **({"all": True} if "vt" in name.split("_") else {}))
    return groups.lines(n)


CONVERTED = {"squad": squad, "gsm8k": gsm8k, "gsm8k_shots": gsm8k_shots, "longbench": longbench, "leval": leval,
             "infinitebench": infinitebench, "scbench": scbench}
