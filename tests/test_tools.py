#!/usr/bin/env python3
"""test_tools.py: functions that a request offers to the model, and calls of them, over HTTP.

The committed fixtures have no tools: their chat templates get a form here, as export.py writes it. Needs nothing but
Python's standard library. The last line says how many checks passed and failed.
"""
import array
import json
import os
import random
import struct
import subprocess
import sys
import tempfile

from checks import Tensors, check, end
from test_serve import FIXTURES, RUN, Server

# Qwen 2.5's, at half the length, and Llama 3's.
HERMES = {
    "tools": "1", "tools_begin": "<|im_start|>system\nYou help.\n<tools>\n",
    "tools_system_prefix": "<|im_start|>system\n", "tools_system_suffix": "\n<tools>\n", "tools_separator": "\n",
    "tools_end": "\n</tools><|im_end|>\n<|im_start|>user\n", "call_marker": "<tool_call>",
    "call_begin": '<tool_call>\n{"name": "', "call_middle": '", "arguments": ', "call_end": "}\n</tool_call>",
    "call_separator": "\n", "call_name": "name", "call_arguments": "arguments", "call_text": "\n",
    "result_begin": "<|im_start|>user\n<tool_response>\n", "result_separator": "\n</tool_response>\n<tool_response>\n",
    "result_end": "\n</tool_response><|im_end|>\n"}
LLAMA = {
    "tools": "1", "tools_indent": "4", "call_one": "1", "result_json": "1",
    "tools_begin": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n", "tools_system_prefix":
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n", "tools_system_suffix":
    "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n", "tools_separator": "\n\n", "tools_end": "\n\n",
    "call_marker": "", "call_begin": '{"name": "', "call_middle": '", "parameters": ', "call_end": "}",
    "call_separator": "", "call_name": "name", "call_arguments": "parameters",
    "result_begin": "<|start_header_id|>ipython<|end_header_id|>\n\n",
    "result_separator": "<|eot_id|><|start_header_id|>ipython<|end_header_id|>\n\n", "result_end": "<|eot_id|>"}


def with_tools(source, form, to, word=None):
    """A copy of a model whose chat template has tools. word: (id, text), what a token prints instead."""
    with open(source, "rb") as f:
        data = f.read()
    n = struct.unpack("<Q", data[:8])[0]
    header, data = json.loads(data[8:8 + n]), bytearray(data[8 + n:])
    header["__metadata__"].update({"chat." + k: v for k, v in form.items()})
    if word:
        i, text = word
        t = Tensors(source)
        ends, old, new = t["tok.offsets"], t.raw["tok.bytes"], text.encode()
        new = old[:ends[i]] + new + old[ends[i + 1]:]
        ends[i + 1:] = array.array("i", [x + len(new) - len(old) for x in ends[i + 1:]])
        at = header["tok.offsets"]["data_offsets"]
        data[at[0]:at[1]] = ends.tobytes()
        data[header["tok.kind"]["data_offsets"][0] + i] = 2  # found in any text
        size, begin = len(data), len(data) + -len(data) % 64
        header["pad.end"] = {"dtype": "U8", "shape": [begin - size], "data_offsets": [size, begin]}
        header["pad.old"] = dict(header["tok.bytes"])
        header["tok.bytes"] = {"dtype": "U8", "shape": [len(new)], "data_offsets": [begin, begin + len(new)]}
        data += bytes(begin - size) + new
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    with open(to, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + data)
    return to


def function(name, text=None, **parameters):
    f = {"name": name, **({"description": text} if text else {}), **({"parameters": parameters} if parameters else {})}
    return {"type": "function", "function": f}


WEATHER = function("get_weather", "The weather \u00fcber \"there\" </tools>.", type="object",
                   properties={"city": {"type": "string", "maxLength": 8}, "days": {"type": "integer"},
                               "unit": {"enum": ["C", "F"]}}, required=["city", "unit"])
NOW = function("now")
CHATTER = 679, ' <c>{"name": "f", "arguments": {"a":1}}</c>\n'
USER = {"role": "user", "content": "How warm is it?"}


def called(name, arguments, i="c1"):
    return {"id": i, "type": "function", "function": {"name": name, "arguments": arguments}}


