/* Clipped sums and norms of per-record gradients on x86-64, for native/__init__.py, which says what
 * is promised. Compiled once for AVX2 and once for AVX-512; plain C with vectors of GCC, no Python.
 *
 * What keeps a sum private is the order of its arithmetic: what the tokens of one record come to is
 * computed in float32 from zero, so it is a function of that record alone; it is rounded to whole
 * units at once; and sums of integers are exact, whatever lies beside the record. Functions round to
 * nearest and keep numbers below 2^-126, whatever the process has chosen.
 *
 * Shapes: B records of T tokens, widths D and O of a layer's input and output; in memory a token's
 * numbers lie `column` apart, tokens `row`, records `record` (all in numbers, not bytes).
 */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* To be raised, here and in __init__.py, when arguments or structures change: kernels that an earlier
 * version left behind are not used then. */
const int dpldm_layout = 1;

/* A tile of a sum: HIGH outputs times WIDE inputs. Its float32 part of a record and its integers
 * of up to HELD records stay in registers. */
#ifdef __AVX512F__
#define BYTES 64
#define VECTORS 4
#define TREE 4 /* log2(LANES) */
#else
#define BYTES 32
#define VECTORS 2
#define TREE 3
#endif
#define HIGH 3
#define LANES (BYTES / 4)
#define WIDE (VECTORS * LANES)
#define HELD 15            /* numbers of at most 2^27 + 1 that an int32 can add up */
#define CHUNK 32           /* tokens that are added before they join the others */
#define NEAR (2 * CHUNK)   /* tokens that are read again and again before the next ones */
#define RUN 8              /* vectors of a row that are added before they join the others */
#define SIDE 4             /* tokens of a tile of inner products, each way */
#define FEW_TILES 4        /* that may read inputs where they lie far apart */
#define SLICE 96           /* outputs that are worked on at a time */
#define BLOCK_BYTES 262144 /* of their gradients: they stay in the cache meanwhile */

typedef float single_v __attribute__((vector_size(BYTES)));
typedef float loose_v __attribute__((vector_size(BYTES), aligned(4))); /* at any address */
typedef int32_t index_v __attribute__((vector_size(BYTES)));
typedef double eight_v __attribute__((vector_size(64)));
typedef float eight_single_v __attribute__((vector_size(32), aligned(4)));

typedef struct {
    const float *at;
    int64_t record, row, column;
} numbers;

static unsigned begin_arithmetic(void) {
    unsigned before = _mm_getcsr();
    _mm_setcsr(0x1f80); /* round to nearest, exceptions masked, nothing flushed to zero */
    return before;
}

static int64_t multiple(int64_t count, int64_t of) { return (count + of - 1) / of * of; }

static void *buffer(int64_t count, int64_t size) {
    int64_t bytes = multiple(count * size, BYTES);
    return aligned_alloc(BYTES, bytes > 0 ? bytes : BYTES);
}

static float *zeros(int64_t count) {
    float *made = buffer(count, sizeof(float));
    if (made) memset(made, 0, count * sizeof(float));
    return made;
}

/* Of two vectors side by side: which numbers a shuffle takes. */
#ifdef __AVX512F__
static const index_v EVEN = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
static const index_v ODD = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
static const index_v LOWER = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
static const index_v UPPER = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
#else
static const index_v EVEN = {0, 2, 4, 6, 8, 10, 12, 14};
static const index_v ODD = {1, 3, 5, 7, 9, 11, 13, 15};
static const index_v LOWER = {0, 8, 1, 9, 2, 10, 3, 11};
static const index_v UPPER = {4, 12, 5, 13, 6, 14, 7, 15};
#endif

/* LANES numbers, `column` apart, of LANES tokens side by side: to rows of `width`. */
static inline void transpose(const float *from, int64_t column, int64_t width, float *to) {
    single_v line[LANES], next[LANES];
    for (int i = 0; i < LANES; i++) line[i] = *(const loose_v *)(from + i * column);
#pragma GCC unroll 4
    for (int round = 0; round < TREE; round++) {
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; i++) {
            next[2 * i] = __builtin_shuffle(line[i], line[i + LANES / 2], LOWER);
            next[2 * i + 1] = __builtin_shuffle(line[i], line[i + LANES / 2], UPPER);
        }
        memcpy(line, next, sizeof line);
    }
    for (int t = 0; t < LANES; t++) *(loose_v *)(to + t * width) = line[t];
}

/* `count` numbers of each of `rows` tokens from number `first` on, times `factor`, to rows of
 * `width`. */
