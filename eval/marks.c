// marks.c: how good an answer is: two texts, compared word by word.
//
// The scripts of SQuAD (arXiv 1606.05250) take out case, punctuation and articles, and look for one
// text in the other. Then the vitamin "A" is nothing, "C#" is in "C++", and 5 in 3.5. So here texts
// become lists of words first, as Unicode (Standard Annex 29) cuts them, with what these examples
// need:
//
//   letters and digits after letters          Ann, B12; C, C++ and C# are three words
//   numbers, with their sign and inner signs  -5, 3.5, 10:30, 3/4; 1,803 is 1803; 5kg is 5 and kg
//   abbreviations without their points        U.S. is US
//   letters of Chinese, Thai, Korean and      each a word: there, spaces do not say where one ends
//   the like
//
// Apostrophes and hyphens stand between words: "Ann's" says "Ann". An article counts only where no
// word follows (vitamin A), for "a" also where it is a capital inside a sentence. A number below
// ten in words is a digit. Letters are the same where canonical caseless matching says so (The
// Unicode Standard, D145): "STRASSE" is "Straße", an accent is one whether it is a character or
// not.
#include "eval/marks.h"

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "eval/overlap.h"
#include "eval/words.h"
#include "util.h"

// ---- letters ----

typedef struct {
    uint32_t c;  // folded
    uint8_t kind;
    bool upper;
} Letter;

typedef struct {
    Letter *at;  // [n] and one that is no letter
    int n;
} Letters;

static uint8_t find_value(const WordRange *rows, int n, uint32_t c, uint32_t *first) {
    int lo = 0, hi = n;
    while (lo < hi) {
        int mid = (lo + hi) / 2;
        if (rows[mid].last < c)
            lo = mid + 1;
        else
            hi = mid;
    }
    if (lo == n || rows[lo].first > c) return 0;
    if (first) *first = rows[lo].first;
    return rows[lo].value;
}

#define FIND(rows, c, first) find_value(rows, sizeof(rows) / sizeof *(rows), c, first)

static bool is_digit(uint32_t c) { return c >= '0' && c <= '9'; }

