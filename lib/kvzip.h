// kvzip.h: the library: all that a program needs to read a text once, keep the pairs that matter,
// and ask later. `make lib` builds it; python/kvzip.py is the same in Python.
//
//   char err[KVZIP_ERR];
//   kvzip_model *m = kvzip_open("smollm2.kvz", 0, NULL, err);
//   kvzip_cache *c = kvzip_compress(m, &(kvzip_reading){.text = text, .n_text = n}, err);
//   kvzip_answer a;
//   kvzip_ask(c, (const char *[]){"Who built the bridge?"}, 1, &(kvzip_asking){0}, &a, err);
//
// What fails returns NULL or -1 and leaves one sentence in err [KVZIP_ERR]; nothing prints, exits
// or touches signals. Fields of settings that are 0 or NULL are defaults. A model may be closed
// before its caches and chats: it goes with the last of them. One call at a time for a model and
// all that came from it; the caller's thread needs 1 MB of stack. Texts are UTF-8 without a zero
// byte.
#ifndef KVZIP_H
#define KVZIP_H
#include <stddef.h>
#include <stdint.h>

#if defined KVZIP_BUILD && defined __GNUC__
#define KVZIP_API __attribute__((visibility("default")))
#else
#define KVZIP_API
#endif

// Rises when a struct or a function changes; kvzip_version is that of the library.
enum { KVZIP_VERSION = 2, KVZIP_ERR = 512 };
KVZIP_API int kvzip_version(void);

typedef struct kvzip_model kvzip_model;
typedef struct kvzip_cache kvzip_cache;
typedef struct kvzip_chat kvzip_chat;

// Called after every forward call, at most 512 tokens, with the word for the work at hand; nonzero
// stops, and the call it stops fails with "interrupted".
typedef int kvzip_progress(void *arg, const char *what, long done, long total);

// ---- models ----

// threads: 0, or more than this process may use: as many as it may. isa: "scalar", "avx2" and the
// like, NULL: the best; all models of a process have the same.
KVZIP_API kvzip_model *kvzip_open(const char *path, int threads, const char *isa, char *err);
KVZIP_API void kvzip_close(kvzip_model *m);  // NULL is allowed

typedef struct {
    const char *name, *fingerprint, *isa;  // live as long as the model
    int threads, n_layers, n_heads, n_kv_heads, head_dim, vocab_size;
    int seq_len;   // longest sequence seen in training
    int n_scored;  // layers without a window, which are scored and evicted from
    int has_chat;  // there is a chat template
} kvzip_model_facts;
KVZIP_API void kvzip_model_info(const kvzip_model *m, kvzip_model_facts *facts);
KVZIP_API void kvzip_scored(const kvzip_model *m, int *layers);  // layers [n_scored]

// ids [room] receives the ids of text [n], if there is room. special: texts of special tokens
// become these; bos: with the tokens that the model puts in front. Returns how many there are, or
// -1.
KVZIP_API long kvzip_tokenize(const kvzip_model *m, const char *text, size_t n, int special,
                              int bos, int *ids, long room, char *err);
// The text of ids [n], in the same way; returns its bytes, no NUL behind them.
KVZIP_API long kvzip_detokenize(const kvzip_model *m, const int *ids, int n, char *text, long room,
                                char *err);

// out [n][vocab_size]: logits after each of ids [n], which follow `after` (NULL: nothing), a cache
// that stays as it was. kv: the type of pairs where there is none. Returns 0, or -1.
typedef struct {
    const kvzip_cache *after;
    const char *kv;
    kvzip_progress *progress;
    void *arg;
} kvzip_computing;
KVZIP_API int kvzip_logits(kvzip_model *m, const int *ids, int n, const kvzip_computing *how,
                           float *out, char *err);

// ---- caches ----

// What is read, and what stays of it. The names and defaults of `run compress -h`.
typedef struct {
    const char *text;  // [n_text]
    size_t n_text;
    const int *ids;       // or ids [n_ids], of which the first n_prefix are protected
    int n_ids, n_prefix;  // with a text both are ignored
    const char *system, *task;
    int raw;       // no chat template
    double ratio;  // share of the pairs that stays, at most 1; 0: 0.3
    long budget;   // pairs a head; evicts while tokens are read
    int stream;    // so does ratio
    int window;    // newest pairs, which do not go meanwhile; 0: 128
    const char *policy, *level, *set, *kv, *fit;
    const char *profile;  // NULL: the model's own, if it has one
    int chunk, local, ref_ties, demote;
    int keep_scores;  // the cache remembers its scores; also with ratio 1
    kvzip_progress *progress;
    void *arg;
} kvzip_reading;
KVZIP_API kvzip_cache *kvzip_compress(kvzip_model *m, const kvzip_reading *how, char *err);

