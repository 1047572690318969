"""paper.py: the benchmarks that KVzip was measured on (arXiv 2505.23416), made from nothing, and the set of all of them.

What made.py has already serves here too. The other kinds: a needle at eleven depths, questions over numbered
documents (RULER's qa_1 and qa_2), questions, choices and a summary of a long text, functions to be found by what
they do (RepoQA, arXiv 2406.06025), and two tasks on one context (SCBench, arXiv 2412.10319).
"""
import re

from convert import documents_of_hotpot, documents_of_squad
from made import PASSAGES, fill_passage, needle, needle_keys, needle_question
from texts import (CITIES, FILLERS, FOODS, JOBS, MATERIALS, MONTHS, PLACES, as_text, ask, draw, filler, fitting,
                   full_names, number, random_uuid, task, units)

# ---- a needle at a depth ----

PLEASURES = """eat a warm pretzel on the old bridge|watch the boats from the harbour wall|climb the bell tower before breakfast|
drink mint tea behind the fish market|listen to the fountain in the botanical garden|ride the last tram to its final stop|
count the storks on the town hall|read old postcards at the flea market|row across the pond at dusk|
visit the museum of locks on a Tuesday""".replace("\n", "").split("|")


def put_at(paragraphs, sentence, depth):
    """Puts a sentence between two others, where the share `depth` of the characters comes before it."""
    places, before = [], 0
    for p, text in enumerate(paragraphs):
        for s, old in enumerate(text):
            places.append((before, p, s))
            before += len(old) + 1
        places.append((before, p, len(text)))
    _, p, s = min(places, key=lambda place: abs(place[0] - depth * before))
    paragraphs[p].insert(s, sentence)


def niah(rng, chars, n):
    """one sentence in eleven contexts, at 0, 10 .. 100% of their length"""
    out = []
    for depth in range(0, 101, 10):
        city, pleasure = rng.choice(CITIES), rng.choice(PLEASURES)
        start = f"The best thing to do in {city} is to"
        paragraphs = filler(rng, max(1, chars - len(start) - len(pleasure) - 3))
        put_at(paragraphs, f"{start} {pleasure}.", depth / 100)
        out.append(task("niah", as_text(paragraphs), [ask(f"What is the best thing to do in {city}?", start, pleasure)],
                        stop=".", max_tokens=32, depth=depth / 100))
    return out


# ---- documents (RULER) ----

DOCUMENTS = "Answer the questions from the documents below. Say the answer and nothing else.\n\n"


def numbered(rng, chars, documents, more):
    """The documents and as many of `more` as there is room for, in any order, with numbers."""
    documents = list(documents)
    left = chars - len(DOCUMENTS) - sum(len(d) + 16 for d in documents)
    for text in more:
        if left <= len(text) / 2:
            break
        documents.append(text)
        left -= len(text) + 16
    rng.shuffle(documents)
    return DOCUMENTS + "\n\n".join(f"Document {i + 1}:\n{d}" for i, d in enumerate(documents))


def other_documents(rng):
    """Without end: paragraphs that answer nothing."""
    return (" ".join(paragraph) for paragraph in units(rng, "prose"))


