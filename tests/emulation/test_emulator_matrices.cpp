// ldmatrix and mma, element by element against the tables of the PTX document.
#include <array>
#include <cstdint>
#include <vector>

#include "counters.h"
#include "device/convert.cuh"
#include "device/global.cuh"
#include "device/launch.cuh"
#include "device/matrix.cuh"
#include "device/mma.cuh"
#include "expect.h"

namespace {

using namespace qlora::cuda;
using emulation::expect;
using emulation::expect_fault;
using qlora::BFloat16;
using qlora::Float16;
using qlora::from_float;
using qlora::Status;

// ---- ldmatrix ----

// Four matrices, row r of matrix m at 16-bit element (8 m + r) * stride: value 64 m + 8 r + column.
template <bool kTransposed>
__global__ void matrices_kernel(Global<std::uint32_t> out, int stride, int shift, int writers) {
  const Shared<Float16> rows = dynamic_shared<Float16>(0, 32 * 64);
  const int lane = lane_index();
  const int at = lane * stride;
  if (lane < writers) {
    for (int i = 0; i < 8; ++i) rows.store(at + i, {static_cast<std::uint16_t>(8 * lane + i)});
  }
  sync_warp();
  const Matrices m =
      kTransposed ? load_matrices_transposed(rows, at + shift) : load_matrices(rows, at + shift);
  for (int i = 0; i < 4; ++i) out.store(4 * lane + i, m.word[i]);
}

template <bool kTransposed>
Status run_matrices(std::vector<std::uint32_t>& out, int stride, int shift = 0, int writers = 32,
                    int threads = 32) {
  out.resize(128);
  return launch(matrices_kernel<kTransposed>,
                {.grid = 1, .block = threads, .dynamic_shared = 32 * 64 * 2},
                Global<std::uint32_t>(out.data(), 128), stride, shift, writers);
}

void test_matrices() {
  std::vector<std::uint32_t> out;
  const auto pair = [](int low, int high) {
    return static_cast<std::uint32_t>(low) | static_cast<std::uint32_t>(high) << 16;
  };
  for (std::uint64_t seed = 0; seed < 4; ++seed) {
    machine().set_seed(seed);
    for (const int stride : {8, 24, 64}) {
      Status status = run_matrices<false>(out, stride);
      expect(status.ok(), "ldmatrix runs", status.message);
      for (int lane = 0; lane < 32; ++lane) {
        for (int m = 0; m < 4; ++m) {
          // "each thread holds a row's fragment: thread 4 r + c / 2 elements c, c + 1 of row r"
          const int first = 64 * m + 8 * (lane / 4) + 2 * (lane % 4);
          expect(out[static_cast<std::size_t>(4 * lane + m)] == pair(first, first + 1),
                 "ldmatrix: the elements of a lane");
        }
      }
      status = run_matrices<true>(out, stride);
      expect(status.ok(), "ldmatrix.trans runs", status.message);
      for (int lane = 0; lane < 32; ++lane) {
        for (int m = 0; m < 4; ++m) {
          const int first = 64 * m + 8 * (2 * (lane % 4)) + lane / 4;
          expect(out[static_cast<std::size_t>(4 * lane + m)] == pair(first, first + 8),
                 "ldmatrix.trans: the elements of a lane");
        }
      }
    }
  }
  machine().set_seed(0);
  expect_fault(run_matrices<false>(out, 8, 4), "misaligned", "a row off 16 bytes");
  expect_fault(run_matrices<false>(out, 8, 0, 31), "uninitialised", "a row unwritten");
  expect_fault(run_matrices<false>(out, 66), "out of bounds", "a row past the end");
  expect_fault(run_matrices<false>(out, 8, 0, 32, 16), "divergent warp", "half a warp");
}

void test_conflicts() {
  std::vector<std::uint32_t> out;
  const auto conflicts = [&](int stride) {
    emulation::counters().reset();
    emulation::counters().enable(true);
    const std::int64_t stores = 8;  // of one element a lane
    expect(run_matrices<false>(out, stride).ok(), "rows of a stride");
    emulation::counters().enable(false);
    expect(emulation::counters().counts().shared_instructions == stores + 1, "one instruction");
    return emulation::counters().counts().bank_conflicts;
  };
  // Of a store of 2 bytes a lane: 64 elements apart are 32 words, all in a bank; 72 apart would not
  // fit. Of ldmatrix: four phases of eight rows.
  expect(conflicts(8) == 8 * 3, "dense rows: none for ldmatrix, four ways for each store");
  expect(conflicts(64) == 8 * 31 + 4 * 7, "rows of 128 bytes: eight ways in each phase");
  expect(conflicts(24) == 8 * 3, "rows of 48 bytes: none");
}

// ---- mma ----

constexpr int kM = 16;
constexpr int kN = 8;
constexpr int kK = 16;

template <class T, bool kTwoHalves, bool kInBranch>
__global__ void mma_kernel(Global<const T> a, Global<const T> b, Global<float> d) {
  const int group = lane_index() / 4;
  const int t = lane_index() % 4;
  const auto word = [](T low, T high) {
    return static_cast<std::uint32_t>(low.bits) | static_cast<std::uint32_t>(high.bits) << 16;
  };
  // The document's own formulas, by element i of the fragment:
  //   a_i: row = groupID for i in {0, 1, 4, 5}, else groupID + 8;
  //        column = threadID_in_group * 2 + (i & 1), + 8 for i >= 4
  //   b_i: row = threadID_in_group * 2 + (i & 1), + 8 for i >= 2; column = groupID
  //   c_i: row = groupID for i < 2, else groupID + 8; column = threadID_in_group * 2 + (i & 1)
  FragmentA fragment_a{};
  for (int i = 0; i < 8; i += 2) {
    const int row = (i == 0 || i == 4) ? group : group + 8;
    const int column = t * 2 + (i >= 4 ? 8 : 0);
    fragment_a.word[i / 2] = word(a.load(row * kK + column), a.load(row * kK + column + 1));
  }
  FragmentB fragment_b{};
  for (int i = 0; i < 4; i += 2) {
    const int row = t * 2 + (i >= 2 ? 8 : 0);
    fragment_b.word[i / 2] = word(b.load(row * kN + group), b.load((row + 1) * kN + group));
  }
  const auto at = [&](int i) { return (i < 2 ? group : group + 8) * kN + t * 2 + (i & 1); };
  Accumulator sums{};
  for (int i = 0; i < 4; ++i) sums.value[i] = d.load(at(i));
  if (kTwoHalves) {
    mma_m16n8k8<T>(sums, fragment_a.word[0], fragment_a.word[1], fragment_b.word[0]);
    mma_m16n8k8<T>(sums, fragment_a.word[2], fragment_a.word[3], fragment_b.word[1]);
  } else if (!kInBranch || lane_index() < 16) {
    mma_m16n8k16<T>(sums, fragment_a, fragment_b);
  }
  for (int i = 0; i < 4; ++i) d.store(at(i), sums.value[i]);
}

template <class T, bool kTwoHalves, bool kInBranch = false>
Status run_mma(const std::vector<float>& a, const std::vector<float>& b, std::vector<float>& d) {
  const auto converted = [](const std::vector<float>& values) {
    std::vector<T> result;
    for (const float value : values) result.push_back(from_float<T>(value));
    return result;
  };
  const std::vector<T> narrow_a = converted(a), narrow_b = converted(b);
  return launch(mma_kernel<T, kTwoHalves, kInBranch>, {.grid = 1, .block = 32},
                Global<const T>(narrow_a.data(), kM * kK),
                Global<const T>(narrow_b.data(), kK * kN), Global<float>(d.data(), kM * kN));
}

template <class T, bool kTwoHalves>
void test_product() {
  // Small whole numbers, no two rows or columns alike: exact, and any misplaced element shows.
  std::vector<float> a(kM * kK), b(kK * kN), d(kM * kN), want(kM * kN);
  for (std::size_t i = 0; i < a.size(); ++i) a[i] = static_cast<float>(i * i % 37) - 18.0f;
  for (std::size_t i = 0; i < b.size(); ++i) b[i] = static_cast<float>(i * i * 3 % 41) - 20.0f;
  for (std::size_t i = 0; i < d.size(); ++i) d[i] = static_cast<float>(i) + 0.5f;
  for (std::size_t m = 0; m < kM; ++m) {
    for (std::size_t n = 0; n < kN; ++n) {
      want[m * kN + n] = d[m * kN + n];
      for (std::size_t k = 0; k < kK; ++k) want[m * kN + n] += a[m * kK + k] * b[k * kN + n];
    }
  }
  const Status status = run_mma<T, kTwoHalves>(a, b, d);
  expect(status.ok(), "mma runs", status.message);
  expect(d == want, "mma multiplies as the document's tables have it");
}

// ---- tf32 ----

__global__ void tf32_kernel(Global<const float> a, Global<const float> b, Global<float> d) {
  const int group = lane_index() / 4;
  const int t = lane_index() % 4;
  // The document's formulas:
  //   a_i: row = groupID for i in {0, 2}, else groupID + 8;
  //        column = threadID_in_group for i < 2, else threadID_in_group + 4
  //   b_i: row = threadID_in_group + 4 i; column = groupID
  //   c_i: as with 16 bits
  FragmentA8 fragment_a{};
  for (int i = 0; i < 4; ++i) {
    const int row = (i == 0 || i == 2) ? group : group + 8;
    fragment_a.value[i] = round_tf32(a.load(row * 8 + (i < 2 ? t : t + 4)));
  }
  FragmentB8 fragment_b{};
  for (int i = 0; i < 2; ++i) fragment_b.value[i] = b.load((t + 4 * i) * kN + group);
  const auto at = [&](int i) { return (i < 2 ? group : group + 8) * kN + t * 2 + (i & 1); };
  Accumulator sums{};
  for (int i = 0; i < 4; ++i) sums.value[i] = d.load(at(i));
  mma_m16n8k8_tf32(sums, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) d.store(at(i), sums.value[i]);
}

void test_tf32() {
  // Whole numbers below 2^11 are tf32 numbers. In b something is put below their last bit, which is
  // not looked at.
  std::vector<float> a(kM * 8), b(8 * kN), d(kM * kN), want(kM * kN);
  for (std::size_t i = 0; i < a.size(); ++i) a[i] = static_cast<float>(i * i % 2011) - 1000.0f;
  for (std::size_t i = 0; i < b.size(); ++i) b[i] = static_cast<float>(i * i * 3 % 41) - 20.0f;
  for (std::size_t m = 0; m < kM; ++m) {
    for (std::size_t n = 0; n < kN; ++n) {
      d[m * kN + n] = want[m * kN + n] = static_cast<float>(m) + 0.5f;
      for (std::size_t k = 0; k < 8; ++k) want[m * kN + n] += a[m * 8 + k] * b[k * kN + n];
    }
  }
  for (float& value : b) value *= 1.0f + 0x1p-20f;
  const Status status =
      launch(tf32_kernel, {.grid = 1, .block = 32}, Global<const float>(a.data(), kM * 8),
             Global<const float>(b.data(), 8 * kN), Global<float>(d.data(), kM * kN));
  expect(status.ok(), "mma of tf32 runs", status.message);
  expect(d == want, "mma of tf32 multiplies as the document's tables have it");

  expect(round_tf32(1.0f + 0x1p-12f) == 1.0f, "tf32: to the nearest");
  expect(round_tf32(1.0f + 0x1p-11f) == 1.0f + 0x1p-10f, "tf32: a tie goes away from 0");
  expect(round_tf32(-1.0f - 0x1p-11f) == -1.0f - 0x1p-10f, "tf32: a negative tie too");
  expect(truncate_tf32(1.0f + 0x1p-10f + 0x1p-11f) == 1.0f + 0x1p-10f, "tf32: towards 0");
}

void test_mma() {
  for (std::uint64_t seed = 0; seed < 4; ++seed) {
    machine().set_seed(seed);
    test_product<Float16, false>();
    test_product<Float16, true>();
    test_product<BFloat16, false>();
    test_product<BFloat16, true>();
    std::vector<float> a(kM * kK), b(kK * kN), d(kM * kN);
    expect_fault(run_mma<Float16, false, true>(a, b, d), "divergent warp", "mma in a branch");
  }
  machine().set_seed(0);
}

}  // namespace

int main() {
  test_matrices();
  test_conflicts();
  test_mma();
  test_tf32();
  return emulation::report();
}
