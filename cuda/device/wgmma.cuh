// The tensor cores' product of matrices in shared memory, by a warpgroup (PTX: wgmma). sm_90a.
//
//   fence_products(); multiply_add<T, …>(sums, a, b); …; commit_products();
//   wait_products<0>(sums); sums.get(i)
//
// Asynchronous: the operands may not be overwritten, nor the sums touched, before the wait that
// covers the product. Operands are read through the asynchronous proxy (fence.cuh).
//
// Operands are tiles of rows of 64 16-bit elements, which are 128 bytes, in swizzled order: piece c
// (8 elements) of row r stands at place c ^ (r % 8) of its row. The hardware exchanges bits of the
// address, so a tile begins at a multiple of 1024 bytes. What a product takes of a tile is
// described by 64 bits (PTX: matrix descriptor).
#pragma once

#include <cstdint>
#include <type_traits>

#include "device/shared.cuh"
#include "device/warpgroup.cuh"
#include "qlora_native/types.h"

namespace qlora::cuda {

// A product: sums [64, 256] += a [64, 16] b [16, 256].
inline constexpr int kWgmmaRows = 64;
inline constexpr int kWgmmaColumns = 256;
inline constexpr int kWgmmaDepth = 16;

inline constexpr int kSwizzledRow = 64;      // elements
inline constexpr int kSwizzledBytes = 1024;  // after which the order repeats: 8 rows

struct MatrixDescriptor {
  std::uint64_t bits;
};

namespace detail {

// Addresses and distances count 16 bytes, in 14 bits.
__device__ inline std::uint64_t field(std::uint32_t bytes) { return (bytes & 0x3FFFFu) >> 4; }

// Bits 62 and 63: 1 is the swizzle of 128 bytes.
__device__ inline MatrixDescriptor describe(std::uint32_t address, std::uint32_t leading_bytes,
                                            std::uint32_t stride_bytes) {
  return {field(address) | field(leading_bytes) << 16 | field(stride_bytes) << 32 |
          std::uint64_t{1} << 62};
}

}  // namespace detail

// K-major: a row of the tile at element `tile` for each row of a or column of b, the depth along
// it. From depth `depth` (0, 16, 32, 48) on.
template <class T>
__device__ MatrixDescriptor describe_depth_along_rows(Shared<T> memory, int tile, int depth) {
  return detail::describe(memory.address(tile + depth), 16, kSwizzledBytes);
}

// MN-major: a row for each depth, 64 columns of b along it; the tile of the next 64 columns begins
// `tile_elements` further. From row `depth`, a multiple of 8, on.
template <class T>
__device__ MatrixDescriptor describe_depth_across_rows(Shared<T> memory, int tile, int depth,
                                                       int tile_elements) {
  return detail::describe(memory.address(tile + depth * kSwizzledRow),
                          static_cast<std::uint32_t>(tile_elements) * 2, kSwizzledBytes);
}

// A thread's sums. Of lane l of warp w of the warpgroup:
//   value 4j + 2h + i is at row 16w + l/4 + 8h, column 8j + 2 (l % 4) + i
class WgmmaSums {
 public:
  static constexpr int kValues = kWgmmaColumns / 2;

  [[nodiscard]] __device__ float get(int i) const { return value[i]; }
  __device__ void set(int i, float sum) { value[i] = sum; }

  float value[kValues];  // for the words of wgmma.cuh alone
};

// wgmma.fence: before the first product, and where other instructions wrote the sums.
__device__ inline void fence_products() {
  asm volatile("wgmma.fence.sync.aligned;" : : : "memory");
}

// wgmma.commit_group: the products since the last one are a group.
__device__ inline void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory");
}

// wgmma.wait_group: until at most the kPending newest groups are under way. (The sums are named so
// that the compiler moves no access to them across it.)
template <int kPending>
__device__ void wait_products(WgmmaSums& sums) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(kPending) : "memory");
  if constexpr (kPending == 0) {
#pragma unroll
    for (int i = 0; i < WgmmaSums::kValues; ++i)
      asm volatile("" : "+f"(sums.value[i]) : : "memory");
  }
}

#define QLORA_SUMS_8(i)                                                                       \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
// clang-format off
#define QLORA_WGMMA(type) \
  asm volatile( \
      "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n" \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {" \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, " \
      "%128, %129, p, 1, 1, 0, %130;\n}" \
      : QLORA_SUMS_8(0), QLORA_SUMS_8(8), QLORA_SUMS_8(16), QLORA_SUMS_8(24), \
        QLORA_SUMS_8(32), QLORA_SUMS_8(40), QLORA_SUMS_8(48), QLORA_SUMS_8(56), \
        QLORA_SUMS_8(64), QLORA_SUMS_8(72), QLORA_SUMS_8(80), QLORA_SUMS_8(88), \
        QLORA_SUMS_8(96), QLORA_SUMS_8(104), QLORA_SUMS_8(112), QLORA_SUMS_8(120) \
      : "l"(a.bits), "l"(b.bits), "n"(kAcrossRows ? 1 : 0))
// clang-format on

// wgmma.mma_async.sync.aligned.m64n256k16.f32.{f16.f16,bf16.bf16}: sums += a b. a's depth lies
// along the rows of its tile; b's, too, or across them.
template <class T, bool kAcrossRows>
__device__ void multiply_add(WgmmaSums& sums, MatrixDescriptor a, MatrixDescriptor b) {
  static_assert(std::is_same_v<T, Float16> || std::is_same_v<T, BFloat16>);
  float* d = sums.value;
  if constexpr (std::is_same_v<T, Float16>) {
    QLORA_WGMMA("f16");
  } else {
    QLORA_WGMMA("bf16");
  }
}

#undef QLORA_WGMMA
#undef QLORA_SUMS_8

}  // namespace qlora::cuda
