"""This library's kernels in models of other libraries; each module needs the library that it is named after."""
