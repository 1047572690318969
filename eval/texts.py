"""texts.py: what tasks are made of: words, text between facts, and the lines of a task file.

A context is filler with facts hidden in it. Filler was written for this project (filler*.txt); once it is
used up it is put together from parts, so that a context may be of any length. All draws come from the
random generator that is passed on: the same one gives the same text.
"""
import os
import re
import string
import uuid

HERE = os.path.dirname(os.path.abspath(__file__))

# ---- words ----

FIRST = """Maria James Elena Victor Sofia Henry Clara Oscar Julia Peter Nadia Simon Alice Bruno Helen Marcus Irene
Felix Laura Daniel Grace Robert Amelia Thomas Nina Walter Emma Gustav Lydia Arthur Paula Edwin Rosa Hugo Vera Martin
Stella Conrad Judith Leon""".split()
LAST = """Lopez Carter Novak Fischer Bennett Moreau Hansen Rossi Parker Silva Weber Collins Petrov Murray Dubois
Jensen Romano Fletcher Vargas Lindgren Turner Kovacs Marsh Delgado Winter Foster Castle Bianchi Olsen Barker Sutton
Meyer Quinn Ferrari Holt Drake Nolan Price Vance Yates""".split()
CITIES = """Lisbon Vienna Toronto Dublin Madrid Oslo Boston Prague Athens Geneva Chicago Naples Warsaw Sydney Cairo
Denver Milan Seattle Berlin Havana Bristol Lima Zurich Kyoto Seville Houston Krakow Nairobi Bogota Helsinki""".split()
JOBS = """baker carpenter dentist pilot gardener nurse plumber teacher lawyer painter farmer chemist librarian sailor
tailor butcher photographer translator surgeon firefighter jeweller beekeeper bricklayer geologist""".split()
ANIMALS = """parrot tortoise rabbit donkey goat hamster ferret canary pony snake lizard goose hedgehog duck pigeon
frog llama peacock""".split()
INSTRUMENTS = """violin trumpet cello flute harp clarinet accordion guitar drums piano oboe banjo trombone mandolin
saxophone""".split()
COLOURS = "red blue green yellow white black orange purple grey brown pink silver".split()
FOODS = """lentils mushrooms cherries pancakes oysters dumplings walnuts noodles olives spinach strawberries sausages
almonds pears cheese""".split()
MATERIALS = "granite brick oak marble limestone copper slate sandstone bronze iron pine clay".split()
MONTHS = """January February March April May June July August September October November December""".split()
PLACES = """Harrow Mere|Oakhaven|Stillwater|Brandmoor|Northwick|Fernhill|Greystone|Port Ellis|Millbrook|Ravensford|
Ashby Cross|Lindale|Copper Bay|Thornbury|Eastmarsh|Windle|Sandgate|Marlow Green|Hollowell|Kingsferry""".replace("\n", "").split("|")
ADJECTIVES = """quiet golden broken gentle ancient bright crooked hollow frozen hidden lonely narrow patient rusty
silent tiny velvet wild yellow sleepy brave clever distant eager famous""".split()
NOUNS = """harbor lantern meadow violin compass orchard thunder feather castle pebble saddle window anchor basket
candle dragon engine forest garden hammer island jacket kettle ladder mirror needle""".split()
COMMON = """apple river stone table cloud horse paper music winter bottle camera doctor engine flower guitar hotel
island jungle kitchen letter market number office pencil quarter rabbit school ticket uncle valley wagon yellow zebra
bridge carpet desert eagle family glass hammer insect jacket kettle lemon mountain needle ocean pepper queen ribbon
silver temple umbrella village window branch candle dinner forest ground harbor""".split()


