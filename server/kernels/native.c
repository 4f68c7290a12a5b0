/*
 * CPU kernels of the server.
 *
 * The file includes itself once per instruction set (AVX-512 with and without products of bfloat16 pairs, AVX2, generic
 * = SSE2, NEON or plain C); the pass without LORAPLEX_ISA holds the shared types and, after the passes with it, the
 * choice made at load time and the exported functions.
 *
 * Batch invariance: an output row has the same bits whatever other rows share its call. Every output element is reduced
 * in one order that depends on its own row only: input features (or ranks, or keys) ascending, in a fixed number of
 * accumulator chains, FMA at every step where the instruction set has it. Row blocks, column blocks and threads only
 * choose which elements are worked on together. Different instruction sets may differ from each other.
 *
 * Activations are float32; where the processor multiplies pairs of bfloat16 (PAIRS), a linear layer with bfloat16
 * weights rounds its x to bfloat16 and sums in float32. `rows`, `stride` and friends count elements, not bytes.
 */
#ifndef LORAPLEX_ISA

#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

enum { F32, BF16, F16, I8, BF16X2 }; /* element types of weights and caches; BF16X2: bfloat16 of two input features */

/*
 * A frozen linear layer, W [out, in], packed as [ceil(out / 16)][in][16] with zeros past `out`; bfloat16 as
 * [ceil(out / 16)][ceil(in / 2)][16][2] with zeros past `in`. scale (int8: W = data * scale) and bias hold
 * ceil(out / 16) * 16 floats, or are NULL.
 */
typedef struct {
    const void *data;
    const float *scale;
    const float *bias;
    int64_t in;
    int64_t out;
    int64_t kind;
} packed_linear;

/*
 * The adapter slots of one linear layer: A [rank, in], B transposed [rank, out], and what the layer's output is
 * multiplied by and gets added at the end, gain [out] and bias [out], either may be NULL. An empty slot has rank 0 and
 * neither.
 */
typedef struct {
    const void *const *a;
    const void *const *b;
    const float *const *gains;
    const float *const *biases;
    const int64_t *ranks;
    const int64_t *kinds;
    const float *scalings;
    int64_t in;
    int64_t out;
} lora_slots;

/* Rows [start, end) of a batch use the adapter in `slot`, its bypass times `scale`. */
typedef struct {
    int64_t slot;
    int64_t start;
    int64_t end;
    float scale;
} lora_segment;

/* The segments of a pass are disjoint; a row takes one bypass of each pass. */
typedef struct {
    int64_t num_segments;
    const lora_segment *segments;
} lora_pass;

typedef struct {
    int64_t count;
    const lora_pass *passes;
} lora_passes;

/* Memory that will be read soon, which arithmetic may bring closer meanwhile. */
typedef struct {
    const char *data;
    int64_t bytes;
} region;

/* Layers that read the same x, with their slots; row t of output i begins at t * y_strides[i]. */
typedef struct {
    int64_t count;
    const packed_linear *const *weights;
    const lora_slots *const *slots;
    const int64_t *y_strides;
} linear_group;

/*
 * One layer of the KV cache in blocks of 16 positions: keys [num_blocks, kv_heads, head_dim, 16], values
 * [num_blocks, kv_heads, 16, value_dim] with value_dim = head_dim rounded up to 16 and zeros past head_dim.
 */
typedef struct {
    void *keys;
    void *values;
    int64_t kind;
    int64_t kv_heads;
    int64_t head_dim;
} kv_layer;

typedef struct {
    int64_t heads;
    int64_t sliding_window; /* 0: none */
    const float *sinks;     /* [heads] or NULL */
    float scaling;
    float softcap; /* 0: none */
} attention_options;

/* The step's tokens: those of sequence s are rows query_start_loc[s] .. query_start_loc[s + 1] - 1. */
typedef struct {
    int64_t num_seqs;
    int64_t max_blocks;
    const int32_t *block_tables;    /* [num_seqs, max_blocks] */
    const int32_t *query_start_loc; /* [num_seqs + 1] */
    const int64_t *positions;       /* [num_tokens] */
} attention_batch;

/*
 * An adapter's bypass of one layer over rows [row0, row1): the shrink writes h [rows, rank], which carries the scaling,
 * and the expand reads it.
 */
typedef struct {
    const lora_slots *layer;
    int64_t slot;
    int64_t row0;
    int64_t row1;
    float scaling;
    float *h;
} bypass;

/* Pair i of a head is turned by entry i * step of a row of cos and sin. */
typedef struct {
    int64_t head_dim;
    int64_t rotary_dim;  /* elements of a head that are turned, its first */
    int64_t width;       /* of the rows of cos and sin */
    int64_t step;        /* other than 1 only where interleaved */
    int64_t interleaved; /* a pair is elements 2i and 2i + 1, and not i and i + rotary_dim / 2 */
} rotary_layout;

/* The softmax of one query row over some of its keys: the largest score, and the sum of weights relative to it. */
typedef struct {
    float max;
    float denominator;
} row_softmax;

/* Query rows of a sequence and KV head over parts [part0, part1) of the keys. */
typedef struct {
    int32_t seq, kv_head, row0, row1;
    int64_t part0, part1;
    int64_t later;     /* tasks after this one, with the later parts; -1: this is one of them */
    row_softmax *rows; /* what the rows come to, where several tasks share the keys; otherwise NULL */
    float *sums;       /* [rows, value_dim], their weighted values */
} attention_task;

enum { SILU, GELU_TANH, GELU, RELU, RELU_SQUARED, CLAMPED_SILU, SIGMOID };

enum {
    PANEL = 16,         /* output columns of a packed panel */
    SLIVER = 256,       /* input features worked on at a time: 16 kB of float32 panel stay in the L1 cache */
    AHEAD_BYTES = 4096, /* distance of the prefetch in a plain stream of weights */
    GROUP_ROWS = 192,   /* rows that share one pass over a panel: 192 x 256 floats stay in the L2 cache */
    SLAB_ROWS = 768,    /* rows packed at a time: bounds the scratch memory of a long prefill */
    GROUP_PANELS = 8,   /* panels a task works on when there are several row groups */
    BLOCK = 16,         /* positions of a KV block */
    SPAN = 64,          /* keys of one online softmax update; spans start at multiples of 64 positions */
    SPAN_BLOCKS = SPAN / BLOCK,
    PART = 1024, /* keys whose sums begin at nothing; the parts of a long context are joined in their order */
    MAX_HEAD_DIM = 256,
    TILE_ROWS = 6,         /* query rows (token, head) of a register tile */
    TASK_ROWS = 48,        /* query rows that share one pass over the cache */
    FUSED_ROWS = 128,      /* rows from which on a panel's output takes its bypasses at once */
    BAND_BLOCKS = 4,       /* row blocks that are then packed and shrunk together */
    EXPAND_ROWS = 8,       /* rows of an expand otherwise, */
    EXPAND_COLUMNS = 1024, /* and its columns: factors are read in long runs, */
    NARROW_COLUMNS = 128,  /* or by all cores when there are no other rows */
    MAX_REGIONS = 1024,    /* regions that are brought closer during a call */
    LINE = 64,             /* bytes of a cache line */
    SMALL = 16384          /* elements below which a thread is not worth waking */
};

#define INLINE static inline __attribute__((always_inline))
#define EACH(i, n) _Pragma("GCC unroll 32") for (int i = 0; i < (n); i++) /* unrolled: n is a constant once inlined */
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define CEIL_DIV(a, b) (((a) + (b) - 1) / (b))

/* A buffer of the calling thread that grows and stays: a step's calls come from one long-lived engine thread. */
static _Thread_local struct {
    void *data;
    size_t bytes;
} scratch_buffer;

static void *scratch(size_t bytes) {
    if (bytes >= scratch_buffer.bytes) {
        free(scratch_buffer.data);
        bytes = (bytes / 4096 + 1) * 4096;
        scratch_buffer.data = aligned_alloc(64, bytes);
        scratch_buffer.bytes = scratch_buffer.data ? bytes : 0;
    }
    return scratch_buffer.data;
}

INLINE long kind_bytes(int kind) { return kind == F32 ? 4 : kind == I8 ? 1 : 2; }
INLINE long row_features(int kind) { return kind == BF16X2 ? 2 : 1; } /* input features of a packed row */
INLINE long row_bytes(int kind) { return PANEL * kind_bytes(kind) * row_features(kind); }

/* Piece `i` of `n` nearly equal pieces of `total` starts here. */
INLINE long part(long total, long n, long i) { return total * i / n; }

typedef struct {
    long rows;  /* query rows of the sequence for each KV head */
    long first; /* part with keys that one of them attends to */
    long count; /* parts from there to the last */
    long tasks; /* that share them */
} key_parts;

/* How the keys of a sequence are shared. Where its rows are many there are tasks enough. */
static key_parts parts_of(const attention_options *o, const attention_batch *batch, long seq, long group) {
    const long token0 = batch->query_start_loc[seq], token1 = batch->query_start_loc[seq + 1];
    if (token0 == token1)
        return (key_parts){0, 0, 0, 0};
    const long low = o->sliding_window > 0 ? MAX(0, batch->positions[token0] + 1 - o->sliding_window) : 0;
    const long first = low / PART, count = batch->positions[token1 - 1] / PART + 1 - first;
    const long rows = (token1 - token0) * group;
    return (key_parts){rows, first, count, rows <= TASK_ROWS ? count : 1};
}

/* A walk over regions that lie one after the other in a list: `left` bytes from `offset` in `at` on. */
typedef struct {
    const region *at;
    long offset;
    long left;
} region_walk;

/* The walk over bytes [start, end) of a list of regions. */
INLINE region_walk walk_regions(const region *regions, long start, long end) {
    const long left = end - start;
    while (left > 0 && start >= regions->bytes)
        start -= regions++->bytes;
    return (region_walk){regions, start, left};
}

/* The next up to *bytes of a walk, which is not at its end, that lie together; *bytes becomes their number. */
INLINE const char *next_bytes(region_walk *walk, long *bytes) {
    const char *data = walk->at->data + walk->offset;
    *bytes = MIN(*bytes, MIN(walk->left, walk->at->bytes - walk->offset));
    walk->left -= *bytes;
    walk->offset += *bytes;
    if (walk->offset == walk->at->bytes) {
        walk->at++;
        walk->offset = 0;
    }
    return data;
}

/* The functions an instruction set provides. */
typedef struct {
    int (*linear)(const float *, long, const linear_group *, const lora_passes *, float *const *);
    void (*add_embedding_lora)(const int64_t *, const lora_slots *, float *, long, const lora_segment *);
    int (*attention)(const kv_layer *, const attention_options *, const attention_batch *, const float *, long, float *,
                     long);
    void (*write_kv)(const kv_layer *, const float *, long, const float *, long, const int64_t *, long);
    void (*rms_norm)(const float *, float *, const float *, float, float *, long, long);
    void (*layer_norm)(const float *, float *, const float *, const float *, long, float, float *, long, long);
    void (*rotary)(const rotary_layout *, float *, long, long, float *, long, long, const float *, const float *, long);
    void (*activation)(int, const float *, long, const float *, long, float *, long, long);
    void (*add)(const float *, float *, float, long, long);
} kernel_set;

/*
 * Register tiles, by the lanes of a vector: 32 registers of 16 lanes, 16 of 8 lanes, 16 or 32 of 4 lanes. Accumulators
 * take what is left beside one row of weights and a broadcast.
 */
