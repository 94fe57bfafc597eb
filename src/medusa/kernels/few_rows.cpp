// Linear maps of a few rows on a CPU: y = x W^T + b for the 1 to 64 tokens of a decoding step.
//
// A step reads every weight once, so its time is that of reading them. Weights stay where they are, in the layout of nn.Linear
// ((N, K), row-major): nothing is packed or copied. Maps of one input (query, key, value) run as one, since entering a parallel
// region for each costs as much as reading a small matrix.
//
// Exactness: every output is one dot product, accumulated in an order that depends on K alone. A token's result is therefore
// the same bit for bit whether it is computed alone or among the nodes of a tree.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>
#endif

namespace {

using at::BFloat16;
using at::Tensor;

// A dot product of each kind: `step` elements are multiplied and added to a group of lanes (`Sum`) at a time, and sixteen groups
// are reduced to sixteen results at once, each by the same tree of additions.

#if defined(__AVX512F__)
__m512 pairs(__m512 a, __m512 b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); }
__m512 fours(__m512 a, __m512 b) {
  const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)), _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
}
__m512 quarters(__m512 a, __m512 b) { return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd)); }
__m512i pairs(__m512i a, __m512i b) { return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b)); }
__m512i fours(__m512i a, __m512i b) { return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b)); }
__m512i quarters(__m512i a, __m512i b) {
  return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
}
#endif

struct Bf16 {
  using Input = BFloat16;
  using Weight = BFloat16;
  using Result = float;
#if defined(__AVX512BF16__)
  using Sum = __m512;
  static constexpr int step = 32;
  static Sum zero() { return _mm512_setzero_ps(); }
  static __m512bh load(const BFloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static __m512bh load(const BFloat16* p, int left) { return (__m512bh)_mm512_maskz_loadu_epi16((1u << left) - 1, p); }
  static Sum add(Sum sum, __m512bh x, __m512bh w) { return _mm512_dpbf16_ps(sum, x, w); }
  static void reduce(const Sum (&s)[16], float* to) {
    __m512 four[4];
    for (int i = 0; i < 4; ++i) four[i] = fours(pairs(s[4 * i], s[4 * i + 1]), pairs(s[4 * i + 2], s[4 * i + 3]));
    _mm512_storeu_ps(to, quarters(quarters(four[0], four[1]), quarters(four[2], four[3])));
  }
#else
  struct Sum {
    float lane[16];
  };
  using Part = Sum;
  static constexpr int step = 16;
  static Sum zero() { return {}; }
  static Part load(const BFloat16* p, int left = step) {
    Part part{};
    for (int i = 0; i < left; ++i) part.lane[i] = float(p[i]);
    return part;
  }
  static Sum add(Sum sum, const Part& x, const Part& w) {
    for (int i = 0; i < step; ++i) sum.lane[i] += x.lane[i] * w.lane[i];
    return sum;
  }
  static void reduce(const Sum (&s)[16], float* to) {
    for (int i = 0; i < 16; ++i) {
      to[i] = 0;
      for (float lane : s[i].lane) to[i] += lane;
    }
  }
#endif
};

// Inputs are unsigned (128 is zero), as the instruction wants them; the sum of a row's weights corrects for it.
struct Int8 {
  using Input = uint8_t;
  using Weight = int8_t;
  using Result = int32_t;
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
  using Sum = __m512i;
  static constexpr int step = 64;
  static Sum zero() { return _mm512_setzero_si512(); }
  static __m512i load(const void* p) { return _mm512_loadu_si512(p); }
  static __m512i load(const void* p, int left) { return _mm512_maskz_loadu_epi8((1ull << left) - 1, p); }
  static Sum add(Sum sum, __m512i x, __m512i w) { return _mm512_dpbusd_epi32(sum, x, w); }
  static void reduce(const Sum (&s)[16], int32_t* to) {
    __m512i four[4];
    for (int i = 0; i < 4; ++i) four[i] = fours(pairs(s[4 * i], s[4 * i + 1]), pairs(s[4 * i + 2], s[4 * i + 3]));
    _mm512_storeu_si512(to, quarters(quarters(four[0], four[1]), quarters(four[2], four[3])));
  }
#else
  using Sum = int32_t;
  struct Part {
    int16_t lane[32];
  };
  static constexpr int step = 32;
  static Sum zero() { return 0; }
  template <typename T>
  static Part load(const T* p, int left = step) {
    Part part{};
    for (int i = 0; i < left; ++i) part.lane[i] = p[i];
    return part;
  }
  static Sum add(Sum sum, const Part& x, const Part& w) {
    for (int i = 0; i < step; ++i) sum += int32_t(x.lane[i]) * w.lane[i];
    return sum;
  }
  static void reduce(const Sum (&s)[16], int32_t* to) { std::copy(s, s + 16, to); }
#endif
};

// The rows of a matrix; a slice of a wider one has them further apart than they are long.
template <typename Value>
struct Rows {
  const Value* first;
  int64_t apart;
  const Value* at(int64_t n) const { return first + n * apart; }
  Rows from(int64_t n) const { return {at(n), apart}; }
};

template <typename Value>
Rows<Value> rows_of(const Tensor& matrix) {
  return {matrix.const_data_ptr<Value>(), matrix.stride(0)};
}

// The dot products of M inputs with 16 / M rows of weights: sixteen groups of lanes fit the registers, beside what is loaded.
// Beyond the last input or weight (`inputs`, `rows` left), the last is computed again and not stored. Of the weights that come
// sixteen rows later, `ahead` rows are fetched, from row `skipped` on: rows are too short for the hardware to see a stream.
template <typename Dot, int M, int ahead, typename Store>
void tile(
    const typename Dot::Input* x, const Rows<typename Dot::Weight>& w, int64_t K, int64_t inputs, int64_t rows, int64_t skipped,
    const Store& store) {
  constexpr int N = 16 / M;
  const typename Dot::Weight* later = w.at(16 + skipped);
  const typename Dot::Input* from[M];
  const typename Dot::Weight* row[N];
  for (int m = 0; m < M; ++m) from[m] = x + std::min<int64_t>(m, inputs - 1) * K;
  for (int n = 0; n < N; ++n) row[n] = w.at(std::min<int64_t>(n, rows - 1));
  typename Dot::Sum sums[16];
  for (auto& sum : sums) sum = Dot::zero();
  int64_t k = 0;
  for (; k + Dot::step <= K; k += Dot::step) {
    decltype(Dot::load(w.first)) parts[N];
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) parts[n] = Dot::load(row[n] + k);
#pragma GCC unroll 16
    for (int n = 0; n < ahead; ++n) __builtin_prefetch(later + n * w.apart + k);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const auto input = Dot::load(from[m] + k);
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) sums[m * N + n] = Dot::add(sums[m * N + n], input, parts[n]);
    }
  }
  if (const int left = int(K - k))
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n)
        sums[m * N + n] = Dot::add(sums[m * N + n], Dot::load(from[m] + k, left), Dot::load(row[n] + k, left));
  typename Dot::Result results[16];
  Dot::reduce(sums, results);
  for (int m = 0; m < std::min<int64_t>(M, inputs); ++m) {
    if (rows >= N) store(m, std::integral_constant<int, N>(), results + m * N);
    else store(m, int(rows), results + m * N);
  }
}

