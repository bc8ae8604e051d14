// Losses of whole data sets, as tvmtrain/losses.py: sums over batches of any size, so that the mean is the one over all samples.
#ifndef TVMTRAIN_LOSSES_H_
#define TVMTRAIN_LOSSES_H_

#include <cstdint>
#include <string_view>

#include "manifest.h"

namespace tt {

// Some samples of an array of ``spec``: its first axis is as long as the bytes are many.
struct Samples {
  const TensorSpec& spec;
  std::string_view bytes;
};

// What adds up: the sum of the loss and how many terms it has, right answers and labels that count.
struct Tally {
  double loss = 0, weight = 0;
  int64_t right = 0, labels = 0;

  void add(const Tally& other);
  double mean() const;      // NaN without terms
  double accuracy() const;  // NaN without labels
};

// Right answers of a cross-entropy on class numbers; none of any other loss or shape.
Tally answers(const Loss& loss, const Samples& output, const Samples& target);

// A built-in loss in float64, as PyTorch defines it, and the answers. Throws an input error for arrays that do
// not fit each other.
Tally measure(const Loss& loss, const Samples& output, const Samples& target);

}  // namespace tt

#endif
