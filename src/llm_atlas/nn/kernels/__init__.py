"""Triton twins of readable functions: the same signatures, one pass over memory, for GPUs.

They need Triton (`pip install "llm-atlas[triton]"`) and tensors on a GPU. With TRITON_INTERPRET=1 in the environment,
set before they are imported, they run slowly on a CPU: so are they tested where there is no GPU.
"""
