// y = x W^T + bias for W in codes of 4 bits and x in codes of 8 bits (A8): the product of a decode step, where x has
// few rows and reading W takes the time. storage/int4.py packs W, checks everything, and has the same product in torch.
//
// W is quantized in groups of neighbouring inputs: w = (code - zero) * scale, codes from 0 to 15. x is float32 and is
// quantized here, with a scale for each row and group: x = x_code * x_scale, codes from -127 to 127.
//
//     y = sum over groups of  (sum of code * x_code  -  zero * sum of x_code) * scale * x_scale
//
// The inner sums are whole numbers, the same in any order. Outside them each float32 product and sum is rounded alone,
// group after group (-ffp-contract=off: no fused multiply-add). Every instruction set thereby gives the same bits.
//
// The layout. A block is 16 outputs, each a lane of a 64-byte register. A step is 8 inputs in 64 bytes: the 4 bytes of
// lane l hold output l's codes of inputs 0 to 3 in their lower halves and of inputs 4 to 7 in their upper halves. A
// block lies in one piece: codes [groups][steps][64], scales [groups][16] in float16, zeros [groups][16] in a byte.
// Zeros fill up groups to whole steps, blocks to whole cache lines, and W to whole blocks.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define TARGET(features) __attribute__((target(features)))
#endif
#define INLINE __attribute__((always_inline)) inline

namespace {

using Index = int64_t;

constexpr Index LANES = 16, STEP = 8, LINE = 64;  // outputs of a block, inputs of a step, bytes of a cache line

template <class To> INLINE To load(const void* from) {
    To to;
    std::memcpy(&to, from, sizeof to);
    return to;
}

struct Shape {
    Index inputs, outputs, group;
    Index groups() const { return inputs / group; }
    Index steps() const { return (group + STEP - 1) / STEP; }
    Index blocks() const { return (outputs + LANES - 1) / LANES; }
    Index scales_at() const { return groups() * steps() * LINE; }  // bytes from the beginning of a block
    Index zeros_at() const { return scales_at() + groups() * LANES * 2; }
    Index block_bytes() const { return (zeros_at() + groups() * LANES + LINE - 1) / LINE * LINE; }
};

// --- activations -----------------------------------------------------------------------------------------------------

constexpr float SMALLEST = 0x1p-64f;   // a group of x without a larger number counts as zero: 1 / x_scale is finite
constexpr float ROUNDING = 0x1.8p23f;  // float32s as large are 1 apart, so that adding this rounds, half to even

// A row of x: codes [groups][steps][8], and of each group the scale and the sum of its codes.
struct Activations {
    std::vector<int8_t> codes;
    std::vector<float> scales;
    std::vector<int32_t> sums;
};

// The largest |x|. Without the sign, a float's bits rank as the numbers do, with NaN above infinity.
float largest_magnitude(const float* x, Index count) {
    int32_t largest = 0;
    for (Index i = 0; i < count; i++) largest = std::max(largest, load<int32_t>(x + i) & 0x7fffffff);
    return load<float>(&largest);
}

// NaN and infinity have no code: their group has codes 0 and the scale NaN, and every output of the row becomes NaN.
Activations quantize(const Shape& shape, const float* x) {
    const Index groups = shape.groups(), width = shape.steps() * STEP;
    Activations row{std::vector<int8_t>(groups * width), std::vector<float>(groups), std::vector<int32_t>(groups)};
    for (Index g = 0; g < groups; g++, x += shape.group) {
        const float largest = largest_magnitude(x, shape.group);
        const bool is_finite = std::isfinite(largest);
        row.scales[g] = is_finite ? largest / 127 : NAN;
        if (!is_finite || largest < SMALLEST) continue;
        const float inverse = 127 / largest;
        int8_t* const codes = row.codes.data() + g * width;
        int32_t sum = 0;
        for (Index i = 0; i < shape.group; i++) {
            const float code = (x[i] * inverse + ROUNDING) - ROUNDING;
            codes[i] = static_cast<int8_t>(code);
            sum += static_cast<int32_t>(code);
        }
        row.sums[g] = sum;
    }
    return row;
}

// --- a block of 16 outputs for a row of x ----------------------------------------------------------------------------

typedef int32_t Ints __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64)));
typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef uint16_t Halves __attribute__((vector_size(32)));

// float16 to float32, exactly: 2^exponent times a significand of 11 bits, whose first is 1 except in the lowest binade.
INLINE Floats from_half(Ints half) {
    const Ints exponent = half >> 10 & 31, is_lowest = exponent == 0;  // -1 for true
    const Ints significand = (half & 1023) | (~is_lowest & 1024), sign = 1 - (half >> 14 & 2);
    const Ints power_of_two = (exponent - is_lowest + 102) << 23;  // as a float32's bits, biased by 127 - 25
    return load<Floats>(&power_of_two) * __builtin_convertvector(sign * significand, Floats);
}

