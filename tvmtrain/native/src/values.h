// What lies in arrays: checked before native code sees it, and single numbers in any floating dtype.
#ifndef TVMTRAIN_VALUES_H_
#define TVMTRAIN_VALUES_H_

#include <cstddef>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "manifest.h"

namespace tt {

// Where element number ``flat`` of an array is, in a message.
using Place = std::function<std::string(size_t flat)>;

// "(0, 3)", the place of an element in an array of ``shape``, whose first axis may be longer.
std::string place_in(const Shape& shape, size_t flat);

// Whether ``spec`` has the classes of ``loss``, as whole numbers.
bool has_labels(const TensorSpec& spec, const Loss& loss);

// Throws an input error for NaN and infinite values in an array of ``spec``, and for labels out of range.
void check_values(const TensorSpec& spec, std::string_view bytes, const Loss& loss, const Place& place);

// Number ``i`` of an array, which is known to be there.
double float_at(const DType& dtype, std::string_view bytes, size_t i);
int64_t whole_at(const DType& dtype, std::string_view bytes, size_t i);

// All of a floating array.
std::vector<double> floats_of(const DType& dtype, std::string_view bytes);

// All of an array, whatever its dtype.
std::vector<double> numbers_of(const DType& dtype, std::string_view bytes);

// One number in the bytes of a floating dtype, rounded to the nearest.
std::string float_bytes(const DType& dtype, double value);

}  // namespace tt

#endif