// Up to M inputs with up to 16 rows of the weights.
template <typename Dot, int M, int ahead, typename Store>
void block(
    const typename Dot::Input* x, const Rows<typename Dot::Weight>& w, int64_t K, int64_t inputs, int64_t rows, int64_t skipped,
    const Store& store) {
  constexpr int N = 16 / M;
  for (int64_t n = 0; n < rows; n += N)
    tile<Dot, M, ahead>(x, w.from(n), K, inputs, rows - n, skipped, [&](int m, auto count, const auto* results) {
      store(m, n, count, results);
    });
}

// M inputs with rows [begin, end) of the weights, sixteen at a time, which stay in the nearest cache for all inputs. Every group
// of four inputs fetches a part of the next sixteen, so that memory is read throughout, not only while the first group runs.
template <typename Dot, typename Store>
void range(
    const typename Dot::Input* x, const Rows<typename Dot::Weight>& w, int64_t M, int64_t K, int64_t begin, int64_t end,
    const Store& store) {
  const int64_t share = M <= 4 ? 4 : M <= 12 ? 2 : 1;
  for (int64_t from = begin; from < end; from += 16) {
    const int64_t rows = std::min<int64_t>(end - from, 16);
    for (int64_t m = 0; m < M; m += 4) {
      const auto at = [&](int i, int64_t n, auto count, const auto* results) { store(m + i, from + n, count, results); };
      const int64_t left = M - m, skipped = m / 4 * share;
      const auto run = [&](auto inputs, auto ahead) {
        constexpr int many = decltype(inputs)::value, fetched = decltype(ahead)::value;
        block<Dot, many, fetched>(x + m * K, w.from(from), K, left, rows, skipped, at);
      };
      using std::integral_constant;
      if (M == 1) run(integral_constant<int, 1>(), integral_constant<int, 16>());
      else if (M == 2) run(integral_constant<int, 2>(), integral_constant<int, 8>());
      else if (skipped >= 4) run(integral_constant<int, 4>(), integral_constant<int, 0>());
      else if (share == 4) run(integral_constant<int, 4>(), integral_constant<int, 4>());
      else if (share == 2) run(integral_constant<int, 4>(), integral_constant<int, 2>());
      else run(integral_constant<int, 4>(), integral_constant<int, 1>());
    }
  }
}

