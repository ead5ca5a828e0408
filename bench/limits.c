// What the machine can do at most: floating-point rate by instruction set, and bandwidth by level
// of the memory hierarchy. Benchmarks are told as a fraction of these.
//
//     limits THREADS TRIES LEVEL=BYTES...
//     -> {"threads": ..., "flops": {ISA: rate}, "bandwidth": {LEVEL: {KIND: rate}}}   on stdout
//
// Every thread works on buffers of its own, BYTES in all for each thread; rates are sums over the
// threads, the best of TRIES. A copy and an update count what they read and what they write. The
// buffers are in huge pages where the kernel has them, for that is the machine at its best.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum { kHugePage = 1 << 21, kMaxThreads = 256, kAccumulators = 12, kStepsPerRepeat = 64 };
static const double kSecondsPerTry = 0.01;
static int tries_each;  // TRIES

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

typedef struct {
  void (*work)(char* memory, size_t bytes, long repeats);
  char* memory;
  size_t bytes;
  long repeats;
  pthread_barrier_t* start;
  double began, ended;
} Job;

static void* run_job(void* arg) {
  Job* job = arg;
  pthread_barrier_wait(job->start);
  job->began = now();
  job->work(job->memory, job->bytes, job->repeats);
  job->ended = now();
  return NULL;
}

// Seconds from the first thread's start to the last one's end.
static double run_once(Job* jobs, int threads) {
  pthread_t handles[kMaxThreads];
  pthread_barrier_t start;
  pthread_barrier_init(&start, NULL, (unsigned)threads);
  for (int i = 0; i < threads; ++i) {
    jobs[i].start = &start;
    if (pthread_create(&handles[i], NULL, run_job, &jobs[i]) != 0) abort();
  }
  double began = 0, ended = 0;
  for (int i = 0; i < threads; ++i) {
    pthread_join(handles[i], NULL);
    if (i == 0 || jobs[i].began < began) began = jobs[i].began;
    if (i == 0 || jobs[i].ended > ended) ended = jobs[i].ended;
  }
  pthread_barrier_destroy(&start);
  return ended - began;
}

// The best rate, in units a second, where one repeat of `work` does `units` in one thread.
static double best_rate(void (*work)(char*, size_t, long), char** memory, size_t bytes, int threads,
                        double units) {
  Job jobs[kMaxThreads];
  long repeats = 1;
  double best = 0;
  for (int i = 0; i < threads; ++i) {
    jobs[i] = (Job){.work = work, .memory = memory ? memory[i] : NULL, .bytes = bytes};
  }
  for (int tries = 0; tries < tries_each;) {
    for (int i = 0; i < threads; ++i) jobs[i].repeats = repeats;
    const double seconds = run_once(jobs, threads);
    if (seconds < kSecondsPerTry && repeats < 1L << 40) {
      repeats *= 2;
      continue;
    }
    const double rate = units * (double)repeats * threads / seconds;
    if (rate > best) best = rate;
    ++tries;
  }
  return best;
}

static volatile float sink;

#if defined(__x86_64__)
#include <immintrin.h>

// Twelve chains of multiply-adds hide the latency of four or five cycles on two units. They are
// twelve variables, not an array: gcc 12 left an array on the stack and so measured the forwarding
// of stores, half the true rate.
#define DEFINE_FMA(name, isa, Vector, set, step, first)                      \
  __attribute__((target(isa))) static void name(char* m, size_t b, long n) { \
    (void)m, (void)b;                                                        \
    const Vector x = set(0.999f), y = set(1e-3f);                            \
    Vector a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11;                 \
    a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = a8 = a9 = a10 = a11 = y;         \
    for (long r = 0; r < n * kStepsPerRepeat; ++r) {                         \
      a0 = step(a0, x, y), a1 = step(a1, x, y), a2 = step(a2, x, y);         \
      a3 = step(a3, x, y), a4 = step(a4, x, y), a5 = step(a5, x, y);         \
      a6 = step(a6, x, y), a7 = step(a7, x, y), a8 = step(a8, x, y);         \
      a9 = step(a9, x, y), a10 = step(a10, x, y), a11 = step(a11, x, y);     \
      __asm__ volatile("" : "+x"(a0), "+x"(a1), "+x"(a2), "+x"(a3));         \
      __asm__ volatile("" : "+x"(a4), "+x"(a5), "+x"(a6), "+x"(a7));         \
      __asm__ volatile("" : "+x"(a8), "+x"(a9), "+x"(a10), "+x"(a11));       \
    }                                                                        \
    sink += first(a0) + first(a1) + first(a2) + first(a3) + first(a4);       \
    sink += first(a5) + first(a6) + first(a7) + first(a8) + first(a9);       \
    sink += first(a10) + first(a11);                                         \
  }