static void push(Letters *l, uint32_t c, bool upper) {
    uint32_t first = 0;
    Letter letter = {c, BETWEEN, upper};
    if (c < 0x80)
        letter.kind = is_digit(c)                                                    ? DIGIT
                      : (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_' ? LETTER
                                                                                     : BETWEEN;
    else
        letter.kind = FIND(word_kinds, c, &first);
    if (letter.kind == IGNORED) return;
    if (c >= 0x80 && letter.kind == DIGIT) letter.c = '0' + (c - first) % 10;
    if (c == 0x2212) letter.c = '-';
    l->at[l->n] = letter;
    // Marks stand in the order of their classes.
    uint8_t class = FIND(word_marks, c, NULL);
    for (int i = l->n; class > 0 && i > 0 && FIND(word_marks, l->at[i - 1].c, NULL) > class; i--) {
        l->at[i] = l->at[i - 1];
        l->at[i - 1] = letter;
    }
    l->n++;
}

// The Unicode Standard, 3.12: a syllable of Hangul is two or three letters.
static void push_syllable(Letters *l, uint32_t s) {
    push(l, 0x1100 + s / 588, false);
    push(l, 0x1161 + s % 588 / 28, false);
    if (s % 28 > 0) push(l, 0x11a7 + s % 28, false);
}

static int by_code(const void *key, const void *row) {
    uint32_t c = *(const uint32_t *)key, d = ((const WordFold *)row)->c;
    return (c > d) - (c < d);
}

static void fold(Letters *l, uint32_t c) {
    if (c >= 'A' && c <= 'Z') {
        push(l, c + 32, true);
    } else if (c < 0x80) {
        push(l, c, false);
    } else if (c >= 0xac00 && c < 0xd7a4) {
        push_syllable(l, c - 0xac00);
    } else {
        const WordFold *f = bsearch(&c, word_folds, sizeof word_folds / sizeof *word_folds,
                                    sizeof *word_folds, by_code);
        for (int i = 0; f && i < 4 && f->to[i]; i++) push(l, f->to[i], false);
        if (!f) push(l, c, false);
    }
}

// All of a text; bytes that are no UTF-8 stand between words. at NULL: no memory.
static Letters read_letters(const char *text) {
    size_t n = strlen(text);
    const uint8_t *p = (const uint8_t *)text, *end = p + n;
    Letters l = {.at = calloc(4 * n + 1, sizeof *l.at)};  // a byte makes at most four
    while (l.at && p < end) {
        uint32_t c;
        int len = utf8_get(p, end, &c);
        fold(&l, len > 0 ? c : 0xfffd);
        p += len > 0 ? len : 1;
    }
    return l;
}

// ---- words ----

// Letters [from, to) make a word; the next one comes after them.
typedef struct {
    int from, to;
} Word;

static const Letter *look(const Letters *l, int i) {
    static const Letter none = {0};
    return i >= 0 && i < l->n ? &l->at[i] : &none;
}

static bool is_word(const Letter *x) { return x->kind != BETWEEN && x->kind != MARK; }

static int end_of_marks(const Letters *l, int i) {
    while (look(l, i)->kind == MARK) i++;
    return i;
}

// A number: digits, inside them single signs such as . and :.
static int end_of_number(const Letters *l, int i) {
    for (;;) {
        while (look(l, i)->kind == DIGIT) i++;
        uint32_t c = look(l, i)->c;
        if (!(c == '.' || c == ',' || c == ':' || c == '/') || look(l, i + 1)->kind != DIGIT)
            return i;
        i++;
    }
}

// Letters, digits and marks; + and # at the end of all, as in C++.
static int end_of_letters(const Letters *l, int i) {
    while (look(l, i)->kind == LETTER || look(l, i)->kind == DIGIT || look(l, i)->kind == MARK) i++;
    int end = i;
    while (look(l, end)->c == '+' || look(l, end)->c == '#') end++;
    return is_word(look(l, end)) ? i : end;
}

static bool is_point(const Letters *l, int i) { return look(l, i)->c == '.'; }

// "U.S.", single letters with a point behind each but perhaps the last: the end, or i.
static int end_of_abbreviation(const Letters *l, int i) {
    int n = 0, at = i;
    while (look(l, at)->kind == LETTER && look(l, at)->c != '_') {
        int end = end_of_marks(l, at + 1);
        if (is_word(look(l, end)) || !(is_point(l, end) || n > 0)) break;
        n++;
        at = end;
        if (!is_point(l, at) || look(l, at + 1)->kind != LETTER) break;
        at++;
    }
    return n > 1 ? at : i;
}

// The word that begins at i; an empty one where none does.
static Word word_at(const Letters *l, int i, bool signs) {
    const Letter *x = look(l, i);
    bool sign = (x->c == '-' || x->c == '.') && !is_word(look(l, i - 1));
    sign = sign && look(l, i + 1)->kind == DIGIT;  // .5, too
    Word w = {i, i};
    if (x->kind == DIGIT || sign) {
        w.to = end_of_number(l, i + sign);
    } else if (x->kind == LETTER) {
        w.to = end_of_abbreviation(l, i);
        if (w.to == i) w.to = end_of_letters(l, i);
    } else if (x->kind == ALONE || (signs && x->c > ' ')) {
        w.to = end_of_marks(l, i + 1);
    }
    return w;
}

// Whether commas part a number's digits into thousands.
static bool has_thousands(const Letters *l, Word w) {
    int commas = 0, run = 0, i = w.from + (look(l, w.from)->c == '-');
    for (; i < w.to; i++) {
        uint32_t c = look(l, i)->c;
        if (c == ':' || c == '/') return false;
        if (c == '.') break;
        if (c == ',' && (run == 0 || run > 3 || (commas > 0 && run != 3))) return false;
        commas += c == ',';
        run = c == ',' ? 0 : run + 1;
    }
    for (int j = i + 1; j < w.to; j++)
        if (!is_digit(look(l, j)->c)) return false;
    return commas > 0 && run == 3;
}

static int put_word(Buffer *b, const Letters *l, Word w) {
    bool number = look(l, w.to - 1)->kind == DIGIT, thousands = number && has_thousands(l, w);
    bool short_form = look(l, w.from)->kind == LETTER && is_point(l, w.from + 1);
    for (int i = w.from; i < w.to; i++) {
        uint8_t bytes[4];
        uint32_t c = look(l, i)->c;
        if ((thousands && c == ',') || (short_form && c == '.')) continue;
        if (buffer_add(b, (const char *)bytes, (size_t)utf8_put(bytes, c)) != 0) return -1;
    }
    return 0;
}

// Whether the word that b ends with, from `start` on, is one of the names [n]; which in *which.
static bool is_one_of(const Buffer *b, size_t start, const char *const *names, int n, int *which) {
    for (*which = 0; *which < n; ++*which)
        if (strcmp(b->s + start, names[*which]) == 0) return true;
    return false;
}

// "the" and "an" before a word, "a" where it is no capital, or begins a sentence.
static bool is_article(const Letters *l, Word w, const Buffer *b, size_t start) {
    static const char *const articles[] = {"a", "an", "the"};
    int which, next = w.to, before = w.from - 1;
    if (!is_one_of(b, start, articles, 3, &which)) return false;
    while (look(l, next)->c == ' ') next++;
    if (next == w.to || word_at(l, next, false).to == next) return false;
    if (which > 0 || !look(l, w.from)->upper) return true;
    while (look(l, before)->c == ' ') before--;
    uint32_t c = look(l, before)->c;
    return before < 0 || (c < 0x80 && strchr(".!?:\"\n", (int)c));
}

static int put_words(Buffer *b, const Letters *l, bool signs) {
    static const char *const digits[] = {"zero", "one", "two",   "three", "four",
                                         "five", "six", "seven", "eight", "nine"};
    for (int i = 0; i < l->n;) {
        Word w = word_at(l, i, signs);
        size_t start = b->n + (b->n > 0), old = b->n;
        int which;
        i = w.to > i ? w.to : i + 1;
        if (w.to == w.from) continue;
        if ((old > 0 && buffer_add(b, " ", 1) != 0) || put_word(b, l, w) != 0) return -1;
        if (is_article(l, w, b, start)) {
            b->n = old;
            b->s[old] = '\0';
        } else if (is_one_of(b, start, digits, 10, &which)) {
            b->s[start] = (char)('0' + which);
            b->s[b->n = start + 1] = '\0';
        }
    }
    return 0;
}

char *mark_words(const char *text, bool signs) {
    Buffer b = {0};
    Letters l = read_letters(text);
    bool ok = l.at && buffer_add(&b, "", 0) == 0 && put_words(&b, &l, signs) == 0;
    free(l.at);
    if (ok) return b.s;
    free(b.s);
    return NULL;
}

// ---- metrics, of words with a space between two ----

static bool contained(const char *text, const char *want) {
    size_t n = strlen(want);
    for (const char *at = text; n > 0 && (at = strstr(at, want)) != NULL; at++)
        if ((at == text || at[-1] == ' ') && (at[n] == ' ' || at[n] == '\0')) return true;
    return false;
}

// How often the word [n] stands in text before `end` (NULL: anywhere).
static int count_word(const char *text, const char *end, const char *word, size_t n) {
    int count = 0;
    for (size_t len; (len = strcspn(text, " ")) > 0; text += len + (text[len] == ' ')) {
        if (end && text >= end) break;
        count += len == n && memcmp(text, word, n) == 0;
    }
    return count;
}

static int count_words(const char *s) {
    int n = *s != '\0';
    for (; *s; s++) n += *s == ' ';
    return n;
}

// F1 of the words in common, counted with multiplicity.
static double word_f1(const char *text, const char *want) {
    int n_text = count_words(text), n_want = count_words(want), common = 0;
    if (n_text == 0 || n_want == 0) return n_text == n_want;
    const char *p = want;
    for (size_t len; (len = strcspn(p, " ")) > 0; p += len + (p[len] == ' '))
        common += count_word(want, p, p, len) < count_word(text, NULL, p, len);
    return 2.0 * common / (n_text + n_want);
}

static bool is_letter(unsigned char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }

// The first letter that stands alone, "(b)" and "B." too, as a capital; 0 when there is none. "I"
// and "a" before a word in small letters are words; in "U.S.", "C++" and "R&D" none stands alone.
static int choice_letter(const char *s) {
    for (bool inside = false; *s; s++) {
        unsigned char c = (unsigned char)s[0], after = (unsigned char)s[1];
        bool ends = !is_letter(after) && !is_digit(after) && after < 0x80 && after != '\'';
        bool word = (c == 'I' || c == 'a') && after == ' ' && s[2] >= 'a' && s[2] <= 'z';
        bool pair = (after == '.' || after == '&') && is_letter((unsigned char)s[2]) &&
                    !is_letter((unsigned char)s[3]);
        bool joined = after == '+' || after == '#' || pair;
        if (!inside && is_letter(c) && ends && !word && !joined) return c & ~32;
        inside = is_letter(c) || is_digit(c) || c >= 0x80 || c == '\'' ||
                 (inside && (c == '.' || c == '&') && is_letter(after));
    }
    return 0;
}

static double mark_choice(const char *answer, const char *want) {
    int letter = choice_letter(answer);
    return letter && letter == choice_letter(want);
}

// The value of the number that the words begin with, NaN where it is none.
static double number_of(const char *s) {
    static const char digits[] = "0123456789";
    size_t n = strcspn(s, " "), sign = *s == '-' || *s == '+';
    size_t whole = strspn(s + sign, digits), point = s[sign + whole] == '.';
    size_t part = point ? strspn(s + sign + whole + 1, digits) : 0;
    if (whole + part == 0 || sign + whole + point + part != n) return NAN;
    return strtod(s, NULL);
}

// The number that the words give as their answer, NaN when they have none.
static double answer_number(const char *words) {
    static const char says[] = "answer is ";
    const char *from = NULL;
    for (const char *at = words; (at = strstr(at, says)) != NULL; at++) from = at + sizeof says - 1;
    double last = NAN;
    for (const char *s = from ? from : words; *s; s += strcspn(s, " "), s += *s == ' ') {
        double v = number_of(s);
        if (!isnan(v)) last = v;
        if (from && !isnan(v)) break;
    }
    return last;
}

static double mark_number(const char *answer, const char *want) {
    return answer_number(answer) == answer_number(want);
}

// ---- code ----

// Of an answer with a block of code that block, else all of it; malloc'ed, NULL: no memory. Where
// the answer was begun for the model, only the fence behind the block is there.
static char *code_of(const char *answer) {
    static const char fence[] = "```";
    const char *open = strstr(answer, fence), *begin = answer;
    const char *close = open ? strstr(open + 3, fence) : NULL;
    if (open) {
        const char *line = open + strcspn(open, "\n");  // behind the language's name
        bool ends = line[strspn(line, " \t\r\n")] == '\0';
        if (close || !ends) begin = line;
        if (!close && ends) close = open;
    }
    if (close && close < begin) begin = open + 3;  // both on one line
    size_t n = close ? (size_t)(close - begin) : strlen(begin);
    char *code = malloc(n + 1);
    if (code) memcpy(code, begin, n), code[n] = '\0';
    return code;
}

double mark_similar(const char *answer, const char *want) {
    char *code = code_of(answer);
    double value = code ? overlap_bleu(code, want) : -1;
    free(code);
    return value;
}

static double mark_code(const char *answer, const char *want) {
    static const double PASSES = 0.8;  // RepoQA's threshold
    double value = mark_similar(answer, want);
    return value < 0 ? -1 : value >= PASSES;
}

// The first line that is code: not empty, no comment, no fence.
static double mark_edit(const char *answer, const char *want) {
    size_t n;
    for (const char *next = answer;; answer = next) {
        n = strcspn(answer, "\r\n");
        next = answer + n + strspn(answer + n, "\r\n");
        bool empty = answer[strspn(answer, " \t")] == answer[n];
        bool skip = empty || memchr(answer, '`', n) || memchr(answer, '#', n) ||
                    (n > 1 && strstr(answer, "//") && strstr(answer, "//") < answer + n);
        if (!skip || !*next) break;
    }
    char *line = malloc(n + 1);
    if (!line) return -1;
    memcpy(line, answer, n), line[n] = '\0';
    double value = overlap_characters(line, want);
    free(line);
    return value;
}

// ---- any metric ----

// Of words with a space between two.
static double mark_by_words(EvalMetric metric, const char *answer, const char *want) {
    switch (metric) {
    case METRIC_EXACT:
        return strcmp(answer, want) == 0;
    case METRIC_F1:
        return word_f1(answer, want);
    case METRIC_QA:
        return fmax(word_f1(answer, want), contained(answer, want));
    case METRIC_ROUGE:
        return overlap_rouge(answer, want);
    case METRIC_NUMBER:
        return mark_number(answer, want);
    default:
        return contained(answer, want);
    }
}

double mark_answer(EvalMetric metric, const char *answer, const char *want) {
    if (metric == METRIC_CHOICE) return mark_choice(answer, want);
    if (metric == METRIC_CODE) return mark_code(answer, want);
    if (metric == METRIC_EDIT) return mark_edit(answer, want);
    double value = -1;
    char *w = mark_words(want, false);
    bool signs = w && !*w;
    if (signs) free(w), w = mark_words(want, true);
    char *a = mark_words(answer, signs);
    if (a && w) value = mark_by_words(metric, a, w);
    free(a);
    free(w);
    return value;
}
