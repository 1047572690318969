"""kvzip.py: kvzip.c in Python: read a text once, keep the pairs that matter, ask later.

    import kvzip
    with kvzip.Model("smollm2.kvz") as model:
        cache = model.compress(open("town.txt").read(), ratio=0.3)
        print(cache.ask("Who built the bridge?"))

A thin layer of ctypes and numpy over lib/kvzip.h; names and defaults are those of `run compress -h` and `run ask -h`.
What fails raises kvzip.Error with the library's sentence. Work runs on a thread of its own with the GIL released:
Ctrl-C, or an exception in a callback, stops it within one forward call, and the model stays usable. Threads that share
a model take turns. A model does not survive os.fork: open it in the child.
"""
import ctypes
import json
import operator
import os
import queue
import sys
import threading
import warnings
from ctypes import POINTER, byref, c_char, c_char_p, c_double, c_float, c_int, c_long, c_size_t, c_void_p

import numpy as np

__version__ = "0.1"
VERSION = 2  # of lib/kvzip.h


class Error(Exception):
    """What the library refuses or fails at, in one sentence."""


# ---- lib/kvzip.h ----

PROGRESS = ctypes.CFUNCTYPE(c_int, c_void_p, c_char_p, c_long, c_long)
PIECE = ctypes.CFUNCTYPE(c_int, c_void_p, c_int, POINTER(c_char), c_size_t)


