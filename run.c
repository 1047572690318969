// run.c: the program. Subcommands, flags, sampling, the chat loop and progress.
//
// Every subcommand is one row of `commands` and one cmd_ function that reads like its own summary;
// every flag is one row of `flags`, which drives parsing and -h alike. Results go to stdout,
// figures and progress to stderr. This is the only file that prints or exits: the others return -1
// and leave a sentence in err, which ends up in die(). A reply is always made the same way: the
// question is prefilled, the first token sampled, and decode() feeds one row per unfinished reply
// to forward().
#define _POSIX_C_SOURCE 200809L
#include <ctype.h>
#include <errno.h>
#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "bench/bench.h"
#include "policies/calibrate.h"
#include "eval/chart.h"
#include "eval/eval.h"
#include "answer.h"
#include "json.h"
#include "kvfile.h"
#include "model.h"
#include "policies.h"
#include "policies/stream.h"
#include "tokenizer.h"
#include "util.h"

enum { MAX_BATCH = 64, ASK_BATCH = 8 };
static const double CHATTY = 0.7;  // temperature of generate and chat

// What KVzip's authors put before every context (arXiv 2505.23416, their code).
static const char TASK[] =
    "Given the context, answer to the following question or request without explanation.\n\n";

// ---- endings ----

static volatile sig_atomic_t interrupted;  // the signal that asked us to stop

static void on_signal(int sig) { interrupted = sig; }

// Work stops at its next step, leaves no half-written file, and main exits with 128 + signal.
// Without SA_RESTART, so that a read at the chat's prompt returns.
static void catch_signals(void) {
    struct sigaction sa = {.sa_handler = on_signal};
    sigemptyset(&sa.sa_mask);
    sigaction(SIGINT, &sa, NULL);
    sigaction(SIGTERM, &sa, NULL);
    sigaction(SIGHUP, &sa, NULL);
}

__attribute__((noreturn, format(printf, 1, 2))) static void die(const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    fputs("run: ", stderr);
    vfprintf(stderr, fmt, ap);
    fputc('\n', stderr);
    va_end(ap);
    exit(1);
}

__attribute__((noreturn, format(printf, 2, 3))) static void die_usage(const char *command,
                                                                      const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    fprintf(stderr, "run: %s%s", command ? command : "", command ? ": " : "");
    vfprintf(stderr, fmt, ap);
    fprintf(stderr, " (run %s%s-h shows the usage)\n", command ? command : "", command ? " " : "");
    va_end(ap);
    exit(2);
}

__attribute__((noreturn)) static void die_memory(void) { die("out of memory"); }

static void *allocate(size_t n, size_t size) {
    void *p = calloc(n ? n : 1, size);
    if (!p) die_memory();
    return p;
}

// ---- what goes to stdout ----

__attribute__((noreturn)) static void die_stdout(void) { die("stdout: %s", strerror(errno)); }

static void put(const void *p, size_t n) {
    if (n > 0 && fwrite(p, 1, n, stdout) != n) die_stdout();
}

static void flush(void) {
    if (ferror(stdout) || fflush(stdout) != 0) die_stdout();
}

__attribute__((format(printf, 1, 2))) static void out(const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    int n = vprintf(fmt, ap);
    va_end(ap);
    if (n < 0) die_stdout();
}

static const char *size_text(char buf[32], double bytes) {
    static const char *const unit[] = {"B", "KB", "MB", "GB", "TB"};
    int u = 0;
    for (; bytes >= 1000 && u < 4; u++) bytes /= 1000;
    snprintf(buf, 32, u == 0 ? "%.0f %s" : "%.1f %s", bytes, unit[u]);
    return buf;
}

// ---- flags ----

enum {
    GENERATE = 1,
    CHAT = 2,
    COMPRESS = 4,
    ASK = 8,
    SCORE = 16,
    LOGITS = 32,
    TOKENIZE = 64,
    INFO = 128,
    BENCH = 256,
    EVAL = 512,
    CALIBRATE = 1024,
    MAP = 2048,
    ALL = 4095,
    ANSWERS = GENERATE | CHAT | ASK,
    CONTEXT = COMPRESS | SCORE | MAP,
    STREAMS = GENERATE | CHAT | COMPRESS,  // may evict while tokens come
    RUNS = ALL & ~(TOKENIZE | INFO)
};

typedef struct {
    const char *prompt, *file, *ids, *out, *cache, *system, *task, *answer_prefix, *stop;
    const char *policy, *level, *set, *isa;
    const char *ppl, *chart, *shard, *kv, *kvs, *profile;
    long threads, n, seed, n_prefix, chunk, batch, budget, window;
    double temp, top_p, ratio, lambda;
    int score_attn, demote;  // which of the flag's choices; demote -1 when not given
    bool special, bos, decode, raw, ref_ties, ignore_eos, keep, merge, into, stream, json, quiet;
    BenchList depths, ratios, shares, prompts, batches;
    const char *program, *command;
    unsigned bit;  // of the command
    char **args;   // [n_args] what is left: MODEL, CACHE, questions
    int n_args;
} Options;

static const Options defaults = {.n = -1,
                                 .seed = -1,
                                 .n_prefix = -1,
                                 .temp = -1,
                                 .top_p = 0.95,
                                 .window = 128,
                                 .lambda = 1e-3,
                                 .demote = -1,
                                 .depths = {{0, 1024}, 2},
                                 .ratios = {{1, 0.3}, 2},
                                 .shares = {{1, 0.7, 0.5, 0.3, 0.2, 0.1}, 6},
                                 .kvs = "f16",
                                 .prompts = {{512}, 1},
                                 .batches = {{1, 4}, 2}};

typedef enum { SWITCH, TEXT, COUNT, REAL, CHOICE, LIST } FlagKind;

typedef struct {
    const char *name, *value;
    FlagKind kind;
    size_t at;            // where in Options
    double lo, hi;        // of COUNT, REAL and LIST
    const char *choices;  // of CHOICE, "f16|f32"
    unsigned takes;       // subcommands whose -h lists it
    unsigned also;        // others that accept it, so that one set of flags fits a whole script
    const char *help;
} Flag;

#define AT(field) offsetof(Options, field)
#define RATIO_MIN 1e-6
static const Flag flags[] = {
    {"-p", "TEXT", TEXT, AT(prompt), 0, 0, NULL, RUNS & ~(CHAT | ASK | BENCH | EVAL | CALIBRATE), 0,
     "the text; - reads stdin"},
    {"-p", "TEXT", TEXT, AT(prompt), 0, 0, NULL, TOKENIZE, 0, "the text (default: stdin)"},
    {"-f", "FILE", TEXT, AT(file), 0, 0, NULL, RUNS & ~(CHAT | ASK | BENCH | EVAL | CALIBRATE), 0,
     "a file with the text; - reads stdin"},
    {"-f", "FILE", TEXT, AT(file), 0, 0, NULL, TOKENIZE, 0, "a file with the text or the ids"},
    {"-f", "FILE", TEXT, AT(file), 0, 0, NULL, ASK, 0,
     "questions, one a line; the start of the answer may follow after a tab"},
    {"--ids", "FILE", TEXT, AT(ids), 0, 0, NULL,
     ALL & ~(CHAT | ASK | BENCH | EVAL | INFO | CALIBRATE), 0,
     "token ids instead of a text, decimal, white space between"},
    {"--n-prefix", "N", COUNT, AT(n_prefix), 0, INT_MAX, NULL, CONTEXT, 0,
     "with --ids: the first N are the protected prefix (default 0)"},
    {"-o", "OUT", TEXT, AT(out), 0, 0, NULL, CONTEXT | LOGITS, 0, "the file to write"},
    {"-c", "CACHE", TEXT, AT(cache), 0, 0, NULL, CHAT | LOGITS, 0,
     "continue after a saved context"},
    {"--policy", "NAME", TEXT, AT(policy), 0, 0, NULL, CONTEXT | BENCH | STREAMS, 0,
     "who scores (default: expected with a profile or while tokens come, else kvzip):"},
    {"--ratio", "R", REAL, AT(ratio), RATIO_MIN, 1, NULL, COMPRESS | MAP, SCORE,
     "share of the context's pairs that stays (default 0.3; 1: no scoring)"},
    {"--ratio", "R", REAL, AT(ratio), RATIO_MIN, 1, NULL, GENERATE | CHAT, 0,
     "evict as tokens come: share of the pairs that stays (default: all)"},
    {"--budget", "N", COUNT, AT(budget), 1, INT_MAX, NULL, STREAMS, 0,
     "evict as tokens come: pairs that stay, per head on average, however many tokens there are"},
    {"--stream", NULL, SWITCH, AT(stream), 0, 0, NULL, COMPRESS, 0,
     "evict to --ratio while reading: the whole cache is never in memory"},
    {"--stream", NULL, SWITCH, AT(stream), 0, 0, NULL, EVAL, 0,
     "evict while a context is read, not once it is there"},
    {"--window", "N", COUNT, AT(window), 0, INT_MAX, NULL, STREAMS | EVAL, 0,
     "newest pairs of each head, which are not evicted as tokens come (default 128)"},
    {"--level", "NAME", TEXT, AT(level), 0, 0, NULL, COMPRESS | MAP | BENCH | STREAMS, SCORE,
     "which pairs compete for a place (default: profile where there is one, else pair):"},
    {"--demote", "TYPE", CHOICE, AT(demote), 0, 0, "q2", COMPRESS, SCORE | MAP,
     "keep what would be evicted at 2 bits"},
    {"--set", "K=V,..", TEXT, AT(set), 0, 0, NULL, CONTEXT | BENCH | EVAL | STREAMS, 0,
     "parameters of the policy and the level, as listed there"},
    {"--policy", "NAME,..", TEXT, AT(policy), 0, 0, NULL, EVAL, 0,
     "who scores (default: expected with a profile or --stream, else kvzip):"},
    {"--level", "NAME,..", TEXT, AT(level), 0, 0, NULL, EVAL, 0,
     "which pairs compete for a place (default: profile where there is one, else pair):"},
    {"--ratio", "R,..", LIST, AT(shares), RATIO_MIN, 1, NULL, EVAL, 0,
     "shares of the context's pairs that stay (default 1,0.7,0.5,0.3,0.2,0.1)"},
    {"--kv", "TYPE,..", TEXT, AT(kvs), 0, 0, NULL, EVAL, 0,
     "as below; with +q2 what is evicted stays at 2 bits; the first one's full cache is the "
     "yardstick"},
    {"-o", "FILE", TEXT, AT(out), 0, 0, NULL, EVAL, 0,
     "results, added as they come; what is there already is not done again"},
    {"--chart", "FILE", TEXT, AT(chart), 0, 0, NULL, EVAL, 0, "an SVG of the results"},
    {"--shard", "I/N", TEXT, AT(shard), 0, 0, NULL, EVAL, 0,
     "only every N-th context, from the I-th on"},
    {"--merge", NULL, SWITCH, AT(merge), 0, 0, NULL, EVAL, 0,
     "the arguments are files of results, of shards for example: one table of all"},
    {"--ppl", "FILE", TEXT, AT(ppl), 0, 0, NULL, EVAL, 0,
     "perplexity of a text, with the windows of llama-perplexity, instead of tasks"},
    {"--profile", "FILE", TEXT, AT(profile), 0, 0, NULL, CONTEXT | BENCH | EVAL | STREAMS, 0,
     "what `run calibrate` learned about the model (default: what the model file carries)"},
    {"-f", "FILE", TEXT, AT(file), 0, 0, NULL, CALIBRATE, 0,
     "sample text, parts between lines of ==== (default: eval/calibration.txt beside the program)"},
    {"-o", "FILE", TEXT, AT(out), 0, 0, NULL, CALIBRATE, 0, "the profile to write"},
    {"--lambda", "X", REAL, AT(lambda), 1e-12, 1e12, NULL, CALIBRATE, 0,
     "ridge of the regression, as a share of each feature's own square (default 0.001)"},
    {"--into", NULL, SWITCH, AT(into), 0, 0, NULL, CALIBRATE, 0,
     "-o is a copy of the model that carries the profile; it may be MODEL itself"},
    {"--ref-ties", NULL, SWITCH, AT(ref_ties), 0, 0, NULL, COMPRESS | MAP, SCORE,
     "the authors' threshold rule, which drops ties, instead of the exact count"},
    {"--chunk", "N", COUNT, AT(chunk), 1, INT_MAX, NULL, CONTEXT | BENCH | EVAL | CALIBRATE, 0,
     "tokens repeated at a time (default 2000; with --score-attn local 1000)"},
    {"--score-attn", "HOW", CHOICE, AT(score_attn), 0, 0, "full|local", CONTEXT | EVAL, BENCH,
     "the repeated text sees all of the context (default), or its own part"},
    {"--system", "TEXT", TEXT, AT(system), 0, 0, NULL, CHAT | CONTEXT | EVAL | CALIBRATE, 0,
     "system text of the chat"},
    {"--task", "TEXT", TEXT, AT(task), 0, 0, NULL, CONTEXT | EVAL | CALIBRATE, 0,
     "what stands before the context instead of a request to answer briefly"},
    {"--raw", NULL, SWITCH, AT(raw), 0, 0, NULL, ASK | CONTEXT | EVAL | CALIBRATE, 0,
     "no chat template: context and questions are taken as they are"},
    {"--answer-prefix", "TEXT", TEXT, AT(answer_prefix), 0, 0, NULL, ASK, 0,
     "the start of every answer, which small models need"},
    {"--stop", "TEXT", TEXT, AT(stop), 0, 0, NULL, ANSWERS | EVAL, 0,
     "end an answer after this text"},
    {"--keep", NULL, SWITCH, AT(keep), 0, 0, NULL, ASK, 0,
     "each question sees the ones before it and their answers"},
    {"--batch", "N", COUNT, AT(batch), 1, MAX_BATCH, NULL, ASK, 0,
     "questions answered together (default 8; 1 with --keep); the answers are those of one at a "
     "time"},
    {"--ignore-eos", NULL, SWITCH, AT(ignore_eos), 0, 0, NULL, ANSWERS, 0,
     "do not stop at stop tokens"},
    {"--special", NULL, SWITCH, AT(special), 0, 0, NULL, TOKENIZE, 0,
     "recognize the text of special tokens"},
    {"--bos", NULL, SWITCH, AT(bos), 0, 0, NULL, TOKENIZE, 0,
     "add what the model's tokenizer adds"},
    {"--decode", NULL, SWITCH, AT(decode), 0, 0, NULL, TOKENIZE, 0, "ids to bytes, nothing added"},
    {"--prompt", "N,..", LIST, AT(prompts), 1, 1 << 24, NULL, BENCH, 0,
     "prefill lengths (default 512)"},
    {"--depth", "D,..", LIST, AT(depths), 0, 1 << 24, NULL, BENCH, 0,
     "tokens read before decoding (default 0,1024)"},
    {"--ratio", "R,..", LIST, AT(ratios), RATIO_MIN, 1, NULL, BENCH, 0,
     "shares of them kept (default 1,0.3)"},
    {"--batch", "B,..", LIST, AT(batches), 1, MAX_BATCH, NULL, BENCH, 0,
     "sequences decoding together (default 1,4)"},
    {"-n", "N", COUNT, AT(n), 0, INT_MAX, NULL, GENERATE, ALL, "tokens at most (default 256)"},
    {"-n", "N", COUNT, AT(n), 0, INT_MAX, NULL, CHAT, ALL,
     "tokens of an answer at most (default 512)"},
    {"-n", "N", COUNT, AT(n), 0, INT_MAX, NULL, ASK, ALL,
     "tokens of an answer at most (default 96)"},
    {"-n", "N", COUNT, AT(n), 1, 4096, NULL, BENCH, ALL, "tokens of a decode run (default 32)"},
    {"-n", "N", COUNT, AT(n), 1, 65536, NULL, EVAL, ALL,
     "tokens of an answer at most (default 96), or of a window of --ppl (default 512)"},
    {"--temp", "T", REAL, AT(temp), 0, 100, NULL, GENERATE | CHAT, ALL,
     "temperature (default 0.7; 0: always the likeliest token)"},
    {"--temp", "T", REAL, AT(temp), 0, 100, NULL, ASK, ALL,
     "temperature (default 0: the likeliest token)"},
    {"--top-p", "P", REAL, AT(top_p), 0, 1, NULL, ANSWERS, ALL,
     "sample from the likeliest tokens that have this share (default 0.95)"},
    {"--seed", "S", COUNT, AT(seed), 0, INT_MAX, NULL, ANSWERS, ALL,
     "of the sampling (default: the clock)"},
    {"-j", "N", COUNT, AT(threads), 1, 1024, NULL, RUNS, ALL, "threads (default: one per core)"},
    {"--isa", "SET", TEXT, AT(isa), 0, 0, NULL, RUNS, ALL,
     "scalar, avx2, avx2vnni, avx512 or neon (default: the best)"},
    {"--kv", "TYPE", TEXT, AT(kv), 0, 0, NULL, RUNS & ~EVAL, ALL & ~EVAL,
     "numbers of the cache: f16 (default), f32, q8, q4, q2, or keys/values, as in q8/q4"},
    {"--json", NULL, SWITCH, AT(json), 0, 0, NULL, ALL, ALL, "one JSON object a line"},
    {"-q", NULL, SWITCH, AT(quiet), 0, 0, NULL, ALL, ALL, "no progress, no figures"},
};
enum { N_FLAGS = sizeof flags / sizeof *flags };

