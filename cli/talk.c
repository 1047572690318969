// talk.c: generate, ask and chat: where questions come from, and how answers are shown.
//
// A reply is made the same way everywhere: its prompt is read with a bar, then answer_step writes a
// token at a time, and what is new is printed between two steps. Questions of ask are answered
// together, each on its own fork of the context; a conversation is one fork after the other.
#define _POSIX_C_SOURCE 200809L
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "answer.h"
#include "cli/commands.h"
#include "cli/input.h"
#include "cli/lines.h"
#include "cli/memory.h"
#include "cli/orders.h"
#include "cli/output.h"
#include "cli/session.h"
#include "json.h"

enum { ASK_BATCH = 8 };            // questions that ask answers together
enum { QUESTION = 64 };            // tokens of a question, where it is not known yet
static const double CHATTY = 0.7;  // temperature of generate and chat

// ---- replies ----

// A reply as the flags want it; prompt and limit are left to fill in.
static Reply new_reply(Session *s, int seq, const Ids *prompt, int limit) {
    return (Reply){.seq = seq,
                   .prompt = prompt->id,
                   .n_prompt = prompt->n,
                   .limit = limit,
                   .stop = s->o->stop,
                   .ignore_stop = s->o->ignore_eos,
                   .sampling = &s->sampling,
                   .source = s->info.ids,
                   .n_source = s->info.n_ids,
                   .draft = draft_length(s->o),
                   .schema = s->schema};
}

// One step of replies [n]; returns how many are not done yet.
static int step(Session *s, Reply *const *r, int n) {
    char err[ERR_LEN];
    int left = answer_step(&s->answerer, r, n, err);
    if (left < 0) die("%s", err);
    return left;
}

// Reads the reply's prompt and takes the first token, unless it is interrupted.
static void read_prompt(Session *s, Reply *r) {
    Progress p = progress_begin(s);
    warn_length(s, (long)s->kv.seqs[r->seq].next_pos + r->n_prompt);
    do step(s, &r, 1);
    while (progress_step(&p, "read", r->n_fed, r->n_prompt) == 0 && r->n_fed < r->n_prompt);
    progress_end(&p);
}

// Goes on with replies [n] together until all are done or the user stops them, and calls show after
// every step.
static void write_replies(Session *s, Reply *const *r, int n, void (*show)(Reply *r)) {
    char err[ERR_LEN];
    for (int left = 1; left > 0 && !interrupted;) {
        for (int i = 0; i < n; i++)
            if (!r[i]->done) warn_length(s, (long)s->kv.seqs[r[i]->seq].next_pos + 1);
        left = step(s, r, n);
        for (int i = 0; i < n && show; i++) show(r[i]);
    }
    for (int i = 0; i < n; i++) {
        if (reply_flush(&s->answerer, r[i], err) != 0) die("%s", err);
        if (show) show(r[i]);
    }
}

// Prints what is new of text [n].
static void show_text(Reply *r, const char *text, size_t n) {
    if (n > r->shown && text[n - 1] == '\r' && !r->done) n--;  // until it is known what follows
    if (n <= r->shown) return;
    out_text(text + r->shown, n - r->shown);
    out_flush();
    r->shown = n;
}

static void show_all(Reply *r) { show_text(r, r->text.s, r->text.n); }

static void show_stripped(Reply *r) {
    size_t n;
    const char *text = stripped(r->text.s, r->text.n, &n);
    show_text(r, text, n);
}

// One of several answers: only its first line begins at the margin, so that it is seen where one
// ends.
static void show_apart(Reply *r) {
    size_t n;
    const char *text = stripped(r->text.s, r->text.n, &n);
    for (const char *newline; r->shown < n;) {
        newline = memchr(text + r->shown, '\n', n - r->shown);
        show_text(r, text, newline ? (size_t)(newline + 1 - text) : n);
        if (!newline) return;
        out_bytes("  ", 2);
    }
}

// Tokens per second of the steps that wrote; the first token came with the prompt.
static double reply_rate(const Reply *r) {
    return r->n_fed > r->n_prompt ? (r->n_fed - r->n_prompt) / r->write_s : 0;
}

// Why the answer ends where it does, in the words of the OpenAI API.
static const char *finish_reason(const Reply *r) {
    return !r->done ? "interrupted" : r->cut ? "length" : "stop";
}

