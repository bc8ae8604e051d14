// SHA-256 (FIPS 180-4). Our own: eighty lines, against a library that every board would need for a few checksums.
#ifndef TVMTRAIN_SHA256_H_
#define TVMTRAIN_SHA256_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace tt {

class Sha256 {
 public:
  void update(const void* data, size_t size);
  void update(std::string_view text) { update(text.data(), text.size()); }

  // The digest in hexadecimal digits; nothing may be added after it.
  std::string hex();

 private:
  void block(const uint8_t* data);

  std::array<uint32_t, 8> state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<uint8_t, 64> rest_{};
  uint64_t total_ = 0;
};

}  // namespace tt

#endif
