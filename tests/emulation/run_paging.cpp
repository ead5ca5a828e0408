// Steps of optimizers whose state is paged by the two pagers of a GPU, in chunks, beside the plain
// steps: every bit of the parameters and of the state must be the same in every schedule. Prints
// the digest of the plain steps and that of either pager's, or the first thing that is wrong: what
// tests/python/test_paging_cuda.py compares a mutant of a pager with.
#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "launch/launchers.h"
#include "paging/pagers.h"
#include "qlora_native/layout.h"
#include "run_buffers.h"
#include "run_hyper.h"
#include "runtime.h"

namespace {

using namespace qlora;
using namespace emulated_run;
using emulation::Streams;

constexpr std::int64_t kValues = 4 * 2048 + 777;
constexpr std::int64_t kChunk = 2048;  // values
constexpr std::int64_t kChunks = ceil_div(kValues, kChunk);
constexpr int kSteps = 3;

constexpr std::int64_t values_in(std::int64_t chunk) {
  return std::min(kChunk, kValues - chunk * kChunk);
}

// ---- the state of n values: all of one moment behind another, scales last ----

template <int kMoments>
std::int64_t state_bytes(const StepTensor<kMoments>&, std::int64_t n) {
  return kMoments * n * 4;
}
template <int kMoments>
std::int64_t state_bytes(const Step8bitTensor<kMoments>&, std::int64_t n) {
  return kMoments * (ceil_div(n, 4) * 4 + n_blocks(n, kOptimizerBlocksize) * 4);
}

template <int kMoments>
void set_state(StepTensor<kMoments>& t, char* state) {
  for (int j = 0; j < kMoments; ++j) t.moments[j] = reinterpret_cast<float*>(state) + j * t.n;
}
template <int kMoments>
void set_state(Step8bitTensor<kMoments>& t, char* state) {
  const std::int64_t room = ceil_div(t.n, 4) * 4;
  for (int j = 0; j < kMoments; ++j) {
    t.codes[j] = reinterpret_cast<std::uint8_t*>(state) + j * room;
    t.absmax[j] =
        reinterpret_cast<float*>(state + kMoments * room) + j * n_blocks(t.n, kOptimizerBlocksize);
  }
}

// One range of a buffer for each chunk.
template <class Tensor>
struct Layout {
  static std::int64_t bytes(std::int64_t chunk) { return state_bytes(Tensor{}, values_in(chunk)); }
  static constexpr std::int64_t aligned(std::int64_t n) {
    return ceil_div(n, kPagedAlignment) * kPagedAlignment;
  }
  static std::int64_t begin(std::int64_t chunk) {
    return chunk * aligned(state_bytes(Tensor{}, kChunk));
  }
  static std::int64_t total() { return begin(kChunks - 1) + bytes(kChunks - 1); }
};

// ---- a step ----

template <class Params>
using Op = Status (*)(const Params&, const Context&);

template <class Params>
class Run {
 public:
  using Tensor = typename Params::Tensor;

  Run(Op<Params> op, const typename Params::Hyper& hyper)
      : op_(op),
        hyper_(hyper),
        param_(values(kValues, DType::bfloat16, 0)),
        grad_(values(kValues, DType::float32, 0)) {}

  // On n values from there on, with their state.
  void step(std::int64_t first, std::int64_t n, char* state, void* stream) {
    Tensor t{};
    t.n = n;
    t.param_dtype = DType::bfloat16;
    t.grad_dtype = DType::float32;
    t.param = param_.template as<BFloat16>() + first;
    t.grad = grad_.template as<float>() + first;
    set_state(t, state);
    Context context;
    context.stream = stream;
    check(op_({.hyper = hyper_, .n_tensors = 1, .tensors = &t}, context));
  }

  void digest() const { param_.digest(); }

 private:
  Op<Params> op_;
  typename Params::Hyper hyper_;
  Buffer param_, grad_;
};

// The state, moment by moment as the plain step has it: of `chunks` parts, each of `n(chunk)`
// values with its state at `begin(chunk)`.
template <class Tensor>
void digest_state(char* state, std::int64_t chunks, const auto& n, const auto& begin) {
  const auto each_part = [&](const auto& digest_part) {
    for (int j = 0; j < Tensor::kMoments; ++j) {
      for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
        Tensor t{};
        t.n = n(chunk);
        set_state(t, state + begin(chunk));
        digest_part(t, j);
      }
    }
  };
  if constexpr (requires(Tensor t) { t.codes; }) {
    each_part([](const Tensor& t, int j) { add(t.codes[j], t.n); });
    each_part(
        [](const Tensor& t, int j) { add(t.absmax[j], n_blocks(t.n, kOptimizerBlocksize) * 4); });
  } else {
    each_part([](const Tensor& t, int j) { add(t.moments[j], t.n * 4); });
  }
}

// ---- the schedules of a paged step ----

enum class Window {
  everything,     // nothing ever leaves
  three_chunks,   // one comes, one is used, one leaves
  one_and_a_bit,  // the pager has to make room by itself
};

