// sampling.h: how a token is drawn from logits.
//
// The steps stand in llama.cpp's order (common/common.h, common_params_sampling.samplers): bias,
// penalties, top_k, top_p, min_p. Bias and penalties change logits, so they come before all that
// compares them; top_k is the cheapest cut and spares the others a sort; top_p and then min_p look
// at shares among what it left. Temperature is where programs differ: llama.cpp has it last, so
// that the cuts do not depend on it, transformers and vLLM before the cuts, as llama2.c has it.
// Here it comes before them unless temp_last says otherwise.
#ifndef SAMPLING_H
#define SAMPLING_H
#include <stdbool.h>
#include <stdint.h>

// Added to the logit of one token.
typedef struct {
    int id;
    float value;
} Bias;

enum { MAX_BIASES = 300 };  // as many as the OpenAI API takes

// Settings, all zero: the likeliest token. Answers may share one, or have one each.
typedef struct {
    double temp;            // 0: always the likeliest token
    double top_p;           // only the likeliest that together have this share; 1: all
    uint64_t random;        // state of the generator (random_next); a seed to begin with
    int top_k;              // only so many of the likeliest; 0: all
    double min_p;           // only those with this share of the likeliest one's; 0: all
    int last_n;             // tokens that penalties look back at; 0: none, -1: all
    double repeat_penalty;  // divides logits of tokens that came, multiplies negative ones
                            // (arXiv 1909.05858, llama.cpp); 0 and 1: none
    double frequency_penalty, presence_penalty;  // subtracted for each time a token came; once
    const Bias *bias;                            // [n_bias] stays the caller's
    int n_bias;
    bool temp_last;  // top_p and min_p cut by the shares at temperature 1
} Sampling;

// A token and what it weighs among those that may be drawn.
typedef struct {
    float logit, p;
    int id;
} Choice;

// What a token is drawn from.
typedef struct {
    const float *logits;  // [n]
    int n;
    const uint64_t *allowed;  // [(n + 63) / 64] a bit for each token that may come; NULL: all
    const int *past[2];       // [n_past[i]] tokens that came: the prompt's and then the answer's
    int n_past[2];
    Choice *scratch;  // [n]
} Draw;

// The token with the largest of logits [n], the first of equals.
int likeliest(const float *logits, int n);

// Whether it is always the largest logit that is drawn, of those that are allowed; NULL: yes.
bool sampling_is_plain(const Sampling *s);

// A token drawn as s says, which moves s->random on where it is not certain. -1 when none is
// allowed. Equal logits: the smaller id comes first.
int sampling_draw(Sampling *s, const Draw *d);

// The settings of the i-th of several answers to one prompt: the first has those of one alone, the
// others random numbers of their own.
Sampling sampling_nth(const Sampling *s, int i);

// Returns 0, or -1 with err when a setting is out of its range, by the name that requests have for
// it, or a bias is of no token below vocab.
int sampling_check(const Sampling *s, int vocab, char *err);
#endif