static void place(const numbers *from, int64_t record, int64_t first, int64_t count, int64_t rows,
                  int64_t width, double factor, float *to) {
    const float *row = from->at + record * from->record + first * from->column;
    int64_t row_step = from->row;
    if (from->column != 1) { /* tokens side by side: a line of the cache holds several of them */
        for (int64_t t = 0; t < rows; t += LANES) {
            int64_t some = rows - t < LANES ? rows - t : LANES, i = 0;
            const float *at = row + t * from->row;
            float *out = to + t * width;
            for (; from->row == 1 && some == LANES && count - i >= LANES; i += LANES)
                transpose(at + i * from->column, from->column, width, out + i);
            for (; i < count; i++)
                for (int64_t s = 0; s < some; s++)
                    out[s * width + i] = at[s * from->row + i * from->column];
        }
        if (factor == 1.0) return;
        row = to, row_step = width;
    }
    for (int64_t t = 0; t < rows; t++, row += row_step, to += width)
        if (factor != 1.0)
            for (int64_t i = 0; i < count; i++) to[i] = (float)(factor * row[i]);
        else
            memcpy(to, row, count * sizeof(float));
}

/* The same with zeros behind. */
static void pack(const numbers *from, int64_t record, int64_t first, int64_t count, int64_t rows,
                 int64_t width, double factor, float *to) {
    place(from, record, first, count, rows, width, factor, to);
    if (count < width)
        for (int64_t t = 0; t < rows; t++)
            for (int64_t i = count; i < width; i++) to[t * width + i] = 0.0f;
}

static inline index_v rounded(single_v v) {
#ifdef __AVX512F__
    return (index_v)_mm512_cvtps_epi32((__m512)v);
#else
    return (index_v)_mm256_cvtps_epi32((__m256)v);
#endif
}

/* --- the sum over records ------------------------------------------------------------------------ */

/* A sum of whole numbers, high * 2^32 + low: exact below 2^39 - 2^31. */
typedef struct {
    int32_t *low;
    int8_t *high;
} total;

static inline total total_at(total sum, int64_t place) {
    return (total){sum.low + place, sum.high + place};
}

/* Adds numbers side by side to sums that lie `step` apart. */
static inline __attribute__((always_inline)) void add_strided(const int64_t *numbers, int64_t count,
                                                              int64_t step, total to) {
    for (int64_t i = 0; i < count; i++) {
        int64_t sum = to.low[i * step] + numbers[i];
        int32_t low = (int32_t)(uint32_t)sum;
        to.low[i * step] = low;
        to.high[i * step] += (int8_t)((sum - low) >> 32);
    }
}

static void add_whole(const int64_t *numbers, int64_t count, int64_t step, total to) {
    if (step == 1)
        add_strided(numbers, count, 1, to);
    else
        add_strided(numbers, count, step, to);
}

/* What a sum is of; see dpldm_sum. */
typedef struct {
    int64_t records, input_tokens, inputs, grad_tokens, places;
    numbers input, grad;
    const int64_t *starts;
    const int32_t *input_token, *grad_token;
    const double *factor;
    total out;
    int64_t out_place, out_row, out_column;
    total bias; /* its `low` may be null */
} task;

typedef single_v tile[HIGH][VECTORS];

/* What the pairs [p, end) come to; inputs lie x_row apart, gradients g_row. */
static inline __attribute__((always_inline)) void add_pairs(const int32_t *input_token,
                                                            const int32_t *grad_token, int64_t p,
                                                            int64_t end, const float *x,
                                                            int64_t x_row, const float *g,
                                                            int64_t g_row, tile part) {
    for (int o = 0; o < HIGH; o++)
        for (int v = 0; v < VECTORS; v++) part[o][v] = (single_v){0};
#pragma GCC unroll 4
    for (; p < end; p++) {
        const single_v *xs = (const single_v *)(x + input_token[p] * x_row);
        const float *gs = g + grad_token[p] * g_row;
        for (int o = 0; o < HIGH; o++)
            for (int v = 0; v < VECTORS; v++) part[o][v] += gs[o] * xs[v];
    }
}

static void spill(index_v held[HIGH][VECTORS], int64_t *sum) {
    int32_t number[HIGH * WIDE];
    memcpy(number, held, sizeof number);
    for (int i = 0; i < HIGH * WIDE; i++) sum[i] += number[i];
}

/* sum = a tile of `count` records, whose inputs and gradients lie in `x` and `g`, at a place with more
 * than CHUNK pairs (`many`) or fewer. */
