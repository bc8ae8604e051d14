// CUDA C++ of TVM's kernels as C++ of a processor: the threads of a block take turns, each until the next point where it has to
// wait for others. Blocks run one after the other, so that shared memory is a static variable.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define CUDART_INF_F INFINITY
#define CUDART_NAN_F NAN
#define CUDART_INF double(INFINITY)
#define CUDART_NAN double(NAN)

struct Index { unsigned x, y, z; };
static Index threadIdx, blockIdx, blockDim, gridDim;

template <class T> struct Vector2 { T x, y; };
template <class T> struct Vector3 { T x, y, z; };
template <class T> struct alignas(4 * sizeof(T)) Vector4 { T x, y, z, w; };
#define VECTORS(type, name) \
  typedef Vector2<type> name##2; typedef Vector3<type> name##3; typedef Vector4<type> name##4; \
  static inline name##2 make_##name##2(type x, type y) { return {x, y}; } \
  static inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
VECTORS(float, float) VECTORS(double, double) VECTORS(int, int) VECTORS(long long, longlong)
VECTORS(unsigned, uint) VECTORS(unsigned char, uchar) VECTORS(signed char, char) VECTORS(short, short)
VECTORS(unsigned short, ushort) VECTORS(long, long)

static inline float __int_as_float(int bits) { float value; return memcpy(&value, &bits, 4), value; }
static inline int __float_as_int(float value) { int bits; return memcpy(&bits, &value, 4), bits; }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline double rsqrt(double x) { return 1.0 / sqrt(x); }
template <class T> static inline T max(T a, T b) { return a > b ? a : b; }
template <class T> static inline T min(T a, T b) { return a < b ? a : b; }
static inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }

namespace emulated {
enum State { RUNNING, WAITING, DONE };
constexpr int MOST = 1024;
constexpr size_t STACK = 128 * 1024;
struct Thread { State state; jmp_buf resume; ucontext_t context; bool started; Index index; };
static Thread threads[MOST];
static jmp_buf scheduler;
static int current;
static uint64_t slots[MOST];
static void (*body)(void**);
static void** given;

static void pause(State state) {
  int me = current;
  threads[me].state = state;
  if (!_setjmp(threads[me].resume)) _longjmp(scheduler, 1);
  threadIdx = threads[me].index;
}
static void enter() {
  body(given);
  threads[current].state = DONE;
  _longjmp(scheduler, 1);
}
static void turn(int thread) {
  current = thread;
  if (_setjmp(scheduler)) return;
  threadIdx = threads[thread].index;
  if (threads[thread].started) _longjmp(threads[thread].resume, 1);
  threads[thread].started = true;
  setcontext(&threads[thread].context);
}
// Whether every thread that others wait for came to wait, too.
static bool run_together(int count) {
  static char* stacks = static_cast<char*>(
      mmap(nullptr, MOST * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  for (int i = 0; i < count; i++) {
    Thread& t = threads[i];
    t.state = RUNNING, t.started = false;
    t.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = stacks + i * STACK, t.context.uc_stack.ss_size = STACK, t.context.uc_link = nullptr;
    makecontext(&t.context, enter, 0);
  }
  // Every other round backwards: who reads before another has written reads something else.
  for (int round = 0, left = 1; left; round++) {
    int ready = left = 0;
    for (int i = 0; i < count; i++)
      if (int thread = round % 2 ? count - 1 - i : i; threads[thread].state == RUNNING) turn(thread);
    for (int i = 0; i < count; i++) left += threads[i].state != DONE, ready += threads[i].state == RUNNING;
    if (ready || !left) continue;
    if (left < count) return false;
    for (int i = 0; i < count; i++) threads[i].state = RUNNING;
  }
  return true;
}
template <class T> static T exchange(T value, int from) {
  memcpy(&slots[current], &value, sizeof value);
  pause(RUNNING);
  T got;
  memcpy(&got, &slots[from], sizeof got);
  pause(RUNNING);
  return got;
}
template <class... A, size_t... I> void call(void (*kernel)(A...), void** p, std::index_sequence<I...>) {
  kernel(*static_cast<A*>(p[I])...);
}
template <class... A> void call(void (*kernel)(A...), void** p) { call(kernel, p, std::index_sequence_for<A...>{}); }
}  // namespace emulated

extern "C" int emulated_launch(void* run, void** arguments, int synchronizes, const unsigned* grid, const unsigned* block) {
  using namespace emulated;
  body = reinterpret_cast<void (*)(void**)>(run), given = arguments;
  gridDim = {grid[0], grid[1], grid[2]}, blockDim = {block[0], block[1], block[2]};
  for (blockIdx.z = 0; blockIdx.z < gridDim.z; blockIdx.z++)
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; blockIdx.y++)
      for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++) {
        if (synchronizes) {
          if (!run_together(blockDim.x * blockDim.y * blockDim.z)) return 719;  // launch failure
          continue;
        }
        for (threadIdx.z = 0; threadIdx.z < blockDim.z; threadIdx.z++)
          for (threadIdx.y = 0; threadIdx.y < blockDim.y; threadIdx.y++)
            for (threadIdx.x = 0; threadIdx.x < blockDim.x; threadIdx.x++) body(given);
      }
  return 0;
}

static inline void __syncthreads() { emulated::pause(emulated::WAITING); }
static inline void __syncwarp(unsigned = ~0u) { emulated::pause(emulated::RUNNING); }
static inline unsigned __activemask() { return ~0u; }
template <class T> static T __shfl_down_sync(unsigned, T value, int by, int width = 32) {
  int lane = emulated::current % width;
  return emulated::exchange(value, lane + by < width ? emulated::current + by : emulated::current);
}
template <class T> static T __shfl_sync(unsigned, T value, int from, int width = 32) {
  return emulated::exchange(value, emulated::current / width * width + from % width);
}