// Results in the dtype of the inputs.
template <typename Count>
void narrow(const float* from, Count count, BFloat16* to) {
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
  if constexpr (std::is_same_v<Count, std::integral_constant<int, 4>>) {
    const __m128bh four = _mm_cvtneps_pbh(_mm_loadu_ps(from));
    std::memcpy(to, &four, 8);
    return;
  }
  if constexpr (std::is_same_v<Count, std::integral_constant<int, 8>>) {
    const __m128bh eight = _mm256_cvtneps_pbh(_mm256_loadu_ps(from));
    std::memcpy(to, &eight, 16);
    return;
  }
  if constexpr (std::is_same_v<Count, std::integral_constant<int, 16>>) {
    const __m256bh sixteen = _mm512_cvtneps_pbh(_mm512_loadu_ps(from));
    std::memcpy(to, &sixteen, 32);
    return;
  }
#endif
  for (int j = 0; j < count; ++j) to[j] = BFloat16(from[j]);
}

template <typename Count>
void narrow(const float* from, Count count, float* to) {
  for (int j = 0; j < count; ++j) to[j] = from[j];
}

// Vectors of GCC and Clang, for any processor.
constexpr int lanes = 16;
using Lanes = float __attribute__((vector_size(4 * lanes)));
using Whole = int32_t __attribute__((vector_size(4 * lanes)));
using Half = uint16_t __attribute__((vector_size(2 * lanes)));
using Doubles = double __attribute__((vector_size(8 * lanes)));

template <typename To, typename From>
To vector_at(const From* p) {
  To found;
  std::memcpy(&found, p, sizeof found);
  return found;
}

Lanes widened(const BFloat16* p) { return (Lanes)(__builtin_convertvector(vector_at<Half>(p), Whole) << 16); }

// Minus zero changes nothing, not even the sign of a zero.
Lanes every(float value) { return value - Lanes{}; }

