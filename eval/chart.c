// chart.c: pictures of results, each one self-contained file: the curves of `run eval` as SVG, and
// the pairs of a context that survive as an HTML page with the text itself.
#include "eval/chart.h"

#include <math.h>
#include <string.h>

#include "text.h"
#include "util.h"

void chart_text(FILE *f, const char *s, size_t n) {
    char shown[TEXT_SHOWN];
    const char *end = s + n;
    for (bool bracket = false; s < end; bracket = shown[0] == ']') {  // "]]>" is forbidden
        int len = text_show(shown, &s, end, true);
        const char *name = shown[0] == '<'              ? "&lt;"
                           : shown[0] == '>' && bracket ? "&gt;"
                           : shown[0] == '&'            ? "&amp;"
                           : shown[0] == '"'            ? "&quot;"
                           : shown[0] == '\''           ? "&#39;"
                                                        : NULL;
        if (name)
            fputs(name, f);
        else
            fwrite(shown, 1, (size_t)len, f);
    }
}

static void put_name(FILE *f, const char *s) { chart_text(f, s, strlen(s)); }

// ---- curves ----

enum { MAX_LINES = 128 };

typedef struct {
    FILE *f;
    const EvalRow *rows;  // [n]
    int n;
    ChartAxis axis;
    double widest;        // what the right end of the axis stands for
    int line[MAX_LINES];  // a row of each line: policy, level, fit and page type
    int n_lines;
} Chart;

enum {
    PANEL_W = 300,
    PANEL_H = 200,
    PANEL_LEFT = 60,
    PANEL_TOP = 50,
    PANEL_X = 380,
    PANEL_Y = 280
};
static const char *const colours[] = {"#0072b2", "#d55e00", "#009e73", "#cc79a7",
                                      "#e69f00", "#56b4e9", "#000000", "#999933"};
static const char *const dashes[] = {"none", "5 3", "2 2", "8 3 2 3"};
static const double KL_LEAST = 1e-4, KL_MOST = 10;

static const char *colour_of(int k) { return colours[k % 8]; }
static const char *dash_of(int k) { return dashes[k / 8 % 4]; }

static bool same_panel(const Chart *c, const EvalRow *a, const EvalRow *b) {
    return eval_row_same_task(a, b) && (c->axis != CHART_DEPTH || a->ratio == b->ratio);
}

// Whether row i is the first one of a panel.
static bool begins_panel(const Chart *c, int i) {
    if (strcmp(c->rows[i].metric, "nll") == 0) return false;
    for (int j = 0; j < i; j++)
        if (same_panel(c, &c->rows[i], &c->rows[j])) return false;
    return true;
}

// 0 at the bottom of a panel to 1 at its top: shares as they are, KL by its logarithm.
static double height_of(const EvalRow *row, double v) {
    if (strcmp(row->metric, "kl") != 0) return v;
    return log(fmin(fmax(v, KL_LEAST), KL_MOST) / KL_LEAST) / log(KL_MOST / KL_LEAST);
}

// ---- axes ----

static const char *const axis_names[] = {"share of pairs kept", "MiB of the context in memory",
                                         "tokens/s", "depth in the context"};

// Where a row stands on the axis, in its unit; 0 where that is not known.
static double axis_value(ChartAxis axis, const EvalRow *row) {
    return axis == CHART_KEPT    ? row->kept
           : axis == CHART_BYTES ? row->bytes / (1 << 20)
           : axis == CHART_SPEED ? row->speed
                                 : row->depth;
}

static bool is_share(ChartAxis axis) { return axis == CHART_KEPT || axis == CHART_DEPTH; }

static bool is_known(ChartAxis axis, const EvalRow *row) {
    return is_share(axis) || axis_value(axis, row) > 0;
}

// What orders the points of a line.
static double order_of(ChartAxis axis, const EvalRow *row) {
    return axis == CHART_DEPTH ? row->depth : row->ratio;
}

// The next larger one of 1, 2, 2.5, 5, 10 and so on.
static double round_up(double v) {
    static const double steps[] = {1, 2, 2.5, 5, 10};
    double ten = pow(10, floor(log10(v)));
    for (int i = 0; i < 5; i++)
        if (steps[i] * ten >= v) return steps[i] * ten;
    return 10 * ten;
}

