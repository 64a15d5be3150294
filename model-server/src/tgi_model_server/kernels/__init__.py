"""Portable Triton kernels for the devices that run Triton: NVIDIA, AMD and Intel GPUs. Nothing else imports them.

Needs the extra ``tgi-model-server[triton]``. With ``TRITON_INTERPRET=1`` set before the first import they run, slowly,
on CPU tensors. Strides are counted in elements; every tensor's last dimension is contiguous.
"""