static void reply_figures(const Session *s, const Reply *r) {
    if (s->o->quiet) return;
    note("[%d tokens read in %.2f s, %.1f/s; %d written in %.2f s, %.1f/s", r->n_prompt, r->read_s,
         r->n_prompt / r->read_s, r->ids.n, r->write_s, reply_rate(r));
    char read[64];
    if (s->sampling.temp > 0) note("; seed %ld", s->seed);
    note("%s", reading_text(s, read));
    if (r->n_drafted > 0) note("; %d of %d drafted", r->n_accepted, r->n_drafted);
    if (r->cut) note("; cut at %d tokens: -n", r->limit);
    note("%s]\n", r->done ? "" : "; interrupted");
}

// What the JSON of generate, ask and chat ends with.
static void reply_json(const Session *s, const Reply *r) {
    if (s->n_reads > 0)
        json_print(stdout, "'reader': %s, 'pages_read': %g, ", reader_name(&s->reads[0]),
                   kvcache_read_share(&s->kv));
    json_print(stdout, "'seconds': %g, 'tokens_per_s': %g, 'finish_reason': %s, 'seed': ",
               r->read_s + r->write_s, reply_rate(r), finish_reason(r));
    if (s->sampling.temp > 0)
        json_print(stdout, "%ld}\n", s->seed);
    else
        json_print(stdout, "null}\n");
}

// ---- generate ----

int cmd_generate(const Options *o) {
    Session s;
    char err[ERR_LEN];
    void (*show)(Reply * r) = o->json ? NULL : show_all;
    Ids ids = {0};
    Buffer text = read_text(o, piped_input());
    catch_signals();
    open_session(&s, o, NULL, 1 + draft_length(o));
    input_ids(&s, &text, TOK_BOS, &ids);
    if (ids.n == 0) die("nothing to continue: the prompt is empty");
    show_prompt(&s, "prompt", ids.id, ids.n);
    int limit = o->n < 0 ? 256 : (int)o->n;
    open_reader(&s);
    memory_check(&s, &(MemoryNeed){.tokens = (double)ids.n + limit, .evicts = true});
    open_answers(&s, CHATTY);
    Reply r = new_reply(&s, new_sequence(&s), &ids, limit);
    if (reply_begin(&r, "", err) != 0) die("%s", err);
    stream_sequence(&s, r.seq, 0);
    read_prompt(&s, &r);
    if (show) show(&r);
    write_replies(&s, (Reply *[]){&r}, 1, show);
    if (o->json) {
        json_print(stdout, "{'text': %.*s, 'ids': [", (int)r.text.n, r.text.s);
        for (int i = 0; i < r.ids.n; i++) out(i ? ", %d" : "%d", r.ids.id[i]);
        json_print(stdout, "], 'n_prompt': %d, 'n_answer': %d, 'prefill_s': %g, ", r.n_prompt,
                   r.ids.n, r.read_s);
        reply_json(&s, &r);
    } else if (r.text.n > 0 && r.text.s[r.text.n - 1] != '\n') {
        out_bytes("\n", 1);
    }
    out_flush();
    reply_figures(&s, &r);
    reply_free(&r);
    free(text.s);
    ids_free(&ids);
    close_session(&s);
    return exit_code();
}

// ---- questions ----

typedef struct {
    char *text, *prefix;  // the start of the answer, "" where there is none
    Ids ids;              // what asks it
    Sampling sampling;
    Reply reply;
} Question;

static void question_free(Question *q) {
    free(q->text);
    free(q->prefix);
    ids_free(&q->ids);
    reply_free(&q->reply);
}

// Where questions come from: arguments first, then lines.
typedef struct {
    char **args;
    int n_args, at;
    bool has_lines;
    Lines lines;
    const char *prefix;  // where a line has none of its own
} Questions;

// Blank ones are left out. In a line of a file the start of the answer may follow after a tab.
// Without wait only what is there already counts.
static bool next_question(Questions *q, bool wait, Question *next) {
    size_t n, length;
    while (q->at < q->n_args || q->has_lines) {
        const char *s, *prefix = q->prefix ? q->prefix : "", *tab = NULL;
        size_t n_prefix = strlen(prefix);
        if (q->at < q->n_args) {
            s = q->args[q->at++];
            n = strlen(s);
        } else {
            s = lines_next(&q->lines, wait, &n);
            if (!s) return false;
            if (!q->lines.person) tab = memchr(s, '\t', n);
        }
        if (tab) {
            prefix = tab + 1;
            n_prefix = (size_t)(s + n - prefix);
            n = (size_t)(tab - s);
        }
        stripped(s, n, &length);
        if (length == 0) continue;
        *next = (Question){.text = copy_text(s, n), .prefix = copy_text(prefix, n_prefix)};
        return true;
    }
    return false;
}

