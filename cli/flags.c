// flags.c: the table of flags, and how words become Options.
//
// One flag, one row. A flag that means different things to different commands has a row for each
// meaning: that which a command's -h lists counts, else one that the command merely accepts.
#include "cli/flags.h"

#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli/output.h"
#include "drafts.h"

// ---- the table ----

static const Options defaults = {.n = -1,
                                 .seed = -1,
                                 .n_prefix = -1,
                                 .temp = -1,
                                 .top_p = 0.95,
                                 .last_n = 64,
                                 .repeat_penalty = 1,
                                 .window = 128,
                                 .lambda = 1e-3,
                                 .threshold = NAN,
                                 .demote = -1,
                                 .weights = -1,
                                 .draft = -1,
                                 .depths = {{0, 1024}, 2},
                                 .ratios = {{1, 0.3}, 2},
                                 .shares = {{1, 0.7, 0.5, 0.3, 0.2, 0.1}, 6},
                                 .kvs = "f16",
                                 .fits = "none",
                                 .host = "127.0.0.1",
                                 .port = 8080,
                                 .slots = 8,
                                 .queue = 64,
                                 .prompts = {{512}, 1},
                                 .batches = {{1, 4}, 2}};

#define AT(field) offsetof(Options, field)
#define RANGE(from, to) .lo = (from), .hi = (to)
#define RATIO_MIN 1e-6
// clang-format off: a table
const Flag flags[] = {
    {"-p", "TEXT", TEXT, AT(prompt), .takes = READS, .help = "the text; - reads stdin"},
    {"-p", "TEXT", TEXT, AT(prompt), .takes = TOKENIZE, .help = "the text (default: stdin)"},
    {"-f", "FILE", TEXT, AT(file), .takes = READS & ~DOCUMENTS,
     .help = "a file with the text; - reads stdin"},
    {"-f", "FILE", TEXTS, AT(files), .takes = DOCUMENTS,
     .help = "a file with the text; - reads stdin. Several -f: documents in one cache, each scored "
             "and evicted on its own"},
    {"--append", "CACHE", TEXT, AT(append), .takes = COMPRESS,
     .help = "the text follows what a saved cache holds, which stays; -o may be CACHE itself"},
    {"-f", "FILE", TEXT, AT(file), .takes = TOKENIZE, .help = "a file with the text or the ids"},
    {"-f", "FILE", TEXT, AT(file), .takes = ASK,
     .help = "questions, one a line; the start of the answer may follow after a tab. Of several "
             "answers all lines but the first of each are indented"},
    {"--ids", "FILE", TEXT, AT(ids), .takes = READS | TOKENIZE,
     .help = "token ids instead of a text, decimal, white space between"},
    {"--n-prefix", "N", COUNT, AT(n_prefix), RANGE(0, INT_MAX), .takes = CONTEXT,
     .help = "with --ids: the first N are the protected prefix (default 0)"},
    {"-o", "OUT", TEXT, AT(out), .takes = CONTEXT | LOGITS, .help = "the file to write"},
    {"-c", "CACHE", TEXT, AT(cache), .takes = CHAT | LOGITS,
     .help = "continue after a saved context"},
    {"--policy", "NAME", TEXT, AT(policy), .takes = CONTEXT | BENCH | STREAMS,
     .help = "who scores (default: expected with a profile or while tokens come, else kvzip):"},
    {"--ratio", "R", REAL, AT(ratio), RANGE(RATIO_MIN, 1), .takes = COMPRESS | MAP, .also = SCORE,
     .help = "share of the context's pairs that stays (default 0.3; 1: no scoring)"},
    {"--ratio", "R", REAL, AT(ratio), RANGE(RATIO_MIN, 1), .takes = GENERATE | CHAT,
     .help = "evict as tokens come: share of the pairs that stays (default: all)"},
    {"--threshold", "T", REAL, AT(threshold), RANGE(-1e30, 1e30), .takes = COMPRESS | MAP | EVAL,
     .help = "instead of a share: pairs with a score under T go, the newest 128 stay; the share "
             "follows from the text"},
    {"--budget", "N", COUNT, AT(budget), RANGE(1, INT_MAX), .takes = STREAMS,
     .help = "evict as tokens come: pairs that stay, per head on average, however many tokens "
             "there are"},
    {"--stream", NULL, SWITCH, AT(stream), .takes = COMPRESS,
     .help = "evict to --ratio while reading: the whole cache is never in memory"},
    {"--stream", NULL, SWITCH, AT(stream), .takes = EVAL,
     .help = "evict while a context is read, not once it is there"},
    {"--window", "N", COUNT, AT(window), RANGE(0, INT_MAX), .takes = STREAMS | EVAL,
     .help = "newest pairs of each head, which are not evicted as tokens come (default 128)"},
    {"--level", "NAME", TEXT, AT(level), .takes = COMPRESS | MAP | BENCH | STREAMS, .also = SCORE,
     .help =
         "which pairs compete for a place (default: profile where there is one and the policy is "
         "expected, else pair):"},
    {"--demote", "TYPE", CHOICE, AT(demote), .takes = COMPRESS, .also = SCORE | MAP,
     .choices = "q2", .help = "keep what would be evicted at 2 bits"},
    {"--set", "K=V,..", TEXT, AT(set), .takes = CONTEXT,
     .help = "parameters of the policy and the level, as listed there"},
    {"--set", "K=V,..", TEXT, AT(set), .takes = READERS,
     .help = "parameters of the policy, the level and the reader, as listed there"},
    {"--reader", "NAME", TEXT, AT(reader), .takes = ANSWERS,
     .help = "which pages of the cache a token reads; nothing is deleted (default: all):"},
    {"--reader", "NAME,..", TEXT, AT(reader), .takes = BENCH | EVAL,
     .help = "which pages of the cache a token reads, beside all of them; nothing is deleted:"},
    {"--question", "TEXT", TEXT, AT(question), .takes = CONTEXT | EVAL,
     .help = "what will be asked, for policies that look at it: finch and task need it, snapkv, "
             "nacl, chunkkv and criticalkv may"},
    {"--question-each", NULL, SWITCH, AT(each), .takes = EVAL,
     .help = "these see each question of the tasks, and it is asked of a cache made for it"},
    {"--policy", "NAME,..", TEXT, AT(policy), .takes = EVAL,
     .help = "who scores (default: expected with a profile or --stream, else kvzip):"},
    {"--level", "NAME,..", TEXT, AT(level), .takes = EVAL,
     .help =
         "which pairs compete for a place (default: profile where there is one and the policy is "
         "expected, else pair):"},
    {"--ratio", "R,..", LIST, AT(shares), RANGE(RATIO_MIN, 1), .takes = EVAL,
     .help = "shares of the context's pairs that stay (default 1,0.7,0.5,0.3,0.2,0.1)"},
    {"--kv", "TYPE,..", TEXT, AT(kvs), .takes = EVAL,
     .help = "as below; with +q2 what is evicted stays at 2 bits; the first one's full cache "
             "is the yardstick"},
    {"-o", "FILE", TEXT, AT(out), .takes = EVAL,
     .help = "results, added as they come; what is there already is not done again"},
    {"--chart", "FILE", TEXT, AT(chart), .takes = EVAL, .help = "an SVG of the results"},
    {"--suite", "NAME", TEXT, AT(suite), .takes = EVAL,
     .help = "a set of tasks, instead of a file: tasks/NAME-N, from `make_tasks.py suite NAME "
             "--tokens N`; ends in a page"},
    {"--length", "N", COUNT, AT(length), RANGE(1, INT_MAX), .takes = EVAL,
     .help = "tokens of a context of the set (default 4000)"},
    {"--page", "FILE", TEXT, AT(page), .takes = EVAL,
     .help = "an HTML page of the results; measures bytes and tokens/s as well (with --suite: "
             "OUT.html)"},
    {"--shard", "I/N", TEXT, AT(shard), .takes = EVAL,
     .help = "only every N-th context, from the I-th on"},
    {"--merge", NULL, SWITCH, AT(merge), .takes = EVAL,
     .help = "the arguments are files of results, of shards for example: one table of all"},
    {"--show", NULL, SWITCH, AT(show), .takes = EVAL,
     .help = "each question as it is marked: the answers that are right, and the one given"},
    {"--ppl", "FILE", TEXT, AT(ppl), .takes = EVAL,
     .help = "perplexity of a text, with the windows of llama-perplexity, instead of tasks"},
    {"--profile", "FILE", TEXT, AT(profile), .takes = CONTEXT | BENCH | EVAL | STREAMS,
     .help = "what `run calibrate` learned about the model (default: what the model file carries)"},
    {"-f", "FILE", TEXT, AT(file), .takes = CALIBRATE,
     .help = "sample text, parts between lines of ==== (default: eval/calibration.txt beside "
             "the program)"},
    {"-o", "FILE", TEXT, AT(out), .takes = CALIBRATE, .help = "the profile to write"},
    {"--lambda", "X", REAL, AT(lambda), RANGE(1e-12, 1e12), .takes = CALIBRATE,
     .help = "ridge of the regression, as a share of each feature's own square (default 0.001)"},
    {"--tokens", "N", COUNT, AT(most_tokens), RANGE(64, 1 << 28), .takes = CALIBRATE,
     .help = "tokens of the sample text to learn from, the same share of each part (default: all, "
             "and of models beyond half a billion weights as many as 5e12 products of weights "
             "allow)"},
    {"--into", NULL, SWITCH, AT(into), .takes = CALIBRATE,
     .help = "-o is a copy of the model that carries the profile; it may be MODEL itself"},
    {"--ref-ties", NULL, SWITCH, AT(ref_ties), .takes = COMPRESS | MAP, .also = SCORE,
     .help = "the authors' threshold rule, which drops ties, instead of the exact count"},
    {"--chunk", "N", COUNT, AT(chunk), RANGE(1, INT_MAX),
     .takes = CONTEXT | BENCH | EVAL | CALIBRATE,
     .help = "tokens repeated at a time (default 2000; with --score-attn local 1000)"},
    {"--fit", "WHAT", CHOICE, AT(fit), .choices = "none|values|both|merge|pool",
     .takes = COMPRESS | MAP | SERVE, .also = SCORE,
     .help = "fit what stays to what all pairs gave: values, or values and biases; or merge what "
             "goes into it: into the most similar key's value, or pool it into the nearest one's"},
    {"--fit", "WHAT,..", TEXT, AT(fits), .takes = EVAL,
     .help =
         "none (default), values, both: what stays is fitted to what all pairs gave, values, or "
         "values and biases; merge, pool: what goes is merged into it"},
    {"--score-attn", "HOW", CHOICE, AT(score_attn), .takes = CONTEXT | EVAL, .also = BENCH,
     .choices = "full|local",
     .help = "the repeated text sees all of the context (default), or its own part"},
    {"--system", "TEXT", TEXT, AT(system), .takes = CHAT | CONTEXT | EVAL | CALIBRATE,
     .help = "system text of the chat"},
    {"--system-file", "FILE", TEXT, AT(system_file), .takes = CHAT | CONTEXT | EVAL | CALIBRATE,
     .help = "a file with the system text; newlines at its end do not count"},
    {"--task", "TEXT", TEXT, AT(task), .takes = CONTEXT | EVAL | CALIBRATE,
     .help = "what stands before the context instead of a request to answer briefly"},
    {"--raw", NULL, SWITCH, AT(raw), .takes = ASK | CONTEXT | EVAL | CALIBRATE,
     .help = "no chat template: context and questions are taken as they are"},
    {"--verbose-prompt", NULL, SWITCH, AT(verbose_prompt),
     .takes = ANSWERS | CONTEXT | EVAL | LOGITS,
     .help = "show on stderr what the model gets, token by token"},
    {"--answer-prefix", "TEXT", TEXT, AT(answer_prefix), .takes = ASK,
     .help = "the start of every answer, which small models need"},
    {"--stop", "TEXT", TEXTS, AT(stop), .takes = ANSWERS | EVAL,
     .help = "end an answer after this text; of several --stop after the first that comes"},
    {"--keep", NULL, SWITCH, AT(keep), .takes = ASK,
     .help = "each question sees the ones before it and their answers"},
    {"--batch", "N", COUNT, AT(batch), RANGE(1, MAX_BATCH), .takes = ASK,
     .help = "questions answered together (default 8; 1 with --keep); the answers are those of "
             "one at a time"},
    {"--draft", "N", COUNT, AT(draft), RANGE(0, DRAFT_MOST), .takes = ANSWERS | SERVE,
     .help =
         "at --temp 0 guess up to N tokens by what followed the last ones before, in the document "
         "or the answer, and check them in one step: the same answer, sooner where it quotes "
         "(default 4; f16 and f32 caches; 0: none)"},
    {"--ignore-eos", NULL, SWITCH, AT(ignore_eos), .takes = ANSWERS,
     .help = "do not stop at stop tokens"},
    {"--special", NULL, SWITCH, AT(special), .takes = TOKENIZE,
     .help = "recognize the text of special tokens"},
    {"--bos", NULL, SWITCH, AT(bos), .takes = TOKENIZE,
     .help = "add what the model's tokenizer adds"},
    {"--decode", NULL, SWITCH, AT(decode), .takes = TOKENIZE,
     .help = "ids to bytes, nothing added"},
    {"--prompt", "N,..", COUNTS, AT(prompts), RANGE(1, 1 << 24), .takes = BENCH,
     .help = "prefill lengths (default 512)"},
    {"--depth", "D,..", COUNTS, AT(depths), RANGE(0, 1 << 24), .takes = BENCH,
     .help = "tokens read before decoding (default 0,1024)"},
    {"--ratio", "R,..", LIST, AT(ratios), RANGE(RATIO_MIN, 1), .takes = BENCH,
     .help = "shares of them kept (default 1,0.3)"},
    {"--batch", "B,..", COUNTS, AT(batches), RANGE(1, MAX_BATCH), .takes = BENCH,
     .help = "sequences decoding together (default 1,4)"},
    {"-n", "N", COUNT, AT(n), RANGE(0, INT_MAX), .takes = GENERATE, .also = ALL,
     .help = "tokens at most (default 256)"},
    {"-n", "N", COUNT, AT(n), RANGE(0, INT_MAX), .takes = CHAT, .also = ALL,
     .help = "tokens of an answer at most (default 512)"},
    {"-n", "N", COUNT, AT(n), RANGE(0, INT_MAX), .takes = ASK, .also = ALL,
     .help = "tokens of an answer at most (default 96)"},
    {"-n", "N", COUNT, AT(n), RANGE(1, 4096), .takes = BENCH, .also = ALL,
     .help = "tokens of a decode run (default 32)"},
    {"-n", "N", COUNT, AT(n), RANGE(1, 65536), .takes = EVAL, .also = ALL,
     .help = "tokens of an answer at most (default 96), or of a window of --ppl (default 512)"},
    {"--temp", "T", REAL, AT(temp), RANGE(0, 100), .takes = GENERATE | CHAT, .also = ALL,
     .help = "temperature (default 0.7; 0: always the likeliest token)"},
    {"--temp", "T", REAL, AT(temp), RANGE(0, 100), .takes = ASK, .also = ALL,
     .help = "temperature (default 0: the likeliest token)"},
    {"--top-p", "P", REAL, AT(top_p), RANGE(0, 1), .takes = ANSWERS, .also = ALL,
     .help = "sample from the likeliest tokens that have this share (default 0.95)"},
    {"--top-k", "K", COUNT, AT(top_k), RANGE(0, INT_MAX), .takes = ANSWERS, .also = ALL,
     .help = "sample from the K likeliest tokens (default 0: all)"},
    {"--min-p", "P", REAL, AT(min_p), RANGE(0, 1), .takes = ANSWERS, .also = ALL,
     .help = "sample from the tokens with this share of the likeliest one's (default 0: all)"},
    {"--temp-last", NULL, SWITCH, AT(temp_last), .takes = ANSWERS, .also = ALL,
     .help = "--top-p and --min-p cut before the temperature, as in llama.cpp, not after it"},
    {"--repeat-penalty", "X", REAL, AT(repeat_penalty), RANGE(0.01, 100), .takes = ANSWERS,
     .also = ALL, .help = "divides the logits of tokens that came (default 1: nothing)"},
    {"--repeat-last-n", "N", COUNT, AT(last_n), RANGE(0, INT_MAX), .takes = ANSWERS, .also = ALL,
     .help = "tokens of prompt and answer that the three penalties look back at (default 64)"},
    {"--frequency-penalty", "X", REAL, AT(frequency_penalty), RANGE(-2, 2), .takes = ANSWERS,
     .also = ALL, .help = "taken from a logit for each time the token came (default 0)"},
    {"--presence-penalty", "X", REAL, AT(presence_penalty), RANGE(-2, 2), .takes = ANSWERS,
     .also = ALL, .help = "taken once from the logits of tokens that came (default 0)"},
    {"--logit-bias", "ID=B,..", BIASES, AT(biases), RANGE(-100, 100), .takes = ANSWERS, .also = ALL,
     .help = "added to these tokens' logits, from -100 to 100"},
    {"--json-object", NULL, SWITCH, AT(json_object), .takes = ANSWERS,
     .help = "the answer is a JSON object, as long as -n does not cut it"},
    {"--json-schema", "FILE|TEXT", TEXT, AT(json_schema), .takes = ANSWERS,
     .help =
         "the answer is JSON that this JSON Schema allows (docs/answers.md: which keywords); what "
         "begins with { is the schema, else a file's name"},
    {"--seed", "S", COUNT, AT(seed), RANGE(0, INT_MAX), .takes = ANSWERS, .also = ALL,
     .help = "of the sampling: with the question's words it decides the answer (default: by the "
             "clock, shown)"},
    {"-c", "NAME=CACHE", TEXTS, AT(caches), .takes = SERVE,
     .help = "a saved context as the document NAME; may be given several times"},
    {"--docs", "DIR", TEXT, AT(docs), .takes = SERVE,
     .help = "documents are kept here, and found again after a restart"},
    {"--docs-size", "N", BYTES, AT(docs_size), RANGE(1, 1e15), .takes = SERVE,
     .help =
         "bytes of their files at most; compressed prompts leave first, those used longest ago"},
    {"--compress-prompts", "N", COUNT, AT(compress_prompts), RANGE(16, INT_MAX), .takes = SERVE,
     .help = "a system text or first question of N tokens or more is kept compressed"},
    {"--ratio", "R", REAL, AT(ratio), RANGE(RATIO_MIN, 1), .takes = SERVE,
     .help = "share of a document's pairs that stays where a request says nothing (default 0.3)"},
    {"--policy", "NAME", TEXT, AT(policy), .takes = SERVE,
     .help = "who scores documents (default: expected with a profile, else kvzip):"},
    {"--level", "NAME", TEXT, AT(level), .takes = SERVE,
     .help = "which pairs of a document compete for a place (default: profile where there is one "
             "and the policy is expected, else pair):"},
    {"--profile", "FILE", TEXT, AT(profile), .takes = SERVE,
     .help = "what `run calibrate` learned about the model (default: what the model file carries)"},
    {"--host", "HOST", TEXT, AT(host), .takes = SERVE,
     .help = "name or address to listen at (default 127.0.0.1); one that others reach needs keys"},
    {"--port", "N", COUNT, AT(port), RANGE(0, 65535), .takes = SERVE,
     .help = "0: any that is free (default 8080)"},
    {"--api-key-file", "FILE", TEXT, AT(key_file), .takes = SERVE,
     .help = "keys, one a line: a request must show one of them"},
    {"--cors", NULL, SWITCH, AT(cors), .takes = SERVE, .help = "pages of other sites may ask"},
    {"--slots", "N", COUNT, AT(slots), RANGE(1, MAX_BATCH), .takes = SERVE,
     .help = "answers written together (default 8)"},
    {"--queue", "N", COUNT, AT(queue), RANGE(1, 100000), .takes = SERVE,
     .help = "requests that may wait (default 64); others hear 503"},
    {"-n", "N", COUNT, AT(n), RANGE(1, INT_MAX), .takes = SERVE,
     .help = "tokens of a chat's answer where a request says nothing (default 512)"},
    {"--temp", "T", REAL, AT(temp), RANGE(0, 100), .takes = SERVE,
     .help = "temperature where a request says nothing (default 0.7)"},
    {"--top-p", "P", REAL, AT(top_p), RANGE(0, 1), .takes = SERVE,
     .help = "top_p where a request says nothing (default 0.95)"},
    {"-j", "N", COUNT, AT(threads), RANGE(1, 1024), .takes = RUNS, .also = ALL,
     .help =
         "threads (default: one per core that this process may use; at most one per processor)"},
    {"--mem", "N", BYTES, AT(mem), RANGE(1, 1e15), .takes = RUNS, .also = ALL,
     .help =
         "bytes, or with K, M or G thousands, millions or billions of them: what does not fit is "
         "refused before it starts, with what would fit. Counts the model's file (mapped, but "
         "slow unless it stays in memory), scratch, cache, scores"},
    {"--weights", "HOW", CHOICE, AT(weights), .choices = "map|copy|auto", .takes = RUNS,
     .also = ALL,
     .help =
         "map: the model's file is mapped, and shared by processes (default); copy: read into "
         "memory of its own, in large pages, which are read faster; auto: what pays, for 256 MB or "
         "more (default of chat, serve, eval, calibrate and bench)"},
    {"--isa", "SET", TEXT, AT(isa), .takes = RUNS, .also = ALL,
     .help =
         "scalar, avx2, avx2vnni, avx512, avx512bf16, amx or neon (default: the fastest, and run "
         "bench says which)"},
    {"--kv", "TYPE", TEXT, AT(kv), .takes = RUNS & ~EVAL, .also = ALL & ~EVAL,
     .help = "numbers of the cache: f16 (default), f32, q8, q4, q2, or keys/values, as in q8/q4"},
    {"--json", NULL, SWITCH, AT(json), .takes = ALL, .also = ALL, .help = "one JSON object a line"},
    {"-q", NULL, SWITCH, AT(quiet), .takes = ALL, .also = ALL, .help = "no progress, no figures"},
};
// clang-format on
enum { N_FLAGS = sizeof flags / sizeof *flags };
const int n_flags = N_FLAGS;