static inline __attribute__((always_inline)) void tile_of_sum(const task *of, int many,
                                                              int64_t place, int64_t count,
                                                              const float *x, const float *g,
                                                              int64_t g_row, int64_t *sum) {
    const int64_t first = of->starts[place], pairs = of->starts[place + 1] - first;
    const int64_t x_record = of->input_tokens * WIDE, g_record = of->grad_tokens * g_row;
    const int32_t *input_token = of->input_token + first, *grad_token = of->grad_token + first;
    memset(sum, 0, HIGH * WIDE * sizeof(int64_t));
    for (int64_t b = 0; b < count;) {
        index_v held[HIGH][VECTORS];
        for (int o = 0; o < HIGH; o++)
            for (int v = 0; v < VECTORS; v++) held[o][v] = (index_v){0};
        const int64_t end = count - b < HELD ? count : b + HELD;
        for (; b < end; b++, x += x_record, g += g_record) {
            tile part, more;
            add_pairs(input_token, grad_token, 0, many ? CHUNK : pairs, x, WIDE, g, g_row, part);
            for (int64_t p = CHUNK; many && p < pairs; p += CHUNK) {
                int64_t until = pairs - p < CHUNK ? pairs : p + CHUNK;
                add_pairs(input_token, grad_token, p, until, x, WIDE, g, g_row, more);
                for (int o = 0; o < HIGH; o++)
                    for (int v = 0; v < VECTORS; v++) part[o][v] += more[o][v];
            }
            for (int o = 0; o < HIGH; o++)
                for (int v = 0; v < VECTORS; v++) held[o][v] += rounded(part[o][v]);
        }
        spill(held, sum);
    }
}

static void tile_of_few(const task *of, int64_t place, int64_t count, const float *x,
                        const float *g, int64_t g_row, int64_t *sum) {
    tile_of_sum(of, 0, place, count, x, g, g_row, sum);
}

static void tile_of_many(const task *of, int64_t place, int64_t count, const float *x,
                         const float *g, int64_t g_row, int64_t *sum) {
    tile_of_sum(of, 1, place, count, x, g, g_row, sum);
}

/* whole = the sum of `tokens` rows, at least one, in runs of CHUNK; `part` is work space. */
static void add_tokens(const float *g, int64_t tokens, int64_t row, int64_t count, float *part,
                       float *whole) {
    for (int64_t t = 0; t < tokens; t += CHUNK) {
        for (int64_t o = 0; o < count; o++) part[o] = g[t * row + o];
        for (int64_t s = t + 1; s < tokens && s < t + CHUNK; s++)
            for (int64_t o = 0; o < count; o++) part[o] += g[s * row + o];
        for (int64_t o = 0; o < count; o++) whole[o] = t ? whole[o] + part[o] : part[o];
    }
}

/* bias += the rounded sum over the tokens of one record, whose rows lie in `g`. */
static void add_bias(const float *g, int64_t tokens, int64_t g_row, int64_t count, total bias) {
    float all[SLICE], part[SLICE];
    int64_t number[SLICE];
    add_tokens(g, tokens, g_row, count, part, all);
    for (int64_t o = 0; o < count; o++) number[o] = (int64_t)nearbyintf(all[o]);
    add_whole(number, count, 1, bias);
}

/* Of every record b in [start, stop): out[b][o] = sum_t grad[b][t][o] in float32. Returns 0, or 1 if
 * memory is short. */
int dpldm_token_sums(int64_t start, int64_t stop, int64_t tokens, const numbers *grad,
                     int64_t outputs, float *out) {
    unsigned before = begin_arithmetic();
    float *g = buffer(tokens * outputs, sizeof(float)), *part = buffer(outputs, sizeof(float));
    int failed = !g || !part;
    for (int64_t b = start; b < stop && !failed; b++) {
        for (int64_t o = 0; o < outputs; o++) out[b * outputs + o] = 0.0f;
        place(grad, b, 0, outputs, tokens, outputs, 1.0, g);
        add_tokens(g, tokens, outputs, outputs, part, out + b * outputs);
    }
    free(g), free(part);
    _mm_setcsr(before);
    return failed;
}

/* For every place a, output o in [first, last) and input d:
 *     out[a][o][d] += sum_b round(sum_p factor[b] grad[b][grad_token[p]][o]
 *                                            input[b][input_token[p]][d])
 * with p over the pairs of place a, starts[a] to starts[a + 1]; and, unless `bias` is null,
 *     bias[o] += sum_b round(sum_t factor[b] grad[b][t][o]).
 * Records of factor 0 are not read. `input_tokens` and `grad_tokens` are those of a record. What is
 * rounded must stay within 2^27 + 1. Returns 0, or 1 if memory is short. */