// Several questions and their answers, or a conversation.
typedef struct {
    Session *s;
    Talk talk;
    Questions from;
    Orders *orders;  // of a chat, whose lines with a slash in front are no questions; or NULL
    int batch;       // questions answered together
    int limit;       // tokens of an answer at most
    bool keep;       // each question sees the ones before it
    bool apart;      // several answers on stdout: what is not an answer's first line is indented
    bool tolerant;   // Ctrl-C ends an answer but not the rest, even where nobody types
} Exchange;

static void print_reply(const Exchange *x, Question *q) {
    size_t n;
    const Session *s = x->s;
    Reply *r = &q->reply;
    const char *text = stripped(r->text.s, r->text.n, &n);
    if (s->o->json) {
        json_print(stdout, "{'question': %s, 'answer': %.*s, 'n_prompt': %d, 'n_answer': %d, ",
                   q->text, (int)n, text, r->n_prompt, r->ids.n);
        reply_json(s, r);
    } else {
        (x->apart ? show_apart : show_stripped)(r);
        out_bytes("\n", 1);
    }
    out_flush();
    reply_figures(s, r);
}

// Every question has random numbers of its own, from the seed and its words, so that its answer
// does not depend on what else is asked. In a conversation, where it does, they go on.
static Sampling own_sampling(const Session *s, const Question *q) {
    Sampling own = s->sampling;
    own.random = hash_bytes(own.random ^ HASH_START, q->text, strlen(q->text));
    return own;
}

// Reads a question on its own fork of the context and begins the answer.
static void put_question(Exchange *x, Question *q, void (*show)(Reply *r)) {
    Session *s = x->s;
    char err[ERR_LEN];
    int seq = kvcache_fork(&s->kv, x->talk.seq, err);
    if (seq < 0 || talk_ask(&x->talk, q->text, q->prefix, &q->ids, err) != 0) die("%s", err);
    show_prompt(s, "question", q->ids.id, q->ids.n);
    size_t n = strlen(q->prefix);
    if (n > 0 && q->prefix[n - 1] == ' ')  // models know a space as the start of the next word
        warn(s, "the start of an answer ends with a space: answers are better without it");
    q->reply = new_reply(s, seq, &q->ids, x->limit);
    if (x->orders) q->reply.source = x->orders->held.id, q->reply.n_source = x->orders->held.n;
    if (!x->keep) {
        q->sampling = own_sampling(s, q);
        q->reply.sampling = &q->sampling;
    }
    if (reply_begin(&q->reply, q->prefix, err) != 0) die("%s", err);
    if (s->streams) s->context.seq = seq;
    read_prompt(s, &q->reply);
    if (show) show(&q->reply);
}

// Answers n questions together, each on its own fork of the context. In a conversation it is one,
// and the fork takes the context's place, unless it was stopped before the answer began.
static void answer(Exchange *x, Question *q, int n) {
    Session *s = x->s;
    char err[ERR_LEN];
    Reply *r[MAX_BATCH];
    void (*show)(Reply * r) = n > 1 || s->o->json ? NULL : x->apart ? show_apart : show_stripped;
    for (int i = 0; i < n; i++) {
        put_question(x, &q[i], show);
        r[i] = &q[i].reply;
    }
    write_replies(s, r, n, show);
    for (int i = 0; i < n; i++) {
        print_reply(x, &q[i]);
        bool stays = x->keep && (r[i]->ids.n > 0 || !interrupted || s->streams);
        if (stays && x->orders)
            orders_answered(x->orders, r[i]);
        else
            kvcache_drop(&s->kv, stays ? x->talk.seq : r[i]->seq);
        if (stays && talk_answered(&x->talk, r[i], err) != 0) die("%s", err);
        question_free(&q[i]);
    }
}