// The file is the old one or the whole new one, never half.
KVZIP_API int kvzip_save(const kvzip_cache *c, const char *path, char *err);
KVZIP_API kvzip_cache *kvzip_load(kvzip_model *m, const char *path, char *err);
// Another cache on the same memory: what is evicted from one stays in the other.
KVZIP_API kvzip_cache *kvzip_fork(const kvzip_cache *c, char *err);
KVZIP_API void kvzip_free(kvzip_cache *c);  // NULL is allowed

typedef struct {
    int n_prefix, n_ctx;              // tokens protected, and of the context
    int n_tokens;                     // position of the next token
    long n_pairs, n_kept, n_demoted;  // of the context, in layers that are scored
    double ratio;                     // asked for
    size_t bytes, full_bytes;         // in memory; and with all pairs in 16 or 32 bits
    double prefill_s, score_s;        // seconds; 0 for a loaded cache
    // How pairs were chosen; NULL: not known, or nothing was said. As long as the cache lives.
    const char *policy, *level, *profile, *set, *budget, *fit;
    char kv[16];
    const int *ids;  // [n_prefix + n_ctx] what was read
    // [n_scored][n_kv_heads][n_ctx] higher = keep, with keep_scores, else NULL.
    const float *scores;
} kvzip_facts;
KVZIP_API void kvzip_info(const kvzip_cache *c, kvzip_facts *facts);

// kept [n_scored][n_kv_heads][n_ctx]: 0 the pair is gone, 1 it is there, 2 there with two bits.
KVZIP_API void kvzip_kept(const kvzip_cache *c, uint8_t *kept);
// Evicts the context's pairs with keep = 0, in the same order; those that are gone stay so. From
// here on its policy is "mask". 0, or -1, and then some heads may have changed.
KVZIP_API int kvzip_evict(kvzip_cache *c, const uint8_t *keep, char *err);

// ---- answers ----

typedef struct {
    int limit;        // tokens of an answer at most; 0: 96, in a chat 512
    double temp;      // 0: always the likeliest token
    double top_p;     // 0: 0.95
    long seed;        // of every question's own random numbers; of a chat at its first message
    int raw;          // no chat template
    int ignore_stop;  // go on after tokens that end an answer
    const char *const *stop;  // texts, NULL behind the last: the answer ends right after the first
    const char *answer_prefix;  // the start of the answer
    int batch;                  // questions answered together, at most 64; 0: 8
    // Of which tokens one is drawn (sampling.h); 0: none of these changes anything.
    int top_k;
    double min_p, repeat_penalty, frequency_penalty, presence_penalty;
    int repeat_last_n;         // tokens that penalties look back at; 0: 64, -1: all
    int temp_last;             // temperature after the cuts, as llama.cpp has it
    const int *bias_ids;       // [n_bias] tokens, at most 300, whose logits get
    const float *bias_values;  // [n_bias] these added, from -100 to 100
    int n_bias;
    // The answer is JSON: any object, or what a JSON Schema allows (docs/answers.md).
    int json_object;
    const char *json_schema;
    // Called with what is new of answer i; nonzero stops, as with progress.
    int (*piece)(void *arg, int i, const char *text, size_t n);
    kvzip_progress *progress;
    void *arg;
} kvzip_asking;

typedef struct {
    char *text;  // [n_text] and a NUL; without white space at both ends
    size_t n_text;
    int n_prompt, n_answer;  // tokens read and written
    int cut;                 // it ended because of the limit
    double read_s, write_s;  // seconds
} kvzip_answer;

// answer [n]: what the questions [n] get, each right after the context, which stays as it was.
// Returns 0, or -1 and no answers. To be freed.
KVZIP_API int kvzip_ask(const kvzip_cache *c, const char *const *question, int n,
                        const kvzip_asking *how, kvzip_answer *answer, char *err);
KVZIP_API void kvzip_answers_free(kvzip_answer *answer, int n);

// A conversation, about what a cache holds (which stays as it was) or about nothing (NULL), with a
// system text or without (NULL).
KVZIP_API kvzip_chat *kvzip_chat_open(kvzip_model *m, const kvzip_cache *c, const char *system,
                                      int raw, char *err);
// The answer to the next message. One that fails or is stopped was never said.
KVZIP_API int kvzip_chat_say(kvzip_chat *chat, const char *message, const kvzip_asking *how,
                             kvzip_answer *answer, char *err);
KVZIP_API void kvzip_chat_close(kvzip_chat *chat);  // NULL is allowed
#endif