int dpldm_sum(const task *of, int64_t first, int64_t last) {
    if (of->grad_tokens == 0 || of->input_tokens == 0) return 0;
    unsigned before = begin_arithmetic();
    int64_t most = last - first < SLICE ? last - first : SLICE;
    int64_t g_row = multiple(most, HIGH);
    int64_t block = BLOCK_BYTES / (of->grad_tokens * g_row * (int64_t)sizeof(float)) + 1;
    if (block > of->records) block = of->records;
    int64_t x_record = of->input_tokens * WIDE, g_record = of->grad_tokens * g_row;
    float *x = buffer(block * x_record, sizeof(float)), *g = buffer(block * g_record, sizeof(float));
    int64_t *live = buffer(block, sizeof(int64_t));
    int64_t sum[HIGH * WIDE] __attribute__((aligned(BYTES)));
    int failed = !x || !g || !live;
    for (int64_t slice = first; slice < last && !failed; slice += SLICE)
        for (int64_t start = 0; start < of->records; start += block) {
            int64_t stop = start + block < of->records ? start + block : of->records, count = 0;
            int64_t high = last - slice < SLICE ? last - slice : SLICE;
            for (int64_t b = start; b < stop; b++)
                if (of->factor[b] != 0.0) live[count++] = b;
            for (int64_t i = 0; i < count; i++) {
                float *g_i = g + i * g_record;
                double factor = of->factor[live[i]];
                pack(&of->grad, live[i], slice, high, of->grad_tokens, g_row, factor, g_i);
                if (of->bias.low)
                    add_bias(g_i, of->grad_tokens, g_row, high, total_at(of->bias, slice));
            }
            for (int64_t d = 0; d < of->inputs; d += WIDE) {
                int64_t wide = of->inputs - d < WIDE ? of->inputs - d : WIDE;
                for (int64_t i = 0; i < count; i++)
                    pack(&of->input, live[i], d, wide, of->input_tokens, WIDE, 1.0, x + i * x_record);
                for (int64_t a = 0; a < of->places; a++) {
                    int64_t pairs = of->starts[a + 1] - of->starts[a];
                    for (int64_t o = 0; o < high; o += HIGH) {
                        if (pairs <= CHUNK)
                            tile_of_few(of, a, count, x, g + o, g_row, sum);
                        else
                            tile_of_many(of, a, count, x, g + o, g_row, sum);
                        int64_t corner = a * of->out_place + d * of->out_column;
                        for (int64_t i = 0; i < HIGH && o + i < high; i++)
                            add_whole(sum + i * WIDE, wide, of->out_column,
                                      total_at(of->out, corner + (slice + o + i) * of->out_row));
                    }
                }
            }
        }
    free(x), free(g), free(live);
    _mm_setcsr(before);
    return failed;
}

/* whole[a][i] = what the pairs of place a come to in one record, for the outputs of tile i. A few
 * chunks at a time, of all places and outputs: their tokens stay in the nearest cache meanwhile. */
static void tiles_of_products(const task *of, int64_t tiles, const float *x, int64_t x_row,
                              const float *g, int64_t g_row, tile *whole) {
    int64_t left = 1;
    for (int64_t from = 0; left; from += NEAR) {
        left = 0;
        for (int64_t a = 0; a < of->places; a++) {
            int64_t first = of->starts[a] + from, last = of->starts[a + 1];
            if (from && first >= last) continue;
            if (last - first > NEAR) last = first + NEAR, left = 1;
            for (int64_t i = 0; i < tiles; i++) {
                tile part, *sum = whole + a * tiles + i;
                for (int64_t p = first; p == first || p < last; p += CHUNK) {
                    int64_t end = last - p < CHUNK ? last : p + CHUNK;
                    add_pairs(of->input_token, of->grad_token, p, end, x, x_row, g + i * HIGH, g_row,
                              part);
                    if (p == of->starts[a]) memset(*sum, 0, sizeof part);
                    for (int o = 0; o < HIGH; o++)
                        for (int v = 0; v < VECTORS; v++) (*sum)[o][v] += part[o][v];
                }
            }
        }
    }
}

static inline void add_squares(const float *numbers, eight_v *sum) {
    eight_v each = __builtin_convertvector(*(const eight_single_v *)numbers, eight_v);
    *sum += each * each;
}