template <class Params>
void paged_steps(const Pager& pager, Op<Params> op, const typename Params::Hyper& hyper,
                 Window window) {
  using Place = Layout<typename Params::Tensor>;
  const std::int64_t one = Place::aligned(Place::bytes(0));
  const bool evicts = window == Window::three_chunks;
  Run<Params> run(op, hyper);
  PagedBuffer* buffer = nullptr;
  PagedParams params;
  params.bytes = Place::total();
  if (window != Window::everything) params.window_bytes = evicts ? 3 * one : one + 256;
  check(pager.open(params, &buffer));
  void* stream = nullptr;
  check(emulation::Runtime::instance().create_stream(&stream));
  std::vector<char> saved(static_cast<std::size_t>(Place::total()));
  void* host = nullptr;
  for (int s = 0; s < kSteps; ++s) {
    check(pager.prefetch(buffer, Place::begin(0), Place::bytes(0), stream));
    for (std::int64_t i = 0; i < kChunks; ++i) {
      const std::int64_t begin = Place::begin(i), bytes = Place::bytes(i);
      if (i + 1 < kChunks) {
        check(pager.prefetch(buffer, Place::begin(i + 1), Place::bytes(i + 1), stream));
      }
      void* state = nullptr;
      check(pager.acquire(buffer, begin, bytes, stream, &state));
      run.step(i * kChunk, values_in(i), static_cast<char*>(state), stream);
      check(pager.release(buffer, begin, bytes, stream, true));
      if (evicts && i > 0) {
        check(pager.evict(buffer, Place::begin(i - 1), Place::bytes(i - 1), stream));
      }
    }
    if (evicts) {  // sent away, and wanted again at once
      const std::int64_t begin = Place::begin(kChunks - 1), bytes = Place::bytes(kChunks - 1);
      check(pager.evict(buffer, begin, bytes, stream));
      check(pager.prefetch(buffer, begin, bytes, stream));
    }
    if (s == 1) continue;  // the next step finds things as they are
    check(pager.host_view(buffer, &host));
    // Saved, and loaded into another buffer, once.
    std::memcpy(saved.data(), host, saved.size());
    if (s == 0) {
      pager.close(buffer);
      check(pager.open(params, &buffer));
      check(pager.host_view(buffer, &host));
      std::memcpy(host, saved.data(), saved.size());
    }
  }
  check(emulation::Runtime::instance().synchronize_stream(stream));
  run.digest();
  digest_state<typename Params::Tensor>(static_cast<char*>(host), kChunks, values_in, Place::begin);
  emulation::Runtime::instance().destroy_stream(stream);
  pager.close(buffer);
}

template <class Params>
void plain_steps(Op<Params> op, const typename Params::Hyper& hyper) {
  Run<Params> run(op, hyper);
  const Buffer state(state_bytes(typename Params::Tensor{}, kValues), 1, 0);
  for (int s = 0; s < kSteps; ++s) run.step(0, kValues, state.as<char>(), nullptr);
  run.digest();
  digest_state<typename Params::Tensor>(
      state.as<char>(), 1, [](std::int64_t) { return kValues; },
      [](std::int64_t) { return std::int64_t{0}; });
}

void all_paged(const Pager& pager, Window window) {
  paged_steps<AdamwStepParams>(pager, cuda::adamw_step, kAdamw, window);
  paged_steps<Adamw8bitStepParams>(pager, cuda::adamw_8bit_step, kAdamw, window);
  paged_steps<LionStepParams>(pager, cuda::lion_step, kLion, window);
}

[[noreturn]] void fail(const std::string& what) {
  std::printf("%s\n", what.c_str());
  std::exit(1);
}

}  // namespace

int main() {
  emulation::Runtime& runtime = emulation::Runtime::instance();
  static_cast<void>(take_digest());
  plain_steps<AdamwStepParams>(cuda::adamw_step, kAdamw);
  plain_steps<Adamw8bitStepParams>(cuda::adamw_8bit_step, kAdamw);
  plain_steps<LionStepParams>(cuda::lion_step, kLion);
  const std::uint64_t plain = take_digest();
  std::printf("%016llx\n", static_cast<unsigned long long>(plain));
  const std::int64_t alive_before = runtime.alive();
  for (const Pager* pager : {&cuda::managed_pager(), &cuda::staged_pager()}) {
    for (const auto& [schedule, seed] :
         {std::pair{Streams::Schedule::early, 0}, std::pair{Streams::Schedule::late, 0},
          std::pair{Streams::Schedule::drawn, 1}}) {
      runtime.streams().set_schedule(schedule, static_cast<std::uint64_t>(seed));
      for (const Window window :
           {Window::everything, Window::three_chunks, Window::one_and_a_bit}) {
        all_paged(*pager, window);
        const std::string at = std::string(pager->name) + ", schedule " +
                               std::to_string(static_cast<int>(schedule)) + ", window " +
                               std::to_string(static_cast<int>(window));
        if (take_digest() != plain) fail("other bits: " + at);
        if (const auto faults = runtime.take_faults(); !faults.empty()) fail(faults[0]);
        if (runtime.alive() != alive_before) fail("not freed: " + at);
      }
    }
    std::printf("%016llx\n", static_cast<unsigned long long>(plain));
  }
}
