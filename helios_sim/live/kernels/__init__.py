"""The parts of a decode step that torch would do in many small launches, as Triton kernels, behind one interface."""
