"""Published PyTorch files to base folders, and trained models back."""
