// y = x W^T + bias for an unstructured sparse W on a CPU: SELL-C-sigma (Kreutzer et al. 2014) in blocks of inputs.
// For inference only: weights are float32 or bfloat16, x and the sums float32. It checks nothing; kernels.py does.
//
// The layout. Rows of W (outputs) are taken in groups, columns (inputs) in blocks of at most 128. Within a group and a
// block the rows are sorted by their number of nonzeros and cut into chunks of 16 neighbours, so that padding a chunk's
// rows to its longest costs little, and a loop's length changes, and is mispredicted, only from chunk to chunk. A chunk
// of length n stores values[n][16] and columns[n][16] (uint8, within the block), lane l belonging to row order[l] of
// the group. Chunks follow one another in the order group, block, chunk.
//
// The two kernels. `tile` takes T <= 64 rows of x, transposed: a block of them (at most 128 x 64 floats) stays in the
// first level cache, and a nonzero is one factor and T/16 fused multiply-adds of 16 floats that read x from it. With
// one 64-byte load and one such multiply-add a cycle, a nonzero takes T/16 cycles and the load of its factor: 4 to 5
// at T = 64, and a row of a block 4 more to add its sums to y. `single` takes one row of x: a block of it sits in
// eight registers, and vpermi2ps looks up 16 values of x at once where a gather would load them one by one; then the
// bytes of W, about 5.3 a nonzero, are the limit.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define TARGET(features) __attribute__((target(features)))
#endif

namespace {

using Index = int64_t;

constexpr Index LANES = 16;     // rows of a chunk
constexpr Index TILE = 64;      // columns of x that a kernel works on, at most
constexpr Index TOGETHER = 2;   // tiles that use a block of weights in turn while it is in the second level cache
constexpr Index TILES = 8;      // tiles whose transposed x is held at a time, a multiple of TOGETHER

struct Shape {
    Index inputs, outputs, block, group;
    Index blocks() const { return (inputs + block - 1) / block; }
    Index groups() const { return (outputs + group - 1) / group; }
    Index chunks() const { return group / LANES; }
};

// The weights from some group and block on.
template <class Value> struct Weights {
    const Value* values;
    const uint8_t* columns;
    const int16_t* order;
    const uint8_t* lengths;
};

// How weights are fetched ahead. STREAMED: past the second level cache, which keeps the sums. CACHED: into all caches,
// and a factor is spread by its own load, where STREAMED loads R factors at once and spreads them by permutes. The first
// suits AMD's Zen 5. The second takes a third to two thirds of the time on an Intel Xeon with AMX, where a streamed line
// is gone when the next rows of its chunk want it. sell.py races the two.
enum Caches { STREAMED, CACHED };

template <Caches C> inline void fetch(const void* from) { __builtin_prefetch(from, 0, C == STREAMED ? 0 : 3); }

template <int W> struct Vector { typedef float type __attribute__((vector_size(W * sizeof(float)))); };

inline float as_float(const float* value) { return *value; }

inline float as_float(const uint16_t* value) {
    const uint32_t bits = static_cast<uint32_t>(*value) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

// Room that a thread keeps between calls, on a 64-byte boundary; page faults would cost as much as the product.
class Scratch {
    std::vector<char> bytes;

public:
    float* floats(Index count) {
        const size_t needed = count * sizeof(float) + 64;
        if (bytes.size() < needed) std::vector<char>(needed).swap(bytes);
        return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(bytes.data()) + 63) & ~uintptr_t{63});
    }
};

thread_local Scratch scratch_x, scratch_y;

// y[group][T] += W x^T for one group and block; x is [block][T]. Returns the number of values of the block.
// L: floats of a register. R rows go together to hide the latency of their sums.
template <Caches C, int T, int L, class Value>
inline __attribute__((always_inline)) Index tile(Index chunks, Weights<Value> w, const float* x, float* y) {
    constexpr int W = T < L ? T : L, A = T / W, R = A >= 8 ? 1 : A >= 4 ? 2 : A >= 2 ? 4 : 8;
    typedef typename Vector<W>::type Floats;
    const Value* const begin = w.values;
    for (Index c = 0; c < chunks; c++, w.order += LANES) {
        const Index length = w.lengths[c], ahead = (length * R + LANES - 1) / LANES;
        for (Index l = 0; l < LANES; l += R) {
            // The first rows of a chunk touch all its values: fetch the next chunk's, evenly, before that.
            const Value* next = w.values + (length + l / R * ahead) * LANES;
            for (Index k = 0; k < ahead; k++) fetch<C>(next + k * LANES);
            Floats sum[R][A] = {};
            const Value* value = w.values + l;
            const uint8_t* column = w.columns + l;
            for (Index k = 0; k < length; k++, value += LANES, column += LANES) {
#pragma GCC unroll 16
                for (int r = 0; r < R; r++) {
                    const Floats* from = reinterpret_cast<const Floats*>(x + Index{column[r]} * T);
                    const float factor = as_float(value + r);
#pragma GCC unroll 16
                    for (int a = 0; a < A; a++) sum[r][a] += factor * from[a];
                }
            }
            // Added at the end: the next rows' sums do not wait for these loads from the second level cache.
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
                Floats* to = reinterpret_cast<Floats*>(y + Index{w.order[l + r]} * T);
#pragma GCC unroll 16
                for (int a = 0; a < A; a++) to[a] += sum[r][a];
            }
        }
        w.values += length * LANES;
        w.columns += length * LANES;
    }
    return w.values - begin;
}

