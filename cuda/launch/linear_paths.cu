// Which way a product with a 4-bit weight takes: a list of the ways, and the table of choices that
// the package ships. What a tuner measures on a device comes before it (linear_measured.h).
//
// What is not built is not in the list. Every row of the table says why; none has been measured,
// for no GPU has run them: the reasons are counts of bytes and flops.
#include <atomic>
#include <cstdlib>
#include <limits>
#include <string_view>
#include <vector>

#include "device/launch.cuh"
#include "launch/linear_few_rows.h"
#include "launch/linear_measured.h"
#include "launch/linear_paths.h"
#include "launch/linear_tiles.h"
#include "launch/linear_wgmma.h"

namespace qlora::cuda {
namespace {

// What the choice depends on.
struct Case {
  Direction direction;
  DType dtype;
  std::int64_t m;
  const void* activations;  // x or grad_out
  const Weight4bit* weight;
};

constexpr bool any_case(const Case&) { return true; }

template <class Params>
struct Way {
  const char* name;
  bool (*serves)(const Case&);  // whether its launcher takes the case at all
  Status (*run)(const Params&, const LoraTerm*, const Context&);
};

bool few_rows_serves(const Case& c) {
  return linear_few_rows_serves(c.dtype, c.m, *c.weight, c.activations);
}

bool tiles_serve_forward(const Case& c) {
  return tiles_serve(c.dtype, c.weight->cols, *c.weight, c.activations);
}

bool tiles_serve_backward(const Case& c) {
  return tiles_serve(c.dtype, c.weight->rows, *c.weight, c.activations);
}

// Its tiles are large: a multiprocessor without one does nothing at all.
bool fills_wgmma(const Case& c) {
  const bool forward = c.direction == Direction::forward;
  return wgmma_fills(c.m, forward ? c.weight->rows : c.weight->cols);
}

bool wgmma_serves_forward(const Case& c) {
  return wgmma_serves(c.dtype, c.weight->cols, *c.weight, c.activations);
}

bool wgmma_serves_backward(const Case& c) {
  return wgmma_serves(c.dtype, c.weight->rows, *c.weight, c.activations);
}

constexpr Way<LinearParams> kForwardWays[] = {
    {"few_rows", few_rows_serves, linear_few_rows},
    {"wgmma", wgmma_serves_forward, linear_wgmma},
    {"tiles", tiles_serve_forward, linear_tiles},
    {"fma", any_case, linear_fma},
    {"plain", any_case, linear_plain},
};

constexpr Way<LinearBackwardInputParams> kBackwardWays[] = {
    {"wgmma", wgmma_serves_backward, backward_input_wgmma},
    {"tiles", tiles_serve_backward, backward_input_tiles},
    {"fma", any_case, backward_input_fma},
    {"plain", any_case, backward_input_plain},
};

// The first row that holds for a case and suits it, and whose way serves it, is taken.
struct Choice {
  std::string_view way;
  int from_architecture = 0;  // 80, 90, …
  std::int64_t to_m = std::numeric_limits<std::int64_t>::max();
  bool (*suits)(const Case&) = any_case;
  std::string_view reason;
};

constexpr Choice kForwardChoices[] = {
    {.way = "few_rows",
     .from_architecture = 80,
     .to_m = 64,
     .reason = "streams 0.5 bytes a weight once, on the tensor cores; up to 64 rows that is what "
               "limits it, or nearly"},
    {.way = "wgmma",
     .from_architecture = 90,
     .to_m = 1024,
     .suits = fills_wgmma,
     .reason =
         "as tiles, at wgmma's rate, where its tiles of 128 x 256 keep half of the "
         "multiprocessors busy; what the plain way adds to torch's product falls with M, some "
         "28 % at 1024 rows and 14 % at 2048, and a kernel that dequantizes as it goes must "
         "come that near to torch's"},
    {.way = "tiles",
     .from_architecture = 80,
     .to_m = 512,
     .reason = "moves 0.56 bytes a weight for 64 to 256 rows where the plain way moves 4.56 "
               "through the L2 cache; some 512 rows of torch's product, faster by what wgmma is "
               "faster than mma.sync, pay for those"},
    {.way = "fma",
     .to_m = 16,
     .reason = "reads 0.56 bytes a weight where the plain way moves 4.56 through the L2 cache and "
               "launches twice a panel"},
    {.way = "plain",
     .reason = "the fp32 cores have a fifteenth of the tensor cores' rate; dequantization costs "
               "less from some tens of rows on"},
};

constexpr Choice kBackwardChoices[] = {
    {.way = "wgmma",
     .from_architecture = 90,
     .to_m = 1024,
     .suits = fills_wgmma,
     .reason = "as in the forward direction"},
    {.way = "tiles",
     .from_architecture = 80,
     .to_m = 512,
     .reason = "as in the forward direction; and for few rows, where fma computes 64 rows as well, "
               "but on the fp32 cores"},
    {.way = "fma", .to_m = 16, .reason = "as in the forward direction"},
    {.way = "plain", .reason = "as in the forward direction"},
};

template <class Params, std::size_t kWays>
const Way<Params>* find(const Way<Params> (&ways)[kWays], std::string_view name) {
  for (const auto& way : ways) {
    if (name == way.name) return &way;
  }
  return nullptr;
}

// Every row names a way that is there, and the last one holds for all.
template <class Params, std::size_t kWays, std::size_t kChoices>
constexpr bool complete(const Way<Params> (&ways)[kWays], const Choice (&choices)[kChoices]) {
  for (const Choice& choice : choices) {
    bool found = false;
    for (const auto& way : ways) found |= choice.way == way.name;
    if (!found || choice.reason.empty()) return false;
  }
  const Choice& last = choices[kChoices - 1];
  return last.from_architecture == 0 && last.to_m == std::numeric_limits<std::int64_t>::max() &&
         last.suits == any_case;
}
static_assert(complete(kForwardWays, kForwardChoices));
static_assert(complete(kBackwardWays, kBackwardChoices));

// ---- the forced way: an index, or one of these ----

constexpr int kByTable = -1;
constexpr int kUnknown = -2;

template <class Params, std::size_t kWays>
int index_of(const Way<Params> (&ways)[kWays], const char* name) {
  if (name == nullptr || *name == '\0') return kByTable;
  const auto* way = find(ways, name);
  return way == nullptr ? kUnknown : static_cast<int>(way - ways);
}

int index_of(Direction direction, const char* name) {
  return direction == Direction::forward ? index_of(kForwardWays, name)
                                         : index_of(kBackwardWays, name);
}

std::atomic<int>& forced_forward() {
  static std::atomic<int> way = index_of(kForwardWays, std::getenv("QLORA_CUDA_FORWARD"));
  return way;
}

std::atomic<int>& forced_backward() {
  static std::atomic<int> way = index_of(kBackwardWays, std::getenv("QLORA_CUDA_BACKWARD"));
  return way;
}

// The way of the latest call, an index; kByTable before the first.
std::atomic<int>& last(Direction direction) {
  static std::atomic<int> forward = kByTable, backward_input = kByTable;
  return direction == Direction::forward ? forward : backward_input;
}

MeasuredCase as_measured(const Case& c, int device) {
  return {.device = device,
          .direction = c.direction,
          .dtype = c.dtype,
          .double_quant = c.weight->scales.double_quantized(),
          .n = c.weight->rows,
          .k = c.weight->cols,
          .blocksize = c.weight->blocksize,
          .m = c.m};
}

template <class Params, std::size_t kWays, std::size_t kChoices>
Status run(const Way<Params> (&ways)[kWays], const Choice (&choices)[kChoices], int forced,
           const Case& c, const Params& p, const LoraTerm* lora, const Context& context) {
  if (forced == kUnknown) {
    return {StatusCode::unsupported,
            "QLORA_CUDA_FORWARD or QLORA_CUDA_BACKWARD names a way that this build does not have; "
            "build_info() lists those it has"};
  }
  const auto take = [&](const Way<Params>& way) {
    last(c.direction).store(static_cast<int>(&way - ways), std::memory_order_relaxed);
    return way.run(p, lora, context);
  };
  if (forced != kByTable) {
    if (ways[forced].serves(c)) return take(ways[forced]);
    return {StatusCode::unsupported,
            "the way that was forced does not serve this dtype, shape, alignment or architecture"};
  }
  if (const int i = measured_way(as_measured(c, context.device));
      i != kNotMeasured && ways[i].serves(c)) {
    return take(ways[i]);
  }
  int number = 0;
  if (const Status status = architecture(&number); !status.ok()) return status;
  for (const Choice& choice : choices) {
    if (number < choice.from_architecture || c.m > choice.to_m || !choice.suits(c)) continue;
    const auto* way = find(ways, choice.way);
    if (way->serves(c)) return take(*way);
  }
  return {StatusCode::unsupported, "no way serves this case"};
}

}  // namespace

Status linear_by_any_way(const LinearParams& p, const LoraTerm* lora, const Context& context) {
  const Case c{.direction = Direction::forward,
               .dtype = p.dtype,
               .m = p.m,
               .activations = p.x,
               .weight = &p.weight};
  return run(kForwardWays, kForwardChoices, forced_forward().load(), c, p, lora, context);
}

Status backward_input_by_any_way(const LinearBackwardInputParams& p, const LoraTerm* lora,
                                 const Context& context) {
  const Case c{.direction = Direction::backward_input,
               .dtype = p.dtype,
               .m = p.m,
               .activations = p.grad_out,
               .weight = &p.weight};
  return run(kBackwardWays, kBackwardChoices, forced_backward().load(), c, p, lora, context);
}

bool force_way(Direction direction, const char* name) {
  const int way = index_of(direction, name);
  if (way == kUnknown) return false;
  (direction == Direction::forward ? forced_forward() : forced_backward()).store(way);
  return true;
}

const char* way_name(Direction direction, int i) {
  const bool forward = direction == Direction::forward;
  const int count = static_cast<int>(forward ? std::size(kForwardWays) : std::size(kBackwardWays));
  if (i < 0 || i >= count) return nullptr;
  return forward ? kForwardWays[i].name : kBackwardWays[i].name;
}

const char* last_way(Direction direction) { return way_name(direction, last(direction).load()); }

bool set_choices(int device, std::span<const LinearChoice> choices) {
  std::vector<MeasuredWay> ways;
  ways.reserve(choices.size());
  for (const LinearChoice& choice : choices) {
    const Direction direction = choice.forward ? Direction::forward : Direction::backward_input;
    const int way = index_of(direction, choice.way);
    if (way < 0) return false;
    ways.push_back({.most = {.device = device,
                             .direction = direction,
                             .dtype = choice.dtype,
                             .double_quant = choice.double_quant,
                             .n = choice.n,
                             .k = choice.k,
                             .blocksize = choice.blocksize,
                             .m = choice.most_m},
                    .way = way});
  }
  set_measured_ways(device, ways);
  return true;
}

}  // namespace qlora::cuda
