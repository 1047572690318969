// Marking: what an answer says is found as whole words, whatever way it is written, and nothing
// else is.
#include "eval/marks.h"

#include "test.h"

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

int main(void) {
    test_words();
    test_letters();
    test_contained();
    test_others();
    return test_end("test_marks");
}