template <class Value> using Kernel = Index (*)(Index chunks, Weights<Value>, const float* x, float* y);

template <Caches C, int T, class Value>
Index tile_generic(Index chunks, Weights<Value> w, const float* x, float* y) {
    return tile<C, T, 4>(chunks, w, x, y);
}

#if defined(__x86_64__)
template <Caches C, int T, class Value>
TARGET("avx2,fma") Index tile_avx2(Index chunks, Weights<Value> w, const float* x, float* y) {
    return tile<C, T, 8>(chunks, w, x, y);
}

#define AVX512_TARGET TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")

template <int N> AVX512_TARGET inline __m512 load(const float* values) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << N) - 1), values);
}

template <int N> AVX512_TARGET inline __m512 load(const uint16_t* values) {
    const __m256i halves = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << N) - 1), values);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

AVX512_TARGET inline __m512 spread(__m512 factors, int r) {
    return _mm512_permutexvar_ps(_mm512_set1_epi32(r), factors);
}

AVX512_TARGET inline __m512 broadcast(const float* value) { return _mm512_set1_ps(*value); }

AVX512_TARGET inline __m512 broadcast(const uint16_t* value) {
    return _mm512_castsi512_ps(_mm512_maskz_set1_epi16(0xaaaaaaaa, *value));  // the upper half of each float32
}

// As `tile`, by intrinsics: loads from x are the bottleneck, so that those of the factors count.
template <Caches C, int T, class Value>
AVX512_TARGET Index tile_avx512(Index chunks, Weights<Value> w, const float* x, float* y) {
    constexpr int A = T / 16, R = A >= 2 ? 4 : 8;
    const Value* const begin = w.values;
    for (Index c = 0; c < chunks; c++, w.order += LANES) {
        const Index length = w.lengths[c], ahead = (length * R + LANES - 1) / LANES;
        for (Index l = 0; l < LANES; l += R) {
            const Value* next = w.values + (length + l / R * ahead) * LANES;
            for (Index k = 0; k < ahead; k++) fetch<C>(next + k * LANES);
            __m512 sum[R][A] = {};
            const Value* value = w.values + l;
            const uint8_t* column = w.columns + l;
            for (Index k = 0; k < length; k++, value += LANES, column += LANES) {
                const __m512 factors = C == STREAMED ? load<R>(value) : __m512{};
#pragma GCC unroll 16
                for (int r = 0; r < R; r++) {
                    const __m512 factor = C == STREAMED ? spread(factors, r) : broadcast(value + r);
                    const float* from = x + Index{column[r]} * T;
#pragma GCC unroll 16
                    for (int a = 0; a < A; a++)
                        sum[r][a] = _mm512_fmadd_ps(factor, _mm512_load_ps(from + 16 * a), sum[r][a]);
                }
            }
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
                float* to = y + Index{w.order[l + r]} * T;
#pragma GCC unroll 16
                for (int a = 0; a < A; a++)
                    _mm512_store_ps(to + 16 * a, _mm512_add_ps(_mm512_load_ps(to + 16 * a), sum[r][a]));
            }
        }
        w.values += length * LANES;
        w.columns += length * LANES;
    }
    return w.values - begin;
}

