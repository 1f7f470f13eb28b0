"""Training on real video: data, recipes as presets, the loop, and the ``stmae`` command line.

Flow, one way: cli -> pretrain / reconstruct -> dataset -> video; every module reads on its own. Importing this package
imports nothing else: a data worker must not pay for TensorBoard, nor ``stmae --help`` for a decoder.
"""
