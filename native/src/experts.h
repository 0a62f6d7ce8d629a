// A layer's experts on a CPU with AVX-512 BF16: gated by SiLU, bf16, no biases, one thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "computation.h"

namespace expertmesh::experts {

/// Weights in tiles: of each expert's matrix [out, in], 32 rows of `out` stand side by side for every two of `in`,
/// [out / 32, in / 2, 32, 2]. gate_up has all gate rows above all up rows. Sizes are multiples of 32.
struct Layer {
  const uint16_t* gate_up;  // [experts, 2 * intermediate, hidden]
  const uint16_t* down;     // [experts, hidden, intermediate]
  size_t experts, hidden, intermediate;
};

/// Columns of (row, expert) pairs and the gate's weights; slots[expert] is where an expert stands, or negative.
struct Pairs {
  const int32_t *rows, *experts;
  const float* weights;
  size_t count;
  const int32_t* slots;
  size_t num_slots;
};

/// Whether this machine can.
bool supported();

/// sums [rows, hidden]: of each row of x [rows, hidden] over its pairs, weight * expert(row), each rounded to bf16, added
/// in fp32 by ascending slot and rounded: the same bits whatever else is in the batch. Throws std::out_of_range for a
/// pair of a row that is not there or an expert that is not held.
void compute(const Layer& layer, const uint16_t* x, size_t rows, const Pairs& pairs, uint16_t* sums);

/// The layers of a replica, whose weights the caller keeps.
class Held : public Computation {
 public:
  /// `slots` as in Pairs.
  void add(uint32_t number, const Layer& layer, std::vector<int32_t> slots);

  /// Sums in bf16; rows of another type are rounded first. Throws std::out_of_range for a layer that is not held, and as
  /// compute() does.
  Sums run(const BatchView& batch) override;

  /// As compute(), of rows in bf16; `pairs` without slots.
  void compute(uint32_t number, const uint16_t* x, size_t rows, Pairs pairs, uint16_t* sums) const;

 private:
  struct Kept {
    Layer layer;
    std::vector<int32_t> slots;
  };
  std::map<uint32_t, Kept> layers_;
  std::unique_ptr<uint16_t[]> rounded_, sums_;
};

}  // namespace expertmesh::experts