typedef struct {
    const char *name;
    unsigned bit;
    const char *args;
    int min_args, max_args;
    int (*run)(const Options *o);
    const char *help;      // one line
    const char *examples;  // after the flags
} Command;

// The row of `name` that the subcommand lists, or else one that it accepts.
static const Flag *flag_find(const char *name, size_t len, unsigned command) {
    const Flag *found = NULL;
    for (int i = 0; i < N_FLAGS; i++) {
        const Flag *f = &flags[i];
        if (strlen(f->name) != len || memcmp(f->name, name, len) != 0) continue;
        if (f->takes & command) return f;
        if (!found && (f->also & command)) found = f;
    }
    return found;
}

static bool parse_number(const char *text, const Flag *f, double *v) {
    char *end;
    errno = 0;
    *v = f->kind == COUNT ? (double)strtol(text, &end, 10) : strtod(text, &end);
    return errno == 0 && end != text && *end == '\0' && *v >= f->lo && *v <= f->hi;
}

static bool parse_list(const char *text, const Flag *f, BenchList *list) {
    char item[64];
    for (list->n = 0; list->n < BENCH_LIST; text++) {
        size_t len = strcspn(text, ",");
        if (len >= sizeof item) return false;
        memcpy(item, text, len);
        item[len] = '\0';
        if (!parse_number(item, f, &list->v[list->n++])) return false;
        text += len;
        if (*text == '\0') return true;
    }
    return false;
}

static bool parse_choice(const char *text, const char *choices, int *index) {
    size_t len = strlen(text);
    for (*index = 0;; (*index)++) {
        size_t n = strcspn(choices, "|");
        if (n == len && memcmp(choices, text, n) == 0) return true;
        if (choices[n] == '\0') return false;
        choices += n + 1;
    }
}

static void flag_set(Options *o, const Flag *f, const char *value) {
    void *at = (char *)o + f->at;
    double v = 0;
    switch (f->kind) {
    case SWITCH:
        *(bool *)at = true;
        break;
    case TEXT:
        *(const char **)at = value;
        break;
    case CHOICE:
        if (!parse_choice(value, f->choices, (int *)at))
            die_usage(o->command, "%s %s: needs one of %s", f->name, value, f->choices);
        break;
    case LIST:
        if (!parse_list(value, f, (BenchList *)at))
            die_usage(o->command, "%s %s: needs at most %d numbers from %.10g to %.10g", f->name,
                      value, BENCH_LIST, f->lo, f->hi);
        break;
    default:
        if (!parse_number(value, f, &v))
            die_usage(o->command, "%s %s: needs a %s from %.10g to %.10g", f->name, value,
                      f->kind == COUNT ? "whole number" : "number", f->lo, f->hi);
        if (f->kind == COUNT)
            *(long *)at = (long)v;
        else
            *(double *)at = v;
    }
}

// Fills o from argv; what is no flag is moved to the front of argv and becomes o->args.
static void parse_options(Options *o, const Command *c, int argc, char **argv) {
    *o = defaults;
    o->command = c->name;
    o->bit = c->bit;
    o->args = argv;
    bool only_args = false;
    for (int i = 0; i < argc; i++) {
        char *arg = argv[i];
        if (only_args || arg[0] != '-' || arg[1] == '\0') {
            o->args[o->n_args++] = arg;
            continue;
        }
        if (strcmp(arg, "--") == 0) {
            only_args = true;
            continue;
        }
        const char *value = arg[1] == '-' ? strchr(arg, '=') : NULL;
        size_t len = value ? (size_t)(value - arg) : strlen(arg);
        const Flag *f = flag_find(arg, len, c->bit);
        if (!f) die_usage(c->name, "unknown flag %s", arg);
        if (value) value++;
        if (value && f->kind == SWITCH) die_usage(c->name, "%s takes no value", f->name);
        if (!value && f->kind != SWITCH) {
            if (i + 1 == argc) die_usage(c->name, "%s: its value %s is missing", f->name, f->value);
            value = argv[++i];
        }
        flag_set(o, f, value);
    }
    if (o->ratio == 0 && (c->bit & CONTEXT)) o->ratio = 0.3;
    if (o->chunk == 0 && c->bit != BENCH) o->chunk = default_chunk(o->score_attn == 1);
    if (o->n_args < c->min_args) die_usage(c->name, "needs %s", c->args);
    if (o->n_args > c->max_args)
        die_usage(c->name, "unexpected argument '%s'", o->args[c->max_args]);
}

static void help_row(const char *name, const char *help, const Param *params) {
    out("  %-22s  %s: %s\n", "", name, help);
    for (int i = 0; i < MAX_PARAMS && params[i].name; i++)
        out("  %-22s    %s=%g: %s\n", "", params[i].name, params[i].value, params[i].help);
}

static void print_help(const Command *c) {
    out("usage: run %s %s [flags]\n  %s\n\nflags:\n", c->name, c->args, c->help);
    for (int i = 0; i < N_FLAGS; i++) {
        const Flag *f = &flags[i];
        if (!(f->takes & c->bit)) continue;
        char head[32];
        snprintf(head, sizeof head, "%s %s", f->name, f->value ? f->value : "");
        out("  %-22s%s%s%s\n", head, f->choices ? f->choices : "", f->choices ? ": " : "", f->help);
        if (f->at == AT(policy))
            for (const Policy *p = policies; p->name; p++) help_row(p->name, p->help, p->params);
        if (f->at == AT(level))
            for (const Level *l = levels; l->name; l++) help_row(l->name, l->help, l->params);
    }
    out("  %-22s%s\n\nexamples:\n%s", "-h", "this text", c->examples);
}

// ---- what comes in ----

static void add_text(Buffer *b, const char *s, size_t n) {
    if (buffer_add(b, s, n) != 0) die_memory();
}

// The whole file, or stdin for "-".
static Buffer read_all(const char *path) {
    Buffer b = {0};
    char block[1 << 16];
    bool is_stdin = strcmp(path, "-") == 0;
    FILE *f = is_stdin ? stdin : fopen(path, "rb");
    if (!f) die("%s: %s", path, strerror(errno));
    add_text(&b, "", 0);
    for (size_t n; (n = fread(block, 1, sizeof block, f)) > 0;) add_text(&b, block, n);
    if (ferror(f)) die("%s: %s", is_stdin ? "stdin" : path, strerror(errno));
    if (!is_stdin) fclose(f);
    return b;
}

// What -p, -f or --ids gives; without any, the file at fallback. Two of them are wrong usage.
static Buffer read_text(const Options *o, const char *fallback) {
    Buffer b = {0};
    if ((o->prompt != NULL) + (o->file != NULL) + (o->ids != NULL) > 1)
        die_usage(o->command, "only one of -p, -f and --ids can be given");
    if (o->prompt && strcmp(o->prompt, "-") != 0) {
        add_text(&b, o->prompt, strlen(o->prompt));
        return b;
    }
    const char *path = o->prompt ? o->prompt : o->file ? o->file : o->ids ? o->ids : fallback;
    if (!path) die_usage(o->command, "needs -p TEXT, -f FILE or --ids FILE");
    return read_all(path);
}

static const char *piped_input(void) { return isatty(STDIN_FILENO) ? NULL : "-"; }

static void push_id(Ids *ids, int id) {
    if (ids_push(ids, id) != 0) die_memory();
}