/* Whether WIDE inputs of every token can be read where they lie: on vectors' addresses, and so close
 * that they do not drive each other from the nearest cache, unless they are read a few times only. */
static int in_place(const numbers *input, int64_t wide, int64_t tiles) {
    return input->column == 1 && wide == WIDE && (input->row == WIDE || tiles <= FEW_TILES) &&
           ((uintptr_t)input->at | input->record * sizeof(float) | input->row * sizeof(float)) %
                   BYTES == 0;
}

/* Of every record b in [start, stop):
 *     out[b][a][o][d] = sum_p grad[b][grad_token[p]][o] input[b][input_token[p]][d]
 * in float32, with the pairs of dpldm_sum, and squares[b] the sum of their squares. Of `of`, factor,
 * out and bias are not read. Returns 0, or 1 if memory is short. */
int dpldm_products(const task *of, int64_t outputs, int64_t start, int64_t stop, float *out,
                   int64_t out_record, double *squares) {
    unsigned before = begin_arithmetic();
    int64_t g_row = multiple(outputs < SLICE ? outputs : SLICE, HIGH);
    float *x = buffer(of->input_tokens * WIDE, sizeof(float));
    float *g = buffer(of->grad_tokens * g_row, sizeof(float));
    tile *whole = buffer(of->places * g_row / HIGH, sizeof(tile));
    int failed = !x || !g || !whole;
    for (int64_t b = start; b < stop && !failed; b++) {
        eight_v square = {0};
        for (int64_t slice = 0; slice < outputs; slice += SLICE) {
            int64_t high = outputs - slice < SLICE ? outputs - slice : SLICE;
            int64_t count = multiple(high, HIGH) / HIGH;
            pack(&of->grad, b, slice, high, of->grad_tokens, g_row, 1.0, g);
            for (int64_t d = 0; d < of->inputs; d += WIDE) {
                int64_t wide = of->inputs - d < WIDE ? of->inputs - d : WIDE, x_row = WIDE;
                const float *from = x;
                if (in_place(&of->input, wide, count)) {
                    from = of->input.at + b * of->input.record + d, x_row = of->input.row;
                } else {
                    pack(&of->input, b, d, wide, of->input_tokens, WIDE, 1.0, x);
                }
                tiles_of_products(of, count, from, x_row, g, g_row, whole);
                for (int64_t a = 0; a < of->places; a++)
                    for (int64_t o = 0; o < high; o += HIGH) {
                        float number[HIGH * WIDE]; /* zeros beyond the last output and input */
                        memcpy(number, whole[a * count + o / HIGH], sizeof number);
                        for (int64_t i = 0; i < HIGH * WIDE; i += 8) add_squares(number + i, &square);
                        float *to = out + b * out_record + a * of->out_place +
                                    (slice + o) * of->out_row + d * of->out_column;
                        for (int64_t i = 0; i < HIGH && o + i < high; i++, to += of->out_row)
                            if (of->out_column == 1)
                                memcpy(to, number + i * WIDE, wide * sizeof(float));
                            else
                                for (int64_t j = 0; j < wide; j++)
                                    to[j * of->out_column] = number[i * WIDE + j];
                    }
            }
        }
        squares[b] = 0.0;
        for (int i = 0; i < 8; i++) squares[b] += square[i];
    }
    free(x), free(g), free(whole);
    _mm_setcsr(before);
    return failed;
}

/* out[i] += sum_b round(factor[b] rows[b][i]) for i in [first, last); rows are `width` apart.
 * What is rounded must stay within 2^27 + 1. */
void dpldm_rows(int64_t records, const float *rows, int64_t width, const double *factor,
                const total *out, int64_t first, int64_t last) {
    unsigned before = begin_arithmetic();
    int32_t held[4 * WIDE];
    int64_t sum[4 * WIDE];
    for (int64_t from = first; from < last; from += 4 * WIDE) {
        int64_t count = last - from < 4 * WIDE ? last - from : 4 * WIDE;
        memset(sum, 0, sizeof sum);
        for (int64_t b = 0; b < records;) {
            int64_t end = records - b < HELD ? records : b + HELD;
            memset(held, 0, sizeof held);
            for (; b < end; b++) {
                if (factor[b] == 0.0) continue;
                const float *row = rows + b * width + from;
                for (int64_t i = 0; i < count; i++)
                    held[i] += (int32_t)nearbyintf((float)(factor[b] * row[i]));
            }
            for (int64_t i = 0; i < count; i++) sum[i] += held[i];
        }
        add_whole(sum, count, 1, total_at(*out, from));
    }
    _mm_setcsr(before);
}

