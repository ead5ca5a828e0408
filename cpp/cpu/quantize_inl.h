// Blockwise quantization: 4-bit formats, dynamic 8-bit maps, scales.
#pragma once

#include "quantize_4bit_inl.h"
#include "quantize_8bit_inl.h"
