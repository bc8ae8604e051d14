#include "random.h"

#include <algorithm>
#include <numeric>

namespace tt {
namespace {

using u128 = unsigned __int128;

// Philox-4x64-10 (Salmon et al., SC 2011).
void philox_block(const uint64_t counter[4], uint64_t key0, uint64_t key1, uint64_t out[4]) {
  uint64_t word[4] = {counter[0], counter[1], counter[2], counter[3]};
  for (int round = 0; round < 10; ++round) {
    const u128 first = u128{0xD2E7470EE14C6C93} * word[0], second = u128{0xCA5A826395121157} * word[2];
    const uint64_t next[4] = {static_cast<uint64_t>(second >> 64) ^ word[1] ^ key0, static_cast<uint64_t>(second),
                              static_cast<uint64_t>(first >> 64) ^ word[3] ^ key1, static_cast<uint64_t>(first)};
    std::copy(next, next + 4, word);
    key0 += 0x9E3779B97F4A7C15;
    key1 += 0xBB67AE8584CAA73B;
  }
  std::copy(word, word + 4, out);
}

// numpy.random.SeedSequence: eight 32-bit words of state from some words of entropy.
class SeedSequence {
 public:
  explicit SeedSequence(const std::vector<uint32_t>& entropy) {
    for (size_t i = 0; i < 4; ++i) pool_[i] = hash(i < entropy.size() ? entropy[i] : 0);
    for (size_t from = 0; from < 4; ++from) {
      for (size_t to = 0; to < 4; ++to) {
        if (from != to) pool_[to] = mix(pool_[to], hash(pool_[from]));
      }
    }
    for (size_t from = 4; from < entropy.size(); ++from) {
      for (uint32_t& word : pool_) word = mix(word, hash(entropy[from]));
    }
  }

  std::vector<uint64_t> words(size_t count) const {
    std::vector<uint64_t> result;
    uint32_t constant = 0x8b51f9dd;
    for (size_t i = 0; i < 2 * count; ++i) {
      uint32_t value = pool_[i % 4] ^ constant;
      constant *= 0x58f38ded;
      value *= constant;
      value ^= value >> 16;
      if (i % 2 == 0) {
        result.push_back(value);
      } else {
        result.back() |= uint64_t{value} << 32;
      }
    }
    return result;
  }

 private:
  uint32_t hash(uint32_t value) {
    value ^= constant_;
    constant_ *= 0x931e8875;
    value *= constant_;
    return value ^ value >> 16;
  }

  static uint32_t mix(uint32_t x, uint32_t y) {
    const uint32_t value = 0xca01f9dd * x - 0x4973f715 * y;
    return value ^ value >> 16;
  }

  uint32_t constant_ = 0x43b0d7e5;
  uint32_t pool_[4];
};

// PCG64 (XSL-RR 128/64).
class Pcg64 {
 public:
  explicit Pcg64(const SeedSequence& seeds) {
    const std::vector<uint64_t> word = seeds.words(4);
    increment_ = (u128{word[2]} << 64 | word[3]) << 1 | 1;
    advance();
    state_ += u128{word[0]} << 64 | word[1];
    advance();
  }

  uint64_t next64() {
    advance();
    const auto folded = static_cast<uint64_t>(state_ >> 64) ^ static_cast<uint64_t>(state_);
    const auto turn = static_cast<unsigned>(state_ >> 122);
    return folded >> turn | folded << (-turn & 63);
  }

  // The halves of a word, the low one first.
  uint32_t next32() {
    if (has_half_) {
      has_half_ = false;
      return half_;
    }
    const uint64_t word = next64();
    has_half_ = true;
    half_ = static_cast<uint32_t>(word >> 32);
    return static_cast<uint32_t>(word);
  }

  // From 0 to ``last``, all equally likely: bits enough for ``last``, drawn again while they are more.
  uint64_t bounded(uint64_t last) {
    uint64_t mask = last;
    for (int shift = 1; shift < 64; shift *= 2) mask |= mask >> shift;
    for (;;) {
      const uint64_t value = (last <= UINT32_MAX ? next32() : next64()) & mask;
      if (value <= last) return value;
    }
  }

 private:
  void advance() { state_ = state_ * (u128{2549297995355413924u} << 64 | 4865540595714422341u) + increment_; }

  u128 state_ = 0, increment_ = 0;
  bool has_half_ = false;
  uint32_t half_ = 0;
};

// A number as the 32-bit words that NumPy makes of it: as many as it needs, the low one first.
void append_words(std::vector<uint32_t>& words, uint64_t number) {
  words.push_back(static_cast<uint32_t>(number));
  if (number >> 32) words.push_back(static_cast<uint32_t>(number >> 32));
}

}  // namespace

std::vector<uint64_t> philox_words(uint64_t first, uint64_t second, uint64_t number, size_t count) {
  std::vector<uint64_t> words;
  uint64_t counter[4] = {0, 0, 0, number};
  while (words.size() < count) {
    uint64_t block[4];
    ++counter[0];  // no overflow into the next word: that would take 2^64 blocks
    philox_block(counter, first, second, block);
    words.insert(words.end(), block, block + std::min<size_t>(4, count - words.size()));
  }
  return words;
}

std::vector<uint64_t> permutation(uint64_t seed, uint64_t epoch, uint64_t count) {
  std::vector<uint32_t> entropy;
  append_words(entropy, seed);
  append_words(entropy, epoch);
  Pcg64 generator{SeedSequence(entropy)};
  std::vector<uint64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  for (uint64_t i = count; i-- > 1;) std::swap(order[i], order[generator.bounded(i)]);
  return order;
}

uint32_t crc32(const void* data, size_t size) {
  const auto* bytes = static_cast<const uint8_t*>(data);
  uint32_t sum = ~0u;
  for (size_t i = 0; i < size; ++i) {
    sum ^= bytes[i];
    for (int bit = 0; bit < 8; ++bit) sum = sum >> 1 ^ (0xEDB88320 & -(sum & 1));
  }
  return ~sum;
}

double pairwise_sum(const double* values, size_t count) {
  if (count < 8) {
    double sum = -0.0;  // so that a sum of negative zeros stays one
    for (size_t i = 0; i < count; ++i) sum += values[i];
    return sum;
  }
  if (count > 128) {
    const size_t half = count / 2 - count / 2 % 8;
    return pairwise_sum(values, half) + pairwise_sum(values + half, count - half);
  }
  double lane[8];
  std::copy(values, values + 8, lane);
  size_t i = 8;
  for (; i + 8 <= count; i += 8) {
    for (size_t j = 0; j < 8; ++j) lane[j] += values[i + j];
  }
  double sum = ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
  for (; i < count; ++i) sum += values[i];
  return sum;
}

}  // namespace tt