/* Roundings in float32 behind what `pairs` tokens of a record come to, at most: of their factors,
 * of a chunk's sums, and of the sum of chunks. */
int64_t dpldm_sum_roundings(int64_t pairs) {
    return 2 + (pairs < CHUNK ? pairs : CHUNK) + pairs / CHUNK;
}

/* --- norms from inner products ------------------------------------------------------------------ */

static inline single_v neighbours(single_v a, single_v b) {
    return __builtin_shuffle(a, b, EVEN) + __builtin_shuffle(a, b, ODD);
}

typedef single_v square_of_v[SIDE * SIDE];

static inline __attribute__((always_inline)) void multiply_rows(const float *left, const float *right,
                                                                int64_t row, int64_t vectors,
                                                                square_of_v part) {
    for (int i = 0; i < SIDE * SIDE; i++) part[i] = (single_v){0};
    for (int64_t v = 0; v < vectors; v++) {
        single_v l[SIDE], r[SIDE];
        for (int i = 0; i < SIDE; i++) {
            l[i] = *(const loose_v *)(left + i * row + v * LANES);
            r[i] = *(const loose_v *)(right + i * row + v * LANES);
        }
        for (int i = 0; i < SIDE; i++)
            for (int j = 0; j < SIDE; j++) part[i * SIDE + j] += l[i] * r[j];
    }
}

static inline __attribute__((always_inline)) void add_lanes(square_of_v part, float *products) {
#pragma GCC unroll 8
    for (int width = SIDE * SIDE; width > SIDE * SIDE >> TREE; width /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < width / 2; i++) part[i] = neighbours(part[2 * i], part[2 * i + 1]);
    memcpy(products, part, SIDE * SIDE * sizeof(float));
}

/* Inner products of SIDE rows with SIDE others, of `vectors` vectors each. */
static void tile_of_products(const float *left, const float *right, int64_t row, int64_t vectors,
                             float products[SIDE * SIDE]) {
    square_of_v part, whole;
    if (vectors <= RUN) {
        multiply_rows(left, right, row, vectors, part);
        add_lanes(part, products);
        return;
    }
    multiply_rows(left, right, row, RUN, whole);
    for (int64_t v = RUN; v < vectors; v += RUN) {
        int64_t count = vectors - v < RUN ? vectors - v : RUN;
        multiply_rows(left + v * LANES, right + v * LANES, row, count, part);
        for (int i = 0; i < SIDE * SIDE; i++) whole[i] += part[i];
    }
    add_lanes(whole, products);
}

/* Roundings in float32 behind an inner product of `width` numbers, at most. */
int64_t dpldm_product_roundings(int64_t width) {
    int64_t vectors = multiple(width, LANES) / LANES;
    return (vectors < RUN ? vectors : RUN) + (vectors - 1) / RUN + TREE;
}

/* All inner products of `tokens` rows, a multiple of SIDE, below and on the diagonal. */
static void inner_products(const float *x, int64_t row, int64_t tokens, int64_t vectors,
                           float *products) {
    float tile[SIDE * SIDE];
    for (int64_t s = 0; s < tokens; s += SIDE)
        for (int64_t t = 0; t <= s; t += SIDE) {
            tile_of_products(x + s * row, x + t * row, row, vectors, tile);
            for (int i = 0; i < SIDE; i++)
                memcpy(products + (s + i) * tokens + t, tile + i * SIDE, SIDE * sizeof(float));
        }
}

/* Those of one record, which is copied to `rows` unless it lies in memory as it should. */
static void own_products(const numbers *from, int64_t record, int64_t count, int64_t tokens,
                         int64_t all, int64_t width, float *rows, float *products) {
    if (from->column == 1 && count == width && tokens == all) {
        inner_products(from->at + record * from->record, from->row, all, width / LANES, products);
        return;
    }
    place(from, record, 0, count, tokens, width, 1.0, rows);
    inner_products(rows, width, all, width / LANES, products);
}

/* length[p] = how many pairs from p on follow each other on both sides, within a place. */
static void find_runs(int64_t places, const int64_t *starts, const int32_t *input_token,
                      const int32_t *grad_token, int32_t *length) {
    for (int64_t a = 0; a < places; a++)
        for (int64_t p = starts[a + 1] - 1; p >= starts[a]; p--) {
            int joined = p + 1 < starts[a + 1] && input_token[p + 1] == input_token[p] + 1 &&
                         grad_token[p + 1] == grad_token[p] + 1;
            length[p] = joined ? length[p + 1] + 1 : 1;
        }
}

