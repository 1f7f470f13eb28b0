"""What a model costs: its FLOPs and its memory."""