// Decimal ids below vocab, white space between them.
static void parse_ids(const Buffer *text, const char *from, int vocab, Ids *ids) {
    const char *p = text->s, *end = text->s + text->n;
    while (p < end) {
        if (isspace((unsigned char)*p)) {
            p++;
            continue;
        }
        long id = 0;
        const char *start = p;
        while (p < end && isdigit((unsigned char)*p) && id < vocab) id = 10 * id + (*p++ - '0');
        if (id >= vocab || (p < end && !isspace((unsigned char)*p))) {
            while (p < end && !isspace((unsigned char)*p)) p++;
            die("%s: '%.*s' at byte %ld is not a token id from 0 to %d", from,
                (int)(p - start > 40 ? 40 : p - start), start, (long)(start - text->s), vocab - 1);
        }
        push_id(ids, (int)id);
    }
}

static void encode(const Tokenizer *tok, const char *text, size_t n, unsigned how, Ids *ids) {
    if (tokenizer_encode(tok, text, n, how, ids) != 0) die_memory();
}

static bool same_file(const char *path, const struct stat *other) {
    struct stat st;
    return path && stat(path, &st) == 0 && st.st_dev == other->st_dev && st.st_ino == other->st_ino;
}

// Before any work: the directory of path takes files, and path is none of the files read.
static void check_writable(const Options *o, const char *path) {
    struct stat st;
    const char *slash = strrchr(path, '/');
    Buffer dir = {0};
    add_text(&dir, slash ? path : ".", slash ? (size_t)(slash - path) + 1 : 1);
    if (stat(dir.s, &st) != 0 || access(dir.s, W_OK | X_OK) != 0)
        die("%s: cannot be written: %s", path, strerror(errno));
    free(dir.s);
    if (stat(path, &st) != 0) {
        if (errno != ENOENT) die("%s: cannot be written: %s", path, strerror(errno));
        return;
    }
    if (!S_ISREG(st.st_mode)) die("%s: cannot be written: not a regular file", path);
    const char *model = o->into ? NULL : o->args[0];  // into itself: the old file stays mapped
    const char *const inputs[] = {model, o->n_args > 1 ? o->args[1] : NULL, o->file, o->ids,
                                  o->cache};
    for (int i = 0; i < 5; i++)
        if (same_file(inputs[i], &st))
            die("%s: is read by this command: it cannot be written", path);
}

static void check_output(const Options *o) {
    if (!o->out) die_usage(o->command, "needs -o OUT");
    check_writable(o, o->out);
}

// ---- a session: everything that is open while a subcommand runs ----

typedef struct {
    const Options *o;
    ThreadPool *pool;
    Model model;
    Tokenizer *tok;
    RunState state;
    KVCache kv;
    KVInfo info;  // of a loaded cache
    Answerer answerer;
    Sampling sampling;  // of all answers
    bool warned;        // about positions that the model was not trained for
    Profile profile;    // of --profile, or the model's own
    bool has_profile;
    Context context;  // what is evicted while tokens come, when `streams`
    Stream stream;
    bool streams;
} Session;

static void warn(const Session *s, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void warn(const Session *s, const char *fmt, ...) {
    va_list ap;
    if (s->o->quiet) return;
    va_start(ap, fmt);
    fputs("run: warning: ", stderr);
    vfprintf(stderr, fmt, ap);
    fputc('\n', stderr);
    va_end(ap);
}

// Model and tokenizer alone.
static void open_model(Session *s, const Options *o) {
    char err[ERR_LEN];
    *s = (Session){.o = o};
    if (model_open(&s->model, o->args[0], err) != 0) die("%s: %s", o->args[0], err);
    s->tok = tokenizer_open(&s->model.file, err);
    if (!s->tok) die("%s: %s", o->args[0], err);
}

// Workers are made with signals blocked: one that arrives wakes the thread that reads the prompt.
static ThreadPool *open_pool(long n) {
    sigset_t block, before;
    sigfillset(&block);
    pthread_sigmask(SIG_SETMASK, &block, &before);
    ThreadPool *pool = pool_open(n > 0 ? (int)n : cores_online());
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!pool) die("-j %ld: the threads cannot be made", n > 0 ? n : (long)cores_online());
    return pool;
}

static KVTypes get_kv(const Options *o, const char *name) {
    KVTypes types;
    if (kvcache_types_parse(name, &types) == 0) return types;
    die_usage(o->command, "--kv %s: needs f16, f32, q8, q4, q2 or keys/values, as in q8/q4", name);
}

static void open_cache(Session *s, const char *path) {
    char err[ERR_LEN];
    KVShape shape = model_kv_shape(&s->model);
    KVTypes types = get_kv(s->o, s->o->kv ? s->o->kv : "f16");
    if (!path) {
        if (kvcache_open(&s->kv, &shape, types, s->pool, err) != 0) die("%s", err);
        return;
    }
    KVModel model = {shape, s->model.fingerprint};
    if (kvfile_load(&s->kv, path, &model, s->pool, &s->info, err) != 0) die("%s: %s", path, err);
    char name[KV_NAME];
    if (s->o->kv && (s->kv.types.k != types.k || s->kv.types.v != types.v))
        warn(s, "%s holds %s pairs, --kv does not change that", path,
             kvcache_types_name(s->kv.types, name));
}

// Opens model, threads, scratch and the cache: empty, or the saved one at path.
static void open_session(Session *s, const Options *o, const char *path, int max_logits) {
    char err[ERR_LEN];
    if (kernels_init(o->isa) != 0)
        die_usage(o->command, "--isa %s: this machine or this program has no such set",
                  o->isa ? o->isa : "");
    open_model(s, o);
    s->pool = open_pool(o->threads);
    if (state_open(&s->state, &s->model, s->pool, MAX_ROWS, max_logits, err) != 0) die("%s", err);
    open_cache(s, path);
}

static void close_session(Session *s) {
    answer_close(&s->answerer);
    stream_close(&s->stream);
    profile_close(&s->profile);
    kvcache_close(&s->kv);
    state_close(&s->state);
    tokenizer_close(s->tok);
    model_close(&s->model);
    pool_close(s->pool);
}

static int new_sequence(Session *s) {
    char err[ERR_LEN];
    int seq = kvcache_new(&s->kv, err);
    if (seq < 0) die("%s", err);
    return seq;
}

// For commands that write: answers are sampled at --temp, or at `temp` where that is not given.
static void open_answers(Session *s, double temp) {
    char err[ERR_LEN];
    const Options *o = s->o;
    s->sampling =
        (Sampling){.temp = o->temp < 0 ? temp : o->temp,
                   .top_p = o->top_p,
                   .random = o->seed >= 0 ? (uint64_t)o->seed
                                          : (uint64_t)time(NULL) * 1000003u + (uint64_t)getpid()};
    if (answer_open(&s->answerer, &s->state, &s->kv, s->tok, err) != 0) die("%s", err);
}

static void warn_length(Session *s, long positions) {
    if (s->warned || positions <= s->model.config.seq_len) return;
    s->warned = true;
    warn(s, "%ld positions, but the model was trained for %d", positions, s->model.config.seq_len);
}

// ---- progress ----

typedef struct {
    bool on;           // on a terminal, not with -q
    const char *unit;  // of what is counted; NULL: tokens
    const char *what;  // the work that started at `start`
    double start, last, shown;
} Progress;

static Progress progress_begin(const Session *s) {
    return (Progress){.on = !s->o->quiet && isatty(STDERR_FILENO), .last = now()};
}

// Called as work goes on; nonzero asks it to stop. Redraws the bar, ten times a second at most and
// not for what takes no time.
static int progress_step(void *arg, const char *what, long done, long total) {
    static const char full[] = "##############################";
    enum { WIDTH = sizeof full - 1 };
    Progress *p = arg;
    double t = now();
    if (p->what != what) p->start = p->last;
    p->what = what;
    p->last = t;
    double elapsed = t - p->start;
    if (done > total) done = total;
    if (p->on && done > 0 && elapsed >= 0.5 && t - p->shown >= 0.1) {
        int bar = (int)(WIDTH * done / total), left = (int)(elapsed / done * (total - done) + 0.5);
        fprintf(stderr, "\r%-8s [%.*s%*s] %3ld%%  %.0f %s/s  %d:%02d left \033[K", what, bar, full,
                WIDTH - bar, "", 100 * done / total, done / elapsed, p->unit ? p->unit : "tokens",
                left / 60, left % 60);
        p->shown = t;
    }
    return interrupted != 0;
}

static void progress_end(const Progress *p) {
    if (p->on && p->shown > 0) fputs("\r\033[K", stderr);
}

// ---- the method: who scores, and who competes with whom ----

static void add_name(Buffer *names, const char *name) {
    add_text(names, " ", 1);
    add_text(names, name, strlen(name));
}

static const Policy *get_policy(const Options *o, const char *name) {
    const Policy *policy = policy_find(name);
    if (policy) return policy;
    Buffer names = {0};
    for (const Policy *p = policies; p->name; p++) add_name(&names, p->name);
    die_usage(o->command, "--policy %s: there are%s", name, names.s);
}

static const Level *get_level(const Options *o, const char *name) {
    const Level *level = level_find(name);
    if (level) return level;
    Buffer names = {0};
    for (const Level *l = levels; l->name; l++) add_name(&names, l->name);
    die_usage(o->command, "--level %s: there are%s", name, names.s);
}

// The profile that --profile names or the model carries, if any.
static void open_profile(Session *s) {
    char err[ERR_LEN];
    const char *path = s->o->profile;
    if (!path && !profile_carried(&s->model)) return;
    if (profile_open(&s->profile, &s->model, path, err) != 0)
        die("%s: %s", path ? path : s->o->args[0], err);
    s->has_profile = true;
}

// Whether pairs are evicted before all tokens are there.
static bool wants_stream(const Options *o) {
    return o->budget > 0 || o->stream || (!(o->bit & CONTEXT) && o->ratio > 0);
}

// Where the flags leave it open: with a profile expected attention within the profile's shares,
// else KVzip with its repeat passes, which need the whole context.
static const char *default_policy(const Session *s) {
    bool shares = s->has_profile && (!s->o->level || strcmp(s->o->level, "profile") == 0);
    return shares || wants_stream(s->o) ? "expected" : "kvzip";
}

static const char *default_level(const Session *s) {
    return s->has_profile && !s->o->policy ? "profile" : "pair";
}

// A context that knows how it will be compressed, and nothing else yet.
static Context chosen_method(Session *s) {
    char err[ERR_LEN];
    const Options *o = s->o;
    open_profile(s);
    Context c = {.chunk = (int)o->chunk,
                 .local = o->score_attn == 1,
                 .ref_ties = o->ref_ties,
                 .profile = s->has_profile ? &s->profile : NULL};
    const Policy *policy = get_policy(o, o->policy ? o->policy : default_policy(s));
    const Level *level = get_level(o, o->level ? o->level : default_level(s));
    if (context_set(&c, policy, level, o->set, err) != 0)
        die_usage(o->command, "--set %s: %s", o->set, err);
    return c;
}

// From here on seq, of which the first n_prefix pairs stay, is evicted while it grows.
static void start_stream(Session *s, Context *c) {
    char err[ERR_LEN];
    const Options *o = s->o;
    if (stream_open(&s->stream, c, o->ratio, o->budget, (int)o->window, err) != 0) die("%s", err);
    s->streams = true;
    s->answerer.after = stream_after, s->answerer.after_arg = &s->stream;
}

// For commands that write: the first tokens stay, where models look when nothing else fits (arXiv
// 2309.17453).
static void stream_sequence(Session *s, int seq) {
    enum { SINK = 4 };
    if (!wants_stream(s->o)) return;
    s->context = chosen_method(s);
    s->context.state = &s->state, s->context.kv = &s->kv, s->context.tok = s->tok;
    s->context.seq = seq, s->context.n_prefix = SINK;
    start_stream(s, &s->context);
}

// ---- replies ----

// A reply as the flags want it; prompt and limit are left to fill in.
static Reply new_reply(Session *s, int seq, const Ids *prompt, int limit) {
    return (Reply){.seq = seq,
                   .prompt = prompt->id,
                   .n_prompt = prompt->n,
                   .limit = limit,
                   .stop = s->o->stop,
                   .ignore_stop = s->o->ignore_eos,
                   .sampling = &s->sampling};
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
    if (n <= r->shown) return;
    put(text + r->shown, n - r->shown);
    flush();
    r->shown = n;
}

