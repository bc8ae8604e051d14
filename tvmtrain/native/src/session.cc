// The functions of a session. Python has the same in tvmtrain/session.py, where each is explained.
#include "session.h"

#include <elf.h>
#include <sched.h>
#include <sys/auxv.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/reflection/registry.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <unordered_map>
#include <utility>
#include <vector>

#include "emulated.h"
#include "memory.h"

namespace tt {
namespace {

namespace ffi = tvm::ffi;

constexpr int kProtocol = 1;
constexpr size_t kAlignment = 64;
constexpr int kPooled = 2;  // TVM's allocator that keeps what is freed

struct Allocator {
  void AllocData(DLTensor* tensor) {
    size_t size = ffi::GetDataSize(*tensor);
    size = (size + kAlignment) / kAlignment * kAlignment;
    tensor->data = std::aligned_alloc(kAlignment, size);
    if (tensor->data == nullptr) TVM_FFI_THROW(RuntimeError) << "the board has no memory for a tensor of " << size << " bytes";
  }
  void FreeData(DLTensor* tensor) { std::free(tensor->data); }
};

struct Mark {
  std::string name;
  bool before;
  double start, end;
};

// All that one session has; each session is a process of its own.
struct Session {
  Settings settings;
  std::string folder;
  std::vector<ffi::Module> machines;
  std::unordered_map<int64_t, ffi::Tensor> tensors;
  std::vector<Mark> marks;
};

Session* session = nullptr;

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::string Quoted(const std::string& text) {
  std::ostringstream out;
  out << '"';
  for (unsigned char c : text) {
    if (c == '"' || c == '\\') out << '\\';
    out << (c < 0x20 || c > 0x7e ? '?' : static_cast<char>(c));
  }
  out << '"';
  return out.str();
}

std::string Read(const char* path) {
  std::ifstream file(path);
  return std::string(std::istreambuf_iterator<char>(file), {});
}

// The value of the first line of `text` that begins with `name`, as in /proc/cpuinfo.
std::string Field(const std::string& text, const std::string& name) {
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    size_t colon = line.find(':');
    if (line.rfind(name, 0) == 0 && colon != std::string::npos && colon + 1 < line.size()) return line.substr(colon + 2);
  }
  return "";
}

std::vector<int> Processors() {
  cpu_set_t set;
  std::vector<int> found;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) {
    for (int i = 0; i < CPU_SETSIZE; ++i) {
      if (CPU_ISSET(i, &set)) found.push_back(i);
    }
  }
  return found.empty() ? std::vector<int>{0} : found;
}

std::string Architecture() {
  utsname name;
  uname(&name);
  std::string machine = name.machine;
  // A 32-bit process on a 64-bit kernel loads 32-bit libraries only.
  return machine == "aarch64" && sizeof(void*) == 4 ? "armv7l" : machine;
}

std::string Tell() {
  std::string processor = Read("/proc/cpuinfo");
  const Memory here = memory();
  char host[256] = "";
  gethostname(host, sizeof(host) - 1);
  std::ostringstream out;
  out << "{\"protocol\": " << kProtocol << ", \"server\": \"native\", \"name\": " << Quoted(host)
      << ", \"arch\": " << Quoted(Architecture()) << ", \"cores\": " << Processors().size()
      << ", \"memory\": " << here.total << ", \"available\": " << here.available
      << ", \"hwcap\": [" << getauxval(AT_HWCAP) << ", " << getauxval(AT_HWCAP2) << "]"
      << ", \"flags\": " << Quoted(Field(processor, "flags")) << ", \"gpu\": false"
      << ", \"emulated\": " << Quoted(session->settings.emulated ? std::string("--emulated") : tt::emulated()) << "}";
  return out.str();
}

// --- Threads --------------------------------------------------------------------------------------------------------------

std::vector<int> Numbers(const std::string& text) {
  std::vector<int> found;
  std::istringstream parts(text);
  for (std::string part; std::getline(parts, part, ',');) found.push_back(std::atoi(part.c_str()));
  return found;
}

int64_t UseThreads(int64_t count, const ffi::String& processors) {
  std::vector<int> places = Numbers(std::string(processors));
  if (places.empty()) places = Processors();
  if (count < 1) count = session->settings.threads > 0 ? session->settings.threads : static_cast<int64_t>(places.size());
  // TVM allows as many threads as the list is long; -3: they may run on all the listed processors.
  size_t length = std::max<size_t>(count, places.size());
  ffi::Array<ffi::String> listed;
  for (size_t i = 0; i < length; ++i) listed.push_back(std::to_string(places[i % places.size()]));
  ffi::Function::GetGlobalRequired("runtime.config_threadpool")(-3, count, listed);
  return ffi::Function::GetGlobalRequired("runtime.NumThreads")().cast<int64_t>();
}

