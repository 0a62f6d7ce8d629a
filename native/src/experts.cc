#include "experts.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "numbers.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define EXPERTMESH_AVX512_BF16
#include <immintrin.h>
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define INLINE __attribute__((always_inline, target("avx512f,avx512bw,avx512vl,avx512bf16"))) inline
#endif

namespace expertmesh::experts {

#ifndef EXPERTMESH_AVX512_BF16

bool supported() { return false; }
void compute(const Layer&, const uint16_t*, size_t, const Pairs&, uint16_t*) {
  throw std::runtime_error("no experts are computed on this machine");
}

#else

namespace {

constexpr size_t kTile = 32;
/// Rows of one expert that are computed at a time: their sums fill half of the registers.
constexpr int kRows = 8;
/// Steps of a large tile that memory is asked ahead. With fewer rows than kAhead the kernel waits for memory anyway, and
/// what the processor asks ahead by itself is enough.
constexpr size_t kSteps = 64;
constexpr size_t kAhead = 5;
/// Bytes of the second-level cache for tiles of gate and up rows and the two that follow.
constexpr size_t kCache = 512 << 10;
/// Pairs of one pass, which bounds its scratch.
constexpr size_t kPassPairs = 4096;

/// All pairs, by row, and those of a row by slot.
struct ByRow {
  std::vector<size_t> starts;  // [rows + 1]
  std::vector<size_t> pairs, slots;
};

/// The pairs of some rows, by slot.
struct Pass {
  std::vector<size_t> places;           // of each pair, in the order of ByRow
  std::vector<const uint16_t*> inputs;  // of each place
  std::vector<float> weights;
  std::vector<size_t> starts;       // [experts + 1]
  std::vector<uint16_t> activated;  // [pairs, intermediate]
  std::vector<uint16_t> outputs;    // [pairs, hidden]
};

/// exp(x) after Cephes' expf: its relative error is 2e-7, far below bf16's.
INLINE __m512 exponential(__m512 x) {
  x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.3f)), _mm512_set1_ps(88.0f));
  const __m512 powers = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 rest = _mm512_fnmadd_ps(powers, _mm512_set1_ps(0.693359375f), x);
  rest = _mm512_fnmadd_ps(powers, _mm512_set1_ps(-2.12194440e-4f), rest);
  __m512 sum = _mm512_set1_ps(1.9875691500e-4f);
  for (const float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(next));
  sum = _mm512_fmadd_ps(sum, _mm512_mul_ps(rest, rest), _mm512_add_ps(rest, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(sum, powers);
}

INLINE __m512 silu(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_div_ps(x, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

INLINE void store(uint16_t* to, __m512 low, __m512 high) {
  _mm512_storeu_si512(to, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
}

/// sums [M, 32] = inputs [M, 2 * steps] times one tile. Asks memory for `kLines` cache lines a step, from `asked` on.
template <int M, int kLines>
INLINE void multiply(const uint16_t* const* inputs, const uint16_t* tile, size_t steps, const uint16_t* asked,
                     __m512 (&sums)[M][2]) {
  for (int m = 0; m < M; ++m) sums[m][0] = sums[m][1] = _mm512_setzero_ps();
  for (size_t step = 0; step < steps; ++step) {
    for (int line = 0; line < kLines; ++line, asked += kTile) _mm_prefetch(asked, _MM_HINT_T1);
    const auto low = reinterpret_cast<__m512bh>(_mm512_loadu_si512(tile + 2 * kTile * step));
    const auto high = reinterpret_cast<__m512bh>(_mm512_loadu_si512(tile + 2 * kTile * step + kTile));
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      int32_t two;
      std::memcpy(&two, inputs[m] + 2 * step, sizeof two);
      const auto input = reinterpret_cast<__m512bh>(_mm512_set1_epi32(two));
      sums[m][0] = _mm512_dpbf16_ps(sums[m][0], low, input);
      sums[m][1] = _mm512_dpbf16_ps(sums[m][1], high, input);
    }
  }
}

/// A tile, and where memory is asked ahead meanwhile.
struct Tile {
  const uint16_t *weights, *asked;
};

/// What an expert's tile of gate rows, and that of up rows, makes of M rows.
template <int M, int kLines>
TARGET void activate(const uint16_t* const* inputs, const Tile& gate, const Tile& up, size_t steps, uint16_t* activated,
                     size_t width) {
  __m512 gates[M][2], ups[M][2];
  multiply<M, kLines>(inputs, gate.weights, steps, gate.asked, gates);
  multiply<M, kLines>(inputs, up.weights, steps, up.asked, ups);
  for (int m = 0; m < M; ++m) {
    store(activated + m * width, _mm512_mul_ps(silu(gates[m][0]), ups[m][0]),
          _mm512_mul_ps(silu(gates[m][1]), ups[m][1]));
  }
}

template <int M, int kLines>
TARGET void project(const uint16_t* const* inputs, const Tile& tile, size_t steps, const float* weights,
                    uint16_t* outputs, size_t width) {
  __m512 sums[M][2];
  multiply<M, kLines>(inputs, tile.weights, steps, tile.asked, sums);
  for (int m = 0; m < M; ++m) {
    const __m512 weight = _mm512_set1_ps(weights[m]);
    store(outputs + m * width, _mm512_mul_ps(sums[m][0], weight), _mm512_mul_ps(sums[m][1], weight));
  }
}

using Activate = decltype(&activate<1, 0>);
using Project = decltype(&project<1, 0>);
#define EACH(FUNCTION, LINES)                                                                  \
  {FUNCTION<1, LINES>, FUNCTION<2, LINES>, FUNCTION<3, LINES>, FUNCTION<4, LINES>, \
   FUNCTION<5, LINES>, FUNCTION<6, LINES>, FUNCTION<7, LINES>, FUNCTION<8, LINES>}
constexpr Activate kActivate[3][kRows] = {EACH(activate, 0), EACH(activate, 1), EACH(activate, 2)};
constexpr Project kProject[3][kRows] = {EACH(project, 0), EACH(project, 1), EACH(project, 2)};

/// How the parts of an expert's rows ask memory ahead for tiles of `elements`.
class Asking {
 public:
  Asking(size_t pairs, size_t parts, size_t elements)
      : elements_(elements), whole_(4 * elements * sizeof(uint16_t) <= kCache), parts_(pairs < kAhead ? 0 : parts) {}

  /// Cache lines that a part asks for in each step of a tile, which has two.
  int lines(size_t part) const {
    if (part >= std::min<size_t>(parts_, whole_ ? 2 : 1)) return 0;
    return whole_ && parts_ > 1 ? 1 : 2;
  }

  /// Small tiles are asked for a whole tile ahead, by two parts a half each, so that memory has the time of both; large
  /// ones, that the cache cannot hold twice, a few steps ahead, and what stands behind them is asked for at their end.
  Tile tile(const uint16_t* weights, const uint16_t* next, size_t part) const {
    if (!whole_) return {weights, weights + 2 * kTile * kSteps};
    return {weights, next + (part == 1 ? elements_ / 2 : 0)};
  }

 private:
  size_t elements_;
  bool whole_;
  size_t parts_;
};

/// Pairs [first, last) are of one expert; `after` is where the next one's weights begin. Tile by tile, all of its rows:
/// the first of them bring the tile into the cache.
void run_expert(const Layer& layer, size_t slot, size_t after, size_t first, size_t last, Pass& pass) {
  const size_t hidden = layer.hidden, inner = layer.intermediate, pairs = last - first;
  const size_t parts = (pairs + kRows - 1) / kRows;
  const uint16_t* gates = layer.gate_up + slot * 2 * inner * hidden;
  const uint16_t* ups = gates + inner * hidden;
  const uint16_t* downs = layer.down + slot * hidden * inner;
  const Asking first_asking(pairs, parts, kTile * hidden), second_asking(pairs, parts, kTile * inner);
  for (size_t column = 0; column < inner; column += kTile) {
    const bool more = column + kTile < inner;
    const uint16_t* next_gate = more ? gates + (column + kTile) * hidden : downs;
    const uint16_t* next_up = more ? ups + (column + kTile) * hidden : downs + kTile * hidden;
    for (size_t part = 0; part < parts; ++part) {
      const size_t from = first + pairs * part / parts, to = first + pairs * (part + 1) / parts;
      kActivate[first_asking.lines(part)][to - from - 1](
          &pass.inputs[from], first_asking.tile(gates + column * hidden, next_gate, part),
          first_asking.tile(ups + column * hidden, next_up, part), hidden / 2, &pass.activated[from * inner + column],
          inner);
    }
  }
  const uint16_t* inputs[kRows];
  for (size_t column = 0; column < hidden; column += kTile) {
    const uint16_t* tile = downs + column * inner;
    const uint16_t* next = column + kTile < hidden ? tile + kTile * inner : layer.gate_up + after * 2 * inner * hidden;
    for (size_t part = 0; part < parts; ++part) {
      const size_t from = first + pairs * part / parts, to = first + pairs * (part + 1) / parts;
      for (size_t pair = from; pair < to; ++pair) inputs[pair - from] = &pass.activated[pair * inner];
      kProject[second_asking.lines(part)][to - from - 1](inputs, second_asking.tile(tile, next, part), inner / 2,
                                                         &pass.weights[from], &pass.outputs[from * hidden + column],
                                                         hidden);
    }
  }
}

/// sum [width] of `count` outputs, which stand at `places`.
TARGET void add_up(const uint16_t* outputs, const size_t* places, size_t count, size_t width, uint16_t* sum) {
  for (size_t column = 0; column < width; column += kTile) {
    __m512 low = _mm512_setzero_ps(), high = low;
    for (size_t one = 0; one < count; ++one) {
      const uint16_t* output = outputs + places[one] * width + column;
      const __m512i first = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(output)));
      const __m512i second = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(output + 16)));
      low = _mm512_add_ps(low, _mm512_castsi512_ps(_mm512_slli_epi32(first, 16)));
      high = _mm512_add_ps(high, _mm512_castsi512_ps(_mm512_slli_epi32(second, 16)));
    }
    store(sum + column, low, high);
  }
}