static void show_all(Reply *r) { show_text(r, r->text.s, r->text.n); }

static void show_stripped(Reply *r) {
    size_t n;
    const char *text = stripped(r->text.s, r->text.n, &n);
    show_text(r, text, n);
}

// Tokens per second of the steps that wrote; the first token came with the prompt.
static double reply_rate(const Reply *r) {
    return r->n_fed > r->n_prompt ? (r->n_fed - r->n_prompt) / r->write_s : 0;
}

static void reply_figures(const Session *s, const Reply *r) {
    if (s->o->quiet) return;
    fprintf(stderr, "[%d tokens read in %.2f s, %.1f/s; %d written in %.2f s, %.1f/s]\n",
            r->n_prompt, r->read_s, r->n_prompt / r->read_s, r->ids.n, r->write_s, reply_rate(r));
}

static int exit_code(void) { return interrupted ? 128 + interrupted : 0; }

// ---- generate ----

// The ids of -p, -f or --ids, whose content is text.
static void input_ids(const Session *s, const Buffer *text, unsigned how, Ids *ids) {
    if (s->o->ids)
        parse_ids(text, s->o->ids, s->model.config.vocab_size, ids);
    else
        encode(s->tok, text->s, text->n, how, ids);
}

static int cmd_generate(const Options *o) {
    Session s;
    char err[ERR_LEN];
    void (*show)(Reply * r) = o->json ? NULL : show_all;
    Ids ids = {0};
    Buffer text = read_text(o, piped_input());
    catch_signals();
    open_session(&s, o, NULL, 1);
    input_ids(&s, &text, TOK_BOS, &ids);
    if (ids.n == 0) die("nothing to continue: the prompt is empty");
    open_answers(&s, CHATTY);
    Reply r = new_reply(&s, new_sequence(&s), &ids, o->n < 0 ? 256 : (int)o->n);
    if (reply_begin(&r, "", err) != 0) die("%s", err);
    stream_sequence(&s, r.seq);
    read_prompt(&s, &r);
    if (show) show(&r);
    write_replies(&s, (Reply *[]){&r}, 1, show);
    if (o->json) {
        json_print(stdout, "{'text': %.*s, 'ids': [", (int)r.text.n, r.text.s);
        for (int i = 0; i < r.ids.n; i++) out(i ? ", %d" : "%d", r.ids.id[i]);
        json_print(stdout, "], 'n_prompt': %d, 'n_answer': %d, 'prefill_s': %g, ", r.n_prompt,
                   r.ids.n, r.read_s);
        json_print(stdout, "'seconds': %g, 'tokens_per_s': %g}\n", r.read_s + r.write_s,
                   reply_rate(&r));
    } else if (r.text.n > 0 && r.text.s[r.text.n - 1] != '\n') {
        put("\n", 1);
    }
    flush();
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
    Reply reply;
} Question;

static void question_free(Question *q) {
    free(q->text);
    free(q->prefix);
    ids_free(&q->ids);
    reply_free(&q->reply);
}

// Where questions come from: arguments first, then the lines of a file.
typedef struct {
    char **args;
    int n_args, at;
    FILE *file;  // NULL: arguments only
    const char *name;
    bool person;         // somebody types them
    const char *prefix;  // where a line has none of its own
    char *line;
    size_t cap;
} Questions;

static char *copy_text(const char *s, size_t n) {
    Buffer b = {0};
    add_text(&b, s, n);
    return b.s;
}

// The next line, without its newline. A first Ctrl-C at the prompt is forgiven, a second ends all.
static bool read_line(Questions *q, size_t *n) {
    for (int tries = 0; tries < 2; tries++) {
        if (q->person) fputs("> ", stderr);
        ssize_t got = getline(&q->line, &q->cap, q->file);
        if (got >= 0) {
            *n = (size_t)got;
            while (*n > 0 && (q->line[*n - 1] == '\n' || q->line[*n - 1] == '\r')) (*n)--;
            return true;
        }
        if (!interrupted && ferror(q->file)) die("%s: %s", q->name, strerror(errno));
        if (q->person) fputc('\n', stderr);
        if (interrupted != SIGINT || !q->person) return false;
        interrupted = 0;
        clearerr(q->file);
        if (tries == 0) fputs("(Ctrl-C again or Ctrl-D ends)\n", stderr);
    }
    return false;
}

// Blank ones are left out. In a line the start of the answer may follow after a tab.
static bool next_question(Questions *q, Question *next) {
    size_t n, length;
    while (q->at < q->n_args || q->file) {
        const char *s, *prefix = q->prefix ? q->prefix : "";
        size_t n_prefix = strlen(prefix);
        if (q->at < q->n_args) {
            s = q->args[q->at++];
            n = strlen(s);
        } else {
            if (!read_line(q, &n)) return false;
            s = q->line;
            const char *tab = memchr(s, '\t', n);
            if (tab) {
                prefix = tab + 1;
                n_prefix = (size_t)(s + n - prefix);
                n = (size_t)(tab - s);
            }
        }
        stripped(s, n, &length);
        if (length == 0) continue;
        *next = (Question){.text = copy_text(s, n), .prefix = copy_text(prefix, n_prefix)};
        return true;
    }
    return false;
}

static void print_reply(const Session *s, const Question *q) {
    size_t n;
    const Reply *r = &q->reply;
    const char *text = stripped(r->text.s, r->text.n, &n);
    if (s->o->json) {
        json_print(stdout, "{'question': %s, 'answer': %.*s, 'n_prompt': %d, 'n_answer': %d, ",
                   q->text, (int)n, text, r->n_prompt, r->ids.n);
        json_print(stdout, "'seconds': %g, 'tokens_per_s': %g}\n", r->read_s + r->write_s,
                   reply_rate(r));
    } else {
        put(text + r->shown, n - r->shown);
        put("\n", 1);
    }
    flush();
    reply_figures(s, r);
}

// Several questions and their answers, or a conversation.
typedef struct {
    Session *s;
    Talk talk;
    Questions from;
    int batch;      // questions answered together
    int limit;      // tokens of an answer at most
    bool keep;      // each question sees the ones before it
    bool tolerant;  // Ctrl-C ends an answer but not the rest, even where nobody types
} Exchange;

// Reads a question on its own fork of the context and begins the answer.
static void put_question(Exchange *x, Question *q, void (*show)(Reply *r)) {
    Session *s = x->s;
    char err[ERR_LEN];
    int seq = kvcache_fork(&s->kv, x->talk.seq, err);
    if (seq < 0 || talk_ask(&x->talk, q->text, q->prefix, &q->ids, err) != 0) die("%s", err);
    q->reply = new_reply(s, seq, &q->ids, x->limit);
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
    void (*show)(Reply * r) = n == 1 && !s->o->json ? show_stripped : NULL;
    for (int i = 0; i < n; i++) {
        put_question(x, &q[i], show);
        r[i] = &q[i].reply;
    }
    write_replies(s, r, n, show);
    for (int i = 0; i < n; i++) {
        print_reply(s, &q[i]);
        bool stays = x->keep && (r[i]->ids.n > 0 || !interrupted || s->streams);
        kvcache_drop(&s->kv, stays ? x->talk.seq : r[i]->seq);
        if (stays && talk_answered(&x->talk, r[i], err) != 0) die("%s", err);
        question_free(&q[i]);
    }
}

// Until the questions end; returns how many there were.
static int converse(Exchange *x) {
    Question q[MAX_BATCH];
    int asked = 0, batch = x->from.person ? 1 : x->batch;
    bool tolerant = x->from.person || x->tolerant,
         echo = !tolerant && !x->s->o->quiet && !x->s->o->json;
    while (!interrupted) {
        int n = 0;
        while (n < batch && next_question(&x->from, &q[n])) {
            if (echo) fprintf(stderr, "> %s\n", q[n].text);
            n++;
        }
        if (n == 0) break;
        answer(x, q, n);
        asked += n;
        if (interrupted == SIGINT && tolerant) interrupted = 0;
    }
    free(x->from.line);
    talk_free(&x->talk);
    return asked;
}

// The questions of the command line: arguments, -f or stdin.
static Questions given_questions(const Options *o) {
    bool from_stdin = (o->n_args == 2 && !o->file) || (o->file && strcmp(o->file, "-") == 0);
    Questions from = {.args = o->args + 2, .n_args = o->n_args - 2, .prefix = o->answer_prefix};
    if (!o->file && !from_stdin) return from;
    from.name = from_stdin ? "stdin" : o->file;
    from.file = from_stdin ? stdin : fopen(o->file, "r");
    from.person = from_stdin && isatty(STDIN_FILENO);
    if (!from.file) die("%s: %s", o->file, strerror(errno));
    return from;
}

static int cmd_ask(const Options *o) {
    Session s;
    if (o->keep && o->batch > 1) die_usage(o->command, "--keep and --batch do not go together");
    Exchange x = {.s = &s,
                  .from = given_questions(o),
                  .batch = o->batch  ? (int)o->batch
                           : o->keep ? 1
                                     : ASK_BATCH,
                  .limit = o->n < 0 ? 96 : (int)o->n,
                  .keep = o->keep};
    catch_signals();
    open_session(&s, o, o->args[1], x.batch);
    open_answers(&s, 0);
    x.talk = (Talk){.tok = s.tok, .raw = o->raw, .on_context = true};
    int asked = converse(&x);
    if (x.from.file && x.from.file != stdin) fclose(x.from.file);
    close_session(&s);
    if (asked == 0 && !x.from.person && !interrupted)
        die("%s: no question in it", x.from.file ? x.from.name : "arguments");
    return exit_code();
}

static int cmd_chat(const Options *o) {
    Session s;
    Exchange x = {.s = &s,
                  .from = {.file = stdin, .name = "stdin", .person = isatty(STDIN_FILENO)},
                  .batch = 1,
                  .limit = o->n < 0 ? 512 : (int)o->n,
                  .keep = true,
                  .tolerant = true};
    if (o->cache && o->system) die_usage(o->command, "--system: the context of -c has its own");
    catch_signals();
    open_session(&s, o, o->cache, 1);
    open_answers(&s, CHATTY);
    if (!tokenizer_chat(s.tok)->present) warn(&s, "%s has no chat template", o->args[0]);
    x.talk =
        (Talk){.tok = s.tok, .system = o->system, .raw = o->raw, .on_context = o->cache != NULL};
    if (!o->cache) x.talk.seq = new_sequence(&s);
    if (o->cache && wants_stream(o))
        die_usage(o->command, "-c: its pairs have been chosen already");
    stream_sequence(&s, x.talk.seq);
    converse(&x);
    close_session(&s);
    return exit_code();
}

// ---- contexts: compress, score and map ----

// What stands before the context: the chat's beginning and the task. Our own task text is part of
// the template and tokenized with it, as the authors do; a user's text never becomes a special
// token.
static void prefix_ids(const Session *s, Ids *ids) {
    const Options *o = s->o;
    const ChatTemplate *chat = tokenizer_chat(s->tok);
    const char *task = o->task ? o->task : TASK;
    Buffer text = {0};
    if (o->raw) {
        encode(s->tok, "", 0, TOK_BOS, ids);
        return;
    }
    if (o->system) {
        if (!chat->present) die("--system: %s has no chat template", o->args[0]);
        if (tokenizer_turn(s->tok, 's', o->system, true, false, ids) != 0) die_memory();
        add_text(&text, chat->user_prefix_after_system, strlen(chat->user_prefix_after_system));
    } else {
        add_text(&text, chat->kvzip_prefix, strlen(chat->kvzip_prefix));
    }
    if (!o->task) add_text(&text, task, strlen(task));
    encode(s->tok, text.s, text.n, TOK_SPECIAL, ids);
    if (o->task) encode(s->tok, task, strlen(task), 0, ids);
    free(text.s);
}

// The turn change between the repeat request and the repeated text.
static const char *repeat_postfix(const Session *s) {
    return s->o->raw ? "\n" : tokenizer_chat(s->tok)->kvzip_postfix;
}

// What score, compress and map begin with: prefix and context as ids, and how they are read and
// scored.
typedef struct {
    Session s;
    Buffer text;
    Ids ids;  // prefix and context
    Progress progress;
    Context c;
} Reading;

