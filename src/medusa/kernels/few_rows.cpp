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
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <map>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>
#endif

namespace {

using at::BFloat16;
using at::Tensor;

// A dot product: `step` elements are multiplied and added to a group of lanes (`Sum`) at a time, and sixteen groups are reduced to
// sixteen results at once, each by the same tree of additions.

#if defined(__AVX512F__)
__m512 pairs(__m512 a, __m512 b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); }
__m512 fours(__m512 a, __m512 b) {
  const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)), _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
}
__m512 quarters(__m512 a, __m512 b) { return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd)); }
#endif

struct Dot {
#if defined(__AVX512BF16__)
  using Sum = __m512;
  static constexpr int step = 32;
  static Sum zero() { return _mm512_setzero_ps(); }
  static __m512bh load(const BFloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static __m512bh load(const BFloat16* p, int count) { return (__m512bh)_mm512_maskz_loadu_epi16((1u << count) - 1, p); }
  static Sum add(Sum sum, __m512bh x, __m512bh w) { return _mm512_dpbf16_ps(sum, x, w); }
  [[gnu::always_inline]] static void reduce(const Sum (&s)[16], float* to) {
    const __m512 a = fours(pairs(s[0], s[1]), pairs(s[2], s[3])), b = fours(pairs(s[4], s[5]), pairs(s[6], s[7]));
    const __m512 c = fours(pairs(s[8], s[9]), pairs(s[10], s[11])), d = fours(pairs(s[12], s[13]), pairs(s[14], s[15]));
    _mm512_storeu_ps(to, quarters(quarters(a, b), quarters(c, d)));
  }
#else
  struct Sum {
    float lane[16];
  };
  using Part = Sum;
  static constexpr int step = 16;
  static Sum zero() { return {}; }
  static Part load(const BFloat16* p, int count = step) {
    Part part{};
    for (int i = 0; i < count; ++i) part.lane[i] = float(p[i]);
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

// Has memory brought to the second cache: the first is too small for what is read now and what is read next.
template <typename Value>
void fetch(const Value* from) {
  __builtin_prefetch(from, 0, 2);
}

// The rows of a matrix; a slice of a wider one has them further apart than they are long.
struct Rows {
  const BFloat16* first;
  int64_t apart;
  const BFloat16* at(int64_t n) const { return first + n * apart; }
};

Rows rows_of(const Tensor& matrix) { return {matrix.const_data_ptr<BFloat16>(), matrix.stride(0)}; }

using Sixteen = std::integral_constant<int, 16>;

// Calls `use` with a number of results, which is known when compiled if there are sixteen.
template <typename Use>
void counted(int64_t count, const Use& use) {
  if (count >= 16) use(Sixteen());
  else use(int(count));
}

// M inputs with rows [begin, end) of the weights, one row after the other, so that memory is read from its start to its end. Two
// rows at a time take twice as long on some machines. How far ahead rows are fetched was measured.
template <int M, typename Store>
void in_order(const BFloat16* x, const Rows& w, int64_t K, int64_t begin, int64_t end, const Store& store) {
  const int first = int(K % Dot::step);  // elements that do not fill a group of lanes
  for (int64_t from = begin; from < end; from += 16) {
    const int64_t rows = std::min<int64_t>(end - from, 16);
    Dot::Sum sums[M][16];
    for (int64_t n = 0; n < 16; ++n) {
      const BFloat16* row = w.at(from + std::min(n, rows - 1));
      Dot::Sum own[M];
      for (auto& sum : own) sum = Dot::zero();
      if (first)
        for (int m = 0; m < M; ++m) own[m] = Dot::add(own[m], Dot::load(x + m * K, first), Dot::load(row, first));
#pragma GCC unroll 2
      for (int64_t k = first; k < K; k += Dot::step) {
        const auto part = Dot::load(row + k);
        fetch(row + k + (M == 1 ? 2 : 8) * w.apart);
        for (int m = 0; m < M; ++m) own[m] = Dot::add(own[m], Dot::load(x + m * K + k), part);
      }
      for (int m = 0; m < M; ++m) sums[m][n] = own[m];
    }
    for (int m = 0; m < M; ++m) {
      float results[16];
      Dot::reduce(sums[m], results);
      counted(rows, [&](auto count) { store(m, from, count, results); });
    }
  }
}

// Four inputs with four rows of weights: sixteen groups of lanes fit the registers, beside what is loaded. Beyond the last input
// or row (`inputs`, `rows` left), the last is computed again. Each step fetches `ahead` lines from `next` on. `odd`: K does not
// fill the groups of lanes. It is known when compiled, and this is a function of its own, so that the groups stay in registers.
template <int ahead, bool odd>
[[gnu::noinline]] void tile(
    const BFloat16* x, const Rows& w, int64_t K, int64_t inputs, int64_t rows, const BFloat16* next, float (*to)[16],
    int64_t at) {
  constexpr int64_t line = 64 / sizeof(BFloat16);
  const BFloat16 *from[4] = {x}, *row[4] = {w.first};
  for (int i = 1; i < 4; ++i) {
    from[i] = from[i - 1] + (i < inputs ? K : 0);
    row[i] = row[i - 1] + (i < rows ? w.apart : 0);
  }
  Dot::Sum sums[16];
#pragma GCC unroll 16
  for (auto& sum : sums) sum = Dot::zero();
  const int first = odd ? int(K % Dot::step) : 0;
  if constexpr (odd)
    for (int i = 0; i < 16; ++i) sums[i] = Dot::add(sums[i], Dot::load(from[i / 4], first), Dot::load(row[i % 4], first));
  for (int64_t k = first; k < K; k += Dot::step) {
    decltype(Dot::load(x)) parts[4];
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) parts[n] = Dot::load(row[n] + k);
#pragma GCC unroll 4
    for (int n = 0; n < ahead; ++n) fetch(next + n * line);
    next += ahead * line;
#pragma GCC unroll 4
    for (int m = 0; m < 4; ++m) {
      const auto input = Dot::load(from[m] + k);
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) sums[m * 4 + n] = Dot::add(sums[m * 4 + n], input, parts[n]);
    }
  }
  float results[16];
  Dot::reduce(sums, results);
  for (int m = 0; m < 4; ++m) std::copy(results + 4 * m, results + 4 * m + 4, to[m] + at);
}

// M inputs with rows [begin, end) of the weights. Four rows stay in the first cache while as many inputs as fit beside them pass.
// Meanwhile the rows that come sixteen later are fetched in the order of memory, each four inputs a part, so that memory is read
// throughout. `store` takes the results of up to sixteen rows for an input.
template <typename Store>
void range(const BFloat16* x, const Rows& w, int64_t M, int64_t K, int64_t begin, int64_t end, const Store& store) {
  if (M == 1) return in_order<1>(x, w, K, begin, end, store);
  if (M == 2) return in_order<2>(x, w, K, begin, end, store);
  const bool near = M * K * sizeof(BFloat16) <= 12 << 10;  // if not, four rows share the inputs, read from the second cache
  if (M == 3 && near) return in_order<3>(x, w, K, begin, end, store);
  if (M == 4 && near) return in_order<4>(x, w, K, begin, end, store);
  constexpr int64_t cache = 24 << 10;
  const int64_t fit = cache / (4 * K * sizeof(BFloat16)) - 1, block = 4 * std::clamp<int64_t>(fit, 1, 4);
  const int64_t share = M <= 4 ? 4 : M <= 12 ? 2 : 1;
  for (int64_t from = begin; from < end; from += 16) {
    const int64_t rows = std::min<int64_t>(end - from, 16);
    for (int64_t first = 0; first < M; first += block) {
      float results[16][16];
      const int64_t inputs = std::min(M - first, block);
      for (int64_t n = 0; n < rows; n += 4)
        for (int64_t m = first; m < first + inputs; m += 4) {
          const auto run = [&]<int ahead, bool odd = false>() {
            const BFloat16* next = w.at(from + n + 16) + m / 4 * ahead * K;
            tile<ahead, odd>(x + m * K, {w.at(from + n), w.apart}, K, M - m, rows - n, next, results + m - first, n);
          };
          if (K % Dot::step) run.template operator()<0, true>();
          else if (m / 4 * share >= 4 || w.apart != K) run.template operator()<0>();
          else if (share == 4) run.template operator()<4>();
          else if (share == 2) run.template operator()<2>();
          else run.template operator()<1>();
        }
      for (int64_t m = 0; m < inputs; ++m)
        counted(rows, [&](auto count) { store(first + m, from, count, results[m]); });
    }
  }
}

// Results in the dtype of the inputs.
template <typename Count>
void narrow(const float* from, Count count, BFloat16* to) {
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
  if constexpr (std::is_same_v<Count, Sixteen>) {
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
using Bits = uint32_t __attribute__((vector_size(4 * lanes)));
using Half = uint16_t __attribute__((vector_size(2 * lanes)));
using Doubles = double __attribute__((vector_size(8 * lanes)));

template <typename To, typename From>
To vector_at(const From* p) {
  To found;
  std::memcpy(&found, p, sizeof found);
  return found;
}

Lanes widened(const float* p) { return vector_at<Lanes>(p); }
Lanes widened(const BFloat16* p) { return (Lanes)(__builtin_convertvector(vector_at<Half>(p), Whole) << 16); }

// The sum of the lanes, from the first to the last.
template <typename Sum, typename Vector>
Sum summed(const Vector& vector) {
  Sum sum = 0;
  for (int i = 0; i < lanes; ++i) sum += vector[i];
  return sum;
}

float greatest(Lanes vector) {
  float most = vector[0];
  for (int i = 1; i < lanes; ++i) most = std::max(most, vector[i]);
  return most;
}

bool any(Whole vector) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)vector, (__m512i)vector) != 0;
#else
  int32_t found = 0;
  for (int i = 0; i < lanes; ++i) found |= vector[i];
  return found != 0;
#endif
}

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
  counted(count, [&](auto known) { narrow(from, known, to); });
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
    const Lanes inverse = every(1.f / std::sqrt(summed<float>(squares) / float(K) + eps));
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

