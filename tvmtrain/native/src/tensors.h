// Tensors: their dtypes, and files of them (safetensors).
#ifndef TVMTRAIN_TENSORS_H_
#define TVMTRAIN_TENSORS_H_

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "tvmtrain.h"

namespace tt {

using Shape = std::vector<int64_t>;

struct DType {
  tvmtrain_dtype code;
  const char* name;    // NumPy's
  const char* stored;  // that of safetensors
  char kind;           // as NumPy: 'f', 'i', 'u', 'b'
  uint8_t bytes;
};

// NULL for an unknown one.
const DType* dtype_named(std::string_view name);
const DType* dtype_stored(std::string_view name);
const DType* dtype_of(tvmtrain_dtype code);

// Bytes of a tensor; false if they do not fit in 63 bits or a size is negative.
bool byte_count(const Shape& shape, const DType& dtype, uint64_t* bytes);

// "[4, 3]", as json.dumps writes a shape.
std::string shown(const Shape& shape);

// A tensor in memory of somebody else's, without alignment.
struct TensorView {
  const DType* dtype = nullptr;
  Shape shape;
  std::string_view bytes;
};

struct TensorFile {
  std::map<std::string, TensorView> tensors;
  std::map<std::string, std::string> facts;  // the file's metadata
};

// Where a tensor lies: ``start`` counts from the first byte of the file.
struct TensorPlace {
  const DType* dtype = nullptr;
  Shape shape;
  uint64_t start = 0, bytes = 0;
};

struct TensorHeader {
  std::map<std::string, TensorPlace> tensors;
  std::map<std::string, std::string> facts;
};

// A safetensors file of ``size`` bytes begins with the length of its header, in kLengthBytes. Throws std::invalid_argument where they
// are too few or it does not fit.
constexpr uint64_t kLengthBytes = 8;
uint64_t header_length(std::string_view first, uint64_t size);

// What the header, which comes next, says of a file of ``size`` bytes. As the reference implementation: every byte of values belongs
// to exactly one tensor. Throws std::invalid_argument with the reason.
TensorHeader parse_header(std::string_view text, uint64_t size);

// The tensors of a safetensors file in memory, which has to outlive them. Throws as these.
TensorFile parse_tensors(std::string_view data);

// The bytes before those of the tensors, which follow in the order that ``order`` gets.
std::string tensor_header(const std::map<std::string, TensorView>& tensors, const std::map<std::string, std::string>& facts,
                          std::vector<const TensorView*>* order);

}  // namespace tt

#endif
