// No twin: the real header has nothing of the hardware in it.
#include "../../../cuda/device/fragments.cuh"
