// Marking: what an answer says is found as whole words, whatever way it is written, and nothing
// else is.
#include "eval/marks.h"
#include "eval/overlap.h"
#include "eval/tasks.h"
#include "test.h"
#include "util.h"

static bool words_are(const char *text, const char *want) {
    char *got = mark_words(text, false);
    bool same = got && strcmp(got, want) == 0;
    if (!same) printf("\"%s\": \"%s\", not \"%s\"\n", text, got ? got : "", want);
    free(got);
    return same;
}

static bool has(const char *answer, const char *want) {
    return mark_answer(METRIC_CONTAINED, answer, want) == 1;
}

static bool is(const char *answer, const char *want) {
    return mark_answer(METRIC_EXACT, answer, want) == 1;
}

static double f1(const char *answer, const char *want) {
    return mark_answer(METRIC_F1, answer, want);
}

static bool chooses(const char *answer, const char *want) {
    return mark_answer(METRIC_CHOICE, answer, want) == 1;
}

static void test_words(void) {
    CHECK(words_are("", ""));
    CHECK(words_are(" ,;. ", ""));
    CHECK(words_are("The mill was built by Ann Grey.", "mill was built by ann grey"));
    CHECK(words_are("Ann's well-known inn", "ann s well known inn"));
    CHECK(words_are("C++, C# and C", "c++ c# and c"));
    CHECK(words_are("A+B and #5", "a b and 5"));
    CHECK(words_are("-5, 3.5, .5 1,803 1,803,000.25 1,80 10:30 3/4 1990-5",
                    "-5 3.5 .5 1803 1803000.25 1,80 10:30 3/4 1990 5"));
    CHECK(words_are("5kg B12 3rd", "5 kg b12 3 rd"));
    CHECK(words_are("the U.S. and the U.S.A, e.g. example.com", "us and usa eg example com"));
    CHECK(words_are("three of Nine", "3 of 9"));
    CHECK(words_are("a_b \xff x", "a_b x"));
    CHECK(
        words_are("ZERO\xc2\xad"
                  "Sum",
                  "zerosum"));  // a soft hyphen is not there
}

static void test_letters(void) {
    CHECK(is("STRASSE", "Straße") && is("ŒUVRE", "œuvre") && is("ΟΔΟΣ", "οδός") == false);
    CHECK(is("ΟΔΌΣ", "οδός") && is("ΜΈΓΑΣ", "μέγας") && has("ο ΜΈΓΑΣ.", "μέγας"));
    CHECK(is("İstanbul", "i\u0307stanbul") && is("ÉCOLE", "e\u0301cole") && !is("ecole", "école"));
    CHECK(is("Vi\u1ec7t", "Vie\u0323\u0302t") &&
          is("Vi\u00ea\u0323t", "VI\u1ec6T"));                              // marks' order
    CHECK(is("\uac01", "\u1100\u1161\u11a8") && !has("\uac01", "\uac00"));  // Hangul
    CHECK(is("\u0661\u0668\u0660\u0663", "1803") && is("\uff11\uff12", "12"));
    CHECK(is("\U00010d50", "\U00010d70") && is("\u1c89", "\u1c8a"));  // of Unicode 16
    CHECK(has("答えは東京です", "東京") && has("서울은 크다", "서울") &&
          has("เมืองหลวงคือกรุงเทพ", "กรุงเทพ"));
    CHECK(!has("答えは東京です", "京都") && has("l’école", "école") && has("l'ÉCOLE", "école"));
}

