#include "json.h"

#include <locale.h>

#include <clocale>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

namespace tt {
namespace {

using Kind = Json::Kind;

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  Json document() {
    Json value = parse(0);
    skip_space();
    if (at_ != text_.size()) fail("something follows the value");
    return value;
  }

 private:
  [[noreturn]] void fail(const std::string& reason) const {
    throw std::invalid_argument("not JSON at byte " + std::to_string(at_) + ": " + reason);
  }

  bool ended() const { return at_ == text_.size(); }
  unsigned char peek() const { return ended() ? '\0' : static_cast<unsigned char>(text_[at_]); }

  unsigned char next() {
    if (ended()) fail("it ends too early");
    return static_cast<unsigned char>(text_[at_++]);
  }

  void skip_space() {
    while (!ended() && (peek() == ' ' || peek() == '\n' || peek() == '\r' || peek() == '\t')) ++at_;
  }

  void expect(char wanted) {
    if (ended() || text_[at_] != wanted) fail(std::string("want '") + wanted + "'");
    ++at_;
  }

  bool take(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) return false;
    at_ += word.size();
    return true;
  }

  Json parse(int depth) {
    if (depth > kMostJsonDepth) fail("more than " + std::to_string(kMostJsonDepth) + " levels");
    if (++values_ > kMostJsonValues) fail("more than " + std::to_string(kMostJsonValues) + " values");
    skip_space();
    Json value;
    if (peek() == '{') {
      object(value, depth);
    } else if (peek() == '[') {
      array(value, depth);
    } else if (peek() == '"') {
      value.kind = Kind::kString;
      value.text = string();
    } else if (take("true") || take("false")) {
      value.kind = Kind::kBool;
      value.truth = text_[at_ - 2] == 'u';
    } else if (!take("null")) {
      value.kind = Kind::kNumber;
      value.text = number();
    }
    return value;
  }

  void object(Json& value, int depth) {
    value.kind = Kind::kObject;
    expect('{');
    skip_space();
    if (take("}")) return;
    do {
      skip_space();
      std::string key = string();
      skip_space();
      expect(':');
      Json field = parse(depth + 1);
      if (!value.fields.emplace(std::move(key), std::move(field)).second) fail("a key stands twice");
      skip_space();
    } while (take(","));
    expect('}');
  }

  void array(Json& value, int depth) {
    value.kind = Kind::kArray;
    expect('[');
    skip_space();
    if (take("]")) return;
    do {
      value.items.push_back(parse(depth + 1));
      skip_space();
    } while (take(","));
    expect(']');
  }

  bool digits() {
    const size_t start = at_;
    while (peek() >= '0' && peek() <= '9') ++at_;
    return at_ > start;
  }

  std::string number() {
    const size_t start = at_;
    take("-");
    if (!take("0") && !digits()) fail("want a value");
    if (take(".") && !digits()) fail("want digits after the point");
    if (peek() == 'e' || peek() == 'E') {
      ++at_;
      if (peek() == '+' || peek() == '-') ++at_;
      if (!digits()) fail("want digits of an exponent");
    }
    return std::string(text_.substr(start, at_ - start));
  }

  std::string string() {
    expect('"');
    std::string value;
    for (;;) {
      const unsigned char byte = next();
      if (byte == '"') return value;
      if (byte < 0x20) fail("a control character in a string");
      if (byte == '\\') {
        escape(value);
      } else if (byte < 0x80) {
        value.push_back(static_cast<char>(byte));
      } else {
        --at_;
        sequence(value);
      }
    }
  }

  void escape(std::string& value) {
    const unsigned char kind = next();
    static constexpr std::string_view kNames = "\"\\/bfnrt", kValues = "\"\\/\b\f\n\r\t";
    if (const size_t i = kNames.find(static_cast<char>(kind)); i != std::string_view::npos) {
      value.push_back(kValues[i]);
      return;
    }
    if (kind != 'u') fail("an unknown escape");
    uint32_t code = four_digits();
    if (code >= 0xDC00 && code < 0xE000) fail("half of a surrogate pair");
    if (code >= 0xD800 && code < 0xDC00) {
      if (!take("\\u")) fail("half of a surrogate pair");
      const uint32_t low = four_digits();
      if (low < 0xDC00 || low >= 0xE000) fail("half of a surrogate pair");
      code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    }
    append_utf8(value, code);
  }

  uint32_t four_digits() {
    uint32_t code = 0;
    for (int i = 0; i < 4; ++i) {
      const unsigned char c = next();
      const int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
      if (digit < 0) fail("want four hexadecimal digits");
      code = code * 16 + static_cast<uint32_t>(digit);
    }
    return code;
  }

