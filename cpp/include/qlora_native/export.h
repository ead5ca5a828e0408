// Marks the few functions that libqlora_native shows to the Python module beside it. All else is
// hidden, so that two versions of the library in one process do not see each other's symbols.
#pragma once

#define QLORA_EXPORT __attribute__((visibility("default")))