static void test_contained(void) {
    CHECK(has("vitamin A.", "A") && has("vitamin A is in it", "A") &&
          !has("vitamin C.", "vitamin A"));
    CHECK(!has("A dog.", "A") && !has("It is a dog.", "A") && has("Grade: A", "A"));
    CHECK(!has("C++.", "C#") && !has("C#", "C++") && !has("C++", "C") && has("in C++.", "C++"));
    CHECK(has("in C.", "C") && has("F# (a language)", "F#"));
    CHECK(!has("312", "12") && !has("13.5", "3.5") && !has("3.5", "5") && !has("3.5", "3"));
    CHECK(!has("-5", "5") && has("It is -5.", "-5") && has("\u22125", "-5") && !has("5", "-5"));
    CHECK(has("in 1,803.", "1803") && has("1803", "1,803") && !has("1,803", "803"));
    CHECK(has("5kg", "5") && has("5 kg", "5kg") && has("three", "3") && has("3", "three"));
    CHECK(!has("Pennington", "Penn") && has("Oliver Penn, who", "oliver penn") && !has("", "x"));
    CHECK(has("the mill", "The mill") && has("an old mill", "old mill") && has("mill", "the mill"));
    CHECK(has("head of the house", "head of house") && has("The A", "A") && has("Ann's", "Ann"));
    CHECK(has("Is it so?", "?") && !has("so", "?") && has("100 €", "€") && !has("100 $", "€"));
    CHECK(has("the", "the") && !has("mill", "the"));
}

static void test_others(void) {
    CHECK(is("The mill.", "mill") && !is("The old mill.", "mill") && !is("C++", "C#"));
    CHECK_NEAR(f1("the old mill", "mill"), 2.0 / 3, 1e-9);
    CHECK_NEAR(f1("mill mill", "mill"), 2.0 / 3, 1e-9);
    CHECK(f1("C++", "C#") == 0 && f1("A", "a") == 1 && f1("x", "y") == 0 && f1("", "y") == 0);
    CHECK(chooses("(b)", "B") && chooses("The answer is B.", "b") && !chooses("C", "B"));
    CHECK(chooses("I think B", "B") && chooses("It is a guess: C", "C") && !chooses("none", "N"));
    CHECK(chooses("The U.S. one, (C)", "C") && chooses("U.S.A: b", "B") &&
          chooses("C++ is B", "B"));
    CHECK(chooses("R&D: D", "D") && chooses("B.", "B") && chooses("B.Paris", "B"));
}

static double mark(EvalMetric metric, const char *answer, const char *want) {
    return mark_answer(metric, answer, want);
}

// What rouge_score 0.1.2, NLTK 3.9 and rapidfuzz 3 say.
static void test_overlap(void) {
    static const char add[] = "def add(a, b):\n    total = a + b\n    return total";
    static const struct {
        const char *text;
        double bleu;
    } codes[] = {
        {add, 1},
        {"def add(a, b):\n    return a + b", 0.219852635},
        {"def add(x, y):\n    total = x + y\n    return total", 0.089132897},
        {"def add(a, b): total", 0.223130160},
        {"total", 0.000123410},
        {"nothing here at all", 0},
        {"def add(a, b):\n  total = a + b\n  return total\n\ndef more(): pass", 0.736170335},
        {"a a a a a a", 0.019301098},
        {"", 0}};
    for (size_t i = 0; i < sizeof codes / sizeof *codes; i++)
        CHECK_NEAR(overlap_bleu(codes[i].text, add), codes[i].bleu, 1e-8);
    CHECK_NEAR(overlap_rouge("police killed gunman", "police kill gunman"), 2.0 / 3, 1e-9);
    CHECK_NEAR(overlap_rouge("gunman kill police", "police kill gunman"), 1.0 / 3, 1e-9);
    CHECK_NEAR(overlap_rouge("mill was built by old miller in 1803",
                             "old miller built mill in 1803 and sold it"),
               0.470588235, 1e-9);
    CHECK_NEAR(overlap_rouge("x y z\tx y\nz", " x z y x "), 0.6, 1e-9);
    CHECK(overlap_rouge("", "") == 1 && overlap_rouge("", "x") == 0 && overlap_rouge("x", "") == 0);
    CHECK_NEAR(overlap_characters("return a + b", "return b + a"), 0.833333333, 1e-9);
    CHECK_NEAR(overlap_characters("kitten", "sitting"), 0.615384615, 1e-9);
    CHECK_NEAR(overlap_characters("größe", "grosse"), 0.545454545, 1e-9);
}

