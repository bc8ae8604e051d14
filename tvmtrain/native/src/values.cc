#include "values.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "error.h"

namespace tt {
namespace {

template <typename T>
T load(std::string_view bytes, size_t i) {
  T value;
  std::memcpy(&value, bytes.data() + i * sizeof(T), sizeof(T));
  return value;
}

template <typename T>
std::string store(T value) {
  return std::string(reinterpret_cast<const char*>(&value), sizeof(T));
}

double half_to_double(uint16_t half) {
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  const double size = exponent == 31 ? (fraction ? std::nan("") : INFINITY)
                      : exponent     ? std::ldexp(1024 + fraction, exponent - 25)
                                     : std::ldexp(fraction, -24);
  return half >> 15 ? -size : size;
}

uint16_t double_to_half(double value) {
  const double size = std::fabs(value);
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return 0x7E00;
  if (size >= 65520) return sign | 0x7C00;
  const int exponent = size == 0 ? -14 : std::max(std::ilogb(size), -14);
  const auto digits = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
  return static_cast<uint16_t>(sign | (((exponent + 14) << 10) + digits));
}

// Whether all bits of ``mask``, the exponent, are set in any of the words.
template <typename T>
bool any_nonfinite(std::string_view bytes, T mask) {
  bool found = false;
  for (size_t i = 0; i < bytes.size() / sizeof(T); ++i) found |= (load<T>(bytes, i) & mask) == mask;
  return found;
}

bool nonfinite(const DType& dtype, std::string_view bytes) {
  if (dtype.bytes == 2) return any_nonfinite<uint16_t>(bytes, 0x7C00);
  if (dtype.bytes == 4) return any_nonfinite<uint32_t>(bytes, 0x7F800000);
  return any_nonfinite<uint64_t>(bytes, 0x7FF0000000000000);
}

void check_finite(const TensorSpec& spec, std::string_view bytes, const Place& place) {
  if (!nonfinite(*spec.dtype, bytes)) return;
  size_t first = 0;
  while (std::isfinite(float_at(*spec.dtype, bytes, first))) ++first;
  throw input_error(spec.shown() + " has NaN or infinite values, the first at " + place(first));
}

void check_labels(const TensorSpec& spec, std::string_view bytes, const Loss& loss, const Place& place) {
  for (size_t i = 0; i < bytes.size() / spec.dtype->bytes; ++i) {
    const int64_t label = whole_at(*spec.dtype, bytes, i);
    if ((label >= 0 && label < *loss.classes) || label == loss.ignore_index) continue;
    const std::string ignored = loss.ignore_index ? ", or " + std::to_string(*loss.ignore_index) + " to be ignored" : "";
    throw input_error(spec.shown() + " has the label " + std::to_string(label) + " at " + place(i) + "; want 0.." + std::to_string(*loss.classes - 1) + ignored);
  }
}

}  // namespace

std::string place_in(const Shape& shape, size_t flat) {
  std::string text;
  for (size_t axis = shape.size(); axis-- > 0;) {
    const auto size = static_cast<size_t>(shape[axis]);
    // Any number of samples may have been given: the first axis takes what is left.
    const size_t index = axis && size ? flat % size : flat;
    text = std::to_string(index) + (text.empty() ? "" : ", ") + text;
    flat = axis && size ? flat / size : 0;
  }
  return "(" + text + ")";
}

bool has_labels(const TensorSpec& spec, const Loss& loss) { return spec.role == Role::kTarget && spec.dtype->kind != 'f' && loss.name == "cross_entropy" && loss.classes; }

void check_values(const TensorSpec& spec, std::string_view bytes, const Loss& loss, const Place& place) {
  if (spec.dtype->kind == 'f') check_finite(spec, bytes, place);
  if (has_labels(spec, loss)) check_labels(spec, bytes, loss, place);
}

double float_at(const DType& dtype, std::string_view bytes, size_t i) {
  if (dtype.bytes == 2) return half_to_double(load<uint16_t>(bytes, i));
  return dtype.bytes == 4 ? static_cast<double>(load<float>(bytes, i)) : load<double>(bytes, i);
}

int64_t whole_at(const DType& dtype, std::string_view bytes, size_t i) {
  switch (dtype.code) {
    case TVMTRAIN_INT64: return load<int64_t>(bytes, i);
    case TVMTRAIN_INT32: return load<int32_t>(bytes, i);
    case TVMTRAIN_INT16: return load<int16_t>(bytes, i);
    case TVMTRAIN_INT8: return load<int8_t>(bytes, i);
    case TVMTRAIN_UINT32: return load<uint32_t>(bytes, i);
    case TVMTRAIN_UINT16: return load<uint16_t>(bytes, i);
    // No label is as large as this.
    case TVMTRAIN_UINT64: return static_cast<int64_t>(std::min<uint64_t>(load<uint64_t>(bytes, i), INT64_MAX));
    default: return load<uint8_t>(bytes, i);
  }
}

std::vector<double> floats_of(const DType& dtype, std::string_view bytes) {
  std::vector<double> values(bytes.size() / dtype.bytes);
  for (size_t i = 0; i < values.size(); ++i) values[i] = float_at(dtype, bytes, i);
  return values;
}

std::vector<double> numbers_of(const DType& dtype, std::string_view bytes) {
  if (dtype.kind == 'f') return floats_of(dtype, bytes);
  std::vector<double> values(bytes.size() / dtype.bytes);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<double>(whole_at(dtype, bytes, i));
  return values;
}

std::string float_bytes(const DType& dtype, double value) {
  if (dtype.bytes == 2) return store(double_to_half(value));
  return dtype.bytes == 4 ? store(static_cast<float>(value)) : store(value);
}

}  // namespace tt