static void chart_axes(const Chart *c, const EvalRow *row) {
    bool kl = strcmp(row->metric, "kl") == 0;
    fprintf(c->f, "<rect width='%d' height='%d' class='box'/><text y='-12' class='title'>", PANEL_W,
            PANEL_H);
    put_name(c->f, row->task);
    fputs(": ", c->f);
    put_name(c->f, row->metric);
    if (c->axis == CHART_DEPTH) fprintf(c->f, ", %g kept", row->ratio);
    fprintf(c->f, "%s</text>\n", kl ? ", nat per token" : "");
    for (int i = 0; i <= 5; i++) {
        double at = i / 5.0, value = kl ? KL_LEAST * pow(KL_MOST / KL_LEAST, at) : at;
        double x = at * PANEL_W, y = (1 - at) * PANEL_H;
        fprintf(c->f, "<path d='M0 %g h%d M%g 0 v%d' class='grid'/>", y, PANEL_W, x, PANEL_H);
        fprintf(c->f, "<text x='-6' y='%g' class='y'>%g</text>", y + 4, value);
        fprintf(c->f, "<text x='%g' y='%d' class='x'>%g</text>\n", x, PANEL_H + 16, at * c->widest);
    }
    fprintf(c->f, "<text x='%d' y='%d' class='x'>%s</text>\n", PANEL_W / 2, PANEL_H + 34,
            axis_names[c->axis]);
}

// ---- lines ----

// Of line k in a panel the row behind `last`, the next one in their order, or NULL.
static const EvalRow *next_point(const Chart *c, const EvalRow *panel, int k, double last) {
    const EvalRow *next = NULL;
    for (const EvalRow *row = c->rows; row < c->rows + c->n; row++) {
        double at = order_of(c->axis, row);
        if (at > last && (!next || at < order_of(c->axis, next)) && is_known(c->axis, row) &&
            same_panel(c, row, panel) && eval_row_same_line(row, &c->rows[c->line[k]]))
            next = row;
    }
    return next;
}

static void chart_line(const Chart *c, const EvalRow *panel, int k) {
    const EvalRow *row = next_point(c, panel, k, -1);
    fprintf(c->f, "<g stroke='%s' stroke-dasharray='%s'>", colour_of(k), dash_of(k));
    for (double px = 0, py = -1, x, y; row;
         row = next_point(c, panel, k, order_of(c->axis, row)), px = x, py = y) {
        x = axis_value(c->axis, row) / c->widest * PANEL_W;
        y = (1 - height_of(row, row->value)) * PANEL_H;
        if (py >= 0) fprintf(c->f, "<path d='M%.1f %.1f L%.1f %.1f' class='line'/>", px, py, x, y);
        fprintf(c->f, "<path d='M%.1f %.1f V%.1f' class='line'/>", x,
                (1 - height_of(row, row->low)) * PANEL_H,
                (1 - height_of(row, row->high)) * PANEL_H);
        fprintf(c->f, "<circle cx='%.1f' cy='%.1f' r='2.5' fill='%s'/>\n", x, y, colour_of(k));
    }
    fputs("</g>\n", c->f);
}

void chart_method(FILE *f, const EvalRow *row) {
    put_name(f, row->policy);
    if (*row->level) fputc(' ', f);
    put_name(f, row->level);
    fputs(", ", f);
    put_name(f, row->kv);
    if (strcmp(row->fit, "none") == 0) return;
    fputs(", fitted ", f);
    put_name(f, row->fit);
}

// [columns] names beside each other.
static void chart_legend(const Chart *c, int top, int columns) {
    for (int k = 0; k < c->n_lines; k++) {
        int x = PANEL_LEFT + k % columns * 220, y = top + k / columns * 20;
        fprintf(c->f, "<path d='M%d %d h24' stroke='%s' stroke-dasharray='%s'/>", x, y - 4,
                colour_of(k), dash_of(k));
        fprintf(c->f, "<text x='%d' y='%d'>", x + 30, y);
        chart_method(c->f, &c->rows[c->line[k]]);
        fputs("</text>\n", c->f);
    }
}

