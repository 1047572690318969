// judge.h: rows of logits, judged where they stand; and perplexity, which is made of them.
#ifndef JUDGE_H
#define JUDGE_H
#include "kvcache.h"
#include "model.h"
#include "tokenizer.h"

// What is said about one token of an answer.
typedef struct {
    int best, full;  // the likeliest token, here and in the full cache, computed alike
    float nll;       // -ln p of the token wanted here
    float kl;        // KL(full || here), nat
} Verdict;

// A question, or a window of text, and the answer that follows it.
typedef struct {
    Ids ask;   // what is read first, at least one token
    Ids full;  // the answer that is judged: the full cache's own, with the stop token that ended it
    float *logits;     // [full.n][vocab] of the full cache; NULL: KL is not asked for
    Verdict *verdict;  // [full.n]
    int seq;           // of the cache, which ends before ask
} Judged;

// Rows that wait for one forward call. Zeroed but for the first fields.
typedef struct {
    RunState *state;
    KVCache *kv;
    bool keep;  // logits go into `logits`, with which they are compared otherwise
    Row row[MAX_ROWS];
    int n;
    Judged *item[MAX_ROWS];  // [n_logits] whose logits these are, in the rows' order
    int at[MAX_ROWS];        // [n_logits] which token of the answer they predict
    int n_logits;
} Judge;

// Feeds it->seq the question and the answer, and judges every token of the answer: at the latest
// when judge_flush returns. Return 0, or -1 with err.
int judge_add(Judge *j, Judged *it, char *err);
int judge_flush(Judge *j, char *err);

// ---- perplexity ----

typedef struct {
    RunState *state;  // as many rows as it has room for logits are scored at a time
    const Tokenizer *tok;
    KVTypes kv;
    int window;  // tokens per window, at least 4
    int (*progress)(void *arg, int window, int n_windows, double ppl);  // nonzero stops
    void *arg;
} Perplexity;

typedef struct {
    double value, error;  // exp(mean), and its standard error
    double low, high;     // 95% interval, from the standard error of the mean
    int n;                // tokens scored
} PerplexityResult;

// The windowing of llama.cpp's llama-perplexity, so that figures can be compared: text [n], less
// one newline at its end, is cut into windows that do not overlap; where the tokenizer adds a
// beginning token it takes the place of each window's first one; what the second half's tokens say
// about their successors in the window is scored; what is left at the end of the text is not.
// Returns 0, or -1 with err.
int eval_perplexity(const Perplexity *p, const char *text, size_t n, PerplexityResult *out,
                    char *err);
#endif
