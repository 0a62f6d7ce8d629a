#include "choice.h"

#include <algorithm>
#include <numeric>
#include <tuple>

namespace expertmesh {

void choose(const Coverage& coverage, const std::vector<uint32_t>& experts, const std::vector<int64_t>& counts,
            std::vector<CandidateLoad>& loads, std::vector<int32_t>& owners) {
  const auto covering = [&](size_t i) { return experts[i] < coverage.size() ? coverage[experts[i]].size() : 0; };
  std::vector<uint32_t> order(experts.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) {
    return std::make_tuple(covering(a), -counts[a], a) < std::make_tuple(covering(b), -counts[b], b);
  });
  std::vector<bool> used(loads.size());
  owners.assign(experts.size(), -1);
  for (const uint32_t i : order) {
    if (covering(i) == 0) continue;
    int32_t best = -1;
    int64_t least = 0;
    for (const uint32_t candidate : coverage[experts[i]]) {
      const int64_t load = loads[candidate].rows + (used[candidate] ? 0 : kMessageRows);
      if (best >= 0 && std::tie(load, loads[candidate].sent) >= std::tie(least, loads[best].sent)) continue;
      best = static_cast<int32_t>(candidate);
      least = load;
    }
    owners[i] = best;
    used[best] = true;
    loads[best].rows += counts[i];
  }
}

}  // namespace expertmesh