static inline void add_run(float *to, const float *from, int64_t count) {
    if (count == 1) {
        *to += *from;
        return;
    }
    for (; count >= LANES; count -= LANES, to += LANES, from += LANES)
        *(loose_v *)to += *(const loose_v *)from;
#ifdef __AVX512F__
    __mmask16 kept = (__mmask16)((1u << count) - 1);
    __m512 sum = _mm512_add_ps(_mm512_maskz_loadu_ps(kept, to), _mm512_maskz_loadu_ps(kept, from));
    _mm512_mask_storeu_ps(to, kept, sum);
#else
    static const int32_t first[2 * LANES] = {-1, -1, -1, -1, -1, -1, -1, -1};
    __m256i kept = _mm256_loadu_si256((const __m256i *)(first + LANES - count));
    __m256 sum = _mm256_add_ps(_mm256_maskload_ps(to, kept), _mm256_maskload_ps(from, kept));
    _mm256_maskstore_ps(to, kept, sum);
#endif
}

/* Inner products of patches, from those of pixels: below the diagonal and on it, where pixels ascend
 * with the patches that see them. A run may go on beyond the diagonal: nobody reads that. `length` is
 * that of find_runs. */
static void through_window(const float *pixels, int64_t row, int64_t places, const int64_t *starts,
                           const int32_t *input_token, const int32_t *grad_token,
                           const int32_t *length, int64_t all, float *products) {
    memset(products, 0, all * all * sizeof(float));
    for (int64_t a = 0; a < places; a++)
        for (int64_t p = starts[a]; p < starts[a + 1]; p++) {
            const float *from = pixels + input_token[p] * row;
            float *to = products + grad_token[p] * all;
            for (int64_t q = starts[a]; q <= p; q += length[q])
                add_run(to + grad_token[q], from + input_token[q], length[q]);
        }
    for (int64_t s = 0; s < all; s++) /* tiles on the diagonal are whole */
        for (int64_t t = s / SIDE * SIDE; t < s; t++) products[t * all + s] = products[s * all + t];
}

typedef float four_v __attribute__((vector_size(16), aligned(4)));
typedef double four_double_v __attribute__((vector_size(32)));

/* sum_st G_st (A_st + bias): twice what lies below the tiles on the diagonal, and those. */
static double sum_of_products(const float *gg, const float *xx, int64_t all, int bias) {
    four_double_v below = {0}, diagonal = {0};
    for (int64_t s = 0; s < all; s++) {
        const float *g = gg + s * all, *x = xx + s * all;
        int64_t tile = s / SIDE * SIDE;
        for (int64_t t = 0; t < tile; t += SIDE)
            below += __builtin_convertvector(*(const four_v *)(g + t), four_double_v) *
                     (__builtin_convertvector(*(const four_v *)(x + t), four_double_v) + bias);
        diagonal += __builtin_convertvector(*(const four_v *)(g + tile), four_double_v) *
                    (__builtin_convertvector(*(const four_v *)(x + tile), four_double_v) + bias);
    }
    below = below + below + diagonal;
    return below[0] + below[1] + below[2] + below[3];
}

/* Of every record b in [start, stop), with G and A the inner products of its output gradients and
 * of its inputs, plus one where the layer has a bias:
 *     squares[0][b] = sum_st G_st A_st,   squares[1][b] = gamma bound^2,   squares[2][b] = bound^2,
 *     squares[3][b] = own^2 bound^2,      bound = sum_t sqrt((G_tt + floor) (A_tt + floor))
 * `given` holds A, (B, T, T), where it is known. With `places`, an input of A is what the places of a
 * window show of `input_tokens` pixels, in the pairs of dpldm_sum. Returns 0, or 1 if memory is
 * short. */