static void open_reading(Reading *r, const Options *o) {
    Session *s = &r->s;
    int n_prefix = o->n_prefix < 0 ? 0 : (int)o->n_prefix;
    check_output(o);
    r->text = read_text(o, NULL);
    r->ids = (Ids){0};
    catch_signals();
    open_session(s, o, NULL, 1);
    r->c = chosen_method(s);
    if (!o->ids && o->n_prefix >= 0) die_usage(o->command, "--n-prefix goes with --ids");
    if (!o->ids) {
        prefix_ids(s, &r->ids);
        n_prefix = r->ids.n;
    }
    input_ids(s, &r->text, 0, &r->ids);
    if (n_prefix > r->ids.n)
        die_usage(o->command, "--n-prefix %d: %s has only %d ids", n_prefix, o->ids, r->ids.n);
    if (r->ids.n == 0) die("%s: nothing to read", o->ids ? o->ids : o->file ? o->file : "-p");
    warn_length(s, r->ids.n);
    r->progress = progress_begin(s);
    Context *c = &r->c;
    c->state = &s->state, c->kv = &s->kv, c->tok = s->tok, c->seq = new_sequence(s);
    c->ids = r->ids.id, c->n_prefix = n_prefix, c->n_ctx = r->ids.n - n_prefix;
    c->postfix = repeat_postfix(s);
    c->progress = progress_step, c->progress_arg = &r->progress;
}

static void close_reading(Reading *r) {
    free(r->text.s);
    ids_free(&r->ids);
    close_session(&r->s);
}

// The end of a command that Ctrl-C stopped, after its file is gone.
__attribute__((noreturn)) static void die_interrupted(void) {
    fputs("run: interrupted\n", stderr);
    exit(exit_code());
}

// A signal that came while the file was written counts as well: an interrupted command leaves none.
static void check_interrupted(const Options *o) {
    if (!interrupted) return;
    unlink(o->out);
    die_interrupted();
}

// Prefill, and scores [context_scores(c)] if wanted. The result is malloc'ed, or NULL.
static float *read_context(Context *c, bool scored, const Progress *progress) {
    char err[ERR_LEN];
    c->kv->settling = !scored;  // exact keys are scored
    float *score = scored ? allocate(context_scores(c), sizeof *score) : NULL;
    int rc = scored ? context_score(c, c->policy, score, err) : context_read(c, err);
    progress_end(progress);
    if (interrupted) die_interrupted();
    if (rc != 0) die("%s", err);
    return score;
}

static void write_tensors(const char *path, const Meta *meta, int n_meta, const Tensor *t, int n) {
    char err[ERR_LEN];
    TensorWriter w;
    int rc = tensors_write_begin(&w, path, err);
    for (int i = 0; i < n_meta && rc == 0; i++)
        rc = tensors_write_meta(&w, meta[i].key, meta[i].value, err);
    for (int i = 0; i < n && rc == 0; i++)
        rc = tensors_write_declare(&w, t[i].name, t[i].dtype, t[i].n_dims, t[i].shape, err);
    for (int i = 0; i < n && rc == 0; i++) rc = tensors_write_put(&w, t[i].data, t[i].bytes, err);
    if (rc == 0) rc = tensors_write_commit(&w, err);
    if (rc != 0) die("%s: %s", path, err);
}

static int cmd_score(const Options *o) {
    Reading in;
    char n_prefix[16];
    open_reading(&in, o);
    Session *s = &in.s;
    Context *c = &in.c;
    if (c->n_ctx == 0) die("the context is empty: there is nothing to score");
    float *score = read_context(c, true, &in.progress);
    int *layers = allocate(s->model.config.n_layers, sizeof *layers);
    size_t n_scored = kvcache_scored_layers(&s->kv.shape, layers), n_heads = s->kv.shape.n_kv_heads;
    snprintf(n_prefix, sizeof n_prefix, "%d", c->n_prefix);
    Meta meta[] = {{"format", "kvzip.c scores 1"},
                   {"fingerprint", s->model.fingerprint},
                   {"model", s->model.name},
                   {"policy", c->policy->name},
                   {"n_prefix", n_prefix}};
    size_t bytes = context_scores(c) * sizeof *score;
    Tensor tensors[] = {{"scores", T_F32, 3, {n_scored, n_heads, c->n_ctx}, score, bytes},
                        {"ids", T_I32, 1, {in.ids.n}, in.ids.id, in.ids.n * sizeof(int32_t)},
                        {"layers", T_I32, 1, {n_scored}, layers, n_scored * sizeof(int32_t)}};
    write_tensors(o->out, meta, sizeof meta / sizeof *meta, tensors, 3);
    check_interrupted(o);
    if (o->json)
        json_print(stdout,
                   "{'n_prefix': %d, 'n_ctx': %d, 'prefill_s': %g, 'score_s': %g, 'path': %s}\n",
                   c->n_prefix, c->n_ctx, c->prefill_s, c->score_s, o->out);
    if (!o->quiet)
        fprintf(stderr, "[%d tokens read in %.2f s, scored in %.2f s]\n", in.ids.n, c->prefill_s,
                c->score_s);
    free(score);
    free(layers);
    close_reading(&in);
    return 0;
}

// Memory of this process alone, without files that are mapped; 0 where the system does not say.
static size_t private_memory(void) {
    long size, resident, shared;
    FILE *f = fopen("/proc/self/statm", "r");
    if (!f) return 0;
    int n = fscanf(f, "%ld %ld %ld", &size, &resident, &shared);
    fclose(f);
    return n == 3 ? (size_t)(resident - shared) * (size_t)sysconf(_SC_PAGESIZE) : 0;
}

typedef struct {
    long n_pairs, n_kept;  // of the context, in the layers that evict
    double ratio;          // n_kept / n_pairs
    size_t full, bytes;    // the cache before and after
    size_t peak;           // the cache at most
    size_t memory_full, memory;
} Shrunk;

// What is left once evicting is done; err is of the step before, which may have failed.
static void shrunk(Session *s, const Context *c, Shrunk *r, char *err) {
    if (r->n_kept < 0 || kvcache_settle(&s->kv, c->seq, err) != 0) die("%s", err);
    r->ratio = r->n_pairs > 0 ? (double)r->n_kept / r->n_pairs : 1;
    r->bytes = kvcache_bytes(&s->kv, c->seq);
    r->memory = private_memory();
}

// Reads the context and evicts meanwhile.
static Shrunk read_and_shrink(Session *s, Context *c, const Progress *progress) {
    char err[ERR_LEN];
    Shrunk r = {.n_pairs = (long)context_scores(c)};
    start_stream(s, c);
    c->after = stream_after, c->after_arg = &s->stream;
    free(read_context(c, false, progress));
    r.memory_full = private_memory();
    r.n_kept = stream_finish(&s->stream, err);
    r.peak = s->stream.peak;
    shrunk(s, c, &r, err);
    r.full = kvcache_unevicted_bytes(&s->kv, c->seq, c->n_prefix + c->n_ctx);
    return r;
}

// Evicts by the scores, which are freed before memory for new pages is needed; NULL: all stay.
static Shrunk shrink(Session *s, const Context *c, float *score) {
    char err[ERR_LEN];
    Shrunk r = {.n_pairs = (long)context_scores(c),
                .full = kvcache_full_bytes(&s->kv, c->seq),
                .peak = kvcache_bytes(&s->kv, c->seq),
                .memory_full = private_memory()};
    r.n_kept = r.n_pairs;
    if (score) {
        uint8_t *keep = allocate(r.n_pairs, 1);
        r.n_kept = context_select(c, score, s->o->ratio, keep, err);
        free(score);
        int (*evict)(KVCache *, int, int, int, const uint8_t *, char *) =
            s->o->demote < 0 ? kvcache_evict : kvcache_demote;
        if (r.n_kept >= 0 && evict(&s->kv, c->seq, c->n_prefix, c->n_ctx, keep, err) != 0)
            r.n_kept = -1;
        free(keep);
    }
    shrunk(s, c, &r, err);
    return r;
}

// kept: the share achieved.
static void save_context(Session *s, const Context *c, double kept) {
    char err[ERR_LEN];
    KVInfo info = {.fingerprint = s->model.fingerprint,
                   .model = s->model.name,
                   .policy = c->policy->name,
                   .n_prefix = c->n_prefix,
                   .n_ctx = c->n_ctx,
                   .ratio = s->o->budget > 0 ? kept : s->o->ratio,
                   .ids = c->ids,
                   .n_ids = c->n_prefix + c->n_ctx};
    if (interrupted) die_interrupted();
    if (kvfile_save(&s->kv, c->seq, s->o->out, &info, err) != 0) die("%s: %s", s->o->out, err);
    check_interrupted(s->o);
}

static void compress_figures(const Options *o, const Context *c, const Shrunk *r) {
    char a[32], b[32];
    if (o->json) {
        json_print(stdout, "{'n_ctx': %d, 'kept': %g, 'bytes': %zu, 'full_bytes': %zu, ", c->n_ctx,
                   r->ratio, r->bytes, r->full);
        json_print(
            stdout,
            "'prefill_s': %g, 'score_s': %g, 'n_prefix': %d, 'n_kept': %ld, 'n_pairs': %ld, ",
            c->prefill_s, c->score_s, c->n_prefix, r->n_kept, r->n_pairs);
        json_print(stdout,
                   "'peak_bytes': %zu, 'resident_full': %zu, 'resident': %zu, 'path': %s}\n",
                   r->peak, r->memory_full, r->memory, o->out);
    }
    flush();
    if (o->quiet) return;
    int n = c->n_prefix + c->n_ctx;
    fprintf(stderr, "[%d + %d tokens read in %.2f s, %.1f/s; scored in %.2f s]\n", c->n_prefix,
            c->n_ctx, c->prefill_s, c->prefill_s > 0 ? n / c->prefill_s : 0, c->score_s);
    fprintf(stderr, "[kept %ld of %ld pairs, %.4f; cache %s -> %s", r->n_kept, r->n_pairs, r->ratio,
            size_text(a, r->full), size_text(b, r->bytes));
    if (r->peak < r->full) fprintf(stderr, ", %s at most", size_text(a, r->peak));
    if (r->memory_full > 0)
        fprintf(stderr, "; private memory %s -> %s", size_text(a, r->memory_full),
                size_text(b, r->memory));
    fprintf(stderr, "; saved as %s]\n", o->out);
}

static int cmd_compress(const Options *o) {
    Reading in;
    if (wants_stream(o) && o->demote >= 0)
        die_usage(o->command, "--demote keeps what --stream and --budget evict: choose one");
    open_reading(&in, o);
    Session *s = &in.s;
    Context *c = &in.c;
    if (c->n_ctx == 0) warn(s, "the context is empty: only the prefix is saved");
    bool scored = o->ratio < 1 && c->n_ctx > 0;
    Shrunk r;
    if (wants_stream(o))
        r = read_and_shrink(s, c, &in.progress);
    else
        r = shrink(s, c, read_context(c, scored, &in.progress));
    save_context(s, c, r.ratio);
    compress_figures(o, c, &r);
    close_reading(&in);
    return 0;
}

static int cmd_map(const Options *o) {
    Reading in;
    char err[ERR_LEN];
    open_reading(&in, o);
    Session *s = &in.s;
    Context *c = &in.c;
    size_t n_pairs = context_scores(c);
    if (c->n_ctx == 0) die("the context is empty: there is nothing to show");
    if (n_pairs == 0) die("this model evicts from no layer: there is nothing to show");
    float *score = read_context(c, o->ratio < 1, &in.progress);
    uint8_t *keep = allocate(n_pairs, 1);
    memset(keep, 1, n_pairs);
    long kept = score ? context_select(c, score, o->ratio, keep, err) : (long)n_pairs;
    if (kept < 0) die("%s", err);
    int *layers = allocate(s->model.config.n_layers, sizeof *layers);
    ChartMap map = {.model = s->model.name,
                    .policy = c->policy->name,
                    .level = c->level->name,
                    .tok = s->tok,
                    .ids = c->ids + c->n_prefix,
                    .layer = layers,
                    .keep = keep,
                    .n_ctx = c->n_ctx,
                    .n_layers = kvcache_scored_layers(&s->kv.shape, layers),
                    .n_kv_heads = s->kv.shape.n_kv_heads,
                    .n_kept = kept};
    if (interrupted) die_interrupted();
    if (chart_map(&map, o->out, err) != 0) die("%s: %s", o->out, err);
    check_interrupted(o);
    if (o->json)
        json_print(stdout, "{'n_ctx': %d, 'kept': %g, 'n_kept': %ld, 'n_pairs': %zu, 'path': %s}\n",
                   c->n_ctx, (double)kept / n_pairs, kept, n_pairs, o->out);
    if (!o->quiet) fprintf(stderr, "[%ld of %zu pairs stay; open %s]\n", kept, n_pairs, o->out);
    free(layers);
    free(keep);
    free(score);
    close_reading(&in);
    return 0;
}

