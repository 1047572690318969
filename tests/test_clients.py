#!/usr/bin/env python3
"""test_clients.py: the clients that people have, as they come from PyPI, ask `run serve`.

Run by the virtual environment of `make clients` (tests/clients.txt), on the committed fixtures. What answers say is checked
in test_serve.py; here it is checked that clients send what is understood, understand what comes, and raise what they should.
"""
import json
import math
import os
import subprocess
import sys
import tempfile
from typing import Literal

import anthropic
import openai
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from checks import Tensors, check, end
from test_serve import MODEL, QUESTION, RUN, TEXT, Server, begin, busy, until

USER = [{"role": "user", "content": "Hello there"}]
FIXED = {"model": "smol", "messages": USER, "max_tokens": 8, "temperature": 0}
ASK = [{"role": "user", "content": QUESTION}]


class Mill(BaseModel):
    """What an answer of a form is read as."""
    builder: Literal["Ann", "Bo"]
    stands: bool


def openai_of(s, **more):
    return openai.OpenAI(base_url="http://127.0.0.1:%d/v1" % s.port, **{"api_key": "none", "max_retries": 0, "timeout": 60, **more})


def anthropic_of(s, **more):
    return anthropic.Anthropic(base_url="http://127.0.0.1:%d" % s.port, **{"api_key": "none", "max_retries": 0, "timeout": 60, **more})


def said(messages=USER, **more):
    """What anthropic's client takes, which knows no temperature; other fields go beside it."""
    fields = {key: more.pop(key) for key in ("system", "stop_sequences", "stream", "metadata") if key in more}
    return {"model": "smol", "messages": messages, "max_tokens": 8, "extra_body": {"temperature": 0, **more}, **fields}


def raised(kind, ask, status, what):
    """ask() raises the client's exception of this status; returns it."""
    try:
        ask()
    except kind as e:
        check(getattr(e, "status_code", status) == status, "%s: status %s, not %s" % (what, getattr(e, "status_code", None), status))
        return e
    except Exception as e:
        check(False, "%s: raises %r, not %s" % (what, e, kind.__name__))
    else:
        check(False, "%s: is answered" % what)


# ---- openai ----

