// test.h: what every tests/test_*.c stands on. A test is a plain program: main runs checks and
// returns test_end("name"), which is nonzero when one failed.
#ifndef TEST_H
#define TEST_H
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int test_passed, test_failed;

// Prints where and what when a check fails; a broken loop does not flood the terminal.
static inline bool test_check(bool ok, const char *file, int line, const char *what) {
    if (ok) test_passed++;
    else if (++test_failed <= 20) printf("%s:%d: %s\n", file, line, what);
    return ok;
}

static inline bool test_near(double a, double b, double tol, const char *file, int line) {
    char what[128];
    if (fabs(a - b) <= tol) return test_check(true, file, line, NULL);
    snprintf(what, sizeof what, "%.9g is not within %g of %.9g", a, tol, b);
    return test_check(false, file, line, what);  // NaN comes here too
}

static inline bool test_str(const char *a, const char *b, const char *file, int line) {
    char what[1200];
    snprintf(what, sizeof what, "\"%.500s\" is not \"%.500s\"", a ? a : "(null)", b ? b : "(null)");
    return test_check(a != NULL && b != NULL && strcmp(a, b) == 0, file, line, what);
}

#define CHECK(cond) test_check((cond), __FILE__, __LINE__, #cond)
#define CHECK_NEAR(a, b, tol) test_near((a), (b), (tol), __FILE__, __LINE__)
#define CHECK_STR(a, b) test_str((a), (b), __FILE__, __LINE__)

// Names a file in the build folder, so that several builds can be tested at once.
static inline void test_path(char path[64], const char *name) {
    const char *build = getenv("BUILD");
    snprintf(path, 64, "%.30s/%.30s", build ? build : "build", name);
}

static inline int test_end(const char *name) {
    printf("%s: %d passed, %d failed\n", name, test_passed, test_failed);
    return test_failed > 0;
}
#endif