// --- Files ----------------------------------------------------------------------------------------------------------------

// Names come from the other end: one part, and no way out of the folder.
std::string PathOf(const std::string& name) {
  if (name.empty()) return session->folder;
  if (name.find('/') != std::string::npos || name == "." || name == "..") {
    TVM_FFI_THROW(ValueError) << "file " << Quoted(name) << ": want a plain name";
  }
  return session->folder + "/" + name;
}

int ElfMachine() {
  std::ifstream file("/proc/self/exe", std::ios::binary);
  char header[20] = {};
  file.read(header, sizeof(header));
  return static_cast<unsigned char>(header[18]) | static_cast<unsigned char>(header[19]) << 8;
}

void CheckLibrary(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  char header[20] = {};
  if (!file.read(header, sizeof(header)) || std::memcmp(header, ELFMAG, SELFMAG) != 0) {
    TVM_FFI_THROW(ValueError) << path << " is no shared library";
  }
  int machine = static_cast<unsigned char>(header[18]) | static_cast<unsigned char>(header[19]) << 8;
  if (machine != ElfMachine()) {
    TVM_FFI_THROW(ValueError) << path << " has code for another processor (ELF machine " << machine << ", and this board's is "
                              << ElfMachine() << ")";
  }
}

ffi::Module LoadModule(const ffi::String& name) {
  std::string path = PathOf(std::string(name));
  CheckLibrary(path);
  return ffi::Module::LoadFromFile(path);
}

// --- A compiled step ------------------------------------------------------------------------------------------------------

int64_t Start(const ffi::String& name, bool gpu) {
  if (gpu) TVM_FFI_THROW(ValueError) << "this server computes on the processor; for a GPU start `tvmtrain serve` on the board";
  ffi::Module machine = (*LoadModule(name)->GetFunction("vm_load_executable"))().cast<ffi::Module>();
  (*machine->GetFunction("vm_initialization"))(static_cast<int>(kDLCPU), 0, kPooled);
  session->machines.push_back(machine);
  return static_cast<int64_t>(session->machines.size()) - 1;
}

ffi::Module Machine(int64_t number) {
  if (number < 0 || number >= static_cast<int64_t>(session->machines.size())) {
    TVM_FFI_THROW(ValueError) << "machine " << number << " is not known";
  }
  return session->machines[number];
}

ffi::Tensor Known(int64_t id) {
  auto found = session->tensors.find(id);
  if (found == session->tensors.end()) TVM_FFI_THROW(ValueError) << "tensor " << id << " is not known";
  return found->second;
}

// (id, machine, dtype, bytes, sizes ..)
void Put(ffi::PackedArgs args, ffi::Any*) {
  std::vector<int64_t> shape;
  for (int i = 4; i < args.size(); ++i) shape.push_back(args[i].cast<int64_t>());
  DLDataType dtype = ffi::StringToDLDataType(args[2].cast<ffi::String>());
  ffi::Bytes data = args[3].cast<ffi::Bytes>();
  ffi::Tensor tensor = ffi::Tensor::FromNDAlloc(Allocator(), ffi::Shape(shape), dtype, DLDevice{kDLCPU, 0});
  if (data.size() != ffi::GetDataSize(*tensor.GetDLTensorPtr())) {
    TVM_FFI_THROW(ValueError) << "got " << data.size() << " bytes for a tensor of " << ffi::GetDataSize(*tensor.GetDLTensorPtr());
  }
  if (data.size() > 0) std::memcpy(tensor.data_ptr(), data.data(), data.size());
  session->tensors[args[0].cast<int64_t>()] = tensor;
}

ffi::Bytes Get(int64_t id) {
  ffi::Tensor tensor = Known(id);
  const char* data = static_cast<const char*>(tensor.data_ptr()) + tensor.GetDLTensorPtr()->byte_offset;
  return ffi::Bytes(data, ffi::GetDataSize(*tensor.GetDLTensorPtr()));
}

void Free(ffi::PackedArgs args, ffi::Any*) {
  for (int i = 0; i < args.size(); ++i) session->tensors.erase(args[i].cast<int64_t>());
}

std::vector<ffi::Tensor> Results(const ffi::Any& result) {
  if (auto one = result.as<ffi::Tensor>()) return {*one};
  std::vector<ffi::Tensor> found;
  for (const ffi::Tensor& tensor : result.cast<ffi::Array<ffi::Tensor>>()) found.push_back(tensor);
  return found;
}

