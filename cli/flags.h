// flags.h: what the words after `run COMMAND` say.
//
// A command is one row of the table in run.c; a flag is one row of the table in flags.c, which
// drives parsing, -h, the manual and completion alike (help.h).
#ifndef FLAGS_H
#define FLAGS_H
#include <stdbool.h>
#include <stddef.h>

#include "bench/bench.h"
#include "sampling.h"

enum { MAX_BATCH = 64, MAX_STOPS = 16 };  // answers written together and stop texts, at most

// The commands, and what they have in common. A flag's row names those that take it.
enum {
    GENERATE = 1 << 0,
    CHAT = 1 << 1,
    COMPRESS = 1 << 2,
    ASK = 1 << 3,
    SCORE = 1 << 4,
    LOGITS = 1 << 5,
    TOKENIZE = 1 << 6,
    INFO = 1 << 7,
    BENCH = 1 << 8,
    EVAL = 1 << 9,
    CALIBRATE = 1 << 10,
    MAP = 1 << 11,
    SERVE = 1 << 12,
    ALL = (1 << 13) - 1,
    ANSWERS = GENERATE | CHAT | ASK,
    CONTEXT = COMPRESS | SCORE | MAP,
    DOCUMENTS = COMPRESS | MAP,            // reads several texts
    STREAMS = GENERATE | CHAT | COMPRESS,  // may evict while tokens come
    RUNS = ALL & ~(TOKENIZE | INFO),       // runs a model
    READS = GENERATE | CONTEXT | LOGITS,   // runs it over a given text
    READERS = ANSWERS | BENCH | EVAL       // may read less than the whole cache
};

typedef struct {
    Bias v[MAX_BIASES];
    int n;
} BiasList;

// The values of all flags; what is not given is NULL, 0 or false where no default stands in
// flags.c. -h says what each is for.
typedef struct {
    // what is read and written
    const char *prompt, *file, *ids;   // -p, -f, --ids: a text, the files of a text or of token ids
    const char *out;                   // -o
    const char *files[MAX_STOPS + 1];  // -f of several documents, NULL behind the last
    const char *cache;                 // -c
    const char *append;                // the cache that documents follow
    const char *isa;
    const char *ppl, *chart, *shard, *profile;
    // what stands around the text
    const char *system, *system_file, *task, *answer_prefix;
    bool raw, special, bos, decode;
    bool verbose_prompt;
    long n_prefix;  // -1: not given
    // how a context is compressed
    const char *policy, *level, *set;  // names and parameters; of eval, several between commas
    const char *reader;                // of eval and bench several between commas; NULL: none
    const char *question;              // that methods which ask one look at
    bool each;                         // they look at each question of a task
    const char *kv, *kvs;              // --kv of one cache, and of eval's
    double ratio;                      // 0: not given
    double threshold;                  // NaN: not given
    long budget;                       // pairs per head; 0: not given
    long window, chunk;                // chunk 0: not given
    int fit;                           // FitKind
    const char *fits;                  // --fit of eval, several between commas
    int score_attn;                    // 0 full, 1 local
    int demote;                        // 0: to q2; -1: not given
    bool ref_ties, stream;
    double lambda;     // ridge of calibrate
    long most_tokens;  // of calibrate's sample text; 0: by the model's cost
    bool into;         // calibrate: the output is a copy of the model
    // how an answer is made
    long n;              // tokens at most; -1: not given
    double temp, top_p;  // temp -1: not given
    long seed;           // -1: not given
    long top_k, last_n;
    double min_p, repeat_penalty, frequency_penalty, presence_penalty;
    BiasList biases;
    bool temp_last;
    const char *json_schema;
    bool json_object;
    const char *stop[MAX_STOPS + 1];  // NULL behind the last
    bool ignore_eos, keep;
    long batch;  // 0: not given
    long draft;  // -1: not given
    // what bench and eval go through
    BenchList prompts, depths, ratios, batches;
    BenchList shares;          // --ratio of eval
    const char *suite, *page;  // of eval
    long length;               // of its contexts; 0: not given
    bool merge, show;
    // serve
    const char *caches[MAX_STOPS + 1];  // NAME=FILE, NULL behind the last
    const char *docs, *host, *key_file;
    long port, slots, queue, compress_prompts;
    double docs_size;
    bool cors;
    // the program
    long threads;  // 0: one per core
    double mem;    // bytes; 0: not given
    int weights;   // 0 map, 1 copy, 2 auto; -1: not given
    bool json, quiet;
    const char *program;  // argv[0]
    const char *command;  // its name
    unsigned bit;         // of the command
    char **args;          // [n_args] what is no flag: MODEL, CACHE, questions
    int n_args;
} Options;

typedef struct {
    const char *name;
    unsigned bit;
    const char *args;  // what follows the name, for the usage
    int min_args, max_args;
    int (*run)(const Options *o);  // returns the exit code
    const char *help;              // one line
    const char *examples;          // after the flags
} Command;

// In Options: bool, const char *, [MAX_STOPS] of these, long, double, double, int (which of the
// choices), BenchList, BenchList, BiasList.
typedef enum { SWITCH, TEXT, TEXTS, COUNT, REAL, BYTES, CHOICE, LIST, COUNTS, BIASES } FlagKind;

typedef struct {
    const char *name, *value;  // "-o", "FILE"; value NULL: it takes none
    FlagKind kind;
    size_t at;            // where in Options its value goes
    double lo, hi;        // of numbers
    const char *choices;  // of CHOICE, "full|local"
    unsigned takes;       // commands whose -h lists it
    unsigned also;        // others that accept it, so that one set of flags fits a whole script
    const char *help;
} Flag;

extern const Flag flags[];  // [n_flags]
extern const int n_flags;

// Fills o from argv [argc], which begins after the command's name. What is no flag is moved to the
// front of argv and becomes o->args. Wrong usage is the end.
void parse_options(Options *o, const Command *c, int argc, char **argv);

bool wants_threshold(const Options *o);  // whether scores decide, not a share or a budget
bool wants_stream(const Options *o);     // whether pairs are evicted before all tokens are there

bool asks_for_help(const char *arg);  // "-h" or "--help"
// Whether -h is anywhere in argv [argc], unless it is the value of a flag or comes after --.
bool wants_help(const Command *c, int argc, char **argv);
#endif
