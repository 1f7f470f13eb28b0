// The importable stmae._video: crop_resize.h for planes that come in by the buffer protocol. Needs no torch, so that whoever only
// reads videos stays light; built for one version of Python, as pybind11 is.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

#include "base/isa.h"
#include "video/crop_resize.h"

namespace py = pybind11;

namespace {

using stmae::video::CropResize;
using stmae::video::Plane;

std::pair<int32_t, int32_t> pair_of(const char* name, const py::sequence& values) {
  if (values.size() != 2) throw std::invalid_argument(std::string("CropResize: expected ") + name + " as two numbers");
  return {values[0].cast<int32_t>(), values[1].cast<int32_t>()};
}

CropResize make(const py::sequence& size, const py::sequence& box, const py::sequence& out_size, const py::sequence& mirror,
                const py::sequence& chroma_shift, std::pair<double, double> chroma_place, std::pair<double, double> luma_weights,
                bool full_range, int32_t depth, bool grey) {
  if (box.size() != 4) throw std::invalid_argument("CropResize: expected box as (top, left, height, width)");
  stmae::video::Geometry g;
  std::tie(g.height, g.width) = pair_of("size", size);
  g.top = box[0].cast<int32_t>();
  g.left = box[1].cast<int32_t>();
  g.box_height = box[2].cast<int32_t>();
  g.box_width = box[3].cast<int32_t>();
  std::tie(g.out_height, g.out_width) = pair_of("out_size", out_size);
  const auto [mirror_y, mirror_x] = pair_of("mirror", mirror);
  g.mirror_y = mirror_y != 0;
  g.mirror_x = mirror_x != 0;
  std::tie(g.chroma_shift_y, g.chroma_shift_x) = pair_of("chroma_shift", chroma_shift);
  std::tie(g.chroma_y, g.chroma_x) = chroma_place;
  return stmae::video::make_crop_resize(g, luma_weights.first, luma_weights.second, full_range, depth, grey);
}

// A view that is given back however the call ends.
class View {
 public:
  View(const py::handle& object, bool writable) {
    const int flags = (writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) | PyBUF_STRIDES;
    if (PyObject_GetBuffer(object.ptr(), &view_, flags) != 0) throw py::error_already_set();
  }
  View(const View&) = delete;
  View& operator=(const View&) = delete;
  ~View() { PyBuffer_Release(&view_); }
  const Py_buffer& operator*() const { return view_; }
  const Py_buffer* operator->() const { return &view_; }

 private:
  Py_buffer view_;
};

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  ((message << "CropResize: ") << ... << parts);
  throw std::invalid_argument(message.str());
}

Plane plane_of(const Py_buffer& view, int index, int64_t stride, int64_t height, int64_t width, bool wide) {
  const int64_t row = width * (wide ? 2 : 1);
  if (!PyBuffer_IsContiguous(&view, 'C')) fail("expected plane ", index, " contiguous");
  if (stride < row) fail("expected plane ", index, " with rows of at least ", row, " bytes, got ", stride);
  if (wide && (stride % 2 || reinterpret_cast<uintptr_t>(view.buf) % 2)) fail("expected plane ", index, " aligned to 2 bytes");
  int64_t bytes = 0;
  if (__builtin_mul_overflow(height - 1, stride, &bytes) || __builtin_add_overflow(bytes, row, &bytes) || view.len < bytes)
    fail("expected plane ", index, " with ", height, " rows of ", stride, " bytes, got ", view.len, " bytes");
  return {static_cast<const uint8_t*>(view.buf), stride};
}

void call(const CropResize& plan, const py::sequence& planes, const py::sequence& strides, const py::object& out) {
  const size_t count = plan.grey ? 1 : 3;
  if (planes.size() != count || strides.size() != count)
    fail("expected ", count, " planes and strides, got ", planes.size(), " and ", strides.size());
  const auto& g = plan.geometry;
  const View to(out, true);
  if (to->ndim != 3 || to->itemsize != 1 || to->shape[0] != g.out_height || to->shape[1] != g.out_width || to->shape[2] != 3)
    fail("expected out uint8 [", g.out_height, ", ", g.out_width, ", 3]");
  if (to->strides[2] != 1 || to->strides[1] != 3 || to->strides[0] < int64_t{3} * g.out_width)
    fail("expected out with contiguous rows");
  Plane from[3];
  const py::object first = planes[0], second = planes[plan.grey ? 0 : 1], third = planes[plan.grey ? 0 : 2];
  const View views[3] = {{first, false}, {second, false}, {third, false}};
  for (size_t i = 0; i < count; ++i) {
    const int64_t height = i && g.chroma_shift_y ? (g.height + 1) / 2 : g.height;
    const int64_t width = i && g.chroma_shift_x ? (g.width + 1) / 2 : g.width;
    from[i] = plane_of(*views[i], static_cast<int>(i), strides[i].cast<int64_t>(), height, width, plan.wide);
  }
  const py::gil_scoped_release release;
  stmae::video::crop_resize(plan, from, static_cast<uint8_t*>(to->buf), to->strides[0]);
}

}  // namespace

PYBIND11_MODULE(_video, m) {
  m.doc() = "From a decoder's planes to a clip's frames.";
  m.def("cpu_capability", [] { return std::string(stmae::isa_name(stmae::isa())); });
  m.def("best_cpu_capability", [] { return std::string(stmae::isa_name(stmae::best_isa())); });
  m.def("set_cpu_capability", &stmae::set_isa, py::arg("name"));
  py::class_<CropResize>(m, "CropResize", "Cuts a box out of pictures, resizes it and makes it RGB, at once.")
      .def(py::init(&make), py::kw_only(), py::arg("size"), py::arg("box"), py::arg("out_size"), py::arg("mirror"),
           py::arg("chroma_shift"), py::arg("chroma_place"), py::arg("luma_weights"), py::arg("full_range"), py::arg("depth"),
           py::arg("grey"))
      .def("__call__", &call, py::arg("planes"), py::arg("strides"), py::arg("out"));
}
