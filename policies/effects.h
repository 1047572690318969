// effects.h: what evicting some layers alone does to the words that follow, and the layers' shares
// that this asks for.
//
// KVzip's scores compare heads by attention weights. Where few layers are evicted, a layer with
// small weights may matter more than one with large ones: of Gemma 3 270M's three the second. So
// `run calibrate` also tries: it evicts one group of layers at a time, lets the model repeat pieces
// of the text, and compares its distributions with those of the full cache.
#ifndef EFFECTS_H
#define EFFECTS_H
#include "policies/context.h"

enum { EFFECT_GROUPS = 8, EFFECT_POINTS = 5 };
// Tokens judged together, and forks that say them in one call. A state needs rows of logits for one
// fork at least, and should have them for all.
enum { EFFECT_SPAN = 16, EFFECT_BATCH = 4 };

// The ratios at which a group is evicted, rising. With all pairs there is no effect.
extern const float effect_ratio[EFFECT_POINTS];

// Neighbouring scored layers that are evicted together: every layer for itself where there are few.
typedef struct {
    int first[EFFECT_GROUPS + 1];  // scored layers [first[i], first[i + 1]) are group i
    int n;
    double effect[EFFECT_GROUPS][EFFECT_POINTS];  // KL from the full cache, nat per token
} Effects;

// Groups of n_layers scored layers, sizes as equal as can be; no effect yet.
Effects effects_groups(int n_layers);

// share [e->n]: of its pairs that each group keeps, so that `ratio` of all stay and the sum of the
// effects is least. An effect counts as its convex hull over the ratios, which is linear between
// them; below the first ratio groups keep alike.
void effects_share(const Effects *e, double ratio, double *share);

// Moves the shares of a profile between the groups: share [p->n_ratios][heads] becomes what
// effects_share gives each group at p's ratios, inside a group as p has it where the group keeps as
// much. Returns 0, or -1 with err: no memory.
int effects_move(const Effects *e, const Profile *p, float *share, char *err);

// ---- measuring ----

// The model's words over evicted forks of a context, beside those over the context itself.
typedef struct {
    Context *c;  // has been read
    int *seq;    // [n] forks of c->seq, evicted
    int n;
    double *kl;  // [n] out: mean KL of the words, nat per token
    long fed;    // out, rising: tokens, for c->progress
} Trial;

// Whether a context is long enough for a trial, and how many tokens one of n forks feeds, about.
bool trial_fits(int n_ctx);
long trial_tokens(int n);

// Fills t->kl: pieces of the context are repeated as KVzip has it, and each of their tokens judged.
// Returns 0, or -1 with err.
int trial_run(Trial *t, char *err);

// Adds a text's part to the effects, the share `weight` of them: c has been read and scored, score
// [context_scores(c)]; of a group's pairs the best ones stay. Returns 0, or -1 with err.
int effects_add(Effects *e, Context *c, const float *score, double weight, char *err);

// Whether shares pay that gave the held-out texts kl[i][1] where the others gave kl[i][0]: all
// together a quarter less, and less in three of four texts.
bool effects_pay(double (*kl)[2], int n);
#endif