  static void append_utf8(std::string& value, uint32_t code) {
    const auto put = [&](uint32_t byte) { value.push_back(static_cast<char>(byte)); };
    if (code < 0x80) return put(code);
    if (code < 0x800) {
      put(0xC0 | code >> 6);
    } else {
      if (code < 0x10000) {
        put(0xE0 | code >> 12);
      } else {
        put(0xF0 | code >> 18);
        put(0x80 | (code >> 12 & 0x3F));
      }
      put(0x80 | (code >> 6 & 0x3F));
    }
    put(0x80 | (code & 0x3F));
  }

  // One character of several bytes: neither longer than needed, nor a surrogate, nor beyond Unicode.
  void sequence(std::string& value) {
    const size_t start = at_;
    const unsigned char lead = next();
    const int more = lead >= 0xC2 && lead < 0xE0 ? 1 : (lead & 0xF0) == 0xE0 ? 2 : lead >= 0xF0 && lead < 0xF5 ? 3 : 0;
    uint32_t code = lead & (0x3F >> more);
    for (int i = 0; i < more; ++i) {
      const unsigned char byte = next();
      if ((byte & 0xC0) != 0x80) fail("invalid UTF-8");
      code = code << 6 | (byte & 0x3F);
    }
    static constexpr uint32_t kLeast[] = {0x110000, 0x80, 0x800, 0x10000};
    if (code < kLeast[more] || code > 0x10FFFF || (code >= 0xD800 && code < 0xE000)) fail("invalid UTF-8");
    value.append(text_.substr(start, at_ - start));
  }

  std::string_view text_;
  size_t at_ = 0, values_ = 0;
};

void write(const Json& value, std::string& out);

void write_array(const Json& value, std::string& out) {
  out += '[';
  for (size_t i = 0; i < value.items.size(); ++i) {
    if (i) out += ", ";
    write(value.items[i], out);
  }
  out += ']';
}

void write_object(const Json& value, std::string& out) {
  out += '{';
  const char* between = "";
  for (const auto& [key, field] : value.fields) {
    out += between + quoted(key) + ": ";
    write(field, out);
    between = ", ";
  }
  out += '}';
}

void write(const Json& value, std::string& out) {
  switch (value.kind) {
    case Kind::kNull: out += "null"; break;
    case Kind::kBool: out += value.truth ? "true" : "false"; break;
    case Kind::kNumber: out += value.text; break;
    case Kind::kString: out += quoted(value.text); break;
    case Kind::kArray: write_array(value, out); break;
    case Kind::kObject: write_object(value, out); break;
  }
}

// The code point at ``at``, which moves behind it; ``text`` is valid UTF-8.
uint32_t code_point(std::string_view text, size_t& at) {
  const auto lead = static_cast<unsigned char>(text[at++]);
  if (lead < 0x80) return lead;
  const int more = lead < 0xE0 ? 1 : lead < 0xF0 ? 2 : 3;
  uint32_t code = lead & (0x3F >> more);
  for (int i = 0; i < more && at < text.size(); ++i) code = code << 6 | (static_cast<unsigned char>(text[at++]) & 0x3F);
  return code;
}

void append_escape(std::string& out, uint32_t unit) {
  char escape[8];
  std::snprintf(escape, sizeof escape, "\\u%04x", unit & 0xFFFF);
  out += escape;
}

}  // namespace

Json parse_json(std::string_view text) {
  if (text.size() > kMostJsonBytes) throw std::invalid_argument("more than 100 MiB of JSON");
  return Parser(text).document();
}

std::string canonical(const Json& value) {
  std::string out;
  write(value, out);
  return out;
}

std::string quoted(std::string_view text) {
  static constexpr std::string_view kSpecial = "\"\\\b\f\n\r\t", kNames = "\"\\bfnrt";
  std::string out = "\"";
  for (size_t at = 0; at < text.size();) {
    const uint32_t code = code_point(text, at);
    if (const size_t i = code < 0x80 ? kSpecial.find(static_cast<char>(code)) : std::string_view::npos; i != std::string_view::npos) {
      out += '\\';
      out += kNames[i];
    } else if (code >= 0x20 && code < 0x7F) {
      out += static_cast<char>(code);
    } else if (code < 0x10000) {
      append_escape(out, code);
    } else {
      append_escape(out, 0xD800 + ((code - 0x10000) >> 10));
      append_escape(out, 0xDC00 + ((code - 0x10000) & 0x3FF));
    }
  }
  return out + '"';
}

bool to_double(const std::string& text, double* value) {
  // Not std::from_chars, which the C++ libraries of older boards lack.
  static const locale_t plain = newlocale(LC_ALL_MASK, "C", nullptr);
  if (text.empty() || text.find_first_not_of("0123456789+-.eE") != std::string::npos) return false;
  char* end = nullptr;
  *value = strtod_l(text.c_str(), &end, plain);
  return end == text.c_str() + text.size();
}

}  // namespace tt