def test_chat(s):
    chat = openai_of(s).chat.completions
    r = chat.create(**FIXED)
    text, usage = r.choices[0].message.content, r.usage
    check(text and r.choices[0].message.role == "assistant" and r.choices[0].finish_reason == "length", "openai: a chat")
    check((usage.completion_tokens, usage.total_tokens) == (8, usage.prompt_tokens + 8), "usage")
    check(chat.create(**FIXED).usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1, "cached tokens")
    pieces = list(chat.create(**FIXED, stream=True, stream_options={"include_usage": True}))
    check("".join(p.choices[0].delta.content or "" for p in pieces[:-1]) == text, "a stream says the same")
    check(pieces[-2].choices[0].finish_reason == "length" and pieces[-1].usage.completion_tokens == 8, "why it ends, usage")
    scores = chat.create(**FIXED, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    check(len(scores) == 8 and all(len(t.top_logprobs) == 3 and t.logprob == t.top_logprobs[0].logprob for t in scores), "logprobs")
    wanted = s.post("/tokenize", {"content": "Hello", "with_pieces": True})[1]["tokens"][0]
    biased = chat.create(**FIXED, logprobs=True, logit_bias={str(wanted["id"]): 100}).choices[0].logprobs.content
    check(biased[0].token == wanted["piece"] != scores[0].token, "logit_bias")
    part = next(text[i:i + 2] for i in range(2, len(text)) if text[i:i + 2] not in text[:i + 1] and "\ufffd" not in text[i:i + 2])
    cut = chat.create(**FIXED, stop=[part, "nowhere"]).choices[0]
    check(cut.message.content == text.split(part)[0] and cut.finish_reason == "stop", "stop")
    with chat.stream(**FIXED, stop=part) as stream:  # the client puts the pieces together
        done = [e.content for e in stream if e.type == "content.done"]
        check(done == [stream.get_final_completion().choices[0].message.content] == [text.split(part)[0]], "a stream as events")
    sampled = dict(FIXED, temperature=1.5, n=3, seed=7, top_p=0.9, presence_penalty=0.5, frequency_penalty=0.5)
    texts = [[c.message.content for c in chat.create(**sampled).choices] for _ in range(2)]
    check(texts[0] == texts[1] and len(set(texts[0])) == 3, "n choices, the same with one seed: %s" % texts)
    roles = [{"role": "developer", "content": "Be brief."}, *USER, {"role": "assistant", "content": text},
             {"role": "user", "content": [{"type": "text", "text": "And then?"}]}]
    limits = {"model": "smol", "messages": roles, "max_completion_tokens": 3, "temperature": 0}
    check(chat.create(**limits, user="me", store=False, metadata={"a": "b"}).usage.completion_tokens == 3, "roles, parts, limits")


def test_forms(s):
    chat = openai_of(s).chat.completions
    ask = {**FIXED, "max_tokens": 60}
    r = chat.parse(**ask, response_format=Mill)
    check(isinstance(r.choices[0].message.parsed, Mill), "openai: an answer of a form: %s" % r.choices[0].message.content)
    with chat.stream(**ask, response_format=Mill) as stream:
        for _ in stream:
            pass
        check(stream.get_final_completion().choices[0].message.parsed == r.choices[0].message.parsed, "in a stream")
    r = chat.create(**{**FIXED, "max_tokens": 300}, response_format={"type": "json_object"}).choices[0]
    if r.finish_reason == "stop":
        check(type(json.loads(r.message.content)) is dict, "an object: %s" % r.message.content)
    check(chat.create(**FIXED, response_format={"type": "text"}).choices[0].finish_reason == "length", "a text")
    raised(openai.LengthFinishReasonError, lambda: chat.parse(**{**FIXED, "max_tokens": 2}, response_format=Mill), None, "a form that is cut")


def test_completions(s):
    client = openai_of(s)
    r = client.completions.create(model="smol", prompt=["Hello there", "Hello"], max_tokens=4, temperature=0, logprobs=2, echo=True)
    check([c.text.startswith(p) for c, p in zip(r.choices, ("Hello there", "Hello"))] == [True, True], "openai: completions")
    scores = r.choices[0].logprobs
    check(scores.token_logprobs[0] is None and len(scores.tokens) == len(scores.top_logprobs) == len(scores.text_offset), "their logprobs")
    pieces = list(client.completions.create(model="smol", prompt="Hello", max_tokens=4, temperature=0, stream=True))
    check("Hello" + "".join(p.choices[0].text for p in pieces) == r.choices[1].text, "a stream of them")
    check([m.id for m in client.models.list()] == ["smol"] and client.models.retrieve("smol").id == "smol", "models")


def test_documents(s):
    chat = openai_of(s).chat.completions
    status, doc = s.post("/v1/documents?name=town&ratio=0.4", TEXT[:900])
    ask = dict(FIXED, messages=ASK)
    r = chat.create(**ask, extra_body={"document": "town"})
    cached = r.usage.prompt_tokens_details.cached_tokens
    check(status == 200 and cached == doc["tokens"] < r.usage.prompt_tokens, "openai: on a document: %s" % r.usage)
    text = "".join(p.choices[0].delta.content or "" for p in chat.create(**ask, extra_body={"document": "town"}, stream=True))
    check(text == r.choices[0].message.content, "in a stream")
    raised(openai.NotFoundError, lambda: chat.create(**ask, extra_body={"document": "nowhere"}), 404, "openai: no such document")
    r = anthropic_of(s).messages.create(**said(ASK, document="town"))
    check(r.content[0].text == text and r.usage.cache_read_input_tokens >= cached, "anthropic: on a document")
    r = model_of(s, extra_body={"document": "town"}).invoke(QUESTION)
    check(r.content == text and r.usage_metadata["input_token_details"]["cache_read"] >= cached, "langchain: on a document")


def test_errors(s):
    chat, say = openai_of(s).chat.completions, anthropic_of(s).messages
    e = raised(openai.BadRequestError, lambda: chat.create(**dict(FIXED, temperature=-1)), 400, "openai: temperature -1")
    check(e and (e.param, e.type) == ("temperature", "invalid_request_error") and "temperature" in e.message, "and names it: %s" % e)
    e = raised(openai.BadRequestError, lambda: chat.create(**dict(FIXED, messages=[{"role": "user", "content": "a " * 5000}])), 400, "too long")
    check(e and e.code == "context_length_exceeded", "by its code: %s" % e)
    raised(openai.InternalServerError, lambda: chat.create(**FIXED, extra_body={"grammar": "root ::= x"}), 501, "openai: grammar")
    raised(openai.NotFoundError, lambda: openai_of(s).embeddings.create(model="smol", input="a"), 404, "openai: embeddings")
    raised(openai.NotFoundError, lambda: openai_of(s).models.retrieve("other"), 404, "openai: no such model")
    for ask, kind, status, name in ((said(temperature=-1), anthropic.BadRequestError, 400, "invalid_request_error"),
                                    (said(document="x"), anthropic.NotFoundError, 404, "not_found_error"),
                                    (said(grammar="x"), anthropic.APIStatusError, 501, "api_error")):
        e = raised(kind, lambda: say.create(**ask), status, "anthropic: %d" % status)
        check(e and e.body["type"] == "error" and e.body["error"]["type"] == name, "and its type: %s" % (e and e.body))


def test_keys(folder):
    keys = os.path.join(folder, "keys")
    with open(keys, "w") as f:
        f.write("sesame\n")
    with Server("--api-key-file", keys) as s:
        check(openai_of(s, api_key="sesame").chat.completions.create(**FIXED).choices, "openai: with a key")
        check(anthropic_of(s, api_key="sesame").messages.create(**said()).content, "anthropic: with a key")
        check(model_of(s, api_key="sesame").invoke("Hello there").content, "langchain: with a key")
        raised(openai.AuthenticationError, lambda: openai_of(s).chat.completions.create(**FIXED), 401, "openai: without one")
        e = raised(anthropic.AuthenticationError, lambda: anthropic_of(s).messages.create(**said()), 401, "anthropic: without one")
        check(e and e.body["type"] == "error" and e.body["error"]["type"] == "authentication_error", "in its shape: %s" % (e and e.body))


def test_busy():
    """503 where too many wait; clients that try again get through."""
    with Server("--slots", 1, "--queue", 1) as s:
        many = {"prompt": ["Hello there"] * 200, "max_tokens": 1900, "ignore_eos": True}
        with begin(s, many, "/v1/completions"):
            check(until(lambda: s.chat("Hello")[0] == 503), "one request takes the slot, and its prompts the queue")
            e = raised(openai.InternalServerError, lambda: openai_of(s).chat.completions.create(**FIXED), 503, "openai: too many wait")
            check(e and e.code == "queue_full" and e.response.headers["retry-after"] == "1", "and when to try again")
            e = raised(anthropic.APIStatusError, lambda: anthropic_of(s).messages.create(**said()), 503, "anthropic: too many wait")
            check(e and e.body["error"]["type"] == "overloaded_error", "and its type: %s" % (e and e.body))
        check(openai_of(s, max_retries=5).chat.completions.create(**FIXED).choices, "openai: tries again")
        long = {**FIXED, "max_tokens": 1900, "stream": True, "extra_body": {"ignore_eos": True}}
        with openai_of(s).chat.completions.create(**long) as stream:
            next(iter(stream))
            check(busy(s) == 1, "a stream takes the slot")
        check(until(lambda: busy(s) == 0), "openai: closing a stream frees it")


# ---- anthropic ----

def test_anthropic(s):
    say = anthropic_of(s).messages
    text = openai_of(s).chat.completions.create(**FIXED).choices[0].message.content
    r = say.create(**said())
    check(r.content[0].text == text and r.stop_reason == "max_tokens" and r.usage.output_tokens == 8, "anthropic: messages")
    count = say.count_tokens(model="smol", messages=USER).input_tokens
    check(count == r.usage.input_tokens + r.usage.cache_read_input_tokens, "count_tokens")
    check(say.count_tokens(model="smol", messages=USER, system=TEXT[:300]).input_tokens > count, "with a system text")
    with say.stream(**said()) as stream:
        check("".join(stream.text_stream) == text, "a stream says the same")
        last = stream.get_final_message()
    check(last.stop_reason == "max_tokens" and last.usage.output_tokens == 8, "its last message")
    kinds = [e.type for e in say.create(**said(stream=True))]
    check(kinds[0] == "message_start" and kinds[-1] == "message_stop" and "content_block_delta" in kinds, "events: %s" % kinds)
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello there", "cache_control": {"type": "ephemeral"}}]}]
    r = say.create(**said(parts, system=[{"type": "text", "text": "Be brief."}], top_k=5, metadata={"user_id": "me"}))
    check(r.content[0].text and r.usage.cache_creation_input_tokens == 0, "parts, a system text, what means nothing here")
    part = next(text[i:i + 2] for i in range(2, len(text)) if text[i:i + 2] not in text[:i + 1] and "\ufffd" not in text[i:i + 2])
    form = say.parse(model="smol", messages=USER, max_tokens=60, output_format=Mill, extra_body={"temperature": 0})
    check(isinstance(form.parsed_output, Mill), "an answer of a form")
    r = say.create(**said(stop_sequences=[part]))
    check(r.stop_reason == "stop_sequence" and r.stop_sequence == part, "stop_sequences")


# ---- lm-eval ----

def tasks_in(folder):
    """The files of three tasks: likelihoods of choices, of whole texts, and answers that are written."""
    data = [{"question": TEXT[i:i + 200], "choices": [TEXT[i + 200:i + 240], " never", " again and again"], "answer": 0, "text": TEXT[i:i + 900]}
            for i in (0, 700, 1900)]
    with open(os.path.join(folder, "data.jsonl"), "w") as f:
        f.writelines(json.dumps(one) + "\n" for one in data)
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f.name}}, "test_split": "test"}
    for name, task in {
        "choice": {"output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}",
                   "target_delimiter": "", "metric_list": [{"metric": "acc"}]},
        "text": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
                 "metric_list": [{"metric": "bits_per_byte"}]},
        "writing": {"output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{choices[0]}}",
                    "generation_kwargs": {"until": [" the", "\n\n"], "max_gen_toks": 12}, "metric_list": [{"metric": "exact_match"}]},
    }.items():
        with open(os.path.join(folder, name + ".yaml"), "w") as f:
            json.dump({"task": "town_" + name, **common, **task}, f)  # JSON is YAML


