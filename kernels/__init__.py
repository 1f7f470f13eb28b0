"""The ops on GPUs, in Triton: one module an op, imported (and triton with it) when a CUDA tensor first reaches that op.

A launcher has its schema's name and arguments, checks nothing that `stmae.ops` has checked, never waits for the device and
never reads data on the host, so that it can be captured in a CUDA graph.
"""