// The same for one column x [at least 128 floats], which sits in eight registers.
template <class Value>
AVX512_TARGET Index single_avx512(Index chunks, Weights<Value> w, const float* x, float* y) {
    const Value* const begin = w.values;
    const __m512i bit5 = _mm512_set1_epi32(32), bit6 = _mm512_set1_epi32(64);
    __m512 t[8];
    for (int i = 0; i < 8; i++) t[i] = _mm512_load_ps(x + 16 * i);
    for (Index c = 0; c < chunks; c++, w.order += LANES) {
        __m512 sum = _mm512_setzero_ps();
        for (Index k = w.lengths[c]; k > 0; k--, w.values += LANES, w.columns += LANES) {
            __builtin_prefetch(w.values + 1024);  // into the next page, where the machine's own prefetching stops
            const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w.columns));
            const __m512i column = _mm512_cvtepu8_epi32(bytes);
            const __mmask16 odd = _mm512_test_epi32_mask(column, bit5), high = _mm512_test_epi32_mask(column, bit6);
            const __m512 at0 = _mm512_permutex2var_ps(t[0], column, t[1]);  // looks at the low five bits of column
            const __m512 at32 = _mm512_permutex2var_ps(t[2], column, t[3]);
            const __m512 at64 = _mm512_permutex2var_ps(t[4], column, t[5]);
            const __m512 at96 = _mm512_permutex2var_ps(t[6], column, t[7]);
            const __m512 low = _mm512_mask_mov_ps(at0, odd, at32), top = _mm512_mask_mov_ps(at64, odd, at96);
            sum = _mm512_fmadd_ps(_mm512_mask_mov_ps(low, high, top), load<16>(w.values), sum);
        }
        alignas(64) float sums[LANES];
        _mm512_store_ps(sums, sum);
#pragma GCC unroll 16
        for (int l = 0; l < LANES; l++) y[w.order[l]] += sums[l];
    }
    return w.values - begin;
}
#endif

enum Isa { GENERIC, AVX2, AVX512 };

template <Caches C, int T, class Value> Kernel<Value> of_width([[maybe_unused]] int isa) {
#if defined(__x86_64__)
    if constexpr (T >= 16)
        if (isa == AVX512) return tile_avx512<C, T, Value>;
    if (isa != GENERIC) return tile_avx2<C, T, Value>;
#endif
    return tile_generic<C, T, Value>;
}

template <Caches C, class Value> Kernel<Value> kernel(int isa, Index width) {
    switch (width) {
#if defined(__x86_64__)
        case 1: return single_avx512<Value>;
#endif
        case 4: return of_width<C, 4, Value>(isa);
        case 8: return of_width<C, 8, Value>(isa);
        case 16: return of_width<C, 16, Value>(isa);
        case 32: return of_width<C, 32, Value>(isa);
        case 48: return of_width<C, 48, Value>(isa);
        default: return of_width<C, 64, Value>(isa);
    }
}

Index tile_width(int isa, Index columns) {
    if (columns == 1 && isa == AVX512) return 1;
    for (const Index width : {4, 8, 16, 32, 48})
        if (columns <= width) return width;
    return TILE;
}

void transpose4(const float* from, Index from_stride, float* to, Index to_stride) {
#if defined(__x86_64__)
    __m128 a = _mm_loadu_ps(from), b = _mm_loadu_ps(from + from_stride);
    __m128 c = _mm_loadu_ps(from + 2 * from_stride), d = _mm_loadu_ps(from + 3 * from_stride);
    _MM_TRANSPOSE4_PS(a, b, c, d);
    _mm_storeu_ps(to, a);
    _mm_storeu_ps(to + to_stride, b);
    _mm_storeu_ps(to + 2 * to_stride, c);
    _mm_storeu_ps(to + 3 * to_stride, d);
#else
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) to[j * to_stride + i] = from[i * from_stride + j];
#endif
}

// to[columns][rows] = from[rows][columns]^T. Whichever side has the longer stride is gone through line by line, since
// its lines tend to fall into the same few places of the first level cache.
void transpose(const float* from, Index from_stride, Index rows, Index columns, float* to, Index to_stride) {
    const bool by_rows = from_stride > to_stride;
    const Index outer = by_rows ? rows : columns, inner = by_rows ? columns : rows;
    for (Index part = 0; part < inner; part += TILE) {
        const Index end = std::min(part + TILE, inner);
        for (Index o = 0; o < outer; o += 4)
            for (Index n = part; n < end; n += 4) {
                const Index i = by_rows ? o : n, j = by_rows ? n : o;
                const float* source = from + i * from_stride + j;
                float* target = to + j * to_stride + i;
                if (i + 4 <= rows && j + 4 <= columns) {
                    transpose4(source, from_stride, target, to_stride);
                } else {
                    for (Index r = 0; r < std::min(rows - i, Index{4}); r++)
                        for (Index c = 0; c < std::min(columns - j, Index{4}); c++)
                            target[c * to_stride + r] = source[r * from_stride + c];
                }
            }
    }
}