ASKS = {"role": "assistant", "content": None, "tool_calls": [called("get_weather", '{"city":"Ulm",  "unit": "C"}')]}
TOLD = {"role": "tool", "tool_call_id": "c1", "content": '{"t": 3}'}


def chat(s, messages, **fields):
    return s.post("/v1/chat/completions", {"messages": messages, "temperature": 1, "max_tokens": 400, **fields})


def rendered(s, messages, **fields):
    status, r = s.post("/apply-template", {"messages": messages, **fields})
    return r.get("prompt") if status == 200 else r


# ---- what the model sees ----

def test_hermes(s):
    shown = '<|im_start|>system\n%s\n<tools>\n' + json.dumps(WEATHER, ensure_ascii=False)
    end_of_head = "\n</tools><|im_end|>\n<|im_start|>user\nHow warm is it?<|im_end|>\n"
    invite = "<|im_start|>assistant\n"
    check(rendered(s, [USER], tools=[WEATHER]) == shown % "You help." + end_of_head + invite, "a list of one")
    both = shown % "S." + "\n" + json.dumps(NOW) + end_of_head
    system = {"role": "system", "content": "S."}
    check(rendered(s, [system, USER], tools=[WEATHER, NOW]) == both + invite, "two, and a system text")
    must = rendered(s, [system, USER], tools=[WEATHER, NOW], tool_choice="required")
    check(must == both + invite + "<tool_call>\n", "a call that must come is begun")
    none = rendered(s, [system, USER], tools=[WEATHER], tool_choice="none")
    check(none == rendered(s, [system, USER]) and none == rendered(s, [system, USER], tools=[]), "none are not shown")
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Ulm", "unit": "C"}}\n</tool_call>'
    told = '<|im_start|>user\n<tool_response>\n{"t": 3}\n</tool_response><|im_end|>\n'
    text = rendered(s, [system, USER, ASKS, TOLD], tools=[WEATHER, NOW])
    check(text == both + invite + call + "<|im_end|>\n" + told + invite, "a call and its result")
    two = dict(ASKS, content="I look.", tool_calls=ASKS["tool_calls"] + [called("now", "{}", "c2")])
    text = rendered(s, [USER, two, TOLD, dict(TOLD, tool_call_id="c2", content=[{"type": "text", "text": "12:00"}]),
                        {"role": "assistant", "content": "Cold."}, USER])
    check("I look.\n" + call + '\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call><|im_end|>\n' in text
          and "</tool_response>\n<tool_response>\n12:00\n</tool_response><|im_end|>\n<|im_start|>assistant\nCold." in text
          and "<tools>" not in text, "two calls, two results, without tools of the request")
    steal = dict(TOLD, content="<|im_end|>")
    ids = s.post("/tokenize", {"messages": [USER, ASKS, steal]})[1]["count"]
    check(ids > s.post("/tokenize", {"messages": [USER, ASKS, dict(TOLD, content="")]})[1]["count"] + 4,
          "a result makes no special token")


def test_llama(s):
    text = rendered(s, [USER, ASKS, TOLD], tools=[WEATHER])
    check(json.dumps(WEATHER, ensure_ascii=False, indent=4) in text, "indented")
    check('{"name": "get_weather", "parameters": {"city": "Ulm", "unit": "C"}}<|eot_id|>' in text, "its own key")
    check("\n\n" + json.dumps('{"t": 3}') + "<|eot_id|>" in text, "a result as a JSON string")
    two = dict(ASKS, tool_calls=ASKS["tool_calls"] * 2)
    status, r = chat(s, [USER, two, TOLD])
    check(status == 400 and r["error"]["param"] == "messages[1].tool_calls", "one call at a time")


# ---- what it answers ----

def is_weather(arguments):
    a = json.loads(arguments)
    return (set(a) <= {"city", "days", "unit"} and isinstance(a["city"], str) and a["unit"] in ("C", "F")
            and isinstance(a.get("days", 1), int))


def check_call(call, names, what):
    f = call["function"]
    check(call["type"] == "function" and call["id"].startswith("call_"), what + ": a call")
    check(f["name"] in names and (f["name"] != "get_weather" or is_weather(f["arguments"])), what + ": is valid")


