# Builds for ARM on a machine of another kind, and lets ctest run what was built in an emulator.
# Debian, Ubuntu: apt install g++-aarch64-linux-gnu qemu-user
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_EXE_LINKER_FLAGS_INIT -static) # so that the emulator needs no ARM libraries
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64)
