// 4_paged.c: pairs live in pages of 64, and a head is a list of pages (arXiv 2309.06180).
//
// A page comes from a pool and goes back to it, so a head grows without being moved. Two heads may
// list the same page: a fork copies the list, not the pairs. A page that is listed twice is never
// written; whoever wants to append to it takes a copy first. Keys lie transposed, one pair a
// column; the softmax goes page by page (arXiv 2205.14135).
#include "tutorial.h"

enum { PAGE = 64, POOL = 16, MAX_PAGES = 8, MAX_PAIRS = MAX_PAGES * PAGE };

typedef struct {
    int refs;                 // heads that list this page; 0: it is free
    float k[HEAD_DIM][PAGE];  // pair c is column c
    float v[PAGE][HEAD_DIM];  // pair c is row c
} Page;

typedef struct {
    int page[MAX_PAGES];  // numbers of pages in the pool, ceil(len / PAGE) of them
    int len;              // pairs
} Head;

static Page pool[POOL];

static int pages_used(const Head *h) { return (h->len + PAGE - 1) / PAGE; }

// A free page with one reference. Zeroed: attention multiplies unused values by weights of 0, and 0
// times infinity is not 0.
static int page_take(void) {
    int id = 0;
    while (id < POOL && pool[id].refs > 0) id++;
    require(id < POOL, "a free page");
    memset(&pool[id], 0, sizeof pool[id]);
    pool[id].refs = 1;
    return id;
}

// The last page of a head is about to be written: if others list it too, take a copy.
static void own_last_page(Head *h) {
    int *last = &h->page[h->len / PAGE];
    if (h->len % PAGE == 0) {
        *last = page_take();
    } else if (pool[*last].refs > 1) {
        int copy = page_take();
        memcpy(pool[copy].k, pool[*last].k, sizeof pool[copy].k);
        memcpy(pool[copy].v, pool[*last].v, sizeof pool[copy].v);
        pool[*last].refs--;
        *last = copy;
    }
}

static void append(Head *h, const float *k, const float *v) {
    own_last_page(h);
    Page *p = &pool[h->page[h->len / PAGE]];
    int c = h->len++ % PAGE;
    for (int i = 0; i < HEAD_DIM; i++) p->k[i][c] = k[i];
    memcpy(p->v[c], v, sizeof p->v[c]);
}

static Head head_fork(const Head *h) {
    for (int i = 0; i < pages_used(h); i++) pool[h->page[i]].refs++;
    return *h;
}

static void head_drop(Head *h) {
    for (int i = 0; i < pages_used(h); i++) pool[h->page[i]].refs--;
    h->len = 0;
}

typedef struct {
    float max, sum, o[HEAD_DIM];
} Online;

// Step 2's online softmax, 64 scores at a time: the maximum rises once a page at most. Only the
// first n pairs of the page exist.
static void attend_page(Online *a, const float *q, const Page *p, int n) {
    float s[PAGE] = {0.0f}, max = a->max;
    for (int i = 0; i < HEAD_DIM; i++) {
        for (int c = 0; c < PAGE; c++) s[c] += q[i] / sqrtf(HEAD_DIM) * p->k[i][c];
    }
    for (int c = n; c < PAGE; c++) s[c] = -INFINITY;
    for (int c = 0; c < PAGE; c++) max = fmaxf(max, s[c]);
    float shrink = expf(a->max - max);
    a->max = max;
    a->sum *= shrink;
    for (int i = 0; i < HEAD_DIM; i++) a->o[i] *= shrink;
    for (int c = 0; c < PAGE; c++) {
        float weight = expf(s[c] - max);
        a->sum += weight;
        for (int i = 0; i < HEAD_DIM; i++) a->o[i] += weight * p->v[c][i];
    }
}

// Attention over a head's pages, checked against its pairs in one piece: k, v [h->len][HEAD_DIM].
static void check_head(const char *what, const Head *h, const float *k, const float *v) {
    float q[HEAD_DIM], out[HEAD_DIM], want[HEAD_DIM];
    Online a = {.max = -INFINITY};
    random_fill(q, HEAD_DIM);
    for (int i = 0; i < pages_used(h); i++)
        attend_page(&a, q, &pool[h->page[i]], h->len - i * PAGE);
    for (int i = 0; i < HEAD_DIM; i++) out[i] = a.o[i] / a.sum;
    definition(want, q, k, v, h->len, NULL);
    check(what, out, want, HEAD_DIM, 1e-5);
}

static int pages_taken(void) {
    int n = 0;
    for (int i = 0; i < POOL; i++) n += pool[i].refs > 0;
    return n;
}

int main(void) {
    static float k[2][MAX_PAIRS][HEAD_DIM], v[2][MAX_PAIRS][HEAD_DIM];
    enum { SHARED = 200, ALL = 230 };  // 200 pairs in common, then 30 more in either head
    Head head = {.len = 0};
    random_fill(k[0][0], ALL * HEAD_DIM);
    random_fill(v[0][0], ALL * HEAD_DIM);
    memcpy(k[1], k[0], SHARED * sizeof k[0][0]);
    memcpy(v[1], v[0], SHARED * sizeof v[0][0]);
    random_fill(k[1][SHARED], (ALL - SHARED) * HEAD_DIM);
    random_fill(v[1][SHARED], (ALL - SHARED) * HEAD_DIM);

    for (int t = 0; t < SHARED; t++) append(&head, k[0][t], v[0][t]);
    Head fork = head_fork(&head);
    int shared = pages_taken();
    for (int t = SHARED; t < ALL; t++) append(&fork, k[1][t], v[1][t]);
    for (int t = SHARED; t < ALL; t++) append(&head, k[0][t], v[0][t]);
    int after = pages_taken();
    check_head("the head, 230 pairs", &head, k[0][0], v[0][0]);
    check_head("its fork, the last 30 pairs its own", &fork, k[1][0], v[1][0]);
    head_drop(&fork);
    printf("pages: %d after the fork, %d after both had grown, %d once the fork was dropped\n",
           shared, after, pages_taken());
    require(shared == 4 && after == 5 && pages_taken() == 4, "one page is copied, and comes back");
    return 0;
}