// a * b + c, the same wherever it is called: the compiler is not free to fuse some and not others.
Lanes fused(Lanes a, Lanes b, Lanes c) {
#if defined(__AVX512F__)
  return (Lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  return a * b + c;
#endif
}

// e^x to the last bits of float32; 0 below e^-87.
Lanes exponential(Lanes x) {
  const Lanes least = every(-87.f), power = (x < least ? least : x) * 1.44269504f;
  const Lanes whole = (power + 12582912.f) - 12582912.f;  // rounded: such large numbers have no fraction
  const Lanes part = (power - whole) * 0.69314718f;
  Lanes series = every(1.f / 720);
  for (float factor : {1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f}) series = fused(series, part, every(factor));
  const Lanes scale = (Lanes)((__builtin_convertvector(whole, Whole) + 127) << 23);
  return x < least ? Lanes{} : series * scale;
}

void narrow(Lanes value, int64_t count, BFloat16* to) {
  float from[lanes];
  std::memcpy(from, &value, sizeof from);
  if (count >= lanes) narrow(from, std::integral_constant<int, lanes>(), to);
  else narrow(from, count, to);
}

Lanes rounded(Lanes value) {
  BFloat16 to[lanes];
  narrow(value, lanes, to);
  return widened(to);
}

// Up to sixteen elements; the rest are zeros.
Lanes widened(const BFloat16* p, int64_t count) {
  if (count >= lanes) return widened(p);
  BFloat16 held[lanes] = {};
  std::copy(p, p + count, held);
  return widened(held);
}

// Every row of x, or of the sum of x and what is added to it, over its root mean square and times `scale` (RMSNorm). Everything
// that has a name in the model is rounded as it is there.
void normalize(
    const BFloat16* x, const BFloat16* added, const BFloat16* scale, float eps, int64_t M, int64_t K, BFloat16* sum, BFloat16* to) {
  for (int64_t m = 0; m < M; ++m, x += K, to += K) {
    Lanes squares{};
    for (int64_t k = 0; k < K; k += lanes) {
      Lanes value = widened(x + k, K - k);
      if (added) {
        value = value + widened(added + m * K + k, K - k);
        narrow(value, K - k, sum + m * K + k);
        value = rounded(value);
      }
      squares = fused(value, value, squares);
    }
    float total = 0;
    for (int i = 0; i < lanes; ++i) total += squares[i];
    const Lanes inverse = every(1.f / std::sqrt(total / float(K) + eps));
    const BFloat16* whole = added ? sum + m * K : x;
    for (int64_t k = 0; k < K; k += lanes)
      narrow(rounded(widened(whole + k, K - k) * inverse) * widened(scale + k, K - k), K - k, to + k);
  }
}

// silu(y) * up, in place of y, for M rows of `width` elements.
void gate(BFloat16* y, int64_t apart, const BFloat16* up, int64_t M, int64_t width) {
  for (int64_t m = 0; m < M; ++m, y += apart, up += width)
    for (int64_t n = 0; n < width; n += lanes) {
      const Lanes value = widened(y + n, width - n), most = every(88.f), minus = -value;
      const Lanes silu = value / (exponential(minus > most ? most : minus) + 1.f);
      narrow(rounded(silu) * widened(up + n, width - n), width - n, y + n);
    }
}

// The rows of several matrices, end to end, are divided among the threads.
template <typename Work>
void divide(at::TensorList weights, const Work& work) {
  std::vector<int64_t> starts{0};
  for (const Tensor& weight : weights) starts.push_back(starts.back() + weight.size(0));
  const int64_t chunk = 16, chunks = (starts.back() + chunk - 1) / chunk;
  at::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    const int64_t from = first * chunk, to = std::min(last * chunk, starts.back());
    for (size_t i = 0; i < weights.size(); ++i) {
      const int64_t begin = std::max(from, starts[i]), end = std::min(to, starts[i + 1]);
      if (begin < end) work(i, begin - starts[i], end - starts[i]);
    }
  });
}

// What a map does besides: before it, inputs are added to and normalised; after it, the first of two is the gate of the second.
struct Around {
  bool gated = false;
  std::optional<Tensor> added{}, scale{};
  double eps = 0;
};

// The inputs of maps and where their outputs go: one tensor for each map, or for both of a gated one, then the sum of the inputs.
template <typename Value>
struct Maps {
  const int64_t K, M;
  std::vector<Tensor> outputs;
  Tensor input;

  Maps(const Tensor& x, at::TensorList weights, const Around& around) : K(x.size(-1)), M(x.numel() / K), input(x.contiguous()) {
    for (const Tensor& weight : around.gated ? weights.slice(0, 1) : weights) {
      auto sizes = x.sizes().vec();
      sizes.back() = weight.size(0);
      outputs.push_back(at::empty(sizes, x.options()));
    }
    if constexpr (std::is_same_v<Value, BFloat16>) {
      if (!around.scale) return;
      const Tensor given = input;
      input = at::empty_like(given);
      Tensor more;
      if (around.added) {
        more = around.added->contiguous();
        outputs.push_back(at::empty_like(given));
      }
      normalize(
          given.const_data_ptr<Value>(), around.added ? more.const_data_ptr<Value>() : nullptr,
          around.scale->template const_data_ptr<Value>(), float(around.eps), M, K,
          around.added ? outputs.back().template mutable_data_ptr<Value>() : nullptr, input.template mutable_data_ptr<Value>());
    }
  }

  // Runs `map(number of the map, begin, end, y, distance of the rows of y)` for all rows of the weights, and what comes after.
  template <typename Map>
  std::vector<Tensor> run(at::TensorList weights, bool gated, const Map& map) {
    divide(gated ? weights.slice(0, 1) : weights, [&](size_t i, int64_t begin, int64_t end) {
      const int64_t N = weights[i].size(0);
      Value* y = outputs[i].template mutable_data_ptr<Value>() + begin;
      map(i, begin, end, y, N);
      if constexpr (std::is_same_v<Value, BFloat16>) {
        if (!gated) return;
        std::vector<Value> up(M * (end - begin));
        map(1, begin, end, up.data(), end - begin);
        gate(y, N, up.data(), M, end - begin);
      }
    });
    return std::move(outputs);
  }
};

