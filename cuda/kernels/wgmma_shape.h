// How linear_wgmma.cuh cuts a product up, as data for its launcher, too.
#pragma once

namespace qlora::cuda {

// A block: a warpgroup that produces the operands of steps, and two that multiply them.
inline constexpr int kWgmmaConsumers = 2;
inline constexpr int kWgmmaProducerThreads = 128;
inline constexpr int kWgmmaThreads = (1 + kWgmmaConsumers) * 128;

inline constexpr int kWgmmaTileRows = kWgmmaConsumers * 64;  // of the result
inline constexpr int kWgmmaTileColumns = 256;
inline constexpr int kWgmmaStages = 3;  // steps of 64 depths, in both operands

// Codes are fetched in panels of 256 rows of the weight by 256 values: four steps. Their rows stand
// so many bytes apart.
inline constexpr int kCodePanel = 256;
inline constexpr int kCodePitch = kCodePanel / 2 + 16;
inline constexpr int kCodePanels = 2;

// Bytes of shared memory: 48, 96 and 72 kB.
inline constexpr int kWgmmaXBytes = kWgmmaStages * kWgmmaTileRows * 64 * 2;
inline constexpr int kWgmmaWeightBytes = kWgmmaStages * kWgmmaTileColumns * 64 * 2;
inline constexpr int kWgmmaCodeBytes = kCodePanels * kCodePanel * kCodePitch;
inline constexpr int kWgmmaSharedBytes = kWgmmaXBytes + kWgmmaWeightBytes + kWgmmaCodeBytes;

// Registers of a thread: those of the sums (128) and what addresses them, and those of 32 values at
// a time. 128 (104 + 2 * 200) are at most 65,536.
inline constexpr int kProducerRegisters = 104;
inline constexpr int kConsumerRegisters = 200;

}  // namespace qlora::cuda
