// PagedBuffer for Python: a pager's buffer, whose ranges torch.from_dlpack makes tensors of.
#pragma once

#include <pybind11/pybind11.h>

namespace qlora::python {

void define_paged_buffer(pybind11::module_& m);

}  // namespace qlora::python