// Finds lines and panels, then draws these: a row of panels per task, a column per metric.
static void chart_draw(Chart *c) {
    int n_panels = 0, at = 0;
    double most = 0;
    for (int i = 0; i < c->n; i++) {
        int k = 0;
        while (k < c->n_lines && !eval_row_same_line(&c->rows[i], &c->rows[c->line[k]])) k++;
        if (k == c->n_lines && k < MAX_LINES) c->line[c->n_lines++] = i;
        n_panels += begins_panel(c, i);
        most = fmax(most, axis_value(c->axis, &c->rows[i]));
    }
    c->widest = is_share(c->axis) || most <= 0 ? 1 : round_up(most);
    int bottom = PANEL_TOP + (n_panels + 2) / 3 * PANEL_Y;
    int width = PANEL_X * (n_panels < 1 ? 1 : min_int(n_panels, 3)), columns = width / 220;
    fprintf(c->f,
            "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 %d %d' font-family='sans-serif' "
            "font-size='12'>\n<style>.box,.line{fill:none}.box{stroke:#444}.grid{stroke:#ddd}"
            ".title{font-weight:bold}.x{text-anchor:middle}.y{text-anchor:end}</style>\n"
            "<rect width='100%%' height='100%%' fill='#fff'/>\n",
            width, bottom + (c->n_lines + columns - 1) / columns * 20 + 20);
    for (int i = 0; i < c->n; i++) {
        if (!begins_panel(c, i)) continue;
        int x = PANEL_LEFT + at % 3 * PANEL_X, y = PANEL_TOP + at++ / 3 * PANEL_Y;
        fprintf(c->f, "<g transform='translate(%d %d)'>\n", x, y);
        chart_axes(c, &c->rows[i]);
        for (int k = 0; k < c->n_lines; k++) chart_line(c, &c->rows[i], k);
        fputs("</g>\n", c->f);
    }
    chart_legend(c, bottom + 10, columns);
    fputs("</svg>\n", c->f);
}

void chart_svg(FILE *f, const EvalRow *rows, int n, ChartAxis axis) {
    chart_draw(&(Chart){.f = f, .rows = rows, .n = n, .axis = axis});
}

int chart_curves(const EvalRow *rows, int n, const char *path, char *err) {
    NewFile out;
    if (newfile_begin(&out, path, err) != 0) return -1;
    chart_svg(out.file, rows, n, CHART_KEPT);
    return newfile_commit(&out, err);
}

// ---- survivors ----

// The page is readable without its script, which colours the text by the heads that were chosen.
static const char map_head[] =
    "<style>body{font:15px/1.6 sans-serif;max-width:64em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse;font-size:10px;cursor:pointer}"
    "th,td{min-width:2em;text-align:center;font-weight:normal;border:2px solid #fff}"
    ".on{border-color:#d55e00}i{font-style:normal;white-space:pre-wrap}</style>\n";

static const char map_script[] =
    "<script>\n"
    "const all = [...document.querySelectorAll('td')], tokens = document.querySelectorAll('i');\n"
    "const bit = (td, i) => parseInt(td.dataset.kept[i >> 2], 16) >> (i & 3) & 1;\n"
    "const biased = all.length > 0 && 'bias' in all[0].dataset;\n"
    "all.forEach(td => {\n"
    "  let next = 0, bias = (td.dataset.bias || '').split(' ');\n"
    "  td.bias = [...tokens].map((t, i) => biased && bit(td, i) ? Number(bias[next++]) : 0);\n"
    "});\n"
    "function show(heads) {\n"
    "  all.forEach(td => td.classList.toggle('on', heads !== all && heads.includes(td)));\n"
    "  tokens.forEach((t, i) => {\n"
    "    const n = heads.reduce((sum, td) => sum + bit(td, i), 0);\n"
    "    t.style.background = `rgba(0,114,178,${n / heads.length * 0.7})`;\n"
    "    t.style.color = n ? '' : '#aaa';\n"
    "    t.title = `token ${i}: kept by ${n} of ${heads.length}`;\n"
    "    if (!biased) return;\n"
    "    const w = heads.reduce((sum, td) => sum + bit(td, i) * Math.exp(td.bias[i]), 0) / n;\n"
    "    t.style.boxShadow = n && w > 1\n"
    "      ? `inset 0 -3px rgba(213,94,0,${Math.min(Math.log(w) / 3, 1)})` : '';\n"
    "    if (n) t.title += `, stands for ${w.toFixed(1)} pairs in each`;\n"
    "  });\n"
    "}\n"
    "document.querySelector('table').onclick = e => {\n"
    "  const cell = e.target.closest('td,th');\n"
    "  if (!cell) return;\n"
    "  const layer = cell.dataset.layer, heads = cell.matches('td') ? [cell]\n"
    "    : layer ? all.filter(td => td.dataset.layer === layer)\n"
    "    : [...cell.parentNode.querySelectorAll('td')];\n"
    "  show(cell.matches('.on') || heads.length === 0 ? all : heads);\n"
    "};\n"
    "show(all);\n"
    "</script>\n";

