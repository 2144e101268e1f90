// Which n of every m neighbours are largest, for m = 2, 4, 8 and 16 and weights of two or four bytes: nm_pattern.py says
// what a mask is, nm_kernel.py calls this and checks everything.
//
// A vector holds whole groups. Turning each group by 1 to m - 1 places within it brings every weight face to face with
// every other of its group, all groups at once: m - 1 shuffles and comparisons a vector, no sort, no branch, no index.
// Keys are a float's bits without the sign, which rank as magnitudes do. For 2:4 that is less work than reading the
// weights takes, so memory sets the time. Vectors are of 16 bytes, 32 with AVX2, 64 with AVX-512; a pattern whose
// groups do not fit them is left to slower code.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#if defined(__x86_64__)
#define TARGET(features) __attribute__((target(features)))
#endif
#define INLINE __attribute__((always_inline)) inline

namespace {

using Index = int64_t;

constexpr Index CHUNK = 1 << 16;  // weights that a thread takes at a time, a multiple of every vector

template <class T, int Lanes> struct Vector { typedef T type __attribute__((vector_size(Lanes * sizeof(T)))); };

// The vector's groups of m, each turned left by `by` places.
template <int M, int By, class V, size_t... Lane> INLINE V turned(V v, std::index_sequence<Lane...>) {
    return __builtin_shufflevector(v, v, static_cast<int>((Lane & ~size_t{M - 1}) | ((Lane + By) & (M - 1)))...);
}

// 1 in the lanes whose opponent, `By` places on, comes from before them in the group: it wins where both are equal.
template <class T, int M, int Lanes, int By> INLINE typename Vector<T, Lanes>::type earlier() {
    typename Vector<T, Lanes>::type v;
    for (int i = 0; i < Lanes; i++) v[i] = i % M + By >= M;
    return v;
}

// Minus the number of others in its group that beat each key.
template <class T, int M, int Lanes, size_t... By>
INLINE auto losses(typename Vector<T, Lanes>::type keys, std::index_sequence<By...>) {
    using All = std::make_index_sequence<Lanes>;
    return ((turned<M, By + 1>(keys, All{}) > keys - earlier<T, M, Lanes, By + 1>()) + ...);
}

// kept[i] = 1 where fewer than n of its group beat weights[i], else 0, for one vector; `largest` takes in its keys.
template <class T, int M, int Lanes>
INLINE void vector(const T* weights, uint8_t* kept, int n, typename Vector<T, Lanes>::type& largest) {
    typename Vector<T, Lanes>::type keys;
    std::memcpy(&keys, weights, sizeof keys);
    keys &= std::numeric_limits<T>::max();  // all bits but the sign
    largest = largest > keys ? largest : keys;
    const auto stays = losses<T, M, Lanes>(keys, std::make_index_sequence<M - 1>{}) > static_cast<T>(-n);
    const auto bytes = __builtin_convertvector(stays & 1, typename Vector<uint8_t, Lanes>::type);
    std::memcpy(kept, &bytes, sizeof bytes);
}

// The same for `count` weights. Returns the largest key, by which NaN is found.
template <class T, int M, int Lanes> INLINE int choose(const void* from, uint8_t* kept, Index count, int n) {
    const T* const weights = static_cast<const T*>(from);
    const Index whole = count / Lanes * Lanes;
    typename Vector<T, Lanes>::type largest{};
    for (Index i = 0; i < whole; i += Lanes) vector<T, M, Lanes>(weights + i, kept + i, n, largest);
    if (whole < count) {
        T last[Lanes] = {};
        uint8_t chosen[Lanes];
        std::copy(weights + whole, weights + count, last);
        vector<T, M, Lanes>(last, chosen, n, largest);
        std::copy(chosen, chosen + (count - whole), kept + whole);
    }
    int most = 0;
    for (int i = 0; i < Lanes; i++) most = std::max<int>(most, largest[i]);
    return most;
}

using Choose = int (*)(const void*, uint8_t*, Index, int);

enum { GENERIC, AVX2, AVX512 };

// For every instruction set the same table; null where a group does not fit a vector.
#define KERNELS(NAME, WIDTH, ATTRIBUTE)                                                                     \
    template <class T, int M> ATTRIBUTE int NAME##_of(const void* from, uint8_t* kept, Index count, int n) { \
        return choose<T, M, WIDTH / sizeof(T)>(from, kept, count, n);                                        \
    }                                                                                                        \
    template <class T> Choose NAME(int m) {                                                                  \
        if (m == 2) return NAME##_of<T, 2>;                                                                  \
        if (m == 4) return NAME##_of<T, 4>;                                                                  \
        if constexpr (8 * sizeof(T) <= WIDTH)                                                                \
            if (m == 8) return NAME##_of<T, 8>;                                                              \
        if constexpr (16 * sizeof(T) <= WIDTH)                                                               \
            if (m == 16) return NAME##_of<T, 16>;                                                            \
        return nullptr;                                                                                      \
    }

KERNELS(generic, 16, )
#if defined(__x86_64__)
KERNELS(avx2, 32, TARGET("avx2"))
KERNELS(avx512, 64, TARGET("avx512f,avx512bw,avx512vl"))
#endif

template <class T> Choose kernel([[maybe_unused]] int isa, int m) {
#if defined(__x86_64__)
    if (isa == AVX512) return avx512<T>(m);
    if (isa == AVX2) return avx2<T>(m);
#endif
    return generic<T>(m);
}

Choose kernel(int isa, int bytes, int m) { return bytes == 2 ? kernel<int16_t>(isa, m) : kernel<int32_t>(isa, m); }

}  // namespace

extern "C" {

int nm_mask_best_isa() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
        return AVX512;
    if (__builtin_cpu_supports("avx2")) return AVX2;
#endif
    return GENERIC;
}

// Whether there is code for groups of m weights of `bytes` bytes (2 or 4).
int nm_mask_takes(int isa, int bytes, int m) { return kernel(isa, bytes, m) != nullptr; }

// weights [count], contiguous, count a multiple of m; kept [count] gets 0 or 1. Returns the largest key: more than that
// of infinity is a NaN.
int nm_mask(int isa, [[maybe_unused]] int threads, int bytes, int n, int m, Index count, const void* weights,
            uint8_t* kept) {
    const Choose run = kernel(isa, bytes, m);
    const char* const from = static_cast<const char*>(weights);
    int most = 0;
#pragma omp parallel for num_threads(threads) reduction(max : most) schedule(static)
    for (Index at = 0; at < count; at += CHUNK)
        most = std::max(most, run(from + at * bytes, kept + at, std::min(CHUNK, count - at), n));
    return most;
}
}