// Until the questions end; returns how many there were.
static int converse(Exchange *x) {
    Question q[MAX_BATCH];
    bool person = x->from.lines.person;
    int asked = 0, batch = person ? 1 : x->batch;
    bool tolerant = person || x->tolerant, echo = !tolerant && !x->s->o->quiet && !x->s->o->json;
    while (!interrupted) {
        int n = 0;
        while (n < batch && next_question(&x->from, n == 0, &q[n])) {
            if (echo) note("> %s\n", q[n].text);
            n++;
        }
        if (n == 0) break;
        if (x->orders && orders_take(x->orders, q[0].text))
            question_free(&q[0]);
        else
            answer(x, q, n);
        asked += n;
        if (interrupted == SIGINT && tolerant) interrupted = 0;
    }
    lines_free(&x->from.lines);
    talk_free(&x->talk);
    return asked;
}

// The questions of the command line: arguments, -f or stdin.
static Questions given_questions(const Options *o) {
    bool from_stdin = (o->n_args == 2 && !o->file) || (o->file && strcmp(o->file, "-") == 0);
    Questions from = {.args = o->args + 2, .n_args = o->n_args - 2, .prefix = o->answer_prefix};
    if (!o->file && !from_stdin) return from;
    from.has_lines = true;
    from.lines.name = from_stdin ? "stdin" : o->file;
    from.lines.fd = from_stdin ? STDIN_FILENO : open(o->file, O_RDONLY);
    from.lines.person = from_stdin && isatty(STDIN_FILENO);
    if (!from_stdin) check_lines(o, o->file);
    if (from.lines.fd < 0) die("%s: %s", o->file, strerror(errno));
    return from;
}

int cmd_ask(const Options *o) {
    Session s;
    if (o->keep && o->batch > 1) die_usage(o->command, "--keep and --batch do not go together");
    Exchange x = {.s = &s,
                  .from = given_questions(o),
                  .batch = o->batch  ? (int)o->batch
                           : o->keep ? 1
                                     : ASK_BATCH,
                  .limit = o->n < 0 ? 96 : (int)o->n,
                  .keep = o->keep};
    Lines *lines = &x.from.lines;
    x.apart = x.from.n_args + x.from.has_lines > 1 || (x.from.has_lines && !lines->person);
    catch_signals();
    open_session(&s, o, o->args[1], x.batch * (1 + draft_length(o)));
    open_reader(&s);
    memory_check(&s, &(MemoryNeed){.forked = x.batch * ((double)x.limit + QUESTION),
                                   .loaded = (double)s.kv.file.map_bytes});
    open_answers(&s, 0);
    x.talk = (Talk){.tok = s.tok, .raw = o->raw, .on_context = true};
    lines_begin(lines);
    bool person = lines->person;
    const char *from = x.from.has_lines ? lines->name : "arguments";
    int asked = converse(&x);
    close_session(&s);
    if (asked == 0 && !person && !interrupted) die("%s: no question in it", from);
    return exit_code();
}

int cmd_chat(const Options *o) {
    Session s;
    char err[ERR_LEN];
    bool person = isatty(STDIN_FILENO);
    Exchange x = {.s = &s,
                  .from = {.has_lines = true,
                           .lines = {.fd = STDIN_FILENO, .name = "stdin", .person = person}},
                  .batch = 1,
                  .limit = o->n < 0 ? 512 : (int)o->n,
                  .keep = true,
                  .apart = !person,
                  .tolerant = true};
    if (o->cache && o->system) die_usage(o->command, "--system: the context of -c has its own");
    catch_signals();
    open_session(&s, o, o->cache, 1 + draft_length(o));
    open_reader(&s);
    memory_check(&s, &(MemoryNeed){.tokens = (double)x.limit + QUESTION,
                                   .loaded = (double)s.kv.file.map_bytes,
                                   .evicts = !o->cache});
    open_answers(&s, CHATTY);
    if (!tokenizer_chat(s.tok)->present) warn(&s, "%s has no chat template", o->args[0]);
    x.talk =
        (Talk){.tok = s.tok, .system = o->system, .raw = o->raw, .on_context = o->cache != NULL};
    if (!o->cache) x.talk.seq = new_sequence(&s);
    int n_prefix = talk_prefix(&x.talk, err);
    if (n_prefix < 0) die("%s", err);
    stream_sequence(&s, x.talk.seq, n_prefix);
    lines_begin(&x.from.lines);
    Orders orders = {.s = &s, .talk = &x.talk};
    for (int i = 0; o->cache && i < s.info.n_ids; i++)
        if (ids_push(&orders.held, s.info.ids[i]) != 0) die_memory();
    x.orders = &orders;
    if (person && !o->quiet) note("[/help lists orders, Ctrl-D ends]\n");
    converse(&x);
    orders_free(&orders);
    close_session(&s);
    return exit_code();
}
