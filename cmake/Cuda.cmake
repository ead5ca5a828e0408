# The CUDA backend: QLORA_CUDA is AUTO (where a compiler is found), ON (or the build stops) or OFF.
#
# Sets qlora_has_cuda and, where it is true, the target qlora_cuda. It needs CUDA's compiler and its
# static runtime, and no CUDA build of torch: the kernels know none. What is built imports on a
# machine without a GPU or a driver.
set(QLORA_CUDA AUTO CACHE STRING "Build the CUDA kernels: AUTO, ON or OFF")
set_property(CACHE QLORA_CUDA PROPERTY STRINGS AUTO ON OFF)
set(qlora_has_cuda FALSE)

if(NOT QLORA_CUDA STREQUAL "OFF")
  # Turing to Blackwell, and PTX of the newest for what comes after it. Fewer build sooner:
  # -DCMAKE_CUDA_ARCHITECTURES=90a-real, or CUDAARCHS in the environment.
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
    set(CMAKE_CUDA_ARCHITECTURES
        75-real 80-real 86-real 89-real 90a-real 100a-real 120a-real 120-virtual)
  endif()
  include(CheckLanguage)
  check_language(CUDA)
  # Asked before the language is enabled: an older compiler ends that by an architecture it does not
  # know.
  set(too_old FALSE)
  if(CMAKE_CUDA_COMPILER)
    execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --version OUTPUT_VARIABLE nvcc_says)
    string(REGEX MATCH "release ([0-9.]+)" nvcc_release "${nvcc_says}")
    if(CMAKE_MATCH_1 VERSION_LESS 12.8)
      set(too_old "CUDA ${CMAKE_MATCH_1} is too old: qlora_native needs nvcc >= 12.8")
    else()
      enable_language(CUDA)
      find_package(CUDAToolkit QUIET)
    endif()
  endif()
  if(too_old AND QLORA_CUDA STREQUAL "ON")
    message(FATAL_ERROR "${too_old}")
  elseif(too_old)
    message(WARNING "${too_old}; building the CPU backend alone")
  elseif(CMAKE_CUDA_COMPILER AND TARGET CUDA::cudart_static)
    set(qlora_has_cuda TRUE)
    message(STATUS "CUDA ${CMAKE_CUDA_COMPILER_VERSION} for ${CMAKE_CUDA_ARCHITECTURES}")
  elseif(QLORA_CUDA STREQUAL "ON")
    message(FATAL_ERROR "QLORA_CUDA=ON, and no CUDA compiler with a static runtime was found; "
                        "name it by CUDACXX=/path/to/nvcc")
  else()
    message(STATUS "CUDA: no compiler found, the CPU backend alone")
  endif()
endif()

if(qlora_has_cuda)
  file(GLOB qlora_cuda_sources CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/cuda/launch/*.cu"
       "${PROJECT_SOURCE_DIR}/cuda/paging/*.cu")
  add_library(qlora_cuda OBJECT ${qlora_cuda_sources})
  set_target_properties(qlora_cuda PROPERTIES CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON
                                              CUDA_VISIBILITY_PRESET hidden)
  target_include_directories(qlora_cuda PRIVATE cuda)
  target_link_libraries(qlora_cuda PUBLIC qlora_contract CUDA::cudart_static)
  # What has kernels of its own, for the launchers to know (cuda/device/warpgroup.cuh).
  if(CMAKE_CUDA_ARCHITECTURES MATCHES "90a")
    target_compile_definitions(qlora_cuda PRIVATE QLORA_CUDA_SM90A)
  endif()
  target_compile_options(qlora_cuda PRIVATE
    # The contract's constexpr functions run on the device, too.
    --expt-relaxed-constexpr
    # Products and sums stay separate instructions where the source writes them so: bits must not
    # depend on what the compiler chose to contract. Kernels ask for fused ones by name.
    -fmad=false
    $<$<BOOL:${QLORA_WERROR}>:-Werror=all-warnings>
    # Architectures in parallel would each take the memory of a compiler: one after another.
    --threads=1)
endif()
