// policies.h: how a context is compressed: the tables of policies and levels, and who uses them.
#ifndef POLICIES_H
#define POLICIES_H
#include "policies/context.h"

// Both end with a NULL name. Nothing depends on the order of the rows: it is that of `run -h`.
extern const Policy policies[];
extern const Level levels[];

// The row of that name, or "WRAPPER:NAME" of two of them, or NULL.
const Policy *policy_find(const char *name);

// The same for levels.
const Level *level_find(const char *name);

// Why there is no policy of that name, for methods that people look for, or NULL.
const char *policy_why_not(const char *name);

// Where nothing is said about them: with a profile expected attention within the profile's shares,
// else KVzip with its repeat passes, which need the whole context, so that streams expect, too.
// What is said explicitly changes nothing else: any other policy competes by pairs.
const char *default_policy(bool has_profile, bool streams);
const char *default_level(const char *policy, bool has_profile);

bool uses_profile(const Context *c);  // whether policy or level look into it

// Reads c's context and scores it: score [context_scores(c)], which is [scored
// layers][n_kv_heads][n_ctx], higher = keep. When p is not the policy of context_set, with its
// defaults. Returns 0, or -1 with err.
int context_score(Context *c, const Policy *p, float *score, char *err);

// keep [as score] = 1 for the pairs that stay: the share `ratio` by c's level. Returns how many, or
// -1 with err.
long context_select(const Context *c, const float *score, double ratio, uint8_t *keep, char *err);

// Takes out of c->seq the pairs of the context that keep names not, or with demote gives them two
// bits; those that stay are fitted before, where c->fitting is there. Both are for contexts without
// earlier documents. Returns 0, or -1 with err.
int context_evict(Context *c, const uint8_t *keep, bool demote, char *err);
#endif
