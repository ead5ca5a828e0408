# Compiles cpp/cpu/isa_<name>.cpp with that instruction set's flags, and no other file with any.
set(QLORA_ISA_FLAGS_scalar "")
set(QLORA_ISA_FLAGS_avx2 -mavx2 -mfma -mf16c)
set(QLORA_ISA_FLAGS_avx512 ${QLORA_ISA_FLAGS_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl)
# GCC 12's own AVX-512 header leaves registers undefined on purpose and warns of it (GCC bug 105593).
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  list(APPEND QLORA_ISA_FLAGS_avx512 -Wno-uninitialized -Wno-maybe-uninitialized)
endif()
set(QLORA_ISA_FLAGS_avx512bf16 ${QLORA_ISA_FLAGS_avx512} -mavx512bf16)
# AArch64's baseline. GCC 12's scheduling ahead of register allocation loads the elements of all rows
# of a tile at once, and then spills three of its 24 sums.
set(QLORA_ISA_FLAGS_neon $<$<CXX_COMPILER_ID:GNU>:-fno-schedule-insns>)
set(QLORA_ISA_FLAGS_neonbf16 ${QLORA_ISA_FLAGS_neon} -march=armv8.2-a+bf16)

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
  set(QLORA_ISAS scalar avx2 avx512 avx512bf16)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
  set(QLORA_ISAS scalar neon neonbf16)
else()
  set(QLORA_ISAS scalar)
endif()

# Products and sums stay separate instructions where the source writes them so: bits must not depend
# on what the compiler chose to contract. The kernels ask for a fused multiply-add by name.
function(qlora_add_isa_sources target)
  foreach(isa IN LISTS QLORA_ISAS)
    set(source "${CMAKE_CURRENT_SOURCE_DIR}/cpp/cpu/isa_${isa}.cpp")
    target_sources(${target} PRIVATE "${source}")
    set_source_files_properties("${source}" PROPERTIES COMPILE_OPTIONS
                                                       "${QLORA_ISA_FLAGS_${isa}};-ffp-contract=off")
    string(TOUPPER "QLORA_HAS_${isa}" has_isa)
    target_compile_definitions(${target} PRIVATE "${has_isa}")
  endforeach()
endfunction()