#define VECTORS (PANEL / LANES)                                                  /* of a panel row */
#define MAX_ROWS (LANES == 16 ? 16 : 6)                                          /* of a linear tile of one panel */
#define WIDE_PANELS(rows) ((rows) == 1 ? 4 : (rows) <= 3 ? 2 : 1)                /* of a linear tile with few rows */
#define SHRINK_ROWS (LANES == 8 ? 3 : 6)                                         /* of a LoRA tile of four ranks */
#define EXPAND_PANELS (LANES == 16 ? 2 : 1)                                      /* of a LoRA tile of six rows */
#define SPAN_PANELS(rows) (LANES == 16 ? 4 : LANES == 8 ? WIDE_PANELS(rows) : 1) /* key blocks or value columns */

#define PASTE_(name, isa) name##_##isa
#define PASTE(name, isa) PASTE_(name, isa)
#define FN(name) PASTE(name, LORAPLEX_ISA)

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define X86_DISPATCH 1
#pragma GCC diagnostic ignored "-Wpsabi"

#if __GNUC__ >= 10
#define X86_PAIRS 1
#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#define LORAPLEX_ISA avx512_bf16
#define LANES 16
#define PAIRS 1
#include "native.c"
#undef LORAPLEX_ISA
#undef LANES
#undef PAIRS
#pragma GCC pop_options
#endif

#define PAIRS 0
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#define LORAPLEX_ISA avx512
#define LANES 16
#include "native.c"
#undef LORAPLEX_ISA
#undef LANES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define LORAPLEX_ISA avx2
#define LANES 8
#include "native.c"
#undef LORAPLEX_ISA
#undef LANES
#pragma GCC pop_options
#endif

#undef PAIRS
#define PAIRS 0
#define LORAPLEX_ISA generic
#define LANES 4
#include "native.c"
#undef LORAPLEX_ISA
#undef LANES

/* -------------------------------------------------------------------------------------------- exported functions */

static const struct {
    const char *name;
    const kernel_set *kernels;
} sets[] = {
#ifdef X86_PAIRS
    {"avx512_bf16", &kernels_avx512_bf16},
#endif
#ifdef X86_DISPATCH
    {"avx512", &kernels_avx512},
    {"avx2", &kernels_avx2},
#endif
    {"generic", &kernels_generic},
};

static int chosen;

static int supported(const char *name) {
#ifdef X86_DISPATCH
    __builtin_cpu_init();
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (!strcmp(name, "avx2"))
        return avx2;
    const int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (!strcmp(name, "avx512"))
        return avx512;
#endif
#ifdef X86_PAIRS
    if (!strcmp(name, "avx512_bf16"))
        return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
    return !strcmp(name, "generic");
}

/* Takes the widest instruction set of this processor, or the named one; 0 on success, -1 if it cannot run here. */
int loraplex_set_isa(const char *name) {
    for (int i = 0; i < (int)(sizeof sets / sizeof *sets); i++)
        if ((name == NULL || !strcmp(name, sets[i].name)) && supported(sets[i].name)) {
            chosen = i;
            return 0;
        }
    return -1;
}

const int loraplex_abi = 3; /* counts up with structs, kinds and exported functions, beside _ABI in native.py */

const char *loraplex_isa(void) { return sets[chosen].name; }

__attribute__((constructor)) static void choose_isa(void) { loraplex_set_isa(NULL); }

int loraplex_linear_group(const float *x, int64_t rows, const linear_group *group, const lora_passes *passes,
                          float *const *ys) {
    return sets[chosen].kernels->linear(x, rows, group, passes, ys);
}

void loraplex_add_embedding_lora(const int64_t *ids, const lora_slots *slots, float *y, int64_t num_segments,
                                 const lora_segment *segments) {
    sets[chosen].kernels->add_embedding_lora(ids, slots, y, num_segments, segments);
}

int loraplex_attention(const kv_layer *cache, const attention_options *options, const attention_batch *batch,
                       const float *q, int64_t q_stride, float *out, int64_t out_stride) {
    return sets[chosen].kernels->attention(cache, options, batch, q, q_stride, out, out_stride);
}

void loraplex_write_kv(const kv_layer *cache, const float *k, int64_t k_stride, const float *v, int64_t v_stride,
                       const int64_t *slot_mapping, int64_t num_tokens) {
    sets[chosen].kernels->write_kv(cache, k, k_stride, v, v_stride, slot_mapping, num_tokens);
}

void loraplex_rms_norm(const float *x, float *residual, const float *weight, float eps, float *out, int64_t rows,
                       int64_t n) {
    sets[chosen].kernels->rms_norm(x, residual, weight, eps, out, rows, n);
}

void loraplex_layer_norm(const float *x, float *residual, const float *weight, const float *bias, int64_t weight_rows,
                         float eps, float *out, int64_t rows, int64_t n) {
    sets[chosen].kernels->layer_norm(x, residual, weight, bias, weight_rows, eps, out, rows, n);
}

void loraplex_rotary(const rotary_layout *layout, float *q, int64_t q_stride, int64_t heads, float *k, int64_t k_stride,
                     int64_t kv_heads, const float *cos, const float *sin, int64_t num_tokens) {
    sets[chosen].kernels->rotary(layout, q, q_stride, heads, k, k_stride, kv_heads, cos, sin, num_tokens);
}

/* x [rows, heads, 3, head_dim], what each head's q, k and v are, to out [rows, 3, heads, head_dim]. */
void loraplex_split_heads(const float *x, float *out, int64_t heads, int64_t head_dim, int64_t rows) {
    const size_t bytes = head_dim * sizeof *x;
#pragma omp parallel for schedule(static) if (rows * heads * head_dim > SMALL)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < 3 * heads; i++)
            memcpy(out + (row * 3 * heads + i % 3 * heads + i / 3) * head_dim, x + (row * 3 * heads + i) * head_dim,
                   bytes);
}

void loraplex_activation(int64_t kind, const float *x, int64_t x_stride, const float *up, int64_t up_stride, float *out,
                         int64_t rows, int64_t n) {
    sets[chosen].kernels->activation(kind, x, x_stride, up, up_stride, out, rows, n);
}

/* y += factor * x, both [rows, n] and contiguous. */
void loraplex_add(const float *x, float *y, float factor, int64_t rows, int64_t n) {
    sets[chosen].kernels->add(x, y, factor, rows, n);
}

/* ------------------------------------------------------------------------------------------------ recorded calls */

/* A word of a recorded call: inputs[source] (or 0 where source is negative) + fixed + per_row * rows. */
typedef struct {
    int64_t source;
    int64_t fixed;
    int64_t per_row;
} recorded_word;

enum { MAX_WORDS = 16 };

typedef struct {
    int64_t function; /* its place in `recordable` */
    int64_t num_words;
    recorded_word words[MAX_WORDS];
} recorded_call;

/* In the order of the cases of `call`. */
static const char *const recordable[] = {"linear_group", "attention",   "write_kv",   "rms_norm", "layer_norm",
                                         "rotary",       "split_heads", "activation", "add"};

/* The place of a function among those that can be recorded, or -1. */
int64_t loraplex_recordable(const char *name) {
    for (int i = 0; i < (int)(sizeof recordable / sizeof *recordable); i++)
        if (!strcmp(name, recordable[i]))
            return i;
    return -1;
}