// The bias of a map; none of the maps has one, or all have.
template <typename Value>
const Value* bias_of(at::TensorList biases, size_t i) {
  return biases.empty() ? nullptr : biases[i].const_data_ptr<Value>();
}

std::vector<Tensor> linear(
    const Tensor& x, at::TensorList weights, at::TensorList biases, bool gated, const std::optional<Tensor>& added,
    const std::optional<Tensor>& scale, double eps) {
  Maps<BFloat16> maps(x, weights, {gated, added, scale, eps});
  const auto* input = maps.input.const_data_ptr<BFloat16>();
  return maps.run(weights, gated, [&](size_t i, int64_t begin, int64_t end, BFloat16* y, int64_t apart) {
    const BFloat16* bias = bias_of<BFloat16>(biases, i);
    range<Bf16>(
        input, rows_of<BFloat16>(weights[i]), maps.M, maps.K, begin, end,
        [&](int64_t m, int64_t n, auto count, const float* sums) {
          float results[16];
          for (int j = 0; j < count; ++j) results[j] = bias ? sums[j] + float(bias[n + j]) : sums[j];
          narrow(results, count, y + m * apart + n - begin);
        });
  });
}

// x (B, M, K) times chosen rows (B, R) of the weights: the scores of a shortlist.
Tensor linear_rows(const Tensor& x, const Tensor& weight, const Tensor& rows) {
  const Tensor input = x.contiguous(), chosen = rows.contiguous();
  const int64_t B = x.size(0), M = x.size(1), K = x.size(2), R = rows.size(1), chunks = (R + 15) / 16;
  Tensor output = at::empty({B, M, R}, x.options());
  const Rows<BFloat16> all = rows_of<BFloat16>(weight);
  at::parallel_for(0, B * chunks, 1, [&](int64_t begin, int64_t end) {
    std::vector<BFloat16> held(16 * K);  // one behind the other
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / chunks, first = unit % chunks * 16, count = std::min<int64_t>(R - first, 16);
      const int64_t* row = chosen.const_data_ptr<int64_t>() + b * R + first;
      for (int64_t n = 0; n < count; ++n) std::memcpy(held.data() + n * K, all.at(row[n]), K * sizeof(BFloat16));
      BFloat16* y = output.mutable_data_ptr<BFloat16>() + b * M * R + first;
      range<Bf16>(
          input.const_data_ptr<BFloat16>() + b * M * K, {held.data(), K}, M, K, 0, count,
          [&](int64_t m, int64_t n, auto many, const float* sums) { narrow(sums, many, y + m * R + n); });
    }
  });
  return output;
}

// The bits of a number without its sign, which are ordered as the numbers are.
uint32_t magnitude(BFloat16 value) { return uint32_t(value.x & 0x7fff) << 16; }
uint32_t magnitude(float value) { return std::bit_cast<uint32_t>(value) & 0x7fffffff; }

// Each input row scaled to its own largest value: it depends on that row alone.
template <typename Value>
void quantize(const Value* x, int64_t M, int64_t K, uint8_t* to, float* scales) {
  for (int64_t m = 0; m < M; ++m) {
    const Value* row = x + m * K;
    uint32_t bits = 0;
    for (int64_t k = 0; k < K; ++k) bits = std::max(bits, magnitude(row[k]));
    const float most = std::bit_cast<float>(bits), inverse = most > 0 ? 127.f / most : 0.f;
    for (int64_t k = 0; k < K; ++k) to[m * K + k] = uint8_t(int(std::nearbyint(float(row[k]) * inverse)) + 128);
    scales[m] = most / 127.f;
  }
}

template <typename Value>
std::vector<Tensor> quantized_linear(
    const Tensor& x, at::TensorList weights, at::TensorList scales, at::TensorList offsets, at::TensorList biases,
    const Around& around) {
  Maps<Value> maps(x, weights, around);
  std::vector<uint8_t> quantized(maps.M * maps.K);
  std::vector<float> sizes(maps.M);
  quantize(maps.input.template const_data_ptr<Value>(), maps.M, maps.K, quantized.data(), sizes.data());
  return maps.run(weights, around.gated, [&](size_t i, int64_t begin, int64_t end, Value* y, int64_t apart) {
    const float* scale = scales[i].const_data_ptr<float>();
    const int32_t* offset = offsets[i].const_data_ptr<int32_t>();
    const float* bias = bias_of<float>(biases, i);
    range<Int8>(
        quantized.data(), rows_of<int8_t>(weights[i]), maps.M, maps.K, begin, end,
        [&](int64_t m, int64_t n, auto count, const int32_t* sums) {
          float results[16];
          for (int j = 0; j < count; ++j) {
            results[j] = float(sums[j] - offset[n + j]) * scale[n + j] * sizes[m];
            if (bias) results[j] += bias[n + j];
          }
          narrow(results, count, y + m * apart + n - begin);
        });
  });
}