def drawn_passages(rng, chars):
    """Passages, no two from one template, as many as half of the characters have room for: text, slots, questions."""
    for template, questions in rng.sample(PASSAGES, fitting(len(PASSAGES), chars // 2, 1150)):
        text, slots = fill_passage(rng, template)
        yield text, slots, questions, template


def qa_1(rng, chars, n, squad=None):
    """RULER's qa_1: numbered documents, of which some answer the questions (--squad FILE: those of SQuAD)"""
    if squad:
        return documents_task("qa_1", rng, chars, n, documents_of_squad(squad))
    documents, questions = [], []
    for text, slots, asked, _ in drawn_passages(rng, chars):
        documents.append(text)
        questions += [ask(q.format(**slots), start.format(**slots), slots[slot]) for q, start, slot in asked]
    return task("qa_1", numbered(rng, chars, documents, other_documents(rng)),
                rng.sample(questions, min(n, len(questions))), stop=".", max_tokens=32)


HOPS = [("Who is the mayor of the village where {} was born?", "The mayor is", "mayor"),
        ("What is the church of the village where {} was born built of?", "The church is built of", "stone"),
        ("What is sold at the fair of the village where {} was born?", "At the fair they sell", "food"),
        ("In which month is the fair of the village where {} was born?", "The fair is in", "month")]


def qa_2(rng, chars, n, hotpot=None):
    """RULER's qa_2: an answer needs two documents, one of a person and one of a village (--hotpot FILE: HotpotQA's)"""
    if hotpot:
        return documents_task("qa_2", rng, chars, n, documents_of_hotpot(hotpot))
    count = fitting(len(PLACES), chars // 2, 440)
    names, documents, questions = full_names(rng, 2 * count), [], []
    for place in rng.sample(PLACES, count):
        who = names.pop()
        own = {"mayor": names.pop(), "stone": rng.choice(MATERIALS), "food": rng.choice(FOODS), "month": rng.choice(MONTHS)}
        documents += [
            f"{who} works as a {rng.choice(JOBS)} in {rng.choice(CITIES)}, in a house with a green door. As a child {who} "
            f"lived in {place}, where the family had a garden by the brook; {who} was born there, too.",
            f"{place} is a village at the foot of a hill. Its mayor is {own['mayor']}. The church is built of "
            f"{own['stone']}. In {own['month']} there is a fair, and people come from far away to buy {own['food']}."]
        questions += [ask(q.format(who), start, own[slot]) for q, start, slot in HOPS]
    return task("qa_2", numbered(rng, chars, documents, other_documents(rng)),
                rng.sample(questions, min(n, len(questions))), stop=".", max_tokens=32)


def documents_task(name, rng, chars, n, entries):
    """entries: (documents, question, answers) each; those of some questions, and documents of others."""
    order = rng.sample(range(len(entries)), len(entries))
    texts, questions = {}, []
    for i in order[:n]:
        documents, question, answers = entries[i]
        if questions and sum(map(len, [*texts, *documents])) > 0.8 * chars:
            break
        texts.update(dict.fromkeys(documents))
        questions.append(ask(question, "Answer:", answers))
    more = (d for i in order for d in entries[i][0] if d not in texts)
    return task(name, numbered(rng, chars, texts, dict.fromkeys(more)), questions, stop="\n", max_tokens=32)


# ---- a long text (SCBench) ----

def long_text(rng, chars):
    """Passages among paragraphs of filler: the text, and of each passage slots, questions and template."""
    drawn = list(drawn_passages(rng, chars))
    paragraphs = [" ".join(p) for p in filler(rng, max(1, chars - sum(len(d[0]) + 2 for d in drawn)))]
    for text, *_ in drawn:
        paragraphs.insert(rng.randrange(len(paragraphs) + 1), text)
    return "\n\n".join(paragraphs), [d[1:] for d in drawn]


def long_qa(rng, chars, n):
    """questions about passages far apart in a long text (En.QA; the better of F1 and contained)"""
    text, drawn = long_text(rng, chars)
    questions = [ask(q.format(**slots), "Answer:", slots[slot]) for slots, asked, _ in drawn for q, _, slot in asked]
    return task("long_qa", text, rng.sample(questions, min(n, len(questions))), "qa", stop="\n", max_tokens=24)


def others_like(rng, template, slot, right):
    """Three other values that the slot could have."""
    kind = dict(re.findall(r"\{(\w+):(\w+)\}", template))[slot]
    alike, out = [s for s, k in re.findall(r"\{(\w+):(\w+)\}", template) if k == kind], {}
    while len(out) < 3:
        value = fill_passage(rng, template)[1][rng.choice(alike)]
        if value != right:
            out[value] = True
    return list(out)


def long_choice(rng, chars, n):
    """the same with four answers to choose from (En.MultiChoice); chance is 25%"""
    text, drawn = long_text(rng, chars)
    questions = []
    for slots, asked, template in drawn:
        for q, _, slot in asked:
            options, right = others_like(rng, template, slot, slots[slot]), rng.randrange(4)
            options.insert(right, slots[slot])
            rows = "\n".join(f"({letter}) {o}" for letter, o in zip("ABCD", options))
            questions.append(ask(f"{q.format(**slots)}\n{rows}", "The answer is (", "ABCD"[right]))
    return task("long_choice", text, rng.sample(questions, min(n, len(questions))), "choice", max_tokens=4)


DEEDS = ["{name} repaired the {thing} of {place} in {month}.", "{name} gave {place} a new {thing} in {month}.",
         "{name} painted the {thing} of {place} in {month}.", "{name} closed the {thing} of {place} in {month}.",
         "{name} sold the {thing} of {place} in {month}.", "{name} bought a {thing} in {place} in {month}."]
DONE_TO = ["bridge", "mill", "school", "library", "chapel", "ferry", "market hall", "lighthouse", "well", "theatre"]


def report(rng, chars, chapters):
    """-> paragraphs, each a list of sentences, and the sentences that are their gist, one at each chapter's beginning."""
    gist, paragraphs = [], filler(rng, max(1, chars - 85 * chapters))
    chapters = min(chapters, len(paragraphs))
    for i, name in enumerate(full_names(rng, chapters)):
        gist.append(rng.choice(DEEDS).format(name=name, thing=rng.choice(DONE_TO), place=rng.choice(PLACES),
                                             month=rng.choice(MONTHS)))
        at = i * len(paragraphs) // chapters
        paragraphs[at] = [f"Chapter {i + 1}.", gist[-1], *paragraphs[at]]
    return paragraphs, gist


def summary_question(gist):
    return ask("Summarize the report in one sentence for each chapter: who did what, and when.", "In short:", " ".join(gist))


def digest(rng, chars, n):
    """the summary of a report with up to eight chapters (En.Sum; ROUGE-L)"""
    paragraphs, gist = report(rng, chars, fitting(8, chars, 500))
    return task("digest", as_text(paragraphs), [summary_question(gist)], "rouge", max_tokens=256)


def mix_summary(rng, chars, n):
    """two tasks on one report: its summary, and needles between its sentences"""
    keys = needle_keys(rng, fitting(n, chars, 300))
    values = {k: [number(rng, 7)] for k in keys}
    lines = [needle(k, values[k][0], "number") for k in keys]
    paragraphs, gist = report(rng, max(1, chars - sum(len(s) + 1 for s in lines)), fitting(8, chars, 500))
    for line in lines:
        text = rng.choice(paragraphs)
        text.insert(rng.randrange(min(2, len(text)), len(text) + 1), line)
    text = as_text(paragraphs)
    return [task("mix_summary", text, [summary_question(gist)], "rouge", max_tokens=256),
            task("mix_needles", text, [needle_question(k, "number", values[k]) for k in keys], stop=".", max_tokens=24)]


# ---- code (RepoQA) ----

FUNCTIONS = [  # what a function does, and the function
    ("It takes a list of readings and returns those that are further from the mean than a given number of standard deviations.",
     """def {{pick|find|list}}_{{outliers|strays|spikes}}({{x=readings|samples|levels}}, width={{2|3|4}}):
    mean = sum({{x}}) / len({{x}})
    spread = (sum((r - mean) ** 2 for r in {{x}}) / len({{x}})) ** 0.5
    return [r for r in {{x}} if abs(r - mean) > width * spread]"""),
    ("It takes a text and returns how often each word occurs in it, the most frequent first, without regard to capitals.",
     """def {{tally|rank|weigh}}_{{terms|vocabulary|language}}(text, most={{10|20|50}}):
    counts = {}
    for word in text.lower().split():
        counts[word] = counts.get(word, 0) + 1
    ranked = sorted(counts.items(), key=lambda pair: -pair[1])
    return ranked[:most]"""),
    ("It takes two dates as numbers of days and returns how many weekend days lie between them.",
     """def {{count|sum_up|number_of}}_{{idle|free|quiet}}_days(first, last, start={{0..6}}):
    free = 0
    for day in range(first, last + 1):
        if (day + start) % 7 in (5, 6):
            free += 1
    return free"""),
    ("It takes a matrix as a list of rows and returns it turned by ninety degrees to the right.",
     """def {{turn|swing|rotate}}_{{board|grid|picture}}({{x=rows|lines|cells}}, times={{1|2|3}}):
    for _ in range(times % 4):
        {{x}} = [list(column)[::-1] for column in zip(*{{x}})]
    return {{x}}"""),
    ("It takes an amount of money and returns the coins that make it up, the largest ones first.",
     """def {{pay|change|hand_out}}_{{coins|cash|small_money}}(amount, coins=({{50, 20, 10, 5, 2, 1|25, 10, 5, 1}})):
    given = []
    for coin in coins:
        while amount >= coin:
            amount -= coin
            given.append(coin)
    return given"""),
    ("It takes a path in a tree of dictionaries, with dots between the names, and returns what lies there, or a default.",
     """def {{look|dig|reach}}_{{down|deep|inside}}({{x=tree|store|config}}, path, default={{None|0|False}}):
    for name in path.split("."):
        if not isinstance({{x}}, dict) or name not in {{x}}:
            return default
        {{x}} = {{x}}[name]
    return {{x}}"""),
    ("It takes intervals as pairs of begin and end and joins those that overlap or touch.",
     """def {{fuse|unite|close}}_{{spans|bookings|shifts}}({{x=spans|times|slots}}, gap={{0..9}}):
    joined = []
    for begin, end in sorted({{x}}):
        if joined and begin <= joined[-1][1] + gap:
            joined[-1][1] = max(joined[-1][1], end)
        else:
            joined.append([begin, end])
    return joined"""),
    ("It takes a whole number and returns its digits as Roman numerals.",
     """def {{to|as|write}}_{{roman|latin|clock_face}}(number):
    signs = [(1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"),
             (50, "L"), (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I")]
    out, number = "", int(number)
    for value, sign in signs:
        out += sign * (number // value)
        number %= value
    return out"""),
    ("It takes a text and returns it with every letter moved on in the alphabet by the same number of places.",
     """def {{shift|move|hide}}_{{letters|message|note}}(text, places={{3..22}}):
    out = []
    for c in text:
        base = ord("a") if c.islower() else ord("A")
        out.append(chr((ord(c) - base + places) % 26 + base) if c.isalpha() else c)
    return "".join(out)"""),
    ("It takes a graph as a dictionary of neighbours and returns the fewest steps from one node to another, or -1.",
     """def {{hops|steps|stops}}_{{between|from_to|apart}}({{x=roads|links|edges}}, start, goal):
    seen, border, count = {start}, [start], 0
    while border and goal not in border:
        border = [b for a in border for b in {{x}}.get(a, []) if not (b in seen or seen.add(b))]
        count += 1
    return count if border else -1"""),
    ("It takes a list of prices in order of time and returns the largest gain that one purchase and one later sale could bring.",
     """def {{best|top|largest}}_{{gain|profit|deal}}({{x=prices|quotes|offers}}, fee={{0..5}}):
    cheapest, gain = {{x}}[0], 0
    for price in {{x}}[1:]:
        gain = max(gain, price - cheapest - fee)
        cheapest = min(cheapest, price)
    return gain"""),
    ("It takes two texts and returns the smallest number of letters to insert, delete or replace to make them equal.",
     """def {{edits|changes|typos}}_{{between|needed|apart}}(a, b, cost={{1|2}}):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a):
        last, row[0] = row[0], i + 1
        for j, y in enumerate(b):
            last, row[j + 1] = row[j + 1], min(row[j] + 1, row[j + 1] + 1, last + cost * (x != y))
    return row[-1]"""),
]


def code_with(rng, chars, units):
    """Code of so many characters with the units, lists of lines, spread over it."""
    paragraphs = filler(rng, max(1, chars - sum(len(line) + 1 for u in units for line in u)), "code")
    for unit in units:
        paragraphs.insert(rng.randrange(len(paragraphs) + 1), unit)
    return "\n\n".join("\n".join(p) for p in paragraphs)


def wanted_functions(rng, chars, n):
    picked = rng.sample(FUNCTIONS, fitting(min(n, len(FUNCTIONS)), chars // 2, 400))
    return [(what, draw(rng, code)) for what, code in picked]


def function_question(what, code):
    return ask(f"Which function of the code above does this? {what}\nWrite the function as it stands there.",
               "```python\n", code)


def code_functions(rng, chars, n):
    """functions to be found in code by what they do, and written down (RepoQA; BLEU of 0.8)"""
    wanted = wanted_functions(rng, chars, n)
    text = code_with(rng, chars, [code.split("\n") for _, code in wanted])
    return task("code_functions", text, [function_question(*w) for w in wanted], "code", stop="```", max_tokens=256)


def mix_code(rng, chars, n):
    """two tasks on one text of code: functions, and the values of keys between them"""
    wanted = wanted_functions(rng, chars, n)
    keys = {random_uuid(rng): random_uuid(rng) for _ in range(fitting(n, chars // 3, 260))}
    lines = [f'KEYS["{k}"] = "{v}"' for k, v in keys.items()]
    dense = FILLERS["code"] / 1.3 - 1  # a key has more tokens than its characters of code
    text = code_with(rng, max(1, int(chars - dense * sum(map(len, lines)))), [code.split("\n") for _, code in wanted] + [[s] for s in lines])
    return [task("mix_code", text, [function_question(*w) for w in wanted], "code", stop="```", max_tokens=256),
            task("mix_keys", text, [ask(f'What is the value of KEYS["{k}"]?', f'KEYS["{k}"] = "', v) for k, v in keys.items()],
                 stop='"', max_tokens=48)]


# ---- all of them ----

KINDS = {  # and how many characters a token of it has, under SmolLM2's tokenizer
    "niah": (niah, 4.4),
    "qa_1": (qa_1, 4.3),
    "qa_2": (qa_2, 4.0),
    "long_qa": (long_qa, 4.4),
    "long_choice": (long_choice, 4.4),
    "digest": (digest, 4.4),
    "mix_summary": (mix_summary, 4.3),
    "code_functions": (code_functions, 3.06),
    "mix_code": (mix_code, 3.06),
}

SUITES = {  # of each set: the names of its tasks in the results, and their kinds
    "paper": {
        "niah_single_1": "needle_single_1", "niah_single_2": "needle_single_2", "niah_single_3": "needle_single_3",
        "niah_multikey_1": "needle_multikey_1", "niah_multikey_2": "needle_multikey_2",
        "niah_multikey_3": "needle_multikey_3", "niah_multivalue": "needle_multivalue",
        "niah_multiquery": "needle_multiquery", "vt": "variables", "cwe": "common_words", "fwe": "frequent_words",
        "qa_1": "qa_1", "qa_2": "qa_2", "niah": "niah", "retr_kv": "key_value", "retr_prefix_suffix": "prefix_suffix",
        "retr_multihop": "multihop", "code_functions": "code_functions", "long_qa": "long_qa", "long_choice": "long_choice",
        "digest": "digest", "math_find": "find_number", "many_shot": "many_shot", "mix_summary": "mix_summary",
        "mix_code": "mix_code", "passages": "passages", "arithmetic": "arithmetic", "refusal": "refusal",
    },
}
