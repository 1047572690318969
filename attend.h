// attend.h: how rows of a batch pass over pages. Private to tile.c, sweep.c and attend.c, which are
// one room, and to kvcache.c, which opens and closes it.
//
//   attend.c   cuts a batch into tiles and page ranges, and merges what they find
//   tile.c     one tile passes over the pages of its head: attention itself
//   sweep.c    the scoring rows pass over the scored pages once more and raise their scores
//   reading.c  a reader chooses which pages each token reads
#ifndef ATTEND_H
#define ATTEND_H
#include "kvpages.h"
#include "reading.h"

enum {
    TILE_ROWS = 64,  // query rows (tokens times group) that share one pass over the pages
    SPLIT_TOKENS = KV_LONG_RUN - 1,  // runs up to this length are split over page ranges
    SPLIT_ROWS = 64,                 // tokens of such runs, and runs, that are worked on together
    SWEEP_PAGES = 4,                 // whose scores one load of the rows raises
    MAX_RANGES = 5,                  // that the pairs of a run are attended in while it scores
};

// Pairs [lo, hi) of a head.
typedef struct {
    int lo, hi;
} Range;

// A run of a batch (as KVRun), and how it is worked on.
typedef struct {
    int seq, n;
    int row;          // of its first token, among the query's rows
    int splits;       // page ranges that each of its heads is cut into
    int slot;         // with splits > 1: where its partial results begin
    int pages;        // packed for each of its kv heads; 0: pages are read as they are
    uint8_t *packed;  // [n_kv_heads][pages] of packed_page_bytes each
    // Where a reader chooses, else NULL: whether each token reads a page, and what is added to the
    // scores of each query head, -inf for pairs that it does not read.
    uint8_t *chosen;   // [n_kv_heads][n][choice_pages]
    float *pairs;      // [n][n_heads][choice_pages][64], or NULL
    float *mass;       // [n_kv_heads][2][choice_pages] of readers that watch
    float *scratch;    // for each unit of choosing [choice_pages]; for those that watch more
    int choice_pages;  // of the longest head
    bool full;         // the layer is one that the reader leaves alone
} AttendRun;

// Runs of one layer that are worked on together.
typedef struct {
    KVCache *kv;
    int layer;
    int n_kv_heads, head_dim, group;  // of the layer; query heads that share a kv head
    const KVQuery *query;
    int n_runs;
    int tile_runs;  // of runs with splits: as many as fit one tile
    AttendRun run[SPLIT_ROWS];
} AttendBatch;

// Query rows of one kv head that pass over its pages together; row i is token i / group of the
// tile, query head i % group of the kv head.
typedef struct {
    const KVCache *kv;
    const KVHead *head;
    int n, group, layer, head_dim;
    int first;  // pair of the first token's own key; the token after it owns the next pair
    const uint8_t *chosen;  // [tokens][choice_pages] of the head, NULL: all is read
    const float *pairs;     // [tokens][n_heads][choice_pages][64] from the head's first on, or NULL
    int choice_pages;
    const uint8_t *packed;                    // the head's pages, packed, or NULL
    int page;                                 // of the head's list: the page at hand
    const void *q_packed;                     // q by kern.pack_rows
    float q[TILE_ROWS * MAX_HEAD_DIM];        // [n][head_dim], times the attention scale
    float q_mixed[TILE_ROWS * MAX_HEAD_DIM];  // q as mixed keys meet it, once there was such a page
    bool mixed;
    union {
        float o[TILE_ROWS * MAX_HEAD_DIM];          // [n][head_dim] sum of exp(s - max) v
        float swept[SWEEP_PAGES][TILE_ROWS][PAGE];  // sweep.c: [pages][group][64] its result
    };
    float max[TILE_ROWS], sum[TILE_ROWS];  // of each row's scores; of exp(s - max)
    float s[TILE_ROWS * PAGE];             // [n][64] scores of the page at hand, then weights
    uint16_t q_room[TILE_ROWS * MAX_HEAD_DIM], s_room[TILE_ROWS * PAGE];  // for kern.pack_rows
} Tile;

// ---- tile.c ----

// Tokens whose query heads of one kv head, `group` of them, fit a tile.
static inline int tokens_per_tile(int group) { return TILE_ROWS / group; }
// Bytes of one page as the tiles of a long run read it: packed keys, then packed values.
size_t packed_page_bytes(int head_dim);
// Packs a page of any kind so.
void page_pack(const KVPage *page, uint8_t *packed);

// A tile with as many tokens of the run as fit, from token `token` on, and kv head g.
void tile_load(Tile *t, const AttendBatch *batch, const AttendRun *run, int g, int token);
// n tokens of another run more, below the rows that the tile has.
void tile_add(Tile *t, const AttendBatch *batch, const AttendRun *run, int g, int token, int n);
// Once the tile has all its rows: packs them, which is enough for tile_scores; and empties max, sum
// and o.
void tile_pack(Tile *t);
void tile_start(Tile *t);
// Where heads have sinks, the rows of kv head g take theirs in: once among all ranges of a row.
void tile_sink(Tile *t, const AttendBatch *batch, int g);

// s [n][64] = q . k of the page, scaled and capped; ahead is a page that will be read later, or the
// page itself.
void tile_scores(Tile *t, const KVPage *p, const KVPage *ahead);
// Attends over the pairs of r that each row may see: max, sum and o take them in.
void tile_attend(Tile *t, Range r);

// ---- sweep.c ----

// Whether this run's rows raise scores in the batch's layer.
bool scores_run(const AttendBatch *batch, int seq);
// Pairs of earlier documents that kv head g holds in the batch's layer, as KVScoring.held.
int scoring_held(const AttendBatch *batch, int g);
// Raises the scores of the scored pairs by the run's rows, whose log-sum-exp is known.
void sweep(const AttendBatch *batch, const AttendRun *run);

// ---- reading.c ----

// Bytes of a run's choices in a layer where its longest head has so many pages; 0: it reads all.
size_t choice_bytes(const AttendBatch *batch, KVRun run, int pages);
// Lays the run's choices out in so much room.
void choice_place(const AttendBatch *batch, AttendRun *run, int pages, uint8_t *room);
// Lets the reader choose for all runs of the batch that have room for it, and counts.
void choose_pages(AttendBatch *batch);
// Room for the choices of one layer when seq will have n tokens more, and for digests. 0, or -1
// with err.
int reading_reserve(KVCache *kv, int seq, int n, char *err);
void reading_close(KVCache *kv);

// ---- attend.c ----

// Scratch of attention. 0, or -1 with err.
int attend_open(KVCache *kv, char *err);
void attend_close(KVCache *kv);
// Room to pack the pages of one layer when seq will have n tokens more, beside those of the other
// runs reserved for the batch. 0, or -1 with err.
int attend_reserve(KVCache *kv, int seq, int n, char *err);
// Gives the memory of packed pages back; attend_reserve takes it again.
void attend_trim(KVCache *kv);
#endif