// (machine, entry, id of the first result, ids of the arguments ..) -> seconds
void Call(ffi::PackedArgs args, ffi::Any* seconds) {
  ffi::Module machine = Machine(args[0].cast<int64_t>());
  std::string entry = args[1].cast<ffi::String>();
  ffi::Optional<ffi::Function> function = machine->GetFunction(entry);
  if (!function.has_value()) TVM_FFI_THROW(ValueError) << "the library has no entry " << Quoted(entry);
  std::vector<ffi::Tensor> given;
  for (int i = 3; i < args.size(); ++i) given.push_back(Known(args[i].cast<int64_t>()));
  std::vector<ffi::AnyView> views(given.begin(), given.end());
  ffi::Any result;
  double start = Now();
  function.value().CallPacked(views.data(), static_cast<int32_t>(views.size()), &result);
  *seconds = Now() - start;
  int64_t id = args[2].cast<int64_t>();
  for (const ffi::Tensor& tensor : Results(result)) session->tensors[id++] = tensor;
}

// Called before and after each call of the virtual machine: (function, name, before, result, arguments ..).
void Note(ffi::PackedArgs args, ffi::Any* result) {
  double start = Now();
  session->marks.push_back({std::string(args[1].cast<ffi::String>()), args[2].cast<bool>(), start, 0});
  session->marks.back().end = Now();
  *result = 0;
}

void Watch(int64_t machine, bool on) {
  ffi::Function set = *Machine(machine)->GetFunction("set_instrument");
  if (on) {
    session->marks.clear();
    session->marks.reserve(1 << 14);
    set(ffi::Function::FromPacked(Note));
  } else {
    set(nullptr);
  }
}

ffi::String Marks() {
  std::ostringstream out;
  out.precision(9);
  out << std::fixed << '[';
  for (const Mark& mark : session->marks) {
    if (&mark != &session->marks.front()) out << ", ";
    out << '[' << Quoted(mark.name) << ", " << (mark.before ? "true" : "false") << ", " << mark.start << ", " << mark.end << ']';
  }
  out << ']';
  session->marks.clear();
  return out.str();
}

// What MetaSchedule fills a kernel's arguments with: numbers in (0, 1), none of them subnormal; small ones where whole.
void Fill(DLTensor* tensor) {
  int64_t count = 1;
  for (int i = 0; i < tensor->ndim; ++i) count *= tensor->shape[i];
  char* data = static_cast<char*>(tensor->data) + tensor->byte_offset;
  size_t size = ffi::GetDataSize(*tensor);
  uint32_t word = 2463534242u;
  auto next = [&word] { return word ^= word << 13, word ^= word >> 17, word ^= word << 5; };
  if (tensor->dtype.code == kDLFloat && tensor->dtype.bits == 32) {
    for (int64_t i = 0; i < count; ++i) reinterpret_cast<float*>(data)[i] = 0.1f + 0.9f * (next() >> 8) / 16777216.0f;
  } else if (tensor->dtype.code == kDLFloat && tensor->dtype.bits == 64) {
    for (int64_t i = 0; i < count; ++i) reinterpret_cast<double*>(data)[i] = 0.1 + 0.9 * (next() >> 8) / 16777216.0;
  } else {
    std::memset(data, 0, size);
  }
}

}  // namespace

void RegisterFunctions(const Settings& settings, const std::string& folder) {
  session = new Session{settings, folder, {}, {}, {}};
  ffi::reflection::GlobalDef()
      .def("tvmtrain.board", [] { return ffi::String(Tell()); })
      .def("tvmtrain.threads", UseThreads)
      .def("tvmtrain.start", Start)
      .def_packed("tvmtrain.put", Put)
      .def("tvmtrain.get", Get)
      .def_packed("tvmtrain.free", Free)
      .def_packed("tvmtrain.call", Call)
      .def("tvmtrain.watch", Watch)
      .def("tvmtrain.marks", Marks)
      .def("tvm.rpc.server.workpath", [](const ffi::String& name) { return ffi::String(PathOf(std::string(name))); })
      .def("tvm.rpc.server.load_module", LoadModule);
  // TVM's own, of a library that a board need not have.
  if (!ffi::Function::GetGlobal("tvm.contrib.random.random_fill_for_measure").has_value()) {
    ffi::reflection::GlobalDef().def("tvm.contrib.random.random_fill_for_measure", Fill);
  }
}

}  // namespace tt