// keep [n] as hexadecimal digits, four tokens each, the first one in the lowest bit.
static void put_bits(FILE *f, const uint8_t *keep, int n) {
    for (int i = 0; i < n; i += 4) {
        int digit = 0;
        for (int j = 0; j < 4 && i + j < n; j++) digit |= (keep[i + j] != 0) << j;
        fprintf(f, "%x", digit);
    }
}

// The biases of the pairs of a head that stay, in their order.
static void put_biases(FILE *f, const ChartMap *m, size_t head) {
    double sum = 0;
    int n = 0;
    for (size_t i = head * m->n_ctx; i < (head + 1) * m->n_ctx; i++)
        if (m->keep[i]) sum += exp(m->bias[i]), n++;
    if (n > 0) fprintf(f, "' title='each stands for %.2f pairs", sum / n);
    fputs("' data-bias='", f);
    n = 0;
    for (size_t i = head * m->n_ctx; i < (head + 1) * m->n_ctx; i++)
        if (m->keep[i]) fprintf(f, n++ ? " %.2f" : "%.2f", m->bias[i]);
}

// A column per layer, a row per kv head, in each cell the share that stays in percent.
static void map_table(FILE *f, const ChartMap *m) {
    fputs("<table><tr><th>all</th>", f);
    for (int l = 0; l < m->n_layers; l++)
        fprintf(f, "<th data-layer='%d'>%d</th>", m->layer[l], m->layer[l]);
    for (int g = 0; g < m->n_kv_heads; g++) {
        fprintf(f, "</tr>\n<tr><th>head %d</th>", g);
        for (int l = 0; l < m->n_layers; l++) {
            size_t head = (size_t)l * m->n_kv_heads + g;
            const uint8_t *keep = m->keep + head * m->n_ctx;
            int kept = 0;
            for (int i = 0; i < m->n_ctx; i++) kept += keep[i] != 0;
            double share = (double)kept / m->n_ctx;
            fprintf(f, "<td data-layer='%d' style='background:rgba(0,114,178,%.2f)' data-kept='",
                    m->layer[l], share * 0.7);
            put_bits(f, keep, m->n_ctx);
            if (m->bias) put_biases(f, m, head);
            fprintf(f, "'>%.0f</td>", share * 100);
        }
    }
    fputs("</tr></table>\n", f);
}

// An element per token; one that only begins a character shows as a dot.
static void map_text(FILE *f, const ChartMap *m) {
    TokStream stream = {0};
    char text[TOK_STREAM_MAX];
    fputs("<p>", f);
    for (int i = 0; i < m->n_ctx; i++) {
        int n = tokenizer_stream(m->tok, &stream, m->ids[i], text);
        fputs("<i>", f);
        chart_text(f, n > 0 ? text : "·", n > 0 ? (size_t)n : strlen("·"));
        fputs("</i>", f);
    }
    fputs("</p>\n", f);
}

double chart_stands_for(const ChartMap *m) {
    double sum = 0;
    size_t n = (size_t)m->n_layers * m->n_kv_heads * m->n_ctx;
    for (size_t i = 0; i < n && m->bias; i++)
        if (m->keep[i]) sum += exp(m->bias[i]);
    return m->bias && m->n_kept > 0 ? sum / m->n_kept : 1;
}

int chart_map(const ChartMap *m, const char *path, char *err) {
    NewFile out;
    if (newfile_begin(&out, path, err) != 0) return -1;
    FILE *f = out.file;
    size_t n_pairs = (size_t)m->n_layers * m->n_kv_heads * m->n_ctx;
    fputs("<!doctype html><html lang='en'><meta charset='utf-8'><title>What stays</title>\n", f);
    fprintf(f, "%s<h2>What stays of %d tokens</h2>\n<p>", map_head, m->n_ctx);
    put_name(f, m->model);
    fprintf(f, ", policy %s, level %s%s%s: %ld of %zu pairs, %.1f%%. Darker: kept by more heads. ",
            m->policy, m->level, m->fit ? ", fitted " : "", m->fit ? m->fit : "", m->n_kept,
            n_pairs, 100.0 * m->n_kept / n_pairs);
    if (m->bias)
        fprintf(f, "Each stands for %.2f pairs; line below: for more of them. ",
                chart_stands_for(m));
    fputs("Click a number, a layer (top row), a head (left) or <em>all</em>.</p>\n", f);
    map_table(f, m);
    map_text(f, m);
    fputs(map_script, f);
    fputs("</html>\n", f);
    return newfile_commit(&out, err);
}
