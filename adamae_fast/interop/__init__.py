"""Key maps to and from published AdaMAE and VideoMAE files and transformers' VideoMAE folders."""