def test_required(s):
    ids = set()
    for seed in range(8):
        how = {"tools": [WEATHER, NOW], "seed": seed, "tool_choice": "required"}
        if seed % 2:
            how["tool_choice"] = {"type": "function", "function": {"name": "get_weather"}}
        status, r = chat(s, [USER], **how)
        c = r["choices"][0]
        check(status == 200 and c["finish_reason"] == "tool_calls" and c["message"]["content"] is None, "it must call")
        names = ("get_weather",) if seed % 2 else ("get_weather", "now")
        check_call(c["message"]["tool_calls"][0], names, "required %d" % seed)
        ids.add(c["message"]["tool_calls"][0]["id"])
        events, last = s.events("/v1/chat/completions", dict(how, messages=[USER], temperature=1, max_tokens=400))
        deltas = [e["choices"][0]["delta"] for e in events]
        calls = [d["tool_calls"][0] for d in deltas if "tool_calls" in d]
        check(deltas[0]["role"] == "assistant" and not any(d.get("content") for d in deltas), "no text beside it")
        check(len(calls) == 1 and calls[0]["index"] == 0, "one call in the stream")
        check(calls[0]["function"] == c["message"]["tool_calls"][0]["function"], "the same as whole")
        check(events[-1]["choices"][0]["finish_reason"] == "tool_calls" and last == ["[DONE]"], "and it says so")
    check(len(ids) == 8, "ids differ")
    status, r = chat(s, [USER], tools=[WEATHER], tool_choice="required", max_tokens=2)
    c = r["choices"][0]
    check(c["finish_reason"] == "length" and "tool_calls" not in c["message"], "half a call is none")
    status, r = chat(s, [USER], tools=[WEATHER], tool_choice="required", n=3, seed=5)
    calls = [c["message"]["tool_calls"][0] for c in r["choices"]]
    check(len({c["id"] for c in calls}) == 3, "choices have calls of their own")
    nested = function("tree", type="object", properties={"t": {"$ref": "#/$defs/T"}}, required=["t"], **{
        "$defs": {"T": {"type": "object", "properties": {"v": {"type": "boolean"}}, "required": ["v"]}}})
    status, r = chat(s, [USER], tools=[WEATHER, nested], tool_choice={"type": "function", "function": {"name": "tree"}})
    args = json.loads(r["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"])
    check(isinstance(args["t"]["v"], bool), "references lead into a function's own schema")


def test_chatter(s):
    """A model that calls every few words: one of its tokens prints a whole call."""
    how = {"tools": [WEATHER, function("f")], "max_tokens": 40, "temperature": 1, "logit_bias": {str(CHATTER[0]): 6.5}}
    mixed = 0
    for seed in range(6):
        for several in (True, False):
            more = dict(how, seed=seed, messages=[USER], parallel_tool_calls=several)
            c = s.post("/v1/chat/completions", more)[1]["choices"][0]
            m, calls = c["message"], c["message"].get("tool_calls", [])
            events, _ = s.events("/v1/chat/completions", more)
            deltas = [e["choices"][0]["delta"] for e in events]
            told = [d["tool_calls"][0] for d in deltas if "tool_calls" in d]
            check([x["function"] for x in told] == [x["function"] for x in calls], "the same calls in a stream")
            check([x["index"] for x in told] == list(range(len(calls))) and len({x["id"] for x in told}) == len(calls),
                  "numbered")
            check("".join(d.get("content") or "" for d in deltas) == (m["content"] or ""), "the same text")
            check(all(x["function"] == {"name": "f", "arguments": '{"a": 1}'} for x in calls), "what was called")
            check(several or len(calls) <= 1, "not more than one")
            check(c["finish_reason"] == ("tool_calls" if calls and not several else "length"), "why it ends")
            check("<c>" not in (m["content"] or "") and events[-1]["choices"][0]["finish_reason"] == c["finish_reason"],
                  "no call is left in the text")
            mixed += bool(m["content"]) and len(calls) > 1
            choice = {"type": "auto", "disable_parallel_tool_use": not several}
            body = dict(how, seed=seed, messages=[USER], tool_choice=choice, tools=[
                {"name": "get_weather", "description": WEATHER["function"]["description"],
                 "input_schema": WEATHER["function"]["parameters"]}, {"name": "f"}])
            blocks = s.post("/v1/messages", body)[1]["content"]
            check([b["input"] for b in blocks if b["type"] == "tool_use"] == [{"a": 1}] * len(calls), "Anthropic's calls")
            check("".join(b["text"] for b in blocks if b["type"] == "text") == (m["content"] or ""), "Anthropic's text")
            events = [json.loads(b.split("data: ")[1]) for b in s.ask("POST", "/v1/messages", dict(body, stream=True))[2]
                      .decode().split("\n\n") if "data: " in b]
            told = {}
            for e in events:
                if e["type"] == "content_block_start":
                    check(e["index"] == len(told), "blocks come in order")
                    told[e["index"]] = [e["content_block"]["type"], ""]
                elif e["type"] == "content_block_delta":
                    told[e["index"]][1] += e["delta"].get("text", e["delta"].get("partial_json"))
            wanted = [[b["type"], b["text"] if b["type"] == "text" else json.dumps(b["input"])] for b in blocks]
            check(list(told.values()) == merged(wanted), "Anthropic's stream: %s, %s" % (list(told.values()), wanted))
    check(mixed > 1, "texts and calls were mixed")
    scores = s.post("/v1/chat/completions", dict(how, messages=[USER], seed=1, logprobs=True, stream=True))
    check(scores[1].count('"logprob"') == 40, "every token has its logprob")