// In plain C++, of which compilers make the machine's vectors.
INLINE void plain(const Shape& shape, const uint8_t* block, const Activations& x, float* y) {
    const uint8_t *codes = block, *scales = block + shape.scales_at(), *zeros = block + shape.zeros_at();
    const int8_t* x_codes = x.codes.data();
    Floats total{};
    for (Index g = 0; g < shape.groups(); g++, scales += 2 * LANES, zeros += LANES) {
        Ints sum{};
        for (Index s = 0; s < shape.steps(); s++, codes += LINE, x_codes += STEP) {
            const Ints pairs = load<Ints>(codes);
            for (int i = 0; i < 4; i++) {
                sum += (pairs >> (8 * i) & 15) * x_codes[i];
                sum += (pairs >> (8 * i + 4) & 15) * x_codes[4 + i];
            }
        }
        sum -= __builtin_convertvector(load<Bytes>(zeros), Ints) * x.sums[g];
        const Floats scale = from_half(__builtin_convertvector(load<Halves>(scales), Ints));
        total += __builtin_convertvector(sum, Floats) * scale * x.scales[g];
    }
    std::memcpy(y, &total, sizeof total);
}

void generic(const Shape& s, const uint8_t* block, const Activations& x, float* y) { plain(s, block, x, y); }

#if defined(__x86_64__)
TARGET("avx2")
void avx2(const Shape& s, const uint8_t* block, const Activations& x, float* y) { plain(s, block, x, y); }

// With VNNI: vpdpbusd multiplies a lane's 4 unsigned bytes by 4 signed bytes and adds the products to the lane's sum.
TARGET("avx512f,avx512bw,avx512vnni")
void vnni(const Shape& shape, const uint8_t* block, const Activations& x, float* y) {
    const uint8_t *codes = block, *scales = block + shape.scales_at(), *zeros = block + shape.zeros_at();
    const int8_t* x_codes = x.codes.data();
    const Index next = shape.block_bytes();  // the next block is fetched meanwhile: the machine stops at a page's end
    const __m512i lower_half = _mm512_set1_epi8(15);
    __m512 total = _mm512_setzero_ps();
    for (Index g = 0; g < shape.groups(); g++, scales += 2 * LANES, zeros += LANES) {
        __m512i first = _mm512_setzero_si512(), second = first;  // two sums, neither of which waits for the other
        for (Index s = 0; s < shape.steps(); s++, codes += LINE, x_codes += STEP) {
            __builtin_prefetch(codes + next);
            const __m512i pairs = _mm512_loadu_si512(codes);
            const __m512i low = _mm512_and_si512(pairs, lower_half);
            const __m512i high = _mm512_and_si512(_mm512_srli_epi16(pairs, 4), lower_half);
            first = _mm512_dpbusd_epi32(first, low, _mm512_set1_epi32(load<int32_t>(x_codes)));
            second = _mm512_dpbusd_epi32(second, high, _mm512_set1_epi32(load<int32_t>(x_codes + 4)));
        }
        __builtin_prefetch(scales + next);
        __builtin_prefetch(zeros + next);
        const __m512i zero = _mm512_cvtepu8_epi32(load<__m128i>(zeros));
        const __m512i part_of_zero = _mm512_mullo_epi32(zero, _mm512_set1_epi32(x.sums[g]));
        const __m512i sum = _mm512_sub_epi32(_mm512_add_epi32(first, second), part_of_zero);
        const __m512 scale = _mm512_cvtph_ps(load<__m256i>(scales));
        const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale);
        total = _mm512_add_ps(total, _mm512_mul_ps(scaled, _mm512_set1_ps(x.scales[g])));
    }
    _mm512_storeu_ps(y, total);
}

enum { GENERIC, AVX2, AVX512 };
#endif

}  // namespace

extern "C" {

int int4_linear_best_isa() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vnni")) return AVX512;
    if (__builtin_cpu_supports("avx2")) return AVX2;
#endif
    return 0;
}

// x [rows, inputs] and y [rows, outputs] float32 and contiguous; weight [blocks][block_bytes]; bias [outputs] or null.
void int4_linear([[maybe_unused]] int isa, [[maybe_unused]] int threads, Index inputs, Index outputs, Index group,
                 Index rows, const float* x, const uint8_t* weight, const float* bias, float* y) {
    const Shape shape{inputs, outputs, group};
    auto product = generic;
#if defined(__x86_64__)
    if (isa != GENERIC) product = isa == AVX512 ? vnni : avx2;
#endif
    std::vector<Activations> quantized;
    for (Index r = 0; r < rows; r++) quantized.push_back(quantize(shape, x + r * inputs));
#pragma omp parallel for num_threads(threads) schedule(static)
    for (Index b = 0; b < shape.blocks(); b++) {
        const Index first = b * LANES, last = std::min(first + LANES, outputs);
        for (Index r = 0; r < rows; r++) {  // from the second row on, the block is in the first level cache
            float sums[LANES];
            product(shape, weight + b * shape.block_bytes(), quantized[r], sums);
            for (Index o = first; o < last; o++) y[r * outputs + o] = sums[o - first] + (bias ? bias[o] : 0.0f);
        }
    }
}
}