/// counts[i + 1] -> where i begins.
void accumulate(std::vector<size_t>& counts) {
  for (size_t i = 1; i < counts.size(); ++i) counts[i] += counts[i - 1];
}

ByRow sort_by_row(const Layer& layer, size_t rows, const Pairs& pairs) {
  std::vector<size_t> slots(pairs.count), ends(layer.experts + 1, 0), by_slot(pairs.count);
  ByRow sorted{std::vector<size_t>(rows + 1, 0), by_slot, by_slot};
  for (size_t pair = 0; pair < pairs.count; ++pair) {
    const auto row = static_cast<size_t>(pairs.rows[pair]), expert = static_cast<size_t>(pairs.experts[pair]);
    slots[pair] = expert < pairs.num_slots ? static_cast<size_t>(pairs.slots[expert]) : layer.experts;
    if (row >= rows || slots[pair] >= layer.experts) {
      throw std::out_of_range("a pair names a row that is not there, or an expert that is not held");
    }
    ++sorted.starts[row + 1];
    ++ends[slots[pair] + 1];
  }
  accumulate(sorted.starts);
  accumulate(ends);
  for (size_t pair = 0; pair < pairs.count; ++pair) by_slot[ends[slots[pair]]++] = pair;
  ends = sorted.starts;
  for (const size_t pair : by_slot) {
    const size_t at = ends[pairs.rows[pair]]++;
    sorted.pairs[at] = pair;
    sorted.slots[at] = slots[pair];
  }
  return sorted;
}

