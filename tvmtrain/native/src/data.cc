#include "data.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "error.h"
#include "json.h"
#include "values.h"

namespace tt {
namespace {

// The numbers of one metadata field: one for all channels, or one per channel.
std::vector<float> numbers(const TensorHeader& file, const char* name, size_t channels, float missing, const std::string& where) {
  const auto found = file.facts.find(name);
  if (found == file.facts.end()) return {missing};
  std::vector<float> values;
  try {
    for (const Json& item : parse_json(found->second).items) {
      double value = NAN;
      const bool good = item.kind == Json::Kind::kNumber && to_double(item.text, &value);
      values.push_back(good ? static_cast<float>(value) : NAN);
    }
  } catch (const std::invalid_argument&) {
    values.clear();
  }
  const bool good = (values.size() == 1 || values.size() == channels) && std::all_of(values.begin(), values.end(), [](float v) { return std::isfinite(v); });
  if (!good) throw input_error(where + ": metadata '" + name + "' is " + found->second + "; want a list of 1 or " + std::to_string(channels) + " numbers");
  return values;
}

// What each byte stands for, by channel, rounded as NumPy rounds it; one row where every channel has the same numbers.
std::vector<float> table(const TensorHeader& file, size_t channels, const std::string& where) {
  const std::vector<float> mean = numbers(file, "mean", channels, 0, where), deviation = numbers(file, "std", channels, 1, where);
  std::vector<float> values;
  for (size_t c = 0; c < std::max(mean.size(), deviation.size()); ++c) {
    const float shift = mean[mean.size() > 1 ? c : 0], scale = deviation[deviation.size() > 1 ? c : 0];
    if (!(scale > 0)) throw input_error(where + ": metadata 'std' has " + std::to_string(scale) + "; want positive numbers");
    for (int byte = 0; byte < 256; ++byte) values.push_back((static_cast<float>(byte) / 255.0f - shift) / scale);
  }
  return values;
}

size_t inner(const Shape& shape, size_t from) {
  size_t count = 1;
  for (size_t i = from; i < shape.size(); ++i) count *= static_cast<size_t>(shape[i]);
  return count;
}

constexpr uint64_t kLabelBytes = 1 << 16;  // read at once

std::string text_of(const Pieces& file, uint64_t start, uint64_t count) {
  std::string text(static_cast<size_t>(count), '\0');
  file.read(start, text.size(), text.data());
  return text;
}

bool is_zip(const Pieces& file) { return text_of(file, 0, std::min<uint64_t>(4, file.size())) == "PK\3\4"; }

TensorHeader header_of(const Pieces& file) {
  const uint64_t length = header_length(text_of(file, 0, std::min(kLengthBytes, file.size())), file.size());
  return parse_header(text_of(file, kLengthBytes, length), file.size());
}

}  // namespace

Dataset::Dataset(const Pieces& file, const Manifest& manifest, const std::string& where) : file_(file), where_(where), loss_(manifest.loss) {
  TensorHeader header;
  try {
    header = header_of(file);
  } catch (const std::invalid_argument& error) {
    if (is_zip(file)) throw input_error(where + ": an .npz, or another zip file; want the safetensors file that `tvmtrain deploy --data` makes of it, on the machine with Python");
    throw input_error(where + ": not a readable safetensors file (" + error.what() + ")");
  }
  const std::vector<TensorSpec>& taken = manifest.entry("train_step").inputs;
  for (Role role : {Role::kInput, Role::kTarget}) {
    for (const TensorSpec& spec : taken) {
      if (spec.role == role) columns_.push_back(column(spec, header, manifest.batch));
    }
  }
  if (count_.value_or(0) == 0) throw input_error(where + ": no samples in it");
}

Dataset::Column Dataset::column(const TensorSpec& spec, const TensorHeader& header, int64_t batch) {
  const auto found = header.tensors.find(spec.name);
  if (found == header.tensors.end()) throw input_error(where_ + ": no tensor named '" + spec.name + "', the step's " + role_name(spec.role));
  const TensorPlace& tensor = found->second;
  const bool scaled = tensor.dtype->code == TVMTRAIN_UINT8 && spec.dtype->code == TVMTRAIN_FLOAT32 && spec.role == Role::kInput;
  if (tensor.dtype != spec.dtype && !scaled) {
    throw input_error(where_ + ": '" + spec.name + "' is " + tensor.dtype->name + "; want " + spec.dtype->name +
                      (spec.role == Role::kInput && spec.dtype->kind == 'f' ? ", or uint8 images" : ""));
  }
  const int64_t each = rows_of(spec, batch);
  const bool rows = each > 0;
  const bool fits = rows ? tensor.shape.size() == spec.shape.size() && std::equal(spec.shape.begin() + 1, spec.shape.end(), tensor.shape.begin() + 1) && tensor.shape[0] % each == 0
                         : tensor.shape == spec.shape;
  if (!fits) throw input_error(where_ + ": '" + spec.name + "' has shape " + shown(tensor.shape) + "; want that of the step, " + shown(spec.shape) + ", with " + (rows ? "any number of samples" : "these very sizes"));
  const size_t sample = rows ? inner(spec.shape, 1) * static_cast<size_t>(each) * tensor.dtype->bytes : static_cast<size_t>(tensor.bytes);
  Column column{spec, tensor.shape, tensor.start, sample, !rows, rows ? spec.bytes() / static_cast<uint64_t>(batch) : spec.bytes(), {}};
  if (scaled && tensor.bytes > 0) column.ready = table(header, spec.shape.size() > 1 ? static_cast<size_t>(spec.shape[1]) : 1, where_);
  if (rows) {
    const auto samples = static_cast<uint64_t>(tensor.shape[0] / each);
    if (count_ && samples != *count_) throw input_error(where_ + ": '" + spec.name + "' has " + std::to_string(samples) + " samples and others have " + std::to_string(*count_));
    count_ = samples;
  }
  return column;
}

void Dataset::append(const Column& column, uint64_t row, std::string& values) const {
  const uint64_t place = column.start + (column.shared ? 0 : row * column.sample);
  const size_t start = values.size();
  if (column.ready.empty()) {
    values.resize(start + column.sample);
    file_.read(place, column.sample, values.data() + start);
    return;
  }
  const std::string stored = text_of(file_, place, column.sample);
  const size_t channels = column.ready.size() / 256, pixels = inner(column.spec.shape, 2);
  values.resize(start + stored.size() * sizeof(float));
  for (size_t i = 0; i < stored.size(); ++i) {
    const float value = column.ready[i / pixels % channels * 256 + static_cast<uint8_t>(stored[i])];
    std::memcpy(values.data() + start + i * sizeof(float), &value, sizeof value);
  }
}

// ``values``: of sample ``row``, as the step takes them.
void Dataset::check(const Column& column, uint64_t row, std::string_view values) const {
  const size_t each = column.sample / column.spec.dtype->bytes;
  const auto place = [&](size_t flat) {
    if (column.shared) return place_in(column.shape, flat);
    const uint64_t sample = row + flat / each;
    return place_in(column.shape, static_cast<size_t>(sample) * each + flat % each) + ", sample " + std::to_string(sample) + " (from 0)";
  };
  try {
    check_values(column.spec, values, loss_, place);
  } catch (const Error& error) {
    throw input_error(where_ + ": " + error.what());
  }
}

void Dataset::check_labels() const {
  for (const Column& column : columns_) {
    if (!has_labels(column.spec, loss_) || column.sample == 0) continue;
    const uint64_t rows = column.shared ? 1 : size(), at_once = std::max<uint64_t>(1, kLabelBytes / column.sample);
    for (uint64_t row = 0; row < rows; row += at_once) {
      check(column, row, text_of(file_, column.start + row * column.sample, std::min(at_once, rows - row) * column.sample));
    }
  }
}

std::string Dataset::batch(size_t i, const uint64_t* rows, size_t count) const {
  const Column& column = columns_.at(i);
  std::string values;
  const size_t parts = column.shared ? 1 : count;
  for (size_t j = 0; j < parts; ++j) {
    const size_t start = values.size();
    append(column, rows[j], values);
    // Normalized bytes are as finite as the numbers that they are normalized by.
    if (column.ready.empty()) check(column, rows[j], std::string_view(values).substr(start));
  }
  // The step is going to read so many.
  if (values.size() != parts * column.taken) {
    throw input_error("'" + column.spec.name + "' has " + std::to_string(values.size()) + " bytes in a batch; want " + std::to_string(parts * column.taken));
  }
  return values;
}

}  // namespace tt