template <class Value> struct Product {
    int isa;
    Caches caches;
    Shape shape;
    const float* x;
    Index batch;
    Weights<Value> weights;
    const int64_t* starts;
    const float* bias;
    float* y;

    Index present(Index t) const { return std::min(TILE, batch - t * TILE); }
    Index width(Index t) const { return tile_width(isa, present(t)); }
    Index tile_floats() const { return (shape.blocks() * shape.block + 128) * TILE; }  // `single` reads 128 ahead

    // to[block][width] = tile t of x, transposed, from block b on; zero behind the ends.
    void take(Index t, Index b, float* to) const {
        const Index k = b * shape.block, inputs = std::clamp(shape.inputs - k, Index{0}, shape.block);
        if (present(t) < width(t) || inputs < shape.block) std::fill(to, to + shape.block * width(t), 0.0f);
        transpose(x + t * TILE * shape.inputs + k, shape.inputs, present(t), inputs, to, width(t));
    }

    // The outputs of group g for tiles `begin` to `end`, whose transposed x begin at `tiles`.
    void give(Index g, Index begin, Index end, const float* tiles, float* sums) const {
        const Index n = g * shape.group, rows = std::min(shape.group, shape.outputs - n);
        const Index tile_sums = shape.group * TILE, blocks = shape.blocks();
        for (Index t = begin; t < end; t++) {
            float* to = sums + (t - begin) * tile_sums;
            for (Index r = 0; r < shape.group; r++, to += width(t))
                std::fill(to, to + width(t), bias && r < rows ? bias[n + r] : 0.0f);
        }
        Weights<Value> w{weights.values + starts[g], weights.columns + starts[g], weights.order + n * blocks,
                         weights.lengths + n * blocks / LANES};
        for (Index b = 0; b < blocks; b++) {
            Index used = 0;
            for (Index t = begin; t < end; t++) {
                const float* from = tiles + (t - begin) * tile_floats() + b * shape.block * width(t);
                const Kernel<Value> product = caches == STREAMED ? kernel<STREAMED, Value>(isa, width(t))
                                                                 : kernel<CACHED, Value>(isa, width(t));
                used = product(shape.chunks(), w, from, sums + (t - begin) * tile_sums);
            }
            w = {w.values + used, w.columns + used, w.order + shape.group, w.lengths + shape.chunks()};
        }
        for (Index t = begin; t < end; t++)
            transpose(sums + (t - begin) * tile_sums, width(t), rows, present(t), y + t * TILE * shape.outputs + n,
                      shape.outputs);
    }

    void run([[maybe_unused]] int threads) const {
        const Index tiles = (batch + TILE - 1) / TILE, size = tile_floats();
        for (Index first = 0; first < tiles; first += TILES) {
            const Index last = std::min(first + TILES, tiles);
            float* const held = scratch_x.floats((last - first) * size);
#pragma omp parallel num_threads(threads)
            {
#pragma omp for collapse(2) schedule(static)
                for (Index t = first; t < last; t++)
                    for (Index b = 0; b < shape.blocks(); b++)
                        take(t, b, held + (t - first) * size + b * shape.block * width(t));
                float* const sums = scratch_y.floats(TOGETHER * shape.group * TILE);
#pragma omp for collapse(2) schedule(dynamic)
                for (Index t = first; t < last; t += TOGETHER)
                    for (Index g = 0; g < shape.groups(); g++)
                        give(g, t, std::min(t + TOGETHER, last), held + (t - first) * size, sums);
            }
        }
    }
};

}  // namespace

extern "C" {

int sparse_linear_best_isa() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        return AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
    return GENERIC;
}

// x [batch, inputs] and y [batch, outputs] float32 and contiguous; values float32, or bfloat16 if `bf16`; bias or null.
// caches: a number of Caches.
void sparse_linear(int isa, int caches, int threads, int bf16, Index inputs, Index outputs, Index block, Index group,
                   const float* x, Index batch, const void* values, const uint8_t* columns, const int16_t* order,
                   const uint8_t* lengths, const int64_t* starts, const float* bias, float* y) {
    const Shape shape{inputs, outputs, block, group};
    const auto run = [&](auto* weights) {
        using Value = std::remove_const_t<std::remove_pointer_t<decltype(weights)>>;
        const Weights<Value> w{weights, columns, order, lengths};
        Product<Value>{isa, Caches(caches), shape, x, batch, w, starts, bias, y}.run(threads);
    };
    if (bf16)
        run(static_cast<const uint16_t*>(values));
    else
        run(static_cast<const float*>(values));
}
}
