// Which channels of a partly trained layer a step trains: tvmtrain/selection.py, bit for bit.
#ifndef TVMTRAIN_SELECTION_H_
#define TVMTRAIN_SELECTION_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "manifest.h"

namespace tt {

// State that a choice depends on, by "selection:layer": the seed of "random" (one int64), the channels of "magnitude" (int32).
struct SelectionState {
  std::map<std::string, int64_t> seeds;
  std::map<std::string, std::vector<int32_t>> largest;
};

std::string selection_key(const Selection& selection);

// The ``count`` channels, ascending, with the largest 2-norms of a weight in C order; of equals, the first.
std::vector<int32_t> largest_channels(const Selection& selection, const Shape& shape, const std::vector<double>& weight);

// The channels, ascending, that step number ``step`` (from 0) trains.
std::vector<int32_t> chosen_channels(const Selection& selection, uint64_t step, const SelectionState& state);

}  // namespace tt

#endif
