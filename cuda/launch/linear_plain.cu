// The plain way: a panel of the weight dequantized, torch's own matrix product, panel by panel.
//
// Dequantization writes 2 bytes for a 16-bit value that the product reads again: both go through
// the L2 cache, for a panel has half its size. A panel is a range of the OUTPUT's columns, rows of
// W in the forward pass and columns of W in the gradient, so that every output is one product's,
// rounded once. The LoRA product is one more product before, rounded to the output's type.
#include "device/launch.cuh"
#include "kernels/dequantize_panel.cuh"
#include "launch/linear_paths.h"
#include "qlora_native/dispatch.h"

namespace qlora::cuda {
namespace {

constexpr Status kNoMemory = {StatusCode::out_of_memory,
                              "no memory for a dequantized panel of the weight"};

std::byte* offset_by(const void* data, std::int64_t elements, DType dtype) {
  return static_cast<std::byte*>(const_cast<void*>(data)) + elements * size_of(dtype);
}

// The output's columns in panels of equal width, in whole tiles of a product where they are that
// wide, in whole runs of a weight's values always.
struct Panels {
  std::int64_t cols, width;

  // Of `cols` columns with `depth` weight values each.
  Panels(std::int64_t cols, std::int64_t depth, std::int64_t most_values)
      : cols(cols), width(cols) {
    const std::int64_t most = most_values / (depth > 0 ? depth : 1);
    const std::int64_t quantum = most >= 128 ? 128 : kMostRun;
    const std::int64_t count = ceil_div(cols, most > quantum ? most : quantum);
    if (count > 1) width = ceil_div(ceil_div(cols, count), quantum) * quantum;
  }
  [[nodiscard]] std::int64_t width_at(std::int64_t first) const {
    return cols - first < width ? cols - first : width;
  }
};

Status dequantize_panel(const Weight4bit& weight, DType dtype, std::int64_t first_row,
                        std::int64_t rows, std::int64_t first_col, std::int64_t cols, void* out,
                        const Context& context) {
  int processors = 0;
  if (const Status status = multiprocessors(&processors); !status.ok()) return status;
  const std::int64_t resident = std::int64_t{processors} * (2048 / kPanelThreads);
  const std::int64_t blocks = ceil_div(rows * ceil_div(cols, kMostRun), kPanelThreads);
  return with_type(dtype, [&]<class T>() {
    return with_flag(weight.scales.double_quantized(), [&]<bool kDouble>() {
      return launch(dequantize_panel_kernel<T, kDouble>,
                    {.grid = blocks < resident ? blocks : resident,
                     .block = kPanelThreads,
                     .stream = context.stream},
                    DequantizePanelArguments<T>{.weight = device_weight(weight),
                                                .first_row = first_row,
                                                .rows = rows,
                                                .first_col = first_col,
                                                .cols = cols,
                                                .out = {static_cast<T*>(out), rows * cols}});
    });
  });
}

struct Product {
  std::int64_t m, depth, cols;
  DType dtype;
  const void* left;  // [M, depth]
  const void* bias;
  void* out;  // [M, cols]
};

// dequantize(first, width) fills a panel; `transposed`: it is [width, depth].
template <class Dequantize>
Status multiply(const Product& p, bool transposed, const LoraTerm* lora, const Panels& panels,
                void* panel, const Context& context, const Dequantize& dequantize) {
  for (std::int64_t first = 0; first < p.cols; first += panels.width) {
    const std::int64_t width = panels.width_at(first);
    if (const Status status = dequantize(first, width); !status.ok()) return status;
    const void* bias = p.bias == nullptr ? nullptr : offset_by(p.bias, first, p.dtype);
    const Status status =
        context.matmul(context.lender, {.m = p.m,
                                        .n = width,
                                        .k = p.depth,
                                        .dtype = p.dtype,
                                        .a = {p.left, p.depth},
                                        .b = {panel, transposed ? p.depth : width, transposed},
                                        .bias = bias,
                                        .out = offset_by(p.out, first, p.dtype),
                                        .out_row_stride = p.cols});
    if (!status.ok()) return status;
  }
  if (lora == nullptr) return {};
  return add_lora_fma(p.dtype, p.m, p.cols, p.out, *lora, context);
}

// Half of the L2 cache, in values of that type.
Status panel_values(DType dtype, std::int64_t* values) {
  int bytes = 0;
  const Status status = l2_bytes(&bytes);
  *values = bytes / 2 / size_of(dtype);
  return status;
}

}  // namespace

Status linear_plain(const LinearParams& p, const LoraTerm* lora, const Context& context) {
  const std::int64_t n = p.weight.rows, k = p.weight.cols;
  if (p.m == 0 || n == 0) return {};
  std::int64_t values = 0;
  if (const Status status = panel_values(p.dtype, &values); !status.ok()) return status;
  const Panels panels(n, k, values);
  void* panel = context.allocate(context.lender, panels.width * k * size_of(p.dtype));
  if (panel == nullptr && k > 0) return kNoMemory;
  const Product product{
      .m = p.m, .depth = k, .cols = n, .dtype = p.dtype, .left = p.x, .bias = p.bias, .out = p.out};
  return multiply(product, true, lora, panels, panel, context,
                  [&](std::int64_t first, std::int64_t width) {
                    return dequantize_panel(p.weight, p.dtype, first, width, 0, k, panel, context);
                  });
}

Status backward_input_plain(const LinearBackwardInputParams& p, const LoraTerm* lora,
                            const Context& context) {
  const std::int64_t n = p.weight.rows, k = p.weight.cols;
  if (p.m == 0 || k == 0) return {};
  std::int64_t values = 0;
  if (const Status status = panel_values(p.dtype, &values); !status.ok()) return status;
  const Panels panels(k, n, values);
  void* panel = context.allocate(context.lender, panels.width * n * size_of(p.dtype));
  if (panel == nullptr && n > 0) return kNoMemory;
  const Product product{.m = p.m,
                        .depth = n,
                        .cols = k,
                        .dtype = p.dtype,
                        .left = p.grad_out,
                        .bias = nullptr,
                        .out = p.grad_x};
  return multiply(product, false, lora, panels, panel, context,
                  [&](std::int64_t first, std::int64_t width) {
                    return dequantize_panel(p.weight, p.dtype, 0, n, first, width, panel, context);
                  });
}

}  // namespace qlora::cuda
