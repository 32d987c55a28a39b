"""Checkpoints of other programs, read without running what they name and without torch.

    file -> recognise -> safetensors header     -> tensors, metadata
                      -> zip of torch.save      -> pickle of a closed list of names -> tensors, class names
    tensors -> safetensors

A tensor's bytes are read when they are asked for, so that a conversion holds one tensor at a time.
"""

from tools.checkpoint.reader import Checkpoint, open_checkpoint
from tools.checkpoint.safetensors_format import safetensors_parts, write_safetensors
from tools.checkpoint.tensors import LazyTensor
from tools.checkpoint.unpickle import UnsafePickle

__all__ = ["Checkpoint", "LazyTensor", "UnsafePickle", "open_checkpoint", "safetensors_parts", "write_safetensors"]