def _struct(name, *fields):
    """A ctypes structure: pairs of a type and the names that have it."""
    members = [(field, kind) for kind, names in fields for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": members})


_ModelFacts = _struct("_ModelFacts", (c_char_p, "name fingerprint isa"),
                      (c_int, "threads n_layers n_heads n_kv_heads head_dim vocab_size seq_len n_scored has_chat"))
_Computing = _struct("_Computing", (c_void_p, "after"), (c_char_p, "kv"), (PROGRESS, "progress"), (c_void_p, "arg"))
_Reading = _struct("_Reading", (c_char_p, "text"), (c_size_t, "n_text"), (POINTER(c_int), "ids"),
                   (c_int, "n_ids n_prefix"), (c_char_p, "system task"), (c_int, "raw"), (c_double, "ratio"),
                   (c_long, "budget"), (c_int, "stream window"), (c_char_p, "policy level set kv fit profile"),
                   (c_int, "chunk local ref_ties demote keep_scores"), (PROGRESS, "progress"), (c_void_p, "arg"))
_Facts = _struct("_Facts", (c_int, "n_prefix n_ctx n_tokens"), (c_long, "n_pairs n_kept n_demoted"),
                 (c_double, "ratio"), (c_size_t, "bytes full_bytes"), (c_double, "prefill_s score_s"),
                 (c_char_p, "policy level profile set budget fit"), (c_char * 16, "kv"), (c_void_p, "ids scores"))
_Asking = _struct("_Asking", (c_int, "limit"), (c_double, "temp top_p"), (c_long, "seed"), (c_int, "raw ignore_stop"),
                  (POINTER(c_char_p), "stop"), (c_char_p, "answer_prefix"), (c_int, "batch top_k"),
                  (c_double, "min_p repeat_penalty frequency_penalty presence_penalty"),
                  (c_int, "repeat_last_n temp_last"), (POINTER(c_int), "bias_ids"), (POINTER(c_float), "bias_values"),
                  (c_int, "n_bias json_object"), (c_char_p, "json_schema"), (PIECE, "piece"), (PROGRESS, "progress"),
                  (c_void_p, "arg"))
_Answer = _struct("_Answer", (c_void_p, "text"), (c_size_t, "n_text"), (c_int, "n_prompt n_answer cut"),
                  (c_double, "read_s write_s"))

_FUNCTIONS = {  # name: result, arguments
    "version": (c_int, []),
    "open": (c_void_p, [c_char_p, c_int, c_char_p, c_char_p]),
    "close": (None, [c_void_p]),
    "model_info": (None, [c_void_p, POINTER(_ModelFacts)]),
    "scored": (None, [c_void_p, c_void_p]),
    "tokenize": (c_long, [c_void_p, c_char_p, c_size_t, c_int, c_int, c_void_p, c_long, c_char_p]),
    "detokenize": (c_long, [c_void_p, c_void_p, c_int, c_void_p, c_long, c_char_p]),
    "logits": (c_int, [c_void_p, c_void_p, c_int, POINTER(_Computing), c_void_p, c_char_p]),
    "compress": (c_void_p, [c_void_p, POINTER(_Reading), c_char_p]),
    "save": (c_int, [c_void_p, c_char_p, c_char_p]),
    "load": (c_void_p, [c_void_p, c_char_p, c_char_p]),
    "fork": (c_void_p, [c_void_p, c_char_p]),
    "free": (None, [c_void_p]),
    "info": (None, [c_void_p, POINTER(_Facts)]),
    "kept": (None, [c_void_p, c_void_p]),
    "evict": (c_int, [c_void_p, c_void_p, c_char_p]),
    "ask": (c_int, [c_void_p, POINTER(c_char_p), c_int, POINTER(_Asking), POINTER(_Answer), c_char_p]),
    "answers_free": (None, [POINTER(_Answer), c_int]),
    "chat_open": (c_void_p, [c_void_p, c_void_p, c_char_p, c_int, c_char_p]),
    "chat_say": (c_int, [c_void_p, c_char_p, POINTER(_Asking), POINTER(_Answer), c_char_p]),
    "chat_close": (None, [c_void_p]),
}


def _load():
    """The library: KVZIP_LIBRARY, else beside this file (pip), else where `make lib` leaves it."""
    name = "libkvzip.dylib" if sys.platform == "darwin" else "libkvzip.so"
    here = os.path.dirname(os.path.abspath(__file__))
    paths = [os.path.join(here, name), os.path.join(here, "..", "build", name)]
    path = os.environ.get("KVZIP_LIBRARY") or next(filter(os.path.exists, paths), None)
    if not path:
        raise ImportError(f"{name} is not there: `make lib` builds it, or KVZIP_LIBRARY names it")
    library = ctypes.CDLL(path)
    for function, (result, arguments) in _FUNCTIONS.items():
        f = getattr(library, "kvzip_" + function)
        f.restype, f.argtypes = result, arguments
    if library.kvzip_version() != VERSION:
        raise ImportError(f"{path}: version {library.kvzip_version()} of kvzip.h, not {VERSION}")
    return library


_lib = _load()


def _bytes(text, what):
    """Text as the library takes it; None stays None."""
    if text is None:
        return None
    if not isinstance(text, str):
        raise TypeError(f"{what}: needs a str, not {type(text).__name__}")
    data = text.encode()
    if b"\0" in data:
        raise Error(f"{what}: a zero byte at byte {data.index(0)}: not text")
    return data


def _whole(value, what):
    value = operator.index(value)
    if not -2**31 <= value < 2**31:
        raise Error(f"{what} {value}: beyond 32 bits")
    return value


def _filled(kind, **values):
    """A structure of that kind; ctypes alone would cut numbers."""
    for name, of in kind._fields_:
        if of in (c_int, c_long) and name in values:
            values[name] = _whole(values[name], name)
    return kind(**values)


def _path(path):
    return os.fsencode(os.fspath(path))


def _ids(ids):
    ids = np.asarray(ids)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise TypeError("token ids: needs a list of whole numbers")
    if ids.size and (ids.min() < 0 or ids.max() >= 2**31):
        raise Error(f"token ids: from {ids.min()} to {ids.max()}, which no vocabulary has")
    return np.ascontiguousarray(ids, dtype=np.int32)


def _text(data):
    return None if data is None else data.decode("utf-8", "replace")


# ---- work ----

_starting = threading.Lock()


def _start(thread):
    """With the stack that attention needs, whatever `ulimit -s` says."""
    with _starting:
        before = threading.stack_size(8 << 20)
        try:
            thread.start()
        finally:
            threading.stack_size(before)


class _Worker:
    """Calls the library for one model, one call at a time, and frees handles when no call is running."""

    def __init__(self):
        self.lock = threading.Lock()
        self.caller = None  # the thread that waits for a long call, which runs
        self.dead = []      # (function, pointer) that wait for the end of a call
        self.process = os.getpid()

    def check(self):
        if self.process != os.getpid():
            raise Error("the model was opened in another process: open it again in this one")
        if self.caller == threading.get_ident():
            raise Error("the model is at work: a callback cannot use it")

    def free(self, function, pointer):
        """Now, or after the call that is running; in a forked child never: the model's threads are not there."""
        self.dead.append((function, pointer))
        self.bury()

    def bury(self):
        while self.dead and self.process == os.getpid() and self.lock.acquire(blocking=False):
            try:
                while self.dead:
                    function, pointer = self.dead.pop()
                    function(pointer)
            finally:
                self.lock.release()

    @staticmethod
    def checked(function, *args):
        """Calls what takes err at last; raises what it fails with (NULL or -1)."""
        err = ctypes.create_string_buffer(512)
        result = function(*args, err)
        if result is None or result < 0:
            raise Error(_text(err.value))
        return result

    def call(self, function, *args):
        """A short call: no callbacks."""
        self.check()
        try:
            with self.lock:
                return self.checked(function, *args) if function.restype else function(*args)
        finally:
            self.bury()

    def work(self, function, make_args, take, on_progress=None, on_piece=None):
        """A long call, on a thread of its own: make_args(progress, piece) are its arguments but err, take(result) makes
        of its result what is returned. Callbacks run on the caller's thread; an exception there or here (Ctrl-C) stops
        the call, and is raised once it has ended."""
        events, stopped, ended, outcome = queue.SimpleQueue(), [], [], []

        def progress(_, what, done, total):
            if on_progress:
                events.put((on_progress, (_text(what), done, total)))
            return len(stopped)

        def piece(_, i, text, n):
            events.put((on_piece, (i, ctypes.string_at(text, n).decode("utf-8", "replace"))))
            return len(stopped)

        def run():
            while not self.lock.acquire(timeout=0.05):
                if stopped:
                    break
            else:
                self.caller = caller
                try:
                    outcome.append(take(self.checked(function, *args)))
                except BaseException as e:
                    stopped.append(e)
                finally:
                    self.caller = None
                    self.lock.release()
            ended.append(True)
            events.put(None)

        def wait():
            while True:
                try:
                    event = events.get(timeout=0.1)  # a signal that another thread was given is seen in between
                    if event is None:
                        return
                    callback, values = event
                    if not stopped and callback(*values) is True:
                        stopped.append(Error("interrupted"))
                except queue.Empty:
                    pass
                except BaseException as e:
                    stopped.append(e)
                    if ended and events.empty():  # its last event may be lost to the exception
                        return

        self.check()
        caller = threading.get_ident()
        args = make_args(PROGRESS(progress), PIECE(piece) if on_piece else PIECE())
        _start(threading.Thread(target=run))
        try:
            wait()
        except BaseException as e:  # just before its try
            stopped.append(e)
            wait()
        self.bury()
        if not stopped:
            return outcome[0]
        error = stopped[0]
        stopped.clear()  # which its traceback refers to
        try:
            raise error
        finally:
            del error


class _Handle:
    """A pointer of the library that is freed when nobody has it any more."""

    def __init__(self, worker, pointer, free):
        self.worker, self.pointer, self.free = worker, pointer, free
        self._as_parameter_ = c_void_p(pointer)  # so that who passes it keeps it

    def __del__(self):
        self.worker.free(self.free, self.pointer)


class _Open:
    """What has a handle, is closed, and is a context manager."""

    _handle = None

    @property
    def _open(self):
        handle = self._handle
        if handle is None:
            raise Error(f"the {type(self).__name__.lower()} is closed")
        return handle

    def close(self):
        """Frees it, once no call and no array needs it. Safe twice."""
        self._handle = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


# ---- models ----

class Model(_Open):
    """A converted model (export.py).

    path: the .kvz file. threads: 0 is one per core. isa: "scalar", "avx2" and the like, the best by default; all
    models of a process have the same.
    """

    def __init__(self, path, threads=0, isa=None):
        self._worker = _Worker()
        pointer = self._worker.call(_lib.kvzip_open, _path(path), _whole(threads, "threads"), _bytes(isa, "isa"))
        self._handle = _Handle(self._worker, pointer, _lib.kvzip_close)
        facts = _ModelFacts()
        _lib.kvzip_model_info(self._handle, byref(facts))
        for name, _ in _ModelFacts._fields_:
            value = getattr(facts, name)
            setattr(self, name, _text(value) if isinstance(value, bytes) else value)
        self.has_chat = bool(self.has_chat)
        self.layers = np.zeros(self.n_scored, np.int32)  # that are scored and evicted from: those without a window
        _lib.kvzip_scored(self._handle, self.layers.ctypes.data)

    def tokenize(self, text, special=False, bos=False):
        """Ids of a text, int32 [n]. special: texts of special tokens become these. bos: with what the model puts in
        front."""
        data = _bytes(text, "text")
        room = len(data) + 16
        while True:
            ids = np.zeros(room, np.int32)
            n = self._worker.call(_lib.kvzip_tokenize, self._open, data, len(data), special, bos, ids.ctypes.data, room)
            if n <= room:
                return ids[:n].copy()
            room = n

    def detokenize(self, ids):
        """The text of ids; bytes that are no UTF-8 become U+FFFD."""
        ids, room = _ids(ids), 0
        while True:
            text = ctypes.create_string_buffer(room + 1)
            n = self._worker.call(_lib.kvzip_detokenize, self._open, ids.ctypes.data, len(ids), text, room)
            if n <= room:
                return _text(text.raw[:n])
            room = n

    def compress(self, text=None, ratio=0.3, policy=None, *, ids=None, n_prefix=0, level=None, set=None, kv=None,
                 fit=None, profile=None, system=None, task=None, raw=False, budget=0, stream=False, window=0, chunk=0,
                 local=False, ref_ties=False, demote=False, scores=False, progress=None):
        """Reads a text, or ids of which the first n_prefix are protected, and evicts; returns a Cache.

        ratio: share of the pairs that stays, above 0, at most 1. policy, level, set ("window=32,kernel=7"), fit, window,
        chunk, ref_ties, stream, budget (pairs a head) as in `run compress -h`; kv: "f16", "f32", "q8", "q8/q4"; local:
        --score-attn local; demote: to 2 bits instead of evicting; profile: a file, the model's own by default; system,
        task: texts before it; raw: no chat template. scores: remember them (Cache.scores), also with ratio 1.
        progress(what, done, total), in tokens, is called after each forward call; True stops.
        """
        if (text is None) == (ids is None):
            raise TypeError("compress needs a text or ids")
        if not 0 < ratio <= 1:
            raise Error(f"ratio {ratio}: needs a number above 0, at most 1")
        data = _bytes(text, "text")
        ids = np.zeros(0, np.int32) if ids is None else _ids(ids)

        def args(on_progress, _):
            how = _filled(
                _Reading,
                text=data, n_text=len(data or b""), ids=ids.ctypes.data_as(POINTER(c_int)), n_ids=len(ids),
                n_prefix=n_prefix, system=_bytes(system, "system"), task=_bytes(task, "task"), raw=raw, ratio=ratio,
                budget=budget, stream=stream, window=window, policy=_bytes(policy, "policy"),
                level=_bytes(level, "level"), set=_bytes(set, "set"), kv=_bytes(kv, "kv"), fit=_bytes(fit, "fit"),
                profile=None if profile is None else _path(profile), chunk=chunk, local=local, ref_ties=ref_ties,
                demote=demote, keep_scores=scores, progress=on_progress)
            return self._open, how

        def take(pointer):
            return _Handle(self._worker, pointer, _lib.kvzip_free)

        cache = Cache(self, self._worker.work(_lib.kvzip_compress, args, take, progress))
        if cache.n_tokens > self.seq_len:
            warnings.warn(f"{cache.n_tokens} positions, but the model was trained for {self.seq_len}", stacklevel=2)
        return cache

    def load(self, path):
        """A Cache from a file of `run compress` or Cache.save."""
        pointer = self._worker.call(_lib.kvzip_load, self._open, _path(path))
        return Cache(self, _Handle(self._worker, pointer, _lib.kvzip_free))

    def logits(self, ids, after=None, kv=None, progress=None):
        """Logits after each of ids [n], float32 [n, vocab_size]; after: a Cache that they follow, unchanged."""
        ids = _ids(ids)
        out = np.zeros((len(ids), self.vocab_size), np.float32)

        follows = _of_model(self, after)

        def args(on_progress, _):
            how = _Computing(follows and follows.pointer, _bytes(kv, "kv"), on_progress)
            return self._open, ids.ctypes.data, len(ids), how, out.ctypes.data

        return self._worker.work(_lib.kvzip_logits, args, lambda _: out, progress)

    def chat(self, cache=None, system=None, raw=False):
        """A Chat, about what a cache holds if one is given."""
        about, system = _of_model(self, cache), _bytes(system, "system")
        return Chat(self, self._worker.call(_lib.kvzip_chat_open, self._open, about, system, raw))


def _of_model(model, cache):
    """The handle of a cache of this model, None of none."""
    if cache is not None and cache.model is not model:
        raise Error("the cache belongs to another model")
    return cache and cache._open


# ---- answers ----

class Answer(str):
    """The text of an answer, without white space at both ends. n_prompt, n_answer: tokens read and written; cut: it
    ended because of the limit; read_s, write_s: seconds."""


def _answer(a):
    answer = Answer(ctypes.string_at(a.text, a.n_text).decode("utf-8", "replace"))
    answer.n_prompt, answer.n_answer, answer.cut = a.n_prompt, a.n_answer, bool(a.cut)
    answer.read_s, answer.write_s = a.read_s, a.write_s
    return answer


_SAMPLING = {"top_k", "min_p", "repeat_penalty", "frequency_penalty", "presence_penalty", "repeat_last_n", "temp_last",
             "json_object"}


def _asking(progress, piece, limit=0, temp=0.0, top_p=0.95, seed=0, stop=(), answer_prefix=None, raw=False,
            ignore_stop=False, batch=0, logit_bias=None, json_schema=None, **sampling):
    stops = [stop] if isinstance(stop, str) else list(stop)
    texts = (c_char_p * (len(stops) + 1))(*[_bytes(s, "stop") for s in stops])
    unknown = sampling.keys() - _SAMPLING
    if unknown:
        raise TypeError(f"{min(unknown)}: there is no such setting")
    bias = {_whole(i, "logit_bias"): float(value) for i, value in (logit_bias or {}).items()}
    schema = json.dumps(json_schema) if isinstance(json_schema, (dict, bool)) else json_schema
    return _filled(
        _Asking, limit=limit, temp=temp, top_p=top_p, seed=seed, raw=raw, ignore_stop=ignore_stop, stop=texts,
        answer_prefix=_bytes(answer_prefix, "answer_prefix"), batch=batch, bias_ids=(c_int * len(bias))(*bias),
        bias_values=(c_float * len(bias))(*bias.values()), n_bias=len(bias), json_schema=_bytes(schema, "json_schema"),
        piece=piece, progress=progress, **sampling)


def _take(answers):
    """The Answers that a call left."""
    taken = [_answer(a) for a in answers]
    _lib.kvzip_answers_free(answers, len(answers))
    return taken


class Cache(_Open):
    """What a model has read, less the pairs that were evicted. From Model.compress, Model.load or fork.

    n_prefix, n_ctx, n_tokens: tokens protected, of the context, and all; n_pairs, n_kept, n_demoted: pairs of the
    context in all heads of the scored layers; bytes, full_bytes: of the cache, and had nothing been evicted or
    quantized; prefill_s, score_s: seconds; ratio, policy, level, profile, set, budget, fit, kv: how it was made.
    """

    def __init__(self, model, handle):
        self.model = model
        self._handle = handle
        self._note()

    @classmethod
    def from_file(cls, model, path):
        """The same as model.load(path)."""
        return model.load(path)

    def _note(self):
        facts = _Facts()
        self.model._worker.call(_lib.kvzip_info, self._open, facts)
        for name, _ in _Facts._fields_:
            value = getattr(facts, name)
            if name not in ("ids", "scores"):
                setattr(self, name, _text(value) if isinstance(value, bytes) else value)
        self._shape = self.model.n_scored, self.model.n_kv_heads, self.n_ctx
        self.ids = self._view(facts.ids, c_int, (self.n_prefix + self.n_ctx,))  # int32 [n_prefix + n_ctx]
        # float32 [n_scored, n_kv_heads, n_ctx], higher = keep, row i of layer model.layers[i]; None: not remembered
        self.scores = self._view(facts.scores, c_float, self._shape) if facts.scores else None

    def _view(self, address, kind, shape):
        """A read-only array on the library's memory, which it keeps alive."""
        memory = (kind * int(np.prod(shape))).from_address(address)
        memory.handle = self._handle
        array = np.ctypeslib.as_array(memory).reshape(shape)
        array.flags.writeable = False
        return array

    @property
    def kept(self):
        """Which pairs of the context are there as they were read, bool [n_scored, n_kv_heads, n_ctx]."""
        kept = np.zeros(self._shape, np.uint8)
        self.model._worker.call(_lib.kvzip_kept, self._open, kept.ctypes.data)
        return kept == 1

    def evict(self, keep):
        """Evicts the pairs with keep False, bool [n_scored, n_kv_heads, n_ctx]: a policy of your own. Forks keep theirs."""
        keep = np.ascontiguousarray(keep, np.bool_)
        if keep.shape != self._shape:
            raise Error(f"keep {list(keep.shape)}: needs a shape of {list(self._shape)}")
        self.model._worker.call(_lib.kvzip_evict, self._open, keep.ctypes.data)
        self._note()

    def fork(self):
        """Another Cache on the same memory."""
        worker = self.model._worker
        return Cache(self.model, _Handle(worker, worker.call(_lib.kvzip_fork, self._open), _lib.kvzip_free))

    def save(self, path):
        """Writes a file for load, `run ask` and `run chat`; it is the old one or the whole new one, never half."""
        self.model._worker.call(_lib.kvzip_save, self._open, _path(path))

    def ask(self, question, on_text=None, **settings):
        """The Answer to a question, or a list of Answers to a list of questions, each right after the context.

        settings: limit (tokens, 96), temp (0: always the likeliest token), top_p, seed, stop (a text or several: the
        answer ends right after the first), answer_prefix (its start), raw, ignore_stop, batch (questions answered
        together, 8); top_k, min_p, repeat_penalty, repeat_last_n (64), frequency_penalty, presence_penalty, temp_last,
        logit_bias ({id: what is added}), as the flags of `run ask`; json_object: the answer is JSON; json_schema (a
        dict or text): JSON that it allows. on_text(i, piece) is called with what is new of answer i.
        """
        one = isinstance(question, str)
        questions = [question] if one else list(question)
        texts = (c_char_p * len(questions))(*[_bytes(q, "a question") for q in questions])
        answers = (_Answer * len(questions))()

        def args(progress, piece):
            return self._open, texts, len(texts), _asking(progress, piece, **settings), answers

        taken = self.model._worker.work(_lib.kvzip_ask, args, lambda _: _take(answers), None, on_text)
        return taken[0] if one else taken

    def logits(self, ids, progress=None):
        """Logits after each of ids [n], which follow the cache, float32 [n, vocab_size]."""
        return self.model.logits(ids, self, progress=progress)

    def chat(self, raw=False):
        """A Chat about it; the cache stays as it was."""
        return self.model.chat(self, raw=raw)


class Chat(_Open):
    """A conversation, from Model.chat or Cache.chat."""

    def __init__(self, model, pointer):
        self.model = model
        self._handle = _Handle(model._worker, pointer, _lib.kvzip_chat_close)

    def say(self, message, on_text=None, **settings):
        """The Answer to the next message; settings as in Cache.ask, limit 512. One that is stopped was never said."""
        on_piece = on_text and (lambda i, piece: on_text(piece))
        text, answers = _bytes(message, "a message"), (_Answer * 1)()

        def args(progress, piece):
            return self._open, text, _asking(progress, piece, **settings), answers

        return self.model._worker.work(_lib.kvzip_chat_say, args, lambda _: _take(answers), None, on_piece)[0]
