// Which pairs stay: every level, the authors' ties, Ada-KV's safeguard, and scores that are not
// numbers.
#include "select.h"
#include "test.h"
#include "util.h"

static char err[ERR_LEN];

static void check_select(const float *score, const Selection *how, const char *want) {
    uint8_t keep[10];
    char have[11] = "";
    long n = 0, kept = select_pairs(keep, score, how, err);
    for (int i = 0; i < 10; i++) have[i] = keep[i] ? '1' : '0', n += keep[i];
    CHECK_STR(have, want);
    CHECK(n == kept);
}

// One layer of two heads, five pairs each.
static void check_keep(const float *score, double ratio, SelectLevel level, bool ref_ties,
                       const char *want) {
    check_select(score, &(Selection){1, 2, 5, ratio, level, .ref_ties = ref_ties}, want);
}

static void test_select(void) {
    const float s[10] = {.90f, .10f, .60f, .60f, .05f, .80f, .60f, .20f, .30f, .01f};
    check_keep(s, 0.5, LEVEL_PAIR, true, "1000010000");
    check_keep(s, 0.6, LEVEL_PAIR, true, "1011011000");
    check_keep(s, 0.1, LEVEL_PAIR, true, "0000000000");  // the authors' rule may keep nothing
    check_keep(s, 0.5, LEVEL_PAIR, false, "1011011000");
    check_keep(s, 0.4, LEVEL_PAIR, false,
               "1011010000");  // of equals, the earlier layer, head, position
    check_keep(s, 0.1, LEVEL_PAIR, false, "1000000000");
    check_keep(s, 0.09, LEVEL_PAIR, false, "0000000000");
    check_keep(s, 1.0, LEVEL_PAIR, false, "1111111111");
    check_keep(s, 0.5, LEVEL_UNIFORM, false, "1010011000");
    check_keep(s, 0.5, LEVEL_HEAD, true, "0000000000");
    check_keep(s, 0.5, LEVEL_HEAD, false, "1111100000");
    check_keep(s, 0.6, LEVEL_UNIFORM, true, "1011011010");
    // Two layers of one head: a layer's pairs compete among themselves alone.
    check_select(s, &(Selection){2, 1, 5, 0.6, .level = LEVEL_LAYER}, "1011011010");
    check_select(s, &(Selection){2, 1, 5, 0.6, .level = LEVEL_LAYER, .ref_ties = true},
                 "1000011000");
    // Ada-KV's safeguard: of 5 x 0.6 = 3 pairs the best floor(3 x 0.7) = 2 are sure, even the worst
    // head's.
    const float low[10] = {.9f, .8f, .7f, .6f, .5f, .1f, .2f, .3f, .4f, .0f};
    check_keep(low, 0.6, LEVEL_PAIR, false, "1111100010");
    check_select(low, &(Selection){1, 2, 5, 0.6, .level = LEVEL_LAYER, .safeguard = 0.7},
                 "1111000110");
    check_select(low, &(Selection){1, 2, 5, 0.6, .level = LEVEL_PAIR, .safeguard = 1.0},
                 "1110001110");
    check_select(low, &(Selection){1, 2, 5, 0.6, .level = LEVEL_BUDGET, .budget = (int[]){0, 4}},
                 "0000011110");
    // Tokens by the sum of their scores: 1.7 .7 .8 .9 .06 in s.
    check_keep(s, 0.4, LEVEL_TOKEN, false, "1001010010");
    check_keep(s, 0.39, LEVEL_TOKEN, false, "1000010000");
    check_select(s, &(Selection){2, 1, 5, 0.6, .level = LEVEL_TOKEN}, "1011010110");
    // Whatever scores enough, and the last pair of each head.
    check_select(s,
                 &(Selection){1, 2, 5, 0.1, .level = LEVEL_THRESHOLD, .least = s[2], .newest = 1},
                 "1011111001");
    check_select(s, &(Selection){1, 2, 5, 0.9, .level = LEVEL_THRESHOLD, .least = 1}, "0000000000");
    check_select(s, &(Selection){1, 2, 5, 0.9, .level = LEVEL_THRESHOLD, .least = 1, .newest = 9},
                 "1111111111");
    const float neg[10] = {-1, -2, -INFINITY, 0.0f, -0.0f, -3, -4, -5, -6, -7};
    check_keep(neg, 0.3, LEVEL_PAIR, false, "1001100000");
    float nan[10] = {0};
    uint8_t keep[10];
    nan[7] = NAN;
    Selection how = {1, 2, 5, 0.5, .level = LEVEL_PAIR};
    CHECK(select_pairs(keep, nan, &how, err) == -1);
    // With a safeguard the authors' threshold would fall among pairs that cannot lose: none stayed.
    CHECK(select_pairs(
              keep, low,
              &(Selection){1, 2, 5, 0.4, .level = LEVEL_PAIR, .ref_ties = true, .safeguard = 1.0},
              err) == -1);
    CHECK(strstr(err, "safeguard") != NULL);
    how.n_ctx = 0;
    CHECK(select_pairs(keep, nan, &how, err) == 0);
}

int main(void) {
    test_select();
    return test_end("test_select");
}
