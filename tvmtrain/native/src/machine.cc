#include "machine.h"

#include <sched.h>
#include <sys/auxv.h>

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <set>
#include <sstream>

#include "error.h"

namespace tt {
namespace {

#if defined(__x86_64__)
constexpr const char* kArchitecture = "x86_64";
#elif defined(__aarch64__)
constexpr const char* kArchitecture = "aarch64";
#else
#error "tvmtrain runs on x86_64 and aarch64"
#endif

// What an idle program with TVM's runtime takes, beside all that a manifest tells.
constexpr int64_t kProgramBytes = int64_t{16} << 20;

std::string normal(std::string name) {
  for (char& c : name) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c;
  if (name == "amd64" || name == "x64") return "x86_64";
  return name == "arm64" ? "aarch64" : name;
}

#if defined(__aarch64__)

struct Feature {
  const char* name;
  unsigned long word;  // 16: AT_HWCAP, 26: AT_HWCAP2
  int bit;
};

// <asm/hwcap.h>; tvmtrain/features.py has the same table. /proc/cpuinfo would be the host's under qemu-user.
constexpr Feature kFeatures[] = {
    {"fp", 16, 0},
    {"asimd", 16, 1},
    {"atomics", 16, 8},
    {"fphp", 16, 9},
    {"asimdhp", 16, 10},
    {"asimdrdm", 16, 12},
    {"jscvt", 16, 13},
    {"fcma", 16, 14},
    {"lrcpc", 16, 15},
    {"asimddp", 16, 20},
    {"sve", 16, 22},
    {"asimdfhm", 16, 23},
    {"ilrcpc", 16, 26},
    {"flagm", 16, 27},
    {"sve2", 26, 1},
    {"flagm2", 26, 7},
    {"frint", 26, 8},
    {"i8mm", 26, 13},
    {"bf16", 26, 14},
};

std::set<std::string> features() {
  std::set<std::string> found;
  for (const Feature& feature : kFeatures) {
    if (getauxval(feature.word) >> feature.bit & 1) found.insert(feature.name);
  }
  return found;
}

#else

std::set<std::string> features() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("flags", 0) != 0) continue;
    std::istringstream words(line.substr(line.find(':') + 1));
    return {std::istream_iterator<std::string>(words), std::istream_iterator<std::string>()};
  }
  return {};
}

#endif

std::vector<int> allowed() {
  cpu_set_t set;
  std::vector<int> found;
  if (sched_getaffinity(0, sizeof set, &set) != 0) return {0};
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &set)) found.push_back(cpu);
  }
  return found;
}

int physical_cores() {
  std::set<std::string> cores;
  for (int cpu : processors()) {
    const std::string number = std::to_string(cpu);
    std::ifstream file("/sys/devices/system/cpu/cpu" + number + "/topology/thread_siblings_list");
    std::string siblings;
    cores.insert(std::getline(file, siblings) ? siblings : number);
  }
  return static_cast<int>(cores.size());
}

bool whole(std::string_view text, int* number) {
  const auto [stop, error] = std::from_chars(text.data(), text.data() + text.size(), *number);
  return error == std::errc() && stop == text.data() + text.size() && *number >= 0;
}

// "3" or "4-7"
bool add_range(const std::string& part, cpu_set_t* set) {
  const size_t dash = part.find('-');
  int first, last;
  if (!whole(part.substr(0, dash), &first)) return false;
  last = first;
  if (dash != std::string::npos && !whole(part.substr(dash + 1), &last)) return false;
  if (last >= CPU_SETSIZE) return false;
  for (int cpu = first; cpu <= last; ++cpu) CPU_SET(cpu, set);
  return first <= last;
}

}  // namespace

void check_machine(const Device& device) {
  const std::string wanted = normal(device.arch);
  if (wanted != kArchitecture) {
    throw artifact_error("lib.so was compiled for " + wanted + " (device '" + device.name + "') and this machine is " + kArchitecture +
                         "; build it for this machine");
  }
  const std::set<std::string> here = device.features.empty() ? std::set<std::string>() : features();
  std::string missing;
  for (const std::string& name : device.features) {
    if (!here.count(name)) missing += (missing.empty() ? "" : ", ") + name;
  }
  if (!missing.empty()) {
    throw artifact_error("lib.so was compiled for device '" + device.name + "', whose processor has " + missing +
                         ", and this machine's does not; build it for this machine");
  }
}

const std::vector<int>& processors() {
  static const std::vector<int> found = allowed();
  return found;
}

int default_threads() {
  const char* asked = std::getenv("TVM_NUM_THREADS");
  int count = 0;
  return asked && whole(asked, &count) && count > 0 ? count : physical_cores();
}

void use_processors(const std::string& list) {
  cpu_set_t set;
  CPU_ZERO(&set);
  std::istringstream parts(list);
  for (std::string part; std::getline(parts, part, ',');) {
    if (!add_range(part, &set)) throw input_error("affinity '" + list + "': want numbers of processors as in 0,4-7");
  }
  if (CPU_COUNT(&set) == 0 || sched_setaffinity(0, sizeof set, &set) != 0) {
    throw input_error("affinity '" + list + "': this process may use none of these processors; those that it may: /proc/self/status");
  }
}

int64_t needed_memory(const Manifest& manifest, int threads, const Use& use) {
  // In floating point: no manifest, however wrong, overflows it.
  double state = 0;
  for (const auto& [name, spec] : manifest.state) state += static_cast<double>(spec.bytes());
  const auto bytes = [&](const char* name) {
    const auto found = manifest.memory.find(name);
    if (found == manifest.memory.end()) return 0.0;
    const EntryMemory& entry = found->second;
    return static_cast<double>(entry.arena) + static_cast<double>(entry.results) + static_cast<double>(entry.workspace) * threads;
  };
  const double entry = std::max(bytes("train_step"), use.predicts ? bytes("predict") : 0.0);
  const double running = state + bytes("prepare") + entry + (use.saves ? state : 0);
  const double resuming = use.resumes ? 3 * state + 2 * bytes("prepare") : 0;
  const double total = kProgramBytes + static_cast<double>(manifest.files.at("lib.so").size) + std::max({running, resuming, 2 * state + bytes("prepare")});
  return static_cast<int64_t>(std::min(total, 9e18));
}

}  // namespace tt