/* The float whose bits are the low half of a word. */
INLINE float as_float(int64_t word) {
    const uint32_t bits = (uint32_t)word;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

#define P(i) ((void *)w[i])

/* The words of `linear_group` end with the addresses of its outputs. */
static int call(int64_t function, const int64_t *w) {
    switch (function) {
    case 0: return loraplex_linear_group(P(0), w[1], P(2), P(3), (float *const *)(w + 4));
    case 1: return loraplex_attention(P(0), P(1), P(2), P(3), w[4], P(5), w[6]);
    case 2: loraplex_write_kv(P(0), P(1), w[2], P(3), w[4], P(5), w[6]); return 0;
    case 3: loraplex_rms_norm(P(0), P(1), P(2), as_float(w[3]), P(4), w[5], w[6]); return 0;
    case 4: loraplex_layer_norm(P(0), P(1), P(2), P(3), w[4], as_float(w[5]), P(6), w[7], w[8]); return 0;
    case 5: loraplex_rotary(P(0), P(1), w[2], w[3], P(4), w[5], w[6], P(7), P(8), w[9]); return 0;
    case 6: loraplex_split_heads(P(0), P(1), w[2], w[3], w[4]); return 0;
    case 7: loraplex_activation(w[0], P(1), w[2], P(3), w[4], P(5), w[6], w[7]); return 0;
    default: loraplex_add(P(0), P(1), as_float(w[2]), w[3], w[4]); return 0;
    }
}

#undef P

/* Makes recorded calls once more, for so many rows; -1 if one lacks scratch memory. */
int loraplex_replay(const recorded_call *calls, int64_t count, const int64_t *inputs, int64_t rows) {
    for (int64_t i = 0; i < count; i++) {
        int64_t words[MAX_WORDS];
        for (int64_t j = 0; j < calls[i].num_words; j++) {
            const recorded_word word = calls[i].words[j];
            words[j] = (word.source < 0 ? 0 : inputs[word.source]) + word.fixed + word.per_row * rows;
        }
        if (call(calls[i].function, words))
            return -1;
    }
    return 0;
}

#else /* LORAPLEX_ISA: everything below is compiled once per instruction set */

#define vfloat FN(vfloat)
#define vint FN(vint)
#define vfloat_u FN(vfloat_u)

typedef float vfloat __attribute__((vector_size(LANES * 4)));
typedef int32_t vint __attribute__((vector_size(LANES * 4)));
typedef float vfloat_u __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

/* --------------------------------------------------------------------------------------------- vector primitives */

#define load FN(load)
#define store FN(store)
#define splat FN(splat)
#define fma FN(fma)
#define vmax FN(vmax)
#define vmin FN(vmin)
#define sum FN(sum)
#define widen FN(widen)

INLINE vfloat load(const float *p) { return *(const vfloat_u *)p; }
INLINE void store(float *p, vfloat v) { *(vfloat_u *)p = v; }

/*
 * sum adds the lanes of a vector in a fixed tree. vmax and vmin return their second operand when it is NaN. widen reads
 * LANES elements of `kind` at p.
 */
#if LANES == 16
INLINE vfloat splat(float s) { return (vfloat)_mm512_set1_ps(s); }
INLINE vfloat fma(vfloat a, vfloat b, vfloat c) { return (vfloat)_mm512_fmadd_ps(a, b, c); }
INLINE vfloat vmax(vfloat a, vfloat b) { return (vfloat)_mm512_max_ps(a, b); }
INLINE vfloat vmin(vfloat a, vfloat b) { return (vfloat)_mm512_min_ps(a, b); }
INLINE float sum(vfloat v) { return _mm512_reduce_add_ps(v); }
INLINE vfloat widen(int kind, const char *p) {
    if (kind == F32)
        return load((const float *)p);
    if (kind == BF16)
        return (vfloat)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
    if (kind == F16)
        return (vfloat)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
    return (vfloat)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
#elif LANES == 8
INLINE vfloat splat(float s) { return (vfloat)_mm256_set1_ps(s); }
INLINE vfloat fma(vfloat a, vfloat b, vfloat c) { return (vfloat)_mm256_fmadd_ps(a, b, c); }
INLINE vfloat vmax(vfloat a, vfloat b) { return (vfloat)_mm256_max_ps(a, b); }
INLINE vfloat vmin(vfloat a, vfloat b) { return (vfloat)_mm256_min_ps(a, b); }
INLINE float sum(vfloat v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
INLINE vfloat widen(int kind, const char *p) {
    if (kind == F32)
        return load((const float *)p);
    if (kind == BF16)
        return (vfloat)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
    if (kind == F16)
        return (vfloat)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
    return (vfloat)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
#else
INLINE vfloat splat(float s) { return (vfloat){s, s, s, s}; }
INLINE vfloat select(vint mask, vfloat a, vfloat b) { return (vfloat)((mask & (vint)a) | (~mask & (vint)b)); }
#if defined(__ARM_NEON)
INLINE vfloat fma(vfloat a, vfloat b, vfloat c) {
    return (vfloat)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
#else
INLINE vfloat fma(vfloat a, vfloat b, vfloat c) { return a * b + c; }
#endif
INLINE vfloat vmax(vfloat a, vfloat b) { return select((vint)(a > b), a, b); }
INLINE vfloat vmin(vfloat a, vfloat b) { return select((vint)(a < b), a, b); }
INLINE float sum(vfloat v) { return (v[0] + v[2]) + (v[1] + v[3]); }
INLINE vfloat widen(int kind, const char *p) {
    if (kind == F32)
        return load((const float *)p);
    if (kind == I8) {
        const int8_t *b = (const int8_t *)p;
        return (vfloat){b[0], b[1], b[2], b[3]};
    }
    uint16_t h[4];
    memcpy(h, p, sizeof h);
    const vint w = {h[0], h[1], h[2], h[3]};
    if (kind == BF16)
        return (vfloat)(w << 16);
    /* Half: shifted into place the exponent is 112 too small; scaling by 2^112 also makes subnormals right. */
    const vint magnitude = (w & 0x7fff) << 13, special = magnitude >= 0x0f800000;
    const vfloat scaled = (vfloat)magnitude * 0x1p112f;
    return (vfloat)((vint)select(special, (vfloat)(magnitude | 0x7f800000), scaled) | ((w & 0x8000) << 16));
}
#endif

#if LANES != 4
#define select FN(select)
INLINE vfloat select(vint mask, vfloat a, vfloat b) { return (vfloat)((mask & (vint)a) | (~mask & (vint)b)); }
#endif

#define load_tile FN(load_tile)
#define store_tile FN(store_tile)
#define rank_one FN(rank_one)
#define rank_two FN(rank_two)

/* A register tile: R rows of V vectors. Arrays of constant size, or the compiler keeps them in memory. */
#define TILE(rows) vfloat acc[rows][4 * VECTORS]
INLINE void load_tile(const int R, const int V, vfloat (*acc)[4 * VECTORS], const float *c, long stride) {
    EACH(r, R)
        EACH(v, V)
            acc[r][v] = c == NULL ? splat(0.0f) : load(c + r * stride + v * LANES);
}
INLINE void store_tile(const int R, const int V, vfloat (*acc)[4 * VECTORS], float *c, long stride) {
    EACH(r, R)
        EACH(v, V)
            store(c + r * stride + v * LANES, acc[r][v]);
}
/* acc[r][j] += x[r] * row[j] */
INLINE void rank_one(const int R, const int V, vfloat (*acc)[4 * VECTORS], const float *x, long stride,
                     const vfloat *row) {
    EACH(r, R) {
        const vfloat s = splat(x[r * stride]);
        EACH(v, V)
            acc[r][v] = fma(s, row[v], acc[r][v]);
    }
}

#if PAIRS
/*
 * acc[r][j] += x[r] . row[j] with pairs of bfloat16 in the lanes of row and in the 32 bits at x[r]. In assembly, since
 * the compiler spends an instruction more on each broadcast, and a third of the speed with it.
 */
INLINE void rank_two(const int R, const int V, vfloat (*acc)[4 * VECTORS], const float *x, const vfloat *row) {
    EACH(r, R)
        EACH(v, V)
            __asm__("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(acc[r][v]) : "v"(row[v]), "m"(x[r]));
}
#endif

#define vexp FN(vexp)
#define vtanh FN(vtanh)
#define load_some FN(load_some)
#define store_some FN(store_some)
#define widen_some FN(widen_some)
#define lanes FN(lanes)

/* The first n elements when there are fewer than LANES, zeros after them. */
INLINE vfloat widen_some(const int kind, const char *p, long n) {
    if (n >= LANES)
        return widen(kind, p);
    char buffer[LANES * 4] = {0};
    memcpy(buffer, p, n * kind_bytes(kind));
    return widen(kind, buffer);
}
INLINE vfloat load_some(const float *p, long n) { return widen_some(F32, (const char *)p, n); }
INLINE void store_some(float *p, vfloat v, long n) {
    if (n >= LANES)
        store(p, v);
    else
        memcpy(p, &v, n * sizeof(float));
}
/* Lanes [from, to). */
INLINE vint lanes(long from, long to) {
    vint lane;
    EACH(i, LANES)
        lane[i] = i;
    return (vint)(lane >= (int32_t)from) & (vint)(lane < (int32_t)to);
}

/* e^x to 1e-7 relative; 0 below the smallest normal result, finite above the largest, NaN for NaN. */
INLINE vfloat vexp(vfloat x) {
    const vfloat shift = splat(0x1.8p23f);
    const vfloat low = splat(-87.3f);
    const vint tiny = (vint)(x < low);
    x = vmin(splat(88.3f), vmax(low, x));
    const vfloat shifted = fma(x, splat(0x1.715476p0f), shift); /* round(x / ln 2) in the low bits */
    const vfloat n = shifted - shift;
    vfloat r = fma(n, splat(-0x1.62e4p-1f), x);
    r = fma(n, splat(-0x1.7f7d1cp-20f), r);
    vfloat p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r) + splat(1.0f);
    const vfloat power = (vfloat)(((vint)shifted + (127 - 0x4b400000)) << 23);
    return select(tiny, splat(0.0f), p * power);
}

INLINE vfloat vtanh(vfloat x) {
    const vint sign = (vint)x & (int32_t)0x80000000;
    const vfloat a = (vfloat)((vint)x ^ sign), z = x * x;
    vfloat p = splat(-5.70498872745e-3f);
    p = fma(p, z, splat(2.06390887954e-2f));
    p = fma(p, z, splat(-5.37397155531e-2f));
    p = fma(p, z, splat(1.33314422036e-1f));
    p = fma(p, z, splat(-3.33332819422e-1f));
    p = fma(p, z * x, x);
    const vfloat far = splat(1.0f) - splat(2.0f) / (vexp(a + a) + splat(1.0f));
    return select((vint)(a < splat(0.625f)), p, (vfloat)((vint)far | sign));
}

/* ------------------------------------------------------------------------------------------------- packed linear */

#define tile FN(tile)
#define tile_fn FN(tile_fn)
#define tiles FN(tiles)
#define wide_tiles FN(wide_tiles)
#define in_pairs FN(in_pairs)
#define terms FN(terms)
#define pack_rows FN(pack_rows)
#define finish FN(finish)
#define few_rows FN(few_rows)
#define many_rows FN(many_rows)

/*
 * c[r][16 p + j] (+)= sum_k a[k][r] * w[p][k][j] for R rows and P panels `panel_bytes` apart, the sums held in
 * registers. a is [features][R], or in pairs of bfloat16 [ceil(features / 2)][R]; c continues from what it holds when
 * `resume`. Narrow weights leave their float32 in `wide`, unless NULL. `ahead` walks over weights the next tiles need.
 */
INLINE void tile(const int R, const int P, const int kind, const float *a, const char *w, long panel_bytes,
                 long features, float *c, long c_stride, int resume, float *wide, const char *ahead, long ahead_step) {
    TILE(MAX_ROWS);
    vfloat row[4 * VECTORS];
    const int keep = P == 1 && kind != F32 && wide != NULL;
    load_tile(R, P * VECTORS, acc, resume ? c : NULL, c_stride);
#pragma GCC unroll 2
    for (long k = 0; k < features; k += row_features(kind), w += row_bytes(kind), ahead += ahead_step) {
        __builtin_prefetch(ahead, 0, 2);
        if (kind != BF16X2) {
            EACH(v, P * VECTORS)
                row[v] = widen(kind, w + v / VECTORS * panel_bytes + v % VECTORS * LANES * kind_bytes(kind));
            if (keep)
                EACH(v, VECTORS)
                    store(wide + k * PANEL + v * LANES, row[v]);
            rank_one(R, P * VECTORS, acc, a, 1, row);
            a += R;
            continue;
        }
        EACH(v, P * VECTORS)
            row[v] = load((const float *)(w + v / VECTORS * panel_bytes) + v % VECTORS * LANES);
#if PAIRS
        rank_two(R, P * VECTORS, acc, a, row);
        a += R;
#else
        vfloat odd[4 * VECTORS];
        EACH(v, P * VECTORS) {
            odd[v] = (vfloat)((vint)row[v] & (int32_t)0xffff0000);
            row[v] = (vfloat)((vint)row[v] << 16);
        }
        if (keep)
            EACH(v, VECTORS) {
                store(wide + k * PANEL + v * LANES, row[v]);
                store(wide + (k + 1) * PANEL + v * LANES, odd[v]);
            }
        rank_one(R, P * VECTORS, acc, a, 1, row);
        if (k + 1 < features)
            rank_one(R, P * VECTORS, acc, a + R, 1, odd);
        a += 2 * R;
#endif
    }
    store_tile(R, P * VECTORS, acc, c, c_stride);
}

typedef void (*tile_fn)(const float *, const char *, long, long, float *, long, int, float *, const char *, long);

#define DEFINE_TILE(R, P, KIND)                                                                                        \
    static void FN(tile_##R##_##P##_##KIND)(const float *a, const char *w, long panel_bytes, long features, float *c,  \
                                            long c_stride, int resume, float *wide, const char *ahead,                 \
                                            long ahead_step) {                                                         \
        tile(R, P, KIND, a, w, panel_bytes, features, c, c_stride, resume, wide, ahead, ahead_step);                   \
    }
#define DEFINE_TILES(R, P) DEFINE_TILE(R, P, F32) DEFINE_TILE(R, P, BF16X2) DEFINE_TILE(R, P, I8)
#define LIST_TILES(R, P)                                                                                               \
    {[F32] = FN(tile_##R##_##P##_F32), [BF16X2] = FN(tile_##R##_##P##_BF16X2), [I8] = FN(tile_##R##_##P##_I8)}
#if LANES == 16
#define EACH_ROW_COUNT(X) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15) X(16)
#else
#define EACH_ROW_COUNT(X) X(1) X(2) X(3) X(4) X(5) X(6)
#endif
#define DEFINE_ONE_PANEL(R) DEFINE_TILES(R, 1)
#define LIST_ONE_PANEL(R) LIST_TILES(R, 1),
EACH_ROW_COUNT(DEFINE_ONE_PANEL)
DEFINE_TILES(1, 4)
DEFINE_TILES(2, 2)
DEFINE_TILES(3, 2)

static const tile_fn tiles[MAX_ROWS + 1][BF16X2 + 1] = {{NULL}, EACH_ROW_COUNT(LIST_ONE_PANEL)};
/* One to three rows leave registers for several panels, whose independent sums hide the latency of FMA. */
static const tile_fn wide_tiles[4][BF16X2 + 1] = {{NULL}, LIST_TILES(1, 4), LIST_TILES(2, 2), LIST_TILES(3, 2)};

#undef DEFINE_TILE
#undef DEFINE_TILES
#undef LIST_TILES
#undef EACH_ROW_COUNT
#undef DEFINE_ONE_PANEL
#undef LIST_ONE_PANEL

/*
 * How a tile reads x for weights of `kind`: one float a feature, or 32 bits for two features rounded to bfloat16.
 * `terms` is their number.
 */
INLINE int in_pairs(int kind) { return PAIRS && kind == BF16X2; }
INLINE long terms(int kind, long features) { return in_pairs(kind) ? CEIL_DIV(features, 2) : features; }

/* x [rows, in] -> [terms][rows], so that a tile reads its broadcasts from one stream. */
static void pack_rows(const float *x, long rows, long in, int kind, float *packed) {
#if PAIRS
    for (long k = 0; in_pairs(kind) && k < in; k += 2 * LANES)
        for (long r = 0; r < rows; r++) {
            const float *from = x + r * in + k;
            const vfloat low = load_some(from, in - k);
            const vfloat high = in - k > LANES ? load_some(from + LANES, in - k - LANES) : splat(0.0f);
            float pairs[LANES];
            store(pairs, (vfloat)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
            for (long i = 0; i < MIN(LANES, CEIL_DIV(in - k, 2)); i++)
                packed[(k / 2 + i) * rows + r] = pairs[i];
        }
    if (in_pairs(kind))
        return;
#endif
    for (long k = 0; k < in; k++)
        for (long r = 0; r < rows; r++)
            *packed++ = x[r * in + k];
}

/* Scale and bias of one panel, and the copy out of the edge buffer when the panel is cut by `out`. */
static void finish(const packed_linear *w, long panel, float *c, long c_stride, float *y, long y_stride, long rows) {
    const long column = panel * PANEL, columns = MIN(w->out - column, PANEL);
    for (long r = 0; r < rows; r++, c += c_stride, y += y_stride) {
        for (int v = 0; v < PANEL && (w->scale || w->bias); v += LANES) {
            const vfloat scaled = w->scale ? load(c + v) * load(w->scale + column + v) : load(c + v);
            store(c + v, w->bias ? scaled + load(w->bias + column + v) : scaled);
        }
        if (c != y)
            memcpy(y, c, columns * sizeof(float));
    }
}

/* Panels [panel0, panel1) for so few rows that one tile holds them: the weights are read once, straight through. */
static void few_rows(const float *a, long rows, const packed_linear *w, float *y, long y_stride, long panel0,
                     long panel1) {
    const long panel_bytes = CEIL_DIV(w->in, row_features(w->kind)) * row_bytes(w->kind);
    const long whole_panels = w->out / PANEL;
    float edge[MAX_ROWS * PANEL];
    for (long p = panel0; p < panel1;) {
        const char *data = (const char *)w->data + p * panel_bytes;
        const long width = WIDE_PANELS(rows);
        const long step = p + width <= MIN(panel1, whole_panels) ? width : 1;
        float *c = p < whole_panels ? y + p * PANEL : edge;
        const long c_stride = p < whole_panels ? y_stride : PANEL;
        const tile_fn run = step > 1 ? wide_tiles[rows][w->kind] : tiles[rows][w->kind];
        run(a, data, panel_bytes, w->in, c, c_stride, 0, NULL, data + AHEAD_BYTES, row_bytes(w->kind));
        for (long i = 0; i < step; i++)
            finish(w, p + i, c + i * PANEL, c_stride, y + (p + i) * PANEL, y_stride, rows);
        p += step;
    }
}

/*
 * Panels [panel0, panel1) for the row blocks [block0, block1) of `blocks`. A sliver of a panel serves all row blocks
 * out of the L1 cache; narrow weights are widened once per sliver, unless in pairs. A single
 * row group walks each panel to its end (one stream of weights), several walk `panel1 - panel0` panels per sliver of
 * rows. The first tile of a sliver prefetches the next sliver, the others what is `soon`.
 */
static void many_rows(const float *packed, long rows, long blocks, long block0, long block1, const packed_linear *w,
                      float *y, long y_stride, long panel0, long panel1, region_walk soon) {
    const int kind = w->kind, narrow = kind != F32 && !in_pairs(kind);
    const long feature_bytes = PANEL * kind_bytes(kind);
    const long panel_bytes = CEIL_DIV(w->in, row_features(kind)) * row_bytes(kind);
    const long slivers = CEIL_DIV(w->in, SLIVER), panels = panel1 - panel0;
    const long first = part(rows, blocks, block0), last = part(rows, blocks, block1);
    const int by_panel = block0 == 0 && block1 == blocks;
    float edge[(GROUP_ROWS + 2 * MAX_ROWS) * PANEL];
    float wide[SLIVER * PANEL] __attribute__((aligned(64)));
    const char *next = (const char *)w->data + panel0 * panel_bytes;
    for (long i = 0; i < panels * slivers; i++) {
        const long p = panel0 + (by_panel ? i / slivers : i % panels),
                   k = (by_panel ? i % slivers : i / panels) * SLIVER;
        const long features = MIN(w->in - k, SLIVER);
        const char *data = next;
        const long p2 = panel0 + (by_panel ? (i + 1) / slivers : (i + 1) % panels);
        const long k2 = (by_panel ? (i + 1) % slivers : (i + 1) / panels) * SLIVER;
        next = (const char *)w->data + p2 * panel_bytes + k2 * feature_bytes;
        const int whole = (p + 1) * PANEL <= w->out;
        float *c = whole ? y + first * y_stride + p * PANEL : edge;
        const long c_stride = whole ? y_stride : PANEL;
        for (long b = block0; b < block1; b++) {
            const long row = part(rows, blocks, b), n = part(rows, blocks, b + 1) - row;
            const int tile_kind = narrow && b > block0 ? F32 : kind;
            const long steps = CEIL_DIV(features, row_features(tile_kind));
            const int first_tile = b == block0 || soon.left == 0;
            long bytes = steps * (first_tile ? row_bytes(kind) : LINE);
            const char *ahead = first_tile ? next : next_bytes(&soon, &bytes);
            tiles[n][tile_kind](packed + row * terms(kind, w->in) + terms(kind, k) * n, data, 0, features,
                                c + (row - first) * c_stride, c_stride, k > 0, wide, ahead, bytes / steps);
            if (narrow)
                data = (const char *)wide;
        }
        if (k + features == w->in)
            finish(w, p, c, c_stride, y + first * y_stride + p * PANEL, y_stride, last - first);
    }
}

/* ---------------------------------------------------------------------------------------------------------- LoRA */

#define shrink_tile FN(shrink_tile)
#define shrink FN(shrink)
#define shrink_kind FN(shrink_kind)
#define expand_tile FN(expand_tile)
#define expand FN(expand)
#define expand_rows FN(expand_rows)
#define expand_kind FN(expand_kind)
#define rescale FN(rescale)
#define is_empty FN(is_empty)

/*
 * h[r][q] = scaling * sum_k x[r][k] * a[q][k] for R rows and Q ranks, LANES partial sums over k each. What lies `ahead`
 * bytes further than a is prefetched.
 */
INLINE void shrink_tile(const int R, const int Q, const int kind, const float *x, const char *a, long in, float scaling,
                        float *h, long h_stride, long ahead) {
    vfloat acc[TILE_ROWS][8], rows[TILE_ROWS];
    const long size = kind_bytes(kind), whole = in - in % LANES;
    EACH(r, R)
        EACH(q, Q)
            acc[r][q] = splat(0.0f);
    for (long k = 0; k < whole; k += LANES) {
        EACH(r, R)
            rows[r] = load(x + r * in + k);
        EACH(q, Q) {
            const vfloat w = widen(kind, a + (q * in + k) * size);
            __builtin_prefetch(a + (q * in + k) * size + ahead, 0, 2);
            EACH(r, R)
                acc[r][q] = fma(rows[r], w, acc[r][q]);
        }
    }
    EACH(r, R)
        EACH(q, Q) {
            if (whole < in)
                acc[r][q] = fma(load_some(x + r * in + whole, in - whole),
                                widen_some(kind, a + (q * in + whole) * size, in - whole), acc[r][q]);
            h[r * h_stride + q] = scaling * sum(acc[r][q]);
        }
}

INLINE void shrink_kind(const int kind, const float *x, const char *a, long in, float scaling, float *h, long h_stride,
                        long rows, long ranks, long ahead) {
    const long a_step = in * kind_bytes(kind);
    for (long step; ranks > 0; ranks -= step, a += step * a_step, h += step) {
        step = ranks >= 8 ? 8 : ranks >= 4 ? 4 : 1;
        long r = 0;
        for (; step >= 4 && rows - r >= SHRINK_ROWS; r += SHRINK_ROWS)
            for (long q = 0; q < step; q += 4)
                shrink_tile(SHRINK_ROWS, 4, kind, x + r * in, a + q * a_step, in, scaling, h + r * h_stride + q,
                            h_stride, ahead);
        for (; step >= 4 && rows - r >= 2; r += 2)
            for (long q = 0; q < step; q += 4)
                shrink_tile(2, 4, kind, x + r * in, a + q * a_step, in, scaling, h + r * h_stride + q, h_stride, ahead);
        for (; r < rows; r++)
            if (step == 8)
                shrink_tile(1, 8, kind, x + r * in, a, in, scaling, h + r * h_stride, h_stride, ahead);
            else if (step == 4)
                shrink_tile(1, 4, kind, x + r * in, a, in, scaling, h + r * h_stride, h_stride, ahead);
            else
                shrink_tile(1, 1, kind, x + r * in, a, in, scaling, h + r * h_stride, h_stride, ahead);
    }
}

static void shrink(int kind, const float *x, const char *a, long in, float scaling, float *h, long h_stride, long rows,
                   long ranks, long ahead) {
    if (kind == F32)
        shrink_kind(F32, x, a, in, scaling, h, h_stride, rows, ranks, ahead);
    else if (kind == BF16)
        shrink_kind(BF16, x, a, in, scaling, h, h_stride, rows, ranks, ahead);
    else
        shrink_kind(F16, x, a, in, scaling, h, h_stride, rows, ranks, ahead);
}

/*
 * y[r][o] += sum_q h[r][q] * b[q][o] for R rows and P * 16 columns; the sum starts from y. What lies `ahead` bytes
 * further than b is prefetched.
 */
INLINE void expand_tile(const int R, const int P, const int kind, const float *h, long rank, const char *b, long out,
                        float *y, long y_stride, long ahead) {
    TILE(TILE_ROWS);
    vfloat row[4 * VECTORS];
    load_tile(R, P * VECTORS, acc, y, y_stride);
    for (long q = 0; q < rank; q++, b += out * kind_bytes(kind)) {
        EACH(v, P * VECTORS) {
            row[v] = widen(kind, b + v * LANES * kind_bytes(kind));
            __builtin_prefetch(b + v * LANES * kind_bytes(kind) + ahead, 0, 2);
        }
        rank_one(R, P * VECTORS, acc, h + q, rank, row);
    }
    store_tile(R, P * VECTORS, acc, y, y_stride);
}

INLINE void expand_rows(const int R, const int P, const int kind, const float *h, long rank, const char *b, long out,
                        float *y, long y_stride, long columns, long ahead) {
    long o = 0;
    for (; columns - o >= P * PANEL; o += P * PANEL)
        expand_tile(R, P, kind, h, rank, b + o * kind_bytes(kind), out, y + o, y_stride, ahead);
    for (; columns - o >= PANEL; o += PANEL)
        expand_tile(R, 1, kind, h, rank, b + o * kind_bytes(kind), out, y + o, y_stride, ahead);
    for (; o < columns; o += LANES)
        for (long r = 0; r < R; r++) {
            vfloat acc = load_some(y + r * y_stride + o, columns - o);
            for (long q = 0; q < rank; q++)
                acc = fma(splat(h[r * rank + q]), widen_some(kind, b + (q * out + o) * kind_bytes(kind), columns - o),
                          acc);
            store_some(y + r * y_stride + o, acc, columns - o);
        }
}

INLINE void expand_kind(const int kind, const float *h, long rank, const char *b, long out, float *y, long y_stride,
                        long rows, long columns, long ahead) {
    long r = 0;
    for (; rows - r >= TILE_ROWS; r += TILE_ROWS)
        expand_rows(TILE_ROWS, EXPAND_PANELS, kind, h + r * rank, rank, b, out, y + r * y_stride, y_stride, columns,
                    ahead);
    for (; rows - r >= 2; r += 2)
        expand_rows(2, 2, kind, h + r * rank, rank, b, out, y + r * y_stride, y_stride, columns, ahead);
    for (; r < rows; r++)
        expand_rows(1, 4, kind, h + r * rank, rank, b, out, y + r * y_stride, y_stride, columns, ahead);
}

static void expand(int kind, const float *h, long rank, const char *b, long out, float *y, long y_stride, long rows,
                   long columns, long ahead) {
    if (kind == F32)
        expand_kind(F32, h, rank, b, out, y, y_stride, rows, columns, ahead);
    else if (kind == BF16)
        expand_kind(BF16, h, rank, b, out, y, y_stride, rows, columns, ahead);
    else
        expand_kind(F16, h, rank, b, out, y, y_stride, rows, columns, ahead);
}

/* y[r][o] = gain[o] * y[r][o] + bias[o]; a NULL gain is ones, a NULL bias zeros. */
static void rescale(const float *gain, const float *bias, float *y, long y_stride, long rows, long columns) {
    if (gain == NULL && bias == NULL)
        return;
    for (long r = 0; r < rows; r++, y += y_stride)
        for (long o = 0; o < columns; o += LANES) {
            const long n = columns - o;
            const vfloat g = gain ? load_some(gain + o, n) : splat(1.0f);
            const vfloat b = bias ? load_some(bias + o, n) : splat(0.0f);
            store_some(y + o, fma(g, load_some(y + o, n), b), n);
        }
}

INLINE int is_empty(const lora_slots *layer, long slot) {
    return layer->ranks[slot] == 0 && layer->gains[slot] == NULL && layer->biases[slot] == NULL;
}

/*
 * A pass of bypasses for an embedding's output y [rows, out], whose "x" is one-hot: ids [rows] choose columns of A.
 * Columns are read where they lie, a few ranks at a time.
 */
static void FN(add_embedding_lora)(const int64_t *ids, const lora_slots *slots, float *y, long num_segments,
                                   const lora_segment *segments) {
    const long out = slots->out;
    for (long i = 0; i < num_segments; i++) {
        const lora_segment s = segments[i];
        const long rank = slots->ranks[s.slot], size = kind_bytes(slots->kinds[s.slot]);
        const float scaling = slots->scalings[s.slot] * s.scale;
        const int kind = slots->kinds[s.slot];
        if (is_empty(slots, s.slot))
            continue;
#pragma omp parallel for schedule(static) if ((s.end - s.start) * rank * out > SMALL)
        for (long t = s.start; t < s.end; t++) {
            const char *a = (const char *)slots->a[s.slot] + ids[t] * size, *b = slots->b[s.slot];
            float h[PANEL];
            for (long q0 = 0; q0 < rank; q0 += PANEL) {
                const long ranks = MIN(rank - q0, PANEL);
                for (long q = 0; q < ranks; q++, a += slots->in * size)
                    h[q] = scaling * widen_some(kind, a, 1)[0];
                expand(kind, h, ranks, b + q0 * out * size, out, y + t * out, out, 1, out, 0);
            }
            rescale(slots->gains[s.slot], slots->biases[s.slot], y + t * out, out, 1, out);
        }
    }
}

/* -------------------------------------------------------------------------------------- linear layers with bypasses */

#define list_bypasses FN(list_bypasses)
#define list_factors FN(list_factors)
#define shrink_bypass FN(shrink_bypass)
#define expand_bypasses FN(expand_bypasses)
#define slab FN(slab)
#define block_row FN(block_row)
#define pack_blocks FN(pack_blocks)
#define layer_of FN(layer_of)
#define compute_outputs FN(compute_outputs)
#define shrink_piece FN(shrink_piece)
#define expand_piece FN(expand_piece)
#define count_steps FN(count_steps)
#define linear_slab FN(linear_slab)

/*
 * Lists the bypasses of rows [first, end), layer by layer and for each one pass by pass; those of layer j start at
 * list[starts[j]] and have their h one after the other. A NULL list is only counted. Returns the floats of all h.
 */
static long list_bypasses(const linear_group *group, const lora_passes *passes, long first, long end, bypass *list,
                          long *starts, float *h) {
    long count = 0, floats = 0;
    for (long j = 0; j < group->count; j++) {
        const lora_slots *layer = group->slots[j];
        if (list)
            starts[j] = count;
        for (long i = 0; i < passes->count; i++)
            for (long k = 0; k < passes->passes[i].num_segments; k++) {
                const lora_segment s = passes->passes[i].segments[k];
                const long row0 = MAX(s.start, first), row1 = MIN(s.end, end);
                if (row0 >= row1 || is_empty(layer, s.slot))
                    continue;
                if (list)
                    list[count] = (bypass){layer, s.slot, row0, row1, layer->scalings[s.slot] * s.scale, h + floats};
                count++;
                floats += (row1 - row0) * layer->ranks[s.slot];
            }
    }
    if (list)
        starts[group->count] = count;
    return floats;
}

/* Lists the factors of bypasses, as many as there is room for; the number of bytes listed. */
static long list_factors(const bypass *list, long count, region *regions) {
    long bytes = 0;
    for (long i = 0; i < MIN(count, MAX_REGIONS / 2); i++) {
        const lora_slots *layer = list[i].layer;
        const long row = layer->ranks[list[i].slot] * kind_bytes(layer->kinds[list[i].slot]);
        regions[2 * i] = (region){layer->a[list[i].slot], row * layer->in};
        regions[2 * i + 1] = (region){layer->b[list[i].slot], row * layer->out};
        bytes += row * (layer->in + layer->out);
    }
    return bytes;
}

/* h = scaling * x @ A.T for those rows of a bypass that are in [row0, row1), and ranks [rank0, rank1). */
static void shrink_bypass(const bypass *b, const float *x, long row0, long row1, long rank0, long rank1, long ahead) {
    const lora_slots *layer = b->layer;
    const long rank = layer->ranks[b->slot], in = layer->in, kind = layer->kinds[b->slot];
    row0 = MAX(row0, b->row0);
    row1 = MIN(row1, b->row1);
    if (row0 < row1)
        shrink(kind, x + row0 * in, (const char *)layer->a[b->slot] + rank0 * in * kind_bytes(kind), in, b->scaling,
               b->h + (row0 - b->row0) * rank + rank0, rank, row1 - row0, rank1 - rank0, ahead);
}

/*
 * y = gain * (y + h @ B) + bias, for one bypass of a layer after the other, those of their rows that are in [row0,
 * row1), and columns [col0, col1).
 */
static void expand_bypasses(const bypass *list, long count, float *y, long y_stride, long row0, long row1, long col0,
                            long col1) {
    for (const bypass *b = list; b < list + count; b++) {
        const long r0 = MAX(row0, b->row0), r1 = MIN(row1, b->row1);
        if (r0 >= r1)
            continue;
        const lora_slots *layer = b->layer;
        const long rank = layer->ranks[b->slot], kind = layer->kinds[b->slot], size = kind_bytes(kind);
        const char *from = (const char *)layer->b[b->slot] + col0 * size;
        const char *next = (const char *)layer->b[b + 1 < list + count ? b[1].slot : b->slot] + col0 * size;
        float *to = y + r0 * y_stride + col0;
        expand(kind, b->h + (r0 - b->row0) * rank, rank, from, layer->out, to, y_stride, r1 - r0, col1 - col0,
               next - from);
        const float *gain = layer->gains[b->slot], *bias = layer->biases[b->slot];
        rescale(gain ? gain + col0 : NULL, bias ? bias + col0 : NULL, to, y_stride, r1 - r0, col1 - col0);
    }
}

/* What the tasks of rows [first, first + rows) of `linear` share. */
typedef struct {
    const float *x;
    const linear_group *group;
    float *const *ys;
    long first, rows, blocks, groups;
    int fused;
    float *packed;      /* x, row block by row block; NULL: x as it is */
    const bypass *list; /* its bypasses as `list_bypasses` lists them */
    const long *starts; /* [layers + 1] */
    const region *soon; /* what the tiles bring closer meanwhile */
    long soon_bytes;
} slab;

/* The first row of a row block. */
INLINE long block_row(const slab *s, long block) { return s->first + part(s->rows, s->blocks, block); }

/* Packs x of row blocks [block0, block1), and shrinks it where that is fused. */
static void pack_blocks(const slab *s, long block0, long block1) {
    const packed_linear *w = s->group->weights[0];
    for (long b = block0; b < block1; b++) {
        const long row = block_row(s, b), rows = block_row(s, b + 1) - row;
        pack_rows(s->x + row * w->in, rows, w->in, w->kind, s->packed + (row - s->first) * terms(w->kind, w->in));
    }
    for (long i = 0; s->fused && i < s->starts[s->group->count]; i++)
        shrink_bypass(&s->list[i], s->x, block_row(s, block0), block_row(s, block1), 0,
                      s->list[i].layer->ranks[s->list[i].slot], 0);
}

/* The layer in whose `step`s a task of all layers lies; the task becomes its number there. */
static long layer_of(const linear_group *group, long step, long *task) {
    long j = 0;
    for (long steps; *task >= (steps = CEIL_DIV(group->weights[j]->out, step)); j++)
        *task -= steps;
    return j;
}

/* Piece `task` of `tasks` of the layers' own outputs: `columns` of one layer for a group of rows. */
static void compute_outputs(const slab *s, long task, long tasks, long columns) {
    const long group = task * s->groups / tasks;
    long t = task % (tasks / s->groups);
    const long j = layer_of(s->group, columns, &t), y_stride = s->group->y_strides[j];
    const packed_linear *w = s->group->weights[j];
    const long col0 = t * columns, col1 = MIN(col0 + columns, w->out);
    const long block0 = part(s->blocks, s->groups, group), block1 = part(s->blocks, s->groups, group + 1);
    const long panel0 = col0 / PANEL, panel1 = CEIL_DIV(col1, PANEL);
    float *y = s->ys[j] + s->first * y_stride;
    if (s->blocks == 1)
        few_rows(s->packed ? s->packed : s->x + s->first * w->in, s->rows, w, y, y_stride, panel0, panel1);
    else
        many_rows(s->packed, s->rows, s->blocks, block0, block1, w, y, y_stride, panel0, panel1,
                  walk_regions(s->soon, part(s->soon_bytes, tasks, task), part(s->soon_bytes, tasks, task + 1)));
    if (s->fused)
        expand_bypasses(s->list + s->starts[j], s->starts[j + 1] - s->starts[j], s->ys[j], y_stride,
                        block_row(s, block0), block_row(s, block1), col0, col1);
}

/* Piece `i` of the shrinks where they are not fused: of `pieces` of a bypass's ranks. */
static void shrink_piece(const slab *s, long i, long pieces) {
    const long last = s->starts[s->group->count] - 1;
    const bypass *b = &s->list[i / pieces], *next = &s->list[MIN(i / pieces + omp_get_num_threads(), last)];
    const long rank = b->layer->ranks[b->slot];
    const long rank0 = MIN(CEIL_DIV(part(rank, pieces, i % pieces), 4) * 4, rank);
    const long rank1 = MIN(CEIL_DIV(part(rank, pieces, i % pieces + 1), 4) * 4, rank);
    shrink_bypass(b, s->x, b->row0, b->row1, rank0, rank1,
                  (const char *)next->layer->a[next->slot] - (const char *)b->layer->a[b->slot]);
}

/* Piece `task` of the expands where they are not fused: `columns` of one layer for EXPAND_ROWS rows. */
static void expand_piece(const slab *s, long task, long steps, long columns) {
    const long row0 = s->first + task / steps * EXPAND_ROWS, row1 = MIN(row0 + EXPAND_ROWS, s->first + s->rows);
    long t = task % steps;
    const long j = layer_of(s->group, columns, &t), col0 = t * columns;
    expand_bypasses(s->list + s->starts[j], s->starts[j + 1] - s->starts[j], s->ys[j], s->group->y_strides[j], row0,
                    row1, col0, MIN(col0 + columns, s->group->weights[j]->out));
}

/* How many tasks of `columns` outputs the layers give. */
static long count_steps(const linear_group *group, long columns) {
    long steps = 0;
    for (long j = 0; j < group->count; j++)
        steps += CEIL_DIV(group->weights[j]->out, columns);
    return steps;
}

/* Rows [first, end) of `linear`. */
static int linear_slab(const float *x, long first, long end, const linear_group *group, const lora_passes *passes,
                       float *const *ys) {
    const packed_linear *w = group->weights[0];
    const long n = group->count, rows = end - first, blocks = CEIL_DIV(rows, MAX_ROWS);
    const long groups = CEIL_DIV(rows, GROUP_ROWS), threads = omp_get_max_threads();
    const int pack = rows > 1 || in_pairs(w->kind), fused = rows >= FUSED_ROWS;
    long segments = 0;
    for (long i = 0; i < passes->count; i++)
        segments += passes->passes[i].num_segments;

    const long packed_floats = pack ? CEIL_DIV(rows * terms(w->kind, w->in), 16) * 16 : 0;
    const long h_floats = CEIL_DIV(list_bypasses(group, passes, first, end, NULL, NULL, NULL), 16) * 16;
    float *packed =
        scratch((packed_floats + h_floats) * sizeof(float) + (n + 1) * sizeof(long) + n * segments * sizeof(bypass));
    if (packed == NULL)
        return -1;
    float *h = packed + packed_floats;
    long *starts = (long *)(h + h_floats);
    bypass *list = (bypass *)(starts + n + 1);
    list_bypasses(group, passes, first, end, list, starts, h);
    region soon[MAX_REGIONS];
    const long soon_bytes = blocks > 1 && !fused ? list_factors(list, starts[n], soon) : 0;
    const slab s = {x,    group,  ys,   first,     rows, blocks, groups, fused, pack ? packed : NULL,
                    list, starts, soon, soon_bytes};

    const long panels = count_steps(group, PANEL), fair = panels / (8 * threads), band = fused ? BAND_BLOCKS : 1;
    const long columns = PANEL * (groups > 1 ? GROUP_PANELS : MAX(1, MIN(fair, GROUP_PANELS)));
    const long tasks = groups * count_steps(group, columns);
    const long expand_columns = rows > EXPAND_ROWS ? EXPAND_COLUMNS : NARROW_COLUMNS;
    const long steps = count_steps(group, expand_columns);
    const long pieces = MAX(1, 8 * threads / MAX(1, starts[n]));
#pragma omp parallel if (rows * w->in * panels * PANEL > 4 * SMALL)
    {
#pragma omp for schedule(static)
        for (long b = 0; b < (pack ? blocks : 0); b += band)
            pack_blocks(&s, b, MIN(b + band, blocks));
#pragma omp for schedule(dynamic) nowait
        for (long task = 0; task < tasks; task++)
            compute_outputs(&s, task, tasks, columns);
        if (!fused && starts[n] > 0) {
#pragma omp barrier
#pragma omp for schedule(dynamic)
            for (long i = 0; i < starts[n] * pieces; i++)
                shrink_piece(&s, i, pieces);
#pragma omp for schedule(dynamic) nowait
            for (long task = 0; task < steps * CEIL_DIV(rows, EXPAND_ROWS); task++)
                expand_piece(&s, task, steps, expand_columns);
        }
    }
    return 0;
}

/*
 * y_j [rows, out_j] = x [rows, in] @ W_j.T (* scale_j) (+ bias_j) for layers of one kind that read the same x; then in
 * each pass, for every row t of a segment with slot s
 *
 *     y_j[t] = gain_j[s] * (y_j[t] + scale * scaling[s] * (x[t] @ A_j[s].T) @ B_j[s]) + bias_j[s]
 *
 * Of many rows, x is shrunk as it is packed, and a panel's output takes its bypasses while it is at hand: an output is
 * too large to be read again. Of few rows, it is the factors that are large: they come closer while the layers are
 * computed, which is bound by arithmetic, and are used after that.
 */
static int FN(linear)(const float *x, long rows, const linear_group *group, const lora_passes *passes,
                      float *const *ys) {
    for (long row = 0; row < rows; row += SLAB_ROWS)
        if (linear_slab(x, row, MIN(row + SLAB_ROWS, rows), group, passes, ys))
            return -1;
    return 0;
}

/* ----------------------------------------------------------------------------------------------- paged attention */

#define score_tile FN(score_tile)
#define score_rows FN(score_rows)
#define scores FN(scores)
#define value_tile FN(value_tile)
#define value_rows FN(value_rows)
#define sum_values FN(sum_values)
#define softmax FN(softmax)
#define attention_rows FN(attention_rows)
#define join FN(join)
#define join_tasks FN(join_tasks)
#define write_rows FN(write_rows)

/*
 * s[r][16 b + j] = sum_d q[d][r] * keys[b][d][j] for R rows (64 scores apart) and B key blocks. Reading a cache is
 * waiting for memory: meanwhile the blocks `ahead`, of the same size, are prefetched (here the values of these keys).
 */
INLINE void score_tile(const int R, const int B, const int kind, const float *q, long head_dim, const char *const *keys,
                       const char *const *ahead, float *s) {
    TILE(TILE_ROWS);
    vfloat row[4 * VECTORS];
    const long size = kind_bytes(kind);
    load_tile(R, B * VECTORS, acc, NULL, 0);
    for (long d = 0; d < head_dim; d++, q += R) {
        EACH(b, B)
            __builtin_prefetch(ahead[b] + d * BLOCK * size, 0, 3);
        EACH(v, B * VECTORS)
            row[v] = widen(kind, keys[v / VECTORS] + (d * BLOCK + v % VECTORS * LANES) * size);
        rank_one(R, B * VECTORS, acc, q, 1, row);
    }
    store_tile(R, B * VECTORS, acc, s, SPAN);
}

INLINE void score_rows(const int R, const int kind, const float *q, long head_dim, const char *const *keys,
                       const char *const *ahead, long blocks, float *s) {
    long b = 0;
    for (; SPAN_PANELS(R) >= 4 && blocks - b >= 4; b += 4)
        score_tile(R, 4, kind, q, head_dim, keys + b, ahead + b, s + b * BLOCK);
    for (; SPAN_PANELS(R) >= 2 && blocks - b >= 2; b += 2)
        score_tile(R, 2, kind, q, head_dim, keys + b, ahead + b, s + b * BLOCK);
    for (; b < blocks; b++)
        score_tile(R, 1, kind, q, head_dim, keys + b, ahead + b, s + b * BLOCK);
}

/* acc[r][o] += sum_j p[r][j] * values[j][o] over keys [key0, key1) of the span, for R rows and P * 16 columns. */
INLINE void value_tile(const int R, const int P, const int kind, const float *p, const char *const *blocks,
                       const char *const *ahead, long key0, long key1, long value_dim, long column, float *out) {
    TILE(TILE_ROWS);
    vfloat row[4 * VECTORS];
    const long size = kind_bytes(kind);
    load_tile(R, P * VECTORS, acc, out + column, value_dim);
    for (long j = key0; j < key1;) {
        long offset = (j % BLOCK * value_dim + column) * size;
        const char *block = blocks[j / BLOCK], *next = ahead[j / BLOCK];
        for (const long end = MIN(key1, (j / BLOCK + 1) * BLOCK); j < end; j++, offset += value_dim * size) {
            EACH(i, P)
                __builtin_prefetch(next + offset + i * PANEL * size, 0, 3);
            EACH(v, P * VECTORS)
                row[v] = widen(kind, block + offset + v * LANES * size);
            rank_one(R, P * VECTORS, acc, p + j, SPAN, row);
        }
    }
    store_tile(R, P * VECTORS, acc, out + column, value_dim);
}

INLINE void value_rows(const int R, const int kind, const float *p, const char *const *blocks, const char *const *ahead,
                       long key0, long key1, long value_dim, float *out) {
    long column = 0;
    for (; SPAN_PANELS(R) >= 4 && value_dim - column >= 4 * PANEL; column += 4 * PANEL)
        value_tile(R, 4, kind, p, blocks, ahead, key0, key1, value_dim, column, out);
    for (; SPAN_PANELS(R) >= 2 && value_dim - column >= 2 * PANEL; column += 2 * PANEL)
        value_tile(R, 2, kind, p, blocks, ahead, key0, key1, value_dim, column, out);
    for (; column < value_dim; column += PANEL)
        value_tile(R, 1, kind, p, blocks, ahead, key0, key1, value_dim, column, out);
}

#define EACH_TILE(X) X(1) X(2) X(3) X(4) X(5) X(6)
#define CASE_SCORES(R)                                                                                                 \
    case R:                                                                                                            \
        if (kind == F32)                                                                                               \
            score_rows(R, F32, q, head_dim, keys, ahead, blocks, s);                                                   \
        else                                                                                                           \
            score_rows(R, BF16, q, head_dim, keys, ahead, blocks, s);                                                  \
        break;
#define CASE_VALUES(R)                                                                                                 \
    case R:                                                                                                            \
        if (kind == F32)                                                                                               \
            value_rows(R, F32, p, blocks, ahead, key0, key1, value_dim, out);                                          \
        else                                                                                                           \
            value_rows(R, BF16, p, blocks, ahead, key0, key1, value_dim, out);                                         \
        break;

static void scores(long rows, int kind, const float *q, long head_dim, const char *const *keys,
                   const char *const *ahead, long blocks, float *s) {
    switch (rows) { EACH_TILE(CASE_SCORES) }
}

static void sum_values(long rows, int kind, const float *p, const char *const *blocks, const char *const *ahead,
                       long key0, long key1, long value_dim, float *out) {
    switch (rows) { EACH_TILE(CASE_VALUES) }
}

#undef EACH_TILE
#undef CASE_SCORES
#undef CASE_VALUES

/*
 * Turns the scores of span keys [key0, key1) into weights relative to the new maximum, 0 for the other keys of the
 * blocks they touch, and rescales the row's sums. s holds 64 scores.
 */
static void softmax(float *s, long key0, long key1, float softcap, row_softmax *row, float *acc, long value_dim) {
    const long first = key0 - key0 % BLOCK, last = CEIL_DIV(key1, BLOCK) * BLOCK;
    const vfloat hidden = splat(-__builtin_inff());
    vfloat top = splat(row->max);
    for (long j = first; j < last; j += LANES) {
        vfloat v = load(s + j);
        if (softcap > 0.0f)
            v = splat(softcap) * vtanh(v / splat(softcap));
        if (j < key0 || j + LANES > key1)
            v = select(lanes(key0 - j, key1 - j), v, hidden);
        store(s + j, v);
        top = vmax(top, v);
    }
    float max = top[0];
    for (int i = 1; i < LANES; i++)
        max = top[i] > max ? top[i] : max;
    vfloat total = splat(0.0f);
    for (long j = first; j < last; j += LANES) {
        const vfloat p = vexp(load(s + j) - splat(max));
        store(s + j, p);
        total += p;
    }
    if (max != row->max) {
        const vfloat correction = vexp(splat(row->max - max));
        row->denominator *= correction[0];
        for (long i = 0; i < value_dim; i += LANES)
            store(acc + i, load(acc + i) * correction);
        row->max = max;
    }
    row->denominator += sum(total);
}

/* Joins what a row came to over more keys to what it came to over those before. A row without keys joins nothing. */
static void join(row_softmax *row, float *sums, const row_softmax *more, const float *more_sums, long value_dim) {
    if (more->denominator == 0.0f)
        return;
    const float max = MAX(row->max, more->max);
    const vfloat old = vexp(splat(row->max - max)), new = vexp(splat(more->max - max));
    for (long i = 0; i < value_dim; i += LANES)
        store(sums + i, load(sums + i) * old + load(more_sums + i) * new);
    row->denominator = row->denominator * old[0] + more->denominator * new[0];
    row->max = max;
}

/* out = sums / denominator, for the rows of a task. */
static void write_rows(const kv_layer *cache, const attention_options *o, const attention_batch *batch, float *out,
                       long out_stride, const attention_task *task, const row_softmax *row, const float *sums) {
    const long head_dim = cache->head_dim, value_dim = CEIL_DIV(head_dim, PANEL) * PANEL,
               group = o->heads / cache->kv_heads;
    for (long r = task->row0; r < task->row1; r++, row++, sums += value_dim) {
        const long token = batch->query_start_loc[task->seq] + r / group, head = task->kv_head * group + r % group;
        for (long d = 0; d < head_dim; d++)
            out[token * out_stride + head * head_dim + d] = sums[d] / row->denominator;
    }
}

/* Query rows [row0, row1) of one sequence and KV head; row i is token i / group, head i % group of the group. */
static void attention_rows(const kv_layer *cache, const attention_options *o, const attention_batch *batch,
                           const float *q, long q_stride, float *out, long out_stride, const attention_task *task) {
    const long head_dim = cache->head_dim, value_dim = CEIL_DIV(head_dim, PANEL) * PANEL,
               group = o->heads / cache->kv_heads;
    const long rows = task->row1 - task->row0, num_tiles = CEIL_DIV(rows, TILE_ROWS);
    const long key_bytes = head_dim * BLOCK * kind_bytes(cache->kind),
               value_bytes = BLOCK * value_dim * kind_bytes(cache->kind);
    const long token0 = batch->query_start_loc[task->seq], head0 = task->kv_head * group;
    const int32_t *table = batch->block_tables + task->seq * batch->max_blocks;
    float packed[TASK_ROWS * MAX_HEAD_DIM] __attribute__((aligned(64))); /* each tile: [head_dim][rows of the tile] */
    float acc[TASK_ROWS * MAX_HEAD_DIM] __attribute__((aligned(64)));
    float own_sums[TASK_ROWS * MAX_HEAD_DIM] __attribute__((aligned(64)));
    float s[TILE_ROWS * SPAN] __attribute__((aligned(64)));
    row_softmax own_total[TASK_ROWS], state[TASK_ROWS];
    row_softmax *total = task->rows ? task->rows : own_total; /* over all parts so far; `state` and `acc`: one part */
    float *sums = task->rows ? task->sums : own_sums;
    int64_t row_low[TASK_ROWS], row_high[TASK_ROWS]; /* positions [low, high) that a row attends to */
    int64_t low = INT64_MAX, high = 0;
    for (long t = 0; t < num_tiles; t++) {
        const long first = part(rows, num_tiles, t), n = part(rows, num_tiles, t + 1) - first;
        for (long r = first; r < first + n; r++) {
            const long token = token0 + (task->row0 + r) / group, head = head0 + (task->row0 + r) % group;
            const float *source = q + token * q_stride + head * head_dim;
            for (long d = 0; d < head_dim; d++)
                packed[first * head_dim + d * n + r - first] = source[d] * o->scaling;
            const int64_t end = batch->positions[token] + 1;
            const int has_sink = o->sinks && task->later >= 0; /* as a key before all others, without a value */
            row_low[r] = o->sliding_window > 0 ? MAX(0, end - o->sliding_window) : 0;
            row_high[r] = end;
            total[r] = has_sink ? (row_softmax){o->sinks[head], 1.0f} : (row_softmax){-__builtin_inff(), 0.0f};
            low = MIN(low, row_low[r]);
            high = MAX(high, end);
        }
    }
    memset(sums, 0, rows * value_dim * sizeof(float));
    low = MAX(low, task->part0 * PART);
    high = MIN(high, task->part1 * PART);
    for (long r = 0; r < rows; r++)
        state[r] = (row_softmax){-__builtin_inff(), 0.0f};
    memset(acc, 0, rows * value_dim * sizeof(float));
    for (long span = low - low % SPAN; span < high; span += SPAN) {
        const char *keys[SPAN_BLOCKS] = {0}, *value_blocks[SPAN_BLOCKS] = {0}, *next_keys[SPAN_BLOCKS];
        for (long b = MAX(span, low) / BLOCK; b < CEIL_DIV(MIN(high, span + SPAN), BLOCK); b++) {
            const long block = (long)table[b] * cache->kv_heads + task->kv_head;
            const long next = (long)table[MIN(b + SPAN_BLOCKS, (high - 1) / BLOCK)] * cache->kv_heads + task->kv_head;
            keys[b - span / BLOCK] = (const char *)cache->keys + block * key_bytes;
            value_blocks[b - span / BLOCK] = (const char *)cache->values + block * value_bytes;
            next_keys[b - span / BLOCK] = (const char *)cache->keys + next * key_bytes;
        }
        for (long t = 0; t < num_tiles; t++) {
            const long first = part(rows, num_tiles, t), n = part(rows, num_tiles, t + 1) - first;
            long key0[TILE_ROWS], key1[TILE_ROWS]; /* of the span, per row; equal: none */
            long any0 = SPAN, any1 = 0, all0 = 0, all1 = SPAN;
            for (long r = 0; r < n; r++) {
                key0[r] = MIN(MAX(row_low[first + r] - span, 0), SPAN);
                key1[r] = MAX(MIN(row_high[first + r] - span, SPAN), key0[r]);
                if (key0[r] < key1[r]) {
                    any0 = MIN(any0, key0[r]);
                    any1 = MAX(any1, key1[r]);
                }
                all0 = MAX(all0, key0[r]);
                all1 = MIN(all1, key1[r]);
            }
            if (any0 >= any1)
                continue;
            const long block = any0 / BLOCK;
            scores(n, cache->kind, packed + first * head_dim, head_dim, keys + block, value_blocks + block,
                   CEIL_DIV(any1, BLOCK) - block, s + block * BLOCK);
            for (long r = 0; r < n; r++)
                if (key0[r] < key1[r])
                    softmax(s + r * SPAN, key0[r], key1[r], o->softcap, &state[first + r],
                            acc + (first + r) * value_dim, value_dim);
            /* Keys that every row attends to together; before and after them row by row, so that no row meets 0 * x. */
            all1 = MAX(all0, all1);
            for (long r = 0; r < n; r++)
                if (key0[r] < MIN(all0, key1[r]))
                    sum_values(1, cache->kind, s + r * SPAN, value_blocks, next_keys, key0[r], MIN(all0, key1[r]),
                               value_dim, acc + (first + r) * value_dim);
            if (all0 < all1)
                sum_values(n, cache->kind, s, value_blocks, next_keys, all0, all1, value_dim, acc + first * value_dim);
            for (long r = 0; r < n; r++)
                if (MAX(all1, key0[r]) < key1[r])
                    sum_values(1, cache->kind, s + r * SPAN, value_blocks, next_keys, MAX(all1, key0[r]), key1[r],
                               value_dim, acc + (first + r) * value_dim);
        }
        if ((span + SPAN) % PART == 0 || span + SPAN >= high) {
            for (long r = 0; r < rows; r++) {
                join(&total[r], sums + r * value_dim, &state[r], acc + r * value_dim, value_dim);
                state[r] = (row_softmax){-__builtin_inff(), 0.0f};
            }
            memset(acc, 0, rows * value_dim * sizeof(float));
        }
    }
    if (task->rows == NULL)
        write_rows(cache, o, batch, out, out_stride, task, total, sums);
}

/* Joins the parts of a task and those after it in their order, and writes what comes of it. */
static void join_tasks(const kv_layer *cache, const attention_options *o, const attention_batch *batch, float *out,
                       long out_stride, const attention_task *first) {
    const long value_dim = CEIL_DIV(cache->head_dim, PANEL) * PANEL;
    for (const attention_task *task = first + 1; task <= first + first->later; task++)
        for (long r = 0; r < task->row1 - task->row0; r++)
            join(&first->rows[r], first->sums + r * value_dim, &task->rows[r], task->sums + r * value_dim, value_dim);
    write_rows(cache, o, batch, out, out_stride, first, first->rows, first->sums);
}

/*
 * out[t, h] = softmax(scaling * q[t, h] @ K.T) @ V over the cached positions 0 .. positions[t] of the token's sequence
 * (the last `sliding_window` of them). Tasks are (sequence, KV head, rows); the late rows of a prompt, which attend to
 * most keys, come first. Where a sequence has the rows of one task, as in decoding, each part of its keys is a task of
 * its own, so that a long context is spread over the cores (flash decoding, arXiv 2311.01282, at fixed positions).
 */
static int FN(attention)(const kv_layer *cache, const attention_options *o, const attention_batch *batch,
                         const float *q, long q_stride, float *out, long out_stride) {
    const long group = o->heads / cache->kv_heads, value_dim = CEIL_DIV(cache->head_dim, PANEL) * PANEL;
    long count = 0, split_rows = 0;
    for (long s = 0; s < batch->num_seqs; s++) {
        const key_parts parts = parts_of(o, batch, s, group);
        count += cache->kv_heads * CEIL_DIV(parts.rows, TASK_ROWS) * parts.tasks;
        split_rows += parts.tasks > 1 ? cache->kv_heads * parts.rows * parts.tasks : 0;
    }
    float *sums =
        scratch(split_rows * (value_dim * sizeof *sums + sizeof(row_softmax)) + count * sizeof(attention_task));
    if (sums == NULL)
        return -1;
    row_softmax *rows = (row_softmax *)(sums + split_rows * value_dim);
    attention_task *const tasks = (attention_task *)(rows + split_rows), *next = tasks;
    for (long s = 0; s < batch->num_seqs; s++) {
        const key_parts parts = parts_of(o, batch, s, group);
        const long pieces = CEIL_DIV(parts.rows, TASK_ROWS);
        for (long i = pieces - 1; i >= 0; i--)
            for (long h = 0; h < cache->kv_heads; h++)
                for (long p = 0; p < parts.tasks; p++) {
                    *next = (attention_task){
                        .seq = s,
                        .kv_head = h,
                        .row0 = part(parts.rows, pieces, i),
                        .row1 = part(parts.rows, pieces, i + 1),
                        .part0 = parts.first + part(parts.count, parts.tasks, p),
                        .part1 = parts.first + part(parts.count, parts.tasks, p + 1),
                        .later = p == 0 ? parts.tasks - 1 : -1,
                    };
                    if (parts.tasks > 1) {
                        next->rows = rows;
                        next->sums = sums;
                        rows += parts.rows;
                        sums += parts.rows * value_dim;
                    }
                    next++;
                }
    }
#pragma omp parallel if (count > 1)
    {
#pragma omp for schedule(dynamic)
        for (long i = 0; i < count; i++)
            attention_rows(cache, o, batch, q, q_stride, out, out_stride, &tasks[i]);
        if (split_rows > 0) {
#pragma omp for schedule(static)
            for (long i = 0; i < count; i++)
                if (tasks[i].later > 0)
                    join_tasks(cache, o, batch, out, out_stride, &tasks[i]);
        }
    }
    return 0;
}

#define write_head FN(write_head)
#define to_bf16 FN(to_bf16)

/* Rounds to nearest, ties to even; NaN stays NaN. */
INLINE uint16_t to_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return f != f ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

INLINE void write_head(const int kind, char *keys, char *values, const float *k, const float *v, long offset,
                       long head_dim, long value_dim) {
    for (long d = 0; d < head_dim; d++)
        if (kind == F32) {
            ((float *)keys)[d * BLOCK + offset] = k[d];
            ((float *)values)[offset * value_dim + d] = v[d];
        } else {
            ((uint16_t *)keys)[d * BLOCK + offset] = to_bf16(k[d]);
            ((uint16_t *)values)[offset * value_dim + d] = to_bf16(v[d]);
        }
}

/* Scatters keys and values [num_tokens, kv_heads, head_dim] to positions block * 16 + offset; negative: not cached. */
static void FN(write_kv)(const kv_layer *cache, const float *k, long k_stride, const float *v, long v_stride,
                         const int64_t *slot_mapping, long num_tokens) {
    const long head_dim = cache->head_dim, value_dim = CEIL_DIV(head_dim, PANEL) * PANEL, heads = cache->kv_heads;
    const long key_bytes = head_dim * BLOCK * kind_bytes(cache->kind),
               value_bytes = BLOCK * value_dim * kind_bytes(cache->kind);
/* Every element of a key goes to a cache line of its own: a thread is worth waking for far fewer of them. */
#pragma omp parallel for collapse(2) schedule(static) if (num_tokens * heads * head_dim > SMALL / 16)
    for (long h = 0; h < heads; h++)
        for (long t = 0; t < num_tokens; t++) {
            if (slot_mapping[t] < 0)
                continue;
            const long block = slot_mapping[t] / BLOCK * heads + h, offset = slot_mapping[t] % BLOCK;
            char *keys = (char *)cache->keys + block * key_bytes, *values = (char *)cache->values + block * value_bytes;
            const float *key = k + t * k_stride + h * head_dim, *value = v + t * v_stride + h * head_dim;
            if (cache->kind == F32)
                write_head(F32, keys, values, key, value, offset, head_dim, value_dim);
            else
                write_head(BF16, keys, values, key, value, offset, head_dim, value_dim);
        }
}

/* ---------------------------------------------------------------------------------------------- small operations */

#define add_residual FN(add_residual)
#define rotate FN(rotate)
#define activate FN(activate)
#define activate_row FN(activate_row)

/* The row to normalise: x itself, or residual += x. */
INLINE const float *add_residual(const float *x, float *residual, long n) {
    if (residual == NULL)
        return x;
    for (long i = 0; i < n; i += LANES)
        store_some(residual + i, load_some(residual + i, n - i) + load_some(x + i, n - i), n - i);
    return residual;
}

/* residual += x when there is one; out = weight * r / sqrt(mean(r^2) + eps), r = residual or x; all [rows, n]. */
static void FN(rms_norm)(const float *x, float *residual, const float *weight, float eps, float *out, long rows,
                         long n) {
#pragma omp parallel for schedule(static) if (rows * n > SMALL)
    for (long row = 0; row < rows; row++) {
        const float *r = add_residual(x + row * n, residual ? residual + row * n : NULL, n);
        vfloat squares = splat(0.0f);
        for (long i = 0; i < n; i += LANES)
            squares = fma(load_some(r + i, n - i), load_some(r + i, n - i), squares);
        const vfloat scale = splat(1.0f / __builtin_sqrtf(sum(squares) / n + eps));
        for (long i = 0; i < n; i += LANES)
            store_some(out + row * n + i, load_some(weight + i, n - i) * (load_some(r + i, n - i) * scale), n - i);
    }
}

/*
 * As rms_norm, with out = weight * (r - mean(r)) / sqrt(var(r) + eps) + bias; weight and bias [weight_rows, n], used in
 * turn, may be NULL.
 */
static void FN(layer_norm)(const float *x, float *residual, const float *weight, const float *bias, long weight_rows,
                           float eps, float *out, long rows, long n) {
#pragma omp parallel for schedule(static) if (rows * n > SMALL)
    for (long row = 0; row < rows; row++) {
        const float *r = add_residual(x + row * n, residual ? residual + row * n : NULL, n);
        vfloat total = splat(0.0f), squares = splat(0.0f);
        for (long i = 0; i < n; i += LANES)
            total += load_some(r + i, n - i);
        const vfloat mean = splat(sum(total) / n);
        for (long i = 0; i < n; i += LANES) {
            const vfloat d = select(lanes(0, n - i), load_some(r + i, n - i) - mean, splat(0.0f));
            squares = fma(d, d, squares);
        }
        const vfloat scale = splat(1.0f / __builtin_sqrtf(sum(squares) / n + eps));
        const long offset = row % weight_rows * n;
        for (long i = 0; i < n; i += LANES) {
            vfloat v = (load_some(r + i, n - i) - mean) * scale;
            v = weight ? v * load_some(weight + offset + i, n - i) : v;
            v = bias ? v + load_some(bias + offset + i, n - i) : v;
            store_some(out + row * n + i, v, n - i);
        }
    }
}

/* Each pair (a, b) becomes (a cos - b sin, b cos + a sin), in place. */
INLINE void rotate(const rotary_layout *o, float *x, long heads, const float *cos, const float *sin) {
    const long pairs = o->rotary_dim / 2;
    for (long h = 0; h < heads; h++, x += o->head_dim)
        if (o->interleaved)
            for (long i = 0; i < pairs; i++) {
                const float a = x[2 * i], b = x[2 * i + 1], c = cos[i * o->step], s = sin[i * o->step];
                x[2 * i] = a * c - b * s;
                x[2 * i + 1] = b * c + a * s;
            }
        else
            for (long i = 0; i < pairs; i += LANES) {
                const long n = pairs - i;
                const vfloat a = load_some(x + i, n), b = load_some(x + pairs + i, n);
                const vfloat c = load_some(cos + i, n), s = load_some(sin + i, n);
                store_some(x + i, fma(a, c, -(b * s)), n);
                store_some(x + pairs + i, fma(b, c, a * s), n);
            }
}

/* q [num_tokens, heads, head_dim] and k [num_tokens, kv_heads, head_dim] by cos and sin [num_tokens, width]. */
static void FN(rotary)(const rotary_layout *layout, float *q, long q_stride, long heads, float *k, long k_stride,
                       long kv_heads, const float *cos, const float *sin, long num_tokens) {
    const long width = layout->width;
#pragma omp parallel for schedule(static) if (num_tokens * (heads + kv_heads) * layout->head_dim > SMALL)
    for (long t = 0; t < num_tokens; t++) {
        rotate(layout, q + t * q_stride, heads, cos + t * width, sin + t * width);
        rotate(layout, k + t * k_stride, kv_heads, cos + t * width, sin + t * width);
    }
}

/*
 * silu(x) = x / (1 + e^-x). gelu_tanh(x) = x / 2 * (1 + tanh(u)) = x / (1 + e^-2u), u = sqrt(2 / pi) * (x + 0.044715
 * x^3).
 * gelu(x) = x * Phi(x), with Phi(-|x|) = erfc(|x| / sqrt(2)) / 2 by the Chebyshev fit of Numerical Recipes (6.2), which
 * is off by 1.2e-7 of itself at most. clamped_silu(x) = x / (1 + e^(-1.702 x)), x at most 7, is gpt-oss's. sigmoid(x) =
 * 1 / (1 + e^-x).
 */
INLINE vfloat activate(const int kind, vfloat x) {
    const vfloat zero = splat(0.0f), one = splat(1.0f);
    if (kind == RELU || kind == RELU_SQUARED) {
        const vfloat positive = select((vint)(x < zero), zero, x);
        return kind == RELU ? positive : positive * positive;
    }
    if (kind == GELU) {
        const vfloat z = splat(0.70710678f) * select((vint)(x < zero), -x, x), t = one / fma(splat(0.5f), z, one);
        static const float c[] = {-0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f, -0.18628806f,
                                  0.09678418f,  0.37409196f, 1.00002368f,  -1.26551223f};
        vfloat p = splat(0.17087277f);
        EACH(i, 9)
            p = fma(p, t, splat(c[i]));
        const vfloat tail = splat(0.5f) * t * vexp(fma(-z, z, p));
        return x * select((vint)(x < zero), tail, one - tail);
    }
    if (kind == SIGMOID)
        return one / (one + vexp(-x));
    if (kind == CLAMPED_SILU) {
        x = vmin(splat(7.0f), x);
        return x / (one + vexp(splat(-1.702f) * x));
    }
    const vfloat u = kind == SILU ? x : splat(1.5957691216f) * fma(splat(0.044715f) * x * x, x, x);
    return x / (one + vexp(-u));
}

INLINE void activate_row(const int kind, const float *x, const float *up, float *out, long n) {
    for (long i = 0; i < n; i += LANES) {
        vfloat v = activate(kind, load_some(x + i, n - i));
        if (up) {
            const vfloat u = load_some(up + i, n - i);
            v *= kind == CLAMPED_SILU ? splat(1.0f) + vmin(splat(7.0f), vmax(splat(-7.0f), u)) : u;
        }
        store_some(out + i, v, n - i);
    }
}

/* out [rows, n] = activation(x), times up where it is not NULL; clamped_silu times 1 + up, that between -7 and 7. */
static void FN(activation)(int kind, const float *xs, long x_stride, const float *ups, long up_stride, float *outs,
                           long rows, long n) {
#pragma omp parallel for schedule(static) if (rows * n > SMALL / 4)
    for (long row = 0; row < rows; row++) {
        const float *x = xs + row * x_stride, *up = ups ? ups + row * up_stride : NULL;
        float *out = outs + row * n;
        switch (kind) {
        case SILU: activate_row(SILU, x, up, out, n); break;
        case GELU_TANH: activate_row(GELU_TANH, x, up, out, n); break;
        case GELU: activate_row(GELU, x, up, out, n); break;
        case RELU: activate_row(RELU, x, up, out, n); break;
        case RELU_SQUARED: activate_row(RELU_SQUARED, x, up, out, n); break;
        case CLAMPED_SILU: activate_row(CLAMPED_SILU, x, up, out, n); break;
        default: activate_row(SIGMOID, x, up, out, n);
        }
    }
}

/* y += factor * x, both [rows, n]. */
static void FN(add)(const float *x, float *y, float factor, long rows, long n) {
#pragma omp parallel for schedule(static) if (rows * n > SMALL)
    for (long row = 0; row < rows; row++)
        for (long i = row * n; i < (row + 1) * n; i += LANES) {
            const long left = (row + 1) * n - i;
            store_some(y + i, fma(splat(factor), load_some(x + i, left), load_some(y + i, left)), left);
        }
}

static const kernel_set FN(kernels) = {FN(linear),   FN(add_embedding_lora), FN(attention),
                                       FN(write_kv), FN(rms_norm),           FN(layer_norm),
                                       FN(rotary),   FN(activation),         FN(add)};

#endif