// Weights are int8 with a scale for each row; `offsets` are 128 times the sum of each row. Biases are float32.
std::vector<Tensor> linear_int8(
    const Tensor& x, at::TensorList weights, at::TensorList scales, at::TensorList offsets, at::TensorList biases, bool gated,
    const std::optional<Tensor>& added, const std::optional<Tensor>& scale, double eps) {
  const auto map = x.scalar_type() == at::kFloat ? quantized_linear<float> : quantized_linear<BFloat16>;
  return map(x, weights, scales, offsets, biases, {gated, added, scale, eps});
}

// The same bits, in memory: see `fusion.compute_once`.
Tensor computed(const Tensor& x) { return x.clone(); }

// Softmax of a row of scores, whose width is a multiple of the lanes. The sum is in double precision: a node of a tree has its
// path in other slots, hence other lanes, than the same tokens have in plain decoding, and must get the same sum.
void softmax(float* row, int64_t width) {
  Lanes most = every(-INFINITY);
  Doubles sum{};
  for (int64_t s = 0; s < width; s += lanes) {
    const Lanes here = vector_at<Lanes>(row + s);
    most = most > here ? most : here;
  }
  float top = most[0];
  for (int i = 1; i < lanes; ++i) top = std::max(top, most[i]);
  for (int64_t s = 0; s < width; s += lanes) {
    const Lanes weight = exponential(vector_at<Lanes>(row + s) - top);
    sum += __builtin_convertvector(weight, Doubles);
    std::memcpy(row + s, &weight, sizeof weight);
  }
  double total = 0;
  for (int i = 0; i < lanes; ++i) total += sum[i];
  for (int64_t s = 0; s < width; s += lanes) {
    const Lanes share = vector_at<Lanes>(row + s) / float(total);
    std::memcpy(row + s, &share, sizeof share);
  }
}