def samples_of(folder, task):
    """What lm-eval asked and got: (arguments, answers) of each of its samples."""
    name = [os.path.join(d, n) for d, _, names in os.walk(folder) for n in names if n.startswith("samples_" + task)]
    check(len(name) == 1, "lm-eval: samples of %s: %s" % (task, name))
    with open(name[0]) as f:
        lines = [json.loads(line) for line in f]
    return [(list(args.values()), got) for one in lines for args, got in zip(one["arguments"].values(), one["resps"])]


def likelihood(folder, before, ids):
    """Sum of the logprobs of ids [before:], by `run logits`."""
    out, path = os.path.join(folder, "logits"), os.path.join(folder, "ids")
    with open(path, "w") as f:
        f.write(" ".join(map(str, ids)))
    subprocess.run([RUN, "logits", MODEL, "--ids", path, "-o", out, "-q", "-j", "1"], check=True)
    t = Tensors(out)
    logits, vocab, total = t["logits"], t.shape["logits"][1], 0
    for i in range(before, len(ids)):
        row = logits[(i - 1) * vocab:i * vocab]
        top = max(row)
        total += row[ids[i]] - top - math.log(sum(math.exp(x - top) for x in row))
    return total


def test_lm_eval(s, folder):
    def ids_of(text):
        return s.post("/tokenize", {"prompt": text, "add_special_tokens": False})[1]["tokens"]

    tasks_in(folder)
    out = os.path.join(folder, "out")
    args = "model=smol,base_url=http://127.0.0.1:%d/v1/completions,num_concurrent=1,max_length=2048" % s.port
    env = dict(os.environ, HF_HOME=os.path.join(folder, "hf"), HF_DATASETS_OFFLINE="1", HF_HUB_OFFLINE="1")
    p = subprocess.run([sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", args, "--include_path", folder,
                        "--tasks", "town_choice", "town_text", "town_writing", "--batch_size", "2", "--output_path", out, "--log_samples"],
                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, timeout=170)
    check(p.returncode == 0, "lm-eval: status %d: %s" % (p.returncode, p.stdout.decode()[-2000:]))
    far = []
    for (context, more), got in samples_of(out, "town_choice"):
        head = ids_of(context.rstrip())  # as lm-eval cuts: white space goes to what follows
        ids = head + ids_of(context + more)[len(head):]
        far.append(abs(float(got[0][0]) - likelihood(folder, len(head), ids)))
    check(len(far) == 9 and max(far) < 1e-3, "lm-eval: likelihoods of choices are those of `run logits`: %s away" % far)
    start, far = ids_of(s.get("/tokenizer_info")[1]["eos_token"]), []
    for (text,), got in samples_of(out, "town_text"):
        far.append(abs(float(got[0][0] if type(got[0]) is list else got[0]) - likelihood(folder, 1, start + ids_of(text))))
    check(len(start) == 1 and len(far) == 3 and max(far) < 1e-3, "of whole texts: %s away" % far)
    for (context, how), got in samples_of(out, "town_writing"):
        r = s.post("/v1/completions", {"prompt": context, "max_tokens": 12, "temperature": 0, "stop": [" the", "\n\n"]})[1]
        check(got == [r["choices"][0]["text"]], "what it writes: %r" % got)


