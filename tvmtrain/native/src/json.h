// A strict reader of JSON: the manifest of an artifact and the header of a safetensors file.
//
// Our own, because no JSON library comes with the compilers that build this for a board, and because two things are wanted that
// libraries lack: numbers keep their text, so that the digest of a manifest (which is that of Python's json.dumps) can be
// recomputed, and what is read is bounded in depth and size. Refused: duplicate keys, invalid UTF-8, lone surrogates, NaN, and
// anything after the value.
#ifndef TVMTRAIN_JSON_H_
#define TVMTRAIN_JSON_H_

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace tt {

struct Json {
  enum class Kind { kNull, kBool, kNumber, kString, kArray, kObject };

  Kind kind = Kind::kNull;
  bool truth = false;
  std::string text;                    // of a string, in UTF-8; of a number, as it was written
  std::vector<Json> items;             // of an array
  std::map<std::string, Json> fields;  // of an object; sorted as Python sorts strings, by code points
};

constexpr size_t kMostJsonBytes = size_t{100} << 20;
constexpr int kMostJsonDepth = 64;
constexpr size_t kMostJsonValues = size_t{4} << 20;  // each takes some hundred bytes, and its text as few as two

// Throws std::invalid_argument with the place and the reason.
Json parse_json(std::string_view text);

// ``value`` as Python's json.dumps(value, sort_keys=True) writes it.
std::string canonical(const Json& value);

// ``text`` (UTF-8) as a JSON string in ASCII, with its quotes.
std::string quoted(std::string_view text);

// The whole of ``text``, a decimal number, in whatever locale; false for anything else. One too large is infinite.
bool to_double(const std::string& text, double* value);

}  // namespace tt

#endif
