// Which replica serves which expert: the same function as router_service/dispatch/choice.py, on dense indices.
#pragma once

#include <cstdint>
#include <vector>

namespace expertmesh {

/// What one more message costs, in rows.
constexpr int64_t kMessageRows = 4;

/// expert -> the candidates that hold it, ascending; candidates are numbered in the order of their names.
using Coverage = std::vector<std::vector<uint32_t>>;

struct CandidateLoad {
  int64_t rows = 0;
  /// Rows sent there so far: breaks ties.
  uint64_t sent = 0;
};

/// owners[i] becomes the candidate that serves experts[i], -1 where none does. counts[i] is the number of its rows, at
/// least 1; `experts` ascend. Changes `loads` by what it assigns.
void choose(const Coverage& coverage, const std::vector<uint32_t>& experts, const std::vector<int64_t>& counts,
            std::vector<CandidateLoad>& loads, std::vector<int32_t>& owners);

}  // namespace expertmesh