# ---- langchain ----

def model_of(s, **more):
    fixed = {"model": "smol", "temperature": 0, "max_tokens": 8, "api_key": "none", "max_retries": 0, "timeout": 60}
    return ChatOpenAI(base_url="http://127.0.0.1:%d/v1" % s.port, **{**fixed, **more})


def test_langchain(s):
    model = model_of(s)
    text = model.invoke("Hello there").content
    check(text == openai_of(s).chat.completions.create(**FIXED).choices[0].message.content, "langchain: invoke")
    check("".join(c.content for c in model.stream("Hello there")) == text, "stream")
    got = model.batch(["Hello there", "Who?", "Hello there"])
    check([r.content for r in (got[0], got[2])] == [text] * 2 and got[1].content != text, "batch")
    r = model.invoke([("system", "Be brief."), ("human", "Hello there")], stop=["\n"])
    check(r.content and r.usage_metadata["output_tokens"] <= 8 and r.response_metadata["model_name"] == "smol", "messages, usage")
    form = model_of(s, max_tokens=60).with_structured_output(Mill, method="json_schema")
    check(isinstance(form.invoke("Hello there"), Mill), "structured output")


def main():
    with Server() as s:
        for test in (test_chat, test_forms, test_completions, test_documents, test_errors, test_anthropic, test_langchain):
            test(s)
    with tempfile.TemporaryDirectory() as folder:
        test_keys(folder)
    with tempfile.TemporaryDirectory() as folder, Server() as s:
        test_lm_eval(s, folder)
    test_busy()
    check(s.code == 0, "SIGTERM: exit %s, %s" % (s.code, s.err))
    return end("test_clients")


if __name__ == "__main__":
    sys.exit(main())