#define SSE_STEP(a, x, y) _mm_add_ps(_mm_mul_ps(a, x), y)
#define AVX2_STEP(a, x, y) _mm256_fmadd_ps(a, x, y)
#define AVX512_STEP(a, x, y) _mm512_fmadd_ps(a, x, y)
#define BF16_SET(value) _mm512_set1_ps(value)
#define BF16_STEP(a, x, y) _mm512_dpbf16_ps(a, (__m512bh)(x), (__m512bh)(y))
#define AVX2_FIRST(a) _mm256_cvtss_f32(a)
#define AVX512_FIRST(a) _mm512_cvtss_f32(a)

DEFINE_FMA(fma_sse2, "sse2", __m128, _mm_set1_ps, SSE_STEP, _mm_cvtss_f32)
DEFINE_FMA(fma_avx2, "avx2,fma", __m256, _mm256_set1_ps, AVX2_STEP, AVX2_FIRST)
DEFINE_FMA(fma_avx512, "avx512f", __m512, _mm512_set1_ps, AVX512_STEP, AVX512_FIRST)
DEFINE_FMA(dot_bf16, "avx512f,avx512bf16", __m512, BF16_SET, BF16_STEP, AVX512_FIRST)

static int has_avx512bf16(void) {
  unsigned a, b, c, d;
  __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(1));
  return __builtin_cpu_supports("avx512f") && ((a >> 5) & 1u);
}

// Non-temporal stores, 32 bytes each where the processor has them.
__attribute__((target("avx2"))) static void write_nt_avx2(char* m, size_t bytes, long n) {
  const __m256i value = _mm256_set1_epi32(7);
  for (long r = 0; r < n; ++r) {
    for (size_t i = 0; i < bytes; i += 64) {
      _mm256_stream_si256((__m256i*)(m + i), value);
      _mm256_stream_si256((__m256i*)(m + i + 32), value);
    }
    _mm_sfence();
  }
}
__attribute__((target("avx2"))) static void copy_nt_avx2(char* m, size_t bytes, long n) {
  const size_t half = bytes / 2;
  for (long r = 0; r < n; ++r) {
    for (size_t i = 0; i < half; i += 64) {
      const __m256i a = _mm256_load_si256((const __m256i*)(m + i));
      const __m256i b = _mm256_load_si256((const __m256i*)(m + i + 32));
      _mm256_stream_si256((__m256i*)(m + half + i), a);
      _mm256_stream_si256((__m256i*)(m + half + i + 32), b);
    }
    _mm_sfence();
  }
}
#else
typedef float Float4 __attribute__((vector_size(16)));
static Float4 set4(float v) { return (Float4){v, v, v, v}; }
static float first4(Float4 v) { return v[0]; }
static void fma_generic(char* m, size_t b, long n) {
  (void)m, (void)b;
  Float4 acc[kAccumulators];
  const Float4 x = set4(0.999f), y = set4(1e-3f);
  for (int i = 0; i < kAccumulators; ++i) acc[i] = set4((float)i);
  for (long r = 0; r < n * kStepsPerRepeat; ++r) {
    for (int i = 0; i < kAccumulators; ++i) acc[i] = acc[i] * x + y;
    __asm__ volatile("" ::: "memory");
  }
  for (int i = 0; i < kAccumulators; ++i) sink += first4(acc[i]);
}
#endif

// Plain loops over vectors of 64 bytes, for the widest registers that the compiler was given.
typedef uint64_t Line __attribute__((vector_size(64)));

static void read_memory(char* m, size_t bytes, long n) {
  Line sum[4] = {{0}};
  for (long r = 0; r < n; ++r) {
    const Line* p = (const Line*)m;
    for (size_t i = 0; i < bytes / 64; i += 4) {
      for (int k = 0; k < 4; ++k) sum[k] |= p[i + (size_t)k];
    }
    __asm__ volatile("" ::: "memory");
  }
  sink += (float)(sum[0] | sum[1] | sum[2] | sum[3])[0];
}