// ---- logits and tokenize ----

// Declares the file and fills it block by block: memory does not grow with the number of tokens.
static int write_logits(Session *s, TensorWriter *w, const Ids *ids, int seq, char *err) {
    size_t vocab = s->model.config.vocab_size;
    Row rows[MAX_ROWS];
    if (tensors_write_begin(w, s->o->out, err) != 0 ||
        tensors_write_meta(w, "format", "kvzip.c logits 1", err) != 0 ||
        tensors_write_meta(w, "fingerprint", s->model.fingerprint, err) != 0 ||
        tensors_write_declare(w, "logits", T_F32, 2, (size_t[]){ids->n, vocab}, err) != 0 ||
        tensors_write_declare(w, "ids", T_I32, 1, (size_t[]){ids->n}, err) != 0)
        return -1;
    Progress p = progress_begin(s);
    int rc = 0;
    for (int done = 0; done < ids->n && rc == 0; done += s->state.max_logits) {
        int n = ids->n - done < s->state.max_logits ? ids->n - done : s->state.max_logits;
        for (int i = 0; i < n; i++) rows[i] = (Row){seq, ids->id[done + i], true};
        rc = forward(&s->state, &s->kv, rows, n, err);
        if (rc == 0) rc = tensors_write_put(w, s->state.logits, n * vocab * sizeof(float), err);
        if (progress_step(&p, "logits", done + n, ids->n) != 0) rc = fail(err, "interrupted");
    }
    progress_end(&p);
    if (rc != 0 || tensors_write_put(w, ids->id, ids->n * sizeof(int32_t), err) != 0) return -1;
    return tensors_write_commit(w, err);
}

static int cmd_logits(const Options *o) {
    enum { BLOCK = 64 };  // rows of logits in memory
    Session s;
    Ids ids = {0};
    TensorWriter w = {0};
    char err[ERR_LEN];
    check_output(o);
    Buffer text = read_text(o, piped_input());
    catch_signals();
    open_session(&s, o, o->cache, BLOCK);
    input_ids(&s, &text, o->cache ? 0 : TOK_BOS, &ids);
    if (ids.n == 0) die("no tokens given");
    int seq = o->cache ? 0 : new_sequence(&s);
    warn_length(&s, (long)s.kv.seqs[seq].next_pos + ids.n);
    if (write_logits(&s, &w, &ids, seq, err) != 0) {
        tensors_write_abort(&w);
        if (interrupted) die_interrupted();
        die("%s: %s", o->out, err);
    }
    check_interrupted(o);
    free(text.s);
    ids_free(&ids);
    close_session(&s);
    return 0;
}

static int cmd_tokenize(const Options *o) {
    char err[ERR_LEN];
    TensorFile file;
    Ids ids = {0};
    if (o->ids && !o->decode) die_usage(o->command, "--ids goes with --decode");
    Buffer text = read_text(o, "-");
    if (tensors_open(&file, o->args[0], err) != 0) die("%s: %s", o->args[0], err);
    Tokenizer *tok =
        tokenizer_open(&file, err);  // all that is needed of a model: its tokenizer alone will do
    if (!tok) die("%s: %s", o->args[0], err);
    if (o->decode) {
        const char *from = o->ids ? o->ids : o->file ? o->file : "the ids";
        parse_ids(&text, from, tokenizer_n_vocab(tok), &ids);
        size_t n;
        char *bytes = tokenizer_decode(tok, ids.id, ids.n, &n);
        if (!bytes) die_memory();
        put(bytes, n);
        free(bytes);
    } else {
        encode(tok, text.s, text.n, (o->special ? TOK_SPECIAL : 0) | (o->bos ? TOK_BOS : 0), &ids);
        if (o->json) json_print(stdout, "{'ids': [");
        for (int i = 0; i < ids.n; i++) out("%s%d", i == 0 ? "" : o->json ? ", " : " ", ids.id[i]);
        put(o->json ? "]}\n" : "\n", o->json ? 3 : 1);
    }
    free(text.s);
    ids_free(&ids);
    tokenizer_close(tok);
    tensors_close(&file);
    return 0;
}

// ---- info ----

// One fact about a file: a line of text or a field of a JSON object.
typedef struct {
    const char *key, *text;  // text NULL: a number
    double number;
    bool bytes;
} Fact;

static void print_facts(const Options *o, const Fact *f, int n) {
    char size[32];
    for (int i = 0; i < n; i++) {
        if (o->json)
            json_print(stdout, i ? ", %s: " : "{%s: ", f[i].key);
        else
            out("%-18s ", f[i].key);
        if (o->json && f[i].text)
            json_print(stdout, "%s", f[i].text);
        else if (f[i].text)
            out("%s", f[i].text);
        else if (o->json)
            json_print(stdout, "%g", f[i].number);
        else if (f[i].bytes)
            out("%s", size_text(size, f[i].number));
        else
            out("%.6g", f[i].number);
        if (!o->json) put("\n", 1);
    }
}

enum { EMBEDDING, ATTENTION, FFN, HEAD, TOKENIZER, OTHER, PARTS };

static int part_of(const char *name) {
    if (strncmp(name, "tok_embed", 9) == 0) return EMBEDDING;
    if (strncmp(name, "wcls", 4) == 0) return HEAD;
    if (strncmp(name, "tok.", 4) == 0) return TOKENIZER;
    if (strncmp(name, "layers.", 7) != 0) return OTHER;
    name += 7 + strspn(name + 7, "0123456789");
    if (strncmp(name, ".w", 2) != 0) return OTHER;
    return isdigit((unsigned char)name[2]) ? FFN : ATTENTION;
}

// "q8 x 210, f32 x 1": the types of the matrices.
static void types_text(const Model *m, char *text, size_t room) {
    static const char *const names[W_TYPES] = {"f32", "f16", "bf16", "q8", "q4"};
    int count[W_TYPES] = {0};
    count[m->tok_embed.type]++;
    if (m->wcls.data != m->tok_embed.data) count[m->wcls.type]++;
    for (int l = 0; l < m->config.n_layers; l++) {
        const Layer *w = &m->layers[l];
        const Matrix *all[] = {&w->wq, &w->wk, &w->wv, &w->wo, &w->w1, &w->w2, &w->w3};
        for (int i = 0; i < 7; i++) count[all[i]->type]++;
    }
    text[0] = '\0';
    for (int t = 0; t < W_TYPES; t++) {
        size_t n = strlen(text);
        if (count[t]) snprintf(text + n, room - n, "%s%s x %d", n ? ", " : "", names[t], count[t]);
    }
}

static void info_model(const Options *o) {
    Session s;
    RunState state;
    char err[ERR_LEN], types[128];
    size_t part[PARTS] = {0};
    kernels_init(NULL);  // which says how pages are packed
    open_model(&s, o);
    for (int i = 0; i < s.model.file.n_tensors; i++)
        part[part_of(s.model.file.tensors[i].name)] += s.model.file.tensors[i].bytes;
    if (state_open(&state, &s.model, NULL, MAX_ROWS, 1, err) != 0) die("%s", err);
    types_text(&s.model, types, sizeof types);
    const Config *c = &s.model.config;
    KVShape k = model_kv_shape(&s.model);
    const Fact facts[] = {
        {"model", s.model.name, 0, false},
        {"fingerprint", s.model.fingerprint, 0, false},
        {"layers", NULL, c->n_layers, false},
        {"sliding_layers", NULL, c->n_layers - kvcache_scored_layers(&k, NULL), false},
        {"heads", NULL, c->n_heads, false},
        {"kv_heads", NULL, c->n_kv_heads, false},
        {"head_dim", NULL, c->head_dim, false},
        {"dim", NULL, c->dim, false},
        {"hidden_dim", NULL, c->hidden_dim, false},
        {"vocab_size", NULL, c->vocab_size, false},
        {"seq_len", NULL, c->seq_len, false},
        {"matrices", types, 0, false},
        {"embedding", NULL, part[EMBEDDING], true},
        {"attention", NULL, part[ATTENTION], true},
        {"ffn", NULL, part[FFN], true},
        {"head", NULL, part[HEAD], true},
        {"tokenizer", NULL, part[TOKENIZER], true},
        {"other", NULL, part[OTHER], true},
        {"file", NULL, s.model.file.map_bytes, true},
        {"cache_token_f16", NULL, kvcache_token_bytes(&k, kvcache_both(KV_F16)), true},
        {"cache_token_f32", NULL, kvcache_token_bytes(&k, kvcache_both(KV_F32)), true},
        {"cache_token_q8", NULL, kvcache_token_bytes(&k, kvcache_both(KV_Q8)), true},
        {"cache_token_q4", NULL, kvcache_token_bytes(&k, kvcache_both(KV_Q4)), true},
        {"cache_token_read", NULL, kvcache_read_bytes(&k), true},
        {"cache_windows_f16", NULL, kvcache_window_bytes(&k, kvcache_both(KV_F16)), true},
        {"cache_windows_f32", NULL, kvcache_window_bytes(&k, kvcache_both(KV_F32)), true},
        {"scratch", NULL, state.bytes, true},
    };
    print_facts(o, facts, sizeof facts / sizeof *facts);
    out(o->json ? "}\n"
                : "memory for n tokens: file (mapped, shared) + n x cache_token + cache_windows "
                  "+ scratch;\nreading them takes n x cache_token_read more, except into an f32 "
                  "cache\n");
    state_close(&state);
    close_session(&s);
}

static void print_heads(const Options *o, const CacheFacts *c) {
    out(o->json ? ", \"kept_pairs\": [" : "kept pairs of the context, per layer and head\n");
    for (int l = 0; l < c->n_layers; l++) {
        out(o->json ? "%s[" : "%s%5d ", o->json && l ? ", " : "", l);
        for (int g = 0; g < c->n_kv_heads; g++)
            out(o->json ? "%s%d" : "%s %6d", o->json && g ? ", " : "",
                c->kept_pairs[l * c->n_kv_heads + g]);
        out(o->json ? "]" : "\n");
    }
    if (o->json) out("]}\n");
}

static void info_cache(const Options *o, const TensorFile *f) {
    CacheFacts c;
    char err[ERR_LEN], settled[KV_NAME];
    if (kvfile_facts(&c, f, err) != 0) die("%s: %s", f->path, err);
    const double *bytes = c.bytes;
    const Fact facts[] = {
        {"cache_of", c.info.model, 0, false},
        {"fingerprint", c.info.fingerprint, 0, false},
        {"policy", c.info.policy, 0, false},
        {"ratio", NULL, c.info.ratio, false},
        {"kept", NULL, c.n_scored > 0 ? c.kept / c.n_scored : 1, false},
        {"demoted", NULL, c.n_scored > 0 ? c.demoted / c.n_scored : 0, false},
        {"n_prefix", NULL, c.info.n_prefix, false},
        {"n_ctx", NULL, c.info.n_ctx, false},
        {"next_pos", NULL, c.next_pos, false},
        {"type", c.types[PAGE_FULL].k == KV_F32 ? "F32" : "F16", 0, false},
        {"kv", kvcache_types_name(c.types[PAGE_SETTLED], settled), 0, false},
        {"pairs", NULL, c.pairs, false},
        {"full_pairs", NULL, c.full_pairs, false},
        {"new_bytes", NULL, bytes[PAGE_FULL], true},
        {"settled_bytes", NULL, bytes[PAGE_SETTLED], true},
        {"demoted_bytes", NULL, bytes[PAGE_DEMOTED], true},
        {"bytes", NULL, bytes[PAGE_FULL] + bytes[PAGE_SETTLED] + bytes[PAGE_DEMOTED], true},
        {"full_bytes", NULL, c.full_bytes, true},
        {"file", NULL, f->map_bytes, true},
    };
    print_facts(o, facts, sizeof facts / sizeof *facts);
    print_heads(o, &c);
    kvfile_facts_free(&c);
}