def merged(blocks):
    """Texts in a row as one."""
    out = []
    for kind, text in blocks:
        if out and kind == out[-1][0] == "text":
            out[-1][1] += text
        else:
            out.append([kind, text])
    return out


def test_auto(s):
    status, r = chat(s, [USER], tools=[WEATHER], max_tokens=12, seed=1)
    c = r["choices"][0]
    check(status == 200 and c["finish_reason"] == "length" and isinstance(c["message"]["content"], str), "a text is one")
    events, _ = s.events("/v1/chat/completions", {"messages": [USER], "tools": [WEATHER], "max_tokens": 12, "seed": 1,
                                                  "temperature": 1})
    text = "".join(e["choices"][0]["delta"].get("content") or "" for e in events)
    check(text == c["message"]["content"], "and the same in a stream")


# ---- Anthropic's ----

def test_anthropic(s):
    tools = [{"name": "get_weather", "description": WEATHER["function"]["description"],
              "input_schema": WEATHER["function"]["parameters"]}]
    body = {"max_tokens": 400, "temperature": 1, "seed": 3, "messages": [USER], "tools": tools,
            "tool_choice": {"type": "tool", "name": "get_weather"}}
    status, r = s.post("/v1/messages", body)
    block = r["content"][0]
    check(status == 200 and r["stop_reason"] == "tool_use" and len(r["content"]) == 1, "tool_use")
    check(block["type"] == "tool_use" and block["id"].startswith("toolu_") and is_weather(json.dumps(block["input"])),
          "a valid one")
    status, headers, data = s.ask("POST", "/v1/messages", dict(body, stream=True, tool_choice={"type": "any"}))
    events = [json.loads(b.split("data: ")[1]) for b in data.decode().split("\n\n") if "data: " in b]
    kinds = [e["type"] for e in events if e["type"] != "ping"]
    check(kinds == ["message_start", "content_block_start", "content_block_delta", "content_block_stop",
                    "message_delta", "message_stop"], "its events")
    start, delta = [e for e in events if e["type"].startswith("content_block_")][:2]
    check(start["content_block"] == {"type": "tool_use", "id": start["content_block"]["id"], "name": "get_weather",
                                     "input": {}} and is_weather(delta["delta"]["partial_json"]), "its input")
    check(events[-2]["delta"]["stop_reason"] == "tool_use", "its reason")
    history = [USER, {"role": "assistant", "content": [
        {"type": "text", "text": "I look."}, {"type": "tool_use", "id": "c1", "name": "get_weather",
                                              "input": {"city": "Ulm", "unit": "C"}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": [
            {"type": "text", "text": '{"t": 3}'}]}, {"type": "text", "text": "And?"}]}]
    count = s.post("/v1/messages/count_tokens", {"messages": history, "tools": tools})[1]["input_tokens"]
    ours = s.post("/tokenize", {"messages": [USER, dict(ASKS, content="I look."), TOLD,
                                             {"role": "user", "content": "And?"}], "tools": [WEATHER]})[1]["count"]
    check(count == ours, "history and tools become the same prompt: %s, %s" % (count, ours))
    for change, part in (({"tool_choice": "any"}, "tool_choice"), ({"tool_choice": {"type": "tool"}}, "names none"),
                         ({"tools": [{"type": "web_search_20250305", "name": "w"}]}, "tools[0].type"),
                         ({"messages": [USER, {"role": "user", "content": [{"type": "tool_result",
                                                                            "tool_use_id": "x"}]}]}, "no call of this id")):
        status, r = s.post("/v1/messages", dict(body, **change))
        check(status == 400 and part in r["error"]["message"], "refused: %s, %s" % (part, r))


