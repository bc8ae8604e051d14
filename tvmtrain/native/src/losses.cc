#include "losses.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "error.h"
#include "values.h"

namespace tt {
namespace {

// Logits [N, C, ...]: those of one place lie ``apart`` from each other.
struct Logits {
  std::vector<double> values;
  size_t classes, apart;

  size_t places() const { return values.size() / classes; }
  size_t at(size_t place) const { return place / apart * classes * apart + place % apart; }  // of class 0
};

// Whether ``output`` is logits, of samples that ``target`` has: one number for each place, or for each class of it.
bool fit(const Samples& output, const Samples& target, bool per_class) {
  const Shape& shape = output.spec.shape;
  if (shape.size() < 2 || std::count(shape.begin(), shape.end(), 0)) return false;
  const size_t values = output.bytes.size() / output.spec.dtype->bytes, wanted = target.bytes.size() / target.spec.dtype->bytes;
  size_t group = 1;
  for (size_t i = 1; i < shape.size(); ++i) group *= static_cast<size_t>(shape[i]);
  return values % group == 0 && wanted == (per_class ? values : values / static_cast<size_t>(shape[1]));
}

Logits logits_of(const Samples& output) {
  const Shape& shape = output.spec.shape;
  Logits logits{floats_of(*output.spec.dtype, output.bytes), static_cast<size_t>(shape[1]), 1};
  for (size_t i = 2; i < shape.size(); ++i) logits.apart *= static_cast<size_t>(shape[i]);
  return logits;
}

bool counts(int64_t label, const Loss& loss, size_t classes) { return label != loss.ignore_index && label >= 0 && static_cast<uint64_t>(label) < classes; }

size_t largest(const Logits& logits, size_t first) {
  size_t best = 0;
  for (size_t c = 1; c < logits.classes; ++c) best = logits.values[first + c * logits.apart] > logits.values[first + best * logits.apart] ? c : best;
  return best;
}

// The logarithm of the sum of the exponentials.
double log_sum(const Logits& logits, size_t first) {
  const double most = logits.values[first + largest(logits, first) * logits.apart];
  double sum = 0;
  for (size_t c = 0; c < logits.classes; ++c) sum += std::exp(logits.values[first + c * logits.apart] - most);
  return most + std::log(sum);
}

Tally of_labels(const Loss& loss, const Samples& output, const Samples& target, bool with_loss) {
  const Logits logits = logits_of(output);
  Tally tally;
  for (size_t place = 0; place < logits.places(); ++place) {
    const int64_t label = whole_at(*target.spec.dtype, target.bytes, place);
    if (!counts(label, loss, logits.classes)) continue;
    const size_t first = logits.at(place), chosen = static_cast<size_t>(label);
    tally.right += largest(logits, first) == chosen;
    ++tally.labels;
    if (with_loss) tally.loss += log_sum(logits, first) - logits.values[first + chosen * logits.apart];
  }
  tally.weight = static_cast<double>(tally.labels);
  return tally;
}

// ``target``: the share of every class, in the shape of the logits.
Tally of_shares(const Samples& output, const Samples& target) {
  const Logits logits = logits_of(output);
  const std::vector<double> shares = floats_of(*target.spec.dtype, target.bytes);
  Tally tally;
  for (size_t place = 0; place < logits.places(); ++place) {
    const size_t first = logits.at(place);
    const double sum = log_sum(logits, first);
    for (size_t c = 0; c < logits.classes; ++c) tally.loss += shares[first + c * logits.apart] * (sum - logits.values[first + c * logits.apart]);
  }
  tally.weight = static_cast<double>(logits.places());
  return tally;
}

Tally of_elements(const Loss& loss, const Samples& output, const Samples& target) {
  const std::vector<double> values = floats_of(*output.spec.dtype, output.bytes), wanted = numbers_of(*target.spec.dtype, target.bytes);
  Tally tally;
  for (size_t i = 0; i < std::min(values.size(), wanted.size()); ++i) {
    const double x = values[i], y = wanted[i];
    tally.loss += loss.name == "mse" ? (x - y) * (x - y) : std::max(x, 0.0) - x * y + std::log1p(std::exp(-std::fabs(x)));
  }
  tally.weight = static_cast<double>(values.size());
  return tally;
}

}  // namespace

void Tally::add(const Tally& other) {
  loss += other.loss;
  weight += other.weight;
  right += other.right;
  labels += other.labels;
}

double Tally::mean() const { return weight > 0 ? loss / weight : NAN; }

double Tally::accuracy() const { return labels ? static_cast<double>(right) / static_cast<double>(labels) : NAN; }

Tally answers(const Loss& loss, const Samples& output, const Samples& target) {
  return has_labels(target.spec, loss) && fit(output, target, false) ? of_labels(loss, output, target, false) : Tally();
}

Tally measure(const Loss& loss, const Samples& output, const Samples& target) {
  const bool labels = has_labels(target.spec, loss), classes = loss.name == "cross_entropy";
  if (classes ? !fit(output, target, !labels) : output.spec.shape != target.spec.shape) {
    throw input_error(output.spec.shown() + " " + shown(output.spec.shape) + " and " + target.spec.shown() + " " + shown(target.spec.shape) +
                      " do not fit each other, sample by sample: evaluate with tvmtrain run");
  }
  if (!classes) return of_elements(loss, output, target);
  return labels ? of_labels(loss, output, target, true) : of_shares(output, target);
}

}  // namespace tt
