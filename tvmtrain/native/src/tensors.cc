#include "tensors.h"

#include <algorithm>
#include <charconv>
#include <stdexcept>
#include <utility>

#include "json.h"

namespace tt {
namespace {

constexpr DType kTypes[] = {
    {TVMTRAIN_FLOAT32, "float32", "F32", 'f', 4}, {TVMTRAIN_FLOAT64, "float64", "F64", 'f', 8}, {TVMTRAIN_FLOAT16, "float16", "F16", 'f', 2},
    {TVMTRAIN_INT64, "int64", "I64", 'i', 8},     {TVMTRAIN_INT32, "int32", "I32", 'i', 4},     {TVMTRAIN_INT16, "int16", "I16", 'i', 2},
    {TVMTRAIN_INT8, "int8", "I8", 'i', 1},        {TVMTRAIN_UINT64, "uint64", "U64", 'u', 8},   {TVMTRAIN_UINT32, "uint32", "U32", 'u', 4},
    {TVMTRAIN_UINT16, "uint16", "U16", 'u', 2},   {TVMTRAIN_UINT8, "uint8", "U8", 'u', 1},      {TVMTRAIN_BOOL, "bool", "BOOL", 'b', 1},
};

[[noreturn]] void fail(const std::string& reason) { throw std::invalid_argument(reason); }

const Json& field(const Json& object, const std::string& tensor, const char* key, Json::Kind kind) {
  const auto found = object.fields.find(key);
  if (found == object.fields.end() || found->second.kind != kind) fail("tensor '" + tensor + "' lacks a good '" + key + "'");
  return found->second;
}

std::vector<uint64_t> numbers(const Json& array, const std::string& tensor) {
  std::vector<uint64_t> values;
  for (const Json& item : array.items) {
    uint64_t value = 0;
    const char* end = item.text.data() + item.text.size();
    const auto [stop, error] = std::from_chars(item.text.data(), end, value);
    if (item.kind != Json::Kind::kNumber || error != std::errc() || stop != end || value > INT64_MAX) {
      fail("tensor '" + tensor + "' has a size that is no whole number");
    }
    values.push_back(value);
  }
  return values;
}

// Of a file whose values are bytes ``first`` .. ``end``.
TensorPlace parse_tensor(const std::string& name, const Json& entry, uint64_t first, uint64_t end) {
  if (entry.kind != Json::Kind::kObject) fail("tensor '" + name + "' is no object");
  TensorPlace tensor;
  const std::string& dtype = field(entry, name, "dtype", Json::Kind::kString).text;
  tensor.dtype = dtype_stored(dtype);
  if (!tensor.dtype) fail("tensor '" + name + "' has the unknown dtype " + dtype);
  for (uint64_t size : numbers(field(entry, name, "shape", Json::Kind::kArray), name)) tensor.shape.push_back(static_cast<int64_t>(size));
  const auto offsets = numbers(field(entry, name, "data_offsets", Json::Kind::kArray), name);
  if (offsets.size() != 2 || offsets[0] > offsets[1] || offsets[1] > end - first) fail("tensor '" + name + "' lies outside of the file");
  uint64_t bytes;
  if (!byte_count(tensor.shape, *tensor.dtype, &bytes) || bytes != offsets[1] - offsets[0]) {
    fail("tensor '" + name + "' has " + std::to_string(offsets[1] - offsets[0]) + " bytes, which is not its shape's");
  }
  tensor.start = first + offsets[0];
  tensor.bytes = bytes;
  return tensor;
}

void check_places(const std::map<std::string, TensorPlace>& tensors, uint64_t first, uint64_t end) {
  std::vector<std::pair<uint64_t, uint64_t>> places;
  for (const auto& [name, tensor] : tensors) places.emplace_back(tensor.start, tensor.start + tensor.bytes);
  std::sort(places.begin(), places.end());
  uint64_t at = first;
  for (const auto& [start, stop] : places) {
    if (start != at) fail("its tensors overlap or leave bytes unused");
    at = stop;
  }
  if (at != end) fail("it has " + std::to_string(end - first) + " bytes of values and its tensors take " + std::to_string(at - first));
}

std::map<std::string, std::string> metadata(const Json& object) {
  if (object.kind != Json::Kind::kObject) fail("its metadata are no object");
  std::map<std::string, std::string> facts;
  for (const auto& [key, value] : object.fields) {
    if (value.kind != Json::Kind::kString) fail("its metadata are not all text");
    facts[key] = value.text;
  }
  return facts;
}


// What safetensors writes is compact JSON.
std::string entry(const std::string& name, const TensorView& tensor, uint64_t start) {
  std::string shape;
  for (int64_t size : tensor.shape) shape += (shape.empty() ? "" : ",") + std::to_string(size);
  return quoted(name) + ":{\"dtype\":\"" + tensor.dtype->stored + "\",\"shape\":[" + shape + "],\"data_offsets\":[" +
         std::to_string(start) + "," + std::to_string(start + tensor.bytes.size()) + "]}";
}

std::string little_endian(uint64_t value) {
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes += static_cast<char>(value >> (8 * i) & 0xFF);
  return bytes;
}

}  // namespace

const DType* dtype_named(std::string_view name) {
  for (const DType& type : kTypes) {
    if (type.name == name) return &type;
  }
  return nullptr;
}

const DType* dtype_stored(std::string_view name) {
  for (const DType& type : kTypes) {
    if (type.stored == name) return &type;
  }
  return nullptr;
}

const DType* dtype_of(tvmtrain_dtype code) {
  for (const DType& type : kTypes) {
    if (type.code == code) return &type;
  }
  return nullptr;
}

bool byte_count(const Shape& shape, const DType& dtype, uint64_t* bytes) {
  uint64_t total = dtype.bytes;
  for (int64_t size : shape) {
    if (size < 0 || __builtin_mul_overflow(total, static_cast<uint64_t>(size), &total) || total > INT64_MAX) return false;
  }
  *bytes = total;
  return true;
}

std::string shown(const Shape& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

uint64_t header_length(std::string_view first, uint64_t size) {
  if (first.size() < kLengthBytes || size < kLengthBytes) fail("it has " + std::to_string(size) + " bytes, too few for a header");
  uint64_t length = 0;
  for (size_t i = 0; i < kLengthBytes; ++i) length |= uint64_t{static_cast<uint8_t>(first[i])} << (8 * i);
  if (length > kMostJsonBytes || length > size - kLengthBytes) fail("its header of " + std::to_string(length) + " bytes lies outside of the file");
  return length;
}

TensorHeader parse_header(std::string_view text, uint64_t size) {
  const Json header = parse_json(text);
  if (header.kind != Json::Kind::kObject) fail("its header is no object");
  const uint64_t first = kLengthBytes + text.size();
  TensorHeader file;
  for (const auto& [name, value] : header.fields) {
    if (name == "__metadata__") {
      file.facts = metadata(value);
    } else {
      file.tensors[name] = parse_tensor(name, value, first, size);
    }
  }
  check_places(file.tensors, first, size);
  return file;
}

TensorFile parse_tensors(std::string_view data) {
  const TensorHeader header = parse_header(data.substr(kLengthBytes, header_length(data, data.size())), data.size());
  TensorFile file;
  for (const auto& [name, place] : header.tensors) file.tensors[name] = {place.dtype, place.shape, data.substr(place.start, place.bytes)};
  file.facts = header.facts;
  return file;
}

std::string tensor_header(const std::map<std::string, TensorView>& tensors, const std::map<std::string, std::string>& facts,
                          std::vector<const TensorView*>* order) {
  std::vector<std::pair<const std::string*, const TensorView*>> sorted;
  for (const auto& [name, tensor] : tensors) sorted.emplace_back(&name, &tensor);
  // Wide values first, so that every tensor lies aligned; names are in order already.
  std::stable_sort(sorted.begin(), sorted.end(), [](const auto& a, const auto& b) { return a.second->dtype->bytes > b.second->dtype->bytes; });
  std::string text = "{", between;
  if (!facts.empty()) {
    text += "\"__metadata__\":{";
    for (const auto& [key, value] : facts) {
      text += between + quoted(key) + ":" + quoted(value);
      between = ",";
    }
    text += "}";
  }
  uint64_t at = 0;
  for (const auto& [name, tensor] : sorted) {
    text += between + entry(*name, *tensor, at);
    between = ",";
    at += tensor->bytes.size();
    order->push_back(tensor);
  }
  text += "}";
  text.append((8 - text.size() % 8) % 8, ' ');
  return little_endian(text.size()) + text;
}

}  // namespace tt