def full_names(rng, n):
    """n people of whom no two share a first or a last name, as long as there are enough names."""
    first, last = FIRST * (n // len(FIRST) + 1), LAST * (n // len(LAST) + 1)
    rng.shuffle(first)
    rng.shuffle(last)
    return [f"{a} {b}" for a, b in zip(first, last)][:n]


def choices(rng, values, n):
    """n of the values, without repetition where there are enough of them."""
    out = []
    while len(out) < n:
        out += rng.sample(values, min(len(values), n - len(out)))
    return out


def number(rng, digits):
    return str(rng.randrange(10 ** (digits - 1), 10 ** digits))


def letters(rng, n):
    return "".join(rng.choice(string.ascii_lowercase) for _ in range(n))


def different(rng, n, make):
    """n different values of make(rng), in the order in which they came."""
    out = {}
    while len(out) < n:
        out[make(rng)] = True
    return list(out)


def fitting(n, chars, each):
    """n, or as many things of so many characters each as there is room for."""
    return max(1, min(n, chars // each))


def random_uuid(rng):
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


# ---- filler ----

def sentences(text):
    return re.split(r"(?<=[.!?]) ", text)


def made_up_paragraph(rng):
    """Sentences from parts, for when filler.txt is used up."""
    def place():
        return rng.choice(["mill", "harbour", "school", "station", "workshop", "market", "bridge", "inn", "farm"])

    def who():
        return rng.choice(["the postman", "a traveller", "an old clerk", "the neighbours", "two brothers",
                           "somebody from the next valley", "the gardener", "a girl with a basket"])

    patterns = [
        lambda: f"On {rng.choice(['Monday', 'Friday', 'the first warm day', 'a grey morning'])} {who()} came to the "
                f"{place()} to look at a {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}.",
        lambda: f"The {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} behind the {place()} was {rng.choice(COLOURS)} "
                f"once, and {who()} still remembered it.",
        lambda: f"Nobody at the {place()} could say why the {rng.choice(NOUNS)} was kept next to the "
                f"{rng.choice(NOUNS)}.",
        lambda: f"It took {who()} {rng.choice(['an hour', 'all afternoon', 'most of a week', 'two winters'])} to mend "
                f"the {rng.choice(NOUNS)}, which was {rng.choice(['heavier', 'older', 'smaller', 'louder'])} than it "
                f"looked.",
        lambda: f"In {rng.choice(MONTHS)} there was talk of a new {place()}, but {who()} preferred the "
                f"{rng.choice(ADJECTIVES)} one.",
    ]
    return " ".join(rng.choice(patterns)() for _ in range(rng.randrange(4, 7)))


def read_filler(name):
    with open(os.path.join(HERE, name), encoding="utf-8") as f:
        return f.read()


FILLERS = {  # and how many characters a token of it has, under SmolLM2's tokenizer
    "prose": 4.4,
    "code": 3.06,
    "dialogue": 3.4,
    "list": 2.47,
    "german": 2.6,
}


def draw(rng, text, **known):
    """A unit of filler with its slots filled in: {{a|b|c}} one of these, {{3..40}} a number of that range,
    {{x=a|b}} one of these and the same again for every {{x}}."""

    def value(match):
        name, options = re.fullmatch(r"(?:(\w+)=)?(.*)", match[1]).groups()
        if options in known:
            return known[options]
        span = re.fullmatch(r"(-?\d+)\.\.(-?\d+)", options)
        out = str(rng.randint(int(span[1]), int(span[2]))) if span else rng.choice(options.split("|"))
        if name:
            known[name] = out
        return out
    return re.sub(r"\{\{(.+?)\}\}", value, text)


def units(rng, kind):
    """Without end: the units of a filler, in another order and with other slots whenever they are used up.
    A unit is a list of sentences or, where the kind has lines, of lines."""
    stock = []
    while kind != "prose":
        if not stock:
            stock = read_filler(f"filler_{kind}.txt").strip("\n").split("\n\n")
            rng.shuffle(stock)
        unit = draw(rng, stock.pop())
        yield sentences(unit) if kind == "german" else unit.split("\n")
    stock = read_filler("filler.txt").split("\n")[:-1]
    rng.shuffle(stock)
    while True:
        yield sentences(stock.pop() if stock else made_up_paragraph(rng))


def filler(rng, chars, kind="prose"):
    """Paragraphs of about so many characters together, each a list of sentences or lines."""
    out, source = [], units(rng, kind)
    while chars > 0:
        out.append(next(source))
        chars -= sum(len(s) + 1 for s in out[-1])
        while chars < 0 and len(out[-1]) > 1 and len(out[-1][-1]) <= -chars:
            chars += len(out[-1].pop()) + 1
    return out


def as_line(rng, fact, before, after, kind):
    """A fact in the shape of the filler's lines: a comment, an utterance, an item. after: "" at the end."""
    if kind == "code":
        like = after or before
        return like[:len(like) - len(like.lstrip())] + f"# {fact}"
    if kind == "dialogue":
        silent = {before.split(":")[0], after.split(":")[0]}  # nobody speaks twice in a row
        return f"{rng.choice([s for s in SPEAKERS if s not in silent])}: {fact}"
    return f"- {fact}" if kind == "list" else fact


SPEAKERS = ["RUTH", "OWEN", "MAEVE", "INGE"]


def hide(rng, chars, facts, kind="prose"):
    """A text of so many characters with the facts spread evenly over it, each between two sentences or lines."""
    own = sum(len(f) + 1 for f in facts)
    if kind != "prose":
        own *= FILLERS[kind] / 3.3  # characters a token of facts, with what makes lines of them
    paragraphs = filler(rng, max(1, chars - own), kind)
    places = [(p, s) for p, text in enumerate(paragraphs) for s in range(1, len(text) + 1)]
    at = [places[int((i + rng.random()) * len(places) / len(facts))] for i in range(len(facts))]
    for (p, s), fact in sorted(zip(at, facts), reverse=True):
        text = paragraphs[p]
        text.insert(s, as_line(rng, fact, text[s - 1], text[s] if s < len(text) else "", kind))
    between = " " if kind in ("prose", "german") else "\n"
    return "\n\n".join(between.join(p) for p in paragraphs)


def as_text(paragraphs):
    return "\n\n".join(" ".join(p) for p in paragraphs)


def ask(question, prefix, answers):
    answers = [answers] if isinstance(answers, str) else list(answers)
    return {"question": question, "answer_prefix": prefix, "answers": answers}


def task(name, context, questions, metric="contained", **more):
    return {"task": name, "context": context, "metric": metric, **more, "questions": questions}


def name_of(task_name, kind):
    return task_name if kind == "prose" else f"{task_name}_{kind}"