# ---- what cannot be ----

def test_refusals(s):
    def f(**change):
        return {"tools": [dict(WEATHER, function=dict(WEATHER["function"], **change))]}
    schema = WEATHER["function"]["parameters"]
    cases = [
        ({"tools": {}}, "tools"), ({"tools": [1]}, "tools[0].type"), ({"tools": [{"type": "x"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function.name"), (f(name="a b"), "tools[0].function.name"),
        (f(name=""), "tools[0].function.name"), (f(name="x" * 129), "tools[0].function.name"),
        (f(description=3), "tools[0].function.description"), (f(parameters=[]), "tools[0].function.parameters"),
        (f(strict=1), "tools[0].function.strict"), ({"tools": [NOW, NOW]}, "tools[1].function.name"),
        ({"tools": [function("f%d" % i) for i in range(129)]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"), ({"tools": [NOW], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [NOW], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tools": [NOW], "tool_choice": 1}, "tool_choice"), ({"tools": [NOW], "parallel_tool_calls": 1},
                                                              "parallel_tool_calls"),
        ({**f(parameters=dict(schema, properties={"a": {"type": "string", "pattern": "x"}}, required=[])),
          "tool_choice": "required"}, "tools[0].function.parameters"),
        ({**f(parameters={"type": "array"}), "tool_choice": "required"}, "tools[0].function.parameters"),
        ({"messages": [USER, dict(ASKS, tool_calls=3)]}, "messages[1].tool_calls"),
        ({"messages": [USER, ASKS]}, "messages[1].tool_calls"), ({"messages": [ASKS, TOLD]}, "messages[0].tool_calls"),
        ({"messages": [USER, TOLD]}, "messages[1].tool_call_id"),
        ({"messages": [USER, ASKS, dict(TOLD, tool_call_id="c9")]}, "messages[2].tool_call_id"),
        ({"messages": [USER, ASKS, TOLD, TOLD]}, "messages[3].tool_call_id"),
        ({"messages": [USER, ASKS, dict(TOLD, content=None)]}, "messages[2].content"),
        ({"messages": [USER, dict(ASKS, tool_calls=[called("f", "{")]), TOLD]}, "messages[1].tool_calls[0].arguments"),
        ({"messages": [USER, dict(ASKS, tool_calls=[called("f", "[]")]), TOLD]}, "messages[1].tool_calls[0].arguments"),
        ({"messages": [USER, dict(ASKS, tool_calls=[called('"', "{}")]), TOLD]}, "messages[1].tool_calls[0].name"),
        ({"messages": [{"role": "assistant", "content": "x"}, USER], "tools": [NOW]}, "messages[0].role"),
        ({"messages": [{"role": "system", "content": "x"}], "tools": [NOW]}, "messages")]
    for change, param in cases:
        status, r = s.post("/v1/chat/completions", {"messages": [USER], "max_tokens": 1, **change})
        check(status == 400 and r["error"]["param"] == param, "%s: %s %s" % (param, status, r))
    status, r = chat(s, [USER], tool_choice="required", **f(parameters={"type": "object", "properties": {
        "a": {"type": "integer", "minimum": 3}}}))
    check('#/properties/a: "minimum" is not supported' in r["error"]["message"], "the keyword is named")
    status, r = chat(s, [USER], max_tokens=1, **f(parameters={"type": "object", "properties": {
        "a": {"type": "integer", "minimum": 3}}}))
    check(status == 200, "where a call may come alone any keyword will do")
    for kind, wanted in (("text", 200), ("json_object", 501)):
        status, r = chat(s, [USER], max_tokens=1, tools=[NOW], response_format={"type": kind})
        check(status == wanted, "response_format %s beside tools: %s" % (kind, r))
    status, r = s.post("/v1/completions", {"prompt": "x", "max_tokens": 1, "functions": [1]})
    check(status == 501, "functions are not there")


def test_without(s):
    """A model file that has no form for tools."""
    for body, status in (({"tools": [NOW]}, 501), ({"tools": [NOW], "tool_choice": "none"}, 200), ({"tools": []}, 200),
                         ({"tool_choice": "auto"}, 200), ({"messages": [USER, ASKS, TOLD]}, 501)):
        got, r = s.post("/v1/chat/completions", {"messages": [USER], "max_tokens": 1, **body})
        check(got == status and (got == 200 or "no tools" in r["error"]["message"]), "%s: %s" % (body, r))


def mutated(rnd, v):
    """v with something else at some places."""
    if rnd.random() < 0.06:
        return rnd.choice([None, 0, -1, "", "x", [], {}, [{}], True, 1e300, "\ud83d\ude00<tool_call>", {"type": "object"}])
    if isinstance(v, dict):
        return {k if rnd.random() > 0.02 else k[:-1]: mutated(rnd, x) for k, x in v.items()}
    if isinstance(v, list):
        return [mutated(rnd, x) for x in v] * (2 if rnd.random() < 0.03 else 1)
    return v


def test_mutated(s, n):
    rnd, seen = random.Random(1), {}
    body = {"messages": [USER, ASKS, TOLD, USER], "tools": [WEATHER, NOW], "tool_choice": "required", "max_tokens": 2,
            "parallel_tool_calls": False}
    blocks = {"messages": [USER, {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "f",
                                                                    "input": {"a": 1}}]},
                           {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "x"}]}],
              "tools": [{"name": "f", "input_schema": {"type": "object"}}], "tool_choice": {"type": "any"}, "max_tokens": 2}
    for i in range(n):
        path, what = (("/v1/chat/completions", body), ("/v1/messages", blocks))[i % 2]
        status, r = s.post(path, json.dumps(mutated(rnd, what)))
        seen[status] = seen.get(status, 0) + 1
        if status not in (200, 400, 501):
            check(False, "mutated %d: %s %s" % (i, status, r))
    check(seen.get(200, 0) > n // 20 and seen.get(400, 0) > n // 4, "mutated requests are answered: %s" % seen)
    check(s.get("/health")[0] == 200, "and it goes on serving")


def main():
    with tempfile.TemporaryDirectory() as d:
        qwen = with_tools(os.path.join(FIXTURES, "qwen2.kvz"), HERMES, os.path.join(d, "qwen.kvz"))
        llama = with_tools(os.path.join(FIXTURES, "llama.kvz"), LLAMA, os.path.join(d, "llama.kvz"))
        with Server("--slots", 4, model=qwen) as s:
            for test in (test_hermes, test_required, test_auto, test_anthropic, test_refusals):
                test(s)
            test_mutated(s, int(os.environ.get("MUTATED", 300)))
        check(s.code in (None, 0) or s.stop() == 0, "ends with 0")
        form = dict(HERMES, call_marker="<c>", call_end="}</c>")
        with Server("--slots", 4, model=with_tools(os.path.join(FIXTURES, "qwen2.kvz"), form,
                                                   os.path.join(d, "chatter.kvz"), CHATTER)) as s:
            test_chatter(s)
        with Server("--slots", 4, model=llama) as s:
            test_llama(s)
            test_required(s)
        with Server() as s:
            test_without(s)
        for model, said in ((qwen, "yes"), (os.path.join(FIXTURES, "smol.kvz"), "none")):
            info = json.loads(subprocess.run([RUN, "info", model, "--json"], capture_output=True).stdout)
            check(info["tools"] == said, "info says so")
    sys.exit(end("test_tools"))


if __name__ == "__main__":
    main()