int dpldm_norms(int64_t start, int64_t stop, int64_t tokens, const numbers *grad, int64_t outputs,
                int64_t input_tokens, const numbers *input, int64_t inputs, const float *given,
                int64_t places, const int64_t *starts, const int32_t *input_token,
                const int32_t *grad_token, int bias, double floor, double gamma, double own,
                int64_t records, double *squares) {
    unsigned before = begin_arithmetic();
    int64_t all = multiple(tokens, SIDE), all_inputs = multiple(input_tokens, SIDE);
    int64_t width = multiple(outputs, LANES), input_width = multiple(inputs, LANES);
    float *g = zeros(all * width), *x = zeros(all_inputs * input_width);
    float *gg = zeros(all * all), *xx = zeros(all * all);
    float *pixels = places ? zeros(all_inputs * all_inputs) : 0;
    int32_t *length = places ? buffer(starts[places], sizeof(int32_t)) : 0;
    int failed = !g || !x || !gg || !xx || (places && (!pixels || !length));
    if (length) find_runs(places, starts, input_token, grad_token, length);
    for (int64_t b = start; b < stop && !failed; b++) {
        own_products(grad, b, outputs, tokens, all, width, g, gg);
        if (!given)
            own_products(input, b, inputs, input_tokens, all_inputs, input_width, x,
                         places ? pixels : xx);
        if (places)
            through_window(pixels, all_inputs, places, starts, input_token, grad_token, length, all,
                           xx);
        for (int64_t t = 0; given && t < tokens; t++)
            memcpy(xx + t * all, given + (b * tokens + t) * tokens, tokens * sizeof(float));
        squares[b] = sum_of_products(gg, xx, all, bias);
        double bound = 0.0;
        for (int64_t t = 0; t < tokens; t++) {
            double input_square = xx[t * all + t] + (double)bias;
            bound += sqrt((gg[t * all + t] + floor) * (input_square + floor));
        }
        squares[records + b] = gamma * bound * bound;
        squares[2 * records + b] = bound * bound;
        squares[3 * records + b] = own * own * bound * bound;
    }
    free(g), free(x), free(gg), free(xx), free(pixels), free(length);
    _mm_setcsr(before);
    return failed;
}

/* --- scale and shift of a norm ------------------------------------------------------------------ */

/* Adds to `scale` and `shift`, which have one number for every `each` of `count`, the sums of
 * gradient times normalised input, and of gradient, over `count` numbers side by side. */
static void add_normalised(const float *x, const float *g, int64_t count, int64_t each, float eps,
                           float *scale, float *shift) {
    float sum = 0.0f, square = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; i++) sum += x[i];
    const float mean = sum / (float)count;
#pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < count; i++) square += (x[i] - mean) * (x[i] - mean);
    const float inverse = 1.0f / sqrtf(square / (float)count + eps);
    if (each == 1) {
        for (int64_t i = 0; i < count; i++) scale[i] += g[i] * ((x[i] - mean) * inverse);
        for (int64_t i = 0; i < count; i++) shift[i] += g[i];
        return;
    }
    for (int64_t c = 0; c < count / each; c++, x += each, g += each) {
        float of_scale = 0.0f, of_shift = 0.0f;
#pragma omp simd reduction(+ : of_scale, of_shift)
        for (int64_t i = 0; i < each; i++) {
            of_scale += g[i] * (x[i] - mean);
            of_shift += g[i];
        }
        scale[c] += of_scale * inverse;
        shift[c] += of_shift;
    }
}

/* One row's numbers side by side: where they lie, or copied to `copy`. */
static const float *side_by_side(const numbers *from, int64_t row, int64_t channels, int64_t each,
                                 float *copy) {
    if (from->row == each && (from->column == 1 || each == 1)) return from->at + row * from->record;
    place(from, row, 0, each, channels, each, 1.0, copy);
    return copy;
}

/* Gradients of every record in [start, stop) with respect to scale and shift of a norm, (B, C)
 * each; `rows` rows of a record have C `channels` (`row` apart) of `each` numbers (`column` apart),
 * normalised in `groups` of channels. Returns 0, or 1 if memory is short. */
int dpldm_norm_products(int64_t start, int64_t stop, int64_t rows, int64_t groups,
                        int64_t channels, int64_t each, const numbers *input, const numbers *grad,
                        float eps, float *scale, float *shift) {
    unsigned before = begin_arithmetic();
    const int64_t wide = channels / groups;
    float *x_copy = buffer(channels * each, sizeof(float));
    float *g_copy = buffer(channels * each, sizeof(float));
    int failed = !x_copy || !g_copy;
    for (int64_t b = start; b < stop && !failed; b++) {
        float *to_scale = scale + b * channels, *to_shift = shift + b * channels;
        memset(to_scale, 0, channels * sizeof(float));
        memset(to_shift, 0, channels * sizeof(float));
        for (int64_t r = b * rows; r < (b + 1) * rows; r++) {
            const float *x = side_by_side(input, r, channels, each, x_copy);
            const float *g = side_by_side(grad, r, channels, each, g_copy);
            for (int64_t c = 0; c < channels; c += wide)
                add_normalised(x + c * each, g + c * each, wide * each, each, eps, to_scale + c,
                               to_shift + c);
        }
    }
    free(x_copy), free(g_copy);
    _mm_setcsr(before);
    return failed;
}
