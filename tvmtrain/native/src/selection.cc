#include "selection.h"

#include <algorithm>
#include <numeric>

#include "random.h"

namespace tt {
namespace {

// All channels of a layer in the random order of round ``number``.
std::vector<uint64_t> round_order(const Selection& selection, int64_t seed, uint64_t number) {
  const auto channels = static_cast<size_t>(selection.channels);
  const uint32_t layer = crc32(selection.layer.data(), selection.layer.size());
  const std::vector<uint64_t> words = philox_words(static_cast<uint64_t>(seed), layer, number, channels);
  std::vector<uint64_t> order(channels);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](uint64_t a, uint64_t b) { return words[a] < words[b]; });
  return order;
}

// The squares of one channel's weights, in the order in which NumPy adds them.
std::vector<double> squares_of(int64_t channel, const Selection& selection, const Shape& shape, const std::vector<double>& weight) {
  size_t taps = 1;
  for (size_t i = 2; i < shape.size(); ++i) taps *= static_cast<size_t>(shape[i]);
  const auto rows = static_cast<size_t>(shape[0]), columns = static_cast<size_t>(shape[1]), c = static_cast<size_t>(channel);
  std::vector<double> squares;
  const auto add = [&](size_t row, size_t column) {
    for (size_t t = 0; t < taps; ++t) {
      const double value = weight[(row * columns + column) * taps + t];
      squares.push_back(value * value);
    }
  };
  if (shape[1] == selection.channels) {
    for (size_t row = 0; row < rows; ++row) add(row, c);
  } else {  // depthwise [C * m, 1, ...]: m rows of a channel follow each other
    const size_t each = rows / static_cast<size_t>(selection.channels);
    for (size_t row = c * each; row < (c + 1) * each; ++row) add(row, 0);
  }
  return squares;
}

}  // namespace

std::string selection_key(const Selection& selection) { return "selection:" + selection.layer; }

std::vector<int32_t> largest_channels(const Selection& selection, const Shape& shape, const std::vector<double>& weight) {
  std::vector<double> sums;
  for (int64_t channel = 0; channel < selection.channels; ++channel) {
    const std::vector<double> squares = squares_of(channel, selection, shape, weight);
    sums.push_back(pairwise_sum(squares.data(), squares.size()));
  }
  std::vector<int32_t> order(sums.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return sums[static_cast<size_t>(a)] > sums[static_cast<size_t>(b)]; });
  order.resize(static_cast<size_t>(selection.count));
  std::sort(order.begin(), order.end());
  return order;
}

std::vector<int32_t> chosen_channels(const Selection& selection, uint64_t step, const SelectionState& state) {
  if (selection.select == Select::kMagnitude) return state.largest.at(selection_key(selection));
  const auto count = static_cast<uint64_t>(selection.count), channels = static_cast<uint64_t>(selection.channels);
  std::vector<int32_t> chosen;
  const uint64_t start = selection.select == Select::kFirst ? 0 : static_cast<uint64_t>(static_cast<unsigned __int128>(step) * count % channels);
  for (uint64_t i = 0; i < count; ++i) chosen.push_back(static_cast<int32_t>((start + i) % channels));
  if (selection.select == Select::kRandom) {
    const uint64_t steps = channels / std::gcd(channels, count);
    const std::vector<uint64_t> order = round_order(selection, state.seeds.at(selection_key(selection)), step / steps);
    for (int32_t& channel : chosen) channel = static_cast<int32_t>(order[static_cast<size_t>(channel)]);
  }
  std::sort(chosen.begin(), chosen.end());
  return chosen;
}

}  // namespace tt