/// The sums of rows [first_row, last_row).
void run_pass(const Layer& layer, const uint16_t* x, const Pairs& pairs, const ByRow& sorted, size_t first_row,
              size_t last_row, Pass& pass, uint16_t* sums) {
  const size_t first = sorted.starts[first_row], count = sorted.starts[last_row] - first;
  pass.places.resize(count);
  pass.inputs.resize(count);
  pass.weights.resize(count);
  pass.activated.resize(count * layer.intermediate);
  pass.outputs.resize(count * layer.hidden);
  pass.starts.assign(layer.experts + 1, 0);
  for (size_t at = 0; at < count; ++at) ++pass.starts[sorted.slots[first + at] + 1];
  accumulate(pass.starts);
  std::vector<size_t> ends = pass.starts;
  for (size_t at = 0; at < count; ++at) {
    const size_t pair = sorted.pairs[first + at], place = pass.places[at] = ends[sorted.slots[first + at]]++;
    pass.inputs[place] = x + pairs.rows[pair] * layer.hidden;
    pass.weights[place] = pairs.weights[pair];
  }
  for (size_t slot = 0, after; slot < layer.experts; slot = after) {
    after = slot + 1;
    while (after < layer.experts && pass.starts[after] == pass.starts[after + 1]) ++after;
    if (pass.starts[slot] == pass.starts[slot + 1]) continue;  // the first one alone
    run_expert(layer, slot, after, pass.starts[slot], pass.starts[slot + 1], pass);
  }
  for (size_t row = first_row; row < last_row; ++row) {
    const size_t at = sorted.starts[row];
    add_up(pass.outputs.data(), pass.places.data() + (at - first), sorted.starts[row + 1] - at, layer.hidden,
           sums + row * layer.hidden);
  }
}

}  // namespace

bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
}

void compute(const Layer& layer, const uint16_t* x, size_t rows, const Pairs& pairs, uint16_t* sums) {
  static thread_local Pass pass;
  const ByRow sorted = sort_by_row(layer, rows, pairs);
  for (size_t first = 0, last; first < rows; first = last) {
    last = first + 1;
    while (last < rows && sorted.starts[last + 1] - sorted.starts[first] <= kPassPairs) ++last;
    run_pass(layer, x, pairs, sorted, first, last, pass, sums);
  }
}

#endif

void Held::add(uint32_t number, const Layer& layer, std::vector<int32_t> slots) {
  layers_[number] = {layer, std::move(slots)};
}

void Held::compute(uint32_t number, const uint16_t* x, size_t rows, Pairs pairs, uint16_t* sums) const {
  const auto found = layers_.find(number);
  if (found == layers_.end()) throw std::out_of_range("layer " + std::to_string(number) + " is not held");
  const auto& [layer, slots] = found->second;
  pairs.slots = slots.data();
  pairs.num_slots = slots.size();
  experts::compute(layer, x, rows, pairs, sums);
}

Sums Held::run(const BatchView& batch) {
  const size_t elements = batch.rows * batch.width;
  const auto* x = static_cast<const uint16_t*>(batch.hidden_states);
  if (batch.dtype != kBFloat16) {
    rounded_.reset(new uint16_t[elements]);
    convert(rounded_.get(), kBFloat16, batch.hidden_states, batch.dtype, elements);
    x = rounded_.get();
  }
  sums_.reset(new uint16_t[elements]);
  compute(batch.layer, x, batch.rows, {batch.pair_rows, batch.pair_experts, batch.pair_weights, batch.pairs, nullptr, 0},
          sums_.get());
  return {sums_.get(), kBFloat16};
}

}  // namespace expertmesh::experts
