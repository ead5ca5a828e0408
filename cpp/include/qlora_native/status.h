// How a backend says what happened. Nothing below the torch layer throws.
#pragma once

namespace qlora {

enum class StatusCode : unsigned char { ok, invalid_argument, unsupported, out_of_memory, device };

// `message` is a literal: a backend neither allocates to report an error nor owns the text.
struct [[nodiscard]] Status {
  StatusCode code = StatusCode::ok;
  const char* message = "";

  [[nodiscard]] constexpr bool ok() const { return code == StatusCode::ok; }
};

}  // namespace qlora
