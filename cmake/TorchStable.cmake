# Finds the torch that the Python running the build has, for its stable ABI.
#
# Gives the target TorchStable: headers, libtorch_cpu, and the ABI version that the library promises
# to run on. This is the one place that names that version.
set(QLORA_TORCH_TARGET_NAME "2.10")
set(QLORA_TORCH_TARGET_VERSION 0x020a000000000000) # major, minor, patch: a byte each, from the top

execute_process(
  COMMAND "${Python_EXECUTABLE}" -c
          "import torch, os; print(os.path.dirname(torch.__file__)); print(torch.__version__)"
  OUTPUT_VARIABLE torch_info
  RESULT_VARIABLE torch_missing
  ERROR_VARIABLE torch_error
  OUTPUT_STRIP_TRAILING_WHITESPACE)
if(torch_missing)
  message(FATAL_ERROR
      "qlora_native builds against the torch that is installed, and ${Python_EXECUTABLE} has none.\n"
      "Install it first, then build without isolation:\n"
      "    pip install 'torch>=2.10' numpy pybind11 scikit-build-core cmake ninja\n"
      "    pip install --no-build-isolation .\n${torch_error}")
endif()
string(REPLACE "\n" ";" torch_info "${torch_info}")
list(GET torch_info 0 torch_dir)
list(GET torch_info 1 torch_version)
if(torch_version VERSION_LESS 2.10)
  message(FATAL_ERROR "qlora_native needs torch >= 2.10 (stable ABI); found ${torch_version}")
endif()
message(STATUS "torch ${torch_version} at ${torch_dir}")

add_library(TorchStable INTERFACE)
target_include_directories(TorchStable SYSTEM INTERFACE "${torch_dir}/include")
target_compile_definitions(TorchStable
                           INTERFACE TORCH_TARGET_VERSION=${QLORA_TORCH_TARGET_VERSION})
target_compile_options(TorchStable INTERFACE "-ffile-prefix-map=${torch_dir}/=")
target_link_directories(TorchStable INTERFACE "${torch_dir}/lib")
target_link_libraries(TorchStable INTERFACE torch_cpu)
