// What the emulator's own tests say.
#pragma once

#include <cstdio>
#include <string_view>

#include "qlora_native/status.h"

namespace emulation {

inline int failures = 0;

inline void expect(bool holds, const char* what, const char* detail = "") {
  if (holds) return;
  std::printf("FAILED: %s %s\n", what, detail);
  ++failures;
}

// Either kind: which one a missing barrier shows as depends on who comes first.
inline void expect_fault(const qlora::Status& status, const char* kind, const char* what,
                         const char* or_kind = "no other") {
  const std::string_view message = status.ok() ? "" : status.message;
  const bool found = message.starts_with(kind) || message.starts_with(or_kind);
  expect(found, what, status.ok() ? "(ran through)" : status.message);
  if (found) std::printf("%-44s %s\n", what, status.message);
}

inline int report() {
  std::printf("%d failures\n", failures);
  return failures < 99 ? failures : 99;
}

}  // namespace emulation