// R rows of probabilities, `width` apart, times C lanes of columns of the values, (S, D); the rows of `y` are `apart`.
template <int R, int C>
void weigh(const float* p, int64_t width, const BFloat16* values, int64_t S, int64_t D, BFloat16* y, int64_t apart) {
  Lanes sum[R][C] = {};
  for (int64_t s = 0; s < S; ++s) {
    Lanes value[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) value[c] = widened(values + s * D + c * lanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Lanes weight = every(p[r * width + s]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sum[r][c] = fused(weight, value[c], sum[r][c]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) narrow(sum[r][c], lanes, y + r * apart + c * lanes);
}

// Probabilities (M, S) times values (S, D), up to eight rows and two groups of lanes at a time.
void weigh(
    const float* p, int64_t width, const BFloat16* values, int64_t M, int64_t S, int64_t D, BFloat16* y, int64_t apart) {
  for (int64_t m = 0, rows; m < M; m += rows) {
    rows = M - m >= 8 ? 8 : M - m >= 2 ? 2 : 1;
    const float* from = p + m * width;
    BFloat16* to = y + m * apart;
    const auto run = [&](auto R) {
      constexpr int many = decltype(R)::value;
      int64_t d = 0;
      for (; d + 2 * lanes <= D; d += 2 * lanes) weigh<many, 2>(from, width, values + d, S, D, to + d, apart);
      for (; d + lanes <= D; d += lanes) weigh<many, 1>(from, width, values + d, S, D, to + d, apart);
      for (; d < D; ++d)
        for (int r = 0; r < many; ++r) {
          float sum = 0;
          for (int64_t s = 0; s < S; ++s) sum += from[r * width + s] * float(values[s * D + d]);
          to[r * apart + d] = BFloat16(sum);
        }
    };
    if (rows == 8) run(std::integral_constant<int, 8>());
    else if (rows == 2) run(std::integral_constant<int, 2>());
    else run(std::integral_constant<int, 1>());
  }
}

// The number of slots up to the last that any of M rows of an additive mask allows, rounded up to the lanes: a cache has room for
// what is yet to come.
int64_t slots_seen(const BFloat16* mask, int64_t apart, int64_t M, int64_t S) {
  constexpr uint16_t lowest = 0xff7f;  // and minus infinity is one more
  int64_t seen = 0;
  for (int64_t m = 0; m < M; ++m)
    for (int64_t from = (S - 1) / lanes * lanes; from >= seen; from -= lanes) {
      bool any = false;
      for (int64_t s = from; s < std::min(from + lanes, S); ++s) any |= uint16_t(mask[m * apart + s].x - lowest) > 1;
      if (any) seen = from + lanes;
    }
  return std::min(std::max(seen, int64_t(lanes)), S);
}

// Attention of a few queries (B, H, M, D) to the cache (B, G, S, D), H a multiple of G, under an additive mask (B, 1 or H, M, S).
// Keys and values are read in place; heads that share them need no copies. The result is laid out as (B, M, H, D), as it is read.
Tensor attention(const Tensor& queries, const Tensor& keys, const Tensor& values, const Tensor& mask, double scale) {
  const int64_t B = queries.size(0), H = queries.size(1), M = queries.size(2), D = queries.size(3), S = keys.size(2);
  const int64_t share = H / keys.size(1), most = (S + lanes - 1) / lanes * lanes;
  const Tensor q = queries.stride(3) == 1 ? queries : queries.contiguous();
  Tensor output = at::empty({B, M, H, D}, q.options());
  at::parallel_for(0, B * H, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scores(M * most);
    std::vector<BFloat16> asked(M * D);  // a head's queries, end to end
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / H, h = unit % H, g = h / share;
      const BFloat16* k = keys.const_data_ptr<BFloat16>() + b * keys.stride(0) + g * keys.stride(1);
      const BFloat16* v = values.const_data_ptr<BFloat16>() + b * values.stride(0) + g * values.stride(1);
      const BFloat16* added = mask.const_data_ptr<BFloat16>() + b * mask.stride(0) + (mask.size(1) > 1 ? h * mask.stride(1) : 0);
      const int64_t seen = slots_seen(added, mask.stride(2), M, S), width = (seen + lanes - 1) / lanes * lanes;
      const BFloat16* own = q.const_data_ptr<BFloat16>() + b * q.stride(0) + h * q.stride(1);
      for (int64_t m = 0; m < M; ++m) std::memcpy(asked.data() + m * D, own + m * q.stride(2), D * sizeof(BFloat16));
      range<Bf16>(asked.data(), {k, D}, M, D, 0, seen, [&](int64_t m, int64_t n, auto count, const float* sums) {
        for (int j = 0; j < count; ++j) scores[m * width + n + j] = sums[j] * float(scale);
      });
      for (int64_t m = 0; m < M; ++m) {
        float* row = scores.data() + m * width;
        const BFloat16* add = added + m * mask.stride(2);
        for (int64_t s = 0; s < seen; s += lanes) {
          const Lanes sum = vector_at<Lanes>(row + s) + widened(add + s, seen - s);
          std::memcpy(row + s, &sum, sizeof sum);
        }
        std::fill(row + seen, row + width, -INFINITY);
        softmax(row, width);
      }
      BFloat16* y = output.mutable_data_ptr<BFloat16>() + (b * M * H + h) * D;
      weigh(scores.data(), width, v, M, seen, D, y, H * D);
    }
  });
  return output.transpose(1, 2);
}

// Within every row of each (B, H, S, D), slots `source` (B, n) go to slots `target` (B, n), all read before any is written.
void move_slots(at::TensorList states, const Tensor& source, const Tensor& target) {
  const int64_t B = source.size(0), n = source.size(1);
  const int64_t *from = source.const_data_ptr<int64_t>(), *to = target.const_data_ptr<int64_t>();
  at::parallel_for(0, int64_t(states.size()), 1, [&](int64_t begin, int64_t end) {
    std::vector<char> held;
    for (int64_t i = begin; i < end; ++i) {
      const Tensor& state = states[i];
      const size_t unit = state.element_size(), width = state.size(3) * unit;
      held.resize(n * width);
      for (int64_t b = 0; b < B; ++b)
        for (int64_t h = 0; h < state.size(1); ++h) {
          char* slots = static_cast<char*>(state.data_ptr()) + (b * state.stride(0) + h * state.stride(1)) * unit;
          for (int64_t j = 0; j < n; ++j) std::memcpy(held.data() + j * width, slots + from[b * n + j] * width, width);
          for (int64_t j = 0; j < n; ++j) std::memcpy(slots + to[b * n + j] * width, held.data() + j * width, width);
        }
    }
  });
}

// The numbers of `medusa.trees.history`: keys of runs of tokens, modulo 2^64.
uint64_t pair_key(int64_t a, int64_t b) { return uint64_t(a) * 0x2545F4914F6CDD1Dull - uint64_t(b) * 0x61C8864680B583EBull; }
uint64_t triple_key(int64_t a, int64_t b, int64_t c) {
  return uint64_t(a) * 0x369DEA0F31A53F85ull - uint64_t(b) * 0x4B47D0C5A1B0E6A9ull + uint64_t(c) * 0x5851F42D4C957F2Dull +
         0x14057B7EF767814Full;
}

// `History.extend` for rows on a CPU: some sixty operations on a few numbers each, which torch starts one by one.
void extend_history(
    Tensor table, Tensor tokens, Tensor length, Tensor last, Tensor after, const Tensor& path, const Tensor& accepted,
    const Tensor& bonus) {
  const int64_t slots = table.size(1) - 1, room = tokens.size(1) - 1;
  const int bits = std::countr_zero(uint64_t(slots));
  for (int64_t b = 0; b < path.size(0); ++b) {
    int32_t* seen = table.mutable_data_ptr<int32_t>() + b * table.stride(0);
    int64_t* text = tokens.mutable_data_ptr<int64_t>() + b * tokens.stride(0);
    int64_t &end = length.mutable_data_ptr<int64_t>()[b], &before = last.mutable_data_ptr<int64_t>()[b];
    const int64_t* nodes = path.const_data_ptr<int64_t>() + b * path.size(1);
    const int64_t count = accepted.const_data_ptr<int64_t>()[b], start = end;
    std::vector<int64_t> run{before};  // the token before the old root, the path, and the next root
    run.insert(run.end(), nodes, nodes + count);
    run.push_back(bonus.const_data_ptr<int64_t>()[b]);
    for (int64_t i = 0; i < count; ++i) text[std::min(start + i, room)] = run[i + 2];
    end = std::min(start + count, room);
    before = nodes[count - 1];
    int64_t found[2];  // what the final pair and triple led to before
    for (int triple = 0; triple < 2; ++triple)
      for (int64_t i = 0; i < count; ++i) {
        const uint64_t key = triple ? triple_key(run[i], run[i + 1], run[i + 2]) : pair_key(run[i + 1], run[i + 2]);
        int32_t& slot = seen[bits ? key >> (64 - bits) : 0];
        if (i == count - 1) found[triple] = slot;
        slot = std::max(slot, int32_t(start + i + 1));
      }
    const auto follows = [&](int64_t place, int64_t tokens_before) {
      if (place >= end) return int64_t(0);
      for (int64_t i = 1; i <= tokens_before; ++i)
        if (text[std::max<int64_t>(place - i, 0)] != text[std::max<int64_t>(end - i, 0)]) return int64_t(0);
      return place;
    };
    const int64_t longer = follows(found[1], 3);
    after.mutable_data_ptr<int64_t>()[b] = longer > 0 ? longer : follows(found[0], 2);
  }
}

}  // namespace