// ---- parsing ----

// The row of `name` that the command lists, or else one that it accepts.
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
    bool whole = f->kind == COUNT || f->kind == COUNTS;
    if (whole && text[strspn(text, "0123456789")] != '\0') return false;
    *v = number_read(text, strlen(text));
    return *v >= f->lo && *v <= f->hi;
}

// "4096", "500M": whole numbers, with K, M or G behind them or nothing.
static bool parse_bytes(const char *text, const Flag *f, double *v) {
    static const char units[] = "KMG";
    size_t n = strspn(text, "0123456789");
    const char *unit = text[n] ? strchr(units, text[n]) : NULL;
    if (n == 0 || (text[n] && (!unit || text[n + 1]))) return false;
    *v = number_read(text, n);
    for (int i = 0; unit && i <= unit - units; i++) *v *= 1000;
    return *v >= f->lo && *v <= f->hi;
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

// "5=1.5,7=-100": tokens and what is added to their logits.
static bool parse_biases(const char *text, const Flag *f, BiasList *list) {
    char item[64];
    for (list->n = 0; list->n < MAX_BIASES; text++) {
        size_t len = strcspn(text, ","), n = strspn(text, "0123456789");
        if (len >= sizeof item || n == 0 || text[n] != '=') return false;
        memcpy(item, text, len);
        item[len] = item[n] = '\0';
        double id = number_read(item, n), value = number_read(item + n + 1, len - n - 1);
        if (!(id <= INT_MAX && value >= f->lo && value <= f->hi)) return false;
        list->v[list->n++] = (Bias){(int)id, (float)value};
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

// One more text of a list [MAX_STOPS + 1].
static void add_to_list(const Options *o, const Flag *f, const char **list, const char *value) {
    int n = 0;
    while (list[n]) n++;
    if (n == MAX_STOPS) die_usage(o->command, "%s: %d texts at most", f->name, MAX_STOPS);
    if (!*value) die_usage(o->command, "%s: needs a %s, not an empty text", f->name, f->value);
    list[n] = value;
}

// The value of a flag, NULL of a switch, goes to its place in o.
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
    case TEXTS:
        add_to_list(o, f, at, value);
        break;
    case BYTES:
        if (!parse_bytes(value, f, (double *)at))
            die_usage(o->command, "%s %s: needs a whole number of bytes, as in 4096, 500M or 4G",
                      f->name, value);
        break;
    case CHOICE:
        if (!parse_choice(value, f->choices, (int *)at))
            die_usage(o->command, "%s %s: needs one of %s", f->name, value, f->choices);
        break;
    case LIST:
    case COUNTS:
        if (!parse_list(value, f, (BenchList *)at))
            die_usage(o->command, "%s %s: needs at most %d %snumbers from %.10g to %.10g", f->name,
                      value, BENCH_LIST, f->kind == COUNTS ? "whole " : "", f->lo, f->hi);
        break;
    case BIASES:
        if (!parse_biases(value, f, (BiasList *)at))
            die_usage(o->command, "%s %s: needs at most %d ID=BIAS, biases from %.10g to %.10g",
                      f->name, value, MAX_BIASES, f->lo, f->hi);
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

// The flag argv[*i] and its value, which may be the next word (then *i moves on), or stand behind a
// "=", or right behind a flag of one letter: "-j 1", "--seed=1", "-j1".
static void parse_flag(Options *o, bool *given, int argc, char **argv, int *i) {
    const char *arg = argv[*i];
    const char *value = arg[1] == '-' ? strchr(arg, '=') : NULL;
    size_t len = value ? (size_t)(value - arg) : strlen(arg);
    const Flag *f = flag_find(arg, len, o->bit);
    if (value) value++;
    if (!f && arg[1] != '-' && len > 2) {
        f = flag_find(arg, 2, o->bit);
        if (f && f->kind == SWITCH) f = NULL;
        value = arg + 2;
    }
    if (!f) die_usage(o->command, "unknown flag %s", arg);
    if (value && f->kind == SWITCH) die_usage(o->command, "%s takes no value", f->name);
    if (!value && f->kind != SWITCH) {
        if (*i + 1 == argc) die_usage(o->command, "%s: its value %s is missing", f->name, f->value);
        value = argv[++*i];
    }
    if (given[f - flags] && f->kind != TEXTS && f->kind != SWITCH)
        die_usage(o->command, "%s is given twice", f->name);
    given[f - flags] = true;
    flag_set(o, f, value);
}

// ---- what does not go together ----

bool wants_stream(const Options *o) {
    bool share = o->ratio > 0 && o->ratio < 1;
    return o->budget > 0 || o->stream || (!(o->bit & (CONTEXT | SERVE)) && share);
}

bool wants_threshold(const Options *o) { return !isnan(o->threshold); }

static bool has_budget(const Options *o) { return o->budget > 0; }
static bool appends(const Options *o) { return o->append != NULL; }
static bool is_raw(const Options *o) { return o->raw; }
static bool has_ids(const Options *o) { return o->ids != NULL; }
static bool demotes(const Options *o) { return o->demote >= 0; }
static bool decodes(const Options *o) { return o->decode; }
static bool has_no_suite(const Options *o) { return o->suite == NULL; }
static bool merges(const Options *o) { return o->merge; }
static bool measures_text(const Options *o) { return o->ppl != NULL; }
static bool keeps_all_at_once(const Options *o) { return !wants_stream(o); }
static bool has_no_method(const Options *o) { return !wants_stream(o) && !o->reader; }
static bool has_form(const Options *o) { return o->json_object || o->json_schema; }
static bool has_schema(const Options *o) { return o->json_schema != NULL; }
static bool keeps_all(const Options *o) { return o->ratio >= 1 && !wants_stream(o); }
static bool penalizes_none(const Options *o) {
    return o->repeat_penalty == 1 && o->frequency_penalty == 0 && o->presence_penalty == 0;
}
static bool takes_likeliest(const Options *o) {
    return o->temp == 0 || (o->temp < 0 && o->bit == ASK);
}

// Flags that say nothing where `when` holds: wrong usage, or with `warns` a warning.
typedef struct {
    const char *names;  // with a space behind each
    unsigned commands;
    bool (*when)(const Options *o);
    bool warns;
    const char *why;
} Rule;

#define METHOD "--policy --level --set --profile "
#define READING                                                                                    \
    METHOD                                                                                         \
    "--reader --ratio --fit --stream --window --chunk --score-attn --system --system-file --task " \
    "--raw --stop "
// clang-format off: a table
static const Rule rules[] = {
    {"--ratio --budget --level --ref-ties ", COMPRESS | MAP | EVAL, wants_threshold, false,
     "--threshold says already what stays"},
    {"--ratio ", STREAMS, has_budget, false, "--budget says already how much stays"},
    {"--policy --level --profile --window ", GENERATE | CHAT, keeps_all_at_once, false,
     "nothing is evicted without --budget, or --ratio below 1"},
    {"--set ", GENERATE | CHAT, has_no_method, false,
     "nothing is evicted without --budget, or --ratio below 1, and there is no --reader"},
    {"--set ", ASK, has_no_method, false, "there is no --reader"},
    {"--window ", COMPRESS | EVAL, keeps_all_at_once, false,
     "there is no window without --stream or --budget"},
    {METHOD "--chunk --score-attn --ref-ties --demote ", COMPRESS | MAP, keeps_all, true,
     "--ratio 1 keeps all"},
    {"--fit ", COMPRESS | MAP, demotes, false,
     "--demote keeps the pairs that others would stand for"},
    {"--fit ", COMPRESS | MAP, keeps_all, true, "--ratio 1 keeps all"},
    {"--system --system-file --task ", CONTEXT | EVAL | CALIBRATE, is_raw, false,
     "--raw leaves them out"},
    {"--system --system-file --task ", CONTEXT, has_ids, false, "--ids has all that is read"},
    {"--system --system-file --task ", COMPRESS, appends, false, "the saved cache has its own"},
    {"--special --bos ", TOKENIZE, decodes, false, "--decode only shows what ids print"},
    {"--length ", EVAL, has_no_suite, false, "only a --suite is made for lengths"},
    {READING "--kv --shard --show --ppl --mem --suite --length ", EVAL, merges, false,
     "--merge only joins results"},
    {READING "--shard --show --chart --page --suite --length -o ", EVAL, measures_text, false,
     "--ppl compares nothing"},
    {"--json-object ", ANSWERS, has_schema, false, "--json-schema says what the answer is"},
    {"--ignore-eos ", ANSWERS, has_form, true, "the answer ends where its JSON value does"},
    {"--repeat-last-n ", ANSWERS, penalizes_none, true, "there is no penalty"},
    {"--seed --top-p --top-k --min-p --temp-last ", ANSWERS, takes_likeliest, true,
     "--temp 0 takes the likeliest token"},
};
// clang-format on

static bool has_name(const char *names, const char *name) {
    size_t n = strlen(name);
    for (; *names; names += strcspn(names, " ") + 1)
        if (strcspn(names, " ") == n && memcmp(names, name, n) == 0) return true;
    return false;
}

static void check_rules(const Options *o, const bool *given) {
    for (const Rule *r = rules; r < rules + sizeof rules / sizeof *rules; r++) {
        if (!(r->commands & o->bit) || !r->when(o)) continue;
        for (int i = 0; i < N_FLAGS; i++) {
            if (!given[i] || !has_name(r->names, flags[i].name)) continue;
            if (!r->warns) die_usage(o->command, "%s has no effect: %s", flags[i].name, r->why);
            if (!o->quiet) warning("%s has no effect: %s", flags[i].name, r->why);
        }
    }
}

// --threshold is short for a level and its parameter. Of eval's ratios one is left, below 1, which
// is not looked at.
static void set_threshold(Options *o) {
    static char text[1024];
    int n = snprintf(text, sizeof text, "%s%sleast=%.9g", o->set ? o->set : "", o->set ? "," : "",
                     o->threshold);
    if (n >= (int)sizeof text) die_usage(o->command, "--set: too many parameters");
    o->level = "threshold", o->set = text;
    o->shares = (BenchList){{0.5}, 1};
}

void parse_options(Options *o, const Command *c, int argc, char **argv) {
    *o = defaults;
    o->command = c->name;
    o->bit = c->bit;
    o->args = argv;
    bool only_args = false, given[N_FLAGS] = {false};
    for (int i = 0; i < argc; i++) {
        if (only_args || argv[i][0] != '-' || argv[i][1] == '\0')
            o->args[o->n_args++] = argv[i];
        else if (strcmp(argv[i], "--") == 0)
            only_args = true;
        else
            parse_flag(o, given, argc, argv, &i);
    }
    if (o->files[0]) o->file = o->files[0];
    check_rules(o, given);
    if (o->ratio == 0 && (c->bit & (CONTEXT | SERVE))) o->ratio = 0.3;
    if (wants_threshold(o)) set_threshold(o);
    if (o->chunk == 0 && c->bit != BENCH) o->chunk = default_chunk(o->score_attn == 1);
    if (o->n_args < c->min_args) die_usage(c->name, "needs %s", c->args);
    if (o->n_args > c->max_args)
        die_usage(c->name, "unexpected argument '%s'", o->args[c->max_args]);
}

// ---- help ----

bool asks_for_help(const char *arg) { return strcmp(arg, "-h") == 0 || strcmp(arg, "--help") == 0; }

bool wants_help(const Command *c, int argc, char **argv) {
    for (int i = 0; i < argc && strcmp(argv[i], "--") != 0; i++) {
        const Flag *f = flag_find(argv[i], strlen(argv[i]), c->bit);
        if (asks_for_help(argv[i])) return true;
        if (f && (f->kind == TEXT || f->kind == TEXTS)) i++;
    }
    return false;
}