static void test_authors(void) {
    CHECK(mark(METRIC_QA, "It was the old mill, by the brook", "The old mill") == 1);
    CHECK_NEAR(mark(METRIC_QA, "the mill", "old mill"), 2.0 / 3, 1e-9);
    CHECK_NEAR(mark(METRIC_ROUGE, "The police killed a gunman.", "Police kill the gunman"), 2.0 / 3,
               1e-9);
    CHECK(mark(METRIC_NUMBER, " 5 + 13 = 18. The answer is 18.", "The answer is 18") == 1);
    CHECK(mark(METRIC_NUMBER, "so it is 1,803 in all", "1803") == 1);
    CHECK(mark(METRIC_NUMBER, "The answer is $18.00 of 20", "18") == 1);
    CHECK(mark(METRIC_NUMBER, "The answer is 5. No, the answer is: 18 apples", "18") == 1);
    CHECK(mark(METRIC_NUMBER, "18 and then 19", "18") == 0 && mark(METRIC_NUMBER, "", "0") == 0);
    CHECK(mark(METRIC_NUMBER, "-5", "5") == 0 && mark(METRIC_NUMBER, "10:30", "10") == 0);
    CHECK(mark(METRIC_NUMBER, "none", "none") == 0 && mark(METRIC_NUMBER, "three", "3") == 1);
}

static void test_code(void) {
    static const char want[] = "def add(a, b):\n    total = a + b\n    return total\n";
    static const char *const right[] = {
        want, "def add(a, b):\n\ttotal = a + b\n\treturn total\n```\n",
        "Here it is:\n```python\ndef add(a, b):\n  total = a + b\n  return total\n```\nIt adds.",
        "```\ndef add(a, b):\n  total = a + b\n  return total"};
    for (size_t i = 0; i < sizeof right / sizeof *right; i++)
        CHECK(mark(METRIC_CODE, right[i], want) == 1);
    // BLEU of 0.81, 0.74 and 0.22: 0.8 passes
    CHECK(mark(METRIC_CODE, "def add(a, b):\n total = a + b\n return total # sum", want) == 1);
    CHECK(mark(METRIC_CODE, "def add(a, b):\n total = a + b\n return total # the sum", want) == 0);
    CHECK(mark(METRIC_CODE, "def add(a, b):\n    return a + b", want) == 0);
    CHECK(mark(METRIC_CODE, "", want) == 0 && mark(METRIC_CODE, "```", want) == 0);
    CHECK(mark(METRIC_CODE, "``````", want) == 0 && mark(METRIC_CODE, "``` ```", want) == 0);
    CHECK(mark(METRIC_EDIT, "\n# adds\n```\nreturn a + b\nmore", "return a + b") == 1);
    CHECK_NEAR(mark(METRIC_EDIT, "return b + a // sum", "return b + a // sum"), 1, 1e-9);
    CHECK_NEAR(mark(METRIC_EDIT, "return a + b", "return b + a"), 0.833333333, 1e-9);
    CHECK(mark(METRIC_EDIT, "", "x") == 0);
}

// RepoQA: of all that is asked for the wanted function must be the nearest, and pass.
static void test_nearest(void) {
    char *sum[] = {"def add(a, b):\n    total = a + b + c + d\n    return total\n"};
    char *far[] = {"def mul(a, b):\n    total = a * b\n    return total\n"};
    EvalQuestion q[] = {{"Which adds?", "", sum, 1}, {"Which multiplies?", "", far, 1}};
    EvalTask t = {.metric = METRIC_CODE, .questions = q, .n_questions = 2};
    char err[ERR_LEN];
    double v;
    CHECK(eval_answer(&t, &q[0], sum[0], &v, err) == 0 && v == 1);
    CHECK(eval_answer(&t, &q[1], sum[0], &v, err) == 0 && v == 0);
    // 0.9 of the first is said, and all of another
    char *near[] = {"def add(a, b):\n    total = a + b + c + e\n    return total\n"};
    q[1].answers = near;
    CHECK(mark(METRIC_CODE, near[0], sum[0]) == 1);
    CHECK(eval_answer(&t, &q[0], near[0], &v, err) == 0 && v == 0);
    CHECK(eval_answer(&t, &q[1], near[0], &v, err) == 0 && v == 1);
    q[1].answers = sum;  // two that want the same
    CHECK(eval_answer(&t, &q[0], sum[0], &v, err) == 0 && v == 1);
}

int main(void) {
    test_overlap();
    test_authors();
    test_code();
    test_nearest();
    test_words();
    test_letters();
    test_contained();
    test_others();
    return test_end("test_marks");
}