TORCH_LIBRARY(medusa, library) {
  const std::string around = "bool gated=False, Tensor? added=None, Tensor? scale=None, float eps=0.0) -> Tensor[]";
  library.def(("linear(Tensor x, Tensor[] weights, Tensor[] biases, " + around).c_str());
  library.def(("linear_int8(Tensor x, Tensor[] weights, Tensor[] scales, Tensor[] offsets, Tensor[] biases, " + around).c_str());
  library.def("linear_rows(Tensor x, Tensor weight, Tensor rows) -> Tensor");
  library.def("computed(Tensor x) -> Tensor");
  library.def("attention(Tensor queries, Tensor keys, Tensor values, Tensor mask, float scale) -> Tensor");
  library.def("move_slots(Tensor(a!)[] states, Tensor source, Tensor target) -> ()");
  library.def(
      "extend_history(Tensor(a!) table, Tensor(b!) tokens, Tensor(c!) length, Tensor(d!) last, Tensor(e!) after, Tensor path, "
      "Tensor accepted, Tensor bonus) -> ()");
}

TORCH_LIBRARY_IMPL(medusa, CPU, library) {
  library.impl("linear", linear);
  library.impl("linear_int8", linear_int8);
  library.impl("linear_rows", linear_rows);
  library.impl("computed", computed);
  library.impl("attention", attention);
  library.impl("move_slots", move_slots);
  library.impl("extend_history", extend_history);
}
