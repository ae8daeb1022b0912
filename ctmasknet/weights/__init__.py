"""Where weights come from and how they are read: safetensors files, and the author's released checkpoints."""
