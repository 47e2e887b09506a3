"""mbv2's operators inside models that were written elsewhere: `mbv2.accelerate` and `mbv2.restore`.

`leaves` says which convolutions, BatchNorms and activations the operators can stand for, `patterns` puts them together
to stems, blocks and heads, `owners` knows the modules that hold such patterns, `swap` exchanges a module's forward and
keeps everything else, `accelerate` walks a model and reports.
"""
