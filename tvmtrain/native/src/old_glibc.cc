// Programs linked by a new gcc ask for the C library that it came with, 2.34 or later, for the sake of functions that are as old as
// Linux: they got new versions when libdl became part of libc, for example. Boards have older systems (JetPack 4: 2.27), so
// references to these functions are led here by the linker (--wrap, in CMakeLists.txt), and on to their first versions, which every
// C library has.
#include <dlfcn.h>
#include <sys/stat.h>

#include <ios>
#include <new>
#include <sstream>

#if defined(__x86_64__)
#define FIRST "GLIBC_2.2.5"
#define STAT_VERSION 1
#else
#define FIRST "GLIBC_2.17"
#define STAT_VERSION 0
#endif

// ``first_NAME`` is the first version of NAME.
#define OLD(name) __asm__(".symver first_" #name "," #name "@" FIRST)

extern "C" {

OLD(dlopen);
void* first_dlopen(const char* name, int flags);
void* __wrap_dlopen(const char* name, int flags) { return first_dlopen(name, flags); }

OLD(dlerror);
char* first_dlerror();
char* __wrap_dlerror() { return first_dlerror(); }

OLD(exp);
double first_exp(double exponent);
double __wrap_exp(double exponent) { return first_exp(exponent); }

OLD(log);
double first_log(double value);
double __wrap_log(double value) { return first_log(value); }

OLD(pow);
double first_pow(double base, double exponent);
double __wrap_pow(double base, double exponent) { return first_pow(base, exponent); }

// Before 2.33 stat was a macro for these.
OLD(__fxstat);
int first___fxstat(int version, int file, struct stat* facts);
int __wrap_fstat(int file, struct stat* facts) { return first___fxstat(STAT_VERSION, file, facts); }

OLD(__xstat);
int first___xstat(int version, const char* path, struct stat* facts);
int __wrap_stat(const char* path, struct stat* facts) { return first___xstat(STAT_VERSION, path, facts); }

// The same of the C++ library: JetPack 4 has that of gcc 7, whose newest version is 3.4.24.
void __wrap__ZSt28__throw_bad_array_new_lengthv() { throw std::bad_alloc(); }
void __wrap__ZNSt7__cxx1119basic_ostringstreamIcSt11char_traitsIcESaIcEEC1Ev(void* place) { new (place) std::ostringstream(std::ios_base::out); }

#if defined(TVMTRAIN_PROGRAM)

// An old C library has a program run its own constructors, through ``init``; a new start file gives none and leaves that to the library.
using Constructor = void (*)(int, char**, char**);
extern Constructor __init_array_start[] __attribute__((visibility("hidden")));
extern Constructor __init_array_end[] __attribute__((visibility("hidden")));

static void construct(int count, char** words, char** environment) {
  for (Constructor* one = __init_array_start; one != __init_array_end; ++one) (*one)(count, words, environment);
}

OLD(__libc_start_main);
int first___libc_start_main(int (*main)(int, char**, char**), int count, char** words, Constructor init, void (*end)(), void (*loader_end)(), void* stack);
int __wrap___libc_start_main(int (*main)(int, char**, char**), int count, char** words, Constructor, void (*end)(), void (*loader_end)(), void* stack) {
  return first___libc_start_main(main, count, words, construct, end, loader_end, stack);
}

#endif
}
