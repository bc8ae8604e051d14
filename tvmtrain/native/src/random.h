// The random words and orders of NumPy, bit for bit: Philox (channels) and PCG64 (the order of samples).
#ifndef TVMTRAIN_RANDOM_H_
#define TVMTRAIN_RANDOM_H_

#include <cstddef>
#include <cstdint>
#include <vector>

namespace tt {

// numpy.random.Philox(key=[first, second], counter=[0, 0, 0, number]).random_raw(count)
std::vector<uint64_t> philox_words(uint64_t first, uint64_t second, uint64_t number, size_t count);

// numpy.random.Generator(numpy.random.PCG64([seed, epoch])).permutation(count)
std::vector<uint64_t> permutation(uint64_t seed, uint64_t epoch, uint64_t count);

// zlib.crc32
uint32_t crc32(const void* data, size_t size);

// ndarray.sum() of float64: pairwise, with NumPy's own order of additions.
double pairwise_sum(const double* values, size_t count);

}  // namespace tt

#endif
