// Random layers, batches and pairs, for sanitizers: sums must be those of plain loops, and no byte outside the weights, the
// rows and the sums may be touched.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>
#include <vector>

#include "../experts.h"

using namespace expertmesh;

namespace {

float widen(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}

uint16_t narrow(float number) {
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/// Of a matrix [out, in] in tiles.
float at(const uint16_t* packed, size_t in, size_t row, size_t column) {
  return widen(packed[row / 32 * 32 * in + column / 2 * 64 + row % 32 * 2 + column % 2]);
}

std::vector<uint16_t> random_numbers(size_t count, float scale, std::mt19937& random) {
  std::uniform_real_distribution<float> between(-scale, scale);
  std::vector<uint16_t> numbers(count);
  for (uint16_t& number : numbers) number = narrow(between(random));
  return numbers;
}

void check(size_t hidden, size_t inner, size_t rows, size_t count, std::mt19937& random) {
  constexpr size_t kHeld = 3;
  const std::vector<int32_t> slots{-1, 2, 0, -1, 1};
  const auto gate_up = random_numbers(kHeld * 2 * inner * hidden, 0.3f, random);
  const auto down = random_numbers(kHeld * hidden * inner, 0.3f, random);
  const auto x = random_numbers(rows * hidden, 1.0f, random);
  std::vector<int32_t> pair_rows(count), experts(count);
  std::vector<float> weights(count);
  std::vector<double> expected(rows * hidden, 0.0);
  for (size_t pair = 0; pair < count; ++pair) {
    pair_rows[pair] = random() % rows;
    experts[pair] = std::vector<int32_t>{1, 2, 4}[random() % 3];
    weights[pair] = static_cast<float>(random() % 100) / 100;
    const uint16_t* gates = gate_up.data() + slots[experts[pair]] * 2 * inner * hidden;
    const uint16_t* downs = down.data() + slots[experts[pair]] * hidden * inner;
    const uint16_t* row = x.data() + pair_rows[pair] * hidden;
    std::vector<float> activated(inner);
    for (size_t unit = 0; unit < inner; ++unit) {
      double gate = 0, up = 0;
      for (size_t column = 0; column < hidden; ++column) {
        gate += widen(row[column]) * at(gates, hidden, unit, column);
        up += widen(row[column]) * at(gates, hidden, inner + unit, column);
      }
      activated[unit] = widen(narrow(static_cast<float>(gate / (1 + std::exp(-gate)) * up)));
    }
    for (size_t column = 0; column < hidden; ++column) {
      double sum = 0;
      for (size_t unit = 0; unit < inner; ++unit) sum += activated[unit] * at(downs, inner, column, unit);
      expected[pair_rows[pair] * hidden + column] += sum * weights[pair];
    }
  }
  std::vector<uint16_t> sums(rows * hidden, 0x7fc0);
  const experts::Layer layer{gate_up.data(), down.data(), kHeld, hidden, inner};
  const experts::Pairs pairs{pair_rows.data(), experts.data(), weights.data(), count, slots.data(), slots.size()};
  experts::compute(layer, x.data(), rows, pairs, sums.data());
  double squares = 0, wrong = 0;
  for (size_t i = 0; i < sums.size(); ++i) {
    squares += expected[i] * expected[i];
    wrong += (widen(sums[i]) - expected[i]) * (widen(sums[i]) - expected[i]);
  }
  if (!(wrong <= 1e-4 * squares)) {
    std::fprintf(stderr, "%zux%zu, %zu rows, %zu pairs: off by %g of %g\n", hidden, inner, rows, count, wrong, squares);
    std::exit(1);
  }
  if (count == 0) return;
  pair_rows[random() % count] = rows;
  try {
    experts::compute(layer, x.data(), rows, pairs, sums.data());
    std::exit(1);
  } catch (const std::out_of_range&) {
  }
}

}  // namespace

int main() {
  if (!experts::supported()) {
    std::printf("no AVX-512 BF16 in this machine: nothing to check\n");
    return 0;
  }
  std::mt19937 random(1);
  for (const size_t hidden : {32, 96, 160}) {
    for (const size_t inner : {32, 64, 224}) {
      for (const size_t rows : {1, 7, 40}) {
        for (const size_t count : {0, 1, 5, 60}) check(hidden, inner, rows, count, random);
      }
    }
  }
  check(32, 32, 3000, 9000, random);
  std::printf("expert sums: as plain loops make them\n");
}