static void write_memory(char* m, size_t bytes, long n) {
  for (long r = 0; r < n; ++r) {
    const Line value = {(uint64_t)r, 1, 2, 3, 4, 5, 6, 7};
    Line* p = (Line*)m;
    for (size_t i = 0; i < bytes / 64; ++i) p[i] = value;
    __asm__ volatile("" ::: "memory");
  }
}

// In place, as an optimizer's step does: no line is read that is only written.
static void update_memory(char* m, size_t bytes, long n) {
  const Line one = {1, 1, 1, 1, 1, 1, 1, 1};
  for (long r = 0; r < n; ++r) {
    Line* p = (Line*)m;
    for (size_t i = 0; i < bytes / 64; ++i) p[i] += one;
    __asm__ volatile("" ::: "memory");
  }
}

static void copy_memory(char* m, size_t bytes, long n) {
  const Line* from = (const Line*)m;
  Line* to = (Line*)(m + bytes / 2);
  for (long r = 0; r < n; ++r) {
    for (size_t i = 0; i < bytes / 128; ++i) to[i] = from[i];
    __asm__ volatile("" ::: "memory");
  }
}

static void print_flops(int threads) {
  const double steps = (double)kStepsPerRepeat * kAccumulators;
#if defined(__x86_64__)
  const double sse2 = best_rate(fma_sse2, NULL, 0, threads, steps * 4 * 2);
  printf("\"scalar\": %.6g", sse2);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    printf(", \"avx2\": %.6g", best_rate(fma_avx2, NULL, 0, threads, steps * 8 * 2));
  }
  if (__builtin_cpu_supports("avx512f")) {
    printf(", \"avx512\": %.6g", best_rate(fma_avx512, NULL, 0, threads, steps * 16 * 2));
  }
  if (has_avx512bf16()) {
    printf(", \"avx512bf16\": %.6g", best_rate(dot_bf16, NULL, 0, threads, steps * 32 * 2));
  }
#else
  printf("\"scalar\": %.6g", best_rate(fma_generic, NULL, 0, threads, steps * 4 * 2));
#endif
}

static void print_bandwidth(const char* level, size_t bytes, int threads) {
  bytes &= ~(size_t)511;
  char* memory[kMaxThreads];
  for (int i = 0; i < threads; ++i) {
    memory[i] = aligned_alloc(kHugePage, (bytes + kHugePage - 1) & ~(size_t)(kHugePage - 1));
    if (memory[i] == NULL) abort();
#if defined(MADV_HUGEPAGE)
    madvise(memory[i], bytes, MADV_HUGEPAGE);
#endif
    memset(memory[i], 1, bytes);
  }
  const double units = (double)bytes;
  printf("\"%s\": {\"bytes_per_thread\": %zu", level, bytes);
  printf(", \"read\": %.6g", best_rate(read_memory, memory, bytes, threads, units));
  printf(", \"write\": %.6g", best_rate(write_memory, memory, bytes, threads, units));
  printf(", \"copy\": %.6g", best_rate(copy_memory, memory, bytes, threads, units));
  printf(", \"update\": %.6g", best_rate(update_memory, memory, bytes, threads, 2 * units));
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) {
    printf(", \"write_nt\": %.6g", best_rate(write_nt_avx2, memory, bytes, threads, units));
    printf(", \"copy_nt\": %.6g", best_rate(copy_nt_avx2, memory, bytes, threads, units));
  }
#endif
  printf("}");
  for (int i = 0; i < threads; ++i) free(memory[i]);
}

int main(int argc, char** argv) {
  const int threads = argc > 1 ? atoi(argv[1]) : 0;
  tries_each = argc > 2 ? atoi(argv[2]) : 0;
  if (threads < 1 || threads > kMaxThreads || tries_each < 1) {
    fprintf(stderr, "usage: limits THREADS TRIES LEVEL=BYTES...   (1 to %d threads)\n",
            kMaxThreads);
    return 2;
  }
  printf("{\"threads\": %d, \"flops\": {", threads);
  print_flops(threads);
  printf("}, \"bandwidth\": {");
  for (int i = 3; i < argc; ++i) {
    const char* equals = strchr(argv[i], '=');
    if (equals == NULL) return 2;
    char level[32];
    snprintf(level, sizeof level, "%.*s", (int)(equals - argv[i]), argv[i]);
    if (i > 3) printf(", ");
    print_bandwidth(level, strtoull(equals + 1, NULL, 10), threads);
  }
  printf("}}\n");
  return 0;
}
