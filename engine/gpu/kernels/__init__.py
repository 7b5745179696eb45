"""Triton kernels, one subject per module: functions over tensors that know no model.

Each takes and returns torch tensors on one device, allocates nothing but its result and
synchronizes nothing, so that a CUDA graph can record it. Shapes and strides are looked at on the
host; token counts may change from call to call.
"""
