"""What runs inside Triton's Python backend. Free of PyTorch and of any Triton client."""