static void info_tensors(const Options *o, const TensorFile *f) {
    char size[32];
    if (o->json) out("{\"tensors\": [");
    for (int i = 0; i < f->n_tensors; i++) {
        const Tensor *t = &f->tensors[i];
        if (o->json)
            json_print(stdout,
                       i ? ", {'name': %s, 'dtype': %s, 'shape': ["
                         : "{'name': %s, 'dtype': %s, 'shape': [",
                       t->name, dtype_name(t->dtype));
        else
            out("%-32s %-4s [", t->name, dtype_name(t->dtype));
        for (int d = 0; d < t->n_dims; d++) out("%s%zu", d ? ", " : "", t->shape[d]);
        if (o->json)
            json_print(stdout, "], 'bytes': %zu}", t->bytes);
        else
            out("] %s\n", size_text(size, t->bytes));
    }
    if (o->json) out("]}\n");
}

static int cmd_info(const Options *o) {
    TensorFile f;
    char err[ERR_LEN];
    if (tensors_open(&f, o->args[0], err) != 0) die("%s: %s", o->args[0], err);
    const char *format = tensors_meta(&f, "format");
    if (format && strcmp(format, "kvzip.c model 1") == 0)
        info_model(o);
    else if (kvfile_is(&f))
        info_cache(o, &f);
    else
        info_tensors(o, &f);
    tensors_close(&f);
    return 0;
}

// ---- bench ----

static void print_peaks(void *arg, const BenchPeaks *p) {
    const Session *s = arg;
    const double *g = p->gflop_per_s;
    if (s->o->json) {
        json_print(stdout, "{'work': 'peak', 'threads': %d, 'gb_per_s': %g, ",
                   pool_threads(s->pool), p->gb_per_s);
        json_print(stdout, "'f32_gflop_per_s': %g, 'q8_gflop_per_s': %g, ", g[W_F32], g[W_Q8]);
        json_print(stdout, "'q4_gflop_per_s': %g, 'attention_gflop_per_s': %g}\n", g[W_Q4],
                   p->attention);
    } else {
        out("peaks: %.1f GB/s read; GFLOP/s: %.0f f32, %.0f q8, %.0f q4, %.0f attention\n\n",
            p->gb_per_s, g[W_F32], g[W_Q8], g[W_Q4], p->attention);
        out("work              n  depth  ratio batch   tokens/s   seconds    GB/s  GFLOP/s");
        out("  share of peak  cache\n");
    }
    flush();
}

static void print_bench(void *arg, const BenchRow *r) {
    const Session *s = arg;
    char size[32] = "", what[32];
    if (s->o->json) {
        json_print(stdout,
                   "{'work': %s, 'n': %d, 'depth': %d, 'ratio': %g, 'batch': %d, 'threads': %d, ",
                   r->work, r->n, r->depth, r->ratio, r->batch, pool_threads(s->pool));
        json_print(stdout, "'tokens_per_s': %g, 'seconds': %g, 'gb_per_s': %g, 'gflop_per_s': %g, ",
                   r->tokens_per_s, r->seconds, r->gb_per_s, r->gflop_per_s);
        json_print(stdout, "'share': %g, 'bound': %s, 'to_prefill': %g, ", r->share, r->bound,
                   r->to_prefill);
        json_print(stdout, "'cache_bytes': %zu, 'score_attn': %s}\n", r->cache_bytes,
                   r->score_attn);
    } else {
        snprintf(what, sizeof what, "%s %s", r->work, r->score_attn ? r->score_attn : "");
        if (r->cache_bytes > 0) size_text(size, r->cache_bytes);
        out("%-12s %6d %6d %6.3g %5d %10.1f %9.4f", what, r->n, r->depth, r->ratio, r->batch,
            r->tokens_per_s, r->seconds);
        if (r->gb_per_s > 0)
            out(" %7.2f", r->gb_per_s);
        else
            out(" %7s", "");
        if (r->bound)
            out(" %8.1f   %3.0f%% %-7s", r->gflop_per_s, 100 * r->share, r->bound);
        else
            out("%22s", "");
        out("  %s", size);
        if (r->to_prefill > 0) out("  %.2f x prefill", r->to_prefill);
        out("\n");
    }
    flush();
}

static int cmd_bench(const Options *o) {
    Session s;
    char err[ERR_LEN], size[32];
    int most = 1;
    for (int i = 0; i < o->batches.n; i++)
        if (o->batches.v[i] > most) most = (int)o->batches.v[i];
    char kv_name[KV_NAME];
    open_session(&s, o, NULL, most);
    Context method = chosen_method(&s);
    Bench b = {.state = &s.state,
               .tok = s.tok,
               .kv = s.kv.types,
               .method = method,
               .n = o->n < 0 ? 32 : (int)o->n,
               .prompts = o->prompts,
               .depths = o->depths,
               .ratios = o->ratios,
               .batches = o->batches,
               .peaks = print_peaks,
               .row = print_bench,
               .arg = &s};
    if (!o->json) {
        out("%s, %s of weights a token, %d threads, %s, %s cache\n", s.model.name,
            size_text(size, bench_weight_bytes(&s.model)), pool_threads(s.pool), kern.name,
            kvcache_types_name(s.kv.types, kv_name));
    }
    flush();
    if (bench_run(&b, err) != 0) die("%s", err);
    close_session(&s);
    return 0;
}

// ---- eval ----

static int perplexity_step(void *arg, int window, int n_windows, double ppl) {
    Progress *p = arg;
    if (p->on) fprintf(stderr, "\rwindow %d of %d: %.4f \033[K", window, n_windows, ppl);
    p->shown = now();
    return interrupted != 0;
}

static int eval_text(const Options *o) {
    Session s;
    char err[ERR_LEN];
    PerplexityResult r;
    if (o->n_args != 1) die_usage(o->command, "--ppl needs MODEL alone, not '%s'", o->args[1]);
    char kv_name[KV_NAME];
    KVTypes kv = get_kv(o, o->kvs);
    Buffer text = read_all(o->ppl);
    catch_signals();
    open_session(&s, o, NULL, MAX_BATCH);
    Progress progress = progress_begin(&s);
    Perplexity p = {.state = &s.state,
                    .tok = s.tok,
                    .kv = kv,
                    .window = o->n < 0 ? 512 : (int)o->n,
                    .progress = perplexity_step,
                    .arg = &progress};
    double start = now();
    int rc = eval_perplexity(&p, text.s, text.n, &r, err);
    progress_end(&progress);
    if (interrupted) die_interrupted();
    if (rc != 0) die("%s: %s", o->ppl, err);
    if (o->json) {
        json_print(stdout,
                   "{'task': %s, 'kv': %s, 'window': %d, 'metric': 'ppl', 'value': %g, 'low': %g, ",
                   o->ppl, kvcache_types_name(kv, kv_name), p.window, r.value, r.low);
        json_print(stdout, "'high': %g, 'error': %g, 'n': %d, 'seconds': %g}\n", r.high, r.error,
                   r.n, now() - start);
    } else {
        out("perplexity %.4f +- %.5f over %d tokens in windows of %d\n", r.value, r.error, r.n,
            p.window);
    }
    flush();
    free(text.s);
    close_session(&s);
    return 0;
}

static bool same_table(const EvalRow *a, const EvalRow *b) {
    return strcmp(a->task, b->task) == 0 && strcmp(a->metric, b->metric) == 0;
}

static bool same_line(const EvalRow *a, const EvalRow *b) {
    return same_table(a, b) && strcmp(a->policy, b->policy) == 0 &&
           strcmp(a->level, b->level) == 0 && strcmp(a->kv, b->kv) == 0;
}

// The first row that is in the same table, or on the same line of it, as rows[i] is i itself.
static bool is_first(const EvalRow *rows, int i, bool (*same)(const EvalRow *a, const EvalRow *b)) {
    int first = 0;
    while (!same(&rows[first], &rows[i])) first++;
    return first == i;
}

// The different ratios of all rows, from the largest down; returns how many.
static int table_columns(const EvalRow *rows, int n, double *column, int most) {
    int n_columns = 0;
    for (double last = INFINITY, next; n_columns < most; column[n_columns++] = last = next) {
        next = -1;
        for (int i = 0; i < n; i++)
            if (rows[i].ratio < last && rows[i].ratio > next) next = rows[i].ratio;
        if (next < 0) break;
    }
    return n_columns;
}

static void print_cell(const EvalRow *row, bool share) {
    char text[64];
    snprintf(text, sizeof text, share ? "%.1f ±%.1f" : "%.4f ±%.4f", (share ? 100 : 1) * row->value,
             (share ? 50 : 0.5) * (row->high - row->low));
    out("%17s", text);  // one byte more than it shows
}

// One line per policy, one column per ratio; ± is half the width of the 95% interval.
static void print_table(const EvalRow *rows, int n, int first, const double *column,
                        int n_columns) {
    const EvalRow *head = &rows[first];
    bool share = strcmp(head->metric, "kl") != 0 && strcmp(head->metric, "nll") != 0;
    char name[64];
    snprintf(name, sizeof name, "%s, %s, %d answers", head->metric, share ? "%" : "nat/token",
             head->n);
    out("%s\n%-30s", head->task, name);
    for (int k = 0; k < n_columns; k++) out("%16g", column[k]);
    put("\n", 1);
    for (int i = first; i < n; i++) {
        if (!same_table(&rows[i], head) || !is_first(rows, i, same_line)) continue;
        snprintf(name, sizeof name, "  %s %s %s", rows[i].policy, rows[i].level, rows[i].kv);
        out("%-30s", name);
        for (int k = 0; k < n_columns; k++) {
            int j = i;
            while (j < n && !(same_line(&rows[j], &rows[i]) && rows[j].ratio == column[k])) j++;
            if (j < n)
                print_cell(&rows[j], share);
            else
                out("%16s", "");
        }
        put("\n", 1);
    }
}

static void print_rows(const Options *o, const EvalResults *results) {
    enum { COLUMNS = 16 };
    char err[ERR_LEN];
    double column[COLUMNS];
    EvalRow *rows;
    int n;
    if (eval_rows(results, &rows, &n, err) != 0) die("%s", err);
    int n_columns = table_columns(rows, n, column, COLUMNS);
    for (int i = 0; i < n; i++) {
        const EvalRow *r = &rows[i];
        if (o->json) {
            json_print(
                stdout,
                "{'task': %s, 'policy': %s, 'level': %s, 'ratio': %g, 'kept': %g, 'kv': %s, ",
                r->task, r->policy, r->level, r->ratio, r->kept, r->kv);
            json_print(stdout, "'metric': %s, 'value': %g, 'low': %g, 'high': %g, 'n': %d}\n",
                       r->metric, r->value, r->low, r->high, r->n);
        } else if (is_first(rows, i, same_table)) {
            print_table(rows, n, i, column, n_columns);
        }
    }
    flush();
    if (o->chart && chart_curves(rows, n, o->chart, err) != 0) die("%s: %s", o->chart, err);
    free(rows);
}

static int eval_merge(const Options *o) {
    EvalResults results = {0};
    char err[ERR_LEN];
    for (int i = 0; i < o->n_args; i++)
        if (eval_results_open(&results, o->args[i], false, err) != 0)
            die("%s: %s", o->args[i], err);
    if (o->out) check_output(o);
    if (o->chart) check_writable(o, o->chart);
    if (o->out && eval_results_save(&results, o->out, err) != 0) die("%s: %s", o->out, err);
    print_rows(o, &results);
    eval_results_close(&results);
    return 0;
}

// The next of the names between commas, or NULL. The result is malloc'ed.
static char *next_name(const char **list) {
    if (!*list || !**list) return NULL;
    size_t n = strcspn(*list, ",");
    char *name = copy_text(*list, n);
    *list += n + ((*list)[n] == ',');
    return name;
}

// "q8/q4", or with "+q2" for demoting; the name is kept.
static EvalKV get_eval_kv(const Options *o, const char *name) {
    static const char demote[] = "+q2";
    size_t n = strlen(name), end = sizeof demote - 1;
    EvalKV kv = {.demote = n > end && strcmp(name + n - end, demote) == 0, .name = name};
    char *types = copy_text(name, kv.demote ? n - end : n);
    kv.types = get_kv(o, types);
    free(types);
    return kv;
}

