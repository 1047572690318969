#!/usr/bin/env python3
"""test_answers.py: how answers are made, through the command line: samplers and forms that answers must have.

Runs ./run (or $RUN) and build/test_constrain (or $BUILD's) on a committed fixture. Needs nothing but Python's standard
library. The last line says how many checks passed and failed.
"""
import json
import os
import random
import subprocess
import sys
import tempfile

from checks import check, end

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
RUN = os.environ.get("RUN", os.path.join(ROOT, "run"))
FORMS = os.path.join(os.environ.get("BUILD", os.path.join(ROOT, "build")), "test_constrain")
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


# ---- forms ----

def is_type(v, name):
    """Whether v is of a type of JSON Schema; Python's True is an int, JSON's is none."""
    number = isinstance(v, (int, float)) and not isinstance(v, bool)
    return {"null": v is None, "boolean": isinstance(v, bool), "string": isinstance(v, str), "array": isinstance(v, list),
            "object": isinstance(v, dict), "number": number, "integer": number and v == int(v)}[name]


def same(a, b):
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def valid(v, s, top):
    """JSON Schema's own rules, for the keywords that are supported (draft 2020-12)."""
    if s is True:
        return True
    if "$ref" in s and not valid(v, top if s["$ref"] == "#" else top["$defs"][s["$ref"].split("/")[2]], top):
        return False
    types = s.get("type", [])
    types = [types] if isinstance(types, str) else types
    if types and not any(is_type(v, t) for t in types):
        return False
    if "enum" in s and not any(same(v, e) for e in s["enum"]) or "const" in s and not same(v, s["const"]):
        return False
    if "anyOf" in s and not any(valid(v, one, top) for one in s["anyOf"]):
        return False
    if isinstance(v, str) and not s.get("minLength", 0) <= len(v) <= s.get("maxLength", len(v)):
        return False
    if isinstance(v, list):
        if not s.get("minItems", 0) <= len(v) <= s.get("maxItems", len(v)) or not all(valid(x, s.get("items", True), top) for x in v):
            return False
    if isinstance(v, dict):
        properties, extra = s.get("properties", {}), s.get("additionalProperties", True)
        if not all(k in v for k in s.get("required", [])):
            return False
        for k, x in v.items():
            one = properties.get(k, extra)
            if one is False or not valid(x, one, top):
                return False
    return True


NAMES = ["a", "name", "the", "", "x y", "\u00e9\u4e16", "q\"uote", "\U0001f600", "new\nline", "b"]
PLAIN = [None, True, False, 0, -1, 12, 123, 1.5, "", "red", "green", "gr\u00fcn", "\U0001f600", [1, "a"], {"k": [None]}, {}]


def make_schema(rng, depth, defs):
    kind = rng.choice(["object", "object", "map", "array", "string", "integer", "number", "boolean", "null", "enum", "const",
                       "anyOf", "types", "ref", "any"] if depth > 0 else ["string", "integer", "number", "boolean", "null", "enum", "const"])
    deeper = lambda: make_schema(rng, depth - 1, defs)
    s = {"type": kind}
    if kind == "object":
        names = rng.sample(NAMES, rng.randrange(5))
        s["properties"] = {k: deeper() for k in names}
        s["required"] = [k for k in names if rng.random() < 0.5]
        if rng.random() < 0.5 or not names:
            s["additionalProperties"] = False
    elif kind == "map":
        s = {"type": "object", "additionalProperties": rng.choice([True, deeper()])}
    elif kind == "array":
        if rng.random() < 0.8:
            s["items"] = deeper()
        if rng.random() < 0.5:
            s["minItems"] = rng.randrange(3)
        if rng.random() < 0.5:
            s["maxItems"] = s.get("minItems", 0) + rng.randrange(3)
    elif kind == "string":
        if rng.random() < 0.4:
            s["minLength"] = rng.randrange(4)
        if rng.random() < 0.4:
            s["maxLength"] = s.get("minLength", 0) + rng.randrange(5)
    elif kind == "enum":
        s = {"enum": rng.sample(PLAIN, 1 + rng.randrange(6))}
        if rng.random() < 0.3 and any(isinstance(v, str) for v in s["enum"]):
            s["type"] = "string"
    elif kind == "const":
        s = {"const": rng.choice(PLAIN)}
    elif kind == "anyOf":
        s = {"anyOf": [deeper() for _ in range(1 + rng.randrange(3))]}
    elif kind == "types":
        s = {"type": rng.sample(["object", "array", "string", "number", "integer", "boolean", "null"], 2)}
    elif kind == "ref":
        s = {"$ref": rng.choice(["#/$defs/%s" % d for d in defs])} if defs else {}
    elif kind == "any":
        s = rng.choice([True, {}, {"description": "anything", "title": "x"}])
    if isinstance(s, dict) and rng.random() < 0.2:
        s["description"] = "a note"
    return s


