// What lies in arrays: checked before native code sees it, and single numbers in any floating dtype.
#ifndef TVMTRAIN_VALUES_H_
#define TVMTRAIN_VALUES_H_

#include <string>
#include <string_view>
#include <vector>

#include "manifest.h"

namespace tt {

// Throws an input error for NaN and infinite values of the floats ``bytes``.
void check_finite(const TensorSpec& spec, std::string_view bytes);

// Throws an input error for class numbers, integers, out of range.
void check_labels(const TensorSpec& spec, std::string_view bytes, const Loss& loss);

// Number ``i`` of an array, which is known to be there.
double float_at(const DType& dtype, std::string_view bytes, size_t i);
int64_t whole_at(const DType& dtype, std::string_view bytes, size_t i);

// All of a floating array.
std::vector<double> floats_of(const DType& dtype, std::string_view bytes);

// One number in the bytes of a floating dtype, rounded to the nearest.
std::string float_bytes(const DType& dtype, double value);

}  // namespace tt

#endif