// What is compared with what, from the flags.
static void eval_lists(const Session *s, Eval *e) {
    const Options *o = s->o;
    const char *policy = o->policy ? o->policy : default_policy(s);
    const char *level = o->level ? o->level : default_level(s), *kv = o->kvs;
    char *name;
    char err[ERR_LEN];
    for (; e->n_policies < EVAL_LIST && (name = next_name(&policy)); free(name))
        e->policy[e->n_policies++] = get_policy(o, name);
    for (; e->n_levels < EVAL_LIST && (name = next_name(&level)); free(name))
        e->level[e->n_levels++] = get_level(o, name);
    for (; e->n_kvs < EVAL_LIST && (name = next_name(&kv)); e->n_kvs++)
        e->kv[e->n_kvs] = get_eval_kv(o, name);
    for (; e->n_ratios < o->shares.n; e->n_ratios++)
        e->ratio[e->n_ratios] = o->shares.v[e->n_ratios];
    if (e->n_kvs == 0) die_usage(o->command, "--kv needs a type");
    for (int i = 0; e->stream && i < e->n_policies; i++)
        if (!policy_is_live(e->policy[i]))
            die_usage(o->command, "--stream: policy %s looks back at the whole context",
                      e->policy[i]->name);
    for (int i = 0; e->stream && i < e->n_levels; i++)
        if (e->level[i]->pool == LEVEL_HEAD)
            die_usage(o->command, "--stream: level %s keeps whole heads", e->level[i]->name);
    for (int i = 0; e->stream && i < e->n_kvs; i++)
        if (e->kv[i].demote)
            die_usage(o->command, "--kv %s keeps what --stream evicts: choose one", e->kv[i].name);
    if (eval_check_set(e, err) != 0) die_usage(o->command, "--set %s: %s", o->set, err);
    e->n_shards = 1;
    char end;
    if (o->shard && (sscanf(o->shard, "%d/%d%c", &e->shard, &e->n_shards, &end) != 2 ||
                     e->shard < 1 || e->shard > e->n_shards))
        die_usage(o->command, "--shard %s: needs I/N, I from 1 to N", o->shard);
    if (o->shard) e->shard--;
}

static int ask_ids(void *arg, const EvalQuestion *q, Ids *ids) {
    char err[ERR_LEN];
    return talk_ask(arg, q->question, q->answer_prefix, ids, err);
}

static int eval_step(void *arg, long done, long total) {
    return progress_step(arg, "eval", done, total);
}

static int cmd_eval(const Options *o) {
    Session s;
    EvalTasks tasks;
    EvalResults results = {0};
    Ids prefix = {0};
    char err[ERR_LEN];
    if (o->merge) return eval_merge(o);
    if (o->ppl) return eval_text(o);
    if (o->n_args != 2) die_usage(o->command, "needs MODEL TASKS.jsonl");
    Eval e = {.max_tokens = o->n < 0 ? 96 : (int)o->n,
              .stop = o->stop,
              .set = o->set,
              .stream = o->stream,
              .window = (int)o->window,
              .settings = o->raw};
    if (o->out) check_output(o);
    if (o->chart) check_writable(o, o->chart);
    if (eval_tasks_open(&tasks, o->args[1], err) != 0) die("%s: %s", o->args[1], err);
    if (o->out && eval_results_open(&results, o->out, true, err) != 0) die("%s: %s", o->out, err);
    catch_signals();
    open_session(&s, o, NULL, MAX_BATCH);
    open_profile(&s);
    eval_lists(&s, &e);
    prefix_ids(&s, &prefix);
    Talk talk = {.tok = s.tok, .raw = o->raw, .on_context = true};
    Progress progress = progress_begin(&s);
    progress.unit = "answers";
    e.state = &s.state, e.prefix = &prefix, e.ask = ask_ids, e.ask_arg = &talk;
    e.progress = eval_step, e.progress_arg = &progress;
    e.context = (Context){.tok = s.tok,
                          .chunk = (int)o->chunk,
                          .local = o->score_attn == 1,
                          .profile = s.has_profile ? &s.profile : NULL,
                          .postfix = repeat_postfix(&s)};
    int rc = eval_run(&e, &tasks, &results, err);
    progress_end(&progress);
    if (interrupted) die_interrupted();
    if (rc != 0) die("%s", err);
    print_rows(o, &results);
    eval_results_close(&results);
    for (int k = 0; k < e.n_kvs; k++) free((char *)e.kv[k].name);
    eval_tasks_close(&tasks);
    ids_free(&prefix);
    close_session(&s);
    return 0;
}

// ---- calibrate ----

// The sample text that ships with the program lies beside it.
static Buffer sample_text(const Options *o) {
    const char *slash = strrchr(o->program, '/');
    char path[4096];
    if (o->file) return read_all(o->file);
    int n = snprintf(path, sizeof path, "%.*s/eval/calibration.txt",
                     slash ? (int)(slash - o->program) : 1, slash ? o->program : ".");
    if (n >= (int)sizeof path) die("%s: the path is too long", o->program);
    return read_all(path);
}

static int cmd_calibrate(const Options *o) {
    Session s;
    Ids prefix = {0};
    char err[ERR_LEN];
    CalibrateResult r;
    check_output(o);
    Buffer text = sample_text(o);
    catch_signals();
    open_session(&s, o, NULL, 1);
    prefix_ids(&s, &prefix);
    Progress progress = progress_begin(&s);
    Calibrate c = {.context = {.state = &s.state,
                               .kv = &s.kv,
                               .tok = s.tok,
                               .chunk = (int)o->chunk,
                               .local = true,
                               .postfix = repeat_postfix(&s)},
                   .prefix = &prefix,
                   .lambda = o->lambda,
                   .path = o->out,
                   .into = o->into,
                   .progress = progress_step,
                   .progress_arg = &progress};
    int rc = calibrate_run(&c, text.s, text.n, &r, err);
    progress_end(&progress);
    if (interrupted) die_interrupted();
    if (rc != 0) die("%s", err);
    if (o->json) {
        json_print(
            stdout,
            "{'n_texts': %d, 'n_tokens': %d, 'longest': %d, 'explained': %g, 'seconds': %g, ",
            r.n_texts, r.n_tokens, r.longest, r.explained, r.seconds);
        json_print(stdout, "'path': %s}\n", o->out);
        flush();
    }
    if (!o->quiet)
        fprintf(stderr,
                "[%d texts, %d tokens, %d in the longest; probes explain %.1f%% of the variance of "
                "log scores; %.1f s; saved as %s]\n",
                r.n_texts, r.n_tokens, r.longest, 100 * r.explained, r.seconds, o->out);
    free(text.s);
    ids_free(&prefix);
    close_session(&s);
    return 0;
}

// ---- main ----

static const Command commands[] = {
    {"generate", GENERATE, "MODEL [-p TEXT | -f FILE]", 1, 1, cmd_generate, "continue a text",
     "  run generate smollm2.kvz -p 'Once upon a time' -n 100\n"
     "  echo 'The three primary colours are' | run generate smollm2.kvz --temp 0\n"},
    {"chat", CHAT, "MODEL [-c CACHE]", 1, 1, cmd_chat,
     "talk; about a saved context if one is given (Ctrl-C ends an answer, Ctrl-D the chat)",
     "  run chat smollm2.kvz --system 'You answer in one sentence.'\n"
     "  run chat smollm2.kvz -c town.kvc\n"},
    {"compress", COMPRESS, "MODEL -f FILE -o CACHE", 1, 1, cmd_compress,
     "read a context once, score its pairs by letting the model repeat it, evict, save",
     "  run compress smollm2.kvz -f town.txt -o town.kvc\n"
     "  run compress smollm2.kvz -f town.txt -o town.kvc --ratio 0.2 --score-attn local --json\n"},
    {"ask", ASK, "MODEL CACHE [QUESTION...] [-f FILE]", 2, INT_MAX, cmd_ask,
     "one answer per question, all from the same cache, which stays as it was",
     "  run ask smollm2.kvz town.kvc 'Who built the bridge?' --answer-prefix 'The bridge was built "
     "by'\n"
     "  run ask smollm2.kvz town.kvc -f questions.txt --stop . --json\n"},
    {"score", SCORE, "MODEL -f FILE -o OUT", 1, 1, cmd_score,
     "how much each pair matters, as safetensors: scores f32 [L][Hkv][n_ctx], ids, layers",
     "  run score smollm2.kvz -f town.txt -o scores.safetensors\n"},
    {"map", MAP, "MODEL -f FILE -o OUT.html", 1, 1, cmd_map,
     "which pairs survive, per layer and head, over the text: a page for the browser",
     "  run map smollm2.kvz -f town.txt -o town.html --ratio 0.2\n"},
    {"logits", LOGITS, "MODEL [-p TEXT | -f FILE] [-c CACHE] -o OUT", 1, 1, cmd_logits,
     "logits f32 [n][vocab] of the given tokens, after a saved context if one is given",
     "  run logits smollm2.kvz -p 'Hello there' -o logits.safetensors --kv f32\n"},
    {"tokenize", TOKENIZE, "MODEL [-p TEXT | -f FILE]", 1, 1, cmd_tokenize,
     "a text's token ids on one line, or with --decode the text of ids",
     "  run tokenize smollm2.kvz -p 'Hello there'\n"
     "  run tokenize smollm2.kvz -f town.txt | run tokenize smollm2.kvz --decode\n"},
    {"bench", BENCH, "MODEL", 1, 1, cmd_bench,
     "prefill, decode, scoring and loading at given depths and ratios",
     "  run bench smollm2.kvz --depth 0,2048,8192 --ratio 1,0.3 --batch 1,8\n"},
    {"eval", EVAL, "MODEL TASKS.jsonl | MODEL --ppl FILE | --merge FILE...", 1, INT_MAX, cmd_eval,
     "what compressing costs in answers: policies, levels and ratios beside the full cache",
     "  run eval smollm2.kvz facts.jsonl --policy kvzip,snapkv --ratio 1,0.3,0.1 -o facts.results\n"
     "  run eval smollm2.kvz facts.jsonl --shard 2/4 -o facts.2\n"
     "  run eval --merge facts.1 facts.2 facts.3 facts.4 --chart facts.svg\n"
     "  run eval smollm2.kvz --ppl wiki.test.raw\n"},
    {"calibrate", CALIBRATE, "MODEL [-f TEXTS] -o PROFILE", 1, 1, cmd_calibrate,
     "once per model: learn what heads keep, so that compressing needs no second pass",
     "  run calibrate smollm2.kvz -o smollm2.kvp\n"
     "  run calibrate smollm2.kvz -o smollm2.kvz --into\n"
     "  run compress smollm2.kvz --profile smollm2.kvp -f town.txt -o town.kvc\n"},
    {"info", INFO, "FILE", 1, 1, cmd_info,
     "what a model, a saved cache or any safetensors file holds, and where its bytes go",
     "  run info smollm2.kvz\n  run info town.kvc --json\n"},
};
enum { N_COMMANDS = sizeof commands / sizeof *commands };

static const char usage_head[] =
    "usage: run COMMAND ... [flags]    (run COMMAND -h explains one)\n\n";

static void print_usage(FILE *f) {
    fputs(usage_head, f);
    for (int i = 0; i < N_COMMANDS; i++)
        fprintf(f, "  run %-9s %s\n      %s\n", commands[i].name, commands[i].args,
                commands[i].help);
}

static bool asks_for_help(const char *arg) {
    return strcmp(arg, "-h") == 0 || strcmp(arg, "--help") == 0;
}

// -h anywhere, unless it is the value of a flag or comes after --.
static bool wants_help(const Command *c, int argc, char **argv) {
    for (int i = 0; i < argc && strcmp(argv[i], "--") != 0; i++) {
        const Flag *f = flag_find(argv[i], strlen(argv[i]), c->bit);
        if (asks_for_help(argv[i])) return true;
        if (f && f->kind == TEXT) i++;
    }
    return false;
}

int main(int argc, char **argv) {
    signal(SIGPIPE, SIG_IGN);  // a closed pipe is an error of write(), reported like a full disk
    signal(SIGXFSZ, SIG_IGN);  // so is a file that may not grow
    if (argc < 2) {
        print_usage(stderr);
        return 2;
    }
    int code = -1;
    if (asks_for_help(argv[1])) {
        print_usage(stdout);
        code = 0;
    }
    for (int i = 0; i < N_COMMANDS && code < 0; i++) {
        const Command *c = &commands[i];
        Options o;
        if (strcmp(argv[1], c->name) != 0) continue;
        if (wants_help(c, argc - 2, argv + 2)) {
            print_help(c);
            code = 0;
        } else {
            parse_options(&o, c, argc - 2, argv + 2);
            o.program = argv[0];
            code = c->run(&o);
        }
    }
    if (code < 0) die_usage(NULL, "unknown command '%s'", argv[1]);
    if (fflush(stdout) != 0 || ferror(stdout)) die_stdout();
    return code;
}