def make_top(rng):
    top = make_schema(rng, 3, ["p", "q"])
    if not isinstance(top, dict):
        return top
    # A definition that names itself has a way out, so that it has values.
    top["$defs"] = {"p": make_schema(rng, 1, []),
                    "q": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#/$defs/q"}}, {"$ref": "#/$defs/p"}]}}
    return top


def make_value(rng, s, top, depth=0):
    """A valid value with its properties in the schema's order; None, None where none is found."""
    if s is True or not set(s) & {"type", "enum", "const", "anyOf", "$ref"}:
        return rng.choice(PLAIN)
    if "$ref" in s:
        return make_value(rng, top["$defs"][s["$ref"].split("/")[2]], top, depth + 1)
    if "anyOf" in s:
        return make_value(rng, rng.choice(s["anyOf"][:1] if depth > 6 else s["anyOf"]), top, depth + 1)
    if "const" in s:
        return s["const"]
    if "enum" in s:
        return rng.choice([v for v in s["enum"] if "type" not in s or is_type(v, s["type"])])
    kind = s["type"] if isinstance(s["type"], str) else rng.choice(s["type"])
    if kind == "object" and s.get("properties"):
        return {k: make_value(rng, one, top, depth + 1) for k, one in s["properties"].items() if k in s["required"] or rng.random() < 0.5}
    if kind == "object" and s.get("additionalProperties", True) is not False:
        return {k: make_value(rng, s.get("additionalProperties", True), top, depth + 1) for k in rng.sample(NAMES, rng.randrange(3))}
    if kind == "array":
        lo = s.get("minItems", 0)
        return [make_value(rng, s.get("items", True), top, depth + 1) for _ in range(rng.randint(lo, min(s.get("maxItems", 9), lo + 2)))]
    if kind == "string":
        lo = s.get("minLength", 0)
        return "".join(rng.choice('ab "\\\n\u00e9\u20ac\U0001f600') for _ in range(rng.randint(lo, min(s.get("maxLength", 9), lo + 4))))
    return {"object": {}, "integer": rng.randint(-99, 10 ** 9), "number": rng.choice([0, -0.25, 1e20, 3.5e-7]), "boolean": True, "null": None}[kind]


def forms(lines, seed):
    p = subprocess.run([FORMS, "answers", str(seed)], input="\n".join(lines).encode() + b"\n", capture_output=True, timeout=300)
    check(p.returncode == 0, "test_constrain answers: exit %s, %s" % (p.returncode, p.stdout[-300:]))
    return p.stdout.decode().splitlines()


def test_random_schemas(n=int(os.environ.get("SCHEMAS", "250")), seed=int(os.environ.get("SEED", "1"))):
    """Whatever random logits write under a random schema parses and is valid once it is over."""
    rng = random.Random(seed)
    tops = [make_top(rng) for _ in range(n)]
    out, over = forms([json.dumps(t) for t in tops], seed), 0
    check(len(out) == 6 * n, "%d answers of %d schemas" % (len(out), n))
    if len(out) != 6 * n:
        return
    for top, lines in zip(tops, [out[6 * i:6 * i + 6] for i in range(n)]):
        for line in lines:
            text, how = line.rsplit(" ", 1)
            if how == "cut":
                continue
            over += 1
            try:
                check(valid(json.loads(bytes.fromhex(text).decode("utf-8")), top, top), "%s: %s" % (json.dumps(top), bytes.fromhex(text)))
            except ValueError as e:
                check(False, "%s: %s: %s" % (json.dumps(top), bytes.fromhex(text), e))
    check(over > 4 * n, "%d of %d answers are over" % (over, 6 * n))


def test_values_taken(n=400):
    """What a schema allows can be written, compact, with spaces, over lines, with tabs."""
    rng = random.Random(5)
    lines = []
    for _ in range(n):
        top = make_top(rng)
        value = make_value(rng, top, top)
        if not valid(value, top, top):
            check(False, "the test makes what is not valid: %s of %s" % (value, top))
        if any(k in json.dumps(top) for k in ("enum", "const")):  # listed values are spelled one way
            spelled = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        else:
            style = rng.choice([{}, {"indent": 2}, {"indent": 4}, {"indent": "\t"}, {"separators": (",", ":")}])
            spelled = json.dumps(value, ensure_ascii=False, **style)
        lines.append(json.dumps(top) + "\t" + spelled.replace("\n", "\1"))
    for line, said in zip(lines, forms(lines, 1)):
        check(said == "yes", "%s: %s" % (said, line))


UNSUPPORTED = {"pattern": "a", "format": "date", "minimum": 1, "maximum": 2, "exclusiveMinimum": 0, "exclusiveMaximum": 9, "multipleOf": 2,
               "oneOf": [{}], "allOf": [{}], "not": {}, "if": {}, "then": {}, "else": {}, "uniqueItems": True, "contains": {}, "prefixItems": [{}],
               "minProperties": 1, "maxProperties": 2, "patternProperties": {}, "propertyNames": {}, "dependentRequired": {},
               "dependentSchemas": {}, "unevaluatedProperties": False, "unevaluatedItems": False, "$dynamicRef": "#", "$anchor": "a",
               "nullable": True, "minContains": 1, "contentEncoding": "base64", "discriminator": {}}


def test_unsupported():
    """Whatever is not supported is refused by name and place, wherever it stands."""
    wraps = [("", lambda s: s), ("/properties/a", lambda s: {"type": "object", "properties": {"a": s}}),
             ("/items", lambda s: {"type": "array", "items": s}), ("/anyOf/1", lambda s: {"anyOf": [{}, s]}),
             ("/additionalProperties", lambda s: {"type": "object", "additionalProperties": s}),
             ("/$defs/d", lambda s: {"$ref": "#/$defs/d", "$defs": {"d": s}})]
    cases = [(place, key, wrap({"type": "string", key: value})) for key, value in UNSUPPORTED.items() for place, wrap in wraps]
    for (place, key, _), said in zip(cases, forms([json.dumps(s) for _, _, s in cases], 1)):
        check(said == 'refused #%s: "%s" is not supported' % (place, key), "%s at %s: %s" % (key, place, said))


PERSON = {"type": "object", "properties": {"n": {"type": "integer"}, "who": {"enum": ["Chen", "Mar\u00eda"]}}, "required": ["n", "who"]}


def test_form_flags(d):
    path = os.path.join(d, "schema.json")
    with open(path, "w") as f:
        json.dump(PERSON, f)
    models = [os.path.join(HERE, "fixtures", m + ".kvz") for m in ("smol", "llama", "gemma3", "qwen3")]
    for model in models:
        for seed in range(3):
            p = ["generate", model, "-p", "a", "-n", 200, "--temp", 1.5, "--seed", seed, "--json", "-j", 1, "-q"]
            code, out, err = run(*p, "--json-schema", path)
            row = json.loads(out) if code == 0 else {}
            check(code == 0 and row["finish_reason"] == "stop" and valid(json.loads(row["text"]), PERSON, PERSON), "%s: %s %s" % (model, row, err))
    p = ["generate", SMOL, "-p", "a", "-j", 1, "-q"]
    code, out, err = run(*p, "--json-schema", json.dumps(PERSON), "-n", 100)
    check(code == 0 and valid(json.loads(out), PERSON, PERSON), "a schema as text: %s %s" % (out, err))
    code, out, _ = run(*p, "--json-schema", '{"type": "array", "minItems": 99}', "-n", 9, "--json")
    check(code == 0 and json.loads(out)["finish_reason"] == "length", "a limit cuts: %s" % out)
    code, out, _ = run(*p, "--json-object", "-n", 300, "--temp", 0, "--logit-bias", "%d=100" % token("}"))
    check(code == 0 and json.loads(out) == {}, "--json-object: %s" % out)
    cache = os.path.join(d, "a.kvc")
    check(run("compress", SMOL, "-p", "The code of Chen is 12.", "-o", cache, "-q")[0] == 0, "compress")
    code, out, err = run("ask", SMOL, cache, "Who?", "What?", "--json-schema", path, "--json", "-n", 200, "-q", "-j", 1)
    rows = [json.loads(line)["answer"] for line in out.splitlines()]
    check(code == 0 and len(rows) == 2 and all(valid(json.loads(r), PERSON, PERSON) for r in rows), "ask: %s %s" % (rows, err))
    chat = subprocess.run([RUN, "chat", SMOL, "--json-schema", path, "-q", "--json", "-n", "200"], input=b"Who?\nAnd who?\n", capture_output=True)
    rows = [json.loads(line)["answer"] for line in chat.stdout.splitlines()]
    check(len(rows) == 2 and all(valid(json.loads(r), PERSON, PERSON) for r in rows), "chat: %s %s" % (rows, chat.stderr))
    refused(1, '--json-schema: #: "oneOf" is not supported', *p, "--json-schema", '{"oneOf": [{}]}')
    refused(1, "--json-schema: byte 1: expected", *p, "--json-schema", '{a')
    refused(1, "No such file", *p, "--json-schema", path + "x")
    refused(2, "--json-object has no effect: --json-schema", *p, "--json-object", "--json-schema", path)


def token(text):
    out = run("tokenize", SMOL, "-p", text)[1]
    return int(out.split()[0])


def main():
    test_samplers()
    test_sampler_flags()
    test_random_schemas()
    test_values_taken()
    test_unsupported()
    with tempfile.TemporaryDirectory() as d:
        test_form_flags(d)
    return end("test_answers")


if __name__ == "__main__":
    sys.exit(main())