// The rows of several matrices, sixteen at a time, are divided among the threads.
template <typename Work>
void divide(at::IntArrayRef sizes, const Work& work) {
  constexpr int64_t chunk = 16;
  std::vector<int64_t> starts{0};
  for (int64_t size : sizes) starts.push_back(starts.back() + (size + chunk - 1) / chunk);
  at::parallel_for(0, starts.back(), 1, [&](int64_t first, int64_t last) {
    for (size_t i = 0; i < sizes.size(); ++i) {
      const int64_t begin = std::max(first, starts[i]) - starts[i], end = std::min(last, starts[i + 1]) - starts[i];
      if (begin < end) work(i, begin * chunk, std::min(end * chunk, sizes[i]));
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
  const at::IntArrayRef sizes;
  const int64_t K, M;
  std::vector<Tensor> outputs;
  Tensor input;

  // `sizes` are the maps' numbers of rows; both maps of a gated one have as many.
  Maps(const Tensor& x, at::IntArrayRef sizes, const Around& around)
      : sizes(around.gated ? sizes.slice(0, 1) : sizes), K(x.size(-1)), M(x.numel() / K), input(x.contiguous()) {
    for (int64_t size : this->sizes) {
      auto shape = x.sizes().vec();
      shape.back() = size;
      outputs.push_back(at::empty(shape, x.options()));
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
  std::vector<Tensor> run(bool gated, const Map& map) {
    divide(sizes, [&](size_t i, int64_t begin, int64_t end) {
      const int64_t N = sizes[i];
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
  std::vector<int64_t> sizes;
  for (const Tensor& weight : weights) sizes.push_back(weight.size(0));
  Maps<BFloat16> maps(x, sizes, {gated, added, scale, eps});
  const auto* input = maps.input.const_data_ptr<BFloat16>();
  return maps.run(gated, [&](size_t i, int64_t begin, int64_t end, BFloat16* y, int64_t apart) {
    const BFloat16* bias = bias_of<BFloat16>(biases, i);
    range(
        input, rows_of(weights[i]), maps.M, maps.K, begin, end,
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
  const Rows all = rows_of(weight);
  at::parallel_for(0, B * chunks, 1, [&](int64_t begin, int64_t end) {
    std::vector<BFloat16> held(16 * K);  // one behind the other
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / chunks, first = unit % chunks * 16, count = std::min<int64_t>(R - first, 16);
      const int64_t* row = chosen.const_data_ptr<int64_t>() + b * R + first;
      for (int64_t n = 0; n < count; ++n) std::memcpy(held.data() + n * K, all.at(row[n]), K * sizeof(BFloat16));
      BFloat16* y = output.mutable_data_ptr<BFloat16>() + b * M * R + first;
      range(
          input.const_data_ptr<BFloat16>() + b * M * K, {held.data(), K}, M, K, 0, count,
          [&](int64_t m, int64_t n, auto many, const float* sums) { narrow(sums, many, y + m * R + n); });
    }
  });
  return output;
}

// The bits of a number without its sign, which are ordered as the numbers are.
uint32_t magnitude(BFloat16 value) { return uint32_t(value.x & 0x7fff) << 16; }
uint32_t magnitude(float value) { return std::bit_cast<uint32_t>(value) & 0x7fffffff; }

constexpr int64_t group = 32;  // inputs with a scale of their own

// Inputs rounded to int8. Every group of a row is scaled to its own largest value, which depends on that row alone, as do the sums
// of the groups. Rows are filled up with zeros.
struct Rounded {
  int64_t groups;
  std::vector<int8_t> values;
  std::vector<float> scales, sums;

  template <typename Value>
  Rounded(const Value* x, int64_t M, int64_t K) : groups((K + group - 1) / group) {
    values.resize(M * groups * group);
    scales.resize(M * groups);
    sums.resize(M * groups);
    for (int64_t m = 0; m < M; ++m)
      for (int64_t g = 0; g < groups; ++g) {
        const Value* from = x + m * K + g * group;
        const int64_t width = std::min(K - g * group, group), at = m * groups + g;
        uint32_t bits = 0;
        for (int64_t k = 0; k < width; ++k) bits = std::max(bits, magnitude(from[k]));
        const float most = std::bit_cast<float>(bits), inverse = most > 0 ? 127.f / most : 0.f;
        int32_t sum = 0;
        for (int64_t k = 0; k < width; ++k) {
          const int8_t value = int8_t(std::nearbyint(float(from[k]) * inverse));
          values[at * group + k] = value;
          sum += value;
        }
        scales[at] = most / 127.f;
        sums[at] = float(sum);
      }
  }
};

Lanes widened(const at::Half* p) {
#if defined(__AVX512F__)
  return (Lanes)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#else
  Lanes found;
  for (int i = 0; i < lanes; ++i) found[i] = float(p[i]);
  return found;
#endif
}

// Weights are numbers of 8 or 4 bits, from 0 on, times a scale plus a minimum of each row and group. They are laid out for sixteen
// rows of a group at a time, in the order in which they are read: 64 bytes are four numbers of each row. Of 4 bits, the upper
// halves of the bytes are numbers for the inputs that come sixteen later.
using Bytes = uint8_t __attribute__((vector_size(4 * lanes)));

template <int bits>
void unpack(const uint8_t* from, int64_t ahead, Bytes (&to)[8]) {
  for (int j = 0; j < bits; ++j) {
    const Bytes both = vector_at<Bytes>(from + j * sizeof(Bytes));
    fetch(from + j * sizeof(Bytes) + ahead);
    to[j] = bits == 8 ? both : both & 15;
    if constexpr (bits == 4) to[j + 4] = both >> 4;
  }
}

// The sums and, for each of sixteen rows, the products of four numbers with four inputs.
Whole with_products(Whole sums, Bytes numbers, const int8_t* inputs) {
#if defined(__AVX512VNNI__)
  int32_t four;
  std::memcpy(&four, inputs, sizeof four);
  return (Whole)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)numbers, _mm512_set1_epi32(four));
#else
  for (int n = 0; n < lanes; ++n)
    for (int i = 0; i < 4; ++i) sums[n] += int32_t(numbers[4 * n + i]) * inputs[i];
  return sums;
#endif
}

// Sixteen rows of weights times up to M inputs from the first on; beyond the last of all, that one is computed again.
template <int bits, int M>
std::array<Lanes, M> sixteen_rows(
    const Rounded& inputs, int64_t first, int64_t all, const uint8_t* weights, const at::Half* scales) {
  constexpr int64_t size = bits * sizeof(Bytes);
  const int64_t next = first ? 0 : inputs.groups * size;  // the next sixteen rows are fetched while the first inputs run
  std::array<Lanes, M> totals{};
  for (int64_t g = 0; g < inputs.groups; ++g, weights += size, scales += 2 * lanes) {
    Bytes numbers[8];
    unpack<bits>(weights, next, numbers);
    const Lanes scale = widened(scales), minimum = widened(scales + lanes);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const int64_t at = std::min(first + m, all - 1) * inputs.groups + g;
      Whole sum{};
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) sum = with_products(sum, numbers[j], inputs.values.data() + at * group + 4 * j);
      const Lanes products = fused(__builtin_convertvector(sum, Lanes), scale, every(inputs.sums[at]) * minimum);
      totals[m] = fused(products, every(inputs.scales[at]), totals[m]);
    }
  }
  return totals;
}

template <int bits, typename Value>
std::vector<Tensor> rounded_linear(
    const Tensor& x, at::TensorList weights, at::TensorList scales, at::IntArrayRef sizes, at::TensorList biases,
    const Around& around) {
  Maps<Value> maps(x, sizes, around);
  const Rounded inputs(maps.input.template const_data_ptr<Value>(), maps.M, maps.K);
  return maps.run(around.gated, [&](size_t i, int64_t begin, int64_t end, Value* y, int64_t apart) {
    const float* bias = bias_of<float>(biases, i);
    for (int64_t n = begin; n < end; n += lanes) {
      const auto store = [&](int64_t m, Lanes total, auto count) {
        float results[lanes];
        std::memcpy(results, &total, sizeof results);
        if (bias)
          for (int j = 0; j < count; ++j) results[j] += bias[n + j];
        narrow(results, count, y + m * apart + n - begin);
      };
      const uint8_t* rows = weights[i].const_data_ptr<uint8_t>() + n * inputs.groups * group * bits / 8;
      const at::Half* own = scales[i].const_data_ptr<at::Half>() + n * inputs.groups * 2;
      for (int64_t m = 0, many; m < maps.M; m += many) {
        const auto run = [&]<int M>() {
          many = M;
          const auto totals = sixteen_rows<bits, M>(inputs, m, maps.M, rows, own);
          for (int j = 0; j < M && m + j < maps.M; ++j)
            counted(end - n, [&](auto count) { store(m + j, totals[j], count); });
        };
        if (maps.M - m == 1) run.template operator()<1>();
        else if (maps.M - m <= 4) run.template operator()<4>();
        else run.template operator()<8>();
      }
    }
  });
}

// `sizes` are the maps' numbers of rows, N. Of each, the weights are bytes (N / 16, K / 32, 512 or, in 4 bits, 256) and the scales
// float16 (N / 16, K / 32, 2, 16), scales and minima, N and K rounded up. Biases are float32.
std::vector<Tensor> linear_rounded(
    const Tensor& x, at::TensorList weights, at::TensorList scales, at::IntArrayRef sizes, at::TensorList biases, bool gated,
    const std::optional<Tensor>& added, const std::optional<Tensor>& scale, double eps) {
  const auto run = [&](auto map) { return map(x, weights, scales, sizes, biases, {gated, added, scale, eps}); };
  const bool wide = x.scalar_type() == at::kFloat;
  if (weights[0].size(-1) == 256) return run(wide ? rounded_linear<4, float> : rounded_linear<4, BFloat16>);
  return run(wide ? rounded_linear<8, float> : rounded_linear<8, BFloat16>);
}

// The same bits, in memory: see `fusion.compute_once`.
Tensor computed(const Tensor& x) { return x.clone(); }

// Two neighbouring elements of bfloat16, as they lie in memory.
using Pair = int32_t;

// The first and the second of each pair, as the bits of float32.
template <typename Pairs>
Pairs first_of(Pairs pairs) {
  return pairs << 16;
}
template <typename Pairs>
Pairs second_of(Pairs pairs) {
  return pairs & ~0xffff;
}

// Which lanes of two vectors `mixed` takes, in turn, `unit` at a time: within each quarter those of its lower or upper half, or
// whole quarters, even or odd ones.
constexpr int mixed_from(int unit, bool upper, int j) {
  if (unit == 4) return j / 8 * lanes + (j / 4 % 2 * 2 + upper) * 4 + j % 4;
  return j / unit % 2 * lanes + j / 4 * 4 + upper * 2 + (unit == 1 ? j % 4 / 2 : j % 2);
}

template <int unit, bool upper>
Whole mixed(Whole a, Whole b) {
  return [&]<int... j>(std::integer_sequence<int, j...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, mixed_from(unit, upper, j)...);
#else
    return __builtin_shuffle(a, b, Whole{mixed_from(unit, upper, j)...});
#endif
  }(std::make_integer_sequence<int, lanes>());
}

// Rows become columns.
void transpose(Whole (&rows)[lanes], Whole* to) {
  Whole twos[lanes], fours[lanes];
#pragma GCC unroll 8
  for (int i = 0; i < lanes; i += 2) {
    twos[i] = mixed<1, false>(rows[i], rows[i + 1]);
    twos[i + 1] = mixed<1, true>(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) {
    const Whole a = twos[i / 4 * 4 + i % 4 / 2], b = twos[i / 4 * 4 + i % 4 / 2 + 2];
    fours[i] = i % 2 ? mixed<2, true>(a, b) : mixed<2, false>(a, b);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Whole a = mixed<4, false>(fours[i], fours[4 + i]), b = mixed<4, true>(fours[i], fours[4 + i]);
    const Whole c = mixed<4, false>(fours[8 + i], fours[12 + i]), d = mixed<4, true>(fours[8 + i], fours[12 + i]);
    to[i] = mixed<4, false>(a, c);
    to[4 + i] = mixed<4, false>(b, d);
    to[8 + i] = mixed<4, true>(a, c);
    to[12 + i] = mixed<4, true>(b, d);
  }
}

// Sixteen keys, of which `count` exist, pair by pair: to[p] are the keys' pairs p.
[[gnu::noinline]] void columns(const BFloat16* keys, int64_t count, int64_t D, Whole* to) {
  for (int64_t d = 0; d < D; d += 2 * lanes, to += lanes) {
    Whole rows[lanes] = {};
    const int64_t width = std::min<int64_t>(D - d, 2 * lanes);
    if (count == lanes && width == 2 * lanes) {
#pragma GCC unroll 16
      for (int s = 0; s < lanes; ++s) rows[s] = vector_at<Whole>(keys + s * D + d);
    } else {
      for (int64_t s = 0; s < count; ++s) std::memcpy(&rows[s], keys + s * D + d, width * sizeof(BFloat16));
    }
    transpose(rows, to);
  }
}

// The sums and the products of sixteen keys' pairs with a query's.
Lanes with_pairs(Lanes sums, Whole keys, Pair query) {
#if defined(__AVX512BF16__)
  return (Lanes)_mm512_dpbf16_ps((__m512)sums, (__m512bh)keys, (__m512bh)_mm512_set1_epi32(query));
#else
  sums = fused((Lanes)first_of(keys), every(std::bit_cast<float>(first_of(query))), sums);
  return fused((Lanes)second_of(keys), every(std::bit_cast<float>(second_of(query))), sums);
#endif
}

constexpr int blocks = 4;  // of sixteen keys, at a time

// The scores of R queries for the keys of four blocks. The products of a query and a key are summed from the first to the last.
template <int R>
[[gnu::noinline]] void scores(const Pair* queries, const Whole* keys, int64_t pairs, float scale, float* to, int64_t width) {
  Lanes sums[R][blocks] = {};
  for (int64_t p = 0; p < pairs; ++p)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < blocks; ++c) sums[r][c] = with_pairs(sums[r][c], keys[c * pairs + p], queries[r * pairs + p]);
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < blocks; ++c) {
      const Lanes scaled = sums[r][c] * scale;
      std::memcpy(to + r * width + c * lanes, &scaled, sizeof scaled);
    }
}

// e to the power of scores plus an additive mask, less the largest of them: in place, for `seen` slots. Returns the inverse of
// their sum. The sum is in double precision: a node of a tree has its path in other slots, hence other lanes, than the same tokens
// have in plain decoding, and must get the same sum.
[[gnu::noinline]] float softmax(float* row, const BFloat16* mask, int64_t seen) {
  Lanes most = every(-INFINITY);
  std::fill(row + seen, row + (seen + lanes - 1) / lanes * lanes, -INFINITY);
  for (int64_t s = 0; s < seen; s += lanes) {
    const Lanes score = vector_at<Lanes>(row + s) + widened(mask + s, seen - s);
    most = most > score ? most : score;
    std::memcpy(row + s, &score, sizeof score);
  }
  const float top = greatest(most);
  Doubles sum{};
  for (int64_t s = 0; s < seen; s += lanes) {
    const Lanes weight = exponential(vector_at<Lanes>(row + s) - top);
    sum += __builtin_convertvector(weight, Doubles);
    std::memcpy(row + s, &weight, sizeof weight);
  }
  return float(1 / summed<double>(sum));
}

// R rows of weights, `width` apart, times C groups of `size` columns of the values, (S, D), from one on, and each row's factor.
template <int R, int C, int size>
[[gnu::noinline]] void weigh(
    const float* weights, int64_t width, const float* factors, const BFloat16* values, int64_t S, int64_t D, BFloat16* const* to,
    int64_t from) {
  Lanes first[R][C] = {}, second[R][C] = {};  // of neighbouring columns: they widen with one operation each
  for (int64_t s = 0; s < S; ++s) {
    Lanes even[C], odd[C];
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) {
      Whole columns{};
      std::memcpy(&columns, values + s * D + from + c * size, size * sizeof(BFloat16));
      even[c] = (Lanes)first_of(columns);
      odd[c] = (Lanes)second_of(columns);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Lanes weight = every(weights[r * width + s]);
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) {
        first[r][c] = fused(weight, even[c], first[r][c]);
        second[r][c] = fused(weight, odd[c], second[r][c]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) {
      const Whole low = (Whole)rounded(first[r][c] * factors[r]) >> 16, high = (Whole)rounded(second[r][c] * factors[r]);
      const Whole both = (low & 0xffff) | high;
      std::memcpy(to[r] + from + c * size, &both, size * sizeof(BFloat16));
    }
}

template <int R>
void weigh(
    const float* weights, int64_t width, const float* factors, const BFloat16* values, int64_t S, int64_t D,
    BFloat16* const* to) {
  int64_t d = 0;
  if constexpr (R <= 4)
    for (; d + 64 <= D; d += 64) weigh<R, 2, 32>(weights, width, factors, values, S, D, to, d);
  for (; d + 32 <= D; d += 32) weigh<R, 1, 32>(weights, width, factors, values, S, D, to, d);
  for (; d + 16 <= D; d += 16) weigh<R, 1, 16>(weights, width, factors, values, S, D, to, d);
  for (; d < D; ++d)
    for (int r = 0; r < R; ++r) {
      float sum = 0;
      for (int64_t s = 0; s < S; ++s) sum += weights[r * width + s] * float(values[s * D + d]);
      to[r][d] = BFloat16(sum * factors[r]);
    }
}

// Calls `run` with R, 8, 4, 2 or 1 but at most `most`, and with the first of R rows, until all rows are done.
template <int most, typename Run>
void by_rows(int64_t rows, const Run& run) {
  int64_t row = 0;
  const auto all = [&]<int R>() {
    for (; rows - row >= R; row += R) run.template operator()<R>(row);
  };
  if constexpr (most >= 8) all.template operator()<8>();
  all.template operator()<4>();
  all.template operator()<2>();
  all.template operator()<1>();
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

using Seen = std::vector<int64_t>;

// `slots_seen` of each row of a mask (B, 1 or H, M, S).
Seen seen_by(const Tensor& mask) {
  Seen seen(mask.size(0));
  for (int64_t b = 0; b < mask.size(0); ++b)
    for (int64_t h = 0; h < mask.size(1); ++h) {
      const BFloat16* rows = mask.const_data_ptr<BFloat16>() + b * mask.stride(0) + h * mask.stride(1);
      seen[b] = std::max(seen[b], slots_seen(rows, mask.stride(2), mask.size(2), mask.size(3)));
    }
  return seen;
}

// Attention of a few queries (B, H, M, D) to the first S slots of a cache (B, G, capacity, D), H a multiple of G, under an additive
// mask (B, 1 or H, M, S).
// Keys and values are read in place; heads that share them need no copies. The result is laid out as (B, M, H, D), as it is read.
Tensor attention(
    const Tensor& queries, const Tensor& keys, const Tensor& values, const Tensor& mask, double scale, const Seen& seen) {
  const int64_t B = queries.size(0), H = queries.size(1), M = queries.size(2), D = queries.size(3);
  const int64_t G = keys.size(1), rows = H / G * M, pairs = (D + 2 * lanes - 1) / (2 * lanes) * lanes;
  const int64_t threads = at::get_num_threads(), parts = std::min(rows, threads / std::gcd(B * G, threads));
  const Tensor q = queries.stride(3) == 1 ? queries : queries.contiguous();
  Tensor output = at::empty({B, M, H, D}, q.options());
  const auto mask_of = [&](int64_t b, int64_t h) {
    return mask.const_data_ptr<BFloat16>() + b * mask.stride(0) + (mask.size(1) > 1 ? h * mask.stride(1) : 0);
  };
  // The queries that share keys and values are one group, or divided so that all threads have as many.
  at::parallel_for(0, B * G * parts, 1, [&](int64_t from, int64_t to) {
    for (int64_t unit = from; unit < to; ++unit) {
      const int64_t b = unit / (G * parts), g = unit / parts % G, part = unit % parts;
      const int64_t begin = rows * part / parts, count = rows * (part + 1) / parts - begin;
      const int64_t slots = seen[b], width = (slots + blocks * lanes - 1) / (blocks * lanes) * blocks * lanes;
      const BFloat16* k = keys.const_data_ptr<BFloat16>() + b * keys.stride(0) + g * keys.stride(1);
      const BFloat16* v = values.const_data_ptr<BFloat16>() + b * values.stride(0) + g * values.stride(1);
      std::vector<Pair> asked(count * pairs);
      std::vector<BFloat16*> results(count);
      std::vector<float> weights(count * width), factors(count);
      std::vector<Whole> held(blocks * pairs);
      const auto place = [&](int64_t row) { return std::pair(g * (H / G) + (begin + row) / M, (begin + row) % M); };
      for (int64_t row = 0; row < count; ++row) {
        const auto [h, m] = place(row);
        const BFloat16* own = q.const_data_ptr<BFloat16>() + b * q.stride(0) + h * q.stride(1) + m * q.stride(2);
        std::memcpy(&asked[row * pairs], own, D * sizeof(BFloat16));
        results[row] = output.mutable_data_ptr<BFloat16>() + ((b * M + m) * H + h) * D;
      }
      for (int64_t s = 0; s < slots; s += blocks * lanes) {
        for (int64_t c = 0; c < blocks; ++c) {
          const int64_t first = std::min(s + c * lanes, slots);
          columns(k + first * D, std::min<int64_t>(slots - first, lanes), D, &held[c * pairs]);
        }
        by_rows<4>(count, [&]<int R>(int64_t row) {
          scores<R>(&asked[row * pairs], held.data(), pairs, float(scale), &weights[row * width + s], width);
        });
      }
      for (int64_t row = 0; row < count; ++row) {
        const auto [h, m] = place(row);
        factors[row] = softmax(&weights[row * width], mask_of(b, h) + m * mask.stride(2), slots);
      }
      by_rows<8>(count, [&]<int R>(int64_t row) {
        weigh<R>(&weights[row * width], width, &factors[row], v, slots, D, &results[row]);
      });
    }
  });
  return output.transpose(1, 2);
}

// The rotary embedding of one head's D elements, cos and sin of D as well. Each product is rounded, as it is in the model.
void rotate(const BFloat16* x, const BFloat16* cos, const BFloat16* sin, int64_t D, BFloat16* to) {
  const int64_t half = D / 2;
  for (int64_t d = 0; d < half; d += lanes) {
    const auto at = [&](const BFloat16* p) { return widened(p + d, half - d); };
    const Lanes low = at(x), high = at(x + half);
    narrow(rounded(low * at(cos)) + rounded(-high * at(sin)), half - d, to + d);
    narrow(rounded(high * at(cos + half)) + rounded(low * at(sin + half)), half - d, to + half + d);
  }
}

// Attention from projections (B, M, heads * D): queries and keys are rotated by cos and sin (B or 1, M, D), keys and values are
// written into `slots` (M) of the cache (B, G, capacity, D), and its slots that the mask (B, 1 or H, M, S) covers are read.
Tensor attend(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin, const Tensor& slots,
    const Tensor& keys, const Tensor& values, const Tensor& mask, double scale, const Seen& seen) {
  const int64_t B = q.size(0), M = q.size(1), G = keys.size(1), D = keys.size(3), H = q.size(2) / D, heads = H + 2 * G;
  const Tensor asked = q.contiguous(), given = k.contiguous(), said = v.contiguous();
  Tensor turned = at::empty({B, H, M, D}, q.options());
  at::parallel_for(0, B * M * heads, 64, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / heads / M, m = unit / heads % M, head = unit % heads, group = (head - H) % G;
      const auto row = [&](const Tensor& of, int64_t h) {
        return of.const_data_ptr<BFloat16>() + (b * M + m) * of.size(2) + h * D;
      };
      const auto angle = [&](const Tensor& of) {
        return of.const_data_ptr<BFloat16>() + (of.size(0) > 1 ? b * of.stride(0) : 0) + m * of.stride(1);
      };
      const auto slot = [&](const Tensor& of) {
        const int64_t place = slots.const_data_ptr<int64_t>()[m];
        return static_cast<BFloat16*>(of.data_ptr()) + b * of.stride(0) + group * of.stride(1) + place * D;
      };
      if (head < H) {
        BFloat16* to = static_cast<BFloat16*>(turned.data_ptr()) + ((b * H + head) * M + m) * D;
        rotate(row(asked, head), angle(cos), angle(sin), D, to);
      } else if (head < H + G) {
        rotate(row(given, group), angle(cos), angle(sin), D, slot(keys));
      } else {
        std::copy(row(said, group), row(said, group) + D, slot(values));
      }
    }
  });
  return attention(turned, keys, values, mask, scale, seen).transpose(1, 2).view({B, M, H * D});
}

// Calls of `linear`, `linear_rounded` and `attend`, one after the other, as `joining.join_calls` writes them: a list of numbers,
// those of tensors among them. Tensors are those given, the caches, then the results of every call, in order. A call is 0, 1 or 2,
// which of the three it is. Of a map follow x, the weights, scales, sizes and biases, each a count and that many numbers, gated,
// added and scale (-1: none); of an attention its nine tensors. `factors` are the last arguments of the calls, eps or scale. At the
// end are the results to return, at most four, and the rest are empty: torch takes no lists from what changes its arguments.
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
Four calls(at::TensorList given, at::TensorList caches, at::ArrayRef<double> factors, at::IntArrayRef program) {
  std::vector<Tensor> tensors(given.begin(), given.end());
  tensors.insert(tensors.end(), caches.begin(), caches.end());
  const int64_t* at = program.data();
  const auto one = [&]() -> const Tensor& { return tensors[*at++]; };
  const auto numbers = [&] {
    const int64_t count = *at++;
    at += count;
    return at::IntArrayRef(at - count, count);
  };
  const auto several = [&] {
    std::vector<Tensor> found;
    for (const int64_t number : numbers()) found.push_back(tensors[number]);
    return found;
  };
  const auto perhaps = [&] {
    const int64_t number = *at++;
    return number < 0 ? std::nullopt : std::optional<Tensor>(tensors[number]);
  };
  const auto map = [&](bool rounded, double eps) {
    const Tensor x = one();
    const auto weights = several(), scales = several();
    const auto sizes = numbers();
    const auto biases = several();
    const bool gated = *at++;
    const auto added = perhaps(), scale = perhaps();
    return rounded ? linear_rounded(x, weights, scales, sizes, biases, gated, added, scale, eps)
                   : linear(x, weights, biases, gated, added, scale, eps);
  };
  std::map<const void*, Seen> seen;
  const auto attention = [&](double scale) {
    const Tensor *held[9];
    for (auto& each : held) each = &one();
    const auto& [q, k, v, cos, sin, slots, keys, values, mask] = held;
    const auto [found, added] = seen.try_emplace(mask->const_data_ptr());  // all layers of a kind have one mask
    if (added) found->second = seen_by(*mask);
    return std::vector{attend(*q, *k, *v, *cos, *sin, *slots, *keys, *values, *mask, scale, found->second)};
  };
  for (const double factor : factors) {
    const int64_t kind = *at++;
    auto results = kind == 2 ? attention(factor) : map(kind == 1, factor);
    std::move(results.begin(), results.end(), std::back_inserter(tensors));
  }
  auto wanted = several();
  while (wanted.size() < 4) wanted.push_back(at::empty({0}, given[0].options()));
  return {wanted[0], wanted[1], wanted[2], wanted[3]};
}

// ln(x) for 0 < x <= 1 to the last bits of float32.
Lanes logarithm(Lanes x) {
  const Bits bits = (Bits)x - 0x3f3504f3u;  // of the square root of a half, so that the rest is around 1
  const Lanes whole = __builtin_convertvector((Whole)bits >> 23, Lanes);
  const Lanes part = (Lanes)((bits & 0x7fffffu) + 0x3f3504f3u) - 1.f, square = part * part;
  Lanes series = every(7.0376836292e-2f);
  for (float factor :
       {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f, -1.6668057665e-1f, 2.0000714765e-1f,
        -2.4999993993e-1f, 3.3333331174e-1f})
    series = fused(series, part, every(factor));
  return fused(whole, every(0.69314718f), part + (fused(series, part, every(-0.5f)) * square));
}

// `medusa.sampling._scrambled`, of one word or of sixteen.
template <typename Words>
Words scrambled(Words word) {
  word = (word ^ (word >> 16)) * 0x21f0aaadu;
  word = (word ^ (word >> 15)) * 0x735a2d97u;
  return word ^ (word >> 15);
}

// The first token with the greatest exp(score) / E, where E = exp(-Gumbel number) is between 2^-33 and 17.
struct Winner {
  float ratio = -1;
  int64_t token = 0;

  // Sixteen tokens from `first` on. E is greater than the chance it is made of, and computed only where that could win.
  void meet(int64_t first, Lanes scores, int64_t key) {
    constexpr Bits order{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const Bits word = scrambled(scrambled(order + uint32_t(first + (key >> 32))) ^ uint32_t(key));
    const Lanes weight = exponential(scores), most = every(1.f - 0x1p-24f);
    Lanes chance = (__builtin_convertvector(word, Lanes) + 0.5f) * 0x1p-32f;
    chance = chance > most ? most : chance;
    if (!any(weight > chance * (ratio * 0.999f))) return;
    // -log1p(-chance) (Kahan): what is lost in 1 - chance is lost in its logarithm too.
    const Lanes left = 1.f - chance, lost = 1.f - left;
    const Lanes passed = lost == 0.f ? chance : logarithm(left) * chance / (lost == 0.f ? every(-1.f) : -lost);
    const Lanes ratios = weight / passed;
    for (int i = 0; i < lanes; ++i)
      if (ratios[i] > ratio) *this = {ratios[i], first + i};
  }
};

// The token after one row of scores: that of `medusa.sampling.draw` after division by the temperature, or at temperature 0 that of
// `medusa.sampling.likeliest`. The row's blocks are divided among the threads.
template <typename Value>
int64_t chosen(const Value* row, int64_t V, float temperature, int64_t key) {
  constexpr int64_t block = 512;
  constexpr float reach = 25.8f;  // ln(2^33 * 17): what scores lower than the greatest by more cannot win
  const int64_t count = (V + block - 1) / block, threads = at::get_num_threads();
  const auto lanes_at = [&](int64_t v) {
    if (v + lanes <= V) return widened(row + v);
    Lanes last = every(-INFINITY);
    for (int64_t j = 0; j < V - v; ++j) last[j] = row[v + j];
    return last;
  };
  std::vector<float> most(count);
  at::parallel_for(0, count, 8, [&](int64_t from, int64_t to) {
    for (int64_t n = from; n < to; ++n) {
      Lanes here = every(-INFINITY);
      for (int64_t v = n * block; v < std::min(V, (n + 1) * block); v += lanes) {
        const Lanes next = lanes_at(v);
        here = here > next ? here : next;
      }
      most[n] = greatest(here);
    }
  });
  const auto best = std::max_element(most.begin(), most.end());
  if (temperature == 0) {
    const int64_t first = (best - most.begin()) * block;
    const Value* found = std::find_if(row + first, row + std::min(V, first + block), [&](Value value) { return value == *best; });
    return found - row < V ? found - row : 0;  // nothing equals NaN
  }
  const auto scaled = [&](auto score) { return temperature == 1 ? score : score / temperature; };
  const float top = scaled(*best);
  std::vector<Winner> winners(threads);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part)
      for (int64_t n = count * part / threads; n < count * (part + 1) / threads; ++n)
        for (int64_t v = n * block; v < std::min(V, (n + 1) * block) && scaled(most[n]) > top - reach; v += lanes)
          if (const Lanes own = scaled(lanes_at(v)) - top; any(own > -reach)) winners[part].meet(v, own, key);
  });
  const auto before = [](const Winner& a, const Winner& b) { return a.ratio < b.ratio; };
  return std::max_element(winners.begin(), winners.end(), before)->token;
}

// `medusa.sampling.draw` for rows of scores (R, V) and keys of positions (R,): tokens (R,).
Tensor draw(const Tensor& scores, const Tensor& keys) {
  const int64_t V = scores.size(1);
  const Tensor held = scores.contiguous(), numbers = keys.contiguous();
  Tensor tokens = at::empty_like(numbers);
  const int64_t* own = numbers.const_data_ptr<int64_t>();
  for (int64_t r = 0; r < scores.size(0); ++r)
    tokens.mutable_data_ptr<int64_t>()[r] = chosen(held.const_data_ptr<float>() + r * V, V, 1, own[r]);
  return tokens;
}

// `medusa.sampling.position_keys`.
int64_t position_key(int64_t row, int64_t number) {
  const uint32_t first = scrambled(uint32_t(number + row)) ^ uint32_t(row >> 32);
  return int64_t(scrambled(first) >> 1) << 32 | scrambled(first + 0x9e3779b9u);
}

// The numbers of a row. What has one row, as a tree that all rows share, has it in the place of all others.
const int64_t* row_of(const Tensor& numbers, int64_t b) {
  return numbers.const_data_ptr<int64_t>() + (numbers.size(0) == 1 ? 0 : b * numbers.stride(0));
}

// Acceptance for rows on a CPU whose scores only a temperature changes, from the root down: a row with one is accepted as in
// `medusa.acceptance.accept_drawn`, another as in `accept_exact` by its likeliest tokens. Some forty operations of torch in one.
std::tuple<Tensor, Tensor, Tensor, Tensor> accept(
    const Tensor& logits, const Tensor& tokens, const Tensor& parents, const Tensor& depths, const Tensor& lineage,
    const Tensor& keys, const Tensor& starts, const Tensor& temperatures, const Tensor& committed) {
  const int64_t B = logits.size(0), N = logits.size(1), V = logits.size(2), most = lineage.size(2);
  const Tensor scores = logits.contiguous(), given = tokens.contiguous(), up = parents.contiguous(), down = depths.contiguous();
  const Tensor lines = lineage.contiguous();
  const auto made = [&](at::IntArrayRef shape) { return at::empty(shape, tokens.options()); };
  Tensor nodes = made({B}), paths = made({B, most}), lengths = made({B}), bonuses = made({B});
  for (int64_t b = 0; b < B; ++b) {
    const int64_t *own = row_of(given, b), *above = row_of(up, b), *depth = row_of(down, b);
    int64_t &node = nodes.mutable_data_ptr<int64_t>()[b], &bonus = bonuses.mutable_data_ptr<int64_t>()[b];
    const float temperature = temperatures.const_data_ptr<float>()[b];
    const int64_t number = committed.const_data_ptr<int64_t>()[b] - starts.const_data_ptr<int64_t>()[b] + 1;
    std::vector<bool> reached(N);  // nodes of one depth; several if a path is repeated
    reached[node = 0] = true;
    for (int64_t step = 0; step < most; ++step) {
      const int64_t key = temperature ? position_key(keys.const_data_ptr<int64_t>()[b], number + depth[node]) : 0;
      const auto after = [&](auto* all) { return chosen(all + (b * N + node) * V, V, temperature, key); };
      bonus = scores.scalar_type() == at::kFloat ? after(scores.const_data_ptr<float>()) : after(scores.const_data_ptr<BFloat16>());
      std::vector<bool> children(N);
      int64_t child = 0;
      for (int64_t n = N - 1; n > 0; --n)
        if (depth[n] > 0 && reached[above[n]] && own[n] == bonus) children[child = n] = true;
      if (!child) break;
      node = child;
      reached = std::move(children);
    }
    const int64_t* path = row_of(lines, b) + node * most;
    std::copy(path, path + most, paths.mutable_data_ptr<int64_t>() + b * most);
    lengths.mutable_data_ptr<int64_t>()[b] = depth[node] + 1;
  }
  return {nodes, paths, lengths, bonuses};
}

// `medusa.decoding.keep` for rows on a CPU, but for the history and the cache. Returns what the host reads, and the slots to move
// and where to, or nothing if all are in place.
std::tuple<Tensor, Tensor, Tensor> keep(
    const Tensor& tokens, const Tensor& hidden, const Tensor& node, const Tensor& path, const Tensor& length, const Tensor& bonus,
    const Tensor& active, const Tensor& slot, Tensor last, Tensor root, Tensor committed) {
  const int64_t B = tokens.size(0), most = path.size(1), base = *slot.const_data_ptr<int64_t>();
  const size_t width = hidden.size(2) * hidden.element_size();
  const Tensor states = hidden.contiguous(), given = tokens.contiguous();
  const int64_t *at = node.const_data_ptr<int64_t>(), *count = length.const_data_ptr<int64_t>();
  int64_t *next = root.mutable_data_ptr<int64_t>(), *ends = committed.mutable_data_ptr<int64_t>();
  const bool* goes_on = active.const_data_ptr<bool>();
  Tensor packet = at::empty({B, most + 2}, tokens.options());
  bool in_place = true;  // nodes 0, 1, 2, ... right behind the row
  for (int64_t b = 0; b < B; ++b) in_place &= !goes_on[b] || (ends[b] == base && at[b] == count[b] - 1);
  Tensor source = at::empty({in_place ? 0 : B, most}, tokens.options()), target = at::empty_like(source);
  for (int64_t b = 0; b < B; ++b) {
    const int64_t *nodes = path.const_data_ptr<int64_t>() + b * most, *own = row_of(given, b);
    int64_t* said = packet.mutable_data_ptr<int64_t>() + b * (most + 2);
    for (int64_t i = 0; i < most; ++i) {
      said[i] = own[std::max<int64_t>(nodes[i], 0)];
      if (in_place) continue;
      source.mutable_data_ptr<int64_t>()[b * most + i] = base + std::max<int64_t>(nodes[i], 0);
      target.mutable_data_ptr<int64_t>()[b * most + i] = ends[b] + i;
    }
    said[most] = count[b];
    said[most + 1] = next[b] = bonus.const_data_ptr<int64_t>()[b];
    ends[b] += goes_on[b] ? count[b] : 0;
    const char* state = static_cast<const char*>(states.const_data_ptr()) + (b * states.size(1) + at[b]) * width;
    std::memcpy(static_cast<char*>(last.mutable_data_ptr()) + b * width, state, width);
  }
  return {packet, source, target};
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
  library.def(("linear_rounded(Tensor x, Tensor[] weights, Tensor[] scales, int[] sizes, Tensor[] biases, " + around).c_str());
  library.def("calls(Tensor[] given, Tensor(a!)[] caches, float[] factors, int[] program) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def("linear_rows(Tensor x, Tensor weight, Tensor rows) -> Tensor");
  library.def("computed(Tensor x) -> Tensor");
  library.def(
      "attend(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor slots, Tensor(a!) keys, Tensor(b!) values, Tensor mask, "
      "float scale) -> Tensor");
  library.def("attention(Tensor queries, Tensor keys, Tensor values, Tensor mask, float scale) -> Tensor");
  library.def("draw(Tensor scores, Tensor keys) -> Tensor");
  library.def(
      "accept(Tensor logits, Tensor tokens, Tensor parents, Tensor depths, Tensor lineage, Tensor keys, Tensor starts, "
      "Tensor temperatures, Tensor committed) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "keep(Tensor tokens, Tensor hidden, Tensor node, Tensor path, Tensor length, Tensor bonus, Tensor active, Tensor slot, "
      "Tensor(a!) last, Tensor(b!) root, Tensor(c!) committed) -> (Tensor, Tensor, Tensor)");
  library.def("move_slots(Tensor(a!)[] states, Tensor source, Tensor target) -> ()");
  library.def(
      "extend_history(Tensor(a!) table, Tensor(b!) tokens, Tensor(c!) length, Tensor(d!) last, Tensor(e!) after, Tensor path, "
      "Tensor accepted, Tensor bonus) -> ()");
}

TORCH_LIBRARY_IMPL(medusa, CPU, library) {
  library.impl("linear", linear);
  library.impl("linear_rounded", linear_rounded);
  library.impl("calls", calls);
  library.impl("linear_rows", linear_rows);
  library.impl("computed", computed);
  library.impl("attention", [](const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask, double scale) {
    return attention(q, k, v, mask, scale, seen_by(mask));
  });
  library.impl(
      "attend",
      [](const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin, const Tensor& slots, Tensor keys,
         Tensor values, const Tensor& mask, double scale) {
        return attend(q, k, v, cos, sin, slots, keys, values, mask, scale, seen_by(mask));
      });
  library.impl("draw", draw);
  library.impl("accept", accept);
  library.impl("keep", keep);
  library.impl("move_slots", move_slots);
  library.impl("extend_history", extend_history);
}
